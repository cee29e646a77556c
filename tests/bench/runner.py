"""The parts of a run that benchmarks share: its implementations, their order, its command line."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import attrs
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from tests.bench.implementations import FailedError, Implementation, MissingError

if TYPE_CHECKING:
    from tests.bench.report import Result, Verdict

ImplementationT = TypeVar("ImplementationT", bound=Implementation)


class Started(Protocol):
    """An implementation whose processes have been started."""

    @property
    def version(self) -> str:
        """The versions of its parts."""

    def await_start(self) -> None:
        """Wait until it can be measured; raise FailedError if it died."""

    def close(self) -> None:
        """End its processes; raise FailedError if one of them did not exit."""


StartedT = TypeVar("StartedT", bound=Started)


@attrs.define(kw_only=True)
class Run(Generic[ImplementationT, StartedT]):
    """One run of a benchmark: the implementations that run, and why others do not.

    Attributes:
      begin: starts an implementation, given a directory to build in.
    """

    begin: Callable[[ImplementationT, str], StartedT]
    directory: str
    quick: bool
    rounds: int
    started: dict[str, StartedT] = attrs.field(factory=dict)
    missing: dict[str, str] = attrs.field(factory=dict)
    failed: dict[str, str] = attrs.field(factory=dict)
    versions: dict[str, str] = attrs.field(factory=dict)

    def start(self, implementations: Iterable[ImplementationT]) -> None:
        """Start the implementations that are installed."""
        for implementation in implementations:
            try:
                started = self.begin(implementation, self.directory)
            except MissingError as exc:
                self.missing[implementation.name] = str(exc)
            else:
                self.started[implementation.name] = started
                self.versions[implementation.name] = started.version
        # After all have been started, so that they start at the same time.
        for name, started in list(self.started.items()):
            try:
                started.await_start()
            except FailedError as exc:
                self.failed[name] = str(exc)
                self.started.pop(name).close()

    def close(self) -> None:
        """End all of them."""
        for name, started in self.started.items():
            try:
                started.close()
            except FailedError as exc:
                self.failed.setdefault(name, str(exc))
        self.started.clear()


def in_turn(names: Iterable[str], turn: int) -> list[str]:
    """Return the order in a turn: each begins with another name, so that none is always last."""
    found = list(names)
    first = turn % len(found) if found else 0
    return found[first:] + found[:first]


def progress_bar() -> Progress:
    """Return a progress bar that disappears at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


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


def exit_on_sigterm() -> None:
    """Have SIGTERM, as of a time limit, leave all blocks: they end servers and restore settings."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def finish(
    given: argparse.Namespace,
    result: Result,
    verdicts: Iterable[Verdict],
    kept: Callable[[], dict[Path, str]],
) -> bool:
    """Write the files that were asked for; return whether the run failed.

    Args:
      kept: returns the files that --write replaces.
    """
    if given.json:
        given.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if given.write:
        for path, text in kept().items():
            path.write_text(text)
    is_missed = given.strict and any(verdict.is_met is False for verdict in verdicts)
    return bool(result["failed"]) or is_missed
