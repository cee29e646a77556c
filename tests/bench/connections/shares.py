"""Profile a ping-pong, by file, for this library and for raw system calls under trio.

``python -m tests.bench.connections.shares``. Both ends are tasks of one process, under cProfile,
which makes Python functions slower than they are: read the shares, not the times.
"""

from __future__ import annotations

import cProfile
import os
import pstats
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
from rich.console import Console
from rich.table import Table

from trio_unixconn import connection_pair

from .implementations import floor

ROUNDS = 3000
Step = Callable[[], Awaitable[None]]


async def play(begin: Step, answer: Step) -> None:
    """Have two tasks send one descriptor and return it."""

    async def answers() -> None:
        for _ in range(ROUNDS):
            await answer()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answers)
        for _ in range(ROUNDS):
            await begin()


async def ours() -> None:
    """Play with this library."""
    one, two = connection_pair()

    async def begin() -> None:
        await one.send_fd(0)
        os.close(await one.receive_fd())

    async def answer() -> None:
        fd = await two.receive_fd()
        await two.send_fd(0)
        os.close(fd)

    async with one, two:
        await play(begin, answer)


async def least() -> None:
    """Play with raw sendmsg and recvmsg."""
    one, two = socket.socketpair()
    with one, two:
        one.setblocking(False)
        two.setblocking(False)

        async def begin() -> None:
            await floor.send_fds(one, [0])
            floor.close_each(await floor.receive_fds(one))

        async def answer() -> None:
            fds = await floor.receive_fds(two)
            await floor.send_fds(two, [0])
            floor.close_each(fds)

        await play(begin, answer)


def shares(run: Callable[[], Awaitable[None]]) -> Counter[str]:
    """Return the seconds spent in each part."""
    profile = cProfile.Profile()
    profile.runcall(trio.run, run)
    found: Counter[str] = Counter()
    for (file, _, name), (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if any(call in name for call in ("sendmsg", "recvmsg", "posix.close", "poll", "sockopt")):
            found["system calls"] += own
        elif "trio_unixconn" in Path(file).parts or "floor.py" in file:
            found["the library, or the loop in its place"] += own
        else:
            found["trio, and Python beneath it"] += own
    return found


def main() -> None:
    """Print both, side by side."""
    table = Table(title=f"{ROUNDS} round trips of a descriptor, by cProfile")
    for heading in ("", "trio_unixconn", "trio, raw"):
        table.add_column(heading, justify="right" if heading else "left")
    columns = [shares(ours), shares(least)]
    for name in sorted(columns[0], key=lambda each: -columns[0][each]):
        cells = [f"{100 * each[name] / sum(each.values()):.0f} %" for each in columns]
        table.add_row(name, *cells)
    table.add_row("all", *(f"{1e6 * sum(each.values()) / ROUNDS:.0f} us" for each in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
