"""send_message and receive_message: bytes, descriptors and credentials together."""

from __future__ import annotations

import array
import errno
import os
import socket
from typing import Any

import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from tests._helpers.fds import free_descriptors, look
from tests._helpers.peers import stdlib_peer
from trio_unixconn import (
    Cancellable,
    ConnectionClosedError,
    Credentials,
    DescriptorsRefusedError,
    DescriptorsTruncatedError,
    Message,
    OperationCancelled,
    UnexpectedControlMessageError,
    UnixFDList,
    connection_pair,
)

SO_PASSPIDFD = 76


def some(count: int) -> UnixFDList:
    """Open that many memfds, whose sizes are 0, 1, 2 and so on."""
    fds = UnixFDList()
    for size in range(count):
        fd = os.memfd_create("some")
        os.ftruncate(fd, size)
        fds.append(fd)
        os.close(fd)
    return fds


def sizes(fds: UnixFDList) -> list[int]:
    return [os.fstat(fd).st_size for fd in fds]


################################################################
# Both ways, with a process that knows only the standard library
################################################################


async def test_to_another_process() -> None:
    """Bytes, descriptors and credentials arrive together, in one message."""
    async with stdlib_peer() as peer:
        await peer.ask("passcred")
        with some(3) as fds:
            ours = [look(fd) for fd in fds]
            await peer.conn.send_message(b"hello", fds=fds, credentials=Credentials())
        got = await peer.ask("receive", size=100)
        assert (bytes.fromhex(got["data"]), got["fds"]) == (b"hello", ours)
        assert got["credentials"] == [os.getpid(), os.geteuid(), os.getegid()]


async def test_from_another_process() -> None:
    """A message has all its parts: bytes, descriptors of several headers, credentials."""
    async with stdlib_peer() as peer:
        pid = await peer.ask("pid")
        kinds = [["file", "pipe"], ["tcp"]]
        theirs = await peer.ask("send", kinds=kinds, data=b"hello".hex(), credentials=True)
        with await peer.conn.receive_message(100, credentials=True) as message:
            assert message.data == b"hello"
            assert [look(fd)["identity"] for fd in message.fds] == [
                each["identity"] for each in theirs
            ]
            assert not any(os.get_inheritable(fd) for fd in message.fds)
            assert message.credentials == Credentials(pid, os.geteuid(), os.getegid())
            assert message.pidfd is None


async def test_receive_message_restores_passcred() -> None:
    """credentials=True enables SO_PASSCRED for that call, and leaves it on if it was on."""
    one, two = connection_pair()
    async with one, two:
        for before in (0, 1):
            two.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, before)
            messages: list[Message] = []

            async def receive(into: list[Message]) -> None:
                into.append(await two.receive_message(9, credentials=True))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive, messages)
                await wait_all_tasks_blocked()
                assert two.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 1
                await one.send_all(b"x")
            assert messages[0].credentials == Credentials()
            assert two.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == before


async def test_passcred_is_returned_after_a_cancellation() -> None:
    """SO_PASSCRED is off again when the receive that wanted it was cancelled."""
    one, two = connection_pair()
    async with one, two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: two.receive_message(9, credentials=True))
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert two.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 0


async def test_no_credentials() -> None:
    """Without asking, and with nothing sent, there are none."""
    one, two = connection_pair()
    async with one, two:
        await one.send_all(b"ab")
        assert (await two.receive_message(1)).credentials is None
        assert (await two.receive_message(1, credentials=True)).credentials is None


