"""drain(), restart(), scale(), signals, and the end of a pool."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio
import trio.lowlevel
from trio.testing import wait_all_tasks_blocked

from tests._helpers.environment import environment
from tests._helpers.pool import (
    at_rest,
    check_sums,
    client_of,
    ended,
    ends,
    lines,
    null,
    pids,
    watched,
)
from tests._helpers.processes import children_of, has_ended, program
from tests._helpers.waiting import counted, until
from trio_unixconn import (
    HandlerError,
    JobRefusedError,
    PoolClosedError,
    WorkerStartError,
)
from trio_unixconn.pool import (
    AbandonedJob,
    _process,
    _supervisor,
    _worker,
    open_worker_pool,
)
from trio_unixconn.pool._handle import HandleState

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio_unixconn.pool import JobReceipt, WorkerPool

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_child_left", "unmeasured_processes")]

DO = "tests._helpers.pool_handlers:do"
HOLD = "tests._helpers.pool_handlers:hold"


def has_restarted(pool: WorkerPool, restarts: int) -> bool:
    return pool.statistics().restarts >= restarts


################################################################
# Drain
################################################################


async def test_drain_finishes_all_jobs(shared: Path) -> None:
    """A drain rejects new jobs, lets handlers finish, and has queued jobs handled."""
    async with open_worker_pool(
        HOLD, workers=1, setup="tests._helpers.pool_handlers:noted", max_in_flight=1
    ) as pool:
        first, second = ends(), ends()
        drained = trio.Event()

        async def drain() -> None:
            await pool.drain()
            drained.set()

        async with trio.open_nursery() as nursery:
            await pool.submit(first[1])
            nursery.start_soon(pool.submit, second[1])
            await wait_all_tasks_blocked()
            nursery.start_soon(drain)
            await wait_all_tasks_blocked()
            client, theirs = ends()
            with pytest.raises(PoolClosedError, match="is draining"):
                await pool.submit(theirs)
            with pytest.raises(PoolClosedError):
                await pool.restart()
            with pytest.raises(PoolClosedError):
                await pool.scale(3)
            # The rejected socket is untouched.
            assert theirs.fileno() != -1
            theirs.close()
            await client.end()
            for other, _ in first, second:
                await other.line()
                assert not drained.is_set()
                await other.end()
            await drained.wait()
        assert children_of(os.getpid()) == {}
        found = pool.statistics()
        assert (found.handled, found.abandoned, found.deaths) == (2, 0, 0)
        check_sums(found)
        # A second drain does nothing.
        await pool.drain()
    assert len(lines(shared / "ended")) == 1


async def test_drain_timeout_cancels_handlers(shared: Path) -> None:
    """At the deadline handlers are cancelled and clean up; their callers are told."""
    async with open_worker_pool(DO, workers=2) as pool, trio.open_nursery() as nursery:
        failed: list[HandlerError] = []

        async def call() -> None:
            with pytest.raises(
                HandlerError, match="was cancelled because its worker is exiting"
            ) as caught:
                await pool.call(data=b"forever")
            failed.append(caught.value)

        for _ in range(4):
            nursery.start_soon(call)
        await until(lambda: len(lines(shared / "began")) == 4)
        await pool.drain(0.1)
        assert len(failed) == 4
        assert sorted(lines(shared / "ended")) == sorted(lines(shared / "began"))
        found = pool.statistics()
        assert (found.failed, found.abandoned) == (4, 0)
        check_sums(found)


@pytest.mark.measured
async def test_drain_twice_with_a_shorter_timeout(shared: Path) -> None:
    """A cancelled call, and a second drain with a shorter timeout, reach workers that drain."""
    async with open_worker_pool(DO, workers=1, drain_timeout=math.inf) as pool:
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def call() -> None:
                with scope:
                    await pool.call(data=b"forever")

            nursery.start_soon(call)
            await pool.submit(null(), data=b"forever")
            await until(lambda: len(lines(shared / "began")) == 2)
            nursery.start_soon(pool.drain)
            await until(lambda: pool.statistics().workers[0].state == "draining")
            scope.cancel()
            await until(lambda: len(lines(shared / "ended")) == 1)
            assert [each.state for each in pool.statistics().workers] == ["draining"]
            await pool.drain(0)
        assert sorted(lines(shared / "ended")) == ["1", "2"]
        assert pool.statistics().abandoned == 0


@pytest.mark.parametrize("timeout", [-1, math.nan])
async def test_drain_rejects_invalid_timeout(timeout: float) -> None:
    """An invalid timeout is rejected, and the pool goes on."""
    async with open_worker_pool(DO, workers=1) as pool:
        with pytest.raises(ValueError, match="timeout must be non-negative, got"):
            await pool.drain(timeout)
        assert await pool.call() == b"nothing to do"


async def test_drain_kills_a_worker_that_does_not_exit(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that does not exit in time is killed, and its jobs are reported."""
    monkeypatch.setattr("trio_unixconn.pool._handle.EXIT_GRACE", 0.2)
    reported: list[AbandonedJob] = []
    async with open_worker_pool(DO, workers=1, on_abandoned=reported.append) as pool:
        (pid,) = pids(pool)
        async with client_of(pool, data=b"compute") as client:
            await client.line()
            monkeypatch.setattr(_supervisor, "ABORT_GRACE", 0.2)
            await pool.drain(0)
    assert reported == [AbandonedJob(1, 0, pid, data=b"compute")]


