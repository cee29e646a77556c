"""A worker: it receives jobs, acknowledges them, and runs the handler on each.

Invariant: no handler begins before the pool has been told that its job was taken, and a job of
which the pool was told so is handled. When a worker dies, the pool knows of each job whether its
handler can have begun.

A handler is a task of its own, and whatever it raises, SystemExit and KeyboardInterrupt included,
is the failure of its job, and of no other. Nothing that it raises leaves the task.

A worker starts as a usual Python program would. It inherits signals that the pool's process blocks
or ignores, as each new process does, and restores the defaults: the programs that its handlers
start would inherit them, too. SIGINT gets a handler that does nothing, because a terminal sends it
to the pool's process, which decides when workers exit. Python resets a handler in a program that is
started, but not SIG_IGN.

Sources: prctl(2) (PR_SET_PDEATHSIG), signal(7), pthread_sigmask(3)
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import math
import os
import resource
import select
import signal
import socket as stdlib_socket
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator
from functools import partial
from io import IOBase
from ipaddress import ip_network
from socket import SHUT_RD
from typing import TYPE_CHECKING, Any, Final, cast

import trio

from .. import _kernel
from .._closing import close_fds
from .._connection import UnixConnection, receive_with_fds, send_with_fds_nowait
from .._frames import Frame, FrameDecoder, encode_frame
from .._sockopts import raw_socket
from .._version import __version__
from ..errors import ReportedError, SendError, UnixConnectionError
from . import _protocol
from ._accepting import Accepting
from ._completion_log import CompletionLogWriter
from ._endpoints import EndpointKind, attach_other, attach_socket
from ._import_string import import_handler, import_setup
from ._job import Job, PassedOn, WorkerInfo, WorkerState, close_file, close_stream
from ._protocol import NO_DESCRIPTOR, PassVerdict
from ._proxy_header import join_passed, read_proxy_header, split_passed
from ._worker_config import WorkerConfig

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

if TYPE_CHECKING:
    from ._proxy_header import ProxyHeader

_PR_SET_PDEATHSIG: Final = 1
_CHUNK_SIZE: Final = 65536
# The signals that Python ignores when it starts.
_IGNORED_BY_PYTHON: Final = frozenset({signal.SIGPIPE, signal.SIGXFSZ})
# How many rounds of trio's scheduler a worker waits before it asks for more jobs. In the first one
# its handlers begin, in the second one those continue that found their data there.
_ROUNDS: Final = 2
# After the death of its pool, a worker has this time to finish its jobs, and exits after the
# second one whatever its handlers do. Together less than a second.
_ORPHAN_DRAIN: Final = 0.5
_ORPHAN_EXIT: Final = 0.75
# The maximum length of a traceback, in bytes. What a handler raises can have a text of any length.
MAX_TRACEBACK: Final = 65536
# How long a worker tries to pass on a connection while the pool has no free file descriptor, in
# seconds, and the pause between two attempts.
_PASS_TIMEOUT: Final = 5.0
_PASS_RETRY_DELAY: Final = 0.05
# Before Python 3.12, each access to a member of an enum takes 0.1 us.
_OTHER: Final = EndpointKind.OTHER
# The result of a handler whose connection the pool has taken.
_PASSED: Final = object()


def run_worker(
    sock: stdlib_socket.socket,
    log_fd: int,
    message: dict[str, Any],
    setup_data: bytes,
    parent: int | None = None,
) -> int:
    """Run a worker until its pool drains it, or is gone.

    Args:
      sock: the connection to the pool.
      log_fd: the completion log.
      message: what :meth:`WorkerConfig.encode` has written.
      setup_data: the bytes after it.
      parent: the process that has started this one; default: the pool's process.

    Returns:
      The exit status.
    """
    # Programs that the handler's module starts must not inherit it.
    sock.set_inheritable(False)
    log = CompletionLogWriter(log_fd)
    restore_signals()
    pool_pid: int = message["pool_pid"]
    if parent is None:
        parent = pool_pid
    # Another version may not know it.
    group = _ProcessGroup(parent, kills=bool(message["config"].get("kill_process_group")))
    exit_with_parent()
    threading.Thread(
        target=_watch_pool,
        args=(sock, _open_pidfd(pool_pid), group),
        name="pool watch",
        daemon=True,
    ).start()
    check_parent(parent)
    # Registered first, it runs last.
    atexit.register(group.kill_if_orphan)
    if message["version"] != __version__:
        # Another version was installed since the pool's process started. It sees that, and says
        # so; the configuration may be another one by now.
        return send_last(sock, _protocol.pack_ready())
    config = WorkerConfig(**message["config"], setup_data=setup_data)
    try:
        _apply_limits(config)
        handler = import_handler(config.handler)
        setup = import_setup(config.setup) if config.setup is not None else None
    except BaseException as exc:  # SystemExit, too, keeps the worker from starting
        return send_failed(sock, exc)
    return trio.run(_serve, sock, log, config, handler, setup, group)


def restore_signals() -> None:
    """Give each signal the disposition that it has in a Python program by default."""
    for number in signal.valid_signals():
        if number not in _IGNORED_BY_PYTHON and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, lambda _, __: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def exit_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent has died (Linux)."""
    if sys.platform == "linux":  # pragma: no branch - others are not run here
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # pragma: no cover - in a worker, which has them here
        # Not Linux, before 5.3, or the process is gone.
        return None


