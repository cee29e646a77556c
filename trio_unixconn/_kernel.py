"""Constants and facts of this platform's kernel.

Invariant: importing this module never fails. A constant that the platform lacks is ``None`` (a
flag is 0), and :func:`required` raises :class:`~trio_unixconn.errors.NotSupportedError` for it.

Sources: unix(7), socket(7), cmsg(3), recvmsg(2); for numbers that Python's socket module
does not name, include/uapi/asm-generic/socket.h and include/linux/socket.h of Linux.
"""

from __future__ import annotations

import errno
import importlib
import os
import platform
import select
import socket
import sys
from types import ModuleType
from typing import Final, TypeVar

from .errors import NotSupportedError

T = TypeVar("T")


def _named(name: str) -> int | None:
    number: object = getattr(socket, name, None)
    return int(number) if isinstance(number, int) else None


def required(value: T | None, what: str) -> T:
    """Return ``value`` if the platform has it.

    Raises:
      NotSupportedError: if ``value`` is None.
    """
    if value is None:
        raise NotSupportedError(
            f"{sys.platform} with this Python has no {what}, which this operation needs"
        )
    return value


AF_UNIX: Final = _named("AF_UNIX")
SOL_SOCKET: Final = socket.SOL_SOCKET
SO_ACCEPTCONN: Final = _named("SO_ACCEPTCONN")
SO_BINDTODEVICE: Final = _named("SO_BINDTODEVICE")
SO_OOBINLINE: Final = _named("SO_OOBINLINE")
SO_PASSCRED: Final = _named("SO_PASSCRED")
SO_PEERCRED: Final = _named("SO_PEERCRED")
SO_RCVTIMEO: Final = _named("SO_RCVTIMEO")
SCM_RIGHTS: Final = _named("SCM_RIGHTS")
SCM_CREDENTIALS: Final = _named("SCM_CREDENTIALS")
SCM_CREDS: Final = _named("SCM_CREDS")
# Python's socket module has no names for these two. Their numbers are the same on every
# architecture of Linux (SCM_PIDFD since 6.5).
SCM_SECURITY: Final = 3 if sys.platform == "linux" else None
SCM_PIDFD: Final = 4 if sys.platform == "linux" else None

# Alpha, MIPS, PA-RISC and SPARC have their own numbers for socket options.
_GENERIC: Final = sys.platform == "linux" and not platform.machine().lower().startswith(
    ("alpha", "mips", "parisc", "sparc")
)


def _numbered(number: int) -> int | None:
    return number if _GENERIC else None


SO_PEERSEC: Final = _numbered(31)
SO_MEMINFO: Final = _numbered(55)  # since Linux 4.12; an array of int, see sock_diag(7)
SO_PEERGROUPS: Final = _numbered(59)  # since Linux 4.13
SO_PASSPIDFD: Final = _numbered(76)  # since Linux 6.5
SO_PEERPIDFD: Final = _numbered(77)  # since Linux 6.5
SO_PASSRIGHTS: Final = _numbered(83)  # since Linux 6.16
SCM_INQ: Final = _numbered(84)  # SO_INQ, since Linux 6.18
# SO_TIMESTAMP, SO_TIMESTAMPNS and SO_TIMESTAMPING; before and after the year 2038 was fixed.
SCM_TIMESTAMPS: Final = tuple(filter(None, map(_numbered, (29, 35, 37, 63, 64, 65))))

MSG_CTRUNC: Final = _named("MSG_CTRUNC") or 0
MSG_DONTWAIT: Final = _named("MSG_DONTWAIT") or 0
MSG_PEEK: Final = _named("MSG_PEEK") or 0
MSG_TRUNC: Final = _named("MSG_TRUNC") or 0
MSG_NOSIGNAL: Final = _named("MSG_NOSIGNAL") or 0
MSG_CMSG_CLOEXEC: Final = _named("MSG_CMSG_CLOEXEC") or 0

# poll(2): the peer has ended the stream, or the connection was reset.
POLLRDHUP: Final[int | None] = getattr(select, "POLLRDHUP", None)

# The process, its user or the system is out of file descriptors or memory at the moment.
OUT_OF_RESOURCES: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ETOOMANYREFS}
)

# The maximum number of file descriptors in one message, in either direction.
SCM_MAX_FD: Final = 253

HAS_SENDMSG: Final = all(
    hasattr(socket.socket, name) for name in ("sendmsg", "recvmsg")
) and hasattr(socket, "CMSG_SPACE")


def cmsg_space(length: int) -> int:
    """Return the size of a control message with ``length`` bytes of payload.

    0 if the platform has no control messages. Source: cmsg(3).
    """
    return socket.CMSG_SPACE(length) if HAS_SENDMSG else 0