async def test_drain_rejects_jobs_of_a_stopped_worker(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a drain, a job that a stopped worker was sent is rejected."""
    monkeypatch.setattr("trio_unixconn.pool._handle.EXIT_GRACE", 0.2)
    refused: list[JobRefusedError] = []
    async with open_worker_pool(DO, workers=1) as pool, trio.open_nursery() as nursery:

        async def submit() -> None:
            with pytest.raises(JobRefusedError, match="the pool ended") as caught:
                await pool.submit(null())
            refused.append(caught.value)

        os.kill(pids(pool)[0], signal.SIGSTOP)
        nursery.start_soon(submit)
        await wait_all_tasks_blocked()
        await pool.drain(0)
        await until(lambda: len(refused) == 1)
        check_sums(pool.statistics())


async def test_drain_restarts_a_worker_for_queued_jobs(shared: Path) -> None:
    """If the only worker dies during a drain, a new one handles the queued jobs."""
    async with open_worker_pool(DO, workers=1, max_in_flight=1) as pool:
        answers: list[bytes] = []
        async with trio.open_nursery() as nursery:

            async def call() -> None:
                answers.append(await pool.call())

            os.kill(pids(pool)[0], signal.SIGSTOP)
            for _ in range(3):
                nursery.start_soon(call)
            await wait_all_tasks_blocked()
            nursery.start_soon(pool.drain)
            await wait_all_tasks_blocked()
            os.kill(pids(pool)[0], signal.SIGKILL)
        assert len(answers) == 3


async def test_drain_while_max_jobs_replaces_a_worker(shared: Path) -> None:
    """A drain lets the old worker finish though its replacement is not ready; restart() is told."""
    async with (
        open_worker_pool(
            HOLD, workers=1, setup="tests._helpers.pool_handlers:waiting", max_jobs=1
        ) as pool,
        trio.open_nursery() as nursery,
    ):
        client, theirs = ends()
        await pool.submit(theirs)
        await client.line()
        await until(lambda: len(lines(shared / "waits")) == 1)
        restarted = trio.Event()

        async def restart() -> None:
            with pytest.raises(PoolClosedError):
                await pool.restart()
            restarted.set()

        nursery.start_soon(restart)
        nursery.start_soon(pool.drain)
        await until(lambda: [each.state for each in pool.statistics().workers] == ["draining"])
        (shared / "go on").touch()
        await restarted.wait()
        await until(lambda: len(children_of(os.getpid())) == 1)
        await client.stream.send_all(b"still there")
        assert await client.stream.receive_some() == b"STILL THERE"
        await client.end()
    found = pool.statistics()
    assert (found.handled, found.abandoned) == (1, 0)


async def test_scale_up_raises_when_a_drain_begins(shared: Path) -> None:
    """Workers that are not ready when a drain begins are ended, and scale() raises."""
    async with open_worker_pool(
        DO, workers=1, setup="tests._helpers.pool_handlers:waiting"
    ) as pool:
        async with trio.open_nursery() as nursery:
            told = trio.Event()

            async def scale() -> None:
                with pytest.raises(PoolClosedError):
                    await pool.scale(3)
                told.set()

            nursery.start_soon(scale)
            await until(lambda: len(lines(shared / "waits")) == 2)
            await pool.drain()
            assert children_of(os.getpid()) == {}
            await told.wait()
        assert len(pool.statistics().workers) == 1


async def test_setup_that_raises_at_its_end(capfd: pytest.CaptureFixture[str]) -> None:
    """A setup that raises while its worker exits is shown on stderr, and the pool goes on."""
    async with open_worker_pool(
        DO, workers=1, setup="tests._helpers.pool_handlers:failing_at_the_end"
    ) as pool:
        assert await pool.call() == b"nothing to do"
    assert "LookupError: the setup says no at the end" in capfd.readouterr().err


@pytest.mark.measured
async def test_setup_end_is_not_cut_off_by_sigterm(shared: Path) -> None:
    """SIGTERM while a setup ends, as systemd sends it to all processes, does not kill the worker.

    A program that the setup starts does not inherit that.
    """
    async with open_worker_pool(
        DO, workers=1, setup="tests._helpers.pool_handlers:slow_at_the_end"
    ) as pool:
        (pid,) = pids(pool)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.drain)
            await until(lambda: lines(shared / "ending") == [str(pid)])
            for _ in range(3):
                os.kill(pid, signal.SIGTERM)
            (shared / "go on").touch()
    (ignored,) = lines(shared / "ended")
    assert int(ignored, 16) >> (signal.SIGTERM - 1) & 1 == 0


################################################################
# The end of the block of open_worker_pool()
################################################################


async def test_open_worker_pool_left_by_an_exception(shared: Path) -> None:
    """An exception ends the workers, whose handlers clean up, and is raised unchanged."""
    error = KeyError("of the block")
    with pytest.raises(KeyError) as caught:
        async with open_worker_pool(
            DO, workers=2, setup="tests._helpers.pool_handlers:noted"
        ) as pool:
            await pool.submit(null(), data=b"forever")
            await until(lambda: "1" in lines(shared / "began"))
            raise error
    assert caught.value is error
    assert "1" in lines(shared / "ended")
    assert len(lines(shared / "ended")) == 3
    with pytest.raises(PoolClosedError):
        await pool.submit(0)


async def test_open_worker_pool_left_by_a_cancellation(shared: Path) -> None:
    """A cancellation ends the workers, whatever they do, and stays a cancellation."""
    with trio.CancelScope() as scope:
        async with open_worker_pool(DO, workers=2) as pool:
            await pool.submit(null(), data=b"forever")
            await until(lambda: lines(shared / "began") == ["1"])
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert lines(shared / "ended") == ["1"]


async def test_open_worker_pool_left_while_a_handler_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A handler without a checkpoint does not delay the end of the block."""
    monkeypatch.setattr(_supervisor, "ABORT_GRACE", 0.1)
    with pytest.raises(ZeroDivisionError):
        async with (
            open_worker_pool(DO, workers=1) as pool,
            client_of(pool, data=b"compute") as client,
        ):
            await client.line()
            raise ZeroDivisionError


async def test_open_worker_pool_cancelled_during_its_drain(shared: Path) -> None:
    """The drain at the end of the block can be cancelled; then handlers are cancelled, too."""
    with trio.CancelScope() as scope:
        async with open_worker_pool(DO, workers=1) as pool:
            await pool.submit(null(), data=b"forever")
            await until(lambda: lines(shared / "began") == ["1"])
            scope.deadline = trio.current_time() + 0.1
    assert scope.cancelled_caught


async def test_submit_outside_of_the_block_of_the_pool(shared: Path) -> None:
    """A task that waits for a job outside of the block gets an error when the pool has ended."""
    async with trio.open_nursery() as nursery:
        told: list[str] = []

        async def submit(pool: WorkerPool) -> None:
            try:
                await pool.submit(null())
            except (JobRefusedError, PoolClosedError) as exc:
                told.append(type(exc).__name__)

        with pytest.raises(ZeroDivisionError):
            async with open_worker_pool(HOLD, workers=1, max_in_flight=1, max_queue=2) as pool:
                os.kill(pids(pool)[0], signal.SIGSTOP)
                for _ in range(5):
                    nursery.start_soon(submit, pool)
                await wait_all_tasks_blocked()
                raise ZeroDivisionError
        await until(lambda: len(told) == 5)
        assert told == ["JobRefusedError"] * 5


################################################################
# Restart
################################################################


MODULE = """
async def handler(stream, job):
    return b"version {version}"
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of a module, which a test can change."""
    monkeypatch.syspath_prepend(tmp_path)
    # Two versions that are written in one second have the same time.
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    path = tmp_path / "pool_versions.py"
    path.write_text(MODULE.format(version=1))
    return path


async def test_restart_imports_the_handler_again(module: Path) -> None:
    """A restart replaces all workers with ones that import the present handler."""
    async with open_worker_pool("pool_versions:handler", workers=2) as pool:
        old = pids(pool)
        assert await pool.call(worker=1) == b"version 1"
        module.write_text(MODULE.format(version=2))
        with watched(old) as pidfds:
            await pool.restart()
            for to in 0, 1:
                assert await pool.call(worker=to) == b"version 2"
            await ended(pidfds)
        found = await at_rest(pool)
        assert (found.restarts, found.deaths) == (2, 0)
        assert [each.restarts for each in found.workers[:2]] == [1, 1]
        assert not set(old) & {each.pid for each in found.workers[:2]}


async def test_restart_under_load(shared: Path) -> None:
    """No job is lost, rejected or handled twice while workers are replaced."""
    receipts: list[JobReceipt] = []
    over = trio.Event()

    async def work() -> None:
        while not over.is_set():
            async with client_of(pool) as client:
                assert client.receipt is not None
                assert await client.line() == [client.receipt.pid, client.receipt.id]
                receipts.append(client.receipt)

    async with open_worker_pool(HOLD, workers=2) as pool:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(work)
            for _ in range(3):
                await pool.restart()
            over.set()
        found = await at_rest(pool)
        assert found.handled == found.submitted == len(receipts)
        assert (found.abandoned, found.retried, found.deaths, found.restarts) == (0, 0, 0, 6)
    assert len(lines(shared / "began")) == len(set(lines(shared / "began"))) == len(receipts)


async def test_restart_lets_old_workers_finish(shared: Path) -> None:
    """A connection of an old worker is not cut off, however long it takes."""
    async with open_worker_pool(HOLD, workers=1) as pool, client_of(pool) as client:
        (old,) = pids(pool)
        assert await client.line() == [old, 1]
        with watched([old]) as pidfds:
            await pool.restart()
            found = pool.statistics()
            assert [each.state for each in found.workers] == ["ready", "draining"]
            assert [each.index for each in found.workers] == [0, 0]
            assert found.workers[1].pid == old
            await client.stream.send_all(b"x")
            assert await client.stream.receive_some(1) == b"X"
            assert not has_ended(pidfds[0])
            await client.end()
            await ended(pidfds)


async def test_restart_that_fails_keeps_old_workers(module: Path) -> None:
    """If a new worker cannot start, the old ones go on."""
    async with open_worker_pool("pool_versions:handler", workers=2) as pool:
        before = pids(pool)
        module.write_text("1 / 0")
        with pytest.raises(WorkerStartError, match="ZeroDivisionError"):
            await pool.restart()
        assert pids(pool) == before
        for to in 0, 1:
            assert await pool.call(worker=to) == b"version 1"
        module.write_text(MODULE.format(version=2))
        await pool.restart()
        assert await pool.call() == b"version 2"


async def test_restart_replaces_a_worker_that_is_starting(shared: Path, module: Path) -> None:
    """A worker that is being started may have the old code, so it is replaced, too."""
    async with (
        open_worker_pool(
            "pool_versions:handler", workers=1, setup="tests._helpers.pool_handlers:waiting"
        ) as pool,
        trio.open_nursery() as nursery,
    ):
        os.kill(pids(pool)[0], signal.SIGKILL)
        await until(lambda: len(lines(shared / "waits")) == 1)
        module.write_text(MODULE.format(version=2))
        nursery.start_soon(pool.restart)
        await wait_all_tasks_blocked()
        (shared / "go on").touch()
        await until(lambda: has_restarted(pool, 2))
        assert await pool.call() == b"version 2"


async def test_restart_that_fails_after_the_old_worker_died(shared: Path, module: Path) -> None:
    """A worker that dies while its successor fails to start is restarted all the same."""
    async with open_worker_pool(
        "pool_versions:handler", workers=1, setup="tests._helpers.pool_handlers:waiting"
    ) as pool:
        async with trio.open_nursery() as nursery:

            async def restart() -> None:
                with pytest.raises(WorkerStartError):
                    await pool.restart()

            nursery.start_soon(restart)
            await until(lambda: len(lines(shared / "waits")) == 1)
            os.kill(pids(pool)[0], signal.SIGKILL)
            await until(lambda: pool.statistics().deaths == 1)
            os.kill(int(lines(shared / "waits")[0]), signal.SIGKILL)
        (shared / "go on").touch()
        assert await pool.call() == b"version 1"


async def test_restart_that_is_cancelled(shared: Path) -> None:
    """A cancelled restart keeps the old worker, and ends the new one."""
    async with open_worker_pool(
        DO, workers=1, setup="tests._helpers.pool_handlers:waiting"
    ) as pool:
        before = pids(pool)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.restart)
                await until(lambda: len(lines(shared / "waits")) == 1)
                scope.cancel()
        await until(lambda: set(children_of(os.getpid())) == set(before))
        assert await pool.call() == b"nothing to do"


