"""The example ``pool_http`` under restarts and drains: no client's request fails."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest
from cli import ended, started
from serve_cli import Served, hear_signals, until

if TYPE_CHECKING:
    from collections.abc import Generator

EXAMPLES = Path(__file__).parent.parent / "examples"


@contextmanager
def http_server(*arguments: str) -> Generator[tuple[Served, int], None, None]:
    """Run the example with two workers, and return it with its port."""
    with started(
        *("serve", "pool_http:handler", "--bind", "tcp:127.0.0.1:0", "--workers", "2", *arguments),
        cwd=EXAMPLES,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=hear_signals,
    ) as process:
        served = Served(process, EXAMPLES)
        found = re.search(r":(\d+)\n", served.line("listening at"))
        assert found
        served.line("ready: ")
        yield served, int(found[1])


@attrs.define
class KeepAliveClient:
    """A client that sends one request after the other on a connection, until it is told to end.

    It opens another connection only after an answer with ``Connection: close``. Everything else
    that ends a connection is a failure.
    """

    port: int
    answered: int = 0
    connections: int = 0
    failures: list[str] = attrs.field(factory=list[str])
    pause: float = 0

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            self.connections += 1
            try:
                self._use(connection, stop)
            except (OSError, http.client.HTTPException) as exc:
                self.failures.append(repr(exc))
            finally:
                connection.close()

    def _use(self, connection: http.client.HTTPConnection, stop: threading.Event) -> None:
        while not stop.is_set():
            connection.request("GET", "/")
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200 or b"Hello" not in body:
                self.failures.append(f"{answer.status} {body!r}")
            self.answered += 1
            if answer.will_close:
                return
            time.sleep(self.pause)


def test_keep_alive_clients_survive_restarts_and_a_drain() -> None:
    """Under SIGHUPs, and a SIGTERM at the end, no request on a connection kept alive fails."""
    clients = []
    stop = threading.Event()
    with http_server() as (served, port):
        clients = [KeepAliveClient(port, pause=index * 0.002) for index in range(8)]
        threads = [threading.Thread(target=each.run, args=(stop,)) for each in clients]
        for thread in threads:
            thread.start()
        for _ in range(4):
            before = [each.connections for each in clients]
            served.send(signal.SIGHUP)
            served.line("restarted: ")
            # Each of them is told to connect again, and does.
            for each, count in zip(clients, before, strict=True):
                until(lambda each=each, count=count: each.connections > count)  # type: ignore[misc]
        served.send(signal.SIGTERM)
        served.line("draining")
        stop.set()
        for thread in threads:
            thread.join()
        done = ended(served.process)
    assert (done.returncode, done.stderr) == (0, "")
    assert [each.failures for each in clients] == [[]] * len(clients)
    assert sum(each.answered for each in clients) > 100
    assert ", 0 failed, 0 abandoned, 0 rejected" in done.stdout


def test_sigterm_with_an_idle_client_exits_soon() -> None:
    """A client that keeps its connection and sends nothing does not hold up the end for long."""
    with (
        http_server("--drain-timeout", "1000") as (served, port),
        socket.create_connection(("127.0.0.1", port), timeout=60) as client,
    ):
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" not in answer.lower()
        served.send(signal.SIGTERM)
        # LONGEST_EXCHANGE is 20 seconds.
        assert client.recv(65536) == b""
        done = ended(served.process)
    assert done.returncode == 0


def test_request_during_a_drain_is_answered_with_connection_close() -> None:
    """A client that was idle when the drain began gets an answer that says how it goes on."""
    with (
        http_server() as (served, port),
        socket.create_connection(("127.0.0.1", port), timeout=60) as client,
    ):
        request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        client.sendall(request)
        assert b"connection: close" not in client.recv(65536).lower()
        served.send(signal.SIGTERM)
        answer = b""
        # The worker knows a moment later.
        while b"connection: close" not in answer.lower():
            client.sendall(request)
            answer = client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 ")
        assert client.recv(65536) == b""
        assert ended(served.process).returncode == 0


@pytest.mark.skipif(
    shutil.which("wrk") is None and "CI" not in os.environ, reason="wrk is not installed"
)
def test_wrk_with_keep_alive_under_restarts() -> None:
    """Wrk counts no error on connections kept alive while the workers are replaced."""
    with http_server() as (served, port):
        command = ["wrk", "-t1", "-c8", "-d4s", f"http://127.0.0.1:{port}/"]
        load = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while load.poll() is None:
            served.send(signal.SIGHUP)
            served.line("restarted: ")
        out, _ = load.communicate(timeout=60)
        text = served.drained()
    assert int(re.findall(r"(\d+) requests in", out)[0]) > 0
    assert "Socket errors" not in out
    assert "Non-2xx" not in out
    assert ", 0 failed, 0 abandoned, 0 rejected" in text
