"""UnixListener: accept connections on a Unix socket.

The rule of this file: whoever makes the name in the file system takes it away again, and a
connection that was accepted is returned, or closed because a policy denies it.

Sources: bind(2), listen(2), accept(2), unix(7), trio's SocketListener
"""

from __future__ import annotations

import errno
import logging
import operator
import socket as stdlib_socket
from typing import TYPE_CHECKING, Final, TypeVar

import trio
from trio.lowlevel import enable_ki_protection

from . import _bind, _kernel
from ._address import UnixSocketAddress
from ._connection import UnixConnection
from ._fds import fileno
from ._owner import DescriptorOwner
from ._paths import describe_bind_error
from ._policy import admit_or_close
from ._sockopts import check_listening, disable_passrights, enable_passing, raw_socket
from .errors import AddressInUseError, ConnectionBusyError, ConnectionClosedError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection

    from ._policy import PeerPolicy

T = TypeVar("T")

logger: Final = logging.getLogger("trio_unixconn")

# The connection that was to be accepted is gone; the next one may be fine. The list is
# accept(2)'s, as far as it can happen to a Unix socket.
_TRY_AGAIN: Final = frozenset({errno.ECONNABORTED, errno.EPROTO, errno.EPERM})

_FIRST_PAUSE: Final = 0.001
_LONGEST_PAUSE: Final = 0.05
# How long aclose() may wait for whoever else is at the path, which takes them milliseconds, or
# for a free descriptor.
_PATIENCE: Final = 2.0


