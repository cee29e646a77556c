"""Three hosts with a pool each, and HAProxy in front: an upgrade of all, one killed, cut off, slow.

A host is a network namespace. HAProxy has one of its own, with a bridge to the others; its clients
connect to a path, which is in none of them. What the clients saw is a table in
docs/how-to/serve-behind-a-balancer.md; with ``-s``, the test prints it.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from tests._helpers.cli import COMMAND, ended
from tests._helpers.environment import environment
from tests._helpers.processes import children_of
from tests._helpers.real_programs import require_program
from tests._helpers.serve_cli import Served, hear_signals
from tests._helpers.waiting import until_sync
from tests.interop.test_haproxy_agent import HAProxy

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

pytestmark = [
    pytest.mark.interop,
    pytest.mark.once,
    pytest.mark.slow,
    pytest.mark.skipif(os.getuid() != 0, reason="makes network namespaces"),
]

HOSTS = 3
CLIENTS = 6
APP = """
import os
import trio

async def handler(stream, job):
    request = b""
    while b"\\r\\n\\r\\n" not in request:
        more = await stream.receive_some()
        if not more:
            return
        request += more
    if os.path.exists("slow"):
        await trio.sleep(0.5)
    body = VERSION
    head = b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n"
    await stream.send_all(head % len(body) + body)
"""
# No request is sent twice. Only a connection that was not established is tried at another host.
HAPROXY = """\
global
    stats socket {directory}/admin level admin
defaults
    mode http
    retries 3
    option redispatch 1
    retry-on conn-failure
    timeout connect 500ms
    timeout client 60s
    timeout server 5s
    timeout check 500ms
    timeout queue 60s
frontend front
    bind {directory}/front
    default_backend back
backend back
    balance leastconn
    option httpchk GET /ready
    default-server check port 9000 inter 100ms rise 1 fall 2
