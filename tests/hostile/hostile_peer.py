"""A peer that means harm, in Python: random messages through ``socket.sendmsg``.

``hostile_peer.py FD SEED COUNT``, as hostile.c says. It cannot lie about the length of a
control message, but opens other descriptors, and new ones all the time. Standard library only.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import random
import select
import socket
import struct
import sys
import tempfile
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

F_ADD_SEALS = 1033
SCM_PIDFD = 4
REFUSED = (OSError, OverflowError, ValueError)


class Hostile:
    """Random messages, on one connection after the other."""

    def __init__(self, control: socket.socket, seed: int) -> None:
        self.control = control
        self.random = random.Random(seed)
        self.kept: list[object] = []
        self.makers: list[Callable[[], list[int]]] = [
            self.a_file,
            self.a_written_file,
            self.a_folder,
            self.a_pipe,
            self.unix_sockets,
            self.tcp_sockets,
            self.a_listener,
            self.a_memfd,
            self.a_sealed_memfd,
            self.an_epoll,
            self.a_process,
        ]
        # A few of each kind to begin with; some are replaced as time goes by.
        self.pool: list[list[int]] = [make() for make in self.makers for _ in range(2)]

    def a_file(self) -> list[int]:
        return [os.open(__file__, os.O_RDONLY)]

    def a_written_file(self) -> list[int]:
        fd, path = tempfile.mkstemp()
        os.unlink(path)
        return [fd]

    def a_folder(self) -> list[int]:
        return [os.open("/", self.random.choice([os.O_RDONLY, os.O_PATH]))]

    def a_pipe(self) -> list[int]:
        return list(os.pipe())

    def unix_sockets(self) -> list[int]:
        kind = self.random.choice([socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
        one, two = socket.socketpair(socket.AF_UNIX, kind)
        return [one.detach(), two.detach()]

    def tcp_sockets(self) -> list[int]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            one = socket.create_connection(listener.getsockname())
            two, _ = listener.accept()
        fds = [one.detach(), two.detach()]
        # One of the two has no peer any more.
        if self.random.random() < 0.5:
            os.close(fds.pop())
        return fds

    def a_listener(self) -> list[int]:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("")
        listener.listen()
        return [listener.detach()]

    def a_memfd(self) -> list[int]:
        return [os.memfd_create("hostile", 0)]

    def a_sealed_memfd(self) -> list[int]:
        fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
        os.write(fd, b"." * self.random.choice([0, 1, 5000]))
        fcntl.fcntl(fd, F_ADD_SEALS, self.random.choice([1, 8, 14, 15, 15, 15]))
        return [fd]

    def an_epoll(self) -> list[int]:
        epoll = select.epoll()
        self.kept.append(epoll)
        return [os.dup(epoll.fileno())]

    def a_process(self) -> list[int]:
        return [os.pidfd_open(os.getpid())]

    def replace_some(self) -> None:
        """Close the descriptors of one entry, of which the kernel may still hold some."""
        position = self.random.randrange(len(self.pool))
        for fd in self.pool[position]:
            os.close(fd)
        self.pool[position] = self.random.choice(self.makers)()
        # So many epoll objects are too many.
        del self.kept[:-4]

    def descriptors(self, conn: socket.socket) -> list[int]:
        rng = self.random
        roll = rng.randrange(20)
        count = 1
        if roll == 0:
            count = 0
        elif roll == 1:
            count = rng.choice([253, 253, 254, rng.randrange(254)])
        elif roll < 6:
            count = rng.randrange(2, 17)
        fds = [rng.choice(rng.choice(self.pool)) for _ in range(count)]
        if rng.random() < 0.02:
            fds.append(conn.fileno())
        if rng.random() < 0.02:
            fds.append(rng.choice([-1, -100, 900]))
        return fds

    def one_control(self, conn: socket.socket) -> tuple[int, int, bytes]:
        rng = self.random
        roll = rng.random()
        payload = array.array("i", self.descriptors(conn)).tobytes()
        if roll < 0.12:
            pid = rng.choice([os.getpid(), os.getpid(), os.getpid(), os.getppid(), 1, 99999])
            ids = struct.pack("3i", pid, os.getuid(), rng.choice([os.getgid(), 12345]))
            return socket.SOL_SOCKET, socket.SCM_CREDENTIALS, ids + bytes(rng.choice([0, 0, 0, 1]))
        if roll < 0.16:
            return rng.choice([socket.SOL_SOCKET, 0, 6, 41]), rng.randrange(8), payload
        if roll < 0.17:
            return socket.SOL_SOCKET, SCM_PIDFD, payload
        if roll < 0.22:
            payload += bytes(rng.randrange(1, 4))
        return socket.SOL_SOCKET, socket.SCM_RIGHTS, payload

    def one_message(self, conn: socket.socket) -> None:
        rng = self.random
        # The same mixture of sizes as in C: mostly one byte, as descriptors travel.
        roll = rng.random()
        size = 1
        if roll < 0.02:
            size = rng.randrange(65537)
        elif roll < 0.2:
            size = rng.randrange(1025)
        elif roll < 0.4:
            size = rng.randrange(17)
        headers = rng.choice([0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 3, rng.randrange(9)])
        flags = socket.MSG_NOSIGNAL | (socket.MSG_OOB if rng.random() < 0.02 else 0)
        conn.sendmsg([bytes(size)], [self.one_control(conn) for _ in range(headers)], flags)

    def connection(self) -> socket.socket:
        """Open a new connection, of which the other side gets one end."""
        if self.control.recv(1) != b"n":
            raise SystemExit(1)
        ours, theirs = socket.socketpair()
        with theirs:
            while True:
                try:
                    socket.send_fds(self.control, [b"c"], [theirs.fileno()])
                except OSError as exc:
                    # Other processes of this user have too many in flight.
                    if exc.errno != errno.ETOOMANYREFS:
                        raise
                    time.sleep(0.001)
                else:
                    return ours

    def run(self, count: int) -> None:
        rng = self.random
        sent = refused = 0
        conn: socket.socket | None = None
        while sent < count:
            conn = conn or self.connection()
            try:
                self.one_message(conn)
                sent += 1
            except REFUSED as exc:
                if getattr(exc, "errno", None) in (errno.EPIPE, errno.ECONNRESET):
                    conn.close()
                    conn = None
                    continue
                refused += 1
            roll = rng.random()
            if roll < 0.01:
                with suppress(OSError):
                    conn.shutdown(rng.choice([socket.SHUT_WR, socket.SHUT_RDWR]))
            if roll < 0.025:
                conn.close()
                conn = None
            elif roll < 0.05:
                self.replace_some()
        if conn is not None:
            conn.close()
        self.control.recv(1)
        self.control.send(f"{sent} {refused}".encode())


if __name__ == "__main__":
    fd, seed, count = map(int, sys.argv[1:])
    Hostile(socket.socket(fileno=fd), seed).run(count)
