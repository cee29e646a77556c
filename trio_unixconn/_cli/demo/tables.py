"""The tables of ``trio-unixconn demo``, and its progress bar; only this file needs rich."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .._console import printable, say, writing

if TYPE_CHECKING:
    from .driver import Report, Transfer

# The maximum width of the columns beside that of the name, with all lines.
_OTHER_COLUMNS = 61


@contextmanager
def progress_bar() -> Generator[Callable[[int, int], None], None, None]:
    """Show a bar on standard error, if that is a terminal; call the function with done and due."""
    errors = Console(stderr=True)
    with Progress(
        TextColumn("handing over"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    ) as bar:
        task = bar.add_task("", total=None)

        def on_progress(done: int, due: int) -> None:
            bar.update(task, completed=done, total=due)

        yield on_progress


def print_tables(report: Report, rows: int) -> None:
    """Print what was handed over, at most ``rows`` descriptors, and the exchanges."""
    console = Console()
    shown = [each for i, each in enumerate(report.transfers) if i < rows or not each.same]
    # A table for each worker, so that its name takes no column beside each file.
    for worker, peer in sorted({(each.worker, tuple(each.peer)) for each in shown}):
        table = Table(
            title=f"Handed over to worker {worker} (pid uid gid: {_spaced(peer)})",
            title_justify="left",
        )
        table.add_column("what", overflow="fold")
        for name in ("device:inode", "bytes", "sha256"):
            table.add_column(f"{name}\nhere / there", justify="right", no_wrap=True)
        table.add_column("ms", justify="right", no_wrap=True)
        for each in shown:
            if each.worker == worker:
                _add_row(table, each, console.width - _OTHER_COLUMNS)
        with writing():
            console.print(table)
    if len(shown) < len(report.transfers):
        say(f"... and {len(report.transfers) - len(shown)} more, the same on both sides")
    with writing():
        console.print(_exchanges(report))
    say(
        f"{sum(report.cancelled)} of {len(report.cancelled)} receives were cancelled by a thread; "
        "what was sent later arrived"
    )
    for process in report.descriptors:
        say(f"{process.process}: {process.before} descriptors open before, {process.after} after")
    for line in report.skipped:
        say(f"not handed over: {line}")
    count = len(report.transfers)
    say(
        f"{count} descriptors handed over in {report.seconds:.2f} s; "
        + (f"{len(report.differences())} differences" if report.differences() else "all the same")
    )


def _exchanges(report: Report) -> Table:
    table = Table(title="Credentials (pid uid gid)", title_justify="left")
    for name in ("worker", "by", "sent by", "expected", "received"):
        table.add_column(name)
    for exchange in report.exchanges:
        for sender, sent, received in (
            ("this process", exchange.ours, exchange.they_received),
            ("the worker", exchange.theirs, exchange.we_received),
        ):
            table.add_row(
                str(exchange.worker),
                exchange.form,
                sender,
                _spaced(sent),
                _spaced(received),
                style="" if sent == received else "red",
            )
    return table


def _add_row(table: Table, each: Transfer, width: int) -> None:
    here, there = each.here, each.there
    table.add_row(
        escape(_folded(printable(each.what), width)),
        f"{here.identity}\n{there.identity}",
        f"{here.bytes}\n{there.bytes}",
        f"{here.sha256[:12]}\n{there.sha256[:12]}",
        f"{each.seconds * 1000:.1f}",
        style="" if each.same else "red",
    )


def _folded(text: str, width: int) -> str:
    """Return a path in lines, ended after a separator, so that no word is broken that fits."""
    lines = [""]
    for word in re.findall(r"[^/_. -]*[/_. -]*", text):
        if lines[-1] and len(lines[-1] + word) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)


def _spaced(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))
