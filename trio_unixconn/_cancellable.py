"""A thread-safe cancellation token, modelled on Gio.Cancellable.

Invariant: the flag decides, and changes under the lock; targets, file descriptor and callbacks
follow it. A trio task is only ever woken in its own trio thread.

Source: https://docs.gtk.org/gio/class.Cancellable.html
"""

from __future__ import annotations

import contextvars
import os
import socket as stdlib_socket
import sys
import threading
import types
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Protocol, TypeAlias

import attrs
import trio
from trio.lowlevel import Abort, current_task, current_trio_token, enable_ki_protection, reschedule

from ._owner import DescriptorOwner
from ._trio_task import checkpoint_in_task, explain
from .errors import ConnectionClosedError, NotSupportedError, OperationCancelled

if sys.version_info < (3, 11):
    # A dependency of trio's there.
    from exceptiongroup import ExceptionGroup

_current: Final = contextvars.ContextVar["tuple[Cancellable, ...]"](
    "trio_unixconn.Cancellable", default=()
)

_CANCELLED: Final = "operation was cancelled by its Cancellable"


def check_cancellable(value: Cancellable) -> None:
    """Raise unless ``value`` is a Cancellable.

    Raises:
      TypeError: it is not.
    """
    if not isinstance(value, Cancellable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"cancellable must be a Cancellable or None, got {type(value).__name__} "
            "(for a timeout, use trio.fail_after)"
        )


async def checkpoint_cancellable(cancellable: Cancellable) -> None:
    """Begin an operation: if its Cancellable is cancelled, raise at a checkpoint.

    The flag is read once: a reset during the checkpoint does not let the operation through.

    Raises:
      OperationCancelled: it is cancelled.
      TypeError: not a Cancellable.
    """
    check_cancellable(cancellable)
    if cancellable.is_cancelled():
        await checkpoint_in_task()
        raise OperationCancelled(_CANCELLED)


def is_current_run(run: trio.lowlevel.TrioToken) -> bool:
    """Whether the calling code is inside of a trio run, and it is this one."""
    try:
        return run is current_trio_token()
    except RuntimeError:
        return False


def call_in_trio_thread(run: trio.lowlevel.TrioToken, call: Callable[[], object]) -> None:
    """Call ``call`` in a trio run: immediately inside of it, or soon, from other threads.

    If the run has ended, the call is dropped.
    """
    if is_current_run(run):
        call()
        return
    with suppress(trio.RunFinishedError):
        run.run_sync_soon(call)


class CancelTarget(Protocol):
    """What a Cancellable cancels: a scope, or the wait of one operation."""

    def cancel(self) -> None:
        """Cancel it; called in any thread."""
        ...


@attrs.frozen
class _Callback:
    function: Callable[..., object]
    data: tuple[Any, ...]


@attrs.frozen(eq=False)
class _Emission:
    """Callbacks of a Cancellable that are running in a thread."""

    cancellable: Cancellable
    thread: int


# One lock for all: it is held for moments only, costs nothing per Cancellable, and can be made
# anew in a child process, where the thread that held it does not exist.
_changed = threading.Condition()
_emissions: list[_Emission] = []


def _after_fork() -> None:
    global _changed  # noqa: PLW0603 - a lock that no thread of this process holds
    _changed = threading.Condition()
    here = threading.get_ident()
    _emissions[:] = [each for each in _emissions if each.thread == here]


if hasattr(os, "register_at_fork"):  # pragma: no branch - not on Windows
    os.register_at_fork(after_in_child=_after_fork)


