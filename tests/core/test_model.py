"""The stream against a model: random operations in both directions, cancelled at random.

The model of one direction is the bytes that were sent and which file descriptors belong to which
byte. Every result and every error must account for the next bytes of the model, and for all of
their file descriptors. Hypothesis draws the steps of a state machine: an operation is started, and
goes on for some checkpoints or until it waits, while up to three others run, one for each direction
of each end. Between the steps, the bytes in the queue of each socket are those of the model. Only
public names are used.

To search longer than the suite does: ``nox -s model``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import socket
import struct
import termios
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

import attrs
import outcome
import pytest
import trio
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from trio.testing import wait_all_tasks_blocked

from trio_unixconn import (
    Cancellable,
    ConnectionBrokenError,
    ConnectionClosedError,
    Credentials,
    EndOfStreamError,
    OperationCancelled,
    ReadAheadError,
    UnexpectedControlMessageError,
    UnixConnection,
    WrongDescriptorKindError,
    connection_pair,
    testing,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# One Python is enough.
pytestmark = [pytest.mark.slow, pytest.mark.once]

# The kernel takes up to this many bytes as a whole, or none of them.
ATOMIC = 4096
# More than the buffers of a socket pair hold.
LARGE = 500_000


@attrs.define
class Direction:
    """What one end has sent and the other has not received yet.

    Attributes:
      credentials: where credentials were sent.
      read: how many bytes of ``stream`` have been received.
      certain: how many bytes of ``stream`` have been sent for certain. The others belong to a
        send that is running, or to one that was cut after an unknown number of bytes.
      cut: whether a send was cut after an unknown number of bytes.
      broken: whether a message was cut after a known number of bytes, so that its connection
        sends nothing any more.
      ended: whether the sender has sent its end of file, or closed its end.
      abandoned: whether the receiver has closed its end.
    """

    stream: bytearray = attrs.field(factory=bytearray)
    fds: dict[int, list[int]] = attrs.field(factory=dict[int, list[int]])
    credentials: set[int] = attrs.field(factory=set[int])
    read: int = 0
    certain: int = 0
    cut: bool = False
    broken: bool = False
    ended: bool = False
    abandoned: bool = False

    def sending(
        self, data: bytes, fds: list[int] | None = None, *, credentials: bool = False
    ) -> None:
        """Append what is about to be sent: bytes, and what goes with the first one."""
        if fds:
            self.fds[len(self.stream)] = fds
        if credentials:
            self.credentials.add(len(self.stream))
        self.stream += data

    def sent(self, size: int | None = None) -> None:
        """All that was about to be sent has been sent, or only ``size`` bytes of it."""
        end = len(self.stream) if size is None else self.certain + size
        assert self.read <= end, "bytes of a send that had no effect were received"
        del self.stream[end:]
        self.fds = {at: fds for at, fds in self.fds.items() if at < end}
        self.credentials = {at for at in self.credentials if at < end}
        self.certain = end

    def fds_at(self, size: int) -> list[int]:
        """Return the file descriptors of the next ``size`` bytes."""
        return [fd for at in range(self.read, self.read + size) for fd in self.fds.get(at, [])]

    def received(self, size: int, fds: list[int]) -> None:
        """Account for ``size`` bytes whose values are not known, and for file descriptors."""
        assert self.read + size <= len(self.stream), "more was received than sent"
        assert self.fds_at(size) == fds
        self.read += size

    def received_data(self, data: bytes, fds: list[int] | None = None) -> None:
        """Account for bytes, and for their file descriptors; None if those were closed."""
        assert self.stream[self.read : self.read + len(data)] == data
        self.received(len(data), self.fds_at(len(data)) if fds is None else fds)

    def end(self) -> None:
        """Account for the end of the stream."""
        assert self.ended, "the stream ended before its sender ended it"
        assert self.certain <= self.read, "the stream ended before its last byte"


class Numbers:
    """Files that are told apart by their sizes, and data that has no pattern."""

    def __init__(self) -> None:
        self._count = 0
        self._random = random.Random(1)

    def next(self) -> int:
        self._count += 1
        return self._count

    def data(self, size: int) -> bytes:
        return self._random.randbytes(size)


def open_numbered(number: int) -> int:
    fd = os.memfd_create("numbered")
    os.ftruncate(fd, number)
    return fd


def number_of(fd: int) -> int:
    assert not os.get_inheritable(fd)
    return os.fstat(fd).st_size


def take_number(fd: int) -> int:
    try:
        return number_of(fd)
    finally:
        os.close(fd)


################################################################
# Sends
################################################################


@attrs.frozen
class SendFd:
    size: Literal[1] = 1

    async def run(self, end: End, cancellable: Cancellable | None) -> None:
        with end.opened(1) as (numbers, fds):
            end.out.sending(b"\0", numbers)
            assert await end.conn.send_fd(fds[0], cancellable) is True


@attrs.frozen
class SendFds:
    count: int
    per_message: int
    size: Literal[1] = 1

    async def run(self, end: End, cancellable: Cancellable | None) -> int:
        step = self.per_message
        with end.opened(self.count) as (numbers, fds):
            for first in range(0, self.count, step):
                end.out.sending(b"\0", numbers[first : first + step])
            sent = await end.conn.send_fds(fds, per_message=step, cancellable=cancellable)
        return self.bytes_of(sent)

    def bytes_of(self, sent: int) -> int:
        """Return the number of messages, of one byte each, that have ``sent`` descriptors."""
        assert sent == self.count or sent % self.per_message == 0
        return -(-sent // self.per_message)


@attrs.frozen
class SendMessage:
    size: int
    count: int
    credentials: bool

    async def run(self, end: End, cancellable: Cancellable | None) -> None:
        data = end.numbers.data(self.size)
        credentials = Credentials() if self.credentials else None
        with end.opened(self.count) as (numbers, fds):
            end.out.sending(data, numbers, credentials=self.credentials)
            await end.conn.send_message(
                data, fds=fds, credentials=credentials, cancellable=cancellable
            )


@attrs.frozen
class SendAll:
    size: int

    async def run(self, end: End, cancellable: Cancellable | None) -> None:
        data = end.numbers.data(self.size)
        end.out.sending(data)
        await end.conn.send_all(data)


@attrs.frozen
class SendBuffer:
    size: Literal[1] = 1

    async def run(self, end: End, cancellable: Cancellable | None) -> None:
        number = end.numbers.next()
        end.out.sending(b"\0", [number])
        await end.conn.send_buffer(bytes(number), cancellable=cancellable)


@attrs.frozen
class SendCredentials:
    size: Literal[1] = 1

    async def run(self, end: End, cancellable: Cancellable | None) -> None:
        end.out.sending(b"\0", credentials=True)
        assert await end.conn.send_credentials(cancellable) is True


@attrs.frozen
class Several:
    """Sends, one after another."""

    sends: list[Send]


Send = SendFd | SendFds | SendMessage | SendAll | SendBuffer | SendCredentials


################################################################
# Receives
################################################################


@attrs.frozen
class ReceiveFd:
    """Any of the operations that take one byte with one file descriptor."""

    method: str

    async def run(self, end: End, cancellable: Cancellable | None) -> None:
        method = getattr(end.conn, self.method)
        if self.method == "receive_fd":
            number = take_number(await method(cancellable))
        elif self.method == "receive_file":
            with await method("rb", cancellable=cancellable) as file:
                number = number_of(file.fileno())
        elif self.method == "receive_buffer":
            with await method(LARGE, cancellable=cancellable) as view:
                number = len(view)
        else:
            # No socket is sent.
            await method(cancellable=cancellable)
            raise AssertionError
        end.into.received(1, [number])

    def fits(self, into: Direction, data: bytes) -> bool:
        return len(data) == 1 and len(into.fds_at(1)) == 1


@attrs.frozen
class Iterate:
    """Take up to ``count`` file descriptors out of ``fds()``."""

    count: int
    read_ahead: int

    async def run(self, end: End, cancellable: Cancellable | None) -> None:
        left = self.count
        async for fd in end.conn.fds(read_ahead=self.read_ahead):
            end.into.received(1, [take_number(fd)])
            left -= 1
            if not left:
                return
        end.into.end()

    def fits(self, into: Direction, data: bytes) -> bool:
        return len(data) == 1 and len(into.fds_at(1)) == 1


@attrs.frozen
class ReceiveFds:
    max_fds: int

    async def run(self, end: End, cancellable: Cancellable | None) -> None:
        with await end.conn.receive_fds(self.max_fds, cancellable=cancellable) as fds:
            left = [number_of(fd) for fd in fds]
        assert 1 <= len(left) <= self.max_fds
        while left:
            of_one = end.into.fds_at(1)
            assert of_one, "receive_fds went past a byte without file descriptors"
            end.into.received(1, left[: len(of_one)])
            left = left[len(of_one) :]

    def fits(self, into: Direction, data: bytes) -> bool:
        return len(data) == 1 and 1 <= len(into.fds_at(1)) <= self.max_fds


@attrs.frozen
class ReceiveSome:
    max_bytes: int
    into_buffer: bool

    async def run(self, end: End, cancellable: Cancellable | None) -> None:
        if self.into_buffer:
            buffer = bytearray(self.max_bytes)
            data = bytes(buffer[: await end.conn.receive_into(buffer)])
        else:
            data = await end.conn.receive_some(self.max_bytes)
        assert len(data) <= self.max_bytes
        end.got(data, [])

    def fits(self, into: Direction, data: bytes) -> bool:
        return not into.fds_at(len(data))


@attrs.frozen
class ReceiveMessage:
    max_bytes: int
    max_fds: int
    credentials: bool
    pidfd: bool

    async def run(self, end: End, cancellable: Cancellable | None) -> None:
        with await end.conn.receive_message(
            self.max_bytes,
            max_fds=self.max_fds,
            credentials=self.credentials,
            pidfd=self.pidfd,
            cancellable=cancellable,
        ) as message:
            assert len(message.data) <= self.max_bytes
            if self.credentials and end.into.read in end.into.credentials:
                assert message.credentials == Credentials()
            end.got(message.data, [number_of(fd) for fd in message.fds])

    def fits(self, into: Direction, data: bytes) -> bool:
        return len(into.fds_at(len(data))) <= self.max_fds


@attrs.frozen
class ReceiveCredentials:
    async def run(self, end: End, cancellable: Cancellable | None) -> None:
        credentials = await end.conn.receive_credentials(cancellable)
        assert credentials.pid == os.getpid()
        end.into.received(1, [])

    def fits(self, into: Direction, data: bytes) -> bool:
        return len(data) == 1 and not into.fds_at(1)


Receive = ReceiveFd | Iterate | ReceiveFds | ReceiveSome | ReceiveMessage | ReceiveCredentials
TAKE_NO_CANCELLABLE = (SendAll, Several, Iterate, ReceiveSome)


################################################################
# Two ends, and what runs on them
################################################################


class _Opened:
    """Numbered files that are closed as soon as the send has returned."""

    def __init__(self, numbers: list[int]) -> None:
        self._numbers = numbers
        self._fds: list[int] = []

    def __enter__(self) -> tuple[list[int], list[int]]:
        self._fds = [open_numbered(number) for number in self._numbers]
        return self._numbers, self._fds

    def __exit__(self, *_: object) -> None:
        for fd in self._fds:
            os.close(fd)


@attrs.define
class Running:
    """A running operation, and how it is cancelled: by a scope or, with a cancellable, by that."""

    cancellable: Cancellable | None = None
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    requested: bool = False
    done: trio.Event = attrs.field(factory=trio.Event)

    def cancel(self) -> None:
        self.requested = True
        if self.cancellable is None:
            self.scope.cancel()
        else:
            self.cancellable.cancel()

    async def cancel_after(self, checkpoints: int) -> None:
        for _ in range(checkpoints):
            await trio.lowlevel.checkpoint()
        self.cancel()


@attrs.define(eq=False)
class End:
    """One end of a pair, with the models of its two directions, and what runs in them."""

    conn: UnixConnection
    out: Direction
    into: Direction
    numbers: Numbers
    sending: Running | None = None
    receiving: Running | None = None

    def opened(self, count: int) -> _Opened:
        return _Opened([self.numbers.next() for _ in range(count)])

    def got(self, data: bytes, fds: list[int]) -> None:
        """Account for a read that is empty at the end of the stream."""
        if data:
            self.into.received_data(data, fds)
        else:
            assert not fds
            self.into.end()

    async def send(self, operation: Send, running: Running) -> None:
        if self.out.cut:
            # Where in the stream the next byte would be cannot be told.
            return
        conn, was_broken = self.conn, self.out.broken
        size: int | None = 0
        try:
            with running.scope:
                size = await operation.run(self, running.cancellable)
                assert not was_broken, "a send after a message that was cut"
        except (OperationCancelled, ConnectionBrokenError, ConnectionClosedError) as exc:
            if isinstance(exc, OperationCancelled):
                assert running.requested
            elif isinstance(exc, ConnectionClosedError):
                assert conn.is_closed()
            else:
                assert was_broken or self.out.abandoned
            if not was_broken:
                size = exc.sent
                if isinstance(operation, SendFds):
                    size = operation.bytes_of(size)
                elif isinstance(operation, SendMessage) and size and not conn.is_closed():
                    self.out.broken = True
        else:
            # A scope tells nothing about how much was sent.
            if size == 0 and operation.size > ATOMIC and not was_broken:
                self.out.cut = True
                return
        self.out.sent(size)

    async def receive(self, operation: Receive, running: Running) -> None:
        before = self.into.read
        conn = self.conn
        try:
            with running.scope:
                await operation.run(self, running.cancellable)
        except OperationCancelled:
            assert running.requested
            assert self.into.read == before
        except UnexpectedControlMessageError as exc:
            assert not operation.fits(self.into, exc.data), exc
            self.into.received_data(exc.data)
        except WrongDescriptorKindError:
            # Only these look at a file descriptor, which has arrived alone.
            assert isinstance(operation, ReceiveFd)
            assert operation.method != "receive_fd"
            assert operation.fits(self.into, b"\0")
            self.into.received(1, self.into.fds_at(1))
        except EndOfStreamError:
            self.into.end()
        except ConnectionClosedError:
            assert conn.is_closed()
        except ConnectionBrokenError:
            # ECONNRESET: the peer has closed its end with something unread.
            assert self.into.ended
            assert self.out.abandoned

    def detach(self) -> None:
        """Detach the connection and make another of it, unless something was read ahead."""
        read_ahead = self.conn.has_read_ahead()
        try:
            fd = self.conn.detach()
        except ReadAheadError:
            assert read_ahead
            assert not self.conn.is_closed()
        else:
            assert not read_ahead
            assert self.conn.is_closed()
            self.conn = UnixConnection.from_fd(fd)
            self.out.broken = False

    async def close(self) -> None:
        self.out.ended = True
        self.into.abandoned = True
        await self.conn.aclose()
        assert self.conn.is_closed()

    async def cancel(self, *, sends: bool = True) -> None:
        """Cancel what runs, or only what receives, and wait for it."""
        for running in (self.sending if sends else None, self.receiving):
            if running is not None:
                running.cancel()
                await running.done.wait()

    async def send_eof(self) -> None:
        self.out.ended = True
        if self.out.cut or self.out.broken:
            # After a cut message the library does not vouch for the stream.
            self.conn.socket.shutdown(socket.SHUT_WR)
        else:
            await self.conn.send_eof()

    async def drain(self) -> None:
        """Receive up to the end of the stream."""
        everything = ReceiveMessage(LARGE, max_fds=253, credentials=False, pidfd=False)
        if self.out.abandoned:
            # The kernel reports once that the peer had something unread.
            await self.receive(ReceiveSome(1, into_buffer=False), Running())
        before = -1
        while before < self.into.read:
            before = self.into.read
            await self.receive(everything, Running())

    def check_queue(self, *, is_sending: bool) -> None:
        """Compare the number of bytes that the socket and the connection hold with the model."""
        count = fcntl.ioctl(self.conn.socket.fileno(), termios.FIONREAD, bytes(4))
        (queued,) = struct.unpack("i", count)
        certain = self.into.certain - self.into.read
        possible = len(self.into.stream) - self.into.read
        if not is_sending:
            assert certain == possible
        if self.conn.has_read_ahead():
            assert queued < possible
        else:
            assert certain <= queued <= possible


class Loop:
    """A trio run in another thread, which stands still except during a call.

    So the steps of Hypothesis and those of trio alternate, and the same steps have the same result.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], Awaitable[None]] | None] = SimpleQueue()
        self._results: SimpleQueue[outcome.Outcome[None]] = SimpleQueue()
        self._thread = threading.Thread(target=trio.run, args=(self._main,))
        self._thread.start()

    async def _main(self) -> None:
        async with trio.open_nursery() as self.nursery:
            # This blocks the event loop.
            while (call := self._calls.get()) is not None:
                self._results.put(await outcome.acapture(call))
            self.nursery.cancel_scope.cancel()

    def call(self, call: Callable[[], Awaitable[None]]) -> None:
        """Run an async function in the trio thread."""
        self._calls.put(call)
        self._results.get().unwrap()

    def end(self) -> None:
        self._calls.put(None)
        self._thread.join()


