"""PendingJob: every order of events ends in exactly one settlement."""

from __future__ import annotations

import gc
import os
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio
import trio.testing
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trio_unixconn import JobRefusedError, WorkerDiedError, _closing
from trio_unixconn.pool._endpoints import EndpointKind
from trio_unixconn.pool._pending import JobEnd, JobReceipt, JobState, PendingJob
from trio_unixconn.pool._queue import JobQueue
from trio_unixconn.pool._statistics import Counters

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio_unixconn.pool._handle import WorkerHandle

CAUSE = WorkerDiedError("the worker died")


def pending(counters: Counters | None = None, **options: Any) -> PendingJob:
    fd = os.open(os.devnull, os.O_RDONLY)
    return PendingJob(1, fd, EndpointKind.TCP, counters or Counters(), 0.0, **options)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_settle_counts_and_closes() -> None:
    """Each end is counted under its name, and closes the file descriptor."""
    for end in JobEnd:
        counters = Counters()
        job = pending(counters)
        fd = job.fd
        job.settle(end)
        assert job.state is JobState.SETTLED
        assert getattr(counters, end.value) == 1
        assert not is_open(fd)


def test_acknowledge_keeps_little_data() -> None:
    """Of large data, the pool keeps the first 4,096 bytes while a worker handles the job."""
    for data in b"few", bytes(4096), bytes(range(256)) * 100:
        job = PendingJob(1, -1, 0, Counters(), 0.0, data)
        job.send()
        assert job.data == data
        job.acknowledge(0, 7, 1.0)
        assert job.data == data[:4096]


def test_settle_twice() -> None:
    """A job cannot be settled twice."""
    job = pending()
    job.settle(JobEnd.HANDLED)
    with pytest.raises(RuntimeError, match="job 1 is settled already"):
        job.settle(JobEnd.ABANDONED)


@pytest.mark.parametrize("prepare", [[], ["send", "acknowledge"], ["settle"]])
def test_acknowledge_needs_a_job_that_was_sent(prepare: list[str]) -> None:
    """Only a job that was sent can be acknowledged or queued again."""
    job = pending()
    for step in prepare:
        STEPS[step](job)
    for step in "acknowledge", "requeue":
        with pytest.raises(RuntimeError, match="job 1 must be sent, got "):
            STEPS[step](job)
    job.close()


@pytest.mark.parametrize("prepare", [["send"], ["send", "acknowledge"], ["settle"]])
def test_send_needs_a_job_that_is_queued(prepare: list[str]) -> None:
    """A job that a worker has, or that has ended, is sent to no other worker."""
    job = pending()
    for step in prepare:
        STEPS[step](job)
    state = job.state
    with pytest.raises(RuntimeError, match="job 1 must be queued, got "):
        job.send()
    assert job.state is state
    job.close()


STEPS: dict[str, Callable[[PendingJob], None]] = {
    "send": PendingJob.send,
    "acknowledge": lambda job: job.acknowledge(0, 7, 1.0),
    "requeue": lambda job: job.requeue(CAUSE),
    "settle": lambda job: job.settle(JobEnd.HANDLED),
}


async def test_wait_raises_without_a_cycle() -> None:
    """The error of a job does not keep the job alive."""
    job = pending()
    job.settle(JobEnd.REJECTED, JobRefusedError("no"))
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(JobRefusedError, match="no"):
            await job.wait(lambda _: True)
        assert job.outcome is None
    finally:
        gc.enable()


@attrs.define(eq=False)
class Submission:
    """A submitter without a task: what it is told, and whether it was cancelled."""

    job: PendingJob
    fd: int
    inode: int
    wants_answer: bool
    told: list[Any] = attrs.field(factory=list[Any])
    cancelled: bool = False

    def is_open(self) -> bool:
        """Whether its file is open: the number may be that of another one."""
        return is_open(self.fd) and os.fstat(self.fd).st_ino == self.inode


class RecordedJob(PendingJob):
    """A job that records what its submitter is told, without a task."""

    __slots__ = ("told",)

    def record(self, told: list[Any]) -> None:
        self.told: list[Any] = told
        self._task = cast("trio.lowlevel.Task", object())

    def _tell(self, outcome: Any) -> None:
        self.outcome = outcome
        if self._task is not None:
            self._task = None
            self.told.append(outcome)