################################################################
# Scale
################################################################


async def test_scale_up_and_down(shared: Path) -> None:
    """A pool grows and shrinks; workers that leave finish their jobs."""
    async with open_worker_pool(HOLD, workers=1) as pool:
        (first,) = pids(pool)
        await pool.scale(3)
        assert [each.index for each in pool.statistics().workers] == [0, 1, 2]
        async with client_of(pool, worker=2) as client:
            pid, _ = await client.line()
            await pool.scale(1)
            found = pool.statistics()
            assert [each.state for each in found.workers if each.pid in {first, pid}] == [
                "ready",
                "draining",
            ]
            await client.stream.send_all(b"x")
            assert await client.stream.receive_some(1) == b"X"
            with pytest.raises(ValueError, match="worker must be the index of a worker, below 1"):
                await pool.submit(0, worker=1)
        await until(lambda: set(children_of(os.getpid())) == {first})
        assert (await at_rest(pool)).deaths == 0
        with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
            await pool.scale(0)
        with pytest.raises(TypeError, match="workers must be an int, got bool"):
            await pool.scale(True)
        with pytest.raises(TypeError, match="workers must be an int, got str"):
            await pool.scale(cast("int", "2"))
        await until(lambda: pids(pool) == [first])


async def test_scale_that_fails(shared: Path) -> None:
    """If new workers cannot start, or some of them, there are as many as before."""
    async with open_worker_pool(
        DO, workers=1, setup="tests._helpers.pool_handlers:two_at_most"
    ) as pool:
        before = pids(pool)
        with pytest.raises(WorkerStartError):
            await pool.scale(5)
        await until(lambda: set(children_of(os.getpid())) == set(before) and pids(pool) == before)


