"""A worker whose pool is the test: what it sends, and what it does with unexpected frames."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import struct
import sys
import time
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import Mock

import attrs
import pytest
import trio
import trio.testing

from tests._helpers.pool import ends, lines
from tests._helpers.pool_handlers import note
from tests._helpers.waiting import until
from trio_unixconn import (
    ConnectionClosedError,
    SendError,
    WorkerStartError,
    connection_pair,
    testing,
)
from trio_unixconn._frames import Frame, FrameDecoder, encode_frame
from trio_unixconn._version import __version__
from trio_unixconn.pool import _process, _protocol, _worker
from trio_unixconn.pool._endpoints import EndpointKind
from trio_unixconn.pool._handle import HandleState, WorkerHandle
from trio_unixconn.pool._job import PassedOn, close_stream
from trio_unixconn.pool._statistics import Counters
from trio_unixconn.pool._worker_config import WorkerConfig

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from trio_unixconn.pool import Job

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_child_left")]

HOLD = "tests._helpers.pool_handlers:hold"
DO = "tests._helpers.pool_handlers:do"


@attrs.define
class Puppet:
    """A worker, and the frames from it that no test has looked at."""

    process: _process.WorkerProcess
    _decoder: FrameDecoder = attrs.field(factory=FrameDecoder)
    _frames: list[Frame] = attrs.field(factory=list[Frame])

    async def send(self, data: bytes, fds: list[int] | None = None) -> None:
        await self.process.conn.send_message(data, fds=fds or [])

    async def send_jobs(self, batch: int, *jobs: _protocol.SentJob, fds: list[int]) -> None:
        await self.send(_protocol.pack_jobs(batch, jobs, carries_fds=bool(fds)), fds)

    async def drain(self, timeout: float = 5) -> None:
        """Have it exit."""
        await self.send(_protocol.pack_drain(timeout, is_replaced=False))
        with trio.fail_after(30):
            assert await self.process.wait() == 0

    async def receive(self, kind: int) -> bytes:
        """Return the body of the next frame of a kind."""
        with trio.fail_after(30):
            while True:
                for each in self._frames:
                    if each.kind == kind:
                        self._frames.remove(each)
                        return each.body
                data = await self.process.conn.receive_some()
                assert data, "the worker has exited"
                self._frames += self._decoder.feed(data, [])

    async def receive_error(self) -> tuple[int, str]:
        """Return the id of the next job that failed, and why."""
        job_id, text = _protocol.unpack_job_result(await self.receive(_protocol.ERROR))
        return job_id, text.decode()


@asynccontextmanager
async def puppet(handler: str, **options: Any) -> AsyncGenerator[Puppet, None]:
    """Start a worker that is ready."""
    options = {"log_size": 10, **options}
    process = _process.start(WorkerConfig(handler, sys.executable, **options))
    worker = Puppet(process)
    try:
        await worker.receive(_protocol.READY)
        yield worker
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        process.close()


def job(number: int, kind: int = EndpointKind.NONE, data: bytes = b"") -> _protocol.SentJob:
    return _protocol.SentJob(number, kind, wants_answer=True, passed=0, data=data)


async def test_run_worker_logs_answered_calls() -> None:
    """A call is in the completion log before its answer is sent, in case that is lost."""
    async with puppet(DO) as worker:
        await worker.send_jobs(1, job(7), fds=[])
        await worker.receive(_protocol.ANSWER)
        assert worker.process.log.entries() == {0, 7}


async def test_run_worker_exchanges_frames() -> None:
    """A worker acknowledges a batch, asks for more, answers, and exits when it is drained."""
    async with puppet(DO, heartbeat_interval=0.05) as worker:
        await worker.receive(_protocol.BEAT)
        await worker.send_jobs(2**40, job(7), job(8, data=b"raise"), fds=[])
        assert _protocol.unpack_batch_id(await worker.receive(_protocol.TAKEN)) == 2**40
        assert await worker.receive(_protocol.MORE) == b""
        assert _protocol.unpack_job_result(await worker.receive(_protocol.ANSWER)) == (
            7,
            b"nothing to do",
        )
        number, text = await worker.receive_error()
        assert (number, "RuntimeError" in text) == (8, True)
        os.kill(worker.process.pid, signal.SIGTERM)
        assert await worker.receive(_protocol.LEAVING) == b""
        await worker.drain()
        assert worker.process.log.entries() >= {8}
        # Its status is known already.
        assert await worker.process.wait() == 0


async def test_watch_sigterm_right_after_ready() -> None:
    """A SIGTERM at any time after READY does not kill a worker, but has it say LEAVING."""
    for _ in range(5):
        async with puppet(DO) as worker:
            os.kill(worker.process.pid, signal.SIGTERM)
            assert await worker.receive(_protocol.LEAVING) == b""
            await worker.drain()


async def test_run_worker_sends_its_versions() -> None:
    """READY says which protocol and which version of the package the worker has."""
    process = _process.start(WorkerConfig(DO, sys.executable))
    worker = Puppet(process)
    versions = json.loads(await worker.receive(_protocol.READY))
    assert versions == {"protocol": _protocol.PROTOCOL_VERSION, "version": __version__}
    await worker.drain()
    process.close()


async def test_run_worker_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of another version says so before it reads a configuration that it may not know."""
    encode = WorkerConfig.encode

    def encode_newer(config: WorkerConfig) -> bytes:
        line, _, data = encode(config).partition(b"\n")
        message = {**json.loads(line), "version": "99.0", "config": {"unknown": 1}}
        return json.dumps(message).encode() + b"\n" + data

    monkeypatch.setattr(WorkerConfig, "encode", encode_newer)
    process = _process.start(WorkerConfig(DO, sys.executable))
    worker = Puppet(process)
    assert json.loads(await worker.receive(_protocol.READY))["version"] == __version__
    with trio.fail_after(30):
        assert await process.wait() == 1
    process.close()


