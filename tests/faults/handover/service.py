"""A service that is upgraded, what its generations tell, and clients that record what they see.

Invariant: each request has one record, and each process that was started ends with the service.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import trio
import trio.lowlevel

from tests._helpers.environment import environment
from tests._helpers.processes import has_ended, python
from trio_unixconn import EndOfStreamError, open_unix_connection
from trio_unixconn.handover import _spawn, request_upgrade

from .target import Config
from .zygote import ZYGOTE, ForkedProcess

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from trio_unixconn.handover import Upgrade

# Nothing takes so long, in seconds, unless it waits in vain.
PATIENCE = 60
# Between two requests of a client, in seconds.
PAUSE = 0.001
# Clients of each of the two listeners.
CLIENTS = 2


@attrs.frozen
class Event:
    """What a generation has told.

    Attributes:
      time: when, on the monotonic clock.
      words: ready, the number of the generation, its port and the size of its state; killed;
        replaced; confirmed; failed.
    """

    time: float
    pid: int
    words: list[str]


class Service:
    """A service in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.events: list[Event] = []
        self.port = 0
        self._changed = trio.Event()
        self._pidfds: dict[int, int] = {}
        self._processes: list[subprocess.Popen[bytes] | ForkedProcess] = []
        self._socket = trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._errors = open(directory / "stderr", "ab")  # noqa: SIM115 - closed with the service

    async def run(self) -> None:
        """Receive what the generations tell."""
        await self._socket.bind(str(self.directory / "events"))
        while True:
            data = await self._socket.recv(65536)
            at, pid, *words = data.decode(errors="replace").split(" ")
            self.events.append(Event(float(at), int(pid), words))
            if words[0] == "ready":
                self.port = int(words[2])
                with suppress(ProcessLookupError):
                    if int(pid) not in self._pidfds:
                        self._pidfds[int(pid)] = os.pidfd_open(int(pid))
            self._changed.set()
            self._changed = trio.Event()

    def start(self, config: Config, *, forks: bool = True) -> None:
        """Start a generation that no other generation has started."""
        if forks:
            self._processes.append(
                ForkedProcess([config.text()], stderr=self._errors.fileno(), pass_fds=[])
            )
            return
        self._processes.append(
            subprocess.Popen(
                python("tests.faults.handover.target", config.text()),
                stderr=self._errors,
                env=without_zygote(),
            )
        )

    async def told(self, word: str, number: int | None = None, since: int = 0) -> Event:
        """Wait until a generation tells this; ``since`` is how many events to pass over."""
        with trio.fail_after(PATIENCE):
            while True:
                for event in self.events[since:]:
                    if event.words[0] == word and (number is None or int(event.words[1]) == number):
                        return event
                await self._changed.wait()

    async def upgrade(self) -> Upgrade:
        with trio.fail_after(PATIENCE):
            return await request_upgrade(self.directory / "upgrade")

    def errors(self) -> str:
        """Return what the generations have written to their standard error."""
        return (self.directory / "stderr").read_text(errors="replace")

    def alive(self) -> list[int]:
        """Return the pids of those that have told something and run."""
        return [pid for pid in self._pidfds if not has_ended(self._pidfds[pid])]

    def close(self) -> None:
        for pidfd in self._pidfds.values():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        for process in self._processes:
            process.kill()
            process.wait()
            if isinstance(process, ForkedProcess):
                process.close()
        self._socket.close()
        self._errors.close()


def without_zygote() -> dict[str, str]:
    found = environment()
    found.pop(ZYGOTE, None)
    found.pop(_spawn.VARIABLE, None)
    return found