async def test_scale_that_is_cancelled(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled scale leaves no worker without a slot."""
    monkeypatch.setattr(_supervisor, "max_starting", lambda: 8)
    async with open_worker_pool(
        DO, workers=1, setup="tests._helpers.pool_handlers:two_are_ready"
    ) as pool:
        before = pids(pool)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.scale, 5)
                await until(lambda: len(lines(shared / "waits")) == 3)
                await until(lambda: len(lines(shared / "ready")) == 2)
                scope.cancel()
        await until(lambda: set(children_of(os.getpid())) == set(before))


async def test_scale_up_while_a_new_worker_dies(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new worker that dies before all new ones are ready is restarted, and counted."""
    monkeypatch.setattr(_supervisor, "max_starting", lambda: 8)
    async with open_worker_pool(
        DO, workers=1, setup="tests._helpers.pool_handlers:two_are_ready"
    ) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.scale, 3)
            await until(lambda: len(lines(shared / "waits")) == 1)
            await until(lambda: len(lines(shared / "ready")) == 2)
            with watched([int(lines(shared / "ready")[1])]) as pidfds:
                alive = pool._supervisor.alive
                await until(lambda: len(alive) == 3)
                await until(lambda: sum(each.state is HandleState.READY for each in alive) == 2)
                os.kill(int(lines(shared / "ready")[1]), signal.SIGKILL)
                await ended(pidfds)
            await until(lambda: len(pool._supervisor.alive) == 2)
            (shared / "go on").touch()
        for to in range(3):
            assert await pool.call(worker=to) == b"nothing to do"
        assert pool.statistics().deaths == 1


