"""Spreads, ratios and goals of measurements, as tables and as Markdown."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console
from tests._helpers.tables import row_of, table_of
from tests.bench.implementations import OURS

Result = dict[str, Any]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    if len(values) < 2:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return the ratio within each turn."""
    return [one / two for one, two in zip(over, under, strict=False) if two]


def is_ours(name: str) -> bool:
    """Whether an entry is of this library, in any variant."""
    return name.split(":", maxsplit=1)[0] == OURS


def ratio_of(
    result: Result, over: tuple[str, str], under: tuple[str, str]
) -> dict[str, float] | None:
    """Return the ratio of two implementations, turn by turn; None if one did not run."""
    found = [
        result["cases"].get(case, {}).get("implementations", {}).get(name)
        for case, name in (over, under)
    ]
    if None in found:
        return None
    both = ratios(*(each["values"] for each in found))
    return spread(both) if both else None


@attrs.frozen
class Goal:
    """An expected ratio of ``over`` to ``under``: at least or at most ``bound``.

    Each is the title of a case and an implementation. Those of one case were measured in turns;
    only the goal of many idle connections compares two cases, one measured after the other.
    """

    text: str
    over: tuple[str, str]
    under: tuple[str, str]
    bound: float
    at_least: bool = False

    def is_met(self, ratio: float) -> bool:
        """Whether a measured ratio meets it."""
        return ratio >= self.bound if self.at_least else ratio <= self.bound


@attrs.frozen
class Verdict:
    """A goal, and what was measured."""

    goal: str
    expected: str
    measured: dict[str, float] | None
    is_met: bool | None

    @property
    def word(self) -> str:
        """One word for the verdict."""
        return {True: "met", False: "missed", None: "not measured"}[self.is_met]

    def cells(self) -> tuple[str, str, str, str, str]:
        """Return the row of a table."""
        if self.measured is None:
            return self.goal, self.expected, "", "", self.word
        median, low, high = (f"{self.measured[key]:.3g}" for key in ("median", "low", "high"))
        return self.goal, self.expected, median, f"{low} to {high}", self.word


def show_absent(result: Result, console: Console) -> None:
    """Print which implementations are missing or failed."""
    for kind in ("missing", "failed"):
        for name, why in result[kind].items():
            console.print(f"{kind}: {name} ({why})", style="yellow", markup=False)


def show_goals(verdicts: Iterable[Verdict], console: Console) -> None:
    """Print the goals."""
    table = table_of("Goals", ("goal", "expected", "measured", "quartiles", ""), (2, 3))
    for verdict in verdicts:
        table.add_row(*verdict.cells(), style="red" if verdict.is_met is False else "")
    console.print(table)


def machine_lines(result: Result) -> list[str]:
    """Return the machine and the versions of all implementations, in Markdown."""
    lines = ["<!-- begin machine -->", ""]
    kind = "quick" if result["quick"] else "full"
    rounds = "1 round" if str(result["rounds"]) == "1" else f"{result['rounds']} rounds"
    lines += [f"{result['machine']}; a {kind} run of {rounds}.", ""]
    lines += row_of("implementation", "version") + row_of("---", "---")
    for name, version in result["versions"].items():
        lines += row_of(name, version)
    for key in ("missing", "failed"):
        for name, why in result[key].items():
            lines += row_of(name, f"**{key}**: {why}")
    return [*lines, "", "<!-- end machine -->", ""]


def goal_lines(verdicts: Iterable[Verdict]) -> list[str]:
    """Return the goals in Markdown."""
    lines = ["<!-- begin goals -->", "", *row_of("goal", "expected", "measured", "quartiles", "")]
    lines += row_of(*["---"] * 5)
    for verdict in verdicts:
        *words, last = verdict.cells()
        lines += row_of(*words, f"**{last}**" if verdict.is_met is False else last)
    return [*lines, "", "<!-- end goals -->"]
