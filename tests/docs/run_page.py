"""Run the blocks of a page: a program, for tests/docs/test_pages.py.

It reads a list of steps as JSON from standard input, runs them in the current directory, all of
Python in this process, and prints a list of results as JSON. Each is the output, the output to
standard error, and what is wrong, which may be empty.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from inspect import CO_COROUTINE
from types import CodeType, FunctionType
from typing import IO, Any

import trio

from trio_unixconn.jupyter import NotebookNursery
from trio_unixconn.testing import assert_no_fd_leak

Files = tuple[IO[bytes], IO[bytes]]

# How long commands that end by themselves may take, and those that are terminated.
PATIENCE = 30
LONGEST = 90


@contextlib.contextmanager
def captured(files: Files) -> Iterator[None]:
    """Write what this process and its children print to files."""
    kept = [os.dup(1), os.dup(2)]
    try:
        for number, file in zip((1, 2), files, strict=True):
            os.dup2(file.fileno(), number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, fd in zip((1, 2), kept, strict=True):
            os.dup2(fd, number)
            os.close(fd)


def run_python(file: str, *, may_leak: bool) -> str:
    """Run a program, and return its traceback."""
    sys.argv = [file]
    try:
        with contextlib.ExitStack() as stack:
            if may_leak:
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", ResourceWarning)
            else:
                stack.enter_context(assert_no_fd_leak())
            runpy.run_path(file, run_name="__main__")
            gc.collect()
    except SystemExit as exc:
        return f"exit status {exc.code}" if exc.code else ""
    except BaseException:  # a program may raise anything
        return traceback.format_exc()
    finally:
        here = os.getcwd()
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(here):
                del sys.modules[name]
    return ""


def run_cells(cells: list[tuple[str, str]]) -> str:
    """Run the cells of a notebook in one task, and return the traceback."""

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            names: dict[str, Any] = {"nursery": NotebookNursery(nursery)}
            for file, code in cells:
                magic, _, rest = code.partition("\n")
                if magic.startswith("%%writefile "):
                    with open(magic.split()[1], "w") as written:
                        written.write(rest)
                if magic.startswith("%"):
                    continue
                compiled: CodeType = compile(
                    code, file, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
                )
                done = FunctionType(compiled, names)()
                if compiled.co_flags & CO_COROUTINE:
                    await done
            # Exits what is kept open across cells.
            nursery.cancel_scope.cancel()

    try:
        trio.run(run)
    except BaseException:  # a cell may raise anything
        return traceback.format_exc()
    return ""


def run_shell(code: str, files: Files) -> subprocess.Popen[bytes]:
    """Start commands in a session of their own."""
    return subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=files[0],
        stderr=files[1],
        start_new_session=True,
    )


def wait_for_output(process: subprocess.Popen[bytes], file: IO[bytes], text: bytes) -> str:
    """Wait until commands have printed a text; return what is wrong."""
    end = time.monotonic() + PATIENCE
    while text not in os.pread(file.fileno(), 100_000, 0):
        if process.poll() is not None or time.monotonic() > end:
            return f"has not printed {text!r}"
        time.sleep(0.02)
    return ""


def finish(process: subprocess.Popen[bytes], *, terminate: bool) -> str:
    """Wait for commands; return what is wrong."""
    try:
        if terminate:
            # Its children may go on after it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        status = process.wait(PATIENCE)
    except (subprocess.TimeoutExpired, TimeoutError):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"still running after {PATIENCE} seconds"
    return "" if status == 0 or (terminate and status == -signal.SIGTERM) else f"status {status}"


class Page:
    """The steps of a page, their output and what is wrong with them."""

    def __init__(self, steps: list[dict[str, Any]], stack: contextlib.ExitStack) -> None:
        self.steps = steps
        # Closed when the results have been read.
        new = stack.enter_context
        self.outputs = [
            (new(tempfile.TemporaryFile()), new(tempfile.TemporaryFile()))  # noqa: SIM115
            for _ in steps
        ]
        self.errors = [""] * len(steps)
        self.background: list[tuple[int, subprocess.Popen[bytes], bool]] = []

    def run(self, i: int) -> None:
        """Run a step."""
        how = self.steps[i]["how"]
        if how == "shell":
            self.run_commands(i)
        elif how == "cell":
            self.run_cells(i)
        else:
            file = self.steps[i]["file"]
            with open(file, "w") as opened:
                opened.write(self.steps[i]["code"])
            if how != "file":
                with captured(self.outputs[i]):
                    self.errors[i] = run_python(file, may_leak=how == "session")

    def run_commands(self, i: int) -> None:
        """Run commands, or start them."""
        note = self.steps[i]["note"]
        process = run_shell(self.steps[i]["code"], self.outputs[i])
        if not note.startswith("in the background"):
            self.errors[i] = finish(process, terminate=False)
            return
        self.background.append((i, process, "until it ends" not in note))
        if text := note.partition("which prints ")[2]:
            self.errors[i] = wait_for_output(process, self.outputs[i][0], text.encode())

    def run_cells(self, i: int) -> None:
        """Run a cell and those that follow, unless it follows one."""
        if i == 0 or self.steps[i - 1]["how"] != "cell":
            cells = itertools.takewhile(lambda step: step["how"] == "cell", self.steps[i:])
            with captured(self.outputs[i]):
                self.errors[i] = run_cells([(each["file"], each["code"]) for each in cells])

    def end(self) -> None:
        """Wait for what runs in the background."""
        for i, process, terminate in reversed(self.background):
            wrong = finish(process, terminate=terminate)
            self.errors[i] = self.errors[i] or wrong

    def results(self) -> list[tuple[str, str, str]]:
        """Return what each step has printed, also to standard error, and what is wrong."""
        found = []
        for (out, err), wrong in zip(self.outputs, self.errors, strict=True):
            out.seek(0)
            err.seek(0)
            found.append((out.read().decode(), err.read().decode(), wrong))
        return found


def on_alarm(*_args: object) -> None:
    """End the step that runs."""
    raise TimeoutError(f"the page has taken {LONGEST} seconds")


def main() -> None:
    """Run all steps."""
    sys.path[0] = os.getcwd()
    signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(LONGEST)
    with contextlib.ExitStack() as stack:
        page = Page(json.load(sys.stdin), stack)
        try:
            for i in range(len(page.steps)):
                page.run(i)
        finally:
            signal.alarm(0)
            page.end()
        json.dump(page.results(), sys.stdout)


if __name__ == "__main__":
    main()