async def test_cancel_frame_for_unknown_job(shared: Path) -> None:
    """A cancellation of a job that has ended, or never was, has no effect; of another, it has."""
    async with puppet(DO, handler_timeout=1000) as worker:
        await worker.send_jobs(1, job(1, data=b"forever"), fds=[])
        await worker.send(_protocol.pack_job_ids(_protocol.CANCEL, [99, 1]))
        assert await worker.receive_error() == (
            1,
            "handler was cancelled because its call was cancelled",
        )
        await worker.drain(0)


async def test_drain_frame_refuses_later_batches(shared: Path) -> None:
    """A batch that arrives after DRAIN is refused, and the file descriptors in it are closed."""
    async with puppet(HOLD) as worker:
        held, other = ends()
        late, theirs = ends()
        async with held.stream, late.stream:
            with other, theirs:
                await worker.send_jobs(1, job(1, EndpointKind.UNIX), fds=[other.fileno()])
                await held.line()
                await worker.send(_protocol.pack_drain(30, is_replaced=True))
                await worker.send_jobs(2, job(2, EndpointKind.UNIX), fds=[theirs.fileno()])
                await worker.send_jobs(3, job(3), fds=[])
            for batch in 2, 3:
                refused = await worker.receive(_protocol.REFUSED)
                assert _protocol.unpack_batch_id(refused) == batch
            assert await late.read() == b""
            # The one from before is handled to its end.
            await held.end()
            assert _protocol.unpack_job_result(await worker.receive(_protocol.ANSWER)) == (
                1,
                b"held",
            )
            with trio.fail_after(30):
                assert await worker.process.wait() == 0
    assert lines(shared / "began") == ["1"]


