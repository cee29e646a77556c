"""Situations that CPython's own tests of sockets have, met with our methods.

CPython's Lib/test/test_socket.py calls sendmsg and recvmsg; a connection calls them for its user.
What it tries with SCM_RIGHTS is tried here with a plain socket of the standard library at one
end. Those that other tests have already are only listed.

| situation in CPython's tests | ours |
| --- | --- |
| one file descriptor, several in one array | test_send_fd, test_send_message, and below |
| two arrays, in separate control messages; with little room | test_receive_fds_of_... below |
| an empty array; an array cut within an int | test_receive_..._of_odd_arrays below |
| too little room for control messages, at every boundary | test_send_..._to_a_peer_with_... |
| a full descriptor table, which truncates at every boundary | test_receive_..._with_few_free... |
| send_fds and recv_fds with more room than was sent | test_..._stdlib_... below |
| data from a generator, from several buffers, from an array | below, test_send_message |
| control messages from a generator | test_send_message_takes_a_generator_of_fds below |
| bad arguments, bad items, one bad item among good ones | test_send_message, below |
| more items than the system can send | test_send_message |
| sending and receiving after close | test_connection |
| a timeout while sending or receiving | test_cancellation |
| shorter and longer than the buffer; peeking; end of stream | below, test_send_message |
| recv_into: arrays, parts of buffers, buffers that are empty or read-only | test_receive_into |
| recv without room for control messages, of a message with some | test_..._another_reader... |
| shutdown in either direction, with data on its way | test_..._after_shutdown below |
| fromfd, dup, detach | below, test_detach |
| backlogs: 0, negative, beyond an int | test_open_unix_listener_..._backlog below |
| a signal while waiting | test_..._goes_on_waiting_after_a_signal below |
| abstract names: NULs, any byte, longest, too long, chosen by the kernel | below |
| paths as str, bytes, not UTF-8 | below, test_client_and_listener |
| multiprocessing's send_handle, large numbers; asyncio's Unix sockets | below |
| a send to a closed peer, without SIGPIPE | test_sends_raise_no_sigpipe below |
"""

from __future__ import annotations

import array
import asyncio
import errno
import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests._helpers.environment import environment
from trio_unixconn import (
    ConnectionBrokenError,
    DescriptorsTruncatedError,
    EndOfStreamError,
    UnexpectedControlMessageError,
    UnexpectedDescriptorsError,
    UnixConnection,
    UnixSocketAddress,
    connection_pair,
    open_unix_connection,
    open_unix_listener,
)
from trio_unixconn.testing import clog, limit_descriptors, unclog

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

INT = array.array("i").itemsize
RIGHTS = (socket.SOL_SOCKET, socket.SCM_RIGHTS)


