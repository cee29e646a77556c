"""The accept loop of every server: it retries, backs off, and never stops the event loop."""

from __future__ import annotations

import ast
import errno
import gc
import os
import platform
import socket
import sys
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import MockClock, assert_checkpoints, wait_all_tasks_blocked

from tests._helpers.accept_errors import always, fail_accept
from tests._helpers.environment import environment
from tests._helpers.fds import free_descriptors
from tests._helpers.processes import program
from tests._helpers.requirements import required
from tests._helpers.waiting import until
from tests.core.test_closing import lingering_socket, release_lingering
from trio_unixconn import (
    ConnectionBusyError,
    ConnectionClosedError,
    PeerPolicy,
    UnixConnection,
    UnixListener,
    UnixServer,
    _accept,
    _closing,
    open_unix_connection,
    open_unix_listener,
    serve_unix,
)
from trio_unixconn._accept import (
    ACCEPT_RETRY_DELAY,
    MAX_BACKOFF,
    Acceptor,
    close_listening_socket,
)
from trio_unixconn.pool import serve_with_workers

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
async def listener(path: Path) -> AsyncIterator[UnixListener]:
    async with await open_unix_listener(path) as listener:
        yield listener


@asynccontextmanager
async def heartbeat() -> AsyncGenerator[list[int], None]:
    """Run a task that counts as long as the event loop runs."""
    beats: list[int] = []

    async def beat() -> None:
        while True:
            beats.append(len(beats))
            await trio.sleep(0.001)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(beat)
        yield beats
        nursery.cancel_scope.cancel()


################################################################
# accept
################################################################


async def test_accept_is_a_checkpoint(listener: UnixListener, path: Path) -> None:
    """accept() is a checkpoint if a connection is in the queue, too, and if it fails."""
    async with await open_unix_connection(path):
        with assert_checkpoints():
            conn = await listener.accept()
        await conn.aclose()
    async with await open_unix_connection(path):
        with free_descriptors(0), assert_checkpoints(), pytest.raises(OSError, match="Too many"):
            await listener.accept()
    await listener.aclose()
    with assert_checkpoints(), pytest.raises(ConnectionClosedError):
        await listener.accept()


async def test_accept_of_a_cancelled_task(listener: UnixListener, path: Path) -> None:
    """A cancelled accept() leaves the connection in the queue."""
    async with await open_unix_connection(path) as client:
        with trio.CancelScope() as scope:
            scope.cancel()
            await listener.accept()
        assert scope.cancelled_caught
        async with await listener.accept() as conn:
            await conn.send_all(b"x")
            assert await client.receive_some() == b"x"


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.EACCES])
async def test_accept_skips_aborted_connection(
    listener: UnixListener,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    """accept() retries at once, without a word in the log, and returns the next connection."""
    calls = fail_accept(monkeypatch, [number])
    async with await open_unix_connection(path), await listener.accept():
        assert calls == [number, 0]
    assert caplog.records == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.ENETDOWN])
