"""Scenes in which handlers, clients, callbacks and operators do what they should not.

Invariant: a scene returns figures; it judges by what was observed from outside.
"""

from __future__ import annotations

import os
import random
import resource
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import attrs
import trio

from tests._helpers import processes
from tests._helpers.waiting import until

from .audit import Figure, Records, at_least, at_most, audit, equal, leftovers, none, shown
from .clients import ANSWERED, faulty_tokens, tokens
from .deaths import HANG_TIMEOUT, killed_workers
from .running import PATIENCE, WORKERS, Running, running
from .target import CANCELLED, EXIT, GENERATOR_EXIT, LIE, SEGFAULT, THREAD

if TYPE_CHECKING:
    from .deaths import Sizes

# A request that kills its worker is not a reason to write a core file each time.
_NO_CORES = {"RLIMIT_CORE": (0, 0)}
# A worker is killed five seconds after its last job if it does not exit; with time to look.
GONE_WITHIN = 8.0


async def _until_gone(pid: int, server: Running) -> float:
    """Wait until a worker has ended; return the seconds."""
    begin = trio.current_time()
    with trio.move_on_after(PATIENCE):
        while pid in server.workers():
            await trio.sleep(0.02)
    return round(trio.current_time() - begin, 2)


################################################################
# Orders that overtake each other, and slots of the queue
################################################################


async def cancelled_calls(sizes: Sizes, seed: int) -> list[Figure]:
    """40 calls are cancelled together while their worker is scaled away."""
    del seed
    async with running("submit") as server:
        late = [await server.ask("cancel", workers=WORKERS) for _ in range(sizes.restarts)]
        found = await server.leftovers()
        ledger = await server.finish()
    counts = ledger["statistics"]
    return [
        shown("rounds", sizes.restarts),
        none("calls without an outcome", counts["submitted"] - _sum(counts)),
        shown("late calls that were answered", late.count("answered")),
        none(
            "late calls that ended otherwise",
            [each for each in late if "reject" not in each and each != "answered"],
        ),
        none("jobs that a death has ended", counts["abandoned"]),
        none("workers that died", counts["deaths"]),
        *leftovers(found, ledger),
    ]


def _sum(counts: dict[str, int]) -> int:
    return sum(counts[each] for each in ("handled", "failed", "abandoned", "rejected", "cancelled"))


async def denied_clients(sizes: Sizes, seed: int) -> list[Figure]:
    """Clients that a policy denies, beside a TCP listener with a full queue."""
    del seed
    options: dict[str, Any] = {"max_queue": 1, "max_in_flight": 1}
    async with running("serve", order={"deny": True}, **options) as server:
        allowed = server.load(at_a_time=sizes.at_a_time, tokens=(t for t in tokens if t % 2))
        denied = server.load(at_a_time=4, tokens=(t for t in tokens if not t % 2))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(denied.run)
            await allowed.run(sizes.step)
            denied.stop()
        found = await server.leftovers()
        ledger = await server.finish()
    return [
        equal("clients that were answered", len(allowed.outcomes), sizes.step),
        none("clients that failed", allowed.failures()),
        at_least("clients that were denied", len(denied.outcomes), 1),
        none(
            "denied clients that were answered, or waited in vain",
            [was for was in denied.outcomes.values() if was == ANSWERED or "unans" in was],
        ),
        equal("handled", ledger["statistics"]["handled"], sizes.step),
        *leftovers(found, ledger),
    ]


################################################################
# One thing that goes wrong
################################################################