async def test_drain_ends_a_worker_that_is_starting(shared: Path) -> None:
    """A worker that is not ready when the drain has no queued job is ended."""
    async with open_worker_pool(
        HOLD, workers=1, setup="tests._helpers.pool_handlers:waiting"
    ) as pool:
        (shared / "go on").touch()
        await pool.scale(2)
        (shared / "go on").unlink()
        first, second = pids(pool)
        async with client_of(pool, worker=0) as client, trio.open_nursery() as nursery:
            await client.line()
            os.kill(second, signal.SIGKILL)
            await until(lambda: len(lines(shared / "waits")) == 2)
            nursery.start_soon(pool.drain)
            await until(lambda: pool.statistics().workers[0].state == "draining")
            (shared / "go on").touch()
            await until(lambda: set(children_of(os.getpid())) == {first})
            await client.end()


@pytest.mark.measured
async def test_scale_down_a_worker_without_free_descriptors(shared: Path) -> None:
    """A worker that refuses a job while it leaves is not waited for; the job is rejected."""
    async with open_worker_pool(
        DO, workers=2, setup="tests._helpers.pool_handlers:destitute"
    ) as pool:
        async with trio.open_nursery() as nursery:
            victim = pids(pool)[1]
            os.kill(victim, signal.SIGSTOP)

            async def submit() -> None:
                with pytest.raises(JobRefusedError, match="there is no worker 1"):
                    await pool.submit(null(), worker=1)

            nursery.start_soon(submit)
            await wait_all_tasks_blocked()
            await pool.scale(1)
            os.kill(victim, signal.SIGCONT)
        check_sums(await at_rest(pool))


