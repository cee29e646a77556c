"""How a listening socket gets its path, and how the path is taken away again.

The rule of this file: at every moment, and also if this process is killed at it, the path
leads to one whole server or to what was there before; what the path leads to is replaced only
if it is a socket on which nobody listens, or if the caller said so.

The socket is bound under a temporary name beside the path, gets its mode, listens, and only
then gets the path, in one step. Whoever does this, or takes the path away, holds a lock, a file
beside the path that the kernel unlocks when its holder dies; whoever holds it clears away what
the dead have left. All functions here block, for as long as the file system takes, and belong
into a thread.

Sources: bind(2), rename(2), link(2), flock(2), unix(7)
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

import attrs

from . import _kernel
from ._address import UnixSocketAddress
from ._credentials import peer_credentials
from ._paths import bindable, connectable, what_is
from .errors import AddressInUseError, NotSupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

# Names of files have at most 255 bytes; a longer one than this gets a digest for a companion.
_LONGEST_NAME: Final = 60
# Opens a folder that may be passed and written to, but not listed.
_TO_PASS: Final[int] = getattr(os, "O_PATH", os.O_RDONLY)


class LockHeldError(Exception):
    """Another process, or thread, is at the same path at this moment; try again soon."""


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


def bind(
    sock: socket.socket,
    path: bytes,
    mode: int,
    listen: Callable[[], None],
    *,
    replace: bool,
) -> Binding:
    """Bind ``sock``, have it listen, and give it the path.

    Args:
      mode: the permission bits of the path.
      listen: sets what is to be set before anybody can connect, and listens.
      replace: whether the path may be taken from a server that is alive.

    Raises:
      LockHeldError: try again; nothing was done.
      AddressInUseError: something is there that is not to be replaced.
      OSError: from the file system; nothing is left behind.
    """
    # The working folder may be another one when the path is taken away. Not abspath: ".." behind
    # a symbolic link leads elsewhere for those who connect.
    path = os.path.join(os.getcwdb(), path)
    with _folder_of(path) as (folder, fd, name), _locked(fd, name):
        is_free = _check_replaceable(fd, name, path, replace=replace)
        temporary = _beside(name, b".new")
        _clear_away(temporary, fd, path)
        with bindable(folder, fd, temporary) as address:
            sock.bind(address)
        try:
            # Nobody can connect before listen (ECONNREFUSED), so the mode is never too wide,
            # and the process's umask is left alone.
            _set_mode(temporary, mode, fd)
            listen()
            status = os.stat(temporary, dir_fd=fd, follow_symlinks=False)
            if is_free:
                _link(temporary, name, fd, path)
            else:
                os.rename(temporary, name, src_dir_fd=fd, dst_dir_fd=fd)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=fd)
        return Binding(path, status.st_dev, status.st_ino)


def unbind(binding: Binding) -> None:
    """Take the path away if it still leads to our socket, which must be open still.

    Raises:
      LockHeldError: try again.
      OSError: from the file system.
    """
    try:
        with _folder_of(binding.path) as (_, fd, name), _locked(fd, name):
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if (status.st_dev, status.st_ino) == (binding.device, binding.inode):
                os.unlink(name, dir_fd=fd)
    except (FileNotFoundError, NotADirectoryError):
        # Somebody else has taken it away, or the whole folder.
        return


def _set_mode(name: bytes, mode: int, folder: int) -> None:
    """Set the mode of a socket, and of nothing that somebody has put in its place."""
    if not hasattr(os, "O_PATH"):
        os.chmod(name, mode, dir_fd=folder)
        return
    # chmod itself would follow a symbolic link there.
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise OSError(errno.EBUSY, "the socket was replaced while its mode was to be set")
        os.chmod(f"/proc/self/fd/{fd}", mode)
    finally:
        os.close(fd)


@contextmanager
def _folder_of(path: bytes) -> Generator[tuple[bytes, int, bytes], None, None]:
    folder, name = os.path.split(path)
    # A path with a slash behind it is that of a folder.
    name = name or b"."
    fd = os.open(folder, _TO_PASS | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield folder, fd, name
    finally:
        os.close(fd)


def _beside(name: bytes, ending: bytes) -> bytes:
    if len(name) > _LONGEST_NAME:
        name = name[:20] + b"." + hashlib.sha256(name).hexdigest()[:32].encode()
    return b"." + name + ending


@contextmanager
def _locked(folder: int, name: bytes) -> Generator[None, None, None]:
    import fcntl  # noqa: PLC0415 - not on Windows

    lock = _beside(name, b".lock")
    fd = _open_lock(lock, folder)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockHeldError from None
        if not _is_still(fd, lock, folder):
            # Whoever held it before has taken the file away: this locks nobody out. Not tried
            # again here, where it could not be cancelled.
            raise LockHeldError
        try:
            yield
        finally:
            # Somebody may have taken it away, or in a sticky folder it may be another user's.
            # It only matters while it is locked.
            with suppress(OSError):
                os.unlink(lock, dir_fd=folder)
    finally:
        # A process that was forked meanwhile may hold a copy; closing ours is not enough.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _open_lock(lock: bytes, folder: int) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(lock, flags, 0o600, dir_fd=folder)
    except OSError as exc:
        try:
            status = os.stat(lock, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            raise exc from None
        raise OSError(
            exc.errno,
            f"{exc.strerror}: the lock beside it, {os.fsdecode(lock)}, is {what_is(status)} of "
            f"user {status.st_uid} that this process cannot open; remove it if no server of that "
            "user is starting",
        ) from exc


def _is_still(fd: int, name: bytes, folder: int) -> bool:
    try:
        there = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(fd))


def _clear_away(temporary: bytes, folder: int, path: bytes) -> None:
    """Remove what one that was killed left: whoever makes one holds the lock, as we do."""
    try:
        status = os.stat(temporary, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise _in_use(
            path,
            f"{what_is(status)} is at {os.fsdecode(temporary)} beside it, where the socket is made "
            "before it gets the path; remove it, or choose another path",
        )
    os.unlink(temporary, dir_fd=folder)


def _check_replaceable(folder: int, name: bytes, path: bytes, *, replace: bool) -> bool:
    """Return whether nothing is at the path; raise if it must not be replaced."""
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return True
    if not stat.S_ISSOCK(status.st_mode):
        raise _in_use(
            path,
            f"{what_is(status)} is there, which is not replaced; remove it, or choose another path",
        )
    if not replace:
        holder = _listener_at(path)
        if holder is not None:
            raise _in_use(path, holder)
    return False


def _listener_at(path: bytes) -> str | None:
    """Say who listens at a path; None if nobody does."""
    address = UnixSocketAddress.path(path)
    with socket.socket(_kernel.required(_kernel.AF_UNIX, "Unix sockets")) as probe:
        probe.setblocking(False)
        try:
            with connectable(address) as name:
                probe.connect(name)
        except (ConnectionRefusedError, FileNotFoundError):
            return None
        except BlockingIOError:
            return "a server listens there, and its queue is full"
        except OSError as exc:
            if exc.errno == errno.EPROTOTYPE:
                return "a socket for datagrams or packets is in use there"
            return f"whether a server listens there cannot be asked ({exc.strerror})"
        try:
            peer = peer_credentials(probe.getsockopt)
        except NotSupportedError:
            return "a server listens there"
        return f"a server listens there already (pid {peer.pid}, uid {peer.uid})"


def _link(temporary: bytes, name: bytes, folder: int, path: bytes) -> None:
    """Give the socket a path at which nothing is; unlike rename, never over something else."""
    try:
        os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError as exc:
        raise _in_use(path, "something has just been put there") from exc


def _in_use(path: bytes, why: str) -> AddressInUseError:
    return AddressInUseError(
        errno.EADDRINUSE, f"{os.strerror(errno.EADDRINUSE)}: {why}", os.fsdecode(path)
    )
