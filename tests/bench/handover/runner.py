"""Servers are replaced while clients connect, beside HAProxy, nginx and others.

All have the same load, an open loop: requests begin at their times, a connection each, however many
are still open. The rate is a share of what the slowest serves in a closed loop. First nothing
happens for a while; then the server is replaced again and again. Counted apart are requests that
were refused, reset, empty, wrong, late or never answered; measured are the latency, and the longest
time without an answer.

Of this library alone: connections that are kept over upgrades and restarts of workers, what an
upgrade takes, and how long it takes to pass many idle connections on.

The exit status is 1 if a server failed, or if this library has lost a request or a connection, and
with --strict if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console

from tests._helpers.tables import machine
from tests.bench.autogroup import no_autogroup
from tests.bench.implementations import OURS, FailedError, MissingError, compiled
from tests.bench.report import Result, show_goals, spread
from tests.bench.runner import add_choices, checked, exit_on_sigterm, finish

from .report import judge, markdown, show
from .servers import IMPLEMENTATIONS, SERVERS, Ours, OursServe, Server

RESULT = Path(__file__).with_name("result.json")
TABLES = Path(__file__).with_name("result.md")
SOURCE = Path(__file__).with_name("load.c")
AT_ONCE = 32
# Arrivals, as a share of what the slowest serves.
SHARE = 0.3
# Of the many requests to our server alone, of what it serves.
OWN_SHARE = 0.5
# With a higher priority, the time that the generator waits for a processor is not a server's.
PRIORITY = -15


@attrs.frozen
class Sizes:
    """How long everything is, in seconds, and how much of it.

    Attributes:
      steady: the load before anything is replaced.
      replacements: of each server, one every ``interval``.
      requests: over TCP and Unix, of this library, while it is replaced every two seconds.
      kept: connections that are kept over ``upgrades``, and over restarts of workers.
      starts: upgrades that are measured, with 8 listeners.
      idle: connections that are passed on at once, with 1 KiB each, so many ``passes``.
    """

    steady: float
    replacements: int
    interval: float
    requests: int
    kept: int
    upgrades: int
    starts: int
    idle: int
    passes: int


FULL = Sizes(3, 5, 2, 100_000, 1000, 25, 10, 10_000, 5)
QUICK = Sizes(0.5, 2, 0.5, 2000, 100, 2, 2, 1000, 1)


class Load:
    """The clients: a program in C."""

    def __init__(self, directory: str) -> None:
        program = compiled(directory, SOURCE)
        self.version = program.version
        self._command = program.command

    def start(self, target: Sequence[str], seconds: float, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*self._command, *target, "--seconds", str(seconds), *words],
            stdout=subprocess.PIPE,
            text=True,
        )
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, process.pid, PRIORITY)
        return process

    def run(self, target: Sequence[str], seconds: float, *words: str) -> dict[str, float]:
        return result_of(self.start(target, seconds, *words))


def result_of(process: subprocess.Popen[str]) -> dict[str, float]:
    """Return what the clients have counted; wait for their end."""
    output, _ = process.communicate(timeout=600)
    if process.returncode:
        raise FailedError(f"the load exited with status {process.returncode}")
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def port_of(server: Server) -> list[str]:
    return ["--port", str(server.port)]


################################################################
# All implementations
################################################################


@attrs.define
class Comparison:
    """What was measured of all servers.

    Attributes:
      rates: requests a second in a closed loop, by name.
    """

    load: Load
    sizes: Sizes
    directory: Path
    rates: dict[str, float] = attrs.field(factory=dict[str, float])
    missing: dict[str, str] = attrs.field(factory=dict[str, str])
    failed: dict[str, str] = attrs.field(factory=dict[str, str])
    versions: dict[str, str] = attrs.field(factory=dict[str, str])

    def run(self, chosen: list[type[Server]], status: Callable[[str], None]) -> Result:
        capacity = 0.4 if self.sizes.steady < 1 else 1.0
        for each in chosen:
            status(f"{each.name}: closed loop")
            self._with(each, "rate", lambda server: self._measure_rate(server, capacity))
        if not self.rates:
            return {"rate": 0, "servers": {}}
        rate = round(SHARE * min(self.rates.values()))
        found: dict[str, Any] = {}
        for each in chosen:
            if each.name in self.rates:
                status(f"{each.name}: open loop, {rate} a second")
                self._with(
                    each,
                    "load",
                    lambda server: found.update({server.name: self._replace(server, rate)}),
                )
        return {"rate": rate, "servers": found}

    def _with(self, kind: type[Server], what: str, use: Callable[[Server], object]) -> None:
        server = None
        try:
            server = kind(self.directory / f"{kind.key}-{what}")
            server.await_start()
            use(server)
            self.versions[kind.name] = server.version
        except MissingError as exc:
            self.missing[kind.name] = str(exc)
        except (FailedError, subprocess.SubprocessError, OSError) as exc:
            self.failed[kind.name] = str(exc)
        finally:
            if server is not None:
                server.close()

    def _measure_rate(self, server: Server, seconds: float) -> None:
        words = ["--at-once", str(AT_ONCE)]
        # Until its code is compiled, and its caches are filled.
        self.load.run(port_of(server), seconds / 2, *words)
        self.rates[server.name] = self.load.run(port_of(server), seconds, *words)["rate"]

    def _replace(self, server: Server, rate: float) -> dict[str, Any]:
        words = ["--rate", str(rate)]
        steady = self.load.run(port_of(server), self.sizes.steady, *words)
        seconds = self.sizes.replacements * self.sizes.interval + 0.5
        process = self.load.start(port_of(server), seconds, *words)
        done = replace_regularly(server, self.sizes.replacements, self.sizes.interval)
        during = result_of(process)
        return {
            "capacity": round(self.rates[server.name]),
            "replaced": done,
            "steady": rounded(steady),
            "during": rounded(during),
        }


def replace_regularly(server: Server, count: int, interval: float) -> int:
    """Replace a server so often; return how often other processes served afterwards."""
    done = 0
    begin = time.monotonic()
    for number in range(count):
        time.sleep(max(0.0, begin + 0.2 + number * interval - time.monotonic()))
        done += server.replace()
    return done


def rounded(measured: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in measured.items()}


################################################################
# This library
################################################################


def many_requests(load: Load, sizes: Sizes, directory: Path, rate: float) -> Result:
    """Replace our server every two seconds, until so many requests were answered."""
    found: dict[str, Any] = {}
    server = Ours(directory / "requests")
    try:
        server.await_start()
        for name, target in (
            ("TCP", port_of(server)),
            ("Unix", ["--path", str(server.path())]),
        ):
            seconds = sizes.requests / 2 / rate
            interval = min(2.0, seconds / 2)
            process = load.start(target, seconds, "--rate", str(rate))
            count = max(1, int((seconds - 0.5) / interval))
            done = replace_regularly(server, count, interval)
            found[name] = {**rounded(result_of(process)), "replaced": done}
    finally:
        server.close()
    return found


def kept_connections(load: Load, sizes: Sizes, directory: Path) -> Result:
    """Replace our server, and restart the workers of our pool, under connections that are kept."""
    found: dict[str, Any] = {}
    server = Ours(directory / "kept")
    try:
        server.await_start()
        found["upgrades"] = replaced_under_kept(load, server, sizes, server.replace)
    finally:
        server.close()
    pool = OursServe(directory / "restarts")
    try:
        pool.await_start()
        found["restarts of workers"] = replaced_under_kept(
            load, pool, sizes, lambda: restart_workers(pool)
        )
    finally:
        pool.close()
    return found


def restart_workers(server: OursServe) -> bool:
    """Have the workers of a pool replaced; return whether they were."""
    before = server.pids() - {server.main}
    os.kill(server.main, signal.SIGHUP)
    deadline = time.monotonic() + 20
    while before & server.pids():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def replaced_under_kept(
    load: Load, server: Server, sizes: Sizes, replace: Callable[[], bool]
) -> Result:
    # As long as the replacements take; a part of the load is after them.
    seconds = sizes.upgrades * 0.75 + 1.0
    words = ["--rate", str(sizes.kept), "--kept", str(sizes.kept)]
    process = load.start(port_of(server), seconds, *words)
    assert process.stdout is not None
    process.stdout.readline()
    begin, done = time.monotonic(), 0
    while done < sizes.upgrades and time.monotonic() < begin + seconds - 0.5:
        done += replace()
    return {**rounded(result_of(process)), "replaced": done}


class With8Listeners(Ours):
    """Our server with 8 listeners."""

    def options(self) -> list[str]:
        return ["--listeners", "6"]


class WithData(Ours):
    """Our server; 1 KiB travels with each connection."""

    def options(self) -> list[str]:
        return ["--data", "1024"]


def notes_of(server: Server) -> list[dict[str, float]]:
    lines = (server.directory / "upgrades").read_text().splitlines()
    return [json.loads(line) for line in lines]


def upgrades(sizes: Sizes, directory: Path) -> Result:
    """Return how long upgrades with 8 listeners take, and a start of the same program."""
    server = With8Listeners(directory / "listeners")
    try:
        server.await_start()
        for _ in range(sizes.starts):
            server.replace()
        notes = notes_of(server)
    finally:
        server.close()
    starts: list[float] = []
    for number in range(sizes.starts):
        # What a start takes that replaces nothing, until it could accept.
        begin = time.monotonic()
        alone = With8Listeners(directory / f"alone{number}")
        try:
            while not (alone.directory / "pid").exists():
                time.sleep(0.001)
            starts.append(time.monotonic() - begin)
        finally:
            alone.close()
    seconds = [each["seconds"] for each in notes if "seconds" in each]
    commits = [each["commit"] for each in notes if "commit" in each]
    more = [each - statistics.median(starts) for each in seconds]
    return {
        "start": spread(starts),
        "upgrade": spread(seconds),
        "upgrade more than start": spread(more),
        "COMMIT to SERVING": spread(commits),
    }


def idle_connections(load: Load, sizes: Sizes, directory: Path) -> Result:
    """Return how long it takes to pass many idle connections on."""
    server = WithData(directory / "idle")
    try:
        server.await_start()
        seconds = sizes.passes * 4.0 + 1
        words = ["--kept", str(sizes.idle), "--rate", "10"]
        process = load.start(port_of(server), seconds, *words)
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(sizes.passes):
            server.replace()
        counted = result_of(process)
        notes = [each for each in notes_of(server) if "passing" in each]
    finally:
        server.close()
    return {
        "connections": sizes.idle,
        "passed": [each["passed"] for each in notes],
        "seconds": spread([each["passing"] for each in notes]),
        "closed": counted["closed"],
    }


def main() -> int:
    """Measure, show, and judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_choices(parser, IMPLEMENTATIONS, 1, 1)
    parser.add_argument(
        "--requests", type=int, help="of ours, over TCP and Unix, during an upgrade every 2 s"
    )
    parser.add_argument("--upgrades", type=int, help="of ours, under connections that are kept")
    given = checked(parser, IMPLEMENTATIONS)
    sizes = QUICK if given.quick else FULL
    for name in "requests", "upgrades":
        if getattr(given, name):
            sizes = attrs.evolve(sizes, **{name: getattr(given, name)})
    exit_on_sigterm()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    keys = {each.key for each in given.implementations}
    chosen = [each for each in SERVERS if each.key in keys and given.only in each.name]
    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory() as name,
        no_autogroup() as note,
        console.status("") as status,
    ):
        directory = Path(name)
        load = Load(name)
        compared = Comparison(load, sizes, directory)
        result: Result = {
            "machine": machine(),
            "quick": given.quick,
            "rounds": 1,
            "sizes": attrs.asdict(sizes),
            "compared": compared.run(chosen, status.update),
            "versions": {**compared.versions, "the load": load.version},
            "missing": compared.missing,
            "failed": compared.failed,
        }
        if not given.only and Ours in chosen:
            rate = compared.rates.get(OURS, 1000.0) * OWN_SHARE
            parts: dict[str, Callable[[], Result]] = {
                "requests": lambda: many_requests(load, sizes, directory, round(rate)),
                "kept": lambda: kept_connections(load, sizes, directory),
                "upgrades": lambda: upgrades(sizes, directory),
                "idle": lambda: idle_connections(load, sizes, directory),
            }
            for part, measure in parts.items():
                status.update(f"{OURS}: {part}")
                try:
                    result[part] = measure()
                except (FailedError, subprocess.SubprocessError, OSError) as exc:
                    result["failed"][f"{OURS}: {part}"] = repr(exc)
    shown = Console(width=None if sys.stdout.isatty() else 160)
    show(result, shown)
    verdicts = judge(result)
    show_goals(verdicts, shown)
    if note:
        shown.print(note, style="yellow", markup=False)
    # What is lost is lost on a busy machine, too; what is late may be late because of that.
    is_lossy = any(each.expected == "0" and each.is_met is False for each in verdicts)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    kept = {TABLES: markdown(result), RESULT: text}
    return int(finish(given, result, verdicts, lambda: kept) or is_lossy)
