"""UnixConnection.send_message: messages that take several writes, or stop in the middle."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from tests._helpers.fds import clog, sizes, some, unclog
from tests._helpers.peers import stdlib_peer
from trio_unixconn import (
    Cancellable,
    ConnectionBrokenError,
    ConnectionClosedError,
    Credentials,
    OperationCancelled,
    UnixConnection,
    UnixFDList,
    connection_pair,
)

if TYPE_CHECKING:
    import socket

BIG = 10_000_000


async def receive_all(conn: UnixConnection, count: int) -> tuple[int, list[int]]:
    """Receive that many bytes; return how many precede the first descriptor, and the sizes."""
    before, got = 0, list[int]()
    while count:
        with await conn.receive_message(count) as message:
            count -= len(message.data)
            before += len(message.data) if not message.fds and not got else 0
            got += sizes(message.fds)
            assert message.data.strip(b"m") == b""
    return before, got


async def test_send_message_short_writes() -> None:
    """Of 10 MB with file descriptors all bytes arrive, and the file descriptors with the first."""
    one, two = connection_pair()
    async with one, two:
        with some(5) as fds:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: one.send_message(b"m" * BIG, fds=fds))
                assert await receive_all(two, BIG) == (0, [0, 1, 2, 3, 4])
        await one.send_fd(0)
        os.close(await two.receive_fd())


async def test_send_message_to_a_slow_process() -> None:
    """A process that reads slowly gets the file descriptors with the first byte, once."""
    async with stdlib_peer() as peer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: peer.conn.send_message(b"m" * 3_000_000, fds=[0, 0]))
            got = await peer.ask("receive", size=1)
            assert (len(got["fds"]), got["messages"]) == (2, 1)
            got = await peer.ask("receive", size=65536)
            assert (got["fds"], got["messages"]) == ([], 0)
            await peer.ask("plain_receive", size=2_999_999 - len(got["data"]) // 2)
        await peer.conn.send_all(b"next")
        assert await peer.ask("plain_receive", size=4) == b"next".hex()


class Short:
    """A socket that sends 3 bytes at a time, and whose send fails with the given errnos."""

    def __init__(self, sock: socket.socket, *refusals: int) -> None:
        self.sock = sock
        self.refusals = list(refusals)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def sendmsg(self, data: list[memoryview], *arguments: Any) -> int:
        return self.sock.sendmsg([data[0][:3]], *arguments)

    def send(self, data: memoryview, *arguments: Any) -> int:
        if self.refusals:
            number = self.refusals.pop(0)
            raise OSError(number, os.strerror(number))
        return self.sock.send(data[:3], *arguments)


@pytest.mark.parametrize("refusal", [errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM])
async def test_send_message_retries_the_rest(refusal: int) -> None:
    """If memory is short for the rest of a message, the rest is tried again."""
    one, two = connection_pair()
    async with one, two:
        raw = one._sender.raw
        one._sender.raw = Short(raw, refusal, refusal)  # type: ignore[assignment]
        await one.send_message(b"m" * 10, fds=[0])
        one._sender.raw = raw
        assert await receive_all(two, 10) == (0, [os.fstat(0).st_size])


async def test_send_message_fails_in_the_middle() -> None:
    """An error after a part does not claim that nothing was sent; later sends raise."""
    one, two = connection_pair()
    async with one, two:
        raw = one._sender.raw
        one._sender.raw = Short(raw, errno.EINVAL)  # type: ignore[assignment]
        with pytest.raises(OSError, match="Invalid argument") as caught:
            await one.send_message(b"m" * 10, fds=[0])
        one._sender.raw = raw
        assert await receive_all(two, 3) == (0, [os.fstat(0).st_size])
        with pytest.raises(ConnectionBrokenError):
            await one.send_all(b"x")
        assert "nothing was sent" not in str(caught.value)


@pytest.mark.parametrize("way", ["scope", "cancellable"])
async def test_send_message_cancelled_in_the_middle(way: str) -> None:
    """After half a message only receiving works; nothing leaks."""
    one, two = connection_pair()
    cancellable = Cancellable()
    ended: list[str] = []

    async def send() -> None:
        with trio.CancelScope() as scope:
            scopes.append(scope)
            try:
                with some(3) as fds:
                    await one.send_message(b"m" * BIG, fds=fds, cancellable=cancellable)
            except OperationCancelled:
                ended.append("cancellable")
        if scope.cancelled_caught:
            ended.append("scope")

    scopes: list[trio.CancelScope] = []
    async with one, two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            assert await receive_all(two, 100_000) == (0, [0, 1, 2])
            await wait_all_tasks_blocked()
            scopes[0].cancel() if way == "scope" else cancellable.cancel()
        assert ended == [way]
        text = r"send_message\(\) was cancelled or failed after \d+ bytes"
        for again in (
            lambda: one.send_message(b"x"),
            lambda: one.send_message(b"x", fds=[0]),
            lambda: one.send_message(b""),
            lambda: one.send_fd(0),
            lambda: one.send_fds([0, 0]),
            lambda: one.send_all(b"x"),
            one.send_credentials,
        ):
            with pytest.raises(ConnectionBrokenError, match=text):
                await again()
        await two.send_message(b"back", fds=[0])
        with await one.receive_message(9) as message:
            assert (message.data, len(message.fds)) == (b"back", 1)


async def half_sent(conn: UnixConnection) -> None:
    """Send half a message."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.send_message, b"m" * BIG)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def test_send_all_closed_after_half_a_message() -> None:
    """A connection that was closed after half a message is a closed one."""
    one, two = connection_pair()
    async with one, two:
        await half_sent(one)
    with pytest.raises(ConnectionClosedError):
        await one.send_all(b"x")


