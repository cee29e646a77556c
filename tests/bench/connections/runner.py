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
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import attrs
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from .cases import CASES, Case
from .pairs import IMPLEMENTATIONS, FailedError, Implementation, MissingError, Pair
from .report import (
    Result,
    as_json,
    compare,
    condensed,
    confirmed,
    is_ours,
    judge,
    markdown,
    show,
    show_comparison,
    show_goals,
    summary,
)

DIRECTORY = Path(__file__).parent
RESULT = DIRECTORY / "result.json"
TABLES = DIRECTORY / "result.md"
ROUNDS, QUICK_ROUNDS = 15, 5
# How often each implementation is started. The memory layout of a process makes it up to a tenth
# faster or slower for all its life, so ratios of one start depend on chance.
STARTS, QUICK_STARTS = 5, 1
# A ratio that got worse by more than this factor is a regression.
TOLERANCE = 1.10
ImplementationT = TypeVar("ImplementationT", bound=Implementation)


@attrs.define
class Run:
    """One run of the benchmark: the implementations, and their results so far."""

    directory: str
    quick: bool
    rounds: int
    starts: int
    pairs: list[Pair] = attrs.field(factory=list)
    missing: dict[str, str] = attrs.field(factory=dict)
    failed: dict[str, str] = attrs.field(factory=dict)
    versions: dict[str, str] = attrs.field(factory=dict)

    def start(self, implementations: list[Implementation]) -> None:
        """Start the implementations that are installed."""
        for implementation in implementations:
            try:
                pair = Pair(implementation, self.directory)
            except MissingError as exc:
                self.missing[implementation.name] = str(exc)
            else:
                self.pairs.append(pair)
                self.versions[implementation.name] = pair.version
        for pair in list(self.pairs):
            try:
                pair.cases  # noqa: B018 - asked now, so that all start at once and none later
            except FailedError as exc:
                self.failed[pair.implementation.name] = str(exc)
                pair.close()
                self.pairs.remove(pair)

    def close(self) -> None:
        """End all of them."""
        for pair in self.pairs:
            pair.close()
        self.pairs.clear()

    def entries_of(self, case: Case) -> dict[str, tuple[int, str]]:
        """Return the pair and the variant of each entry in a case, by name."""
        return {
            f"{pair.implementation.name}: {variant}" if variant else pair.implementation.name: (
                i,
                variant,
            )
            for i, pair in enumerate(self.pairs)
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
                i, variant = entries[name]
                # The first turn is for warming up.
                runs = max(1, count // 10) if turn < 0 else count
                try:
                    answer = self.pairs[i].run(
                        case.name, variant, runs, case.size, on_one=case.alternates
                    )
                except FailedError as exc:
                    self.failed[name] = f"{case.title}: {exc}"
                    del values[name]
                    self._restart(i)
                    continue
                if turn >= 0:
                    per = runs if case.figure == "seconds" else 1
                    values[name].append(answer[case.figure] / per)
                    progress.advance(task)
        return values

    def _restart(self, i: int) -> None:
        implementation = self.pairs[i].implementation
        self.pairs[i].close()
        self.pairs[i] = Pair(implementation, self.directory)


def joined(parts: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Return the values of the entries that failed in no part."""
    return {
        name: [value for part in parts for value in part[name]]
        for name in parts[0]
        if all(name in part for part in parts)
    }


def in_turn(names: Iterable[str], turn: int) -> list[str]:
    """Return the order in a turn: each begins with another name, so that none is always last."""
    found = list(names)
    first = turn % len(found) if found else 0
    return found[first:] + found[:first]


def machine() -> str:
    """Return a description of this machine."""
    return (
        f"{platform.system()} {platform.release()}, {platform.machine()}, "
        f"{os.cpu_count()} processors"
    )


def progress_bar() -> Progress:
    """Return a progress bar that disappears at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


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
        running = Run(directory, quick, rounds, starts)
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


def chosen(known_ones: Sequence[ImplementationT], text: str) -> list[ImplementationT]:
    """Return the implementations that the argument names, and always trio_unixconn."""
    known = [each.key for each in known_ones]
    keys = {"ours", *text.split(",")} if text else set(known)
    if unknown := keys - set(known):
        raise argparse.ArgumentTypeError(
            f"unknown implementation: {', '.join(sorted(unknown))}; expected {', '.join(known)}"
        )
    return [each for each in known_ones if each.key in keys]


def add_choices(
    parser: argparse.ArgumentParser,
    known_ones: Sequence[Implementation],
    rounds: int,
    quick_rounds: int,
) -> None:
    """Add the arguments that select what is measured and how often, and where results go."""
    parser.add_argument(
        "--quick", action="store_true", help="fewer and shorter runs: one minute instead of ten"
    )
    parser.add_argument(
        "--rounds", type=int, help=f"default: {rounds}; with --quick: {quick_rounds}"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only cases with TEXT in their title"
    )
    parser.add_argument(
        "--implementations",
        type=partial(chosen, known_ones),
        default=known_ones,
        metavar="A,B",
        help=", ".join(each.key for each in known_ones),
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE")
    parser.add_argument(
        "--write",
        action="store_true",
        help="replace the figures of the documentation",
    )
    parser.add_argument("--strict", action="store_true", help="fail if a goal is missed")


def checked(
    parser: argparse.ArgumentParser, known_ones: Sequence[Implementation]
) -> argparse.Namespace:
    """Read the command line."""
    given = parser.parse_args()
    if given.write and (given.only or given.implementations is not known_ones):
        parser.error("--write cannot be combined with --only or --implementations")
    return given


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
    if given.json:
        given.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if given.write:
        kept_now = condensed(result)
        RESULT.write_text(as_json(kept_now) + "\n")
        TABLES.write_text(markdown(kept_now))
    wrong = bool(result["failed"])
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
    if given.strict:
        wrong |= any(verdict.is_met is False for verdict in verdicts)
    return int(wrong)
