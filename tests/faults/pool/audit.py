"""Compare the records of clients, pool and handlers.

Invariant: each figure says what is expected, or that it is only shown. A figure that is wrong names
a few of the jobs or tokens in question.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import attrs

from .clients import ANSWERED

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path


@attrs.frozen
class Figure:
    """One figure of a scene.

    Attributes:
      expected: what it must be, in words; "" if it is only shown.
      holds: whether it is that.
      example: some of what it counts.
      rule: what it must be, in words that hold for all scenes.
    """

    name: str
    value: float
    expected: str = ""
    holds: bool = True
    example: str = ""
    rule: str = ""


def shown(name: str, value: float) -> Figure:
    """Return a figure that is only shown."""
    return Figure(name, value)


def none(name: str, what: Collection[Any] | int) -> Figure:
    """Return a figure that must be 0: a number, or how many there are of something."""
    if isinstance(what, int):
        return Figure(name, what, "0", not what, rule="0")
    example = ", ".join(map(str, list(what)[:3]))
    return Figure(name, len(what), "0", not what, example, "0")


def equal(name: str, value: float, expected: float, rule: str = "") -> Figure:
    """Return a figure that must be another one."""
    return Figure(name, value, f"{expected:,}", value == expected, rule=rule)


def at_most(name: str, value: float, limit: float, rule: str = "") -> Figure:
    """Return a figure that may not be more."""
    return Figure(name, value, f"at most {limit:,}", value <= limit, rule=rule)


def at_least(name: str, value: float, limit: float) -> Figure:
    """Return a figure that may not be less."""
    return Figure(name, value, f"at least {limit:,}", value >= limit)


@attrs.define
class Records:
    """What the handlers wrote.

    Attributes:
      began: how often the handler of each job has begun.
      pids: the worker in which the handler of each job has begun.
      tokens: what each job's client has sent.
      ended: jobs that were answered.
    """

    began: Counter[int] = attrs.field(factory=Counter[int])
    pids: dict[int, int] = attrs.field(factory=dict[int, int])
    tokens: dict[int, int] = attrs.field(factory=dict[int, int])
    ended: Counter[int] = attrs.field(factory=Counter[int])

    @classmethod
    def of(cls, path: Path) -> Records:
        """Read the records."""
        records = cls()
        for line in path.read_text(encoding="ascii").splitlines():
            what, job, *rest = line.split()
            if what == "token":
                records.tokens[int(job)] = int(rest[0])
            elif what == "begin":
                records.began[int(job)] += 1
                records.pids[int(job)] = int(rest[0])
            else:
                records.ended[int(job)] += 1
        return records


def twice(counts: Counter[int]) -> list[int]:
    """Return what was counted more than once."""
    return [each for each, count in counts.items() if count > 1]


def audit(
    outcomes: Mapping[int, str],
    ledger: Mapping[str, Any],
    records: Records,
    deaths: int = 0,
    raising: Collection[int] = (),
) -> list[Figure]:
    """Compare the records of clients, pool and handlers.

    Args:
      outcomes: the outcome of each client, by its token.
      ledger: what the server has recorded; without receipts, the handlers' records take
        their place.
      deaths: how many workers were killed.
      raising: the tokens of clients whose handlers raise.
    """
    counts = ledger["statistics"]
    receipts = {job: token for job, token, _ in ledger["receipts"]}
    has_receipts = bool(receipts)
    reported = Counter(job for job, _ in ledger["reported"])
    began, ended = set(records.began), set(records.ended)
    acknowledged = set(receipts) if has_receipts else began | set(reported)
    job_of = {token: job for job, token in (receipts or records.tokens).items()}
    failed = {
        token: was for token, was in outcomes.items() if was != ANSWERED and token not in raising
    }
    raised = {job_of[token] for token in raising if token in job_of}
    # Their handlers have not ended, so the pool must have reported them.
    open_jobs = acknowledged - ended - raised
    late = set(reported) & ended
    unread = set(reported) - set(records.tokens)
    of_failed = {job_of[token] for token in failed if token in job_of}
    unknown = [f"{token}: {was}" for token, was in failed.items() if token not in job_of]
    figures = [
        shown("clients", len(outcomes)),
        equal("accepted", ledger["accepted"], len(outcomes), "clients"),
        equal("acknowledged", counts["acknowledged"], len(outcomes), "clients"),
        none("rejected or cancelled", counts["rejected"] + counts["cancelled"]),
        shown("retried on another worker", counts["retried"]),
        equal(
            "handled + failed + reported",
            counts["handled"] + counts["failed"] + counts["abandoned"],
            len(outcomes),
            "clients",
        ),
        equal("failed in the handler", counts["failed"], len(raising), "handlers that raise"),
        shown("reported", len(ledger["reported"])),
        equal(
            "reported, as the pool has counted",
            counts["abandoned"],
            len(ledger["reported"]),
            "reported",
        ),
        none("reported twice", twice(reported)),
        none("reported, never acknowledged", set(reported) - acknowledged),
        none("begun, never acknowledged", began - acknowledged),
        none("begun twice", twice(records.began)),
        none("acknowledged, not ended, not reported", open_jobs - set(reported)),
        none("not the token that the address says", mixed(receipts, records)),
        shown("reported: acknowledged, not begun", len(set(reported) - began)),
        shown("reported: begun, not ended", len((set(reported) & began) - ended)),
        # The last instruction of a handler, and its return, are not one. One handler runs at a
        # time.
        at_most(
            "reported: ended, but not returned",
            len(late),
            deaths,
            "at most one for each worker killed",
        ),
        shown("clients that failed", len(failed)),
        none("clients that failed, job not reported", of_failed - set(reported)),
        none("clients that failed, job had ended", of_failed & ended),
        none("clients that waited in vain", [t for t, was in failed.items() if "unans" in was]),
        shown(
            "reported, but the client had its answer",
            len(set(reported) - of_failed - unread - raised),
        ),
    ]
    if has_receipts:
        figures.append(none("clients that failed, never acknowledged", unknown))
        figures.append(equal("receipts", len(ledger["receipts"]), len(outcomes), "clients"))
        figures.append(none("errors of submit", [was for _, was in ledger["errors"]]))
    else:
        # Their tokens were not read, so their jobs are unknown. There are not more than those.
        figures.append(
            at_most(
                "clients that failed, token not read",
                len(unknown),
                len(unread),
                "at most those reported",
            )
        )
    return figures


def mixed(receipts: dict[int, int], records: Records) -> list[int]:
    """Return the jobs whose client was another than the one that was accepted."""
    return [
        job
        for job, token in records.tokens.items()
        if job in receipts and token not in (receipts[job], 0)
    ]


def leftovers(found: Mapping[str, int], ledger: Mapping[str, Any]) -> list[Figure]:
    """Return the figures of what should not be there at the end."""
    figures = [none(name, count) for name, count in found.items()]
    return [*figures, none("processes left at the end", ledger["processes left"])]
