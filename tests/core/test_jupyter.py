"""The extension for notebooks, with a shell that has what the extension uses of IPython.

``nox -s notebooks`` runs it in real kernels.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import threading
import time
import types
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.lowlevel
import trio.testing

import trio_unixconn
from trio_unixconn import (
    Credentials,
    Message,
    UnixConnection,
    UnixFDList,
    jupyter,
    open_unix_listener,
)
from trio_unixconn.jupyter import NotebookNursery, watch
from trio_unixconn.pool import WorkerPool, open_worker_pool
from trio_unixconn.testing._pairs import closing_pair

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine, Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("default_sigint")


async def sleep() -> None:
    await trio.sleep(0.01)


async def sleep_forever() -> None:
    await trio.sleep_forever()


class Formatter(dict[type, Any]):
    def for_type(self, cls: type, function: Any) -> None:
        self[cls] = function


class Shell:
    """A shell of IPython: only what the extension uses."""

    def __init__(self) -> None:
        self.loop_runner: Any = "asyncio"
        self.autoawait = False
        self.user_ns: dict[str, Any] = {}
        self.formatter = Formatter()
        self.display_formatter = types.SimpleNamespace(formatters={"text/html": self.formatter})
        self.display_pub = types.SimpleNamespace(publish=self.publish)
        self.published: list[tuple[str, str, bool]] = []

    def push(self, variables: dict[str, Any]) -> None:
        self.user_ns.update(variables)

    def publish(self, data: dict[str, str], *, transient: Any, update: bool = False) -> None:
        self.published.append((transient["display_id"], data["text/html"], update))

    def run(self, cell: Coroutine[Any, Any, Any]) -> Any:
        """Run a cell that awaits."""
        return self.loop_runner(cell)

    @property
    def nursery(self) -> NotebookNursery:
        nursery: NotebookNursery = self.user_ns["nursery"]
        return nursery

    def html(self, value: object) -> str:
        """Return what a notebook shows, without the alignment of cells."""
        text: str = self.formatter[type(value)](value)
        return text.replace(' style="text-align: left"', "")


@pytest.fixture
def shell() -> Iterator[Shell]:
    shell = Shell()
    trio_unixconn.load_ipython_extension(shell)
    yield shell
    trio_unixconn.unload_ipython_extension(shell)


@pytest.fixture
def pair() -> Iterator[tuple[UnixConnection, UnixConnection]]:
    with closing_pair() as pair:
        yield pair


################################################################
# Cells
################################################################


def test_cells_share_one_run(shell: Shell, pair: tuple[UnixConnection, UnixConnection]) -> None:
    """A cell awaits in trio, its result and its errors are returned, and the run goes on."""
    one, two = pair

    async def cell() -> trio.lowlevel.TrioToken:
        await one.send_fd(0)
        os.close(await two.receive_fd())
        return trio.lowlevel.current_trio_token()

    assert shell.autoawait
    assert shell.run(cell()) is shell.run(cell())

    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise ValueError("of the cell")

    with pytest.raises(ValueError, match=r"^of the cell$"):
        shell.run(fail())
    shell.run(cell())


def test_tasks_go_on_between_cells(shell: Shell) -> None:
    """In a kernel, whose loop runs between cells, tasks run between cells, too."""
    count = 0

    async def beat() -> None:
        nonlocal count
        while True:
            count += 1
            await trio.sleep(0.001)

    async def kernel() -> None:
        own = Shell()
        jupyter.load_ipython_extension(own)
        try:
            own.nursery.start_soon(beat)
            with_a_limit = time.monotonic() + 30
            while count < 5:
                await asyncio.sleep(0.001)
                assert time.monotonic() < with_a_limit
            # A cell blocks the loop.
            before = count
            own.run(sleep())
            assert count > before
        finally:
            jupyter.unload_ipython_extension(own)

    jupyter.unload_ipython_extension(shell)
    asyncio.run(kernel())


def test_in_a_terminal_the_loop_of_the_prompt_is_used(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In IPython's terminal, the prompt is told to run in the loop that runs the tasks."""
    jupyter.unload_ipython_extension(shell)
    loop = asyncio.new_event_loop()
    helpers: Any = types.ModuleType("IPython.core.async_helpers")
    helpers.get_asyncio_loop = lambda: loop
    for name in ("IPython", "IPython.core"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "IPython.core.async_helpers", helpers)
    terminal: Any = Shell()
    terminal.pt_app = object()
    guis: list[str] = []
    terminal.enable_gui = guis.append
    jupyter.load_ipython_extension(terminal)
    done = threading.Event()

    async def prompt() -> None:
        while not done.is_set():
            await asyncio.sleep(0.001)

    async def task() -> None:
        await trio.sleep(0.001)
        done.set()

    terminal.nursery.start_soon(task)
    loop.run_until_complete(asyncio.wait_for(prompt(), 30))
    jupyter.unload_ipython_extension(terminal)
    loop.close()
    assert guis == ["asyncio"]


