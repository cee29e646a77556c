"""Connections on their way from one generation to the next.

A connection that is passed on has one of these states, and is this process's until it is taken:

    queued --> sent --> taken           the successor has it, and this process closes its copy
      |          |
      |          +----> queued          REFUSED: the successor has no free file descriptor
      |          +----> lost            the successor has ended: it is the caller's again
      |          +----> unknown         this process has ended the channel: it is closed here
      +--> withdrawn                    a caller that is cancelled keeps it; when it was sent, it
                                        cannot

Invariant: a connection has one owner. The successor hands one to its program only if it has it in
its own memory, and says TAKEN then. If the task that passes it on is cancelled after it was sent,
the passer owns this process's copy, and closes it when the successor has answered or has ended.

A successor that does not read, because it was stopped or computes, has not ended: it takes what was
sent when it goes on. So connections wait for it, and only the end of its side of the channel gives
them back. A drain ends that wait.
"""

from __future__ import annotations

import enum
import logging
from collections import Counter, deque
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs
import trio
from trio.lowlevel import enable_ki_protection, reschedule, wait_task_rescheduled

from .. import _kernel
from .._accept import ACCEPT_RETRY_DELAY
from .._buffers import bytes_of
from .._closing import close_fds, close_fds_batched
from .._connection import UnixConnection, accepts_descriptors
from .._fds import fileno
from .._fdtypes import open_stream
from .._owner import DescriptorOwner
from .._sockopts import raw_socket
from .._trio_task import check_task
from ..errors import (
    ConnectionClosedError,
    SendError,
    SuccessorGoneError,
    WrongDescriptorKindError,
)
from . import _protocol
from ._channel import expect_no_fds
from ._protocol import PassedConnection, ProtocolError

if TYPE_CHECKING:
    from .._buffers import Buffer
    from .._frames import Frame
    from ._channel import Channel

logger: Final = logging.getLogger("trio_unixconn.handover")

# Batches that are sent and not yet answered.
_MAX_SENT: Final = 4
# The bytes of a batch, beyond which it gets no further connection.
_MAX_BATCH_BYTES: Final = 1024 * 1024
# Connections that an iterator returns before other tasks run. To start a task for one takes about
# 50 us; so other tasks wait for 2 ms.
_MAX_BURST: Final = 32
# Connections that were received and not yet asked for; no more are received until there are fewer.
_MAX_RECEIVED: Final = 1024


class _State(enum.Enum):
    QUEUED = enum.auto()
    WITHDRAWN = enum.auto()
    SENT = enum.auto()
    TAKEN = enum.auto()
    LOST = enum.auto()
    UNKNOWN = enum.auto()


@attrs.define(eq=False)
class _Outgoing:
    fd: int
    connection: PassedConnection
    state: _State = _State.QUEUED
    # The task that waits.
    task: trio.lowlevel.Task | None = None
    # Whether no task waits any more, so that the file descriptor is closed here.
    is_abandoned: bool = False

    async def wait(self) -> None:
        """Wait until it is taken or lost; an Event for each would take twice the time."""

        def abort(_: object) -> trio.lowlevel.Abort:
            self.task = None
            return trio.lowlevel.Abort.SUCCEEDED

        self.task = trio.lowlevel.current_task()
        await wait_task_rescheduled(abort)


def _settle(items: Iterable[_Outgoing], state: _State) -> int:
    """Wake the tasks of connections; close those that no task waits for, and return their number.

    One whose task is just being cancelled is neither: the task closes or keeps it.
    """
    abandoned: list[int] = []
    for item in items:
        item.state = state
        if item.is_abandoned:
            abandoned.append(item.fd)
        elif item.task is not None:
            reschedule(item.task)
            item.task = None
    close_fds_batched(abandoned)
    return len(abandoned)