async def test_pidfd() -> None:
    """With SO_PASSPIDFD on, the sender's pidfd is the message's, and can be taken out."""
    async with stdlib_peer() as peer:
        try:
            peer.conn.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 1)
        except OSError:
            pytest.skip("this kernel has no SO_PASSPIDFD (Linux 6.5)")
        pid = await peer.ask("pid")
        await peer.ask("send", kinds=[["file"]])
        await peer.ask("send", kinds=[], data="6162")
        with await peer.conn.receive_message(9) as message:
            assert len(message.fds) == len(message.pidfds) == 1
            assert message.pidfd == message.pidfds[0]
            with open(f"/proc/self/fdinfo/{message.pidfd}") as file:
                assert f"Pid:\t{pid}\n" in file.read()
            assert not os.get_inheritable(message.pidfd)
            os.close(message.pidfds.take(0))
            assert message.pidfd is None
        # Closed with the message, unless it is taken.
        with await peer.conn.receive_message(9) as message:
            assert message.data == b"ab"
            assert message.pidfd is not None


async def test_end_of_stream() -> None:
    """The end of the stream is a message without anything in it, each time."""
    async with stdlib_peer() as peer:
        await peer.ask("eof")
        for credentials in (False, True):
            with assert_checkpoints():
                message = await peer.conn.receive_message(9, credentials=credentials)
            assert (message.data, list(message.fds), message.credentials) == (b"", [], None)


################################################################
# Limits
################################################################


@pytest.mark.parametrize("most", [0, 1, 2, 252, 253])
async def test_as_many_as_allowed(most: int) -> None:
    """Exactly max_fds descriptors are received."""
    one, two = connection_pair()
    async with one, two:
        with some(most) as fds:
            await one.send_message(b"x", fds=fds)
        with await two.receive_message(1, max_fds=most) as message:
            assert sizes(message.fds) == list(range(most))


@pytest.mark.parametrize("most", [0, 1, 2, 252])
async def test_one_more_than_allowed(most: int) -> None:
    """One more than max_fds is an error with the bytes; all are closed, the stream continues."""
    one, two = connection_pair()
    async with one, two:
        with some(most + 1) as fds:
            await one.send_message(b"hello", fds=fds, credentials=Credentials())
        await one.send_all(b"next")
        text = f"expected at most {most} file desc" if most else "expected no file desc"
        with pytest.raises(UnexpectedControlMessageError, match=text) as caught:
            await two.receive_message(100, max_fds=most)
        assert caught.value.data == b"hello"
        assert (await two.receive_message(100, max_fds=most)).data == b"next"


async def test_253_are_the_default_and_the_most() -> None:
    """253 descriptors with credentials arrive whole; 254 are refused before anything is sent."""
    one, two = connection_pair()
    async with one, two:
        with pytest.raises(ValueError, match=r"at most 253 file descriptors .*, got 254"):
            await one.send_message(b"x", fds=[0] * 254)
        await one.send_message(b"y", fds=[0] * 253, credentials=Credentials())
        with await two.receive_message(9, credentials=True) as message:
            assert (message.data, len(message.fds)) == (b"y", 253)
            assert message.credentials == Credentials()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"max_bytes": 0}, ValueError, "max_bytes must be at least 1"),
        ({"max_bytes": -1}, ValueError, "max_bytes must be at least 1"),
        ({"max_bytes": 1.0}, TypeError, "float"),
        ({"max_bytes": 1, "max_fds": -1}, ValueError, "max_fds"),
        ({"max_bytes": 1, "max_fds": "1"}, TypeError, "str"),
        ({"max_bytes": 1, "max_fds": 254}, ValueError, "max_fds"),
    ],
)
async def test_bad_receive(arguments: Any, error: type[Exception], text: str) -> None:
    """Limits that make no sense are refused before anything is received."""
    one, two = connection_pair()
    async with one, two:
        await one.send_all(b"x")
        with pytest.raises(error, match=text):
            await two.receive_message(**arguments)
        assert await two.receive_some() == b"x"


async def test_no_free_slot() -> None:
    """Descriptors that find no free slot are DescriptorsTruncatedError, and none leaks."""
    one, two = connection_pair()
    async with one, two:
        with some(5) as fds:
            await one.send_message(b"hello", fds=fds)
        with (
            free_descriptors(2),
            pytest.raises(DescriptorsTruncatedError, match="RLIMIT_NOFILE") as caught,
        ):
            await two.receive_message(9)
        assert (caught.value.arrived, caught.value.data) == (2, b"hello")


