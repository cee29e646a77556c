"""UnixConnection as a stream: trio's suite, construction, closing, addresses."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import assert_checkpoints, check_half_closeable_stream, wait_all_tasks_blocked

import trio_unixconn
from tests._helpers.fds import clog
from tests._helpers.peers import clogged_pair, pair, stdlib_peer
from trio_unixconn import (
    ConnectionBrokenError,
    ConnectionBusyError,
    ConnectionClosedError,
    EndOfStreamError,
    UnixConnection,
    connection_pair,
    open_unix_connection,
    open_unix_listener,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("clogged", [None, clogged_pair], ids=["plain", "clogged"])
async def test_connection_passes_check_half_closeable_stream(clogged: Any) -> None:
    """trio.testing.check_half_closeable_stream passes, unmodified."""
    await check_half_closeable_stream(pair, clogged)


async def test_connection_is_a_socket_stream() -> None:
    """It counts as a trio.SocketStream, and has all that one has."""
    one, two = connection_pair()
    async with one, two:
        assert isinstance(one, trio.SocketStream)
        assert issubclass(UnixConnection, trio.SocketStream)
        assert isinstance(one, trio.abc.HalfCloseableStream)
        public = [name for name in dir(trio.SocketStream) if not name.startswith("_")]
        assert [name for name in public if not hasattr(one, name)] == []


async def test_every_async_method_is_a_checkpoint() -> None:
    """Each async method is a checkpoint when it succeeds at once."""
    one, two = connection_pair()
    with open(os.devnull) as file:
        with assert_checkpoints():
            await one.send_fd(file)
        with assert_checkpoints():
            os.close(await two.receive_fd())
    with assert_checkpoints():
        await one.send_credentials()
    with assert_checkpoints():
        await two.receive_credentials()
    with assert_checkpoints():
        await one.send_all(b"x")
    with assert_checkpoints():
        await one.send_all(b"")
    with assert_checkpoints():
        await two.receive_some(1)
    with assert_checkpoints():
        await one.wait_send_all_might_not_block()
    with assert_checkpoints():
        await one.send_eof()
    with assert_checkpoints():
        await one.send_eof()
    with assert_checkpoints():
        assert await two.receive_some() == b""
    for conn in (one, two, one):
        with assert_checkpoints():
            await conn.aclose()


async def test_every_async_method_is_a_checkpoint_when_it_fails() -> None:
    """Each async method is a checkpoint, even if the kernel or trio makes it fail."""
    one, two = connection_pair()
    await two.aclose()
    for fail in (one.send_credentials, lambda: one.send_fd(0), lambda: one.send_all(b"x")):
        with assert_checkpoints(), pytest.raises(ConnectionBrokenError):
            await fail()
    for end in (one.receive_fd, one.receive_credentials):
        with assert_checkpoints(), pytest.raises(EndOfStreamError):
            await end()
    await one.aclose()
    for closed in (
        one.send_credentials,
        one.receive_credentials,
        one.receive_fd,
        one.receive_some,
        one.send_eof,
        one.wait_send_all_might_not_block,
        lambda: one.send_fd(0),
        lambda: one.send_all(b"x"),
        lambda: one.send_all(b""),
    ):
        with assert_checkpoints(), pytest.raises(ConnectionClosedError, match="closed"):
            await closed()


async def test_send_all_every_buffer() -> None:
    """send_all takes any contiguous buffer, byte by byte."""
    one, two = connection_pair()
    async with one, two:
        await one.send_all(bytearray(b"ab"))
        await one.send_all(memoryview(b"cd"))
        await one.send_all(memoryview(b"\1\0\0\0\2\0\0\0").cast("i"))
        assert await two.receive_some() == b"abcd\1\0\0\0\2\0\0\0"


async def test_send_all_with_a_slow_reader() -> None:
    """Ten megabytes arrive whole, and the buffer given to send_all is free again."""
    one, two = connection_pair()
    data = bytearray(os.urandom(10_000_000))
    received = bytearray()

    async def send() -> None:
        await one.send_all(data)
        data.append(0)  # BufferError if send_all still held it
        await one.aclose()

    async with two, trio.open_nursery() as nursery:
        nursery.start_soon(send)
        async for chunk in two:
            received += chunk
    assert received == data[:-1]


@pytest.mark.parametrize("bad", [0, -1])
async def test_receive_some_rejects_max_bytes_below_1(bad: int) -> None:
    """max_bytes below 1 is rejected."""
    one, two = connection_pair()
    async with one, two:
        with pytest.raises(ValueError, match="max_bytes must be at least 1, got "):
            await one.receive_some(bad)
        with pytest.raises(TypeError):
            await one.receive_some("1")  # type: ignore[arg-type]


async def test_send_eof_ends_sending_only() -> None:
    """After send_eof nothing can be sent, and receiving still works."""
    one, two = connection_pair()
    async with one, two:
        await one.send_eof()
        for send in (one.send_credentials, lambda: one.send_fd(0), lambda: one.send_all(b"x")):
            with pytest.raises(ConnectionClosedError, match="after send_eof"):
                await send()
        await two.send_all(b"x")
        assert await one.receive_some() == b"x"


async def test_send_after_the_peer_has_closed() -> None:
    """A send to a peer that is gone is ConnectionBrokenError from the OSError."""
    async with stdlib_peer() as peer:
        await peer.ask("reset")
        for send in (
            peer.conn.send_credentials,
            lambda: peer.conn.send_fd(0),
            lambda: peer.conn.send_all(b"x"),
        ):
            with pytest.raises(ConnectionBrokenError) as caught:
                await send()
            assert isinstance(caught.value.__cause__, BrokenPipeError)


async def test_receive_some_after_a_reset() -> None:
    """A peer that closed with our bytes unread resets: what it sent is read, then an error."""
    async with stdlib_peer() as peer:
        await peer.conn.send_all(b"never read")
        await peer.ask("send", kinds=[], data=b"last".hex())
        await peer.ask("reset")
        assert await peer.conn.receive_some() == b"last"
        with pytest.raises(ConnectionBrokenError) as caught:
            await peer.conn.receive_fd()
        assert isinstance(caught.value.__cause__, ConnectionResetError)


@pytest.mark.parametrize("method", ["receive_fd", "receive_credentials", "receive_some"])
async def test_aclose_while_another_task_receives(method: str) -> None:
    """Closing wakes the task that receives with ConnectionClosedError."""
    one, two = connection_pair()

    async def wait() -> None:
        with pytest.raises(ConnectionClosedError):
            await getattr(one, method)()

    async with two, trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        await one.aclose()


async def test_aclose_while_another_task_sends() -> None:
    """Closing wakes the task that sends with ConnectionClosedError, with every method."""
    with open(os.devnull) as file:
        for send in ("send_credentials", "send_fd", "send_all", "wait_send_all_might_not_block"):
            one, two = connection_pair()
            clog(one)
            arguments = {"send_fd": [file], "send_all": [b"x"]}.get(send, [])

            async def wait(
                conn: UnixConnection = one, name: str = send, arguments: Any = arguments
            ) -> None:
                with pytest.raises(ConnectionClosedError):
                    await getattr(conn, name)(*arguments)

            async with two, trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await wait_all_tasks_blocked()
                await one.aclose()


async def test_receive_in_two_tasks() -> None:
    """A second task that receives gets ConnectionBusyError; the first still receives."""
    one, two = connection_pair()

    async def first() -> None:
        assert await one.receive_some() == b"x"

    async with one, two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            await wait_all_tasks_blocked()
            for receive in (one.receive_fd, one.receive_credentials, one.receive_some):
                with pytest.raises(ConnectionBusyError):
                    await receive()
            await two.send_all(b"x")
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 0


async def test_send_in_two_tasks() -> None:
    """A second task that sends gets ConnectionBusyError."""
    one, two = connection_pair()
    clog(one)
    async with one, two, trio.open_nursery() as nursery:
        nursery.start_soon(one.send_credentials)
        await wait_all_tasks_blocked()
        for send in (
            one.send_credentials,
            lambda: one.send_fd(0),
            lambda: one.send_all(b"x"),
            one.send_eof,
            one.wait_send_all_might_not_block,
        ):
            with pytest.raises(ConnectionBusyError):
                await send()
        nursery.cancel_scope.cancel()


async def test_receive_while_a_task_waits_in_the_trio_socket() -> None:
    """A task that waits in trio's socket itself makes the direction busy as well."""
    one, two = connection_pair()
    async with one, two, trio.open_nursery() as nursery:
        nursery.start_soon(one.socket.recv, 1)
        await wait_all_tasks_blocked()
        with pytest.raises(ConnectionBusyError):
            await one.receive_fd()
        nursery.cancel_scope.cancel()


