"""How fast this library is, beside everybody else.

All contestants of a case run in turn, A B C A B C, each as two processes of its own, after a
run for warming up that does not count. What is shown is the median of the ratios within each
turn, and their quartiles; times are shown beside it. Contestants that are not installed are
named as missing.

The exit status is 1 if a contestant failed, with --check if ours has got slower beside the
others (what seems so is measured once more before it counts), and with --strict if a goal is
missed; 0 otherwise, because whether a goal is met on a busy machine says little.
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
from cases import CASES, Case
from pairs import CONTESTANTS, Contestant, FailedError, MissingError, Pair
from report import (
    Result,
    compare,
    confirmed,
    is_ours,
    judge,
    markdown,
    show,
    show_comparison,
    show_goals,
    summary,
)
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

FOLDER = Path(__file__).parent
RESULT = FOLDER / "result.json"
TABLES = FOLDER / "result.md"
ROUNDS, QUICK_ROUNDS = 15, 5
# How often everybody is started afresh. Where a process happens to have its memory makes it up to
# a tenth faster or slower for all its life; a ratio of two processes is in part that of their luck.
STARTS, QUICK_STARTS = 5, 1
# How much worse a ratio may get before that is a regression.
TOLERANCE = 1.10
Anyone = TypeVar("Anyone", bound=Contestant)


@attrs.define
class Run:
    """One run of the benchmark: who takes part, and what came of it so far."""

    folder: str
    quick: bool
    rounds: int
    starts: int
    pairs: list[Pair] = attrs.field(factory=list)
    missing: dict[str, str] = attrs.field(factory=dict)
    failed: dict[str, str] = attrs.field(factory=dict)
    versions: dict[str, str] = attrs.field(factory=dict)

    def start(self, contestants: list[Contestant]) -> None:
        """Start who is installed."""
        for contestant in contestants:
            try:
                pair = Pair(contestant, self.folder)
            except MissingError as exc:
                self.missing[contestant.name] = str(exc)
            else:
                self.pairs.append(pair)
                self.versions[contestant.name] = pair.version
        for pair in list(self.pairs):
            try:
                pair.cases  # noqa: B018 - asked now, so that all start at once and none later
            except FailedError as exc:
                self.failed[pair.contestant.name] = str(exc)
                pair.close()
                self.pairs.remove(pair)

    def close(self) -> None:
        """End all of them."""
        for pair in self.pairs:
            pair.close()
        self.pairs.clear()

    def entries_of(self, case: Case) -> dict[str, tuple[int, str]]:
        """Return who can run a case and in which ways: by name, the pair and the variant."""
        return {
            f"{pair.contestant.name}: {variant}" if variant else pair.contestant.name: (i, variant)
            for i, pair in enumerate(self.pairs)
            for variant in pair.cases.get(case.name, ())
        }

    def rounds_of(self, case: Case, start: int) -> int:
        """Return how often a case is run by those who were started at one of the starts."""
        return len(range(start, min(self.rounds, case.rounds), self.starts))

    def turns(self, cases: list[Case]) -> int:
        """Return how many runs there are in all, if nobody fails."""
        return sum(len(self.entries_of(case)) * min(self.rounds, case.rounds) for case in cases)

    def measure(
        self, case: Case, rounds: int, progress: Progress, task: TaskID
    ) -> dict[str, list[float]]:
        """Run a case in turns; return the values of each who did not fail."""
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
        contestant = self.pairs[i].contestant
        self.pairs[i].close()
        self.pairs[i] = Pair(contestant, self.folder)


def joined(parts: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Return the values of those who failed in no part."""
    return {
        name: [value for part in parts for value in part[name]]
        for name in parts[0]
        if all(name in part for part in parts)
    }


def in_turn(names: Iterable[str], turn: int) -> list[str]:
    """Return who runs behind whom: each turn begins with another, so that none is always last."""
    found = list(names)
    first = turn % len(found) if found else 0
    return found[first:] + found[:first]


def machine() -> str:
    """Return where this runs."""
    return (
        f"{platform.system()} {platform.release()}, {platform.machine()}, "
        f"{os.cpu_count()} processors"
    )


