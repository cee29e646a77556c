"""``serve --notify``: what the service manager is told."""

from __future__ import annotations

import os
import signal
import socket as stdlib_socket
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from tests._helpers.cli import COMMAND
from tests._helpers.environment import environment
from tests._helpers.serve_cli import APP, answer, hear_signals, make_project
from tests._helpers.waiting import until
from trio_unixconn._cli.serve.notify import Notifier, find_service_manager
from trio_unixconn.systemd import ServiceManager
from trio_unixconn.testing import limit_descriptors, open_service_manager

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from trio.testing import MockClock

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a directory with a module of handlers that answer with their environment."""
    project = make_project(tmp_path)
    (project / "app.py").write_text(
        APP.replace('b"one"', 'repr(__import__("os").environ.get("NOTIFY_SOCKET")).encode()')
    )
    return project


@asynccontextmanager
async def served(
    project: Path, *arguments: str, variables: dict[str, str]
) -> AsyncGenerator[trio.Process, None]:
    """Run a server with one worker at the socket ``s``."""
    command = [*COMMAND, "serve", "app:once", "--bind", "unix:s", "--workers", "1", *arguments]
    process = await trio.lowlevel.open_process(
        command,
        cwd=project,
        env=environment(PYTHONDONTWRITEBYTECODE="1", **variables),
        stdout=subprocess.DEVNULL,
        preexec_fn=hear_signals,
    )
    try:
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def test_serve_notify_tells_each_state(project: Path) -> None:
    """READY=1 once workers are ready, a pair for each restart, heartbeats, and STOPPING=1."""
    async with (
        open_service_manager(watchdog_timeout=1) as fake,
        served(project, variables=fake.environ) as process,
    ):
        with trio.fail_after(60):
            await fake.wait_for("STATUS=starting")
            message = await fake.wait_for("READY=1")
            assert message.credentials is not None
            assert message.credentials.pid == process.pid
            assert fake.status == "1 workers at unix:s"
            # Workers do not inherit what is about their parent.
            assert await trio.to_thread.run_sync(answer, os.fspath(project / "s")) == b"None"
            process.send_signal(signal.SIGHUP)
            message = await fake.wait_for("RELOADING=1")
            assert message.assignments["STATUS"] == "restarting the workers (SIGHUP)"
            assert message.assignments["MONOTONIC_USEC"].isdecimal()
            message = await fake.wait_for("READY=1")
            assert message.assignments["STATUS"] == "1 workers at unix:s"
            (project / "app.py").write_text("raise RuntimeError('not today')\n")
            process.send_signal(signal.SIGHUP)
            await fake.wait_for("RELOADING=1")
            message = await fake.wait_for("READY=1")
            assert message.assignments["STATUS"] == (
                "1 workers at unix:s; the last restart failed, the old workers go on"
            )
            beats = fake.heartbeats
            while fake.heartbeats < beats + 3:
                await fake.wait_for("WATCHDOG=1")
            process.send_signal(signal.SIGTERM)
            await fake.wait_for("STOPPING=1", "STATUS=received SIGTERM, draining")
            assert await process.wait() == 0
        assert fake.state == "stopping"
        assert fake.rejected == []


async def test_extend_timeouts(autojump_clock: MockClock) -> None:
    """While workers start, the manager is asked for more time, and not otherwise."""
    waiting = True
    async with open_service_manager() as fake, trio.open_nursery() as nursery:
        notifier = Notifier(ServiceManager.from_environ(dict(fake.environ)))
        nursery.start_soon(notifier.run, always)
        nursery.start_soon(notifier.extend_timeouts, lambda: waiting)
        for _ in range(3):
            message = await fake.wait_for("EXTEND_TIMEOUT_USEC=15000000")
        assert len(message.assignments) == 1
        waiting = False
        await trio.sleep(60)
        notifier.ready("ready")
        message = await fake.wait_for("READY=1")
        assert fake.state == "ready"
        asked = ["EXTEND_TIMEOUT_USEC" in each.assignments for each in fake.received]
        assert asked == [True, True, True, False]
        nursery.cancel_scope.cancel()


async def test_serve_notify_tells_the_number_of_workers(project: Path) -> None:
    """SIGTTIN changes the number of workers, and the status."""
    async with open_service_manager() as fake, served(project, variables=fake.environ) as process:
        with trio.fail_after(60):
            await fake.wait_for("READY=1")
            process.send_signal(signal.SIGTTIN)
            await fake.wait_for("STATUS=2 workers at unix:s")
            assert fake.heartbeats == 0


async def wait_until_ready(log: Path) -> None:
    await until(lambda: log.exists() and "ready: " in log.read_text())


async def test_serve_notify_off(project: Path, tmp_path: Path) -> None:
    """With --notify off nothing is said, and handlers have the variable."""
    log = tmp_path / "log"
    options = ("--notify", "off", "--log-file", str(log))
    async with (
        open_service_manager(watchdog_timeout=1) as fake,
        served(project, *options, variables=fake.environ) as process,
    ):
        await wait_until_ready(log)
        with trio.fail_after(60):
            found = await trio.to_thread.run_sync(answer, os.fspath(project / "s"))
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
            # The manager receives this after all that the server has sent.
            await ServiceManager.from_environ(dict(fake.environ)).status("ours")
            await fake.wait_for("STATUS=ours")
        assert found == repr(fake.environ["NOTIFY_SOCKET"]).encode()
        assert [each.assignments for each in fake.received] == [{"STATUS": "ours"}]
        assert fake.rejected == []


async def test_serve_notify_without_a_manager(project: Path, tmp_path: Path) -> None:
    """A manager that is gone, or cannot be spoken to, is a line of the log, and it serves."""
    log = tmp_path / "log"
    for address, said in (
        (f"{tmp_path}/none", "cannot notify the service manager"),
        ("vsock:2:1", "not notifying the service manager"),
    ):
        log.unlink(missing_ok=True)
        async with served(
            project, "--log-file", str(log), variables={"NOTIFY_SOCKET": address}
        ) as process:
            await wait_until_ready(log)
            with trio.fail_after(60):
                process.send_signal(signal.SIGTERM)
                assert await process.wait() == 0
            assert said in log.read_text()


def test_find_service_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --notify off, the environment is left alone."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/x")
    assert not find_service_manager(is_wanted=False)
    assert find_service_manager(is_wanted=True)
    assert "NOTIFY_SOCKET" not in os.environ
    monkeypatch.setenv("NOTIFY_SOCKET", "x")
    assert not find_service_manager(is_wanted=True)


async def always() -> bool:
    return True


async def test_notifier_does_not_wait_for_a_manager_that_reads_nothing(
    unix_socket_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """While the queue of the manager is full, messages are dropped after a while."""
    path = os.fspath(unix_socket_path)
    with (
        stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_DGRAM) as manager,
        stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_DGRAM) as other,
    ):
        manager.bind(path)
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                other.sendto(b"x", path)
        notifier = Notifier(ServiceManager(path))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(notifier.run, always)
            notifier.ready("x\n" * 3000)
            # Its end waits for a second.
            start = trio.current_time()
            await notifier.flush()
            assert 1 <= trio.current_time() - start < 2
            await trio.sleep(10)
            assert "has not read its messages for 5 seconds" in caplog.text
            nursery.cancel_scope.cancel()


async def test_notifier_without_free_descriptor(
    unix_socket_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a descriptor there are no heartbeats, and messages are dropped; both are logged."""
    notifier = Notifier(ServiceManager(str(unix_socket_path), watchdog_timeout=10))
    with limit_descriptors(0):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(notifier.run, always)
            notifier.status("x")
            with trio.fail_after(30):
                await notifier.flush()
            nursery.cancel_scope.cancel()
    assert "no heartbeats to the service manager: Too many open files" in caplog.text
    assert "cannot notify the service manager: [Errno 24]" in caplog.text


