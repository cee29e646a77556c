"""serve_with_workers: this process accepts connections, workers handle them, none is lost."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests._helpers.environment import environment
from tests._helpers.fds import free_descriptors
from tests._helpers.requirements import passrights
from tests._helpers.serving import answer, connected, serving, tcp
from tests._helpers.waiting import until
from trio_unixconn import (
    ConnectionClosedError,
    HandlerError,
    PeerPolicy,
    PoolClosedError,
    UnixListener,
    WorkerStartError,
    _bind,
    open_unix_connection,
    open_unix_listener,
)
from trio_unixconn._accept import ACCEPT_RETRY_DELAY
from trio_unixconn.handover._protocol import PassedConnection
from trio_unixconn.pool import (
    AbandonedJob,
    PoolStatistics,
    WorkerServer,
    _server,
    serve_with_workers,
)
from trio_unixconn.pool._endpoints import EndpointKind
from trio_unixconn.pool._queue import JobQueue
from trio_unixconn.pool._statistics import Counters

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio_unixconn import PeerIdentity

    Listener = trio.SocketListener | UnixListener

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unmeasured_processes")]

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


################################################################
# Serving
################################################################


async def test_serve_with_workers_of_tcp_and_unix(tmp_path: Path) -> None:
    """The handler gets a stream of the kind of the listener."""
    listeners: list[Listener] = [
        await tcp(),
        await tcp("::1"),
        await open_unix_listener(tmp_path / "s"),
    ]
    async with serving("tell", *listeners) as server:
        told = [json.loads(await answer(connected(each))) for each in listeners]
        assert [each["type"] for each in told] == ["SocketStream", "SocketStream", "UnixConnection"]
        assert {each["pid"] for each in told} == {server.statistics().workers[0].pid}
        assert server.accepted == 3
        assert server.denied == 0
        assert server.listeners == listeners
    assert isinstance(server.statistics(), PoolStatistics)
    assert server.statistics().handled == 3
    assert not (tmp_path / "s").exists()


async def test_serve_with_workers_of_a_socket_listener_of_unix(tmp_path: Path) -> None:
    """A trio.SocketListener of a Unix socket works; the worker finds out the kind."""
    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.bind(str(tmp_path / "s"))
    sock.listen()
    listener = trio.SocketListener(sock)
    async with serving("tell", listener):
        assert json.loads(await answer(connected(listener)))["type"] == "UnixConnection"


async def test_serve_with_workers_of_from_fd(tmp_path: Path) -> None:
    """A UnixListener of a file descriptor is served, and its path stays."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.listen()
        listener = UnixListener.from_fd(os.dup(sock.fileno()))
        async with serving("echo", listener):
            assert await answer(connected(listener), b"hello") == b"hello"
    assert (tmp_path / "s").exists()


