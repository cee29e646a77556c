"""UnixFDList: a list that owns file descriptors.

Invariant: a descriptor in a list is closed by the list, unless it was taken out.

Source: https://docs.gtk.org/gio-unix/class.FDList.html
"""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, Final, SupportsIndex

import trio

from . import _closing
from ._fdtypes import (
    DescriptorKind,
    check_file,
    check_kinds,
    check_mode,
    open_file,
    open_file_or_close,
    open_socket,
    open_stream,
)
from ._owner import ClosableOwner
from ._trio_task import check_task, checkpoint_in_task

if TYPE_CHECKING:
    from ._cancellable import Cancellable

_TAKEN: Final = -1


class UnixFDList(ClosableOwner):
    """A list that owns its file descriptors, as ``Gio.UnixFDList``.

    It closes them at the end of a ``with`` block or in :meth:`close`. A list that is collected
    with descriptors in it closes them in a thread, because close(2) can wait for what a peer
    chose, with a ResourceWarning; the warning names the place where the list was made when
    tracemalloc is on. Positions are stable: taking out a descriptor leaves a gap, and the
    length stays. Iterating gives the numbers that are still there; they stay the list's.

    A list cannot be copied or pickled. Its repr shows numbers only.

    Args:
      fds: file descriptors that the list owns from now on.

    Raises:
      TypeError: one of them is not a file descriptor; then none is owned.
      ValueError: one of them is a number that no file descriptor has; then none is owned.
    """

    __slots__ = ("__weakref__", "_fds", "_gaps")

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self._fds: list[int] = []
        # Whether any was taken out; most lists have no gaps to skip.
        self._gaps = False
        # The items of bytes are ints, but not file descriptors.
        if isinstance(fds, (str, bytes, bytearray, memoryview)) or not hasattr(fds, "__iter__"):
            raise TypeError(
                f"fds must be an iterable of file descriptors, got {type(fds).__name__}"
            )
        self._fds = [_number(fd) for fd in fds]

    @classmethod
    def new_from_array(cls, fds: Iterable[int]) -> UnixFDList:
        """Make a list that owns ``fds``; Gio's name for the constructor."""
        return cls(fds)

    @classmethod
    def owning(cls, fds: list[int]) -> UnixFDList:
        """Make a list that owns what the kernel returned, and keeps the list object itself."""
        fd_list = cls.__new__(cls)
        fd_list._fds = fds
        fd_list._gaps = False
        return fd_list

    def append(self, fd: int) -> int:
        """Add a duplicate of ``fd``, which stays the caller's.

        Returns:
          Its position.

        Raises:
          TypeError: not a file descriptor.
          ValueError: a number that no file descriptor has, or a closed file.
          OSError: EBADF or EMFILE.
        """
        self._fds.append(os.dup(_number(fd)))
        return len(self._fds) - 1

    def append_take(self, fd: int) -> int:
        """Add ``fd`` itself, which the list owns from now on, as ``append_take`` of GLib 2.90.

        Returns:
          Its position.

        Raises:
          TypeError: not a file descriptor; it stays the caller's.
          ValueError: a number that no file descriptor has, or a closed file.
        """
        self._fds.append(_number(fd))
        return len(self._fds) - 1

    def get(self, index: int) -> int:
        """Return a duplicate of the descriptor at ``index``, which the caller owns.

        Raises:
          IndexError: no such position.
          ValueError: it was taken out.
          OSError: EMFILE.
        """
        return os.dup(self[index])

    def peek(self, index: SupportsIndex) -> int:
        """Return the descriptor at ``index``, which stays the list's; the same as ``[index]``.

        Raises:
          IndexError: no such position.
          ValueError: it was taken out.
        """
        return self[index]

    def lookup(self, index: SupportsIndex) -> int:
        """Return the descriptor at ``index``, which stays the list's, or -1 if there is none.

        There is none if the position is negative or too large, or was taken out. As ``lookup``
        of GLib 2.90; for positions that a peer chose.
        """
        position = operator.index(index)
        return self._fds[position] if 0 <= position < len(self._fds) else _TAKEN

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
          ValueError: it was taken out before.
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

        This may wait for a file server, because ``open`` asks it. If the sender of the descriptor
        is not trusted, use :meth:`open_file`.

        Args:
          mode: as for ``open``.
          kinds: the kinds of file that are accepted.

        Raises:
          IndexError: as :meth:`take`.
          TypeError: ``mode`` is not a str, or ``kinds`` not a collection of DescriptorKind.
          ValueError: as :meth:`take`; or ``mode`` is not a mode, or ``kinds`` is empty.
          WrongDescriptorKindError: another kind of file, or not open for ``mode``. The list
            still owns it.
        """
        check_mode(mode)
        file = open_file(self[index], mode, check_kinds(kinds))
        self._leave_gap(index)
        return file

    async def open_file(
        self,
        index: SupportsIndex,
        mode: str = "rb",
        *,
        kinds: Collection[DescriptorKind] = (DescriptorKind.REGULAR_FILE,),
        cancellable: Cancellable | None = None,
    ) -> IO[Any]:
        """Take out one descriptor as an open file, without blocking the event loop.

        As :meth:`take_file`, but a thread asks the file server, as in
        :meth:`UnixConnection.receive_file`. If this is cancelled before it asks, the list still
        owns the descriptor. If it is cancelled later, or Python cannot open the file, the
        descriptor is closed, and taken.

        Raises:
          IndexError: as :meth:`take`.
          TypeError: as :meth:`take_file`.
          ValueError: as :meth:`take_file`.
          WrongDescriptorKindError: another kind of file, or not open for ``mode``. The list
            still owns it.
          OperationCancelled: the Cancellable was cancelled while a file server did not answer.
        """
        check_mode(mode)
        accepted = check_kinds(kinds)
        await checkpoint_in_task()
        check_file(self[index], mode, accepted)
        return await open_file_or_close(self.take(index), mode, accepted, cancellable)

    def take_socket(self, index: SupportsIndex) -> trio.socket.SocketType:
        """Take out one descriptor as a trio socket.

        The open socket becomes non-blocking, for every process that shares it.

        Raises:
          IndexError: as :meth:`take`.
          ValueError: as :meth:`take`.
          WrongDescriptorKindError: not a socket. The list still owns it.
        """
        sock = open_socket(self[index])
        self._leave_gap(index)
        return sock

    def take_stream(self, index: SupportsIndex) -> trio.abc.HalfCloseableStream:
        """Take out one descriptor as a stream.

        The open socket becomes non-blocking, for every process that shares it.

        Returns:
          A :class:`UnixConnection` for a Unix socket, a ``trio.SocketStream`` for others.

        Raises:
          IndexError: as :meth:`take`.
          ValueError: as :meth:`take`.
          WrongDescriptorKindError: not a connected stream socket. The list still owns it.
        """
        stream = open_stream(self[index])
        self._leave_gap(index)
        return stream

    def close(self) -> None:
        """Close the descriptors that are still there; closing twice is allowed.

        This is close(2) in the calling thread, and may wait as that does: for a TCP connection
        with SO_LINGER, or a file server. If the sender of the descriptors is not trusted, use
        :meth:`aclose`.

        Raises:
          OSError: the first error of close(2). All have been closed by then.
        """
        fds, self._fds = self._fds, []
        if not fds:
            return
        if self._gaps:
            fds, self._gaps = [fd for fd in fds if fd != _TAKEN], False
        closing = map(os.close, fds)
        try:
            # Closes all, because os.close returns None: 8 take 0.4 us less than in a loop.
            any(closing)
        except OSError:
            done = False
            while not done:
                with suppress(OSError):
                    any(closing)
                    done = True
            raise

    async def aclose(self) -> None:
        """Close the descriptors that are still there, without blocking the event loop.

        A thread closes them, in order to be safe from what the sender has chosen; errors of
        close(2) are ignored. ``async with`` calls this. As every aclose() of trio, this closes
        them even if it is cancelled.
        """
        check_task()
        _closing.close_fds(self.steal_fds())
        await trio.lowlevel.checkpoint()

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
            raise ValueError(
                f"the file descriptor at position {operator.index(index)} was already taken out"
            )
        return fd

    def __repr__(self) -> str:
        # No system call: fstat(2) would wait for a file server.
        numbers = ", ".join("taken" if fd == _TAKEN else str(fd) for fd in self._fds)
        return f"<UnixFDList [{numbers}]>"

    def __del__(self) -> None:
        try:
            if not self._fds:
                return
        except AttributeError:
            # The constructor got wrong arguments.
            return
        fds = self.steal_fds()
        if fds:
            # Close first, because a warning may be an exception.
            _closing.close_fds(fds)
            warnings.warn(
                f"unclosed UnixFDList: file descriptors {fds}",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )


def _number(fd: int) -> int:
    if type(fd) is not int:
        raise TypeError(f"expected a file descriptor (an int), got {type(fd).__name__} ({fd!r})")
    if fd < 0:
        raise ValueError(f"file descriptor cannot be a negative integer ({fd})")
    if fd > 2**31 - 1:
        raise ValueError(f"file descriptor is out of range ({fd})")
    return fd
