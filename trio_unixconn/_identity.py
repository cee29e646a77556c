"""PeerIdentity: the process at the other end of a connection.

Invariant: a fact about a process is reported by the kernel for the socket, or read from /proc while
a pidfd proves that the pid still belongs to that process.

Reading /proc can block. ``cmdline`` is memory of the process, whose pages can be in a file of a
FUSE server or belong to a userfaultfd, and the reader waits for them, uninterruptibly, for as long
as the peer likes. So the methods that a trio program uses are async and read in a thread that can
be abandoned. An abandoned thread keeps its place in the limiter until the kernel lets it go, so
that a peer cannot use up the threads of the process. ``cmdline`` has a limiter of its own, so that
such peers cannot delay :meth:`PeerIdentity.read_exe` and :meth:`PeerIdentity.read_cgroup` either,
which do not touch memory of the process. The properties of the same names read in the calling
thread. They are for programs that are not in the trio thread.

Sources: unix(7), pidfd_open(2), pidfd_send_signal(2), proc_pid_fdinfo(5), proc_pid_task(5); the
commits of Linux that added SO_PEERGROUPS (4.13) and SO_PEERPIDFD (6.5)
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeVar

import attrs
import trio

from . import _kernel
from ._credentials import Credentials, peer_credentials
from ._fdlist import UnixFDList
from ._owner import ContextOwner
from ._trio_task import check_task
from .errors import NotSupportedError, PeerGoneError

T = TypeVar("T")

_gid: Final = struct.Struct("I")
# The limit of Python's getsockopt. More than 256 groups need more.
_MAX_PYTHON_OPTION: Final = 1024
_NGROUPS_MAX: Final = 65536
# SELinux has the longest labels, with categories. The kernel keeps a label in one page.
_MAX_LABEL: Final = 65536
_GONE: Final = "the peer has exited, and its pid may belong to another process"
# The pid in fdinfo of a process that was reaped, and of one outside of this pid namespace.
_REAPED: Final = -1
_UNSEEN: Final = 0


def open_peer_pidfd(sock: socket.socket) -> int | None:
    """Return a pidfd of the peer, which the caller owns; None if this kernel has none.

    Raises:
      PeerGoneError: the peer has exited and was reaped.
      OSError: EMFILE.
    """
    if _kernel.SO_PEERPIDFD is None:
        return None
    try:
        pidfd = sock.getsockopt(_kernel.SOL_SOCKET, _kernel.SO_PEERPIDFD)
    except OSError as exc:
        # For a peer that was reaped, Linux before 6.16 says EINVAL, and newer ones give a pidfd.
        if exc.errno in (errno.EINVAL, errno.ESRCH):
            raise PeerGoneError(errno.ESRCH, _GONE) from exc
        if exc.errno in (errno.ENOPROTOOPT, errno.ENODATA):
            return None
        raise
    try:
        _check_exists(pidfd)
    except BaseException:
        os.close(pidfd)
        raise
    return pidfd


def _check_exists(pidfd: int) -> None:
    """Raise PeerGoneError if the process was reaped."""
    if not _has_exited(pidfd):
        return
    try:
        # A Python that was built with headers of Linux before 5.1 does not have it.
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError as exc:
        raise PeerGoneError(errno.ESRCH, _GONE) from exc
    except (OSError, AttributeError):
        # EPERM: another user's process. EINVAL: outside of this pid namespace. Or a seccomp filter.
        # None of them says whether the process exists.
        try:
            pid = pid_of(pidfd)
        except (FileNotFoundError, PermissionError):
            # Without /proc that is unknown. The pidfd is the right one nevertheless.
            return
        if pid == _REAPED:
            raise PeerGoneError(errno.ESRCH, _GONE) from None


def _has_exited(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def get_peer_groups(sock: socket.socket) -> tuple[int, ...]:
    """Return the peer's supplementary groups.

    Raises:
      NotSupportedError: the kernel does not report them.
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
    """Return the peer's label; None if no security module gives one."""
    if _kernel.SO_PEERSEC is None:
        return None
    try:
        label = _option(sock, _kernel.SO_PEERSEC, _MAX_LABEL)
    except OSError as exc:
        if exc.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):
            return None
        raise
    return os.fsdecode(label.rstrip(b"\0")) or None


def _option(sock: socket.socket, option: int, limit: int) -> bytes:
    try:
        return sock.getsockopt(_kernel.SOL_SOCKET, option, _MAX_PYTHON_OPTION)
    except OSError as exc:
        if exc.errno != errno.ERANGE:
            raise
    return _kernel.getsockopt_of_any_length(sock.fileno(), _kernel.SOL_SOCKET, option, limit)


