"""serve_statistics: the statistics of a pool, as JSON and for Prometheus, at a Unix socket.

Each connection is one request and one answer. No client can stop the pool, keep a connection for
longer than an answer takes, or hold up the answer to another client.

Sources: RFC 9110, RFC 9112, https://prometheus.io/docs/instrumenting/exposition_formats/ (text
format 0.0.4)
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from .._listener import UnixListener
from .._policy import PeerPolicy
from .._server import serve_unix
from ..errors import UnixConnectionError
from ._server import WorkerServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from .._address import AddressLike
    from .._connection import UnixConnection
    from .._server import UnixServer
    from ._pool import WorkerPool
    from ._statistics import Latency, PoolStatistics, WorkerStatistics

# A client that has sent nothing after this time, in seconds, gets the JSON document.
REQUEST_TIMEOUT: Final = 0.5
# The maximum time of an exchange, in seconds.
EXCHANGE_TIMEOUT: Final = 5.0
# The maximum length of a line, and of the head of an HTTP request, in bytes.
MAX_LINE: Final = 8192
CHUNK_SIZE: Final = 4096
# The maximum number of exchanges. One more ends the oldest, which is the least likely to go on: a
# scrape that is complete is answered in a few milliseconds.
MAX_EXCHANGES: Final = 64

PROMETHEUS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
JSON_TYPE: Final = "application/json"
TEXT_TYPE: Final = "text/plain; charset=utf-8"


async def serve_statistics(
    source: WorkerServer | WorkerPool,
    address: AddressLike | UnixListener,
    *,
    policy: PeerPolicy | None = None,
    mode: int | None = None,
    task_status: trio.TaskStatus[UnixServer] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer the clients of a Unix socket with the statistics of a pool.

    ::

        nursery.start_soon(serve_statistics, server, "/run/app/stats")

    A client sends one of these, and reads to the end of the stream:

    - ``json`` and a newline, or nothing: the answer is a JSON document with the attributes of
      :class:`PoolStatistics` and, for a server, ``accepted`` and ``denied``. Nothing is the end of
      the stream, or half a second of silence.
    - ``prometheus`` and a newline: Prometheus's text format.
    - an HTTP request for ``/``, which is the document, or for ``/metrics``.

    Args:
      source: a server of :func:`serve_with_workers` or a pool of :func:`open_worker_pool`.
      address: as for :func:`serve_unix`; or a :class:`UnixListener`, which this owns afterwards.
      policy: which peers may connect. Default: those of the user of this process.
      mode: the permission bits of the path, not with a listener. Default: ``0o600``.

    Returns:
      Never, unless the :class:`UnixServer` that ``nursery.start`` returns is drained. Cancel it.

    Raises:
      ImportError: h11, of the extra ``cli``, is missing.
      TypeError, ValueError, OSError: as :func:`serve_unix`.
    """
    if importlib.util.find_spec("h11") is None:
        raise ImportError(
            "serve_statistics needs h11; install it with: pip install 'trio_unixconn[cli]'"
        )
    await serve_unix(
        partial(_answer, source, {}),
        address,
        policy=PeerPolicy.same_user() if policy is None else policy,
        mode=mode,
        receive_descriptors=isinstance(address, UnixListener),
        max_connections=2 * MAX_EXCHANGES,
        handler_errors="log",
        task_status=task_status,
    )


async def _answer(
    source: WorkerServer | WorkerPool,
    exchanges: dict[trio.CancelScope, None],
    conn: UnixConnection,
) -> None:
    """Answer a client.

    Args:
      exchanges: those in progress, the oldest one first.
    """
    if len(exchanges) >= MAX_EXCHANGES:
        oldest = next(iter(exchanges))
        del exchanges[oldest]
        oldest.cancel()
    with trio.move_on_after(EXCHANGE_TIMEOUT) as scope:
        exchanges[scope] = None
        try:
            await _answer_in_time(source, conn)
        except UnixConnectionError:
            # The client has closed the connection.
            pass
        finally:
            exchanges.pop(scope, None)


