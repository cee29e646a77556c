"""What every implementation written in Python shares: the protocol, the processes, and the end.

Invariant: it knows nothing of any implementation, so that what differs between them is
only how a connection gets to a worker.

A request is 64 bytes; its first says whether to burn CPU before the answer, which is the pid of
the worker in decimal and a newline. Then the connection is closed. An implementation prints one
line of JSON when all of its workers accept, and ends when its standard input does, or by SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from types import FrameType

import trio

REQUEST = 64
BURN = b"b"
# Of CPU, in seconds: time in which others have the processor does not count.
BURN_TIME = 0.050
WORKERS = 4
# For each implementation the same; the kernel takes what net.core.somaxconn allows.
BACKLOG = 4096
ANSWER = b"%d\n" % os.getpid()


def burn() -> None:
    """Burn CPU, and let nothing else of this thread happen meanwhile."""
    end = time.thread_time() + BURN_TIME
    while time.thread_time() < end:
        pass


async def answer(stream: trio.SocketStream) -> None:
    """Serve one connection, which the caller closes."""
    # A client that resets its connection, as it does to end an idle one, is not a failure.
    with suppress(trio.BrokenResourceError):
        request = b""
        while len(request) < REQUEST:
            more = await stream.receive_some()
            if not more:
                return
            request += more
        if request.startswith(BURN):
            burn()
        await stream.send_all(ANSWER)


def bound(port: int = 0, *, shares_port: bool = False) -> socket.socket:
    """Return a socket at 127.0.0.1, at any port or at this one; it does not listen yet."""
    sock = socket.socket()
    if shares_port:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    return sock


def listening(sock: socket.socket) -> trio.SocketListener:
    """Have a bound socket listen."""
    sock.listen(BACKLOG)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


def announce(port: int) -> None:
    """Say that connections to this port are accepted."""
    sys.stdout.write(json.dumps({"port": port}) + "\n")
    sys.stdout.flush()


async def told_to_end() -> None:
    """Wait for the end of standard input, or for SIGTERM."""

    async def end_of_input() -> None:
        # One that cannot be waited for is a file, or /dev/null, and is at its end.
        with suppress(PermissionError):
            while True:
                await trio.lowlevel.wait_readable(0)
                if not os.read(0, 4096):
                    break
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_of_input)
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                break
        nursery.cancel_scope.cancel()


async def serve(sock: socket.socket) -> None:
    """Serve a bound socket in this process, until told to end."""
    port = sock.getsockname()[1]
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, answer, [listening(sock)])
        announce(port)
        await told_to_end()
        nursery.cancel_scope.cancel()


def run_workers(module: str, port: int, *arguments: str, fds: tuple[int, ...] = ()) -> None:
    """Run a module as workers, each of which announces itself, until told to end."""

    def end(_: int, __: FrameType | None) -> None:
        sys.exit()

    signal.signal(signal.SIGTERM, end)
    command = [sys.executable, "-m", module, "worker", *arguments]
    with ExitStack() as stack:
        # Each ends with its standard input, even if this process is killed.
        workers = [
            stack.enter_context(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=fds
                )
            )
            for _ in range(WORKERS)
        ]
        for worker in workers:
            assert worker.stdout is not None
            if not worker.stdout.readline():
                sys.exit("a worker died before it accepted")
        announce(port)
        while os.read(0, 4096):
            pass
