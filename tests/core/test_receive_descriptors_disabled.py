"""receive_descriptors=False, and options that are on for the life of a connection."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests._helpers.fds import free_descriptors
from tests._helpers.peers import Peer, stdlib_peer
from tests._helpers.requirements import SO_PASSPIDFD, message_pidfds, passrights
from trio_unixconn import (
    Credentials,
    DescriptorsRefusedError,
    EndOfStreamError,
    NotSupportedError,
    UnexpectedControlMessageError,
    UnexpectedDescriptorsError,
    UnixConnection,
    UnixListener,
    _kernel,
    _receiver,
    connection_pair,
    open_unix_connection,
    open_unix_listener,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path


@pytest.fixture(params=["none", "unknown"])
def no_passrights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older kernel, or a machine on which the option has no number."""
    number = 12345 if request.param == "unknown" else None
    monkeypatch.setattr(_kernel, "SO_PASSRIGHTS", number)


################################################################
# The kernel refuses
################################################################


@passrights
async def test_refused_by_the_kernel(tmp_path: Path) -> None:
    """Sending descriptors to a peer that rejects them raises, and bytes still pass."""
    path = tmp_path / "s"
    async with (
        await open_unix_listener(path) as listener,
        await open_unix_connection(path, receive_descriptors=False) as client,
        await listener.accept() as server,
    ):
        for send in (
            lambda: server.send_fd(0),
            lambda: server.send_fds([0, 0]),
            lambda: server.send_message(b"x", fds=[0]),
        ):
            with pytest.raises(DescriptorsRefusedError):
                await send()
        await server.send_all(b"bytes")
        assert await client.receive_some() == b"bytes"
        # The other direction is the other's.
        await client.send_fd(0)
        os.close(await server.receive_fd())


@passrights
async def test_refused_before_it_is_accepted(tmp_path: Path) -> None:
    """Connections inherit it from the listener, before they are accepted."""
    path = tmp_path / "s"
    async with (
        await open_unix_listener(path, receive_descriptors=False) as listener,
        await open_unix_connection(path) as client,
    ):
        with pytest.raises(DescriptorsRefusedError):
            await client.send_fd(0)
        await client.send_all(b"bytes")
        async with await listener.accept() as server:
            assert await server.receive_some() == b"bytes"


@passrights
async def test_refused_from_the_first_moment(tmp_path: Path) -> None:
    """A client refuses before it is connected, so that nothing can be on its way already."""
    path = tmp_path / "s"
    async with (
        await open_unix_listener(path) as listener,
        trio.open_nursery() as nursery,
    ):
        with pytest.MonkeyPatch.context() as patch:

            async def send(sock: socket.socket, _: object) -> None:
                sock.connect(str(path))
                async with await listener.accept() as server:
                    with pytest.raises(DescriptorsRefusedError):
                        await server.send_fd(0)

            patch.setattr("trio_unixconn._client._connect", send)
            async with await open_unix_connection(path, receive_descriptors=False):
                pass
        nursery.cancel_scope.cancel()


@passrights
async def test_refused_by_each_constructor(tmp_path: Path) -> None:
    """Every way to make a connection or a listener can refuse."""
    makers: list[Callable[[socket.socket], UnixConnection]] = [
        lambda sock: UnixConnection(
            trio.socket.from_stdlib_socket(sock), receive_descriptors=False
        ),
        lambda sock: UnixConnection.from_stdlib_socket(sock, receive_descriptors=False),
        lambda sock: UnixConnection.from_fd(sock.detach(), receive_descriptors=False),
    ]
    for make in makers:
        ours, theirs = socket.socketpair()
        async with make(ours), UnixConnection.from_stdlib_socket(theirs) as peer:
            with pytest.raises(DescriptorsRefusedError):
                await peer.send_fd(0)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(tmp_path / "s"))
    sock.listen()
    async with (
        UnixListener.from_fd(sock.detach(), receive_descriptors=False),
        await open_unix_connection(tmp_path / "s") as client,
    ):
        with pytest.raises(DescriptorsRefusedError):
            await client.send_fd(0)


################################################################
# The library refuses
################################################################


@asynccontextmanager
async def refusing_peer() -> AsyncIterator[tuple[Peer, UnixConnection]]:
    """A peer in another process, at the other end of a connection that takes no descriptors."""
    async with stdlib_peer() as peer:
        raw = peer.conn._receiver.raw.dup()
        async with UnixConnection.from_stdlib_socket(raw, receive_descriptors=False) as conn:
            yield peer, conn


