"""PendingJob: one job, from its submission to its end.

The states of a job::

                 send                acknowledge                 settle
      QUEUED ------------>  SENT  ---------------> ACKNOWLEDGED --------> SETTLED
        ^  |                |  |                                             ^
        |  |    requeue     |  |                                             |
        +--|----------------+  +---- settle (rejected, cancelled) -----------+
           |                                                                 |
           +------------------- settle (rejected, cancelled, handed over) ---+

QUEUED: the job is in the queue of the pool. SENT: it was given to one worker, which has not said
yet whether it received it. ACKNOWLEDGED: the worker is about to call the handler, or has called
it; the job is never given to another worker after this. SETTLED: it has ended, in one of the ways
of :class:`JobEnd`.

A job is in one place at a time: in a lane of the queue, in the batch of a worker's handle, or in
its jobs in flight. Whatever ends one of these places settles or requeues its jobs. ``settle`` is
the only place that counts how jobs end, so that at every moment::

    submitted == (handled + failed + abandoned + rejected + cancelled + handed over
                  + queued + in flight)

A submitter is told once: ``submit`` when the job is acknowledged, ``call`` when it is settled, both
if it is settled before. A submitter that is cancelled while its job is queued takes it back
(settled as cancelled). Later it cannot: it waits for its outcome, and is cancelled afterwards if
the outcome is an error.

Invariant: every transition is made here, and each is checked. The file descriptor of a job is
closed exactly once: at acknowledge or at settle, whatever is first.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from .._closing import close_fds, has_unread
from .._owner import DescriptorOwner
from ._endpoints import EndpointKind, unpack_peer

if TYPE_CHECKING:
    from ._statistics import Counters

# close(2) of these can block if their peer chose so. That of the TCP kinds cannot: they are without
# SO_LINGER.
_FILES: Final = frozenset({EndpointKind.OTHER})
_UNIX_SOCKETS: Final = frozenset({EndpointKind.UNIX, EndpointKind.UNIX_WITHOUT_DESCRIPTORS})
_BLOCKING: Final = _FILES | _UNIX_SOCKETS

#: What a pool keeps of the data of a job that a worker has, for AbandonedJob, in bytes.
MAX_KEPT_DATA: Final = 4096


class JobState(enum.Enum):
    """The states of a job."""

    QUEUED = "queued"
    SENT = "sent"
    ACKNOWLEDGED = "acknowledged"
    SETTLED = "settled"


class JobEnd(enum.Enum):
    """How a job has ended; the values are names of counters."""

    HANDLED = "handled"
    FAILED = "failed"
    ABANDONED = "abandoned"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    HANDED_OVER = "handed_over"


# Before Python 3.12, each access to a member of an enum takes 0.1 us, and each to its value 0.3 us.
# Of the 28 us that a pool spends on a connection, that was one in ten.
_QUEUED: Final = JobState.QUEUED
_SENT: Final = JobState.SENT
_ACKNOWLEDGED: Final = JobState.ACKNOWLEDGED
_SETTLED: Final = JobState.SETTLED
_HANDLED: Final = JobEnd.HANDLED


@attrs.frozen
class JobReceipt:
    """The result of :meth:`WorkerPool.submit`: the worker that has accepted a job.

    Attributes:
      id: the pool's number for the job, which its handler has as ``job.id``.
      worker: the index of the worker.
      pid: its process ID.
    """

    id: int
    worker: int
    pid: int


class PendingJob(DescriptorOwner):
    """A job.

    Attributes:
      id: the pool's number for it. Jobs that were submitted later have higher numbers.
      fd: its file descriptor, which this owns; -1 if it has none or if it is closed.
      kind: what the worker makes of the file descriptor, an ``EndpointKind``.
      data: the bytes that its handler gets; after acknowledge the first MAX_KEPT_DATA of them.
      worker: the index of the only worker that may have it; None for any.
      wants_answer: whether the submitter waits for what the handler returns.
      passed: how many times handlers have passed its connection on.
      state: see the module.
      attempts: the number of workers that were given it and did not acknowledge it.
      refused_by: the process IDs of those that had no free file descriptor for it.
      cause: why the last attempt failed.
      outcome: what the submitter is told: a receipt, an answer, or an error to raise.
      raise_cancel: trio's function, if the submitter was cancelled too late to take it back.
      submitted_at: when it was submitted, in trio's time.
      acknowledged_at: when it was acknowledged.
    """

    __slots__ = (
        "_counters",
        "_peer",
        "_task",
        "acknowledged_at",
        "attempts",
        "cause",
        "data",
        "fd",
        "id",
        "kind",
        "outcome",
        "passed",
        "raise_cancel",
        "refused_by",
        "state",
        "submitted_at",
        "wants_answer",
        "worker",
    )

    def __init__(
        self,
        job_id: int,
        fd: int,
        kind: int,
        counters: Counters,
        submitted_at: float,
        data: bytes = b"",
        *,
        worker: int | None = None,
        wants_answer: bool = False,
        peer: Any = None,
        passed: int = 0,
    ) -> None:
        """Make a job that is queued.

        Args:
          peer: the address of its peer, as accept(2) or ``pack_peer`` has returned it.
        """
        self.id: int = job_id
        self.fd: int = fd
        self.kind: int = kind
        self.data: bytes = data
        self.worker: int | None = worker
        self.wants_answer: bool = wants_answer
        self._peer = peer
        self.passed: int = passed
        self.state: JobState = _QUEUED
        self.attempts: int = 0
        self.refused_by: tuple[int, ...] = ()
        self.cause: BaseException | None = None
        self.outcome: Any = None
        self.raise_cancel: Callable[[], Any] | None = None
        self.submitted_at: float = submitted_at
        self.acknowledged_at: float = submitted_at
        self._counters = counters
        self._task: trio.lowlevel.Task | None = None

    @property
    def peer(self) -> Any:
        """The address of the peer, if a server of the pool accepted the connection."""
        return unpack_peer(self._peer)

    ################################################################
    # Transitions
    ################################################################

    def send(self) -> None:
        """Queued to sent: a worker's handle has it in its batch."""
        if self.state is not _QUEUED:
            self._check(_QUEUED)
        self.state = _SENT

    def requeue(self, cause: BaseException) -> None:
        """Sent to queued: the worker has not acknowledged it."""
        self._check(_SENT)
        self.state = _QUEUED
        self.cause = cause

    def acknowledge(self, worker: int, pid: int, now: float) -> None:
        """Sent to acknowledged: the worker calls its handler. ``submit`` returns."""
        if self.state is not _SENT:
            self._check(_SENT)
        self.state = _ACKNOWLEDGED
        self.acknowledged_at = now
        if len(self.data) > MAX_KEPT_DATA:
            self.data = self.data[:MAX_KEPT_DATA]
        if self.fd >= 0:
            self.close()
        if self._task is not None and not self.wants_answer:
            self._tell(JobReceipt(self.id, worker, pid))

    def settle(self, end: JobEnd, outcome: Any = None) -> None:
        """Any state to settled: count how it ended, and tell the submitter unless it was told.

        Args:
          outcome: an answer in bytes, or an error. None with ``raise_cancel``.
        """
        if self.state is _SETTLED:
            raise RuntimeError(f"job {self.id} is settled already")
        self.state = _SETTLED
        counters = self._counters
        if end is _HANDLED:
            counters.handled += 1
        else:
            setattr(counters, end.value, getattr(counters, end.value) + 1)
        if self.fd >= 0:
            self.close()
        if self.outcome is None:
            self._tell(outcome)

    def _check(self, state: JobState) -> None:
        if self.state is not state:
            raise RuntimeError(f"job {self.id} must be {state.value}, got {self.state.value}")

    ################################################################
    # Its submitter
    ################################################################

    async def wait(self, cancel: Callable[[PendingJob], bool]) -> Any:
        """Wait for the outcome, and return or raise it.

        Args:
          cancel: called if the submitter is cancelled; it takes the job back and returns True, or
            it returns False, and this waits on.
        """

        @trio.lowlevel.enable_ki_protection
        def abort(raise_cancel: Callable[[], Any]) -> trio.lowlevel.Abort:
            task, self._task = self._task, None
            if cancel(self):
                return trio.lowlevel.Abort.SUCCEEDED
            self._task = task
            self.raise_cancel = raise_cancel
            return trio.lowlevel.Abort.FAILED

        if self.outcome is None and self.state is not _SETTLED:
            self._task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(abort)
        outcome = self.outcome
        is_error = isinstance(outcome, Exception)
        if self.raise_cancel is not None and (outcome is None or is_error):
            self.raise_cancel()
        if is_error:
            try:
                raise outcome
            finally:
                # The traceback refers to this frame.
                self.outcome = None
                del outcome
        return outcome

    def _tell(self, outcome: Any) -> None:
        self.outcome = outcome
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    @property
    def is_awaited(self) -> bool:
        """Whether a task waits for its outcome."""
        return self.wants_answer or self._task is not None or self.raise_cancel is not None

    ################################################################
    # Its file descriptor
    ################################################################

    def take_fd(self) -> int:
        """Return the file descriptor, which the caller owns then."""
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        """Close the pool's copy of the file descriptor; closing twice is allowed."""
        fd = self.fd
        if fd >= 0:
            self.fd = -1
            if self.kind in _BLOCKING and (self.kind in _FILES or has_unread(fd)):
                close_fds([fd])
                return
            try:  # of every job
                os.close(fd)
            except OSError:
                # EBADF: other code has closed it, which does not own it. Others are about data
                # that was written before, and the file descriptor is closed.
                pass

    def __del__(self) -> None:
        if self.fd >= 0:
            self.close()
