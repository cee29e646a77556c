"""A server process, as the scenes see it: commands, its workers, and what is left of it.

Invariant: however a scene ends, nothing of its server is left.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import trio

from tests._helpers import processes
from tests._helpers.environment import environment
from tests._helpers.processes import python
from tests._helpers.waiting import until

from .clients import Load
from .target import RECORDS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection

WORKERS = 4
LOOK = 0.02
PATIENCE = 60
# Random kills hit five consecutive workers of one slot now and then, which would end the pool.
_CRASH_LIMIT = 100


_GONE: Any = object()


class ServerGoneError(Exception):
    """The server has ended; with the end of its log."""


@attrs.define
class _Answer:
    """What the server will have answered."""

    value: Any = None
    received: trio.Event = attrs.field(factory=trio.Event)


@attrs.define
class Running:
    """A server process.

    Attributes:
      directory: its socket, its log, and the records of its handlers.
      idle_descriptors: how many it had open before the first connection; and its workers had.
    """

    directory: Path
    process: trio.Process
    port: int = 0
    idle_descriptors: int = 0
    idle_worker_descriptors: int = 0
    _asked: dict[int, _Answer] = attrs.field(factory=dict[int, "_Answer"])
    _sending: trio.Lock = attrs.field(factory=trio.Lock)
    _numbers: itertools.count[int] = attrs.field(factory=itertools.count)

    @property
    def pid(self) -> int:
        """Its number."""
        return self.process.pid

    @property
    def records(self) -> Path:
        """Where the handlers write."""
        return self.directory / "records"

    def load(self, **options: Any) -> Load:
        """Make clients for it."""
        return Load(self.port, str(self.directory / "socket"), **options)

    async def ask(self, do: str, **arguments: Any) -> Any:
        """Have it do something, and return what it answers; several may ask at a time."""
        assert self.process.stdin is not None
        number = next(self._numbers)
        line = json.dumps({"number": number, "do": do, **arguments}).encode() + b"\n"
        answer = self._asked[number] = _Answer()
        async with self._sending:
            await self.process.stdin.send_all(line)
        with trio.fail_after(2 * PATIENCE):
            await answer.received.wait()
        if answer.value is _GONE:
            raise ServerGoneError(self.log()[-2000:])
        return answer.value

    async def listen(self, task_status: trio.TaskStatus[None]) -> None:
        """Hear what it says, until its end."""
        assert self.process.stdout is not None
        buffer = b""
        async for data in self.process.stdout:
            # A ledger is long: it is looked at again only when its end has come.
            if b"\n" not in data:
                buffer += data
                continue
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                said = json.loads(line)
                if "port" in said:
                    self.port = said["port"]
                    task_status.started()
                else:
                    answer = self._asked.pop(said["number"])
                    answer.value = said["answer"]
                    answer.received.set()
        if not self.port:
            raise ServerGoneError(self.log()[-2000:])
        for answer in self._asked.values():
            answer.value = _GONE
            answer.received.set()

    def log(self) -> str:
        """Return what it, its pool and its workers have logged."""
        return (self.directory / "log").read_text(errors="replace")

    def workers(self) -> list[int]:
        """Return its workers, also those that are starting."""
        return list(processes.children_of(self.pid))

    async def pids(self) -> list[int]:
        """Return the workers that take jobs."""
        found = (await self.ask("statistics"))["workers"]
        return [each["pid"] for each in found if each["state"] == "ready"]

    async def signal_one(
        self, rng: random.Random, number: signal.Signals, but: Collection[int] = ()
    ) -> int:
        """Send a signal to a worker at random, but not to some; return which it was."""
        while True:
            some = [each for each in self.workers() if each not in but]
            if some and processes.send_to_child(pid := rng.choice(some), self.pid, number):
                return pid
            if self.process.poll() is not None:
                raise ServerGoneError(self.log()[-2000:])
            # All are dead: the pool is about to start others.
            await trio.sleep(LOOK)

    async def idle(self) -> None:
        """Wait until all slots have a worker, none is leaving, and no job is left."""
        begin = trio.current_time()
        while True:
            now = await self.ask("statistics")
            states = [each["state"] for each in now["workers"]]
            if states == ["ready"] * WORKERS and not now["in_flight"] and not now["queued"]:
                return
            if trio.current_time() > begin + PATIENCE:
                raise TimeoutError(f"never idle: {now}\n{self.log()[-2000:]}")
            await trio.sleep(LOOK)

    async def leftovers(self) -> dict[str, int]:
        """Return what should not be there, once it is idle."""
        await self.idle()
        # The peer of the last connection has seen its end before the worker has closed it.
        with contextlib.suppress(trio.TooSlowError), trio.fail_after(5):
            await until(lambda: not any(self._more().values()))
        return self._more()

    def _more(self) -> dict[str, int]:
        pids = self.workers()
        extra = processes.open_descriptors(self.pid) - self.idle_descriptors
        of_workers: list[int] = []
        for each in pids:
            # One that was told to exit may do so between two looks; then it is a zombie at most.
            with contextlib.suppress(FileNotFoundError):
                of_workers.append(processes.open_descriptors(each))
        return {
            "zombies": list(processes.children_of(self.pid).values()).count("Z"),
            "processes too many": len(pids) - WORKERS,
            "descriptors leaked in the pool": extra,
            "descriptors leaked in workers": max(
                (each - self.idle_worker_descriptors for each in of_workers), default=0
            ),
        }

    async def finish(self) -> dict[str, Any]:
        """Have it drain, and return its ledger, and how many of its processes are left."""
        ledger: dict[str, Any] = await self.ask("finish")
        ledger["processes left"] = len(self.all()) - 1
        return ledger

    def all(self) -> list[int]:
        """Return it and its workers, even those that are not children any more."""
        return processes.with_variable(RECORDS, str(self.records))

    def kill_all(self) -> None:
        """Kill whatever is left of it."""
        for pid in self.all():
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(pid)
                if pid in self.all():
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)


@asynccontextmanager
async def running(
    way: str, handler: str = "answer", *, order: dict[str, Any] | None = None, **options: Any
) -> AsyncGenerator[Running]:
    """Start a server, and leave nothing of it.

    Args:
      way: "submit" or "serve", as accepting.py says.
      handler: the function in target.py.
      order: more for accepting.py.
      options: of the pool.
    """
    with tempfile.TemporaryDirectory(prefix="pool-faults-") as name:
        directory = Path(name)
        (directory / "records").touch()
        orders: dict[str, Any] = {
            **(order or {}),
            "way": way,
            "handler": f"tests.faults.pool.target:{handler}",
            "unix": str(directory / "socket"),
            "options": {"workers": WORKERS, "crash_limit": _CRASH_LIMIT, **options},
        }
        with (directory / "log").open("wb") as log:
            process = await trio.lowlevel.open_process(
                python("tests.faults.pool.accepting", json.dumps(orders)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(**{RECORDS: str(directory / "records")}),
            )
        assert process.stdin is not None
        assert process.stdout is not None
        server = Running(directory, process)
        async with process.stdin, process.stdout, trio.open_nursery() as nursery:
            try:
                await nursery.start(server.listen)
                await server.idle()
                server.idle_descriptors = processes.open_descriptors(server.pid)
                server.idle_worker_descriptors = max(
                    map(processes.open_descriptors, server.workers())
                )
                yield server
            finally:
                process.kill()
                server.kill_all()
                with trio.CancelScope(shield=True):
                    await process.wait()
