"""Every exception of the library.

Invariant: a name says which side is at fault, each class inherits the builtin or trio class that
callers already catch, and each has Gio's code for the same situation, so that ported code can
compare it.

Wrong arguments are plain ``TypeError`` and ``ValueError``, raised before anything happens.
"""

from __future__ import annotations

import enum
import errno
import os
from typing import Any, Final

import trio

__all__ = [
    "AddressInUseError",
    "ConnectionBrokenError",
    "ConnectionBusyError",
    "ConnectionClosedError",
    "DatagramTruncatedError",
    "DescriptorsRefusedError",
    "DescriptorsTruncatedError",
    "EndOfStreamError",
    "HandlerError",
    "IOErrorEnum",
    "JobRefusedError",
    "NotSupportedError",
    "OperationCancelled",
    "PeerDeniedError",
    "PeerGoneError",
    "PoolClosedError",
    "ReadAheadError",
    "SendError",
    "SuccessorGoneError",
    "TakeOverError",
    "UnexpectedControlMessageError",
    "UnexpectedDescriptorsError",
    "UnixConnectionError",
    "UnsafeBufferError",
    "UpgradeFailedError",
    "WorkerDiedError",
    "WorkerStartError",
    "WrongDescriptorKindError",
]


class IOErrorEnum(enum.IntEnum):
    """The error codes of Gio, with Gio's numbers.

    Source: https://docs.gtk.org/gio/error.IOErrorEnum.html
    """

    FAILED = 0
    NOT_FOUND = 1
    EXISTS = 2
    IS_DIRECTORY = 3
    NOT_DIRECTORY = 4
    NOT_EMPTY = 5
    NOT_REGULAR_FILE = 6
    NOT_SYMBOLIC_LINK = 7
    NOT_MOUNTABLE_FILE = 8
    FILENAME_TOO_LONG = 9
    INVALID_FILENAME = 10
    TOO_MANY_LINKS = 11
    NO_SPACE = 12
    INVALID_ARGUMENT = 13
    PERMISSION_DENIED = 14
    NOT_SUPPORTED = 15
    NOT_MOUNTED = 16
    ALREADY_MOUNTED = 17
    CLOSED = 18
    CANCELLED = 19
    PENDING = 20
    READ_ONLY = 21
    CANT_CREATE_BACKUP = 22
    WRONG_ETAG = 23
    TIMED_OUT = 24
    WOULD_RECURSE = 25
    BUSY = 26
    WOULD_BLOCK = 27
    HOST_NOT_FOUND = 28
    WOULD_MERGE = 29
    FAILED_HANDLED = 30
    TOO_MANY_OPEN_FILES = 31
    NOT_INITIALIZED = 32
    ADDRESS_IN_USE = 33
    PARTIAL_INPUT = 34
    INVALID_DATA = 35
    DBUS_ERROR = 36
    HOST_UNREACHABLE = 37
    NETWORK_UNREACHABLE = 38
    CONNECTION_REFUSED = 39
    PROXY_FAILED = 40
    PROXY_AUTH_FAILED = 41
    PROXY_NEED_AUTH = 42
    PROXY_NOT_ALLOWED = 43
    BROKEN_PIPE = 44
    CONNECTION_CLOSED = 44
    NOT_CONNECTED = 45
    MESSAGE_TOO_LARGE = 46
    NO_SUCH_DEVICE = 47
    DESTINATION_UNSET = 48


# g_io_error_from_errno() of the errors that sending can have; the others are FAILED.
_CODES: Final = {
    errno.EPERM: IOErrorEnum.PERMISSION_DENIED,
    errno.EACCES: IOErrorEnum.PERMISSION_DENIED,
    errno.ENOENT: IOErrorEnum.NOT_FOUND,
    errno.ENOTDIR: IOErrorEnum.NOT_DIRECTORY,
    errno.ELOOP: IOErrorEnum.TOO_MANY_LINKS,
    errno.ENAMETOOLONG: IOErrorEnum.FILENAME_TOO_LONG,
    errno.ECONNREFUSED: IOErrorEnum.CONNECTION_REFUSED,
    errno.ENOTCONN: IOErrorEnum.NOT_CONNECTED,
    errno.EMSGSIZE: IOErrorEnum.MESSAGE_TOO_LARGE,
    errno.EINVAL: IOErrorEnum.INVALID_ARGUMENT,
    errno.EMFILE: IOErrorEnum.TOO_MANY_OPEN_FILES,
    errno.ENFILE: IOErrorEnum.TOO_MANY_OPEN_FILES,
    errno.ENOMEM: IOErrorEnum.NO_SPACE,
}


