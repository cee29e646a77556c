"""serve_with_workers: this process accepts, workers handle.

The rule of this file: what was accepted is the pool's from then on; while the pool has no room,
nothing is accepted, and clients wait in the listeners' queues.

Sources: accept(2), listen(2), trio.serve_listeners
"""

from __future__ import annotations

import errno
import math
import socket as stdlib_socket
from typing import TYPE_CHECKING, Any, Final, TypedDict

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from .. import _kernel
from .._accept import ACCEPT_RETRY_DELAY
from .._listener import UnixListener, remove_path
from .._owner import DescriptorOwner
from .._sockopts import raw_socket
from ..errors import ConnectionClosedError
from . import _wire
from ._opening import open_worker_pool
from ._supervisor import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Unpack

    from ._pool import WorkerPool
    from ._statistics import AbandonedJob, PoolStatistics

Listener = "trio.SocketListener | UnixListener"

_GONE_NAMES: Final = [
    *("ECONNABORTED", "EPERM", "EPROTO", "ENOPROTOOPT", "EOPNOTSUPP", "EINTR", "ENONET"),
    *("ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH"),
]
# accept(2): what is said of one connection, which is gone, and not of the listener.
_GONE: Final = frozenset(getattr(errno, name) for name in _GONE_NAMES if hasattr(errno, name))
# How many are accepted before other tasks run.
_BURST: Final = 256
_FORMS: Final = {
    stdlib_socket.AF_INET: _wire.TCP,
    stdlib_socket.AF_INET6: _wire.TCP6,
    _kernel.AF_UNIX: _wire.UNIX,
}


class WorkerPoolOptions(TypedDict, total=False):
    """The keyword arguments of :func:`open_worker_pool`."""

    workers: int | None
    setup: str | None
    max_in_flight: int
    max_queue: int
    max_tries: int
    max_jobs: int | None
    start_timeout: float
    hang_timeout: float
    drain_timeout: float
    crash_limit: int
    on_abandoned: Callable[[AbandonedJob], None] | None


