"""A pool of numpy workers: they receive arrays as sealed memory, which is mapped and not copied.

It compares that with arrays that are sent as bytes, with ``data=``.

Run it with ``python examples/pool_numpy.py``; it needs numpy (``pip install numpy``).
"""

import fcntl
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import trio

from trio_unixconn.pool import Job, open_worker_pool

COUNT = 2_000_000
LARGEST = 8 * COUNT
TURNS = 15


async def handler(file: object, job: Job) -> bytes:
    # This runs in a worker. It computes without a checkpoint; a worker that does so for
    # hang_timeout (10 seconds) is killed.
    buffer = job.data if file is None else job.map_buffer(LARGEST)
    array = np.frombuffer(buffer, dtype=np.int64)
    return b"%d %d" % (array.min(), array.max())


def sealed(array: np.ndarray[Any, np.dtype[np.int64]]) -> int:
    """Return the file descriptor of memory with the array, which no process can change any more."""
    fd = os.memfd_create("array", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(array.data)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


async def seconds(call: Callable[[], Awaitable[bytes]], expected: bytes) -> float:
    begin = time.perf_counter()
    assert await call() == expected
    return time.perf_counter() - begin


async def main() -> None:
    array = np.random.default_rng(1).integers(0, 1000, COUNT, dtype=np.int64)
    expected = b"%d %d" % (array.min(), array.max())

    async def as_bytes() -> bytes:
        return await pool.call(data=array.data.cast("B"))

    async def as_sealed_memory() -> bytes:
        return await pool.call(sealed(array))

    async def as_memory_sealed_before() -> bytes:
        return await pool.call(os.dup(shared))

    ways = [as_bytes, as_sealed_memory, as_memory_sealed_before]
    shared = sealed(array)  # as large as the array, however many workers map it
    async with open_worker_pool("pool_numpy:handler", workers=2) as pool:
        taken: list[list[float]] = [[] for _ in ways]
        for _ in range(TURNS):  # in turns, so that all see the same machine
            for way, times in zip(ways, taken, strict=True):
                times.append(await seconds(way, expected))
    os.close(shared)
    medians = [statistics.median(times) for times in taken]
    print(f"an array of {array.nbytes / 1e6:.0f} MB to a worker and its answer, median of {TURNS}:")
    for way, median in zip(ways, medians, strict=True):
        name = way.__name__.replace("_", " ")
        print(f"{name:>24} {median * 1e3:6.1f} ms, {medians[0] / median:4.1f} x as fast as bytes")


if __name__ == "__main__":
    trio.run(main)