################################################################
# The interrupt button
################################################################


def test_interrupt_while_a_cell_waits(
    shell: Shell, pair: tuple[UnixConnection, UnixConnection]
) -> None:
    """A receive that waits raises KeyboardInterrupt, and the connection is used again."""
    one, two = pair
    seen: list[str] = []

    async def interrupt() -> None:
        await trio.testing.wait_all_tasks_blocked()
        signal.raise_signal(signal.SIGINT)

    async def cell() -> None:
        try:
            await one.receive_fd()
        except KeyboardInterrupt:
            seen.append("interrupted")
            raise

    shell.nursery.start_soon(interrupt)
    with pytest.raises(KeyboardInterrupt):
        shell.run(cell())
    assert seen == ["interrupted"]

    async def again() -> None:
        await two.send_fd(0)
        os.close(await one.receive_fd())

    shell.run(again())


def test_interrupt_of_the_code_of_a_cell(shell: Shell) -> None:
    """Code that computes is interrupted where it is, in the task of the cell or a child of it."""

    async def compute() -> None:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not interrupted")

    async def nested() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(compute)

    with pytest.raises(KeyboardInterrupt):
        shell.run(compute())
    with pytest.RaisesGroup(KeyboardInterrupt):
        shell.run(nested())


def test_interrupt_of_protected_code(shell: Shell) -> None:
    """Protected code is not interrupted; the cell is, at its next checkpoint."""
    seen: list[str] = []

    @trio.lowlevel.enable_ki_protection
    def protected() -> None:
        signal.raise_signal(signal.SIGINT)
        seen.append("to the end")

    async def cell() -> None:
        protected()
        await trio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        shell.run(cell())
    assert seen == ["to the end"]


def test_interrupt_while_a_task_of_another_cell_runs(shell: Shell) -> None:
    """The task goes on, and the cell is interrupted."""
    seen: list[str] = []

    async def other() -> None:
        await trio.testing.wait_all_tasks_blocked()
        signal.raise_signal(signal.SIGINT)
        seen.append("goes on")
        await trio.sleep_forever()

    shell.nursery.start_soon(other)
    with pytest.raises(KeyboardInterrupt):
        shell.run(sleep_forever())
    assert seen == ["goes on"]
    assert repr(shell.nursery) == "<NotebookNursery: 1 tasks, 0 context managers>"


def test_interrupt_of_a_cell_that_catches_the_cancellation(shell: Shell) -> None:
    """A cell that catches KeyboardInterrupt is still cancelled, and ends as interrupted."""

    async def cell() -> None:
        with pytest.raises(KeyboardInterrupt):
            await interrupted()
        await trio.sleep_forever()

    @trio.lowlevel.enable_ki_protection
    async def interrupted() -> None:
        signal.raise_signal(signal.SIGINT)
        await trio.sleep_forever()

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        shell.run(cell())
    assert signal.getsignal(signal.SIGINT) is before


################################################################
# The nursery
################################################################


