"""The statistics of a pool: values that do not change, and the counters that they are made of."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from ._protocol import LATENCY_BOUNDS


@attrs.frozen
class Latency:
    """How long something took, for all jobs since the beginning of a pool.

    Attributes:
      count: the number of jobs.
      sum: their times together, in seconds.
      buckets: the upper bound of each bucket in seconds, and the number of jobs that took at most
        so long. The last bound is infinity, with all jobs.
    """

    count: int
    sum: float
    buckets: tuple[tuple[float, int], ...]

    def quantile(self, fraction: float) -> float:
        """Return the bound of the bucket in which a quantile is; ``nan`` without jobs.

        Args:
          fraction: 0.5 for the median, 0.99 for the 99th percentile.

        Raises:
          ValueError: it is not between 0 and 1.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
        if not self.count:
            return math.nan
        return next(bound for bound, count in self.buckets if count >= fraction * self.count)


class LatencyHistogram:
    """The times of jobs, counted in buckets."""

    __slots__ = ("_counts", "_sum")

    def __init__(self) -> None:
        self._counts = [0] * (len(LATENCY_BOUNDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count a job."""
        self._counts[bisect_left(LATENCY_BOUNDS, seconds)] += 1
        self._sum += seconds

    def add_each(self, times: Iterable[float]) -> None:
        """Count jobs that took so many seconds each."""
        counts, total = self._counts, 0.0
        for seconds in times:
            counts[bisect_left(LATENCY_BOUNDS, seconds)] += 1
            total += seconds
        self._sum += total

    def add_without_wait(self, jobs: int) -> None:
        """Count jobs that took no time."""
        self._counts[0] += jobs

    def merge(self, counts: Sequence[int], seconds: float) -> None:
        """Count jobs of which each bucket has so many, and which took so long together."""
        self._counts = [old + new for old, new in zip(self._counts, counts, strict=True)]
        self._sum += seconds

    def snapshot(self) -> Latency:
        """Return the value at this moment."""
        total = 0
        buckets: list[tuple[float, int]] = []
        for bound, count in zip((*LATENCY_BOUNDS, math.inf), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        return Latency(total, self._sum, tuple(buckets))


@attrs.frozen(kw_only=True)
class WorkerStatistics:
    """A worker.

    Attributes:
      index: its index in the pool, which its successor has, too.
      pid: its process ID.
      state: ``"ready"``, ``"draining"``, or ``"starting"`` if no worker of this index can accept
        jobs yet.
      in_flight: the number of jobs that it was sent and has not finished.
      handled: the number of jobs whose handlers have returned.
      failed: the number of jobs whose handlers have raised, or could not be given their streams.
      refusals: the number of batches that it has refused, without a free file descriptor.
      restarts: the number of workers that had this index before.
      memory: its resident memory in bytes; 0 if it is unknown.
      age: the time in seconds since it was ready.
    """

    index: int
    pid: int
    state: str
    in_flight: int
    handled: int
    failed: int
    refusals: int
    restarts: int
    memory: int
    age: float


@attrs.frozen(kw_only=True)
class PoolStatistics:
    """A pool, since its beginning.

    At every moment, ``submitted`` is the sum of ``handled``, ``failed``, ``abandoned``,
    ``rejected``, ``cancelled``, ``handed_over``, ``queued`` and ``in_flight``.

    Attributes:
      state: ``"ready"`` if at least one worker accepts jobs; ``"down"`` if none does at the moment;
        ``"draining"`` from the beginning of a drain, even while :meth:`WorkerServer.drain` delays
        it; ``"failed"`` if ``crash_limit`` was reached; ``"ended"`` if all workers have exited at
        the end of the pool. :func:`serve_statistics` has ``"starting"``, too.
      capacity: the number of jobs that all workers which accept jobs can have at a time.
      workers: one for each index, in order; after these, workers that are draining.
      queued: the number of jobs in the queue.
      queue_age: how long the oldest of them has been there, in seconds; 0 if there is none.
      in_flight: the number of jobs that workers were sent and have not finished.
      submitted: the number of jobs that the pool has accepted.
      acknowledged: the number of jobs that a worker has accepted.
      handled: the number of jobs whose handlers have returned.
      failed: the number of jobs whose handlers have raised, or could not be given their streams.
      abandoned: the number of jobs that were being handled when their workers died.
      retried: how many times a job was queued again.
      rejected: the number of jobs that no worker has accepted.
      cancelled: the number of jobs that were cancelled before a worker had them.
      handed_over: the number of connections that the next generation has got before a worker had
        them.
      passed: the number of connections that handlers have passed on to other handlers. Each of
        them counts as a job that was handled, and another one that was submitted, here or in the
        pool of the next generation.
      restarts: the number of workers that were replaced, for any reason.
      deaths: the number of workers that died without having been asked to exit.
      wait: the time from the submission of a job until a worker accepted it.
      handling: the time from then until its handler ended.
    """

    state: str
    capacity: int
    workers: tuple[WorkerStatistics, ...]
    queued: int
    queue_age: float
    in_flight: int
    submitted: int
    acknowledged: int
    handled: int
    failed: int
    abandoned: int
    retried: int
    rejected: int
    cancelled: int
    handed_over: int
    passed: int
    restarts: int
    deaths: int
    wait: Latency
    handling: Latency


@attrs.frozen
class AbandonedJob:
    """A job that was being handled when its worker died; it is not given to another worker.

    Attributes:
      id: the pool's number for it, as in its :class:`JobReceipt`.
      worker: the index of the worker.
      pid: the ID of its process, which has ended.
      peer: the address of the peer, if :func:`serve_with_workers` accepted the connection.
      data: the first 4,096 bytes of those that were submitted with it.
      seconds: how long its handler ran.
    """

    id: int
    worker: int
    pid: int
    peer: Any = None
    data: bytes = attrs.field(default=b"", repr=False)
    seconds: float = attrs.field(default=0.0, eq=False)


@attrs.define(eq=False)
class Counters:
    """The counters of :class:`PoolStatistics`."""

    submitted: int = 0
    acknowledged: int = 0
    handled: int = 0
    failed: int = 0
    abandoned: int = 0
    retried: int = 0
    rejected: int = 0
    cancelled: int = 0
    handed_over: int = 0
    passed: int = 0
    restarts: int = 0
    deaths: int = 0
    wait: LatencyHistogram = attrs.field(factory=LatencyHistogram)
    handling: LatencyHistogram = attrs.field(factory=LatencyHistogram)

    def values(self) -> dict[str, Any]:
        """Return their values by name, as :class:`PoolStatistics` takes them."""
        values = attrs.asdict(self)
        return {**values, "wait": self.wait.snapshot(), "handling": self.handling.snapshot()}


def memory_of(pid: int) -> int:
    """Return a process's resident memory in bytes; 0 if it is unknown.

    Source: proc_pid_statm(5)
    """
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
