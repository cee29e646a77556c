"""The example ``pool_http`` under restarts and drains: no client's request fails."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess

import pytest

from tests._helpers.cli import ended
from tests._helpers.http_clients import clients_of, http_server
from tests._helpers.waiting import until_sync

pytestmark = pytest.mark.slow


def test_keep_alive_clients_survive_restarts_and_a_drain() -> None:
    """SIGHUPs close no connection that is kept alive, and a SIGTERM at the end fails no request."""
    with http_server() as (served, port):
        with clients_of(port, 8) as clients:
            for _ in range(4):
                served.send(signal.SIGHUP)
                new = re.findall(r"\d+", served.line("restarted: ").partition("workers")[2])
                assert len(new) == 2
                # Their connections are passed on to the new workers.
                for each in clients:
                    until_sync(lambda each=each, new=new: each.worker in new or each.failures)  # type: ignore[misc]
            assert [each.connections for each in clients] == [1] * len(clients)
            assert not any(each.is_refused for each in clients)
            # From now on other connections are refused, as soon as all were accepted.
            served.send(signal.SIGTERM)
            served.line("draining")
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
        command = ["wrk", "-t1", "-c8", "-d2s", f"http://127.0.0.1:{port}/"]
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
