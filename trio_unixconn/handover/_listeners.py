"""Listeners of a generation: sockets that can pass to the next one, and a gate before accept().

Invariant: while the gate is closed, no connection is accepted; one that was accepted before is
returned, even if the gate closes meanwhile.
"""

from __future__ import annotations

import socket as stdlib_socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Generic, TypeVar

import trio
from trio.lowlevel import enable_ki_protection

from .._accept import Acceptor, close_listening_socket
from .._bind import Binding
from .._listener import (
    UnixListener,
    acceptor_of,
    admits,
    binding_of,
    make_connection,
    set_binding,
    set_queue_size,
)
from .._owner import DescriptorOwner
from .._sockopts import raw_socket
from .._trio_task import check_task
from ..errors import ConnectionClosedError
from ._manifest import ListenerEntry, describe_socket

if TYPE_CHECKING:
    from .._accept import Accepted
    from .._connection import UnixConnection

StreamT = TypeVar("StreamT", "trio.SocketStream", "UnixConnection")
T = TypeVar("T")


#: How many connections can be in the queue of a listener of unknown size.
MAX_QUEUE = 0x10000


class Gate:
    """Whether the listeners of a generation accept."""

    def __init__(self) -> None:
        self.is_open: bool = False
        # Whether no other generation accepts from the listeners.
        self._is_alone = False
        self._is_shut = False
        #: Whether accepting is interrupted for a moment.
        self.is_paused: bool = False
        self._changed = trio.Event()
        # Of tasks in accept().
        self._scopes: set[trio.CancelScope] = set()

    def open(self) -> None:
        """Let tasks accept."""
        self.is_open = True
        self.notify()

    def allow_early(self) -> None:
        """Let tasks accept early: there is no other generation."""
        self._is_alone = True
        self.notify()

    def block(self) -> None:
        """Let no task accept; those that wait for a connection wait for the gate now."""
        self.is_open = self._is_alone = False
        self._interrupt()

    def pause(self, paused: bool) -> None:  # noqa: FBT001 - it is the state
        """Accept nothing for a moment, or go on; this generation is still the one that accepts."""
        if paused != self.is_paused:
            self.is_paused = paused
            if paused:
                self._interrupt()
            else:
                self.notify()

    def _interrupt(self) -> None:
        for scope in self._scopes:
            scope.cancel()

    def shut(self) -> None:
        """Close the gate for good: tasks get ConnectionClosedError."""
        self._is_shut = True
        self.block()
        self.notify()

    def notify(self) -> None:
        """Wake the tasks in :meth:`wait_changed`."""
        self._changed.set()
        self._changed = trio.Event()

    async def wait_changed(self) -> None:
        """Wait until the gate is opened, or closed for good, or until :meth:`notify`."""
        await self._changed.wait()

    async def run(
        self, function: Callable[..., Awaitable[T]], *args: object, early: bool = False
    ) -> T:
        """Await a function when the gate is open; if it closes meanwhile, do that again.

        Args:
          early: whether to do it before this generation is ready, if there is no other.

        Raises:
          ConnectionClosedError: the gate is closed for good.
        """
        while True:
            while self.is_paused or not (self.is_open or (early and self._is_alone)):
                if self._is_shut:
                    await trio.lowlevel.checkpoint()
                    raise ConnectionClosedError("this listener is closed")
                await self._changed.wait()
            with trio.CancelScope() as scope:
                self._scopes.add(scope)
                try:
                    return await function(*args)
                finally:
                    self._scopes.discard(scope)


