"""How a socket gets its path, and how the path is removed.

What we want: at every moment, even if this process is killed, the path leads to one whole server
or to what was there before. Nothing is replaced but a socket that no process holds, unless the
caller asks for it. No other user gets in before the socket has its owner and mode. Other programs
see the path as the name of the socket (getsockname).

How the path is taken:

- Nothing is there, or a socket that no process holds. That one is unlinked, and the socket is
  bound at the path itself. A client that connects between bind and listen gets ECONNREFUSED, and
  between unlink and bind ENOENT: as before, no server is there. If this process is killed in
  between, it leaves a socket that no process holds, and the next server replaces it.
- A server is there, and the caller said replace=True. The socket is bound at a temporary name
  beside the path (``.NAME.new``), listens, and is renamed over the path. Connecting never fails,
  but the kernel keeps the temporary name as the name of the socket. A NAME that does not fit into
  the address of a socket takes this way too, with link(2) if nothing is at the path, which
  replaces nothing.

Whether a process holds a socket is asked by connecting a datagram socket to it: Linux answers
ECONNREFUSED if none does, and EPROTOTYPE if a stream socket is there. The server does not see
this in its queue, and a server between bind and listen counts as one. Only the error for the
caller, which names the pid of the server, takes a connection.

How the mode is set: fchmod(2) on the socket before bind, so that the file has never more
permissions than that. chmod on the path before listen would be too late: connect(2) checks
permissions first, can then sleep, and looks afterwards whether the socket listens. What the umask
has removed is added after bind. If an owner or group is to be set, only the owner has permissions
until then.

The lock: between looking at the path and changing it, another server could do the same. So every
process that takes or removes the path holds a flock(2) on a file beside it (``.NAME.lock``)
for that time, milliseconds. The kernel unlocks it if the process is killed. Considered and
rejected: a lock on the directory, because every user that can read /run could then block every
server in it, and because programs lock directories against systemd-tmpfiles; an abstract socket,
because other network namespaces do not see it; a file that always stays. The lock file is made
and removed by its holder:

- It is empty and has the sticky bit from its creation on, so that it can be told from a file of
  the user with the same name. That one is locked too, but never removed.
- After getting the lock, the file must still be at its name; else the lock excludes no process.
  It is removed only by the process that holds it, and only if it is still at its name.
- A lock that cannot be opened is an error. One that stays held is a :exc:`LockHeldError`, and it
  is for the caller to retry for a limited time.

Functions that are not async block for as long as the file system takes, and run in a thread.

Invariant: nothing is unlinked, renamed over or changed that is not a socket of ours, a socket
that no process holds, or a lock file of this module.

Sources: bind(2), connect(2), rename(2), link(2), flock(2), unix(7), proc_locks(5)
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import stat
import sys
import time
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager, suppress
from typing import Final, TypeVar

import attrs
import trio

from . import _kernel
from ._address import UnixSocketAddress, escaped
from ._credentials import peer_credentials
from ._paths import (
    absolute,
    bindable,
    connectable,
    describe_bind_error,
    path_of_fd,
    what_is,
)
from .errors import AddressInUseError, NotSupportedError

T = TypeVar("T")

# The name of a file has at most 255 bytes; for a longer one than this, the lock's is a digest.
_LONGEST_NAME: Final = 60
# Opens a directory that can be entered and written to, but not listed.
_O_DIRECTORY: Final[int] = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0)
# Nothing else makes an empty file that only its owner can open and that has the sticky bit.
_LOCK_MODE: Final = stat.S_ISVTX | 0o600


# Between two attempts to get the lock of a path, in seconds.
INITIAL_BACKOFF: Final = 0.001
MAX_BACKOFF: Final = 0.05
# How long to retry while another process holds the lock of a path, in seconds. It needs it for
# milliseconds, unless the file system is slow.
LOCK_TIMEOUT: Final = 10.0
# The same for aclose(), which cannot be cancelled, and for a free file descriptor there.
CLOSE_LOCK_TIMEOUT: Final = 2.0
# What is at a path.
_FREE: Final = "nothing"
_DEAD: Final = "a socket that no process holds"
_LIVE: Final = "a socket that a process holds"


class LockHeldError(Exception):
    """Another process or thread holds the lock; nothing was done, and a retry may succeed."""

    def __init__(self, lock: bytes, status: os.stat_result | None = None) -> None:
        super().__init__(lock, status)
        self.lock = lock
        self.status = status

    def describe(self) -> str:
        """Return which file it is, its owner, the process that holds it, and what to do."""
        text = f"another process keeps the lock of this path, {escaped(self.lock)}"
        if self.status is not None:
            text += f", a file of user {self.status.st_uid}"
            pid = _pid_of_lock(self.status)
            if pid is not None:
                text += f", locked by pid {pid}"
        return f"{text}; if no server is starting or ending there, remove that file"


@attrs.frozen
class Binding:
    """A path that leads to a socket of ours.

    Attributes:
      path: absolute.
      device, inode: of the socket's file.
    """

    path: bytes
    device: int
    inode: int


@attrs.frozen
class Permissions:
    """What the file of a socket gets before any process can connect.

    Attributes:
      mode: the permission bits; None: those that the umask leaves.
      owner, group: ids; None: those that the system chooses.
    """

    mode: int | None = None
    owner: int | None = None
    group: int | None = None


@attrs.frozen
class _Location:
    """The directory of a path, open as *fd*, and the name of the socket in it."""

    path: bytes
    directory: bytes
    fd: int
    name: bytes

    def stat(self, name: bytes) -> os.stat_result:
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def unlink(self, name: bytes) -> None:
        os.unlink(name, dir_fd=self.fd)

    def path_of(self, name: bytes) -> bytes:
        return os.path.join(self.directory, name)


def bind(
    sock: socket.socket,
    path: bytes,
    permissions: Permissions,
    listen: Callable[[], object],
    *,
    replace: bool,
) -> Binding:
    """Bind a socket to a path, and make it listen.

    Args:
      listen: sets what must be set before any process can connect, and listens.
      replace: whether the path may be taken from a server that is alive.

    Raises:
      LockHeldError: nothing was done.
      AddressInUseError: something is at the path, or beside it, that is not to be replaced.
      OSError: from the file system; the socket's file is removed.
    """
    with _place_of(absolute(path)) as place, _locked(place):
        before = _look(place, replace=replace)
        name, temporary = place.name, _beside(place.name, b".new")
        address = None if before == _LIVE else _bindable(place, name)
        if address is None:
            name = temporary
            if not _remove_leftover(place, name):
                raise _not_free(place, name)
            address = bindable(place.directory, place.fd, name)
        else:
            # What a process that was killed while it took over has left.
            with suppress(OSError):
                _remove_leftover(place, temporary)
            if before == _DEAD:
                _unlink_dead(place, name)
        status = _bind_with(sock, place, name, address, permissions)
        try:
            _set_permissions(place, name, status, permissions)
            listen()
            if name == temporary:
                _move(place, name, replace=before != _FREE)
        except BaseException:
            _unlink_same(place, name, status)
            raise
        return Binding(place.path, status.st_dev, status.st_ino)


def check(path: bytes, permissions: Permissions) -> None:
    """Find out whether a socket could take a path now, even from a live server.

    Nothing changes at the path. A socket is bound beside it, gets its permissions, and is removed.

    Raises:
      As ``bind``.
    """
    family = _kernel.required(_kernel.AF_UNIX, "Unix sockets")
    with (
        _place_of(absolute(path)) as place,
        _locked(place),
        socket.socket(family, socket.SOCK_STREAM) as sock,
    ):
        _look(place, replace=True)
        name = _beside(place.name, b".new")
        if not _remove_leftover(place, name):
            raise _not_free(place, name)
        address = bindable(place.directory, place.fd, name)
        status = _bind_with(sock, place, name, address, permissions)
        try:
            _set_permissions(place, name, status, permissions)
        finally:
            _unlink_same(place, name, status)


def unbind(binding: Binding) -> None:
    """Remove the path if it still leads to our socket, which must still be open.

    While it is open, its inode is not used again.

    Raises:
      LockHeldError: nothing was done.
      OSError: from the file system.
    """
    try:
        with _place_of(binding.path) as place, _locked(place):
            status = place.stat(place.name)
            if (status.st_dev, status.st_ino) == (binding.device, binding.inode):
                place.unlink(place.name)
    except (FileNotFoundError, NotADirectoryError):
        # The path, or its whole directory, was removed.
        return


@contextmanager
def _place_of(path: bytes) -> Generator[_Location, None, None]:
    directory, name = os.path.split(path)
    fd = os.open(directory, _O_DIRECTORY | os.O_CLOEXEC)
    try:
        # A path that ends with a slash is that of a directory.
        yield _Location(path, directory, fd, name or b".")
    finally:
        os.close(fd)


def _beside(name: bytes, ending: bytes) -> bytes:
    if len(name) > _LONGEST_NAME:
        name = name[:20] + b"." + hashlib.sha256(name).hexdigest()[:32].encode()
    return b"." + name + ending


def _bindable(place: _Location, name: bytes) -> bytes | None:
    """Return the name to pass to bind(2); None if it is too long, and a shorter one is needed."""
    try:
        return bindable(place.directory, place.fd, name)
    except OSError:
        return None


def _look(place: _Location, *, replace: bool) -> str:
    """Return what is at the path; raise if it must not be replaced."""
    try:
        status = place.stat(place.name)
    except FileNotFoundError:
        return _FREE
    if not stat.S_ISSOCK(status.st_mode):
        raise _in_use(
            place,
            f"not a socket ({what_is(status)}), so it is not replaced; remove it, or choose "
            "another path",
        )
    holder = _holder_of(place.path)
    if holder is None:
        return _DEAD
    if not replace:
        raise _in_use(place, _server_at(place.path) or holder)
    return _LIVE


def _holder_of(path: bytes) -> str | None:
    """Say how it is known that a process holds the socket at a path; None if none does."""
    with _probe(socket.SOCK_DGRAM) as probe:
        try:
            with connectable(UnixSocketAddress.path(path)) as name:
                probe.connect(name)
        except FileNotFoundError:
            return None
        except ConnectionRefusedError:
            # The same answer from a kernel that looks for datagram sockets only must not cost a
            # live server its path. If none is there, this leaves no trace either.
            return _server_at(path)
        except OSError as exc:
            if exc.errno == errno.EPROTOTYPE:
                return "a process holds this socket, which is not listening"
            if exc.errno == errno.EACCES:
                return (
                    "no permission to find out whether a process holds this socket; if none "
                    "does, remove it"
                )
            # A datagram socket that is connected to another one.
            if exc.errno != errno.EPERM:
                raise
    return "a socket for datagrams or packets is in use there"


def _server_at(path: bytes) -> str | None:
    """Say which process listens on the socket at a path; None if none does."""
    with _probe(socket.SOCK_STREAM) as probe:
        try:
            with connectable(UnixSocketAddress.path(path)) as name:
                probe.connect(name)
        except BlockingIOError:
            return "a server is listening there, and its queue is full"
        except OSError as exc:
            if exc.errno == errno.EPROTOTYPE:
                return "a socket for datagrams or packets is in use there"
            return None
        try:
            peer = peer_credentials(probe.getsockopt)
        except NotSupportedError:
            return "a server is listening there"
        return f"a server is listening there (pid {peer.pid}, uid {peer.uid})"


def _probe(kind: socket.SocketKind) -> socket.socket:
    sock = socket.socket(_kernel.required(_kernel.AF_UNIX, "Unix sockets"), kind)
    sock.setblocking(False)
    return sock


def _unlink_dead(place: _Location, name: bytes) -> None:
    """Remove a socket that no process holds."""
    try:
        place.unlink(name)
    except FileNotFoundError:
        pass
    except PermissionError as exc:
        # In a sticky directory, only its owner can.
        status = place.stat(name)
        raise OSError(
            exc.errno,
            f"{exc.strerror}: {escaped(place.path_of(name))} is a socket of user {status.st_uid} "
            "that no process holds, and this process cannot remove it; remove it as that user",
            os.fsdecode(place.path),
        ) from exc


def _remove_leftover(place: _Location, name: bytes) -> bool:
    """Remove what a process that was killed left at the temporary name.

    Returns:
      Whether nothing is there now.
    """
    try:
        status = place.stat(name)
    except FileNotFoundError:
        return True
    if not stat.S_ISSOCK(status.st_mode) or _holder_of(place.path_of(name)) is not None:
        return False
    _unlink_dead(place, name)
    return True


def _not_free(place: _Location, name: bytes) -> AddressInUseError:
    path, status = place.path_of(name), place.stat(name)
    why = f"a {what_is(status)} of user {status.st_uid}"
    if stat.S_ISSOCK(status.st_mode):
        why += f": {_server_at(path) or _holder_of(path)}"
    return _in_use(
        place,
        f"the new socket needs the temporary name {escaped(path)}, where there is {why}; "
        "remove it, or choose another path",
    )


def _bind_with(
    sock: socket.socket, place: _Location, name: bytes, address: bytes, permissions: Permissions
) -> os.stat_result:
    if permissions.mode is not None:
        mode = permissions.mode
        if permissions.owner is not None or permissions.group is not None:
            mode &= stat.S_IRWXU
        # macOS has no fchmod for sockets.
        with suppress(OSError):
            os.fchmod(sock.fileno(), mode)
    try:
        sock.bind(address)
    except OSError as exc:
        if exc.errno != errno.EADDRINUSE:
            raise
        raise _in_use(
            place, f"another process has just created {escaped(place.path_of(name))}"
        ) from exc
    status = place.stat(name)
    if not stat.S_ISSOCK(status.st_mode) or status.st_nlink != 1:
        raise _replaced(place, name)
    return status


def _set_permissions(
    place: _Location, name: bytes, status: os.stat_result, permissions: Permissions
) -> None:
    """Set owner, group and mode of the new socket, and of nothing that has replaced it."""
    mode, owner, group = permissions.mode, permissions.owner, permissions.group
    is_changed = not (owner is None and group is None)
    if mode is None or (not is_changed and stat.S_IMODE(status.st_mode) == mode):
        return
    if not hasattr(os, "O_PATH"):
        # macOS: by name.
        path = place.path_of(name)
        if is_changed:
            _chown(place, path, owner, group)
        os.chmod(path, mode)
        return
    # chmod(2) and chown(2) would follow a symbolic link.
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place.fd)
    try:
        if not os.path.samestat(os.fstat(fd), status):
            raise _replaced(place, name)
        try:
            path = path_of_fd(fd)
        except OSError:
            raise OSError(
                errno.EOPNOTSUPP,
                f"cannot set owner or mode of the socket without /proc (mode {mode:o} is asked "
                f"for, the umask leaves {stat.S_IMODE(status.st_mode):o}); mount /proc, or choose "
                "the umask and omit owner and group",
                os.fsdecode(place.path),
            ) from None
        if is_changed:
            _chown(place, path, owner, group)
        os.chmod(path, mode)
    finally:
        os.close(fd)


def _chown(place: _Location, path: bytes, owner: int | None, group: int | None) -> None:
    try:
        os.chown(path, -1 if owner is None else owner, -1 if group is None else group)
    except PermissionError as exc:
        raise OSError(
            exc.errno,
            f"{exc.strerror}: cannot set owner={owner}, group={group} of the socket; this process "
            f"is user {os.geteuid()}, and only root can set any owner and group",
            os.fsdecode(place.path),
        ) from exc


def _move(place: _Location, name: bytes, *, replace: bool) -> None:
    """Move the socket from its temporary name to the path."""
    if replace:
        try:
            os.rename(name, place.name, src_dir_fd=place.fd, dst_dir_fd=place.fd)
        except PermissionError as exc:
            status = place.stat(place.name)
            raise OSError(
                exc.errno,
                f"{exc.strerror}: cannot replace the socket of user {status.st_uid}; in a sticky "
                "directory, only that user can",
                os.fsdecode(place.path),
            ) from exc
        return
    try:
        # Unlike rename, link replaces nothing.
        os.link(name, place.name, src_dir_fd=place.fd, dst_dir_fd=place.fd, follow_symlinks=False)
    except FileExistsError as exc:
        raise _in_use(place, f"another process has just created {escaped(place.path)}") from exc
    place.unlink(name)


def _unlink_same(place: _Location, name: bytes, status: os.stat_result) -> None:
    with suppress(OSError):
        if os.path.samestat(place.stat(name), status):
            place.unlink(name)


@contextmanager
def _locked(place: _Location) -> Generator[None, None, None]:
    import fcntl  # not on Windows

    name = _beside(place.name, b".lock")
    fd = _open_lock(place, name)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _no_lock(place, name, OSError(errno.EEXIST, os.strerror(errno.EEXIST)))
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockHeldError(place.path_of(name), status) from None
        try:
            if not _is_at(place, name, status):
                # Its last holder has removed it, so that this lock excludes no process.
                raise LockHeldError(place.path_of(name))
            yield
        finally:
            if status.st_mode & stat.S_ISVTX and not status.st_size:
                # In a sticky directory it may belong to another user, and stays.
                with suppress(OSError):
                    if _is_at(place, name, status):
                        place.unlink(name)
            # Closing is not enough: a process that was forked in that time has a copy.
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def _is_at(place: _Location, name: bytes, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(place.stat(name), status)
    except FileNotFoundError:
        return False


def _open_lock(place: _Location, name: bytes) -> int:
    # Without O_CREAT first: the kernel refuses that even to root for a file of another user in a
    # sticky directory (fs.protected_regular). O_NONBLOCK: it may be a FIFO.
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(name, os.O_RDWR | flags, dir_fd=place.fd)
    except FileNotFoundError:
        pass
    except PermissionError:
        # To lock takes no permission to write.
        try:
            return os.open(name, os.O_RDONLY | flags, dir_fd=place.fd)
        except OSError as exc:
            raise _no_lock(place, name, exc) from exc
    except OSError as exc:
        raise _no_lock(place, name, exc) from exc
    try:
        return os.open(
            name, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, _LOCK_MODE, dir_fd=place.fd
        )
    except FileExistsError:
        raise LockHeldError(place.path_of(name)) from None


def _no_lock(place: _Location, name: bytes, exc: OSError) -> OSError:
    try:
        status = place.stat(name)
    except OSError:
        return exc
    return OSError(
        exc.errno,
        f"{exc.strerror}: the lock of this path, {escaped(place.path_of(name))}, is a "
        f"{what_is(status)} of user {status.st_uid} that this process cannot lock; remove it if no "
        "server is starting there",
        os.fsdecode(place.path),
    )


def _pid_of_lock(status: os.stat_result) -> int | None:
    """Return the pid of the process that has locked a file, if the kernel reports it."""
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        with open("/proc/locks", encoding="ascii", errors="replace") as locks:
            for line in locks:
                # "1: FLOCK ADVISORY WRITE 1234 fe:00:5678 0 EOF"; a process that waits has "->".
                fields = line.split()
                if fields[1] == "FLOCK" and fields[5] == device and int(fields[4]) > 0:
                    return int(fields[4])
    except OSError:
        # The caller describes another error, which must be reported without /proc, too (ENOENT,
        # EACCES), and without a free file descriptor (EMFILE).
        return None
    return None


def _replaced(place: _Location, name: bytes) -> OSError:
    return OSError(
        errno.EBUSY,
        f"{escaped(place.path_of(name))} was replaced by another process before it was set up",
        os.fsdecode(place.path),
    )


def _in_use(place: _Location, why: str) -> AddressInUseError:
    return AddressInUseError(
        errno.EADDRINUSE, f"{os.strerror(errno.EADDRINUSE)}: {why}", os.fsdecode(place.path)
    )


async def retry(
    work: Callable[[], T], timeout: float, *, or_on: Collection[int | None] = frozenset()
) -> T:
    """Run *work* in a thread, and again while another process holds the lock.

    Time is real time: other processes know nothing of a trio clock that jumps.

    Args:
      timeout: in seconds; after that, the last error is raised.
      or_on: numbers of errors to retry on, too.
    """
    backoff, deadline = INITIAL_BACKOFF, time.monotonic() + timeout
    # Not trio's default limiter, whose threads may all be waiting for something.
    limiter = trio.CapacityLimiter(1)
    while True:
        try:
            return await trio.to_thread.run_sync(work, limiter=limiter)
        except (LockHeldError, OSError) as exc:
            if isinstance(exc, OSError) and exc.errno not in or_on:
                raise
            if time.monotonic() >= deadline:
                raise
        await trio.to_thread.run_sync(time.sleep, backoff, limiter=limiter, abandon_on_cancel=True)
        backoff = min(2 * backoff, MAX_BACKOFF)


async def bind_path(
    sock: socket.socket,
    address: UnixSocketAddress,
    permissions: Permissions,
    listen: Callable[[], object],
    *,
    replace: bool,
) -> Binding:
    """Bind a socket to a path.

    Raises:
      AddressInUseError: something is at the path, or another process keeps its lock.
      OSError: from the file system.
    """
    return await _retry_at(
        address, lambda: bind(sock, address.native, permissions, listen, replace=replace)
    )


async def check_path(address: UnixSocketAddress, permissions: Permissions) -> None:
    """Find out whether a path could be taken now, even from a live server.

    Raises:
      As :func:`bind_path`.
    """
    await _retry_at(address, lambda: check(address.native, permissions))


async def _retry_at(address: UnixSocketAddress, work: Callable[[], T]) -> T:
    try:
        return await retry(work, LOCK_TIMEOUT)
    except LockHeldError as exc:
        raise AddressInUseError(
            errno.EADDRINUSE,
            f"{os.strerror(errno.EADDRINUSE)}: {exc.describe()}",
            address.get_path(),
        ) from exc
    except AddressInUseError:
        raise
    except OSError as exc:
        raise describe_bind_error(exc, address) from exc


async def unbind_quietly(binding: Binding) -> None:
    """Remove the path of a socket that is about to be closed, if that is possible."""
    with suppress(LockHeldError, OSError):
        await retry(lambda: unbind(binding), CLOSE_LOCK_TIMEOUT, or_on=_kernel.OUT_OF_RESOURCES)


def bind_abstract(sock: socket.socket, address: UnixSocketAddress) -> None:
    """Bind a socket to an abstract name, or to one that the kernel chooses (autobind).

    Raises:
      NotSupportedError: the system has no abstract names.
      OSError: from bind(2).
    """
    if sys.platform != "linux":
        raise NotSupportedError("abstract and automatic names of sockets require Linux; use a path")
    try:
        sock.bind(address.native)
    except OSError as exc:
        raise describe_bind_error(exc, address) from exc
