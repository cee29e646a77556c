"""A worker's process: a fresh interpreter, started, waited for, and killed.

The rule of this file: whoever starts one also reaps it, whatever happens in between.

Sources: pidfd_open(2), signal(7), https://docs.python.org/3/library/subprocess.html
"""

from __future__ import annotations

import json
import os
import signal
import socket as stdlib_socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from .._connection import UnixConnection
from .._owner import DescriptorOwner
from ._completion_log import CompletionLog, create_log

if TYPE_CHECKING:
    from collections.abc import Generator

_BOOTSTRAP: Final = str(Path(__file__).with_name("_bootstrap.py"))


class WorkerProcess(DescriptorOwner):
    """A process, and the connection to it.

    Attributes:
      conn: this side's end; the other is the process's only.
      log: the jobs that it has finished.
      pid: its number.
    """

    def __init__(
        self, popen: subprocess.Popen[bytes], conn: UnixConnection, log: CompletionLog
    ) -> None:
        self._popen = popen
        self.conn = conn
        self.log = log
        self.pid: int = popen.pid
        self._pidfd = _pidfd_of(popen.pid)

    async def wait(self) -> int:
        """Wait until it has ended, and reap it.

        Returns:
          Its exit status; negative, the signal that killed it.
        """
        if self._popen.returncode is not None:
            # The number may be another's by now.
            return self._popen.returncode
        if self._pidfd < 0:
            return await trio.to_thread.run_sync(self._popen.wait, abandon_on_cancel=True)
        await trio.lowlevel.wait_readable(self._pidfd)
        return self._popen.wait()

    def kill(self) -> None:
        """Kill it, if it has not been reaped."""
        self._popen.kill()

    def close(self) -> None:
        """Close what belongs to it, once it has been reaped."""
        self.conn._close_now()  # noqa: SLF001 - as aclose(), without its checkpoint
        self.log.close()
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)


def _pidfd_of(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        # Not Linux, before 5.3, or no descriptor is free.
        return -1


def start(order: dict[str, Any]) -> WorkerProcess:
    """Start a worker with its order, which :mod:`._boot` reads.

    Not in a thread: what prctl(2) has the kernel tell the worker is the death of the thread
    that started it. It takes a millisecond or two.

    Raises:
      OSError: EMFILE, ENOMEM, EAGAIN; nothing is left behind.
    """
    with ExitStack() as stack:
        ours, theirs = stdlib_socket.socketpair()
        stack.callback(theirs.close)
        failed = stack.enter_context(ExitStack())
        failed.callback(ours.close)
        board_fd = create_log(order["log"])
        stack.callback(os.close, board_fd)
        board = CompletionLog(board_fd)
        failed.callback(board.close)
        inherited = [theirs.fileno(), board_fd]
        body = json.dumps({**order, "path": sys.path, "pool": os.getpid()}).encode()
        ours.sendall(len(body).to_bytes(4, "big") + body)
        popen = subprocess.Popen(  # noqa: S603 - this interpreter, and a file of ours
            # The handler's name is for who looks at a list of processes.
            [sys.executable, _BOOTSTRAP, *map(str, inherited), order["handler"]],
            stdin=subprocess.DEVNULL,
            pass_fds=inherited,
            # What a terminal sends is for the pool's process only.
            start_new_session=True,
        )
        failed.pop_all()
    return WorkerProcess(popen, UnixConnection.from_stdlib_socket(ours), board)


def describe_exit(status: int) -> str:
    """Say how a process ended."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


# What starting a worker takes: two sockets, its board and the map of that, and three of
# subprocess; then its pidfd.
_RESERVED: Final = 8


class FdReserve(DescriptorOwner):
    """Descriptors that are in use for nothing."""

    def __init__(self) -> None:
        self._fds: list[int] = []
        self.fill()

    def fill(self) -> None:
        """Take as many as are due, if they are there."""
        fds = self._fds
        while len(fds) < _RESERVED:
            try:
                fds.append(os.dup(fds[0]) if fds else os.open(os.devnull, os.O_RDONLY))
            except OSError:
                return

    @contextmanager
    def released(self) -> Generator[None, None, None]:
        """Give them up in this block, which must not wait."""
        self.close()
        try:
            yield
        finally:
            self.fill()

    def close(self) -> None:
        """Give them up."""
        while self._fds:
            os.close(self._fds.pop())
