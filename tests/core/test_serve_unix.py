"""serve_unix: a task for each connection, and a drain that resets no client."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import sys
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests._helpers.accept_errors import fail_accept
from tests._helpers.fds import free_descriptors
from tests._helpers.processes import open_descriptors
from tests._helpers.waiting import counted, until
from trio_unixconn import (
    AddressInUseError,
    ConnectionBrokenError,
    ConnectionClosedError,
    NotSupportedError,
    PeerPolicy,
    UnixConnection,
    UnixListener,
    UnixServer,
    _bind,
    open_unix_connection,
    open_unix_listener,
    serve_unix,
)
from trio_unixconn._accept import Acceptor

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


async def echo(conn: UnixConnection) -> None:
    async for data in conn:
        await conn.send_all(data.upper())


async def start(
    nursery: trio.Nursery,
    handler: Callable[[UnixConnection], Awaitable[None]],
    address: Any,
    **options: Any,
) -> UnixServer:
    async def serve(task_status: trio.TaskStatus[UnixServer]) -> None:
        await serve_unix(handler, address, task_status=task_status, **options)

    server: UnixServer = await nursery.start(serve)
    return server


async def ask(conn: UnixConnection, text: bytes = b"x") -> None:
    await conn.send_all(text)
    assert await conn.receive_some() == text.upper()


async def test_serve_unix_serves_clients_concurrently(path: Path) -> None:
    """Clients are served at the same time, and counted, from the moment start returns."""
    async with trio.open_nursery() as nursery:
        server = await start(nursery, echo, path)
        assert server.listener.get_local_address().get_path() == str(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with await open_unix_connection(path) as one, await open_unix_connection(path) as two:
            for conn in (one, two, one):
                await ask(conn)
            assert (server.connections, server.accepted) == (2, 2)
        await wait_all_tasks_blocked()
        assert (server.connections, server.accepted) == (0, 2)
        assert (server.denied, server.crashed) == (0, 0)
        assert "connections=0, accepted=2" in repr(server)
        server.drain()
    assert server.drained.is_set()
    assert not path.exists()


async def test_serve_unix_cancelled(path: Path) -> None:
    """Cancelling the server cancels the handlers, and removes the path."""
    async with trio.open_nursery() as nursery:
        await start(nursery, echo, path)
        client = await open_unix_connection(path)
        await ask(client)
        nursery.cancel_scope.cancel()
    async with client:
        assert await client.receive_some() == b""
    assert not path.exists()


async def test_drain_lets_handlers_finish(path: Path) -> None:
    """A drain removes the path at once, and waits for the handlers."""
    async with trio.open_nursery() as nursery:
        server = await start(nursery, echo, path)
        async with await open_unix_connection(path) as client:
            await ask(client)
            server.drain()
            await until(lambda: not path.exists() and server.listener.socket.fileno() == -1)
            await ask(client)
            with pytest.raises(FileNotFoundError):
                await open_unix_connection(path)
            assert not server.drained.is_set()
        await server.drained.wait()
    assert server.connections == 0


async def test_drain_handles_connections_in_the_queue(path: Path) -> None:
    """Clients that have connected before the drain are served, even if not accepted yet."""
    async with trio.open_nursery() as nursery:
        server = await start(nursery, echo, path, max_connections=1)
        first = await open_unix_connection(path)
        await ask(first)
        waiting = [await open_unix_connection(path) for _ in range(5)]
        server.drain()
        await first.aclose()
        for conn in waiting:
            async with conn:
                await ask(conn)
    assert server.accepted == 6


async def test_drain_of_a_name_that_stays() -> None:
    """A drain ends even if an abstract name stays in use by busy clients."""
    name = f"\0trio-unixconn-drain-{os.getpid()}"

    async def handler(conn: UnixConnection) -> None:
        # Meanwhile the other clients get into the queue.
        for _ in range(10):
            await trio.lowlevel.checkpoint()

    async def client() -> None:
        with contextlib.suppress(ConnectionRefusedError, ConnectionBrokenError):
            while True:
                async with await open_unix_connection(name) as conn:
                    await conn.receive_some()

    async with trio.open_nursery() as nursery:
        server = await start(nursery, handler, name, max_connections=1, backlog=3)
        for _ in range(8):
            nursery.start_soon(client)
        await until(lambda: server.accepted > 8)
        before = server.accepted
        server.drain()
        with trio.fail_after(30):
            await server.drained.wait()
        # What was accepted already when the drain began does not count.
        assert server.accepted - before <= 5


async def test_drain_with_a_deadline(path: Path, autojump_clock: MockClock) -> None:
    """Handlers that are at work at the deadline are cancelled; a later one does not put it off."""

    async def forever(conn: UnixConnection) -> None:
        await trio.sleep_forever()

    before = trio.current_time()
    async with trio.open_nursery() as nursery:
        server = await start(nursery, forever, path)
        async with await open_unix_connection(path):
            await until(lambda: server.connections == 1)
            begun = trio.current_time()
            server.drain(10)
            server.drain(60)
            await server.drained.wait()
            assert trio.current_time() - begun == pytest.approx(10)
    assert server.connections == 0
    assert trio.current_time() >= before + 10


@pytest.mark.parametrize("timeout", [-1, float("nan")])
async def test_drain_rejects_bad_timeout(path: Path, timeout: float) -> None:
    """A timeout that is not a length of time is rejected, and the server goes on."""
    async with trio.open_nursery() as nursery:
        server = await start(nursery, echo, path)
        with pytest.raises(ValueError, match="timeout must be non-negative"):
            server.drain(timeout)
        async with await open_unix_connection(path) as client:
            await ask(client)
        server.drain()


async def test_drain_without_free_descriptors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drain that needs a descriptor to remove the path waits for one; handlers continue."""
    tries = counted(monkeypatch, _bind, "unbind")
    async with trio.open_nursery() as nursery:
        server = await start(nursery, echo, path)
        async with await open_unix_connection(path) as client:
            await ask(client)
            with free_descriptors(0):
                server.drain()
                await until(lambda: len(tries) > 2)
                await ask(client)
                assert path.exists()
            await until(lambda: not path.exists())
            await ask(client)


