"""Situations that Go's and Rust's own tests of Unix sockets have, met with our methods.

Go: net/unixsock_test.go, unixsock_readmsg_test.go, unixsock_linux_test.go, syscall's
syscall_unix_test.go and creds_test.go. Rust: std/src/os/unix/net/tests.rs and ucred/tests.rs.
Their tests of datagrams have nothing that corresponds to them here.

| situation in Go's or Rust's tests | ours |
| --- | --- |
| a received descriptor is close-on-exec, even for a real child | below |
| a message without a buffer for bytes, with room for descriptors | below |
| descriptors without bytes are sent with a byte of the library's | test_send_message |
| a child makes a file, sends it, and ends; the parent reads it | below |
| several arrays of descriptors in one message, an empty one too | test_situations_cpython |
| sending after the own end of the stream | below, test_connection |
| reading after a shutdown for reading | test_situations_cpython |
| deadlines: that pass, that are taken back, that race with the peer | below, test_situations_glib |
| each end shuts down its own direction | test_send_eof_of_both_ends below |
| a listener on a duplicate leaves the path; the first one removes it | below |
| names of both ends; of a client with a name | below, test_client_and_listener |
| an address that is neither path nor unnamed | test_address |
| credentials: own, and of another user without privilege | test_message_values |
| credentials of a pair | test_peer_credentials_of_a_pair below |
| a connection that waits in the queue: timeouts, bytes, descriptors | below |
| two clients that are accepted in turn | below |
| a duplicate of a stream; peeking; no such abstract name | test_situations_cpython |
| a path that is too long | test_client_and_listener |
| an end of a pair is sent through that pair | below |
| too many descriptors for a message | test_send_message |
| abstract names with control characters in text | below |
| bytes from several buffers into several buffers | test_situations_cpython |
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_unixconn import (
    Cancellable,
    ConnectionBrokenError,
    ConnectionClosedError,
    OperationCancelled,
    UnixConnection,
    UnixListener,
    UnixSocketAddress,
    connection_pair,
    open_unix_connection,
    open_unix_listener,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path


@contextmanager
def numbered(count: int) -> Iterator[list[int]]:
    """Open that many memfds, whose sizes are 0, 1, 2 and so on."""
    fds = [os.memfd_create(f"numbered-{size}") for size in range(count)]
    try:
        for size, fd in enumerate(fds):
            os.ftruncate(fd, size)
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


################################################################
# Go
################################################################

INODES = """
import os
for fd in range(1000):
    try:
        print(os.fstat(fd).st_ino)
    except OSError:
        pass
"""


RECEIVES: dict[str, Callable[[UnixConnection], Awaitable[Any]]] = {
    "receive_fd": lambda conn: conn.receive_fd(),
    "receive_fds": lambda conn: conn.receive_fds(9),
    "receive_message": lambda conn: conn.receive_message(9),
    "receive_file": lambda conn: conn.receive_file("r+b"),
    "fds": lambda conn: anext(conn.fds()),
}


@pytest.mark.parametrize("receive", RECEIVES.values(), ids=RECEIVES)
async def test_received_descriptor_is_not_inherited(
    receive: Callable[[UnixConnection], Awaitable[Any]], tmp_path: Path
) -> None:
    """A child that inherits all it can has neither the received descriptor nor the connection."""
    one, two = connection_pair()
    with open(tmp_path / "file", "w+b") as file:
        inode = os.fstat(file.fileno()).st_ino
        async with one, two:
            sockets = {os.fstat(each.socket.fileno()).st_ino for each in (one, two)}
            await one.send_fd(file)
            received = await receive(two)
            child = await trio.run_process(
                [sys.executable, "-c", INODES],
                close_fds=False,
                capture_stdout=True,
                stdin=subprocess.DEVNULL,
            )
            assert not {inode, *sockets} & {int(each) for each in child.stdout.split()}
            os.close(received) if isinstance(received, int) else received.close()


@pytest.mark.parametrize("size", [0, -1])
async def test_receive_message_without_bytes_takes_no_descriptor(size: int) -> None:
    """Descriptors travel with a byte: to receive none is an error, and the message stays."""
    one, two = connection_pair()
    async with one, two:
        await one.send_fd(0)
        for _ in range(2):
            with pytest.raises(ValueError, match="max_bytes"):
                await two.receive_message(size)
        os.close(await two.receive_fd())


CHILD = """
import socket, sys, tempfile
with socket.socket(fileno=int(sys.argv[1])) as sock, tempfile.TemporaryFile() as file:
    file.write(b"Hello from the child")
    file.seek(0)
    socket.send_fds(sock, [b"x"], [file.fileno()])
