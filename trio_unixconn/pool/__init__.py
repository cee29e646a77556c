"""Worker pools: one process accepts connections or opens files, and many processes work on them.

``open_worker_pool`` starts workers that receive file descriptors, ``serve_with_workers`` also
accepts connections. ``serve_statistics`` answers with the statistics of both, and
``serve_agent_check`` tells HAProxy how much they can take.
"""

from .._public import export as _export
from ._agent_check import serve_agent_check as serve_agent_check
from ._config import WorkerPoolOptions as WorkerPoolOptions
from ._endpoints import Submittable as Submittable
from ._job import Job as Job, PassedOn as PassedOn, WorkerInfo as WorkerInfo
from ._pending import JobReceipt as JobReceipt
from ._pool import WorkerPool as WorkerPool, open_worker_pool as open_worker_pool
from ._proxy_header import ProxyHeader as ProxyHeader, ProxyTLS as ProxyTLS
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

_export(globals())