class _ProcessGroup:
    """This process and those that its handlers have started.

    Args:
      kills: the option ``kill_process_group``.

    Attributes:
      is_orphan: whether the pool has closed the connection. A process that dies does so before it
        stops being the parent.
    """

    def __init__(self, parent: int, *, kills: bool) -> None:
        self._parent = parent
        self._kills = kills
        self.is_orphan = False

    def kill_if_orphan(self) -> None:
        """Kill the group, with this process, if there is no pool to do it."""
        if self._kills and (self.is_orphan or os.getppid() != self._parent):
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:  # pyright: ignore[reportUnnecessaryComparison]
                    with contextlib.suppress(OSError, ValueError):
                        stream.flush()
            os.killpg(0, signal.SIGKILL)


def check_parent(parent: int) -> None:
    """Exit if the parent of this process has died."""
    if os.getppid() != parent:  # pragma: no cover - such an exit leaves no data
        # It died before prctl(2) was called.
        os._exit(1)


def _watch_pool(sock: stdlib_socket.socket, pidfd: int | None, group: _ProcessGroup) -> None:
    """Exit soon after the pool's process has died; a thread, for handlers that never wait."""
    poll = select.poll()
    # Only the close of the other end.
    poll.register(sock.fileno(), 0)
    if pidfd is not None:
        poll.register(pidfd, select.POLLIN)
    poll.poll()
    # A child process of the pool's process can hold the other end open.
    with contextlib.suppress(OSError):
        sock.shutdown(SHUT_RD)
    time.sleep(_ORPHAN_EXIT)
    group.is_orphan = True
    group.kill_if_orphan()
    os._exit(1)


def _apply_limits(config: WorkerConfig) -> None:
    """Set what the options of the pool say of a worker's process.

    Raises:
      OSError: the system does not permit it.
      ValueError: the system does not know it, or the limits are invalid.
    """
    if config.cpu is not None:
        os.sched_setaffinity(0, {config.cpu})
    if config.nice:
        os.nice(config.nice)
    for number, soft, hard in config.resource_limits:
        resource.setrlimit(number, (soft, hard))


def send_failed(sock: stdlib_socket.socket, exc: BaseException) -> int:
    """Report why this process cannot start, as its last act; return its exit status."""
    text = _text_of(exc) if isinstance(exc, ReportedError) else format_error(exc)
    return send_last(sock, encode_frame(_protocol.FAILED, text))


def _text_of(exc: ReportedError) -> bytes:
    return _shorten(str(exc).encode(errors="backslashreplace"))


def send_last(sock: stdlib_socket.socket, frame: bytes) -> int:
    """Send a frame, blocking, as the last act of this process; return its exit status."""
    with contextlib.suppress(OSError):
        sock.setblocking(True)
        sock.sendall(frame)
    return 1


