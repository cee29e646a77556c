"""WorkerPool: jobs in, acknowledgements and answers out; and the block in which it lives.

Invariant: a job belongs to its submitter until its source was detached, and to the pool
afterwards. Each submitter is told once what became of it. When the block has ended, no worker is
left.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

import trio
from trio.lowlevel import enable_ki_protection

from .._cancellable import is_current_run
from .._owner import DescriptorOwner
from .._trio_task import check_task
from ..errors import JobRefusedError, PoolClosedError
from ._config import PoolConfig, checked_timeout
from ._endpoints import (
    EndpointKind,
    Submittable,
    checked_data,
    detach_endpoint,
    pack_peer,
    peer_name,
)
from ._handle import HandleState
from ._pending import JobReceipt, JobState, PendingJob
from ._process import FdReserve
from ._statistics import PoolStatistics, WorkerStatistics, memory_of
from ._supervisor import Supervisor

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._buffers import Buffer
    from ._config import WorkerPoolOptions
    from ._queue import JobQueue


class WorkerPool(DescriptorOwner):
    """Worker processes that get jobs; :func:`open_worker_pool` makes one."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._queue = supervisor.queue
        self._counters = supervisor.counters
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.get_ident()

    ################################################################
    # Jobs
    ################################################################

    @enable_ki_protection
    async def submit(
        self, source: Submittable, *, data: Buffer = b"", worker: int | None = None
    ) -> JobReceipt:
        """Submit a stream, socket, file or file descriptor to the least busy worker.

        This takes ownership of ``source`` immediately, even if it later fails: the object is
        detached or closed, or, if it is an int, the number is not the caller's any more. The
        exceptions are invalid arguments, another thread or trio.run than the pool's, and a closed
        pool. They leave ``source`` untouched.

        If this is cancelled while the job is queued, no handler is called. If it is cancelled after
        the job was sent to a worker, it waits for the acknowledgement, and returns.

        Args:
          source: a connected stream socket in any form, or a file that is open for reading or
            writing. A Python file is flushed and closed. What it has read into its buffer is lost,
            so submit files that were not read from.
          data: up to 16 MiB, which the handler gets as ``job.data``.
          worker: the index of the worker that must have it. If that worker is replaced, its
            successor has the index. Default: any worker.

        Returns:
          Which worker has accepted the job.

        Raises:
          TypeError: an argument of a wrong type.
          ValueError: an invalid argument.
          OSError: EBADF, ``source`` is a number that is not open; or flushing a file has failed.
          WrongDescriptorKindError: ``source`` is of a kind that no handler can get.
          RuntimeError: this is not the thread, or not the trio.run, of the pool.
          PoolClosedError: the pool accepts no more jobs.
          JobRefusedError: ``max_attempts`` workers died, or had no free file descriptor, before
            they acknowledged it; or the pool ended before; or there is no worker of this index
            any more.
        """
        if source is None:  # pyright: ignore[reportUnnecessaryComparison]
            raise TypeError("source must be a stream, socket, file or file descriptor, got None")
        receipt: JobReceipt = await self._run_job(source, data, worker, wants_answer=False)
        return receipt

    @enable_ki_protection
    async def call(
        self,
        source: Submittable | None = None,
        *,
        data: Buffer = b"",
        worker: int | None = None,
        timeout: float | None = None,
    ) -> bytes:
        """Submit a job to a worker, and wait for the bytes that its handler returns.

        As :meth:`submit`. Without a source, the stream of the handler is None. If this is cancelled
        after the handler was called, the handler is cancelled, and this returns when it has ended.

        Args:
          timeout: the time in seconds after which this is cancelled. Default: no limit.

        Raises:
          trio.TooSlowError: the timeout has passed.
          HandlerError: the handler raised, or did not return bytes.
          WorkerDiedError: its worker died while it was handling the job, which is not retried.
          All that :meth:`submit` raises.
        """
        self._check_run()
        with trio.fail_after(math.inf if timeout is None else checked_timeout(timeout)):
            answer: bytes = await self._run_job(source, data, worker, wants_answer=True)
        return answer

    async def _run_job(
        self, source: Submittable | None, data: Buffer, worker: int | None, *, wants_answer: bool
    ) -> Any:
        self._check_run()
        self._queue.check_open()
        if worker is not None:
            worker = self._checked_worker(worker)
        job_data = checked_data(data)
        fd, kind = -1, EndpointKind.NONE
        if source is not None:
            fd, kind = await detach_endpoint(source)
        job = PendingJob(
            next(self._supervisor.ids),
            fd,
            kind,
            self._counters,
            trio.current_time(),
            job_data,
            worker=worker,
            wants_answer=wants_answer,
        )
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            await self._queue.reserve(worker)
        except PoolClosedError as exc:
            job.close()
            # PoolClosedError says that the source is untouched.
            raise JobRefusedError(f"job {job.id} rejected: {exc}") from exc
        except BaseException:
            job.close()
            raise
        self._queue.put(job)
        if worker is not None:
            self._supervisor.reject_pinned()
        return await job.wait(self._cancel)

    def _cancel(self, job: PendingJob) -> bool:
        """Take a job back if no worker has it; otherwise have its handler cancelled."""
        if job.state is JobState.QUEUED:
            self._queue.cancel(job)
            # A drain may have waited for it.
            self._supervisor.notify_if_idle()
            return True
        if job.state is JobState.ACKNOWLEDGED:
            for handle in self._supervisor.handles():
                if job.id in handle.in_flight:
                    handle.cancel_job(job.id)
        return False

    def _checked_worker(self, worker: int) -> int:
        count = len(self._supervisor.slots)
        if isinstance(worker, bool) or not hasattr(worker, "__index__"):
            raise TypeError(f"worker must be an int or None, got {type(worker).__name__}")
        index = operator.index(worker)
        if not 0 <= index < count:
            raise ValueError(f"worker must be the index of a worker, below {count}, got {index}")
        return index

    def _check_run(self) -> None:
        if not is_current_run(self._token):
            if threading.get_ident() == self._thread:
                check_task()
            raise RuntimeError(
                "this pool belongs to another thread or trio.run; from a thread, call it with "
                "trio.from_thread.run"
            )

    ################################################################
    # Workers
    ################################################################

    async def restart(self) -> None:
        """Replace the workers with new ones, which import the handler again.

        All new workers are ready before an old one leaves. The old ones finish the jobs that they
        have, for at most ``drain_timeout``.

        Raises:
          WorkerStartError: a new worker could not start. The old ones go on, all of them.
          PoolClosedError: the pool accepts no more jobs.
        """
        self._check_run()
        await self._supervisor.restart()

    async def scale(self, workers: int) -> None:
        """Change the number of workers. Those that are too many finish the jobs that they have.

        Raises:
          TypeError: ``workers`` is not an int.
          ValueError: ``workers`` is less than 1.
          WorkerStartError: a new worker could not start; there are as many as before.
          PoolClosedError: the pool accepts no more jobs.
        """
        self._check_run()
        if isinstance(workers, bool) or not hasattr(workers, "__index__"):
            raise TypeError(f"workers must be an int, got {type(workers).__name__}")
        if operator.index(workers) < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        await self._supervisor.scale(operator.index(workers))

    async def drain(self, timeout: float | None = None) -> None:
        """Shut down gracefully: accept no more jobs, finish those that there are, end the workers.

        Args:
          timeout: the time in seconds after which handlers that still run are cancelled and jobs
            that are still queued are rejected. Default: ``drain_timeout``.

        Raises:
          TypeError: ``timeout`` is not a number; the pool goes on.
          ValueError: ``timeout`` is negative; the pool goes on.
        """
        self._check_run()
        await self._supervisor.drain(None if timeout is None else checked_timeout(timeout))

    ################################################################
    # Statistics
    ################################################################

    def __repr__(self) -> str:
        handles = list(self._supervisor.handles())
        return (
            f"<WorkerPool {self._supervisor.options.handler} {self._supervisor.state}: "
            f"{len(handles)} workers, {sum(each.jobs_in_hand for each in handles)} jobs in flight, "
            f"{len(self._queue)} queued>"
        )

    def statistics(self) -> PoolStatistics:
        """Return what the pool has done since its beginning, and what it is doing."""
        self._supervisor.sync_accepted()
        restarts = {id(slot.handle): slot.restarts for slot in self._supervisor.slots}
        now, oldest = trio.current_time(), self._queue.oldest_submitted_at()
        workers = tuple(
            WorkerStatistics(
                index=handle.index,
                pid=handle.pid,
                state=("starting" if handle.state is HandleState.ENDED else handle.state.value),
                in_flight=handle.jobs_in_hand,
                handled=handle.handled,
                failed=handle.failed,
                refusals=handle.refusals,
                restarts=restarts.get(id(handle), 0),
                memory=memory_of(handle.pid),
                age=max(0.0, now - handle.started_at),
            )
            for handle in self._supervisor.handles()
        )
        ready = sum(each.state == HandleState.READY.value for each in workers)
        return PoolStatistics(
            state=self._supervisor.state,
            capacity=ready * self._supervisor.options.max_in_flight,
            workers=workers,
            queued=len(self._queue),
            queue_age=0.0 if oldest is None else now - oldest,
            in_flight=sum(each.in_flight for each in workers),
            **self._counters.values(),
        )


