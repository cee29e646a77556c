"""Supervisor: keeps a live worker in each slot of the pool, and ends them all in the end.

A pool has slots, numbered from 0. A slot has one worker at a time. The states of a slot::

     open(), scale()
         |
         |    +----- a new worker is ready -----+
         v    v                                 |
       RUNNING ------ the worker dies ----> RESTARTING ---+
        |   ^                                ^    ^       | the new worker
        |   |                                |    +-------+ cannot start
        |   +-- the new worker is ready:     |
        |   |   the old one leaves           |
        |   |                                |
        |   +-- the new one cannot start:    |
        v   |   the old one goes on          |
      REPLACING ---- neither of them lives --+

      any state --> RETIRED: scaled away, or not needed for the rest of a drain

RUNNING: the worker accepts jobs. REPLACING: it still does, while its successor is started, because
of ``restart``, SIGTERM, ``max_jobs``, ``max_age``, ``max_memory``, or many refused batches.
RESTARTING: the worker has died, and another one is started after a pause. A slot is busy in the
last two states: the task that made it busy is the only one that changes it. Other tasks wait for
``changed``, or write ``replace_reason``, which is read when the slot is RUNNING again and at each
tick of the watch. What outlives a worker belongs to its slot: consecutive crashes, the next pause,
and, by the index, pinned jobs.

Crashes. A client must not be able to end the service with a request that kills its worker. A
handler that cannot be imported must not be started again and again. So a death counts towards
``crash_limit`` only if the worker had no job: it was not ready yet, or it was idle. A worker that
dies with jobs is always replaced. In both cases the pauses grow. A job that is handled clears the
count and the pause, and so does a worker that lives for LONG_LIFE. Nothing counts that goes wrong
while the old worker lives, nor a lack of file descriptors or memory in this process.

Bulkheads. An error in one slot stays there. The task of a busy slot and the tasks of a worker log
what they do not expect, and treat it as a crash of that slot. Only ``crash_limit`` ends the pool,
and only for a slot that is needed: not for one that was scaled away, nor in a drain in which other
workers can do the rest.

Changes at the same time. ``restart`` and ``scale`` hold one lock. ``drain`` does not wait for it.
It closes the queue, so that later changes fail, and cancels the change that holds the lock, which
then ends the workers that it has started and raises PoolClosedError. After ``_shut_down`` no
process is started, so ``alive`` only shrinks, and a drain returns when all in it have ended.

``restart`` starts a worker for each slot before an old one leaves. If one of them cannot start, the
others leave, and all old workers go on: two versions of a program never stay side by side. For a
moment there are twice as many processes, which need twice the memory.

Clocks. The watch looks at all of them: silence, ``start_timeout``, ``max_age``, and once a second
``max_memory``. A gap in its own clock means that the machine was suspended or that this process was
stopped. Then the workers were stopped, too, or what they have sent is still unread, and all clocks
start again. The limits of a worker's life vary at random by JITTER, so that workers that were
started together are not replaced together.

Invariant: a task in the pool's nursery raises only Cancelled, and is protected from
KeyboardInterrupt.
"""

from __future__ import annotations

import enum
import itertools
import logging
import math
import random
import sys
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from .._owner import DescriptorOwner
from ..errors import WorkerStartError
from . import _process, _protocol
from ._cpus import available_cpus
from ._endpoints import EndpointKind
from ._handle import HandleState, WorkerHandle
from ._pending import JobEnd, PendingJob
from ._preload import Preloader
from ._proxy_header import split_passed
from ._queue import JobQueue
from ._statistics import AbandonedJob, Counters, memory_of

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

if TYPE_CHECKING:
    from ._accepted import AcceptPlan
    from ._config import PoolConfig
    from ._process import FdReserve, WorkerProcess
    from ._worker_config import WorkerConfig

logger: Final = logging.getLogger("trio_unixconn.pool")

#: The pauses before a slot's next worker is started, in seconds. The first one is started at once.
INITIAL_BACKOFF: Final = 0.05
MAX_BACKOFF: Final = 10.0
#: A worker that has lived for so many seconds clears the crashes of its slot. A younger one is not
#: replaced because of its memory, or a limit that is too low would replace it all the time.
LONG_LIFE: Final = 10.0
#: The maximum pause in seconds after a worker has refused a batch.
MAX_REST: Final = 1.0
#: The number of batches that a worker may refuse in a row.
MAX_REFUSALS: Final = 10
#: The part of start_timeout after which a worker that starts does not keep others from starting.
START_SHARE: Final = 0.5
#: The time in seconds that handlers have to clean up after an exception in the pool's block.
ABORT_GRACE: Final = 1.0
#: The time in seconds between two looks at the clocks, and at the memory of workers.
TICK: Final = 1.0
JITTER: Final = 0.1

