"""The public types as users meet them. Read by the type checkers, never run."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import IO, Any

import trio
from typing_extensions import assert_type

from trio_unixconn import (
    AsyncResult,
    CallbackAdapter,
    CallbackConnection,
    Cancellable,
    Credentials,
    Datagram,
    DescriptorKind,
    IOErrorEnum,
    Message,
    OperationCancelled,
    PeerDeniedError,
    PeerGoneError,
    PeerIdentity,
    PeerPolicy,
    Seals,
    UnixConnection,
    UnixDatagramSocket,
    UnixFDList,
    UnixListener,
    UnixServer,
    UnixSocketAddress,
    connection_pair,
    open_callback_adapter,
    open_unix_connection,
    open_unix_datagram,
    open_unix_listener,
    serve_unix,
)
from trio_unixconn.pool import WorkerPool, WorkerServer, serve_agent_check, serve_statistics
from trio_unixconn.systemd import ServiceManager, inherited_fds, inherited_listeners
from trio_unixconn.testing import (
    FakeServiceManager,
    assert_no_fd_leak,
    clog,
    clogged_pair,
    limit_descriptors,
    open_descriptors,
    open_service_manager,
    unclog,
)


async def connection(conn: UnixConnection, cancellable: Cancellable) -> None:
    assert_type(await conn.send_fd(3), bool)
    assert_type(await conn.send_fd(socket.socket(), cancellable), bool)
    assert_type(await conn.send_fd(conn.socket), bool)
    with Path("x").open() as file:
        await conn.send_fd(file)
    await conn.send_fd(conn)
    await conn.send_fd(trio.SocketStream(conn.socket))
    await conn.send_fd(trio.SocketListener(conn.socket))
    assert_type(await conn.send_fds(map(open, ["x"])), int)
    await conn.send_fds([conn, conn.socket, 3])
    await conn.send_fds(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await conn.send_fd("3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(await conn.receive_fd(cancellable), int)
    assert_type(await conn.send_credentials(cancellable), bool)
    assert_type(await conn.receive_credentials(), Credentials)
    assert_type(conn.get_peer_credentials(), Credentials)
    assert_type(conn.get_local_address(), UnixSocketAddress)
    assert_type(await conn.receive_some(10), bytes)
    assert_type(conn.getsockopt(1, 2), int)
    assert_type(conn.getsockopt(1, 2, 3), bytes)
    assert_type(UnixConnection.from_fd(3), UnixConnection)
    assert_type(connection_pair(), tuple[UnixConnection, UnixConnection])
    stream: trio.abc.HalfCloseableStream = conn
    await stream.send_eof()


async def typed(conn: UnixConnection, cancellable: Cancellable) -> None:
    assert_type(await conn.receive_file("r", kinds={DescriptorKind.PIPE}), IO[Any])
    await conn.receive_file(kinds="pipe")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(await conn.receive_socket(cancellable=cancellable), trio.socket.SocketType)
    assert_type(await conn.receive_stream(), trio.abc.HalfCloseableStream)
    await conn.send_buffer(b"x")
    assert_type(await conn.receive_buffer(9), memoryview)
    assert_type(await conn.receive_buffer(9, seals=Seals.SHRINK | Seals.SEAL), memoryview)
    await conn.receive_buffer(9, seals=2)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with await conn.receive_fds(3) as fds:
        assert_type(fds, UnixFDList)
        assert_type(fds.append(3), int)
        assert_type(fds.append_take(3), int)
        assert_type(fds.peek(0), int)
        assert_type(fds.lookup(0), int)
        assert_type(fds.take_file(0), IO[Any])
    async with await conn.receive_fds(3) as fds:
        assert_type(fds, UnixFDList)
        assert_type(await fds.open_file(0, "rb"), IO[Any])
        await fds.aclose()
    async with await conn.receive_message(3) as message:
        assert_type(message, Message)
        await message.aclose()


async def serve(conn: UnixConnection) -> None:
    await conn.aclose()


async def listening() -> None:
    listener = await open_unix_listener(Path("x"), mode=0o600, backlog=5)
    assert_type(listener, UnixListener)
    assert_type(await listener.accept(), UnixConnection)
    assert_type(await open_unix_connection(b"x"), UnixConnection)
    assert_type(await open_unix_connection("x", local_address=Path("y")), UnixConnection)
    await open_unix_listener("", owner="root", group=0)
    await open_unix_listener("x", mode="600")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(listener.get_local_address().to_string(), str)
    await open_unix_connection(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await trio.serve_listeners(serve, [listener])


async def identity(conn: UnixConnection) -> None:
    assert_type(conn.open_peer_pidfd(), int | None)
    assert_type(conn.get_peer_groups(), tuple[int, ...])
    assert_type(conn.get_peer_security_context(), str | None)
    assert_type(await conn.receive_message(3, pidfd=True, credentials=True), Message)
    with conn.get_peer_identity() as peer:
        assert_type(peer, PeerIdentity)
        assert_type(peer.credentials, Credentials)
        assert_type(peer.groups, tuple[int, ...] | None)
        assert_type(peer.security_context, str | None)
        assert_type(peer.pidfd, int | None)
        assert_type(peer.gone, bool)
        assert_type(peer.is_alive(), bool)
        assert_type(peer.exe, str)
        assert_type(peer.cgroup, str)
        peer.gone = True  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    conn.get_peer_identity(with_pidfd=False).close()


async def is_fine(peer: PeerIdentity) -> bool:
    return peer.is_alive()


def is_not_async(peer: PeerIdentity) -> bool:
    return peer.is_alive()


async def policies() -> None:
    policy = PeerPolicy(uids=[1], gids={2}, users=("a",), groups=["b"], check=is_fine)
    assert_type(policy | PeerPolicy.same_user(), PeerPolicy)
    assert_type(policy & PeerPolicy.root(), PeerPolicy)
    PeerPolicy(uids=["a"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    PeerPolicy(check=is_not_async)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    policy | 3  # type: ignore[operator]  # pyright: ignore[reportOperatorIssue,reportUnusedExpression]
    listener = await open_unix_listener("x", policy=policy, receive_descriptors=False)
    assert_type(listener.denied, int)
    await open_unix_connection("x", policy=policy, credentials=True, pidfds=True)
    async with trio.open_nursery() as nursery:
        server: UnixServer = await nursery.start(serve_unix, serve, "x")
        assert_type(server.denied, int)
    assert_type(PeerDeniedError().code, IOErrorEnum)
    assert_type(PeerGoneError().code, IOErrorEnum)


def on_ready(source: CallbackConnection, result: AsyncResult) -> None:
    assert_type(source.receive_fd_finish(result), int)
    assert_type(source.receive_credentials_finish(result), Credentials)


async def callbacks(conn: UnixConnection) -> None:
    async with open_callback_adapter() as adapter:
        assert_type(adapter, CallbackAdapter)
        gio = adapter.wrap(conn)
        gio.receive_fd_async(None, on_ready)


async def cancelling(cancellable: Cancellable) -> None:
    with cancellable.scope() as scope:
        assert_type(scope, trio.CancelScope)
    assert_type(Cancellable.get_current(), Cancellable | None)
    assert_type(OperationCancelled("").code, IOErrorEnum)


def clogged_under_a_guard() -> int:
    # No return is missing: neither block swallows exceptions.
    with assert_no_fd_leak(), limit_descriptors(3):
        return clog(clogged_pair()[0])


async def testing_tools(conn: UnixConnection) -> None:
    assert_type(clogged_pair(), tuple[UnixConnection, UnixConnection])
    assert_type(open_descriptors(), dict[int, str])
    await unclog(conn, clog(conn))
    clog(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def datagrams(sock: UnixDatagramSocket) -> None:
    assert_type(await open_unix_datagram(Path("x"), credentials=True), UnixDatagramSocket)
    await open_unix_datagram()
    async with await sock.receive_message(100, max_fds=0) as message:
        assert_type(message, Datagram)
        assert_type(message.sender, UnixSocketAddress)
        await sock.send_message(message.data, message.sender, fds=[sock, 3])
    await sock.send_message(b"x", 3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def is_healthy() -> bool:
    return True


async def service() -> None:
    manager = ServiceManager.from_environ()
    await manager.ready("serving")
    await manager.main_pid(pidfd=3)
    await manager.store([3], "web", poll=False)
    async with manager.watchdog(is_healthy):
        pass
    manager.watchdog(lambda: True)  # type: ignore[arg-type, return-value]  # pyright: ignore[reportArgumentType]
    assert_type(inherited_fds("web"), dict[str, list[int]])
    assert_type(inherited_listeners(), dict[str, list[UnixListener | trio.SocketListener]])
    async with open_service_manager(watchdog_timeout=1, pids=[1]) as fake:
        assert_type(fake, FakeServiceManager)
        assert_type(fake.stored, dict[str, list[int]])


async def pool_checks(server: WorkerServer, pool: WorkerPool) -> None:
    await serve_statistics(server, "path", mode=0o600)
    await serve_statistics(pool, ("127.0.0.1", 9100))
    await serve_statistics(lambda: None, await trio.open_tcp_listeners(0))
    await serve_statistics(lambda: server, [await open_unix_listener("s")])
    await serve_statistics(server, ("127.0.0.1", 9100), mode=0o600)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    await serve_agent_check(lambda: pool, ("::1", 0))
    await serve_agent_check(server, "path")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    server.drain(5, delay=2.5)
    server.drain(5, 2.5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    assert_type(server.statistics().state, str)