def queue_of(pool: WorkerPool) -> JobQueue:
    return pool._queue


def config_of(pool: WorkerPool) -> PoolConfig:
    return pool._supervisor.options


def supervisor_of(pool: WorkerPool) -> Supervisor:
    return pool._supervisor


async def wait_worker_exit(pool: WorkerPool) -> None:
    """Wait until the process of a worker has exited."""
    await pool._supervisor.wait_exit()


def check_run(pool: WorkerPool) -> None:
    """Raise RuntimeError unless this is the thread and the trio.run of a pool."""
    pool._check_run()


def put_accepted(pool: WorkerPool, accepted: Iterable[tuple[int, Any]], kind: EndpointKind) -> None:
    """Queue accepted sockets for which the caller has reserved slots.

    Args:
      accepted: file descriptors, which the pool owns afterwards, and the addresses of the peers.
    """
    now, counters, ids = trio.current_time(), pool._counters, pool._supervisor.ids
    queue_of(pool).put_many(
        [
            PendingJob(next(ids), fd, kind, counters, now, peer=pack_peer(kind, name))
            for fd, name in accepted
        ]
    )


def put_received(
    pool: WorkerPool, received: Iterable[tuple[int, EndpointKind, bytes, int]]
) -> None:
    """Queue connections that another generation has passed on, for which slots are reserved.

    Args:
      received: file descriptors, which the pool owns afterwards, with their kinds, their data and
        how many times they were passed on.
    """
    now, counters, ids = trio.current_time(), pool._counters, pool._supervisor.ids
    queue_of(pool).put_many(
        [
            PendingJob(next(ids), fd, kind, counters, now, data, peer=peer_name(fd), passed=passed)
            for fd, kind, data, passed in received
        ]
    )


