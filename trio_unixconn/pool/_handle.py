"""WorkerHandle: a worker, as its pool sees it.

The states of a worker::

    STARTING --READY--> READY --drain--> DRAINING --exit--> ENDED
        |                 |                                   ^
        +-----------------+------------- exit ----------------+

The pool gives a worker one batch of jobs at a time. The next one is sent when the worker has
acknowledged the last one and has asked for more, which it does when the handlers of that batch have
begun and none of them computes. A worker that computes is given nothing: the jobs stay in the
queue, where any worker can have them.

What the pool sends is one queue, in order: a batch that was given before a drain arrives before
it, and none is given after. What a worker sends is not trusted. A frame that the protocol does not
allow at that moment, a number that this worker was not given, file descriptors, or the end of the
stream kill it. All ways in which a worker can end lead to ``_on_exit``, which settles or requeues
the jobs that it had.

Invariant: each job that a handle was given is in ``batch`` (sent), in ``in_flight``
(acknowledged), or belongs to the queue again, or has ended.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio
from trio.lowlevel import enable_ki_protection

from .. import _kernel
from .._connection import receive_with_fds, send_with_fds_nowait
from .._frames import Frame, FrameDecoder, FrameError, close_frames, encode_frame
from .._owner import DescriptorOwner
from ..errors import (
    ConnectionBrokenError,
    ConnectionClosedError,
    HandlerError,
    UnixConnectionError,
    WorkerDiedError,
    WorkerStartError,
)
from . import _protocol
from ._accepted import AcceptedJobs
from ._endpoints import kind_of_passed
from ._pending import JobEnd, PendingJob
from ._process import WorkerProcess, describe_exit
from ._protocol import PassVerdict, ProtocolError

if TYPE_CHECKING:
    from ._accepted import AcceptPlan, Progress
    from ._endpoints import EndpointKind
    from ._statistics import Counters

logger: Final = logging.getLogger("trio_unixconn.pool")

CHUNK_SIZE: Final = 65536
#: The number of bytes of an incomplete frame that show that a worker lives. If a handler has
#: written to the connection, heartbeats may become the body of a frame that does not end for
#: minutes; everything else that the worker sends disappears in it, too.
SIGN_OF_LIFE: Final = 4096
#: The maximum number of jobs in a batch. More would only wait in the worker, where no other worker
#: can have them.
MAX_BATCH: Final = 64
# The pause after the kernel had no resources for a batch, in seconds.
SEND_RETRY_DELAY: Final = 0.05
#: The pause after the process of a worker could not be waited for, in seconds.
WAIT_RETRY_DELAY: Final = 1.0
#: The time in seconds that a worker has to exit, after its last job or its deadline.
EXIT_GRACE: Final = 5.0


#: A deadline that is noticed so many seconds late has passed while this process did not run.
MAX_LATENESS: Final = 1.0


class HandleState(enum.Enum):
    """The states of a worker."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    ENDED = "ended"


# Before Python 3.12, each access to a member of an enum takes 0.1 us.
_READY: Final = HandleState.READY
_HANDLED: Final = JobEnd.HANDLED


