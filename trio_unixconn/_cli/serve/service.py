"""What ``trio-unixconn serve`` does until it has drained.

Invariant: a restart or a reload that fails does not end the server; only a signal, or workers that
cannot start, do.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs
import trio
from rich.console import Console, RenderableType
from rich.live import Live

from ..._listener import open_unix_listener
from ..._version import __version__
from ...errors import WorkerStartError
from ...pool import WorkerServer, serve_statistics, serve_with_workers
from .._console import Signalled, heard_signals
from .binds import name_of, open_all
from .log import LogLines, log_to, logger
from .status import Sample, Sampler
from .table import render

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Sequence

    from ..._address import UnixSocketAddress
    from ..._listener import UnixListener
    from ...pool import WorkerPoolOptions
    from .binds import Bind

# Seconds between two pictures of the table.
_REFRESH: Final = 0.25
_HUP: Final = getattr(signal, "SIGHUP", None)


@attrs.frozen(kw_only=True)
class ServeConfig:
    """What was asked for.

    Attributes:
      mode: the permission bits of paths.
      stats_socket: where the statistics are to be had.
      reload: whether changed files restart the workers.
      table: whether the status is shown as a table.
    """

    handler: str
    binds: Sequence[Bind]
    mode: int
    options: WorkerPoolOptions
    stats_socket: UnixSocketAddress | None
    reload: bool
    table: bool


async def serve_until_told(config: ServeConfig) -> None:
    """Serve until a signal asks for a drain, and the drain has ended.

    Raises:
      Signalled: a signal arrived before the workers were ready, or a second one.
      OSError: it cannot listen where it should.
      WorkerStartError, ExceptionGroup: as of :func:`open_worker_pool`.
    """
    console = Console() if config.table else None
    lines = log_to(console)
    logger.info("trio-unixconn %s serves %s (pid %d)", __version__, config.handler, os.getpid())
    try:
        await _Service(config, console, lines).run()
    finally:
        lines.flush()


class _Service:
    def __init__(self, config: ServeConfig, console: Console | None, lines: LogLines) -> None:
        self._config = config
        self._console = console
        self._lines = lines
        self._begun = trio.current_time()
        self._addresses: list[str] = []
        self._server: WorkerServer | None = None
        # One that waits is enough: it brings in all that has changed until then.
        self._asked, self._requests = trio.open_memory_channel[str](1)
        # What makes sense as long as there are new connections.
        self._while_open = trio.CancelScope()

    async def run(self) -> None:
        async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
            await nursery.start(self._heed_signals)
            if self._console is not None:
                nursery.start_soon(self._show, self._console)
            stats = await self._open_stats(stack)
            listeners = await open_all(self._config.binds, self._config.mode)
            self._addresses = [name_of(each) for each in listeners]
            for name in self._addresses:
                logger.info("listening at %s", name)
            async with trio.open_nursery() as serving:
                # The server owns the listeners from here on, whether it starts or not.
                server: WorkerServer = await serving.start(
                    partial(
                        serve_with_workers, self._config.handler, listeners, **self._config.options
                    )
                )
                self._server = server
                logger.info("ready: %s", _workers(server))
                if stats is not None:
                    nursery.start_soon(serve_statistics, server, stats)
                nursery.start_soon(self._stay_up_to_date, server)
            # It has drained.
            nursery.cancel_scope.cancel()
        pool = server.statistics()
        logger.info(
            "drained: %d accepted, %d denied, %d handled, %d failed, %d abandoned, %d rejected; "
            "up for %.1f seconds",
            server.accepted,
            server.denied,
            pool.handled,
            pool.failed,
            pool.abandoned,
            pool.rejected,
            trio.current_time() - self._begun,
        )

    async def _open_stats(self, stack: AsyncExitStack) -> UnixListener | None:
        address = self._config.stats_socket
        if address is None:
            return None
        listener = await open_unix_listener(address, receive_descriptors=False)
        stack.push_async_exit(listener)
        logger.info("statistics at %s", name_of(listener))
        return listener

    ################################################################
    # What is asked for meanwhile
    ################################################################

    async def _heed_signals(
        self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        heard = heard_signals()
        if not heard:
            task_status.started()
            return
        with trio.open_signal_receiver(*heard) as signals:
            task_status.started()
            await self._heed(signals)

    async def _heed(self, signals: AsyncIterable[int]) -> None:
        async for number in signals:
            if number == _HUP:
                self._ask_for_restart("SIGHUP")
            elif self._server is None or self._while_open.cancel_called:
                raise Signalled(number)
            else:
                self._drain(self._server, signal.Signals(number).name)

    def _drain(self, server: WorkerServer, why: str) -> None:
        pool = server.statistics()
        logger.info(
            "%s: draining, with %d in flight and %d queued; a second signal ends at once",
            why,
            pool.in_flight,
            pool.queued,
        )
        self._while_open.cancel()
        server.drain()

    def _ask_for_restart(self, why: str) -> None:
        try:
            self._asked.send_nowait(why)
        except trio.WouldBlock:
            logger.info("%s: a restart is waiting already", why)

    async def _stay_up_to_date(self, server: WorkerServer) -> None:
        with self._while_open:
            async with trio.open_nursery() as nursery:
                if self._config.reload:
                    nursery.start_soon(self._watch)
                async for why in self._requests:
                    await self._restart(server, why)

    async def _restart(self, server: WorkerServer, why: str) -> None:
        logger.info("%s: restarting the workers", why)
        try:
            await server.pool.restart()
        except WorkerStartError as exc:
            logger.error("%s\nthe old workers go on", exc)
        else:
            logger.info("restarted: %s", _workers(server))

    async def _watch(self) -> None:
        from .reload import directories_of, watch  # noqa: PLC0415 - for development only

        directories = directories_of(self._config.handler)
        logger.info("watching %s", ", ".join(directories))
        await watch(
            directories, lambda names: self._ask_for_restart(f"changed: {', '.join(names)}")
        )

    ################################################################
    # The table
    ################################################################

    async def _show(self, console: Console) -> None:
        sampler = Sampler()
        with Live(console=console, auto_refresh=False) as live:
            try:
                while True:
                    self._lines.flush()
                    live.update(self._picture(sampler), refresh=True)
                    await trio.sleep(_REFRESH)
            finally:
                self._lines.flush()
                live.update(self._picture(sampler))

    def _picture(self, sampler: Sampler) -> RenderableType:
        server = self._server
        if server is None:
            return f"{self._config.handler}, starting"
        now = trio.current_time()
        sample = Sample(now, server.statistics(), server.accepted, server.denied)
        return render(
            sampler.take(sample),
            title=self._config.handler,
            addresses=self._addresses,
            uptime=now - self._begun,
            drains=self._while_open.cancel_called,
        )


def _workers(server: WorkerServer) -> str:
    ready = [each.pid for each in server.statistics().workers if each.state == "ready"]
    return f"workers {', '.join(map(str, ready))}"


def is_terminal() -> bool:
    """Whether a table can be shown on standard output."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in (None, "dumb", "unknown")
