"""The connections that workers accept by themselves, as their pool sees them.

``AcceptPlan`` says from which listening sockets workers accept, and counts what all of them have
accepted. ``AcceptedJobs`` is the account of one worker. Its log (``_accept_log``) is read when
values are needed; there is no message for a connection.

The id of such a job has the worker's serial number above ID_BITS, and its own number below. The ids
of other jobs, which the pool numbers itself, never become so large.

Invariant: each connection that a worker has noted is in flight, or was counted once as handled,
failed or abandoned.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from .._frames import encode_frame
from .._owner import DescriptorOwner
from . import _protocol
from ._accept_log import MAX_SLOTS, AcceptedConnection, AcceptLog, AcceptTotals
from ._endpoints import EndpointKind, local_name
from ._pending import JobEnd, JobState, PendingJob
from ._protocol import LATENCY_BOUNDS, ProtocolError

if TYPE_CHECKING:
    import socket as stdlib_socket

    from ._statistics import Counters

#: The bits of a job's id that are the worker's number for it: 34 years at 1,000 a second.
ID_BITS: Final = 40
_NUMBER: Final = 2**ID_BITS - 1


@attrs.frozen
class SharedListener:
    """A listening socket that workers accept from.

    Attributes:
      sock: the socket, which stays its owner's.
      kind: what its connections are, an ``EndpointKind``.
      name: what to call it in the log.
      policy: what ``describe_policy`` has returned for its policy; None if it has none.
    """

    sock: stdlib_socket.socket
    kind: int
    name: str
    policy: object = None


@attrs.frozen
class Progress:
    """What was new in a log: the numbers of jobs that were accepted, handled, and failed."""

    accepted: int = 0
    handled: int = 0
    failed: int = 0


@attrs.define(eq=False)
class AcceptPlan:
    """From which sockets the workers of a pool accept.

    Attributes:
      limit: the number of jobs that a worker handles at a time.
      is_over: whether workers are to stop.
      accepted: the number of connections that workers have accepted.
      denied: the number of those that a policy has denied.
      without_descriptors: the names of Unix sockets whose connections must not receive file
        descriptors.
    """

    listeners: Sequence[SharedListener]
    limit: int
    is_over: bool = False
    accepted: int = 0
    denied: int = 0
    without_descriptors: frozenset[Any] = attrs.field(init=False, default=frozenset())
    _serials: Iterator[int] = attrs.field(factory=lambda: itertools.count(1), init=False)

    def __attrs_post_init__(self) -> None:
        refusing = EndpointKind.UNIX_WITHOUT_DESCRIPTORS
        self.without_descriptors = frozenset(
            local_name(each.sock.fileno()) for each in self.listeners if each.kind == refusing
        )

    def next_base(self) -> int:
        """Return the id before the first one of another worker."""
        return next(self._serials) << ID_BITS

    def pack(self, base: int, enough: float) -> bytes:
        """Return an ACCEPT frame for a worker.

        Args:
          enough: after how many connections the worker reports that; infinity for never.
        """
        message = {
            "base": base,
            "limit": self.limit,
            "enough": enough if enough < float("inf") else 0,
            "listeners": [[each.kind, each.name, each.policy] for each in self.listeners],
        }
        return encode_frame(_protocol.ACCEPT, json.dumps(message).encode(), carries_fds=True)

    def fds(self) -> list[int]:
        """Return the file descriptors of the sockets; -1 for those that are closed."""
        return [each.sock.fileno() for each in self.listeners]


class AcceptedJobs(DescriptorOwner):
    """What one worker has accepted.

    Args:
      enough: after how many connections the worker reports that.

    Attributes:
      base: the id before that of its first job.
      accepted, handled, failed: the numbers of its jobs.
      denied: the number of connections that a policy has denied.
      in_flight: the number of jobs that it is handling.

    Raises:
      OSError: EMFILE, ENOMEM.
    """

    def __init__(self, plan: AcceptPlan, enough: float, counters: Counters) -> None:
        self.log: AcceptLog = AcceptLog(min(plan.limit, MAX_SLOTS))
        self.base: int = plan.next_base()
        self.accepted: int = 0
        self.handled: int = 0
        self.failed: int = 0
        self.denied: int = 0
        self.in_flight: int = 0
        self._plan = plan
        self._enough = enough
        self._counters = counters
        self._nanoseconds = 0
        self._counts = (0,) * (len(LATENCY_BOUNDS) + 1)
        self._noticed = (0, 0)
        # Jobs whose slots are still in use, although the pool knows how they have ended: the pool
        # has their connections, or the end of the worker has cancelled their handlers.
        self._passed: set[int] = set()
        self._cancelled: set[int] = set()

    def pack(self) -> bytes:
        """Return an ACCEPT frame."""
        return self._plan.pack(self.base, self._enough)

    def owns(self, job_id: int) -> bool:
        """Whether this is the id of a job that the worker may have accepted."""
        return job_id & ~_NUMBER == self.base and bool(job_id & _NUMBER)

    def progress(self) -> tuple[int, int]:
        """Return how many jobs were counted as accepted, and handled, since the last call."""
        accepted, handled = self._noticed
        self._noticed = (self.accepted, self.handled)
        return self.accepted - accepted, self.handled - handled

    def sync(self) -> Progress:
        """Count what has happened since the last time.

        Raises:
          ProtocolError: the log contradicts itself, or what it said before.
        """
        totals = self.log.totals()
        if totals is None:
            return Progress()
        failed = totals.failed + len(self._cancelled)
        in_flight = totals.in_use - len(self._cancelled)
        handled = totals.accepted - failed - in_flight
        if (
            not 0 <= in_flight <= self.log.size
            or handled < self.handled
            or failed < self.failed
            or totals.denied < self.denied
            or totals.nanoseconds < self._nanoseconds
            or any(new < old for new, old in zip(totals.counts, self._counts, strict=True))
        ):
            raise ProtocolError("its account of accepted connections contradicts itself")
        self.in_flight = in_flight
        if self._passed:
            self._passed.intersection_update(self.log.numbers(totals.top))
        return self._count(totals, handled, failed)

    def _count(self, totals: AcceptTotals, handled: int, failed: int) -> Progress:
        counters, plan = self._counters, self._plan
        accepted = handled + failed + self.in_flight
        new = accepted - self.accepted
        progress = Progress(new, handled - self.handled, failed - self.failed)
        counters.submitted += new
        counters.acknowledged += new
        # A connection that a worker accepts does not wait in the pool.
        counters.wait.add_without_wait(new)
        counters.handled += progress.handled
        counters.failed += progress.failed
        counters.handling.merge(
            [now - before for now, before in zip(totals.counts, self._counts, strict=True)],
            (totals.nanoseconds - self._nanoseconds) * 1e-9,
        )
        denied = totals.denied - self.denied
        plan.accepted += new + denied
        plan.denied += denied
        self.accepted, self.handled, self.failed = accepted, handled, failed
        self.denied += denied
        self._counts, self._nanoseconds = totals.counts, totals.nanoseconds
        return progress

    def check(self, job_id: int) -> None:
        """Raise unless the worker may report a failure of this job.

        Raises:
          ProtocolError: it has not accepted it.
        """
        if not job_id & _NUMBER <= self.log.peek().accepted:
            raise ProtocolError(f"job {job_id} was not accepted")

    def kind_of(self, claimed: int, fd: int) -> int:
        """Return what the connection of a job is, of which the worker only claims that.

        The kernel gives a Unix socket the name of the listener that accepted it.

        Raises:
          ProtocolError: no listener has such connections.
        """
        if all(each.kind != claimed for each in self._plan.listeners):
            raise ProtocolError(f"a connection of kind {claimed} is that of no listener")
        if claimed == EndpointKind.UNIX and local_name(fd) in self._plan.without_descriptors:
            return EndpointKind.UNIX_WITHOUT_DESCRIPTORS
        return claimed

    def note_cancelled(self, job_id: int) -> None:
        """Count a job as failed whose handler was cancelled by the end of the worker.

        Raises:
          ProtocolError: the worker does not handle it.
        """
        self.find(job_id)
        self._cancelled.add(job_id & _NUMBER)

    def note_passed(self, job_id: int) -> None:
        """Note that the pool has the connection of a job, or has closed it.

        Its slot stays in use until the worker knows. If it dies before, the job was handled.
        """
        self._passed.add(job_id & _NUMBER)

    def find(self, job_id: int) -> AcceptedConnection:
        """Return a connection that the worker handles.

        Raises:
          ProtocolError: it does not handle it.
        """
        number = job_id & _NUMBER
        if number not in self._passed and number not in self._cancelled:
            # Not connections(), which parses the address of each peer.
            numbers = self.log.numbers(self.log.peek().top)
            if number in numbers:
                return self.log.connection(numbers.index(number))
        raise ProtocolError(f"job {job_id} is not in flight")

    def settle(self) -> tuple[Progress, list[PendingJob]]:
        """Count everything after the death of the worker; also return what it was handling."""
        totals = self.log.peek()
        lost: dict[int, AcceptedConnection] = {
            each.number: each
            for each in self.log.connections(totals.top)
            if each.number not in self._passed and each.number not in self._cancelled
        }
        # It can have died between two writes, and its claims can contradict each other.
        accepted = max(totals.accepted, self.accepted, *lost, 0)
        failed = max(totals.failed + len(self._cancelled), self.failed)
        handled = max(accepted - failed - len(lost), self.handled)
        counts = tuple(map(max, totals.counts, self._counts))
        self.in_flight = len(lost)
        denied = max(totals.denied, self.denied)
        nanoseconds = max(totals.nanoseconds, self._nanoseconds)
        settled = attrs.evolve(totals, counts=counts, denied=denied, nanoseconds=nanoseconds)
        progress = self._count(settled, handled, failed)
        self.in_flight = 0
        return progress, [self._abandon(each) for each in lost.values()]

    def _abandon(self, lost: AcceptedConnection) -> PendingJob:
        now = trio.current_time()
        # The clocks of two processes are the same, but trio's are not.
        seconds = max(0.0, (time.monotonic_ns() - lost.accepted_at) * 1e-9)
        job = PendingJob(
            self.base | lost.number & _NUMBER, -1, lost.kind, self._counters, now, peer=lost.peer
        )
        job.state = JobState.ACKNOWLEDGED
        job.acknowledged_at = now - seconds
        job.settle(JobEnd.ABANDONED)
        return job

    def close(self) -> None:
        """Close the log; closing twice is allowed."""
        self.log.close()
