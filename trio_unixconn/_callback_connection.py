"""CallbackConnection: a connection with Gio's ``*_async`` and ``*_finish``.

The rule of this file: names and order of arguments are Gio's; what Gio lacks follows suit.

Source: https://docs.gtk.org/gio-unix/class.Connection.html
"""

from __future__ import annotations

import os
from functools import partial
from typing import IO, TYPE_CHECKING, Any

from trio.lowlevel import enable_ki_protection

from . import _closing
from ._buffers import bytes_of
from ._cancellable import check_cancellable
from ._closing import close_fds
from ._connection import sealed_memory_of
from ._fdlist import UnixFDList
from ._fds import check_open, duplicate, filenos
from ._fdtypes import DescriptorKind
from ._kernel import SCM_MAX_FD
from ._memfd import Seals
from ._messages import Message
from ._owner import DescriptorOwner
from ._results import AsyncReadyCallback, AsyncResult, Operation

if TYPE_CHECKING:
    from array import array
    from collections.abc import Awaitable, Callable, Collection, Iterable

    import trio

    from ._buffers import Buffer
    from ._cancellable import Cancellable
    from ._connection import UnixConnection
    from ._credentials import Credentials
    from ._fds import FileDescriptor


class CallbackConnection(DescriptorOwner):
    """A connection in callback form; made by :meth:`CallbackAdapter.wrap`.

    It has the methods of ``Gio.UnixConnection`` under Gio's names. ``*_async`` methods return
    None at once, and later ``callback(source, result, *user_data)`` is called in the trio
    thread, exactly once, also when the operation failed or was cancelled; it calls the
    matching ``*_finish`` for the value, or to have the error raised. Without a callback the
    operation runs and its result is dropped.

    ``*_async`` may be called in any thread. In the trio thread the callback never runs before
    ``*_async`` has returned; another thread may still be on its way out of it, because the
    two run at the same time.

    Attributes:
      connection: the :class:`UnixConnection` beneath.
    """

    def __init__(
        self, begin_operation: Callable[[Operation], None], connection: UnixConnection
    ) -> None:
        self._begin_operation = begin_operation
        self.connection = connection

    @enable_ki_protection
    async def send_fd(self, fd: FileDescriptor, cancellable: Cancellable | None = None) -> bool:
        """As :meth:`UnixConnection.send_fd`."""
        return await self.connection.send_fd(fd, cancellable)

    @enable_ki_protection
    async def receive_fd(self, cancellable: Cancellable | None = None) -> int:
        """As :meth:`UnixConnection.receive_fd`."""
        return await self.connection.receive_fd(cancellable)

    @enable_ki_protection
    async def send_credentials(self, cancellable: Cancellable | None = None) -> bool:
        """As :meth:`UnixConnection.send_credentials`."""
        return await self.connection.send_credentials(cancellable)

    @enable_ki_protection
    async def receive_credentials(self, cancellable: Cancellable | None = None) -> Credentials:
        """As :meth:`UnixConnection.receive_credentials`."""
        return await self.connection.receive_credentials(cancellable)

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
        duplicates, close_duplicates = duplicated([fd])
        self.begin(
            "send_fd_async",
            partial(self.connection.send_fd, duplicates[0]),
            cancellable,
            callback,
            user_data,
            release=close_duplicates,
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
        duplicates, close_duplicates = duplicated(fds)
        self.begin(
            "send_fds_async",
            partial(self.connection.send_fds, duplicates, per_message=per_message),
            cancellable,
            callback,
            user_data,
            release=close_duplicates,
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
        self.begin(
            "receive_file_async", work, cancellable, callback, user_data, discard=_close_file
        )

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
        seals: Seals = Seals.ALL,
    ) -> None:
        """Begin :meth:`UnixConnection.receive_buffer`."""
        work = partial(self.connection.receive_buffer, max_bytes, seals=seals)
        self.begin("receive_buffer_async", work, cancellable, callback, user_data)

    def receive_buffer_finish(self, result: AsyncResult) -> memoryview:
        """Return the view, or raise what went wrong."""
        view: memoryview = self.finish(result, "receive_buffer_async")
        return view

    def send_credentials_async(
        self,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *user_data: Any,
    ) -> None:
        """Begin :meth:`send_credentials`."""
        work = self.connection.send_credentials
        self.begin("send_credentials_async", work, cancellable, callback, user_data)

    def send_credentials_finish(self, result: AsyncResult) -> bool:
        """Return True, or raise what went wrong with :meth:`send_credentials_async`."""
        return bool(self.finish(result, "send_credentials_async"))

    def receive_credentials_async(
        self,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *user_data: Any,
    ) -> None:
        """Begin :meth:`receive_credentials`."""
        work = self.connection.receive_credentials
        self.begin("receive_credentials_async", work, cancellable, callback, user_data)

    def receive_credentials_finish(self, result: AsyncResult) -> Credentials:
        """Return the credentials, or raise what went wrong."""
        credentials: Credentials = self.finish(result, "receive_credentials_async")
        return credentials

    def send_fake_credentials_async(
        self,
        credentials: Credentials,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *user_data: Any,
    ) -> None:
        """Begin :meth:`UnixConnection.send_fake_credentials`."""
        work = partial(self.connection.send_fake_credentials, credentials)
        self.begin("send_fake_credentials_async", work, cancellable, callback, user_data)

    def send_fake_credentials_finish(self, result: AsyncResult) -> bool:
        """Return True, or raise what went wrong."""
        return bool(self.finish(result, "send_fake_credentials_async"))

    def send_message_async(
        self,
        data: Buffer,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *user_data: Any,
        fds: Iterable[FileDescriptor] = (),
        credentials: Credentials | None = None,
    ) -> None:
        """Begin :meth:`UnixConnection.send_message`; ``data`` and ``fds`` are free at once.

        Raises:
          TypeError, ValueError, OSError: one of ``fds`` is not an open descriptor, or none is
            free for the duplicates.
        """
        with bytes_of(data) as view:
            copy = view.tobytes()
        duplicates, close_duplicates = duplicated(fds)
        self.begin(
            "send_message_async",
            partial(self.connection.send_message, copy, fds=duplicates, credentials=credentials),
            cancellable,
            callback,
            user_data,
            release=close_duplicates,
        )

    def send_message_finish(self, result: AsyncResult) -> None:
        """Raise what went wrong with :meth:`send_message_async`, if something did."""
        self.finish(result, "send_message_async")

    def receive_message_async(
        self,
        max_bytes: int,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *user_data: Any,
        max_fds: int = SCM_MAX_FD,
        credentials: bool = False,
    ) -> None:
        """Begin :meth:`UnixConnection.receive_message`."""
        work = partial(
            self.connection.receive_message, max_bytes, max_fds=max_fds, credentials=credentials
        )
        self.begin(
            "receive_message_async", work, cancellable, callback, user_data, discard=Message.close
        )

    def receive_message_finish(self, result: AsyncResult) -> Message:
        """Return the message, which is the caller's now, or raise what went wrong."""
        message: Message = self.finish(result, "receive_message_async")
        return message

    def close_async(
        self,
        io_priority: int = 0,  # noqa: ARG002 - Gio has it
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *user_data: Any,
    ) -> None:
        """Begin to close the connection; a Cancellable does not keep it from being closed.

        ``io_priority`` is there because Gio has it; trio has no priorities.
        """
        self.begin("close_async", self._close, cancellable, callback, user_data)

    def close_finish(self, result: AsyncResult) -> bool:
        """Return True, or raise OperationCancelled; the connection is closed either way."""
        return bool(self.finish(result, "close_async"))

    async def _close(self, cancellable: Cancellable | None) -> bool:
        await self.connection.aclose()
        if cancellable is not None:
            cancellable.raise_if_cancelled()
        return True

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


def duplicated(fds: Iterable[FileDescriptor]) -> tuple[array[int], Callable[[], None]]:
    """Return duplicates, and a function that closes them.

    Raises:
      TypeError, ValueError, OSError: one is not an open file descriptor, or none is free for a
        duplicate; then nothing stays open.
    """
    # The owners stay referenced until there are duplicates.
    numbers, _owners = filenos(fds)
    # Before any is made, because a duplicate can get the number of one that is closed.
    check_open(numbers)
    duplicates, owned = duplicate(numbers)
    return duplicates, partial(close_fds, owned)


def _close(value: Any) -> None:
    value.close()


def _close_file(file: IO[Any]) -> None:
    # In a thread: it may wait for a file server.
    _closing.close_object(file.close)


def _close_stream(stream: Any) -> None:
    stream.socket.close()