@pytest.mark.parametrize("count", [0, 2])
async def test_jobs_frame_with_wrong_number_of_fds(
    count: int, shared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A batch whose jobs and file descriptors do not match is a protocol error; none is handled."""
    async with puppet(HOLD) as worker:
        client, theirs = ends()
        async with client.stream:
            with theirs:
                await worker.send_jobs(1, job(1, EndpointKind.UNIX), fds=[theirs.fileno()] * count)
            with trio.fail_after(30):
                assert await worker.process.wait() == 1
    assert "ProtocolError" in capfd.readouterr().err
    assert lines(shared / "began") == []


async def test_handle_frame_of_unknown_kind(capfd: pytest.CaptureFixture[str]) -> None:
    """A worker that gets a frame of an unknown kind exits with an error."""
    async with puppet(DO) as worker:
        await worker.send(encode_frame(99))
        with trio.fail_after(30):
            assert await worker.process.wait() == 1
    assert "ProtocolError: unexpected frame of kind 99" in capfd.readouterr().err


@pytest.mark.parametrize("ends_with", ["STOP", "ACCEPT", "lost"])
async def test_sockets_frames_without_their_accept(
    ends_with: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker closes the first sockets of an ACCEPT that is not sent, or was lost."""
    worker = _worker._Worker.__new__(_worker._Worker)
    reports: list[bytes] = []
    monkeypatch.setattr(worker, "_report", reports.append)
    worker._sockets, worker._accepting = [], None
    handlers = Mock()
    (ours, theirs), (log, log_end) = socket.socketpair(), socket.socketpair()
    with ours, log:
        sockets = Frame(_protocol.SOCKETS, b"", [theirs.detach()])
        await worker._handle_frame(handlers, sockets)
        if ends_with == "STOP":
            log_end.close()
            await worker._handle_frame(handlers, Frame(_protocol.STOP, b"", []))
            assert reports == [encode_frame(_protocol.STOPPED)]
        else:
            fds = None if ends_with == "ACCEPT" else [log_end.detach()]
            if fds is None:
                log_end.close()
            else:
                await worker._handle_frame(handlers, Frame(_protocol.SOCKETS, b"", None))
            await worker._handle_frame(handlers, Frame(_protocol.ACCEPT, b"", fds))
            assert reports == [_protocol.pack_starved(has_sockets=False)]
        for end in ours, log:
            end.settimeout(30)
            assert end.recv(1) == b""
    assert worker._sockets == []


async def test_run_worker_sends_what_is_queued_while_it_sends() -> None:
    """What a worker has to say while its pool does not read is sent when the pool reads again."""
    log, group = cast("Any", Mock()), cast("Any", Mock())
    one, two = connection_pair()
    async with one, two, trio.open_nursery() as nursery:
        worker = _worker._Worker(one, log, WorkerConfig(DO, sys.executable), None, None, group)
        junk = testing.clog(one)
        nursery.start_soon(worker._flush_loop)
        await trio.testing.wait_all_tasks_blocked()
        frames = [_protocol.pack_job_result(_protocol.ERROR, number, b"") for number in (1, 2)]
        for frame in frames:
            # The first one is being sent when the second one is queued.
            worker._report(frame)
            await trio.testing.wait_all_tasks_blocked()
        await testing.unclog(two, junk)
        data = b""
        with trio.fail_after(30):
            while len(data) < len(b"".join(frames)):
                data += await two.receive_some()
        assert data == b"".join(frames)
        nursery.cancel_scope.cancel()


async def test_stop_frame_without_listeners() -> None:
    """A worker that has no listening sockets says that it has stopped accepting."""
    async with puppet(DO) as worker:
        await worker.send(encode_frame(_protocol.STOP))
        assert await worker.receive(_protocol.STOPPED) == b""
        await worker.drain()


################################################################
# What handlers raise
################################################################


def make_cancelled() -> BaseException:
    """Return trio's Cancelled, as no cancel scope has raised it."""
    try:
        cancelled: BaseException = trio.Cancelled._create()
    except TypeError:
        # Later versions want to know why.
        cancelled = trio.Cancelled._create(source="unknown")
    return cancelled


class UnprintableError(Exception):
    """Its traceback cannot be formatted."""

    @property
    def __notes__(self) -> list[str]:  # type: ignore[override]
        raise SystemExit(3)

    def __str__(self) -> str:
        raise SystemExit(4)


RAISED: dict[bytes, Callable[[], BaseException]] = {
    b"SystemExit": lambda: SystemExit(3),
    b"GeneratorExit": GeneratorExit,
    b"KeyboardInterrupt": KeyboardInterrupt,
    b"CancelledError": asyncio.CancelledError,
    b"StopAsyncIteration": StopAsyncIteration,
    b"BaseException": BaseException,
    b"MemoryError": MemoryError,
    b"BaseExceptionGroup": lambda: BaseExceptionGroup("several", [SystemExit(3), ValueError()]),
    b"UnprintableError": UnprintableError,
    # Not one of the worker's own scopes.
    b"Cancelled": make_cancelled,
}


async def raise_it(stream: object, job: Job) -> bytes:
    """Raise what the data says; a worker runs this."""
    make = RAISED.get(job.data)
    if make is not None:
        raise make()
    if job.data == b"exit in a nursery":
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raise_exit)
    if job.data == b"long":
        raise ValueError("x" * 1_000_000)
    if job.data == b"wait":
        note("began", job.id)
        await trio.sleep_forever()
    if job.data == b"wait and raise":
        note("began", job.id)
        try:
            await trio.sleep_forever()
        finally:
            raise SystemExit(5)
    return b"lives"


