"""A server that the kernel does not let accept connections: a seccomp filter says EPERM.

It prints what it has logged, when other tasks have run for a while after the first message.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import platform
import struct
import sys

import trio

from trio_unixconn import UnixServer, open_unix_connection, serve_unix

ACCEPT4 = {"x86_64": 288, "aarch64": 242}
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
SECCOMP_MODE_FILTER, ALLOW, ERRNO = 2, 0x7FFF0000, 0x00050000


def forbid_accept() -> None:
    """Make accept4(2) fail with EPERM in this process. Source: seccomp(2)."""
    program = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (0x20, 0, 0, 0),  # load the number of the system call
            (0x15, 0, 1, ACCEPT4[platform.machine()]),  # if it is accept4
            (0x06, 0, 0, ERRNO | errno.EPERM),
            (0x06, 0, 0, ALLOW),
        )
    )
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("HP", len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, fprog, 0, 0) == 0


class Handler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


async def main(path: str) -> None:
    """Serve, and wait until the failure of accept(2) is logged."""
    handler = Handler()
    logging.getLogger("trio_unixconn").addHandler(handler)
    async with trio.open_nursery() as nursery:
        server: UnixServer = await nursery.start(serve_unix, trio.sleep_forever, path)
        forbid_accept()
        async with await open_unix_connection(path):
            while not handler.messages:
                await trio.sleep(0.001)
            # The server has not ended, and its task does not keep others from running.
            for _ in range(100):
                await trio.sleep(0.001)
            assert server.accepted == 0
            print(handler.messages, flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
