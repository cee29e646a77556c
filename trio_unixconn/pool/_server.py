"""serve_with_workers: accepts connections, which worker processes handle.

With ``accept="parent"`` this process accepts them, and passes them on. With ``accept="workers"``
the workers get the listening sockets and accept by themselves. This process accepts only what is in
the queues when a drain begins: first it accepts beside the workers, until all of them have
stopped, and then it empties the queues, as in the other mode.

A listener reserves slots of the pool's queue before it accepts connections, and keeps a slot for
each connection that a policy is being asked about. A slot that it does not use, because a peer was
denied, because another process has accepted the connection, or because accept(2) has failed, is
released, and the next waiting task gets it. While accept(2) backs off, it holds no slot.

In a generation, nothing is accepted while its gate is closed. When a successor has replaced it,
what is in the listeners' queues is the successor's. So are the connections that handlers pass on
from then on, and those that no worker has yet.

Invariant: each accepted connection has a slot of the queue. While the queue is full no connection
is accepted, and clients wait in the listeners' queues.

Sources: accept(2), listen(2), trio.serve_listeners
"""

from __future__ import annotations

import errno
import logging
import math
import os
import select
import socket as stdlib_socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from .. import _kernel
from .._accept import Accepted, Acceptor, close_listening_socket
from .._closing import close_fds
from .._listener import (
    UnixListener,
    admits,
    has_policy,
    make_connection,
    policy_of,
    receives_descriptors,
    remove_path,
)
from .._owner import DescriptorOwner
from .._policy import describe_policy
from .._server import check_generation, crash_and_rest
from .._sockopts import can_linger, raw_socket
from .._trio_task import check_task
from ..errors import ConnectionClosedError, PoolClosedError
from ..handover._listeners import GenerationListener
from ..handover._protocol import PassedConnection
from ._accepted import AcceptPlan, SharedListener
from ._config import checked_timeout
from ._endpoints import EndpointKind, kind_of_received
from ._pool import (
    check_run,
    config_of,
    open_worker_pool,
    put_accepted,
    put_received,
    queue_of,
    set_successor,
    supervisor_of,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..handover._generation import Generation
    from ..handover._passing import ConnectionsOfServer, Passer, Received
    from ..handover._serving import GenerationServer
    from ._config import WorkerPoolOptions
    from ._pool import WorkerPool
    from ._statistics import PoolStatistics

logger: Final = logging.getLogger("trio_unixconn.pool")

AnyListener: TypeAlias = trio.SocketListener | UnixListener

# The maximum number of connections that are accepted before other tasks run.
MAX_BATCH: Final = 256
_KINDS: Final = {
    stdlib_socket.AF_INET: EndpointKind.TCP,
    stdlib_socket.AF_INET6: EndpointKind.TCP6,
    _kernel.AF_UNIX: EndpointKind.UNIX,
}


#: Which process accepts connections.
AcceptMode: TypeAlias = Literal["parent", "workers"]


@attrs.define(eq=False)
class WorkerServer(DescriptorOwner):
    """A running server of :func:`serve_with_workers`.

    Attributes:
      pool: its workers, for :meth:`WorkerPool.restart` and :meth:`WorkerPool.scale`.
      listeners: the listeners that it accepts connections from; closed by a drain. With a
        generation, those that the listeners of the generation consist of.
    """

    pool: WorkerPool
    listeners: Sequence[trio.SocketListener | UnixListener]
    # Those that this process has accepted and denied.
    _accepted: int = attrs.field(default=0, alias="accepted", repr=False)
    _denied: int = attrs.field(default=0, alias="denied", repr=False)
    _served: GenerationServer | None = attrs.field(default=None, alias="served", repr=False)
    # What workers accept from; None if this process accepts.
    _plan: AcceptPlan | None = attrs.field(default=None, alias="plan", repr=False)
    _drains: bool = attrs.field(default=False, init=False, repr=False)
    # Has the time at which a drain stops accepting as its deadline.
    _accepting: trio.CancelScope = attrs.field(factory=trio.CancelScope, repr=False)
    # Has the deadline of a drain.
    _finishing: trio.CancelScope = attrs.field(factory=trio.CancelScope, repr=False)
    _acceptors: list[Acceptor] = attrs.field(init=False, repr=False)
    # What connections of each listener are.
    _kinds: dict[AnyListener, EndpointKind] = attrs.field(init=False, repr=False)
    # Passes connections on to the successor of the generation.
    _passer: Passer | None = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        # Names for the log: a listener has none after it is closed.
        if self._served is None:
            self._acceptors = [_acceptor(each) for each in self.listeners]
        else:
            self._acceptors = [each.acceptor for each in self._served.listeners]
        self._kinds = {each: _kind_of(each) for each in self.listeners}

    @property
    def accepted(self) -> int:
        """The number of accepted connections."""
        if self._plan is None:
            return self._accepted
        supervisor_of(self.pool).sync_accepted()
        return self._accepted + self._plan.accepted

    @property
    def denied(self) -> int:
        """How many of those the policy of a :class:`UnixListener` has denied.

        That includes those for which a check of the policy has raised an exception, which is
        logged.
        """
        if self._plan is None:
            return self._denied
        supervisor_of(self.pool).sync_accepted()
        return self._denied + self._plan.denied

    def drain(self, timeout: float | None = None, *, delay: float = 0) -> None:
        """Shut down gracefully: stop accepting connections and let running handlers finish.

        Connections that are in the listeners' queues are handled. After that
        :func:`serve_with_workers` returns. A second call can only move the deadlines forward in
        time, never back: ``drain()`` ends the delay of an earlier call. A generation ends without a
        successor then.

        Args:
          timeout: the time in seconds after which running handlers are cancelled, and connections
            that no worker has accepted are closed. It begins when the delay ends. Default: the
            pool's ``drain_timeout``.
          delay: the time in seconds for which connections are still accepted, while
            :meth:`statistics` has the state ``"draining"`` already. Load balancers that look at it
            (:func:`serve_statistics`, :func:`serve_agent_check`) stop sending clients in that time.

        Raises:
          TypeError: not a number; the server goes on.
          ValueError: negative; the server goes on.
          RuntimeError: this is not the thread, or not the trio.run, of the pool.
        """
        check_run(self.pool)
        if timeout is not None:
            checked_timeout(timeout)
        checked_timeout(delay, "delay")
        if self._served is not None:
            self._served.retire()
        self._drain(timeout, delay)

    def _drain(self, timeout: float | None, delay: float = 0) -> None:
        stop_at = trio.current_time() + delay
        timeout = config_of(self.pool).drain_timeout if timeout is None else timeout
        self._drains = True
        self._finishing.deadline = min(self._finishing.deadline, stop_at + timeout)
        if delay:
            self._accepting.deadline = min(self._accepting.deadline, stop_at)
        else:
            self._accepting.cancel()

    def statistics(self) -> PoolStatistics:
        """Return the statistics of the pool, whose state is ``"draining"`` if this drains."""
        statistics = self.pool.statistics()
        if self._drains and statistics.state in {"ready", "down"}:
            return attrs.evolve(statistics, state="draining")
        return statistics

    async def _serve(self, task_status: trio.TaskStatus[WorkerServer]) -> None:
        if self._served is None:
            await self._serve_until_drained(task_status)
            return
        served = self._served
        with closing(served.accept_passed(self._target())) as passed:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    served.follow, partial(self._on_replaced, served), partial(self._drain, 0)
                )
                nursery.start_soon(self._receive_passed, passed)
                await self._serve_until_drained(task_status)
                nursery.cancel_scope.cancel()

    async def _serve_until_drained(self, task_status: trio.TaskStatus[WorkerServer]) -> None:
        with self._finishing:
            async with trio.open_nursery() as asking:
                with self._accepting:
                    async with trio.open_nursery() as accepting:
                        accept = self._accept_from if self._plan is None else self._watch
                        for index, (listener, acceptor) in enumerate(self._each()):
                            accepting.start_soon(
                                accept,
                                listener,
                                acceptor,
                                asking,
                                self._gated(index),
                                name=f"trio_unixconn.pool {listener!r}",
                            )
                        if self._plan is not None:
                            supervisor_of(self.pool).accept_from(self._plan)
                            accepting.start_soon(self._end_with_pool)
                        task_status.started(self)
                        if self._served is not None:
                            self._served.set_prepared()
                # A drain has cancelled that. Everything else ends it with an exception. What
                # follows waits for free slots and for checks of policies.
                if self._plan is not None:
                    await self._stop_workers(asking)
                for listener, acceptor in self._each():
                    asking.start_soon(self._accept_last, listener, acceptor, asking)
            await self.pool.drain(math.inf)
            if self._passer is not None:
                await self._passer.wait_settled()
        # If the deadline has passed, listeners are still open, and handlers run.
        await close_listeners(self.listeners)
        await self.pool.drain(0)

    def _gated(self, index: int) -> GenerationListener[Any] | None:
        return None if self._served is None else self._served.listeners[index]

    def _each(self) -> list[tuple[AnyListener, Acceptor]]:
        return list(zip(self.listeners, self._acceptors, strict=True))

    @enable_ki_protection
    async def _accept_from(
        self,
        listener: AnyListener,
        acceptor: Acceptor,
        asking: trio.Nursery,
        gated: GenerationListener[Any] | None = None,
    ) -> None:
        """Accept connections until a drain begins.

        Raises:
          ConnectionClosedError: other code has closed the listener.
        """
        raw = raw_socket(listener.socket)
        # How many the last batch had.
        count = 0
        # Trio would keep an entry for file descriptor -1 if it had to wait for that.
        while raw.fileno() != -1:
            try:
                if gated is None:
                    await trio.lowlevel.wait_readable(raw)
                else:
                    await gated.wait_readable()
            except trio.ClosedResourceError:
                break
            # Connections that arrive meanwhile join the batch. With the same in the worker, that is
            # 3 % more connections per second if many arrive.
            if count > 1:
                await trio.lowlevel.checkpoint()
            try:
                count = await self._accept_pending(listener, acceptor, asking)
            except PoolClosedError:
                # Other code drains the pool, which then has the deadline; or the pool has ended,
                # and cancels this.
                self._accepting.cancel()
        if not (self._drains or self._accepting.cancel_called):
            raise ConnectionClosedError("other code has closed this listener")

    ################################################################
    # Workers that accept
    ################################################################

    @enable_ki_protection
    async def _watch(
        self,
        listener: AnyListener,
        acceptor: Acceptor,
        asking: trio.Nursery,
        _: GenerationListener[Any] | None = None,
    ) -> None:
        """Notice that a listener does not listen any more.

        Raises:
          ConnectionClosedError: other code has closed the listener.
          OSError: accepting can never succeed again.
        """
        raw = raw_socket(listener.socket)
        while raw.fileno() != -1:
            # It never becomes writable. The end of its life is an event for all that wait.
            try:
                await trio.lowlevel.wait_writable(raw)
            except trio.ClosedResourceError:
                break
            accepted = 0
            with suppress(PoolClosedError):
                accepted = await self._accept_pending(listener, acceptor, asking)
            if not accepted and _has_hung_up(raw):
                # Of a Unix socket that was shut down, accept(2) says that its queue is empty.
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), acceptor.name)
            await trio.lowlevel.checkpoint()
        if not (self._drains or self._accepting.cancel_called):
            raise ConnectionClosedError("other code has closed this listener")

    async def _end_with_pool(self) -> None:
        """Stop accepting when other code drains the pool, as submitting would fail then."""
        await queue_of(self.pool).closed.wait()
        self._accepting.cancel()

    @enable_ki_protection
    async def _stop_workers(self, asking: trio.Nursery) -> None:
        """Have workers stop accepting, and accept in this process meanwhile.

        A worker that computes stops late. Clients need not wait for it.
        """
        async with trio.open_nursery() as nursery:
            for listener, acceptor in self._each():
                nursery.start_soon(self._accept_meanwhile, listener, acceptor, asking)
            await supervisor_of(self.pool).stop_accepting()
            nursery.cancel_scope.cancel()

    @enable_ki_protection
    async def _accept_meanwhile(
        self, listener: AnyListener, acceptor: Acceptor, asking: trio.Nursery
    ) -> None:
        raw = raw_socket(listener.socket)
        with suppress(PoolClosedError, trio.ClosedResourceError):
            while raw.fileno() != -1:
                await trio.lowlevel.wait_readable(raw)
                await self._accept_pending(listener, acceptor, asking)

    @enable_ki_protection
    async def _accept_last(
        self, listener: AnyListener, acceptor: Acceptor, asking: trio.Nursery
    ) -> None:
        """Accept the connections in a listener's queue, and close it."""
        if self._served is not None and not await self._served.may_accept_last():
            await close_listeners([listener])
            return
        if isinstance(listener, UnixListener):
            await remove_path(listener)
        raw = raw_socket(listener.socket)
        # Clients may go on connecting until it is closed. So no more are accepted than the queue
        # can have held.
        left = _max_queue_size()
        # Other code may drain the pool meanwhile.
        with suppress(PoolClosedError):
            while left > 0 and raw.fileno() != -1:
                count = await self._accept_pending(listener, acceptor, asking)
                if not count:
                    break
                left -= count
        await close_listeners([listener])

    @enable_ki_protection
    async def _accept_pending(
        self, listener: AnyListener, acceptor: Acceptor, asking: trio.Nursery
    ) -> int:
        """Accept connections that are in the queue, as many as the pool has slots for.

        If it has none, this waits for one.

        Returns:
          Their number. 0 means that the queue was empty.

        Raises:
          PoolClosedError: the pool accepts no more jobs; no connection was accepted.
          OSError: accepting can never succeed again.
        """
        raw = raw_socket(listener.socket)
        queue = queue_of(self.pool)
        while True:
            await queue.reserve()
            slots = 1 + queue.reserve_nowait(MAX_BATCH - 1)
            # Other code may have closed the listener while this waited.
            accepted: list[Accepted] = []
            error = None
            try:
                if raw.fileno() != -1 and (self._served is None or self._served.is_accepting):
                    accepted, error = acceptor.accept_pending(slots)
            finally:
                queue.release(slots - len(accepted))
            if error is None:
                self._distribute(listener, accepted, asking)
                return len(accepted)
            await acceptor.back_off(error)

    def _distribute(
        self, listener: AnyListener, accepted: list[Accepted], asking: trio.Nursery
    ) -> None:
        self._accepted += len(accepted)
        if isinstance(listener, UnixListener) and has_policy(listener):
            address = listener.get_local_address() if accepted else None
            for fd, name in accepted:
                asking.start_soon(self._ask, listener, address, fd, name)
        elif accepted:
            put_accepted(self.pool, accepted, self._kinds[listener])

    @enable_ki_protection
    async def _ask(
        self, listener: UnixListener, address: object, fd: int, name: str | bytes
    ) -> None:
        """Pass a connection to the pool if the listener's policy admits its peer."""
        admitted: list[Accepted] = []
        try:
            async with make_connection(listener, fd, name) as conn:
                if await admits(listener, conn):
                    admitted.append((conn.detach(), name))
                else:
                    self._denied += 1
        except BaseException as exc:
            crash, rest = crash_and_rest(exc)
            if crash is not None:
                self._denied += 1
                logger.exception(
                    "%s: a check of the policy crashed, the connection is closed",
                    address,
                    exc_info=crash,
                )
            if rest is exc:
                raise
            if rest is not None:
                raise rest from None
        finally:
            if admitted:
                put_accepted(self.pool, admitted, self._kinds[listener])
            else:
                queue_of(self.pool).release()

    ################################################################
    # Generations
    ################################################################

    def _target(self) -> Sequence[str]:
        """Return the names by which other generations pass connections on to this server.

        The data of connections with PROXY protocol headers have another form.
        """
        assert self._served is not None  # only called with a generation
        suffix = "" if config_of(self.pool).proxy_protocol is None else " (proxy_protocol)"
        return [f"{each.name}{suffix}" for each in self._served.listeners]

    def _on_replaced(self, served: GenerationServer) -> None:
        """Pass connections on to the successor, if it has such a server, and drain."""
        self._passer = served.passer_to(self._target()[0])
        if self._passer is not None:
            set_successor(self.pool, self._pass_on)
        self._drain(None)

    def _pass_on(self, fd: int, kind: EndpointKind, data: bytes, passed: int) -> bool:
        assert self._passer is not None  # only called with a successor
        accepts = kind != EndpointKind.UNIX_WITHOUT_DESCRIPTORS
        return self._passer.put(fd, PassedConnection(accepts, data, self._target()[0], passed))

    @enable_ki_protection
    async def _receive_passed(self, connections: ConnectionsOfServer) -> None:
        """Queue connections that earlier generations pass on, or wait while the queue is full."""
        queue = queue_of(self.pool)
        while await connections.wait():
            try:
                await queue.reserve()
            except PoolClosedError:
                self._return(connections.take(MAX_BATCH))
            else:
                slots = 1 + queue.reserve_nowait(MAX_BATCH - 1)
                found = [
                    (fd, kind, each.data, each.passed)
                    for fd, each in connections.take(slots)
                    if (kind := _kind_of_received(fd, each)) is not None
                ]
                queue.release(slots - len(found))
                put_received(self.pool, found)
            await trio.lowlevel.checkpoint()

    def _return(self, received: Sequence[Received]) -> None:
        """Pass connections on that have arrived while this drains; without a successor, close them.

        Those of a drain without a successor have no taker any more.
        """
        for fd, each in received:
            if self._passer is None or not self._passer.put(fd, each):
                close_fds([fd])


