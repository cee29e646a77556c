"""A random test: a pool to which everything is done that can be done to it, in random order.

``python -m tests.faults.pool.random_pool [--random 60] [--seed 1]`` plays episodes, each with
a pool of its own. ``--episode`` plays one of them, ``--interrupt`` an episode in which SIGINT is
expected.

Invariant: each task that submits a job gets exactly one outcome. After an episode the pool's
counters add up, no handler has begun twice for a job, and no process, task, file descriptor or
connection is left.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import logging
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from tests._helpers import processes
from trio_unixconn import _closing
from trio_unixconn.errors import (
    HandlerError,
    JobRefusedError,
    PoolClosedError,
    WorkerDiedError,
    WorkerStartError,
)
from trio_unixconn.pool import AbandonedJob, WorkerPool, _handle, _supervisor, open_worker_pool

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

HANDLER: Final = "tests.faults.pool.random_handlers:handle"
SETUP: Final = "tests.faults.pool.random_handlers:record"
# An episode that takes longer has a task that waits in vain.
LONGEST: Final = 120.0
# The time in which submitters have their outcomes after their pool has ended.
SETTLED_WITHIN: Final = 10.0
MAX_SUBMITTERS: Final = 150
EXPECTED: Final = (HandlerError, JobRefusedError, WorkerDiedError, trio.TooSlowError)


class EpisodeError(AssertionError):
    """Something does not hold."""


def _random_data(rng: random.Random) -> bytes:
    """Return what a handler is told to do; most of them only answer or sleep."""
    if rng.random() < 0.9:
        return rng.choice([b"answer", b"sleep 0", b"sleep 0.01", b"sleep 0.3", b"block 0.02"])
    garbage = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 20)))
    return rng.choice(
        [
            *(b"raise", b"raise", b"raise-cancelled", b"exit", b"exit"),
            *(b"end-process", b"segfault", b"block 5", b"shielded 0.5", b"close", b"leak"),
            *(b"shut-down 0", b"shut-down 1", b"shut-down 2", b"thread 0.5"),
            b"write " + garbage.hex().encode(),
            # TAKEN, DONE and MORE, which are valid frames at another moment.
            b"write 120008000000" + (b"%02x" % rng.randrange(9)) + b"00" * 7,
            b"write 140008000000" + (b"%02x" % rng.randrange(200)) + b"00" * 7,
            b"write 190000000000",
        ]
    )


@attrs.define(eq=False)
class Episode:
    """One pool, and what is done to it.

    Attributes:
      outcomes: how often submitters had which outcome.
      waiting: the number of submitters without an outcome.
      peers: the other ends of the connections that were submitted.
      errors: what does not hold.
    """

    rng: random.Random
    nursery: trio.Nursery
    pool: WorkerPool
    outcomes: Counter[str] = attrs.field(factory=Counter[str])
    waiting: int = 0
    peers: list[socket.socket] = attrs.field(factory=list[socket.socket])
    ids: list[int] = attrs.field(factory=list[int])
    errors: list[str] = attrs.field(factory=list[str])

    async def run(self, seconds: float) -> None:
        """Do things for some time."""
        rng = self.rng
        actions: list[Callable[[], Awaitable[None]]] = [
            *[self.submit] * 30,
            *[self.call] * 30,
            *[self.call_in_a_group] * 3,
            *[self.kill] * 2,
            *[self.stop] * 2,
            *[self.terminate] * 2,
            *[self.restart] * 1,
            *[self.scale] * 2,
        ]
        end = trio.current_time() + seconds
        while trio.current_time() < end:
            action = rng.choice(actions)
            if self.waiting < MAX_SUBMITTERS:
                self.nursery.start_soon(action)
            if rng.random() < 0.3:
                await trio.sleep(rng.random() ** 3 * 0.1)
            elif rng.random() < 0.5:
                await trio.lowlevel.checkpoint()

    ################################################################
    # Submitters
    ################################################################

    def _worker(self) -> int | None:
        if self.rng.random() < 0.8:
            return None
        return self.rng.randrange(len(self.pool.statistics().workers))

    async def _note(self, name: str, run: Callable[[], Awaitable[Any]]) -> None:
        """Wait for the outcome of a job, which may be cancelled, and count it."""
        rng = self.rng
        timeout = rng.random() ** 2 if rng.random() < 0.3 else float("inf")
        self.waiting += 1
        outcome = "none"
        try:
            with trio.move_on_after(timeout) as scope:
                result = await run()
                outcome = "ok"
                self.ids.append(int(result) if isinstance(result, bytes) else result.id)
            if scope.cancelled_caught:
                outcome = "cancelled"
        except trio.Cancelled:
            outcome = "cancelled with the block"
            raise
        except (*EXPECTED, PoolClosedError) as exc:
            outcome = type(exc).__name__
        except ValueError as exc:
            # The worker was scaled away in between.
            if "index of a worker" not in str(exc):
                raise
            outcome = "no such worker"
        except Exception as exc:
            self.errors.append("".join(traceback.format_exception(exc)))
        finally:
            self.waiting -= 1
            self.outcomes[f"{name}: {outcome}"] += 1

    async def submit(self) -> None:
        """Submit a connection."""
        mine, theirs = socket.socketpair()
        self.peers.append(mine)
        data, worker = _random_data(self.rng), self._worker()
        await self._note("submit", lambda: self.pool.submit(theirs, data=data, worker=worker))
        # Untouched only if the pool was closed, or if the arguments were invalid.
        theirs.close()

    async def call(self) -> None:
        """Call a handler, with or without a connection."""
        data, worker = _random_data(self.rng), self._worker()
        timeout = self.rng.random() if self.rng.random() < 0.3 else None
        if self.rng.random() < 0.5:
            mine, theirs = socket.socketpair()
            self.peers.append(mine)
            await self._note(
                "call",
                lambda: self.pool.call(theirs, data=data, worker=worker, timeout=timeout),
            )
            theirs.close()
        else:
            await self._note(
                "call", lambda: self.pool.call(data=data, worker=worker, timeout=timeout)
            )

    async def call_in_a_group(self) -> None:
        """Cancel many calls at once."""
        with trio.move_on_after(self.rng.random() ** 2 / 2):
            async with trio.open_nursery() as nursery:
                for _ in range(40):
                    nursery.start_soon(
                        self._note, "group", lambda: self.pool.call(data=b"sleep 0.3")
                    )

    ################################################################
    # Faults and changes
    ################################################################

    def _signal(self, number: int) -> int:
        children = list(processes.children_of(os.getpid()))
        if not children:
            return 0
        pid = self.rng.choice(children)
        processes.send_to_child(pid, os.getpid(), number)
        return pid

    async def kill(self) -> None:
        """Kill a worker, even one that is starting."""
        self._signal(signal.SIGKILL)

    async def terminate(self) -> None:
        """Ask a worker to terminate."""
        self._signal(signal.SIGTERM)

    async def stop(self) -> None:
        """Stop a worker, and continue it after a while, if it is not killed first."""
        pid = self._signal(signal.SIGSTOP)
        try:
            await trio.sleep(self.rng.random() ** 2 * 3)
        finally:
            if pid:
                processes.send_to_child(pid, os.getpid(), signal.SIGCONT)

    async def _change(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        timeout = self.rng.random() * 2 if self.rng.random() < 0.2 else float("inf")
        with trio.move_on_after(timeout), suppress(PoolClosedError, WorkerStartError):
            await run()
            self.outcomes[name] += 1

    async def restart(self) -> None:
        """Replace all workers."""
        await self._change("restart", self.pool.restart)

    async def scale(self) -> None:
        """Change the number of workers."""
        count = self.rng.randrange(1, 5)
        await self._change("scale", lambda: self.pool.scale(count))


################################################################
# An episode
################################################################


def _options(rng: random.Random, records: Path | str) -> dict[str, Any]:
    return {
        "workers": rng.randrange(2, 5),
        "setup": SETUP,
        "setup_data": os.fsencode(records),
        "hang_timeout": 1.0,
        "drain_timeout": rng.choice([0.3, 2.0]),
        "crash_limit": 1000,
        "max_in_flight": rng.choice([1, 3, 1000]),
        "max_queue": rng.choice([1, 5, 1000]),
        "max_attempts": rng.choice([1, 3, 10]),
        "max_jobs": rng.choice([None, None, 50]),
        "handler_timeout": rng.choice([None, 0.25]),
        "kill_process_group": rng.choice([False, True]),
        "resource_limits": {"RLIMIT_NOFILE": (64, 64), "RLIMIT_CORE": (0, 0)},
    }


async def _end_block(episode: Episode, ending: str, block: trio.CancelScope) -> None:
    if ending == "rest":
        while episode.waiting:
            await trio.sleep(0.01)
    elif ending == "drain":
        await episode.pool.drain(episode.rng.random() * 2)
    elif ending == "raise":
        raise LookupError("the block raises")
    elif ending == "cancel":
        block.cancel()
        await trio.sleep_forever()


async def play(rng: random.Random, seconds: float, records: str) -> Counter[str]:
    """Play an episode; return the outcomes.

    Raises:
      EpisodeError: something does not hold.
    """
    tasks = trio.lowlevel.current_statistics().tasks_living
    reported: list[int] = []

    def report(job: AbandonedJob) -> None:
        reported.append(job.id)
        if len(reported) % 3 == 0:
            raise LookupError("on_abandoned raises")

    ending = rng.choice(["rest", "drain", "raise", "cancel", "leave"])
    is_outside = rng.random() < 0.5
    episode: Episode | None = None
    with trio.CancelScope() as block:
        try:
            async with trio.open_nursery() as around:
                async with (
                    open_worker_pool(
                        HANDLER, on_abandoned=report, **_options(rng, records)
                    ) as pool,
                    trio.open_nursery() as inside,
                ):
                    episode = Episode(rng, around if is_outside else inside, pool)
                    await episode.run(seconds)
                    if ending == "leave" and not is_outside:
                        ending = "rest"
                    await _end_block(episode, ending, block)
                    inside.cancel_scope.cancel()
                # The pool has ended.
                with trio.move_on_after(SETTLED_WITHIN):
                    while episode.waiting:
                        await trio.sleep(0.01)
                if episode.waiting:
                    episode.errors.append(f"{episode.waiting} submitters wait after the pool's end")
                around.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            if ending != "raise" or group.split(LookupError)[1] is not None:
                raise
    assert episode is not None
    _check(episode, reported, records)
    if (now := trio.lowlevel.current_statistics().tasks_living) != tasks:
        episode.errors.append(f"{now - tasks} tasks are left")
    episode.outcomes[f"ending: {ending}"] += 1
    if episode.errors:
        raise EpisodeError("\n".join([f"ending {ending}, outside {is_outside}", *episode.errors]))
    return episode.outcomes


def _check(episode: Episode, reported: list[int], records: str) -> None:
    errors, found = episode.errors, episode.pool.statistics()
    sums = (
        found.handled
        + found.failed
        + found.abandoned
        + found.rejected
        + found.cancelled
        + found.handed_over
    )
    if found.submitted != sums or found.queued or found.in_flight:
        errors.append(f"counters: {found}")
    if found.abandoned != len(reported):
        errors.append(f"{found.abandoned} abandoned, {len(reported)} reported")
    with open(records, encoding="ascii") as file:
        lines = [tuple(map(int, line.split())) for line in file]
    spoilt = {pid for job_id, pid in lines if not job_id}
    began = [job_id for job_id, pid in lines if pid not in spoilt]
    for name, ids in (("reported", reported), ("acknowledged", episode.ids), ("began", began)):
        if twice := [each for each, count in Counter(ids).items() if count > 1]:
            errors.append(f"{name} twice: {twice}")
    for peer in episode.peers:
        peer.setblocking(False)
        with peer:
            try:
                if peer.recv(1):
                    errors.append("a connection has data")
            except BlockingIOError:
                errors.append("a connection is still open")
            except OSError:
                pass


def _leftovers(fds: int) -> list[str]:
    gc.collect()
    _closing.wait_closed(5)
    found = []
    if children := list(processes.children_of(os.getpid())):
        found.append(f"processes are left: {children}")
    if (now := processes.open_descriptors(os.getpid())) != fds:
        names = []
        for each in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                names.append(os.readlink(f"/proc/self/fd/{each}"))
        found.append(f"{now - fds} file descriptors are left: {names}")
    return found


def _make_impatient() -> None:
    """Shorten pauses of the pool that only make an episode long."""
    for module, constant, seconds in (
        (_supervisor, "MAX_BACKOFF", 0.1),
        (_handle, "EXIT_GRACE", 1.0),
    ):
        setattr(module, constant, seconds)


def play_one(seed: str, seconds: float) -> Counter[str]:
    """Play an episode in a trio.run of its own, and look at what is left of it.

    Raises:
      EpisodeError: something does not hold; with the seed and the end of the pool's log.
    """
    rng = random.Random(seed)
    log: deque[str] = deque(maxlen=60)
    handler = logging.Handler()
    handler.emit = lambda record: log.append(handler.format(record))  # type: ignore[method-assign]
    logging.getLogger("trio_unixconn").addHandler(handler)
    _closing.wait_closed(5)
    fds = processes.open_descriptors(os.getpid())
    try:
        with tempfile.NamedTemporaryFile(prefix="random-pool-") as records:

            async def run() -> Counter[str]:
                with trio.fail_after(LONGEST):
                    return await play(rng, seconds, records.name)

            outcomes = trio.run(run)
        if errors := _leftovers(fds):
            raise EpisodeError("\n".join(errors))
    except Exception as exc:
        end = "\n".join(log)
        raise EpisodeError(f"seed {seed!r}: {exc}\n{end}") from exc
    finally:
        logging.getLogger("trio_unixconn").removeHandler(handler)
    return outcomes


def play_for(seconds: float, seed: int, *, episode_seconds: float) -> Counter[str]:
    """Play episodes for some time; the first one that fails raises EpisodeError."""
    total: Counter[str] = Counter()
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        total += play_one(f"{seed} {number}", episode_seconds)
        total["episodes"] += 1
        number += 1
    return total


################################################################
# Ctrl-C
################################################################


def _play_until_interrupted(seed: str) -> int:
    """Play an episode until SIGINT; say as JSON how it has ended and what is left."""
    fds = processes.open_descriptors(os.getpid())
    rng = random.Random(seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ended = "by itself"
    with tempfile.NamedTemporaryFile(prefix="random-pool-") as records:

        async def run() -> None:
            with trio.fail_after(LONGEST):
                await _play_endlessly(rng, records.name)

        try:
            trio.run(run)
        except BaseException as exc:
            ended = ", ".join(sorted({type(each).__name__ for each in _leaves(exc)}))
            if ended != "KeyboardInterrupt":
                traceback.print_exception(exc)
    gc.collect()
    print(json.dumps({"ended": ended, "left": _leftovers(fds)}), flush=True)
    return 0


async def _play_endlessly(rng: random.Random, records: str) -> None:
    async with (
        open_worker_pool(HANDLER, **_options(rng, records)) as pool,
        trio.open_nursery() as nursery,
    ):
        print("running", flush=True)
        await Episode(rng, nursery, pool).run(LONGEST)


def _leaves(exc: BaseException) -> list[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for each in exc.exceptions for leaf in _leaves(each)]
    return [exc]


def main(arguments: Sequence[str] | None = None) -> int:
    """Play; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", type=float, default=60, help="for how many seconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--episode", type=int, help="play only this episode")
    parser.add_argument("--length", type=float, default=3.0, help="seconds of an episode")
    parser.add_argument("--interrupt", action="store_true", help="expect SIGINT")
    given = parser.parse_args(arguments)
    # One episode is a test, which has less than four minutes.
    total_time = given.random if given.episode is None else 0
    faulthandler.dump_traceback_later(1.5 * LONGEST + total_time, exit=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    logging.getLogger("trio_unixconn").propagate = False
    _make_impatient()
    if given.interrupt:
        return _play_until_interrupted(str(given.seed))
    try:
        if given.episode is not None:
            total = play_one(f"{given.seed} {given.episode}", given.length)
        else:
            total = play_for(given.random, given.seed, episode_seconds=given.length)
    except EpisodeError as exc:
        print(f"WRONG: {exc}")
        traceback.print_exception(exc)
        return 1
    for name, count in sorted(total.items()):
        print(f"{count:8,} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