################################################################
# Wrong arguments to send
################################################################


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"data": b"", "fds": [0]}, ValueError, "need at least one byte"),
        ({"data": b"", "credentials": Credentials()}, ValueError, "need at least one byte"),
        ({"data": b"x", "fds": [0, True]}, TypeError, r"fds\[1\]: .* got bool"),
        ({"data": b"x", "fds": ["0"]}, TypeError, r"fds\[0\]: .* got str"),
        ({"data": b"x", "fds": [0, 0, -1]}, ValueError, r"fds\[2\]: .*negative integer \(-1\)"),
        (
            {"data": b"x", "fds": 0},
            TypeError,
            "fds must be an iterable of file descriptors, got int",
        ),
        ({"data": "x", "fds": [0]}, TypeError, "str"),
        ({"data": 5}, TypeError, "int"),
        ({"data": memoryview(b"abcd")[::2]}, TypeError, "contiguous"),
    ],
)
async def test_bad_send(arguments: Any, error: type[Exception], text: str) -> None:
    """What cannot be sent is refused, and nothing is sent."""
    one, two = connection_pair()
    async with one, two:
        with pytest.raises(error, match=text):
            await one.send_message(**arguments)
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


async def test_closed_descriptor() -> None:
    """A closed one among the descriptors is EBADF, nothing is sent, the connection is usable."""
    one, two = connection_pair()
    closed = os.dup(0)
    os.close(closed)
    async with one, two:
        with assert_checkpoints(), pytest.raises(OSError, match="closed") as caught:
            await one.send_message(b"x", fds=[0, closed, 0])
        assert caught.value.errno == errno.EBADF
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


@pytest.mark.parametrize("data", [b"", bytearray(), memoryview(b"")])
async def test_nothing_alone(data: Any) -> None:
    """Without bytes or anything else, nothing is sent; it is a checkpoint."""
    one, two = connection_pair()
    async with one, two:
        with assert_checkpoints():
            await one.send_message(data)
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"
    with pytest.raises(ConnectionClosedError):
        await one.send_message(data)


async def test_send_message_of_nothing_with_a_cancelled_cancellable() -> None:
    """A cancelled Cancellable raises OperationCancelled even if there is nothing to do."""
    one, two = connection_pair()
    cancellable = Cancellable()
    cancellable.cancel()
    async with one, two:
        with assert_checkpoints(), pytest.raises(OperationCancelled):
            await one.send_message(b"", cancellable=cancellable)


@pytest.mark.parametrize(
    "data", [bytearray(b"abcdefgh"), array.array("i", [1, 2]), memoryview(array.array("d", [0.5]))]
)
async def test_buffers(data: Any) -> None:
    """Whatever is contiguous goes as the bytes that it is made of, all of them."""
    one, two = connection_pair()
    async with one, two:
        await one.send_message(data, fds=[0])
        with await two.receive_message(100) as message:
            assert (message.data, len(message.fds)) == (bytes(data), 1)


async def test_peer_that_refuses_descriptors() -> None:
    """SO_PASSRIGHTS off at the peer refuses descriptors, and messages without them pass."""
    async with stdlib_peer() as peer:
        if not await peer.ask("disable_passrights"):
            pytest.skip("this kernel has no SO_PASSRIGHTS (Linux 6.16)")
        for credentials in (None, Credentials()):
            with pytest.raises(DescriptorsRefusedError, match="does not accept file descriptors"):
                await peer.conn.send_message(b"x", fds=[0], credentials=credentials)
        with pytest.raises(
            DescriptorsRefusedError, match="does not accept file descriptors"
        ) as caught:
            await peer.conn.send_fds([0] * 3, per_message=1)
        assert caught.value.sent == 0
        await peer.conn.send_message(b"next", credentials=Credentials())
        assert await peer.ask("plain_receive", size=4) == b"next".hex()
