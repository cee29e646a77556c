"""Who loses what: the same faults made to happen to this library and to others.

``python faults/faults.py [--write]``. Each fault happens in a process of its own, with a
deadline, and what is shown is what was observed there. With ``--write`` the table goes to
faults/faults.md too. The exit status is 1 if this library leaked, lost or hung.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from contestants import CONTESTANTS, Contestant, warm_up
from measure import FAULTS, measure
from rich.console import Console
from rich.progress import track
from rich.table import Table

# Long, because only what hangs takes long, and machines are busy at times.
DEADLINE = 60
OURS = "trio_unixconn"
BAD = ("leak", "loss", "hang", "wrong file", "inheritable", "unchecked", "times", "died", "failed")
MARKDOWN = Path(__file__).parent / "faults.md"


def child(contestant: str, fault: str) -> int:
    """Measure one fault in this process, and print the word."""
    (who,) = (each for each in CONTESTANTS if each.name == contestant)
    (what,) = (each for each in FAULTS if each.__name__ == fault)
    warm_up(who)
    print(measure(who, what))
    return 0


def behaviour(contestant: Contestant, fault: str) -> str:
    """Measure one fault in a process of its own."""
    command = [sys.executable, __file__, "--child", contestant.name, fault]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DEADLINE, check=False
        )
    except subprocess.TimeoutExpired:
        return "hang"
    lines = done.stdout.split("\n")
    return lines[-2] if done.returncode == 0 and len(lines) > 1 else "died"


def versions() -> list[str]:
    """Return a line for each contestant and for the machine."""
    lines = [f"{each.name}: {each.version() or 'missing (not installed)'}" for each in CONTESTANTS]
    return [*lines, f"{platform.system()} {platform.release()}, {platform.machine()}"]


def is_bad(word: str) -> bool:
    """Whether something was lost, leaked, misread or waited for in vain."""
    return any(bad in word for bad in BAD)


def rich_table(rows: list[tuple[str, list[str]]]) -> Table:
    """Return the table for a terminal."""
    shown = Table(title="what happens when")
    shown.add_column("fault")
    for contestant in CONTESTANTS:
        shown.add_column(contestant.name)
    for title, words in rows:
        shown.add_row(title, *(f"[red]{word}[/]" if is_bad(word) else word for word in words))
    return shown


def markdown(rows: list[tuple[str, list[str]]]) -> str:
    """Return the table for the documentation."""
    names = [f"`{contestant.name}`" for contestant in CONTESTANTS]
    lines = [
        "# Who loses what",
        "",
        "Measured by `nox -s faults -- --write`, each fault in a process of its own; in bold,",
        "what was lost, leaked, misread, or waited for in vain. n/a: it has no such operation.",
        "",
        f"| fault | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(names)}",
    ]
    for title, words in rows:
        cells = [f"**{word}**" if is_bad(word) else word for word in words]
        lines.append(f"| {title} | {' | '.join(cells)} |")
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
    missing = [each.name for each in CONTESTANTS if each.version() is None]
    rows: list[tuple[str, list[str]]] = []
    with ThreadPoolExecutor(os.cpu_count()) as processes:
        running = [
            [
                None if each.name in missing else processes.submit(behaviour, each, fault.__name__)
                for each in CONTESTANTS
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
    position = [each.name for each in CONTESTANTS].index(OURS)
    wrong = [(title, words[position]) for title, words in rows if is_bad(words[position])]
    for title, word in wrong:
        print(f"WRONG in {OURS}: {title}: {word}")
    return bool(wrong or OURS in missing)


if __name__ == "__main__":
    sys.exit(main())
