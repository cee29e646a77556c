"""max_jobs, max_age and max_memory: workers that are replaced although they are well."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests._helpers.pool import at_rest, client_of, ended, lines, pids, watched
from tests._helpers.waiting import counted, until
from trio_unixconn.pool import _process, _statistics, _supervisor, open_worker_pool

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_child_left", "unmeasured_processes")]

DO = "tests._helpers.pool_handlers:do"
HOLD = "tests._helpers.pool_handlers:hold"
NUMBER = "tests._helpers.supervisor_handlers:number"
NUMBERED = "tests._helpers.supervisor_handlers:numbered"


async def test_max_jobs_replaces_workers(shared: Path) -> None:
    """A worker that has accepted max_jobs jobs is replaced, and no job is lost."""
    async with open_worker_pool(NUMBER, workers=1, setup=NUMBERED, max_jobs=5) as pool:
        for number in range(3):
            for _ in range(5):
                assert await pool.call() == b"%d" % number
            await until(lambda number=number: pool.statistics().restarts == number + 1)  # type: ignore[misc]
        found = await at_rest(pool)
        assert (found.handled, found.deaths) == (15, 0)


async def test_max_jobs_keeps_the_old_worker_if_no_new_one_starts(
    shared: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the successor cannot start, the old worker goes on, and it is tried again later."""
    (shared / "fail 1").touch()
    starts = counted(monkeypatch, _process, "start")
    async with open_worker_pool(
        NUMBER, workers=1, setup=NUMBERED, max_jobs=1, crash_limit=1
    ) as pool:
        slot = pool._supervisor.slots[0]
        assert await pool.call() == b"0"
        await until(lambda: len(starts) == 2 and not slot.is_busy)
        for _ in range(5):
            assert await pool.call() == b"0"
        assert len(starts) == 2
        assert slot.failures == []
        (message,) = caplog.messages
        assert "worker 1 fails" in message
        assert message.endswith("; the old one goes on")
        slot.retry_at = 0.0
        await until(lambda: pool.statistics().restarts == 1)
        assert await pool.call() == b"2"
        assert pool.statistics().deaths == 0


async def test_max_age_replaces_workers(shared: Path) -> None:
    """A worker that is older than max_age is replaced, and finishes its jobs."""
    async with open_worker_pool(HOLD, workers=1, setup=NUMBERED, max_age=0.2) as pool:
        (old,) = pids(pool)
        with watched([old]) as pidfds:
            async with client_of(pool) as client:
                await client.line()
                await until(lambda: pool.statistics().restarts >= 1)
                await client.stream.send_all(b"x")
                assert await client.stream.receive_some(1) == b"X"
            await ended(pidfds)
        found = await at_rest(pool)
        assert (found.handled, found.abandoned, found.deaths) == (1, 0, 0)


async def test_max_memory_replaces_workers(
    shared: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker whose resident set is larger than max_memory is replaced; others are not."""
    caplog.set_level("INFO", logger="trio_unixconn.pool")
    monkeypatch.setattr(_supervisor, "LONG_LIFE", 0.0)
    monkeypatch.setattr(_supervisor, "TICK", 0.05)
    grow = "tests._helpers.supervisor_handlers:grow"
    async with open_worker_pool(grow, workers=1) as pool:
        usual = pool.statistics().workers[0].memory
    more = 2 * usual
    async with open_worker_pool(grow, workers=2, max_memory=2 * usual) as pool:
        before = pids(pool)
        assert await pool.call(worker=1, data=b"%d" % more) == b"grown"
        await until(lambda: pool.statistics().restarts == 1)
        found = await at_rest(pool)
        assert found.workers[0].pid == before[0]
        assert found.workers[1].pid != before[1]
        assert found.deaths == 0
    assert any("(max_memory), replacing it" in each for each in caplog.messages)


async def test_max_memory_that_is_too_low_does_not_replace_young_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A limit that every worker exceeds at once does not replace workers all the time."""
    looks: list[int] = []
    real = _statistics.memory_of

    def memory_of(pid: int) -> int:
        looks.append(pid)
        return real(pid)

    monkeypatch.setattr(_supervisor, "memory_of", memory_of)
    monkeypatch.setattr(_supervisor, "TICK", 0.01)
    monkeypatch.setattr(_supervisor, "LONG_LIFE", 3600.0)
    async with open_worker_pool(DO, workers=1, max_memory=1) as pool:
        await until(lambda: len(looks) > 3)
        assert pool.statistics().restarts == 0


async def test_max_jobs_max_age_and_max_memory_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker has its own limits, up to 10 % more or less than the options say."""
    async with open_worker_pool(
        DO, workers=4, max_jobs=10_000, max_age=10_000, max_memory=10**12
    ) as pool:
        slots = pool._supervisor.slots
        limits: list[list[float]] = [
            [slot.max_jobs / 10_000 for slot in slots],
            [(slot.expires_at - slot.handle.started_at) / 10_000 for slot in slots],
            [slot.max_memory / 10**12 for slot in slots],
        ]
        for values in limits:
            assert len(set(values)) > 1
            assert all(0.899 < value < 1.101 for value in values)


async def test_max_age_that_passes_while_a_worker_is_restarted(shared: Path) -> None:
    """A worker that died is restarted; its age is not looked at any more."""
    (shared / "wait 1").touch()
    async with open_worker_pool(NUMBER, workers=1, setup=NUMBERED, max_age=3600) as pool:
        os.kill(pids(pool)[0], signal.SIGKILL)
        await until(lambda: len(lines(shared / "started")) == 2)
        pool._supervisor.slots[0].expires_at = 0.0
        pool._supervisor._check_limits(1.0, with_memory=True)
        (shared / "wait 1").unlink()
        assert await pool.call() == b"1"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_age": 0}, "max_age must be more than 0 seconds, got 0"),
        ({"max_age": "1"}, "max_age must be a number of seconds, got str"),
        ({"max_memory": 0}, "max_memory must be at least 1, got 0"),
        ({"max_memory": 1.5}, "max_memory must be an int, got float"),
    ],
)
async def test_open_worker_pool_rejects_invalid_max_age_and_max_memory(
    options: dict[str, Any], error: str
) -> None:
    """Invalid limits are rejected before a worker is started."""
    with pytest.raises((TypeError, ValueError), match=error):
        async with open_worker_pool(DO, **options):
            pass
