"""The server, a process of its own: a pool, and a record of the jobs that it was given.

Invariant: nothing is read from a connection here. Each client has bound its socket to an address
that is its token.

``python -m tests.faults.pool.accepting ORDER``, a JSON object: ``way`` is "submit", for an accept
loop here that keeps each receipt, or "serve", for ``serve_with_workers``; ``handler``; ``unix``, a
path; with ``deny`` no client may use that; with ``raises`` on_abandoned raises, after it has noted
the job; ``options`` of the pool. It says ``{"port": ...}``, and then answers commands, a line each.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import attrs
import trio

from trio_unixconn import PeerPolicy, open_unix_listener
from trio_unixconn.errors import JobRefusedError, PoolClosedError, WorkerStartError
from trio_unixconn.pool import AbandonedJob, WorkerPool, open_worker_pool, serve_with_workers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_unixconn import UnixListener

    Listener = trio.SocketListener | UnixListener

BACKLOG = 4096


def token_of(name: Any) -> int:
    """Return the token of a client, of what accept(2) said of its address."""
    if isinstance(name, tuple):
        return int.from_bytes(bytes(map(int, name[0].split("."))), "big")
    return int(name.rpartition(b"-")[2])


class Accepting:
    """The server, and its ledger."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.receipts: list[tuple[int, int, int]] = []
        self.taken: Counter[int] = Counter()
        self.errors: list[tuple[int, str]] = []
        self.reported: list[tuple[int, int]] = []
        self.accepted = 0
        self.until = trio.CancelScope()
        self.over = trio.Event()
        self.pool: WorkerPool | None = None
        # Of serve_with_workers.
        self.server: Any = None

    def abandoned(self, job: AbandonedJob) -> None:
        """Note what the pool reports."""
        self.reported.append((job.id, job.pid))
        if self.order.get("raises"):
            raise LookupError("on_abandoned raises")

    async def run(self, listeners: Sequence[Listener], task_status: Any) -> None:
        """Serve until it is told to stop."""
        options: dict[str, Any] = {
            "setup": "tests.faults.pool.target:records",
            "on_abandoned": self.abandoned,
        }
        options |= self.order["options"]
        handler = self.order["handler"]
        if self.order["way"] == "serve":
            async with trio.open_nursery() as nursery:
                self.server = await nursery.start(
                    lambda task_status: serve_with_workers(
                        handler, listeners, task_status=task_status, **options
                    )
                )
                self.pool = self.server.pool
                task_status.started()
        else:
            async with open_worker_pool(handler, **options) as self.pool:
                task_status.started()
                async with trio.open_nursery() as submitting:
                    with self.until:
                        async with trio.open_nursery() as nursery:
                            for listener in listeners:
                                nursery.start_soon(self.accept_from, listener, submitting)
                    for listener in listeners:
                        await listener.aclose()
        self.over.set()

    async def accept_from(self, listener: Listener, submitting: trio.Nursery) -> None:
        """Submit each connection."""
        while True:
            sock, name = await listener.socket.accept()
            self.accepted += 1
            submitting.start_soon(self.submit, sock, token_of(name))

    async def submit(self, sock: trio.socket.SocketType, token: int) -> None:
        """Submit one connection, and keep the receipt."""
        assert self.pool is not None
        try:
            receipt = await self.pool.submit(sock)
        except Exception as exc:
            self.errors.append((token, repr(exc)))
        else:
            self.receipts.append((receipt.id, token, receipt.pid))
            self.taken[receipt.pid] += 1

    async def obey(self, do: str, **arguments: Any) -> Any:
        """Do what a line says."""
        assert self.pool is not None
        if do == "statistics":
            return attrs.asdict(self.pool.statistics())
        if do == "taken":
            return self.taken[arguments["pid"]]
        try:
            if do == "restart":
                await self.pool.restart()
            elif do == "scale":
                await self.pool.scale(arguments["workers"])
            elif do == "cancel":
                return await self.cancel_calls(arguments["workers"])
        except (WorkerStartError, PoolClosedError) as exc:
            # It was killed while it was starting, or the pool drains.
            return str(exc)
        if do == "finish":
            if self.server is not None:
                self.server.drain()
            self.until.cancel()
            await self.over.wait()
            return {
                "accepted": self.count(),
                "receipts": self.receipts,
                "errors": self.errors,
                "reported": self.reported,
                "statistics": attrs.asdict(self.pool.statistics()),
            }
        return None

    async def cancel_calls(self, workers: int) -> str:
        """Cancel 40 calls of the last worker while it is scaled away; return a late one's end."""
        pool, last = self.pool, workers - 1
        assert pool is not None
        scope, ended = trio.CancelScope(), list[str]()

        async def call() -> None:
            await pool.call(data=b"without end", worker=last)

        async def call_many() -> None:
            with scope:
                async with trio.open_nursery() as nursery:
                    for _ in range(40):
                        nursery.start_soon(call)

        async def call_late() -> None:
            try:
                ended.append((await pool.call(worker=last)).decode())
            except JobRefusedError as exc:
                ended.append(str(exc))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call_many)
            while pool.statistics().workers[last].in_flight < 40:
                await trio.sleep(0.001)
            scope.cancel()
            nursery.start_soon(call_late)
            nursery.start_soon(pool.scale, last)
        await pool.scale(workers)
        return ended[0]

    def count(self) -> int:
        """Return how many connections were accepted."""
        return self.accepted if self.server is None else int(self.server.accepted)


async def main(order: dict[str, Any]) -> None:
    """Be the server."""
    listeners: list[Listener] = [
        *await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=BACKLOG),
        await open_unix_listener(
            order["unix"],
            backlog=BACKLOG,
            policy=PeerPolicy(uids=[os.getuid() + 1]) if order.get("deny") else None,
        ),
    ]
    port = listeners[0].socket.getsockname()[1]
    accepting = Accepting(order)
    commands = trio.lowlevel.FdStream(os.dup(0))
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: accepting.run(listeners, task_status))
        say({"port": port})
        buffer = b""
        async for data in commands:
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                nursery.start_soon(answer, accepting, json.loads(line))
        # The process that has started this is gone.
        nursery.cancel_scope.cancel()


async def answer(accepting: Accepting, command: dict[str, Any]) -> None:
    """Do what a line says, and say so."""
    number = command.pop("number")
    say({"number": number, "answer": await accepting.obey(**command)})


def say(what: Any) -> None:
    """Say something to the process that has started this."""
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(message)s")
    trio.run(main, json.loads(sys.argv[1]))
