"""One connected socket: whether it is open, and what its errors mean.

Invariant: every error of the kernel about a connection is translated here, with the ``OSError`` as
its cause, and with how much had been sent.

Sources: unix(7), sendmsg(2), recvmsg(2), trio's SocketStream
"""

from __future__ import annotations

import errno
import os
import socket as stdlib_socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Final, Protocol, TypeAlias, TypeVar

import trio
from trio.lowlevel import cancel_shielded_checkpoint

from ._owner import DescriptorOwner
from ._trio_task import explain
from .errors import (
    ConnectionBrokenError,
    ConnectionBusyError,
    ConnectionClosedError,
    DescriptorsRefusedError,
    SendError,
    UnixConnectionError,
)

if TYPE_CHECKING:
    from ._ancillary import SentCredentials
    from ._credentials import Credentials

_ErrorT = TypeVar("_ErrorT", bound=UnixConnectionError)

# For how long a send is tried again when a resource is exhausted, in seconds.
RETRY_TIMEOUT: Final = 30.0

_PEER_GONE: Final = frozenset(
    {errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED, errno.ENOTCONN, errno.ESHUTDOWN}
)

# A RuntimeError: outside of a trio task.
FAILURES: Final = (OSError, trio.ClosedResourceError, trio.BusyResourceError, RuntimeError)
Failure: TypeAlias = OSError | trio.ClosedResourceError | trio.BusyResourceError | RuntimeError


class SendAttempt(Protocol):
    """What a failed send tried to do, for its error.

    Attributes:
      sent, total, unit: how much was sent, of how much, in what.
      is_message: whether it was one message, and not just bytes of a stream.
    """

    sent: int
    total: int
    credentials: SentCredentials | None
    is_message: bool

    @property
    def fds(self) -> Sequence[int]:
        """The file descriptors."""
        ...

    @property
    def unit(self) -> str:
        """What ``sent`` counts."""
        ...


class ConnectedSocket(DescriptorOwner):
    """The part of a connected Unix stream socket that both directions share.

    Attributes:
      socket: the trio socket.
      raw: the standard library socket beneath it.
    """

    __slots__ = ("raw", "socket")

    # What the user calls it, for errors.
    noun: ClassVar[str] = "connection"

    def __init__(self, socket: trio.socket.SocketType, raw: stdlib_socket.socket) -> None:
        self.socket: trio.socket.SocketType = socket
        self.raw: stdlib_socket.socket = raw

    def is_closed(self) -> bool:
        """Whether this side has closed or detached the socket."""
        return self.raw.fileno() == -1

    def check_open(self) -> None:
        """Raise unless the socket is open.

        Raises:
          ConnectionClosedError: this side has closed it.
        """
        if self.is_closed():
            raise self._closed()

    def _closed(self) -> ConnectionClosedError:
        return ConnectionClosedError(f"this {self.noun} is closed")

    async def failed(
        self,
        exc: Failure,
        attempt: SendAttempt | None = None,
    ) -> UnixConnectionError:
        """Return the error to raise for ``exc``, after a checkpoint.

        Args:
          attempt: what could not be sent; None for other operations.

        Raises:
          RuntimeError: ``exc``, or what it means if no trio task runs this.
        """
        if isinstance(exc, RuntimeError):
            raise explain(exc)
        error = self.error_of(exc, attempt)
        if attempt is not None:
            error.sent = attempt.sent
        await cancel_shielded_checkpoint()
        return error

    def error_of(
        self,
        exc: OSError | trio.ClosedResourceError | trio.BusyResourceError,
        attempt: SendAttempt | None = None,
    ) -> UnixConnectionError:
        """Return the error to raise for ``exc``; the arguments are those of :meth:`failed`."""
        if isinstance(exc, trio.BusyResourceError):
            return ConnectionBusyError(
                f"another task is waiting for the socket of this {self.noun}"
            )
        if self.is_closed() or isinstance(exc, trio.ClosedResourceError):
            return self._closed()
        if exc.errno == errno.EPIPE and self.socket.did_shutdown_SHUT_WR:
            return ConnectionClosedError("cannot send after send_eof()")
        if attempt is None or exc.errno in _PEER_GONE or not (attempt.is_message or attempt.fds):
            # As trio's streams: every other error of plain bytes is a broken stream, too.
            return ConnectionBrokenError(f"connection is broken: {exc}")
        return _rejected(exc, attempt)


