"""The pool's benchmark works: what is installed serves the load, and what is not is named."""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Generator as Yields
from pathlib import Path
from typing import Any

import pytest

from tests._helpers.processes import cpu_seconds, family, private_bytes
from tests.bench.autogroup import no_autogroup
from tests.bench.pool.generator import Generator, built, check
from tests.bench.pool.report import (
    arrivals,
    by_name,
    disturbance,
    figures_of,
    judge,
    least_disturbed,
    markdown,
    notes_of,
    summary,
)
from tests.bench.pool.runner import growth, observed
from tests.bench.pool.servers import IMPLEMENTATIONS, PoolImplementation, Server
from tests.bench.pool.workloads import (
    ACCEPTING,
    BURN_ONE_IN,
    EVEN,
    EVEN_OPEN,
    GOALS,
    LOADS,
    MANY,
    NODE,
    REUSEPORT,
    SHARED,
    UNEVEN_OPEN,
    beside,
)
from tests.bench.runner import exit_on_sigterm

from .implementations import OURS, FailedError, MissingError

# One Python is enough.
pytestmark = [pytest.mark.slow, pytest.mark.once]

# What is there wherever the tests run.
ALWAYS = {"reuseport", "shared", "single"}


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    """The generator, compiled."""
    try:
        return built(str(tmp_path_factory.mktemp("load")))
    except MissingError as exc:
        assert not os.environ.get("CI"), exc
        pytest.skip(str(exc))


def named(key: str) -> PoolImplementation:
    """Return an implementation by its key."""
    (found,) = (each for each in IMPLEMENTATIONS if each.key == key)
    return found


@pytest.fixture
def single(tmp_path: Path) -> Yields[Server, None, None]:
    """The least of the implementations, running."""
    server = Server(named("single"), str(tmp_path))
    try:
        yield server
    finally:
        server.close()


################################################################
# Processes
################################################################


@pytest.mark.parametrize(
    "implementation", [pytest.param(each, id=each.key) for each in IMPLEMENTATIONS]
)
def test_every_implementation_serves(
    implementation: PoolImplementation, generator: Generator, tmp_path: Path
) -> None:
    """Each installed implementation answers all connections, burning or not, and leaves nothing."""
    try:
        server = Server(implementation, str(tmp_path))
    except MissingError as exc:
        # What the benchmark needs beyond the tests may be missing here, but is named.
        assert "installed" in str(exc) or "has no pool" in str(exc)
        assert implementation.key not in ALWAYS
        return
    try:
        port, members = server.port, family(server.pid)
        assert len(members) >= implementation.workers
        closed = generator.run(port, burns=False, seconds=0.1, seed=1)
        opened = generator.run(port, burns=True, seconds=0.5, seed=1, rate=400)
        figures = observed(
            server, lambda: generator.run(port, burns=False, seconds=0.1, seed=2, rate=500)
        )
    finally:
        server.close()
    for measured in (closed, opened):
        check(measured)
        assert measured["answered"] == measured["begun"] == sum(measured["pids"].values())
        assert set(map(int, measured["pids"])) <= set(members)
    assert closed["burning"] == {"count": 0}
    assert abs(opened["burning"]["count"] - opened["begun"] / BURN_ONE_IN) <= 1
    # That of CPU, which takes at least as long on the clock.
    assert opened["burning"]["p50"] >= 0.05
    assert figures["cpu"] > 0
    assert not [pid for pid in members if os.path.exists(f"/proc/{pid}/exe")]


def test_the_same_seed_is_the_same_load(generator: Generator, single: Server) -> None:
    """Connections of an open loop begin at the same times, and as many burn, for each server."""
    one, two, other = (
        generator.run(single.port, burns=True, seconds=0.3, seed=seed, rate=300)
        for seed in (7, 7, 8)
    )
    assert (one["begun"], one["burning"]["count"]) == (two["begun"], two["burning"]["count"])
    assert other["begun"] != one["begun"]


def test_who_is_not_there_is_a_failure(generator: Generator, single: Server) -> None:
    """Connections that no process accepts are counted by what happened to them, and raised."""
    port = single.port
    single.close()
    measured = generator.run(port, burns=False, seconds=0.1, seed=1)
    assert measured["errors"]["refused"] == measured["begun"] > 0
    with pytest.raises(FailedError, match="refused"):
        check(measured)


