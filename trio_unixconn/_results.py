"""AsyncResult: what an operation in callback form came to, and who owns it.

The rule of this file: what a result holds has an owner until it is finished or closed.

Source: https://docs.gtk.org/gio/iface.AsyncResult.html
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import trio

from ._owner import DescriptorOwner

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

AsyncReadyCallback: TypeAlias = "Callable[..., object]"


class AsyncResult(DescriptorOwner):
    """What an operation came to, as ``Gio.AsyncResult``; hand it to the matching ``*_finish``.

    A result that holds descriptors closes them, with a ResourceWarning, when it is collected
    without having been finished.
    """

    __slots__ = ("_discard", "_error", "_finished", "_source", "_tag", "_user_data", "_value")

    def __init__(self, operation: Operation, value: Any, error: Exception | None) -> None:
        self._source = operation.source
        self._tag = operation.tag
        self._user_data = operation.user_data
        self._discard = operation.discard if error is None else None
        self._value = value
        self._error = error
        self._finished = False

    def get_source_object(self) -> Any:
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

    def finish(self, source: object, tag: str) -> Any:
        """Hand over the value or raise the error, once; called by the ``*_finish`` methods.

        Raises:
          ValueError: a result of another connection or method, or finished before.
        """
        if getattr(self._source, "connection", None) is not getattr(source, "connection", self):
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
                f"nobody finished a result of {self._tag}(), so what it held was closed",
                ResourceWarning,
                stacklevel=2,
            )


@attrs.define(eq=False)
class Operation(DescriptorOwner):
    """An operation to be run: what to call, whom to tell, what to clean up.

    Attributes:
      source, tag, user_data: what its result says of itself.
      work: the operation.
      callback: called with source, result and user data; None drops the result.
      discard: closes a value that nobody finished.
      release: called at the end, however it came.
      scope: cancelling this ends it.
    """

    source: object
    tag: str
    work: Callable[[], Awaitable[Any]]
    callback: AsyncReadyCallback | None
    user_data: tuple[Any, ...]
    discard: Callable[[Any], object] | None = None
    release: Callable[[], object] | None = None
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
