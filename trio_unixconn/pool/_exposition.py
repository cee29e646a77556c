"""Statistics as text: one JSON document, and Prometheus's text format.

The rule of this file: no I/O. What is counted from the pool's beginning on ends in ``_total``;
what goes up and down does not.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/ (text format 0.0.4)
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ._statistics import PoolStatistics

PROMETHEUS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
JSON_TYPE: Final = "application/json"
_STATES: Final = ("ready", "draining", "starting")

# Of a pool: field, metric, type, what it is.
_POOL: Final = (
    ("queued", "jobs_queued", "gauge", "Jobs that wait for a worker."),
    ("in_flight", "jobs_in_flight", "gauge", "Jobs that workers have and have not finished."),
    ("submitted", "jobs_submitted_total", "counter", "Jobs that the pool has taken over."),
    ("acknowledged", "jobs_acknowledged_total", "counter", "Jobs that a worker has taken."),
    ("handled", "jobs_handled_total", "counter", "Jobs whose handler has returned."),
    ("failed", "jobs_failed_total", "counter", "Jobs whose handler has raised."),
    ("abandoned", "jobs_abandoned_total", "counter", "Jobs whose worker died meanwhile."),
    ("retried", "jobs_retried_total", "counter", "How often a job went to another worker."),
    ("rejected", "jobs_rejected_total", "counter", "Jobs that no worker took; given up."),
    ("cancelled", "jobs_cancelled_total", "counter", "Jobs cancelled before a worker had them."),
    ("restarts", "restarts_total", "counter", "Workers that were replaced."),
    ("deaths", "deaths_total", "counter", "Workers that died without having been asked to."),
)
# Of each worker.
_WORKER: Final = (
    ("in_flight", "jobs_in_flight", "gauge", "Jobs that this worker has not finished."),
    ("handled", "jobs_handled_total", "counter", "Jobs whose handler has returned here."),
    ("failed", "jobs_failed_total", "counter", "Jobs whose handler has raised here."),
    ("memory", "resident_memory_bytes", "gauge", "Its resident memory; 0 if unknown."),
    ("age", "age_seconds", "gauge", "How long it has been ready."),
)
# Of a server, if there is one.
_SERVER: Final = (
    ("accepted", "connections_accepted_total", "counter", "Connections that were accepted."),
    ("denied", "connections_denied_total", "counter", "Connections that a policy has denied."),
)


def as_json(statistics: PoolStatistics, server: Mapping[str, int]) -> str:
    """Return one JSON document: the attributes, and those of the server, by their names."""
    document: dict[str, Any] = {**server, **attrs.asdict(statistics)}
    return json.dumps(document, indent=1) + "\n"


def as_prometheus(statistics: PoolStatistics, server: Mapping[str, int]) -> str:
    """Return the same for a Prometheus scrape."""
    lines: list[str] = []
    for field, name, kind, about in _SERVER:
        if field in server:
            lines += _family(f"trio_unixconn_{name}", kind, about, [({}, server[field])])
    for field, name, kind, about in _POOL:
        value = getattr(statistics, field)
        lines += _family(f"trio_unixconn_pool_{name}", kind, about, [({}, value)])
    states = Counter(each.state for each in statistics.workers)
    lines += _family(
        "trio_unixconn_pool_workers",
        "gauge",
        "Workers, by what they do.",
        [({"state": state}, states[state]) for state in _STATES],
    )
    for field, name, kind, about in _WORKER:
        # The pid, too: while one of them drains, two workers are of one place.
        samples = [
            ({"worker": str(each.index), "pid": str(each.pid)}, getattr(each, field))
            for each in statistics.workers
        ]
        lines += _family(f"trio_unixconn_worker_{name}", kind, about, samples)
    return "\n".join(lines) + "\n"


def _family(
    name: str, kind: str, about: str, samples: Iterable[tuple[Mapping[str, str], float]]
) -> list[str]:
    escaped = about.replace("\\", r"\\").replace("\n", r"\n")
    lines = [f"# HELP {name} {escaped}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        inner = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines.append(f"{name}{{{inner}}} {value!r}" if inner else f"{name} {value!r}")
    return lines


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
