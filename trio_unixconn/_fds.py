"""File descriptors as callers pass them: ints, or objects that own one.

Invariant: a number that is returned here is valid for as long as the caller keeps the object that
it was taken from, and the caller's object is never changed.

Sources: fcntl(2) (F_GETFD), https://docs.python.org/3/c-api/file.html
"""

from __future__ import annotations

import errno
import os
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from operator import countOf
from typing import Final, Protocol, TypeAlias

import trio

from . import _closing
from ._guards import check_handover, guards
from .errors import SendError

_EXPECTED: Final = "expected a file descriptor (an int or an object with a fileno() method)"
_LISTS: Final = frozenset({list, tuple})
_MAX_FD: Final = 2**31 - 1
# The byte of a native int that has its sign bit.
SIGN_BYTE: Final = 3 if sys.byteorder == "little" else 0


class HasFileno(Protocol):
    """An object with a file descriptor: files, sockets, trio's files and sockets."""

    def fileno(self) -> int:
        """Return the number of the file descriptor."""
        ...


class HasSocket(Protocol):
    """An object that owns a trio socket: ``trio.SocketStream``, ``trio.SocketListener``."""

    @property
    def socket(self) -> trio.socket.SocketType:
        """The socket."""
        ...


FileDescriptor: TypeAlias = int | HasFileno | HasSocket


def fileno(fd: FileDescriptor) -> int:
    """Return the number of ``fd``, which stays the caller's.

    The number can mean another file as soon as ``fd`` is closed or garbage collected: keep a
    reference to ``fd`` while the number is in use. Whether an int is open is not checked.

    Raises:
      TypeError: neither an int nor an object that has a file descriptor; bool is rejected.
      ValueError: a number that no file descriptor can have. The number of a closed socket is -1;
        ``fileno()`` of a closed file raises this, too.
      ReadAheadError: the socket of a connection that has read messages ahead.
    """
    if type(fd) is int and 0 <= fd <= _MAX_FD and fd not in guards:
        return fd
    number: object = fd
    if not isinstance(fd, int):
        method = getattr(fd, "fileno", None)
        if not callable(method):
            owned = getattr(fd, "socket", None)
            if not isinstance(owned, trio.socket.SocketType):
                raise TypeError(f"{_EXPECTED}, got {type(fd).__name__}")
            method = owned.fileno
        number = method()
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"{_EXPECTED}, got {type(number).__name__}{_origin(fd, number)}")
    if number < 0:
        raise ValueError(
            f"file descriptor cannot be a negative integer ({number}){_origin(fd, number)}"
        )
    if number > _MAX_FD:
        raise ValueError(f"file descriptor is out of range ({number}){_origin(fd, number)}")
    # The trio thread may remove it while another thread is here.
    check = guards.get(number)
    if check is not None:
        check()
    return int(number)


def _origin(fd: object, number: object) -> str:
    """Say which object a number is from, for an error message."""
    if number is fd:
        return ""
    closed = "; it is closed" if number == -1 else ""
    return f" from fileno() of {type(fd).__name__}{closed}"


def filenos(
    fds: Iterable[FileDescriptor], max_fds: int | None = None
) -> tuple[array[int], Sequence[FileDescriptor]]:
    """Return the numbers of ``fds``, together with the objects that own them.

    Keep the objects while the numbers are in use: nothing else references those of a generator,
    or of ``map(open, paths)``, and they close their file descriptors when they are garbage
    collected.

    Raises:
      TypeError: as :func:`fileno`, with the position; or not an iterable.
      ValueError: as :func:`fileno`, with the position; or more than ``max_fds``.
      ReadAheadError: as :func:`fileno`.
    """
    owners: Sequence[FileDescriptor] = fds if type(fds) in _LISTS else _listed(fds)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    numbers: array[int] = array("i")
    # 253 ints in 9 us; one by one they take 31 us.
    if countOf(map(type, owners), int) == len(owners):
        try:  # on the path of every message
            numbers = array("i", owners)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
        except OverflowError:
            # _one_by_one() says which one it is.
            pass
    if not numbers or not numbers.tobytes()[SIGN_BYTE::4].isascii():
        # A copy, because the caller can change a list of objects while they are sent.
        owners = list(owners)
        numbers = array("i", _one_by_one(owners))
    if max_fds is not None and len(numbers) > max_fds:
        raise ValueError(
            f"fds: expected at most {max_fds} file descriptors for one message, got "
            f"{len(numbers)}; send_fds() sends any number, in several messages"
        )
    if guards:
        check_handover(numbers)
    return numbers, owners


def _listed(fds: Iterable[FileDescriptor]) -> list[FileDescriptor]:
    if isinstance(fds, (str, bytes, bytearray, memoryview)) or hasattr(fds, "fileno"):
        # Iterating bytes gives ints, which would be taken for file descriptors, and iterating a
        # file reads from it.
        raise TypeError(_not_iterable(fds))
    try:
        return list(fds)
    except TypeError:
        if hasattr(fds, "__iter__"):
            # The generator itself has raised.
            raise
        raise TypeError(_not_iterable(fds)) from None


def _not_iterable(fds: object) -> str:
    return f"fds must be an iterable of file descriptors, got {type(fds).__name__}"


def _one_by_one(fds: list[FileDescriptor]) -> Iterator[int]:
    for position, fd in enumerate(fds):
        try:
            yield fileno(fd)
        except (TypeError, ValueError) as exc:
            kind = TypeError if isinstance(exc, TypeError) else ValueError
            raise kind(f"fds[{position}]: {exc}") from exc


def none_negative(numbers: bytes) -> bool:
    """Whether none of these native ints is negative: 0.2 us for 253, where min() takes 3 us."""
    return numbers[SIGN_BYTE::4].isascii()


def check_open(numbers: Iterable[int]) -> None:
    """Raise unless all file descriptors are open.

    This asks with F_GETFD, which never blocks. poll(2) and fstat(2) ask the file itself, and a
    FUSE file waits for its server, which may never answer.

    Raises:
      SendError: EBADF.
    """
    get_inheritable, number = os.get_inheritable, -1
    try:
        for number in set(numbers):
            # It calls fcntl(F_GETFD).
            get_inheritable(number)
    except OSError as exc:
        raise SendError(
            errno.EBADF, f"file descriptor {number} is closed; nothing was sent"
        ) from exc


def duplicate(numbers: Iterable[int]) -> tuple[array[int], list[int]]:
    """Duplicate file descriptors; one that is there several times is duplicated once.

    Returns:
      The duplicates, in the order of ``numbers``, and a list with each of them once, which
      the caller owns; close them with :func:`._closing.close_fds`.

    Raises:
      OSError: EBADF, EMFILE; nothing stays open.
    """
    copies: dict[int, int] = {}
    try:
        for number in numbers:
            if number not in copies:
                copies[number] = os.dup(number)
    except OSError:
        _closing.close_fds(copies.values())
        raise
    return array("i", map(copies.__getitem__, numbers)), list(copies.values())
