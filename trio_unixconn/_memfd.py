"""Sealed memory: bytes in a memfd that nobody can change any more.

The rule of this file: size and seals are checked before anything is mapped, and what is
mapped is read-only. A sealed memfd can neither shrink under a mapping (SIGBUS) nor change
while it is read.

Sources: memfd_create(2), fcntl(2) (file sealing), mmap(2)
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from typing import Any, Final

from . import _kernel
from ._buffers import bytes_of
from ._fdtypes import DescriptorKind, kind_of
from .errors import UnsafeBufferError

# Numbers of include/uapi/linux/fcntl.h, which Python's fcntl names all but the first.
F_ADD_SEALS: Final = 1033
F_GET_SEALS: Final = 1034
_SEALS: Final = {"seal": 0x01, "shrink": 0x02, "grow": 0x04, "write": 0x08}
ALL_SEALS: Final = sum(_SEALS.values())


def sealed_memory(data: bytes | bytearray | memoryview) -> int:
    """Return a new memfd with the bytes of ``data``, sealed against any change.

    The caller owns it. ``data`` is any contiguous buffer; it is copied once, by the kernel.

    Raises:
      NotSupportedError: the platform has no memfd_create (Linux 3.17).
      OSError: ENOMEM, EMFILE.
    """
    create = _kernel.required(getattr(os, "memfd_create", None), "memfd_create")
    flags: int = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    fd: int = create("trio_unixconn", flags)
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
    kind = kind_of(fd)
    try:
        if kind is not DescriptorKind.REGULAR_FILE or not _all_sealed(fd):
            _fcntl(fd, F_ADD_SEALS, ALL_SEALS)
    except OSError as exc:
        raise UnsafeBufferError(
            f"a memfd that can be sealed is due, but this {kind.value} cannot be "
            f"({exc.strerror}); make it with MFD_ALLOW_SEALING, and unmap it before",
            kind,
        ) from exc


def _all_sealed(fd: int) -> bool:
    return _fcntl(fd, F_GET_SEALS, 0) & ALL_SEALS == ALL_SEALS


def check_sealed(fd: int, max_bytes: int | None = None) -> int:
    """Return the size of a sealed memfd.

    Raises:
      UnsafeBufferError: not a memfd, a seal is missing, or more than ``max_bytes``.
    """
    kind = kind_of(fd)
    try:
        seals = _fcntl(fd, F_GET_SEALS, 0) if kind is DescriptorKind.REGULAR_FILE else -1
    except OSError:
        # EINVAL: a file of a file system that has no seals.
        seals = -1
    if seals < 0:
        raise UnsafeBufferError(f"a sealed memfd was due, but a {kind.value} came", kind)
    missing = [name for name, seal in _SEALS.items() if not seals & seal]
    if missing:
        raise UnsafeBufferError(
            f"a sealed memfd was due, but one came whose sender can still change it: it lacks "
            f"the seals {', '.join(missing)}",
            kind,
        )
    size = os.fstat(fd).st_size
    if max_bytes is not None and size > max_bytes:
        raise UnsafeBufferError(
            f"a buffer of at most {max_bytes} bytes was due, but one of {size} came", kind
        )
    return size


def map_sealed(fd: int, max_bytes: int) -> memoryview:
    """Return the bytes of a sealed memfd, read-only and not copied.

    The mapping lasts as long as the view or anything made from it; ``fd`` stays the
    caller's, and may be closed.

    Raises:
      UnsafeBufferError: as :func:`check_sealed`, or it cannot be mapped; nothing was.
      OSError: EMFILE; before Python 3.13 a mapping has a descriptor of its own.
    """
    size = check_sealed(fd, max_bytes)
    if not size:
        return memoryview(b"")
    options: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
    try:
        return memoryview(
            mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ, **options)
        )
    except OSError as exc:
        if exc.errno == errno.EMFILE:
            raise
        # Not open for reading, or huge pages of which the size is no multiple.
        raise UnsafeBufferError(
            f"sealed memory to map was due, but this cannot be mapped ({exc.strerror})",
            DescriptorKind.REGULAR_FILE,
        ) from exc


def _fcntl(fd: int, command: int, argument: int) -> int:
    # Not on Windows, which has no memfds either.
    import fcntl  # noqa: PLC0415

    return fcntl.fcntl(fd, command, argument)
