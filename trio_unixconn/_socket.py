"""One connected socket: whether it is open, and what its errors mean.

Invariant: an error of the kernel is translated here and nowhere else, with the ``OSError`` as
its cause, and says whether anything was sent.

Sources: unix(7), sendmsg(2), recvmsg(2), trio's SocketStream
"""

from __future__ import annotations

import errno
import socket as stdlib_socket
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import cancel_shielded_checkpoint

from . import _ancillary
from ._owner import DescriptorOwner
from .errors import (
    ConnectionBrokenError,
    ConnectionBusyError,
    ConnectionClosedError,
    DescriptorsRefusedError,
)

if TYPE_CHECKING:
    from ._ancillary import ControlMessage

_PEER_GONE: Final = frozenset(
    {errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED, errno.ENOTCONN, errno.ESHUTDOWN}
)

# Only on this list are errors that a caller can do something about.
_SEND_PROBLEMS: Final[dict[int | None, str]] = {
    errno.EBADF: "the descriptor to send is closed",
    errno.EMFILE: "no descriptor is free to hold on to the one to send while waiting "
    "(RLIMIT_NOFILE)",
    errno.EPERM: "the kernel lets only a privileged process send credentials other than its own",
    errno.ESRCH: "no process has the pid in these credentials",
}

FAILURES: Final = (OSError, trio.ClosedResourceError, trio.BusyResourceError)


class ConnectedSocket(DescriptorOwner):
    """The part of a connected Unix stream socket that both directions share.

    Attributes:
      socket: the trio socket.
      raw: the standard library socket beneath it.
    """

    __slots__ = ("raw", "socket")

    def __init__(self, socket: trio.socket.SocketType, raw: stdlib_socket.socket) -> None:
        self.socket: trio.socket.SocketType = socket
        self.raw: stdlib_socket.socket = raw

    def is_closed(self) -> bool:
        """Whether this side has closed the socket."""
        return self.raw.fileno() == -1

    def check_open(self) -> None:
        """Raise unless the socket is open.

        Raises:
          ConnectionClosedError: this side has closed it.
        """
        if self.is_closed():
            raise ConnectionClosedError("this connection is closed")

    async def failed(
        self,
        exc: OSError | trio.ClosedResourceError | trio.BusyResourceError,
        messages: list[ControlMessage] | None = None,
        gone: str = "nothing was sent",
    ) -> Exception:
        """Return the error to raise for ``exc``, after a checkpoint."""
        error = self._translated(exc, messages, gone)
        await cancel_shielded_checkpoint()
        return error

    def _translated(
        self,
        exc: OSError | trio.ClosedResourceError | trio.BusyResourceError,
        messages: list[ControlMessage] | None,
        gone: str,
    ) -> Exception:
        if isinstance(exc, trio.BusyResourceError):
            return ConnectionBusyError("another task waits for the same socket")
        if self.is_closed() or isinstance(exc, trio.ClosedResourceError):
            return ConnectionClosedError("this connection is closed")
        if exc.errno == errno.EPIPE and self.socket.did_shutdown_SHUT_WR:
            return ConnectionClosedError("this side has sent its end of file (send_eof)")
        if messages is None or exc.errno in _PEER_GONE:
            return ConnectionBrokenError(f"the connection is broken: {exc}")
        if exc.errno == errno.EPERM and not _ancillary.forged(messages):
            return DescriptorsRefusedError(
                errno.EPERM,
                f"the peer takes no descriptors (SO_PASSRIGHTS is off at its end); {gone}, and "
                "plain bytes still pass",
            )
        return OSError(exc.errno, f"{_SEND_PROBLEMS.get(exc.errno, exc.strerror)}; {gone}")
