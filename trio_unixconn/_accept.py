"""The accept loop of every server: retry, back off, never block; and close the listening socket.

Invariant: a file descriptor that accept(2) has returned is returned to the caller, even if a later
accept(2) fails.

accept(2) is the one call of a server that has no MSG_DONTWAIT. It does not block because of
O_NONBLOCK, which belongs to the open socket, and any process that shares the socket can clear it.
Then accept(2) on an empty queue stops the event loop until a client connects. poll(2) first does
not help, because another process can accept the connection in between. A thread could block in
place of the event loop, but it could not be stopped: it would accept one more connection after the
listener is closed. So the flag is read again before each accept(2), which takes 0.2 us, and set
again if it is cleared. That leaves the time between the two system calls. If a process has cleared
the flag once, it may do so again, and so the listening socket gets a receive timeout of one clock
tick (SO_RCVTIMEO), which accept(2) respects: from then on nothing can block it for longer. Only a
Unix socket gets one, and only then. TCP connections would inherit it, and accept(2) of the other
process fails with EAGAIN after that time.

Sources: accept(2), fcntl(2), socket(7) (SO_RCVTIMEO); unix_accept and inet_csk_accept of Linux
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket as stdlib_socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeAlias

import trio
from trio.lowlevel import cancel_shielded_checkpoint, enable_ki_protection

from . import _closing, _kernel
from ._sockopts import raw_socket
from ._trio_task import check_task
from .errors import ConnectionBusyError, ConnectionClosedError

logger: Final = logging.getLogger("trio_unixconn")

# A file descriptor, which the caller owns, and the address of the peer.
Accepted: TypeAlias = tuple[int, Any]

# How long to wait if the process is out of file descriptors or memory. As trio.serve_listeners.
ACCEPT_RETRY_DELAY: Final = 0.1
# How long to wait after consecutive failures of another kind.
INITIAL_BACKOFF: Final = 0.001
MAX_BACKOFF: Final = 0.1
# How long to wait for the closing thread to close a listening socket, in real time.
CLOSE_GRACE: Final = 1.0

# The errors that are about one connection, which is gone, or about the moment. Linux passes network
# errors of the new connection on, see accept(2). EPERM and EACCES are a firewall's or a security
# module's; if they persist, the server backs off and goes on.
_TRANSIENT_NAMES: Final = (
    *("EPERM", "EACCES", "ECONNABORTED", "ECONNRESET", "EPROTO", "EINTR", "ETIMEDOUT"),
    *("ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH", "ENONET"),
    *("ENOPROTOOPT", "EOPNOTSUPP", "EPROTONOSUPPORT", "ESOCKTNOSUPPORT", "ENOSR"),
)
_TRANSIENT: Final = frozenset(
    getattr(errno, name) for name in _TRANSIENT_NAMES if hasattr(errno, name)
)
# The shortest SO_RCVTIMEO that is not "no timeout": the kernel rounds it up to a clock tick.
_ONE_TICK: Final = struct.pack("ll", 0, 1)


class Acceptor:
    """Accepts the connections of one listening socket.

    Args:
      sock: a non-blocking, listening stream socket, which stays the caller's.
      name: what to call it in the log.
    """

    __slots__ = ("_delay", "_empty", "_is_logged", "_restored", "_sock", "name")

    def __init__(self, sock: stdlib_socket.socket, name: object) -> None:
        self._sock = sock
        self.name: object = name
        # After consecutive failures: the next delay, and whether they are logged.
        self._delay = 0.0
        self._is_logged = False
        self._restored = False
        # How often the queue was empty since the last connection.
        self._empty = 0

    def accept_pending(self, limit: int) -> tuple[list[Accepted], OSError | None]:
        """Accept connections that are in the queue already, at most ``limit``.

        Returns:
          Them, and an error, to be passed to :meth:`back_off`, if there is none of them.

        Raises:
          ConnectionClosedError: this side has closed the socket.
          OSError: accepting can never succeed again; there is no connection to return then.
        """
        number = self._sock.fileno()
        if number == -1:
            raise ConnectionClosedError("this listener is closed")
        # Not accept(): to make a socket object of each takes 3 of the 35 us that a server with
        # workers spends on a connection, and it only passes the file descriptor on.
        sock: Any = self._sock
        accept: Callable[[], Accepted] = sock._accept
        accepted: list[Accepted] = []
        try:
            while len(accepted) < limit:
                self._restore_nonblocking(number)
                accepted.append(accept())
        except BlockingIOError:
            if not accepted:
                # Not the first time, before the task waits: mostly there is just no connection.
                if self._empty:
                    self._check_shut_down()
                self._empty += 1
        except OSError as exc:
            # With connections to return, the next call gets this error again, or it is over.
            if not accepted:
                if exc.errno not in _TRANSIENT and not is_out_of_resources(exc):
                    raise
                return accepted, exc
        self._delay = 0.0
        self._is_logged = False
        if accepted:
            self._empty = 0
        return accepted, None

    def _check_shut_down(self) -> None:
        """Raise if no connection can arrive any more, although poll(2) says that one is there.

        Any process that shares a listening Unix socket can shut it down. Then accept(2) fails with
        EAGAIN, and the socket stays readable: the event loop would spin.

        Raises:
          OSError: EINVAL, as accept(2) of a TCP socket that is shut down.
        """
        if _kernel.POLLRDHUP is None:
            return
        poll = select.poll()
        poll.register(self._sock, _kernel.POLLRDHUP)
        if any(events & _kernel.POLLRDHUP for _, events in poll.poll(0)):
            raise OSError(
                errno.EINVAL,
                f"{self.name}: the listening socket was shut down, maybe by another process",
            )

    def _restore_nonblocking(self, number: int) -> None:
        if not os.get_blocking(number):
            return
        os.set_blocking(number, False)
        if self._sock.family == _kernel.AF_UNIX and _kernel.SO_RCVTIMEO is not None:
            self._sock.setsockopt(_kernel.SOL_SOCKET, _kernel.SO_RCVTIMEO, _ONE_TICK)
        if not self._restored:
            logger.warning(
                "%s: another process has made this listening socket blocking; it is non-blocking "
                "again, for all processes that share it",
                self.name,
            )
        self._restored = True

    @enable_ki_protection
    async def accept(self) -> Accepted:
        """Accept one connection.

        Raises:
          ConnectionClosedError: the socket is closed, or gets closed while this waits.
          ConnectionBusyError: another task is already accepting.
          OSError: the process is out of file descriptors or memory (:func:`is_out_of_resources`),
            or accepting can never succeed again.
        """
        check_task()
        await trio.lowlevel.checkpoint_if_cancelled()
        # A wait is a checkpoint; a second one takes 6 % of accepting and answering.
        waited = False
        while True:
            try:
                accepted, error = self.accept_pending(1)
            except (ConnectionClosedError, OSError):
                await cancel_shielded_checkpoint()
                raise
            if accepted:
                if not waited:
                    await cancel_shielded_checkpoint()
                return accepted[0]
            if error is None:
                await self._wait_readable()
                waited = True
            elif is_out_of_resources(error):
                await cancel_shielded_checkpoint()
                raise error
            else:
                await self.back_off(error)

    async def _wait_readable(self) -> None:
        try:
            await trio.lowlevel.wait_readable(self._sock)
        except trio.ClosedResourceError as exc:
            raise ConnectionClosedError("this listener was closed") from exc
        except trio.BusyResourceError as exc:
            raise ConnectionBusyError("another task is already accepting") from exc

    async def back_off(self, error: OSError) -> None:
        """Wait before the next accept(2). Consecutive failures are logged once.

        A single failure is about one connection that is gone. It is not logged, and the next
        connection is not delayed.
        """
        if is_out_of_resources(error):
            delay = ACCEPT_RETRY_DELAY
        else:
            delay = self._delay
            self._delay = min(2 * delay, MAX_BACKOFF) or INITIAL_BACKOFF
        if delay and not self._is_logged:
            logger.warning(
                "%s: cannot accept connections (%s), retrying", self.name, error.strerror
            )
            self._is_logged = True
        await trio.sleep(delay)


def is_out_of_resources(error: OSError) -> bool:
    """Whether accept(2) failed because the process is out of file descriptors or memory."""
    return error.errno in _kernel.OUT_OF_RESOURCES


async def close_listening_socket(sock: trio.socket.SocketType) -> None:
    """Close a listening socket, in the closing thread if connections are in its queue.

    Closing it closes the connections in its queue, and the file descriptors that clients have sent
    over them. This waits until it is closed, so that its address can be bound again, but not for
    longer than CLOSE_GRACE, and not if cancelled; then the thread continues.
    """
    raw = raw_socket(sock)
    if raw.fileno() != -1:
        # First, so that a task in accept() sees that the socket is closed.
        trio.lowlevel.notify_closing(raw)
        closed = threading.Event()
        _closing.close_socket(raw, closed.set)
        # A thread waits, because a deadline of trio is not real time under a MockClock. If no
        # thread can be started, this does not wait.
        if not closed.is_set():
            with suppress(RuntimeError):
                await trio.to_thread.run_sync(
                    closed.wait,
                    CLOSE_GRACE,
                    abandon_on_cancel=True,
                    limiter=trio.CapacityLimiter(1),
                )
    await trio.lowlevel.checkpoint()
