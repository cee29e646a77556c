"""The configuration of a worker process, and the checks of the options that it is made from.

Source: setrlimit(2), sched_setaffinity(2), nice(2)
"""

from __future__ import annotations

import ipaddress
import json
import operator
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, SupportsIndex, cast

import attrs

from .. import _kernel
from .._buffers import bytes_of
from .._version import __version__

if TYPE_CHECKING:
    from .._buffers import Buffer
    from ._proxy_header import ProxyVersion

#: Set in the environment of a process that is started as a worker. The bootstrap, which only a
#: Python interpreter runs, removes it.
WORKER_VARIABLE: Final = "TRIO_UNIXCONN_WORKER"
#: Set in the environment of a worker that is to write its standard output line by line, even if
#: that is a pipe. The bootstrap removes it.
LINES_VARIABLE: Final = "TRIO_UNIXCONN_LINES"


@attrs.frozen
class WorkerConfig:
    """The configuration of one worker, which is checked already.

    Attributes:
      handler: the import string of the handler.
      executable: the Python interpreter.
      index: the number of the worker's slot in the pool.
      log_size: the size of its completion log.
      heartbeat_interval: the seconds between two heartbeats.
      handler_timeout: the seconds that a handler may take; None for no limit.
      setup: the import string of the setup, or None.
      setup_data: the bytes that the setup gets.
      environment: the variables that are set, or with None removed, in the worker.
      cpu: the only CPU that it runs on; None for those of the pool's process.
      nice: what is added to its nice value.
      resource_limits: number, soft limit and hard limit of each resource that is limited.
      kill_process_group: whether its process group is killed when it has ended.
      proxy_protocol: the version of the header that connections begin with, or None.
      proxy_from: the networks of the hosts that may send one.
      preload: the modules that the template of the worker imports.
      is_template: whether this is the configuration of the template.
    """

    handler: str
    executable: str
    index: int = 0
    log_size: int = 1
    heartbeat_interval: float = 1.0
    handler_timeout: float | None = None
    setup: str | None = None
    setup_data: bytes = attrs.field(default=b"", repr=False)
    environment: Mapping[str, str | None] = attrs.field(factory=dict[str, "str | None"], repr=False)
    cpu: int | None = None
    nice: int = 0
    resource_limits: Sequence[tuple[int, int, int]] = ()
    kill_process_group: bool = False
    proxy_protocol: ProxyVersion | None = None
    proxy_from: Sequence[str] = ()
    preload: Sequence[str] = ()
    is_template: bool = False

    def encode(self) -> bytes:
        """Return what the bootstrap reads: JSON on one line, and then the data of the setup.

        The JSON is an object with ``path``, which the bootstrap needs, ``version`` and ``pool_pid``
        in all versions of this package: the bootstrap may be a newer one than this module.
        """
        config = attrs.asdict(self, recurse=False)
        data = config.pop("setup_data")
        # For this side only, and the variables may be secret.
        del config["environment"]
        message = {
            "path": import_path(sys.path),
            "version": __version__,
            "pool_pid": os.getpid(),
            "config": config,
        }
        return json.dumps(message).encode() + b"\n" + bytes(data)


def import_path(path: Iterable[object]) -> list[str]:
    """Return ``sys.path`` as JSON can have it.

    Paths (``os.PathLike``) become strings. Other objects are left out, as an import skips them.
    """
    return [
        os.fsdecode(cast("str", item))
        for item in path
        if isinstance(item, (str, bytes, os.PathLike))
    ]


def resolve_executable(executable: str | os.PathLike[str] | None) -> str:
    """Return the Python interpreter that runs the workers: ``executable``, or this one.

    Raises:
      TypeError: it is not a path.
      ValueError: it is not a program, or omitted where it is required.
      RuntimeError: this process was itself started as a worker.
    """
    if WORKER_VARIABLE in os.environ:
        # Otherwise each process would start the next one.
        raise RuntimeError(
            f"this process was started as a worker by process {os.environ[WORKER_VARIABLE]}, but "
            f"{sys.executable or 'its program'} is not a Python interpreter; set executable= to one"
        )
    if executable is None:
        if getattr(sys, "frozen", False):
            raise ValueError(
                "executable is required in a frozen program (sys.frozen), because sys.executable "
                "is not a Python interpreter; set it to one that can import the handler"
            )
        if not sys.executable:
            raise ValueError(
                "executable is required, because sys.executable is not known; set it to a Python "
                "interpreter that can import the handler"
            )
        return sys.executable
    if not isinstance(executable, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"executable must be a path, got {type(executable).__name__}")
    found = shutil.which(os.fsdecode(executable))
    if found is None:
        raise ValueError(f"executable must be a Python interpreter, got {executable!r}")
    return found


