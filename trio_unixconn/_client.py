"""open_unix_connection: connect to a Unix socket by name.

The rule of this file: what it returns is connected, and on every other way out the socket is
closed.

Sources: connect(2), unix(7)
"""

from __future__ import annotations

import errno
import random
import socket as stdlib_socket
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import enable_ki_protection

from . import _kernel
from ._address import UnixSocketAddress
from ._connection import UnixConnection
from ._paths import connectable, describe_connect_error
from ._policy import check_peer
from ._sockopts import disable_passrights, enable_passing
from .errors import PeerDeniedError

if TYPE_CHECKING:
    import os

    from ._policy import PeerPolicy

_FIRST_PAUSE: Final = 0.001
_LONGEST_PAUSE: Final = 0.1


@enable_ki_protection
async def open_unix_connection(
    address: str | bytes | os.PathLike[str] | os.PathLike[bytes] | UnixSocketAddress,
    *,
    policy: PeerPolicy | None = None,
    credentials: bool = False,
    pidfds: bool = False,
    receive_descriptors: bool = True,
) -> UnixConnection:
    r"""Connect to the Unix stream socket called ``address``.

    While the listener's queue is full this tries again, with pauses that grow from 1 ms to
    100 ms, until it is connected, refused or cancelled: Linux says EAGAIN then, and there is
    nothing to poll for. For a deadline, use ``trio.fail_after``.

    Args:
      address: a path, also one that is too long for a socket's address; ``"\0name"`` is a name
        in Linux's abstract namespace.
      policy: who may be the server. It is asked before this returns, and so before anything is
        sent; the kernel names the process that called listen(2).
      credentials: whether every message is to come with its sender's credentials
        (``SO_PASSCRED``), so that ``receive_message`` need not ask each time. The kernel gives
        this end an abstract name then.
      pidfds: whether every message is to come with a pidfd of its sender (``SO_PASSPIDFD``).
      receive_descriptors: as of :class:`UnixConnection`.

    Returns:
      A connection that the caller owns.

    Raises:
      TypeError, ValueError: not the name of a socket.
      OSError: from connect(2), with the address, and what is there: FileNotFoundError,
        ConnectionRefusedError (nobody listens there), PermissionError and so on.
      PeerDeniedError: the policy does not admit the server.
      NotSupportedError: the platform has no Unix sockets, or not what was asked for.
    """
    family = _kernel.required(_kernel.AF_UNIX, "Unix sockets")
    name = UnixSocketAddress.from_any(address)
    if name.get_is_anonymous():
        raise ValueError("cannot connect to an anonymous address")
    await trio.lowlevel.checkpoint()
    sock = stdlib_socket.socket(family, stdlib_socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        enable_passing(sock, credentials=credentials, pidfds=pidfds)
        if not receive_descriptors:
            # Before the server can send the first one.
            disable_passrights(sock)
        await _connect(sock, name)
        conn = UnixConnection.from_stdlib_socket(
            sock, receive_descriptors=receive_descriptors, remote_address=name
        )
        if policy is not None:
            peer = await check_peer(conn, policy)
            if peer is not None:
                raise PeerDeniedError(
                    errno.EACCES,
                    f"the server there, {peer}, is not admitted by {policy}",
                    str(name),
                )
    except BaseException:
        sock.close()
        raise
    return conn


@enable_ki_protection
async def _connect(sock: stdlib_socket.socket, name: UnixSocketAddress) -> None:
    pause = _FIRST_PAUSE
    while True:
        try:
            with connectable(name) as native:
                sock.connect(native)
        except BlockingIOError:
            # Clients that were turned away together should not all come back together: with
            # the same pauses for all, a hundred of them took 4.1 s at a backlog of 0.
            await trio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - no secret
            pause = min(2 * pause, _LONGEST_PAUSE)
        except OSError as exc:
            raise describe_connect_error(exc, name) from exc
        else:
            return
