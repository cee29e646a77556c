"""``serve --upgrade-socket`` and ``trio-unixconn upgrade``: a server replaced under its clients."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from tests._helpers.cli import COMMAND, ended, run, run_in_this_process
from tests._helpers.http_clients import EXAMPLES, clients_of
from tests._helpers.serve_cli import Served, answer, connected, make_project, rest_of, starting
from tests._helpers.users import NOBODY, as_root
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
def upgradable(
    project: Path,
    *arguments: str,
    handler: str = "app:once",
    upgrades: str = "--upgrade-socket",
    **options: Any,
) -> Generator[Served, None, None]:
    """Serve at ``s`` with an upgrade socket ``up`` and a pid file ``pid``; end all generations."""
    with starting(
        project,
        handler,
        *(upgrades, "up", "--pid-file", "pid", *arguments),
        start_new_session=True,
        **options,
    ) as served:
        try:
            if "--log-file" in arguments:
                log = project / "log"
                until_sync(lambda: log.exists() and "ready: " in log.read_text())
            else:
                served.line("ready: ")
            yield served
            end_last(project)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(served.process.pid, signal.SIGKILL)


def end_last(project: Path) -> None:
    """End the generation that serves, if there is one."""
    with suppress(FileNotFoundError, ProcessLookupError):
        os.kill(pid_of(project), signal.SIGTERM)
        until_sync(lambda: not (project / "pid").exists())


def pid_of(project: Path) -> int:
    return int((project / "pid").read_text())


def upgrade(project: Path, *arguments: str) -> int:
    """Upgrade, and return the pid of the successor when that has replaced the pid file."""
    done = run("upgrade", "up", *arguments, cwd=project)
    assert (done.returncode, done.stderr) == (0, "")
    pid = int(done.stdout)
    until_sync(lambda: pid_of(project) == pid)
    return pid


def change(project: Path, before: str, after: str) -> None:
    """Change the module of handlers."""
    path = project / "app.py"
    path.write_text(path.read_text().replace(before, after))


def failed(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Upgrade, which fails; the server must serve as before."""
    pid = pid_of(project)
    # A new Python could take longer than the successor has.
    done = run_in_this_process("upgrade", project / "up", *arguments)
    assert done.returncode == 1
    assert "trio-unixconn: upgrade failed, the server goes on: " in done.stderr
    assert pid_of(project) == pid
    assert answer(f"{project}/s") == b"one"
    return done


################################################################
# Success
################################################################


def test_upgrade_replaces_the_server(project: Path) -> None:
    """The successor has new code, the same sockets, the pid file; the old one exits with 0."""
    with upgradable(project, "--log-file", "log") as served:
        first = served.process.pid
        assert pid_of(project) == first
        assert answer(f"{project}/s") == b"one"
        # It has as many workers as the first one has now.
        served.send(signal.SIGTTIN)
        log = project / "log"
        until_sync(lambda: "changed: workers" in log.read_text())
        change(project, "one", "two")
        # As logrotate does; both processes open the path themselves.
        log.rename(project / "log.1")
        second = upgrade(project)
        assert second != first
        assert answer(f"{project}/s") == b"two"
        assert served.process.wait(60) == 0
        old, new = (project / "log.1").read_text(), log.read_text()
        assert re.search(
            rf"upgraded: generation 2 \(pid {second}\) after \d+\.\d+ seconds, 1 listeners, "
            "0 connections passed on",
            old,
        )
        assert "listening at unix:" in new
        assert "(inherited)" in new
        assert f"generation 2 serves (pid {second})" in new
        assert re.search(r"ready: workers \d+, \d+\n", new)
        done = run("upgrade", "up", "--json", cwd=project)
        found = json.loads(done.stdout)
        assert found["number"] == 3
        until_sync(lambda: pid_of(project) == found["pid"])
    assert not (project / "s").exists()
    assert not (project / "up").exists()


