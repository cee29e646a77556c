"""The way of a message: one socket, one system call, one scheduling point.

The rule of this file: it is the only caller of sendmsg and recvmsg. Nothing between the
kernel's answer and the return can be cancelled, and a descriptor is in exactly one pair of
hands at any await: the kernel's, the caller's, or a duplicate of our own.

Sources: unix(7), sendmsg(2), recvmsg(2), trio's SocketStream
"""

from __future__ import annotations

import errno
import os
import socket as stdlib_socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar

import trio
from trio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint,
    checkpoint_if_cancelled,
    enable_ki_protection,
    wait_readable,
    wait_writable,
)

from . import _control, _kernel
from .errors import (
    ConnectionBrokenError,
    ConnectionBusyError,
    ConnectionClosedError,
    DescriptorsRefusedError,
    NotSupportedError,
)

if TYPE_CHECKING:
    from ._cancellable import Cancellable
    from ._control import ControlMessage, Received

# A byte must travel with a control message on a stream; Gio sends NUL.
_ONE_BYTE: Final = [b"\0"]

_ROOM: Final = _kernel.CONTROL_ROOM
_SEND_FLAGS: Final = _kernel.MSG_NOSIGNAL
_RECEIVE_FLAGS: Final = _kernel.MSG_CMSG_CLOEXEC

# The kernel cannot take the message now, and poll does not say when it can: too many of our
# descriptors wait in sockets for their receivers (ETOOMANYREFS), or memory is short.
_PRESSURE: Final = frozenset({errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM})
_FIRST_PAUSE: Final = 0.001
_LONGEST_PAUSE: Final = 0.1

_PEER_GONE: Final = frozenset(
    {errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED, errno.ENOTCONN, errno.ESHUTDOWN}
)


# Only on this list are errors that a caller can do something about.
_SEND_PROBLEMS: Final[dict[int | None, str]] = {
    errno.EBADF: "the descriptor to send is closed",
    errno.EMFILE: "no descriptor is free to hold on to the one to send while waiting "
    "(RLIMIT_NOFILE)",
    errno.EPERM: "the kernel does not let this process send these credentials",
}

_FAILURES: Final = (OSError, trio.ClosedResourceError, trio.BusyResourceError)


