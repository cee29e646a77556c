"""serve_statistics: the statistics of a pool, for clients of a Unix socket and of TCP."""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
import socket
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import h11
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import wait_all_tasks_blocked

from tests._helpers.fds import free_descriptors
from tests._helpers.statistics_samples import STATISTICS, latency
from tests._helpers.waiting import until
from trio_unixconn import (
    ConnectionBrokenError,
    ConnectionClosedError,
    PeerPolicy,
    UnixListener,
    _accept,
    open_unix_connection,
    open_unix_listener,
)
from trio_unixconn.pool import (
    Latency,
    PoolStatistics,
    WorkerServer,
    _exchanges,
    _stats_server,
    serve_statistics,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from prometheus_client import Metric


@attrs.define
class Pool:
    """An object with statistics."""

    value: PoolStatistics = STATISTICS

    def statistics(self) -> PoolStatistics:
        return self.value


def server() -> WorkerServer:
    pool: Any = Pool()
    return WorkerServer(pool, [], accepted=120, denied=20)


@asynccontextmanager
async def asked_at(path: Any, source: Any = None, **options: Any) -> AsyncGenerator[Any, None]:
    async with trio.open_nursery() as nursery:
        with trio.fail_after(60):
            yield await nursery.start(
                partial(serve_statistics, source or server(), path, **options)
            )
        nursery.cancel_scope.cancel()


Stream = trio.abc.HalfCloseableStream


@asynccontextmanager
async def two_kinds(
    kind: str, tmp_path: Path, source: Any = None
) -> AsyncGenerator[Callable[[], Awaitable[Stream]], None]:
    """Serve at a Unix socket or over TCP, and return what connects to it."""
    if kind == "unix":
        async with asked_at(tmp_path / "s", source):
            yield partial(open_unix_connection, tmp_path / "s")
    else:
        async with asked_at(("127.0.0.1", 0), source) as listeners:
            yield partial(trio.open_tcp_stream, *listeners[0].socket.getsockname())


async def rest_of(stream: Stream) -> bytes:
    return b"".join([data async for data in stream])


async def ask(
    address: Path | Callable[[], Awaitable[Stream]], *sent: bytes, ends: bool = False
) -> bytes:
    """Send a request in pieces, and return the answer."""
    answer = b""
    connect = address if callable(address) else partial(open_unix_connection, address)
    async with await connect() as conn:
        for each in sent:
            await conn.send_all(each)
            # Otherwise they are received as one.
            await wait_all_tasks_blocked(0.01)
        if ends:
            await conn.send_eof()
        async for data in conn:
            answer += data
    return answer


def families(text: str) -> dict[str, Metric]:
    return {each.name: each for each in text_string_to_metric_families(text)}


################################################################
# The formats
################################################################


def test_as_json() -> None:
    """The document has every attribute by its name, and each worker; it is strict JSON."""
    text = _stats_server.as_json(STATISTICS, {"accepted": 1})
    document = json.loads(text, parse_constant=pytest.fail)
    assert document.pop("accepted") == 1
    expected = attrs.asdict(STATISTICS)
    for name in "wait", "handling":
        latency: Latency = getattr(STATISTICS, name)
        expected[name]["buckets"] = {
            "+Inf" if bound == math.inf else f"{bound:g}": count for bound, count in latency.buckets
        }
    assert document == json.loads(json.dumps(expected))


def test_as_prometheus() -> None:
    """Prometheus's own parser finds every value, with help, and counters as such."""
    text = _stats_server.as_prometheus(STATISTICS, {"accepted": 120, "denied": 20})
    found = families(text)
    assert text.endswith("\n")
    assert all(each.documentation for each in found.values())
    names = {
        **{name: f"jobs_{name}" for name in attrs.asdict(STATISTICS)},
        "capacity": "capacity_jobs",
        "queue_age": "queue_age_seconds",
        "restarts": "restarts",
        "deaths": "deaths",
    }
    gauges = {"capacity", "queued", "queue_age", "in_flight"}
    for name in attrs.asdict(STATISTICS):
        if name not in ("state", "workers", "wait", "handling"):
            family = found[f"trio_unixconn_pool_{names[name]}"]
            assert family.type == ("gauge" if name in gauges else "counter")
            (sample,) = family.samples
            assert sample.value == getattr(STATISTICS, name)
            assert sample.name.endswith("_total") == (family.type == "counter")
    assert found["trio_unixconn_connections_accepted"].samples[0].value == 120
    assert found["trio_unixconn_connections_denied"].samples[0].value == 20
    assert {
        each.labels["state"]: each.value for each in found["trio_unixconn_pool_workers"].samples
    } == {"ready": 2, "draining": 1, "starting": 0}
    assert {
        each.labels["state"]: each.value for each in found["trio_unixconn_pool_state"].samples
    } == {"starting": 0, "ready": 1, "down": 0, "draining": 0, "failed": 0, "ended": 0}


def test_as_prometheus_of_latencies() -> None:
    """A latency is a histogram of cumulative buckets, with its sum and count."""
    found = families(_stats_server.as_prometheus(STATISTICS, {}))
    family = found["trio_unixconn_pool_job_wait_seconds"]
    assert family.type == "histogram"
    buckets = {
        each.labels["le"]: each.value for each in family.samples if each.name.endswith("_bucket")
    }
    assert [buckets[le] for le in ("0.0005", "0.001", "0.0025", "60", "+Inf")] == [1, 1, 2, 2, 3]
    assert {each.name[-6:]: each.value for each in family.samples if "le" not in each.labels} == {
        "ds_sum": STATISTICS.wait.sum,
        "_count": 3,
    }


def test_as_prometheus_has_one_series_for_a_worker() -> None:
    """The number of series does not grow when a worker is replaced: no label is a pid."""
    found = families(_stats_server.as_prometheus(STATISTICS, {}))
    assert "trio_unixconn_connections_accepted" not in found
    memory = found["trio_unixconn_worker_resident_memory_bytes"]
    # Of index 0 the new worker and the one that drains are added.
    assert [(each.labels, each.value) for each in memory.samples] == [
        ({"worker": "0"}, 10 << 20),
        ({"worker": "1"}, 5 << 20),
    ]
    handled = found["trio_unixconn_worker_jobs_handled"]
    assert [each.value for each in handled.samples] == [20, 20]
    for family in found.values():
        labels = [(each.name, *each.labels.items()) for each in family.samples]
        assert len(set(labels)) == len(labels)
    assert found["trio_unixconn_worker_age_seconds"].samples[0].value == 6.5


def test_as_prometheus_exposes_every_counter() -> None:
    """No attribute of the statistics is forgotten."""
    exposed = {each[0] for each in (*_stats_server._POOL, *_stats_server._LATENCIES)}
    assert exposed == {each.name for each in attrs.fields(PoolStatistics)} - {"workers", "state"}


def test_documentation_has_every_metric() -> None:
    """The table of the how-to has the metrics of as_prometheus, with their types."""
    page = Path(__file__).parents[2] / "docs" / "how-to" / "use-a-worker-pool.md"
    rows = re.findall(r"^\| `(trio_unixconn_\w+).*?` \| (\w+) \|", page.read_text(), re.MULTILINE)
    text = _stats_server.as_prometheus(STATISTICS, {"accepted": 1, "denied": 0})
    assert sorted(rows) == sorted(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))


