"""Slots of a pool: changes at the same time, errors that stay in one slot, and bounded starts."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.lowlevel
from trio.testing import wait_all_tasks_blocked

from tests._helpers.pool import at_rest, client_of, ended, ends, lines, null, pids, watched
from tests._helpers.processes import children_of
from tests._helpers.waiting import until
from trio_unixconn import JobRefusedError, PoolClosedError, WorkerDiedError, WorkerStartError
from trio_unixconn.pool import AbandonedJob, _process, _supervisor, open_worker_pool
from trio_unixconn.pool._handle import HandleState, WorkerHandle

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

if TYPE_CHECKING:
    from pathlib import Path

    from trio_unixconn.pool import WorkerPool

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_child_left", "unmeasured_processes")]

DO = "tests._helpers.pool_handlers:do"
HOLD = "tests._helpers.pool_handlers:hold"
NUMBER = "tests._helpers.supervisor_handlers:number"
NUMBERED = "tests._helpers.supervisor_handlers:numbered"


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start workers without a pause."""
    monkeypatch.setattr(_supervisor, "MAX_BACKOFF", 0.0)


def write(shared: Path, *names: str) -> None:
    for name in names:
        (shared / name).touch()


def states(pool: WorkerPool) -> list[str]:
    return [each.state for each in pool.statistics().workers]


################################################################
# restart(), scale() and drain() at the same time
################################################################


async def test_restart_starts_all_before_an_old_worker_leaves(shared: Path) -> None:
    """While one new worker is not ready, all old ones accept jobs and no new one does."""
    write(shared, "wait 3")
    async with open_worker_pool(NUMBER, workers=2, setup=NUMBERED) as pool:
        before = pids(pool)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.restart)
            await until(lambda: len(lines(shared / "ready")) == 3)
            await until(lambda: len(lines(shared / "started")) == 4)
            assert {await pool.call(worker=index) for index in (0, 1)} == {b"0", b"1"}
            assert (pids(pool), states(pool)) == (before, ["ready"] * 2)
            (shared / "wait 3").unlink()
        assert {await pool.call(worker=index) for index in (0, 1)} == {b"2", b"3"}
        await until(lambda: len(children_of(os.getpid())) == 2)
        assert pool.statistics().restarts == 2


async def test_restart_that_fails_half_way_keeps_all_old_workers(shared: Path) -> None:
    """If one of the new workers cannot start, those that can are ended."""
    write(shared, "wait 5", "fail 5")
    async with open_worker_pool(NUMBER, workers=3, setup=NUMBERED) as pool:
        before = pids(pool)
        async with trio.open_nursery() as nursery:

            async def restart() -> None:
                with pytest.raises(WorkerStartError, match="all old workers go on") as caught:
                    await pool.restart()
                assert "worker 5 fails" in caught.value.traceback

            nursery.start_soon(restart)
            await until(lambda: len(lines(shared / "ready")) == 5)
            (shared / "wait 5").unlink()
        assert pids(pool)[:3] == before
        await until(lambda: set(children_of(os.getpid())) == set(before))
        found = await at_rest(pool)
        assert (found.restarts, found.deaths) == (0, 0)
        await pool.restart()
        assert set(pids(pool)[:3]).isdisjoint(before)


async def test_restart_fails_if_a_new_worker_dies_while_others_start(shared: Path) -> None:
    """A new worker that was ready and died does not take the slot of an old one."""
    write(shared, "wait 3")
    async with open_worker_pool(NUMBER, workers=2, setup=NUMBERED) as pool:
        before = pids(pool)
        async with trio.open_nursery() as nursery:

            async def restart() -> None:
                with pytest.raises(WorkerStartError, match="was killed by SIGKILL"):
                    await pool.restart()

            nursery.start_soon(restart)
            alive = pool._supervisor.alive

            def new() -> list[WorkerHandle]:
                return [
                    each
                    for each in alive
                    if each.state is HandleState.READY and each.pid not in before
                ]

            await until(lambda: len(new()) == 1)
            await until(lambda: len(alive) == 4)
            new()[0].process.kill()
            await until(lambda: len(alive) == 3)
            (shared / "wait 3").unlink()
        assert pids(pool)[:2] == before


