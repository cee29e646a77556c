"""Scenes in which processes die: workers, workers that hang, and the pool's own.

Invariant: a scene returns figures; it judges by what was observed from outside.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import attrs
import trio

from tests._helpers import processes
from tests._helpers.waiting import until

from .audit import Figure, Records, at_most, audit, equal, leftovers, none, shown
from .running import WORKERS, Running, running

if TYPE_CHECKING:
    from .clients import Load

# What hangs is killed after that.
HANG_TIMEOUT = 1.0
# How much longer it may take: it is looked at five times in that time, on a busy machine.
HANG_LEEWAY = 2.0
GONE_AFTER = 1.0


@attrs.frozen(kw_only=True)
class Sizes:
    """How much of everything.

    Attributes:
      connections: of each scene in which workers are killed.
      kills: in each of those.
      restarts: rolling restarts.
      ends: how many pools' processes are killed, of each kind.
      rounds: of every other fault.
      step: connections between one fault and the next.
      at_a_time: clients at a time.
    """

    connections: int
    kills: int
    restarts: int
    ends: int
    rounds: int
    step: int
    at_a_time: int


async def killed_workers(
    sizes: Sizes, seed: int, way: str, order: dict[str, Any] | None = None
) -> list[Figure]:
    """Kill workers at random moments."""
    rng = random.Random(f"{seed} {way}")
    moments = sorted(rng.sample(range(sizes.connections), sizes.kills))
    # A hundredth of a second is a few batches.
    pauses = [rng.random() / 100 for _ in moments]
    pids: set[int] = set()

    async def kill(server: Running, load: Load) -> None:
        for moment, pause in zip(moments, pauses, strict=True):
            await load.reached(moment)
            await trio.sleep(pause)
            # One that was killed may not have died yet.
            pids.add(await server.signal_one(rng, signal.SIGKILL, pids))

    async with running(way, order=order) as server:
        load = server.load(at_a_time=sizes.at_a_time)
        begin = time.monotonic()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill, server, load)
            await load.run(sizes.connections)
        seconds = time.monotonic() - begin
        found = await server.leftovers()
        ledger = await server.finish()
        records = Records.of(server.records)
    strangers = [job for job, pid in ledger["reported"] if pid not in pids]
    return [
        equal("workers killed", len(pids), sizes.kills),
        shown("of those, ready; the others were starting", ledger["statistics"]["deaths"]),
        shown("connections a second", round(len(load.outcomes) / seconds)),
        *audit(load.outcomes, ledger, records, len(pids)),
        none("reported of a worker that was not killed", strangers),
        *leftovers(found, ledger),
    ]


async def killed_under_submit(sizes: Sizes, seed: int) -> list[Figure]:
    """Workers killed at random (submit, each receipt kept)."""
    return await killed_workers(sizes, seed, "submit")


async def killed_under_serve(sizes: Sizes, seed: int) -> list[Figure]:
    """Workers killed at random (serve_with_workers)."""
    return await killed_workers(sizes, seed, "serve")


async def stopped_workers(sizes: Sizes, seed: int) -> list[Figure]:
    """Workers stopped with SIGSTOP, which hang."""
    rng = random.Random(f"{seed} stop")
    took: list[float] = []
    pids: set[int] = set()

    async def stop(server: Running, load: Load) -> None:
        for _ in range(sizes.rounds):
            await load.more(sizes.step)
            pid = rng.choice(await server.pids())
            pidfd = processes.open_child(pid, server.pid)
            assert pidfd is not None
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
                begin = trio.current_time()
                with trio.move_on_after(30):
                    await trio.lowlevel.wait_readable(pidfd)
                took.append(trio.current_time() - begin)
            finally:
                os.close(pidfd)
            pids.add(pid)
        await load.more(sizes.step)
        load.stop()

    async with running("submit", hang_timeout=HANG_TIMEOUT) as server:
        load = server.load(at_a_time=sizes.at_a_time)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop, server, load)
            await load.run()
        found = await server.leftovers()
        ledger = await server.finish()
        records = Records.of(server.records)
        said = server.log().count("no heartbeat for")
    strangers = [job for job, pid in ledger["reported"] if pid not in pids]
    return [
        equal("workers stopped", len(pids), sizes.rounds),
        equal("killed as hung", said, sizes.rounds),
        at_most("seconds until killed, longest", round(max(took), 2), HANG_TIMEOUT + HANG_LEEWAY),
        *audit(load.outcomes, ledger, records, len(pids)),
        none("reported of a worker that was not stopped", strangers),
        *leftovers(found, ledger),
    ]


async def everything(sizes: Sizes, seed: int) -> list[Figure]:
    """All at once: workers killed, stopped, terminated, replaced, more of them and fewer."""
    rng = random.Random(f"{seed} everything")
    pids: set[int] = set()
    refused: list[str] = []
    done: Counter[str] = Counter()

    async def send(server: Running, load: Load) -> None:
        for _ in range(4 * sizes.rounds):
            await load.more(rng.randrange(1, sizes.step))
            what = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
            if what == signal.SIGSTOP:
                # Not one that is starting, which may take a minute.
                pid = rng.choice([*await server.pids(), 0])
                if not processes.send_to_child(pid, server.pid, what):
                    continue
            else:
                pid = await server.signal_one(rng, what)
            done[what.name] += 1
            pids.add(pid)

    async def change(server: Running, load: Load) -> None:
        for _ in range(2 * sizes.rounds):
            await load.more(rng.randrange(1, sizes.step))
            what = rng.choice(["restart", "scale"])
            arguments = {"workers": rng.randrange(1, 7)} if what == "scale" else {}
            if said := await server.ask(what, **arguments):
                refused.append(said)
            done[what] += 1

    async def act(server: Running, load: Load) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, server, load)
            nursery.start_soon(change, server, load)
        while said := await server.ask("scale", workers=WORKERS):
            refused.append(said)
        load.stop()

    async with running("submit", hang_timeout=HANG_TIMEOUT) as server:
        load = server.load(at_a_time=sizes.at_a_time)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(act, server, load)
            await load.run()
        found = await server.leftovers()
        ledger = await server.finish()
        records = Records.of(server.records)
    strangers = [job for job, pid in ledger["reported"] if pid not in pids]
    return [
        *(shown(what, count) for what, count in sorted(done.items())),
        shown("restarts and scalings in which a new worker was killed", len(refused)),
        *audit(load.outcomes, ledger, records, len(pids)),
        none("reported of a worker to which nothing was done", strangers),
        *leftovers(found, ledger),
    ]


async def _end_of(sizes: Sizes, seed: str, handler: str) -> tuple[float, int, int]:
    """Kill a pool's process under load; return how long its workers lived, and what is left."""
    rng = random.Random(seed)
    async with running("serve", handler) as server:
        load = server.load(at_a_time=sizes.at_a_time)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            if handler == "burn":
                # All compute from their first job on; no client is answered.
                await until(lambda: len(Records.of(server.records).began) >= WORKERS)
            else:
                await load.more(2 * sizes.at_a_time)
            await trio.sleep(rng.random() / 10)
            pids = server.workers()
            pidfds = [pidfd for pid in pids if (pidfd := processes.open_child(pid, server.pid))]
            server.process.send_signal(signal.SIGKILL)
            # Nothing else is done meanwhile: the clients are only there to be a load until then.
            seconds, left = processes.seconds_until_ended(pidfds, 10)
            for each in pidfds:
                os.close(each)
            nursery.cancel_scope.cancel()
        await server.process.wait()
        return seconds, left, len(server.all())


async def _ends(sizes: Sizes, seed: int, handler: str) -> list[Figure]:
    seen = [await _end_of(sizes, f"{seed} {handler} {each}", handler) for each in range(sizes.ends)]
    took = [seconds for seconds, _, _ in seen]
    return [
        equal("pool processes killed", len(seen), sizes.ends),
        shown("seconds until its last worker was gone, mean", round(sum(took) / len(took), 2)),
        at_most("seconds until its last worker was gone, longest", round(max(took), 2), GONE_AFTER),
        none("workers that went on", sum(left for _, left, _ in seen)),
        none("processes of it found afterwards", sum(found for _, _, found in seen)),
    ]


async def killed_pool(sizes: Sizes, seed: int) -> list[Figure]:
    """The pool's process killed under load."""
    return await _ends(sizes, seed, "answer")


async def killed_pool_burning(sizes: Sizes, seed: int) -> list[Figure]:
    """The pool's process killed, handlers computing without a checkpoint."""
    return await _ends(sizes, seed, "burn")
