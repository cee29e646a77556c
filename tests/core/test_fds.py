"""fds(): a stream of descriptors, read in bursts; leaving it loses nothing."""

from __future__ import annotations

import os
import resource
import socket
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from tests._helpers.fds import free_descriptors, look
from tests._helpers.peers import stdlib_peer
from tests._helpers.processes import open_descriptors
from trio_unixconn import (
    ConnectionBrokenError,
    ConnectionBusyError,
    ConnectionClosedError,
    Credentials,
    EndOfStreamError,
    NotSupportedError,
    UnexpectedControlMessageError,
    UnexpectedDescriptorsError,
    UnixConnection,
    UnixFDList,
    _ancillary,
    _closing,
    _receiver,
    connection_pair,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator

SO_PASSPIDFD = 76


async def send_some(conn: UnixConnection, count: int, *, first: int = 0) -> None:
    """Send that many memfds one by one, whose sizes count from ``first``."""
    for size in range(first, first + count):
        fd = os.memfd_create("some")
        os.ftruncate(fd, size)
        await conn.send_fd(fd)
        os.close(fd)


def size_of(fd: int) -> int:
    """Return the size of an open file, and close it."""
    size = os.fstat(fd).st_size
    os.close(fd)
    return size


def count_open() -> int:
    return open_descriptors(os.getpid())


async def test_fds_until_the_end_of_the_stream() -> None:
    """All arrive in order, in bursts larger than what is read ahead, then the loop ends."""
    one, two = connection_pair()
    got: list[int] = []

    async def send() -> None:
        await send_some(one, 500)
        await one.send_eof()

    async with one, two, trio.open_nursery() as nursery:
        nursery.start_soon(send)
        async for fd in two.fds():
            assert not os.get_inheritable(fd)
            got.append(size_of(fd))
        # It stays at its end.
        async for _ in two.fds():
            pytest.fail("a descriptor after the end")
        with pytest.raises(EndOfStreamError):
            await two.receive_fd()
    assert got == list(range(500))


async def test_fds_from_another_process() -> None:
    """Messages of another process, one descriptor each, arrive in order with their files."""
    async with stdlib_peer() as peer:
        theirs: list[Any] = []
        for kind in ["file", "pipe", "memfd", "tcp"] * 5:
            theirs += await peer.ask("send", kinds=[[kind]])
        await peer.ask("eof")
        ours: list[Any] = []
        async for fd in peer.conn.fds():
            ours.append(look(fd))
            os.close(fd)
        assert [each["identity"] for each in ours] == [each["identity"] for each in theirs]


async def take(stream: AsyncIterator[int], count: int) -> list[int]:
    """Take some, and leave the loop."""
    got: list[int] = []
    async for fd in stream:
        got.append(size_of(fd))
        if len(got) == count:
            break
    return got


async def by_exception(conn: UnixConnection) -> list[int]:
    got: list[int] = []
    with suppress(ZeroDivisionError):
        async for fd in conn.fds():
            got.append(size_of(fd))
            if len(got) == 3:
                raise ZeroDivisionError
    return got


async def by_cancellation(conn: UnixConnection) -> list[int]:
    got: list[int] = []
    with trio.CancelScope() as scope:
        async for fd in conn.fds():
            got.append(size_of(fd))
            if len(got) == 3:
                scope.cancel()
                await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    return got


async def by_break(conn: UnixConnection) -> list[int]:
    return await take(conn.fds(), 3)


@pytest.mark.parametrize("leave", [by_break, by_exception, by_cancellation])
async def test_fds_left_early(leave: Any) -> None:
    """What was read ahead serves the next receives, whichever they are, in order."""
    async with stdlib_peer() as peer:
        pid = await peer.ask("pid")
        conn = peer.conn
        theirs: list[Any] = []
        for _ in range(8):
            theirs += await peer.ask("send", kinds=[["memfd"]])
        await peer.ask("send", kinds=[], credentials=True)
        await peer.ask("send", kinds=[["memfd"]])
        await peer.ask("send", kinds=[], data=b"plain".hex())

        assert await leave(conn) == [0, 0, 0]
        fd = await conn.receive_fd()
        assert look(fd)["identity"] == theirs[3]["identity"]
        os.close(fd)
        with await conn.receive_message(100) as message:
            assert message.data == b"\0"
            assert [look(fd)["identity"] for fd in message.fds] == [theirs[4]["identity"]]
        with pytest.raises(UnexpectedDescriptorsError) as caught:
            await conn.receive_some()
        assert caught.value.data == b"\0"
        with await conn.receive_fds(100) as fds:
            assert [look(fd)["identity"] for fd in fds] == [
                theirs[6]["identity"],
                theirs[7]["identity"],
            ]
        # Explicit credentials after descriptors are those that were sent, not a guess.
        assert (await conn.receive_credentials()).pid == pid
        os.close(await conn.receive_fd())
        assert await conn.receive_some() in (b"p", b"plain")


async def test_fds_cancelled_while_it_waits() -> None:
    """A loop that is cancelled while it waits has received nothing; another loop continues."""
    one, two = connection_pair()
    async with one, two:
        stream = two.fds()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.__anext__)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await send_some(one, 4)
        assert await take(stream, 2) == [0, 1]
        assert await take(two.fds(), 2) == [2, 3]