RECEIVING: list[Callable[[UnixConnection], Awaitable[Any]]] = [
    lambda conn: conn.receive_fd(),
    lambda conn: conn.receive_fds(5),
    lambda conn: anext(conn.fds()),
    lambda conn: conn.receive_credentials(),
    lambda conn: conn.receive_some(),
    lambda conn: conn.receive_some(1),
    lambda conn: conn.receive_message(9),
    lambda conn: conn.receive_message(9, max_fds=0, credentials=True),
    lambda conn: conn.receive_file(),
    lambda conn: conn.receive_socket(),
    lambda conn: conn.receive_stream(),
    lambda conn: conn.receive_buffer(1000),
]


@pytest.mark.usefixtures("no_passrights")
@pytest.mark.parametrize("receive", RECEIVING)
@pytest.mark.parametrize("kinds", [[["file"]], [["file", "unix", "pipe"]]], ids=len)
async def test_refused_here(
    receive: Callable[[UnixConnection], Awaitable[Any]], kinds: list[list[str]]
) -> None:
    """If the kernel cannot reject them, every receive method closes descriptors, and raises."""
    async with refusing_peer() as (peer, conn):
        for _ in range(2):
            await peer.ask("send", kinds=kinds)
            await peer.ask("send", kinds=[], data="6162")
            with pytest.raises(UnexpectedDescriptorsError, match="not accept file") as caught:
                await receive(conn)
            assert caught.value.data == b"\0"
            # The stream continues after it.
            assert await conn.receive_some() == b"ab"


@pytest.mark.parametrize("receive", RECEIVING)
async def test_on_their_way_before(receive: Callable[[UnixConnection], Awaitable[Any]]) -> None:
    """What was sent before the option was set is refused on arrival, on every kernel."""
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[["file"]], data="6162")
        raw = peer.conn._receiver.raw.dup()
        async with UnixConnection.from_stdlib_socket(raw, receive_descriptors=False) as conn:
            with pytest.raises(UnexpectedDescriptorsError) as caught:
                await receive(conn)
            assert b"ab".startswith(caught.value.data)
            assert caught.value.data


@pytest.mark.usefixtures("no_passrights")
async def test_lost_on_arrival() -> None:
    """Descriptors without a free slot are refused like received ones."""
    async with refusing_peer() as (peer, conn):
        for free in (0, 1):
            await peer.ask("send", kinds=[["file"] * 3], data="6162")
            with free_descriptors(free), pytest.raises(UnexpectedDescriptorsError) as caught:
                await conn.receive_message(9)
            assert caught.value.data == b"ab"


@pytest.mark.usefixtures("no_passrights")
async def test_receive_methods_without_passrights() -> None:
    """Credentials, bytes and the end of the stream are received as without the option."""
    async with refusing_peer() as (peer, conn):
        await peer.ask("send", kinds=[], credentials=True)
        pid = await peer.ask("pid")
        ours = Credentials(pid, os.geteuid(), os.getegid())
        assert await conn.receive_credentials() == ours
        await peer.ask("send", kinds=[], data="6162", credentials=True)
        with await conn.receive_message(9, credentials=True) as message:
            assert (message.data, message.credentials) == (b"ab", ours)
        for receive in (conn.receive_fd, lambda: conn.receive_fds(3), conn.fds().__anext__):
            await peer.ask("send", kinds=[], data="61")
            with pytest.raises(UnexpectedControlMessageError, match="expected") as caught:
                await receive()
            assert caught.value.data == b"a"
        await peer.ask("eof")
        with pytest.raises(EndOfStreamError):
            await conn.receive_fd()
        assert [fd async for fd in conn.fds()] == []
        assert await conn.receive_some() == b""


@pytest.mark.usefixtures("no_passrights")
async def test_inherited_where_the_kernel_cannot(tmp_path: Path) -> None:
    """What a listener accepts refuses also where the kernel cannot; so does a client."""
    path = tmp_path / "s"
    async with (
        await open_unix_listener(path, receive_descriptors=False) as listener,
        await open_unix_connection(path, receive_descriptors=False) as client,
        await listener.accept() as server,
    ):
        for one, two in ((client, server), (server, client)):
            await one.send_fd(0)
            with pytest.raises(UnexpectedDescriptorsError):
                await two.receive_fd()


################################################################
# Credentials and pidfds with every message
################################################################


