"""Starting and ending the programs with which this library is tested."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import trio

from tests._helpers.glib import missing_peer
from tests._helpers.waiting import until_sync
from trio_unixconn import (
    UnixConnection,
    UnixSocketAddress,
    open_unix_connection,
    open_unix_listener,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
    from pathlib import Path

# Not on the PATH of an ordinary user.
SERVERS: Final = "/usr/sbin"


def require_program(name: str, *, package: str | None = None) -> str:
    """Return the path of a program; skip without it, but fail on CI.

    Args:
      package: the package of Debian that contains it, if that has another name.
    """
    found = shutil.which(name, path=f"{os.environ['PATH']}:{SERVERS}")
    if found is None:
        missing_peer(
            f"{name} is not installed; on Debian and Ubuntu install the package {package or name}"
        )
    return found


def free_port() -> int:
    """Return a port that is free at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def wait_for_port(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until a proxy that was started listens at its port."""

    def is_listening() -> bool:
        assert process.poll() is None, "the proxy exited; its errors are on stderr"
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    until_sync(is_listening)


@asynccontextmanager
async def running(command: Sequence[str], **options: Any) -> AsyncGenerator[trio.Process, None]:
    """Run a program with its standard output in a pipe; end it at the end of the block."""
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, **options)
    assert process.stdout is not None
    async with process.stdout:
        try:
            yield process
            process.terminate()
            with trio.fail_after(30):
                await process.wait()
        finally:
            with trio.CancelScope(shield=True):
                process.kill()
                await process.wait()


async def first_line(process: trio.Process) -> str:
    """Return the line that a program prints when it is ready."""
    assert process.stdout is not None
    line = b""
    with trio.fail_after(30):
        while not line.endswith(b"\n"):
            more = await process.stdout.receive_some()
            assert more, "the program exited; its errors are on stderr"
            line += more
    return line.decode().removesuffix("\n")


async def connection_to(process: trio.Process, path: Path) -> UnixConnection:
    """Connect to a program that does not print when it is ready."""
    with trio.fail_after(30):
        while True:
            try:
                return await open_unix_connection(path)
            except (FileNotFoundError, ConnectionRefusedError):
                assert process.poll() is None, "the program exited; its errors are on stderr"
                await trio.sleep(0.01)


async def output_of(*command: str, stdin: bytes = b"", status: int = 0) -> bytes:
    """Run a program to its end, which must be with ``status``; return its standard output."""
    with trio.fail_after(60):
        done = await trio.run_process(command, stdin=stdin, capture_stdout=True, check=False)
    assert done.returncode == status
    return bytes(done.stdout)


@asynccontextmanager
async def serving(
    handler: Callable[[UnixConnection], Awaitable[object]], address: Path | UnixSocketAddress
) -> AsyncGenerator[None, None]:
    """Serve at ``address`` in this process."""
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            listener = await open_unix_listener(address)
            await nursery.start(trio.serve_listeners, handler, [listener])
            yield
            nursery.cancel_scope.cancel()
