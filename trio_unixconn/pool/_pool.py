"""WorkerPool: jobs in, acknowledgements and answers out.

The rule of this file: a job is its submitter's until it was put, and the pool's from then on;
whoever waits for it is told what became of it.
"""

from __future__ import annotations

import itertools
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from .._owner import DescriptorOwner
from ..errors import JobRefusedError, PoolClosedError
from . import _protocol
from ._config import PoolConfig
from ._endpoints import Submitted, checked_data, detach_endpoint
from ._pending import JobReceipt, PendingJob
from ._process import FdReserve
from ._statistics import PoolStatistics, WorkerStatistics, memory_of
from ._supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from typing_extensions import Unpack

    from .._buffers import Buffer
    from ._config import WorkerPoolOptions


class WorkerPool(DescriptorOwner):
    """Workers that get jobs; :func:`open_worker_pool` makes one."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._queue = supervisor.queue
        self._numbers = itertools.count(1)

    ################################################################
    # Jobs
    ################################################################

    @enable_ki_protection
    async def submit(
        self, what: Submitted, *, data: Buffer = b"", worker: int | None = None
    ) -> JobReceipt:
        """Hand a stream, socket, file or descriptor to the least busy worker.

        Ownership moves to the pool at once, whatever happens then: ``what`` is detached or
        closed, or, if it is an int, not the caller's any more. Only what is no job, or a pool
        that is closed, leaves it as it was: TypeError, ValueError, OSError (EBADF),
        WrongDescriptorKindError and PoolClosedError.

        A job that no worker has yet is cancelled when this is cancelled: it is never handled.
        Once a worker has been sent it, it is too late: this waits for the acknowledgement, and
        returns.

        Args:
          what: a connected stream socket in any form, or a file that is open to read or write.
            A Python file is flushed and closed; what it has read ahead is lost, so give files
            that were not read from.
          data: up to 16 MiB that the handler gets as ``job.data``.
          worker: the index of the worker that must have it, which is a place in the pool: when its
            worker is replaced, the next one has it.

        Returns:
          Who took it, once that worker has said so.

        Raises:
          TypeError, ValueError, OSError, WrongDescriptorKindError: nothing that a worker can
            have.
          PoolClosedError: the pool takes no more jobs.
          JobRefusedError: ``max_attempts`` workers died, or had no descriptor free, before they
            could acknowledge it; or the pool ended before a worker had it, or there is no
            such worker any more.
        """
        delivery = await self._deliver(what, data, worker, wants_answer=False)
        receipt: JobReceipt = delivery.outcome
        return receipt

    @enable_ki_protection
    async def call(
        self, what: Submitted | None = None, *, data: Buffer = b"", worker: int | None = None
    ) -> bytes:
        """Hand a job to a worker, and wait for what its handler returns: bytes.

        As :meth:`submit`; also without a descriptor, when the handler's stream is None. When
        this is cancelled, so is the handler, and this returns when it has ended.

        Raises:
          HandlerError: the handler raised, or did not return bytes.
          WorkerDiedError: its worker died while it was being handled; it is not tried again.
          All that :meth:`submit` raises.
        """
        delivery = await self._deliver(what, data, worker, wants_answer=True)
        answer: bytes = delivery.outcome
        return answer

    async def _deliver(
        self, what: Submitted | None, data: Buffer, worker: int | None, *, wants_answer: bool
    ) -> PendingJob:
        self._supervisor.check_open()
        if worker is not None and not 0 <= worker < len(self._supervisor.places):
            raise ValueError(
                f"worker must be the index of a worker, below {len(self._supervisor.places)}"
            )
        goes_along = checked_data(data)
        if what is None:
            if not wants_answer:
                raise TypeError("a stream, socket, file or descriptor is due, not None")
            fd, form = -1, _protocol.NO_DESCRIPTOR
        else:
            fd, form = await detach_endpoint(what)
        delivery = PendingJob(
            next(self._numbers), fd, form, goes_along, worker=worker, wants_answer=wants_answer
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
        if worker is not None:
            self._supervisor.give_up_bound()
        await self._outcome(delivery)
        return delivery

    async def _outcome(self, delivery: PendingJob) -> None:
        def abort(raise_cancel: Callable[[], Any]) -> trio.lowlevel.Abort:
            if not delivery.sent:
                self._queue.withdraw(delivery)
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

    def _put(self, delivery: PendingJob) -> None:
        """Let a job wait for a worker, which may be at once."""
        self._queue.counters.submitted += 1
        self._queue.put(delivery)
        self._queue.pump()

    def _put_accepted(self, fds: list[int], form: int) -> None:
        """Let accepted sockets wait for workers; nobody waits for what becomes of them."""
        self._queue.counters.submitted += len(fds)
        queue, numbers = self._queue.queue, self._numbers
        for fd in fds:
            queue.append(PendingJob(next(numbers), fd, form))
        self._queue.pump()

    def _free(self) -> int:
        """Return how many more jobs may wait."""
        return self._queue.free()

    async def _wait_for_room(self) -> None:
        """Wait until another job may wait.

        Raises:
          PoolClosedError: the pool takes no more jobs.
        """
        self._supervisor.check_open()
        while self._queue.free() <= 0:
            await self._queue.waiting.park()
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
            queued=self._queue.count(),
            in_flight=sum(each.in_flight for each in workers),
            **attrs.asdict(self._queue.counters),
        )


@asynccontextmanager
async def open_worker_pool(
    handler: str, **options: Unpack[WorkerPoolOptions]
) -> AsyncGenerator[WorkerPool, None]:
    """Start worker processes that get descriptors, and run a handler on each.

    A worker is a fresh interpreter, with this one's import path, that imports the handler. All
    are ready when the block is entered. At its end the pool drains; if the block is left by an
    exception or a cancellation, handlers are cancelled and have a second to clean up in::

        async with open_worker_pool("package.module:handler", workers=4) as pool:
            await pool.submit(stream)

    with, in ``package/module.py``::

        async def handler(stream, job): ...

    The stream is a ``trio.SocketStream``, a :class:`UnixConnection`, or an open file, which
    blocks; it is closed when the handler returns. ``job`` is a :class:`Job`.

    Args:
      handler: ``"package.module:name"`` of an async function of a stream and a job.
      workers: how many; one for each processor that this process may use if left out.
      setup: ``"package.module:name"`` of a function that returns an async context manager, in
        which each worker lives; what it yields is ``job.state``.
      max_in_flight: how many jobs each worker handles at a time.
      max_queue: how many jobs may wait in the pool; then ``submit`` waits.
      max_attempts: how many workers may die, or lack descriptors, before they acknowledge a job,
        until it is given up.
      max_jobs: a worker is replaced when it has taken so many, or a few more.
      start_timeout: seconds that a worker may take to be ready.
      hang_timeout: seconds after which a worker that says nothing is killed and replaced. A
        handler that computes for as long without a checkpoint is such a one. ``math.inf`` for
        never.
      drain_timeout: seconds that jobs may take to finish in when a worker, or all, are to end.
      crash_limit: when so many workers in turn have died at one place without having finished
        a job, or having lived for ten seconds, the pool ends.
      on_abandoned: called for each job that was being handled when its worker died; such jobs
        are also logged, under ``trio_unixconn.pool``, and counted.

    Raises:
      TypeError, ValueError: something that cannot be; nothing was started.
      WorkerStartError: a worker could not be started; with its traceback.
      ExceptionGroup: of the causes, when workers died again and again.
    """
    config = PoolConfig(handler, **options)
    raised: BaseException | None = None
    with closing(FdReserve()) as reserve:
        async with trio.open_nursery() as nursery:
            supervisor = Supervisor(config, nursery, reserve)
            try:
                await supervisor.open()
                yield WorkerPool(supervisor)
                await supervisor.drain()
            except BaseException as exc:  # noqa: BLE001 - raised below, not in a nursery's group
                raised = exc
                await supervisor.abort()
            supervisor.kill()
            nursery.cancel_scope.cancel()
    if supervisor.failure is not None:
        raise supervisor.failure
    if raised is not None:
        raise raised