@attrs.frozen(eq=False)
class PeerIdentity(ContextOwner):
    """The process at the other end of a connection, as the kernel reports it.

    It owns a pidfd: use it in a ``with`` block, or :meth:`close` it. After that,
    :attr:`credentials`, :attr:`groups` and :attr:`security_context` can still be read.

    All facts are about the process that called connect(2) or listen(2). If it has passed the
    socket on, the kernel does not report the process that uses it now. For a socketpair, both ends
    report the process that has created it.

    Attributes:
      credentials: pid, uid and gid at the moment when the connection was made.
      groups: the supplementary groups at that moment; None if the kernel does not report them.
      security_context: its SELinux, AppArmor or Smack label; None if there is none.
      gone: whether the process had exited and was reaped when this was gathered.
    """

    credentials: Credentials
    groups: tuple[int, ...] | None = None
    security_context: str | None = None
    gone: bool = False
    _pidfds: UnixFDList = attrs.field(factory=UnixFDList, repr=False)

    @property
    def pidfd(self) -> int | None:
        """A pidfd of the process, which this object owns.

        It is readable when the process has exited: ``trio.lowlevel.wait_readable`` waits for
        that. None if the kernel has none (before Linux 6.5), if the process was :attr:`gone`, and
        after :meth:`close`.
        """
        return next(iter(self._pidfds), None)

    def is_alive(self) -> bool:
        """Whether the process is running. A later process with the same pid does not count.

        Raises:
          NotSupportedError: there is no pidfd.
        """
        if self.gone:
            return False
        return not _has_exited(self._held())

    async def read_exe(self) -> str:
        """Read the path of the program that the process runs, from ``/proc/PID/exe``.

        The process can run another program, and the file can be replaced, at any time. Use it for
        logs, not for decisions. If the file was removed, the path ends in ``" (deleted)"``.

        Raises:
          PeerGoneError: the process has exited.
          PermissionError: this process may not read that (ptrace(2)), or /proc hides the peer.
          NotSupportedError: there is no pidfd, and so the answer could be about another process;
            or the process is in a pid namespace that this process cannot see; or /proc is not
            mounted.
          OSError: EMFILE.
        """
        return await _in_thread(lambda: self.exe, _exe_limiter)

    async def read_command_line(self) -> list[str]:
        """Read its arguments, from ``/proc/PID/cmdline``; the process can change them.

        They are in the memory of the process, which can make this wait for any time. Use a timeout
        (``trio.move_on_after``).

        Raises:
          PeerGoneError: as :meth:`read_exe`.
          PermissionError: as :meth:`read_exe`.
          NotSupportedError: as :meth:`read_exe`.
          OSError: as :meth:`read_exe`.
        """
        return await _in_thread(lambda: self.command_line, _command_line_limiter)

    async def read_cgroup(self) -> str:
        """Read the path of its control group (version 2), from ``/proc/PID/cgroup``.

        Raises:
          PeerGoneError: as :meth:`read_exe`.
          PermissionError: as :meth:`read_exe`.
          NotSupportedError: as :meth:`read_exe`; or the system has control groups of version 1
            only.
          OSError: as :meth:`read_exe`.
        """
        return await _in_thread(lambda: self.cgroup, _exe_limiter)

    @property
    def exe(self) -> str:
        """As :meth:`read_exe`, in the calling thread, which can block; not for trio programs."""
        return self._read(_read_exe)

    @property
    def command_line(self) -> list[str]:
        """As :meth:`read_command_line`, in the calling thread, which can block."""
        return self._read(_read_command_line)

    @property
    def cgroup(self) -> str:
        """As :meth:`read_cgroup`, in the calling thread, which can block."""

        def read(directory: str) -> str:
            with open(f"{directory}/cgroup", "rb") as file:
                for line in file:
                    if line.startswith(b"0::"):
                        return os.fsdecode(line[3:].rstrip(b"\n"))
            raise NotSupportedError("the system has no control groups of version 2")

        return self._read(read)

    def _held(self) -> int:
        pidfd = self.pidfd
        if pidfd is None:
            raise NotSupportedError(
                "no pidfd of the peer (SO_PEERPIDFD requires Linux 6.5, or this identity is "
                "closed), and its pid alone may belong to another process"
            )
        return pidfd

    def _read(self, read: Callable[[str], T]) -> T:
        """Read from the directory of the process in /proc, and check that it was its own."""
        if self.gone:
            raise PeerGoneError(errno.ESRCH, _GONE)
        pidfd = self._held()
        try:
            pid = pid_of(pidfd)
        except FileNotFoundError as exc:
            raise NotSupportedError("/proc is not mounted, so a peer cannot be looked up") from exc
        if pid == _UNSEEN:
            raise NotSupportedError(
                "the peer is in a pid namespace that this process cannot see, so it has no "
                "directory in /proc"
            )
        directory = f"/proc/{pid}"
        try:
            answer = read(directory)
        except (FileNotFoundError, ProcessLookupError) as exc:
            # A process that has a directory, but runs no program, is about to exit.
            if pid != _REAPED and self.is_alive() and not os.path.isdir(directory):
                raise PermissionError(
                    errno.EACCES, "the peer is running, but hidden from this process in /proc"
                ) from exc
            raise PeerGoneError(errno.ESRCH, _GONE) from exc
        # Before it has exited no other process can get its pid. So this was its directory.
        if not self.is_alive():
            raise PeerGoneError(errno.ESRCH, _GONE)
        return answer

    def close(self) -> None:
        """Close the pidfd; closing twice is allowed."""
        self._pidfds.close()

    def __str__(self) -> str:
        """Return ids, groups and label, for a log."""
        ids = self.credentials
        groups = "unknown" if self.groups is None else ",".join(map(str, self.groups)) or "none"
        label = "" if self.security_context is None else f" label {self.security_context!r}"
        return f"pid {ids.pid} uid {ids.uid} gid {ids.gid} groups {groups}{label}"