async def test_serve_with_workers_policy_denies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A denied connection is closed, logged and counted, and no worker gets it."""
    listener = await open_unix_listener(tmp_path / "s", policy=PeerPolicy(uids=[12345]))
    async with serving("echo", listener) as server:
        async with await open_unix_connection(tmp_path / "s") as conn:
            assert await conn.receive_some() == b""
        assert (server.accepted, server.denied, listener.denied) == (1, 1, 1)
        assert server.statistics().submitted == 0
    assert "denied" in caplog.text


async def test_serve_with_workers_policy_admits(tmp_path: Path) -> None:
    """A check that waits delays no other connection, and a drain waits for it."""
    go_on = trio.Event()
    asked: list[int] = []

    async def check(peer: PeerIdentity) -> bool:
        asked.append(peer.credentials.pid)
        if len(asked) == 1:
            await go_on.wait()
        return True

    listener = await open_unix_listener(tmp_path / "s", policy=PeerPolicy(check=check))
    async with (
        serving("echo", listener) as server,
        await open_unix_connection(tmp_path / "s") as first,
    ):
        await until(lambda: bool(asked))
        assert await answer(connected(listener), b"second") == b"second"
        await first.send_all(b"first")
        assert server.statistics().submitted == 1
        server.drain()
        go_on.set()
        assert await first.receive_some() == b"first"
    assert server.statistics().handled == 2


async def test_max_queue_counts_connections_that_a_policy_is_asked_about(tmp_path: Path) -> None:
    """Connections that a policy is being asked about have slots of the queue."""
    go_on = trio.Event()

    async def check(_: PeerIdentity) -> bool:
        await go_on.wait()
        return True

    listener = await open_unix_listener(tmp_path / "s", policy=PeerPolicy(check=check))
    async with serving("echo", listener, max_queue=2) as server:
        clients = [connected(listener) for _ in range(5)]
        await until(lambda: server.accepted == 2)
        await wait_all_tasks_blocked()
        assert server.accepted == 2
        go_on.set()
        for number, client in enumerate(clients):
            assert await answer(client, b"%d" % number) == b"%d" % number


@pytest.mark.measured
async def test_serve_with_workers_of_a_listener_with_so_linger() -> None:
    """A closing thread closes connections that inherit SO_LINGER; handlers get their streams."""
    listener = await tcp()
    listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
    async with serving("tell", listener) as server:
        assert server._kinds == {listener: EndpointKind.OTHER}
        assert json.loads(await answer(connected(listener)))["type"] == "SocketStream"


@pytest.mark.measured
@pytest.mark.usefixtures("no_child_left")
@passrights
@pytest.mark.parametrize("accept", ["parent", "workers"])
async def test_serve_with_workers_keeps_receive_descriptors(tmp_path: Path, accept: str) -> None:
    """Connections of a listener with receive_descriptors=False reject them in the worker."""
    listener = await open_unix_listener(tmp_path / "s", receive_descriptors=False)
    async with serving("tell", listener, accept=accept):
        client = connected(listener)
        with pytest.raises(OSError, match="not permitted"):
            socket.send_fds(client, [b"x"], [0])
        assert json.loads(await answer(client, b"\0"))["refused"] == "UnexpectedControlMessageError"


################################################################
# Slots of the queue
################################################################


async def test_max_queue_stops_accepting() -> None:
    """While the queue of the pool is full, clients wait in the queue of the listener."""
    listener = await tcp()
    async with serving("hold", listener, max_in_flight=1, max_queue=2) as server:
        clients = [connected(listener) for _ in range(8)]
        await until(lambda: server.accepted == 3)
        await until(lambda: server.statistics().queued == 2)
        await wait_all_tasks_blocked()
        assert server.accepted == 3
        assert server.statistics().in_flight == 1
        for client in clients:
            client.close()
        server.drain(timeout=0)


# A program that accepts a connection from a listener that it has inherited.
ACCEPT = "import socket, sys; socket.socket(fileno=int(sys.argv[1])).accept()"


@asynccontextmanager
async def full_queue(
    *listeners: Listener, **options: Any
) -> AsyncGenerator[tuple[WorkerServer, list[socket.socket]], None]:
    """Serve with one job in flight and one in the queue, from the first listener.

    Each of them ends when its client, of which there is a list, is closed.
    """
    async with serving("echo", *listeners, max_in_flight=1, max_queue=1, **options) as server:
        clients = [connected(listeners[0]) for _ in range(2)]
        await until(lambda: (server.accepted, server.statistics().queued) == (2, 1))
        yield server, clients
        for client in clients:
            client.close()


async def test_max_queue_with_a_denied_peer_and_a_tcp_listener(tmp_path: Path) -> None:
    """A slot that a denied peer does not use goes to the listener that waits next."""
    unix = await open_unix_listener(tmp_path / "s", policy=PeerPolicy(uids=[12345]))
    listener = await tcp()
    async with full_queue(listener, unix) as (server, clients):
        # In the order in which their listeners wait for a slot.
        denied = connected(unix)
        await wait_all_tasks_blocked()
        waiting = connected(listener)
        await wait_all_tasks_blocked()
        assert server.accepted == 2
        clients[0].close()
        await until(lambda: server.accepted == 4)
        assert server.denied == 1
        assert await trio.to_thread.run_sync(denied.recv, 1) == b""
        denied.close()
        clients[1].close()
        assert await answer(waiting, b"not stopped") == b"not stopped"


async def test_max_queue_with_a_connection_that_another_process_accepts() -> None:
    """A slot whose connection another process has accepted goes to the next listener."""
    shared, listener = await tcp(), await tcp()
    async with full_queue(listener, shared) as (server, clients):
        connected(shared).close()
        await wait_all_tasks_blocked()
        waiting = connected(listener)
        await wait_all_tasks_blocked()
        # The server was woken for it, and waits for a slot.
        fd = shared.socket.fileno()
        await trio.run_process([sys.executable, "-c", ACCEPT, str(fd)], pass_fds=[fd])
        clients[0].close()
        await until(lambda: server.accepted == 3)
        clients[1].close()
        assert await answer(waiting, b"not stopped") == b"not stopped"
        assert server.accepted == 3


async def test_max_queue_is_free_while_accept_backs_off(caplog: pytest.LogCaptureFixture) -> None:
    """A listener holds no slot while accept(2) has no free file descriptor."""
    listener = await tcp()
    async with serving("echo", listener, max_queue=1) as server:
        with free_descriptors(1):
            client = connected(listener)
            await until(lambda: "cannot accept connections" in caplog.text)
            for _ in range(3):
                # The handler has no stream, and raises. The pool had a slot for the job.
                with pytest.raises(HandlerError):
                    await server.pool.call()
            assert server.accepted == 0
        assert await answer(client, b"at last") == b"at last"


async def test_drain_of_server_while_listeners_wait_for_a_slot(tmp_path: Path) -> None:
    """A drain that begins while every listener waits for a slot handles all connections."""
    listeners: list[Listener] = [await tcp(), await open_unix_listener(tmp_path / "s")]
    async with full_queue(*listeners) as (server, clients):
        waiting = [connected(each) for _ in range(3) for each in listeners]
        await wait_all_tasks_blocked()
        server.drain()
        await wait_all_tasks_blocked()
        assert server.accepted == 2
        for client in clients:
            client.close()
        async with trio.open_nursery() as nursery:

            async def check(client: socket.socket, text: bytes) -> None:
                assert await answer(client, text) == text

            for number, client in enumerate(waiting):
                nursery.start_soon(check, client, b"%d" % number)
    assert server.accepted == server.statistics().handled == 8


async def test_drain_of_server_accepts_from_all_listeners(tmp_path: Path) -> None:
    """A drain takes turns: a long queue of one listener does not keep the others open."""
    listeners: list[Listener] = [await tcp(), await open_unix_listener(tmp_path / "s")]
    async with full_queue(*listeners) as (server, clients):
        waiting = [connected(listeners[0]) for _ in range(5)]
        client = connected(listeners[1])
        await wait_all_tasks_blocked()
        server.drain()
        # Its path is removed although connections of the first listener are not accepted yet.
        await until(lambda: not (tmp_path / "s").exists())
        assert server.accepted == 2
        for each in clients:
            each.close()
        # The second listener waited for a slot, too.
        waiting[0].close()
        assert await answer(client, b"in turn") == b"in turn"
        for each in waiting:
            each.close()


@pytest.mark.parametrize("is_full", [False, True])
async def test_drain_of_pool_ends_the_server(tmp_path: Path, *, is_full: bool) -> None:
    """WorkerPool.drain ends the server: jobs are handled, and the listeners are closed."""
    listeners: list[Listener] = [await tcp(), await open_unix_listener(tmp_path / "s")]
    async with full_queue(*listeners) as (server, clients):
        waiting = [connected(each) for each in listeners] if is_full else []
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.pool.drain)
            await wait_all_tasks_blocked()
            if not is_full:
                waiting += [connected(each) for each in listeners]
            for client in clients:
                client.sendall(b"x")
                client.shutdown(socket.SHUT_WR)
                assert await trio.to_thread.run_sync(client.recv, 2) == b"x"
            # Connections that no worker can get anymore are reset.
            for client in waiting:
                with suppress(ConnectionResetError):
                    assert await trio.to_thread.run_sync(client.recv, 1) == b""
                client.close()
    assert server.statistics().handled == 2
    assert [each.socket.fileno() for each in listeners] == [-1, -1]
    assert not (tmp_path / "s").exists()


async def test_drain_of_pool_while_the_server_drains() -> None:
    """WorkerPool.drain during WorkerServer.drain closes listeners that wait for a slot."""
    listener = await tcp()
    async with full_queue(listener) as (server, clients):
        waiting = connected(listener)
        await wait_all_tasks_blocked()
        server.drain()
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.pool.drain)
            await until(lambda: listener.socket.fileno() == -1)
            for client in clients:
                client.close()
        waiting.close()
    assert server.statistics().handled == 2


async def test_serve_with_workers_without_free_descriptors(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While no file descriptor is free, the server logs that once, retries, and goes on."""
    listener = await tcp()
    async with serving("echo", listener) as server:
        with free_descriptors(1):
            client = connected(listener)
            await until(lambda: "cannot accept connections" in caplog.text)
            await trio.sleep(3 * ACCEPT_RETRY_DELAY)
            assert caplog.text.count("cannot accept connections") == 1
            assert server.accepted == 0
        assert await answer(client, b"at last") == b"at last"
        caplog.clear()
        with free_descriptors(1):
            client = connected(listener)
            await until(lambda: "cannot accept connections" in caplog.text)
        assert await answer(client, b"once more") == b"once more"


