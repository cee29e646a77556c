"""An extension for notebooks and IPython: ``%load_ext trio_unixconn``.

Invariant: a text that a peer chose is escaped before it becomes HTML. Nothing here imports IPython,
which passes itself to :func:`load_ipython_extension`.

Source: https://ipython.readthedocs.io/en/stable/config/extensions/
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import html
import importlib
import itertools
import queue
import signal
import threading
import time
import traceback
import types
import weakref
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import outcome
import trio
from trio.lowlevel import current_task, currently_ki_protected, enable_ki_protection

from ._cancellable import call_in_trio_thread
from ._connection import UnixConnection
from ._credentials import Credentials
from ._messages import Message
from ._owner import DescriptorOwner
from ._public import export as _export
from ._trio_task import check_task
from .pool import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
    from types import FrameType

T = TypeVar("T")

__all__ = ["NotebookNursery", "load_ipython_extension", "unload_ipython_extension", "watch"]

# How trio runs in a notebook
# ---------------------------
#
# What we want: tasks go on between cells, because a pool has to read the heartbeats of its workers.
# ``%autoawait trio`` runs each cell in a trio.run of its own, which ends with the cell.
#
# What was considered:
#
# - A thread for trio. The code of cells that await would run in that thread, and that of others in
#   the main thread; and the interrupt button reaches the main thread only.
# - The trio loop of ipykernel (``trio_loop``), which ipykernel 7.4 does not start, and which cannot
#   be switched on in a notebook that is running.
#
# What was chosen: trio's guest mode, in the main thread. Between cells, the host is the loop of the
# kernel, or of IPython's prompt. A cell that awaits blocks that loop, and while it runs, the host
# is ``_Host.run_until``. A cell is a task of one run, which lasts until the extension is unloaded.
#
# The interrupt button sends SIGINT. If it meets the code of the cell, it raises KeyboardInterrupt
# there, even in an endless loop. If it meets trio, a protected function, or a task of another cell,
# the task of the cell is cancelled instead; what its code sees in place of the cancellation is a
# KeyboardInterrupt.


class _Host:
    """Calls what trio's guest mode wants to be called in the main thread."""

    def __init__(self, call_soon_threadsafe: Callable[[Callable[[], object]], object]) -> None:
        self._call_soon_threadsafe = call_soon_threadsafe
        self._calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._is_running = False

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call ``function`` soon; called in any thread."""
        self._calls.put(function)
        if not self._is_running:
            self._call_soon_threadsafe(self._call_ready)

    def _call_ready(self) -> None:
        while True:
            try:
                function = self._calls.get_nowait()
            except queue.Empty:
                return
            function()

    @enable_ki_protection
    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Call functions until ``is_done()``."""
        self._is_running = True
        try:
            while not is_done():
                self._calls.get()()
        finally:
            self._is_running = False
            # For those that arrived while this was ending.
            self._call_soon_threadsafe(self._call_ready)


