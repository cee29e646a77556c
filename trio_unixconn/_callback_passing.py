"""Descriptors in callback form.

The rule of this file: what an ``*_async`` method is given is the caller's again as soon as it
has returned; what waits is a duplicate.

Source: https://docs.gtk.org/gio-unix/class.Connection.html
"""

from __future__ import annotations

import os
from functools import partial
from typing import IO, TYPE_CHECKING, Any

from ._cancellable import check_cancellable
from ._descriptors import check_all_open, descriptor_numbers
from ._fdlist import UnixFDList
from ._kernel import SCM_MAX_FD
from ._kinds import DescriptorKind
from ._passing import sealed_memory_of
from ._results import AsyncReadyCallback, AsyncResult, Operation

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable

    import trio

    from ._buffers import Buffer
    from ._cancellable import Cancellable
    from ._connection import UnixConnection
    from ._descriptors import FileDescriptor


class CallbackPassing:
    """The part of :class:`CallbackConnection` that passes descriptors."""

    def __init__(
        self, begin_operation: Callable[[Operation], None], connection: UnixConnection
    ) -> None:
        self._begin_operation = begin_operation
        self.connection = connection

    def send_fd_async(
        self,
        fd: FileDescriptor,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *user_data: Any,
    ) -> None:
        """Begin :meth:`send_fd`; the caller may close ``fd`` as soon as this has returned.

        Raises:
          TypeError, ValueError, OSError: ``fd`` is not an open descriptor.
        """
        duplicate = duplicated([fd])
        self.begin(
            "send_fd_async",
            partial(self.connection.send_fd, duplicate[0]),
            cancellable,
            callback,
            user_data,
            release=duplicate.close,
        )

    def send_fd_finish(self, result: AsyncResult) -> bool:
        """Return True, or raise what went wrong with :meth:`send_fd_async`."""
        return bool(self.finish(result, "send_fd_async"))

    def receive_fd_async(
        self,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *user_data: Any,
    ) -> None:
        """Begin :meth:`receive_fd`."""
        self.begin(
            "receive_fd_async",
            self.connection.receive_fd,
            cancellable,
            callback,
            user_data,
            discard=os.close,
        )

    def receive_fd_finish(self, result: AsyncResult) -> int:
        """Return the descriptor, which is the caller's now, or raise what went wrong."""
        return int(self.finish(result, "receive_fd_async"))

    def send_fds_async(
        self,
        fds: Iterable[FileDescriptor],
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *user_data: Any,
        per_message: int = SCM_MAX_FD,
    ) -> None:
        """Begin :meth:`UnixConnection.send_fds`; the caller may close ``fds`` at once.

        Raises:
          TypeError, ValueError, OSError: one of them is not an open descriptor, or none is
            free for the duplicates.
        """
        duplicates = duplicated(fds)
        self.begin(
            "send_fds_async",
            partial(self.connection.send_fds, duplicates, per_message=per_message),
            cancellable,
            callback,
            user_data,
            release=duplicates.close,
        )

    def send_fds_finish(self, result: AsyncResult) -> int:
        """Return how many were sent, or raise what went wrong."""
        return int(self.finish(result, "send_fds_async"))

    def receive_fds_async(
        self,
        max_fds: int,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *user_data: Any,
    ) -> None:
        """Begin :meth:`UnixConnection.receive_fds`."""
        work = partial(self.connection.receive_fds, max_fds)
        self.begin(
            "receive_fds_async", work, cancellable, callback, user_data, discard=UnixFDList.close
        )

    def receive_fds_finish(self, result: AsyncResult) -> UnixFDList:
        """Return the list, which is the caller's now, or raise what went wrong."""
        fds: UnixFDList = self.finish(result, "receive_fds_async")
        return fds

    def receive_file_async(
        self,
        mode: str = "rb",
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *user_data: Any,
        kinds: Collection[DescriptorKind] = (DescriptorKind.REGULAR_FILE,),
    ) -> None:
        """Begin :meth:`UnixConnection.receive_file`."""
        work = partial(self.connection.receive_file, mode, kinds=kinds)
        self.begin("receive_file_async", work, cancellable, callback, user_data, discard=_close)

    def receive_file_finish(self, result: AsyncResult) -> IO[Any]:
        """Return the file, which is the caller's now, or raise what went wrong."""
        file: IO[Any] = self.finish(result, "receive_file_async")
        return file

    def receive_socket_async(
        self,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *user_data: Any,
    ) -> None:
        """Begin :meth:`UnixConnection.receive_socket`."""
        work = self.connection.receive_socket
        self.begin("receive_socket_async", work, cancellable, callback, user_data, discard=_close)

    def receive_socket_finish(self, result: AsyncResult) -> trio.socket.SocketType:
        """Return the socket, which is the caller's now, or raise what went wrong."""
        sock: trio.socket.SocketType = self.finish(result, "receive_socket_async")
        return sock

    def receive_stream_async(
        self,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *user_data: Any,
    ) -> None:
        """Begin :meth:`UnixConnection.receive_stream`."""
        work = self.connection.receive_stream
        self.begin(
            "receive_stream_async", work, cancellable, callback, user_data, discard=_close_stream
        )

    def receive_stream_finish(self, result: AsyncResult) -> trio.abc.HalfCloseableStream:
        """Return the stream, which is the caller's now, or raise what went wrong."""
        stream: trio.abc.HalfCloseableStream = self.finish(result, "receive_stream_async")
        return stream

    def send_buffer_async(
        self,
        data: Buffer | FileDescriptor,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *user_data: Any,
    ) -> None:
        """Begin :meth:`UnixConnection.send_buffer`; ``data`` may be changed or closed at once.

        Raises:
          TypeError, ValueError, OSError, UnsafeBufferError, NotSupportedError: as there.
        """
        fd = sealed_memory_of(data)
        self.begin(
            "send_buffer_async",
            partial(self.connection.send_fd, fd),
            cancellable,
            callback,
            user_data,
            release=partial(os.close, fd),
        )

    def send_buffer_finish(self, result: AsyncResult) -> bool:
        """Return True, or raise what went wrong with :meth:`send_buffer_async`."""
        return bool(self.finish(result, "send_buffer_async"))

    def receive_buffer_async(
        self,
        max_bytes: int,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *user_data: Any,
    ) -> None:
        """Begin :meth:`UnixConnection.receive_buffer`."""
        work = partial(self.connection.receive_buffer, max_bytes)
        self.begin("receive_buffer_async", work, cancellable, callback, user_data)

    def receive_buffer_finish(self, result: AsyncResult) -> memoryview:
        """Return the view, or raise what went wrong."""
        view: memoryview = self.finish(result, "receive_buffer_async")
        return view

    def begin(
        self,
        tag: str,
        work: Callable[..., Awaitable[Any]],
        cancellable: Cancellable | None,
        callback: AsyncReadyCallback | None,
        user_data: tuple[Any, ...],
        *,
        discard: Callable[[Any], object] | None = None,
        release: Callable[[], object] | None = None,
    ) -> None:
        """Begin ``work(cancellable=...)``; the ``*_async`` methods call this."""
        operation = Operation(
            self,
            tag,
            partial(work, cancellable=cancellable),
            callback,
            user_data,
            discard=discard,
            release=release,
        )
        try:
            if cancellable is not None:
                check_cancellable(cancellable)
            if callback is not None and not callable(callback):
                raise TypeError(f"a callback or None is due, not {type(callback).__name__}")
            self._begin_operation(operation)
        except BaseException:
            if release is not None:
                release()
            raise

    def finish(self, result: AsyncResult, tag: str) -> Any:
        """Return the value of a result, or raise; the ``*_finish`` methods call this."""
        if not isinstance(result, AsyncResult):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"an AsyncResult is due, not {type(result).__name__}")
        return result.finish(self, tag)


def duplicated(fds: Iterable[FileDescriptor]) -> UnixFDList:
    """Return a list of duplicates, which the caller owns.

    Raises:
      TypeError, ValueError, OSError: one is not an open descriptor, or no slot is free; then
        all are closed.
    """
    numbers = descriptor_numbers(fds, None)
    # First all, because a duplicate may take the number of one that is closed.
    check_all_open(numbers)
    duplicates = UnixFDList()
    try:
        for number in numbers:
            duplicates.append(number)
    except BaseException:
        duplicates.close()
        raise
    return duplicates


def _close(value: Any) -> None:
    value.close()


def _close_stream(stream: Any) -> None:
    stream.socket.close()