async def raise_exit() -> None:
    sys.exit(3)


async def answer_an_object(stream: object, job: Job) -> object:
    """Return an object whose repr() is long; a worker runs this."""
    return ["secret"] * 1000


@pytest.mark.parametrize("wants_answer", [False, True])
async def test_run_job_with_any_exception(shared: Path, *, wants_answer: bool) -> None:
    """Whatever a handler raises is the failure of its job; another job of the worker goes on."""
    async with puppet("tests.pool.test_worker:raise_it") as worker:
        await worker.send_jobs(1, job(99, data=b"wait"), fds=[])
        await worker.receive(_protocol.MORE)
        for number, name in enumerate([*RAISED, b"exit in a nursery"], 1):
            sent = _protocol.SentJob(number, EndpointKind.NONE, wants_answer, 0, name)
            await worker.send_jobs(1 + number, sent, fds=[])
            failed, text = await worker.receive_error()
            assert failed == number
            assert name.decode().split()[-1].removeprefix("nursery") in text
        await worker.send_jobs(50, job(50), fds=[])
        assert _protocol.unpack_job_result(await worker.receive(_protocol.ANSWER))[1] == b"lives"
        await worker.send_jobs(51, job(51, data=b"wait and raise"), fds=[])
        await worker.receive(_protocol.MORE)
        await until(lambda: lines(shared / "began") == ["99", "51"])
        await worker.drain(0)
        errors = dict([await worker.receive_error(), await worker.receive_error()])
        assert errors[99] == "handler was cancelled because its worker is exiting"
        assert "SystemExit: 5" in errors[51]
        # The one that was interrupted is not logged: had it not been reported, it would be lost.
        assert worker.process.log.entries() >= {51}
        assert 99 not in worker.process.log.entries()


async def test_run_job_shortens_traceback() -> None:
    """The begin and the end of a long traceback are sent, with a note on what is omitted."""
    async with puppet("tests.pool.test_worker:raise_it") as worker:
        await worker.send_jobs(1, job(1, data=b"long"), fds=[])
        _, text = await worker.receive_error()
        assert text.startswith("Traceback (most recent call last)")
        assert "bytes omitted ...\n" in text
        assert text.endswith("xxx\n")
        assert _worker.MAX_TRACEBACK < len(text) < _worker.MAX_TRACEBACK + 100
        await worker.drain()


async def test_finish_job_names_type_of_wrong_answer() -> None:
    """The error about an answer that is not bytes has its type, not its contents."""
    async with puppet("tests.pool.test_worker:answer_an_object") as worker:
        await worker.send_jobs(1, job(1), fds=[])
        assert await worker.receive_error() == (1, "handler must return bytes, got list")
        await worker.drain()


@pytest.mark.parametrize("wants_answer", [False, True])
async def test_handler_timeout(shared: Path, *, wants_answer: bool) -> None:
    """A handler that takes longer than handler_timeout is cancelled, and its job fails."""
    async with puppet("tests.pool.test_worker:raise_it", handler_timeout=0.05) as worker:
        sent = _protocol.SentJob(1, EndpointKind.NONE, wants_answer, 0, b"wait")
        await worker.send_jobs(1, sent, fds=[])
        assert await worker.receive_error() == (
            1,
            "handler did not finish within 0.05 s (handler_timeout)",
        )
        await worker.send_jobs(2, job(2), fds=[])
        assert _protocol.unpack_job_result(await worker.receive(_protocol.ANSWER))[1] == b"lives"
        await worker.drain()


