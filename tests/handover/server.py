"""A server with generations, for the tests: ``python -m tests.handover.server CONFIG``.

CONFIG is JSON, the fields of :class:`Config`. A client sends lines, and each is answered with the
number of the generation and the pid. Everything that happens is noted in a file, a line each.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import trio

from tests._helpers.frame_faults import signal_at_frame
from trio_unixconn.handover import _protocol, open_generation

if TYPE_CHECKING:
    from trio_unixconn import UnixConnection
    from trio_unixconn.handover import Generation


@attrs.define
class Config:
    """What a generation does.

    Attributes:
      fault: ("before", "send", kind), ("after", "send", kind) or ("after", "receive", kind): it is
        killed there; or ("stop", ...): it is stopped there.
      mode: what a successor does in place of serving.
      successor: what its successor does; default: the same, without faults.
    """

    directory: str
    port: int = 0
    fault: list[Any] | None = None
    mode: str = ""
    probation: float = 0
    timeout: float = 30
    max_draining: int = 3
    state: str | None = None
    listeners: int = 0
    successor: dict[str, Any] | None = None

    def command(self) -> list[str]:
        return [sys.executable, "-m", "tests.handover.server", json.dumps(attrs.asdict(self))]

    def path(self, name: str) -> str:
        return str(Path(self.directory, name))

    def note(self, text: str) -> None:
        with open(self.path("log"), "a", encoding="utf-8") as file:
            file.write(f"{text}\n")


async def serve(config: Config) -> None:
    """Be a generation."""
    if config.mode == "hang early":
        await trio.sleep_forever()
    async with open_generation(
        config.path("upgrade"),
        name="test",
        command=successor_of(config).command(),
        timeout=config.timeout,
        probation=config.probation,
        max_draining=config.max_draining,
    ) as gen:
        if config.mode == "raise":
            raise ValueError("this version cannot start")
        if config.mode == "hang":
            config.note("hangs")
            await trio.sleep_forever()
        await serve_generation(config, gen)


def successor_of(config: Config) -> Config:
    fields = config.successor or {"directory": config.directory, "mode": ""}
    return attrs.evolve(Config(**fields), port=config.port)


class Server:
    """The listeners and handlers of a generation."""

    def __init__(self, config: Config, gen: Generation) -> None:
        self.config = config
        self.gen = gen
        self.idle: set[trio.CancelScope] = set()
        self.is_draining = False

    async def listen(self) -> list[Any]:
        """Return the listeners; note what was inherited."""
        gen, config = self.gen, self.config
        web = await gen.listen_tcp("web", config.port)
        admin = await gen.listen_unix("admin", config.path("admin"))
        more = [
            await gen.listen_unix(f"more {number}", config.path(f"more{number}"))
            for number in range(config.listeners)
        ]
        config.port = web.socket.getsockname()[1]
        if config.state is not None:
            text, _, size = config.state.partition("*")
            gen.set_state(lambda: text.encode() * int(size or 1))
        config.note(
            f"generation {gen.number} pid {os.getpid()} port {config.port} "
            f"inherited {int(web.inherited)}{int(admin.inherited)} "
            f"state {None if gen.state is None else len(gen.state)}"
        )
        return [web, admin, *more]

    async def handle(self, stream: trio.SocketStream | UnixConnection, data: bytes = b"0") -> None:
        """Answer each line of a client; pass the client on while it is idle."""
        count = int(data)
        try:
            while True:
                request = await self.receive(stream)
                if request is None:
                    await self.gen.pass_on(stream, b"%d" % count)
                    return
                if not request:
                    break
                for _ in range(request.count(b"\n")):
                    count += 1
                    answer = b"%d %d %d\n" % (self.gen.number, os.getpid(), count)
                    await stream.send_all(answer)
        except trio.BrokenResourceError:
            pass
        with trio.CancelScope(shield=True):
            await stream.aclose()

    async def receive(self, stream: trio.SocketStream | UnixConnection) -> bytes | None:
        """Return what a client sends; None if this generation drains before that."""
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


async def serve_generation(config: Config, gen: Generation) -> None:
    server = Server(config, gen)
    listeners = await server.listen()
    # The successor listens on the same port.
    assert gen._options.command is not None
    gen._options.command[:] = successor_of(config).command()  # type: ignore[index]
    if config.mode == "deaf":
        del listeners[1]
    async with trio.open_nursery() as handlers:
        handlers.start_soon(server.receive_passed, handlers)
        await serve_until_replaced(config, gen, server, listeners, handlers)
        if config.mode == "drain long":
            await gen.overdue()
            config.note(f"overdue {gen.number}")
        server.drain()
    config.note(f"left {gen.number}")


async def serve_until_replaced(
    config: Config, gen: Generation, server: Server, listeners: list[Any], handlers: trio.Nursery
) -> None:
    async with trio.open_nursery() as accepting:
        accepting.start_soon(
            partial(trio.serve_listeners, server.handle, listeners, handler_nursery=handlers)
        )
        if config.mode == "raise late":
            raise ValueError("this version cannot be ready")
        await gen.ready()
        config.note(f"ready {gen.number}")
        if config.mode == "fail serving":
            await listeners[1].is_used.wait()
            raise ValueError("this version fails after it was ready")
        accepting.start_soon(note_when, gen.confirmed, config, f"confirmed {gen.number}")
        await gen.replaced()
        config.note(f"replaced {gen.number}")
        accepting.cancel_scope.cancel()


async def note_when(wait: Any, config: Config, text: str) -> None:
    await wait()
    config.note(text)


def main() -> None:
    """Run a generation; a SIGTERM ends it."""
    config = Config(**json.loads(sys.argv[1]))
    logging.basicConfig(level=logging.INFO)
    if config.mode == "fail import":
        sys.stderr.write("about to fail\n")
        raise ImportError("no module of this name")
    if config.mode == "version":
        _protocol.pack_hello = partial(_protocol.pack_hello, version=99)
    if config.mode == "few files":
        used = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 25, used + 25))
    if config.mode == "no files":
        used = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 6, used + 6))
    if config.fault is not None:
        signal_at_frame(*config.fault)

    async def run() -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals, trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def wait_for_signal() -> None:
                    async for _ in signals:
                        scope.cancel()

                nursery.start_soon(wait_for_signal)
                await serve(config)
                nursery.cancel_scope.cancel()

    trio.run(run)


if __name__ == "__main__":
    main()
