"""The operations of the callback form, and their results.

Invariant: the file descriptors in a result have an owner: the result, until it is finished or
discarded.

Source: https://docs.gtk.org/gio/iface.AsyncResult.html
"""

from __future__ import annotations

import contextvars
import warnings
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeAlias

import attrs
import trio

from ._owner import DescriptorOwner

AsyncReadyCallback: TypeAlias = Callable[..., object]


class Source(Protocol):
    """The object whose method began an operation: a CallbackConnection."""

    connection: Any


class Direction(Protocol):
    """One direction of a connection: its Sender, or its Receiver.

    Attributes:
      busy: whether an operation uses it.
    """

    busy: bool

    def busy_error(self) -> Exception:
        """Return the error of a second operation."""
        ...


class AsyncResult(DescriptorOwner):
    """The result of an operation, as ``Gio.AsyncResult``; pass it to the matching ``*_finish``.

    If a result is garbage collected before it is finished, its file descriptors are closed, with
    a ResourceWarning.
    """

    __slots__ = (
        "_discard",
        "_error",
        "_finished",
        "_had_error",
        "_source",
        "_tag",
        "_user_data",
        "_value",
    )

    def __init__(self, operation: Operation, value: Any, error: Exception | None) -> None:
        self._source = operation.source
        self._tag = operation.tag
        self._user_data = operation.user_data
        self._discard = operation.discard if error is None else None
        self._value = value
        self._error = error
        self._had_error = error is not None
        self._finished = False

    def get_source_object(self) -> Any:
        """Return the connection whose ``*_async`` method was called."""
        return self._source

    def get_user_data(self) -> tuple[Any, ...]:
        """Return what was passed to ``*_async`` after the callback."""
        return self._user_data

    def is_tagged(self, source_tag: object) -> bool:
        """Whether this is a result of ``source_tag``: an ``*_async`` method, or its name."""
        return getattr(source_tag, "__name__", source_tag) == self._tag

    def had_error(self) -> bool:
        """Whether the operation failed: ``*_finish`` raises the error."""
        return self._had_error

    def __repr__(self) -> str:
        state = "finished" if self._finished else "failed" if self._had_error else "not finished"
        return f"<AsyncResult of {self._tag}, {state}>"

    def _finish(self, source: Source, tag: str) -> Any:
        if self._source.connection is not source.connection:
            raise ValueError("this result belongs to another connection; finish it there")
        if self._tag != tag:
            raise ValueError(f"expected a result of {tag}(), got one of {self._tag}()")
        if self._finished:
            raise ValueError("this result is already finished")
        self._finished = True
        value, error = self._value, self._error
        self._value = self._error = None
        if error is None:
            return value
        try:
            raise error
        finally:
            # The traceback has this frame, and self: without this line, and with the error still
            # in self, that would be a reference cycle.
            del error

    def _discard_value(self) -> None:
        if not self._finished and self._discard is not None:
            self._finished = True
            value, self._value = self._value, None
            self._discard(value)

    def __del__(self) -> None:
        if not self._finished and self._discard is not None:
            # Closed first, because a warning can be an exception.
            self._discard_value()
            warnings.warn(
                f"unfinished result of {self._tag}(): its file descriptors were closed",
                ResourceWarning,
                stacklevel=2,
            )


def finish_result(result: AsyncResult, source: Source, tag: str) -> Any:
    """Return the value of a result, or raise its error; once.

    Raises:
      TypeError: not a result.
      ValueError: a result of another connection or method, or finished already.
    """
    if not isinstance(result, AsyncResult):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"expected an AsyncResult, got {type(result).__name__}")
    return result._finish(source, tag)


def discard_result(result: AsyncResult) -> None:
    """Close the file descriptors of a result that is not finished; never blocks."""
    result._discard_value()


@attrs.define(eq=False)
class Operation(DescriptorOwner):
    """An operation of the callback form.

    Attributes:
      source, tag, user_data: as its result returns them.
      work: runs the operation, with ``fds`` if ``sends`` is true.
      callback: called with source, result and user data; if None, the result is discarded.
      discard: closes a value that is not finished; must not raise or block.
      fds: file descriptors that the operation owns, until it has ended.
      closes: whether it closes the connection.
      nowait: runs the operation at once, or raises ``trio.WouldBlock`` and has no effect; None if
        the operation has no such form.
      direction: what ``nowait`` uses. It stays busy until the callback, as it does for a task.
      sends: the number of a file descriptor of the caller; ``work`` gets a duplicate of it.
      earlier: for one that closes, the operations on the connection that arrived before it.
      scope: cancelling it cancels the operation.
      result: of an operation that has ended before a task was needed.
      context: the context of the code that began the operation, for the callback.
    """

    source: Source
    tag: str
    work: Callable[..., Awaitable[Any]]
    callback: AsyncReadyCallback | None
    user_data: tuple[Any, ...]
    discard: Callable[[Any], object] | None
    fds: list[int]
    closes: bool
    nowait: Callable[[], Any] | None
    direction: Direction | None
    sends: int | None
    earlier: Sequence[Operation] = ()
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    result: AsyncResult | None = None
    context: contextvars.Context = attrs.field(factory=contextvars.copy_context)
    _is_ended: bool = False
    _ended: trio.Event | None = None

    def try_nowait(self) -> bool:
        """Run the operation without waiting, if that is possible; whether it has ended."""
        direction = self.direction
        if self.nowait is None or direction is None:
            return False
        if direction.busy:
            # Of an operation that has ended, whose callback has not run, or of a task.
            self.direction = None
            self.result = AsyncResult(self, None, direction.busy_error())
            return True
        direction.busy = True
        try:
            self.result = AsyncResult(self, self.nowait(), None)
        except trio.WouldBlock:
            direction.busy = False
            return False
        except Exception as exc:  # *_finish raises it
            # Without this frame, which is of no interest.
            exc.__traceback__ = exc.__traceback__ and exc.__traceback__.tb_next
            self.result = AsyncResult(self, None, exc)
        return True

    def take_result(self) -> AsyncResult | None:
        """Return the result of :meth:`try_nowait`, and let the next operation begin."""
        result, self.result = self.result, None
        if result is not None:
            if self.direction is not None:
                self.direction.busy = False
            self.end()
        return result

    def end(self) -> None:
        """Note that the operation has ended."""
        self._is_ended = True
        if self._ended is not None:
            self._ended.set()

    async def wait_ended(self) -> None:
        """Wait until the operation has ended."""
        if not self._is_ended:
            if self._ended is None:
                self._ended = trio.Event()
            await self._ended.wait()