async def test_fds_with_plain_bytes_after_descriptors() -> None:
    """Plain bytes after descriptors are an error in the loop with the first byte; none is lost."""
    one, two = connection_pair()
    async with one, two:
        await send_some(one, 2)
        await one.send_all(b"plain")
        stream = two.fds()
        assert await take(stream, 2) == [0, 1]
        got = b""
        while len(got) < 5:
            got += await two.receive_some()
        assert got == b"plain"
        await send_some(one, 1)
        assert await take(stream, 1) == [0]


@pytest.mark.parametrize("position", [0, 2])
async def test_fds_with_an_unexpected_message(position: int) -> None:
    """A message of another kind raises in its place, and the iteration can continue."""
    one, two = connection_pair()
    async with one, two:
        await send_some(one, position)
        await one.send_fds([0, 0])
        await one.send_credentials()
        await one.send_all(b"x")
        await send_some(one, 2, first=position)
        await one.send_eof()
        stream = two.fds()
        assert position == 0 or await take(stream, position) == list(range(position))
        with pytest.raises(UnexpectedControlMessageError, match="2 file descriptors") as caught:
            await anext(stream)
        assert caught.value.data == b"\0"
        with pytest.raises(UnexpectedControlMessageError) as caught:
            await anext(stream)
        assert caught.value.data == b"\0"
        with pytest.raises(UnexpectedControlMessageError, match=r"got b.x.;") as caught:
            await anext(stream)
        assert caught.value.data == b"x"
        assert [size_of(fd) async for fd in stream] == [position, position + 1]


@pytest.mark.parametrize("serve", ["fds", "receive_fd", "receive_fds", "receive_message"])
async def test_fds_after_a_reset(serve: str) -> None:
    """After a reset, the messages in the queue are received first, then the error."""
    async with stdlib_peer() as peer:
        conn = peer.conn
        await conn.send_all(b"never read")
        for _ in range(3):
            await peer.ask("send", kinds=[["memfd"]])
        await peer.ask("reset")
        stream = conn.fds()
        assert await take(stream, 3) == [0, 0, 0]
        with assert_checkpoints(), pytest.raises(ConnectionBrokenError) as caught:
            if serve == "fds":
                await anext(stream)
            elif serve == "receive_message":
                await conn.receive_message(1)
            else:
                await getattr(conn, serve)(*([1] if serve == "receive_fds" else []))
        assert isinstance(caught.value.__cause__, ConnectionResetError)
        # The kernel says it once; then it is the end.
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_fds_with_a_reset_after_the_read_ahead() -> None:
    """A connection that ends with an error after the messages that were read ahead is closed."""
    async with stdlib_peer() as peer:
        await peer.conn.send_all(b"never read")
        for _ in range(3):
            await peer.ask("send", kinds=[["memfd"]])
        await peer.ask("reset")
        assert await take(peer.conn.fds(), 1) == [0]
        await peer.conn.aclose()
        with pytest.raises(ConnectionClosedError):
            await peer.conn.receive_fd()


