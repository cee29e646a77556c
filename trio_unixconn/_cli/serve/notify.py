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
    """Tells a service manager what happens; a task sends it."""

    def __init__(self, manager: ServiceManager) -> None:
        self._manager = manager
        self._is_stopping = False
        self._outgoing, self._messages = trio.open_memory_channel[
            "Callable[[], Awaitable[object]]"
        ](math.inf)

    def ready(self, status: str) -> None:
        """Say that the workers are ready, or that a restart has ended."""
        self._tell(partial(self._manager.ready, _one_line(status)))

    def reloading(self, status: str) -> None:
        """Say that a restart begins."""
        self._tell(partial(self._manager.reloading, _one_line(status)))

    def stopping(self, status: str) -> None:
        """Say that a drain begins; from then on nothing else is said."""
        self._tell(partial(self._manager.stopping, _one_line(status)))
        self._is_stopping = True

    def status(self, text: str) -> None:
        """Describe the state of the server."""
        self._tell(partial(self._manager.status, _one_line(text)))

    def _tell(self, message: Callable[[], Awaitable[object]]) -> None:
        if not self._is_stopping:
            self._outgoing.send_nowait(message)

    async def run(self, check: HealthCheck) -> None:
        """Send messages and heartbeats until cancelled."""
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
        sent = trio.Event()

        async def set_sent() -> None:
            sent.set()
            await trio.lowlevel.checkpoint()

        with trio.move_on_after(_FLUSH_TIMEOUT):
            self._outgoing.send_nowait(set_sent)
            await sent.wait()


def _one_line(text: str) -> str:
    return escaped(text)[:_MAX_STATUS]
