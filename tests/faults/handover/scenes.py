"""Successors that fail, processes that may not have the listeners, and very large handovers."""

from __future__ import annotations

import math
import os
import socket
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import trio

from tests._helpers.environment import environment
from tests._helpers.processes import (
    open_descriptors,
    private_bytes,
)
from tests.faults.pool.audit import Figure, at_most, equal, none, shown
from trio_unixconn import (
    TakeOverError,
    UnixConnection,
    UpgradeFailedError,
    open_unix_connection,
    serve_unix,
)
from trio_unixconn._frames import encode_frame
from trio_unixconn.handover import _protocol as of, open_generation
from trio_unixconn.handover._channel import Channel
from trio_unixconn.handover._manifest import ListenerEntry, Manifest

from .points import (
    PASSING,
    PassingRow,
    Row,
    kill_at,
    kill_while_passing,
    points,
)
from .service import Service, clients, service
from .target import TOO_MANY

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

MEGABYTE = 1 << 20
# What the memory of the last generation may be more than that of the first, as a share.
MOST_GROWTH = 0.05


@attrs.frozen
class Sizes:
    """How much of everything.

    Attributes:
      trials: kills at each point.
      passing: kills at each point while connections are passed on, of so many ``connections``.
      repeats: how often each of the other faults is caused.
      asking: processes that ask at the same time.
      state: bytes.
      upgrades: one after the other.
    """

    trials: int
    passing: int
    connections: int
    repeats: int
    asking: int
    state: int
    listeners: int
    upgrades: int


FULL = Sizes(100, 10, 100, 10, 20, 256 * MEGABYTE, 10_000, 1000)
QUICK = Sizes(2, 1, 20, 1, 5, 16 * MEGABYTE, 500, 6)


async def killed(sizes: Sizes) -> tuple[list[Figure], list[Row]]:
    """Either side is killed before or after each frame."""
    rows = [await kill_at(point, sizes.trials) for point in points()]
    wrong = [text for row in rows for text in row.wrong()]
    waits = [wait for row in rows if row.point.has_listeners_left for wait in row.waits]
    late = sum(wait > 50 for wait in waits)
    return [
        shown("kills", sum(row.trials for row in rows)),
        none("what may not be", wrong),
        shown("requests that a killed process had accepted", sum(row.lost for row in rows)),
        none(
            "requests lost without a reason",
            sum(row.unexplained for row in rows),
        ),
        shown("ms to the first answer, median", round(statistics.median(waits), 2)),
        shown("ms to the first answer, worst", round(max(waits), 2)),
        shown("kills after which that took more than 50 ms", late),
    ], rows


async def killed_while_passing(sizes: Sizes) -> tuple[list[Figure], list[PassingRow]]:
    """Either side is killed while connections are passed on."""
    rows = [await kill_while_passing(point, sizes.passing, sizes.connections) for point in PASSING]
    return [
        shown("kills", sum(row.trials for row in rows)),
        shown("connections", sum(row.connections for row in rows)),
        shown("closed, because their process was killed", sum(row.closed for row in rows)),
        none("what may not be", [text for row in rows for text in row.wrong()]),
    ], rows


FAILURES = {
    "import": "ImportError: no module of this name",
    "raise": "this version cannot start",
    "raise late": "this version cannot be ready",
    "version": "version 99",
    "no files": "no file descriptor is free|no free file descriptor",
    "hang": "did not serve within",
    "deaf": "did not serve within",
}


async def failing(sizes: Sizes) -> list[Figure]:
    """A successor fails its import, raises, hangs, takes nothing, or speaks another version."""
    figures: list[Figure] = []
    for mode, expected in FAILURES.items():
        is_slow = "within" in expected
        if mode == "deaf" and sizes.repeats == 1:
            continue
        async with (
            service(
                mode=mode,
                timeout=2 if is_slow else 30,
                listeners=TOO_MANY if mode == "no files" else 0,
            ) as found,
            clients(found) as load,
        ):
            wrong: list[str] = []
            for _ in range(1 if is_slow else sizes.repeats):
                before = time.monotonic()
                try:
                    await found.upgrade()
                    wrong.append("the upgrade succeeded")
                except UpgradeFailedError as exc:
                    if not any(each in str(exc) for each in expected.split("|")):
                        wrong.append(str(exc))
                await load.answered_after(before)
            wrong += [each.outcome for each in load.requests if each.outcome != "answered"]
            figures.append(none(f"{mode}: other errors, or requests not answered", wrong))
    return figures