def test_upgrade_keeps_keep_alive_clients(tmp_path: Path) -> None:
    """Connections that are kept alive move to the successor: none is closed, no request fails."""
    up, pid = f"{tmp_path}/up", tmp_path / "pid"
    with starting(
        EXAMPLES,
        "pool_http:handler",
        *("--upgrade-socket", up, "--pid-file", str(pid)),
        bind="tcp:127.0.0.1:0",
        workers=2,
        start_new_session=True,
    ) as served:
        found = re.search(r":(\d+)\n", served.line("listening at"))
        assert found
        served.line("ready: ")
        with clients_of(int(found[1]), 8) as clients:
            for number in range(2, 4):
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
            until_sync(lambda: pid_of(tmp_path) == int(done.stdout))
            end_last(tmp_path)
        assert [each.failures for each in clients] == [[]] * len(clients)
        assert ended(served.process).returncode == 0


def ask(address: Any) -> str:
    """Connect, and send a request; return how that has ended."""
    try:
        with connected(address) as client:
            client.sendall(b"x")
            return "answered" if rest_of(client) == b"one" else "empty"
    except ConnectionRefusedError:
        return "refused"
    except OSError as exc:
        return repr(exc)


def test_upgrade_under_load(project: Path) -> None:
    """While clients connect all the time, over TCP and Unix, none is refused, reset or empty."""
    outcomes: Counter[str] = Counter()
    stop = threading.Event()

    def load(address: Any) -> None:
        while not stop.is_set():
            outcomes[ask(address)] += 1

    with upgradable(project, "--bind", "tcp:127.0.0.1:0") as served:
        line = next(each for each in served.lines if "listening at tcp:" in each)
        port = int(line.rpartition(":")[2])
        threads = [
            threading.Thread(target=load, args=(address,))
            for address in (f"{project}/s", ("127.0.0.1", port))
        ]
        for thread in threads:
            thread.start()
        try:
            for number in range(2, 5):
                before = outcomes["answered"]
                upgrade(project)
                served.line(f"upgraded: generation {number} ")
                until_sync(lambda before=before: outcomes["answered"] > before + 20)  # type: ignore[misc]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert set(outcomes) == {"answered"}


def test_sigusr2_upgrades(project: Path) -> None:
    """SIGUSR2 starts a successor, even while the workers are restarted."""
    with upgradable(project) as served:
        served.send(signal.SIGHUP)
        served.send(signal.SIGUSR2)
        served.line("received SIGUSR2, starting a successor")
        found = re.search(r"pid (\d+)", served.line("generation 2 serves"))
        assert found
        assert answer(f"{project}/s") == b"one"
        assert served.process.wait(60) == 0
        until_sync(lambda: pid_of(project) == int(found[1]))


def test_sigusr2_during_a_drain(project: Path) -> None:
    """A server that drains starts no successor, before and after it was replaced."""
    with upgradable(project, handler="app:hold") as served:
        with connected(f"{project}/s") as client:
            assert client.recv(4) == b"held"
            second = upgrade(project)
            served.line("replaced by generation 2, draining 1 running")
            served.send(signal.SIGUSR2)
            assert "this generation is released" in served.line("upgrade failed")
            served.send(signal.SIGTERM)
            served.line("draining already (signal again to exit immediately)")
            # It finishes nevertheless.
            client.sendall(b"x")
            assert rest_of(client) == b"one"
        assert served.process.wait(60) == 0
        with connected(f"{project}/s") as client:
            assert client.recv(4) == b"held"
            os.kill(second, signal.SIGTERM)
            served.line("received SIGTERM, draining 1 running")
            os.kill(second, signal.SIGUSR2)
            assert "draining" in served.line("upgrade failed")
            done = run("upgrade", "up", cwd=project)
            assert done.returncode == 1
            assert "No such file or directory" in done.stderr


