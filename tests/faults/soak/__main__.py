"""Soak test: pass a million descriptors between two processes, and check that nothing grows.

``python -m tests.faults.soak --count 1000000 [--seed 1] [--json FILE]``. One process sends, this
one receives, and checks each descriptor: that it is the expected one, and close-on-exec. In each
tenth of the run, most are sent with ``send_fds(per_message=1)`` and received with ``fds()``.
The rest uses all other ways to send and receive, and some of all operations are cancelled. The
figures of each tenth are printed; if memory, descriptors or processor time are not flat, the
exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import trio
from rich.console import Console
from rich.progress import Progress, TaskID

from tests._helpers.environment import environment
from tests._helpers.processes import (
    cpu_seconds,
    open_descriptors,
    python,
    resident_bytes,
)
from tests._helpers.tables import table_of
from trio_unixconn import Cancellable, OperationCancelled, UnixConnection

if TYPE_CHECKING:
    from rich.table import Table

TENTHS = 10
BATCH = 1000
# This part of each tenth goes through send_fds(per_message=1) and fds().
STREAMED = 0.8
# Descriptor number n refers to a file of n % FILES bytes, which identifies it.
FILES = 61
# The share of operations that get a cancel scope, and its longest deadline in seconds.
CANCELLED = 0.2
SOON = 0.0005

# The limits: growth of memory in bytes, from the end of the first tenth on, and processor time in
# the last three tenths relative to the first three. Wall-clock time is printed without a limit,
# because it depends on what else the machine does.
MORE_MEMORY = 4 << 20
MORE_TIME = 1.3


@attrs.frozen
class Tenth:
    """The measurements of one tenth of the run."""

    descriptors: int
    seconds: float
    streamed_per_second: float
    cpu_seconds: float
    receiver_rss: int
    receiver_open: int
    sender_rss: int
    sender_open: int
    cancelled: int

    @property
    def per_second(self) -> float:
        """All descriptors of this tenth over all of its time."""
        return self.descriptors / self.seconds

    @property
    def cpu_microseconds(self) -> float:
        """Processor time of both processes for each descriptor."""
        return 1e6 * self.cpu_seconds / self.descriptors


@attrs.frozen
class Item:
    """One message, or one call of send_fds; both processes draw the same ones."""

    way: str
    count: int
    size: int


def mixture(seed: int, tenth: int, total: int) -> list[Item]:
    """Draw messages that carry ``total`` descriptors together."""
    rng = random.Random(f"{seed} {tenth}")
    items: list[Item] = []
    while total:
        way = rng.choice(["fd", "fds", "message"])
        most = {"fd": 1, "fds": 253, "message": 16}[way]
        item = Item(way, min(total, rng.randrange(1, most + 1)), rng.choice([1, 10, 4096]))
        items.append(item)
        total -= item.count
    return items


def shares(count: int) -> list[tuple[int, int]]:
    """Return how many descriptors each tenth streams, and how many it mixes."""
    found: list[tuple[int, int]] = []
    for tenth in range(TENTHS):
        size = count * (tenth + 1) // TENTHS - count * tenth // TENTHS
        found.append((int(size * STREAMED), size - int(size * STREAMED)))
    return found


def soon(rng: random.Random) -> trio.CancelScope:
    """Return a scope that is sometimes cancelled, at once or very soon."""
    scope = trio.CancelScope()
    if rng.random() < CANCELLED:
        if rng.random() < 0.5:
            scope.cancel()
        else:
            scope.deadline = trio.current_time() + rng.random() * SOON
    return scope


################################################################
# The sending process
################################################################


class Sender:
    """Sends descriptors in order, and continues after each cancellation where it stopped."""

    def __init__(self, conn: UnixConnection, seed: int) -> None:
        self.conn = conn
        self.random = random.Random(f"{seed} sender")
        self.files: list[int] = []
        for size in range(FILES):
            self.files.append(os.memfd_create("soak"))
            os.ftruncate(self.files[-1], size)
        self.next = 0

    def upcoming(self, count: int) -> list[int]:
        """Return the next descriptors."""
        return [self.files[(self.next + i) % FILES] for i in range(count)]

    async def stream(self, total: int) -> None:
        """Send each descriptor in a message of its own."""
        end = self.next + total
        while self.next < end:
            batch = self.upcoming(min(BATCH, end - self.next))
            with soon(self.random):
                # Cancelled part-way, it returns how many were sent.
                self.next += await self.conn.send_fds(batch, per_message=1)

    async def mixed(self, items: list[Item]) -> None:
        """Send mixed messages."""
        for item in items:
            fds = self.upcoming(item.count)
            done = False
            # A cancelled send of one byte has sent nothing. A message of many bytes may be sent in
            # part, so it is not cancelled.
            while not done:
                if item.way == "message":
                    await self.conn.send_message(b"." * item.size, fds=fds)
                    done = True
                elif item.way == "fd":
                    with soon(self.random):
                        done = await self.conn.send_fd(fds[0])
                else:
                    with soon(self.random):
                        done = bool(await self.conn.send_fds(fds))
            self.next += item.count

    async def run(self, count: int, seed: int) -> None:
        """Send one tenth after the other, each when the receiver asks for it."""
        await self.conn.send_all(b"r")
        for tenth, (streamed, mixed) in enumerate(shares(count)):
            await self.conn.receive_some(1)
            await self.stream(streamed)
            await self.mixed(mixture(seed, tenth, mixed))
            # Nothing of this tenth is held here any more.
            await self.conn.send_all(b"e")
        await self.conn.receive_some(1)


async def sender(fd: int, count: int, seed: int) -> None:
    """Be the sending process."""
    async with UnixConnection.from_fd(fd) as conn:
        await Sender(conn, seed).run(count, seed)


################################################################
# The receiving process
################################################################


class Receiver:
    """Receives descriptors in order with different methods, and checks and closes each."""

    def __init__(self, conn: UnixConnection, seed: int, progress: Progress, bar: TaskID) -> None:
        self.conn = conn
        self.random = random.Random(f"{seed} receiver")
        self.next = 0
        self.cancelled = 0
        self.progress = progress
        self.bar = bar

    def check(self, fd: int) -> None:
        """Check the next descriptor, and close it."""
        size, inheritable = os.fstat(fd).st_size, os.get_inheritable(fd)
        os.close(fd)
        if size != self.next % FILES or inheritable:
            raise SystemExit(f"descriptor {self.next} is wrong: {size=} {inheritable=}")
        self.next += 1
        if not self.next % BATCH:
            self.progress.update(self.bar, completed=self.next)

    async def stream(self, total: int) -> None:
        """Receive with fds(), which is sometimes left or cancelled."""
        end = self.next + total
        while self.next < end:
            with soon(self.random) as scope:
                stop = min(end, self.next + self.random.randrange(1, BATCH))
                async for fd in self.conn.fds():
                    self.check(fd)
                    if self.next == stop:
                        break
            self.cancelled += scope.cancelled_caught

    async def some_fds(self, count: int) -> None:
        """Receive descriptors in any number of portions."""
        end = self.next + count
        while self.next < end:
            with soon(self.random) as scope:
                for fd in (await self.conn.receive_fds(end - self.next)).steal_fds():
                    self.check(fd)
            self.cancelled += scope.cancelled_caught

    async def message(self, item: Item) -> None:
        """Receive one message in any number of parts; its descriptors arrive together."""
        left, end = item.size, self.next + item.count
        while left:
            with soon(self.random) as scope:
                got = await self.conn.receive_message(left)
                left -= len(got.data)
                for fd in got.fds.steal_fds():
                    self.check(fd)
            self.cancelled += scope.cancelled_caught
        if self.next != end:
            raise SystemExit(f"{end - self.next} descriptors of a message are missing")

    async def single(self) -> None:
        """Receive one descriptor, with a Cancellable that is sometimes cancelled."""
        before = self.next
        while self.next == before:
            cancellable = Cancellable()
            if self.random.random() < CANCELLED:
                cancellable.cancel()
            try:
                self.check(await self.conn.receive_fd(cancellable))
            except OperationCancelled:
                self.cancelled += 1

    async def mixed(self, items: list[Item]) -> None:
        """Receive mixed messages."""
        for item in items:
            if item.way == "message":
                await self.message(item)
            elif item.way == "fd":
                await self.single()
            else:
                await self.some_fds(item.count)

    async def tenth(self, streamed: int, items: list[Item], child: int) -> Tenth:
        """Receive one tenth of the run, and measure."""
        cancelled, first, own = self.cancelled, self.next, os.getpid()
        used = cpu_seconds(own) + cpu_seconds(child)
        started = time.perf_counter()
        await self.conn.send_all(b"g")
        await self.stream(streamed)
        between = time.perf_counter()
        await self.mixed(items)
        if await self.conn.receive_some(1) != b"e":
            raise SystemExit("expected the end mark of the sender")
        ended = time.perf_counter()
        return Tenth(
            descriptors=self.next - first,
            seconds=ended - started,
            streamed_per_second=streamed / (between - started),
            cpu_seconds=cpu_seconds(own) + cpu_seconds(child) - used,
            receiver_rss=resident_bytes(own),
            receiver_open=open_descriptors(own),
            sender_rss=resident_bytes(child),
            sender_open=open_descriptors(child),
            cancelled=self.cancelled - cancelled,
        )


async def receiver(count: int, seed: int, console: Console) -> list[Tenth]:
    """Start the sender, and receive all that it sends."""
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        command = python(
            "tests.faults.soak", f"--count={count}", f"--seed={seed}", f"--sender={fd}"
        )
        process = await trio.lowlevel.open_process(command, pass_fds=[fd], env=environment())
    tenths: list[Tenth] = []
    try:
        async with UnixConnection.from_stdlib_socket(ours) as conn:
            with Progress(console=console) as progress:
                bar = progress.add_task("descriptors", total=count)
                driver = Receiver(conn, seed, progress, bar)
                # The start of the other Python is not measured.
                await conn.receive_some(1)
                for tenth, (streamed, mixed) in enumerate(shares(count)):
                    items = mixture(seed, tenth, mixed)
                    tenths.append(await driver.tenth(streamed, items, process.pid))
                progress.update(bar, completed=driver.next)
            await conn.send_all(b"g")
            if await conn.receive_some(1):
                raise SystemExit("received more than was sent")
        with trio.fail_after(30):
            await process.wait()
    finally:
        process.kill()
    return tenths


################################################################
# Checks
################################################################


def problems(tenths: list[Tenth]) -> list[str]:
    """Return a line for each figure that is not flat."""
    found: list[str] = []
    for side in ("receiver", "sender"):
        opened = [getattr(tenth, f"{side}_open") for tenth in tenths]
        if len(set(opened)) > 1:
            found.append(f"open descriptors of the {side} change: {opened}")
        memory = [getattr(tenth, f"{side}_rss") for tenth in tenths]
        if memory[-1] - memory[0] > MORE_MEMORY:
            found.append(f"memory of the {side} grows: {memory}")
    times = [tenth.cpu_microseconds for tenth in tenths]
    if statistics.median(times[-3:]) > MORE_TIME * statistics.median(times[:3]):
        shown = [round(each, 1) for each in times]
        found.append(f"it gets slower: {shown} microseconds of processor time each")
    return found


def table(tenths: list[Tenth]) -> Table:
    """Return the figures."""
    headings = (
        "tenth",
        "descriptors",
        "per second, fds()",
        "per second, all",
        "cpu us each",
        "cancelled",
        "receiver MiB",
        "receiver open",
        "sender MiB",
        "sender open",
    )
    shown = table_of("soak, by tenths of the run", headings, range(len(headings)))
    for number, tenth in enumerate(tenths, 1):
        shown.add_row(
            str(number),
            f"{tenth.descriptors:,}",
            f"{tenth.streamed_per_second:,.0f}",
            f"{tenth.per_second:,.0f}",
            f"{tenth.cpu_microseconds:.1f}",
            f"{tenth.cancelled:,}",
            f"{tenth.receiver_rss / 2**20:.1f}",
            str(tenth.receiver_open),
            f"{tenth.sender_rss / 2**20:.1f}",
            str(tenth.sender_open),
        )
    return shown


def main() -> int:
    """Run the soak; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help="descriptors (1000000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to FILE")
    parser.add_argument("--sender", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.count < TENTHS * 10:
        parser.error(f"--count must be at least {TENTHS * 10}")
    if given.sender is not None:
        trio.run(sender, given.sender, given.count, given.seed)
        return 0
    console = Console(stderr=True)
    tenths = trio.run(receiver, given.count, given.seed, console)
    wrong = problems(tenths)
    Console(width=None if sys.stdout.isatty() else 140).print(table(tenths))
    total = sum(tenth.seconds for tenth in tenths)
    print(f"{given.count:,} descriptors in {total:.1f} s, each checked; seed {given.seed}")
    for problem in wrong:
        print(f"NOT FLAT: {problem}")
    if not wrong:
        print("descriptors, memory and processor time are flat")
    if given.json:
        figures = {
            "count": given.count,
            "seed": given.seed,
            "seconds": total,
            "tenths": [attrs.asdict(tenth) for tenth in tenths],
            "problems": wrong,
        }
        given.json.write_text(json.dumps(figures, indent=2) + "\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
