"""Receiving in a conversation: the processor is given to the peer once before a wait."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from trio_unixconn import ConnectionBrokenError, UnixConnection, _processor, connection_pair

FIRST = _processor.INITIAL_INTERVAL


@attrs.define
class FakeProcessor:
    """A processor on which the peer does something when it is given away.

    Attributes:
      yields: how often it was given away.
      now: the time, in seconds.
      lasts: how long a yield takes, in seconds.
      meanwhile: what the peer does.
    """

    yields: int = 0
    now: float = 1000.0
    lasts: float = 0.0
    meanwhile: Callable[[], Any] = lambda: None

    def sched_yield(self) -> None:
        """Stand in for os.sched_yield."""
        self.yields += 1
        self.now += self.lasts
        self.meanwhile()


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> FakeProcessor:
    """A fake processor, in a process that has not yielded yet."""
    fake = FakeProcessor()
    monkeypatch.setattr(_processor, "sched_yield", fake.sched_yield)
    monkeypatch.setattr(_processor, "clock", lambda: fake.now)
    monkeypatch.setattr(_processor.Pause, "end", 0.0)
    monkeypatch.setattr(_processor.Pause, "length", 0.0)
    return fake


async def converse(conn: UnixConnection, peer: UnixConnection, waits: int) -> None:
    """Have ``conn`` wait this often for a byte that ``peer`` sends when all tasks are blocked."""

    async def answer() -> None:
        for _ in range(waits):
            await wait_all_tasks_blocked()
            await peer.send_all(b"x")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        for _ in range(waits):
            assert await conn.receive_some(1) == b"x"


async def test_receive_some_yields_in_a_conversation(processor: FakeProcessor) -> None:
    """After the first waits, what arrives during a yield is received without a wait."""
    one, two = connection_pair()
    async with one, two:
        await converse(one, two, FIRST)
        assert processor.yields == 0
        processor.meanwhile = lambda: two.socket._sock.send(b"y")  # type: ignore[attr-defined]
        for _ in range(3):
            with assert_checkpoints():
                assert await one.receive_some(1) == b"y"
        assert processor.yields == 3
        buffer = bytearray(1)
        assert await one.receive_into(buffer) == 1
        assert buffer == b"y"


async def test_receive_some_yields_less_often_in_vain(processor: FakeProcessor) -> None:
    """Each yield in vain doubles the number of waits until the next; one that was not halves it."""
    one, two = connection_pair()
    async with one, two:
        await converse(one, two, FIRST + 1)
        assert processor.yields == 1
        await converse(one, two, 2 * FIRST)
        assert processor.yields == 1
        await converse(one, two, 1)
        assert processor.yields == 2
        await converse(one, two, 4 * FIRST)
        processor.meanwhile = lambda: two.socket._sock.send(b"y")  # type: ignore[attr-defined]
        await one.receive_some(1)
        processor.meanwhile = lambda: None
        await converse(one, two, 1 + 4 * FIRST)
        assert processor.yields == 4
        await converse(one, two, 1)
        assert processor.yields == 5


async def test_receive_some_reports_an_error_after_a_yield(processor: FakeProcessor) -> None:
    """An error that the kernel reports after a yield is raised as it is without one."""
    one, two = connection_pair()
    async with one, two:
        await converse(one, two, FIRST)
        await one.send_all(b"unread")
        processor.meanwhile = two.socket.close
        with assert_checkpoints(), pytest.raises(ConnectionBrokenError):
            await one.receive_some(1)
        assert processor.yields == 1


def test_yield_once_pauses_on_a_busy_processor(processor: FakeProcessor) -> None:
    """After a slow yield there is a pause, which doubles if the processor is still busy then."""
    processor.lasts = 2 * _processor.LIMIT
    pause = _processor.INITIAL_PAUSE
    for expected in (pause, 2 * pause, 4 * pause):
        assert _processor.yield_once()
        processor.now += expected / 2
        assert not _processor.yield_once()
        assert _processor.Pause.length == pytest.approx(expected)
        processor.now = _processor.Pause.end
    for _ in range(20):
        processor.now = _processor.Pause.end
        assert _processor.yield_once()
    assert _processor.Pause.length == _processor.MAX_PAUSE
    processor.now += 3 * _processor.MAX_PAUSE
    assert _processor.yield_once()
    processor.now = _processor.Pause.end
    processor.lasts = 0
    assert _processor.yield_once()
    assert _processor.yield_once()


def test_yield_once_without_sched_yield(
    processor: FakeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no yield is known to help, there is none."""
    monkeypatch.setattr(_processor, "sched_yield", None)
    assert not _processor.yield_once()
    assert processor.yields == 0


@pytest.mark.skipif(sys.platform != "linux", reason="os.sched_yield is used on Linux")
def test_yield_once_calls_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one returns, whether or not another process wants to run."""
    monkeypatch.setattr(_processor.Pause, "end", 0.0)
    monkeypatch.setattr(_processor.Pause, "length", 0.0)
    assert _processor.yield_once()