@attrs.frozen
class How:
    """How an operation is run.

    Attributes:
      by_scope: what it is cancelled by, if it is: a scope, or a Cancellable.
      patience: after how many checkpoints it is cancelled; None if it is not.
      checkpoints: how many pass until the next step; None for as many as it needs to end or wait.
    """

    by_scope: bool
    patience: int | None
    checkpoints: int | None


sizes = st.one_of(st.integers(1, 3), st.just(ATOMIC), st.just(LARGE))
counts = st.integers(1, 4)
checkpoints = st.none() | st.integers(0, 4)
ends = st.integers(0, 1)
hows = st.builds(
    How,
    by_scope=st.booleans(),
    patience=st.none() | checkpoints,
    checkpoints=st.none() | checkpoints,
)
one_fd = st.sampled_from(
    ["receive_fd", "receive_file", "receive_buffer", "receive_socket", "receive_stream"]
)


several = st.lists(
    st.one_of(
        st.builds(SendFd),
        st.builds(SendFds, count=st.integers(1, 6), per_message=st.sampled_from([1, 2, 253])),
        st.builds(
            SendMessage, size=st.integers(1, 3), count=st.integers(0, 3), credentials=st.booleans()
        ),
        st.builds(SendAll, size=st.integers(1, 3)),
        st.builds(SendCredentials),
        st.builds(SendBuffer),
    ),
    min_size=2,
    max_size=5,
)


