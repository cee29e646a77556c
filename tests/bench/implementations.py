"""Find, compile and read the programs that are measured.

An implementation that cannot be started, or that fails, is reported with the reason.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import select
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import attrs

import trio_unixconn
from tests._helpers import processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

OURS = "trio_unixconn"
# In seconds. Only a process that hangs takes so long.
TIMEOUT = 120


class MissingError(Exception):
    """An implementation is not installed; the text says what is missing."""


class FailedError(Exception):
    """An implementation died or hung; the text says which, and has its last line of errors."""


@attrs.frozen
class Program:
    """How an implementation is started.

    Attributes:
      command: the arguments before the side and the descriptor.
      version: the versions of its parts.
      arguments: the arguments after the side and the descriptor.
    """

    command: list[str]
    version: str
    arguments: tuple[str, ...] = ()


@attrs.frozen
class Implementation:
    """One implementation that is measured.

    Attributes:
      key: its name on the command line.
      name: its name in the tables.
      find: returns its program, given a directory to build in; raises MissingError.
    """

    key: str
    name: str
    find: Callable[[str], Program]


def installed(package: str) -> str:
    """Return a package's name and version; raise MissingError without it."""
    if package == OURS:
        # The package next to this directory, installed or not.
        return f"{package} {trio_unixconn.__version__}"
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        raise MissingError(f"{package} is not installed") from None


def python(module: str, *arguments: str, packages: Iterable[str] = ()) -> Callable[[str], Program]:
    """Return a function that finds a module for this Python, if the packages are installed."""

    def find(_: str) -> Program:
        found = [installed(package) for package in packages]
        version = ", ".join([*found, f"Python {sys.version.split()[0]}"])
        return Program(processes.python(module), version, arguments)

    return find


def compiled(directory: str, source: Path) -> Program:
    """Compile a program in C, and return it."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise MissingError("no C compiler (cc)")
    program = os.path.join(directory, source.stem)
    subprocess.run(
        [compiler, "-std=c11", "-Wall", "-Wextra", "-O2", "-o", program, source, "-lm"],
        check=True,
    )
    done = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True)
    return Program([program], done.stdout.split("\n", 1)[0] + ", -O2")


def lines_of(processes: Iterable[subprocess.Popen[bytes]], errors: TextIO) -> list[Any]:
    """Return the line of JSON of each process; raise FailedError if one dies or hangs."""
    deadline = time.monotonic() + TIMEOUT
    # From all at the same time: if one dies, the other waits for it without end.
    texts = dict.fromkeys(processes, b"")
    while unfinished := [each for each, text in texts.items() if not text.endswith(b"\n")]:
        outputs = {each.stdout.fileno(): each for each in unfinished if each.stdout}
        patience = max(0, deadline - time.monotonic())
        ready, _, _ = select.select(list(outputs), [], [], patience)
        if not ready:
            raise failed("hung", texts, errors)
        for output in ready:
            more = os.read(output, 65536)
            if not more:
                raise failed("died", texts, errors)
            texts[outputs[output]] += more
    return [json.loads(text) for text in texts.values()]


def failed(how: str, processes: Iterable[subprocess.Popen[bytes]], errors: TextIO) -> FailedError:
    """Kill the processes that failed; return an error with the last line of their errors."""
    for process in processes:
        # One that fails, too, may still be writing why.
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)
        process.kill()
        process.wait()
    errors.seek(0)
    words = [line for line in errors.read().split("\n") if line.strip()]
    return FailedError(f"{how}: {words[-1].strip() if words else 'no output'}")
