"""``--notify``: what the service manager, such as systemd, is told about a server.

Invariant: a manager that is gone, or does not read its messages, neither ends the server nor delays
it. Messages are sent in the order in which things happened, and none follows STOPPING=1.

Sources: sd_notify(3), systemd.service(5) (``Type=notify-reload``, ``WatchdogSec=``)
"""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from ..._address import escaped
from ...errors import NotSupportedError
from ...systemd import ServiceManager
from .log import logger

if TYPE_CHECKING:
    from ...systemd import HealthCheck

# How long a message waits while the queue of the manager is full, in seconds.
SEND_TIMEOUT: Final = 5.0
# The time between two requests for more time, in seconds.
EXTEND_INTERVAL: Final = 5.0
# How long the end of the server waits for messages that were not sent, in seconds.
_FLUSH_TIMEOUT: Final = 1.0
# The characters of a status; systemd ignores messages that are too long.
_MAX_STATUS: Final = 1000


def find_service_manager(*, is_wanted: bool) -> ServiceManager:
    """Return the manager that the environment names; one that does nothing if none is wanted."""
    if not is_wanted:
        return ServiceManager()
    try:
        return ServiceManager.from_environ(os.environ)
    except (ValueError, NotSupportedError) as exc:
        logger.warning("not notifying the service manager: %s", exc)
        return ServiceManager()


class Notifier:
    """Tells a service manager what happens; a task sends it.

    Args:
      speaks: whether this process speaks for the service from the beginning.
    """

    def __init__(self, manager: ServiceManager, *, speaks: bool = True) -> None:
        self._manager = manager
        self._is_silent = False
        # Set while this process speaks for the service.
        self._speaks = trio.Event()
        if speaks:
            self._speaks.set()
        self._running = trio.CancelScope()
        # Restarts and upgrades that are in progress.
        self._reloads = 0
        self._outgoing, self._messages = trio.open_memory_channel[
            "Callable[[], Awaitable[object]]"
        ](math.inf)

    def speak(self) -> None:
        """Begin to speak for the service."""
        self._speaks.set()

    def silence(self) -> None:
        """Say nothing any more: another process speaks for the service."""
        self._is_silent = True
        self._running.cancel()

    def ready(self, status: str) -> None:
        """Say that the workers are ready, or that a restart or an upgrade has ended."""
        self._reloads = max(0, self._reloads - 1)
        if self._reloads:
            # The other one has not ended.
            self.status(status)
        else:
            self._tell(partial(self._manager.ready, _one_line(status)))

    def reloading(self, status: str) -> None:
        """Say that a restart or an upgrade begins."""
        self._reloads += 1
        self._tell(partial(self._manager.reloading, _one_line(status)))

    def stopping(self, status: str) -> None:
        """Say that a drain begins; from then on nothing else is said."""
        self._tell(partial(self._manager.stopping, _one_line(status)))
        self._is_silent = True

    async def extend_timeouts(self, is_waiting: Callable[[], bool]) -> None:
        """Ask for more time to start or to reload, while workers start, until cancelled.

        The pool limits that time (``start_timeout``), for each worker. With many of them it can be
        longer than the manager waits by default.
        """
        while True:
            await trio.sleep(EXTEND_INTERVAL)
            if is_waiting():
                self._tell(partial(self._manager.extend_timeout, 3 * EXTEND_INTERVAL))

    def status(self, text: str) -> None:
        """Describe the state of the server."""
        self._tell(partial(self._manager.status, _one_line(text)))

    def _tell(self, message: Callable[[], Awaitable[object]]) -> None:
        if self._speaks.is_set() and not self._is_silent:
            self._outgoing.send_nowait(message)

    async def run(self, check: HealthCheck) -> None:
        """Send messages and heartbeats until cancelled, or silenced."""
        with self._running:
            await self._speaks.wait()
            try:
                async with self._manager.watchdog(check):
                    await self._send_messages()
            except OSError as exc:
                logger.warning("no heartbeats to the service manager: %s", exc.strerror)
                await self._send_messages()

    async def _send_messages(self) -> None:
        async for message in self._messages:
            with trio.move_on_after(SEND_TIMEOUT) as scope:
                try:
                    await message()
                except OSError as exc:
                    logger.warning("cannot notify the service manager: %s", exc)
            if scope.cancelled_caught:
                logger.warning(
                    "the service manager has not read its messages for %g seconds", SEND_TIMEOUT
                )

    async def flush(self) -> None:
        """Wait until everything is sent, for a second at the most."""
        with trio.move_on_after(_FLUSH_TIMEOUT):
            await self._in_order(trio.lowlevel.checkpoint)

    async def main_pid(self, pid: int | None) -> None:
        """Say which process is the main one, after all that was said before."""
        await self._in_order(partial(self._manager.main_pid, pid))

    async def barrier(self) -> None:
        """Wait until the manager has processed all that was said before."""
        await self._in_order(self._manager.barrier)

    async def _in_order(self, function: Callable[[], Awaitable[object]]) -> None:
        """Call a function when everything is sent, and wait for that."""
        if self._running.cancel_called or not self._speaks.is_set():
            return
        done = trio.Event()

        async def call() -> None:
            try:
                await function()
            finally:
                done.set()

        self._outgoing.send_nowait(call)
        await done.wait()


class GenerationNotifier:
    """What a generation tells the service manager, in the order in which a server does.

    Args:
      status: returns the status of the server.
    """

    def __init__(
        self, notifier: Notifier, manager: ServiceManager, status: Callable[[], str]
    ) -> None:
        self._notifier = notifier
        self._manager = manager
        self._status = status
        self._is_upgrading = False

    @property
    def address(self) -> str | None:
        """Of the manager's socket."""
        return self._manager.address

    @property
    def watchdog_timeout(self) -> float | None:
        """Within how many seconds it expects a heartbeat."""
        return self._manager.watchdog_timeout

    async def ready(self) -> None:
        """Say that this process serves, or that an upgrade has failed."""
        self._notifier.speak()
        failed = "; the last upgrade failed, the old process goes on" if self._is_upgrading else ""
        self._is_upgrading = False
        self._notifier.ready(self._status() + failed)
        await trio.lowlevel.checkpoint()

    async def reloading(self) -> None:
        """Say that an upgrade begins."""
        self._is_upgrading = True
        self._notifier.reloading("upgrading")
        await trio.lowlevel.checkpoint()

    async def stopping(self) -> None:
        """Do nothing: the server says so when its drain begins."""
        await trio.lowlevel.checkpoint()

    async def main_pid(self, pid: int | None = None) -> None:
        """Say which process is the main one."""
        if pid == os.getpid():
            self._notifier.speak()
        await self._notifier.main_pid(pid)

    async def barrier(self) -> None:
        """Wait until the manager has processed all that was said before."""
        await self._notifier.barrier()


def _one_line(text: str) -> str:
    return escaped(text)[:_MAX_STATUS]