async def test_is_closed_and_is_connected_after_aclose() -> None:
    """is_closed, is_connected and repr follow aclose, which may be called twice or cancelled."""
    one, two = connection_pair()
    async with two:
        assert one.is_connected()
        assert not one.is_closed()
        assert f"fd={one.socket.fileno()} to anonymous" in repr(one)
        with trio.CancelScope() as scope:
            scope.cancel()
            await one.aclose()
        assert scope.cancelled_caught
        assert one.is_closed()
        assert not one.is_connected()
        assert repr(one) == "<UnixConnection closed>"
        await one.aclose()
        for ask in (one.get_peer_credentials, one.get_local_address, one.get_remote_address):
            with pytest.raises(ConnectionClosedError):
                ask()


async def test_is_connected_after_the_peer_has_closed() -> None:
    """is_connected is about this side, and the peer's credentials outlive the peer."""
    async with stdlib_peer() as peer:
        before = peer.conn.get_peer_credentials()
        await peer.ask("reset")
        assert peer.conn.is_connected()
        assert peer.conn.get_peer_credentials() == before


async def test_is_closed_after_the_trio_socket_is_closed() -> None:
    """Closing the trio socket beneath closes the connection."""
    one, two = connection_pair()
    async with two:
        one.socket.close()
        assert one.is_closed()
        with pytest.raises(ConnectionClosedError):
            await one.receive_fd()
        await one.aclose()


