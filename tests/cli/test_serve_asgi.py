"""``trio-unixconn serve --asgi``: an application on a path and a port, and what is refused."""

from __future__ import annotations

import http.client
import re
import signal
import socket
from typing import TYPE_CHECKING

import pytest

from tests._helpers.cli import ended, run_in_this_process, started
from tests._helpers.environment import environment
from tests._helpers.processes import ROOT
from tests._helpers.serve_cli import Served, hear_signals

if TYPE_CHECKING:
    from pathlib import Path

APP = "tests._helpers.asgi_apps"


def test_serve_asgi_answers_and_restarts(tmp_path: Path) -> None:
    """Both addresses are served, the log names the application, and its prints are forwarded."""
    pytest.importorskip("hypercorn")
    with started(
        *("serve", "--asgi", f"{APP}:app", "--bind", "tcp:127.0.0.1:0", "--bind", "unix:s"),
        *("--workers", "1", "--access-log", "--root-path", "/api", "--keep-alive-timeout", "9"),
        cwd=tmp_path,
        env=environment(ROOT),
        preexec_fn=hear_signals,
    ) as process:
        served = Served(process, tmp_path)
        assert f"serves {APP}:app" in served.line("serves")
        found = re.search(r":(\d+)\n", served.line("listening at tcp"))
        assert found
        served.line("ready: ")
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        connection.request("GET", "/there")
        assert eval(connection.getresponse().read())["root_path"] == "/api"
        assert '"GET /there 1.1" 200' in served.line("GET /there")
        connection.request("GET", "/raise")
        assert connection.getresponse().status == 500
        connection.close()
        served.send(signal.SIGHUP)
        served.line("restarted: ")
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(str(tmp_path / "s"))
            client.sendall(b"nonsense\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 400")
        served.send(signal.SIGTERM)
        done = ended(process)
    text = "".join(served.lines) + done.stdout
    assert done.returncode == 0
    assert text.count("application shut down") == 2
    assert re.search(r"failed: client of process \d+, user \d+: HTTP/1.1: illegal request li", text)
    assert ", 1 failed, 0 abandoned, 0 rejected" in text
    # The log of a worker is on standard error.
    assert "GET /raise: the application raised an exception\nTraceback" in done.stderr


def test_serve_asgi_says_in_a_line_why_it_cannot_start(tmp_path: Path) -> None:
    """Standard error has one line for the application, and the exit status is 1."""
    pytest.importorskip("hypercorn")
    (tmp_path / "broken.py").write_text("import not_installed\n")
    with started(
        *("serve", "--asgi", "broken:app", "--bind", "unix:s", "--workers", "1"),
        cwd=tmp_path,
        env=environment(),
    ) as process:
        done = ended(process)
    assert done.returncode == 1
    assert done.stderr == (
        "trio-unixconn: worker 0 could not start: cannot import broken:app: ModuleNotFoundError: "
        f"No module named 'not_installed' ({tmp_path}/broken.py, line 1)\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--certfile", "x"], "--certfile can only be used with --asgi"),
        (["--keyfile", "x"], "--keyfile can only be used with --asgi"),
        (["--root-path", "/x"], "--root-path can only be used with --asgi"),
        (["--keep-alive-timeout", "0"], "--keep-alive-timeout can only be used with --asgi"),
        (["--access-log"], "--access-log can only be used with --asgi"),
        (["--asgi", "--keyfile", "x"], "keyfile can only be used with certfile"),
        (["--asgi", "--setup", "a:b"], "setup cannot be used with an ASGI application"),
        (["--asgi", "--keep-alive-timeout", "-1"], "keep_alive_timeout must be non-negative"),
    ],
)
def test_serve_rejects_asgi_options(arguments: list[str], said: str) -> None:
    """What does not fit together is one line, and exit status 2."""
    done = run_in_this_process("serve", "app:app", "--bind", "unix:s", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
