"""What a pool and a worker say to each other, as bytes; no input, no output.

The rule of this file: a frame that may carry descriptors is one message of its own, so that
those that came with a message are those of the frame that begins in it. A frame whose
descriptors were lost on arrival says so, and is handled as if it had never come.

Each frame is a header and a body. The header: its kind (1 byte), whether descriptors come with
it (1 byte), and the length of the body (4 bytes); in native byte order, as both ends are on one
machine.
"""

from __future__ import annotations

import struct
from array import array
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

# From the pool to a worker.
JOBS: Final = 1
CANCEL: Final = 2
DRAIN: Final = 3
# From a worker to the pool.
READY: Final = 16
FAILED: Final = 17
TAKEN: Final = 18
REFUSED: Final = 19
DONE: Final = 20
ANSWER: Final = 21
ERROR: Final = 22
BEAT: Final = 23
LEAVING: Final = 24
MORE: Final = 25

# How a descriptor is made into what the handler gets.
NO_DESCRIPTOR: Final = 0
TCP: Final = 1
TCP6: Final = 2
UNIX: Final = 3
OTHER: Final = 4
# A Unix socket that takes no descriptors.
REFUSING: Final = 5

#: Bytes that go with one job, or that answer one.
MAX_DATA: Final = 16 * 1024 * 1024

_header: Final = struct.Struct("=BBI")
_number: Final = struct.Struct("=I")
_job: Final = struct.Struct("=QBBI")
_id: Final = struct.Struct("=Q")
_seconds: Final = struct.Struct("=d")


class Frame(NamedTuple):
    """One frame.

    Attributes:
      fds: the descriptors that came with it, which the taker owns; None if they were lost.
    """

    kind: int
    body: bytes
    fds: list[int] | None


class SentJob(NamedTuple):
    """A job as it travels.

    Attributes:
      id: the pool's number for it.
      form: what is made of its descriptor: NO_DESCRIPTOR, TCP, and so on.
      wants_answer: whether what the handler returns is due.
    """

    id: int
    form: int
    wants_answer: bool
    data: bytes


class AnyJob(Protocol):
    """What a SentJob is made from: whatever has its attributes."""

    @property
    def id(self) -> int: ...
    @property
    def form(self) -> int: ...
    @property
    def wants_answer(self) -> bool: ...
    @property
    def data(self) -> bytes: ...


class ProtocolError(ValueError):
    """What came is no frame: the other end is not one of ours, or of another version."""


def frame(kind: int, body: bytes = b"", *, carries: bool = False) -> bytes:
    """Return a frame; ``carries`` if descriptors go with it."""
    return _header.pack(kind, carries, len(body)) + body


def jobs(batch: int, sent: Iterable[AnyJob], *, carries: bool) -> bytes:
    """Return the frame that hands jobs over; their descriptors go with it, in order."""
    parts = [_number.pack(batch)]
    for each in sent:
        parts.append(_job.pack(each.id, each.form, each.wants_answer, len(each.data)))
        if each.data:
            parts.append(each.data)
    return frame(JOBS, b"".join(parts), carries=carries)


def read_jobs(body: bytes) -> tuple[int, list[SentJob]]:
    """Return the number of a batch, and its jobs."""
    try:
        (batch,) = _number.unpack_from(body)
        at, end, found = _number.size, len(body), list[SentJob]()
        while at < end:
            each, form, wants_answer, size = _job.unpack_from(body, at)
            at += _job.size + size
            found.append(SentJob(each, form, bool(wants_answer), body[at - size : at]))
    except struct.error as exc:
        raise ProtocolError(f"a batch of jobs was due: {exc}") from exc
    if at != end:
        raise ProtocolError(f"a batch of jobs was due, but its last one lacks {at - end} bytes")
    return batch, found


def number(kind: int, value: int) -> bytes:
    """Return a frame whose body is the number of a batch: TAKEN, REFUSED."""
    return frame(kind, _number.pack(value))


def read_number(body: bytes) -> int:
    """Return the number of a batch."""
    try:
        return int(_number.unpack(body)[0])
    except struct.error as exc:
        raise ProtocolError(f"the number of a batch was due: {exc}") from exc


def ids(kind: int, values: Iterable[int]) -> bytes:
    """Return a frame whose body is numbers of jobs: DONE, CANCEL."""
    return frame(kind, array("Q", values).tobytes())


def read_ids(body: bytes) -> list[int]:
    """Return the numbers of jobs."""
    values = array("Q")
    try:
        values.frombytes(body)
    except ValueError as exc:
        raise ProtocolError(f"numbers of jobs were due: {exc}") from exc
    return values.tolist()


def about(kind: int, value: int, rest: bytes) -> bytes:
    """Return a frame about one job: ANSWER, ERROR."""
    return frame(kind, _id.pack(value) + rest)


def read_about(body: bytes) -> tuple[int, bytes]:
    """Return the number of a job, and the rest."""
    try:
        return int(_id.unpack_from(body)[0]), body[_id.size :]
    except struct.error as exc:
        raise ProtocolError(f"the number of a job was due: {exc}") from exc


def seconds(kind: int, value: float) -> bytes:
    """Return a frame whose body is a time: DRAIN."""
    return frame(kind, _seconds.pack(value))


def read_seconds(body: bytes) -> float:
    """Return a time."""
    try:
        return float(_seconds.unpack(body)[0])
    except struct.error as exc:
        raise ProtocolError(f"a time was due: {exc}") from exc


class Decoder:
    """Makes frames of what arrives, and gives each its descriptors."""

    def __init__(self) -> None:
        # What has come of frames that are not complete, how much, and how much is due.
        self._parts: list[bytes] = []
        self._have = 0
        self._due = 0
        # Of each message that carried descriptors; None where they were lost.
        self._arrived: deque[list[int] | None] = deque()

    def feed(self, data: bytes, fds: list[int] | None) -> list[Frame]:
        """Return the frames that are complete now.

        Args:
          fds: the descriptors that came with ``data``, owned by this from now on; None if some
            came and were lost.

        Raises:
          ProtocolError: this is not what a pool and a worker say to each other.
        """
        if fds is None or fds:
            self._arrived.append(fds)
        self._have += len(data)
        self._parts.append(data)
        if self._have < self._due:
            return []
        rest = data if len(self._parts) == 1 else b"".join(self._parts)
        self._due = 0
        at, end, size, found = 0, len(rest), _header.size, list[Frame]()
        while end - at >= size:
            kind, carries, length = _header.unpack_from(rest, at)
            if length > 2 * MAX_DATA:
                raise ProtocolError(f"a frame of {length} bytes came")
            behind = at + size + length
            if behind > end:
                self._due = behind - at
                break
            came: list[int] | None = []
            if carries:
                if not self._arrived:
                    raise ProtocolError("a frame came without the descriptors that it names")
                came = self._arrived.popleft()
            found.append(Frame(kind, rest[at + size : behind], came))
            at = behind
        self._parts = [rest[at:]] if at < end else []
        self._have = end - at
        return found
