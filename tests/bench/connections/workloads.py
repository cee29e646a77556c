"""The workloads of the benchmark, and its goals.

A case is run by every implementation that supports it. A goal is a ratio of two implementations in
the same run.
"""

from __future__ import annotations

import attrs

from tests.bench.implementations import OURS
from tests.bench.report import Goal

KIB = 1024
MIB = 1024 * KIB


@attrs.frozen
class Case:
    """One thing to measure.

    Attributes:
      name: its key in the programs of the implementations.
      size: bytes or descriptors per message, or the number of idle connections.
      count: the number of round trips, messages, buffers or connections in a full run.
      quick: the same in a quick run; 0 skips the case.
      unit: one of these, in the headings of tables.
      group: the picture that shows it.
      figure: the value to compare: seconds of the left side, or a figure of the right side.
      rounds: the maximum number of rounds, because one takes long.
    """

    name: str
    size: int
    count: int
    quick: int
    unit: str
    title: str
    group: str
    figure: str = "seconds"
    rounds: int = 1000

    @property
    def alternates(self) -> bool:
        """Whether only one side works at a time: then both run on one processor.

        On two, the time that a virtual processor takes to wake up dominates, and it varies by
        more than the implementations differ. The kernel also puts such pairs on one.
        """
        return "ping-pong" in self.name or self.name == IDLE


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

# The pictures, and their titles.
GROUPS = {
    "ping-pong": "Round trips",
    "one-way": "Descriptors, one way",
    "bytes": "Plain bytes, round trips",
    "buffers": "A large buffer",
    "connections": "Accepting, and idle connections",
}

CASES = [
    Case(PING_PONG, 1, 3000, 400, "round trip", PING_PONG, "ping-pong"),
    Case(CREDENTIALS, 1, 3000, 400, "round trip", CREDENTIALS, "ping-pong"),
    Case(MESSAGE, KIB, 3000, 400, "round trip", MESSAGE, "ping-pong"),
    Case(ONE_WAY, 1, 10000, 2000, "descriptor", ONE_WAY, "one-way"),
    Case(MANY, 8, 3000, 400, "message", "8 descriptors a message, one way", "one-way"),
    Case(MANY, 64, 1000, 0, "message", "64 descriptors a message, one way", "one-way"),
    Case(MANY, 253, 400, 60, "message", "253 descriptors a message, one way", "one-way"),
    Case(TEN_THOUSAND, 10000, 1, 1, "10,000 descriptors", TEN_THOUSAND, "one-way"),
    Case(BYTES, 64, 3000, 400, "round trip", "64 bytes, ping-pong", "bytes"),
    Case(BYTES, 4 * KIB, 3000, 0, "round trip", "4 KiB, ping-pong", "bytes"),
    Case(BYTES, 64 * KIB, 2000, 300, "round trip", "64 KiB, ping-pong", "bytes"),
    # As many in a quick run: the first of a run pays for sealing, which shows among a few.
    Case(BUFFER, MIB, 50, 50, "buffer", "a buffer of 1 MiB", "buffers"),
    Case(BUFFER, 64 * MIB, 2, 0, "buffer", "a buffer of 64 MiB", "buffers", rounds=7),
    Case(BUFFER, 1024 * MIB, 1, 0, "buffer", "a buffer of 1 GiB", "buffers", rounds=3),
    Case(ACCEPT, 1, 1000, 150, "connection", ACCEPT, "connections"),
    Case(IDLE, 1, 2000, 300, "round trip", "64 bytes, 1 idle connection", "connections", rounds=7),
    Case(
        IDLE, 100, 2000, 0, "round trip", "64 bytes, 100 idle connections", "connections", rounds=7
    ),
    Case(
        IDLE,
        10000,
        2000,
        0,
        "round trip",
        "64 bytes, 10,000 idle connections",
        "connections",
        rounds=7,
    ),
    Case(MEMORY, 10000, 1, 0, "connection", MEMORY, "connections", figure="bytes", rounds=3),
]


