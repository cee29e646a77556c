"""Situations that Twisted's own tests of Unix sockets have, met with our methods.

They are those of twisted/internet/test/test_unix.py and twisted/test/test_unix.py.

| situation in Twisted's tests | ours |
| --- | --- |
| the mode of a socket; an abstract name; a name in use | test_client_and_listener, test_bind |
| the addresses of both ends match | test_connection |
| a file descriptor, then bytes, then the end | below |
| a file descriptor arrives before the bytes that follow it | below, test_send_fd |
| a copy arrives: another number, the same open socket | below, test_send_fd |
| file descriptors that are sent until the sender has to wait | below |
| more file descriptors than bytes to carry them | test_send_message |
| two in one control message, two in two control messages | below, test_situations_cpython |
| a control message of an unknown kind | test_ancillary |
| a receiver that expects none: they are closed, and that is told | test_refused_... below |
| a callback that raises | below, test_callbacks |
| a socket and a lock that a dead server left; two servers | test_bind |
| a listening socket that is adopted | test_listener_from_fd |
"""

from __future__ import annotations

import gc
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_unixconn import (
    Cancellable,
    DescriptorKind,
    OperationCancelled,
    UnexpectedControlMessageError,
    UnexpectedDescriptorsError,
    UnixConnection,
    UnsafeBufferError,
    WrongDescriptorKindError,
    connection_pair,
    open_callback_adapter,
    open_unix_connection,
    open_unix_listener,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from trio_unixconn import AsyncResult, CallbackConnection


################################################################
# Order
################################################################


async def test_send_fd_then_send_all_then_aclose() -> None:
    """A file descriptor, bytes and the end arrive in this order; the number is another one."""
    one, two = connection_pair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        async with two:
            async with one:
                await one.send_fd(server)
                await one.send_all(b"junk")
            received = await two.receive_socket()
            with received:
                assert received.fileno() != server.fileno()
                assert received.getsockname() == server.getsockname()
            assert await two.receive_some() == b"junk"
            assert await two.receive_some() == b""


async def test_receive_message_has_the_descriptor_with_the_first_of_its_bytes() -> None:
    """Bytes in front of a descriptor are read before it, or with it; bytes after it are not."""
    one, two = connection_pair()
    async with one, two:
        await one.send_all(b"before")
        await one.send_message(b"with", fds=[0])
        await one.send_all(b"after")
        with await two.receive_message(3) as message:
            assert (message.data, len(message.fds)) == (b"bef", 0)
        with await two.receive_message(100) as message:
            assert (message.data, len(message.fds)) == (b"orewith", 1)
        with await two.receive_message(100) as message:
            assert (message.data, len(message.fds)) == (b"after", 0)


async def test_send_fd_waits_while_the_peer_does_not_read() -> None:
    """A sender in a loop has to wait while others run; then all arrive, in order, once each."""
    one, two = connection_pair()
    fds = [os.memfd_create("cargo") for _ in range(5)]
    for size, fd in enumerate(fds):
        os.ftruncate(fd, size)
    count = 1000
    sent = 0

    async def send() -> None:
        nonlocal sent
        for number in range(count):
            await one.send_fd(fds[number % 5])
            sent += 1

    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
    async with one, two, trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await wait_all_tasks_blocked(0.01)
        assert 0 < sent < count
        with trio.fail_after(60):
            for number in range(count):
                fd = await two.receive_fd()
                assert os.fstat(fd).st_size == number % 5
                os.close(fd)
    for fd in fds:
        os.close(fd)


################################################################
# Refused file descriptors are closed
################################################################


async def refuse_plain(conn: UnixConnection) -> None:
    with pytest.raises(UnexpectedDescriptorsError):
        await conn.receive_some()


async def refuse_credentials(conn: UnixConnection) -> None:
    with pytest.raises(UnexpectedControlMessageError):
        await conn.receive_credentials()


async def refuse_max_fds(conn: UnixConnection) -> None:
    with pytest.raises(UnexpectedControlMessageError):
        await conn.receive_message(9, max_fds=0)


async def refuse_file(conn: UnixConnection) -> None:
    with pytest.raises(WrongDescriptorKindError):
        await conn.receive_file()


async def refuse_directory(conn: UnixConnection) -> None:
    with pytest.raises(WrongDescriptorKindError):
        await conn.receive_file(kinds=[DescriptorKind.DIRECTORY])


async def refuse_buffer(conn: UnixConnection) -> None:
    with pytest.raises(UnsafeBufferError):
        await conn.receive_buffer(9)


async def drop_message(conn: UnixConnection) -> None:
    (await conn.receive_message(9)).close()


async def drop_fds(conn: UnixConnection) -> None:
    (await conn.receive_fds(9)).close()


async def drop_unread(conn: UnixConnection) -> None:
    await conn.aclose()


async def drop_callback(conn: UnixConnection) -> None:
    async with open_callback_adapter() as adapter:
        adapter.wrap(conn).receive_fd_async(None, None)


REFUSALS: dict[str, Callable[[UnixConnection], Awaitable[None]]] = {
    "receive_some": refuse_plain,
    "receive_credentials": refuse_credentials,
    "receive_message(max_fds=0)": refuse_max_fds,
    "receive_file": refuse_file,
    "receive_file(kinds=)": refuse_directory,
    "receive_buffer": refuse_buffer,
    "Message.close": drop_message,
    "UnixFDList.close": drop_fds,
    "aclose, unread": drop_unread,
    "receive_fd_async without callback": drop_callback,
}


async def end_of(probe: socket.socket) -> bytes:
    """Wait until no process holds the other end of a socketpair."""
    with trio.fail_after(30):
        await trio.lowlevel.wait_readable(probe)
    return probe.recv(1)


@pytest.mark.parametrize("refuse", REFUSALS.values(), ids=REFUSALS)
async def test_refused_descriptor_is_closed(
    refuse: Callable[[UnixConnection], Awaitable[None]],
) -> None:
    """The last copy of a socket is refused, or dropped: its peer sees the end of the stream."""
    one, two = connection_pair()
    probe, cargo = socket.socketpair()
    with probe:
        async with one, two:
            with cargo:
                await one.send_fd(cargo)
            await refuse(two)
            assert await end_of(probe) == b""


async def test_refused_descriptor_is_closed_by_receive_descriptors_false() -> None:
    """A descriptor that was in the queue before it was refused is closed, and reported."""
    ours, theirs = socket.socketpair()
    probe, cargo = socket.socketpair()
    with probe, theirs:
        with cargo:
            socket.send_fds(theirs, [b"x"], [cargo.fileno()])
        async with UnixConnection.from_stdlib_socket(ours, receive_descriptors=False) as conn:
            with pytest.raises(UnexpectedDescriptorsError) as caught:
                await conn.receive_message(9)
            assert caught.value.data == b"x"
            assert await end_of(probe) == b""


async def test_descriptor_in_an_unaccepted_connection_is_closed(unix_socket_path: Path) -> None:
    """Closing a listener closes descriptors that clients sent before they were accepted."""
    probe, cargo = socket.socketpair()
    with probe:
        async with await open_unix_listener(unix_socket_path):
            client = await open_unix_connection(unix_socket_path)
            with cargo:
                await client.send_fd(cargo)
        async with client:
            assert await end_of(probe) == b""


async def test_descriptor_in_a_connection_in_a_connection_is_closed() -> None:
    """Closing a connection closes descriptors in the queue of a socket that is in its own queue."""
    probe, cargo = socket.socketpair()
    one, two = connection_pair()
    inner, outer = connection_pair()
    with probe:
        async with two, inner, outer, one:
            with cargo:
                await inner.send_fd(cargo)
            await one.send_fd(outer.socket)
        assert await end_of(probe) == b""


async def test_descriptor_that_fds_read_ahead_is_closed() -> None:
    """A loop over fds() that is left early: closing the connection closes those read ahead."""
    one, two = connection_pair()
    probe, cargo = socket.socketpair()
    with probe:
        async with one, two:
            with cargo:
                await one.send_fds([0, cargo], per_message=1)
            async for fd in two.fds():
                os.close(fd)
                break
        assert await end_of(probe) == b""


################################################################
# Callbacks that raise
################################################################


@pytest.mark.parametrize("finishes", [True, False])
async def test_receive_fd_async_with_a_callback_that_raises(*, finishes: bool) -> None:
    """The exception comes out of the adapter; a descriptor not taken by then is closed."""
    one, two = connection_pair()
    probe, cargo = socket.socketpair()
    taken: list[int] = []

    def callback(gio: CallbackConnection, result: AsyncResult, *_: Any) -> None:
        if finishes:
            taken.append(gio.receive_fd_finish(result))
        raise ZeroDivisionError

    async def run() -> None:
        with pytest.RaisesGroup(ZeroDivisionError):
            async with open_callback_adapter() as adapter:
                adapter.wrap(two).receive_fd_async(None, callback)
        gc.collect()

    with probe:
        async with one, two:
            with cargo:
                await one.send_fd(cargo)
            if finishes:
                await run()
                os.close(*taken)
            else:
                with pytest.warns(ResourceWarning):
                    await run()
            assert await end_of(probe) == b""
            # The connection is still usable.
            await one.send_all(b"x")
            assert await two.receive_some() == b"x"


async def test_cancellable_callback_that_raises_does_not_keep_a_receive() -> None:
    """A callback of a Cancellable raises: receive_fd ends nevertheless, nothing is lost."""
    one, two = connection_pair()
    cancellable = Cancellable()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    cancellable.connect(fail)
    async with one, two:
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(OperationCancelled):
                    await two.receive_fd(cancellable)

            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            with pytest.raises(ZeroDivisionError):
                cancellable.cancel()
        await one.send_fd(0)
        os.close(await two.receive_fd())