"""


async def test_receive_file_from_a_child_that_has_ended() -> None:
    """A file that its process has deleted and left is read from where it stood."""
    ours, theirs = socket.socketpair()
    async with UnixConnection.from_stdlib_socket(ours) as conn:
        with theirs, trio.fail_after(30):
            await trio.run_process(
                [sys.executable, "-c", CHILD, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        with await conn.receive_file() as file:
            assert file.read() == b"Hello from the child"
        assert await conn.receive_some() == b""


@pytest.mark.parametrize(
    "send",
    [
        lambda conn: conn.send_message(b"x", fds=[0]),
        lambda conn: conn.send_fds([0] * 3, per_message=1),
        lambda conn: conn.send_buffer(b"x"),
    ],
    ids=["send_message", "send_fds", "send_buffer"],
)
async def test_sends_after_send_eof(send: Callable[[UnixConnection], Awaitable[object]]) -> None:
    """After send_eof() no send sends anything; the error says that this side ended the stream."""
    one, two = connection_pair()
    async with one, two:
        await one.send_eof()
        with pytest.raises(ConnectionClosedError):
            await send(one)
        assert await two.receive_some() == b""


async def test_aclose_of_a_listener_from_fd_leaves_the_path(unix_socket_path: Path) -> None:
    """A listener on a duplicate leaves path and queue alone; the first one takes the path away."""
    async with await open_unix_listener(unix_socket_path) as listener:
        async with UnixListener.from_fd(os.dup(listener.socket.fileno())) as twin:
            client = await open_unix_connection(unix_socket_path)
            async with client, await twin.accept() as server:
                await client.send_all(b"x")
                assert await server.receive_some() == b"x"
        assert unix_socket_path.exists()
        async with await open_unix_connection(unix_socket_path), await listener.accept():
            pass
        assert unix_socket_path.exists()
    assert not unix_socket_path.exists()


@pytest.mark.parametrize("client_name", [None, "client"])
async def test_names_of_both_ends(unix_socket_path: Path, client_name: str | None) -> None:
    """The kernel's names of all sockets are the path that was asked for, and the client's own."""
    path = str(unix_socket_path)
    own = "" if client_name is None else f"{path}.{client_name}"
    async with await open_unix_listener(path) as listener:
        sock = socket.socket(socket.AF_UNIX)
        if own:
            sock.bind(own)
        sock.connect(path)
        async with (
            UnixConnection.from_stdlib_socket(sock) as client,
            await listener.accept() as server,
        ):
            assert listener.socket.getsockname() == path
            assert server.socket.getsockname() == client.socket.getpeername() == path
            assert client.socket.getsockname() == server.socket.getpeername() == own
            assert client.get_remote_address() == listener.get_local_address()
            assert server.get_remote_address() == client.get_local_address()
            assert client.get_local_address().get_is_anonymous() == (not own)


async def test_send_eof_of_both_ends() -> None:
    """Each end ends its direction; then both have read to the end, and neither sends any more."""
    one, two = connection_pair()
    async with one, two:
        for here, there in ((one, two), (two, one)):
            await here.send_all(b"x")
            await here.send_eof()
            await here.send_eof()
            assert await there.receive_some() == b"x"
            assert await there.receive_some() == b""
        for each in (one, two):
            with pytest.raises(ConnectionClosedError):
                await each.send_fd(0)
            assert await each.receive_some() == b""


async def checkpoints(count: int) -> None:
    for _ in range(count):
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def ended_after(count: int) -> AsyncIterator[trio.CancelScope]:
    """Cancel the block after some checkpoints."""
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:

            async def end() -> None:
                await checkpoints(count)
                scope.cancel()

            nursery.start_soon(end)
            yield scope
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def cancelled_after(count: int, cancellable: Cancellable) -> AsyncIterator[None]:
    """Cancel a Cancellable in another thread after some checkpoints."""

    async def cancel() -> None:
        await checkpoints(count)
        await trio.to_thread.run_sync(cancellable.cancel)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel)
        yield


async def test_receive_fd_that_is_cancelled_while_a_thread_sends() -> None:
    """A thread sends while receive_fd is cancelled now and then: all arrive, in order, once."""
    count = 500
    ours, theirs = socket.socketpair()
    pauses, times = random.Random(1), random.Random(1)

    def send(fds: list[int]) -> None:
        with theirs:
            for number in range(count):
                socket.send_fds(theirs, [b"x"], [fds[number % 7]])
                if number % 3:
                    trio.from_thread.run(checkpoints, pauses.randrange(60))

    received: list[int] = []
    ended = 0
    with numbered(7) as fds:
        async with UnixConnection.from_stdlib_socket(ours) as conn, trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, send, fds)
            with trio.fail_after(60):
                while len(received) < count:
                    async with ended_after(times.randrange(20)) as scope:
                        fd = await conn.receive_fd()
                        received.append(os.fstat(fd).st_size)
                        os.close(fd)
                    ended += scope.cancelled_caught
    assert ended
    assert received == [number % 7 for number in range(count)]


@pytest.mark.parametrize("with_fd", [False, True])
async def test_send_message_that_is_cancelled_while_a_thread_receives(*, with_fd: bool) -> None:
    """Some calls of send_message are cancelled: the peer has exactly those that returned."""
    count = 2000
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 5000)
    pauses, times = random.Random(2), random.Random(2)
    received = bytearray()

    def receive() -> None:
        with theirs:
            while True:
                data, fds, _, _ = socket.recv_fds(theirs, 1, 8)
                if not data:
                    return
                received.extend(data)
                for fd in fds:
                    os.close(fd)
                trio.from_thread.run(checkpoints, pauses.randrange(20))

    sent = bytearray()
    ended = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, receive)
        async with UnixConnection.from_stdlib_socket(ours) as conn:
            with trio.fail_after(60):
                for number in range(count):
                    byte = bytes([number % 251])
                    async with ended_after(times.randrange(20)) as scope:
                        await conn.send_message(byte, fds=[0] * with_fd)
                        sent += byte
                    ended += scope.cancelled_caught
    assert ended
    assert received == sent


@pytest.mark.parametrize("per_message", [1, 3])
@pytest.mark.parametrize("by", ["scope", "Cancellable"])
async def test_send_fds_that_is_cancelled_while_a_thread_receives(
    by: str, per_message: int
) -> None:
    """Cancelled half way, send_fds says exactly how many the peer gets, in order."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 6000)
    times = random.Random(3)
    received: list[int] = []
    expected: list[int] = []

    def receive() -> None:
        with theirs:
            while True:
                data, fds, _, _ = socket.recv_fds(theirs, 1, 9)
                if not data:
                    return
                for fd in fds:
                    received.append(os.fstat(fd).st_size)
                    os.close(fd)

    with numbered(7) as fds:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, receive)
            async with UnixConnection.from_stdlib_socket(ours) as conn:
                with trio.fail_after(60):
                    for _ in range(200):
                        sizes = [times.randrange(7) for _ in range(times.randrange(1, 40))]
                        burst = [fds[size] for size in sizes]
                        sent = 0
                        if by == "scope":
                            async with ended_after(times.randrange(20)):
                                sent = await conn.send_fds(burst, per_message=per_message)
                        else:
                            cancellable = Cancellable()
                            async with cancelled_after(times.randrange(20), cancellable):
                                try:
                                    sent = await conn.send_fds(
                                        burst, per_message=per_message, cancellable=cancellable
                                    )
                                except OperationCancelled as exc:
                                    sent = exc.sent
                        expected += sizes[:sent]
    assert received == expected