class HandleOwner(Protocol):
    """The methods of the supervisor that a handle calls."""

    def dispatch(self) -> None:
        """Called when the worker can accept more jobs."""

    def requeue(self, jobs: list[PendingJob], cause: Exception, *, counts: bool) -> None:
        """Called with jobs that the worker has not acknowledged."""

    def reject(self, jobs: list[PendingJob], why: str) -> None:
        """Called with jobs that no worker can have."""

    def on_acknowledged(self, handle: WorkerHandle, count: int) -> None:
        """Called when the worker has acknowledged jobs."""

    def on_finished(self, handle: WorkerHandle, count: int) -> None:
        """Called when handlers have returned."""

    def on_failed(
        self, handle: WorkerHandle, job_id: int, text: str, *, awaited: bool, cancelled: bool
    ) -> None:
        """Called when a handler has raised, or a job could not be given its stream.

        Args:
          awaited: whether a caller is told, too.
        """

    def on_passed(self, fd: int, kind: EndpointKind, data: bytes, peer: Any, passed: int) -> bool:
        """Called with a connection that a handler has passed on.

        Args:
          peer: the address of its peer.
          passed: how often it was passed on before.

        Returns:
          Whether another handler gets it. Then the owner of this owns the file descriptor.
        """
        ...

    def on_refused(self, handle: WorkerHandle) -> None:
        """Called when the worker had no free file descriptor; it rests until it is told not to."""

    def on_enough(self, handle: WorkerHandle) -> None:
        """Called when the worker has accepted as many connections as it may."""

    def on_leaving(self, handle: WorkerHandle) -> None:
        """Called when the worker was asked to terminate by a signal."""

    def on_exit(self, handle: WorkerHandle) -> None:
        """Called once, when the worker has ended."""

    def on_abandoned(self, handle: WorkerHandle, jobs: list[PendingJob]) -> None:
        """Called after ``on_exit`` with the jobs that the worker was handling, if there are any."""


