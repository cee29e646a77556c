"""``serve --stats``, ``--agent-check`` and ``--drain-delay``, as a load balancer sees them."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests._helpers.cli import ended, run_in_this_process, started
from tests._helpers.serve_cli import (
    Served,
    answer,
    connected,
    make_project,
    rest_of,
    serving,
    starting,
)
from tests._helpers.waiting import until_sync

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

pytestmark = pytest.mark.slow

CHECKS = ("--stats", "tcp:127.0.0.1:0", "--agent-check", "tcp:127.0.0.1:0")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a directory with a module of handlers, to run a server in."""
    return make_project(tmp_path)


def places(served: Served, what: str) -> list[tuple[str, int]]:
    """Return where a server that is ready said that it answers over TCP."""
    found = re.findall(rf"{what} at tcp:(\S+):(\d+)", "".join(served.lines))
    return [(host.strip("[]"), int(port)) for host, port in found]


def get(address: tuple[str, int], path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def agent(address: tuple[str, int]) -> str:
    with socket.create_connection(address, timeout=60) as client:
        return rest_of(client).decode()


@contextmanager
def checked(
    project: Path, handler: str, *arguments: str
) -> Generator[tuple[Served, tuple[str, int], tuple[str, int]], None, None]:
    """Serve with statistics and agent checks over TCP, and return where."""
    with serving(project, handler, *CHECKS, *arguments) as served:
        yield served, places(served, "statistics")[0], places(served, "agent checks")[0]


def test_stats_over_tcp_and_at_paths(project: Path) -> None:
    """Each form of --stats, as often as it is given, and --stats-socket answer the same."""
    arguments = (
        *("--stats", "tcp:127.0.0.1:0", "--stats", "tcp:[::1]:0", "--stats", "unix:a"),
        *("--stats", "unix:@trio-unixconn-test-stats", "--stats-socket", "b"),
    )
    with serving(project, "once", *arguments) as served:
        assert answer(str(project / "s")) == b"one"
        four, six = places(served, "statistics")
        assert (four[0], six[0]) == ("127.0.0.1", "::1")
        for address in (four, six):
            status, text = get(address, "/")
            assert (status, json.loads(text)["accepted"]) == (200, 1)
            assert get(address, "/ready") == (200, "ready\n")
            assert get(address, "/live") == (200, "live\n")
            assert get(address, "/metrics")[1].startswith("# HELP")
            assert get(address, "/nothing")[0] == 404
        for path in (str(project / "a"), str(project / "b"), "\0trio-unixconn-test-stats"):
            with connected(path) as client:
                client.sendall(b"json\n")
                assert json.loads(rest_of(client))["accepted"] == 1
        assert os.stat(project / "a").st_mode & 0o777 == 0o600
        told = served.drained()
    assert "drained: 1 accepted" in told
    assert [each.name for each in project.iterdir()] == ["app.py"]


@pytest.mark.parametrize("options", [(), ("--replace",)])
def test_stats_and_agent_check_while_the_workers_start(
    project: Path, options: tuple[str, ...]
) -> None:
    """Before the workers are ready, there is an answer: live, not ready, starting, down."""
    (project / "gate").touch()
    (project / "slow.py").write_text(
        "import os, time\nfrom app import once\n"
        "while os.path.exists('gate'):\n    time.sleep(0.01)\n"
    )
    with starting(project, "slow:once", *CHECKS, *options) as served:
        served.line("agent checks at")
        (stats,), (check,) = places(served, "statistics"), places(served, "agent checks")
        assert get(stats, "/ready") == (503, "the workers are starting\n")
        assert get(stats, "/live") == (200, "live\n")
        document = json.loads(get(stats, "/")[1])
        assert (document["state"], document["workers"], document["accepted"]) == ("starting", [], 0)
        assert 'trio_unixconn_pool_state{state="starting"} 1\n' in get(stats, "/metrics")[1]
        assert agent(check) == "down #the workers are starting\n"
        (project / "gate").unlink()
        served.line("ready: ")
        assert get(stats, "/ready") == (200, "ready\n")
        assert agent(check) == "up ready 100% maxconn:1000\n"
        assert answer(str(project / "s")) == b"one"
        served.drained()


def test_stats_and_agent_check_until_the_end_of_a_drain(project: Path) -> None:
    """From the signal until the last handler has ended: live, not ready, draining, drain."""
    with checked(project, "hold", "--max-in-flight", "4") as (served, stats, check):
        with connected(str(project / "s")) as client:
            assert client.recv(4) == b"held"
            assert agent(check) == "up ready 75% maxconn:4\n"
            served.send(signal.SIGTERM)
            served.line("draining 1 running")
            assert get(stats, "/ready") == (503, "draining\n")
            assert get(stats, "/live") == (200, "live\n")
            document = json.loads(get(stats, "/")[1])
            assert (document["state"], document["in_flight"]) == ("draining", 1)
            assert agent(check) == "drain\n"
            client.sendall(b"x")
            assert rest_of(client) == b"one"
        assert ended(served.process).returncode == 0
        for address in (stats, check):
            with pytest.raises(ConnectionRefusedError):
                agent(address)


def test_stats_and_agent_check_while_no_worker_is_alive(project: Path) -> None:
    """Between the death of the last worker and its successor: not ready, down."""
    with checked(project, "once") as (served, stats, check):
        (project / "app.py").rename(project / "gone.py")
        pid = json.loads(get(stats, "/")[1])["workers"][0]["pid"]
        os.kill(pid, signal.SIGKILL)
        until_sync(lambda: get(stats, "/ready")[0] == 503)
        assert get(stats, "/ready") == (503, "no worker accepts jobs at the moment\n")
        assert agent(check) == "down #no worker accepts jobs at the moment\n"
        assert json.loads(get(stats, "/")[1])["state"] == "down"
        (project / "gone.py").rename(project / "app.py")
        until_sync(lambda: get(stats, "/ready")[0] == 200)
        assert agent(check).startswith("up ready ")
        assert answer(str(project / "s")) == b"one"
        served.drained()


def test_stats_over_tcp_half_sent_requests(project: Path) -> None:
    """200 clients that send half a request do not hold up a scrape, nor the end of a drain."""
    with checked(project, "once") as (served, stats, check), ExitStack() as stack:
        for address in (stats, check):
            for _ in range(200):
                client = stack.enter_context(socket.create_connection(address, timeout=60))
                client.sendall(b"GET /metrics HT")
        assert get(stats, "/metrics")[0] == 200
        assert agent(check) == "up ready 100% maxconn:1000\n"
        served.drained()


################################################################
# --drain-delay
################################################################


def test_drain_delay_accepts_until_the_second_signal(project: Path) -> None:
    """Not ready from the first signal on, connections are accepted until the second one."""
    with checked(project, "once", "--drain-delay", "1000") as (served, stats, check):
        served.send(signal.SIGTERM)
        line = served.line("received SIGTERM")
        assert "not ready any more, accepting for 1000 seconds (signal again to drain now)" in line
        assert get(stats, "/ready") == (503, "draining\n")
        assert agent(check) == "drain\n"
        for _ in range(3):
            assert answer(str(project / "s")) == b"one"
        served.send_again(signal.SIGTERM)
        assert "draining 0 running and 0 queued jobs" in served.line("received SIGTERM")
        done = ended(served.process)
    assert (done.returncode, done.stderr) == (0, "")
    assert "drained: 3 accepted, 0 denied, 3 handled, 0 failed" in done.stdout


def test_drain_delay_passes(project: Path) -> None:
    """After the delay it drains as without one, with the drain timeout from then on."""
    options = ("--drain-delay", "0.2", "--drain-timeout", "0.2")
    with checked(project, "hold", *options) as (served, *_):
        with connected(str(project / "s")) as client:
            assert client.recv(4) == b"held"
            served.send(signal.SIGTERM)
            served.line("accepting for 0.2 seconds")
            served.line("the drain delay has passed, draining 1 running and 0 queued jobs")
            assert rest_of(client) == b""
        done = ended(served.process)
    assert done.returncode == 0
    assert "1 failed" in done.stdout


def test_drain_delay_third_signal_exits_immediately(project: Path) -> None:
    """The second signal ends the delay, and the third one the drain."""
    with (
        checked(project, "hold", "--drain-delay", "inf") as (served, *_),
        connected(str(project / "s")) as client,
    ):
        assert client.recv(4) == b"held"
        served.send(signal.SIGTERM)
        served.line("received SIGTERM")
        served.send_again(signal.SIGTERM)
        assert "draining 1 running" in served.line("received SIGTERM")
        served.send_again(signal.SIGTERM)
        done = ended(served.process)
    assert done.returncode == 128 + signal.SIGTERM


################################################################
# Arguments
################################################################


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stats", "stats.sock"], "--stats: expected tcp:HOST:PORT, unix:PATH"),
        (["--stats", "tcp::9100"], "--stats: expected tcp:HOST:PORT"),
        (["--stats", "tcp::9100"], "every address of this machine is 0.0.0.0 or [::]"),
        (["--stats", "tcp:localhost:99999"], "--stats tcp:localhost:99999: a port is a number"),
        (["--agent-check", "9101"], "--agent-check: expected tcp:HOST:PORT"),
        (["--agent-check", "tcp:::1:9101"], "--agent-check: expected tcp:HOST:PORT"),
        (["--stats", "unix:s"], "--stats unix:s: this is given twice"),
        (["--stats", "unix:t", "--stats-socket", "t"], "--stats unix:t: this is given twice"),
        (
            ["--stats", "tcp:localhost:9100", "--agent-check", "tcp:localhost:9100"],
            "--agent-check tcp:localhost:9100: this is given twice",
        ),
        (["--drain-delay", "-1"], "--drain-delay must be non-negative, got -1"),
        (["--drain-delay", "nan"], "--drain-delay must be non-negative, got nan"),
    ],
)
def test_checks_reject_wrong_arguments(arguments: list[str], said: str) -> None:
    """A wrong place or delay is one line and exit status 2, before anything is opened."""
    done = run_in_this_process("serve", "app:once", "--bind", "unix:s", *arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_stats_where_another_program_listens(project: Path) -> None:
    """A port that is in use is one line and exit status 1, and nothing is left."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        name = f"tcp:127.0.0.1:{other.getsockname()[1]}"
        arguments: Any = ("--bind", "unix:s", "--stats", "unix:stats", "--stats", name)
        with started("serve", "app:once", *arguments, cwd=project) as process:
            done = ended(process)
    assert done.returncode == 1
    assert done.stderr == f"trio-unixconn: {name}: Address already in use\n"
    assert {each.name for each in project.iterdir()} == {"app.py"}
