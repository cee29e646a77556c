"""The status of a server: rates out of samples, and a table for 80 columns."""

from __future__ import annotations

import io

import attrs
from rich.console import Console

from tests._helpers.statistics_samples import STATISTICS, worker
from trio_unixconn._cli.serve.status import Sample, Sampler, Status
from trio_unixconn._cli.serve.table import render


def sample(time: float, *handled: int, accepted: int = 0, gone: int = 0) -> Sample:
    """Make one of workers with the pids 100, 101 and so on, from ``gone`` on."""
    workers = tuple(
        worker(number, 100 + gone + number, handled=each) for number, each in enumerate(handled)
    )
    pool = attrs.evolve(STATISTICS, workers=workers, handled=sum(handled) + 1000 * gone)
    return Sample(time, pool, accepted, 0)


################################################################
# Rates
################################################################


def test_sampler_first_sample_has_no_rates() -> None:
    """The first sample has no rates, because there is none before it."""
    status = Sampler().take(sample(10, 500, accepted=700))
    assert [each.rate for each in status.rows] == [0]
    assert (status.accepted_rate, status.handled_rate) == (0, 0)
    assert status.memory == 5 << 20


def test_sampler_rates_are_per_second() -> None:
    """Counts are divided by the time between the samples, whatever that is."""
    sampler = Sampler()
    sampler.take(sample(10, 0, 100, accepted=0))
    status = sampler.take(sample(12, 10, 100, accepted=50))
    assert [each.rate for each in status.rows] == [5, 0]
    assert (status.accepted_rate, status.handled_rate) == (25, 5)


def test_sampler_rates_of_the_last_seconds() -> None:
    """Samples before the window do not count."""
    sampler = Sampler()
    for time in range(20):
        status = sampler.take(sample(time, 100 * time))
        assert status.rows[0].rate == (100 if time else 0)
    for time in range(20, 30):
        status = sampler.take(sample(time, 1900))
    assert status.rows[0].rate == 0
    assert len(sampler._samples) == 6


def test_sampler_of_a_new_worker() -> None:
    """The count of a new worker starts at 0; that of the old one is not subtracted."""
    sampler = Sampler()
    sampler.take(sample(0, 1000))
    status = sampler.take(sample(2, 10, gone=1))
    assert status.rows[0].rate == 5
    assert status.handled_rate == 5


def test_sampler_of_two_samples_at_one_time() -> None:
    """Nothing is divided by zero."""
    sampler = Sampler()
    sampler.take(sample(0, 0))
    assert sampler.take(sample(0, 10)).rows[0].rate == 0


################################################################
# The table
################################################################


def shown(status: Status, *, drains: bool = False, uptime: float = 59.9, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    with console.capture() as capture:
        console.print(
            render(
                status,
                title="app:handler",
                addresses=["tcp:127.0.0.1:8000", "unix:" + "x" * 100],
                uptime=uptime,
                drains=drains,
            )
        )
    return capture.get()


def big() -> Status:
    """Return a status with the largest numbers that one may meet."""
    workers = tuple(
        attrs.evolve(
            worker(63, 4194304, state), in_flight=65535, handled=10**9, memory=2**36, restarts=9999
        )
        for state in ("ready", "draining", "starting")
    )
    pool = attrs.evolve(
        STATISTICS, workers=workers, queued=10**5, in_flight=10**5, handled=10**10, failed=10**6
    )
    sampler = Sampler()
    before = attrs.evolve(pool, workers=(attrs.evolve(workers[0], handled=999 * 10**6),))
    sampler.take(Sample(0, before, 0, 0))
    return sampler.take(Sample(1, pool, 10**9, 10**9))


def test_80_columns() -> None:
    """Nothing is cut or folded in 80 columns, even with large numbers."""
    text = shown(big())
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "app:handler, up 0:00:59" in lines[0]
    assert "tcp:127.0.0.1:8000" in lines[1]
    for part in (
        *("queued 100,000", "in flight 100,000", "handled 10,000,000,000 (0.0/s)"),
        *("accepted 1,000,000,000 (1,000,000,000/s)", "denied 1,000,000,000"),
        *("failed 1,000,000", "abandoned 2", "rejected 4", "deaths 8", "retried 5", "restarts 7"),
    ):
        assert part in text
    rows = [line.split() for line in lines if "4194304" in line]
    assert rows[0] == [
        *("63", "4194304", "ready", "65,535", "1,000,000,000", "1,000,000"),
        *("9999", "65,536", "MiB"),
    ]
    assert [row[2] for row in rows] == ["ready", "draining", "starting"]


def test_a_worker_that_has_no_memory_any_more() -> None:
    """While draining, an exited worker is not shown as starting; unknown values are a dash."""
    gone = attrs.evolve(worker(0, 100, "starting"), memory=0)
    pool = attrs.evolve(STATISTICS, workers=(gone,))
    text = shown(Sampler().take(Sample(0, pool, 0, 0)), drains=True, uptime=100_000)
    assert "app:handler, draining, up 1 d 3:46:40" in text
    row = next(line.split() for line in text.splitlines() if " 100 " in line)
    assert row == ["0", "100", "ended", "1", "20", "0.0", "4", "-"]
    assert "memory -" in text
