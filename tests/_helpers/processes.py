"""Start processes that import modules of this project, and observe and signal processes.

Invariant: a signal is sent to a pid only through a pidfd that was opened for it and checked after
that.

Sources: pidfd_open(2), proc_pid_stat(5), proc_pid_task(5), proc_pid_environ(5),
clock_getcpuclockid(3)
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = "tests._helpers.programs"
# Of the fields in /proc/stat: user, nice, system, and irq, softirq, steal.
BUSY = (0, 1, 2, 5, 6, 7)


def python(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module in an environment of this project."""
    return [sys.executable, "-m", module, *arguments]


def program(name: str, *arguments: str) -> list[str]:
    """Return the command that runs a program of :mod:`tests._helpers.programs`."""
    return python(f"{PROGRAMS}.{name}", *arguments)


################################################################
# Relations
################################################################


def parent_and_state(pid: int) -> tuple[int, str]:
    """Return a process's parent and its state, one letter; raise OSError if it has been reaped."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return int(fields[1]), fields[0]


def children_of(pid: int) -> dict[int, str]:
    """Return the state of each child of a process, including zombies ("Z")."""
    found: dict[int, str] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            parent, state = parent_and_state(int(name))
            if parent == pid:
                found[int(name)] = state
    return found


def family(pid: int) -> list[int]:
    """Return a process and its children, and theirs; the process itself comes first."""
    found = [pid]
    # It grows while it is walked.
    for each in found:
        # A process, or a thread of it, may exit meanwhile.
        with suppress(FileNotFoundError, ProcessLookupError):
            for task in os.listdir(f"/proc/{each}/task"):
                children = Path(f"/proc/{each}/task/{task}/children").read_text()
                found += map(int, children.split())
    return found


def with_variable(name: str, value: str) -> list[int]:
    """Return all processes with a variable in their environment, children of this one or not."""
    entry = f"{name}={value}".encode()
    found: list[int] = []
    for each in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if entry in Path(f"/proc/{each}/environ").read_bytes().split(b"\0"):
                found.append(int(each))
    return found


################################################################
# Figures
################################################################


def open_descriptors(pid: int) -> int:
    """Return the number of open file descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def highest_descriptor(pid: int) -> int:
    """Return the highest number of a process's open descriptors."""
    return max(map(int, os.listdir(f"/proc/{pid}/fd")))


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


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process. Source: proc_pid_statm(5)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def machine_busy() -> float:
    """Return the seconds that all processors together were busy, or stolen by other machines."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(int(fields[i]) for i in BUSY) / os.sysconf("SC_CLK_TCK")


################################################################
# Signals and exits
################################################################


def open_child(pid: int, parent: int) -> int | None:
    """Open a pidfd on a process if it is still a living child of ``parent``."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    with suppress(OSError):
        if parent_and_state(pid)[0] == parent and not has_ended(pidfd):
            return pidfd
    os.close(pidfd)
    return None


def send_to_child(pid: int, parent: int, number: int) -> bool:
    """Signal a child of ``parent``; return whether it was there."""
    pidfd = open_child(pid, parent)
    if pidfd is None:
        return False
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True


def is_pending(pid: int, number: int) -> bool:
    """Whether a signal was sent that no thread has taken. Source: proc_pid_status(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def has_ended(pidfd: int) -> bool:
    """Whether a process has ended."""
    return bool(select.select([pidfd], [], [], 0)[0])


def seconds_until_ended(pidfds: list[int], timeout: float) -> tuple[float, int]:
    """Wait until all have ended; return how long the last took, and how many are left."""
    begin = now = time.monotonic()
    poll = select.poll()
    left = set(pidfds)
    for each in pidfds:
        poll.register(each, select.POLLIN)
    while left and now - begin < timeout:
        for each, _ in poll.poll(1000 * (begin + timeout - now)):
            poll.unregister(each)
            left.discard(each)
        now = time.monotonic()
    return now - begin, len(left)
