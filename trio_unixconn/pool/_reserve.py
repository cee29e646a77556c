"""Descriptors that are held back, so that a worker can be started when all others are in use.

The rule of this file: they are given up for a moment only, in which no other task runs, and
taken again as soon as any are free.

When all workers have died, jobs that wait hold descriptors until there is a worker; and there
is none before some are free.

Source: getrlimit(2) (RLIMIT_NOFILE)
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from .._owner import DescriptorOwner

if TYPE_CHECKING:
    from collections.abc import Generator

# What starting a worker takes: two sockets, its board and the map of that, and three of
# subprocess; then its pidfd.
_COUNT: Final = 8


class Reserve(DescriptorOwner):
    """Descriptors that are in use for nothing."""

    def __init__(self) -> None:
        self._fds: list[int] = []
        self.fill()

    def fill(self) -> None:
        """Take as many as are due, if they are there."""
        fds = self._fds
        while len(fds) < _COUNT:
            try:
                fds.append(os.dup(fds[0]) if fds else os.open(os.devnull, os.O_RDONLY))
            except OSError:
                return

    @contextmanager
    def spent(self) -> Generator[None, None, None]:
        """Give them up in this block, which must not wait."""
        self.close()
        try:
            yield
        finally:
            self.fill()

    def close(self) -> None:
        """Give them up."""
        while self._fds:
            os.close(self._fds.pop())