class Transport:
    """A connected Unix stream socket, and what is under way on it.

    Attributes:
      socket: the trio socket.
      raw: the standard library socket beneath it.
      sending, receiving: whether a task is doing that.
    """

    __slots__ = ("_passcred_lent", "raw", "receiving", "sending", "socket")

    def __init__(self, socket: trio.socket.SocketType) -> None:
        self.raw = _stdlib_socket_of(socket)
        check_connected(self.raw)
        self.socket = socket
        self.sending = False
        self.receiving = False
        # Whether SO_PASSCRED is on only for a receive that is under way.
        self._passcred_lent = False

    @enable_ki_protection
    async def receive(
        self, max_bytes: int, cancellable: Cancellable | None, *, passcred: bool = False
    ) -> Received:
        """One recvmsg. Nothing between it and the return can be cancelled."""
        if self.receiving:
            raise ConnectionBusyError("another task is receiving from this connection")
        self.receiving = True
        try:
            if cancellable is not None and cancellable.is_cancelled():
                await checkpoint()
                cancellable.raise_if_cancelled()
            await checkpoint_if_cancelled()
            if passcred:
                self._lend_passcred()
            try:
                received: Received = self.raw.recvmsg(max_bytes, _ROOM, _RECEIVE_FLAGS)
            except BlockingIOError:
                return await self._receive_later(max_bytes, cancellable)
            await cancel_shielded_checkpoint()
            return received
        except _FAILURES as exc:
            raise await self._failed(exc) from exc
        finally:
            if passcred:
                self._return_passcred()
            self.receiving = False

    @enable_ki_protection
    async def _receive_later(self, max_bytes: int, cancellable: Cancellable | None) -> Received:
        while True:
            await _wait(wait_readable, self.raw, cancellable)
            try:
                return self.raw.recvmsg(max_bytes, _ROOM, _RECEIVE_FLAGS)
            except BlockingIOError:
                continue

    @enable_ki_protection
    async def send_byte(
        self, message: ControlMessage, cancellable: Cancellable | None, fd: int = -1
    ) -> None:
        """One sendmsg of one byte and ``message``, which carries ``fd`` if that is not -1."""
        self._begin_sending()
        try:
            if cancellable is not None and cancellable.is_cancelled():
                await checkpoint()
                cancellable.raise_if_cancelled()
            await checkpoint_if_cancelled()
            try:
                self.raw.sendmsg(_ONE_BYTE, [message], _SEND_FLAGS)
            except OSError as exc:
                if exc.errno != errno.EAGAIN and exc.errno not in _PRESSURE:
                    raise
                await self._send_byte_later(exc, message, cancellable, fd)
            else:
                await cancel_shielded_checkpoint()
        except _FAILURES as exc:
            raise await self._failed(exc, message) from exc
        finally:
            self.sending = False

    @enable_ki_protection
    async def _send_byte_later(
        self, refusal: OSError, message: ControlMessage, cancellable: Cancellable | None, fd: int
    ) -> None:
        duplicate = -1
        if fd != -1:
            # The caller may close the descriptor while we wait, and its number may then mean
            # another file.
            duplicate = os.dup(fd)
            message = _control.rights(duplicate)
        pause = _FIRST_PAUSE
        try:
            while True:
                if refusal.errno == errno.EAGAIN:
                    await _wait(wait_writable, self.raw, cancellable)
                else:
                    # The socket polls writable all the while, so waiting for that would spin.
                    await _wait(trio.sleep, pause, cancellable)
                    pause = min(2 * pause, _LONGEST_PAUSE)
                try:
                    self.raw.sendmsg(_ONE_BYTE, [message], _SEND_FLAGS)
                except OSError as exc:
                    if exc.errno != errno.EAGAIN and exc.errno not in _PRESSURE:
                        raise
                    refusal = exc
                else:
                    return
        finally:
            if duplicate != -1:
                os.close(duplicate)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send plain bytes, all of them."""
        self._begin_sending()
        try:
            await checkpoint_if_cancelled()
            with memoryview(data) as given, given.cast("B") as view:
                if view:
                    sent = self._send_some(view)
                else:
                    sent = 0
                    self.check_open()
                if sent == len(view):
                    await cancel_shielded_checkpoint()
                while sent < len(view):
                    await wait_writable(self.raw)
                    with view[sent:] as rest:
                        sent += self._send_some(rest)
        except _FAILURES as exc:
            raise await self._failed(exc) from exc
        finally:
            self.sending = False

    async def wait_writable(self) -> None:
        """Wait until there is room to send."""
        self._begin_sending()
        try:
            await checkpoint_if_cancelled()
            self.check_open()
            await wait_writable(self.raw)
        except _FAILURES as exc:
            raise await self._failed(exc) from exc
        finally:
            self.sending = False

    async def send_eof(self) -> None:
        """End the stream in this direction."""
        self._begin_sending()
        try:
            await checkpoint()
            self.check_open()
            if not self.socket.did_shutdown_SHUT_WR:
                self.socket.shutdown(stdlib_socket.SHUT_WR)
        except _FAILURES as exc:
            raise await self._failed(exc) from exc
        finally:
            self.sending = False

    def is_closed(self) -> bool:
        """Whether this side has closed the socket."""
        return self.raw.fileno() == -1

    def close(self) -> None:
        """Close the socket, and leave its options as they were for others who share it."""
        self._return_passcred()
        self.socket.close()

    def _send_some(self, view: memoryview) -> int:
        try:
            return self.raw.send(view, _SEND_FLAGS)
        except BlockingIOError:
            return 0

    def _begin_sending(self) -> None:
        if self.sending:
            raise ConnectionBusyError("another task is sending on this connection")
        self.sending = True

    def _lend_passcred(self) -> None:
        option = _kernel.SO_PASSCRED
        if option is None or _kernel.SCM_CREDENTIALS is None:
            return
        if not self.raw.getsockopt(_kernel.SOL_SOCKET, option):
            self.raw.setsockopt(_kernel.SOL_SOCKET, option, 1)
            self._passcred_lent = True

    def _return_passcred(self) -> None:
        """Switch SO_PASSCRED off if it was us: other processes may hold the same socket."""
        if self._passcred_lent:
            self._passcred_lent = False
            if not self.is_closed():
                option = _kernel.required(_kernel.SO_PASSCRED, "SO_PASSCRED")
                self.raw.setsockopt(_kernel.SOL_SOCKET, option, 0)

    def check_open(self) -> None:
        if self.is_closed():
            raise ConnectionClosedError("this side has closed the connection")

    async def _failed(
        self,
        exc: OSError | trio.ClosedResourceError | trio.BusyResourceError,
        message: ControlMessage | None = None,
    ) -> Exception:
        """Return the error to raise for ``exc``, after a checkpoint."""
        error = self._translated(exc, message)
        await cancel_shielded_checkpoint()
        return error

    def _translated(
        self,
        exc: OSError | trio.ClosedResourceError | trio.BusyResourceError,
        message: ControlMessage | None,
    ) -> Exception:
        if isinstance(exc, trio.BusyResourceError):
            return ConnectionBusyError("another task waits for the same socket")
        if self.is_closed() or isinstance(exc, trio.ClosedResourceError):
            return ConnectionClosedError("this side has closed the connection")
        if exc.errno == errno.EPIPE and self.socket.did_shutdown_SHUT_WR:
            return ConnectionClosedError("this side has sent its end of file (send_eof)")
        if message is None or exc.errno in _PEER_GONE:
            return ConnectionBrokenError(f"the connection is broken: {exc}")
        if exc.errno == errno.EPERM and message[1] == _kernel.SCM_RIGHTS:
            return DescriptorsRefusedError(
                errno.EPERM,
                "the peer takes no descriptors (SO_PASSRIGHTS is off at its end); nothing was "
                "sent, and plain bytes still pass",
            )
        return OSError(
            exc.errno, f"{_SEND_PROBLEMS.get(exc.errno, exc.strerror)}; nothing was sent"
        )


_Awaited = TypeVar("_Awaited")


async def _wait(
    wait: Callable[[_Awaited], Awaitable[None]], argument: _Awaited, cancellable: Cancellable | None
) -> None:
    if cancellable is None:
        await wait(argument)
    else:
        with cancellable.scope():
            await wait(argument)


def _stdlib_socket_of(socket: trio.socket.SocketType) -> stdlib_socket.socket:
    if not isinstance(socket, trio.socket.SocketType):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"a trio socket is due, not {type(socket).__name__} ({socket!r})")
    # trio has no public way to the socket beneath. The attribute is as old as trio's
    # sockets, and a second socket object for the same descriptor would not be told when
    # trio's closes it.
    raw: object = getattr(socket, "_sock", None)
    if not isinstance(raw, stdlib_socket.socket):
        raise TypeError(f"a trio socket on a real descriptor is due, not {type(socket).__name__}")
    return raw


def check_connected(sock: stdlib_socket.socket) -> None:
    """Raise ValueError unless ``sock`` is a connected Unix stream socket."""
    family = _kernel.required(_kernel.AF_UNIX, "Unix sockets")
    if not _kernel.HAS_SENDMSG:
        raise NotSupportedError("this Python has no socket.sendmsg, recvmsg and CMSG_SPACE")
    due = "a connected Unix stream socket is due"
    if sock.fileno() == -1:
        raise ValueError(f"{due}, but this socket is closed")
    if sock.family != family:
        raise ValueError(f"{due}, but this is an {_name_of(sock.family)} socket")
    if sock.type != stdlib_socket.SOCK_STREAM:
        raise ValueError(f"{due}, but this is a {_name_of(sock.type)} socket")
    option = _kernel.SO_ACCEPTCONN
    if option is not None and sock.getsockopt(_kernel.SOL_SOCKET, option):
        raise ValueError(f"{due}, but this socket listens; accept() its connections")
    try:
        sock.getpeername()
    except OSError as exc:
        raise ValueError(f"{due}, but this socket is not connected ({exc.strerror})") from exc


def _name_of(constant: int) -> str:
    return getattr(constant, "name", str(constant))
