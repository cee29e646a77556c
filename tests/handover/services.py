"""Services with generations, each in processes of its own, and clients that count what they see."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections import Counter
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import trio

from tests._helpers.environment import environment
from tests._helpers.processes import ROOT
from tests._helpers.waiting import until
from tests.handover.server import Config
from trio_unixconn import open_unix_connection
from trio_unixconn.handover import Upgrade, request_upgrade

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

CLIENTS = 2
# How long a process has to end by itself, in seconds.
GRACE = 10.0


@attrs.define
class Service:
    """A service, whose generations note what they do.

    Attributes:
      errors: what the first generation and its successors write to their standard error.
    """

    directory: Path
    processes: list[subprocess.Popen[bytes]] = attrs.field(factory=list["subprocess.Popen[bytes]"])
    pidfds: dict[int, int] = attrs.field(factory=dict[int, int])

    @property
    def path(self) -> str:
        return str(self.directory / "upgrade")

    @property
    def errors(self) -> str:
        return (self.directory / "stderr").read_text()

    def start(self, config: Config) -> subprocess.Popen[bytes]:
        """Start a process that another generation has not started."""
        with open(self.directory / "stderr", "ab") as errors:
            process = subprocess.Popen(
                config.command(), cwd=ROOT, env=environment(), stderr=errors, stdout=errors
            )
        self.processes.append(process)
        return process

    def notes(self) -> list[str]:
        log = self.directory / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        for line in lines:
            words = line.split()
            if words[0] == "generation" and int(words[3]) not in self.pidfds:
                with suppress(ProcessLookupError):
                    self.pidfds[int(words[3])] = os.pidfd_open(int(words[3]))
        return lines

    async def noted(self, text: str) -> list[str]:
        """Wait until a generation has noted this; return the words of the note."""
        await until(lambda: any(each.startswith(text) for each in self.notes()))
        return next(each for each in self.notes() if each.startswith(text)).split()

    async def port(self) -> int:
        return int((await self.noted("generation "))[5])

    def pid(self, number: int) -> int:
        return next(int(e.split()[3]) for e in self.notes() if e.startswith(f"generation {number}"))

    async def has_ended(self, number: int) -> None:
        """Wait until a generation has exited."""
        # It has no pidfd if it had exited, and was waited for, before its note was read.
        pidfd = self.pidfds.get(self.pid(number))
        if pidfd is not None:
            with trio.fail_after(30):
                await trio.lowlevel.wait_readable(pidfd)

    async def upgrade(self) -> Upgrade:
        with trio.fail_after(30):
            return await request_upgrade(self.path)

    def close(self) -> None:
        self.notes()
        # What is left ends by itself, so that coverage has its data; a fault can keep it from that.
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pidfd in self.pidfds.values():
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, number)
            deadline = time.monotonic() + GRACE
            for pidfd in self.pidfds.values():
                select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))
        for process in self.processes:
            process.kill()
            process.wait()
        for pidfd in self.pidfds.values():
            os.close(pidfd)


@asynccontextmanager
async def service(directory: Path, **options: Any) -> AsyncGenerator[Service, None]:
    """Start a service, and wait until it is ready; at the end kill what is left of it."""
    found = Service(directory)
    try:
        found.start(Config(str(directory), **options))
        await found.noted("ready 1")
        yield found
    finally:
        found.close()


@attrs.define
class Clients:
    """Clients that connect all the time, each for one request.

    Attributes:
      outcomes: how their requests have ended: answered, refused, reset, empty.
      generations: how many answers each generation has given.
    """

    port: int
    directory: Path
    outcomes: Counter[str] = attrs.field(factory=Counter[str])
    generations: Counter[int] = attrs.field(factory=Counter[int])

    async def connect(self, *, unix: bool) -> trio.abc.Stream:
        if unix:
            return await open_unix_connection(self.directory / "admin")
        sock = trio.socket.socket()
        try:
            await sock.connect(("127.0.0.1", self.port))
        except BaseException:
            sock.close()
            raise
        return trio.SocketStream(sock)

    async def ask(self, *, unix: bool = False) -> str:
        """Send one request; return how it ended."""
        try:
            stream = await self.connect(unix=unix)
        except OSError:
            return "refused"
        async with stream:
            try:
                await stream.send_all(b"\n")
                answer = await stream.receive_some(100)
            except trio.BrokenResourceError:
                return "reset"
        if not answer:
            return "empty"
        self.generations[int(answer.split()[0])] += 1
        return "answered"

    async def run(self, *, unix: bool) -> None:
        while True:
            self.outcomes[await self.ask(unix=unix)] += 1
            await trio.sleep(0.002)

    async def answered(self, count: int = 20) -> None:
        """Wait until so many more requests were answered."""
        target = self.outcomes["answered"] + count
        await until(lambda: self.outcomes["answered"] >= target)

    async def answered_by(self, number: int) -> None:
        """Wait until a generation answers."""
        before = self.generations[number]
        await until(lambda: self.generations[number] > before + 5)


@asynccontextmanager
async def clients(found: Service) -> AsyncGenerator[Clients, None]:
    """Run clients of the TCP and of the Unix listener during the block."""
    made = Clients(await found.port(), found.directory)
    async with trio.open_nursery() as nursery:
        for _ in range(CLIENTS):
            for unix in False, True:
                nursery.start_soon(partial(made.run, unix=unix))
        await made.answered()
        yield made
        nursery.cancel_scope.cancel()
