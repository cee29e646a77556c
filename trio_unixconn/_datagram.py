"""UnixDatagramSocket: messages without a connection, as syslog, the journal and systemd use them.

Invariant: a datagram is sent or received as a whole, and its file descriptors are returned or
closed.

Sources: unix(7), sendmsg(2), recvmsg(2), https://docs.gtk.org/gio/method.Socket.send_message.html
"""

from __future__ import annotations

import socket as stdlib_socket
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from . import _ancillary, _bind, _closing, _fds, _kernel
from ._address import UnixSocketAddress
from ._buffers import bytes_of
from ._connection import DEFAULT_RECEIVE_SIZE, check_at_least, check_int
from ._credentials import Credentials
from ._fdlist import UnixFDList
from ._messages import Message
from ._owner import DescriptorOwner
from ._receiver import DatagramReceiver
from ._sender import DatagramSender
from ._sockopts import adopt_fd, check_datagram, disable_passrights, enable_passing, raw_socket
from ._trio_task import check_task, checkpoint_in_task
from .errors import ConnectionClosedError, DatagramTruncatedError

if TYPE_CHECKING:
    from ._address import AddressLike
    from ._buffers import Buffer
    from ._cancellable import Cancellable
    from ._fds import FileDescriptor

_NO_FDS: Final = ()
# How long aclose() waits until the socket is closed, in seconds of real time.
_CLOSE_GRACE: Final = 1.0


@attrs.frozen(eq=False)
class Datagram(Message):
    """A message that :meth:`UnixDatagramSocket.receive_message` received.

    It owns its descriptors, as every :class:`Message` does.

    Attributes:
      data: the bytes; a datagram can have none.
      fds: the descriptors that the datagram carried, in order.
      credentials: the sender's, checked by the kernel; None if the socket does not ask for them.
      pidfds: the sender's pidfd, if the socket asks for it and the kernel had one.
      sender: the address of the socket that sent it, for a reply; anonymous if it has none. Any
        process can bind any name, so this says nothing about the process.
    """

    sender: UnixSocketAddress = attrs.field(factory=UnixSocketAddress)


