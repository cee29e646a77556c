"""What the examination tries things on: sockets, files, a process.

Invariant: everything that it makes is gone after its block, and no wait is longer than
:data:`PATIENCE`, or :data:`PROCESS_PATIENCE` if it is for a process.
"""

from __future__ import annotations

import os
import socket as stdlib_socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from ... import _ancillary, _kernel
from ..._owner import ContextOwner

if TYPE_CHECKING:
    from ..._ancillary import ControlMessage, Received

# Seconds for an answer of the kernel; for a process, which may get little time on a busy machine.
PATIENCE: Final = 10.0
PROCESS_PATIENCE: Final = 60.0
# Seconds after which it is looked at again whether a process still runs.
_POLL: Final = 0.1

_CHILD: Final = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sys.stdin.read()
"""


class UnexpectedError(Exception):
    """A feature does not have the expected effect."""


def expect(condition: bool, otherwise: str) -> None:  # noqa: FBT001 - as assert has it
    """Raise UnexpectedError unless ``condition``."""
    if not condition:
        raise UnexpectedError(otherwise)


def expect_error(kind: type[Exception], do: Callable[[], object], otherwise: str) -> None:
    """Raise UnexpectedError unless ``do`` raises an error of this kind."""
    try:
        do()
    except kind:
        return
    raise UnexpectedError(otherwise)


class Lab(ContextOwner):
    """A block in which things are tried."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def close(self) -> None:
        """Undo and close everything, in reverse order."""
        self._stack.close()

    def afterwards(self, undo: Callable[[], object]) -> None:
        """Have ``undo`` called at the end."""
        self._stack.callback(undo)

    def own(self, fd: int) -> int:
        """Close ``fd`` at the end."""
        self._stack.callback(os.close, fd)
        return fd

    def socket(self) -> stdlib_socket.socket:
        """Make a Unix stream socket."""
        family = _kernel.required(_kernel.AF_UNIX, "Unix sockets")
        return self._tamed(stdlib_socket.socket(family))

    def pair(self) -> tuple[stdlib_socket.socket, stdlib_socket.socket]:
        """Make two that are connected."""
        family = _kernel.required(_kernel.AF_UNIX, "Unix sockets")
        one, two = stdlib_socket.socketpair(family)
        return self._tamed(one), self._tamed(two)

    def accept(self, listener: stdlib_socket.socket) -> stdlib_socket.socket:
        """Accept a connection."""
        return self._tamed(listener.accept()[0])

    def _tamed(self, sock: stdlib_socket.socket) -> stdlib_socket.socket:
        self._stack.enter_context(sock)
        sock.settimeout(PATIENCE)
        return sock

    def send(self, sock: stdlib_socket.socket, *messages: ControlMessage) -> None:
        """Send a byte with control messages."""
        sock.sendmsg([b"x"], messages)

    def receive(
        self, sock: stdlib_socket.socket, flags: int = _kernel.MSG_CMSG_CLOEXEC
    ) -> Received:
        """Receive a byte and its ancillary data, which is closed at the end."""
        received = _ancillary.unpack(sock.recvmsg(1, _kernel.CONTROL_ROOM, flags))
        self._stack.callback(received.close)
        expect(received.data == b"x", f"expected b'x', got {received.data!r}")
        return received

    def file(self) -> int:
        """Open a file that has no name."""
        return self.own(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def directory(self) -> str:
        """Make a directory, which is removed at the end with all that is in it."""
        # Not below what TMPDIR says if that is too long for the paths of sockets.
        parent = tempfile.gettempdir()
        parent = parent if len(parent) < 40 else "/tmp"  # noqa: S108 - a private directory in it
        directory = tempfile.TemporaryDirectory(prefix="trio-unixconn-", dir=parent)
        return self._stack.enter_context(directory)

    def listener(self, path: str | bytes) -> stdlib_socket.socket:
        """Listen at a path or an abstract name."""
        sock = self.socket()
        sock.bind(path)
        sock.listen()
        return sock

    def child(self) -> tuple[subprocess.Popen[bytes], stdlib_socket.socket]:
        """Start a process that connects, and return the accepted connection with it.

        It ends once its standard input does.
        """
        path = os.path.join(self.directory(), "socket")
        listener = self.listener(path)
        process = subprocess.Popen([sys.executable, "-ISc", _CHILD, path], stdin=subprocess.PIPE)
        self._stack.enter_context(process)
        self.afterwards(process.kill)
        listener.settimeout(_POLL)
        deadline = time.monotonic() + PROCESS_PATIENCE
        while True:
            try:
                return process, self.accept(listener)
            except TimeoutError:
                status = process.poll()
                expect(status is None, f"a process that was to connect ended with status {status}")
                if time.monotonic() >= deadline:
                    raise
