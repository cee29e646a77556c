"""Signals that ``trio-unixconn serve`` gets, and what each of them does."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests._helpers.cli import COMMAND, ended
from tests._helpers.processes import is_pending
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

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a directory with a module of handlers, to run a server in."""
    return make_project(tmp_path)


def pids(line: str) -> list[int]:
    """Return the process ids of the workers that a line of the log names."""
    return [int(each) for each in re.findall(r"\d+", line.partition("workers ")[2])]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_stop_signals_within_a_second_are_one(project: Path, second: signal.Signals) -> None:
    """What a terminal and a wrapper send at once drains; running handlers finish."""
    with serving(project, "hold") as served, connected(str(project / "s")) as client:
        assert client.recv(4) == b"held"
        served.send(signal.SIGINT)
        served.send(second)
        served.line("draining 1 running")
        client.sendall(b"x")
        assert rest_of(client) == b"one"
        done = ended(served.process)
    assert (done.returncode, done.stderr) == (0, "")


def test_sigquit_exits_quickly_and_removes_paths(project: Path) -> None:
    """SIGQUIT cancels the handlers, removes every path, and is the exit status."""
    arguments = ("--stats-socket", "stats", "--pid-file", "pid")
    with (
        serving(project, "hold", *arguments) as served,
        connected(str(project / "s")) as client,
    ):
        assert client.recv(4) == b"held"
        served.send(signal.SIGQUIT)
        done = ended(served.process)
        assert rest_of(client) == b""
    assert done.returncode == 128 + signal.SIGQUIT
    assert done.stderr == "trio-unixconn: ended by SIGQUIT\n"
    assert sorted(path.name for path in project.iterdir()) == ["app.py"]


def test_sigusr2_is_reserved(project: Path) -> None:
    """Without --upgrade-socket, SIGUSR2 is logged and changes nothing."""
    with serving(project, "once") as served:
        served.send(signal.SIGUSR2)
        served.line("received SIGUSR2, which upgrades with --upgrade-socket: ignored")
        assert answer(str(project / "s")) == b"one"
        served.drained()


def test_sigttin_and_sigttou_change_the_number_of_workers(project: Path) -> None:
    """SIGTTIN starts one worker more, SIGTTOU ends one, and the last one stays."""
    with serving(project, "once") as served:
        served.send(signal.SIGTTIN)
        served.line("received SIGTTIN: changing to 2 workers")
        assert len(pids(served.line("changed: workers "))) == 2
        served.send(signal.SIGTTOU)
        served.line("received SIGTTOU: changing to 1 workers")
        assert len(pids(served.line("changed: workers "))) == 1
        served.send(signal.SIGTTOU)
        served.line("received SIGTTOU: the last worker stays")
        assert answer(str(project / "s")) == b"one"
        served.drained()


def test_sigttin_with_a_broken_handler(project: Path) -> None:
    """A worker that cannot start is logged; there are as many workers as before."""
    with serving(project, "once") as served:
        (project / "app.py").write_text("this is not Python (")
        served.send(signal.SIGTTIN)
        served.line("cannot change to 2 workers: ")
        (project / "app.py").write_text(APP)
        served.send(signal.SIGTTIN)
        assert len(pids(served.line("changed: workers "))) == 2
        served.drained()


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGTTIN", "SIGTTOU"])
def test_signal_before_and_after_serving_does_not_kill(project: Path, name: str) -> None:
    """A signal that changes something ends nothing, whenever it arrives."""
    number = getattr(signal, name)
    (project / "slow.py").write_text(
        APP + "\nimport os, time\nopen('importing', 'w').close()\n"
        "while not os.path.exists('go'):\n    time.sleep(0.01)\n"
    )
    with starting(project, "slow:hold") as served:
        process = served.process
        until_sync((project / "importing").exists)
        process.send_signal(number)
        until_sync(lambda: not is_pending(process.pid, number))
        (project / "go").touch()
        served.line("ready: ")
        with connected(str(project / "s")) as client:
            assert client.recv(4) == b"held"
            process.send_signal(signal.SIGTERM)
            process.send_signal(number)
            client.sendall(b"x")
            assert rest_of(client) == b"one"
        # An exit has many steps, and no event for each: all of them get the signal.
        while process.poll() is None:
            process.send_signal(number)
            time.sleep(0.001)
        done = ended(process)
    assert (done.returncode, done.stderr) == (0, "")


def test_sighup_during_a_restart_is_remembered_once(project: Path) -> None:
    """SIGHUPs while the workers restart are one more restart, with the newest code."""
    (project / "app.py").write_text(
        APP + "\nimport os, time\nwhile os.path.exists('gate'):\n    time.sleep(0.01)\n"
    )
    with serving(project, "once") as served:
        (project / "gate").touch()
        served.send(signal.SIGHUP)
        served.line("SIGHUP: restarting")
        served.send(signal.SIGHUP)
        # It is heard after SIGHUP, whose number is lower, even if both are pending at once.
        served.send(signal.SIGUSR2)
        served.line("received SIGUSR2")
        served.send(signal.SIGHUP)
        served.line("SIGHUP: a restart is waiting already")
        (project / "app.py").write_text(APP.replace("one", "two"))
        (project / "gate").unlink()
        served.line("restarted: ")
        served.line("SIGHUP: restarting")
        served.line("restarted: ")
        assert answer(str(project / "s")) == b"two"
        told = served.drained()
    assert "restarting" not in told


def test_max_draining_bounds_old_workers(project: Path) -> None:
    """A restart waits while too many old workers still have clients."""
    with (
        serving(project, "hold", "--max-draining", "1") as served,
        connected(str(project / "s")) as client,
    ):
        assert client.recv(4) == b"held"
        served.send(signal.SIGHUP)
        served.line("restarted: ")
        served.send(signal.SIGHUP)
        served.line("SIGHUP: waiting for old workers to exit (--max-draining 1)")
        # The service goes on meanwhile.
        with connected(str(project / "s")) as other:
            assert other.recv(4) == b"held"
            other.sendall(b"x")
            assert rest_of(other) == b"one"
        client.sendall(b"x")
        assert rest_of(client) == b"one"
        served.line("SIGHUP: restarting")
        served.line("restarted: ")
        served.drained()


def test_signals_of_a_background_process_group(project: Path) -> None:
    """A server in the background of a terminal that stops writers (tostop) is not stopped."""
    from tests._helpers.serve_cli import Terminal

    program = (
        "import os, signal, subprocess, sys, termios; "
        "attributes = termios.tcgetattr(0); attributes[3] |= termios.TOSTOP; "
        "termios.tcsetattr(0, termios.TCSANOW, attributes); "
        "process = subprocess.Popen(sys.argv[1:], preexec_fn=lambda: os.setpgid(0, 0)); "
        "signal.signal(signal.SIGTERM, lambda *_: process.terminate()); "
        "sys.exit(process.wait())"
    )
    terminal = Terminal(
        project, "--plain", program=[COMMAND[0], "-c", program, *COMMAND], controlling=True
    )
    try:
        terminal.shows("ready: workers ")
        assert answer(str(project / "s")) == b"one"
        terminal.process.send_signal(signal.SIGTERM)
        text = terminal.end()
    finally:
        terminal.close()
    assert "drained: 1 accepted" in text.replace("\n", "")
    assert "SIGTTOU" not in text
    assert os.path.exists(project / "app.py")
