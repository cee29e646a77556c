"""What the tests with programs share: starting them, and having them end."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import trio

from interop.harness import missing_peer
from trio_unixconn import (
    UnixConnection,
    UnixSocketAddress,
    open_unix_connection,
    open_unix_listener,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
    from pathlib import Path

# Where a plain user's shell does not look.
SERVERS: Final = "/usr/sbin"


def require_program(name: str) -> str:
    """Return where a program is; skip without it, but fail in CI. Its package is named like it."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:{SERVERS}")
    if found is None:
        missing_peer(f"there is no {name}; on Debian and Ubuntu install the package {name}")
    return found


@asynccontextmanager
async def running(command: Sequence[str], **options: Any) -> AsyncGenerator[trio.Process, None]:
    """Run a program with its standard output in a pipe; at the end it is there no more."""
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
    """Return the line in which a program says that it is ready."""
    assert process.stdout is not None
    line = b""
    with trio.fail_after(30):
        while not line.endswith(b"\n"):
            more = await process.stdout.receive_some()
            assert more, "it died; its last words are on stderr"
            line += more
    return line.decode().removesuffix("\n")


async def connection_to(process: trio.Process, path: Path) -> UnixConnection:
    """Connect to a program that does not say when it is ready."""
    with trio.fail_after(30):
        while True:
            try:
                return await open_unix_connection(path)
            except (FileNotFoundError, ConnectionRefusedError):
                assert process.poll() is None, "it died; its last words are on stderr"
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
