"""A client that can be any user. It uses the standard library only.

Run as ``python connecting_client.py PATH UID GID GROUPS`` (numbers, groups separated by commas;
``-`` to keep the current one). It becomes that user, connects, and prints its pid, or the name of
the exception of connect. Then it reads one command per line and prints one line for each.
"""

from __future__ import annotations

import os
import socket
import sys


def become(uid: str, gid: str, groups: str) -> None:
    """Become this user, which requires root."""
    if groups != "-":
        os.setgroups([int(each) for each in groups.split(",") if each])
    if gid != "-":
        os.setresgid(int(gid), int(gid), int(gid))
    if uid != "-":
        os.setresuid(int(uid), int(uid), int(uid))


def answer(sock: socket.socket, command: str) -> str:
    """Run one command."""
    if command.startswith("send "):
        return str(sock.send(command[5:].encode()))
    if command == "receive":
        try:
            return sock.recv(100).decode() or "end"
        except ConnectionResetError:
            return "reset"
    raise ValueError(command)


def main() -> None:
    """Connect, and run commands until end of file."""
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
