"""send_credentials, receive_credentials and get_peer_credentials, between processes."""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests._helpers.peers import Peer, stdlib_peer
from trio_unixconn import (
    Credentials,
    DescriptorsTruncatedError,
    UnexpectedControlMessageError,
    UnixConnection,
    connection_pair,
    open_unix_connection,
    open_unix_listener,
)

OURS = [os.getpid(), os.geteuid(), os.getegid()]


def passcred(conn: UnixConnection) -> int:
    return conn.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)


async def peers_own(peer: Peer) -> Credentials:
    return Credentials(await peer.ask("pid"), os.geteuid(), os.getegid())


async def test_send_credentials() -> None:
    """The peer gets our pid, uid and gid with exactly one NUL byte."""
    async with stdlib_peer() as peer:
        await peer.ask("passcred")
        assert await peer.conn.send_credentials() is True
        got = await peer.ask("receive", size=100)
        assert got["credentials"] == OURS
        assert (got["data"], got["messages"], got["fds"]) == ("00", 1, [])


async def test_receive_credentials_sent_before() -> None:
    """Credentials that were sent before we ask are received; SO_PASSCRED is off again."""
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[], credentials=True)
        assert await peer.conn.receive_credentials() == await peers_own(peer)
        assert passcred(peer.conn) == 0


async def test_receive_credentials_while_waiting() -> None:
    """SO_PASSCRED is on while it waits, and off after the credentials are received."""
    async with stdlib_peer() as peer:
        got: list[Credentials] = []

        async def receive() -> None:
            got.append(await peer.conn.receive_credentials())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            assert passcred(peer.conn) == 1
            await peer.ask("send", kinds=[], credentials=True)
        assert got == [await peers_own(peer)]
        assert passcred(peer.conn) == 0


async def test_receive_credentials_keeps_passcred_on() -> None:
    """SO_PASSCRED is left on if it was on."""
    async with stdlib_peer() as peer:
        peer.conn.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        await peer.ask("send", kinds=[], credentials=True)
        await peer.conn.receive_credentials()
        assert passcred(peer.conn) == 1


async def test_receive_credentials_reads_one_byte() -> None:
    """What follows the byte with the credentials stays in the stream."""
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[], credentials=True, data=b"\0rest".hex())
        assert await peer.conn.receive_credentials() == await peers_own(peer)
        assert await peer.conn.receive_some() == b"rest"


async def test_receive_credentials_of_a_byte_without() -> None:
    """For a byte without credentials, receive_credentials returns those of the socket's peer."""
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[], data=b"xy".hex())
        # The pair was made in this process, and that is what the socket knows.
        assert await peer.conn.receive_credentials() == Credentials(*OURS)
        assert await peer.conn.receive_some() == b"y"


@pytest.mark.parametrize("credentials", [False, True])
async def test_receive_credentials_rejects_a_descriptor(*, credentials: bool) -> None:
    """A descriptor is an error, and closed; the option is restored; the next message arrives."""
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[["file"]], credentials=credentials)
        await peer.ask("send", kinds=[], credentials=True)
        with pytest.raises(UnexpectedControlMessageError, match="1 file descriptor") as caught:
            await peer.conn.receive_credentials()
        assert caught.value.data == b"\0"
        assert passcred(peer.conn) == 0
        assert await peer.conn.receive_credentials() == await peers_own(peer)


async def test_receive_credentials_with_truncated_descriptors() -> None:
    """Descriptors for which there was no slot are DescriptorsTruncatedError here too."""
    from tests._helpers.fds import free_descriptors

    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[["file"] * 3])
        with free_descriptors(2), pytest.raises(DescriptorsTruncatedError) as caught:
            await peer.conn.receive_credentials()
        assert caught.value.arrived == 2


async def test_receive_credentials_closed_restores_passcred() -> None:
    """Closing a connection that waits for credentials switches SO_PASSCRED off: others share it."""
    one, two = connection_pair()
    shared = one.socket.dup()

    async def receive() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await one.receive_credentials()

    async with two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            await one.aclose()
        assert shared.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 0
        shared.close()


async def test_receive_credentials_cancelled_restores_passcred() -> None:
    """A cancellation switches SO_PASSCRED off again."""
    one, two = connection_pair()
    async with one, two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.receive_credentials)
            await wait_all_tasks_blocked()
            assert passcred(one) == 1
            nursery.cancel_scope.cancel()
        assert passcred(one) == 0


CLIENT = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sock.recv(1)
"""


async def test_get_peer_credentials(tmp_path: os.PathLike[str]) -> None:
    """get_peer_credentials names the process that connected, and to it the one that listens."""
    path = os.path.join(tmp_path, "s")
    async with (
        await open_unix_listener(path) as listener,
        await open_unix_connection(path) as client,
        await listener.accept(),
    ):
        assert client.get_peer_credentials() == Credentials()
        process = await trio.lowlevel.open_process([sys.executable, "-c", CLIENT, path])
        async with await listener.accept() as conn:
            assert conn.get_peer_credentials() == Credentials(
                process.pid, os.geteuid(), os.getegid()
            )
            await conn.send_all(b"x")
        await process.wait()


USER = """
import os, socket, struct, sys
sock = socket.socket(fileno=int(sys.argv[1]))
os.setgroups([])
os.setgid(1234)
os.setuid(2345)
ids = struct.pack("iII", os.getpid(), 2345, 1234)
sock.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, ids)])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_receive_credentials_of_another_user() -> None:
    """Credentials of a process that became another user are that user's."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-c", USER, str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
    async with UnixConnection.from_stdlib_socket(ours) as conn:
        with trio.fail_after(30):
            assert await conn.receive_credentials() == Credentials(process.pid, 2345, 1234)
            await process.wait()


@pytest.mark.parametrize(
    ("number", "logged"),
    [
        (errno.EPERM, ["cannot switch off socket option 16 (Operation not permitted)"]),
        (errno.EBADF, []),
    ],
)
async def test_receive_credentials_if_the_option_cannot_be_restored(
    number: int, logged: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """An error of setsockopt is logged, and does not take the place of what was received."""

    class Stubborn:
        """A socket of which no option can be switched off."""

        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sock, name)

        def setsockopt(self, level: int, option: int, value: int) -> None:
            if not value:
                raise OSError(number, os.strerror(number))
            self.sock.setsockopt(level, option, value)

    one, two = connection_pair()
    async with one, two:
        await one.send_credentials()
        real, two._receiver.raw = two._receiver.raw, Stubborn(two._receiver.raw)  # type: ignore[assignment]
        assert await two.receive_credentials() == Credentials()
        two._receiver.raw = real
    assert [each.getMessage().partition(":")[0] for each in caplog.records] == logged


@pytest.mark.parametrize("how", ["detach", "aclose"])
async def test_receive_credentials_returns_what_it_has_received(how: str) -> None:
    """A byte that was received before the connection was detached or closed is not lost."""
    results: list[Credentials] = []

    async def receive(conn: UnixConnection) -> None:
        results.append(await conn.receive_credentials())

    for number in range(50):
        one, two = connection_pair()
        async with one, two, trio.open_nursery() as nursery:
            await one.send_all(b"x")
            expected = two.get_peer_credentials()
            nursery.start_soon(receive, two)
            while select.select([two.socket.fileno()], [], [], 0)[0]:
                await trio.lowlevel.checkpoint()
            # The task is in its last checkpoint, or has ended.
            if how == "detach":
                os.close(two.detach())
            else:
                await two.aclose()
        assert results == [expected] * (number + 1)
