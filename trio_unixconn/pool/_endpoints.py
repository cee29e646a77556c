"""Streams and files on their way to a worker: detached from a program, attached in another.

A program submits a socket, stream, connection or file. ``detach_endpoint`` takes the file
descriptor out of it, and says what it is. In the worker, ``attach_socket`` or ``attach_other``
makes a stream or file of the two again.

Invariant: a file descriptor of which no stream or file can be made is closed.

Sources: socket(7) (SO_DOMAIN, SO_TYPE, SO_ACCEPTCONN), fcntl(2) (F_GETFL), poll(2) (POLLRDHUP)
"""

from __future__ import annotations

import enum
import errno
import fcntl
import io
import os
import select
import socket as stdlib_socket
import ssl
import struct
from functools import partial
from io import FileIO
from typing import IO, Any, Final, Protocol, TypeAlias

import trio

from .. import _kernel
from .._buffers import Buffer, bytes_of
from .._closing import close_fds
from .._connection import UnixConnection, accepts_descriptors
from .._fds import check_open, fileno
from .._fdtypes import (
    DescriptorKind,
    describe,
    is_memory,
    kind_of,
    open_checked_file,
    open_file_or_close,
    open_stream,
)
from .._file_thread import call_in_file_thread
from .._guards import check_handover
from .._sockopts import can_linger, raw_socket
from ..errors import WrongDescriptorKindError
from . import _protocol


class EndpointKind(enum.IntEnum):
    """The kind of a job's file descriptor, which decides what object a handler gets."""

    #: There is none: the handler gets None.
    NONE = _protocol.NO_DESCRIPTOR
    #: A TCP socket of IPv4, without SO_LINGER.
    TCP = 1
    #: A TCP socket of IPv6, without SO_LINGER.
    TCP6 = 2
    #: A Unix stream socket.
    UNIX = 3
    #: Any other stream socket, or a file.
    OTHER = 4
    #: A Unix stream socket that must not receive file descriptors.
    UNIX_WITHOUT_DESCRIPTORS = 5


#: Kinds of which every file descriptor is a connection.
CONNECTIONS: Final = frozenset(
    {
        EndpointKind.TCP,
        EndpointKind.TCP6,
        EndpointKind.UNIX,
        EndpointKind.UNIX_WITHOUT_DESCRIPTORS,
    }
)


class ClosableFile(Protocol):
    """An object that owns a file descriptor: a Python file, or one that behaves like it."""

    def fileno(self) -> int:
        """Return the file descriptor."""
        ...

    def close(self) -> object:
        """Close the file."""
        ...


#: What can be submitted to a pool: a file descriptor, or an object that owns one.
Submittable: TypeAlias = (
    int
    | UnixConnection
    | trio.SocketStream
    | trio.socket.SocketType
    | stdlib_socket.socket
    | ClosableFile
)

_FAMILIES: Final = {
    stdlib_socket.AF_INET: EndpointKind.TCP,
    stdlib_socket.AF_INET6: EndpointKind.TCP6,
    _kernel.AF_UNIX: EndpointKind.UNIX,
}
# Before Python 3.12, each access to a member of an enum takes 0.1 us.
_TCP: Final = EndpointKind.TCP
_TCP6: Final = EndpointKind.TCP6
# The address; and what follows it: the port, the flow label and the scope.
_ipv4: Final = struct.Struct("!I")
_ipv6: Final = struct.Struct("!HII")
# Packed addresses of IPv6 are larger, those of IPv4 smaller.
_IPV6: Final = 1 << 64
_TCP_FAMILIES: Final[dict[int, int]] = {
    EndpointKind.TCP: stdlib_socket.AF_INET,
    EndpointKind.TCP6: stdlib_socket.AF_INET6,
}
# Files that can be neither read nor written.
_NO_FILES: Final = {
    DescriptorKind.DIRECTORY,
    DescriptorKind.SYMBOLIC_LINK,
    DescriptorKind.ANONYMOUS,
}
_O_PATH: Final[int] = getattr(os, "O_PATH", 0)
_FILES: Final = frozenset(DescriptorKind) - {DescriptorKind.SOCKET}
_MODES: Final = {os.O_RDONLY: "rb", os.O_WRONLY: "wb", os.O_RDWR: "r+b"}


def checked_data(data: Buffer) -> bytes:
    """Return the bytes that travel with a job.

    Raises:
      TypeError: not a contiguous buffer.
      ValueError: more than MAX_DATA bytes.
    """
    with bytes_of(data) as view:
        if len(view) > _protocol.MAX_DATA:
            raise ValueError(
                f"data must be at most {_protocol.MAX_DATA} bytes, got {len(view)}; "
                "submit a sealed memfd instead"
            )
        return bytes(view)


