"""Taking the descriptor out of a connection."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from helpers import clogged_pair, pair

from trio_unixconn import ConnectionClosedError, UnixConnection, connection_pair

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def test_detach() -> None:
    """The descriptor is the caller's, still connected and open; the connection is closed."""
    one, two = connection_pair()
    async with two:
        number = one.socket.fileno()
        fd = one.detach()
        assert fd == number
        assert one.is_closed()
        await one.aclose()
        async with UnixConnection.from_fd(fd) as again:
            await again.send_all(b"x")
            assert await two.receive_some() == b"x"


@pytest.mark.parametrize(
    ("make", "operation"),
    [
        (pair, UnixConnection.receive_some),
        (pair, UnixConnection.receive_fd),
        (clogged_pair, lambda conn: conn.send_all(b"x")),
        (clogged_pair, lambda conn: conn.send_fd(0)),
    ],
    ids=["receive_some", "receive_fd", "send_all", "send_fd"],
)
async def test_detach_ends_what_waits(
    make: Callable[[], Awaitable[tuple[UnixConnection, UnixConnection]]],
    operation: Callable[[UnixConnection], Awaitable[object]],
) -> None:
    """A task that waits in either direction gets ConnectionClosedError."""
    one, two = await make()
    ended = trio.Event()

    async def wait() -> None:
        with pytest.raises(ConnectionClosedError):
            await operation(one)
        ended.set()

    async with two, trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not ended.is_set()
        os.close(one.detach())


async def test_detach_closes_what_was_read_ahead() -> None:
    """Descriptors that were read ahead, and nobody has received, are closed."""
    one, two = connection_pair()
    reading, writing = os.pipe()
    async with two:
        for _ in range(3):
            await two.send_fd(writing)
        os.close(writing)
        async for fd in one.fds():
            os.close(fd)
            break
        os.close(one.detach())
    # Nobody has the other end any more.
    assert os.read(reading, 1) == b""
    os.close(reading)


async def test_detach_when_closed() -> None:
    """A connection that is closed, or was detached, has no descriptor to take out."""
    one, two = connection_pair()
    await one.aclose()
    with pytest.raises(ConnectionClosedError):
        one.detach()
    os.close(two.detach())
    with pytest.raises(ConnectionClosedError):
        two.detach()
    with pytest.raises(ConnectionClosedError):
        await two.receive_some()