def format_error(exc: BaseException) -> bytes:
    """Return a traceback of limited length."""
    try:
        text = "".join(traceback.format_exception(type(exc), exc, exc.__traceback__))
    except BaseException as error:  # whatever the exception's own methods raise
        text = f"{type(exc).__name__} (no traceback: formatting it raised {type(error).__name__})\n"
    return _shorten(text.encode(errors="backslashreplace"))


def _shorten(text: bytes) -> bytes:
    """Return the begin and the end of a text that is too long."""
    if len(text) <= MAX_TRACEBACK:
        return text
    half = MAX_TRACEBACK // 2
    return b"%b\n... %d bytes omitted ...\n%b" % (text[:half], len(text) - 2 * half, text[-half:])


async def _serve(
    sock: stdlib_socket.socket,
    log: CompletionLogWriter,
    config: WorkerConfig,
    handler: Any,
    setup: Any,
    group: _ProcessGroup,
) -> int:
    conn = UnixConnection.from_stdlib_socket(sock)
    context: Any = contextlib.nullcontext()
    ready = False
    try:
        if setup is not None:
            function, takes_info = setup
            info = WorkerInfo(config.index, os.getpid(), config.setup_data)
            context = function(info) if takes_info else function()
        async with context as state:
            # The kernel cancels it when a process becomes another user.
            exit_with_parent()
            worker = _Worker(conn, log, config, handler, state, group)
            # From before READY: a SIGTERM at any time after it must not kill this worker, which
            # includes the end of the setup. A function, unlike SIG_IGN, is not inherited by the
            # programs that it starts.
            if (
                signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            ):  # pragma: no branch - else a setup's
                signal.signal(signal.SIGTERM, lambda _, __: None)
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                await conn.send_all(_protocol.pack_ready())
                ready = True
                await worker.run(signals)
    except BaseException as exc:
        if ready:
            raise
        return send_failed(raw_socket(conn.socket), exc)
    await conn.aclose()
    return 0


