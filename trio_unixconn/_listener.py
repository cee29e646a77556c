"""UnixListener: accept connections on a Unix socket.

Invariant: the listener that has created a path removes it. An accepted connection is returned, or
closed because a policy denies it.

Sources: bind(2), listen(2), accept(2), unix(7), trio's SocketListener
"""

from __future__ import annotations

import logging
import socket as stdlib_socket
from collections.abc import Callable
from typing import Final

import trio
from trio.lowlevel import enable_ki_protection

from . import _bind, _closing, _kernel
from ._accept import Acceptor, close_listening_socket
from ._address import AddressLike, UnixSocketAddress, check_address
from ._connection import UnixConnection, connection_of
from ._owner import DescriptorOwner
from ._policy import PeerPolicy, admit_or_close, check_policy
from ._sockopts import adopt_fd, check_listening, disable_passrights, enable_passing, raw_socket
from ._trio_task import check_task, checkpoint_in_task
from .errors import ConnectionClosedError

logger: Final = logging.getLogger("trio_unixconn")


class UnixListener(DescriptorOwner, trio.abc.Listener[UnixConnection]):
    """A listening Unix stream socket, for ``trio.serve_listeners`` or :meth:`accept`.

    :func:`open_unix_listener` makes one at a path. This constructor and :meth:`from_fd` take a
    socket that is already listening, and leave its path alone.

    Args:
      socket: a bound, listening ``AF_UNIX``, ``SOCK_STREAM`` trio socket. The listener owns it
        afterwards; if this raises, the caller still owns it.
      policy: which peers may connect. :meth:`accept` asks it before any byte is read. A connection
        that it denies is closed, logged and counted.
      receive_descriptors: whether peers may send file descriptors; see :class:`UnixConnection`.
      address: the name of the socket, if it is not the one that getsockname(2) returns.

    Attributes:
      socket: the trio socket.
      denied: the number of connections that the policy has denied.

    Raises:
      TypeError: not a trio socket.
      ValueError: a socket of another family or type, or one that does not listen.
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
            raise TypeError(f"expected a trio socket, got {type(socket).__name__}")
        check_policy(policy)
        if address is not None:
            check_address(address, "address")
        check_listening(socket)
        self.socket: trio.socket.SocketType = socket
        self.denied: int = 0
        self._policy = policy
        self._receive_descriptors = receive_descriptors
        self._address = address or UnixSocketAddress.from_native(socket.getsockname())
        self._acceptor = Acceptor(raw_socket(socket), self._address)
        self._binding: _bind.Binding | None = None
        self._leaving = trio.Lock()
        # The size of the queue; 0 if other processes may accept from it.
        self._queue_size = 0
        if not receive_descriptors:
            disable_passrights(raw_socket(socket))
        _closing.close_dropped(self, raw_socket(socket))

    @classmethod
    def from_fd(
        cls, fd: int, *, policy: PeerPolicy | None = None, receive_descriptors: bool = True
    ) -> UnixListener:
        """Make a listener from the file descriptor of a listening socket, inherited or received.

        The listener owns the file descriptor from now on, makes it close-on-exec, and makes the
        socket non-blocking for all processes that share it; if this raises, the file descriptor is
        as it was and still the caller's. Closing the listener leaves the path, and the socket stays
        open for other processes that hold it.

        Raises:
          TypeError: not an int, or not a policy.
          ValueError: not open, not a socket, or not a listening Unix stream socket.
          NotSupportedError: the platform has no Unix sockets.

        Source: sd_listen_fds(3), about such file descriptors
        """
        check_policy(policy)

        def adopt(sock: stdlib_socket.socket) -> UnixListener:
            # First this, so that a wrong socket stays blocking.
            check_listening(sock)
            return cls(
                trio.socket.from_stdlib_socket(sock),
                policy=policy,
                receive_descriptors=receive_descriptors,
            )

        return adopt_fd(fd, "a listening Unix stream socket", adopt)

    def get_local_address(self) -> UnixSocketAddress:
        """Return the name that clients connect to.

        Raises:
          ConnectionClosedError: this listener is closed.
        """
        self._check_open()
        return self._address

    @enable_ki_protection
    async def accept(self) -> UnixConnection:
        """Accept one connection whose peer the policy admits.

        While a check of the policy waits, this accepts no other connection. :func:`serve_unix`
        asks the policy in the tasks of the handlers.

        If another process that shares the socket makes it blocking, it is made non-blocking again,
        which is logged.

        Returns:
          A connection that the caller owns.

        Raises:
          ConnectionClosedError: this listener is closed, or gets closed while this waits.
          ConnectionBusyError: another task is already accepting.
          OSError: the process is out of file descriptors or memory (EMFILE and similar), after
            which ``trio.serve_listeners`` waits and retries; or accepting can never succeed again.
            If the system refuses to accept a connection for another reason (a firewall, a security
            module), this waits and retries, which is logged.
        """
        while True:
            conn = await accept_connection(self)
            if await admits(self, conn):
                return conn

    async def aclose(self) -> None:
        """Close the listener and remove its path; closing twice is allowed.

        The kernel resets the connections in its queue. A thread closes the socket, because the
        file descriptors that clients have sent over these connections can make close(2) block. This
        waits until the name can be bound again, but not for longer than a second.

        While another process holds the lock of the path, or no file descriptor is free, this waits
        for at most two seconds. Then the path stays, which is logged, and the next server replaces
        it. Both are real time, whatever trio's clock says.

        Raises:
          OSError: the path cannot be removed, for example because the process is now another
            user; the listener is closed.
        """
        check_task()
        if self.socket.fileno() != -1:
            # First the path: after the socket is closed, another server may take it, and may get
            # the same inode number.
            try:
                with trio.CancelScope(shield=True):
                    await self._remove_path()
            finally:
                await close_listening_socket(self.socket)
        else:
            await trio.lowlevel.checkpoint()

    async def _remove_path(self) -> None:
        """Remove the path, so that no process can connect anymore; the queue stays.

        After a cancellation, call it again.
        """
        # The socket must stay open until then, even if a second task closes the listener.
        async with self._leaving:
            binding = self._binding
            if binding is None:
                return
            try:
                await _bind.retry(
                    lambda: _bind.unbind(binding),
                    _bind.CLOSE_LOCK_TIMEOUT,
                    or_on=_kernel.OUT_OF_RESOURCES,
                )
            except _bind.LockHeldError as exc:
                why = exc.describe()
            except OSError as exc:
                self._binding = None
                if exc.errno not in _kernel.OUT_OF_RESOURCES:
                    raise
                why = str(exc)
            else:
                self._binding = None
                return
            self._binding = None
            logger.warning(
                "%s: the path stays, for the next server to replace: %s", self._address, why
            )

    def __repr__(self) -> str:
        fd = self.socket.fileno()
        if fd == -1:
            return "<UnixListener closed>"
        return f"<UnixListener fd={fd} at {self._address}, {self.denied} denied>"

    def _check_open(self) -> None:
        if self.socket.fileno() == -1:
            raise ConnectionClosedError("this listener is closed")


@enable_ki_protection
async def accept_connection(listener: UnixListener) -> UnixConnection:
    """Accept one connection, without asking the policy."""
    return make_connection(listener, *await listener._acceptor.accept())


@enable_ki_protection
def accept_pending(listener: UnixListener) -> tuple[UnixConnection | None, OSError | None]:
    """Accept a connection that is in the queue already, without asking the policy.

    Returns:
      None if there is none, and an error to be passed to :func:`back_off`.
    """
    accepted, error = listener._acceptor.accept_pending(1)
    return make_connection(listener, *accepted[0]) if accepted else None, error


async def back_off(listener: UnixListener, error: OSError) -> None:
    """Wait before the next connection is accepted."""
    await listener._acceptor.back_off(error)


@enable_ki_protection
def make_connection(listener: UnixListener, fd: int, name: str | bytes) -> UnixConnection:
    """Make a connection of an accepted file descriptor, which is closed if that fails."""
    sock = stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_STREAM, 0, fileno=fd)
    try:
        return connection_of(
            sock,
            receive_descriptors=receives_descriptors(listener),
            local_address=listener._address,
            remote_address=UnixSocketAddress.from_native(name),
        )
    except BaseException:
        _closing.close_socket(sock)
        raise


async def admits(listener: UnixListener, conn: UnixConnection) -> bool:
    """Whether the listener's policy admits the peer; if not, it is counted and ``conn`` closed."""
    policy = listener._policy
    if policy is None or await admit_or_close(conn, policy):
        return True
    listener.denied += 1
    return False


