"""What a generation does so that its successor can start while all processors are busy."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio

from tests._helpers.waiting import until
from trio_unixconn import open_unix_connection
from trio_unixconn._frames import close_frames
from trio_unixconn.handover import _processor, _protocol as of, open_generation
from trio_unixconn.handover._channel import Channel
from trio_unixconn.handover._processor import MAX_PAUSE, TRIALS, Pauses, ProcessorTime

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

STEP = 0.02


class Steps:
    """Calls Pauses.update every 20 ms."""

    def __init__(self, processors: int) -> None:
        self.pauses = Pauses(processors)
        self.now = 100.0

    def update(self, count: int, ran: float, waited: float) -> list[bool]:
        """Return whether there was a pause after each step."""
        found = []
        for _ in range(count):
            self.now += STEP
            found.append(self.pauses.update(self.now, STEP, ran * STEP, waited * STEP))
        return found


def test_pauses_none_for_enough_time() -> None:
    """There is no pause for a successor that runs, sleeps, or gets half of what it could use."""
    steps = Steps(2)
    assert not any(steps.update(100, 1, 0))
    assert not any(steps.update(100, 0, 0))
    assert not any(steps.update(100, 0.5, 0.5))
    # Its workers wait for each other.
    assert not any(steps.update(100, 2, 6))
    assert steps.pauses.count == 0


def test_pauses_until_caught_up() -> None:
    """A pause begins when the successor waits, and ends when it has caught up."""
    steps = Steps(1)
    assert steps.update(1, 0.1, 0.9) == [False]
    while not steps.update(1, 0.1, 0.9)[0]:
        pass
    began = steps.now
    while steps.update(1, 1, 0)[0]:
        pass
    assert 0 < steps.now - began <= MAX_PAUSE
    assert steps.pauses.count == 1


def test_pauses_for_half_of_the_time() -> None:
    """A successor that does not catch up leaves half of the time for accepting."""
    steps = Steps(1)
    found = [False]
    for _ in range(1000):
        found += steps.update(1, 0.3 if found[-1] else 0.1, 0.6)
    assert 0.4 < sum(found) / len(found) < 0.6
    lengths = lengths_of(found)
    assert max(length for paused, length in lengths if paused) <= MAX_PAUSE / STEP + 1


@pytest.mark.parametrize("ran", [0, 0.1])
def test_pauses_end_if_they_do_not_help(ran: float) -> None:
    """A successor that gets no more in pauses, because others are busy, is given no more pauses."""
    steps = Steps(1)
    assert any(steps.update(1000, ran, 0.9))
    assert steps.pauses.count == TRIALS
    assert not any(steps.update(1000, ran, 0.9))


def lengths_of(values: Sequence[bool]) -> Iterator[tuple[bool, int]]:
    """Return each value and for how many steps it stays."""
    began = 0
    for index in range(1, len(values) + 1):
        if index == len(values) or values[index] != values[began]:
            yield values[began], index - began
            began = index


def write(proc: Path, pid: int, ran: int, waited: int, children: str = "") -> None:
    """Write what proc(5) says of a process, in seconds."""
    task = proc / str(pid) / "task" / str(pid)
    task.mkdir(parents=True, exist_ok=True)
    (task / "children").write_text(children)
    times = proc / str(pid) / "schedstat"
    # A reader sees the old numbers or the new ones.
    times.with_suffix(".new").write_text(f"{ran * 10**9} {waited * 10**9} 7\n")
    times.with_suffix(".new").rename(times)


def test_processor_time_of_process_and_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the time since the last look, of a process and the children that it has now."""
    monkeypatch.setattr(_processor, "PROC", str(tmp_path))
    time = ProcessorTime(10)
    assert time.take() == (0, 0)
    write(tmp_path, 10, 1, 2)
    assert time.take() == (1, 2)
    write(tmp_path, 10, 2, 2, "11 12 ")
    write(tmp_path, 11, 3, 4)
    assert time.take() == (4, 4)
    (tmp_path / "11/schedstat").write_text("no numbers")
    assert time.take() == (0, 0)


def test_processor_time_of_this_system() -> None:
    """What the system tells of a process has the expected form."""
    if not os.path.exists("/proc/self/schedstat"):
        pytest.skip("the kernel has no scheduler statistics")
    ran, waited = ProcessorTime(os.getpid()).take()
    assert ran > 0
    assert waited >= 0


async def test_upgrade_pauses_for_a_starved_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients are accepted between the pauses, and after the successor is prepared."""
    monkeypatch.setattr(_processor, "PROC", str(tmp_path / "proc"))
    write(tmp_path / "proc", os.getpid(), 0, 0)

    async def starve() -> None:
        ran = waited = 0
        while True:
            await trio.sleep(0.005)
            waited += 1
            ran += web.gate.is_paused
            write(tmp_path / "proc", os.getpid(), ran, 3 * waited)

    with trio.fail_after(60):
        async with (
            open_generation(tmp_path / "upgrade", name="x") as gen,
            trio.open_nursery() as nursery,
        ):
            web = await gen.listen_unix("web", tmp_path / "web")
            await gen.ready()
            nursery.start_soon(accept_all, web)
            await expect_answer(tmp_path / "web")
            assert not web.gate.is_paused
            channel = Channel(await open_unix_connection(tmp_path / "upgrade"))
            try:
                await channel.send(of.pack_hello("x"))
                nursery.start_soon(starve)
                for _ in range(2):
                    await until(lambda: web.gate.is_paused)
                    # One that arrives in a pause is not refused.
                    await expect_answer(tmp_path / "web")
                for _ in range(2):
                    frame = await channel.receive()
                    assert frame is not None
                    close_frames([frame])
                await channel.send(of.pack_id(of.TAKEN, 0))
                await until(lambda: web.gate.is_paused)
                await channel.send(of.pack_text(of.FAILED, "no"))
                await until(lambda: gen.phase.value == "serving")
                assert not web.gate.is_paused
                await expect_answer(tmp_path / "web")
            finally:
                channel.close()
            nursery.cancel_scope.cancel()


async def accept_all(listener: trio.abc.Listener[trio.abc.Stream]) -> None:
    """Answer clients."""
    while True:
        async with await listener.accept() as stream:
            await stream.send_all(b"x")


async def expect_answer(path: Path) -> None:
    """Connect, and wait for an answer."""
    async with await open_unix_connection(path) as conn:
        assert await conn.receive_some() == b"x"
