"""The process of a pool, which the test kills: ``pool_driver.py HANDLER WORKERS [DATA]``.

It prints the pids of its workers, as one line of JSON, when each has a job with that data. The
other end of the jobs' sockets stays open here. When it reads something, it sends another job to
the first worker, and prints "sent".
"""

from __future__ import annotations

import json
import os
import socket
import sys
from functools import partial

import trio

from tests._helpers.waiting import until
from trio_unixconn.pool import open_worker_pool


async def main(handler: str, workers: int, data: bytes) -> None:
    kept: list[socket.socket] = []
    async with (
        open_worker_pool(handler, workers=workers) as pool,
        trio.lowlevel.FdStream(os.dup(0)) as stdin,
        trio.open_nursery() as nursery,
    ):
        for index in range(workers):
            mine, theirs = socket.socketpair()
            kept.append(mine)
            await pool.submit(theirs, data=data, worker=index)
            # The handler has begun.
            await trio.lowlevel.wait_readable(mine)
        print(json.dumps([each.pid for each in pool.statistics().workers]), flush=True)
        await stdin.receive_some()
        nursery.start_soon(partial(pool.submit, 0, data=data, worker=0))
        await until(lambda: pool.statistics().in_flight > workers)
        print("sent", flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], int(sys.argv[2]), "".join(sys.argv[3:]).encode())