async def receive_in_any_way(
    conn: UnixConnection, way: int, number: int, cancellable: Cancellable | None, sizes: list[int]
) -> None:
    """Receive at least one file, and at most ``number``, and append their sizes."""
    if way == 0:
        fd = await conn.receive_fd(cancellable)
        sizes.append(os.fstat(fd).st_size)
        os.close(fd)
    elif way == 1:
        with await conn.receive_fds(number, cancellable=cancellable) as fds:
            sizes += [os.fstat(fd).st_size for fd in fds]
    elif way == 2:
        async for fd in conn.fds(read_ahead=number):
            sizes.append(os.fstat(fd).st_size)
            os.close(fd)
            number -= 1
            if not number:
                break
    elif way == 3:
        with await conn.receive_file(cancellable=cancellable) as file:
            sizes.append(os.fstat(file.fileno()).st_size)
    else:
        with await conn.receive_message(
            1, max_fds=1, credentials=way == 4, cancellable=cancellable
        ) as message:
            sizes.append(os.fstat(message.fds[0]).st_size)


@pytest.mark.parametrize("seed", [1, 2])
async def test_receives_of_every_kind_that_are_cancelled_while_a_thread_sends(seed: int) -> None:
    """Whichever receive is next, and whenever the one before was cancelled: nothing is lost."""
    count = 500
    ours, theirs = socket.socketpair()
    times, pauses = random.Random(seed), random.Random(seed)
    received: list[int] = []

    def send(fds: list[int]) -> None:
        with theirs:
            for number in range(count):
                socket.send_fds(theirs, [b"x"], [fds[number % 7]])
                if pauses.random() < 0.5:
                    trio.from_thread.run(checkpoints, pauses.randrange(20))

    with numbered(7) as fds:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, send, fds)
            async with UnixConnection.from_stdlib_socket(ours) as conn:
                with trio.fail_after(60):
                    while len(received) < count:
                        cancellable = Cancellable() if times.random() < 0.3 else None
                        way, most = times.randrange(6), times.randrange(1, 30)
                        async with (
                            cancelled_after(times.randrange(20), cancellable or Cancellable()),
                            ended_after(times.randrange(20)),
                        ):
                            with suppress(OperationCancelled):
                                await receive_in_any_way(conn, way, most, cancellable, received)
    assert received == [number % 7 for number in range(count)]


