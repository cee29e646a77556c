"""Scenes in which workers are replaced, or lack file descriptors; clients must not notice.

Invariant: a scene returns figures; it judges by what was observed from outside.
"""

from __future__ import annotations

import random
import resource
import signal
from typing import TYPE_CHECKING, Any

import trio

from tests._helpers import processes
from tests._helpers.waiting import until

from .audit import Figure, Records, at_least, at_most, audit, equal, leftovers, none, shown
from .clients import ANSWERED
from .running import PATIENCE, WORKERS, Running, running

if TYPE_CHECKING:
    from .clients import Load
    from .deaths import Sizes

Act = "Callable[[Running, Load], Awaitable[None]]"


async def _under_load(sizes: Sizes, way: str, act: Any, *, deaths: int = 0) -> list[Figure]:
    """Do something to a server while clients come; then look whether a client noticed."""
    async with running(way) as server:
        load = server.load(at_a_time=sizes.at_a_time)

        async def acting() -> None:
            await act(server, load)
            load.stop()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(acting)
            await load.run()
        found = await server.leftovers()
        ledger = await server.finish()
        records = Records.of(server.records)
    figures = [*audit(load.outcomes, ledger, records, deaths), *leftovers(found, ledger)]
    if not deaths:
        figures.insert(0, none("connections that failed", load.failures()))
        figures.append(none("jobs that a death has ended", ledger["reported"]))
    return figures


