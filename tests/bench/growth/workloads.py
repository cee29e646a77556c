"""What grows, through which sizes, and what is measured of it.

Invariant: values only. A figure is the total for all of a size, or that of one operation beside
them.
"""

from __future__ import annotations

import attrs

# The largest exponents that are expected: of what is linear, and of what does not grow.
MOST_LINEAR = 1.1
MOST_FLAT = 0.1
# A slope is that of the sizes from the largest divided by this. Below them, fixed costs hide it.
TOP = 32
# File descriptors that a process needs beside those of connections.
OWN_DESCRIPTORS = 500


@attrs.frozen
class Figure:
    """One curve.

    Attributes:
      is_of_one: whether it is of one operation beside so many.
      most: the largest slope that is expected; None: any.
    """

    name: str
    is_of_one: bool = False
    most: float | None = MOST_LINEAR


@attrs.frozen
class Chart:
    """Figures of the same unit ("seconds" or "bytes") in one picture."""

    title: str
    unit: str
    figures: tuple[Figure, ...]


@attrs.frozen
class Subject:
    """What grows.

    Attributes:
      key: its name on the command line and in the documentation.
      noun: what there are so many of.
      one: the same, of one.
      sizes, quick: so many, in a full run and in a quick one.
      charts: what is measured of it.
      rounds: how often, in a full run.
      is_fresh: whether each size gets new processes, because memory that was in use before is
        not given back.
      descriptors: how many file descriptors of one process each takes, at most.
    """

    key: str
    noun: str
    one: str
    sizes: tuple[int, ...]
    quick: tuple[int, ...]
    charts: tuple[Chart, ...]
    rounds: int = 3
    is_fresh: bool = False
    descriptors: float = 0

    @property
    def figures(self) -> dict[str, tuple[Figure, Chart]]:
        """Its figures by name, each with its chart."""
        return {figure.name: (figure, chart) for chart in self.charts for figure in chart.figures}


# That of Python is measured apart: it looks at all objects again after so many new ones.
COLLECTOR = "garbage collector"


def _seconds(title: str, *names: str) -> Chart:
    figures = [Figure(name, most=None if COLLECTOR in name else MOST_LINEAR) for name in names]
    return Chart(title, "seconds", tuple(figures))


def _of_one(title: str, *names: str, most: float = MOST_FLAT) -> Chart:
    return Chart(title, "seconds", tuple(Figure(name, is_of_one=True, most=most) for name in names))


# The kernel keeps objects that are not in use for the next ones: few seem to take less.
KERNEL = "kernel, both ends"


def _bytes(title: str, *names: str) -> Chart:
    figures = [Figure(name, most=None if name == KERNEL else MOST_LINEAR) for name in names]
    return Chart(title, "bytes", tuple(figures))


_OF_CONNECTIONS = (
    _seconds(
        "Processor time of the server",
        *("accept", "a message on each", "close", f"accept: {COLLECTOR}"),
    ),
    _of_one("Processor time of one round trip beside them", "round trip"),
    _bytes("Memory", "server", KERNEL),
)
# Of a pool, the process that accepts is shown beside all of them.
_OF_POOLS = (
    _seconds(
        "Processor time of all processes of the pool",
        *("accept", "a message on each", "close", f"accept: {COLLECTOR}"),
    ),
    _seconds("Processor time of the process that accepts", "accept: dispatcher"),
    _of_one("Processor time of one round trip beside them", "round trip"),
    _bytes("Memory", "workers", "process that accepts", KERNEL),
)
CONNECTIONS = (1, 30, 1000, 3000, 8000, 19_000, 50_000)
QUICK_CONNECTIONS = (100, 1000)
# Processes that hold the clients' ends, and workers of a pool that has so many connections.
SHARES = 4

SUBJECTS = [
    Subject(
        "serve_unix",
        "connections",
        "connection",
        CONNECTIONS,
        QUICK_CONNECTIONS,
        _OF_CONNECTIONS,
        rounds=3,
        is_fresh=True,
        descriptors=1,
    ),
    *(
        Subject(
            key,
            "connections",
            "connection",
            (1, 100, 2000, 6000, 18_000, 50_000),
            QUICK_CONNECTIONS,
            _OF_POOLS,
            rounds=2,
            is_fresh=True,
            descriptors=1 / SHARES,
        )
        for key in ("pool-unix", "pool-tcp")
    ),
    Subject(
        "workers",
        "workers",
        "worker",
        (1, 2, 4, 8, 16, 32, 64),
        (1, 2),
        (
            _seconds("Time until all workers are ready, on the clock", "start", "restart"),
            _seconds("Processor time of the same", "start, processor time"),
            _of_one(
                "Processor time of a connection, 64 at a time",
                "pool's process",
                "workers",
                most=MOST_LINEAR,
            ),
            _bytes("Memory of all workers (PSS)", "memory"),
        ),
        rounds=3,
        is_fresh=True,
    ),
    Subject(
        "descriptors",
        "file descriptors in one message",
        "file descriptor",
        (1, 2, 4, 8, 16, 32, 64, 128, 253),
        (1, 16, 64, 253),
        (_seconds("Processor time of both ends", "send_fds", "send_message"),),
        rounds=5,
    ),
    Subject(
        "send_fds",
        "file descriptors in one call of send_fds",
        "file descriptor",
        (1, 10, 100, 300, 1000, 3000, 10_000),
        (1, 100, 300, 1000),
        (_seconds("Processor time of both ends", "253 a message", "one a message"),),
        rounds=5,
        descriptors=1.5,
    ),
    Subject(
        "bytes",
        "bytes of a message",
        "byte",
        (1, 64, 4096, 65_536, 524_288, 2**20, 2**22, 2**23, 2**24),
        (1, 4096, 2**18, 2**20, 2**22),
        (_seconds("Processor time of both ends", "send_message", "send_all", "send_buffer"),),
    ),
    Subject(
        "data",
        "bytes of a job's data",
        "byte",
        (0, 1, 64, 4096, 65_536, 524_288, 2**20, 2**22, 2**23, 2**24),
        (0, 1, 2**18, 2**20, 2**22),
        (_seconds("Processor time of a job", "pool's process", "worker"),),
    ),
    Subject(
        "queue",
        "queued jobs",
        "job",
        (1, 100, 500, 2000, 5000, 16_000),
        (100, 1000),
        (
            _seconds(
                "Processor time of the pool's process",
                *("submit", "cancel", f"both: {COLLECTOR}"),
            ),
            _seconds(
                "The same, of tasks that wait because the queue is full",
                "wait for a slot",
                "cancel the wait",
            ),
        ),
        descriptors=1,
    ),
    Subject(
        "listeners",
        "listeners",
        "listener",
        (1, 10, 32, 100, 300, 1000),
        (10, 100),
        (
            _seconds(
                "Processor time of the pool's process", "open", "a connection to each", "close"
            ),
            _seconds(
                "Processor time of all processes, if workers accept",
                "open, workers accept",
                "a connection to each, workers accept",
                "close, workers accept",
            ),
        ),
        descriptors=2,
    ),
    Subject(
        "waiting",
        "waiting tasks",
        "task",
        (1, 10, 32, 100, 300, 1000),
        (10, 100),
        (
            _seconds(
                "Processor time until all have sent or were cancelled",
                "senders, one connection",
                "senders, one datagram receiver",
                "one Cancellable cancels",
            ),
        ),
        descriptors=4,
    ),
]
