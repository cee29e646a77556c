"""Situations that GLib's own tests of Unix sockets have, met with our methods.

They are those of gio/tests/unix-fd.c, unix-streams.c, socket.c and credentials.c. tests/interop has
the real GLib as a peer; here its situations are met without it, on every machine.

| situation in GLib's tests | ours |
| --- | --- |
| a list from an array: peek, get, append, steal; append_take, lookup | below, test_fdlist |
| a message with a list: append, steal, append again, get | below, test_message_values |
| both ends of a socketpair in one message, used on arrival | below |
| nothing is open that was not open before | the guard of every test |
| an anonymous address: no path, not abstract | below, test_address |
| a socket that is not connected | test_connection |
| a child sends a write end, the parent reads what it writes | below |
| bytes sent before a shutdown arrive, then the end | below, test_situations_cpython |
| bytes of two sends are read by one receive | below |
| a wait with a timeout; a cancelled Cancellable | below, test_cancellation |
| accept and connect that are cancelled, before or meanwhile; several that wait | below |
| addresses in text | test_address |
| a thread writes, the loop passes on, a thread reads, until cancelled | below |
| credentials: own ids, same user, other user, native form | test_credentials |
| credentials of a socketpair, and over it (a TODO in GLib's tests) | test_send_credentials |
| a name in use | test_bind |
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_unixconn import (
    Cancellable,
    OperationCancelled,
    UnixConnection,
    UnixFDList,
    UnixFDMessage,
    connection_pair,
    open_callback_adapter,
    open_unix_connection,
    open_unix_listener,
)
from trio_unixconn.testing import open_descriptors

if TYPE_CHECKING:
    from pathlib import Path

    from trio_unixconn import AsyncResult, CallbackConnection

TEXT = b"written by one process, read by another"


################################################################
# UnixFDList and UnixFDMessage
################################################################


def test_fd_list_from_array_peek_get_append_steal() -> None:
    """The list owns the descriptors given to it, returns duplicates, and hands over all of them."""
    read, write = os.pipe()
    fds = UnixFDList.new_from_array([read, write])
    assert fds.peek_fds() == [read, write]
    for position in (0, 1):
        os.close(fds.get(position))
    assert fds.append(read) == 2
    stolen = fds.steal_fds()
    assert stolen[:2] == [read, write]
    assert len(set(stolen)) == 3
    assert (fds.get_length(), fds.peek_fds(), fds.steal_fds()) == (0, [], [])
    for fd in stolen:
        os.close(fd)


def test_fd_list_append_take_peek_lookup() -> None:
    """append_take() takes no duplicate; peek() and lookup() leave it; no position is negative."""
    read, write = os.pipe()
    with UnixFDList() as fds:
        assert [fds.lookup(position) for position in (-1, 0)] == [-1, -1]
        assert (fds.append_take(read), fds.append_take(write)) == (0, 1)
        assert fds.get_length() == 2
        assert [fds.peek(position) for position in (0, 1)] == [read, write]
        assert [fds.lookup(position) for position in (0, 1, 2, -1)] == [read, write, -1, -1]
        with pytest.raises(IndexError):
            fds.peek(2)


def test_fd_message_steal_then_append_again() -> None:
    """After steal_fds() the message has the same list, empty, and takes new ones."""
    pair = [each.detach() for each in socket.socketpair()]
    message = UnixFDMessage(UnixFDList.new_from_array(pair))
    fds = message.get_fd_list()
    assert message.steal_fds() == pair
    assert message.get_fd_list() is fds
    assert fds.get_length() == 0
    for fd in pair:
        message.append_fd(fd)
        os.close(fd)
    assert fds.get_length() == 2
    for _ in range(3):
        for position in (0, 1):
            os.close(fds.get(position))
    fds.close()


def test_fd_list_of_an_exception_while_appending() -> None:
    """An append that fails changes nothing; the list still owns its descriptors."""
    before = open_descriptors()
    with UnixFDList() as fds:
        assert fds.append(0) == 0
        for bad in (-1, 10**6, 2**31):
            with pytest.raises((OSError, ValueError, OverflowError)):
                fds.append(bad)
        assert fds.get_length() == 1
    assert open_descriptors() == before


async def test_send_message_with_both_ends_of_a_socketpair() -> None:
    """Both ends cross in one message; bytes written into one are read from the other."""
    one, two = connection_pair()
    ends = UnixFDMessage(UnixFDList([each.detach() for each in socket.socketpair()]))
    async with one, two:
        await one.send_message(b"\xff", fds=ends.get_fd_list())
        ends.get_fd_list().close()
        with await two.receive_message(1) as message:
            assert (message.data, message.fds.get_length()) == (b"\xff", 2)
            write = message.fds.get(1)
            os.write(write, TEXT)
            os.close(write)
            assert os.read(message.fds[0], 1000) == TEXT


async def test_connection_pair_has_anonymous_addresses() -> None:
    """Neither end of a pair has a path or an abstract name."""
    one, two = connection_pair()
    async with one, two:
        for address in (one.get_local_address(), one.get_remote_address()):
            assert address.get_is_anonymous()
            assert not address.get_is_abstract()
            assert not address.get_path()


################################################################
# Descriptors to and from a process
################################################################

WRITER = f"""
import os, socket, sys
connection, inherited = int(sys.argv[1]), int(sys.argv[2])
os.close(inherited)
with socket.socket(fileno=connection) as sock:
    _, (fd,), _, _ = socket.recv_fds(sock, 1, 1)
