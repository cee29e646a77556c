"""Cancellable: one switch, thrown from any thread, that ends operations in trio.

The rule of this file: the flag is the truth and changes under the lock; scopes, descriptor
and callbacks follow it. A trio scope is only ever cancelled in its own trio thread.

Source: https://docs.gtk.org/gio/class.Cancellable.html
"""

from __future__ import annotations

import contextvars
import os
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs
import trio

from ._owner import DescriptorOwner
from .errors import NotSupportedError, OperationCancelled

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

if sys.version_info < (3, 11):
    # A dependency of trio's there.
    from exceptiongroup import ExceptionGroup

_current: Final = contextvars.ContextVar["tuple[Cancellable, ...]"](
    "trio_unixconn.Cancellable", default=()
)


FIRED: Final = "the Cancellable of this operation has fired"


def check_cancellable(value: Cancellable) -> None:
    """Raise unless ``value`` is a Cancellable.

    Raises:
      TypeError: it is not.
    """
    if not isinstance(value, Cancellable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"a Cancellable or None is due, not {type(value).__name__}")


async def checkpoint_cancellable(cancellable: Cancellable) -> None:
    """Begin an operation: raise, at a checkpoint, if its Cancellable has fired.

    What was fired is decided once: a reset during the checkpoint does not let it through.

    Raises:
      OperationCancelled: it has fired.
      TypeError: not a Cancellable.
    """
    check_cancellable(cancellable)
    if cancellable.is_cancelled():
        await trio.lowlevel.checkpoint()
        raise OperationCancelled(FIRED)


def _this_run() -> trio.lowlevel.TrioToken | None:
    try:
        return trio.lowlevel.current_trio_token()
    except RuntimeError:
        return None


def call_in_trio_thread(run: trio.lowlevel.TrioToken, call: Callable[[], object]) -> None:
    """Call ``call`` in a trio run: at once if that is this one, or soon, from other threads.

    If the run has ended meanwhile, there is nothing left to call it for.
    """
    if run is _this_run():
        call()
        return
    with suppress(trio.RunFinishedError):
        run.run_sync_soon(call)


class Fired(Protocol):
    """What a Cancellable fires: a scope, or the wait of one operation."""

    def fire(self) -> None:
        """End it; called in any thread."""
        ...


@attrs.frozen
class _Connected:
    callback: Callable[..., object]
    data: tuple[Any, ...]


def _call_all(cancellable: Cancellable, callbacks: list[_Connected]) -> None:
    errors: list[Exception] = []
    for connected in callbacks:
        try:
            connected.callback(cancellable, *connected.data)
        except Exception as exc:  # noqa: BLE001 - raised below
            errors.append(exc)
    if len(errors) > 1:
        raise ExceptionGroup("callbacks of a Cancellable failed", errors)
    if errors:
        raise errors[0]


