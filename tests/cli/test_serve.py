"""``trio-unixconn serve``, run as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from watchfiles import Change

from tests._helpers.cli import COMMAND, ended, run, run_in_this_process
from tests._helpers.environment import environment
from tests._helpers.serve_cli import (
    APP,
    SIGNALS,
    Served,
    Terminal,
    answer,
    connected,
    hear_signals,
    make_project,
    program_in_a_deleted_directory,
    rest_of,
    serving,
    starting,
    write_program,
)
from tests._helpers.waiting import until_sync
from trio_unixconn._cli.serve import command
from trio_unixconn._cli.serve.reload import ReloadFilter, directories_of

if TYPE_CHECKING:
    from collections.abc import Generator

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a directory with a module of handlers, to run a server in."""
    return make_project(tmp_path)


################################################################
# Serving, and the end
################################################################


def test_several_binds(project: Path) -> None:
    """Each kind of address is served and printed as it is, and a drain ends with status 0."""
    name = f"@trio_unixconn-{os.getpid()}"
    binds = ["tcp:127.0.0.1:0", "tcp:[::1]:0", f"unix:{name}", f"unix:{project}/%61bs"]
    arguments = [part for each in binds for part in ("--bind", each)]
    with serving(project, "once", *arguments, "--mode", "640") as served:
        text = "".join(served.lines)
        four = re.search(r"listening at tcp:127\.0\.0\.1:(\d+)\n", text)
        six = re.search(r"listening at tcp:\[::1\]:(\d+)\n", text)
        assert four
        assert six
        assert f"listening at unix:{name}\n" in text
        assert f"serves app:once (pid {served.process.pid})" in text
        addresses: list[Any] = [("127.0.0.1", int(four[1])), ("::1", int(six[1]), 0, 0)]
        addresses += ["\0" + name[1:], str(project / "abs"), str(project / "s")]
        for each in addresses:
            assert answer(each) == b"one"
        assert (project / "abs").stat().st_mode & 0o777 == 0o640
        told = served.drained()
    assert re.search(r"INFO: received SIGTERM, draining \d running and 0 queued jobs", told)
    assert "drained: 5 accepted, 0 denied, 5 handled, 0 failed, 0 abandoned, 0 rejected" in told
    assert sorted(path.name for path in project.iterdir()) == ["app.py"]


def test_accept_workers(project: Path) -> None:
    """With --accept workers, workers accept; restarts and a drain are as ever."""
    options = ("--accept", "workers", "--allow-user", str(os.getuid()))
    with serving(project, "once", *options) as served:
        assert answer(str(project / "s")) == b"one"
        served.send(signal.SIGHUP)
        served.line("restarted")
        assert answer(str(project / "s")) == b"one"
        told = served.drained()
    assert "drained: 2 accepted, 0 denied, 2 handled, 0 failed, 0 abandoned, 0 rejected" in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_drain_finishes_what_was_accepted(project: Path, number: signal.Signals) -> None:
    """Connections that are handled, or queued, are answered, and the exit status is 0."""
    with serving(project, "hold", "--max-in-flight", "1") as served:
        first, second = connected(str(project / "s")), connected(str(project / "s"))
        with first, second:
            assert first.recv(4) == b"held"
            served.send(number)
            assert f"received {number.name}, draining 1 running" in served.line("draining")
            # One more restart makes no difference while draining.
            served.send(signal.SIGHUP)
            for client in (first, second):
                client.sendall(b"x")
                assert rest_of(client).endswith(b"one")
        done = ended(served.process)
    assert (done.returncode, done.stderr) == (0, "")
    assert "drained: 2 accepted, 0 denied, 2 handled" in done.stdout


def test_serve_second_sigint_exits_immediately(project: Path) -> None:
    """After a second, another signal ends it, with its exit status, though a handler is running."""
    with serving(project, "hold") as served, connected(str(project / "s")) as client:
        assert client.recv(4) == b"held"
        served.send(signal.SIGTERM)
        served.line("draining")
        served.send_again(signal.SIGINT)
        done = ended(served.process)
        assert done.returncode == 128 + signal.SIGINT
        assert done.stderr == "trio-unixconn: interrupted\n"
    assert not (project / "s").exists()


