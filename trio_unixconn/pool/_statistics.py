"""What a pool has done, and what it is doing, as values.

The rule of this file: values only; they do not change once they are made.
"""

from __future__ import annotations

import os

import attrs


@attrs.frozen(kw_only=True)
class WorkerStatistics:
    """One worker.

    Attributes:
      index: its place in the pool, which a replacement takes over.
      pid: its process.
      state: ``"ready"``, ``"draining"``, or ``"starting"``, when there is none yet to take jobs.
      in_flight: jobs that it was sent, and has not finished.
      handled: jobs whose handler has returned.
      failed: jobs whose handler has raised, or could not be given its stream.
      restarts: how many workers were at this place before.
      memory: bytes of resident memory; 0 where nobody tells.
      age: seconds since it was ready.
    """

    index: int
    pid: int
    state: str
    in_flight: int
    handled: int
    failed: int
    restarts: int
    memory: int
    age: float


@attrs.frozen(kw_only=True)
class PoolStatistics:
    """A pool, from its beginning on.

    Attributes:
      workers: one for each place, in order; and those that are still draining, behind.
      queued: jobs that wait for a worker.
      in_flight: jobs that workers have, and have not finished.
      submitted: jobs that the pool has taken over.
      acknowledged: jobs that a worker has taken.
      handled: jobs whose handler has returned.
      failed: jobs whose handler has raised, or could not be given its stream.
      abandoned: jobs that were being handled when their worker died.
      retried: how many times a job was handed to another worker.
      rejected: jobs that no worker has taken, which were given up.
      cancelled: jobs that were cancelled before a worker had them.
      restarts: workers that were replaced, whatever the reason.
      deaths: workers that died without having been asked to.
    """

    workers: tuple[WorkerStatistics, ...]
    queued: int
    in_flight: int
    submitted: int
    acknowledged: int
    handled: int
    failed: int
    abandoned: int
    retried: int
    rejected: int
    cancelled: int
    restarts: int
    deaths: int


@attrs.frozen
class AbandonedJob:
    """A job that was being handled when its worker died; it is not handed to another.

    Attributes:
      id: the pool's number for it, as in its :class:`JobReceipt`.
      worker: the index of the worker.
      pid: its process, which has ended.
    """

    id: int
    worker: int
    pid: int


@attrs.define
class Counters:
    """The counts of :class:`PoolStatistics`, while they go on."""

    submitted: int = 0
    acknowledged: int = 0
    handled: int = 0
    failed: int = 0
    abandoned: int = 0
    retried: int = 0
    rejected: int = 0
    cancelled: int = 0
    restarts: int = 0
    deaths: int = 0


def memory_of(pid: int) -> int:
    """Return a process's resident memory in bytes; 0 where nobody tells.

    Source: proc_pid_statm(5)
    """
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
