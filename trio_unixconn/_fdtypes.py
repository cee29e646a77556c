"""The kind of file that a descriptor refers to, and Python objects that own it.

Invariant: only :func:`open_checked_file` asks a file server, and so may wait for one. A function
that raises has left the descriptor open and its owner's, unless its docstring says that it takes
ownership.

The kind of a file does not change, so the kernel knows it from the time when the file was opened.
But fstat(2) asks the file server anyway, for the size and the times. statx(2) with
AT_STATX_DONT_SYNC does not: FUSE, NFS, CIFS and Ceph then answer from what they know. File systems
that do not heed that flag (9p) are mounted by the administrator, never by a peer.

Sources: statx(2), fcntl(2) (F_GETFL, F_GET_SEALS), open(2) (O_PATH), inode(7), fuse(4)
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import socket as stdlib_socket
import stat
import struct
from collections.abc import Callable, Collection
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

import trio

from . import _closing
from ._file_thread import call_in_file_thread
from .errors import WrongDescriptorKindError

if TYPE_CHECKING:
    from ._cancellable import Cancellable

_O_PATH: Final[int] = getattr(os, "O_PATH", 0)

# Numbers of include/uapi/linux/fcntl.h.
F_GET_SEALS: Final = 1034
# The same number everywhere; Python's fcntl, which names it, is missing on Windows.
_F_GETFL: Final = 3
_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
# Type and inode of include/uapi/linux/stat.h, and where in struct statx they are.
_STATX_TYPE_INO: Final = 0x0001 | 0x0100
_STATX_SIZE: Final = 256
_STATX_MODE: Final = struct.Struct("=28xH2xQ")
_STATX_DEVICE: Final = struct.Struct("=136xII")


class DescriptorKind(enum.Enum):
    """The kinds of file that a descriptor can be open on. Source: inode(7)."""

    REGULAR_FILE = "regular file"
    DIRECTORY = "directory"
    PIPE = "pipe"
    SOCKET = "socket"
    CHARACTER_DEVICE = "character device"
    BLOCK_DEVICE = "block device"
    SYMBOLIC_LINK = "symbolic link"
    #: Not a file: epoll, eventfd, signalfd, timerfd, and on older kernels pidfd.
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


class FileIdentity(NamedTuple):
    """What the kernel knows of an open file without asking a file server.

    Attributes:
      format: the file type, as ``stat.S_IFMT`` returns it.
      device: the number of the file system, as ``st_dev``.
      inode: the number of the file in it.
    """

    format: int
    device: int
    inode: int


def _find_statx() -> Callable[..., int] | None:
    """Return the C library's statx(); None where it has none (before glibc 2.28; not Linux)."""
    try:
        function: Callable[..., int] = ctypes.CDLL(None, use_errno=True).statx
    except (OSError, TypeError, AttributeError):
        return None
    return function


# Now, because it may take a file descriptor, and later none may be free.
_STATX: Final = _find_statx()


def identify_file(fd: int) -> FileIdentity:
    """Return what the kernel knows of an open file, without asking a file server.

    Where statx(2) is missing (before Linux 4.11, or forbidden in a container) this is fstat(2),
    which may wait for a file server.

    Raises:
      OSError: EBADF.
    """
    if _STATX is not None and fd >= 0:
        buffer = ctypes.create_string_buffer(_STATX_SIZE)
        flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
        if _STATX(fd, b"", flags, _STATX_TYPE_INO, buffer) == 0:
            mode, inode = _STATX_MODE.unpack_from(buffer)
            device = os.makedev(*_STATX_DEVICE.unpack_from(buffer))
            return FileIdentity(stat.S_IFMT(mode), device, inode)
        if ctypes.get_errno() == errno.EBADF:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    status = os.fstat(fd)
    return FileIdentity(stat.S_IFMT(status.st_mode), status.st_dev, status.st_ino)


def kind_of(fd: int) -> DescriptorKind:
    """Return what kind of file ``fd`` is open on, without asking a file server.

    Raises:
      OSError: EBADF.
    """
    return _BY_FORMAT.get(identify_file(fd).format, DescriptorKind.ANONYMOUS)


