"""Supervisor: the lives of the workers, and what becomes of jobs when one ends.

The rule of this file: a place in the pool has a worker that takes jobs, or one is being started
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
from ..errors import PoolClosedError, WorkerStartError
from . import _process
from ._handle import WorkerHandle
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
# How many jobs a worker can have finished without having said so, whatever it may have in flight:
# "as many as you like" is no size for a file.
_MOST_NOTED: Final = 2**20
# What workers have to clean up in, when the pool's block was left by an exception.
_SHORT_END: Final = 1.0


@attrs.define(eq=False)
class Slot:
    """A place in the pool.

    Attributes:
      failures: why its workers died, since one of them was of any use.
      busy: whether a worker is being started or replaced here; then ``changed`` says when that
        has come to an end.
      again: when a worker that is well may be replaced, if the last new one could not start.
    """

    index: int
    link: WorkerHandle
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
      places: the places of the pool, by index.
      alive: all whose processes are there, also such as are being started.
      closed: why no more jobs are taken; None while they are.
      failure: why it ended itself, if it did.
      pump: hands over what can be handed over.
    """

    def __init__(self, options: PoolConfig, nursery: trio.Nursery, reserve: FdReserve) -> None:
        self.options: PoolConfig = options
        self._nursery = nursery
        self._reserve = reserve
        self._counters = Counters()
        self.queue: JobQueue = JobQueue(
            options.max_in_flight, options.max_queue, options.max_attempts, self._counters
        )
        self.places: list[Slot] = []
        self._draining: set[WorkerHandle] = set()
        self.alive: set[WorkerHandle] = set()
        self.closed: str | None = None
        # Whether workers that die are not replaced any more.
        self._over = False
        self.failure: Exception | None = None
        # Changes of who is in the pool, one after the other.
        self._changing = trio.Lock()
        self._idle = trio.lowlevel.ParkingLot()
        self.pump: Callable[[], None] = self.queue.pump

    def check_open(self) -> None:
        """Raise unless jobs are taken.

        Raises:
          PoolClosedError: they are not.
        """
        if self.closed is not None:
            raise PoolClosedError(self.closed)

    def links(self) -> Iterable[WorkerHandle]:
        """Return the workers that have a place, and those that are leaving."""
        yield from (place.link for place in self.places)
        yield from self._draining

    ################################################################
    # Who is in the pool
    ################################################################

    async def restart(self) -> None:
        """As :meth:`WorkerPool.restart`."""
        async with self._changing:
            self.check_open()
            for place in list(self.places):
                while place.busy:
                    # What is being started there may have imported the old handler already.
                    await place.changed.wait()
                self.check_open()
                await self._replace(place)

    async def scale(self, workers: int) -> None:
        """As :meth:`WorkerPool.scale`."""
        async with self._changing:
            self.check_open()
            new = range(len(self.places), workers)
            await self._fill(new)
            while len(self.places) > workers:
                place = self.places.pop()
                self.queue.links.pop(place.index, None)
                self._leave(place.link)
            self.give_up_bound()

    def give_up_bound(self) -> None:
        """Give up jobs that only a worker may have that is not there any more."""
        bound = self.queue.bound
        for index in [each for each in bound if each >= len(self.places)]:
            self.queue.give_up_all(bound.pop(index), f"there is no worker {index} any more")

    async def drain(self, timeout: float | None = None) -> None:
        """As :meth:`WorkerPool.drain`; ``drain_timeout`` if none is given."""
        timeout = self.options.drain_timeout if timeout is None else timeout
        self.closed = self.closed or "the pool is draining, and takes no more jobs"
        self.queue.waiting.unpark_all()
        begin = trio.current_time()
        with trio.move_on_after(timeout):
            while self.queue.count() or any(link.batch for link in self.links()):
                await self._idle.park()
        self._over = True
        self.queue.clear("the pool ended first")
        left = max(0.0, begin + timeout - trio.current_time())
        async with trio.open_nursery() as nursery:
            for link in list(self.links()):
                nursery.start_soon(link.leave, left)

    async def _fill(self, indexes: range) -> None:
        """Start workers for new places, all at a time."""
        errors: list[Exception] = []
        links: dict[int, WorkerHandle] = {}

        async def fill(index: int) -> None:
            try:
                links[index] = await self._start(index)
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
            self.check_open()
        except BaseException:
            for link in links.values():
                self._leave(link)
            raise
        # In order, and without gaps: an index is a position.
        for index in indexes:
            self.places.append(Slot(index, links[index]))
            self._welcome(self.places[-1], links[index])

    async def _start(self, index: int) -> WorkerHandle:
        """Start a worker, and wait until it is ready.

        Raises:
          WorkerStartError: it is gone; with an OSError as its cause, it never was there.
        """
        options = self.options
        order = {
            "handler": options.handler,
            "setup": options.setup,
            "board": min(options.max_in_flight, _MOST_NOTED),
            "beat": options.hang_timeout / 5 if options.hang_timeout < math.inf else 1.0,
        }
        try:
            with self._reserve.released():
                process = _process.start(order)
        except OSError as exc:
            raise WorkerStartError(f"worker {index} could not be started: {exc}") from exc
        link = WorkerHandle(index, process, self)
        self.alive.add(link)
        self._nursery.start_soon(link.run, name=f"trio_unixconn.pool worker {index}")
        try:
            with trio.move_on_after(options.start_timeout):
                await link.settled.wait()
            if link.started < math.inf:
                return link
            if link.error is None:
                link.kill(f"was not ready after {options.start_timeout} seconds")
            # Mostly it ends by itself; but what it has imported may have threads that do not.
            await link.leave(0.0)
        except BaseException:
            link.kill("was no longer needed")
            raise
        assert link.error is not None  # noqa: S101 - it has ended
        raise link.error

    def _welcome(self, place: Slot, link: WorkerHandle) -> None:
        """Let the worker that a place has now take jobs."""
        if link.state == "ended":
            # It was ready, and died before it came to that.
            self._lost(place, link)
            return
        self.queue.links[place.index] = link
        self.pump()

    async def _replace(self, place: Slot) -> None:
        place.begin()
        try:
            new = await self._start(place.index)
        except BaseException:
            place.end()
            if place.link.state == "ended":
                # The old one died meanwhile.
                self._revive_soon(place)
            raise
        place.end()
        old = place.link
        self._settle(place, new)
        # If not, the place is gone, or the pool is ending: then others see to it that the old one
        # finishes what it has.
        if place.link is new:
            self._leave(old)

    def _leave(self, link: WorkerHandle) -> None:
        """Have a worker finish what it has, and end, while everything else goes on."""
        if self._over:
            # Nobody would wait for that, and the nursery may be closed.
            link.kill("was no longer needed")
        elif link.state != "ended":
            self._draining.add(link)
            link.ask_to_leave(self.options.drain_timeout)
            self._nursery.start_soon(link.leave, self.options.drain_timeout)

    def _revive_soon(self, place: Slot) -> None:
        if not place.busy and self._has(place):
            place.begin()
            self._nursery.start_soon(
                self._revive, place, name=f"trio_unixconn.pool restart {place.index}"
            )

    async def _revive(self, place: Slot) -> None:
        """Start a worker in the place of one that died, after a growing pause."""
        link = None
        tries = len(place.failures)
        try:
            while len(place.failures) < self.options.crash_limit:
                await trio.sleep(backoff_after(tries))
                if not self._has(place):
                    return
                tries += 1
                link = await self._try_again(place)
                if link is not None:
                    break
        finally:
            place.end()
        if link is not None:
            self._settle(place, link)
        else:
            self._end(
                ExceptionGroup(
                    f"{len(place.failures)} workers in turn died, or could not start, before "
                    "they finished a job",
                    place.failures,
                )
            )

    async def _try_again(self, place: Slot) -> WorkerHandle | None:
        try:
            return await self._start(place.index)
        except WorkerStartError as exc:
            logger.error("%s", exc)  # noqa: TRY400 - its text has the worker's traceback
            # That this process has no descriptor free, say, is not the worker's fault.
            if not isinstance(exc.__cause__, OSError):
                place.failures.append(exc)
            return None

    def _has(self, place: Slot) -> bool:
        return not self._over and place in self.places

    def _settle(self, place: Slot, link: WorkerHandle) -> None:
        """Let a worker have its place, if that is still there."""
        if not self._has(place):
            self._leave(link)
            return
        place.link = link
        place.restarts += 1
        self._counters.restarts += 1
        self._welcome(place, link)

    def _end(self, failure: Exception) -> None:
        self.failure = failure
        self.closed = "the pool has ended, because its workers could not live"
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
            for link in list(self.links()):
                if link.state != "ended" and now - link.last_heard > timeout:
                    logger.warning(
                        "worker %d (pid %d) has not been heard of for %.1f seconds, and is killed",
                        link.index,
                        link.pid,
                        now - link.last_heard,
                    )
                    link.kill(f"hung for {now - link.last_heard:.1f} seconds")

    ################################################################
    # What its workers say
    ################################################################

    def take_back(self, deliveries: list[PendingJob], why: Exception, *, counts: bool) -> None:
        """Have jobs that a worker has not taken tried by another."""
        self.queue.take_back(deliveries, why, counts=counts)
        self.give_up_bound()
        if self._over:
            self.queue.clear("the pool ended first")
        self.pump()
        self.look_idle()

    def give_up(self, deliveries: list[PendingJob], why: str) -> None:
        """Have jobs given up that cannot be sent to any worker."""
        self.queue.give_up_all(deliveries, why)
        self.look_idle()

    def refused(self, link: WorkerHandle) -> None:
        """Give a worker that has no descriptor free time to close some."""
        place = self._place_of(link)
        if place is not None:
            self._nursery.start_soon(self._rest, place, link)

    async def _rest(self, place: Slot, link: WorkerHandle) -> None:
        pause, place.rest = place.rest, min(2 * place.rest, _LONGEST_REST)
        await trio.sleep(pause)
        link.resting = False
        self.pump()

    def acknowledged(self, link: WorkerHandle, count: int) -> None:
        """Count jobs that were taken."""
        self._counters.acknowledged += count
        # The pool's copies are closed.
        self._reserve.fill()
        most = self.options.max_jobs
        if most is not None and link.taken >= most and link.state == "ready":
            self._renew(link)
        self.look_idle()

    def handled(self, link: WorkerHandle, count: int) -> None:
        """Count jobs whose handler has returned."""
        self._counters.handled += count
        place = self._place_of(link)
        if place is not None:
            place.failures.clear()
            place.rest = INITIAL_BACKOFF
        self.pump()

    def failed(self, link: WorkerHandle, number: int, text: str, *, awaited: bool) -> None:
        """Count a job whose handler has raised, and log it unless its caller is told."""
        self._counters.failed += 1
        if not awaited:
            logger.error(
                "worker %d (pid %d): job %d failed\n%s", link.index, link.pid, number, text.rstrip()
            )
        self.pump()

    def abandoned(self, link: WorkerHandle, numbers: Iterable[int]) -> None:
        """Report what a worker was handling when it died."""
        for number in numbers:
            self._counters.abandoned += 1
            job = AbandonedJob(number, link.index, link.pid)
            logger.warning("job %d was being handled when its worker died: %s", number, link.error)
            if self.options.on_abandoned is not None:
                self.options.on_abandoned(job)

    def leaving(self, link: WorkerHandle) -> None:
        """Replace a worker that somebody has asked to end (SIGTERM)."""
        if link.state == "ready":
            logger.info(
                "worker %d (pid %d) was asked to end, and is replaced", link.index, link.pid
            )
            self._renew(link)

    def _renew(self, link: WorkerHandle) -> None:
        place = self._place_of(link)
        if (
            self.closed is None
            and place is not None
            and not place.busy
            and trio.current_time() >= place.again
        ):
            # At once: others may ask for it before the task begins.
            place.begin()
            self._nursery.start_soon(
                self._replace_logged, place, name=f"trio_unixconn.pool restart {place.index}"
            )

    async def _replace_logged(self, place: Slot) -> None:
        try:
            await self._replace(place)
        except WorkerStartError as exc:
            logger.error("%s; the old one goes on", exc)  # noqa: TRY400 - as above
            place.again = trio.current_time() + MAX_BACKOFF

    def ended(self, link: WorkerHandle) -> None:
        """Have a worker that died replaced."""
        self._reserve.fill()
        self.alive.discard(link)
        self._draining.discard(link)
        if self.queue.links.get(link.index) is link:
            del self.queue.links[link.index]
        self.look_idle()
        place = self._place_of(link)
        if place is not None and not self._over:
            self._lost(place, link)

    def _lost(self, place: Slot, link: WorkerHandle) -> None:
        assert link.error is not None  # noqa: S101 - it has ended
        self._counters.deaths += 1
        logger.warning("%s; another is started", link.error)
        if not link.handled and trio.current_time() - link.started < _LONG_LIFE:
            place.failures.append(link.error)
        else:
            place.failures.clear()
        self._revive_soon(place)

    def _place_of(self, link: WorkerHandle) -> Slot | None:
        """Return the place that a worker has; None if it has left it."""
        place = self.places[link.index] if link.index < len(self.places) else None
        return place if place is not None and place.link is link else None

    def look_idle(self) -> None:
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
        for link in self.alive:
            link.kill("was no longer needed")

    async def abort(self) -> None:
        """End the workers at once: their handlers are cancelled, and have a moment for that."""
        self.closed = self.closed or "the pool is closed"
        self._over = True
        self.queue.waiting.unpark_all()
        self.queue.clear("the pool ended first")
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for link in list(self.links()):
                    nursery.start_soon(link.leave, 0.0, _SHORT_END)
