"""A connection with Gio's ``*_async`` and ``*_finish`` methods.

Invariant: Gio's names and order of arguments, and the same for operations that Gio lacks. Nothing
here blocks, and the objects passed to ``*_async`` are the caller's again when it returns.

Source: https://docs.gtk.org/gio-unix/class.Connection.html
"""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable, Collection, Iterable
from functools import partial
from typing import IO, TYPE_CHECKING, Any, Final

from trio.lowlevel import enable_ki_protection

from ._buffers import bytes_of
from ._cancellable import check_cancellable
from ._closing import close_fds, close_object
from ._connection import (
    receive_fd_nowait,
    receiver_of,
    sealed_memory_of,
    send_fd_nowait,
    sender_of,
)
from ._fds import check_open, duplicate, fileno, filenos
from ._fdtypes import DescriptorKind
from ._kernel import SCM_MAX_FD
from ._memfd import Seals
from ._owner import DescriptorOwner
from ._results import AsyncReadyCallback, AsyncResult, Direction, Operation, finish_result

if TYPE_CHECKING:
    import trio

    from ._buffers import Buffer
    from ._cancellable import Cancellable
    from ._connection import UnixConnection
    from ._credentials import Credentials
    from ._fdlist import UnixFDList
    from ._fds import FileDescriptor
    from ._messages import Message


class _NotGiven:
    """The default of an argument for which None is a value."""

    def __repr__(self) -> str:
        return "not given"


NOT_GIVEN: Final = _NotGiven()


