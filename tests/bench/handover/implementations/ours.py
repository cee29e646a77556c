"""A server with generations.

``python -m tests.bench.handover.implementations.ours DIRECTORY PORT``. SIGUSR2 replaces it. It
answers over TCP, and at the path ``web`` of the directory. A kept connection is passed on while it
is idle. Each upgrade is a line of JSON in the file ``upgrades``: how long it took, how long from
COMMIT to SERVING, and how long it took to pass connections on.

With ``--listeners N`` it has N listeners more; with ``--data N`` so many bytes travel with each
connection.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from tests._helpers.processes import python
from trio_unixconn.handover import _protocol, open_generation
from trio_unixconn.handover._channel import Channel

if TYPE_CHECKING:
    from trio_unixconn import UnixConnection
    from trio_unixconn._frames import Frame
    from trio_unixconn.handover import Generation

    Stream = trio.SocketStream | UnixConnection

# How many idle connections stop waiting for a request before other tasks run.
SLICE = 256
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%b\r\n%d"
# When frames were sent or received, by kind.
times: dict[int, float] = {}


def note_times() -> None:
    """Note when COMMIT is sent, and when SERVING arrives."""
    send, receive = Channel.send, Channel.receive

    async def noting_send(self: Channel, frame: bytes, fds: Any = ()) -> bool:
        times[frame[0]] = time.perf_counter()
        return await send(self, frame, fds)

    async def noting_receive(self: Channel) -> Frame | None:
        frame = await receive(self)
        if frame is not None:
            times[frame.kind] = time.perf_counter()
        return frame

    Channel.send = noting_send  # type: ignore[method-assign]
    Channel.receive = noting_receive  # type: ignore[method-assign]


class Server:
    """The handlers of a generation."""

    def __init__(self, gen: Generation, data: int) -> None:
        self.gen = gen
        self.idle: set[trio.CancelScope] = set()
        self.is_draining = False
        self.data = bytes(data)
        self.passed = 0

    async def handle(self, stream: Stream, _: bytes = b"") -> None:
        """Answer requests until the client closes, or asks for that."""
        try:
            while True:
                request = await self.receive(stream)
                if request is None:
                    await self.gen.pass_on(stream, self.data)
                    self.passed += 1
                    return
                if not request:
                    break
                closes = b"Connection: close" in request
                pid = os.getpid()
                head = b"Connection: close\r\n" if closes else b""
                await stream.send_all(ANSWER % (len(str(pid)), head, pid))
                if closes:
                    break
        except trio.BrokenResourceError:
            pass
        with trio.CancelScope(shield=True):
            await stream.aclose()

    async def receive(self, stream: Stream) -> bytes | None:
        """Return a request; None if the connection is to be passed on before one has begun."""
        with trio.CancelScope() as scope:
            if self.is_draining:
                return None
            self.idle.add(scope)
            try:
                request = await stream.receive_some(4096)
            finally:
                self.idle.discard(scope)
            while request and not request.endswith(b"\r\n\r\n"):
                with trio.CancelScope(shield=True):
                    more = await stream.receive_some(4096)
                request = request + more if more else b""
            return request
        return None

    async def receive_passed(self, handlers: trio.Nursery) -> None:
        async for stream, data in self.gen.connections():
            handlers.start_soon(self.handle, stream, data)

    async def drain(self) -> None:
        """Have idle connections passed on, some at a time: the successor begins with the first."""
        self.is_draining = True
        for number, scope in enumerate(list(self.idle), 1):
            scope.cancel()
            if not number % SLICE:
                await trio.lowlevel.checkpoint()


async def upgrade_at_signal(gen: Generation, given: argparse.Namespace) -> None:
    with trio.open_signal_receiver(signal.SIGUSR2) as signals:
        async for _ in signals:
            upgrade = await gen.upgrade()
            taken = times[_protocol.SERVING] - times[_protocol.COMMIT]
            note(given, seconds=upgrade.seconds, commit=taken, number=upgrade.number)


def note(given: argparse.Namespace, **fields: float) -> None:
    with open(Path(given.directory, "upgrades"), "a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")


async def main() -> None:
    """Be a generation."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("port", type=int)
    parser.add_argument("--listeners", type=int, default=0)
    parser.add_argument("--data", type=int, default=0)
    given = parser.parse_args()
    directory = Path(given.directory)
    words = [given.directory, str(given.port), "--listeners", str(given.listeners)]
    async with open_generation(
        directory / "upgrade",
        name="bench",
        command=python(f"{__package__}.ours", *words, "--data", str(given.data)),
    ) as gen:
        server = Server(gen, given.data)
        listeners: list[Any] = [
            await gen.listen_tcp("web", given.port),
            await gen.listen_unix("unix", directory / "web"),
        ]
        listeners += [await gen.listen_tcp(f"more {each}", 0) for each in range(given.listeners)]
        async with trio.open_nursery() as handlers:
            handlers.start_soon(server.receive_passed, handlers)
            async with trio.open_nursery() as accepting:
                accepting.start_soon(
                    partial(
                        trio.serve_listeners, server.handle, listeners, handler_nursery=handlers
                    )
                )
                accepting.start_soon(upgrade_at_signal, gen, given)
                await gen.ready()
                (directory / "pid").write_text(str(os.getpid()))
                note(given, ready=time.perf_counter() - began, number=gen.number)
                await gen.replaced()
                # The task of the signal returns from upgrade() at this moment.
                await trio.lowlevel.checkpoint()
                accepting.cancel_scope.cancel()
            begin = time.perf_counter()
            await server.drain()
        note(given, passing=time.perf_counter() - begin, passed=server.passed, number=gen.number)


if __name__ == "__main__":
    note_times()
    trio.run(main)