class Cancellable(DescriptorOwner):
    """A thread-safe cancellation token, as ``Gio.Cancellable``.

    Pass it to the operations that take a ``cancellable``, or run any trio code under
    :meth:`scope`. One Cancellable may serve many operations, tasks and trio runs at the same time.
    Every method may be called in any thread, except that scopes belong to trio tasks. A
    signal handler or a finalizer may interrupt trio itself, so there, as with all of trio, use
    ``token.run_sync_soon(cancellable.cancel)``.

    A finished system call is not undone: an operation that has its result when the
    Cancellable is cancelled returns that result.
    """

    # Before __init__, for a finalizer that runs after it has failed.
    _pipe: tuple[int, int] | None = None

    def __init__(self) -> None:
        self._cancelled = False
        self._targets: set[CancelTarget] = set()
        self._callbacks: dict[int, _Callback] = {}
        self._last_id = 0
        self._pipe_users = 0

    @enable_ki_protection
    def cancel(self) -> None:
        """Cancel every operation under this Cancellable. Cancelling twice changes nothing.

        Connected callbacks run in the calling thread before this returns, in the order in
        which they were connected. If some raise, the others still run; then the exception, or
        an ExceptionGroup of several, is raised.
        """
        with _changed:
            if self._cancelled:
                return
            self._cancelled = True
            if self._pipe is not None:
                _set_readable(self._pipe[1])
            targets = list(self._targets)
            callbacks = list(self._callbacks)
            emission = self._begin_emission()
        try:
            for target in targets:
                target.cancel()
            self._call_all(callbacks)
        finally:
            _end_emission(emission)

    @trio.lowlevel.disable_ki_protection
    def _call_all(self, handler_ids: list[int]) -> None:
        errors: list[Exception] = []
        for handler_id in handler_ids:
            # An earlier callback may have disconnected it.
            callback = self._callbacks.get(handler_id)
            if callback is not None:
                try:
                    callback.function(self, *callback.data)
                except Exception as exc:  # raised below
                    errors.append(exc)
        if not errors:
            return
        try:
            if len(errors) > 1:
                raise ExceptionGroup("callbacks of a Cancellable failed", errors)
            raise errors[0]
        finally:
            # No reference cycle through the traceback.
            del errors

    def _begin_emission(self) -> _Emission:
        emission = _Emission(self, threading.get_ident())
        _emissions.append(emission)
        return emission

    def _wait_for_callbacks(self) -> None:
        """Block until no other thread runs callbacks; from within a callback, do not block.

        Called with the lock held.
        """
        here = threading.get_ident()
        while True:
            threads = [each.thread for each in _emissions if each.cancellable is self]
            if not threads or here in threads:
                return
            _changed.wait()

    def is_cancelled(self) -> bool:
        """Whether this is cancelled."""
        return self._cancelled

    def raise_if_cancelled(self) -> None:
        """Raise if this is cancelled (Gio: ``set_error_if_cancelled``).

        Raises:
          OperationCancelled: it is.
        """
        if self._cancelled:
            raise OperationCancelled(_CANCELLED)

    def reset(self) -> None:
        """Make a cancelled Cancellable usable again.

        Operations that it has cancelled stay cancelled, even those that are still unwinding.

        If another thread is running callbacks, this blocks until they have returned. From
        within a callback it does not block. (Gio deadlocks there.)
        """
        with _changed:
            self._wait_for_callbacks()
            if self._cancelled:
                self._cancelled = False
                if self._pipe is not None:
                    _set_unreadable(self._pipe[0])

    def connect(self, callback: Callable[..., object], *data: Any) -> int:
        """Call ``callback(cancellable, *data)`` each time this is cancelled.

        The callback runs in the thread that calls :meth:`cancel`. If this is cancelled
        already, it runs immediately, in the calling thread.

        Returns:
          An id for :meth:`disconnect`; 0 if the callback was run immediately.

        Raises:
          TypeError: ``callback`` is not callable.
        """
        if not callable(callback):
            raise TypeError(f"callback must be callable, got {type(callback).__name__}")
        with _changed:
            if not self._cancelled:
                self._last_id += 1
                self._callbacks[self._last_id] = _Callback(callback, data)
                return self._last_id
            emission = self._begin_emission()
        try:
            callback(self, *data)
        finally:
            _end_emission(emission)
        return 0

    def disconnect(self, handler_id: int) -> None:
        """Undo :meth:`connect`; an id of 0 is ignored.

        If another thread is running callbacks, this blocks until they have returned, so that
        the callback does not run after this. From within a callback it does not block. (Gio
        deadlocks there.)

        Raises:
          ValueError: no such id is connected.
        """
        if handler_id == 0:
            return
        with _changed:
            if self._callbacks.pop(handler_id, None) is None:
                raise ValueError(f"no callback with id {handler_id} is connected")
            self._wait_for_callbacks()

    def push_current(self) -> None:
        """Make this the current Cancellable of the running task (a context variable)."""
        _current.set((*_current.get(), self))

    def pop_current(self) -> None:
        """Undo :meth:`push_current`.

        Raises:
          RuntimeError: this is not the current Cancellable.
        """
        stack = _current.get()
        if not stack or stack[-1] is not self:
            raise RuntimeError("pop_current(): this is not the current Cancellable")
        _current.set(stack[:-1])

    @staticmethod
    def get_current() -> Cancellable | None:
        """Return the Cancellable pushed last in this task, or None."""
        stack = _current.get()
        return stack[-1] if stack else None

    def get_fd(self) -> int:
        """Return a file descriptor that polls readable while this is cancelled.

        It belongs to the Cancellable: do not read from it or close it, but call
        :meth:`release_fd` once for each call of this. A child process shares it after a fork:
        cancelling or resetting in one process then shows in the other's.

        Raises:
          NotSupportedError: on Windows, where a pipe cannot be polled.
          OSError: EMFILE.
        """
        if sys.platform == "win32":  # pragma: no cover
            raise NotSupportedError("pipes cannot be polled on Windows; use connect()")
        with _changed:
            if self._pipe is None:
                self._pipe = os.pipe()
                # A child process may have drained or filled it.
                for end in self._pipe:
                    os.set_blocking(end, False)
                if self._cancelled:
                    _set_readable(self._pipe[1])
            self._pipe_users += 1
            return self._pipe[0]

    def release_fd(self) -> None:
        """Give back what :meth:`get_fd` returned; the last release closes it.

        Raises:
          RuntimeError: more releases than gets.
        """
        with _changed:
            if self._pipe is None:
                raise RuntimeError("release_fd() without get_fd()")
            self._pipe_users -= 1
            if not self._pipe_users:
                self._close_pipe()

    def scope(self) -> CancellableScope:
        """Return a context manager that runs trio code under this Cancellable.

        ``with cancellable.scope() as scope`` gives a ``trio.CancelScope``. If this is cancelled
        already, the block does not start; if it is cancelled while the block runs, the block is
        cancelled. Either way :class:`OperationCancelled` is raised. An
        outer cancellation of trio's stays a cancellation, and so does ``scope.cancel()``.
        """
        return CancellableScope(self)

    def _attach(self, target: CancelTarget) -> bool:
        """Have ``target`` cancelled with this; return False if this is cancelled already."""
        # No lock: cancel() sets the flag and then copies the set, this adds and then checks
        # the flag, so that at least one of the two sees the other; both may.
        self._targets.add(target)
        if self._cancelled:
            self._targets.discard(target)
            return False
        return True

    def _detach(self, target: CancelTarget) -> None:
        """Undo :meth:`_attach`."""
        self._targets.discard(target)

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            pipe, self._pipe = self._pipe, None
            os.close(pipe[0])
            os.close(pipe[1])

    def __repr__(self) -> str:
        return f"<Cancellable {'cancelled' if self._cancelled else 'not cancelled'}>"

    def __del__(self) -> None:
        self._close_pipe()


