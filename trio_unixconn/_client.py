"""open_unix_connection: connect to a Unix socket by name.

The rule of this file: what it returns is connected, and on every other way out the socket is
closed.

Sources: connect(2), unix(7)
"""

from __future__ import annotations

import os
import socket as stdlib_socket
from typing import Final

import trio

from . import _kernel
from ._address import UnixSocketAddress, named
from ._connection import UnixConnection

_FIRST_PAUSE: Final = 0.001
_LONGEST_PAUSE: Final = 0.1


async def open_unix_connection(
    address: str | bytes | os.PathLike[str] | os.PathLike[bytes] | UnixSocketAddress,
) -> UnixConnection:
    r"""Connect to the Unix stream socket called ``address``.

    While the listener's queue is full this tries again, with pauses that grow from 1 ms to
    100 ms, until it is connected or cancelled: Linux says EAGAIN then, and there is nothing
    to poll for.

    Args:
      address: a path; ``"\0name"`` is a name in Linux's abstract namespace.

    Returns:
      A connection that the caller owns.

    Raises:
      TypeError, ValueError: not the name of a socket.
      OSError: from connect(2), with the address: FileNotFoundError, ConnectionRefusedError
        (nobody listens there), PermissionError and so on.
      NotSupportedError: the platform has no Unix sockets.
    """
    family = _kernel.required(_kernel.AF_UNIX, "Unix sockets")
    name = UnixSocketAddress.from_any(address)
    if name.get_is_anonymous():
        raise ValueError("nobody can be connected to without a name: a path or an abstract name")
    await trio.lowlevel.checkpoint()
    sock = stdlib_socket.socket(family, stdlib_socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        pause = _FIRST_PAUSE
        while True:
            try:
                sock.connect(name.native)
                break
            except BlockingIOError:
                await trio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            except OSError as exc:
                raise named(exc, name) from exc
        return UnixConnection.from_stdlib_socket(sock)
    except BaseException:
        sock.close()
        raise
