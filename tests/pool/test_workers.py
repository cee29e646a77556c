"""Workers that die, hang, or have no free file descriptor: each job is handled at most once."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import signal
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from trio.testing import wait_all_tasks_blocked

from tests._helpers.fds import free_descriptors
from tests._helpers.pool import (
    at_rest,
    check_sums,
    client_of,
    ended,
    ends,
    lines,
    null,
    pids,
    send_batches_by_tasks,
    watched,
)
from tests._helpers.processes import open_descriptors
from tests._helpers.waiting import counted, until
from trio_unixconn import (
    HandlerError,
    JobRefusedError,
    UnixConnection,
    WorkerDiedError,
    WorkerStartError,
    _connection,
)
from trio_unixconn.pool import AbandonedJob, _process, _supervisor, open_worker_pool
from trio_unixconn.pool._handle import HandleState

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

if TYPE_CHECKING:
    from pathlib import Path

    from trio_unixconn.pool import JobReceipt, WorkerPool
    from trio_unixconn.pool._worker_config import WorkerConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_child_left", "unmeasured_processes")]

DO = "tests._helpers.pool_handlers:do"
HOLD = "tests._helpers.pool_handlers:hold"
SOON = 1.0


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start workers without a pause."""
    monkeypatch.setattr(_supervisor, "MAX_BACKOFF", 0.0)


################################################################
# Killed
################################################################


async def test_submit_to_a_worker_that_is_killed_before_it_acknowledges(shared: Path) -> None:
    """Jobs of a worker that dies before it acknowledges them are handled once, by others."""
    async with open_worker_pool(HOLD, workers=2) as pool:
        victim, other = pids(pool)
        os.kill(victim, signal.SIGSTOP)
        receipts: list[JobReceipt] = []

        async def submit(theirs: Any) -> None:
            receipts.append(await pool.submit(theirs))

        pairs = [ends() for _ in range(8)]
        async with trio.open_nursery() as nursery:
            for _, theirs in pairs:
                nursery.start_soon(submit, theirs)
            # The stopped worker has the first one. The others go to the other worker.
            await until(lambda: len(receipts) == 7)
            assert pool.statistics().workers[0].in_flight == 1
            os.kill(victim, signal.SIGKILL)
        assert victim not in {each.pid for each in receipts}
        for client, _ in pairs:
            said = await client.line()
            assert said in [[each.pid, each.id] for each in receipts]
            await client.end()
        found = await at_rest(pool)
        assert (found.handled, found.acknowledged, found.retried) == (8, 8, 1)
        assert (found.abandoned, found.deaths) == (0, 1)
        await until(lambda: pool.statistics().restarts == 1)
        assert other in pids(pool)
    assert len(lines(shared / "began")) == 8


async def test_submit_worker_that_dies_goes_to_its_successor(shared: Path) -> None:
    """A pinned job whose worker dies before it acknowledges it goes to the next worker."""
    async with open_worker_pool(HOLD, workers=2) as pool, trio.open_nursery() as nursery:
        victim = pids(pool)[1]
        os.kill(victim, signal.SIGSTOP)
        client, theirs = ends()

        async def submit() -> None:
            client.receipt = await pool.submit(theirs, worker=1)

        nursery.start_soon(submit)
        await wait_all_tasks_blocked()
        os.kill(victim, signal.SIGKILL)
        pid, _ = await client.line()
        await until(lambda: client.receipt is not None)
        assert client.receipt is not None
        assert (client.receipt.worker, client.receipt.pid) == (1, pid)
        assert pid == pids(pool)[1] != victim
        assert [each.restarts for each in pool.statistics().workers] == [0, 1]
        await client.end()


