"""A job from its submission to its end, and the file descriptor that it owns.

Invariant: the file descriptor of a job is closed exactly once: when a worker has acknowledged
the job, or when the job has ended without that.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import attrs
import trio

from .._closing import close_fds, has_unread
from .._owner import DescriptorOwner
from . import _protocol

if TYPE_CHECKING:
    from collections.abc import Callable

_UNIX_FORMS = frozenset({_protocol.UNIX, _protocol.REFUSING})


class PendingJob(DescriptorOwner):
    """One job, until it is acknowledged; then, if an answer is due, until that has come.

    Attributes:
      id: the pool's number for it.
      fd: the descriptor, which this owns; -1 without one, and once it is closed.
      form: what the worker makes of it.
      worker: the index of the worker that must get it; None for any.
      wants_answer: whether what the handler returns is due.
      tries: how many workers were handed it, and did not acknowledge it.
      task: who waits for it; None if nobody does.
      sent: whether it is with a worker at this moment, or was acknowledged.
      outcome: None while it is under way; then a receipt, an answer, or an error to raise.
      raise_cancel: trio's, once who waits is cancelled and it cannot be taken back.
    """

    __slots__ = (
        "cause",
        "data",
        "fd",
        "form",
        "id",
        "outcome",
        "raise_cancel",
        "sent",
        "task",
        "tries",
        "wants_answer",
        "worker",
    )

    def __init__(
        self,
        number: int,
        fd: int,
        form: int,
        data: bytes = b"",
        *,
        worker: int | None = None,
        wants_answer: bool = False,
    ) -> None:
        self.id: int = number
        self.fd: int = fd
        self.form: int = form
        self.data: bytes = data
        self.worker: int | None = worker
        self.wants_answer: bool = wants_answer
        self.tries: int = 0
        self.task: trio.lowlevel.Task | None = None
        self.sent: bool = False
        self.outcome: Any = None
        self.cause: BaseException | None = None
        self.raise_cancel: Callable[[], Any] | None = None

    def close(self) -> None:
        """Close the pool's copy of the descriptor; closing twice is allowed."""
        fd = self.fd
        if fd >= 0:
            self.fd = -1
            # A peer can choose what a file server does, and what is in the queue of a Unix socket:
            # close(2) of either can block. For a TCP socket it cannot, unless this process has set
            # SO_LINGER.
            if self.form == _protocol.OTHER or (self.form in _UNIX_FORMS and has_unread(fd)):
                close_fds([fd])
                return
            # An error is about data that was written before; the descriptor is closed.
            with suppress(OSError):
                os.close(fd)

    def settle(self, outcome: Any) -> None:
        """Tell who waits what became of it: the first time counts."""
        if self.outcome is None:
            self.outcome = outcome
            self.wake()

    def wake(self) -> None:
        """Have who waits look again."""
        task, self.task = self.task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def __del__(self) -> None:
        if self.fd >= 0:
            self.close()


@attrs.frozen
class JobReceipt:
    """What :meth:`WorkerPool.submit` returns: who has taken a job.

    Attributes:
      id: the pool's number for the job, which its handler has as ``job.id``.
      worker: the index of the worker.
      pid: its process.
    """

    id: int
    worker: int
    pid: int
