"""The callback form of connections, on top of a nursery.

The rule of this file: an operation that was begun ends in exactly one call of its callback, in
the trio thread.

Source: https://docs.gtk.org/gio/iface.AsyncResult.html
"""

from __future__ import annotations

import threading
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from ._callback_connection import CallbackConnection
from ._connection import UnixConnection
from ._owner import DescriptorOwner
from ._results import AsyncResult, Operation
from .errors import ConnectionClosedError, OperationCancelled

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable


class CallbackAdapter(DescriptorOwner):
    """Runs operations in a nursery and calls back; made by :func:`open_callback_adapter`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._run = trio.lowlevel.current_trio_token()
        self._thread = threading.get_ident()
        # Guards the three below, because operations may be begun in any thread.
        self._lock = threading.Lock()
        self._pending: set[Operation] = set()
        self._accepting = True
        self._idle: trio.Event | None = None

    def wrap(self, connection: UnixConnection) -> CallbackConnection:
        """Return the callback form of ``connection``, which stays usable as it is.

        Raises:
          TypeError: not a UnixConnection.
        """
        if not isinstance(connection, UnixConnection):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a UnixConnection is due, not {type(connection).__name__}")
        return CallbackConnection(self.begin, connection)

    def cancel_pending(self) -> None:
        """End what is pending: each callback gets a result that raises OperationCancelled.

        May be called from any thread. Operations begun later are not affected.

        Raises:
          trio.RunFinishedError: in another thread, when the trio run is over.
        """
        with self._lock:
            scopes = [operation.scope for operation in self._pending]
        self._in_trio(partial(_cancel_all, scopes))

    def begin(self, operation: Operation) -> None:
        """Begin ``operation``; the ``*_async`` methods call this, in any thread.

        Raises:
          ConnectionClosedError: the adapter's block is being left by a cancellation or an
            exception, or was left.
          trio.RunFinishedError: the trio run is over.
        """
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

    def _in_trio(self, do: Callable[[], object]) -> None:
        if threading.get_ident() == self._thread:
            do()
        else:
            self._run.run_sync_soon(do)

    def _spawn(self, operation: Operation) -> None:
        self._nursery.start_soon(self._perform, operation, name=operation.tag)

    @trio.lowlevel.enable_ki_protection
    async def _perform(self, operation: Operation) -> None:
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
def _call_back(operation: Operation, result: AsyncResult) -> None:
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
