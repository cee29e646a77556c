"""The standard library with blocking sockets: the floor of Python."""

from __future__ import annotations

import array
import os
import socket
import struct

from common import clock, end_of, serve

INTS = array.array("i")
ROOM = socket.CMSG_SPACE(253 * 4)
FLAGS = socket.MSG_CMSG_CLOEXEC
SO_PASSCRED = 16


def send_fds(sock, fds, data=b"\0"):
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def receive_fds(sock, size=1):
    data, messages, flags, _ = sock.recvmsg(size, ROOM, FLAGS)
    fds = array.array("i")
    for level, kind, payload in messages:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload)
    if not data or flags & socket.MSG_CTRUNC:
        raise EOFError
    return fds


def close_each(fds):
    for fd in fds:
        os.close(fd)


def ping_pong(left, right):
    """Make a pair of functions from what each side does in a round."""

    def run_left(fd, job):
        with end_of(fd) as sock:
            begin = clock()
            for _ in range(job.count):
                left(sock, job)
            return clock() - begin

    def run_right(fd, job):
        with end_of(fd) as sock:
            for _ in range(job.count):
                right(sock, job)

    return run_left, run_right


def fd_left(sock, job):
    send_fds(sock, [0] * job.size)
    close_each(receive_fds(sock))


def fd_right(sock, job):
    fds = receive_fds(sock)
    send_fds(sock, [0] * job.size)
    close_each(fds)


def one_way_left(fd, job):
    with end_of(fd) as sock:
        begin = clock()
        for _ in range(job.count):
            send_fds(sock, [0] * job.size)
        sock.recv(1)
        return clock() - begin


def one_way_right(fd, job):
    with end_of(fd) as sock:
        for _ in range(job.count):
            close_each(receive_fds(sock))
        sock.sendall(b"x")


def ten_thousand_left(fd, job):
    with end_of(fd) as sock:
        begin = clock()
        left = job.size
        while left:
            send_fds(sock, [0] * min(253, left))
            left -= min(253, left)
        sock.recv(1)
        return clock() - begin


def ten_thousand_right(fd, job):
    with end_of(fd) as sock:
        left = job.size
        while left:
            fds = receive_fds(sock)
            left -= len(fds)
            close_each(fds)
        sock.sendall(b"x")


def send_credentials(sock):
    ids = struct.pack("iII", os.getpid(), os.geteuid(), os.getegid())
    sock.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, ids)])


def receive_credentials(sock):
    # As Gio does: on for this time, and off again.
    sock.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
    try:
        _, messages, _, _ = sock.recvmsg(1, ROOM, FLAGS)
    finally:
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 0)
    return struct.unpack("iII", messages[0][2])


def credentials_left(sock, job):
    send_credentials(sock)
    receive_credentials(sock)


def credentials_right(sock, job):
    receive_credentials(sock)
    send_credentials(sock)


def message_left(sock, job):
    send_fds(sock, [0, 0], b"x" * job.size)
    close_each(receive_fds(sock, 65536))


def message_right(sock, job):
    fds = receive_fds(sock, 65536)
    send_fds(sock, [0, 0], b"x" * job.size)
    close_each(fds)


def receive_exactly(sock, size):
    while size:
        size -= len(sock.recv(min(size, 65536)))


def bytes_left(sock, job):
    sock.sendall(job.payload())
    receive_exactly(sock, job.size)


def bytes_right(sock, job):
    receive_exactly(sock, job.size)
    sock.sendall(job.payload())


def buffer_left(fd, job):
    with end_of(fd) as sock:
        data = memoryview(bytearray(job.size))
        begin = clock()
        sock.sendall(data)
        sock.recv(1)
        return clock() - begin


def buffer_right(fd, job):
    with end_of(fd) as sock:
        receive_exactly(sock, job.size)
        sock.sendall(b"x")


def accept_left(fd, job):
    with end_of(fd) as sock:
        sock.recv(1)
        path = job.path + "/accept"
        begin = clock()
        for _ in range(job.count):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                client.recv(1)
        return clock() - begin


def accept_right(fd, job):
    with end_of(fd) as sock, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(job.path + "/accept")
        listener.listen()
        sock.sendall(b"x")
        for _ in range(job.count):
            conn, _ = listener.accept()
            with conn:
                peer = conn.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                if struct.unpack("iII", peer)[1] == os.geteuid():
                    conn.sendall(b"x")
    os.unlink(job.path + "/accept")


if __name__ == "__main__":
    serve(
        {
            "one descriptor, ping-pong": {"": ping_pong(fd_left, fd_right)},
            "one descriptor a message, one way": {"": (one_way_left, one_way_right)},
            "many descriptors a message, one way": {"": (one_way_left, one_way_right)},
            "ten thousand descriptors": {"": (ten_thousand_left, ten_thousand_right)},
            "credentials, ping-pong": {"": ping_pong(credentials_left, credentials_right)},
            "1 KiB and 2 descriptors, ping-pong": {"": ping_pong(message_left, message_right)},
            "bytes, ping-pong": {"": ping_pong(bytes_left, bytes_right)},
            "a large buffer": {"the bytes": (buffer_left, buffer_right)},
            "accept and check credentials": {"": (accept_left, accept_right)},
        }
    )