@asynccontextmanager
async def connected(
    path: Path, *, at: str, **options: Any
) -> AsyncIterator[tuple[UnixConnection, UnixConnection]]:
    """Give an end with these options, set on it or on its listener, and the other end."""
    on_listener: dict[str, Any] = options if at == "listener" else {}
    on_client: dict[str, Any] = options if at == "client" else {}
    async with (
        await open_unix_listener(path, **on_listener) as listener,
        await open_unix_connection(path, **on_client) as client,
        await listener.accept() as server,
    ):
        yield (server, client) if at == "listener" else (client, server)


@message_pidfds
@pytest.mark.parametrize("at", ["listener", "client"])
@pytest.mark.parametrize("pidfds", [False, True])
@pytest.mark.parametrize("credentials", [False, True])
async def test_with_every_message(
    tmp_path: Path, *, at: str, credentials: bool, pidfds: bool
) -> None:
    """Each message has what was asked for once, and every other way to receive still works."""
    async with connected(tmp_path / "s", at=at, credentials=credentials, pidfds=pidfds) as (
        conn,
        peer,
    ):
        for fds in ([], [0]):
            for _ in range(2):
                await peer.send_message(b"ab", fds=fds)
                with await conn.receive_message(9) as message:
                    assert message.data == b"ab"
                    assert message.credentials == (Credentials() if credentials else None)
                    assert (message.pidfd is not None) is pidfds
                    assert len(message.fds) == len(fds)
                    if message.pidfd is not None:
                        assert pid_of(message.pidfd) == os.getpid()
        await peer.send_fds([0, 1, 2], per_message=1)
        os.close(await conn.receive_fd())
        stream = conn.fds()
        for _ in range(2):
            os.close(await anext(stream))
        await peer.send_fds([0, 1, 2])
        with await conn.receive_fds(9) as received:
            assert len(received) == 3
        await peer.send_credentials()
        assert await conn.receive_credentials() == Credentials()
        await peer.send_all(b"\0")
        assert await conn.receive_credentials() == Credentials()
        await peer.send_all(b"plain")
        assert await conn.receive_some() == b"plain"
        with open(__file__, "rb") as file:
            await peer.send_fd(file)
        (await conn.receive_file()).close()
        # An option that is on permanently is not switched off after a temporary use.
        with await receive_all(conn, peer) as message:
            assert message.credentials is not None
        assert conn.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == credentials
        assert conn.getsockopt(socket.SOL_SOCKET, SO_PASSPIDFD) == pidfds
        await peer.aclose()
        assert await conn.receive_some() == b""


async def receive_all(conn: UnixConnection, peer: UnixConnection) -> Any:
    await peer.send_message(b"x", credentials=Credentials())
    return await conn.receive_message(9, credentials=True, pidfd=True)


def pid_of(pidfd: int) -> int:
    with open(f"/proc/self/fdinfo/{pidfd}") as file:
        return next(int(line[4:]) for line in file if line.startswith("Pid:"))


@pytest.mark.parametrize("option", ["SO_PASSCRED", "SO_PASSPIDFD"])
@pytest.mark.parametrize("number", [None, 12345])
async def test_options_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, number: int | None
) -> None:
    """An option that the kernel lacks is NotSupportedError, and leaks nothing."""
    monkeypatch.setattr(_kernel, option, number)
    asked: dict[str, Any] = {"credentials" if option == "SO_PASSCRED" else "pidfds": True}
    path = tmp_path / "s"
    with pytest.raises(NotSupportedError, match=option):
        await open_unix_listener(path, **asked)
    assert not path.exists()
    async with await open_unix_listener(path):
        with pytest.raises(NotSupportedError, match=option):
            await open_unix_connection(path, **asked)


