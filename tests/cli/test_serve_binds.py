"""Access to what ``trio-unixconn serve`` binds, and servers that replace each other."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests._helpers.cli import ended, run, run_in_this_process
from tests._helpers.serve_cli import (
    APP,
    answer,
    connected,
    make_project,
    rest_of,
    serving,
    starting,
)
from tests._helpers.waiting import until_sync
from trio_unixconn._cli.serve import binds
from trio_unixconn._cli.serve.pid_file import pid_file

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

pytestmark = pytest.mark.slow

UID, GID = os.geteuid(), os.getegid()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a directory with a module of handlers, to run a server in."""
    return make_project(tmp_path)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


################################################################
# --mode, --owner, --group
################################################################


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        ((), 0o600),
        (("--owner", str(UID)), 0o600),
        (("--group", str(GID)), 0o660),
        (("--allow-user", str(UID)), 0o666),
        (("--allow-group", str(GID), "--group", str(GID)), 0o666),
        (("--mode", "640", "--group", str(GID), "--allow-user", str(UID)), 0o640),
    ],
)
def test_serve_mode_of_paths(project: Path, arguments: tuple[str, ...], mode: int) -> None:
    """--mode counts; without it, --group, --allow-user and --allow-group let others in."""
    with serving(project, "once", *arguments) as served:
        assert mode_of(project / "s") == mode
        assert answer(str(project / "s")) == b"one"
        served.drained()


@pytest.mark.parametrize(("owner", "group"), [("nobody", "nogroup"), ("65534", "65534")])
def test_serve_owner_and_group_of_paths(project: Path, owner: str, group: str) -> None:
    """Every path that is bound gets them, given as a name or a number; --stats-socket does not."""
    if UID != 0:
        pytest.skip("needs root to give a file to another user")
    arguments = ["--owner", owner, "--group", group, "--bind", "unix:t", "--stats-socket", "stats"]
    arguments += ["--bind", f"unix:@trio_unixconn-owner-{os.getpid()}"]
    with serving(project, "once", *arguments) as served:
        for name in ("s", "t"):
            status = (project / name).stat()
            assert (status.st_uid, status.st_gid) == (65534, 65534)
            assert mode_of(project / name) == 0o660
        assert (project / "stats").stat().st_uid == 0
        assert mode_of(project / "stats") == 0o600
        served.drained()
    assert [path.name for path in project.iterdir()] == ["app.py"]


def test_serve_owner_that_is_not_permitted(project: Path) -> None:
    """What only root can do is a line and exit status 1, and the path is gone."""
    if UID == 0:
        pytest.skip("root is permitted everything")
    done = run("serve", "app:once", "--bind", "unix:s", "--owner", "0", cwd=project)
    assert done.returncode == 1
    assert "cannot set owner=0" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in project.iterdir()] == ["app.py"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["unix:s", "--owner", "no one"], "--owner: no such user: 'no one'"),
        (["unix:s", "--group", "no one"], "--group: no such group: 'no one'"),
        (["unix:s", "--owner", "-1"], "--owner: no such user: '-1'"),
        (
            ["unix:s", "--owner", "4294967295"],
            "--owner: expected a name or a number from 0 to 4294967294, got 4294967295",
        ),
        (["unix:s", "--allow-user", "0", "--allow-user", ""], "--allow-user: no such user: ''"),
        (["unix:s", "--allow-group", "no one"], "--allow-group: no such group: 'no one'"),
        (
            ["unix:s", "--allow-group", "99999999999"],
            "--allow-group: expected a name or a number from 0 to 4294967294, got 99999999999",
        ),
        (["tcp:localhost:0", "--mode", "600"], "--mode can only be used with --bind unix:PATH"),
        (["unix:@x", "--owner", "0"], "--owner can only be used with --bind unix:PATH"),
        (["fd:0", "--group", "0"], "--group can only be used with --bind unix:PATH"),
        (["unix:@x", "--replace"], "--replace can only be used with --bind unix:PATH"),
        (
            ["tcp:localhost:0", "--allow-user", "0"],
            "--allow-user can only be used with a Unix socket; the peer of a TCP connection",
        ),
        (["tcp:[::1]:0", "--allow-group", "0"], "--allow-group can only be used with a Unix"),
        (["unix:s", "--bind", "unix:./s"], "--bind unix:./s: this is given twice"),
        (["unix:@x", "--bind", "unix:@x"], "--bind unix:@x: this is given twice"),
        (["fd:3", "--bind", "fd:3"], "--bind fd:3: this is given twice"),
        (
            ["tcp:localhost:80", "--bind", "tcp:localhost:80"],
            "--bind tcp:localhost:80: this is given twice",
        ),
        (["unix:s", "--reload-exclude", "x"], "--reload-exclude can only be used with --reload"),
        (["unix:s", "--reload-include", "x"], "--reload-include can only be used with --reload"),
    ],
)
def test_serve_rejects_options_without_effect(
    project: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown name, or an option that can have no effect, is a line and exit status 2."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", [*sys.path])
    done = run_in_this_process("serve", "app:once", "--bind", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in project.iterdir()] == ["app.py"]


