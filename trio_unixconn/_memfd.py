"""Sealed memory: create, seal, check and map a memfd.

Invariant: size and seals are checked before anything is mapped, and a mapping is read-only. What
is mapped cannot shrink, nor lose its huge pages: either would kill the reader with SIGBUS.

No file server is asked: F_GET_SEALS fails immediately for anything but memory.

Sources: memfd_create(2), fcntl(2) (file sealing), mmap(2)
"""

from __future__ import annotations

import enum
import errno
import mmap
import os
import sys
from typing import Any, Final

from . import _kernel
from ._buffers import bytes_of
from ._fdtypes import F_GET_SEALS, DescriptorKind, describe, kind_of
from .errors import UnsafeBufferError

# A number of include/uapi/linux/fcntl.h.
F_ADD_SEALS: Final = 1033


class Seals(enum.Flag):
    """What no process can do to a memfd any more, its creator included. Source: fcntl(2)."""

    #: No more seals can be added.
    SEAL = 0x01
    #: Its size cannot be reduced.
    SHRINK = 0x02
    #: Its size cannot be increased.
    GROW = 0x04
    #: Its bytes cannot be changed.
    WRITE = 0x08
    #: All four: a buffer that stays as it is.
    ALL = 0x0F


# Numbers: to ask an enum takes 0.2 us.
_ALL: Final = Seals.ALL.value
_WRITE: Final = Seals.WRITE.value


def check_seals(seals: Seals) -> Seals:
    """Return ``seals`` if a memfd that has them can be mapped safely.

    Raises:
      TypeError: not Seals.
      ValueError: without ``Seals.SHRINK``.
    """
    if not isinstance(seals, Seals):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"seals must be Seals, got {type(seals).__name__}")
    if Seals.SHRINK not in seals:
        raise ValueError(
            "seals must contain Seals.SHRINK: reading memory that was shrunk kills this process "
            "(SIGBUS)"
        )
    return seals


def create(data: bytes | bytearray | memoryview) -> int:
    """Return a new memfd with the bytes of ``data``, sealed against any change.

    The caller owns it. ``data`` is any contiguous buffer; the kernel copies it once.

    Raises:
      NotSupportedError: the platform has no memfd_create (Linux 3.17).
      OSError: ENOMEM, EMFILE.
    """
    memfd_create = _kernel.required(getattr(os, "memfd_create", None), "memfd_create")
    flags: int = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    fd: int = memfd_create("trio_unixconn", flags)
    try:
        with bytes_of(data) as view:
            done = 0
            # One write moves at most 2 GiB.
            while done < len(view):
                with view[done:] as rest:
                    # Leaves the position at 0, for receivers that read.
                    done += os.pwrite(fd, rest, done)
        seal(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def seal(fd: int) -> None:
    """Seal a memfd against any change; sealing twice is allowed.

    Raises:
      UnsafeBufferError: no memfd, one made without MFD_ALLOW_SEALING, or one that is mapped
        for writing.
      OSError: EBADF.
    """
    try:
        if _fcntl(fd, F_GET_SEALS, 0) & _ALL != _ALL:
            _fcntl(fd, F_ADD_SEALS, _ALL)
    except OSError as exc:
        kind = kind_of(fd)
        raise UnsafeBufferError(
            f"cannot seal this {kind.value} ({exc.strerror}); create a memfd with "
            "MFD_ALLOW_SEALING, and unmap it first",
            kind,
        ) from exc


def check(fd: int, max_bytes: int | None = None, seals: Seals = Seals.ALL) -> int:
    """Return the size of a memfd that has ``seals``.

    Raises:
      UnsafeBufferError: not a memfd, a seal is missing, or more than ``max_bytes``.
    """
    size, _ = _size_and_seals(fd, max_bytes, seals)
    return size


def _size_and_seals(fd: int, max_bytes: int | None, seals: Seals) -> tuple[int, int]:
    try:
        present = _fcntl(fd, F_GET_SEALS, 0)
    except OSError:
        # EINVAL: no memory.
        kind = kind_of(fd)
        raise UnsafeBufferError(f"expected a sealed memfd, got {describe(kind)}", kind) from None
    # By numbers: a kernel may know seals that have no name here.
    wanted = _ALL if seals is Seals.ALL else seals.value
    if present & wanted != wanted:
        missing = [
            each.name.lower()
            for each in (Seals.SEAL, Seals.SHRINK, Seals.GROW, Seals.WRITE)
            if each.name is not None and wanted & ~present & each.value
        ]
        raise UnsafeBufferError(
            "expected a sealed memfd, got one that its sender can still change (missing seals: "
            f"{', '.join(missing)})",
            DescriptorKind.REGULAR_FILE,
        )
    # It is a memfd, so this asks no file server.
    size = os.fstat(fd).st_size
    if max_bytes is not None and size > max_bytes:
        raise UnsafeBufferError(
            f"expected a buffer of at most {max_bytes} bytes, got {size}",
            DescriptorKind.REGULAR_FILE,
        )
    return size, present


def map_readonly(fd: int, max_bytes: int, seals: Seals = Seals.ALL) -> memoryview:
    """Return the bytes of a memfd that has ``seals``, read-only and not copied.

    The mapping lasts as long as the view or anything made from it; ``fd`` stays the caller's,
    and may be closed.

    Raises:
      UnsafeBufferError: as :func:`check`, or it cannot be mapped; nothing was mapped.
      OSError: EMFILE; before Python 3.13 a mapping has a descriptor of its own.
    """
    size, present = _size_and_seals(fd, max_bytes, seals)
    if not size:
        return memoryview(b"")
    options: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
    # Shared, where the sender may write: it is specified then that this side sees it. But before
    # Linux 6.7 a memfd that is sealed against writing cannot be mapped shared.
    flags = mmap.MAP_PRIVATE
    if not present & _WRITE:
        flags = mmap.MAP_SHARED
        if os.fstatvfs(fd).f_bsize != mmap.PAGESIZE:
            # Its sender can punch a hole, and there may be no huge page left to fill it.
            raise UnsafeBufferError(
                "expected a memfd of ordinary pages, got one of huge pages that its sender can "
                "still write to; reading it can kill this process (SIGBUS)",
                DescriptorKind.REGULAR_FILE,
            )
    try:
        return memoryview(mmap.mmap(fd, size, flags=flags, prot=mmap.PROT_READ, **options))
    except OSError as exc:
        if exc.errno == errno.EMFILE:
            raise
        # Not open for reading, or the size is not a multiple of huge pages.
        raise UnsafeBufferError(
            f"cannot map this memfd ({exc.strerror})", DescriptorKind.REGULAR_FILE
        ) from exc


def _fcntl(fd: int, command: int, argument: int) -> int:
    # Not on Windows, which has no memfds either.
    import fcntl

    return fcntl.fcntl(fd, command, argument)
