"""An HTTP server that HAProxy can replace, and that can replace HAProxy.

``python -m tests.handover.haproxy_partner DIRECTORY PORT [take]``. It opens its listeners, or takes
them from HAProxy. After SIGUSR1 it stops accepting, and ends when its handlers have finished.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress
from functools import partial
from typing import Any

import trio

from trio_unixconn import open_unix_listener
from trio_unixconn.handover import serve_haproxy_listeners, take_haproxy_listeners

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b"


async def handle(stream: Any) -> None:
    """Answer one request with the pid."""
    async with stream:
        with suppress(trio.BrokenResourceError):
            request = b""
            while b"\r\n\r\n" not in request:
                more = await stream.receive_some(4096)
                if not more:
                    return
                request += more
            text = b"partner %d" % os.getpid()
            await stream.send_all(ANSWER % (len(text), text))


async def listen(directory: str, port: int, *, take: bool) -> list[Any]:
    """Return a TCP and a Unix listener."""
    path = os.path.join(directory, "web.sock")
    if not take:
        (web,) = await trio.open_tcp_listeners(port, host="127.0.0.1")
        return [web, await open_unix_listener(path)]
    with await take_haproxy_listeners(os.path.join(directory, "admin")) as taken:
        unix = taken.unix(path)
        assert unix is not None
        return [*taken.tcp(port), unix]


async def main() -> None:
    """Serve until SIGUSR1."""
    directory, port, *options = sys.argv[1:]
    listeners = await listen(directory, int(port), take="take" in options)
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        async with trio.open_nursery() as handlers:
            async with trio.open_nursery() as accepting:
                await accepting.start(
                    partial(trio.serve_listeners, handle, listeners, handler_nursery=handlers)
                )
                await accepting.start(
                    partial(serve_haproxy_listeners, replace=True),
                    os.path.join(directory, "partner"),
                    listeners,
                )
                sys.stdout.write("ready\n")
                sys.stdout.flush()
                async for _ in signals:
                    break
                accepting.cancel_scope.cancel()
            for each in listeners:
                await each.aclose()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    trio.run(main)
