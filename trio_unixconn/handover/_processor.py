"""Leave processor time to a successor that starts while all processors are busy.

What we want: an upgrade under full load ends in a bounded time. A successor that imports modules
and starts workers is a few processes among all that are busy, and the system gives each of them the
same share. With many clients, on few processors, a start of one second would take a minute.

What was considered: a lower priority of this generation cannot be taken back without privileges if
the upgrade fails. Stopped workers would stay stopped if this process died meanwhile.

What was chosen: this generation accepts in intervals. Clients wait in the queues of the listeners,
and what has no new clients leaves the processors alone. The system tells for how long each process
has run, and for how long it has waited for a processor. While the successor gets less than half of
what it could use, there are pauses, until it has caught up. No pause is longer than MAX_PAUSE, and
each is followed by at least the same time in which this generation accepts: it serves at half of
its speed, and the successor starts at half of its own. Connections that stay open are not affected.

If other services have the processors, pauses do not help. So there are no more when the successor
has got little more in the first ones than between them.

Sources: https://docs.kernel.org/scheduler/sched-stats.html (/proc/PID/schedstat),
proc_pid_task(5) (children), sched_getaffinity(2)
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from ._listeners import Gate

PROC: Final = "/proc"
# Seconds between two looks at the successor.
INTERVAL: Final = 0.02
# How much time the successor has lost when a pause begins, in seconds.
TOLERANCE: Final = 0.02
# The longest pause, in seconds.
MAX_PAUSE: Final = 0.1
# After so many pauses, the successor's share in them must be more than this many times the one
# between them. In the first ones, what was accepted before them is still being served.
TRIALS: Final = 4
LEAST_GAIN: Final = 1.25


class Pauses:
    """Decides when a generation accepts, and when its successor gets the processors.

    Attributes:
      is_paused: whether nothing is accepted.
      count: how many pauses there were.
    """

    def __init__(self, processors: int) -> None:
        self.is_paused: bool = False
        self.count: int = 0
        self._processors = processors
        # How much processor time the successor is short of half of what it could use.
        self._lost = 0.0
        self._changed_at = -math.inf
        self._accepts_until = -math.inf
        self._is_useless = False
        # Of the successor: while this generation accepts, and in pauses.
        self._shares = {False: _Share(), True: _Share()}

    def update(self, now: float, elapsed: float, ran: float, waited: float) -> bool:
        """Return whether to accept nothing from now on.

        Args:
          elapsed: seconds since the last call.
          ran, waited: for how long the successor's processes have run, and waited, since then.
        """
        could_run = min(ran + waited, elapsed * self._processors)
        self._shares[self.is_paused].add(ran, could_run)
        self._lost = min(max(0.0, self._lost + could_run / 2 - ran), MAX_PAUSE)
        if self.is_paused:
            paused = now - self._changed_at
            if not self._lost or paused >= MAX_PAUSE:
                self.is_paused = False
                self._lost = 0.0
                self._accepts_until = now + paused
                self._is_useless = self.count >= TRIALS and not self._has_gained()
        elif self._lost > TOLERANCE and now >= self._accepts_until and not self._is_useless:
            self.is_paused = True
            self.count += 1
            self._changed_at = now
        return self.is_paused

    def _has_gained(self) -> bool:
        return self._shares[True].value() > LEAST_GAIN * self._shares[False].value()


class _Share:
    """Which part of the processor time that it could use a successor gets."""

    def __init__(self) -> None:
        self._ran = 0.0
        self._could_run = 0.0

    def add(self, ran: float, could_run: float) -> None:
        self._ran += ran
        self._could_run += could_run

    def value(self) -> float:
        return self._ran / self._could_run if self._could_run else 0.0


class ProcessorTime:
    """The processor time of a process and its children."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._last: dict[str, tuple[int, int]] = {}

    def take(self) -> tuple[float, float]:
        """Return how long they have run, and waited for a processor, since the last call.

        In seconds; both are 0 if the system does not tell.
        """
        found = {pid: times for pid in self._processes() if (times := _times(pid)) is not None}
        ran = waited = 0
        for pid, times in found.items():
            before = self._last.get(pid, (0, 0))
            ran += max(0, times[0] - before[0])
            waited += max(0, times[1] - before[1])
        self._last = found
        return ran / 1e9, waited / 1e9

    def _processes(self) -> Iterator[str]:
        yield str(self._pid)
        tasks = f"{PROC}/{self._pid}/task"
        with suppress(OSError):
            for task in os.listdir(tasks):
                with open(f"{tasks}/{task}/children", encoding="ascii") as file:
                    yield from file.read().split()


def _times(pid: str) -> tuple[int, int] | None:
    try:
        with open(f"{PROC}/{pid}/schedstat", encoding="ascii") as file:
            ran, waited, _ = file.read().split()
    except (OSError, ValueError):
        return None
    return int(ran), int(waited)


async def leave_processor(pid: int, gate: Gate) -> None:
    """Pause a gate while the successor gets too little processor time, until cancelled."""
    time, pauses = ProcessorTime(pid), Pauses(len(os.sched_getaffinity(0)))
    last = trio.current_time()
    try:
        while True:
            await trio.sleep(INTERVAL)
            now = trio.current_time()
            gate.pause(pauses.update(now, now - last, *time.take()))
            last = now
    finally:
        gate.pause(False)