#: The attribute of log records about a job that its worker did not finish; it says why.
UNFINISHED: Final = "trio_unixconn_unfinished"
#: Its value if the end of the worker has cancelled the handler.
CANCELLED: Final = "cancelled"
_POOL_ENDED: Final = "the pool ended first"
_NOT_NEEDED: Final = "was no longer needed"
_POOL_ERROR: Final = "was killed after an error in the pool"
_SIGTERM: Final = "received SIGTERM"


class SlotState(enum.Enum):
    """The states of a slot."""

    RUNNING = "running"
    REPLACING = "replacing"
    RESTARTING = "restarting"
    RETIRED = "retired"


@attrs.define(eq=False)
class Slot:
    """A slot of the pool, and what outlives its workers.

    Attributes:
      index: its index in the pool.
      handle: its worker, or the last one if that has died.
      state: see the module.
      changed: set when the slot is not busy.
      scope: the scope of the task that has made it busy.
      restarts: the number of workers that it had before.
      deaths: the number of starts or workers in a row that have failed; for the next pause.
      failures: those of them that count towards ``crash_limit``.
      replace_reason: why the worker is to be replaced; None if it is not.
      retry_at: when that may be tried again, after a new worker could not start.
      max_jobs, expires_at, max_memory: the limits of the present worker, which differ a little.
      refusals: the number of batches that the present worker has refused in a row.
      rest: how long it rests after the next refusal, in seconds.
    """

    index: int
    handle: WorkerHandle
    state: SlotState = SlotState.RUNNING
    changed: trio.Event = attrs.field(factory=trio.Event)
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    restarts: int = 0
    deaths: int = 0
    failures: list[Exception] = attrs.field(factory=list[Exception])
    replace_reason: str | None = None
    retry_at: float = -math.inf
    max_jobs: float = math.inf
    expires_at: float = math.inf
    max_memory: float = math.inf
    refusals: int = 0
    rest: float = INITIAL_BACKOFF

    @property
    def is_busy(self) -> bool:
        """Whether a task starts a worker for it."""
        return self.state in {SlotState.REPLACING, SlotState.RESTARTING}

    def become(self, state: SlotState) -> None:
        """Change the state."""
        self.state = state
        if self.is_busy:
            self.changed = trio.Event()
            self.scope = trio.CancelScope()
        else:
            self.changed.set()


def backoff_after(deaths: int) -> float:
    """Return how long to wait before another worker is started, in seconds."""
    if deaths <= 1:
        return 0.0
    # A larger exponent would overflow in the end.
    return min(MAX_BACKOFF, INITIAL_BACKOFF * 2.0 ** min(deaths - 2, 10))


def max_starting() -> int:
    """Return how many workers may start at a time: more would only make all of them slow."""
    return max(2, available_cpus())


def _vary(limit: float | None) -> float:
    """Return a limit for one worker."""
    if limit is None:
        return math.inf
    return limit * random.uniform(1 - JITTER, 1 + JITTER)


