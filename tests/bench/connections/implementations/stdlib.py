"""The standard library with blocking sockets: the floor of Python."""

from __future__ import annotations

import array
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

from .common import SO_PASSCRED, Job, Side, both, clock, end_of, is_same_user, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ROOM = socket.CMSG_SPACE(253 * 4)
FLAGS = socket.MSG_CMSG_CLOEXEC


def pair(
    left: Callable[[socket.socket, Job], Any], right: Callable[[socket.socket, Job], Any]
) -> tuple[Side, Side]:
    """Make the two sides from functions that get a socket."""

    def run(do: Any, meet: Any, fd: int, job: Job) -> Any:
        with end_of(fd) as sock:
            meet(fd)
            return do(sock, job)

    return both(run, left, right)


def send_fds(sock: socket.socket, fds: Iterable[int], data: bytes = b"\0") -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def receive_fds(sock: socket.socket, size: int = 1) -> array.array[int]:
    data, messages, flags, _ = sock.recvmsg(size, ROOM, FLAGS)
    fds = array.array("i")
    for level, kind, payload in messages:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload)
    if not data or flags & socket.MSG_CTRUNC:
        raise EOFError
    return fds


def close_each(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def fd_left(sock: socket.socket, job: Job) -> float:
    begin = clock()
    for _ in range(job.count):
        send_fds(sock, [0])
        close_each(receive_fds(sock))
    return clock() - begin


def fd_right(sock: socket.socket, job: Job) -> None:
    for _ in range(job.count):
        fds = receive_fds(sock)
        send_fds(sock, [0])
        close_each(fds)


def one_way_left(sock: socket.socket, job: Job) -> float:
    fds = [0] * job.size
    begin = clock()
    for _ in range(job.count):
        send_fds(sock, fds)
    sock.recv(1)
    return clock() - begin


def one_way_right(sock: socket.socket, job: Job) -> None:
    for _ in range(job.count):
        close_each(receive_fds(sock))
    sock.sendall(b"x")


def ten_thousand_left(sock: socket.socket, job: Job) -> float:
    begin = clock()
    for left in range(job.size, 0, -253):
        send_fds(sock, [0] * min(253, left))
    sock.recv(1)
    return clock() - begin


def ten_thousand_right(sock: socket.socket, job: Job) -> None:
    left = job.size
    while left:
        fds = receive_fds(sock)
        left -= len(fds)
        close_each(fds)
    sock.sendall(b"x")


def send_credentials(sock: socket.socket) -> None:
    ids = struct.pack("iII", os.getpid(), os.geteuid(), os.getegid())
    sock.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, ids)])


def receive_credentials(sock: socket.socket) -> tuple[Any, ...]:
    # As Gio does: on for this time, and off again.
    sock.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
    try:
        _, messages, _, _ = sock.recvmsg(1, ROOM, FLAGS)
    finally:
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 0)
    return struct.unpack("iII", messages[0][2])


def credentials_left(sock: socket.socket, job: Job) -> float:
    begin = clock()
    for _ in range(job.count):
        send_credentials(sock)
        receive_credentials(sock)
    return clock() - begin


def credentials_right(sock: socket.socket, job: Job) -> None:
    for _ in range(job.count):
        receive_credentials(sock)
        send_credentials(sock)


def message_left(sock: socket.socket, job: Job) -> float:
    data = job.payload()
    begin = clock()
    for _ in range(job.count):
        send_fds(sock, [0, 0], data)
        close_each(receive_fds(sock, 65536))
    return clock() - begin


def message_right(sock: socket.socket, job: Job) -> None:
    data = job.payload()
    for _ in range(job.count):
        fds = receive_fds(sock, 65536)
        send_fds(sock, [0, 0], data)
        close_each(fds)


def receive_exactly(sock: socket.socket, size: int) -> None:
    while size:
        size -= len(sock.recv(min(size, 65536)))


def bytes_left(sock: socket.socket, job: Job) -> float:
    data = job.payload()
    begin = clock()
    for _ in range(job.count):
        sock.sendall(data)
        receive_exactly(sock, job.size)
    return clock() - begin


def bytes_right(sock: socket.socket, job: Job) -> None:
    data = job.payload()
    for _ in range(job.count):
        receive_exactly(sock, job.size)
        sock.sendall(data)


def buffer_left(sock: socket.socket, job: Job) -> float:
    data = job.payload()
    begin = clock()
    for _ in range(job.count):
        sock.sendall(data)
        sock.recv(1)
    return clock() - begin


def buffer_right(sock: socket.socket, job: Job) -> None:
    for _ in range(job.count):
        receive_exactly(sock, job.size)
        sock.sendall(b"x")


def accept_left(sock: socket.socket, job: Job) -> float:
    sock.recv(1)
    path = job.path + "/accept"
    begin = clock()
    for _ in range(job.count):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.recv(1)
    return clock() - begin


def accept_right(sock: socket.socket, job: Job) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(job.path + "/accept")
        listener.listen()
        sock.sendall(b"x")
        for _ in range(job.count):
            conn, _ = listener.accept()
            with conn:
                if is_same_user(conn):
                    conn.sendall(b"x")
    os.unlink(job.path + "/accept")


if __name__ == "__main__":
    serve(
        {
            "one descriptor, ping-pong": {"": pair(fd_left, fd_right)},
            "one descriptor a message, one way": {"": pair(one_way_left, one_way_right)},
            "many descriptors a message, one way": {"": pair(one_way_left, one_way_right)},
            "ten thousand descriptors": {"": pair(ten_thousand_left, ten_thousand_right)},
            "credentials, ping-pong": {"": pair(credentials_left, credentials_right)},
            "1 KiB and 2 descriptors, ping-pong": {"": pair(message_left, message_right)},
            "bytes, ping-pong": {"": pair(bytes_left, bytes_right)},
            "a large buffer": {"the bytes": pair(buffer_left, buffer_right)},
            "accept and check credentials": {"": pair(accept_left, accept_right)},
        }
    )
