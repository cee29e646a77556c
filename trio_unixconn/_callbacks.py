"""The callback form of connections, on top of a nursery.

Invariant: each operation that was begun ends in exactly one call of its callback, in the trio
thread. Operations start in the order in which they arrive in the trio thread.

``send_fd_async`` and ``receive_fd_async`` try their system call at once. If it succeeds, the
operation has ended, and only its callback is left for a task. All other operations, and those for
which the kernel says EAGAIN, need a task from the beginning.

Trio runs the tasks of one scheduling round in random order. So a task is not tied to one operation:
whichever runs first takes the oldest one from the queue. An operation claims its direction of the
connection, and tries its system call, before its first scheduling point. Therefore the order of the
``*_async`` calls decides which of two operations gets ConnectionBusyError, and what has been sent
when the connection is closed. For each operation in the queue, one task starts, or continues: a
task that has ended an operation waits for the next one, because a new task takes longer.

Source: https://docs.gtk.org/gio/iface.AsyncResult.html
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import trio
from trio.lowlevel import disable_ki_protection, enable_ki_protection

from ._callback_connection import CallbackConnection
from ._cancellable import is_current_run
from ._closing import close_fds, close_fds_batched
from ._connection import UnixConnection
from ._fds import check_open, duplicate
from ._owner import DescriptorOwner
from ._results import AsyncResult, Operation, discard_result
from ._trio_task import check_task
from .errors import ConnectionBusyError, ConnectionClosedError, OperationCancelled

_MAX_IDLE_TASKS: Final = 8
_IDLE: Final = "trio_unixconn callback adapter, waiting for an operation"


class CallbackAdapter(DescriptorOwner):
    """Runs operations in a nursery and calls back; made by :func:`open_callback_adapter`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._run = trio.lowlevel.current_trio_token()
        # Operations that have arrived in the trio thread, in this order: those that have not
        # started, and all.
        self._queue: deque[Operation] = deque()
        self._running: dict[Operation, None] = {}
        # How many in the queue have not started.
        self._not_started = 0
        # Tasks that wait for an operation.
        self._idle_tasks: list[trio.lowlevel.Task] = []
        # Guards the three below, because operations can be begun in any thread.
        self._lock = threading.Lock()
        self._pending: set[Operation] = set()
        self._accepting = True
        self._idle: trio.Event | None = None

    def wrap(self, connection: UnixConnection) -> CallbackConnection:
        """Return the callback form of ``connection``, which stays usable itself.

        Raises:
          TypeError: not a UnixConnection.
        """
        if not isinstance(connection, UnixConnection):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"connection must be a UnixConnection, got {type(connection).__name__}")
        return CallbackConnection(self._begin, connection)

    def __repr__(self) -> str:
        with self._lock:
            return f"<CallbackAdapter with {len(self._pending)} pending>"

    def cancel_pending(self) -> None:
        """Cancel all pending operations: the error of their results is OperationCancelled.

        May be called in any thread. Operations that are begun later are not affected.

        Raises:
          trio.RunFinishedError: the trio run has ended.
        """
        with self._lock:
            scopes = [operation.scope for operation in self._pending]
        self._call_in_run(partial(_cancel_all, scopes))

    def _begin(self, operation: Operation) -> None:
        """Begin an operation, in any thread.

        Raises:
          ConnectionClosedError: the adapter accepts no more operations.
          OSError: EBADF, EMFILE; of the duplicates that it needs.
          trio.RunFinishedError: the trio run has ended.
        """
        with self._lock:
            if not self._accepting:
                raise ConnectionClosedError("this callback adapter is closed")
            self._pending.add(operation)
        try:
            if is_current_run(self._run):
                # Not before another one that is still in the queue.
                if self._not_started or not operation.try_nowait():
                    _keep_descriptor(operation)
                self._start(operation)
            else:
                _keep_descriptor(operation)
                self._run.run_sync_soon(partial(self._start, operation))
        except BaseException:
            with self._lock:
                self._pending.discard(operation)
            if operation.sends is not None:
                close_fds(operation.fds)
            raise

    def _call_in_run(self, call: Callable[[], object]) -> None:
        if is_current_run(self._run):
            call()
        else:
            self._run.run_sync_soon(call)

    def _start(self, operation: Operation) -> None:
        if operation.closes:
            connection = operation.source.connection
            operation.earlier = [
                each for each in self._running if each.source.connection is connection
            ]
        if self._idle_tasks:
            trio.lowlevel.reschedule(self._idle_tasks.pop())
        else:
            self._nursery.start_soon(self._perform_all)
        self._queue.append(operation)
        self._not_started += operation.result is None
        self._running[operation] = None

    @enable_ki_protection
    async def _perform_all(self) -> None:
        """Perform one operation each time this is scheduled."""
        task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._idle_tasks.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        while self._queue:
            await self._perform_next(task)
            if len(self._idle_tasks) >= _MAX_IDLE_TASKS:
                return
            task.name = _IDLE
            self._idle_tasks.append(task)
            await trio.lowlevel.wait_task_rescheduled(abort)

    async def _perform_next(self, task: trio.lowlevel.Task) -> None:
        operation = self._queue.popleft()
        task.name = operation.tag
        result = operation.take_result()
        try:
            if result is None:
                self._not_started -= 1
                result = await _perform(operation)
            _call_back(operation, result)
        finally:
            del self._running[operation]
            with self._lock:
                self._pending.discard(operation)
                if not self._pending and self._idle is not None:
                    self._idle.set()
            # See _perform().
            del operation, result

    async def _drain(self) -> None:
        """Wait until nothing is pending, then accept no more operations."""
        while True:
            with self._lock:
                if not self._pending:
                    self._accepting = False
                    break
                self._idle = trio.Event()
            await self._idle.wait()
        # The queue is empty: they end.
        while self._idle_tasks:
            trio.lowlevel.reschedule(self._idle_tasks.pop())

    def _refuse(self) -> None:
        """Accept no more operations."""
        with self._lock:
            self._accepting = False


