"""Watching the files of a handler, to have it imported afresh when they change.

Invariant: the watcher's thread ends when the waiting task is cancelled.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import trio
from watchfiles import PythonFilter, awatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


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


async def watch(directories: Sequence[str], changed: Callable[[list[str]], None]) -> None:
    """Call ``changed`` with the paths of Python files that did, until this is cancelled."""
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_set_when_cancelled, stop)
        async for changes in awatch(*directories, watch_filter=PythonFilter(), stop_event=stop):
            changed(sorted({path for _, path in changes}))


async def _set_when_cancelled(event: trio.Event) -> None:
    try:
        await trio.sleep_forever()
    finally:
        event.set()
