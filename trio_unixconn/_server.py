"""serve_unix: a task for each connection, until it is asked to stop.

The rule of this file: a connection that was accepted is handled, or closed because a policy
denies it or the deadline of a drain has passed; nothing else ends one.

Sources: accept(2), trio.serve_listeners
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from . import _kernel
from ._accept import ACCEPT_RETRY_DELAY
from ._listener import UnixListener, open_unix_listener, remove_path
from ._owner import DescriptorOwner
from ._policy import admit_or_close
from .errors import NotSupportedError

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

if TYPE_CHECKING:
    import os

    from ._address import UnixSocketAddress
    from ._connection import UnixConnection
    from ._policy import PeerPolicy

logger: Final = logging.getLogger("trio_unixconn")

Handler = Callable[["UnixConnection"], Awaitable[Any]]


@attrs.define(eq=False)
class UnixServer(DescriptorOwner):
    """A server that :func:`serve_unix` runs: what it counts, and how it is asked to stop.

    Attributes:
      listener: where it accepts connections; closed once the server drains.
      connections: how many connections it has at this moment, those that a policy is being
        asked about among them.
      accepted: how many it has accepted.
      denied: how many of those a policy has denied, its own or the listener's.
      crashed: how many handlers, or checks of a policy, have ended with an exception that was
        logged.
      drained: set when a drain has come to its end.
    """

    listener: UnixListener
    connections: int = 0
    accepted: int = 0
    denied: int = 0
    crashed: int = 0
    drained: trio.Event = attrs.field(factory=trio.Event)
    _handler: Handler = attrs.field(alias="handler", kw_only=True, repr=False)
    _policy: PeerPolicy | None = attrs.field(alias="policy", kw_only=True, repr=False)
    _logs_errors: bool = attrs.field(alias="logs_errors", kw_only=True, repr=False)
    _slots: trio.CapacityLimiter = attrs.field(alias="slots", kw_only=True, repr=False)
    _accepting: trio.CancelScope = attrs.field(factory=trio.CancelScope, repr=False)
    _handling: trio.CancelScope = attrs.field(factory=trio.CancelScope, repr=False)

    def drain(self, timeout: float = math.inf) -> None:
        """Ask the server to stop: no new connections, and the handlers finish.

        The path is taken away first, and connections that waited in the listener's queue then
        are still handled, so that no client is turned away in the middle. After that
        :func:`serve_unix` returns. Asking again can only make the deadline earlier.

        Where the name stays (it is abstract, or the listener has ``unlink_on_close=False``),
        clients can connect until the queue is empty for a moment, or as many were handled as
        it can hold; whoever waits in it then is reset. The queue of a listener that was made
        from a descriptor is left to the others who hold it.

        Args:
          timeout: after so many seconds, handlers that are still at work are cancelled.

        Raises:
          ValueError: a timeout that is negative, or no number.
        """
        if not timeout >= 0:
            raise ValueError(f"a timeout of 0 or more seconds is due, not {timeout}")
        self._handling.deadline = min(self._handling.deadline, trio.current_time() + timeout)
        self._accepting.cancel()

    async def _serve(self, task_status: trio.TaskStatus[UnixServer]) -> None:
        with self._handling:
            async with trio.open_nursery() as handlers:
                with self._accepting:
                    task_status.started(self)
                    while True:
                        await self._next(handlers)
                # Only a drain ends that loop without an exception.
                await remove_path(self.listener)
                await self._handle_waiting(handlers)
                await self.listener.aclose()
        self.drained.set()

    async def _next(self, handlers: trio.Nursery) -> None:
        """Accept one connection, once a slot is free, and start its handler."""
        slot = object()
        await self._slots.acquire_on_behalf_of(slot)
        try:
            conn = await self._accept()
        except BaseException:
            self._slots.release_on_behalf_of(slot)
            raise
        self._start(handlers, conn, slot)

    async def _accept(self) -> UnixConnection:
        was_said = False
        while True:
            try:
                # The listener's policy is asked by the handler's task: a drain turns away nobody
                # about whom it is still being asked.
                return await self.listener._accept_any()  # noqa: SLF001 - as above
            except OSError as exc:
                if exc.errno not in _kernel.OUT_OF_RESOURCES:
                    raise
                if not was_said:
                    logger.exception(
                        "%s: cannot accept connections now; trying again every %s seconds",
                        self.listener.get_local_address(),
                        ACCEPT_RETRY_DELAY,
                    )
                was_said = True
            await trio.sleep(ACCEPT_RETRY_DELAY)

    async def _handle_waiting(self, handlers: trio.Nursery) -> None:
        """Handle those that waited in the queue when nobody new could connect any more."""
        # More were not in the queue. An abstract name cannot be taken away, and its clients may
        # go on connecting for ever.
        left = self.listener._longest_queue  # noqa: SLF001 - as above
        while left:
            slot = object()
            await self._slots.acquire_on_behalf_of(slot)
            try:
                conn = self.listener._accept_waiting()  # noqa: SLF001 - as above
            except OSError as exc:
                self._slots.release_on_behalf_of(slot)
                if exc.errno not in _kernel.OUT_OF_RESOURCES:
                    raise
                await trio.sleep(ACCEPT_RETRY_DELAY)
                continue
            if conn is None:
                self._slots.release_on_behalf_of(slot)
                return
            left -= 1
            self._start(handlers, conn, slot)

    def _start(self, handlers: trio.Nursery, conn: UnixConnection, slot: object) -> None:
        self.accepted += 1
        self.connections += 1
        handlers.start_soon(self._handle, conn, slot, name=self._handler)

    async def _handle(self, conn: UnixConnection, slot: object) -> None:
        peer: object = "unknown"
        try:
            try:
                with suppress(NotSupportedError, OSError):
                    peer = conn.get_peer_credentials()
                if await self._admits(conn):
                    await self._handler(conn)
            finally:
                # Not "async with": when cancelled, that would replace what the handler raises.
                with trio.CancelScope(shield=True):
                    await conn.aclose()
        except BaseException as exc:
            crash, rest = _crash_and_rest(exc) if self._logs_errors else (None, exc)
            if crash is not None:
                self.crashed += 1
                logger.exception(
                    "%s: the handler of a connection crashed; its peer was %s",
                    self.listener._address,  # noqa: SLF001 - as above; it may be closed
                    peer,
                    exc_info=crash,
                )
            if rest is exc:
                raise
            if rest is not None:
                raise rest from None
        finally:
            self.connections -= 1
            self._slots.release_on_behalf_of(slot)

    async def _admits(self, conn: UnixConnection) -> bool:
        # The listener's own policy first, as its accept() asks it.
        if await self.listener._admits(conn) and (  # noqa: SLF001 - as above
            self._policy is None or await admit_or_close(conn, self._policy)
        ):
            return True
        self.denied += 1
        return False


def _crash_and_rest(exc: BaseException) -> tuple[Exception | None, BaseException | None]:
    """Part what is a handler's own fault from cancellation, Control-C and the like."""
    if isinstance(exc, Exception):
        return exc, None
    if isinstance(exc, BaseExceptionGroup):
        return cast("BaseExceptionGroup[BaseException]", exc).split(Exception)
    return None, exc


