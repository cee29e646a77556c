"""JobQueue: which worker gets which job, and which task gets a slot."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio
from hypothesis import given, strategies as st
from trio.testing import wait_all_tasks_blocked

from trio_unixconn import JobRefusedError, PoolClosedError
from trio_unixconn.pool._endpoints import EndpointKind
from trio_unixconn.pool._pending import JobState, PendingJob
from trio_unixconn.pool._queue import JobQueue
from trio_unixconn.pool._statistics import Counters

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trio_unixconn.pool._handle import WorkerHandle

CAUSE = RuntimeError("the worker died")


@attrs.define(eq=False)
class Worker:
    """What a queue uses of a worker's handle."""

    index: int
    in_flight: dict[int, None] = attrs.field(factory=dict[int, None])
    recent: int = 0
    limit: int = 64
    batch: list[PendingJob] = attrs.field(factory=list[PendingJob])

    def can_accept(self, max_in_flight: int) -> bool:
        return not self.batch and len(self.in_flight) < max_in_flight

    def send_jobs(self, jobs: list[PendingJob]) -> None:
        assert jobs
        assert not self.batch
        assert all(job.state is JobState.SENT for job in jobs)
        self.batch = jobs

    def acknowledge(self) -> None:
        self.in_flight.update(dict.fromkeys(each.id for each in self.batch))
        self.batch = []

    def finish(self) -> None:
        self.in_flight.clear()


def queue_for(
    *workers: Worker, max_in_flight: int = 1000, max_queue: int = 1000, max_attempts: int = 3
) -> JobQueue:
    queue = JobQueue(max_in_flight, max_queue, max_attempts, Counters())
    queue.workers = cast("dict[int, WorkerHandle]", {each.index: each for each in workers})
    return queue


def some(
    queue: JobQueue, ids: Iterable[int], *, worker: int | None = None, data: bytes = b""
) -> list[PendingJob]:
    counters = queue._counters
    return [PendingJob(each, -1, 0, counters, float(each), data, worker=worker) for each in ids]


async def put(queue: JobQueue, jobs: Iterable[PendingJob]) -> None:
    for job in jobs:
        await queue.reserve(job.worker)
        queue.put(job)


async def put_together(queue: JobQueue, jobs: Iterable[PendingJob]) -> None:
    jobs = list(jobs)
    for job in jobs:
        await queue.reserve(job.worker)
    queue.put_many(jobs)


def ids(jobs: Iterable[PendingJob]) -> list[int]:
    return [each.id for each in jobs]


def queued(queue: JobQueue, worker: int | None = None) -> list[int]:
    if worker is not None and worker not in queue._pinned:
        return []
    return list(queue._lane(worker).jobs)


################################################################
# Which worker
################################################################


async def test_dispatch_chooses_the_least_busy_worker() -> None:
    """A job goes to the worker with the fewest; among those, to the one with the fewest lately."""
    workers = [
        Worker(0, dict.fromkeys([1, 2])),
        Worker(1, {3: None}, recent=9),
        Worker(2, {4: None}),
    ]
    queue = queue_for(*workers)
    await put(queue, some(queue, [5]))
    assert [ids(each.batch) for each in workers] == [[], [], [5]]


async def test_dispatch_goes_round() -> None:
    """Jobs that are submitted one at a time go round among workers that finish them."""
    workers = [Worker(0), Worker(1), Worker(2)]
    queue = queue_for(*workers)
    for number in range(30):
        await put(queue, some(queue, [number]))
        for each in workers:
            each.acknowledge()
            each.finish()
    assert [each.recent for each in workers] == [10, 10, 10]


