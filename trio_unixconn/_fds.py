"""Descriptors as callers give them: their numbers, and whether they are open.

The rule of this file: what is no descriptor is refused here, before anything is sent, and what
is one stays the caller's.

Sources: poll(2), https://docs.python.org/3/c-api/file.html
"""

from __future__ import annotations

import os
import select
import sys
from array import array
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_LARGEST_DESCRIPTOR: Final = 2**31 - 1
# Which byte of an int has its sign.
_SIGN: Final = 3 if sys.byteorder == "little" else 0


class HasFileno(Protocol):
    """Anything with a descriptor beneath: files, sockets, trio's sockets and files."""

    def fileno(self) -> int:
        """Return the descriptor's number."""
        ...


FileDescriptor: TypeAlias = "int | HasFileno"


def descriptor_number(fd: FileDescriptor) -> int:
    """Return the number of ``fd``, an int or anything with ``fileno()``.

    Whether the number is open the kernel says when it is sent (EBADF).

    Raises:
      TypeError: a bool, or neither an int nor an object with ``fileno()``.
      ValueError: a number that no descriptor can have, -1 (as of a closed socket) included;
        also from ``fileno()`` of a closed file.
    """
    if type(fd) is int and 0 <= fd <= _LARGEST_DESCRIPTOR:
        return fd
    number: object = fd
    if not isinstance(fd, int):
        fileno = getattr(fd, "fileno", None)
        if not callable(fileno):
            raise TypeError(
                "a descriptor is due: an int, or an object with fileno(), "
                f"not {type(fd).__name__} ({fd!r})"
            )
        number = fileno()
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(
            f"a descriptor is due: an int, or an object with fileno(), not {number!r}"
            + ("" if number is fd else f" as fileno() of {fd!r} returned")
        )
    if not 0 <= number <= _LARGEST_DESCRIPTOR:
        raise ValueError(
            f"no descriptor has the number {number}"
            + ("" if number is fd else f", which fileno() of {fd!r} returned: it is closed")
        )
    return int(number)


def none_negative(numbers: bytes) -> bool:
    """Whether none of these ints is negative: 0.2 us for 253 of them, where min() takes 3."""
    return numbers[_SIGN::4].isascii()


def descriptor_numbers(fds: Iterable[FileDescriptor], most: int | None) -> array[int]:
    """Return the numbers of ``fds``, each as :func:`descriptor_number`.

    Raises:
      TypeError, ValueError: not a descriptor, which says at which position; more than
        ``most``.
    """
    fds = list(fds)
    numbers: array[int] = array("i")
    # 253 ints in 9 us; one by one they take 31.
    if set(map(type, fds)) == {int}:
        try:  # noqa: SIM105 - on the path of every message
            numbers = array("i", fds)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        except OverflowError:
            # Which of them it is, is said below.
            pass
    if not numbers or not none_negative(numbers.tobytes()):
        numbers = array("i", _one_by_one(fds))
    if most is not None and len(numbers) > most:
        raise ValueError(
            f"one message carries at most {most} descriptors, not {len(numbers)}; send_fds() "
            "sends any number, in several messages"
        )
    return numbers


def _one_by_one(fds: list[FileDescriptor]) -> Iterator[int]:
    for position, fd in enumerate(fds):
        try:
            yield descriptor_number(fd)
        except (TypeError, ValueError) as exc:
            raise type(exc)(f"at position {position}: {exc}") from exc


def check_open(number: int) -> None:
    """Raise unless a descriptor is open.

    Raises:
      OSError: EBADF.
    """
    try:
        os.get_inheritable(number)
    except OSError as exc:
        raise OSError(exc.errno, f"descriptor {number} is closed; nothing was sent") from exc


def check_all_open(numbers: Sequence[int]) -> None:
    """Raise unless all of them are open; with one poll(2), where one by one takes a call each.

    Raises:
      OSError: EBADF.
    """
    poll = select.poll()
    for number in set(numbers):
        poll.register(number, 0)
    try:
        suspects: Sequence[int] = [number for number, _ in poll.poll(0)]
    except OSError:
        # More than RLIMIT_NOFILE, which may have been lowered since.
        suspects = numbers
    for number in suspects:
        check_open(number)
