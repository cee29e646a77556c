"""Ratios, goals and regressions of a result, as tables and as Markdown."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import attrs

from tests._helpers.tables import row_of, table_of
from tests.bench.implementations import OURS
from tests.bench.report import (
    Goal,
    Result,
    Verdict,
    goal_lines,
    is_ours,
    machine_lines,
    ratio_of,
    ratios,
    show_absent,
    spread,
)

from .workloads import CASES, GOALS, GROUPS, MEMORY, MOST_MEMORY, STREAM, Case

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console


def summary(case: Case, values: dict[str, list[float]]) -> Result:
    """Return medians and spreads of a case, of the values and of the ratios to ours."""
    reference = next(filter(is_ours, values))
    return {
        "unit": case.unit,
        "figure": case.figure,
        "group": case.group,
        "reference": reference,
        "implementations": {
            name: {
                **spread(measured),
                "ratio": spread(ratios(measured, values[reference]) or [float("nan")]),
                "values": [float(f"{value:.5g}") for value in measured],
            }
            for name, measured in values.items()
        },
    }


################################################################
# Goals
################################################################


MEMORY_GOAL = "bytes of an idle connection beyond those of trio.SocketStream"


def judge(result: Result) -> list[Verdict]:
    """Compare the measured ratios with the goals."""
    measured = condensed(result)["goals"]
    verdicts = []
    for goal in GOALS:
        ratio = measured.get(goal.text)
        expected = f"at {'least' if goal.at_least else 'most'} {goal.bound:.4g}"
        met = None if ratio is None else goal.is_met(ratio["median"])
        verdicts.append(Verdict(goal.text, expected, ratio, met))
    beyond = measured.get(MEMORY_GOAL)
    is_small = None if beyond is None else beyond["median"] <= MOST_MEMORY
    return [*verdicts, Verdict(MEMORY_GOAL, f"at most {MOST_MEMORY}", beyond, is_small)]


################################################################
# The kept result
################################################################


def condensed(result: Result) -> Result:
    """Return what ``result.json`` keeps: medians and quartiles, and no single values."""
    if "goals" in result:
        return result
    cases = {
        title: {
            **case,
            "implementations": {
                name: _rounded({key: row[key] for key in row if key != "values"})
                for name, row in case["implementations"].items()
            },
        }
        for title, case in result["cases"].items()
    }
    return {**result, "cases": cases, "goals": _rounded(_goals_of(result))}


def _goals_of(result: Result) -> Result:
    found = {goal.text: ratio_of(result, goal.over, goal.under) for goal in GOALS}
    memory = result["cases"].get(MEMORY, {}).get("implementations", {})
    if OURS in memory and STREAM in memory:
        pairs = zip(memory[OURS]["values"], memory[STREAM]["values"], strict=True)
        found[MEMORY_GOAL] = spread([ours - theirs for ours, theirs in pairs])
    return {text: measured for text, measured in found.items() if measured}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.7g}")


def as_json(value: Any, indent: str = "") -> str:
    """Write a result as JSON, with an object on one line if it is short."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict) or len(line) + len(indent) < 200:
        return line
    inner = indent + " "
    items = [
        f"{inner}{json.dumps(key, ensure_ascii=False)}: {as_json(each, inner)}"
        for key, each in value.items()
    ]
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"


################################################################
# Regressions
################################################################


@attrs.frozen
class Change:
    """A ratio in the kept result and in this run.

    Attributes:
      titles: the cases of the two sides.
      relative_to: the other implementation.
      worse: the factor by which trio_unixconn got slower.
    """

    titles: tuple[str, ...]
    what: str
    relative_to: str
    then: float
    now: float
    worse: float


@attrs.frozen
class Comparison:
    """The regressions, the number of ratios compared, and notes on what could not be compared."""

    regressions: list[Change]
    compared: int
    notes: list[str]


def compare(then: Result, now: Result, tolerance: float) -> Comparison:
    """Compare with a kept result, by the ratios to the others and by the goals.

    In a case, trio_unixconn has got slower if it has relative to most of the others: a change
    relative to only one is a change of that one. The ratio of a goal is compared directly.
    """
    then, now = condensed(then), condensed(now)
    changes = [
        change
        for title in then["cases"]
        if title in now["cases"]
        for change in _changes_in(title, then, now)
    ]
    changes += filter(None, (_change_of(goal, then, now) for goal in GOALS))
    return Comparison(
        [change for change in changes if change.worse > tolerance],
        len(changes),
        [*_only_in(then, now, "only in the kept result"), *_only_in(now, then, "only in this run")],
    )


def confirmed(first: Comparison, again: Comparison) -> Comparison:
    """Return the first comparison with only those regressions that were seen again."""
    seen = {change.what for change in again.regressions}
    lasting = [change for change in first.regressions if change.what in seen]
    return attrs.evolve(first, regressions=lasting)