def test_nursery_prints_what_a_task_raises(
    shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task that raises has its traceback printed; other tasks, and later ones, go on."""

    async def fail() -> None:
        raise ValueError("of the task")

    async def cell() -> None:
        shell.nursery.start_soon(trio.sleep_forever, name="sleeps")
        shell.nursery.start_soon(fail)
        await trio.testing.wait_all_tasks_blocked()

    shell.run(cell())
    assert "ValueError: of the task" in capsys.readouterr().err
    assert repr(shell.nursery) == "<NotebookNursery: 1 tasks, 0 context managers>"


def test_nursery_prints_nothing_when_python_exits(
    shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    """IPython has deleted the names of the cells by then, so a task that uses one raises."""

    async def fail_at_the_end() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise NameError("name 'count' is not defined")

    shell.nursery.start_soon(fail_at_the_end)
    shell.run(sleep())
    # What atexit calls.
    jupyter._end_at_exit()
    assert capsys.readouterr().err == ""


def test_nursery_start(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    """start() returns what the task gives, raises what it raises before, and prints the rest."""

    async def task(value: object, *, task_status: trio.TaskStatus[object]) -> None:
        if value is None:
            raise ValueError("before")
        task_status.started(value)
        raise ValueError("afterwards")

    async def cell() -> None:
        assert await shell.nursery.start(task, 3) == 3
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ValueError, match=r"^before$"):
            await shell.nursery.start(task, None)

    shell.run(cell())
    assert "ValueError: afterwards" in capsys.readouterr().err


def test_nursery_keeps_context_managers_open(
    shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    """A context manager stays open across cells until it is exited, or the nursery is cancelled."""
    seen: list[str] = []

    @asynccontextmanager
    async def manager(name: str) -> AsyncGenerator[str, None]:
        try:
            yield name
        finally:
            seen.append(name)
        if name == "fails":
            raise ValueError("at its end")

    enter, leave = shell.nursery.enter_async_context, shell.nursery.exit_async_context
    kept = shell.run(enter(manager("kept")))
    failing = shell.run(enter(manager("fails")))
    shell.run(enter(manager("to the end")))
    assert repr(shell.nursery) == "<NotebookNursery: 3 tasks, 3 context managers>"
    shell.run(leave(kept))
    shell.run(leave(failing))
    assert seen == ["kept", "fails"]
    assert "ValueError: at its end" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"^expected what enter_async_context\(\) has returned, "):
        shell.run(leave(kept))
    shell.nursery.cancel()
    shell.run(trio.testing.wait_all_tasks_blocked())
    assert seen == ["kept", "fails", "to the end"]
    shell.run(leave(shell.run(enter(manager("again")))))
    assert seen[3:] == ["again"]


def test_nursery_in_another_thread(shell: Shell) -> None:
    """Tasks can be started and cancelled in any thread."""
    started, ended = threading.Event(), threading.Event()

    async def task() -> None:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async def wait(event: threading.Event) -> None:
        with trio.fail_after(30):
            while not event.is_set():
                await trio.sleep(0.001)

    start = partial(shell.nursery.start_soon, task)
    for call, event in ((start, started), (shell.nursery.cancel, ended)):
        thread = threading.Thread(target=call)
        thread.start()
        shell.run(wait(event))
        thread.join()


def test_nursery_of_a_context_manager_that_cannot_be_entered(shell: Shell) -> None:
    """The exception of entering is raised in the cell."""
    with pytest.raises(ValueError, match="workers"):
        shell.run(shell.nursery.enter_async_context(open_worker_pool("asyncio:sleep", workers=0)))


################################################################
# What a notebook shows
################################################################


def test_pool_is_a_table(shell: Shell) -> None:
    """A pool that is kept open is a table of its workers; shown again, with the rate since then."""
    pool: WorkerPool = shell.run(
        shell.nursery.enter_async_context(open_worker_pool("asyncio:sleep", workers=1))
    )
    text = shell.html(pool)
    assert ">WorkerPool ready: 0 jobs handled, 0 failed, 0 in flight, 0 queued</caption>" in text
    assert "<th>in flight</th>" in text
    assert f"<tr><td>0</td><td>{pool.statistics().workers[0].pid}</td><td>ready</td>" in text
    assert "0 queued, 0 jobs per second</caption>" in shell.html(pool)

    shell.nursery.start_soon(partial(watch, pool, interval=0.001))

    async def see() -> None:
        with trio.fail_after(30):
            while len(shell.published) < 3:
                await trio.sleep(0.001)

    shell.run(see())
    shell.run(shell.nursery.exit_async_context(pool))
    shell.run(trio.testing.wait_all_tasks_blocked(0.05))
    places = {place for place, _, _ in shell.published}
    assert len(places) == 1
    assert [update for _, _, update in shell.published][:3] == [False, True, True]
    last = shell.published[-1][1]
    assert "WorkerPool ended: " in last
    # A worker of a pool that has ended does not start again, and needs no memory.
    assert re.search(r"<td>ended</td><td>0</td><td>0</td><td>0</td><td></td></tr>", last)
    assert repr(shell.nursery) == "<NotebookNursery: 0 tasks, 0 context managers>"


def test_watch_without_the_extension() -> None:
    """watch() says what it requires."""
    pool: Any = None
    with pytest.raises(RuntimeError, match=r"^watch\(\) requires %load_ext trio_unixconn$"):
        trio.run(watch, pool)


def test_connection_is_a_table(
    shell: Shell, pair: tuple[UnixConnection, UnixConnection], tmp_path: Path
) -> None:
    """A connection is a table of its addresses and its peer; what others chose is escaped."""
    one, _ = pair
    text = shell.html(one)
    assert f"<tr><td>file descriptor</td><td>{one.socket.fileno()}</td></tr>" in text
    assert f"<tr><td>peer</td><td>Credentials(pid={os.getpid()}, uid=" in text
    path = tmp_path / "<b>&\n"

    async def cell() -> tuple[str, str]:
        async with await open_unix_listener(path):
            conn = await trio_unixconn.open_unix_connection(path)
            opened = shell.html(conn)
            await conn.aclose()
            return opened, shell.html(conn)

    opened, closed = shell.run(cell())
    assert f"<td>{tmp_path}/&lt;b&gt;&amp;\\x0a</td>" in opened
    assert re.fullmatch("<table>\n<caption[^>]*>UnixConnection closed</caption>\n</table>", closed)


def test_connection_whose_number_is_closed_is_a_table(
    shell: Shell, pair: tuple[UnixConnection, UnixConnection]
) -> None:
    """What the kernel does not tell is unknown, and no error."""
    one, _ = pair
    fd = one.socket.fileno()
    kept = os.dup(fd)
    os.close(fd)
    text = shell.html(one)
    os.dup2(kept, fd, inheritable=False)
    os.close(kept)
    assert text.count("<td>unknown ([Errno 9] Bad file descriptor)</td>") == 3


def test_message_and_credentials_are_tables(shell: Shell) -> None:
    """The bytes of a message are shortened and escaped; an unknown id is unknown."""
    message = Message(b"<script>" + b"x" * 64, UnixFDList(), None)
    text = shell.html(message)
    assert "<td>72 bytes</td><td>b&#x27;&lt;script&gt;xxx" in text
    assert "x&#x27;...</td>" in text
    assert "<tr><td>credentials</td><td>none</td></tr>" in text
    short = shell.html(Message(b"<", UnixFDList(), Credentials(1, 2, 3)))
    assert "<td>1 bytes</td><td>b&#x27;&lt;&#x27;</td>" in short
    assert "<td>Credentials(pid=1, uid=2, gid=3)</td>" in short
    assert "<td>pid</td><td>unknown</td>" in shell.html(Credentials(-1, 2, 3))


################################################################
# Loading
################################################################


def test_unload_restores_everything(shell: Shell) -> None:
    """Unloading cancels tasks, restores how cells run, and can be done twice; so can loading."""
    jupyter.load_ipython_extension(shell)
    seen: list[str] = []

    async def task() -> None:
        try:
            await trio.sleep_forever()
        finally:
            seen.append("cancelled")

    shell.nursery.start_soon(task)
    shell.run(trio.testing.wait_all_tasks_blocked())
    shell.user_ns["nursery"] = "of the user"
    trio_unixconn.unload_ipython_extension(shell)
    trio_unixconn.unload_ipython_extension(shell)
    assert seen == ["cancelled"]
    assert (shell.loop_runner, shell.autoawait) == ("asyncio", False)
    assert shell.user_ns == {"nursery": "of the user"}
    assert shell.formatter == {}


def test_load_in_another_thread_or_in_trio() -> None:
    """Where trio cannot be started, loading raises, and changes nothing."""
    shell = Shell()
    told: list[str] = []

    def load() -> None:
        with pytest.raises(RuntimeError) as caught:
            jupyter.load_ipython_extension(shell)
        told.append(str(caught.value))

    async def main() -> None:
        load()

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    trio.run(main)
    assert told == [
        "the extension must be loaded in the main thread",
        "trio runs this kernel already; cells can await without the extension",
    ]
    assert shell.user_ns == {}
    assert shell.loop_runner == "asyncio"


def test_end_of_the_process_ends_the_workers(shell: Shell) -> None:
    """When the process exits, a pool that is kept open is closed."""
    pool: WorkerPool = shell.run(
        shell.nursery.enter_async_context(open_worker_pool("asyncio:sleep", workers=1))
    )
    jupyter._end()
    assert repr(pool).startswith("<WorkerPool asyncio:sleep ended: ")


def test_failure_of_the_run_is_raised(shell: Shell) -> None:
    """An error of trio itself ends the run; unloading restores how cells run."""

    async def broken(task_status: object = None) -> None:
        raise ValueError("of a cell's task itself")

    session: Any = jupyter._session
    with pytest.RaisesGroup(ValueError, flatten_subgroups=True):
        session._token.run_sync_soon(session._cells.start_soon, broken)
        session._host.run_until(lambda: session._ended)
    trio_unixconn.unload_ipython_extension(shell)
    assert shell.loop_runner == "asyncio"