@contextmanager
def connection_and_socket() -> Iterator[tuple[UnixConnection, socket.socket]]:
    """Make a connection, and a blocking socket of the standard library at its other end."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(30)
    with theirs:
        yield UnixConnection.from_stdlib_socket(ours), theirs


@contextmanager
def numbered(count: int) -> Iterator[list[int]]:
    """Open that many memfds, each with its position in the list written into it."""
    fds = [os.memfd_create(f"numbered-{number}") for number in range(count)]
    try:
        for number, fd in enumerate(fds):
            os.write(fd, str(number).encode())
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def positions(fds: Any) -> list[int]:
    """Read what numbered() wrote."""
    return [int(os.pread(fd, 10, 0)) for fd in fds]


def packed(*fds: int) -> bytes:
    return struct.pack(f"{len(fds)}i", *fds)


def received_by(sock: socket.socket, size: int, room: int) -> tuple[bytes, list[int], int]:
    """Call recvmsg with a buffer of this size, and return data, whole descriptors and flags."""
    data, ancdata, flags, _ = sock.recvmsg(size, room)
    fds: list[int] = []
    for level, kind, payload in ancdata:
        assert (level, kind) == RIGHTS
        fds += array.array("i", payload[: len(payload) - len(payload) % INT])
    return data, fds, flags


################################################################
# SCM_RIGHTS
################################################################


@pytest.mark.parametrize("count", [1, 2, 4, 10, 253])
async def test_send_message_and_receive_message_with_stdlib_fds_functions(count: int) -> None:
    """socket.send_fds and recv_fds understand us, and we them, with larger buffers than needed."""
    with connection_and_socket() as (conn, sock), numbered(count) as fds:
        async with conn:
            socket.send_fds(sock, [b"mes", b"sage"], fds)
            with await conn.receive_message(100, max_fds=min(2 * count, 253)) as message:
                assert message.data == b"message"
                assert positions(message.fds) == list(range(count))
                assert not set(message.fds) & set(fds)
            await conn.send_message(b"message", fds=fds)
            data, theirs, flags, _ = socket.recv_fds(sock, 100, 2 * count)
            assert (data, positions(theirs)) == (b"message", list(range(count)))
            assert not flags & socket.MSG_CTRUNC
            for fd in theirs:
                os.close(fd)


async def test_receive_fds_of_pipes_that_are_still_connected() -> None:
    """Data written into the write ends here is read from the received read ends, in order."""
    with connection_and_socket() as (conn, sock):
        pipes = [os.pipe() for _ in range(10)]
        socket.send_fds(sock, [b"\0"], [read for read, _ in pipes])
        async with conn:
            with await conn.receive_fds(20) as fds:
                for number, (read, write) in enumerate(pipes):
                    os.close(read)
                    os.write(write, b"%d" % number)
                    os.close(write)
                assert [os.read(fd, 9) for fd in fds] == [b"%d" % n for n in range(10)]
                assert [os.read(fd, 9) for fd in fds] == [b""] * 10


@pytest.mark.parametrize("counts", [(1, 1), (2, 3), (1, 0, 1), (0, 1), (2, 3, 0, 1), (126, 127)])
@pytest.mark.parametrize("receive", ["receive_fds", "receive_message"])
async def test_receive_of_separate_arrays(receive: str, counts: tuple[int, ...]) -> None:
    """Arrays of several control messages, empty ones among them, are one list, in order."""
    total = sum(counts)
    with connection_and_socket() as (conn, sock), numbered(total) as fds:
        rest = iter(fds)
        arrays = [packed(*(next(rest) for _ in range(count))) for count in counts]
        sock.sendmsg([b"x"], [(*RIGHTS, each) for each in arrays])
        async with conn:
            if receive == "receive_fds":
                with await conn.receive_fds(total) as received:
                    assert positions(received) == list(range(total))
            else:
                with await conn.receive_message(9, max_fds=total) as message:
                    assert positions(message.fds) == list(range(total))


@pytest.mark.parametrize("counts", [(1, 1), (2, 3), (0, 2)])
async def test_receive_fds_of_separate_arrays_without_room(counts: tuple[int, ...]) -> None:
    """One file descriptor more than max_fds in several arrays: all are closed, the rest arrives."""
    total = sum(counts)
    with connection_and_socket() as (conn, sock), numbered(total) as fds:
        rest = iter(fds)
        arrays = [packed(*(next(rest) for _ in range(count))) for count in counts]
        sock.sendmsg([b"x"], [(*RIGHTS, each) for each in arrays])
        socket.send_fds(sock, [b"y"], fds[-1:])
        async with conn:
            with pytest.raises(UnexpectedControlMessageError) as caught:
                await conn.receive_fds(total - 1)
            assert caught.value.data == b"x"
            with await conn.receive_fds(total - 1) as received:
                assert positions(received) == [total - 1]


# Payloads of control messages: how many whole file descriptors, and how many bytes of another.
ODD_ARRAYS = [
    [(0, 0)],
    [(0, 1)],
    [(0, INT - 1)],
    [(1, 1)],
    [(1, INT - 1)],
    [(1, INT - 1), (1, 0)],
    [(0, INT - 1), (2, 1)],
]


@pytest.mark.parametrize("arrays", ODD_ARRAYS, ids=str)
async def test_receive_message_of_odd_arrays(arrays: list[tuple[int, int]]) -> None:
    """Of an array that is empty, or cut within an int, the whole file descriptors arrive."""
    total = sum(whole for whole, _ in arrays)
    with connection_and_socket() as (conn, sock), numbered(total) as fds:
        rest = iter(fds)
        payloads = [
            packed(*(next(rest) for _ in range(whole))) + b"\x7f" * more for whole, more in arrays
        ]
        sock.sendmsg([b"x"], [(*RIGHTS, each) for each in payloads])
        async with conn:
            with await conn.receive_message(9) as message:
                assert (message.data, positions(message.fds)) == (b"x", list(range(total)))


@pytest.mark.parametrize("payload", [b"", b"\x7f", b"\x7f" * (INT - 1)], ids=["0", "1", "3"])
async def test_receive_fd_of_an_array_without_a_whole_descriptor(payload: bytes) -> None:
    """A message whose array is empty, or too short, has no file descriptor: an error with .data."""
    with connection_and_socket() as (conn, sock):
        sock.sendmsg([b"x"], [(*RIGHTS, payload)])
        sock.sendmsg([b"y"], [(*RIGHTS, payload)])
        async with conn:
            with pytest.raises(UnexpectedControlMessageError) as caught:
                await conn.receive_fd()
            assert caught.value.data == b"x"
            assert await conn.receive_some() == b"y"


HEADER = socket.CMSG_LEN(0)


@pytest.mark.parametrize(
    ("room", "arrive"),
    [
        (0, 0),
        (1, 0),
        (2 * INT, 0),
        (HEADER - 1, 0),
        (HEADER, 0),
        (HEADER + 1, 0),
        (HEADER + INT - 1, 0),
        (HEADER + INT, 1),
        (HEADER + 2 * INT - 1, 1),
        (HEADER + 2 * INT, 2),
        (HEADER + 4 * INT - 1, 3),
    ],
)
async def test_send_message_to_a_peer_with_little_room(room: int, arrive: int) -> None:
    """A peer whose recvmsg truncates gets fewer, knows it, and is in step for what follows."""
    with connection_and_socket() as (conn, sock), numbered(4) as fds:
        async with conn:
            await conn.send_message(b"first", fds=fds)
            await conn.send_fd(fds[3])
            data, theirs, flags = received_by(sock, 100, room)
            assert (data, positions(theirs)) == (b"first", list(range(arrive)))
            assert flags & socket.MSG_CTRUNC
            for fd in theirs:
                os.close(fd)
            data, theirs, flags = received_by(sock, 100, socket.CMSG_SPACE(INT))
            assert (data, positions(theirs), flags & socket.MSG_CTRUNC) == (b"\0", [3], 0)
            os.close(theirs[0])


@pytest.mark.parametrize("free", [0, 1, 2, 3])
@pytest.mark.parametrize("headers", [1, 4])
async def test_receive_fds_with_few_free_descriptors(headers: int, free: int) -> None:
    """A message that a full table truncates is an error; nothing leaks, the next arrives."""
    with connection_and_socket() as (conn, sock), numbered(4) as fds:
        arrays = [packed(*fds)] if headers == 1 else [packed(fd) for fd in fds]
        sock.sendmsg([b"x"], [(*RIGHTS, each) for each in arrays])
        sock.sendmsg([b"y"], [(*RIGHTS, packed(fds[0]))])
        async with conn:
            with (
                limit_descriptors(free),
                pytest.raises(DescriptorsTruncatedError) as caught,
            ):
                await conn.receive_fds(4)
            assert (caught.value.arrived, caught.value.data) == (free, b"x")
            with await conn.receive_fds(4) as received:
                assert positions(received) == [0]


async def test_receive_fds_with_just_enough_free_descriptors() -> None:
    """With exactly as many free as were sent, all arrive."""
    with connection_and_socket() as (conn, sock), numbered(4) as fds:
        sock.sendmsg([b"x"], [(*RIGHTS, packed(*fds))])
        async with conn:
            with limit_descriptors(4), await conn.receive_fds(4) as received:
                assert positions(received) == [0, 1, 2, 3]


async def test_receive_fd_after_another_reader_took_the_byte() -> None:
    """A plain recv by another holder closes the descriptor; receive_fd gets the next one."""
    with connection_and_socket() as (conn, sock), numbered(2) as fds:
        async with conn:
            for fd in fds:
                socket.send_fds(sock, [b"x"], [fd])
            assert await conn.socket.recv(1) == b"x"
            fd = await conn.receive_fd()
            assert positions([fd]) == [1]
            os.close(fd)


async def test_receive_fd_after_another_reader_peeked() -> None:
    """A peek by another holder gets duplicates, and takes nothing from receive_fd."""
    with connection_and_socket() as (conn, sock), numbered(1) as fds:
        async with conn:
            socket.send_fds(sock, [b"xy"], fds)
            for _ in range(2):
                with socket.socket(fileno=os.dup(conn.socket.fileno())) as other:
                    data, ancdata, _, _ = other.recvmsg(
                        2, socket.CMSG_SPACE(INT), socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC
                    )
                assert data == b"xy"
                (peeked,) = array.array("i", ancdata[0][2])
                os.close(peeked)
            fd = await conn.receive_fd()
            assert positions([fd]) == [0]
            os.close(fd)
            assert await conn.receive_some() == b"y"


@pytest.mark.parametrize("size", [1, 3, 5, 6, 100])
async def test_receive_message_shorter_than_what_was_sent(size: int) -> None:
    """File descriptors come with the first part of their message, however short; then the rest."""
    with connection_and_socket() as (conn, sock), numbered(2) as fds:
        socket.send_fds(sock, [b"hello"], fds)
        sock.close()
        data = b""
        async with conn:
            with await conn.receive_message(size) as first:
                assert positions(first.fds) == [0, 1]
                data += first.data
            while True:
                with await conn.receive_message(size) as more:
                    assert list(more.fds) == []
                    if not more.data:
                        break
                    data += more.data
        assert data == b"hello"


async def test_receive_some_of_a_part_of_a_message() -> None:
    """Where only plain bytes are expected, the error has the part; the next read has the rest."""
    with connection_and_socket() as (conn, sock), numbered(2) as fds:
        socket.send_fds(sock, [b"hello"], fds)
        async with conn:
            with pytest.raises(UnexpectedDescriptorsError) as caught:
                await conn.receive_some(2)
            assert caught.value.data == b"he"
            assert await conn.receive_some(100) == b"llo"


################################################################
# Arguments
################################################################


async def test_send_message_takes_a_generator_of_fds() -> None:
    """fds= may be a generator, an array of ints, an iterator, or empty."""
    with connection_and_socket() as (conn, sock), numbered(3) as fds:
        async with conn:
            for each in (
                (fd for fd in fds),
                array.array("i", fds),
                iter(fds),
                set(fds),
                tuple(fds),
            ):
                await conn.send_message(b"x", fds=each)
                data, theirs, _, _ = socket.recv_fds(sock, 9, 9)
                assert (data, sorted(positions(theirs))) == (b"x", [0, 1, 2])
                for fd in theirs:
                    os.close(fd)
            nothing: list[Any] = [(fd for fd in fds[:0]), array.array("i"), iter(()), set(), ()]
            for each in nothing:
                await conn.send_message(b"x", fds=each)
                assert sock.recvmsg(9, 999)[:2] == (b"x", [])


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (iter([b"ab", b"c"]), {}),
        ([b"ab", b"c"], {}),
        (object(), {}),
        (None, {}),
        ([], {}),
        (b"abc", {"fds": object()}),
        (b"abc", {"fds": None}),
        (b"abc", {"fds": [object()]}),
        (b"abc", {"fds": [0, object()]}),
        (b"abc", {"fds": [0.0]}),
        (b"abc", {"fds": "0"}),
        (b"abc", {"fds": [(*RIGHTS, b"\0\0\0\0")]}),
        (b"abc", {"cancellable": 5}),
        (b"abc", {"cancellable": object()}),
        (b"abc", {"credentials": object()}),
        (b"abc", {"credentials": (1, 2, 3)}),
    ],
)
async def test_send_message_rejects_other_types(data: Any, options: Any) -> None:
    """Several buffers, objects, triples and bad items are a TypeError, and nothing is sent."""
    with connection_and_socket() as (conn, sock):
        async with conn:
            with pytest.raises(TypeError):
                await conn.send_message(data, **options)
            await conn.send_all(b"next")
            assert sock.recv(100) == b"next"


@pytest.mark.parametrize("arguments", [(), (object(),), (None,), ("1",), (1.5,), ([1],)])
@pytest.mark.parametrize("receive", ["receive_message", "receive_fds", "receive_buffer"])
async def test_receive_rejects_other_types_of_size(
    receive: str, arguments: tuple[Any, ...]
) -> None:
    """A size that is missing or no int is a TypeError; the file descriptor is still there."""
    with connection_and_socket() as (conn, sock), numbered(1) as fds:
        socket.send_fds(sock, [b"x"], fds)
        async with conn:
            with pytest.raises(TypeError):
                await getattr(conn, receive)(*arguments)
            fd = await conn.receive_fd()
            assert positions([fd]) == [0]
            os.close(fd)


async def test_receive_message_of_more_bytes_than_there_can_be() -> None:
    """A size beyond what the system can count is an error, and the message is still there."""
    with connection_and_socket() as (conn, sock), numbered(1) as fds:
        socket.send_fds(sock, [b"x"], fds)
        async with conn:
            for receive in (conn.receive_message, conn.receive_some):
                with pytest.raises((OverflowError, ValueError, MemoryError)):
                    await receive(2**70)
            with await conn.receive_fds(2**70) as received:
                assert positions(received) == [0]


@pytest.mark.parametrize("backlog", [-1, 2**31, 2**63, 2**70, 1.5, "1", True])
async def test_open_unix_listener_rejects_backlog(tmp_path: Path, backlog: Any) -> None:
    """A backlog that listen(2) cannot take is an error, and nothing remains."""
    for name in (tmp_path / "s", f"\0trio-unixconn-backlog-{os.getpid()}"):
        with pytest.raises((OverflowError, ValueError, TypeError)):
            await open_unix_listener(name, backlog=backlog)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("backlog", [0, 1, 2**31 - 1, None])
async def test_open_unix_listener_takes_backlog(tmp_path: Path, backlog: Any) -> None:
    """Any backlog that listen(2) takes is taken, 0 too; a client can connect."""
    async with (
        await open_unix_listener(tmp_path / "s", backlog=backlog) as listener,
        await open_unix_connection(tmp_path / "s") as client,
        await listener.accept() as conn,
    ):
        await client.send_all(b"x")
        assert await conn.receive_some(2) == b"x"


################################################################
# recv_into
################################################################


async def test_receive_into_of_a_part_of_a_message() -> None:
    """Descriptors are refused and closed; the error has the bytes, and the next read works."""
    with connection_and_socket() as (conn, sock), numbered(1) as fds:
        socket.send_fds(sock, [b"hello"], fds)
        async with conn:
            buffer = bytearray(3)
            with pytest.raises(UnexpectedDescriptorsError) as caught:
                await conn.receive_into(buffer)
            assert caught.value.data == b"hel"
            assert await conn.receive_into(buffer) == 2
            assert buffer[:2] == b"lo"


async def test_receive_into_frees_the_buffer() -> None:
    """A wait that is cancelled has written nothing, and frees the buffer; the end is 0 bytes."""
    with connection_and_socket() as (conn, sock):
        async with conn:
            buffer = bytearray(b"before")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(conn.receive_into, buffer)
                await wait_all_tasks_blocked()
                with pytest.raises(BufferError):
                    buffer.append(0)
                nursery.cancel_scope.cancel()
            buffer.append(0)
            sock.sendall(b"x")
            sock.shutdown(socket.SHUT_WR)
            assert buffer == b"before\0"
            assert await conn.receive_into(buffer) == 1
            assert await conn.receive_into(buffer) == 0
            assert buffer == b"xefore\0"


################################################################
# Shutdown, duplicates, signals
################################################################


@pytest.mark.parametrize("how", [socket.SHUT_WR, socket.SHUT_RDWR])
async def test_receive_fd_after_shutdown_of_the_peer(how: int) -> None:
    """Bytes and descriptors sent before a shutdown arrive; then the stream has ended."""
    with connection_and_socket() as (conn, sock), numbered(1) as fds:
        socket.send_fds(sock, [b"x"], fds)
        sock.sendall(b"rest")
        sock.shutdown(how)
        async with conn:
            fd = await conn.receive_fd()
            assert positions([fd]) == [0]
            os.close(fd)
            assert await conn.receive_some() == b"rest"
            for _ in range(2):
                assert await conn.receive_some() == b""
                with pytest.raises(EndOfStreamError):
                    await conn.receive_fd()


SENDS: dict[str, Callable[[UnixConnection], Awaitable[object]]] = {
    "send_all": lambda conn: conn.send_all(b"x"),
    "send_fd": lambda conn: conn.send_fd(0),
    "send_fds": lambda conn: conn.send_fds([0, 0], per_message=1),
    "send_message": lambda conn: conn.send_message(b"x", fds=[0]),
    "send_credentials": lambda conn: conn.send_credentials(),
    "send_buffer": lambda conn: conn.send_buffer(b"x"),
}


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_RDWR])
@pytest.mark.parametrize("send", SENDS.values(), ids=SENDS)
async def test_sends_after_shutdown_of_the_peer(
    send: Callable[[UnixConnection], Awaitable[object]], how: int
) -> None:
    """When the peer does not read any more, every send is ConnectionBrokenError with EPIPE."""
    with connection_and_socket() as (conn, sock):
        sock.shutdown(how)
        async with conn:
            with pytest.raises(ConnectionBrokenError) as caught:
                await send(conn)
            assert isinstance(caught.value.__cause__, OSError)
            assert caught.value.__cause__.errno == errno.EPIPE
            if how == socket.SHUT_RD:
                sock.sendall(b"still")
                assert await conn.receive_some() == b"still"


async def test_receive_fd_after_shutdown_of_this_side() -> None:
    """A shutdown for reading by another holder ends the stream, even during a wait."""
    with connection_and_socket() as (conn, _):
        async with conn:
            async with trio.open_nursery() as nursery:

                async def receive() -> None:
                    with pytest.raises(EndOfStreamError):
                        await conn.receive_fd()

                nursery.start_soon(receive)
                await wait_all_tasks_blocked()
                conn.socket.shutdown(socket.SHUT_RD)
            assert await conn.receive_some() == b""
            await conn.send_all(b"x")


async def test_shutdown_of_the_peer_while_send_waits() -> None:
    """A send that waits for space ends when the peer shuts both directions down.

    If it shuts down reading only, Linux reports no event to a socket that polls for room.
    """
    with connection_and_socket() as (conn, sock):
        async with conn, trio.open_nursery() as nursery:

            async def send() -> None:
                with pytest.raises(ConnectionBrokenError):
                    await conn.send_all(bytes(10_000_000))

            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            sock.shutdown(socket.SHUT_RDWR)


async def test_from_fd_of_duplicates() -> None:
    """Two connections on duplicates of one socket share the stream; each is closed by itself."""
    with connection_and_socket() as (conn, sock), numbered(3) as fds:
        twin = UnixConnection.from_fd(os.dup(conn.socket.fileno()))
        for fd in fds:
            socket.send_fds(sock, [b"x"], [fd])
        async with twin:
            async with conn:
                for number, each in enumerate((conn, twin)):
                    fd = await each.receive_fd()
                    assert positions([fd]) == [number]
                    os.close(fd)
            fd = await twin.receive_fd()
            assert positions([fd]) == [2]
            os.close(fd)
            await twin.send_all(b"alive")
            assert sock.recv(9) == b"alive"
        assert sock.recv(9) == b""


@pytest.mark.parametrize("direction", ["receive_fd", "send_fd"])
async def test_wait_goes_on_after_a_signal(direction: str) -> None:
    """A signal that a Python handler handles while a task waits does not end the wait."""
    handled: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: handled.append(number))
    try:
        one, two = connection_pair()
        count = 0
        async with one, two, trio.open_nursery() as nursery:
            if direction == "send_fd":
                count = clog(one)

            async def operate() -> None:
                if direction == "send_fd":
                    await one.send_fd(0)
                else:
                    os.close(await one.receive_fd())

            nursery.start_soon(operate)
            for number in range(1, 4):
                await wait_all_tasks_blocked()
                os.kill(os.getpid(), signal.SIGUSR1)
                while len(handled) < number:
                    await trio.lowlevel.checkpoint()
            await wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 1
            if direction == "send_fd":
                await unclog(two, count)
                os.close(await two.receive_fd())
            else:
                await two.send_fd(0)
    finally:
        signal.signal(signal.SIGUSR1, before)


################################################################
# Names
################################################################


NAMES = [
    b"\0trio-unixconn-\0\xff-%d" % os.getpid(),
    b"\0trio-unixconn\0%d\0" % os.getpid(),
    b"\0%d-" % os.getpid() + b"h" * (106 - len(str(os.getpid()))),
]


@pytest.mark.parametrize("name", NAMES, ids=["any byte", "last NUL", "longest"])
async def test_open_unix_listener_at_abstract_names(name: bytes) -> None:
    """Any bytes are an abstract name, up to 107 of them, and both ends know them as they are."""
    assert len(name) <= 108
    async with (
        await open_unix_listener(name) as listener,
        await open_unix_connection(name) as client,
        await listener.accept() as server,
    ):
        assert listener.socket.getsockname() == client.socket.getpeername() == name
        for address in (
            listener.get_local_address(),
            client.get_remote_address(),
            server.get_local_address(),
        ):
            assert address == UnixSocketAddress.from_any(name)
            assert address.get_is_abstract()
        assert client.get_local_address() == server.get_remote_address()
        assert client.get_local_address().get_is_anonymous()


@pytest.mark.parametrize("empty", ["", b""])
async def test_open_unix_listener_with_empty_name(empty: Any) -> None:
    """The kernel chooses another abstract name for each listener that has an empty one."""
    names: set[bytes] = set()
    async with await open_unix_listener(empty) as one, await open_unix_listener(empty) as two:
        for listener in (one, two):
            chosen = listener.socket.getsockname()
            assert re.fullmatch(rb"\0[0-9a-f]{5}", chosen)
            assert listener.get_local_address() == UnixSocketAddress.from_any(chosen)
            names.add(chosen)
            async with await open_unix_connection(chosen), await listener.accept() as server:
                assert server.get_local_address() == listener.get_local_address()
    assert len(names) == 2
    for name in names:
        with pytest.raises(ConnectionRefusedError):
            await open_unix_connection(name)


@pytest.mark.parametrize("function", [open_unix_listener, open_unix_connection])
async def test_abstract_name_that_is_too_long(function: Any) -> None:
    """An abstract name of 108 bytes does not fit, and nothing remains."""
    with pytest.raises((OSError, ValueError)):
        await function("\0" + "h" * 108)


@pytest.mark.parametrize("function", [open_unix_listener, open_unix_connection])
@pytest.mark.parametrize("name", [bytearray(b"\0name"), memoryview(b"\0name"), 4, 4.5, None])
async def test_name_of_another_type(function: Any, name: Any) -> None:
    """A name that is neither str, bytes, a path nor an address is a TypeError."""
    with pytest.raises(TypeError):
        await function(name)


@pytest.mark.parametrize(
    "name", ["söckét", b"not-\xff-utf-8", "line\nbreak", "a b", "~", "\x1b[31m"]
)
@pytest.mark.parametrize("form", [os.fsdecode, os.fsencode])
async def test_open_unix_listener_at_unusual_paths(tmp_path: Path, name: Any, form: Any) -> None:
    """A path may have any bytes but NUL, given as bytes, or as str with surrogates."""
    path = form(os.path.join(os.fsencode(tmp_path), os.fsencode(name)))
    async with (
        await open_unix_listener(path) as listener,
        await open_unix_connection(path) as client,
        await listener.accept() as server,
    ):
        assert os.fsencode(client.socket.getpeername()).startswith(os.fsencode(tmp_path))
        assert os.fsencode(name) in os.listdir(os.fsencode(tmp_path))
        assert server.get_local_address() == UnixSocketAddress.from_any(path)
        await client.send_fd(0)
        os.close(await server.receive_fd())
    assert os.listdir(tmp_path) == []


################################################################
# Other modules of the standard library as peers
################################################################

HANDLES = """
import os, sys, tempfile
from multiprocessing import connection, reduction
conn = connection.Connection(int(sys.argv[1]))
fd = reduction.recv_handle(conn)
os.write(fd, b"foo")
os.close(fd)
with tempfile.TemporaryFile() as file:
    file.write(b"bar")
    file.seek(0)
    reduction.send_handle(conn, file.fileno(), os.getppid())
