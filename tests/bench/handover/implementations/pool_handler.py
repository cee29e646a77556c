"""The same answer, in the workers of ``trio-unixconn serve``.

A connection that is kept is passed on to the next worker while it is idle.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from trio_unixconn.pool import Job

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%b\r\n%d"


async def handler(stream: trio.abc.Stream, job: Job) -> Any:
    """Answer requests with the process ID until the client closes, or asks for that."""
    try:
        while True:
            request = await receive(stream, job)
            if request is None:
                return job.pass_on() if job.can_pass_on else None
            if not request:
                return None
            closes = b"Connection: close" in request
            pid = os.getpid()
            head = b"Connection: close\r\n" if closes else b""
            await stream.send_all(ANSWER % (len(str(pid)), head, pid))
            if closes:
                return None
    except trio.BrokenResourceError:
        return None


async def receive(stream: trio.abc.Stream, job: Job) -> bytes | None:
    """Return a request; None if the worker drains before one has begun."""
    request = None
    async with trio.open_nursery() as nursery:

        async def end() -> None:
            await job.draining.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(end)
        request = bytes(await stream.receive_some(4096))
        nursery.cancel_scope.cancel()
    while request and not request.endswith(b"\r\n\r\n"):
        more = await stream.receive_some(4096)
        request = request + more if more else b""
    return request