def _keep_descriptor(operation: Operation) -> None:
    """Give the operation a duplicate of the caller's file descriptor, if it sends one."""
    if operation.sends is not None:
        check_open([operation.sends])
        (number,), operation.fds = duplicate([operation.sends])
        operation.work = partial(operation.work, number)


def _cancel_all(scopes: list[trio.CancelScope]) -> None:
    for scope in scopes:
        scope.cancel()


async def _perform(operation: Operation) -> AsyncResult:
    """Run an operation to its end, and release what it used."""
    try:
        with operation.scope:
            closing = any(each.closes for each in operation.earlier)
            value = None if closing else await operation.work()
            for each in operation.earlier:
                await each.wait_ended()
            if closing:
                raise ConnectionBusyError("another close_async() of this connection is pending")
            return AsyncResult(operation, value, None)
        return AsyncResult(operation, None, OperationCancelled("cancelled by cancel_pending()"))
    except Exception as exc:  # *_finish raises it
        # Without this frame, which is of no interest.
        exc.__traceback__ = exc.__traceback__ and exc.__traceback__.tb_next
        return AsyncResult(operation, None, exc)
    except trio.Cancelled:
        # The adapter's block is cancelled. The callback runs, so that it can clean up, and the
        # cancellation continues.
        error = OperationCancelled("the callback adapter was cancelled")
        _call_back(operation, AsyncResult(operation, None, error))
        raise
    finally:
        operation.end()
        close_fds_batched(operation.fds)
        # The frames in the traceback of an error keep this frame alive (Python 3.13). The
        # operation references its callback, which can reference the result, and so the error.
        del operation


@disable_ki_protection
def _call_back(operation: Operation, result: AsyncResult) -> None:
    if operation.callback is None:
        discard_result(result)
    else:
        operation.context.run(operation.callback, operation.source, result, *operation.user_data)


@asynccontextmanager
async def open_callback_adapter() -> AsyncGenerator[CallbackAdapter, None]:
    """Open a nursery for operations that end in a callback.

    At its end, ``async with open_callback_adapter() as adapter`` waits until nothing is pending,
    operations that callbacks have begun included. If the block is cancelled or raises, pending
    operations are cancelled, their callbacks run, and no more operations are accepted. An
    exception in a callback cancels the rest and propagates in an ExceptionGroup, as from any
    nursery.
    """
    check_task()
    async with trio.open_nursery() as nursery:
        adapter = CallbackAdapter(nursery)
        try:
            yield adapter
            await adapter._drain()
        except BaseException:
            adapter._refuse()
            nursery.cancel_scope.cancel()
            # Operations begun in other threads may not have arrived yet, and need the nursery.
            with trio.CancelScope(shield=True):
                await adapter._drain()
            raise
