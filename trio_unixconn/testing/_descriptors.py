"""The descriptors of this process: which are open, which leaked, how many there may be.

The rule of this file: looking changes nothing. A descriptor is the same as before when its
number is and the open file behind it is; the name of that file may have changed meanwhile.

macOS and the BSDs have no links to read, so there a descriptor is told by fstat(2). That way
is tested with a folder made by hand; nobody has run it on those systems.

Sources: proc_pid_fd(5), fdescfs(5), fstat(2), getrlimit(2)
"""

from __future__ import annotations

import errno
import gc
import os
import socket as stdlib_socket
import stat
import sys
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Final

import attrs

from .. import _closing
from .._fdtypes import kind_of
from ..errors import NotSupportedError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable
    from types import TracebackType

_FOLDERS: Final = ("/proc/self/fd", "/dev/fd")
# What the library is about to close is not leaked. In seconds.
_CLOSING_TIMEOUT: Final = 5.0


@attrs.frozen
class _Open:
    """An open file.

    Attributes:
      name: what a reader may know it by.
      identity: what no other file has while this one is open.
    """

    name: str = attrs.field(eq=False)
    identity: tuple[int | str, ...]


def open_descriptors() -> dict[int, str]:
    """Return the open descriptors of this process, and what each is open on.

    That is the path of a file, or ``socket:[...]`` with a number that no other socket has.

    Raises:
      NotSupportedError: the platform has neither ``/proc/self/fd`` nor ``/dev/fd``.

    Source: proc_pid_fd(5)
    """
    _closing.wait_closed(_CLOSING_TIMEOUT)
    return {fd: each.name for fd, each in _look().items()}


def _look() -> dict[int, _Open]:
    folder, numbers = _candidates()
    found: dict[int, _Open] = {}
    for fd in numbers:
        try:
            found[fd] = _look_at(fd, folder)
        except OSError:
            # That of the listing itself is closed by now.
            continue
    return found


def _candidates() -> tuple[str, Iterable[int]]:
    """Return the folder that tells of descriptors, and numbers that may be open."""
    for folder in _FOLDERS:
        try:
            names = os.listdir(folder)
        except OSError as exc:
            if exc.errno == errno.EMFILE:
                # Listing takes a descriptor. Without a free one, the limit is near.
                return folder, range(_limits()[0])
            continue
        return folder, sorted(int(name) for name in names if name.isdigit())
    raise NotSupportedError(
        f"{sys.platform} has neither {' nor '.join(_FOLDERS)}, so nobody can tell which "
        "descriptors are open"
    )


def _look_at(fd: int, folder: str) -> _Open:
    status = os.fstat(fd)
    try:
        name = os.readlink(f"{folder}/{fd}")
    except OSError:
        name = f"{kind_of(fd).value} (device {status.st_dev}, inode {status.st_ino})"
    # A path can change under an open file. Any other name tells what files without an inode
    # of their own are (epoll, eventfd).
    kept = "" if name.startswith("/") else name
    return _Open(name, (status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode), kept))


def _limits() -> tuple[int, int]:
    # Not on Windows, where nobody can tell which descriptors are open either.
    import resource  # noqa: PLC0415

    return resource.getrlimit(resource.RLIMIT_NOFILE)


@attrs.define
class _Guard(AbstractContextManager[None]):
    """The context manager of :func:`assert_no_fd_leak`."""

    _before: dict[int, _Open] = attrs.field(factory=dict[int, _Open])

    def __enter__(self) -> None:
        _closing.wait_closed(_CLOSING_TIMEOUT)
        self._before = _look()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A test runner's report ends at the user's own line.
        __tracebackhide__ = True
        _closing.wait_closed(_CLOSING_TIMEOUT)
        after = _look()
        if after != self._before:
            # What a reference circle still holds (a traceback, say) is not leaked.
            gc.collect()
            _closing.wait_closed(_CLOSING_TIMEOUT)
            after = _look()
        if after == self._before:
            return
        report = _difference(self._before, after)
        if exc is None:
            raise AssertionError(report)
        _add(exc, report)


def assert_no_fd_leak() -> AbstractContextManager[None]:
    """Assert that a block leaves open what was open before it, and nothing else.

    The block may await. What waits for the garbage collector is collected first. Other threads
    must not open or close anything meanwhile.

    Returns:
      A context manager, for one block. If the block raises, its exception goes on, and what
      leaked is in a note of it (before Python 3.11, at the end of its ``__context__``).

    Raises:
      AssertionError: at the end of the block: descriptors leaked (open only after it) or were
        lost (open only before it). It names each, and what it is open on.
      NotSupportedError: as :func:`open_descriptors`.
    """
    return _Guard()


def _difference(before: dict[int, _Open], after: dict[int, _Open]) -> str:
    leaked = [
        f"  leaked: {fd}, {each.name}{_socket_kind(fd)}"
        for fd, each in after.items()
        if before.get(fd) != each
    ]
    lost = [
        f"  lost: {fd}, which was {each.name}"
        for fd, each in before.items()
        if after.get(fd) != each
    ]
    return "\n".join(["the open descriptors are not those from before:", *leaked, *lost])


def _socket_kind(fd: int) -> str:
    try:
        sock = stdlib_socket.socket(fileno=fd)
    except OSError:
        # No socket, or one of a family that has no names.
        return ""
    try:
        return " ({}, {})".format(
            *(getattr(constant, "name", constant) for constant in (sock.family, sock.type))
        )
    finally:
        sock.detach()


def _add(exc: BaseException, report: str) -> None:
    """Have what is printed of ``exc`` contain ``report``."""
    if sys.version_info < (3, 11):
        first = exc
        while True:
            earlier = first.__cause__ or (None if first.__suppress_context__ else first.__context__)
            if earlier is None:
                break
            first = earlier
        first.__context__ = AssertionError(report)
        first.__suppress_context__ = False
    else:
        exc.add_note(report)


@contextmanager
def limit_descriptors(count: int) -> Generator[None, None, None]:
    """Let this process have only ``count`` more descriptors during a block.

    All threads share them, and a child process that is started meanwhile inherits the lowered
    limit: the soft one of ``RLIMIT_NOFILE``. After the block it is as before.

    Raises:
      ValueError: ``count`` is negative.
      OSError: EMFILE: fewer than ``count`` are free already.
      NotSupportedError: as :func:`open_descriptors`.

    Source: getrlimit(2)
    """
    if count < 0:
        raise ValueError(f"count must be at least 0, not {count}")
    top = max(open_descriptors(), default=-1) + 1 + count

    import resource  # noqa: PLC0415 - not on Windows

    soft, hard = _limits()
    if soft != resource.RLIM_INFINITY:
        top = min(top, soft)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
    try:
        _take_all(taken)
        if len(taken) < count:
            raise OSError(errno.EMFILE, f"only {len(taken)} descriptors are free, not {count}")
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


def _take_all(taken: list[int]) -> None:
    """Append descriptors until none is free."""
    while True:
        try:
            taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError as exc:
            if exc.errno == errno.EMFILE:
                return
            raise