async def linger(stream: Any, job: Job) -> bytes:
    """Fill the socket, so that its close(2) waits for the peer; a worker runs this."""
    if stream is None:
        return b"lives"
    # close(2) waits until the peer has received everything, or for that many seconds.
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 1000))
    await stream.receive_some(1)
    with trio.move_on_after(0.1):
        while True:
            await stream.send_all(bytes(65536))
    return b"lingers"


async def test_call_handler_with_socket_that_lingers() -> None:
    """A socket whose close(2) waits for its peer does not stop the worker that closes it."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as client,
    ):
        async with puppet("tests.pool.test_worker:linger") as worker:
            theirs, _ = listening.accept()
            with theirs:
                await worker.send_jobs(1, job(1, EndpointKind.TCP), fds=[theirs.fileno()])
            await worker.receive(_protocol.TAKEN)
            # Now the worker's file descriptor is the last one.
            client.send(b"x")
            answer = await worker.receive(_protocol.ANSWER)
            assert _protocol.unpack_job_result(answer) == (1, b"lingers")
            await worker.send_jobs(2, job(2), fds=[])
            answer = await worker.receive(_protocol.ANSWER)
            assert _protocol.unpack_job_result(answer) == (2, b"lives")
            await worker.drain()


async def test_call_handler_with_a_stream_whose_close_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error about data that was sent before is none of the handler, whose answer counts."""

    def fail(stream: object) -> None:
        close_stream(stream)
        raise ConnectionResetError

    async def handle(stream: trio.SocketStream, _: object) -> bytes:
        streams.append(stream)
        return b"answer"

    streams: list[trio.SocketStream] = []
    monkeypatch.setattr(_worker, "close_stream", fail)
    unused: Any = Mock()
    worker = _worker._Worker(unused, unused, WorkerConfig(DO, sys.executable), handle, None, unused)
    one, two = socket.socketpair()
    with two:
        sent = job(1, EndpointKind.TCP)
        assert await worker._call_handler(sent, one.detach()) == b"answer"
        assert streams[0].socket.fileno() == -1
        assert two.recv(1) == b""


################################################################
# A pool that is gone
################################################################


async def test_receive_after_pool_closed_with_unread_data(shared: Path) -> None:
    """A pool that has closed without having read everything is as gone as any."""
    async with puppet(HOLD, heartbeat_interval=0.01) as worker:
        client, theirs = ends()
        async with client.stream:
            with theirs:
                await worker.send_jobs(1, job(1, EndpointKind.UNIX), fds=[theirs.fileno()])
            await client.line()
            await trio.lowlevel.wait_readable(worker.process.conn.socket)
            await worker.process.conn.aclose()
            assert await client.read() == b""
        with trio.fail_after(30):
            assert await worker.process.wait() == 0
    assert lines(shared / "cancelled") == ["1"]


async def test_take_batch_after_pool_closed(shared: Path) -> None:
    """A job is not handled if the pool cannot be told so; its file descriptor is closed."""
    async with puppet(HOLD) as worker:
        os.kill(worker.process.pid, signal.SIGSTOP)
        client, theirs = ends()
        async with client.stream:
            with theirs:
                await worker.send_jobs(1, job(1, EndpointKind.UNIX), fds=[theirs.fileno()])
            await worker.process.conn.aclose()
            os.kill(worker.process.pid, signal.SIGCONT)
            assert await client.read() == b""
        with trio.fail_after(30):
            assert await worker.process.wait() == 0
    assert lines(shared / "began") == []


def test_watch_pool_without_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pidfd_open(2), the other end of the connection says when the pool is gone."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    ours, theirs = socket.socketpair()
    ours.close()
    monkeypatch.setattr(sys, "stderr", None)
    killed: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, _: killed.append(group))
    with theirs:
        for kills in (False, True):
            group = _worker._ProcessGroup(os.getppid(), kills=kills)
            group.kill_if_orphan()
            assert killed == []
            with pytest.raises(SystemExit):
                _worker._watch_pool(theirs, None, group)
    assert killed == [0]
    assert _worker._open_pidfd(2**22 + 1) is None
    monkeypatch.delattr(os, "pidfd_open")
    assert _worker._open_pidfd(os.getpid()) is None