def test_latency_quantile() -> None:
    """A quantile is the bound of its bucket."""
    times = latency(*[0.002] * 98, 0.3, 70.0)
    assert times.count == 100
    assert times.sum == pytest.approx(70.496)
    assert [times.quantile(each) for each in (0, 0.5, 0.98, 0.99, 1)] == [
        *(0.0005, 0.0025, 0.0025, 0.5, math.inf)
    ]
    assert math.isnan(latency().quantile(0.5))
    with pytest.raises(ValueError, match=r"fraction must be between 0 and 1, got 1\.5"):
        times.quantile(1.5)


################################################################
# Requests
################################################################


@pytest.mark.parametrize(
    ("sent", "ends"),
    [
        ([b"json\n"], False),
        ([b"json\r\n"], False),
        ([b"js", b"on\n"], False),
        ([b"json"], True),
        ([], True),
        ([], False),
        ([b"\n"], False),
    ],
)
async def test_serve_statistics_answers_json(
    tmp_path: Path, sent: list[bytes], *, ends: bool
) -> None:
    """The answer to the word json, to nothing, and to silence is the document."""
    async with asked_at(tmp_path / "s"):
        document = json.loads(await ask(tmp_path / "s", *sent, ends=ends))
    assert document["accepted"] == 120
    assert document["workers"][0]["pid"] == 100


