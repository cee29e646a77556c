"""A client that can be any user, and knows nothing but the standard library.

Run as ``python person.py PATH UID GID GROUPS`` (numbers, groups with commas between; ``-`` for
as it is): it becomes that user, connects, and says its pid, or what connecting raised. Then it
takes one command a line on standard input and answers one line each.
"""

from __future__ import annotations

import os
import socket
import sys


def become(uid: str, gid: str, groups: str) -> None:
    """Become this user; only root can."""
    if groups != "-":
        os.setgroups([int(each) for each in groups.split(",") if each])
    if gid != "-":
        os.setresgid(int(gid), int(gid), int(gid))
    if uid != "-":
        os.setresuid(int(uid), int(uid), int(uid))


def answer(sock: socket.socket, command: str) -> str:
    """Do one thing."""
    if command.startswith("send "):
        return str(sock.send(command[5:].encode()))
    if command == "receive":
        try:
            return sock.recv(100).decode() or "end"
        except ConnectionResetError:
            return "reset"
    raise ValueError(command)


def main() -> None:
    """Connect, and take commands until standard input ends."""
    path, *user = sys.argv[1:]
    become(*user)
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(path)
        except OSError as exc:
            print(type(exc).__name__, flush=True)
            return
        print(os.getpid(), flush=True)
        for line in sys.stdin:
            print(answer(sock, line.rstrip("\n")), flush=True)


if __name__ == "__main__":
    main()
