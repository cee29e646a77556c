"""Descriptors on a connection: one, many, a stream of them, files, sockets, buffers.

The rule of this file: what the caller gives stays the caller's, what the caller gets is the
caller's, and on every other way out it is closed.

Sources: unix(7) (``SCM_RIGHTS``), https://docs.gtk.org/gio-unix/class.Connection.html
"""

from __future__ import annotations

import operator
import os
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar

from trio.lowlevel import enable_ki_protection

from . import _control, _descriptors, _kernel, _sealed
from ._descriptors import FileDescriptor as FileDescriptor  # noqa: PLC0414, TC001 - exported
from ._fdlist import UnixFDList
from ._kinds import DescriptorKind, check_mode, file_of, socket_of, stream_of
from .errors import EndOfStreamError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    import trio

    from ._buffers import Buffer
    from ._cancellable import Cancellable
    from ._control import Received
    from ._receiving import Receiver
    from ._sending import Sender

_T = TypeVar("_T")

# A byte must travel with a control message on a stream; Gio sends NUL.
NUL: Final = b"\0"

DEFAULT_READ_AHEAD: Final = 128


class DescriptorStream:
    """What :meth:`UnixConnection.fds` returns: an async iterator over descriptors."""

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
            # What was read ahead of an error, or is no lone descriptor, receive() looks at.
            if isinstance(first, tuple) and first[0] >= 0:
                ahead.popleft()
                return first[0]
        is_ahead = bool(ahead)
        received = await receiver.receive(1, None)
        if not received[0]:
            close_ended(received)
            raise StopAsyncIteration
        if not is_ahead:
            receiver.read_ahead(self._read_ahead - 1)
        return _control.one_descriptor(received)


