"""Paths of sockets: names for those that are too long, and errors that say what is at a path.

Invariant: nothing here changes the file system.

Sources: unix(7), connect(2), path_resolution(7), proc_pid_fd(5) (magic links)
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from ._address import escaped
from .errors import AddressInUseError

if TYPE_CHECKING:
    from ._address import UnixSocketAddress

# sockaddr_un has 108 bytes for a path on Linux and 104 elsewhere, with the final NUL.
LONGEST: Final = 107 if sys.platform == "linux" else 103

# Opens a file without permission to read it.
_O_PATH: Final[int | None] = getattr(os, "O_PATH", None)


def absolute(path: bytes) -> bytes:
    """Return a path that stays valid when the working directory changes.

    Not abspath: ".." after a symbolic link is another directory for clients.

    Raises:
      FileNotFoundError: a relative path, and the working directory does not exist anymore.
    """
    return path if path.startswith(b"/") else os.path.join(os.getcwdb(), path)


@contextmanager
def connectable(address: UnixSocketAddress) -> Generator[bytes, None, None]:
    """Yield the name to pass to connect(2): that of the address, or a short one if it is too long.

    The short name refers to a file descriptor, and is valid inside of the block.

    Raises:
      OSError: from open(2); ENAMETOOLONG if this system cannot shorten a path.
    """
    if len(address.native) <= LONGEST or address.get_is_abstract():
        yield address.native
        return
    if _O_PATH is None:
        raise _name_too_long()
    fd = os.open(address.native, _O_PATH | os.O_CLOEXEC)
    try:
        yield path_of_fd(fd)
    finally:
        os.close(fd)


def bindable(directory: bytes, fd: int, name: bytes) -> bytes:
    """Return the name to pass to bind(2) for *name* in a directory that is open as *fd*.

    Raises:
      OSError: ENAMETOOLONG if *name* itself is too long, or this system cannot shorten a path.
    """
    path = os.path.join(directory, name)
    if len(path) > LONGEST:
        path = os.path.join(path_of_fd(fd), name)
    if len(path) > LONGEST:
        raise _name_too_long()
    return path


def path_of_fd(fd: int) -> bytes:
    """Return a path to what a file descriptor refers to.

    Raises:
      OSError: ENAMETOOLONG if /proc is not mounted, or this system has none.
    """
    path = b"/proc/self/fd/%d" % fd
    if _O_PATH is None or not os.path.lexists(path):
        raise _name_too_long()
    return path


def _name_too_long() -> OSError:
    return OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def describe_bind_error(exc: OSError, address: UnixSocketAddress) -> OSError:
    """Return the error of a bind, with the address and the directory that caused it."""
    # Python itself rejects what does not fit into sockaddr_un, without a number.
    number = errno.ENAMETOOLONG if exc.errno is None else exc.errno
    text, more = exc.strerror or os.strerror(number), ""
    if number == errno.ENAMETOOLONG:
        more = _length_limits(address)
    elif address.get_is_abstract():
        if number == errno.EADDRINUSE:
            more = (
                "another socket in this network namespace has this abstract name; "
                "to see its process: ss -xlp"
            )
    elif number in (errno.ENOENT, errno.ENOTDIR):
        more = _missing(address.native)
    elif number in (errno.EACCES, errno.EPERM) and text == os.strerror(number):
        more = _missing(address.native, to_write=True)
    return _error(number, f"{text}: {more}" if more else text, address)


def describe_connect_error(exc: OSError, address: UnixSocketAddress) -> OSError:
    """Return the error of a connect, with the address and what is at the path.

    Type, errno and filename are those of the number.
    """
    return _error(*_explain(exc, address, _CONNECTING), address)


def describe_send_error(exc: OSError, address: UnixSocketAddress) -> tuple[int, str]:
    """Return the errno and the text of an error for a datagram that was sent to an address."""
    return _explain(exc, address, _SENDING)


# What each errno says about a socket, for connecting to a stream socket.
_CONNECTING: Final = {
    errno.ECONNREFUSED: "no process is listening on this socket; is the server running?",
    errno.EPROTOTYPE: "not a stream socket, but one for datagrams or packets",
    errno.EACCES: "to connect takes write permission for the socket",
}
# The same for sending a datagram.
_SENDING: Final = {
    errno.ECONNREFUSED: "no process has this datagram socket open; is the receiver running?",
    errno.EPROTOTYPE: "not a datagram socket, but one for streams or packets",
    errno.EACCES: "to send takes write permission for the socket",
    errno.EPERM: "this socket is connected, and receives from its peer only",
}


def _explain(exc: OSError, address: UnixSocketAddress, reasons: dict[int, str]) -> tuple[int, str]:
    # Python itself rejects what does not fit into sockaddr_un, without a number.
    number = errno.ENAMETOOLONG if exc.errno is None else exc.errno
    text = os.strerror(number)
    if number == errno.ENAMETOOLONG:
        more = _length_limits(address)
    elif address.get_is_abstract():
        more = ""
        if number == errno.ECONNREFUSED:
            use = "is listening on" if reasons is _CONNECTING else "has a datagram socket with"
            more = (
                f"no process in this network namespace {use} this abstract name; "
                f"to see all names: ss {'-xl' if reasons is _CONNECTING else '-xa'}"
            )
        elif number == errno.EPERM:
            more = reasons.get(number, "")
    else:
        more = _about_path(number, address.native, reasons)
    return number, f"{text}: {more}" if more else text


def _error(number: int, text: str, address: UnixSocketAddress) -> OSError:
    # The path itself, for programs; str(OSError) prints its repr, which is escaped.
    filename = str(address) if address.get_is_abstract() else address.get_path()
    if number == errno.EADDRINUSE:
        return AddressInUseError(number, text, filename)
    return OSError(number, text, filename)


def _about_path(number: int, path: bytes, reasons: dict[int, str]) -> str:
    try:
        status = os.lstat(path)
    except OSError:
        return _missing(path) or "no such socket; is the server running, and is this its path?"
    what = what_is(status)
    if stat.S_ISLNK(status.st_mode):
        target = escaped(os.readlink(path))
        try:
            status = os.stat(path)
        except OSError:
            return f"symbolic link to {target}, which does not exist"
        what = f"symbolic link to a {what_is(status)}"
    if not stat.S_ISSOCK(status.st_mode):
        return f"not a socket ({what})"
    reason = reasons.get(number, "")
    return f"{reason} ({_permissions(status)})" if number == errno.EACCES else reason


def _permissions(status: os.stat_result) -> str:
    return (
        f"owner {status.st_uid}, group {status.st_gid}, mode {stat.S_IMODE(status.st_mode):o}; "
        f"this process is user {os.geteuid()}, group {os.getegid()}"
    )


def _length_limits(address: UnixSocketAddress) -> str:
    if address.get_is_abstract():
        return f"an abstract name has at most {LONGEST} bytes"
    text = f"the address of a socket holds {LONGEST} bytes on {sys.platform}"
    if _O_PATH is not None and not os.path.lexists(b"/proc/self/fd"):
        text += ", and longer paths require /proc, which is not mounted"
    return f"{text}; the name of a file holds 255 bytes; choose a shorter path"


def _missing(path: bytes, *, to_write: bool = False) -> str:
    """Name the directory of a path that is missing or not permitted; "" if there is none."""
    try:
        path = absolute(path)
    except OSError:
        return "the working directory of this process does not exist anymore"
    directories = [os.path.dirname(path)]
    while directories[-1] != os.path.dirname(directories[-1]):
        directories.append(os.path.dirname(directories[-1]))
    for directory in reversed(directories):
        name = escaped(directory)
        try:
            status = os.stat(directory)
        except OSError as exc:
            return f"directory {name}: {exc.strerror}"
        if not stat.S_ISDIR(status.st_mode):
            return f"{name} is not a directory ({what_is(status)})"
        needs = os.X_OK | (os.W_OK if to_write and directory == directories[0] else 0)
        effective = os.access in os.supports_effective_ids
        if not os.access(directory, needs, effective_ids=effective):
            verb = "write to" if needs & os.W_OK else "enter"
            return f"no permission to {verb} directory {name} ({_permissions(status)})"
    return ""


def what_is(status: os.stat_result) -> str:
    """Return the kind of a file."""
    kinds = (
        (stat.S_ISSOCK, "socket"),
        (stat.S_ISREG, "regular file"),
        (stat.S_ISDIR, "directory"),
        (stat.S_ISLNK, "symbolic link"),
        (stat.S_ISFIFO, "FIFO"),
    )
    return next((name for is_one, name in kinds if is_one(status.st_mode)), "device")