def test_max_queue_size_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc, the standard library's constant is the maximum size of a queue."""

    def no_open(*_: object) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(_server, "open", no_open, raising=False)
    assert _server._max_queue_size() == socket.SOMAXCONN + 1


async def test_drain_of_server_without_free_descriptors(caplog: pytest.LogCaptureFixture) -> None:
    """A drain handles a connection that waits until a file descriptor is free."""
    listener = await tcp()
    async with serving("echo", listener) as server:
        client = connected(listener)
        with free_descriptors(0):
            server.drain()
            await until(lambda: "cannot accept connections" in caplog.text)
        assert await answer(client, b"at last") == b"at last"


################################################################
# Draining
################################################################


async def test_drain_of_server_handles_queues_of_listeners(tmp_path: Path) -> None:
    """Connections in the queues of the listeners are handled; none is reset."""
    listeners: list[Listener] = [await tcp(), await open_unix_listener(tmp_path / "s")]
    async with serving("echo", *listeners, max_in_flight=2, max_queue=3) as server:
        clients = [connected(each) for each in listeners for _ in range(30)]
        server.drain()
        async with trio.open_nursery() as nursery:

            async def check(client: socket.socket, text: bytes) -> None:
                assert await answer(client, text) == text

            for number, client in enumerate(clients):
                nursery.start_soon(check, client, b"%d" % number)
    assert server.accepted == server.statistics().handled == 60
    with pytest.raises(OSError, match="No such file"):
        await open_unix_connection(tmp_path / "s")


