"""serve_statistics: the statistics of a pool, as JSON and for Prometheus, and whether it is ready.

Sources: RFC 9110, RFC 9112, https://prometheus.io/docs/instrumenting/exposition_formats/ (text
format 0.0.4)
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, overload

import attrs
import trio

from .._policy import PeerPolicy, check_policy
from ._exchanges import (
    CHUNK_SIZE,
    Exchanges,
    is_unix_address,
    open_listeners,
    serve_exchanges,
    serve_unix_exchanges,
)
from ._health import STATES, StatisticsSource, check_source, statistics_of

if TYPE_CHECKING:
    from .._address import AddressLike
    from .._listener import UnixListener
    from .._server import UnixServer
    from ..handover._listeners import GenerationListener
    from ._exchanges import ExchangeListener, ListenersOrAddress, Stream
    from ._statistics import Latency, PoolStatistics, WorkerStatistics

# A client that has sent nothing after this time, in seconds, gets the JSON document.
REQUEST_TIMEOUT: Final = 0.5
# The maximum length of a line, and of the head of an HTTP request, in bytes.
MAX_LINE: Final = 8192

PROMETHEUS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
JSON_TYPE: Final = "application/json"
TEXT_TYPE: Final = "text/plain; charset=utf-8"


@overload
async def serve_statistics(
    source: StatisticsSource,
    address: AddressLike | UnixListener,
    *,
    policy: PeerPolicy | None = None,
    mode: int | None = None,
    task_status: trio.TaskStatus[UnixServer] = trio.TASK_STATUS_IGNORED,
) -> None: ...


@overload
async def serve_statistics(
    source: StatisticsSource,
    address: tuple[str, int]
    | trio.SocketListener
    | GenerationListener[Any]
    | Sequence[ExchangeListener],
    *,
    policy: PeerPolicy | None = None,
    task_status: trio.TaskStatus[Sequence[ExchangeListener]] = trio.TASK_STATUS_IGNORED,
) -> None: ...


async def serve_statistics(
    source: StatisticsSource,
    address: AddressLike | ListenersOrAddress,
    *,
    policy: PeerPolicy | None = None,
    mode: int | None = None,
    task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer clients with the statistics of a pool, at a Unix socket or over TCP.

    ::

        nursery.start_soon(serve_statistics, server, "/run/app/stats")
        nursery.start_soon(serve_statistics, server, ("127.0.0.1", 9100))

    A client sends one of these, and reads to the end of the stream:

    - ``json`` and a newline, or nothing: the answer is a JSON document with the attributes of
      :class:`PoolStatistics` and, for a server, ``accepted`` and ``denied``. Nothing is the end of
      the stream, or half a second of silence.
    - ``prometheus`` and a newline: Prometheus's text format.
    - an HTTP request for ``/``, which is the document, for ``/metrics``, or for one of two pages
      for load balancers and Kubernetes: ``/ready`` is 200 if at least one worker accepts jobs, and
      503 otherwise, from the first moment of a drain on; ``/live`` is 200 as long as this process
      answers.

    To have an answer before the workers are ready, pass a function, and start this before
    :func:`serve_with_workers`::

        server = None
        nursery.start_soon(serve_statistics, lambda: server, ("127.0.0.1", 9100))
        server = await nursery.start(serve_with_workers, "package.module:handler", listeners)

    No client can hold up the pool or the answer to another client: an exchange takes five seconds
    at most, and there are 64 at most. One more ends the oldest one.

    Args:
      source: a server of :func:`serve_with_workers` or a pool of :func:`open_worker_pool`; or a
        function that returns one of these, or None. While it is None, the state is ``"starting"``,
        and all counters are 0.
      address: of a Unix socket, as for :func:`serve_unix`; of TCP, a host and a port, where
        ``"0.0.0.0"`` or ``"::"`` is every address of this machine; or a listener of trio, a
        :class:`UnixListener`, or a sequence of listeners, which this owns afterwards. Any process
        that can connect to a TCP port gets an answer.
      policy: which peers may connect to a Unix socket. Default: those of the user of this process.
      mode: the permission bits of a path, not with a listener. Default: ``0o600``.

    Returns:
      Never, unless the :class:`UnixServer` that ``nursery.start`` returns is drained; of anything
      else than one Unix socket, it returns the listeners. Cancel it.

    Raises:
      ImportError: h11, of the extra ``cli``, is missing.
      TypeError: an argument of a wrong type; the caller still owns a listener that was passed.
      ValueError: a wrong argument; the caller still owns a listener that was passed.
      OSError: as :func:`serve_unix` and ``trio.open_tcp_listeners``.
    """
    if importlib.util.find_spec("h11") is None:
        raise ImportError(
            "serve_statistics needs h11; install it with: pip install 'trio_unixconn[cli]'"
        )
    check_source(source)
    check_policy(policy)
    exchanges = Exchanges(partial(_answer, source))
    policy = PeerPolicy.same_user() if policy is None else policy
    if is_unix_address(address):
        await serve_unix_exchanges(exchanges, address, policy, mode=mode, task_status=task_status)
    else:
        if mode is not None:
            raise ValueError("mode requires the path of a Unix socket")
        listeners = await open_listeners(address)
        await serve_exchanges(exchanges, listeners, policy=policy, task_status=task_status)


