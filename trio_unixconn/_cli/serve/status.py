"""How a server is doing: samples of its counts, and what happens per second between them.

Invariant: no I/O and no clock; the caller passes the time of each sample.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from ...pool import PoolStatistics, WorkerStatistics

# A rate is of so many seconds, as far as there are samples: one second of a slow service jumps
# between 0 and 1, and a minute says nothing about now.
_WINDOW: Final = 5.0


@attrs.frozen
class Sample:
    """What a server had counted at some time, in seconds."""

    time: float
    pool: PoolStatistics
    accepted: int
    denied: int

    def handled_by(self, pid: int) -> int:
        """Return how many jobs a worker had handled; 0 if it was not there."""
        return next((each.handled for each in self.pool.workers if each.pid == pid), 0)


@attrs.frozen
class WorkerRow:
    """A worker, and how many jobs it handles per second."""

    worker: WorkerStatistics
    rate: float


@attrs.frozen
class Status:
    """What is to be shown.

    Attributes:
      accepted_rate: connections accepted per second.
      handled_rate: jobs handled per second, by workers that are gone, too.
      memory: of all workers together, in bytes.
    """

    sample: Sample
    rows: tuple[WorkerRow, ...]
    accepted_rate: float
    handled_rate: float
    memory: int


class Sampler:
    """Makes rates out of one sample after the other."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()

    def take(self, sample: Sample) -> Status:
        """Return how it is at the time of ``sample``, which is the latest."""
        samples = self._samples
        samples.append(sample)
        # One that is as old as the window, or older, is the beginning of it.
        while len(samples) > 1 and samples[1].time <= sample.time - _WINDOW:
            samples.popleft()
        first = samples[0]
        seconds = sample.time - first.time

        def rate(now: int, then: int) -> float:
            return (now - then) / seconds if seconds > 0 else 0.0

        workers = sample.pool.workers
        return Status(
            sample=sample,
            rows=tuple(
                WorkerRow(each, rate(each.handled, first.handled_by(each.pid))) for each in workers
            ),
            accepted_rate=rate(sample.accepted, first.accepted),
            handled_rate=rate(sample.pool.handled, first.pool.handled),
            memory=sum(each.memory for each in workers),
        )
