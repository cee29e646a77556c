"""Supervisor: the lives of the workers, and what becomes of jobs when one ends.

The rule of this file: a slot in the pool has a worker that takes jobs, or one is being started
for it; the old one leaves when the new one is there.
"""

from __future__ import annotations

import logging
import math
import sys
from typing import TYPE_CHECKING, Final

import attrs
import trio

from .._owner import DescriptorOwner
from ..errors import WorkerStartError
from . import _process
from ._handle import HandleState, WorkerHandle
from ._queue import JobQueue
from ._statistics import AbandonedJob, Counters

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ._config import PoolConfig
    from ._pending import PendingJob
    from ._process import FdReserve

logger: Final = logging.getLogger("trio_unixconn.pool")

# A worker that has lived so long, or has finished a job, does not count as one that cannot.
INITIAL_BACKOFF: Final = 0.05
MAX_BACKOFF: Final = 10.0
_LONG_LIFE: Final = 10.0
_LONGEST_REST: Final = 1.0
# What workers have to clean up in, when the pool's block was left by an exception.
_SHORT_END: Final = 1.0


@attrs.define(eq=False)
class Slot:
    """A slot in the pool.

    Attributes:
      failures: why its workers died, since one of them was of any use.
      busy: whether a worker is being started or replaced here; then ``changed`` says when that
        has come to an end.
      again: when a worker that is well may be replaced, if the last new one could not start.
    """

    index: int
    handle: WorkerHandle
    restarts: int = 0
    failures: list[Exception] = attrs.field(factory=list[Exception])
    busy: bool = False
    changed: trio.Event = attrs.field(factory=trio.Event)
    rest: float = INITIAL_BACKOFF
    again: float = -math.inf

    def begin(self) -> None:
        """A worker is being started here from now on."""
        if not self.busy:
            self.busy = True
            self.changed = trio.Event()

    def end(self) -> None:
        """That has come to an end."""
        self.busy = False
        self.changed.set()


def backoff_after(failures: int) -> float:
    """Return how long to wait before another worker is started, in seconds."""
    if not failures:
        return 0.0
    # Behind that nothing grows but a number that soon is none for a float.
    return min(MAX_BACKOFF, INITIAL_BACKOFF * 2.0 ** min(failures - 1, 10))


