"""serve_with_workers: connections are accepted here and handled by workers; none is turned away."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from helpers import free_descriptors, until
from peer_processes import passrights
from trio.testing import wait_all_tasks_blocked

from trio_unixconn import (
    ConnectionClosedError,
    PeerPolicy,
    UnixListener,
    WorkerStartError,
    _bind,
    open_unix_connection,
    open_unix_listener,
)
from trio_unixconn._accept import ACCEPT_RETRY_DELAY
from trio_unixconn.pool import PoolStatistics, WorkerServer, _server, serve_with_workers

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from trio_unixconn import PeerIdentity

    Listener = trio.SocketListener | UnixListener

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


@asynccontextmanager
async def serving(
    handler: str, *listeners: Listener, **options: Any
) -> AsyncGenerator[WorkerServer, None]:
    """Serve with one worker; behind the block it drains."""
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            server: WorkerServer = await nursery.start(
                partial(
                    serve_with_workers,
                    f"server_handlers:{handler}",
                    listeners,
                    **{"workers": 1, **options},
                )
            )
            yield server
            server.drain()


async def tcp(host: str = "127.0.0.1") -> trio.SocketListener:
    (listener,) = await trio.open_tcp_listeners(0, host=host)
    return listener


def connected(listener: Listener) -> socket.socket:
    """Connect as far as the listener's queue."""
    name = (
        listener.get_local_address().native
        if isinstance(listener, UnixListener)
        else listener.socket.getsockname()
    )
    client = socket.socket(listener.socket.family)
    client.settimeout(30)
    client.connect(name)
    return client


async def answer(client: socket.socket, sent: bytes = b"x") -> bytes:
    """Send, end the stream, and return all that comes."""

    def talk() -> bytes:
        with client:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: client.recv(65536), b""))

    # A thread of its own: whoever comes behind it may be waited for.
    return await trio.to_thread.run_sync(talk, limiter=trio.CapacityLimiter(1))


################################################################
# Serving
################################################################


async def test_tcp_and_unix_at_a_time(tmp_path: Path) -> None:
    """Each listener's connections come to the handler as streams of their kind."""
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


async def test_another_family(tmp_path: Path) -> None:
    """A stream socket that is neither TCP nor a UnixListener's is found out by the worker."""
    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.bind(str(tmp_path / "s"))
    sock.listen()
    listener = trio.SocketListener(sock)
    async with serving("tell", listener):
        assert json.loads(await answer(connected(listener)))["type"] == "UnixConnection"


async def test_a_listener_of_a_descriptor(tmp_path: Path) -> None:
    """A UnixListener that was made from a descriptor is served, and its path stays."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.listen()
        listener = UnixListener.from_fd(os.dup(sock.fileno()))
        async with serving("echo", listener):
            assert await answer(connected(listener), b"hello") == b"hello"
    assert (tmp_path / "s").exists()


async def test_a_denying_policy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whom the listener's policy denies is closed, logged, counted, and never handed over."""
    listener = await open_unix_listener(tmp_path / "s", policy=PeerPolicy(uids=[12345]))
    async with serving("echo", listener) as server:
        async with await open_unix_connection(tmp_path / "s") as conn:
            assert await conn.receive_some() == b""
        assert (server.accepted, server.denied, listener.denied) == (1, 1, 1)
        assert server.statistics().submitted == 0
    assert "denied" in caplog.text


async def test_an_admitting_policy(tmp_path: Path) -> None:
    """A check that waits holds up nobody else, and whom it admits is handled."""
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
        # A drain waits for it, too.
        server.drain()
        go_on.set()
        assert await first.receive_some() == b"first"
    assert server.statistics().handled == 2


async def test_no_room_for_those_that_are_asked_about(tmp_path: Path) -> None:
    """Connections that a policy is asked about have their places in the queue."""
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


@passrights
async def test_descriptors_are_refused_also_in_the_worker(tmp_path: Path) -> None:
    """A listener without receive_descriptors gives connections that take none."""
    listener = await open_unix_listener(tmp_path / "s", receive_descriptors=False)
    async with serving("tell", listener):
        client = connected(listener)
        with pytest.raises(OSError, match="not permitted"):
            socket.send_fds(client, [b"x"], [0])
        assert json.loads(await answer(client, b"\0"))["refused"] == "UnexpectedControlMessageError"


################################################################
# Full, and out of descriptors
################################################################


async def test_a_full_queue_stops_accepting() -> None:
    """While the workers have no room, clients wait in the listener's queue."""
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


async def test_without_free_descriptors(caplog: pytest.LogCaptureFixture) -> None:
    """While no descriptor is free the server waits, says so once, and goes on then."""
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