async def test_scale_down_rejects_pinned_jobs(shared: Path) -> None:
    """Jobs that are pinned to a worker that leaves are rejected, wherever they are."""
    refused: list[str] = []
    async with (
        open_worker_pool(HOLD, workers=2, max_in_flight=1, max_queue=2) as pool,
        trio.open_nursery() as nursery,
    ):

        async def submit(theirs: Any) -> None:
            with pytest.raises(JobRefusedError, match="there is no worker 1") as caught:
                await pool.submit(theirs, worker=1)
            refused.append(str(caught.value))

        pairs = [ends() for _ in range(4)]
        victim = pids(pool)[1]
        os.kill(victim, signal.SIGSTOP)
        for _, theirs in pairs:
            # One is sent, two are queued, one waits for a slot in the queue.
            nursery.start_soon(submit, theirs)
            await wait_all_tasks_blocked()
        await pool.scale(1)
        await until(lambda: len(refused) == 3)
        os.kill(victim, signal.SIGKILL)
        await until(lambda: len(refused) == 4)
        for client, _ in pairs:
            assert await client.read() == b""
            await client.end()
        check_sums(await at_rest(pool))


async def test_scale_down_ends_a_worker_that_is_starting(shared: Path) -> None:
    """A worker that is being started for a slot is ended when the slot is scaled away."""
    async with open_worker_pool(
        DO, workers=1, setup="tests._helpers.pool_handlers:waiting"
    ) as pool:
        (shared / "go on").touch()
        await pool.scale(2)
        (shared / "go on").unlink()
        (first, second) = pids(pool)
        os.kill(second, signal.SIGKILL)
        await until(lambda: len(lines(shared / "waits")) == 2)
        await pool.scale(1)
        (shared / "go on").touch()
        await until(lambda: set(children_of(os.getpid())) == {first} and pids(pool) == [first])