class Jobs(RuleBasedStateMachine):
    """Submitters, a queue and workers that are lists, in every order of events.

    The events are those that the handle of a worker makes of what it receives. The model keeps
    what each submitter must be told.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counters = Counters()
        self.queue = JobQueue(4, 1000, 3, self.counters)
        self.worker = _Worker()
        self.queue.workers = cast("dict[int, WorkerHandle]", {0: self.worker})
        self.submissions: dict[int, Submission] = {}
        self.next_id = 1
        self.cleared = False

    @rule(wants_answer=st.booleans(), pinned=st.booleans())
    def submit(self, *, wants_answer: bool, pinned: bool) -> None:
        fd = os.memfd_create("job")
        told: list[Any] = []
        job = RecordedJob(
            self.next_id,
            fd,
            EndpointKind.TCP,
            self.counters,
            0.0,
            worker=0 if pinned else None,
            wants_answer=wants_answer,
        )
        job.record(told)
        self.next_id += 1
        self.submissions[job.id] = Submission(job, fd, os.fstat(fd).st_ino, wants_answer, told)
        self.queue.reserve_nowait(1)
        self.queue._lane(job.worker).reserved += pinned
        self.queue._common.reserved -= pinned
        self.queue.put(job)

    def pick(self, data: st.DataObject, state: JobState) -> Submission | None:
        found = [each for each in self.submissions.values() if each.job.state is state]
        return data.draw(st.sampled_from(found)) if found else None

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """As the abort function of PendingJob.wait does."""
        live = [
            each
            for each in self.submissions.values()
            if not each.told and not each.cancelled and each.job.state is not JobState.SETTLED
        ]
        if live:
            submission = data.draw(st.sampled_from(live))
            submission.cancelled = True
            if submission.job.state is JobState.QUEUED:
                self.queue.cancel(submission.job)
            else:
                submission.job.raise_cancel = lambda: None

    @precondition(lambda self: self.worker.batch)
    @rule()
    def taken(self) -> None:
        batch, self.worker.batch = self.worker.batch, []
        for job in batch:
            self.worker.in_flight[job.id] = job
            job.acknowledge(0, 7, 1.0)
        self.queue.dispatch()

    @precondition(lambda self: self.worker.batch)
    @rule(counts=st.booleans())
    def refused(self, *, counts: bool) -> None:
        batch, self.worker.batch = self.worker.batch, []
        self.queue.requeue(batch, CAUSE, counts=counts)
        self.queue.dispatch()

    @precondition(lambda self: self.worker.in_flight)
    @rule(data=st.data(), fails=st.booleans())
    def finished(self, *, data: st.DataObject, fails: bool) -> None:
        job = self.worker.in_flight.pop(data.draw(st.sampled_from(sorted(self.worker.in_flight))))
        if fails:
            job.settle(JobEnd.FAILED, RuntimeError("x") if job.wants_answer else None)
        else:
            job.settle(JobEnd.HANDLED, b"answer" if job.wants_answer else None)
        self.queue.dispatch()

    @rule()
    def died(self) -> None:
        """The worker ends: each job that it had is abandoned or queued again."""
        batch, self.worker.batch = self.worker.batch, []
        in_flight, self.worker.in_flight = self.worker.in_flight, {}
        for job in in_flight.values():
            job.settle(JobEnd.ABANDONED, CAUSE if job.wants_answer else None)
        self.queue.requeue(batch, CAUSE, counts=True)
        self.queue.dispatch()

    @rule()
    def clear(self) -> None:
        """A drain is over: what is queued now or later is rejected."""
        self.cleared = True
        self.queue.clear("the pool ended")

    @invariant()
    def every_job_is_in_one_place(self) -> None:
        places = Counter(
            [
                *(job.id for lane in self.lanes() for job in lane.values()),
                *(job.id for job in self.worker.batch),
                *self.worker.in_flight,
                *(
                    each.job.id
                    for each in self.submissions.values()
                    if each.job.state is JobState.SETTLED
                ),
            ]
        )
        assert places == Counter(list(self.submissions))
        for lane in self.lanes():
            assert list(lane) == sorted(lane)

    def lanes(self) -> list[Any]:
        return [self.queue._common.jobs, *(each.jobs for each in self.queue._pinned.values())]

    @invariant()
    def counters_agree(self) -> None:
        counters = self.counters
        ends = sum(getattr(counters, end.value) for end in JobEnd)
        in_flight = len(self.worker.batch) + len(self.worker.in_flight)
        assert counters.submitted == len(self.submissions) == ends + len(self.queue) + in_flight

    @invariant()
    def each_submitter_is_told_once(self) -> None:
        for each in self.submissions.values():
            state = each.job.state
            acknowledged = state in (JobState.ACKNOWLEDGED, JobState.SETTLED)
            assert len(each.told) <= 1
            if state is JobState.SETTLED or (acknowledged and not each.wants_answer):
                assert len(each.told) == 1
            else:
                assert each.told == []
            assert each.is_open() is (each.job.fd >= 0)
            assert (each.job.fd >= 0) is (state in (JobState.QUEUED, JobState.SENT))

    def teardown(self) -> None:
        self.worker.alive = False
        self.died()
        self.clear()
        self.every_job_is_in_one_place()
        self.each_submitter_is_told_once()
        assert all(each.job.state is JobState.SETTLED for each in self.submissions.values()), (
            "a job is left"
        )
        assert not self.queue._pinned


class _Worker:
    """What the queue uses of a worker's handle."""

    def __init__(self) -> None:
        self.index = 0
        self.alive = True
        self.batch: list[PendingJob] = []
        self.in_flight: dict[int, PendingJob] = {}
        self.recent = 0
        self.limit = 3

    def can_accept(self, max_in_flight: int) -> bool:
        return self.alive and not self.batch and len(self.in_flight) < max_in_flight

    def send_jobs(self, jobs: list[PendingJob]) -> None:
        assert not self.batch
        assert all(job.state is JobState.SENT for job in jobs)
        self.batch = jobs