async def test_drain_of_server_of_a_queue_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more are handled than the queue can hold, so that clients cannot delay the end."""
    monkeypatch.setattr(_server, "_max_queue_size", lambda: 2)
    monkeypatch.setattr(_server, "MAX_BATCH", 1)
    listener = await tcp()
    async with serving("echo", listener) as server:
        clients = [connected(listener) for _ in range(5)]
        server.drain()
        await until(lambda: listener.socket.fileno() == -1)
        # The handlers wait for them.
        for client in clients:
            client.close()
    # One at a time: perhaps some before the drain, and two after it began.
    assert server.accepted < 5


async def test_drain_of_server_timeout_while_the_queue_is_full(tmp_path: Path) -> None:
    """The deadline ends handlers and closes listeners with connections in every queue."""
    listeners: list[Listener] = [await tcp(), await open_unix_listener(tmp_path / "s")]
    async with serving("hold", *listeners, max_in_flight=1, max_queue=1) as server:
        clients = [connected(each) for each in listeners for _ in range(4)]
        await until(lambda: server.accepted == 2)
        server.drain(timeout=0.1)
        # The first deadline stays.
        server.drain(timeout=1000)
    assert server.statistics().failed == 1
    assert [each.socket.fileno() for each in listeners] == [-1, -1]
    assert not (tmp_path / "s").exists()
    for client in clients:
        client.close()


@pytest.mark.parametrize("waits", [False, True])
async def test_drain_of_server_twice(*, waits: bool) -> None:
    """A second call moves the deadline forward, while a listener waits or handlers run."""
    listener = await tcp()
    async with serving("hold", listener, max_in_flight=1, max_queue=1) as server:
        clients = [connected(listener) for _ in range(3 if waits else 1)]
        await until(lambda: server.accepted == (2 if waits else 1))
        server.drain(timeout=1000)
        await until(lambda: (listener.socket.fileno() == -1) is not waits)
        await wait_all_tasks_blocked()
        server.drain(timeout=0)
    assert server.statistics().failed == 1
    for client in clients:
        client.close()


async def test_drain_of_server_timeout_while_a_policy_is_asked(tmp_path: Path) -> None:
    """The deadline ends a check that waits, and its connection is closed."""
    asked = trio.Event()

    async def check(_: PeerIdentity) -> bool:
        asked.set()
        await trio.sleep_forever()
        raise AssertionError

    listener = await open_unix_listener(tmp_path / "s", policy=PeerPolicy(check=check))
    async with serving("echo", listener) as server:
        client = connected(listener)
        await asked.wait()
        server.drain(timeout=0.1)
    assert client.recv(1) == b""
    client.close()


@pytest.mark.parametrize(
    ("timeout", "error", "match"),
    [
        (-1, ValueError, "timeout must be non-negative, got -1"),
        (float("nan"), ValueError, "timeout must be non-negative, got nan"),
        ("1", TypeError, "timeout must be a number of seconds, got str"),
    ],
)
async def test_drain_of_server_with_an_invalid_timeout(
    timeout: Any, error: type[Exception], match: str
) -> None:
    """An invalid timeout is an error, and the server goes on."""
    listener = await tcp()
    async with serving("echo", listener) as server:
        with pytest.raises(error, match=match):
            server.drain(timeout)
        assert await answer(connected(listener), b"still here") == b"still here"


async def test_drain_of_server_in_a_thread() -> None:
    """A call from a thread is an error, and the server goes on."""
    listener = await tcp()
    async with serving("echo", listener) as server:
        with pytest.raises(RuntimeError, match="another thread"):
            await trio.to_thread.run_sync(server.drain)
        assert await answer(connected(listener), b"still here") == b"still here"


async def test_drain_of_server_with_a_path_that_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The path stays, which is logged, and the drain ends."""
    listener = await open_unix_listener(tmp_path / "s")

    def cannot(_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    async with serving("echo", listener):
        monkeypatch.setattr(_bind, "unbind", cannot)
    assert "cannot remove the path" in caplog.text
    assert (tmp_path / "s").exists()


################################################################
# Addresses of peers
################################################################


async def abandoned_of(listener: Listener, client: socket.socket) -> AbandonedJob:
    """Return what is reported of a connection whose worker dies."""
    abandoned: list[AbandonedJob] = []
    async with serving("die_when_told", listener, on_abandoned=abandoned.append):
        client.connect(listener.socket.getsockname())
        client.sendall(b"x")
        await until(lambda: bool(abandoned))
    (job,) = abandoned
    return job


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_abandoned_job_peer_of_tcp(host: str) -> None:
    """AbandonedJob.peer of a TCP connection is the address that the client has."""
    listener = await tcp(host)
    with socket.socket(listener.socket.family) as client:
        job = await abandoned_of(listener, client)
        assert job.peer == client.getsockname()
    assert job.data == b""
    assert job.seconds >= 0


@pytest.mark.parametrize("has_policy", [False, True])
@pytest.mark.parametrize("is_named", [False, True])
async def test_abandoned_job_peer_of_unix(
    tmp_path: Path, *, has_policy: bool, is_named: bool
) -> None:
    """AbandonedJob.peer of a Unix connection is the name of the client, or empty."""
    policy = PeerPolicy.same_user() if has_policy else None
    listener = await open_unix_listener(tmp_path / "s", policy=policy)
    with socket.socket(socket.AF_UNIX) as client:
        if is_named:
            client.bind(str(tmp_path / "client"))
        job = await abandoned_of(listener, client)
    assert job.peer == (str(tmp_path / "client") if is_named else "")


################################################################
# Other ends
################################################################


async def test_serve_with_workers_cancelled(tmp_path: Path) -> None:
    """A cancellation ends handlers, workers and listeners; nothing is left."""
    listeners: list[Listener] = [await tcp(), await open_unix_listener(tmp_path / "s")]
    async with trio.open_nursery() as nursery:
        server: WorkerServer = await nursery.start(
            partial(serve_with_workers, "tests._helpers.server_handlers:hold", listeners, workers=1)
        )
        client = connected(listeners[0])
        assert await trio.to_thread.run_sync(client.recv, 4) == b"held"
        (worker,) = server.statistics().workers
        nursery.cancel_scope.cancel()
    assert client.recv(1) == b""
    client.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)
    assert not (tmp_path / "s").exists()


