"""Worker pools: one process accepts connections or opens files, and many processes work on them.

``open_worker_pool`` starts workers that receive file descriptors, ``serve_with_workers`` also
accepts connections. ``serve_statistics`` answers with the statistics of both, and
``serve_agent_check`` tells HAProxy how much they can take.

Each worker imports this package, and waits for that before it is ready. What only the process of
the pool needs is imported when it is first used: that makes the start of a worker a fifth shorter.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .._public import export as _export
from ._job import Job as Job, PassedOn as PassedOn, WorkerInfo as WorkerInfo
from ._proxy_header import ProxyHeader as ProxyHeader, ProxyTLS as ProxyTLS

if TYPE_CHECKING:
    from ._agent_check import serve_agent_check as serve_agent_check
    from ._config import WorkerPoolOptions as WorkerPoolOptions
    from ._endpoints import Submittable as Submittable
    from ._pending import JobReceipt as JobReceipt
    from ._pool import WorkerPool as WorkerPool, open_worker_pool as open_worker_pool
    from ._server import (
        WorkerServer as WorkerServer,
        serve_with_workers as serve_with_workers,
    )
    from ._statistics import (
        AbandonedJob as AbandonedJob,
        Latency as Latency,
        PoolStatistics as PoolStatistics,
        WorkerStatistics as WorkerStatistics,
    )
    from ._stats_server import serve_statistics as serve_statistics

__all__ = [
    "AbandonedJob",
    "Job",
    "JobReceipt",
    "Latency",
    "PassedOn",
    "PoolStatistics",
    "ProxyHeader",
    "ProxyTLS",
    "Submittable",
    "WorkerInfo",
    "WorkerPool",
    "WorkerPoolOptions",
    "WorkerServer",
    "WorkerStatistics",
    "open_worker_pool",
    "serve_agent_check",
    "serve_statistics",
    "serve_with_workers",
]

# The modules of the names that are not imported yet.
_LATER = {
    "AbandonedJob": "_statistics",
    "JobReceipt": "_pending",
    "Latency": "_statistics",
    "PoolStatistics": "_statistics",
    "Submittable": "_endpoints",
    "WorkerPool": "_pool",
    "WorkerPoolOptions": "_config",
    "WorkerServer": "_server",
    "WorkerStatistics": "_statistics",
    "open_worker_pool": "_pool",
    "serve_agent_check": "_agent_check",
    "serve_statistics": "_stats_server",
    "serve_with_workers": "_server",
}


def __getattr__(name: str) -> Any:
    """Import all of the names that were not imported yet, when one of them is used."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = {
        each: getattr(import_module(f"{__name__}.{module}"), each)
        for each, module in _LATER.items()
    }
    globals().update(found)
    _export(globals())
    return found[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_export({**globals(), "__all__": [each for each in __all__ if each not in _LATER]})