@attrs.define(eq=False)
class WorkerServer(DescriptorOwner):
    """A server that :func:`serve_with_workers` runs.

    Attributes:
      pool: its workers: :meth:`WorkerPool.restart` and :meth:`WorkerPool.scale` are for whoever
        runs it.
      listeners: where it accepts connections; closed once it drains.
      accepted: how many connections it has accepted.
      denied: how many of those the policy of a :class:`UnixListener` has denied.
    """

    pool: WorkerPool
    listeners: Sequence[trio.SocketListener | UnixListener]
    accepted: int = 0
    denied: int = 0
    _accepting: trio.CancelScope = attrs.field(factory=trio.CancelScope, repr=False)
    # When a drain is to have come to its end, in trio's time.
    _deadline: float = attrs.field(default=math.inf, repr=False)
    # Connections about whose peers a policy is being asked.
    _asking: int = attrs.field(default=0, repr=False)
    # Whether it was said that there is no room for descriptors, since there was some.
    _was_said: bool = attrs.field(default=False, repr=False)

    def drain(self, timeout: float | None = None) -> None:
        """Ask the server to stop: no new connections, and the handlers finish.

        Connections that waited in the listeners' queues are still handled. After that
        :func:`serve_with_workers` returns. Asking again changes nothing.

        Args:
          timeout: after so many seconds handlers that are still at work are cancelled, and
            connections that no worker has had room for are closed; the pool's
            ``drain_timeout`` if left out.

        Raises:
          ValueError: a timeout that is negative, or no number.
        """
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"a timeout of 0 or more seconds is due, not {timeout}")
        if not self._accepting.cancel_called:
            timeout = self.pool._supervisor.options.drain_timeout if timeout is None else timeout  # noqa: SLF001 - of this room
            self._deadline = trio.current_time() + timeout
            self._accepting.cancel()

    def statistics(self) -> PoolStatistics:
        """Return what the pool has done, and is doing."""
        return self.pool.statistics()

    async def _serve(self, task_status: trio.TaskStatus[WorkerServer]) -> None:
        async with trio.open_nursery() as asking:
            with self._accepting:
                async with trio.open_nursery() as accepting:
                    for each in self.listeners:
                        accepting.start_soon(
                            self._accept_from, each, asking, name=f"trio_unixconn.pool {each!r}"
                        )
                    task_status.started(self)
            # Only a drain ends that without an exception. While no worker has room, and as long
            # as a policy's check takes, it waits.
            asking.cancel_scope.deadline = self._deadline
            for listener in self.listeners:
                await self._accept_last(listener, asking)
        # Where the deadline has passed, some are still open.
        await _close(self.listeners)
        await self.pool.drain(max(0.0, self._deadline - trio.current_time()))

    async def _accept_from(
        self, listener: trio.SocketListener | UnixListener, asking: trio.Nursery
    ) -> None:
        raw = raw_socket(listener.socket)
        # Trio would remember for ever that somebody waits for descriptor -1.
        while raw.fileno() != -1:
            try:
                await trio.lowlevel.wait_readable(raw)
            except trio.ClosedResourceError:
                break
            # What else comes meanwhile goes along; with the like in the worker, 3 % more a second.
            await trio.lowlevel.checkpoint()
            await self._accept_waiting(listener, asking)
        if not self._accepting.cancel_called:
            raise ConnectionClosedError("somebody else has closed this listener")

    async def _accept_last(
        self, listener: trio.SocketListener | UnixListener, asking: trio.Nursery
    ) -> None:
        """Accept what waits in a listener's queue, and close it."""
        if isinstance(listener, UnixListener):
            await remove_path(listener)
        raw = raw_socket(listener.socket)
        # No more were in the queue; clients may go on connecting until it is closed.
        left = _longest_queue()
        while left > 0 and raw.fileno() != -1:
            count = await self._accept_waiting(listener, asking)
            if not count:
                break
            left -= count
        await _close([listener])

    @enable_ki_protection
    async def _accept_waiting(
        self, listener: trio.SocketListener | UnixListener, asking: trio.Nursery
    ) -> int:
        """Accept what waits, as far as there is room, which is waited for.

        Returns:
          How many; 0 only if none waited.
        """
        raw = raw_socket(listener.socket)
        while True:
            await self.pool._wait_for_room()  # noqa: SLF001 - of this room
            room = self.pool._free() - self._asking  # noqa: SLF001 - as above
            if room <= 0:
                await trio.sleep(ACCEPT_RETRY_DELAY)
                continue
            if raw.fileno() == -1:
                # Closed by somebody else, while there was no room.
                return 0
            accepted, error = _accept(raw, min(_BURST, room))
            self.accepted += len(accepted)
            if isinstance(listener, UnixListener) and listener._policy is not None:  # noqa: SLF001
                self._asking += len(accepted)
                for fd, name in accepted:
                    sock = stdlib_socket.socket(raw.family, raw.type, raw.proto, fileno=fd)
                    asking.start_soon(self._ask, listener, sock, name)
            elif accepted:
                fds = [fd for fd, _ in accepted]
                self.pool._put_accepted(fds, _form_of(listener, raw))  # noqa: SLF001 - as above
            if error is None or accepted:
                # What error there is comes again.
                self._was_said = self._was_said and not accepted
                return len(accepted)
            if not self._was_said:
                logger.warning(
                    "cannot accept connections now (%s); trying again every %s seconds",
                    error.strerror,
                    ACCEPT_RETRY_DELAY,
                )
            self._was_said = True
            await trio.sleep(ACCEPT_RETRY_DELAY)

    async def _ask(
        self, listener: UnixListener, sock: stdlib_socket.socket, name: str | bytes
    ) -> None:
        """Hand a connection to the pool if the listener's policy admits its peer."""
        try:
            conn = listener._connection(trio.socket.from_stdlib_socket(sock), name)  # noqa: SLF001
            async with conn:
                if await listener._admits(conn):  # noqa: SLF001 - as serve_unix
                    # Somebody may have had the pool drain meanwhile.
                    self.pool._supervisor.check_open()  # noqa: SLF001 - of this room
                    form = _form_of(listener, sock)
                    self.pool._put_accepted([conn.detach()], form)  # noqa: SLF001
                else:
                    self.denied += 1
        finally:
            self._asking -= 1


