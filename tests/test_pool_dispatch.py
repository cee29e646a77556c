"""Which worker gets which job, and what becomes of those that nobody has."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio
from hypothesis import given, strategies as st
from trio.testing import wait_all_tasks_blocked

from trio_unixconn import JobRefusedError, _closing
from trio_unixconn.pool import _protocol
from trio_unixconn.pool._pending import PendingJob
from trio_unixconn.pool._queue import JobQueue
from trio_unixconn.pool._statistics import Counters

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trio_unixconn.pool._handle import WorkerHandle

WHY = RuntimeError("the worker died")


@attrs.define(eq=False)
class Worker:
    """What a dispatcher sees of a link."""

    index: int
    in_flight: dict[int, None] = attrs.field(factory=dict[int, None])
    recent: int = 0
    limit: int = 64
    state: str = "ready"
    batch: list[PendingJob] = attrs.field(factory=list[PendingJob])

    def has_room(self, most: int) -> bool:
        return self.state == "ready" and not self.batch and len(self.in_flight) < most

    def hand_over(self, deliveries: list[PendingJob]) -> None:
        assert deliveries
        assert not self.batch
        for each in deliveries:
            each.sent = True
        self.batch = deliveries

    def acknowledge(self) -> None:
        self.in_flight.update(dict.fromkeys(each.id for each in self.batch))
        self.batch = []

    def finish(self) -> None:
        self.in_flight.clear()


def dispatcher(
    *workers: Worker, max_in_flight: int = 1000, max_queue: int = 1000, max_attempts: int = 3
) -> JobQueue:
    made = JobQueue(max_in_flight, max_queue, max_attempts, Counters())
    made.links = cast("dict[int, WorkerHandle]", {each.index: each for each in workers})
    return made


def some(
    numbers: Iterable[int], *, worker: int | None = None, data: bytes = b""
) -> list[PendingJob]:
    return [PendingJob(each, -1, _protocol.NO_DESCRIPTOR, data, worker=worker) for each in numbers]


def put(made: JobQueue, deliveries: Iterable[PendingJob]) -> None:
    for each in deliveries:
        made.put(each)
    made.pump()


def ids(deliveries: Iterable[PendingJob]) -> list[int]:
    return [each.id for each in deliveries]


################################################################
# Who gets it
################################################################


async def test_the_least_busy_is_next() -> None:
    """A job goes to the worker that has the fewest; among those, to who has had the fewest."""
    workers = [
        Worker(0, dict.fromkeys([1, 2])),
        Worker(1, {3: None}, recent=9),
        Worker(2, {4: None}),
    ]
    made = dispatcher(*workers)
    put(made, some([5]))
    assert [ids(each.batch) for each in workers] == [[], [], [5]]


async def test_one_after_the_other() -> None:
    """Jobs that come one by one go round among workers that finish them."""
    workers = [Worker(0), Worker(1), Worker(2)]
    made = dispatcher(*workers)
    for number in range(30):
        put(made, some([number]))
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
async def test_shares(loads: list[int], count: int, most: int, limit: int) -> None:
    """Many jobs go out at once, in order, each once, to nobody more than fits, and evenly."""
    workers = [
        Worker(index, dict.fromkeys(range(1000 * index, 1000 * index + load)), limit=limit)
        for index, load in enumerate(loads)
    ]
    made = dispatcher(*workers, max_in_flight=most)
    put_at_once = some(range(-count, 0))
    made.queue.extend(put_at_once)
    made.pump()
    handed = [each.id for worker in workers for each in worker.batch]
    left = ids(made.queue)
    assert sorted([*handed, *left]) == ids(put_at_once)
    assert left == ids(put_at_once)[len(handed) :]
    ready = sum(load < most for load in loads)
    fair = -(-count // max(ready, 1))
    for worker in workers:
        assert ids(worker.batch) == sorted(ids(worker.batch))
        assert len(worker.batch) <= min(limit, fair)
        assert not worker.batch or len(worker.in_flight) + len(worker.batch) <= most
    # Who could have had one more has not fewer than another had before its last.
    for one in workers:
        room = len(one.batch) < min(limit, fair, most - len(one.in_flight))
        for other in workers:
            if room and other.batch:
                mine = len(one.in_flight) + len(one.batch)
                assert mine >= len(other.in_flight) + len(other.batch) - 1


async def test_nobody_has_room() -> None:
    """Without a worker that has room, jobs wait; then they go out."""
    busy = Worker(0, {1: None})
    made = dispatcher(busy, max_in_flight=1)
    put(made, some([2, 3]))
    assert (made.count(), busy.batch) == (2, [])
    busy.finish()
    made.pump()
    assert (ids(busy.batch), ids(made.queue)) == ([2], [3])


async def test_without_workers() -> None:
    """Without a worker jobs wait."""
    made = dispatcher()
    put(made, some([1, 2]))
    assert made.count() == 2


async def test_much_data_goes_alone() -> None:
    """A job with much data ends its batch, so that no message is larger than can be."""
    worker = Worker(0)
    made = dispatcher(worker)
    made.queue.extend([*some([1, 2]), *some([3, 4], data=bytes(100_000)), *some([5])])
    batches = []
    while made.count():
        made.pump()
        batches.append(ids(worker.batch))
        worker.acknowledge()
    assert batches == [[1, 2, 3], [4], [5]]


################################################################
# Jobs for one worker
################################################################


async def test_bound_jobs() -> None:
    """A job for one worker waits for it, whoever else is free, and comes before others."""
    workers = [Worker(0, {1: None}), Worker(1)]
    made = dispatcher(*workers, max_in_flight=1)
    put(made, some([2, 3], worker=0))
    assert (made.count(), workers[1].batch) == (2, [])
    workers[0].finish()
    put(made, some([4, 5]))
    assert [ids(each.batch) for each in workers] == [[2], [4]]
    assert (ids(made.queue), ids(made.bound[0])) == ([5], [3])
    for each in workers:
        each.acknowledge()
        each.finish()
    made.pump()
    assert [ids(each.batch) for each in workers] == [[3], [5]]
    assert made.bound == {}


async def test_bound_jobs_within_limits() -> None:
    """Of the jobs for one worker no more go out at once than it may be handed."""
    worker = Worker(0, dict.fromkeys([100, 101]), limit=4)
    made = dispatcher(worker, max_in_flight=5)
    made.bound[0] = made._queue_of(some([0], worker=0)[0])
    made.bound[0].extend(some(range(9), worker=0))
    made.pump()
    assert ids(worker.batch) == [0, 1, 2]
    worker.acknowledge()
    worker.finish()
    made.pump()
    assert ids(worker.batch) == [3, 4, 5, 6]


################################################################
# Room
################################################################


async def test_room() -> None:
    """Who waits for room is woken when there is some: as many as there is room for."""
    worker = Worker(0, {0: None})
    made = dispatcher(worker, max_in_flight=1, max_queue=2)
    put(made, some([1, 2]))
    assert made.free() == 0
    woken: list[int] = []

    async def wait(number: int) -> None:
        await made.waiting.park()
        woken.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(wait, number)
            await wait_all_tasks_blocked()
        worker.finish()
        made.pump()
        await wait_all_tasks_blocked()
        assert woken == [0]
        made.withdraw(made.queue[0])
        await wait_all_tasks_blocked()
        assert sorted(woken) == [0, 1, 2]
    assert made.counters.cancelled == 1


################################################################
# Jobs that come back
################################################################


async def test_taken_back() -> None:
    """Jobs that come back are the next, in their order; a worker that died counts as a try."""
    worker = Worker(0)
    made = dispatcher(worker)
    put(made, some([1, 2, 3]))
    (first,) = [worker.batch]
    put(made, some([4]))
    worker.batch = []
    made.take_back(first, WHY, counts=True)
    assert ids(made.queue) == [1, 2, 3, 4]
    assert [(each.tries, each.sent) for each in first] == [(1, False)] * 3
    assert made.counters.retried == 3
    (bound,) = some([5], worker=0)
    made.take_back([bound], WHY, counts=False)
    assert (bound.tries, ids(made.bound[0])) == (0, [5])


async def test_tried_too_often() -> None:
    """A job that was tried too often is given up: its descriptor closed, the last cause told."""
    read, write = os.pipe()
    made = dispatcher(max_attempts=2)
    delivery = PendingJob(7, write, _protocol.OTHER)
    made.take_back([delivery], LookupError("the first"), counts=True)
    made.queue.remove(delivery)
    made.take_back([delivery], WHY, counts=True)
    assert made.count() == 0
    assert isinstance(delivery.outcome, JobRefusedError)
    assert str(delivery.outcome) == "job 7 was given up: 2 workers in turn did not take it"
    assert delivery.outcome.__cause__ is WHY
    assert os.read(read, 1) == b""
    os.close(read)
    assert made.counters.refused == 1


async def test_taken_back_when_cancelled() -> None:
    """A job whose submitter was cancelled meanwhile is cancelled when it comes back."""
    made = dispatcher()
    read, write = os.pipe()
    delivery = PendingJob(1, write, _protocol.OTHER)
    delivery.raise_cancel = lambda: None
    made.take_back([delivery], WHY, counts=True)
    assert (made.count(), made.counters.cancelled, delivery.outcome) == (0, 1, None)
    assert os.read(read, 1) == b""
    os.close(read)


async def test_clear() -> None:
    """When all are given up, nothing waits, and all are told why."""
    made = dispatcher()
    deliveries: list[Any] = [*some([1, 2]), *some([3], worker=4)]
    put(made, deliveries)
    made.clear("the pool ended first")
    assert made.count() == 0
    for each in deliveries:
        with pytest.raises(JobRefusedError, match="the pool ended first"):
            raise each.outcome
    assert made.counters.refused == 3


async def test_what_was_long_ago_counts_less() -> None:
    """A new worker is not handed all jobs until it has had as many as the others ever had."""
    old, new = Worker(0, recent=250), Worker(1)
    made = dispatcher(old, new)
    put(made, some(range(1, 129)))
    made.pump()
    assert (old.recent, new.recent) == (314 // 2, 64 // 2)
    for each in made.queue:
        each.close()


async def test_nobody_is_left_for_what_others_may_have() -> None:
    """Jobs that any worker may have wait, where the only one that is free got one of its own."""
    worker = Worker(0, {1: None})
    its = dispatcher(worker, max_in_flight=1)
    put(its, some([2], worker=0))
    put(its, some([3, 4]))
    worker.finish()
    its.pump()
    assert [each.id for each in worker.batch] == [2]
    assert [each.id for each in its.queue] == [3, 4]


@pytest.mark.parametrize("form", [_protocol.OTHER, _protocol.UNIX])
def test_delivery_del_closes_its_descriptor(form: int) -> None:
    """A job that is collected closes its descriptor; an error of that close is ignored."""
    fd = os.open(os.devnull, os.O_RDONLY)
    delivery = PendingJob(1, fd, form)
    del delivery
    assert _closing.wait_closed(30)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    closed = PendingJob(2, fd, form)
    closed.close()
    assert closed.fd == -1
    assert _closing.wait_closed(30)