async def test_serve_with_workers_of_a_listener_that_other_code_closes() -> None:
    """The server ends with an error about it."""
    listener = await tcp()
    with pytest.RaisesGroup(
        pytest.RaisesExc(ConnectionClosedError, match="other code"), flatten_subgroups=True
    ):
        async with serving("echo", listener):
            await wait_all_tasks_blocked()
            await listener.aclose()
            await trio.sleep_forever()


async def test_serve_with_workers_of_a_listener_closed_while_the_queue_is_full() -> None:
    """The server finds it out when a slot is free."""
    listener = await tcp()
    with pytest.RaisesGroup(
        pytest.RaisesExc(ConnectionClosedError, match="other code"), flatten_subgroups=True
    ):
        async with serving("echo", listener, max_in_flight=1, max_queue=1) as server:
            clients = [connected(listener) for _ in range(3)]
            await until(lambda: server.accepted == 2)
            await wait_all_tasks_blocked()
            await listener.aclose()
            for client in clients:
                client.close()
            await trio.sleep_forever()


async def test_drain_of_server_of_a_listener_that_other_code_closes() -> None:
    """Nothing is left to accept, and the drain ends."""
    listener = await tcp()
    async with serving("echo", listener) as server:
        await wait_all_tasks_blocked()
        server.drain()
        await listener.aclose()


@pytest.mark.parametrize("name", ["_accept_from", "_watch"])
async def test_serve_with_workers_of_a_listener_closed_before_it_is_waited_for(name: str) -> None:
    """That is an error unless a drain has begun, whatever process accepts."""
    listener = await tcp()
    pool: Any = None
    server = WorkerServer(pool, [listener])
    await listener.aclose()
    async with trio.open_nursery() as asking:
        (acceptor,) = server._acceptors
        accept = getattr(server, name)
        with pytest.raises(ConnectionClosedError):
            await accept(listener, acceptor, asking)
        server._accepting.cancel()
        await accept(listener, acceptor, asking)
        await server._accept_meanwhile(listener, acceptor, asking)


