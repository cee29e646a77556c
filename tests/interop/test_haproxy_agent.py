"""HAProxy asks ``serve --agent-check`` or ``/ready``, and sends its clients accordingly."""

from __future__ import annotations

import csv
import http.client
import os
import signal
import socket
import subprocess
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import attrs
import pytest

from tests._helpers.cli import ended
from tests._helpers.environment import environment
from tests._helpers.http_clients import EXAMPLES, clients_of, wait_for_answers
from tests._helpers.real_programs import free_port, require_program
from tests._helpers.serve_cli import serving
from tests._helpers.waiting import until_sync

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from tests._helpers.serve_cli import Served

pytestmark = [pytest.mark.interop, pytest.mark.slow]

# Only what is tested decides: there are no other checks, and no request is sent twice.
CONFIG = """\
global
    stats socket {directory}/admin level admin
defaults
    mode http
    retries 0
    timeout connect 30s
    timeout client 60s
    timeout server 60s
    timeout check 30s
    timeout queue 60s
frontend front
    bind 127.0.0.1:{port}
    default_backend back
backend back
    balance roundrobin
    http-reuse always
    option httpchk GET /ready
"""
SERVER = "    server app{index} 127.0.0.1:{port} weight 100 "
AGENT = "agent-check agent-addr 127.0.0.1 agent-port {check} agent-inter 50ms\n"
READY = "check addr 127.0.0.1 port {stats} inter 50ms rise 1 fall 1\n"
# What the status of a server begins with.
OPEN = {AGENT: "no check", READY: "UP"}
OUT = {AGENT: "DRAIN", READY: "DOWN"}


@attrs.frozen
class App:
    """Where one server and its checks are."""

    port: int = attrs.field(factory=free_port)
    check: int = attrs.field(factory=free_port)
    stats: int = attrs.field(factory=free_port)

    @contextmanager
    def serving(self, project: Path, *arguments: str) -> Generator[Served, None, None]:
        """Serve the HTTP example with one worker."""
        with serving(
            *(project, "handler", "--agent-check", f"tcp:127.0.0.1:{self.check}"),
            *("--stats", f"tcp:127.0.0.1:{self.stats}", *arguments),
            bind=f"tcp:127.0.0.1:{self.port}",
            env=environment(EXAMPLES, PYTHONDONTWRITEBYTECODE="1"),
        ) as served:
            yield served


@attrs.frozen
class HAProxy:
    """A running HAProxy."""

    port: int
    admin: str
    kind: str

    def ask(self, command: str) -> str:
        """Send a command to the administration socket, and return the answer."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(self.admin)
            client.sendall(command.encode() + b"\n")
            return b"".join(iter(lambda: client.recv(65536), b"")).decode()

    def weight(self, index: int) -> int:
        """Return the weight of a server."""
        return int(self.ask(f"get weight back/app{index}").split()[0])

    def row(self, index: int) -> dict[str, str]:
        """Return the statistics of a server."""
        lines = self.ask("show stat").removeprefix("# ").splitlines()
        return next(row for row in csv.DictReader(lines) if row["svname"] == f"app{index}")

    def status(self, index: int) -> str:
        """Return the status of a server."""
        return self.row(index)["status"]

    def takes_clients(self, index: int) -> bool:
        """Whether a server takes clients, and the check has said so."""
        row = self.row(index)
        return row["status"].startswith(OPEN[self.kind]) and "L7OK" in (
            row["agent_status"] or row["check_status"]
        )

    def get(self) -> int:
        """Return the status of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status
        finally:
            connection.close()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a directory with the HTTP example as ``app``."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "app.py").write_text("from pool_http import handler\n")
    return project


