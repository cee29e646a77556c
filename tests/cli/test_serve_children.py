"""``trio-unixconn serve`` as process 1, and its ``--pid-file``."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests._helpers.cli import COMMAND, ended, run
from tests._helpers.processes import children_of
from tests._helpers.serve_cli import answer, make_project, serving, starting
from tests._helpers.waiting import until, until_sync
from trio_unixconn._cli.serve import children
from trio_unixconn._cli.serve.children import reap_adopted_children, zombies
from trio_unixconn._cli.serve.pid_file import pid_file

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a directory with a module of handlers, to run a server in."""
    return make_project(tmp_path)


# A handler that starts ten processes and does not wait for them, as a shell that runs something
# in the background.
ORPHANS = """
import subprocess

async def once(stream, job):
    await stream.receive_some(100)
    for _ in range(10):
        subprocess.run(["sh", "-c", "sleep 0.2 &"])
    await stream.send_all(b"one")
"""


def test_process_1_reaps_adopted_children(project: Path) -> None:
    """As process 1, it reaps what handlers have left, and knows how its workers have ended."""
    if os.geteuid() != 0:
        pytest.skip("needs root for a pid namespace")
    (project / "app.py").write_text(ORPHANS)
    program = ["unshare", "-pf", "--mount-proc", *COMMAND]
    with starting(project, "app:once", program=program) as served:
        served.line("(pid 1)")
        worker = int(re.findall(r"workers (\d+)", served.line("ready: "))[0])
        (server,) = children_of(served.process.pid)
        try:
            for _ in range(3):
                assert answer(str(project / "s")) == b"one"
            # All of them have ended, and are reaped.
            until_sync(lambda: list(children_of(server).values()) == ["S"])
            (outside,) = children_of(server)
            os.kill(outside, signal.SIGKILL)
            assert f"(pid {worker})" in (line := served.line("SIGKILL"))
            assert "WARNING" in line
            until_sync(lambda: answer(str(project / "s")) == b"one")
        finally:
            os.kill(server, signal.SIGTERM)
        done = ended(served.process)
    assert (done.returncode, done.stderr) == (0, "")


async def test_reap_adopted_children_leaves_own_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker stays for the pool to reap, and what was there before the start is reaped."""
    monkeypatch.setattr(children, "GRACE", 0.01)
    own = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    other = subprocess.Popen([sys.executable, "-c", ""])
    with trio.fail_after(60):
        await until(lambda: zombies() >= {own.pid, other.pid})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reap_adopted_children, lambda: {own.pid})
            await until(lambda: zombies() == {own.pid})
            assert own.wait() == 3
            # ECHILD, which subprocess takes for success.
            assert other.wait() == 0
            nursery.cancel_scope.cancel()
    assert zombies() == set()


def test_zombies_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc, zombies are found one at a time."""

    def fail(_: str) -> list[str]:
        raise FileNotFoundError

    process = subprocess.Popen([sys.executable, "-c", ""])
    until_sync(lambda: process.pid in zombies())
    monkeypatch.setattr(os, "listdir", fail)
    assert zombies() == {process.pid}
    process.wait()


################################################################
# --pid-file
################################################################


def test_pid_file_is_there_while_serving(project: Path) -> None:
    """The file has the process id when the server is ready, and is removed at the end."""
    with serving(project, "once", "--pid-file", "pid") as served:
        assert (project / "pid").read_text() == f"{served.process.pid}\n"
        served.drained()
    assert [path.name for path in project.iterdir()] == ["app.py"]


def test_pid_file_that_another_server_holds(project: Path) -> None:
    """A second server with the same file is a line and exit status 1; the first one goes on."""
    with serving(project, "once", "--pid-file", "pid") as served:
        done = run("serve", "app:once", "--bind", "unix:t", "--pid-file", "pid", cwd=project)
        assert done.returncode == 1
        said = f"{project}/pid: another server holds it (pid {served.process.pid})"
        assert done.stderr == f"trio-unixconn: {said}\n"
        assert answer(str(project / "s")) == b"one"
        assert (project / "pid").read_text() == f"{served.process.pid}\n"
        served.drained()


@pytest.mark.parametrize("content", [b"", b"1\n", b"99999999\n"])
def test_pid_file_that_is_stale_is_replaced(tmp_path: Path, content: bytes) -> None:
    """A file of a process that is gone is replaced, even if its number is a process's again."""
    path = tmp_path / "pid"
    path.write_bytes(content)
    with pid_file(str(path)):
        assert path.read_text() == f"{os.getpid()}\n"
        assert os.listdir(tmp_path) == ["pid"]
    assert os.listdir(tmp_path) == []


def test_pid_file_of_another_kind_is_kept(tmp_path: Path) -> None:
    """A file with something else in it is an error, and stays."""
    path = tmp_path / "pid"
    path.write_text("precious\n")
    with pytest.raises(OSError, match="expected a file with a process id"), pid_file(str(path)):
        pass
    assert path.read_text() == "precious\n"
    assert os.listdir(tmp_path) == ["pid"]


def test_pid_file_that_cannot_be_written(tmp_path: Path) -> None:
    """A missing directory, and a directory at the path, are errors that name the path."""
    for name in ("no/pid", "."):
        path = str(tmp_path / name)
        with pytest.raises(OSError, match=re.escape(os.path.abspath(path))), pid_file(path):
            pass
    assert os.listdir(tmp_path) == []


def test_pid_file_of_another_program_is_kept(tmp_path: Path) -> None:
    """A file that another program has put at the path meanwhile is not removed."""
    path = tmp_path / "pid"
    with pid_file(str(path)):
        path.unlink()
        path.write_text("1\n")
    assert path.read_text() == "1\n"


def test_pid_file_is_replaced_after_a_crash(tmp_path: Path) -> None:
    """What a process of the same number has left is not an obstacle."""
    path = tmp_path / "pid"
    (tmp_path / f"pid.{os.getpid()}.new").write_text("")
    with pid_file(str(path)):
        assert os.listdir(tmp_path) == ["pid"]
    assert os.listdir(tmp_path) == []


def test_pid_file_that_vanishes_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server that removes or replaces its file at the same time is not an error."""
    path, link, flock = tmp_path / "pid", os.link, fcntl.flock
    steps = ["exists", "unlinked", "replaced"]

    def racing_link(source: str, target: str) -> None:
        if steps and steps[0] == "exists":
            steps.pop(0)
            # And it is gone when it is opened.
            raise FileExistsError
        link(source, target)

    def racing_flock(file: int, operation: int) -> None:
        flock(file, operation)
        if os.fstat(file).st_size == 0 and steps:
            step = steps.pop(0)
            path.unlink()
            if step == "replaced":
                path.write_text("1\n")

    monkeypatch.setattr(os, "link", racing_link)
    monkeypatch.setattr(fcntl, "flock", racing_flock)
    with pid_file(str(path)):
        assert path.read_text() == f"{os.getpid()}\n"
    for _ in range(2):
        path.write_text("")
        with pid_file(str(path)):
            assert path.read_text() == f"{os.getpid()}\n"
    assert steps == []
    assert os.listdir(tmp_path) == []


def test_zombie_of_a_process_that_is_gone() -> None:
    """A process that is gone while it is looked at is not a zombie."""
    assert not children._is_zombie_of("0", 1)


def test_pid_file_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --pid-file nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pid_file(None):
        assert os.listdir() == []


def test_pid_file_is_locked(tmp_path: Path) -> None:
    """The lock is held in the block only."""
    path = tmp_path / "pid"
    with pid_file(str(path)), open(path) as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