################################################################
# Rust
################################################################


async def test_accept_of_clients_in_turn(unix_socket_path: Path) -> None:
    """Clients are accepted in the order in which they connected."""
    async with await open_unix_listener(unix_socket_path) as listener:
        for number in range(3):
            async with await open_unix_connection(unix_socket_path) as client:
                await client.send_all(b"%d" % number)
        for number in range(3):
            async with await listener.accept() as server:
                assert await server.receive_some() == b"%d" % number
                assert await server.receive_some() == b""


async def test_connection_that_waits_to_be_accepted(unix_socket_path: Path) -> None:
    """A client in the queue sends bytes and descriptors, and waits; all is there once accepted."""
    async with (
        await open_unix_listener(unix_socket_path) as listener,
        await open_unix_connection(unix_socket_path) as client,
    ):
        with trio.move_on_after(0.01) as scope:
            await client.receive_some()
        assert scope.cancelled_caught
        await client.send_fd(0)
        await client.send_message(b"x", fds=[0, 0])
        async with await listener.accept() as server:
            os.close(await server.receive_fd())
            with await server.receive_message(9) as message:
                assert (message.data, len(message.fds)) == (b"x", 2)
            await server.send_all(b"answer")
            assert await client.receive_some() == b"answer"
            with trio.move_on_after(0.01) as scope:
                await client.receive_some()
            assert scope.cancelled_caught