def test_second_signal_ends_a_replaced_server(project: Path) -> None:
    """A server that drains after an upgrade ends at once at the second signal."""
    with upgradable(project, handler="app:hold") as served:
        with connected(f"{project}/s") as client:
            assert client.recv(4) == b"held"
            upgrade(project)
            served.line("replaced by")
            served.send(signal.SIGTERM)
            served.line("draining already")
            served.send_again(signal.SIGTERM)
            assert rest_of(client) == b""
        assert served.process.wait(60) == 128 + signal.SIGTERM


################################################################
# Failure
################################################################


def test_upgrade_of_a_handler_that_cannot_be_imported(project: Path) -> None:
    """The command prints what the successor has said, and the server goes on."""
    with upgradable(project) as served:
        change(project, "import trio", "import trio, no_such_module")
        done = failed(project)
        assert "ModuleNotFoundError: No module named 'no_such_module'" in done.stderr
        assert "the successor cannot take over; it exited with status 1" in done.stderr
        assert "upgrade failed" in served.line("upgrade failed")
        done = failed(project, "--json")
        found = json.loads(done.stdout)
        assert "the successor cannot take over" in found["error"]
        assert "no_such_module" in found["traceback"]
        change(project, ", no_such_module", "")
        upgrade(project)


def test_upgrade_of_a_successor_that_hangs(project: Path) -> None:
    """It has --upgrade-timeout seconds; meanwhile, a second request is told that it is busy."""
    with upgradable(project, "--upgrade-timeout", "5") as served:
        change(project, "import trio\n", "import trio, time; time.sleep(1000)\n")
        served.send(signal.SIGUSR2)
        served.line("(inherited)")
        done = failed(project)
        assert "this generation is handing over" in done.stderr
        served.line("upgrade failed: the successor did not serve within 5 s (timeout)")
        assert answer(f"{project}/s") == b"one"


