"""Who takes part: how each is started, and how it is found out that one is missing.

The rule of this file: a contestant that cannot be started is named, with the reason.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from cases import ANYIO, FLOOR, GIO, OURS, STDLIB, UVLOOP

FOLDER = Path(__file__).parent / "contestants"
PATIENCE = 120


class MissingError(Exception):
    """This contestant is not installed; the text says what is missing."""


@attrs.frozen
class Contestant:
    """One who takes part.

    Attributes:
      name: what it is called.
      command: returns how it is started; raises MissingError.
      packages: whose versions are shown.
    """

    name: str
    command: Callable[[], list[str]]
    packages: tuple[str, ...] = ()

    def version(self) -> str:
        """Return what it is made of, or what is missing."""
        try:
            self.command()
        except MissingError as exc:
            return f"missing: {exc}"
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in self.packages)


def python(script: str, *arguments: str, needs: tuple[str, ...] = ()) -> Callable[[], list[str]]:
    """Return a command for a script under this Python."""

    def command() -> list[str]:
        for package in needs:
            try:
                importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                raise MissingError(f"{package} is not installed") from None
        return [sys.executable, str(FOLDER / script), *arguments]

    return command


def system_python() -> list[str]:
    """Return the command for PyGObject, which is the system's."""
    interpreter = "/usr/bin/python3"
    try:
        subprocess.run(
            [interpreter, "-c", "from gi.repository import Gio"], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        raise MissingError("apt-get install python3-gi gir1.2-glib-2.0") from None
    return [interpreter, str(FOLDER / "gio.py")]


def compiled() -> list[str]:
    """Return the command for the program in C, after compiling it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise MissingError("apt-get install gcc")
    source = FOLDER / "limit.c"
    program = Path(tempfile.gettempdir(), f"trio-unixconn-benchmark-{os.getuid()}")
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        subprocess.run([compiler, "-O2", "-Wall", "-o", str(program), str(source)], check=True)
    return [str(program)]


CONTESTANTS = [
    Contestant("C", compiled),
    Contestant(STDLIB, python("stdlib.py")),
    Contestant(FLOOR, python("floor.py"), ("trio",)),
    Contestant(OURS, python("ours.py"), ("trio_unixconn", "trio")),
    Contestant(ANYIO, python("with_anyio.py", "trio", needs=("anyio",)), ("anyio", "trio")),
    Contestant("anyio on asyncio", python("with_anyio.py", "asyncio", needs=("anyio",)), ("anyio",)),
    Contestant(
        UVLOOP, python("with_anyio.py", "uvloop", needs=("anyio", "uvloop")), ("anyio", "uvloop")
    ),
    Contestant("Twisted", python("with_twisted.py", needs=("twisted",)), ("twisted",)),
    Contestant("multiprocessing.reduction", python("reduction.py")),
    Contestant(GIO, system_python),
]


class Pair:
    """The two processes of a contestant, at the ends of a socketpair."""

    def __init__(self, contestant: Contestant, folder: str) -> None:
        command = contestant.command()
        self.contestant = contestant
        self._folder = folder
        self._processes: list[subprocess.Popen[str]] = []
        ends = socket.socketpair()
        cpus = sorted(os.sched_getaffinity(0))
        try:
            # Which arguments a contestant has for itself come behind those for all.
            program, arguments = self._split(command)
            for side, end in zip(("left", "right"), ends, strict=True):
                self._processes.append(
                    subprocess.Popen(
                        [*program, side, str(end.fileno()), *arguments],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        pass_fds=[end.fileno()],
                        text=True,
                    )
                )
        finally:
            for end in ends:
                end.close()
        for i, process in enumerate(self._processes):
            # A processor each: where the kernel puts them is chance otherwise.
            os.sched_setaffinity(process.pid, {cpus[i % len(cpus)]})
        self.cases: dict[str, list[str]] = self._answers()[0]

    @staticmethod
    def _split(command: list[str]) -> tuple[list[str], list[str]]:
        if command[0].endswith(("python", "python3")) or "python" in Path(command[0]).name:
            return command[:2], command[2:]
        return command[:1], command[1:]

    def run(self, case: str, variant: str, count: int, size: int) -> dict[str, float]:
        """Run once; return the left side's seconds, and the right one's figures."""
        order = {
            "case": case, "variant": variant, "count": count, "size": size, "path": self._folder
        }
        for process in self._processes:
            assert process.stdin is not None  # noqa: S101 - it was asked for
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        left, right = self._answers()
        return {**right, **left}

    def _answers(self) -> list[dict[str, Any]]:
        answers = []
        for process in self._processes:
            assert process.stdout is not None  # noqa: S101 - it was asked for
            line = process.stdout.readline()
            if not line:
                self.close()
                raise RuntimeError(f"{self.contestant.name} died with {process.returncode}")
            answers.append(json.loads(line))
        return answers

    def close(self) -> None:
        """End both processes."""
        for process in self._processes:
            process.communicate() if process.poll() is None else None
