"""A worker: receives jobs, says that it has taken them, runs the handler on each.

The rule of this file: no handler begins before the pool has been told that its job was taken,
and what the pool was told is taken is handled. So when a worker dies, the pool knows of each
job whether its handler can have begun.

Sources: prctl(2) (PR_SET_PDEATHSIG), signal(7)
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
import traceback
from io import IOBase
from socket import SHUT_RD
from typing import TYPE_CHECKING, Any, Final

import trio

from .._closing import close_fds
from .._connection import UnixConnection
from .._frames import Frame, FrameDecoder, encode_frame
from ..errors import DescriptorsTruncatedError, UnixConnectionError
from . import _protocol
from ._completion_log import CompletionLog
from ._endpoints import EndpointKind, attach_endpoint
from ._import_string import load_handler, load_setup
from ._job import Job, close_file, close_now

if TYPE_CHECKING:
    import socket as stdlib_socket

_PR_SET_PDEATHSIG: Final = 1
_READ: Final = 65536
# After how many rounds of trio's scheduler a worker asks for more: in the first its handlers
# begin, in the second those go on that found their data there.
_ROUNDS: Final = 2
# What a worker without a pool has to finish its jobs in, and after which it is gone, whatever
# its handlers do: together less than a second.
_ORPHAN_DRAIN: Final = 0.5
_ORPHAN_END: Final = 0.75


def work(sock: stdlib_socket.socket, board: int, order: dict[str, Any]) -> int:
    """Be a worker until the pool says that it is enough, or is gone; return the exit status."""
    # A terminal sends it to everyone in front of it; when workers end is the pool's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    threading.Thread(target=_watch, args=(sock, _pidfd_of(order["pool"])), daemon=True).start()
    _check_parent(order["pool"])
    try:
        handler = load_handler(order["handler"])
        setup = load_setup(order["setup"]) if order["setup"] else None
    except BaseException:  # noqa: BLE001 - whatever it is, the pool shows it
        return _failed(sock)
    notes = CompletionLog(board)
    os.close(board)
    # A handler's children have no use for it.
    sock.set_inheritable(False)
    return trio.run(_run, sock, notes, order, handler, setup)


def _end_with_parent() -> None:
    """Have the kernel tell this process when its parent, the pool's, is gone (Linux)."""
    if sys.platform == "linux":  # pragma: no branch - others are not run here
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _pidfd_of(pool: int) -> int | None:
    try:
        return os.pidfd_open(pool)
    except (AttributeError, OSError):  # pragma: no cover - in a worker, which has them here
        # Not Linux, before 5.3, or it is gone.
        return None


def _check_parent(pool: int) -> None:
    if os.getppid() != pool:  # pragma: no cover - such an end leaves no data
        # It was gone before anything here could have been told of it.
        os._exit(1)


def _watch(sock: stdlib_socket.socket, pool: int | None) -> None:
    """End this process soon after the pool is gone; a thread, for handlers that never wait."""
    poll = select.poll()
    # Nothing but the other end's close.
    poll.register(sock.fileno(), 0)
    if pool is not None:
        poll.register(pool, select.POLLIN)
    poll.poll()
    # A child of the pool's process may hold the other end open.
    with contextlib.suppress(OSError):
        sock.shutdown(SHUT_RD)
    time.sleep(_ORPHAN_END)
    os._exit(1)


def _failed(sock: stdlib_socket.socket) -> int:
    text = traceback.format_exc().encode(errors="replace")[: _protocol.MAX_DATA]
    with contextlib.suppress(OSError):
        sock.setblocking(True)
        sock.sendall(encode_frame(_protocol.FAILED, text))
    return 1


async def _run(
    sock: stdlib_socket.socket,
    board: CompletionLog,
    order: dict[str, Any],
    handler: Any,
    setup: Any,
) -> int:
    conn = UnixConnection.from_stdlib_socket(sock)
    context: Any = contextlib.nullcontext()
    ready = False
    try:
        if setup is not None:
            context = setup()
        async with context as state:
            # The kernel forgets it when a process becomes another user.
            _end_with_parent()
            worker = _Worker(conn, board, handler, state, order["beat"])
            await conn.send_all(_protocol.pack_ready())
            ready = True
            await worker.run()
    except BaseException:
        if ready:
            raise
        return _failed(conn._receiver.raw)  # noqa: SLF001 - blocking now, as its last act
    await conn.aclose()
    return 0


