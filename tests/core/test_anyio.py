"""UnixConnectionStream: code that is written for anyio, over a connection."""

from __future__ import annotations

import os
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import anyio
import anyio.abc
import pytest
from trio.testing import wait_all_tasks_blocked

from trio_unixconn import (
    SendError,
    UnexpectedControlMessageError,
    UnexpectedDescriptorsError,
    UnixConnection,
    connection_pair,
    open_unix_listener,
)
from trio_unixconn.anyio import UnixConnectionStream, connect_unix
from trio_unixconn.testing import clog

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path


@asynccontextmanager
async def streams() -> AsyncGenerator[tuple[UnixConnectionStream, anyio.abc.UNIXSocketStream]]:
    """Return a stream of ours, and one of anyio at the other end."""
    here, there = socket.socketpair()
    theirs = await anyio.abc.UNIXSocketStream.from_socket(there)
    async with UnixConnectionStream(UnixConnection.from_stdlib_socket(here)) as ours, theirs:
        yield ours, theirs


async def test_stream_send_and_receive() -> None:
    """Bytes go both ways, and the end of the stream is anyio's exception."""
    async with streams() as (ours, theirs):
        await ours.send(b"hello")
        assert await theirs.receive() == b"hello"
        await theirs.send(b"world")
        assert await ours.receive(3) == b"wor"
        assert await ours.receive() == b"ld"
        await ours.send_eof()
        with pytest.raises(anyio.EndOfStream):
            await theirs.receive()
        await theirs.send_fds(b"x", [0])
        await theirs.aclose()
        message, fds = await ours.receive_fds(10, 10)
        assert message == b"x"
        os.close(fds[0])
        with pytest.raises(anyio.EndOfStream):
            await ours.receive_fds(10, 10)
        with pytest.raises(anyio.EndOfStream):
            await ours.receive()


async def test_stream_send_fds_and_receive_fds() -> None:
    """File descriptors go both ways, as ints that the receiver owns."""
    async with streams() as (ours, theirs):
        with open(os.devnull, "rb", buffering=0) as file:
            await ours.send_fds(b"two", [file, 0])
            data, fds = await theirs.receive_fds(100, 2)
            assert (data, len(fds)) == (b"two", 2)
            await theirs.send_fds(b"back", fds)
        for fd in fds:
            os.close(fd)
        data, fds = await ours.receive_fds(100, 1000)
        assert (data, len(fds)) == (b"back", 2)
        for fd in fds:
            os.close(fd)


async def test_stream_does_not_lose_file_descriptors_in_silence() -> None:
    """Where anyio's stream drops them, this one raises, and the stream can still be used."""
    async with streams() as (ours, theirs):
        await theirs.send_fds(b"one", [0])
        with pytest.raises(UnexpectedDescriptorsError) as caught:
            await ours.receive()
        assert caught.value.data == b"one"
        await theirs.send_fds(b"two", [0, 0])
        with pytest.raises(UnexpectedControlMessageError):
            await ours.receive_fds(10, 1)
        await theirs.send(b"and on")
        assert await ours.receive() == b"and on"


async def test_stream_rejects_wrong_arguments() -> None:
    """Wrong arguments are anyio's ValueError, before anything happens."""
    with pytest.raises(TypeError, match="expected a UnixConnection, got int"):
        UnixConnectionStream(cast("Any", 3))
    async with streams() as (ours, theirs):
        for size in (0, -1):
            with pytest.raises(ValueError, match="max_bytes must be a positive integer"):
                await ours.receive(size)
        for sizes, name in (((0, 1), "msglen"), ((True, 1), "msglen"), ((1, "many"), "maxfds")):
            with pytest.raises(ValueError, match=f"{name} must be a positive integer"):
                await ours.receive_fds(*cast("Any", sizes))
        with pytest.raises(ValueError, match="message must not be empty"):
            await ours.send_fds(b"", [0])
        with pytest.raises(ValueError, match="fds must not be empty"):
            await ours.send_fds(b"x", [])
        with pytest.raises(SendError):
            await ours.send_fds(b"x", [10**6])
        await ours.send(b"x")
        assert await theirs.receive() == b"x"


async def test_stream_that_is_busy_closed_or_broken() -> None:
    """The exceptions are those of anyio's streams."""
    here, there = connection_pair()
    ours = UnixConnectionStream(here)
    first, second = connection_pair()
    closed = UnixConnectionStream(first)
    await closed.aclose()
    await second.aclose()
    async with ours, anyio.create_task_group() as tasks:

        async def receive() -> None:
            with pytest.raises(anyio.ClosedResourceError):
                await ours.receive()

        async def send() -> None:
            with pytest.raises(anyio.ClosedResourceError):
                await ours.send(b"x" * 1000)

        clog(here)
        tasks.start_soon(receive)
        tasks.start_soon(send)
        await wait_all_tasks_blocked()
        with pytest.raises(anyio.BusyResourceError, match="reading from"):
            await ours.receive()
        with pytest.raises(anyio.BusyResourceError, match="writing to"):
            await ours.send_fds(b"x", [0])
        await ours.aclose()
    await there.aclose()
    for operation in (closed.receive(), closed.send(b"x"), closed.send_eof()):
        with pytest.raises(anyio.ClosedResourceError):
            await operation
    async with streams() as (left, gone):
        await gone.aclose()
        with pytest.raises(anyio.BrokenResourceError):
            await left.send(b"x")


async def test_connect_unix(tmp_path: Path) -> None:
    """It connects as anyio's function does, with the typed attributes of anyio's streams."""
    path = tmp_path / "socket"
    async with (
        await open_unix_listener(path) as listener,
        await connect_unix(path) as stream,
        await listener.accept() as accepted,
    ):
        assert stream.extra(anyio.abc.SocketAttribute.remote_address) == str(path)
        assert stream.extra(anyio.abc.SocketAttribute.family) is socket.AF_UNIX
        assert stream.extra(anyio.abc.SocketAttribute.raw_socket).fileno() > 2
        assert repr(stream) == f"<UnixConnectionStream of {stream.connection!r}>"
        await stream.connection.send_credentials()
        assert (await accepted.receive_credentials()).pid == os.getpid()
        await accepted.send_all(b"as a stream")
        await accepted.send_eof()
        assert b"".join([part async for part in stream]) == b"as a stream"
