"""A byte that a peer sends out of band (MSG_OOB), and its file descriptors."""

from __future__ import annotations

import os
import socket
import struct
import sys
from typing import TYPE_CHECKING

import pytest

from tests.core.test_closing import lingering_socket, release_lingering
from trio_unixconn import (
    UnexpectedDescriptorsError,
    UnixConnection,
    _closing,
    _kernel,
    _sockopts,
    open_unix_listener,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MSG_OOB of Linux")


def send_oob(peer: socket.socket, data: bytes, fd: int) -> None:
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))
    try:
        peer.sendmsg([data], [rights], socket.MSG_OOB)
    except OSError as exc:
        pytest.skip(f"no MSG_OOB on Unix sockets, before Linux 5.15: {exc}")


@pytest.fixture
async def conn_and_peer() -> AsyncIterator[tuple[UnixConnection, socket.socket]]:
    sock, peer = socket.socketpair()
    with peer:
        async with UnixConnection.from_stdlib_socket(sock) as conn:
            yield conn, peer


async def test_receive_fd_of_an_oob_message(
    conn_and_peer: tuple[UnixConnection, socket.socket],
) -> None:
    """receive_fd returns the file descriptor of an out-of-band byte, and those around it."""
    conn, peer = conn_and_peer
    paths = [os.devnull, "/", os.devnull]
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if path == "/":
            send_oob(peer, b"o", fd)
        else:
            socket.send_fds(peer, [b"n"], [fd])
        os.close(fd)
    for path in paths:
        fd = await conn.receive_fd()
        assert os.path.samestat(os.fstat(fd), os.stat(path))
        os.close(fd)


async def test_receive_message_of_an_oob_message(
    conn_and_peer: tuple[UnixConnection, socket.socket],
) -> None:
    """receive_message returns the byte with its file descriptor; the stream keeps its order."""
    conn, peer = conn_and_peer
    peer.send(b"before")
    send_oob(peer, b"!", 0)
    peer.send(b"after")
    data, fds = b"", 0
    while not data.endswith(b"after"):
        with await conn.receive_message(100) as message:
            data += message.data
            fds += len(message.fds)
    assert data == b"before!after"
    assert fds == 1


async def test_receive_fds_takes_oob_messages(
    conn_and_peer: tuple[UnixConnection, socket.socket],
) -> None:
    """receive_fds, which peeks, takes an out-of-band message as any other."""
    conn, peer = conn_and_peer
    socket.send_fds(peer, [b"1"], [0])
    send_oob(peer, b"2", 0)
    socket.send_fds(peer, [b"3"], [0])
    count = 0
    while count < 3:
        with await conn.receive_fds(10) as fds:
            count += len(fds)
    assert count == 3


async def test_receive_some_of_an_oob_message_with_a_lingering_socket(
    conn_and_peer: tuple[UnixConnection, socket.socket],
) -> None:
    """receive_some reports the file descriptor, and the event loop does not close it."""
    conn, peer = conn_and_peer
    with lingering_socket(60) as sock:
        send_oob(peer, b"!", sock.fileno())
    peer.send(b"hello")
    with pytest.raises(UnexpectedDescriptorsError) as caught:
        await conn.receive_some(100)
    # close(2) blocks for a minute, so it is still running, in the closing thread.
    assert not _closing.wait_closed(0)
    assert caught.value.data == b"!"
    assert await conn.receive_some(100) == b"hello"
    release_lingering()


async def test_accept_sets_oobinline(tmp_path: Path) -> None:
    """A connection that accept returned receives out-of-band messages, too."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as peer:
        async with await open_unix_listener(path) as listener:
            peer.connect(path)
            root = os.open("/", os.O_RDONLY | os.O_CLOEXEC)
            send_oob(peer, b"!", root)
            os.close(root)
            async with await listener.accept() as conn:
                fd = await conn.receive_fd()
                assert os.path.samestat(os.fstat(fd), os.stat("/"))
                os.close(fd)


def test_enable_oobinline_without_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """A platform without the option, or one that rejects it, is not an error."""
    one, two = socket.socketpair()
    with one, two:
        monkeypatch.setattr(_kernel, "SO_OOBINLINE", 9999)
        _sockopts.enable_oobinline(one)
        monkeypatch.setattr(_kernel, "SO_OOBINLINE", None)
        _sockopts.enable_oobinline(one)
        assert not one.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE)
