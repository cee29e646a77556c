"""``trio-unixconn serve --chdir``, and servers that are started where little is there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests._helpers.cli import COMMAND, ended, run
from tests._helpers.environment import environment
from tests._helpers.serve_cli import (
    answer,
    make_project,
    program_in_a_deleted_directory,
    serving,
    starting,
)
from tests._helpers.waiting import until_sync
from trio_unixconn._cli.serve.directory import WorkingDirectory, put_current_directory_on_path

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a directory with a module of handlers, to run a server in."""
    return make_project(tmp_path)


# A handler that answers with its release, and with what it finds in its current directory.
RELEASE = """
async def tell(stream, job):
    await stream.receive_some(100)
    await stream.send_all(("NUMBER " + open("data").read()).encode())
"""


def release(directory: Path, number: int) -> Path:
    """Make a release, whose answers have its number."""
    path = directory / f"release-{number}"
    path.mkdir()
    (path / "released.py").write_text(RELEASE.replace("NUMBER", str(number)))
    (path / "data").write_text(f"data-{number}")
    return path


def switch(current: Path, to: Path) -> None:
    """Let a symbolic link name another release, as a deployment does."""
    new = current.with_name("new")
    new.symlink_to(to)
    new.rename(current)


def test_chdir_is_resolved_by_each_restart(tmp_path: Path) -> None:
    """A symbolic link that was switched, and SIGHUP: the new release serves, code and files."""
    current, path = tmp_path / "current", str(tmp_path / "s")
    switch(current, release(tmp_path, 1))
    arguments = ("--stats-socket", "stats", "--pid-file", "pid", "--log-file", "log")
    chdir = ("--chdir", "current")
    with starting(tmp_path, "released:tell", *chdir, *arguments) as served:
        log = tmp_path / "log"
        until_sync(lambda: log.exists() and "ready: " in log.read_text())
        # Paths of the command line do not move with the release.
        assert {"s", "stats", "pid", "log"} < set(os.listdir(tmp_path))
        assert answer(path) == b"1 data-1"
        second = release(tmp_path, 2)
        switch(current, second)
        assert answer(path) == b"1 data-1"
        served.send(signal.SIGHUP)
        until_sync(lambda: log.read_text().count("restarted: ") == 1)
        assert answer(path) == b"2 data-2"
        # The first one can be deleted now.
        shutil.rmtree(tmp_path / "release-1")
        served.send(signal.SIGTTIN)
        until_sync(lambda: "changed: " in log.read_text())
        assert answer(path) == b"2 data-2"
        served.drained()
    assert not {"s", "stats", "pid"} & set(os.listdir(tmp_path))


def test_chdir_keeps_the_release_if_the_new_one_cannot_start(tmp_path: Path) -> None:
    """While the new release is broken or missing, a replaced worker is of the old one, too."""
    current, path = tmp_path / "current", str(tmp_path / "s")
    switch(current, release(tmp_path, 1))
    with starting(tmp_path, "released:tell", "--chdir", "current") as served:
        served.line("ready: ")
        broken = release(tmp_path, 2)
        (broken / "released.py").write_text("this is not Python (")
        switch(current, broken)
        served.send(signal.SIGHUP)
        served.line("SyntaxError")
        served.line("the old workers go on")
        current.unlink()
        served.send(signal.SIGHUP)
        assert f"{current}: No such file or directory" in served.line("the old workers go on")
        served.send(signal.SIGTTIN)
        served.line("changed: ")
        assert answer(path) == b"1 data-1"
        assert answer(path) == b"1 data-1"
        served.drained()


def test_chdir_that_is_missing(project: Path) -> None:
    """A directory that is not there is a line and exit status 1."""
    done = run("serve", "app:once", "--bind", "unix:s", "--chdir", "no", cwd=project)
    assert done.returncode == 1
    assert done.stderr == "trio-unixconn: --chdir no: No such file or directory\n"


def test_working_directory_entered_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the block raises, the current directory and the import path are those from before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    first, second = release(tmp_path, 1), release(tmp_path, 2)
    directory = WorkingDirectory("current")
    switch(tmp_path / "current", first)
    assert directory.enter() == str(first)
    switch(tmp_path / "current", second)
    with pytest.raises(ValueError, match="no"), directory.entered():
        assert (os.getcwd(), sys.path[0]) == (str(second), str(second))
        assert str(first) not in sys.path
        raise ValueError("no")
    assert (os.getcwd(), sys.path[0]) == (str(first), str(first))
    # Other code may have removed it.
    sys.path.remove(str(first))
    with directory.entered():
        assert os.getcwd() == str(second)
    assert sys.path.count(str(second)) == 1


def test_put_current_directory_on_path_in_a_deleted_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is put there if the current directory was deleted."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(sys, "path", ["/x"])
    put_current_directory_on_path()
    assert sys.path == ["/x"]


################################################################
# Where little is there
################################################################


@pytest.mark.usefixtures("unmeasured_processes")  # coverage wants a current directory
def test_serve_in_a_deleted_directory(project: Path) -> None:
    """With absolute paths and an importable handler it serves; a relative path is a line."""
    program, env = program_in_a_deleted_directory(project), environment(project)
    bind = f"unix:{project}/s"
    with serving(project, "once", bind=bind, program=program, env=env) as served:
        assert answer(str(project / "s")) == b"one"
        served.drained()
    for option in ("--log-file", "--pid-file", "--chdir", "--upgrade-socket"):
        arguments = ("serve", "app:once", "--bind", bind, "--workers", "1", option, "x")
        done = run(*arguments, program=program, env=env)
        assert done.returncode == 1
        said = "x: the current directory was deleted; use an absolute path"
        assert done.stderr == f"trio-unixconn: {said}\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_serve_with_closed_standard_streams(project: Path, closed: str) -> None:
    """Whichever of standard input, output and error the parent has closed, it serves and drains."""
    program = ["sh", "-c", f'exec "$@" {closed}', "-", *COMMAND]
    with starting(project, "app:once", "--log-file", "log", program=program) as served:
        log = project / "log"
        until_sync(lambda: log.exists() and "ready: " in log.read_text())
        assert answer(str(project / "s")) == b"one"
        served.send(signal.SIGTERM)
        done = ended(served.process)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "drained: 1 accepted" in log.read_text()


def test_serve_with_closed_standard_streams_reports_an_error(project: Path) -> None:
    """The exit status is right even if there is nowhere to print."""
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "-", *COMMAND]
    done = subprocess.run(
        [*command, "serve", "nothing_there:x", "--bind", "unix:s"], cwd=project, check=False
    )
    assert done.returncode == 1


def test_serve_without_proc(project: Path) -> None:
    """Where /proc is not mounted, it serves, restarts and drains."""
    if os.geteuid() != 0:
        pytest.skip("needs root for a mount namespace")
    program = ["unshare", "-m", "sh", "-c", 'umount -l /proc && exec "$@"', "-", *COMMAND]
    with serving(project, "once", program=program) as served:
        assert answer(str(project / "s")) == b"one"
        served.send(signal.SIGHUP)
        served.line("restarted: ")
        assert answer(str(project / "s")) == b"one"
        served.drained()
