"""UnixConnection: bytes, descriptors, credentials and peer identity of one connection.

The rule of this file: it is the only caller of sendmsg and recvmsg. Each operation is one
system call and one scheduling point, and a descriptor is in exactly one pair of hands at any
await: the kernel's, the caller's, or a duplicate of our own.

Sources: unix(7), sendmsg(2), recvmsg(2), trio's SocketStream,
https://docs.gtk.org/gio-unix/class.Connection.html
"""

from __future__ import annotations

import errno
import operator
import os
import socket as stdlib_socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar, overload

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
from ._address import UnixSocketAddress
from ._control import FileDescriptor as FileDescriptor  # noqa: PLC0414, TC001 - exported
from ._credentials import Credentials, can_tell_credentials, peer_credentials
from .errors import (
    ConnectionBrokenError,
    ConnectionBusyError,
    ConnectionClosedError,
    DescriptorsRefusedError,
    EndOfStreamError,
    NotSupportedError,
)

if TYPE_CHECKING:
    from ._cancellable import Cancellable
    from ._control import ControlMessage, Received

    Buffer: TypeAlias = bytes | bytearray | memoryview

# As trio.SocketStream.
DEFAULT_RECEIVE_SIZE: Final = 65536

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


class UnixConnection(trio.abc.HalfCloseableStream):
    """A connected Unix-domain stream socket: ``Gio.UnixConnection`` for trio.

    It is a ``trio.abc.HalfCloseableStream`` with the whole interface of
    ``trio.SocketStream``, and a virtual subclass of it: ``isinstance(conn,
    trio.SocketStream)`` is true. It cannot be a real subclass, because trio forbids
    subclassing its concrete classes (trio #1044).

    Args:
      socket: a connected ``AF_UNIX``, ``SOCK_STREAM`` trio socket. The connection owns it
        from now on; if this raises, the caller still does.

    Attributes:
      socket: that trio socket.

    Raises:
      TypeError: not a trio socket.
      ValueError: another family or type, closed, listening, or not connected.
      NotSupportedError: the platform has no Unix sockets.

    All async methods are checkpoints, also when the kernel says no; wrong arguments and a busy
    direction are told at once. A cancellation either happens before anything was sent or
    received, or is put off until after the method has returned its result; only
    :meth:`send_all` may have sent a part. One task at a time may send, and one receive.

    All of them can raise, besides what each names: :class:`ConnectionClosedError` (this side
    closed the connection), :class:`ConnectionBrokenError` (the peer is gone),
    :class:`ConnectionBusyError` (another task uses the same direction) and, with a
    ``cancellable``, :class:`OperationCancelled`. They are trio's ``ClosedResourceError``,
    ``BrokenResourceError`` and ``BusyResourceError`` with Gio's code.
    """

    __slots__ = ("__weakref__", "_passcred_lent", "_raw", "_receiving", "_sending", "socket")

    def __init__(self, socket: trio.socket.SocketType) -> None:
        self._raw = _stdlib_socket_of(socket)
        _check_connected(self._raw)
        self.socket: trio.socket.SocketType = socket
        self._sending = False
        self._receiving = False
        # Whether SO_PASSCRED is on only for a receive_credentials() that is under way.
        self._passcred_lent = False

    @classmethod
    def from_stdlib_socket(cls, sock: stdlib_socket.socket) -> UnixConnection:
        """Make one from a standard library socket.

        The connection owns the socket from now on and makes it non-blocking; if this raises,
        the socket is as it was and still the caller's.

        Raises:
          TypeError, ValueError, NotSupportedError: as the constructor.
        """
        if not isinstance(sock, stdlib_socket.socket):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a socket.socket is due, not {type(sock).__name__} ({sock!r})")
        _check_connected(sock)
        return cls(trio.socket.from_stdlib_socket(sock))

    @classmethod
    def from_fd(cls, fd: int) -> UnixConnection:
        """Make one from the descriptor of a connected Unix stream socket.

        The connection owns the descriptor from now on, makes it close-on-exec, and makes the
        socket non-blocking for all who share it; if this raises, the descriptor is as it was
        and still the caller's.

        Raises:
          TypeError: not an int.
          ValueError: not open, not a socket, or not a connected Unix stream socket.
          NotSupportedError: as the constructor.
        """
        if type(fd) is not int:
            raise TypeError(f"a descriptor is due: an int, not {type(fd).__name__} ({fd!r})")
        number = _control.descriptor_number(fd)
        try:
            sock = stdlib_socket.socket(fileno=number)
        except OSError as exc:
            what = "is not open" if exc.errno == errno.EBADF else "is not a socket"
            raise ValueError(f"descriptor {number} {what}: a connected Unix socket is due") from exc
        try:
            connection = cls.from_stdlib_socket(sock)
        except BaseException:
            sock.detach()
            raise
        sock.set_inheritable(False)
        return connection

    ################################################################
    # Descriptors and credentials
    ################################################################

    @enable_ki_protection
    async def send_fd(self, fd: FileDescriptor, cancellable: Cancellable | None = None) -> bool:
        """Send one descriptor, with one NUL byte that it travels with.

        The descriptor stays the caller's, who may close it once this has returned. It may
        also be closed while this waits: a duplicate is what waits.

        Args:
          fd: an int, or anything with ``fileno()``.
          cancellable: ends the wait when it fires.

        Returns:
          True, as in Gio.

        Raises:
          TypeError, ValueError: not a descriptor; nothing was sent.
          OSError: EBADF, the descriptor is closed; EMFILE, none is free for the duplicate
            while waiting. Nothing was sent.
          DescriptorsRefusedError: the peer takes no descriptors.
          NotSupportedError: the platform passes none.

        Source: https://docs.gtk.org/gio-unix/method.Connection.send_fd.html
        """
        number = _control.descriptor_number(fd)
        await self._send_byte(_control.rights(number), cancellable, number)
        return True

    @enable_ki_protection
    async def receive_fd(self, cancellable: Cancellable | None = None) -> int:
        """Receive one descriptor and the one byte that it travels with.

        Returns:
          The descriptor, close-on-exec. The caller owns it and must close it. Whether it
          blocks is a property of the open file, which the peer shares, and is left alone.

        Raises:
          EndOfStreamError: the stream ended before.
          UnexpectedControlMessageError: the next byte did not come with exactly one
            descriptor. It is in ``.data``; whatever came with it is closed.
          DescriptorsTruncatedError: the descriptor was lost, as no slot was free for it.

        Source: https://docs.gtk.org/gio-unix/method.Connection.receive_fd.html (which returns
        -1 without an error at the end of the stream)
        """
        received = await self._receive(1, cancellable)
        if not received[0]:
            raise _ended("a descriptor", received)
        return _control.one_descriptor(received)

    @enable_ki_protection
    async def send_credentials(self, cancellable: Cancellable | None = None) -> bool:
        """Send the credentials of this process, with one NUL byte.

        The kernel checks them, so that the receiver can believe them.

        Returns:
          True, as in Gio.

        Raises:
          NotSupportedError: the platform has no message for credentials.

        Source: https://docs.gtk.org/gio-unix/method.Connection.send_credentials.html
        """
        await self._send_byte(_control.credentials(Credentials()), cancellable)
        return True

    @enable_ki_protection
    async def receive_credentials(self, cancellable: Cancellable | None = None) -> Credentials:
        """Receive the credentials of the peer and the one byte that they travel with.

        ``SO_PASSCRED`` is switched on for that time if it is off. If the peer sent a byte
        without credentials, the answer is what the socket knows of the peer:
        :meth:`get_peer_credentials`. Either way the kernel vouches for it.

        Raises:
          EndOfStreamError: the stream ended before.
          UnexpectedControlMessageError: something else came with the byte, a descriptor
            for instance. The byte is in ``.data``; descriptors are closed.
          DescriptorsTruncatedError: descriptors came, and no slot was free for them.
          NotSupportedError: the platform tells no credentials.

        Source: https://docs.gtk.org/gio-unix/method.Connection.receive_credentials.html
        """
        can_tell_credentials()
        received = await self._receive(1, cancellable, passcred=True)
        if not received[0]:
            raise _ended("a byte with credentials", received)
        credentials = _control.only_credentials(received)
        return self.get_peer_credentials() if credentials is None else credentials

    def get_peer_credentials(self) -> Credentials:
        """Return who connected, or listened, at the other end (``Gio.Socket.get_credentials``).

        Vouched for by the kernel, noted down when the connection was made, and unchanged
        since: of a socketpair, both ends name the process that made the pair.

        Raises:
          ConnectionClosedError: this side closed the connection.
          NotSupportedError: the platform cannot tell.

        Source: unix(7) (``SO_PEERCRED``), https://docs.gtk.org/gio/method.Socket.get_credentials.html
        """
        self._check_open()
        return peer_credentials(self._raw.getsockopt)

    ################################################################
    # Bytes: the interface of trio.SocketStream
    ################################################################

    async def send_all(self, data: Buffer) -> None:
        """Send all of ``data``; as ``trio.SocketStream.send_all``.

        If this is cancelled or fails, some of it may have been sent.
        """
        self._begin_sending()
        try:
            await checkpoint_if_cancelled()
            with memoryview(data) as given, given.cast("B") as view:
                if view:
                    sent = self._send_some(view)
                else:
                    sent = 0
                    self._check_open()
                if sent == len(view):
                    await cancel_shielded_checkpoint()
                while sent < len(view):
                    await wait_writable(self._raw)
                    with view[sent:] as rest:
                        sent += self._send_some(rest)
        except _FAILURES as exc:
            raise await self._failed(exc) from exc
        finally:
            self._sending = False

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until there is room to send; as ``trio.SocketStream``."""
        self._begin_sending()
        try:
            await checkpoint_if_cancelled()
            self._check_open()
            await wait_writable(self._raw)
        except _FAILURES as exc:
            raise await self._failed(exc) from exc
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        """Send an end of file; receiving goes on. As ``trio.SocketStream.send_eof``."""
        self._begin_sending()
        try:
            await checkpoint()
            self._check_open()
            if not self.socket.did_shutdown_SHUT_WR:
                self.socket.shutdown(stdlib_socket.SHUT_WR)
        except _FAILURES as exc:
            raise await self._failed(exc) from exc
        finally:
            self._sending = False

    @enable_ki_protection
    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive between 1 and ``max_bytes`` bytes; ``b""`` at the end of the stream.

        As ``trio.SocketStream.receive_some``, except that descriptors are not dropped in
        silence.

        Args:
          max_bytes: 65536 if left out.

        Raises:
          UnexpectedDescriptorsError: descriptors came with the bytes; they are closed, and
            the bytes are in ``.data``.
          TypeError, ValueError: ``max_bytes`` is not an int of at least 1.
        """
        size = DEFAULT_RECEIVE_SIZE if max_bytes is None else operator.index(max_bytes)
        if size < 1:
            raise ValueError("max_bytes must be >= 1")
        received = await self._receive(size, None)
        if received[1] or received[2] & _kernel.MSG_CTRUNC:
            return _control.only_bytes(received)
        return received[0]

    async def aclose(self) -> None:
        """Close the connection, at once and also when cancelled; closing twice is allowed.

        A task that waits in this connection gets :class:`ConnectionClosedError`.
        """
        self._return_passcred()
        self.socket.close()
        await checkpoint()

    @overload
    def setsockopt(self, level: int, option: int, value: int | Buffer) -> None: ...

    @overload
    def setsockopt(self, level: int, option: int, value: None, length: int) -> None: ...

    def setsockopt(
        self, level: int, option: int, value: int | Buffer | None, length: int | None = None
    ) -> None:
        """Set an option on the socket; see ``socket.socket.setsockopt``."""
        if length is None:
            if value is None:
                raise TypeError("value must not be None without a length")
            return self.socket.setsockopt(level, option, value)
        if value is not None:
            raise TypeError(f"value must be None with a length, not {value!r}")
        return self.socket.setsockopt(level, option, value, length)

    @overload
    def getsockopt(self, level: int, option: int) -> int: ...

    @overload
    def getsockopt(self, level: int, option: int, buffersize: int) -> bytes: ...

    def getsockopt(self, level: int, option: int, buffersize: int = 0) -> int | bytes:
        """Get an option of the socket; see ``socket.socket.getsockopt``."""
        if buffersize == 0:
            return self.socket.getsockopt(level, option)
        return self.socket.getsockopt(level, option, buffersize)

    ################################################################
    # What Gio.SocketConnection and Gio.IOStream give
    ################################################################

    def get_local_address(self) -> UnixSocketAddress:
        """Return the name of this end; unnamed unless it was bound or accepted.

        Raises:
          ConnectionClosedError: this side closed the connection.
        """
        self._check_open()
        return UnixSocketAddress.from_native(self._raw.getsockname())

    def get_remote_address(self) -> UnixSocketAddress:
        """Return the name of the peer's end; unnamed unless it was bound.

        Raises:
          ConnectionClosedError: this side closed the connection.
        """
        self._check_open()
        return UnixSocketAddress.from_native(self._raw.getpeername())

    def is_connected(self) -> bool:
        """Whether this side has not closed the connection; as in Gio, not whether the peer has."""
        return not self.is_closed()

    def is_closed(self) -> bool:
        """Whether this side has closed the connection."""
        return self._raw.fileno() == -1

    def __repr__(self) -> str:
        if self.is_closed():
            return "<UnixConnection closed>"
        return f"<UnixConnection fd={self._raw.fileno()} to {self.get_remote_address()}>"

    ################################################################
    # The way of a message
    ################################################################

    @enable_ki_protection
    async def _receive(
        self, max_bytes: int, cancellable: Cancellable | None, *, passcred: bool = False
    ) -> Received:
        """One recvmsg. Nothing between it and the return can be cancelled."""
        if self._receiving:
            raise ConnectionBusyError("another task is receiving from this connection")
        self._receiving = True
        try:
            if cancellable is not None and cancellable.is_cancelled():
                await checkpoint()
                cancellable.raise_if_cancelled()
            await checkpoint_if_cancelled()
            if passcred:
                self._lend_passcred()
            try:
                received: Received = self._raw.recvmsg(max_bytes, _ROOM, _RECEIVE_FLAGS)
            except BlockingIOError:
                return await self._receive_later(max_bytes, cancellable)
            await cancel_shielded_checkpoint()
            return received
        except _FAILURES as exc:
            raise await self._failed(exc) from exc
        finally:
            if passcred:
                self._return_passcred()
            self._receiving = False

    @enable_ki_protection
    async def _receive_later(self, max_bytes: int, cancellable: Cancellable | None) -> Received:
        while True:
            await _wait(wait_readable, self._raw, cancellable)
            try:
                return self._raw.recvmsg(max_bytes, _ROOM, _RECEIVE_FLAGS)
            except BlockingIOError:
                continue

    @enable_ki_protection
    async def _send_byte(
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
                self._raw.sendmsg(_ONE_BYTE, [message], _SEND_FLAGS)
            except OSError as exc:
                if exc.errno != errno.EAGAIN and exc.errno not in _PRESSURE:
                    raise
                await self._send_byte_later(exc, message, cancellable, fd)
            else:
                await cancel_shielded_checkpoint()
        except _FAILURES as exc:
            raise await self._failed(exc, message) from exc
        finally:
            self._sending = False

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
                    await _wait(wait_writable, self._raw, cancellable)
                else:
                    # The socket polls writable all the while, so waiting for that would spin.
                    await _wait(trio.sleep, pause, cancellable)
                    pause = min(2 * pause, _LONGEST_PAUSE)
                try:
                    self._raw.sendmsg(_ONE_BYTE, [message], _SEND_FLAGS)
                except OSError as exc:
                    if exc.errno != errno.EAGAIN and exc.errno not in _PRESSURE:
                        raise
                    refusal = exc
                else:
                    return
        finally:
            if duplicate != -1:
                os.close(duplicate)

    def _send_some(self, view: memoryview) -> int:
        try:
            return self._raw.send(view, _SEND_FLAGS)
        except BlockingIOError:
            return 0

    def _begin_sending(self) -> None:
        if self._sending:
            raise ConnectionBusyError("another task is sending on this connection")
        self._sending = True

    def _lend_passcred(self) -> None:
        option = _kernel.SO_PASSCRED
        if option is None or _kernel.SCM_CREDENTIALS is None:
            return
        if not self._raw.getsockopt(_kernel.SOL_SOCKET, option):
            self._raw.setsockopt(_kernel.SOL_SOCKET, option, 1)
            self._passcred_lent = True

    def _return_passcred(self) -> None:
        """Switch SO_PASSCRED off if it was us: other processes may hold the same socket."""
        if self._passcred_lent:
            self._passcred_lent = False
            if not self.is_closed():
                option = _kernel.required(_kernel.SO_PASSCRED, "SO_PASSCRED")
                self._raw.setsockopt(_kernel.SOL_SOCKET, option, 0)

    def _check_open(self) -> None:
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


# Only on this list are errors that a caller can do something about.
_SEND_PROBLEMS: Final[dict[int | None, str]] = {
    errno.EBADF: "the descriptor to send is closed",
    errno.EMFILE: "no descriptor is free to hold on to the one to send while waiting "
    "(RLIMIT_NOFILE)",
    errno.EPERM: "the kernel does not let this process send these credentials",
}

_FAILURES: Final = (OSError, trio.ClosedResourceError, trio.BusyResourceError)

# isinstance(conn, trio.SocketStream) must hold, and trio lets nobody subclass it.
trio.SocketStream.register(UnixConnection)


def connection_pair() -> tuple[UnixConnection, UnixConnection]:
    """Return two connections that are connected to each other, as socketpair(2).

    The caller owns both.

    Raises:
      NotSupportedError: the platform has no Unix sockets.
      OSError: no descriptors are free.
    """
    family = _kernel.required(_kernel.AF_UNIX, "Unix sockets")
    one, two = stdlib_socket.socketpair(family, stdlib_socket.SOCK_STREAM)
    return UnixConnection.from_stdlib_socket(one), UnixConnection.from_stdlib_socket(two)


_Awaited = TypeVar("_Awaited")


async def _wait(
    wait: Callable[[_Awaited], Awaitable[None]], argument: _Awaited, cancellable: Cancellable | None
) -> None:
    if cancellable is None:
        await wait(argument)
    else:
        with cancellable.scope():
            await wait(argument)


def _ended(due: str, received: Received) -> EndOfStreamError:
    # With SO_PASSCRED on, a control message comes even with the end of the stream.
    _control.parse(received[1], received[2]).close()
    return EndOfStreamError(f"{due} was due, but the peer has ended the stream")


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


def _check_connected(sock: stdlib_socket.socket) -> None:
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
