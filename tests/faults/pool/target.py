"""The handlers, which run in the workers, and write down what they do.

Invariant: each record is one write(2) to a file that is open with O_APPEND, so that none is lost,
torn or mixed with another if its process is killed.

A client sends a token, and gets it back. Records, a line each: ``begin`` job pid, before
anything was read; ``token`` job token; ``end`` job, when the answer has been sent. Some tokens
cause a fault in the worker: the second byte of the token says which.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import sys
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from trio_unixconn._frames import MAX_BODY, encode_frame
from trio_unixconn.pool import _protocol

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

#: The environment variable that names the file of the records.
RECORDS = "TRIO_UNIXCONN_POOL_FAULTS"
TOKEN_BYTES = 8


@asynccontextmanager
async def records() -> AsyncGenerator[int, None]:
    """Keep the file open while a worker lives; files beside it make workers wait, or fail."""
    directory = Path(os.environ[RECORDS]).parent
    while (directory / "hold").exists():
        await trio.sleep(0.01)
    if (directory / "fail").exists():
        raise LookupError("this worker was told to fail")
    fd = os.open(os.environ[RECORDS], os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


async def read_token(stream: Any) -> bytes:
    """Read a token; less if the client has closed before."""
    token = b""
    while len(token) < TOKEN_BYTES:
        more = await stream.receive_some(TOKEN_BYTES - len(token))
        if not more:
            break
        token += more
    return token


def pause_for(token: int) -> float:
    """Return how long a client waits for its answer: most of them not at all."""
    if token % 8:
        return 0.0
    return 0.2 if token % 64 == 0 else 0.02


async def answer(stream: Any, job: Any) -> bytes:
    """Send the token back, some after a pause, so that there is always something in flight."""
    if stream is None:
        # A call. One without data is answered at once.
        while job.data:
            await trio.sleep_forever()
        return b"answered"
    os.write(job.state, b"begin %d %d\n" % (job.id, os.getpid()))
    token = await read_token(stream)
    number = int.from_bytes(token, "big")
    os.write(job.state, b"token %d %d\n" % (job.id, number))
    if fault := fault_of(number):
        _FAULTS[fault](number)
    if pause := pause_for(number):
        await trio.sleep(pause)
    await stream.send_all(token)
    os.write(job.state, b"end %d\n" % job.id)
    return b""


async def burn(stream: Any, job: Any) -> None:
    """Compute without end, and without a checkpoint."""
    os.write(job.state, b"begin %d %d\n" % (job.id, os.getpid()))
    end = time.monotonic() + 3600
    while time.monotonic() < end:
        pass


################################################################
# Faults
################################################################

SEGFAULT, EXIT, CANCELLED, GENERATOR_EXIT, LIE, THREAD = range(1, 7)
_FIRST_FAULT = 128


def fault_of(token: int) -> int:
    """Return the fault that a token causes; 0 for none."""
    return max(0, (token >> 16 & 0xFF) - _FIRST_FAULT)


def first_token(fault: int) -> int:
    """Return the first of the tokens that cause a fault."""
    return int.from_bytes(bytes([127, _FIRST_FAULT + fault, 0, 1]), "big")


def _segfault(_: int) -> None:
    ctypes.string_at(0)


def _exit(_: int) -> None:
    sys.exit(1)


def _cancelled(_: int) -> None:
    raise asyncio.CancelledError


def _generator_exit(_: int) -> None:
    raise GeneratorExit


def _start_thread(_: int) -> None:
    """Leave a thread that keeps the process from exiting."""
    threading.Thread(target=time.sleep, args=(3600,)).start()


LIES = [
    encode_frame(255),
    _protocol.pack_batch_id(_protocol.TAKEN, 2**63),
    _protocol.pack_job_ids(_protocol.DONE, [2**63]),
    _protocol.pack_job_result(_protocol.ANSWER, 2**63, b"an answer"),
    _protocol.pack_ready(),
    encode_frame(_protocol.DONE)[:2] + (MAX_BODY + 1).to_bytes(4, sys.byteorder),
    # The end of the stream.
    b"",
]


def _lie(token: int) -> None:
    """Violate the protocol of the pool, and do nothing more."""
    with socket.socket(fileno=os.dup(int(sys.orig_argv[-4]))) as sock:
        lie = LIES[token % len(LIES)]
        if lie:
            sock.send(lie)
        else:
            sock.shutdown(socket.SHUT_WR)
    # The handlers of this worker that have not begun do not begin: the pool could not know it.
    time.sleep(3600)


_FAULTS = {
    SEGFAULT: _segfault,
    EXIT: _exit,
    CANCELLED: _cancelled,
    GENERATOR_EXIT: _generator_exit,
    LIE: _lie,
    THREAD: _start_thread,
}
