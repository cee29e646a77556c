"""How fast and how fair the worker pool is, beside other ways to spread connections.

All implementations of a load run in turn, A B C A B C, each in its own processes, which stay for
all of the run; each turn begins with another. Before that each serves so many connections that it
is warm, and then a short run of each load, which do not count. A turn in which other processes used
this machine is run once more, and those in which they used it least count, whatever their
results. What is shown is the median of the ratios within each turn, and their quartiles; figures
are shown beside it. Implementations that are not installed are named as missing.

Meanwhile, the kernel does not share processors between sessions (see tests/bench/autogroup.py).

The load is made by a program in C. In a closed loop a connection follows another: that is the
rate. In an open loop they begin at random times that are the same for all, so that
connections that wait while a server stands still are counted: that is the latency. No process is
pinned to a processor: the generator takes part of them all, from each implementation alike, and the
kernel may move the rest. In an open loop the generator comes first where that is allowed.

The exit status is 1 if an implementation failed, and with --strict if a goal is missed. A missed
goal is otherwise not an error: on a busy machine it says little.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
from rich.console import Console

from tests._helpers.processes import machine_busy, private_bytes
from tests._helpers.tables import machine
from tests.bench.autogroup import no_autogroup
from tests.bench.implementations import OURS, FailedError
from tests.bench.report import Result, show_goals
from tests.bench.runner import (
    Run,
    add_choices,
    checked,
    exit_on_sigterm,
    finish,
    in_turn,
    progress_bar,
)

from .generator import Generator, Measured, built, check
from .report import (
    Figures,
    Turn,
    arrivals,
    by_name,
    disturbance,
    figures_of,
    judge,
    least_disturbed,
    markdown,
    notes_of,
    show,
    summary,
)
from .servers import IMPLEMENTATIONS, PoolImplementation, Server
from .workloads import (
    EVEN,
    LOADS,
    MANY,
    MEMORY,
    MEMORY_ROUNDS,
    MOST_DISTURBED,
    QUICK_MEMORY_ROUNDS,
    SHARE,
    SPARE,
    UNEVEN,
    Load,
)

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

TABLES = Path(__file__).with_name("result.md")
ROUNDS, QUICK_ROUNDS = 7, 3
# Of all implementations, before anything is measured, in connections, and in seconds at most.
WARM_UP_CONNECTIONS = 20_000
WARM_UP_PATIENCE = 30
# How long warming up to a load is, as a share of a run.
WARM_UP = 0.3


@attrs.define(kw_only=True)
class PoolRun(Run[PoolImplementation, Server]):
    """One run of the benchmark.

    Attributes:
      capacities: connections a second in a closed loop, by whether some burn, and by name.
    """

    generator: Generator
    notes: list[str] = attrs.field(factory=list)
    capacities: dict[bool, dict[str, float]] = attrs.field(factory=dict)

    def warm_up(self) -> None:
        """Have each serve so many connections that its code is compiled, where it is.

        Node takes twice as much processor time for the first ten thousand as for later ones.
        """
        for name, server in list(self.started.items()):
            served, deadline = 0, time.monotonic() + WARM_UP_PATIENCE
            try:
                while served < WARM_UP_CONNECTIONS and time.monotonic() < deadline:
                    measured = self.generator.run(server.port, burns=False, seconds=0.5, seed=0)
                    check(measured)
                    served += measured["answered"]
            except FailedError as exc:
                self._drop(name, f"warming up: {exc}")

    def _start_afresh(self) -> None:
        implementations = [server.implementation for server in self.started.values()]
        self.close()
        self.start(implementations)
        self.warm_up()

    def names_of(self, load: Load) -> list[str]:
        """Return the implementations that run a load."""
        return [name for name in self.started if load.idle is None or name == OURS]

    def rounds_of(self, load: Load) -> int:
        """Return how often a load is run."""
        return min(self.rounds, load.rounds)

    def seconds_of(self, load: Load) -> float:
        """Return how long one run of a load is."""
        return load.quick if self.quick else load.seconds

    def measure(
        self, load: Load, progress: Progress, task: TaskID
    ) -> tuple[float | None, dict[str, Figures]]:
        """Run a load in turns; return the arrivals a second, and figures where it did not fail."""
        names = self.names_of(load)
        warm = self._warm_up(load, names)
        # What was measured in full is better known than what warming up has shown.
        known = warm | self.capacities.get(load.burns, {})
        names = [name for name in names if name in warm]
        rate = None
        if load.is_open and names:
            rate, names = self._arrivals(load, {name: known[name] for name in names})
        turns: list[Turn] = []
        rounds = self.rounds_of(load)
        while names and len(turns) < rounds + self._more_turns(turns, rounds):
            if load.fresh and turns and len(turns) % load.fresh == 0:
                self._start_afresh()
                names = [name for name in names if name in self.started]
            turns.append(self._turn(load, names, rate, seed=len(turns) + 1))
            names = [name for name in names if name in turns[-1]]
            progress.update(task, advance=len(names) if len(turns) <= rounds else 0)
        if len(turns) > rounds:
            self.notes.append(
                f"{load.title}: the {rounds} of {len(turns)} turns in which others disturbed least"
            )
        values = by_name(least_disturbed(turns, rounds), names)
        if load.title in (EVEN, UNEVEN):
            self.capacities[load.burns] = {
                name: statistics.median(figures["rate"]) for name, figures in values.items()
            }
        return rate, values

    def _turn(self, load: Load, names: list[str], rate: float | None, *, seed: int) -> Turn:
        found: Turn = {}
        for name in in_turn(names, seed):
            try:
                found[name] = self._once(name, load, rate, seed=seed)
            except FailedError as exc:
                self._drop(name, f"{load.title}: {exc}")
        return found

    @staticmethod
    def _more_turns(turns: list[Turn], rounds: int) -> int:
        # At most as many again: a machine that is always busy is measured as it is.
        return min(rounds, sum(disturbance(turn) > MOST_DISTURBED for turn in turns))

    def growths(self, times: int, progress: Progress, task: TaskID) -> list[float]:
        """Return how much our parent's memory grows with many jobs in flight, so many times."""
        found: list[float] = []
        if OURS not in self.started:
            return found
        implementation = self.started[OURS].implementation
        for _ in range(times):
            try:
                found.append(growth(implementation, self.directory, self.generator, MANY))
            except FailedError as exc:
                self.failed[OURS] = f"{MEMORY}: {exc}"
                break
            progress.advance(task)
        return found

    def _warm_up(self, load: Load, names: list[str]) -> dict[str, float]:
        rates = {}
        closed = attrs.evolve(load, is_open=False)
        for name in names:
            try:
                figures = self._once(name, closed, None, seed=0, length=WARM_UP)
            except FailedError as exc:
                self._drop(name, f"{load.title}: {exc}")
            else:
                rates[name] = figures["rate"]
        return rates

    def _arrivals(self, load: Load, rates: dict[str, float]) -> tuple[float, list[str]]:
        with_workers = {
            name: rate
            for name, rate in rates.items()
            if self.started[name].implementation.workers > 1
        }
        rate = arrivals((with_workers or rates).values(), SHARE)
        names = []
        for name, served in rates.items():
            if served * SPARE >= rate:
                names.append(name)
            else:
                self.notes.append(
                    f"{load.title}: {name} is left out, which serves {served:,.0f} a second"
                )
        return rate, names

    def _once(
        self, name: str, load: Load, rate: float | None, *, seed: int, length: float = 1
    ) -> dict[str, float]:
        server = self.started[name]
        seconds = self.seconds_of(load) * length
        if load.idle is None:
            return observed(
                server,
                lambda: self.generator.run(
                    server.port,
                    burns=load.burns,
                    seconds=seconds,
                    seed=seed,
                    rate=rate or 0,
                    at_once=load.at_once,
                ),
            )
        before = server.descriptors()
        with self.generator.crowd(server.port, load.idle, seconds=seconds, seed=seed) as measure:
            server.await_descriptors(before + load.idle)
            figures = observed(server, measure)
        server.await_descriptors(before)
        return figures

    def _drop(self, name: str, why: str) -> None:
        self.failed[name] = str(self.started.pop(name).failed(why))