async def detach_endpoint(source: Submittable) -> tuple[int, EndpointKind]:
    """Take the file descriptor out of ``source``, which is closed or detached by that.

    No file server is asked in the trio thread: a file is flushed and closed in another one. This
    is a checkpoint only for a file. If it is cancelled while a file server does not answer, the
    file is closed nevertheless, in that thread.

    Returns:
      The file descriptor, which the caller owns, and its kind.

    Raises:
      TypeError: not a file descriptor, nor an object that owns one; it is unchanged.
      ValueError: a socket or file that is closed; it is unchanged.
      OSError: EBADF, a number that is not open; or flushing a file has failed.
      WrongDescriptorKindError: of a kind that no handler can get; it is unchanged.
      ReadAheadError: a connection, or its socket, that has read messages ahead; likewise.
    """
    if isinstance(source, UnixConnection):
        accepts = accepts_descriptors(source)
        kind = EndpointKind.UNIX if accepts else EndpointKind.UNIX_WITHOUT_DESCRIPTORS
        return source.detach(), kind
    if isinstance(source, trio.SocketStream):
        source = source.socket
    if isinstance(source, trio.socket.SocketType):
        raw = raw_socket(source)
        kind = _kind_of(raw.fileno())
        trio.lowlevel.notify_closing(raw)
        return source.detach(), kind
    if isinstance(source, ssl.SSLSocket):
        raise TypeError(
            "cannot submit an SSLSocket: the state of its encryption is in this process; submit "
            "the plain socket, and wrap it in the handler"
        )
    if isinstance(source, stdlib_socket.socket):
        kind = _kind_of(source.fileno())
        return source.detach(), kind
    fd = fileno(source)
    check_open([fd])
    kind = _kind_of(fd)
    if isinstance(source, int):
        return fd, kind
    if not callable(getattr(source, "close", None)):
        raise TypeError(
            "the pool takes ownership of the file descriptor, but "
            f"{type(source).__name__} has no close() method; submit a duplicate (os.dup)"
        )
    if is_memory(fd):
        return _duplicate_and_close(source, fd), kind
    return await call_in_file_thread(
        partial(_duplicate_and_close, source, fd), discard=lambda copy: close_fds([copy])
    ), kind


def _duplicate_and_close(file: ClosableFile, fd: int) -> int:
    """Return a duplicate of the file descriptor of an object, which is closed."""
    if isinstance(file, (io.BufferedIOBase, io.TextIOBase)):
        # What is in its buffer belongs before what the worker writes.
        file.flush()
    copy = os.dup(fd)
    try:
        file.close()
    except BaseException:
        close_fds([copy])
        raise
    return copy


def _kind_of(fd: int) -> EndpointKind:
    if fd < 0:
        raise ValueError("expected an open socket, got a closed one")
    check_handover([fd])
    kind = kind_of(fd)
    if kind is DescriptorKind.SOCKET:
        return _kind_of_socket(fd)
    if kind in _NO_FILES:
        raise WrongDescriptorKindError(
            f"expected a stream socket, or a file to read or write, got {describe(kind)}", kind
        )
    if fcntl.fcntl(fd, fcntl.F_GETFL) & _O_PATH:
        raise WrongDescriptorKindError(
            f"expected a file open for reading or writing, got {describe(kind)} opened with O_PATH",
            kind,
        )
    return EndpointKind.OTHER


def _kind_of_socket(fd: int) -> EndpointKind:
    kind = DescriptorKind.SOCKET
    sock = stdlib_socket.socket(fileno=fd)
    try:
        if sock.type != stdlib_socket.SOCK_STREAM:
            name = getattr(sock.type, "name", sock.type)
            raise WrongDescriptorKindError(f"expected a stream socket, got a {name} socket", kind)
        option = _kernel.SO_ACCEPTCONN
        if option is not None and sock.getsockopt(_kernel.SOL_SOCKET, option):
            raise WrongDescriptorKindError(
                "expected a connected socket, got a listening one; submit the connections that it "
                "accepts",
                kind,
            )
        if _is_unconnected(sock):
            raise WrongDescriptorKindError(
                "expected a connected socket, got one that is not connected; connect it first",
                kind,
            )
        # close(2) of such a socket can block, as that of a file.
        if can_linger(sock):
            return EndpointKind.OTHER
        return _FAMILIES.get(sock.family, EndpointKind.OTHER)
    finally:
        sock.detach()


def _is_unconnected(sock: stdlib_socket.socket) -> bool:
    """Whether a socket was never connected.

    A peer can reset its TCP connection at any time, and getpeername(2) then answers as if it had
    never been there. That is for the handler to find out: it must not make ``submit`` fail, which
    an accept loop calls. But only a socket that was never connected has no end of the stream.
    """
    if sock.family not in _FAMILIES or _kernel.POLLRDHUP is None:
        return False
    try:
        sock.getpeername()
    except OSError as exc:
        if exc.errno != errno.ENOTCONN:
            raise
        poll = select.poll()
        poll.register(sock, _kernel.POLLRDHUP)
        return not any(events & _kernel.POLLRDHUP for _, events in poll.poll(0))
    return False


