"""Who takes part: how each is started, and how it is found out that one is missing.

The rule of this file: a contestant that cannot be started, or that fails, is named, with the
reason.
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
from cases import ANYIO, FLOOR, GIO, OURS, STDLIB, UVLOOP

import trio_unixconn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

FOLDER = Path(__file__).parent / "contestants"
# In seconds. Only what hangs takes so long.
PATIENCE = 120


class MissingError(Exception):
    """This contestant is not installed; the text says what is missing."""


class FailedError(Exception):
    """This contestant died, or hung; the text says which, and its last words."""


@attrs.frozen
class Program:
    """How a contestant is started.

    Attributes:
      command: what comes before the side and the descriptor.
      version: what it is made of.
      arguments: what comes behind them.
    """

    command: list[str]
    version: str
    arguments: tuple[str, ...] = ()


@attrs.frozen
class Contestant:
    """One who takes part.

    Attributes:
      key: what it is called on the command line.
      name: what it is called in the tables.
      find: returns how it is started, given a folder to build in; raises MissingError.
    """

    key: str
    name: str
    find: Callable[[str], Program]


def installed(package: str) -> str:
    """Return a package's name and version; raise MissingError without it."""
    if package == OURS:
        # It is what stands beside this folder, installed or not.
        return f"{package} {trio_unixconn.__version__}"
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        raise MissingError(f"{package} is not installed") from None


def python(
    script: str, *arguments: str, packages: Iterable[str] = (), folder: Path = FOLDER
) -> Callable[[str], Program]:
    """Return how a script is started under this Python, if the packages are there."""

    def find(_: str) -> Program:
        found = [installed(package) for package in packages]
        version = ", ".join([*found, f"Python {sys.version.split()[0]}"])
        return Program([sys.executable, str(folder / script)], version, arguments)

    return find


def system_python(_: str) -> Program:
    """Return how PyGObject is started, which is the system's."""
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
    return Program([interpreter, str(FOLDER / "gio.py")], done.stdout.strip())


def compiled(folder: str, source: Path = FOLDER / "limit.c") -> Program:
    """Return how a program in C is started, after compiling it."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise MissingError("no C compiler (cc)")
    program = os.path.join(folder, source.stem)
    subprocess.run(
        [compiler, "-std=c11", "-Wall", "-Wextra", "-O2", "-o", program, source, "-lm"],
        check=True,
    )
    done = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True)
    return Program([program], done.stdout.split("\n", 1)[0] + ", -O2")


CONTESTANTS = [
    Contestant("c", "C", compiled),
    Contestant("stdlib", STDLIB, python("stdlib.py")),
    Contestant("reduction", "multiprocessing.reduction", python("reduction.py")),
    Contestant("floor", FLOOR, python("floor.py", packages=["trio"])),
    Contestant("ours", OURS, python("ours.py", packages=[OURS, "trio"])),
    Contestant("anyio-trio", ANYIO, python("with_anyio.py", "trio", packages=["anyio", "trio"])),
    Contestant(
        "anyio-asyncio", "anyio on asyncio", python("with_anyio.py", "asyncio", packages=["anyio"])
    ),
    Contestant(
        "anyio-uvloop", UVLOOP, python("with_anyio.py", "uvloop", packages=["anyio", "uvloop"])
    ),
    Contestant("twisted", "Twisted", python("with_twisted.py", packages=["twisted"])),
    Contestant("gio", GIO, system_python),
]


def environment(*paths: Path) -> dict[str, str]:
    """Return the environment of a contestant, with more paths for its imports."""
    # What is measured is the library that stands beside this folder.
    found = [*map(str, paths), str(FOLDER.parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, found))}


def lines_of(processes: Iterable[subprocess.Popen[bytes]], errors: TextIO) -> list[Any]:
    """Return what each has written, a line of JSON; raise FailedError if one dies, or none does."""
    deadline = time.monotonic() + PATIENCE
    # Of all at once: when one has died the other waits for it in vain.
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
    """End what has failed; return the error, with its last words."""
    for process in processes:
        process.kill()
        process.wait()
    errors.seek(0)
    words = [line for line in errors.read().split("\n") if line.strip()]
    return FailedError(f"{how}: {words[-1].strip() if words else 'without a word'}")


class Pair:
    """The two processes of a contestant, at the ends of a socketpair."""

    def __init__(self, contestant: Contestant, folder: str) -> None:
        program = contestant.find(folder)
        self.contestant = contestant
        self.version = program.version
        self._folder = folder
        self._cases: dict[str, list[str]] | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._errors = open(  # noqa: SIM115 - both processes have it until they end
            os.path.join(folder, f"{contestant.key}.stderr"), "w+"
        )
        allowed = os.sched_getaffinity(0)
        cpus = sorted(allowed)
        ends = socket.socketpair()
        try:
            for i, side in enumerate(("left", "right")):
                # A processor each, from the start: where the kernel puts them is chance.
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
        """What it can do: cases, and their variants; waits until it has started."""
        self._await_start()
        assert self._cases is not None
        return self._cases

    def run(
        self, case: str, variant: str, count: int, size: int, *, on_one: bool = False
    ) -> dict[str, float]:
        """Run once, on a processor each or both on one.

        Returns:
          The left side's seconds, and the right one's figures.
        """
        self._await_start()
        cpus = sorted(os.sched_getaffinity(0))
        for i, process in enumerate(self._processes):
            with suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, {cpus[0 if on_one else i % len(cpus)]})
        order = {"case": case, "variant": variant, "count": count, "size": size}
        line = json.dumps({**order, "path": self._folder}) + "\n"
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
        # Not in the constructor, so that many can start at once.
        if self._cases is None:
            self._cases = lines_of(self._processes, self._errors)[0]

    def close(self) -> None:
        """End both processes, which they do when there are no more orders."""
        for process in self._processes:
            try:
                process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        self._errors.close()