@enable_ki_protection
async def serve_unix(
    handler: Handler,
    address: str | bytes | os.PathLike[str] | os.PathLike[bytes] | UnixSocketAddress | UnixListener,
    *,
    policy: PeerPolicy | None = None,
    max_connections: int | None = None,
    handler_errors: Literal["raise", "log"] = "raise",
    mode: int | None = None,
    owner: int | str | None = None,
    group: int | str | None = None,
    backlog: int | None = None,
    credentials: bool = False,
    pidfds: bool = False,
    receive_descriptors: bool = True,
    replace: bool = False,
    task_status: trio.TaskStatus[UnixServer] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Accept connections, and run ``handler`` on each in a task of its own.

    A handler gets a :class:`UnixConnection`, which is closed when the handler returns or
    raises. While the system has no room for another descriptor, this waits and goes on.
    Cancelling this ends the handlers, too; to let them finish, use
    :meth:`UnixServer.drain`::

        server = await nursery.start(serve_unix, handler, "/run/broker.sock")
        ...
        server.drain(timeout=10)

    Args:
      handler: an async function of one argument.
      address: as of :func:`open_unix_listener`; or a :class:`UnixListener`, which the server
        owns from now on, and whose own policy, if it has one, is asked first.
      policy: who may talk to the handler. It is asked in the handler's task, so that a check
        that waits holds up nobody else; whom it does not admit is closed, logged and counted.
      max_connections: how many connections may be handled at a time. Further ones wait in the
        listener's queue.
      handler_errors: what an exception out of a handler does: ``"raise"`` ends the server with
        it, as in any trio program; ``"log"`` logs it, under ``trio_unixconn``, and the server
        goes on.
      mode, owner, group, backlog, credentials, pidfds, receive_descriptors, replace: as of
        :func:`open_unix_listener`; not with a listener.

    Returns:
      When a drain has come to its end. ``nursery.start`` returns a :class:`UnixServer`, once
      clients can connect.

    Raises:
      TypeError, ValueError, OSError: as :func:`open_unix_listener`; a listener that was given
        stays the caller's then.
      ExceptionGroup: of what a handler, a policy's check, or accepting raised
        (:class:`ConnectionClosedError`, if somebody else has closed the listener).
    """
    if max_connections is not None and max_connections < 1:
        raise ValueError(f"max_connections must be at least 1, or None, not {max_connections}")
    if handler_errors not in ("raise", "log"):
        raise ValueError(f'handler_errors is "raise" or "log", not {handler_errors!r}')
    slots = trio.CapacityLimiter(math.inf if max_connections is None else max_connections)
    if isinstance(address, UnixListener):
        options = (mode, owner, group, backlog)
        if any(each is not None for each in options) or credentials or pidfds or replace:
            raise ValueError(
                "mode, owner, group, backlog, credentials, pidfds and replace cannot be used with "
                "a listener, which is open already; give them to open_unix_listener"
            )
        if not receive_descriptors:
            raise ValueError("give receive_descriptors=False to the listener")
        listener = address
    else:
        listener = await open_unix_listener(
            address,
            mode=0o600 if mode is None else mode,
            owner=owner,
            group=group,
            backlog=backlog,
            credentials=credentials,
            pidfds=pidfds,
            receive_descriptors=receive_descriptors,
            replace=replace,
        )
    server = UnixServer(
        listener,
        handler=handler,
        policy=policy,
        logs_errors=handler_errors == "log",
        slots=slots,
    )
    try:
        await server._serve(task_status)  # noqa: SLF001 - this is its only caller
    finally:
        # As with a connection.
        with trio.CancelScope(shield=True):
            await listener.aclose()