def progress_bar() -> Progress:
    """Return what shows how far it is, and is gone at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


def run(cases: list[Case], contestants: list[Contestant], rounds: int, *, quick: bool) -> Result:
    """Measure everything; return what came of it."""
    result: Result = {
        "machine": machine(),
        "rounds": rounds,
        "quick": quick,
        "cases": {},
    }
    measured: dict[str, list[dict[str, list[float]]]] = {case.title: [] for case in cases}
    starts = QUICK_STARTS if quick else STARTS
    with tempfile.TemporaryDirectory() as folder, progress_bar() as progress:
        running = Run(folder, quick, rounds, starts)
        task = progress.add_task("", total=None)
        for start in range(starts):
            try:
                running.start(contestants)
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


def chosen(everyone: Sequence[Anyone], text: str) -> list[Anyone]:
    """Return the contestants of the command line; ours is always among them."""
    known = [each.key for each in everyone]
    keys = {"ours", *text.split(",")} if text else set(known)
    if unknown := keys - set(known):
        raise argparse.ArgumentTypeError(
            f"no such contestant: {', '.join(sorted(unknown))}; there are {', '.join(known)}"
        )
    return [each for each in everyone if each.key in keys]


def add_choices(
    parser: argparse.ArgumentParser, everyone: Sequence[Contestant], rounds: int, quick_rounds: int
) -> None:
    """Add the arguments that say what is measured, how often, and what is done with it."""
    parser.add_argument("--quick", action="store_true", help="fewer and shorter: a minute, not ten")
    parser.add_argument("--rounds", type=int, help=f"{rounds}, or with --quick {quick_rounds}")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their title")
    parser.add_argument(
        "--contestants",
        type=partial(chosen, everyone),
        default=everyone,
        metavar="A,B",
        help=", ".join(each.key for each in everyone),
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument(
        "--write", action="store_true", help="keep the result, and what the docs have of it"
    )
    parser.add_argument("--strict", action="store_true", help="a missed goal is an error")


def checked(parser: argparse.ArgumentParser, everyone: Sequence[Contestant]) -> argparse.Namespace:
    """Read the command line."""
    given = parser.parse_args()
    if given.write and (given.only or given.contestants is not everyone):
        parser.error("--write keeps a whole result: without --only and --contestants")
    return given


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_choices(parser, CONTESTANTS, ROUNDS, QUICK_ROUNDS)
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with a kept result")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="FACTOR",
        help=f"by which ours may get slower before that is a regression; without it {TOLERANCE}",
    )
    given = checked(parser, CONTESTANTS)
    if given.tolerance < 1:
        parser.error("--tolerance is a factor: 1.1 is 10 %")
    return given


def main() -> int:
    """Measure, show, and judge."""
    given = parsed()
    kept = json.loads(given.check.read_text()) if given.check else None
    rounds = given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS)
    cases = [
        case
        for case in CASES
        if (case.quick if given.quick else case.count) and given.only in case.title
    ]
    result = run(cases, given.contestants, rounds, quick=given.quick)
    console = Console(width=None if sys.stdout.isatty() else 140)
    show(result, console)
    verdicts = judge(result)
    show_goals(verdicts, console)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if given.json:
        given.json.write_text(text)
    if given.write:
        from charts import draw  # noqa: PLC0415 - matplotlib is needed only for this

        RESULT.write_text(text)
        TABLES.write_text(markdown(result))
        draw(result)
    wrong = bool(result["failed"])
    if kept:
        found = compare(kept, result, given.tolerance)
        doubtful = {title for change in found.regressions for title in change.titles}
        if doubtful:
            # A machine that was busy at that moment is no regression; one that stays is.
            console.print(f"measured once more: {', '.join(sorted(doubtful))}", markup=False)
            cases = [case for case in cases if case.title in doubtful]
            again = run(cases, given.contestants, rounds, quick=given.quick)
            found = confirmed(found, compare(kept, again, given.tolerance))
            wrong |= bool(again["failed"])
        show_comparison(found, given.tolerance, console)
        # A check that compares nothing holds nothing.
        wrong |= bool(found.regressions) or not found.compared
    if given.strict:
        wrong |= any(verdict.is_met is False for verdict in verdicts)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