async def test_options_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another error of an option is not a sign that it is missing."""
    monkeypatch.setattr(_kernel, "SOL_SOCKET", 77)
    with pytest.raises(OSError) as caught:
        await open_unix_connection(tmp_path / "s", credentials=True)
    assert caught.value.errno == errno.EOPNOTSUPP


################################################################
# A pidfd with one message
################################################################


@message_pidfds
async def test_pidfd_of_the_sender() -> None:
    """A message has a pidfd of its sender if the receive waited; the option is restored."""
    async with stdlib_peer() as peer:
        got: list[int] = []

        async def receive() -> None:
            with await peer.conn.receive_message(9, pidfd=True) as message:
                assert message.data == b"ab"
                assert message.pidfd is not None
                assert not os.get_inheritable(message.pidfd)
                got.append(pid_of(message.pidfd))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            assert peer.conn.getsockopt(socket.SOL_SOCKET, SO_PASSPIDFD) == 1
            await peer.ask("send", kinds=[], data="6162")
        # A socketpair of this process: only the message identifies the sender.
        assert got == [await peer.ask("pid")]
        assert peer.conn.get_peer_credentials().pid == os.getpid()
        assert peer.conn.getsockopt(socket.SOL_SOCKET, SO_PASSPIDFD) == 0


@message_pidfds
async def test_pidfd_of_what_was_sent_before() -> None:
    """What was sent before it was asked for has none, unless its sender attached credentials."""
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[["file"]], data="6162")
        await peer.ask("send", kinds=[], data="6364", credentials=True)
        with await peer.conn.receive_message(9, pidfd=True) as message:
            assert (message.data, len(message.fds), message.pidfd) == (b"ab", 1, None)
        with await peer.conn.receive_message(9, pidfd=True, credentials=True) as message:
            assert message.data == b"cd"
            assert message.pidfd is not None
            assert message.credentials is not None
            assert pid_of(message.pidfd) == message.credentials.pid == await peer.ask("pid")
        assert peer.conn.getsockopt(socket.SOL_SOCKET, SO_PASSPIDFD) == 0
        await peer.ask("eof")
        with await peer.conn.receive_message(9, pidfd=True) as message:
            assert message.data == b""


@message_pidfds
async def test_pidfd_for_a_refusing_connection() -> None:
    """A connection that takes no descriptors takes the pidfds that it has asked for."""
    async with refusing_peer() as (peer, conn):
        await peer.ask("send", kinds=[], data="6162", credentials=True)
        with await conn.receive_message(9, pidfd=True) as message:
            assert message.data == b"ab"
            assert message.pidfd is not None


@message_pidfds
async def test_pidfd_is_asked_for_until_a_cancellation() -> None:
    """A cancellation switches the option off again; so does closing."""
    one, two = connection_pair()
    shared = one.socket.dup()
    async with two:
        for stop in ("cancel", "close"):
            async with trio.open_nursery() as nursery:

                async def receive() -> None:
                    with pytest.raises((trio.ClosedResourceError, trio.Cancelled)):
                        await one.receive_message(9, pidfd=True, credentials=True)

                nursery.start_soon(receive)
                await trio.testing.wait_all_tasks_blocked()
                assert shared.getsockopt(socket.SOL_SOCKET, SO_PASSPIDFD) == 1
                if stop == "cancel":
                    nursery.cancel_scope.cancel()
                else:
                    await one.aclose()
            for option in (SO_PASSPIDFD, socket.SO_PASSCRED):
                assert shared.getsockopt(socket.SOL_SOCKET, option) == 0
        shared.close()


@message_pidfds
async def test_pidfd_without_a_free_descriptor() -> None:
    """Where no descriptor is free for the pidfd, the message comes without; all else is there."""
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[], data="6162", credentials=True)
        await peer.ask("send", kinds=[["file"]], data="6364", credentials=True)
        with (
            free_descriptors(0),
            await peer.conn.receive_message(2, pidfd=True, credentials=True) as message,
        ):
            assert message.data == b"ab"
            assert message.pidfd is None
            assert message.credentials is not None
        with free_descriptors(1), await peer.conn.receive_message(9, pidfd=True) as message:
            assert (message.data, len(message.fds), message.pidfd) == (b"cd", 1, None)


@pytest.mark.parametrize("number", [None, 12345])
async def test_pidfd_not_supported(monkeypatch: pytest.MonkeyPatch, number: int | None) -> None:
    """Where the kernel has none it is NotSupportedError, before anything is received."""
    monkeypatch.setattr(_kernel, "SO_PASSPIDFD", number)
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[["file"]])
        with pytest.raises(NotSupportedError, match="SO_PASSPIDFD"):
            await peer.conn.receive_message(9, pidfd=True, credentials=True)
        assert peer.conn.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 0
        os.close(await peer.conn.receive_fd())


async def test_pidfd_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another error of the option is that of a broken connection, as anywhere."""
    one, two = connection_pair()
    async with one, two:
        monkeypatch.setattr(_receiver, "_SOL_SOCKET", 77)
        with pytest.raises(trio.BrokenResourceError):
            await one.receive_message(9, pidfd=True)
