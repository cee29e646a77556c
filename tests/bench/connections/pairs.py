"""The implementations, each a pair of processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tests._helpers.environment import environment
from tests.bench.implementations import (
    OURS,
    Implementation,
    MissingError,
    Program,
    compiled,
    failed,
    lines_of,
    python,
)

from .workloads import ANYIO, FLOOR, GIO, STDLIB, UVLOOP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PACKAGE = f"{__package__}.implementations"
LIMIT = Path(__file__).parent / "implementations" / "limit.c"


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


def _python(name: str, *arguments: str, packages: Iterable[str] = ()) -> Callable[[str], Program]:
    return python(f"{PACKAGE}.{name}", *arguments, packages=packages)


IMPLEMENTATIONS = [
    Implementation("c", "C", partial(compiled, source=LIMIT)),
    Implementation("stdlib", STDLIB, _python("stdlib")),
    Implementation("reduction", "multiprocessing.reduction", _python("reduction")),
    Implementation("floor", FLOOR, _python("floor", packages=["trio"])),
    Implementation("ours", OURS, _python("ours", packages=[OURS, "trio"])),
    Implementation("anyio-trio", ANYIO, _python("with_anyio", "trio", packages=["anyio", "trio"])),
    Implementation(
        "anyio-asyncio", "anyio on asyncio", _python("with_anyio", "asyncio", packages=["anyio"])
    ),
    Implementation(
        "anyio-uvloop", UVLOOP, _python("with_anyio", "uvloop", packages=["anyio", "uvloop"])
    ),
    Implementation("twisted", "Twisted", _python("with_twisted", packages=["twisted"])),
    Implementation("gio", GIO, system_python),
]


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
                        env=environment(),
                    )
                )
        finally:
            os.sched_setaffinity(0, allowed)
            for end in ends:
                end.close()

    @property
    def cases(self) -> dict[str, list[str]]:
        """The cases it supports, with their variants; waits until it has started."""
        self.await_start()
        assert self._cases is not None
        return self._cases

    def run(
        self, case: str, variant: str, count: int, size: int, *, on_one: bool = False
    ) -> dict[str, float]:
        """Run once, on one processor each or both on the same one.

        Returns:
          The seconds of the left side, and the figures of the right side.
        """
        self.await_start()
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

    def await_start(self) -> None:
        """Wait until both processes have started; raise FailedError if one died."""
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
