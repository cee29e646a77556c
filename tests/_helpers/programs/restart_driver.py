"""A server that is restarted repeatedly while clients send requests.

``restart_driver.py DIRECTORY RESTARTS CLIENTS``. All processes are forked here, where no thread
runs. Each server takes the path over from the one before, which is then told to drain. Prints
one JSON object: how many requests were answered, and how any of the others ended.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from tests._helpers.programs.bind_driver import forked, status_of
from trio_unixconn import UnixConnection, serve_unix

if TYPE_CHECKING:
    from collections.abc import Callable


async def serve(path: Path, said: int, told: int) -> None:
    """Serve until told to drain."""

    async def handler(conn: UnixConnection) -> None:
        async for data in conn:
            await conn.send_all(data.upper())

    async with trio.open_nursery() as nursery:
        server = await nursery.start(
            lambda task_status: serve_unix(handler, path, replace=True, task_status=task_status)
        )
        os.write(said, b"r")
        await trio.lowlevel.wait_readable(told)
        server.drain()


def server(path: Path) -> tuple[int, int, int]:
    """Start a server; return its pid, and the pipes from it and to it."""
    said_read, said_write = os.pipe()
    told_read, told_write = os.pipe()

    def work() -> int:
        os.close(told_write)
        trio.run(serve, path, said_write, told_read)
        return 0

    pid = forked(work)
    os.close(said_write)
    os.close(told_read)
    return pid, said_read, told_write


def client(path: Path, stop: int, report: int) -> Callable[[], int]:
    """Return the work of a client that connects and sends requests until told to stop."""

    def work() -> int:
        seen: Counter[str] = Counter()
        os.set_blocking(stop, False)
        while True:
            try:
                os.read(stop, 1)
                break
            except BlockingIOError:
                pass
            try:
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(str(path))
                    sock.sendall(b"x")
                    answer = sock.recv(1)
                seen["answered" if answer == b"X" else f"answer {answer!r}"] += 1
            except OSError as exc:
                seen[f"{type(exc).__name__}: {exc}"] += 1
        os.write(report, json.dumps(seen).encode() + b"\n")
        return 0

    return work


def main(path: Path, restarts: int, clients: int) -> None:
    stop_read, stop_write = os.pipe()
    report_read, report_write = os.pipe()
    pid, said, told = server(path)
    os.read(said, 1)
    askers = [forked(client(path, stop_read, report_write)) for _ in range(clients)]
    os.close(report_write)
    bad: list[str] = []
    for _ in range(restarts):
        new = server(path)
        if os.read(new[1], 1) != b"r":
            bad.append("a server did not start")
        # A byte, as the new server holds a copy of this end: closing it says nothing.
        os.write(told, b"e")
        if status_of(pid):
            bad.append("a server ended badly")
        os.close(told)
        os.close(said)
        pid, said, told = new
    os.write(stop_write, b"s" * clients)
    seen: Counter[str] = Counter()
    with open(report_read) as reports:
        for line in reports:
            seen.update(json.loads(line))
    bad += [f"a client ended with {status}" for status in map(status_of, askers) if status]
    os.write(told, b"e")
    if status_of(pid):
        bad.append("the last server ended badly")
    answered = seen.pop("answered", 0)
    print(
        json.dumps(
            {"answered": answered, "else": seen, "bad": bad, "left": os.listdir(path.parent)}
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1], "socket"), int(sys.argv[2]), int(sys.argv[3]))
