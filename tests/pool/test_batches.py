"""Batches of large jobs, and drains of jobs that are cancelled."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests._helpers.waiting import until
from trio_unixconn.pool import open_worker_pool

if TYPE_CHECKING:
    from trio_unixconn.pool import Job, WorkerPool

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unmeasured_processes")]

LARGEST = 16 * 2**20


async def length(_: object, job: Job) -> bytes:
    """Return the size of the data; a worker runs this."""
    return b"%d" % len(job.data)


async def wait(_: object, __: Job) -> None:
    """Wait until this is cancelled; a worker runs this."""
    await trio.sleep_forever()


def null() -> int:
    return os.open(os.devnull, os.O_RDONLY)


@pytest.mark.parametrize("worker", [None, 0])
async def test_call_with_the_largest_data(worker: int | None) -> None:
    """Queued jobs with the largest data are all handled, pinned ones too."""
    answers: list[bytes] = []

    async def call() -> None:
        answers.append(await pool.call(data=bytes(LARGEST), worker=worker))

    with trio.fail_after(60):
        async with open_worker_pool("tests.pool.test_batches:length", workers=1) as pool:
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(call)
            assert pool.statistics().deaths == 0
    assert answers == [b"%d" % LARGEST] * 4


async def test_drain_does_not_wait_for_a_cancelled_job() -> None:
    """When the last queued job is cancelled, a drain goes on with ending the workers."""
    with trio.fail_after(60):
        async with (
            open_worker_pool(
                "tests.pool.test_batches:wait", workers=1, max_in_flight=1, drain_timeout=0
            ) as pool,
            trio.open_nursery() as nursery,
        ):
            await pool.submit(null())
            submission = await nursery.start(submit_until_cancelled, pool)
            await trio.testing.wait_all_tasks_blocked()
            assert pool.statistics().queued == 1
            nursery.start_soon(pool.drain, math.inf)
            await trio.testing.wait_all_tasks_blocked()
            submission.cancel()
            await until(lambda: pool.statistics().workers[0].state == "draining")
            nursery.cancel_scope.cancel()


async def submit_until_cancelled(
    pool: WorkerPool, *, task_status: trio.TaskStatus[trio.CancelScope]
) -> None:
    with trio.CancelScope() as scope:
        task_status.started(scope)
        await pool.submit(null())
