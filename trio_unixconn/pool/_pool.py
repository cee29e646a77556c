"""WorkerPool: jobs in, acknowledgements and answers out, and the lives of its workers.

The rule of this file: a place in the pool has a worker that takes jobs, or one is being started
for it; the old one leaves when the new one is there.
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from ..errors import JobRefusedError, PoolClosedError, WorkerStartError
from . import _process, _wire
from ._delivery import Delivery, JobReceipt, Submitted, checked_data, take_over
from ._dispatch import Dispatcher
from ._link import Link
from ._statistics import AbandonedJob, Counters, PoolStatistics, WorkerStatistics, memory_of

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .._buffers import Buffer
    from ._reserve import Reserve

logger: Final = logging.getLogger("trio_unixconn.pool")

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 10.0
# A worker that has lived so long, or has finished a job, does not count as one that cannot.
_LONG_LIFE: Final = 10.0
_LONGEST_REST: Final = 1.0
# How many jobs a worker can have finished without having said so, whatever it may have in flight:
# "as many as you like" is no size for a file.
_MOST_NOTED: Final = 2**20
# What workers have to clean up in, when the pool's block was left by an exception.
_SHORT_END: Final = 1.0


@attrs.frozen(kw_only=True)
class PoolOptions:
    """What :func:`open_worker_pool` was asked for; see there."""

    handler: str
    workers: int
    setup: str | None
    max_in_flight: int
    max_queue: int
    max_tries: int
    max_jobs: int | None
    start_timeout: float
    hang_timeout: float
    drain_timeout: float
    crash_limit: int
    on_abandoned: Callable[[AbandonedJob], None] | None


@attrs.define(eq=False)
class _Place:
    """A place in the pool.

    Attributes:
      failures: why its workers died, since one of them was of any use.
      busy: whether a worker is being started or replaced here; then ``changed`` says when that
        has come to an end.
      again: when a worker that is well may be replaced, if the last new one could not start.
    """

    index: int
    link: Link
    restarts: int = 0
    failures: list[Exception] = attrs.field(factory=list[Exception])
    busy: bool = False
    changed: trio.Event = attrs.field(factory=trio.Event)
    rest: float = _FIRST_PAUSE
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


def _pause(failures: int) -> float:
    """Return how long to wait before another worker is started, in seconds."""
    if not failures:
        return 0.0
    # Behind that nothing grows but a number that soon is none for a float.
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(failures - 1, 10))


class WorkerPool:
    """Workers that get jobs; :func:`open_worker_pool` makes one."""

    def __init__(self, options: PoolOptions, nursery: trio.Nursery, reserve: Reserve) -> None:
        self._options = options
        self._nursery = nursery
        self._reserve = reserve
        self._counters = Counters()
        self._dispatcher = Dispatcher(
            options.max_in_flight, options.max_queue, options.max_tries, self._counters
        )
        self._places: list[_Place] = []
        self._draining: set[Link] = set()
        # All whose processes are there, also such as are being started.
        self._alive: set[Link] = set()
        self._numbers = itertools.count(1)
        # Why no more jobs are taken, and whether workers that die are not replaced any more.
        self._closed: str | None = None
        self._over = False
        # Why it ended itself.
        self._failure: Exception | None = None
        # Changes of who is in the pool, one after the other.
        self._changing = trio.Lock()
        self._idle = trio.lowlevel.ParkingLot()
        self._pump = self._dispatcher.pump

    ################################################################
    # Jobs
    ################################################################

    @enable_ki_protection
    async def submit(
        self, what: Submitted, *, data: Buffer = b"", to: int | None = None
    ) -> JobReceipt:
        """Hand a stream, socket, file or descriptor to the least busy worker.

        Ownership moves to the pool at once, whatever happens then: ``what`` is detached or
        closed, or, if it is an int, not the caller's any more. Only a TypeError, a ValueError
        or a PoolClosedError leaves it as it was.

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
          TypeError, ValueError, OSError: nothing that a worker can have.
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
        self._check_open()
        if to is not None and not 0 <= to < len(self._places):
            raise ValueError(f"to must be the index of a worker, below {len(self._places)}")
        goes_along = checked_data(data)
        if what is None:
            if not wants_answer:
                raise TypeError("a stream, socket, file or descriptor is due, not None")
            fd, form = -1, _wire.NO_DESCRIPTOR
        else:
            fd, form = take_over(what)
        delivery = Delivery(
            next(self._numbers), fd, form, goes_along, to=to, wants_answer=wants_answer
        )
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            await self.wait_for_room()
        except PoolClosedError as exc:
            delivery.close()
            # Not as it came: that says that what was submitted is as it was.
            raise JobRefusedError(f"job {delivery.id} was given up: {exc}") from exc
        except BaseException:
            delivery.close()
            raise
        self.put(delivery)
        if to is not None:
            self._give_up_bound()
        await self._outcome(delivery)
        return delivery

    async def _outcome(self, delivery: Delivery) -> None:
        def abort(raise_cancel: Callable[[], Any]) -> trio.lowlevel.Abort:
            if not delivery.sent:
                self._dispatcher.withdraw(delivery)
                delivery.task = None
                # It may have been what a drain waited for.
                self._look_idle()
                return trio.lowlevel.Abort.SUCCEEDED
            delivery.raise_cancel = raise_cancel
            for link in self._links():
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

    def put(self, delivery: Delivery) -> None:
        """Let a job wait for a worker, which may be at once."""
        self._counters.submitted += 1
        self._dispatcher.put(delivery)
        self._pump()

    def put_accepted(self, fds: list[int], form: int) -> None:
        """Let accepted sockets wait for workers; nobody waits for what becomes of them."""
        self._counters.submitted += len(fds)
        queue, numbers = self._dispatcher.queue, self._numbers
        for fd in fds:
            queue.append(Delivery(next(numbers), fd, form))
        self._pump()

    def free(self) -> int:
        """Return how many more jobs may wait."""
        return self._dispatcher.free()

    async def wait_for_room(self) -> None:
        """Wait until another job may wait.

        Raises:
          PoolClosedError: the pool takes no more jobs.
        """
        self._check_open()
        while self._dispatcher.free() <= 0:
            await self._dispatcher.waiting.park()
            # There is also room when all that waited was given up at the end.
            self._check_open()

    def _check_open(self) -> None:
        if self._closed is not None:
            raise PoolClosedError(self._closed)

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
        async with self._changing:
            self._check_open()
            for place in list(self._places):
                while place.busy:
                    # What is being started there may have imported the old handler already.
                    await place.changed.wait()
                    self._check_open()
                await self._replace(place)

    async def scale(self, workers: int) -> None:
        """Have so many workers, from now on; those that are too many finish what they have.

        Raises:
          ValueError: fewer than one.
          WorkerStartError: a new one could not start; there are as many as before.
          PoolClosedError: the pool takes no more jobs.
        """
        if workers < 1:
            raise ValueError(f"a pool has at least one worker, not {workers}")
        async with self._changing:
            self._check_open()
            new = range(len(self._places), workers)
            await self._fill(new)
            while len(self._places) > workers:
                place = self._places.pop()
                self._dispatcher.links.pop(place.index, None)
                self._leave(place.link)
            self._give_up_bound()

    def _give_up_bound(self) -> None:
        """Give up jobs that only a worker may have that is not there any more."""
        bound = self._dispatcher.bound
        for index in [each for each in bound if each >= len(self._places)]:
            self._dispatcher.give_up_all(bound.pop(index), f"there is no worker {index} any more")

    async def drain(self, timeout: float | None = None) -> None:
        """Take no more jobs, finish those that there are, and end the workers.

        Args:
          timeout: after so many seconds, handlers that are still at work are cancelled, and jobs
            that still wait are given up; ``drain_timeout`` if left out.

        Raises:
          ValueError: a timeout that is negative, or no number; the pool goes on.
        """
        timeout = self._options.drain_timeout if timeout is None else timeout
        if not timeout >= 0:
            raise ValueError(f"a timeout of 0 or more seconds is due, not {timeout}")
        self._closed = self._closed or "the pool is draining, and takes no more jobs"
        self._dispatcher.waiting.unpark_all()
        begin = trio.current_time()
        with trio.move_on_after(timeout):
            while self._dispatcher.count() or any(link.batch for link in self._links()):
                await self._idle.park()
        self._over = True
        self._dispatcher.clear("the pool ended first")
        left = max(0.0, begin + timeout - trio.current_time())
        async with trio.open_nursery() as nursery:
            for link in list(self._links()):
                nursery.start_soon(link.leave, left)

    def _links(self) -> Iterable[Link]:
        yield from (place.link for place in self._places)
        yield from self._draining

    async def _fill(self, indexes: range) -> None:
        """Start workers for new places, all at a time."""
        errors: list[Exception] = []
        links: dict[int, Link] = {}

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
        except BaseException:
            for link in links.values():
                self._leave(link)
            raise
        # In order, and without gaps: an index is a position.
        for index in indexes:
            self._places.append(_Place(index, links[index]))
            self._welcome(self._places[-1], links[index])

    async def _start(self, index: int) -> Link:
        """Start a worker, and wait until it is ready.

        Raises:
          WorkerStartError: it is gone; with an OSError as its cause, it never was there.
        """
        options = self._options
        order = {
            "handler": options.handler,
            "setup": options.setup,
            "board": min(options.max_in_flight, _MOST_NOTED),
            "beat": options.hang_timeout / 5 if options.hang_timeout < math.inf else 1.0,
        }
        try:
            with self._reserve.spent():
                process = _process.start(order)
        except OSError as exc:
            raise WorkerStartError(f"worker {index} could not be started: {exc}") from exc
        link = Link(index, process, self)
        self._alive.add(link)
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

    def _welcome(self, place: _Place, link: Link) -> None:
        """Let the worker that a place has now take jobs."""
        if link.state == "ended":
            # It was ready, and died before it came to that.
            self._lost(place, link)
            return
        self._dispatcher.links[place.index] = link
        self._pump()

    async def _replace(self, place: _Place) -> None:
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
        self._leave(old)

    def _leave(self, link: Link) -> None:
        """Have a worker finish what it has, and end, while everything else goes on."""
        if self._over:
            # Nobody would wait for that, and the nursery may be closed.
            link.kill("was no longer needed")
        elif link.state != "ended":
            self._draining.add(link)
            link.ask_to_leave(self._options.drain_timeout)
            self._nursery.start_soon(link.leave, self._options.drain_timeout)

    def _revive_soon(self, place: _Place) -> None:
        if not place.busy and self._has(place):
            place.begin()
            self._nursery.start_soon(
                self._revive, place, name=f"trio_unixconn.pool restart {place.index}"
            )

    async def _revive(self, place: _Place) -> None:
        """Start a worker in the place of one that died, after a growing pause."""
        link = None
        tries = len(place.failures)
        try:
            while len(place.failures) < self._options.crash_limit:
                await trio.sleep(_pause(tries))
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

    async def _try_again(self, place: _Place) -> Link | None:
        try:
            return await self._start(place.index)
        except WorkerStartError as exc:
            logger.error("%s", exc)  # noqa: TRY400 - its text has the worker's traceback
            # That this process has no descriptor free, say, is not the worker's fault.
            if not isinstance(exc.__cause__, OSError):
                place.failures.append(exc)
            return None

    def _has(self, place: _Place) -> bool:
        return not self._over and place in self._places

    def _settle(self, place: _Place, link: Link) -> None:
        """Let a worker have its place, if that is still there."""
        if not self._has(place):
            self._leave(link)
            return
        place.link = link
        place.restarts += 1
        self._counters.restarts += 1
        self._welcome(place, link)

    def _end(self, failure: Exception) -> None:
        self._failure = failure
        self._closed = "the pool has ended, because its workers could not live"
        self._nursery.cancel_scope.cancel()

    async def _watch(self) -> None:
        """Kill workers that do not say that they live."""
        timeout = self._options.hang_timeout
        pause = timeout / 5
        while True:
            before = trio.current_time()
            await trio.sleep(pause)
            now = trio.current_time()
            if now - before > 2 * pause:
                # This process was not running either, and what they said is still unread.
                continue
            for link in list(self._links()):
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

    def pump(self) -> None:
        """There may be room for jobs now."""
        self._pump()

    def take_back(self, deliveries: list[Delivery], why: Exception, *, counts: bool) -> None:
        """Have jobs that a worker has not taken tried by another."""
        self._dispatcher.take_back(deliveries, why, counts=counts)
        self._give_up_bound()
        if self._over:
            self._dispatcher.clear("the pool ended first")
        self._pump()
        self._look_idle()

    def give_up(self, deliveries: list[Delivery], why: str) -> None:
        """Have jobs given up that cannot be sent to any worker."""
        self._dispatcher.give_up_all(deliveries, why)
        self._look_idle()

    def refused(self, link: Link) -> None:
        """Give a worker that has no descriptor free time to close some."""
        place = self._place_of(link)
        if place is not None:
            self._nursery.start_soon(self._rest, place, link)

    async def _rest(self, place: _Place, link: Link) -> None:
        pause, place.rest = place.rest, min(2 * place.rest, _LONGEST_REST)
        await trio.sleep(pause)
        link.resting = False
        self._pump()

    def acknowledged(self, link: Link, count: int) -> None:
        """Count jobs that were taken."""
        self._counters.acknowledged += count
        # The pool's copies are closed.
        self._reserve.fill()
        most = self._options.max_jobs
        if most is not None and link.taken >= most and link.state == "ready":
            self._renew(link)
        self._look_idle()

    def handled(self, link: Link, count: int) -> None:
        """Count jobs whose handler has returned."""
        self._counters.handled += count
        place = self._place_of(link)
        if place is not None:
            place.failures.clear()
            place.rest = _FIRST_PAUSE
        self._pump()

    def failed(self, link: Link, number: int, text: str, *, awaited: bool) -> None:
        """Count a job whose handler has raised, and log it unless its caller is told."""
        self._counters.failed += 1
        if not awaited:
            logger.error(
                "worker %d (pid %d): job %d failed\n%s", link.index, link.pid, number, text.rstrip()
            )
        self._pump()

    def abandoned(self, link: Link, numbers: Iterable[int]) -> None:
        """Report what a worker was handling when it died."""
        for number in numbers:
            self._counters.abandoned += 1
            job = AbandonedJob(number, link.index, link.pid)
            logger.warning("job %d was being handled when its worker died: %s", number, link.error)
            if self._options.on_abandoned is not None:
                self._options.on_abandoned(job)

    def leaving(self, link: Link) -> None:
        """Replace a worker that somebody has asked to end (SIGTERM)."""
        if link.state == "ready":
            logger.info(
                "worker %d (pid %d) was asked to end, and is replaced", link.index, link.pid
            )
            self._renew(link)

    def _renew(self, link: Link) -> None:
        place = self._place_of(link)
        if (
            self._closed is None
            and place is not None
            and not place.busy
            and trio.current_time() >= place.again
        ):
            # At once: others may ask for it before the task begins.
            place.begin()
            self._nursery.start_soon(
                self._replace_logged, place, name=f"trio_unixconn.pool restart {place.index}"
            )

    async def _replace_logged(self, place: _Place) -> None:
        try:
            await self._replace(place)
        except WorkerStartError as exc:
            logger.error("%s; the old one goes on", exc)  # noqa: TRY400 - as above
            place.again = trio.current_time() + _LONGEST_PAUSE

    def ended(self, link: Link) -> None:
        """Have a worker that died replaced."""
        self._reserve.fill()
        self._alive.discard(link)
        self._draining.discard(link)
        if self._dispatcher.links.get(link.index) is link:
            del self._dispatcher.links[link.index]
        self._look_idle()
        place = self._place_of(link)
        if place is not None and not self._over:
            self._lost(place, link)

    def _lost(self, place: _Place, link: Link) -> None:
        assert link.error is not None  # noqa: S101 - it has ended
        self._counters.deaths += 1
        logger.warning("%s; another is started", link.error)
        if not link.handled and trio.current_time() - link.started < _LONG_LIFE:
            place.failures.append(link.error)
        else:
            place.failures.clear()
        self._revive_soon(place)

    def _place_of(self, link: Link) -> _Place | None:
        """Return the place that a worker has; None if it has left it."""
        place = self._places[link.index] if link.index < len(self._places) else None
        return place if place is not None and place.link is link else None

    def _look_idle(self) -> None:
        if self._idle:
            self._idle.unpark_all()

    ################################################################
    # How it is
    ################################################################

    def statistics(self) -> PoolStatistics:
        """Return what the pool has done, and is doing."""
        links = list(self._links())
        restarts = {id(place.link): place.restarts for place in self._places}
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
            **attrs.asdict(self._counters),
        )

    async def _open(self) -> None:
        await self._fill(range(self._options.workers))
        if self._options.hang_timeout < math.inf:
            self._nursery.start_soon(self._watch, name="trio_unixconn.pool watch")

    def _kill(self) -> None:
        """Kill whoever is still there, such as workers that were just being started."""
        for link in self._alive:
            link.kill("was no longer needed")

    async def _abort(self) -> None:
        """End the workers at once: their handlers are cancelled, and have a moment for that."""
        self._closed = self._closed or "the pool is closed"
        self._over = True
        self._dispatcher.waiting.unpark_all()
        self._dispatcher.clear("the pool ended first")
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for link in list(self._links()):
                    nursery.start_soon(link.leave, 0.0, _SHORT_END)