async def _answer_in_time(source: WorkerServer | WorkerPool, conn: UnixConnection) -> None:
    server: dict[str, int] = {}
    if isinstance(source, WorkerServer):
        server = {"accepted": source.accepted, "denied": source.denied}

    def document() -> str:
        return as_json(source.statistics(), server)

    def metrics() -> str:
        return as_prometheus(source.statistics(), server)

    received = await _receive_line(conn)
    line = received.partition(b"\n")[0].rstrip(b"\r")
    if line in (b"", b"json"):
        text = document()
    elif line == b"prometheus":
        text = metrics()
    elif b" " in line or len(received) > MAX_LINE:
        pages = {b"/": (JSON_TYPE, document), b"/metrics": (PROMETHEUS_TYPE, metrics)}
        await _answer_http(conn, received, pages)
        return
    else:
        text = "expected json, prometheus or an HTTP request\n"
    await conn.send_all(text.encode())


async def _receive_line(conn: UnixConnection) -> bytes:
    """Receive a line and perhaps more, or less if the stream ends before."""
    data = b""
    with trio.move_on_after(REQUEST_TIMEOUT):
        data = await conn.receive_some(CHUNK_SIZE)
    more = data
    while more and b"\n" not in data and len(data) <= MAX_LINE:
        more = await conn.receive_some(CHUNK_SIZE)
        data += more
    return data


################################################################
# HTTP
################################################################


async def _answer_http(
    conn: UnixConnection, data: bytes, pages: Mapping[bytes, tuple[str, Callable[[], str]]]
) -> None:
    """Answer the request that begins with ``data``; its body is not read.

    Args:
      pages: the type, and what makes the text, of each path.
    """
    # Of an extra.
    import h11

    http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_LINE)
    status, kind, text, more = 200, TEXT_TYPE, "", list[tuple[str, str]]()
    method = b""
    try:
        while True:
            http.receive_data(data)
            request = http.next_event()
            if request is not h11.NEED_DATA:
                break
            data = await conn.receive_some(CHUNK_SIZE)
        assert isinstance(request, h11.Request)  # that is first, or an error
        method, path = request.method, request.target.partition(b"?")[0]
        if path not in pages:
            status, text = 404, "expected / (JSON) or /metrics (Prometheus)\n"
        elif method not in (b"GET", b"HEAD"):
            status, text, more = 405, "expected GET or HEAD\n", [("Allow", "GET, HEAD")]
        else:
            kind, text = pages[path][0], pages[path][1]()
    except h11.RemoteProtocolError as exc:
        status, text = exc.error_status_hint, f"{exc}\n"
    body = text.encode()
    headers = [
        ("Date", formatdate(usegmt=True)),
        ("Content-Type", kind),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
        *more,
    ]
    reason = HTTPStatus(status).phrase.encode()
    head = http.send(h11.Response(status_code=status, headers=headers, reason=reason))
    await conn.send_all((head or b"") + (b"" if method == b"HEAD" else body))


################################################################
# JSON
################################################################


def as_json(statistics: PoolStatistics, server: Mapping[str, int]) -> str:
    """Return a JSON document with the attributes of the statistics, and those of the server."""
    document: dict[str, Any] = {**server, **attrs.asdict(statistics, recurse=False)}
    document["workers"] = [attrs.asdict(each) for each in statistics.workers]
    for name in "wait", "handling":
        latency: Latency = document[name]
        document[name] = {
            "count": latency.count,
            "sum": latency.sum,
            "buckets": {_bound(bound): count for bound, count in latency.buckets},
        }
    return json.dumps(document, indent=1) + "\n"


def _bound(bound: float) -> str:
    """Return a bound as Prometheus has it in a label; JSON has no infinity."""
    return "+Inf" if bound == math.inf else f"{bound:g}"


################################################################
# Prometheus
################################################################

_STATES: Final = ("ready", "draining", "starting")