async def test_fds_end_of_stream_with_passcred_on() -> None:
    """With SO_PASSCRED and SO_PASSPIDFD on, the end of the stream ends the loop."""
    one, two = connection_pair()
    async with one, two:
        two.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        with suppress(OSError):
            two.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 1)
        await send_some(one, 3)
        await one.send_eof()
        assert [size_of(fd) async for fd in two.fds()] == [0, 1, 2]
        assert two.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 1


async def test_fds_reads_credentials_ahead() -> None:
    """Credentials that were read ahead are those that the peer sent; the option is as it was."""
    one, two = connection_pair()
    async with one, two:
        await send_some(one, 2)
        await one.send_credentials()
        assert await take(two.fds(), 2) == [0, 1]
        assert two.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 0
        with await two.receive_message(1, credentials=True) as message:
            assert message.credentials == Credentials()


@pytest.mark.parametrize("read_ahead", [1, 2, 10, 64, 200])
async def test_fds_read_ahead(read_ahead: int) -> None:
    """Exactly read_ahead descriptors are held, if as many are in the queue."""
    one, two = connection_pair()
    async with one, two:
        await send_some(one, 250)
        before = count_open()
        stream = two.fds(read_ahead=read_ahead)
        held: list[int] = []
        for size in range(250):
            fd = await anext(stream)
            held.append(count_open() - before)
            assert size_of(fd) == size
        assert max(held) == read_ahead
        assert held[0] == read_ahead


async def test_fds_read_ahead_default() -> None:
    """The default of read_ahead is 128 messages."""
    one, two = connection_pair()
    async with one, two:
        await send_some(one, 150)
        before = count_open()
        stream = two.fds()
        assert await take(stream, 1) == [0]
        assert count_open() - before == 127
    assert _closing.wait_closed(30)
    assert count_open() == before - 2


@pytest.mark.parametrize("bad", [0, -1, 1.0, "1", None])
async def test_fds_rejects_bad_read_ahead(bad: Any) -> None:
    """A wrong read_ahead is rejected immediately."""
    one, two = connection_pair()
    async with one, two:
        with pytest.raises((TypeError, ValueError), match=r"read_ahead|integer"):
            two.fds(read_ahead=bad)


async def test_fds_one_checkpoint_for_a_burst() -> None:
    """A burst takes one checkpoint: other tasks run once for each, not for each descriptor."""
    one, two = connection_pair()
    async with one, two:
        await send_some(one, 40)
        stream = two.fds(read_ahead=10)
        turns: list[int] = []
        for _ in range(40):
            steps = Steps()
            os.close(await anext(stream))
            trio.lowlevel.remove_instrument(steps)
            turns.append(steps.count)
        assert turns == ([1] + [0] * 9) * 4


class Steps(trio.abc.Instrument):
    """Counts how often a task has gone to sleep."""

    def __init__(self) -> None:
        self.count = 0
        self.task = trio.lowlevel.current_task()
        trio.lowlevel.add_instrument(self)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Trio calls this."""
        self.count += task is self.task


async def test_fds_in_two_tasks() -> None:
    """A second task gets ConnectionBusyError, even if a descriptor is in the queue."""
    one, two = connection_pair()
    async with one, two:
        stream = two.fds()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.__anext__)
            await wait_all_tasks_blocked()
            for receive in (stream.__anext__, two.fds().__anext__, two.receive_fd):
                with pytest.raises(ConnectionBusyError):
                    await receive()
            nursery.cancel_scope.cancel()


async def test_aclose_closes_what_fds_read_ahead() -> None:
    """Closing the connection closes what was read ahead; the loop then says that it is closed."""
    one, two = connection_pair()
    async with one, two:
        await send_some(one, 10)
        stream = two.fds()
        assert await take(stream, 1) == [0]
        before = count_open()
        await two.aclose()
        assert _closing.wait_closed(30)
        assert count_open() == before - 9 - 1
        with assert_checkpoints(), pytest.raises(ConnectionClosedError):
            await anext(stream)


async def test_fds_on_a_dropped_connection() -> None:
    """A connection that is dropped closes what was read ahead, and warns how many that were."""
    one, two = connection_pair()
    async with one:
        await send_some(one, 10)
        assert await take(two.fds(), 4) == [0, 1, 2, 3]
        before = count_open()
        with pytest.warns(ResourceWarning) as caught:
            del two
        assert _closing.wait_closed(30)
        assert count_open() == before - 6 - 1
        assert any("6 file descriptors" in str(each.message) for each in caught)


class WhileReceiving(trio.abc.Instrument):
    """Closes a connection when a receive has got its answer and not yet returned."""

    def __init__(self, conn: UnixConnection) -> None:
        self.conn = conn
        trio.lowlevel.add_instrument(self)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Trio calls this."""
        if self.conn._receiver.busy:
            trio.lowlevel.remove_instrument(self)
            # What aclose() does in its first step.
            self.conn._receiver.release()
            self.conn.socket.close()


