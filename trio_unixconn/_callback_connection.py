"""CallbackConnection: a connection with Gio's ``*_async`` and ``*_finish``.

The rule of this file: names and order of arguments are Gio's; what Gio lacks follows suit.

Source: https://docs.gtk.org/gio-unix/class.Connection.html
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from trio.lowlevel import enable_ki_protection

from ._buffers import bytes_of
from ._callback_passing import CallbackPassing, duplicated
from ._kernel import SCM_MAX_FD
from ._messages import Message

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ._buffers import Buffer
    from ._cancellable import Cancellable
    from ._credentials import Credentials
    from ._descriptors import FileDescriptor
    from ._results import AsyncReadyCallback, AsyncResult


class CallbackConnection(CallbackPassing):
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
        duplicates = duplicated(fds)
        self.begin(
            "send_message_async",
            partial(self.connection.send_message, copy, fds=duplicates, credentials=credentials),
            cancellable,
            callback,
            user_data,
            release=duplicates.close,
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
