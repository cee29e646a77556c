"""``trio-unixconn serve`` with sockets that the real systemd-socket-activate(1) passes."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from tests._helpers.cli import COMMAND
from tests._helpers.real_programs import free_port, require_program
from tests._helpers.serve_cli import answer, first_connection, make_project, starting

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.slow]


# All that it leaves of the environment.
VARIABLES = ("-E", "PATH", "-E", "HOME", "-E", "PYTHONPATH")


def test_systemd_socket_activate(tmp_path: Path) -> None:
    """Sockets are taken by their names, clients that connect early wait, and a reload keeps all."""
    activate = require_program("systemd-socket-activate", package="systemd")
    project, port = make_project(tmp_path), free_port()
    path = str(project / "u")
    listen = ("--listen", f"127.0.0.1:{port}", "--listen", path, "--fdname", "web:local")
    with starting(
        *(project, "app:once", "--bind", "systemd:web"),
        bind="systemd:local",
        program=[activate, *VARIABLES, *listen, *COMMAND],
    ) as served:
        # It starts the command when a client connects, which is not accepted yet.
        with first_connection(path) as client:
            served.line(f"listening at unix:{path}")
            served.line(f"listening at tcp:127.0.0.1:{port}")
            served.line("ready: ")
            client.sendall(b"x")
            assert client.recv(3) == b"one"
        assert answer(("127.0.0.1", port)) == b"one"
        served.send(signal.SIGHUP)
        served.line("restarted: ")
        assert answer(path) == answer(("127.0.0.1", port)) == b"one"
        out = served.drained_output()
    assert "4 accepted, 0 denied, 4 handled" in out


def test_systemd_socket_activate_with_a_policy(tmp_path: Path) -> None:
    """--allow-user is asked about peers of a socket that was passed."""
    activate = require_program("systemd-socket-activate", package="systemd")
    project = make_project(tmp_path)
    path = str(project / "u")
    with starting(
        *(project, "app:once", "--allow-user", "65533"),
        bind="systemd",
        program=[activate, *VARIABLES, "--listen", path, *COMMAND],
    ) as served:
        with first_connection(path) as client:
            assert client.recv(1) == b""
        assert "denied" in served.line("denied")
        out = served.drained_output()
    assert "1 accepted, 1 denied" in out