async def test_accept_backs_off(
    listener: UnixListener,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: MockClock,
    number: int,
) -> None:
    """If accept(2) always fails, it is called a few times a second, and logged once."""
    async with await open_unix_connection(path):
        with pytest.MonkeyPatch.context() as patch:
            calls = fail_accept(patch, always(number))
            with trio.move_on_after(100):
                await listener.accept()
            assert 100 / MAX_BACKOFF - 10 < len(calls) < 100 / MAX_BACKOFF + 20
            (record,) = caplog.records
            expected = f"{path}: cannot accept connections ({os.strerror(number)}), retrying"
            assert record.getMessage() == expected
        calls = fail_accept(monkeypatch, [number] * 3)
        async with await listener.accept():
            assert calls == [number] * 3 + [0]
    # It is logged again after a connection was accepted.
    assert len(caplog.records) == 1
    fail_accept(monkeypatch, [number] * 3)
    async with await open_unix_connection(path), await listener.accept():
        assert len(caplog.records) == 2


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
async def test_accept_raises_permanent_error(
    listener: UnixListener, path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """An error that a retry cannot mend is raised."""
    fail_accept(monkeypatch, [number])
    with assert_checkpoints(), pytest.raises(OSError, match=os.strerror(number)):
        await listener.accept()


async def test_accept_without_a_free_descriptor(listener: UnixListener, path: Path) -> None:
    """accept() raises EMFILE, as trio.serve_listeners expects, and can be called again."""
    async with await open_unix_connection(path):
        with free_descriptors(0), pytest.raises(OSError, match="Too many open files") as caught:
            await listener.accept()
        assert caught.value.errno == errno.EMFILE
        async with await listener.accept():
            pass


async def test_accept_closes_what_cannot_become_a_connection(
    listener: UnixListener, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket that cannot become a UnixConnection is closed."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("trio_unixconn._listener.connection_of", fail)
    async with await open_unix_connection(path) as client:
        with pytest.raises(MemoryError):
            await listener.accept()
        assert await client.receive_some() == b""


async def test_accept_of_a_listener_that_is_shut_down(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listening socket that another process has shut down is an error, and not a busy loop."""
    for waits in (False, True):
        async with await open_unix_listener(path) as listener, trio.open_nursery() as nursery:
            shared = socket.socket(fileno=os.dup(listener.socket.fileno()))

            async def shut_down(shared: socket.socket = shared) -> None:
                await wait_all_tasks_blocked()
                shared.shutdown(socket.SHUT_RD)

            if waits:
                nursery.start_soon(shut_down)
            else:
                shared.shutdown(socket.SHUT_RD)
            with pytest.raises(OSError, match="was shut down, maybe by another process"):
                await listener.accept()
            shared.close()
    # Where poll(2) does not say so, it is not asked.
    monkeypatch.setattr("trio_unixconn._kernel.POLLRDHUP", None)
    one, two = socket.socketpair()
    with one, two:
        Acceptor(one, "name")._check_shut_down()


async def test_serve_unix_of_a_listener_that_is_shut_down(path: Path) -> None:
    """The server ends with the error."""
    listener = await open_unix_listener(path)
    with socket.socket(fileno=os.dup(listener.socket.fileno())) as shared:
        shared.shutdown(socket.SHUT_RD)
        with pytest.RaisesGroup(pytest.RaisesExc(OSError, match="was shut down")):
            await serve_unix(UnixConnection.aclose, listener)


async def test_accept_in_two_tasks(listener: UnixListener) -> None:
    """A second task that accepts gets ConnectionBusyError."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.accept)
        await wait_all_tasks_blocked()
        with pytest.raises(ConnectionBusyError):
            await listener.accept()
        nursery.cancel_scope.cancel()


def test_accept_pending_keeps_what_it_has_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error after some connections are accepted does not lose them; it is raised later."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        acceptor = Acceptor(server, "name")
        clients = [socket.create_connection(server.getsockname()) for _ in range(3)]
        for number in (errno.EINVAL, errno.EMFILE, errno.ENETDOWN):
            with pytest.MonkeyPatch.context() as patch:
                fail_accept(patch, [0, number, number])
                ((fd, _),), error = acceptor.accept_pending(10)
                os.close(fd)
                assert error is None
                if number == errno.EINVAL:
                    with pytest.raises(OSError, match="Invalid argument"):
                        acceptor.accept_pending(10)
                else:
                    accepted, error = acceptor.accept_pending(10)
                    assert accepted == []
                    assert error is not None
                    assert error.errno == number
        assert acceptor.accept_pending(10) == ([], None)
        for client in clients:
            client.close()


async def test_back_off_delays(autojump_clock: MockClock) -> None:
    """The first failure is not delayed; consecutive ones are, up to MAX_BACKOFF."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        acceptor = Acceptor(server, "name")
        delays: list[float] = []
        for _ in range(12):
            began = trio.current_time()
            await acceptor.back_off(OSError(errno.EPERM, "no"))
            delays.append(trio.current_time() - began)
        assert delays[:4] == pytest.approx([0, 0.001, 0.002, 0.004])
        assert delays[-1] == pytest.approx(MAX_BACKOFF)
        began = trio.current_time()
        await acceptor.back_off(OSError(errno.EMFILE, "no"))
        assert trio.current_time() - began == pytest.approx(ACCEPT_RETRY_DELAY)


@required(
    sys.platform == "linux" and platform.machine() in {"x86_64", "aarch64"}, "seccomp of Linux"
)
async def test_serve_unix_without_permission_to_accept(path: Path) -> None:
    """If a seccomp filter forbids accept4, that is logged once, and the program continues."""
    with trio.fail_after(60):
        done = await trio.run_process(
            program("no_accept", str(path)), capture_stdout=True, env=environment()
        )
    (message,) = ast.literal_eval(done.stdout.decode())
    assert message == f"{path}: cannot accept connections (Operation not permitted), retrying"


################################################################
# A listening socket that is made blocking
################################################################

MAKE_BLOCKING = "import os, sys; os.set_blocking(int(sys.argv[1]), True)"


async def make_blocking(listener: UnixListener | trio.SocketListener) -> None:
    """Let another process that shares the socket clear O_NONBLOCK."""
    number = listener.socket.fileno()
    await trio.run_process([sys.executable, "-c", MAKE_BLOCKING, str(number)], pass_fds=[number])
    assert os.get_blocking(number)


async def test_accept_of_a_socket_that_is_made_blocking(
    listener: UnixListener, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """accept() makes the socket non-blocking again, logs it once, and the event loop runs."""
    async with heartbeat() as beats:
        for _ in range(2):
            await make_blocking(listener)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listener.accept)
                before = len(beats)
                await until(lambda before=before: len(beats) > before + 5)  # type: ignore[misc]
                nursery.cancel_scope.cancel()
            assert not os.get_blocking(listener.socket.fileno())
        async with await open_unix_connection(path), await listener.accept():
            pass
    (record,) = caplog.records
    assert f"{path}: another process has made" in record.getMessage()


async def test_accept_that_loses_the_race_for_o_nonblock(
    listener: UnixListener, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that clears the flag again, just before accept(2), blocks for a tick at most."""
    await make_blocking(listener)
    assert listener._acceptor.accept_pending(1) == ([], None)
    fd = listener.socket.fileno()
    os.set_blocking(fd, True)
    monkeypatch.setattr(os, "get_blocking", lambda _: False)
    accepted, error = listener._acceptor.accept_pending(1)
    assert (accepted, error) == ([], None)
    # An accepted socket has no timeout.
    async with await open_unix_connection(path), await listener.accept() as conn:
        timeout = conn.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16)
        assert timeout == bytes(16)


async def test_accept_pending_of_a_socket_that_is_made_blocking_meanwhile(
    listener: UnixListener,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """accept_pending() checks the flag before each accept(2)."""
    raw = listener.socket._sock  # type: ignore[attr-defined]
    real = type(raw)._accept

    def accept(sock: socket.socket) -> object:
        accepted = real(sock)
        os.set_blocking(sock.fileno(), True)
        return accepted

    monkeypatch.setattr(type(raw), "_accept", accept, raising=False)
    async with await open_unix_connection(path), await open_unix_connection(path):
        # With the flag cleared, the third accept(2) would block for good.
        accepted, error = listener._acceptor.accept_pending(10)
        assert error is None
        assert len(accepted) == 2
        for fd, _ in accepted:
            os.close(fd)
    assert not os.get_blocking(raw.fileno())
    assert len(caplog.records) == 1


async def test_accept_pending_of_a_closed_socket(listener: UnixListener) -> None:
    """accept_pending() of a closed socket raises ConnectionClosedError, as accept() does."""
    await listener.aclose()
    with pytest.raises(ConnectionClosedError, match="this listener is closed"):
        listener._acceptor.accept_pending(10)


async def test_drain_of_a_server_whose_listener_is_closed(path: Path) -> None:
    """If the listener is closed while a drain waits for a slot, the error has the reason."""
    is_over = trio.Event()
    served = await open_unix_listener(path)

    async def handle(_: UnixConnection) -> None:
        await is_over.wait()

    async def serve(task_status: trio.TaskStatus[UnixServer]) -> None:
        with pytest.RaisesGroup(ConnectionClosedError):
            await serve_unix(handle, served, max_connections=1, task_status=task_status)

    async with served, trio.open_nursery() as nursery:
        server = await nursery.start(serve)
        async with await open_unix_connection(path):
            await until(lambda: server.connections == 1)
            server.drain()
            await wait_all_tasks_blocked()
            await served.aclose()
            is_over.set()


@pytest.mark.parametrize("missing", [False, True])
async def test_accept_of_a_tcp_socket_that_is_made_blocking(
    monkeypatch: pytest.MonkeyPatch, *, missing: bool
) -> None:
    """A TCP socket gets no timeout, which its connections would inherit."""
    if missing:
        monkeypatch.setattr("trio_unixconn._kernel.SO_RCVTIMEO", None)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        await make_blocking(listener)
        acceptor = Acceptor(listener.socket._sock, "name")  # type: ignore[attr-defined]
        assert acceptor.accept_pending(1) == ([], None)
        assert not os.get_blocking(listener.socket.fileno())
        timeout = listener.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16)
        assert timeout == bytes(16)


################################################################
# Closing
################################################################


def connect_with_lingering_socket(path: Path) -> socket.socket:
    """Connect, and send a socket whose close(2) blocks; nothing receives it."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    with lingering_socket(30) as lingering:
        socket.send_fds(client, [b"x"], [lingering.fileno()])
        # The message has the only reference, so that this close(2) does not block.
    return client


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait a second for what cannot be closed."""
    monkeypatch.setattr(_accept, "CLOSE_GRACE", 0.01)


@pytest.mark.usefixtures("patient")
async def test_aclose_with_an_unaccepted_connection(path: Path) -> None:
    """A lingering socket in the queue of an unaccepted connection does not stop the loop."""
    listener = await open_unix_listener(path)
    client = connect_with_lingering_socket(path)
    async with heartbeat() as beats:
        before = len(beats)
        await listener.aclose()
        await until(lambda: len(beats) > before + 5)
        # The closing thread is still in close(2).
        assert not _closing.wait_closed(0)
    client.close()
    release_lingering()


@pytest.mark.usefixtures("patient")
async def test_aclose_of_a_trio_listener_with_an_unaccepted_connection(path: Path) -> None:
    """The same holds for the trio.SocketListener of a server with workers."""
    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.bind(str(path))
    sock.listen()
    client = connect_with_lingering_socket(path)
    async with heartbeat() as beats:
        before = len(beats)
        await close_listening_socket(sock)
        await until(lambda: len(beats) > before + 5)
        assert not _closing.wait_closed(0)
    client.close()
    release_lingering()


async def test_aclose_wakes_accept(listener: UnixListener) -> None:
    """A task in accept() gets ConnectionClosedError."""

    async def accept() -> None:
        with pytest.raises(ConnectionClosedError):
            await listener.accept()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        await wait_all_tasks_blocked()
        await listener.aclose()


async def test_aclose_while_accept_backs_off(
    listener: UnixListener, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task in accept() that waits for a retry gets ConnectionClosedError, too."""
    calls = fail_accept(monkeypatch, always(errno.EPERM))

    async def accept() -> None:
        with pytest.raises(ConnectionClosedError):
            await listener.accept()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        await until(lambda: len(calls) > 5)
        await listener.aclose()


async def test_aclose_frees_the_name(autojump_clock: MockClock) -> None:
    """After aclose() an abstract name can be bound again, under a MockClock, too."""
    name = f"\0trio-unixconn-free-{os.getpid()}"
    for _ in range(20):
        async with await open_unix_listener(name) as listener:
            pass
        assert listener.socket.fileno() == -1
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(name)


async def test_aclose_with_a_waiting_connection_frees_the_name() -> None:
    """It also waits until the closing thread has closed what is in the queue."""
    name = f"\0trio-unixconn-free-{os.getpid()}"
    for _ in range(20):
        async with await open_unix_listener(name):
            client = await open_unix_connection(name)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(name)
        await client.aclose()


async def test_aclose_that_is_cancelled(path: Path) -> None:
    """A cancelled aclose() gives the socket to the closing thread nevertheless."""
    listener = await open_unix_listener(path)
    with trio.CancelScope() as scope:
        scope.cancel()
        await listener.aclose()
    assert scope.cancelled_caught
    assert listener.socket.fileno() == -1
    assert not path.exists()
    await listener.aclose()


async def test_close_listening_socket_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can be started to wait in, the socket is closed nevertheless."""
    closed: list[bool] = []

    async def no_thread(*_: object, **__: object) -> None:
        closed.append(True)
        raise RuntimeError("can't start new thread")

    def close_later(raw: socket.socket, then: object) -> None:
        raw.close()

    sock = trio.socket.socket(socket.AF_UNIX)
    monkeypatch.setattr(_closing, "close_socket", close_later)
    monkeypatch.setattr(trio.to_thread, "run_sync", no_thread)
    await close_listening_socket(sock)
    assert closed == [True]
    assert sock.fileno() == -1


################################################################
# Connections that a server closes
################################################################


@pytest.mark.parametrize("denied", [False, True])
async def test_serve_unix_closes_connections_with_lingering_sockets(
    path: Path, *, denied: bool
) -> None:
    """A denied peer, and one at the deadline of a drain, cannot stop the event loop."""

    async def handler(conn: UnixConnection) -> None:
        await trio.sleep_forever()

    policy = PeerPolicy(uids=[54321]) if denied else None
    async with heartbeat() as beats, trio.open_nursery() as nursery:
        server = await nursery.start(partial(serve_unix, handler, path, policy=policy))
        client = connect_with_lingering_socket(path)
        await until(lambda: server.denied if denied else server.connections)
        before = len(beats)
        server.drain(0)
        await server.drained.wait()
        await until(lambda: len(beats) > before + 5)
        assert not _closing.wait_closed(0)
    client.close()
    release_lingering()


async def test_open_unix_listener_that_fails_with_a_waiting_connection(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A take-over that fails after a client has connected cannot stop the event loop."""
    clients: list[socket.socket] = []
    rename = os.rename

    def fail(source: bytes, target: bytes, **options: int) -> None:
        rename(source, target, **options)
        clients.append(connect_with_lingering_socket(path))
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    async with await open_unix_listener(path):
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", fail)
            with pytest.raises(PermissionError):
                await open_unix_listener(path, replace=True)
        assert not _closing.wait_closed(0)
    clients.pop().close()
    release_lingering()


async def test_worker_server_closes_connections_with_lingering_sockets(path: Path) -> None:
    """A connection that no worker has accepted at the deadline of a drain cannot stop the loop."""
    listener = await open_unix_listener(path)
    async with heartbeat() as beats, trio.open_nursery() as nursery:
        server = await nursery.start(
            partial(
                serve_with_workers,
                "tests._helpers.server_handlers:hold",
                [listener],
                workers=1,
                max_in_flight=1,
                max_queue=1,
            )
        )
        held = await open_unix_connection(path)
        assert await held.receive_some() == b"held"
        client = connect_with_lingering_socket(path)
        await until(lambda: server.accepted == 2)
        server.drain(0)
        await until(lambda: server.statistics().queued == 0)
        before = len(beats)
        await until(lambda: len(beats) > before + 5)
        assert not _closing.wait_closed(0)
    await held.aclose()
    client.close()
    release_lingering()


@pytest.mark.filterwarnings("ignore:unclosed")
async def test_dropped_listener_with_an_unaccepted_connection(path: Path) -> None:
    """A listener that is collected while it is open does not stop the event loop."""
    listener = await open_unix_listener(path)
    client = connect_with_lingering_socket(path)
    async with heartbeat() as beats:
        before = len(beats)
        del listener
        gc.collect()
        await until(lambda: len(beats) > before + 5)
        assert not _closing.wait_closed(0)
    client.close()
    release_lingering()