def with_sent(error: _ErrorT, sent: int) -> _ErrorT:
    """Return ``error`` with ``.sent``; a local variable for it would be a reference cycle."""
    error.sent = sent
    return error


def _rejected(exc: OSError, attempt: SendAttempt) -> SendError:
    """Return the error for a message that the kernel rejects, while the peer is still there."""
    sent = f"{attempt.sent} of {attempt.total} {attempt.unit} were sent"
    sent = sent if attempt.sent else "nothing was sent"
    claimed = attempt.credentials
    if claimed is not None and (claimed == "own" or _is_own(claimed)):
        claimed = None
    if exc.errno == errno.EPERM and attempt.fds and claimed is None:
        return DescriptorsRefusedError(
            errno.EPERM, f"peer does not accept file descriptors (SO_PASSRIGHTS=0); {sent}"
        )
    reason = exc.strerror
    if exc.errno == errno.EPERM and claimed is not None:
        reason = "only a privileged process can send credentials other than its own"
        if attempt.fds:
            reason += ", or the peer does not accept file descriptors (SO_PASSRIGHTS=0)"
    elif exc.errno == errno.ESRCH and claimed is not None:
        reason = "no process has the pid of these credentials"
    elif exc.errno == errno.EMFILE:
        reason = (
            "no file descriptor is free for the duplicate that waits in place of the one to send "
            f"(RLIMIT_NOFILE is {_nofile()}); raise the limit, or send fewer at a time"
        )
    elif exc.errno == errno.EBADF and attempt.fds:
        reason = "a file descriptor to send is closed"
    elif exc.errno == errno.EINVAL and attempt.fds:
        reason = f"{reason}: the kernel does not send a file descriptor of this kind (io_uring)"
    return SendError(exc.errno or 0, f"{reason}; {sent}")


def _is_own(credentials: Credentials) -> bool:
    """Whether a process without privileges can send these credentials."""
    uids = os.getresuid() if hasattr(os, "getresuid") else (os.getuid(), os.geteuid())
    gids = os.getresgid() if hasattr(os, "getresgid") else (os.getgid(), os.getegid())
    return credentials.pid == os.getpid() and credentials.uid in uids and credentials.gid in gids


def limit_error(number: int) -> OSError:
    """Return the error for a resource that stayed exhausted for RETRY_TIMEOUT."""
    if number == errno.ETOOMANYREFS:
        reason = (
            f"this user has more file descriptors in flight than RLIMIT_NOFILE ({_nofile()}) "
            "allows, or sockets are nested too deeply; receive those in flight, or raise the limit"
        )
    elif number == errno.ENOBUFS:
        reason = (
            "the control message does not fit into the memory that net.core.optmem_max "
            f"({_optmem_max()}) allows; raise it with sysctl, or send fewer file descriptors in "
            "a message"
        )
    else:
        reason = "the system is out of memory"
    return OSError(
        number, f"{os.strerror(number)}, and still so after {RETRY_TIMEOUT:g} s: {reason}"
    )


def _nofile() -> str:
    try:
        import resource  # not on Windows
    except ImportError:  # pragma: no cover - Windows
        return "unknown"
    return str(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _optmem_max() -> str:
    try:
        with open("/proc/sys/net/core/optmem_max", encoding="ascii") as file:
            return f"{file.read().strip()} bytes"
    except OSError:
        return "unknown"
