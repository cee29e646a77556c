"""UnixConnection: bytes, file descriptors, credentials and peer identity of one connection.

Sources: unix(7), trio's SocketStream, https://docs.gtk.org/gio-unix/class.Connection.html
"""

from __future__ import annotations

import operator
import os
import socket as stdlib_socket
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar, overload

import trio
from trio.lowlevel import checkpoint, enable_ki_protection, notify_closing

from . import _ancillary, _closing, _fds, _kernel, _memfd
from ._address import UnixSocketAddress, check_address
from ._buffers import bytes_of
from ._credentials import Credentials, can_tell_credentials, peer_credentials
from ._fdlist import UnixFDList
from ._fds import FileDescriptor as FileDescriptor  # noqa: PLC0414, TC001 - exported
from ._fdtypes import (
    DescriptorKind,
    check_kinds,
    check_mode,
    open_file_or_close,
    open_socket,
    open_stream,
    register_stream,
)
from ._identity import get_peer_groups, get_peer_security_context, identify, open_peer_pidfd
from ._memfd import Seals
from ._messages import Message
from ._owner import DescriptorOwner
from ._receiver import Receiver, RefusingReceiver, with_data
from ._sender import NUL, Sender
from ._sockopts import adopt_fd, check_connected, raw_socket
from ._trio_task import check_task
from .errors import ConnectionClosedError, EndOfStreamError

if TYPE_CHECKING:
    from ._ancillary import RawMessage
    from ._buffers import Buffer
    from ._cancellable import Cancellable
    from ._identity import PeerIdentity

_T = TypeVar("_T")

# As trio.SocketStream.
DEFAULT_RECEIVE_SIZE: Final = 65536

DEFAULT_READ_AHEAD: Final = 128

_NO_FDS: Final = ()


class DescriptorStream(DescriptorOwner):
    """An async iterator over file descriptors; see :meth:`UnixConnection.fds`."""

    __slots__ = ("_read_ahead", "_receiver")

    def __init__(self, receiver: Receiver, read_ahead: int) -> None:
        self._receiver = receiver
        self._read_ahead = read_ahead

    def __aiter__(self) -> DescriptorStream:
        return self

    @enable_ki_protection
    async def __anext__(self) -> int:
        receiver = self._receiver
        ahead = receiver.ahead
        if ahead and not receiver.busy:
            first = ahead[0]
            # Errors, and messages that are not a lone file descriptor, are left to receive(). This
            # does not check whether the caller has closed the socket without the connection: what
            # was read ahead is returned even then, up to the first message of another kind.
            if isinstance(first, tuple) and first[0] >= 0:
                ahead.popleft()
                return first[0]
        is_ahead = bool(ahead)
        if ahead is not None and not is_ahead:
            # This may wait for long, and a guard makes sending slower on all connections.
            ahead.unguard()
        received = await receiver.receive(1, None)
        if not received[0]:
            close_trailing_fds(received)
            raise StopAsyncIteration
        if not is_ahead:
            receiver.read_ahead(self._read_ahead - 1)
        return _ancillary.expect_fd(received)

    def __repr__(self) -> str:
        fd = self._receiver.raw.fileno()
        return f"<DescriptorStream fd={fd} read_ahead={self._read_ahead}>"