reduction.sendfds(connection.socket.socket(fileno=os.dup(conn.fileno())), [0, 1])
conn.send_bytes(b"end")
"""


async def test_sends_and_receives_with_multiprocessing_reduction(tmp_path: Path) -> None:
    """recv_handle and send_handle of another process pass open files, under large numbers too."""
    ours, theirs = socket.socketpair()
    async with UnixConnection.from_stdlib_socket(ours) as conn, trio.open_nursery() as nursery:
        child = await nursery.start(
            partial(
                trio.run_process,
                [sys.executable, "-c", HANDLES, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        )
        theirs.close()
        with open(tmp_path / "file", "wb") as file:
            large = fcntl.fcntl(file.fileno(), fcntl.F_DUPFD_CLOEXEC, 300)
        # Its protocol: the byte is the number of file descriptors.
        await conn.send_message(b"\1", fds=[large])
        os.close(large)
        # Since Python 3.14, a receiver acknowledges.
        acknowledgement = b"A" if sys.version_info >= (3, 14) else b""
        with trio.fail_after(30):
            if acknowledgement:
                assert await conn.receive_some(1) == acknowledgement
            with await conn.receive_file() as received:
                assert received.read() == b"bar"
            await conn.send_all(acknowledgement)
            with await conn.receive_message(1) as message:
                assert (message.data, len(message.fds)) == (b"\2", 2)
            await conn.send_all(acknowledgement)
            data = b"".join([chunk async for chunk in conn])
            assert data == struct.pack("!i", 3) + b"end"
            assert await child.wait() == 0
    assert (tmp_path / "file").read_bytes() == b"foo"


async def test_open_unix_connection_to_asyncio(tmp_path: Path) -> None:
    """A server of asyncio in a thread gets all bytes and the end, and answers."""
    path, ready, token = str(tmp_path / "s"), trio.Event(), trio.lowlevel.current_trio_token()

    async def main() -> bytes:
        got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            data = await reader.read()
            writer.write(data[::-1])
            writer.close()
            await writer.wait_closed()
            got.set_result(data)

        async with await asyncio.start_unix_server(handle, path):
            token.run_sync_soon(ready.set)
            return await asyncio.wait_for(got, 30)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: trio.to_thread.run_sync(asyncio.run, main()))
        await ready.wait()
        async with await open_unix_connection(path) as conn:
            await conn.send_all(bytes(300_000) + b"end")
            await conn.send_eof()
            answer = b"".join([chunk async for chunk in conn])
    assert answer == b"dne" + bytes(300_000)


async def test_accept_of_a_client_of_asyncio(tmp_path: Path) -> None:
    """A client of asyncio in a thread sends, gets the answer, and sees the end."""
    path = str(tmp_path / "s")

    async def main() -> bytes:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"hello")
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        await writer.wait_closed()
        return answer

    async with await open_unix_listener(path) as listener, trio.open_nursery() as nursery:

        async def serve() -> None:
            async with await listener.accept() as conn:
                data = b"".join([chunk async for chunk in conn])
                await conn.send_all(data.upper())

        nursery.start_soon(serve)
        assert await trio.to_thread.run_sync(asyncio.run, main()) == b"HELLO"


SIGPIPE = """
import signal, trio
from trio_unixconn import ConnectionBrokenError, connection_pair

async def main():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    one, two = connection_pair()
    await two.aclose()
    for send in (
        lambda: one.send_all(b"x"),
        lambda: one.send_fd(0),
        lambda: one.send_fds([0, 0], per_message=1),
        lambda: one.send_message(bytes(1_000_000), fds=[0]),
        lambda: one.send_credentials(),
        lambda: one.send_buffer(b"x"),
    ):
        try:
            await send()
        except ConnectionBrokenError:
            print("broken")
    await one.aclose()

trio.run(main)
"""


async def test_sends_raise_no_sigpipe() -> None:
    """With SIGPIPE at its default, which ends a process, a send to a closed peer only raises."""
    child = await trio.run_process(
        [sys.executable, "-c", SIGPIPE],
        capture_stdout=True,
        stdin=subprocess.DEVNULL,
        env=environment(),
    )
    assert child.stdout.split() == [b"broken"] * 6
