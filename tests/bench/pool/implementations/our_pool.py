"""The worker pool of this library: one process accepts, and the least busy worker serves.

With the argument "workers", the workers accept.

Invariant: serve_with_workers as its documentation has it, and nothing beside it.
"""

from __future__ import annotations

import sys
from functools import partial

import trio

from trio_unixconn.pool import serve_with_workers

from .serving import WORKERS, announce, bound, listening, told_to_end

# In each worker: enough for all the idle connections there are, and those that work beside.
MOST = 4096


async def main() -> None:
    """Serve until told to end."""
    sock = bound()
    port = sock.getsockname()[1]
    pool = partial(
        serve_with_workers,
        f"{__package__}.pool_handler:answer",
        [listening(sock)],
        accept="workers" if sys.argv[1:] == ["workers"] else "parent",
        workers=WORKERS,
        max_in_flight=MOST,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(pool)
        announce(port)
        await told_to_end()
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
