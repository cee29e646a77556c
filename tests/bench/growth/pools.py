"""Cost of a pool: with its workers, the data of jobs, its queue and its listeners."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from typing import Literal

import trio
import trio.testing

from tests._helpers.processes import cpu_of
from tests.bench.pool.generator import built, check
from trio_unixconn import open_unix_listener
from trio_unixconn.pool import WorkerServer, open_worker_pool, serve_with_workers

from .connections import serving
from .handlers import GREETING
from .observed import Collector, Stopwatch, used_by_children
from .workloads import COLLECTOR

HANDLERS = f"{__package__}.handlers"
# In seconds, of a closed loop.
LOAD, WARM_UP = 0.5, 0.15


################################################################
# Workers
################################################################


def workers(count: int) -> dict[str, float]:
    """Measure a pool of so many workers: its start, its load, its memory, a restart."""
    with tempfile.TemporaryDirectory() as directory, serving("workers", count) as server:
        generator = built(directory)
        generator.run(server.address, burns=False, seconds=WARM_UP, seed=1)
        before = cpu_of(server.family)
        found = generator.run(server.address, burns=False, seconds=LOAD, seed=2)
        used = {pid: value - before[pid] for pid, value in cpu_of(server.family).items()}
        check(found)
        own = used.pop(server.pid)
        return {
            "start": server.facts["start"],
            "start, processor time": server.facts["cpu"],
            "pool's process": own / found["answered"],
            "workers": sum(used.values()) / found["answered"],
            "rate": found["in_time"] / found["seconds"],
            "memory": server.memory()[1],
            "restart": server.restart(),
        }


################################################################
# Jobs
################################################################

# What is repeated takes about so long in all, in seconds, and is repeated at most so often.
LONG_ENOUGH = 0.1
MOST_REPEATED = 200


def data(size: int) -> dict[str, float]:
    """Measure jobs with so many bytes of data."""

    async def main() -> dict[str, float]:
        async with open_worker_pool(f"{HANDLERS}:nothing", workers=1) as pool:
            content = bytes(size)
            (worker,) = (each.pid for each in pool.statistics().workers)

            def used() -> dict[int, float]:
                return cpu_of([os.getpid(), worker])

            begin = time.monotonic()
            for _ in range(2):
                await pool.call(data=content)
            each = (time.monotonic() - begin) / 2
            count = min(MOST_REPEATED, max(2, int(LONG_ENOUGH / each)))
            before = used()
            for _ in range(count):
                await pool.call(data=content)
            own, theirs = (now - before[pid] for pid, now in used().items())
            return {"pool's process": own / count, "worker": theirs / count}

    return trio.run(main)


def queue(count: int) -> dict[str, float]:
    """Measure so many jobs that are queued, and then cancelled at once; and tasks that wait."""
    collector = Collector()
    first = trio.run(submitted, count, count, collector)
    collected = collector.seconds
    second = trio.run(submitted, count, 1, collector)
    collector.close()
    return {
        f"both: {COLLECTOR}": collected,
        "submit": first[0],
        "cancel": first[1],
        "wait for a slot": second[0],
        "cancel the wait": second[1],
    }


async def submitted(count: int, max_queue: int, collector: Collector) -> tuple[float, float]:
    """Return the cost of submitting jobs to a pool that is busy, and of cancelling that."""
    async with open_worker_pool(
        f"{HANDLERS}:wait", workers=1, max_in_flight=1, max_queue=max_queue, drain_timeout=0
    ) as pool:
        # The worker has a job that does not end, and takes no other one.
        await pool.submit(os.open(os.devnull, os.O_RDONLY))
        used = Stopwatch(lambda: time.process_time() - collector.seconds)
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(pool.submit, os.open(os.devnull, os.O_RDONLY))
            await trio.testing.wait_all_tasks_blocked(0.01)
            before = used.lap()
            nursery.cancel_scope.cancel()
        return before, used.lap()


################################################################
# Listeners
################################################################


def listeners(count: int) -> dict[str, float]:
    """Measure a server with so many listeners, which accepts, or whose workers do."""
    found: dict[str, float] = {}
    for accept in ("parent", "workers"):
        figures = trio.run(served, count, accept)
        words = "" if accept == "parent" else ", workers accept"
        for name, value in figures.items():
            found[f"{name}{words}"] = value
    return found


async def served(count: int, accept: Literal["parent", "workers"]) -> dict[str, float]:
    """Open listeners, serve them with two workers, connect once to each, and drain."""
    clock = time.process_time if accept == "parent" else all_used
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        paths = [os.path.join(directory, str(i)) for i in range(count)]
        used = Stopwatch(clock)
        opened = [await open_unix_listener(each) for each in paths]
        opening = used.lap()
        async with trio.open_nursery() as nursery:
            server: WorkerServer = await nursery.start(
                partial(serve_with_workers, f"{HANDLERS}:echo", opened, workers=2, accept=accept)
            )
            await trio.testing.wait_all_tasks_blocked(0.01)
            used.lap()
            for path in paths:
                sock = trio.socket.socket(socket.AF_UNIX)
                stack.callback(sock.close)
                await sock.connect(path)
                if await sock.recv(1) != GREETING:
                    raise AssertionError("a connection was closed")
            connecting = used.lap()
            stack.close()
            server.drain()
        return {"open": opening, "a connection to each": connecting, "close": used.lap()}


def all_used() -> float:
    """Return the processor time of this process and of its children."""
    return time.process_time() + used_by_children()