class CallbackConnection(DescriptorOwner):
    """A connection in callback form; made by :meth:`CallbackAdapter.wrap`.

    It has the methods of ``Gio.UnixConnection`` under Gio's names. ``*_async`` methods return
    None immediately. When the operation has ended, ``callback(source, result, *user_data)`` is
    called in the trio thread, exactly once, even if the operation failed or was cancelled. It calls
    the matching ``*_finish``, which returns the value or raises the error. Without a callback
    the operation runs and its result is discarded. As in PyGObject, the user data are the arguments
    after the callback, or one value by keyword: ``user_data=value``.

    ``*_async`` can be called in any thread. In the trio thread the callback never runs before
    ``*_async`` has returned. In another thread it can, because the two threads run at the same
    time. The callback runs in a copy of the context (``contextvars``) of the ``*_async`` call.

    Operations start in the order of the ``*_async`` calls; those of other threads, in the order
    in which they arrive in the trio thread. So if two operations use one direction, the later one
    fails with :class:`ConnectionBusyError`. An operation that was begun before
    :meth:`close_async` completes if it does not have to wait, and otherwise fails with
    :class:`ConnectionClosedError`.

    Attributes:
      connection: the wrapped :class:`UnixConnection`.
    """

    def __init__(
        self, begin_operation: Callable[[Operation], None], connection: UnixConnection
    ) -> None:
        self._begin_operation = begin_operation
        self.connection = connection

    def __repr__(self) -> str:
        return f"<CallbackConnection of {self.connection!r}>"

    @enable_ki_protection
    async def send_fd(self, fd: FileDescriptor, cancellable: Cancellable | None = None) -> bool:
        """See :meth:`UnixConnection.send_fd`."""
        return await self.connection.send_fd(fd, cancellable)

    @enable_ki_protection
    async def receive_fd(self, cancellable: Cancellable | None = None) -> int:
        """See :meth:`UnixConnection.receive_fd`."""
        return await self.connection.receive_fd(cancellable)

    @enable_ki_protection
    async def send_credentials(self, cancellable: Cancellable | None = None) -> bool:
        """See :meth:`UnixConnection.send_credentials`."""
        return await self.connection.send_credentials(cancellable)

    @enable_ki_protection
    async def receive_credentials(self, cancellable: Cancellable | None = None) -> Credentials:
        """See :meth:`UnixConnection.receive_credentials`."""
        return await self.connection.receive_credentials(cancellable)

    @enable_ki_protection
    def send_fd_async(
        self,
        fd: FileDescriptor,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *args: Any,
        user_data: Any = NOT_GIVEN,
    ) -> None:
        """Begin :meth:`send_fd`; the caller may close ``fd`` when this has returned.

        Raises:
          TypeError: ``fd`` is not a file descriptor.
          ValueError: ``fd`` is not a number of a file descriptor.
          OSError: EBADF, ``fd`` is closed; EMFILE.
        """
        number = fileno(fd)
        self._begin(
            "send_fd_async",
            self.connection.send_fd,
            cancellable,
            callback,
            (args, user_data),
            nowait=partial(send_fd_nowait, self.connection, number),
            direction=sender_of(self.connection),
            sends=number,
        )

    def send_fd_finish(self, result: AsyncResult) -> bool:
        """Return True, or raise the error of :meth:`send_fd_async`."""
        return bool(finish_result(result, self, "send_fd_async"))

    def receive_fd_async(
        self,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *args: Any,
        user_data: Any = NOT_GIVEN,
    ) -> None:
        """Begin :meth:`receive_fd`."""
        self._begin(
            "receive_fd_async",
            self.connection.receive_fd,
            cancellable,
            callback,
            (args, user_data),
            discard=_discard_fd,
            nowait=partial(receive_fd_nowait, self.connection),
            direction=receiver_of(self.connection),
        )

    def receive_fd_finish(self, result: AsyncResult) -> int:
        """Return the file descriptor, which the caller owns, or raise the error."""
        return int(finish_result(result, self, "receive_fd_async"))

    @enable_ki_protection
    def send_fds_async(
        self,
        fds: Iterable[FileDescriptor],
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *args: Any,
        user_data: Any = NOT_GIVEN,
        per_message: int = SCM_MAX_FD,
    ) -> None:
        """Begin :meth:`UnixConnection.send_fds`; ``fds`` are the caller's again.

        Raises:
          TypeError: one of ``fds`` is not a file descriptor.
          ValueError: one of ``fds`` is not a number of a file descriptor.
          OSError: EBADF, one of ``fds`` is closed; EMFILE.
        """
        duplicates, owned = _duplicated(fds)
        self._begin(
            "send_fds_async",
            partial(self.connection.send_fds, duplicates, per_message=per_message),
            cancellable,
            callback,
            (args, user_data),
            fds=owned,
        )

    def send_fds_finish(self, result: AsyncResult) -> int:
        """Return the number of file descriptors that were sent, or raise the error."""
        return int(finish_result(result, self, "send_fds_async"))

    def receive_fds_async(
        self,
        max_fds: int,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *args: Any,
        user_data: Any = NOT_GIVEN,
    ) -> None:
        """Begin :meth:`UnixConnection.receive_fds`."""
        work = partial(self.connection.receive_fds, max_fds)
        self._begin(
            "receive_fds_async",
            work,
            cancellable,
            callback,
            (args, user_data),
            discard=_discard_list,
        )

    def receive_fds_finish(self, result: AsyncResult) -> UnixFDList:
        """Return the list, which the caller owns, or raise the error."""
        fds: UnixFDList = finish_result(result, self, "receive_fds_async")
        return fds

    def receive_file_async(
        self,
        mode: str = "rb",
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *args: Any,
        user_data: Any = NOT_GIVEN,
        kinds: Collection[DescriptorKind] = (DescriptorKind.REGULAR_FILE,),
    ) -> None:
        """Begin :meth:`UnixConnection.receive_file`."""
        work = partial(self.connection.receive_file, mode, kinds=kinds)
        self._begin(
            "receive_file_async",
            work,
            cancellable,
            callback,
            (args, user_data),
            discard=_discard_file,
        )

    def receive_file_finish(self, result: AsyncResult) -> IO[Any]:
        """Return the file, which the caller owns, or raise the error."""
        file: IO[Any] = finish_result(result, self, "receive_file_async")
        return file

    def receive_socket_async(
        self,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *args: Any,
        user_data: Any = NOT_GIVEN,
    ) -> None:
        """Begin :meth:`UnixConnection.receive_socket`."""
        work = self.connection.receive_socket
        self._begin(
            "receive_socket_async",
            work,
            cancellable,
            callback,
            (args, user_data),
            discard=_discard_socket,
        )

    def receive_socket_finish(self, result: AsyncResult) -> trio.socket.SocketType:
        """Return the socket, which the caller owns, or raise the error."""
        sock: trio.socket.SocketType = finish_result(result, self, "receive_socket_async")
        return sock

    def receive_stream_async(
        self,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *args: Any,
        user_data: Any = NOT_GIVEN,
    ) -> None:
        """Begin :meth:`UnixConnection.receive_stream`."""
        work = self.connection.receive_stream
        self._begin(
            "receive_stream_async",
            work,
            cancellable,
            callback,
            (args, user_data),
            discard=_discard_stream,
        )

    def receive_stream_finish(self, result: AsyncResult) -> trio.abc.HalfCloseableStream:
        """Return the stream, which the caller owns, or raise the error."""
        stream: trio.abc.HalfCloseableStream = finish_result(result, self, "receive_stream_async")
        return stream

    @enable_ki_protection
    def send_buffer_async(
        self,
        data: Buffer | FileDescriptor,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *args: Any,
        user_data: Any = NOT_GIVEN,
    ) -> None:
        """Begin :meth:`UnixConnection.send_buffer`; ``data`` is the caller's again.

        Raises:
          TypeError: as there.
          ValueError: as there.
          OSError: as there.
          UnsafeBufferError: as there.
          NotSupportedError: as there.
        """
        fd = sealed_memory_of(data)
        self._begin(
            "send_buffer_async",
            partial(self.connection.send_fd, fd),
            cancellable,
            callback,
            (args, user_data),
            fds=[fd],
        )

    def send_buffer_finish(self, result: AsyncResult) -> bool:
        """Return True, or raise the error of :meth:`send_buffer_async`."""
        return bool(finish_result(result, self, "send_buffer_async"))

    def receive_buffer_async(
        self,
        max_bytes: int,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *args: Any,
        user_data: Any = NOT_GIVEN,
        seals: Seals = Seals.ALL,
    ) -> None:
        """Begin :meth:`UnixConnection.receive_buffer`."""
        work = partial(self.connection.receive_buffer, max_bytes, seals=seals)
        self._begin("receive_buffer_async", work, cancellable, callback, (args, user_data))

    def receive_buffer_finish(self, result: AsyncResult) -> memoryview:
        """Return the view, or raise the error."""
        view: memoryview = finish_result(result, self, "receive_buffer_async")
        return view

    def send_credentials_async(
        self,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *args: Any,
        user_data: Any = NOT_GIVEN,
    ) -> None:
        """Begin :meth:`send_credentials`."""
        work = self.connection.send_credentials
        self._begin("send_credentials_async", work, cancellable, callback, (args, user_data))

    def send_credentials_finish(self, result: AsyncResult) -> bool:
        """Return True, or raise the error of :meth:`send_credentials_async`."""
        return bool(finish_result(result, self, "send_credentials_async"))

    def receive_credentials_async(
        self,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *args: Any,
        user_data: Any = NOT_GIVEN,
    ) -> None:
        """Begin :meth:`receive_credentials`."""
        work = self.connection.receive_credentials
        self._begin("receive_credentials_async", work, cancellable, callback, (args, user_data))

    def receive_credentials_finish(self, result: AsyncResult) -> Credentials:
        """Return the credentials, or raise the error."""
        credentials: Credentials = finish_result(result, self, "receive_credentials_async")
        return credentials

    def send_fake_credentials_async(
        self,
        credentials: Credentials,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *args: Any,
        user_data: Any = NOT_GIVEN,
    ) -> None:
        """Begin :meth:`UnixConnection.send_fake_credentials`."""
        work = partial(self.connection.send_fake_credentials, credentials)
        self._begin("send_fake_credentials_async", work, cancellable, callback, (args, user_data))

    def send_fake_credentials_finish(self, result: AsyncResult) -> bool:
        """Return True, or raise the error."""
        return bool(finish_result(result, self, "send_fake_credentials_async"))

    @enable_ki_protection
    def send_message_async(
        self,
        data: Buffer,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *args: Any,
        user_data: Any = NOT_GIVEN,
        fds: Iterable[FileDescriptor] = (),
        credentials: Credentials | None = None,
    ) -> None:
        """Begin :meth:`UnixConnection.send_message`; ``data`` and ``fds`` are the caller's again.

        Raises:
          TypeError: one of ``fds`` is not a file descriptor.
          ValueError: one of ``fds`` is not a number of a file descriptor.
          OSError: EBADF, one of ``fds`` is closed; EMFILE.
        """
        with bytes_of(data) as view:
            copy = view.tobytes()
        duplicates, owned = _duplicated(fds)
        self._begin(
            "send_message_async",
            partial(self.connection.send_message, copy, fds=duplicates, credentials=credentials),
            cancellable,
            callback,
            (args, user_data),
            fds=owned,
        )

    def send_message_finish(self, result: AsyncResult) -> None:
        """Return None, or raise the error of :meth:`send_message_async`."""
        finish_result(result, self, "send_message_async")

    def receive_message_async(
        self,
        max_bytes: int,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *args: Any,
        user_data: Any = NOT_GIVEN,
        max_fds: int = SCM_MAX_FD,
        credentials: bool = False,
        pidfd: bool = False,
    ) -> None:
        """Begin :meth:`UnixConnection.receive_message`."""
        work = partial(
            self.connection.receive_message,
            max_bytes,
            max_fds=max_fds,
            credentials=credentials,
            pidfd=pidfd,
        )
        self._begin(
            "receive_message_async",
            work,
            cancellable,
            callback,
            (args, user_data),
            discard=_discard_message,
        )

    def receive_message_finish(self, result: AsyncResult) -> Message:
        """Return the message, which the caller owns, or raise the error."""
        message: Message = finish_result(result, self, "receive_message_async")
        return message

    def send_all_async(
        self,
        data: Buffer,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *args: Any,
        user_data: Any = NOT_GIVEN,
    ) -> None:
        """Begin :meth:`UnixConnection.send_all`; ``data`` is the caller's again.

        Raises:
          TypeError: ``data`` is not bytes.
        """
        with bytes_of(data) as view:
            copy = view.tobytes()
        work = partial(_under, partial(self.connection.send_all, copy))
        self._begin("send_all_async", work, cancellable, callback, (args, user_data))

    def send_all_finish(self, result: AsyncResult) -> None:
        """Return None, or raise the error of :meth:`send_all_async`."""
        finish_result(result, self, "send_all_async")

    def receive_some_async(
        self,
        max_bytes: int | None = None,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *args: Any,
        user_data: Any = NOT_GIVEN,
    ) -> None:
        """Begin :meth:`UnixConnection.receive_some`."""
        work = partial(_under, partial(self.connection.receive_some, max_bytes))
        self._begin("receive_some_async", work, cancellable, callback, (args, user_data))

    def receive_some_finish(self, result: AsyncResult) -> bytes:
        """Return the bytes, empty at the end of the stream, or raise the error."""
        data: bytes = finish_result(result, self, "receive_some_async")
        return data

    def receive_into_async(
        self,
        buffer: bytearray | memoryview,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *args: Any,
        user_data: Any = NOT_GIVEN,
    ) -> None:
        """Begin :meth:`UnixConnection.receive_into`; ``buffer`` is in use until the callback."""
        work = partial(self.connection.receive_into, buffer)
        self._begin("receive_into_async", work, cancellable, callback, (args, user_data))

    def receive_into_finish(self, result: AsyncResult) -> int:
        """Return the number of bytes, 0 at the end of the stream, or raise the error."""
        return int(finish_result(result, self, "receive_into_async"))

    def send_eof_async(
        self,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *args: Any,
        user_data: Any = NOT_GIVEN,
    ) -> None:
        """Begin :meth:`UnixConnection.send_eof`."""
        work = partial(_under, self.connection.send_eof)
        self._begin("send_eof_async", work, cancellable, callback, (args, user_data))

    def send_eof_finish(self, result: AsyncResult) -> None:
        """Return None, or raise the error of :meth:`send_eof_async`."""
        finish_result(result, self, "send_eof_async")

    def close_async(
        self,
        io_priority: int = 0,  # noqa: ARG002 - Gio has it
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *args: Any,
        user_data: Any = NOT_GIVEN,
    ) -> None:
        """Begin to close the connection. It is closed even if the Cancellable is cancelled.

        The callbacks of operations that were begun before run first. A second ``close_async``
        while the first one is pending fails with :class:`ConnectionBusyError`, as in Gio.

        Args:
          io_priority: ignored. Gio has it; trio has no priorities.
        """
        self._begin(
            "close_async", self._close, cancellable, callback, (args, user_data), closes=True
        )

    def close_finish(self, result: AsyncResult) -> bool:
        """Return True, or raise OperationCancelled; the connection is closed either way."""
        return bool(finish_result(result, self, "close_async"))

    async def _close(self, cancellable: Cancellable | None) -> bool:
        await self.connection.aclose()
        if cancellable is not None:
            cancellable.raise_if_cancelled()
        return True

    @enable_ki_protection
    def _begin(
        self,
        tag: str,
        work: Callable[..., Awaitable[Any]],
        cancellable: Cancellable | None,
        callback: AsyncReadyCallback | None,
        user_data: tuple[tuple[Any, ...], Any],
        *,
        discard: Callable[[Any], object] | None = None,
        fds: list[int] | None = None,
        closes: bool = False,
        nowait: Callable[[], object] | None = None,
        direction: Direction | None = None,
        sends: int | None = None,
    ) -> None:
        """Begin ``work(cancellable=...)``.

        Args:
          user_data: what was passed after the callback, and by keyword.
          discard: closes a value that is not finished; must not raise or block.
          fds: file descriptors that ``work`` uses; they are closed afterwards, even if it was
            not begun.
          closes: whether ``work`` closes the connection.
          nowait: does the same without waiting, or raises ``trio.WouldBlock``.
          direction: what ``nowait`` uses.
          sends: a file descriptor of the caller, of which ``work`` gets a duplicate.
        """
        try:
            if cancellable is not None:
                check_cancellable(cancellable)
            if callback is not None and not callable(callback):
                raise TypeError(f"callback must be callable or None, got {type(callback).__name__}")
            data, keyword = user_data
            if keyword is not NOT_GIVEN:
                if data:
                    raise TypeError(f"{tag}() got user data by position and by keyword")
                data = (keyword,)
            operation = Operation(
                self,
                tag,
                partial(work, cancellable=cancellable),
                callback,
                data,
                discard=discard,
                fds=fds or [],
                closes=closes,
                # Not with a Cancellable, which may have been cancelled.
                nowait=nowait if cancellable is None else None,
                direction=direction,
                sends=sends,
            )
            self._begin_operation(operation)
        except BaseException:
            close_fds(fds or ())
            raise


