"""``trio-unixconn demo``: its options, and what it has found."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import attrs
import typer

from .._console import fail, run, say_json

_PACKAGE = Path(__file__).parents[2]


def demo(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Files and directories to hand over (default: files of this package)."),
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
    from . import driver, tables  # --help needs none of it

    try:
        files, problems = driver.files_in(paths or sorted(_PACKAGE.rglob("*.py")))
    except OSError as exc:
        fail(f"{exc.filename}: {exc.strerror}")
    with tables.progress_bar() as on_progress:
        report = run(partial(driver.run, files, on_progress))
    report.skipped += problems
    if as_json:
        differences = report.differences()
        say_json({**attrs.asdict(report), "same": not differences, "differences": differences})
    else:
        tables.print_tables(report, rows)
    if report.differences():
        fail(*report.differences())