class UnixListener(DescriptorOwner, trio.abc.Listener[UnixConnection]):
    """A listening Unix stream socket, for ``trio.serve_listeners`` or :meth:`accept`.

    :func:`open_unix_listener` makes one at a path; this constructor and :meth:`from_fd` take a
    socket that listens already, whose path stays the business of whoever bound it.

    Args:
      socket: a bound, listening ``AF_UNIX``, ``SOCK_STREAM`` trio socket. The listener owns it
        from now on; if this raises, the caller still does.
      policy: who may connect. It is asked in :meth:`accept`, before any byte is read; whom it
        does not admit is closed, logged and counted.
      receive_descriptors: whether peers may send descriptors; as of :class:`UnixConnection`.
      address: what the socket is called, where the kernel knows it under another name.

    Attributes:
      socket: that trio socket.
      denied: how many connections the policy has denied.

    Raises:
      TypeError: not a trio socket.
      ValueError: another family or type, or not listening.
      NotSupportedError: the platform has no Unix sockets.
    """

    def __init__(
        self,
        socket: trio.socket.SocketType,
        *,
        policy: PeerPolicy | None = None,
        receive_descriptors: bool = True,
        address: UnixSocketAddress | None = None,
    ) -> None:
        if not isinstance(socket, trio.socket.SocketType):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a trio socket is due, not {type(socket).__name__} ({socket!r})")
        check_listening(socket)
        self.socket: trio.socket.SocketType = socket
        self.denied: int = 0
        self._policy = policy
        self._receive_descriptors = receive_descriptors
        self._address = address or UnixSocketAddress.from_native(socket.getsockname())
        self._binding: _bind.Binding | None = None
        self._leaving = trio.Lock()
        # How many connections may wait at a time; 0 if others accept from the same queue.
        self._longest_queue = 0
        if not receive_descriptors:
            disable_passrights(raw_socket(socket))

    @classmethod
    def from_fd(
        cls, fd: int, *, policy: PeerPolicy | None = None, receive_descriptors: bool = True
    ) -> UnixListener:
        """Make one from the descriptor of a listening socket, inherited or received.

        The listener owns the descriptor from now on, makes it close-on-exec, and makes the
        socket non-blocking for all who share it; if this raises, the descriptor is as it was
        and still the caller's. Closing the listener leaves the path alone, and the socket open
        for other processes that hold it.

        Raises:
          TypeError: not an int.
          ValueError: not open, not a socket, or not a listening Unix stream socket.
          NotSupportedError: as the constructor.

        Source: sd_listen_fds(3), for where such descriptors come from
        """
        if type(fd) is not int:
            raise TypeError(f"a descriptor is due: an int, not {type(fd).__name__} ({fd!r})")
        number = fileno(fd)
        try:
            sock = stdlib_socket.socket(fileno=number)
        except OSError as exc:
            what = "is not open" if exc.errno == errno.EBADF else "is not a socket"
            raise ValueError(f"descriptor {number} {what}: a listening Unix socket is due") from exc
        try:
            check_listening(sock)
            listener = cls(
                trio.socket.from_stdlib_socket(sock),
                policy=policy,
                receive_descriptors=receive_descriptors,
            )
        except BaseException:
            sock.detach()
            raise
        sock.set_inheritable(False)
        return listener

    def get_local_address(self) -> UnixSocketAddress:
        """Return the name that this listens at.

        Raises:
          ConnectionClosedError: the listener is closed.
        """
        self._check_open()
        return self._address

    @enable_ki_protection
    async def accept(self) -> UnixConnection:
        """Accept one connection whose peer the policy admits.

        Returns:
          A connection that the caller owns.

        Raises:
          ConnectionClosedError: the listener is closed, before or meanwhile.
          ConnectionBusyError: another task is accepting.
          OSError: EMFILE and the like; ``trio.serve_listeners`` waits and goes on.

        While a policy's check waits, no other connection is accepted here; :func:`serve_unix`
        asks in the handlers' tasks.
        """
        while True:
            conn = await self._accept_any()
            if await self._admits(conn):
                return conn

    async def _admits(self, conn: UnixConnection) -> bool:
        """Whether the policy admits the peer; if not, that is counted and ``conn`` closed."""
        if self._policy is None or await admit_or_close(conn, self._policy):
            return True
        self.denied += 1
        return False

    @enable_ki_protection
    async def _accept_any(self) -> UnixConnection:
        while True:
            try:
                sock, name = await self.socket.accept()
            except OSError as exc:
                if self.socket.fileno() == -1:
                    raise ConnectionClosedError("this listener is closed") from exc
                if exc.errno not in _TRY_AGAIN:
                    raise
            except trio.ClosedResourceError as exc:
                raise ConnectionClosedError("this listener was closed") from exc
            except trio.BusyResourceError as exc:
                raise ConnectionBusyError("another task is accepting") from exc
            else:
                return self._connection(sock, name)

    @enable_ki_protection
    def _accept_waiting(self) -> UnixConnection | None:
        """Accept a connection that waits in the queue already, without asking the policy.

        None if none does.
        """
        raw = raw_socket(self.socket)
        while True:
            try:
                sock, name = raw.accept()
            except BlockingIOError:
                return None
            except OSError as exc:
                if exc.errno not in _TRY_AGAIN:
                    raise
            else:
                return self._connection(trio.socket.from_stdlib_socket(sock), name)

    def _connection(self, sock: trio.socket.SocketType, name: str | bytes) -> UnixConnection:
        try:
            return UnixConnection(
                sock,
                receive_descriptors=self._receive_descriptors,
                local_address=self._address,
                remote_address=UnixSocketAddress.from_native(name),
            )
        except BaseException:
            sock.close()
            raise

    async def aclose(self) -> None:
        """Close the listener and take its path away; closing twice is allowed.

        Connections that wait in its queue are reset by the kernel. While another process is at
        the path, or no descriptor is free, this waits for at most two seconds; then the path
        stays, which is logged, and the next server replaces it.

        Raises:
          OSError: the path cannot be taken away, for instance because the process is another
            user meanwhile; the listener is closed.
        """
        if self.socket.fileno() != -1:
            # First the path: once the socket is closed, another server may have taken it, and
            # its inode may be the same number again.
            try:
                with trio.CancelScope(shield=True):
                    await self._remove_path()
            finally:
                self.socket.close()
        await trio.lowlevel.checkpoint()

    async def _remove_path(self) -> None:
        """Take the path away, so that nobody new can connect; the queue stays.

        Whoever is cancelled here may try again.
        """
        # The socket has to stay open meanwhile, also when a second task closes it.
        async with self._leaving:
            binding = self._binding
            if binding is None:
                return
            with trio.move_on_after(_PATIENCE) as patience:
                try:
                    await _when_unlocked(
                        lambda: _bind.unbind(binding), or_at=_kernel.OUT_OF_RESOURCES
                    )
                except OSError:
                    self._binding = None
                    raise
                self._binding = None
            if patience.cancelled_caught:
                logger.warning(
                    "%s: the path stays, for the next server to replace: another process holds "
                    "the lock beside it, or no descriptor is free",
                    self._address,
                )

    def _check_open(self) -> None:
        if self.socket.fileno() == -1:
            raise ConnectionClosedError("this listener is closed")


async def remove_path(listener: UnixListener) -> None:
    """Take a listener's path away; if that cannot be, log it, as its server is to finish."""
    try:
        await listener._remove_path()  # noqa: SLF001 - of this file
    except OSError:
        logger.exception(
            "%s: the path cannot be taken away, and stays for the next server to replace",
            listener.get_local_address(),
        )


def _check_options(mode: int, backlog: int) -> None:
    if not 0 <= operator.index(mode) <= 0o7777:
        raise ValueError(f"mode must be permission bits, from 0 to 0o7777, not {mode}")
    if operator.index(backlog) < 0:
        raise ValueError(f"backlog must be 0 or more, or None, not {backlog}")


