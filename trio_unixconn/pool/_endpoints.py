"""What can be submitted to a pool, and what a handler gets for it: two inverse functions.

Invariant: a file descriptor of which no stream or file can be made is closed.

Sources: socket(7) (SO_DOMAIN, SO_TYPE, SO_ACCEPTCONN), fcntl(2) (F_GETFL)
"""

from __future__ import annotations

import enum
import fcntl
import io
import os
import socket as stdlib_socket
import ssl
from functools import partial
from io import FileIO
from typing import IO, Any, Final

import trio

from .. import _kernel
from .._buffers import Buffer, bytes_of
from .._closing import close_fds
from .._connection import UnixConnection
from .._fds import check_open, fileno
from .._fdtypes import (
    DescriptorKind,
    is_memory,
    kind_of,
    open_checked_file,
    open_file_or_close,
    open_stream,
)
from .._file_thread import call_in_file_thread
from .._guards import check_handover
from .._receiver import RefusingReceiver
from .._sockopts import raw_socket
from ..errors import WrongDescriptorKindError
from . import _protocol


class EndpointKind(enum.IntEnum):
    """What the file descriptor of a job is, which says what its handler gets."""

    NONE = _protocol.NO_DESCRIPTOR
    TCP = 1
    TCP6 = 2
    UNIX = 3
    OTHER = 4
    UNIX_WITHOUT_DESCRIPTORS = 5


#: What can be submitted: a descriptor, or an object that owns one.
Submitted = Any

_FAMILIES: Final = {
    stdlib_socket.AF_INET: EndpointKind.TCP,
    stdlib_socket.AF_INET6: EndpointKind.TCP6,
    _kernel.AF_UNIX: EndpointKind.UNIX,
}
# What is neither read nor written.
_NO_FILES: Final = {
    DescriptorKind.DIRECTORY,
    DescriptorKind.SYMBOLIC_LINK,
    DescriptorKind.ANONYMOUS,
}
_O_PATH: Final[int] = getattr(os, "O_PATH", 0)
_FILES: Final = frozenset(DescriptorKind) - {DescriptorKind.SOCKET}
_MODES: Final = {os.O_RDONLY: "rb", os.O_WRONLY: "wb", os.O_RDWR: "r+b"}


def checked_data(data: Buffer) -> bytes:
    """Return the bytes that go with a job.

    Raises:
      TypeError, ValueError: no buffer, or more than MAX_DATA bytes.
    """
    with bytes_of(data) as view:
        if len(view) > _protocol.MAX_DATA:
            raise ValueError(
                f"data must be at most {_protocol.MAX_DATA} bytes, got {len(view)}; "
                "submit a sealed memfd instead"
            )
        return bytes(view)


async def detach_endpoint(what: Submitted) -> tuple[int, EndpointKind]:
    """Take a descriptor out of what was submitted, which is closed or detached by that.

    No file server is asked in the trio thread: a file is flushed and closed in another one. Only
    for a file this is a checkpoint. If it is cancelled while a file server does not answer, the
    file is closed nevertheless, in that thread.

    Returns:
      The descriptor, which the caller owns, and its kind.

    Raises:
      TypeError, ValueError, OSError, WrongDescriptorKindError: nothing that a handler can be
        given; it is as it was.
      ReadAheadError: a connection, or its socket, that has read messages ahead; likewise.
    """
    if isinstance(what, UnixConnection):
        refuses = isinstance(what._receiver, RefusingReceiver)  # noqa: SLF001 - of one package
        return (
            what.detach(),
            EndpointKind.UNIX_WITHOUT_DESCRIPTORS if refuses else EndpointKind.UNIX,
        )
    if isinstance(what, trio.SocketStream):
        what = what.socket
    if isinstance(what, trio.socket.SocketType):
        raw = raw_socket(what)
        kind = _kind_of(raw.fileno())
        trio.lowlevel.notify_closing(raw)
        return what.detach(), kind
    if isinstance(what, ssl.SSLSocket):
        raise TypeError(
            "an SSLSocket cannot be handed over: what it knows of the encryption is in this "
            "process; submit the plain socket, and have the handler wrap it"
        )
    if isinstance(what, stdlib_socket.socket):
        kind = _kind_of(what.fileno())
        return what.detach(), kind
    number = fileno(what)
    check_open([number])
    kind = _kind_of(number)
    if isinstance(what, int):
        return number, kind
    if not callable(getattr(what, "close", None)):
        raise TypeError(
            f"the pool takes ownership, and {type(what).__name__} has no close(); submit a "
            "duplicate of its file descriptor (os.dup)"
        )
    if is_memory(number):
        return _out_of_file(what, number), kind
    return await call_in_file_thread(
        partial(_out_of_file, what, number), discard=lambda fd: close_fds([fd])
    ), kind


