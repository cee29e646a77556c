"""UnixListener: accept connections on a Unix socket.

The rule of this file: whoever makes the name in the file system takes it away again, and a
connection that was accepted is returned.

Sources: bind(2), listen(2), accept(2), unix(7), trio's SocketListener
"""

from __future__ import annotations

import errno
import operator
import os
import socket as stdlib_socket
from typing import Final

import trio

from . import _kernel
from ._address import UnixSocketAddress, named
from ._connection import UnixConnection
from .errors import ConnectionBusyError, ConnectionClosedError

# The connection that was to be accepted is gone; the next one may be fine. The list is
# accept(2)'s, as far as it can happen to a Unix socket.
_TRY_AGAIN: Final = frozenset({errno.ECONNABORTED, errno.EPROTO, errno.EPERM})


class UnixListener(trio.abc.Listener[UnixConnection]):
    """A listening Unix stream socket, for ``trio.serve_listeners`` or :meth:`accept`.

    Args:
      socket: a bound, listening ``AF_UNIX``, ``SOCK_STREAM`` trio socket. The listener owns it
        from now on; if this raises, the caller still does.
      unlink: a path to remove when the listener is closed, if it is still this socket's.

    Attributes:
      socket: that trio socket.

    Raises:
      TypeError: not a trio socket.
      ValueError: another family or type, or not listening.
      NotSupportedError: the platform has no Unix sockets.
    """

    def __init__(
        self, socket: trio.socket.SocketType, *, unlink: str | bytes | None = None
    ) -> None:
        family = _kernel.required(_kernel.AF_UNIX, "Unix sockets")
        if not isinstance(socket, trio.socket.SocketType):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a trio socket is due, not {type(socket).__name__} ({socket!r})")
        due = "a listening Unix stream socket is due"
        if socket.fileno() == -1:
            raise ValueError(f"{due}, but this socket is closed")
        if socket.family != family or socket.type != stdlib_socket.SOCK_STREAM:
            raise ValueError(f"{due}, not {socket!r}")
        option = _kernel.SO_ACCEPTCONN
        if option is not None and not socket.getsockopt(_kernel.SOL_SOCKET, option):
            raise ValueError(f"{due}, but this socket does not listen; call listen() first")
        self.socket: trio.socket.SocketType = socket
        # The working folder may be another one when the listener is closed.
        self._path = os.path.abspath(os.fsencode(unlink or ""))
        self._identity = _identity(self._path) if unlink else None

    def get_local_address(self) -> UnixSocketAddress:
        """Return the name that this listens at.

        Raises:
          ConnectionClosedError: the listener is closed.
        """
        if self.socket.fileno() == -1:
            raise ConnectionClosedError("this listener is closed")
        return UnixSocketAddress.from_native(self.socket.getsockname())

    async def accept(self) -> UnixConnection:
        """Accept one connection.

        Returns:
          A connection that the caller owns.

        Raises:
          ConnectionClosedError: the listener is closed, before or meanwhile.
          ConnectionBusyError: another task is accepting.
          OSError: EMFILE and the like; ``trio.serve_listeners`` waits and goes on.
        """
        while True:
            try:
                sock, _ = await self.socket.accept()
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
                try:
                    return UnixConnection(sock)
                except BaseException:
                    sock.close()
                    raise

    async def aclose(self) -> None:
        """Close the listener and remove its path; closing twice is allowed."""
        if self.socket.fileno() != -1:
            # First the path: once the socket is closed, another server may have taken it, and
            # its inode may be the same number again.
            try:
                if self._identity is not None and _identity(self._path) == self._identity:
                    os.unlink(self._path)
            finally:
                self.socket.close()
        await trio.lowlevel.checkpoint()


def _identity(path: bytes) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


async def open_unix_listener(
    address: str | bytes | os.PathLike[str] | os.PathLike[bytes] | UnixSocketAddress,
    *,
    mode: int = 0o600,
    backlog: int | None = None,
) -> UnixListener:
    r"""Listen at a path, or at an abstract name.

    Args:
      address: a path at which nothing exists yet; ``"\0name"`` is an abstract name.
      mode: the permission bits of the path, in force before anybody can connect. On Linux,
        whoever may write to it may connect.
      backlog: how many connections may wait to be accepted; as many as the system allows
        if left out.

    Returns:
      A listener that the caller owns; closing it removes the path.

    Raises:
      TypeError, ValueError: not the name of a socket, or no permission bits.
      OSError: from bind(2), with the address: EADDRINUSE if the path exists.
      NotSupportedError: the platform has no Unix sockets.
    """
    family = _kernel.required(_kernel.AF_UNIX, "Unix sockets")
    name = UnixSocketAddress.from_any(address)
    if not 0 <= operator.index(mode) <= 0o7777:
        raise ValueError(f"mode must be permission bits, from 0 to 0o7777, not {mode}")
    if name.get_is_anonymous():
        raise ValueError("a listener needs a name: a path or an abstract name")
    await trio.lowlevel.checkpoint()
    sock = stdlib_socket.socket(family, stdlib_socket.SOCK_STREAM)
    path = None if name.get_is_abstract() else name.native
    bound = False
    try:
        try:
            sock.bind(name.native)
        except OSError as exc:
            raise named(exc, name) from exc
        bound = True
        # Between bind and listen nobody can connect (ECONNREFUSED), so the path is never
        # more open than it should be, and the process's umask is left alone.
        if path is not None:
            os.chmod(path, mode)
        sock.listen(0xFFFF if backlog is None else backlog)
        return UnixListener(trio.socket.from_stdlib_socket(sock), unlink=path)
    except BaseException:
        if bound and path is not None:
            os.unlink(path)
        sock.close()
        raise
