"""The process that measures: ``python -m tests.bench.growth.measure KEY SIZE...``.

It prints one line of JSON: by size, the figures of a subject. A subject is in its own process, so
that what one leaves in memory does not change another.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Callable

from . import connections, messages, pools

MEASURES: dict[str, Callable[[int], dict[str, float]]] = {
    "serve_unix": connections.serve_unix,
    "pool-unix": connections.pool_unix,
    "pool-tcp": connections.pool_tcp,
    "workers": pools.workers,
    "descriptors": messages.descriptors,
    "send_fds": messages.send_fds,
    "bytes": messages.sizes,
    "data": pools.data,
    "queue": pools.queue,
    "listeners": pools.listeners,
    "waiting": messages.waiting,
}
# Subjects that start no processes of their own are measured once before, which does not count.
WARM = {"descriptors", "send_fds", "bytes", "waiting"}


def main(key: str, sizes: list[int]) -> None:
    """Measure a subject in each size, and print what was found."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # Of jobs that are cancelled.
    logging.getLogger("trio_unixconn").setLevel(logging.CRITICAL)
    measure = MEASURES[key]
    if key in WARM:
        measure(sizes[0])
    print(json.dumps({size: measure(size) for size in sizes}))


if __name__ == "__main__":
    main(sys.argv[1], list(map(int, sys.argv[2:])))