def _out_of_file(what: Any, number: int) -> int:
    """Duplicate the descriptor of an object, and close the object."""
    if isinstance(what, (io.BufferedIOBase, io.TextIOBase)):
        # What is in its buffer belongs in front of what the worker writes.
        what.flush()
    fd = os.dup(number)
    try:
        what.close()
    except BaseException:
        close_fds([fd])
        raise
    return fd


def _kind_of(fd: int) -> EndpointKind:
    if fd < 0:
        raise ValueError("a descriptor that is open is due, but this one is closed")
    check_handover([fd])
    kind = kind_of(fd)
    if kind is DescriptorKind.SOCKET:
        return _kind_of_socket(fd, kind)
    if kind in _NO_FILES:
        raise WrongDescriptorKindError(
            f"a stream socket, or a file to read or write, is due; a {kind.value} is neither", kind
        )
    if fcntl.fcntl(fd, fcntl.F_GETFL) & _O_PATH:
        raise WrongDescriptorKindError(
            f"a file to read or write is due; this {kind.value} was opened only as a path (O_PATH)",
            kind,
        )
    return EndpointKind.OTHER


def _kind_of_socket(fd: int, kind: DescriptorKind) -> EndpointKind:
    sock = stdlib_socket.socket(fileno=fd)
    try:
        if sock.type != stdlib_socket.SOCK_STREAM:
            raise WrongDescriptorKindError("a stream socket is due, not one of another type", kind)
        option = _kernel.SO_ACCEPTCONN
        if option is not None and sock.getsockopt(_kernel.SOL_SOCKET, option):
            raise WrongDescriptorKindError(
                "a connected socket is due, but this one listens; submit what it accepts", kind
            )
        return _FAMILIES.get(sock.family, EndpointKind.OTHER)
    finally:
        sock.detach()


async def attach_endpoint(kind: int, fd: int) -> trio.abc.HalfCloseableStream | IO[bytes] | FileIO:
    """Return a stream or file that owns ``fd``. Only for a file this is a checkpoint.

    Raises:
      OSError, WrongDescriptorKindError: nothing can be made of it; it is closed.
    """
    try:
        if kind in (EndpointKind.TCP, EndpointKind.TCP6):
            # Told what it is, Python need not ask the kernel; trio sets TCP_NODELAY.
            family = stdlib_socket.AF_INET if kind == EndpointKind.TCP else stdlib_socket.AF_INET6
            sock = stdlib_socket.socket(
                family, stdlib_socket.SOCK_STREAM, stdlib_socket.IPPROTO_TCP, fileno=fd
            )
            return trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        if kind == EndpointKind.UNIX_WITHOUT_DESCRIPTORS:
            return UnixConnection.from_fd(fd, receive_descriptors=False)
        if kind == EndpointKind.UNIX or kind_of(fd) is DescriptorKind.SOCKET:
            return open_stream(fd)
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    except BaseException:
        close_fds([fd])
        raise
    return await open_file_or_close(fd, _MODES[access], _FILES, open_checked=_open_file)


def _open_file(fd: int, mode: str, kind: DescriptorKind) -> IO[Any]:
    if mode == "r+b" and not _has_position(fd):
        # One buffer for both is for what can be rewound: no terminal, no pipe.
        return open(fd, mode, buffering=0)
    return open_checked_file(fd, mode, kind)


def _has_position(fd: int) -> bool:
    try:
        os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        return False
    return True
