"""Files of a real FUSE file system whose server hangs, or fails, as the test says.

``fstat``, ``poll``, ``lseek`` and ``close`` of such a file wait for its server. Every request that
is unanswered at the end of the block is aborted, because the server is killed then; and two
minutes after its start, however the test goes wrong.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import attrs
import pytest

from tests._helpers.environment import environment
from tests._helpers.processes import program
from trio_unixconn import _closing

if TYPE_CHECKING:
    from collections.abc import Iterator


@attrs.define
class FuseFile:
    """An open file of a FUSE file system.

    Attributes:
      fd: the file descriptor; the block closes it. ``fstat`` of it waits while the server hangs.
      process: the server.
    """

    fd: int
    process: subprocess.Popen[bytes]
    _control: socket.socket

    def _tell(self, command: str) -> list[str]:
        self._control.sendall(f"{command}\n".encode())
        return _line(self._control).split()

    def hang(self) -> None:
        """Have the server answer no more requests."""
        self._tell("hang")

    def answer(self) -> None:
        """Have the server answer what it has not answered yet, and what follows."""
        self._tell("answer")

    def fail_flush(self) -> None:
        """Have every close(2) fail with EIO; the descriptor is closed nevertheless."""
        self._tell("fail")

    def forget(self) -> None:
        """Have :meth:`asked` begin anew."""
        self._tell("forget")

    def asked(self) -> list[str]:
        """Return the requests that arrived at the server: ``getattr``, ``flush``, ``poll`` ..."""
        return self._tell("asked")


def _line(control: socket.socket) -> str:
    text = b""
    while not text.endswith(b"\n"):
        more = control.recv(65536)
        assert more, "the FUSE server died"
        text += more
    return text.decode()


@contextmanager
def fuse_file(flags: int = os.O_RDWR) -> Iterator[FuseFile]:
    """Open a file of a FUSE file system whose server answers.

    Where FUSE cannot be mounted the test is skipped.
    """
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(30)
        with theirs:
            process = subprocess.Popen(
                program("fuse_server", str(flags)),
                env=environment(),
                stdin=theirs.fileno(),
                start_new_session=True,
            )
        fd = -1
        try:
            said, fds, _, _ = socket.recv_fds(ours, 1000, 1)
            if not fds:
                _give_up(said.decode().strip() or "the server died")
            fd = fds[0]
            os.set_inheritable(fd, False)
            yield FuseFile(fd, process, ours)
        finally:
            # Not before the server has ended: close(2) would wait for it.
            process.send_signal(signal.SIGKILL)
            process.wait(30)
            if fd >= 0:
                # ENOTCONN, as there is no server any more.
                with suppress(OSError):
                    os.close(fd)
            assert _closing.wait_closed(30)


def _give_up(reason: str) -> None:
    # A container has no /dev/fuse, or no permission to mount, even on CI. Where it has both, the
    # server itself is at fault.
    expected = os.geteuid() == 0 and os.access("/dev/fuse", os.R_OK | os.W_OK)
    if "CI" in os.environ and expected and "Operation not permitted" not in reason:
        pytest.fail(f"FUSE cannot be mounted: {reason}")
    pytest.skip(f"FUSE cannot be mounted: {reason}")


@contextmanager
def hanging_file(flags: int = os.O_RDWR) -> Iterator[FuseFile]:
    """Open a file whose server does not answer any more."""
    with fuse_file(flags) as file:
        file.hang()
        file.forget()
        yield file


@contextmanager
def file_with_failing_close(flags: int = os.O_RDWR) -> Iterator[FuseFile]:
    """Open a file of which every close(2) fails with EIO."""
    with fuse_file(flags) as file:
        file.fail_flush()
        yield file