class Supervisor(DescriptorOwner):
    """Starts, watches, replaces and ends the workers of a pool.

    Attributes:
      options: the options of the pool.
      counters: what the pool counts.
      queue: the jobs that no worker has.
      slots: the slots of the pool, by index.
      alive: the workers whose processes exist, and for those that start, since when.
      failure: the exception with which the pool has ended by itself.
      ids: the numbers of the next jobs.
      successor: called in a drain with a connection, its kind, its data and how many times it was
        passed on, to pass it on to the next generation; returns whether that has it. None if
        there is no such generation.
      dispatch: gives queued jobs to workers that can accept them.
    """

    def __init__(self, options: PoolConfig, nursery: trio.Nursery, reserve: FdReserve) -> None:
        self.options: PoolConfig = options
        self._nursery = nursery
        self._reserve = reserve
        self.ids: Iterator[int] = itertools.count(1)
        self.counters: Counters = Counters()
        self.queue: JobQueue = JobQueue(
            options.max_in_flight, options.max_queue, options.max_attempts, self.counters
        )
        self.slots: list[Slot] = []
        self.alive: dict[WorkerHandle, float] = {}
        self.failure: Exception | None = None
        self.dispatch: Callable[[], None] = self.queue.dispatch
        self.successor: Callable[[int, EndpointKind, bytes, int], bool] | None = None
        self._shutting_down = False
        # The listening sockets that workers accept from, if they do.
        self._accept_plan: AcceptPlan | None = None
        # Held by restart() and scale(). The scope is that of the one which holds it.
        self._changing = trio.Lock()
        self._change = trio.CancelScope()
        self._starting = trio.Semaphore(max_starting())
        self._preloader = Preloader(options.start_timeout)
        # The number of workers that are being forked.
        self._forking = 0
        self._forked = trio.lowlevel.ParkingLot()
        self._idle = trio.lowlevel.ParkingLot()
        self._exits = trio.lowlevel.ParkingLot()
        # Workers that were told to leave, that were killed because of a clock, that got SIGTERM.
        self._leaving: set[WorkerHandle] = set()
        self._overdue: set[WorkerHandle] = set()
        self._terminated: set[WorkerHandle] = set()

    def handles(self) -> Iterable[WorkerHandle]:
        """Return the workers of the slots, and those that are leaving."""
        yield from (slot.handle for slot in self.slots)
        yield from self._leaving

    @property
    def state(self) -> str:
        """The state of the pool, as :class:`PoolStatistics` has it."""
        if self.failure is not None:
            return "failed"
        if self._shutting_down and not self.alive:
            return "ended"
        if not self.queue.is_open():
            return "draining"
        return "ready" if self._has_ready_worker() else "down"

    async def wait_exit(self) -> None:
        """Wait until the process of a worker has exited."""
        await self._exits.park()

    ################################################################
    # Begin and end
    ################################################################

    @enable_ki_protection
    async def open(self) -> None:
        """Start the workers, and the watch.

        Raises:
          WorkerStartError: a worker could not start; the others are ended.
        """
        self._nursery.start_soon(self._watch, name="trio_unixconn.pool watch")
        await self._fill(range(self.options.workers))

    @enable_ki_protection
    async def drain(self, timeout: float | None = None) -> None:
        """See :meth:`WorkerPool.drain`."""
        timeout = self.options.drain_timeout if timeout is None else timeout
        self.queue.close("the pool is draining and accepts no more jobs")
        self._change.cancel()
        deadline = trio.current_time() + timeout
        with trio.move_on_at(deadline):
            while True:
                self._pass_queued()
                if not (len(self.queue) or any(handle.batch for handle in self.handles())):
                    break
                await self._idle.park()
        self._shut_down()
        await self._end_all(max(0.0, deadline - trio.current_time()))

    def _pass_queued(self) -> None:
        """Pass connections that no worker has on to the next generation, if there is one.

        The workers may have no free slots for them, until the deadline.
        """
        if self.successor is None:
            return
        for job in self.queue.take_connections():
            if self.successor(job.fd, EndpointKind(job.kind), job.data, job.passed):
                job.take_fd()
                job.settle(JobEnd.HANDED_OVER)
            else:
                self.queue.reject([job], "the next generation has ended")

    @enable_ki_protection
    async def abort(self) -> None:
        """Cancel the handlers, and end the workers after ABORT_GRACE at the latest.

        Raises:
          KeyboardInterrupt: it was raised while this waited; the workers were killed.
        """
        self.queue.close("the pool is closed")
        self._shut_down()
        with trio.CancelScope(shield=True):
            try:
                await self._end_all(0.0, ABORT_GRACE)
            except BaseException:  # see below
                # The scope is shielded, and errors are contained: nothing else can be raised.
                for handle in self.alive:
                    handle.kill(_NOT_NEEDED)
                raise KeyboardInterrupt from None

    def _shut_down(self) -> None:
        """Start no worker any more, and reject the jobs that no worker has."""
        self._shutting_down = True
        self._change.cancel()
        for slot in self.slots:
            slot.scope.cancel()
        self.queue.clear(_POOL_ENDED)

    async def _end_all(self, timeout: float, grace: float | None = None) -> None:
        """End all workers, even those that are just being started, and wait for that."""

        @enable_ki_protection
        async def end(handle: WorkerHandle) -> None:
            if handle.state is HandleState.STARTING:
                handle.kill(_NOT_NEEDED)
                await handle.gone.wait()
            else:
                await handle.leave(timeout, grace, is_replaced=self.successor is not None)

        while True:
            async with trio.open_nursery() as nursery:
                for handle in list(self.alive):
                    nursery.start_soon(self._contain, handle, end, handle)
            if not self._forking:
                break
            await self._forked.park()
        await self._preloader.aclose()

    def _fail(self, failure: Exception) -> None:
        """End the pool with an exception."""
        self.failure = failure
        self.queue.close("the pool has ended because its workers crashed")
        # At once, for submitters in the pool's block that are shielded from the cancellation.
        self._shut_down()
        self._nursery.cancel_scope.cancel()

    ################################################################
    # Changes of the slots
    ################################################################

    @contextmanager
    def _until_closed(self) -> Generator[None, None, None]:
        """Run a change of the pool, which a drain cancels.

        Raises:
          PoolClosedError: the pool accepts no more jobs.
        """
        self.queue.check_open()
        with trio.CancelScope() as self._change:
            yield
        if self._change.cancelled_caught:
            self.queue.check_open()

    @enable_ki_protection
    async def restart(self) -> None:
        """See :meth:`WorkerPool.restart`."""
        async with self._changing:
            with self._until_closed():
                await self._preloader.renew()
                await self._replace_all()

    async def _replace_all(self) -> None:
        errors: list[WorkerStartError] = []
        claimed: list[Slot] = []
        started: dict[Slot, WorkerHandle] = {}

        @enable_ki_protection
        async def start(slot: Slot) -> None:
            while slot.is_busy:
                # A worker that is being started may have imported the old handler.
                await slot.changed.wait()
            slot.become(SlotState.REPLACING)
            claimed.append(slot)
            try:
                started[slot] = await self._start(slot.index)
            except WorkerStartError as exc:
                errors.append(exc)
                nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                for slot in self.slots:
                    nursery.start_soon(start, slot)
            self.queue.check_open()
            # Those that were ready first may have died while others were started.
            errors += [
                WorkerStartError(str(handle.error))
                for handle in started.values()
                if handle.state is HandleState.ENDED
            ]
            if errors:
                raise WorkerStartError(
                    f"restart failed, all old workers go on: {errors[0].args[0]}",
                    errors[0].traceback,
                ) from errors[0]
        except BaseException:
            for handle in started.values():
                self._leave(handle)
            for slot in claimed:
                self._release(slot)
            raise
        for slot, handle in started.items():
            self._install(slot, handle)

    @enable_ki_protection
    async def scale(self, workers: int) -> None:
        """See :meth:`WorkerPool.scale`."""
        async with self._changing:
            with self._until_closed():
                await self._fill(range(len(self.slots), workers))
                while len(self.slots) > workers:
                    self._retire(self.slots.pop())
                self.reject_pinned()

    async def _fill(self, indexes: range) -> None:
        """Start workers for new slots."""
        errors: list[Exception] = []
        handles: dict[int, WorkerHandle] = {}

        @enable_ki_protection
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
            self.queue.check_open()
        except BaseException:
            for handle in handles.values():
                self._leave(handle)
            raise
        # In order and without gaps: the index is the position.
        for index in indexes:
            slot = Slot(index, handles[index])
            self.slots.append(slot)
            self._activate(slot)

    def _retire(self, slot: Slot) -> None:
        slot.become(SlotState.RETIRED)
        slot.scope.cancel()
        self.queue.workers.pop(slot.index, None)
        self._leave(slot.handle)

    def reject_pinned(self) -> None:
        """Reject jobs that are pinned to workers that do not exist any more."""
        self.queue.reject_pinned(len(self.slots))

    def _slot_of(self, handle: WorkerHandle) -> Slot | None:
        """Return the slot of a worker; None if it has none, or no more."""
        slot = self.slots[handle.index] if handle.index < len(self.slots) else None
        return slot if slot is not None and slot.handle is handle else None

    ################################################################
    # One worker
    ################################################################

    async def _start(self, index: int) -> WorkerHandle:
        """Start a worker, and wait until it is ready.

        Raises:
          WorkerStartError: it has ended. If an OSError is its cause, there was no process.
        """
        async with self._starting:
            # The pool may have shut down in the last step, which cancels all that start workers.
            await trio.lowlevel.checkpoint_if_cancelled()
            handle = await self._start_process(index)
            # A worker that takes so long may wait for something. Others may start meanwhile.
            limit = START_SHARE * self.options.start_timeout
            with _kill_on_error(handle), trio.move_on_after(limit):
                await handle.ready.wait()
        with _kill_on_error(handle):
            await handle.ready.wait()
            if handle.started_at < math.inf:
                return handle
            # Usually it exits by itself, but what it has imported may have threads that do not.
            await handle.leave(0.0)
        assert handle.error is not None  # it has ended
        raise handle.error

    async def _start_process(self, index: int) -> WorkerHandle:
        config = self.options.worker_config(index)
        if not config.preload:
            return self._add(index, self._start_interpreter(config))
        # Not cancelled between the fork and the handle. Those that end all workers wait for it.
        self._forking += 1
        try:
            try:
                process = await self._preloader.fork(config)
            except OSError as exc:
                # The reserve may be enough for a fresh interpreter.
                logger.warning("worker %d could not be forked: %s", index, exc)
                process = None
            return self._add(index, process or self._start_interpreter(config))
        finally:
            self._forking -= 1
            self._forked.unpark_all()

    def _start_interpreter(self, config: WorkerConfig) -> WorkerProcess:
        try:
            with self._reserve.released():
                return _process.start(config)
        except OSError as exc:
            raise WorkerStartError(f"worker {config.index} could not be started: {exc}") from exc

    def _add(self, index: int, process: WorkerProcess) -> WorkerHandle:
        handle = WorkerHandle(index, process, self, self.counters)
        self.alive[handle] = trio.current_time()
        self._spawn(f"worker {index}", handle, handle.run)
        return handle

    ################################################################
    # Workers that accept
    ################################################################

    def accept_from(self, plan: AcceptPlan) -> None:
        """Have all workers, and their successors, accept connections."""
        self._accept_plan = plan
        for slot in self.slots:
            if self.queue.workers.get(slot.index) is slot.handle:
                self._share_listeners(slot)

    def _share_listeners(self, slot: Slot) -> None:
        if self._accept_plan is not None:
            slot.handle.accept_from(self._accept_plan, slot.max_jobs)

    @enable_ki_protection
    async def stop_accepting(self) -> None:
        """Have no worker accept any more, and wait until none has the listening sockets."""
        plan, self._accept_plan = self._accept_plan, None
        assert plan is not None  # the caller has called accept_from()
        plan.is_over = True
        async with trio.open_nursery() as nursery:
            for handle in list(self.alive):
                nursery.start_soon(handle.stop_accepting)

    def sync_accepted(self) -> None:
        """Count what workers have accepted."""
        for handle in self.handles():
            handle.sync_accepted()

    def _leave(self, handle: WorkerHandle) -> None:
        """Have a worker finish its jobs and exit, without waiting for that."""
        if handle.state is HandleState.ENDED:
            return
        if self._shutting_down:  # pragma: no cover - a drain begins just while workers start
            # The drain may have ended all others already.
            handle.kill(_NOT_NEEDED)
            return
        self._leaving.add(handle)
        timeout = self.options.drain_timeout
        handle.drain(timeout, is_replaced=True)
        leave = partial(handle.leave, is_replaced=True)
        self._spawn(f"leave {handle.index}", handle, leave, timeout)

    def _spawn(
        self,
        name: str,
        handle: WorkerHandle,
        function: Callable[..., Awaitable[object]],
        *args: object,
    ) -> None:
        """Start a task that belongs to a worker."""
        self._nursery.start_soon(
            self._contain, handle, function, *args, name=f"trio_unixconn.pool {name}"
        )

    @enable_ki_protection
    async def _contain(
        self, handle: WorkerHandle, function: Callable[..., Awaitable[object]], *args: object
    ) -> None:
        try:
            await function(*args)
        except Exception:
            logger.exception("%r: error in the pool, killing the worker", handle)
            handle.kill(_POOL_ERROR)

    ################################################################
    # One slot
    ################################################################

    def _activate(self, slot: Slot) -> None:
        """Let the new worker of a slot have jobs."""
        handle = slot.handle
        if handle.state is HandleState.ENDED:
            # It died after it was ready.
            self._on_crash(slot)
            return
        options = self.options
        slot.max_jobs = max(1, round(_vary(options.max_jobs))) if options.max_jobs else math.inf
        slot.expires_at = handle.started_at + _vary(options.max_age)
        slot.max_memory = _vary(options.max_memory)
        self.queue.workers[slot.index] = handle
        self._share_listeners(slot)
        self.dispatch()
        if handle in self._terminated:
            self._replace_soon(slot, _SIGTERM)

    def _install(self, slot: Slot, handle: WorkerHandle) -> None:
        """Give a slot a new worker; the old one leaves if it lives."""
        old, slot.handle = slot.handle, handle
        slot.restarts += 1
        self.counters.restarts += 1
        slot.replace_reason = None
        slot.refusals = 0
        slot.rest = INITIAL_BACKOFF
        slot.become(SlotState.RUNNING)
        self._activate(slot)
        self._leave(old)

    def _begin(
        self, slot: Slot, state: SlotState, function: Callable[[Slot], Awaitable[None]]
    ) -> None:
        """Make a slot busy."""
        # At once, before another task can do the same.
        slot.become(state)
        self._nursery.start_soon(
            self._work_on, slot, function, name=f"trio_unixconn.pool restart {slot.index}"
        )

    @enable_ki_protection
    async def _work_on(self, slot: Slot, function: Callable[[Slot], Awaitable[None]]) -> None:
        try:
            with slot.scope:
                await function(slot)
        except Exception as exc:
            logger.exception("worker %d: error in the pool, restarting it", slot.index)
            slot.deaths += 1
            slot.failures.append(exc)
            slot.handle.kill(_POOL_ERROR)
        if slot.is_busy:
            self._release(slot)

    def _release(self, slot: Slot) -> None:
        """Make a slot RUNNING, and start whatever was put off meanwhile."""
        slot.become(SlotState.RUNNING)
        if slot.handle.state is HandleState.ENDED:
            self._restart_soon(slot)
        elif slot.replace_reason is not None:
            self._replace_soon(slot, slot.replace_reason)

    def _replace_soon(self, slot: Slot, reason: str) -> None:
        """Replace a worker that lives, now or when its slot is not busy any more."""
        if not self.queue.is_open():
            return
        if slot.replace_reason is None:
            slot.replace_reason = reason
            logger.info("%r: %s, replacing it", slot.handle, reason)
        if (
            slot.state is SlotState.RUNNING
            and slot.handle.state is HandleState.READY
            and trio.current_time() >= slot.retry_at
        ):
            self._begin(slot, SlotState.REPLACING, self._replace)

    async def _replace(self, slot: Slot) -> None:
        try:
            handle = await self._start(slot.index)
        except WorkerStartError as exc:
            # Its text has the worker's traceback.
            logger.error("%s; the old one goes on", exc)  # noqa: TRY400
            slot.retry_at = trio.current_time() + MAX_BACKOFF
        else:
            self._install(slot, handle)

    def _on_crash(self, slot: Slot) -> None:
        """Count the death of a worker that was not asked to end, and start another one."""
        handle = slot.handle
        assert handle.error is not None  # it has ended
        self.counters.deaths += 1
        logger.warning("%s; another one is started", handle.error)
        if trio.current_time() - handle.started_at >= LONG_LIFE:
            slot.deaths = 0
            slot.failures.clear()
        slot.deaths += 1
        if not handle.died_with_jobs:
            slot.failures.append(handle.error)
        if slot.state is SlotState.RUNNING:
            self._restart_soon(slot)

    def _restart_soon(self, slot: Slot) -> None:
        """Start a worker in a slot whose worker has ended, unless the slot is not needed."""
        if self._shutting_down or slot.state is SlotState.RETIRED:
            return
        is_hopeless = len(slot.failures) >= self.options.crash_limit
        if not self.queue.is_open() and not (
            len(self.queue) and not (is_hopeless and self._has_ready_worker())
        ):
            # The rest of a drain is done by others.
            slot.become(SlotState.RETIRED)
            self.queue.reject_pinned_to(slot.index, f"worker {slot.index} cannot be started")
            self.notify_if_idle()
        elif is_hopeless:
            count = len(slot.failures)
            text = f"{count} consecutive workers crashed or failed to start"
            self._fail(ExceptionGroup(text, slot.failures))
        else:
            self._begin(slot, SlotState.RESTARTING, self._restart)

    def _has_ready_worker(self) -> bool:
        return any(slot.handle.state is HandleState.READY for slot in self.slots)

    async def _restart(self, slot: Slot) -> None:
        await trio.sleep(backoff_after(slot.deaths))
        try:
            handle = await self._start(slot.index)
        except WorkerStartError as exc:
            # Its text has the worker's traceback.
            logger.error("%s", exc)  # noqa: TRY400
            slot.deaths += 1
            # It is not the worker's fault that this process has no file descriptor or memory.
            if not isinstance(exc.__cause__, OSError):
                slot.failures.append(exc)
        else:
            self._install(slot, handle)

    ################################################################
    # The watch
    ################################################################

    @enable_ki_protection
    async def _watch(self) -> None:
        """Look at all clocks, and about once a second at the memory of the workers."""
        shortest = min(self.options.hang_timeout, self.options.start_timeout)
        tick = min(TICK, shortest / 5)
        look_at_memory = trio.current_time() + TICK
        while True:
            before = trio.current_time()
            await trio.sleep(tick)
            now = trio.current_time()
            try:
                self._look_at_accepted()
                if now - before > tick + shortest / 4:
                    self._restart_clocks(now)
                self._check_clocks(now)
                self._check_limits(now, with_memory=now >= look_at_memory)
            except Exception:
                logger.exception("error in the watch of the pool, which goes on")
            if now >= look_at_memory:
                look_at_memory = now + TICK

    def _look_at_accepted(self) -> None:
        """Clear the crashes of workers that have handled connections which they accepted."""
        for handle in list(self.handles()):
            handle.sync_accepted()
            accepted, handled = handle.accepted_progress()
            slot = self._slot_of(handle)
            if accepted and slot is not None:
                slot.refusals = 0
            if handled:
                self.on_finished(handle, handled)

    def _restart_clocks(self, now: float) -> None:
        """Forgive all silence: the machine was suspended, or this process did not run."""
        for handle in self.alive:
            self.alive[handle] = handle.last_heard = now
            handle.batch_sent_at = max(handle.batch_sent_at, now)

    def _check_clocks(self, now: float) -> None:
        """Kill workers that hang."""
        options = self.options
        for handle, started in list(self.alive.items()):
            silence = now - handle.last_heard
            if handle in self._overdue:
                continue
            if handle.state is HandleState.STARTING:
                if now - started > options.start_timeout:
                    self._overdue.add(handle)
                    handle.kill(f"was not ready after {options.start_timeout:g} s")
            elif silence > options.hang_timeout and (
                # A worker that has finished its last job sends no heartbeats while it exits.
                handle.state is HandleState.READY or handle.jobs_in_hand
            ):
                self._overdue.add(handle)
                logger.warning("%r: no heartbeat for %.1f s, killing it", handle, silence)
                handle.kill(f"hung for {silence:.1f} s")
            elif now - handle.batch_sent_at > options.hang_timeout:
                # Its event loop runs, but does not receive.
                self._overdue.add(handle)
                late = now - handle.batch_sent_at
                logger.warning("%r: no answer to a batch for %.1f s, killing it", handle, late)
                handle.kill(f"did not answer a batch for {late:.1f} s")

    def _check_limits(self, now: float, *, with_memory: bool) -> None:
        """Replace workers that have reached a limit, or that could not be replaced before."""
        for slot in self.slots:
            handle = slot.handle
            if handle.state is not HandleState.READY:
                continue
            if slot.replace_reason is not None:
                self._replace_soon(slot, slot.replace_reason)
            elif now >= slot.expires_at:
                self._replace_soon(slot, f"older than {now - handle.started_at:.0f} s (max_age)")
            elif with_memory and slot.max_memory < math.inf:
                memory = memory_of(handle.pid)
                if memory > slot.max_memory and now - handle.started_at >= LONG_LIFE:
                    self._replace_soon(slot, f"resident set of {memory} bytes (max_memory)")

    ################################################################
    # HandleOwner
    ################################################################

    def requeue(self, jobs: list[PendingJob], cause: Exception, *, counts: bool) -> None:
        """Have jobs that a worker has not acknowledged tried by another one."""
        self.queue.requeue(jobs, cause, counts=counts)
        self.reject_pinned()
        self.dispatch()
        self.notify_if_idle()

    def reject(self, jobs: list[PendingJob], why: str) -> None:
        """Reject jobs that no worker can have."""
        self.queue.reject(jobs, why)
        self.notify_if_idle()

    def on_acknowledged(self, handle: WorkerHandle, count: int) -> None:
        """Count the jobs, and replace the worker if it has had its share."""
        self.counters.acknowledged += count
        # The pool's copies of their file descriptors are closed.
        self._reserve.fill()
        slot = self._slot_of(handle)
        if slot is not None:
            if slot.refusals:
                jobs = list(handle.in_flight.values())[-count:]
                if any(job.kind != EndpointKind.NONE for job in jobs):
                    slot.refusals = 0
            if handle.accepted >= slot.max_jobs and slot.replace_reason is None:
                self._replace_soon(slot, f"it has accepted {handle.accepted} jobs (max_jobs)")
        self.notify_if_idle()

    def on_finished(self, handle: WorkerHandle, count: int) -> None:
        """Clear the crashes of a slot whose worker has handled a job."""
        slot = self._slot_of(handle)
        if slot is not None and count:
            slot.deaths = 0
            slot.failures.clear()
            slot.rest = INITIAL_BACKOFF
        self.dispatch()

    def on_failed(
        self, handle: WorkerHandle, job_id: int, text: str, *, awaited: bool, cancelled: bool
    ) -> None:
        """Log the traceback of a handler, unless its caller gets it.

        Args:
          cancelled: whether the end of its worker has cancelled it.
        """
        if not awaited:
            text = text.rstrip()
            logger.error(
                "%r: job %d failed\n%s" if "\n" in text else "%r: job %d failed: %s",
                handle,
                job_id,
                text,
                extra={UNFINISHED: CANCELLED} if cancelled else None,
            )
        self.dispatch()

    def on_passed(self, fd: int, kind: EndpointKind, data: bytes, peer: Any, passed: int) -> bool:
        """Give a connection that a handler has passed on to another handler, if there is one."""
        passed = min(passed + 1, _protocol.MAX_PASSED)
        if not self.queue.is_open():
            if self.successor is None or not self.successor(fd, kind, data, passed):
                return False
            self.counters.passed += 1
            return True
        self.counters.passed += 1
        now, counters = trio.current_time(), self.counters
        self.queue.put_passed(
            PendingJob(next(self.ids), fd, kind, counters, now, data, peer=peer, passed=passed)
        )
        return True

    def on_refused(self, handle: WorkerHandle) -> None:
        """Let a worker without a free file descriptor rest; replace it if that does not help."""
        if handle.refusals == 1:
            logger.warning(
                "%r: gets no jobs, which are retried, for want of a free file descriptor "
                "(RLIMIT_NOFILE)",
                handle,
            )
        slot = self._slot_of(handle)
        if slot is not None:
            slot.refusals += 1
            if slot.refusals >= MAX_REFUSALS and not handle.jobs_in_hand:
                self._replace_soon(slot, f"it refused {slot.refusals} batches in a row")
            pause, slot.rest = slot.rest, min(2 * slot.rest, MAX_REST)
            self._spawn(f"rest {handle.index}", handle, self._rest, handle, pause)

    async def _rest(self, handle: WorkerHandle, pause: float) -> None:
        await trio.sleep(pause)
        handle.resting = False
        slot = self._slot_of(handle)
        if handle.lacks_listeners and slot is not None:
            self._share_listeners(slot)
        self.dispatch()

    def on_enough(self, handle: WorkerHandle) -> None:
        """Replace a worker that has accepted its share of connections."""
        slot = self._slot_of(handle)
        if slot is not None and slot.replace_reason is None:
            self._replace_soon(slot, f"it has accepted {handle.accepted} jobs (max_jobs)")

    def on_leaving(self, handle: WorkerHandle) -> None:
        """Replace a worker that got SIGTERM, even if its slot is busy at the moment."""
        if handle.state is HandleState.READY:
            # For _activate, if other workers must be ready before this one gets its slot.
            self._terminated.add(handle)
            slot = self._slot_of(handle)
            if slot is not None:
                self._replace_soon(slot, _SIGTERM)

    def on_exit(self, handle: WorkerHandle) -> None:
        """Restart the slot of a worker that died."""
        self._reserve.fill()
        self.alive.pop(handle, None)
        for handles in (self._leaving, self._overdue, self._terminated):
            handles.discard(handle)
        if self.queue.workers.get(handle.index) is handle:
            del self.queue.workers[handle.index]
        slot = self._slot_of(handle)
        if slot is not None and not self._shutting_down:
            self._on_crash(slot)
        self.notify_if_idle()
        self._exits.unpark_all()

    def on_abandoned(self, handle: WorkerHandle, jobs: list[PendingJob]) -> None:
        """Report the jobs that a worker was handling when it died, each on its own."""
        report = self.options.on_abandoned
        for job in jobs:
            logger.warning(
                "job %d was abandoned: %s",
                job.id,
                handle.error,
                extra={UNFINISHED: f"abandoned: {handle.error}"},
            )
            if report is not None:
                seconds = trio.current_time() - job.acknowledged_at
                try:
                    data = job.data
                    if self.options.proxy_protocol is not None and job.passed:
                        _, data = split_passed(data)
                    report(AbandonedJob(job.id, handle.index, handle.pid, job.peer, data, seconds))
                except BaseException:
                    logger.exception("on_abandoned raised an exception for job %d", job.id)

    def notify_if_idle(self) -> None:
        """Let a drain look whether a job is left."""
        if self._idle:
            self._idle.unpark_all()


@contextmanager
def _kill_on_error(handle: WorkerHandle) -> Generator[None, None, None]:
    try:
        yield
    except BaseException:
        handle.kill(_NOT_NEEDED)
        raise
