"""The callback form of a connection: ``*_async`` and ``*_finish``, on top of a nursery.

The rule of this file: an operation that was begun ends in exactly one call of its callback,
in the trio thread, and whatever its result holds has an owner until it is taken or closed.

Sources: https://docs.gtk.org/gio-unix/class.Connection.html,
https://docs.gtk.org/gio/iface.AsyncResult.html
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import trio

from . import _control
from .errors import ConnectionClosedError, OperationCancelled

if TYPE_CHECKING:
    from ._cancellable import Cancellable
    from ._connection import UnixConnection
    from ._control import FileDescriptor
    from ._credentials import Credentials

AsyncReadyCallback: TypeAlias = "Callable[..., object]"


class AsyncResult:
    """What an operation came to, as ``Gio.AsyncResult``; hand it to the matching ``*_finish``.

    A result that holds a descriptor closes it, with a ResourceWarning, when it is collected
    without having been finished.
    """

    __slots__ = ("_discard", "_error", "_finished", "_source", "_tag", "_user_data", "_value")

    def __init__(self, operation: _Operation, value: Any, error: Exception | None) -> None:
        self._source = operation.source
        self._tag = operation.tag
        self._user_data = operation.user_data
        self._discard = operation.discard if error is None else None
        self._value = value
        self._error = error
        self._finished = False

    def get_source_object(self) -> CallbackConnection:
        """Return the connection whose ``*_async`` method was called."""
        return self._source

    def get_user_data(self) -> tuple[Any, ...]:
        """Return what was passed to ``*_async`` behind the callback."""
        return self._user_data

    def is_tagged(self, source_tag: object) -> bool:
        """Whether this is a result of ``source_tag``: an ``*_async`` method, or its name."""
        return getattr(source_tag, "__name__", source_tag) == self._tag

    def had_error(self) -> bool:
        """Whether ``*_finish`` will raise, or has raised, what went wrong."""
        return self._error is not None

    def finish(self, source: CallbackConnection, tag: str) -> Any:
        """Hand over the value or raise the error, once; called by the ``*_finish`` methods.

        Raises:
          ValueError: a result of another connection or method, or finished before.
        """
        if self._source is not source:
            raise ValueError("this result belongs to another connection; finish it there")
        if self._tag != tag:
            raise ValueError(f"this is a result of {self._tag}(), not of {tag}()")
        if self._finished:
            raise ValueError("this result has been finished before; a result finishes once")
        self._finished = True
        if self._error is not None:
            raise self._error
        return self._value

    def discard(self) -> None:
        """Close what the result holds, if nobody has finished it."""
        if not self._finished and self._discard is not None:
            self._finished = True
            self._discard(self._value)

    def __del__(self) -> None:
        if not self._finished and self._discard is not None:
            # First closed, because a warning may be an exception.
            self.discard()
            warnings.warn(
                f"nobody finished a result of {self._tag}(); descriptor {self._value} was closed",
                ResourceWarning,
                stacklevel=2,
            )


@attrs.define(eq=False)
class _Operation:
    source: CallbackConnection
    tag: str
    work: Callable[[], Awaitable[Any]]
    callback: AsyncReadyCallback | None
    user_data: tuple[Any, ...]
    # Closes what the result holds; releases what the operation held until its end.
    discard: Callable[[Any], object] | None = None
    release: Callable[[], object] | None = None
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)


class CallbackAdapter:
    """Runs operations in a nursery and calls back; made by :func:`open_callback_adapter`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._run = trio.lowlevel.current_trio_token()
        self._thread = threading.get_ident()
        # Guards the three below, because operations may be begun in any thread.
        self._lock = threading.Lock()
        self._pending: set[_Operation] = set()
        self._accepting = True
        self._idle: trio.Event | None = None

    def wrap(self, connection: UnixConnection) -> CallbackConnection:
        """Return the callback form of ``connection``, which stays usable as it is."""
        return CallbackConnection(self, connection)

    def cancel_pending(self) -> None:
        """End what is pending: each callback gets a result that raises OperationCancelled.

        May be called from any thread. Operations begun later are not affected.
        """
        with self._lock:
            scopes = [operation.scope for operation in self._pending]
        self._in_trio(partial(_cancel_all, scopes))

    def begin(self, operation: _Operation) -> None:
        """Begin ``operation``; the ``*_async`` methods call this, in any thread.

        Raises:
          ConnectionClosedError: the adapter's block is being left by a cancellation or an
            exception, or was left.
          trio.RunFinishedError: the trio run is over.
        """
        try:
            with self._lock:
                if not self._accepting:
                    raise ConnectionClosedError("this callback adapter is closed")
                self._pending.add(operation)
            try:
                self._in_trio(partial(self._spawn, operation))
            except BaseException:
                with self._lock:
                    self._pending.discard(operation)
                raise
        except BaseException:
            if operation.release is not None:
                operation.release()
            raise

    def _in_trio(self, do: Callable[[], object]) -> None:
        if threading.get_ident() == self._thread:
            do()
        else:
            self._run.run_sync_soon(do)

    def _spawn(self, operation: _Operation) -> None:
        self._nursery.start_soon(self._perform, operation, name=operation.tag)

    @trio.lowlevel.enable_ki_protection
    async def _perform(self, operation: _Operation) -> None:
        try:
            value: Any = None
            error: Exception | None = OperationCancelled("cancel_pending() ended this operation")
            try:
                with operation.scope:
                    value = await operation.work()
                    error = None
            except Exception as exc:  # noqa: BLE001 - *_finish raises it
                error = exc
            except trio.Cancelled:
                # The adapter's block is being cancelled from outside. The callback is told,
                # so that it can clean up, and the cancellation goes on.
                error = OperationCancelled("the callback adapter was cancelled")
                _call_back(operation, AsyncResult(operation, None, error))
                raise
            _call_back(operation, AsyncResult(operation, value, error))
        finally:
            if operation.release is not None:
                operation.release()
            with self._lock:
                self._pending.discard(operation)
                if not self._pending and self._idle is not None:
                    self._idle.set()

    async def drain(self) -> None:
        """Wait until nothing is pending, then take no more."""
        while True:
            with self._lock:
                if not self._pending:
                    self._accepting = False
                    return
                self._idle = trio.Event()
            await self._idle.wait()

    def refuse(self) -> None:
        """Take no more operations."""
        with self._lock:
            self._accepting = False