async def test_serve_statistics_answers_prometheus(tmp_path: Path) -> None:
    """The answer to the word prometheus is Prometheus's text format."""
    async with asked_at(tmp_path / "s"):
        found = families((await ask(tmp_path / "s", b"prometheus\n")).decode())
    assert found["trio_unixconn_pool_jobs_handled"].samples[0].value == 80


async def test_serve_statistics_of_a_pool(tmp_path: Path) -> None:
    """A pool without a server has no counters of connections."""
    async with asked_at(tmp_path / "s", Pool()):
        assert "accepted" not in json.loads(await ask(tmp_path / "s", b"json\n"))


async def test_serve_statistics_of_an_unknown_word(tmp_path: Path) -> None:
    """The answer to another word says what is expected."""
    async with asked_at(tmp_path / "s"):
        answer = await ask(tmp_path / "s", b"xml\n")
        assert answer == b"expected json, prometheus or an HTTP request\n"


def parsed(raw: bytes, method: str = "GET") -> tuple[h11.Response, str]:
    """Parse an answer as an HTTP client does."""
    http = h11.Connection(h11.CLIENT)
    http.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    http.send(h11.EndOfMessage())
    http.receive_data(raw)
    http.receive_data(b"")
    response = http.next_event()
    assert isinstance(response, h11.Response)
    body = b""
    while isinstance(event := http.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    return response, body.decode()


def request(target: str, method: str = "GET") -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


async def test_serve_statistics_answers_http(tmp_path: Path) -> None:
    """GET / is the document, GET /metrics is Prometheus's text format; then the stream ends."""
    path = tmp_path / "s"
    async with asked_at(path):
        response, text = parsed(await ask(path, request("/")))
        assert response.status_code == 200
        assert json.loads(text)["denied"] == 20
        headers = dict(response.headers)
        assert headers[b"content-type"] == b"application/json"
        assert headers[b"connection"] == b"close"
        raw = request("/metrics?x=1")
        for pieces in ([raw], [raw[:3], raw[3:20], raw[20:]]):
            response, text = parsed(await ask(path, *pieces))
            assert dict(response.headers)[b"content-type"].startswith(b"text/plain; version=0.0.4")
            assert families(text)["trio_unixconn_pool_deaths"].samples[0].value == 8
        response, text = parsed(await ask(path, request("/metrics", "HEAD")), "HEAD")
        assert (response.status_code, text) == (200, "")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (request("/nowhere"), 404),
        (request("/metrics", "POST"), 405),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET /\n\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 20_000, 431),
        (b"y" * 20_000, 431),
    ],
)
async def test_serve_statistics_rejects_http(tmp_path: Path, sent: bytes, status: int) -> None:
    """The answer to another request is the status that says why."""
    async with (
        asked_at(tmp_path / "s"),
        await open_unix_connection(tmp_path / "s") as conn,
    ):
        await conn.send_all(sent)
        answer = b""
        try:
            async for data in conn:
                answer += data
        except ConnectionBrokenError:
            # The server has not read everything.
            assert status == 431
        response, text = parsed(answer)
        assert response.status_code == status
        assert text
        if status == 405:
            assert dict(response.headers)[b"allow"] == b"GET, HEAD"