def _contains_cancelled(exc: BaseException) -> bool:
    if isinstance(exc, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", exc)
        return group.subgroup(trio.Cancelled) is not None
    return isinstance(exc, trio.Cancelled)


class _Verdict:
    """What the pool says about a connection that was passed on, as soon as it does."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._verdict = PassVerdict.CLOSED

    def set(self, verdict: PassVerdict) -> None:
        self._verdict = verdict
        self._event.set()

    async def get(self) -> PassVerdict:
        await self._event.wait()
        return self._verdict


class _Worker:
    """A worker that is ready."""

    def __init__(
        self,
        conn: UnixConnection,
        log: CompletionLogWriter,
        config: WorkerConfig,
        handler: Any,
        state: Any,
        group: _ProcessGroup,
    ) -> None:
        self._conn = conn
        self._log_finished = log.add
        self._handler = handler
        self._handler_timeout = math.inf
        if config.handler_timeout is not None:
            self._handler_timeout = config.handler_timeout
        self._heartbeat_interval = config.heartbeat_interval
        self._state = state
        self._group = group
        self._read_proxy_header: Any = None
        if config.proxy_protocol is not None:
            networks = [ip_network(each) for each in config.proxy_from]
            self._read_proxy_header = partial(
                read_proxy_header, version=config.proxy_protocol, senders=networks
            )
        # What the pool is to be sent: whole frames, and the ids of jobs that are done.
        self._outgoing: list[bytes] = []
        self._done: list[int] = []
        self._wants_more = False
        self._is_sending = False
        self._sent = trio.lowlevel.ParkingLot()
        self._has_outgoing = trio.lowlevel.ParkingLot()
        # Those of calls, which the pool can cancel.
        self._scopes: dict[int, trio.CancelScope] = {}
        self._deadline = trio.CancelScope()
        self._worker_state = WorkerState()
        self._draining = self._worker_state.draining
        # The verdicts that jobs wait for, whose connections were passed on.
        self._verdicts: dict[int, _Verdict] = {}
        self._is_receiving = True
        # With accept="workers", and the number of jobs that the pool has sent.
        self._accepting: Accepting | None = None
        # Of an ACCEPT that has not arrived; None: those of a frame were lost.
        self._sockets: list[list[int] | None] = []
        self._has_accepted = False
        self._sent_jobs = 0

    async def run(self, signals: AsyncIterator[int]) -> None:
        """Handle jobs until the pool drains this worker, or is gone."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_sigterm, signals, name="trio_unixconn.pool signals")
            nursery.start_soon(self._flush_loop, name="trio_unixconn.pool flush")
            nursery.start_soon(self._send_heartbeats, name="trio_unixconn.pool heartbeat")
            with self._deadline:
                async with trio.open_nursery() as handlers:
                    # It continues while handlers finish: a second DRAIN can leave them less time.
                    nursery.start_soon(self._receive, handlers, name="trio_unixconn.pool receive")
                    await self._draining.wait()
            if self._has_accepted:
                # The pool cannot see when the last one has ended.
                self._outgoing.append(encode_frame(_protocol.IDLE))
            with contextlib.suppress(UnixConnectionError):
                await self._flush()
            nursery.cancel_scope.cancel()

    def _drain(self, timeout: float) -> None:
        # Of several deadlines the first one counts.
        self._deadline.deadline = min(self._deadline.deadline, trio.current_time() + timeout)
        self._draining.set()
        if self._accepting is not None:
            self._accepting.stop()

    async def _receive(self, handlers: trio.Nursery) -> None:
        # An error: the pool could not be told that jobs were taken.
        try:
            with contextlib.suppress(UnixConnectionError):
                await self._receive_until_end(handlers)
        finally:
            # At the deadline, too, verdicts do not arrive any more.
            self._is_receiving = False
            while self._verdicts:
                self._verdicts.popitem()[1].set(PassVerdict.CLOSED)
        # The pool is gone.
        self._worker_state.is_replaced = False
        self._group.is_orphan = True
        self._drain(_ORPHAN_DRAIN)

    async def _receive_until_end(self, handlers: trio.Nursery) -> None:
        decoder = FrameDecoder()
        while True:
            # With None for file descriptors, no number was free for them (EMFILE).
            data, fds = await receive_with_fds(self._conn, _CHUNK_SIZE)
            if not data:
                return
            for frame in decoder.feed(data, fds):
                await self._handle_frame(handlers, frame)

    async def _handle_frame(self, handlers: trio.Nursery, frame: Frame) -> None:
        kind, body, fds = frame
        match kind:
            case _protocol.JOBS:
                await self._take_batch(handlers, body, fds)
            case _protocol.CANCEL:
                for job_id in _protocol.unpack_job_ids(body):
                    scope = self._scopes.get(job_id)
                    if scope is not None:
                        # So that it does not look as if it had run out of time.
                        scope.deadline = math.inf
                        scope.cancel()
            case _protocol.DRAIN:
                timeout, self._worker_state.is_replaced = _protocol.unpack_drain(body)
                self._drain(timeout)
            case _protocol.PASSED:
                job_id, verdict = _protocol.unpack_passed(body)
                self._verdicts.pop(job_id).set(verdict)
            case _protocol.ACCEPT:
                self._begin_accepting(handlers, body, fds)
            case _protocol.SOCKETS:
                self._sockets.append(fds)
            case _protocol.STOP:
                self._stop_accepting()
            case _:
                raise _protocol.ProtocolError(f"unexpected frame of kind {kind}")

    def _report(self, frame: bytes) -> None:
        """Send a frame soon."""
        self._outgoing.append(frame)
        self._has_outgoing.unpark()

    ################################################################
    # Connections that this worker accepts
    ################################################################

    def _stop_accepting(self) -> None:
        if self._accepting is not None:
            self._accepting.stop()
            return
        # The ACCEPT that they were for is not sent any more.
        self._close_sockets()
        self._report(encode_frame(_protocol.STOPPED))

    def _close_sockets(self) -> None:
        sockets, self._sockets = self._sockets, []
        for fds in sockets:
            close_fds(fds or [])

    def _begin_accepting(self, handlers: trio.Nursery, body: bytes, fds: list[int] | None) -> None:
        if fds is None or None in self._sockets:
            close_fds(fds or [])
            self._close_sockets()
            self._report(_protocol.pack_starved(has_sockets=False))
            return
        sockets, self._sockets = self._sockets, []
        fds[1:1] = [fd for each in sockets for fd in each or []]

        def start(
            slot: int, job: _protocol.SentJob, fd: int, stream: UnixConnection | None
        ) -> None:
            handlers.start_soon(
                self._run_accepted,
                accepting,
                slot,
                job,
                fd,
                stream,
                name="trio_unixconn.pool handler",
            )

        accepting = Accepting(
            body, fds, other_jobs=lambda: self._sent_jobs, start=start, report=self._report
        )
        self._accepting = accepting
        self._has_accepted = True
        handlers.start_soon(self._accept, accepting, name="trio_unixconn.pool accept")
        if self._draining.is_set():  # pragma: no cover - the pool sends DRAIN afterwards
            accepting.stop()

    async def _accept(self, accepting: Accepting) -> None:
        try:
            await accepting.run()
        finally:
            # While the pool lives, it has the sockets, too, and a close does not wait.
            accepting.close(is_last=self._group.is_orphan)
            self._report(encode_frame(_protocol.STOPPED))

    async def _run_accepted(
        self,
        accepting: Accepting,
        slot: int,
        job: _protocol.SentJob,
        fd: int,
        stream: UnixConnection | None,
    ) -> None:
        failure: bytes | None = None
        try:
            if self._handler_timeout == math.inf:
                await self._call_handler(job, fd, stream)
            else:
                with trio.move_on_after(self._handler_timeout) as scope:
                    await self._call_handler(job, fd, stream)
                if scope.cancelled_caught:
                    failure = self._describe_timeout()
        except ReportedError as exc:
            failure = _text_of(exc)
        except BaseException as exc:  # it is the failure of this job alone
            if self._is_ended_by_exit(exc):
                # Its slot stays in use: if the pool does not get this report, the job is abandoned.
                self._queue_error(job.id, _protocol.CANCELLED_BY_EXIT)
                return
            failure = format_error(exc)
        accepting.finish(slot, failed=failure is not None)
        if failure is not None:
            self._queue_error(job.id, failure)
            self._has_outgoing.unpark()

    ################################################################
    # Jobs that the pool has sent
    ################################################################

    async def _take_batch(self, handlers: trio.Nursery, body: bytes, fds: list[int] | None) -> None:
        batch, jobs = _protocol.unpack_jobs(body)
        if fds is None or self._draining.is_set():
            close_fds(fds or [])
            self._outgoing.append(_protocol.pack_batch_id(_protocol.REFUSED, batch))
            await self._flush()
            return
        if len(fds) != sum([job.kind != NO_DESCRIPTOR for job in jobs]):
            close_fds(fds)
            raise _protocol.ProtocolError(f"unexpected number of file descriptors: {len(fds)}")
        self._outgoing.append(_protocol.pack_batch_id(_protocol.TAKEN, batch))
        try:
            await self._flush()
        except BaseException:
            # The pool is gone, and was not told. These jobs are not handled.
            close_fds(fds)
            raise
        self._sent_jobs += len(jobs)
        remaining = iter(fds)
        for job in jobs:
            fd = next(remaining) if job.kind != NO_DESCRIPTOR else -1
            if job.wants_answer:
                # Before its task runs, as the pool can cancel it at once.
                self._scopes[job.id] = trio.CancelScope()
            handlers.start_soon(self._run_job, job, fd, name="trio_unixconn.pool handler")
        # When all tasks have run, and so none computes, this worker can accept more.
        for _ in range(_ROUNDS):
            await trio.lowlevel.checkpoint()
        self._wants_more = True
        self._has_outgoing.unpark()

    async def _run_job(self, job: _protocol.SentJob, fd: int) -> None:
        # A scope takes 7 of the 90 us of a job: only what can be cancelled has one.
        scope = self._scopes.get(job.id)
        result: Any = None
        try:
            if scope is None and self._handler_timeout == math.inf:
                result = await self._call_handler(job, fd)
            else:
                scope = scope or trio.CancelScope()
                # No CANCEL can have come before: the receiving task has waited until this task
                # runs.
                scope.deadline = trio.current_time() + self._handler_timeout
                with scope:
                    result = await self._call_handler(job, fd)
            if result is _PASSED:
                # The pool has ended the job.
                pass
            elif scope is None or not scope.cancelled_caught:
                self._finish_job(job, result)
            elif scope.deadline == math.inf:
                self._fail_job(job.id, b"handler was cancelled because its call was cancelled")
            else:
                self._fail_job(job.id, self._describe_timeout())
        except ReportedError as exc:
            # About what the peer has sent, mostly: no error of this program.
            self._fail_job(job.id, _text_of(exc))
        except BaseException as exc:  # it is the failure of this job alone
            self._fail_with(job.id, exc)
        finally:
            self._scopes.pop(job.id, None)
            self._sent_jobs -= 1
            if self._accepting is not None:
                self._accepting.notify()
            if self._has_outgoing:
                self._has_outgoing.unpark()

    def _describe_timeout(self) -> bytes:
        return b"handler did not finish within %g s (handler_timeout)" % self._handler_timeout

    async def _call_handler(self, job: _protocol.SentJob, fd: int, stream: Any = None) -> Any:
        """Call the handler; its stream is closed, and a file written, when this returns."""
        proxy: ProxyHeader | None = None
        data = job.data
        if stream is None and job.kind != NO_DESCRIPTOR:
            stream = attach_socket(job.kind, fd)
            if stream is None:
                stream = await attach_other(fd)
        try:
            if self._read_proxy_header is not None and isinstance(stream, trio.abc.Stream):
                if job.passed:
                    proxy, data = split_passed(data)
                else:
                    proxy = await self._read_proxy_header(stream)
            result = await self._handler(
                stream,
                Job(
                    job.id,
                    data,
                    self._state,
                    self._worker_state,
                    stream,
                    proxy,
                    job.passed,
                    job.wants_answer,
                ),
            )
            if isinstance(result, PassedOn) and not job.wants_answer:
                if self._read_proxy_header is not None:
                    result = PassedOn(join_passed(proxy, result.data))
                return await self._pass_on(job, stream, result)
            return result
        finally:
            if job.kind == _OTHER and isinstance(stream, IOBase):
                await close_file(stream)
            else:
                try:  # of every job
                    close_stream(stream)
                except OSError:
                    # EBADF: the handler has closed the file descriptor by its number. Others are
                    # about data that was sent before, and the socket is closed.
                    pass

    async def _pass_on(self, job: _protocol.SentJob, stream: Any, passed: PassedOn) -> object:
        """Send the connection of a job to the pool, which gives it to another handler.

        The caller closes this worker's copy. Until the pool has said what became of the connection,
        it is the only one which the kernel cannot drop.

        Returns:
          _PASSED if the pool has ended the job, and None if the connection is closed instead.
        """
        if stream.socket.fileno() < 0:
            raise RuntimeError("handler has passed on a connection that it has closed")
        frame = _protocol.pack_job_result(_protocol.PASS, job.id, passed.data)
        with trio.move_on_after(_PASS_TIMEOUT):
            while self._is_receiving:
                # A cancellation must not leave open whether the pool has it.
                verdict = PassVerdict.RETRY
                with trio.CancelScope(shield=True):
                    verdict = await self._pass_once(job.id, frame, stream)
                if verdict is not PassVerdict.RETRY:
                    return _PASSED
                await trio.sleep(_PASS_RETRY_DELAY)
        return None

    async def _pass_once(self, job_id: int, frame: bytes, stream: Any) -> PassVerdict:
        answer = self._verdicts[job_id] = _Verdict()
        while self._is_sending:
            await self._sent.park()
        self._is_sending = True
        try:
            await self._conn.send_message(frame, fds=[stream.socket])
        except SendError as exc:
            self._verdicts.pop(job_id, None)
            if exc.errno not in _kernel.OUT_OF_RESOURCES:
                raise
            return PassVerdict.RETRY
        except UnixConnectionError:
            # The pool is gone.
            self._verdicts.pop(job_id, None)
            return PassVerdict.CLOSED
        finally:
            self._is_sending = False
            self._sent.unpark_all()
        return await answer.get()

    def _finish_job(self, job: _protocol.SentJob, result: Any) -> None:
        if not job.wants_answer:
            self._log_finished(job.id)
            self._done.append(job.id)
        elif not isinstance(result, bytes):
            self._fail_job(job.id, b"handler must return bytes, got %b" % _name_of_type(result))
        elif len(result) > _protocol.MAX_DATA:
            self._fail_job(
                job.id,
                b"handler must return at most %d bytes, got %d; pass larger data as a sealed memfd"
                % (_protocol.MAX_DATA, len(result)),
            )
        else:
            # If the answer does not reach the pool, the job was handled nevertheless.
            self._log_finished(job.id)
            self._outgoing.append(_protocol.pack_job_result(_protocol.ANSWER, job.id, result))

    def _fail_with(self, job_id: int, exc: BaseException) -> None:
        """Report that a handler has raised."""
        if self._is_ended_by_exit(exc):
            # The job is not logged as finished: it was interrupted, and if
            # the pool does not get this report, it has to report the job as abandoned.
            self._queue_error(job_id, _protocol.CANCELLED_BY_EXIT)
        else:
            self._fail_job(job_id, format_error(exc))

    @staticmethod
    def _is_ended_by_exit(exc: BaseException) -> bool:
        """Whether the end of this worker has cancelled a handler."""
        return _contains_cancelled(exc) and trio.current_effective_deadline() <= trio.current_time()

    def _fail_job(self, job_id: int, text: bytes) -> None:
        self._log_finished(job_id)
        self._queue_error(job_id, text)

    def _queue_error(self, job_id: int, text: bytes) -> None:
        self._outgoing.append(_protocol.pack_job_result(_protocol.ERROR, job_id, text))

    async def _flush_loop(self) -> None:
        while True:
            if not self._outgoing and not self._done and not self._wants_more:
                await self._has_outgoing.park()
                # What other handlers report now is sent together: each message wakes the pool.
                await trio.lowlevel.checkpoint()
            try:
                await self._flush()
            except UnixConnectionError:
                # The receiving task gets an error, too.
                await trio.sleep_forever()

    async def _flush(self) -> None:
        """Send everything that is queued; when this returns, it has been sent."""
        while self._is_sending:
            await self._sent.park()
        if self._done:
            self._outgoing.append(_protocol.pack_job_ids(_protocol.DONE, self._done))
            self._done.clear()
        if self._wants_more:
            self._outgoing.append(encode_frame(_protocol.MORE))
            self._wants_more = False
        if not self._outgoing:
            return
        data = b"".join(self._outgoing)
        self._outgoing.clear()
        with contextlib.suppress(trio.WouldBlock):
            sent = send_with_fds_nowait(self._conn, data, ())
            if sent == len(data):
                return
            data = data[sent:]
        self._is_sending = True
        try:
            # The pool could not decode what follows a part of a frame.
            with trio.CancelScope(shield=True):
                await self._conn.send_all(data)
        finally:
            self._is_sending = False
            self._sent.unpark_all()

    async def _send_heartbeats(self) -> None:
        while True:
            await trio.sleep(self._heartbeat_interval)
            self._outgoing.append(encode_frame(_protocol.BEAT))
            self._has_outgoing.unpark()

    async def _watch_sigterm(self, signals: AsyncIterator[int]) -> None:
        async for _ in signals:
            # From the kernel after the death of the pool, or from an operator. The pool decides
            # when this worker exits, because jobs may be on their way.
            self._outgoing.append(encode_frame(_protocol.LEAVING))
            self._has_outgoing.unpark()


def _name_of_type(value: object) -> bytes:
    return type(value).__name__.encode(errors="backslashreplace")