class Supervisor(DescriptorOwner):
    """Who looks after the workers of a pool.

    Attributes:
      options: what it was asked for.
      dispatcher: the jobs that wait.
      slots: the slots of the pool, by index.
      alive: all whose processes are there, also such as are being started.
      failure: why it ended itself, if it did.
      pump: hands over what can be handed over.
    """

    def __init__(self, options: PoolConfig, nursery: trio.Nursery, reserve: FdReserve) -> None:
        self.options: PoolConfig = options
        self._nursery = nursery
        self._reserve = reserve
        self.counters = Counters()
        self.queue: JobQueue = JobQueue(
            options.max_in_flight, options.max_queue, options.max_attempts, self.counters
        )
        self.slots: list[Slot] = []
        self._draining: set[WorkerHandle] = set()
        self.alive: set[WorkerHandle] = set()
        # Whether workers that die are not replaced any more.
        self._over = False
        self.failure: Exception | None = None
        # Changes of who is in the pool, one after the other.
        self._changing = trio.Lock()
        self._idle = trio.lowlevel.ParkingLot()
        self.dispatch: Callable[[], None] = self.queue.dispatch

    def handles(self) -> Iterable[WorkerHandle]:
        """Return the workers that have a slot, and those that are leaving."""
        yield from (slot.handle for slot in self.slots)
        yield from self._draining

    ################################################################
    # Who is in the pool
    ################################################################

    async def restart(self) -> None:
        """As :meth:`WorkerPool.restart`."""
        async with self._changing:
            self.queue.check_open()
            for slot in list(self.slots):
                while slot.busy:
                    # What is being started there may have imported the old handler already.
                    await slot.changed.wait()
                self.queue.check_open()
                await self._replace(slot)

    async def scale(self, workers: int) -> None:
        """As :meth:`WorkerPool.scale`."""
        async with self._changing:
            self.queue.check_open()
            new = range(len(self.slots), workers)
            await self._fill(new)
            while len(self.slots) > workers:
                slot = self.slots.pop()
                self.queue.workers.pop(slot.index, None)
                self._leave(slot.handle)
            self.reject_pinned()

    def reject_pinned(self) -> None:
        """Reject jobs that are pinned to a worker that there is not any more."""
        self.queue.reject_pinned(len(self.slots))

    async def drain(self, timeout: float | None = None) -> None:
        """As :meth:`WorkerPool.drain`; ``drain_timeout`` if none is given."""
        timeout = self.options.drain_timeout if timeout is None else timeout
        self.queue.close("the pool is draining and accepts no more jobs")
        begin = trio.current_time()
        with trio.move_on_after(timeout):
            while len(self.queue) or any(handle.batch for handle in self.handles()):
                await self._idle.park()
        self._over = True
        self.queue.clear("the pool ended")
        left = max(0.0, begin + timeout - trio.current_time())
        async with trio.open_nursery() as nursery:
            for handle in list(self.handles()):
                nursery.start_soon(handle.leave, left)

    async def _fill(self, indexes: range) -> None:
        """Start workers for new slots, all at a time."""
        errors: list[Exception] = []
        handles: dict[int, WorkerHandle] = {}

        async def fill(index: int) -> None:
            try:
                handles[index] = await self._start(index)
            except WorkerStartError as exc:
                errors.append(exc)
                # The others most likely fail for the same reason.
                nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                for index in indexes:
                    nursery.start_soon(fill, index)
            if errors:
                raise errors[0]
            # A drain may have begun meanwhile.
            self.queue.check_open()
        except BaseException:
            for handle in handles.values():
                self._leave(handle)
            raise
        # In order, and without gaps: an index is a position.
        for index in indexes:
            self.slots.append(Slot(index, handles[index]))
            self._welcome(self.slots[-1], handles[index])

    async def _start(self, index: int) -> WorkerHandle:
        """Start a worker, and wait until it is ready.

        Raises:
          WorkerStartError: it is gone; with an OSError as its cause, it never was there.
        """
        options = self.options
        try:
            with self._reserve.released():
                process = _process.start(options.worker_config(index))
        except OSError as exc:
            raise WorkerStartError(f"worker {index} could not be started: {exc}") from exc
        handle = WorkerHandle(index, process, self, self.counters)
        self.alive.add(handle)
        self._nursery.start_soon(handle.run, name=f"trio_unixconn.pool worker {index}")
        try:
            with trio.move_on_after(options.start_timeout):
                await handle.ready.wait()
            if handle.started_at < math.inf:
                return handle
            if handle.error is None:
                handle.kill(f"was not ready after {options.start_timeout} seconds")
            # Mostly it ends by itself; but what it has imported may have threads that do not.
            await handle.leave(0.0)
        except BaseException:
            handle.kill("was no longer needed")
            raise
        assert handle.error is not None  # noqa: S101 - it has ended
        raise handle.error

    def _welcome(self, slot: Slot, handle: WorkerHandle) -> None:
        """Let the worker that a slot has now take jobs."""
        if handle.state is HandleState.ENDED:
            # It was ready, and died before it came to that.
            self._lost(slot, handle)
            return
        self.queue.workers[slot.index] = handle
        self.dispatch()

    async def _replace(self, slot: Slot) -> None:
        slot.begin()
        try:
            new = await self._start(slot.index)
        except BaseException:
            slot.end()
            if slot.handle.state is HandleState.ENDED:
                # The old one died meanwhile.
                self._revive_soon(slot)
            raise
        slot.end()
        old = slot.handle
        self._settle(slot, new)
        # If not, the slot is gone, or the pool is ending: then others see to it that the old one
        # finishes what it has.
        if slot.handle is new:
            self._leave(old)

    def _leave(self, handle: WorkerHandle) -> None:
        """Have a worker finish what it has, and end, while everything else goes on."""
        if self._over:
            # Nobody would wait for that, and the nursery may be closed.
            handle.kill("was no longer needed")
        elif handle.state is not HandleState.ENDED:
            self._draining.add(handle)
            handle.drain(self.options.drain_timeout)
            self._nursery.start_soon(handle.leave, self.options.drain_timeout)

    def _revive_soon(self, slot: Slot) -> None:
        if not slot.busy and self._has(slot):
            slot.begin()
            self._nursery.start_soon(
                self._revive, slot, name=f"trio_unixconn.pool restart {slot.index}"
            )

    async def _revive(self, slot: Slot) -> None:
        """Start a worker in the slot of one that died, after a growing pause."""
        handle = None
        tries = len(slot.failures)
        try:
            while len(slot.failures) < self.options.crash_limit:
                await trio.sleep(backoff_after(tries))
                if not self._has(slot):
                    return
                tries += 1
                handle = await self._try_again(slot)
                if handle is not None:
                    break
        finally:
            slot.end()
        if handle is not None:
            self._settle(slot, handle)
        else:
            self._end(
                ExceptionGroup(
                    f"{len(slot.failures)} workers in turn died, or could not start, before "
                    "they finished a job",
                    slot.failures,
                )
            )

    async def _try_again(self, slot: Slot) -> WorkerHandle | None:
        try:
            return await self._start(slot.index)
        except WorkerStartError as exc:
            logger.error("%s", exc)  # noqa: TRY400 - its text has the worker's traceback
            # That this process has no descriptor free, say, is not the worker's fault.
            if not isinstance(exc.__cause__, OSError):
                slot.failures.append(exc)
            return None

    def _has(self, slot: Slot) -> bool:
        return not self._over and slot in self.slots

    def _settle(self, slot: Slot, handle: WorkerHandle) -> None:
        """Let a worker have its slot, if that is still there."""
        if not self._has(slot):
            self._leave(handle)
            return
        slot.handle = handle
        slot.restarts += 1
        self.counters.restarts += 1
        self._welcome(slot, handle)

    def _end(self, failure: Exception) -> None:
        self.failure = failure
        self.queue.close("the pool has ended because its workers crashed")
        self._nursery.cancel_scope.cancel()

    async def _watch(self) -> None:
        """Kill workers that do not say that they live."""
        timeout = self.options.hang_timeout
        pause = timeout / 5
        while True:
            before = trio.current_time()
            await trio.sleep(pause)
            now = trio.current_time()
            if now - before > 2 * pause:
                # This process was not running either, and what they said is still unread.
                continue
            for handle in list(self.handles()):
                if handle.state is not HandleState.ENDED and now - handle.last_heard > timeout:
                    logger.warning(
                        "worker %d (pid %d) has not been heard of for %.1f seconds, and is killed",
                        handle.index,
                        handle.pid,
                        now - handle.last_heard,
                    )
                    handle.kill(f"hung for {now - handle.last_heard:.1f} seconds")

    ################################################################
    # What its workers say
    ################################################################

    def requeue(self, jobs: list[PendingJob], cause: Exception, *, counts: bool) -> None:
        """Have jobs that a worker has not taken tried by another."""
        self.queue.requeue(jobs, cause, counts=counts)
        self.reject_pinned()
        self.dispatch()
        self.notify_if_idle()

    def reject(self, jobs: list[PendingJob], why: str) -> None:
        """Have jobs given up that cannot be sent to any worker."""
        self.queue.reject(jobs, why)
        self.notify_if_idle()

    def on_refused(self, handle: WorkerHandle) -> None:
        """Give a worker that has no descriptor free time to close some."""
        slot = self._slot_of(handle)
        if slot is not None:
            self._nursery.start_soon(self._rest, slot, handle)

    async def _rest(self, slot: Slot, handle: WorkerHandle) -> None:
        pause, slot.rest = slot.rest, min(2 * slot.rest, _LONGEST_REST)
        await trio.sleep(pause)
        handle.resting = False
        self.dispatch()

    def on_acknowledged(self, handle: WorkerHandle, count: int) -> None:
        """Count jobs that were taken."""
        self.counters.acknowledged += count
        # The pool's copies are closed.
        self._reserve.fill()
        most = self.options.max_jobs
        if most is not None and handle.accepted >= most and handle.state is HandleState.READY:
            self._renew(handle)
        self.notify_if_idle()

    def on_finished(self, handle: WorkerHandle, count: int) -> None:
        """Count jobs whose handler has returned."""
        slot = self._slot_of(handle)
        if slot is not None and count:
            slot.failures.clear()
            slot.rest = INITIAL_BACKOFF
        self.dispatch()

    def on_failed(self, handle: WorkerHandle, job_id: int, text: str, *, awaited: bool) -> None:
        """Count a job whose handler has raised, and log it unless its caller is told."""
        if not awaited:
            logger.error(
                "worker %d (pid %d): job %d failed\n%s",
                handle.index,
                handle.pid,
                job_id,
                text.rstrip(),
            )
        self.dispatch()

    def on_abandoned(self, handle: WorkerHandle, jobs: list[PendingJob]) -> None:
        """Report the jobs that a worker was handling when it died."""
        for job in jobs:
            logger.warning(
                "job %d was being handled when its worker died: %s", job.id, handle.error
            )
            if self.options.on_abandoned is not None:
                try:
                    self.options.on_abandoned(
                        AbandonedJob(
                            job.id,
                            handle.index,
                            handle.pid,
                            job.peer,
                            job.data,
                            trio.current_time() - job.acknowledged_at,
                        )
                    )
                except Exception:
                    logger.exception("on_abandoned raised an exception for job %d", job.id)

    def on_leaving(self, handle: WorkerHandle) -> None:
        """Replace a worker that somebody has asked to end (SIGTERM)."""
        if handle.state is HandleState.READY:
            logger.info(
                "worker %d (pid %d) was asked to end, and is replaced", handle.index, handle.pid
            )
            self._renew(handle)

    def _renew(self, handle: WorkerHandle) -> None:
        slot = self._slot_of(handle)
        if (
            self.queue.is_open()
            and slot is not None
            and not slot.busy
            and trio.current_time() >= slot.again
        ):
            # At once: others may ask for it before the task begins.
            slot.begin()
            self._nursery.start_soon(
                self._replace_logged, slot, name=f"trio_unixconn.pool restart {slot.index}"
            )

    async def _replace_logged(self, slot: Slot) -> None:
        try:
            await self._replace(slot)
        except WorkerStartError as exc:
            logger.error("%s; the old one goes on", exc)  # noqa: TRY400 - as above
            slot.again = trio.current_time() + MAX_BACKOFF

    def on_exit(self, handle: WorkerHandle) -> None:
        """Have a worker that died replaced."""
        self._reserve.fill()
        self.alive.discard(handle)
        self._draining.discard(handle)
        if self.queue.workers.get(handle.index) is handle:
            del self.queue.workers[handle.index]
        self.notify_if_idle()
        slot = self._slot_of(handle)
        if slot is not None and not self._over:
            self._lost(slot, handle)

    def _lost(self, slot: Slot, handle: WorkerHandle) -> None:
        assert handle.error is not None  # noqa: S101 - it has ended
        self.counters.deaths += 1
        logger.warning("%s; another is started", handle.error)
        if not handle.handled and trio.current_time() - handle.started_at < _LONG_LIFE:
            slot.failures.append(handle.error)
        else:
            slot.failures.clear()
        self._revive_soon(slot)

    def _slot_of(self, handle: WorkerHandle) -> Slot | None:
        """Return the slot that a worker has; None if it has left it."""
        slot = self.slots[handle.index] if handle.index < len(self.slots) else None
        return slot if slot is not None and slot.handle is handle else None

    def notify_if_idle(self) -> None:
        """Let a drain check whether any job is left."""
        if self._idle:
            self._idle.unpark_all()

    ################################################################
    # Its begin and its end
    ################################################################

    async def open(self) -> None:
        """Start the workers and the tasks that watch them.

        Raises:
          WorkerStartError: a worker could not start; the others are stopped.
        """
        await self._fill(range(self.options.workers))
        if self.options.hang_timeout < math.inf:
            self._nursery.start_soon(self._watch, name="trio_unixconn.pool watch")

    def kill(self) -> None:
        """Kill whoever is still there, such as workers that were just being started."""
        for handle in self.alive:
            handle.kill("was no longer needed")

    async def abort(self) -> None:
        """End the workers at once: their handlers are cancelled, and have a moment for that."""
        self.queue.close("the pool is closed")
        self._over = True
        self.queue.clear("the pool ended")
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for handle in list(self.handles()):
                    nursery.start_soon(handle.leave, 0.0, _SHORT_END)
