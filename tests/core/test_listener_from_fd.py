"""UnixListener.from_fd, and the addresses that connections remember."""

from __future__ import annotations

import os
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest
import trio

from trio_unixconn import (
    UnixConnection,
    UnixListener,
    UnixSocketAddress,
    open_unix_connection,
    open_unix_listener,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


async def test_from_fd_inherited(path: Path) -> None:
    """An inherited listener accepts, knows its address, and leaves its path when closed."""
    with listening(path) as sock:
        fd = os.dup(sock.fileno())
        os.set_inheritable(fd, True)
        async with UnixListener.from_fd(fd) as listener:
            assert not os.get_inheritable(fd)
            assert listener.get_local_address() == UnixSocketAddress.path(path)
            async with (
                await open_unix_connection(path) as client,
                await listener.accept() as server,
            ):
                await client.send_fd(0)
                os.close(await server.receive_fd())
        # The socket stays open for other processes that hold it.
        async with await open_unix_connection(path):
            sock.accept()[0].close()
    assert path.exists()


async def test_from_fd_received(path: Path) -> None:
    """A listening socket that another process has sent accepts here after that has exited."""
    script = (
        "import socket, sys\n"
        "with socket.socket(socket.AF_UNIX) as sock, socket.socket(fileno=0) as way:\n"
        "    sock.bind(sys.argv[1])\n"
        "    sock.listen()\n"
        "    socket.send_fds(way, [b'x'], [sock.fileno()])\n"
    )
    ours, theirs = socket.socketpair()
    async with UnixConnection.from_stdlib_socket(ours) as conn:
        with theirs:
            await trio.run_process([sys.executable, "-c", script, str(path)], stdin=theirs)
        fd = await conn.receive_fd()
    async with (
        UnixListener.from_fd(fd) as listener,
        await open_unix_connection(path) as client,
        await listener.accept() as server,
    ):
        await client.send_all(b"x")
        assert await server.receive_some() == b"x"


def test_from_fd_rejects_wrong_descriptors(path: Path) -> None:
    """What is not the fd of a listening Unix socket is rejected, and stays the caller's."""
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(ValueError, match="does not listen"):
        UnixListener.from_fd(sock.fileno())
    one, two = socket.socketpair()
    with one, two:
        with pytest.raises(ValueError, match="does not listen"):
            UnixListener.from_fd(one.fileno())
        one.sendall(b"x")
        assert two.recv(1) == b"x"
        assert one.getblocking()
    with socket.socket() as sock, pytest.raises(ValueError, match="listening Unix stream socket"):
        UnixListener.from_fd(sock.fileno())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(path))
        sock.listen()
        with pytest.raises(ValueError, match="listening Unix stream socket"):
            UnixListener.from_fd(sock.fileno())
    fd = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(ValueError, match="is not a socket"):
        UnixListener.from_fd(fd)
    os.close(fd)
    with pytest.raises(ValueError, match="is not open"):
        UnixListener.from_fd(fd)
    bad: Any
    for bad in ("3", True, None):
        with pytest.raises(TypeError, match="fd must be an int, got"):
            UnixListener.from_fd(bad)


async def test_addresses_after_replace(path: Path) -> None:
    """Both ends know the path, even if the kernel knows the socket by its temporary name."""
    address = UnixSocketAddress.path(path)
    async with (
        await open_unix_listener(path),
        await open_unix_listener(path, replace=True) as listener,
        await open_unix_connection(path) as client,
        await listener.accept() as server,
    ):
        assert listener.get_local_address() == address
        assert client.get_remote_address() == server.get_local_address() == address
        assert client.get_local_address().get_is_anonymous()
        assert server.get_remote_address().get_is_anonymous()
        assert client.socket.getpeername() == str(path.with_name(".s.new"))
        assert str(path) in repr(client)


async def test_addresses_of_a_bound_client(path: Path) -> None:
    """A client that is bound has that address at both ends."""
    own = path.with_name("client")
    async with await open_unix_listener(path) as listener:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(own))
        sock.connect(str(path))
        async with (
            UnixConnection.from_stdlib_socket(
                sock, remote_address=UnixSocketAddress.path(path)
            ) as client,
            await listener.accept() as server,
        ):
            assert client.get_local_address() == UnixSocketAddress.path(own)
            assert server.get_remote_address() == UnixSocketAddress.path(own)
            assert client.get_remote_address() == UnixSocketAddress.path(path)