def has_policy(listener: UnixListener) -> bool:
    return listener._policy is not None


def policy_of(listener: UnixListener) -> PeerPolicy:
    """Return the policy of a listener that has one."""
    assert listener._policy is not None
    return listener._policy


def receives_descriptors(listener: UnixListener) -> bool:
    return listener._receive_descriptors


def queue_size(listener: UnixListener) -> int:
    """Return how many connections can be in the queue; 0 if other processes may accept them."""
    return listener._queue_size


def set_queue_size(listener: UnixListener, size: int) -> None:
    """Set how many connections can be in the queue of a listener that only this process has."""
    listener._queue_size = size


def binding_of(listener: UnixListener) -> _bind.Binding | None:
    """Return the path that closing the listener removes; None if it removes none."""
    return listener._binding


def set_binding(listener: UnixListener, binding: _bind.Binding | None) -> None:
    """Set which path closing the listener removes."""
    listener._binding = binding


def acceptor_of(listener: UnixListener) -> Acceptor:
    return listener._acceptor


async def remove_path(listener: UnixListener) -> None:
    """Remove the path of a listener; log an error, because a drain continues without it."""
    try:
        await listener._remove_path()
    except OSError:
        logger.exception(
            "%s: cannot remove the path; it stays, for the next server to replace",
            listener.get_local_address(),
        )