def test_a_drain_has_a_deadline(project: Path) -> None:
    """After --drain-timeout a handler is cancelled, which is counted, and the status is 0."""
    with (
        serving(project, "hold", "--drain-timeout", "0.1") as served,
        connected(str(project / "s")) as client,
    ):
        assert client.recv(4) == b"held"
        told = served.drained()
    assert "1 failed" in told


def test_a_signal_before_it_is_ready(project: Path) -> None:
    """It ends at once, and nothing is left, also not a worker that is being started."""
    (project / "slow.py").write_text("import time; time.sleep(1000)")
    with starting(project, "slow:handler", "--stats-socket", "stats") as served:
        served.line("listening at unix:s")
        served.send(signal.SIGTERM)
        done = ended(served.process)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == "trio-unixconn: ended by SIGTERM\n"
    assert {path.name for path in project.iterdir()} == {"app.py", "slow.py"}


def test_ignored_signals_stay_ignored(project: Path) -> None:
    """What nohup has ignored restarts nothing."""

    def nohup() -> None:
        hear_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with serving(project, "once", preexec_fn=nohup) as served:
        served.send(signal.SIGHUP)
        assert answer(str(project / "s")) == b"one"
        assert "restart" not in served.drained()


def test_nobody_reads_what_it_says(project: Path) -> None:
    """The server continues without output after the reader of its standard output has closed it."""
    with serving(project, "fail") as served:
        assert served.process.stdout is not None
        served.process.stdout.close()
        for _ in range(3):
            assert answer(str(project / "s")) == b""
        served.send(signal.SIGTERM)
        assert served.process.stderr is not None
        assert served.process.stderr.read() == ""
        assert served.process.wait(60) == 0
        served.process.stdout = None


def test_from_a_script(project: Path) -> None:
    """The current directory is found even if Python has only the script's directory."""
    program = [sys.executable, str(write_program(project.parent))]
    with serving(project, "once", program=program) as served:
        assert answer(str(project / "s")) == b"one"
        served.drained()


################################################################
# Restarts and deaths
################################################################


def test_restart(project: Path) -> None:
    """SIGHUP brings in the new code; while that is broken, the old workers go on."""
    with serving(project, "once") as served:
        served.send(signal.SIGHUP)
        assert "SIGHUP: restarting" in served.line("restarting")
        assert "restarted: workers " in served.line("restarted")
        (project / "app.py").write_text(APP.replace("one", "the second"))
        served.send(signal.SIGHUP)
        served.line("restarted")
        assert answer(str(project / "s")) == b"the second"
        (project / "app.py").write_text("this is not Python (")
        served.send(signal.SIGHUP)
        served.line("ERROR")
        served.line("SyntaxError")
        served.line("the old workers go on")
        assert answer(str(project / "s")) == b"the second"
        (project / "app.py").write_text(APP.replace("one", "the third"))
        served.send(signal.SIGHUP)
        served.line("restarted")
        assert answer(str(project / "s")) == b"the third"
        assert "3 accepted, 0 denied, 3 handled" in served.drained()


def test_a_worker_that_is_killed(project: Path) -> None:
    """It is said and replaced, and the server goes on."""
    with serving(project, "once") as served:
        pid = int(re.findall(r"workers (\d+)", served.lines[-1])[0])
        os.kill(pid, signal.SIGKILL)
        line = served.line("SIGKILL")
        assert "WARNING" in line
        assert "another one is started" in line
        assert answer(str(project / "s")) == b"one"
        served.drained()


def test_workers_that_cannot_live(project: Path) -> None:
    """A crash loop ends the server with its cause, and exit status 1; no traceback of ours."""

    def deaf() -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)

    arguments = ("--crash-limit", "1")
    with serving(project, "once", *arguments, preexec_fn=deaf) as served:
        # Without a job: one that kills its worker never ends the server.
        os.kill(int(re.findall(r"workers (\d+)", served.lines[-1])[0]), signal.SIGKILL)
        done = ended(served.process)
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first.startswith("trio-unixconn: 1 consecutive workers crashed")
    assert "SIGKILL" in second
    assert not (project / "s").exists()


