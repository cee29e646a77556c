"""Sample values of a pool's statistics."""

from __future__ import annotations

from trio_unixconn.pool import PoolStatistics, WorkerStatistics


def worker(index: int, pid: int, state: str = "ready", handled: int = 20) -> WorkerStatistics:
    """Return the statistics of one worker."""
    return WorkerStatistics(
        index=index,
        pid=pid,
        state=state,
        in_flight=1,
        handled=handled,
        failed=3,
        restarts=4,
        memory=5 << 20,
        age=6.5,
    )


# Two workers of slot 0, one of which drains.
STATISTICS = PoolStatistics(
    workers=(worker(0, 100), worker(1, 101), worker(0, 99, "draining")),
    queued=1,
    in_flight=3,
    submitted=100,
    acknowledged=95,
    handled=80,
    failed=9,
    abandoned=2,
    retried=5,
    rejected=4,
    cancelled=6,
    restarts=7,
    deaths=8,
)
