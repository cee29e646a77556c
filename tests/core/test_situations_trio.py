"""Situations that trio's own tests of streams, listeners and servers have, met with ours.

trio.testing has its suites for streams as public functions; here they run on connections of
every origin. The other situations are those of trio's test_highlevel_socket.py,
test_highlevel_serve_listeners.py and test_highlevel_open_unix_stream.py.

| situation in trio's tests | ours |
| --- | --- |
| check_one_way_stream, check_two_way_stream, check_half_closeable_stream; TLS | below |
| SocketStream of a standard library socket, of datagrams; its options | test_connection |
| send_all that is split, and frees its buffer | test_connection |
| a peer that had closed before the stream was made | test_..._whose_peer_has_closed below |
| SocketListener of wrong sockets | test_listener_from_fd |
| accept: a checkpoint, even when closed; the names of both ends | below |
| a listener whose socket was closed underneath | test_accept_after_the_socket_... below |
| accept: ECONNABORTED, EPERM, EPROTO are passed over | test_client_and_listener |
| accept: EMFILE, ENFILE, ENOBUFS, ENOMEM come out, and it goes on | below |
| open_stream_to_socket_listener | below |
| serve_listeners: several listeners, closed streams, nursery for handlers | below |
| serve_listeners: an unknown error ends it, no free descriptors do not | below |
| open_unix_socket: wrong types, no file, str and Path | below, test_address |
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from trio_unixconn import (
    ConnectionClosedError,
    NotSupportedError,
    PeerPolicy,
    UnixConnection,
    UnixListener,
    connection_pair,
    open_unix_connection,
    open_unix_listener,
    serve_unix,
)
from trio_unixconn.testing import clog, limit_descriptors

if TYPE_CHECKING:
    from pathlib import Path

Pair = tuple[UnixConnection, UnixConnection]
Maker = Callable[[], Awaitable[Pair]]


################################################################
# trio's suites, on connections of every origin
################################################################


async def from_connection_pair() -> Pair:
    return connection_pair()


async def from_trio_socketpair() -> Pair:
    one, two = trio.socket.socketpair()
    return UnixConnection(one), UnixConnection(two)


async def from_stdlib_socketpair() -> Pair:
    one, two = socket.socketpair()
    return UnixConnection.from_stdlib_socket(one), UnixConnection.from_stdlib_socket(two)


async def from_fds() -> Pair:
    one, two = (each.detach() for each in socket.socketpair())
    return UnixConnection.from_fd(one), UnixConnection.from_fd(two)


async def without_descriptors() -> Pair:
    one, two = socket.socketpair()
    return (
        UnixConnection.from_stdlib_socket(one, receive_descriptors=False),
        UnixConnection.from_stdlib_socket(two, receive_descriptors=False),
    )


async def with_credentials() -> Pair:
    one, two = connection_pair()
    for each in (one, two):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return one, two


async def over_a_connection() -> Pair:
    """Both ends have crossed another connection."""
    one, two = connection_pair()
    async with one, two:
        for each in socket.socketpair():
            with each:
                await one.send_fd(each)
        first, second = await two.receive_stream(), await two.receive_stream()
    assert isinstance(first, UnixConnection)
    assert isinstance(second, UnixConnection)
    return first, second


async def from_a_listener(address: Any) -> Pair:
    async with await open_unix_listener(address) as listener:
        client = await open_unix_connection(listener.get_local_address())
        return client, await listener.accept()


PAIRS: dict[str, Maker] = {
    "connection_pair": from_connection_pair,
    "trio socketpair": from_trio_socketpair,
    "stdlib socketpair": from_stdlib_socketpair,
    "from_fd": from_fds,
    "receive_descriptors=False": without_descriptors,
    "SO_PASSCRED": with_credentials,
    "receive_stream": over_a_connection,
    "abstract": partial(from_a_listener, f"\0trio-unixconn-suite-{os.getpid()}"),
    "autobind": partial(from_a_listener, ""),
    "path": from_connection_pair,
}


@pytest.fixture(params=PAIRS)
def make(request: pytest.FixtureRequest, unix_socket_path: Path) -> Maker:
    if request.param == "path":
        return partial(from_a_listener, unix_socket_path)
    return PAIRS[request.param]


def clogged(make: Maker) -> Maker:
    async def make_clogged() -> Pair:
        one, two = await make()
        clog(one)
        clog(two)
        return one, two

    return make_clogged


def reversed_pair(make: Maker) -> Maker:
    async def make_reversed() -> Pair:
        one, two = await make()
        return two, one

    return make_reversed


async def test_connection_passes_check_half_closeable_stream(make: Maker) -> None:
    """Trio's largest suite passes on connections of every origin, with free and full buffers."""
    await trio.testing.check_half_closeable_stream(make, clogged(make))