class UnixConnectionError(Exception):
    """Base of every error that this library defines.

    Attributes:
      code: Gio's code for this error.
      sent: if a send method raises this, how much had been sent before: file descriptors for
        ``send_fds``, bytes for all others.
    """

    code: IOErrorEnum = IOErrorEnum.FAILED
    sent: int = 0


class OperationCancelled(UnixConnectionError):  # noqa: N818 - as Gio and trio call it
    """A :class:`~trio_unixconn.Cancellable` was cancelled.

    Trio's own cancellation is never turned into this: it stays ``trio.Cancelled``.
    """

    code = IOErrorEnum.CANCELLED


class ConnectionClosedError(UnixConnectionError, trio.ClosedResourceError):
    """This side closed or detached the connection, or called ``send_eof``."""

    code = IOErrorEnum.CLOSED


class ConnectionBrokenError(UnixConnectionError, trio.BrokenResourceError):
    """The connection cannot be used any more, mostly because the peer has closed it.

    ``__cause__`` is the ``OSError`` of the kernel. There is none if an earlier ``send_message`` was
    cancelled or failed after a part of its bytes; then ``sent`` is the size of that part.
    """

    code = IOErrorEnum.BROKEN_PIPE


class ConnectionBusyError(UnixConnectionError, trio.BusyResourceError):
    """Another task uses the same direction of the connection at this moment."""

    code = IOErrorEnum.PENDING


class EndOfStreamError(UnixConnectionError, trio.EndOfChannel):
    """The stream ended while the operation waited for a file descriptor or credentials.

    Gio calls this ``FAILED`` for credentials and reports no error for a descriptor.
    """


class ReadAheadError(UnixConnectionError, RuntimeError):
    """A connection cannot be handed over because it holds messages that were read ahead.

    The socket does not have these messages any more, so its next owner would miss them.
    Nothing was detached or sent. Receive the messages first. To hand a connection over in the
    middle of its stream, iterate with ``fds(read_ahead=1)``, which reads nothing ahead.

    Attributes:
      messages: how many messages are held; each has one byte of data.
      descriptors: how many file descriptors they have.
    """

    code = IOErrorEnum.BUSY

    def __init__(self, message: str, messages: int, descriptors: int) -> None:
        super().__init__(message, messages, descriptors)
        self.messages = messages
        self.descriptors = descriptors

    def __str__(self) -> str:
        return str(self.args[0])


class UnexpectedControlMessageError(UnixConnectionError, ValueError):
    """The peer sent more or fewer file descriptors than the operation expects.

    Those that arrived are closed. The connection is still in step: what was read is in
    ``data``, and the next operation starts after it.

    Attributes:
      data: the bytes of the message, at most as many as were asked for.
      credentials: the sender's, if the message has them; otherwise None.
    """

    def __init__(self, message: str, data: bytes, credentials: Any = None) -> None:
        super().__init__(message, data)
        self.data = data
        # Credentials; that module imports this one.
        self.credentials: Any = credentials

    def __str__(self) -> str:
        return str(self.args[0])


class UnexpectedDescriptorsError(UnexpectedControlMessageError):
    """File descriptors arrived in a plain read; they are closed, the bytes are in ``data``."""


class DescriptorsTruncatedError(UnixConnectionError, OSError):
    """The kernel dropped file descriptors on their way in (``MSG_CTRUNC``).

    Mostly the process has no free file descriptor left (``RLIMIT_NOFILE``). Those that did
    arrive are closed, because a message with some of its file descriptors has another meaning
    than the whole message. The connection is still in step.

    Attributes:
      data: the bytes of the message.
      arrived: how many file descriptors did arrive.
      credentials: the sender's, if the message has them; otherwise None.
    """

    code = IOErrorEnum.TOO_MANY_OPEN_FILES

    def __init__(self, data: bytes, arrived: int, credentials: Any = None) -> None:
        super().__init__(errno.EMFILE, os.strerror(errno.EMFILE))
        self.data = data
        self.arrived = arrived
        # Credentials; that module imports this one.
        self.credentials: Any = credentials

    def __reduce__(
        self,
    ) -> tuple[type[DescriptorsTruncatedError], tuple[bytes, int, Any]]:
        return type(self), (self.data, self.arrived, self.credentials)

    def __str__(self) -> str:
        return (
            f"file descriptors were lost: {self.arrived} arrived and were closed, the others found "
            "no free slot in this process; close file descriptors or raise RLIMIT_NOFILE "
            "(ulimit -n), then ask the peer to send again"
        )


