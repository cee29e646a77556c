"""What ``trio-unixconn serve`` does until it has drained.

Invariant: a restart or a reload that fails does not end the server; only a signal, or workers that
cannot start, do.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Sequence
from contextlib import (
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
    suppress,
)
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio
from rich.console import Console, ConsoleDimensions, RenderableType
from rich.live import Live

from ..._version import __version__
from ...errors import PoolClosedError, UpgradeFailedError, WorkerStartError
from ...handover import Phase
from ...pool import WorkerServer, serve_agent_check, serve_statistics
from ...pool._pool import wait_worker_exit
from ...pool._server import serve_when_ready, serve_with_workers
from .._console import Signalled, heard_signals
from .binds import UnixOptions, check_paths, close_all, has_path, name_of, open_all, open_all_in
from .children import reap_adopted_children
from .log import Log, Screen, logger, start_log
from .notify import GenerationNotifier, Notifier, find_service_manager
from .pid_file import pid_file
from .status import Sample, Sampler
from .table import render
from .upgrades import claim_streams, opened_generation, set_workers, workers_of

if TYPE_CHECKING:
    from ...handover import Generation, GenerationListener
    from ...pool import WorkerPoolOptions
    from ...pool._server import AcceptMode
    from ...systemd import ServiceManager
    from .binds import Bind, Listener
    from .directory import WorkingDirectory
    from .log import LogFormat
    from .pid_file import PidFile
    from .upgrades import UpgradeOptions

# Seconds between two pictures of the table.
_REFRESH: Final = 0.25
# A terminal and a program around this one both send a signal: within so many seconds, a second one
# is the same one.
SAME_SIGNAL: Final = 1.0
# Seconds between two records of jobs that workers did not finish.
_REPORT: Final = 0.5
_STOP: Final = ("SIGINT", "SIGTERM")
_CHANGES: Final = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGTTIN", "SIGTTOU")
SIGNALS: Final = (*_STOP, "SIGQUIT", *_CHANGES)


@attrs.frozen(kw_only=True)
class ServeConfig:
    """What was asked for.

    Attributes:
      handler: what is served: a handler, or an ASGI application.
      worker_handler: the handler that the workers import.
      unix_options: what Unix sockets of ``binds`` get.
      accept: which process accepts, as of :func:`serve_with_workers`.
      stats, agent_check: where statistics and agent checks of HAProxy are answered.
      drain_delay: how long connections are still accepted after a signal to drain, in seconds.
      reload: whether changed files restart the workers.
      table: whether the status is shown as a table.
      reload_include, reload_exclude: which files matter, as of :class:`ReloadFilter`.
      max_draining: how many old workers may be draining while new ones start.
      directory: where the workers run, if that may be another after a restart.
      upgrades: how the server is replaced; None if it cannot be.
      pid_file: the path of a file with the process id.
      notify: whether the service manager is told what happens, if there is one.
      log_file, log_format, log_level: as of :class:`Log`.
    """

    handler: str
    worker_handler: str
    binds: Sequence[Bind]
    unix_options: UnixOptions
    options: WorkerPoolOptions
    accept: AcceptMode
    stats: Sequence[Bind]
    agent_check: Sequence[Bind]
    drain_delay: float
    reload: bool
    table: bool
    reload_include: Sequence[str]
    reload_exclude: Sequence[str]
    max_draining: int
    directory: WorkingDirectory | None
    upgrades: UpgradeOptions | None
    pid_file: str | None
    notify: bool
    log_file: str | None
    log_format: LogFormat
    log_level: int


async def serve_until_told(config: ServeConfig) -> None:
    """Serve until a signal asks for a drain, and the drain has ended.

    Raises:
      Signalled: a signal arrived before the workers were ready, or a second one.
      OSError: it cannot listen where it should.
      WorkerStartError: as of :func:`open_worker_pool`.
      ExceptionGroup: as of :func:`open_worker_pool`.
    """
    claim_streams()
    log = start_log(
        file=config.log_file,
        form=config.log_format,
        level=config.log_level,
        table=config.table,
    )
    try:
        logger.info("trio-unixconn %s serves %s (pid %d)", __version__, config.handler, os.getpid())
        # Before any worker is started, which would inherit the variables.
        manager = find_service_manager(is_wanted=config.notify)
        await _Service(config, log, manager).run()
    finally:
        log.ended_jobs.report()
        log.stop()


class _Service:
    def __init__(self, config: ServeConfig, log: Log, manager: ServiceManager) -> None:
        self._config = config
        self._log = log
        self._manager = manager
        # Whether another server may be the one that serves.
        self._may_inherit = config.upgrades is not None and config.upgrades.may_inherit
        self._notifier = Notifier(manager, speaks=not self._may_inherit)
        self._generation: Generation | None = None
        self._pid_file: PidFile | None = None
        self._showing = trio.CancelScope()
        self._begun = trio.current_time()
        self._addresses: list[str] = []
        self._server: WorkerServer | None = None
        # One that waits is enough: it brings in all that has changed until then.
        self._asked, self._requests = trio.open_memory_channel[str](1)
        # How many workers there are to be, and when that was changed.
        self._workers = 0
        self._resize = trio.Event()
        self._stopped_at = -math.inf
        self._waits_for_workers = True
        self._delay = trio.CancelScope()
        # What makes sense as long as there are new connections.
        self._while_open = trio.CancelScope()

    async def run(self) -> None:
        async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
            await nursery.start(self._heed_signals)
            nursery.start_soon(self._report_ended_jobs)
            nursery.start_soon(self._notifier.run, self._is_healthy)
            nursery.start_soon(self._notifier.extend_timeouts, self._is_waiting)
            self._notifier.status("starting")
            if self._config.table and not self._may_inherit:
                nursery.start_soon(self._show)
            if self._config.reload:
                # Before the workers import anything.
                await nursery.start(self._watch)
            async with self._opened_generation(), trio.open_nursery() as serving:
                server = await self._start_server(nursery, serving, stack)
                self._server = server
                self._waits_for_workers = False
                self._workers = _count(server)
                nursery.start_soon(reap_adopted_children, self._child_pids)
                logger.info("ready: %s", _workers(server))
                if self._generation is None:
                    self._notifier.ready(self._status())
                else:
                    nursery.start_soon(self._follow, self._generation, nursery, stack)
                nursery.start_soon(self._stay_up_to_date, server)
            # It has drained.
            await self._notifier.flush()
            nursery.cancel_scope.cancel()
        self._log.ended_jobs.report()
        pool = server.statistics()
        if self._generation is not None and (upgrade := self._generation.replaced_by) is not None:
            logger.info(
                "upgraded: generation %d (pid %d) after %.3f seconds, %d listeners, %d connections "
                "passed on",
                upgrade.number,
                upgrade.pid,
                upgrade.seconds,
                len(self._generation.listeners),
                self._generation.passed_on,
            )
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

    async def _start_server(
        self, nursery: trio.Nursery, serving: trio.Nursery, stack: AsyncExitStack
    ) -> WorkerServer:
        """Listen and start workers, in the order that fits."""
        handler, options = self._config.worker_handler, self._config.options
        accept = self._config.accept
        serve: Callable[..., Awaitable[None]]
        listen = partial(self._listen, nursery, stack)
        if self._generation is not None:
            found = await self._listen_in(self._generation, nursery, stack)
            options = {**options, "workers": workers_of(self._generation, options.get("workers"))}
            generation = self._generation
            serve = partial(serve_with_workers, handler, found, generation=generation, **options)
        elif self._config.unix_options.replace:
            # A path is the other server's, which goes on if the workers cannot start.
            await self._answer_checks(nursery, stack, lambda bind: not has_path(bind))
            serve = partial(
                serve_when_ready, handler, partial(listen, has_path), accept=accept, **options
            )
        else:
            # Clients that connect early wait, and what cannot be bound is known at once. The server
            # owns the listeners, whether it starts or not.
            listeners = await listen(lambda _: True)
            serve = partial(serve_with_workers, handler, listeners, accept=accept, **options)
        server: WorkerServer = await serving.start(serve)
        return server

    async def _listen(
        self, nursery: trio.Nursery, stack: AsyncExitStack, checks: Callable[[Bind], bool]
    ) -> Sequence[Listener]:
        """Take everything that clients and operators find this server by.

        Args:
          checks: at which places statistics and agent checks are answered from now on.
        """
        config = self._config
        options, replace = config.unix_options, config.unix_options.replace
        listeners: list[Listener] = []
        rest = config.binds
        if replace:
            # First what can be undone: if it fails, the other server still has everything.
            await check_paths(rest, options)
            await check_paths([*config.stats, *config.agent_check], self._check_options())
            listeners = await open_all([each for each in rest if not has_path(each)], options)
            rest = list(filter(has_path, rest))
        try:
            self._pid_file = stack.enter_context(pid_file(config.pid_file, replace=replace))
            await self._answer_checks(nursery, stack, checks)
            listeners += await open_all(rest, options)
        except BaseException:
            await close_all(listeners)
            raise
        self._addresses = [name_of(each) for each in listeners]
        for name in self._addresses:
            logger.info("listening at %s", name)
        return listeners

    async def _listen_in(
        self, generation: Generation, nursery: trio.Nursery, stack: AsyncExitStack
    ) -> Sequence[GenerationListener[Any]]:
        """Open or inherit everything that clients and operators find this server by."""
        config = self._config
        if generation.number == 1:
            self._pid_file = stack.enter_context(pid_file(config.pid_file))
        listeners = await open_all_in(generation, config.binds, config.unix_options)
        self._addresses = [name_of(each) for each in listeners]
        # All of them, before one is served: then the generation has all its listeners.
        options = UnixOptions(receive_descriptors=False)
        statistics = await open_all_in(generation, config.stats, options)
        checks = await open_all_in(generation, config.agent_check, options)
        for what, found in (
            ("listening", listeners),
            ("statistics", statistics),
            ("agent checks", checks),
        ):
            for each in found:
                inherited = " (inherited)" if each.inherited else ""
                logger.info("%s at %s%s", what, name_of(each), inherited)
        if statistics:
            nursery.start_soon(serve_statistics, self._get_server, statistics)
        if checks:
            nursery.start_soon(serve_agent_check, self._get_server, checks)
        set_workers(generation, config.options.get("workers"), lambda: self._workers)
        return listeners

    def _is_waiting(self) -> bool:
        """Whether workers start, or a successor does."""
        is_upgrading = self._generation is not None and self._generation.phase is Phase.HANDING_OVER
        return self._waits_for_workers or is_upgrading

    def _get_server(self) -> WorkerServer | None:
        return self._server

    ################################################################
    # Generations
    ################################################################

    @asynccontextmanager
    async def _opened_generation(self) -> AsyncGenerator[None, None]:
        """Be a generation in this block, if this server can be replaced."""
        options = self._config.upgrades
        if options is None:
            yield
            return
        told = None
        if self._manager:
            told = GenerationNotifier(self._notifier, self._manager, self._status)
        async with opened_generation(options, told, self._log.originals) as self._generation:
            if self._generation.number == 1:
                self._notifier.speak()
            yield

    async def _follow(
        self, generation: Generation, nursery: trio.Nursery, stack: AsyncExitStack
    ) -> None:
        """Take the place of the generation before, and give way to the next one."""
        await generation.confirmed()
        if generation.number > 1:
            logger.info("generation %d serves (pid %d)", generation.number, os.getpid())
            try:
                self._pid_file = stack.enter_context(pid_file(self._config.pid_file, replace=True))
            except OSError as exc:
                logger.error("%s: %s; the server goes on", exc.filename, exc.strerror)
        if self._config.table and self._may_inherit:
            nursery.start_soon(self._show)
        await generation.replaced()
        self._while_open.cancel()
        self._showing.cancel()
        self._notifier.silence()
        if self._pid_file is not None:
            self._pid_file.is_owned = False
        if self._server is not None:
            pool = self._server.statistics()
            logger.info(
                "replaced by generation %d, draining %d running and %d queued jobs (signal twice "
                "to exit immediately)",
                generation.number + 1,
                pool.in_flight,
                pool.queued,
            )
        await generation.overdue()
        logger.warning("too many generations drain, cancelling what still runs")

    async def _upgrade(self) -> None:
        generation = self._generation
        if generation is None:
            logger.info("received SIGUSR2, which upgrades with --upgrade-socket: ignored")
            return
        logger.info("received SIGUSR2, starting a successor")
        try:
            await generation.upgrade()
        except UpgradeFailedError as exc:
            logger.error("upgrade failed: %s", exc)

    def _child_pids(self) -> set[int]:
        """Return the process ids of the children that are reaped elsewhere."""
        assert self._server is not None  # only called when it has started
        pids = _pids(self._server)
        if self._generation is not None and self._generation.successor_pid is not None:
            pids.add(self._generation.successor_pid)
        return pids

    def _check_options(self) -> UnixOptions:
        """Return what sockets get that answer with statistics or agent checks."""
        return UnixOptions(replace=self._config.unix_options.replace, receive_descriptors=False)

    async def _answer_checks(
        self, nursery: trio.Nursery, stack: AsyncExitStack, wanted: Callable[[Bind], bool]
    ) -> None:
        """Answer with statistics, and agent checks, until the end of this server."""
        config = self._config
        options = self._check_options()
        for what, binds, serve in (
            ("statistics", config.stats, serve_statistics),
            ("agent checks", config.agent_check, serve_agent_check),
        ):
            listeners = await open_all(list(filter(wanted, binds)), options)
            for each in listeners:
                stack.push_async_exit(each)
                logger.info("%s at %s", what, name_of(each))
            if listeners:
                nursery.start_soon(serve, self._get_server, listeners)

    async def _report_ended_jobs(self) -> None:
        while True:
            await trio.sleep(_REPORT)
            self._log.ended_jobs.report()

    ################################################################
    # What is asked for meanwhile
    ################################################################

    async def _heed_signals(
        self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        heard = heard_signals(SIGNALS)
        if not heard:
            task_status.started()
            return
        try:
            with trio.open_signal_receiver(*heard) as signals:
                async with trio.open_nursery() as nursery:
                    task_status.started()
                    await self._heed(signals, nursery)
        finally:
            # What is left takes a moment, and its exit status is certain.
            ignore_signals()

    async def _heed(self, signals: AsyncIterable[int], nursery: trio.Nursery) -> None:
        async for number in signals:
            name = signal.Signals(number).name
            if name in _STOP:
                self._stop(number, nursery)
            elif name == "SIGQUIT":
                raise Signalled(number)
            elif name == "SIGHUP":
                self._ask_for_restart(name)
            elif name == "SIGUSR1":
                self._log.reopen()
            elif name == "SIGUSR2":
                nursery.start_soon(self._upgrade)
            else:
                self._resize_by(1 if name == "SIGTTIN" else -1, name)

    def _stop(self, number: int, nursery: trio.Nursery) -> None:
        now, server, name = trio.current_time(), self._server, signal.Signals(number).name
        if server is None:
            raise Signalled(number)
        delay = self._config.drain_delay
        if self._generation is not None and self._generation.phase is Phase.RELEASED:
            # It drains already.
            if self._stopped_at == -math.inf:
                self._stopped_at = now
                logger.info(
                    "received %s, draining already (signal again to exit immediately)", name
                )
            elif now - self._stopped_at > SAME_SIGNAL:
                raise Signalled(number)
            return
        if not self._while_open.cancel_called:
            self._while_open.cancel()
            self._notifier.stopping(f"received {name}, draining")
            self._stopped_at = now
            if not delay:
                self._drain(server, f"received {name}")
                return
            logger.info(
                "received %s, not ready any more, accepting for %g seconds (signal again to drain "
                "now)",
                name,
                delay,
            )
            server.drain(delay=delay)
            nursery.start_soon(self._drain_later, server, delay)
        elif now - self._stopped_at <= SAME_SIGNAL:
            pass
        elif delay and not self._delay.cancel_called:
            self._stopped_at = now
            self._delay.cancel()
            self._drain(server, f"received {name}")
        else:
            raise Signalled(number)

    async def _drain_later(self, server: WorkerServer, delay: float) -> None:
        with self._delay:
            await trio.sleep(delay)
            self._delay.cancel()
            self._drain(server, "the drain delay has passed")

    def _drain(self, server: WorkerServer, why: str) -> None:
        pool = server.statistics()
        logger.info(
            "%s, draining %d running and %d queued jobs (signal again to exit immediately)",
            why,
            pool.in_flight,
            pool.queued,
        )
        server.drain()

    def _ask_for_restart(self, why: str) -> None:
        if self._while_open.cancel_called:
            logger.info("%s: draining, the workers are not restarted", why)
            return
        try:
            self._asked.send_nowait(why)
        except trio.WouldBlock:
            logger.info("%s: a restart is waiting already", why)

    def _resize_by(self, change: int, name: str) -> None:
        if self._server is None or self._while_open.cancel_called:
            logger.info("received %s: not serving, the number of workers stays", name)
        elif self._workers + change < 1:
            logger.info("received %s: the last worker stays", name)
        else:
            self._workers += change
            logger.info("received %s: changing to %d workers", name, self._workers)
            self._resize.set()

    async def _stay_up_to_date(self, server: WorkerServer) -> None:
        with self._while_open:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_size, server)
                async for why in self._requests:
                    await self._restart(server, why)

    async def _keep_size(self, server: WorkerServer) -> None:
        while True:
            await self._resize.wait()
            self._resize = trio.Event()
            wanted = self._workers
            try:
                await server.pool.scale(wanted)
            except (WorkerStartError, PoolClosedError) as exc:
                self._workers = _count(server)
                logger.error("cannot change to %d workers: %s", wanted, exc)
            else:
                logger.info("changed: %s", _workers(server))
                self._notifier.status(self._status())

    async def _restart(self, server: WorkerServer, why: str) -> None:
        self._notifier.reloading(f"restarting the workers ({why})")
        failure = ""
        self._waits_for_workers = True
        await self._wait_for_old_workers(server, why)
        logger.info("%s: restarting the workers", why)
        try:
            with self._entered_directory():
                await server.pool.restart()
        except WorkerStartError as exc:
            failure = "; the last restart failed, the old workers go on"
            logger.error("%s\nthe old workers go on", exc)
        except OSError as exc:
            failure = "; the last restart failed, the old workers go on"
            logger.error("%s: %s; the old workers go on", exc.filename, exc.strerror)
        except PoolClosedError as exc:
            # What has closed it ends the server, too.
            logger.info("%s: %s", why, exc)
        else:
            logger.info("restarted: %s", _workers(server))
        self._waits_for_workers = False
        # As systemd expects, even if it has failed: the server serves.
        self._notifier.ready(self._status() + failure)

    def _status(self) -> str:
        return f"{self._workers} workers at {', '.join(self._addresses)}"

    async def _is_healthy(self) -> bool:
        """Whether a worker can handle connections; the event loop runs, or this would not."""
        await trio.lowlevel.checkpoint()
        if self._server is None or self._while_open.cancel_called:
            return True
        return any(each.state == "ready" for each in self._server.statistics().workers)

    def _entered_directory(self) -> AbstractContextManager[object]:
        directory = self._config.directory
        return nullcontext() if directory is None else directory.entered()

    async def _wait_for_old_workers(self, server: WorkerServer, why: str) -> None:
        """Wait until a restart leaves at most ``max_draining`` old workers."""
        limit = self._config.max_draining

        def too_many() -> bool:
            draining = sum(each.state == "draining" for each in server.statistics().workers)
            return draining > 0 and draining + _count(server) > limit

        if too_many():
            logger.info("%s: waiting for old workers to exit (--max-draining %d)", why, limit)
        while too_many():
            await wait_worker_exit(server.pool)

    async def _watch(self, task_status: trio.TaskStatus[None]) -> None:
        """Ask for a restart after each change, from the moment that this is started."""
        from .reload import ReloadFilter, directories_of, watch  # for development

        def failed(why: str) -> None:
            logger.warning("not watching: %s", why)

        config = self._config
        try:
            directories = directories_of(config.handler)
        except OSError as exc:
            failed(str(exc))
            task_status.started()
            return
        logger.info("watching %s", ", ".join(directories))
        await watch(
            directories,
            ReloadFilter(directories, config.reload_include, config.reload_exclude),
            lambda names: self._ask_for_restart(f"changed: {', '.join(names)}"),
            failed,
            task_status=task_status,
        )

    ################################################################
    # The table
    ################################################################

    async def _show(self) -> None:
        try:
            with self._showing:
                await self._show_until_gone()
        except Exception:  # of rich, about this terminal
            logger.exception("cannot show the table; from now on there are only lines")
        finally:
            self._log.leave_table()

    async def _show_until_gone(self) -> None:
        terminal, sampler = self._log.terminal, Sampler()
        console = Console(file=Screen(self._log), force_terminal=True)  # type: ignore[arg-type]
        with Live(
            console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        ) as live:
            try:
                while not terminal.is_gone:  # pragma: no branch - it ends with its terminal
                    # A terminal that is stalled (Ctrl-S) gets no more pictures.
                    if terminal.is_idle:
                        self._draw(live, sampler)
                    await trio.sleep(_REFRESH)
            finally:
                self._draw(live, sampler)

    def _draw(self, live: Live, sampler: Sampler) -> None:
        with suppress(OSError):
            live.console.size = ConsoleDimensions(*os.get_terminal_size(self._log.terminal_fd))
        if (lines := self._log.take()) is not None:
            # As it is: not folded, which would be in the way of copying.
            live.console.print(lines, soft_wrap=True)
        live.update(self._picture(sampler), refresh=True)

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


def _count(server: WorkerServer) -> int:
    """Return the number of workers, without old ones that drain."""
    return sum(each.state != "draining" for each in server.statistics().workers)


def _pids(server: WorkerServer) -> set[int]:
    return {each.pid for each in server.statistics().workers}


def _workers(server: WorkerServer) -> str:
    ready = [each.pid for each in server.statistics().workers if each.state == "ready"]
    return f"workers {', '.join(map(str, ready))}"


def _do_nothing(_: int, __: FrameType | None) -> None:
    """Handle a signal that must not end the process."""


def catch_signals() -> None:
    """Have the signals that only change something end this process at no time.

    Not before it listens to them, and not when it has ended to. A function, unlike SIG_IGN, is not
    inherited by the workers.
    """
    for number in heard_signals(_CHANGES):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _do_nothing)


def ignore_signals() -> None:
    """Ignore all signals from now on: Python removes other handlers before it exits."""
    for number in heard_signals(SIGNALS):
        signal.signal(number, signal.SIG_IGN)


def is_terminal() -> bool:
    """Whether a table can be shown on standard output."""
    return os.isatty(1) and os.environ.get("TERM") not in (None, "dumb", "unknown")
