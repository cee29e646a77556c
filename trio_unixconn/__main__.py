"""The command line: ``trio-unixconn``, also as ``python -m trio_unixconn``.

The rule of this file: it reads arguments and prints; the work is done below. It is the only
file that needs typer and rich, the extra ``cli``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import attrs
import trio

if TYPE_CHECKING:
    from ._demo.driver import Report

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as _exc:
    raise SystemExit(
        f"trio-unixconn: the command line needs the extra 'cli' ({_exc}); "
        "install it with: pip install 'trio_unixconn[cli]'"
    ) from _exc

app: typer.Typer = typer.Typer(
    name="trio-unixconn",
    help="Pass open files, sockets and proof of identity between processes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _several_commands() -> None:
    """Pass open files, sockets and proof of identity between processes."""


@app.command()
def demo(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Files and folders to hand over; files of this package if left out."),
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    rows: Annotated[
        int, typer.Option(min=0, help="How many files to list; those that differ always are.")
    ] = 20,
) -> None:
    """Hand open files, a pipe and a TCP connection to two processes, and compare.

    Both sides read to the end, and say what they read; they exchange credentials, by await
    and by callback. Exit status 1 if anything differs.
    """
    from ._demo import driver  # noqa: PLC0415 - --help needs none of it

    try:
        files, problems = driver.files_in(paths or sorted(Path(__file__).parent.rglob("*.py")))
    except OSError as exc:
        _fail(f"{exc.filename}: {exc.strerror}", status=2)
    with Progress(
        TextColumn("handing over"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=None)

        def on_progress(done: int, due: int) -> None:
            bar.update(task, completed=done, total=due)

        report = _run(files, on_progress)
    report.skipped += problems
    if as_json:
        differences = report.differences()
        print(  # noqa: T201 - for machines
            json.dumps(
                {**attrs.asdict(report), "same": not differences, "differences": differences},
                indent=1,
            )
        )
    else:
        _print_tables(report, rows)
    if report.differences():
        _fail(*report.differences())


def _run(files: list[Path], on_progress: Callable[[int, int], None]) -> Report:
    from ._demo import driver  # noqa: PLC0415 - as above

    try:
        return trio.run(driver.run, files, on_progress)
    except BaseException as exc:
        expected = (OSError, EOFError, trio.TooSlowError)
        causes = list(_causes(exc))
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            _fail("interrupted", status=130)
        if not all(isinstance(cause, expected) for cause in causes):
            raise
        _fail(*(f"{type(cause).__name__}: {cause}" for cause in causes))


def _causes(exc: BaseException) -> Iterator[BaseException]:
    inner: tuple[BaseException, ...] = getattr(exc, "exceptions", ())
    for each in inner:
        yield from _causes(each)
    if not inner:
        yield exc


def _fail(*lines: str, status: int = 1) -> NoReturn:
    for line in lines:
        print(f"trio-unixconn: {_printable(line)}", file=sys.stderr)  # noqa: T201
    raise typer.Exit(status)


def _print_tables(report: Report, rows: int) -> None:
    console = Console()

    def say(line: str) -> None:
        # Lines that somebody may search or cut are not folded, nor read as markup.
        console.print(_printable(line), markup=False, highlight=False, soft_wrap=True)

    shown = [each for i, each in enumerate(report.transfers) if i < rows or not each.same]
    table = Table(title="Handed over", title_justify="left")
    for name in ("worker", "what", "to pid uid gid"):
        table.add_column(name, overflow="fold")
    for name in ("device:inode", "bytes", "sha256"):
        table.add_column(f"{name}\nhere / there", justify="right", no_wrap=True)
    table.add_column("ms", justify="right")
    for each in shown:
        here, there = each.here, each.there
        table.add_row(
            str(each.worker),
            escape(_printable(each.what)),
            _spaced(each.peer),
            f"{here.identity}\n{there.identity}",
            f"{here.bytes}\n{there.bytes}",
            f"{here.sha256[:12]}\n{there.sha256[:12]}",
            f"{each.seconds * 1000:.1f}",
            style="" if each.same else "red",
        )
    console.print(table)
    if len(shown) < len(report.transfers):
        say(f"... and {len(report.transfers) - len(shown)} more, the same on both sides")
    table = Table(title="Credentials (pid uid gid)", title_justify="left")
    for name in ("worker", "by", "this process is", "worker got", "worker is", "we got"):
        table.add_column(name)
    for exchange in report.exchanges:
        table.add_row(
            str(exchange.worker),
            exchange.form,
            _spaced(exchange.ours),
            _spaced(exchange.they_received),
            _spaced(exchange.theirs),
            _spaced(exchange.we_received),
            style="" if exchange.same else "red",
        )
    console.print(table)
    say(
        f"{sum(report.cancelled)} of {len(report.cancelled)} receives were cancelled by a thread; "
        "what came after them arrived all the same"
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


def _printable(text: str) -> str:
    """Show what a terminal would act on, and what is no text, as escapes."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def _spaced(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
