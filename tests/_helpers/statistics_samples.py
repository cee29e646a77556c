"""Sample values of a pool's statistics."""

from __future__ import annotations

from trio_unixconn.pool import Latency, PoolStatistics, WorkerStatistics
from trio_unixconn.pool._statistics import LatencyHistogram


def worker(index: int, pid: int, state: str = "ready", handled: int = 20) -> WorkerStatistics:
    """Return the statistics of one worker."""
    return WorkerStatistics(
        index=index,
        pid=pid,
        state=state,
        in_flight=1,
        handled=handled,
        failed=3,
        refusals=2,
        restarts=4,
        memory=5 << 20,
        age=6.5,
    )


def latency(*times: float) -> Latency:
    """Return the latency of jobs that took these times."""
    histogram = LatencyHistogram()
    for seconds in times:
        histogram.add(seconds)
    return histogram.snapshot()


# Two workers of slot 0, one of which drains.
STATISTICS = PoolStatistics(
    state="ready",
    capacity=20,
    workers=(worker(0, 100), worker(1, 101), worker(0, 99, "draining")),
    queued=1,
    queue_age=1.5,
    in_flight=3,
    submitted=100,
    acknowledged=95,
    handled=80,
    failed=9,
    abandoned=2,
    retried=5,
    rejected=4,
    cancelled=6,
    handed_over=0,
    passed=3,
    restarts=7,
    deaths=8,
    wait=latency(0.002, 0.0001, 70.0),
    handling=latency(0.3),
)
