"""Situations that anyio's own tests of Unix sockets have, met with anyio at the other end.

anyio's tests/test_sockets.py has a class for streams on Unix sockets and one for their listeners.
anyio runs on trio, so that its streams, clients and listeners are peers here.

| situation in anyio's tests | ours |
| --- | --- |
| attributes: family, names of both ends | below, test_connection |
| send and receive, by str, bytes and Path, at paths and abstract names | below |
| receive with a wrong size | test_connection |
| much data from a slow peer, and to one | below, test_connection |
| file descriptors with bytes, in both directions | below |
| wrong arguments | test_send_message, test_send_fds, test_receive_fds |
| send_eof, then the answer; sending after the peer's end of stream | below |
| iterating over what arrives | test_connection_is_iterated_... below |
| a second task that sends or receives | test_connection |
| closed while sending or receiving; used when closed | test_connection |
| closed after a wait was cancelled, in a handler of a server | test_aclose_of_... below |
| no socket at a path, no listener at an abstract name | below, test_paths |
| names that are not UTF-8 | test_situations_cpython |
| from_socket of sockets, of file descriptors, of wrong ones | test_connection, and below |
| a listener's socket options; accepted sockets do not block | below |
| two listeners one after the other at one name | below |
| several listeners served together, TCP among them | test_situations_trio |
"""

from __future__ import annotations

import io
import os
import socket
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_unixconn import (
    ConnectionBrokenError,
    ConnectionClosedError,
    UnixConnection,
    UnixSocketAddress,
    connection_pair,
    open_unix_connection,
    open_unix_listener,
    serve_unix,
)
from trio_unixconn.testing import clog

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator


@pytest.fixture(params=["path", "abstract"])
def name(request: pytest.FixtureRequest, unix_socket_path: Path) -> str:
    if request.param == "path":
        return str(unix_socket_path)
    return f"\0trio-unixconn-anyio-{os.getpid()}"


@contextmanager
def file_with(text: bytes) -> Iterator[io.BufferedIOBase]:
    with tempfile.TemporaryFile() as file:
        file.write(text)
        file.seek(0)
        assert isinstance(file, io.BufferedIOBase)
        yield file


def texts(fds: Any) -> list[bytes]:
    return [os.pread(fd, 100, 0) for fd in fds]


Streams = tuple[UnixConnection, anyio.abc.UNIXSocketStream]


@pytest.fixture(params=["anyio connects", "anyio listens"])
async def streams(
    request: pytest.FixtureRequest, unix_socket_path: Path
) -> AsyncGenerator[Streams, None]:
    """A connection of ours, and anyio's stream at its other end."""
    if request.param == "anyio connects":
        async with await open_unix_listener(unix_socket_path) as listener:
            stream = await anyio.connect_unix(unix_socket_path)
            conn = await listener.accept()
    else:
        async with await anyio.create_unix_listener(unix_socket_path) as theirs:
            conn = await open_unix_connection(unix_socket_path)
            accepted = await theirs.accept()
            assert isinstance(accepted, anyio.abc.UNIXSocketStream)
            stream = accepted
    async with conn, stream:
        yield conn, stream


################################################################
# anyio's stream at the other end
################################################################


async def test_connection_talks_to_anyio(streams: Streams) -> None:
    """Bytes go both ways, and either end of stream is seen."""
    conn, stream = streams
    await stream.send(b"blah")
    await conn.send_all((await conn.receive_some())[::-1])
    assert await stream.receive() == b"halb"
    await stream.send(b"last")
    await stream.aclose()
    assert [chunk async for chunk in conn] == [b"last"]
    with pytest.raises(ConnectionBrokenError):
        await conn.send_fd(0)


async def test_send_eof_to_anyio(streams: Streams) -> None:
    """After send_eof() anyio's stream has ended in that direction, and works in the other."""
    conn, stream = streams
    await conn.send_eof()
    with pytest.raises(anyio.EndOfStream):
        await stream.receive()
    with file_with(b"text") as file:
        await stream.send_fds(b"\0", [file])
    fd = await conn.receive_fd()
    assert texts([fd]) == [b"text"]
    os.close(fd)


