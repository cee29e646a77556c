"""KeyboardInterrupt in the process of a pool: its tasks are never stopped halfway."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests._helpers.pool import lines, null, pids
from tests._helpers.waiting import until
from trio_unixconn import JobRefusedError, PoolClosedError, WorkerDiedError
from trio_unixconn.pool import _protocol, open_worker_pool
from trio_unixconn.pool._handle import WorkerHandle
from trio_unixconn.pool._pending import PendingJob
from trio_unixconn.pool._queue import JobQueue
from trio_unixconn.pool._supervisor import Supervisor

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

if TYPE_CHECKING:
    from pathlib import Path

    from trio_unixconn.pool import WorkerPool

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_child_left", "unmeasured_processes")]

DO = "tests._helpers.pool_handlers:do"

# Functions in which the pool changes its state, of every task of the pool and of a submitter.
CHANGES = [
    (_protocol, "pack_jobs"),
    (_protocol, "pack_job_ids"),
    (WorkerHandle, "send_jobs"),
    (WorkerHandle, "drain"),
    (WorkerHandle, "_on_frame"),
    (WorkerHandle, "_on_exit"),
    (PendingJob, "acknowledge"),
    (PendingJob, "settle"),
    (JobQueue, "put"),
    (JobQueue, "cancel"),
    (JobQueue, "requeue"),
    (JobQueue, "close"),
    (Supervisor, "_start_process"),
    (Supervisor, "_activate"),
    (Supervisor, "_install"),
    (Supervisor, "_retire"),
    (Supervisor, "_check_clocks"),
    (Supervisor, "_shut_down"),
]


async def test_tasks_of_open_worker_pool_are_protected_from_keyboard_interrupt(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All changes of a pool's state are made in code that is protected from KeyboardInterrupt."""
    found: dict[str, list[bool]] = {name: [] for _, name in CHANGES}

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def look(*arguments: Any, **options: Any) -> Any:
            found[name].append(trio.lowlevel.currently_ki_protected())
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, look)

    for owner, name in CHANGES:
        watch(owner, name)
    async with open_worker_pool(DO, workers=2, max_in_flight=1) as pool:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(_call_forever, pool)
            await until(lambda: len(lines(shared / "began")) == 2)
            # Two are being handled, and two are queued.
            nursery.cancel_scope.cancel()
        await pool.restart()
        os.kill(pids(pool)[0], signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.submit, null())
            nursery.start_soon(pool.submit, null())
            await until(lambda: pool.statistics().in_flight >= 1)
            os.kill(pids(pool)[0], signal.SIGKILL)
        await pool.scale(1)
        await until(lambda: bool(found["_check_clocks"]))
    assert [name for name, protected in found.items() if not protected] == []
    assert [name for name, protected in found.items() if not all(protected)] == []


async def _call_forever(pool: WorkerPool) -> None:
    await pool.call(data=b"forever")


@pytest.mark.usefixtures("default_sigint")
@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        (JobQueue, "cancel", 20),
        (PendingJob, "acknowledge", 100),
        (PendingJob, "settle", 100),
        (WorkerHandle, "_on_frame", 50),
        (WorkerHandle, "send_jobs", 50),
    ],
)
def test_keyboard_interrupt_while_60_tasks_submit_and_call(
    owner: Any, name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the pool changes a job ends the program with KeyboardInterrupt alone."""
    real, calls = getattr(owner, name), [0]

    def interrupt(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupt)

    async def submit(pool: WorkerPool, number: int) -> None:
        # The pool ends first: it closes before the tasks that use it are cancelled.
        with suppress(JobRefusedError, PoolClosedError, WorkerDiedError):
            while True:
                with trio.move_on_after(0.002 * (number % 7)):
                    if number % 2:
                        await pool.submit(null())
                    else:
                        await pool.call(null())

    async def main() -> None:
        with trio.fail_after(60):
            async with (
                open_worker_pool(DO, workers=2, max_in_flight=4, max_queue=20) as pool,
                trio.open_nursery() as nursery,
            ):
                for number in range(60):
                    nursery.start_soon(submit, pool, number)

    with pytest.raises((KeyboardInterrupt, BaseExceptionGroup)) as caught:
        trio.run(main)
    assert [type(each) for each in _leaves(caught.value)] == [KeyboardInterrupt]
    assert calls[0] >= count


def _leaves(exc: BaseException) -> list[BaseException]:
    """Return the exceptions of a group."""
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for each in exc.exceptions for leaf in _leaves(each)]
    return [exc]