async def test_drain_during_restart_ends_both(shared: Path) -> None:
    """restart() raises PoolClosedError, and drain() returns when no process is left."""
    write(shared, "wait 1")
    async with open_worker_pool(NUMBER, workers=1, setup=NUMBERED) as pool:
        async with trio.open_nursery() as nursery:
            results: list[str] = []

            async def restart() -> None:
                with pytest.raises(PoolClosedError, match="is draining"):
                    await pool.restart()
                results.append("restart")

            nursery.start_soon(restart)
            await until(lambda: len(lines(shared / "started")) == 2)
            # This one waits for the other one to end.
            nursery.start_soon(restart)
            await wait_all_tasks_blocked()
            await pool.drain()
            assert children_of(os.getpid()) == {}
        assert results == ["restart"] * 2
        with pytest.raises(PoolClosedError):
            await pool.restart()
        with pytest.raises(PoolClosedError):
            await pool.scale(2)
        assert children_of(os.getpid()) == {}


async def test_drain_during_restart_ends_it_while_jobs_are_queued(shared: Path) -> None:
    """restart() raises when the drain begins, not when the queue is empty."""
    write(shared, "wait 1")
    async with (
        open_worker_pool(HOLD, workers=1, max_in_flight=1, setup=NUMBERED) as pool,
        trio.open_nursery() as nursery,
    ):
        second, theirs = ends()
        async with client_of(pool) as first, second.stream:
            nursery.start_soon(pool.submit, theirs)
            async with trio.open_nursery() as changes:

                async def restart() -> None:
                    with pytest.raises(PoolClosedError, match="is draining"):
                        await pool.restart()

                changes.start_soon(restart)
                await until(lambda: len(lines(shared / "started")) == 2)
                nursery.start_soon(pool.drain)
            assert pool.statistics().queued == 1
            await first.end()
            # The old worker goes on until the queue is empty.
            assert (await second.line())[1] == 2
    assert pool.statistics().handled == 2


async def test_drain_during_restart_ends_new_workers_that_are_ready(shared: Path) -> None:
    """A new worker that waits for others to be ready does not outlive the drain."""
    write(shared, "wait 3")
    async with (
        open_worker_pool(NUMBER, workers=2, setup=NUMBERED) as pool,
        trio.open_nursery() as nursery,
    ):

        async def restart() -> None:
            with pytest.raises(PoolClosedError):
                await pool.restart()

        nursery.start_soon(restart)
        ready = HandleState.READY
        alive = pool._supervisor.alive
        await until(lambda: sum(each.state is ready for each in alive) == 3)
        await until(lambda: len(alive) == 4)
        await pool.drain()
        assert children_of(os.getpid()) == {}


async def test_drain_during_scale_leaves_no_process(shared: Path) -> None:
    """drain() ends workers that are being started, and that wait for their turn to start."""
    write(shared, *(f"wait {number}" for number in range(1, 40)))
    async with (
        open_worker_pool(NUMBER, workers=1, setup=NUMBERED) as pool,
        trio.open_nursery() as nursery,
    ):

        async def scale() -> None:
            with pytest.raises(PoolClosedError):
                await pool.scale(40)

        nursery.start_soon(scale)
        await until(lambda: len(lines(shared / "started")) == 1 + _supervisor.max_starting())
        await pool.drain()
        assert children_of(os.getpid()) == {}


async def test_drain_ends_the_restart_of_a_crashed_worker(shared: Path) -> None:
    """drain() without queued jobs does not wait for a worker that replaces a dead one."""
    write(shared, "wait 1")
    async with open_worker_pool(NUMBER, workers=1, setup=NUMBERED) as pool:
        os.kill(pids(pool)[0], signal.SIGKILL)
        await until(lambda: len(lines(shared / "started")) == 2)
        await pool.drain()
        assert children_of(os.getpid()) == {}


async def test_restart_twice_at_a_time(shared: Path) -> None:
    """Two restarts happen one after the other, and both replace all workers."""
    async with open_worker_pool(NUMBER, workers=2, setup=NUMBERED) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.restart)
            nursery.start_soon(pool.restart)
        assert pool.statistics().restarts == 4
        assert {await pool.call(worker=index) for index in (0, 1)} == {b"4", b"5"}


