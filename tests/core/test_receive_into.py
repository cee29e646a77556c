"""receive_into: bytes into a buffer of the caller's."""

from __future__ import annotations

import array
import mmap
import os
import socket
from typing import Any

import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from tests._helpers.fds import free_descriptors
from tests._helpers.peers import stdlib_peer
from trio_unixconn import (
    Cancellable,
    ConnectionBusyError,
    ConnectionClosedError,
    OperationCancelled,
    UnexpectedDescriptorsError,
    UnixConnection,
    connection_pair,
)


@pytest.mark.parametrize(
    "make",
    [bytearray, lambda size: array.array("I", bytes(size)), lambda size: mmap.mmap(-1, size)],
    ids=["bytearray", "array", "mmap"],
)
async def test_receive_into_fills_any_writable_buffer(make: Any) -> None:
    """The bytes are at the beginning of the buffer, and the rest of it is untouched."""
    one, two = connection_pair()
    async with one, two:
        buffer = make(16)
        await one.send_all(b"hello")
        with assert_checkpoints():
            assert await two.receive_into(buffer) == 5
        assert bytes(memoryview(buffer).cast("B")) == b"hello" + bytes(11)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send_all, b"x" * 100)
            await wait_all_tasks_blocked()
            got = 0
            while got < 100:
                got += await two.receive_into(buffer)
        assert bytes(memoryview(buffer).cast("B"))[:4] == b"xxxx"


async def test_receive_into_part_of_a_buffer() -> None:
    """A view receives into a part of a buffer."""
    one, two = connection_pair()
    async with one, two:
        buffer = bytearray(b"." * 8)

        async def receive() -> None:
            assert await two.receive_into(memoryview(buffer)[2:5]) == 3

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            await one.send_all(b"abcdef")
        assert buffer == b"..abc..."
        assert await two.receive_some() == b"def"


async def test_receive_into_end_of_stream() -> None:
    """At the end of the stream it returns 0, even with SO_PASSCRED on."""
    one, two = connection_pair()
    async with two:
        await one.aclose()
        for passcred in (0, 1):
            two.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, passcred)
            assert await two.receive_into(bytearray(5)) == 0


@pytest.mark.parametrize("receive_descriptors", [True, False])
async def test_receive_into_refuses_descriptors(*, receive_descriptors: bool) -> None:
    """File descriptors are closed, and the error has the bytes."""
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[["file", "pipe"]], data=b"hello".hex())
        await peer.ask("send", kinds=[], data=b"next".hex())
        raw = peer.conn._receiver.raw.dup()
        async with UnixConnection.from_stdlib_socket(
            raw, receive_descriptors=receive_descriptors
        ) as conn:
            buffer = bytearray(100)
            with pytest.raises(
                UnexpectedDescriptorsError, match=r"2 file descriptors \(closed\)"
            ) as caught:
                await conn.receive_into(buffer)
            assert caught.value.data == b"hello"
            assert buffer.startswith(b"hello\0")
            assert await conn.receive_into(buffer) == 4
            assert buffer.startswith(b"nexto")


async def test_receive_into_lost_descriptors() -> None:
    """File descriptors that found no free slot are refused like those that arrived."""
    one, two = connection_pair()
    async with one, two:
        await one.send_message(b"ab", fds=[0])
        with free_descriptors(0), pytest.raises(UnexpectedDescriptorsError, match="lost") as caught:
            await two.receive_into(bytearray(9))
        assert caught.value.data == b"ab"


async def test_receive_into_what_was_read_ahead() -> None:
    """A plain byte that fds() read ahead is received; a file descriptor is refused."""
    one, two = connection_pair()
    async with one, two:
        await one.send_fds([0, 0], per_message=1)
        await one.send_all(b"xyz")
        async for fd in two.fds():
            os.close(fd)
            break
        buffer = bytearray(9)
        with pytest.raises(UnexpectedDescriptorsError) as caught:
            await two.receive_into(buffer)
        assert caught.value.data == b"\0"
        assert await two.receive_into(buffer) == 1
        assert await two.receive_into(memoryview(buffer)[1:]) == 2
        assert buffer.startswith(b"xyz")


@pytest.mark.parametrize(
    ("buffer", "error"),
    [
        (b"bytes", TypeError),
        (bytearray(), ValueError),
        (memoryview(bytearray(8))[::2], TypeError),
        ("text", TypeError),
        (5, TypeError),
        (None, TypeError),
    ],
    ids=["bytes", "empty", "gaps", "str", "int", "None"],
)
async def test_receive_into_rejects_other_buffers(buffer: Any, error: type[Exception]) -> None:
    """What is not a writable contiguous buffer is rejected before anything is received."""
    one, two = connection_pair()
    async with one, two:
        await one.send_all(b"x")
        with pytest.raises(error):
            await two.receive_into(buffer)
        assert await two.receive_some() == b"x"


@pytest.mark.parametrize("way", ["scope", "cancellable", "aclose", "socket.close", "detach"])
async def test_receive_into_that_is_ended(way: str) -> None:
    """A wait that is ended has received nothing; another task is busy meanwhile."""
    one, two = connection_pair()
    cancellable = Cancellable()
    expected: dict[str, type[BaseException]] = {
        "scope": trio.Cancelled,
        "cancellable": OperationCancelled,
    }

    async def receive() -> None:
        with pytest.raises(expected.get(way, ConnectionClosedError)):
            await two.receive_into(bytearray(5), cancellable=cancellable)

    async with one, two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            with pytest.raises(ConnectionBusyError):
                await two.receive_into(bytearray(5))
            if way == "scope":
                nursery.cancel_scope.cancel()
            elif way == "cancellable":
                cancellable.cancel()
            elif way == "aclose":
                await two.aclose()
            elif way == "detach":
                os.close(two.detach())
            else:
                two.socket.close()
        if way in expected:
            await one.send_all(b"x")
            assert await two.receive_some() == b"x"
        else:
            with pytest.raises(ConnectionClosedError):
                await two.receive_into(bytearray(5))
