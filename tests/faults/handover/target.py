"""A server with generations, in which faults are caused.

``python -m tests.faults.handover.target CONFIG``. CONFIG is JSON, the fields of :class:`Config`. A
client sends lines; each is answered with the number of the generation, the pid, and how many lines
of this connection were answered before. What happens is sent to the socket ``events`` in the
directory, a datagram each.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import socket
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import trio

from tests._helpers.frame_faults import signal_at_frame
from tests._helpers.processes import python
from trio_unixconn import SuccessorGoneError
from trio_unixconn.handover import _protocol, open_generation

if TYPE_CHECKING:
    from trio_unixconn import UnixConnection
    from trio_unixconn.handover import Generation

#: Free file descriptors of a successor that has too few for its listeners, and how many there are.
FEW = 20
TOO_MANY = 40


@attrs.define
class Config:
    """What a generation does.

    Attributes:
      fault: when ("before" or "after"), operation ("send" or "receive"), the kind of a frame, and
        which one of that kind: the process is killed there. None: nowhere.
      successor_fault: that of its successors; None: the same.
      mode: what its successors do in place of serving; "" if they serve.
      state: the number of bytes of the state.
      listeners: how many more there are.
    """

    directory: str
    port: int = 0
    fault: tuple[str, str, int, int] | None = None
    successor_fault: tuple[str, str, int, int] | None = None
    mode: str = ""
    probation: float = 30
    timeout: float = 30
    state: int = 0
    listeners: int = 0

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def text(self) -> str:
        return json.dumps(attrs.asdict(self))

    def successor(self) -> Config:
        return attrs.evolve(self, fault=self.successor_fault or self.fault)


class Events:
    """Tells the runner what happens."""

    def __init__(self, config: Config) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._path = config.path("events")

    def tell(self, *words: object) -> None:
        text = " ".join(map(str, (f"{time.monotonic():.6f}", os.getpid(), *words)))
        self._socket.sendto(text.encode(), self._path)


class Server:
    """The handlers of a generation."""

    def __init__(self, gen: Generation) -> None:
        self.gen = gen
        self.idle: set[trio.CancelScope] = set()
        self.is_draining = False

    async def handle(self, stream: trio.SocketStream | UnixConnection, data: bytes = b"0") -> None:
        """Answer each line of a client; pass the client on while it is idle."""
        count = int(data)
        passes_on = True
        try:
            while True:
                request = await self.receive(stream, passes_on=passes_on)
                if request is None:
                    try:
                        await self.gen.pass_on(stream, b"%d" % count)
                    except SuccessorGoneError:
                        # It is this generation's to the end.
                        passes_on = False
                        continue
                    return
                if not request:
                    break
                for _ in range(request.count(b"\n")):
                    answer = b"%d %d %d\n" % (self.gen.number, os.getpid(), count)
                    count += 1
                    await stream.send_all(answer)
        except trio.BrokenResourceError:
            pass
        with trio.CancelScope(shield=True):
            await stream.aclose()

    async def receive(
        self, stream: trio.SocketStream | UnixConnection, *, passes_on: bool
    ) -> bytes | None:
        """Return what a client sends; None if the connection is to be passed on before that."""
        if not passes_on:
            return await stream.receive_some(100)
        with trio.CancelScope() as scope:
            if self.is_draining:
                return None
            self.idle.add(scope)
            try:
                return await stream.receive_some(100)
            finally:
                self.idle.discard(scope)
        return None

    async def receive_passed(self, handlers: trio.Nursery) -> None:
        async for stream, data in self.gen.connections():
            handlers.start_soon(self.handle, stream, data)

    def drain(self) -> None:
        self.is_draining = True
        for scope in list(self.idle):
            scope.cancel()


async def serve(config: Config, events: Events) -> None:
    """Be a generation."""
    successor = config.successor()
    # The port is known later.
    command = python("tests.faults.handover.target", "")
    async with open_generation(
        config.path("upgrade"),
        name="faults",
        command=command,
        timeout=config.timeout,
        probation=config.probation,
    ) as gen:
        is_faulty = gen.number > 1
        if is_faulty and config.mode == "hang":
            await trio.sleep_forever()
        if is_faulty and config.mode == "raise":
            raise ValueError("this version cannot start")
        server = Server(gen)
        web = await gen.listen_tcp("web", config.port)
        listeners: list[Any] = [web, await gen.listen_unix("admin", config.path("admin"))]
        listeners += [
            await gen.listen_unix(f"more {number}", config.path(f"more{number}"))
            for number in range(config.listeners)
        ]
        successor.port = web.socket.getsockname()[1]
        command[-1] = successor.text()
        if config.state:
            gen.set_state(lambda: bytes(config.state))
        async with trio.open_nursery() as handlers:
            handlers.start_soon(server.receive_passed, handlers)
            async with trio.open_nursery() as accepting:
                served = listeners
                if is_faulty and config.mode == "deaf":
                    served = listeners[:1]
                accepting.start_soon(
                    partial(trio.serve_listeners, server.handle, served, handler_nursery=handlers)
                )
                if is_faulty and config.mode == "raise late":
                    raise ValueError("this version cannot be ready")
                await gen.ready()
                size = 0 if gen.state is None else len(gen.state)
                events.tell("ready", gen.number, successor.port, size)
                accepting.start_soon(tell_confirmed, gen, events)
                await gen.replaced()
                events.tell("replaced", gen.number)
                accepting.cancel_scope.cancel()
            server.drain()


async def tell_confirmed(gen: Generation, events: Events) -> None:
    await gen.confirmed()
    events.tell("confirmed", gen.number)


def main(text: str) -> None:
    """Run a generation until it is replaced, or gets SIGTERM."""
    config = Config(**json.loads(text))
    is_successor = "TRIO_UNIXCONN_HANDOVER" in os.environ
    events = Events(config)
    logging.basicConfig(level=logging.INFO)
    if is_successor and config.mode == "import":
        raise ImportError("no module of this name")
    if is_successor and config.mode == "version":
        _protocol.pack_hello = partial(_protocol.pack_hello, version=99)
    if is_successor and config.mode == "no files":
        used = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + FEW, used + FEW))
    if config.fault is not None:
        signal_at_frame(*config.fault, tell=partial(events.tell, "killed"))
    try:
        trio.run(_serve_until_terminated, config, events)
    except BaseException as exc:
        events.tell("failed", repr(exc)[:200])
        raise


async def _serve_until_terminated(config: Config, events: Events) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def wait_for_signal() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(wait_for_signal)
            await serve(config, events)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    main(sys.argv[1])