def test_a_handler_that_cannot_be_imported(project: Path) -> None:
    """The worker's traceback, one clear line, exit status 1, and nothing is left."""
    (project / "broken.py").write_text("import nothing_of_that_name\n")
    arguments = ("--bind", "unix:s", "--stats-socket", "stats", "--workers", "2")
    done = run("serve", "broken:handler", *arguments, cwd=project)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines.count(lines[0]) == 1
    assert "import nothing_of_that_name" in done.stderr
    assert re.fullmatch(
        r"trio-unixconn: worker \d could not start: "
        r"ModuleNotFoundError: No module named 'nothing_of_that_name'",
        lines[-1],
    )
    assert "_cli" not in done.stderr
    assert {path.name for path in project.iterdir()} <= {"app.py", "broken.py", "__pycache__"}


################################################################
# Mistakes
################################################################


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--bind", "127.0.0.1:80"],
            "expected tcp:HOST:PORT, unix:PATH, unix:@NAME, fd:N, systemd or systemd:NAME",
        ),
        (["--bind", "fd:x"], "systemd or systemd:NAME, got fd:x"),
        (["--bind", "tcp::8000"], "every address of this machine is 0.0.0.0 or [::]"),
        (["--bind", "tcp:::1:8000"], "with an address of IPv6 in brackets"),
        (["--bind", "tcp:8000"], "expected tcp:HOST:PORT, with"),
        (["--bind", "tcp:localhost:http"], "a port is a number from 0 to 65535"),
        (["--bind", "tcp:localhost:65536"], "a port is a number"),
        (["--bind", "unix:"], "expected the URI of one Unix socket"),
        (["--bind", "unix:what=ever"], "expected the URI of one Unix socket"),
        (["--bind", "unix:@"], "without a character"),
        (["--bind", "unix:s", "--mode", "rw"], "expected permission bits in octal"),
        (["--bind", "unix:s", "--mode", "7777"], "expected permission bits in octal"),
        (["--bind", "unix:s", "--workers", "0"], "workers must be at least 1, got 0"),
        (["--bind", "unix:s", "--hang-timeout", "0"], "hang_timeout must be more than 0"),
        (["--bind", "unix:s", "--max-age", "0"], "max_age must be more than 0"),
        (["--bind", "unix:s", "--max-memory", "0"], "max_memory must be at least 1, got 0"),
        (["--bind", "unix:s", "--max-memory", "5T"], "--max-memory: expected bytes, such as"),
        (["--bind", "unix:s", "--max-memory", "M"], "--max-memory: expected bytes, such as"),
        (["--bind", "unix:s", "--max-memory", ""], "--max-memory: expected bytes, such as"),
        (["--bind", "unix:s", "--handler-timeout", "-1"], "handler_timeout must be more than 0"),
        (
            ["--bind", "unix:s", "--executable", "nothing"],
            "executable must be a Python interpreter",
        ),
        (["--bind", "unix:s", "--nice", "low"], "--nice"),
        (["--bind", "unix:s", "--setup", "app.x"], "package.module:name"),
        (["--bind", "unix:s", "--stats-socket", "unix:x"], "expected the URI of one Unix socket"),
        ([], "--bind"),
    ],
)
def test_serve_rejects_wrong_arguments(
    project: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong argument is a line and exit status 2, before anything is opened."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", [*sys.path])
    done = run_in_this_process("serve", "app:once", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert [path.name for path in project.iterdir()] == ["app.py"]


@pytest.mark.parametrize(
    ("text", "size"), [("500", 500), ("3k", 3072), ("500M", 500 << 20), ("2G", 2 << 30)]
)
def test_serve_passes_options_to_the_pool(
    project: Path, text: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options of the pool arrive as open_worker_pool has them; --max-memory accepts suffixes."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", [*sys.path])
    found: list[Any] = []
    monkeypatch.setattr(command, "run", lambda main, **_: found.extend(main.args))
    arguments = ["--max-memory", text, "--max-age", "60", "--handler-timeout", "2.5"]
    arguments += ["--executable", sys.executable, "--kill-process-group", "--max-jobs", "7"]
    arguments += ["--nice", "-3", "--preload", "trio", "--preload", "json"]
    done = run_in_this_process("serve", "app:once", "--bind", "unix:s", *arguments)
    assert done.returncode == 0
    (config,) = found
    assert config.options["max_memory"] == size
    assert config.options["max_age"] == 60
    assert config.options["handler_timeout"] == 2.5
    assert config.options["executable"] == sys.executable
    assert config.options["kill_process_group"] is True
    assert config.options["max_jobs"] == 7
    assert config.options["nice"] == -3
    assert config.options["preload"] == ["trio", "json"]


def test_serve_replaces_an_old_worker_and_cancels_a_slow_handler(project: Path) -> None:
    """--max-age, --handler-timeout and --executable act on the workers."""
    python = project / "python"
    python.write_text(f'#!/bin/sh\necho "started by $0"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with serving(
        *(project, "hold", "--max-age", "0.2", "--handler-timeout", "0.2"),
        *("--executable", str(python)),
    ) as served:
        assert any(f"started by {python}" in line for line in served.lines)
        with connected(str(project / "s")) as client:
            assert rest_of(client) == b"held"
        served.line("max_age")
        text = "".join(served.lines) + served.drained()
    assert "handler did not finish within 0.2 s (handler_timeout)" in text


def test_serve_sets_the_nice_value_of_workers(project: Path) -> None:
    """--nice is added to the nice value of the command."""
    with serving(project, "once", "--nice", "3") as served:
        worker = int(served.lines[-1].split()[-1])
        command = os.getpriority(os.PRIO_PROCESS, served.process.pid)
        assert os.getpriority(os.PRIO_PROCESS, worker) == min(19, command + 3)
        served.drained()


def test_a_handler_without_a_module(project: Path) -> None:
    """What names no handler is exit status 2."""
    done = run("serve", "app", "--bind", "unix:s", cwd=project)
    assert done.returncode == 2
    assert 'package.module:name", got ' in done.stderr


def test_where_somebody_listens(project: Path) -> None:
    """An address that is taken is a line that names it, and exit status 1."""
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        unix.bind(str(project / "taken"))
        unix.listen()
        bind = f"tcp:127.0.0.1:{tcp.getsockname()[1]}"
        for each, name in ((bind, bind), ("unix:taken", "taken")):
            done = run("serve", "app:once", "--bind", "unix:s", "--bind", each, cwd=project)
            assert done.returncode == 1
            assert re.match(rf"trio-unixconn: .*{re.escape(name)}: .* in use", done.stderr)
            assert len(done.stderr.splitlines()) == 1
            assert not (project / "s").exists()


################################################################
# Sockets that are open already
################################################################


@contextmanager
def listening(family: int, address: Any) -> Generator[socket.socket, None, None]:
    with socket.socket(family) as sock:
        sock.bind(address)
        sock.listen()
        yield sock


def test_descriptors(project: Path) -> None:
    """Inherited sockets of both kinds are served; they stay open for the others."""
    with (
        listening(socket.AF_INET, ("127.0.0.1", 0)) as tcp,
        listening(socket.AF_UNIX, str(project / "u")) as unix,
    ):
        fds = [tcp.fileno(), unix.fileno()]
        arguments = [part for fd in fds for part in ("--bind", f"fd:{fd}")]
        with serving(project, "once", *arguments, pass_fds=fds) as served:
            text = "".join(served.lines)
            assert f"listening at tcp:127.0.0.1:{tcp.getsockname()[1]}\n" in text
            assert f"listening at unix:{project / 'u'}\n" in text
            assert answer(tcp.getsockname()) == answer(str(project / "u")) == b"one"
            served.drained()
        assert (project / "u").exists()
        connected(tcp.getsockname()).close()


def test_another_kind_of_socket(project: Path) -> None:
    """A stream socket of another family is printed as Python names it."""
    if not hasattr(socket, "AF_VSOCK"):
        pytest.skip("there are no such sockets")
    try:
        sock = socket.socket(socket.AF_VSOCK)
        sock.bind((socket.VMADDR_CID_ANY, 0xFFFF_FFFF))
        sock.listen()
    except OSError as exc:
        pytest.skip(f"there are no such sockets: {exc}")
    with (
        closing(sock),
        serving(project, "once", "--bind", f"fd:{sock.fileno()}", pass_fds=[sock.fileno()]) as it,
    ):
        assert f"listening at {sock.getsockname()}\n" in "".join(it.lines)
        it.drained()


@pytest.mark.parametrize("where", ["systemd", "systemd:x"])
def test_what_systemd_passes(where: str, project: Path) -> None:
    """LISTEN_FDS from 3 on are served, and the workers see nothing of it."""
    (project / "app.py").write_text(
        APP.replace(
            'b"one"', 'repr([x for x in __import__("os").environ if "LISTEN" in x]).encode()'
        )
    )
    with listening(socket.AF_INET, ("127.0.0.1", 0)) as tcp:
        program = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); "
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='x'); "
            "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
        )
        command = [sys.executable, "-c", program, str(tcp.fileno()), *COMMAND[1:]]
        fds = [tcp.fileno()]
        with serving(project, "once", bind=where, program=command, pass_fds=fds) as served:
            assert answer(tcp.getsockname()) == b"[]"
            served.drained()


