"""The implementations: how each is started, watched from outside, and ended.

Invariant: an implementation that cannot be started, or fails, is named with the reason, and no
process of it stays.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import attrs

from tests._helpers.environment import environment
from tests._helpers.processes import cpu_of, family, open_descriptors
from tests.bench.implementations import (
    OURS,
    FailedError,
    Implementation,
    MissingError,
    Program,
    failed,
    lines_of,
    python,
)

from .workloads import ACCEPTING, NODE, REUSEPORT, SHARED, SINGLE

PACKAGE = f"{__package__}.implementations"
NODE_PROGRAM = Path(__file__).parent / "implementations" / "node_cluster.js"
# In seconds. Only what hangs takes so long.
PATIENCE = 30
# Descriptors that a server may open and close for itself, beside those of connections.
OWN_DESCRIPTORS = 16


@attrs.frozen
class PoolImplementation(Implementation):
    """An implementation, and how many processes of it serve."""

    workers: int = 4


def node(_: str) -> Program:
    """Return how Node's program is started."""
    command = shutil.which("node")
    if command is None:
        raise MissingError("node is not installed")
    done = subprocess.run([command, "--version"], check=True, capture_output=True, text=True)
    return Program([command, str(NODE_PROGRAM)], f"Node {done.stdout.strip()}")


def our_pool(directory: str) -> Program:
    """Return how this library's pool is started, if it has one."""
    if importlib.util.find_spec("trio_unixconn.pool") is None:
        raise MissingError(f"this {OURS} has no pool")
    return python(f"{PACKAGE}.our_pool", packages=[OURS, "trio"])(directory)


def our_workers(directory: str) -> Program:
    """Return how this library's pool is started, if its workers are to accept."""
    return attrs.evolve(our_pool(directory), arguments=("workers",))


def _trio(key: str, name: str, workers: int = 4) -> PoolImplementation:
    find = python(f"{PACKAGE}.{key}", packages=["trio"])
    return PoolImplementation(key, name, find, workers)


IMPLEMENTATIONS = [
    PoolImplementation("ours", OURS, our_pool),
    PoolImplementation("accepting", ACCEPTING, our_workers),
    PoolImplementation("node", NODE, node),
    _trio("reuseport", REUSEPORT),
    _trio("shared", SHARED),
    _trio("single", SINGLE, workers=1),
]


class Server:
    """An implementation that serves a port, and its processes."""

    def __init__(self, implementation: PoolImplementation, directory: str) -> None:
        program = implementation.find(directory)
        self.implementation = implementation
        self.version = program.version
        self._port = 0
        self._errors = open(  # noqa: SIM115 - the processes have it until they end
            os.path.join(directory, f"{implementation.key}.stderr"), "w+"
        )
        self._process = subprocess.Popen(
            [*program.command, *program.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment(),
        )

    @property
    def pid(self) -> int:
        """The process that was started, and that has started the others."""
        return self._process.pid

    @property
    def port(self) -> int:
        """Where it serves; waits until all of its workers do."""
        # Not in the constructor, so that many can start at once.
        if not self._port:
            self._port = lines_of([self._process], self._errors)[0]["port"]
        return self._port

    def await_start(self) -> None:
        """Wait until all of its workers serve; raise FailedError if one died."""
        self.port  # noqa: B018 - waits

    def cpu(self) -> dict[int, float]:
        """Return the processor time of each of its processes."""
        return cpu_of(family(self.pid))

    def descriptors(self) -> int:
        """Return how many descriptors its processes have open."""
        return sum(map(open_descriptors, family(self.pid)))

    def await_descriptors(self, count: int) -> None:
        """Wait until its processes have so many open, or nearly.

        A connection that is on its way from one process to another is open in both.
        """
        deadline = time.monotonic() + PATIENCE
        while abs((now := self.descriptors()) - count) > OWN_DESCRIPTORS:
            if time.monotonic() > deadline:
                raise FailedError(f"has {now} descriptors open, not about {count}")
            time.sleep(0.05)

    def failed(self, how: str) -> FailedError:
        """End it; return the error, with its last words."""
        self._end()
        with self._errors:
            return failed(how, [], self._errors)

    def close(self) -> None:
        """End it; raise FailedError if one of its processes stayed, after ending that."""
        stayed = self._end()
        self._errors.close()
        if stayed:
            raise FailedError(f"{stayed} of its processes did not end by themselves")

    def _end(self) -> int:
        # When it has no more input it ends, and so must those that it has started.
        members = family(self.pid)
        with suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while (alive := _alive(members)) and time.monotonic() < deadline:
            time.sleep(0.01)
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.communicate()
        return len(alive)


def _alive(pids: list[int]) -> list[int]:
    # One that has ended, and that its parent has not waited for, runs no program.
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}/exe")]