def test_idle_connections_stand_and_go(generator: Generator, single: Server) -> None:
    """Idle connections are open while the load runs beside them, and closed after it."""
    check(generator.run(single.port, burns=False, seconds=0.1, seed=1))
    before = single.descriptors()
    with generator.crowd(single.port, 50) as measure:
        single.await_descriptors(before + 50)
        figures = observed(single, measure)
        assert figures["rate"] > 0
    single.await_descriptors(before)


def test_memory_is_that_of_a_new_parent(generator: Generator, tmp_path: Path) -> None:
    """What jobs in flight take is measured in a server of its own, which ends after it."""
    grown = growth(named("single"), str(tmp_path), generator, 100)
    assert abs(grown) < 100 * 100_000


@pytest.mark.parametrize("key", ["reuseport", "shared"])
def test_workers_end_with_their_parent(key: str, tmp_path: Path) -> None:
    """A parent leaves no process, even if it is killed."""
    server = Server(named(key), str(tmp_path))
    try:
        assert server.port
        members = family(server.pid)
        pidfds = [os.pidfd_open(pid) for pid in members]
        os.kill(server.pid, signal.SIGKILL)
    finally:
        server.close()
    assert len(members) == 5
    for pidfd in pidfds:
        # It is readable when the process has ended.
        assert select.select([pidfd], [], [], 60)[0]
        os.close(pidfd)


def test_who_fails_has_last_words(tmp_path: Path) -> None:
    """What has failed is said, and what the implementation said last."""
    server = Server(named("single"), str(tmp_path))
    assert server.port
    assert str(server.failed("dropped 3")) == "dropped 3: no output"


def test_processes_are_seen_from_outside() -> None:
    """A process has itself first in its family, and time and memory of its own."""
    assert family(os.getpid())[0] == os.getpid()
    assert cpu_seconds(os.getpid()) > 0
    assert private_bytes(os.getpid()) > 1_000_000


################################################################
# Findings
################################################################


def measured_of(pids: dict[str, int], **more: Any) -> dict[str, Any]:
    """Make what the generator prints: a tenth of a second's latency, for all."""
    answered = sum(pids.values())
    latency = {"count": answered, "p50": 0.1, "p99": 0.2}
    return {
        "seconds": 2,
        "took": 2,
        "in_time": answered,
        "answered": answered,
        "own_cpu": 0.5,
        "latency": latency,
        "light": latency,
        "burning": {"count": 0},
        "lateness": latency,
        "pids": pids,
        **more,
    }


def test_figures_count_everybody() -> None:
    """The skew counts workers that served nothing, and the time that of all processes."""
    measured = measured_of({"11": 300, "12": 100})
    before, after = {10: 1.0, 11: 1.0, 12: 1.0}, {10: 1.4, 11: 2.0, 12: 1.5, 13: 0.1}
    figures = figures_of(measured, 4, before, after)
    assert figures["rate"] == 200
    assert figures["skew"] == pytest.approx(3)
    assert figures["cpu"] == pytest.approx(2.0 / 400)
    assert figures["dispatcher cpu"] == pytest.approx(0.4 / 400)
    assert "burning p99" not in figures
    assert figures_of(measured_of({"10": 400}), 1, {10: 1}, {10: 2})["dispatcher cpu"] == 0


def test_arrivals_are_what_the_slowest_can_carry() -> None:
    """All get the same load, which is a share of what the slowest serves."""
    assert arrivals([9000, 5000, 7000], 0.6) == 3000


def test_what_others_disturbed_counts_less() -> None:
    """Of the turns those count in which others used the machine least, whatever their results."""
    turns = [
        {"a": {"rate": float(i), "others": others}, "b": {"rate": 5.0, "others": 0.01}}
        for i, others in enumerate((0.3, 0.0, 0.2, 0.1))
    ]
    assert disturbance(turns[0]) == 0.3
    assert by_name(least_disturbed(turns, 2), ["a"]) == {"a": {"rate": [1, 3], "others": [0, 0.1]}}
    assert disturbance({}) == 0


