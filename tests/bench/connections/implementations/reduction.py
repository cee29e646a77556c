"""multiprocessing.reduction: ``send_handle`` of a connection, ``sendfds`` of a socket."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, recvfds, send_handle, sendfds
from typing import TYPE_CHECKING, Any

from .common import Job, Side, both, clock, end_of, serve

if TYPE_CHECKING:
    from collections.abc import Callable


def pair(
    left: Callable[[Any, Job], Any],
    right: Callable[[Any, Job], Any],
    wrap: Callable[[Any], Any] = lambda sock: sock,
) -> tuple[Side, Side]:
    """Make the two sides from functions that get ``wrap(socket)``."""

    def run(do: Any, meet: Any, fd: int, job: Job) -> Any:
        with wrap(end_of(fd)) as end:
            meet(fd)
            return do(end, job)

    return both(run, left, right)


def connection_of(sock: Any) -> Connection:
    """Make a connection as multiprocessing.Pipe does."""
    return Connection(sock.detach())


def close_each(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def handle_left(conn: Connection, job: Job) -> float:
    begin = clock()
    for _ in range(job.count):
        send_handle(conn, 0, 0)
        os.close(recv_handle(conn))
    return clock() - begin


def handle_right(conn: Connection, job: Job) -> None:
    for _ in range(job.count):
        fd = recv_handle(conn)
        send_handle(conn, 0, 0)
        os.close(fd)


def handles_left(conn: Connection, job: Job) -> float:
    begin = clock()
    for _ in range(job.count):
        send_handle(conn, 0, 0)
    os.read(conn.fileno(), 1)
    return clock() - begin


def handles_right(conn: Connection, job: Job) -> None:
    for _ in range(job.count):
        os.close(recv_handle(conn))
    os.write(conn.fileno(), b"x")


def fd_left(sock: Any, job: Job) -> float:
    begin = clock()
    for _ in range(job.count):
        sendfds(sock, [0])
        close_each(recvfds(sock, 1))
    return clock() - begin


def fd_right(sock: Any, job: Job) -> None:
    for _ in range(job.count):
        fds = recvfds(sock, 1)
        sendfds(sock, [0])
        close_each(fds)


def one_way_left(sock: Any, job: Job) -> float:
    fds = [0] * job.size
    begin = clock()
    for _ in range(job.count):
        sendfds(sock, fds)
    sock.recv(1)
    return clock() - begin


def one_way_right(sock: Any, job: Job) -> None:
    for _ in range(job.count):
        close_each(recvfds(sock, job.size))
    sock.sendall(b"x")


def ten_thousand_left(sock: Any, job: Job) -> float:
    begin = clock()
    for left in range(job.size, 0, -253):
        sendfds(sock, [0] * min(253, left))
    sock.recv(1)
    return clock() - begin


def ten_thousand_right(sock: Any, job: Job) -> None:
    left = job.size
    while left:
        fds = recvfds(sock, 253)
        left -= len(fds)
        close_each(fds)
    sock.sendall(b"x")


if __name__ == "__main__":
    serve(
        {
            "one descriptor, ping-pong": {
                "send_handle": pair(handle_left, handle_right, connection_of),
                "sendfds": pair(fd_left, fd_right),
            },
            "one descriptor a message, one way": {
                "send_handle": pair(handles_left, handles_right, connection_of),
                "sendfds": pair(one_way_left, one_way_right),
            },
            "many descriptors a message, one way": {"sendfds": pair(one_way_left, one_way_right)},
            "ten thousand descriptors": {"sendfds": pair(ten_thousand_left, ten_thousand_right)},
        }
    )