def is_memory(fd: int) -> bool:
    """Whether ``fd`` is open on memory: a memfd, or a file of tmpfs, which no server has."""
    try:
        _fcntl(fd, F_GET_SEALS)
    except OSError:
        return False
    return True


def check_mode(mode: str) -> None:
    """Raise unless ``open(fd, mode)`` makes sense for a descriptor.

    Raises:
      TypeError: it is not a str.
      ValueError: it is not a mode.
    """
    if not isinstance(mode, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"mode must be a str, got {type(mode).__name__}")
    letters = set(mode)
    if (
        len(letters) != len(mode)
        or letters - set("rwabt+")
        or len(letters & set("rwa")) != 1
        or {"b", "t"} <= letters
    ):
        raise ValueError(f"mode must be one for an open file, such as 'rb' or 'r+', got {mode!r}")


def check_kinds(kinds: Collection[DescriptorKind]) -> frozenset[DescriptorKind]:
    """Return ``kinds`` as a set.

    Raises:
      TypeError: not a collection of DescriptorKind.
      ValueError: an empty one.
    """
    if isinstance(kinds, (str, bytes)):
        raise TypeError(f"kinds must be a collection of DescriptorKind, got {type(kinds).__name__}")
    try:
        found = frozenset(kinds)
    except TypeError as exc:
        raise TypeError(f"kinds must be a collection of DescriptorKind, got {kinds!r}") from exc
    for each in found:
        if not isinstance(each, DescriptorKind):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"kinds must contain only DescriptorKind, got {each!r}")
    if not found:
        raise ValueError("kinds must contain at least one DescriptorKind")
    return found


def check_file(fd: int, mode: str, kinds: Collection[DescriptorKind]) -> DescriptorKind:
    """Return what kind of file ``fd`` is open on, if that and its access mode are acceptable.

    Raises:
      WrongDescriptorKindError: another kind than ``kinds``, opened only as a path (O_PATH),
        or for another direction than ``mode`` needs.
    """
    kind = kind_of(fd)
    if kind not in kinds:
        raise WrongDescriptorKindError(f"expected {describe(*kinds)}, got {describe(kind)}", kind)
    flags = _fcntl(fd, _F_GETFL)
    if _O_PATH and flags & _O_PATH:
        raise WrongDescriptorKindError(
            f"expected {describe(kind)} open for reading or writing, got one opened with O_PATH",
            kind,
        )
    access = flags & os.O_ACCMODE
    reads, writes = "r" in mode or "+" in mode, "r" not in mode or "+" in mode
    if (reads and access == os.O_WRONLY) or (writes and access == os.O_RDONLY):
        wanted = " and ".join(["reading"] * reads + ["writing"] * writes)
        only = "writing" if access == os.O_WRONLY else "reading"
        raise WrongDescriptorKindError(
            f"expected {describe(kind)} open for {wanted} (mode {mode!r}), got one open only for "
            f"{only}",
            kind,
        )
    return kind


def open_checked_file(fd: int, mode: str, kind: DescriptorKind) -> IO[Any]:
    """Return a Python file that owns ``fd``, which :func:`check_file` has checked.

    This may wait for a file server: ``open`` calls fstat, ioctl and lseek.

    Raises:
      WrongDescriptorKindError: Python cannot open it with this mode.
    """
    try:
        # First without owning it, because open() closes what it cannot buffer.
        open(fd, mode, closefd=False).close()
    except (OSError, ValueError) as exc:
        raise WrongDescriptorKindError(
            f"cannot open this {kind.value} with mode {mode!r} ({exc})", kind
        ) from exc
    return open(fd, mode)


def open_file(fd: int, mode: str, kinds: Collection[DescriptorKind]) -> IO[Any]:
    """Return a Python file that owns ``fd``; this may wait for a file server.

    Raises:
      WrongDescriptorKindError: as :func:`check_file` and :func:`open_checked_file`.
    """
    return open_checked_file(fd, mode, check_file(fd, mode, kinds))


