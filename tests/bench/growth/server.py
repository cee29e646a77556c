"""A server that is measured from outside: ``python -m tests.bench.growth.server KIND WORKERS``.

It prints one line of JSON when it serves, another one when it has replaced its workers, for which a
byte on standard input asks, and ends at the end of its input.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from functools import partial
from typing import Any

import trio

from tests.bench.pool.implementations import serving
from trio_unixconn import PeerPolicy, open_unix_listener, serve_unix
from trio_unixconn.pool import WorkerServer, serve_with_workers

from .handlers import echo
from .observed import Stopwatch, used_by_children

HANDLERS = f"{__package__}.handlers"
# Of one worker, or of the only process: more than any number of connections here.
MOST = 50_000


def announce(**facts: Any) -> None:
    """Print one line of JSON."""
    print(json.dumps(facts), flush=True)


async def follow(nursery: trio.Nursery, server: WorkerServer | None) -> None:
    """Replace the workers when told to; cancel at the end of the input."""
    while True:
        await trio.lowlevel.wait_readable(0)
        if not os.read(0, 1) or server is None:
            nursery.cancel_scope.cancel()
            return
        begin = time.perf_counter()
        await server.pool.restart()
        announce(restart=time.perf_counter() - begin)


async def main(kind: str, workers: int, directory: str) -> None:
    """Serve until the end of the input."""
    path = os.path.join(directory, "s")
    policy = PeerPolicy(uids=[os.getuid()])
    async with trio.open_nursery() as nursery:
        if kind == "serve_unix":
            await nursery.start(partial(serve_unix, echo, path, policy=policy, backlog=4096))
            announce(address=path)
            await follow(nursery, None)
            return
        handler = f"{HANDLERS}:echo"
        listener: Any
        if kind == "pool-unix":
            address: Any = path
            listener = await open_unix_listener(path, policy=policy, backlog=4096)
        else:
            sock = serving.bound()
            address = sock.getsockname()[1]
            listener = serving.listening(sock)
            if kind == "workers":
                handler = f"{serving.__package__}.pool_handler:answer"
        used, begin = Stopwatch(used_by_children), time.perf_counter()
        server = await nursery.start(
            partial(serve_with_workers, handler, [listener], workers=workers, max_in_flight=MOST)
        )
        announce(address=address, start=time.perf_counter() - begin, cpu=used.lap())
        await follow(nursery, server)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        trio.run(main, sys.argv[1], int(sys.argv[2]), name)