async def raising_callback(sizes: Sizes, seed: int) -> list[Figure]:
    """Workers killed at random, and on_abandoned raises for each job."""
    less = attrs.evolve(sizes, connections=sizes.connections // 5, kills=max(2, sizes.kills // 5))
    return await killed_workers(less, seed, "submit", {"raises": True})


async def scaled_away(sizes: Sizes, seed: int) -> list[Figure]:
    """Workers that are scaled away are killed, with a crash_limit of 1."""
    del seed
    pids: set[int] = set()

    async def kill(server: Running) -> None:
        for each in (await server.ask("statistics"))["workers"]:
            if each["state"] == "draining" and processes.send_to_child(
                each["pid"], server.pid, signal.SIGKILL
            ):
                pids.add(each["pid"])

    async with running("submit", crash_limit=1) as server:
        load = server.load(at_a_time=sizes.at_a_time)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            for _ in range(2 * sizes.rounds):
                await server.ask("scale", workers=2 * WORKERS)
                # Long enough for the new ones to have jobs.
                await load.more(sizes.step)
                await server.ask("scale", workers=WORKERS)
                await kill(server)
                await load.more(sizes.step // 10)
            load.stop()
        found = await server.leftovers()
        ledger = await server.finish()
        records = Records.of(server.records)
    strangers = [job for job, pid in ledger["reported"] if pid not in pids]
    return [
        shown("workers killed while they were leaving", len(pids)),
        none("reported of a worker that was not killed", strangers),
        *audit(load.outcomes, ledger, records, len(pids)),
        *leftovers(found, ledger),
    ]


################################################################
# Handlers, and what clients make them do
################################################################


async def _with_faults(
    sizes: Sizes, faults: list[int], count: int, *, kills: bool, **options: Any
) -> list[Figure]:
    """Send requests that cause faults among others; only their workers may be affected."""
    async with running("submit", **options) as server:
        load = server.load(at_a_time=sizes.at_a_time)
        faulty = [server.load(at_a_time=2, tokens=faulty_tokens(each)) for each in faults]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            await load.more(sizes.at_a_time)
            async with trio.open_nursery() as sending:
                for each in faulty:
                    sending.start_soon(each.run, count)
            await load.more(sizes.at_a_time)
            load.stop()
        found = await server.leftovers()
        ledger = await server.finish()
        records = Records.of(server.records)
        said = server.log().count("protocol error")
    tokens_of_faults = {token for each in faulty for token in each.outcomes}
    outcomes = {
        **load.outcomes,
        **{token: w for each in faulty for token, w in each.outcomes.items()},
    }
    answered = [token for token in tokens_of_faults if outcomes[token] == ANSWERED]
    jobs = {job for job, token in records.tokens.items() if token in tokens_of_faults}
    pids = {records.pids[job] for job in jobs}
    deaths = len(pids) if kills else 0
    figures = [
        equal("requests with a fault", len(tokens_of_faults), count * len(faults)),
        none("of those, answered", answered),
    ]
    if kills:
        strangers = [job for job, pid in ledger["reported"] if pid not in pids]
        figures += [
            equal("workers that died", ledger["statistics"]["deaths"], len(pids)),
            none("reported of a worker without a fault", strangers),
            shown("killed because of the protocol", said),
        ]
    else:
        figures += [
            none("workers that died", ledger["statistics"]["deaths"]),
            none("other clients that failed", load.failures()),
        ]
    raising = () if kills else tokens_of_faults
    return [
        *figures,
        *audit(outcomes, ledger, records, deaths, raising),
        *leftovers(found, ledger),
    ]


async def lies(sizes: Sizes, seed: int) -> list[Figure]:
    """Workers that violate the protocol of the pool."""
    del seed
    return await _with_faults(sizes, [LIE], 2 * sizes.kills, kills=True)


async def segfaults(sizes: Sizes, seed: int) -> list[Figure]:
    """Requests that make their worker segfault, with a crash_limit of 5."""
    del seed
    return await _with_faults(
        sizes,
        [SEGFAULT],
        4 * sizes.kills,
        kills=True,
        crash_limit=5,
        resource_limits=_NO_CORES,
    )


async def exits(sizes: Sizes, seed: int) -> list[Figure]:
    """Handlers that raise SystemExit, GeneratorExit, or the CancelledError of asyncio."""
    del seed
    return await _with_faults(
        sizes, [EXIT, GENERATOR_EXIT, CANCELLED], sizes.kills, kills=False, crash_limit=5
    )


################################################################
# Workers that cannot serve, and clocks
################################################################


async def deaf_workers(sizes: Sizes, seed: int) -> list[Figure]:
    """A worker that has no file descriptor free any more is replaced."""
    rng = random.Random(f"{seed} deaf")
    async with running("submit") as server:
        load = server.load(at_a_time=sizes.at_a_time)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            await load.more(sizes.at_a_time)
            pid = rng.choice(await server.pids())
            hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
            seconds = await _until_gone(pid, server)
            load.stop()
        found = await server.leftovers()
        ledger = await server.finish()
        records = Records.of(server.records)
    return [
        at_most("seconds until it was replaced", seconds, PATIENCE / 2),
        none("clients that failed", load.failures()),
        none("workers that died", ledger["statistics"]["deaths"]),
        *audit(load.outcomes, ledger, records),
        *leftovers(found, ledger),
    ]


async def terminated_while_busy(sizes: Sizes, seed: int) -> list[Figure]:
    """SIGTERM to a worker while its successor is started, which fails."""
    rng = random.Random(f"{seed} term-busy")
    said: list[str] = []
    async with running("submit") as server:
        load = server.load(at_a_time=sizes.at_a_time)
        before = await server.pids()
        pid = rng.choice(before)
        (server.directory / "hold").touch()
        (server.directory / "fail").touch()

        async def restart() -> None:
            said.append(await server.ask("restart") or "it worked")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            async with trio.open_nursery() as restarting:
                restarting.start_soon(restart)
                await until(lambda: len(server.workers()) > WORKERS)
                processes.send_to_child(pid, server.pid, signal.SIGTERM)
                await load.more(sizes.at_a_time)
                (server.directory / "hold").unlink()
            (server.directory / "fail").unlink()
            seconds = await _until_gone(pid, server)
            load.stop()
        found = await server.leftovers()
        after = await server.pids()
        ledger = await server.finish()
        records = Records.of(server.records)
    return [
        none("restarts that did not fail", [each for each in said if "go on" not in each]),
        # It is tried at once, and again after ten seconds.
        at_most("seconds until it was replaced", seconds, 20.0),
        equal("others that go on", len(set(before) & set(after)), WORKERS - 1),
        none("clients that failed", load.failures()),
        *audit(load.outcomes, ledger, records),
        *leftovers(found, ledger),
    ]


async def leftover_threads(sizes: Sizes, seed: int) -> list[Figure]:
    """Workers whose handlers have left a thread, which keeps them from exiting, are replaced."""
    del sizes, seed
    took: list[float] = []
    async with running("submit") as server:
        faulty = server.load(at_a_time=2 * WORKERS, tokens=faulty_tokens(THREAD))
        await faulty.run(4 * WORKERS)
        before = await server.pids()
        await server.ask("restart")
        async with trio.open_nursery() as nursery:

            async def wait(pid: int) -> None:
                took.append(await _until_gone(pid, server))

            for pid in before:
                nursery.start_soon(wait, pid)
        hung = server.log().count("no heartbeat")
        found = await server.leftovers()
        ledger = await server.finish()
    return [
        equal(
            "clients that were answered", len(faulty.outcomes) - len(faulty.failures()), 4 * WORKERS
        ),
        at_most("seconds until an old worker was gone, longest", max(took), GONE_WITHIN),
        none("workers called hung", hung),
        none("jobs that a death has ended", ledger["reported"]),
        *leftovers(found, ledger),
    ]


async def suspended(sizes: Sizes, seed: int) -> list[Figure]:
    """All processes of a pool are stopped for four times its hang_timeout."""
    rng = random.Random(f"{seed} suspend")
    before: set[int] = set()
    async with running("submit", hang_timeout=HANG_TIMEOUT) as server:
        load = server.load(at_a_time=sizes.at_a_time)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            for _ in range(sizes.rounds):
                await load.more(sizes.at_a_time)
                before = before or set(await server.pids())
                processes = [server.pid, *server.workers()]
                for number in (signal.SIGSTOP, signal.SIGCONT):
                    rng.shuffle(processes)
                    for pid in processes:
                        with suppress(ProcessLookupError):
                            os.kill(pid, number)
                    if number == signal.SIGSTOP:
                        await trio.sleep(4 * HANG_TIMEOUT)
                await load.more(sizes.at_a_time)
            await trio.sleep(2 * HANG_TIMEOUT)
            load.stop()
        found = await server.leftovers()
        after = set(await server.pids())
        ledger = await server.finish()
        records = Records.of(server.records)
    return [
        shown("times that all were stopped", sizes.rounds),
        none("workers that were killed", before - after),
        none("clients that failed", load.failures()),
        *audit(load.outcomes, ledger, records),
        *leftovers(found, ledger),
    ]


async def drained_while_restarting(sizes: Sizes, seed: int) -> list[Figure]:
    """A drain during a restart."""
    rng = random.Random(f"{seed} drain-restart")
    left: list[int] = []
    said: list[str] = []
    for _ in range(2 * sizes.rounds):
        async with running("serve") as server:

            async def restart(server: Running) -> None:
                said.append(await server.ask("restart") or "it worked")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(restart, server)
                await trio.sleep(rng.random() / 2)
                left.append((await server.finish())["processes left"])
    return [
        shown("drains", len(left)),
        shown("restarts that had worked before", said.count("it worked")),
        none(
            "restarts that ended otherwise than with PoolClosedError",
            [each for each in said if "accepts no more jobs" not in each and each != "it worked"],
        ),
        none("processes left at the end", sum(left)),
    ]