async def test_on_abandoned_reports_what_a_killed_worker_handled(
    shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What a worker was handling when it died is reported, each job once, and nothing else."""
    reported: list[AbandonedJob] = []
    async with open_worker_pool(HOLD, workers=2, on_abandoned=reported.append) as pool:
        clients = []
        for number in range(6):
            client, theirs = ends()
            client.receipt = await pool.submit(theirs, worker=number % 2)
            await client.line()
            clients.append(client)
        victim = pids(pool)[0]
        # One of its jobs is finished before.
        done = next(each for each in clients if each.receipt and each.receipt.pid == victim)
        await done.end()
        await until(lambda: pool.statistics().handled == 1)
        os.kill(victim, signal.SIGKILL)
        due = {
            AbandonedJob(each.receipt.id, 0, victim)
            for each in clients
            if each is not done and each.receipt is not None and each.receipt.pid == victim
        }
        assert len(due) == 2
        await until(lambda: len(reported) >= len(due))
        for client in clients:
            if client is not done:
                await client.end()
        found = await at_rest(pool)
        assert found.abandoned == len(due)
        assert found.handled == 6 - len(due)
        assert len(reported) == len(due)
        assert set(reported) == due
    said = [each for each in caplog.messages if "was abandoned" in each]
    assert len(said) == len(due)
    assert all("was killed by SIGKILL" in each for each in said)
    assert any("worker 0" in each and "another one is started" in each for each in caplog.messages)


async def test_on_abandoned_does_not_report_finished_jobs(shared: Path) -> None:
    """A job that was finished when its worker died, but not reported, was not abandoned."""
    reported: list[AbandonedJob] = []
    async with open_worker_pool(DO, workers=1, on_abandoned=reported.append) as pool:
        await pool.submit(null(), data=b"finish and die")
        await until(lambda: pool.statistics().deaths == 1)
        found = await at_rest(pool)
        assert (found.handled, found.abandoned, reported) == (1, 0, [])


async def test_submit_while_workers_are_killed_at_random() -> None:
    """Each job is handled or abandoned, whenever its worker is killed; none is both."""
    reported: list[AbandonedJob] = []
    receipts: dict[int, JobReceipt] = {}
    told: dict[int, bytes] = {}

    async def client(number: int) -> None:
        mine, theirs = ends()
        async with mine.stream:
            receipt = await pool.submit(theirs, data=b"%d" % number)
            receipts[receipt.id] = receipt
            try:
                told[receipt.id] = await mine.read()
            except trio.BrokenResourceError:
                told[receipt.id] = b""

    async with open_worker_pool(
        "tests._helpers.pool_handlers:tell",
        workers=2,
        crash_limit=1000,
        # A job can be unlucky as often as a worker is killed.
        max_attempts=1000,
        on_abandoned=reported.append,
    ) as pool:
        deaths = 0
        async with trio.open_nursery() as nursery:
            for number in range(400):
                nursery.start_soon(client, number)
                victim = pool._supervisor.slots[number // 20 % 2].handle
                if number % 20 == 0 and victim.state is HandleState.READY:
                    # Not os.kill: the process may have been reaped.
                    victim.process.kill()
                    deaths += 1
                await trio.lowlevel.checkpoint()
        found = await at_rest(pool)
    assert deaths > 1
    assert len(receipts) == found.acknowledged == 400
    abandoned = {each.id for each in reported}
    assert len(reported) == len(abandoned) == found.abandoned
    assert {each for each, text in told.items() if not text} <= abandoned
    assert found.handled == 400 - len(abandoned)


async def test_on_abandoned_that_raises(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An exception out of on_abandoned is logged; the other jobs are reported, the pool goes on."""
    reported: list[int] = []

    def fail(job: AbandonedJob) -> None:
        reported.append(job.id)
        raise LookupError(f"about job {job.id}")

    with trio.fail_after(30):
        async with open_worker_pool(DO, workers=1, on_abandoned=fail) as pool:
            await pool.submit(null(), data=b"forever")
            await pool.submit(null(), data=b"forever")
            await until(lambda: len(lines(shared / "began")) == 2)
            os.kill(pids(pool)[0], signal.SIGKILL)
            await until(lambda: len(reported) == 2)
            assert await pool.call() == b"nothing to do"
    assert reported == [1, 2]
    assert "on_abandoned raised an exception for job 1" in caplog.text


async def test_submit_with_handler_that_exits(shared: Path) -> None:
    """SystemExit out of a handler is the failure of its job; its worker and other jobs go on."""
    async with open_worker_pool(DO, workers=1) as pool:
        before = pids(pool)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(pool.call, data=b"forever"))
            await until(lambda: len(lines(shared / "began")) == 1)
            await pool.submit(null(), data=b"exit")
            await until(lambda: pool.statistics().failed == 1)
            with pytest.raises(HandlerError) as caught:
                await pool.call(data=b"exit")
            assert "SystemExit: 3" in caught.value.traceback
            assert lines(shared / "ended") == []
            nursery.cancel_scope.cancel()
        found = await at_rest(pool)
        assert (found.deaths, found.abandoned, pids(pool)) == (0, 0, before)