class DescriptorPassing:
    """The part of :class:`UnixConnection` that passes descriptors."""

    __slots__ = ()

    _sender: Sender
    _receiver: Receiver

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
        number = _descriptors.descriptor_number(fd)
        await self._sender.send(NUL, [_control.right(number)], cancellable, (number,))
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
        received = await self._receiver.receive(1, cancellable)
        if not received[0]:
            raise ended("a descriptor", received)
        return _control.one_descriptor(received)

    @enable_ki_protection
    async def send_fds(
        self,
        fds: Iterable[FileDescriptor],
        *,
        per_message: int = _kernel.SCM_MAX_FD,
        cancellable: Cancellable | None = None,
    ) -> int:
        """Send any number of descriptors, in order, with as few checkpoints as the peer allows.

        Each message has one NUL byte and up to ``per_message`` descriptors. The descriptors
        stay the caller's, and may be closed while this waits: duplicates are what waits.

        Args:
          per_message: 1 to 253; with 1, the peer receives each with ``receive_fd``, as a Gio
            program must.

        Returns:
          How many were sent: all of them, or fewer if a trio cancellation came in between.
          What the kernel has taken is not undone; the cancellation is seen at the next
          checkpoint.

        Raises:
          OperationCancelled: the Cancellable fired; ``.sent`` says how many had gone.
          ConnectionBrokenError: the peer left; ``.sent`` likewise.
          TypeError, ValueError, OSError: as :meth:`send_fd`, before anything is sent.
          DescriptorsRefusedError: the peer takes no descriptors.
        """
        if not 1 <= operator.index(per_message) <= _kernel.SCM_MAX_FD:
            raise ValueError(
                f"per_message must be from 1 to {_kernel.SCM_MAX_FD}, not {per_message}"
            )
        numbers = _descriptors.descriptor_numbers(fds, None)
        if len(numbers) > per_message:
            # With several messages, a closed one in the middle would be seen too late.
            _descriptors.check_all_open(numbers)
        if not numbers:
            await self._sender.send_all(b"", cancellable)
            return 0
        return await self._sender.send_each(numbers, per_message, cancellable)

    @enable_ki_protection
    async def receive_fds(
        self, max_fds: int, *, cancellable: Cancellable | None = None
    ) -> UnixFDList:
        """Receive between 1 and ``max_fds`` descriptors: those that have come.

        Waits for one message, and takes those behind it that are there already and fit. Each
        has one byte and at least one descriptor, as :meth:`send_fds` sends them.

        Returns:
          A list that owns them, close-on-exec.

        Raises:
          EndOfStreamError: the stream ended before.
          UnexpectedControlMessageError: the first message has no descriptor or more than
            ``max_fds``; all are closed, and the byte is in ``.data``.
          DescriptorsTruncatedError: some were lost, as no slot was free for them.
          ValueError: ``max_fds`` is below 1.
        """
        most = at_least(max_fds, 1, "max_fds")
        received = await self._receiver.receive(1, cancellable)
        if not received[0]:
            raise ended("descriptors", received)
        fds = _control.up_to_descriptors(received, most)
        for more in self._receiver.ahead_that_fits(most - len(fds)):
            fds += _control.up_to_descriptors(more, most)
        return UnixFDList.owning(fds)

    def fds(self, *, read_ahead: int = DEFAULT_READ_AHEAD) -> DescriptorStream:
        """Iterate over descriptors: ``async for fd in conn.fds()``.

        Each message must be one byte with one descriptor, as ``send_fd`` and
        ``send_fds(per_message=1)`` send them. The caller owns what it gets. Messages that are
        there already are read in bursts, with one checkpoint for each burst. The iteration
        ends at the end of the stream.

        Nothing is lost when the loop is left early, by break, exception or cancellation:
        what was read ahead serves the next receive, whichever it is.

        Args:
          read_ahead: how many messages to read at a time, and so to hold at most.

        Raises:
          ValueError: ``read_ahead`` is below 1.

        Iterating raises what :meth:`receive_fd` raises, but for the end of the stream; it can
        be gone on with after an UnexpectedControlMessageError.
        """
        return DescriptorStream(self._receiver, at_least(read_ahead, 1, "read_ahead"))

    ################################################################
    # Typed, and checked before it is handed over
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

        Args:
          mode: as for ``open``; what the descriptor must be open for.
          kinds: what it may be open on.

        Returns:
          A file that the caller owns. Its position is that of the open file, which the sender
          shares.

        Raises:
          WrongDescriptorKindError: something else came; it is closed.
          TypeError, ValueError: not a mode, or no kinds; nothing was received.
          All that :meth:`receive_fd` raises.
        """
        check_mode(mode)
        kinds = frozenset(kinds)
        fd = await self.receive_fd(cancellable)
        return _handed_over(fd, lambda: file_of(fd, mode, kinds))

    @enable_ki_protection
    async def receive_socket(
        self, *, cancellable: Cancellable | None = None
    ) -> trio.socket.SocketType:
        """Receive a descriptor as a trio socket of its family and type.

        The open socket becomes non-blocking, for all who share it.

        Returns:
          A socket that the caller owns.

        Raises:
          WrongDescriptorKindError: something else came; it is closed.
          All that :meth:`receive_fd` raises.
        """
        fd = await self.receive_fd(cancellable)
        return _handed_over(fd, lambda: socket_of(fd))

    @enable_ki_protection
    async def receive_stream(
        self, *, cancellable: Cancellable | None = None
    ) -> trio.abc.HalfCloseableStream:
        """Receive a descriptor of a connected stream socket as a stream.

        The open socket becomes non-blocking, for all who share it.

        Returns:
          A :class:`UnixConnection` for a Unix socket, otherwise a ``trio.SocketStream``; the
          caller owns it.

        Raises:
          WrongDescriptorKindError: something else came; it is closed.
          All that :meth:`receive_fd` raises.
        """
        fd = await self.receive_fd(cancellable)
        return _handed_over(fd, lambda: stream_of(fd))

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
            caller's, which is sealed now and not copied.

        Raises:
          UnsafeBufferError: a descriptor that is no memfd, or that cannot be sealed, because
            it is mapped for writing.
          NotSupportedError: the platform has no memfds.
          All that :meth:`send_fd` raises.

        Source: memfd_create(2)
        """
        with UnixFDList([sealed_memory_of(data)]) as fds:
            await self.send_fd(fds[0], cancellable)

    @enable_ki_protection
    async def receive_buffer(
        self, max_bytes: int, *, cancellable: Cancellable | None = None
    ) -> memoryview:
        """Receive sealed memory, mapped and not copied.

        Returns:
          A read-only view; the mapping ends with it, and with what was made from it, such as
          ``numpy.frombuffer(view)``.

        Raises:
          UnsafeBufferError: no sealed memory came, or more than ``max_bytes``; nothing was
            mapped, and the descriptor is closed.
          OSError: EMFILE; before Python 3.13 each mapping has a descriptor of its own.
          ValueError: ``max_bytes`` is negative.
          All that :meth:`receive_fd` raises.

        Source: memfd_create(2) ("File sealing")
        """
        most = at_least(max_bytes, 0, "max_bytes")
        fd = await self.receive_fd(cancellable)
        view = _handed_over(fd, lambda: _sealed.map_sealed(fd, most))
        os.close(fd)
        return view


def _handed_over(fd: int, convert: Callable[[], _T]) -> _T:
    """Return what ``convert`` makes of a descriptor; if it raises, close it as refused."""
    try:
        return convert()
    except BaseException:
        _control.close_all([fd])
        raise


def sealed_memory_of(data: Buffer | FileDescriptor) -> int:
    """Return a sealed memfd with the bytes of ``data``, or a duplicate of one, sealed now.

    The caller owns it.

    Raises:
      TypeError, ValueError, OSError, UnsafeBufferError, NotSupportedError: as
        :meth:`UnixConnection.send_buffer`.
    """
    try:
        view = memoryview(data)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    except TypeError:
        number = _descriptors.descriptor_number(data)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        _sealed.seal(number)
        return os.dup(number)
    with view:
        return _sealed.sealed_memory(view)


def ended(due: str, received: Received) -> EndOfStreamError:
    """Return the error for a stream that ended where something was due."""
    close_ended(received)
    return EndOfStreamError(f"{due} was due, but the peer has ended the stream")


def close_ended(received: Received) -> None:
    """Close what came with the end of the stream.

    With SO_PASSCRED on, a control message comes even then, and with SO_PASSPIDFD a pidfd.
    """
    _control.parse(received[1], received[2]).close()


def at_least(value: int, least: int, name: str) -> int:
    """Return ``value`` if it is at least ``least``.

    Raises:
      TypeError, ValueError: it is not, and is called ``name``.
    """
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, not {number}")
    return number
