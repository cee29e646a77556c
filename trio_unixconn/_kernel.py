"""What this platform's kernel offers, by name and by number.

The rule of this file: a name that the platform lacks is ``None`` here (a flag that it lacks
is 0), never an AttributeError at import; whoever needs it calls :func:`required`, which
raises :class:`~trio_unixconn.errors.NotSupportedError`.

Sources: unix(7), socket(7), cmsg(3), recvmsg(2); for numbers that Python's socket module
does not name, include/uapi/asm-generic/socket.h and include/linux/socket.h of Linux.
"""

from __future__ import annotations

import errno
import importlib
import os
import platform
import socket
import sys
from typing import TYPE_CHECKING, Final, TypeVar

from .errors import NotSupportedError

if TYPE_CHECKING:
    from types import ModuleType

T = TypeVar("T")


def _named(name: str) -> int | None:
    number: object = getattr(socket, name, None)
    return int(number) if isinstance(number, int) else None


def required(value: T | None, what: str) -> T:
    """Return ``value``, or say that the platform has no ``what``.

    Raises:
      NotSupportedError: if ``value`` is None.
    """
    if value is None:
        raise NotSupportedError(
            f"{sys.platform} with this Python has no {what}; this operation needs it"
        )
    return value


AF_UNIX: Final = _named("AF_UNIX")
SOL_SOCKET: Final = socket.SOL_SOCKET
SO_ACCEPTCONN: Final = _named("SO_ACCEPTCONN")
SO_PASSCRED: Final = _named("SO_PASSCRED")
SO_PEERCRED: Final = _named("SO_PEERCRED")
SCM_RIGHTS: Final = _named("SCM_RIGHTS")
SCM_CREDENTIALS: Final = _named("SCM_CREDENTIALS")
SCM_CREDS: Final = _named("SCM_CREDS")
# Python names neither of these two; both have had these numbers on every Linux
# architecture since they exist (SCM_PIDFD since 6.5).
SCM_SECURITY: Final = 3 if sys.platform == "linux" else None
SCM_PIDFD: Final = 4 if sys.platform == "linux" else None

# Alpha, MIPS, PA-RISC and SPARC number their socket options in ways of their own.
_GENERIC: Final = sys.platform == "linux" and not platform.machine().lower().startswith(
    ("alpha", "mips", "parisc", "sparc")
)


def _numbered(number: int) -> int | None:
    return number if _GENERIC else None


SO_PEERSEC: Final = _numbered(31)
SO_PEERGROUPS: Final = _numbered(59)  # since Linux 4.13
SO_PASSPIDFD: Final = _numbered(76)  # since Linux 6.5
SO_PEERPIDFD: Final = _numbered(77)  # since Linux 6.5
SO_PASSRIGHTS: Final = _numbered(83)  # since Linux 6.16

MSG_CTRUNC: Final = _named("MSG_CTRUNC") or 0
MSG_DONTWAIT: Final = _named("MSG_DONTWAIT") or 0
MSG_NOSIGNAL: Final = _named("MSG_NOSIGNAL") or 0
MSG_CMSG_CLOEXEC: Final = _named("MSG_CMSG_CLOEXEC") or 0

# No file descriptor or memory is free at the moment.
OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})

# The kernel takes and gives at most this many descriptors in one message (SCM_MAX_FD).
SCM_MAX_FD: Final = 253

HAS_SENDMSG: Final = all(
    hasattr(socket.socket, name) for name in ("sendmsg", "recvmsg")
) and hasattr(socket, "CMSG_SPACE")


def cmsg_space(length: int) -> int:
    """Return the room that a control message with ``length`` bytes of payload takes.

    0 where the platform has no control messages. Source: cmsg(3).
    """
    return socket.CMSG_SPACE(length) if HAS_SENDMSG else 0


# Room for everything that one message can bring: SCM_MAX_FD descriptors, credentials, a
# pidfd, and a security label of up to 256 bytes. With that much room MSG_CTRUNC means one
# thing only: the kernel could not install a descriptor. A larger buffer costs nothing:
# sendmsg + recvmsg + close of one descriptor took 4.71 us with room for 24 bytes and
# 4.78 us with room for 2048.
CONTROL_ROOM: Final = cmsg_space(4 * SCM_MAX_FD) + cmsg_space(84) + cmsg_space(4) + cmsg_space(256)


