"""One connected socket: what it is, when it is closed, what its errors mean.

The rule of this file: an error of the kernel is translated here and nowhere else, with the
``OSError`` as its cause, and says whether anything was sent.

Sources: unix(7), sendmsg(2), recvmsg(2), trio's SocketStream
"""

from __future__ import annotations

import errno
import socket as stdlib_socket
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import cancel_shielded_checkpoint

from . import _ancillary
from ._cancellable import FIRED, call_in_trio_thread
from ._owner import DescriptorOwner
from .errors import (
    ConnectionBrokenError,
    ConnectionBusyError,
    ConnectionClosedError,
    DescriptorsRefusedError,
    OperationCancelled,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ._ancillary import ControlMessage
    from ._cancellable import Cancellable

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
    """What both directions of a connected Unix stream socket have in common.

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
            raise ConnectionClosedError("this side has closed the connection")

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
            return ConnectionClosedError("this side has closed the connection")
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


class _Alarm:
    """Ends a wait for a socket when a Cancellable fires."""

    __slots__ = ("_raw", "_run", "fired", "over")

    def __init__(self, raw: stdlib_socket.socket) -> None:
        self._raw = raw
        self._run = trio.lowlevel.current_trio_token()
        self.fired = False
        self.over = False

    def fire(self) -> None:
        """Wake who waits; :meth:`Cancellable.cancel` calls this, in any thread."""
        self.fired = True
        call_in_trio_thread(self._run, self._wake)

    def _wake(self) -> None:
        if not self.over and self._raw.fileno() != -1:
            # It says that the socket is about to be closed, to all who wait for it, in either
            # direction; those for whom that is not so wait on.
            trio.lowlevel.notify_closing(self._raw)


async def wait_cancellable(
    wait: Callable[[stdlib_socket.socket], Awaitable[None]],
    raw: stdlib_socket.socket,
    cancellable: Cancellable | None,
) -> None:
    """Await ``wait(raw)``, trio's wait_readable or wait_writable, until the Cancellable fires.

    Not under a ``trio.CancelScope``: to make, enter and leave one took 3.6 us where an alarm
    took 0.3.

    Raises:
      OperationCancelled: it has fired.
      trio.ClosedResourceError: this side has closed the socket.
    """
    alarm = None
    if cancellable is not None:
        alarm = _Alarm(raw)
        cancellable.attach(alarm)
    try:
        while True:
            try:
                return await wait(raw)
            except trio.ClosedResourceError:
                if raw.fileno() == -1:
                    raise
                if alarm is not None and alarm.fired:
                    # An outer cancellation of trio's comes first.
                    await trio.lowlevel.checkpoint_if_cancelled()
                    raise OperationCancelled(FIRED) from None
    finally:
        if cancellable is not None and alarm is not None:
            alarm.over = True
            cancellable.detach(alarm)


async def sleep_cancellable(seconds: float, cancellable: Cancellable | None) -> None:
    """Sleep, until the Cancellable fires if there is one."""
    if cancellable is None:
        await trio.sleep(seconds)
    else:
        with cancellable.scope():
            await trio.sleep(seconds)