def _accept(raw: Any, most: int) -> tuple[list[tuple[int, Any]], OSError | None]:
    """Accept up to ``most`` that wait; and return what the system said when it had no room.

    The descriptors are the caller's.
    """
    # As accept(), but no socket is made of what only goes on to a worker, which would take 3 of
    # the 35 us that this process has with a connection.
    accept = raw._accept  # noqa: SLF001
    accepted: list[tuple[int, Any]] = []
    while len(accepted) < most:
        try:
            accepted.append(accept())
        except BlockingIOError:
            break
        except OSError as exc:
            if exc.errno in _kernel.OUT_OF_RESOURCES:
                return accepted, exc
            if exc.errno not in _GONE:
                # What was accepted is not lost: the next call says the same again.
                if accepted:
                    break
                raise
    return accepted, None


async def _close(listeners: Sequence[trio.SocketListener | UnixListener]) -> None:
    """Close listeners; that a path cannot be taken away is logged."""
    for listener in listeners:
        if isinstance(listener, UnixListener):
            await remove_path(listener)
        await listener.aclose()


def _form_of(listener: Any, raw: stdlib_socket.socket) -> int:
    if isinstance(listener, UnixListener) and not listener._receive_descriptors:  # noqa: SLF001
        return _wire.REFUSING
    return _FORMS.get(raw.family, _wire.OTHER)


def _longest_queue() -> int:
    try:
        with open("/proc/sys/net/core/somaxconn", "rb") as file:
            return int(file.read()) + 1
    except (OSError, ValueError):
        return stdlib_socket.SOMAXCONN + 1


@enable_ki_protection
async def serve_with_workers(
    handler: str,
    listeners: Sequence[trio.SocketListener | UnixListener],
    *,
    task_status: trio.TaskStatus[WorkerServer] = trio.TASK_STATUS_IGNORED,
    **options: Unpack[WorkerPoolOptions],
) -> None:
    """Accept connections here, and have workers handle them.

    ::

        listeners = await trio.open_tcp_listeners(8000, host="127.0.0.1")
        server = await nursery.start(serve_with_workers, "package.module:handler", listeners)
        ...
        server.drain(timeout=10)

    Cancelling this ends the handlers, too; to let them finish, use :meth:`WorkerServer.drain`.

    Args:
      handler: ``"package.module:name"``, as of :func:`open_worker_pool`.
      listeners: of ``trio.open_tcp_listeners``, :func:`open_unix_listener` and the like; the
        server owns them from now on. The policy of a :class:`UnixListener` is asked here.
      options: the keyword arguments of :func:`open_worker_pool`.

    Returns:
      When a drain has come to its end. ``nursery.start`` returns a :class:`WorkerServer`, once
      the workers are ready.

    Raises:
      TypeError: something that is no listener; they all stay the caller's.
      TypeError, ValueError, WorkerStartError, ExceptionGroup: as :func:`open_worker_pool`. The
        listeners are closed then.
      ExceptionGroup: of what a policy's check, or accepting raised
        (:class:`ConnectionClosedError`, if somebody else has closed a listener).
    """
    listeners = list(listeners)
    if not listeners:
        raise ValueError("at least one listener is due")
    for listener in listeners:
        if not isinstance(listener, (trio.SocketListener, UnixListener)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"a trio.SocketListener or UnixListener is due, not {type(listener).__name__}"
            )
    try:
        async with open_worker_pool(handler, **options) as pool:
            await WorkerServer(pool, listeners)._serve(task_status)  # noqa: SLF001
    finally:
        with trio.CancelScope(shield=True):
            await _close(listeners)
