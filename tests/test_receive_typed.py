"""Typed receives: looked at first, handed over then, closed otherwise."""

from __future__ import annotations

import os
import socket
import tempfile
from typing import TYPE_CHECKING, Any

import pytest
import trio
from helpers import look, stdlib_peer
from trio.testing import wait_all_tasks_blocked

from trio_unixconn import (
    Cancellable,
    DescriptorKind,
    EndOfStreamError,
    OperationCancelled,
    UnexpectedControlMessageError,
    UnixConnection,
    WrongDescriptorKindError,
    connection_pair,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

KIND = DescriptorKind


async def pass_on(fd: int, receive: Callable[[UnixConnection], Awaitable[Any]]) -> Any:
    """Send a descriptor, which is closed, and receive it; the connection must stay in step."""
    one, two = connection_pair()
    async with one, two:
        await one.send_fd(fd)
        os.close(fd)
        await one.send_fd(0)
        try:
            return await receive(two)
        finally:
            got = await two.receive_fd()
            assert os.path.sameopenfile(got, 0)
            os.close(got)


def opened(path: Path | str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC)


################################################################
# Files
################################################################


@pytest.mark.parametrize(
    ("flags", "modes"),
    [
        (os.O_RDONLY, ["r", "rb", "rt"]),
        (os.O_WRONLY, ["w", "wb", "a", "ab"]),
        (os.O_RDWR, ["r", "rb", "rt", "w", "wb", "a", "ab", "r+b", "rb+", "w+b", "w+", "a+b"]),
    ],
)
@pytest.mark.parametrize("mode", ["r", "rb", "rt", "w", "wb", "a", "ab", "r+b", "rb+", "w+b", "w+",
                                  "a+b"])  # fmt: skip
async def test_modes(flags: int, modes: list[str], mode: str, tmp_path: Path) -> None:
    """A file opens if its access mode fits the mode asked for, and is refused otherwise."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    fd = opened(path, flags)
    if mode not in modes:
        text = "to read was due" if flags == os.O_WRONLY and "r" in mode else "was due"
        with pytest.raises(WrongDescriptorKindError, match=text) as caught:
            await pass_on(fd, lambda conn: conn.receive_file(mode))
        assert caught.value.kind is KIND.REGULAR_FILE
        return
    with await pass_on(fd, lambda conn: conn.receive_file(mode)) as file:
        # Nothing is cut off: it is open already.
        assert path.read_bytes() == b"content"
        assert not os.get_inheritable(file.fileno())
        if "r" in mode:
            assert file.read() in (b"content", "content")
        else:
            file.write(b"X" if "b" in mode else "X")
    if "r" not in mode:
        expected = b"contentX" if mode.startswith("a") else b"Xontent"
        assert path.read_bytes() == expected


async def test_from_another_process() -> None:
    """A file of another process is read by default, from where that process stands in it."""
    async with stdlib_peer() as peer:
        (theirs,) = await peer.ask("send", kinds=[["file"]])
        with await peer.conn.receive_file() as file:
            assert look(file.fileno())["identity"] == theirs["identity"]
            assert b"knows nothing but the standard library" in file.read(200)
        await peer.ask("send", kinds=[["tcp"]])
        with pytest.raises(WrongDescriptorKindError, match="but a socket came"):
            await peer.conn.receive_file()
        await peer.ask("eof")
        for receive in (
            peer.conn.receive_file,
            peer.conn.receive_socket,
            peer.conn.receive_stream,
            lambda: peer.conn.receive_buffer(9),
        ):
            with pytest.raises(EndOfStreamError):
                await receive()


async def test_position_is_shared() -> None:
    """The file starts at the position of the open file that both have."""
    with tempfile.TemporaryFile() as file:
        file.write(b"content")
        file.flush()
        file.seek(3)
        with await pass_on(os.dup(file.fileno()), lambda conn: conn.receive_file()) as got:
            assert got.read() == b"tent"


@pytest.mark.parametrize("target", ["file", "directory", "link"])
async def test_path_only(target: str, tmp_path: Path) -> None:
    """What was opened only as a path is refused, whatever kind is allowed."""
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("file")
    fd = opened(tmp_path / target, os.O_PATH | os.O_NOFOLLOW)
    with pytest.raises(WrongDescriptorKindError, match="O_PATH") as caught:
        await pass_on(fd, lambda conn: conn.receive_file(kinds=list(KIND)))
    kinds = {"file": KIND.REGULAR_FILE, "directory": KIND.DIRECTORY, "link": KIND.SYMBOLIC_LINK}
    assert caught.value.kind is kinds[target]


def of_kind(kind: DescriptorKind) -> int:
    """Open something of that kind for reading."""
    if kind is KIND.REGULAR_FILE:
        return os.memfd_create("regular")
    if kind is KIND.DIRECTORY:
        return opened("/", os.O_RDONLY)
    if kind is KIND.PIPE:
        read, write = os.pipe()
        os.close(write)
        return read
    if kind is KIND.SOCKET:
        return socket.socket().detach()
    if kind is KIND.CHARACTER_DEVICE:
        return opened(os.devnull, os.O_RDONLY)
    return os.eventfd(0)


KINDS = [each for each in KIND if each not in (KIND.BLOCK_DEVICE, KIND.SYMBOLIC_LINK)]


@pytest.mark.parametrize("kind", KINDS)
async def test_only_what_is_allowed(kind: DescriptorKind) -> None:
    """Another kind than allowed is refused, and the error has what came."""
    others = [each for each in KIND if each is not kind]
    with pytest.raises(WrongDescriptorKindError, match=f"but a {kind.value} came") as caught:
        await pass_on(of_kind(kind), lambda conn: conn.receive_file(kinds=others))
    assert caught.value.kind is kind


@pytest.mark.parametrize("kind", [KIND.REGULAR_FILE, KIND.PIPE, KIND.CHARACTER_DEVICE])
async def test_allowed_kinds(kind: DescriptorKind) -> None:
    """A kind that is allowed is opened."""
    with await pass_on(of_kind(kind), lambda conn: conn.receive_file(kinds={kind})) as file:
        assert file.read() == b""


async def test_directory_is_no_python_file() -> None:
    """A directory is no Python file, though it may be allowed: an error, and it is closed."""
    with pytest.raises(WrongDescriptorKindError):
        await pass_on(of_kind(KIND.DIRECTORY), lambda c: c.receive_file(kinds=[KIND.DIRECTORY]))


@pytest.mark.parametrize("mode", ["r+b", "w+", "a+b"])
async def test_both_ways_through_what_has_no_position(mode: str) -> None:
    """Python opens no socket or pipe for both; that is said, and it is closed exactly once."""
    one, two = socket.socketpair()
    with one:
        with pytest.raises((ValueError, OSError)) as caught:
            await pass_on(two.detach(), lambda conn: conn.receive_file(mode, kinds=[KIND.SOCKET]))
        assert "Bad file descriptor" not in str(caught.value)
        assert one.recv(1) == b""


@pytest.mark.parametrize("bad", ["", "b", "rw", "x", "rbt", "rr", "rb+b", "U", "r+w", None, 5])
async def test_bad_mode(bad: Any) -> None:
    """What is no mode for an open file is refused before anything is received."""
    one, two = connection_pair()
    async with one, two:
        await one.send_fd(0)
        with pytest.raises((TypeError, ValueError), match="mode must be"):
            await two.receive_file(bad)
        os.close(await two.receive_fd())


async def test_not_one_descriptor() -> None:
    """What is no descriptor at all, or two, is what receive_fd says of it."""
    one, two = connection_pair()
    async with one, two:
        for receive in (two.receive_file, two.receive_socket, two.receive_stream):
            await one.send_fds([0, 0])
            with pytest.raises(UnexpectedControlMessageError, match="2 descriptors"):
                await receive()


async def test_cancellables() -> None:
    """A Cancellable ends the wait of every typed receive and of send_buffer."""
    one, two = connection_pair()
    fired = Cancellable()
    fired.cancel()
    async with one, two:
        cancellable = Cancellable()

        async def wait(receive: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
            with pytest.raises(OperationCancelled):
                await receive(*arguments, cancellable=cancellable)

        calls: list[tuple[Any, ...]] = [
            (two.receive_file,),
            (two.receive_socket,),
            (two.receive_stream,),
            (two.receive_buffer, 9),
        ]
        for receive, *arguments in calls:
            cancellable = Cancellable()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait, receive, *arguments)
                await wait_all_tasks_blocked()
                cancellable.cancel()
        cancellable = fired
        await wait(one.send_buffer, b"x")
        await one.send_fd(0)
        os.close(await two.receive_fd())


################################################################
# Sockets and streams
################################################################


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (socket.AF_INET, socket.SOCK_STREAM),
        (socket.AF_INET, socket.SOCK_DGRAM),
        (socket.AF_INET6, socket.SOCK_STREAM),
        (socket.AF_UNIX, socket.SOCK_STREAM),
        (socket.AF_UNIX, socket.SOCK_DGRAM),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET),
    ],
)
async def test_socket(family: socket.AddressFamily, kind: socket.SocketKind) -> None:
    """A trio socket of the right family and type, which does not block."""
    try:
        sent = socket.socket(family, kind)
    except OSError:
        pytest.skip("this machine has no such sockets")
    with await pass_on(sent.detach(), lambda conn: conn.receive_socket()) as sock:
        assert isinstance(sock, trio.socket.SocketType)
        assert (sock.family, sock.type) == (family, kind)
        assert not os.get_blocking(sock.fileno())
        assert not os.get_inheritable(sock.fileno())


async def test_listening_socket() -> None:
    """A listening socket of another process can be accepted from."""
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[["listening"]])
        with await peer.conn.receive_socket() as listener:
            client = await trio.open_tcp_stream(*listener.getsockname())
            accepted, _ = await listener.accept()
            async with client, trio.SocketStream(accepted) as server:
                await client.send_all(b"x")
                assert await server.receive_some() == b"x"


@pytest.mark.parametrize("kind", [each for each in KINDS if each is not KIND.SOCKET])
@pytest.mark.parametrize("method", ["receive_socket", "receive_stream"])
async def test_no_socket(method: str, kind: DescriptorKind) -> None:
    """What is no socket is refused, and the error has what came."""
    with pytest.raises(WrongDescriptorKindError, match=f"but a {kind.value} came") as caught:
        await pass_on(of_kind(kind), lambda conn: getattr(conn, method)())
    assert caught.value.kind is kind


async def test_tcp_stream() -> None:
    """A connected TCP socket is a trio.SocketStream on which both ends talk."""
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[["tcp"]])
        async with await peer.conn.receive_stream() as stream:
            # The other end is closed with the message, and so there is an end here.
            assert type(stream) is trio.SocketStream
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        with client:
            stream = await pass_on(accepted.detach(), lambda conn: conn.receive_stream())
            async with stream:
                client.sendall(b"there")
                assert await stream.receive_some() == b"there"
                await stream.send_all(b"back")
                assert client.recv(9) == b"back"


async def test_unix_stream() -> None:
    """A connected Unix socket is a UnixConnection, which passes descriptors itself."""
    one, two = socket.socketpair()
    connection = await pass_on(one.detach(), lambda conn: conn.receive_stream())
    assert isinstance(connection, UnixConnection)
    async with connection, UnixConnection.from_stdlib_socket(two) as other:
        await other.send_fd(0)
        os.close(await connection.receive_fd())


def unconnected(*arguments: Any) -> int:
    return socket.socket(*arguments).detach()


def connected_datagram() -> int:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    two.close()
    return one.detach()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: socket.create_server(("127.0.0.1", 0)).detach(), "connected .*but one came that"),
        (lambda: unconnected(socket.AF_INET), "connected .*but one came that is not"),
        (lambda: unconnected(socket.AF_UNIX), "connected .*but one came that is not"),
        (connected_datagram, "but a SOCK_DGRAM socket came"),
        (lambda: unconnected(socket.AF_INET, socket.SOCK_DGRAM), "but a SOCK_DGRAM socket came"),
        (lambda: unconnected(socket.AF_UNIX, socket.SOCK_SEQPACKET), "SOCK_SEQPACKET"),
    ],
)
async def test_no_stream(make: Callable[[], int], text: str) -> None:
    """Listening, unconnected and datagram sockets are no streams."""
    with pytest.raises(WrongDescriptorKindError, match=text) as caught:
        await pass_on(make(), lambda conn: conn.receive_stream())
    assert caught.value.kind is KIND.SOCKET


async def test_a_refused_socket_is_not_touched() -> None:
    """A socket that is refused as a stream still blocks for the sender, who shares it."""
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, two:
        with pytest.raises(WrongDescriptorKindError):
            await pass_on(os.dup(one.fileno()), lambda conn: conn.receive_stream())
        assert os.get_blocking(one.fileno())


async def test_socket_opened_as_a_path(tmp_path: Path) -> None:
    """A socket's path opened with O_PATH is no socket that can be used."""
    one, two = connection_pair()
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
    fd = os.open(path, os.O_PATH)
    async with one, two:
        for receive in (two.receive_socket, two.receive_stream):
            await one.send_fd(fd)
            with pytest.raises(WrongDescriptorKindError, match="cannot be used"):
                await receive()
    os.close(fd)
