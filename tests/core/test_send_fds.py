"""UnixConnection.send_fds: any number, in order, and nothing sent twice or half."""

from __future__ import annotations

import errno
import io
import os
import resource
import socket
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from tests._helpers.fds import clog, drain, free_descriptors, look, sizes, some, unclog
from tests._helpers.peers import stdlib_peer
from tests._helpers.requirements import required
from trio_unixconn import (
    Cancellable,
    ConnectionBrokenError,
    ConnectionBusyError,
    ConnectionClosedError,
    DescriptorsRefusedError,
    FileDescriptor,
    OperationCancelled,
    UnixConnection,
    UnixFDList,
    connection_pair,
)

if TYPE_CHECKING:
    from collections.abc import Callable

################################################################
# Sending
################################################################


@pytest.mark.parametrize("per_message", [1, 7, 252, 253])
# Three messages at most: the suite must do with 1,024 file descriptors, and with as many in
# flight for all processes of the user.
@pytest.mark.parametrize("count", [1, 7, 8, 253, 254, 507])
async def test_send_fds_any_number(count: int, per_message: int) -> None:
    """Any number arrives in order, however many go in one message."""
    one, two = connection_pair()
    async with one, two:
        with some(count) as fds:
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    assert await one.send_fds(fds, per_message=per_message) == count

                nursery.start_soon(send)
                got: list[int] = []
                while len(got) < count:
                    with await two.receive_fds(253) as received:
                        got += sizes(received)
        assert got == list(range(count))


async def test_send_fds_messages() -> None:
    """Another process sees one NUL byte with up to per_message descriptors in each message."""
    async with stdlib_peer() as peer:
        with some(7) as fds:
            ours = [look(fd) for fd in fds]
            assert await peer.conn.send_fds(fds, per_message=3) == 7
        for expected in (ours[:3], ours[3:6], ours[6:]):
            got = await peer.ask("receive", size=100)
            assert (got["data"], got["messages"], got["fds"]) == ("00", 1, expected)


async def test_send_fds_per_message_1() -> None:
    """With per_message=1 a Gio program, or receive_fd, receives each one by itself."""
    one, two = connection_pair()
    async with one, two:
        with some(5) as fds:
            await one.send_fds(fds, per_message=1)
        for size in range(5):
            with UnixFDList([await two.receive_fd()]) as received:
                assert sizes(received) == [size]
    async with stdlib_peer() as peer:
        await peer.conn.send_fds([0, 1], per_message=1)
        for fd in (0, 1):
            assert (await peer.ask("receive"))["fds"] == [look(fd)]


async def test_send_fds_iterables() -> None:
    """Files, numbers and sockets; a list, or a generator, which is read once."""
    one, two = connection_pair()
    async with one, two:
        with open(os.devnull) as file, socket.socket() as sock:
            given: list[FileDescriptor] = [file, sock, 0, trio.socket.from_stdlib_socket(sock)]
            assert await one.send_fds(each for each in given) == 4
        with await two.receive_fds(4) as got:
            assert len(got) == 4


async def test_send_fds_empty() -> None:
    """Without file descriptors, nothing is sent; it is a checkpoint."""
    one, two = connection_pair()
    async with one, two:
        with assert_checkpoints():
            assert await one.send_fds([]) == 0
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


async def test_send_fds_empty_cancelled() -> None:
    """A Cancellable that is cancelled already raises even if nothing is to be sent."""
    one, two = connection_pair()
    cancellable = Cancellable()
    cancellable.cancel()
    async with one, two:
        with assert_checkpoints(), pytest.raises(OperationCancelled):
            await one.send_fds([], cancellable=cancellable)


async def test_send_fds_empty_closed() -> None:
    """A closed connection raises even if nothing is to be sent."""
    one, two = connection_pair()
    async with one, two:
        pass
    with assert_checkpoints(), pytest.raises(ConnectionClosedError):
        await one.send_fds([])


@pytest.mark.parametrize(
    ("fds", "per_message", "error", "text"),
    [
        ([0], 0, ValueError, "per_message must be from 1 to 253, got 0"),
        ([0], 254, ValueError, "per_message must be from 1 to 253, got 254"),
        ([0], -1, ValueError, "got -1"),
        ([0], 1.0, TypeError, "float"),
        ([0], None, TypeError, "NoneType"),
        ([0, 0, True], 1, TypeError, r"fds\[2\]: expected a file descriptor .*, got bool"),
        ([0, "0"], 253, TypeError, r"fds\[1\]: .* got str"),
        ([-1], 253, ValueError, r"fds\[0\]: file descriptor cannot be a negative integer \(-1\)"),
        ([0, 2**31], 253, ValueError, r"fds\[1\]: .* out of range \(2147483648\)"),
        ([0, io.BytesIO()], 253, ValueError, r"fds\[1\]: fileno"),
        (0, 253, TypeError, "fds must be an iterable of file descriptors, got int"),
    ],
)
async def test_send_fds_bad_arguments(
    fds: Any, per_message: Any, error: type[Exception], text: str
) -> None:
    """Wrong arguments raise with the position, before anything is sent."""
    one, two = connection_pair()
    async with one, two:
        with pytest.raises(error, match=text):
            await one.send_fds(fds, per_message=per_message)
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