def _kind_of_received(fd: int, connection: PassedConnection) -> EndpointKind | None:
    """Return what a connection is; None if its peer has reset it meanwhile, and close it then."""
    kind = kind_of_received(fd, accepts_descriptors=connection.accepts_descriptors)
    if kind is None:
        close_fds([fd])
    return kind


def _acceptor(listener: AnyListener) -> Acceptor:
    return Acceptor(raw_socket(listener.socket), _name_of(listener))


def _name_of(listener: AnyListener) -> str:
    if isinstance(listener, UnixListener):
        return str(listener.get_local_address())
    return repr(raw_socket(listener.socket).getsockname())


@enable_ki_protection
async def close_listeners(listeners: Sequence[AnyListener]) -> None:
    """Close listeners, whatever happens meanwhile; an error about a path is logged."""

    # In tasks, so that a KeyboardInterrupt, which is raised in the main task, ends none of them.
    async def close(listener: AnyListener) -> None:
        with trio.CancelScope(shield=True):
            if isinstance(listener, UnixListener):
                await remove_path(listener)
            await close_listening_socket(listener.socket)

    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(close, listener)


def checked_listeners(listeners: Sequence[object]) -> list[AnyListener]:
    """Return listeners, of which the caller still owns all.

    Raises:
      TypeError: not a listener.
      ValueError: no listener, or one of them twice.
      ConnectionClosedError: a closed listener.
    """
    found: list[AnyListener] = []
    for listener in listeners:
        if isinstance(listener, GenerationListener):
            raise TypeError(
                "a listener of a generation requires the argument generation of a server"
            )
        if not isinstance(listener, (trio.SocketListener, UnixListener)):
            raise TypeError(
                f"expected a trio.SocketListener or a UnixListener, got {type(listener).__name__}"
            )
        if listener.socket.fileno() == -1:
            raise ConnectionClosedError("this listener is closed")
        found.append(listener)
    if not found:
        raise ValueError("expected at least one listener, got an empty list")
    if len({id(listener) for listener in found}) < len(found):
        raise ValueError("expected different listeners, got one of them twice")
    return found


