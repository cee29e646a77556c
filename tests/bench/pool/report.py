"""What was measured says: figures, goals; as tables and as Markdown.

Invariant: it measures nothing. A result is what ``result.json`` holds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tests._helpers.tables import row_of, table_of
from tests.bench.implementations import OURS
from tests.bench.report import (
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

from .workloads import (
    EVEN_LOADS,
    GOALS,
    LOADS,
    MANY,
    MEMORY,
    MOST_DISTURBED,
    MOST_MEMORY,
    MOST_SKEW,
    REUSEPORT,
    Load,
)

if TYPE_CHECKING:
    from rich.console import Console

# By figure, the values of all rounds.
Figures = dict[str, list[float]]
# By implementation, the figures of one round.
Turn = dict[str, dict[str, float]]


def figures_of(
    measured: dict[str, Any],
    workers: int,
    before: dict[int, float],
    after: dict[int, float],
) -> dict[str, float]:
    """Return the figures of one run.

    Args:
      measured: what the generator printed.
      workers: how many processes serve; one that served no connection counts, too.
      before: processor seconds of each process, the first of which is not a worker unless it
        is the only one.
      after: the same, after the run.
    """
    answered = measured["answered"]
    used = {pid: seconds - before.get(pid, 0) for pid, seconds in after.items()}
    dispatcher = used[next(iter(after))] if workers > 1 else 0.0
    figures = {
        "rate": measured["in_time"] / measured["seconds"],
        "skew": max(measured["pids"].values()) * workers / answered,
        "cpu": sum(used.values()) / answered,
        "dispatcher cpu": dispatcher / answered,
        "generator cpu": measured["own_cpu"] / answered,
        # Of a processor. One that is near 1 measures the generator.
        "generator share": measured["own_cpu"] / measured["took"],
        "lateness p99": measured["lateness"]["p99"],
    }
    for kind, prefix in (("latency", ""), ("light", "light "), ("burning", "burning ")):
        found = measured[kind]
        figures |= {f"{prefix}{name}": found[name] for name in ("p50", "p99") if name in found}
    return figures


def disturbance(turn: Turn) -> float:
    """Return the largest share of the machine that others used during one implementation's run."""
    return max((figures["others"] for figures in turn.values()), default=0.0)


def least_disturbed(turns: list[Turn], count: int) -> list[Turn]:
    """Return so many of the turns, chosen only by what others did meanwhile, in their order."""
    chosen = sorted(range(len(turns)), key=lambda i: disturbance(turns[i]))[:count]
    return [turns[i] for i in sorted(chosen)]


def by_name(turns: list[Turn], names: Iterable[str]) -> dict[str, Figures]:
    """Return the values of each of these implementations, which were in all turns, by figure."""
    return {
        name: {figure: [turn[name][figure] for turn in turns] for figure in turns[0][name]}
        for name in names
    }


def summary(load: Load, arrivals: float | None, values: dict[str, Figures]) -> Result:
    """Return medians and spreads of a load, of what is compared and of its ratio to ours.

    Without ours it is the ratio to SO_REUSEPORT, or else to the first.
    """
    reference = next((name for name in (OURS, REUSEPORT) if name in values), next(iter(values)))
    base = values[reference][load.figure]
    return {
        "figure": load.figure,
        "arrivals": arrivals,
        "reference": reference,
        "implementations": {
            name: {
                **spread(figures[load.figure]),
                "ratio": spread(ratios(figures[load.figure], base)),
                "figures": {
                    figure: [float(f"{value:.5g}") for value in each]
                    for figure, each in figures.items()
                },
            }
            for name, figures in values.items()
        },
    }


def arrivals(capacities: Iterable[float], share: float) -> float:
    """Return how many connections a second come in an open loop: the same for everybody."""
    return round(min(capacities) * share)


################################################################
# Goals
################################################################


def judge(result: Result) -> list[Verdict]:
    """Hold what was measured against the goals."""
    verdicts = []
    for goal in GOALS:
        ratio = ratio_of(_only(result, goal.figure), goal.over, goal.under)
        due = f"at {'least' if goal.at_least else 'most'} {goal.bound:.4g}"
        met = None if ratio is None else goal.is_met(ratio["median"])
        verdicts.append(Verdict(goal.text, due, ratio, met))
    verdicts += [
        _bounded(f"skew, {title}", _values(result, title, "skew"), MOST_SKEW)
        for title in EVEN_LOADS
    ]
    grown = result.get("memory") or []
    text = f"bytes in the parent, {MANY:,} jobs in flight, beyond those with none"
    return [*verdicts, _bounded(text, grown, MOST_MEMORY)]


def _bounded(text: str, values: Sequence[float], most: float) -> Verdict:
    due = f"at most {most:,}"
    if not values:
        return Verdict(text, due, None, None)
    found = spread(values)
    return Verdict(text, due, found, found["median"] <= most)


