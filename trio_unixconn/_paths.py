"""Paths of sockets: how to name one that is too long, and what is there when it fails.

The rule of this file: it looks and explains, and changes nothing in the file system.

Sources: unix(7), connect(2), path_resolution(7), proc_pid_fd(5) (magic links)
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Generator

    from ._address import UnixSocketAddress

# sockaddr_un has 108 bytes for a path on Linux and 104 elsewhere, with the final NUL.
LONGEST: Final = 107 if sys.platform == "linux" else 103

# Opens what is at a path without any right to read it.
_O_PATH: Final[int | None] = getattr(os, "O_PATH", None)


@contextmanager
def connectable(address: UnixSocketAddress) -> Generator[bytes, None, None]:
    """Give the name to pass to connect(2): the address's own, or a short one if it is too long.

    The short one goes through a descriptor of the socket's file, and ends with the block.

    Raises:
      OSError: from open(2); ENAMETOOLONG where the system has no such descriptors.
    """
    if len(address.native) <= LONGEST or address.get_is_abstract():
        yield address.native
        return
    if _O_PATH is None:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    fd = os.open(address.native, _O_PATH | os.O_CLOEXEC)
    try:
        yield b"/proc/self/fd/%d" % fd
    finally:
        os.close(fd)


@contextmanager
def bindable(folder: bytes, fd: int, name: bytes) -> Generator[bytes, None, None]:
    """Give the name to pass to bind(2) for a file in ``folder``, on which ``fd`` is open.

    Raises:
      OSError: ENAMETOOLONG where the system has no way for a long one.
    """
    path = os.path.join(folder, name)
    if len(path) <= LONGEST:
        yield path
    elif _O_PATH is None:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    else:
        # Long names of files are made short by the caller.
        yield b"/proc/self/fd/%d/%s" % (fd, name)


def describe_bind_error(exc: OSError, address: UnixSocketAddress) -> OSError:
    """Return the error of a bind, with the address, and which folder it is about."""
    number = errno.ENAMETOOLONG if exc.errno is None else exc.errno
    text, more = exc.strerror or os.strerror(number), ""
    if address.get_is_abstract():
        more = {
            errno.EADDRINUSE: "a socket in this network namespace has that abstract name; see who "
            "with: ss -xlp",
            errno.ENAMETOOLONG: f"an abstract name has at most {LONGEST} bytes",
        }.get(number, "")
    elif number in (errno.ENOENT, errno.ENOTDIR):
        more = _missing(address.native)
    elif number in (errno.EACCES, errno.EPERM) and text == os.strerror(number):
        more = _missing(address.native, to_write=True)
    elif number == errno.ENAMETOOLONG:
        more = _too_long()
    return OSError(number, f"{text}: {more}" if more else text, str(address))


def describe_connect_error(exc: OSError, address: UnixSocketAddress) -> OSError:
    """Return the error of a connect, with the address and what is there.

    Its type, errno and filename are those that the number stands for.
    """
    number = exc.errno
    if number is None:
        # Python itself refuses what does not fit into sockaddr_un, without a number.
        number = errno.ENAMETOOLONG
    text = os.strerror(number)
    if address.get_is_abstract():
        more = {
            errno.ECONNREFUSED: "no process in this network namespace listens at that abstract "
            "name; start the server, or look for it with: ss -xl",
            errno.ENAMETOOLONG: f"an abstract name has at most {LONGEST} bytes",
        }.get(number, "")
    else:
        more = _about_path(number, address.native)
    return OSError(number, f"{text}: {more}" if more else text, str(address))


def _about_path(number: int, path: bytes) -> str:
    if number == errno.ENAMETOOLONG:
        return _too_long()
    try:
        status = os.lstat(path)
    except OSError:
        return _missing(path) or "nothing is there; is the server running, and is this its path?"
    what = what_is(status)
    if stat.S_ISLNK(status.st_mode):
        try:
            status = os.stat(path)
        except OSError:
            return f"it is a symbolic link to {os.fsdecode(os.readlink(path))}, which is not there"
        what = f"a symbolic link to {what_is(status)}"
    if not stat.S_ISSOCK(status.st_mode):
        return f"it is {what}, and no socket"
    return {
        errno.ECONNREFUSED: "nobody listens on the socket there: its server has ended, or has not "
        "begun to listen yet; start the server",
        errno.EPROTOTYPE: "the socket there is no stream socket but one for datagrams or packets",
        errno.EACCES: f"the socket belongs to user {status.st_uid}, group {status.st_gid}, with "
        f"mode {stat.S_IMODE(status.st_mode):o}, and whoever connects needs to write to it; this "
        f"process is user {os.geteuid()}, group {os.getegid()}",
    }.get(number, "")


def _too_long() -> str:
    return (
        f"a name of at most {LONGEST} bytes fits into a socket's address on {sys.platform}, and of "
        "at most 255 bytes into a folder; choose a shorter path"
    )


def _missing(path: bytes, *, to_write: bool = False) -> str:
    """Say which folder of a path is not there or may not be passed; "" if that is not it."""
    try:
        # Not abspath: ".." behind a symbolic link leads elsewhere.
        path = os.path.join(os.getcwdb(), path)
    except OSError:
        return "the working folder of this process is not there any more"
    folders = [os.path.dirname(path)]
    while folders[-1] != os.path.dirname(folders[-1]):
        folders.append(os.path.dirname(folders[-1]))
    for folder in reversed(folders):
        name = os.fsdecode(folder)
        try:
            status = os.stat(folder)
        except OSError as exc:
            return f"the folder {name}: {exc.strerror}"
        if not stat.S_ISDIR(status.st_mode):
            return f"{name} is {what_is(status)}, and no folder"
        needs = os.X_OK | (os.W_OK if to_write and folder == folders[0] else 0)
        effective = os.access in os.supports_effective_ids
        if not os.access(folder, needs, effective_ids=effective):
            return (
                f"the folder {name} belongs to user {status.st_uid}, group {status.st_gid}, with "
                f"mode {stat.S_IMODE(status.st_mode):o}, and this process is user "
                f"{os.geteuid()}, group {os.getegid()}"
            )
    return ""


def what_is(status: os.stat_result) -> str:
    """Name a kind of file."""
    kinds = (
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISREG, "a regular file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISFIFO, "a FIFO"),
    )
    return next((name for is_one, name in kinds if is_one(status.st_mode)), "a device")