# Of a pool: attribute, metric, type, help.
_POOL: Final = (
    ("queued", "jobs_queued", "gauge", "Jobs in the queue."),
    ("queue_age", "queue_age_seconds", "gauge", "How long the oldest queued job has waited."),
    ("in_flight", "jobs_in_flight", "gauge", "Jobs that workers have and have not finished."),
    ("submitted", "jobs_submitted_total", "counter", "Jobs that the pool has accepted."),
    ("acknowledged", "jobs_acknowledged_total", "counter", "Jobs that a worker has accepted."),
    ("handled", "jobs_handled_total", "counter", "Jobs whose handlers have returned."),
    ("failed", "jobs_failed_total", "counter", "Jobs whose handlers have raised."),
    ("abandoned", "jobs_abandoned_total", "counter", "Jobs whose workers died meanwhile."),
    ("retried", "jobs_retried_total", "counter", "How many times jobs were queued again."),
    ("rejected", "jobs_rejected_total", "counter", "Jobs that no worker has accepted."),
    ("cancelled", "jobs_cancelled_total", "counter", "Jobs cancelled before a worker had them."),
    ("restarts", "restarts_total", "counter", "Workers that were replaced."),
    ("deaths", "deaths_total", "counter", "Workers that died without having been asked to."),
)
_LATENCIES: Final = (
    ("wait", "job_wait_seconds", "From the submission of a job until a worker accepted it."),
    ("handling", "job_handling_seconds", "From then until its handler ended."),
)
# Of each worker index. Two workers have the same one while the old one drains: of counters, only
# the new one counts, of gauges their sum. So the number of series does not grow with restarts.
_WORKER: Final = (
    ("in_flight", "jobs_in_flight", "gauge", "Jobs that it has not finished."),
    ("memory", "resident_memory_bytes", "gauge", "Its resident memory; 0 if unknown."),
    ("handled", "jobs_handled_total", "counter", "Jobs whose handlers have returned."),
    ("failed", "jobs_failed_total", "counter", "Jobs whose handlers have raised."),
    ("refusals", "batches_refused_total", "counter", "Batches refused without a free descriptor."),
    ("restarts", "restarts_total", "counter", "How many times it was replaced."),
    ("age", "age_seconds", "gauge", "How long it has been ready."),
)
_SUMMED: Final = frozenset({"in_flight", "memory"})
# Of a server.
_SERVER: Final = (
    ("accepted", "connections_accepted_total", "counter", "Connections that were accepted."),
    ("denied", "connections_denied_total", "counter", "Connections that a policy has denied."),
)


def as_prometheus(statistics: PoolStatistics, server: Mapping[str, int]) -> str:
    """Return the text of a Prometheus scrape."""
    lines: list[str] = []
    for field, name, kind, text in _SERVER:
        if field in server:
            lines += _family(f"trio_unixconn_{name}", kind, text, [("", {}, server[field])])
    for field, name, kind, text in _POOL:
        value = getattr(statistics, field)
        lines += _family(f"trio_unixconn_pool_{name}", kind, text, [("", {}, value)])
    for field, name, text in _LATENCIES:
        samples = _histogram(getattr(statistics, field))
        lines += _family(f"trio_unixconn_pool_{name}", "histogram", text, samples)
    states = Counter(each.state for each in statistics.workers)
    lines += _family(
        "trio_unixconn_pool_workers",
        "gauge",
        "Workers, by their state.",
        [("", {"state": state}, states[state]) for state in _STATES],
    )
    workers: dict[int, list[WorkerStatistics]] = {}
    for each in statistics.workers:
        workers.setdefault(each.index, []).append(each)
    for field, name, kind, text in _WORKER:
        lines += _family(
            f"trio_unixconn_worker_{name}",
            kind,
            text,
            [
                ("", {"worker": str(index)}, _worker_value(field, found))
                for index, found in sorted(workers.items())
            ],
        )
    return "\n".join(lines) + "\n"


def _worker_value(field: str, workers: list[WorkerStatistics]) -> float:
    values: list[float] = [getattr(each, field) for each in workers]
    # The first one is the one that accepts jobs.
    return sum(values) if field in _SUMMED else values[0]


def _histogram(latency: Latency) -> list[tuple[str, Mapping[str, str], float]]:
    samples: list[tuple[str, Mapping[str, str], float]] = [
        ("_bucket", {"le": _bound(bound)}, count) for bound, count in latency.buckets
    ]
    return [*samples, ("_sum", {}, latency.sum), ("_count", {}, latency.count)]


def _family(
    name: str, kind: str, text: str, samples: Iterable[tuple[str, Mapping[str, str], float]]
) -> list[str]:
    """Return the lines of a metric: its help, its type, and samples with a suffix and labels.

    Neither the help nor a label has characters that must be escaped.
    """
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    for suffix, labels, value in samples:
        inner = ",".join(f'{label}="{content}"' for label, content in labels.items())
        lines.append(
            f"{name}{suffix}{{{inner}}} {value!r}" if inner else f"{name}{suffix} {value!r}"
        )
    return lines