def _changes_in(title: str, then: Result, now: Result) -> Iterable[Change]:
    names = [name for name in then["cases"][title]["implementations"] if _ran(now, title, name)]
    for ours in filter(is_ours, names):
        found = []
        for other in names:
            if is_ours(other):
                continue
            old, new = (_quotient(each, title, ours, other) for each in (then, now))
            if old > 0 and new > 0:
                found.append((new / old, old, new, other))
        if found:
            # The median; of two, the one that is in our favour.
            worse, old_ratio, new_ratio, other = sorted(found)[(len(found) - 1) // 2]
            yield Change((title,), f"{title}: {ours}", other, old_ratio, new_ratio, worse)


def _quotient(result: Result, title: str, over: str, under: str) -> float:
    """Return the quotient of two ratios to the reference; 0 if one was not measured."""
    rows = result["cases"][title]["implementations"]
    one, two = (rows[name]["ratio"]["median"] for name in (over, under))
    return float(one / two) if two else 0.0


def _change_of(goal: Goal, then: Result, now: Result) -> Change | None:
    old, new = (each["goals"].get(goal.text) for each in (then, now))
    if not (old and new and old["median"] > 0 and new["median"] > 0):
        return None
    before, after = old["median"], new["median"]
    worse = before / after if goal.at_least else after / before
    return Change((goal.over[0], goal.under[0]), f"goal: {goal.text}", "", before, after, worse)


def _ran(result: Result, title: str, name: str) -> bool:
    return name in result["cases"].get(title, {}).get("implementations", {})


def _only_in(one: Result, two: Result, where: str) -> Iterable[str]:
    whole = [title for title in one["cases"] if title not in two["cases"]]
    if whole:
        yield f"cases {where}: {', '.join(whole)}"
    lacking: dict[str, None] = {}
    for title in one["cases"]:
        if title not in whole:
            for name in one["cases"][title]["implementations"]:
                if not _ran(two, title, name):
                    lacking[name] = None
    for name in lacking:
        reason = two["missing"].get(name) or two["failed"].get(name)
        yield f"implementation {where}: {name}{f' ({reason})' if reason else ''}"


################################################################
# Tables
################################################################


def human(value: float, figure: str) -> str:
    """Write a time, or a number of bytes."""
    if figure == "bytes":
        return f"{value:,.0f} B"
    if value < 1e-3:
        return f"{value * 1e6:.1f} µs"
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"


def cells_of(name: str, case: Result) -> tuple[str, str, str, str]:
    """Return the row of an implementation."""
    row = case["implementations"][name]
    ratio = row["ratio"]
    return (
        name,
        human(row["median"], case["figure"]),
        f"{ratio['median']:.2f}",
        f"{ratio['low']:.2f} to {ratio['high']:.2f}",
    )


def headings_of(case: Result) -> tuple[str, str, str, str]:
    """Return the headings of a case's table."""
    return "", f"per {case['unit']}", f"ratio to {case['reference']}", "quartiles of the ratio"


def show(result: Result, console: Console) -> None:
    """Print what was measured, and which implementations are missing."""
    for title, case in result["cases"].items():
        table = table_of(title, headings_of(case), (1, 2, 3))
        for name in case["implementations"]:
            table.add_row(*cells_of(name, case), style="bold" if is_ours(name) else "")
        console.print(table)
    show_absent(result, console)


def show_comparison(found: Comparison, tolerance: float, console: Console) -> None:
    """Print the regressions, and what was not compared."""
    if found.regressions:
        headings = ("slower than before", "relative to", "ratio before", "now", "worse by")
        table = table_of("Regressions", headings, (2, 3, 4))
        for each in found.regressions:
            numbers = (f"{each.then:.3g}", f"{each.now:.3g}", f"{each.worse:.2f}")
            table.add_row(each.what, each.relative_to, *numbers, style="red")
        console.print(table)
    for note in found.notes:
        console.print(f"not compared: {note}", style="yellow", markup=False)
    console.print(
        f"{found.compared} ratios compared, {len(found.regressions)} worse by more than a "
        f"factor of {tolerance:g}"
    )


def markdown(result: Result) -> str:
    """Return the tables for the documentation, between the markers that it includes them by."""
    lines = ["<!-- Written by nox -s bench -- --write. -->", "", *machine_lines(result)]
    for group in GROUPS:
        lines += [f"<!-- begin {group} -->", ""]
        for case in CASES:
            found = result["cases"].get(case.title)
            if case.group == group and found:
                lines += [*row_of(case.title, *headings_of(found)[1:]), *row_of(*["---"] * 4)]
                for name in found["implementations"]:
                    cells = cells_of(name, found)
                    lines += row_of(*(f"**{cell}**" if is_ours(name) else cell for cell in cells))
                lines.append("")
        lines += [f"<!-- end {group} -->", ""]
    return "\n".join([*lines, *goal_lines(judge(result))]) + "\n"