async def test_receive_credentials_while_the_trio_socket_is_closed() -> None:
    """Closing the trio socket beneath ends a receive_credentials() that is under way."""
    one, two = connection_pair()

    async def wait() -> None:
        with pytest.raises(ConnectionClosedError):
            await one.receive_credentials()

    async with two, trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        one.socket.close()


async def test_local_and_remote_address(tmp_path: Path) -> None:
    """Both ends know the listener's name; the client has none."""
    path = str(tmp_path / "s")
    async with await open_unix_listener(path) as listener:
        client = await open_unix_connection(path)
        server = await listener.accept()
        async with client, server:
            assert client.get_remote_address().get_path() == path
            assert server.get_local_address().get_path() == path
            assert client.get_local_address().get_is_anonymous()
            assert server.get_remote_address().get_is_anonymous()
            assert path in repr(client)


async def test_getsockopt_and_setsockopt() -> None:
    """Getsockopt and setsockopt reach the socket, in each of trio's forms."""
    one, two = connection_pair()
    async with one, two:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 1
        one.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, b"\0\0\0\0")
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 4) == b"\0\0\0\0"
        with pytest.raises(OSError, match="Bad address"):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, None, 4)
        with pytest.raises(TypeError, match="must not be None without"):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, None)  # type: ignore[call-overload]
        with pytest.raises(TypeError, match="must be None with"):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1, 4)  # type: ignore[call-overload]


################################################################
# Construction
################################################################


async def test_from_trio_socket() -> None:
    """The socket given is the one that is used."""
    left, right = trio.socket.socketpair()
    async with UnixConnection(left) as one, UnixConnection(right) as two:
        assert one.socket is left
        await one.send_all(b"x")
        assert await two.receive_some() == b"x"


async def test_from_stdlib_socket() -> None:
    """A standard library socket becomes non-blocking and the connection's own."""
    left, right = socket.socketpair()
    async with (
        UnixConnection.from_stdlib_socket(left) as one,
        UnixConnection.from_stdlib_socket(right),
    ):
        assert not left.getblocking()
        assert one.socket.fileno() == left.fileno()
    assert left.fileno() == -1