def pid_of(pidfd: int) -> int:
    """Return the pid of a process in the pid namespace of /proc, or _REAPED, or _UNSEEN.

    Raises:
      OSError: EMFILE; ENOENT if /proc is not mounted; EACCES if it is another user's.
    """
    # As bytes: after chroot or setuid, Python may not be able to load an encoding.
    with open(f"/proc/self/fdinfo/{pidfd}", "rb") as file:
        return next(int(line[4:]) for line in file if line.startswith(b"Pid:"))


def _read_exe(directory: str) -> str:
    try:
        return os.readlink(f"{directory}/exe")
    except FileNotFoundError:
        for each in _threads(directory):
            with suppress(FileNotFoundError, ProcessLookupError):
                return os.readlink(f"{each}/exe")
        raise


def _read_command_line(directory: str) -> list[str]:
    arguments = b""
    for each in (directory, *_threads(directory)):
        if not arguments:
            # A thread can have exited by now.
            with suppress(FileNotFoundError, ProcessLookupError):
                arguments = _read_bytes(f"{each}/cmdline")
    return [os.fsdecode(each) for each in arguments.split(b"\0")[:-1]]


def _read_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _threads(directory: str) -> list[str]:
    """Return the directories of the threads of a process.

    If the main thread has exited, while other threads run, the process has no program and no
    command line in its own directory.
    """
    return [f"{directory}/task/{thread}" for thread in os.listdir(f"{directory}/task")]


# The maximum number of threads of each limiter.
_MAX_THREADS: Final = 16
_exe_limiter: Final = trio.lowlevel.RunVar[trio.CapacityLimiter]("exe and cgroup of peers")
_command_line_limiter: Final = trio.lowlevel.RunVar[trio.CapacityLimiter]("command lines of peers")


async def _in_thread(
    read: Callable[[], T], variable: trio.lowlevel.RunVar[trio.CapacityLimiter]
) -> T:
    check_task()
    try:
        limiter = variable.get()
    except LookupError:
        limiter = trio.CapacityLimiter(_MAX_THREADS)
        variable.set(limiter)
    return await trio.to_thread.run_sync(read, abandon_on_cancel=True, limiter=limiter)


def identify(
    sock: socket.socket,
    *,
    with_pidfd: bool = True,
    with_groups: bool = True,
    with_label: bool = True,
) -> PeerIdentity:
    """Gather what the kernel reports of the peer of a connected socket.

    Args:
      with_pidfd: whether to open a pidfd, which takes a file descriptor.
      with_groups, with_label: whether to ask for groups and label, a system call each.

    Raises:
      NotSupportedError: the platform does not report credentials.
      OSError: EMFILE.
    """
    credentials = peer_credentials(sock.getsockopt)
    groups, label, gone, pidfd = None, None, False, None
    if with_groups:
        with suppress(NotSupportedError):
            groups = get_peer_groups(sock)
    if with_label:
        label = get_peer_security_context(sock)
    if with_pidfd:
        try:
            pidfd = open_peer_pidfd(sock)
        except PeerGoneError:
            gone = True
    pidfds = UnixFDList() if pidfd is None else UnixFDList([pidfd])
    return PeerIdentity(credentials, groups, label, gone, pidfds)