class _Worker:
    """One worker, once it is ready."""

    def __init__(
        self, conn: UnixConnection, board: CompletionLog, handler: Any, state: Any, beat: float
    ) -> None:
        self._conn = conn
        self._note = board.add
        self._handler = handler
        self._state = state
        self._beat = beat
        # What is to be told to the pool: whole frames, and numbers of jobs that are done.
        self._out: list[bytes] = []
        self._done: list[int] = []
        self._wants_more = False
        self._sending = False
        self._sent = trio.lowlevel.ParkingLot()
        self._something = trio.lowlevel.ParkingLot()
        # Of the jobs whose answers are awaited, which the pool may cancel.
        self._scopes: dict[int, trio.CancelScope] = {}
        self._deadline = trio.CancelScope()
        self._draining = trio.Event()

    async def run(self) -> None:
        """Serve until the pool says that it is enough, or is gone."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._heed_signals, name="trio_unixconn.pool signals")
            nursery.start_soon(self._send_news, name="trio_unixconn.pool news")
            nursery.start_soon(self._send_beats, name="trio_unixconn.pool heartbeat")
            with self._deadline:
                async with trio.open_nursery() as handlers:
                    # It goes on while handlers finish, as the pool may have less patience by then.
                    nursery.start_soon(self._receive, handlers, name="trio_unixconn.pool receive")
                    await self._draining.wait()
            with contextlib.suppress(UnixConnectionError):
                await self._tell()
            nursery.cancel_scope.cancel()

    def _end_in(self, timeout: float) -> None:
        # The first time that is up counts.
        self._deadline.deadline = min(self._deadline.deadline, trio.current_time() + timeout)
        self._draining.set()

    async def _receive(self, handlers: trio.Nursery) -> None:
        # An error: the pool could not be told what was taken.
        with contextlib.suppress(UnixConnectionError):
            await self._receive_until_end(handlers)
        # The pool is gone.
        self._end_in(_ORPHAN_DRAIN)

    async def _receive_until_end(self, handlers: trio.Nursery) -> None:
        decoder = FrameDecoder()
        while True:
            fds: list[int] | None
            try:
                message = await self._conn.receive_message(_READ)
                data, fds = message.data, message.fds.steal_fds()
            except DescriptorsTruncatedError as exc:
                # No slot was free for them, and what arrived is closed.
                data, fds = exc.data, None
            except UnixConnectionError:
                data, fds = b"", []
            if not data:
                return
            for frame in decoder.feed(data, fds):
                await self._obey(handlers, frame)

    async def _obey(self, handlers: trio.Nursery, frame: Frame) -> None:
        kind, body, fds = frame
        if kind == _protocol.JOBS:
            await self._take(handlers, body, fds)
        elif kind == _protocol.CANCEL:
            for each in _protocol.unpack_job_ids(body):
                if each in self._scopes:
                    self._scopes[each].cancel()
        elif kind == _protocol.DRAIN:
            self._end_in(_protocol.unpack_seconds(body))
        else:
            raise _protocol.ProtocolError(f"a frame of kind {kind} came")

    async def _take(self, handlers: trio.Nursery, body: bytes, fds: list[int] | None) -> None:
        batch, jobs = _protocol.unpack_jobs(body)
        if fds is None or self._draining.is_set():
            close_fds(fds or [])
            self._out.append(_protocol.pack_batch_id(_protocol.REFUSED, batch))
            await self._tell()
            return
        self._out.append(_protocol.pack_batch_id(_protocol.TAKEN, batch))
        try:
            await self._tell()
        except BaseException:
            # The pool is gone before it knew: nobody will say what became of them.
            close_fds(fds)
            raise
        coming = iter(fds)
        for job in jobs:
            fd = next(coming) if job.kind != EndpointKind.NONE else -1
            if job.wants_answer:
                # Before it runs, as the pool may have it cancelled at once.
                self._scopes[job.id] = trio.CancelScope()
            handlers.start_soon(self._handle, job, fd, name="trio_unixconn.pool handler")
        # Only when all tasks have run, and so nobody computes, is there room for more.
        for _ in range(_ROUNDS):
            await trio.lowlevel.checkpoint()
        self._wants_more = True
        self._something.unpark()

    async def _handle(self, sent: _protocol.SentJob, fd: int) -> None:
        number, _, wants_answer, _ = sent
        try:
            if wants_answer:
                await self._answer(sent, fd)
            else:
                await self._call_handler(sent, fd)
                self._note(number)
                self._done.append(number)
        except Exception:  # noqa: BLE001 - the pool logs it, or raises it
            self._say(number, traceback.format_exc())
        except BaseException as exc:
            why = "was cancelled: the worker ended" if isinstance(exc, trio.Cancelled) else ""
            # Not noted: it was cut off in the middle, and if this cannot be told any more, the
            # pool is to report it.
            self._tell_of(number, f"the handler {why or traceback.format_exc()}")
            raise
        finally:
            if wants_answer:
                del self._scopes[number]
            self._something.unpark()

    async def _call_handler(self, sent: _protocol.SentJob, fd: int) -> Any:
        """Call the handler; its stream is closed, and a file written, when this returns."""
        number, kind, _, data = sent
        stream: Any = None
        if kind != EndpointKind.NONE:
            stream = await attach_endpoint(kind, fd)
        try:
            return await self._handler(
                stream, Job(number, data, self._state, self._draining, stream)
            )
        finally:
            if kind == EndpointKind.OTHER and isinstance(stream, IOBase):
                await close_file(stream)
            else:
                # An error is about data that was sent before; it is closed.
                with contextlib.suppress(OSError):
                    close_now(stream)

    async def _answer(self, sent: _protocol.SentJob, fd: int) -> None:
        number = sent.id
        scope = self._scopes[number]
        answer: Any = None
        with scope:
            answer = await self._call_handler(sent, fd)
        if scope.cancelled_caught:
            self._say(number, "the handler was cancelled, because the call was")
        elif not isinstance(answer, bytes):
            self._say(number, f"the handler returned {answer!r}, where bytes were due")
        elif len(answer) > _protocol.MAX_DATA:
            self._say(number, f"the handler returned {len(answer)} bytes; send sealed memory")
        else:
            self._out.append(_protocol.pack_job_result(_protocol.ANSWER, number, answer))

    def _say(self, number: int, text: str) -> None:
        self._note(number)
        self._tell_of(number, text)

    def _tell_of(self, number: int, text: str) -> None:
        said = text.encode(errors="backslashreplace")[: _protocol.MAX_DATA]
        self._out.append(_protocol.pack_job_result(_protocol.ERROR, number, said))

    async def _send_news(self) -> None:
        while True:
            if not self._out and not self._done and not self._wants_more:
                await self._something.park()
                # What other handlers have to tell now goes along: each message has the pool run.
                await trio.lowlevel.checkpoint()
            try:
                await self._tell()
            except UnixConnectionError:
                # The receiving side notices, too.
                await trio.sleep_forever()

    async def _tell(self) -> None:
        """Send all that there is to tell; when this returns, it has been sent."""
        while self._sending:
            await self._sent.park()
        if self._done:
            self._out.append(_protocol.pack_job_ids(_protocol.DONE, self._done))
            self._done.clear()
        if self._wants_more:
            self._out.append(encode_frame(_protocol.MORE))
            self._wants_more = False
        if not self._out:
            return
        news = b"".join(self._out)
        self._out.clear()
        self._sending = True
        try:
            # Half a frame would be the end of everything.
            with trio.CancelScope(shield=True):
                await self._conn.send_all(news)
        finally:
            self._sending = False
            self._sent.unpark_all()

    async def _send_beats(self) -> None:
        while True:
            await trio.sleep(self._beat)
            self._out.append(encode_frame(_protocol.BEAT))
            self._something.unpark()

    async def _heed_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                # From the kernel, when the pool is gone, or from somebody who wants another
                # worker here. The pool says when: jobs may be on their way.
                self._out.append(encode_frame(_protocol.LEAVING))
                self._something.unpark()
