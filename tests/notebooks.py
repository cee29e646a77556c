"""Run the notebooks in ``examples/notebooks``, and compare what they show with what is kept.

It also runs the cells on the page about notebooks, and what the page says of the kernel that is
installed.

Numbers may differ, and pictures; all other text is the same in every run. ``--write`` keeps the new
outputs. It needs the dependency group ``notebooks``: ``nox -s notebooks``.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "examples" / "notebooks"
PAGE = ROOT / "docs" / "how-to" / "use-a-notebook.md"
# After the last cell of the page: its button stops a receive, so the connection is not busy.
AFTER_THE_PAGE = """
import trio.testing

button.click()
await trio.testing.wait_all_tasks_blocked()
await there.send_fd(0)
os.close(await here.receive_fd())
"""
# The rows of the table on the page that are of a kernel as it is installed: how a cell begins.
ROWS = {
    ", as they are": "pass",
    "the same with `%autoawait trio`": "%autoawait trio",
    "the same with `%load_ext trio_unixconn`": "%load_ext trio_unixconn",
}
FIRST_CELL = """
import os, signal, threading, trio
from trio_unixconn import connection_pair
here, there = connection_pair()
"""
RECEIVE = "await there.send_fd(0)\nos.close(await here.receive_fd())\nprint('{}')"
INTERRUPT = """
threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
await here.receive_fd()
"""


def run(notebook: Any, *, allow_errors: bool = False) -> None:
    """Run all cells in a new kernel and a new directory; a cell that raises is an error."""
    with tempfile.TemporaryDirectory() as directory:
        client = NotebookClient(
            notebook,
            allow_errors=allow_errors,
            timeout=60,
            kernel_name="python3",
            resources={"metadata": {"path": directory}},
        )
        client.execute()


def run_page() -> int:
    """Run the cells on the page, and press its button; return how many there are."""
    cells = re.findall(
        r"^```(?:python|text)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    new = nbformat.v4
    run(new.new_notebook(cells=[new.new_code_cell(each) for each in [*cells, AFTER_THE_PAGE]]))
    return len(cells)


def run_table() -> int:
    """Return how many rows of the table on the page are not what the installed kernel does."""
    page = PAGE.read_text()
    failed = 0
    for name, begin in ROWS.items():
        (row,) = re.findall(rf"^\|.*{re.escape(name)} \|(.*)\|$", page, re.MULTILINE)
        expected = [each.strip() for each in row.split("|")]
        cells = [
            RECEIVE.format("works"),
            "nursery.start_soon(trio.sleep_forever)\nprint('yes')",
            *((INTERRUPT, RECEIVE.format("the connection works on")) if expected[2] else ()),
            "trio.run(trio.sleep, 0)\nprint('works')",
        ]
        new = nbformat.v4
        notebook = new.new_notebook(
            cells=[new.new_code_cell(each) for each in [begin, FIRST_CELL, *cells]]
        )
        run(notebook, allow_errors=True)
        does, keeps, *interrupted, runs = [word_of(cell) for cell in notebook.cells[2:]]
        found = [does, "no" if keeps == "NameError" else keeps, "; ".join(interrupted), runs]
        # The page adds a few words.
        if any(
            re.split(", |; ", said)[: len(was.split("; "))] != was.split("; ")
            for said, was in zip(expected, found, strict=True)
        ):
            failed += 1
            sys.stdout.write(f"{name}: {found}, and not {expected}\n")
    return failed


def word_of(cell: Any) -> str:
    """Return what a cell has printed, or the name of what it has raised."""
    (output,) = cell.outputs
    return str(output.get("ename") or output.text.strip())


def shown(notebook: Any) -> list[str]:
    """Return the outputs as lines, with the same text for all numbers, and no pictures."""
    lines: list[str] = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            text = output.get("text") or data.get("text/html") or data.get("text/plain", "")
            kinds = ", ".join(sorted(data)) or output["output_type"]
            text = re.sub(r"/tmp/\S*?/|0x[0-9a-f]+", "", text)
            text = re.sub(r"\d+(\.\d+)?", "N", text)
            lines += [f"cell {number}: {kinds}", *text.splitlines()]
    return lines


def forget_runs(notebook: Any) -> None:
    """Remove what differs in every run and says nothing: times, ids, and the version of Python."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.metadata = {}
        cell.id = f"cell-{number}"
        if "execution_count" in cell:
            cell.execution_count = None
        for output in cell.get("outputs", []):
            if "execution_count" in output:
                output.execution_count = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="without .ipynb; default: all")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    names = arguments.names or sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    failed = 0
    for name in names:
        path = NOTEBOOKS / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        kept = shown(notebook)
        run(notebook)
        forget_runs(notebook)
        now = shown(notebook)
        if arguments.write:
            nbformat.write(notebook, path)
        elif kept != now:
            failed += 1
            sys.stdout.writelines(
                f"{line}\n" for line in difflib.unified_diff(kept, now, "kept", "now", lineterm="")
            )
        sys.stdout.write(f"{name}: {len(notebook.cells)} cells, {len(now)} lines shown\n")
    if not arguments.names:
        sys.stdout.write(f"{PAGE.name}: {run_page()} cells\n")
        failed += run_table()
    sys.exit(
        f"{failed} notebooks, or rows of the table, show something else than is kept"
        if failed
        else 0
    )


if __name__ == "__main__":
    main()