@pytest.mark.parametrize(
    ("names", "binds", "expected"),
    [
        ("a:b:a", ["systemd:b", "systemd:a"], "[[4], [3, 5]]\n"),
        ("a:b:a", ["systemd"], "[[3, 4, 5]]\n"),
        ("a", ["systemd:unknown"], "[[4, 5]]\n"),
        ("", ["systemd:unknown"], "[[3, 4, 5]]\n"),
        ("a:b:a", ["systemd:c"], "no socket has the name c (LISTEN_FDNAMES: a, b)"),
    ],
)
def test_systemd_names(names: str, binds: list[str], expected: str) -> None:
    """systemd:NAME takes the sockets with that name, each time that it is given."""
    program = (
        "import os, sys; from trio_unixconn._cli.serve.binds import read_bind; "
        "[os.dup2(0, number) for number in (3, 4, 5)]; "
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='3'); "
        "os.environ['LISTEN_FDNAMES'] = sys.argv[1]; "
        "print([read_bind(each).fds for each in sys.argv[2:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, names, *binds],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert expected in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "no sockets were passed (LISTEN_FDS)"),
        ({"LISTEN_FDS": "0"}, "no sockets were passed"),
        ({"LISTEN_FDS": "x"}, "no sockets were passed"),
        ({"LISTEN_FDS": "1", "LISTEN_PID": "1"}, "were passed to process '1' (LISTEN_PID)"),
    ],
)
def test_systemd_has_passed_nothing(project: Path, variables: dict[str, str], said: str) -> None:
    """Sockets that are not there, or another's, are a line and exit status 1."""
    env = environment(**variables)
    done = run("serve", "app:once", "--bind", "systemd", cwd=project, env=env)
    assert done.returncode == 1
    assert done.stderr.startswith("trio-unixconn: systemd: ")
    assert said in done.stderr


