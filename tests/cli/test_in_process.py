"""Parts of the commands whose processes cannot be measured, or whose moment is hard to meet."""

from __future__ import annotations

import errno
import os
import signal
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import Mock

import attrs
import pytest
import trio
import typer
from trio.testing import wait_all_tasks_blocked

from tests._helpers.cli import run_in_this_process
from trio_unixconn import __main__, open_unix_connection, open_unix_listener
from trio_unixconn._cli import passing
from trio_unixconn._cli.serve import binds, command, log, reload, service
from trio_unixconn.pool import open_worker_pool

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from trio_unixconn import UnixListener


@pytest.fixture
def deleted_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be in a directory that was deleted."""
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()


@attrs.define
class FailingMeeting:
    """A meeting whose listener reports an error when it is closed."""

    path: Path
    clients: trio.Nursery
    listen: bool = True

    async def listen_there(self) -> UnixListener:
        listener = await open_unix_listener(self.path)
        close = listener.aclose

        async def aclose() -> None:
            await close()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        cast("Any", listener).aclose = aclose
        self.clients.start_soon(self._send)
        return listener

    async def _send(self) -> None:
        async with await open_unix_connection(self.path) as conn:
            await conn.send_fd(0)
            assert await conn.receive_some() == b""


async def test_receive_fd_listen_closes_the_sender_if_closing_the_listener_fails(
    tmp_path: Path,
) -> None:
    """The connection of the sender ends, and the error is told."""
    async with trio.open_nursery() as clients:
        meeting = FailingMeeting(tmp_path / "socket", clients)
        with pytest.raises(OSError, match="Input/output error"):
            await passing._receive(cast("passing.Meeting", meeting), 1)


@pytest.mark.usefixtures("deleted_directory")
def test_serve_log_file_in_a_deleted_directory() -> None:
    """A relative path is one clear line if there is no directory that it is relative to."""
    done = run_in_this_process("serve", "app:once", "--bind", "tcp:127.0.0.1:0", "--log-file", "x")
    assert done.returncode == 1
    said = "x: the current directory was deleted; use an absolute path"
    assert said in done.stderr
    with pytest.raises(typer.Exit):
        command._absolute("x")


@attrs.define
class Terminal:
    """What a screen uses of a log."""

    encoding: str = "ascii"
    pictures: list[bytes] = attrs.field(factory=list[bytes])

    @property
    def terminal(self) -> Terminal:
        return self

    def put(self, picture: bytes) -> None:
        self.pictures.append(picture)


def test_serve_screen_flush() -> None:
    """What was written since the last flush is one picture; without that there is none."""
    terminal = Terminal()
    screen = log.Screen(cast("log.Log", terminal))
    screen.flush()
    screen.write("a")
    screen.write("ü")
    screen.flush()
    screen.flush()
    assert terminal.pictures == [b"a\\xfc"]


async def test_serve_reload_that_fails_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of inotify is told once, even if watching had begun."""

    async def awatch(*_: object, **__: object) -> AsyncGenerator[set[tuple[int, str]], None]:
        yield set()
        yield {(1, "b"), (1, "a")}
        raise RuntimeError("no more")

    monkeypatch.setattr(reload, "awatch", awatch)
    changes: list[Sequence[str]] = []
    failures: list[str] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(
            reload.watch,
            ["."],
            reload.ReloadFilter(["."], [], []),
            changes.append,
            failures.append,
        )
    assert (changes, failures) == ([["a", "b"]], ["no more"])


@pytest.mark.usefixtures("deleted_directory")
async def test_serve_reload_in_a_deleted_directory(caplog: pytest.LogCaptureFixture) -> None:
    """Without a directory to watch there is one line, and the server goes on."""
    served = service._Service.__new__(service._Service)
    served._config = cast("service.ServeConfig", Config())
    async with trio.open_nursery() as nursery:
        await nursery.start(served._watch)
    assert any(each.startswith("not watching: ") for each in caplog.messages)


@attrs.define
class Config:
    """What these tests need of a configuration."""

    handler: str = "app:once"
    max_draining: int = 4
    directory: None = None


@attrs.define
class Server:
    """A server that is only a pool."""

    pool: Any

    def statistics(self) -> Any:
        return self.pool.statistics()


async def test_serve_restart_after_a_drain(caplog: pytest.LogCaptureFixture) -> None:
    """A restart that finds the pool drained says so, and is not an error."""
    caplog.set_level("INFO")
    served = service._Service.__new__(service._Service)
    served._config = cast("service.ServeConfig", Config())
    served._notifier = Mock()
    served._workers, served._addresses = 1, ["tcp:127.0.0.1:1"]
    async with open_worker_pool("tests._helpers.pool_handlers:do", workers=1) as pool:
        await pool.drain()
        await served._restart(cast("Any", Server(pool)), "received SIGHUP")
    said = [each for each in caplog.messages if each.startswith("received SIGHUP: ")]
    assert len(said) == 2
    assert "drain" in said[1]


async def test_serve_with_all_signals_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a signal to wait for, nothing waits."""
    monkeypatch.setattr(service, "heard_signals", lambda _: [])
    served = service._Service.__new__(service._Service)
    async with trio.open_nursery() as nursery:
        await nursery.start(served._heed_signals)
        await wait_all_tasks_blocked()
        assert not nursery.child_tasks


def test_serve_catch_signals_keeps_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only signals whose action is the default one get another."""
    monkeypatch.setattr(service, "heard_signals", lambda _: [signal.SIGUSR1, signal.SIGUSR2])
    before = [signal.getsignal(each) for each in (signal.SIGUSR1, signal.SIGUSR2)]

    def own(*_: object) -> None:
        """Do nothing."""

    try:
        signal.signal(signal.SIGUSR1, own)
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        service.catch_signals()
        assert signal.getsignal(signal.SIGUSR1) is own
        assert signal.getsignal(signal.SIGUSR2) is service._do_nothing
    finally:
        for number, handler in zip((signal.SIGUSR1, signal.SIGUSR2), before, strict=True):
            signal.signal(number, handler)


def test_serve_binds_made_absolute() -> None:
    """An address without a path stays as it is."""
    for bind in (binds.read_bind("tcp:127.0.0.1:0"), binds.read_bind("fd:0")):
        assert bind.made_absolute() is bind


def test_main_raises_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """An OSError that is not about an output is a bug, which stays visible."""

    def app() -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "missing")

    monkeypatch.setattr(__main__, "app", app)
    with pytest.raises(FileNotFoundError):
        __main__.main()
