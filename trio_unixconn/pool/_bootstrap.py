"""What a worker's interpreter runs first: it is given the pool's import path, and the rest.

The rule of this file: nothing of the package is imported before the path is the pool's. It is
run as a program, never imported.
"""

import json
import socket
import sys


def boot() -> None:
    """Read the order on the socket that the pool has left open, and become its worker.

    The arguments are the descriptors of the socket and of the board, and the handler's name.
    """
    sock = socket.socket(fileno=int(sys.argv[1]))
    board = int(sys.argv[2])
    size = int.from_bytes(sock.recv(4, socket.MSG_WAITALL), "big")
    order = json.loads(sock.recv(size, socket.MSG_WAITALL))
    sys.path[:] = order["path"]
    from trio_unixconn.pool._worker import work  # noqa: PLC0415 - as the rule says

    # As a user's program would have it; what is in argv is of no interest to a handler.
    sys.argv[:] = [order["handler"]]
    sys.exit(work(sock, board, order))


if __name__ == "__main__":
    boot()
