"""JobQueue: the jobs that are queued, and which worker gets which.

There is a lane for jobs that any worker may have, and a lane for each worker that has pinned jobs
(``worker=``). Each lane holds at most ``max_queue`` jobs, so that pinned jobs of a busy worker
do not keep others out.

A submitter reserves a slot of a lane, puts its job there, or releases the slot. A slot that becomes
free is given to the task that has waited longest, which owns it from that moment: if the task does
not use the slot, it releases it, and the next one gets it. No wake-up is lost.

Jobs are dispatched in the order of their age over both lanes. Of the workers that can accept a job,
the one with the fewest jobs gets it, and among those the one that was given the fewest lately.

Invariant: a queued job is in exactly one lane.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heapreplace
from typing import TYPE_CHECKING, Final

import trio

from .._owner import DescriptorOwner
from ..errors import JobRefusedError, PoolClosedError
from ._endpoints import CONNECTIONS
from ._pending import JobEnd, PendingJob

if TYPE_CHECKING:
    from ._handle import WorkerHandle
    from ._statistics import Counters

# A job with more bytes is the last one of its batch, so that others do not wait for its transfer.
LARGE_DATA: Final = 16 * 1024
# The number of jobs after which the jobs that a worker was given before count half.
RECENT_JOBS: Final = 256


class _Lane:
    """Jobs in the order of their age, slots that are reserved, and tasks that wait for a slot."""

    __slots__ = ("jobs", "reserved", "submitters")

    def __init__(self) -> None:
        self.jobs: OrderedDict[int, PendingJob] = OrderedDict()
        self.reserved: int = 0
        self.submitters: trio.lowlevel.ParkingLot = trio.lowlevel.ParkingLot()

    def is_unused(self) -> bool:
        return not (self.jobs or self.reserved or self.submitters)

    def put_back(self, job: PendingJob) -> None:
        """Insert a job that is older than those that were put after it."""
        jobs = self.jobs
        oldest = next(iter(jobs), job.id)
        jobs[job.id] = job
        if oldest >= job.id:
            jobs.move_to_end(job.id, last=False)
        else:
            self.jobs = OrderedDict(sorted(jobs.items()))


class JobQueue(DescriptorOwner):
    """The queue of a pool.

    Attributes:
      workers: the handles of the workers that get jobs, by their index.
      closed: set when no more jobs are accepted.
    """

    def __init__(
        self, max_in_flight: int, max_queue: int, max_attempts: int, counters: Counters
    ) -> None:
        self.workers: dict[int, WorkerHandle] = {}
        self.closed: trio.Event = trio.Event()
        self._max_in_flight = max_in_flight
        self._max_queue = max_queue
        self._max_attempts = max_attempts
        self._counters = counters
        self._common = _Lane()
        self._pinned: dict[int, _Lane] = {}
        # Why no more jobs are accepted, and why those that are queued are rejected.
        self._closed: str | None = None
        self._cleared: str | None = None

    ################################################################
    # Slots
    ################################################################

    async def reserve(self, worker: int | None = None) -> None:
        """Wait for a slot of a lane, which the caller uses with ``put``, or releases.

        Only if it waits, this is a checkpoint.

        Raises:
          PoolClosedError: the pool accepts no more jobs.
        """
        self.check_open()
        lane = self._lane(worker)
        if lane.submitters or self._free(lane) <= 0:
            # It is woken with a slot, or because the queue was closed.
            await lane.submitters.park()
            if self._closed is None:
                return
            self.check_open()
        lane.reserved += 1

    def reserve_nowait(self, count: int) -> int:
        """Reserve up to ``count`` slots for jobs of any worker, and return their number."""
        if self._closed is not None:
            return 0
        count = max(0, min(count, self._free(self._common)))
        self._common.reserved += count
        return count

    def release(self, count: int = 1, worker: int | None = None) -> None:
        """Give back reserved slots that are not used; tasks that wait get them."""
        lane = self._lane(worker)
        lane.reserved -= count
        self._wake_submitters(lane, worker)

    def put(self, job: PendingJob) -> None:
        """Queue a job in a slot that its submitter has reserved, and dispatch it."""
        self._put(job)
        self.dispatch()

    def put_passed(self, job: PendingJob) -> None:
        """Queue a connection that a handler has passed on, even if the queue is full."""
        self._common.reserved += 1
        self.put(job)

    def put_many(self, jobs: Iterable[PendingJob]) -> None:
        """Queue jobs of the same kind of lane as ``put``, and dispatch them together."""
        for job in jobs:
            self._put(job)
        self.dispatch()

    def _put(self, job: PendingJob) -> None:
        lane = self._lane(job.worker)
        lane.reserved -= 1
        self._counters.submitted += 1
        if self._cleared is not None:
            self._reject(job, self._cleared)
        else:
            lane.jobs[job.id] = job

    def cancel(self, job: PendingJob) -> None:
        """Take a queued job back for its submitter, which was cancelled."""
        lane = self._lane(job.worker)
        del lane.jobs[job.id]
        job.settle(JobEnd.CANCELLED)
        self._wake_submitters(lane, job.worker)

    def is_open(self) -> bool:
        """Whether jobs are accepted."""
        return self._closed is None

    def check_open(self) -> None:
        """Raise unless jobs are accepted.

        Raises:
          PoolClosedError: they are not.
        """
        if self._closed is not None:
            raise PoolClosedError(self._closed)

    def _lane(self, worker: int | None) -> _Lane:
        if worker is None:
            return self._common
        lane = self._pinned.get(worker)
        if lane is None:
            lane = self._pinned[worker] = _Lane()
        return lane

    def _free(self, lane: _Lane) -> int:
        return self._max_queue - len(lane.jobs) - lane.reserved

    def _wake_submitters(self, lane: _Lane, worker: int | None) -> None:
        while lane.submitters and self._free(lane) > 0:
            lane.reserved += 1
            lane.submitters.unpark()
        if worker is not None and lane.is_unused() and self._pinned.get(worker) is lane:
            del self._pinned[worker]

    ################################################################
    # Values
    ################################################################

    def __len__(self) -> int:
        """Return the number of queued jobs."""
        return len(self._common.jobs) + sum(len(lane.jobs) for lane in self._pinned.values())

    def oldest_submitted_at(self) -> float | None:
        """Return when the oldest queued job was submitted; None if none is queued."""
        lanes = [self._common, *self._pinned.values()]
        oldest = [next(iter(lane.jobs.values())).submitted_at for lane in lanes if lane.jobs]
        return min(oldest, default=None)

    ################################################################
    # Dispatch
    ################################################################

    def dispatch(self) -> None:
        """Give queued jobs to workers that can accept them."""
        common = self._common.jobs
        if not common and not self._pinned:
            return
        most = self._max_in_flight
        ready = [each for each in self.workers.values() if each.can_accept(most)]
        if not ready:
            return
        if len(ready) == 1 and not self._pinned:
            self._give_next(ready[0])
        elif len(common) == 1 and not self._pinned:
            best = min(ready, key=lambda each: (len(each.in_flight), each.recent, each.index))
            self._give(best, [common.popitem(last=False)[1]])
        else:
            self._share_out(ready)
        if self._common.submitters:
            self._wake_submitters(self._common, None)
        if self._pinned:
            for worker, lane in list(self._pinned.items()):
                self._wake_submitters(lane, worker)

    def _give_next(self, handle: WorkerHandle) -> None:
        """Give as many jobs as it can have to the only worker that can accept any."""
        common = self._common.jobs
        size = min(handle.limit, self._max_in_flight - len(handle.in_flight))
        share: list[PendingJob] = []
        while common and len(share) < size:
            job = common.popitem(last=False)[1]
            share.append(job)
            if len(job.data) > LARGE_DATA:
                break
        self._give(handle, share)

    def _share_out(self, ready: Sequence[WorkerHandle]) -> None:
        """Give many jobs to workers: an equal share to each, the least busy one first."""
        common = self._common.jobs
        share_size = -(-len(common) // len(ready))
        nothing: OrderedDict[int, PendingJob] = OrderedDict()
        turns: list[
            tuple[int, int, int, int, WorkerHandle, list[PendingJob], OrderedDict[int, PendingJob]]
        ] = []
        for each in ready:
            lane = self._pinned.get(each.index)
            pinned = nothing if lane is None else lane.jobs
            load = len(each.in_flight)
            size = min(share_size + len(pinned), each.limit, self._max_in_flight - load)
            if size:
                turns.append((load, each.recent, each.index, size, each, [], pinned))
        heapify(turns)
        while turns:
            load, recent, index, size, handle, share, pinned = turns[0]
            job = _oldest(common, pinned)
            if job is not None:
                share.append(job)
            if job is None or len(share) == size or len(job.data) > LARGE_DATA:
                heappop(turns)
                if share:
                    self._give(handle, share)
            else:
                heapreplace(turns, (load + 1, recent, index, size, handle, share, pinned))

    def _give(self, handle: WorkerHandle, jobs: list[PendingJob]) -> None:
        for job in jobs:
            job.send()
        handle.send_jobs(jobs)
        handle.recent += len(jobs)
        if handle.recent > RECENT_JOBS:
            # Older jobs count less and less, so that a new worker does not get all the next ones.
            for each in self.workers.values():
                each.recent //= 2

    ################################################################
    # Jobs that no worker has accepted
    ################################################################

    def requeue(self, jobs: Sequence[PendingJob], cause: Exception, *, counts: bool) -> None:
        """Queue jobs again that a worker has not acknowledged.

        Args:
          counts: whether that was an attempt of these jobs.
        """
        for job in reversed(jobs):
            job.attempts += counts
            job.cause = cause
            if job.raise_cancel is not None:
                # Its submitter was cancelled while the worker had it.
                job.settle(JobEnd.CANCELLED)
            elif self._cleared is not None:
                self._reject(job, self._cleared)
            elif job.attempts >= self._max_attempts:
                self._reject(job, f"not accepted after {job.attempts} attempts")
            else:
                job.requeue(cause)
                self._counters.retried += 1
                self._lane(job.worker).put_back(job)

    def take_connections(self) -> list[PendingJob]:
        """Take the queued jobs out that are connections, and that no submitter waits for."""
        lane = self._common
        found = [
            job for job in lane.jobs.values() if job.kind in CONNECTIONS and not job.is_awaited
        ]
        for job in found:
            del lane.jobs[job.id]
        if found:
            self._wake_submitters(lane, None)
        return found

    def reject(self, jobs: Iterable[PendingJob], why: str) -> None:
        """End jobs that no worker can have, and tell their submitters."""
        for job in list(jobs):
            self._reject(job, why)

    def _reject(self, job: PendingJob, why: str) -> None:
        if job.raise_cancel is not None:
            job.settle(JobEnd.CANCELLED)
            return
        error = JobRefusedError(f"job {job.id} rejected: {why}")
        error.__cause__ = job.cause
        job.settle(JobEnd.REJECTED, error)

    def reject_pinned(self, workers: int) -> None:
        """Reject jobs that are pinned to workers of an index of ``workers`` or more."""
        for worker in [each for each in self._pinned if each >= workers]:
            self.reject_pinned_to(worker, f"there is no worker {worker}")

    def reject_pinned_to(self, worker: int, why: str) -> None:
        """Reject jobs that are pinned to one worker."""
        lane = self._pinned.get(worker)
        if lane is not None:
            jobs, lane.jobs = lane.jobs, OrderedDict()
            self.reject(jobs.values(), why)
            self._wake_submitters(lane, worker)

    ################################################################
    # Its end
    ################################################################

    def close(self, why: str) -> None:
        """Accept no more jobs; those that are queued are dispatched. The first reason stays."""
        if self._closed is None:
            self._closed = why
            self.closed.set()
            for lane in (self._common, *self._pinned.values()):
                lane.submitters.unpark_all()

    def clear(self, why: str) -> None:
        """Reject the jobs that are queued, and from now on those that are queued again."""
        if self._cleared is None:
            self._cleared = why
        for worker, lane in [(None, self._common), *self._pinned.items()]:
            jobs, lane.jobs = lane.jobs, OrderedDict()
            self.reject(jobs.values(), why)
            self._wake_submitters(lane, worker)


def _oldest(
    common: OrderedDict[int, PendingJob], pinned: OrderedDict[int, PendingJob]
) -> PendingJob | None:
    """Take the oldest job out of two lanes; None if both are empty."""
    if pinned and (not common or next(iter(pinned)) < next(iter(common))):
        return pinned.popitem(last=False)[1]
    return common.popitem(last=False)[1] if common else None