class DatagramTruncatedError(UnixConnectionError, OSError):
    """A datagram was larger than the receiver allows; the rest of its bytes is lost.

    Its file descriptors are closed. The socket is still usable: the next receive returns the next
    datagram.

    Attributes:
      data: the first bytes of the datagram, as many as were allowed.
      size: how many bytes it had.
      sender: the address of the socket that sent it, a :class:`~trio_unixconn.UnixSocketAddress`.
      credentials: the sender's, if the datagram has them; otherwise None.
    """

    code = IOErrorEnum.MESSAGE_TOO_LARGE

    def __init__(self, data: bytes, size: int, sender: Any = None, credentials: Any = None) -> None:
        super().__init__(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        self.data = data
        self.size = size
        # UnixSocketAddress and Credentials; those modules import this one.
        self.sender: Any = sender
        self.credentials: Any = credentials

    def __reduce__(self) -> tuple[type[DatagramTruncatedError], tuple[bytes, int, Any, Any]]:
        return type(self), (self.data, self.size, self.sender, self.credentials)

    def __str__(self) -> str:
        return (
            f"expected a datagram of at most {len(self.data)} bytes, got {self.size} bytes from "
            f"{self.sender}; the rest is lost; receive with a larger max_bytes"
        )


class SendError(UnixConnectionError, OSError):
    """The kernel rejected a message.

    The ``errno`` says why:

    - EBADF: a file descriptor to send is closed.
    - EMFILE: no file descriptor is free for the duplicate that a waiting send needs.
    - EINVAL: a file descriptor of a kind that cannot be sent (io_uring).
    - ETOOMANYREFS, ENOBUFS, ENOMEM: a limit stayed exhausted for 30 seconds; the text names it.
    - EPERM, ESRCH: this process may not send these credentials.
    - ECONNREFUSED, ENOENT, EACCES, EPROTOTYPE, ENOTCONN: a datagram has no receiver, or not one
      that this process may send to.
    - EMSGSIZE: a datagram that is too large.

    As with ``OSError`` itself, the error is also a ``PermissionError``, ``ProcessLookupError``,
    ``ConnectionRefusedError`` or ``FileNotFoundError`` if the ``errno`` is one of theirs.

    The connection is still usable, except after a part of the bytes of a message: then the next
    send raises ConnectionBrokenError.

    Attributes:
      sent: how much had been sent before: file descriptors for ``send_fds``, bytes for all others.
      code: Gio's code for the ``errno``.
    """

    def __new__(cls, number: int = 0, *args: object) -> SendError:  # noqa: PYI034 - a subclass
        """Return an instance of the subclass for this ``errno``, as ``OSError`` does."""
        if cls is SendError:
            cls = _SEND_ERRORS.get(number, cls)  # noqa: PLW0642 - as OSError itself does
        return super().__new__(cls, number, *args)

    def __init__(self, number: int = 0, *args: object) -> None:
        super().__init__(number, *args)
        self.code: IOErrorEnum = _CODES.get(self.errno or 0, IOErrorEnum.FAILED)


class _SendPermissionError(SendError, PermissionError):
    """A SendError with EPERM or EACCES."""


class _SendProcessLookupError(SendError, ProcessLookupError):
    """A SendError with ESRCH."""


class _SendConnectionRefusedError(SendError, ConnectionRefusedError):
    """A SendError with ECONNREFUSED."""


class _SendFileNotFoundError(SendError, FileNotFoundError):
    """A SendError with ENOENT."""


_SEND_ERRORS: Final[dict[int, type[SendError]]] = {
    errno.EPERM: _SendPermissionError,
    errno.EACCES: _SendPermissionError,
    errno.ESRCH: _SendProcessLookupError,
    errno.ECONNREFUSED: _SendConnectionRefusedError,
    errno.ENOENT: _SendFileNotFoundError,
}


class DescriptorsRefusedError(SendError, PermissionError):
    """The peer does not accept file descriptors (``SO_PASSRIGHTS`` is 0 there).

    Plain data still flows.
    """

    code = IOErrorEnum.PERMISSION_DENIED


class WrongDescriptorKindError(UnixConnectionError, ValueError):
    """A descriptor is open on another kind of file than expected, or with other access.

    An operation that received it has closed it.

    Attributes:
      kind: the kind of file that it is open on, a :class:`~trio_unixconn.DescriptorKind`.
    """

    code = IOErrorEnum.INVALID_DATA

    def __init__(self, message: str, kind: enum.Enum) -> None:
        super().__init__(message, kind)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[0])