class UnixDatagramSocket(DescriptorOwner, trio.abc.AsyncResource):
    """A Unix datagram socket.

    :func:`open_unix_datagram` makes one at a path, or without a name. This constructor and
    :meth:`from_fd` take a socket that is open already, and leave its path alone.

    Args:
      socket: an ``AF_UNIX``, ``SOCK_DGRAM`` trio socket. This owns it from now on; if this raises,
        the caller still does.
      receive_descriptors: whether datagrams may bring file descriptors; as of
        :class:`UnixConnection`.
      address: the name of the socket, if it is not the one that getsockname(2) returns.

    Attributes:
      socket: that trio socket, for its options.

    Raises:
      TypeError: not a trio socket.
      ValueError: another family or type, or closed.
      NotSupportedError: the platform has no Unix sockets.

    Both methods are checkpoints. A cancelled operation has had no effect. One task at a time may
    send, and one may receive. Both raise, besides the errors that each lists,
    :class:`ConnectionClosedError`, :class:`ConnectionBusyError` and, with a ``cancellable``,
    :class:`OperationCancelled`.
    """

    __slots__ = (
        "__weakref__",
        "_address",
        "_binding",
        "_leaving",
        "_receive_descriptors",
        "_receiver",
        "_sender",
        "socket",
    )

    def __init__(
        self,
        socket: trio.socket.SocketType,
        *,
        receive_descriptors: bool = True,
        address: UnixSocketAddress | None = None,
    ) -> None:
        raw = raw_socket(socket)
        check_datagram(raw)
        self.socket: trio.socket.SocketType = socket
        self._sender = DatagramSender(socket, raw)
        self._receiver = DatagramReceiver(socket, raw)
        self._receive_descriptors = receive_descriptors
        self._address = address
        self._binding: _bind.Binding | None = None
        self._leaving = trio.Lock()
        if not receive_descriptors:
            disable_passrights(raw)
        # Until the receiver is collected.
        _closing.keep(raw)

    @classmethod
    def from_stdlib_socket(
        cls, sock: stdlib_socket.socket, *, receive_descriptors: bool = True
    ) -> UnixDatagramSocket:
        """Make one from a standard library socket, such as one of a ``socketpair``.

        It owns the socket from now on and makes it non-blocking; if this raises, the socket is as
        it was and still the caller's.

        Raises:
          TypeError: not a socket.
          ValueError: as the constructor.
          NotSupportedError: as the constructor.
        """
        if not isinstance(sock, stdlib_socket.socket):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"expected a socket.socket, got {type(sock).__name__}")
        check_datagram(sock)
        return cls(trio.socket.from_stdlib_socket(sock), receive_descriptors=receive_descriptors)

    @classmethod
    def from_fd(cls, fd: int, *, receive_descriptors: bool = True) -> UnixDatagramSocket:
        """Make one from a file descriptor, inherited (``ListenDatagram=``) or received.

        It owns the file descriptor from now on, makes it close-on-exec, and makes the socket
        non-blocking for all processes that share it; if this raises, the file descriptor is as it
        was and still the caller's. Closing it leaves the path.

        Raises:
          TypeError: not an int.
          ValueError: not open, not a socket, or not a Unix datagram socket.
          NotSupportedError: as the constructor.
        """
        return adopt_fd(
            fd,
            "a Unix datagram socket",
            lambda sock: cls.from_stdlib_socket(sock, receive_descriptors=receive_descriptors),
        )

    @enable_ki_protection
    async def send_message(
        self,
        data: Buffer,
        to: AddressLike | None = None,
        *,
        fds: Iterable[FileDescriptor] = _NO_FDS,
        credentials: Credentials | None = None,
        cancellable: Cancellable | None = None,
    ) -> None:
        r"""Send one datagram, with file descriptors and credentials.

        While the queue of the receiver is full, this waits. For a timeout, use
        ``trio.fail_after``. The file descriptors stay the caller's, and may be closed even while
        this waits: then duplicates are sent.

        Args:
          data: the bytes; a datagram without bytes is sent, too, and so are its file descriptors.
          to: the address of the receiver: a path, even one that is too long for the address of a
            socket, ``"\0name"`` for an abstract name, or the ``sender`` of a datagram. None: the
            peer of a socket that is connected.
          fds: an iterable of at most 253 of what :meth:`UnixConnection.send_fd` accepts.
          credentials: ``Credentials()`` for this process's own. Only a privileged process can send
            others. If the receiver asks for credentials, the kernel adds them without this.

        Raises:
          TypeError: not an address, or not file descriptors; nothing was sent.
          ValueError: an anonymous address, or a number that no file descriptor has; nothing was
            sent.
          SendError: the kernel rejects it, and nothing was sent. It is a
            ``ConnectionRefusedError`` if no process holds the socket of the receiver, a
            ``FileNotFoundError`` if there is none, and a ``PermissionError`` if this process may
            not send to it. EPROTOTYPE: it is not a datagram socket. EMSGSIZE: the data is too
            large; send a memfd instead. EBADF and EMFILE as of :meth:`UnixConnection.send_fd`.
          DescriptorsRefusedError: the receiver does not accept file descriptors.
        """
        address = None if to is None else UnixSocketAddress.from_any(to, argument="to")
        if address is not None and address.get_is_anonymous():
            raise ValueError(
                "cannot send to an anonymous address; the sender has no name to reply to"
            )
        numbers: Sequence[int] = ()
        if fds is not _NO_FDS:
            # The owners stay referenced until this returns.
            numbers, _owners = _fds.filenos(fds, _kernel.SCM_MAX_FD)
        if credentials is not None and not isinstance(credentials, Credentials):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"credentials must be Credentials or None, got {type(credentials).__name__}"
            )
        with bytes_of(data) as view:
            await self._sender.send_to(view, numbers, credentials, address, cancellable)

    @enable_ki_protection
    async def receive_message(
        self,
        max_bytes: int = DEFAULT_RECEIVE_SIZE,
        *,
        max_fds: int = _kernel.SCM_MAX_FD,
        cancellable: Cancellable | None = None,
    ) -> Datagram:
        """Receive one datagram, with its file descriptors, its sender and credentials.

        A datagram socket has no end: this waits even if no process can send any more. Every error
        but :class:`ConnectionClosedError` and :class:`ConnectionBusyError` is about one datagram,
        which is lost. The next call returns the next one.

        Args:
          max_bytes: the size of the largest datagram that is accepted. Linux limits those of
            unprivileged senders to ``net.core.wmem_max``, by default 212,960 bytes.
          max_fds: 0 to 253; more are an error, and closed.

        Returns:
          A datagram that owns its file descriptors: use it in an ``async with`` block.

        Raises:
          DatagramTruncatedError: more than ``max_bytes`` bytes; its ``.size`` says how many.
          UnexpectedControlMessageError: more than ``max_fds`` file descriptors; the bytes are in
            ``.data``.
          UnexpectedDescriptorsError: the same, with ``receive_descriptors=False``.
          DescriptorsTruncatedError: some were lost, because no slot was free.
          ValueError: ``max_bytes`` is below 1, or ``max_fds`` not from 0 to 253.
        """
        size = check_at_least(max_bytes, 1, "max_bytes")
        most = check_at_least(max_fds, 0, "max_fds")
        if most > _kernel.SCM_MAX_FD:
            raise ValueError(f"max_fds must be at most {_kernel.SCM_MAX_FD}, got {most}")
        received, sent = await self._receiver.receive_datagram(size, cancellable)
        sender = UnixSocketAddress.from_native(received[3] or b"")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        if sent > size:
            message = _ancillary.unpack(received)
            message.close()
            raise DatagramTruncatedError(message.data, sent, sender, message.credentials)
        if not self._receive_descriptors:
            _ancillary.expect_no_fds(received)
        message = _ancillary.expect_message(received, most, received_by="socket")
        return Datagram(
            message.data,
            UnixFDList.owning(message.fds),
            message.credentials,
            UnixFDList.owning(message.pidfds),
            sender,
        )

    def get_local_address(self) -> UnixSocketAddress:
        """Return the name of this socket; anonymous unless it was bound.

        Raises:
          ConnectionClosedError: this socket is closed.
        """
        if self.is_closed():
            raise ConnectionClosedError("this socket is closed")
        return self._address or UnixSocketAddress.from_native(self._receiver.raw.getsockname())

    def is_closed(self) -> bool:
        """Whether this side has closed the socket."""
        return self._receiver.is_closed()

    async def aclose(self) -> None:
        """Close the socket and remove its path, even if cancelled; closing twice is allowed.

        A task that waits on this socket gets :class:`ConnectionClosedError`. Datagrams in the
        queue are dropped. Senders have chosen the file descriptors in them, and closing these may
        block, so a thread of this library closes them. This waits until the name can be bound
        again, but not for longer than a second.

        If the path cannot be removed, or another process keeps its lock for two seconds, it stays,
        and the next server replaces it.
        """
        check_task()
        raw = self._receiver.raw
        # First the path: while the socket is open, it is known to be ours. So a second task waits.
        with trio.CancelScope(shield=True):
            async with self._leaving:
                binding, self._binding = self._binding, None
                if binding is not None and raw.fileno() != -1:
                    await _bind.unbind_quietly(binding)
        if raw.fileno() != -1:
            self._sender.release()
            self._receiver.release()
            trio.lowlevel.notify_closing(raw)
            # A datagram without bytes can have file descriptors, too, and FIONREAD is 0 for it.
            if not _closing.is_readable(raw.fileno()):
                raw.close()
            else:
                closed = threading.Event()
                _closing.close_fds([raw.detach()], closed.set)
                with suppress(RuntimeError):
                    await trio.to_thread.run_sync(
                        closed.wait,
                        _CLOSE_GRACE,
                        abandon_on_cancel=True,
                        limiter=trio.CapacityLimiter(1),
                    )
        await trio.lowlevel.checkpoint()

    def __repr__(self) -> str:
        if self.is_closed():
            return "<UnixDatagramSocket closed>"
        try:
            name = f" {self.get_local_address()}"
        except OSError:
            # Other code has closed the number.
            name = ""
        return f"<UnixDatagramSocket fd={self._receiver.raw.fileno()}{name}>"


