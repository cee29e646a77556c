"""Starting the successor of a process: a program that inherits one end of a channel.

Invariant: a process that was started is reaped, or outlives this one. Its standard error is ours
from the moment when it has a generation.

Until then, what it writes there is kept in memory, for the error of an upgrade that fails: most
programs that cannot start fail while they import. A pipe would break, or fill up, if this process
ended; children that the successor starts later must not get either of them as theirs.

Sources: memfd_create(2), pidfd_open(2), proc_pid_fd(5), https://docs.python.org/3/library/subprocess.html
"""

from __future__ import annotations

import os
import signal
import socket as stdlib_socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Final

import trio

from .._connection import UnixConnection
from .._owner import DescriptorOwner

#: Names the inherited file descriptors, in the environment of a successor.
VARIABLE: Final = "TRIO_UNIXCONN_HANDOVER"

# How much of what a successor writes to its standard error is kept for an error, in bytes.
_MAX_ERRORS: Final = 16 * 1024
_STDERR: Final = 2
# The channel of this process, if it was asked for before the generation began.
_claimed: list[UnixConnection] = []
# How long a successor has for its end after the upgrade was given up, in seconds.
_GRACE: Final = 5.0


def default_command() -> list[str]:
    """Return the command that started this process."""
    return [sys.executable, *sys.orig_argv[1:]]


class SuccessorProcess(DescriptorOwner):
    """A process that was started to be the successor.

    Attributes:
      pid: its process id.
      conn: this end of its channel.
    """

    def __init__(
        self, popen: subprocess.Popen[bytes], pidfd: int, conn: UnixConnection, errors: int
    ) -> None:
        self._popen = popen
        self.conn = conn
        self.pid: int = popen.pid
        self._errors = errors
        self._pidfd = pidfd

    def open_pidfd(self) -> int:
        """Return a pidfd of it, which the caller owns."""
        return os.dup(self._pidfd)

    def last_errors(self) -> str:
        """Return the last of what it wrote to its standard error before it had a generation."""
        size = os.fstat(self._errors).st_size
        data = os.pread(self._errors, _MAX_ERRORS, max(0, size - _MAX_ERRORS))
        return data.decode(errors="backslashreplace")

    async def wait(self) -> str:
        """Wait until it has ended, and reap it; return how it ended."""
        if self._popen.returncode is None:
            await trio.lowlevel.wait_readable(self._pidfd)
        status = self._popen.wait()
        if status >= 0:
            return f"exited with status {status}"
        with suppress(ValueError):
            return f"was killed by {signal.Signals(-status).name}"
        return f"was killed by signal {-status}"

    async def end(self) -> str:
        """Let it end, kill it if it does not, and reap it; return how it ended."""
        with trio.move_on_after(_GRACE, shield=True):
            await trio.lowlevel.wait_readable(self._pidfd)
        if self._popen.poll() is None:
            self._popen.kill()
            self._popen.wait()
            return "was killed because it did not end"
        return await self.wait()

    def close(self) -> None:
        """Close what this process has of it; it goes on, and is not reaped if it is running."""
        # So that its finalizer does not report a process that is meant to outlive this one.
        if self._popen.poll() is None:
            self._popen.returncode = 0
        trio.lowlevel.notify_closing(self._pidfd)
        os.close(self._pidfd)
        os.close(self._errors)


def start(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    cwd: str | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
) -> SuccessorProcess:
    """Start a successor.

    Args:
      environment: variables that it gets in addition to those of this process.
      cwd: its current directory; default: that of this process.
      stdout, stderr: default: those of this process.

    Raises:
      OSError: ENOENT, EACCES, EMFILE, ENOMEM; no process and no file descriptor is left.
    """
    with ExitStack() as stack:
        failed = stack.enter_context(ExitStack())
        # It keeps the standard ones of this process. One that is closed must not become an end of
        # the channel.
        for number in range(3):
            try:
                os.fstat(number)
            except OSError:
                stack.callback(os.close, os.open(os.devnull, os.O_RDWR))
        ours, theirs = stdlib_socket.socketpair()
        stack.callback(theirs.close)
        failed.callback(ours.close)
        # With O_APPEND, because a child of the successor may write there, too.
        errors = os.open(f"/proc/self/fd/{_memory(stack)}", os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        failed.callback(os.close, errors)
        later = os.dup(_STDERR if stderr is None else stderr)
        stack.callback(os.close, later)
        inode = os.fstat(theirs.fileno()).st_ino
        popen = subprocess.Popen(
            command,
            cwd=cwd,
            stdout=stdout,
            stderr=errors,
            pass_fds=[theirs.fileno(), later],
            env={
                **os.environ,
                **environment,
                VARIABLE: f"{theirs.fileno()}:{inode}:{later}",
            },
        )
        try:
            pidfd = os.pidfd_open(popen.pid)
        except OSError:
            popen.kill()
            popen.wait()
            raise
        failed.pop_all()
        return SuccessorProcess(popen, pidfd, UnixConnection.from_stdlib_socket(ours), errors)


def _memory(stack: ExitStack) -> int:
    fd = os.memfd_create("trio_unixconn stderr", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def is_successor() -> bool:
    """Whether another process has started this one as its successor."""
    return VARIABLE in os.environ or bool(_claimed)


def claim_connection() -> None:
    """Get the channel to that process, and its standard error, before the generation begins.

    For a program that redirects its standard error first.
    """
    conn = inherited_connection()
    if conn is not None:
        _claimed.append(conn)


def inherited_connection() -> UnixConnection | None:
    """Return the channel to the process that has started this one as its successor.

    The standard error becomes the one of that process; what this process has written so far is
    written there. The variable is taken out of the environment.

    Returns:
      None if this process was not started so, or another process was meant.
    """
    if _claimed:
        return _claimed.pop()
    value = os.environ.pop(VARIABLE, None)
    if value is None:
        return None
    try:
        fd, inode, stderr = map(int, value.split(":"))
        if os.fstat(fd).st_ino != inode:
            return None
        conn = UnixConnection.from_fd(fd)
    except (ValueError, OSError, OverflowError):
        # A program in between has closed them.
        return None
    with suppress(OSError):
        written = os.pread(_STDERR, _MAX_ERRORS, 0)
        os.dup2(stderr, _STDERR, inheritable=True)
        os.close(stderr)
        os.write(_STDERR, written)
    return conn