class WorkerHandle(DescriptorOwner):
    """One worker.

    Attributes:
      index: its index in the pool.
      state: see the module.
      batch: the jobs that were sent to it and are not acknowledged.
      in_flight: the jobs that it has acknowledged and not finished, by their numbers.
      limit: the number of jobs in its next batch.
      recent: the number of jobs that it was given lately; the queue counts.
      resting: whether it has refused a batch or is to stop accepting, and gets nothing now.
      error: why it has ended, or could not start.
      ready: set when it has said that it is ready, or that it cannot start, or has ended.
      gone: set when it has ended.
      started_at: when it was ready, in trio's time; infinity before.
      last_heard: when a frame of it arrived, or a large part of one.
      idle_since: when it finished its last job.
      batch_sent_at: when its batch was sent; infinity if there is none that it must answer.
      accepted, handled, failed: the numbers of its jobs.
      refusals: the number of batches that it has refused.
      died_with_jobs: whether it had jobs when it ended.
      is_accepting: whether it was told to accept connections, and has not stopped.
      lacks_listeners: whether it had no free file descriptor for the listening sockets.
    """

    def __init__(
        self, index: int, process: WorkerProcess, owner: HandleOwner, counters: Counters
    ) -> None:
        self.index: int = index
        self.process: WorkerProcess = process
        self.pid: int = process.pid
        self.state: HandleState = HandleState.STARTING
        self.batch: list[PendingJob] = []
        self.in_flight: dict[int, PendingJob] = {}
        self.limit: int = MAX_BATCH
        self.recent: int = 0
        self.resting: bool = False
        self.error: Exception | None = None
        self.ready: trio.Event = trio.Event()
        self.gone: trio.Event = trio.Event()
        self.started_at: float = math.inf
        self.last_heard: float = trio.current_time()
        self.idle_since: float = self.last_heard
        self.accepted: int = 0
        self.handled: int = 0
        self.failed: int = 0
        self.refusals: int = 0
        self.died_with_jobs: bool = False
        self._owner = owner
        self._counters = counters
        self._wants_more = True
        self._batch_id = 0
        self._expects_batch_answer = False
        self.batch_sent_at: float = math.inf
        # The batch stands for itself: there is one at most.
        self._outgoing: deque[bytes | AcceptPlan | None] = deque()
        self._outgoing_changed = trio.lowlevel.ParkingLot()
        self._changed = trio.lowlevel.ParkingLot()
        self._killed_for: str | None = None
        self._accepted_jobs: AcceptedJobs | None = None
        self._plan: AcceptPlan | None = None
        self._enough = math.inf
        self.is_accepting: bool = False
        self.lacks_listeners: bool = False

    def __repr__(self) -> str:
        return f"worker {self.index} (pid {self.pid})"

    ################################################################
    # For the queue and the supervisor
    ################################################################

    @property
    def jobs_in_hand(self) -> int:
        """The number of jobs that it was given, or has accepted, and has not finished."""
        return len(self.batch) + len(self.in_flight) + self._accepted_in_flight()

    def can_accept(self, max_in_flight: int) -> bool:
        """Whether it can be given a batch now."""
        return (
            self._wants_more
            and not self.batch
            and self.state is _READY
            and not self.resting
            and len(self.in_flight) + self._accepted_in_flight() < max_in_flight
        )

    def send_jobs(self, jobs: list[PendingJob]) -> None:
        """Send a batch; ``can_accept`` must be true."""
        self.batch = jobs
        self._wants_more = False
        # Mostly the sending task waits for something to send, and would only be woken for this.
        if not self._outgoing_changed or not self._send_batch_now():
            self._send_soon(None)

    def cancel_job(self, job_id: int) -> None:
        """Have the handler of a job cancelled."""
        self._send_soon(_protocol.pack_job_ids(_protocol.CANCEL, [job_id]))

    def kill(self, why: str) -> None:
        """Kill the worker; the first reason is the one that is told."""
        self._killed_for = self._killed_for or why
        self.process.kill()

    def drain(self, timeout: float, *, is_replaced: bool) -> None:
        """Have the worker finish its jobs and exit; its handlers are cancelled after ``timeout``.

        Of several timeouts, the one that passes first counts.

        Args:
          is_replaced: whether other workers go on, so that handlers can pass connections on.
        """
        if self.state is not HandleState.ENDED:
            self.state = HandleState.DRAINING
            self._send_soon(_protocol.pack_drain(timeout, is_replaced=is_replaced))

    async def leave(
        self, timeout: float, grace: float | None = None, *, is_replaced: bool = False
    ) -> None:
        """Drain the worker, and wait until it has ended; kill it if it does not end in time.

        It has ``grace`` seconds to exit: from its last job on, or from the end of ``timeout`` if
        it still has some then.

        Args:
          grace: default: EXIT_GRACE.
          is_replaced: as of ``drain``.
        """
        grace = EXIT_GRACE if grace is None else grace
        begin = trio.current_time()
        deadline = begin + timeout
        self.drain(timeout, is_replaced=is_replaced)
        while self.state is not HandleState.ENDED:
            limit = deadline
            self.sync_accepted()
            if not self.jobs_in_hand:
                limit = min(limit, max(begin, self.idle_since))
            with trio.move_on_at(limit + grace) as scope:
                await self._changed.park()
            late = trio.current_time() - (limit + grace)
            if scope.cancelled_caught and late > MAX_LATENESS:
                # This process did not run, and the worker may not have run either (a suspend,
                # SIGSTOP), or what it has sent is still unread.
                begin = trio.current_time()
                deadline += late
            elif scope.cancelled_caught:
                reason = f"did not exit within {grace:g} s after its last job or its deadline"
                # Another task may have said so, or why.
                level = logging.WARNING if self._killed_for is None else logging.DEBUG
                logger.log(level, "%r: %s, killing it", self, reason)
                self.kill(reason)
                await self.gone.wait()

    def _send_soon(self, item: bytes | AcceptPlan | None) -> None:
        self._outgoing.append(item)
        self._outgoing_changed.unpark()

    ################################################################
    # Connections that it accepts
    ################################################################

    def accept_from(self, plan: AcceptPlan, enough: float) -> None:
        """Have the worker accept connections.

        Args:
          enough: after how many it reports that.
        """
        self._plan, self._enough = plan, enough
        self.is_accepting, self.lacks_listeners = True, False
        self._send_soon(plan)

    async def stop_accepting(self) -> None:
        """Have the worker accept no more, and wait until it has closed the listening sockets.

        Until then it gets no jobs: a worker that does not run would keep them waiting.
        """
        if self.is_accepting:
            self.resting = True
            self._send_soon(encode_frame(_protocol.STOP))
        while self.is_accepting:
            await self._changed.park()

    def sync_accepted(self) -> None:
        """Count what the worker has accepted."""
        jobs = self._accepted_jobs
        if jobs is not None and self.state is not HandleState.ENDED:
            try:
                self._add(jobs.sync())
            except ProtocolError as exc:
                self._on_protocol_error(str(exc))

    def _add(self, progress: Progress) -> None:
        self.accepted += progress.accepted
        self.handled += progress.handled
        self.failed += progress.failed

    def accepted_progress(self) -> tuple[int, int]:
        """Return how many connections were accepted, and handled, since the last call of this."""
        return (0, 0) if self._accepted_jobs is None else self._accepted_jobs.progress()

    def _accepted_in_flight(self) -> int:
        return 0 if self._accepted_jobs is None else self._accepted_jobs.in_flight

    def _settle_accepted(self) -> list[PendingJob]:
        """Count everything after its end, and return the jobs that it was handling."""
        jobs = self._accepted_jobs
        if jobs is None:
            return []
        progress, lost = jobs.settle()
        jobs.close()
        self._add(progress)
        if handled := jobs.progress()[1]:
            self._owner.on_finished(self, handled)
        return lost

    async def _send_listeners(self, plan: AcceptPlan) -> None:
        conn, sent = self.process.conn, 0
        # Those that do not fit into one message with the log are sent before it.
        before = len(plan.listeners) - (_kernel.SCM_MAX_FD - 1)
        while not plan.is_over:
            fds = plan.fds()
            if -1 in fds:
                # The server notices that a listener is closed, too, and ends.
                return
            try:
                if sent < before:
                    some = fds[sent : min(before, sent + _kernel.SCM_MAX_FD)]
                    await conn.send_message(_protocol.pack_sockets(), fds=some)
                    sent += len(some)
                    continue
                if self._accepted_jobs is None:
                    self._accepted_jobs = AcceptedJobs(plan, self._enough, self._counters)
                jobs = self._accepted_jobs
                await conn.send_message(jobs.pack(), fds=[jobs.log.fd, *fds[sent:]])
            except OSError as exc:
                if exc.errno not in _kernel.OUT_OF_RESOURCES:
                    raise
                await trio.sleep(SEND_RETRY_DELAY)
            else:
                return

    ################################################################
    # Its life
    ################################################################

    @enable_ki_protection
    async def run(self) -> None:
        """Talk to the worker until it has ended. Nothing else ends this."""
        with trio.CancelScope(shield=True):
            try:
                await self._run()
            except Exception:
                logger.exception("%r: error in the pool, killing it", self)
                self._killed_for = self._killed_for or "was killed after an error in the pool"
            finally:
                self.process.kill()
                self._on_exit(await self._wait_for_exit())

    async def _wait_for_exit(self) -> int:
        """Wait until the process has ended, even if no resources are left for waiting now."""
        while True:
            try:
                return await self.process.wait()
            except Exception:
                # ENOMEM of epoll, or no thread can be started.
                logger.exception("%r: cannot wait for its process, trying again", self)
                await trio.sleep(WAIT_RETRY_DELAY)

    @enable_ki_protection
    async def _run(self) -> None:
        received = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_loop, name=f"trio_unixconn.pool send {self.index}")
            nursery.start_soon(
                self._receive_loop, received, name=f"trio_unixconn.pool receive {self.index}"
            )
            await self.process.wait()
            # Read what it has sent before. A child of the worker may hold the other end open.
            with contextlib.suppress(OSError):
                self.process.conn.socket.shutdown(trio.socket.SHUT_RD)
            await received.wait()
            nursery.cancel_scope.cancel()

    def _on_exit(self, status: int) -> None:
        """Settle or requeue the jobs of a worker that has ended."""
        self.state = HandleState.ENDED
        reason = describe_exit(status)
        if self._killed_for:
            reason = f"{self._killed_for}, and {reason}"
        if self.error is None and self.started_at == math.inf:
            self.error = WorkerStartError(f"{self!r} {reason} before it was ready")
        elif self.error is None:
            self.error = WorkerDiedError(f"{self!r} {reason}")
        batch, self.batch = self.batch, []
        in_flight, self.in_flight = self.in_flight, {}
        # Jobs that it has finished and could not report.
        finished = self.process.log.entries() if in_flight else set[int]()
        abandoned = self._settle_accepted()
        # At once, before another task can use the free file descriptors: a new worker needs them.
        self.process.close()
        self.is_accepting = False
        reported = len(abandoned)
        for job in in_flight.values():
            error = None
            if job.wants_answer:
                error = WorkerDiedError(f"{self.error} while it handled job {job.id}")
            if job.id in finished:
                self.handled += 1
                job.settle(JobEnd.HANDLED, error)
            else:
                abandoned.append(job)
                job.settle(JobEnd.ABANDONED, error)
        self.died_with_jobs = bool(batch or abandoned)
        if ended := len(in_flight) - (len(abandoned) - reported):
            self._owner.on_finished(self, ended)
        if batch:
            self._owner.requeue(batch, self.error, counts=True)
        self.ready.set()
        self.gone.set()
        self._changed.unpark_all()
        self._owner.on_exit(self)
        if abandoned:
            self._owner.on_abandoned(self, abandoned)

    ################################################################
    # Outgoing
    ################################################################

    @enable_ki_protection
    async def _send_loop(self) -> None:
        outgoing = self._outgoing
        while True:
            while not outgoing:
                await self._outgoing_changed.park()
            item = outgoing.popleft()
            try:
                if item is None:
                    await self._send_batch()
                elif isinstance(item, bytes):
                    await self.process.conn.send_all(item)
                else:
                    await self._send_listeners(item)
            except UnixConnectionError:
                # It has closed its end, and receives nothing any more. Usually it is exiting.
                await self._stop_using()

    def _pack_batch(self) -> tuple[bytes, list[int]]:
        fds = [job.fd for job in self.batch if job.fd >= 0]
        return _protocol.pack_jobs(self._batch_id, self.batch, carries_fds=bool(fds)), fds

    def _send_batch_now(self) -> bool:
        """Send the batch without the sending task; return False if that is needed."""
        self._batch_id += 1
        message, fds = self._pack_batch()
        try:
            sent = send_with_fds_nowait(self.process.conn, message, fds)
        except (trio.WouldBlock, UnixConnectionError):
            self._batch_id -= 1
            return False
        self._expects_batch_answer = True
        self.batch_sent_at = trio.current_time()
        if sent < len(message):
            self._send_soon(message[sent:])
        return True

    async def _send_batch(self) -> None:
        self._batch_id += 1
        self._expects_batch_answer = True
        while self.batch:
            message, fds = self._pack_batch()
            try:
                await self.process.conn.send_message(message, fds=fds)
            except OSError as exc:
                if exc.errno == errno.EBADF:
                    self._reject_closed()
                elif exc.errno in _kernel.OUT_OF_RESOURCES:
                    # Usually no file descriptor is free for the duplicates that wait.
                    await trio.sleep(SEND_RETRY_DELAY)
                else:
                    raise
            else:
                if self._expects_batch_answer:
                    self.batch_sent_at = trio.current_time()
                return
        # Nothing was sent, so the worker asks for nothing.
        self._expects_batch_answer = False
        self._wants_more = True
        self._owner.dispatch()

    def _reject_closed(self) -> None:
        """Reject jobs whose file descriptors were closed by code that does not own them."""
        closed: list[PendingJob] = []
        for job in self.batch:
            try:
                os.get_inheritable(job.fd)
            except OSError:
                if job.fd >= 0:
                    job.fd = -1
                    closed.append(job)
        self.batch = [job for job in self.batch if job not in closed]
        self._owner.reject(
            closed, "other code has closed its file descriptor, which the pool owns after submit"
        )

    ################################################################
    # Incoming
    ################################################################

    @enable_ki_protection
    async def _receive_loop(self, received: trio.Event) -> None:
        try:
            await self._receive()
        except (ConnectionBrokenError, ConnectionClosedError):
            # The same as the end of the stream.
            pass
        except (FrameError, UnixConnectionError) as exc:
            self._on_protocol_error(str(exc))
        except Exception:
            logger.exception("%r: error in the pool, killing it", self)
            self.kill("was killed after an error in the pool")
        received.set()
        await self._stop_using()

    async def _stop_using(self) -> None:
        """Kill a worker that has closed its connection, and does not exit."""
        if self.state is HandleState.READY:
            self.state = HandleState.DRAINING
        # When it has exited, this task is cancelled.
        await trio.sleep(EXIT_GRACE)
        self._on_protocol_error("it closed its connection and did not exit")
        await trio.sleep_forever()

    def _on_protocol_error(self, text: str) -> None:
        logger.error("%r: protocol error, killing it: %s", self, text)
        self.kill(f"violated the protocol ({text})")

    async def _receive(self) -> None:
        decoder = FrameDecoder()
        conn = self.process.conn
        try:
            while True:
                data, fds = await receive_with_fds(conn, CHUNK_SIZE)
                if not data:
                    return
                self._on_data(decoder, data, fds)
        finally:
            # It may have died within a frame with a connection.
            decoder.close()

    def _on_data(self, decoder: FrameDecoder, data: bytes, fds: list[int] | None) -> None:
        now = trio.current_time()
        try:
            frames: Sequence[Frame] = decoder.feed(data, fds)
        except FrameError as exc:
            # What it has sent before counts: handlers may have begun.
            self.last_heard = now
            for frame in exc.frames:
                if frame.kind != _protocol.PASS:
                    self._on_frame(frame)
            raise
        if frames or len(data) >= SIGN_OF_LIFE:
            self.last_heard = now
        for index, frame in enumerate(frames):
            try:
                self._on_frame(frame)
            except BaseException:
                close_frames(frames[index + 1 :])
                raise

    def _on_frame(self, frame: Frame) -> None:
        if frame.kind == _protocol.PASS:
            self._on_pass(frame)
            return
        handler = self._FRAME_HANDLERS.get(frame.kind)
        if handler is None or frame.fds != []:
            close_frames([frame])
            raise ProtocolError(
                f"expected a frame of a worker, got kind {frame.kind} with "
                f"{'some' if frame.fds is None else len(frame.fds)} file descriptors"
            )
        handler(self, frame.body)

    def _on_pass(self, frame: Frame) -> None:
        """Take a connection that a handler has passed on. Its job ends with this.

        Only if this process has no free file descriptor for it, the worker tries again.
        """
        try:
            job_id, data = _protocol.unpack_job_result(frame.body)
            accepted = self._accepted_jobs
            if accepted is None or not accepted.owns(job_id):
                accepted = None
                job = self._job(job_id, wants_answer=False)
                was_kind, peer, passed = job.kind, job.peer, job.passed
            else:
                found = accepted.find(job_id)
                was_kind, peer, passed = found.kind, found.peer, 0
            if frame.fds is None:
                # EMFILE here: the kernel has dropped the duplicate.
                self._send_soon(_protocol.pack_passed(job_id, PassVerdict.RETRY))
                return
            kind = None
            if len(frame.fds) == 1:
                if accepted is not None:
                    was_kind = accepted.kind_of(was_kind, frame.fds[0])
                kind = kind_of_passed(was_kind, frame.fds[0])
            if kind is None:
                raise ProtocolError(f"expected the connection of job {job_id}, got another file")
        except ProtocolError:
            close_frames([frame])
            raise
        verdict = PassVerdict.TAKEN
        if not self._owner.on_passed(frame.fds[0], kind, data, peer, passed):
            close_frames([frame])
            verdict = PassVerdict.CLOSED
        self._send_soon(_protocol.pack_passed(job_id, verdict))
        # The worker reports nothing more about it.
        if accepted is not None:
            accepted.note_passed(job_id)
            return
        self._finish(job_id, wants_answer=False).settle(JobEnd.HANDLED)
        self.handled += 1
        self._on_finished(1)

    def _on_ready(self, body: bytes) -> None:
        if self.started_at < math.inf or self.error is not None:
            raise ProtocolError("worker said twice whether it is ready")
        mismatch = _protocol.check_ready(body)
        if mismatch is not None:
            self.error = WorkerStartError(f"{self!r} could not start: {mismatch}")
            self.kill("was started with another version")
        elif self.state is HandleState.STARTING:
            self.state = HandleState.READY
            self.started_at = self.idle_since = self.last_heard
        self.ready.set()

    def _on_failed_to_start(self, body: bytes) -> None:
        if self.started_at < math.inf or self.error is not None:
            raise ProtocolError("worker said twice whether it is ready")
        text = body.decode(errors="replace")
        self.error = WorkerStartError(f"worker {self.index} could not start", text)
        self.ready.set()

    def _on_taken(self, body: bytes) -> None:
        jobs = self._take_batch(body)
        now, index, pid, in_flight = self.last_heard, self.index, self.pid, self.in_flight
        self._counters.wait.add_each([now - job.submitted_at for job in jobs])
        for job in jobs:
            in_flight[job.id] = job
            job.acknowledge(index, pid, now)
            if job.wants_answer and job.raise_cancel is not None:
                self.cancel_job(job.id)
        self.accepted += len(jobs)
        self.limit = min(MAX_BATCH, 2 * self.limit)
        self._owner.on_acknowledged(self, len(jobs))

    def _on_refused(self, body: bytes) -> None:
        jobs = self._take_batch(body)
        self._wants_more = True
        if self.state is HandleState.DRAINING:
            self._owner.requeue(
                jobs, WorkerDiedError(f"{self!r} was draining when they arrived"), counts=False
            )
        else:
            self.refusals += 1
            # Rest before the jobs are queued again, so that they do not return at once. A job
            # that was not alone in its batch may have been refused because of the others.
            self.resting = True
            self.limit = 1
            error = WorkerDiedError(
                f"{self!r} had no free file descriptor to receive it (RLIMIT_NOFILE)"
            )
            # One worker is one attempt, even if it refuses a job again and again: it can have a
            # free file descriptor later, or it is replaced.
            counts = len(jobs) == 1 and self.pid not in jobs[0].refused_by
            if counts:
                jobs[0].refused_by += (self.pid,)
            self._owner.requeue(jobs, error, counts=counts)
            self._owner.on_refused(self)
        self._changed.unpark_all()

    def _take_batch(self, body: bytes) -> list[PendingJob]:
        batch_id = _protocol.unpack_batch_id(body)
        if batch_id != self._batch_id or not self._expects_batch_answer:
            raise ProtocolError(f"got an answer to batch {batch_id}, which is not outstanding")
        self._expects_batch_answer = False
        self.batch_sent_at = math.inf
        jobs, self.batch = self.batch, []
        return jobs

    def _on_more(self, _: bytes) -> None:
        if self.batch or self._wants_more:
            raise ProtocolError("worker asked for more before it acknowledged a batch")
        self._wants_more = True
        self._owner.dispatch()

    def _on_done(self, body: bytes) -> None:
        ids = _protocol.unpack_job_ids(body)
        now, in_flight = self.last_heard, self.in_flight
        times: list[float] = []
        try:
            for job_id in ids:
                # As _finish(), for many.
                job = in_flight.get(job_id)
                if job is None or job.wants_answer:
                    job = self._job(job_id, wants_answer=False)
                del in_flight[job_id]
                times.append(now - job.acknowledged_at)
                job.settle(_HANDLED)
        finally:
            self._counters.handling.add_each(times)
        self.handled += len(ids)
        self._on_finished(len(ids))

    def _on_answer(self, body: bytes) -> None:
        job_id, answer = _protocol.unpack_job_result(body)
        self._finish(job_id, wants_answer=True).settle(JobEnd.HANDLED, answer)
        self.handled += 1
        self._on_finished(1)

    def _on_error(self, body: bytes) -> None:
        job_id, said = _protocol.unpack_job_result(body)
        text = said.decode(errors="replace")
        if self._accepted_jobs is not None and self._accepted_jobs.owns(job_id):
            self._on_accepted_error(self._accepted_jobs, job_id, text, said)
            return
        job = self._finish(job_id, wants_answer=None)
        error = None
        if job.wants_answer:
            error = HandlerError(f"the handler of job {job_id} failed", text)
        job.settle(JobEnd.FAILED, error)
        self.failed += 1
        self._owner.on_failed(
            self,
            job_id,
            text,
            awaited=job.wants_answer,
            cancelled=said == _protocol.CANCELLED_BY_EXIT,
        )
        self._on_finished(0)

    def _on_accepted_error(self, jobs: AcceptedJobs, job_id: int, text: str, said: bytes) -> None:
        cancelled = said == _protocol.CANCELLED_BY_EXIT
        if cancelled:
            jobs.note_cancelled(job_id)
        else:
            # It is counted in the log.
            jobs.check(job_id)
        self._owner.on_failed(self, job_id, text, awaited=False, cancelled=cancelled)

    def _job(self, job_id: int, *, wants_answer: bool | None) -> PendingJob:
        job = self.in_flight.get(job_id)
        if job is None:
            raise ProtocolError(f"job {job_id} is not in flight")
        if wants_answer is not None and job.wants_answer != wants_answer:
            raise ProtocolError(f"job {job_id} expects {'an' if job.wants_answer else 'no'} answer")
        return job

    def _finish(self, job_id: int, *, wants_answer: bool | None) -> PendingJob:
        job = self._job(job_id, wants_answer=wants_answer)
        del self.in_flight[job_id]
        self._counters.handling.add(self.last_heard - job.acknowledged_at)
        return job

    def _on_finished(self, count: int) -> None:
        if not self.in_flight:
            self.idle_since = self.last_heard
            self._changed.unpark_all()
        self._owner.on_finished(self, count)

    def _on_stopped(self, _: bytes) -> None:
        if self._plan is None:
            raise ProtocolError("worker stopped accepting, and was not told to accept")
        self.is_accepting = self.resting = False
        self._changed.unpark_all()
        self._owner.dispatch()

    def _on_starved(self, body: bytes) -> None:
        if self._plan is None:
            raise ProtocolError("worker cannot accept, and was not told to")
        self.lacks_listeners = not _protocol.unpack_starved(body)
        if self.lacks_listeners and self._plan.is_over:
            self.is_accepting = False
            self._changed.unpark_all()
        self.refusals += 1
        self.resting = True
        self._owner.on_refused(self)

    def _on_enough(self, _: bytes) -> None:
        self.sync_accepted()
        self._owner.on_enough(self)

    def _on_idle(self, _: bytes) -> None:
        self.idle_since = self.last_heard
        self.sync_accepted()
        self._changed.unpark_all()

    def _on_leaving(self, _: bytes) -> None:
        self._owner.on_leaving(self)

    def _on_beat(self, _: bytes) -> None:
        """Do nothing: the time was noted when it arrived."""

    # Pyright takes the first argument for Self, which is not WorkerHandle here.
    _FRAME_HANDLERS: Final[Mapping[int, Callable[[Any, bytes], None]]] = {
        _protocol.TAKEN: _on_taken,
        _protocol.REFUSED: _on_refused,
        _protocol.DONE: _on_done,
        _protocol.ANSWER: _on_answer,
        _protocol.ERROR: _on_error,
        _protocol.READY: _on_ready,
        _protocol.FAILED: _on_failed_to_start,
        _protocol.LEAVING: _on_leaving,
        _protocol.MORE: _on_more,
        _protocol.BEAT: _on_beat,
        _protocol.STOPPED: _on_stopped,
        _protocol.STARVED: _on_starved,
        _protocol.ENOUGH: _on_enough,
        _protocol.IDLE: _on_idle,
    }
