"""The options of a pool, checked before any process is started."""

from __future__ import annotations

import operator
import os
from typing import TYPE_CHECKING, Any, Final, TypedDict

import attrs

from ._import_string import parse_import_string

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._statistics import AbandonedJob


class WorkerPoolOptions(TypedDict, total=False):
    """The keyword arguments of :func:`open_worker_pool` and :func:`serve_with_workers`."""

    workers: int | None
    setup: str | None
    max_in_flight: int
    max_queue: int
    max_attempts: int
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


def _or_available_cpus(workers: int | None) -> int:
    return available_cpus() if workers is None else workers


def _at_least_one(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise TypeError(f"{attribute.name} must be an int, got {type(value).__name__}")
    if count < 1:
        raise ValueError(f"{attribute.name} must be at least 1, got {value}")


def _seconds(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, got {type(value).__name__}")
    return value


def checked_timeout(timeout: float) -> float:
    """Return a timeout in seconds.

    Raises:
      TypeError, ValueError: it is not a number, or negative.
    """
    if not _seconds(timeout, "timeout") >= 0:
        raise ValueError(f"timeout must be non-negative, got {timeout}")
    return timeout


def _positive_seconds(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not _seconds(value, attribute.name) > 0:
        raise ValueError(f"{attribute.name} must be more than 0 seconds, got {value}")


def _non_negative_seconds(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not _seconds(value, attribute.name) >= 0:
        raise ValueError(f"{attribute.name} must be 0 or more seconds, got {value}")


def _import_string(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    parse_import_string(value, attribute.name)


def _callable(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{attribute.name} must be callable, got {type(value).__name__}")


_optional: Final = attrs.validators.optional


@attrs.frozen
class PoolConfig:
    """The checked options of :func:`open_worker_pool`.

    Raises:
      TypeError, ValueError: an option is invalid.
    """

    handler: str = attrs.field(validator=_import_string)
    workers: int = attrs.field(
        default=None, converter=_or_available_cpus, validator=_at_least_one, kw_only=True
    )
    setup: str | None = attrs.field(default=None, validator=_optional(_import_string), kw_only=True)
    max_in_flight: int = attrs.field(default=1000, validator=_at_least_one, kw_only=True)
    max_queue: int = attrs.field(default=1000, validator=_at_least_one, kw_only=True)
    max_attempts: int = attrs.field(default=3, validator=_at_least_one, kw_only=True)
    max_jobs: int | None = attrs.field(
        default=None, validator=_optional(_at_least_one), kw_only=True
    )
    start_timeout: float = attrs.field(default=60, validator=_positive_seconds, kw_only=True)
    hang_timeout: float = attrs.field(default=10, validator=_positive_seconds, kw_only=True)
    drain_timeout: float = attrs.field(default=30, validator=_non_negative_seconds, kw_only=True)
    crash_limit: int = attrs.field(default=5, validator=_at_least_one, kw_only=True)
    on_abandoned: Callable[[AbandonedJob], None] | None = attrs.field(
        default=None, validator=_optional(_callable), kw_only=True
    )
