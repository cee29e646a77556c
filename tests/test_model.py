"""The stream against a model: random operations in both directions, cancelled at random.

The model of one direction is the bytes that were sent and which file descriptors belong to which
byte. Every result and every error must account for the next bytes of the model, and for all of
their file descriptors. Hypothesis draws a program: rounds of up to four operations that run at the
same time, one for each direction of each end. Only public names are used.

To search longer than the suite does: ``nox -s model``.
"""

from __future__ import annotations

import os
import random
import socket
from typing import Any, Literal

import attrs
import pytest
import trio
from hypothesis import Phase, given, settings, strategies as st
from trio.testing import wait_all_tasks_blocked

from trio_unixconn import (
    Cancellable,
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

# One Python is enough.
pytestmark = pytest.mark.once

# The kernel takes up to this many bytes as a whole, or none of them.
ATOMIC = 4096
# More than the buffers of a socket pair hold.
LARGE = 500_000


@attrs.define
class Direction:
    """What one end has sent and the other has not received yet.

    Attributes:
      read: how many bytes of ``stream`` have been received.
      certain: how many bytes of ``stream`` have been sent for certain. The others belong to a
        send that is running, or to one that was cut after an unknown number of bytes.
      cut: whether a send was cut after an unknown number of bytes.
      ended: whether the sender has sent its end of file.
    """

    stream: bytearray = attrs.field(factory=bytearray)
    fds: dict[int, list[int]] = attrs.field(factory=dict[int, list[int]])
    read: int = 0
    certain: int = 0
    cut: bool = False
    ended: bool = False

    def sending(self, data: bytes, fds: list[int] | None = None) -> None:
        """Append what is about to be sent: bytes, and file descriptors with the first one."""
        if fds:
            self.fds[len(self.stream)] = fds
        self.stream += data

    def sent(self, size: int | None = None) -> None:
        """All that was about to be sent has been sent, or only ``size`` bytes of it."""
        end = len(self.stream) if size is None else self.certain + size
        assert self.read <= end, "bytes of a send that had no effect were received"
        del self.stream[end:]
        self.fds = {at: fds for at, fds in self.fds.items() if at < end}
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
            try:
                sent = await end.conn.send_fds(fds, per_message=step, cancellable=cancellable)
            except OperationCancelled as exc:
                sent = exc.sent
        assert sent == self.count or sent % step == 0
        return -(-sent // step)


@attrs.frozen
class SendMessage:
    size: int
    count: int
    credentials: bool

    async def run(self, end: End, cancellable: Cancellable | None) -> None:
        data = end.numbers.data(self.size)
        credentials = Credentials() if self.credentials else None
        with end.opened(self.count) as (numbers, fds):
            end.out.sending(data, numbers)
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
        end.out.sending(b"\0")
        assert await end.conn.send_credentials(cancellable) is True


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
TAKE_NO_CANCELLABLE = (SendAll, Iterate, ReceiveSome)


################################################################
# Two ends, and a program for them
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
class End:
    """One end of a pair, with the models of its two directions."""

    conn: UnixConnection
    out: Direction
    into: Direction
    numbers: Numbers

    def opened(self, count: int) -> _Opened:
        return _Opened([self.numbers.next() for _ in range(count)])

    def got(self, data: bytes, fds: list[int]) -> None:
        """Account for a read that is empty at the end of the stream."""
        if data:
            self.into.received_data(data, fds)
        else:
            assert not fds
            self.into.end()

    async def send(self, operation: Send, stop: Stop) -> None:
        if self.out.cut:
            # Nobody can tell where in the stream the next byte would be.
            return
        size: int | None = 0
        try:
            with stop.scope:
                size = await operation.run(self, stop.cancellable)
        except OperationCancelled:
            assert stop.requested
        if size == 0 and operation.size > ATOMIC:
            self.out.cut = True
        else:
            self.out.sent(size)

    async def receive(self, operation: Receive, stop: Stop) -> None:
        before = self.into.read
        try:
            with stop.scope:
                await operation.run(self, stop.cancellable)
        except OperationCancelled:
            assert stop.requested
            assert self.into.read == before
        except UnexpectedControlMessageError as exc:
            assert not operation.fits(self.into, exc.data), exc
            self.into.received_data(exc.data)
        except WrongDescriptorKindError:
            # Only these look at a file descriptor, which has come alone.
            assert isinstance(operation, ReceiveFd)
            assert operation.method != "receive_fd"
            assert operation.fits(self.into, b"\0")
            self.into.received(1, self.into.fds_at(1))
        except EndOfStreamError:
            self.into.end()

    def rewrap(self) -> None:
        """Detach the connection and make another of it, unless something was read ahead."""
        read_ahead = self.conn.has_read_ahead()
        try:
            fd = self.conn.detach()
        except ReadAheadError:
            assert read_ahead
            assert not self.conn.is_closed()
        else:
            assert not read_ahead
            self.conn = UnixConnection.from_fd(fd)

    async def end(self) -> None:
        self.out.ended = True
        if self.out.cut:
            # After a cut message the library does not vouch for the stream.
            self.conn.socket.shutdown(socket.SHUT_WR)
        else:
            await self.conn.send_eof()

    async def drain(self) -> None:
        """Receive up to the end of the stream."""
        everything = ReceiveMessage(LARGE, max_fds=253, credentials=False, pidfd=False)
        before = -1
        while before < self.into.read:
            before = self.into.read
            await self.receive(everything, Stop(None))


@attrs.define
class Stop:
    """How an operation is cancelled: by a trio scope or, with a cancellable, by that."""

    cancellable: Cancellable | None
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    requested: bool = False

    def now(self) -> None:
        self.requested = True
        if self.cancellable is None:
            self.scope.cancel()
        else:
            self.cancellable.cancel()

    async def after(self, checkpoints: int) -> None:
        for _ in range(checkpoints):
            await trio.lowlevel.checkpoint()
        self.now()


@attrs.frozen
class Step:
    """An operation of one end in one direction.

    Attributes:
      patience: after how many checkpoints it is cancelled; None if only when nothing goes on.
    """

    end: int
    operation: Send | Receive
    by_scope: bool
    patience: int | None

    @property
    def lane(self) -> tuple[int, bool]:
        return self.end, isinstance(self.operation, Send)


@attrs.frozen
class Rewrap:
    end: int


Program = list["list[Step] | Rewrap"]


async def run_steps(ends: tuple[End, End], steps: list[Step]) -> None:
    """Run operations at the same time; cancel those that wait when none goes on."""
    stops: list[Stop] = []
    async with trio.open_nursery() as nursery:
        for step in steps:
            by_scope = step.by_scope or isinstance(step.operation, TAKE_NO_CANCELLABLE)
            stop = Stop(None if by_scope else Cancellable())
            stops.append(stop)
            end = ends[step.end]
            perform: Any = end.send if isinstance(step.operation, Send) else end.receive
            nursery.start_soon(perform, step.operation, stop)
            if step.patience is not None:
                nursery.start_soon(stop.after, step.patience)
        await wait_all_tasks_blocked()
        for stop in stops:
            stop.now()


async def run_program(program: Program, *, drain: bool) -> None:
    there, back = Direction(), Direction()
    numbers = Numbers()
    one, two = connection_pair()
    ends = End(one, there, back, numbers), End(two, back, there, numbers)
    try:
        for each in program:
            if isinstance(each, Rewrap):
                ends[each.end].rewrap()
            else:
                await run_steps(ends, each)
        if drain:
            for end in ends:
                await end.end()
            for end in ends:
                await end.drain()
    finally:
        for end in ends:
            await end.conn.aclose()


sizes = st.one_of(st.integers(1, 3), st.just(ATOMIC), st.just(LARGE))
counts = st.integers(1, 4)
sends = st.one_of(
    st.builds(SendFd),
    st.builds(SendFds, count=st.integers(1, 6), per_message=st.sampled_from([1, 2, 253])),
    st.builds(SendMessage, size=sizes, count=st.integers(0, 3), credentials=st.booleans()),
    st.builds(SendAll, size=sizes),
    st.builds(SendCredentials),
    st.builds(SendBuffer),
)
one_fd = ["receive_fd", "receive_file", "receive_buffer", "receive_socket", "receive_stream"]
receives = st.one_of(
    st.builds(ReceiveFd, method=st.sampled_from(one_fd)),
    st.builds(Iterate, count=counts, read_ahead=st.integers(1, 8)),
    st.builds(ReceiveFds, max_fds=st.integers(1, 8)),
    st.builds(ReceiveSome, max_bytes=sizes, into_buffer=st.booleans()),
    st.builds(
        ReceiveMessage,
        max_bytes=sizes,
        max_fds=st.integers(0, 4),
        credentials=st.booleans(),
        pidfd=st.booleans(),
    ),
    st.builds(ReceiveCredentials),
)
ends = st.integers(0, 1)
steps = st.builds(
    Step,
    end=ends,
    operation=sends | receives,
    by_scope=st.booleans(),
    patience=st.none() | st.integers(0, 4),
)
programs = st.lists(
    st.lists(steps, min_size=1, max_size=4, unique_by=lambda step: step.lane)
    | st.builds(Rewrap, end=ends),
    max_size=20,
)


# One failure at a time, without the phase that explains it: a shrunk program says enough, and
# programs that fail differently are many.
@settings(
    max_examples=max(300, settings().max_examples),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    report_multiple_bugs=False,
)
@given(program=programs, drain=st.booleans())
def test_connection_keeps_to_the_model(program: Program, *, drain: bool) -> None:
    """Nothing is lost, doubled or reordered, a cancelled operation had no effect, no fd leaks."""

    async def main() -> None:
        with trio.fail_after(60):
            await run_program(program, drain=drain)

    with testing.assert_no_fd_leak():
        trio.run(main)
