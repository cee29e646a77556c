"""The servers: how each is started, and how it is replaced.

Invariant: a server is a session of processes of its own, which is killed at the end.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tests._helpers.environment import environment
from tests._helpers.processes import family, python
from tests.bench.implementations import (
    OURS,
    FailedError,
    Implementation,
    MissingError,
    Program,
    failed,
    installed,
)

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent / "implementations"
PACKAGE = f"{__package__}.implementations"
WORKERS = 2
# In seconds. Only what hangs takes so long.
PATIENCE = 30

NGINX = """\
daemon {daemon};
worker_processes {workers};
pid {directory}/pid;
error_log {directory}/error.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    keepalive_timeout 0;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{ return 200 "$pid"; }}
    }}
}}
"""
HAPROXY = """\
global
    nbthread {workers}
    maxconn 4096
    stats socket {directory}/admin level admin expose-fd listeners
defaults
    mode http
    option httpclose
    timeout connect 30s
    timeout client 30s
    timeout server 30s
frontend front
    bind 127.0.0.1:{port} backlog 4096
    http-request return status 200 content-type text/plain string haproxy
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def find_program(name: str, *version: str) -> tuple[str, str]:
    """Return the path of a program, and the first line that it prints of its version."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        raise MissingError(f"{name} is not installed")
    done = subprocess.run([found, *version], check=True, capture_output=True, text=True)
    return found, (done.stdout or done.stderr).split("\n", 1)[0]


class Server:
    """A server that can be replaced.

    Attributes:
      name: in the tables.
      port: where it serves.
      version: of its parts.
    """

    key: ClassVar[str]
    name: ClassVar[str]
    #: The signal that replaces it.
    number: ClassVar[int] = signal.SIGHUP
    #: How many of its processes stay, beside the main one.
    stays: ClassVar[int] = 0

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self.port = free_port()
        self.version = ""
        self._errors = open(directory / "stderr", "w+")  # noqa: SIM115 - closed at the end
        self._sessions: list[subprocess.Popen[bytes]] = []
        self.main = self.start(self.command())

    def command(self) -> list[str]:
        """Return the command that starts it; sets :attr:`version`."""
        raise NotImplementedError

    def start(self, command: list[str]) -> int:
        """Start a process; return its pid."""
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            env=self.environment(),
            start_new_session=True,
        )
        self._sessions.append(process)
        return process.pid

    def environment(self) -> dict[str, str]:
        return environment()

    def await_start(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            if time.monotonic() > deadline or self._sessions[0].poll():
                raise self._failed("did not start")
            time.sleep(0.02)
        self.settle()

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return b" 200 " in sock.recv(1024)
        return False

    def settle(self) -> None:
        """Wait until it can be replaced."""
        time.sleep(0.3)

    def pids(self) -> set[int]:
        """Return its processes that live."""
        return {pid for pid in family(self.main) if os.path.exists(f"/proc/{pid}/exe")}

    def replace(self) -> bool:
        """Replace it; return whether other processes serve now, and those before have ended."""
        before = self.pids()
        os.kill(self.main, self.number)
        # With the main process.
        return self.wait_until(lambda: len(before & self.pids()) <= 1 + self.stays)

    def wait_until(self, holds: Callable[[], bool]) -> bool:
        """Return whether a condition holds, at once or soon."""
        deadline = time.monotonic() + PATIENCE
        while not holds():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def _failed(self, how: str) -> FailedError:
        return failed(f"{self.name} {how}", [], self._errors)

    def close(self) -> None:
        """Kill its processes."""
        for pid in family(self.main):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._sessions:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._errors.close()


class Ours(Server):
    """This library, one process."""

    key, name, number = "ours", OURS, signal.SIGUSR2

    def command(self) -> list[str]:
        self.version = f"{installed(OURS)}, {installed('trio')}"
        return [*python(f"{PACKAGE}.ours", str(self.directory), str(self.port)), *self.options()]

    def options(self) -> list[str]:
        return []

    def path(self) -> Path:
        """Return the path where it also serves."""
        return self.directory / "web"

    def replace(self) -> bool:
        return replaced_by_pid_file(self)


class OursServe(Server):
    """The command line of this library, with workers."""

    key, name, number = "serve", f"{OURS}: serve, {WORKERS} workers", signal.SIGUSR2

    def command(self) -> list[str]:
        self.version = f"{installed(OURS)}, {installed('trio')}"
        return [
            *(sys.executable, "-m", OURS, "serve", f"{PACKAGE}.pool_handler:handler"),
            *("--bind", f"tcp:127.0.0.1:{self.port}", "--workers", str(WORKERS)),
            *("--upgrade-socket", str(self.directory / "upgrade")),
            *("--pid-file", str(self.directory / "pid")),
        ]

    def replace(self) -> bool:
        return replaced_by_pid_file(self)


class NginxHup(Server):
    """nginx, which starts new workers."""

    key, name = "nginx-hup", "nginx, HUP"
    daemon: ClassVar[str] = "off"

    def command(self) -> list[str]:
        program, self.version = find_program("nginx", "-v")
        config = self.directory / "nginx.conf"
        config.write_text(
            NGINX.format(
                directory=self.directory, port=self.port, workers=WORKERS, daemon=self.daemon
            )
        )
        return [program, "-c", str(config)]


class NginxUsr2(NginxHup):
    """nginx, which starts its program again."""

    key, name, number = "nginx-usr2", "nginx, USR2 and QUIT", signal.SIGUSR2
    # It ignores USR2 while its parent is the one that has started it.
    daemon = "on"

    def settle(self) -> None:
        super().settle()
        self.main = int((self.directory / "pid").read_text())

    def replace(self) -> bool:
        before, path = self.main, self.directory / "pid"
        pidfd = os.pidfd_open(before)
        os.kill(before, signal.SIGUSR2)

        def is_started() -> bool:
            with suppress(OSError, ValueError):
                self.main = int(path.read_text())
            return self.main != before and len(family(self.main)) > WORKERS

        found = self.wait_until(is_started)
        os.kill(before, signal.SIGQUIT)
        # It stays until its new master has ended, but for its workers.
        found = bool(select.select([pidfd], [], [], PATIENCE)[0]) and found
        os.close(pidfd)
        return found


class HAProxyMaster(Server):
    """HAProxy with a master process."""

    key, name, number = "haproxy", "HAProxy -W, USR2", signal.SIGUSR2

    def command(self) -> list[str]:
        return [*self.haproxy(), "-W"]

    def haproxy(self) -> list[str]:
        program, self.version = find_program("haproxy", "-v")
        config = self.directory / "haproxy.cfg"
        config.write_text(HAPROXY.format(directory=self.directory, port=self.port, workers=WORKERS))
        return [program, "-db", "-f", str(config)]


class HAProxySockets(HAProxyMaster):
    """HAProxy, whose sockets another one takes."""

    key, name = "haproxy-x", "HAProxy, -x and -sf"

    def command(self) -> list[str]:
        return self.haproxy()

    def replace(self) -> bool:
        before = self._sessions.pop()
        admin = str(self.directory / "admin")
        self.main = self.start([*self.haproxy(), "-x", admin, "-sf", str(before.pid)])
        try:
            before.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            before.kill()
            before.wait()
            return False
        return True


class GunicornHup(Server):
    """gunicorn, which starts new workers."""

    key, name = "gunicorn-hup", "gunicorn, HUP"

    def command(self) -> list[str]:
        self.version = installed("gunicorn")
        return [
            *python("gunicorn", f"{PACKAGE}.asgi:wsgi", "--workers", str(WORKERS)),
            *("--bind", f"127.0.0.1:{self.port}", "--pid", str(self.directory / "pid")),
            *("--log-level", "error", "--worker-tmp-dir", "/dev/shm"),
        ]


class GunicornUsr2(GunicornHup):
    """gunicorn, which starts its program again."""

    key, name, number = "gunicorn-usr2", "gunicorn, USR2 and TERM", signal.SIGUSR2

    def replace(self) -> bool:
        before = self.main
        pidfd = os.pidfd_open(before)
        os.kill(before, signal.SIGUSR2)
        path = self.directory / "pid.2"

        def is_started() -> bool:
            with suppress(OSError, ValueError):
                self.main = int(path.read_text())
            return self.main != before and len(family(self.main)) > WORKERS

        found = self.wait_until(is_started)
        # Its workers are forked, and import next.
        time.sleep(0.2)
        os.kill(before, signal.SIGTERM)
        found = bool(select.select([pidfd], [], [], PATIENCE)[0]) and found
        os.close(pidfd)
        return found and self.wait_until(lambda: not path.exists())


class Hypercorn(Server):
    """hypercorn, which starts new workers."""

    key, name = "hypercorn", "hypercorn, HUP"
    # The resource tracker of multiprocessing.
    stays = 1

    def command(self) -> list[str]:
        self.version = installed("hypercorn")
        return [
            *python("hypercorn", f"{PACKAGE}.asgi:asgi", "--workers", str(WORKERS)),
            *("--bind", f"127.0.0.1:{self.port}", "--log-level", "critical"),
        ]


class Uvicorn(Server):
    """uvicorn, which starts new workers."""

    key, name = "uvicorn", "uvicorn, HUP"
    stays = 1

    def command(self) -> list[str]:
        self.version = installed("uvicorn")
        return [
            *python("uvicorn", f"{PACKAGE}.asgi:asgi", "--workers", str(WORKERS)),
            *("--port", str(self.port), "--log-level", "critical", "--lifespan", "off"),
        ]


class Node(Server):
    """Node's cluster, whose workers are replaced one after another."""

    key, name = "node", "Node's cluster"

    def command(self) -> list[str]:
        program, version = find_program("node", "--version")
        self.version = f"Node {version}"
        return [program, str(HERE / "node_cluster.js"), str(self.port), str(WORKERS)]


