"""Handlers that say what a worker's process was started with.

Workers import this file. It imports little, so that Python options under which all is compiled
again do not take long.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trio_unixconn.pool._worker_config import WORKER_VARIABLE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio_unixconn.pool import Job, WorkerInfo

SIGNALS = ("SigBlk", "SigIgn")


def signal_sets(status: str) -> dict[str, list[int]]:
    """Return the blocked and ignored signals of a process. Source: proc_pid_status(5)."""
    found: dict[str, list[int]] = {}
    for line in status.splitlines():
        name, _, mask = line.partition(":")
        if name in SIGNALS:
            # Without those that the C library keeps for itself.
            found[name] = [
                each for each in signal.valid_signals() if int(mask, 16) >> (each - 1) & 1
            ]
    return found


def describe_file(fd: int) -> str:
    try:
        status = os.fstat(fd)
    except OSError:
        return "closed"
    if stat.S_ISCHR(status.st_mode):
        return "null" if os.path.samestat(status, os.stat(os.devnull)) else "device"
    return "socket" if stat.S_ISSOCK(status.st_mode) else "file"


async def look(stream: object, job: Job) -> bytes:
    """Say what this process was started with."""
    child = subprocess.run(["cat", "/proc/self/status"], capture_output=True, check=True)
    flags = {name: getattr(sys.flags, name) for name in dir(sys.flags) if name[0] not in "_n"}
    return json.dumps(
        {
            "flags": {name: value for name, value in flags.items() if isinstance(value, int)},
            "warnings": sys.warnoptions,
            "xoptions": sys._xoptions,
            "path": sys.path,
            "argv": sys.argv,
            "executable": sys.executable,
            "environment": {name: os.environ.get(name) for name in ("A", "B", "HOME")},
            "mark": WORKER_VARIABLE in os.environ,
            "signals": signal_sets(Path("/proc/self/status").read_text()),
            "signals of child": signal_sets(child.stdout.decode()),
            "files": [describe_file(fd) for fd in range(3)],
            "sid": os.getsid(0) == os.getpid(),
            "cpus": sorted(os.sched_getaffinity(0)),
            "nice": os.nice(0),
            "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
            "state": None if job.state is None else [job.state.index, job.state.data.decode()],
        }
    ).encode()


@asynccontextmanager
async def informed(worker: WorkerInfo) -> AsyncGenerator[WorkerInfo, None]:
    assert worker.pid == os.getpid()
    yield worker


async def start_child(stream: object, job: Job) -> bytes:
    """Start a process that outlives this one unless it is killed."""
    child = subprocess.Popen(["sleep", "1000"])
    if job.data == b"die":
        os.kill(os.getpid(), signal.SIGKILL)
    return b"%d" % child.pid
