"""Either side of a handover is killed before or after each frame, while clients connect.

Each trial is one kill. From the records of the clients follows what it cost: a request that was
refused; one that was lost because the killed process had accepted it; one that was lost although
it began after the kill, for which there is no excuse; and how long after the kill the first answer
to a request arrived that began after it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import attrs
import trio

from trio_unixconn import UpgradeFailedError
from trio_unixconn.handover import _protocol as of

from .service import Clients, Event, Service, clients, run_kept, service, upgraded_or_not
from .target import Config

GIVER, TAKER = "the one that runs", "the successor"
# The frames of a handover, in their order, by which side sends them.
FRAMES = [
    (TAKER, "HELLO"),
    (GIVER, "OFFER"),
    (GIVER, "LISTENERS"),
    (TAKER, "TAKEN"),
    (TAKER, "PREPARED"),
    (GIVER, "COMMIT"),
    (TAKER, "SERVING"),
    (GIVER, "RELEASED"),
]
# How long after a kill clients may wait for an answer, in milliseconds.
GOAL = 50.0


@attrs.frozen
class Point:
    """When a process is killed.

    Attributes:
      side: which process.
      number: which frame of this kind it is.
    """

    side: str
    when: str
    operation: str
    frame: str
    number: int = 1

    def fault(self) -> tuple[str, str, int, int]:
        return self.when, self.operation, getattr(of, self.frame), self.number

    @property
    def name(self) -> str:
        verb = {
            ("before", "send"): "before it sends",
            ("after", "send"): "after it has sent",
            ("after", "receive"): "after it has received",
        }[self.when, self.operation]
        return f"{verb} {self.frame}"

    @property
    def has_listeners_left(self) -> bool:
        """Whether a process with the listeners is left, which serves."""
        if self.side == TAKER:
            return self.frame != "RELEASED"
        if self.frame == "LISTENERS":
            return self.when == "after"
        return self.frame not in ("HELLO", "OFFER")


def points() -> list[Point]:
    """Return the 24 points, in the order of the frames."""
    found: list[Point] = []
    for sender, frame in FRAMES:
        receiver = TAKER if sender == GIVER else GIVER
        found += [
            Point(sender, "before", "send", frame),
            Point(sender, "after", "send", frame),
            Point(receiver, "after", "receive", frame),
        ]
    return found


# While connections are passed on. The first TAKEN is about the listeners.
PASSING = [
    Point(GIVER, "before", "send", "PASSED"),
    Point(GIVER, "after", "send", "PASSED"),
    Point(TAKER, "after", "receive", "PASSED"),
    Point(TAKER, "before", "send", "TAKEN", 2),
    Point(TAKER, "after", "send", "TAKEN", 2),
    Point(GIVER, "after", "receive", "TAKEN", 2),
]


@attrs.define
class Row:
    """What the trials of a point have cost.

    Attributes:
      refused: requests for which no process listened.
      lost: requests that the killed process had accepted.
      unexplained: requests that were lost, and began after the kill.
      waits: milliseconds from each kill to the first answer.
    """

    point: Point
    trials: int = 0
    refused: int = 0
    lost: int = 0
    unexplained: int = 0
    waits: list[float] = attrs.field(factory=list[float])

    def add(self, load: Clients, killed: Event, answered: float) -> None:
        self.trials += 1
        self.waits.append(1000 * (answered - killed.time))
        self.refused += len(load.with_outcome("refused"))
        for each in load.with_outcome("reset", "empty"):
            # In the queue of a listener, if that ends with the process.
            if each.begin <= killed.time <= each.end or not self.point.has_listeners_left:
                self.lost += 1
            else:
                self.unexplained += 1

    def wrong(self) -> list[str]:
        """Return what may not be."""
        found: list[str] = []
        where = f"{self.point.side} is killed {self.point.name}"
        if self.unexplained:
            found.append(f"{where}: {self.unexplained} requests were lost without a reason")
        if self.refused and self.point.has_listeners_left:
            found.append(f"{where}: {self.refused} requests were refused")
        return found

    def late(self) -> int:
        return sum(wait > GOAL for wait in self.waits)

    def figures(self) -> dict[str, float | str | bool]:
        return {
            "side": self.point.side,
            "point": self.point.name,
            "listeners left": self.point.has_listeners_left,
            "trials": self.trials,
            "refused": self.refused,
            "lost": self.lost,
            "unexplained": self.unexplained,
            "median ms": round(statistics.median(self.waits), 2) if self.waits else 0.0,
            "worst ms": round(max(self.waits, default=0.0), 2),
            "late": self.late(),
        }


async def kill_at(point: Point, trials: int) -> Row:
    """Kill a process at a point, so many times."""
    row = Row(point)
    if not point.has_listeners_left and point.side == TAKER:
        for _ in range(trials):
            async with service(successor_fault=point.fault(), probation=0) as found:
                await kill_service(found, row)
        return row
    options: dict[str, Any] = {"fault": point.fault(), "probation": 0}
    if point.side == TAKER:
        # So long that the one before notices a successor that is killed after SERVING.
        options = {"successor_fault": point.fault(), "probation": 30}
    async with service(**options) as found, clients(found) as load:
        for _ in range(trials):
            load.requests.clear()
            since = len(found.events)
            with suppress(UpgradeFailedError):
                await upgraded_or_not(found)
            killed = await found.told("killed", since=since)
            answered = await load.answered_after(killed.time)
            if point.side == GIVER:
                await found.told("ready", since=since)
                await found.told("confirmed", since=since)
            row.add(load, killed, answered)
    return row


async def kill_service(found: Service, row: Row) -> None:
    """Kill a successor that is the service already, and start it again, as a manager does."""
    async with clients(found) as load:
        load.requests.clear()
        since = len(found.events)
        await found.upgrade()
        killed = await found.told("killed", since=since)
        found.start(Config(str(found.directory), port=found.port))
        answered = await load.answered_after(killed.time)
        row.add(load, killed, answered)


@attrs.define
class PassingRow:
    """What the trials of a point have done to connections that were passed on."""

    point: Point
    trials: int = 0
    connections: int = 0
    closed: int = 0
    wrong_answers: int = 0

    def wrong(self) -> list[str]:
        where = f"{self.point.side} is killed {self.point.name}"
        found: list[str] = []
        if self.wrong_answers:
            found.append(f"{where}: {self.wrong_answers} answers were wrong")
        # Nothing was acknowledged, so that all are still the other one's.
        was_acknowledged = (self.point.when, self.point.operation) == ("after", "send")
        if self.point.side == TAKER and not was_acknowledged and self.closed:
            found.append(f"{where}: {self.closed} connections were closed")
        return found

    def figures(self) -> dict[str, float | str]:
        return {
            "side": self.point.side,
            "point": self.point.name,
            "trials": self.trials,
            "connections": self.connections,
            "closed": self.closed,
            "wrong": self.wrong_answers,
        }


async def kill_while_passing(point: Point, trials: int, connections: int) -> PassingRow:
    """Kill a process while connections are passed on, so many times."""
    row = PassingRow(point)
    key = "successor_fault" if point.side == TAKER else "fault"
    for _ in range(trials):
        options: dict[str, Any] = {key: point.fault()}
        async with (
            service(**options, probation=0) as found,
            trio.open_nursery() as nursery,
        ):
            kept = await run_kept(found, nursery, connections)
            since = len(found.events)
            await upgraded_or_not(found)
            await found.told("killed", since=since)
            before = [each.answers for each in kept]
            with trio.fail_after(30):
                # Each one is closed, or goes on.
                while any(
                    not each.is_closed and each.answers < count + 3
                    for each, count in zip(kept, before, strict=True)
                ):
                    await trio.sleep(0.001)
            row.trials += 1
            row.connections += connections
            row.closed += sum(each.is_closed for each in kept)
            row.wrong_answers += sum(each.wrong for each in kept)
            nursery.cancel_scope.cancel()
    return row


def late_in(rows: Sequence[Row]) -> int:
    """Return how many kills were followed by a wait longer than the goal."""
    return sum(row.late() for row in rows if row.point.has_listeners_left)
