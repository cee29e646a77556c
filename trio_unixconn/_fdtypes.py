"""What is behind a descriptor, and a Python object for it.

The rule of this file: look first, take over then. A function that raises has left the
descriptor as it was and its owner's; one that returns has handed it to the object returned.

Sources: fstat(2), fcntl(2) (F_GETFL), open(2) (O_PATH), inode(7)
"""

from __future__ import annotations

import enum
import os
import socket as stdlib_socket
import stat
from typing import IO, TYPE_CHECKING, Any, Final

import trio

from .errors import WrongDescriptorKindError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

_O_PATH: Final[int] = getattr(os, "O_PATH", 0)


class DescriptorKind(enum.Enum):
    """What kind of file a descriptor is open on. Source: inode(7)."""

    REGULAR_FILE = "regular file"
    DIRECTORY = "directory"
    PIPE = "pipe"
    SOCKET = "socket"
    CHARACTER_DEVICE = "character device"
    BLOCK_DEVICE = "block device"
    SYMBOLIC_LINK = "symbolic link"
    #: No file at all: epoll, eventfd, signalfd, timerfd, and on older kernels pidfd.
    ANONYMOUS = "anonymous inode"


_BY_FORMAT: Final = {
    stat.S_IFREG: DescriptorKind.REGULAR_FILE,
    stat.S_IFDIR: DescriptorKind.DIRECTORY,
    stat.S_IFIFO: DescriptorKind.PIPE,
    stat.S_IFSOCK: DescriptorKind.SOCKET,
    stat.S_IFCHR: DescriptorKind.CHARACTER_DEVICE,
    stat.S_IFBLK: DescriptorKind.BLOCK_DEVICE,
    stat.S_IFLNK: DescriptorKind.SYMBOLIC_LINK,
}


def kind_of(fd: int) -> DescriptorKind:
    """Return what kind of file ``fd`` is open on.

    Raises:
      OSError: EBADF.
    """
    return _BY_FORMAT.get(stat.S_IFMT(os.fstat(fd).st_mode), DescriptorKind.ANONYMOUS)


def check_mode(mode: str) -> None:
    """Raise unless ``open(fd, mode)`` makes sense for a descriptor.

    Raises:
      TypeError, ValueError: it does not.
    """
    if not isinstance(mode, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"mode must be a str, not {type(mode).__name__}")
    letters = set(mode)
    if (
        len(letters) != len(mode)
        or letters - set("rwabt+")
        or len(letters & set("rwa")) != 1
        or {"b", "t"} <= letters
    ):
        raise ValueError(f"mode must be one for an open file, such as 'rb' or 'r+', not {mode!r}")


def open_file(fd: int, mode: str, kinds: Collection[DescriptorKind]) -> IO[Any]:
    """Return a Python file that owns ``fd``.

    Raises:
      WrongDescriptorKindError: another kind than ``kinds``, opened only as a path (O_PATH),
        or for another direction than ``mode`` needs. ``fd`` is left alone.
    """
    kind = kind_of(fd)
    if kind not in kinds:
        due = " or ".join(sorted(each.value for each in kinds))
        raise WrongDescriptorKindError(f"a {due} was due, but a {kind.value} came", kind)
    flags = _status_flags(fd)
    if _O_PATH and flags & _O_PATH:
        raise WrongDescriptorKindError(
            f"a {kind.value} to read or write was due, but one came that was opened only as a "
            "path (O_PATH)",
            kind,
        )
    access = flags & os.O_ACCMODE
    if ("r" in mode or "+" in mode) and access == os.O_WRONLY:
        raise WrongDescriptorKindError(
            f"a {kind.value} to read was due (mode {mode!r}), but one came that is open for "
            "writing only",
            kind,
        )
    if ("r" not in mode and access == os.O_RDONLY) or ("+" in mode and access != os.O_RDWR):
        raise WrongDescriptorKindError(
            f"a {kind.value} to write was due (mode {mode!r}), but one came that is not open "
            "for that",
            kind,
        )
    try:
        # First without owning it, because open() closes what it cannot buffer.
        open(fd, mode, closefd=False).close()
    except (OSError, ValueError) as exc:
        raise WrongDescriptorKindError(
            f"a {kind.value} to open with mode {mode!r} was due, but this one cannot be ({exc})",
            kind,
        ) from exc
    return open(fd, mode)


def open_socket(fd: int) -> trio.socket.SocketType:
    """Return a trio socket of the right family and type that owns ``fd``.

    The open socket becomes non-blocking, for all who share it.

    Raises:
      WrongDescriptorKindError: not a socket. ``fd`` is left alone.
    """
    return trio.socket.from_stdlib_socket(_stdlib_socket(fd, "a socket"))


def _stdlib_socket(fd: int, due: str) -> stdlib_socket.socket:
    kind = kind_of(fd)
    if kind is not DescriptorKind.SOCKET:
        raise WrongDescriptorKindError(f"{due} was due, but a {kind.value} came", kind)
    try:
        return stdlib_socket.socket(fileno=fd)
    except OSError as exc:
        # Opened as a path (O_PATH), or of a family that has no names.
        raise WrongDescriptorKindError(
            f"{due} was due, but a socket came that cannot be used ({exc.strerror})", kind
        ) from exc


# As Gio's g_socket_connection_factory_register_type: what stands above registers itself.
_stream_makers: Final[dict[int, Callable[[trio.socket.SocketType], Any]]] = {}


def register_stream(
    family: int, make: Callable[[trio.socket.SocketType], trio.abc.HalfCloseableStream]
) -> None:
    """Have :func:`open_stream` make streams of an address family with ``make``."""
    _stream_makers[family] = make


def open_stream(fd: int) -> trio.abc.HalfCloseableStream:
    """Return a stream that owns ``fd``: ``trio.SocketStream``, or what its family registered.

    Raises:
      WrongDescriptorKindError: not a connected stream socket. ``fd`` is left alone.
    """
    sock = _stdlib_socket(fd, "a stream socket")
    kind = DescriptorKind.SOCKET
    try:
        if sock.type != stdlib_socket.SOCK_STREAM:
            name = getattr(sock.type, "name", sock.type)
            raise WrongDescriptorKindError(
                f"a stream socket was due, but a {name} socket came", kind
            )
        try:
            sock.getpeername()
        except OSError as exc:
            raise WrongDescriptorKindError(
                f"a connected stream socket was due, but one came that is not ({exc.strerror})",
                kind,
            ) from exc
    except BaseException:
        sock.detach()
        raise
    make = _stream_makers.get(sock.family, trio.SocketStream)
    stream: trio.abc.HalfCloseableStream = make(trio.socket.from_stdlib_socket(sock))
    return stream


def _status_flags(fd: int) -> int:
    # Not on Windows, where descriptors are not passed either.
    import fcntl  # noqa: PLC0415

    return fcntl.fcntl(fd, fcntl.F_GETFL)