ASK = """
import os, socket, sys
from trio_unixconn.handover import _protocol as of
os.setgid(65534)
os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
try:
    sock.sendall(of.pack_hello("faults"))
except BrokenPipeError:
    pass  # it is denied before it has asked
data, fds, _, _ = socket.recv_fds(sock, 65536, 253)
print(data[0] if data else -1, len(fds))
"""


async def unprivileged(sizes: Sizes) -> list[Figure]:
    """An unprivileged process asks for the listeners, at a path that lets it connect."""
    if os.geteuid():
        return [shown("not tried, because it requires root", 0)]
    wrong: list[str] = []
    async with service(probation=0) as found, clients(found) as load:
        os.chmod(found.directory, 0o711)
        os.chmod(found.directory / "upgrade", 0o666)
        for _ in range(sizes.repeats):
            done = await trio.run_process(
                [sys.executable, "-c", ASK, str(found.directory / "upgrade")],
                capture_stdout=True,
                env=environment(),
            )
            if done.stdout.decode().split() != [str(of.DENIED), "0"]:
                wrong.append(f"it got frame and file descriptors {done.stdout!r}")
        logged = found.errors().count("denied the listeners to")
        wrong += [each.outcome for each in load.requests if each.outcome != "answered"]
    return [
        none("got something else than DENIED, or requests not answered", wrong),
        equal("logged", logged, sizes.repeats),
    ]


async def crowd(sizes: Sizes) -> list[Figure]:
    """Many processes ask for the listeners at the same time."""
    async with service(probation=0.2) as found, clients(found) as load:
        outcomes: list[str] = []

        async def request() -> None:
            try:
                await found.upgrade()
                outcomes.append("upgraded")
            except UpgradeFailedError as exc:
                outcomes.append(exc.code.name)

        async with trio.open_nursery() as nursery:
            for _ in range(sizes.asking):
                nursery.start_soon(request)
        refused = [each.outcome for each in load.requests if each.outcome != "answered"]
    others = [each for each in outcomes if each not in ("upgraded", "BUSY")]
    return [
        equal("upgrades", outcomes.count("upgraded"), 1),
        none("other outcomes than an upgrade and BUSY", others),
        none("requests not answered", refused),
    ]


################################################################
# Lies
################################################################


async def lie_connected(channel: Channel, stack: ExitStack) -> None:
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    client = stack.enter_context(socket.create_connection(server.getsockname()))
    await offer(channel, client.getsockname(), client)


async def lie_address(channel: Channel, stack: ExitStack) -> None:
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    await offer(channel, ("127.0.0.1", 1), server)


async def lie_udp(channel: Channel, stack: ExitStack) -> None:
    server = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
    server.bind(("127.0.0.1", 0))
    await offer(channel, server.getsockname(), server)


async def lie_file(channel: Channel, stack: ExitStack) -> None:
    fd = os.memfd_create("a file")
    stack.callback(os.close, fd)
    await offer(channel, ("127.0.0.1", 1), fd)


async def lie_no_manifest(channel: Channel, _: ExitStack) -> None:
    await channel.send(encode_frame(of.OFFER, b"\xff" * 1000))


async def offer(channel: Channel, bound: Any, fd: Any) -> None:
    entries = [ListenerEntry("web", "inet", bound)]
    manifest = Manifest("faults", 1, entries)
    await channel.send(of.pack_offer(manifest.encode(), None))
    await channel.send(of.pack_id(of.LISTENERS, 0, carries_fds=True), [fd])


LIES: dict[str, Callable[[Channel, ExitStack], Awaitable[None]]] = {
    "a connected socket": lie_connected,
    "another address": lie_address,
    "a UDP socket": lie_udp,
    "a file": lie_file,
    "no manifest": lie_no_manifest,
}


async def lying(sizes: Sizes) -> list[Figure]:
    """The process that runs offers what it does not have."""
    figures: list[Figure] = []
    for name, lie in LIES.items():
        figures += await tell_lies(name, lie, sizes.repeats)
    return figures


