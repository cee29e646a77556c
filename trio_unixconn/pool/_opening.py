"""open_worker_pool: the block in which a pool lives.

The rule of this file: when the block has ended, however it ended, no worker is left.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING

import trio

from ._options import PoolOptions
from ._pool import WorkerPool
from ._reserve import Reserve
from ._supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from ._statistics import AbandonedJob


@asynccontextmanager
async def open_worker_pool(
    handler: str,
    *,
    workers: int | None = None,
    setup: str | None = None,
    max_in_flight: int = 1000,
    max_queue: int = 1000,
    max_tries: int = 3,
    max_jobs: int | None = None,
    start_timeout: float = 60,
    hang_timeout: float = 10,
    drain_timeout: float = 30,
    crash_limit: int = 5,
    on_abandoned: Callable[[AbandonedJob], None] | None = None,
) -> AsyncGenerator[WorkerPool, None]:
    """Start worker processes that get descriptors, and run a handler on each.

    A worker is a fresh interpreter, with this one's import path, that imports the handler. All
    are ready when the block is entered. At its end the pool drains; if the block is left by an
    exception or a cancellation, handlers are cancelled and have a second to clean up in::

        async with open_worker_pool("package.module:handler", workers=4) as pool:
            await pool.submit(stream)

    with, in ``package/module.py``::

        async def handler(stream, job): ...

    The stream is a ``trio.SocketStream``, a :class:`UnixConnection`, or an open file, which
    blocks; it is closed when the handler returns. ``job`` is a :class:`Job`.

    Args:
      handler: ``"package.module:name"`` of an async function of a stream and a job.
      workers: how many; one for each processor that this process may use if left out.
      setup: ``"package.module:name"`` of a function that returns an async context manager, in
        which each worker lives; what it yields is ``job.state``.
      max_in_flight: how many jobs each worker handles at a time.
      max_queue: how many jobs may wait in the pool; then ``submit`` waits.
      max_tries: how many workers may die, or lack descriptors, before they acknowledge a job,
        until it is given up.
      max_jobs: a worker is replaced when it has taken so many, or a few more.
      start_timeout: seconds that a worker may take to be ready.
      hang_timeout: seconds after which a worker that says nothing is killed and replaced. A
        handler that computes for as long without a checkpoint is such a one. ``math.inf`` for
        never.
      drain_timeout: seconds that jobs may take to finish in when a worker, or all, are to end.
      crash_limit: when so many workers in turn have died at one place without having finished
        a job, or having lived for ten seconds, the pool ends.
      on_abandoned: called for each job that was being handled when its worker died; such jobs
        are also logged, under ``trio_unixconn.pool``, and counted.

    Raises:
      TypeError, ValueError: something that cannot be; nothing was started.
      WorkerStartError: a worker could not be started; with its traceback.
      ExceptionGroup: of the causes, when workers died again and again.
    """
    options = PoolOptions(
        handler,
        workers=workers,
        setup=setup,
        max_in_flight=max_in_flight,
        max_queue=max_queue,
        max_tries=max_tries,
        max_jobs=max_jobs,
        start_timeout=start_timeout,
        hang_timeout=hang_timeout,
        drain_timeout=drain_timeout,
        crash_limit=crash_limit,
        on_abandoned=on_abandoned,
    )
    raised: BaseException | None = None
    with closing(Reserve()) as reserve:
        async with trio.open_nursery() as nursery:
            supervisor = Supervisor(options, nursery, reserve)
            try:
                await supervisor.open()
                yield WorkerPool(supervisor)
                await supervisor.drain()
            except BaseException as exc:  # noqa: BLE001 - raised below, not in a nursery's group
                raised = exc
                await supervisor.abort()
            supervisor.kill()
            nursery.cancel_scope.cancel()
    if supervisor.failure is not None:
        raise supervisor.failure
    if raised is not None:
        raise raised