TestJobs = Jobs.TestCase
TestJobs.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


################################################################
# With tasks
################################################################


@pytest.mark.parametrize(
    ("end", "outcome"),
    [(None, None), (JobEnd.HANDLED, None), (JobEnd.ABANDONED, None), (JobEnd.FAILED, CAUSE)],
)
async def test_wait_of_submit_returns_its_receipt(
    end: JobEnd | None, outcome: Exception | None
) -> None:
    """A submitter gets its receipt, even if the job is settled before its task runs again."""
    job = pending()
    job.send()
    receipts: list[JobReceipt] = []

    async def submit() -> None:
        receipts.append(await job.wait(lambda _: False))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(submit)
        await trio.testing.wait_all_tasks_blocked()
        job.acknowledge(2, 7, 1.0)
        if end is not None:
            job.settle(end, outcome)
    assert receipts == [JobReceipt(1, 2, 7)]


@pytest.mark.parametrize("end", [JobEnd.CANCELLED, JobEnd.ABANDONED])
async def test_wait_is_cancelled_after_an_error(end: JobEnd) -> None:
    """A submitter that was cancelled too late is cancelled if its outcome is an error or none."""
    job = pending(wants_answer=True)
    job.send()
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def call() -> None:
            with scope:
                await job.wait(lambda _: False)

        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert job.raise_cancel is not None
        job.settle(end, None if end is JobEnd.CANCELLED else CAUSE)
    assert scope.cancelled_caught


async def test_wait_returns_an_answer_in_spite_of_a_cancellation() -> None:
    """A caller that was cancelled gets the answer if there is one; nothing is lost."""
    job = pending(wants_answer=True)
    job.send()
    answers: list[bytes] = []
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def call() -> None:
            with scope:
                answers.append(await job.wait(lambda _: False))

        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        job.acknowledge(0, 7, 1.0)
        job.settle(JobEnd.HANDLED, b"answer")
    assert answers == [b"answer"]


@pytest.mark.parametrize("kind", [EndpointKind.OTHER, EndpointKind.UNIX, EndpointKind.TCP])
def test_pending_job_del_closes_its_fd(kind: EndpointKind) -> None:
    """A job that is collected closes its file descriptor; an error of that close is ignored."""
    fd = os.open(os.devnull, os.O_RDONLY)
    job = PendingJob(1, fd, kind, Counters(), 0.0)
    del job
    assert _closing.wait_closed(30)
    assert not is_open(fd)
    closed = PendingJob(2, fd, kind, Counters(), 0.0)
    closed.close()