def test_exit_with_parent_elsewhere_than_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no prctl(2), it is not called."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(_worker, "ctypes")
    _worker.exit_with_parent()


async def test_run_of_a_worker_that_is_ready_after_drain() -> None:
    """A worker that says that it is ready after it was drained counts as one that was not."""
    process = _process.start(WorkerConfig(DO, sys.executable))

    class Owner:
        def on_exit(self, link: WorkerHandle) -> None: ...

    owner: Any = Owner()
    link = WorkerHandle(0, process, owner, Counters())
    link.drain(0, is_replaced=False)
    with trio.fail_after(30):
        await link.run()
    assert isinstance(link.error, WorkerStartError)
    assert link.ready.is_set()
    # The process has exited.
    link.drain(0, is_replaced=False)
    assert link.state is HandleState.ENDED


################################################################
# Connections that are passed on
################################################################


class FakePool:
    """The connection of a worker to its pool: a real one, whose errors of sending a test chooses.

    As soon as a connection was sent, the pool closes its end.
    """

    def __init__(self, *errors: Exception | None) -> None:
        self.errors = list(errors)
        self.conn, self.end = connection_pair()
        # The worker receives from the real one.
        self._receiver = self.conn._receiver

    async def aclose(self) -> None:
        await self.conn.aclose()
        await self.end.aclose()

    async def send_message(self, data: bytes, *, fds: object) -> None:
        await trio.lowlevel.checkpoint()
        error = self.errors.pop(0) if len(self.errors) > 1 else self.errors[0]
        if error is not None:
            raise error
        await self.end.aclose()


async def passed_on(pool: FakePool) -> object:
    """Pass a connection on, and return what became of it."""
    conn, log, group = cast("Any", pool), cast("Any", Mock()), cast("Any", Mock())
    worker = _worker._Worker(conn, log, WorkerConfig(DO, sys.executable), None, None, group)
    one, two = connection_pair()
    sent = job(1, EndpointKind.UNIX)
    async with one, two, aclosing(pool):
        outcome: list[object] = []

        async def pass_on() -> None:
            outcome.append(await worker._pass_on(sent, one, PassedOn(b"")))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker._receive, nursery)
            await pass_on()
            await pool.end.aclose()
    return outcome[0]


async def test_pass_on_when_the_pool_is_gone() -> None:
    """The pool has the connection, or it is gone: the worker says nothing more about the job."""
    assert await passed_on(FakePool(ConnectionClosedError("gone"))) is _worker._PASSED
    assert await passed_on(FakePool(None)) is _worker._PASSED


async def test_pass_on_without_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again for a while; after that the connection is closed."""
    monkeypatch.setattr(_worker, "_PASS_RETRY_DELAY", 0.001)
    exhausted = SendError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
    assert await passed_on(FakePool(exhausted, exhausted, None)) is _worker._PASSED
    monkeypatch.setattr(_worker, "_PASS_TIMEOUT", 0.01)
    assert await passed_on(FakePool(exhausted)) is None


async def test_pass_on_after_the_last_frame_of_the_pool() -> None:
    """No verdict can arrive any more: the connection is closed, and the job is reported."""
    pool = FakePool(None)
    conn, log, group = cast("Any", pool), cast("Any", Mock()), cast("Any", Mock())
    worker = _worker._Worker(conn, log, WorkerConfig(DO, sys.executable), None, None, group)
    worker._is_receiving = False
    one, two = connection_pair()
    async with one, two, aclosing(pool):
        assert await worker._pass_on(job(1, EndpointKind.UNIX), one, PassedOn(b"")) is None


async def test_pass_on_of_what_cannot_be_sent() -> None:
    """Another error is that of the job."""
    with pytest.RaisesGroup(SendError):
        await passed_on(FakePool(SendError(errno.EINVAL, os.strerror(errno.EINVAL))))