################################################################
# Starting many
################################################################


async def test_open_worker_pool_starts_few_workers_at_a_time(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than max_starting() workers start at a time; the time of each starts on its own."""
    monkeypatch.setattr(_supervisor, "max_starting", lambda: 2)
    write(shared, *(f"wait {number}" for number in range(5)))
    async with trio.open_nursery() as nursery:
        opened: list[WorkerPool] = []

        async def run() -> None:
            async with open_worker_pool(NUMBER, workers=5, setup=NUMBERED) as pool:
                opened.append(pool)

        nursery.start_soon(run)
        for count in range(2, 6):
            await until(lambda count=count: len(lines(shared / "started")) == count)  # type: ignore[misc]
            await wait_all_tasks_blocked(0.01)
            assert len(children_of(os.getpid())) == count
            (shared / f"wait {count - 2}").unlink()
            await until(lambda count=count: len(lines(shared / "ready")) == count - 1)  # type: ignore[misc]
        (shared / "wait 4").unlink()
        await until(lambda: bool(opened))


@pytest.mark.parametrize(("cpus", "count"), [(1, 2), (2, 2), (8, 8)])
def test_max_starting(cpus: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many workers start at a time as this process can use CPUs, at least two."""
    monkeypatch.setattr(_supervisor, "available_cpus", lambda: cpus)
    assert _supervisor.max_starting() == count


async def test_open_worker_pool_starts_others_beside_one_that_waits(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is not ready for long does not keep others from starting."""
    monkeypatch.setattr(_supervisor, "max_starting", lambda: 1)
    monkeypatch.setattr(_supervisor, "START_SHARE", 0.0)
    write(shared, "wait 0", "wait 1")
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            async with open_worker_pool(NUMBER, workers=2, setup=NUMBERED) as pool:
                assert pool.statistics().restarts == 0

        nursery.start_soon(run)
        await until(lambda: len(lines(shared / "started")) == 2)
        (shared / "wait 0").unlink()
        (shared / "wait 1").unlink()


async def test_start_timeout_begins_when_the_worker_is_started(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """start_timeout does not count the time in which other workers are started."""
    monkeypatch.setattr(_supervisor, "max_starting", lambda: 1)
    async with open_worker_pool(NUMBER, workers=3, setup=NUMBERED) as pool:
        handles = [slot.handle for slot in pool._supervisor.slots]
        handles.sort(key=lambda each: each.started_at)
        began = [pool._supervisor.alive[each] for each in handles]
        for index in (1, 2):
            assert began[index] >= handles[index - 1].started_at


################################################################
# Errors stay in one slot
################################################################


async def test_on_abandoned_that_raises(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever on_abandoned raises is logged, other jobs are reported, and the pool goes on."""
    reported: list[int] = []

    def fail(job: AbandonedJob) -> None:
        reported.append(job.id)
        raise [LookupError, SystemExit, trio.TooSlowError][len(reported) % 3]

    async with open_worker_pool(DO, workers=1, on_abandoned=fail) as pool:
        for _ in range(3):
            await pool.submit(null(), data=b"forever")
        await until(lambda: len(lines(shared / "began")) == 3)
        os.kill(pids(pool)[0], signal.SIGKILL)
        await until(lambda: len(reported) == 3)
        assert await pool.call() == b"nothing to do"
        assert (await at_rest(pool)).abandoned == 3
    logged = [each for each in caplog.messages if "on_abandoned raised" in each]
    assert len(logged) == 3


async def test_on_abandoned_is_protected_from_keyboard_interrupt(shared: Path) -> None:
    """The tasks of the pool run with protection from KeyboardInterrupt."""
    protected: list[bool] = []

    def note(_: AbandonedJob) -> None:
        protected.append(trio.lowlevel.currently_ki_protected())

    async with open_worker_pool(DO, workers=1, on_abandoned=note) as pool:
        await pool.submit(null(), data=b"end")
        await until(lambda: protected == [True])


@pytest.mark.parametrize("name", ["_check_limits", "_install"])
async def test_watch_and_restart_are_protected_from_keyboard_interrupt(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch, and the task that restarts a worker, are protected, too."""
    real = getattr(_supervisor.Supervisor, name)
    protected: list[bool] = []

    def look(*arguments: Any, **options: Any) -> Any:
        protected.append(trio.lowlevel.currently_ki_protected())
        return real(*arguments, **options)

    monkeypatch.setattr(_supervisor.Supervisor, name, look)
    async with open_worker_pool(DO, workers=1) as pool:
        os.kill(pids(pool)[0], signal.SIGKILL)
        await until(lambda: bool(protected))
        assert await pool.call() == b"nothing to do"
    assert all(protected)


async def test_crash_limit_of_a_slot_that_was_scaled_away(shared: Path, no_pauses: None) -> None:
    """A slot that is scaled away while its workers cannot start does not end the pool."""
    write(shared, "fail 2", "wait 3", "fail 3")
    async with open_worker_pool(NUMBER, workers=2, setup=NUMBERED, crash_limit=3) as pool:
        os.kill(pids(pool)[1], signal.SIGKILL)
        await until(lambda: len(lines(shared / "started")) == 4)
        await pool.scale(1)
        (shared / "wait 3").unlink()
        await until(lambda: len(children_of(os.getpid())) == 1)
        assert await pool.call() in {b"0", b"1"}
        assert len(lines(shared / "started")) == 4


async def test_crash_limit_of_a_slot_that_a_drain_does_not_need(
    shared: Path, no_pauses: None
) -> None:
    """In a drain, workers that cannot start do not end the pool while others do the rest."""
    write(shared, *(f"fail {number}" for number in range(3, 99)))
    write(shared, "wait 2", "fail 2")
    rejected: list[str] = []
    async with (
        open_worker_pool(HOLD, workers=2, setup=NUMBERED, crash_limit=3, max_in_flight=1) as pool,
        trio.open_nursery() as nursery,
    ):
        pairs = [ends() for _ in range(3)]

        async def submit_pinned() -> None:
            with pytest.raises(JobRefusedError, match="worker 1 cannot be started") as caught:
                await pool.submit(null(), worker=1)
            rejected.append(str(caught.value))

        await pool.submit(pairs[0][1], worker=0)
        os.kill(pids(pool)[1], signal.SIGKILL)
        await until(lambda: len(lines(shared / "started")) == 3)
        for _, theirs in pairs[1:]:
            nursery.start_soon(pool.submit, theirs)
            await wait_all_tasks_blocked()
        nursery.start_soon(submit_pinned)
        await wait_all_tasks_blocked()
        nursery.start_soon(pool.drain)
        await wait_all_tasks_blocked()
        (shared / "wait 2").unlink()
        await until(lambda: len(rejected) == 1)
        for client, _ in pairs:
            await client.line()
            await client.end()
    found = pool.statistics()
    assert (found.handled, found.rejected, found.abandoned) == (3, 1, 0)


async def test_crash_limit_in_a_drain_without_any_worker(shared: Path, no_pauses: None) -> None:
    """In a drain with queued jobs that no worker can have, crash_limit ends the pool."""
    write(shared, *(f"fail {number}" for number in range(1, 99)))
    rejected: list[JobRefusedError] = []
    with pytest.raises(ExceptionGroup, match="3 consecutive workers crashed"):
        async with (
            open_worker_pool(NUMBER, workers=1, setup=NUMBERED, crash_limit=3) as pool,
            trio.open_nursery() as nursery,
        ):
            os.kill(pids(pool)[0], signal.SIGSTOP)

            async def submit() -> None:
                with trio.CancelScope(shield=True):
                    with pytest.raises(JobRefusedError) as caught:
                        await pool.submit(null())
                    rejected.append(caught.value)

            nursery.start_soon(submit)
            await wait_all_tasks_blocked()
            nursery.start_soon(pool.drain)
            await wait_all_tasks_blocked()
            os.kill(pids(pool)[0], signal.SIGKILL)
    assert len(rejected) == 1


async def test_unexpected_error_while_a_worker_is_restarted(
    monkeypatch: pytest.MonkeyPatch, no_pauses: None, caplog: pytest.LogCaptureFixture
) -> None:
    """An unexpected exception in the task of a slot is logged, and counts as a crash of it."""
    real, tries = _process.start, list[int]()

    def start(*arguments: Any, **options: Any) -> _process.WorkerProcess:
        tries.append(1)
        if len(tries) < 3:
            raise ZeroDivisionError("not expected")
        return real(*arguments, **options)

    async with open_worker_pool(DO, workers=2) as pool:
        other = pids(pool)[1]
        monkeypatch.setattr(_process, "start", start)
        os.kill(pids(pool)[0], signal.SIGKILL)
        await until(lambda: pool.statistics().restarts == 1)
        assert pids(pool)[1] == other
        assert len(pool._supervisor.slots[0].failures) == 3
        assert await pool.call(worker=0) == b"nothing to do"
    logged = [each for each in caplog.records if "error in the pool" in each.message]
    assert [each.exc_info is not None for each in logged] == [True, True]


async def test_unexpected_error_while_a_worker_leaves(
    shared: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An unexpected exception in the task of a worker is logged, and kills that worker only."""

    async def leave(*arguments: Any) -> None:
        raise ZeroDivisionError("not expected")

    async with open_worker_pool(HOLD, workers=2) as pool:
        with monkeypatch.context() as patch, watched([pids(pool)[1]]) as pidfds:
            patch.setattr(WorkerHandle, "leave", leave)
            async with client_of(pool, worker=1) as client:
                await client.line()
                await pool.scale(1)
                await ended(pidfds)
        async with client_of(pool) as client:
            await client.line()
    assert any("killing the worker" in each for each in caplog.messages)


async def test_unexpected_error_in_the_watch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An unexpected exception in the watch is logged, and the watch goes on."""
    calls: list[int] = []

    def memory_of(pid: int) -> int:
        calls.append(pid)
        raise ZeroDivisionError("not expected")

    monkeypatch.setattr(_supervisor, "memory_of", memory_of)
    monkeypatch.setattr(_supervisor, "TICK", 0.01)
    async with open_worker_pool(DO, workers=1, max_memory=1) as pool:
        await until(lambda: len(calls) > 2)
        assert await pool.call() == b"nothing to do"
    assert any("error in the watch" in each for each in caplog.messages)


################################################################
# crash_limit
################################################################


async def test_crash_limit_does_not_count_workers_with_jobs(no_pauses: None) -> None:
    """A job that kills its worker never ends the pool, however often it is submitted."""
    reported: list[AbandonedJob] = []
    async with open_worker_pool(DO, workers=1, crash_limit=2, on_abandoned=reported.append) as pool:
        for count in range(1, 6):
            await pool.submit(null(), data=b"end")
            await until(lambda count=count: pool.statistics().deaths == count)  # type: ignore[misc]
        assert await pool.call() == b"nothing to do"
        assert len(reported) == 5


async def test_crash_limit_counts_idle_workers_until_a_job_is_handled(no_pauses: None) -> None:
    """A job that is handled clears the crashes of a slot."""
    async with open_worker_pool(DO, workers=1, crash_limit=2) as pool:
        for count in range(1, 5):
            assert await pool.call() == b"nothing to do"
            os.kill(pids(pool)[0], signal.SIGKILL)
            await until(lambda count=count: pool.statistics().restarts == count)  # type: ignore[misc]
            assert len(pool._supervisor.slots[0].failures) == 1
    assert pool.statistics().deaths == 4


async def test_crash_limit_forgets_crashes_of_a_worker_that_lived_long(
    no_pauses: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle workers that lived for LONG_LIFE do not count together."""
    monkeypatch.setattr(_supervisor, "LONG_LIFE", 0.0)
    async with open_worker_pool(DO, workers=1, crash_limit=2) as pool:
        for count in range(1, 5):
            os.kill(pids(pool)[0], signal.SIGKILL)
            await until(lambda count=count: pool.statistics().restarts == count)  # type: ignore[misc]
        assert await pool.call() == b"nothing to do"


async def test_pauses_grow_while_jobs_kill_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause before a restart grows even if the deaths do not count."""
    monkeypatch.setattr(_supervisor, "INITIAL_BACKOFF", 0.001)
    deaths: list[int] = []
    real = _supervisor.backoff_after

    def backoff_after(count: int) -> float:
        deaths.append(count)
        return real(count)

    monkeypatch.setattr(_supervisor, "backoff_after", backoff_after)
    async with open_worker_pool(DO, workers=1) as pool:
        for _ in range(4):
            with pytest.raises(WorkerDiedError):
                await pool.call(data=b"end")
        assert await pool.call() == b"nothing to do"
        with pytest.raises(WorkerDiedError):
            await pool.call(data=b"end")
        await until(lambda: len(deaths) == 5)
    assert deaths == [1, 2, 3, 4, 1]


################################################################
# Workers that cannot serve, and SIGTERM
################################################################


async def test_worker_that_refuses_every_batch_is_replaced(
    shared: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker without a free file descriptor is logged once, and replaced after a while."""
    caplog.set_level("INFO", logger="trio_unixconn.pool")
    monkeypatch.setattr(_supervisor, "MAX_REST", 0.01)
    write(shared, "poor 0")
    async with open_worker_pool(NUMBER, workers=1, setup=NUMBERED, max_attempts=100) as pool:
        answers: list[bytes] = []

        async def call() -> None:
            answers.append(await pool.call(null()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            # Jobs without a file descriptor do not show that the worker can receive one.
            while not answers:
                await pool.call()
        assert answers == [b"1"]
        found = await at_rest(pool)
        assert (found.restarts, found.deaths, found.abandoned) == (1, 0, 0)
    said = [each for each in caplog.messages if "for want of a free file descriptor" in each]
    assert len(said) == 1
    assert any("batches in a row, replacing it" in each for each in caplog.messages)


async def test_worker_that_refuses_some_batches_is_kept(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch with a file descriptor that is acknowledged ends a row of refusals."""
    async with open_worker_pool(HOLD, workers=1) as pool:
        slot = pool._supervisor.slots[0]
        slot.refusals = 5
        with pytest.raises(Exception, match="NoneType"):
            await pool.call()
        assert slot.refusals == 5
        async with client_of(pool) as client:
            await client.line()
            assert slot.refusals == 0
        # While jobs are in flight, their file descriptors may be what is lacking.
        async with client_of(pool) as client:
            await client.line()
            slot.refusals = 50
            pool._supervisor.on_refused(slot.handle)
            assert slot.replace_reason is None
            # A worker that has left its slot does not count for the next one.
            old = slot.handle
            await pool.restart()
            pool._supervisor.on_refused(old)
            assert slot.refusals == 0


@pytest.mark.parametrize("tick", [0.05, 600.0])
async def test_sigterm_during_a_restart_that_fails(
    tick: float, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM to a worker whose slot is busy is remembered, and counts when it is not any more."""
    monkeypatch.setattr(_supervisor, "TICK", tick)
    write(shared, "wait 1", "fail 1")
    async with open_worker_pool(
        NUMBER, workers=1, setup=NUMBERED, start_timeout=6000, hang_timeout=math.inf
    ) as pool:
        before = pids(pool)
        with watched(before) as pidfds:
            async with trio.open_nursery() as nursery:

                async def restart() -> None:
                    with pytest.raises(WorkerStartError):
                        await pool.restart()

                nursery.start_soon(restart)
                await until(lambda: len(lines(shared / "started")) == 2)
                os.kill(before[0], signal.SIGTERM)
                await until(lambda: pool._supervisor.slots[0].replace_reason is not None)
                (shared / "wait 1").unlink()
            await ended(pidfds)
        assert await pool.call() == b"2"
        assert pool.statistics().deaths == 0


async def test_sigterm_to_a_new_worker_that_waits_for_others(shared: Path) -> None:
    """SIGTERM to a worker that is ready and has no slot yet is remembered until it has one."""
    write(shared, "wait 3")
    async with open_worker_pool(NUMBER, workers=2, setup=NUMBERED) as pool:
        before = pids(pool)
        supervisor = pool._supervisor
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.restart)

            def new() -> list[WorkerHandle]:
                ready = [each for each in supervisor.alive if each.state is HandleState.READY]
                return [each for each in ready if each.pid not in before]

            await until(lambda: len(new()) == 1)
            # As its handle does. A real SIGTERM could arrive before the worker handles it.
            supervisor.on_leaving(new()[0])
            (shared / "wait 3").unlink()
        await until(lambda: pool.statistics().restarts == 3)
        assert sorted([await pool.call(worker=index) for index in (0, 1)]) == [b"3", b"4"]
        assert (await at_rest(pool)).deaths == 0


async def test_sigterm_in_a_drain_changes_nothing(shared: Path) -> None:
    """SIGTERM to a worker that leaves already, or in a drain, starts no other one."""
    async with open_worker_pool(HOLD, workers=1, setup=NUMBERED, max_in_flight=1) as pool:
        first, second = ends(), ends()
        async with trio.open_nursery() as nursery:
            await pool.submit(first[1])
            nursery.start_soon(pool.submit, second[1])
            await wait_all_tasks_blocked()
            nursery.start_soon(pool.drain)
            await wait_all_tasks_blocked()
            os.kill(pids(pool)[0], signal.SIGTERM)
            await until(lambda: bool(pool._supervisor._terminated))
            for client, _ in first, second:
                await client.line()
                await client.end()
    assert lines(shared / "started") == ["0"]
    assert pool.statistics().handled == 2


################################################################
# Clocks
################################################################


@pytest.mark.parametrize("how", ["drain", "scale", "restart"])
async def test_worker_that_a_thread_keeps_alive_is_killed(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that does not exit after its last job is killed, whatever drain_timeout is."""
    monkeypatch.setattr("trio_unixconn.pool._handle.EXIT_GRACE", 0.2)
    async with open_worker_pool(
        "tests._helpers.supervisor_handlers:leave_thread",
        workers=2,
        drain_timeout=600,
        hang_timeout=0.5,
    ) as pool:
        old = pids(pool)[1]
        with watched([old]) as pidfds:
            assert await pool.call(worker=1) == b"left"
            if how == "scale":
                await pool.scale(1)
            else:
                await getattr(pool, how)()
            await ended(pidfds)
    assert not any("no heartbeat" in each for each in caplog.messages)
    said = [each for each in caplog.messages if "did not exit within 0.2 s" in each]
    assert len([each for each in said if f"(pid {old})" in each]) == 1


async def test_hang_timeout_starts_again_after_a_gap() -> None:
    """After all processes were stopped, a worker has the whole hang_timeout to say something."""
    async with open_worker_pool(DO, workers=1, hang_timeout=2) as pool:
        (pid,) = pids(pool)
        os.kill(pid, signal.SIGSTOP)
        handle = pool._supervisor.slots[0].handle
        # As if this process was stopped, too.
        time.sleep(2.5)
        stopped = trio.current_time()
        await until(lambda: handle.last_heard >= stopped)
        os.kill(pid, signal.SIGCONT)
        assert await pool.call() == b"nothing to do"
        assert pids(pool) == [pid]
        assert pool.statistics().deaths == 0


async def test_hang_timeout_kills_once(caplog: pytest.LogCaptureFixture) -> None:
    """A worker that was killed for its silence, and has not ended yet, is not killed again."""
    async with open_worker_pool(DO, workers=1, hang_timeout=3600) as pool:
        supervisor = pool._supervisor
        handle = supervisor.slots[0].handle
        handle.last_heard = -7200.0
        supervisor._check_clocks(trio.current_time())
        supervisor._check_clocks(trio.current_time())
        await until(lambda: pool.statistics().restarts == 1)
    assert len([each for each in caplog.messages if "no heartbeat for" in each]) == 1


@pytest.mark.usefixtures("default_sigint")
def test_open_worker_pool_raises_a_second_keyboard_interrupt(
    monkeypatch: pytest.MonkeyPatch, shared: Path
) -> None:
    """A second Ctrl-C does not wait for handlers that clean up."""
    monkeypatch.setattr(_supervisor, "ABORT_GRACE", 600.0)

    async def main() -> None:
        async with open_worker_pool(DO, workers=1) as pool, client_of(pool, data=b"compute") as it:
            await it.line()

            async def interrupt() -> None:
                supervisor = pool._supervisor
                await until(lambda: supervisor._shutting_down)
                await wait_all_tasks_blocked()
                signal.raise_signal(signal.SIGINT)

            trio.lowlevel.spawn_system_task(interrupt)
            signal.raise_signal(signal.SIGINT)
            await trio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)
