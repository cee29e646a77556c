"""Trio processes that each have a listening socket at the same port (SO_REUSEPORT).

Invariant: the kernel chooses the process that gets a connection by a hash of addresses and
ports, whether that process is busy or not. Source: socket(7).
"""

from __future__ import annotations

import sys

import trio

from .serving import bound, run_workers, serve


def main() -> None:
    """Hold the port, and run the workers; or be one of them."""
    if sys.argv[1:2] == ["worker"]:
        trio.run(serve, bound(int(sys.argv[2]), shares_port=True))
        return
    # One that does not listen gets no connections.
    with bound(shares_port=True) as sock:
        port = sock.getsockname()[1]
        run_workers(__spec__.name, port, str(port))


if __name__ == "__main__":
    main()
