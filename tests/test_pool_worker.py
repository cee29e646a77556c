"""A worker whose pool is the test: what it says, and what it does when it is told nonsense."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from helpers import kind_of
from pools import ends, lines

from trio_unixconn import WorkerStartError
from trio_unixconn._frames import Frame, FrameDecoder, encode_frame
from trio_unixconn.pool import _process, _protocol, _worker
from trio_unixconn.pool._completion_log import CompletionLog, create_log
from trio_unixconn.pool._endpoints import EndpointKind
from trio_unixconn.pool._handle import HandleState, WorkerHandle
from trio_unixconn.pool._statistics import Counters

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_child_left")

HOLD = "pool_handlers:hold"
DO = "pool_handlers:do"


@attrs.define
class Puppet:
    """A worker, and what it has said that nobody has looked at."""

    process: _process.WorkerProcess
    _decoder: FrameDecoder = attrs.field(factory=FrameDecoder)
    _said: list[Frame] = attrs.field(factory=list[Frame])

    async def tell(self, data: bytes, fds: list[int] | None = None) -> None:
        await self.process.conn.send_message(data, fds=fds or [])

    async def hear(self, kind: int) -> bytes:
        """Return the body of the next frame of a kind."""
        with trio.fail_after(30):
            while True:
                for each in self._said:
                    if each.kind == kind:
                        self._said.remove(each)
                        return each.body
                data = await self.process.conn.receive_some()
                assert data, "the worker is gone"
                self._said += self._decoder.feed(data, [])


@asynccontextmanager
async def puppet(handler: str, beat: float = 1.0) -> AsyncGenerator[Puppet, None]:
    """Start a worker, which is ready."""
    process = _process.start({"handler": handler, "setup": None, "log": 10, "beat": beat})
    worker = Puppet(process)
    try:
        await worker.hear(_protocol.READY)
        yield worker
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        process.close()


def job(number: int, kind: int = EndpointKind.NONE, data: bytes = b"") -> _protocol.SentJob:
    return _protocol.SentJob(number, kind, wants_answer=True, data=data)


async def test_a_conversation() -> None:
    """A worker acknowledges a batch, asks for more, answers, and ends when it is asked to."""
    async with puppet(DO, beat=0.05) as worker:
        await worker.hear(_protocol.BEAT)
        await worker.tell(
            _protocol.pack_jobs(1, [job(7), job(8, data=b"raise")], carries_fds=False)
        )
        assert _protocol.unpack_batch_id(await worker.hear(_protocol.TAKEN)) == 1
        assert await worker.hear(_protocol.MORE) == b""
        assert _protocol.unpack_job_result(await worker.hear(_protocol.ANSWER)) == (
            7,
            b"nothing to do",
        )
        number, text = _protocol.unpack_job_result(await worker.hear(_protocol.ERROR))
        assert (number, b"RuntimeError" in text) == (8, True)
        os.kill(worker.process.pid, signal.SIGTERM)
        assert await worker.hear(_protocol.LEAVING) == b""
        await worker.tell(_protocol.pack_seconds(_protocol.DRAIN, 5))
        assert await worker.process.wait() == 0
        # Once more is known already.
        assert await worker.process.wait() == 0


async def test_cancelling_what_is_not_there(shared: Path) -> None:
    """A cancellation of a job that has ended, or never was, is nothing; of another, it is."""
    async with puppet(DO) as worker:
        await worker.tell(_protocol.pack_jobs(1, [job(1, data=b"forever")], carries_fds=False))
        await worker.tell(_protocol.pack_job_ids(_protocol.CANCEL, [99, 1]))
        number, text = _protocol.unpack_job_result(await worker.hear(_protocol.ERROR))
        assert (number, text) == (1, b"the handler was cancelled, because the call was")
        await worker.tell(_protocol.pack_seconds(_protocol.DRAIN, 0))
        assert await worker.process.wait() == 0


async def test_nonsense(capfd: pytest.CaptureFixture[str]) -> None:
    """A worker that is told what no pool says ends, and says why."""
    async with puppet(DO) as worker:
        await worker.tell(encode_frame(99))
        assert await worker.process.wait() == 1
    assert "ProtocolError: a frame of kind 99 came" in capfd.readouterr().err


async def test_the_pool_is_gone_with_what_was_said(shared: Path) -> None:
    """A pool that is gone with words unread is as gone as any."""
    async with puppet(HOLD, beat=0.01) as worker:
        client, theirs = ends()
        async with client.stream:
            with theirs:
                await worker.tell(
                    _protocol.pack_jobs(1, [job(1, EndpointKind.UNIX)], carries_fds=True),
                    [theirs.fileno()],
                )
            await client.line()
            await trio.lowlevel.wait_readable(worker.process.conn.socket)
            await worker.process.conn.aclose()
            assert await client.read() == b""
        assert await worker.process.wait() == 0
    assert lines(shared / "cancelled") == ["1"]


async def test_the_pool_is_gone_before_it_is_told(shared: Path) -> None:
    """A job that the pool cannot be told is taken is not handled, and its descriptor closed."""
    async with puppet(HOLD) as worker:
        os.kill(worker.process.pid, signal.SIGSTOP)
        client, theirs = ends()
        async with client.stream:
            with theirs:
                await worker.tell(
                    _protocol.pack_jobs(1, [job(1, EndpointKind.UNIX)], carries_fds=True),
                    [theirs.fileno()],
                )
            await worker.process.conn.aclose()
            os.kill(worker.process.pid, signal.SIGCONT)
            assert await client.read() == b""
        assert await worker.process.wait() == 0
    assert lines(shared / "began") == []


def test_watching_without_a_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a process cannot be held on to, the other end of the socket says when it is gone."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs, pytest.raises(SystemExit):
        _worker._watch(theirs, None)
    assert _worker._pidfd_of(2**22 + 1) is None
    monkeypatch.delattr(os, "pidfd_open")
    assert _worker._pidfd_of(os.getpid()) is None


def test_not_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel tells of a parent's death, nothing is asked of it."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(_worker, "ctypes")
    _worker._end_with_parent()


def test_endings() -> None:
    """How a process ended has a name, if there is one."""
    assert _process.describe_exit(3) == "exited with status 3"
    assert _process.describe_exit(-9) == "was killed by SIGKILL"
    assert _process.describe_exit(-99) == "was killed by signal 99"


async def test_ready_too_late() -> None:
    """A worker that is ready when it was asked to leave was not ready."""
    process = _process.start({"handler": DO, "setup": None, "log": 1, "beat": 1.0})

    class Owner:
        def on_exit(self, link: WorkerHandle) -> None: ...

    owner: Any = Owner()
    link = WorkerHandle(0, process, owner, Counters())
    link.drain(0)
    with trio.fail_after(30):
        await link.run()
    assert isinstance(link.error, WorkerStartError)
    assert link.ready.is_set()
    # There is nobody to ask any more.
    link.drain(0)
    assert link.state is HandleState.ENDED


################################################################
# What outlives a worker
################################################################


@pytest.mark.parametrize("lacking", [None, "memfd_create"])
def test_board(lacking: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is noted on one map of a board is seen on another, the last ones."""
    if lacking is not None:
        monkeypatch.delattr(os, lacking)
    fd = create_log(3)
    assert kind_of(fd) == "-"
    one, two = CompletionLog(fd), CompletionLog(fd)
    os.close(fd)
    for number in 1, 2, 3, 4:
        one.add(number)
    assert two.entries() == {2, 3, 4}
    for board in one, two, two:
        board.close()


def test_no_room_for_a_board() -> None:
    """A board that is larger than can be is an error, and nothing is left open."""
    with pytest.raises(OverflowError):
        create_log(2**60)
