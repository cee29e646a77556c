"""WorkerHandle: workers that violate the protocol, and the order of what a worker is sent.

The workers here exist only as a socket and an exit status. The tests send every byte of them. All
else is real: the pool, its queue, the supervisor, the handles, the connections.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
from array import array
from collections import deque
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests._helpers.fds import free_descriptors
from tests._helpers.pool import at_rest, check_sums, lines, null, pids, send_batches_by_tasks
from tests._helpers.waiting import until
from trio_unixconn import (
    ConnectionClosedError,
    EndOfStreamError,
    JobRefusedError,
    SendError,
    UnixConnection,
    UnixConnectionError,
    WorkerDiedError,
    WorkerStartError,
    connection_pair,
)
from trio_unixconn._closing import close_fds
from trio_unixconn._connection import close_now, receive_with_fds, send_with_fds_nowait
from trio_unixconn._frames import MAX_BODY, Frame, FrameDecoder, encode_frame
from trio_unixconn._sockopts import raw_socket
from trio_unixconn.pool import (
    AbandonedJob,
    JobReceipt,
    _handle,
    _process,
    _protocol,
    open_worker_pool,
)
from trio_unixconn.pool._accept_log import AcceptLogWriter
from trio_unixconn.pool._accepted import AcceptPlan, SharedListener
from trio_unixconn.pool._completion_log import CompletionLog
from trio_unixconn.pool._endpoints import EndpointKind
from trio_unixconn.pool._handle import EXIT_GRACE, HandleState
from trio_unixconn.pool._pool import put_received, queue_of, set_successor, supervisor_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    from trio_unixconn.pool import PoolStatistics, WorkerPool
    from trio_unixconn.pool._worker_config import WorkerConfig

DO = "tests._helpers.pool_handlers:do"
# No process has such a number.
FIRST_PID = 2**22 + 1


class FakeWorker:
    """A worker whose every byte a test sends.

    It has what a WorkerHandle uses of a WorkerProcess.
    """

    def __init__(self, config: WorkerConfig, pid: int) -> None:
        self.index = config.index
        self.pid = pid
        self.conn, self.end = connection_pair()
        self.log = CompletionLog(config.log_size)
        self.status: int | None = None
        self.exited = trio.Event()
        self.is_closed = False
        self._decoder = FrameDecoder()
        self._frames: deque[Frame] = deque()

    async def wait(self) -> int:
        await self.exited.wait()
        assert self.status is not None
        return self.status

    def kill(self) -> None:
        self.exit(-signal.SIGKILL)

    def close(self) -> None:
        assert not self.is_closed
        self.is_closed = True
        close_now(self.conn)
        self.log.close()

    def exit(self, status: int) -> None:
        """End, as a process: its end of the connection is closed."""
        if self.status is None:
            self.status = status
            close_now(self.end)
            self.exited.set()

    async def say(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        await self.end.send_message(data, fds=fds)

    async def frame(self) -> Frame:
        """Receive a frame; its file descriptors are closed."""
        with trio.fail_after(30):
            while not self._frames:
                message = await self.end.receive_message(65536)
                if not message.data:
                    raise EndOfStreamError("the pool has closed the connection")
                self._frames += self._decoder.feed(message.data, message.fds.steal_fds())
        frame = self._frames.popleft()
        close_fds(frame.fds or [])
        return frame

    async def batch(self) -> tuple[int, list[int]]:
        """Receive a batch; return its id and the ids of its jobs."""
        frame = await self.frame()
        assert frame.kind == _protocol.JOBS
        batch, jobs = _protocol.unpack_jobs(frame.body)
        return batch, [job.id for job in jobs]

    async def take(self) -> list[int]:
        """Receive a batch, acknowledge it, and ask for more."""
        batch, ids = await self.batch()
        await self.say(taken(batch) + MORE)
        return ids

    async def beat_until_killed(self) -> None:
        """Send heartbeats, and nothing else, even if the pool does not read them."""
        while self.status is None:
            with suppress(UnixConnectionError):
                await self.say(BEAT)
            await trio.sleep(0.5)

    async def serve(self) -> None:
        """Handle jobs as an honest worker does, until it is drained or killed."""
        with suppress(UnixConnectionError):
            await self.say(_protocol.pack_ready())
            await self.go_on()
        self.exit(0)

    async def go_on(self) -> None:
        """Handle jobs as an honest worker does, until it is drained."""
        while (frame := await self.frame()).kind != _protocol.DRAIN:
            if frame.kind == _protocol.JOBS:
                batch, jobs = _protocol.unpack_jobs(frame.body)
                results = [answer(job.id) if job.wants_answer else done(job.id) for job in jobs]
                await self.say(taken(batch) + MORE + b"".join(results))


class Fakes:
    """The workers of a pool; all but the first ``liars`` are honest."""

    def __init__(self, nursery: trio.Nursery, liars: int, first: bytes) -> None:
        self._nursery = nursery
        self._liars = liars
        self._first = first
        self.created: list[FakeWorker] = []

    def start(self, config: WorkerConfig) -> FakeWorker:
        worker = FakeWorker(config, FIRST_PID + len(self.created))
        self.created.append(worker)
        if len(self.created) > self._liars:
            self._nursery.start_soon(worker.serve)
        else:
            self._nursery.start_soon(worker.say, self._first)
        return worker


@asynccontextmanager
async def fake_pool(
    patch: pytest.MonkeyPatch, *, liars: int = 1, first: bytes = b"", **options: Any
) -> AsyncGenerator[tuple[WorkerPool, list[FakeWorker]], None]:
    """Open a pool of fake workers; afterwards each has ended and was closed."""
    async with trio.open_nursery() as nursery:
        fakes = Fakes(nursery, liars, first or _protocol.pack_ready())
        patch.setattr(_process, "start", fakes.start)
        # Much longer than a test, but a test that fails does not hang.
        options = {"workers": 1, "hang_timeout": 300, **options}
        async with open_worker_pool(DO, **options) as pool:
            yield pool, fakes.created
            check_sums(pool.statistics())
        check_sums(pool.statistics())
        assert all(each.is_closed for each in fakes.created)


@attrs.define
class Submitters:
    """Tasks that submit jobs, and the outcome of each, by a name."""

    pool: WorkerPool
    nursery: trio.Nursery
    outcomes: dict[str, Any] = attrs.field(factory=dict[str, Any])

    def submit(self, name: str, **options: Any) -> None:
        self.nursery.start_soon(self._note, name, lambda: self.pool.submit(null(), **options))

    def call(self, name: str, **options: Any) -> None:
        self.nursery.start_soon(self._note, name, lambda: self.pool.call(**options))

    async def _note(self, name: str, run: Callable[[], Awaitable[Any]]) -> None:
        outcome: Any
        try:
            outcome = await run()
        except Exception as exc:  # that is the outcome
            outcome = exc
        assert name not in self.outcomes
        self.outcomes[name] = outcome


@asynccontextmanager
async def submitters_of(pool: WorkerPool) -> AsyncGenerator[Submitters, None]:
    """Wait at the end until each submitter has its outcome."""
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            yield Submitters(pool, nursery)


################################################################
# Frames
################################################################

MORE = encode_frame(_protocol.MORE)
BEAT = encode_frame(_protocol.BEAT)


def taken(batch: int) -> bytes:
    return _protocol.pack_batch_id(_protocol.TAKEN, batch)


def refused(batch: int) -> bytes:
    return _protocol.pack_batch_id(_protocol.REFUSED, batch)


def done(*ids: int) -> bytes:
    return _protocol.pack_job_ids(_protocol.DONE, ids)


def answer(job_id: int, data: bytes = b"an answer") -> bytes:
    return _protocol.pack_job_result(_protocol.ANSWER, job_id, data)


def pass_on(job_id: int) -> bytes:
    return _protocol.pack_job_result(_protocol.PASS, job_id, b"data")


def error(job_id: int) -> bytes:
    return _protocol.pack_job_result(_protocol.ERROR, job_id, b"it failed")


def has_started(workers: list[FakeWorker], count: int) -> bool:
    return len(workers) == count


def log_ids(worker: FakeWorker, *ids: int) -> None:
    """Claim in the completion log that jobs are finished."""
    os.pwrite(worker.log.fd, array("Q", ids).tobytes(), 0)


################################################################
# Workers that violate the protocol
################################################################

# The jobs of every test: 1 is a job, and 2 is a call, which the worker has acknowledged in the
# batches 1 and 2. 3 was sent in batch 3, and is not acknowledged. 4 is queued.
A_JOB, A_CALL, SENT, QUEUED = range(1, 5)
BOTH = frozenset({A_JOB, A_CALL})


@attrs.frozen
class Lie:
    """Frames that no worker may send.

    Attributes:
      logged: a part of the log.
      abandoned: the jobs that are abandoned.
      acknowledged: whether the worker has acknowledged SENT first.
      retried: the number of jobs that are queued again.
      attach: whether a file descriptor is sent with them.
    """

    frames: bytes
    logged: str
    abandoned: frozenset[int] = BOTH
    acknowledged: bool = False
    retried: int = 1
    attach: bool = False


NOT_OUTSTANDING = "which is not outstanding"
NOT_IN_FLIGHT = "is not in flight"

LIES = {
    "unknown kind": Lie(encode_frame(255), "got kind 255"),
    "kind of the pool": Lie(encode_frame(_protocol.DRAIN, bytes(8)), "got kind 3"),
    "kind 0": Lie(encode_frame(0), "got kind 0"),
    "STOPPED": Lie(encode_frame(_protocol.STOPPED), "was not told to accept"),
    "STARVED": Lie(_protocol.pack_starved(has_sockets=True), "was not told to"),
    "TAKEN of batch 0": Lie(taken(0), NOT_OUTSTANDING),
    "TAKEN of an old batch": Lie(taken(2), NOT_OUTSTANDING),
    "TAKEN of a batch of the future": Lie(taken(4), NOT_OUTSTANDING),
    "TAKEN of the largest batch": Lie(taken(2**64 - 1), NOT_OUTSTANDING),
    "TAKEN twice": Lie(taken(3) * 2, NOT_OUTSTANDING, BOTH | {SENT}, acknowledged=True, retried=0),
    "TAKEN with a body that is too short": Lie(
        encode_frame(_protocol.TAKEN, bytes(4)), "expected the id of a batch"
    ),
    "TAKEN with a body that is too long": Lie(
        encode_frame(_protocol.TAKEN, bytes(9)), "expected the id of a batch"
    ),
    "REFUSED of an old batch": Lie(refused(1), NOT_OUTSTANDING),
    "REFUSED of a batch of the future": Lie(refused(4), NOT_OUTSTANDING),
    "REFUSED after TAKEN": Lie(
        taken(3) + refused(3), NOT_OUTSTANDING, BOTH | {SENT}, acknowledged=True, retried=0
    ),
    "TAKEN after REFUSED": Lie(refused(3) + taken(3), NOT_OUTSTANDING),
    "REFUSED twice": Lie(refused(3) * 2, NOT_OUTSTANDING),
    "DONE for a call": Lie(done(A_CALL), "expects an answer"),
    "DONE twice": Lie(done(A_JOB) + done(A_JOB), NOT_IN_FLIGHT, frozenset({A_CALL})),
    "DONE twice in a frame": Lie(done(A_JOB, A_JOB), NOT_IN_FLIGHT, frozenset({A_CALL})),
    "DONE of a job that is not acknowledged": Lie(done(SENT), NOT_IN_FLIGHT),
    "DONE of a job that is queued": Lie(done(QUEUED), NOT_IN_FLIGHT),
    "DONE of no job": Lie(done(2**64 - 1), NOT_IN_FLIGHT),
    "DONE of job 0": Lie(done(0), NOT_IN_FLIGHT),
    "DONE with half an id": Lie(encode_frame(_protocol.DONE, bytes(7)), "expected the ids of jobs"),
    "ANSWER for a job": Lie(answer(A_JOB), "expects no answer"),
    "ANSWER twice": Lie(answer(A_CALL) * 2, NOT_IN_FLIGHT, frozenset({A_JOB})),
    "ANSWER of no job": Lie(answer(12345), NOT_IN_FLIGHT),
    "ANSWER of a job that is not acknowledged": Lie(answer(SENT), NOT_IN_FLIGHT),
    "ANSWER with half an id": Lie(
        encode_frame(_protocol.ANSWER, bytes(3)), "expected the id of a job"
    ),
    "ERROR of no job": Lie(error(12345), NOT_IN_FLIGHT),
    "ERROR of a job that is not acknowledged": Lie(error(SENT), NOT_IN_FLIGHT),
    "ERROR twice": Lie(error(A_CALL) * 2, NOT_IN_FLIGHT, frozenset({A_JOB})),
    "MORE before the batch is acknowledged": Lie(MORE, "asked for more"),
    "MORE twice": Lie(taken(3) + MORE + MORE, "asked for more", BOTH | {SENT}, acknowledged=True),
    "READY twice": Lie(_protocol.pack_ready(), "twice"),
    "READY of another version": Lie(
        encode_frame(_protocol.READY, b'{"protocol": 1, "version": "0.0.0"}'), "twice"
    ),
    "FAILED after READY": Lie(encode_frame(_protocol.FAILED, b"a traceback"), "twice"),
    "frame that is too long": Lie(
        encode_frame(_protocol.ANSWER)[:2] + (MAX_BODY + 1).to_bytes(4, "little"),
        "expected a frame of at most",
    ),
    "frame that claims file descriptors": Lie(
        encode_frame(_protocol.BEAT, carries_fds=True), "without its file descriptors"
    ),
    "frame that is too long, after TAKEN": Lie(
        taken(3) + encode_frame(_protocol.ANSWER)[:2] + (MAX_BODY + 1).to_bytes(4, "little"),
        "expected a frame of at most",
        BOTH | {SENT},
        acknowledged=True,
        retried=0,
    ),
    "file descriptors after TAKEN": Lie(
        taken(3) + BEAT, "carries none", BOTH | {SENT}, acknowledged=True, retried=0, attach=True
    ),
    "PASS of a call": Lie(pass_on(A_CALL), "expects an answer", attach=True),
    "PASS of a job that is not acknowledged": Lie(pass_on(SENT), NOT_IN_FLIGHT, attach=True),
    "PASS of no job": Lie(pass_on(12345), NOT_IN_FLIGHT, attach=True),
    "PASS with half an id": Lie(
        encode_frame(_protocol.PASS, bytes(3), carries_fds=True), "the id of a job", attach=True
    ),
    "PASS of another file": Lie(pass_on(A_JOB), "got another file", attach=True),
    "PASS without a file descriptor": Lie(
        encode_frame(_protocol.PASS, A_JOB.to_bytes(8, "little")), "got another file"
    ),
    "PASS, and a frame that is too long": Lie(
        pass_on(A_JOB) + encode_frame(_protocol.ANSWER)[:2] + (MAX_BODY + 1).to_bytes(4, "little"),
        "expected a frame of at most",
        attach=True,
    ),
    "unknown kind, and PASS": Lie(encode_frame(255) + pass_on(A_JOB), "got kind 255", attach=True),
    "file descriptors": Lie(
        encode_frame(_protocol.BEAT, carries_fds=True), "expected", attach=True
    ),
    "file descriptors with a frame that claims none": Lie(BEAT, "carries none", attach=True),
}


async def make_busy(submitters: Submitters, liar: FakeWorker) -> None:
    """Give a worker the jobs of every test."""
    submitters.submit("a job")
    assert await liar.take() == [A_JOB]
    submitters.call("a call")
    assert await liar.take() == [A_CALL]
    submitters.submit("sent")
    assert await liar.batch() == (3, [SENT])
    submitters.submit("queued")
    await until(lambda: submitters.pool.statistics().queued == 1)


def check_outcomes(
    submitters: Submitters,
    liar: FakeWorker,
    successor: FakeWorker,
    found: PoolStatistics,
    abandoned: frozenset[int] = BOTH,
    *,
    acknowledged: bool = False,
    retried: int = 1,
) -> None:
    """Each submitter has its outcome, and each job is counted once."""
    called = submitters.outcomes.pop("a call")
    if A_CALL in abandoned:
        assert isinstance(called, WorkerDiedError)
    assert submitters.outcomes == {
        "a job": JobReceipt(A_JOB, 0, liar.pid),
        "sent": JobReceipt(SENT, 0, liar.pid if acknowledged else successor.pid),
        "queued": JobReceipt(QUEUED, 0, successor.pid),
    }
    assert found.submitted == found.acknowledged == 4
    assert found.abandoned == len(abandoned)
    assert found.handled + found.failed == 4 - len(abandoned)
    assert found.retried == retried
    assert (found.deaths, found.restarts) == (1, 1)


@pytest.mark.parametrize("name", LIES)
async def test_worker_that_violates_the_protocol_is_killed(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, its jobs are settled or queued again once, and the pool goes on."""
    lie = LIES[name]
    reported: list[int] = []

    def report(job: AbandonedJob) -> None:
        reported.append(job.id)

    async with fake_pool(monkeypatch, on_abandoned=report) as (pool, workers):
        (liar,) = workers
        async with submitters_of(pool) as submitters:
            await make_busy(submitters, liar)
            fd = null()
            await liar.say(lie.frames, (fd,) if lie.attach else ())
            os.close(fd)
            await liar.exited.wait()
        assert liar.status == -signal.SIGKILL
        found = await at_rest(pool)
        assert await pool.call() == b"an answer"
    assert sorted(reported) == sorted(lie.abandoned)
    options: dict[str, Any] = {"acknowledged": lie.acknowledged, "retried": lie.retried}
    check_outcomes(submitters, liar, workers[1], found, lie.abandoned, **options)
    (logged,) = [each for each in caplog.messages if "protocol error" in each]
    assert lie.logged in logged