def test_descriptors_that_cannot_be(project: Path) -> None:
    """A descriptor that is closed, no socket, or no listener is a line that names it."""
    with (
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_INET) as tcp,
        open(project / "app.py") as file,
        listening(socket.AF_UNIX, str(project / "u")) as good,
    ):
        fds = [each.fileno() for each in (unix, tcp, file, good)]
        for fd, said in (
            (99999, "descriptor 99999 is not open; the parent process must pass it on"),
            (fds[0], "expected a listening Unix stream socket"),
            (fds[1], "SocketListener requires a listening socket"),
            (fds[2], "Socket operation on non-socket"),
        ):
            arguments = ("--bind", f"fd:{fds[3]}", "--bind", f"fd:{fd}")
            done = run("serve", "app:once", *arguments, cwd=project, pass_fds=fds)
            assert done.returncode == 1
            assert done.stderr.startswith(f"trio-unixconn: fd:{fd}: ")
            assert said in done.stderr
        # The same one twice.
        arguments = ("--bind", f"fd:{fds[3]}") * 2
        done = run("serve", "app:once", *arguments, cwd=project, pass_fds=fds)
        assert (done.returncode, "this is given twice" in done.stderr) == (2, True)


################################################################
# Statistics
################################################################


def test_statistics(project: Path) -> None:
    """The socket answers while the server runs, and also while it drains; then it is gone."""
    with serving(project, "hold", "--stats-socket", "stats") as served:
        assert any("statistics at unix:stats" in line for line in served.lines)
        path = str(project / "stats")
        assert os.stat(path).st_mode & 0o777 == 0o600

        def document() -> Any:
            with connected(path) as client:
                client.sendall(b"json\n")
                return json.loads(rest_of(client))

        with connected(str(project / "s")) as client:
            assert client.recv(4) == b"held"
            assert document()["accepted"] == 1
            served.send(signal.SIGTERM)
            served.line("draining")
            assert document()["in_flight"] == 1
            client.sendall(b"x")
            assert rest_of(client) == b"one"
        assert ended(served.process).returncode == 0
    assert [each.name for each in project.iterdir()] == ["app.py"]


