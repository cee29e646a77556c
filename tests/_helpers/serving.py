"""Servers with workers, and clients of them."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from trio_unixconn import UnixListener
from trio_unixconn.pool import serve_with_workers

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio_unixconn.pool import WorkerServer

    Listener = trio.SocketListener | UnixListener


@asynccontextmanager
async def serving(
    handler: str, *listeners: Listener, **options: Any
) -> AsyncGenerator[WorkerServer, None]:
    """Serve with one worker; drain at the end of the block."""
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            server: WorkerServer = await nursery.start(
                partial(
                    serve_with_workers,
                    handler if ":" in handler else f"tests._helpers.server_handlers:{handler}",
                    listeners,
                    **{"workers": 1, **options},
                )
            )
            yield server
            server.drain()


async def tcp(host: str = "127.0.0.1") -> trio.SocketListener:
    (listener,) = await trio.open_tcp_listeners(0, host=host)
    return listener


def connected(listener: Listener) -> socket.socket:
    """Connect as far as the listener's queue."""
    name = (
        listener.get_local_address().native
        if isinstance(listener, UnixListener)
        else listener.socket.getsockname()
    )
    client = socket.socket(listener.socket.family)
    client.settimeout(30)
    client.connect(name)
    return client


async def answer(client: socket.socket, sent: bytes = b"x") -> bytes:
    """Send, end the stream, and return everything that is received."""

    def talk() -> bytes:
        with client:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: client.recv(65536), b""))

    # A thread of its own: it may wait for the answer to another client.
    return await trio.to_thread.run_sync(talk, limiter=trio.CapacityLimiter(1))


async def received(client: socket.socket, size: int = 65536) -> bytes:
    """Receive once; nothing if the other end is closed."""
    try:
        return await trio.to_thread.run_sync(client.recv, size, limiter=trio.CapacityLimiter(1))
    except ConnectionResetError:
        return b""
