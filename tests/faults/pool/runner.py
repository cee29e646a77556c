"""What happens to connections when workers, or their pool, fail.

``python -m tests.faults.pool [--quick] [--only NAME] [--seed 1] [--json FILE] [--write]``.
In each scene a pool serves clients over TCP and Unix sockets in a process of its own, and
a fault is caused meanwhile. The records of the clients, of the pool and of the handlers must agree.
The exit status is 1 if a figure is not the expected one. ``--write`` also writes the figures to
faults.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import trio
from rich.console import Console

from tests._helpers.tables import machine, row_of, table_of

from . import random_pool
from .audit import Figure, none
from .changes import drains, restarts, scaling, scarce, scarce_pool, terminated
from .deaths import (
    Sizes,
    everything,
    killed_pool,
    killed_pool_burning,
    killed_under_serve,
    killed_under_submit,
    stopped_workers,
)
from .misuse import (
    cancelled_calls,
    deaf_workers,
    denied_clients,
    drained_while_restarting,
    exits,
    leftover_threads,
    lies,
    raising_callback,
    scaled_away,
    segfaults,
    suspended,
    terminated_while_busy,
)

if TYPE_CHECKING:
    from rich.table import Table

# No scene takes so long, in seconds, unless a task waits in vain.
LONGEST = 600
MARKDOWN = Path(__file__).with_name("faults.md")
# A table with more scenes is wider than a page.
MOST_COLUMNS = 6

SCENES: dict[str, Any] = {
    "kill": killed_under_submit,
    "kill-serve": killed_under_serve,
    "restart": restarts,
    "parent": killed_pool,
    "parent-burn": killed_pool_burning,
    "emfile": scarce,
    "emfile-pool": scarce_pool,
    "stop": stopped_workers,
    "scale": scaling,
    "term": terminated,
    "drain": drains,
    "cancel": cancelled_calls,
    "deny": denied_clients,
    "raise": raising_callback,
    "scaled-away": scaled_away,
    "lie": lies,
    "segfault": segfaults,
    "exit": exits,
    "emfile-worker": deaf_workers,
    "term-busy": terminated_while_busy,
    "thread": leftover_threads,
    "suspend": suspended,
    "drain-restart": drained_while_restarting,
    "all": everything,
}

FULL = Sizes(connections=50_000, kills=50, restarts=20, ends=10, rounds=5, step=1000, at_a_time=100)
QUICK = Sizes(connections=1000, kills=4, restarts=1, ends=1, rounds=1, step=100, at_a_time=16)
TINY = Sizes(connections=300, kills=2, restarts=1, ends=1, rounds=1, step=50, at_a_time=10)


@attrs.frozen
class Result:
    """The result of a scene."""

    name: str
    title: str
    seconds: float
    figures: list[Figure]

    def wrong(self) -> list[str]:
        """Return what does not hold."""
        return [
            f"{self.name}: {each.name}: expected {each.expected}, got {each.value:,}"
            + (f" ({each.example})" if each.example else "")
            for each in self.figures
            if not each.holds
        ]


async def play(name: str, sizes: Sizes, seed: int) -> Result:
    """Play a scene."""
    scene = SCENES[name]
    begin = time.monotonic()
    try:
        with trio.fail_after(LONGEST):
            figures = await scene(sizes, seed)
    except Exception as exc:
        traceback.print_exception(exc)
        figures = [none("ended by an error", [repr(exc)])]
    return Result(name, scene.__doc__.rstrip("."), time.monotonic() - begin, figures)


def table(results: list[Result]) -> Table:
    """Return the figures for a terminal."""
    headings = ("scene", "figure", "value", "expected")
    shown = table_of("what happens to connections when", headings, [2])
    for result in results:
        for number, each in enumerate(result.figures):
            value = f"{each.value:,}" if each.holds else f"[red]{each.value:,}[/]"
            scene = [f"[b]{result.name}[/]", f"({result.seconds:.1f} s)"]
            shown.add_row(scene[number] if number < 2 else "", each.name, value, each.expected)
        shown.add_section()
    return shown


def markdown(results: list[Result], seed: int) -> str:
    """Return the figures for the documentation."""
    seconds = sum(each.seconds for each in results)
    versions = f"Python {platform.python_version()} and trio {trio.__version__}"
    lines = [
        "# What happens when workers die or misbehave",
        "",
        f"Measured by `nox -s pool-faults -- --write`, seed {seed}, in {seconds / 60:.0f} minutes,",
        f"on {machine()}, {versions}.",
        "The exit status is 1 if a figure is not the expected one.",
    ]
    shared, own = split(results)
    names = [
        result.name for result in results if any(result.name in row for row in shared.values())
    ]
    lines += ["", *row_of("scene", "what is done"), *row_of("---", "---")]
    for result in results:
        lines += row_of(result.name, result.title)
    lines += ["", "## Connections, as clients, the pool and handlers have recorded them"]
    for i in range(0, len(names), MOST_COLUMNS):
        lines += shared_table(shared, names[i : i + MOST_COLUMNS])
    lines += [
        "",
        "## Figures of single scenes",
        "",
        *row_of("scene", "", "", "expected"),
        *row_of("---", "---", "---:", "---"),
    ]
    for name, figures in own.items():
        for each in figures:
            lines += row_of(name, each.name, cell(each), each.expected)
    return "\n".join(lines) + "\n"


def shared_table(shared: dict[str, dict[str, Figure]], names: list[str]) -> list[str]:
    """Return a table of scenes, without the figures that none of them has."""
    lines = ["", *row_of("", *names, "expected"), *row_of("---", *["---:"] * len(names), "---")]
    for figure, row in shared.items():
        if row.keys() & set(names):
            rule = next(each.rule for each in row.values())
            cells = [cell(row[name]) if name in row else "" for name in names]
            lines += row_of(figure, *cells, rule)
    return lines


def cell(figure: Figure) -> str:
    """Return a figure's value, in bold if it is wrong."""
    return f"{figure.value:,}" if figure.holds else f"**{figure.value:,}**"


