"""How a pool is doing, as load balancers ask for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, TypeAlias

from ._server import WorkerServer
from ._statistics import Counters, PoolStatistics

if TYPE_CHECKING:
    from ._pool import WorkerPool

# A pool or a server, or a function that returns None until there is one.
StatisticsSource: TypeAlias = (
    "WorkerServer | WorkerPool | Callable[[], WorkerServer | WorkerPool | None]"
)

# The states of a pool, and what to say about each of them.
STATES: Final = {
    "starting": "the workers are starting",
    "ready": "ready",
    "down": "no worker accepts jobs at the moment",
    "draining": "draining",
    "failed": "the pool has ended because its workers crashed",
    "ended": "the pool has ended",
}


def check_source(source: object) -> None:
    """Raise unless this is a :data:`StatisticsSource`.

    Raises:
      TypeError: it is not.
    """
    if not (hasattr(source, "statistics") or callable(source)):
        raise TypeError(
            "expected a WorkerServer, a WorkerPool or a function that returns one, got "
            f"{type(source).__name__}"
        )


def statistics_of(source: StatisticsSource) -> tuple[PoolStatistics, Mapping[str, int]]:
    """Return the statistics of a pool, and the counters of its server.

    Until there is a pool, its state is "starting", and everything else is 0.
    """
    found = source() if callable(source) else source
    if found is None:
        statistics = PoolStatistics(
            state="starting",
            capacity=0,
            workers=(),
            queued=0,
            queue_age=0.0,
            in_flight=0,
            **Counters().values(),
        )
        return statistics, {"accepted": 0, "denied": 0}
    if isinstance(found, WorkerServer):
        return found.statistics(), {"accepted": found.accepted, "denied": found.denied}
    return found.statistics(), {}


def free_percentage(statistics: PoolStatistics) -> int:
    """Return how much of the capacity is free, of that of a pool without a dead worker.

    Returns:
      A percentage, which is 0 only if no worker accepts jobs.
    """
    ready = [each for each in statistics.workers if each.state == "ready"]
    if not ready:
        return 0
    wanted = sum(each.state != "draining" for each in statistics.workers)
    full = statistics.capacity // len(ready) * wanted
    used = sum(each.in_flight for each in ready) + statistics.queued
    return max(1, 100 * (statistics.capacity - used) // full)
