"""A peer that knows nothing but the standard library: the other end of our connection.

Run as ``python stdlib_peer.py FD``: it owns the socket FD, takes one JSON command a line on
standard input, and answers one JSON line each.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import sys
from typing import Any

CONTROL = socket.CMSG_SPACE(4 * 253) + socket.CMSG_SPACE(12)


def look(fd: int) -> dict[str, Any]:
    """Describe an open file as this process sees it."""
    status = os.fstat(fd)
    return {
        "link": os.readlink(f"/proc/self/fd/{fd}"),
        "identity": [status.st_dev, status.st_ino],
        "mode": status.st_mode,
    }


def open_kind(kind: str) -> list[int]:
    """Open something of this kind; the first descriptor is the one to send."""
    if kind == "file":
        return [os.open(__file__, os.O_RDONLY)]
    if kind == "pipe":
        return list(os.pipe())
    if kind == "tcp":
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(server.getsockname())
            return [server.accept()[0].detach(), client.detach()]
    if kind == "unix":
        return [each.detach() for each in socket.socketpair()]
    if kind == "listening":
        return [socket.create_server(("127.0.0.1", 0)).detach()]
    if kind == "memfd":
        return [os.memfd_create("peer")]
    if kind == "pidfd":
        return [os.pidfd_open(os.getpid())]
    if kind == "epoll":
        with select.epoll() as epoll:
            return [os.dup(epoll.fileno())]
    raise ValueError(kind)


class Peer:
    """The commands."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def receive(self, size: int = 1) -> dict[str, Any]:
        """Receive up to ``size`` bytes and all control messages."""
        data, ancdata, flags, _ = self.sock.recvmsg(size, CONTROL)
        seen: list[dict[str, Any]] = []
        credentials: list[int] = []
        for _level, kind, payload in ancdata:
            if kind == socket.SCM_RIGHTS:
                for (fd,) in struct.iter_unpack("i", payload):
                    seen.append(look(fd))
                    os.close(fd)
            elif kind == socket.SCM_CREDENTIALS:
                credentials = list(struct.unpack("iII", payload))
        return {
            "data": data.hex(),
            "fds": seen,
            "credentials": credentials,
            "messages": len(ancdata),
            "flags": flags,
        }

    def passcred(self) -> None:
        """Ask for credentials with every message."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    def disable_passrights(self) -> bool:
        """Switch SO_PASSRIGHTS (83) off; whether this kernel has it."""
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, 83, 0)
        except OSError:
            return False
        return True

    def send(self, kinds: list[list[str]], data: str = "00", credentials: bool = False) -> Any:
        """Send ``data`` with an SCM_RIGHTS message for each list of ``kinds``."""
        messages: list[tuple[int, int, bytes]] = []
        opened: list[int] = []
        looks: list[dict[str, Any]] = []
        if credentials:
            ids = struct.pack("iII", os.getpid(), os.geteuid(), os.getegid())
            messages.append((socket.SOL_SOCKET, socket.SCM_CREDENTIALS, ids))
        for header in kinds:
            fds = [open_kind(kind) for kind in header]
            opened += [fd for each in fds for fd in each]
            looks += [look(each[0]) for each in fds]
            payload = b"".join(struct.pack("i", each[0]) for each in fds)
            messages.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, payload))
        self.sock.sendmsg([bytes.fromhex(data)], messages)
        for fd in opened:
            os.close(fd)
        return looks

    def read_behind(self) -> str:
        """Receive a descriptor and return what it reads as, up to its end."""
        _, fds, _, _ = socket.recv_fds(self.sock, 1, 1)
        with os.fdopen(fds[0], "rb") as file:
            return file.read().hex()

    def plain_receive(self, size: int) -> str:
        """Receive exactly that many bytes."""
        data = b""
        while len(data) < size:
            data += self.sock.recv(size - len(data))
        return data.hex()

    def reset(self) -> None:
        """Close with unread data, so that the other end gets ECONNRESET."""
        self.sock.close()

    def eof(self) -> None:
        """End our stream, and go on receiving."""
        self.sock.shutdown(socket.SHUT_WR)

    def pid(self) -> int:
        """Return our pid."""
        return os.getpid()


def main() -> None:
    """Take commands until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    peer = Peer(socket.socket(fileno=int(sys.argv[1])))
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(peer, command.pop("do"))(**command)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
