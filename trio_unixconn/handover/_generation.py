"""Generation: a server that a successor replaces without dropping a connection.

What we want: two processes can accept from one listening socket at the same time without harm. So
nothing has to be exchanged at one moment, and no crash needs a consensus: the new generation
accepts before the old one stops. At every moment, one of them accepts.

The phases of a generation, and of the handover to its successor:

    STARTING ------> SERVING <------> HANDING_OVER ------> RELEASED
      |  ready()       |     fails         |  RELEASED        |  drains, passes connections on
      |                |                   |                  |
      +----------------+-------------------+------------------+--> the block of open_generation ends

    HANDING_OVER: the successor takes listeners, prepares, is told COMMIT, and serves. This
    generation accepts until SERVING arrives. From then on, during the probation, it only keeps the
    listeners.

A successor is STARTING until it has PREPARED and was told COMMIT. The end of the channel before
RELEASED means that the generation before has died: the successor has its listeners, and goes on
as the first. So a generation that gives up a handover says ABORT first.

The newest generation has a channel to each one that still drains, so that a long drain neither
keeps the next upgrade from happening, nor loses the way for its connections. RELEASED carries the
older channels along.

Invariant: between two scheduling points, a generation is in one of these phases, and only one task
hands over.
"""

from __future__ import annotations

import enum
import errno
import logging
import math
import os
import socket as stdlib_socket
import sys
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from .._accept import ACCEPT_RETRY_DELAY
from .._address import AddressLike, UnixSocketAddress
from .._client import open_unix_connection
from .._closing import close_fds
from .._connection import close_now
from .._fds import fileno
from .._frames import FrameError, encode_frame
from .._listener import UnixListener, open_unix_listener
from .._owner import DescriptorOwner
from .._paths import absolute
from .._policy import PeerPolicy, check_peer, check_policy
from .._sockopts import raw_socket
from .._trio_task import check_task
from ..errors import (
    AddressInUseError,
    ConnectionClosedError,
    EndOfStreamError,
    IOErrorEnum,
    PeerDeniedError,
    SendError,
    TakeOverError,
    UnixConnectionError,
    UpgradeFailedError,
)
from . import _giver, _protocol, _spawn, _taker
from ._channel import Channel, expect_no_fds
from ._listeners import Gate, GenerationListener
from ._manifest import Manifest, describe_socket
from ._passing import PassedConnections, Passer
from ._predecessor import Predecessor
from ._processor import leave_processor
from ._serving import GenerationHooks, GenerationServer

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

if TYPE_CHECKING:
    from .._buffers import Buffer
    from .._connection import UnixConnection
    from .._fds import FileDescriptor
    from ._manifest import ListenerEntry

_T = TypeVar("_T")

logger: Final = logging.getLogger("trio_unixconn.handover")

# How long a client of the rendezvous path has for its first frame, in seconds.
HELLO_TIMEOUT: Final = 10.0
# How long the service manager has to process a message, in seconds.
MANAGER_TIMEOUT: Final = 5.0
# How long a successor has to take the rendezvous path, in seconds.
MOVE_TIMEOUT: Final = 5.0
# How long to wait before the next attempt to reach the generation that runs, in seconds.
RETRY_DELAY: Final = 0.02
# How long an address may still belong to a generation that has ended, in seconds, and the pause
# between two attempts to listen there.
IN_USE_TIMEOUT: Final = 5.0
IN_USE_DELAY: Final = 0.01
MAX_BACKLOG: Final = 0xFFFF


class ServiceNotifier(Protocol):
    """What a generation tells the service manager; ``systemd.ServiceManager`` is one.

    Attributes:
      address: of the manager's socket, which a successor gets as NOTIFY_SOCKET; None if there is
        no manager.
      watchdog_timeout: within how many seconds it expects a heartbeat; None: it expects none.
    """

    @property
    def address(self) -> str | None: ...
    @property
    def watchdog_timeout(self) -> float | None: ...
    async def ready(self) -> None: ...
    async def reloading(self) -> None: ...
    async def stopping(self) -> None: ...
    async def main_pid(self, pid: int | None = None) -> None: ...
    async def barrier(self) -> None: ...


class Phase(enum.Enum):
    """What a generation does now."""

    STARTING = "starting"
    SERVING = "serving"
    HANDING_OVER = "handing over"
    RELEASED = "released"


@attrs.frozen
class Upgrade:
    """A successful upgrade.

    Attributes:
      pid: of the process that serves now.
      number: of its generation.
      seconds: how long it took, from its start until it served and its probation was over.
    """

    pid: int
    number: int
    seconds: float


@attrs.frozen
class _Options:
    path: UnixSocketAddress
    name: str
    policy: PeerPolicy
    command: Sequence[str] | None
    cwd: str | None
    stdout: FileDescriptor | None
    stderr: FileDescriptor | None
    timeout: float
    probation: float
    max_draining: int
    manager: ServiceNotifier | None


