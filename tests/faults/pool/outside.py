"""Processes, looked at from outside, and signalled without a chance to hit another.

Invariant: the number of a process is used only with a pidfd that was opened for it and
looked at after that.

Sources: pidfd_open(2), proc_pid_task(5), proc_pid_stat(5), proc_pid_environ(5)
"""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress
from pathlib import Path


def children_of(pid: int) -> list[int]:
    """Return the children of a process, also those that are starting or dead."""
    found: list[int] = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with suppress(OSError):
            text = Path(f"/proc/{pid}/task/{task}/children").read_text(encoding="ascii")
            found += map(int, text.split())
    return found


def parent_and_state(pid: int) -> tuple[int, str]:
    """Return a process's parent and its state, one letter; raises OSError when it is gone."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return int(fields[1]), fields[0]


def zombies_of(pid: int) -> int:
    """Return how many children have ended, and wait to be reaped."""
    found = 0
    for child in children_of(pid):
        with suppress(OSError):
            found += parent_and_state(child)[1] == "Z"
    return found


def open_descriptors(pid: int) -> int:
    """Return how many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def highest_descriptor(pid: int) -> int:
    """Return the highest number of a process's open descriptors."""
    return max(map(int, os.listdir(f"/proc/{pid}/fd")))


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


def with_variable(name: str, value: str) -> list[int]:
    """Return all processes with a variable in their environment, children of this one or not."""
    entry = f"{name}={value}".encode()
    found: list[int] = []
    for each in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if entry in Path(f"/proc/{each}/environ").read_bytes().split(b"\0"):
                found.append(int(each))
    return found