@asynccontextmanager
async def zygote() -> AsyncGenerator[None, None]:
    """Run the process that forks generations."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "zygote")
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "tests.faults.handover.zygote", path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = b""
            while not line.endswith(b"\n"):
                line += await process.stdout.receive_some(100)
            os.environ[ZYGOTE] = path
            yield
        finally:
            os.environ.pop(ZYGOTE, None)
            with trio.CancelScope(shield=True):
                await process.stdin.aclose()
                await process.stdout.aclose()
                await process.wait()


@asynccontextmanager
async def service(*, forks: bool = True, **options: Any) -> AsyncGenerator[Service, None]:
    """Start a service; return when it is ready. At the end, kill what is left of it."""
    with tempfile.TemporaryDirectory() as directory:
        found = Service(Path(directory))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(found.run)
                while not (found.directory / "events").exists():
                    await trio.lowlevel.checkpoint()
                found.start(Config(directory, **options), forks=forks)
                await found.told("ready")
                yield found
                nursery.cancel_scope.cancel()
        except BaseException:
            sys.stderr.write(f"{found.events[-10:]}\n{found.errors()[-4000:]}\n")
            raise
        finally:
            found.close()


################################################################
# Clients
################################################################


@attrs.frozen
class Request:
    """What a client saw: answered, refused, reset or empty; begin and end are monotonic times."""

    begin: float
    end: float
    outcome: str
    pid: int = 0


@attrs.define
class Clients:
    """Clients that connect all the time, each connection for one request."""

    service: Service
    requests: list[Request] = attrs.field(factory=list[Request])
    _changed: trio.Event = attrs.field(factory=trio.Event)

    async def run(self, connect: Callable[[], Awaitable[trio.abc.Stream]]) -> None:
        while True:
            begin = time.monotonic()
            outcome, pid = await ask(connect)
            self.requests.append(Request(begin, time.monotonic(), outcome, pid))
            self._changed.set()
            self._changed = trio.Event()
            await trio.sleep(PAUSE)

    async def connect_tcp(self) -> trio.abc.Stream:
        sock = trio.socket.socket()
        try:
            await sock.connect(("127.0.0.1", self.service.port))
        except BaseException:
            sock.close()
            raise
        return trio.SocketStream(sock)

    async def connect_unix(self) -> trio.abc.Stream:
        return await open_unix_connection(self.service.directory / "admin")

    async def answered_after(self, moment: float) -> float:
        """Wait for an answer to a request that has begun after this; return when it arrived."""
        with trio.fail_after(PATIENCE):
            while True:
                for request in reversed(self.requests):
                    if request.begin < moment:
                        break
                    if request.outcome == "answered":
                        # The first of them.
                        return min(
                            each.end
                            for each in self.requests
                            if each.begin >= moment and each.outcome == "answered"
                        )
                await self._changed.wait()

    def with_outcome(self, *outcomes: str) -> list[Request]:
        return [each for each in self.requests if each.outcome in outcomes]


async def ask(connect: Callable[[], Awaitable[trio.abc.Stream]]) -> tuple[str, int]:
    """Send one request on a new connection; return how it ended, and the pid that answered."""
    try:
        stream = await connect()
    except OSError:
        return "refused", 0
    try:
        await stream.send_all(b"\n")
        answer = await stream.receive_some(100)
    except trio.BrokenResourceError:
        return "reset", 0
    finally:
        await trio.aclose_forcefully(stream)
    return ("answered", int(answer.split()[1])) if answer else ("empty", 0)


@asynccontextmanager
async def clients(found: Service, count: int = CLIENTS) -> AsyncGenerator[Clients, None]:
    """Run clients of both listeners during the block."""
    made = Clients(found)
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(made.run, made.connect_tcp)
            nursery.start_soon(made.run, made.connect_unix)
        await made.answered_after(time.monotonic())
        yield made
        nursery.cancel_scope.cancel()


@attrs.define
class KeptClient:
    """A client that keeps its connection, and counts its requests and answers."""

    answers: int = 0
    wrong: int = 0
    is_closed: bool = False

    async def run(self, connect: Callable[[], Awaitable[trio.abc.Stream]]) -> None:
        stream = await connect()
        async with stream:
            with suppress(trio.BrokenResourceError):
                while True:
                    await stream.send_all(b"\n")
                    answer = b""
                    while not answer.endswith(b"\n"):
                        more = await stream.receive_some(100)
                        answer += more
                        if not more:
                            raise trio.BrokenResourceError
                    # Each of its requests is counted, by whatever process.
                    self.wrong += int(answer.split()[2]) != self.answers or answer.count(b"\n") != 1
                    self.answers += 1
                    await trio.sleep(0.02)
            self.is_closed = True


async def upgraded_or_not(found: Service) -> Upgrade | None:
    """Ask for an upgrade; return None if the generation that was asked has ended."""
    with trio.fail_after(PATIENCE):
        while True:
            try:
                return await found.upgrade()
            except (EndOfStreamError, trio.BrokenResourceError):
                return None
            except ConnectionRefusedError:
                # A generation that goes on after the one before has died takes the path a moment
                # after it accepts.
                await trio.sleep(0.001)


async def run_kept(found: Service, nursery: trio.Nursery, count: int) -> list[KeptClient]:
    """Start clients that keep their connections; return when each has an answer."""
    made = Clients(found)
    kept = [KeptClient() for _ in range(count)]
    for number, each in enumerate(kept):
        connect = made.connect_unix if number % 2 else made.connect_tcp
        nursery.start_soon(partial(each.run, connect))
    with trio.fail_after(PATIENCE):
        while not all(each.answers for each in kept):
            await trio.sleep(0.001)
    return kept