async def _when_unlocked(
    work: Callable[[], T], *, or_at: Collection[int | None] = frozenset()
) -> T:
    """Run ``work`` in a thread, again and again while somebody else holds the lock.

    Args:
      or_at: numbers of errors at which it is run again, too.
    """
    pause, waited = _FIRST_PAUSE, 0.0
    # One thread of its own: those of trio's limiter may all be waiting for something.
    limiter = trio.CapacityLimiter(1)
    while True:
        try:
            return await trio.to_thread.run_sync(work, limiter=limiter)
        except _bind.LockHeldError:
            pass
        except OSError as exc:
            if exc.errno not in or_at:
                raise
        await trio.sleep(pause)
        if waited <= _PATIENCE < waited + pause:
            logger.warning("waiting for the lock beside a socket's path, which another one holds")
        waited += pause
        pause = min(2 * pause, _LONGEST_PAUSE)


@enable_ki_protection
async def open_unix_listener(
    address: str | bytes | os.PathLike[str] | os.PathLike[bytes] | UnixSocketAddress,
    *,
    mode: int = 0o600,
    backlog: int | None = None,
    policy: PeerPolicy | None = None,
    credentials: bool = False,
    pidfds: bool = False,
    receive_descriptors: bool = True,
    replace: bool = False,
    unlink_on_close: bool = True,
) -> UnixListener:
    r"""Listen at a path, or at an abstract name.

    The path leads to a listening socket with the right mode from its first moment on: the
    socket is made under a temporary name beside it (``.name.new``, which other programs see
    as its address), and gets the path in one step. A socket that a dead server left there is
    replaced; one on which somebody listens is not, nor is anything else. To find out, this
    connects to it. Whoever is at the path holds a lock meanwhile (``.name.lock``), which ends
    with its holder, so that being killed at any moment leaves nothing in the way.

    Args:
      address: a path, also one that is too long for a socket's address; ``"\0name"`` is an
        abstract name.
      mode: the permission bits of the path, in force before anybody can connect. On Linux,
        whoever may write to it may connect.
      backlog: how many connections may wait to be accepted; as many as the system allows
        if left out.
      policy: who may connect; see :class:`UnixListener`.
      credentials, pidfds: as of :func:`open_unix_connection`, of every accepted connection.
      receive_descriptors: whether peers may send descriptors; as of :class:`UnixConnection`.
      replace: take the path over, also from a server that is alive, so that at no moment a
        connect fails: the old server keeps those connections that it has, and its queue. It is
        not asked who holds the socket there.
      unlink_on_close: whether closing the listener takes the path away, if it still leads to
        this socket then.

    Returns:
      A listener that the caller owns.

    Raises:
      TypeError, ValueError: not the name of a socket, no permission bits, or no backlog.
      AddressInUseError: somebody listens there, or something else is there; it was left alone.
      OSError: from the file system, with the address; nothing is left behind.
      NotSupportedError: the platform has no Unix sockets, or not what was asked for.
    """
    family = _kernel.required(_kernel.AF_UNIX, "Unix sockets")
    name = UnixSocketAddress.from_any(address)
    backlog = 0xFFFF if backlog is None else backlog
    _check_options(mode, backlog)
    if name.get_is_anonymous():
        raise ValueError("a listener needs a name: a path or an abstract name")
    await trio.lowlevel.checkpoint()
    sock = stdlib_socket.socket(family, stdlib_socket.SOCK_STREAM)

    def listen() -> None:
        """Do what is to be done before anybody can connect, and listen."""
        enable_passing(sock, credentials=credentials, pidfds=pidfds)
        if not receive_descriptors:
            disable_passrights(sock)
        sock.listen(backlog)

    binding = None
    try:
        socket = trio.socket.from_stdlib_socket(sock)
        try:
            if name.get_is_abstract():
                sock.bind(name.native)
                listen()
            else:
                binding = await _when_unlocked(
                    lambda: _bind.bind(sock, name.native, mode, listen, replace=replace)
                )
        except AddressInUseError:
            raise
        except OSError as exc:
            raise describe_bind_error(exc, name) from exc
        # Behind this point the path is there, and nothing can fail.
        listener = UnixListener(
            socket,
            policy=policy,
            receive_descriptors=receive_descriptors,
            address=name,
        )
    except BaseException:
        sock.close()
        raise
    listener._longest_queue = backlog + 1  # noqa: SLF001 - its other constructor
    if unlink_on_close:
        listener._binding = binding  # noqa: SLF001 - as above
    return listener
