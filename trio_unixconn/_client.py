"""open_unix_connection: connect to a Unix socket by name.

Invariant: the connection is returned, or the socket is closed and its own path removed.

Sources: connect(2), unix(7)
"""

from __future__ import annotations

import errno
import random
import socket as stdlib_socket
from typing import Final

import trio
from trio.lowlevel import enable_ki_protection

from . import _bind, _kernel
from ._address import AddressLike, UnixSocketAddress
from ._closing import close_socket
from ._connection import UnixConnection, connection_of
from ._paths import connectable, describe_connect_error
from ._policy import PeerPolicy, check_peer, check_policy
from ._sockopts import disable_passrights, enable_passing
from ._trio_task import checkpoint_in_task
from .errors import PeerDeniedError

# Between two attempts to connect while the queue of the listener is full, in seconds.
INITIAL_BACKOFF: Final = 0.001
MAX_BACKOFF: Final = 0.1


@enable_ki_protection
async def open_unix_connection(
    address: AddressLike,
    *,
    local_address: AddressLike | None = None,
    policy: PeerPolicy | None = None,
    credentials: bool = False,
    pidfds: bool = False,
    receive_descriptors: bool = True,
) -> UnixConnection:
    r"""Connect to a Unix stream socket.

    While the queue of the listener is full, this retries with a backoff from 1 ms to 100 ms,
    until it is connected, refused or cancelled: Linux says EAGAIN, and there is nothing to poll
    for. For a timeout, use ``trio.fail_after``.

    Args:
      address: a path, even one that is too long for the address of a socket; ``"\0name"`` is an
        abstract name.
      local_address: the address of this end, which the peer sees; default: anonymous. A path, an
        abstract name, or ``""`` for an abstract name that the kernel chooses (Linux: autobind).
        A path gets the mode that the umask leaves. It is removed if connecting fails, but as with
        Gio it stays after the connection is closed: remove it then. A socket that no process
        holds anymore is replaced.
      policy: which servers are admitted. It is checked before this returns, and so before
        anything is sent; the kernel names the process that called listen(2).
      credentials: whether every message arrives with the credentials of its sender
        (``SO_PASSCRED``), so that ``receive_message`` need not ask each time. The kernel then
        gives this end an abstract name, unless it has a local address.
      pidfds: whether every message arrives with a pidfd of its sender (``SO_PASSPIDFD``).
      receive_descriptors: as of :class:`UnixConnection`.

    Returns:
      A connection that the caller owns.

    Raises:
      TypeError: not an address, or not a policy.
      ValueError: no process can listen at this address.
      AddressInUseError: a process holds a socket at the local address, or something else is there.
      OSError: from connect(2), with the address and what is there: FileNotFoundError,
        ConnectionRefusedError (no process is listening), PermissionError and so on; from bind(2),
        with the local address.
      PeerDeniedError: the policy does not admit the server.
      NotSupportedError: the platform has no Unix sockets, or not what was asked for.
    """
    family = _kernel.required(_kernel.AF_UNIX, "Unix sockets")
    name = UnixSocketAddress.from_any(address)
    if name.get_is_anonymous():
        raise ValueError("cannot connect to an anonymous address")
    local = (
        None
        if local_address is None
        else UnixSocketAddress.from_any(local_address, argument="local_address")
    )
    check_policy(policy)
    await checkpoint_in_task()
    sock = stdlib_socket.socket(family, stdlib_socket.SOCK_STREAM)
    binding = None
    try:
        sock.setblocking(False)
        enable_passing(sock, credentials=credentials, pidfds=pidfds)
        if not receive_descriptors:
            # Before the server can send the first one.
            disable_passrights(sock)
        if local is not None:
            binding = await _bind_local(sock, local)
        await _connect(sock, name)
        conn = connection_of(
            sock,
            receive_descriptors=receive_descriptors,
            local_address=None if binding is None else local,
            remote_address=name,
        )
        if policy is not None:
            peer = await check_peer(conn, policy)
            if peer is not None:
                raise PeerDeniedError(
                    errno.EACCES,
                    f"the server, {peer}, is not admitted by {policy}",
                    str(name),
                )
    except BaseException:
        if binding is not None:
            # While the socket is open, the path is known to be ours.
            with trio.CancelScope(shield=True):
                await _bind.unbind_quietly(binding)
        # The server may have sent something that makes close(2) wait.
        close_socket(sock)
        raise
    return conn


async def _bind_local(sock: stdlib_socket.socket, local: UnixSocketAddress) -> _bind.Binding | None:
    if local.get_is_abstract() or local.get_is_anonymous():
        _bind.bind_abstract(sock, local)
        return None
    return await _bind.bind_path(sock, local, _bind.Permissions(), lambda: None, replace=False)


@enable_ki_protection
async def _connect(sock: stdlib_socket.socket, name: UnixSocketAddress) -> None:
    backoff = INITIAL_BACKOFF
    while True:
        try:
            with connectable(name) as native:
                sock.connect(native)
        except BlockingIOError:
            # Clients that were rejected together should not all return together: with the same
            # backoff for all, a hundred of them took 4.1 s at a backlog of 0.
            await trio.sleep(backoff * random.uniform(0.5, 1))
            backoff = min(2 * backoff, MAX_BACKOFF)
        except OSError as exc:
            raise describe_connect_error(exc, name) from exc
        else:
            return