async def test_fds_while_another_task_closes() -> None:
    """A descriptor that arrives while another task closes is received or closed, never leaked."""
    one, two = connection_pair()
    async with one, two:
        await send_some(one, 3)
        WhileReceiving(two)
        with suppress(ConnectionClosedError):
            os.close(await anext(two.fds()))
        assert two.is_closed()


@contextmanager
def room_for(count: int) -> Generator[None]:
    """Let this process have ``count`` more descriptors, many more than helpers' may leave."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # All numbers below are taken, so that what counts is the limit.
    taken = [os.dup(0)]
    while taken[-1] < count_open() - 2:
        taken.append(os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (count_open() - 1 + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


@pytest.mark.parametrize("free", [1, 2, 5])
async def test_fds_with_few_free_descriptors(free: int) -> None:
    """With few descriptors free nothing is lost that would not be lost one by one."""
    one, two = connection_pair()
    async with one, two:
        await send_some(one, 30)
        with free_descriptors(free):
            stream = two.fds()
            assert [size_of(await anext(stream)) for _ in range(30)] == list(range(30))


@pytest.mark.parametrize("passpidfd", [0, 1])
@pytest.mark.parametrize("free", [254, 260, 300, 400])
async def test_fds_with_a_large_message_after_many(free: int, passpidfd: int) -> None:
    """A message of 253 after many of one is received whole if closing these frees enough slots."""
    one, two = connection_pair()
    async with one, two:
        try:
            two.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, passpidfd)
        except OSError:
            pytest.skip("this kernel has no SO_PASSPIDFD (Linux 6.5)")
        for count in (free - 253 - 10, free - 253 - 1, 20):
            small = max(0, count)
            await send_some(one, small)
            await one.send_fds([0] * 253)
            with room_for(free):
                stream = two.fds(read_ahead=200)
                got = [size_of(await anext(stream)) for _ in range(small)]
                with await two.receive_fds(253) as fds:
                    assert len(fds) == 253
            assert got == list(range(small))


async def test_receive_fds_burst_near_the_limit() -> None:
    """receive_fds leaves the large message that it cannot hold where it is."""
    one, two = connection_pair()
    async with one, two:
        await send_some(one, 40)
        await one.send_fds([0] * 253)
        with room_for(290):
            got = 0
            while got < 40:
                with await two.receive_fds(253) as fds:
                    got += len(fds)
            with await two.receive_fds(253) as fds:
                assert len(fds) == 253


@pytest.mark.parametrize("free", [300, 560])
async def test_receive_fds_near_the_limit_with_a_slow_closing_thread(
    free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Descriptors in the queue of the closing thread do not make the next receive fail."""
    held: list[int] = []
    monkeypatch.setattr(_ancillary, "close_fds", held.extend)
    one, two = connection_pair()
    async with one, two:
        await send_some(one, 40)
        await one.send_fds([0] * 253)
        with room_for(free):
            got = 0
            while got < 40:
                with await two.receive_fds(253) as fds:
                    got += len(fds)
            with await two.receive_fds(253) as fds:
                assert len(fds) == 253
    assert bool(held) == (free > 506)
    for fd in held:
        os.close(fd)


