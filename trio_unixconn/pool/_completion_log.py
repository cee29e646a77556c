"""The ids of the jobs that a worker has finished, in memory that outlives it.

A worker adds the id of a job as soon as its handler has ended, before it does anything else. The
pool reads the log only after the worker has died. An id that is in the log, but was not reported
yet, was not being handled at that time.

A worker is not trusted. The pool never maps the memory: reading a mapping of memory that another
process has truncated kills the reader with SIGBUS, while pread(2) only returns less. Where the
system has memfds, the memory is also sealed, so that no process can change its size. The ids in
it are the worker's claim; the pool looks only for ids that it has sent to that worker.

Source: memfd_create(2), fcntl(2) (file sealing), mmap(2)
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import tempfile
from array import array
from contextlib import suppress
from typing import Any, Final

from .._memfd import F_ADD_SEALS, Seals
from .._owner import DescriptorOwner

_ID_SIZE: Final = 8
_SEALS: Final = Seals.SHRINK | Seals.GROW | Seals.SEAL


def create_memory_file(data: bytes, seals: Seals, *, size: int = 0) -> int:
    """Return an unnamed file with the bytes of ``data``, at position 0; the caller owns it.

    It is a memfd with ``seals``. On a system without memfds it is a temporary file.

    Args:
      size: extend the file with zeros to this number of bytes.

    Raises:
      OSError: EMFILE, ENOMEM, ENOSPC; nothing stays open.
    """
    memfd_create = getattr(os, "memfd_create", None)
    if memfd_create is None:
        fd, path = tempfile.mkstemp(prefix="trio_unixconn.pool-")
        with suppress(OSError):
            os.unlink(path)
    else:
        fd = memfd_create("trio_unixconn.pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        done = 0
        # One write moves at most 2 GiB.
        while done < len(data):
            done += os.pwrite(fd, memoryview(data)[done:], done)
        if size > done:
            os.ftruncate(fd, size)
        if memfd_create is not None:
            fcntl.fcntl(fd, F_ADD_SEALS, seals.value)
    except BaseException:
        os.close(fd)
        raise
    return fd


class CompletionLog(DescriptorOwner):
    """The pool's side of a log: it owns the memory, and reads it.

    Args:
      size: the number of ids that it holds, the last ones; as many as there can be jobs that are
        finished and not reported yet.

    Raises:
      OSError: EMFILE, ENOMEM.
    """

    def __init__(self, size: int) -> None:
        self._size = size * _ID_SIZE
        self.fd: int = create_memory_file(b"", _SEALS, size=self._size)

    def entries(self) -> set[int]:
        """Return the ids that were added last; also 0, which is the id of no job."""
        # Never more than its size at the beginning, whatever its size is now.
        data = os.pread(self.fd, self._size, 0)
        ids = array("Q")
        ids.frombytes(data[: len(data) // _ID_SIZE * _ID_SIZE])
        return set(ids)

    def close(self) -> None:
        """Close the memory; closing twice is allowed."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class CompletionLogWriter(DescriptorOwner):
    """The worker's side of a log: it adds ids, and overwrites the oldest ones.

    Args:
      fd: the file descriptor of a log, which is closed.
    """

    def __init__(self, fd: int) -> None:
        # Before Python 3.13 a mapping keeps a duplicate of its own. Seals make it harmless.
        options: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        try:
            self._map = mmap.mmap(fd, 0, **options)
        finally:
            os.close(fd)
        self._ids = memoryview(self._map).cast("Q")
        self._size = len(self._ids)
        self._next = 0

    def add(self, job_id: int) -> None:
        """Add the id of a job that is finished."""
        self._ids[self._next] = job_id
        self._next = (self._next + 1) % self._size

    def close(self) -> None:
        """Unmap the memory; closing twice is allowed."""
        self._ids.release()
        self._map.close()
