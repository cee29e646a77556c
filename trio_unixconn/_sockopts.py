"""Which sockets this package takes, and options that stay on for the life of a socket.

Invariant: an option that was asked for is on afterwards, or NotSupportedError says that this
kernel has none.

Sources: unix(7), socket(7)
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import trio

from . import _fds, _kernel
from .errors import NotSupportedError

T = TypeVar("T")

# l_onoff and l_linger of a struct linger.
_linger = struct.Struct("ii")

_CONNECTED = "expected a connected Unix stream socket"
_LISTENING = "expected a listening Unix stream socket"
_DATAGRAM = "expected a Unix datagram socket"


def enable_passing(sock: socket.socket, *, credentials: bool, pidfds: bool) -> None:
    """Make every message arrive with credentials, or a pidfd, of its sender.

    Accepted sockets inherit these options from a listening one.

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
    """Make the kernel reject file descriptors that peers send, if it can (Linux 6.16)."""
    if _kernel.SO_PASSRIGHTS is not None:
        with suppress(OSError):
            sock.setsockopt(_kernel.SOL_SOCKET, _kernel.SO_PASSRIGHTS, 0)


def enable_oobinline(sock: socket.socket) -> None:
    """Make a byte that a peer sends with MSG_OOB arrive in its place in the stream, if possible.

    Without it, recvmsg(2) skips the byte and closes its file descriptors inside the call, without
    MSG_CTRUNC. That close can block, and the task cannot notice the loss.
    """
    if _kernel.SO_OOBINLINE is not None:
        # Each connection does this, and suppress() takes 0.4 us.
        try:
            sock.setsockopt(_kernel.SOL_SOCKET, _kernel.SO_OOBINLINE, 1)
        except OSError:
            pass


def raw_socket(sock: trio.socket.SocketType) -> socket.socket:
    """Return the standard library socket of a trio socket.

    Raises:
      TypeError: not a trio socket, or one without a file descriptor.
    """
    if not isinstance(sock, trio.socket.SocketType):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"expected a trio socket, got {type(sock).__name__}")
    # trio has no public way to it. The attribute is as old as trio's sockets, and a second socket
    # object for the same file descriptor would not notice when trio's is closed.
    raw: object = getattr(sock, "_sock", None)
    if not isinstance(raw, socket.socket):
        raise TypeError(f"expected a trio socket with a file descriptor, got {type(sock).__name__}")
    return raw


def adopt_fd(fd: int, expected: str, adopt: Callable[[socket.socket], T]) -> T:
    """Make an object that owns a file descriptor, which becomes close-on-exec.

    If this raises, the file descriptor is as it was, and still the caller's.

    Args:
      expected: the kind of socket, for errors.
      adopt: makes the object from a socket; if it raises, it has changed nothing.

    Raises:
      TypeError: not an int.
      ValueError: not open, not a socket, or rejected by *adopt*.
    """
    if type(fd) is not int:
        raise TypeError(f"fd must be an int, got {type(fd).__name__} ({fd!r})")
    number = _fds.fileno(fd)
    try:
        sock = socket.socket(fileno=number)
    except OSError as exc:
        what = "is not open" if exc.errno == errno.EBADF else "is not a socket"
        raise ValueError(f"file descriptor {number} {what}; expected {expected}") from exc
    try:
        adopted = adopt(sock)
    except BaseException:
        sock.detach()
        raise
    sock.set_inheritable(False)
    return adopted


def check_connected(sock: socket.socket) -> None:
    """Raise ValueError unless *sock* is a connected Unix stream socket."""
    family = _kernel.required(_kernel.AF_UNIX, "Unix sockets")
    if not _kernel.HAS_SENDMSG:
        raise NotSupportedError("this Python has no socket.sendmsg, recvmsg and CMSG_SPACE")
    _check_kind(sock, family, _CONNECTED)
    option = _kernel.SO_ACCEPTCONN
    if option is not None and sock.getsockopt(_kernel.SOL_SOCKET, option):
        raise ValueError(f"{_CONNECTED}, got one that listens; accept() its connections")
    try:
        sock.getpeername()
    except OSError as exc:
        raise ValueError(f"{_CONNECTED}, got one that is not connected ({exc.strerror})") from exc


def check_listening(sock: trio.socket.SocketType | socket.socket) -> None:
    """Raise ValueError unless *sock* is a listening Unix stream socket."""
    family = _kernel.required(_kernel.AF_UNIX, "Unix sockets")
    _check_kind(sock, family, _LISTENING)
    option = _kernel.SO_ACCEPTCONN
    if option is not None and not sock.getsockopt(_kernel.SOL_SOCKET, option):
        raise ValueError(f"{_LISTENING}, got one that does not listen; call listen() first")


def check_datagram(sock: socket.socket) -> None:
    """Raise ValueError unless *sock* is a Unix datagram socket."""
    family = _kernel.required(_kernel.AF_UNIX, "Unix sockets")
    if not _kernel.HAS_SENDMSG:
        raise NotSupportedError("this Python has no socket.sendmsg, recvmsg and CMSG_SPACE")
    _check_kind(sock, family, _DATAGRAM, socket.SOCK_DGRAM)


def _check_kind(
    sock: trio.socket.SocketType | socket.socket,
    family: int,
    expected: str,
    kind: socket.SocketKind = socket.SOCK_STREAM,
) -> None:
    if sock.fileno() == -1:
        raise ValueError(f"{expected}, got one that is closed")
    if sock.family != family:
        raise ValueError(f"{expected}, got an {_name_of(sock.family)} socket")
    if sock.type != kind:
        raise ValueError(f"{expected}, got a {_name_of(sock.type)} socket")


def _name_of(constant: int) -> str:
    return getattr(constant, "name", str(constant))


def can_linger(sock: socket.socket | trio.socket.SocketType) -> bool:
    """Whether close(2) of a socket may wait until its peer has received everything (SO_LINGER)."""
    try:
        option = sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _linger.size)
    except OSError:
        # Python reads no structures from AF_VSOCK sockets.
        return True
    on, seconds = _linger.unpack(option)
    return bool(on and seconds)
