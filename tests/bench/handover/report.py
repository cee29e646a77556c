"""What was measured says: tables, goals, and Markdown for the documentation.

Invariant: it measures nothing. A result is what ``result.json`` holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests._helpers.tables import row_of, table_of
from tests.bench.implementations import OURS
from tests.bench.report import (
    Result,
    Verdict,
    goal_lines,
    is_ours,
    machine_lines,
    show_absent,
)

if TYPE_CHECKING:
    from rich.console import Console

MILLI = 1000.0
# How a request can end without an answer, and late.
LOSSES = ("refused", "reset", "empty", "wrong", "unfinished", "late")
HEADINGS = (
    *("", "replaced", "requests", *LOSSES, "gap ms", "steady"),
    *("p99 ms", "steady", "p99.9 ms", "steady"),
)


def cells_of(row: Result) -> list[str]:
    """Return the figures of a server, in the order of HEADINGS."""
    steady, during = row["steady"], row["during"]
    latencies = [
        f"{MILLI * each.get(key, 0):.1f}"
        for key in ("gap", "p99", "p999")
        for each in (during, steady)
    ]
    return [
        f"{row['replaced']:,}",
        f"{during['begun']:,.0f}",
        *(f"{during[key]:,.0f}" for key in LOSSES),
        *latencies,
    ]


def lost(counted: Result) -> float:
    """Return how many requests were not answered in time."""
    return float(sum(counted[key] for key in LOSSES) + counted["no room"])


def exactly(text: str, expected: str, value: float | None, *, holds: bool) -> Verdict:
    if value is None:
        return Verdict(text, expected, None, None)
    return Verdict(text, expected, dict.fromkeys(("median", "low", "high"), value), holds)


def bounded(text: str, bound: float, unit: str, found: dict[str, float] | None) -> Verdict:
    """Return whether a median in seconds is at most a bound in milliseconds."""
    expected = f"at most {bound:g} {unit}"
    if not found:
        return Verdict(text, expected, None, None)
    measured = {key: MILLI * value for key, value in found.items()}
    return Verdict(text, expected, measured, measured["median"] <= bound)


def judge(result: Result) -> list[Verdict]:
    """Hold what was measured against the goals."""
    verdicts: list[Verdict] = []
    for name in "TCP", "Unix":
        counted = result.get("requests", {}).get(name)
        text = f"requests lost over {name}"
        if counted:
            text += f", of {counted['begun']:,.0f} over {counted['replaced']} upgrades"
        value = lost(counted) - counted["late"] if counted else None
        verdicts.append(exactly(text, "0", value, holds=value == 0))
        value = counted["late"] if counted else None
        verdicts.append(exactly(f"requests late over {name}", "none", value, holds=value == 0))
    for name in "upgrades", "restarts of workers":
        counted = result.get("kept", {}).get(name)
        text = f"kept connections closed over {name}"
        if counted:
            text = (
                f"of {result['sizes']['kept']:,} kept connections, closed over "
                f"{counted['replaced']} {name}"
            )
        value = counted["closed"] if counted else None
        verdicts.append(exactly(text, "0", value, holds=value == 0))
    row = result["compared"]["servers"].get(OURS)
    more = None
    if row:
        seconds = row["during"].get("p999", 0) - row["steady"].get("p999", 0)
        more = dict.fromkeys(("median", "low", "high"), seconds)
    verdicts.append(bounded("p99.9 during upgrades, more than steady", 5, "ms", more))
    found = result.get("upgrades", {})
    verdicts += [
        bounded("COMMIT to SERVING, 8 listeners", 5, "ms", found.get("COMMIT to SERVING")),
        bounded("an upgrade, more than a start", 50, "ms", found.get("upgrade more than start")),
    ]
    idle = result.get("idle")
    text = "idle connections passed on, 1 KiB each"
    if idle:
        text = f"{idle['connections']:,} {text}"
    verdicts.append(bounded(text, 300, "ms", idle and idle["seconds"]))
    value = idle["closed"] if idle else None
    verdicts.append(exactly("of these, closed", "0", value, holds=value == 0))
    return verdicts


def title_of(result: Result) -> str:
    return f"replaced under load, {result['compared']['rate']:,} requests a second"


def show(result: Result, console: Console) -> None:
    """Print what was measured, and which servers are missing."""
    table = table_of(title_of(result), HEADINGS, range(1, len(HEADINGS)))
    for name, row in result["compared"]["servers"].items():
        table.add_row(name, *cells_of(row), style="bold" if is_ours(name) else "")
    console.print(table)
    for part in "requests", "kept", "upgrades", "idle":
        for name, found in result.get(part, {}).items():
            console.print(f"{part}, {name}: {brief(found)}", markup=False, highlight=False)
    show_absent(result, console)


def brief(found: Any) -> str:
    """Return figures in one line."""
    if isinstance(found, dict):
        return ", ".join(f"{name} {brief(value)}" for name, value in found.items())
    if isinstance(found, list):
        return " ".join(map(brief, found))
    return f"{found:.4g}"


def markdown(result: Result) -> str:
    """Return the tables for the documentation, with marks between which it includes them."""
    lines = ["<!-- Written by nox -s handover-bench -- --write. -->", ""]
    lines += machine_lines(result)
    lines += ["<!-- begin servers -->", ""]
    lines += row_of(*HEADINGS) + row_of("---", *["---:"] * (len(HEADINGS) - 1))
    for name, row in result["compared"]["servers"].items():
        cells = [name, *cells_of(row)]
        lines += row_of(*(f"**{cell}**" if is_ours(name) else cell for cell in cells))
    rate = result["compared"]["rate"]
    lines += ["", f"{rate:,} requests a second, a connection each.", ""]
    lines += ["<!-- end servers -->", ""]
    found = result.get("upgrades")
    if found:
        lines += ["<!-- begin upgrades -->", "", *row_of("milliseconds", "median", "quartiles")]
        lines += row_of("---", "---:", "---")
        for name, each in found.items():
            low, middle, high = (f"{MILLI * each[key]:.1f}" for key in ("low", "median", "high"))
            lines += row_of(name, middle, f"{low} to {high}")
        lines += ["", "<!-- end upgrades -->", ""]
    return "\n".join([*lines, *goal_lines(judge(result))]) + "\n"