def _values(result: Result, title: str, figure: str) -> list[float]:
    found = result["cases"].get(title, {}).get("implementations", {}).get(OURS)
    values: list[float] = found["figures"].get(figure, []) if found else []
    return values


def _only(result: Result, figure: str) -> Result:
    """Return the result as if that figure had been all that was measured."""
    return {
        "cases": {
            title: {
                "implementations": {
                    name: {"values": row["figures"][figure]}
                    for name, row in case["implementations"].items()
                    if figure in row["figures"]
                }
            }
            for title, case in result["cases"].items()
        }
    }


################################################################
# Tables
################################################################

MICRO, MILLI = 1e6, 1e3
# Headings of the columns, figures, by what these are multiplied, and how they are written.
COLUMNS: list[tuple[str, str, float, str]] = [
    ("a second", "rate", 1, ",.0f"),
    ("p50 ms", "p50", MILLI, ".2f"),
    ("p99 ms", "p99", MILLI, ".2f"),
    ("light p99 ms", "light p99", MILLI, ".2f"),
    ("skew", "skew", 1, ".2f"),
    ("CPU µs each", "cpu", MICRO, ".0f"),
    ("dispatcher's", "dispatcher cpu", MICRO, ".0f"),
    ("generator's", "generator cpu", MICRO, ".0f"),
]


def columns_of(case: Result) -> list[tuple[str, str, float, str]]:
    """Return the columns of a load's table: without those that burn nothing, where all do not."""
    burns = any("burning p99" in row["figures"] for row in case["implementations"].values())
    return [each for each in COLUMNS if burns or not each[1].startswith("light")]


def headings_of(case: Result) -> list[str]:
    """Return the headings of a load's table."""
    ratio = f"{case['figure']} / {case['reference']}"
    return ["", *(heading for heading, *_ in columns_of(case)), ratio, "quartiles"]


def cells_of(name: str, case: Result) -> list[str]:
    """Return the row of an implementation: medians of its rounds, and the ratio in each."""
    row = case["implementations"][name]
    ratio = row["ratio"]
    medians = [
        format(statistics.median(row["figures"][figure]) * factor, form)
        for _, figure, factor, form in columns_of(case)
    ]
    quartiles = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
    return [name, *medians, f"{ratio['median']:.2f}", quartiles]


def title_of(title: str, case: Result) -> str:
    """Return a load's title, with the rate of arrivals."""
    return f"{title}, {case['arrivals']:,.0f} a second" if case["arrivals"] else title


def show(result: Result, console: Console) -> None:
    """Print what was measured, and which implementations are missing."""
    for title, case in result["cases"].items():
        headings = headings_of(case)
        table = table_of(title_of(title, case), headings, range(1, len(headings)))
        for name in case["implementations"]:
            table.add_row(*cells_of(name, case), style="bold" if is_ours(name) else "")
        console.print(table)
    if result["memory"]:
        console.print(f"{MEMORY}: {memory_line(result)}")
    for note in result["notes"]:
        console.print(note, style="yellow", markup=False)
    show_absent(result, console)


def memory_line(result: Result) -> str:
    """Return what jobs in flight take, in words."""
    found = spread(result["memory"])
    return (
        f"{found['median'] / 1e6:.2f} MB more with {MANY:,} jobs in flight, "
        f"{found['median'] / MANY:.0f} bytes each"
    )


def notes_of(result: Result) -> list[str]:
    """Return what is to be known beside the tables: whether the generator, or others, mattered."""
    notes = []
    for title, case in result["cases"].items():
        for name, row in case["implementations"].items():
            share = statistics.median(row["figures"]["generator share"])
            if share > 0.9:
                notes.append(f"{title}: {name}: limited by the generator, which had no time left")
        others = [
            value for row in case["implementations"].values() for value in row["figures"]["others"]
        ]
        if statistics.median(others) > MOST_DISTURBED / 2:
            notes.append(
                f"{title}: others took {statistics.median(others):.0%} of this machine meanwhile"
            )
    return notes


def markdown(result: Result) -> str:
    """Return the tables for the documentation, with marks between which it includes them."""
    lines = ["<!-- Written by nox -s pool-bench -- --write. -->", "", *machine_lines(result)]
    for load in LOADS:
        case = result["cases"].get(load.title)
        if not case:
            continue
        headings = headings_of(case)
        lines += [f"<!-- begin {load.title} -->", ""]
        lines += row_of(title_of(load.title, case), *headings[1:]) + row_of(
            *["---"] * len(headings)
        )
        for name in case["implementations"]:
            cells = cells_of(name, case)
            lines += row_of(*(f"**{cell}**" if is_ours(name) else cell for cell in cells))
        lines += ["", f"<!-- end {load.title} -->", ""]
    lines += ["<!-- begin notes -->", ""]
    lines += [f"- {note}" for note in result["notes"]]
    if result["memory"]:
        lines.append(f"- {MEMORY}: {memory_line(result)}")
    lines += ["", "<!-- end notes -->", ""]
    return "\n".join([*lines, *goal_lines(judge(result))]) + "\n"
