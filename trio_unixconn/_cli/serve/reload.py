"""``--reload``: watching the files of a handler, to import it again when they change.

Invariant: a change after :func:`watch` has said that it watches is never missed. The watcher's
thread ends when the waiting task is cancelled.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import Final

import trio
from watchfiles import Change, DefaultFilter, awatch

# The time in milliseconds after which a watcher without a change says that it watches.
_FIRST_REPORT: Final = 200


class ReloadFilter(DefaultFilter):
    """Which files matter: patterns of fnmatch(3), for the name or for the whole path.

    Args:
      directories: those that are watched; the directories above them are not excluded.
      include: in addition to ``*.py``.
      exclude: files that do not matter, or directories with everything below them.
    """

    def __init__(
        self, directories: Sequence[str], include: Sequence[str], exclude: Sequence[str]
    ) -> None:
        super().__init__()
        self._directories = directories
        self._include = ("*.py", *include)
        self._exclude = exclude

    def __call__(self, change: Change, path: str) -> bool:
        """Return whether a change of this file matters."""
        if not super().__call__(change, path):
            return False
        if not any(_matches(path, pattern) for pattern in self._include):
            return False
        above = path
        while above not in self._directories and above != os.path.dirname(above):
            if any(_matches(above, pattern) for pattern in self._exclude):
                return False
            above = os.path.dirname(above)
        return True


def _matches(path: str, pattern: str) -> bool:
    return fnmatch(os.path.basename(path), pattern) or fnmatch(path, os.path.abspath(pattern))


def directories_of(handler: str) -> list[str]:
    """Return the current directory, and where the handler's package is if that is elsewhere."""
    here = os.getcwd()
    found = [here]
    # Finding a submodule would import its package.
    spec = importlib.util.find_spec(handler.partition(":")[0].partition(".")[0])
    if spec is not None and spec.has_location and spec.origin is not None:
        directory = os.path.dirname(os.path.abspath(spec.origin))
        if os.path.commonpath([here, directory]) != here:
            found.append(directory)
    return found


async def watch(
    directories: Sequence[str],
    wanted: ReloadFilter,
    changed: Callable[[list[str]], None],
    failed: Callable[[str], None],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Call ``changed`` with the paths of files that did, until this is cancelled.

    ``nursery.start`` returns when every later change will be seen, or after ``failed`` was called
    with the reason why none will be.
    """
    stop = trio.Event()
    is_started = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_set_when_cancelled, stop)
        try:
            # An empty set says that there was no change for a while: so it watches.
            async for changes in awatch(
                *directories,
                watch_filter=wanted,
                stop_event=stop,
                rust_timeout=_FIRST_REPORT,
                yield_on_timeout=True,
            ):
                if not is_started:
                    is_started = True
                    task_status.started()
                if changes:
                    changed(sorted({path for _, path in changes}))
        except (OSError, RuntimeError) as exc:
            # watchfiles has its own RuntimeError for what inotify(7) refuses.
            failed(str(exc))
        nursery.cancel_scope.cancel()
    if not is_started:
        task_status.started()


async def _set_when_cancelled(event: trio.Event) -> None:
    try:
        await trio.sleep_forever()
    finally:
        event.set()
