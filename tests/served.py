"""What the workers of servers run; tests name it, workers import it.

The rule of this file: a handler works on any stream, and what it has to say goes to the client.
"""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import trio

from trio_unixconn import UnixConnection
from trio_unixconn.errors import UnixConnectionError

if TYPE_CHECKING:
    from trio_unixconn.pool import Job


async def echo(stream: Any, _: Job) -> None:
    """Send back what comes, until the other end ends its stream."""
    async for data in stream:
        await stream.send_all(data)


async def tell(stream: Any, job: Job) -> None:
    """Tell what the worker has got."""
    refused = None
    if isinstance(stream, UnixConnection):
        # The client sends a byte, and perhaps a descriptor.
        try:
            os.close(await stream.receive_fd())
        except (UnixConnectionError, ValueError) as exc:
            refused = type(exc).__name__
    else:
        # Closed with something unread, TCP resets.
        await stream.receive_some()
    told = {"type": type(stream).__name__, "pid": os.getpid(), "refused": refused}
    await stream.send_all(json.dumps({**told, "state": job.state}).encode())


async def hold(stream: Any, _: Job) -> None:
    """Say that the connection is being handled; for ever."""
    await stream.send_all(b"held")
    await trio.sleep_forever()


async def die(_stream: Any, _job: Job) -> None:
    """Be the end of the worker."""
    os.kill(os.getpid(), signal.SIGKILL)


async def fail(_stream: Any, _job: Job) -> None:
    """Raise."""
    raise RuntimeError("a handler that fails, and \x1b[31mcolours it")