################################################################
# On a terminal
################################################################


def test_the_table(project: Path) -> None:
    """A terminal shows the workers and the totals, with what is logged above, and the summary."""
    with closing(Terminal(project)) as terminal:
        first = terminal.shows("workers ", "app:once, ")
        assert "app:once, starting" in first or "app:once, up" in first
        terminal.shows("app:once, up 0:00:0")
        for _ in range(3):
            assert answer(str(project / "s")) == b"one"
        rows: list[list[str]] = []

        def has_all() -> bool:
            # What is read may end in the middle of a picture.
            terminal.read()
            rows[:] = [line.split() for line in terminal.text().splitlines() if " ready " in line]
            return sum(int(row[4]) for row in rows if row[-1] == "MiB") == 3

        until_sync(has_all)
        text = terminal.shows("accepted 3 (", "handled 3 (", "in flight  ")
        header = next(line for line in text.splitlines() if "in flight  " in line)
        assert header.split() == [
            *("#", "pid", "state", "in", "flight", "handled", "per", "s", "restarts", "memory")
        ]
        assert [row[0] for row in rows] == ["0", "1"]
        terminal.process.send_signal(signal.SIGHUP)
        terminal.shows("restarted: workers ", "restarts 2")
        terminal.process.send_signal(signal.SIGTERM)
        text = terminal.end()
    # One table is left, the last, with the log above and the summary below.
    assert text.count("app:once, draining, up") == 1
    assert text.count("in flight  ") == 1
    order = [
        "serves app:once",
        "restarting",
        "SIGTERM, draining",
        "in flight  ",
        "drained: 3 accep",
    ]
    places = [text.index(each) for each in order]
    assert places == sorted(places)
    assert not (project / "s").exists()


@pytest.mark.parametrize(("arguments", "term"), [(["--plain"], "xterm"), ([], "dumb")])
def test_plain_lines_on_a_terminal(project: Path, arguments: list[str], term: str) -> None:
    """With --plain, or on a terminal that can only print, there is no table."""
    with closing(Terminal(project, *arguments, TERM=term)) as terminal:
        terminal.shows("ready: workers ")
        terminal.process.send_signal(signal.SIGTERM)
        text = terminal.end()
    assert "drained: 0 accepted" in text.replace("\n", "")
    assert "memory" not in text


################################################################
# Reloading
################################################################


def watched(served: Served) -> str:
    """Return the line that says what is watched, which precedes the one of the workers."""
    return next(line for line in served.lines if "watching " in line)


def test_reload(project: Path) -> None:
    """A changed file restarts the workers; a broken one is logged, and the old ones go on."""
    with serving(project, "once", "--reload") as served:
        assert f"INFO: watching {project}\n" in watched(served)
        (project / "app.py").write_text(APP.replace("one", "two"))
        assert f"changed: {project / 'app.py'}: restarting" in served.line("changed")
        served.line("restarted")
        assert answer(str(project / "s")) == b"two"
        (project / "app.py").write_text("this is not Python (")
        served.line("SyntaxError")
        served.line("the old workers go on")
        assert answer(str(project / "s")) == b"two"
        # Other files than those of Python are ignored.
        (project / "notes.txt").write_text("x")
        (project / "app.py").write_text(APP.replace("one", "three"))
        served.line("restarted")
        assert answer(str(project / "s")) == b"three"
        told = served.drained()
    assert "notes.txt" not in "".join(served.lines) + told
    assert "drained" in told


