"""Taking the descriptor out of a connection."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests._helpers.peers import clogged_pair, pair
from trio_unixconn import (
    ConnectionBrokenError,
    ConnectionClosedError,
    Credentials,
    IOErrorEnum,
    ReadAheadError,
    UnixConnection,
    _closing,
    _fds,
    connection_pair,
)
from trio_unixconn._guards import check_handover, guards
from trio_unixconn.pool._endpoints import detach_endpoint

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator


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


async def read_ahead(conn: UnixConnection, peer: UnixConnection) -> None:
    """Have a connection hold two messages with a file descriptor each, and one plain byte."""
    await peer.send_fds([0, 0, 0], per_message=1)
    await peer.send_all(b"x")
    async for fd in conn.fds():
        os.close(fd)
        break
    assert conn.has_read_ahead()


HANDOVERS: dict[str, Callable[[UnixConnection, UnixConnection], Awaitable[object]]] = {
    "send_fd(conn)": lambda conn, to: to.send_fd(conn),
    "send_fd(conn.socket)": lambda conn, to: to.send_fd(conn.socket),
    "send_fd(number)": lambda conn, to: to.send_fd(conn.socket.fileno()),
    "send_fds": lambda conn, to: to.send_fds([0, conn.socket.fileno()]),
    "send_fds(conn)": lambda conn, to: to.send_fds([0, conn]),
    "send_message": lambda conn, to: to.send_message(b"y", fds=[conn]),
    "detach_endpoint": lambda conn, _: detach_endpoint(conn),
    "detach_endpoint(socket)": lambda conn, _: detach_endpoint(conn.socket),
    "detach_endpoint(number)": lambda conn, _: detach_endpoint(conn.socket.fileno()),
}


@pytest.mark.parametrize("hand_over", HANDOVERS.values(), ids=HANDOVERS)
async def test_send_fd_and_submit_reject_what_was_read_ahead(
    hand_over: Callable[[UnixConnection, UnixConnection], Awaitable[object]],
) -> None:
    """A connection that holds messages is not sent or submitted, and loses none of them."""
    one, two = connection_pair()
    three, four = connection_pair()
    async with one, two, three, four:
        await read_ahead(one, two)
        with pytest.raises(ReadAheadError, match=r"3 messages with 2 file descriptors") as caught:
            await hand_over(one, three)
        assert (caught.value.messages, caught.value.descriptors) == (3, 2)
        assert caught.value.code is IOErrorEnum.BUSY
        assert not one.is_closed()
        with trio.move_on_after(0):
            pytest.fail(f"got {await four.receive_some()!r}")
        for _ in range(2):
            os.close(await one.receive_fd())
        assert await one.receive_some() == b"x"
        assert not one.has_read_ahead()
        # Nothing is held any more.
        await three.send_fd(one)
        os.close(await four.receive_fd())


async def test_detach_rejects_what_was_read_ahead() -> None:
    """A connection that holds messages is not detached; once they are received, it is."""
    one, two = connection_pair()
    async with two:
        await read_ahead(one, two)
        with pytest.raises(ReadAheadError, match=r"fds\(read_ahead=1\)"):
            one.detach()
        assert not one.is_closed()
        for _ in range(2):
            os.close(await one.receive_fd())
        with pytest.raises(ReadAheadError, match="1 messages with 0 file descriptors"):
            one.detach()
        assert await one.receive_some() == b"x"
        os.close(one.detach())


async def test_detach_rejects_an_error_that_was_read_ahead() -> None:
    """An error that the kernel reports only once is not lost by a hand-over either."""
    one, two = connection_pair()
    await one.send_all(b"never read")
    await two.send_fds([0, 0], per_message=1)
    await two.aclose()
    assert _closing.wait_closed(30)
    async with one:
        async for fd in one.fds():
            os.close(fd)
            break
        os.close(await one.receive_fd())
        with pytest.raises(ReadAheadError, match="an error"):
            one.detach()
        with pytest.raises(ConnectionBrokenError):
            await one.receive_fd()
        os.close(one.detach())


async def test_filenos_in_another_thread_while_messages_are_taken() -> None:
    """A thread that asks whether a connection can be sent gets ReadAheadError, or its number."""
    one, two = connection_pair()
    number = one.socket.fileno()
    errors: list[Exception] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            for ask_for in (lambda: _fds.filenos([number]), lambda: _fds.fileno(number)):
                try:
                    ask_for()
                except ReadAheadError:
                    continue
                except Exception as exc:  # the test checks all
                    errors.append(exc)

    thread = threading.Thread(target=ask)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        async with one, two:
            for _ in range(50):
                await two.send_fds([0] * 100, per_message=1)
                left = 100
                async for fd in one.fds():
                    os.close(fd)
                    left -= 1
                    if not left:
                        break
    finally:
        is_over.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert errors == []


@pytest.mark.parametrize("read", ["fds", "receive_fd", "receive_fds"])
async def test_fds_that_has_returned_all_leaves_no_guard(read: str) -> None:
    """Once nothing is held, or the connection is closed, sending is as fast as before."""
    one, two = connection_pair()
    async with one, two:
        stream = one.fds()
        for end in ("taken", "closed"):
            await two.send_fds([0, 0, 0], per_message=1)
            os.close(await anext(stream))
            assert one.has_read_ahead()
            assert list(guards) == [one.socket.fileno()]
            # Other connections are sent as before.
            await two.send_fds([two.socket.fileno(), 0])
            if end == "closed":
                await one.aclose()
            elif read == "receive_fd":
                for _ in range(2):
                    os.close(await one.receive_fd())
                (await one.receive_fds(2)).close()
            elif read == "receive_fds":
                with await one.receive_fds(4) as fds:
                    assert len(fds) == 4
            else:
                for _ in range(2):
                    os.close(await anext(stream))
                (await one.receive_fds(2)).close()
                with trio.move_on_after(0):
                    await anext(stream)
            assert not guards


async def test_check_handover_of_a_guard_that_is_removed_meanwhile() -> None:
    """A guard that the trio thread removes between the two look-ups is not an error."""
    one, two = connection_pair()
    async with one, two:
        await read_ahead(one, two)
        check_handover(Vanishing([one.socket.fileno()]))


class Vanishing(list[int]):
    """Numbers whose guards are removed after they have been looked at once."""

    is_seen = False

    def __iter__(self) -> Iterator[int]:
        if self.is_seen:
            guards.clear()
        self.is_seen = True
        return super().__iter__()


@pytest.mark.parametrize("read", ["fds", "receive_fds"])
async def test_detach_after_receiving_without_reading_ahead(read: str) -> None:
    """fds(read_ahead=1) and receive_fds() leave the rest of the stream in the socket."""
    one, two = connection_pair()
    async with two:
        await two.send_fds([0, 0], per_message=1)
        await two.send_all(b"plain")
        await two.send_fds([0, 0, 0])
        await two.send_credentials()
        if read == "fds":
            async for fd in one.fds(read_ahead=1):
                os.close(fd)
                break
            os.close(await one.receive_fd())
        else:
            with await one.receive_fds(8) as fds:
                assert len(fds) == 2
        assert not one.has_read_ahead()
        async with UnixConnection.from_fd(one.detach()) as again:
            assert await again.receive_some(5) == b"plain"
            with await again.receive_fds(3) as fds:
                assert len(fds) == 3
            assert await again.receive_credentials() == Credentials()


async def test_send_fd_number_of_a_closed_connection() -> None:
    """A number is guarded only while the connection is open, even if its socket was closed."""
    for close in (UnixConnection.aclose, close_socket):
        one, two = connection_pair()
        three, four = connection_pair()
        async with two, three, four:
            await read_ahead(one, two)
            number = one.socket.fileno()
            await close(one)
            assert _closing.wait_closed(30)
            os.dup2(0, number)
            await three.send_fd(number)
            os.close(number)


async def close_socket(conn: UnixConnection) -> None:
    """Close the socket without its connection, which then drops what it has read ahead."""
    conn.socket.close()
    with pytest.raises(ConnectionClosedError):
        await conn.receive_fd()
    assert not conn.has_read_ahead()


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