class _Cell:
    """A cell that awaits: a task, and its outcome."""

    def __init__(self, code: Coroutine[Any, Any, Any], token: trio.lowlevel.TrioToken) -> None:
        self._code = code
        self._token = token
        self._scope = trio.CancelScope()
        self._task: trio.lowlevel.Task | None = None
        self._interrupted = False
        self.outcome: outcome.Outcome[Any] | None = None

    async def run(self) -> None:
        """Run the code, and keep its outcome, even if it is an exception."""
        self._task = current_task()
        result: outcome.Outcome[Any] = outcome.Value(None)
        with self._scope:
            result = await outcome.acapture(_await_cell, self._code, self._is_interrupted)
        if isinstance(result, outcome.Error) and isinstance(result.error, trio.Cancelled):
            # It has caught the KeyboardInterrupt, and went on.
            result = outcome.Error(KeyboardInterrupt())
        self.outcome = result

    def is_done(self) -> bool:
        """Whether there is an outcome."""
        return self.outcome is not None

    def _is_interrupted(self) -> bool:
        interrupted, self._interrupted = self._interrupted, False
        return interrupted

    def interrupt(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002 - of a signal
        """Handle SIGINT."""
        if not currently_ki_protected() and self._is_running():
            raise KeyboardInterrupt
        self._interrupted = True
        self._token.run_sync_soon(self._scope.cancel)

    def _is_running(self) -> bool:
        """Whether the code that a signal has met is of this cell, or of a task in it."""
        # Code outside of all tasks is trio's, which is protected.
        task: trio.lowlevel.Task | None = current_task()
        while task is not None and task is not self._task:
            task = task.parent_nursery.parent_task if task.parent_nursery is not None else None
        return task is not None


@types.coroutine
def _await_cell(
    code: Coroutine[Any, Any, T], is_interrupted: Callable[[], bool]
) -> Generator[Any, Any, T]:
    """Await ``code``; after an interrupt, a cancellation arrives in it as KeyboardInterrupt."""
    try:
        message = code.send(None)
        while True:
            result = yield message
            if (
                isinstance(result, outcome.Error)
                and isinstance(result.error, trio.Cancelled)
                and is_interrupted()
            ):
                result = outcome.Error(KeyboardInterrupt())
            message = code.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value
    finally:
        code.close()


class NotebookNursery(DescriptorOwner):
    """A nursery for tasks that go on between cells; ``nursery`` in a notebook.

    Its methods may be called in every cell. If a task raises an exception, its traceback is
    printed, and the other tasks go on.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._scopes: set[trio.CancelScope] = set()
        self._contexts: list[tuple[Any, trio.Event, trio.Event]] = []
        self._is_exiting = False

    def start_soon(
        self, async_fn: Callable[..., Awaitable[object]], *args: Any, name: object = None
    ) -> None:
        """Start a task, which :meth:`cancel` cancels; as ``trio.Nursery.start_soon``."""

        async def run() -> None:
            with self._cancelled_together():
                try:
                    await async_fn(*args)
                except Exception:  # no other task can raise it
                    self._print_error()

        start = partial(self._nursery.start_soon, run, name=name or async_fn)
        call_in_trio_thread(self._token, partial(contextvars.copy_context().run, start))

    async def start(
        self, async_fn: Callable[..., Awaitable[object]], *args: Any, name: object = None
    ) -> Any:
        """Start a task, and wait until it calls ``task_status.started()``.

        As ``trio.Nursery.start``. If it raises an exception before, this does.
        """
        check_task()
        started = False

        async def run(task_status: trio.TaskStatus[Any]) -> None:
            class Status:
                """The task status of trio, of which this remembers that it was called."""

                def started(self, value: object = None) -> None:
                    nonlocal started
                    task_status.started(value)
                    started = True

            with self._cancelled_together():
                try:
                    await async_fn(*args, task_status=Status())
                except Exception:
                    if not started:
                        raise
                    self._print_error()

        return await self._nursery.start(run, name=name or async_fn)

    async def enter_async_context(self, context: AbstractAsyncContextManager[Any]) -> Any:
        """Enter an async context manager, and keep it open across cells.

        For example, ``pool = await nursery.enter_async_context(open_worker_pool("file:handler"))``.

        Returns:
          What ``async with`` would: pass it to :meth:`exit_async_context`.
        """

        async def hold(*, task_status: trio.TaskStatus[Any]) -> None:
            leave, left = trio.Event(), trio.Event()
            try:
                async with context as value:
                    self._contexts.append((value, leave, left))
                    task_status.started(value)
                    await leave.wait()
            finally:
                self._contexts[:] = [each for each in self._contexts if each[1] is not leave]
                left.set()

        return await self.start(hold, name=type(context))

    async def exit_async_context(self, value: object) -> None:
        """Exit the context manager that has returned ``value``, and wait until it has ended.

        An exception of its end is printed.

        Raises:
          ValueError: ``value`` is not one of :meth:`enter_async_context`, or it has ended.
        """
        check_task()
        for entered, leave, left in self._contexts:
            if entered is value:
                leave.set()
                await left.wait()
                return
        raise ValueError(f"expected what enter_async_context() has returned, got {value!r}")

    def _print_error(self) -> None:
        if not self._is_exiting:
            traceback.print_exc()

    def cancel(self) -> None:
        """Cancel all tasks, and exit all context managers; others can be started afterwards."""
        call_in_trio_thread(self._token, self._cancel)

    def _cancel(self) -> None:
        for scope in list(self._scopes):
            scope.cancel()

    @contextmanager
    def _cancelled_together(self) -> Generator[None, None, None]:
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.discard(scope)

    def __repr__(self) -> str:
        return (
            f"<NotebookNursery: {len(self._scopes)} tasks, {len(self._contexts)} context managers>"
        )


class _Session:
    """The run of trio in a notebook, and what the extension has changed in IPython."""

    def __init__(self, ipython: Any) -> None:
        self._ipython = ipython
        self._host = _Host(_find_loop(ipython))
        self._ended = False
        self._started = False
        self._before = (ipython.loop_runner, ipython.autoawait)
        trio.lowlevel.start_guest_run(
            self._main,
            run_sync_soon_threadsafe=self._host.call_soon,
            done_callback=self._done,
            # The loop of the notebook may use it.
            host_uses_signal_set_wakeup_fd=True,
        )
        self._host.run_until(lambda: self._started)
        ipython.loop_runner, ipython.autoawait = self.run, True
        ipython.push({"nursery": self.nursery})

    async def _main(self) -> None:
        # A cell cannot end while its nursery does: only tasks are cancelled at the end.
        async with trio.open_nursery() as cells, trio.open_nursery() as tasks:
            self._token = trio.lowlevel.current_trio_token()
            self._cells = cells
            self.nursery = NotebookNursery(tasks)
            self._stop = trio.Event()
            self._started = True
            await self._stop.wait()
            tasks.cancel_scope.cancel()

    def _done(self, result: outcome.Outcome[None]) -> None:
        self._ended = True
        result.unwrap()

    def run(self, code: Coroutine[Any, Any, T]) -> T:
        """Run a cell that awaits; IPython's ``loop_runner``."""
        cell = _Cell(code, self._token)
        start = partial(self._cells.start_soon, cell.run)
        self._token.run_sync_soon(contextvars.copy_context().run, start)
        before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, cell.interrupt)
        try:
            self._host.run_until(cell.is_done)
        finally:
            signal.signal(signal.SIGINT, before)
        assert cell.outcome is not None
        value: T = cell.outcome.unwrap()
        return value

    def new_display(self) -> Callable[..., object]:
        """Return a function that shows data by MIME type, first in a new place, then there."""
        transient = {"display_id": f"trio_unixconn-{next(_display_ids)}"}
        return partial(self._ipython.display_pub.publish, transient=transient)

    def end(self) -> None:
        """Cancel all tasks, wait until they have ended, and restore what was changed."""
        if not self._ended:
            self._token.run_sync_soon(self._stop.set)
            self._host.run_until(lambda: self._ended)
        self._ipython.loop_runner, self._ipython.autoawait = self._before
        if self._ipython.user_ns.get("nursery") is self.nursery:
            del self._ipython.user_ns["nursery"]