class Generation(DescriptorOwner):
    """A generation of a server: a process that can hand over to its successor.

    :func:`open_generation` makes one.

    Attributes:
      number: 1 for the first generation, one more for each successor.
      name: of the service.
      state: what the generation before has left (:meth:`set_state`); None if there was none, or if
        it set none.
      replaced_by: the upgrade that has replaced this generation; None until then.
    """

    def __init__(self, options: _Options) -> None:
        self._options = options
        self.name: str = options.name
        self.number: int = 1
        # Whether another generation was alive at the start of this one.
        self._had_predecessor = False
        self.state: bytes | None = None
        self.replaced_by: Upgrade | None = None
        self._phase = Phase.STARTING
        self._gate = Gate()
        self._listeners: dict[str, GenerationListener[Any]] = {}
        self._state_function: Callable[[], bytes] | None = None
        # A nursery of open_generation().
        self._nursery: trio.Nursery
        # What was inherited and the program has not asked for yet; the channel to the generation
        # before, until that has released this one or has died.
        self._taken: _taker.Taken | None = None
        self._before: Channel | None = None
        self._rendezvous: UnixListener | None = None
        self._connections = PassedConnections()
        # Generations that drain, the oldest first.
        self._draining: list[Predecessor] = []
        self._successor: Channel | None = None
        self._passer: Passer | None = None
        self._process: _spawn.SuccessorProcess | None = None
        # Of the handover in progress.
        self._attempt: trio.CancelScope | None = None
        self._attempt_over = trio.Event()
        # Whether the program has failed, so that a successor is to go on without this process.
        self._has_crashed = False
        # Why, in words of the program; default: the traceback.
        self._failure = ""
        # Whether this generation ends without a successor.
        self._is_retired = False
        # Set when a server is ready.
        self._server_ready = trio.Event()
        # The servers of the successor to which connections can be passed on.
        self._accepts: frozenset[str] = frozenset()
        self._prepared = trio.Event()
        self._may_accept = trio.Event()
        # This generation serves, or is not going to.
        self._start_over = trio.Event()
        self._confirmed = trio.Event()
        self._replaced = trio.Event()
        # The rendezvous path leads to the successor, or the successor has ended.
        self._moved = trio.Event()
        self._overdue = trio.Event()

    ################################################################
    # Listeners
    ################################################################

    @enable_ki_protection
    async def listen_tcp(
        self,
        name: str,
        port: int,
        *,
        host: str = "127.0.0.1",
        backlog: int | None = None,
    ) -> GenerationListener[trio.SocketStream]:
        """Return the TCP listener of this name: inherited, or opened.

        It is inherited if the generation before has a listener of this name at this address.
        If not, it is opened. It does not accept before :meth:`ready`.

        Args:
          name: by which the next generation finds it.
          port: 0 for one that the system chooses; an inherited listener keeps its port.
          host: an address or a name, of which the first address is used. For several addresses,
            open several listeners.
          backlog: how many connections may wait to be accepted; default: as many as the system
            allows. Not used for an inherited listener.

        Raises:
          ValueError: this generation has a listener of this name.
          TypeError: a wrong argument.
          OSError: from getaddrinfo(3), bind(2) or listen(2); EADDRINUSE if another process
            listens there.
          RuntimeError: after :meth:`ready`.
        """
        check_task()
        self._check_name(name)
        if type(port) is not int:
            raise TypeError(f"port must be an int, got {type(port).__name__}")
        found = await trio.socket.getaddrinfo(
            host, port, type=stdlib_socket.SOCK_STREAM, flags=stdlib_socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        taken = self._take(
            name,
            lambda entry: (
                entry.kind != "unix"
                and entry.bound[0] == address[0]
                and port in (0, entry.bound[1])
            ),
        )
        if taken is not None:
            socket = trio.socket.from_stdlib_socket(taken[1])
        else:
            socket = trio.socket.socket(family, kind, protocol)
            try:
                socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEADDR, 1)
                if family == stdlib_socket.AF_INET6:
                    socket.setsockopt(stdlib_socket.IPPROTO_IPV6, stdlib_socket.IPV6_V6ONLY, 1)
                await self._retry_in_use(partial(socket.bind, address))
                socket.listen(MAX_BACKLOG if backlog is None else backlog)
            except BaseException:
                socket.close()
                raise
        return self._add(name, trio.SocketListener(socket), inherited=taken is not None)

    async def _retry_in_use(self, listen: Callable[[], Awaitable[_T]]) -> _T:
        """Listen at an address which the generation before may hold, although it has ended.

        When a process dies, its connections can be closed before its listeners.
        """
        deadline = trio.current_time() + (IN_USE_TIMEOUT if self._had_predecessor else 0)
        while True:
            try:
                return await listen()
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE or trio.current_time() >= deadline:
                    raise
            await trio.sleep(IN_USE_DELAY)

    @enable_ki_protection
    async def listen_unix(
        self,
        name: str,
        address: AddressLike,
        *,
        mode: int = 0o600,
        owner: int | str | None = None,
        group: int | str | None = None,
        backlog: int | None = None,
        policy: PeerPolicy | None = None,
        receive_descriptors: bool = True,
    ) -> GenerationListener[UnixConnection]:
        """Return the Unix listener of this name: inherited, or opened.

        As :meth:`listen_tcp`. The generation that ends without a successor removes the path.

        Args:
          name: by which the next generation finds it.
          address, policy, receive_descriptors: as of :func:`open_unix_listener`.
          mode, owner, group, backlog: as of :func:`open_unix_listener`; not used for an inherited
            listener.

        Raises:
          ValueError: this generation has a listener of this name; or no address.
          TypeError: as :func:`open_unix_listener`.
          AddressInUseError: as :func:`open_unix_listener`.
          OSError: as :func:`open_unix_listener`.
          RuntimeError: after :meth:`ready`.
        """
        check_task()
        self._check_name(name)
        found = UnixSocketAddress.from_any(address)
        check_policy(policy)
        if found.get_is_anonymous():
            raise ValueError("a listener that passes to the next generation requires an address")
        path = None
        if not found.get_is_abstract():
            path = os.fsdecode(absolute(found.native))
        taken = self._take(
            name,
            lambda entry: (
                entry.kind == "unix"
                and (entry.path == path if path is not None else entry.bound == _text(found))
            ),
        )
        file = None
        if taken is not None:
            await trio.lowlevel.checkpoint()
            entry, sock = taken
            file = entry.file
            listener = _inherited_unix(sock, found, policy, receives=receive_descriptors)
        else:
            listener = await self._retry_in_use(
                partial(
                    open_unix_listener,
                    found,
                    mode=mode,
                    owner=owner,
                    group=group,
                    backlog=backlog,
                    policy=policy,
                    receive_descriptors=receive_descriptors,
                )
            )
        return self._add(name, listener, inherited=taken is not None, path=path, file=file)

    @property
    def listeners(self) -> Sequence[GenerationListener[Any]]:
        """The listeners of this generation, in the order in which they were opened."""
        return tuple(self._listeners.values())

    @property
    def offered(self) -> Sequence[str]:
        """The names of the listeners of the generation before that were not asked for yet."""
        return () if self._taken is None else tuple(self._taken.listeners)

    def inherit(
        self, name: str, *, policy: PeerPolicy | None = None, receive_descriptors: bool = True
    ) -> GenerationListener[Any] | None:
        """Return the listener of this name of the generation before, whatever its address.

        For listeners that a program cannot open itself (:meth:`adopt`).

        Args:
          policy, receive_descriptors: as of :func:`open_unix_listener`, for a Unix socket.

        Returns:
          None if the generation before has none of this name, or if there is none.

        Raises:
          ValueError: this generation has a listener of this name.
          TypeError: a wrong argument.
          RuntimeError: after :meth:`ready`.
        """
        self._check_name(name)
        check_policy(policy)
        taken = self._take(name, lambda _: True)
        if taken is None:
            return None
        entry, sock = taken
        if entry.kind != "unix":
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
            return self._add(name, listener, inherited=True)
        if entry.path is not None:
            address = UnixSocketAddress.path(entry.path)
        else:
            address = UnixSocketAddress.from_native(os.fsencode(str(entry.bound)))
        return self._add(
            name,
            _inherited_unix(sock, address, policy, receives=receive_descriptors),
            inherited=True,
            path=entry.path,
            file=entry.file,
        )

    def adopt(
        self, name: str, listener: trio.SocketListener | UnixListener
    ) -> GenerationListener[Any]:
        """Make a listener that was opened otherwise one of this generation, which owns it then.

        ::

            web = gen.inherit("web") or gen.adopt("web", inherited_listeners()["web"][0])

        Args:
          name: by which the next generation finds it.
          listener: of a TCP or a Unix socket, for example one that systemd has opened.

        Raises:
          TypeError: not such a listener; it is still the caller's.
          ValueError: this generation has a listener of this name; or another kind of socket; it is
            still the caller's.
          ConnectionClosedError: the listener is closed.
          RuntimeError: after :meth:`ready`.
        """
        self._check_name(name)
        if not isinstance(listener, (trio.SocketListener, UnixListener)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"expected a trio.SocketListener or a UnixListener, got {type(listener).__name__}"
            )
        if listener.socket.fileno() == -1:
            raise ConnectionClosedError("this listener is closed")
        describe_socket(raw_socket(listener.socket))
        path = None
        if isinstance(listener, UnixListener):
            address = listener.get_local_address()
            if not (address.get_is_abstract() or address.get_is_anonymous()):
                path = os.fsdecode(absolute(address.native))
        return self._add(name, listener, path=path)

    def _add(
        self,
        name: str,
        listener: trio.SocketListener | UnixListener,
        *,
        inherited: bool = False,
        path: str | None = None,
        file: tuple[int, int] | None = None,
    ) -> GenerationListener[Any]:
        made = GenerationListener[Any](
            name,
            self._gate,
            listener,
            inherited=inherited,
            path=path,
            file=file,
            on_prepared=self._on_prepared,
        )
        self._listeners[name] = made
        return made

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"name must be a str, got {type(name).__name__}")
        if name in self._listeners:
            raise ValueError(f"this generation has a listener named {name!r} already")
        if self._prepared.is_set():
            raise RuntimeError("listeners must be opened before ready()")

    def _take(
        self, name: str, matches: Callable[[ListenerEntry], bool]
    ) -> tuple[ListenerEntry, stdlib_socket.socket] | None:
        """Return the inherited listener of this name, if there is one at this address."""
        if self._taken is None or name not in self._taken.listeners:
            return None
        if not matches(self._taken.listeners[name][0]):
            return None
        return self._taken.listeners.pop(name)

    ################################################################
    # State
    ################################################################

    def set_state(self, function: Callable[[], bytes]) -> None:
        """Set what the next generation gets as its :attr:`state`.

        Args:
          function: returns the state, as bytes; called at the begin of each handover. If it
            raises an exception, that handover fails. More than 64 KiB cross as sealed memory.

        Raises:
          TypeError: not callable.
        """
        if not callable(function):
            raise TypeError(f"expected a function, got {type(function).__name__}")
        self._state_function = function

    ################################################################
    # The life of a generation
    ################################################################

    @property
    def phase(self) -> Phase:
        """What this generation does now."""
        return self._phase

    async def ready(self) -> None:
        """Say that this generation can serve, and wait until it may accept.

        The first generation may accept at once. A successor may accept when the one before has
        been told; that one stops when tasks of this generation accept from each of its listeners.
        So servers can be started before this or after it. :meth:`confirmed` waits until the one
        before has stopped for good.

        First, this waits for the servers with ``generation=`` that were started
        (:func:`serve_unix`, :func:`serve_with_workers`). If such servers have all listeners, they
        do all of this: then nothing has to call it.

        Inherited listeners that the program has not asked for are closed.

        Raises:
          TakeOverError: the generation before does not answer within the ``timeout`` of
            :func:`open_generation`.
        """
        check_task()
        while any(each.is_claimed and not each.is_prepared for each in self._listeners.values()):
            await self._server_ready.wait()
        if not self._prepared.is_set():
            self._prepared.set()
            if self._taken is not None:
                self._taken.close()
            if self._before is None:
                self._become_first()
            else:
                keeps = [each.name for each in self._listeners.values() if each.inherited]
                accepts = self._connections.servers
                # If it has ended, the task that follows it lets this generation accept.
                await self._before.send(_protocol.pack_prepared(keeps, accepts))
        with trio.move_on_after(self._options.timeout) as scope:
            await self._may_accept.wait()
        if scope.cancelled_caught:
            raise TakeOverError(
                f"the generation that runs did not answer within {self._options.timeout:g} s"
            )

    def _on_prepared(self) -> None:
        """Note that a server with ``generation=`` could accept now."""
        self._server_ready.set()
        self._server_ready = trio.Event()
        if all(each.is_prepared for each in self._listeners.values()):
            self._nursery.start_soon(self.ready)

    async def confirmed(self) -> None:
        """Wait until no other generation accepts, or will accept again.

        That is when the probation is over. What only one process may do, such as periodic jobs,
        begins here.
        """
        check_task()
        await self._confirmed.wait()

    async def replaced(self) -> None:
        """Wait until a successor serves, and this generation has stopped accepting for good.

        Afterwards, let handlers finish or pass their connections on (:meth:`pass_on`), and leave
        the block of :func:`open_generation`.
        """
        check_task()
        await self._replaced.wait()

    async def overdue(self) -> None:
        """Wait until too many generations drain (``max_draining``), of which this is the oldest.

        Then end at once: cancel what still runs.
        """
        check_task()
        await self._overdue.wait()

    def retire(self) -> None:
        """Hand over no more: this generation is going to end without a successor.

        A handover in progress is given up, and later ones fail. The rendezvous path is removed, so
        that another process can be the first generation. Servers with ``generation=`` do this when
        they are drained. After :meth:`replaced`, this does nothing.
        """
        if self._phase is Phase.RELEASED:
            return
        self._is_retired = True
        self._start_over.set()
        if self._attempt is not None:
            self._attempt.cancel()
        self._nursery.start_soon(self._close_rendezvous)

    ################################################################
    # Handing over
    ################################################################

    @property
    def successor_pid(self) -> int | None:
        """The process that this one has started as its successor, and has to reap; or None."""
        return None if self._process is None else self._process.pid

    @property
    def passed_on(self) -> int:
        """How many connections the successor has taken (:meth:`pass_on`)."""
        return 0 if self._passer is None else self._passer.taken

    async def upgrade(
        self,
        command: Sequence[str] | None = None,
        *,
        timeout: float | None = None,
        probation: float | None = None,
    ) -> Upgrade:
        """Start a successor, and hand over to it.

        This generation accepts until the successor does. If the successor fails, exits, or does
        not serve in time, it is told to end, and killed if it does not: all is as before. The same
        if this is cancelled.

        Args:
          command: the program and its arguments; default: that of :func:`open_generation`, or the
            one that started this process. It must call :func:`open_generation`.
          timeout: in how many seconds it must serve; default: that of :func:`open_generation`.
            If this generation is still starting, this waits for that first, as long at most.
          probation: for how many seconds this generation keeps the listeners after that, without
            accepting. If the successor ends in this time, this generation accepts again.

        Returns:
          When the successor serves and its probation is over.

        The first process of a pid namespace cannot do this, because its end is the end of all
        others: start the successor by itself, for example in another container.

        Raises:
          UpgradeFailedError: this generation serves as before.
        """
        check_task()
        if os.getpid() == 1:
            raise UpgradeFailedError(
                "process 1 cannot start its successor, because all processes of its pid namespace "
                "end with it; start the successor by itself, as for open_generation(take_over=True)"
            )
        options = self._options
        timeout = options.timeout if timeout is None else timeout
        probation = options.probation if probation is None else probation
        command = command or options.command or _spawn.default_command()
        began = time.monotonic()
        async with self._hand_over(timeout):
            process = self._process = self._start_successor(command)
            channel = Channel(process.conn, process.open_pidfd())

            async def greet() -> None:
                await _giver.greet(channel, self.name)

            try:
                await self._give(channel, process.pid, greet, timeout, probation)
            except UpgradeFailedError as exc:
                how = await process.end()
                text = exc.traceback or process.last_errors()
                error = UpgradeFailedError(f"{exc.args[0]}; it {how}", text)
                error.code = exc.code
                raise error from exc
            except BaseException:
                if not self._has_crashed:
                    await process.end()
                raise
            finally:
                if self._phase is not Phase.RELEASED:
                    self._process = None
                    process.close()
        return self._log_upgrade(process.pid, time.monotonic() - began)

    def _start_successor(self, command: Sequence[str]) -> _spawn.SuccessorProcess:
        options = self._options
        try:
            return _spawn.start(
                command,
                self._environment(),
                cwd=options.cwd,
                stdout=None if options.stdout is None else fileno(options.stdout),
                stderr=None if options.stderr is None else fileno(options.stderr),
            )
        except OSError as exc:
            raise UpgradeFailedError(f"cannot start the successor: {exc}") from exc

    def _environment(self) -> dict[str, str]:
        manager = self._options.manager
        found: dict[str, str] = {}
        if manager is not None and manager.address is not None:
            found["NOTIFY_SOCKET"] = manager.address
            if manager.watchdog_timeout is not None:
                # Without WATCHDOG_PID, it is about any process.
                found["WATCHDOG_USEC"] = str(round(manager.watchdog_timeout * 1_000_000))
        return found

    def _log_upgrade(self, pid: int, seconds: float) -> Upgrade:
        upgrade = self.replaced_by = Upgrade(pid, self.number + 1, seconds)
        logger.info(
            "%s: generation %d (pid %d) serves after %.3f s, %d listeners; generation %d drains",
            self.name,
            upgrade.number,
            pid,
            seconds,
            len(self._listeners),
            self.number,
        )
        return upgrade

    @asynccontextmanager
    async def _hand_over(self, timeout: float) -> AsyncGenerator[None, None]:
        """Reserve this generation for one handover.

        Args:
          timeout: how long to wait for the end of its start, in seconds.

        Raises:
          UpgradeFailedError: it does not serve, or another handover is in progress.
        """
        with trio.move_on_after(timeout) as scope:
            await self._start_over.wait()
        if scope.cancelled_caught:
            error = UpgradeFailedError(
                f"this generation is still starting after {timeout:g} s (timeout)"
            )
            error.code = IOErrorEnum.TIMED_OUT
            raise error
        if self._is_retired:
            raise UpgradeFailedError("this generation is draining, and ends without a successor")
        if self._phase is not Phase.SERVING:
            error = UpgradeFailedError(f"this generation is {self._phase.value}")
            error.code = IOErrorEnum.BUSY
            raise error
        self._phase = Phase.HANDING_OVER
        self._attempt_over = trio.Event()
        try:
            with trio.CancelScope() as self._attempt:
                await self._tell_reloading()
                yield
            if self._attempt.cancelled_caught:
                raise UpgradeFailedError("this generation ends")
        finally:
            self._attempt = None
            if self._phase is Phase.HANDING_OVER:
                if not self._is_retired:
                    with trio.CancelScope(shield=True):
                        await self._tell_ready(is_orphan=False)
                self._phase = Phase.SERVING
            self._attempt_over.set()

    @enable_ki_protection
    async def _give(
        self,
        channel: Channel,
        pid: int,
        greet: Callable[[], Awaitable[None]],
        timeout: float,
        probation: float,
    ) -> None:
        """Hand over to a successor; tell it, and close the channel, if that fails.

        Raises:
          UpgradeFailedError: this generation serves as before.
        """
        self._nursery.start_soon(channel.watch_process)
        reason = "the generation that runs ends"
        try:
            async with _giver.within(timeout):
                with self._leaving_processor(pid):
                    await greet()
                    giving = self._giving()
                    prepared = await _giver.give(channel, giving)
            self._gate.block()
            try:
                await _giver.wait_probation(channel, probation)
                await self._release(channel, pid, prepared)
            except BaseException:
                self._gate.open()
                raise
        except FrameError as exc:
            reason = f"the successor broke the protocol: {exc}"
            raise UpgradeFailedError(reason) from exc
        except UpgradeFailedError as exc:
            reason = str(exc.args[0])
            raise
        finally:
            if self._phase is not Phase.RELEASED:
                if not self._has_crashed:
                    await channel.send(_protocol.pack_text(_protocol.ABORT, reason))
                channel.close()

    @contextmanager
    def _leaving_processor(self, pid: int) -> Generator[None, None, None]:
        """Let a successor start in this block, even if all processors are busy."""
        scope = trio.CancelScope()

        async def leave() -> None:
            with scope:
                await leave_processor(pid, self._gate)

        self._nursery.start_soon(leave)
        try:
            yield
        finally:
            scope.cancel()
            self._gate.pause(False)

    def _giving(self) -> _giver.Giving:
        try:
            state = None if self._state_function is None else self._state_function()
        except Exception as exc:
            raise UpgradeFailedError(f"the function of set_state() raised {exc!r}") from exc
        if not isinstance(state, bytes | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UpgradeFailedError(
                f"the function of set_state() must return bytes, got {type(state).__name__}"
            )
        listeners = [each for each in self._listeners.values() if each.socket.fileno() != -1]
        return _giver.Giving(
            Manifest(self.name, self.number, [each.entry() for each in listeners]),
            [each.socket.fileno() for each in listeners],
            state,
        )

    async def _release(self, channel: Channel, pid: int, prepared: _protocol.Prepared) -> None:
        """Give up the listeners; after this, the successor is the service.

        Raises:
          UpgradeFailedError: the successor has ended, and was not told.
        """
        # A cancellation cannot end the handover in the middle of this, which takes a limited time.
        with trio.CancelScope(shield=True):
            await self._tell_main_pid(pid)
            fds = [fd for each in self._draining if (fd := await each.stop()) is not None]
            self._draining.clear()
            frame = encode_frame(_protocol.RELEASED, carries_fds=bool(fds))
            sent = False
            try:
                sent = await channel.send(frame, fds)
            except SendError as exc:
                logger.warning("%s: cannot pass on draining generations: %s", self.name, exc)
            if not sent:
                self._follow_draining([Channel.from_fd(fd) for fd in fds])
                await self._tell_main_pid(os.getpid())
                raise UpgradeFailedError("the successor has ended before it was told")
            close_fds(fds)
        self._phase = Phase.RELEASED
        channel.forget_process()
        for name in prepared.keeps:
            if name in self._listeners:
                self._listeners[name].disown_path()
        self._accepts = frozenset(prepared.accepts)
        self._gate.notify()
        self._successor, self._passer = channel, Passer(channel)
        self._nursery.start_soon(self._follow_successor, channel, self._passer)
        self._replaced.set()
        self._connections.end()

    async def _follow_successor(self, channel: Channel, passer: Passer) -> None:
        """After RELEASED: close the listeners, and pass connections on."""
        try:
            await self._listen_to_successor(channel, passer)
        finally:
            self._moved.set()

    async def _listen_to_successor(self, channel: Channel, passer: Passer) -> None:
        with trio.CancelScope(shield=True):
            for each in self._listeners.values():
                await each.aclose()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(passer.run)
            if self._process is not None:
                nursery.start_soon(self._process.wait)
            is_gone = False
            try:
                while (frame := await channel.receive()) is not None:
                    if frame.kind in (_protocol.TAKEN, _protocol.REFUSED):
                        passer.handle(frame)
                        continue
                    expect_no_fds(frame)
                    if frame.kind == _protocol.MOVED:
                        await self._close_rendezvous()
                        self._moved.set()
                    elif frame.kind == _protocol.FINISH:
                        self._overdue.set()
                    else:
                        raise _protocol.ProtocolError(f"unexpected frame {frame.kind}")
                is_gone = True
            except FrameError as exc:
                logger.warning("%s: the successor broke the protocol: %s", self.name, exc)
            # Before the passer gives connections back: a message with them may wait to be sent.
            channel.close()
            await passer.stop(is_successor_gone=is_gone)
            # It cannot say MOVED any more.
            await self._close_rendezvous()

    ################################################################
    # The service manager
    ################################################################

    async def _tell_main_pid(self, pid: int) -> None:
        """Say which process is the main one, and wait until the service manager knows."""
        if (manager := self._options.manager) is not None:
            async with _told(self.name, "the main pid"):
                await manager.main_pid(pid)
                await manager.barrier()

    async def _tell_reloading(self) -> None:
        if (manager := self._options.manager) is not None:
            async with _told(self.name, "that an upgrade begins"):
                await manager.reloading()

    async def _tell_ready(self, *, is_orphan: bool) -> None:
        if (manager := self._options.manager) is not None:
            async with _told(self.name, "that this process is ready"):
                if is_orphan:
                    await manager.main_pid(os.getpid())
                await manager.ready()

    ################################################################
    # Connections that are passed on
    ################################################################

    async def pass_on(self, stream: trio.SocketStream | UnixConnection, data: Buffer = b"") -> None:
        """Pass a connection on to the successor, whose :meth:`connections` return it.

        Call it after :meth:`replaced`, when the connection is at a boundary of its protocol: no
        part of a message was read or is still to be written. No task may use the stream
        meanwhile. When this returns, the successor has the connection, and the stream is closed
        here without a trace on the wire.

        If this is cancelled before the connection was sent, the stream is unchanged. If it is
        cancelled later, the stream is closed here, and the successor may have it.

        Args:
          data: what the successor must know of it, at most 16 MiB.

        Raises:
          SuccessorGoneError: there is no successor, or it has ended; the stream is still open. Or
            this generation has ended the handover after the connection was sent, because its block
            ends or the successor broke the protocol; the stream is closed.
          TypeError: another kind of stream, such as a ``trio.SSLStream``, whose state is in this
            process.
          ReadAheadError: the connection holds messages that were read ahead.
          ConnectionClosedError: the stream is closed.
          RuntimeError: this generation was not replaced.
        """
        check_task()
        if self._passer is None:
            raise RuntimeError("pass_on() requires a successor; wait for replaced() first")
        await self._passer.pass_on(stream, data)

    def connections(self) -> PassedConnections:
        """Iterate over the connections that earlier generations pass on.

        ``async for stream, data in gen.connections()``. The caller owns each stream. The iteration
        ends after this generation was replaced: what still drains passes its connections on to
        the successor then. Several tasks can iterate; each connection goes to one of them.

        A generation that does not iterate takes no more than 1,024 connections; the others stay
        with their generations.
        """
        return self._connections

    ################################################################
    # Servers
    ################################################################

    def server(self, listeners: Sequence[object], *, unix_only: bool = False) -> GenerationServer:
        """Return the part of a server in this generation, for those with ``generation=``.

        Args:
          unix_only: whether it accepts from one listener, of a Unix socket.

        Raises:
          TypeError: not listeners of this generation.
          ValueError: no listener, one of them twice, or one that another server has.
        """
        hooks = GenerationHooks(
            has_listener=lambda each: self._listeners.get(each.name) is each,
            wait_settled=self._wait_settled,
            add_server=self._connections.add_server,
            passer_to=lambda name: self._passer if name in self._accepts else None,
        )
        return GenerationServer(self, hooks, listeners, unix_only=unix_only)

    async def _wait_settled(self) -> bool:
        """Wait until it is certain which generation accepts; return whether it is the successor."""
        while self._phase is Phase.HANDING_OVER and not self._gate.is_open:
            await self._gate.wait_changed()
        return self._phase is Phase.RELEASED

    ################################################################
    # The begin: taking over
    ################################################################

    async def _start(self, nursery: trio.Nursery, *, take_over: bool) -> None:
        self._nursery = nursery
        conn = _spawn.inherited_connection()
        while not await self._start_once(conn, take_over=take_over):
            conn = None
            await trio.sleep(RETRY_DELAY)

    async def _start_once(self, conn: UnixConnection | None, *, take_over: bool) -> bool:
        """Take over, or open the rendezvous path; return False if it has to be tried again."""
        if conn is None and take_over:
            conn = await self._connect()
        elif conn is not None:
            await self._check_inherited(conn)
        if conn is None:
            try:
                await self._open_rendezvous(replace=False)
            except AddressInUseError:
                # Another process has just done the same.
                if take_over:
                    return False
                raise
            self._gate.allow_early()
            return True
        self._had_predecessor = True
        channel = Channel(conn, _peer_pidfd(conn))
        self._nursery.start_soon(channel.watch_process)
        try:
            with trio.fail_after(self._options.timeout):
                taken = await _taker.take(channel, self.name)
        except trio.TooSlowError as exc:
            channel.close()
            raise TakeOverError(
                f"the generation that runs did not answer within {self._options.timeout:g} s"
            ) from exc
        except BaseException:
            channel.close()
            raise
        if taken is None:
            # It has ended, or was replaced.
            channel.close()
            return False
        self._taken, self._before = taken, channel
        self.number = taken.manifest.number + 1
        self.state = taken.state
        self._nursery.start_soon(self._follow_before, channel)
        return True

    async def _check_inherited(self, conn: UnixConnection) -> None:
        """Close a connection unless the policy admits its peer."""
        try:
            denial = await check_peer(conn, self._options.policy)
            if denial is not None:
                raise _not_admitted(str(denial))
        except BaseException:
            close_now(conn)
            raise

    async def _connect(self) -> UnixConnection | None:
        try:
            return await open_unix_connection(self._options.path, policy=self._options.policy)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except PeerDeniedError as exc:
            raise _not_admitted(str(exc)) from exc

    async def _follow_before(self, channel: Channel) -> None:
        """Follow what the generation before says until RELEASED, or until it has ended.

        Raises:
          TakeOverError: it has ended the handover.
        """
        try:
            released = await self._await_released(channel)
        except FrameError as exc:
            self._gate.block()
            raise TakeOverError(f"the generation that runs broke the protocol: {exc}") from exc
        except TakeOverError:
            self._gate.block()
            if self._is_retired:
                # It answers to the end of this one.
                return
            raise
        channel.forget_process()
        for each in self._listeners.values():
            each.own_path()
        if released is None:
            channel.close()
            logger.warning(
                "%s: generation %d has ended, generation %d goes on without it",
                self.name,
                self.number - 1,
                self.number,
            )
        else:
            # Before the next scheduling point: from now on, the end of this generation closes them.
            self._follow_draining(released)
        await self._try_open_rendezvous()
        # Not before: ready() would confirm this generation while the path is not there yet.
        self._before = None
        if released is not None:
            await channel.send(encode_frame(_protocol.MOVED))
            self._follow_draining([channel])
            await self._end_oldest()
            self._phase = Phase.SERVING
            self._confirmed.set()
            self._start_over.set()
            await self._tell_ready(is_orphan=False)
        elif self._prepared.is_set():
            self._become_first()
        else:
            self._gate.allow_early()

    async def _await_released(self, channel: Channel) -> list[Channel] | None:
        """Return channels to older generations; None if the one before has ended."""
        while (frame := await channel.receive()) is not None:
            if frame.kind == _protocol.RELEASED and self._may_accept.is_set():
                # Without a free slot, the older ones cannot pass anything on, and drain.
                return [Channel.from_fd(fd) for fd in frame.fds or []]
            if frame.kind != _protocol.COMMIT or not self._prepared.is_set():
                _taker.refused(frame)
            expect_no_fds(frame)
            self._gate.open()
            self._may_accept.set()
            self._nursery.start_soon(self._say_serving, channel)
        return None

    async def _say_serving(self, channel: Channel) -> None:
        for each in self._listeners.values():
            await each.is_used.wait()
        await channel.send(encode_frame(_protocol.SERVING))

    def _become_first(self) -> None:
        """Serve without a generation before this one."""
        self._gate.open()
        self._may_accept.set()
        self._phase = Phase.SERVING
        self._confirmed.set()
        self._start_over.set()
        self._nursery.start_soon(partial(self._tell_ready, is_orphan=self.number > 1))

    def _follow_draining(self, channels: Sequence[Channel]) -> None:
        for channel in channels:
            predecessor = Predecessor(channel, self._connections, self._draining)
            self._draining.append(predecessor)
            self._nursery.start_soon(predecessor.run)

    async def _end_oldest(self) -> None:
        excess = len(self._draining) - self._options.max_draining
        for each in self._draining[: max(0, excess)]:
            await each.channel.send(encode_frame(_protocol.FINISH))

    ################################################################
    # The rendezvous path
    ################################################################

    async def _open_rendezvous(self, *, replace: bool) -> None:
        listener = await open_unix_listener(self._options.path, mode=0o600, replace=replace)
        self._rendezvous = listener
        self._nursery.start_soon(self._answer_clients, listener)

    async def _try_open_rendezvous(self) -> None:
        if self._is_retired:
            return
        try:
            await self._open_rendezvous(replace=True)
        except OSError:
            # The service goes on, and upgrade() still works.
            logger.exception("%s: cannot take the rendezvous path", self.name)

    async def _close_rendezvous(self) -> None:
        if self._rendezvous is not None:
            try:
                await self._rendezvous.aclose()
            except OSError:
                logger.exception("%s: cannot remove the rendezvous path", self.name)

    async def _answer_clients(self, listener: UnixListener) -> None:
        while True:
            try:
                conn = await listener.accept()
            except ConnectionClosedError:
                return
            except OSError:
                # No file descriptor is free.
                await trio.sleep(ACCEPT_RETRY_DELAY)
                continue
            self._nursery.start_soon(self._answer_client, conn)

    async def _answer_client(self, conn: UnixConnection) -> None:
        channel = Channel(conn)
        try:
            await self._answer(channel, conn)
        except Exception:
            # Of a check of the policy, or a frame that is none. One client does not end the server.
            logger.exception("%s: a client of the rendezvous path was not answered", self.name)
        finally:
            if self._successor is not channel:
                channel.close()

    async def _answer(self, channel: Channel, conn: UnixConnection) -> None:
        denial = await check_peer(conn, self._options.policy)
        if denial is not None:
            logger.warning("%s: denied the listeners to %s", self.name, denial)
            await channel.send(
                _protocol.pack_text(_protocol.DENIED, "its policy does not admit this process")
            )
            return
        frame = None
        with trio.move_on_after(HELLO_TIMEOUT):
            frame = await channel.receive()
        if frame is None or self._phase is Phase.RELEASED:
            # The client tries again, and reaches the successor.
            return
        expect_no_fds(frame)
        if frame.kind == _protocol.REQUEST:
            result = await self._upgrade_for_client()
            if result.error is None:
                # So that the next request reaches the successor.
                await self._wait_moved()
            await channel.send(_protocol.pack_result(result))
        elif frame.kind == _protocol.HELLO:
            await self._hand_over_to(channel, conn, frame.body)
        else:
            raise _protocol.ProtocolError(f"unexpected frame {frame.kind}")

    async def _wait_moved(self) -> None:
        with trio.move_on_after(MOVE_TIMEOUT, shield=True):
            await self._moved.wait()

    async def _upgrade_for_client(self) -> _protocol.Result:
        try:
            upgrade = await self.upgrade()
        except UpgradeFailedError as exc:
            logger.warning("%s: upgrade failed: %s", self.name, exc)
            return _protocol.Result(
                error=str(exc.args[0]), traceback=exc.traceback, code=exc.code.value
            )
        return _protocol.Result(upgrade.pid, upgrade.number, upgrade.seconds)

    async def _hand_over_to(self, channel: Channel, conn: UnixConnection, hello: bytes) -> None:
        """Hand over to a successor that has started by itself."""
        began = time.monotonic()
        with conn.get_peer_identity(with_pidfd=False) as peer:
            pid = peer.credentials.pid
            logger.info("%s: %s asks for the listeners", self.name, peer)
        channel.pidfd = _peer_pidfd(conn)

        async def greet() -> None:
            _giver.check_hello(hello, self.name)
            await trio.lowlevel.checkpoint()

        options = self._options
        try:
            async with self._hand_over(options.timeout):
                await self._give(channel, pid, greet, options.timeout, options.probation)
        except UpgradeFailedError as exc:
            logger.warning("%s: handover to pid %d failed: %s", self.name, pid, exc)
            if exc.code == IOErrorEnum.BUSY:
                await channel.send(_protocol.pack_text(_protocol.BUSY, str(exc.args[0])))
        else:
            self._log_upgrade(pid, time.monotonic() - began)

    ################################################################
    # The end
    ################################################################

    async def _end(self, failure: BaseException | None) -> None:
        """Stop accepting; tell the other generations, and the service manager, that this one ends.

        Args:
          failure: what the program has raised; None if it has left the block.
        """
        self._has_crashed = _is_crash(failure)
        self._is_retired = True
        self._gate.shut()
        if self._phase is Phase.HANDING_OVER:
            if self._attempt is not None:
                self._attempt.cancel()
            await self._attempt_over.wait()
        if self._before is not None:
            text = "its program has left open_generation() before it served"
            if failure is not None:
                text = self._failure or "".join(traceback.format_exception(failure))
            await self._before.send(_protocol.pack_text(_protocol.FAILED, text))
        if self._phase is Phase.RELEASED:
            await self._wait_moved()
        manager = self._options.manager
        if manager is not None and self._phase in (Phase.SERVING, Phase.HANDING_OVER):
            async with _told(self.name, "that this process ends"):
                await manager.stopping()

    async def _close(self) -> None:
        """Close everything, when no task of this generation is left."""
        if self._before is not None:
            self._before.close()
        if self._taken is not None:
            self._taken.close()
        for listener in self._listeners.values():
            await listener.aclose()
        await self._close_rendezvous()
        for each in self._draining:
            each.channel.close()
        if self._successor is not None:
            self._successor.close()
        if self._process is not None:
            self._process.close()
        self._connections.close()

    def __repr__(self) -> str:
        return f"<Generation {self.number} of {self.name}, {self._phase.value}>"


def explain_failure(generation: Generation, text: str) -> None:
    """Set what the generation before is told in place of a traceback, if the program fails."""
    generation._failure = text


def _inherited_unix(
    sock: stdlib_socket.socket,
    address: UnixSocketAddress,
    policy: PeerPolicy | None,
    *,
    receives: bool,
) -> UnixListener:
    return UnixListener(
        trio.socket.from_stdlib_socket(sock),
        policy=policy,
        receive_descriptors=receives,
        address=address,
    )


@asynccontextmanager
async def _told(name: str, what: str) -> AsyncGenerator[None, None]:
    """Log why the service manager cannot be told something; it must not end the service."""
    try:
        with trio.fail_after(MANAGER_TIMEOUT):
            yield
    except (OSError, UnixConnectionError, trio.TooSlowError):
        logger.exception("%s: cannot tell the service manager %s", name, what)


def _not_admitted(why: str) -> TakeOverError:
    error = TakeOverError(f"the policy does not admit the generation that runs: {why}")
    error.code = IOErrorEnum.PERMISSION_DENIED
    return error


def _peer_pidfd(conn: UnixConnection) -> int | None:
    """Return a pidfd of the peer; None if there is none, so that only its socket says its end."""
    try:
        return conn.open_peer_pidfd()
    except OSError:
        return None


def _is_crash(failure: BaseException | None) -> bool:
    """Whether a program has failed, and was not just told to end."""
    if isinstance(failure, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", failure)
        return any(map(_is_crash, group.exceptions))
    return isinstance(failure, Exception)


def _check_seconds(value: float, name: str, *, least_exclusive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if math.isnan(value) or value < 0 or (least_exclusive and not value):
        raise ValueError(
            f"{name} must be {'positive' if least_exclusive else 'non-negative'}, got {value}"
        )


@asynccontextmanager
async def open_generation(
    path: AddressLike,
    *,
    name: str,
    policy: PeerPolicy | None = None,
    take_over: bool = True,
    command: Sequence[str] | None = None,
    cwd: str | None = None,
    stdout: FileDescriptor | None = None,
    stderr: FileDescriptor | None = None,
    timeout: float = 60,
    probation: float = 0,
    max_draining: int = 3,
    service_manager: ServiceNotifier | None = None,
) -> AsyncGenerator[Generation, None]:
    """Be a generation of a server: the first one, or the successor of the one that runs.

    ::

        async with open_generation("/run/app/upgrade", name="app") as gen:
            web = await gen.listen_tcp("web", 8000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, handler, [web])
                await gen.ready()
                await gen.replaced()
                ...

    If the process was started by :meth:`Generation.upgrade`, or another process is serving the
    rendezvous path, this takes over its listeners: it returns when it has them, and has checked
    them. The other generation accepts until this one does (:meth:`Generation.ready`). If this
    process fails before that, the other one serves on, and its ``upgrade`` raises the traceback.
    If the other one is killed before it has offered everything, this becomes the first one.

    The block is that of a nursery: exceptions in it are raised in an ExceptionGroup, as is a
    TakeOverError if the other generation ends the handover later. At its end, all
    listeners are closed here; another generation that has them keeps them. If the block ends during
    a handover, the successor is told to end; if it ends with an exception that is neither a
    cancellation nor a KeyboardInterrupt, the successor goes on alone.

    Args:
      path: the rendezvous path, where a successor asks for the listeners, and where
        :func:`request_upgrade` does. Its mode is 0600.
      name: of the service; a successor must have the same.
      policy: which processes get the listeners, or an upgrade, and from which ones they are taken.
        It is asked before anything is sent. Default: those of this user.
      take_over: False: if another process serves the path, raise AddressInUseError.
      command: the program and the arguments of a successor; default: as this process.
      cwd: the current directory of a successor; default: that of this process at that moment.
      stdout, stderr: file descriptors that are the standard output and error of a successor;
        default: those of this process at that moment. They stay the caller's.
      timeout, probation: of :meth:`Generation.upgrade`, also for a successor that starts by itself.
      max_draining: how many replaced generations may drain at the same time. If there are more,
        the oldest is told to end at once (:meth:`Generation.overdue`).
      service_manager: what is told which process is the main one, and when it is ready; a
        ``systemd.ServiceManager``.

    Raises:
      TakeOverError: the generation that runs does not hand over.
      TypeError: an argument of a wrong type.
      ValueError: a wrong argument.
      AddressInUseError: as :func:`open_unix_listener`.
      OSError: as :func:`open_unix_listener`.
    """
    address = UnixSocketAddress.from_any(path, argument="path")
    if address.get_is_anonymous():
        raise ValueError("path must not be empty")
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    check_policy(policy)
    _check_seconds(timeout, "timeout", least_exclusive=True)
    _check_seconds(probation, "probation", least_exclusive=False)
    if type(max_draining) is not int or max_draining < 1:
        raise ValueError(f"max_draining must be a positive int, got {max_draining!r}")
    check_task()
    generation = Generation(
        _Options(
            address,
            name,
            policy or PeerPolicy.same_user(),
            command,
            cwd,
            stdout,
            stderr,
            timeout,
            probation,
            max_draining,
            service_manager,
        )
    )
    failure: BaseException | None = None
    begin_failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                try:
                    await generation._start(nursery, take_over=take_over)
                except Exception as exc:  # raised below, as it is and not in a group
                    begin_failure = exc
                else:
                    yield generation
            except BaseException as exc:
                failure = exc
                raise
            finally:
                with trio.CancelScope(shield=True):
                    await generation._end(failure)
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await generation._close()
    if begin_failure is not None:
        raise begin_failure


async def request_upgrade(path: AddressLike, *, policy: PeerPolicy | None = None) -> Upgrade:
    """Ask the generation that serves a rendezvous path to upgrade, and wait for that.

    Args:
      policy: which processes are admitted as the server; default: those of this user.

    Raises:
      UpgradeFailedError: the generation serves as before.
      PeerDeniedError: one of the two policies does not admit the other process.
      EndOfStreamError: the generation ended meanwhile.
      OSError: as :func:`open_unix_connection`: no process is listening there.
    """
    policy = policy or PeerPolicy.same_user()
    while True:
        conn = await open_unix_connection(path, policy=policy)
        channel = Channel(conn)
        try:
            frame = None
            if await channel.send(encode_frame(_protocol.REQUEST)):
                frame = await channel.receive()
        finally:
            channel.close()
        if frame is None:
            raise EndOfStreamError("the generation has ended, or was replaced, during the upgrade")
        expect_no_fds(frame)
        if frame.kind == _protocol.DENIED:
            raise PeerDeniedError(
                errno.EACCES,
                _protocol.unpack_text(frame.body),
                str(UnixSocketAddress.from_any(path)),
            )
        result = _protocol.unpack_result(frame.body)
        if result.error is not None:
            error = UpgradeFailedError(result.error, result.traceback)
            error.code = IOErrorEnum(result.code)
            raise error
        return Upgrade(result.pid, result.number, result.seconds)


def _text(address: UnixSocketAddress) -> str:
    return os.fsdecode(address.native)