async def test_serve_statistics_of_half_a_request(tmp_path: Path) -> None:
    """The answer to a stream that ends in the middle of a request is status 400."""
    async with asked_at(tmp_path / "s"):
        raw = await ask(tmp_path / "s", b"GET / HTTP/1.1\r\nHost", ends=True)
    assert parsed(raw)[0].status_code == 400


async def test_serve_statistics_answers_curl(tmp_path: Path) -> None:
    """The program curl gets both pages."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    path = tmp_path / "s"
    async with asked_at(path):
        for page, kind in (("", "application/json"), ("metrics", "text/plain")):
            done = await trio.run_process(
                ["curl", "-sSi", "--unix-socket", str(path), f"http://localhost/{page}"],
                capture_stdout=True,
                env={},
            )
            head, _, body = done.stdout.decode().partition("\r\n\r\n")
            assert head.startswith("HTTP/1.1 200 OK")
            assert f"Content-Type: {kind}" in head
            assert body


################################################################
# Which clients, and for how long
################################################################


async def test_serve_statistics_policy(tmp_path: Path) -> None:
    """A policy replaces the default one; a denied client gets no answer."""
    path = tmp_path / "s"
    async with asked_at(path, policy=PeerPolicy(uids=[12345]), mode=0o666) as unix_server:
        assert path.stat().st_mode & 0o777 == 0o666
        assert await ask(path) == b""
        assert unix_server.denied == 1


async def test_serve_statistics_returns_after_a_drain(tmp_path: Path) -> None:
    """It returns when the UnixServer that nursery.start returns has drained."""
    async with trio.open_nursery() as nursery:
        unix_server = await nursery.start(serve_statistics, server(), tmp_path / "s")
        assert json.loads(await ask(tmp_path / "s", b"json\n"))["accepted"] == 120
        unix_server.drain()


async def test_serve_statistics_default_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default only the user of this process is answered, whatever the mode of the path."""
    path = tmp_path / "s"
    monkeypatch.setattr(PeerPolicy, "same_user", lambda: PeerPolicy(uids=[12345]))
    listener = await open_unix_listener(path, mode=0o666, receive_descriptors=False)
    async with asked_at(listener):
        assert await ask(path) == b""
    assert not path.exists()


async def test_serve_statistics_of_a_slow_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection of a client that does not finish its request is closed."""
    monkeypatch.setattr(_exchanges, "EXCHANGE_TIMEOUT", 0.1)
    async with asked_at(tmp_path / "s") as unix_server:
        assert await ask(tmp_path / "s", b"GET / HTTP/1.1\r\n") == b""
        await until(lambda: unix_server.connections == 0)


async def test_serve_statistics_of_a_client_that_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that closes its connection before the answer is not an error."""
    monkeypatch.setattr(_stats_server, "as_json", lambda *_: "x" * 2**24)
    async with asked_at(tmp_path / "s") as unix_server:
        async with await open_unix_connection(tmp_path / "s") as conn:
            await conn.send_all(b"json\n")
            await conn.receive_some(1)
        await until(lambda: unix_server.connections == 0)
        assert unix_server.crashed == 0