def observed(server: Server, measure: Callable[[], Measured]) -> dict[str, float]:
    """Return the figures of one load, with what the server and others used meanwhile."""
    before, busy, begin = server.cpu(), machine_busy(), time.monotonic()
    measured = measure()
    after, busy, took = server.cpu(), machine_busy() - busy, time.monotonic() - begin
    check(measured)
    figures = figures_of(measured, server.implementation.workers, before, after)
    own = measured["own_cpu"] + sum(after.values()) - sum(before.values())
    return {**figures, "others": max(0, busy - own) / took / (os.cpu_count() or 1)}


def growth(
    implementation: PoolImplementation, directory: str, generator: Generator, jobs: int
) -> float:
    """Return the bytes that the parent of a new server takes more when so many are in flight.

    A new one each time, because memory that was in use before is not given back.
    """
    server = Server(implementation, directory)
    try:
        check(generator.run(server.port, burns=False, seconds=0.5, seed=1))
        descriptors, before = server.descriptors(), private_bytes(server.pid)
        with generator.crowd(server.port, jobs):
            server.await_descriptors(descriptors + jobs)
            return float(private_bytes(server.pid) - before)
    finally:
        server.close()


def run(
    loads: list[Load],
    implementations: list[PoolImplementation],
    rounds: int,
    memory: int,
    *,
    quick: bool,
) -> Result:
    """Measure everything; return the results."""
    result: Result = {
        "machine": machine(),
        "rounds": rounds,
        "quick": quick,
        "cases": {},
        "memory": [],
    }
    with tempfile.TemporaryDirectory() as directory, no_autogroup() as note:
        generator = built(directory)
        running = PoolRun(
            begin=Server, directory=directory, quick=quick, rounds=rounds, generator=generator
        )
        try:
            running.start(implementations)
            total = sum(len(running.names_of(load)) * running.rounds_of(load) for load in loads)
            with progress_bar() as progress:
                more = memory if OURS in running.started else 0
                task = progress.add_task("warming up", total=total + more)
                running.warm_up()
                for load in loads:
                    progress.update(task, description=load.title)
                    rate, values = running.measure(load, progress, task)
                    if values:
                        result["cases"][load.title] = summary(load, rate, values)
                progress.update(task, description=MEMORY)
                result["memory"] = running.growths(memory, progress, task)
        finally:
            running.close()
    result |= {
        "versions": {**running.versions, "the load": generator.version},
        "missing": running.missing,
        "failed": running.failed,
    }
    result["notes"] = [*running.notes, *([note] if note else []), *notes_of(result)]
    return result


def main() -> int:
    """Measure, show, and judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_choices(parser, IMPLEMENTATIONS, ROUNDS, QUICK_ROUNDS)
    given = checked(parser, IMPLEMENTATIONS)
    exit_on_sigterm()
    rounds = given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS)
    loads = [
        load
        for load in LOADS
        if (load.quick if given.quick else load.seconds) and given.only in load.title
    ]
    # Each idle connection is a descriptor of a process, and those that are started inherit this.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    memory = QUICK_MEMORY_ROUNDS if given.quick else MEMORY_ROUNDS
    if given.only not in MEMORY:
        memory = 0
    result = run(loads, given.implementations, rounds, memory, quick=given.quick)
    console = Console(width=None if sys.stdout.isatty() else 160)
    show(result, console)
    verdicts = judge(result)
    show_goals(verdicts, console)
    return int(finish(given, result, verdicts, lambda: {TABLES: markdown(result)}))