async def test_receives_from_anyio_send_fds(streams: Streams) -> None:
    """Each of our receives takes a message of anyio's send_fds that fits it."""
    conn, stream = streams
    with file_with(b"Hello, ") as one, file_with(b"World!") as two:
        await stream.send_fds(b"test", [one, two])
        await stream.send_fds(b"\0", [one, two])
        await stream.send_fds(b"\0", [two])
        await stream.send(b"rest")
    with await conn.receive_message(10, max_fds=2) as message:
        assert (message.data, texts(message.fds)) == (b"test", [b"Hello, ", b"World!"])
    with await conn.receive_fds(2) as fds:
        assert texts(fds) == [b"Hello, ", b"World!"]
    with await conn.receive_file() as file:
        assert file.read() == b"World!"
    assert await conn.receive_some() == b"rest"


async def test_sends_to_anyio_receive_fds(streams: Streams) -> None:
    """Anyio's receive_fds takes the messages of each of our sends."""
    conn, stream = streams
    with file_with(b"Hello, ") as one, file_with(b"World!") as two:
        for send in (
            conn.send_message(b"test", fds=[one, two]),
            conn.send_fds([one, two]),
            conn.send_fd(two),
        ):
            await send
            data, fds = await stream.receive_fds(10, 2)
            assert data in (b"test", b"\0")
            assert texts(fds) in ([b"Hello, ", b"World!"], [b"World!"])
            for fd in fds:
                os.close(fd)
    await conn.send_all(b"rest")
    assert await stream.receive() == b"rest"


async def test_much_data_to_and_from_anyio(streams: Streams) -> None:
    """A megabyte crosses in each direction at the same time."""
    conn, stream = streams
    data = b"\xff" * 512 * 1024 + b"\0" * 512 * 1024
    received: dict[str, bytes] = {"ours": b"", "theirs": b""}

    async def ours() -> None:
        async for chunk in conn:
            received["ours"] += chunk

    async def theirs() -> None:
        async for chunk in stream:
            received["theirs"] += chunk

    async def send_ours() -> None:
        await conn.send_all(data)
        await conn.send_eof()

    async def send_theirs() -> None:
        await stream.send(data)
        await stream.send_eof()

    async with trio.open_nursery() as nursery:
        for task in (ours, theirs, send_ours, send_theirs):
            nursery.start_soon(task)
    assert received == {"ours": data, "theirs": data}


async def test_detach_for_anyio_from_socket() -> None:
    """A connection that is detached becomes anyio's stream, and back, with nothing lost."""
    one, two = connection_pair()
    async with two:
        await two.send_all(b"before")
        stream = await anyio.abc.UNIXSocketStream.from_socket(one.detach())
        async with stream:
            assert await stream.receive(3) == b"bef"
            raw = stream.extra(anyio.abc.SocketAttribute.raw_socket)
            async with UnixConnection.from_fd(os.dup(raw.fileno())) as back:
                assert await back.receive_some() == b"ore"
                await two.send_fd(0)
                os.close(await back.receive_fd())


################################################################
# Streams
################################################################


async def test_connection_is_iterated_to_the_end(name: str) -> None:
    """Iterating gives the bytes chunk by chunk, and ends with the stream."""
    async with (
        await open_unix_listener(name) as listener,
        await open_unix_connection(name) as client,
    ):
        server = await listener.accept()
        chunks: list[bytes | bytearray] = []
        async with server:
            await server.send_all(b"bl")
            async for chunk in client:
                chunks.append(chunk)
                if len(chunks) == 1:
                    await server.send_all(b"ah")
                else:
                    await server.aclose()
        assert chunks == [b"bl", b"ah"]


@pytest.mark.parametrize("form", [str, os.fsencode, Path, UnixSocketAddress.from_any])
async def test_connection_by_every_form_of_a_name(name: str, form: Callable[[str], Any]) -> None:
    """A path or abstract name may be str, bytes, a Path or an address, at either end."""
    async with (
        await open_unix_listener(form(name)) as listener,
        await open_unix_connection(form(name)) as client,
        await listener.accept() as server,
    ):
        await client.send_all(b"blah")
        await server.send_all((await server.receive_some())[::-1])
        assert await client.receive_some() == b"halb"
        assert client.socket.family == server.socket.family == socket.AF_UNIX
        assert client.get_remote_address() == UnixSocketAddress.from_any(name)


