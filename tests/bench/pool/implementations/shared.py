"""Trio processes that have all inherited one listening socket.

Invariant: the first process to accept has the connection. Each connection wakes all that wait,
because trio's poller does not ask for less (EPOLLEXCLUSIVE).
"""

from __future__ import annotations

import socket
import sys

import trio

from .serving import bound, run_workers, serve


def main() -> None:
    """Make the socket, and run the workers; or be one of them."""
    if sys.argv[1:2] == ["worker"]:
        trio.run(serve, socket.socket(fileno=int(sys.argv[2])))
        return
    with bound() as sock:
        fd = sock.fileno()
        run_workers(__spec__.name, sock.getsockname()[1], str(fd), fds=(fd,))


if __name__ == "__main__":
    main()