async def test_a_drain_without_free_descriptors(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever waits while no descriptor is free is not turned away by a drain."""
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


async def test_a_drain_handles_what_waited(tmp_path: Path) -> None:
    """Whoever was in a listener's queue when the drain began is answered; nobody is reset."""
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


async def test_a_drain_of_a_queue_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more are handled than can have waited, so that clients cannot put the end off."""
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
    # One at a time: perhaps some before the drain, and two behind its beginning.
    assert server.accepted < 5


async def test_the_deadline_of_a_drain_while_there_is_no_room(tmp_path: Path) -> None:
    """Handlers that never end do not put it off, though clients wait in every queue."""
    listeners: list[Listener] = [await tcp(), await open_unix_listener(tmp_path / "s")]
    async with serving("hold", *listeners, max_in_flight=1, max_queue=1) as server:
        clients = [connected(each) for each in listeners for _ in range(4)]
        await until(lambda: server.accepted == 2)
        server.drain(timeout=0.1)
        # Only the first one counts.
        server.drain(timeout=1000)
    assert server.statistics().failed == 1
    assert [each.socket.fileno() for each in listeners] == [-1, -1]
    assert not (tmp_path / "s").exists()
    for client in clients:
        client.close()


async def test_the_deadline_of_a_drain_while_a_policy_is_asked(tmp_path: Path) -> None:
    """A check that never ends does not put it off; the connection is closed."""
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


@pytest.mark.parametrize("timeout", [-1, float("nan")])
async def test_a_timeout_that_cannot_be(timeout: float) -> None:
    """A negative timeout, or one that is no number, is refused, and the server goes on."""
    listener = await tcp()
    async with serving("echo", listener) as server:
        with pytest.raises(ValueError, match="timeout must be non-negative"):
            server.drain(timeout)
        assert await answer(connected(listener), b"still here") == b"still here"


async def test_a_path_that_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It stays, which is logged, and the drain comes to its end."""
    listener = await open_unix_listener(tmp_path / "s")

    def cannot(_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    async with serving("echo", listener):
        monkeypatch.setattr(_bind, "unbind", cannot)
    assert "cannot remove the path" in caplog.text
    assert (tmp_path / "s").exists()


################################################################
# Other ends
################################################################


async def test_cancelled(tmp_path: Path) -> None:
    """Cancelling ends handlers, workers and listeners, and leaves nothing behind."""
    listeners: list[Listener] = [await tcp(), await open_unix_listener(tmp_path / "s")]
    async with trio.open_nursery() as nursery:
        server: WorkerServer = await nursery.start(
            partial(serve_with_workers, "server_handlers:hold", listeners, workers=1)
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


async def test_a_listener_that_somebody_closes() -> None:
    """It ends the server with an error that says so."""
    listener = await tcp()
    with pytest.RaisesGroup(
        pytest.RaisesExc(ConnectionClosedError, match="other code"), flatten_subgroups=True
    ):
        async with serving("echo", listener):
            await wait_all_tasks_blocked()
            await listener.aclose()
            await trio.sleep_forever()


async def test_a_listener_that_somebody_closes_while_there_is_no_room() -> None:
    """It is found when there is room again."""
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


async def test_a_listener_that_somebody_closes_in_a_drain() -> None:
    """There is nothing left to accept then, and the drain comes to its end."""
    listener = await tcp()
    async with serving("echo", listener) as server:
        await wait_all_tasks_blocked()
        server.drain()
        await listener.aclose()


async def test_a_listener_that_is_closed_before_it_was_waited_for() -> None:
    """Its task ends in silence if a drain has begun by then."""
    listener = await tcp()
    pool: Any = None
    server = WorkerServer(pool, [listener])
    await listener.aclose()
    async with trio.open_nursery() as asking:
        (acceptor,) = server._acceptors
        with pytest.raises(ConnectionClosedError):
            await server._accept_from(listener, acceptor, asking)
        server._accepting.cancel()
        await server._accept_from(listener, acceptor, asking)


async def test_a_check_that_fails(tmp_path: Path) -> None:
    """An exception out of a policy's check ends the server with it."""

    async def check(_: PeerIdentity) -> bool:
        raise ZeroDivisionError

    listener = await open_unix_listener(tmp_path / "s", policy=PeerPolicy(check=check))
    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        async with serving("echo", listener):
            connected(listener).close()
            await trio.sleep_forever()


async def test_workers_that_cannot_live(caplog: pytest.LogCaptureFixture) -> None:
    """A crash loop ends the server with its causes, and closes the listener."""
    listener = await tcp()
    with pytest.raises(BaseExceptionGroup) as caught:
        async with serving("hold", listener, crash_limit=1) as server:
            # Without a job: one that kills its worker never ends the server.
            os.kill(server.statistics().workers[0].pid, signal.SIGKILL)
            await trio.sleep_forever()
    assert "1 consecutive workers crashed" in repr(caught.value)
    assert listener.socket.fileno() == -1
    assert "SIGKILL" in caplog.text


async def test_a_handler_that_cannot_be_imported(tmp_path: Path) -> None:
    """The workers' error is raised, and the listeners are closed."""
    listener = await open_unix_listener(tmp_path / "s")
    with pytest.raises(WorkerStartError, match="nothing_there"):
        await serve_with_workers("nothing_there:handler", [listener], workers=1)
    assert not (tmp_path / "s").exists()


async def test_no_listeners() -> None:
    """At least one is due."""
    with pytest.raises(ValueError, match="at least one listener"):
        await serve_with_workers("server_handlers:echo", [])


async def test_no_listener() -> None:
    """What is no listener is a TypeError, and the others stay the caller's."""
    wrong: Any = socket.socket()
    async with AsyncExitStack() as stack:
        listener = await stack.enter_async_context(await tcp())
        with pytest.raises(TypeError, match=r"a trio.SocketListener or a UnixListener, got socket"):
            await serve_with_workers("server_handlers:echo", [listener, wrong])
        assert listener.socket.fileno() != -1
    wrong.close()


async def test_a_wrong_option() -> None:
    """An option that cannot be is a ValueError, and the listeners are closed."""
    listener = await tcp()
    with pytest.raises(ValueError, match="workers must be at least 1"):
        await serve_with_workers("server_handlers:echo", [listener], workers=0)
    assert listener.socket.fileno() == -1


async def test_workers_are_changed_while_serving() -> None:
    """The pool of a server restarts and scales, and no connection fails meanwhile."""
    listener = await tcp()
    async with serving("echo", listener) as server:
        before = server.statistics().workers[0].pid
        await server.pool.restart()
        await server.pool.scale(2)
        assert await answer(connected(listener), b"x") == b"x"
        await until(lambda: len(server.statistics().workers) == 2)
        assert before not in {each.pid for each in server.statistics().workers}
