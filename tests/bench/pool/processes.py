"""What the kernel says of processes: their children, processor time, memory and files.

Invariant: it looks from outside, and the processes do not take part.

Sources: proc(5), clock_getcpuclockid(3)
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

# Of the fields in /proc/stat: user, nice, system, and irq, softirq, steal.
BUSY = (0, 1, 2, 5, 6, 7)


def family(pid: int) -> list[int]:
    """Return a process and its children, and theirs; the process itself comes first."""
    found = [pid]
    # It grows while it is walked.
    for each in found:
        # A process, or a thread of it, may end while it is looked at.
        with suppress(FileNotFoundError, ProcessLookupError):
            for task in os.listdir(f"/proc/{each}/task"):
                children = Path(f"/proc/{each}/task/{task}/children").read_text()
                found += map(int, children.split())
    return found


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process, in user space and in the kernel, all its threads.

    To the nanosecond, where /proc/PID/stat has ticks of 10 ms.
    """
    # The clock of a process, as clock_getcpuclockid(3) makes it; 2 is CPUCLOCK_SCHED.
    return time.clock_gettime((~pid << 3) | 2)


def cpu_of(pids: list[int]) -> dict[int, float]:
    """Return the processor time of each that is there."""
    found = {}
    for pid in pids:
        with suppress(OSError):
            found[pid] = cpu_seconds(pid)
    return found


def private_bytes(pid: int) -> int:
    """Return how much memory would be free if the process ended."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    sizes = [int(line.split()[1]) for line in lines if line.startswith("Private_")]
    return 1024 * sum(sizes)


def open_descriptors(pid: int) -> int:
    """Return how many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def machine_busy() -> float:
    """Return how many seconds all processors together were not idle, or were others' (steal)."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(int(fields[i]) for i in BUSY) / os.sysconf("SC_CLK_TCK")
