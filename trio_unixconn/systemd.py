"""Services under systemd: notifications, the watchdog, stored and inherited file descriptors.

Nothing here needs libsystemd, and all of it does nothing if no service manager has started the
process. Other managers that speak the same protocol work, too.

Invariant: the variables of the environment are about this process, so they are taken out of it
before a child process can inherit them.

Sources: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3), systemd.service(5), pidfd_open(2);
of systemd, src/shared/notify-recv.c (what a manager accepts)
"""

from __future__ import annotations

import logging
import math
import os
import re
import select
import socket as stdlib_socket
import sys
import time
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import asynccontextmanager
from functools import cache
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import enable_ki_protection

from . import _fds, _kernel
from ._address import UnixSocketAddress
from ._datagram import open_unix_datagram
from ._identity import pid_of
from ._listener import UnixListener
from ._sockopts import adopt_fd
from ._trio_task import checkpoint_in_task
from .errors import NotSupportedError, SendError

if TYPE_CHECKING:
    from ._datagram import UnixDatagramSocket
    from ._fds import FileDescriptor

__all__ = [
    "HealthCheck",
    "ServiceManager",
    "inherited_fds",
    "inherited_listeners",
]

logger: Final = logging.getLogger("trio_unixconn")

#: Returns whether the service is healthy.
HealthCheck = Callable[[], Awaitable[bool]]

# The largest message that systemd accepts, in bytes (PIPE_BUF).
_MAX_MESSAGE: Final = 4096
_MAX_NAME: Final = 255
_KEY: Final = re.compile(r"[A-Z][A-Z0-9_]*")
# Printable ASCII; a colon separates the names in LISTEN_FDNAMES.
_NAME: Final = re.compile(r"[ -9;-~]+")
_WATCHDOG: Final = b"WATCHDOG=1"
_USEC: Final = 1_000_000
_MAX_USEC: Final = 2**64 - 2

_FIRST_FD: Final = 3
_UNNAMED: Final = "unknown"