async def test_send_all_checkpoints_after_half_a_message() -> None:
    """A task that keeps trying after half a message lets other tasks run."""
    one, two = connection_pair()
    async with one, two:
        await half_sent(one)
        with assert_checkpoints(), pytest.raises(ConnectionBrokenError):
            await one.send_all(b"x")


@pytest.mark.parametrize("way", ["scope", "cancellable", "before"])
async def test_send_message_cancelled_before_the_first_byte(way: str) -> None:
    """Cancelled while the socket is full, nothing is sent, and the stream is in step."""
    one, two = connection_pair()
    cancellable = Cancellable()
    if way == "before":
        cancellable.cancel()

    async def send() -> None:
        try:
            await one.send_message(b"m" * 10, fds=[0], cancellable=cancellable)
        except OperationCancelled:
            assert way != "scope"

    async with one, two:
        count = clog(one)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel() if way == "scope" else cancellable.cancel()
        await unclog(two, count)
        await one.send_message(b"next", fds=[0])
        with await two.receive_message(100) as message:
            assert (message.data, len(message.fds)) == (b"next", 1)


async def test_send_message_peer_closes_in_the_middle() -> None:
    """A peer that closes in the middle breaks the connection; nothing leaks."""
    one, two = connection_pair()
    async with one:

        async def send() -> None:
            with pytest.raises(ConnectionBrokenError, match="connection is broken"):
                await one.send_message(b"m" * BIG, fds=[0])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            await two.aclose()


async def test_send_message_originals_closed_while_it_waits() -> None:
    """While it waits, the caller may close the file descriptors and reuse the numbers."""
    one, two = connection_pair()
    count = clog(one)
    fds = some(3)
    async with one, two:
        async with trio.open_nursery() as nursery:
            numbers = list(fds)
            message = lambda: one.send_message(b"x", fds=numbers, credentials=Credentials())  # noqa: E731
            nursery.start_soon(message)
            await wait_all_tasks_blocked()
            fds.close()
            wrong = UnixFDList([os.memfd_create("wrong") for _ in numbers])
            assert sorted(wrong) == sorted(numbers)
            await unclog(two, count)
        wrong.close()
        with await two.receive_message(1, credentials=True) as got:
            assert sizes(got.fds) == [0, 1, 2]
            assert got.credentials == Credentials()
