"""serve_unix: a task for each connection, and a graceful shutdown.

Invariant: an accepted connection is handled, or closed because a policy denies it, or because the
server is cancelled or the deadline of a drain has passed.

Sources: accept(2), trio.serve_listeners
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, cast

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from ._accept import is_out_of_resources
from ._connection import UnixConnection, check_at_least
from ._listener import (
    UnixListener,
    accept_connection,
    accept_pending,
    admits,
    back_off,
    make_connection,
    open_unix_listener,
    queue_size,
    remove_path,
)
from ._owner import DescriptorOwner
from ._policy import admit_or_close, check_policy
from ._trio_task import check_task
from .errors import NotSupportedError

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

if TYPE_CHECKING:
    from ._accept import Accepted
    from ._address import AddressLike, UnixSocketAddress
    from ._policy import PeerPolicy

logger: Final = logging.getLogger("trio_unixconn")

Handler = Callable[["UnixConnection"], Awaitable[Any]]


class GenerationServer(Protocol):
    """The part of a server in its generation."""

    @property
    def unix_listener(self) -> UnixListener: ...
    def claim(self) -> None: ...
    def set_prepared(self) -> None: ...
    def retire(self) -> None: ...
    async def accept_fd(self) -> Accepted: ...
    async def follow(
        self, on_replaced: Callable[[], object], on_overdue: Callable[[], object]
    ) -> None: ...
    async def may_accept_last(self) -> bool: ...


class AnyGeneration(Protocol):
    """A :class:`Generation`, which is in a layer above."""

    def server(self, listeners: Sequence[object], *, unix_only: bool) -> GenerationServer: ...


def check_generation(generation: object) -> None:
    """Raise TypeError unless this is a generation."""
    if not callable(getattr(generation, "server", None)):
        raise TypeError(f"generation must be a Generation or None, got {type(generation).__name__}")


@attrs.define(eq=False)
class UnixServer(DescriptorOwner):
    """A running server of :func:`serve_unix`: its counters, and its graceful shutdown.

    Attributes:
      listener: the listener that it accepts connections from; closed by a drain.
      connections: the number of open connections, including those that a policy is being asked
        about.
      accepted: the number of accepted connections.
      denied: how many of those a policy has denied, the server's or the listener's.
      crashed: the number of handlers, and of checks of a policy, whose exception was logged.
      drained: an event that is set at the end of a drain.
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
    # For the log: the listener has none after it is closed.
    _address: UnixSocketAddress = attrs.field(alias="address", kw_only=True, repr=False)
    _slots: trio.CapacityLimiter = attrs.field(alias="slots", kw_only=True, repr=False)
    _served: GenerationServer | None = attrs.field(
        alias="served", default=None, kw_only=True, repr=False
    )
    _accepting: trio.CancelScope = attrs.field(factory=trio.CancelScope, repr=False)
    _handling: trio.CancelScope = attrs.field(factory=trio.CancelScope, repr=False)

    def drain(self, timeout: float = math.inf) -> None:
        """Shut down gracefully: stop accepting connections and let running handlers finish.

        The path is removed first. Then the connections that are in the listener's queue are
        handled, so that no client is reset that could connect. After that :func:`serve_unix`
        returns. A second call can only move the deadline forward in time, never back.

        If the name stays (it is abstract, or the listener has ``unlink_on_close=False``), clients
        can connect until the queue is empty for a moment, or until as many connections have been
        handled as it can hold. Connections in the queue at that moment are reset. The queue of a
        listener that was made from a file descriptor is left to other processes that hold it.

        Args:
          timeout: the time in seconds after which running handlers are cancelled.

        Raises:
          ValueError: a timeout that is negative or not a number.
        """
        if not timeout >= 0:
            raise ValueError(f"timeout must be non-negative, got {timeout}")
        if self._served is not None:
            self._served.retire()
        self._drain(timeout)

    def _drain(self, timeout: float) -> None:
        self._handling.deadline = min(self._handling.deadline, trio.current_time() + timeout)
        self._accepting.cancel()

    async def _serve(self, task_status: trio.TaskStatus[UnixServer]) -> None:
        if self._served is None:
            await self._serve_and_drain(task_status)
        else:
            async with trio.open_nursery() as following:
                following.start_soon(
                    self._served.follow, partial(self._drain, math.inf), partial(self._drain, 0)
                )
                await self._serve_and_drain(task_status)
                following.cancel_scope.cancel()
        self.drained.set()

    async def _serve_and_drain(self, task_status: trio.TaskStatus[UnixServer]) -> None:
        with self._handling:
            async with trio.open_nursery() as handlers:
                with self._accepting:
                    task_status.started(self)
                    if self._served is not None:
                        self._served.set_prepared()
                    while True:
                        await self._next(handlers)
                # A drain has cancelled that loop. Everything else ends it with an exception.
                if self._served is None or await self._served.may_accept_last():
                    await remove_path(self.listener)
                    await self._handle_pending(handlers)
                await self.listener.aclose()

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
        while True:
            try:
                # The handler's task asks the listener's policy. So a drain does not end a
                # connection that a check is being asked about.
                if self._served is None:
                    return await accept_connection(self.listener)
                return make_connection(self.listener, *await self._served.accept_fd())
            except OSError as exc:
                if not is_out_of_resources(exc):
                    raise
                error = exc
            await back_off(self.listener, error)

    async def _handle_pending(self, handlers: trio.Nursery) -> None:
        """Handle the connections that are in the queue after the path is removed."""
        # If the name is abstract, clients may go on connecting. So no more are accepted than the
        # queue can have held.
        left = queue_size(self.listener)
        while left:
            slot = object()
            await self._slots.acquire_on_behalf_of(slot)
            conn, error = None, None
            try:
                conn, error = accept_pending(self.listener)
            finally:
                if conn is None:
                    self._slots.release_on_behalf_of(slot)
            if conn is not None:
                left -= 1
                self._start(handlers, conn, slot)
            elif error is None:
                return
            else:
                await back_off(self.listener, error)

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
                # Not "async with": if cancelled, that replaces the handler's exception.
                with trio.CancelScope(shield=True):
                    await conn.aclose()
        except BaseException as exc:
            crash, rest = crash_and_rest(exc) if self._logs_errors else (None, exc)
            if crash is not None:
                self.crashed += 1
                logger.exception(
                    "%s: the handler of a connection crashed, the peer was %s",
                    self._address,
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
        # The listener's policy comes first, as in its accept().
        if await admits(self.listener, conn) and (
            self._policy is None or await admit_or_close(conn, self._policy)
        ):
            return True
        self.denied += 1
        return False


def crash_and_rest(exc: BaseException) -> tuple[Exception | None, BaseException | None]:
    """Separate a handler's own exceptions from Cancelled, KeyboardInterrupt and similar."""
    if isinstance(exc, Exception):
        return exc, None
    if isinstance(exc, BaseExceptionGroup):
        return cast("BaseExceptionGroup[BaseException]", exc).split(Exception)
    return None, exc


@enable_ki_protection
async def serve_unix(
    handler: Handler,
    address: AddressLike | UnixListener | trio.abc.Listener[UnixConnection],
    *,
    generation: AnyGeneration | None = None,
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
    """Accept connections, and run ``handler`` for each in a task of its own.

    A handler gets a :class:`UnixConnection`, which is closed when the handler returns or
    raises. If no connection can be accepted at the moment (the process is out of file descriptors
    or memory, or the system refuses it), this logs that once, waits and retries. Cancelling this
    cancels the handlers. To let them finish, use :meth:`UnixServer.drain`::

        server = await nursery.start(serve_unix, handler, "/run/broker.sock")
        ...
        server.drain(timeout=10)

    Args:
      handler: an async function of one argument.
      address: see :func:`open_unix_listener`; or a :class:`UnixListener`, which the server
        owns afterwards. If the listener has a policy, that is asked first.
      generation: the generation of a listener of :meth:`Generation.listen_unix`. The server is
        ready when it is started, accepts while this generation does, and drains when a successor
        has replaced it, without a limit unless too many generations drain. A call of
        :meth:`UnixServer.drain` ends the generation without a successor.
      policy: which peers may talk to the handler. The handler's task asks it, so that a check that
        waits delays no other connection. A connection that it denies is closed, logged and counted.
      max_connections: the maximum number of connections that are handled at a time. Further ones
        wait in the listener's queue.
      handler_errors: ``"raise"``: an exception of a handler, or of a policy's check, ends the
        server, as in any trio program. ``"log"``: it is logged, under ``trio_unixconn``, and the
        server goes on.
      mode, owner, group, backlog, credentials, pidfds, receive_descriptors, replace: see
        :func:`open_unix_listener`; not with a listener.

    Returns:
      At the end of a drain. ``nursery.start`` returns a :class:`UnixServer` when clients can
      connect; with a generation, before anything is accepted.

    Raises:
      TypeError: an argument of a wrong type; the caller still owns a listener that was passed.
      ValueError: a wrong argument; likewise.
      OSError: as :func:`open_unix_listener`.
      ExceptionGroup: the exceptions of handlers, of a policy's check, or of accepting
        (:class:`ConnectionClosedError`, if other code has closed the listener).
    """
    if not callable(handler):
        raise TypeError(f"handler must be an async function, got {type(handler).__name__}")
    if max_connections is not None:
        check_at_least(max_connections, 1, "max_connections")
    if handler_errors not in ("raise", "log"):
        raise ValueError(f'handler_errors must be "raise" or "log", got {handler_errors!r}')
    check_policy(policy)
    check_task()
    slots = trio.CapacityLimiter(math.inf if max_connections is None else max_connections)
    served = None
    if generation is not None:
        check_generation(generation)
        served = generation.server([address], unix_only=True)
        address = served.unix_listener
    if isinstance(address, UnixListener):
        options = (mode, owner, group, backlog)
        if any(each is not None for each in options) or credentials or pidfds or replace:
            raise ValueError(
                "mode, owner, group, backlog, credentials, pidfds and replace cannot be used with "
                "a listener, which is open already; give them to open_unix_listener"
            )
        if not receive_descriptors:
            raise ValueError(
                "receive_descriptors must be passed to open_unix_listener, not with its listener"
            )
        listener = address
    else:
        listener = await open_unix_listener(
            # A listener of a generation without that is a TypeError.
            cast("AddressLike", address),
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
        address=listener.get_local_address(),
        logs_errors=handler_errors == "log",
        slots=slots,
        served=served,
    )
    if served is not None:
        served.claim()
    try:
        await server._serve(task_status)
    finally:
        # Not "async with", for the same reason as with a connection.
        with trio.CancelScope(shield=True):
            await listener.aclose()