def _cancel_all(scopes: list[trio.CancelScope]) -> None:
    for scope in scopes:
        scope.cancel()


@trio.lowlevel.disable_ki_protection
def _call_back(operation: _Operation, result: AsyncResult) -> None:
    if operation.callback is None:
        result.discard()
    else:
        operation.callback(operation.source, result, *operation.user_data)


@asynccontextmanager
async def open_callback_adapter() -> AsyncGenerator[CallbackAdapter, None]:
    """Open a nursery in which operations run that end in a callback.

    ``async with open_callback_adapter() as adapter`` waits at its end until nothing is
    pending, operations that callbacks have begun included. If the block is cancelled or
    raises, what is pending is cancelled, its callbacks are told, and no more is taken. An
    exception out of a callback cancels the rest and comes out of the block, in an
    ExceptionGroup, as from any nursery.
    """
    async with trio.open_nursery() as nursery:
        adapter = CallbackAdapter(nursery)
        try:
            yield adapter
            await adapter.drain()
        except BaseException:
            adapter.refuse()
            nursery.cancel_scope.cancel()
            # Operations begun in other threads may still be on their way to the nursery,
            # which must be there when they arrive.
            with trio.CancelScope(shield=True):
                await adapter.drain()
            raise


class CallbackConnection:
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

    def __init__(self, adapter: CallbackAdapter, connection: UnixConnection) -> None:
        self._adapter = adapter
        self.connection = connection

    async def send_fd(self, fd: FileDescriptor, cancellable: Cancellable | None = None) -> bool:
        """As :meth:`UnixConnection.send_fd`."""
        return await self.connection.send_fd(fd, cancellable)

    async def receive_fd(self, cancellable: Cancellable | None = None) -> int:
        """As :meth:`UnixConnection.receive_fd`."""
        return await self.connection.receive_fd(cancellable)

    async def send_credentials(self, cancellable: Cancellable | None = None) -> bool:
        """As :meth:`UnixConnection.send_credentials`."""
        return await self.connection.send_credentials(cancellable)

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
        duplicate = os.dup(_control.descriptor_number(fd))
        self._begin(
            "send_fd_async",
            partial(self.connection.send_fd, duplicate, cancellable),
            callback,
            user_data,
            release=partial(os.close, duplicate),
        )

    def send_fd_finish(self, result: AsyncResult) -> bool:
        """Return True, or raise what went wrong with :meth:`send_fd_async`."""
        return bool(self._finish(result, "send_fd_async"))

    def receive_fd_async(
        self,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *user_data: Any,
    ) -> None:
        """Begin :meth:`receive_fd`."""
        self._begin(
            "receive_fd_async",
            partial(self.connection.receive_fd, cancellable),
            callback,
            user_data,
            discard=os.close,
        )

    def receive_fd_finish(self, result: AsyncResult) -> int:
        """Return the descriptor, which is the caller's now, or raise what went wrong."""
        return int(self._finish(result, "receive_fd_async"))

    def send_credentials_async(
        self,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *user_data: Any,
    ) -> None:
        """Begin :meth:`send_credentials`."""
        work = partial(self.connection.send_credentials, cancellable)
        self._begin("send_credentials_async", work, callback, user_data)

    def send_credentials_finish(self, result: AsyncResult) -> bool:
        """Return True, or raise what went wrong with :meth:`send_credentials_async`."""
        return bool(self._finish(result, "send_credentials_async"))

    def receive_credentials_async(
        self,
        cancellable: Cancellable | None = None,
        callback: AsyncReadyCallback | None = None,
        *user_data: Any,
    ) -> None:
        """Begin :meth:`receive_credentials`."""
        work = partial(self.connection.receive_credentials, cancellable)
        self._begin("receive_credentials_async", work, callback, user_data)

    def receive_credentials_finish(self, result: AsyncResult) -> Credentials:
        """Return the credentials, or raise what went wrong."""
        credentials: Credentials = self._finish(result, "receive_credentials_async")
        return credentials

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
        self._begin("close_async", partial(self._close, cancellable), callback, user_data)

    def close_finish(self, result: AsyncResult) -> bool:
        """Return True, or raise OperationCancelled; the connection is closed either way."""
        return bool(self._finish(result, "close_async"))

    async def _close(self, cancellable: Cancellable | None) -> bool:
        await self.connection.aclose()
        if cancellable is not None:
            cancellable.raise_if_cancelled()
        return True

    def _begin(
        self,
        tag: str,
        work: Callable[[], Awaitable[Any]],
        callback: AsyncReadyCallback | None,
        user_data: tuple[Any, ...],
        *,
        discard: Callable[[Any], object] | None = None,
        release: Callable[[], object] | None = None,
    ) -> None:
        self._adapter.begin(
            _Operation(self, tag, work, callback, user_data, discard=discard, release=release)
        )

    def _finish(self, result: AsyncResult, tag: str) -> Any:
        if not isinstance(result, AsyncResult):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"an AsyncResult is due, not {type(result).__name__}")
        return result.finish(self, tag)