FLOOR = "trio, raw"
STDLIB = "standard library, blocking"
ANYIO = "anyio on trio"
UVLOOP = "anyio on uvloop"
GIO = "PyGObject Gio"
STREAM = f"{FLOOR}: trio.SocketStream"
# The goal of the one way case is about receiving. So the sender is that of the standard library in
# both, and the receiver is fds(). Our sender takes a checkpoint for each descriptor, so its pace
# would be measured.
RECEIVED = f"{OURS}: fds() from a blocking sender"
BURSTS = f"{OURS}: send_fds(per_message=1), fds()"


def _most(text: str, case: str, over: str, under: str, bound: float) -> Goal:
    return Goal(text, (case, over), (case, under), bound)


def _least(text: str, case: str, over: str, under: str, bound: float) -> Goal:
    return Goal(text, (case, over), (case, under), bound, at_least=True)


_SENT = "send_fds(per_message=1) and fds()"

GOALS = [
    _most("ping-pong, ours / trio floor", PING_PONG, OURS, FLOOR, 1.10),
    _least("ping-pong, anyio on trio / ours", PING_PONG, ANYIO, OURS, 1.15),
    _least("ping-pong, PyGObject Gio / ours", PING_PONG, GIO, OURS, 1.3),
    _least("one way one by one, anyio on trio / ours", ONE_WAY, ANYIO, OURS, 1.5),
    _least(
        "one way, standard library / ours with fds(), both from a blocking sender",
        ONE_WAY,
        STDLIB,
        RECEIVED,
        1.0,
    ),
    _least(f"one way, standard library / ours with {_SENT}", ONE_WAY, STDLIB, BURSTS, 1.15),
    _least(f"one way, anyio on uvloop / ours with {_SENT}", ONE_WAY, UVLOOP, BURSTS, 1.5),
    _most(
        "253 a message, ours / standard library",
        "253 descriptors a message, one way",
        OURS,
        STDLIB,
        1.10,
    ),
    _most("64 KiB, ours / trio.SocketStream", "64 KiB, ping-pong", OURS, STREAM, 1.03),
    _most("64 bytes, ours / trio.SocketStream", "64 bytes, ping-pong", OURS, STREAM, 1.10),
    _most("credentials ping-pong, ours / trio floor", CREDENTIALS, OURS, FLOOR, 1.10),
    _most(
        "a Cancellable that never fires, with / without",
        PING_PONG,
        f"{OURS}: with a Cancellable",
        OURS,
        1.15,
    ),
    _most(
        "1 GiB, sealed buffer / sending the bytes",
        "a buffer of 1 GiB",
        f"{OURS}: send_buffer",
        f"{OURS}: the bytes",
        1 / 200,
    ),
    _most("1 KiB and 2 descriptors, ours / trio floor", MESSAGE, OURS, FLOOR, 1.12),
    _least("ping-pong, anyio on uvloop / ours", PING_PONG, UVLOOP, OURS, 1.0),
    _most("8 a message, ours / trio floor", "8 descriptors a message, one way", OURS, FLOOR, 1.04),
    _most("10,000 descriptors, ours / standard library", TEN_THOUSAND, OURS, STDLIB, 1.05),
    _most(
        "1 MiB, sealed buffer, ours / C",
        "a buffer of 1 MiB",
        f"{OURS}: send_buffer",
        "C: sealed memory",
        1.8,
    ),
    _most(
        "accept and policy, ours / trio.SocketListener",
        ACCEPT,
        OURS,
        f"{FLOOR}: trio.SocketListener",
        1.05,
    ),
    Goal(
        "latency with 10,000 idle connections / with 1",
        ("64 bytes, 10,000 idle connections", OURS),
        ("64 bytes, 1 idle connection", OURS),
        1.2,
    ),
]
# Bytes that an idle connection may take beyond a trio.SocketStream.
MOST_MEMORY = 1024