@enable_ki_protection
async def open_unix_datagram(
    path: AddressLike | None = None,
    *,
    mode: int = 0o600,
    credentials: bool = False,
    pidfds: bool = False,
    receive_descriptors: bool = True,
    replace: bool = False,
    unlink_on_close: bool = True,
) -> UnixDatagramSocket:
    r"""Open a Unix datagram socket, at a path or an abstract name, or without a name.

    Args:
      path: where to receive: a path, even one that is too long for the address of a socket, or
        ``"\0name"`` for an abstract name. With ``""``, the kernel chooses an abstract name, so that
        receivers can reply. None: no name, to send only.
      mode: the permission bits of the path, whatever the umask. On Linux, to send takes write
        permission. Not used for an abstract name.
      credentials: whether every datagram arrives with the credentials of its sender
        (``SO_PASSCRED``). A socket without a name then gets an abstract one when it sends.
      pidfds: whether every datagram arrives with a pidfd of its sender (``SO_PASSPIDFD``).
      receive_descriptors: as of :class:`UnixDatagramSocket`.
      replace, unlink_on_close: as of :func:`open_unix_listener`: a socket that no process holds is
        replaced, one that a process holds only with ``replace``.

    Returns:
      A socket that the caller owns.

    Raises:
      TypeError: an argument of a wrong type.
      ValueError: a wrong argument.
      AddressInUseError: a process holds a socket there, something else is there, or another
        process keeps the lock of the path for ten seconds; nothing was changed.
      OSError: from the file system, with the address; nothing is left at the path.
      NotSupportedError: the platform has no Unix sockets, or not what was asked for.
    """
    family = _kernel.required(_kernel.AF_UNIX, "Unix sockets")
    name = None if path is None else UnixSocketAddress.from_any(path, argument="path")
    if not 0 <= check_int(mode, "mode") <= 0o7777:
        raise ValueError(f"mode must be from 0 to 0o7777, got {mode:#o}")
    await checkpoint_in_task()
    sock = stdlib_socket.socket(family, stdlib_socket.SOCK_DGRAM)
    binding = None
    try:
        # Before bind: from then on datagrams can arrive.
        enable_passing(sock, credentials=credentials, pidfds=pidfds)
        if not receive_descriptors:
            disable_passrights(sock)
        socket = trio.socket.from_stdlib_socket(sock)
        if name is None:
            pass
        elif name.get_is_abstract() or name.get_is_anonymous():
            _bind.bind_abstract(sock, name)
        else:
            binding = await _bind.bind_path(
                sock, name, _bind.Permissions(mode), lambda: None, replace=replace
            )
        opened = UnixDatagramSocket(
            socket,
            receive_descriptors=receive_descriptors,
            address=name if binding is not None else None,
        )
    except BaseException:
        # Datagrams may have arrived.
        _closing.close_fds([sock.detach()])
        raise
    if unlink_on_close:
        opened._binding = binding
    return opened