def check_environment(environment: Mapping[str, str | None] | None) -> dict[str, str | None]:
    """Return a copy of the variables of a worker.

    Raises:
      TypeError: not a mapping of strings to strings or None.
      ValueError: a variable that cannot be in an environment.
    """
    if environment is None:
        return {}
    if not isinstance(environment, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"environment must be a mapping, got {type(environment).__name__}")
    variables: Mapping[Any, Any] = environment
    for name, value in variables.items():
        if not isinstance(name, str) or not (value is None or isinstance(value, str)):
            raise TypeError(
                f"environment must map str to str or None, got {type(name).__name__} to "
                f"{type(value).__name__}"
            )
        if not name or "=" in name or "\0" in name or "\0" in (value or ""):
            raise ValueError(f"environment contains an invalid variable: {name!r}")
    return dict(environment)


def check_cpu_affinity(cpus: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the CPUs that the workers are distributed over.

    Raises:
      TypeError: not a sequence of CPU numbers.
      ValueError: an empty one.
      NotSupportedError: the platform has no sched_setaffinity.
    """
    if cpus is None:
        return None
    _kernel.required(getattr(os, "sched_setaffinity", None), "sched_setaffinity")
    try:
        found = tuple(_integer("cpu_affinity", cpu) for cpu in cpus)
    except TypeError as exc:
        raise TypeError(f"cpu_affinity must be a sequence of CPU numbers: {exc}") from None
    if not found or min(found) < 0:
        raise ValueError(f"cpu_affinity must contain CPU numbers, got {found}")
    return found


def check_resource_limits(
    limits: Mapping[str | int, tuple[int, int]] | None,
) -> tuple[tuple[int, int, int], ...]:
    """Return number, soft limit and hard limit of each resource.

    Raises:
      TypeError: not a mapping of resources to pairs of limits.
      ValueError: an unknown resource, or invalid limits.
    """
    if limits is None:
        return ()
    if not isinstance(limits, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"resource_limits must be a mapping, got {type(limits).__name__}")
    return tuple(_check_resource_limit(name, pair) for name, pair in limits.items())


def _check_resource_limit(name: str | int, pair: tuple[int, int]) -> tuple[int, int, int]:
    if isinstance(name, str):
        found = getattr(resource, name, None) if name.startswith("RLIMIT_") else None
        if found is None:
            raise ValueError(
                "resource_limits: expected the name of a limit of the resource module, such as "
                f"'RLIMIT_NOFILE', got {name!r}"
            )
        number: int = found
    else:
        number = _integer("resource_limits: the number of a limit", name)
    try:
        soft, hard = (_integer("limit", limit) for limit in pair)
    except (TypeError, ValueError):
        raise TypeError(
            f"resource_limits: expected a pair of ints (soft, hard) for {name!r}, got {pair!r}"
        ) from None
    if min(soft, hard) < -1 or (hard != -1 and not 0 <= soft <= hard):
        raise ValueError(
            f"resource_limits: the soft limit of {name!r} must not exceed the hard limit, got "
            f"{soft} and {hard}"
        )
    return number, soft, hard


def check_setup_data(data: Buffer) -> bytes:
    """Return the bytes of any contiguous buffer.

    Raises:
      TypeError: not one.
    """
    with bytes_of(data, "setup_data") as view:
        return bytes(view)


def check_nice(nice: int) -> int:
    """Return what is added to the nice value.

    Raises:
      TypeError: not an int.
    """
    return _integer("nice", nice)


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return operator.index(value)


def check_proxy_from(networks: Iterable[object] | None) -> tuple[str, ...] | None:
    """Return the networks of balancers as text.

    Raises:
      TypeError: not an iterable.
      ValueError: one of them is not a network.
    """
    if networks is None:
        return None
    if isinstance(networks, (str, bytes)):
        raise TypeError(f"proxy_from must be a sequence of networks, got {networks!r}")
    return tuple(str(ipaddress.ip_network(cast("Any", each))) for each in networks)


def check_preload(modules: Sequence[str]) -> tuple[str, ...]:
    """Return the modules that a template imports.

    Raises:
      TypeError: not a sequence of strings.
      ValueError: one of them is not the name of a module.
      NotSupportedError: the platform has no pidfds.
    """
    if isinstance(modules, (str, bytes)) or not isinstance(modules, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"preload must be a sequence of names of modules, got {modules!r}")
    for name in modules:
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"preload must contain names of modules, got {type(name).__name__}")
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"preload: expected the name of a module, got {name!r}")
    if modules:
        _kernel.required(getattr(signal, "pidfd_send_signal", None), "pidfd_send_signal")
    return tuple(modules)
