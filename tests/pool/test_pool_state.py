"""pool.statistics().state: whether a pool can take jobs, and why not."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests._helpers.pool import client_of, lines, pids
from tests._helpers.waiting import until
from trio_unixconn.pool import WorkerPool, _supervisor, open_worker_pool, serve_statistics
from trio_unixconn.pool._pool import wait_worker_exit

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unmeasured_processes")]

HOLD = "tests._helpers.pool_handlers:hold"
NUMBER = "tests._helpers.supervisor_handlers:number"
NUMBERED = "tests._helpers.supervisor_handlers:numbered"


async def test_statistics_state_down_while_no_worker_is_alive(shared: Path) -> None:
    """It is down from the death of the last worker until the next one is ready."""
    (shared / "wait 2").touch()
    (shared / "wait 3").touch()
    async with open_worker_pool(NUMBER, workers=2, setup=NUMBERED, max_in_flight=5) as pool:
        first, second = pids(pool)
        assert (pool.statistics().state, pool.statistics().capacity) == ("ready", 10)
        os.kill(first, signal.SIGKILL)
        await until(lambda: pool.statistics().capacity == 5)
        assert pool.statistics().state == "ready"
        os.kill(second, signal.SIGKILL)
        await until(lambda: pool.statistics().state == "down")
        assert pool.statistics().capacity == 0
        (shared / "wait 2").unlink()
        await until(lambda: pool.statistics().state == "ready")
        (shared / "wait 3").unlink()
        await until(lambda: pool.statistics().capacity == 10)
    assert pool.statistics().state == "ended"


async def test_statistics_state_draining_until_the_end(shared: Path) -> None:
    """It is draining while handlers finish, and ended when no worker is left."""
    async with open_worker_pool(HOLD, workers=1) as pool:
        async with client_of(pool) as client, trio.open_nursery() as nursery:
            await client.line()
            nursery.start_soon(pool.drain)
            await until(lambda: pool.statistics().state == "draining")
            await client.end()
        assert pool.statistics().state == "ended"


async def test_statistics_state_failed_at_the_crash_limit(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is failed as soon as the pool gives up, while handlers clean up, and stays so."""
    monkeypatch.setattr(_supervisor, "MAX_BACKOFF", 0.0)
    for number in range(2, 99):
        (shared / f"fail {number}").touch()
    seen: set[str] = set()
    pools: list[WorkerPool] = []
    with pytest.raises(ExceptionGroup, match="2 consecutive workers crashed"):
        async with open_worker_pool(HOLD, workers=2, setup=NUMBERED, crash_limit=2) as pool:
            pools.append(pool)
            async with client_of(pool, worker=0) as client:
                await client.line()
                os.kill(pids(pool)[1], signal.SIGKILL)
                try:
                    await trio.sleep_forever()
                finally:
                    seen.add(pool.statistics().state)
    assert seen == {"failed"}
    assert pools[0].statistics().state == "failed"
    # The statistics go on, and say so.
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(serve_statistics, pools[0], ("127.0.0.1", 0))
        async with await trio.open_tcp_stream(*listeners[0].socket.getsockname()) as stream:
            await stream.send_all(b"GET /ready HTTP/1.0\r\n\r\n")
            answer = b"".join([data async for data in stream])
        nursery.cancel_scope.cancel()
    assert b" 503 " in answer.splitlines()[0]
    assert b"the pool has ended because its workers crashed" in answer


async def test_statistics_state_of_a_block_that_is_left_by_an_exception(shared: Path) -> None:
    """It is ended after the handlers were cancelled."""
    with suppress(LookupError):
        async with open_worker_pool(HOLD, workers=1) as pool:
            raise LookupError
    assert pool.statistics().state == "ended"


async def test_wait_worker_exit(shared: Path) -> None:
    """Each task that waits is woken when a worker has gone from the statistics."""
    seen: list[int] = []
    async with open_worker_pool(NUMBER, workers=3, setup=NUMBERED) as pool:
        last = pids(pool)[2]

        async def wait() -> None:
            await wait_worker_exit(pool)
            seen.append(last in pids(pool))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            await pool.scale(2)
    assert seen == [False, False]
    assert len(lines(shared / "left")) == 3