os.write(fd, {TEXT!r})
"""

SENDER = """
import os, socket, sys
connection, write = int(sys.argv[1]), int(sys.argv[2])
with socket.socket(fileno=connection) as sock:
    socket.send_fds(sock, [b"\\0"], [write])
"""


async def run(program: str, *fds: int) -> None:
    """Run a program of its own that inherits these file descriptors."""
    await trio.run_process(
        [sys.executable, "-c", program, *map(str, fds)], pass_fds=fds, stdin=subprocess.DEVNULL
    )


async def test_send_fd_to_a_process_that_has_closed_its_own() -> None:
    """A child that closed the write end it inherited gets it again by send_fd, and writes."""
    read, write = os.pipe()
    ours, theirs = socket.socketpair()
    with theirs:
        async with UnixConnection.from_stdlib_socket(ours) as conn:
            await conn.send_fd(write)
        with trio.fail_after(30):
            await run(WRITER, theirs.fileno(), write)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        assert file.read() == TEXT


async def test_receive_fd_from_a_process_that_has_ended() -> None:
    """What a process sent before it ended is there afterwards, and is the same open file."""
    read, write = os.pipe()
    ours, theirs = socket.socketpair()
    async with UnixConnection.from_stdlib_socket(ours) as conn:
        with theirs, trio.fail_after(30):
            await run(SENDER, theirs.fileno(), write)
        os.close(write)
        with os.fdopen(await conn.receive_fd(), "wb", buffering=0) as file:
            file.write(TEXT)
        with os.fdopen(read, "rb") as file:
            assert file.read() == TEXT


################################################################
# Streams
################################################################


async def test_receive_some_after_the_peer_has_sent_its_end() -> None:
    """An end of stream does not overtake what was sent before it, nor end the other direction."""
    one, two = connection_pair()
    async with one, two:
        await one.send_all(TEXT)
        await one.send_eof()
        assert await two.receive_some(len(TEXT) - 1) == TEXT[:-1]
        assert await two.receive_some() == TEXT[-1:]
        assert await two.receive_some() == b""
        await two.send_fd(0)
        os.close(await one.receive_fd())


async def test_receive_some_reads_bytes_of_two_sends() -> None:
    """Two sends are read by one receive; then there is nothing, until there is."""
    one, two = connection_pair()
    async with one, two:
        await one.send_all(TEXT)
        await one.send_all(TEXT)
        assert await two.receive_some() == TEXT * 2
        with trio.move_on_after(0.01) as scope:
            await two.receive_some()
        assert scope.cancelled_caught
        await one.send_all(TEXT)
        assert await two.receive_some() == TEXT


async def test_receive_some_with_a_timeout_then_without() -> None:
    """A timeout ends one wait only; the connection waits again, and longer."""
    one, two = connection_pair()
    async with one, two:
        for _ in range(3):
            with trio.move_on_after(0.01) as scope:
                await two.receive_fd()
            assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                os.close(await two.receive_fd())

            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            await one.send_fd(0)


@pytest.mark.parametrize("operation", ["accept", "connect"])
async def test_accept_and_connect_under_cancellable_scope(
    unix_socket_path: Path, operation: str
) -> None:
    """Under a Cancellable's scope, accept() and a connect with a full queue end with it."""
    cancellable = Cancellable()
    async with await open_unix_listener(unix_socket_path, backlog=0) as listener:
        queued = [await open_unix_connection(unix_socket_path)] if operation == "connect" else []
        async with trio.open_nursery() as nursery:

            async def operate() -> None:
                with pytest.raises(OperationCancelled), cancellable.scope():
                    if operation == "accept":
                        await listener.accept()
                    else:
                        await open_unix_connection(unix_socket_path)

            nursery.start_soon(operate)
            if operation == "accept":
                await wait_all_tasks_blocked()
            else:
                await trio.lowlevel.checkpoint()
            cancellable.cancel()
        for conn in queued:
            await conn.aclose()
            await (await listener.accept()).aclose()


