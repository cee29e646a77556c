"""The frames that a pool and a worker exchange, as bytes. No I/O.

====================  ==================================================================
from the pool
====================  ==================================================================
JOBS                  a batch: its id, and the id, endpoint kind and data of each job
CANCEL                the ids of jobs whose callers were cancelled
DRAIN                 the seconds in which to finish; a later batch is refused
PASSED                the pool has a connection that was passed on, or cannot have it
SOCKETS               the first listening sockets of the next ACCEPT, if they are too many for
                      one message; with their file descriptors
ACCEPT                accept connections from these listening sockets; with the file descriptors
                      of the log in which to note them, and of the last sockets
STOP                  accept no more
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
PASS                  the handler of a job has passed its connection on; with its file
                      descriptor, and the data for the next handler
BEAT                  the heartbeat
LEAVING               it was asked to terminate (SIGTERM)
STOPPED               it has closed the listening sockets, or has none
STARVED               it had no free file descriptor to accept a connection, or to receive the
                      listening sockets; then they are sent again
ENOUGH                it has accepted as many connections as ACCEPT says
IDLE                  after DRAIN: its handlers have ended
====================  ==================================================================
"""

from __future__ import annotations

import enum
import json
import struct
from array import array
from collections.abc import Iterable
from typing import Final, NamedTuple, Protocol, cast

from .._frames import FrameError, encode_frame
from .._version import __version__

#: Changes whenever a frame changes.
PROTOCOL_VERSION: Final = 5

# From the pool to a worker.
JOBS: Final = 1
CANCEL: Final = 2
DRAIN: Final = 3
PASSED: Final = 4
ACCEPT: Final = 5
STOP: Final = 6
SOCKETS: Final = 7
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
PASS: Final = 26
STOPPED: Final = 27
STARVED: Final = 28
ENOUGH: Final = 29
IDLE: Final = 30

# Between a pool and a template. A template begins with READY or FAILED, too.
FORK: Final = 40
REAP: Final = 41
FORKED: Final = 42
NOT_FORKED: Final = 43
REAPED: Final = 44
#: The exit status of a worker that was not reaped by its template.
UNKNOWN_STATUS: Final = 256

#: The whole text of an ERROR for a job whose handler was cancelled at the end of a drain. The
#: traceback of an exception is another text.
CANCELLED_BY_EXIT: Final = b"handler was cancelled because its worker is exiting"

#: The endpoint kind of a job without a file descriptor.
NO_DESCRIPTOR: Final = 0

#: The maximum number of bytes that travel with a job, or as its answer.
MAX_DATA: Final = 16 * 1024 * 1024

#: The upper bounds of the buckets of a latency histogram, in seconds; one more has no bound.
LATENCY_BOUNDS: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)

_batch: Final = struct.Struct("=Q")
_job: Final = struct.Struct("=QBBHI")
_id: Final = struct.Struct("=Q")
_drain: Final = struct.Struct("=d?")
_passed: Final = struct.Struct("=QB")
_number: Final = struct.Struct("=i")

#: The maximum number of moves that are counted.
MAX_PASSED: Final = 2**16 - 1


class PassVerdict(enum.IntEnum):
    """What a pool says about a connection that was passed on."""

    #: The pool has it, for another handler, and the job has ended.
    TAKEN = 0
    #: The pool had no free file descriptor for it, and the job has not ended.
    RETRY = 1
    #: No worker will accept it; the pool has closed it, and the job has ended.
    CLOSED = 2


class ProtocolError(FrameError):
    """A pool or worker sent something that does not belong to the protocol at that moment."""


class SentJob(NamedTuple):
    """A job in a batch.

    Attributes:
      id: the pool's number for it.
      kind: what its file descriptor is, an ``EndpointKind``.
      wants_answer: whether the pool expects what the handler returns.
      passed: how many times its connection was passed on.
    """

    id: int
    kind: int
    wants_answer: bool
    passed: int
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
    def passed(self) -> int: ...
    @property
    def data(self) -> bytes: ...


