"""Worker processes in a nursery; each receives live TCP connections and serves them.

Run it with ``python examples/worker_nursery.py``.
"""

import os
import sys
from contextlib import AsyncExitStack, suppress
from functools import partial

import trio

from trio_unixconn import (
    EndOfStreamError,
    UnixConnection,
    WrongDescriptorKindError,
    connection_pair,
)


async def worker(fd: int) -> None:
    async with UnixConnection.from_fd(fd) as control:
        try:
            while True:
                try:
                    client = await control.receive_stream()
                except WrongDescriptorKindError:
                    continue  # not a connected socket: its client had left already
                # A client that leaves ends its own connection only.
                with suppress(trio.BrokenResourceError):
                    async with client:
                        text = await client.receive_some()
                        await client.send_all(b"%s %d" % (text, os.getpid()))
        except EndOfStreamError:
            print(f"worker {os.getpid()}: no more work", flush=True)


async def main() -> None:
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        workers: dict[int, UnixConnection] = {}
        for _ in range(2):
            ours, theirs = connection_pair()
            await stack.enter_async_context(ours)
            async with theirs:  # the worker inherits this end, and this process closes its own
                fd = theirs.socket.fileno()
                command = [sys.executable, __file__, str(fd)]
                start = partial(trio.run_process, command, pass_fds=[fd])
                process: trio.Process = await nursery.start(start)
                workers[process.pid] = ours
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await stack.enter_async_context(listener)
        port = listener.socket.getsockname()[1]
        for pid in [*workers] * 2:
            async with await trio.open_tcp_stream("127.0.0.1", port) as client:
                async with await listener.accept() as accepted:
                    await workers[pid].send_fd(accepted.socket)
                await client.send_all(b"hello")
                answer = await client.receive_some()
            print(f"client: {answer!r}")
            assert answer == b"hello %d" % pid


if len(sys.argv) == 1:
    trio.run(main)
else:
    trio.run(worker, int(sys.argv[1]))