# The size of everything that one message can carry: SCM_MAX_FD file descriptors, credentials, a
# pidfd, and a security label of up to 256 bytes. With a buffer of that size, MSG_CTRUNC has one
# meaning only: the kernel could not install a file descriptor. A larger buffer costs nothing:
# sendmsg + recvmsg + close of one file descriptor took 4.71 us with 24 bytes and 4.78 us with
# 2048.
CONTROL_ROOM: Final = cmsg_space(4 * SCM_MAX_FD) + cmsg_space(84) + cmsg_space(4) + cmsg_space(256)


def free_descriptors() -> int:
    """Return how many more file descriptors this process can open; 0 if it is unknown.

    Source: getrlimit(2) (``RLIMIT_NOFILE``), proc_pid_fd(5); since Linux 6.2 the size of the
    directory is the number of its entries.
    """
    try:
        import resource  # not on Windows

        used = os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
    except (ImportError, OSError):
        return 0
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 - 1 if limit == resource.RLIM_INFINITY else limit - used


def effective_user() -> int:
    """Return the effective user id of this process.

    Raises:
      NotSupportedError: the platform has no user ids.
    """
    return int(required(getattr(os, "geteuid", None), "user ids (os.geteuid)")())


def effective_group() -> int:
    """Return the effective group id of this process.

    Raises:
      NotSupportedError: the platform has no group ids.
    """
    return int(required(getattr(os, "getegid", None), "group ids (os.getegid)")())


# The number of ids, and the default of the id that stands for unmapped ones.
_ALL_IDS: Final = 2**32 - 1
_OVERFLOW_ID: Final = 65534


def is_own_user_id(uid: int) -> bool:
    """Whether a user id that the kernel reports is the id of one certain user.

    In a user namespace, the kernel reports every user from outside as the overflow id (65534).
    There, that id says nothing about the user, even if the namespace maps it. If the map of this
    process cannot be read (/proc is not mounted), the process may be in such a namespace.

    Source: user_namespaces(7), proc_pid_uid_map(5), proc_sys_kernel(5)
    """
    return _is_mapped(uid, "/proc/self/uid_map", "/proc/sys/kernel/overflowuid")


def is_own_group_id(gid: int) -> bool:
    """Whether a group id that the kernel reports is the id of one group; as is_own_user_id."""
    return _is_mapped(gid, "/proc/self/gid_map", "/proc/sys/kernel/overflowgid")


def _is_mapped(number: int, map_path: str, overflow_path: str) -> bool:
    if sys.platform != "linux":
        # No other system has user namespaces.
        return True
    try:
        with open(map_path, "rb") as file:
            ranges = [[int(field) for field in line.split()] for line in file]
    except OSError:
        # The kernel reports an unmapped id as the overflow id. So any other id is mapped.
        ranges = [[0, 0, _ALL_IDS]]
    else:
        if any(start == 0 and count == _ALL_IDS for start, _, count in ranges):
            # Every id is mapped, and the overflow id is an ordinary one.
            return True
    try:
        with open(overflow_path, "rb") as file:
            overflow = int(file.read())
    except OSError:
        overflow = _OVERFLOW_ID
    return number != overflow and any(start <= number < start + count for start, _, count in ranges)


def getsockopt_of_any_length(fd: int, level: int, option: int, length: int) -> bytes:
    """Get a socket option that can be longer than the 1024 bytes that Python's getsockopt allows.

    Raises:
      OSError: from getsockopt(2); ERANGE if the option is longer than ``length`` bytes.
    """
    import ctypes  # rare: for peers in more than 256 groups

    libc = ctypes.CDLL(None, use_errno=True)
    buffer, size = ctypes.create_string_buffer(length), ctypes.c_uint32(length)
    if libc.getsockopt(fd, level, option, buffer, ctypes.byref(size)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw[: size.value]


def _database(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def user_named(name: str) -> int:
    """Return the id of a user.

    Raises:
      ValueError: there is no user with that name.
      NotSupportedError: the platform has no database of users.
    """
    database = required(_database("pwd"), "users (pwd)")
    try:
        return int(database.getpwnam(name).pw_uid)
    except KeyError:
        raise ValueError(f"no such user: {name!r}") from None


def group_named(name: str) -> int:
    """Return the id of a group.

    Raises:
      ValueError: there is no group with that name.
      NotSupportedError: the platform has no database of groups.
    """
    database = required(_database("grp"), "groups (grp)")
    try:
        return int(database.getgrnam(name).gr_gid)
    except KeyError:
        raise ValueError(f"no such group: {name!r}") from None


def name_of_user(uid: int) -> str | None:
    """Return the name of a user; None if the user has none."""
    database = _database("pwd")
    try:
        return None if database is None else str(database.getpwuid(uid).pw_name)
    except (KeyError, OverflowError):
        return None


def name_of_group(gid: int) -> str | None:
    """Return the name of a group; None if the group has none."""
    database = _database("grp")
    try:
        return None if database is None else str(database.getgrgid(gid).gr_name)
    except (KeyError, OverflowError):
        return None
