"""The options of a pool, checked before any process is started."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypedDict

import attrs

from ._cpus import available_cpus
from ._import_string import parse_import_string
from ._worker_config import (
    WorkerConfig,
    check_cpu_affinity,
    check_environment,
    check_nice,
    check_preload,
    check_proxy_from,
    check_resource_limits,
    check_setup_data,
    resolve_executable,
)

if TYPE_CHECKING:
    from .._buffers import Buffer
    from ._proxy_header import Network, ProxyVersion
    from ._statistics import AbandonedJob


class WorkerPoolOptions(TypedDict, total=False):
    """The keyword arguments of :func:`open_worker_pool` and :func:`serve_with_workers`."""

    workers: int | None
    setup: str | None
    setup_data: Buffer
    max_in_flight: int
    max_queue: int
    max_attempts: int
    max_jobs: int | None
    max_age: float | None
    max_memory: int | None
    start_timeout: float
    handler_timeout: float | None
    hang_timeout: float
    drain_timeout: float
    crash_limit: int
    on_abandoned: Callable[[AbandonedJob], None] | None
    executable: str | os.PathLike[str] | None
    environment: Mapping[str, str | None] | None
    cpu_affinity: Sequence[int] | None
    nice: int
    resource_limits: Mapping[str | int, tuple[int, int]] | None
    kill_process_group: bool
    proxy_protocol: ProxyVersion | None
    proxy_from: Sequence[str | Network] | None
    preload: Sequence[str]


# How many jobs a worker can have finished without having reported it, whatever max_in_flight is.
_MAX_LOG_SIZE: Final = 2**20


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


def checked_timeout(timeout: float, name: str = "timeout") -> float:
    """Return a time in seconds.

    Raises:
      TypeError: it is not a number.
      ValueError: it is negative.
    """
    if not _seconds(timeout, name) >= 0:
        raise ValueError(f"{name} must be non-negative, got {timeout}")
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


def _bool(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{attribute.name} must be a bool, got {type(value).__name__}")


def _proxy_version(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value not in ("v1", "v2", "any"):
        raise ValueError(f'{attribute.name} must be "v1", "v2", "any" or None, got {value!r}')


_optional: Final = attrs.validators.optional


@attrs.frozen
class PoolConfig:
    """The checked options of :func:`open_worker_pool`.

    Raises:
      TypeError: an option has a wrong type.
      ValueError: an option is invalid.
    """

    handler: str = attrs.field(validator=_import_string)
    workers: int = attrs.field(
        default=None, converter=_or_available_cpus, validator=_at_least_one, kw_only=True
    )
    setup: str | None = attrs.field(default=None, validator=_optional(_import_string), kw_only=True)
    setup_data: bytes = attrs.field(
        default=b"", converter=check_setup_data, kw_only=True, repr=False
    )
    max_in_flight: int = attrs.field(default=1000, validator=_at_least_one, kw_only=True)
    max_queue: int = attrs.field(default=1000, validator=_at_least_one, kw_only=True)
    max_attempts: int = attrs.field(default=3, validator=_at_least_one, kw_only=True)
    max_jobs: int | None = attrs.field(
        default=None, validator=_optional(_at_least_one), kw_only=True
    )
    max_age: float | None = attrs.field(
        default=None, validator=_optional(_positive_seconds), kw_only=True
    )
    max_memory: int | None = attrs.field(
        default=None, validator=_optional(_at_least_one), kw_only=True
    )
    start_timeout: float = attrs.field(default=60, validator=_positive_seconds, kw_only=True)
    handler_timeout: float | None = attrs.field(
        default=None, validator=_optional(_positive_seconds), kw_only=True
    )
    hang_timeout: float = attrs.field(default=10, validator=_positive_seconds, kw_only=True)
    drain_timeout: float = attrs.field(default=30, validator=_non_negative_seconds, kw_only=True)
    crash_limit: int = attrs.field(default=5, validator=_at_least_one, kw_only=True)
    on_abandoned: Callable[[AbandonedJob], None] | None = attrs.field(
        default=None, validator=_optional(_callable), kw_only=True
    )
    executable: str = attrs.field(default=None, converter=resolve_executable, kw_only=True)
    environment: dict[str, str | None] = attrs.field(
        default=None, converter=check_environment, kw_only=True, repr=False
    )
    cpu_affinity: tuple[int, ...] | None = attrs.field(
        default=None, converter=check_cpu_affinity, kw_only=True
    )
    nice: int = attrs.field(default=0, converter=check_nice, kw_only=True)
    resource_limits: tuple[tuple[int, int, int], ...] = attrs.field(
        default=None, converter=check_resource_limits, kw_only=True
    )
    kill_process_group: bool = attrs.field(default=False, validator=_bool, kw_only=True)
    proxy_protocol: ProxyVersion | None = attrs.field(
        default=None, validator=_optional(_proxy_version), kw_only=True
    )
    proxy_from: tuple[str, ...] | None = attrs.field(
        default=None, converter=check_proxy_from, kw_only=True
    )
    preload: tuple[str, ...] = attrs.field(default=(), converter=check_preload, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if (self.proxy_from is None) != (self.proxy_protocol is None):
            raise ValueError(
                "proxy_protocol and proxy_from require each other: set proxy_from to the networks "
                "of the balancers, or to [] if they connect to Unix sockets only"
            )

    def worker_config(self, index: int) -> WorkerConfig:
        """Return the configuration of the worker of a slot."""
        finite = self.hang_timeout < math.inf
        cpus = self.cpu_affinity
        return WorkerConfig(
            handler=self.handler,
            executable=self.executable,
            index=index,
            log_size=min(self.max_in_flight, _MAX_LOG_SIZE),
            heartbeat_interval=self.hang_timeout / 5 if finite else 1.0,
            handler_timeout=self.handler_timeout,
            setup=self.setup,
            setup_data=self.setup_data,
            environment=self.environment,
            cpu=None if cpus is None else cpus[index % len(cpus)],
            nice=self.nice,
            resource_limits=self.resource_limits,
            kill_process_group=self.kill_process_group,
            proxy_protocol=self.proxy_protocol,
            proxy_from=self.proxy_from or (),
            preload=self.preload,
        )