@contextmanager
def haproxy(
    directory: Path, apps: Sequence[App], kind: str = AGENT
) -> Generator[HAProxy, None, None]:
    """Run HAProxy in front of servers, with a kind of checks."""
    program, port = require_program("haproxy"), free_port()
    servers = "".join(
        (SERVER + kind).format(index=index, port=app.port, check=app.check, stats=app.stats)
        for index, app in enumerate(apps)
    )
    config = directory / "haproxy"
    config.write_text(CONFIG.format(directory=directory, port=port) + servers)
    proxy = HAProxy(port, str(directory / "admin"), kind)

    def answers() -> bool:
        assert process.poll() is None, "HAProxy exited; its errors are on stderr"
        try:
            return "app0" in proxy.ask("show stat")
        except OSError:
            return False

    with subprocess.Popen([program, "-db", "-q", "-f", str(config)]) as process:
        try:
            until_sync(answers)
            yield proxy
        finally:
            process.terminate()


def test_haproxy_reads_weight_and_maxconn(tmp_path: Path, project: Path) -> None:
    """The weight follows the free capacity, and is never 0; maxconn is the capacity."""
    app = App()
    with (
        app.serving(project, "--max-in-flight", "4") as served,
        haproxy(tmp_path, [app]) as proxy,
        ExitStack() as stack,
    ):
        until_sync(lambda: proxy.row(0)["slim"] == "4")
        assert proxy.weight(0) == 100
        for weight in (75, 50, 25, 1):
            stack.enter_context(socket.create_connection(("127.0.0.1", app.port)))
            until_sync(lambda weight=weight: proxy.weight(0) == weight)  # type: ignore[misc]
            assert proxy.takes_clients(0)
        stack.close()
        until_sync(lambda: proxy.weight(0) == 100)
        assert proxy.get() == 200
        served.drained()


@pytest.mark.parametrize("kind", [AGENT, READY], ids=["agent", "ready"])
def test_haproxy_takes_a_server_out_during_a_drain(
    tmp_path: Path, project: Path, kind: str
) -> None:
    """A server drains and comes back under load without one failed request."""
    apps = [App(), App()]
    with (
        apps[1].serving(project) as other,
        haproxy(tmp_path, apps, kind) as proxy,
    ):
        with apps[0].serving(project, "--drain-delay", "1000") as served:
            until_sync(lambda: all(proxy.takes_clients(i) for i in range(2)))
            with clients_of(proxy.port, 8) as clients:
                wait_for_answers(clients, 20)
                served.send(signal.SIGTERM)
                served.line("not ready any more")
                until_sync(lambda: proxy.status(0).startswith(OUT[kind]))
                wait_for_answers(clients, 20)
                served.send_again(signal.SIGTERM)
                done = ended(served.process)
                # HAProxy keeps what the agent said last: "drain", or "down" at the very end.
                assert proxy.status(0).startswith((OUT[kind], "DOWN"))
                wait_for_answers(clients, 20)
        assert done.returncode == 0
        assert ", 0 failed, 0 abandoned, 0 rejected" in done.stdout
        with apps[0].serving(project) as served, clients_of(proxy.port, 8) as more:
            before = int(proxy.row(0)["stot"])
            until_sync(lambda: int(proxy.row(0)["stot"]) > before + 20)
            assert proxy.takes_clients(0)
            wait_for_answers(more, 20)
        other.drained()
    failures = [each.failures for each in (*clients, *more)]
    assert failures == [[]] * 16


def test_haproxy_takes_a_server_out_while_no_worker_is_alive(tmp_path: Path, project: Path) -> None:
    """While its last worker is restarted, a server is down, and another one has all requests."""
    apps = [App(), App()]
    with (
        apps[0].serving(project) as served,
        apps[1].serving(tmp_path, "--chdir", str(project)) as other,
        haproxy(tmp_path, apps) as proxy,
    ):
        until_sync(lambda: all(proxy.takes_clients(i) for i in range(2)))
        (project / "app.py").rename(project / "gone.py")
        os.kill(int(served.lines[-1].split()[-1]), signal.SIGKILL)
        until_sync(lambda: proxy.status(0).startswith("DOWN"))
        before = int(proxy.row(0)["stot"])
        assert {proxy.get() for _ in range(20)} == {200}
        assert int(proxy.row(0)["stot"]) == before
        (project / "gone.py").rename(project / "app.py")
        until_sync(lambda: proxy.takes_clients(0))
        assert {proxy.get() for _ in range(20)} == {200}
        assert int(proxy.row(0)["stot"]) > before
        served.drained()
        other.drained()