async def test_serve_statistics_without_h11(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the missing extra, before the path exists."""
    monkeypatch.setitem(sys.modules, "h11", None)
    with pytest.raises(ImportError, match=r"pip install 'trio_unixconn\[cli\]'"):
        await serve_statistics(server(), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_import_of_pool_needs_no_extra() -> None:
    """Importing the pool imports nothing of the extra."""
    program = (
        "import sys; sys.modules['h11'] = sys.modules['watchfiles'] = None; "
        "import trio_unixconn.pool"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize("sent", [b"GET /metrics HT", b"GET / HTTP/1.1\r\nHost: x\r\n", b"pro"])
async def test_serve_statistics_half_sent_requests(
    sent: bytes, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that send half a request do not hold up the next scrape; the oldest are ended."""
    # None of them ends because of its time.
    monkeypatch.setattr(_exchanges, "EXCHANGE_TIMEOUT", math.inf)
    count = 3 * _exchanges.MAX_EXCHANGES
    async with two_kinds(kind, tmp_path) as connect, AsyncExitStack() as stack:
        clients: list[Stream] = []
        for _ in range(count):
            conn = await stack.enter_async_context(await connect())
            await conn.send_all(sent)
            clients.append(conn)
        async with await connect() as conn:
            await conn.send_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await conn.receive_some()).startswith(b"HTTP/1.1 200 OK")
        for conn in clients[: count - _exchanges.MAX_EXCHANGES]:
            # BrokenResourceError: it was ended before its bytes were received.
            with suppress(trio.BrokenResourceError):
                assert await conn.receive_some() == b""


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_serve_statistics_clients_that_keep_their_connections(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exchange whose answer was sent is ended before one that has just begun."""
    monkeypatch.setattr(_exchanges, "EXCHANGE_TIMEOUT", math.inf)
    monkeypatch.setattr(_exchanges, "CLOSE_TIMEOUT", math.inf)
    async with two_kinds(kind, tmp_path) as connect, AsyncExitStack() as stack:
        slow = await stack.enter_async_context(await connect())
        await slow.send_all(b"prom")
        for _ in range(2 * _exchanges.MAX_EXCHANGES):
            conn = await stack.enter_async_context(await connect())
            await conn.send_all(b"json\n")
            assert (await rest_of(conn)).endswith(b"}\n")
        await slow.send_all(b"etheus\n")
        assert (await rest_of(slow)).startswith(b"# HELP")


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_serve_statistics_request_with_a_body(kind: str, tmp_path: Path) -> None:
    """What follows a request is discarded, and does not cost the client its answer."""
    sent = b"POST /ready HTTP/1.1\r\nHost: x\r\nContent-Length: 50000\r\n\r\n" + bytes(50_000)
    async with two_kinds(kind, tmp_path) as connect:
        response, _ = parsed(await ask(connect, sent))
        assert response.status_code == 405


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_serve_statistics_client_that_never_stops_sending(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that goes on sending after its answer is disconnected."""
    monkeypatch.setattr(_exchanges, "EXCHANGE_TIMEOUT", math.inf)
    monkeypatch.setattr(_exchanges, "CLOSE_TIMEOUT", math.inf)
    async with two_kinds(kind, tmp_path) as connect, await connect() as conn:
        await conn.send_all(b"json\n")
        assert (await rest_of(conn)).endswith(b"}\n")
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await conn.send_all(bytes(65536))


################################################################
# /ready, /live
################################################################


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize(
    ("state", "status", "text"),
    [
        ("ready", 200, "ready\n"),
        ("down", 503, "no worker accepts jobs at the moment\n"),
        ("draining", 503, "draining\n"),
        ("failed", 503, "the pool has ended because its workers crashed\n"),
        ("ended", 503, "the pool has ended\n"),
    ],
)
async def test_serve_statistics_answers_ready_and_live(
    state: str, status: int, text: str, kind: str, tmp_path: Path
) -> None:
    """/ready is 200 only if a worker accepts jobs; /live is always 200; HEAD has no body."""
    source = Pool(attrs.evolve(STATISTICS, state=state))
    async with two_kinds(kind, tmp_path, source) as connect:
        response, body = parsed(await ask(connect, request("/ready")))
        assert (response.status_code, body) == (status, text)
        assert dict(response.headers)[b"content-type"] == b"text/plain; charset=utf-8"
        assert dict(response.headers)[b"cache-control"] == b"no-store"
        response, body = parsed(await ask(connect, request("/ready", "HEAD")), "HEAD")
        assert (response.status_code, body) == (status, "")
        assert dict(response.headers)[b"content-length"] == b"%d" % len(text)
        response, body = parsed(await ask(connect, request("/live?x")))
        assert (response.status_code, body) == (200, "live\n")
        response, _ = parsed(await ask(connect, request("/live", "DELETE")))
        assert (response.status_code, dict(response.headers)[b"allow"]) == (405, b"GET, HEAD")
        response, body = parsed(await ask(connect, request("/readyz")))
        assert (response.status_code, "/ready or /live" in body) == (404, True)
        assert json.loads(await ask(connect, b"json\n"))["state"] == state
        found = families((await ask(connect, b"prometheus\n")).decode())
        assert {
            each.labels["state"]
            for each in found["trio_unixconn_pool_state"].samples
            if each.value == 1
        } == {state}


async def test_serve_statistics_of_a_function_before_there_is_a_pool(tmp_path: Path) -> None:
    """While the function returns None, the state is starting, and every counter is there with 0."""
    found: WorkerServer | None = None
    async with two_kinds("tcp", tmp_path, lambda: found) as connect:
        response, body = parsed(await ask(connect, request("/ready")))
        assert (response.status_code, body) == (503, "the workers are starting\n")
        response, _ = parsed(await ask(connect, request("/live")))
        assert response.status_code == 200
        document = json.loads(await ask(connect, b"json\n"))
        before = families((await ask(connect, b"prometheus\n")).decode())
        found = server()
        ready = json.loads(await ask(connect, b"json\n"))
        after = families((await ask(connect, b"prometheus\n")).decode())
    assert document["state"] == "starting"
    assert document["workers"] == []
    assert document["accepted"] == document["handled"] == 0
    assert document.keys() == ready.keys()
    assert (ready["state"], ready["accepted"]) == ("ready", 120)
    assert before.keys() == after.keys()


async def test_serve_statistics_of_a_function_that_raises(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The exception is logged, the client is disconnected, and the next one gets an answer."""
    bugs = [ZeroDivisionError("a bug"), ZeroDivisionError("a bug")]

    def source() -> Any:
        if bugs:
            raise bugs.pop()
        return Pool()

    for kind in ("tcp", "unix"):
        async with two_kinds(kind, tmp_path, source) as connect:
            assert await ask(connect, b"json\n") == b""
            assert len(bugs) == (kind == "tcp")
    async with two_kinds("tcp", tmp_path, source) as connect:
        assert json.loads(await ask(connect, b"json\n"))["state"] == "ready"
    assert caplog.text.count("ZeroDivisionError: a bug") == 2


################################################################
# TCP
################################################################


async def test_serve_statistics_over_tcp_answers_curl() -> None:
    """The program curl gets the pages over TCP, of IPv4 and IPv6."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    for host, name in (("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")):
        async with asked_at((host, 0)) as listeners:
            port = listeners[0].socket.getsockname()[1]
            for page, start in (("metrics", b"# HELP"), ("ready", b"ready\n"), ("", b"{\n")):
                done = await trio.run_process(
                    ["curl", "-sSf", f"http://{name}:{port}/{page}"], capture_stdout=True, env={}
                )
                assert done.stdout.startswith(start)


async def test_serve_statistics_takes_several_listeners(tmp_path: Path) -> None:
    """A sequence of listeners of TCP and of Unix sockets is answered, and closed at the end."""
    given: list[trio.SocketListener | UnixListener] = [
        *await trio.open_tcp_listeners(0, host="127.0.0.1"),
        await open_unix_listener(tmp_path / "s"),
        *await trio.open_tcp_listeners(0, host="127.0.0.1"),
    ]
    async with asked_at(given) as listeners:
        assert listeners == given
        for each in given:
            name = each.socket.getsockname()
            connect: Any = (
                partial(open_unix_connection, name)
                if isinstance(each, UnixListener)
                else partial(trio.open_tcp_stream, *name)
            )
            assert json.loads(await ask(connect, b"json\n"))["accepted"] == 120
    assert {each.socket.fileno() for each in given} == {-1}
    assert not (tmp_path / "s").exists()


async def test_serve_statistics_takes_one_tcp_listener(tmp_path: Path) -> None:
    """A listener of trio is answered as it is."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with asked_at(listener) as listeners:
        assert listeners == [listener]
        connect = partial(trio.open_tcp_stream, *listener.socket.getsockname())
        assert json.loads(await ask(connect, b"json\n"))["accepted"] == 120


async def test_serve_statistics_default_policy_of_listeners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default policy is that of Unix sockets among several listeners, too."""
    monkeypatch.setattr(PeerPolicy, "same_user", lambda: PeerPolicy(uids=[12345]))
    async with asked_at([await open_unix_listener(tmp_path / "s", mode=0o666)]):
        assert await ask(tmp_path / "s") == b""


@pytest.mark.parametrize(
    ("address", "error", "match"),
    [
        (("", 80), ValueError, 'every address of this machine is "0.0.0.0" or "::"'),
        (("localhost", 65536), ValueError, "a port from 0 to 65535"),
        (("localhost", -1), ValueError, "a port from 0 to 65535"),
        (("localhost", "80"), TypeError, "port must be an int, got str"),
        (("localhost", True), TypeError, "port must be an int, got bool"),
        ((), ValueError, "at least one listener"),
        ([], ValueError, "at least one listener"),
        ([80], TypeError, "expected a trio.SocketListener or a UnixListener, got int"),
        (("a", "b", "c"), TypeError, "got str"),
        (80, TypeError, "int"),
    ],
)
async def test_serve_statistics_rejects_an_invalid_address(
    address: Any, error: type[Exception], match: str
) -> None:
    """An argument that is not an address or a listener is an error before anything is opened."""
    with pytest.raises(error, match=match):
        await serve_statistics(server(), address)


async def test_serve_statistics_rejects_a_closed_listener() -> None:
    """A closed listener is an error, and the caller still owns the others."""
    listeners = [
        *await trio.open_tcp_listeners(0, host="127.0.0.1"),
        *await trio.open_tcp_listeners(0, host="127.0.0.1"),
    ]
    await listeners[1].aclose()
    with pytest.raises(ConnectionClosedError):
        await serve_statistics(server(), listeners)
    assert listeners[0].socket.fileno() != -1
    await listeners[0].aclose()


async def test_serve_statistics_rejects_invalid_arguments() -> None:
    """A source, a policy or a mode that makes no sense is an error."""
    wrong: Any = 5
    with pytest.raises(TypeError, match="expected a WorkerServer, a WorkerPool or a function"):
        await serve_statistics(wrong, ("127.0.0.1", 0))
    with pytest.raises(TypeError, match="PeerPolicy"):
        await serve_statistics(server(), ("127.0.0.1", 0), policy=wrong)
    options: Any = {"mode": 0o600}
    with pytest.raises(ValueError, match="mode requires the path of a Unix socket"):
        await serve_statistics(server(), ("127.0.0.1", 0), **options)


async def test_serve_statistics_where_another_server_listens() -> None:
    """A port that is in use is an OSError."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        with pytest.raises(OSError, match="in use"):
            await serve_statistics(server(), listener.socket.getsockname())


async def test_serve_statistics_over_tcp_without_free_descriptors(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A client waits until a file descriptor is free; that is logged once."""
    async with asked_at(("127.0.0.1", 0)) as listeners:
        client = socket.socket()
        with free_descriptors(0):
            client.connect(listeners[0].socket.getsockname())
            await until(lambda: "cannot accept connections" in caplog.text)
        async with trio.SocketStream(trio.socket.from_stdlib_socket(client)) as stream:
            await stream.send_all(b"json\n")
            assert (await rest_of(stream)).endswith(b"}\n")
    assert caplog.text.count("cannot accept connections") == 1


async def test_serve_statistics_over_tcp_when_accepting_cannot_succeed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error of accept(2) that is for good ends the server."""

    async def accept(_: Any) -> Any:
        raise OSError(errno.EINVAL, "for good")

    monkeypatch.setattr(_accept.Acceptor, "accept", accept)
    with pytest.RaisesGroup(pytest.RaisesExc(OSError, match="for good")):
        await serve_statistics(server(), ("127.0.0.1", 0))