"""
SERVER = "    server app{index} 10.177.0.{host}:8000\n"


def ip(*arguments: str) -> None:
    subprocess.run([require_program("ip", package="iproute2"), *arguments], check=True)


@contextmanager
def networks() -> Generator[list[str], None, None]:
    """Make the namespace of HAProxy, and those of the hosts; return their names in this order."""
    name = f"unixconn-{os.getpid()}"
    found = [name, *(f"{name}-{index}" for index in range(HOSTS))]
    with ExitStack() as stack:
        for each in found:
            ip("netns", "add", each)
            stack.callback(ip, "netns", "delete", each)
            ip("-n", each, "link", "set", "lo", "up")
        ip("-n", name, "link", "add", "bridge", "type", "bridge")
        ip("-n", name, "address", "add", "10.177.0.1/24", "dev", "bridge")
        ip("-n", name, "link", "set", "bridge", "up")
        for index, each in enumerate(found[1:]):
            ip(
                *("-n", name, "link", "add", f"host{index}", "type", "veth"),
                *("peer", "name", "eth0", "netns", each),
            )
            ip("-n", name, "link", "set", f"host{index}", "master", "bridge", "up")
            ip("-n", each, "address", "add", f"10.177.0.{10 + index}/24", "dev", "eth0")
            ip("-n", each, "link", "set", "eth0", "up")
        yield found


@attrs.define
class Host:
    """One host; ``directory`` has its program."""

    network: str
    directory: Path
    served: Served | None = None

    def install(self, version: str) -> None:
        (self.directory / "app.py").write_text(f"VERSION = b{version!r}\n{APP}")

    def start(self) -> None:
        process = subprocess.Popen(
            [
                *(require_program("ip", package="iproute2"), "netns", "exec", self.network),
                *(*COMMAND, "serve", "app:handler", "--bind", "tcp:0.0.0.0:8000"),
                *("--stats", "tcp:0.0.0.0:9000", "--workers", "1", "--drain-delay", "1000"),
            ],
            cwd=self.directory,
            env=environment(),
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=hear_signals,
        )
        self.served = Served(process, self.directory)
        self.served.line("ready: ")

    def kill(self) -> None:
        """Kill all its processes at once."""
        if self.served is not None:
            pids = [self.served.process.pid, *children_of(self.served.process.pid)]
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            self.served.process.wait()
            assert self.served.process.stdout is not None
            self.served.process.stdout.close()
            self.served = None


@attrs.define
class Client:
    """Sends one request after the other, on a connection that it keeps."""

    path: str
    stop: threading.Event
    answers: list[tuple[str, float]] = attrs.field(factory=list[tuple[str, float]])

    def run(self) -> None:
        connection = http.client.HTTPConnection("hosts", timeout=60)
        while not self.stop.is_set():
            if connection.sock is None:
                connection.sock = socket.socket(socket.AF_UNIX)
                connection.sock.settimeout(60)
                connection.sock.connect(self.path)
            since = time.monotonic()
            try:
                connection.request("GET", "/")
                response = connection.getresponse()
                body = response.read().decode()
                said = body if response.status == 200 else str(response.status)
            except (OSError, http.client.HTTPException) as exc:
                said = type(exc).__name__
                connection.close()
            self.answers.append((said, time.monotonic() - since))
            time.sleep(0.005)
        connection.close()


@contextmanager
def load(path: str) -> Generator[list[Client], None, None]:
    """Send requests for the time of the block."""
    stop = threading.Event()
    clients = [Client(path, stop) for _ in range(CLIENTS)]
    threads = [threading.Thread(target=each.run) for each in clients]
    for thread in threads:
        thread.start()
    try:
        yield clients
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def more_answers(clients: Sequence[Client], count: int) -> None:
    """Wait until each client has so many more answers."""
    before = [len(each.answers) for each in clients]
    until_sync(
        lambda: all(
            len(each.answers) >= known + count for each, known in zip(clients, before, strict=True)
        )
    )


def report(what: str, clients: Sequence[Client]) -> dict[str, int]:
    """Print a row of the table, and return how many answers there were of each kind."""
    answers = [each for client in clients for each in client.answers]
    counts: dict[str, int] = {}
    for said, _ in answers:
        counts[said] = counts.get(said, 0) + 1
    failed = {said: count for said, count in counts.items() if not said.startswith("v")}
    longest = max(seconds for _, seconds in answers)
    sys.stdout.write(f"| {what} | {len(answers)} | {failed or 0} | {longest:.1f} s |\n")
    return counts


@pytest.fixture
def hosts(tmp_path: Path) -> Generator[tuple[list[Host], HAProxy, str], None, None]:
    """Three hosts that are up, HAProxy, and the name of its network."""
    program = require_program("haproxy")
    with networks() as (front, *names), ExitStack() as stack:
        found: list[Host] = []
        for index, name in enumerate(names):
            directory = tmp_path / str(index)
            directory.mkdir()
            host = Host(name, directory)
            stack.callback(host.kill)
            host.install("v1")
            host.start()
            found.append(host)
        servers = "".join(SERVER.format(index=i, host=10 + i) for i in range(HOSTS))
        config = tmp_path / "haproxy.cfg"
        config.write_text(HAPROXY.format(directory=tmp_path) + servers)
        haproxy = subprocess.Popen(
            [require_program("ip"), "netns", "exec", front, program, "-db", "-q", "-f", str(config)]
        )
        stack.callback(haproxy.wait)
        stack.callback(haproxy.terminate)
        until_sync((tmp_path / "admin").exists)
        proxy = HAProxy(0, str(tmp_path / "admin"), "")
        until_sync(lambda: all(is_up(proxy, index) for index in range(HOSTS)))
        yield found, proxy, front


def is_up(proxy: HAProxy, index: int) -> bool:
    row = proxy.row(index)
    return row["status"] == "UP" and row["check_status"] == "L7OK"


def answered_by(proxy: HAProxy, index: int) -> int:
    return int(proxy.row(index)["hrsp_2xx"])


def upgrade(host: Host, proxy: HAProxy, index: int, clients: Sequence[Client]) -> None:
    """Install the next version: the balancer takes the host out before it drains."""
    served = host.served
    assert served is not None
    host.install("v2")
    served.send(signal.SIGTERM)
    served.line("not ready any more")
    until_sync(lambda: proxy.status(index) == "DOWN")
    more_answers(clients, 20)
    served.send_again(signal.SIGTERM)
    done = ended(served.process)
    assert done.returncode == 0
    assert ", 0 failed, 0 abandoned, 0 rejected" in done.stdout
    host.start()
    until_sync(lambda: is_up(proxy, index))


def test_three_hosts(hosts: Any, tmp_path: Path) -> None:
    """An upgrade of all costs no request; a host that is killed costs those that it had."""
    found, proxy, front = hosts
    path = str(tmp_path / "front")

    with load(path) as clients:
        more_answers(clients, 20)
        for index, host in enumerate(found):
            upgrade(host, proxy, index, clients)
        more_answers(clients, 20)
        assert all(client.answers[-1][0] == "v2" for client in clients)
    counts = report("all hosts upgraded, one after the other", clients)
    assert set(counts) == {"v1", "v2"}

    (found[1].directory / "slow").touch()
    before = [answered_by(proxy, index) for index in range(HOSTS)]
    with load(path) as clients:
        more_answers(clients, 40)
    after = [answered_by(proxy, index) for index in range(HOSTS)]
    (found[1].directory / "slow").unlink()
    counts = report("one host takes half a second longer for each request", clients)
    shares = [now - then for now, then in zip(after, before, strict=True)]
    assert set(counts) == {"v2"}
    # The balancer gives it what it can take.
    assert shares[1] < min(shares[0], shares[2])

    with load(path) as clients:
        more_answers(clients, 20)
        found[0].kill()
        until_sync(lambda: proxy.status(0) == "DOWN")
        more_answers(clients, 20)
    counts = report("all processes of one host killed", clients)
    # HAProxy closes a connection of a client that has sent requests before.
    assert set(counts) <= {"v2", "502", "RemoteDisconnected"}
    # At most what it was answering.
    assert sum(counts.values()) - counts["v2"] <= CLIENTS
    found[0].start()
    until_sync(lambda: is_up(proxy, 0))

    with load(path) as clients:
        more_answers(clients, 20)
        ip("-n", front, "link", "set", "host2", "down")
        until_sync(lambda: proxy.status(2) == "DOWN")
        more_answers(clients, 20)
        ip("-n", front, "link", "set", "host2", "up")
        until_sync(lambda: is_up(proxy, 2))
        more_answers(clients, 20)
    counts = report("the cable of one host pulled, and plugged in again", clients)
    assert set(counts) <= {"v2", "504", "RemoteDisconnected"}
    assert sum(counts.values()) - counts["v2"] <= CLIENTS
