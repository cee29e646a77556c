"""What processes have used: processor time and memory, with that of the kernel.

Sources: proc_pid_smaps(5), proc_meminfo(5), getrusage(2)
"""

from __future__ import annotations

import gc
import os
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

from tests._helpers.processes import cpu_of, family

# The variable of the environment that names the directory of ``report_collections``.
DIRECTORY = "GROWTH_COLLECTIONS"


def pss_bytes(pid: int) -> int:
    """Return the proportional set size of a process: what it shares counts for a part."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    return 0


def kernel_bytes() -> int:
    """Return the memory of all kernel objects of this machine, such as sockets and open files."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Slab:"):
            return 1024 * int(line.split()[1])
    return 0


def used_by_children() -> float:
    """Return the processor time of this process's children, those that have ended included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime + sum(cpu_of(family(os.getpid())[1:]).values())


class Collector:
    """Counts the processor time of Python's garbage collector in this process.

    Attributes:
      seconds: how much it was so far.
    """

    def __init__(self, report: Callable[[float], object] = lambda _: None) -> None:
        self.seconds = 0.0
        self._begin = 0.0
        self._report = report
        gc.callbacks.append(self._on_collection)

    def _on_collection(self, phase: str, _: object) -> None:
        now = time.thread_time()
        if phase == "start":
            self._begin = now
        else:
            self.seconds += now - self._begin
            self._report(self.seconds)

    def close(self) -> None:
        """Count no more."""
        gc.callbacks.remove(self._on_collection)


def report_collections() -> None:
    """Keep a file with what the collector of this process has used, if there is a directory."""
    directory = os.environ.get(DIRECTORY)
    if directory:
        file = os.open(os.path.join(directory, str(os.getpid())), os.O_WRONLY | os.O_CREAT)
        Collector(lambda seconds: os.pwrite(file, struct.pack("d", seconds), 0))


def reported_collections(directory: str) -> float:
    """Return the sum of all those files."""
    contents = [path.read_bytes() for path in Path(directory).iterdir()]
    found: list[float] = [struct.unpack("d", each)[0] for each in contents if each]
    return sum(found)


class Stopwatch:
    """Counts processor time since it was made, or last read.

    Args:
      clock: this process's time by default.
    """

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self._clock = clock
        self._begin = clock()

    def lap(self) -> float:
        """Return what was used, and begin again."""
        before, self._begin = self._begin, self._clock()
        return self._begin - before