class ServiceManager:
    """The service manager that has started this process, or none.

    All methods are checkpoints and do nothing else if there is no manager, so a service needs no
    second way for a terminal or a container. While the queue of the manager is full, they wait. A
    message that was sent says nothing about what the manager does with it: it ignores messages of
    processes that ``NotifyAccess=`` does not admit.

    Args:
      address: the address of its socket: a path, or ``@`` and an abstract name; None: there is no
        manager.
      watchdog_timeout: after how many seconds without a heartbeat it restarts the service; None: it
        expects none.
      max_stored_fds: how many file descriptors it stores for the service; None: unknown, as before
        systemd 254.

    Attributes:
      address, watchdog_timeout, max_stored_fds: as the arguments.

    Raises:
      ValueError: not such an address.
      NotSupportedError: an ``AF_VSOCK`` address, which a virtual machine has for the manager of
        its host; or the platform has no abstract names or Unix sockets.

    Source: sd_notify(3)
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        watchdog_timeout: float | None = None,
        max_stored_fds: int | None = None,
    ) -> None:
        self.address: Final = address
        self.watchdog_timeout: Final = watchdog_timeout
        self.max_stored_fds: Final = max_stored_fds
        self._to = None if address is None else _parse_address(address)

    @classmethod
    def from_environ(cls, environ: MutableMapping[str, str] | None = None) -> ServiceManager:
        """Return the manager that the environment names, and take its variables out.

        These are NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID and FDSTORE. Call this once, at the
        start, before threads or child processes are started: a second call finds no manager.

        Args:
          environ: default: ``os.environ``.

        Raises:
          ValueError: a variable that is not what systemd would set.
          NotSupportedError: as the constructor.

        Source: sd_notify(3), sd_watchdog_enabled(3), systemd.exec(5)
        """
        environ = os.environ if environ is None else environ
        address = environ.pop("NOTIFY_SOCKET", "")
        usec = environ.pop("WATCHDOG_USEC", "")
        pid = environ.pop("WATCHDOG_PID", "")
        count = environ.pop("FDSTORE", "")
        watchdog_timeout = None
        if usec and pid in ("", str(os.getpid())):
            watchdog_timeout = _number(usec, "WATCHDOG_USEC", 1) / _USEC
        return cls(
            address or None,
            watchdog_timeout=watchdog_timeout,
            max_stored_fds=_number(count, "FDSTORE", 0) if count else None,
        )

    def __bool__(self) -> bool:
        """Whether there is a manager."""
        return self._to is not None

    def __repr__(self) -> str:
        return f"<ServiceManager {'none' if self._to is None else self._to}>"

    async def ready(self, status: str | None = None) -> None:
        """Say that the service has started, or has finished reloading (READY=1).

        Args:
          status: as of :meth:`status`, in the same message.

        Raises:
          SendError: no process has the manager's socket open, or this process may not send there.
        """
        await self._send("READY=1", *_status(status))

    async def reloading(self, status: str | None = None) -> None:
        """Say that the service begins to reload (RELOADING=1); :meth:`ready` says when it is done.

        The time is sent, too (MONOTONIC_USEC), which ``Type=notify-reload`` requires.

        Raises:
          SendError: as :meth:`ready`.
        """
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        await self._send("RELOADING=1", f"MONOTONIC_USEC={now}", *_status(status))

    async def stopping(self, status: str | None = None) -> None:
        """Say that the service begins to shut down (STOPPING=1), which cannot be undone.

        From then on ``TimeoutStopSec=`` runs, for the unit as a whole: a process that a successor
        has replaced must not call this.

        Raises:
          SendError: as :meth:`ready`.
        """
        await self._send("STOPPING=1", *_status(status))

    async def status(self, text: str) -> None:
        """Describe the state of the service in one line, which ``systemctl status`` prints.

        Raises:
          ValueError: several lines. A second line would be taken for another message.
          SendError: as :meth:`ready`.
        """
        await self._send(*_status(text))

    async def extend_timeout(self, seconds: float) -> None:
        """Ask for more time to start, to reload or to stop (EXTEND_TIMEOUT_USEC).

        Args:
          seconds: by when the next message arrives, at the latest.

        Raises:
          ValueError: not a positive number of seconds.
          SendError: as :meth:`ready`.
        """
        if not 0 < seconds < math.inf:
            raise ValueError(f"seconds must be positive and finite, got {seconds}")
        await self._send(f"EXTEND_TIMEOUT_USEC={min(math.ceil(seconds * _USEC), _MAX_USEC)}")

    @enable_ki_protection
    async def main_pid(
        self, pid: int | None = None, *, pidfd: FileDescriptor | None = None
    ) -> None:
        """Say which process is the main process of the service (MAINPID, MAINPIDFDID).

        The pid is sent together with the inode number of the process's pidfd, so that the manager
        (since systemd 257) cannot take another process for it that has got the same pid. If the
        kernel has no such numbers (before Linux 6.9), the pidfd itself is sent (MAINPIDFD=1).
        Older managers use the pid.

        Args:
          pid: default: this process.
          pidfd: a pidfd of the process, instead of its pid; it stays the caller's.

        Raises:
          TypeError: both a pid and a pidfd.
          ValueError: not a pid or not a pidfd, or of a process in a pid namespace that this process
            cannot see.
          ProcessLookupError: there is no such process.
          SendError: as :meth:`ready`.
        """
        if pid is not None and pidfd is not None:
            raise TypeError("expected a pid or a pidfd, got both")
        if pidfd is not None:
            number = _fds.fileno(pidfd)
            await self._send_main_pid(_pid_of(number), number)
            return
        pid = os.getpid() if pid is None else pid
        if type(pid) is not int or pid < 1:
            raise ValueError(f"pid must be a positive int, got {pid!r}")
        opened = _open_pidfd(pid)
        try:
            await self._send_main_pid(pid, opened)
        finally:
            if opened is not None:
                os.close(opened)

    async def _send_main_pid(self, pid: int, pidfd: int | None) -> None:
        lines, fds = [f"MAINPID={pid}"], list[int]()
        if pidfd is not None:
            inode = _pidfd_id(pidfd)
            if inode is None:
                lines.append("MAINPIDFD=1")
                fds.append(pidfd)
            else:
                lines.append(f"MAINPIDFDID={inode}")
        await self._send(*lines, fds=fds)

    @enable_ki_protection
    async def barrier(self) -> None:
        """Wait until the manager has processed all messages that were sent before (BARRIER=1).

        The manager closes a pipe then. The end of the manager closes it, too, so this proves an
        order, and not that the messages were accepted. For a timeout, use ``trio.fail_after``.

        Raises:
          SendError: as :meth:`ready`.
          OSError: EMFILE.
        """
        if self._to is None:
            await checkpoint_in_task()
            return
        reader, writer = os.pipe()
        try:
            try:
                await self._send("BARRIER=1", fds=[writer])
            finally:
                os.close(writer)
            await trio.lowlevel.wait_readable(reader)
        finally:
            os.close(reader)

    @enable_ki_protection
    async def store(
        self, fds: Iterable[FileDescriptor], name: str | None = None, *, poll: bool = True
    ) -> None:
        """Have the manager keep file descriptors for the next start of the service (FDSTORE=1).

        It needs ``FileDescriptorStoreMax=``. They are not discarded if the service crashes; at the
        next start :func:`inherited_fds` returns them. The file descriptors stay the caller's, too.

        Args:
          fds: an iterable of what :meth:`UnixConnection.send_fd` accepts; more than 253 take
            several messages.
          name: for all of them: printable ASCII without a colon, at most 255 characters; default:
            ``stored``.
          poll: whether the manager drops a file descriptor that is hung up or broken, such as a
            connection that the peer has closed.

        Raises:
          TypeError: not file descriptors, or a name that is not a str; nothing was sent.
          ValueError: not such a name; nothing was sent.
          SendError: as :meth:`ready`; or a file descriptor is closed.
        """
        lines = ["FDSTORE=1"]
        if name is not None:
            lines.append(f"FDNAME={_check_name(name)}")
        if not poll:
            lines.append("FDPOLL=0")
        # The owners stay referenced until this returns.
        numbers, owners = _fds.filenos(fds)
        _fds.check_open(numbers)
        for first in range(0, len(owners), _kernel.SCM_MAX_FD):
            await self._send(*lines, fds=owners[first : first + _kernel.SCM_MAX_FD])
        if not owners:
            await checkpoint_in_task()

    async def forget(self, name: str) -> None:
        """Have the manager close the stored file descriptors of this name (FDSTOREREMOVE=1).

        Raises:
          TypeError: not a str.
          ValueError: not a name, as of :meth:`store`.
          SendError: as :meth:`ready`.
        """
        await self._send("FDSTOREREMOVE=1", f"FDNAME={_check_name(name)}")

    async def notify(
        self, assignments: Mapping[str, str | int], *, fds: Iterable[FileDescriptor] = ()
    ) -> None:
        """Send any message: ERRNO, BUSERROR, NOTIFYACCESS, WATCHDOG=trigger and others.

        Args:
          assignments: names in capital letters, and their values.
          fds: at most 253; the manager closes those that it has no use for.

        Raises:
          TypeError: not names and values, or not file descriptors; nothing was sent.
          ValueError: a value with several lines, or more than 4096 bytes; nothing was sent.
          SendError: as :meth:`ready`; or a file descriptor is closed.
        """
        lines: list[str] = []
        for key, value in assignments.items():
            if _KEY.fullmatch(key) is None:
                raise ValueError(f"expected a name in capital letters such as STATUS, got {key!r}")
            if not isinstance(value, (str, int)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"{key} must be a str or an int, got {type(value).__name__}")
            lines.append(_assignment(key, str(value)))
        if not lines:
            raise ValueError("expected at least one assignment")
        await self._send(*lines, fds=fds)

    @asynccontextmanager
    async def watchdog(self, check: HealthCheck | None = None) -> AsyncGenerator[None, None]:
        """Send heartbeats during the block (WATCHDOG=1), as long as the service is healthy.

        They are sent twice as often as the manager expects them (``WatchdogSec=``). If it expects
        none, this does nothing. A heartbeat is a task of the event loop: it also stops if that
        hangs. If the check returns False, does not return, or raises an Exception, which is logged,
        there is no heartbeat, and after ``WatchdogSec=`` the manager restarts the service. The next
        check can make it healthy again before that.

        Exceptions of the block are raised as they are.

        Args:
          check: an async function without arguments that returns a bool. Default: the service is
            healthy as long as the event loop runs.

        Raises:
          ExceptionGroup: of a TypeError, because the check returned something else.
          OSError: EMFILE, at the beginning; later heartbeats need no file descriptor.
        """
        if self._to is None or self.watchdog_timeout is None:
            await checkpoint_in_task()
            yield
            return
        raised: BaseException | None = None
        async with await open_unix_datagram() as sock, trio.open_nursery() as nursery:
            nursery.start_soon(self._beat, sock, self._to, self.watchdog_timeout / 2, check)
            try:
                yield
            except BaseException as exc:  # raised below, not in a nursery's group
                raised = exc
            nursery.cancel_scope.cancel()
        if raised is not None:
            raise raised

    async def _beat(
        self,
        sock: UnixDatagramSocket,
        to: UnixSocketAddress,
        interval: float,
        check: HealthCheck | None,
    ) -> None:
        failed = False
        due = trio.current_time()
        while True:
            if await _is_healthy(check, log=not failed):
                failed = False
                try:
                    await sock.send_message(_WATCHDOG, to)
                except SendError as exc:
                    logger.warning("cannot send a heartbeat to the service manager: %s", exc)
            else:
                failed = True
            due = max(due + interval, trio.current_time())
            await trio.sleep_until(due)

    @enable_ki_protection
    async def _send(self, *lines: str, fds: Iterable[FileDescriptor] = ()) -> None:
        data = "\n".join(lines).encode()
        if len(data) > _MAX_MESSAGE:
            raise ValueError(
                f"expected a message of at most {_MAX_MESSAGE} bytes, got {len(data)}; the service "
                "manager would ignore it"
            )
        _, owners = _fds.filenos(fds, _kernel.SCM_MAX_FD)
        if self._to is None:
            await checkpoint_in_task()
            return
        async with await open_unix_datagram() as sock:
            await sock.send_message(data, self._to, fds=owners)


def _parse_address(address: str) -> UnixSocketAddress:
    if address.startswith("/"):
        return UnixSocketAddress.path(address)
    if address.startswith("@") and len(address) > 1:
        if sys.platform != "linux":
            raise NotSupportedError(f"abstract names of sockets require Linux, got {address}")
        return UnixSocketAddress.abstract(address[1:])
    if address.startswith("vsock"):
        raise NotSupportedError(
            f"the service manager has the AF_VSOCK address {address!r}; only Unix sockets are "
            "supported"
        )
    raise ValueError(
        f"NOTIFY_SOCKET: expected an absolute path, or @ and an abstract name, got {address!r}"
    )


def _number(text: str, name: str, least: int) -> int:
    if not (text.isascii() and text.isdecimal()) or not least <= int(text) <= _MAX_USEC:
        raise ValueError(f"{name}: expected a number of at least {least}, got {text!r}")
    return int(text)


def _status(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"status must be a str, got {type(text).__name__}")
    return (_assignment("STATUS", text),)


def _assignment(key: str, value: str) -> str:
    # The manager would take a second line for another message, and ignores messages with NUL.
    if "\n" in value or "\0" in value:
        raise ValueError(f"{key} must be one line, without NUL, got {value!r}")
    return f"{key}={value}"


def _check_name(name: str) -> str:
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    if len(name) > _MAX_NAME or _NAME.fullmatch(name) is None:
        raise ValueError(
            f"name must be 1 to {_MAX_NAME} characters of printable ASCII without a colon, "
            f"got {name!r}"
        )
    return name


async def _is_healthy(check: HealthCheck | None, *, log: bool) -> bool:
    if check is None:
        return True
    try:
        healthy: object = await check()
    except Exception:
        if log:
            logger.exception("the health check failed: no heartbeat to the service manager")
        return False
    if not isinstance(healthy, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"a health check must return a bool, got {type(healthy).__name__}")
    if not healthy and log:
        logger.error("the health check returned False: no heartbeat to the service manager")
    return healthy


################################################################
# Processes
################################################################


def _open_pidfd(pid: int) -> int | None:
    """Return a pidfd that the caller owns; None if the system has none.

    Raises:
      ProcessLookupError: there is no such process.
      OSError: EMFILE.
    """
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        return None
    return os.pidfd_open(pid)


def _pid_of(pidfd: int) -> int:
    try:
        pid = pid_of(pidfd)
    except StopIteration:
        raise ValueError(f"expected a pidfd, got file descriptor {pidfd} of another kind") from None
    if pid < 0:
        raise ProcessLookupError("the process of this pidfd has exited")
    if pid == 0:
        raise ValueError("the process of this pidfd is in a pid namespace that cannot be seen here")
    return pid


def _pidfd_id(pidfd: int) -> int | None:
    """Return the number that no other process has until the next boot; None if there is none.

    fstat(2) of a pidfd asks no file server.
    """
    return os.fstat(pidfd).st_ino if _has_pidfd_ids() else None


@cache
def _has_pidfd_ids() -> bool:
    """Whether pidfds have inodes of their own (Linux 6.9), with numbers of 64 bits.

    Before that, they share one inode with all files of their kind, such as that of an epoll(7).
    """
    if sys.maxsize < 2**32:
        return False
    pidfd = _open_pidfd(os.getpid())
    if pidfd is None:
        return False
    try:
        with select.epoll() as other:
            return os.fstat(pidfd).st_dev != os.fstat(other.fileno()).st_dev
    finally:
        os.close(pidfd)


################################################################
# Inherited file descriptors
################################################################

# Those that were passed to this process, and that no call has returned yet: number and name.
_passed: list[tuple[int, str]] = []


def inherited_fds(*names: str) -> dict[str, list[int]]:
    """Return the file descriptors that the service manager has passed to this process, by name.

    These are the sockets of socket units, with the names of ``FileDescriptorName=``, and those
    that the service has stored. Each is returned once. They become close-on-exec, and LISTEN_FDS,
    LISTEN_FDNAMES, LISTEN_PID and LISTEN_PIDFDID are taken out of the environment, at the first
    call of this or :func:`inherited_listeners`. Call it before child processes are started.

    Args:
      names: return only those with one of these names; default: all.

    Returns:
      For each name, the file descriptors in the order of their numbers; the caller owns them.
      Those without a name are ``unknown``. It is empty if none were passed to this process.

    Raises:
      ValueError: LISTEN_FDS is not a number, or a file descriptor is not open.

    Source: sd_listen_fds(3)
    """
    _take_variables(os.environ)
    return _group(_select(names, take=True))


def inherited_listeners(*names: str) -> dict[str, list[UnixListener | trio.SocketListener]]:
    """Return the listening sockets that the service manager has passed to this process, by name.

    As :func:`inherited_fds`, but as listeners: ``trio.serve_listeners`` and ``serve_with_workers``
    take them. The sockets become non-blocking, for the service manager, too. Closing a listener
    leaves its path; the service manager still has the socket.

    Args:
      names: return only those with one of these names; default: all.

    Returns:
      For each name, the listeners in the order of their numbers; the caller owns them.

    Raises:
      ValueError: one of them is not a listening stream socket. None was taken then:
        :func:`inherited_fds` still returns them.
    """
    _take_variables(os.environ)
    for fd, name in _select(names, take=False):
        _check_listening(fd, name)
    found: dict[str, list[UnixListener | trio.SocketListener]] = {}
    for fd, name in _select(names, take=True):
        found.setdefault(name, []).append(_listener_from_fd(fd))
    return found


def _take_variables(environ: MutableMapping[str, str]) -> None:
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    count, pid = environ.pop("LISTEN_FDS", ""), environ.pop("LISTEN_PID", "")
    pidfd_id = environ.pop("LISTEN_PIDFDID", "")
    if not count or not _is_this_process(pid, pidfd_id):
        return
    total = _number(count, "LISTEN_FDS", 0)
    fds = range(_FIRST_FD, _FIRST_FD + total)
    missing: tuple[int, Exception] | None = None
    for index, fd in enumerate(fds):
        # If there are not enough names, or none, the others have none.
        name = (names[index] if index < len(names) else "") or _UNNAMED
        try:
            os.set_inheritable(fd, False)
        except (OSError, OverflowError) as exc:
            if missing is not None:
                # The number is wrong: what follows may be files of this program.
                break
            missing = fd, exc
        else:
            # Kept even if another one is not open: a later call returns it.
            _passed.append((fd, name))
    if missing is not None:
        raise ValueError(
            f"LISTEN_FDS is {total}, but file descriptor {missing[0]} is not open"
        ) from missing[1]


def _is_this_process(pid: str, pidfd_id: str) -> bool:
    if pid != str(os.getpid()):
        return False
    if not pidfd_id or not _has_pidfd_ids():
        return True
    pidfd = _open_pidfd(os.getpid())
    assert pidfd is not None
    try:
        return pidfd_id == str(_pidfd_id(pidfd))
    finally:
        os.close(pidfd)


def _select(names: Sequence[str], *, take: bool) -> list[tuple[int, str]]:
    chosen = [each for each in _passed if not names or each[1] in names]
    if take:
        _passed[:] = [each for each in _passed if each not in chosen]
    return chosen


def _group(passed: Iterable[tuple[int, str]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for fd, name in passed:
        found.setdefault(name, []).append(fd)
    return found


def _check_listening(fd: int, name: str) -> None:
    expected = f"file descriptor {fd} ({name}): expected a listening stream socket"
    remedy = f"inherited_fds({name!r}) returns it"
    try:
        sock = stdlib_socket.socket(fileno=fd)
    except OSError as exc:
        raise ValueError(f"{expected}, got another file; {remedy}") from exc
    try:
        listens = sock.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_ACCEPTCONN)
        if sock.type != stdlib_socket.SOCK_STREAM or not listens:
            raise ValueError(f"{expected}, got a socket that does not listen; {remedy}")
    finally:
        sock.detach()


def _listener_from_fd(fd: int) -> UnixListener | trio.SocketListener:
    def adopt(sock: stdlib_socket.socket) -> trio.SocketListener:
        return trio.SocketListener(trio.socket.from_stdlib_socket(sock))

    sock = stdlib_socket.socket(fileno=fd)
    family = sock.family
    sock.detach()
    if family == _kernel.AF_UNIX:
        return UnixListener.from_fd(fd)
    return adopt_fd(fd, "a listening stream socket", adopt)
