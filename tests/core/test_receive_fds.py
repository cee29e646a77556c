"""receive_fds: the descriptors in the queue, up to a limit, and no message lost after them."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from tests._helpers.fds import drain, free_descriptors, sizes, some
from tests._helpers.peers import stdlib_peer
from trio_unixconn import (
    Cancellable,
    ConnectionBrokenError,
    ConnectionClosedError,
    Credentials,
    DescriptorsTruncatedError,
    EndOfStreamError,
    OperationCancelled,
    UnexpectedControlMessageError,
    UnixConnection,
    UnixFDList,
    _closing,
    _receiver,
    connection_pair,
)

if TYPE_CHECKING:
    from collections.abc import Callable

################################################################
# Receiving
################################################################


async def test_burst() -> None:
    """What has come is received at once, however many messages it was, up to max_fds."""
    one, two = connection_pair()
    async with one, two:
        with some(20) as fds:
            await one.send_fds(list(fds)[:10], per_message=1)
            await one.send_fds(list(fds)[10:], per_message=4)
        with await two.receive_fds(5) as first:
            assert sizes(first) == [0, 1, 2, 3, 4]
        with await two.receive_fds(100) as second:
            got = sizes(second)
        assert got == list(range(5, 5 + len(got)))
        assert got[:6] == [5, 6, 7, 8, 9, 10]
        assert await drain(two, 15 - len(got)) == list(range(5 + len(got), 20))


@pytest.mark.parametrize("room", [1, 2, 4])
async def test_message_that_does_not_fit_stays(room: int) -> None:
    """A message with more descriptors than still fit stays for the next receive."""
    one, two = connection_pair()
    async with one, two:
        with some(6) as fds:
            await one.send_fds(list(fds)[:1])
            await one.send_fds(list(fds)[1:])
        with await two.receive_fds(room) as first:
            assert sizes(first) == [0]
        with pytest.raises(UnexpectedControlMessageError, match="with 5 file descriptors"):
            await two.receive_fds(room)
        await one.send_fds([0])
        assert len(await drain(two, 1)) == 1


async def test_message_that_does_not_fit_serves_the_next() -> None:
    """A message that did not fit is received whole by a receive with enough space."""
    one, two = connection_pair()
    async with one, two:
        with some(6) as fds:
            await one.send_fds(list(fds)[:1])
            await one.send_fds(list(fds)[1:])
        with await two.receive_fds(2) as first:
            assert sizes(first) == [0]
        with await two.receive_fds(5) as second:
            assert sizes(second) == [1, 2, 3, 4, 5]


async def test_first_message_with_too_many() -> None:
    """A first message with more than max_fds is an error; all are closed, the next one comes."""
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[["file"] * 3], data=b"abc".hex())
        await peer.ask("send", kinds=[["file"]])
        with pytest.raises(UnexpectedControlMessageError, match="between 1 and 2") as caught:
            await peer.conn.receive_fds(2)
        assert caught.value.data == b"a"
        assert await peer.conn.receive_some(2) == b"bc"
        (await peer.conn.receive_fds(2)).close()


async def test_plain_bytes_stay() -> None:
    """Bytes after descriptors stay in the stream; before them they are an error with the byte."""
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[["file", "file"]])
        await peer.ask("send", kinds=[["file"]])
        await peer.ask("send", kinds=[], data=b"plain".hex())
        await peer.ask("send", kinds=[["file"]])
        with await peer.conn.receive_fds(10) as fds:
            assert len(fds) == 3
        with pytest.raises(UnexpectedControlMessageError, match=r"got b.p.;") as caught:
            await peer.conn.receive_fds(10)
        assert caught.value.data == b"p"
        assert await peer.conn.receive_some(4) == b"lain"
        (await peer.conn.receive_fds(10)).close()


@pytest.mark.parametrize("bad", [0, -1, 1.0, "1", None])
async def test_bad_max_fds(bad: Any) -> None:
    """A limit that makes no sense is refused before anything is received."""
    one, two = connection_pair()
    async with one, two:
        await one.send_fds([0])
        with pytest.raises((TypeError, ValueError), match=r"max_fds|integer"):
            await two.receive_fds(bad)
        (await two.receive_fds(1)).close()


async def test_end_of_stream() -> None:
    """At the end of the stream receive_fds raises EndOfStreamError, each time."""
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[["file"]])
        await peer.ask("eof")
        (await peer.conn.receive_fds(9)).close()
        for passcred in (0, 1):
            peer.conn.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, passcred)
            with (
                assert_checkpoints(),
                pytest.raises(EndOfStreamError, match="waiting for file descriptors"),
            ):
                await peer.conn.receive_fds(9)


@pytest.mark.parametrize("way", ["scope", "cancellable"])
async def test_cancelled_receive(way: str) -> None:
    """A receive that is cancelled has received nothing."""
    one, two = connection_pair()
    cancellable = Cancellable()

    async def receive() -> None:
        with pytest.raises(OperationCancelled if way == "cancellable" else trio.Cancelled):
            await two.receive_fds(9, cancellable=cancellable)

    async with one, two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel() if way == "scope" else cancellable.cancel()
        await one.send_fds([0, 0])
        (await two.receive_fds(2)).close()


async def test_no_free_slot() -> None:
    """Descriptors that find no free slot are DescriptorsTruncatedError; the rest is in step."""
    one, two = connection_pair()
    async with one, two:
        with some(6) as fds:
            await one.send_fds(list(fds)[:4])
            await one.send_fds(list(fds)[4:])
        with (
            free_descriptors(2),
            pytest.raises(DescriptorsTruncatedError, match="RLIMIT_NOFILE") as caught,
        ):
            await two.receive_fds(9)
        assert caught.value.arrived == 2
        assert await drain(two, 2) == [4, 5]


async def test_receive_fds_lets_so_inq_pass() -> None:
    """A control message that this side asked for (SO_INQ) does not make a message unexpected."""
    one, two = connection_pair()
    async with one, two:
        try:
            two.setsockopt(socket.SOL_SOCKET, 84, 1)
        except OSError:
            pytest.skip("this kernel has no SO_INQ (Linux 6.18)")
        with some(6) as fds:
            await one.send_fds(fds, per_message=1)
        fd = await two.receive_fd()
        with UnixFDList([fd]) as first:
            assert sizes(first) == [0]
        async for fd in two.fds(read_ahead=1):
            with UnixFDList([fd]) as second:
                assert sizes(second) == [1]
            break
        with await two.receive_fds(9) as rest:
            assert sizes(rest) == [2, 3, 4, 5]
        await one.send_all(b"x")
        assert await two.receive_some() == b"x"
        await one.send_credentials()
        assert (await two.receive_credentials()).pid == os.getpid()


class WhileReceiving(trio.abc.Instrument):
    """Does something once, when a receive has got its answer and not yet returned."""

    def __init__(self, conn: UnixConnection, do: Callable[[], object]) -> None:
        self.conn = conn
        self.do = do
        trio.lowlevel.add_instrument(self)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Trio calls this."""
        if self.conn._receiver.busy:
            trio.lowlevel.remove_instrument(self)
            self.do()


