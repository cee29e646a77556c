"""What is measured, how often, and what is due.

The rule of this file: values only. A case is run by every contestant that can; a goal is a
ratio of two of them in the same run.
"""

from __future__ import annotations

import attrs

KIB = 1024
MIB = 1024 * KIB


@attrs.frozen
class Case:
    """One thing to measure.

    Attributes:
      name: what the contestants know it by.
      size: bytes or descriptors a message, or connections beside.
      count: of round trips, messages or connections in one run, when it is full.
      quick: the same, when it is quick; 0 leaves the case out then.
      unit: what one of them is.
      figure: what is compared: seconds of the left side, or a figure that the right one gives.
    """

    name: str
    size: int
    count: int
    quick: int
    unit: str
    title: str
    figure: str = "seconds"


PING_PONG = "one descriptor, ping-pong"
ONE_WAY = "one descriptor a message, one way"
MANY = "many descriptors a message, one way"
TEN_THOUSAND = "ten thousand descriptors"
CREDENTIALS = "credentials, ping-pong"
MESSAGE = "1 KiB and 2 descriptors, ping-pong"
BYTES = "bytes, ping-pong"
BUFFER = "a large buffer"
ACCEPT = "accept and check credentials"
IDLE = "bytes, others idle"
MEMORY = "memory of an idle connection"

CASES = [
    Case(PING_PONG, 1, 3000, 500, "round trip", "one descriptor, ping-pong"),
    Case(ONE_WAY, 1, 10000, 2000, "descriptor", "one descriptor a message, one way"),
    Case(MANY, 8, 2000, 400, "message", "8 descriptors a message, one way"),
    Case(MANY, 64, 500, 0, "message", "64 descriptors a message, one way"),
    Case(MANY, 253, 200, 50, "message", "253 descriptors a message, one way"),
    Case(TEN_THOUSAND, 10000, 1, 1, "10,000 descriptors", "ten thousand descriptors"),
    Case(CREDENTIALS, 1, 3000, 500, "round trip", "credentials, ping-pong"),
    Case(MESSAGE, KIB, 3000, 500, "round trip", "1 KiB and 2 descriptors, ping-pong"),
    Case(BYTES, 64, 3000, 500, "round trip", "64 bytes, ping-pong"),
    Case(BYTES, 4 * KIB, 3000, 0, "round trip", "4 KiB, ping-pong"),
    Case(BYTES, 64 * KIB, 2000, 400, "round trip", "64 KiB, ping-pong"),
    Case(BUFFER, MIB, 1, 1, "buffer", "a buffer of 1 MiB"),
    Case(BUFFER, 64 * MIB, 1, 0, "buffer", "a buffer of 64 MiB"),
    Case(BUFFER, 1024 * MIB, 1, 0, "buffer", "a buffer of 1 GiB"),
    Case(ACCEPT, 1, 1000, 200, "connection", "accept and check credentials"),
    Case(IDLE, 1, 2000, 400, "round trip", "64 bytes, ping-pong, 1 idle connection beside"),
    Case(IDLE, 100, 2000, 0, "round trip", "64 bytes, ping-pong, 100 idle connections beside"),
    Case(IDLE, 10000, 2000, 0, "round trip", "64 bytes, ping-pong, 10,000 idle connections beside"),
    Case(MEMORY, 10000, 1, 0, "connection", "memory of an idle connection", "bytes"),
]


@attrs.frozen
class Goal:
    """A ratio that is due: of ``over`` to ``under``, at least or at most ``bound``.

    Each is a pair of a case's title and a contestant.
    """

    text: str
    over: tuple[str, str]
    under: tuple[str, str]
    bound: float
    at_least: bool = False

    def is_met(self, ratio: float) -> bool:
        """Whether a measured ratio meets it."""
        return ratio >= self.bound if self.at_least else ratio <= self.bound


OURS = "trio_unixconn"
FLOOR = "trio, raw"
STDLIB = "standard library, blocking"
ANYIO = "anyio on trio"
UVLOOP = "anyio on uvloop"
GIO = "PyGObject Gio"
STREAM = f"{FLOOR}: trio.SocketStream"
BURSTS = f"{OURS}: send_fds(per_message=1), fds()"


def _same(title: str, text: str, over: str, under: str, bound: float, *, at_least: bool) -> Goal:
    return Goal(text, (title, over), (title, under), bound, at_least)


_PING = "one descriptor, ping-pong"
_WAY = "one descriptor a message, one way"
_IDLE_1 = "64 bytes, ping-pong, 1 idle connection beside"
_IDLE_10000 = "64 bytes, ping-pong, 10,000 idle connections beside"

GOALS = [
    _same(_PING, "ping-pong, ours / trio floor", OURS, FLOOR, 1.10, at_least=False),
    _same(_PING, "ping-pong, anyio on trio / ours", ANYIO, OURS, 1.15, at_least=True),
    _same(_PING, "ping-pong, PyGObject Gio / ours", GIO, OURS, 1.3, at_least=True),
    _same(_WAY, "one way one by one, anyio on trio / ours", ANYIO, OURS, 1.5, at_least=True),
    _same(
        _WAY, "one way, standard library / ours with fds()", STDLIB, f"{OURS}: fds()", 1.0,
        at_least=True,
    ),
    _same(
        _WAY, "one way, standard library / ours with send_fds(per_message=1) and fds()",
        STDLIB, BURSTS, 1.0, at_least=True,
    ),
    _same(
        _WAY, "one way, anyio on uvloop / ours with send_fds(per_message=1) and fds()",
        UVLOOP, BURSTS, 1.5, at_least=True,
    ),
    _same(
        "253 descriptors a message, one way", "253 a message, ours / standard library",
        OURS, STDLIB, 1.10, at_least=False,
    ),
    _same(
        "64 KiB, ping-pong", "bytes 64 KiB, ours / trio.SocketStream", OURS, STREAM, 1.03,
        at_least=False,
    ),
    _same(
        "64 bytes, ping-pong", "bytes 64 B, ours / trio.SocketStream", OURS, STREAM, 1.10,
        at_least=False,
    ),
    _same(
        "credentials, ping-pong", "credentials ping-pong, ours / trio floor", OURS, FLOOR, 1.10,
        at_least=False,
    ),
    _same(
        _PING, "a Cancellable that never fires, with / without", f"{OURS}: with a Cancellable",
        OURS, 1.15, at_least=False,
    ),
    _same(
        "a buffer of 1 GiB", "1 GiB sealed buffer / sending the bytes", f"{OURS}: send_buffer",
        f"{OURS}: the bytes", 1 / 200, at_least=False,
    ),
    Goal(
        "latency with 10,000 idle connections / with 1", (_IDLE_10000, OURS), (_IDLE_1, OURS), 1.2
    ),
]
# Bytes that an idle connection may take beyond a trio.SocketStream.
MOST_MEMORY = 1024