class GenerationListener(DescriptorOwner, trio.abc.Listener[StreamT], Generic[StreamT]):
    """A listening socket of a :class:`Generation`, for ``trio.serve_listeners`` or :meth:`accept`.

    It accepts from the moment when its generation is ready until the successor serves.
    :meth:`Generation.listen_tcp` and :meth:`Generation.listen_unix` make one. The generation owns
    it, and closes it.

    Attributes:
      name: by which the next generation finds it.
      inherited: whether the generation before has handed it over.
    """

    def __init__(
        self,
        name: str,
        gate: Gate,
        listener: UnixListener | trio.SocketListener,
        *,
        inherited: bool = False,
        path: str | None = None,
        file: tuple[int, int] | None = None,
        on_prepared: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.inherited = inherited
        self.gate: Gate = gate
        #: What accepts without asking the gate.
        self.base: UnixListener | trio.SocketListener = listener
        #: Whether a server with ``generation=`` has it.
        self.is_claimed: bool = False
        self.is_prepared: bool = False
        self._on_prepared = on_prepared
        #: Whether to accept before the generation is ready, if there is no other.
        self.is_early: bool = False
        self._path = path
        self._raw = raw_socket(listener.socket)
        if isinstance(listener, UnixListener):
            self.acceptor: Acceptor = acceptor_of(listener)
            if inherited:
                set_queue_size(listener, MAX_QUEUE)
            binding = binding_of(listener)
            if binding is not None:
                file = (binding.device, binding.inode)
        else:
            self.acceptor = Acceptor(self._raw, repr(self._raw.getsockname()))
        self._file = file
        #: Set when a task accepts from it, or begins to wait for that.
        self.is_used: trio.Event = trio.Event()

    @property
    def socket(self) -> trio.socket.SocketType:
        """The listening trio socket. To accept, use :meth:`accept`, which waits for the gate."""
        return self.base.socket

    def set_prepared(self) -> None:
        """Say that its server could accept now."""
        self.is_prepared = True
        self._on_prepared()

    @enable_ki_protection
    async def accept(self) -> StreamT:
        """Accept one connection, while this generation is the one that accepts.

        If a policy was given, only peers that it admits are returned.

        Returns:
          A stream that the caller owns: a ``trio.SocketStream`` or a :class:`UnixConnection`.

        Raises:
          ConnectionClosedError: the generation has ended.
          ConnectionBusyError: another task is already accepting.
          OSError: as :meth:`UnixListener.accept`.
        """
        while True:
            fd, name = await self.accept_fd()
            listener = self.base
            if not isinstance(listener, UnixListener):
                sock = stdlib_socket.socket(self._raw.family, self._raw.type, 0, fileno=fd)
                return trio.SocketStream(trio.socket.from_stdlib_socket(sock))  # type: ignore[return-value]
            conn = make_connection(listener, fd, name)
            if await admits(listener, conn):
                return conn  # type: ignore[return-value]

    async def accept_fd(self) -> Accepted:
        """Accept one connection, without asking the policy."""
        check_task()
        self.is_used.set()
        return await self.gate.run(self.acceptor.accept, early=self.is_early)

    async def wait_readable(self) -> None:
        """Wait until a connection can be accepted, while this generation is the one that accepts.

        Raises:
          ConnectionClosedError: the generation has ended.
          trio.ClosedResourceError: the listener was closed.
        """
        check_task()
        self.is_used.set()
        await self.gate.run(trio.lowlevel.wait_readable, self._raw)

    def entry(self) -> ListenerEntry:
        """Return what the manifest says of it."""
        kind, bound = describe_socket(self._raw)
        return ListenerEntry(self.name, kind, bound, self._path, self._file)

    def own_path(self) -> None:
        """Remove the path when this is closed, as the generation before would have."""
        if self._file is not None and self._path is not None:
            assert isinstance(self.base, UnixListener)
            binding = Binding(self._path.encode(errors="surrogateescape"), *self._file)
            set_binding(self.base, binding)

    def disown_path(self) -> None:
        """Leave the path when this is closed: the successor removes it."""
        if isinstance(self.base, UnixListener):
            set_binding(self.base, None)

    async def aclose(self) -> None:
        """Close the socket; other generations that have it can still accept from it.

        A successor that starts later does not get it.
        """
        check_task()
        if isinstance(self.base, UnixListener):
            await self.base.aclose()
        else:
            await close_listening_socket(self.base.socket)

    def __repr__(self) -> str:
        return f"<GenerationListener {self.name} fd={self._raw.fileno()}>"