def set_successor(
    pool: WorkerPool, pass_on: Callable[[int, EndpointKind, bytes, int], bool]
) -> None:
    """Have the connections of a pool passed on to the next generation when it drains."""
    pool._supervisor.successor = pass_on


@asynccontextmanager
@enable_ki_protection
async def open_worker_pool(
    handler: str, **options: Unpack[WorkerPoolOptions]
) -> AsyncGenerator[WorkerPool, None]:
    """Start worker processes that receive file descriptors, and run a handler on each.

    A worker is a fresh interpreter (or with ``preload`` the fork of a fresh one), with the import
    path of this one, that imports the handler. All
    workers are ready when the block is entered. At its end the pool drains. If the block is left by
    an exception or a cancellation, handlers are cancelled, and have a second to clean up::

        async with open_worker_pool("package.module:handler", workers=4) as pool:
            await pool.submit(stream)

    with, in ``package/module.py``::

        async def handler(stream, job): ...

    The stream is a ``trio.SocketStream``, a :class:`UnixConnection`, or an open file, which
    blocks; it is closed when the handler returns. ``job`` is a :class:`Job`.

    Args:
      handler: ``"package.module:name"`` of an async function of a stream and a job.
      workers: the number of workers; default: the number of CPUs that this process can use, by
        its affinity and the CPU quota of its cgroups.
      setup: ``"package.module:name"`` of a function that returns an async context manager, in
        which each worker runs; what it yields is ``job.state``. If the function requires an
        argument, it gets a :class:`WorkerInfo`.
      setup_data: bytes that the setup gets as ``WorkerInfo.data``, for what must not be in the
        environment or in a file.
      max_in_flight: the maximum number of jobs that each worker handles at a time.
      max_queue: the maximum number of jobs in the queue of the pool; if it is full, ``submit``
        waits. Jobs that are pinned to a worker have a queue of the same size for each worker.
      max_attempts: the number of workers that may die before they acknowledge a job, or have no
        free file descriptor for it, until the job is rejected.
      max_jobs: a worker is replaced after it has accepted so many jobs. This and the next two vary
        by 10 % at random from worker to worker, so that not all are replaced at once. If a new
        worker cannot start, the old one goes on, and that is retried later.
      max_age: a worker is replaced when it is so old, in seconds.
      max_memory: a worker is replaced when its resident set is larger, in bytes. This includes
        pages that it shares with other processes. It is compared about once a second, in workers
        that are at least ten seconds old.
      start_timeout: the time in seconds in which a worker must be ready. As many workers start at a
        time as there are processors, at least two. The time of each begins when its process does.
      handler_timeout: the time in seconds after which a handler is cancelled, and its job fails.
        Default: no limit.
      hang_timeout: the time in seconds after which a worker without a heartbeat is killed and
        replaced. A handler that computes without a checkpoint stops the heartbeat. ``math.inf``:
        never.
      drain_timeout: the time in seconds in which a worker that leaves, or all workers of a drain,
        must finish their jobs. Handlers that still run are cancelled then.
      crash_limit: the pool ends when so many consecutive workers of one index have crashed. Only
        those count that died before they were ready, or while they had no job. A worker that dies
        with jobs is always replaced. A job that is handled, or a life of ten seconds, clears the
        count. The pauses before a start grow from 50 ms to ten seconds.
      on_abandoned: called with an :class:`AbandonedJob` for each job that was being handled when
        its worker died. Such jobs are also logged, under ``trio_unixconn.pool``, and counted. An
        exception out of it is logged.
      executable: the Python interpreter that runs the workers; default: this one, with its
        options (``-I``, ``-O``, ``-X``, ``-W`` and so on). Required in a frozen program.
      environment: variables to set in the workers, in addition to those of this process and in
        place of those with the same name; None removes a variable.
      cpu_affinity: numbers of CPUs. Worker i runs only on ``cpu_affinity[i % len(cpu_affinity)]``.
        Default: the affinity of this process.
      nice: this is added to the nice value of the workers.
      resource_limits: maps limits, by name (``"RLIMIT_NOFILE"``) or number, to pairs of soft and
        hard limit; -1 is unlimited. As the CPUs and the nice value, they are set before the
        handler is imported.
      kill_process_group: kill the process group of a worker when the worker has ended, in whatever
        way, and with it the processes that its handlers have started and not ended. A process that
        has left the group (``start_new_session``) is not killed. Default: such processes go on.
      proxy_protocol: "v1", "v2" or "any": each connection begins with a header of this version of
        the PROXY protocol, which a balancer sends before the client's bytes. The worker reads it
        before the handler is called, which has it as ``job.proxy``, and the client as ``job.peer``.
        A connection without a valid and complete header (within five seconds, of at most 4,096
        bytes) is closed, and its job has failed. Default: no connection has one.
      proxy_from: the networks whose hosts may send such headers, for example ``["10.1.0.0/16"]``;
        required with ``proxy_protocol``. Connections from others are closed. A Unix socket has no
        network: there the policy of the listener decides.
      preload: names of modules. A process that has imported trio and these modules, the template,
        forks the workers, which starts many of them in a fraction of the time; they import the
        handler afterwards. The modules must not start threads or open files that a fork cannot
        share. A new template is started by ``restart``, when the file of a module that it has
        imported has changed, and when the process of the pool would pass on something else
        (environment, import path, working directory, user, limits and so on). If a template cannot
        fork, that is logged, and workers are started as without it. ``["trio"]`` is the least.
        Default: no template.

    Raises:
      TypeError: an option of a wrong type; nothing was started.
      ValueError: an invalid option; nothing was started.
      RuntimeError: this process was itself started as a worker, because ``sys.executable`` is not a
        Python interpreter.
      NotSupportedError: ``cpu_affinity`` or ``preload`` is not available on this platform.
      WorkerStartError: a worker could not start; with its traceback.
      ExceptionGroup: ``crash_limit`` was reached; with the causes.
    """
    config = PoolConfig(handler, **options)
    check_task()
    raised: BaseException | None = None
    with closing(FdReserve()) as reserve:
        async with trio.open_nursery() as nursery:
            supervisor = Supervisor(config, nursery, reserve)
            try:
                await supervisor.open()
                yield WorkerPool(supervisor)
                await supervisor.drain()
            except BaseException as exc:  # raised below, not in a nursery's group
                raised = exc
                try:
                    await supervisor.abort()
                except KeyboardInterrupt as again:
                    raised = again
            nursery.cancel_scope.cancel()
    if supervisor.failure is not None:
        raise supervisor.failure
    if raised is not None:
        raise raised