def test_serve_allow_user_with_inherited_tcp_socket(project: Path) -> None:
    """--allow-user knows the family of an inherited socket."""
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        fd = tcp.fileno()
        arguments = ("--bind", f"fd:{fd}", "--allow-user", "0")
        done = run("serve", "app:once", *arguments, cwd=project, pass_fds=[fd])
    assert done.returncode == 2
    assert "--allow-user can only be used with a Unix socket" in done.stderr


def test_serve_allow_user_with_a_closed_descriptor(project: Path) -> None:
    """A file descriptor that is not open is reported as that."""
    done = run("serve", "app:once", "--bind", "fd:999", "--allow-user", "0", cwd=project)
    assert done.returncode == 1
    assert "descriptor 999 is not open" in done.stderr


def test_id_prefers_a_name() -> None:
    """A user whose name consists of digits is meant by these, as by chown(1)."""
    assert binds._id("--owner", "12", {"12": 34}.__getitem__) == 34


def test_check_different_in_a_deleted_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path is compared as it is if the current directory was deleted."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    binds.check_different(bind=[binds.read_bind("unix:s"), binds.read_bind("unix:t")])


################################################################
# --allow-user, --allow-group
################################################################


@pytest.mark.parametrize(
    ("arguments", "admitted"),
    [
        (("--allow-user", str(UID)), True),
        (("--allow-user", str(UID + 1)), False),
        (("--allow-user", str(UID + 1), "--allow-user", str(UID)), True),
        (("--allow-group", str(GID)), True),
        (("--allow-user", str(UID + 1), "--allow-group", str(GID)), True),
        (("--allow-group", str(GID + 100_000)), False),
    ],
)
def test_serve_allow_user_and_group(
    project: Path, arguments: tuple[str, ...], *, admitted: bool
) -> None:
    """Paths, abstract names and inherited sockets admit only the named users; this is logged.

    TCP is as it was.
    """
    name = f"trio_unixconn-allow-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(project / "u"))
        unix.listen()
        extra = ["--bind", f"unix:@{name}", "--bind", f"fd:{unix.fileno()}"]
        extra += ["--bind", "tcp:127.0.0.1:0"]
        with serving(project, "hold", *extra, *arguments, pass_fds=[unix.fileno()]) as served:
            port = re.search(r"tcp:127\.0\.0\.1:(\d+)", "".join(served.lines))
            assert port
            for address in (str(project / "s"), "\0" + name, str(project / "u")):
                with connected(address) as client:
                    assert client.recv(4) == (b"held" if admitted else b"")
                if not admitted:
                    line = served.line("denied")
                    assert "WARNING" in line
                    assert "PeerPolicy(" in line
            with connected(("127.0.0.1", int(port[1]))) as client:
                assert client.recv(4) == b"held"
            told = served.drained()
    assert f"4 accepted, {0 if admitted else 3} denied" in told


################################################################
# --replace
################################################################

# Handlers that answer with the process id of their server.
WHICH = (
    APP
    + """
import json
import os

async def which(stream, job):
    await stream.receive_some(100)
    await stream.send_all(str(os.getppid()).encode())
"""
)


class Load:
    """Threads that connect to a path, one connection after the other, until the end."""

    def __init__(self, path: str) -> None:
        self.answers: Counter[str] = Counter()
        self.errors: list[str] = []
        self._path = path
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(4)]
        for each in self._threads:
            each.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.answers[answer(self._path).decode()] += 1
            except OSError as exc:
                self.errors.append(str(exc))

    def end(self) -> None:
        self._stop.set()
        for each in self._threads:
            each.join()


@contextmanager
def load_on(path: Path) -> Generator[Load, None, None]:
    load = Load(str(path))
    try:
        yield load
    finally:
        load.end()


