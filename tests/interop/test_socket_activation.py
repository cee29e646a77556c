"""``trio-unixconn serve`` with sockets that the real systemd-socket-activate(1) passes."""

from __future__ import annotations

import signal
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests._helpers.cli import COMMAND
from tests._helpers.real_programs import require_program
from tests._helpers.serve_cli import Served, answer, connected, hear_signals, make_project
from tests._helpers.waiting import until_sync

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.slow]


# All that it leaves of the environment.
VARIABLES = ("-E", "PATH", "-E", "HOME", "-E", "PYTHONPATH")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_systemd_socket_activate(tmp_path: Path) -> None:
    """Sockets are taken by their names, clients that connect early wait, and a reload keeps all."""
    activate = require_program("systemd-socket-activate", package="systemd")
    project, port = make_project(tmp_path), free_port()
    path = str(project / "u")
    with subprocess.Popen(
        [
            *(activate, *VARIABLES, "--listen", f"127.0.0.1:{port}", "--listen", path),
            *("--fdname", "web:local", *COMMAND, "serve", "app:once", "--workers", "1"),
            *("--bind", "systemd:local", "--bind", "systemd:web"),
        ],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    ) as process:
        served = Served(process, project)
        until_sync((project / "u").exists)
        # It starts the command when a client connects, which is not accepted yet.
        with connected(path) as client:
            served.line(f"listening at unix:{path}")
            served.line(f"listening at tcp:127.0.0.1:{port}")
            served.line("ready: ")
            client.sendall(b"x")
            assert client.recv(3) == b"one"
        assert answer(("127.0.0.1", port)) == b"one"
        served.send(signal.SIGHUP)
        served.line("restarted: ")
        assert answer(path) == answer(("127.0.0.1", port)) == b"one"
        served.send(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "4 accepted, 0 denied, 4 handled" in out


def test_systemd_socket_activate_with_a_policy(tmp_path: Path) -> None:
    """--allow-user is asked about peers of a socket that was passed."""
    activate = require_program("systemd-socket-activate", package="systemd")
    project = make_project(tmp_path)
    path = str(project / "u")
    with subprocess.Popen(
        [
            *(activate, *VARIABLES, "--listen", path),
            *(*COMMAND, "serve", "app:once", "--workers", "1", "--bind", "systemd"),
            *("--allow-user", "65533"),
        ],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    ) as process:
        served = Served(process, project)
        until_sync((project / "u").exists)
        with connected(path) as client:
            assert client.recv(1) == b""
        assert "denied" in served.line("denied")
        served.send(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "1 accepted, 1 denied" in out
