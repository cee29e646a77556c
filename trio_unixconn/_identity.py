"""Who the process at the other end is, and that it is still the same one.

The rule of this file: what is said about a process is vouched for by the kernel, or read while
a pidfd proves that its pid has not become another's; where neither can be had, it says so.

Sources: unix(7), pidfd_open(2), pidfd_send_signal(2), proc_pid_fdinfo(5); of Linux, the
commits that added SO_PEERGROUPS (4.13) and SO_PEERPIDFD (6.5)
"""

from __future__ import annotations

import errno
import os
import select
import signal
import struct
from typing import TYPE_CHECKING, Final, TypeVar

import attrs

from . import _kernel
from ._credentials import Credentials, peer_credentials
from ._fdlist import UnixFDList
from ._owner import DescriptorOwner
from .errors import NotSupportedError, PeerGoneError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Self

T = TypeVar("T")

_gid: Final = struct.Struct("I")
# What Python's getsockopt takes; more than 256 groups need more.
_MOST_OF_PYTHON: Final = 1024
_NGROUPS_MAX: Final = 65536
# A label of SELinux, with categories, is longer than those of the others, and is kept in a page.
_MOST_OF_LABELS: Final = 65536
_GONE: Final = "the peer has ended, and its pid may be another process's by now"
# What fdinfo says of a process that was reaped, and of one outside of this pid namespace.
_REAPED: Final = -1
_UNSEEN: Final = 0


def open_peer_pidfd(sock: socket.socket) -> int | None:
    """Return a pidfd of the peer that the caller owns, None if this kernel has none.

    Raises:
      PeerGoneError: the peer was reaped.
      OSError: EMFILE.
    """
    if _kernel.SO_PEERPIDFD is None:
        return None
    try:
        pidfd = sock.getsockopt(_kernel.SOL_SOCKET, _kernel.SO_PEERPIDFD)
    except OSError as exc:
        # Linux before 6.16 says EINVAL of a peer that was reaped, newer ones give a pidfd.
        if exc.errno in (errno.EINVAL, errno.ESRCH):
            raise PeerGoneError(errno.ESRCH, _GONE) from exc
        if exc.errno in (errno.ENOPROTOOPT, errno.ENODATA):
            return None
        raise
    try:
        _check_there(pidfd)
    except BaseException:
        os.close(pidfd)
        raise
    return pidfd


def _check_there(pidfd: int) -> None:
    """Raise PeerGoneError if the process was reaped."""
    if not _has_ended(pidfd):
        return
    try:
        # Not there in a Python that was built with headers of before Linux 5.1.
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError as exc:
        raise PeerGoneError(errno.ESRCH, _GONE) from exc
    except (OSError, AttributeError):
        # Another user's (EPERM), outside of this pid namespace (EINVAL), or a filter of system
        # calls said no: none of them says whether it is there.
        try:
            pid = pid_of(pidfd)
        except (FileNotFoundError, PermissionError):
            # Without /proc nobody can tell; the pidfd is the right one all the same.
            return
        if pid == _REAPED:
            raise PeerGoneError(errno.ESRCH, _GONE) from None


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def get_peer_groups(sock: socket.socket) -> tuple[int, ...]:
    """Return the peer's supplementary groups.

    Raises:
      NotSupportedError: the kernel cannot tell.
    """
    option = _kernel.required(_kernel.SO_PEERGROUPS, "SO_PEERGROUPS")
    try:
        data = _option(sock, option, _NGROUPS_MAX * _gid.size)
    except OSError as exc:
        if exc.errno != errno.ENOPROTOOPT:
            raise
        raise NotSupportedError("this kernel has no SO_PEERGROUPS (Linux 4.13)") from exc
    return tuple(gid for (gid,) in _gid.iter_unpack(data))


def get_peer_security_context(sock: socket.socket) -> str | None:
    """Return the peer's label, None if no security module gives one."""
    if _kernel.SO_PEERSEC is None:
        return None
    try:
        label = _option(sock, _kernel.SO_PEERSEC, _MOST_OF_LABELS)
    except OSError as exc:
        if exc.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):
            return None
        raise
    return os.fsdecode(label.rstrip(b"\0")) or None


def _option(sock: socket.socket, option: int, most: int) -> bytes:
    try:
        return sock.getsockopt(_kernel.SOL_SOCKET, option, _MOST_OF_PYTHON)
    except OSError as exc:
        if exc.errno != errno.ERANGE:
            raise
    return _kernel.getsockopt_of_any_length(sock.fileno(), _kernel.SOL_SOCKET, option, most)


