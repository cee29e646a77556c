"""Open files to send, and what to compare when one has arrived; both ends use this module.

Only the standard library, and Python 3.9, because the peer runs under the system's Python.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = ("file", "pipe", "tcp", "unix")


@contextmanager
def opened(kind: str, content: bytes) -> Iterator[int]:
    """Open a file of this kind from which ``content`` can be read."""
    if kind == "file":
        with tempfile.TemporaryFile() as file:
            file.write(content)
            file.flush()
            yield file.fileno()
    elif kind == "pipe":
        reader, writer = os.pipe()
        try:
            os.write(writer, content)
            os.close(writer)
            yield reader
        finally:
            os.close(reader)
    else:
        near, far = _tcp_pair() if kind == "tcp" else socket.socketpair()
        with near:
            with far:
                far.sendall(content)
            yield near.fileno()


def described(fd: int) -> dict[str, Any]:
    """Say which open file this is, and read what is in it."""
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        content = os.pread(fd, 4096, 0)
    else:
        waiting = select.poll()
        waiting.register(fd, select.POLLIN)
        # TCP may take a moment to hand over what was sent before.
        assert waiting.poll(30_000), "nothing to read in the file that arrived"
        content = os.read(fd, 4096)
    return {
        "device": status.st_dev,
        "inode": status.st_ino,
        "kind": stat.filemode(status.st_mode)[0],
        "inheritable": os.get_inheritable(fd),
        "content": content.hex(),
    }


def identity(fd: int) -> list[int]:
    """Say which open file this is, without reading from it."""
    status = os.fstat(fd)
    return [status.st_dev, status.st_ino]


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    return near, far
