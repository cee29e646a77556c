"""How fast this library is, beside everybody else.

``python benchmarks/bench.py [--quick] [--write] [--check FILE]``. All contestants of a case run
in turn, A B C A B C, each as two processes of its own, after a run for warming up that does not
count. What is shown is the median of the ratios within each turn, and their spread; times are
shown beside it. The exit status is 1 if a goal is missed, or with ``--check`` if a ratio is worse
by more than 10 % than in that file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import attrs
from cases import CASES, GOALS, MEMORY, MOST_MEMORY, OURS, STREAM, Case
from contestants import CONTESTANTS, MissingError, Pair
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

FOLDER = Path(__file__).parent
RESULT = FOLDER / "result.json"
ROUNDS, QUICK_ROUNDS = 15, 5
# How much worse a ratio may get before that is a regression.
TOLERANCE = 1.10


@attrs.frozen
class Entry:
    """What one contestant, in one of its ways, did in each turn of a case."""

    name: str
    pair: Pair
    variant: str
    values: list[float] = attrs.field(factory=list)


def entries_of(case: Case, pairs: list[Pair]) -> list[Entry]:
    """Return who can run a case, and in which ways."""
    return [
        Entry(": ".join(filter(None, (pair.contestant.name, variant))), pair, variant)
        for pair in pairs
        for variant in pair.cases.get(case.name, ())
    ]


def measure(
    case: Case, entries: list[Entry], rounds: int, count: int, progress: Any, task: Any
) -> None:
    """Run a case in turns."""
    for entry in entries:
        entry.pair.run(case.name, entry.variant, max(1, count // 10), case.size)
    for i in range(rounds):
        # Each turn begins with another, so that nobody always runs behind the same.
        for entry in entries[i % len(entries) :] + entries[: i % len(entries)]:
            answer = entry.pair.run(case.name, entry.variant, count, case.size)
            entry.values.append(answer[case.figure] / (count if case.figure == "seconds" else 1))
            progress.advance(task)


def summary(case: Case, entries: list[Entry]) -> dict[str, Any]:
    """Return medians and spreads, of the values and of the ratios to ours."""
    ours = next((each for each in entries if each.name.split(":")[0] == OURS), entries[0])
    found: dict[str, Any] = {"unit": case.unit, "figure": case.figure, "reference": ours.name}
    found["contestants"] = {
        each.name: {
            "median": statistics.median(each.values),
            "values": each.values,
            "ratio": spread(
                [one / two for one, two in zip(each.values, ours.values, strict=True)]
            ),
        }
        for each in entries
    }
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    if len(values) < 2:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def ratio_of(result: dict[str, Any], over: tuple[str, str], under: tuple[str, str]) -> dict[str, float] | None:
    """Return the ratio of two contestants, turn by turn; None if one did not run."""
    try:
        values = [result["cases"][case]["contestants"][who]["values"] for case, who in (over, under)]
    except KeyError:
        return None
    return spread([one / two for one, two in zip(*values, strict=False)])


def run(quick: bool, rounds: int, only: str) -> dict[str, Any]:
    """Measure everything; return what came of it."""
    console = Console(stderr=True)
    missing: dict[str, str] = {}
    versions: dict[str, str] = {}
    pairs: list[Pair] = []
    cases = [
        case for case in CASES if (case.quick if quick else case.count) and only in case.title
    ]
    result: dict[str, Any] = {
        "machine": f"{platform.system()} {platform.release()}, {os.cpu_count()} processors",
        "python": platform.python_version(),
        "rounds": rounds,
        "quick": quick,
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            for contestant in CONTESTANTS:
                try:
                    pairs.append(Pair(contestant, folder))
                    versions[contestant.name] = contestant.version()
                except MissingError as exc:
                    missing[contestant.name] = str(exc)
            todo = [(case, entries_of(case, pairs)) for case in cases]
            with Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            ) as progress:
                task = progress.add_task("", total=sum(len(e) for _, e in todo) * rounds)
                for case, entries in todo:
                    progress.update(task, description=case.title)
                    measure(
                        case, entries, rounds, case.quick if quick else case.count, progress, task
                    )
                    result["cases"][case.title] = summary(case, entries)
        finally:
            for pair in pairs:
                pair.close()
    return {**result, "versions": versions, "missing": missing}


def human(value: float, figure: str) -> str:
    """Write a time, or a number of bytes."""
    if figure == "bytes":
        return f"{value:,.0f} B"
    if value < 1e-3:
        return f"{value * 1e6:.1f} µs"
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console()
    for title, case in result["cases"].items():
        table = Table(title=title, title_justify="left")
        for heading in ("", f"per {case['unit']}", f"ratio to {case['reference']}", "quartiles"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name, row in case["contestants"].items():
            ratio = row["ratio"]
            table.add_row(
                name,
                human(row["median"], case["figure"]),
                f"{ratio['median']:.2f}",
                f"{ratio['low']:.2f} to {ratio['high']:.2f}",
                style="bold" if name.split(":")[0] == OURS else "",
            )
        console.print(table)
    for name, why in result["missing"].items():
        console.print(f"[yellow]missing: {name} ({why})[/]")


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold what was measured against the goals."""
    rows = []
    for goal in GOALS:
        ratio = ratio_of(result, goal.over, goal.under)
        if ratio is not None:
            due = f"at {'least' if goal.at_least else 'most'} {goal.bound:.4g}"
            rows.append({"goal": goal.text, "due": due, "ratio": ratio, "met": goal.is_met(ratio["median"])})
    memory = result["cases"].get("memory of an idle connection")
    if memory:
        ours, theirs = (memory["contestants"][who]["median"] for who in (OURS, STREAM))
        rows.append(
            {
                "goal": "bytes per idle connection beyond trio.SocketStream",
                "due": f"at most {MOST_MEMORY}",
                "ratio": dict.fromkeys(("median", "low", "high"), ours - theirs),
                "met": ours - theirs <= MOST_MEMORY,
            }
        )
    return rows


def show_goals(rows: list[dict[str, Any]]) -> None:
    """Print the goals."""
    table = Table(title="Goals", title_justify="left")
    for heading in ("goal", "due", "measured", "quartiles", ""):
        table.add_column(heading)
    for row in rows:
        ratio = row["ratio"]
        table.add_row(
            row["goal"],
            row["due"],
            f"{ratio['median']:.4g}",
            f"{ratio['low']:.4g} to {ratio['high']:.4g}",
            "met" if row["met"] else "MISSED",
            style="" if row["met"] else "red",
        )
    Console().print(table)


def main() -> int:
    """Measure, show, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="in a minute")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--only", default="", help="cases with this in their title")
    parser.add_argument("--write", action="store_true", help="keep result, tables and charts")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with a kept result")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    arguments = parser.parse_args()
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    result = run(arguments.quick, rounds, arguments.only)
    show(result)
    result["goals"] = judge(result)
    show_goals(result["goals"])
    if arguments.write:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