async def test_accept_and_connect_with_a_cancelled_cancellable(unix_socket_path: Path) -> None:
    """A cancelled Cancellable ends accept() and connect immediately; the queue is as it was."""
    cancellable = Cancellable()
    cancellable.cancel()
    async with (
        await open_unix_listener(unix_socket_path) as listener,
        await open_unix_connection(unix_socket_path) as client,
    ):
        for _ in range(2):
            with pytest.raises(OperationCancelled), cancellable.scope():
                await listener.accept()
            with pytest.raises(OperationCancelled), cancellable.scope():
                await open_unix_connection(unix_socket_path)
        async with await listener.accept() as server:
            await client.send_all(b"x")
            assert await server.receive_some() == b"x"
        with trio.move_on_after(0.01) as scope:
            await listener.accept()
        assert scope.cancelled_caught


async def test_accept_of_several_that_wait(unix_socket_path: Path) -> None:
    """One accept() takes one of the clients in the queue, and the next ones the others."""
    async with await open_unix_listener(unix_socket_path) as listener:
        clients = [await open_unix_connection(unix_socket_path) for _ in range(5)]
        for number, client in enumerate(clients):
            async with client, await listener.accept() as server:
                await client.send_all(b"%d" % number)
                assert await server.receive_some() == b"%d" % number


CHUNK = bytes(range(65, 91))


class Relay:
    """Passes on bytes from one connection to another, by callbacks, until cancelled."""

    def __init__(self, source: CallbackConnection, sink: CallbackConnection) -> None:
        self.source, self.sink = source, sink
        self.cancellable = Cancellable()
        self.ends = 0

    def receive(self) -> None:
        self.source.receive_message_async(1000, self.cancellable, self.received)

    def received(self, source: CallbackConnection, result: AsyncResult) -> None:
        try:
            message = source.receive_message_finish(result)
        except OperationCancelled:
            self.ends += 1
        else:
            self.sink.send_message_async(message.data, callback=self.sent)

    def sent(self, sink: CallbackConnection, result: AsyncResult) -> None:
        sink.send_message_finish(result)
        self.receive()


async def test_receive_message_async_chain_from_thread_to_thread() -> None:
    """A thread writes, callbacks pass on, another thread reads, until a Cancellable ends it.

    The bytes are read whole and in order, and the reader sees the end of the stream.
    """
    writing, reading = socket.socketpair(), socket.socketpair()
    read = bytearray()
    enough = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def write() -> None:
        with writing[0] as sock, suppress(BrokenPipeError, ConnectionResetError):
            while True:
                sock.sendall(CHUNK)

    def consume() -> None:
        with reading[1] as sock:
            while piece := sock.recv(1000):
                read.extend(piece)
                if len(read) > 100 * len(CHUNK) >= len(read) - len(piece):
                    token.run_sync_soon(enough.set)

    threads = [threading.Thread(target=each) for each in (write, consume)]
    for thread in threads:
        thread.start()
    try:
        async with (
            UnixConnection.from_stdlib_socket(writing[1]) as source,
            UnixConnection.from_stdlib_socket(reading[0]) as sink,
        ):
            with trio.fail_after(30):
                async with open_callback_adapter() as adapter:
                    relay = Relay(adapter.wrap(source), adapter.wrap(sink))
                    relay.receive()
                    await enough.wait()
                    relay.cancellable.cancel()
            assert relay.ends == 1
    finally:
        for thread in threads:
            await trio.to_thread.run_sync(thread.join)
    assert len(read) > 100 * len(CHUNK)
    assert read == (CHUNK * len(read))[: len(read)]