async def _under(work: Callable[[], Awaitable[Any]], cancellable: Cancellable | None) -> Any:
    """Await ``work()`` under a Cancellable, if there is one."""
    if cancellable is None:
        return await work()
    with cancellable.scope():
        return await work()


def _duplicated(fds: Iterable[FileDescriptor]) -> tuple[array[int], list[int]]:
    """Return duplicates in the order of ``fds``, and a list of them that the caller owns.

    Raises:
      TypeError: one is not a file descriptor.
      ValueError: one is not a number of a file descriptor.
      OSError: EBADF, EMFILE. Then nothing stays open.
    """
    # The owners stay referenced until there are duplicates.
    numbers, _owners = filenos(fds)
    # Before any is made, because a duplicate can get the number of one that is closed.
    check_open(numbers)
    return duplicate(numbers)


# A value that is not finished is closed by the closing thread, which can wait for a file server or
# for SO_LINGER. These functions are called by finalizers, too, in any thread.


def _discard_fd(fd: int) -> None:
    close_fds([fd])


def _discard_list(fds: UnixFDList) -> None:
    close_fds(fds.steal_fds())


def _discard_message(message: Message) -> None:
    close_fds([*message.fds.steal_fds(), *message.pidfds.steal_fds()])


def _discard_file(file: IO[Any]) -> None:
    close_object(file.close)


def _discard_socket(sock: trio.socket.SocketType) -> None:
    # Not close(), which can be called in a trio run only.
    close_fds([sock.detach()])


def _discard_stream(stream: Any) -> None:
    _discard_socket(stream.socket)