################################################################
# Without descriptors
################################################################


async def test_submit_to_one_worker_without_free_descriptors(shared: Path) -> None:
    """A worker that cannot receive a file descriptor refuses the job; another one gets it."""
    async with open_worker_pool(
        HOLD, workers=2, setup="tests._helpers.pool_handlers:one_is_poor"
    ) as pool:
        poor = {each.index: each.pid for each in pool.statistics().workers}
        before = {pid: open_descriptors(pid) for pid in poor.values()}
        receipts = []
        for _ in range(4):
            async with client_of(pool) as client:
                assert client.receipt is not None
                assert await client.line() == [client.receipt.pid, client.receipt.id]
                receipts.append(client.receipt)
        assert len({each.pid for each in receipts}) == 1
        found = await at_rest(pool)
        assert found.retried >= 1
        assert (found.handled, found.deaths) == (4, 0)
        refusals = {each.pid: each.refusals for each in found.workers}
        assert refusals.pop(receipts[0].pid) == 0
        assert sum(refusals.values()) == found.retried
        assert {pid: open_descriptors(pid) for pid in poor.values()} == before
        # A job without a file descriptor needs none in the worker.
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(call_nothing, pool)


async def call_nothing(pool: WorkerPool) -> None:
    # Its handler fails where it needs a stream, or a file descriptor to write a file.
    with pytest.raises(HandlerError, match=r"NoneType|Errno 24"):
        await pool.call()


