"""Cost of so many connections of one server: to accept them, to answer, to close them, and memory.

The server, or all processes of a pool, is measured from outside. Clients are other processes, and
what they take does not count.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

from tests._helpers.environment import environment
from tests._helpers.processes import cpu_of, family, open_descriptors, python

from .observed import DIRECTORY, Stopwatch, kernel_bytes, pss_bytes, reported_collections
from .workloads import COLLECTOR, SHARES

# So many connections are begun before their greetings are awaited.
AT_ONCE = 256
ROUND_TRIPS = 300
# A socket of TCP has one of so many addresses, each of which has 28,000 ports.
CLIENT_ADDRESSES = 8
# Memory is measured of at least so many: that of fewer is lost in what allocators keep free.
LEAST_FOR_MEMORY = 1000
# In seconds; only a server that hangs takes so long.
PATIENCE = 60


class Server:
    """A server that was started, and its processes."""

    def __init__(self, kind: str, workers: int, directory: str) -> None:
        self._directory = directory
        self._process = subprocess.Popen(
            python(f"{__package__}.server", kind, str(workers)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment(), DIRECTORY: directory},
        )
        self.pid = self._process.pid
        self.facts = self.facts_of()
        self.address: Any = self.facts["address"]
        self.family = family(self.pid)

    def facts_of(self) -> dict[str, Any]:
        """Wait for the next line that it prints."""
        assert self._process.stdout is not None
        facts: dict[str, Any] = json.loads(self._process.stdout.readline())
        return facts

    def restart(self) -> float:
        """Have it replace its workers; return how long that took."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"r")
        self._process.stdin.flush()
        seconds: float = self.facts_of()["restart"]
        self.family = family(self.pid)
        return seconds

    def cpu(self) -> float:
        """Return the processor time of all of its processes, without that of the collector."""
        return sum(cpu_of(self.family).values()) - self.collector()

    def collector(self) -> float:
        """Return the processor time of Python's garbage collector in its processes."""
        return reported_collections(self._directory)

    def own_cpu(self) -> float:
        """Return the processor time of the process that accepts."""
        return cpu_of([self.pid])[self.pid]

    def memory(self) -> tuple[int, int]:
        """Return the memory of the process that accepts, and that of all others."""
        first, *others = map(pss_bytes, self.family)
        return first, sum(others)

    def await_closed(self, descriptors: int) -> None:
        """Wait until its processes have so many file descriptors open."""
        deadline = time.monotonic() + PATIENCE
        while (now := self.descriptors()) > descriptors:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{now} file descriptors are open, expected {descriptors}")
            time.sleep(0.02)

    def descriptors(self) -> int:
        """Return how many file descriptors its processes have open."""
        return sum(map(open_descriptors, self.family))

    def close(self) -> None:
        """End it."""
        try:
            self._process.communicate(timeout=PATIENCE)
        finally:
            self._process.kill()


@contextmanager
def serving(kind: str, workers: int = 0) -> Generator[Server, None, None]:
    """Start a server, and end it."""
    with tempfile.TemporaryDirectory() as directory:
        server = Server(kind, workers, directory)
        try:
            yield server
        finally:
            server.close()


################################################################
# Clients
################################################################


def connect(address: Any) -> socket.socket:
    """Begin a connection to a path, or to a port of this machine."""
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX)
    else:
        sock = socket.socket()
        # It is reset when it is closed, so that its port is free at once.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.bind((f"127.0.0.{2 + os.getpid() % CLIENT_ADDRESSES}", 0))
        address = ("127.0.0.1", address)
    sock.connect(address)
    return sock


