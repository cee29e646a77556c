"""What is measured of worker pools, for how long, and the goals.

Invariant: values only. A load is the same for all implementations; a goal is about what
was measured in the same run.
"""

from __future__ import annotations

import attrs

from tests.bench.implementations import OURS
from tests.bench.report import Goal

# One connection of so many burns CPU; for how long, serving.py says.
BURN_ONE_IN = 50
# Connections at a time in a closed loop.
AT_ONCE = 64
# Arrivals in an open loop, as a share of what the slowest with workers serves in a closed one.
SHARE = 0.6
# One that serves less than this share of the arrivals is left out: its queue only grows.
SPARE = 0.9
# The share of this machine that others may use in a turn before it is run once more.
MOST_DISTURBED = 0.10


@attrs.frozen
class Load:
    """What connections there are.

    Attributes:
      seconds: how long one run is, when it is full.
      quick: the same, when it is quick; 0 leaves the load out then.
      burns: whether some of them burn CPU.
      is_open: whether they begin at their times, or each when another has ended.
      idle: how many others are open beside and say nothing; None: none, and that is for
        all. A load with idle ones is ours alone.
      at_once: how many connections there are at a time in a closed loop.
      rounds: at most so many, because one takes long.
      fresh: after so many turns all are started afresh, because where a process happens to
        have its memory makes it faster or slower for all its life; 0: never.
    """

    title: str
    seconds: float
    quick: float
    burns: bool = False
    is_open: bool = False
    idle: int | None = None
    at_once: int = AT_ONCE
    rounds: int = 1000
    fresh: int = 0

    @property
    def figure(self) -> str:
        """What is compared: the rate where nothing else limits it, or the latency."""
        return "p99" if self.is_open else "rate"


EVEN = "even work, closed loop"
UNEVEN = "uneven work, closed loop"
EVEN_OPEN = "even work, open loop"
UNEVEN_OPEN = "uneven work, open loop"
MEMORY = "memory of the parent"
# Jobs in flight when memory is measured, and idle connections at most.
MANY = 10_000


def few(at_once: int) -> str:
    """Return the title of the load with so few connections at a time."""
    return f"even work, closed loop of {at_once}"


def beside(idle: int) -> str:
    """Return the title of the load with so many idle connections."""
    return f"even work, closed loop, {idle:,} idle beside"


LOADS = [
    Load(EVEN, 2, 0.5, fresh=2),
    Load(few(8), 1, 0.5, at_once=8, rounds=5),
    Load(few(1), 1, 0.5, at_once=1, rounds=5),
    Load(UNEVEN, 3, 0.8, burns=True, rounds=5),
    Load(EVEN_OPEN, 2, 0.5, is_open=True),
    Load(UNEVEN_OPEN, 5, 1.5, burns=True, is_open=True, rounds=6),
    Load(beside(1), 2, 0.5, idle=1, rounds=5),
    Load(beside(100), 2, 0, idle=100, rounds=5),
    Load(beside(MANY), 2, 0.5, idle=MANY, rounds=5),
]
MEMORY_ROUNDS, QUICK_MEMORY_ROUNDS = 3, 1

ACCEPTING = f"{OURS}, accept=workers"
NODE = "Node's cluster"
REUSEPORT = "trio, SO_REUSEPORT"
SHARED = "trio, a shared listener"
SINGLE = "trio, one process"


@attrs.frozen(kw_only=True)
class PoolGoal(Goal):
    """A ratio that one of the figures must have."""

    figure: str


def _goal(
    text: str, load: str, other: str, bound: float, figure: str, *, at_least: bool = False
) -> PoolGoal:
    return PoolGoal(text, (load, OURS), (load, other), bound, at_least, figure=figure)


GOALS = [
    _goal("connections a second, ours / Node's cluster", EVEN, NODE, 1.2, "rate", at_least=True),
    _goal("connections a second, ours / SO_REUSEPORT", EVEN, REUSEPORT, 1.0, "rate", at_least=True),
    # One in 50 takes 50 ms by itself, so the 99th percentile of all cannot be below that.
    _goal("p99 under uneven work, ours / SO_REUSEPORT", UNEVEN_OPEN, REUSEPORT, 0.5, "p99"),
    _goal("the same, of those that burn nothing", UNEVEN_OPEN, REUSEPORT, 0.5, "light p99"),
    *(
        PoolGoal(
            f"connections a second of {at_once} at a time, accept=workers / a shared listener",
            (title, ACCEPTING),
            (title, SHARED),
            0.95,
            at_least=True,
            figure="rate",
        )
        for at_once, title in ((1, few(1)), (8, few(8)), (AT_ONCE, EVEN))
    ),
    PoolGoal(
        "connections a second with 10,000 idle / with 1",
        (beside(MANY), OURS),
        (beside(1), OURS),
        0.9,
        at_least=True,
        figure="rate",
    ),
]
# The share of the most busy worker to the mean share, where all work is the same.
MOST_SKEW = 1.1
EVEN_LOADS = [EVEN, EVEN_OPEN]
# Bytes in the parent, with MANY jobs in flight, beyond what it had with none.
MOST_MEMORY = 3_000_000