def test_serve_replace_under_load(project: Path) -> None:
    """Servers replace each other, reload and drain: every connection is answered, none fails."""
    (project / "app.py").write_text(WHICH)
    common = ("--pid-file", "pid", "--stats-socket", "stats")
    arguments = (*common, "--bind", "unix:t", "--replace")
    pid = project / "pid"
    with (
        serving(project, "which", *common) as first,
        load_on(project / "s") as load,
        serving(project, "which", *arguments) as second,
    ):
        # The first one goes on, but gets no new clients.
        until_sync(lambda: load.answers[str(second.process.pid)] > 100)
        assert pid.read_text() == f"{second.process.pid}\n"
        first.drained()
        second.send(signal.SIGHUP)
        second.line("restarted: ")
        with serving(project, "which", *arguments) as third:
            second.send(signal.SIGTERM)
            assert ended(second.process).returncode == 0
            until_sync(lambda: load.answers[str(third.process.pid)] > 100)
            assert pid.read_text() == f"{third.process.pid}\n"
            with connected(str(project / "stats")) as client:
                client.sendall(b"json\n")
                assert b"workers" in rest_of(client)
            load.end()
            third.drained()
    assert load.errors == []
    assert set(load.answers) == {str(each.process.pid) for each in (first, second, third)}
    assert [path.name for path in project.iterdir()] == ["app.py"]


def test_serve_replace_where_no_server_is(project: Path) -> None:
    """--replace takes a path that is free, or that a crash has left."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(project / "s"))
    with serving(project, "once", "--replace") as served:
        assert answer(str(project / "s")) == b"one"
        served.drained()
    with serving(project, "once", "--replace") as served:
        assert answer(str(project / "s")) == b"one"
        served.drained()


@pytest.mark.parametrize(
    ("handler", "extra", "said"),
    [
        ("missing:once", "unix:t", "No module named 'missing'"),
        ("app:once", "tcp:127.0.0.1:PORT", "in use"),
        ("app:once", "unix:app.py", "not a socket"),
        ("app:once", "unix:nothing/t", "No such file"),
        ("app:once", "unix:t --stats unix:app.py", "not a socket"),
        ("app:once", "unix:t --pid-file app.py", "another file"),
    ],
)
def test_serve_replace_that_fails(project: Path, handler: str, extra: str, said: str) -> None:
    """A server that cannot start leaves paths, pid file and statistics to the one that serves."""
    arguments = ["--pid-file", "pid", "--stats-socket", "stats"]
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        serving(project, "once", *arguments) as served,
    ):
        where, *more = extra.replace("PORT", str(tcp.getsockname()[1])).split()
        # Those of the other server come first.
        done = run(
            *("serve", handler, "--bind", "unix:s", "--bind", where, "--workers", "1"),
            *("--replace", *(arguments[2:] if "--pid-file" in more else arguments), *more),
            cwd=project,
        )
        assert done.returncode == 1
        assert said in done.stderr
        assert answer(str(project / "s")) == b"one"
        assert (project / "pid").read_text() == f"{served.process.pid}\n"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(project / "stats"))
            assert json.loads(client.makefile().read())["state"] == "ready"
        assert "1 accepted" in served.drained()


def test_serve_replace_signalled_before_it_is_ready(project: Path) -> None:
    """A signal before the workers are ready leaves the other server as it is."""
    (project / "slow.py").write_text("print('importing', flush=True); import time; time.sleep(999)")
    with serving(project, "once") as served:
        with starting(project, "slow:handler", "--replace") as other:
            other.line("importing")
            other.send(signal.SIGTERM)
            assert ended(other.process).returncode == 128 + signal.SIGTERM
        assert answer(str(project / "s")) == b"one"
        served.drained()


def test_pid_file_replace(tmp_path: Path) -> None:
    """A held file is replaced; its holder removes only its own. Another kind of file stays."""
    path = tmp_path / "pid"
    script = (
        "import sys; from trio_unixconn._cli.serve.pid_file import pid_file\n"
        "with pid_file(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pid_file(str(path), replace=True):
            assert path.read_text() == f"{os.getpid()}\n"
            process.communicate(timeout=60)
            assert path.read_text() == f"{os.getpid()}\n"
    assert os.listdir(tmp_path) == []
    path.write_text("mine")
    with (
        pytest.raises(FileExistsError, match="got another file"),
        pid_file(str(path), replace=True),
    ):
        pass
    assert path.read_text() == "mine"