@attrs.frozen(eq=False)
class PeerIdentity(DescriptorOwner):
    """Who is at the other end of a connection, gathered once.

    It owns a pidfd: use it in a ``with`` block or :meth:`close` it. Outside of that,
    :attr:`credentials`, :attr:`groups` and :attr:`security_context` stay readable.

    All of it is about the process that connected or listened; whoever it handed the socket to
    since is not named by the kernel. Of a socketpair, both ends name who made the pair.

    Attributes:
      credentials: pid, uid and gid, noted by the kernel when the connection was made.
      groups: the supplementary groups from that moment; None where the kernel cannot tell.
      security_context: its SELinux, AppArmor or Smack label; None without any.
      gone: whether the process had ended and been reaped when this was gathered.
    """

    credentials: Credentials
    groups: tuple[int, ...] | None = None
    security_context: str | None = None
    gone: bool = False
    _pidfds: UnixFDList = attrs.field(factory=UnixFDList, repr=False)

    @property
    def pidfd(self) -> int | None:
        """A pidfd of the process, which stays this object's.

        It is readable once the process has ended: ``trio.lowlevel.wait_readable`` waits for
        that. None where the kernel has none (before Linux 6.5), when the process was gone
        already, and after :meth:`close`.
        """
        return next(iter(self._pidfds), None)

    def is_alive(self) -> bool:
        """Whether the process has not ended. Never mistakes another with the same pid for it.

        Raises:
          NotSupportedError: without a pidfd nobody can tell.
        """
        if self.gone:
            return False
        return not _has_ended(self._held())

    @property
    def exe(self) -> str:
        """The path of the program that the process runs now, from ``/proc/PID/exe``.

        The process can run another program, and its file can be replaced, at any time: to
        look at it is for logs, to decide by it is not safe. Of a file that was removed it ends
        in ``" (deleted)"``.

        Raises:
          PeerGoneError: the process has ended.
          PermissionError: this process may not look (ptrace(2)).
          NotSupportedError: without a pidfd the answer might be about another process; or the
            process belongs to a pid namespace that this one cannot see; or there is no /proc.
          OSError: EMFILE.
        """
        return self._read(lambda folder: os.readlink(f"{folder}/exe"))

    @property
    def command_line(self) -> list[str]:
        """Its arguments, from ``/proc/PID/cmdline``; the process may have changed them.

        Raises:
          PeerGoneError, PermissionError, NotSupportedError: as :attr:`exe`.
        """

        def read(folder: str) -> list[str]:
            with open(f"{folder}/cmdline", "rb") as file:
                return [os.fsdecode(each) for each in file.read().split(b"\0")[:-1]]

        return self._read(read)

    @property
    def cgroup(self) -> str:
        """The path of its control group (version 2), from ``/proc/PID/cgroup``.

        Raises:
          PeerGoneError, PermissionError, NotSupportedError, OSError: as :attr:`exe`; or only
            control groups of version 1 are in use.
        """

        def read(folder: str) -> str:
            with open(f"{folder}/cgroup", "rb") as file:
                for line in file:
                    if line.startswith(b"0::"):
                        return os.fsdecode(line[3:].rstrip(b"\n"))
            raise NotSupportedError("the system has no control groups of version 2")

        return self._read(read)

    def _held(self) -> int:
        pidfd = self.pidfd
        if pidfd is None:
            raise NotSupportedError(
                "there is no pidfd of the peer (SO_PEERPIDFD, Linux 6.5, or this identity is "
                "closed), and its pid alone may be another process's by now"
            )
        return pidfd

    def _read(self, read: Callable[[str], T]) -> T:
        """Read about the process in /proc, and make sure that it was about this one."""
        if self.gone:
            raise PeerGoneError(errno.ESRCH, _GONE)
        pidfd = self._held()
        try:
            pid = pid_of(pidfd)
        except FileNotFoundError as exc:
            raise NotSupportedError("/proc is not mounted, and tells nothing about a peer") from exc
        if pid == _UNSEEN:
            raise NotSupportedError(
                "the peer is in a pid namespace that cannot be seen from here, so that /proc "
                "tells nothing about it"
            )
        folder = f"/proc/{pid}"
        try:
            answer = read(folder)
        except (FileNotFoundError, ProcessLookupError) as exc:
            # What has a folder, but no program any more, is about to end.
            if pid != _REAPED and self.is_alive() and not os.path.isdir(folder):
                raise PermissionError(
                    errno.EACCES, "the peer is alive, but hidden from this process in /proc"
                ) from exc
            raise PeerGoneError(errno.ESRCH, _GONE) from exc
        # Until it has ended nobody else can get its pid, so that this was about the process.
        if not self.is_alive():
            raise PeerGoneError(errno.ESRCH, _GONE)
        return answer

    def close(self) -> None:
        """Close the pidfd; closing twice is allowed."""
        self._pidfds.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __str__(self) -> str:
        """Describe the peer for a log: ids, groups, and label."""
        ids = self.credentials
        groups = "unknown" if self.groups is None else ",".join(map(str, self.groups)) or "none"
        label = "" if self.security_context is None else f" label {self.security_context!r}"
        return f"pid {ids.pid} uid {ids.uid} gid {ids.gid} groups {groups}{label}"


def pid_of(pidfd: int) -> int:
    """Return the pid of a process in the pid namespace of /proc, or _REAPED, or _UNSEEN.

    Raises:
      OSError: EMFILE; ENOENT if /proc is not mounted; EACCES if it is another user's.
    """
    # As bytes: a process that went to another root or user cannot load an encoding any more.
    with open(f"/proc/self/fdinfo/{pidfd}", "rb") as file:
        return next(int(line[4:]) for line in file if line.startswith(b"Pid:"))


def identify(sock: socket.socket, *, with_pidfd: bool = True) -> PeerIdentity:
    """Gather who the peer of a connected socket is.

    Args:
      with_pidfd: whether to hold on to the process, which takes a descriptor.

    Raises:
      NotSupportedError: the platform tells no credentials.
      OSError: EMFILE.
    """
    credentials = peer_credentials(sock.getsockopt)
    try:
        groups: tuple[int, ...] | None = get_peer_groups(sock)
    except NotSupportedError:
        groups = None
    label = get_peer_security_context(sock)
    gone, pidfd = False, None
    if with_pidfd:
        try:
            pidfd = open_peer_pidfd(sock)
        except PeerGoneError:
            gone = True
    pidfds = UnixFDList() if pidfd is None else UnixFDList([pidfd])
    return PeerIdentity(credentials, groups, label, gone, pidfds)
