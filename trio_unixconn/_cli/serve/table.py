"""The status of a server as a table for a terminal.

The table fits into 80 columns. The totals stand above the workers, because a terminal may show
only a few of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from rich import box
from rich.columns import Columns
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .._console import printable

if TYPE_CHECKING:
    from .status import Status

_COLUMNS: Final = ("#", "pid", "state", "in flight", "handled", "per s", "restarts", "memory")
_STYLES: Final = {"ready": "", "draining": "yellow", "starting": "red", "ended": ""}
# Counters that should be 0, highlighted if they are not.
_TROUBLES: Final = ("failed", "abandoned", "rejected", "deaths")


def render(
    status: Status, *, title: str, addresses: Sequence[str], uptime: float, drains: bool
) -> Group:
    """Return a title, lines of totals, and a row for each worker.

    Args:
      drains: whether workers that have ended get no others in their place.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    for row in status.rows:
        worker = row.worker
        state = "ended" if drains and worker.state == "starting" else worker.state
        table.add_row(
            str(worker.index),
            str(worker.pid),
            Text(state, _STYLES[state]),
            f"{worker.in_flight:,}",
            f"{worker.handled:,}",
            _rate(row.rate),
            str(worker.restarts),
            _size(worker.memory),
        )
    return Group(
        Text(f"{printable(title)}{', draining' * drains}, up {_duration(uptime)}", "bold"),
        Text(printable(" ".join(addresses)), overflow="ellipsis", no_wrap=True),
        _totals(status),
        table,
    )


def _totals(status: Status) -> Columns:
    pool = status.sample.pool
    parts = [
        Text(f"queued {pool.queued:,}"),
        Text(f"in flight {pool.in_flight:,}"),
        Text(f"accepted {status.sample.accepted:,} ({_rate(status.accepted_rate)}/s)"),
        Text(f"handled {pool.handled:,} ({_rate(status.handled_rate)}/s)"),
        Text(f"denied {status.sample.denied:,}"),
        Text(f"retried {pool.retried:,}"),
        Text(f"restarts {pool.restarts:,}"),
        Text(f"memory {_size(status.memory)}"),
    ]
    for name in _TROUBLES:
        count = getattr(pool, name)
        parts.append(Text(f"{name} {count:,}", "red" if count else ""))
    return Columns(parts, padding=(0, 2))


def _rate(rate: float) -> str:
    return f"{rate:.1f}" if rate < 100 else f"{rate:,.0f}"


def _size(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size else "-"


def _duration(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02}:{second:02}"