def test_probation_of_a_successor_that_ends(project: Path) -> None:
    """A successor that ends within --probation is replaced by the server before it."""
    with upgradable(project, "--probation", "30") as served:
        change(project, "one", "two")
        command = [*COMMAND, "upgrade", "up"]
        with subprocess.Popen(
            command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as asking:
            found = re.search(r"\(pid (\d+)\)", served.line("trio-unixconn"))
            assert found
            until_sync(lambda: answer(f"{project}/s") == b"two")
            # The one before is still the main process.
            assert pid_of(project) == served.process.pid
            os.kill(int(found[1]), signal.SIGKILL)
            _, err = asking.communicate(timeout=60)
        assert asking.returncode == 1
        assert "the successor has ended while it was on probation" in err
        assert answer(f"{project}/s") == b"one"


################################################################
# A successor that starts by itself
################################################################


def test_take_over(project: Path) -> None:
    """The first one is the first; a second one that is started by itself replaces it."""
    first = upgradable(project, upgrades="--take-over", handler="app:hold")
    with first as served, connected(f"{project}/s") as client:
        assert client.recv(4) == b"held"
        again = (project, "app:once", "--take-over", "up", "--pid-file", "pid")
        with starting(*again, start_new_session=True) as second:
            second.line("generation 2 serves")
            assert answer(f"{project}/s") == b"one"
            until_sync(lambda: pid_of(project) == second.process.pid)
            client.sendall(b"x")
            assert rest_of(client) == b"one"
            assert served.process.wait(60) == 0
            # It starts its own successor.
            third = upgrade(project)
            assert second.process.wait(60) == 0
            assert pid_of(project) == third
            end_last(project)


def test_upgrade_socket_of_another_server(project: Path) -> None:
    """Without --take-over, a path that another server has is an error."""
    with upgradable(project):
        done = run(
            *("serve", "app:once", "--bind", "unix:t", "--upgrade-socket", "up"), cwd=project
        )
        assert done.returncode == 1
        assert "Address already in use" in done.stderr


@as_root
def test_upgrade_socket_denies_other_users(project: Path) -> None:
    """A process of another user gets nothing, and is logged; nor may it ask for an upgrade."""
    name = f"@trio-unixconn-upgrade-{os.getpid()}"
    with starting(project, "app:once", "--upgrade-socket", name, start_new_session=True) as served:
        served.line("ready: ")
        # Of the library: the command line of another user could not import it here.
        program = (
            "import os, socket, sys\n"
            f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
            "sock = socket.socket(socket.AF_UNIX)\n"
            "sock.connect('\\0' + sys.argv[1][1:])\n"
            "data, fds, _, _ = socket.recv_fds(sock, 65536, 10)\n"
            "print(len(fds), data)\n"
        )
        done = subprocess.run(
            ["python3", "-c", program, name], capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout.startswith("0 ")
        assert "does not admit" in done.stdout
        assert f"uid {NOBODY}" in served.line("denied the listeners to")
        served.drained()


################################################################
# Sockets, and other options
################################################################


def test_upgrade_with_sockets_that_were_passed(project: Path) -> None:
    """Sockets of systemd, and inherited ones, go from one generation to the next."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    variables = {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "web:web"}
    one, two, three = (each.fileno() for each in sockets)
    shell = f'export LISTEN_PID=$$ && exec "$@" 3<&{one} 4<&{two} 7<&{three}'
    with upgradable(
        project,
        *("--bind", "fd:7"),
        bind="systemd:web",
        variables=variables,
        program=["bash", "-c", shell, "-", *COMMAND],
        pass_fds=[each.fileno() for each in sockets],
    ) as served:
        for each in sockets:
            each.close()
        ports = [int(found) for found in re.findall(r"tcp:127.0.0.1:(\d+)", "".join(served.lines))]
        assert len(ports) == 3
        for _ in range(2):
            upgrade(project)
            assert [answer(("127.0.0.1", port)) for port in ports] == [b"one"] * 3


def test_upgrade_moves_statistics_and_checks(project: Path) -> None:
    """--stats and --agent-check are answered by the generation that serves."""
    with upgradable(
        project, "--stats", "unix:stats", "--stats", "tcp:127.0.0.1:0", "--agent-check", "unix:c"
    ) as served:
        assert answer(f"{project}/s") == b"one"
        assert json.loads(answer_to(f"{project}/stats", b"json\n"))["accepted"] == 1
        upgrade(project)
        served.line("upgraded: ")
        found = json.loads(answer_to(f"{project}/stats", b"json\n"))
        assert (found["state"], found["accepted"]) == ("ready", 0)
        assert answer_to(f"{project}/c", b"").startswith(b"up ready")


def answer_to(path: str, request: bytes) -> bytes:
    with connected(path) as client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        return rest_of(client)


def test_upgrade_with_chdir(tmp_path: Path) -> None:
    """The successor looks --chdir up again, and finds other relative paths where they were."""
    first = make_project(tmp_path)
    second = tmp_path / "second"
    second.mkdir()
    (second / "app.py").write_text((first / "app.py").read_text().replace("one", "two"))
    (tmp_path / "now").symlink_to(first)
    with upgradable(tmp_path, "--chdir", "now"):
        assert answer(f"{tmp_path}/s") == b"one"
        (tmp_path / "now").unlink()
        (tmp_path / "now").symlink_to(second)
        upgrade(tmp_path)
        assert answer(f"{tmp_path}/s") == b"two"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--probation", "3"], "--probation can only be used with"),
        (["--upgrade-socket", "up", "--take-over", "other"], "must be the same path"),
        (["--upgrade-socket", "up", "--replace"], "--replace cannot be used with"),
        (["--upgrade-socket", "up", "--upgrade-timeout", "0"], "must be positive and finite"),
        (["--upgrade-socket", "up", "--probation", "inf"], "must be non-negative and finite"),
    ],
)
def test_serve_rejects_upgrade_options(arguments: list[str], said: str) -> None:
    """Options that do not fit together are named before anything is opened."""
    done = run_in_this_process("serve", "app:once", "--bind", "unix:s", *arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_upgrade_without_a_server(tmp_path: Path) -> None:
    """The command says that no process listens there."""
    done = run_in_this_process("upgrade", tmp_path / "none")
    assert done.returncode == 1
    assert "No such file or directory" in done.stderr
