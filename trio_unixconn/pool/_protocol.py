"""The frames that a pool and a worker exchange, as bytes. No I/O.

====================  ==================================================================
from the pool
====================  ==================================================================
JOBS                  a batch: its id, and the id, endpoint kind and data of each job
CANCEL                the ids of jobs whose callers were cancelled
DRAIN                 the seconds in which to finish; a later batch is refused
====================  ==================================================================

====================  ==================================================================
from a worker
====================  ==================================================================
READY                 it can accept jobs; with the versions of the protocol and the package
FAILED                it cannot start; with the traceback
TAKEN, REFUSED        a batch, by its id: its handlers begin; or it was not received, or
                      arrived after DRAIN
MORE                  it can accept another batch
DONE                  the ids of jobs whose handlers have returned
ANSWER                what the handler of a call has returned
ERROR                 the handler of a job has raised; with the traceback
BEAT                  the heartbeat
LEAVING               it was asked to terminate (SIGTERM)
====================  ==================================================================
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Iterable
from typing import Final, NamedTuple, Protocol

from .._frames import FrameError, encode_frame
from .._version import __version__

#: Changes whenever a frame changes.
PROTOCOL_VERSION: Final = 2

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

#: The whole text of an ERROR for a job whose handler was cancelled at the end of a drain. The
#: traceback of an exception is another text.
CANCELLED_BY_EXIT: Final = b"handler was cancelled because its worker is exiting"

#: The endpoint kind of a job without a file descriptor.
NO_DESCRIPTOR: Final = 0

#: The maximum number of bytes that travel with a job, or as its answer.
MAX_DATA: Final = 16 * 1024 * 1024

_batch: Final = struct.Struct("=Q")
_job: Final = struct.Struct("=QBBI")
_id: Final = struct.Struct("=Q")
_seconds: Final = struct.Struct("=d")


class ProtocolError(FrameError):
    """A pool or worker sent something that does not belong to the protocol at that moment."""


class SentJob(NamedTuple):
    """A job in a batch.

    Attributes:
      id: the pool's number for it.
      kind: what its file descriptor is, an ``EndpointKind``.
      wants_answer: whether the pool expects what the handler returns.
    """

    id: int
    kind: int
    wants_answer: bool
    data: bytes


class AnyJob(Protocol):
    """An object with the attributes of a SentJob."""

    @property
    def id(self) -> int: ...
    @property
    def kind(self) -> int: ...
    @property
    def wants_answer(self) -> bool: ...
    @property
    def data(self) -> bytes: ...


def pack_jobs(batch: int, jobs: Iterable[AnyJob], *, carries_fds: bool) -> bytes:
    """Return a JOBS frame; the file descriptors of the jobs are sent with it, in their order."""
    parts = [_batch.pack(batch)]
    for job in jobs:
        parts.append(_job.pack(job.id, job.kind, job.wants_answer, len(job.data)))
        if job.data:
            parts.append(job.data)
    return encode_frame(JOBS, b"".join(parts), carries_fds=carries_fds)


def unpack_jobs(body: bytes) -> tuple[int, list[SentJob]]:
    """Return the id of a batch, and its jobs."""
    try:
        (batch,) = _batch.unpack_from(body)
        start, end, jobs = _batch.size, len(body), list[SentJob]()
        while start < end:
            job_id, kind, wants_answer, size = _job.unpack_from(body, start)
            start += _job.size + size
            jobs.append(SentJob(job_id, kind, bool(wants_answer), body[start - size : start]))
    except struct.error as exc:
        raise ProtocolError(f"expected a batch of jobs: {exc}") from exc
    if start != end:
        raise ProtocolError(f"expected a batch of jobs, got {start - end} bytes too few")
    return batch, jobs


def pack_batch_id(kind: int, batch: int) -> bytes:
    """Return a TAKEN or REFUSED frame."""
    return encode_frame(kind, _batch.pack(batch))


def unpack_batch_id(body: bytes) -> int:
    try:
        return int(_batch.unpack(body)[0])
    except struct.error as exc:
        raise ProtocolError(f"expected the id of a batch: {exc}") from exc


def pack_job_ids(kind: int, ids: Iterable[int]) -> bytes:
    """Return a DONE or CANCEL frame."""
    return encode_frame(kind, array("Q", ids).tobytes())


def unpack_job_ids(body: bytes) -> list[int]:
    ids = array("Q")
    try:
        ids.frombytes(body)
    except ValueError as exc:
        raise ProtocolError(f"expected the ids of jobs: {exc}") from exc
    return ids.tolist()


def pack_job_result(kind: int, job_id: int, result: bytes) -> bytes:
    """Return an ANSWER or ERROR frame."""
    return encode_frame(kind, _id.pack(job_id) + result)


def unpack_job_result(body: bytes) -> tuple[int, bytes]:
    """Return the id of a job, and its answer or traceback."""
    try:
        return int(_id.unpack_from(body)[0]), body[_id.size :]
    except struct.error as exc:
        raise ProtocolError(f"expected the id of a job: {exc}") from exc


def pack_seconds(kind: int, seconds: float) -> bytes:
    """Return a DRAIN frame."""
    return encode_frame(kind, _seconds.pack(seconds))


def unpack_seconds(body: bytes) -> float:
    """Return a time in seconds."""
    try:
        return float(_seconds.unpack(body)[0])
    except struct.error as exc:
        raise ProtocolError(f"expected a time in seconds: {exc}") from exc


def pack_ready() -> bytes:
    """Return a READY frame with the versions of this process."""
    versions = {"protocol": PROTOCOL_VERSION, "version": __version__}
    return encode_frame(READY, json.dumps(versions).encode())


def check_ready(body: bytes) -> str | None:
    """Return why a worker with this READY frame cannot be used, or None if it can."""
    try:
        versions = json.loads(body)
        protocol, version = versions["protocol"], versions["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        protocol, version = None, "an unknown version"
    if (protocol, version) == (PROTOCOL_VERSION, __version__):
        return None
    return (
        f"the worker imported trio_unixconn {version!s:.40}, this process runs {__version__}; "
        "restart this program to use the new version"
    )