async def test_scale_down_during_a_pause_before_a_restart(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker is started for a slot that is scaled away."""
    monkeypatch.setattr(_supervisor, "INITIAL_BACKOFF", 0.3)
    async with open_worker_pool(DO, workers=2) as pool:
        # The second restart in a row begins with a pause.
        pool._supervisor.slots[1].deaths = 1
        os.kill(pids(pool)[1], signal.SIGKILL)
        await until(lambda: pool.statistics().deaths == 1)
        starts = counted(monkeypatch, _process, "start")
        await pool.scale(1)
        slot = pool._supervisor.slots[0]
        assert await pool.call() == b"nothing to do"
        await trio.lowlevel.checkpoint()
        await until(lambda: not restarting_tasks())
        assert starts == []
        assert pool._supervisor.slots == [slot]


def restarting_tasks() -> list[str]:
    """Return the names of the tasks that restart workers."""
    found: list[str] = []

    def look(task: trio.lowlevel.Task) -> None:
        if task.name.startswith("trio_unixconn.pool restart"):
            found.append(task.name)
        for nursery in task.child_nurseries:
            for child in nursery.child_tasks:
                look(child)

    root = trio.lowlevel.current_root_task()
    assert root is not None
    look(root)
    return found


################################################################
# Signals
################################################################


async def test_sigterm_to_a_worker_replaces_it(
    shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that gets SIGTERM is replaced first, and finishes its jobs."""
    caplog.set_level("INFO", logger="trio_unixconn.pool")
    async with open_worker_pool(HOLD, workers=1) as pool, client_of(pool) as client:
        (old,) = pids(pool)
        await client.line()
        with watched([old]) as pidfds:
            for _ in range(3):
                os.kill(old, signal.SIGTERM)
            await until(lambda: has_restarted(pool, 1))
            async with client_of(pool) as other:
                assert (await other.line())[0] != old
            os.kill(old, signal.SIGTERM)
            await client.stream.send_all(b"x")
            assert await client.stream.receive_some(1) == b"X"
            assert not has_ended(pidfds[0])
            await client.end()
            await ended(pidfds)
        found = await at_rest(pool)
        assert (found.deaths, found.abandoned, found.handled) == (0, 0, 2)
        assert found.restarts == 1
    assert any("received SIGTERM, replacing it" in each for each in caplog.messages)


@pytest.mark.measured
async def test_sigint_to_a_worker_is_ignored() -> None:
    """SIGINT of a terminal does not reach the workers, which have their own session."""
    async with open_worker_pool(DO, workers=1) as pool:
        (pid,) = pids(pool)
        os.kill(pid, signal.SIGINT)
        assert await pool.call(data=b"signal itself") == b"lives"
        assert pids(pool) == [pid]
        assert os.getsid(pid) == pid != os.getsid(0)


def interrupted() -> None:
    async def main() -> None:
        async with open_worker_pool(DO, workers=1) as pool:
            assert await pool.call() == b"nothing to do"
            signal.raise_signal(signal.SIGINT)
            await trio.sleep_forever()

    trio.run(main)


@pytest.mark.usefixtures("default_sigint")
def test_open_worker_pool_raises_keyboard_interrupt() -> None:
    """KeyboardInterrupt in the pool's process ends the workers, and is raised."""
    with pytest.raises(KeyboardInterrupt):
        interrupted()


################################################################
# The pool's process dies
################################################################


@attrs.define
class Driver:
    """The process of a pool, and its workers."""

    process: trio.Process
    workers: list[int] = attrs.field(factory=list[int])

    async def read_line(self) -> str:
        assert self.process.stdout is not None
        said = b""
        with trio.fail_after(60):
            while not said.endswith(b"\n"):
                more = await self.process.stdout.receive_some()
                assert more
                said += more
        return said.decode()


@asynccontextmanager
async def driver(*arguments: str) -> AsyncGenerator[Driver, None]:
    """Start the process of a pool, whose workers have a job each."""
    process = await trio.lowlevel.open_process(
        program("pool_driver", *arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    found = Driver(process)
    async with process.stdin, process.stdout:
        try:
            found.workers = json.loads(await found.read_line())
            yield found
        finally:
            with trio.CancelScope(shield=True):
                process.kill()
                await process.wait()


@pytest.mark.parametrize(
    "arguments", [(HOLD, "2"), (DO, "2", "compute")], ids=["waiting", "computing"]
)
async def test_workers_exit_after_the_pool_was_killed(
    arguments: tuple[str, ...], shared: Path
) -> None:
    """If the pool's process is killed, its workers exit, whatever their handlers do."""
    async with driver(*arguments) as found:
        with watched(found.workers) as pidfds:
            assert not any(map(has_ended, pidfds))
            found.process.kill()
            await ended(pidfds)


@pytest.mark.measured
async def test_worker_exits_with_a_job_of_a_killed_pool(shared: Path) -> None:
    """A worker exits, even if it finds a job that a pool has sent before it was killed."""
    async with driver(HOLD, "1") as found:
        (worker,) = found.workers
        with watched(found.workers) as pidfds:
            os.kill(worker, signal.SIGSTOP)
            assert found.process.stdin is not None
            await found.process.stdin.send_all(b"\n")
            assert await found.read_line() == "sent\n"
            found.process.kill()
            os.kill(worker, signal.SIGCONT)
            await ended(pidfds)
    # It may have begun the second one.
    assert lines(shared / "began")[0] == "1"


def test_worker_exits_if_the_pool_was_killed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose pool had ended before it began exits at once."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    _worker.check_parent(os.getppid())
    with pytest.raises(SystemExit) as caught:
        _worker.check_parent(os.getppid() + 1)
    assert caught.value.code == 1
