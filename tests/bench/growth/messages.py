"""Cost of messages: with file descriptors and with bytes; and of tasks that wait.

Both ends are in one process, so that its processor time is that of both.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import trio
import trio.testing

from trio_unixconn import (
    Cancellable,
    OperationCancelled,
    UnixConnection,
    UnixDatagramSocket,
    open_unix_datagram,
)

from .observed import Collector

# What is repeated takes about so long in all, in seconds, and is repeated at most so often.
LONG_ENOUGH = 0.04
MOST_REPEATED = 500
LARGEST = 2**24
# More than a socket takes.
FILLING = 2**20

Pair = tuple[UnixConnection, UnixConnection]


@asynccontextmanager
async def pair() -> AsyncGenerator[Pair, None]:
    """Open two connected ends."""
    one, two = map(UnixConnection.from_stdlib_socket, socket.socketpair())
    async with one, two:
        yield one, two


async def cost_of(operation: Callable[[], Awaitable[object]]) -> float:
    """Return the processor time of an operation: the mean, after two that do not count."""
    await operation()
    begin = time.process_time()
    await operation()
    first = time.process_time() - begin
    count = min(MOST_REPEATED, max(1, int(LONG_ENOUGH / max(first, 1e-6))))
    begin = time.process_time()
    for _ in range(count):
        await operation()
    return (time.process_time() - begin) / count


################################################################
# File descriptors
################################################################


def descriptors(count: int) -> dict[str, float]:
    """Measure one message with so many file descriptors."""

    async def main() -> dict[str, float]:
        fds = [0] * count
        async with pair() as (one, two):

            async def by_send_fds() -> None:
                await one.send_fds(fds)
                (await two.receive_fds(count)).close()

            async def by_send_message() -> None:
                await one.send_message(b"x", fds=fds)
                (await two.receive_message(1)).close()

            return {
                "send_fds": await cost_of(by_send_fds),
                "send_message": await cost_of(by_send_message),
            }

    return trio.run(main)


def send_fds(count: int) -> dict[str, float]:
    """Measure one call of send_fds, of so many file descriptors."""

    async def main() -> dict[str, float]:
        fds = [0] * count
        async with pair() as (one, two):

            async def packed() -> None:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(one.send_fds, fds)
                    left = count
                    while left:
                        with await two.receive_fds(left) as received:
                            left -= len(received)

            async def single() -> None:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(partial(one.send_fds, fds, per_message=1))
                    left = count
                    async for fd in two.fds():
                        os.close(fd)
                        left -= 1
                        if not left:
                            break

            return {
                "253 a message": await cost_of(packed),
                "one a message": await cost_of(single),
            }

    return trio.run(main)


################################################################
# Bytes
################################################################


def sizes(size: int) -> dict[str, float]:
    """Measure one message of so many bytes."""

    async def main() -> dict[str, float]:
        data = bytes(size)
        async with pair() as (one, two):

            async def by_send_message() -> None:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(one.send_message, data)
                    left = size
                    while left:
                        left -= len((await two.receive_message(left)).data)

            async def by_send_all() -> None:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(one.send_all, data)
                    left = size
                    while left:
                        left -= len(await two.receive_some(left))

            async def by_send_buffer() -> None:
                await one.send_buffer(data)
                (await two.receive_buffer(LARGEST)).release()

            return {
                "send_message": await cost_of(by_send_message),
                "send_all": await cost_of(by_send_all),
                "send_buffer": await cost_of(by_send_buffer),
            }

    return trio.run(main)


################################################################
# Tasks that wait
################################################################


def waiting(count: int) -> dict[str, float]:
    """Measure so many tasks that wait at the same time."""
    collector = Collector()

    def clock() -> float:
        return time.process_time() - collector.seconds

    try:
        return {
            "senders, one connection": trio.run(senders, count, clock),
            "senders, one datagram receiver": trio.run(datagram_senders, count, clock),
            "one Cancellable cancels": trio.run(cancelled, count, clock),
        }
    finally:
        collector.close()


async def senders(count: int, clock: Callable[[], float]) -> float:
    """Return the cost of tasks that send 4 KiB each, one after the other, once the peer reads.

    A connection has one sender at a time, so they wait for a lock, in the order of their calls. The
    first one fills the socket.
    """
    lock = trio.Lock()
    async with pair() as (one, two):

        async def send(data: bytes) -> None:
            async with lock:
                await one.send_all(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, bytes(FILLING))
            await trio.testing.wait_all_tasks_blocked()
            data = bytes(4096)
            for _ in range(count):
                nursery.start_soon(send, data)
            await trio.testing.wait_all_tasks_blocked()
            begin = clock()
            left = FILLING + count * len(data)
            while left:
                left -= len(await two.receive_some(65_536))
        return clock() - begin


async def datagram_senders(count: int, clock: Callable[[], float]) -> float:
    """Return the cost of tasks that send a datagram each to one receiver, whose queue is full."""
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        address = os.path.join(directory, "s")
        receiver = await stack.enter_async_context(await open_unix_datagram(address))
        first = await stack.enter_async_context(await open_unix_datagram())
        filled = 0
        with trio.move_on_after(0.05):
            while True:
                await first.send_message(b"x", address)
                filled += 1
        others: list[UnixDatagramSocket] = [
            await stack.enter_async_context(await open_unix_datagram()) for _ in range(count)
        ]
        async with trio.open_nursery() as nursery:
            for each in others:
                nursery.start_soon(each.send_message, b"x", address)
            await trio.testing.wait_all_tasks_blocked()
            begin = clock()
            for _ in range(filled + count):
                (await receiver.receive_message(1)).close()
        return clock() - begin


async def cancelled(count: int, clock: Callable[[], float]) -> float:
    """Return the cost of ending so many operations, each of a connection, by one Cancellable."""
    cancellable = Cancellable()

    async def receive(conn: UnixConnection) -> None:
        try:
            await conn.receive_fd(cancellable)
        except OperationCancelled:
            return
        raise AssertionError("received what no process has sent")

    async with AsyncExitStack() as stack:
        pairs: list[Any] = [await stack.enter_async_context(pair()) for _ in range(count)]
        async with trio.open_nursery() as nursery:
            for one, _ in pairs:
                nursery.start_soon(receive, one)
            await trio.testing.wait_all_tasks_blocked()
            begin = clock()
            cancellable.cancel()
        return clock() - begin
