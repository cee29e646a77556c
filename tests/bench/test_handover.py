"""The benchmark of handovers counts what happens to requests, and judges it."""

from __future__ import annotations

import json
import os
import socket
import threading
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.bench.handover.report import judge, lost, markdown
from tests.bench.handover.runner import RESULT, Load, replace_regularly, result_of
from tests.bench.handover.servers import Ours, free_port

from .implementations import OURS, MissingError

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.slow, pytest.mark.once]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """The clients, compiled."""
    try:
        return Load(str(tmp_path_factory.mktemp("load")))
    except MissingError as exc:
        assert not os.environ.get("CI"), exc
        pytest.skip(str(exc))


def answer(conn: socket.socket) -> None:
    conn.recv(4096)
    conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")


def fail(conn: socket.socket) -> None:
    conn.recv(4096)
    conn.sendall(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")


def read(conn: socket.socket) -> None:
    conn.recv(4096)


def reset(conn: socket.socket) -> None:
    conn.recv(1)


@pytest.mark.parametrize(
    ("serve", "outcome"),
    [(answer, "answered"), (fail, "wrong"), (read, "empty"), (reset, "reset")],
)
def test_load_counts_outcomes(
    load: Load, serve: Callable[[socket.socket], None], outcome: str
) -> None:
    """Each request has one outcome, which is what the server did to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    conn, _ = server.accept()
                except OSError:
                    return
                with closing(conn):
                    serve(conn)

        thread = threading.Thread(target=accept)
        thread.start()
        port = server.getsockname()[1]
        counted = load.run(["--port", str(port)], 0.2, "--rate", "100")
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert counted["begun"] == counted[outcome] > 0
    assert lost(counted) == (0 if outcome == "answered" else counted["begun"])


def test_load_counts_refused_requests(load: Load, tmp_path: Path) -> None:
    """Without a server, requests are refused, over TCP and Unix."""
    for target in (["--port", str(free_port())], ["--path", str(tmp_path / "none")]):
        counted = load.run(target, 0.1, "--rate", "100")
        assert counted["begun"] == counted["refused"] > 0


def test_replaced_server_loses_nothing(load: Load, tmp_path: Path) -> None:
    """Our server is replaced while connections are kept, and new ones are opened."""
    server = Ours(tmp_path / "ours")
    try:
        server.await_start()
        target = ["--port", str(server.port)]
        kept = load.start(target, 4, "--rate", "50", "--kept", "20")
        others = load.start(target, 4, "--rate", "50")
        assert replace_regularly(server, 2, 0.5) == 2
        results = [result_of(kept), result_of(others)]
    finally:
        server.close()
    assert [(lost(each) - each["late"], each["closed"]) for each in results] == [(0, 0), (0, 0)]


def test_kept_result_is_judged() -> None:
    """The kept result has our server, and its tables are those of the documentation."""
    result = json.loads(RESULT.read_text())
    assert OURS in result["compared"]["servers"]
    assert [each.word for each in judge(result) if each.expected == "0"] == ["met"] * 5
    assert markdown(result) == RESULT.with_suffix(".md").read_text()
