"""UnixConnection: bytes, descriptors, credentials and peer identity of one connection.

The rule of this file: it says what each operation sends and what it takes for an answer; how a
message travels is the business of _sending and _receiving, and what may have come with what
that of _control.

Sources: unix(7), trio's SocketStream, https://docs.gtk.org/gio-unix/class.Connection.html
"""

from __future__ import annotations

import errno
import operator
import socket as stdlib_socket
from typing import TYPE_CHECKING, Final, overload

import trio
from trio.lowlevel import checkpoint, enable_ki_protection, notify_closing

from . import _control, _descriptors, _kernel
from ._buffers import bytes_of
from ._credentials import Credentials, can_tell_credentials
from ._fdlist import UnixFDList
from ._kinds import register_stream
from ._messages import Message
from ._passing import NUL, DescriptorPassing, FileDescriptor, at_least, ended
from ._peer import KnownPeer
from ._receiving import Receiver, RefusingReceiver
from ._sending import Sender
from ._socket import check_connected, stdlib_socket_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ._address import UnixSocketAddress
    from ._buffers import Buffer
    from ._cancellable import Cancellable

# As trio.SocketStream.
DEFAULT_RECEIVE_SIZE: Final = 65536


class UnixConnection(DescriptorPassing, KnownPeer, trio.abc.HalfCloseableStream):
    """A connected Unix-domain stream socket: ``Gio.UnixConnection`` for trio.

    It is a ``trio.abc.HalfCloseableStream`` with the whole interface of
    ``trio.SocketStream``, and a virtual subclass of it: ``isinstance(conn,
    trio.SocketStream)`` is true. It cannot be a real subclass, because trio forbids
    subclassing its concrete classes (trio #1044).

    Args:
      socket: a connected ``AF_UNIX``, ``SOCK_STREAM`` trio socket. The connection owns it
        from now on; if this raises, the caller still does.
      receive_descriptors: whether the peer may send descriptors. If not, whoever sends some
        gets EPERM where the kernel has ``SO_PASSRIGHTS`` (Linux 6.16), and elsewhere those
        that come are closed and :class:`UnexpectedDescriptorsError` is raised.
      local_address, remote_address: what the two ends are called, where the kernel cannot know
        (a path was renamed after it was bound).

    Attributes:
      socket: that trio socket.

    Raises:
      TypeError: not a trio socket.
      ValueError: another family or type, closed, listening, or not connected.
      NotSupportedError: the platform has no Unix sockets.

    All async methods are checkpoints, also when the kernel says no; wrong arguments and a busy
    direction are told at once. A cancellation either happens before anything was sent or
    received, or is put off until after the method has returned its result; only
    :meth:`send_all`, :meth:`send_message` and :meth:`send_fds` may have sent a part. One task
    at a time may send, and one receive.

    All of them can raise, besides what each names: :class:`ConnectionClosedError` (this side
    closed the connection), :class:`ConnectionBrokenError` (the peer is gone),
    :class:`ConnectionBusyError` (another task uses the same direction) and, with a
    ``cancellable``, :class:`OperationCancelled`. They are trio's ``ClosedResourceError``,
    ``BrokenResourceError`` and ``BusyResourceError`` with Gio's code.
    """

    __slots__ = (
        "__weakref__",
        "_local_address",
        "_receiver",
        "_remote_address",
        "_sender",
        "socket",
    )

    def __init__(
        self,
        socket: trio.socket.SocketType,
        *,
        receive_descriptors: bool = True,
        local_address: UnixSocketAddress | None = None,
        remote_address: UnixSocketAddress | None = None,
    ) -> None:
        raw = stdlib_socket_of(socket)
        check_connected(raw)
        self.socket: trio.socket.SocketType = socket
        self._sender = Sender(socket, raw)
        self._receiver = (Receiver if receive_descriptors else RefusingReceiver)(socket, raw)
        self._local_address = local_address
        self._remote_address = remote_address

    @classmethod
    def from_stdlib_socket(
        cls,
        sock: stdlib_socket.socket,
        *,
        receive_descriptors: bool = True,
        local_address: UnixSocketAddress | None = None,
        remote_address: UnixSocketAddress | None = None,
    ) -> UnixConnection:
        """Make one from a standard library socket; the other arguments are the constructor's.

        The connection owns the socket from now on and makes it non-blocking; if this raises,
        the socket is as it was and still the caller's.

        Raises:
          TypeError, ValueError, NotSupportedError: as the constructor.
        """
        if not isinstance(sock, stdlib_socket.socket):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a socket.socket is due, not {type(sock).__name__} ({sock!r})")
        check_connected(sock)
        return cls(
            trio.socket.from_stdlib_socket(sock),
            receive_descriptors=receive_descriptors,
            local_address=local_address,
            remote_address=remote_address,
        )

    @classmethod
    def from_fd(cls, fd: int, *, receive_descriptors: bool = True) -> UnixConnection:
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
        number = _descriptors.descriptor_number(fd)
        try:
            sock = stdlib_socket.socket(fileno=number)
        except OSError as exc:
            what = "is not open" if exc.errno == errno.EBADF else "is not a socket"
            raise ValueError(f"descriptor {number} {what}: a connected Unix socket is due") from exc
        try:
            connection = cls.from_stdlib_socket(sock, receive_descriptors=receive_descriptors)
        except BaseException:
            sock.detach()
            raise
        sock.set_inheritable(False)
        return connection

    ################################################################
    # Credentials
    ################################################################

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
        await self._sender.send(NUL, [_control.own_credentials()], cancellable)
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
        if _control.CREDENTIALS is None:
            can_tell_credentials()
        received = await self._receiver.receive(1, cancellable, passcred=True)
        if not received[0]:
            raise ended("a byte with credentials", received)
        credentials = _control.only_credentials(received)
        return self.get_peer_credentials() if credentials is None else credentials

    @enable_ki_protection
    async def send_fake_credentials(
        self, credentials: Credentials, cancellable: Cancellable | None = None
    ) -> bool:
        """Send credentials that are not this process's own, with one NUL byte.

        Returns:
          True.

        Raises:
          PermissionError: this process may not (CAP_SYS_ADMIN for the pid, CAP_SETUID,
            CAP_SETGID for the others); nothing was sent.
          ProcessLookupError: no process has that pid; nothing was sent.
          TypeError: not Credentials.
          NotSupportedError: the platform has no message for credentials.

        Source: unix(7) (``SCM_CREDENTIALS``)
        """
        if not isinstance(credentials, Credentials):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Credentials are due, not {type(credentials).__name__}")
        await self._sender.send(NUL, [_control.credentials(credentials)], cancellable)
        return True

    ################################################################
    # Whole messages
    ################################################################

    @enable_ki_protection
    async def send_message(
        self,
        data: Buffer,
        *,
        fds: Iterable[FileDescriptor] = (),
        credentials: Credentials | None = None,
        cancellable: Cancellable | None = None,
    ) -> None:
        """Send bytes with descriptors and credentials, which travel with the first byte.

        The descriptors stay the caller's, and may be closed while this waits.

        Args:
          data: at least one byte, if anything goes with it.
          fds: at most 253.
          credentials: ``Credentials()`` for this process's own.

        Raises:
          TypeError, ValueError, OSError: as :meth:`send_fd`; or descriptors or credentials
            without a byte, which the kernel would drop. Nothing was sent.
          DescriptorsRefusedError: the peer takes no descriptors.
          PermissionError, ProcessLookupError: as :meth:`send_fake_credentials`.

        If this is cancelled or fails when a part of the bytes has gone, later sends raise
        ConnectionBrokenError: the peer would take them for the rest of this message.
        """
        numbers = _descriptors.descriptor_numbers(fds, _kernel.SCM_MAX_FD)
        messages = [_control.rights_of(numbers)] if numbers else []
        if credentials is not None:
            messages.append(_control.credentials(credentials))
        with bytes_of(data) as view:
            if not view:
                if messages:
                    raise ValueError(
                        "descriptors and credentials travel with a byte, and would vanish "
                        "without; send at least one"
                    )
                await self._sender.send_all(view, cancellable)
                return
            await self._sender.send(view, messages, cancellable, numbers)

    @enable_ki_protection
    async def receive_message(
        self,
        max_bytes: int,
        *,
        max_fds: int = _kernel.SCM_MAX_FD,
        credentials: bool = False,
        pidfd: bool = False,
        cancellable: Cancellable | None = None,
    ) -> Message:
        """Receive up to ``max_bytes`` bytes, and what came with them.

        The stream keeps no boundaries of messages without descriptors; a read never goes on
        behind a message with descriptors, but bytes sent before it may stand in front.

        Args:
          max_fds: 0 to 253; more are an error, and closed.
          credentials: whether to ask for the sender's (``SO_PASSCRED``), for this time.
          pidfd: whether to ask for one of the sender (``SO_PASSPIDFD``), for this time. What was
            sent before, without credentials, comes without.

        Returns:
          A message that owns its descriptors. Its data is empty at the end of the stream.

        Raises:
          UnexpectedControlMessageError: more than ``max_fds`` descriptors; the bytes are in
            ``.data``.
          DescriptorsTruncatedError: some were lost, as no slot was free for them.
          ValueError: ``max_bytes`` is below 1, or ``max_fds`` not from 0 to 253.
          NotSupportedError: ``pidfd`` on a kernel before Linux 6.5, or elsewhere.
        """
        size = at_least(max_bytes, 1, "max_bytes")
        most = at_least(max_fds, 0, "max_fds")
        if most > _kernel.SCM_MAX_FD:
            raise ValueError(f"max_fds must be at most {_kernel.SCM_MAX_FD}, not {most}")
        if credentials:
            can_tell_credentials()
        received = await self._receiver.receive(
            size, cancellable, passcred=credentials, passpidfd=pidfd
        )
        fds = _control.only_rights(received, most)
        if fds is not None:
            return Message(received[0], UnixFDList.owning(fds), None, UnixFDList.owning([]))
        parsed = _control.whole_message(received, most)
        return Message(
            received[0],
            UnixFDList.owning(parsed.fds),
            parsed.credentials[0] if parsed.credentials else None,
            UnixFDList.owning(parsed.pidfds),
        )

    ################################################################
    # Bytes: the interface of trio.SocketStream
    ################################################################

    async def send_all(self, data: Buffer) -> None:
        """Send all of ``data``; as ``trio.SocketStream.send_all``.

        If this is cancelled or fails, some of it may have been sent.
        """
        await self._sender.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until there is room to send; as ``trio.SocketStream``."""
        await self._sender.wait_writable()

    async def send_eof(self) -> None:
        """Send an end of file; receiving goes on. As ``trio.SocketStream.send_eof``."""
        await self._sender.send_eof()

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
        received = await self._receiver.receive(size, None)
        if received[1] or received[2] & _kernel.MSG_CTRUNC:
            return _control.only_bytes(received)
        return received[0]

    async def aclose(self) -> None:
        """Close the connection, at once and also when cancelled; closing twice is allowed.

        A task that waits in this connection gets :class:`ConnectionClosedError`.
        """
        self._close_now()
        await checkpoint()

    def _close_now(self) -> None:
        self._receiver.release()
        self.socket.close()

    def detach(self) -> int:
        """Take the descriptor out of this connection, which is closed by that.

        A task that waits in this connection gets :class:`ConnectionClosedError`. Descriptors
        that ``fds()`` had read ahead are closed.

        Returns:
          The descriptor of the socket, which is still connected; the caller owns it.

        Raises:
          ConnectionClosedError: this side has closed the connection.
        """
        self._receiver.check_open()
        self._receiver.release()
        notify_closing(self._receiver.raw)
        return self._receiver.raw.detach()

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

    def is_connected(self) -> bool:
        """Whether this side has not closed the connection; as in Gio, not whether the peer has."""
        return not self.is_closed()

    def is_closed(self) -> bool:
        """Whether this side has closed the connection."""
        return self._receiver.is_closed()

    def __repr__(self) -> str:
        if self.is_closed():
            return "<UnixConnection closed>"
        return f"<UnixConnection fd={self._receiver.raw.fileno()} to {self.get_remote_address()}>"


# isinstance(conn, trio.SocketStream) must hold, and trio lets nobody subclass it.
trio.SocketStream.register(UnixConnection)

if _kernel.AF_UNIX is not None:
    register_stream(_kernel.AF_UNIX, UnixConnection)


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
