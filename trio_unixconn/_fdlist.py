"""UnixFDList: who owns which descriptor.

The rule of this file: a descriptor in a list is closed by the list, unless somebody has taken
it out; there is no third way.

Source: https://docs.gtk.org/gio-unix/class.FDList.html
"""

from __future__ import annotations

import operator
import os
import warnings
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, Final, SupportsIndex

from ._fdtypes import DescriptorKind, check_mode, kind_of, open_file, open_socket, open_stream
from ._owner import DescriptorOwner

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from types import TracebackType

    import trio
    from typing_extensions import Self

_TAKEN: Final = -1


class UnixFDList(DescriptorOwner):
    """A list that owns its descriptors, as ``Gio.UnixFDList``.

    It closes them at the end of a ``with`` block, in :meth:`close`, or when it is collected;
    that last way with a ResourceWarning, which names the place where the list was made when
    tracemalloc is on. Positions are stable: taking out a descriptor leaves a gap, and the
    length stays. Iterating gives the numbers that are still there; they stay the list's.

    Args:
      fds: descriptors that the list owns from now on.

    Raises:
      TypeError, ValueError: one of them is no descriptor; then none is owned.
    """

    __slots__ = ("__weakref__", "_fds", "_gaps")

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self._fds: list[int] = []
        # Whether any was taken out, so that nobody has to look for that in all.
        self._gaps = False
        self._fds = [_number(fd) for fd in fds]

    @classmethod
    def new_from_array(cls, fds: Iterable[int]) -> UnixFDList:
        """Make a list that owns ``fds``; Gio's name for the constructor."""
        return cls(fds)

    @classmethod
    def owning(cls, fds: list[int]) -> UnixFDList:
        """Make a list that owns what the kernel has given, and keeps that list."""
        fd_list = cls.__new__(cls)
        fd_list._fds = fds  # noqa: SLF001 - its own class
        fd_list._gaps = False  # noqa: SLF001 - its own class
        return fd_list

    def append(self, fd: int) -> int:
        """Add a duplicate of ``fd``, which stays the caller's.

        Returns:
          Its position.

        Raises:
          TypeError, ValueError: not a descriptor.
          OSError: EBADF or EMFILE.
        """
        self._fds.append(os.dup(_number(fd)))
        return len(self._fds) - 1

    def get(self, index: int) -> int:
        """Return a duplicate of the descriptor at ``index``, which the caller owns.

        Raises:
          IndexError: no such position.
          ValueError: it was taken.
          OSError: EMFILE.
        """
        return os.dup(self[index])

    def get_length(self) -> int:
        """Return the number of positions."""
        return len(self._fds)

    def peek_fds(self) -> list[int]:
        """Return the numbers of the descriptors that are still there; they stay the list's."""
        return list(self)

    def steal_fds(self) -> list[int]:
        """Take out all descriptors that are still there, and leave the list empty.

        Returns:
          Descriptors that the caller owns.
        """
        fds, self._fds = self._fds, []
        gaps, self._gaps = self._gaps, False
        return [fd for fd in fds if fd != _TAKEN] if gaps else fds

    def take(self, index: SupportsIndex) -> int:
        """Take out one descriptor, which the caller owns from now on.

        Raises:
          IndexError: no such position.
          ValueError: it was taken before.
        """
        fd = self[index]
        self._leave_gap(index)
        return fd

    def take_file(
        self,
        index: SupportsIndex,
        mode: str = "rb",
        *,
        kinds: Collection[DescriptorKind] = (DescriptorKind.REGULAR_FILE,),
    ) -> IO[Any]:
        """Take out one descriptor as an open file.

        Args:
          mode: as for ``open``.
          kinds: what it may be open on.

        Raises:
          IndexError, ValueError: as :meth:`take`; or not a mode.
          WrongDescriptorKindError: another kind of file, or not open for ``mode``. The list
            still owns it.
        """
        check_mode(mode)
        file = open_file(self[index], mode, kinds)
        self._leave_gap(index)
        return file

    def take_socket(self, index: SupportsIndex) -> trio.socket.SocketType:
        """Take out one descriptor as a trio socket, which makes it non-blocking for all.

        Raises:
          IndexError, ValueError: as :meth:`take`.
          WrongDescriptorKindError: not a socket. The list still owns it.
        """
        sock = open_socket(self[index])
        self._leave_gap(index)
        return sock

    def take_stream(self, index: SupportsIndex) -> trio.abc.HalfCloseableStream:
        """Take out one descriptor as a stream, which makes it non-blocking for all.

        Returns:
          A :class:`UnixConnection` for a Unix socket, a ``trio.SocketStream`` for others.

        Raises:
          IndexError, ValueError: as :meth:`take`.
          WrongDescriptorKindError: not a connected stream socket. The list still owns it.
        """
        stream = open_stream(self[index])
        self._leave_gap(index)
        return stream

    def close(self) -> None:
        """Close the descriptors that are still there; closing twice is allowed.

        As any close, it may wait for what is behind a descriptor: a TCP connection with
        SO_LINGER, a file server.

        Raises:
          OSError: the first error of close(2); all have been closed by then.
        """
        if not self._fds:
            return
        first: OSError | None = None
        close = os.close
        for fd in self.steal_fds():
            try:
                close(fd)
            except OSError as exc:
                first = first or exc
        if first is not None:
            raise first

    def _leave_gap(self, index: SupportsIndex) -> None:
        self._gaps = True
        self._fds[operator.index(index)] = _TAKEN

    def __len__(self) -> int:
        return len(self._fds)

    def __bool__(self) -> bool:
        return bool(self._fds)

    def __iter__(self) -> Iterator[int]:
        return iter([fd for fd in self._fds if fd != _TAKEN])

    def __getitem__(self, index: SupportsIndex) -> int:
        fd = self._fds[operator.index(index)]
        if fd == _TAKEN:
            raise ValueError(f"the descriptor at {operator.index(index)} was taken out before")
        return fd

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<UnixFDList [{', '.join(map(_described, self._fds))}]>"

    def __del__(self) -> None:
        # Not there when the constructor was called wrongly.
        if not getattr(self, "_fds", None):
            return
        fds = list(self)
        if fds:
            # First closed, because a warning may be an exception.
            with suppress(OSError):
                self.close()
            warnings.warn(
                f"a UnixFDList was dropped with descriptors {fds}, which were closed; use it in "
                "a with block, take them out, or close it",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )


def _number(fd: int) -> int:
    if type(fd) is not int:
        raise TypeError(f"a descriptor is due: an int, not {type(fd).__name__} ({fd!r})")
    if fd < 0:
        raise ValueError(f"no descriptor has the number {fd}")
    return fd


def _described(fd: int) -> str:
    if fd == _TAKEN:
        return "taken"
    try:
        return f"{fd}: {kind_of(fd).value}"
    except OSError as exc:
        return f"{fd}: {exc.strerror}"