async def tell_lies(
    name: str, lie: Callable[[Channel, ExitStack], Awaitable[None]], repeats: int
) -> list[Figure]:
    wrong: list[str] = []
    first = 0

    async def handler(conn: UnixConnection) -> None:
        channel = Channel(conn)
        await channel.receive()
        with ExitStack() as stack:
            await lie(channel, stack)
            answer = await channel.receive()
        if answer is None or answer.kind != of.FAILED:
            wrong.append(f"the one that lies got {answer}")

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "upgrade")
        async with trio.open_nursery() as nursery:
            server = await nursery.start(serve_unix, handler, path)
            for turn in range(repeats + 1):
                try:
                    async with open_generation(path, name="faults"):
                        wrong.append("it was believed")
                except TakeOverError:
                    pass
                while server.connections:
                    await trio.sleep(0.001)
                if not turn:
                    first = open_descriptors(os.getpid())
            # A thread closes what was rejected.
            left = open_descriptors(os.getpid()) - first
            with trio.move_on_after(10):
                while left > 0:
                    await trio.sleep(0.01)
                    left = open_descriptors(os.getpid()) - first
            nursery.cancel_scope.cancel()
    return [
        none(f"{name}: not a TakeOverError", wrong),
        none(f"{name}: file descriptors more", max(0, left)),
    ]


################################################################
# Much of everything
################################################################


async def large(sizes: Sizes) -> list[Figure]:
    """A state larger than any buffer, and more listeners than fit into a message."""
    figures: list[Figure] = []
    async with service(state=sizes.state, probation=0) as found, clients(found) as load:
        upgrade = await found.upgrade()
        size = int((await found.told("ready", 2)).words[3])
        figures.append(equal("bytes of state that arrived", size, sizes.state))
        figures.append(shown("seconds of that upgrade", round(upgrade.seconds, 2)))
        figures.append(
            none("requests not answered", [r for r in load.requests if r.outcome != "answered"])
        )
    async with service(listeners=sizes.listeners, probation=0) as found, clients(found) as load:
        upgrade = await found.upgrade()
        await load.answered_after(time.monotonic())
        connected = 0
        for number in range(0, sizes.listeners, max(1, sizes.listeners // 20)):
            conn = await open_unix_connection(found.directory / f"more{number}")
            await conn.aclose()
            connected += 1
        figures.append(equal("of 20 of the listeners, connected", connected, 20))
        figures.append(
            shown(f"seconds of an upgrade with {sizes.listeners:,}", round(upgrade.seconds, 2))
        )
        figures.append(
            none("requests not answered", [r for r in load.requests if r.outcome != "answered"])
        )
    return figures


async def many(sizes: Sizes) -> list[Figure]:
    """Upgrade many times, by processes that are started as usual."""
    async with service(forks=False, probation=0) as found:
        first = (await found.told("ready", 1)).pid
        begin = await settled_size(found, first)
        seconds: list[float] = []
        warm: tuple[int, int] | None = None
        last = first
        for number in range(2, sizes.upgrades + 2):
            upgrade = await found.upgrade()
            seconds.append(upgrade.seconds)
            last = upgrade.pid
            if number == 3:
                # The first one to take over is the measure: it has done what the last one has.
                warm = await settled_size(found, last)
        end = await settled_size(found, last)
        assert warm is not None
        await until_alone(found)
        left = len(found.alive()) - 1
        descriptors, memory = (now - then for now, then in zip(end, warm, strict=True))
    return [
        shown("upgrades", len(seconds)),
        shown("file descriptors of the first generation", begin[0]),
        none("file descriptors more than at the second upgrade", max(0, descriptors)),
        shown("kB of memory at the second upgrade", warm[1] // 1000),
        at_most(
            "kB of memory more at the last one",
            memory // 1000,
            math.ceil(MOST_GROWTH * warm[1] / 1000),
        ),
        none("processes left", left),
        shown("ms of an upgrade, median", round(1000 * statistics.median(seconds), 1)),
        shown("ms of an upgrade, worst", round(1000 * max(seconds), 1)),
    ]


async def settled_size(found: Service, pid: int) -> tuple[int, int]:
    """Return the file descriptors and the bytes of a generation when the one before has ended."""
    await until_alone(found)
    return open_descriptors(pid), private_bytes(pid)


async def until_alone(found: Service) -> None:
    with trio.move_on_after(30):
        while len(found.alive()) > 1:
            await trio.sleep(0.005)
