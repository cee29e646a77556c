"""An echo server: this process accepts, and two workers answer, each many clients at a time.

Run it with ``python examples/pool_echo.py``.
"""

import os
from contextlib import suppress
from functools import partial

import trio

from trio_unixconn.pool import Job, WorkerServer, serve_with_workers


async def handler(stream: trio.SocketStream, job: Job) -> None:
    # This runs in a worker, which imports this file, and closes the stream when this returns.
    print(f"worker {os.getpid()}: job {job.id}, from {job.peer}", flush=True)
    with suppress(trio.BrokenResourceError):  # the client has left
        async for chunk in stream:
            await stream.send_all(chunk)


async def client(port: int, text: bytes) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(text)
        await stream.send_eof()
        echo = b"".join([chunk async for chunk in stream])
    assert echo == text
    print("client:", echo.decode())


async def main() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        # The workers find the handler by its name, on this process's import path.
        serve = partial(serve_with_workers, "pool_echo:handler", listeners, workers=2)
        server: WorkerServer = await nursery.start(serve)
        async with trio.open_nursery() as clients:
            for number in range(6):
                clients.start_soon(client, port, b"hello %d" % number)
        server.drain(timeout=10)  # in other programs, when SIGTERM comes
    statistics = server.statistics()
    print("handled by two workers:", statistics.handled)
    assert statistics.handled == statistics.submitted == 6


if __name__ == "__main__":
    trio.run(main)
