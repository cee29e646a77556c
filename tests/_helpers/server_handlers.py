"""Handlers that the workers of a server import by name.

Invariant: a handler works on any stream, and reports to the client only.
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from trio_unixconn import UnixConnection
from trio_unixconn.errors import UnixConnectionError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio_unixconn.pool import Job


async def echo(stream: Any, _: Job) -> None:
    """Echo until the end of the stream."""
    async for data in stream:
        await stream.send_all(data)


async def tell(stream: Any, job: Job) -> None:
    """Describe the stream and the job that the worker received."""
    refused = None
    if isinstance(stream, UnixConnection):
        # The client sends a byte, perhaps with a file descriptor.
        try:
            os.close(await stream.receive_fd())
        except (UnixConnectionError, ValueError) as exc:
            refused = type(exc).__name__
    else:
        # TCP resets a connection that is closed with unread data.
        await stream.receive_some()
    told = {"type": type(stream).__name__, "pid": os.getpid(), "refused": refused}
    await stream.send_all(json.dumps({**told, "state": job.state}).encode())


async def hold(stream: Any, _: Job) -> None:
    """Report that the connection is being handled, and never return."""
    await stream.send_all(b"held")
    await trio.sleep_forever()


async def die_when_told(stream: Any, _job: Job) -> None:
    """Kill the worker when the client has sent something."""
    await stream.receive_some()
    os.kill(os.getpid(), signal.SIGKILL)


@asynccontextmanager
async def only_once() -> AsyncGenerator[None, None]:
    """Let the first worker start; all others fail."""
    Path(os.environ["SETUP_ONCE"]).touch(exist_ok=False)
    yield


async def fail(_stream: Any, _job: Job) -> None:
    """Raise."""
    raise RuntimeError("a handler that fails, and \x1b[31mcolours it")


async def tell_job(stream: Any, job: Job) -> None:
    """Describe the job, and handle the connection until the client ends it."""
    told = {"pid": os.getpid(), "id": job.id, "passed": job.passed, "data": job.data.decode()}
    await stream.send_all(json.dumps(told).encode() + b"\n")
    async for _ in stream:
        pass


@asynccontextmanager
async def without_free_descriptors() -> AsyncGenerator[None, None]:
    """Hold all file descriptors until SIGUSR1."""
    held: list[int] = []
    with suppress(OSError):
        while True:
            held.append(os.dup(0))

    async def free() -> None:
        await anext(signals)
        for fd in held:
            os.close(fd)

    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(free)
            yield
            nursery.cancel_scope.cancel()