async def test_connection_passes_check_two_way_stream(make: Maker) -> None:
    """Trio's suite for two ways passes on connections of every origin."""
    await trio.testing.check_two_way_stream(reversed_pair(make), clogged(reversed_pair(make)))


@pytest.mark.parametrize("order", [lambda make: make, reversed_pair], ids=["there", "back"])
async def test_connection_passes_check_one_way_stream(make: Maker, order: Any) -> None:
    """Trio's suite for one way passes in either direction."""
    await trio.testing.check_one_way_stream(order(make), clogged(order(make)))


@pytest.mark.parametrize(
    "options",
    [
        {"credentials": True},
        {"pidfds": True},
        {"credentials": True, "pidfds": True},
        {"receive_descriptors": False},
        {"policy": PeerPolicy.same_user()},
    ],
    ids="+".join,
)
async def test_connection_with_options_passes_check_half_closeable_stream(options: Any) -> None:
    """Trio's largest suite passes, whichever options both ends are opened with."""

    async def make() -> Pair:
        try:
            listener = await open_unix_listener("", **options)
        except NotSupportedError:
            pytest.skip("this kernel has no SO_PASSPIDFD (Linux 6.5)")
        async with listener:
            client = await open_unix_connection(listener.get_local_address(), **options)
            return client, await listener.accept()

    await trio.testing.check_half_closeable_stream(make, clogged(make))


async def test_connection_in_stapled_stream_passes_check_half_closeable_stream() -> None:
    """Two connections that are stapled, one for each direction, are a stream to trio."""

    async def make() -> tuple[Any, Any]:
        there, back = connection_pair(), connection_pair()
        return trio.StapledStream(there[0], back[1]), trio.StapledStream(back[0], there[1])

    await trio.testing.check_half_closeable_stream(make, None)


def tls_context(protocol: int) -> ssl.SSLContext:
    """Make a context that needs no certificates."""
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.set_ciphers("aNULL:@SECLEVEL=0")
    except ssl.SSLError:
        pytest.skip("this OpenSSL has no ciphers without certificates")
    return context


async def test_connection_in_ssl_stream_passes_check_two_way_stream(make: Maker) -> None:
    """Trio's suite passes on TLS over connections."""

    async def make_tls() -> tuple[Any, Any]:
        one, two = await make()
        return (
            trio.SSLStream(one, tls_context(ssl.PROTOCOL_TLS_CLIENT)),
            trio.SSLStream(two, tls_context(ssl.PROTOCOL_TLS_SERVER), server_side=True),
        )

    await trio.testing.check_two_way_stream(make_tls, None)


################################################################
# Streams
################################################################


@pytest.mark.parametrize("make", [UnixConnection, UnixConnection.from_stdlib_socket])
async def test_connection_whose_peer_has_closed(make: Any) -> None:
    """A connection made when the peer has sent and closed already reads to the end."""
    ours, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(theirs, [b"x"], [0])
        theirs.send(b"y")
    sock = trio.socket.from_stdlib_socket(ours) if make is UnixConnection else ours
    async with make(sock) as conn:
        os.close(await conn.receive_fd())
        assert await conn.receive_some(1) == b"y"
        assert await conn.receive_some(1) == b""


async def test_connection_from_trio_open_unix_socket(unix_socket_path: Path) -> None:
    """A stream that trio.open_unix_socket opens, by str or Path, becomes a connection."""
    async with await open_unix_listener(unix_socket_path) as listener:
        for name in (str(unix_socket_path), unix_socket_path, trio.Path(unix_socket_path)):
            stream = await trio.open_unix_socket(name)
            async with UnixConnection(stream.socket) as client, await listener.accept() as server:
                await client.send_fd(0)
                os.close(await server.receive_fd())
                await server.send_all(b"response")
                assert await client.receive_some() == b"response"