class Tableflip(Server):
    """tableflip, in Go."""

    key, name = "tableflip", "tableflip"

    def command(self) -> list[str]:
        go, self.version = find_program("go", "version")
        if not os.path.isdir("/usr/share/gocode/src/github.com/cloudflare/tableflip"):
            raise MissingError("golang-github-cloudflare-tableflip-dev is not installed")
        program = str(self.directory / "tableflip")
        cache = str(self.directory.parent / "go")
        subprocess.run(
            [go, "build", "-o", program, str(HERE / "tableflip" / "main.go")],
            check=True,
            capture_output=True,
            env={
                **environment(),
                "GO111MODULE": "off",
                "GOPATH": "/usr/share/gocode",
                "GOCACHE": os.environ.get("GOCACHE", cache),
                "GOFLAGS": "",
            },
        )
        return [program, str(self.port), str(self.directory / "pid")]

    def replace(self) -> bool:
        return replaced_by_pid_file(self)


def replaced_by_pid_file(server: Server) -> bool:
    """Signal a server, whose successor writes its pid to a file; wait until it has ended."""
    before = server.main
    pidfd = os.pidfd_open(before)
    os.kill(before, server.number)

    def is_replaced() -> bool:
        with suppress(OSError, ValueError):
            server.main = int((server.directory / "pid").read_text())
        return server.main != before

    found = server.wait_until(is_replaced)
    found = bool(select.select([pidfd], [], [], PATIENCE)[0]) and found
    os.close(pidfd)
    return found


SERVERS: list[type[Server]] = [
    *(Ours, OursServe, HAProxyMaster, HAProxySockets, NginxHup, NginxUsr2),
    *(GunicornHup, GunicornUsr2, Hypercorn, Uvicorn, Node, Tableflip),
]


def _find(_: str) -> Program:
    raise NotImplementedError


IMPLEMENTATIONS = [Implementation(each.key, each.name, _find) for each in SERVERS]
