"""The handlers of the random test, and what they do to their worker.

Each handler writes a line when it begins: the job's id and its process id. A handler that spoils
the stream from its worker to the pool writes 0 for the id first: after that, the pool cannot know
which jobs this worker has begun.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import sys
import threading
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio_unixconn.pool import WorkerInfo

_SPOIL = {b"close", b"write"}
_leaked: list[int] = []


@asynccontextmanager
async def record(info: WorkerInfo) -> AsyncGenerator[int, None]:
    """Open the file to which each handler writes a line when it begins; its path is the data."""
    fd = os.open(info.data, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


async def handle(stream: Any, job: Any) -> bytes:
    """Write down the job, and do what its data names; the answer begins with the job's id."""
    del stream
    name, _, argument = job.data.partition(b" ")
    os.write(job.state, b"%d %d\n" % (job.id, os.getpid()))
    if name in _SPOIL:
        os.write(job.state, b"0 %d\n" % os.getpid())
    await DEEDS[name.decode()](argument)
    return b"%d" % job.id


def _own_socket() -> int:
    """Return the file descriptor of the worker's connection to the pool."""
    return int(sys.orig_argv[-4])


async def _answer(_: bytes) -> None: ...


async def _sleep(seconds: bytes) -> None:
    await trio.sleep(float(seconds))


async def _shielded(seconds: bytes) -> None:
    """Ignore a cancellation for a while."""
    with trio.CancelScope(shield=True):
        await trio.sleep(float(seconds))


async def _block(seconds: bytes) -> None:
    """Compute without a checkpoint."""
    time.sleep(float(seconds))


async def _raise(_: bytes) -> None:
    raise RuntimeError("a handler that raises")


async def _raise_cancelled(_: bytes) -> None:
    raise asyncio.CancelledError


async def _exit(_: bytes) -> None:
    sys.exit(3)


async def _end_process(_: bytes) -> None:
    os._exit(4)


async def _segfault(_: bytes) -> None:
    ctypes.string_at(0)


async def _shut_down(how: bytes) -> None:
    """Shut down a half of the worker's own connection."""
    with socket.socket(fileno=os.dup(_own_socket())) as sock, suppress(OSError):
        sock.shutdown(int(how))


async def _close(_: bytes) -> None:
    """Close the worker's own connection, as a handler with a wrong number does."""
    with suppress(OSError):
        os.close(_own_socket())


async def _write(data: bytes) -> None:
    """Write to the worker's own connection."""
    with suppress(OSError):
        os.write(_own_socket(), bytes.fromhex(data.decode()))


async def _leak(_: bytes) -> None:
    """Open file descriptors until none is free."""
    while True:
        try:
            _leaked.append(os.dup(0))
        except OSError:
            return


async def _start_thread(seconds: bytes) -> None:
    """Leave a thread that keeps the process from exiting."""
    threading.Thread(target=time.sleep, args=(float(seconds),)).start()


DEEDS = {
    "answer": _answer,
    "sleep": _sleep,
    "shielded": _shielded,
    "block": _block,
    "raise": _raise,
    "raise-cancelled": _raise_cancelled,
    "exit": _exit,
    "end-process": _end_process,
    "segfault": _segfault,
    "shut-down": _shut_down,
    "close": _close,
    "write": _write,
    "leak": _leak,
    "thread": _start_thread,
}