async def open_with_first(patch: pytest.MonkeyPatch, first: bytes) -> None:
    """Open a pool whose worker begins with these frames; raise what it raises."""
    raised: list[WorkerStartError] = []
    async with trio.open_nursery() as nursery:
        fakes = Fakes(nursery, 1, first)
        patch.setattr(_process, "start", fakes.start)
        try:
            async with open_worker_pool(DO, workers=1):
                pytest.fail("a worker was ready")
        except WorkerStartError as exc:
            raised.append(exc)
    (worker,) = fakes.created
    assert worker.is_closed
    assert worker.status == -signal.SIGKILL
    raise raised[0]


@pytest.mark.parametrize(
    "frames",
    [taken(0), taken(1), refused(0), done(1), answer(1), error(1), MORE, encode_frame(7)],
    ids=["TAKEN 0", "TAKEN 1", "REFUSED", "DONE", "ANSWER", "ERROR", "MORE", "kind 7"],
)
async def test_worker_that_violates_the_protocol_before_it_is_ready(
    frames: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed, and is a worker that could not start."""
    with pytest.raises(WorkerStartError, match="violated the protocol"):
        await open_with_first(monkeypatch, frames)


@pytest.mark.parametrize("frames", [taken(1), refused(1), MORE], ids=["TAKEN", "REFUSED", "MORE"])
async def test_worker_that_answers_before_it_is_asked(
    frames: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle worker cannot acknowledge, refuse, or ask for more than it has."""
    async with fake_pool(monkeypatch) as (pool, workers):
        await workers[0].say(frames)
        await workers[0].exited.wait()
        assert await pool.call() == b"an answer"
        assert (await at_rest(pool)).deaths == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[" * 10_000,
        b'{"protocol": 2}',
        b'{"protocol": 2, "version": "0.0.1"}',
        b'{"protocol": 1000, "version": null}',
        b"\xff",
    ],
    ids=["empty", "no values", "nested", "no version", "old", "new", "no text"],
)
async def test_worker_of_another_version_cannot_start(
    body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """READY of another version ends the worker, and the error says what to do."""
    first = encode_frame(_protocol.READY, body)
    with pytest.raises(WorkerStartError, match="restart this program to use the new version"):
        await open_with_first(monkeypatch, first)


@pytest.mark.parametrize("says_first", [b"", taken(3)], ids=["nothing", "TAKEN"])
async def test_worker_that_ends_its_stream_and_lives_is_killed(
    says_first: bytes, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """It gets no more jobs, and is killed after EXIT_GRACE."""
    async with fake_pool(monkeypatch) as (pool, workers):
        (liar,) = workers
        async with submitters_of(pool) as submitters:
            await make_busy(submitters, liar)
            begin = trio.current_time()
            if says_first:
                await liar.say(says_first)
            liar.end._receiver.raw.shutdown(1)
            await liar.exited.wait()
            assert trio.current_time() - begin == pytest.approx(EXIT_GRACE, abs=0.01)
        assert liar.status == -signal.SIGKILL
        found = await at_rest(pool)
    check_outcomes(
        submitters,
        liar,
        workers[1],
        found,
        BOTH | {SENT} if says_first else BOTH,
        acknowledged=bool(says_first),
        retried=0 if says_first else 1,
    )


async def test_worker_that_shuts_down_receiving_and_lives_is_killed(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A worker that cannot be sent a batch, and goes on to send heartbeats, is killed, too."""
    async with fake_pool(monkeypatch) as (pool, workers):
        (liar,) = workers
        liar.end._receiver.raw.shutdown(0)
        async with submitters_of(pool) as submitters:
            begin = trio.current_time()
            submitters.submit("a job")
            await liar.beat_until_killed()
            assert trio.current_time() - begin == pytest.approx(EXIT_GRACE, abs=0.6)
        assert submitters.outcomes == {"a job": JobReceipt(1, 0, workers[1].pid)}
        found = await at_rest(pool)
    assert (found.retried, found.handled, found.abandoned) == (1, 1, 0)


async def test_hang_timeout_of_a_batch_without_an_answer(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A worker that sends heartbeats and never answers a batch is killed after hang_timeout."""
    async with fake_pool(monkeypatch, hang_timeout=20) as (pool, workers):
        (deaf,) = workers
        async with submitters_of(pool) as submitters:
            begin = trio.current_time()
            submitters.submit("a job")
            await deaf.batch()
            await deaf.beat_until_killed()
            assert trio.current_time() - begin == pytest.approx(20, abs=2)
        assert submitters.outcomes == {"a job": JobReceipt(1, 0, workers[1].pid)}
        found = await at_rest(pool)
    assert (found.retried, found.handled, found.abandoned) == (1, 1, 0)


async def test_hang_timeout_of_a_frame_that_does_not_end(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A handler has written to the connection, and the heartbeats are the body of that frame."""
    async with fake_pool(monkeypatch, hang_timeout=20) as (pool, workers):
        (deaf,) = workers
        async with submitters_of(pool) as submitters:
            submitters.submit("a job")
            await deaf.take()
            begin = trio.current_time()
            await deaf.say(encode_frame(0, bytes(6000))[:6])
            await deaf.beat_until_killed()
            assert trio.current_time() - begin == pytest.approx(20, abs=2)
        found = await at_rest(pool)
    assert (found.abandoned, found.deaths) == (1, 1)


async def test_hang_timeout_of_a_large_frame(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A large answer is a sign of life while it arrives, even if that takes long."""
    async with fake_pool(monkeypatch, hang_timeout=5) as (pool, workers):
        (slow,) = workers
        async with submitters_of(pool) as submitters:
            submitters.call("a call")
            await slow.take()
            data = answer(1, bytes(10 * 8192))
            for start in range(0, len(data), 8192):
                await trio.sleep(3)
                await slow.say(data[start : start + 8192])
        assert submitters.outcomes == {"a call": bytes(10 * 8192)}
        assert slow.status is None


async def test_jobs_that_only_the_completion_log_has_clear_the_crashes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker that dies before it can report a handled job has handled it: pauses do not grow."""
    async with fake_pool(monkeypatch, liars=3, crash_limit=1) as (pool, workers):
        async with submitters_of(pool) as submitters:
            for number in range(3):
                submitters.submit(f"job {number}")
                await until(partial(has_started, workers, number + 1))
                (job_id,) = await workers[number].take()
                await until(lambda: bool(pool._supervisor.slots[0].handle.in_flight))
                submitters.submit(f"another job {number}")
                await workers[number].take()
                log_ids(workers[number], job_id)
                await until(lambda: len(pool._supervisor.slots[0].handle.in_flight) == 2)
                workers[number].exit(-signal.SIGSEGV)
                await until(partial(has_started, workers, number + 2))
                assert pool._supervisor.slots[0].deaths == 1
        found = await at_rest(pool)
    assert (found.handled, found.abandoned) == (3, 3)


@pytest.mark.parametrize("claimed", [(), (A_JOB,), (A_CALL,), (A_JOB, A_CALL)])
async def test_abandoned_in_spite_of_a_completion_log_that_claims_too_much(
    claimed: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a log, the pool reads only the ids of jobs that the worker has acknowledged."""
    async with fake_pool(monkeypatch) as (pool, workers):
        (liar,) = workers
        async with submitters_of(pool) as submitters:
            await make_busy(submitters, liar)
            log_ids(liar, *claimed, SENT, QUEUED, 0, 12345, 2**64 - 1)
            liar.exit(-signal.SIGSEGV)
        found = await at_rest(pool)
    called = submitters.outcomes["a call"]
    assert isinstance(called, WorkerDiedError)
    assert "was killed by SIGSEGV" in str(called)
    assert found.abandoned == 2 - len(claimed)
    assert found.handled == 2 + len(claimed)


async def test_last_frames_of_a_worker_that_exits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker has sent before it exits is read before its jobs are settled."""
    async with fake_pool(monkeypatch) as (pool, workers):
        (liar,) = workers
        async with submitters_of(pool) as submitters:
            await make_busy(submitters, liar)
            await liar.say(taken(3) + done(A_JOB, SENT) + answer(A_CALL))
            liar.exit(1)
        found = await at_rest(pool)
    check_outcomes(submitters, liar, workers[1], found, frozenset(), acknowledged=True, retried=0)


async def test_half_a_frame_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dies inside of a frame has not sent it."""
    async with fake_pool(monkeypatch) as (pool, workers):
        (liar,) = workers
        async with submitters_of(pool) as submitters:
            await make_busy(submitters, liar)
            await liar.say(taken(3)[:-1])
            liar.exit(1)
        found = await at_rest(pool)
    check_outcomes(submitters, liar, workers[1], found)


async def test_other_workers_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that violates the protocol ends none but itself."""
    async with fake_pool(monkeypatch, liars=2, workers=2) as (pool, workers):
        liar, other = sorted(workers, key=lambda each: each.index)
        async with submitters_of(pool) as submitters:
            submitters.call("first", worker=0)
            await liar.take()
            submitters.call("second", worker=1)
            (job_id,) = await other.take()
            await liar.say(encode_frame(99))
            await liar.exited.wait()
            await other.say(answer(job_id))
        assert isinstance(submitters.outcomes["first"], WorkerDiedError)
        assert submitters.outcomes["second"] == b"an answer"
        assert other.status is None
        other.exit(0)


################################################################
# One queue for all that is sent
################################################################


async def test_drain_is_sent_after_the_batch_that_was_given_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DRAIN does not overtake the cancellations of calls, or a batch."""
    async with fake_pool(monkeypatch, liars=2, workers=2) as (pool, workers):
        first, leaving = sorted(workers, key=lambda each: each.index)
        scope = trio.CancelScope()

        async def call_many() -> None:
            with scope:
                async with trio.open_nursery() as nursery:
                    for _ in range(40):
                        nursery.start_soon(_call, pool)

        async with submitters_of(pool) as submitters:
            submitters.nursery.start_soon(call_many)
            ids: list[int] = []
            while len(ids) < 40:
                ids += await leaving.take()
            scope.cancel()
            submitters.call("late", worker=1)
            await until(lambda: pool.statistics().in_flight == 41)
            submitters.nursery.start_soon(pool.scale, 1)
            cancelled: set[int] = set()
            late = 0
            while (frame := await leaving.frame()).kind != _protocol.DRAIN:
                if frame.kind == _protocol.CANCEL:
                    cancelled.update(_protocol.unpack_job_ids(frame.body))
                else:
                    batch, ((late, *_),) = _protocol.unpack_jobs(frame.body)
                    await leaving.say(taken(batch))
            assert cancelled == set(ids)
            assert late == 41
            await leaving.say(answer(late) + b"".join(map(error, ids)))
            leaving.exit(0)
        assert submitters.outcomes == {"late": b"an answer"}
        found = await at_rest(pool)
        assert (found.handled, found.failed, found.abandoned, found.deaths) == (1, 40, 0, 0)
        first.exit(0)


async def _call(pool: WorkerPool) -> None:
    await pool.call(worker=1)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM])
async def test_batch_that_cannot_be_sent_yet_is_sent_before_drain(
    number: int, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A batch for which the kernel has no resources is retried; a later DRAIN waits for it."""
    async with fake_pool(monkeypatch) as (pool, workers):
        (worker,) = workers
        real, failures = UnixConnection.send_message, [number] * 30

        async def send(conn: UnixConnection, *args: Any, **options: Any) -> None:
            if failures and conn is worker.conn:
                raise OSError(failures.pop(), "no resources")
            await real(conn, *args, **options)

        monkeypatch.setattr(UnixConnection, "send_message", send)
        send_batches_by_tasks(monkeypatch)
        async with submitters_of(pool) as submitters:
            submitters.submit("a job")
            await until(lambda: len(failures) < 30)
            assert pool._supervisor.slots[0].handle.jobs_in_hand == 1
            await pool.restart()
            (handle,) = pool._supervisor._leaving
            assert handle.state is HandleState.DRAINING
            assert (await worker.batch())[1] == [1]
            assert (await worker.frame()).kind == _protocol.DRAIN
            assert not failures
            await worker.say(taken(1) + done(1))
            worker.exit(0)
        assert submitters.outcomes == {"a job": JobReceipt(1, 0, worker.pid)}


async def test_batch_that_the_kernel_takes_in_part_is_sent_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is left of a batch follows it, before what is sent later."""
    data = bytes(range(256)) * 4096
    async with fake_pool(monkeypatch) as (pool, (worker, *_)), trio.open_nursery() as nursery:
        nursery.start_soon(partial(pool.submit, null(), data=data))
        await wait_all_tasks_blocked()
        pool._supervisor.slots[0].handle.cancel_job(1)
        frame = await worker.frame()
        assert _protocol.unpack_jobs(frame.body)[1][0].data == data
        assert (await worker.frame()).kind == _protocol.CANCEL
        await worker.say(taken(1) + done(1))


async def test_send_with_fds_nowait_while_a_task_sends() -> None:
    """Nothing is sent between the parts of what a task sends."""
    here, there = connection_pair()
    async with here, there, trio.open_nursery() as nursery:
        nursery.start_soon(here.send_all, bytes(1 << 20))
        await wait_all_tasks_blocked()
        with pytest.raises(trio.WouldBlock):
            send_with_fds_nowait(here, b"x", [])
        nursery.cancel_scope.cancel()


async def test_receive_with_fds_of_a_connection_that_is_closed() -> None:
    """It raises, whether the connection is closed before or while it waits."""
    here, there = connection_pair()

    async def receive() -> None:
        with pytest.raises(ConnectionClosedError):
            await receive_with_fds(here, 1)

    async with there, trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        close_now(here)
        await receive()


async def test_run_of_a_process_that_cannot_be_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If waiting for a process fails again and again, its worker has an end nevertheless."""
    monkeypatch.setattr(_handle, "WAIT_RETRY_DELAY", 0)
    wait, left = FakeWorker.wait, [3]

    async def fail(worker: FakeWorker) -> int:
        status = await wait(worker)
        if worker.pid == FIRST_PID and left[0]:
            left[0] -= 1
            raise RuntimeError("can't start new thread")
        return status

    monkeypatch.setattr(FakeWorker, "wait", fail)
    async with fake_pool(monkeypatch) as (pool, workers):
        workers[0].exit(-signal.SIGKILL)
        with trio.fail_after(30):
            assert await pool.call() == b"an answer"
        assert workers[0].is_closed
    assert left == [0]
    assert caplog.text.count("cannot wait for its process, trying again") == 2


async def test_receive_with_fds_of_a_frame_that_a_worker_has_not_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection that arrived with a part of a frame is closed when its worker dies."""
    async with fake_pool(monkeypatch) as (pool, workers):
        one, two = socket.socketpair()
        with trio.socket.from_stdlib_socket(two) as peer, trio.fail_after(30):
            await workers[0].say(pass_on(1)[:-1], (one.fileno(),))
            one.close()
            workers[0].exit(-signal.SIGKILL)
            assert await pool.call() == b"an answer"
            assert await peer.recv(1) == b""


async def test_receive_with_fds_of_bytes_that_another_process_has_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It waits again if nothing has arrived after all."""
    here, there = connection_pair()
    real, waits = trio.lowlevel.wait_readable, list[int]()

    async def wait_readable(sock: Any) -> None:
        waits.append(1)
        if len(waits) > 1:
            await real(sock)

    async with here, there:
        monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(there.send_all, b"x")
                assert await receive_with_fds(here, 1) == (b"x", [])
    assert len(waits) == 2


async def test_batch_that_is_refused_after_drain_goes_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch refused by a draining worker is not an attempt, nor a lack of descriptors."""
    async with fake_pool(monkeypatch, max_attempts=1) as (pool, workers):
        (old,) = workers
        async with submitters_of(pool) as submitters:
            submitters.submit("a job")
            assert await old.batch() == (1, [1])
            await pool.restart()
            assert (await old.frame()).kind == _protocol.DRAIN
            await old.say(refused(1))
            await until(lambda: bool(submitters.outcomes))
            old.exit(0)
        assert submitters.outcomes == {"a job": JobReceipt(1, 0, workers[1].pid)}
        found = await at_rest(pool)
        assert (found.retried, found.rejected, found.deaths) == (1, 0, 0)


async def test_jobs_with_closed_descriptors_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch, those whose descriptors other code has closed are rejected; the rest is sent."""
    async with fake_pool(monkeypatch) as (pool, workers):
        (worker,) = workers
        async with submitters_of(pool) as submitters:
            submitters.submit("a job")
            assert await worker.batch() == (1, [1])
            fds = {name: null() for name in ("open", "closed", "open, too")}
            for name, fd in fds.items():
                submitters.nursery.start_soon(
                    submitters._note,
                    name,
                    lambda fd=fd: pool.submit(fd),
                )
            await until(lambda: pool.statistics().queued == 3)
            os.close(fds["closed"])
            await worker.say(taken(1) + MORE)
            _, ids = await worker.batch()
            await worker.say(taken(2) + MORE + done(1, *ids))
            await until(lambda: len(submitters.outcomes) == 4)
            # Nothing is left of a batch: the worker gets the next one.
            submitters.submit("last")
            assert (await worker.batch())[0] == 3
            alone = null()
            submitters.nursery.start_soon(submitters._note, "alone", lambda: pool.submit(alone))
            await until(lambda: pool.statistics().queued == 1)
            os.close(alone)
            await worker.say(taken(3) + MORE)
            await until(lambda: "alone" in submitters.outcomes)
            submitters.submit("after that")
            batch, (job_id,) = await worker.batch()
            await worker.say(taken(batch) + MORE + done(job_id))
            await until(lambda: pool.statistics().in_flight == 1)
            (left,) = pool._supervisor.slots[0].handle.in_flight
            await worker.say(done(left))
        rejected = {
            name for name, each in submitters.outcomes.items() if isinstance(each, JobRefusedError)
        }
        assert rejected == {"closed", "alone"}
        found = await at_rest(pool)
        assert (found.handled, found.rejected) == (5, 2)
        worker.exit(0)


async def test_batch_ids_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch ids have 64 bits: jobs go on after 2**32 of them."""
    async with open_worker_pool(DO, workers=1) as pool:
        pool._supervisor.slots[0].handle._batch_id = 2**32 - 2
        for _ in range(4):
            assert await pool.call() == b"nothing to do"
        assert pool._supervisor.slots[0].handle._batch_id == 2**32 + 2
        assert (await at_rest(pool)).deaths == 0


################################################################
# cancel_job
################################################################


async def test_cancel_job_before_the_batch_is_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is cancelled while it is sent is cancelled in the worker after TAKEN."""
    async with fake_pool(monkeypatch) as (pool, workers):
        (worker,) = workers
        scope = trio.CancelScope()

        async def call() -> None:
            with scope:
                await pool.call()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            assert await worker.batch() == (1, [1])
            scope.cancel()
            await wait_all_tasks_blocked()
            await worker.say(taken(1) + MORE)
            frame = await worker.frame()
            assert frame.kind == _protocol.CANCEL
            assert _protocol.unpack_job_ids(frame.body) == [1]
            assert not scope.cancelled_caught
            await worker.say(error(1))
        assert scope.cancelled_caught
        found = await at_rest(pool)
        assert (found.failed, found.cancelled, found.retried) == (1, 0, 0)
        worker.exit(0)


async def test_cancel_job_that_is_refused_or_not_acknowledged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call that is cancelled while it is sent is not sent again."""
    for ends in (refused(1), encode_frame(99)):
        async with fake_pool(monkeypatch) as (pool, workers):
            scope = trio.CancelScope()

            async def call(pool: WorkerPool, scope: trio.CancelScope) -> None:
                with scope:
                    await pool.call()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(call, pool, scope)
                assert await workers[0].batch() == (1, [1])
                scope.cancel()
                await wait_all_tasks_blocked()
                await workers[0].say(ends)
            assert scope.cancelled_caught
            found = await at_rest(pool)
            assert (found.cancelled, found.retried, found.rejected) == (1, 0, 0)
            workers[0].exit(0)


################################################################
# The grace of a worker that leaves
################################################################


async def test_leave_counts_its_grace_from_the_last_job(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A worker that finishes its jobs and does not exit is killed EXIT_GRACE after the last one."""
    async with fake_pool(monkeypatch, drain_timeout=1000) as (pool, workers):
        (worker,) = workers
        async with submitters_of(pool) as submitters:
            submitters.submit("a job")
            assert await worker.take() == [1]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.drain)
            await trio.sleep(70)
            assert worker.status is None
            await worker.say(done(1))
            begin = trio.current_time()
            await worker.exited.wait()
            assert trio.current_time() - begin == pytest.approx(EXIT_GRACE, abs=0.01)
        assert worker.status == -signal.SIGKILL
        assert (await at_rest(pool)).handled == 1


async def test_leave_of_an_idle_worker(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A worker without jobs that does not exit is killed EXIT_GRACE after it was told to leave."""
    async with fake_pool(monkeypatch, drain_timeout=1000) as (pool, workers):
        await trio.sleep(70)
        begin = trio.current_time()
        await pool.drain()
        assert trio.current_time() - begin == pytest.approx(EXIT_GRACE, abs=0.01)
        assert workers[0].status == -signal.SIGKILL


async def test_leave_after_a_gap(
    monkeypatch: pytest.MonkeyPatch, mock_clock: trio.testing.MockClock
) -> None:
    """After this process has not run for some time, a worker has its grace again."""
    async with fake_pool(monkeypatch, hang_timeout=1e6) as (pool, workers):
        (worker,) = workers
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.drain, 20)
            await wait_all_tasks_blocked()
            for seconds in 1000, EXIT_GRACE - 0.1:
                mock_clock.jump(seconds)
                await wait_all_tasks_blocked()
                assert worker.status is None
            mock_clock.jump(0.2)
            await worker.exited.wait()
        assert worker.status == -signal.SIGKILL


async def test_leave_of_a_worker_whose_handlers_go_on(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A worker with jobs has EXIT_GRACE after the timeout of the drain."""
    reported: list[AbandonedJob] = []
    async with fake_pool(monkeypatch, on_abandoned=reported.append) as (pool, workers):
        (worker,) = workers
        async with submitters_of(pool) as submitters:
            submitters.submit("a job")
            assert await worker.take() == [1]
        begin = trio.current_time()
        await pool.drain(20)
        assert trio.current_time() - begin == pytest.approx(20 + EXIT_GRACE, abs=0.01)
        assert [each.id for each in reported] == [1]
        assert reported[0].seconds == pytest.approx(20 + EXIT_GRACE, abs=0.01)
        assert pool.statistics().abandoned == 1


################################################################
# Workers that accept
################################################################


@attrs.define
class AcceptingWorker:
    """A worker that was told to accept, and has accepted three connections."""

    worker: FakeWorker
    log: AcceptLogWriter
    base: int


@asynccontextmanager
async def accepting_worker(
    pool: WorkerPool, worker: FakeWorker, listener: trio.SocketListener, count: int = 3
) -> AsyncGenerator[AcceptingWorker, None]:
    sock = raw_socket(listener.socket)
    plan = AcceptPlan([SharedListener(sock, EndpointKind.TCP, "here")], 10)
    supervisor_of(pool).accept_from(plan)
    decoder = FrameDecoder()
    frames: list[Frame] = []
    with trio.fail_after(30):
        while not frames:
            message = await worker.end.receive_message(65536)
            frames = decoder.feed(message.data, message.fds.steal_fds())
    (frame,) = frames
    assert frame.kind == _protocol.ACCEPT
    assert frame.fds is not None
    close_fds(frame.fds[1:])
    log = AcceptLogWriter(frame.fds[0])
    for each in range(count):
        log.add(EndpointKind.UNIX if each == 2 else EndpointKind.TCP, "")
    try:
        yield AcceptingWorker(worker, log, json.loads(frame.body)["base"])
    finally:
        log.close()


def _cancelled(job_id: int) -> bytes:
    return _protocol.pack_job_result(_protocol.ERROR, job_id, _protocol.CANCELLED_BY_EXIT)


# Frames about connections that the worker has accepted, by the id before the first of them.
ACCEPT_LIES: dict[str, tuple[Callable[[int], bytes], str]] = {
    "ERROR of the next job": (lambda base: error(base + 4), "was not accepted"),
    "CANCELLED of the next job": (lambda base: _cancelled(base + 4), NOT_IN_FLIGHT),
    "CANCELLED twice": (lambda base: _cancelled(base + 1) * 2, NOT_IN_FLIGHT),
    "PASS of the next job": (lambda base: pass_on(base + 4), NOT_IN_FLIGHT),
    "PASS of no connection": (lambda base: pass_on(base + 1), "got another file"),
    "PASS of a connection of no listener": (lambda base: pass_on(base + 3), "that of no listener"),
    "PASS of another worker's job": (lambda base: pass_on(2 * base + 1), NOT_IN_FLIGHT),
    "DONE": (lambda base: done(base + 1), NOT_IN_FLIGHT),
    "STARVED with a wrong body": (
        lambda _: encode_frame(_protocol.STARVED, b"\2"),
        "expected whether it has the listening sockets",
    ),
}


@pytest.mark.parametrize("name", ACCEPT_LIES)
async def test_accepting_worker_that_violates_the_protocol_is_killed(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it has accepted is abandoned, once, or was reported before."""
    frames, text = ACCEPT_LIES[name]
    reported: list[AbandonedJob] = []
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with (
        listener,
        fake_pool(monkeypatch, on_abandoned=reported.append) as (pool, workers),
        accepting_worker(pool, workers[0], listener) as accepting,
    ):
        data = frames(accepting.base)
        fd = null()
        await accepting.worker.say(data, (fd,) if "PASS" in name else ())
        os.close(fd)
        await accepting.worker.exited.wait()
        await until(lambda: has_started(workers, 2))
        assert text in caplog.text
        found = pool.statistics()
        failed = 1 if "twice" in name else 0
        assert (found.abandoned, found.failed, found.handled) == (3 - failed, failed, 0)
        assert len({each.id for each in reported}) == 3 - failed


async def test_accept_log_that_contradicts_itself_kills_the_worker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The statistics are those of before, and another worker is started."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with (
        listener,
        fake_pool(monkeypatch) as (pool, workers),
        accepting_worker(pool, workers[0], listener) as accepting,
    ):
        assert pool.statistics().in_flight == 3
        accepting.log._words[1] = 0
        pool.statistics()
        await accepting.worker.exited.wait()
        await until(lambda: has_started(workers, 2))
        assert "contradicts itself" in caplog.text
        assert pool.statistics().abandoned == 3


async def test_leave_of_a_worker_that_has_accepted(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """It has EXIT_GRACE after it has said that its handlers have ended."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with (
        listener,
        fake_pool(monkeypatch, drain_timeout=1000) as (pool, workers),
        accepting_worker(pool, workers[0], listener, count=1) as accepting,
    ):
        (worker,) = workers
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.drain)
            while (await worker.frame()).kind != _protocol.DRAIN:
                pass
            await trio.sleep(100)
            assert worker.status is None
            accepting.log.finish(0, failed=False)
            begin = trio.current_time()
            await worker.say(encode_frame(_protocol.IDLE))
        assert trio.current_time() - begin == pytest.approx(EXIT_GRACE, abs=0.01)
    assert pool.statistics().handled == 1


async def test_stop_accepting_while_the_listeners_cannot_be_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pool without a free file descriptor retries; a worker that is to stop is sent none."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, fake_pool(monkeypatch) as (pool, workers):
        sock = raw_socket(listener.socket)
        plan = AcceptPlan([SharedListener(sock, EndpointKind.TCP, "here")], 10)
        supervisor = supervisor_of(pool)
        with free_descriptors(0):
            supervisor.accept_from(plan)
            await wait_all_tasks_blocked()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(supervisor.stop_accepting)
                frame = await workers[0].frame()
                assert frame.kind == _protocol.STOP
                await workers[0].say(encode_frame(_protocol.STOPPED))
        supervisor.accept_from(AcceptPlan(plan.listeners, 10))
        assert (await workers[0].frame()).kind == _protocol.ACCEPT
        # It could not receive them, and then it is to stop.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.stop_accepting)
            await wait_all_tasks_blocked()
            await workers[0].say(_protocol.pack_starved(has_sockets=False))
        assert (await workers[0].frame()).kind == _protocol.STOP


@pytest.mark.parametrize("why", ["closed", "rejected"])
async def test_listeners_that_cannot_be_sent(
    why: str, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """The worker has closed its end, or the kernel rejects them: it is killed unless it exits."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    errors: list[Exception] = [SendError(errno.EPERM, os.strerror(errno.EPERM))]
    real = UnixConnection.send_message

    async def send_message(conn: UnixConnection, data: bytes, *, fds: Any = ()) -> None:
        if fds and errors:
            raise errors.pop()
        await real(conn, data, fds=fds)

    async with listener, fake_pool(monkeypatch) as (pool, workers):
        plan = AcceptPlan([SharedListener(raw_socket(listener.socket), 1, "here")], 10)
        if why == "closed":
            close_now(workers[0].end)
        else:
            monkeypatch.setattr(UnixConnection, "send_message", send_message)
        supervisor_of(pool).accept_from(plan)
        await workers[0].exited.wait()
        await until(lambda: has_started(workers, 2))
        await until(lambda: pool.statistics().state == "ready")
        plan.is_over = True


async def test_a_closed_listener_is_not_shared(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A listener that other code closes just then does not end the worker."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with fake_pool(monkeypatch) as (pool, workers):
        sock = raw_socket(listener.socket)
        await listener.aclose()
        plan = AcceptPlan([SharedListener(sock, EndpointKind.TCP, "here")], 10)
        supervisor_of(pool).accept_from(plan)
        await wait_all_tasks_blocked()
        assert workers[0].status is None
        plan.is_over = True
    assert "error in the pool" not in caplog.text


async def test_accept_from_while_a_worker_is_replaced(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A worker that has ended is sent no listeners; the next one gets them when it is ready."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, fake_pool(monkeypatch, workers=2, liars=3) as (pool, workers):
        plan = AcceptPlan([SharedListener(raw_socket(listener.socket), 1, "here")], 10)
        ended = queue_of(pool).workers.pop(0)
        supervisor_of(pool).accept_from(plan)
        assert not ended.is_accepting
        first, second = sorted(workers, key=lambda each: each.index)
        first.kill()
        assert (await second.frame()).kind == _protocol.ACCEPT
        await until(lambda: has_started(workers, 3))
        assert (await workers[2].frame()).kind == _protocol.ACCEPT
        plan.is_over = True


async def test_enough_twice(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A worker that says twice that it has accepted its share is replaced once."""
    async with fake_pool(monkeypatch) as (pool, workers):
        await workers[0].say(encode_frame(_protocol.ENOUGH) * 2)
        await until(lambda: has_started(workers, 2))
        await until(lambda: pool.statistics().restarts == 1)
        await workers[0].exited.wait()
        assert (pool.statistics().restarts, len(workers)) == (1, 2)


async def test_drain_after_the_successor_has_ended(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A connection that no worker has, and the next generation does not take, is rejected."""
    one, two = socket.socketpair()
    with two:
        async with fake_pool(monkeypatch, max_in_flight=1, max_queue=2) as (pool, workers):
            queue = queue_of(pool)
            await queue.reserve()
            await queue.reserve()
            fds = [os.dup(one.fileno()), one.detach()]
            put_received(pool, [(fd, EndpointKind.UNIX, b"", 0) for fd in fds])
            asked: list[int] = []

            def pass_on(fd: int, *_: object) -> bool:
                asked.append(fd)
                return False

            set_successor(pool, pass_on)
            (batch, _) = await workers[0].batch()
            await workers[0].say(taken(batch))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.drain)
                await until(lambda: pool.statistics().rejected == 1)
                assert asked == fds[1:]
                workers[0].exit(0)
        assert two.recv(1) == b""


################################################################
# The same with real workers
################################################################


async def test_scale_and_cancellation_at_the_same_time(shared: Path) -> None:
    """40 calls are cancelled, and their worker is scaled away: no acknowledged job is lost."""
    reported: list[AbandonedJob] = []
    async with open_worker_pool(DO, workers=2, on_abandoned=reported.append) as pool:
        for number in range(3):
            scope = trio.CancelScope()

            async def call_many(scope: trio.CancelScope) -> None:
                with scope:
                    async with trio.open_nursery() as nursery:
                        for _ in range(40):
                            nursery.start_soon(_call_forever, pool)

            async with submitters_of(pool) as submitters:
                submitters.nursery.start_soon(call_many, scope)
                await until(lambda number=number: len(lines(shared / "began")) == 40 * (number + 1))  # type: ignore[misc]
                scope.cancel()
                submitters.call("late", worker=1)
                submitters.nursery.start_soon(pool.scale, 1)
            late = submitters.outcomes["late"]
            assert late == b"nothing to do" or isinstance(late, JobRefusedError)
            await pool.scale(2)
        found = await at_rest(pool)
        assert (found.abandoned, found.deaths, len(reported)) == (0, 0, 0)


async def _call_forever(pool: WorkerPool) -> None:
    await pool.call(data=b"forever", worker=1)


@pytest.mark.slow
@pytest.mark.once
async def test_restart_while_groups_of_calls_time_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """20 workers are replaced while groups of 50 calls time out together: no job is abandoned."""
    monkeypatch.setenv("POOL_FOLDER", str(tmp_path))
    outcomes: dict[str, int] = {"too slow": 0}
    async with open_worker_pool(DO, workers=2) as pool:
        stop = False

        async def call_in_groups() -> None:
            while not stop:
                with trio.move_on_after(0.02) as scope:
                    async with trio.open_nursery() as nursery:
                        for _ in range(50):
                            nursery.start_soon(_call_that_waits, pool)
                outcomes["too slow"] += scope.cancelled_caught

        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(call_in_groups)
            for _ in range(10):
                await pool.restart()
            stop = True
        found = await at_rest(pool)
        assert (found.abandoned, found.rejected, found.deaths) == (0, 0, 0)
        assert found.restarts == 20
        assert outcomes["too slow"] > 0
        await until(lambda: len(pids(pool)) == 2)


async def _call_that_waits(pool: WorkerPool) -> None:
    await pool.call(data=b"forever")