async def test_open_unix_connection_takes_a_trio_path(unix_socket_path: Path) -> None:
    """A trio.Path is a path, to the listener as to the client."""
    path = trio.Path(unix_socket_path)
    async with (
        await open_unix_listener(path) as listener,
        await open_unix_connection(path),
        await listener.accept() as server,
    ):
        assert server.get_local_address().get_path() == str(path)


################################################################
# Listeners
################################################################


def fail_accept(patch: pytest.MonkeyPatch, error: Exception) -> None:
    """Make accept(2) fail with this error."""

    def accept(sock: socket.socket) -> Any:
        raise error

    patch.setattr(socket.socket, "_accept", accept, raising=False)


@pytest.fixture(params=["path", "abstract"])
def name(request: pytest.FixtureRequest, unix_socket_path: Path) -> str:
    if request.param == "path":
        return str(unix_socket_path)
    return f"\0trio-unixconn-listener-{os.getpid()}"


async def test_accept_and_aclose_are_checkpoints(name: str) -> None:
    """accept() and aclose() are checkpoints, whether they succeed, repeat, or are refused."""
    listener = await open_unix_listener(name)
    async with await open_unix_connection(name) as client:
        with assert_checkpoints():
            server = await listener.accept()
        async with server:
            assert isinstance(server, trio.SocketStream)
            assert server.get_local_address() == listener.get_local_address()
            assert server.get_remote_address() == client.get_local_address()
    with assert_checkpoints():
        await listener.aclose()
    with assert_checkpoints():
        await listener.aclose()
    with assert_checkpoints(), pytest.raises(trio.ClosedResourceError):
        await listener.accept()


async def test_accept_after_the_socket_was_closed_underneath(name: str) -> None:
    """Closing the trio socket of a listener closes the listener."""
    listener = await open_unix_listener(name)
    listener.socket.close()
    with assert_checkpoints(), pytest.raises(ConnectionClosedError):
        await listener.accept()
    await listener.aclose()


async def test_accept_while_the_socket_is_closed_underneath(name: str) -> None:
    """A task that accepts is woken when another one closes the trio socket."""
    listener = await open_unix_listener(name)
    async with trio.open_nursery() as nursery:

        async def accept() -> None:
            with pytest.raises(ConnectionClosedError):
                await listener.accept()

        nursery.start_soon(accept)
        await wait_all_tasks_blocked()
        listener.socket.close()
    await listener.aclose()


async def test_accept_after_a_cancelled_accept(name: str) -> None:
    """An accept() that was cancelled has taken nothing; the next one has the connection."""
    async with await open_unix_listener(name) as listener:
        with trio.move_on_after(0) as scope:
            await listener.accept()
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.accept)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        async with await open_unix_connection(name) as client:
            with trio.move_on_after(0) as scope:
                await listener.accept()
            assert scope.cancelled_caught
            async with await listener.accept() as server:
                await client.send_all(b"x")
                assert await server.receive_some() == b"x"