async def _answer(source: StatisticsSource, stream: Stream) -> None:
    received = await _receive_line(stream)
    line = received.partition(b"\n")[0].rstrip(b"\r")
    if line in (b"", b"json"):
        text = as_json(*statistics_of(source))
    elif line == b"prometheus":
        text = as_prometheus(*statistics_of(source))
    elif b" " in line or len(received) > MAX_LINE:
        await _answer_http(source, stream, received)
        return
    else:
        text = "expected json, prometheus or an HTTP request\n"
    await stream.send_all(text.encode())


async def _receive_line(stream: Stream) -> bytes:
    """Receive a line and perhaps more, or less if the stream ends before."""
    data = b""
    with trio.move_on_after(REQUEST_TIMEOUT):
        data = await stream.receive_some(CHUNK_SIZE)
    more = data
    while more and b"\n" not in data and len(data) <= MAX_LINE:
        more = await stream.receive_some(CHUNK_SIZE)
        data += more
    return data


################################################################
# HTTP
################################################################


@attrs.frozen
class _Page:
    status: int
    content_type: str
    text: str


def _document(source: StatisticsSource) -> _Page:
    return _Page(200, JSON_TYPE, as_json(*statistics_of(source)))


def _metrics(source: StatisticsSource) -> _Page:
    return _Page(200, PROMETHEUS_TYPE, as_prometheus(*statistics_of(source)))


def _ready(source: StatisticsSource) -> _Page:
    state = statistics_of(source)[0].state
    return _Page(200 if state == "ready" else 503, TEXT_TYPE, f"{STATES[state]}\n")


def _live(_: StatisticsSource) -> _Page:
    return _Page(200, TEXT_TYPE, "live\n")


_PATHS_EXPECTED: Final = "expected / (JSON), /metrics (Prometheus), /ready or /live\n"
_PAGES: Final[Mapping[bytes, Callable[[StatisticsSource], _Page]]] = {
    b"/": _document,
    b"/metrics": _metrics,
    b"/ready": _ready,
    b"/live": _live,
}


async def _answer_http(source: StatisticsSource, stream: Stream, data: bytes) -> None:
    """Answer the request that begins with ``data``; its body is not read."""
    # Of an extra.
    import h11

    http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_LINE)
    method, more = b"", list[tuple[str, str]]()
    try:
        while True:
            http.receive_data(data)
            request = http.next_event()
            if request is not h11.NEED_DATA:
                break
            data = await stream.receive_some(CHUNK_SIZE)
        assert isinstance(request, h11.Request)
        method, path = request.method, request.target.partition(b"?")[0]
        if path not in _PAGES:
            page = _Page(404, TEXT_TYPE, _PATHS_EXPECTED)
        elif method not in (b"GET", b"HEAD"):
            page = _Page(405, TEXT_TYPE, "expected GET or HEAD\n")
            more = [("Allow", "GET, HEAD")]
        else:
            page = _PAGES[path](source)
    except h11.RemoteProtocolError as exc:
        page = _Page(exc.error_status_hint, TEXT_TYPE, f"{exc}\n")
    body = page.text.encode()
    headers = [
        ("Date", formatdate(usegmt=True)),
        ("Content-Type", page.content_type),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
        ("Connection", "close"),
        *more,
    ]
    reason = HTTPStatus(page.status).phrase.encode()
    head = http.send(h11.Response(status_code=page.status, headers=headers, reason=reason))
    await stream.send_all((head or b"") + (b"" if method == b"HEAD" else body))


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

_WORKER_STATES: Final = ("ready", "draining", "starting")

# Of a pool: attribute, metric, type, help.
_POOL: Final = (
    ("capacity", "capacity_jobs", "gauge", "Jobs that all ready workers can have at a time."),
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
    (
        "handed_over",
        "jobs_handed_over_total",
        "counter",
        "Connections that the next generation has got before a worker had them.",
    ),
    ("passed", "jobs_passed_total", "counter", "Jobs whose connection was passed on."),
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
    lines += _family(
        "trio_unixconn_pool_state",
        "gauge",
        "The state of the pool: 1 for the present one.",
        [("", {"state": state}, int(state == statistics.state)) for state in STATES],
    )
    states = Counter(each.state for each in statistics.workers)
    lines += _family(
        "trio_unixconn_pool_workers",
        "gauge",
        "Workers, by their state.",
        [("", {"state": state}, states[state]) for state in _WORKER_STATES],
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
