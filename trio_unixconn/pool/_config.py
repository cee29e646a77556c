"""What a pool is to be like, looked at before anything is started.

The rule of this file: what cannot be is refused here, by name.
"""

from __future__ import annotations

import operator
import os
from typing import TYPE_CHECKING, Final

import attrs

from ._import_string import parse_import_string

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._statistics import AbandonedJob


_COUNTS: Final = [
    *("workers", "max_in_flight", "max_queue"),
    *("max_attempts", "max_jobs", "crash_limit"),
]


def available_cpus() -> int:
    """Return how many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _or_available_cpus(workers: int | None) -> int:
    return available_cpus() if workers is None else workers


@attrs.frozen
class PoolConfig:
    """The checked options of :func:`open_worker_pool`.

    Raises:
      TypeError, ValueError: an option is invalid.
    """

    handler: str
    workers: int = attrs.field(default=None, converter=_or_available_cpus, kw_only=True)
    setup: str | None = attrs.field(default=None, kw_only=True)
    max_in_flight: int = attrs.field(default=1000, kw_only=True)
    max_queue: int = attrs.field(default=1000, kw_only=True)
    max_attempts: int = attrs.field(default=3, kw_only=True)
    max_jobs: int | None = attrs.field(default=None, kw_only=True)
    start_timeout: float = attrs.field(default=60, kw_only=True)
    hang_timeout: float = attrs.field(default=10, kw_only=True)
    drain_timeout: float = attrs.field(default=30, kw_only=True)
    crash_limit: int = attrs.field(default=5, kw_only=True)
    on_abandoned: Callable[[AbandonedJob], None] | None = attrs.field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        parse_import_string(self.handler, "a handler")
        if self.setup is not None:
            parse_import_string(self.setup, "a setup")
        for name in _COUNTS:
            count = getattr(self, name)
            if not (name == "max_jobs" and count is None) and operator.index(count) < 1:
                raise ValueError(f"{name} must be at least 1, not {count}")
        for name in ("start_timeout", "hang_timeout"):
            time = getattr(self, name)
            if not time > 0:
                raise ValueError(f"{name} must be more than 0 seconds, not {time}")
        if not self.drain_timeout >= 0:
            raise ValueError(f"drain_timeout must be 0 or more seconds, not {self.drain_timeout}")
