"""A worker of the demonstration: ``python -m trio_unixconn._cli.demo.worker PATH``.

Invariant: every descriptor that arrives is closed before the answer is sent.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from typing import TYPE_CHECKING

import attrs
import trio

from ..._callbacks import open_callback_adapter
from ..._listener import open_unix_listener
from . import wire

if TYPE_CHECKING:
    from ..._callback_connection import CallbackConnection
    from ..._connection import UnixConnection
    from ..._credentials import Credentials
    from ..._results import AsyncResult


async def read_to_the_end(connection: UnixConnection) -> None:
    """Receive a descriptor and answer what it refers to."""
    fd = await connection.receive_fd()
    try:
        answer = attrs.asdict(await wire.digest(fd, wire.plain_read))
    except OSError as exc:
        answer = {"error": exc.strerror}
    finally:
        os.close(fd)
    await wire.send_answer(connection, answer)


async def serve_one_request(connection: UnixConnection) -> None:
    """Take over a TCP connection, answer what it receives, and close it."""
    fd = await connection.receive_fd()
    identity = wire.identity_of(fd)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=fd)))
    async with stream:
        request = b"".join([chunk async for chunk in stream])
        sha256 = hashlib.sha256(request).hexdigest()
        await stream.send_all(sha256.encode())
    await wire.send_answer(connection, attrs.asdict(wire.Seen(identity, len(request), sha256)))


async def exchange_by_await(connection: UnixConnection) -> None:
    """Receive the other side's credentials and send our own, awaiting each."""
    theirs = await connection.receive_credentials()
    await connection.send_credentials()
    await wire.send_answer(connection, wire.ids(theirs))


async def exchange_by_callback(connection: UnixConnection) -> None:
    """Do the same in Gio's way: each step is begun by the callback of the one before."""
    theirs: list[Credentials] = []

    def on_received(gio: CallbackConnection, result: AsyncResult) -> None:
        theirs.append(gio.receive_credentials_finish(result))
        gio.send_credentials_async(None, on_sent)

    def on_sent(gio: CallbackConnection, result: AsyncResult) -> None:
        gio.send_credentials_finish(result)

    async with open_callback_adapter() as adapter:
        adapter.wrap(connection).receive_credentials_async(None, on_received)
    await wire.send_answer(connection, wire.ids(theirs[0]))


async def count(connection: UnixConnection) -> None:
    """Answer how many descriptors this process has open."""
    await wire.send_answer(connection, wire.count_descriptors())


OPERATIONS = {
    wire.FILE: read_to_the_end,
    wire.TCP: serve_one_request,
    wire.CREDENTIALS_BY_AWAIT: exchange_by_await,
    wire.CREDENTIALS_BY_CALLBACK: exchange_by_callback,
    wire.DESCRIPTORS: count,
}


async def end_with_the_starter(scope: trio.CancelScope) -> None:
    """Cancel ``scope`` when standard input ends, as it does when the parent process ends."""
    async with trio.lowlevel.FdStream(os.dup(0)) as starter:
        await starter.receive_some()
    scope.cancel()


async def main(path: str) -> None:
    """Listen at ``path``, say so, and serve one connection until it ends."""
    async with trio.open_nursery() as nursery, await open_unix_listener(path) as listener:
        nursery.start_soon(end_with_the_starter, nursery.cancel_scope)
        print("ready", flush=True)  # noqa: T201 - the starter waits for it
        async with await listener.accept() as connection:
            while request := await wire.receive_exactly_one(connection):
                await OPERATIONS[request](connection)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