class Cancellable(DescriptorOwner):
    """A switch that ends operations, as ``Gio.Cancellable``.

    Pass one to the operations that take a ``cancellable``, or run any trio code under
    :meth:`scope`. One Cancellable may serve many operations, tasks and trio runs at once.
    Every method may be called from any thread, except that scopes belong to trio tasks. A
    signal handler or a finalizer may interrupt trio itself, so there, as with all of trio, use
    ``token.run_sync_soon(cancellable.cancel)``.

    What the kernel has already done is not undone: an operation that has its result when the
    Cancellable fires returns that result.
    """

    # Before __init__, for a finalizer that runs when it has failed.
    _pipe: tuple[int, int] | None = None

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._cancelled = False
        self._scopes: set[Fired] = set()
        self._callbacks: dict[int, _Connected] = {}
        self._last_id = 0
        # Threads that run callbacks at this moment; disconnect() waits for the others.
        self._running: list[int] = []
        self._pipe_users = 0

    def cancel(self) -> None:
        """Fire: end every operation under this Cancellable. Firing twice changes nothing.

        Connected callbacks run in the calling thread before this returns. When some raise,
        the others still run; then the exception, or an ExceptionGroup of several, is raised.
        """
        with self._changed:
            if self._cancelled:
                return
            self._cancelled = True
            if self._pipe is not None:
                os.write(self._pipe[1], b"\0")
            scopes = list(self._scopes)
            callbacks = list(self._callbacks.values())
            self._running.append(threading.get_ident())
        try:
            for scope in scopes:
                scope.fire()
            _call_all(self, callbacks)
        finally:
            with self._changed:
                self._running.remove(threading.get_ident())
                self._changed.notify_all()

    def is_cancelled(self) -> bool:
        """Whether this has fired."""
        return self._cancelled

    def raise_if_cancelled(self) -> None:
        """Raise if this has fired (Gio: ``set_error_if_cancelled``).

        Raises:
          OperationCancelled: it has.
        """
        if self._cancelled:
            raise OperationCancelled(FIRED)

    def reset(self) -> None:
        """Make this usable again after it fired.

        Operations that it ended stay ended; one that is still unwinding raises
        OperationCancelled all the same.
        """
        with self._changed:
            if self._cancelled:
                self._cancelled = False
                if self._pipe is not None:
                    os.read(self._pipe[0], 1)

    def connect(self, callback: Callable[..., object], *data: Any) -> int:
        """Have ``callback(cancellable, *data)`` called each time this fires.

        It runs in the thread that calls :meth:`cancel`, and at once, in this thread, if this
        has fired already.

        Returns:
          An id for :meth:`disconnect`; 0 if the callback was run at once.

        Raises:
          TypeError: ``callback`` cannot be called.
        """
        if not callable(callback):
            raise TypeError(f"a callback is due, not {type(callback).__name__}")
        with self._changed:
            if not self._cancelled:
                self._last_id += 1
                self._callbacks[self._last_id] = _Connected(callback, data)
                return self._last_id
        callback(self, *data)
        return 0

    def disconnect(self, handler_id: int) -> None:
        """Undo :meth:`connect`; 0 is allowed and does nothing.

        If another thread is running callbacks at this moment, this blocks until they are
        done, so that after it the callback does not run any more. (From within a callback
        it does not block; Gio deadlocks there.)

        Raises:
          ValueError: no such id is connected.
        """
        if handler_id == 0:
            return
        with self._changed:
            if self._callbacks.pop(handler_id, None) is None:
                raise ValueError(f"no callback is connected to this Cancellable as {handler_id}")
            here = threading.get_ident()
            self._changed.wait_for(lambda: all(thread == here for thread in self._running))

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
            raise RuntimeError("pop_current() of a Cancellable that is not the current one")
        _current.set(stack[:-1])

    @staticmethod
    def get_current() -> Cancellable | None:
        """Return the Cancellable pushed last in this task, or None."""
        stack = _current.get()
        return stack[-1] if stack else None

    def get_fd(self) -> int:
        """Return a descriptor that polls readable while this is fired.

        It belongs to the Cancellable: do not read from it or close it, but call
        :meth:`release_fd` once for each call of this.

        Raises:
          NotSupportedError: on Windows, where a pipe cannot be polled.
          OSError: no descriptor is free.
        """
        if sys.platform == "win32":  # pragma: no cover
            raise NotSupportedError("pipes cannot be polled on Windows; use connect()")
        with self._changed:
            if self._pipe is None:
                self._pipe = os.pipe()
                if self._cancelled:
                    os.write(self._pipe[1], b"\0")
            self._pipe_users += 1
            return self._pipe[0]

    def release_fd(self) -> None:
        """Give back what :meth:`get_fd` returned; with the last one it is closed.

        Raises:
          RuntimeError: more releases than gets.
        """
        with self._changed:
            if self._pipe is None:
                raise RuntimeError("release_fd() without get_fd()")
            self._pipe_users -= 1
            if not self._pipe_users:
                self._close_pipe()

    def scope(self) -> CancellableScope:
        """Return a context manager that runs trio code under this Cancellable.

        ``with cancellable.scope() as scope`` gives a ``trio.CancelScope``. The block raises
        :class:`~trio_unixconn.errors.OperationCancelled` at its start if this has fired, and
        in place of the cancellation if it fires while the block runs. An outer cancellation
        of trio's stays what it is, and so does ``scope.cancel()``.
        """
        return CancellableScope(self)

    def attach(self, scope: Fired) -> None:
        """Have ``scope`` end when this fires; scopes call this as they are entered.

        Raises:
          OperationCancelled: this has fired already.
        """
        # No lock: cancel() sets the flag and then copies the set, this adds and then looks at
        # the flag, so that at least one of the two sees the other; both may.
        self._scopes.add(scope)
        if self._cancelled:
            self._scopes.discard(scope)
            raise OperationCancelled(FIRED)

    def detach(self, scope: Fired) -> None:
        """Undo :meth:`attach`."""
        self._scopes.discard(scope)

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            pipe, self._pipe = self._pipe, None
            os.close(pipe[0])
            os.close(pipe[1])

    def __del__(self) -> None:
        self._close_pipe()


class CancellableScope(DescriptorOwner):
    """What :meth:`Cancellable.scope` returns: a context manager, to be entered once."""

    __slots__ = ("_cancellable", "_fired", "_run", "_scope")

    def __init__(self, cancellable: Cancellable) -> None:
        self._cancellable = cancellable
        self._scope = trio.CancelScope()
        self._run = trio.lowlevel.current_trio_token()
        self._fired = False

    def __enter__(self) -> trio.CancelScope:
        scope = self._scope.__enter__()
        try:
            self._cancellable.attach(self)
        except BaseException:
            # Nothing has happened in it that it could have an opinion on.
            self._scope.__exit__(None, None, None)
            raise
        return scope

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        self._cancellable.detach(self)
        handled = self._scope.__exit__(exc_type, exc, traceback)
        if self._fired and self._scope.cancelled_caught:
            raise OperationCancelled("the Cancellable of this operation fired") from None
        return handled

    def fire(self) -> None:
        """Cancel the scope; :meth:`Cancellable.cancel` calls this, in any thread."""
        self._fired = True
        call_in_trio_thread(self._run, self._scope.cancel)