def _kind_of(listener: AnyListener) -> EndpointKind:
    if isinstance(listener, UnixListener) and not receives_descriptors(listener):
        return EndpointKind.UNIX_WITHOUT_DESCRIPTORS
    if can_linger(listener.socket):
        # Connections inherit SO_LINGER: a closing thread closes them, as it does with a file.
        return EndpointKind.OTHER
    return _KINDS.get(listener.socket.family, EndpointKind.OTHER)


def _has_hung_up(sock: stdlib_socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))


def make_plan(listeners: Sequence[AnyListener], max_in_flight: int) -> AcceptPlan:
    """Return what workers accept from.

    Raises:
      ValueError: a policy has a check, or is of a subclass that decides itself: that is code of
        this process.
    """
    shared: list[SharedListener] = []
    for listener in listeners:
        policy = None
        if isinstance(listener, UnixListener) and has_policy(listener):
            try:
                policy = describe_policy(policy_of(listener))
            except ValueError:
                raise ValueError(
                    'accept="workers" requires policies without a check or an admits() of a '
                    f"subclass, which workers cannot run, got {policy_of(listener)!r}; use "
                    'accept="parent", or ask in the handler'
                ) from None
        raw = raw_socket(listener.socket)
        shared.append(SharedListener(raw, _kind_of(listener), _name_of(listener), policy))
    return AcceptPlan(shared, max_in_flight)