def kind_of_passed(kind: int, fd: int) -> EndpointKind | None:
    """Return what a connection is that a handler has passed on; None if it is something else.

    The kernel answers this without a file server, whatever the file descriptor is.

    Args:
      kind: what the connection was when the handler got it.
    """
    try:
        found = _kind_of_socket(fd)
    except (OSError, WrongDescriptorKindError):
        return None
    if found == EndpointKind.OTHER and kind != EndpointKind.UNIX_WITHOUT_DESCRIPTORS:
        # The handler has set SO_LINGER, or it was such a socket before.
        return found
    if kind == EndpointKind.UNIX_WITHOUT_DESCRIPTORS:
        is_unix = _family(fd) == _kernel.AF_UNIX
        return EndpointKind.UNIX_WITHOUT_DESCRIPTORS if is_unix else None
    return found if found == kind else None


def kind_of_received(fd: int, *, accepts_descriptors: bool) -> EndpointKind | None:
    """Return what a connection is that another generation has passed on; None if it is none."""
    try:
        found = _kind_of_socket(fd)
    except (OSError, WrongDescriptorKindError):
        return None
    return found if accepts_descriptors else EndpointKind.UNIX_WITHOUT_DESCRIPTORS


def _family(fd: int) -> int:
    sock = stdlib_socket.socket(fileno=fd)
    try:
        return sock.family
    finally:
        sock.detach()


def local_name(fd: int) -> Any:
    """Return the name of a socket; None for a file that is not a socket, or for -1."""
    try:
        sock = stdlib_socket.socket(fileno=fd)
    except (OSError, ValueError):
        return None
    try:
        return sock.getsockname()
    finally:
        sock.detach()


def peer_name(fd: int) -> Any:
    """Return the name of a connection's peer, as accept(2) does; None if the peer is gone."""
    sock = stdlib_socket.socket(fileno=fd)
    try:
        return sock.getpeername()
    except OSError:
        return None
    finally:
        sock.detach()


def pack_peer(kind: EndpointKind, name: Any) -> Any:
    """Return the address of a peer, as accept(2) has returned it, in less memory.

    A pool has one for each job in flight, until it is known that its worker does not die. An IPv4
    address takes 32 bytes in place of 176.
    """
    if kind is _TCP:
        return _ipv4.unpack(stdlib_socket.inet_aton(name[0]))[0] << 16 | name[1]
    if kind is _TCP6:
        host, *rest = name
        data = b"\1" + stdlib_socket.inet_pton(stdlib_socket.AF_INET6, host) + _ipv6.pack(*rest)
        return int.from_bytes(data, "big")
    return name


def unpack_peer(packed: Any) -> Any:
    """Return the address that :func:`pack_peer` was given, or an address that was not packed."""
    if not isinstance(packed, int):
        return packed
    if packed < _IPV6:
        return stdlib_socket.inet_ntoa(_ipv4.pack(packed >> 16)), packed & 0xFFFF
    data = packed.to_bytes(1 + 16 + _ipv6.size, "big")
    host = stdlib_socket.inet_ntop(stdlib_socket.AF_INET6, data[1:17])
    return (host, *_ipv6.unpack_from(data, 17))


def attach_socket(kind: int, fd: int) -> trio.abc.HalfCloseableStream | None:
    """Return a stream that owns ``fd``; None for a file, which :func:`attach_other` opens.

    Nothing here waits for a peer: making a stream asks the kernel for the names of the socket.

    Raises:
      OSError: no stream can be made of it; it is closed.
      WrongDescriptorKindError: likewise.
    """
    try:
        family = _TCP_FAMILIES.get(kind)
        if family is not None:
            # Python asks the kernel for what it is not told. trio sets TCP_NODELAY.
            sock = stdlib_socket.socket(
                family, stdlib_socket.SOCK_STREAM, stdlib_socket.IPPROTO_TCP, fileno=fd
            )
            return trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        if kind == EndpointKind.UNIX_WITHOUT_DESCRIPTORS:
            return UnixConnection.from_fd(fd, receive_descriptors=False)
        if kind == EndpointKind.UNIX or kind_of(fd) is DescriptorKind.SOCKET:
            return open_stream(fd)
    except BaseException:
        close_fds([fd])
        raise
    return None


async def attach_other(fd: int) -> IO[bytes] | FileIO:
    """Return a file that owns ``fd``, opened in a thread, because it can have a file server.

    Raises:
      OSError: it cannot be opened; it is closed.
      WrongDescriptorKindError: likewise.
    """
    access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    return await open_file_or_close(fd, _MODES[access], _FILES, open_checked=_open_file)


def _open_file(fd: int, mode: str, kind: DescriptorKind) -> IO[Any]:
    if mode == "r+b" and not _has_position(fd):
        # One buffer for both directions needs a position: a terminal or a pipe has none.
        return open(fd, mode, buffering=0)
    return open_checked_file(fd, mode, kind)


def _has_position(fd: int) -> bool:
    try:
        os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        return False
    return True
