"""The program that a worker's interpreter runs. It is never imported.

Invariant: nothing of the package is imported before the import path is the one of the pool.
"""

import os
import sys

if sys.path[:1] == [os.path.dirname(__file__)]:
    # The directory of this program. Its _queue is not the one of the standard library.
    del sys.path[0]

import io
import json
import socket


def main() -> None:
    """Read the configuration, and become a worker, or a template that forks workers.

    The arguments are the numbers of three inherited file descriptors (the connection, the
    completion log, the configuration), and the import string of the handler, which is there for
    readers of a list of processes.
    """
    connection, log, config = map(int, sys.argv[1:4])
    # It says that this process has not come this far.
    os.environ.pop("TRIO_UNIXCONN_WORKER", None)
    if os.environ.pop("TRIO_UNIXCONN_LINES", None) and isinstance(sys.stdout, io.TextIOWrapper):
        # What reads the other end forwards lines, each when it is complete.
        sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportUnknownMemberType]
    with open(config, "rb") as file:
        message, _, setup_data = file.read().partition(b"\n")
    fields = json.loads(message)
    sys.path[:] = fields["path"]
    # As in a program of the user.
    sys.argv[:] = sys.argv[4:]
    sock = socket.socket(fileno=connection)
    if fields.get("config", {}).get("is_template"):
        from trio_unixconn.pool._template import run_template

        os.close(log)
        sys.exit(run_template(sock, fields))
    from trio_unixconn.pool._worker import run_worker

    sys.exit(run_worker(sock, log, fields, setup_data))


if __name__ == "__main__":
    main()
