"""What a handover survives: ``nox -s handover-faults``.

Processes are killed before and after each frame of the protocol, on both sides, while clients
connect all the time; successors fail in every other way; others ask that may not; and upgrades
are repeated until a leak would be seen. The exit status is 1 if a figure is not the expected one.
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
from tests.faults.pool.audit import Figure, none

from . import scenes
from .points import GOAL, PassingRow, Row
from .scenes import FULL, QUICK, Sizes
from .service import zygote

if TYPE_CHECKING:
    from rich.table import Table

MARKDOWN = Path(__file__).with_name("faults.md")
RESULT = Path(__file__).with_name("result.json")
# No scene takes so long, in seconds, unless a task waits in vain.
LONGEST = 900

SCENES: dict[str, Any] = {
    "kill": scenes.killed,
    "passing": scenes.killed_while_passing,
    "fail": scenes.failing,
    "deny": scenes.unprivileged,
    "crowd": scenes.crowd,
    "lie": scenes.lying,
    "large": scenes.large,
    "many": scenes.many,
}


@attrs.define
class Result:
    """The result of a scene."""

    name: str
    title: str
    seconds: float
    figures: list[Figure]
    rows: list[Row] = attrs.field(factory=list[Row])
    passing: list[PassingRow] = attrs.field(factory=list[PassingRow])

    def wrong(self) -> list[str]:
        """Return what does not hold."""
        return [
            f"{self.name}: {each.name}: expected {each.expected}, got {each.value:,}"
            + (f" ({each.example})" if each.example else "")
            for each in self.figures
            if not each.holds
        ]

    def summary(self) -> dict[str, Any]:
        """Return what the kept file has of it."""
        return {
            "title": self.title,
            "seconds": round(self.seconds, 1),
            "figures": {each.name: each.value for each in self.figures},
            "rows": [
                *(row.figures() for row in self.rows),
                *(row.figures() for row in self.passing),
            ],
        }


async def play(name: str, sizes: Sizes) -> Result:
    """Play a scene."""
    scene = SCENES[name]
    title = scene.__doc__.rstrip(".")
    begin = time.monotonic()
    figures: list[Figure]
    rows: list[Any] = []
    try:
        with trio.fail_after(LONGEST):
            async with zygote():
                found = await scene(sizes)
        figures, rows = found if isinstance(found, tuple) else (found, [])
    except Exception as exc:
        traceback.print_exception(exc)
        figures = [none("ended by an error", [repr(exc)])]
    return Result(
        name,
        title,
        time.monotonic() - begin,
        figures,
        [row for row in rows if isinstance(row, Row)],
        [row for row in rows if isinstance(row, PassingRow)],
    )


def table(results: list[Result]) -> Table:
    """Return the figures for a terminal."""
    shown = table_of("a handover when", ("scene", "figure", "value", "expected"), [2])
    for result in results:
        for number, each in enumerate(result.figures):
            value = f"{each.value:,}" if each.holds else f"[red]{each.value:,}[/]"
            scene = [f"[b]{result.name}[/]", f"({result.seconds:.1f} s)"]
            shown.add_row(scene[number] if number < 2 else "", each.name, value, each.expected)
        shown.add_section()
    return shown


def markdown(results: list[Result]) -> str:
    """Return the figures for the documentation."""
    seconds = sum(each.seconds for each in results)
    versions = f"Python {platform.python_version()} and trio {trio.__version__}"
    lines = [
        f"Measured by `nox -s handover-faults -- --write` in {seconds / 60:.0f} minutes, on",
        f"{machine()}, {versions}.",
        "",
        "## Either side is killed",
        "",
        f"Clients may wait at most {GOAL:.0f} ms for the first answer, if a process with the",
        "listeners is left. Where none is, their requests are refused until another process has",
        "opened them. Requests that the killed process had accepted are lost with it.",
        "",
    ]
    for result in results:
        if result.rows:
            lines += row_of(
                "process", "killed", "kills", "refused", "lost", "unexplained", "ms", "worst ms"
            )
            lines += row_of("---", "---", *["---:"] * 6)
            for row in result.rows:
                found = row.figures()
                name = row.point.name + ("" if row.point.has_listeners_left else " (none is left)")
                lines += row_of(
                    row.point.side,
                    name,
                    *(
                        f"{found[key]:,}"
                        for key in (
                            "trials",
                            "refused",
                            "lost",
                            "unexplained",
                            "median ms",
                            "worst ms",
                        )
                    ),
                )
            lines.append("")
        if result.passing:
            lines += ["## Killed while connections are passed on", ""]
            lines += row_of("process", "killed", "kills", "connections", "closed", "wrong answers")
            lines += row_of("---", "---", *["---:"] * 4)
            for passing in result.passing:
                values = (
                    passing.trials,
                    passing.connections,
                    passing.closed,
                    passing.wrong_answers,
                )
                lines += row_of(
                    passing.point.side, passing.point.name, *(f"{value:,}" for value in values)
                )
            lines.append("")
    lines += ["## All figures", "", *row_of("scene", "", "", "expected")]
    lines += row_of("---", "---", "---:", "---")
    for result in results:
        for number, each in enumerate(result.figures):
            value = f"{each.value:,}" if each.holds else f"**{each.value:,}**"
            lines += row_of(result.title if not number else "", each.name, value, each.expected)
    return "\n".join(lines) + "\n"


def main() -> int:
    """Play the scenes; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything, for CI")
    parser.add_argument("--only", choices=SCENES, action="append", help="this scene (repeatable)")
    parser.add_argument("--trials", type=int, help="kills at each point")
    parser.add_argument("--upgrades", type=int, help="upgrades, one after the other")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--write", action="store_true", help=f"write {MARKDOWN.name} and {RESULT.name}"
    )
    given = parser.parse_args()
    sizes = QUICK if given.quick else FULL
    for key in "trials", "upgrades":
        if getattr(given, key):
            sizes = attrs.evolve(sizes, **{key: getattr(given, key)})
    console = Console(stderr=True)
    results: list[Result] = []
    for name in given.only or SCENES:
        with console.status(f"{name}: {SCENES[name].__doc__}"):
            results.append(trio.run(play, name, sizes))
    Console(width=None if sys.stdout.isatty() else 110).print(table(results))
    wrong = [each for result in results for each in result.wrong()]
    for each in wrong:
        print(f"WRONG: {each}")
    if not wrong:
        print("all figures are as expected")
    found = {
        "machine": machine(),
        "sizes": attrs.asdict(sizes),
        "scenes": {each.name: each.summary() for each in results},
        "wrong": wrong,
    }
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if given.json:
        given.json.write_text(text, encoding="utf-8")
    if given.write:
        RESULT.write_text(text, encoding="utf-8")
        MARKDOWN.write_text(markdown(results), encoding="utf-8")
    return bool(wrong)