class ConnectionMachine(RuleBasedStateMachine):
    """A pair of connections, and what runs on them."""

    def __init__(self) -> None:
        super().__init__()
        self._no_leak = contextlib.ExitStack()
        self._no_leak.enter_context(testing.assert_no_fd_leak())
        self._loop = Loop()
        self._numbers = Numbers()
        self._is_drained = False
        self._has_failed = False
        self._failures: list[BaseException] = []
        self._open()

    def _open(self) -> None:
        # Calls since then: it takes some until something is running and read ahead.
        self._calls = 0
        there, back = Direction(), Direction()
        one, two = connection_pair()
        self._ends = (
            End(one, there, back, self._numbers),
            End(two, back, there, self._numbers),
        )

    def teardown(self) -> None:
        """Close everything; no file descriptor is left."""
        try:
            if not self._has_failed:
                self._call(self._end)
        finally:
            self._loop.end()
            if self._has_failed:
                for each in self._ends:
                    if not each.conn.is_closed():
                        os.close(each.conn.socket.detach())
                self._no_leak.pop_all()
            self._no_leak.close()

    async def _end(self) -> None:
        for each in self._ends:
            await each.cancel(sends=not self._is_drained)
        if self._is_drained:
            async with trio.open_nursery() as nursery:
                for each in self._ends:
                    nursery.start_soon(each.drain)
                for each in self._ends:
                    if each.sending is not None:
                        await each.sending.done.wait()
                    if not each.out.ended:
                        await each.send_eof()
        for each in self._ends:
            await each.close()

    def _call(self, function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        async def call() -> None:
            with trio.fail_after(60):
                await function(*arguments)
            if self._failures:
                raise self._failures[0]

        self._calls += 1
        try:
            self._loop.call(call)
        except BaseException:
            self._has_failed = True
            raise

    async def _run(self, end: End, operation: Send | Receive | Several, running: Running) -> None:
        try:
            if isinstance(operation, Several):
                for each in operation.sends:
                    running.scope = trio.CancelScope()
                    if not running.requested:
                        await end.send(each, running)
            elif isinstance(operation, Send):
                await end.send(operation, running)
            else:
                await end.receive(operation, running)
        except BaseException as exc:
            self._failures.append(exc)
            if isinstance(exc, trio.Cancelled):
                raise
        finally:
            if end.sending is running:
                end.sending = None
            if end.receiving is running:
                end.receiving = None
            running.done.set()

    async def _start(self, number: int, operation: Send | Receive | Several, how: How) -> None:
        end = self._ends[number]
        is_send = isinstance(operation, Send | Several)
        before = end.sending if is_send else end.receiving
        if before is not None:
            # One operation in a direction: the earlier one gets its chance.
            await wait_all_tasks_blocked()
            before.cancel()
            await before.done.wait()
        if is_send and end.out.ended:
            return
        by_scope = how.by_scope or isinstance(operation, TAKE_NO_CANCELLABLE)
        running = Running(None if by_scope else Cancellable())
        if is_send:
            end.sending = running
        else:
            end.receiving = running
        self._loop.nursery.start_soon(self._run, end, operation, running)
        if how.patience is not None:
            self._loop.nursery.start_soon(running.cancel_after, how.patience)
        await self._proceed(how.checkpoints)

    async def _proceed(self, checkpoints: int | None) -> None:
        if checkpoints is None:
            await wait_all_tasks_blocked()
        else:
            for _ in range(checkpoints):
                await trio.lowlevel.checkpoint()

    @initialize(is_drained=st.booleans())
    def choose_end(self, *, is_drained: bool) -> None:
        """Whether everything is received before the connections are closed."""
        self._is_drained = is_drained

    ############################################################
    # Sends
    ############################################################

    @rule(end=ends, how=hows)
    def send_fd(self, end: int, how: How) -> None:
        """Send one file descriptor."""
        self._call(self._start, end, SendFd(), how)

    @rule(end=ends, count=st.integers(1, 6), per_message=st.sampled_from([1, 2, 253]), how=hows)
    def send_fds(self, end: int, count: int, per_message: int, how: How) -> None:
        """Send several, in messages of one byte."""
        self._call(self._start, end, SendFds(count, per_message), how)

    @rule(end=ends, size=sizes, count=st.integers(0, 3), credentials=st.booleans(), how=hows)
    def send_message(self, end: int, size: int, count: int, how: How, *, credentials: bool) -> None:
        """Send bytes with several, and with credentials."""
        self._call(self._start, end, SendMessage(size, count, credentials), how)

    @rule(end=ends, count=st.integers(0, 3), how=hows)
    def send_large_message(self, end: int, count: int, how: How) -> None:
        """Send a message that the socket takes in parts."""
        self._call(self._start, end, SendMessage(LARGE, count, credentials=False), how)

    @rule(end=ends, size=sizes, how=hows)
    def send_all(self, end: int, size: int, how: How) -> None:
        """Send plain bytes."""
        self._call(self._start, end, SendAll(size), how)

    @rule(end=ends, how=hows)
    def send_buffer(self, end: int, how: How) -> None:
        """Send sealed memory."""
        self._call(self._start, end, SendBuffer(), how)

    @rule(end=ends, how=hows)
    def send_credentials(self, end: int, how: How) -> None:
        """Send credentials."""
        self._call(self._start, end, SendCredentials(), how)

    @rule(end=ends, sends=several, how=hows)
    def send_several(self, end: int, sends: list[Send], how: How) -> None:
        """Send small messages of any kind, one after another."""
        self._call(self._start, end, Several(sends), how)

    ############################################################
    # Receives
    ############################################################

    @rule(end=ends, method=one_fd, how=hows)
    def receive_fd(self, end: int, method: str, how: How) -> None:
        """Receive one file descriptor, as a number or as an object."""
        self._call(self._start, end, ReceiveFd(method), how)

    @rule(end=ends, count=counts, read_ahead=st.integers(1, 8), how=hows)
    def fds(self, end: int, count: int, read_ahead: int, how: How) -> None:
        """Iterate over several, which are read ahead."""
        self._call(self._start, end, Iterate(count, read_ahead), how)

    @rule(end=ends, max_fds=st.integers(1, 8), how=hows)
    def receive_fds(self, end: int, max_fds: int, how: How) -> None:
        """Receive several at once."""
        self._call(self._start, end, ReceiveFds(max_fds), how)

    @rule(end=ends, max_bytes=sizes, into_buffer=st.booleans(), how=hows)
    def receive_some(self, end: int, max_bytes: int, how: How, *, into_buffer: bool) -> None:
        """Receive plain bytes."""
        self._call(self._start, end, ReceiveSome(max_bytes, into_buffer), how)

    @rule(
        end=ends,
        max_bytes=sizes,
        max_fds=st.integers(0, 4),
        credentials=st.booleans(),
        pidfd=st.booleans(),
        how=hows,
    )
    def receive_message(
        self, end: int, max_bytes: int, max_fds: int, how: How, *, credentials: bool, pidfd: bool
    ) -> None:
        """Receive whatever it is."""
        operation = ReceiveMessage(max_bytes, max_fds, credentials, pidfd)
        self._call(self._start, end, operation, how)

    @rule(end=ends, how=hows)
    def receive_credentials(self, end: int, how: How) -> None:
        """Receive credentials."""
        self._call(self._start, end, ReceiveCredentials(), how)

    ############################################################
    # Other steps
    ############################################################

    @rule(end=ends, is_send=st.booleans(), checkpoints=checkpoints)
    def cancel(self, end: int, checkpoints: int | None, *, is_send: bool) -> None:
        """Cancel what runs in one direction of one end."""
        running = self._ends[end].sending if is_send else self._ends[end].receiving

        async def cancel() -> None:
            if running is not None:
                running.cancel()
            await self._proceed(checkpoints)

        self._call(cancel)

    @rule(checkpoints=checkpoints)
    def proceed(self, checkpoints: int | None) -> None:
        """Let everything that runs go on."""
        self._call(self._proceed, checkpoints)

    @rule(end=ends, checkpoints=checkpoints)
    def detach(self, end: int, checkpoints: int | None) -> None:
        """Detach a connection, whatever runs on it, and make another of it."""

        async def detach() -> None:
            self._ends[end].detach()
            await self._proceed(checkpoints)

        self._call(detach)

    @precondition(lambda self: self._calls >= 10)
    @rule(end=ends)
    def aclose(self, end: int) -> None:
        """Close one end, whatever runs; the other receives the rest. Then there is a new pair."""

        async def aclose() -> None:
            closed, other = self._ends[end], self._ends[1 - end]
            await closed.close()
            await closed.cancel()
            await other.cancel()
            await other.drain()
            await other.close()

        self._call(aclose)
        self._open()

    @invariant()
    def queues_are_those_of_the_model(self) -> None:
        """What was sent and not received is in the queue of the socket, or was read ahead."""
        for end, other in (self._ends, self._ends[::-1]):
            if end.receiving is None and not end.into.cut:
                try:
                    end.check_queue(is_sending=other.sending is not None)
                except BaseException:
                    self._has_failed = True
                    raise


# One failure at a time, without the phase that explains it: a shrunk program says enough, and
# programs that fail differently are many.
def test_connection_keeps_to_the_model() -> None:
    """Nothing is lost, doubled or reordered, a cancelled operation had no effect, no fd leaks."""
    run_state_machine_as_test(
        ConnectionMachine,
        settings=settings(
            max_examples=max(250, settings().max_examples),
            stateful_step_count=20,
            phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
            # A slow machine is not a failure.
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