trio.SocketListener.register(UnixListener)


def _check_int(name: str, value: object, example: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int{example}, got {type(value).__name__}")


def _check_options(mode: int, backlog: int) -> None:
    _check_int("mode", mode, " such as 0o600")
    if not 0 <= mode <= 0o7777:
        raise ValueError(f"mode must be from 0 to 0o7777, got {mode:#o}")
    _check_int("backlog", backlog, " or None")
    if backlog < 0:
        raise ValueError(f"backlog must be non-negative or None, got {backlog}")


def _check_id(name: str, value: object) -> None:
    if value is None or isinstance(value, str):
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an id, a name or None, got {type(value).__name__}")
    # The largest number means "unchanged" to chown(2).
    if not 0 <= value < 2**32 - 1:
        raise ValueError(f"{name} must be from 0 to {2**32 - 2}, got {value}")


async def _id_of(value: int | str | None, look_up: Callable[[str], int]) -> int | None:
    if isinstance(value, str):
        # The database of users may be on another machine. Not trio's default limiter, whose threads
        # may all be waiting for something.
        return await trio.to_thread.run_sync(look_up, value, limiter=trio.CapacityLimiter(1))
    return value


@enable_ki_protection
async def open_unix_listener(
    address: AddressLike,
    *,
    mode: int = 0o600,
    owner: int | str | None = None,
    group: int | str | None = None,
    backlog: int | None = None,
    policy: PeerPolicy | None = None,
    credentials: bool = False,
    pidfds: bool = False,
    receive_descriptors: bool = True,
    replace: bool = False,
    unlink_on_close: bool = True,
) -> UnixListener:
    r"""Listen at a path, or at an abstract name.

    The socket has its owner, group and mode before any process can connect. A socket that no
    process holds anymore, as a server that was killed leaves it, is replaced. A server that is
    alive is not, nor is a file of another kind.

    While this looks and binds, it holds the lock of the path, a file beside it
    (``.NAME.lock``), which it removes afterwards; a file of yours with that name is locked, but
    never removed. The kernel releases the lock of a process that is killed.

    Args:
      address: a path, even one that is too long for the address of a socket; ``"\0name"`` is an
        abstract name. With ``""``, the kernel chooses an abstract name (Linux: autobind), which
        :meth:`UnixListener.get_local_address` returns.
      mode: the permission bits of the path, whatever the umask. On Linux, to connect takes write
        permission. Not used for an abstract name.
      owner, group: of the path, ids or names; default: those of this process. Only root can set
        any of them; another process can set its own groups.
      backlog: how many connections may wait to be accepted; default: as many as the system
        allows.
      policy: which peers may connect; see :class:`UnixListener`.
      credentials, pidfds: as of :func:`open_unix_connection`, for every accepted connection.
      receive_descriptors: whether peers may send file descriptors; as of :class:`UnixConnection`.
      replace: whether to take the path even from a server that is alive, so that connecting
        never fails: the old server keeps its connections and its queue. The socket is then
        bound at a temporary name beside the path (``.NAME.new``) and renamed. The kernel keeps
        that name as the name of the socket (getsockname, ``ss -x``), until the next server that
        finds no live one there.
      unlink_on_close: whether closing the listener removes the path, if it still leads to this
        socket.

    Returns:
      A listener that the caller owns. ``listener.socket.getsockname()`` is the path, made
      absolute, unless it was taken from a live server or is too long for the address of a socket.

    Raises:
      TypeError: an argument of a wrong type.
      ValueError: a wrong argument, or a user or group that does not exist.
      AddressInUseError: a process holds the socket there, something else is there, or another
        process keeps the lock of the path for ten seconds; nothing was changed.
      OSError: from the file system, with the address; nothing is left at the path.
      NotSupportedError: the platform has no Unix sockets, or not what was asked for.
    """
    family = _kernel.required(_kernel.AF_UNIX, "Unix sockets")
    name = UnixSocketAddress.from_any(address)
    is_path = not (name.get_is_abstract() or name.get_is_anonymous())
    backlog = 0xFFFF if backlog is None else backlog
    _check_options(mode, backlog)
    check_policy(policy)
    _check_id("owner", owner)
    _check_id("group", group)
    if not is_path and not (owner is None and group is None):
        raise ValueError("owner and group require a path; an abstract name has no permissions")
    await checkpoint_in_task()
    permissions = _bind.Permissions(
        mode,
        await _id_of(owner, _kernel.user_named),
        await _id_of(group, _kernel.group_named),
    )
    sock = stdlib_socket.socket(family, stdlib_socket.SOCK_STREAM)

    def listen() -> None:
        """Set what must be set before any process can connect, and listen."""
        enable_passing(sock, credentials=credentials, pidfds=pidfds)
        if not receive_descriptors:
            disable_passrights(sock)
        sock.listen(backlog)

    binding = None
    try:
        socket = trio.socket.from_stdlib_socket(sock)
        if is_path:
            binding = await _bind.bind_path(sock, name, permissions, listen, replace=replace)
        else:
            _bind.bind_abstract(sock, name)
            listen()
        # From here on the path leads to the socket, and nothing can fail.
        listener = UnixListener(
            socket,
            policy=policy,
            receive_descriptors=receive_descriptors,
            address=None if name.get_is_anonymous() else name,
        )
    except BaseException:
        # While a live server was replaced, clients may have connected to it.
        _closing.close_socket(sock)
        raise
    listener._queue_size = backlog + 1
    if unlink_on_close:
        listener._binding = binding
    return listener
