"""The figures in the text of the pages on pools: ``python -m tests.bench.pool.figures``.

The median of some measurements each, on the machine as it is: a worker's start, the acknowledgement
of a job, and how soon orphans are gone. The tables are those of ``tests.bench.pool``.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import trio
import trio.lowlevel

from tests._helpers.environment import environment
from trio_unixconn.pool import open_worker_pool

if TYPE_CHECKING:
    from collections.abc import Callable

HANDLER = f"{__spec__.name if __name__ == '__main__' else __name__}:"
MANY_WORKERS = 32


async def do(stream: Any, job: Any) -> bytes:
    """Do what the data of the job names; a worker runs this."""
    if isinstance(stream, trio.abc.SendStream):
        # It has begun.
        await stream.send_all(b"x")
    match job.data:
        case b"wait":
            await trio.sleep_forever()
        case b"shield":
            with trio.CancelScope(shield=True):
                await trio.sleep_forever()
        case b"compute":
            while True:
                pass
        case b"match":
            re.match(r"(a+)+$", "a" * 29 + "b")
    return b""


async def orphaned(data: str) -> None:
    """Be the process of a pool whose two workers have begun such a job each."""
    async with open_worker_pool(f"{HANDLER}do", workers=2, hang_timeout=1000) as pool:
        ends: list[socket.socket] = []
        for index in range(2):
            mine, theirs = socket.socketpair()
            ends.append(mine)
            await pool.submit(theirs, data=data.encode(), worker=index)
            await trio.lowlevel.wait_readable(mine)
        sys.stdout.write(" ".join(str(each.pid) for each in pool.statistics().workers) + "\n")
        sys.stdout.flush()
        await trio.sleep_forever()


async def orphans_gone(data: str) -> float:
    """Return after how many seconds both workers have ended, after their pool was killed."""
    with subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.figures", "--orphaned", data],
        stdout=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        pids = [int(each) for each in process.stdout.readline().split()]
        pidfds = [os.pidfd_open(pid) for pid in pids]
        begin = time.monotonic()
        process.kill()
        for pidfd in pidfds:
            await trio.lowlevel.wait_readable(pidfd)
            os.close(pidfd)
        return time.monotonic() - begin


async def acknowledged(count: int) -> list[float]:
    """Return how long ``submit`` took, to an idle worker, so many times."""
    found: list[float] = []
    async with open_worker_pool(f"{HANDLER}do", workers=1) as pool:
        for _ in range(count):
            while pool.statistics().in_flight:
                await trio.lowlevel.checkpoint()
            fd = os.open(os.devnull, os.O_RDONLY)
            begin = time.perf_counter()
            # Not a stream, so that the handler has nothing to do.
            await pool.submit(fd)
            found.append(time.perf_counter() - begin)
    return found


async def started(workers: int) -> float:
    """Return how long it takes to open a pool."""
    begin = time.perf_counter()
    async with open_worker_pool(f"{HANDLER}do", workers=workers):
        return time.perf_counter() - begin


def measure(title: str, run: Callable[[], Any], times: int, unit: float, form: str) -> None:
    """Print the median of some runs."""
    found = [trio.run(run) for _ in range(times)]
    values = [each for one in found for each in (one if isinstance(one, list) else [one])]
    sys.stdout.write(f"{title}: {statistics.median(values) * unit:{form}}\n")
    sys.stdout.flush()


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--orphaned", help="be such a process")
    given = parser.parse_args()
    if given.orphaned is not None:
        trio.run(orphaned, given.orphaned)
        return
    measure("a worker's start, s", partial(started, 1), 9, 1, ".2f")
    measure(f"the start of {MANY_WORKERS} workers, s", partial(started, MANY_WORKERS), 3, 1, ".1f")
    measure("the acknowledgement of a job, ms", partial(acknowledged, 500), 1, 1e3, ".2f")
    for data in ("wait", "shield", "compute"):
        measure(f"orphans gone, {data}, s", partial(orphans_gone, data), 5, 1, ".2f")
    measure("orphans gone, idle, s", partial(orphans_gone, ""), 5, 1, ".2f")
    measure("orphans gone, match, s", partial(orphans_gone, "match"), 1, 1, ".0f")


if __name__ == "__main__":
    main()