async def test_watch_accepts_the_last_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listener that was shut down is an error after what is in its queue was accepted."""
    listener = await open_unix_listener(tmp_path / "s")
    pool: Any = None
    server = WorkerServer(pool, [listener])
    queue = [2, 1, 0]

    async def accept_pending(*_: object) -> int:
        await trio.lowlevel.checkpoint()
        return queue.pop(0)

    monkeypatch.setattr(WorkerServer, "_accept_pending", accept_pending)
    async with listener, trio.open_nursery() as asking:
        listener.socket.shutdown(socket.SHUT_RDWR)
        with pytest.raises(OSError, match="Invalid argument"):
            await server._watch(listener, server._acceptors[0], asking)
    assert queue == []


class Passed:
    """Connections that another generation passes on, in one batch."""

    def __init__(self, *fds: int) -> None:
        self.received = [(fd, PassedConnection(False, b"")) for fd in fds]

    async def wait(self) -> bool:
        await trio.lowlevel.checkpoint()
        return bool(self.received)

    def take(self, count: int) -> Any:
        taken, self.received = self.received[:count], self.received[count:]
        return taken


@pytest.mark.parametrize("has_successor", [False, True])
async def test_receive_passed_after_the_pool_is_closed(
    monkeypatch: pytest.MonkeyPatch, *, has_successor: bool
) -> None:
    """Connections that arrive during a drain go to the successor, if it takes them, or end."""
    queue = JobQueue(1, 1, 1, Counters())
    queue.close("draining")
    monkeypatch.setattr(_server, "queue_of", lambda _: queue)
    unused: Any = None
    server = WorkerServer(unused, [])
    put: list[int] = []

    class Passer:
        def put(self, fd: int, _: object) -> bool:
            put.append(fd)
            # It takes one.
            return len(put) == 1

    if has_successor:
        server._passer = cast("Any", Passer())
    pairs = [socket.socketpair() for _ in range(2)]
    connections: Any = Passed(*[one.detach() for one, _ in pairs])
    await server._receive_passed(connections)
    first, second = [two for _, two in pairs]
    with first, second:
        assert len(put) == (2 if has_successor else 0)
        assert second.recv(1) == b""
        if has_successor:
            os.close(put[0])
        assert first.recv(1) == b""


async def test_receive_passed_of_what_is_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is closed, and its slot is free again."""
    queue = JobQueue(1, 1, 1, Counters())
    put: list[Any] = []
    monkeypatch.setattr(_server, "queue_of", lambda _: queue)
    monkeypatch.setattr(_server, "put_received", lambda _, found: put.append(found))
    unused: Any = None
    one, two = socket.socketpair()
    with two, socket.socket() as unconnected:
        connections: Any = Passed(os.dup(unconnected.fileno()))
        await WorkerServer(unused, [])._receive_passed(connections)
        assert put == [[]]
        connections = Passed(one.fileno())
        await WorkerServer(unused, [])._receive_passed(connections)
        ((fd, kind, data, passed),) = put[1]
        assert (fd, kind, data, passed) == (
            one.fileno(),
            EndpointKind.UNIX_WITHOUT_DESCRIPTORS,
            b"",
            0,
        )
        one.close()


