"""A worker, as its pool sees it: what it was sent, what it has acknowledged, how it is doing.

The rule of this file: each delivery that was handed to a link is, at every moment, in one of
three places: on its way (``batch``), acknowledged (``in_flight``), or with its pool again.

A worker is sent a batch when it asks for more, which it does when the handlers of the last one
have begun and nobody computes there. One that computes is sent nothing: what is to be done waits
in the pool, where any worker can have it.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
from typing import TYPE_CHECKING, Final, Protocol

import trio

from .. import _kernel
from .._owner import DescriptorOwner
from ..errors import (
    HandlerError,
    UnixConnectionError,
    WorkerDiedError,
    WorkerStartError,
)
from . import _protocol
from ._pending import JobReceipt, PendingJob
from ._process import WorkerProcess, ending_of

if TYPE_CHECKING:
    from collections.abc import Iterable

_READ: Final = 65536
# How many jobs go in one message. More would only wait in the worker, where no other can have
# them.
_MOST: Final = 64
_NO_ROOM_PAUSE: Final = 0.05
# What a worker may take to end, once its jobs are finished or their time is up.
_END_TIME: Final = 5.0


class Owner(Protocol):
    """What a link tells its pool."""

    def pump(self) -> None:
        """There may be room for jobs now."""

    def take_back(self, deliveries: list[PendingJob], why: Exception, *, counts: bool) -> None:
        """A worker has not acknowledged these; whether that counts as a try of theirs."""

    def give_up(self, deliveries: list[PendingJob], why: str) -> None:
        """These can be sent to nobody."""

    def refused(self, link: WorkerHandle) -> None:
        """A worker had no descriptor free, and rests until it is told that it need not."""

    def acknowledged(self, link: WorkerHandle, count: int) -> None:
        """So many jobs were taken."""

    def handled(self, link: WorkerHandle, count: int) -> None:
        """So many handlers have returned."""

    def failed(self, link: WorkerHandle, number: int, text: str, *, awaited: bool) -> None:
        """A handler has raised, or a job could not be given its stream."""

    def abandoned(self, link: WorkerHandle, numbers: Iterable[int]) -> None:
        """A worker has died while it was handling these."""

    def leaving(self, link: WorkerHandle) -> None:
        """A worker wants to be replaced."""

    def ended(self, link: WorkerHandle) -> None:
        """A worker is no more."""


class WorkerHandle(DescriptorOwner):
    """One worker.

    Attributes:
      index: its place in the pool.
      state: "starting", "ready", "draining", "ended".
      batch: what was handed to it, and is not acknowledged.
      in_flight: what it has acknowledged, and not finished: by number, the delivery if its
        answer is awaited.
      limit: how many jobs it may be handed at once.
      recent: how many jobs it was handed lately; the dispatcher counts.
      wants_more: whether it has asked for jobs, and got none since.
      resting: whether it has just refused a job, for want of descriptors.
      error: why it has ended, or could not start.
      last_heard: when it last said something, in trio's time.
      started: when it was ready, in trio's time.
    """

    def __init__(self, index: int, process: WorkerProcess, owner: Owner) -> None:
        self.index: int = index
        self.process = process
        self.pid: int = process.pid
        self.state: str = "starting"
        self.batch: list[PendingJob] = []
        self.in_flight: dict[int, PendingJob | None] = {}
        self.limit: int = _MOST
        self.resting: bool = False
        self.error: Exception | None = None
        self.last_heard: float = trio.current_time()
        self.started: float = math.inf
        self.taken: int = 0
        self.recent: int = 0
        self.handled: int = 0
        self.failed: int = 0
        self.settled: trio.Event = trio.Event()
        self.gone: trio.Event = trio.Event()
        self._owner = owner
        self.wants_more: bool = True
        self._number = 0
        self._is_sent = True
        self._orders: list[bytes] = []
        self._something = trio.lowlevel.ParkingLot()
        self._killed_for: str | None = None

    ################################################################
    # For the pool
    ################################################################

    def has_room(self, most: int) -> bool:
        """Whether it can be handed a job now, if ``most`` may be in flight."""
        return (
            self.state == "ready"
            and self._is_sent
            and self.wants_more
            and not self.resting
            and len(self.in_flight) < most
        )

    def hand_over(self, deliveries: list[PendingJob]) -> None:
        """Send jobs, of which there are none on their way."""
        for delivery in deliveries:
            delivery.sent = True
        self.batch = deliveries
        self.wants_more = False
        self._is_sent = False
        self._something.unpark()

    def cancel_job(self, number: int) -> None:
        """Have the handler of a job cancelled."""
        self._order(_protocol.ids(_protocol.CANCEL, [number]))

    def kill(self, why: str) -> None:
        """Kill the worker."""
        self._killed_for = self._killed_for or why
        self.process.kill()

    def ask_to_leave(self, timeout: float) -> None:
        """Have the worker finish its jobs and end; after ``timeout`` its handlers are cancelled.

        Of several timeouts the one that is up first counts.
        """
        if self.state != "ended":
            self.state = "draining"
            self._order(_protocol.seconds(_protocol.DRAIN, timeout))

    async def leave(self, timeout: float, end_time: float | None = None) -> None:
        """Ask the worker to leave, and wait until it is gone; it is killed if that takes too long.

        Args:
          end_time: what it may take behind ``timeout``, in seconds.
        """
        self.ask_to_leave(timeout)
        with trio.move_on_after(timeout + (_END_TIME if end_time is None else end_time)):
            await self.gone.wait()
            return
        self.kill("did not end in time when it was asked to")
        await self.gone.wait()

    def _order(self, order: bytes) -> None:
        self._orders.append(order)
        self._something.unpark()

    ################################################################
    # Its life
    ################################################################

    async def run(self) -> None:
        """Be there for the worker until it has ended, which nothing but its end ends."""
        with trio.CancelScope(shield=True):
            try:
                await self._live()
            finally:
                self.process.kill()
                self._bury(await self.process.wait())

    async def _live(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send, name="trio_unixconn.pool send")
            received = trio.Event()
            nursery.start_soon(self._receive, received, name="trio_unixconn.pool receive")
            await self.process.wait()
            # What it has said before is still to be heard. Behind that comes the end, also if a
            # child of its own holds the other end.
            with contextlib.suppress(OSError):
                self.process.conn.socket.shutdown(trio.socket.SHUT_RD)
            await received.wait()
            nursery.cancel_scope.cancel()

    def _bury(self, status: int) -> None:
        self.state = "ended"
        ending = ending_of(status)
        if self._killed_for:
            ending = f"{self._killed_for}, and {ending}"
        who = f"worker {self.index} (pid {self.pid})"
        if self.error is None and self.started == math.inf:
            self.error = WorkerStartError(f"{who} {ending} before it was ready")
        elif self.error is None:
            self.error = WorkerDiedError(f"{who} {ending}")
        batch, self.batch = self.batch, []
        in_flight, self.in_flight = self.in_flight, {}
        if batch:
            self._owner.take_back(batch, self.error, counts=True)
        for delivery in in_flight.values():
            if delivery is not None:
                delivery.settle(WorkerDiedError(f"{self.error} while it handled job {delivery.id}"))
        # What it had finished and could not tell any more was not being handled.
        noted = self.process.board.entries() if in_flight else ()
        # All at once, and nobody else takes what is free then before a new worker is due.
        self.process.close()
        abandoned = [number for number in in_flight if number not in noted]
        if len(abandoned) < len(in_flight):
            self.handled += len(in_flight) - len(abandoned)
            self._owner.handled(self, len(in_flight) - len(abandoned))
        self.settled.set()
        self.gone.set()
        self._owner.ended(self)
        # At the end, as it calls what is not ours, and may raise.
        if abandoned:
            self._owner.abandoned(self, abandoned)

    async def _send(self) -> None:
        conn = self.process.conn
        while True:
            if self._is_sent and not self._orders:
                await self._something.park()
            try:
                # Orders behind: no job may follow what has a worker drain.
                if not self._is_sent:
                    await self._send_batch()
                while self._orders:
                    await conn.send_all(self._orders.pop(0))
            except UnixConnectionError:
                # It has died, which is found out elsewhere.
                await trio.sleep_forever()

    async def _send_batch(self) -> None:
        self._number += 1
        while True:
            batch = self.batch
            if not batch:
                # All were given up, and nothing was sent that is answered.
                self.wants_more = True
                break
            fds = [each.fd for each in batch if each.fd >= 0]
            message = _protocol.jobs(self._number, batch, carries=bool(fds))
            try:
                await self.process.conn.send_message(message, fds=fds)
            except OSError as exc:
                if exc.errno == errno.EBADF:
                    self._give_up_closed()
                elif exc.errno in _kernel.OUT_OF_RESOURCES:
                    # Mostly no file descriptor is free for the duplicates that wait.
                    await trio.sleep(_NO_ROOM_PAUSE)
                else:
                    raise
            else:
                break
        self._is_sent = True
        if self.wants_more:
            # It has said so before this task came to run again.
            self._owner.pump()

    def _give_up_closed(self) -> None:
        """Give up jobs whose descriptors somebody has closed, who did not own them any more."""
        closed: list[PendingJob] = []
        for each in self.batch:
            try:
                os.get_inheritable(each.fd)
            except OSError:
                if each.fd >= 0:
                    each.fd = -1
                    closed.append(each)
        self.batch = [each for each in self.batch if each not in closed]
        self._owner.give_up(
            closed, "its descriptor was closed, which was the pool's since it was submitted"
        )

    async def _receive(self, received: trio.Event) -> None:
        decoder = _protocol.Decoder()
        conn = self.process.conn
        try:
            while True:
                try:
                    data = await conn.receive_some(_READ)
                except UnixConnectionError:
                    break
                if not data:
                    break
                self.last_heard = trio.current_time()
                for kind, body, _ in decoder.feed(data, []):
                    self._heard(kind, body)
        except _protocol.ProtocolError as exc:
            self.kill(f"said what no worker says ({exc})")
        received.set()

    def _heard(self, kind: int, body: bytes) -> None:
        hear = _HEARS.get(kind)
        if hear is None:
            raise _protocol.ProtocolError(f"a frame of kind {kind}")
        hear(self, body)

    def _ready(self, _: bytes) -> None:
        # If not, it comes too late.
        if self.state == "starting":
            self.state = "ready"
            self.started = trio.current_time()
            self.settled.set()

    def _failed_to_start(self, body: bytes) -> None:
        text = body.decode(errors="replace")
        self.error = WorkerStartError(f"worker {self.index} could not start", text)
        self.settled.set()

    def _done(self, body: bytes) -> None:
        numbers = _protocol.read_ids(body)
        for number in numbers:
            self.in_flight.pop(number, None)
        self.handled += len(numbers)
        self._owner.handled(self, len(numbers))

    def _answered(self, body: bytes) -> None:
        number, answer = _protocol.read_about(body)
        delivery = self.in_flight.pop(number, None)
        if delivery is None:
            raise _protocol.ProtocolError(f"an answer to job {number}, where none is due")
        # First who waits is told: what the owner does then is about others.
        delivery.settle(answer)
        self.handled += 1
        self._owner.handled(self, 1)

    def _failed(self, body: bytes) -> None:
        number, said = _protocol.read_about(body)
        text = said.decode(errors="replace")
        delivery = self.in_flight.pop(number, None)
        if delivery is not None:
            delivery.settle(HandlerError(f"the handler of job {number} failed", text))
        self.failed += 1
        self._owner.failed(self, number, text, awaited=delivery is not None)

    def _more(self, _: bytes) -> None:
        self.wants_more = True
        self._owner.pump()

    def _leaving(self, _: bytes) -> None:
        self._owner.leaving(self)

    def _beat(self, _: bytes) -> None:
        """That it came was noted with whatever came."""

    def _taken(self, body: bytes) -> None:
        self._check_number(body)
        deliveries, self.batch = self.batch, []
        for delivery in deliveries:
            delivery.close()
            self.in_flight[delivery.id] = delivery if delivery.wants_answer else None
            if not delivery.wants_answer:
                if delivery.task is not None:
                    delivery.settle(JobReceipt(delivery.id, self.index, self.pid))
            elif delivery.raise_cancel is not None:
                self.cancel_job(delivery.id)
        self.taken += len(deliveries)
        self.limit = min(_MOST, 2 * self.limit)
        self._owner.acknowledged(self, len(deliveries))

    def _refused(self, body: bytes) -> None:
        self._check_number(body)
        deliveries, self.batch = self.batch, []
        why = WorkerDiedError(
            f"worker {self.index} (pid {self.pid}) had no descriptor free to receive it "
            "(RLIMIT_NOFILE)"
        )
        # One of many may have had room: that it came with others is not its fault.
        self.limit = 1
        self.resting = True
        self.wants_more = True
        self._owner.take_back(deliveries, why, counts=len(deliveries) == 1)
        self._owner.refused(self)

    def _check_number(self, body: bytes) -> None:
        batch = _protocol.read_number(body)
        if batch != self._number or not self.batch:
            raise _protocol.ProtocolError(f"batch {batch}, where {self._number} was due")


_HEARS: Final = {
    _protocol.TAKEN: WorkerHandle._taken,  # noqa: SLF001 - of this file, and so are the others
    _protocol.REFUSED: WorkerHandle._refused,  # noqa: SLF001
    _protocol.DONE: WorkerHandle._done,  # noqa: SLF001
    _protocol.ANSWER: WorkerHandle._answered,  # noqa: SLF001
    _protocol.ERROR: WorkerHandle._failed,  # noqa: SLF001
    _protocol.READY: WorkerHandle._ready,  # noqa: SLF001
    _protocol.FAILED: WorkerHandle._failed_to_start,  # noqa: SLF001
    _protocol.LEAVING: WorkerHandle._leaving,  # noqa: SLF001
    _protocol.MORE: WorkerHandle._more,  # noqa: SLF001
    _protocol.BEAT: WorkerHandle._beat,  # noqa: SLF001
}
