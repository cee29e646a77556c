"""A job on its way from who submits it to a worker, and the descriptor that it owns.

The rule of this file: from the moment a delivery is made, its descriptor is closed exactly
once: when a worker has acknowledged it, or when it is given up.

Sources: socket(7) (SO_DOMAIN, SO_TYPE, SO_ACCEPTCONN), fstat(2)
"""

from __future__ import annotations

import fcntl
import io
import os
import socket as stdlib_socket
import ssl
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from .. import _kernel
from .._buffers import bytes_of
from .._closing import close_fds, has_unread
from .._connection import UnixConnection
from .._fds import check_open, fileno
from .._fdtypes import DescriptorKind, is_memory, kind_of
from .._file_thread import call_in_file_thread
from .._guards import check_handover
from .._owner import DescriptorOwner
from .._receiver import RefusingReceiver
from .._sockopts import raw_socket
from ..errors import WrongDescriptorKindError
from . import _wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._buffers import Buffer

#: What can be submitted: a descriptor, or an object that owns one.
Submitted = Any

_FAMILIES: Final = {
    stdlib_socket.AF_INET: _wire.TCP,
    stdlib_socket.AF_INET6: _wire.TCP6,
    _kernel.AF_UNIX: _wire.UNIX,
}
# What is neither read nor written.
_NO_FILES: Final = {
    DescriptorKind.DIRECTORY,
    DescriptorKind.SYMBOLIC_LINK,
    DescriptorKind.ANONYMOUS,
}
_UNIX_FORMS: Final = frozenset({_wire.UNIX, _wire.REFUSING})
_O_PATH: Final[int] = getattr(os, "O_PATH", 0)


class Delivery(DescriptorOwner):
    """One job, until it is acknowledged; then, if an answer is due, until that has come.

    Attributes:
      id: the pool's number for it.
      fd: the descriptor, which this owns; -1 without one, and once it is closed.
      form: what the worker makes of it.
      to: the index of the worker that must get it; None for any.
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
        "to",
        "tries",
        "wants_answer",
    )

    def __init__(
        self,
        number: int,
        fd: int,
        form: int,
        data: bytes = b"",
        *,
        to: int | None = None,
        wants_answer: bool = False,
    ) -> None:
        self.id: int = number
        self.fd: int = fd
        self.form: int = form
        self.data: bytes = data
        self.to: int | None = to
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
            if self.form == _wire.OTHER or (self.form in _UNIX_FORMS and has_unread(fd)):
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


def checked_data(data: Buffer) -> bytes:
    """Return the bytes that go with a job.

    Raises:
      TypeError, ValueError: no buffer, or more than MAX_DATA bytes.
    """
    with bytes_of(data) as view:
        if len(view) > _wire.MAX_DATA:
            raise ValueError(
                f"a job carries at most {_wire.MAX_DATA} bytes, not {len(view)}; submit a sealed "
                "memfd instead"
            )
        return bytes(view)


async def take_over(what: Submitted) -> tuple[int, int]:
    """Take a descriptor out of what was submitted, which is closed or detached by that.

    No file server is asked in the trio thread: a file is flushed and closed in another one. Only
    for a file this is a checkpoint. If it is cancelled while a file server does not answer, the
    file is closed nevertheless, in that thread.

    Returns:
      The descriptor, which the caller owns, and its form.

    Raises:
      TypeError, ValueError, OSError, WrongDescriptorKindError: nothing that a handler can be
        given; it is as it was.
      ReadAheadError: a connection, or its socket, that has read messages ahead; likewise.
    """
    if isinstance(what, UnixConnection):
        refuses = isinstance(what._receiver, RefusingReceiver)  # noqa: SLF001 - of one package
        return what.detach(), _wire.REFUSING if refuses else _wire.UNIX
    if isinstance(what, trio.SocketStream):
        what = what.socket
    if isinstance(what, trio.socket.SocketType):
        raw = raw_socket(what)
        form = _form_of(raw.fileno())
        trio.lowlevel.notify_closing(raw)
        return what.detach(), form
    if isinstance(what, ssl.SSLSocket):
        raise TypeError(
            "an SSLSocket cannot be handed over: what it knows of the encryption is in this "
            "process; submit the plain socket, and have the handler wrap it"
        )
    if isinstance(what, stdlib_socket.socket):
        form = _form_of(what.fileno())
        return what.detach(), form
    number = fileno(what)
    check_open([number])
    form = _form_of(number)
    if isinstance(what, int):
        return number, form
    if not callable(getattr(what, "close", None)):
        raise TypeError(
            f"the pool takes ownership, and {type(what).__name__} has no close(); submit a "
            "duplicate of its file descriptor (os.dup)"
        )
    if is_memory(number):
        return _out_of_file(what, number), form
    return await call_in_file_thread(
        partial(_out_of_file, what, number), discard=lambda fd: close_fds([fd])
    ), form


def _out_of_file(what: Any, number: int) -> int:
    """Duplicate the descriptor of an object, and close the object."""
    if isinstance(what, (io.BufferedIOBase, io.TextIOBase)):
        # What is in its buffer belongs in front of what the worker writes.
        what.flush()
    fd = os.dup(number)
    try:
        what.close()
    except BaseException:
        close_fds([fd])
        raise
    return fd


def _form_of(fd: int) -> int:
    if fd < 0:
        raise ValueError("a descriptor that is open is due, but this one is closed")
    check_handover([fd])
    kind = kind_of(fd)
    if kind is DescriptorKind.SOCKET:
        return _form_of_socket(fd, kind)
    if kind in _NO_FILES:
        raise WrongDescriptorKindError(
            f"a stream socket, or a file to read or write, is due; a {kind.value} is neither", kind
        )
    if fcntl.fcntl(fd, fcntl.F_GETFL) & _O_PATH:
        raise WrongDescriptorKindError(
            f"a file to read or write is due; this {kind.value} was opened only as a path (O_PATH)",
            kind,
        )
    return _wire.OTHER


def _form_of_socket(fd: int, kind: DescriptorKind) -> int:
    sock = stdlib_socket.socket(fileno=fd)
    try:
        if sock.type != stdlib_socket.SOCK_STREAM:
            raise WrongDescriptorKindError("a stream socket is due, not one of another type", kind)
        option = _kernel.SO_ACCEPTCONN
        if option is not None and sock.getsockopt(_kernel.SOL_SOCKET, option):
            raise WrongDescriptorKindError(
                "a connected socket is due, but this one listens; submit what it accepts", kind
            )
        return _FAMILIES.get(sock.family, _wire.OTHER)
    finally:
        sock.detach()