async def test_serve_with_workers_policy_check_raises(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception of a check is logged, its connection is closed, and the server goes on."""
    errors = [ZeroDivisionError("a bug"), BaseExceptionGroup("of a nursery", [ValueError("two")])]

    async def check(_: PeerIdentity) -> bool:
        if errors:
            raise errors.pop(0)
        return True

    listener = await open_unix_listener(tmp_path / "s", policy=PeerPolicy(check=check))
    async with serving("echo", listener, max_queue=1) as server:
        for _ in range(2):
            with connected(listener) as client:
                assert await trio.to_thread.run_sync(client.recv, 1) == b""
        assert await answer(connected(listener), b"third") == b"third"
        assert (server.accepted, server.denied, listener.denied) == (3, 2, 0)
    assert caplog.text.count("a check of the policy crashed") == 2
    assert str(tmp_path / "s") in caplog.text
    assert "a bug" in caplog.text


@pytest.mark.parametrize("in_group", [False, True])
async def test_serve_with_workers_policy_check_exits(tmp_path: Path, *, in_group: bool) -> None:
    """SystemExit and similar out of a check end the server, as they end any program."""

    async def check(_: PeerIdentity) -> bool:
        if in_group:
            raise BaseExceptionGroup("of a nursery", [SystemExit(3), ValueError()])
        raise SystemExit(3)

    listener = await open_unix_listener(tmp_path / "s", policy=PeerPolicy(check=check))
    with pytest.RaisesGroup(SystemExit, flatten_subgroups=True, allow_unwrapped=True):
        async with serving("echo", listener):
            connected(listener).close()
            await trio.sleep_forever()


@pytest.mark.measured
async def test_crash_limit_while_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Workers that cannot start end the server with the causes, and close the listeners.

    Two listeners wait for a slot meanwhile.
    """
    monkeypatch.setenv("SETUP_ONCE", str(tmp_path / "begun"))
    listeners: list[Listener] = [await tcp(), await open_unix_listener(tmp_path / "s")]
    with pytest.raises(BaseExceptionGroup) as caught:
        async with serving(
            "die_when_told",
            *listeners,
            setup="tests._helpers.server_handlers:only_once",
            crash_limit=1,
            max_in_flight=1,
            max_queue=1,
        ) as server:
            clients = [connected(each) for _ in range(2) for each in listeners]
            await until(lambda: server.accepted == 2)
            await wait_all_tasks_blocked()
            clients[0].sendall(b"x")
            clients[1].sendall(b"x")
            await trio.sleep_forever()
    assert not caught.group_contains(PoolClosedError)
    assert [each.socket.fileno() for each in listeners] == [-1, -1]
    assert not (tmp_path / "s").exists()
    assert "SIGKILL" in caplog.text
    for client in clients:
        client.close()


async def test_serve_with_workers_of_a_handler_that_cannot_be_imported(tmp_path: Path) -> None:
    """The error of the workers is raised, and the listeners are closed."""
    listener = await open_unix_listener(tmp_path / "s")
    with pytest.raises(WorkerStartError, match="nothing_there"):
        await serve_with_workers("nothing_there:handler", [listener], workers=1)
    assert not (tmp_path / "s").exists()


async def test_serve_with_workers_without_listeners() -> None:
    """An empty list of listeners is a ValueError."""
    with pytest.raises(ValueError, match="at least one listener"):
        await serve_with_workers("tests._helpers.server_handlers:echo", [])


async def test_serve_with_workers_rejects_a_socket() -> None:
    """Something else than a listener is a TypeError; the caller still owns the listeners."""
    wrong: Any = socket.socket()
    async with AsyncExitStack() as stack:
        listener = await stack.enter_async_context(await tcp())
        with pytest.raises(TypeError, match=r"a trio.SocketListener or a UnixListener, got socket"):
            await serve_with_workers("tests._helpers.server_handlers:echo", [listener, wrong])
        assert listener.socket.fileno() != -1
    wrong.close()


async def test_serve_with_workers_of_a_closed_listener() -> None:
    """A closed listener is an error before a worker starts; the caller owns the others."""
    async with AsyncExitStack() as stack:
        listener = await stack.enter_async_context(await tcp())
        closed = await tcp()
        await closed.aclose()
        with pytest.raises(ConnectionClosedError, match="this listener is closed"):
            await serve_with_workers("tests._helpers.server_handlers:echo", [listener, closed])
        assert listener.socket.fileno() != -1


async def test_serve_with_workers_of_a_listener_twice() -> None:
    """The same listener twice is a ValueError, and the caller still owns it."""
    async with await tcp() as listener:
        with pytest.raises(ValueError, match="got one of them twice"):
            await serve_with_workers("tests._helpers.server_handlers:echo", [listener, listener])
        assert listener.socket.fileno() != -1


async def test_serve_with_workers_with_an_invalid_option() -> None:
    """An invalid option is a ValueError, and the listeners are closed."""
    listener = await tcp()
    with pytest.raises(ValueError, match="workers must be at least 1"):
        await serve_with_workers("tests._helpers.server_handlers:echo", [listener], workers=0)
    assert listener.socket.fileno() == -1


async def test_restart_and_scale_of_pool_while_serving() -> None:
    """The pool of a server restarts and scales, and no connection fails meanwhile."""
    listener = await tcp()
    async with serving("echo", listener) as server:
        before = server.statistics().workers[0].pid
        await server.pool.restart()
        await server.pool.scale(2)
        assert await answer(connected(listener), b"x") == b"x"
        await until(lambda: len(server.statistics().workers) == 2)
        assert before not in {each.pid for each in server.statistics().workers}


################################################################
# KeyboardInterrupt
################################################################

# Serve at two paths; print the process ID of the worker, and the accepted connections.
PROGRAM = """
import signal
import sys
from functools import partial

import trio

from trio_unixconn import open_unix_listener
from trio_unixconn.pool import serve_with_workers


class Started:
    server = None

    def started(self, server):
        self.server = server


async def report(status):
    while status.server is None:
        await trio.sleep(0.001)
    if where == "drain":
        # Nothing is handled yet; clients are in the queues of the listeners.
        status.server.drain()
    while status.server.accepted < 2:
        await trio.sleep(0.001)
    print(status.server.statistics().workers[0].pid, flush=True)


async def main():
    listeners = [await open_unix_listener(f"{directory}/{name}") for name in "ab"]
    print("listening", flush=True)
    sys.stdin.readline()
    status = Started()
    serve = partial(
        serve_with_workers, "tests._helpers.server_handlers:hold", listeners,
        workers=1, max_in_flight=1, max_queue=1, task_status=status,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(report, status)
        if where == "child task":
            nursery.start_soon(serve)
        else:
            await serve()


directory, where = sys.argv[1:]
# A signal that is ignored is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
trio.run(main)
"""


@pytest.mark.parametrize("where", ["main task", "child task", "drain"])
def test_serve_with_workers_keyboard_interrupt(tmp_path: Path, where: str) -> None:
    """SIGINT ends a server whose listeners wait for slots; no worker and no path is left."""
    clients: list[socket.socket] = []
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        for name in "aabb":
            clients.append(socket.socket(socket.AF_UNIX))
            clients[-1].connect(str(tmp_path / name))
        process.stdin.write("\n")
        process.stdin.flush()
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    # Trio raises it in the group of a nursery.
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert "Error" not in errors
    assert "TrioInternalError" not in errors
    assert os.listdir(tmp_path) == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    for client in clients:
        client.settimeout(30)
        with suppress(ConnectionResetError):
            while client.recv(10):
                pass
        client.close()


################################################################
# drain(delay=)
################################################################


async def test_drain_of_server_delay_accepts_and_is_not_ready() -> None:
    """During the delay the state is draining, connections are accepted, and workers replaced."""
    listener = await tcp()
    async with serving("echo", listener) as server:
        assert server.statistics().state == "ready"
        server.drain(delay=math.inf)
        assert server.statistics().state == "draining"
        assert await answer(connected(listener), b"one") == b"one"
        await until(lambda: server.statistics().handled == 1)
        os.kill(server.statistics().workers[0].pid, signal.SIGKILL)
        assert await answer(connected(listener), b"two") == b"two"
        assert server.statistics().state == "draining"
        # The end of the block is the second call, without a delay.
    assert server.statistics().handled == 2
    assert server.statistics().state == "ended"


async def test_drain_of_server_delay_ends_by_itself() -> None:
    """After the delay the connections in the queue are handled, and the server ends."""
    listener = await tcp()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            server: WorkerServer = await nursery.start(
                partial(
                    serve_with_workers,
                    "tests._helpers.server_handlers:echo",
                    [listener],
                    workers=1,
                )
            )
            client = connected(listener)
            server.drain(delay=0.01)
            assert await answer(client, b"early") == b"early"
    assert listener.socket.fileno() == -1
    assert server.statistics().state == "ended"


async def test_drain_of_server_delay_before_the_timeout() -> None:
    """The time for handlers begins when the delay ends; a second call only shortens."""
    listener = await tcp()
    async with serving("hold", listener) as server:
        with connected(listener) as client:
            assert await trio.to_thread.run_sync(client.recv, 10) == b"held"
            before = trio.current_time()
            server.drain(timeout=5, delay=1000)
            assert server._accepting.deadline >= before + 1000
            assert server._finishing.deadline == server._accepting.deadline + 5
            server.drain(timeout=7, delay=500)
            assert server._accepting.deadline < before + 1000
            assert server._finishing.deadline == server._accepting.deadline + 7
            server.drain(timeout=2000, delay=2000)
            assert server._finishing.deadline == server._accepting.deadline + 7
            assert server._accepting.deadline < before + 1000
            server.drain(timeout=0)
    assert server.statistics().failed == 1


@pytest.mark.parametrize(
    ("delay", "error", "match"),
    [
        (-1, ValueError, "delay must be non-negative, got -1"),
        (math.nan, ValueError, "delay must be non-negative, got nan"),
        ("1", TypeError, "delay must be a number of seconds, got str"),
    ],
)
async def test_drain_of_server_with_an_invalid_delay(
    delay: Any, error: type[Exception], match: str
) -> None:
    """An invalid delay is an error, and the server stays ready."""
    listener = await tcp()
    async with serving("echo", listener) as server:
        with pytest.raises(error, match=match):
            server.drain(delay=delay)
        assert server.statistics().state == "ready"
        assert await answer(connected(listener), b"still here") == b"still here"


async def test_drain_of_server_delay_of_a_listener_that_other_code_closes() -> None:
    """That is not an error after a drain was asked for, even if it is delayed."""
    listeners = [await tcp(), await tcp()]
    async with serving("echo", *listeners) as server:
        await wait_all_tasks_blocked()
        server.drain(delay=math.inf)
        await listeners[0].aclose()
        assert await answer(connected(listeners[1]), b"other") == b"other"


################################################################
# The state in the statistics
################################################################


async def test_statistics_state_of_server(tmp_path: Path) -> None:
    """It is draining from the call of drain() on, while handlers run; capacity is what is ready."""
    listener = await tcp()
    async with serving("hold", listener, workers=2, max_in_flight=7) as server:
        assert (server.statistics().state, server.statistics().capacity) == ("ready", 14)
        with connected(listener) as client:
            assert await trio.to_thread.run_sync(client.recv, 10) == b"held"
            server.drain()
            assert (server.statistics().state, server.pool.statistics().state) == (
                "draining",
                "ready",
            )
            await until(lambda: server.pool.statistics().state == "draining")
            assert server.statistics().state == "draining"
            server.drain(timeout=0)
    assert server.statistics().state == "ended"
    assert server.statistics().capacity == 0


async def test_statistics_state_of_server_whose_pool_drains() -> None:
    """A drain of the pool by other code is one, too."""
    listener = await tcp()
    async with serving("hold", listener) as server:
        with connected(listener) as client:
            assert await trio.to_thread.run_sync(client.recv, 10) == b"held"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.pool.drain)
                await wait_all_tasks_blocked()
                assert server.statistics().state == "draining"
                server.drain(timeout=0)