class UnixConnection(DescriptorOwner, trio.abc.HalfCloseableStream):
    """A connected Unix-domain stream socket: ``Gio.UnixConnection`` for trio.

    It is a ``trio.abc.HalfCloseableStream`` with the whole interface of
    ``trio.SocketStream``, and a virtual subclass of it: ``isinstance(conn,
    trio.SocketStream)`` is true. It cannot be a real subclass, because trio forbids
    subclassing its concrete classes (trio #1044).

    Args:
      socket: a connected ``AF_UNIX``, ``SOCK_STREAM`` trio socket. The connection owns it
        from now on; if this raises, the caller still does.
      receive_descriptors: whether the peer may send file descriptors. If not, sending them
        fails with EPERM on a kernel that has ``SO_PASSRIGHTS`` (Linux 6.16). On other kernels,
        those that arrive are closed, and :class:`UnexpectedDescriptorsError` is raised.
      local_address, remote_address: the names of the two ends, if the kernel cannot know them
        (a path was renamed after it was bound).

    Attributes:
      socket: that trio socket. It does not have what :meth:`fds` has read ahead; check
        :meth:`has_read_ahead` before you receive from it.

    Raises:
      TypeError: not a trio socket.
      ValueError: another family or type, closed, listening, or not connected.
      NotSupportedError: the platform has no Unix sockets.

    All async methods are checkpoints, even if the kernel reports an error; wrong arguments and a
    busy direction raise immediately. A cancelled operation has had no effect: once something
    was sent or received, the method returns its result. Only :meth:`send_all`,
    :meth:`send_message` and :meth:`send_fds` may have sent a part. One task at a time may send,
    and one may receive.

    All of them can raise, besides the errors that each lists: :class:`ConnectionClosedError`
    (this side closed the connection), :class:`ConnectionBrokenError` (the peer is gone),
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
        if local_address is not None:
            check_address(local_address, "local_address")
        if remote_address is not None:
            check_address(remote_address, "remote_address")
        raw = raw_socket(socket)
        check_connected(raw)
        self._attach(socket, raw, receive_descriptors, local_address, remote_address)

    def _attach(
        self,
        socket: trio.socket.SocketType,
        raw: stdlib_socket.socket,
        receive_descriptors: bool,  # noqa: FBT001 - the constructor's
        local_address: UnixSocketAddress | None,
        remote_address: UnixSocketAddress | None,
    ) -> None:
        self.socket: trio.socket.SocketType = socket
        self._sender = Sender(socket, raw)
        self._receiver = (Receiver if receive_descriptors else RefusingReceiver)(socket, raw)
        self._local_address = local_address
        self._remote_address = remote_address
        # Until the receiver is collected.
        _closing.keep(raw)

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
          TypeError: not a socket.
          ValueError: as the constructor.
          NotSupportedError: as the constructor.
        """
        if not isinstance(sock, stdlib_socket.socket):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"expected a socket.socket, got {type(sock).__name__}")
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
        socket non-blocking for every process that shares it; if this raises, the descriptor is
        as it was and still the caller's.

        Raises:
          TypeError: not an int.
          ValueError: not open, not a socket, or not a connected Unix stream socket.
          NotSupportedError: as the constructor.
        """
        return adopt_fd(
            fd,
            "a connected Unix stream socket",
            lambda sock: cls.from_stdlib_socket(sock, receive_descriptors=receive_descriptors),
        )

    ################################################################
    # Descriptors
    ################################################################

    @enable_ki_protection
    async def send_fd(self, fd: FileDescriptor, cancellable: Cancellable | None = None) -> bool:
        """Send one file descriptor, together with one NUL byte.

        The file descriptor stays the caller's, and may be closed even while this waits: then a
        duplicate is sent.

        Args:
          fd: an int, an object with ``fileno()``, or an object that owns a trio socket as its
            ``socket``: a UnixConnection, a UnixListener, a ``trio.SocketStream`` or a
            ``trio.SocketListener``.
          cancellable: ends the wait when it is cancelled.

        Returns:
          True, as in Gio.

        Raises:
          TypeError: not a file descriptor; nothing was sent.
          ValueError: a number that no file descriptor has, or a closed file; nothing was sent.
          SendError: the kernel rejects it, or a limit stays exhausted. It is an ``OSError``:
            EBADF, the file descriptor is closed; EMFILE, none is free for a duplicate;
            ETOOMANYREFS, too many are in flight. Nothing was sent.
          DescriptorsRefusedError: the peer does not accept file descriptors; nothing was sent.
          NotSupportedError: the platform passes no file descriptors.

        Source: https://docs.gtk.org/gio-unix/method.Connection.send_fd.html
        """
        await self._sender.send(NUL, (_fds.fileno(fd),), None, cancellable)
        return True

    @enable_ki_protection
    async def receive_fd(self, cancellable: Cancellable | None = None) -> int:
        """Receive one file descriptor and the one byte that it travels with.

        Returns:
          The file descriptor, close-on-exec. The caller owns it and must close it. Whether it
          blocks is a property of the open file, which the peer shares; it is not changed.

        Raises:
          EndOfStreamError: the stream has ended.
          UnexpectedControlMessageError: the next byte does not have exactly one file
            descriptor. The byte is in ``.data``; all file descriptors are closed.
          DescriptorsTruncatedError: the file descriptor was lost, because no slot was free.

        Source: https://docs.gtk.org/gio-unix/method.Connection.receive_fd.html (which returns
        -1 without an error at the end of the stream)
        """
        received = await self._receiver.receive(1, cancellable)
        if not received[0]:
            raise end_of_stream_error("a file descriptor", received)
        return _ancillary.expect_fd(received)

    @enable_ki_protection
    async def send_fds(
        self,
        fds: Iterable[FileDescriptor],
        *,
        per_message: int = _kernel.SCM_MAX_FD,
        cancellable: Cancellable | None = None,
    ) -> int:
        """Send any number of file descriptors, in order, with as few checkpoints as possible.

        Each message has one NUL byte and up to ``per_message`` file descriptors. They stay the
        caller's, and may be closed even while this waits: then duplicates are sent. Objects
        that own them are referenced until this returns, so ``send_fds(map(open, paths))`` works.

        Args:
          fds: an iterable of what :meth:`send_fd` accepts.
          per_message: 1 to 253; with 1, the peer receives each with ``receive_fd``, as a Gio
            program must.

        Returns:
          How many were sent: all of them, or fewer if trio cancels this after a part. What the
          kernel has taken is not undone; the next checkpoint raises the cancellation.

        Raises:
          TypeError: as :meth:`send_fd`, with the position; nothing was sent.
          ValueError: as :meth:`send_fd`, with the position; nothing was sent.
          SendError: as :meth:`send_fd`. If one of several is closed, nothing was sent.
          DescriptorsRefusedError: the peer does not accept file descriptors.

        The ``sent`` of every error is the number of file descriptors that were sent before; after a
        message of which only a part was sent, the number of bytes of that part.
        """
        if not 1 <= check_int(per_message, "per_message") <= _kernel.SCM_MAX_FD:
            raise ValueError(
                f"per_message must be from 1 to {_kernel.SCM_MAX_FD}, got {per_message}"
            )
        # The owners stay referenced until this returns.
        numbers, _owners = _fds.filenos(fds)
        count = len(numbers)
        if count > per_message:
            # With several messages, a closed one in the middle would be seen too late.
            _fds.check_open(numbers)
            return await self._sender.send_fds(numbers, per_message, cancellable)
        if count:
            # One message is sent as a whole or not at all, as that of send_fd().
            await self._sender.send(NUL, numbers, None, cancellable)
        else:
            await self._sender.send_all(b"", cancellable)
        return count

    @enable_ki_protection
    async def receive_fds(
        self, max_fds: int, *, cancellable: Cancellable | None = None
    ) -> UnixFDList:
        """Receive between 1 and ``max_fds`` file descriptors.

        This waits for one message, and then takes messages that have already arrived, as long
        as they fit. Each has one byte and at least one file descriptor, as :meth:`send_fds`
        sends them. Every other message stays in the socket.

        Returns:
          A list that owns them, close-on-exec.

        Raises:
          EndOfStreamError: the stream has ended.
          UnexpectedControlMessageError: the first message has no file descriptors or more than
            ``max_fds``; all are closed, and the byte is in ``.data``.
          DescriptorsTruncatedError: some of the first message were lost, because no slot was
            free.
          ValueError: ``max_fds`` is below 1.
        """
        most = max_fds
        # Without a call in the common case.
        if type(most) is not int or most < 1:
            most = check_at_least(most, 1, "max_fds")
        received = await self._receiver.receive(1, cancellable)
        if not received[0]:
            raise end_of_stream_error("file descriptors", received)
        fds = _ancillary.only_fds(received)
        if not fds or len(fds) > most:
            fds = _ancillary.expect_fds(received, most)
        if len(fds) < most:
            fds += self._receiver.take_arrived(most - len(fds))
        return UnixFDList.owning(fds)

    def fds(self, *, read_ahead: int = DEFAULT_READ_AHEAD) -> DescriptorStream:
        """Iterate over file descriptors: ``async for fd in conn.fds()``.

        Each message must be one byte with one file descriptor, as ``send_fd`` and
        ``send_fds(per_message=1)`` send them. The caller owns each file descriptor. Messages
        that have already arrived are read in bursts, with one checkpoint for each burst. The
        iteration ends at the end of the stream.

        Nothing is lost if the loop is left early, by break, exception or cancellation: the next
        receives, whichever these are, return what was read ahead. Until then the connection
        cannot be handed over: :meth:`detach`, ``pool.submit(conn)`` and ``send_fd(conn)`` raise
        :class:`ReadAheadError`, because its next owner would miss these messages.

        Args:
          read_ahead: how many messages to read at a time. Use 1 to read nothing ahead, if the
            connection is handed over before the end of its stream.

        Raises:
          ValueError: ``read_ahead`` is below 1.

        Iterating raises what :meth:`receive_fd` raises, except at the end of the stream. It can
        be continued after an UnexpectedControlMessageError.
        """
        return DescriptorStream(self._receiver, check_at_least(read_ahead, 1, "read_ahead"))

    ################################################################
    # Files, sockets and streams, checked before they are returned
    ################################################################

    @enable_ki_protection
    async def receive_file(
        self,
        mode: str = "rb",
        *,
        kinds: Collection[DescriptorKind] = (DescriptorKind.REGULAR_FILE,),
        cancellable: Cancellable | None = None,
    ) -> IO[Any]:
        """Receive a descriptor as an open Python file.

        The file is opened in a thread, because ``open`` asks its file server, which may be slow
        or never answer. A cancellation during that time is held back for half a second, which is
        enough for a local file; after that it closes the descriptor, and its message is lost.
        Reading and closing the file can wait for its file server, too: use ``trio.wrap_file`` if
        the sender is not trusted.

        Args:
          mode: as for ``open``; the access that the descriptor must have.
          kinds: the kinds of file that are accepted.

        Returns:
          A file that the caller owns. Its position is that of the open file, which the sender
          shares.

        Raises:
          WrongDescriptorKindError: another kind of file, or not open for ``mode``; it is closed.
          TypeError: ``mode`` is not a str, or ``kinds`` not a collection of DescriptorKind; nothing
            was received.
          ValueError: ``mode`` is not a mode, or ``kinds`` is empty; nothing was received.
          All that :meth:`receive_fd` raises.
        """
        check_mode(mode)
        kinds = check_kinds(kinds)
        fd = await self.receive_fd(cancellable)
        return await open_file_or_close(fd, mode, kinds, cancellable)

    @enable_ki_protection
    async def receive_socket(
        self, *, cancellable: Cancellable | None = None
    ) -> trio.socket.SocketType:
        """Receive a descriptor as a trio socket of its family and type.

        The open socket becomes non-blocking, for every process that shares it.

        Returns:
          A socket that the caller owns.

        Raises:
          WrongDescriptorKindError: not a socket; the descriptor is closed.
          All that :meth:`receive_fd` raises.
        """
        fd = await self.receive_fd(cancellable)
        return _convert_or_close(fd, open_socket)

    @enable_ki_protection
    async def receive_stream(
        self, *, cancellable: Cancellable | None = None
    ) -> trio.abc.HalfCloseableStream:
        """Receive a descriptor of a connected stream socket as a stream.

        The open socket becomes non-blocking, for every process that shares it.

        Returns:
          A :class:`UnixConnection` for a Unix socket, otherwise a ``trio.SocketStream``; the
          caller owns it.

        Raises:
          WrongDescriptorKindError: not a connected stream socket; the descriptor is closed.
          All that :meth:`receive_fd` raises.
        """
        fd = await self.receive_fd(cancellable)
        return _convert_or_close(fd, open_stream)

    ################################################################
    # Sealed memory
    ################################################################

    @enable_ki_protection
    async def send_buffer(
        self, data: Buffer | FileDescriptor, *, cancellable: Cancellable | None = None
    ) -> None:
        """Send bytes as sealed memory: one descriptor, however many bytes.

        Args:
          data: a contiguous buffer, which is copied once, into a new memfd; or a memfd of the
            caller, which is sealed now and not copied.

        Raises:
          UnsafeBufferError: a descriptor that is not a memfd, or that cannot be sealed, because
            it is mapped for writing.
          NotSupportedError: the platform has no memfds.
          All that :meth:`send_fd` raises.

        Source: memfd_create(2)
        """
        memory = _memory_given(data)
        if memory is not None:
            _memfd.seal(memory)
            await self._sender.send(NUL, (memory,), None, cancellable)
            return
        with UnixFDList([_memfd.create(data)]) as fds:  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            await self._sender.send(NUL, (fds[0],), None, cancellable)

    @enable_ki_protection
    async def receive_buffer(
        self,
        max_bytes: int,
        *,
        seals: Seals = Seals.ALL,
        cancellable: Cancellable | None = None,
    ) -> memoryview:
        """Receive sealed memory, mapped and not copied.

        With all four seals the bytes stay as they are. ``seals=Seals.SHRINK`` also accepts
        memory that its sender can still write to, as Wayland clients send it: then the bytes can
        change at any time, even between two reads of the same byte. Copy them before they are
        checked, with ``bytes(view)``. Memory that can shrink is never accepted.

        Args:
          max_bytes: the largest size that is accepted.
          seals: the seals that the memory must have; ``Seals.SHRINK`` is one of them.

        Returns:
          A read-only view; the mapping ends with it, and with what was made from it, such as
          ``numpy.frombuffer(view)``.

        Raises:
          UnsafeBufferError: not sealed memory, or more than ``max_bytes``; nothing was mapped,
            and the descriptor is closed.
          OSError: EMFILE; before Python 3.13 each mapping has a descriptor of its own.
          TypeError: ``max_bytes`` is not an int, or ``seals`` are not Seals; nothing was received.
          ValueError: ``max_bytes`` is negative, or ``seals`` lack ``Seals.SHRINK``; nothing was
            received.
          All that :meth:`receive_fd` raises.

        Source: memfd_create(2) ("File sealing")
        """
        most = check_at_least(max_bytes, 0, "max_bytes")
        if seals is not Seals.ALL:
            _memfd.check_seals(seals)
        fd = await self.receive_fd(cancellable)
        view = _convert_or_close(fd, lambda fd: _memfd.map_readonly(fd, most, seals))
        # Memory, which no file server has: this cannot wait.
        os.close(fd)
        return view

    ################################################################
    # Credentials
    ################################################################

    @enable_ki_protection
    async def send_credentials(self, cancellable: Cancellable | None = None) -> bool:
        """Send the credentials of this process, together with one NUL byte.

        The kernel checks them, so that the receiver can trust them.

        Returns:
          True, as in Gio.

        Raises:
          NotSupportedError: the platform has no control message for credentials.

        Source: https://docs.gtk.org/gio-unix/method.Connection.send_credentials.html
        """
        await self._sender.send(NUL, (), "own", cancellable)
        return True

    @enable_ki_protection
    async def receive_credentials(self, cancellable: Cancellable | None = None) -> Credentials:
        """Receive the credentials of the peer and the one byte that they travel with.

        ``SO_PASSCRED`` is enabled while this waits. If the peer sent a byte without
        credentials, this returns :meth:`get_peer_credentials`. In both cases the kernel has
        checked them.

        Raises:
          EndOfStreamError: the stream has ended.
          UnexpectedControlMessageError: the byte has file descriptors. They are closed, and the
            byte is in ``.data``.
          DescriptorsTruncatedError: it has file descriptors, and no slot was free for them.
          NotSupportedError: the platform has no credentials of peers.

        Source: https://docs.gtk.org/gio-unix/method.Connection.receive_credentials.html
        """
        if _ancillary.CREDENTIALS is None:
            can_tell_credentials()
        received = await self._receiver.receive(1, cancellable, passcred=True)
        if not received[0]:
            raise end_of_stream_error("credentials", received)
        credentials = _ancillary.expect_credentials(received)
        return credentials or self._receiver.peer or self.get_peer_credentials()

    @enable_ki_protection
    async def send_fake_credentials(
        self, credentials: Credentials, cancellable: Cancellable | None = None
    ) -> bool:
        """Send credentials that are not this process's own, together with one NUL byte.

        Returns:
          True.

        Raises:
          SendError: it is a ``PermissionError`` if this process lacks the privilege
            (CAP_SYS_ADMIN for the pid, CAP_SETUID and CAP_SETGID for the others), and a
            ``ProcessLookupError`` if no process has that pid. Nothing was sent.
          TypeError: not Credentials.
          NotSupportedError: the platform has no control message for credentials.

        Source: unix(7) (``SCM_CREDENTIALS``)
        """
        if not isinstance(credentials, Credentials):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"credentials must be Credentials, got {type(credentials).__name__}")
        await self._sender.send(NUL, (), credentials, cancellable)
        return True

    ################################################################
    # Whole messages
    ################################################################

    @enable_ki_protection
    async def send_message(
        self,
        data: Buffer,
        *,
        fds: Iterable[FileDescriptor] = _NO_FDS,
        credentials: Credentials | None = None,
        cancellable: Cancellable | None = None,
    ) -> None:
        """Send bytes with file descriptors and credentials, which are sent with the first byte.

        The file descriptors stay the caller's, as with :meth:`send_fds`.

        Args:
          data: at least one byte if there are file descriptors or credentials.
          fds: an iterable of at most 253 of what :meth:`send_fd` accepts.
          credentials: ``Credentials()`` for this process's own.

        Raises:
          TypeError: as :meth:`send_fds`; nothing was sent.
          ValueError: as :meth:`send_fds`; or file descriptors or credentials without a byte, which
            the kernel would drop. Nothing was sent.
          SendError: as :meth:`send_fd` and :meth:`send_fake_credentials`.
          DescriptorsRefusedError: the peer does not accept file descriptors; nothing was sent.

        The ``sent`` of every error is the number of bytes that were sent before. If this is
        cancelled or fails after a part of the bytes, every later send raises
        ConnectionBrokenError, because the peer would take it for the rest of this message. The
        ``sent`` of that error is the size of the part, even if trio cancelled this.
        """
        numbers: Sequence[int] = ()
        if fds is not _NO_FDS:
            # The owners stay referenced until this returns.
            numbers, _owners = _fds.filenos(fds, _kernel.SCM_MAX_FD)
        if credentials is not None and not isinstance(credentials, Credentials):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"credentials must be Credentials or None, got {type(credentials).__name__}"
            )
        if type(data) is bytes and data:
            # Without the two views of the general case.
            await self._sender.send(data, numbers, credentials, cancellable)
            return
        with bytes_of(data) as view:
            if not view:
                if numbers or credentials is not None:
                    raise ValueError(
                        "file descriptors and credentials need at least one byte of data: the "
                        "kernel drops them from an empty message"
                    )
                await self._sender.send_all(view, cancellable)
                return
            await self._sender.send(view, numbers, credentials, cancellable)

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
        """Receive up to ``max_bytes`` bytes, with their file descriptors and credentials.

        The stream does not keep the boundaries of messages without file descriptors. A read
        stops after a message with file descriptors, but can start with bytes that were sent
        before it.

        Args:
          max_fds: 0 to 253; more are an error, and closed.
          credentials: whether to ask for the sender's during this call (``SO_PASSCRED``).
          pidfd: whether to ask for a pidfd of the sender during this call (``SO_PASSPIDFD``). A
            message that was sent earlier, without credentials, has none.

        Returns:
          A message that owns its file descriptors. Its data is empty at the end of the stream.

        Raises:
          UnexpectedControlMessageError: more than ``max_fds`` file descriptors; the bytes are
            in ``.data``.
          DescriptorsTruncatedError: some were lost, because no slot was free. The bytes are in
            ``.data``, and the sender's credentials in ``.credentials`` if they were asked for.
          ValueError: ``max_bytes`` is below 1, or ``max_fds`` not from 0 to 253.
          NotSupportedError: ``pidfd`` on a kernel before Linux 6.5, or elsewhere.
        """
        size, most = max_bytes, max_fds
        # Without a call in the common case.
        if type(size) is not int or size < 1:
            size = check_at_least(size, 1, "max_bytes")
        if type(most) is not int or not 0 <= most <= _kernel.SCM_MAX_FD:
            most = check_at_least(most, 0, "max_fds")
            if most > _kernel.SCM_MAX_FD:
                raise ValueError(f"max_fds must be at most {_kernel.SCM_MAX_FD}, got {most}")
        if credentials:
            can_tell_credentials()
        received = await self._receiver.receive(
            size, cancellable, passcred=credentials, passpidfd=pidfd
        )
        fds = _ancillary.only_fds(received)
        if fds is not None and len(fds) <= most:
            return Message(received[0], UnixFDList.owning(fds), None)
        message = _ancillary.expect_message(received, most)
        return Message(
            message.data,
            UnixFDList.owning(message.fds),
            message.credentials,
            UnixFDList.owning(message.pidfds),
        )

    ################################################################
    # Bytes: the interface of trio.SocketStream
    ################################################################

    async def send_all(self, data: Buffer) -> None:
        """Send all of ``data``; as ``trio.SocketStream.send_all``.

        If this is cancelled or fails, a part of it may have been sent. The ``sent`` of an error
        is the number of bytes.
        """
        await self._sender.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the socket can be written to; as ``trio.SocketStream``."""
        await self._sender.wait_writable()

    async def send_eof(self) -> None:
        """End the stream in this direction; receiving still works. As ``trio.SocketStream``."""
        await self._sender.send_eof()

    @enable_ki_protection
    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive between 1 and ``max_bytes`` bytes; ``b""`` at the end of the stream.

        As ``trio.SocketStream.receive_some``, except that file descriptors are not dropped
        silently.

        Args:
          max_bytes: default: 65536.

        Raises:
          UnexpectedDescriptorsError: the bytes have file descriptors; these are closed, and the
            bytes are in ``.data``.
          TypeError: ``max_bytes`` is not an int.
          ValueError: ``max_bytes`` is less than 1.
        """
        size = DEFAULT_RECEIVE_SIZE if max_bytes is None else max_bytes
        # Without a call in the common case.
        if type(size) is not int or size < 1:
            size = check_at_least(size, 1, "max_bytes")
        received = await self._receiver.receive(size, None)
        if received[1] or received[2] & _kernel.MSG_CTRUNC:
            return _ancillary.expect_bytes(received)
        return received[0]

    @enable_ki_protection
    async def receive_into(
        self,
        buffer: bytearray | memoryview,
        *,
        cancellable: Cancellable | None = None,
    ) -> int:
        """Receive bytes into ``buffer``, without a copy; 0 at the end of the stream.

        As ``socket.recv_into``, except that file descriptors are not dropped silently.

        Args:
          buffer: a writable contiguous buffer of at least one byte, for example an ``array``
            or an ``mmap``. It cannot be resized until this returns.
          cancellable: ends the wait when it is cancelled.

        Returns:
          How many bytes were received, at the beginning of ``buffer``.

        Raises:
          UnexpectedDescriptorsError: file descriptors arrived with the bytes. They are closed,
            and the bytes are in ``.data`` as well as in ``buffer``.
          TypeError: ``buffer`` is not a writable contiguous buffer.
          ValueError: ``buffer`` is empty.
        """
        with bytes_of(buffer, "buffer") as view:
            if not view:
                raise ValueError("buffer must have at least 1 byte, got 0")
            if view.readonly:
                raise TypeError(f"buffer must be writable, got {type(buffer).__name__}")
            received = await self._receiver.receive(len(view), cancellable, into=view)
            if received[1] or received[2] & _kernel.MSG_CTRUNC:
                _ancillary.expect_bytes(with_data(received, view))
            count: Any = received[0]
            return int(count)

    async def aclose(self) -> None:
        """Close the connection immediately, even if cancelled; closing twice is allowed.

        A task that waits on this connection gets :class:`ConnectionClosedError`. Messages that
        no task has received are dropped. The peer chose the file descriptors in them, and
        closing these may block, so a thread of this library closes them. This never waits.
        """
        check_task()
        close_now(self)
        await checkpoint()

    def detach(self) -> int:
        """Take the file descriptor out of this connection, which is closed by that.

        A task that waits on this connection gets :class:`ConnectionClosedError`.

        Returns:
          The file descriptor of the socket, which is still connected; the caller owns it.

        Raises:
          ReadAheadError: messages were read ahead, see :meth:`fds`. Nothing was detached.
          ConnectionClosedError: this connection is closed.
        """
        self._receiver.check_handover()
        self._receiver.release()
        notify_closing(self._receiver.raw)
        return self._receiver.raw.detach()

    def has_read_ahead(self) -> bool:
        """Whether this connection holds messages that its socket does not have any more.

        :meth:`fds` read them ahead. The next receives return them. Until then :meth:`detach`,
        ``pool.submit(conn)``, ``send_fd(conn)`` and ``send_fd(conn.socket)`` raise
        :class:`ReadAheadError`. Other code that uses :attr:`socket` does not see them, so
        check this first.
        """
        ahead = self._receiver.ahead
        return ahead is not None and ahead.has_bytes()

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
            raise TypeError(f"value must be None with a length, got {value!r}")
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
    # The peer, and the addresses of both ends
    ################################################################

    def get_peer_credentials(self) -> Credentials:
        """Return the process that connected or listened (``Gio.Socket.get_credentials``).

        The kernel stored them when the connection was made, and they are unchanged
        since: of a socketpair, both ends name the process that made the pair.

        Raises:
          ConnectionClosedError: this side closed the connection.
          NotSupportedError: the platform does not say.

        Source: unix(7) (``SO_PEERCRED``), https://docs.gtk.org/gio/method.Socket.get_credentials.html
        """
        return peer_credentials(self._asked().getsockopt)

    def open_peer_pidfd(self) -> int | None:
        """Open a pidfd of the process that :meth:`get_peer_credentials` names.

        A pid becomes another process's once its own has ended; a pidfd never does.

        Returns:
          A descriptor that the caller owns, close-on-exec; None where the kernel has none
          (before Linux 6.5, and elsewhere).

        Raises:
          PeerGoneError: the process has ended and was reaped, on every kernel.
          OSError: EMFILE.
          ConnectionClosedError: this side closed the connection.

        Source: ``SO_PEERPIDFD`` of Linux 6.5, pidfd_open(2)
        """
        return open_peer_pidfd(self._asked())

    def get_peer_groups(self) -> tuple[int, ...]:
        """Return the supplementary groups that the peer had when the connection was made.

        Raises:
          NotSupportedError: the kernel does not say (before Linux 4.13, and elsewhere).
          ConnectionClosedError: this side closed the connection.

        Source: ``SO_PEERGROUPS`` of Linux 4.13
        """
        return get_peer_groups(self._asked())

    def get_peer_security_context(self) -> str | None:
        """Return the peer's SELinux, AppArmor or Smack label; None if the kernel gives none.

        Raises:
          ConnectionClosedError: this side closed the connection.

        Source: socket(7) (``SO_PEERSEC``)
        """
        return get_peer_security_context(self._asked())

    def get_peer_identity(self, *, with_pidfd: bool = True) -> PeerIdentity:
        """Return all of these together, with a pidfd of the process.

        Args:
          with_pidfd: whether to open a pidfd, which takes a file descriptor. Without one, the
            identity has no facts about the process as it is now.

        Returns:
          An identity that the caller owns: it holds a pidfd, so use it in a ``with`` block.

        Raises:
          NotSupportedError: the platform does not report credentials.
          OSError: EMFILE.
          ConnectionClosedError: this side closed the connection.
        """
        return identify(self._asked(), with_pidfd=with_pidfd)

    def get_local_address(self) -> UnixSocketAddress:
        """Return the name of this end; anonymous unless it was bound or accepted.

        Of an accepted connection it is the name that the listener was opened with; the kernel
        may know it under another, as a path can be renamed.

        Raises:
          ConnectionClosedError: this side closed the connection.
        """
        sock = self._asked()
        return self._local_address or UnixSocketAddress.from_native(sock.getsockname())

    def get_remote_address(self) -> UnixSocketAddress:
        """Return the name of the peer's end; anonymous unless it was bound.

        Of a connection that was opened by name it is that name.

        Raises:
          ConnectionClosedError: this side closed the connection.
        """
        sock = self._asked()
        return self._remote_address or UnixSocketAddress.from_native(sock.getpeername())

    def _asked(self) -> stdlib_socket.socket:
        self._receiver.check_open()
        return self._receiver.raw

    ################################################################
    # Gio.SocketConnection and Gio.IOStream
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
        try:
            to = f" to {self.get_remote_address()}"
        except OSError:
            # Other code has closed the number.
            to = ""
        return f"<UnixConnection fd={self._receiver.raw.fileno()}{to}>"


def close_now(conn: UnixConnection) -> None:
    """Close a connection as ``aclose`` does, without its checkpoint."""
    receiver = conn._receiver
    receiver.release()
    if not conn.is_closed():
        notify_closing(receiver.raw)
        _closing.close_socket(receiver.raw)


def close_outside_run(conn: UnixConnection) -> None:
    """Close a connection that no task uses, even where no trio run is.

    Trio closes its sockets only in a run, where it wakes the tasks that wait.
    """
    conn._receiver.release()
    _closing.close_socket(conn._receiver.raw)


async def receive_with_fds(conn: UnixConnection, max_bytes: int) -> tuple[bytes, list[int] | None]:
    """Receive bytes as ``receive_some``, and file descriptors that arrived with them.

    For a task that does nothing else: it waits before it looks, because mostly nothing has arrived
    yet. A system call and an exception less took 5 of the 200 us of a request to an idle pool.

    Returns:
      The bytes, and the file descriptors, which the caller owns; None instead of these if the
      kernel dropped some of them.
    """
    receiver = conn._receiver
    while True:
        receiver.check_open()
        try:
            await trio.lowlevel.wait_readable(receiver.raw)
            received = receiver.receive_nowait(max_bytes)
        except trio.WouldBlock:
            # Another process has read it, or has closed it; check_open() raises if it was this one.
            continue
        except trio.ClosedResourceError as exc:
            raise ConnectionClosedError("this connection was closed") from exc
        break
    if not received[1] and not received[2] & _kernel.MSG_CTRUNC:
        return received[0], []
    message = _ancillary.unpack(received)
    if message.truncated:
        message.close()
        return message.data, None
    fds, message.fds = message.fds, []
    message.close()
    return message.data, fds


def connection_of(
    raw: stdlib_socket.socket,
    *,
    receive_descriptors: bool,
    local_address: UnixSocketAddress | None,
    remote_address: UnixSocketAddress | None,
) -> UnixConnection:
    """Make a connection of a socket that accept(2) or connect(2) of this package has connected.

    The constructor would check that, which takes two system calls.
    """
    conn = UnixConnection.__new__(UnixConnection)
    socket = trio.socket.from_stdlib_socket(raw)
    conn._attach(socket, raw, receive_descriptors, local_address, remote_address)
    return conn


def send_with_fds_nowait(conn: UnixConnection, data: bytes, fds: Sequence[int]) -> int:
    """Send bytes and file descriptors, if no task is sending and the kernel takes them now.

    Returns:
      How many bytes were sent. What is left is plain bytes.

    Raises:
      trio.WouldBlock: nothing was sent.
    """
    if conn._sender.busy:
        raise trio.WouldBlock
    return conn._sender.send_nowait(data, fds)


def send_fd_nowait(conn: UnixConnection, number: int) -> bool:
    """Send one file descriptor as ``send_fd``, or raise ``trio.WouldBlock``."""
    conn._sender.send_nowait(NUL, (number,))
    return True


def receive_fd_nowait(conn: UnixConnection) -> int:
    """Receive one file descriptor as ``receive_fd``, or raise ``trio.WouldBlock``."""
    received = conn._receiver.receive_nowait(1)
    if not received[0]:
        raise end_of_stream_error("a file descriptor", received)
    return _ancillary.expect_fd(received)


def sender_of(conn: UnixConnection) -> Sender:
    return conn._sender


def receiver_of(conn: UnixConnection) -> Receiver:
    return conn._receiver


def accepts_descriptors(conn: UnixConnection) -> bool:
    """Whether the peer may send file descriptors (``receive_descriptors``)."""
    return not isinstance(conn._receiver, RefusingReceiver)


# isinstance(conn, trio.SocketStream) must hold, and trio does not allow subclasses.
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


def _convert_or_close(fd: int, convert: Callable[[int], _T]) -> _T:
    """Return ``convert(fd)``; if it raises, close the descriptor."""
    try:
        return convert(fd)
    except BaseException:
        _closing.close_fds([fd])
        raise


def sealed_memory_of(data: Buffer | FileDescriptor) -> int:
    """Return a sealed memfd with the bytes of ``data``, or a duplicate of one, sealed now.

    The caller owns it.

    Raises:
      TypeError: as :meth:`UnixConnection.send_buffer`.
      ValueError: as :meth:`UnixConnection.send_buffer`.
      OSError: as :meth:`UnixConnection.send_buffer`.
      UnsafeBufferError: as :meth:`UnixConnection.send_buffer`.
      NotSupportedError: as :meth:`UnixConnection.send_buffer`.
    """
    memory = _memory_given(data)
    if memory is None:
        return _memfd.create(data)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    _memfd.seal(memory)
    return os.dup(memory)


def _memory_given(data: Buffer | FileDescriptor) -> int | None:
    """Return the number of the memfd that a caller gave as ``data``; None if it is a buffer.

    Raises:
      TypeError: as :meth:`UnixConnection.send_buffer`.
      ValueError: as :meth:`UnixConnection.send_buffer`.
      ReadAheadError: as :meth:`UnixConnection.send_fd`.
    """
    if type(data) is not int:
        try:
            memoryview(data).release()  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        except TypeError:
            pass
        else:
            return None
    return _fds.fileno(data)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def end_of_stream_error(expected: str, received: RawMessage) -> EndOfStreamError:
    """Return the error for a stream that ended where ``expected`` should have been."""
    close_trailing_fds(received)
    return EndOfStreamError(f"end of stream while waiting for {expected}")


def close_trailing_fds(received: RawMessage) -> None:
    """Close what arrived with the end of the stream.

    With SO_PASSCRED on, a control message arrives even then, and with SO_PASSPIDFD a pidfd.
    """
    _ancillary.unpack(received).close()


def check_at_least(value: int, least: int, name: str) -> int:
    """Return ``value`` as an int if it is at least ``least``.

    Raises:
      TypeError: it is not an int; the error calls it ``name``.
      ValueError: it is less; the error calls it ``name``.
    """
    number = check_int(value, name)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def check_int(value: int, name: str) -> int:
    """Return ``value`` as an int.

    Raises:
      TypeError: it is not one; the error calls it ``name``.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
