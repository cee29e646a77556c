"""File descriptors to send and to compare, and sockets whose buffers are full."""

from __future__ import annotations

import os
from typing import Any

import trio

from trio_unixconn import UnixConnection, UnixFDList, testing


def look(fd: int) -> dict[str, Any]:
    """Describe an open file as the peers do."""
    status = os.fstat(fd)
    return {
        "link": os.readlink(f"/proc/self/fd/{fd}"),
        "identity": [status.st_dev, status.st_ino],
        "mode": status.st_mode,
    }


def some(count: int) -> UnixFDList:
    """Open ``count`` memfds, whose sizes are 0, 1, 2 and so on."""
    fds = UnixFDList()
    for size in range(count):
        fd = os.memfd_create("some")
        os.ftruncate(fd, size)
        fds.append(fd)
        os.close(fd)
    return fds


def sizes(fds: UnixFDList) -> list[int]:
    """Return the sizes of the files in a list, in order."""
    return [os.fstat(fd).st_size for fd in fds]


async def drain(conn: UnixConnection, count: int) -> list[int]:
    """Receive ``count`` file descriptors; return the sizes of their files."""
    got: list[int] = []
    with trio.fail_after(30):
        while len(got) < count:
            with await conn.receive_fds(count - len(got)) as fds:
                got += sizes(fds)
    return got


free_descriptors = testing.limit_descriptors
clog = testing.clog
unclog = testing.unclog
