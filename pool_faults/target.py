"""The handlers, which run in the workers, and write down what they do.

The rule of this file: each record is one write(2) to a file that is open with O_APPEND, so that
none is lost, torn or mixed with another when its process is killed.

A client sends a token, and gets it back. Records, a line each: ``begin`` job pid, before
anything was read; ``token`` job token; ``end`` job, when the answer has been sent.
"""

from __future__ import annotations

import os
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

#: The environment variable that names the file of the records.
RECORDS = "TRIO_UNIXCONN_POOL_FAULTS"
TOKEN_BYTES = 8


@asynccontextmanager
async def records() -> AsyncGenerator[int, None]:
    """Have the file open while a worker lives."""
    fd = os.open(os.environ[RECORDS], os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


async def read_token(stream: Any) -> bytes:
    """Read a token; less, if the client has closed before."""
    token = b""
    while len(token) < TOKEN_BYTES:
        more = await stream.receive_some(TOKEN_BYTES - len(token))
        if not more:
            break
        token += more
    return token


def pause_for(token: int) -> float:
    """Return how long a client has to wait for its answer: most of them not at all."""
    if token % 8:
        return 0.0
    return 0.2 if token % 64 == 0 else 0.02


async def answer(stream: Any, job: Any) -> None:
    """Send the token back, some after a pause, so that there is always something in flight."""
    os.write(job.state, b"begin %d %d\n" % (job.id, os.getpid()))
    token = await read_token(stream)
    number = int.from_bytes(token, "big")
    os.write(job.state, b"token %d %d\n" % (job.id, number))
    if pause := pause_for(number):
        await trio.sleep(pause)
    await stream.send_all(token)
    os.write(job.state, b"end %d\n" % job.id)


async def burn(stream: Any, job: Any) -> None:  # noqa: ARG001 - a handler that never waits
    """Compute for ever, without a checkpoint."""
    os.write(job.state, b"begin %d %d\n" % (job.id, os.getpid()))
    end = time.monotonic() + 3600
    while time.monotonic() < end:
        pass