async def test_from_fd() -> None:
    """A descriptor becomes close-on-exec and the connection's own."""
    left, right = socket.socketpair()
    os.set_inheritable(left.fileno(), True)
    fd = left.detach()
    async with UnixConnection.from_fd(fd) as one, UnixConnection.from_fd(right.detach()) as two:
        assert not os.get_inheritable(fd)
        await two.send_all(b"x")
        assert await one.receive_some() == b"x"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def wrong_socket(what: str) -> socket.socket:
    """Make a socket that is not a connected Unix stream socket."""
    if what == "SOCK_DGRAM":
        datagram, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        other.close()
        return datagram
    sock = socket.socket(
        socket.AF_INET if what == "AF_INET" else socket.AF_UNIX,
        socket.SOCK_SEQPACKET if what == "SOCK_SEQPACKET" else socket.SOCK_STREAM,
    )
    if what in {"is not connected", "listens"}:
        sock.bind(f"\0trio-unixconn-test-{os.getpid()}")
    if what == "listens":
        sock.listen()
    if what == "is closed":
        sock.close()
    return sock


@pytest.mark.parametrize(
    "what",
    ["AF_INET", "SOCK_DGRAM", "SOCK_SEQPACKET", "not connected", "is not connected", "listens"],
)
async def test_connection_rejects_wrong_sockets(what: str) -> None:
    """A socket of the wrong kind or in the wrong state is a ValueError that names it."""
    with wrong_socket(what) as sock:
        with pytest.raises(ValueError, match=what):
            UnixConnection.from_stdlib_socket(sock)
        with pytest.raises(ValueError, match=what):
            UnixConnection.from_fd(sock.fileno())
        assert sock.getblocking()
        with pytest.raises(ValueError, match=what):
            UnixConnection(trio.socket.from_stdlib_socket(sock))


async def test_from_stdlib_socket_rejects_closed_socket() -> None:
    """A closed socket is a ValueError."""
    with pytest.raises(ValueError, match="is closed"):
        UnixConnection.from_stdlib_socket(wrong_socket("is closed"))


async def test_connection_rejects_closed_trio_socket() -> None:
    """A closed trio socket is a ValueError."""
    left, right = trio.socket.socketpair()
    left.close()
    right.close()
    with pytest.raises(ValueError, match="is closed"):
        UnixConnection(left)


@pytest.mark.parametrize("bad", [None, 3, "socket", socket.socket, object()])
async def test_connection_rejects_other_objects(bad: Any) -> None:
    """An object that is not a socket is a TypeError that names its type."""
    with pytest.raises(TypeError, match="expected a trio socket"):
        UnixConnection(bad)
    with pytest.raises(TypeError, match=r"expected a socket\.socket"):
        UnixConnection.from_stdlib_socket(bad)


async def test_connection_rejects_the_other_kind_of_socket() -> None:
    """A standard library socket for the constructor, and the other way round: a TypeError."""
    left, right = socket.socketpair()
    with left, right:
        with pytest.raises(TypeError, match=r"expected a trio socket, got socket$"):
            UnixConnection(left)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"expected a socket\.socket"):
            UnixConnection.from_stdlib_socket(trio.socket.from_stdlib_socket(right))  # type: ignore[arg-type]


async def test_connection_rejects_trio_socket_without_a_descriptor() -> None:
    """A trio socket of a custom socket factory is a TypeError."""

    class Fake(trio.socket.SocketType):
        pass

    with pytest.raises(TypeError, match="with a file descriptor"):
        UnixConnection(Fake())


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        (True, TypeError, "an int, got bool"),
        ("3", TypeError, "an int, got str"),
        (3.0, TypeError, "an int, got float"),
        (None, TypeError, "an int, got NoneType"),
        (-1, ValueError, "-1"),
        (2**31, ValueError, "2147483648"),
        (987654, ValueError, "file descriptor 987654 is not open"),
    ],
)
async def test_from_fd_rejects_bad_descriptors(bad: Any, error: type[Exception], text: str) -> None:
    """A number that is not an open descriptor is a TypeError or ValueError that names it."""
    with pytest.raises(error, match=text):
        UnixConnection.from_fd(bad)


async def test_from_fd_rejects_descriptor_of_a_file() -> None:
    """A descriptor of a file is a ValueError, and stays open."""
    with open(os.devnull) as file:
        with pytest.raises(ValueError, match=f"file descriptor {file.fileno()} is not a socket"):
            UnixConnection.from_fd(file.fileno())
        os.fstat(file.fileno())


async def test_connection_pair() -> None:
    """connection_pair gives two ends of one socketpair, close-on-exec."""
    one, two = connection_pair()
    async with one, two:
        for conn in (one, two):
            assert not os.get_inheritable(conn.socket.fileno())
        assert one.get_peer_credentials() == trio_unixconn.Credentials()