class UnsafeBufferError(WrongDescriptorKindError):
    """A buffer is not sealed memory, or larger than allowed; nothing was mapped."""


class AddressInUseError(UnixConnectionError, OSError):
    """The address to bind is in use, by a process or by something that is not replaced.

    Nothing was changed. Its errno is EADDRINUSE, and its ``filename`` the address.
    """

    code = IOErrorEnum.ADDRESS_IN_USE


class PeerGoneError(UnixConnectionError, ProcessLookupError):
    """The process at the other end has ended; another process may have its pid by now."""

    code = IOErrorEnum.NOT_FOUND


class PeerDeniedError(UnixConnectionError, PermissionError):
    """A :class:`~trio_unixconn.PeerPolicy` does not admit the process at the other end."""

    code = IOErrorEnum.PERMISSION_DENIED


class PoolClosedError(UnixConnectionError, trio.ClosedResourceError):
    """The worker pool accepts no more jobs: it is draining, was closed, or has failed."""

    code = IOErrorEnum.CLOSED


class JobRefusedError(UnixConnectionError, RuntimeError):
    """No worker has accepted a job, after several attempts; no handler was called.

    ``__cause__`` is the error of the last attempt.
    """


class WorkerDiedError(UnixConnectionError, RuntimeError):
    """A worker process has ended unexpectedly."""

    code = IOErrorEnum.BROKEN_PIPE


class ReportedError(Exception):
    """Base of the errors that a worker reports by their text alone, without a traceback."""


class _RemoteError(UnixConnectionError, RuntimeError):
    """An error in a process that this one has started.

    Attributes:
      traceback: the text that the process sent, mostly a traceback; "" if it sent none.
    """

    _where = "the worker"

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message, traceback)
        self.traceback = traceback

    def __str__(self) -> str:
        said = self.traceback.rstrip()
        return f"{self.args[0]}; in {self._where}:\n{said}" if said else str(self.args[0])


class WorkerStartError(_RemoteError):
    """A worker could not start: its handler could not be imported, or its setup failed.

    Attributes:
      traceback: the worker's traceback; "" if it sent none.
    """


class HandlerError(_RemoteError):
    """The handler of a ``call`` raised, or did not return bytes.

    Attributes:
      traceback: the worker's traceback.
    """


class UpgradeFailedError(_RemoteError):
    """A successor did not take over; this generation serves as before.

    The ``code`` is BUSY if another handover is in progress, TIMED_OUT if the successor was not
    ready in time, and otherwise FAILED.

    Attributes:
      traceback: that of the successor, or the last of what it wrote to its standard error; "" if
        there is none.
    """

    _where = "the successor"


class TakeOverError(UnixConnectionError, RuntimeError):
    """The generation that runs did not hand over; it serves as before.

    The ``code`` is BUSY if it hands over to another process, PERMISSION_DENIED if a policy does not
    admit one of the two processes, and otherwise FAILED.
    """


class SuccessorGoneError(UnixConnectionError, trio.BrokenResourceError):
    """The successor did not take a connection, which still belongs to this process.

    The successor has exited, or there is none. Only if this process ends the handover after the
    connection was sent, it is closed here, because the successor may have it.
    """

    code = IOErrorEnum.BROKEN_PIPE


class NotSupportedError(UnixConnectionError, NotImplementedError):
    """This platform has no such socket, option or message."""

    code = IOErrorEnum.NOT_SUPPORTED
