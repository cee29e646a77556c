"""A limit for each async test, which prints where every task of the test waits.

pytest's own limit (``faulthandler_timeout`` in pyproject.toml) ends the whole process, whatever it
does, but of trio it can print the event loop only.
"""

from __future__ import annotations

import functools
import inspect
import sys
import traceback
from typing import Any, Final

import pytest
import trio

# In seconds. No test takes a tenth of it on a machine that is ten times slower than usual.
ASYNC_TEST_TIMEOUT: Final = 120.0
# With one of these a test has its own time.
CLOCKS: Final = {"autojump_clock", "mock_clock"}


# Why a test skipped itself: pytest-trio raises another exception, without the reason.
SKIP_REASON: Final = pytest.StashKey[str]()


def skip_reason(exc: BaseException) -> str:
    """Return the reason of a skip, which may be in a group; "" if it is not a skip."""
    if isinstance(exc, pytest.skip.Exception):
        return str(exc)
    return "".join(map(skip_reason, getattr(exc, "exceptions", ())))


class TaskDump(trio.abc.Instrument):
    """Print the stacks of all tasks when a deadline has passed, before trio cancels anything."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._done = False

    def after_io_wait(self, timeout: float) -> None:
        """Trio calls this when the loop wakes up, before it looks for expired deadlines."""
        if not self._done and trio.current_time() >= self._deadline:
            self._done = True
            # The report of a failed test contains it.
            sys.stderr.write(task_stacks())


def task_stacks() -> str:
    """Return where each task waits, parents first."""
    root = trio.lowlevel.current_root_task()
    lines: list[str] = []
    tasks = [] if root is None else [root]
    while tasks:
        task = tasks.pop()
        frames = [(frame, line) for frame, line in task.iter_await_frames()]
        lines.append(f"task {task.name}:\n")
        lines += traceback.StackSummary.extract(iter(frames)).format()
        tasks += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return "".join(lines)


def limit_time(item: pytest.Item, timeout: float = ASYNC_TEST_TIMEOUT) -> None:
    """Have an async test cancelled after ``timeout`` seconds, and its tasks printed."""
    test = getattr(item, "obj", None)
    if not inspect.iscoroutinefunction(test) or CLOCKS & set(getattr(item, "fixturenames", ())):
        return

    @functools.wraps(test)
    async def limited(**arguments: Any) -> None:
        deadline = trio.current_time() + timeout
        dump = TaskDump(deadline)
        trio.lowlevel.add_instrument(dump)
        try:
            with trio.fail_at(deadline):
                await test(**arguments)
        except BaseException as exc:
            item.stash[SKIP_REASON] = skip_reason(exc)
            raise
        finally:
            trio.lowlevel.remove_instrument(dump)

    item.obj = limited  # type: ignore[attr-defined]


def report_skip(item: pytest.Item, report: pytest.TestReport) -> None:
    """Add to a report why an async test skipped itself."""
    reason = item.stash.get(SKIP_REASON, "")
    if report.skipped and reason and isinstance(report.longrepr, tuple):
        path, line, _ = report.longrepr
        report.longrepr = path, line, f"Skipped: {reason}"
