"""The error of an async function that no trio task runs.

Invariant: on the hot path this costs nothing. There, the first call of trio fails outside of a
task, and only then is the reason looked for.
"""

from __future__ import annotations

from typing import Final

from trio.lowlevel import checkpoint, current_task

_OUTSIDE: Final = (
    "not in a trio task: call this inside trio.run(), or run %autoawait trio first in a notebook; "
    "asyncio is not trio"
)


def check_task() -> None:
    """Raise unless a trio task calls this.

    Raises:
      RuntimeError: no trio task does; with what to do.
    """
    try:
        current_task()
    except RuntimeError:
        raise RuntimeError(_OUTSIDE) from None


def explain(error: RuntimeError) -> RuntimeError:
    """Return the error to raise for one of trio or of asyncio: the same, in a trio task.

    Outside of a task, trio says "must be called from async context", and asyncio that it got a bad
    yield.
    """
    try:
        check_task()
    except RuntimeError as outside:
        return outside
    return error


async def checkpoint_in_task() -> None:
    """Execute a checkpoint of trio.

    Raises:
      RuntimeError: no trio task calls this; with what to do.
    """
    check_task()
    await checkpoint()
