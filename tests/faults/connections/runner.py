"""Cause the same faults in this library and in others, and print how each handles them.

``python -m tests.faults.connections [--write]``. Each fault is caused in a process of its own,
with a deadline, and the table shows the observed behaviour. ``--write`` also writes the table to
faults.md. The exit status is 1 if this library leaked or lost a descriptor, or hung.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track

from tests._helpers.environment import environment
from tests._helpers.processes import python
from tests._helpers.tables import machine, row_of, table_of

from .implementations import IMPLEMENTATIONS, Implementation, warm_up
from .measure import FAULTS, measure

if TYPE_CHECKING:
    from rich.table import Table

# Long, because the machine may be busy, and only a process that hangs takes so long.
DEADLINE = 60
OURS = "trio_unixconn"
BAD = ("leak", "loss", "hang", "wrong file", "inheritable", "unchecked", "times", "died", "failed")
MARKDOWN = Path(__file__).parent / "faults.md"


def child(implementation: str, fault: str) -> int:
    """Measure one fault in this process, and print the behaviour."""
    (library,) = (each for each in IMPLEMENTATIONS if each.name == implementation)
    (cause,) = (each for each in FAULTS if each.__name__ == fault)
    warm_up(library)
    print(measure(library, cause))
    return 0


def behaviour(implementation: Implementation, fault: str) -> str:
    """Measure one fault in a process of its own."""
    command = python("tests.faults.connections", "--child", implementation.name, fault)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
            env=environment(),
        )
    except subprocess.TimeoutExpired:
        return "hang"
    lines = done.stdout.split("\n")
    return lines[-2] if done.returncode == 0 and len(lines) > 1 else "died"


def versions() -> list[str]:
    """Return a line for each implementation and for the machine."""
    lines = [
        f"{each.name}: {each.version() or 'missing (not installed)'}" for each in IMPLEMENTATIONS
    ]
    return [*lines, machine()]


def is_bad(word: str) -> bool:
    """Whether a descriptor was lost, leaked or misread, or the process hung."""
    return any(bad in word for bad in BAD)


def rich_table(rows: list[tuple[str, list[str]]]) -> Table:
    """Return the table for a terminal."""
    names = [implementation.name for implementation in IMPLEMENTATIONS]
    shown = table_of("How libraries handle faulty peers", ["fault", *names])
    for title, words in rows:
        shown.add_row(title, *(f"[red]{word}[/]" if is_bad(word) else word for word in words))
    return shown


def markdown(rows: list[tuple[str, list[str]]]) -> str:
    """Return the table for the documentation."""
    names = [f"`{implementation.name}`" for implementation in IMPLEMENTATIONS]
    lines = [
        "# How libraries handle faulty peers",
        "",
        "Measured by `nox -s faults -- --write`, each fault in a process of its own. Bold:",
        "descriptors were lost, leaked or misread, or the process hung. n/a: no such operation.",
        "",
        *row_of("fault", *names),
        *row_of(*["---"] * (len(names) + 1)),
    ]
    for title, words in rows:
        cells = [f"**{word}**" if is_bad(word) else word for word in words]
        lines += row_of(title, *cells)
    lines += ["", "Versions:", "", *(f"- {line}" for line in versions())]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure all; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {MARKDOWN.name}")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(*given.child)
    missing = [each.name for each in IMPLEMENTATIONS if each.version() is None]
    rows: list[tuple[str, list[str]]] = []
    with ThreadPoolExecutor(os.cpu_count()) as processes:
        running = [
            [
                None if each.name in missing else processes.submit(behaviour, each, fault.__name__)
                for each in IMPLEMENTATIONS
            ]
            for fault in FAULTS
        ]
        console = Console(stderr=True)
        for fault, row in zip(track(FAULTS, "faults", console=console), running, strict=True):
            words = ["missing" if each is None else each.result() for each in row]
            rows.append(((fault.__doc__ or fault.__name__).rstrip("."), words))
    Console(width=None if sys.stdout.isatty() else 160).print(rich_table(rows))
    for line in versions():
        print(line)
    if given.write:
        MARKDOWN.write_text(markdown(rows))
    position = [each.name for each in IMPLEMENTATIONS].index(OURS)
    wrong = [(title, words[position]) for title, words in rows if is_bad(words[position])]
    for title, word in wrong:
        print(f"WRONG in {OURS}: {title}: {word}")
    return bool(wrong or OURS in missing)
