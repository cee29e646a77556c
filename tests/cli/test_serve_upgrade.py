"""``serve --upgrade-socket`` and ``trio-unixconn upgrade``: a server replaced under its clients."""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests._helpers.cli import ended, run, started
from tests._helpers.http_clients import EXAMPLES, clients_of
from tests._helpers.serve_cli import Served, answer, hear_signals, make_project, serving
from tests._helpers.waiting import until_sync

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a directory with a module of handlers."""
    return make_project(tmp_path)


@contextmanager
def upgradable(project: Path, *arguments: str, **options: object) -> Generator[Served, None, None]:
    """Serve at ``s`` with an upgrade socket ``up`` and a pid file ``pid``; end all generations."""
    with serving(
        project, "once", "--upgrade-socket", "up", "--pid-file", "pid", *arguments, **options
    ) as served:
        try:
            yield served
        finally:
            end_last(project)


def end_last(project: Path) -> None:
    """End the generation that serves."""
    pid = pid_of(project)
    if pid is not None:
        with_pidfd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(with_pidfd, signal.SIGTERM)
            until_sync(lambda: not (project / "pid").exists())
        finally:
            os.close(with_pidfd)


def pid_of(project: Path) -> int | None:
    path = project / "pid"
    return int(path.read_text()) if path.exists() else None


def upgrade(project: Path, *arguments: str) -> int:
    """Upgrade, and return the pid of the successor."""
    done = run("upgrade", "up", *arguments, cwd=project)
    assert (done.returncode, done.stderr) == (0, "")
    return int(done.stdout)


def test_upgrade_replaces_the_server(project: Path) -> None:
    """The successor has new code, the same sockets, the pid file; the old one exits with 0."""
    with upgradable(project) as served:
        first = served.process.pid
        assert pid_of(project) == first
        assert answer(f"{project}/s") == b"one"
        (project / "app.py").write_text((project / "app.py").read_text().replace("one", "two"))
        second = upgrade(project)
        assert second != first
        assert answer(f"{project}/s") == b"two"
        until_sync(lambda: pid_of(project) == second)
        assert served.process.wait(60) == 0
        line = served.line("upgraded: ")
        assert re.search(
            rf"generation 2 \(pid {second}\) after \d+\.\d+ seconds, 1 listeners, 0 connections",
            line,
        )
        done = run("upgrade", "up", "--json", cwd=project)
        found = json.loads(done.stdout)
        assert found["number"] == 3
        until_sync(lambda: pid_of(project) == found["pid"])
    assert not (project / "s").exists()
    assert not (project / "up").exists()


def test_upgrade_keeps_keep_alive_clients(tmp_path: Path) -> None:
    """Connections that are kept alive move to the successor: none is closed, no request fails."""
    up, pid = f"{tmp_path}/up", tmp_path / "pid"
    with started(
        *("serve", "pool_http:handler", "--bind", "tcp:127.0.0.1:0", "--workers", "2"),
        *("--upgrade-socket", up, "--pid-file", str(pid)),
        cwd=EXAMPLES,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=hear_signals,
    ) as process:
        served = Served(process, EXAMPLES)
        found = re.search(r":(\d+)\n", served.line("listening at"))
        assert found
        served.line("ready: ")
        with clients_of(int(found[1]), 8) as clients:
            for number in range(2, 5):
                done = run("upgrade", up)
                assert (done.returncode, done.stderr) == (0, "")
                workers = re.findall(r"\d+", served.line("ready: workers").partition("workers")[2])
                for each in clients:
                    until_sync(
                        lambda each=each, workers=workers: each.worker in workers or each.failures  # type: ignore[misc]
                    )
                assert f"generation {number} " in served.line("upgraded: ")
                assert " 8 connections passed on" in served.lines[-1]
            assert [each.connections for each in clients] == [1] * len(clients)
            end_last(tmp_path)
        assert [each.failures for each in clients] == [[]] * len(clients)
        assert ended(process).returncode == 0