async def test_submit_to_workers_without_free_descriptors(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that max_attempts workers could not receive is rejected, with the reason."""
    monkeypatch.setattr(_supervisor, "MAX_REFUSALS", 2)
    monkeypatch.setattr(_supervisor, "MAX_REST", 0.01)
    async with open_worker_pool(
        HOLD, workers=1, setup="tests._helpers.pool_handlers:destitute", max_attempts=3
    ) as pool:
        first = pids(pool)
        client, theirs = ends()
        with pytest.raises(JobRefusedError, match="not accepted after 3 attempts") as caught:
            await pool.submit(theirs)
        assert isinstance(caught.value.__cause__, WorkerDiedError)
        assert "had no free file descriptor to receive it" in str(caught.value.__cause__)
        assert await client.read() == b""
        await client.end()
        found = await at_rest(pool)
        assert (found.rejected, found.acknowledged) == (1, 0)
        assert found.restarts >= 2
        assert pids(pool) != first
    assert lines(shared / "began") == []


async def test_submit_to_a_worker_that_refuses_a_job_again_and_again(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker is one attempt, even if it refuses a job many times before it is replaced."""
    monkeypatch.setattr(_supervisor, "MAX_REST", 0.01)
    async with open_worker_pool(
        HOLD, workers=1, setup="tests._helpers.pool_handlers:one_is_poor", max_attempts=2
    ) as pool:
        async with client_of(pool) as client:
            assert client.receipt is not None
            assert await client.line() == [client.receipt.pid, client.receipt.id]
        found = await at_rest(pool)
        assert (found.rejected, found.handled, found.restarts) == (0, 1, 1)
        assert found.retried >= _supervisor.MAX_REFUSALS


async def test_call_with_one_free_descriptor_in_the_worker(shared: Path) -> None:
    """Many jobs go through a worker with one free file descriptor, one after the other."""
    async with (
        open_worker_pool(
            DO, workers=1, setup="tests._helpers.pool_handlers:poor", max_attempts=50
        ) as pool,
        trio.open_nursery() as nursery,
    ):
        for _ in range(8):
            nursery.start_soon(pool.call, null())
        with trio.fail_after(60):
            await until(lambda: pool.statistics().handled == 8)
        check_sums(pool.statistics())
        assert pool.statistics().deaths == 0


async def test_restart_of_a_worker_without_free_descriptors_here(
    monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    """A pool reserves the file descriptors of a new worker; without them it retries."""
    async with open_worker_pool(DO, workers=1, crash_limit=2) as pool:
        with free_descriptors(0):
            os.kill(pids(pool)[0], signal.SIGKILL)
            assert await pool.call() == b"nothing to do"
        tries = counted(monkeypatch, _process, "start")
        pool._supervisor._reserve.close()
        with free_descriptors(0):
            os.kill(pids(pool)[0], signal.SIGKILL)
            await until(lambda: len(tries) > 3)
        assert await pool.call() == b"nothing to do"


async def test_crash_limit_does_not_count_a_lack_of_memory(
    monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    """What this process lacks for a new worker does not count as a crash, however often."""
    real, tries = _process.start, list[int]()

    def start(config: WorkerConfig) -> _process.WorkerProcess:
        tries.append(1)
        if len(tries) < 5:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(config)

    async with open_worker_pool(DO, workers=1, crash_limit=2) as pool:
        monkeypatch.setattr(_process, "start", start)
        os.kill(pids(pool)[0], signal.SIGKILL)
        assert await pool.call() == b"nothing to do"
    assert len(tries) == 5


async def test_call_without_a_free_descriptor_to_send_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that cannot be sent, for want of a file descriptor, is sent later."""
    real, tries = UnixConnection.send_message, list[int]()

    async def send_message(self: UnixConnection, *arguments: Any, **options: Any) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.EMFILE, "Too many open files")
        await real(self, *arguments, **options)

    async with open_worker_pool(DO, workers=1) as pool:
        monkeypatch.setattr(UnixConnection, "send_message", send_message)
        send_batches_by_tasks(monkeypatch)
        assert await pool.call(null()) == b"nothing to do"
    assert len(tries) == 3


async def test_call_after_an_unexpected_error_while_receiving(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error in the task that reads from a worker is logged, and costs that worker only."""
    receive = _connection.receive_with_fds
    failures = iter([ZeroDivisionError("not expected")])

    async def receive_with_fds(
        conn: UnixConnection, max_bytes: int
    ) -> tuple[bytes, list[int] | None]:
        received = await receive(conn, max_bytes)
        for failure in failures:
            raise failure
        return received

    async with open_worker_pool(DO, workers=1) as pool:
        first = pids(pool)
        monkeypatch.setattr("trio_unixconn.pool._handle.receive_with_fds", receive_with_fds)
        # It is retried, unless the worker has noted that it began.
        with contextlib.suppress(WorkerDiedError):
            assert await pool.call(data=b"") == b"nothing to do"
        await until(lambda: pool.statistics().deaths == 1 and pids(pool) != first)
        assert await pool.call(data=b"") == b"nothing to do"
    assert "error in the pool, killing it" in caplog.text
    assert "not expected" in caplog.text


async def test_call_after_an_unexpected_error_of_the_pool(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that the pool does not expect is logged, and costs the worker; the pool goes on."""
    send = UnixConnection.send_message
    failures = iter([OSError(errno.EINVAL, "Invalid argument")])

    async def send_message(self: UnixConnection, *arguments: Any, **options: Any) -> None:
        for failure in failures:
            raise failure
        await send(self, *arguments, **options)

    async with open_worker_pool(DO, workers=1) as pool:
        monkeypatch.setattr(UnixConnection, "send_message", send_message)
        send_batches_by_tasks(monkeypatch)
        assert await pool.call(data=b"") == b"nothing to do"
        assert (pool.statistics().deaths, pool.statistics().retried) == (1, 1)
    assert "error in the pool, killing it" in caplog.text
    assert "Invalid argument" in caplog.text


################################################################
# Hanging, and talking nonsense
################################################################


async def test_hang_timeout_kills_a_stopped_worker(
    shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker without a heartbeat is killed; another one handles its unacknowledged jobs."""
    async with open_worker_pool(HOLD, workers=1, hang_timeout=SOON) as pool:
        (pid,) = pids(pool)
        with watched([pid]) as pidfds:
            os.kill(pid, signal.SIGSTOP)
            async with client_of(pool) as client:
                assert (await client.line())[0] != pid
            await ended(pidfds)
        found = await at_rest(pool)
        assert (found.handled, found.retried, found.deaths) == (1, 1, 1)
    assert any("no heartbeat for" in each for each in caplog.messages)
    assert any(f"(pid {pid}) hung for" in each for each in caplog.messages)


async def test_hang_timeout_kills_a_worker_that_computes(shared: Path) -> None:
    """A handler without a checkpoint is a hang: its job is reported as abandoned."""
    reported: list[AbandonedJob] = []
    async with open_worker_pool(
        DO, workers=1, on_abandoned=reported.append, hang_timeout=SOON
    ) as pool:
        (pid,) = pids(pool)
        async with client_of(pool, data=b"compute") as client:
            assert await client.line() == [pid, 1]
            assert await client.read() == b""
        assert await pool.call() == b"nothing to do"
        assert reported == [AbandonedJob(1, 0, pid, data=b"compute")]


async def test_hang_timeout_infinite() -> None:
    """With an infinite hang_timeout no worker is killed for its silence."""
    async with open_worker_pool(DO, workers=1, hang_timeout=math.inf) as pool:
        assert await pool.call() == b"nothing to do"


async def test_hang_timeout_while_the_pool_itself_was_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the pool's process was stopped, it reads what its workers sent first."""
    async with open_worker_pool(DO, workers=2, hang_timeout=0.2) as pool:
        before = pids(pool)
        # As if this process had been suspended.
        real, slept = trio.sleep, list[float]()

        async def sleep(seconds: float) -> None:
            await real(seconds)
            if seconds == pytest.approx(0.04) and len(slept) < 3:
                slept.append(seconds)
                time.sleep(0.4)

        monkeypatch.setattr(trio, "sleep", sleep)
        await until(lambda: len(slept) == 3)
        assert await pool.call() == b"nothing to do"
        assert pids(pool) == before


@pytest.mark.parametrize("what", [b"nonsense", b"strange batch", b"strange answer"])
async def test_call_of_a_worker_that_violates_the_protocol(what: bytes) -> None:
    """A worker that sends a frame that the protocol does not allow is killed and replaced."""
    async with open_worker_pool(DO, workers=1) as pool:
        with pytest.raises(WorkerDiedError, match=r"violated the protocol .* killed by"):
            await pool.call(data=what)
        assert await pool.call() == b"nothing to do"


async def test_call_of_a_worker_that_stops_receiving(shared: Path) -> None:
    """A job that cannot be sent to its worker is sent to another one."""
    async with open_worker_pool(DO, workers=1) as pool:
        (pid,) = pids(pool)
        await pool.submit(null(), data=b"turn deaf")
        await until(lambda: pool._supervisor.slots[0].handle._wants_more)
        (shared / "stop receiving").touch()
        await until((shared / "deaf").exists)
        answers: list[bytes] = []

        async def call() -> None:
            answers.append(await pool.call(data=b"pid"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            # Sending it has failed by then.
            await trio.testing.wait_all_tasks_blocked()
            (shared / "go on").touch()
        assert int(answers[0]) != pid
        found = await at_rest(pool)
        assert (found.retried, found.failed, found.deaths) == (1, 1, 1)


async def test_call_of_a_worker_that_closes_its_end() -> None:
    """A worker that closes its end and lives on is killed and replaced."""
    async with open_worker_pool(DO, workers=1, hang_timeout=SOON) as pool:
        with pytest.raises(WorkerDiedError, match="hung for"):
            await pool.call(data=b"hang up")
        assert await pool.call() == b"nothing to do"


################################################################
# Crash loops
################################################################


async def test_crash_limit_ends_the_pool(
    shared: Path, no_pauses: None, caplog: pytest.LogCaptureFixture
) -> None:
    """After crash_limit crashes in a row the pool ends, with what each worker died of."""
    refused: list[JobRefusedError] = []
    async with trio.open_nursery() as nursery:

        async def submit(pool: WorkerPool) -> None:
            with pytest.raises(JobRefusedError) as caught:
                await pool.submit(null())
            refused.append(caught.value)

        with pytest.raises(ExceptionGroup, match="3 consecutive workers crashed") as caught:
            async with open_worker_pool(
                DO, workers=1, setup="tests._helpers.pool_handlers:only_once", crash_limit=3
            ) as pool:
                os.kill(pids(pool)[0], signal.SIGKILL)
                await until(lambda: pool.statistics().workers[0].state == "starting")
                # It waits outside of the block, which does not end it.
                nursery.start_soon(submit, pool)
                await trio.sleep_forever()
        await until(lambda: bool(refused))
    kinds = [type(each) for each in caught.value.exceptions]
    assert kinds == [WorkerDiedError, WorkerStartError, WorkerStartError]
    assert "exited with status 9 before it was ready" in str(caught.value.exceptions[1])
    assert any("exited with status 9" in each for each in caplog.messages)


async def test_crash_limit_counts_workers_that_die_idle(no_pauses: None) -> None:
    """Workers that are ready and die without a job count, too."""
    with pytest.raises(ExceptionGroup, match="4 consecutive workers") as caught:
        async with open_worker_pool(
            DO, workers=2, setup="tests._helpers.pool_handlers:dies_soon", crash_limit=4
        ):
            await trio.sleep_forever()
    assert {type(each) for each in caught.value.exceptions} <= {WorkerDiedError, WorkerStartError}


async def test_crash_limit_does_not_count_workers_that_handled_jobs(
    no_pauses: None, shared: Path
) -> None:
    """Workers that handle a job before they die never end the pool."""
    async with open_worker_pool(DO, workers=1, crash_limit=2) as pool:
        for _ in range(4):
            assert await pool.call() == b"nothing to do"
            with pytest.raises(WorkerDiedError):
                await pool.call(data=b"end")
        assert pool.statistics().deaths == 4


async def test_backoff_after_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause before a worker is started grows with consecutive deaths, up to a limit."""
    pauses = [_supervisor.backoff_after(deaths) for deaths in range(2000)]
    assert pauses[:6] == [0.0, 0.0, 0.05, 0.1, 0.2, 0.4]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 10


async def test_open_worker_pool_logs_nothing_if_all_is_well(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A pool without problems logs nothing at INFO or above."""
    with caplog.at_level(logging.INFO, logger="trio_unixconn.pool"):
        async with open_worker_pool(DO, workers=1) as pool:
            await pool.call()
    assert caplog.messages == []