def check_accept_mode(accept: AcceptMode) -> None:
    """Raise ValueError unless this is one of the modes."""
    if accept not in ("parent", "workers"):
        raise ValueError(f'accept must be "parent" or "workers", got {accept!r}')


def _max_queue_size() -> int:
    try:
        with open("/proc/sys/net/core/somaxconn", "rb") as file:
            return int(file.read()) + 1
    except (OSError, ValueError):
        return stdlib_socket.SOMAXCONN + 1


@enable_ki_protection
async def serve_with_workers(
    handler: str,
    listeners: Sequence[trio.SocketListener | UnixListener | GenerationListener[Any]],
    *,
    accept: AcceptMode = "parent",
    generation: Generation | None = None,
    task_status: trio.TaskStatus[WorkerServer] = trio.TASK_STATUS_IGNORED,
    **options: Unpack[WorkerPoolOptions],
) -> None:
    """Accept connections, and let worker processes handle them.

    ::

        listeners = await trio.open_tcp_listeners(8000, host="127.0.0.1")
        server = await nursery.start(serve_with_workers, "package.module:handler", listeners)
        ...
        server.drain(timeout=10)

    If no connection can be accepted at the moment (the process is out of file descriptors or
    memory, or the system refuses it), this logs that once, waits and retries. Cancelling this
    cancels the handlers. To let them finish, use :meth:`WorkerServer.drain`.

    Args:
      handler: ``"package.module:name"``; see :func:`open_worker_pool`.
      listeners: those of ``trio.open_tcp_listeners``, :func:`open_unix_listener` and similar
        functions. The server owns them afterwards. The policy of a :class:`UnixListener` is asked
        in the process that accepts, in a task for each connection in this one. If a check of it
        raises an exception, that is logged, the connection is closed, and the server goes on.
      accept: which process accepts connections.

        ``"parent"``: this one, which passes each of them to the least busy worker. While all
        workers have ``max_in_flight`` jobs, up to ``max_queue`` connections wait in this process.

        ``"workers"``: each worker, which gets the listening sockets, accepts while it has fewer
        than ``max_in_flight`` jobs. A connection takes no way through this process, which is worth
        most with few connections at a time. The first worker that has time gets it, not the least
        busy one. ``max_queue``, ``max_attempts`` and ``worker=`` are for jobs that are submitted,
        and a policy must not have a check. Not with a generation. Statistics, restarts and drains
        are the same.
      generation: the generation whose listeners these are (:meth:`Generation.listen_tcp` and
        similar methods), which goes on owning them. The server says that it is ready when its
        workers are, and accepts while this generation does. When a successor has replaced it, it
        drains, and the connections that handlers pass on (:meth:`Job.pass_on`), or that no handler
        has yet, go to the successor's server with the same listener. If ``drain_timeout`` has
        passed, or too many generations drain, the other handlers are cancelled. A call of
        :meth:`WorkerServer.drain` ends the generation without a successor.
      options: the keyword arguments of :func:`open_worker_pool`.

    Returns:
      At the end of :meth:`WorkerServer.drain`, or of :meth:`WorkerPool.drain`, which does not
      handle the connections in the listeners' queues. ``nursery.start`` returns a
      :class:`WorkerServer` when the workers are ready; with a generation, before anything is
      accepted.

    Raises:
      TypeError: not a listener; the caller still owns all of them. Or an option of a wrong type;
        the listeners are closed.
      ValueError: no listener, or one of them twice; or an unknown ``accept``, or one that does not
        go with a policy or a generation; the caller still owns all of them. Or an invalid option;
        the listeners are closed.
      ConnectionClosedError: a closed listener; the caller still owns all of them.
      WorkerStartError: as :func:`open_worker_pool`. The listeners are closed.
      ExceptionGroup: as :func:`open_worker_pool`; or of accepting
        (:class:`ConnectionClosedError`, if other code has closed a listener).
    """
    check_accept_mode(accept)
    if accept == "workers" and generation is not None:
        raise ValueError(
            'accept="workers" cannot be used with a generation, which decides when its own process '
            'accepts; use accept="parent"'
        )
    served = None
    if generation is not None:
        check_generation(generation)
        served = generation.server(listeners)
        listeners = [each.base for each in served.listeners]
    checked = checked_listeners(listeners)
    check_task()
    if accept == "workers":
        # Before the workers are started.
        make_plan(checked, 1)
    if served is not None:
        served.claim()
    try:
        async with open_worker_pool(handler, **options) as pool:
            await _server_of(pool, checked, accept, served)._serve(task_status)
    finally:
        with trio.CancelScope(shield=True):
            await close_listeners(checked)


def _server_of(
    pool: WorkerPool,
    listeners: Sequence[AnyListener],
    accept: AcceptMode,
    served: GenerationServer | None = None,
) -> WorkerServer:
    plan = None
    if accept == "workers":
        plan = make_plan(listeners, config_of(pool).max_in_flight)
    return WorkerServer(pool, listeners, served=served, plan=plan)


@enable_ki_protection
async def serve_when_ready(
    handler: str,
    open_listeners: Callable[[], Awaitable[Sequence[AnyListener]]],
    *,
    accept: AcceptMode = "parent",
    task_status: trio.TaskStatus[WorkerServer] = trio.TASK_STATUS_IGNORED,
    **options: Unpack[WorkerPoolOptions],
) -> None:
    """Serve as :func:`serve_with_workers`; the listeners are opened when all workers are ready.

    For a server that takes the paths of another one, which goes on if the workers cannot start.

    Args:
      open_listeners: returns different, open listeners, which the server owns; or raises, and none
        is left open.
    """
    async with open_worker_pool(handler, **options) as pool:
        listeners = await open_listeners()
        try:
            await _server_of(pool, listeners, accept)._serve(task_status)
        finally:
            with trio.CancelScope(shield=True):
                await close_listeners(listeners)