@pytest.mark.parametrize(
    "number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EFAULT]
)
async def test_accept_raises_errors_that_are_not_about_one_connection(
    name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that is not about one connection comes out as it is, and the next accept works."""
    async with await open_unix_listener(name) as listener, await open_unix_connection(name):
        with monkeypatch.context() as patch:
            fail_accept(patch, OSError(number, os.strerror(number)))
            with assert_checkpoints(), pytest.raises(OSError, match=os.strerror(number)) as caught:
                await listener.accept()
            assert caught.value.errno == number
        await (await listener.accept()).aclose()


async def test_open_stream_to_socket_listener(name: str) -> None:
    """Trio's helper for tests connects to a listener at a path and at an abstract name."""
    async with await open_unix_listener(name) as listener:
        await check_open_stream_to_socket_listener(listener)


async def test_open_stream_to_socket_listener_with_autobind() -> None:
    """Trio's helper for tests connects to a listener whose name the kernel has chosen."""
    async with await open_unix_listener("") as listener:
        await check_open_stream_to_socket_listener(listener)


async def test_open_stream_to_socket_listener_with_bound_socket(tmp_path: Path) -> None:
    """It connects to a listener of a socket that was bound and listened by other means."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fsencode(tmp_path / "s"))
        sock.listen()
        async with UnixListener.from_fd(os.dup(sock.fileno())) as listener:
            await check_open_stream_to_socket_listener(listener)


async def check_open_stream_to_socket_listener(listener: Any) -> None:
    stream = await trio.testing.open_stream_to_socket_listener(listener)
    async with stream, await listener.accept() as server:
        await stream.send_all(b"x")
        assert await server.receive_some() == b"x"
        assert stream.socket.getpeername() == server.socket.getsockname()


################################################################
# trio.serve_listeners
################################################################


async def test_serve_listeners_serves_several_kinds(unix_socket_path: Path) -> None:
    """One server has a path, an abstract name and TCP; streams are closed after their handlers."""
    abstract = f"\0trio-unixconn-several-{os.getpid()}"
    tcp = await trio.open_tcp_listeners(0, host="127.0.0.1")
    unix = [await open_unix_listener(unix_socket_path), await open_unix_listener(abstract)]
    listeners: list[Any] = [*tcp, *unix]
    served: list[Any] = []

    async def handler(stream: trio.SocketStream) -> None:
        served.append(stream)
        await stream.send_all(b"123")
        assert await stream.receive_some(10) == b"456"

    async def client(stream: trio.abc.Stream) -> None:
        async with stream:
            assert await stream.receive_some(10) == b"123"
            await stream.send_all(b"456")
            assert await stream.receive_some(10) == b""

    async with trio.open_nursery() as nursery:
        assert await nursery.start(trio.serve_listeners, handler, listeners) == listeners
        async with trio.open_nursery() as clients:
            for _ in range(3):
                stream = await trio.testing.open_stream_to_socket_listener(tcp[0])
                clients.start_soon(client, stream)
                clients.start_soon(client, await open_unix_connection(unix_socket_path))
                clients.start_soon(client, await open_unix_connection(abstract))
        nursery.cancel_scope.cancel()
    assert len(served) == 9
    assert all(stream.socket.fileno() == -1 for stream in served)
    assert all(listener.socket.fileno() == -1 for listener in listeners)
    assert not unix_socket_path.exists()


async def test_serve_listeners_with_nursery_for_handlers(name: str) -> None:
    """Handlers run in the nursery that is given, and go on when accepting is cancelled."""
    listener = await open_unix_listener(name)
    clients = [await open_unix_connection(name) for _ in range(10)]

    async def handler(conn: UnixConnection) -> None:
        await conn.send_all(await conn.receive_some())

    async with trio.open_nursery() as handlers:
        async with trio.open_nursery() as nursery:
            serve = partial(trio.serve_listeners, handler_nursery=handlers)
            await nursery.start(serve, handler, [listener])
            await wait_all_tasks_blocked()
            assert len(handlers.child_tasks) == len(clients)
            nursery.cancel_scope.cancel()
        assert len(handlers.child_tasks) == len(clients)
        for client in clients:
            async with client:
                await client.send_all(b"x")
                assert await client.receive_some() == b"x"


@pytest.mark.parametrize("error", [KeyError("x"), OSError(errno.EFAULT, "bad address")], ids=repr)
async def test_serve_listeners_ends_with_an_unknown_error(
    name: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception out of accept() ends the server, and the listener is closed."""
    listener = await open_unix_listener(name)

    async def handler(conn: UnixConnection) -> None:
        raise AssertionError

    fail_accept(monkeypatch, error)
    with pytest.RaisesGroup(pytest.RaisesExc(check=lambda exc: exc is error)):
        await trio.serve_listeners(handler, [listener])
    assert listener.socket.fileno() == -1


@pytest.mark.parametrize("serve", ["serve_listeners", "serve_unix"])
async def test_serve_goes_on_when_descriptors_are_free_again(
    name: str, serve: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a free descriptor a server logs it and waits; the client in the queue is served."""
    listener = await open_unix_listener(name)
    client = await open_unix_connection(name)

    async def handler(conn: UnixConnection) -> None:
        async for data in conn:
            await conn.send_all(data)

    async with client, trio.open_nursery() as nursery:
        with limit_descriptors(0):
            if serve == "serve_listeners":
                await nursery.start(trio.serve_listeners, handler, [listener])
            else:
                await nursery.start(serve_unix, handler, listener)
            await client.send_all(b"x")
            with trio.fail_after(30):
                while not caplog.records:
                    await wait_all_tasks_blocked()
        assert os.strerror(errno.EMFILE) in caplog.text
        with trio.fail_after(30):
            assert await client.receive_some() == b"x"
        nursery.cancel_scope.cancel()
    # The server's own messages, not failures of this test.
    caplog.clear()
