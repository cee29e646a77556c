"""A FUSE file system with one file, whose server answers, hangs or fails as it is told.

It speaks the kernel's protocol itself, so that no library is needed, and mounts in a mount
namespace of its own, so that nothing is left mounted. It sends the opened file over the socket at
its standard input, and ends with that socket. Its end aborts every request that is unanswered.

Source: fuse(4), include/uapi/linux/fuse.h
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import stat
import struct
import sys
import tempfile
import threading
from contextlib import suppress

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 16384, 1 << 18
OPCODES = {1: "lookup", 2: "forget", 3: "getattr", 4: "setattr", 14: "open", 15: "read",
           16: "write", 17: "statfs", 18: "release", 20: "fsync", 22: "getxattr", 25: "flush",
           26: "init", 34: "access", 36: "interrupt", 39: "ioctl", 40: "poll", 42: "batch_forget",
           46: "lseek", 52: "statx"}  # fmt: skip
UNANSWERED = ("forget", "batch_forget", "interrupt")
CONTENT = b"content of a file system in user space\n"
# However a test goes wrong, its processes get free after this many seconds.
LIFETIME = 120


def checked(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def mount() -> tuple[int, str]:
    """Mount the file system where only this process sees it."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        checked(libc.unshare(CLONE_NEWNS))
    else:
        checked(libc.unshare(CLONE_NEWNS | CLONE_NEWUSER))
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"),
                           ("gid_map", f"0 {group} 1")):  # fmt: skip
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    # In the namespace in which it is mounted, or the mount is EINVAL.
    device = os.open("/dev/fuse", os.O_RDWR)
    checked(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    where = tempfile.gettempdir()
    options = f"fd={device},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
    checked(
        libc.mount(
            b"test", os.fsencode(where), b"fuse", MS_NOSUID | MS_NODEV,
            (options + (",allow_other" if user == 0 else "")).encode(),
        )
    )  # fmt: skip
    return device, where


class Server:
    """Answers the kernel's requests."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.lock = threading.Lock()
        self.hangs = False
        self.flush_error = 0
        self.asked: list[str] = []
        self.waiting: list[tuple[str, int, int, bytes]] = []

    def run(self) -> None:
        while True:
            try:
                request = os.read(self.device, 1 << 20)
            except OSError as exc:
                if exc.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                return
            _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
            name = OPCODES.get(opcode, str(opcode))
            with self.lock:
                self.asked.append(name)
                if name in UNANSWERED:
                    continue
                if self.hangs:
                    self.waiting.append((name, unique, node, request[40:]))
                else:
                    self.answer(name, unique, node, request[40:])

    def answer(self, name: str, unique: int, node: int, body: bytes) -> None:
        try:
            payload, error = self.payload(name, node, body), 0
        except OSError as exc:
            payload, error = b"", -(exc.errno or errno.EIO)
        # Not when the request was interrupted.
        with suppress(FileNotFoundError):
            os.write(self.device, struct.pack("<IiQ", 16 + len(payload), error, unique) + payload)

    def payload(self, name: str, node: int, body: bytes) -> bytes:
        if name == "init":
            major, minor, ahead, _ = struct.unpack_from("<IIII", body)
            return struct.pack("<IIIIHHIIHHI28x", major, min(minor, 31), ahead, 0, 8, 6,
                               65536, 1, 0, 0, 0)  # fmt: skip
        if name == "lookup":
            if body.rstrip(b"\0") != b"file":
                raise OSError(errno.ENOENT, name)
            return struct.pack("<QQQQII", 2, 0, 0, 0, 0, 0) + self.attributes(2)
        if name in ("getattr", "setattr"):
            return struct.pack("<QII", 0, 0, 0) + self.attributes(node)
        if name == "open":
            return struct.pack("<QII", 1, 0, 0)
        if name == "read":
            _, offset, size = struct.unpack_from("<QQI", body)
            return CONTENT[offset : offset + size]
        if name == "write":
            return struct.pack("<II", struct.unpack_from("<QQI", body)[2], 0)
        if name == "flush" and self.flush_error:
            raise OSError(self.flush_error, name)
        if name in ("flush", "release", "fsync", "access"):
            return b""
        raise OSError(errno.ENOSYS, name)

    @staticmethod
    def attributes(node: int) -> bytes:
        mode = stat.S_IFDIR | 0o755 if node == 1 else stat.S_IFREG | 0o666
        return struct.pack("<QQQQQQIIIIIIIIII", node, len(CONTENT), 1, 0, 0, 0, 0, 0, 0, mode, 1,
                           0, 0, 0, 512, 0)  # fmt: skip

    def obey(self, command: str) -> str:
        with self.lock:
            if command == "hang":
                self.hangs = True
            elif command == "answer":
                self.hangs = False
                for each in self.waiting:
                    self.answer(*each)
                self.waiting.clear()
            elif command == "fail":
                self.flush_error = errno.EIO
            elif command == "forget":
                self.asked.clear()
            return " ".join(self.asked)


def main() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LIFETIME)
    control = socket.socket(fileno=0)
    try:
        device, where = mount()
    except OSError as exc:
        control.sendall(f"no {exc}\n".encode())
        return
    server = Server(device)
    threading.Thread(target=server.run, daemon=True).start()
    fd = os.open(os.path.join(where, "file"), int(sys.argv[1]) | os.O_CLOEXEC)
    socket.send_fds(control, [b"yes\n"], [fd])
    os.close(fd)
    # Its release arrives at the server when the last process has closed it.
    commands = control.makefile("r")
    for command in commands:
        control.sendall(f"{server.obey(command.strip())}\n".encode())
    os._exit(0)


main()
