"""What the demonstration's two sides say to each other.

A request is one byte, followed by what its operation sends; an answer is one line of JSON.
Requests of one byte keep the stream in step with descriptors, whose byte a longer read could
swallow.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

if TYPE_CHECKING:
    from ..._connection import UnixConnection
    from ..._credentials import Credentials

FILE: Final = b"F"
TCP: Final = b"T"
CREDENTIALS_BY_AWAIT: Final = b"C"
CREDENTIALS_BY_CALLBACK: Final = b"c"
DESCRIPTORS: Final = b"D"

# The demonstration ends when a worker does not answer, or a file does not, for that long.
SECONDS_TO_ANSWER: Final = 60
_CHUNK: Final = 1 << 20


@attrs.frozen
class Seen:
    """What a process found at a descriptor.

    Attributes:
      identity: "device:inode", the same on both sides if it is the same open file.
      bytes: how many bytes it read.
      sha256: their digest, in hexadecimal.
    """

    identity: str
    bytes: int
    sha256: str


def identity_of(fd: int) -> str:
    """Return "device:inode" of an open file."""
    status = os.fstat(fd)
    return f"{status.st_dev}:{status.st_ino}"


async def digest(fd: int, read: Callable[[int, int, int], bytes]) -> Seen:
    """Read a descriptor to the end with ``read(fd, length, offset)``.

    Raises:
      OSError: from reading; ETIMEDOUT if a piece does not arrive.
    """
    # A read that waits forever is abandoned together with its thread, which goes on using
    # the number; so it has one of its own, which is then left open.
    own = os.dup(fd)
    total, sha256 = 0, hashlib.sha256()
    try:
        while True:
            chunk = None
            with trio.move_on_after(SECONDS_TO_ANSWER):
                chunk = await trio.to_thread.run_sync(
                    read, own, _CHUNK, total, abandon_on_cancel=True
                )
            if chunk is None:
                raise OSError(errno.ETIMEDOUT, f"no data for {SECONDS_TO_ANSWER} seconds")
            if not chunk:
                break
            total += len(chunk)
            sha256.update(chunk)
    except OSError as exc:
        if exc.errno != errno.ETIMEDOUT:
            os.close(own)
        raise
    os.close(own)
    return Seen(identity_of(fd), total, sha256.hexdigest())


def plain_read(fd: int, length: int, _offset: int) -> bytes:
    """Read at the position of the open file, which both processes share."""
    return os.read(fd, length)


def ids(credentials: Credentials) -> list[int]:
    """Return pid, uid and gid."""
    return [credentials.pid, credentials.uid, credentials.gid]


async def receive_exactly_one(connection: UnixConnection) -> bytes:
    """Return the next byte, or nothing at the end of the stream."""
    return await connection.receive_some(1)


async def send_answer(connection: UnixConnection, answer: Any) -> None:
    """Send one line of JSON."""
    await connection.send_all(json.dumps(answer).encode() + b"\n")


async def receive_answer(connection: UnixConnection) -> Any:
    """Receive one line of JSON, after which nothing may follow.

    Raises:
      EOFError: the stream ended before.
    """
    line = b""
    while not line.endswith(b"\n"):
        more = await connection.receive_some()
        if not more:
            raise EOFError("the worker ended before it answered")
        line += more
    return json.loads(line)


def count_descriptors() -> int:
    """Return how many descriptors this process has open, from /proc/self/fd or /dev/fd."""
    directory = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    # One of them is the listing's own.
    return len(os.listdir(directory)) - 1
