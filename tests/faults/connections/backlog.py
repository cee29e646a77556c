"""Connect to a server whose backlog is full, with this library and with others.

``python -m tests.faults.connections.backlog [--write]``. A server process listens with a
backlog of 0, and accepts only after a hundred clients have tried to connect at the same time. The
table shows how many got a connection on which the server answers, how many got a stream that is not
connected, and how many got an error. ``--write`` also writes it to backlog.md. The exit status is 1
unless all clients of this library are served.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import importlib.util
import platform
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
from rich.console import Console
from trio.testing import wait_all_tasks_blocked

from tests._helpers.tables import machine, row_of, table_of
from trio_unixconn import open_unix_connection

CLIENTS = 100
# How long a client waits for the server's answer before it counts as not connected.
TIMEOUT = 20
OURS = "trio_unixconn.open_unix_connection"
MARKDOWN = Path(__file__).parent / "backlog.md"

# Begins to accept when it reads a line, and answers each client's byte.
SERVER = """
import socket, sys, threading
sock = socket.socket(socket.AF_UNIX)
sock.bind(sys.argv[1])
sock.listen(0)
print("listening", flush=True)
sys.stdin.readline()
def answer(conn):
    with conn:
        try:
            conn.sendall(conn.recv(1).upper())
        except OSError:
            pass
while True:
    threading.Thread(target=answer, args=sock.accept()[:1], daemon=True).start()
"""

SERVED = "served"
FALSE = "not connected"
Connect = Callable[[str], Awaitable[str]]


async def ours(path: str) -> str:
    """Connect with this library, and ask."""
    async with await open_unix_connection(path) as conn:
        await conn.send_all(b"x")
        return SERVED if await conn.receive_some() == b"X" else FALSE


async def trios(path: str) -> str:
    """Connect with trio alone, and ask."""
    async with await trio.open_unix_socket(path) as stream:
        try:
            await stream.send_all(b"x")
            return SERVED if await stream.receive_some() == b"X" else FALSE
        except trio.BrokenResourceError:
            return FALSE


async def anyios(path: str) -> str:
    """Connect with anyio, on any event loop, and ask."""
    import anyio  # may be missing

    async with await anyio.connect_unix(path) as stream:
        try:
            await stream.send(b"x")
            return SERVED if await stream.receive() == b"X" else FALSE
        except (anyio.BrokenResourceError, anyio.EndOfStream):
            return FALSE


async def asyncios(path: str) -> str:
    """Connect with asyncio, and ask."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(b"x")
        await writer.drain()
        return SERVED if await reader.read(1) == b"X" else FALSE
    except ConnectionError:
        return FALSE
    finally:
        writer.close()


async def threads(path: str) -> str:
    """Connect with a blocking socket in a thread, and ask."""

    def work() -> str:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.sendall(b"x")
            return SERVED if sock.recv(1) == b"X" else FALSE

    return await trio.to_thread.run_sync(work, limiter=trio.CapacityLimiter(1))


async def with_trio(connect: Connect, path: str, tried: Callable[[], None]) -> Counter[str]:
    """Have all clients connect at once under trio."""
    seen: Counter[str] = Counter()

    async def client() -> None:
        outcome = FALSE
        try:
            with trio.move_on_after(TIMEOUT):
                outcome = await connect(path)
        except Exception as exc:
            outcome = type(exc).__name__
        seen[outcome] += 1

    async with trio.open_nursery() as nursery:
        for _ in range(CLIENTS):
            nursery.start_soon(client)
        await wait_all_tasks_blocked()
        tried()
    return seen


async def with_asyncio(connect: Connect, path: str, tried: Callable[[], None]) -> Counter[str]:
    """Have all clients connect at once under asyncio."""

    async def client() -> str:
        try:
            return await asyncio.wait_for(connect(path), TIMEOUT)
        except asyncio.TimeoutError:
            return FALSE
        except Exception as exc:
            return type(exc).__name__

    tasks = [asyncio.ensure_future(client()) for _ in range(CLIENTS)]
    # Some turns of the loop: all have called connect(2) then.
    for _ in range(10):
        await asyncio.sleep(0)
    tried()
    return Counter(await asyncio.gather(*tasks))


def measure(connect: Connect, *, under_trio: bool) -> Counter[str]:
    """Start a server, have the clients connect, and count the outcomes."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/socket"
        with subprocess.Popen(
            [sys.executable, "-c", SERVER, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdout.readline()

            def tried() -> None:
                print(file=server.stdin, flush=True)

            try:
                if under_trio:
                    return trio.run(with_trio, connect, path, tried)
                return asyncio.run(with_asyncio(connect, path, tried))
            finally:
                server.kill()


def main() -> int:
    """Measure all libraries, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help=f"also write {MARKDOWN.name}")
    arguments = parser.parse_args()
    rows: list[tuple[str, Counter[str]]] = [
        (OURS, measure(ours, under_trio=True)),
        (
            f"trio.open_unix_socket {importlib.metadata.version('trio')}",
            measure(trios, under_trio=True),
        ),
    ]
    if importlib.util.find_spec("anyio"):
        version = importlib.metadata.version("anyio")
        rows += [
            (f"anyio.connect_unix {version} on trio", measure(anyios, under_trio=True)),
            (f"anyio.connect_unix {version} on asyncio", measure(anyios, under_trio=False)),
        ]
    rows += [
        (
            f"asyncio.open_unix_connection {platform.python_version()}",
            measure(asyncios, under_trio=False),
        ),
        ("blocking sockets in threads", measure(threads, under_trio=True)),
    ]
    headings = ("", "served", "a stream that is not connected", "errors")
    table = table_of(f"{CLIENTS} connects at once, backlog 0", headings)
    lines = [*row_of(*headings), *row_of(*["---"] * len(headings))]
    for name, seen in rows:
        served, false = seen.pop(SERVED, 0), seen.pop(FALSE, 0)
        errors = ", ".join(f"{count} {error}" for error, count in seen.items()) or "0"
        table.add_row(name, str(served), str(false), errors)
        lines += row_of(name, str(served), str(false), errors)
    Console().print(table)
    if arguments.write:
        system = f"{machine()}, Python {platform.python_version()}"
        program = "python -m tests.faults.connections.backlog --write"
        lines += ["", f"Measured with `{program}` on {system}."]
        MARKDOWN.write_text("\n".join(lines) + "\n")
    return 0 if lines[2].startswith(f"| {OURS} | {CLIENTS} | 0 | 0 |") else 1


if __name__ == "__main__":
    sys.exit(main())
