"""Helpers of the tests of the pool: clients of its workers, and its processes."""

from __future__ import annotations

import json
import os
import socket
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import trio

from tests._helpers.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Iterable

    import pytest

    from trio_unixconn.pool import JobReceipt, PoolStatistics, WorkerPool


def pids(pool: WorkerPool) -> list[int]:
    return [each.pid for each in pool.statistics().workers]


def lines(path: Path) -> list[str]:
    """Return the lines that workers have noted; none if there are none yet."""
    return path.read_text().split() if path.exists() else []


@contextmanager
def watched(numbers: Iterable[int]) -> Generator[list[int], None, None]:
    """Hold on to processes: descriptors that can be read when they have ended."""
    pidfds = [os.pidfd_open(number) for number in numbers]
    try:
        yield pidfds
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


async def ended(pidfds: Iterable[int]) -> None:
    """Wait until processes have ended."""
    with trio.fail_after(30):
        for pidfd in pidfds:
            await trio.lowlevel.wait_readable(pidfd)


def send_batches_by_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have batches wait for the sending tasks, as if the kernel never took one at once."""

    def send_with_fds_nowait(*_: object) -> int:
        raise trio.WouldBlock

    monkeypatch.setattr("trio_unixconn.pool._handle.send_with_fds_nowait", send_with_fds_nowait)


def null() -> int:
    """Open a descriptor, for jobs that need one only to be jobs."""
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


@attrs.define
class Client:
    """One end of a connection, whose other end a handler has."""

    stream: trio.SocketStream
    receipt: JobReceipt | None = None

    async def read(self) -> bytes:
        """Return all that comes until the other end is closed, in all processes."""
        with trio.fail_after(30):
            return b"".join([data async for data in self.stream])

    async def line(self) -> list[int]:
        """Return the numbers on one line that the handler writes."""
        data = b""
        with trio.fail_after(30):
            while not data.endswith(b"\n"):
                more = await self.stream.receive_some(1)
                assert more, "the handler has hung up"
                data += more
        return [int(word) for word in data.split()]

    async def told(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await self.read())
        return found

    async def end(self) -> None:
        """Let the handler finish."""
        await self.stream.aclose()


def ends() -> tuple[Client, socket.socket]:
    """Return a client, and the socket to submit."""
    mine, theirs = socket.socketpair()
    return Client(trio.SocketStream(trio.socket.from_stdlib_socket(mine))), theirs


@asynccontextmanager
async def client_of(pool: WorkerPool, **options: Any) -> AsyncGenerator[Client, None]:
    """Submit a connection, which is closed at the end."""
    client, theirs = ends()
    async with client.stream:
        with trio.fail_after(30):
            client.receipt = await pool.submit(theirs, **options)
        yield client


def check_sums(statistics: PoolStatistics) -> None:
    """All jobs are somewhere, and nowhere twice."""
    of = statistics
    ended = of.handled + of.failed + of.abandoned + of.rejected + of.cancelled + of.handed_over
    assert of.submitted == ended + of.queued + of.in_flight
    assert of.in_flight == sum(each.in_flight for each in of.workers)


async def at_rest(pool: WorkerPool) -> PoolStatistics:
    """Wait until the pool has nothing to do; what it counts must fit together then."""

    def rests() -> bool:
        found = pool.statistics()
        return not found.queued and not found.in_flight

    await until(rests)
    found = pool.statistics()
    check_sums(found)
    return found
