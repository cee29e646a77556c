"""How many CPUs this process can use: its affinity, and the CPU quota of its cgroups.

A container mostly has all CPUs in its affinity, and a quota that allows it some of their time. A
worker for each CPU of the machine would then only wait for the next period of the quota.

Source: sched_setaffinity(2), cgroups(7), proc_pid_mountinfo(5),
https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max),
https://docs.kernel.org/scheduler/sched-bwc.html (cpu.cfs_quota_us)
"""

from __future__ import annotations

import math
import os
import posixpath
from collections.abc import Iterator


def available_cpus() -> int:
    """Return the number of CPUs that this process can use, at least 1.

    A part of a CPU in the quota counts as one: 1.5 CPUs are 2.
    """
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:
        count = os.cpu_count() or 1
    quota = cpu_quota()
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def cpu_quota(proc: str = "/proc/self") -> float | None:
    """Return the CPU quota of this process, in CPUs; None if it has none.

    A cgroup is limited by its parents, too: the smallest quota counts.

    Args:
      proc: the directory with the files ``cgroup`` and ``mountinfo``.
    """
    try:
        with open(posixpath.join(proc, "cgroup"), encoding="utf-8", errors="replace") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
        with open(posixpath.join(proc, "mountinfo"), encoding="utf-8", errors="replace") as file:
            mounts = [line.split() for line in file]
    except OSError:
        # Not Linux, or /proc is not mounted.
        return None
    quotas = [
        quota
        for directory in _cgroup_directories(groups, mounts)
        if (quota := _quota_of(directory)) is not None
    ]
    return min(quotas, default=None)


def _cgroup_directories(groups: list[list[str]], mounts: list[list[str]]) -> Iterator[str]:
    """Return the directories of the cgroups of this process, and of their parents."""
    for mount in mounts:
        # 36 35 98:0 /root /mount/point options [optional fields] - type source super-options
        separator = mount.index("-", 6)
        root, point = mount[3], mount[4]
        kind, controllers = mount[separator + 1], mount[separator + 3].split(",")
        for _, names, path in groups:
            is_v2 = kind == "cgroup2" and not names
            is_v1 = kind == "cgroup" and "cpu" in controllers and "cpu" in names.split(",")
            if not (is_v2 or is_v1):
                continue
            below: str = posixpath.relpath(path, root)
            # A cgroup outside of what is mounted cannot be read.
            while not below.startswith(".."):
                yield posixpath.normpath(posixpath.join(point, below))
                if below == ".":
                    break
                below = posixpath.dirname(below) or "."


def _quota_of(directory: str) -> float | None:
    """Return the quota of one cgroup, in CPUs."""
    try:
        if words := _read_words(directory, "cpu.max"):
            quota, period = words
        else:
            (quota,) = _read_words(directory, "cpu.cfs_quota_us")
            (period,) = _read_words(directory, "cpu.cfs_period_us")
        # "max", or -1: no quota.
        return int(quota) / int(period) if int(quota) > 0 else None
    except (ValueError, ZeroDivisionError):
        return None


def _read_words(directory: str, name: str) -> list[str]:
    try:
        with open(posixpath.join(directory, name), encoding="ascii") as file:
            return file.read().split()
    except OSError:
        return []
