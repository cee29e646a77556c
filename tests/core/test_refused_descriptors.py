"""File descriptors that a peer chose are closed without blocking the event loop."""

from __future__ import annotations

import gc
import os
import socket
import struct
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests._helpers.fds import clog
from tests._helpers.processes import open_descriptors
from trio_unixconn import (
    ConnectionClosedError,
    PeerDeniedError,
    PeerPolicy,
    UnexpectedControlMessageError,
    UnixConnection,
    _closing,
    connection_pair,
    open_unix_connection,
    open_unix_listener,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from trio_unixconn import PeerIdentity

LINGER = struct.pack("ii", 1, 60)


@pytest.fixture
def lingering() -> Iterator[socket.socket]:
    """A TCP socket whose last close(2) blocks for a minute, unless its peer is closed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        held, _ = server.accept()
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            sock.send(b"x" * 65536)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
    yield sock
    held.close()
    sock.close()
    assert _closing.wait_closed(30)


async def send_nested(conn: UnixConnection, sock: socket.socket, depth: int) -> None:
    """Send a socket, in the queue of a Unix socket, in the queue of another one, and so on."""
    fd = os.dup(sock.fileno())
    for _ in range(depth):
        inner, outer = socket.socketpair()
        socket.send_fds(outer, [b"\0"], [fd])
        os.close(fd)
        fd = inner.detach()
        outer.close()
    await conn.send_fd(fd)
    os.close(fd)


CLOSES: dict[str, Callable[[UnixConnection], Awaitable[object]]] = {}


def closes(function: Callable[[UnixConnection], Awaitable[object]]) -> None:
    CLOSES[function.__name__] = function


@closes
async def aclose(conn: UnixConnection) -> None:
    """Close the connection with the message unread."""
    await conn.aclose()
    assert conn.is_closed()


@closes
async def aclose_after_fds(conn: UnixConnection) -> None:
    """Close the connection when it has read the message ahead."""
    async for fd in conn.fds():
        os.close(fd)
        break
    assert conn.has_read_ahead()
    await conn.aclose()


@closes
async def receive_some(conn: UnixConnection) -> None:
    """Refuse the message."""
    os.close(await conn.receive_fd())
    with pytest.raises(UnexpectedControlMessageError):
        await conn.receive_some()


@closes
async def receive_fds(conn: UnixConnection) -> None:
    """Refuse the message as one of a wrong number."""
    os.close(await conn.receive_fd())
    with pytest.raises(UnexpectedControlMessageError):
        await conn.receive_message(1, max_fds=0)


@closes
async def receive_file(conn: UnixConnection) -> None:
    """Refuse the file descriptor as one of a wrong kind."""
    os.close(await conn.receive_fd())
    with pytest.raises(ValueError, match="socket"):
        await conn.receive_file()


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("close", CLOSES.values(), ids=CLOSES)
async def test_close_of_a_lingering_socket_does_not_block_the_loop(
    lingering: socket.socket, close: Callable[[UnixConnection], Awaitable[object]], depth: int
) -> None:
    """The last close(2) of a lingering socket, however deep it is nested, is not in the loop."""
    one, two = connection_pair()
    async with one, two:
        await one.send_fd(0)
        await send_nested(one, lingering, depth)
        # The copy in the queue is the last one, and closing it takes a minute.
        lingering.close()
        with trio.fail_after(30):
            await close(two)
            await trio.lowlevel.checkpoint()


async def test_aclose_with_unread_descriptors_ends_waiting_tasks(lingering: socket.socket) -> None:
    """A task that waits to send gets ConnectionClosedError, even if the queue is not empty."""
    one, two = connection_pair()
    async with one, trio.open_nursery() as nursery:
        clog(two)

        async def send() -> None:
            with pytest.raises(ConnectionClosedError):
                await two.send_all(b"x")

        await one.send_fd(lingering)
        lingering.close()
        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        with trio.fail_after(30):
            await two.aclose()


async def test_dropped_connection_with_unread_descriptors(lingering: socket.socket) -> None:
    """A connection that is garbage collected does not block the loop, and warns."""
    one, two = connection_pair()
    async with one:
        await one.send_fd(lingering)
        lingering.close()
        number = two.socket.fileno()
        with trio.fail_after(30):
            with pytest.warns(ResourceWarning, match=rf"unclosed .*fd={number}"):
                del two
            await trio.lowlevel.checkpoint()


async def test_dropped_connection_in_a_cycle_with_unread_descriptors(
    lingering: socket.socket,
) -> None:
    """The cyclic garbage collector does not block the loop either, in any order of finalizers."""
    one, two = connection_pair()
    async with one:
        await one.send_fd(lingering)
        lingering.close()
        text = f"^unclosed socket, fd={two.socket.fileno()}$"
        cycle: list[object] = [two]
        cycle.append(cycle)
        with trio.fail_after(30):
            del two, cycle
            with pytest.warns(ResourceWarning, match=text):
                gc.collect()
            await trio.lowlevel.checkpoint()


async def test_two_dropped_connections_of_one_socket(lingering: socket.socket) -> None:
    """The socket is closed once, without blocking the loop, when the last of them is collected."""
    one, two = connection_pair()
    async with one:
        await one.send_fd(lingering)
        lingering.close()
        text = f"^unclosed socket, fd={two.socket.fileno()}$"
        other = UnixConnection(two.socket)
        with trio.fail_after(30):
            del two
            assert not other.is_closed()
            with pytest.warns(ResourceWarning, match=text) as warned:
                del other
            await trio.lowlevel.checkpoint()
        assert len(warned) == 1


def test_connection_that_is_open_at_the_end_of_the_interpreter() -> None:
    """Finalizers write no traceback when modules are torn down."""
    code = (
        "import trio, trio_unixconn\n"
        "async def main():\n"
        "    global pair\n"
        "    pair = trio_unixconn.connection_pair()\n"
        "    await pair[0].send_fd(0)\n"
        "trio.run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("", "")


async def test_dropped_connection_does_not_show_the_name_of_its_peer(tmp_path: Path) -> None:
    """The warning has no line break that a peer chose for its address."""
    async with await open_unix_listener(tmp_path / "socket") as listener:
        async with await open_unix_connection(
            tmp_path / "socket", local_address=tmp_path / "a\nb"
        ) as client:
            await client.send_all(b"x")
            accepted = await listener.accept()
            with pytest.warns(ResourceWarning, match="unclosed socket") as warned:
                del accepted
        assert all("\n" not in str(each.message) for each in warned)


async def test_dropped_connection_leaves_its_socket() -> None:
    """A caller that keeps the socket, and drops the connection, has an open socket."""
    one, two = connection_pair()
    async with one:
        await one.send_all(b"x")
        sock = two.socket
        del two
        gc.collect()
        assert await sock.recv(1) == b"x"
        await one.send_all(b"x")
        async with UnixConnection(sock) as again:
            assert await again.receive_some() == b"x"


async def test_open_unix_connection_that_fails_does_not_block(
    lingering: socket.socket, tmp_path: Path
) -> None:
    """A server that is denied, and has sent something, does not block the loop."""
    path = tmp_path / "s"
    async with await open_unix_listener(path) as listener, trio.open_nursery() as nursery:

        async def serve() -> None:
            async with await listener.accept() as conn:
                await conn.send_fd(lingering)
                lingering.close()
                sent.set()
                await done.wait()

        async def deny(_: PeerIdentity) -> bool:
            await sent.wait()
            return False

        sent, done = trio.Event(), trio.Event()
        nursery.start_soon(serve)
        with trio.fail_after(30):
            with pytest.raises(PeerDeniedError):
                await open_unix_connection(path, policy=PeerPolicy(check=deny))
            await trio.lowlevel.checkpoint()
        done.set()


@pytest.mark.parametrize("refuse", ["receive_some", "receive_message", "receive_file"])
async def test_refusal_does_not_change_the_senders_socket(refuse: str) -> None:
    """SO_LINGER and the other options belong to the open socket, which the sender shares."""
    one, two = connection_pair()
    sock, other = socket.socketpair()
    async with one, two:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 7))
        await one.send_fd(sock)
        with pytest.raises(ValueError, match=r"expected"):
            if refuse == "receive_message":
                await two.receive_message(1, max_fds=0)
            else:
                await getattr(two, refuse)()
        assert _closing.wait_closed(30)
        now = sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
        assert struct.unpack("ii", now) == (1, 7)
        assert sock.getblocking()
    sock.close()
    other.close()


async def test_many_refusals_use_few_threads() -> None:
    """200 refused messages are closed by a bounded number of threads, while other tasks run."""
    one, two = connection_pair()
    before = threading.active_count()
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with one, two, trio.open_nursery() as nursery:
        nursery.start_soon(count)
        with open(__file__, "rb") as file:
            for _ in range(200):
                await one.send_message(b"x", fds=[file] * 3)
                with pytest.raises(UnexpectedControlMessageError):
                    await two.receive_fd()
                assert threading.active_count() <= before + _closing.MAX_THREADS
        nursery.cancel_scope.cancel()
    assert turns >= 200
    assert _closing.wait_closed(30)


async def test_refusal_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can start, the refusal is the same, and nothing leaks."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_closing, "_closer", _closing._Closer())
    monkeypatch.setattr(threading.Thread, "start", start)
    one, two = connection_pair()
    async with one, two:
        before = open_descriptors(os.getpid())
        await one.send_message(b"x", fds=[0, 0])
        with pytest.raises(UnexpectedControlMessageError):
            await two.receive_fd()
        assert open_descriptors(os.getpid()) == before