@given(
    loads=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    count=st.integers(0, 40),
    most=st.integers(1, 12),
    limit=st.integers(1, 64),
)
async def test_dispatch_of_many(loads: list[int], count: int, most: int, limit: int) -> None:
    """Many jobs are sent at once, in order, each once, within the limits, and evenly."""
    workers = [
        Worker(index, dict.fromkeys(range(1000 * index, 1000 * index + load)), limit=limit)
        for index, load in enumerate(loads)
    ]
    queue = queue_for(*workers, max_in_flight=most)
    jobs = some(queue, range(-count, 0))
    await put_together(queue, jobs)
    sent = [each.id for worker in workers for each in worker.batch]
    left = queued(queue)
    assert sorted([*sent, *left]) == ids(jobs)
    assert left == ids(jobs)[len(sent) :]
    ready = sum(load < most for load in loads)
    fair = -(-count // max(ready, 1))
    for worker in workers:
        assert ids(worker.batch) == sorted(ids(worker.batch))
        assert len(worker.batch) <= min(limit, fair)
        assert not worker.batch or len(worker.in_flight) + len(worker.batch) <= most
    # A worker that could have had one more has not fewer than another had before its last one.
    for one in workers:
        had_room = len(one.batch) < min(limit, fair, most - len(one.in_flight))
        for other in workers:
            if had_room and other.batch:
                mine = len(one.in_flight) + len(one.batch)
                assert mine >= len(other.in_flight) + len(other.batch) - 1


async def test_dispatch_without_a_free_worker() -> None:
    """Without a worker that can accept them, jobs stay in the queue; they are sent later."""
    busy = Worker(0, {1: None})
    queue = queue_for(busy, max_in_flight=1)
    await put(queue, some(queue, [2, 3]))
    assert (len(queue), busy.batch) == (2, [])
    busy.finish()
    queue.dispatch()
    assert (ids(busy.batch), queued(queue)) == ([2], [3])


async def test_dispatch_without_workers() -> None:
    """Without a worker, jobs stay in the queue."""
    queue = queue_for()
    assert queue.oldest_submitted_at() is None
    await put(queue, some(queue, [1, 2]))
    assert len(queue) == 2
    assert queue.oldest_submitted_at() == 1.0


async def test_dispatch_of_large_data() -> None:
    """A job with large data is the last one of its batch."""
    worker = Worker(0)
    queue = queue_for(worker)
    jobs = [*some(queue, [1, 2]), *some(queue, [3, 4], data=bytes(100_000)), *some(queue, [5])]
    await put_together(queue, jobs)
    batches = [ids(worker.batch)]
    while len(queue):
        worker.acknowledge()
        queue.dispatch()
        batches.append(ids(worker.batch))
    assert batches == [[1, 2, 3], [4], [5]]


async def test_dispatch_counts_old_jobs_less() -> None:
    """A new worker is not given all jobs until it has had as many as the others ever had."""
    old, new = Worker(0, recent=250), Worker(1)
    queue = queue_for(old, new)
    await put_together(queue, some(queue, range(1, 129)))
    assert (old.recent, new.recent) == (314 // 2, 64 // 2)


################################################################
# Pinned jobs
################################################################


async def test_dispatch_of_pinned_jobs() -> None:
    """A pinned job is sent to its worker only, even if another one is free."""
    workers = [Worker(0, {1: None}), Worker(1)]
    queue = queue_for(*workers, max_in_flight=1)
    await put(queue, some(queue, [2, 3], worker=0))
    assert (len(queue), workers[1].batch) == (2, [])
    workers[0].finish()
    await put(queue, some(queue, [4, 5]))
    assert [ids(each.batch) for each in workers] == [[2], [4]]
    assert (queued(queue), queued(queue, 0)) == ([5], [3])
    for each in workers:
        each.acknowledge()
        each.finish()
    queue.dispatch()
    assert [ids(each.batch) for each in workers] == [[3], [5]]
    assert queue._pinned == {}


async def test_dispatch_of_pinned_jobs_within_limits() -> None:
    """No more pinned jobs are sent together than the worker may have."""
    worker = Worker(0, dict.fromkeys([100, 101]), limit=4)
    queue = queue_for(worker, max_in_flight=5)
    await put_together(queue, some(queue, range(9), worker=0))
    assert ids(worker.batch) == [0, 1, 2]
    worker.acknowledge()
    worker.finish()
    queue.dispatch()
    assert ids(worker.batch) == [3, 4, 5, 6]


async def test_dispatch_is_in_order_of_age() -> None:
    """Pinned jobs do not overtake older jobs for any worker, nor the other way round."""
    worker = Worker(0, {0: None})
    queue = queue_for(worker, max_in_flight=1)
    order = [(1, None), (2, 0), (3, 0), (4, None), (5, 0)]
    for job_id, pinned in order:
        await put(queue, some(queue, [job_id], worker=pinned))
    assert queue.oldest_submitted_at() == 1.0
    sent = []
    while len(queue):
        worker.finish()
        queue.dispatch()
        sent += ids(worker.batch)
        worker.acknowledge()
    assert sent == [1, 2, 3, 4, 5]


async def test_dispatch_does_not_starve_common_jobs() -> None:
    """A job for any worker is sent, however many younger ones are pinned to the only worker."""
    worker = Worker(0, {0: None})
    queue = queue_for(worker, max_in_flight=1)
    await put(queue, some(queue, [1]))
    await put(queue, some(queue, range(2, 500), worker=0))
    worker.finish()
    queue.dispatch()
    assert ids(worker.batch) == [1]


async def test_reserve_of_pinned_jobs_has_its_own_bound() -> None:
    """Pinned jobs of a busy worker do not fill the queue for others."""
    queue = queue_for(Worker(0, {0: None}), max_in_flight=1, max_queue=2)
    await put(queue, some(queue, [1, 2], worker=0))
    with trio.move_on_after(0) as scope:
        await queue.reserve(0)
    assert scope.cancelled_caught
    assert queue.reserve_nowait(5) == 2
    queue.release(2)
    queue.clear("the test ended")


async def test_reject_pinned() -> None:
    """Jobs that are pinned to a worker that there is not any more are rejected."""
    queue = queue_for(max_queue=1)
    jobs = [*some(queue, [1], worker=0), *some(queue, [2], worker=3)]
    await put(queue, jobs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(queue.reserve, 3)
        await wait_all_tasks_blocked()
        queue.reject_pinned(1)
        queue.reject_pinned_to(7, "no job was ever pinned to it")
    assert jobs[0].state is JobState.QUEUED
    assert str(jobs[1].outcome) == "job 2 rejected: there is no worker 3"
    queue.release(1, 3)
    queue.clear("the test ended")
    assert queue._pinned == {}


################################################################
# Slots
################################################################


async def test_reserve_wakes_as_many_as_there_are_slots() -> None:
    """Tasks that wait for a slot are woken in order, one for each slot that becomes free."""
    worker = Worker(0, {0: None})
    queue = queue_for(worker, max_in_flight=1, max_queue=2)
    first, second = some(queue, [1, 2])
    await put(queue, [first, second])
    assert queue.reserve_nowait(1) == 0
    woken: list[int] = []

    async def wait(number: int) -> None:
        await queue.reserve()
        woken.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(wait, number)
            await wait_all_tasks_blocked()
        worker.finish()
        queue.dispatch()
        await wait_all_tasks_blocked()
        assert woken == [0]
        queue.cancel(second)
        await wait_all_tasks_blocked()
        assert woken == [0, 1]
        # A task that does not use its slot passes it on.
        queue.release()
        await wait_all_tasks_blocked()
        assert woken == [0, 1, 2]
    assert queue._counters.cancelled == 1
    queue.release(2)
    assert queue.reserve_nowait(9) == 2


async def test_reserve_is_fair() -> None:
    """A task that asks later does not take the slot of one that waits."""
    queue = queue_for(max_queue=1)
    order: list[str] = []

    async def wait(name: str) -> None:
        await queue.reserve()
        order.append(name)

    assert queue.reserve_nowait(1) == 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "first")
        await wait_all_tasks_blocked()
        queue.release()
        # The slot belongs to the first task, which has not run yet.
        assert queue.reserve_nowait(1) == 0
        nursery.start_soon(wait, "second")
        await wait_all_tasks_blocked()
        assert order == ["first"]
        queue.release()
    assert order == ["first", "second"]


async def test_reserve_cancelled_while_it_waits() -> None:
    """A cancelled task loses no slot."""
    queue = queue_for(max_queue=1)
    assert queue.reserve_nowait(1) == 1
    with trio.move_on_after(0):
        await queue.reserve()
    queue.release()
    assert queue.reserve_nowait(5) == 1


async def test_reserve_of_a_closed_queue() -> None:
    """Tasks that wait for a slot, and those that ask later, get a PoolClosedError."""
    queue = queue_for(max_queue=1)
    assert queue.is_open()
    assert queue.reserve_nowait(1) == 1

    async def wait() -> None:
        with pytest.raises(PoolClosedError, match="the first reason"):
            await queue.reserve()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        queue.close("the first reason")
        queue.close("another reason")
    await wait()
    assert queue.reserve_nowait(1) == 0
    assert not queue.is_open()


async def test_put_into_a_cleared_queue() -> None:
    """A job whose slot was reserved before the pool ended is rejected."""
    queue = queue_for()
    await queue.reserve()
    queue.clear("the pool ended")
    queue.clear("another reason")
    (job,) = some(queue, [1])
    queue.put(job)
    assert str(job.outcome) == "job 1 rejected: the pool ended"


################################################################
# Jobs that no worker has accepted
################################################################


async def test_requeue() -> None:
    """Jobs that return are the next ones, in their order; a worker that died is an attempt."""
    worker = Worker(0)
    queue = queue_for(worker)
    await put_together(queue, some(queue, [1, 2, 3]))
    first = worker.batch
    await put(queue, some(queue, [4]))
    worker.batch = []
    queue.requeue(first, CAUSE, counts=True)
    assert queued(queue) == [1, 2, 3, 4]
    assert [(each.attempts, each.state) for each in first] == [(1, JobState.QUEUED)] * 3
    assert queue._counters.retried == 3
    (pinned,) = some(queue, [5], worker=0)
    pinned.send()
    queue.requeue([pinned], CAUSE, counts=False)
    assert (pinned.attempts, queued(queue, 0)) == (0, [5])


async def test_requeue_keeps_the_order_of_age() -> None:
    """Batches that return in another order than they were sent are queued by their age."""
    workers = [Worker(0), Worker(1)]
    queue = queue_for(*workers)
    await put_together(queue, some(queue, [1, 2, 3, 4]))
    await put(queue, some(queue, [5]))
    first, second = (each.batch for each in workers)
    queue.workers = {}
    queue.requeue(first, CAUSE, counts=True)
    queue.requeue(second, CAUSE, counts=True)
    assert queued(queue) == [1, 2, 3, 4, 5]


async def test_requeue_after_max_attempts() -> None:
    """A job that was tried too often is rejected: its fd is closed, and its last cause told."""
    read, write = os.pipe()
    queue = queue_for(max_attempts=2)
    job = PendingJob(7, write, EndpointKind.OTHER, queue._counters, 0.0)
    job.send()
    queue.requeue([job], LookupError("the first"), counts=True)
    job.send()
    del queue._common.jobs[7]
    queue.requeue([job], CAUSE, counts=True)
    assert len(queue) == 0
    assert isinstance(job.outcome, JobRefusedError)
    assert str(job.outcome) == "job 7 rejected: not accepted after 2 attempts"
    assert job.outcome.__cause__ is CAUSE
    assert os.read(read, 1) == b""
    os.close(read)
    assert queue._counters.rejected == 1


async def test_requeue_of_a_cancelled_job() -> None:
    """A job whose submitter was cancelled meanwhile is cancelled when it returns."""
    queue = queue_for()
    read, write = os.pipe()
    job = PendingJob(1, write, EndpointKind.OTHER, queue._counters, 0.0)
    job.send()
    job.raise_cancel = lambda: None
    queue.requeue([job], CAUSE, counts=True)
    assert (len(queue), queue._counters.cancelled, job.outcome) == (0, 1, None)
    assert os.read(read, 1) == b""
    os.close(read)


async def test_requeue_after_clear() -> None:
    """A job that returns after the pool ended is rejected."""
    queue = queue_for()
    (job,) = some(queue, [1])
    job.send()
    queue.clear("the pool ended")
    queue.requeue([job], CAUSE, counts=False)
    assert str(job.outcome) == "job 1 rejected: the pool ended"


async def test_reject_of_a_cancelled_job() -> None:
    """A job whose submitter was cancelled counts as cancelled, not as rejected."""
    queue = queue_for()
    (job,) = some(queue, [1])
    job.send()
    job.raise_cancel = lambda: None
    queue.reject([job], "there is no reason")
    assert (queue._counters.cancelled, queue._counters.rejected) == (1, 0)


async def test_clear() -> None:
    """All queued jobs are rejected, and their submitters are told why."""
    queue = queue_for()
    jobs: list[Any] = [*some(queue, [1, 2]), *some(queue, [3], worker=4)]
    await put(queue, jobs)
    queue.clear("the pool ended")
    assert len(queue) == 0
    for each in jobs:
        with pytest.raises(JobRefusedError, match="the pool ended"):
            raise each.outcome
    assert queue._counters.rejected == 3


async def test_cancel_of_many_jobs() -> None:
    """Each of many queued jobs can be cancelled, in any order, and those left are sent."""
    queue = queue_for()
    jobs = some(queue, range(1000))
    await put(queue, jobs)
    for job in [*jobs[500:], *jobs[1:400]]:
        queue.cancel(job)
    assert queued(queue) == [0, *range(400, 500)]
    queue.clear("the test ended")


class CountedId(int):
    """The id of a job, which counts how often it is hashed or compared."""

    looks = 0

    def __eq__(self, other: object) -> bool:
        CountedId.looks += 1
        return int(self) == other

    def __hash__(self) -> int:
        CountedId.looks += 1
        return int.__hash__(self)


class CountedJob(PendingJob):
    """A job that counts, as its id does, how often it is compared."""

    def __eq__(self, other: object) -> bool:
        CountedId.looks += 1
        return self is other

    __hash__ = None  # type: ignore[assignment]


async def test_cancel_does_not_look_at_other_jobs() -> None:
    """The cost of a cancellation does not grow with the number of queued jobs."""
    queue = queue_for()
    jobs = [CountedJob(CountedId(each), -1, 0, queue._counters, 0.0) for each in range(1000)]
    await put(queue, jobs)
    CountedId.looks = 0
    for job in reversed(jobs[1:]):
        queue.cancel(job)
    assert CountedId.looks <= 10 * len(jobs)
    assert queued(queue) == [0]
    queue.cancel(jobs[0])