async def test_closed_as_it_arrives() -> None:
    """What arrived as another task closed the connection is received, or closed; never lost."""
    one, two = connection_pair()

    def close() -> None:
        # What aclose() does in its first step.
        two._receiver.release()
        two.socket.close()

    async with one, two:
        await one.send_fds([0, 0, 0], per_message=1)
        WhileReceiving(two, close)
        with suppress(ConnectionClosedError), await two.receive_fds(9) as fds:
            assert len(fds) == 1
        assert two.is_closed()


@pytest.mark.parametrize("read_ahead", [3, 128])
async def test_receive_fds_goes_on_after_what_was_read_ahead(read_ahead: int) -> None:
    """receive_fds(40) returns 40 if they are there, even if fds() has read a part of them."""
    one, two = connection_pair()
    async with one, two:
        with some(41) as fds:
            await one.send_fds(fds, per_message=1)
        async for fd in two.fds(read_ahead=read_ahead):
            os.close(fd)
            break
        with await two.receive_fds(40) as rest:
            assert sizes(rest) == list(range(1, 41))


async def test_receive_fds_stops_at_a_message_that_was_read_ahead() -> None:
    """A message that fds() read ahead, and that does not fit, is kept, as are those after it."""
    one, two = connection_pair()
    async with one, two:
        with some(7) as fds:
            await one.send_fds(list(fds)[:2], per_message=1)
            await one.send_fds(list(fds)[2:5])
            await one.send_fds(list(fds)[5:], per_message=1)
        async for fd in two.fds():
            os.close(fd)
            break
        with await two.receive_fds(3) as first:
            assert sizes(first) == [1]
        with await two.receive_fds(9) as second:
            assert sizes(second) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("free", [0, 1, 3])
