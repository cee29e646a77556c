"""The implementations: how each is started, and why one is missing.

An implementation that cannot be started, or that fails, is reported with the reason.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import attrs

import trio_unixconn
from tests._helpers import processes

from .cases import ANYIO, FLOOR, GIO, OURS, STDLIB, UVLOOP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PACKAGE = f"{__package__}.implementations"
LIMIT = Path(__file__).parent / "implementations" / "limit.c"
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


def python(
    name: str, *arguments: str, packages: Iterable[str] = (), package: str = PACKAGE
) -> Callable[[str], Program]:
    """Return a function that finds a module for this Python, if the packages are installed."""

    def find(_: str) -> Program:
        found = [installed(package) for package in packages]
        version = ", ".join([*found, f"Python {sys.version.split()[0]}"])
        return Program(processes.python(f"{package}.{name}"), version, arguments)

    return find


def system_python(_: str) -> Program:
    """Return the program for PyGObject, which the system's Python has."""
    interpreter = "/usr/bin/python3"
    versions = (
        "import sys, gi; from gi.repository import GLib, Gio; "
        "glib = GLib.MAJOR_VERSION, GLib.MINOR_VERSION, GLib.MICRO_VERSION; "
        "print('GLib %d.%d.%d' % glib, 'PyGObject ' + gi.__version__, "
        "'Python ' + sys.version.split()[0], sep=', ')"
    )
    try:
        done = subprocess.run(
            [interpreter, "-c", versions], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        raise MissingError("apt-get install python3-gi gir1.2-glib-2.0") from None
    return Program([interpreter, "-m", f"{PACKAGE}.gio"], done.stdout.strip())


def compiled(directory: str, source: Path = LIMIT) -> Program:
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


IMPLEMENTATIONS = [
    Implementation("c", "C", compiled),
    Implementation("stdlib", STDLIB, python("stdlib")),
    Implementation("reduction", "multiprocessing.reduction", python("reduction")),
    Implementation("floor", FLOOR, python("floor", packages=["trio"])),
    Implementation("ours", OURS, python("ours", packages=[OURS, "trio"])),
    Implementation("anyio-trio", ANYIO, python("with_anyio", "trio", packages=["anyio", "trio"])),
    Implementation(
        "anyio-asyncio", "anyio on asyncio", python("with_anyio", "asyncio", packages=["anyio"])
    ),
    Implementation(
        "anyio-uvloop", UVLOOP, python("with_anyio", "uvloop", packages=["anyio", "uvloop"])
    ),
    Implementation("twisted", "Twisted", python("with_twisted", packages=["twisted"])),
    Implementation("gio", GIO, system_python),
]


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
        process.kill()
        process.wait()
    errors.seek(0)
    words = [line for line in errors.read().split("\n") if line.strip()]
    return FailedError(f"{how}: {words[-1].strip() if words else 'no output'}")


class Pair:
    """The two processes of an implementation, at the ends of a socketpair."""

    def __init__(self, implementation: Implementation, directory: str) -> None:
        program = implementation.find(directory)
        self.implementation = implementation
        self.version = program.version
        self._directory = directory
        self._cases: dict[str, list[str]] | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._errors = open(  # noqa: SIM115 - both processes use it until they exit
            os.path.join(directory, f"{implementation.key}.stderr"), "w+"
        )
        allowed = os.sched_getaffinity(0)
        cpus = sorted(allowed)
        ends = socket.socketpair()
        try:
            for i, side in enumerate(("left", "right")):
                # One processor each, from the start: the kernel's choice would be chance.
                os.sched_setaffinity(0, {cpus[i % len(cpus)]})
                fd = ends[i].fileno()
                command = [*program.command, side, str(fd), *program.arguments]
                self._processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=self._errors,
                        pass_fds=[fd],
                        env=processes.environment(),
                    )
                )
        finally:
            os.sched_setaffinity(0, allowed)
            for end in ends:
                end.close()

    @property
    def cases(self) -> dict[str, list[str]]:
        """The cases it supports, with their variants; waits until it has started."""
        self._await_start()
        assert self._cases is not None
        return self._cases

    def run(
        self, case: str, variant: str, count: int, size: int, *, on_one: bool = False
    ) -> dict[str, float]:
        """Run once, on one processor each or both on the same one.

        Returns:
          The seconds of the left side, and the figures of the right side.
        """
        self._await_start()
        cpus = sorted(os.sched_getaffinity(0))
        for i, process in enumerate(self._processes):
            with suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, {cpus[0 if on_one else i % len(cpus)]})
        request = {"case": case, "variant": variant, "count": count, "size": size}
        line = json.dumps({**request, "path": self._directory}) + "\n"
        try:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(line.encode())
                process.stdin.flush()
        except OSError as exc:
            raise failed("died", self._processes, self._errors) from exc
        left, right = lines_of(self._processes, self._errors)
        return {**right, **left}

    def _await_start(self) -> None:
        # Not in the constructor, so that many can start at the same time.
        if self._cases is None:
            self._cases = lines_of(self._processes, self._errors)[0]

    def close(self) -> None:
        """End both processes, which exit at the end of their standard input."""
        for process in self._processes:
            try:
                process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        self._errors.close()