def _find_loop(ipython: Any) -> Callable[[Callable[[], object]], object]:
    """Return call_soon_threadsafe of the loop that runs between cells."""
    try:
        return asyncio.get_running_loop().call_soon_threadsafe
    except RuntimeError:
        pass
    if getattr(ipython, "pt_app", None) is None:
        # IPython without a prompt runs nothing between cells.
        return lambda _: None
    # The prompt runs a loop of its own, unless IPython is told to use the one of asyncio's cells.
    ipython.enable_gui("asyncio")
    helpers: Any = importlib.import_module("IPython.core.async_helpers")
    call_soon: Callable[[Callable[[], object]], object]
    call_soon = helpers.get_asyncio_loop().call_soon_threadsafe
    return call_soon


################################################################
# What a notebook shows
################################################################


def _table(caption: str, head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table; all texts are escaped."""
    heads = "".join(f"<th>{html.escape(each)}</th>" for each in head)
    # JupyterLab aligns to the right, which is for numbers in columns.
    td = "<td>" if heads else '<td style="text-align: left">'
    lines = [
        f"<tr>{''.join(f'{td}{html.escape(str(each))}</td>' for each in row)}</tr>" for row in rows
    ]
    if heads:
        lines.insert(0, f"<tr>{heads}</tr>")
    # A caption that wraps makes a table that changes jump.
    title = (
        f'<caption style="white-space: nowrap; text-align: left">{html.escape(caption)}</caption>'
    )
    return "\n".join(["<table>", title, *lines, "</table>"])


# Of a pool that starts no more workers.
_END_STATES: Final = ("ended", "failed")

# When a pool was shown last, and how many jobs had been handled by then.
_shown: Final[weakref.WeakKeyDictionary[WorkerPool, tuple[float, int]]] = (
    weakref.WeakKeyDictionary()
)


def _html_of_pool(pool: WorkerPool) -> str:
    """Return a table of the workers, and the rate of jobs since the pool was shown last."""
    values, now = pool.statistics(), time.monotonic()
    before = _shown.get(pool)
    rate = ""
    if before is not None and now > before[0]:
        rate = f", {(values.handled - before[1]) / (now - before[0]):,.0f} jobs per second"
    _shown[pool] = now, values.handled
    caption = (
        f"{values.state}: {values.handled} jobs handled, {values.failed} failed, "
        f"{values.in_flight} in flight, {values.queued} queued{rate}"
    )
    head = ("worker", "pid", "state", "in flight", "handled", "failed", "memory")
    has_ended = values.state in _END_STATES
    rows = [
        (
            *(each.index, each.pid, values.state if has_ended else each.state),
            *(each.in_flight, each.handled, each.failed),
            "" if has_ended else f"{each.memory / 1e6:.1f} MB",
        )
        for each in values.workers
    ]
    return _table(f"WorkerPool {caption}", head, rows)


def _html_of_connection(conn: UnixConnection) -> str:
    """Return a table of the socket, and of the process at its other end."""
    rows: list[tuple[str, object]] = []
    if not conn.is_closed():
        # Each is unknown where the platform does not tell, or other code has closed the number.
        for name, ask in (
            ("local address", conn.get_local_address),
            ("remote address", conn.get_remote_address),
            ("peer", conn.get_peer_credentials),
        ):
            try:
                rows.append((name, ask()))
            except OSError as exc:
                rows.append((name, f"unknown ({exc})"))
        rows.insert(0, ("file descriptor", conn.socket.fileno()))
    return _table(f"UnixConnection{' closed' if conn.is_closed() else ''}", (), rows)


def _html_of_message(message: Message) -> str:
    """Return a table of the parts of a message."""
    data = message.data
    shown = repr(data[:64]) + ("..." if len(data) > 64 else "")
    rows = [
        (f"{len(data)} bytes", shown),
        ("file descriptors", message.fds),
        ("credentials", message.credentials or "none"),
    ]
    return _table(type(message).__name__, (), rows)


def _html_of_credentials(credentials: Credentials) -> str:
    """Return a table of ids; -1 is unknown."""
    ids = (("pid", credentials.pid), ("uid", credentials.uid), ("gid", credentials.gid))
    rows = [(name, "unknown" if value == -1 else value) for name, value in ids]
    return _table("Credentials", (), rows)


_HTML: Final[dict[type, Callable[[Any], str]]] = {
    WorkerPool: _html_of_pool,
    UnixConnection: _html_of_connection,
    Message: _html_of_message,
    Credentials: _html_of_credentials,
}


_display_ids: Final = itertools.count(1)


async def watch(pool: WorkerPool, *, interval: float = 1.0) -> None:
    """Show a pool as a table that changes, until the pool has ended.

    ``nursery.start_soon(watch, pool)`` shows it below the cell.

    Args:
      interval: the time between two changes, in seconds.

    Raises:
      RuntimeError: the extension is not loaded.
    """
    if _session is None:
        raise RuntimeError("watch() requires %load_ext trio_unixconn")
    show = _session.new_display()
    show({"text/plain": repr(pool), "text/html": _html_of_pool(pool)})
    while pool.statistics().state not in _END_STATES:
        await trio.sleep(interval)
        show({"text/plain": repr(pool), "text/html": _html_of_pool(pool)}, update=True)


################################################################
# Loading
################################################################

_session: _Session | None = None


def load_ipython_extension(ipython: Any) -> None:
    """Run trio until the extension is unloaded; ``%load_ext trio_unixconn`` calls this.

    - A cell can await what needs trio, and tasks go on between cells.
    - ``nursery`` is a :class:`NotebookNursery`.
    - Pools, connections, messages and credentials are shown as tables.

    Raises:
      RuntimeError: this is not the main thread, or trio runs it already, as in ipykernel's trio
        loop.
    """
    global _session  # noqa: PLW0603 - one for the one IPython of a process
    if _session is not None:
        return
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("the extension must be loaded in the main thread")
    try:
        _session = _Session(ipython)
    except RuntimeError as exc:
        raise RuntimeError(
            "trio runs this kernel already; cells can await without the extension"
        ) from exc
    formatter = ipython.display_formatter.formatters["text/html"]
    for cls, html_of in _HTML.items():
        formatter.for_type(cls, html_of)
    atexit.register(_end_at_exit)


def unload_ipython_extension(ipython: Any) -> None:
    """Cancel all tasks, and restore what was before; ``%unload_ext trio_unixconn`` calls this."""
    if _session is None:
        return
    formatter = ipython.display_formatter.formatters["text/html"]
    for cls in _HTML:
        formatter.pop(cls, None)
    _end()


def _end_at_exit() -> None:
    # IPython in a terminal has deleted the names of the cells by now, which running tasks may use.
    assert _session is not None
    _session.nursery._is_exiting = True
    _end()


def _end() -> None:
    global _session
    session, _session = _session, None
    atexit.unregister(_end_at_exit)
    assert session is not None  # the callers have looked
    session.end()


_export(globals())