def _end_emission(emission: _Emission) -> None:
    with _changed:
        _emissions.remove(emission)
        _changed.notify_all()


def _set_readable(fd: int) -> None:
    # After a fork the other process may have filled the pipe.
    with suppress(BlockingIOError):
        os.write(fd, b"\0")


def _set_unreadable(fd: int) -> None:
    # After a fork the other process may have drained the pipe, or written to it too.
    with suppress(BlockingIOError):
        while os.read(fd, 4096):
            pass


class _ScopeTarget:
    """Cancels a scope when a Cancellable is cancelled."""

    __slots__ = ("_run", "_scope", "triggered")

    def __init__(self, scope: trio.CancelScope) -> None:
        self._scope = scope
        try:
            self._run = current_trio_token()
        except RuntimeError as exc:
            raise explain(exc) from None
        self.triggered = False

    def cancel(self) -> None:
        self.triggered = True
        call_in_trio_thread(self._run, self._scope.cancel)


class CancellableScope(DescriptorOwner):
    """What :meth:`Cancellable.scope` returns: a context manager, to be entered once."""

    __slots__ = ("_cancellable", "_scope", "_target")

    def __init__(self, cancellable: Cancellable) -> None:
        self._cancellable = cancellable
        self._scope = trio.CancelScope()
        self._target = _ScopeTarget(self._scope)

    def __repr__(self) -> str:
        return f"<CancellableScope of {self._cancellable!r}>"

    def __enter__(self) -> trio.CancelScope:
        scope = self._scope.__enter__()
        if not self._cancellable._attach(self._target):
            self._scope.__exit__(None, None, None)
            raise OperationCancelled(_CANCELLED)
        return scope

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        self._cancellable._detach(self._target)
        handled = self._scope.__exit__(exc_type, exc, traceback)
        if self._target.triggered and self._scope.cancelled_caught:
            raise OperationCancelled(_CANCELLED) from None
        return handled