def hold(address: Any, count: int) -> None:
    """Be a process of clients: after each line of the input do the next thing, and say so."""
    socks: list[socket.socket] = []

    def step() -> None:
        print(flush=True)
        sys.stdin.readline()

    step()
    while len(socks) < count:
        new = [connect(address) for _ in range(min(AT_ONCE, count - len(socks)))]
        for each in new:
            each.recv(1)
        socks += new
    step()
    for _ in range(ROUND_TRIPS):
        socks[0].send(b"x")
        socks[0].recv(1)
    step()
    for begin in range(0, count, AT_ONCE):
        some = socks[begin : begin + AT_ONCE]
        for each in some:
            each.send(b"x")
        for each in some:
            each.recv(1)
    step()
    for each in socks:
        each.close()
    step()


class Clients:
    """Processes that have the other ends of so many connections, in equal shares."""

    def __init__(self, address: Any, count: int, stack: ExitStack) -> None:
        shares = [count // SHARES + (i < count % SHARES) for i in range(SHARES)]
        self._processes = [
            stack.enter_context(
                subprocess.Popen(
                    python(f"{__package__}.connections", json.dumps([address, share])),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment(),
                )
            )
            for share in shares
            if share
        ]
        for each in self._processes:
            stack.callback(each.kill)
        self._await(self._processes)

    @staticmethod
    def _await(processes: list[subprocess.Popen[bytes]]) -> None:
        for each in processes:
            assert each.stdout is not None
            if not each.stdout.readline():
                raise RuntimeError("a process of clients has died")

    def step(self, *, only_first: bool = False) -> None:
        """Have all do the next thing, one after the other; or one alone, and the others after."""
        for each in self._processes[:1] if only_first else self._processes:
            assert each.stdin is not None
            each.stdin.write(b"\n")
            each.stdin.flush()
            self._await([each])

    def skip(self) -> None:
        """Have all but the first one do what that one has done alone."""
        first, *others = self._processes
        self._processes = others
        self.step()
        self._processes = [first, *others]


################################################################
# Measuring
################################################################


def measured(kind: str, count: int, workers: int = 0) -> dict[str, float]:
    """Measure so many connections of a server."""
    with serving(kind, workers) as server, ExitStack() as stack:
        warm_up(server)
        clients = Clients(server.address, count, stack)
        descriptors, memory, kernel = server.descriptors(), server.memory(), kernel_bytes()
        used, own = Stopwatch(server.cpu), Stopwatch(server.own_cpu)
        collector = Stopwatch(server.collector)
        clients.step()
        figures = {"accept": used.lap(), f"accept: {COLLECTOR}": collector.lap()}
        if workers:
            figures["accept: dispatcher"] = own.lap()
        clients.step(only_first=True)
        figures["round trip"] = used.lap() / ROUND_TRIPS
        clients.skip()
        used.lap()
        clients.step()
        figures["a message on each"] = used.lap()
        if count >= LEAST_FOR_MEMORY:
            now, figures["kernel, both ends"] = server.memory(), kernel_bytes() - kernel
            if workers:
                figures["process that accepts"] = now[0] - memory[0]
                figures["workers"] = now[1] - memory[1]
            else:
                figures["server"] = now[0] - memory[0]
        used.lap()
        clients.step()
        server.await_closed(descriptors)
        figures["close"] = used.lap()
        return figures


def warm_up(server: Server) -> None:
    """Have each process of a server handle some connections, which do not count."""
    before = server.descriptors()
    socks = [connect(server.address) for _ in range(4 * len(server.family))]
    for each in socks:
        each.recv(1)
        each.send(b"x")
        each.recv(1)
        each.close()
    server.await_closed(before)


def serve_unix(count: int) -> dict[str, float]:
    """Measure serve_unix with a policy."""
    return measured("serve_unix", count)


def pool_unix(count: int) -> dict[str, float]:
    """Measure a pool that serves a Unix socket, with a policy."""
    return measured("pool-unix", count, SHARES)


def pool_tcp(count: int) -> dict[str, float]:
    """Measure a pool that serves a port."""
    return measured("pool-tcp", count, SHARES)


if __name__ == "__main__":
    hold(*json.loads(sys.argv[1]))
