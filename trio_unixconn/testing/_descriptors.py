"""The file descriptors of this process: which are open, which leaked, how many are free.

Invariant: listing changes nothing and asks no file server. A descriptor is the same as before if
its number and its open file are the same; the name of that file may have changed.

macOS and the BSDs have no links to read, so there fstat(2) identifies a descriptor. That way is
tested with a directory made by hand; it has not been run on those systems.

Sources: proc_pid_fd(5), fdescfs(5), statx(2), getrlimit(2)
"""

from __future__ import annotations

import errno
import gc
import os
import socket as stdlib_socket
import sys
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Final

import attrs

from .. import _closing
from .._address import escaped
from .._fdtypes import identify_file, kind_of
from ..errors import NotSupportedError

_DIRECTORIES: Final = ("/proc/self/fd", "/dev/fd")
# How long to wait for the library to close what it has queued, in seconds.
_CLOSING_TIMEOUT: Final = 5.0
# How many descriptors the first line of a report names.
_MOST_NAMED: Final = 8


@attrs.frozen
class _Open:
    """An open file.

    Attributes:
      name: its path or type, for the report.
      identity: no other file has the same while this one is open.
    """

    name: str = attrs.field(eq=False)
    identity: tuple[int | str, ...]


def open_descriptors() -> dict[int, str]:
    """Return the open file descriptors of this process, each with a description of its file.

    That is the path of a file, or ``socket:[...]`` with a number that no other socket has. No
    file server is asked, so this returns even if one does not answer.

    Raises:
      NotSupportedError: the platform has neither ``/proc/self/fd`` nor ``/dev/fd``.

    Source: proc_pid_fd(5)
    """
    _closing.wait_closed(_CLOSING_TIMEOUT)
    return {fd: each.name for fd, each in _look().items()}


def _look() -> dict[int, _Open]:
    directory, numbers = _candidates()
    found: dict[int, _Open] = {}
    for fd in numbers:
        try:
            found[fd] = _look_at(fd, directory)
        except OSError:
            # The descriptor of the listing itself is closed by now.
            continue
    return found


def _candidates() -> tuple[str, Iterable[int]]:
    """Return the directory that lists descriptors, and numbers that may be open."""
    for directory in _DIRECTORIES:
        try:
            names = os.listdir(directory)
        except OSError as exc:
            if exc.errno == errno.EMFILE:
                # Listing takes a descriptor. Without a free one, the limit is near.
                return directory, range(_limits()[0])
            continue
        return directory, sorted(int(name) for name in names if name.isdigit())
    raise NotSupportedError(
        f"cannot list open file descriptors: {sys.platform} has neither "
        f"{' nor '.join(_DIRECTORIES)}"
    )


def _look_at(fd: int, directory: str) -> _Open:
    file = identify_file(fd)
    try:
        name = os.readlink(f"{directory}/{fd}")
    except OSError:
        name = f"{kind_of(fd).value} (device {file.device}, inode {file.inode})"
    # The path of an open file can change. Any other name identifies files without an inode of
    # their own (epoll, eventfd).
    kept = "" if name.startswith("/") else name
    return _Open(name, (*file, kept))


def _limits() -> tuple[int, int]:
    # Not on Windows, where open descriptors cannot be listed either.
    import resource

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
            # A descriptor that a reference cycle still holds (a traceback, say) is not leaked.
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
    """Assert that the same descriptors are open after a block as before it.

    The block may await. Garbage is collected before a leak is reported. Other threads must not
    open or close anything in that time.

    Returns:
      A context manager, for one block. If the block raises, its exception is propagated, with the
      report in a note (before Python 3.11, at the end of its ``__context__``).

    Raises:
      AssertionError: at the end of the block: descriptors leaked (open only after it) or were
        lost (open only before it). It begins with "leaked 2 file descriptors: 19 (pipe), ...",
        and has a line for each, with its file.
      NotSupportedError: as :func:`open_descriptors`.
    """
    return _Guard()


def _difference(before: dict[int, _Open], after: dict[int, _Open]) -> str:
    parts = [
        _part("leaked", {fd: each for fd, each in after.items() if before.get(fd) != each}, after),
        _part("lost", {fd: each for fd, each in before.items() if after.get(fd) != each}, after),
    ]
    found = [part for part in parts if part[0]]
    return "\n".join(["; ".join(first for first, _ in found), *(rest for _, rest in found)])


def _part(verb: str, fds: dict[int, _Open], now: dict[int, _Open]) -> tuple[str, str]:
    """Return the first words of a report, and a line for each descriptor."""
    if not fds:
        return "", ""
    named = [f"{fd} ({_kind(each)})" for fd, each in fds.items()]
    if len(named) > _MOST_NAMED:
        named[_MOST_NAMED:] = ["..."]
    lines = [
        f"  {verb}: {fd}, {escaped(each.name)}{_socket_kind(fd) if now.get(fd) == each else ''}"
        for fd, each in fds.items()
    ]
    plural = "" if len(fds) == 1 else "s"
    first = f"{verb} {len(fds)} file descriptor{plural}: {', '.join(named)}"
    return first, "\n".join(lines)


def _kind(file: _Open) -> str:
    """Return what a file is, in a word: ``pipe``, ``eventfd``, or its path."""
    # The kernel names them pipe:[4711], anon_inode:[eventfd] or anon_inode:inotify.
    scheme, _, rest = file.name.partition(":")
    if file.name.startswith("/"):
        return escaped(file.name)
    return escaped(rest.strip("[]") if scheme == "anon_inode" else scheme)


def _socket_kind(fd: int) -> str:
    try:
        sock = stdlib_socket.socket(fileno=fd)
    except OSError:
        # Not a socket, or one of a family that has no names.
        return ""
    try:
        return " ({}, {})".format(
            *(getattr(constant, "name", constant) for constant in (sock.family, sock.type))
        )
    finally:
        sock.detach()


def _add(exc: BaseException, report: str) -> None:
    """Add ``report`` to the text that is printed for ``exc``."""
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
    """Leave only ``count`` descriptors free in this process during a block.

    All threads share them, and a child process that is started in that time inherits the lowered
    limit: the soft one of ``RLIMIT_NOFILE``. After the block it is restored.

    Raises:
      ValueError: ``count`` is negative.
      OSError: EMFILE: fewer than ``count`` are free already.
      NotSupportedError: as :func:`open_descriptors`.

    Source: getrlimit(2)
    """
    if count < 0:
        raise ValueError(f"count must be non-negative, got {count}")
    top = max(open_descriptors(), default=-1) + 1 + count

    import resource  # not on Windows

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