def test_reload_sees_a_change_while_workers_import(project: Path) -> None:
    """A file that is saved while the first workers import it is imported again."""
    gate = "\nimport os, time\nopen('importing', 'w').close()\n"
    gate += "while os.path.exists('gate'):\n    time.sleep(0.01)\n"
    (project / "app.py").write_text(APP + gate)
    (project / "gate").touch()
    with starting(project, "app:once", "--reload") as served:
        until_sync((project / "importing").exists)
        (project / "app.py").write_text(APP.replace("one", "two"))
        (project / "gate").unlink()
        served.line("changed: ")
        served.line("restarted: ")
        assert answer(str(project / "s")) == b"two"
        served.drained()


def test_reload_include_and_exclude(project: Path) -> None:
    """Files of other names restart the workers, and excluded files and directories do not."""
    (project / "generated").mkdir()
    arguments = ("--reload-include", "*.html", "--reload-exclude", "generated")
    with serving(project, "once", "--reload", *arguments, "--reload-exclude", "test_*") as served:
        for name in ("generated/page.html", "test_app.py", "notes.txt", "page.html"):
            (project / name).write_text("x")
        assert f"changed: {project}/page.html: restarting" in served.line("changed")
        served.line("restarted")
        served.drained()


def test_reload_filter_matches_names_and_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pattern is for the last part of a path, or for all of it from the current directory on."""
    monkeypatch.chdir(tmp_path)
    exclude = ["build", "docs/*.py", "/elsewhere/*", tmp_path.name]
    wanted = ReloadFilter([str(tmp_path)], ["*.html", "data/*.json"], exclude)

    def is_wanted(name: str) -> bool:
        return wanted(Change.modified, str(tmp_path / name))

    yes = ["a.py", "x/a.py", "x/a.html", "data/a.json", "x/docs/a.py"]
    no = ["a.txt", "a.json", "build/a.py", "x/build/y/a.py", "docs/a.py", "__pycache__/a.py"]
    assert [name for name in [*yes, *no] if is_wanted(name)] == yes
    assert not wanted(Change.added, "/elsewhere/a.py")
    assert wanted(Change.added, "/other/a.py")


def test_reload_at_the_inotify_limit(project: Path) -> None:
    """Where nothing can be watched, that is logged, and the server serves."""
    limit = "echo 0 > /proc/sys/user/max_inotify_instances"
    shell = ["unshare", "-Ur", "sh", "-c", f'{limit} && exec "$@"', "-"]
    if subprocess.run([*shell, "true"], check=False).returncode:
        pytest.skip("needs a user namespace")
    with starting(project, "app:once", "--reload", program=[*shell, *COMMAND]) as served:
        served.line("WARNING: not watching: ")
        served.line("ready: ")
        assert answer(str(project / "s")) == b"one"
        served.drained()


@pytest.mark.usefixtures("unmeasured_processes")  # coverage wants a current directory
def test_reload_in_a_deleted_directory(project: Path) -> None:
    """Without a current directory nothing is watched, which is logged."""
    with starting(
        *(project, "app:once", "--reload"),
        bind=f"unix:{project}/s",
        program=program_in_a_deleted_directory(project),
        env=environment(project),
    ) as served:
        served.line("WARNING: not watching: ")
        served.line("ready: ")
        assert answer(str(project / "s")) == b"one"
        served.drained()


def test_reload_of_a_package_elsewhere(project: Path) -> None:
    """The directory of the handler's package is watched, too."""
    package = project.parent / "elsewhere" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "app.py").write_text(APP)
    env = environment(package.parent, PYTHONDONTWRITEBYTECODE="1")
    with starting(project, "package.app:once", "--reload", env=env) as served:
        served.line("ready: ")
        assert f"watching {project}, {package}\n" in watched(served)
        (package / "app.py").write_text(APP.replace("one", "two"))
        served.line("restarted")
        assert answer(str(project / "s")) == b"two"
        served.drained()


@pytest.mark.parametrize("handler", ["sys:exit", "nothing_there:handler", "app:once"])
def test_what_is_watched_besides(
    project: Path, handler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a module without a file, without itself, or in the current directory: only that."""
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(project)
    assert directories_of(handler) == [str(project)]
