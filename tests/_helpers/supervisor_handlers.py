"""What the workers of the supervisor's tests run. Tests and workers share a directory of files."""

from __future__ import annotations

import os
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from tests._helpers.pool_handlers import leave_free, note

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio_unixconn.pool import Job


def shared(name: str) -> Path:
    return Path(os.environ["POOL_FOLDER"], name)


def take_number() -> int:
    """Return how many workers have started before this one."""
    number = 0
    while True:
        try:
            shared(f"worker {number}").touch(exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return number


@asynccontextmanager
async def numbered() -> AsyncGenerator[int, None]:
    """Do what the test has written for the n-th worker: ``wait n``, ``fail n``, ``poor n``."""
    number = take_number()
    note("started", number)
    while shared(f"wait {number}").exists():
        await trio.sleep(0.005)
    if shared(f"fail {number}").exists():
        raise LookupError(f"worker {number} fails")
    note("ready", number)
    if shared(f"poor {number}").exists():
        leave_free(0)
    yield number
    note("left", number)


async def number(stream: Any, job: Job) -> bytes:
    """Return the number of this worker."""
    return str(job.state).encode()


async def leave_thread(stream: Any, job: Job) -> bytes:
    """Leave a thread that keeps this process alive."""
    threading.Thread(target=time.sleep, args=(600,)).start()
    return b"left"


async def grow(stream: Any, job: Job) -> bytes:
    """Use as many bytes of memory as the data says, for good."""
    KEPT.append(b"\1" * int(job.data))
    return b"grown"


KEPT: list[bytes] = []