def split(
    results: list[Result],
) -> tuple[dict[str, dict[str, Figure]], dict[str, list[Figure]]]:
    """Return the figures that many scenes have, and each scene's own."""
    shared: dict[str, dict[str, Figure]] = {}
    for result in results:
        for each in result.figures:
            shared.setdefault(each.name, {})[result.name] = each
    shared = {figure: row for figure, row in shared.items() if len(row) > 2}
    own = {
        result.name: [each for each in result.figures if each.name not in shared]
        for result in results
    }
    return shared, own


def main() -> int:
    """Play the scenes; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="less of everything, for CI")
    size.add_argument("--tiny", action="store_true", help="as little as can be, for tests")
    parser.add_argument("--only", choices=SCENES, action="append", help="this scene (repeatable)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--random", type=float, metavar="SECONDS", help="play only the random test, for so long"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--write", action="store_true", help=f"write {MARKDOWN.name}")
    given = parser.parse_args()
    if given.random is not None:
        return random_pool.main(["--random", str(given.random), "--seed", str(given.seed)])
    sizes = QUICK if given.quick else TINY if given.tiny else FULL
    console = Console(stderr=True)
    results: list[Result] = []
    for name in given.only or SCENES:
        with console.status(f"{name}: {SCENES[name].__doc__}"):
            results.append(trio.run(play, name, sizes, given.seed))
    Console(width=None if sys.stdout.isatty() else 110).print(table(results))
    wrong = [each for result in results for each in result.wrong()]
    for each in wrong:
        print(f"WRONG: {each}")
    if not wrong:
        print(f"all figures are as expected; seed {given.seed}")
    if given.json:
        found = {
            "seed": given.seed,
            "sizes": attrs.asdict(sizes),
            "scenes": {each.name: attrs.asdict(each) for each in results},
            "wrong": wrong,
        }
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if given.write:
        MARKDOWN.write_text(markdown(results, given.seed), encoding="utf-8")
    return bool(wrong)