async def test_notifier_says_nothing_after_stopping() -> None:
    """What happens after a drain has begun is not told: systemd would ignore it."""
    async with open_service_manager() as fake:
        notifier = Notifier(ServiceManager.from_environ(dict(fake.environ)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(notifier.run, always)
            notifier.reloading("one")
            notifier.stopping("two")
            notifier.ready("three")
            with trio.fail_after(30):
                await fake.wait_for("STOPPING=1")
                await notifier.flush()
            nursery.cancel_scope.cancel()
        assert [each.assignments["STATUS"] for each in fake.received] == ["one", "two"]


################################################################
# Upgrades
################################################################


async def test_serve_notify_of_an_upgrade(project: Path) -> None:
    """RELOADING=1, MAINPID and a barrier of the old one; then READY=1 and the rest of the new."""
    arguments = ("--upgrade-socket", "up")
    async with (
        open_service_manager(watchdog_timeout=1) as fake,
        served(project, *arguments, variables=fake.environ) as process,
    ):
        with trio.fail_after(120):
            await fake.wait_for("READY=1")
            process.send_signal(signal.SIGUSR2)
            message = await fake.wait_for("RELOADING=1", "STATUS=upgrading")
            assert message.assignments["MONOTONIC_USEC"].isdecimal()
            await until(lambda: any("MAINPID" in each.assignments for each in fake.received))
            message = next(each for each in fake.received if "MAINPID" in each.assignments)
            pid = int(message.assignments["MAINPID"])
            assert pid != process.pid
            assert {"MAINPIDFDID", "MAINPIDFD"} & set(message.assignments)
            assert message.credentials is not None
            assert message.credentials.pid == process.pid
            message = await fake.wait_for("READY=1")
            assert message.credentials is not None
            assert message.credentials.pid == pid
            assert fake.status == f"1 workers at unix:{project}/s"
            assert await process.wait() == 0
            await fake.wait_for("WATCHDOG=1")
            # The successor says nothing before READY=1, and the old one nothing afterwards.
            pids = [each.credentials.pid for each in fake.received if each.credentials is not None]
            assert pids == sorted(pids, key=lambda each: each == pid)
            os.kill(pid, signal.SIGTERM)
            await fake.wait_for("STOPPING=1")
        assert fake.rejected == []


async def test_serve_notify_of_an_upgrade_that_fails(project: Path) -> None:
    """RELOADING=1, and READY=1 with that in the status."""
    async with (
        open_service_manager() as fake,
        served(project, "--upgrade-socket", "up", variables=fake.environ) as process,
    ):
        with trio.fail_after(120):
            await fake.wait_for("READY=1")
            (project / "app.py").write_text("raise RuntimeError('not today')\n")
            process.send_signal(signal.SIGUSR2)
            await fake.wait_for("RELOADING=1")
            message = await fake.wait_for("READY=1")
            assert message.assignments["STATUS"] == (
                f"1 workers at unix:{project}/s; the last upgrade failed, the old process goes on"
            )
            process.send_signal(signal.SIGTERM)
            await fake.wait_for("STOPPING=1")
            assert await process.wait() == 0