def free_descriptors() -> int:
    """Return how many more descriptors this process may have; 0 where nobody can tell.

    Source: getrlimit(2) (``RLIMIT_NOFILE``), proc_pid_fd(5); since Linux 6.2 the size of the
    folder is the number of its entries.
    """
    try:
        import resource  # noqa: PLC0415 - not on Windows

        used = os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
    except (ImportError, OSError):
        return 0
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 - 1 if limit == resource.RLIM_INFINITY else limit - used


def effective_user() -> int:
    """Return the effective user id of this process.

    Raises:
      NotSupportedError: where the platform has no user ids.
    """
    return int(required(getattr(os, "geteuid", None), "user ids (os.geteuid)")())


def effective_group() -> int:
    """Return the effective group id of this process.

    Raises:
      NotSupportedError: where the platform has no group ids.
    """
    return int(required(getattr(os, "getegid", None), "group ids (os.getegid)")())


# How many ids there are, and which one stands for those that are mapped to none.
_ALL_IDS: Final = 2**32 - 1
_OVERFLOW: Final = 65534


def is_own_user_id(uid: int) -> bool:
    """Whether a user id that the kernel told is the id of one user.

    In a user namespace, every user from outside is shown as the overflow id (65534). There it
    says nothing about who that is, also if it is mapped to somebody.

    Source: user_namespaces(7), proc_pid_uid_map(5), proc_sys_kernel(5)
    """
    return _is_mapped(uid, "/proc/self/uid_map", "/proc/sys/kernel/overflowuid")


def is_own_group_id(gid: int) -> bool:
    """Whether a group id that the kernel told is the id of one group; see above."""
    return _is_mapped(gid, "/proc/self/gid_map", "/proc/sys/kernel/overflowgid")


def _is_mapped(number: int, map_path: str, overflow_path: str) -> bool:
    try:
        with open(map_path, "rb") as file:
            ranges = [[int(field) for field in line.split()] for line in file]
    except OSError:
        # No Linux, or no /proc: there are no user namespaces to be seen.
        return True
    if [0, _ALL_IDS] in [[start, count] for start, _, count in ranges]:
        # Nobody is outside.
        return True
    try:
        with open(overflow_path, "rb") as file:
            overflow = int(file.read())
    except OSError:
        overflow = _OVERFLOW
    return number != overflow and any(start <= number < start + count for start, _, count in ranges)


def getsockopt_of_any_length(fd: int, level: int, option: int, length: int) -> bytes:
    """Get an option that may take more than the 1024 bytes that Python's getsockopt allows.

    Raises:
      OSError: from getsockopt(2); ERANGE if ``length`` bytes are too few.
    """
    import ctypes  # noqa: PLC0415 - rare: only for peers in more than 256 groups

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
      ValueError: no user has that name.
      NotSupportedError: the platform has no users.
    """
    database = required(_database("pwd"), "users (pwd)")
    try:
        return int(database.getpwnam(name).pw_uid)
    except KeyError:
        raise ValueError(f"no user is called {name!r}") from None


def group_named(name: str) -> int:
    """Return the id of a group.

    Raises:
      ValueError: no group has that name.
      NotSupportedError: the platform has no groups.
    """
    database = required(_database("grp"), "groups (grp)")
    try:
        return int(database.getgrnam(name).gr_gid)
    except KeyError:
        raise ValueError(f"no group is called {name!r}") from None


def name_of_user(uid: int) -> str | None:
    """Return the name of a user, None without one."""
    database = _database("pwd")
    try:
        return None if database is None else str(database.getpwuid(uid).pw_name)
    except (KeyError, OverflowError):
        return None


def name_of_group(gid: int) -> str | None:
    """Return the name of a group, None without one."""
    database = _database("grp")
    try:
        return None if database is None else str(database.getgrgid(gid).gr_name)
    except (KeyError, OverflowError):
        return None