async def test_receive_fds_leaves_what_finds_no_free_slot(free: int) -> None:
    """Only the first message can be truncated: receive_fds takes no other that is."""
    one, two = connection_pair()
    async with one, two:
        with some(6) as fds:
            await one.send_fds(list(fds)[:1])
            await one.send_fds(list(fds)[1:5])
            await one.send_fds(list(fds)[5:])
        with free_descriptors(1 + free), await two.receive_fds(9) as first:
            assert sizes(first) == [0]
            # Those that the peek installed are closed.
            assert _closing.wait_closed(30)
        with await two.receive_fds(9) as second:
            assert sizes(second) == [1, 2, 3, 4, 5]


async def test_receive_fds_leaves_plain_bytes_in_the_socket() -> None:
    """Plain bytes, and descriptors after them, are not taken for one message."""
    one, two = connection_pair()
    async with one, two:
        for data in (b"x", b"plain"):
            await one.send_fds([0])
            await one.send_all(data)
            await one.send_fds([0])
            with await two.receive_fds(9) as fds:
                assert len(fds) == 1
            assert await two.receive_some(len(data)) == data
            with await two.receive_fds(9) as fds:
                assert len(fds) == 1


@pytest.mark.parametrize("fds_before", [False, True])
async def test_receive_fds_keeps_a_reset(*, fds_before: bool) -> None:
    """An error that the kernel reports once, after descriptors, is for the next receive."""
    one, two = connection_pair()
    async with two:
        if fds_before:
            await one.send_fds([0, 0], per_message=1)
            for _ in range(2):
                os.close(await anext(two.fds()))
            assert not two.has_read_ahead()
        await two.send_all(b"never read")
        await one.send_fds([0, 0], per_message=1)
        await one.aclose()
        assert _closing.wait_closed(30)
        with await two.receive_fds(9) as fds:
            assert len(fds) == 2
        with pytest.raises(ConnectionBrokenError):
            await two.receive_fds(9)


async def test_receive_fds_when_another_process_takes_the_message() -> None:
    """A message that is gone after the peek leaves nothing of it here."""

    class Stolen:
        """A socket from which another process reads after each peek."""

        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sock, name)

        def recv(self, size: int, flags: int) -> bytes:
            self.sock.recv(size, flags)
            return self.sock.recv(size, flags)

    one, two = connection_pair()
    async with one, two:
        await one.send_fds([0, 0], per_message=1)
        real, two._receiver.raw = two._receiver.raw, Stolen(two._receiver.raw)  # type: ignore[assignment]
        with await two.receive_fds(9) as fds:
            assert len(fds) == 1
        two._receiver.raw = real


async def test_receive_fds_without_peeking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where MSG_PEEK does not install descriptors, receive_fds takes one message at a time."""
    monkeypatch.setattr(_receiver, "_CAN_PEEK", False)
    one, two = connection_pair()
    async with one, two:
        await one.send_fds([0, 0], per_message=1)
        for _ in range(2):
            with await two.receive_fds(9) as fds:
                assert len(fds) == 1


async def test_truncation_has_the_credentials_of_the_sender() -> None:
    """DescriptorsTruncatedError has the sender's credentials if the message has them."""
    one, two = connection_pair()
    async with one, two:
        for credentials in (None, Credentials()):
            await one.send_message(b"ab", fds=[0, 0], credentials=credentials)
            with free_descriptors(1), pytest.raises(DescriptorsTruncatedError) as caught:
                await two.receive_message(9, credentials=credentials is not None)
            assert caught.value.credentials == credentials
            assert (caught.value.data, caught.value.arrived) == (b"ab", 1)