@required(os.geteuid() == 0, "only root may have more descriptors in flight than RLIMIT_NOFILE")
async def test_send_fds_above_the_limit() -> None:
    """More file descriptors than RLIMIT_NOFILE allows by now are checked, and sent."""
    one, two = connection_pair()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fds = [os.dup(0) for _ in range(50)]
    async with one, two:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (20, hard))
            assert await one.send_fds(fds, per_message=25) == 50
            os.close(fds.pop())
            with pytest.raises(OSError, match="closed"):
                await one.send_fds([*fds, 19999], per_message=25)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in fds:
                os.close(fd)
        with await two.receive_fds(50) as received:
            assert len(received) == 50


@pytest.mark.parametrize("per_message", [1, 2, 253])
async def test_send_fds_rejects_closed_fd(per_message: int) -> None:
    """A closed file descriptor anywhere is EBADF before anything is sent."""
    one, two = connection_pair()
    closed = os.dup(0)
    os.close(closed)
    async with one, two:
        with pytest.raises(OSError, match="closed") as caught:
            await one.send_fds([0, 0, 0, closed, 0], per_message=per_message)
        assert caught.value.errno == errno.EBADF
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


class Refusing:
    """A socket whose sendmsg fails from the n-th message on."""

    def __init__(self, sock: socket.socket, after: int, number: int) -> None:
        self.sock = sock
        self.after = after
        self.number = number

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def sendmsg(self, *arguments: Any) -> int:
        if not self.after:
            raise OSError(self.number, os.strerror(self.number))
        self.after -= 1
        return self.sock.sendmsg(*arguments)


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.EPIPE, ConnectionBrokenError), (errno.EPERM, DescriptorsRefusedError)],
)
async def test_send_fds_rejected_in_a_burst(
    number: int, error: type[ConnectionBrokenError]
) -> None:
    """If the kernel rejects a message of a burst, .sent counts those before it."""
    one, two = connection_pair()
    async with one, two:
        raw = one._sender.raw
        one._sender.raw = Refusing(raw, 3, number)  # type: ignore[assignment]
        with pytest.raises(error) as caught:
            await one.send_fds([0] * 10, per_message=2)
        assert await drain(two, 6) == [os.fstat(0).st_size] * 6
        assert caught.value.sent == 6


async def blocked(
    one: UnixConnection,
    two: UnixConnection,
    end: Callable[[], object] | None = None,
    **arguments: Any,
) -> tuple[list[Any], list[int]]:
    """Send until the socket is full, and then end it; return the results, and what arrived."""
    results: list[Any] = []
    count = 300

    async def send() -> None:
        fds = some(count)
        with fds:
            try:
                results.append(await one.send_fds(fds, per_message=1, **arguments))
            except (OperationCancelled, ConnectionBrokenError) as exc:
                results.append(exc)
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            results.append("cancelled")
            raise

    got: list[int] = []
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        # Make some space, so that it does not end in the first burst.
        got += await drain(two, 10)
        await wait_all_tasks_blocked()
        if end is None:
            nursery.cancel_scope.cancel()
        else:
            end()
    return results, got


async def rest(conn: UnixConnection, count: int) -> list[int]:
    """Return the sizes of that many more, after which there must be nothing."""
    got = await drain(conn, count)
    with trio.move_on_after(0) as scope:
        await conn.receive_some()
    assert scope.cancelled_caught
    return got


async def test_send_fds_cancelled_by_trio_after_a_part() -> None:
    """If trio cancels it after a part, it returns how many; the next checkpoint raises."""
    one, two = connection_pair()
    async with one, two:
        results, got = await blocked(one, two)
        sent, then = results
        assert 10 < sent < 300
        assert then == "cancelled"
        assert got + await rest(two, sent - len(got)) == list(range(sent))
        # Nothing is half sent.
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


