"""Options of a socket that stay on for its life.

The rule of this file: an option that was asked for is on afterwards, or an error says that this
kernel has none.

Sources: unix(7), socket(7)
"""

from __future__ import annotations

import errno
import socket
from contextlib import suppress

import trio

from . import _kernel
from .errors import NotSupportedError


def enable_passing(sock: socket.socket, *, credentials: bool, pidfds: bool) -> None:
    """Have every message come with its sender's credentials, with a pidfd of its sender.

    What is set on a listening socket, accepted ones inherit.

    Raises:
      NotSupportedError: the kernel has no such option.
    """
    if credentials:
        _switch_on(sock, _kernel.SO_PASSCRED, "SO_PASSCRED")
    if pidfds:
        _switch_on(sock, _kernel.SO_PASSPIDFD, "SO_PASSPIDFD (Linux 6.5)")


def _switch_on(sock: socket.socket, option: int | None, name: str) -> None:
    number = _kernel.required(option, name)
    try:
        sock.setsockopt(_kernel.SOL_SOCKET, number, 1)
    except OSError as exc:
        if exc.errno != errno.ENOPROTOOPT:
            raise
        raise NotSupportedError(f"this kernel has no {name}") from exc


def disable_passrights(sock: socket.socket) -> None:
    """Have the kernel refuse descriptors to whoever sends them here, where it can."""
    if _kernel.SO_PASSRIGHTS is not None:
        with suppress(OSError):
            sock.setsockopt(_kernel.SOL_SOCKET, _kernel.SO_PASSRIGHTS, 0)


def raw_socket(sock: trio.socket.SocketType) -> socket.socket:
    """Return the standard library socket beneath a trio socket.

    Raises:
      TypeError: not a trio socket, or one without a descriptor beneath.
    """
    if not isinstance(sock, trio.socket.SocketType):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"a trio socket is due, not {type(sock).__name__} ({sock!r})")
    # trio has no public way to the socket beneath. The attribute is as old as trio's
    # sockets, and a second socket object for the same descriptor would not be told when
    # trio's closes it.
    raw: object = getattr(sock, "_sock", None)
    if not isinstance(raw, socket.socket):
        raise TypeError(f"a trio socket on a real descriptor is due, not {type(sock).__name__}")
    return raw


def check_connected(sock: socket.socket) -> None:
    """Raise ValueError unless ``sock`` is a connected Unix stream socket."""
    family = _kernel.required(_kernel.AF_UNIX, "Unix sockets")
    if not _kernel.HAS_SENDMSG:
        raise NotSupportedError("this Python has no socket.sendmsg, recvmsg and CMSG_SPACE")
    due = "a connected Unix stream socket is due"
    if sock.fileno() == -1:
        raise ValueError(f"{due}, but this socket is closed")
    if sock.family != family:
        raise ValueError(f"{due}, but this is an {_name_of(sock.family)} socket")
    if sock.type != socket.SOCK_STREAM:
        raise ValueError(f"{due}, but this is a {_name_of(sock.type)} socket")
    option = _kernel.SO_ACCEPTCONN
    if option is not None and sock.getsockopt(_kernel.SOL_SOCKET, option):
        raise ValueError(f"{due}, but this socket listens; accept() its connections")
    try:
        sock.getpeername()
    except OSError as exc:
        raise ValueError(f"{due}, but this socket is not connected ({exc.strerror})") from exc


def _name_of(constant: int) -> str:
    return getattr(constant, "name", str(constant))


def check_listening(sock: trio.socket.SocketType | socket.socket) -> None:
    family = _kernel.required(_kernel.AF_UNIX, "Unix sockets")
    due = "a listening Unix stream socket is due"
    if sock.fileno() == -1:
        raise ValueError(f"{due}, but this socket is closed")
    if sock.family != family or sock.type != socket.SOCK_STREAM:
        raise ValueError(f"{due}, not {sock!r}")
    option = _kernel.SO_ACCEPTCONN
    if option is not None and not sock.getsockopt(_kernel.SOL_SOCKET, option):
        raise ValueError(f"{due}, but this socket does not listen; call listen() first")