# How a Cancellable ends a wait for a socket
# ------------------------------------------
#
# What we want: when the Cancellable is cancelled, in any thread, exactly one task wakes: the one
# whose operation it was given to. Trio's registration of the socket must be right afterwards,
# and tasks that wait for the other direction, with whatever functions, must notice nothing. And
# a Cancellable that is not cancelled should cost next to nothing, because that is every
# operation but the last.
#
# What was considered:
#
# - A trio.CancelScope for each wait does all of it, but costs 3.6 us for each wait.
# - trio.lowlevel.notify_closing() is cheap, but wakes all tasks that wait for the socket, with
#   ClosedResourceError. We can retry in our own waits; a task that waits for conn.socket
#   with trio's functions cannot know that nothing was closed.
# - trio.lowlevel.reschedule() alone leaves the socket registered for a task that no longer waits.
#
# What was chosen: to sleep, a coroutine of trio yields a message that contains an abort function,
# which undoes the registration. Trio calls it for a cancellation. We resume the coroutine of
# wait_readable() or wait_writable() ourselves, so that we see the message; we keep the abort
# function and pass the message on. _CancelWaker does what trio does for a cancellation: it calls
# the abort function and reschedules the task. Then the coroutine is closed instead of resumed.
#
# When does a task still sleep in this wait? Trio sets task.custom_sleep_data to None whenever
# a task is rescheduled, by an event of the socket or by a cancellation. So as long as our waker
# is there, the task has not been woken, and trio has not called the abort function. If there are
# several reasons in one scheduling round, the first one wakes the task. If that is the socket,
# the operation is tried, and its result returned.
#
# The attribute abort_func of the message is not documented, although the contract of the function
# is (wait_task_rescheduled). If a version of trio has no such attribute, the scope is used.


class _CancelWaker:
    """Ends one wait of one task when a Cancellable is cancelled."""

    __slots__ = ("_run", "_task", "abort", "triggered")

    abort: Callable[[Any], Abort]

    def __init__(self, task: trio.lowlevel.Task) -> None:
        self._task = task
        self._run = current_trio_token()
        # Whether this has woken the task.
        self.triggered = False

    def cancel(self) -> None:
        call_in_trio_thread(self._run, self._wake)

    @enable_ki_protection
    def _wake(self) -> None:
        # Abort.FAILED is for kernels that report later that the wait has ended.
        if self._task.custom_sleep_data is self and self.abort(_raise_cancel) is Abort.SUCCEEDED:
            self.triggered = True
            reschedule(self._task)


def _raise_cancel() -> None:
    raise OperationCancelled(_CANCELLED)


@types.coroutine
def _sleep(
    coro: Coroutine[Any, Any, None], task: trio.lowlevel.Task, waker: _CancelWaker
) -> Generator[Any, Any, None]:
    """Resume ``coro`` until it is done, or until ``waker`` ends its sleep."""
    try:
        message = coro.send(None)
        while True:
            waker.abort = message.abort_func
            task.custom_sleep_data = waker
            outcome = yield message
            if waker.triggered:
                coro.close()
                return
            message = coro.send(outcome)
    except StopIteration:
        return


def _has_abort_func() -> bool:
    coro = trio.lowlevel.wait_task_rescheduled(lambda _: Abort.SUCCEEDED)  # noqa: ASYNC105
    try:
        return hasattr(coro.send(None), "abort_func")
    finally:
        coro.close()


_HAS_ABORT_FUNC: Final = _has_abort_func()

Wait: TypeAlias = Callable[[stdlib_socket.socket], Coroutine[Any, Any, None]]


@enable_ki_protection
async def wait_cancellable(
    wait: Wait, raw: stdlib_socket.socket, cancellable: Cancellable | None
) -> None:
    """Await ``wait(raw)``, trio's wait_readable or wait_writable, until cancelled.

    Raises:
      OperationCancelled: the Cancellable is cancelled.
      ConnectionClosedError: the socket is closed already. (To wait for the descriptor -1 is a
        ValueError of trio's, after which the descriptor stays registered.)
      trio.ClosedResourceError: this side has closed the socket while this waited.
      trio.BusyResourceError: another task waits for the same direction.
    """
    if raw.fileno() == -1:
        raise ConnectionClosedError("this connection is closed")
    if cancellable is None:
        await wait(raw)
        return
    if not _HAS_ABORT_FUNC:
        await checkpoint_cancellable(cancellable)
        with cancellable.scope():
            await wait(raw)
        return
    task = current_task()
    waker = _CancelWaker(task)
    if not cancellable._attach(waker):
        await trio.lowlevel.checkpoint()
        raise OperationCancelled(_CANCELLED)
    try:
        await _sleep(wait(raw), task, waker)
    finally:
        cancellable._detach(waker)
    if waker.triggered:
        # An outer cancellation of trio's comes first.
        await trio.lowlevel.checkpoint_if_cancelled()
        raise OperationCancelled(_CANCELLED)


async def sleep_cancellable(seconds: float, cancellable: Cancellable | None) -> None:
    """Sleep; if there is a Cancellable, until it is cancelled.

    Raises:
      OperationCancelled: it is cancelled.
    """
    if cancellable is None:
        await trio.sleep(seconds)
    else:
        with cancellable.scope():
            await trio.sleep(seconds)
