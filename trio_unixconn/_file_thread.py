"""Calls that may wait for a file server, in threads that can be abandoned.

A peer can send a file of a FUSE file system whose server never answers. fstat(2), lseek(2),
ioctl(2) and flushing such a file wait for that server, and Python's ``open`` calls the first three
even for a file descriptor. So these calls are made in a thread, which a cancellation abandons.

Invariant: the result of a call that was abandoned is disposed of when, and if, it arrives.

A cancellation is held back for a moment. A local file is opened within it, so that a task that is
cancelled at that time gets its file, as after any other receive. Only a file server that is slow
makes a cancellation lose what was received.

The threads are trio's, but counted apart: calls that hang do not take the threads that
``trio.to_thread`` hands out. trio's own ``run_sync(abandon_on_cancel=True)`` drops the result of an
abandoned call, which here would be an open file.

Sources: fuse(4), https://trio.readthedocs.io/en/stable/reference-core.html (trio.CapacityLimiter)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import trio
from trio.lowlevel import enable_ki_protection, start_thread_soon

if TYPE_CHECKING:
    import outcome

    from ._cancellable import Cancellable

_T = TypeVar("_T")

# How long a cancellation is held back, in seconds.
CANCEL_GRACE: Final = 0.5
# How many calls may be under way in a trio run; more wait for their turn.
MAX_THREADS: Final = 64

_limiter: Final = trio.lowlevel.RunVar[trio.CapacityLimiter]("trio_unixconn file threads")


def thread_limiter() -> trio.CapacityLimiter:
    """Return what counts the threads of this trio run."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(MAX_THREADS)
        _limiter.set(limiter)
        return limiter


class _Call(Generic[_T]):
    """One call in a thread, from the wait for its turn to its result."""

    def __init__(self, call: Callable[[], _T], discard: Callable[[_T], object]) -> None:
        self._call = call
        self._discard = discard
        self._limiter = thread_limiter()
        self._token = trio.lowlevel.current_trio_token()
        self._done = trio.Event()
        # Guards the two below, which both threads look at.
        self._lock = threading.Lock()
        self._outcome: outcome.Outcome[_T] | None = None
        self._abandoned = False
        self.started = False

    async def wait(self) -> None:
        """Wait for a turn and then for the result; may be called again after a cancellation."""
        if not self.started:
            await self._limiter.acquire_on_behalf_of(self)
            try:
                start_thread_soon(self._call, self._deliver, "trio_unixconn file")
            except BaseException:
                # The system has no more threads.
                self._limiter.release_on_behalf_of(self)
                raise
            self.started = True
        await self._done.wait()

    def _deliver(self, result: outcome.Outcome[_T]) -> None:
        """Hand over the result, or dispose of it; called in the thread."""
        with self._lock:
            self._outcome = result
            abandoned = self._abandoned
        if abandoned:
            with suppress(Exception):
                self._discard(result.unwrap())
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._finish)

    def _finish(self) -> None:
        self._limiter.release_on_behalf_of(self)
        self._done.set()

    def abandon(self) -> bool:
        """Leave the call alone; return False if its result is there already."""
        with self._lock:
            self._abandoned = self._outcome is None
            return self._abandoned

    def result(self) -> _T:
        """Return what the call returned, or raise what it raised."""
        assert self._outcome is not None  # the callers have waited
        return self._outcome.unwrap()


@enable_ki_protection
async def call_in_file_thread(
    call: Callable[[], _T],
    *,
    discard: Callable[[_T], object],
    not_started: Callable[[], object] | None = None,
    cancellable: Cancellable | None = None,
) -> _T:
    """Return what ``call()`` returns in a thread, unless this is cancelled first.

    Args:
      discard: called in that thread with the result of a call that was abandoned.
      not_started: called if this raises without ``call`` having been, or going to be, called.

    Raises:
      OperationCancelled: the Cancellable was cancelled.
      RuntimeError: no thread can be started.
      All that ``call`` raises.
    """
    running = _Call(call, discard)
    try:
        with trio.move_on_after(CANCEL_GRACE, shield=True) as grace:
            await running.wait()
        if grace.cancelled_caught:
            if cancellable is None:
                await running.wait()
            else:
                with cancellable.scope():
                    await running.wait()
    except BaseException:
        if not running.started:
            if not_started is not None:
                not_started()
            raise
        if running.abandon():
            raise
        # The result is there. trio raises the cancellation again at the next checkpoint.
    return running.result()


def ignore(_: Any) -> None:
    """Discard a result that owns nothing."""