async def restarts(sizes: Sizes, seed: int) -> list[Figure]:
    """Rolling restarts."""
    del seed
    stayed: list[int] = []
    numbers: set[int] = set()

    async def act(server: Running, load: Load) -> None:
        for _ in range(sizes.restarts):
            before = await server.pids()
            await server.ask("restart")
            after = await server.pids()
            stayed.extend(set(before) & set(after))
            numbers.update(before, after)
            await load.more(sizes.step // 10)

    figures = await _under_load(sizes, "serve", act)
    return [
        shown("restarts", sizes.restarts),
        none("workers that a restart has not replaced", stayed),
        equal("workers that there were", len(numbers), WORKERS * (sizes.restarts + 1)),
        *figures,
    ]


async def scaling(sizes: Sizes, seed: int) -> list[Figure]:
    """More workers, and fewer."""
    rng = random.Random(f"{seed} scale")
    wrong: list[str] = []

    async def act(server: Running, load: Load) -> None:
        counts = [rng.randrange(1, 9) for _ in range(2 * sizes.rounds)]
        for count in [*counts, WORKERS]:
            await server.ask("scale", workers=count)
            if len(now := await server.pids()) != count:
                wrong.append(f"{len(now)} expected {count}")
            await load.more(sizes.step // 10)

    figures = await _under_load(sizes, "serve", act)
    return [
        shown("changes of their number", 2 * sizes.rounds + 1),
        none("times that it was another number", wrong),
        *figures,
    ]


async def terminated(sizes: Sizes, seed: int) -> list[Figure]:
    """SIGTERM to workers at random."""
    rng = random.Random(f"{seed} term")

    async def act(server: Running, load: Load) -> None:
        for _ in range(5 * sizes.rounds):
            await load.more(rng.randrange(1, sizes.step // 2))
            await server.signal_one(rng, signal.SIGTERM)

    figures = await _under_load(sizes, "submit", act)
    return [shown("signals", 5 * sizes.rounds), *figures]


async def scarce(sizes: Sizes, seed: int) -> list[Figure]:
    """No descriptor free in a worker (EMFILE)."""
    rng = random.Random(f"{seed} scarce")
    # Of each round: what the worker has taken without room, and after that.
    without: list[int] = []
    after: list[int] = []

    async def taken(server: Running, pid: int) -> int:
        """Return how many jobs a worker has acknowledged."""
        return int(await server.ask("taken", pid=pid))

    async def act(server: Running, load: Load) -> None:
        await load.more(sizes.step)
        for number in range(2 * sizes.rounds):
            pid = rng.choice(await server.pids())
            soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            # In turns: no room at all, and room for a part of a batch.
            room = 3 if number % 2 else 0
            limit = processes.highest_descriptor(pid) + 1 + room if room else _STANDARD
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, hard))
            # What it has acknowledged before comes first.
            await load.more(sizes.step // 10)
            before = await taken(server, pid)
            await load.more(sizes.step)
            if not room:
                without.append(await taken(server, pid) - before)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
            now = await taken(server, pid)
            with trio.move_on_after(PATIENCE):
                while await taken(server, pid) <= now + 10:
                    await load.more(1)
            after.append(await taken(server, pid) - now)

    figures = await _under_load(sizes, "submit", act)
    retried = next(each.value for each in figures if each.name == "retried on another worker")
    return [
        shown("times without room", 2 * sizes.rounds),
        at_least("jobs that moved on", retried, 1),
        equal("taken without room", sum(without), 0),
        at_least("taken after that, each time", min(after), 10),
        *figures,
    ]


async def scarce_pool(sizes: Sizes, seed: int) -> list[Figure]:
    """No descriptor free in the pool's process, and all workers killed."""
    del seed
    pids: set[int] = set()
    waited: list[float] = []

    async def act(server: Running, load: Load) -> None:
        for _ in range(sizes.rounds):
            await load.more(sizes.step)
            soft, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
            # Fewer than there are clients, and as many as a busy server may have left.
            limit = processes.highest_descriptor(server.pid) + 1 + sizes.at_a_time // 4
            resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (limit, hard))
            # Those that are started at once have descriptors that the dead ones had; so once more.
            for _ in range(2):
                await until(server.workers)
                for pid in server.workers():
                    if processes.send_to_child(pid, server.pid, signal.SIGKILL):
                        pids.add(pid)
                await trio.sleep(0.1)
            begin = trio.current_time()
            with trio.move_on_after(PATIENCE / 3):
                await load.more(sizes.step)
            waited.append(trio.current_time() - begin)
            resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (soft, hard))
            await load.more(sizes.step)

    figures = await _under_load(sizes, "serve", act, deaths=WORKERS * sizes.rounds)
    return [
        shown("times that all were killed", sizes.rounds),
        at_most("seconds until it served again, longest", round(max(waited), 2), PATIENCE / 6),
        *figures,
    ]


async def _drained(server: Running, load: Load, step: int) -> list[Figure]:
    ledger: dict[str, Any] = {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(load.run)
        await load.more(step)
        ledger = await server.finish()
        load.stop()
    records = Records.of(server.records)
    began = set(records.tokens.values())
    answered = {each for each, was in load.outcomes.items() if was == ANSWERED}
    counts = ledger["statistics"]
    return [
        shown("accepted", ledger["accepted"]),
        equal("handled", counts["handled"], ledger["accepted"]),
        equal("answered, say the clients", len(answered), ledger["accepted"]),
        none("begun, but not answered", began - answered),
        none("begun twice", [each for each, count in records.began.items() if count > 1]),
        none("failed, refused, cancelled, or reported", sum(map(counts.__getitem__, _BAD))),
        shown("arrived after the drain", len(load.outcomes) - len(answered)),
        none("processes left at the end", ledger["processes left"]),
    ]


# These three are always open.
_STANDARD = 3
_BAD = ("failed", "rejected", "cancelled", "abandoned")


async def drains(sizes: Sizes, seed: int) -> list[Figure]:
    """A drain under load."""
    del seed
    total: dict[str, list[Figure]] = {}
    for number in range(sizes.rounds):
        async with running("serve" if number % 2 == 0 else "submit") as server:
            for figure in await _drained(
                server, server.load(at_a_time=sizes.at_a_time), sizes.step
            ):
                total.setdefault(figure.name, []).append(figure)
    return [
        shown("drains", sizes.rounds),
        *(
            Figure(
                name,
                sum(each.value for each in some),
                "0" if some[0].expected == "0" else some[0].expected and "the same",
                all(each.holds for each in some),
                "".join(each.example for each in some),
            )
            for name, some in total.items()
        ),
    ]