def check_stream(stream: object) -> tuple[int, bool]:
    """Return the file descriptor of a stream, and whether its peer may send file descriptors.

    Raises:
      TypeError: a stream that holds state of its own.
      ConnectionClosedError: it is closed.
      ReadAheadError: it has messages that were read ahead.
    """
    if isinstance(stream, UnixConnection):
        if stream.is_closed():
            raise ConnectionClosedError("this connection is closed")
        return fileno(stream), accepts_descriptors(stream)
    if not isinstance(stream, trio.SocketStream):
        raise TypeError(
            f"expected a trio.SocketStream or a UnixConnection, got {type(stream).__name__}; what "
            "other streams hold (encryption, bytes that were read) cannot be passed on"
        )
    if stream.socket.fileno() == -1:
        raise ConnectionClosedError("this stream is closed")
    return fileno(stream), True


def _detach(stream: trio.SocketStream | UnixConnection) -> int:
    """Return the file descriptor of a stream, which is closed by that."""
    if isinstance(stream, UnixConnection):
        return stream.detach()
    raw = raw_socket(stream.socket)
    trio.lowlevel.notify_closing(raw)
    return raw.detach()


class Passer:
    """Passes connections on to the successor."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._queue: deque[_Outgoing] = deque()
        # The batches that were sent, by their ids, in order.
        self._sent: dict[int, list[_Outgoing]] = {}
        self._next_id = 1
        self._max_batch = _kernel.SCM_MAX_FD
        self._retry_at = 0.0
        self._is_over = False
        self._is_sending = False
        self._changed = trio.lowlevel.ParkingLot()
        #: How many the successor has taken.
        self.taken: int = 0

    @enable_ki_protection
    async def pass_on(self, stream: trio.SocketStream | UnixConnection, data: Buffer) -> None:
        """Pass one connection on; see :meth:`Generation.pass_on`."""
        fd, accepts = check_stream(stream)
        if type(data) is not bytes:
            with bytes_of(data) as view:
                data = bytes(view)
        if len(data) > _protocol.MAX_DATA:
            raise ValueError(f"data must be at most {_protocol.MAX_DATA} bytes, got {len(data)}")
        if self._is_over:
            await trio.lowlevel.checkpoint()
            raise _gone()
        item = _Outgoing(fd, PassedConnection(accepts, data))
        self._queue.append(item)
        self._changed.unpark_all()
        try:
            await item.wait()
        except trio.Cancelled:
            if item.state is _State.QUEUED:
                # To remove it from the middle of a long queue would take long.
                item.state = _State.WITHDRAWN
            elif item.state is _State.SENT:
                item.is_abandoned = True
                _detach(stream)
            elif item.state in (_State.TAKEN, _State.UNKNOWN):
                close_fds_batched([_detach(stream)])
            raise
        if item.state is _State.LOST:
            raise _gone()
        if item.state is _State.UNKNOWN:
            close_fds_batched([_detach(stream)])
            raise SuccessorGoneError(
                "this generation ended the handover while the connection was sent; it is closed "
                "here, and the successor may have it"
            )
        close_fds_batched([_detach(stream)])

    def put(self, fd: int, connection: PassedConnection) -> bool:
        """Pass a connection on that no task waits for.

        If the successor ends before it has taken the connection, it is closed, and counted in the
        log.

        Returns:
          False if there is no successor any more; the file descriptor is still the caller's. If
          this returns True, it is not.
        """
        if self._is_over:
            return False
        self._queue.append(_Outgoing(fd, connection, is_abandoned=True))
        self._changed.unpark_all()
        return True

    async def wait_settled(self) -> None:
        """Wait until the successor has taken all connections, or has ended."""
        while self._queue or self._sent:
            await self._changed.park()

    async def run(self) -> None:
        """Send what is queued, until :meth:`end` is called, or this is cancelled."""
        try:
            while not self._is_over:
                delay = self._retry_at - trio.current_time()
                if delay > 0:
                    await trio.sleep(delay)
                elif self._queue and len(self._sent) < _MAX_SENT:
                    await self._send_batch()
                else:
                    await self._changed.park()
        except BaseException:
            self.end(is_successor_gone=False)
            raise

    async def _send_batch(self) -> None:
        batch: list[_Outgoing] = []
        size = 0
        while self._queue and len(batch) < self._max_batch and size < _MAX_BATCH_BYTES:
            item = self._queue.popleft()
            if item.state is _State.WITHDRAWN:
                continue
            item.state = _State.SENT
            size += len(item.connection.data)
            batch.append(item)
        if not batch:
            self._changed.unpark_all()
            return
        number = self._next_id
        self._next_id += 1
        self._sent[number] = batch
        frame = _protocol.pack_passed(number, [item.connection for item in batch])
        self._is_sending = True
        try:
            await self._channel.send_patiently(frame, [item.fd for item in batch])
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            if not getattr(exc, "sent", 0):
                self._requeue(self._sent.pop(number, []))
            # What the successor has said before its end is read first: it may have taken others.
            self._is_sending = False
            self._changed.unpark_all()
            while not self._is_over:
                await self._changed.park()
        except SendError as exc:
            if exc.sent or exc.errno not in _kernel.OUT_OF_RESOURCES:
                raise
            self._requeue(self._sent.pop(number, []))
            self._retry_at = trio.current_time() + ACCEPT_RETRY_DELAY
        finally:
            self._is_sending = False
            self._changed.unpark_all()

    def handle(self, frame: Frame) -> None:
        """Handle TAKEN or REFUSED.

        Raises:
          ProtocolError: no such batch was sent.
        """
        expect_no_fds(frame)
        batch = self._sent.pop(_protocol.unpack_id(frame.body), None)
        if batch is None:
            raise ProtocolError("expected the id of connections that were passed on")
        if frame.kind == _protocol.TAKEN:
            self.taken += len(batch)
            _settle(batch, _State.TAKEN)
        else:
            self._requeue(batch)
            if len(batch) == 1:
                self._retry_at = trio.current_time() + ACCEPT_RETRY_DELAY
        self._changed.unpark_all()

    def _requeue(self, batch: list[_Outgoing]) -> None:
        # In their order, before those that are queued.
        for item in reversed(batch):
            item.state = _State.QUEUED
            self._queue.appendleft(item)
        self._max_batch = max(1, len(batch) // 2)

    async def stop(self, *, is_successor_gone: bool) -> None:
        """Call :meth:`end` when the channel is closed and nothing is being sent any more."""
        self._is_over = True
        self._changed.unpark_all()
        while self._is_sending:
            await self._changed.park()
        self.end(is_successor_gone=is_successor_gone)

    def end(self, *, is_successor_gone: bool) -> None:
        """Give back what the successor has not taken; close what no task waits for.

        Args:
          is_successor_gone: whether its end of the channel is closed, so that it takes nothing that
            was sent. If not, what was sent is closed here.
        """
        self._is_over = True
        sent = list(chain.from_iterable(self._sent.values()))
        closed = _settle(sent, _State.LOST if is_successor_gone else _State.UNKNOWN)
        closed += _settle(self._queue, _State.LOST)
        if closed:
            logger.warning(
                "%d connections were not passed on, because the successor or this generation has "
                "ended; they are closed here",
                closed,
            )
        self._sent.clear()
        self._queue.clear()
        self._changed.unpark_all()


def _gone() -> SuccessorGoneError:
    return SuccessorGoneError("the successor has ended; the connection is still open here")


Received: TypeAlias = tuple[int, PassedConnection]
_Received: TypeAlias = deque[Received]


class PassedConnections(DescriptorOwner):
    """An async iterator over connections that were passed on to this generation.

    See :meth:`Generation.connections`.
    """

    def __init__(self) -> None:
        self._received: _Received = deque()
        # Those for servers, by the names of these; a server can have several.
        self._of_servers: dict[str, _Received] = {}
        self._is_over = False
        self._changed = trio.lowlevel.ParkingLot()
        # How many were returned since other tasks could run.
        self._burst = 0
        #: How many have arrived.
        self.count: int = 0

    def __aiter__(self) -> PassedConnections:
        return self

    @enable_ki_protection
    async def __anext__(self) -> tuple[trio.SocketStream | UnixConnection, bytes]:
        check_task()
        if self._received and self._burst < _MAX_BURST:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await trio.lowlevel.checkpoint()
            self._burst = 0
        self._burst += 1
        while True:
            if not (self._received or await self.wait_for(self._received)):
                raise StopAsyncIteration
            ((fd, connection),) = self.take(self._received, 1)
            try:
                if connection.accepts_descriptors:
                    stream = open_stream(fd)
                else:
                    stream = UnixConnection.from_fd(fd, receive_descriptors=False)
            except (WrongDescriptorKindError, ValueError) as exc:
                # Its peer has reset it meanwhile.
                logger.info("a connection that was passed on is not usable any more: %s", exc)
                close_fds([fd])
                continue
            assert isinstance(stream, (trio.SocketStream, UnixConnection))
            return stream, connection.data

    @property
    def servers(self) -> Iterable[str]:
        """The names to which connections can be passed on."""
        return self._of_servers

    def add_server(self, names: Iterable[str]) -> ConnectionsOfServer:
        """Have connections for a server of these names received."""
        received: _Received = deque()
        self._of_servers.update((name, received) for name in names)
        return ConnectionsOfServer(self, received)

    def remove_server(self, received: _Received) -> None:
        """Close the connections of a server that has ended, and those that arrive later."""
        for name in [name for name, each in self._of_servers.items() if each is received]:
            del self._of_servers[name]
        close_fds([fd for fd, _ in received])
        received.clear()
        self._changed.unpark_all()

    async def wait_for(self, received: _Received) -> bool:
        """Wait until there are connections in a queue; return False if no more arrive."""
        check_task()
        while not (received or self._is_over):
            await self._changed.park()
        return bool(received)

    def take(self, received: _Received, limit: int) -> list[Received]:
        """Take connections out of a queue."""
        found = [received.popleft() for _ in range(min(limit, len(received)))]
        self._changed.unpark_all()
        return found

    def __repr__(self) -> str:
        return f"<PassedConnections: {self.count} received, {len(self._received)} not taken>"

    async def wait_for_space(self) -> None:
        """Wait until more connections may be received."""
        check_task()
        while not self._is_over and any(
            len(each) >= _MAX_RECEIVED for each in (self._received, *self._of_servers.values())
        ):
            await self._changed.park()

    def put(self, fds: list[int], connections: list[PassedConnection]) -> None:
        """Add connections that have arrived; this owns the file descriptors."""
        unknown: Counter[str] = Counter()
        for fd, each in zip(fds, connections, strict=True):
            received = self._of_servers.get(each.server) if each.server else self._received
            if received is None:
                unknown[each.server] += 1
                close_fds([fd])
            else:
                received.append((fd, each))
        for name, count in unknown.items():
            logger.warning("%d connections of %r are closed: it is not served here", count, name)
        self.count += len(fds)
        self._changed.unpark_all()

    def end(self) -> None:
        """No more arrive; those that have arrived are still returned."""
        self._is_over = True
        self._changed.unpark_all()

    def close(self) -> None:
        """Close those that were not asked for."""
        self.end()
        for received in (self._received, *self._of_servers.values()):
            close_fds([fd for fd, _ in received])
            received.clear()


class ConnectionsOfServer(DescriptorOwner):
    """The connections that were passed on to a server of this generation."""

    def __init__(self, connections: PassedConnections, received: _Received) -> None:
        self._connections = connections
        self._received = received

    async def wait(self) -> bool:
        """Wait until there are some; return False if no more arrive."""
        return await self._connections.wait_for(self._received)

    def take(self, limit: int) -> list[Received]:
        """Take some, whose file descriptors the caller owns."""
        return self._connections.take(self._received, limit)

    def close(self) -> None:
        """Close those that were not taken, and those that arrive later."""
        self._connections.remove_server(self._received)