def pack_jobs(batch: int, jobs: Iterable[AnyJob], *, carries_fds: bool) -> bytes:
    """Return a JOBS frame; the file descriptors of the jobs are sent with it, in their order."""
    parts = [_batch.pack(batch)]
    for job in jobs:
        parts.append(_job.pack(job.id, job.kind, job.wants_answer, job.passed, len(job.data)))
        if job.data:
            parts.append(job.data)
    return encode_frame(JOBS, b"".join(parts), carries_fds=carries_fds)


def unpack_jobs(body: bytes) -> tuple[int, list[SentJob]]:
    """Return the id of a batch, and its jobs."""
    try:
        (batch,) = _batch.unpack_from(body)
        start, end, jobs = _batch.size, len(body), list[SentJob]()
        while start < end:
            job_id, kind, wants_answer, passed, size = _job.unpack_from(body, start)
            start += _job.size + size
            data = body[start - size : start]
            jobs.append(SentJob(job_id, kind, bool(wants_answer), passed, data))
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
    """Return an ANSWER or ERROR frame, or a PASS frame, whose file descriptor is sent with it."""
    return encode_frame(kind, _id.pack(job_id) + result, carries_fds=kind == PASS)


def unpack_job_result(body: bytes) -> tuple[int, bytes]:
    """Return the id of a job, and its answer, traceback or data."""
    try:
        return int(_id.unpack_from(body)[0]), body[_id.size :]
    except struct.error as exc:
        raise ProtocolError(f"expected the id of a job: {exc}") from exc


def pack_drain(seconds: float, *, is_replaced: bool) -> bytes:
    """Return a DRAIN frame; ``is_replaced`` if other workers go on."""
    return encode_frame(DRAIN, _drain.pack(seconds, is_replaced))


def unpack_drain(body: bytes) -> tuple[float, bool]:
    """Return a time in seconds, and whether other workers go on."""
    try:
        seconds, is_replaced = _drain.unpack(body)
    except struct.error as exc:
        raise ProtocolError(f"expected a time in seconds: {exc}") from exc
    return float(seconds), bool(is_replaced)


def pack_passed(job_id: int, verdict: PassVerdict) -> bytes:
    """Return a PASSED frame."""
    return encode_frame(PASSED, _passed.pack(job_id, verdict))


def unpack_passed(body: bytes) -> tuple[int, PassVerdict]:
    """Return the id of a job whose connection was passed on, and what became of that."""
    try:
        job_id, verdict = _passed.unpack(body)
        return int(job_id), PassVerdict(verdict)
    except (struct.error, ValueError) as exc:
        raise ProtocolError(f"expected the id of a job and a verdict: {exc}") from exc


def pack_sockets() -> bytes:
    """Return a SOCKETS frame."""
    return encode_frame(SOCKETS, carries_fds=True)


def pack_starved(*, has_sockets: bool) -> bytes:
    """Return a STARVED frame."""
    return encode_frame(STARVED, bytes([has_sockets]))


def unpack_starved(body: bytes) -> bool:
    """Return whether a worker without a free file descriptor has the listening sockets."""
    if body not in {b"\0", b"\1"}:
        raise ProtocolError(f"expected whether it has the listening sockets, got {body!r:.40}")
    return body == b"\1"


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


def pack_pid(kind: int, number: int) -> bytes:
    """Return a frame whose body is a process id or an exit status."""
    return encode_frame(kind, _number.pack(number))


def pack_forked(pid: int) -> bytes:
    """Return the frame of a template that has forked a worker; its pidfd goes with it."""
    return encode_frame(FORKED, _number.pack(pid), carries_fds=True)


def unpack_pid(body: bytes) -> int:
    """Return the process id or the exit status.

    Raises:
      ProtocolError: it is none.
    """
    try:
        (number,) = _number.unpack(body)
    except struct.error as exc:
        raise ProtocolError("expected the number of a process") from exc
    return cast("int", number)
