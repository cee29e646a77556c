"""UnixConnection: bytes, descriptors, credentials and peer identity of one connection.

The rule of this file: it says what each operation sends and what it takes for an answer; how
a message travels is the transport's business, and what may have come with what is _control's.

Sources: unix(7), trio's SocketStream, https://docs.gtk.org/gio-unix/class.Connection.html
"""

from __future__ import annotations

import errno
import operator
import socket as stdlib_socket
from typing import TYPE_CHECKING, Final, TypeAlias, overload

import trio
from trio.lowlevel import checkpoint, enable_ki_protection

from . import _control, _kernel
from ._address import UnixSocketAddress
from ._control import FileDescriptor as FileDescriptor  # noqa: PLC0414, TC001 - exported
from ._credentials import Credentials, can_tell_credentials, peer_credentials
from ._transport import Transport, check_connected
from .errors import EndOfStreamError

if TYPE_CHECKING:
    from ._cancellable import Cancellable
    from ._control import Received

    Buffer: TypeAlias = bytes | bytearray | memoryview

# As trio.SocketStream.
DEFAULT_RECEIVE_SIZE: Final = 65536


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

    __slots__ = ("__weakref__", "_transport", "socket")

    def __init__(self, socket: trio.socket.SocketType) -> None:
        self._transport = Transport(socket)
        self.socket: trio.socket.SocketType = socket

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
        check_connected(sock)
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
        await self._transport.send_byte(_control.rights(number), cancellable, number)
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
        received = await self._transport.receive(1, cancellable)
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
        await self._transport.send_byte(_control.credentials(Credentials()), cancellable)
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
        received = await self._transport.receive(1, cancellable, passcred=True)
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
        self._transport.check_open()
        return peer_credentials(self._transport.raw.getsockopt)

    ################################################################
    # Bytes: the interface of trio.SocketStream
    ################################################################

    async def send_all(self, data: Buffer) -> None:
        """Send all of ``data``; as ``trio.SocketStream.send_all``.

        If this is cancelled or fails, some of it may have been sent.
        """
        await self._transport.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until there is room to send; as ``trio.SocketStream``."""
        await self._transport.wait_writable()

    async def send_eof(self) -> None:
        """Send an end of file; receiving goes on. As ``trio.SocketStream.send_eof``."""
        await self._transport.send_eof()

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
        received = await self._transport.receive(size, None)
        if received[1] or received[2] & _kernel.MSG_CTRUNC:
            return _control.only_bytes(received)
        return received[0]

    async def aclose(self) -> None:
        """Close the connection, at once and also when cancelled; closing twice is allowed.

        A task that waits in this connection gets :class:`ConnectionClosedError`.
        """
        self._transport.close()
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
        self._transport.check_open()
        return UnixSocketAddress.from_native(self._transport.raw.getsockname())

    def get_remote_address(self) -> UnixSocketAddress:
        """Return the name of the peer's end; unnamed unless it was bound.

        Raises:
          ConnectionClosedError: this side closed the connection.
        """
        self._transport.check_open()
        return UnixSocketAddress.from_native(self._transport.raw.getpeername())

    def is_connected(self) -> bool:
        """Whether this side has not closed the connection; as in Gio, not whether the peer has."""
        return not self.is_closed()

    def is_closed(self) -> bool:
        """Whether this side has closed the connection."""
        return self._transport.is_closed()

    def __repr__(self) -> str:
        if self.is_closed():
            return "<UnixConnection closed>"
        return f"<UnixConnection fd={self._transport.raw.fileno()} to {self.get_remote_address()}>"


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


def _ended(due: str, received: Received) -> EndOfStreamError:
    # With SO_PASSCRED on, a control message comes even with the end of the stream.
    _control.parse(received[1], received[2]).close()
    return EndOfStreamError(f"{due} was due, but the peer has ended the stream")