async def open_file_or_close(
    fd: int,
    mode: str,
    kinds: Collection[DescriptorKind],
    cancellable: Cancellable | None = None,
    *,
    open_checked: Callable[[int, str, DescriptorKind], IO[Any]] = open_checked_file,
) -> IO[Any]:
    """Return a Python file, without blocking the event loop; takes ownership of ``fd``.

    A file of memory is opened immediately, any other in a thread.

    Args:
      open_checked: opens what has been checked.

    Raises:
      WrongDescriptorKindError: as :func:`open_file`.
      OperationCancelled: the Cancellable was cancelled while a file server did not answer.
    """

    def open_or_close() -> IO[Any]:
        try:
            return open_checked(fd, mode, kind)
        except BaseException:
            _closing.close_fds([fd])
            raise

    try:
        kind = check_file(fd, mode, kinds)
    except BaseException:
        _closing.close_fds([fd])
        raise
    if is_memory(fd):
        return open_or_close()
    return await call_in_file_thread(
        open_or_close,
        discard=lambda file: _closing.close_object(file.close),
        not_started=lambda: _closing.close_fds([fd]),
        cancellable=cancellable,
    )


def open_socket(fd: int) -> trio.socket.SocketType:
    """Return a trio socket of the right family and type that owns ``fd``.

    The open socket becomes non-blocking, for every process that shares it.

    Raises:
      WrongDescriptorKindError: not a socket.
    """
    return trio.socket.from_stdlib_socket(_stdlib_socket(fd, "a socket"))


def _stdlib_socket(fd: int, expected: str) -> stdlib_socket.socket:
    try:
        return stdlib_socket.socket(fileno=fd)
    except OSError as exc:
        kind = kind_of(fd)
        if kind is not DescriptorKind.SOCKET:
            raise WrongDescriptorKindError(
                f"expected {expected}, got {describe(kind)}", kind
            ) from None
        # Opened as a path (O_PATH), or of a family that has no names.
        raise WrongDescriptorKindError(
            f"expected {expected}, got one that cannot be used ({exc.strerror})", kind
        ) from exc


# As Gio's g_socket_connection_factory_register_type: higher layers register themselves.
_stream_makers: Final[dict[int, Callable[[trio.socket.SocketType], Any]]] = {}


def register_stream(
    family: int, make: Callable[[trio.socket.SocketType], trio.abc.HalfCloseableStream]
) -> None:
    """Have :func:`open_stream` make streams of an address family with ``make``."""
    _stream_makers[family] = make


def open_stream(fd: int) -> trio.abc.HalfCloseableStream:
    """Return a stream that owns ``fd``: a ``trio.SocketStream``, or what its family registered.

    Raises:
      WrongDescriptorKindError: not a connected stream socket.
    """
    sock = _stdlib_socket(fd, "a stream socket")
    kind = DescriptorKind.SOCKET
    try:
        if sock.type != stdlib_socket.SOCK_STREAM:
            name = getattr(sock.type, "name", sock.type)
            raise WrongDescriptorKindError(f"expected a stream socket, got a {name} socket", kind)
        try:
            sock.getpeername()
        except OSError as exc:
            raise WrongDescriptorKindError(
                f"expected a connected stream socket, got one that is not connected "
                f"({exc.strerror})",
                kind,
            ) from exc
        make = _stream_makers.get(sock.family, trio.SocketStream)
        stream: trio.abc.HalfCloseableStream = make(trio.socket.from_stdlib_socket(sock))
    except BaseException:
        sock.detach()
        raise
    return stream


def describe(*kinds: DescriptorKind) -> str:
    """Return kinds of file with their article, for an error message."""
    names = sorted(each.value for each in kinds)
    return " or ".join(f"{'an' if name.startswith('a') else 'a'} {name}" for name in names)


def _fcntl(fd: int, command: int) -> int:
    # Not on Windows, where descriptors are not passed either.
    import fcntl

    return fcntl.fcntl(fd, command)
