"""Measure the speed of this library and of other implementations.

All implementations of a case run in turn, A B C A B C, each as two processes of its own, after a
warm-up run. The tables show the median of the ratios within each turn, their quartiles, and the
times. Implementations that are not installed are listed as missing.

The exit status is 1 if an implementation failed, with --check if trio_unixconn has got slower
relative to the others (a suspected regression is measured again before it counts), and with
--strict if a goal is missed. A missed goal is otherwise no error: on a busy machine it says little.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
from rich.console import Console

from tests._helpers.tables import machine
from tests.bench.implementations import FailedError, Implementation
from tests.bench.report import Result, is_ours, show_goals
from tests.bench.runner import Run, add_choices, checked, finish, in_turn, progress_bar

from .pairs import IMPLEMENTATIONS, Pair
from .report import (
    as_json,
    compare,
    condensed,
    confirmed,
    judge,
    markdown,
    show,
    show_comparison,
    summary,
)
from .workloads import CASES, Case

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

DIRECTORY = Path(__file__).parent
RESULT = DIRECTORY / "result.json"
TABLES = DIRECTORY / "result.md"
ROUNDS, QUICK_ROUNDS = 15, 5
# How often each implementation is started. The memory layout of a process makes it up to a tenth
# faster or slower for all its life, so ratios of one start depend on chance.
STARTS, QUICK_STARTS = 5, 1
# A ratio that got worse by more than this factor is a regression.
TOLERANCE = 1.10


@attrs.define(kw_only=True)
class ConnectionsRun(Run[Implementation, Pair]):
    """One run of the benchmark.

    Attributes:
      starts: how often each implementation is started.
    """

    starts: int

    def entries_of(self, case: Case) -> dict[str, tuple[str, str]]:
        """Return the implementation and the variant of each entry in a case, by name."""
        return {
            f"{name}: {variant}" if variant else name: (name, variant)
            for name, pair in self.started.items()
            for variant in pair.cases.get(case.name, ())
        }

    def rounds_of(self, case: Case, start: int) -> int:
        """Return how often a case is run at one of the starts."""
        return len(range(start, min(self.rounds, case.rounds), self.starts))

    def turns(self, cases: list[Case]) -> int:
        """Return the total number of runs, if no implementation fails."""
        return sum(len(self.entries_of(case)) * min(self.rounds, case.rounds) for case in cases)

    def measure(
        self, case: Case, rounds: int, progress: Progress, task: TaskID
    ) -> dict[str, list[float]]:
        """Run a case in turns; return the values of the entries that did not fail."""
        count = case.quick if self.quick else case.count
        entries = self.entries_of(case)
        values: dict[str, list[float]] = {name: [] for name in entries}
        for turn in range(-1 if rounds else 0, rounds):
            for name in in_turn(values, turn):
                implementation, variant = entries[name]
                # The first turn is for warming up.
                runs = max(1, count // 10) if turn < 0 else count
                try:
                    answer = self.started[implementation].run(
                        case.name, variant, runs, case.size, on_one=case.alternates
                    )
                except FailedError as exc:
                    self.failed[name] = f"{case.title}: {exc}"
                    del values[name]
                    self._restart(implementation)
                    continue
                if turn >= 0:
                    per = runs if case.figure == "seconds" else 1
                    values[name].append(answer[case.figure] / per)
                    progress.advance(task)
        return values

    def _restart(self, name: str) -> None:
        implementation = self.started[name].implementation
        self.started[name].close()
        self.started[name] = Pair(implementation, self.directory)


def joined(parts: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Return the values of the entries that failed in no part."""
    return {
        name: [value for part in parts for value in part[name]]
        for name in parts[0]
        if all(name in part for part in parts)
    }


def run(
    cases: list[Case], implementations: list[Implementation], rounds: int, *, quick: bool
) -> Result:
    """Measure everything; return the result."""
    result: Result = {
        "machine": machine(),
        "rounds": rounds,
        "quick": quick,
        "cases": {},
    }
    measured: dict[str, list[dict[str, list[float]]]] = {case.title: [] for case in cases}
    starts = QUICK_STARTS if quick else STARTS
    with tempfile.TemporaryDirectory() as directory, progress_bar() as progress:
        running = ConnectionsRun(
            begin=Pair, directory=directory, quick=quick, rounds=rounds, starts=starts
        )
        task = progress.add_task("", total=None)
        for start in range(starts):
            try:
                running.start(implementations)
                progress.update(task, total=running.turns(cases))
                for case in cases:
                    progress.update(task, description=case.title)
                    turns = running.rounds_of(case, start)
                    measured[case.title].append(running.measure(case, turns, progress, task))
            finally:
                running.close()
    for case in cases:
        values = joined(measured[case.title])
        if any(map(is_ours, values)):
            result["cases"][case.title] = summary(case, values)
    result |= {
        "versions": running.versions,
        "missing": running.missing,
        "failed": running.failed,
    }
    return result


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_choices(parser, IMPLEMENTATIONS, ROUNDS, QUICK_ROUNDS)
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="compare with the result in FILE"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="FACTOR",
        help=f"a slowdown by more than FACTOR is a regression; default: {TOLERANCE}",
    )
    given = checked(parser, IMPLEMENTATIONS)
    if given.tolerance < 1:
        parser.error(f"--tolerance must be at least 1, got {given.tolerance} (1.1 allows 10 %)")
    return given


def kept_files(result: Result) -> dict[Path, str]:
    """Return the files that --write replaces."""
    condensed_result = condensed(result)
    return {RESULT: as_json(condensed_result) + "\n", TABLES: markdown(condensed_result)}


def main() -> int:
    """Measure, print the tables, and compare."""
    given = parsed()
    kept = json.loads(given.check.read_text()) if given.check else None
    rounds = given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS)
    cases = [
        case
        for case in CASES
        if (case.quick if given.quick else case.count) and given.only in case.title
    ]
    result = run(cases, given.implementations, rounds, quick=given.quick)
    console = Console(width=None if sys.stdout.isatty() else 140)
    show(result, console)
    verdicts = judge(result)
    show_goals(verdicts, console)
    wrong = finish(given, result, verdicts, lambda: kept_files(result))
    if kept:
        found = compare(kept, result, given.tolerance)
        doubtful = {title for change in found.regressions for title in change.titles}
        if doubtful:
            # The machine may have been busy: only a slowdown that is seen again is a regression.
            console.print(f"measured again: {', '.join(sorted(doubtful))}", markup=False)
            cases = [case for case in cases if case.title in doubtful]
            again = run(cases, given.implementations, rounds, quick=given.quick)
            found = confirmed(found, compare(kept, again, given.tolerance))
            wrong |= bool(again["failed"])
        show_comparison(found, given.tolerance, console)
        # A check that compared nothing has failed.
        wrong |= bool(found.regressions) or not found.compared
    return int(wrong)
