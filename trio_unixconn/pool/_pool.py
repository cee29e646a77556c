"""WorkerPool: jobs in, acknowledgements and answers out.

The rule of this file: a job is its submitter's until it was put, and the pool's from then on;
whoever waits for it is told what became of it.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from .._owner import DescriptorOwner
from ..errors import JobRefusedError, PoolClosedError
from . import _wire
from ._delivery import Delivery, JobReceipt, Submitted, checked_data, take_over
from ._statistics import PoolStatistics, WorkerStatistics, memory_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._buffers import Buffer
    from ._supervisor import Supervisor


class WorkerPool(DescriptorOwner):
    """Workers that get jobs; :func:`open_worker_pool` makes one."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._dispatcher = supervisor.dispatcher
        self._numbers = itertools.count(1)

    ################################################################
    # Jobs
    ################################################################

    @enable_ki_protection
    async def submit(
        self, what: Submitted, *, data: Buffer = b"", to: int | None = None
    ) -> JobReceipt:
        """Hand a stream, socket, file or descriptor to the least busy worker.

        Ownership moves to the pool at once, whatever happens then: ``what`` is detached or
        closed, or, if it is an int, not the caller's any more. Only what is no job, or a pool
        that is closed, leaves it as it was: TypeError, ValueError, OSError (EBADF),
        WrongDescriptorKindError and PoolClosedError.

        A job that no worker has yet is withdrawn when this is cancelled: it is never handled.
        Once a worker has been sent it, it is too late: this waits for the acknowledgement, and
        returns.

        Args:
          what: a connected stream socket in any form, or a file that is open to read or write.
            A Python file is flushed and closed; what it has read ahead is lost, so give files
            that were not read from.
          data: up to 16 MiB that the handler gets as ``job.data``.
          to: the index of the worker that must have it, which is a place in the pool: when its
            worker is replaced, the next one has it.

        Returns:
          Who took it, once that worker has said so.

        Raises:
          TypeError, ValueError, OSError, WrongDescriptorKindError: nothing that a worker can
            have.
          PoolClosedError: the pool takes no more jobs.
          JobRefusedError: ``max_tries`` workers died, or had no descriptor free, before they
            could acknowledge it; or the pool ended before a worker had it, or there is no
            worker ``to`` any more.
        """
        delivery = await self._deliver(what, data, to, wants_answer=False)
        receipt: JobReceipt = delivery.outcome
        return receipt

    @enable_ki_protection
    async def call(
        self, what: Submitted | None = None, *, data: Buffer = b"", to: int | None = None
    ) -> bytes:
        """Hand a job to a worker, and wait for what its handler returns: bytes.

        As :meth:`submit`; also without a descriptor, when the handler's stream is None. When
        this is cancelled, so is the handler, and this returns when it has ended.

        Raises:
          HandlerError: the handler raised, or did not return bytes.
          WorkerDiedError: its worker died while it was being handled; it is not tried again.
          All that :meth:`submit` raises.
        """
        delivery = await self._deliver(what, data, to, wants_answer=True)
        answer: bytes = delivery.outcome
        return answer

    async def _deliver(
        self, what: Submitted | None, data: Buffer, to: int | None, *, wants_answer: bool
    ) -> Delivery:
        self._supervisor.check_open()
        if to is not None and not 0 <= to < len(self._supervisor.places):
            raise ValueError(
                f"to must be the index of a worker, below {len(self._supervisor.places)}"
            )
        goes_along = checked_data(data)
        if what is None:
            if not wants_answer:
                raise TypeError("a stream, socket, file or descriptor is due, not None")
            fd, form = -1, _wire.NO_DESCRIPTOR
        else:
            fd, form = await take_over(what)
        delivery = Delivery(
            next(self._numbers), fd, form, goes_along, to=to, wants_answer=wants_answer
        )
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            await self._wait_for_room()
        except PoolClosedError as exc:
            delivery.close()
            # Not as it came: that says that what was submitted is as it was.
            raise JobRefusedError(f"job {delivery.id} was given up: {exc}") from exc
        except BaseException:
            delivery.close()
            raise
        self._put(delivery)
        if to is not None:
            self._supervisor.give_up_bound()
        await self._outcome(delivery)
        return delivery

    async def _outcome(self, delivery: Delivery) -> None:
        def abort(raise_cancel: Callable[[], Any]) -> trio.lowlevel.Abort:
            if not delivery.sent:
                self._dispatcher.withdraw(delivery)
                delivery.task = None
                # It may have been what a drain waited for.
                self._supervisor.look_idle()
                return trio.lowlevel.Abort.SUCCEEDED
            delivery.raise_cancel = raise_cancel
            for link in self._supervisor.links():
                if delivery.id in link.in_flight:
                    link.cancel_job(delivery.id)
            return trio.lowlevel.Abort.FAILED

        if delivery.outcome is None:
            delivery.task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(abort)
        outcome = delivery.outcome
        error = outcome if isinstance(outcome, Exception) else None
        if delivery.raise_cancel is not None and (outcome is None or error is not None):
            delivery.raise_cancel()
        if error is not None:
            raise error

    def _put(self, delivery: Delivery) -> None:
        """Let a job wait for a worker, which may be at once."""
        self._dispatcher.counters.submitted += 1
        self._dispatcher.put(delivery)
        self._dispatcher.pump()

    def _put_accepted(self, fds: list[int], form: int) -> None:
        """Let accepted sockets wait for workers; nobody waits for what becomes of them."""
        self._dispatcher.counters.submitted += len(fds)
        queue, numbers = self._dispatcher.queue, self._numbers
        for fd in fds:
            queue.append(Delivery(next(numbers), fd, form))
        self._dispatcher.pump()

    def _free(self) -> int:
        """Return how many more jobs may wait."""
        return self._dispatcher.free()

    async def _wait_for_room(self) -> None:
        """Wait until another job may wait.

        Raises:
          PoolClosedError: the pool takes no more jobs.
        """
        self._supervisor.check_open()
        while self._dispatcher.free() <= 0:
            await self._dispatcher.waiting.park()
            # There is also room when all that waited was given up at the end.
            self._supervisor.check_open()

    ################################################################
    # Its workers
    ################################################################

    async def restart(self) -> None:
        """Replace the workers, one after the other, by new ones that import the handler afresh.

        Each new one is ready before the old one gets no more jobs; the old one finishes what it
        has, for ``drain_timeout`` at most, while the next one is replaced.

        Raises:
          WorkerStartError: a new one could not start; the old ones that are left go on.
          PoolClosedError: the pool takes no more jobs.
        """
        await self._supervisor.restart()

    async def scale(self, workers: int) -> None:
        """Have so many workers, from now on; those that are too many finish what they have.

        Raises:
          ValueError: fewer than one.
          WorkerStartError: a new one could not start; there are as many as before.
          PoolClosedError: the pool takes no more jobs.
        """
        if workers < 1:
            raise ValueError(f"a pool has at least one worker, not {workers}")
        await self._supervisor.scale(workers)

    async def drain(self, timeout: float | None = None) -> None:
        """Take no more jobs, finish those that there are, and end the workers.

        Args:
          timeout: after so many seconds, handlers that are still at work are cancelled, and jobs
            that still wait are given up; ``drain_timeout`` if left out.

        Raises:
          ValueError: a timeout that is negative, or no number; the pool goes on.
        """
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"a timeout of 0 or more seconds is due, not {timeout}")
        await self._supervisor.drain(timeout)

    ################################################################
    # How it is
    ################################################################

    def statistics(self) -> PoolStatistics:
        """Return what the pool has done, and is doing."""
        links = list(self._supervisor.links())
        restarts = {id(place.link): place.restarts for place in self._supervisor.places}
        now = trio.current_time()
        workers = tuple(
            WorkerStatistics(
                index=link.index,
                pid=link.pid,
                state="starting" if link.state == "ended" else link.state,
                in_flight=len(link.in_flight) + len(link.batch),
                handled=link.handled,
                failed=link.failed,
                restarts=restarts.get(id(link), 0),
                memory=memory_of(link.pid),
                age=max(0.0, now - link.started),
            )
            for link in links
        )
        return PoolStatistics(
            workers=workers,
            queued=self._dispatcher.count(),
            in_flight=sum(each.in_flight for each in workers),
            **attrs.asdict(self._dispatcher.counters),
        )