@pytest.mark.parametrize("waits", [True, False])
async def test_connection_that_is_never_accepted(unix_socket_path: Path, *, waits: bool) -> None:
    """When its listener closes, a client in the queue is reset, even while it waits."""

    async def receive() -> None:
        with pytest.raises(ConnectionBrokenError):
            await client.receive_fd()

    listener = await open_unix_listener(unix_socket_path)
    async with await open_unix_connection(unix_socket_path) as client:
        if waits:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await wait_all_tasks_blocked()
                await listener.aclose()
        else:
            await listener.aclose()
            with trio.fail_after(30):
                await receive()
        with pytest.raises(ConnectionBrokenError):
            await client.send_fd(0)


async def test_peer_credentials_of_a_pair() -> None:
    """Both ends of a pair name this process, its user and its group."""
    one, two = connection_pair()
    async with one, two:
        for each in (one, two):
            credentials = each.get_peer_credentials()
            assert credentials.get_unix_pid() == os.getpid()
            assert credentials.get_unix_user() == os.geteuid()
            assert credentials.gid == os.getegid()


async def test_send_message_with_the_senders_own_socket() -> None:
    """An end of a pair sent through that pair is another holder of the same end."""
    one, two = connection_pair()
    async with one, two:
        await one.send_message(b"\1" * 8, fds=[one.socket])
        with await two.receive_message(100) as message:
            assert message.data == b"\1" * 8
            twin = message.fds.take_stream(0)
        assert isinstance(twin, UnixConnection)
        async with twin:
            await one.aclose()
            await twin.send_all(b"still connected")
            assert await two.receive_some() == b"still connected"
        assert await two.receive_some() == b""


async def test_sockets_that_wait_in_each_other_are_closed() -> None:
    """Each end waits unread in the other's queue: closing both leaves none open, anywhere."""
    probe, cargo = socket.socketpair()
    with probe:
        one, two = connection_pair()
        async with one, two:
            with cargo:
                await one.send_fds([one.socket, two.socket, cargo], per_message=1)
            await two.send_fds([one.socket, two.socket])
        with trio.fail_after(30):
            # The kernel finds such circles when it collects them, which the next one makes it do.
            while True:
                with trio.move_on_after(0.05):
                    await trio.lowlevel.wait_readable(probe)
                    break
                three, four = connection_pair()
                async with three, four:
                    await three.send_fd(three.socket)
        assert probe.recv(1) == b""


NAMES = [
    b"\0hello world",
    b"\0" + bytes(range(1, 33)),
    b"\0" + bytes(range(127, 200)),
    b"\0" + bytes(range(200, 256)),
    b"\0a\0b\0\0",
    b"/tmp/line\nbreak\x1b[31m\r\x7f\xff",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
async def test_names_in_text_are_printable(name: bytes) -> None:
    """A peer's name is escaped wherever it is printed, and never more than one line."""
    address = UnixSocketAddress.from_any(name)
    for text in (str(address), repr(address)):
        assert text.isprintable()
        text.encode()
    assert UnixSocketAddress.from_any(name) == address


@pytest.mark.parametrize("name", [each for each in NAMES if each.startswith(b"\0")], ids=ascii)
async def test_repr_of_connections_is_printable(name: bytes) -> None:
    """Connections and listeners are printed with the names of their peers, escaped."""
    name += b"-%d" % os.getpid()
    async with (
        await open_unix_listener(name) as listener,
        await open_unix_connection(name) as client,
        await listener.accept() as server,
    ):
        for each in (listener, client, server):
            assert repr(each).isprintable()
