"""Which jobs a worker has finished, in memory that outlives it.

The rule of this file: a worker notes a job the moment its handler has ended, before anything
else happens; the pool reads only when the worker is dead. What was noted and not yet told was
not being handled when its worker died.

Source: memfd_create(2), mmap(2)
"""

from __future__ import annotations

import mmap
import os
import tempfile
from contextlib import suppress
from typing import Final

from .._owner import DescriptorOwner

_ITEM: Final = 8


def create_log(size: int) -> int:
    """Return the descriptor of a board for ``size`` jobs, which the caller owns.

    Raises:
      OSError: EMFILE, ENOMEM.
    """
    create = getattr(os, "memfd_create", None)
    if create is not None:
        fd: int = create("trio_unixconn.pool")
    else:
        fd, path = tempfile.mkstemp()
        with suppress(OSError):
            os.unlink(path)
    try:
        os.ftruncate(fd, size * _ITEM)
    except BaseException:
        os.close(fd)
        raise
    return fd


class CompletionLog(DescriptorOwner):
    """The numbers of the jobs that were finished last.

    It is written round and round, so it has room for as many as may be finished and not yet
    told: those that may be in flight.

    Args:
      fd: of :func:`create_log`; it stays the caller's, and may be closed.
    """

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, 0)
        self._items = memoryview(self._map).cast("Q")
        self._size = len(self._items)
        self._next = 0

    def add(self, number: int) -> None:
        """Note that a job is finished."""
        self._items[self._next] = number
        self._next = (self._next + 1) % self._size

    def entries(self) -> set[int]:
        """Return the numbers that were noted last."""
        return set(self._items)

    def close(self) -> None:
        """Give the memory back; closing twice is allowed."""
        self._items.release()
        self._map.close()