async def test_drain_that_cannot_remove_the_path(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that cannot be removed is logged, and handlers finish."""

    def unbind(_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(_bind, "unbind", unbind)
    async with trio.open_nursery() as nursery:
        server = await start(nursery, echo, path)
        async with await open_unix_connection(path) as client:
            await ask(client)
            server.drain()
            await until(lambda: server.listener.socket.fileno() == -1)
            await ask(client)
    (record,) = caplog.records
    assert "cannot remove the path" in record.getMessage()
    path.unlink()


async def test_drain_cancelled(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drain that is cancelled while another process is at the path leaves no path."""
    lock = path.with_name(".s.lock")
    async with trio.open_nursery() as nursery:
        server = await start(nursery, echo, path)
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            tries = counted(monkeypatch, _bind, "unbind")
            server.drain()
            await until(lambda: len(tries) > 2)
            nursery.cancel_scope.cancel()
            lock.unlink()
    assert os.listdir(path.parent) == []


async def test_drain_without_connections(path: Path) -> None:
    """A drain of a server without connections ends it at once."""
    async with trio.open_nursery() as nursery:
        server = await start(nursery, echo, path)
        server.drain()
    assert server.accepted == 0


async def test_drain_of_a_server_whose_path_was_taken_over(path: Path) -> None:
    """The old server serves its queue, and leaves the path to the new one."""
    async with trio.open_nursery() as nursery:
        old = await start(nursery, echo, path, max_connections=1)
        async with await open_unix_connection(path) as first:
            await ask(first)
            early = await open_unix_connection(path)
            new = await start(nursery, echo, path, replace=True)
            old.drain()
        async with early, await open_unix_connection(path) as late:
            await ask(early)
            await ask(late)
        await old.drained.wait()
        assert path.exists()
        new.drain()
    assert (old.accepted, new.accepted) == (2, 1)


async def test_max_connections(path: Path) -> None:
    """No more handlers than allowed run at a time; the others wait in the queue."""
    running, most = 0, 0
    release = trio.Event()

    async def handler(conn: UnixConnection) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await release.wait()
        running -= 1

    async with trio.open_nursery() as nursery:
        server = await start(nursery, handler, path, max_connections=2)
        clients = [await open_unix_connection(path) for _ in range(6)]
        await wait_all_tasks_blocked()
        assert (running, server.connections, server.accepted) == (2, 2, 2)
        release.set()
        await until(lambda: server.accepted == 6 and not server.connections)
        server.drain()
        for client in clients:
            await client.aclose()
    assert most == 2


async def crash(conn: UnixConnection) -> None:
    raise RuntimeError("crashed")


async def test_handler_errors_raise(path: Path) -> None:
    """By default an exception out of a handler ends the server, as in any trio program."""
    with pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            await start(nursery, crash, path)
            async with await open_unix_connection(path) as client:
                assert await client.receive_some() == b""
                await trio.sleep_forever()
    assert any("crashed" in str(leaf) for leaf in leaves(caught.value))
    assert not path.exists()


def leaves(exc: BaseException) -> list[BaseException]:
    inner: tuple[BaseException, ...] = getattr(exc, "exceptions", ())
    return [leaf for each in inner for leaf in leaves(each)] if inner else [exc]


async def test_handler_errors_log(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With handler_errors="log" it is logged with its peer, counted, and the server goes on."""

    async def handler(conn: UnixConnection) -> None:
        if await conn.receive_some() == b"crash":
            await conn.aclose()
            raise RuntimeError("crashed")
        await conn.send_all(b"well")

    async with trio.open_nursery() as nursery:
        server = await start(nursery, handler, path, handler_errors="log")
        async with await open_unix_connection(path) as client:
            await client.send_all(b"crash")
            assert await client.receive_some() == b""
        async with await open_unix_connection(path) as client:
            await client.send_all(b"x")
            assert await client.receive_some() == b"well"
        server.drain()
    assert (server.crashed, server.accepted, server.connections) == (1, 2, 0)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.name == "trio_unixconn"
    assert f"pid={os.getpid()}" in record.getMessage()
    assert str(path) in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], RuntimeError)


@pytest.mark.parametrize("how", ["drain", "cancel"])
@pytest.mark.parametrize("handler_errors", ["raise", "log"])
async def test_handler_errors_of_a_cancelled_handler(
    path: Path, caplog: pytest.LogCaptureFixture, how: str, handler_errors: str
) -> None:
    """What a handler raises while it is cancelled is not lost, and treated as ever."""

    async def crash_at_the_end() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise RuntimeError("crashed at the end")

    async def handler(conn: UnixConnection) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(crash_at_the_end)

    raised = None
    try:
        async with trio.open_nursery() as nursery:
            server = await start(nursery, handler, path, handler_errors=handler_errors)
            async with await open_unix_connection(path):
                await wait_all_tasks_blocked()
                if how == "cancel":
                    nursery.cancel_scope.cancel()
                server.drain(0)
                await trio.sleep_forever() if how == "cancel" else await server.drained.wait()
    except ExceptionGroup as exc:
        raised = exc
    if handler_errors == "raise":
        assert raised is not None
        assert [str(leaf) for leaf in leaves(raised)] == ["crashed at the end"]
    else:
        assert raised is None
        assert server.crashed == 1
        assert "crashed at the end" in caplog.text


async def test_handler_errors_log_does_not_catch_base_exceptions(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A BaseException ends the server even with handler_errors="log", and is not logged."""

    async def handler(conn: UnixConnection) -> None:
        raise SystemExit(7)

    ended = None
    try:
        async with trio.open_nursery() as nursery:
            server = await start(nursery, handler, path, handler_errors="log")
            async with await open_unix_connection(path):
                await trio.sleep_forever()
    except BaseExceptionGroup as exc:
        ended = exc
    assert ended is not None
    assert [type(leaf) for leaf in leaves(ended)] == [SystemExit]
    assert server.crashed == 0
    assert not caplog.records


async def test_handler_errors_log_with_an_unknown_peer(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the system does not report the peer, the log has "unknown", and the server goes on."""

    def fail(_: object) -> None:
        raise NotSupportedError("no option")

    monkeypatch.setattr(UnixConnection, "get_peer_credentials", fail)
    async with trio.open_nursery() as nursery:
        server = await start(nursery, crash, path, handler_errors="log", max_connections=1)
        for _ in range(2):
            async with await open_unix_connection(path) as client:
                assert await client.receive_some() == b""
        server.drain()
    assert server.crashed == 2
    assert "the peer was unknown" in caplog.text
    for record in caplog.records:
        assert record.exc_info is not None
        assert record.exc_info[0] is RuntimeError


async def test_serve_unix_control_c_reaches_handlers(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Handlers run unprotected from Control-C, as any task; what hands them connections not."""
    protected: list[bool] = []
    real = UnixServer._start

    def begin(*arguments: Any) -> None:
        protected.append(trio.lowlevel.currently_ki_protected())
        real(*arguments)

    monkeypatch.setattr(UnixServer, "_start", begin)

    async def handler(conn: UnixConnection) -> None:
        protected.append(trio.lowlevel.currently_ki_protected())

    async with trio.open_nursery() as nursery:
        server = await start(nursery, handler, path)
        async with await open_unix_connection(path) as client:
            assert await client.receive_some() == b""
        server.drain()
    assert protected == [True, False]


async def test_serve_unix_policy_check_that_raises(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception of a check is handled as one of a handler; the peer is not admitted."""

    async def check(_: object) -> bool:
        raise RuntimeError("the check crashed")

    async with trio.open_nursery() as nursery:
        server = await start(
            nursery, echo, path, policy=PeerPolicy(check=check), handler_errors="log"
        )
        async with await open_unix_connection(path) as client:
            assert await client.receive_some() == b""
        await wait_all_tasks_blocked()
        assert (server.crashed, server.connections) == (1, 0)
        server.drain()
    assert "the check crashed" in caplog.text


async def test_serve_unix_policy_denies(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A denied client gets the end of the stream; it is logged and counted."""
    async with trio.open_nursery() as nursery:
        server = await start(nursery, echo, path, policy=PeerPolicy(uids=[54321]))
        async with await open_unix_connection(path) as client:
            assert await client.receive_some() == b""
        await wait_all_tasks_blocked()
        assert (server.denied, server.accepted, server.connections) == (1, 1, 0)
        server.drain()
    (record,) = caplog.records
    assert f"denied pid {os.getpid()} uid {os.geteuid()}" in record.getMessage()


async def test_serve_unix_policy_check_delays_no_other_connection(path: Path) -> None:
    """While a check waits for one peer, others are served."""
    answer = trio.Event()
    asked: list[object] = []

    async def check(peer: object) -> bool:
        asked.append(peer)
        if len(asked) == 1:
            await answer.wait()
        return True

    async with trio.open_nursery() as nursery:
        server = await start(nursery, echo, path, policy=PeerPolicy(check=check))
        slow = await open_unix_connection(path)
        async with slow, await open_unix_connection(path) as fast:
            await ask(fast)
            answer.set()
            await ask(slow)
        server.drain()


async def test_serve_unix_without_a_free_descriptor(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without free descriptors the server waits, logs that once, and continues."""
    async with trio.open_nursery() as nursery:
        server = await start(nursery, echo, path)
        tries = counted(monkeypatch, Acceptor, "back_off")
        async with await open_unix_connection(path) as client:
            with free_descriptors(0):
                await client.send_all(b"x")
                await until(lambda: len(tries) > 2)
            assert await client.receive_some() == b"X"
        server.drain()
    (record,) = caplog.records
    assert f"{path}: cannot accept connections (Too many open files)" in record.getMessage()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EPERM])
async def test_drain_retries_accept(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A drain handles the connections in the queue even if accepting them fails at first."""
    async with trio.open_nursery() as nursery:
        server = await start(nursery, echo, path, max_connections=1)
        first = await open_unix_connection(path)
        await ask(first)
        calls = fail_accept(monkeypatch, [number])
        async with await open_unix_connection(path) as client:
            server.drain()
            await first.aclose()
            await ask(client)
            assert calls[:2] == [number, 0]


async def test_drain_raises_permanent_error_of_accept(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A permanent error of accept ends a drain, too."""
    with pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            server = await start(nursery, echo, path)
            fail_accept(monkeypatch, [errno.EIO])
            server.drain()
    assert "Input/output error" in str(leaves(caught.value)[0])
    assert server.listener.socket.fileno() == -1


async def test_serve_unix_raises_permanent_error_of_accept(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A permanent error of accept ends the server."""
    listener = await open_unix_listener(path)
    fail_accept(monkeypatch, [errno.EIO])
    with pytest.raises(ExceptionGroup) as caught:
        await serve_unix(echo, listener)
    assert any("Input/output error" in str(leaf) for leaf in leaves(caught.value))
    assert listener.socket.fileno() == -1


async def test_serve_unix_with_a_listener(path: Path) -> None:
    """A listener is accepted instead of a path; its policy is asked too, and it is closed."""
    listener = await open_unix_listener(path, policy=PeerPolicy.same_user())
    async with trio.open_nursery() as nursery:
        server = await start(nursery, echo, listener)
        assert server.listener is listener
        async with await open_unix_connection(path) as client:
            await ask(client)
        server.drain()
    with pytest.raises(ConnectionClosedError):
        await listener.accept()


async def test_drain_asks_the_policy_of_the_listener(path: Path) -> None:
    """A drain asks the listener's policy about the connections in the queue, too."""

    async def check(_: object) -> bool:
        checked.append(1)
        return len(checked) == 1

    checked: list[int] = []
    listener = await open_unix_listener(path, policy=PeerPolicy(check=check))
    async with trio.open_nursery() as nursery:
        server = await start(nursery, echo, listener, max_connections=1)
        async with await open_unix_connection(path) as first:
            await ask(first)
            second = await open_unix_connection(path)
            server.drain()
        async with second:
            assert await second.receive_some() == b""
    assert (listener.denied, server.denied, server.accepted) == (1, 1, 2)


async def test_drain_while_a_listener_asks_its_policy(path: Path) -> None:
    """A connection whose check waits when the drain begins is served."""
    asked, answer = trio.Event(), trio.Event()

    async def check(_: object) -> bool:
        asked.set()
        await answer.wait()
        return True

    listener = await open_unix_listener(path, policy=PeerPolicy(check=check))
    async with trio.open_nursery() as nursery:
        server = await start(nursery, echo, listener)
        async with await open_unix_connection(path) as client:
            await asked.wait()
            server.drain()
            await until(lambda: listener.socket.fileno() == -1)
            answer.set()
            await ask(client)
    assert (server.accepted, server.denied) == (1, 0)


async def test_drain_of_an_inherited_listener(path: Path) -> None:
    """A drain of an inherited listener leaves queue and path to other processes."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        listener = UnixListener.from_fd(os.dup(sock.fileno()))
        async with trio.open_nursery() as nursery:
            server = await start(nursery, echo, listener, max_connections=1)
            first = await open_unix_connection(path)
            await ask(first)
            async with await open_unix_connection(path) as second:
                server.drain()
                await first.aclose()
                await until(lambda: listener.socket.fileno() == -1)
                accepted, _ = sock.accept()
                with accepted:
                    accepted.sendall(b"others")
                    assert await second.receive_some() == b"others"
        assert server.accepted == 1
    assert path.exists()


@pytest.mark.parametrize("options", [{"max_connections": 0}, {"handler_errors": "ignore"}])
async def test_serve_unix_rejects_wrong_options(path: Path, options: Any) -> None:
    """Wrong options are rejected before anything happens."""
    with pytest.raises(ValueError, match=next(iter(options))):
        await serve_unix(echo, path, **options)
    assert not path.exists()


async def test_serve_unix_with_wrong_options_leaves_the_listener_open(path: Path) -> None:
    """With wrong options a listener stays its caller's, and open."""
    async with await open_unix_listener(path) as listener:
        with pytest.raises(TypeError):
            await serve_unix(echo, listener, max_connections=1.5)  # type: ignore[arg-type]
        assert listener.socket.fileno() != -1


@pytest.mark.parametrize(
    "options",
    [
        {"mode": 0o666},
        {"owner": 0},
        {"group": "root"},
        {"backlog": 1},
        {"credentials": True},
        {"pidfds": True},
        {"replace": True},
        {"receive_descriptors": False},
    ],
)
async def test_serve_unix_rejects_options_of_an_open_listener(path: Path, options: Any) -> None:
    """Options for opening a listener are rejected with an open one."""
    async with await open_unix_listener(path) as listener:
        with pytest.raises(ValueError, match=next(iter(options))):
            await serve_unix(echo, listener, **options)
        assert path.exists()


async def test_serve_unix_passes_options_to_the_listener(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The options for the listener are passed to it."""
    given: dict[str, Any] = {}
    wanted = {
        "mode": 0o640,
        "owner": "root",
        "group": 0,
        "backlog": 7,
        "credentials": True,
        "pidfds": True,
        "receive_descriptors": False,
        "replace": True,
    }

    async def open_listener(address: Path, **options: Any) -> UnixListener:
        given.update(options)
        return await open_unix_listener(address)

    monkeypatch.setattr("trio_unixconn._server.open_unix_listener", open_listener)
    async with trio.open_nursery() as nursery:
        server = await start(nursery, echo, path, **wanted)
        server.drain()
    assert given == wanted


async def test_serve_unix_path_in_use(path: Path) -> None:
    """A server whose path is in use raises, and the other server continues."""
    async with trio.open_nursery() as nursery:
        server = await start(nursery, echo, path)
        with pytest.raises(AddressInUseError):
            await serve_unix(echo, path)
        async with await open_unix_connection(path) as client:
            await ask(client)
        server.drain()


async def test_serve_unix_a_hundred_clients_with_backlog_0(path: Path) -> None:
    """A hundred clients that connect at once to a backlog of 0 are all served."""
    served = 0

    async def client() -> None:
        nonlocal served
        async with await open_unix_connection(path) as conn:
            await ask(conn)
            served += 1

    async with trio.open_nursery() as nursery:
        server = await start(nursery, echo, path, backlog=0)
        async with trio.open_nursery() as clients:
            for _ in range(100):
                clients.start_soon(client)
        server.drain()
    assert served == server.accepted == 100


async def test_open_unix_connection_cancelled_with_a_full_backlog(path: Path) -> None:
    """Clients that are cancelled while the queue is full leak nothing."""
    before = open_descriptors(os.getpid())
    async with await open_unix_listener(path, backlog=0), await open_unix_connection(path):
        with trio.move_on_after(0.1) as scope:
            async with trio.open_nursery() as clients:
                for _ in range(100):
                    clients.start_soon(open_unix_connection, path)
        assert scope.cancelled_caught
    assert open_descriptors(os.getpid()) == before