def result_of(**rates: float) -> dict[str, Any]:
    """Make a result in which each implementation had the same figures in each round."""
    names = {
        "ours": OURS,
        "node": NODE,
        "reuseport": REUSEPORT,
        "accepting": ACCEPTING,
        "shared": SHARED,
    }
    cases = {}
    for load in LOADS:
        values = {}
        for key, rate in rates.items():
            if load.idle is not None and key != "ours":
                continue
            figures = figures_of(measured_of({"1": 100, "2": 100}), 2, {1: 0, 2: 0}, {1: 1, 2: 1})
            figures |= {"rate": rate, "p99": 1 / rate, "light p99": 1 / rate, "others": 0.2}
            values[names[key]] = {figure: [value] * 3 for figure, value in figures.items()}
        if values:
            cases[load.title] = summary(load, 500.0 if load.is_open else None, values)
    result = {
        "machine": "a machine",
        "rounds": 3,
        "quick": True,
        "versions": {},
        "cases": cases,
        "memory": [1e6, 2e6, 4e6],
        "missing": {NODE: "node is not installed"},
        "failed": {},
        "notes": [],
    }
    # As it is read from a file.
    read: dict[str, Any] = json.loads(json.dumps(result))
    return read


def test_goals_are_judged() -> None:
    """A goal is met or missed by the figures of ours beside the other's, in the same run."""
    better = result_of(ours=6.0, node=4.0, reuseport=2.0, accepting=4.0, shared=4.0)
    assert [verdict.word for verdict in judge(better)] == ["met"] * 11
    worse = result_of(ours=2.0, node=2.0, reuseport=3.0, accepting=2.0, shared=4.0)
    assert [verdict.word for verdict in judge(worse)] == ["missed"] * 7 + ["met"] * 4


def test_who_did_not_run_is_not_judged() -> None:
    """Without ours nothing is met, and the others are compared with SO_REUSEPORT."""
    result = result_of(node=3.0, reuseport=6.0) | {"memory": []}
    assert {verdict.word for verdict in judge(result)} == {"not measured"}
    case = result["cases"][EVEN]
    assert case["reference"] == REUSEPORT
    assert case["implementations"][NODE]["ratio"]["median"] == pytest.approx(0.5)


def test_goals_are_about_what_is_measured() -> None:
    """Both sides of each goal name a load and an implementation that runs it."""
    titles = {load.title: load for load in LOADS}
    assert len(titles) == len(LOADS)
    names = {each.name for each in IMPLEMENTATIONS}
    for goal in GOALS:
        for title, name in (goal.over, goal.under):
            assert name in names
            assert titles[title].idle is None or name == OURS


def test_tables_are_whole() -> None:
    """The tables have each load, its rate, the goals, and the missing implementations."""
    result = result_of(ours=6.0, reuseport=2.0, accepting=4.0, shared=4.0)
    text = markdown(result)
    for title in (EVEN, EVEN_OPEN, UNEVEN_OPEN, beside(MANY)):
        assert f"<!-- begin {title} -->" in text
    assert f"{EVEN_OPEN}, 500 a second" in text
    assert "**missing**: node is not installed" in text
    assert "2.00 MB more with 10,000 jobs in flight" in text
    assert text.count("| met |") == 10
    assert text.count("not measured") == 1


def test_no_autogroup_restores_the_setting(tmp_path: Path) -> None:
    """It is off in the block, and then as before; one that may not be changed is noted."""
    setting = tmp_path / "sched_autogroup_enabled"
    with no_autogroup(setting) as note:
        assert note is None
    for before in "01":
        setting.write_text(before)
        with no_autogroup(setting) as note:
            assert note is None
            assert setting.read_text() == "0"
        assert setting.read_text() == before
    setting.unlink()
    # Nothing can be written to it, even by root.
    setting.symlink_to("/proc/self/cmdline")
    with no_autogroup(setting) as note:
        assert note is not None
        assert "same share" in note


def test_exit_on_sigterm_restores_the_setting(tmp_path: Path) -> None:
    """A benchmark that SIGTERM ends leaves its blocks, such as that of no_autogroup."""
    setting = tmp_path / "sched_autogroup_enabled"
    setting.write_text("1")
    before = signal.getsignal(signal.SIGTERM)
    exit_on_sigterm()
    try:
        with pytest.raises(SystemExit) as caught, no_autogroup(setting):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 128 + signal.SIGTERM
    assert setting.read_text() == "1"


def test_what_disturbed_is_noted() -> None:
    """That others used the machine is said, and that the generator had no time left."""
    notes = notes_of(result_of(ours=6.0))
    assert f"{EVEN}: others took 20% of this machine meanwhile" in notes
    result = result_of(ours=6.0)
    result["cases"][EVEN]["implementations"][OURS]["figures"]["generator share"] = [0.97] * 3
    assert any("limited by the generator" in note for note in notes_of(result))