async def test_fds_in_a_unix_fd_list() -> None:
    """What the loop gives is the caller's, for a UnixFDList for instance."""
    one, two = connection_pair()
    async with one, two:
        await send_some(one, 3)
        await one.send_eof()
        with UnixFDList([fd async for fd in two.fds()]) as fds:
            assert [os.fstat(fd).st_size for fd in fds] == [0, 1, 2]


async def test_fds_without_passcred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without SO_PASSCRED, nothing is read ahead, and nothing is lost."""
    one, two = connection_pair()
    async with one, two:
        await send_some(one, 3)
        monkeypatch.setattr(_receiver, "_SOL_SOCKET", 77)
        before = count_open()
        assert await take(two.fds(), 1) == [0]
        assert count_open() == before
        assert await take(two.fds(), 2) == [1, 2]


@pytest.mark.parametrize("asked_before", [False, True])
async def test_receive_message_pidfd_after_fds_has_read_ahead(*, asked_before: bool) -> None:
    """A message with credentials that fds() read ahead still has its pidfd."""
    one, two = connection_pair()
    async with one, two:
        try:
            two.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 0)
        except OSError:
            pytest.skip("this kernel has no SO_PASSPIDFD (Linux 6.5)")
        if asked_before:
            await one.send_all(b"x")
            (await two.receive_message(1, pidfd=True)).close()
        for fds in ([], [0], [0, 0]):
            await send_some(one, 2)
            await one.send_message(b"x", fds=fds, credentials=Credentials())
            assert await take(two.fds(), 2) == [0, 1]
            assert two.has_read_ahead()
            with await two.receive_message(1, credentials=True, pidfd=True) as message:
                assert message.credentials == Credentials()
                assert len(message.fds) == len(fds)
                assert message.pidfd is not None
                assert not os.get_inheritable(message.pidfd)
                with open(f"/proc/self/fdinfo/{message.pidfd}") as file:
                    assert f"Pid:\t{os.getpid()}\n" in file
            assert two.getsockopt(socket.SOL_SOCKET, SO_PASSPIDFD) == 0


@pytest.mark.parametrize("why", ["no credentials", "another process", "exited", "unsupported"])
async def test_fds_read_ahead_without_a_certain_pidfd(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pidfd is added to what was read ahead unless it is certain that it is the sender's."""
    async with stdlib_peer() as peer:
        for _ in range(2):
            await peer.ask("send", kinds=[["memfd"]])
        # The connected process is this one, which made the socketpair.
        await peer.ask("send", kinds=[["memfd"]], credentials=why != "no credentials")
        assert await take(peer.conn.fds(), 2) == [0, 0]
        if why == "exited":

            def gone(_: object) -> int:
                raise ProcessLookupError

            monkeypatch.setattr(_receiver, "open_peer_pidfd", gone)
        elif why == "unsupported":
            monkeypatch.setattr(_receiver, "open_peer_pidfd", lambda _: None)
        try:
            message = await peer.conn.receive_message(1, pidfd=True)
        except NotSupportedError:
            pytest.skip("this kernel has no SO_PASSPIDFD (Linux 6.5)")
        with message:
            assert message.pidfd is None
            assert len(message.fds) == 1
            assert (message.credentials is None) == (why == "no credentials")


async def test_fds_read_ahead_pidfd_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc the pid of a pidfd is unknown, so it is not added."""
    one, two = connection_pair()
    async with one, two:
        await send_some(one, 2)
        await one.send_credentials()
        assert await take(two.fds(), 2) == [0, 1]

        def fail(_: int) -> int:
            raise FileNotFoundError

        monkeypatch.setattr(_receiver, "pid_of", fail)
        with await two.receive_message(1, pidfd=True) as message:
            assert message.pidfd is None
            assert message.credentials == Credentials()


async def test_fds_after_the_socket_was_closed() -> None:
    """A connection whose socket the caller closed is closed, and drops what it read ahead."""
    one, two = connection_pair()
    async with one, two:
        await send_some(one, 3)
        await one.send_fds([0, 0])
        stream = two.fds()
        assert await take(stream, 3) == [0, 1, 2]
        two.socket.close()
        with assert_checkpoints(), pytest.raises(ConnectionClosedError):
            await anext(stream)
        assert not two.has_read_ahead()