async def test_send_fds_cancelled_by_cancellable_after_a_part() -> None:
    """If a Cancellable is cancelled after a part, OperationCancelled has the number."""
    one, two = connection_pair()
    cancellable = Cancellable()
    async with one, two:
        (error,), got = await blocked(one, two, cancellable.cancel, cancellable=cancellable)
        assert isinstance(error, OperationCancelled)
        assert 10 < error.sent < 300
        assert got + await rest(two, error.sent - len(got)) == list(range(error.sent))


async def test_send_fds_peer_closes_after_a_part() -> None:
    """If the peer closes after a part, ConnectionBrokenError has what the kernel took."""
    one, two = connection_pair()
    async with one, two:
        (error,), got = await blocked(one, two, two.socket.close)
        assert isinstance(error, ConnectionBrokenError)
        assert len(got) < error.sent < 300


@pytest.mark.parametrize("way", ["scope", "cancellable", "before"])
async def test_send_fds_cancelled_before_the_first(way: str) -> None:
    """Cancelled before the first message, nothing is sent, and Cancelled stays Cancelled."""
    one, two = connection_pair()
    cancellable = Cancellable()
    if way == "before":
        cancellable.cancel()
    results: list[Any] = []

    async def send() -> None:
        try:
            results.append(await one.send_fds([0] * 300, cancellable=cancellable))
        except OperationCancelled as exc:
            results.append(exc.sent)
        except trio.Cancelled:
            results.append("cancelled")
            raise

    async with one, two:
        count = clog(one)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel() if way == "scope" else cancellable.cancel()
        assert results == ["cancelled" if way == "scope" else 0]
        await unclog(two, count)
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


async def test_send_fds_originals_closed_while_it_waits() -> None:
    """While it waits, the caller may close the file descriptors and reuse the numbers."""
    one, two = connection_pair()
    fds = some(10)
    async with one, two:
        count = clog(one)
        async with trio.open_nursery() as nursery:
            numbers = list(fds)
            nursery.start_soon(lambda: one.send_fds(numbers, per_message=3))
            await wait_all_tasks_blocked()
            fds.close()
            wrong = UnixFDList([os.memfd_create("wrong") for _ in numbers])
            assert sorted(wrong) == sorted(numbers)
            await unclog(two, count)
        wrong.close()
        assert await drain(two, 10) == list(range(10))


async def test_send_fds_without_a_free_fd() -> None:
    """Without free file descriptors for the duplicates nothing is sent, and nothing leaks."""
    one, two = connection_pair()
    async with one, two:
        count = clog(one)
        fds = [os.dup(0) for _ in range(10)]
        with (
            free_descriptors(3),
            pytest.raises(OSError, match="nothing was sent") as caught,
        ):
            await one.send_fds(fds)
        assert caught.value.errno == errno.EMFILE
        for fd in fds:
            os.close(fd)
        await unclog(two, count)
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


async def test_send_fds_same_fd_often() -> None:
    """While it waits, a file descriptor that is sent many times is duplicated once."""
    one, two = connection_pair()
    async with one, two, trio.open_nursery() as nursery:
        count = clog(one)
        with free_descriptors(1):
            nursery.start_soon(one.send_fds, [0] * 10)
            await wait_all_tasks_blocked()
        await unclog(two, count)
        with await two.receive_fds(10) as fds:
            assert len(fds) == 10


async def test_send_fds_two_tasks() -> None:
    """If two tasks send, or receive, at the same time, the second one gets an error."""
    one, two = connection_pair()
    async with one, two:
        clog(one)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send_fds, [0])
            nursery.start_soon(one.receive_fds, 1)
            await wait_all_tasks_blocked()
            with pytest.raises(ConnectionBusyError):
                await one.send_fds([0])
            with pytest.raises(ConnectionBusyError):
                await one.receive_fds(1)
            nursery.cancel_scope.cancel()


class BeforeTheTasks(trio.abc.Instrument):
    """Does something once, when the kernel has reported events and before a task sees them."""

    def __init__(self, do: Callable[[], object]) -> None:
        self.do = do
        trio.lowlevel.add_instrument(self)

    def after_io_wait(self, timeout: float) -> None:
        """Trio calls this."""
        trio.lowlevel.remove_instrument(self)
        self.do()


async def test_send_fds_woken_while_full() -> None:
    """A burst that is woken for space that another writer took continues to wait."""
    one, two = connection_pair()
    async with one, two:
        count = clog(one)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send_fds, [0, 0])
            await wait_all_tasks_blocked()
            while count:
                count -= len(two._receiver.raw.recv(min(65536, count)))
            counts: list[int] = []
            BeforeTheTasks(lambda: counts.append(clog(one)))
            await wait_all_tasks_blocked()
            await unclog(two, counts[0])
        with await two.receive_fds(2) as fds:
            assert len(fds) == 2