async def test_connection_to_a_thread_that_reads_slowly(name: str) -> None:
    """A thread with a blocking socket reads all that was sent, in small pieces."""
    received = bytearray()
    data = os.urandom(300_000)

    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(name)
        sock.listen()

        def serve() -> None:
            client, _ = sock.accept()
            with client:
                while piece := client.recv(1024):
                    received.extend(piece)
                client.sendall(received[::-1])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            async with await open_unix_connection(name) as conn:
                await conn.send_all(data)
                await conn.send_eof()
                answer = b"".join([chunk async for chunk in conn])
        finally:
            await trio.to_thread.run_sync(thread.join)
    assert bytes(received) == data
    assert answer == data[::-1]


@pytest.mark.parametrize("operation", ["receive_fd", "receive_some", "send_all", "send_fd"])
@pytest.mark.parametrize("serve", ["serve_listeners", "serve_unix"])
async def test_aclose_of_a_cancelled_handler(name: str, serve: str, operation: str) -> None:
    """A handler that is cancelled closes while its other task waits: no error, and it ends."""
    began = trio.Event()
    closed: list[int] = []

    async def handler(conn: UnixConnection) -> None:
        async def operate() -> None:
            try:
                if operation == "send_all":
                    await conn.send_all(bytes(10_000_000))
                elif operation == "send_fd":
                    clog(conn)
                    await conn.send_fd(0)
                else:
                    await getattr(conn, operation)()
            except ConnectionClosedError:
                # Closing may wake it before the cancellation does.
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(operate)
            began.set()
            try:
                await trio.sleep_forever()
            finally:
                try:
                    await conn.aclose()
                finally:
                    closed.append(conn.socket.fileno())

    listener = await open_unix_listener(name)
    async with trio.open_nursery() as nursery:
        if serve == "serve_unix":
            await nursery.start(serve_unix, handler, listener)
        else:
            await nursery.start(trio.serve_listeners, handler, [listener])
        async with await open_unix_connection(name):
            await began.wait()
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert nursery.cancel_scope.cancelled_caught
    assert closed == [-1]


async def test_open_unix_connection_without_listener(name: str) -> None:
    """Without a socket at a path, or a listener at an abstract name, connecting fails at once."""
    error = ConnectionRefusedError if name.startswith("\0") else FileNotFoundError
    with pytest.raises(error):
        await open_unix_connection(name)


################################################################
# Listeners
################################################################


async def test_open_unix_listener_twice_one_after_the_other(name: str) -> None:
    """A name is free again when its listener is closed."""
    for _ in range(2):
        async with (
            await open_unix_listener(name) as listener,
            await open_unix_connection(name) as client,
            await listener.accept() as server,
        ):
            await client.send_all(b"x")
            assert await server.receive_some() == b"x"


async def test_listener_socket_options(name: str) -> None:
    """Options set on a listener's socket stay; accepted sockets do not block."""
    async with await open_unix_listener(name) as listener:
        assert listener.socket.family == socket.AF_UNIX
        listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 80000)
        assert listener.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 160000
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(name)
            async with await listener.accept() as server:
                assert not os.get_blocking(server.socket.fileno())
                assert not os.get_inheritable(server.socket.fileno())


@pytest.mark.parametrize("serve", ["serve_listeners", "serve_unix"])
async def test_handler_sends_after_end_of_stream(name: str, serve: str) -> None:
    """A client that has shut down its own direction still gets the handler's answer."""

    async def handler(conn: UnixConnection) -> None:
        assert await conn.receive_some() == b""
        await conn.send_message(b"Hello\n", fds=[0])

    listener = await open_unix_listener(name)
    async with trio.open_nursery() as nursery:
        if serve == "serve_unix":
            await nursery.start(serve_unix, handler, listener)
        else:
            await nursery.start(trio.serve_listeners, handler, [listener])
        async with await open_unix_connection(name) as client:
            await client.send_eof()
            with await client.receive_message(100) as message:
                assert (message.data, len(message.fds)) == (b"Hello\n", 1)
            assert await client.receive_some() == b""
        nursery.cancel_scope.cancel()
