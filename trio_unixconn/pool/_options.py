"""What a pool is to be like, looked at before anything is started.

The rule of this file: what cannot be is refused here, by name.
"""

from __future__ import annotations

import operator
import os
from typing import TYPE_CHECKING

import attrs

from ._targets import check_reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._statistics import AbandonedJob


@attrs.frozen(kw_only=True)
class PoolOptions:
    """What :func:`open_worker_pool` was asked for; see there."""

    handler: str
    workers: int
    setup: str | None
    max_in_flight: int
    max_queue: int
    max_tries: int
    max_jobs: int | None
    start_timeout: float
    hang_timeout: float
    drain_timeout: float
    crash_limit: int
    on_abandoned: Callable[[AbandonedJob], None] | None


def available_cpus() -> int:
    """Return how many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def pool_options(
    handler: str,
    *,
    workers: int | None = None,
    setup: str | None = None,
    max_in_flight: int = 1000,
    max_queue: int = 1000,
    max_tries: int = 3,
    max_jobs: int | None = None,
    start_timeout: float = 60,
    hang_timeout: float = 10,
    drain_timeout: float = 30,
    crash_limit: int = 5,
    on_abandoned: Callable[[AbandonedJob], None] | None = None,
) -> PoolOptions:
    """Check what was asked for.

    Raises:
      TypeError, ValueError: something that cannot be.
    """
    check_reference(handler, "a handler")
    if setup is not None:
        check_reference(setup, "a setup")
    counts = {
        "workers": available_cpus() if workers is None else workers,
        "max_in_flight": max_in_flight,
        "max_queue": max_queue,
        "max_tries": max_tries,
        "max_jobs": 1 if max_jobs is None else max_jobs,
        "crash_limit": crash_limit,
    }
    for name, count in counts.items():
        if operator.index(count) < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
    times = {"start_timeout": start_timeout, "hang_timeout": hang_timeout}
    for name, time in times.items():
        if not time > 0:
            raise ValueError(f"{name} must be more than 0 seconds, not {time}")
    if not drain_timeout >= 0:
        raise ValueError(f"drain_timeout must be 0 or more seconds, not {drain_timeout}")
    return PoolOptions(
        handler=handler,
        workers=counts["workers"],
        setup=setup,
        max_in_flight=max_in_flight,
        max_queue=max_queue,
        max_tries=max_tries,
        max_jobs=max_jobs,
        start_timeout=start_timeout,
        hang_timeout=hang_timeout,
        drain_timeout=drain_timeout,
        crash_limit=crash_limit,
        on_abandoned=on_abandoned,
    )
