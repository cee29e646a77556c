"""HAProxy's protocol, with partners that violate it."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests._helpers.waiting import until
from trio_unixconn import (
    DescriptorsTruncatedError,
    IOErrorEnum,
    PeerPolicy,
    TakeOverError,
    UnixConnection,
    open_unix_connection,
    open_unix_listener,
    serve_unix,
)
from trio_unixconn.handover import (
    HAProxyListeners,
    HAProxySocket,
    _haproxy,
    open_generation,
    serve_haproxy_listeners,
    take_haproxy_listeners,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

NAMES = b"\0\0\0\0\0\0"


def count(number: int) -> bytes:
    return struct.pack("=i", number)


@asynccontextmanager
async def fake_haproxy(
    directory: Path, answer: Callable[[UnixConnection], Awaitable[object]]
) -> AsyncGenerator[Path, None]:
    """A process that is asked for its sockets."""
    path = directory / "admin"

    async def handler(conn: UnixConnection) -> None:
        assert await conn.receive_some(100) == b"_getsocks\n"
        await answer(conn)

    async with trio.open_nursery() as nursery:
        await nursery.start(serve_unix, handler, path)
        yield path
        nursery.cancel_scope.cancel()


def listening(address: tuple[str, int] = ("127.0.0.1", 0)) -> socket.socket:
    return socket.create_server(address)


@pytest.mark.parametrize("chunk_size", [1, 65536])
async def test_take_haproxy_listeners_returns_what_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_size: int
) -> None:
    """Sockets, and the names that HAProxy has for them, even if they arrive in pieces."""
    monkeypatch.setattr(_haproxy, "_CHUNK_SIZE", chunk_size)
    with ExitStack() as stack:
        web = stack.enter_context(listening())
        datagram = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        unix.bind(str(tmp_path / "web.1234.tmp"))
        unix.listen()
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(b"\0trio".ljust(108, b"\0"))
        abstract.listen()

        async def answer(conn: UnixConnection) -> None:
            data = count(4)
            for each in data[:2], data[2:]:
                await conn.send_all(each)
            names = b"\x04blue\x02lo\0\0\0\0"
            await conn.send_message(names[:3], fds=[web])
            assert len(await conn.receive_some(100)) == 4
            await conn.send_all(names[3:])
            await conn.send_message(NAMES * 3, fds=[datagram, unix, abstract])

        port = web.getsockname()[1]
        async with fake_haproxy(tmp_path, answer) as path:
            with await take_haproxy_listeners(path) as taken:
                assert taken.sockets == (
                    HAProxySocket(("127.0.0.1", port), interface="lo", namespace="blue"),
                    HAProxySocket(str(tmp_path / "web")),
                    HAProxySocket("\0trio"),
                )
                assert taken.tcp(port, host="127.0.0.2") == []
                assert taken.tcp(port + 1) == []
                (listener,) = taken.tcp(port)
                assert taken.tcp(port) == []
                assert taken.unix(tmp_path / "other") is None
                assert "3, 2 not asked for" in repr(taken)
                found = taken.unix(tmp_path / "web", policy=PeerPolicy.same_user())
                assert found is not None
                assert found.get_local_address().get_path() == str(tmp_path / "web")
                await found.aclose()
    # HAProxy's own copies are closed, and this one accepts.
    async with listener, await trio.open_tcp_stream("127.0.0.1", port):
        await (await listener.accept()).aclose()


async def test_adopt_listeners_of_haproxy(tmp_path: Path) -> None:
    """A generation can adopt what HAProxy hands over, and hand it over again."""
    with ExitStack() as stack:
        web = stack.enter_context(listening())
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        unix.bind(str(tmp_path / "web.1.tmp"))
        unix.listen()
        os.rename(tmp_path / "web.1.tmp", tmp_path / "web")

        async def answer(conn: UnixConnection) -> None:
            await conn.send_message(count(2) + 2 * NAMES, fds=[web, unix])

        port = web.getsockname()[1]
        async with (
            fake_haproxy(tmp_path, answer) as path,
            open_generation(tmp_path / "upgrade", name="x") as gen,
            trio.open_nursery() as nursery,
        ):
            with await take_haproxy_listeners(path) as taken:
                found = taken.unix(tmp_path / "web")
                assert found is not None
                adopted = [gen.adopt("web", taken.tcp(port)[0]), gen.adopt("unix", found)]
            await nursery.start(serve_haproxy_listeners, tmp_path / "partner", adopted)
            with await take_haproxy_listeners(tmp_path / "partner") as again:
                assert [each.address for each in again.sockets] == [
                    ("127.0.0.1", port),
                    str(tmp_path / "web"),
                ]
            nursery.cancel_scope.cancel()
    # The path is HAProxy's.
    assert (tmp_path / "web").exists()


async def test_take_haproxy_listeners_ipv6(tmp_path: Path) -> None:
    """An IPv6 address can be written in any form."""
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as web:
        port = web.getsockname()[1]

        async def answer(conn: UnixConnection) -> None:
            await conn.send_message(count(1) + NAMES, fds=[web])

        async with fake_haproxy(tmp_path, answer) as path:
            with await take_haproxy_listeners(path) as taken:
                (listener,) = taken.tcp(port, host="0:0::0001")
                await listener.aclose()
                with pytest.raises(ValueError, match="localhost"):
                    taken.tcp(port, host="localhost")


async def send_nothing(conn: UnixConnection) -> None:
    await trio.lowlevel.checkpoint()


async def say_help(conn: UnixConnection) -> None:
    await conn.send_all(b"Unknown command, but maybe one of the following\n")


async def send_zero(conn: UnixConnection) -> None:
    await conn.send_all(count(0))


async def end_early(conn: UnixConnection) -> None:
    with listening() as one:
        await conn.send_message(count(2) + NAMES, fds=[one])


async def send_too_many(conn: UnixConnection) -> None:
    with listening() as one:
        await conn.send_message(count(1) + NAMES, fds=[one, one])


async def send_too_many_names(conn: UnixConnection) -> None:
    await conn.send_all(count(1) + NAMES * 2)


async def send_connected(conn: UnixConnection) -> None:
    one, two = socket.socketpair()
    with one, two:
        await conn.send_message(count(1) + NAMES, fds=[one])


async def send_paused(conn: UnixConnection) -> None:
    with listening() as one, socket.socket() as two:
        two.bind(("127.0.0.1", 0))
        await conn.send_message(count(2) + NAMES * 2, fds=[one, two])


async def send_vsock(conn: UnixConnection) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as one:
        await conn.send_message(count(1) + NAMES, fds=[one])


async def send_file(conn: UnixConnection) -> None:
    with listening() as one, open(os.devnull, "rb") as two:
        await conn.send_message(count(2) + NAMES * 2, fds=[one, two])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (send_nothing, "expose-fd listeners"),
        (say_help, "is this the socket of its command line"),
        (send_zero, "got 0"),
        (end_early, "expected 2 sockets of HAProxy, got 1"),
        (send_too_many, "expected 1 sockets of HAProxy, got more"),
        (send_too_many_names, "expected 1 sockets of HAProxy, got more"),
        (send_connected, "socket 0 of HAProxy: expected a listening socket"),
        (send_paused, "socket 1 of HAProxy: expected a listening socket"),
        (send_vsock, "socket 0 of HAProxy: expected a TCP or Unix socket"),
        (send_file, "socket 1 of HAProxy: got another kind of file"),
    ],
)
async def test_take_haproxy_listeners_rejects(
    tmp_path: Path, answer: Callable[[UnixConnection], Awaitable[object]], said: str
) -> None:
    """Anything but listening sockets is a TakeOverError; every file descriptor is closed."""
    async with fake_haproxy(tmp_path, answer) as path:
        with pytest.raises(TakeOverError, match=said):
            await take_haproxy_listeners(path)


async def test_take_haproxy_listeners_when_reset(tmp_path: Path) -> None:
    """A connection that is reset is a TakeOverError."""
    async with await open_unix_listener(tmp_path / "admin") as listener:

        async def accept_and_close() -> None:
            # With unread bytes, closing resets the connection.
            conn = await listener.accept()
            await trio.lowlevel.wait_readable(conn.socket)
            await conn.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_and_close)
            with pytest.raises(TakeOverError, match="has sent no sockets"):
                await take_haproxy_listeners(tmp_path / "admin")


async def test_take_haproxy_listeners_without_free_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no file descriptor is free, the error says so."""

    async def truncated(*_: object, **__: object) -> None:
        raise DescriptorsTruncatedError(b"", 0)

    async def answer(conn: UnixConnection) -> None:
        await conn.send_all(count(1))

    async with fake_haproxy(tmp_path, answer) as path:
        monkeypatch.setattr(UnixConnection, "receive_message", truncated)
        with pytest.raises(DescriptorsTruncatedError):
            await take_haproxy_listeners(path)


async def test_take_haproxy_listeners_asks_the_policy(tmp_path: Path) -> None:
    """A process that the policy does not admit is asked for nothing."""
    async with await open_unix_listener(tmp_path / "admin"):
        with pytest.raises(TakeOverError, match="policy does not admit") as caught:
            await take_haproxy_listeners(tmp_path / "admin", policy=PeerPolicy(uids=[12345]))
        assert caught.value.code == IOErrorEnum.PERMISSION_DENIED


async def test_serve_haproxy_listeners_gives_those_that_are_open(tmp_path: Path) -> None:
    """All of one generation, in messages of 252; a listener that was closed is not among them."""
    # Two messages. A process of an ordinary user can have 1,024 file descriptors.
    number = _haproxy.MAX_BATCH + 5
    (other,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    listeners = [await open_unix_listener(tmp_path / f"{each}.sock") for each in range(number)]
    async with (
        open_generation(tmp_path / "upgrade", name="x") as gen,
        trio.open_nursery() as nursery,
    ):
        web = await gen.listen_tcp("web", 0)
        admin = await gen.listen_unix("admin", tmp_path / "admin")
        server = await nursery.start(
            partial(serve_haproxy_listeners, mode=0o660),
            tmp_path / "partner",
            [web, admin, other, *listeners],
        )
        assert (tmp_path / "partner").stat().st_mode & 0o777 == 0o660
        await other.aclose()
        with await take_haproxy_listeners(tmp_path / "partner") as taken:
            assert len(taken.sockets) == number + 2
            port = web.socket.getsockname()[1]
            (again,) = taken.tcp(port)
            assert again.socket.getsockname() == web.socket.getsockname()
            await again.aclose()
        server.drain()
    for each in listeners:
        await each.aclose()
    # Another process serves these paths now.
    assert (tmp_path / "0.sock").exists()
    assert (tmp_path / "admin").exists()


async def test_serve_haproxy_listeners_says_the_interface(tmp_path: Path) -> None:
    """The interface that a socket is bound to is the one of the kernel."""
    (web,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with web, trio.open_nursery() as nursery:
        try:
            web.socket.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
        except PermissionError:
            pytest.skip("SO_BINDTODEVICE requires a privilege")
        await nursery.start(serve_haproxy_listeners, tmp_path / "partner", [web])
        with await take_haproxy_listeners(tmp_path / "partner") as taken:
            assert [each.interface for each in taken.sockets] == ["lo"]
        nursery.cancel_scope.cancel()


async def take_nothing(conn: UnixConnection) -> None:
    await conn.send_all(b"_getsocks\n")
    assert await conn.receive_some(4) == count(1)


async def acknowledge_nothing(conn: UnixConnection) -> None:
    await conn.send_all(b"_getsocks\n")
    received = 0
    while not received:
        with (await conn.receive_message(100)).fds as fds:
            received = len(fds)
    await conn.send_eof()
    assert not await conn.receive_some(1)


async def ask_something_else(conn: UnixConnection) -> None:
    await conn.send_all(b"show info\n")
    assert not await conn.receive_some(1)


async def ask_without_end(conn: UnixConnection) -> None:
    await conn.send_all(b"x" * 4096)
    with pytest.raises(trio.BrokenResourceError):
        while await conn.receive_some(1):
            pass  # pragma: no cover
        raise trio.BrokenResourceError


async def ask_and_end(conn: UnixConnection) -> None:
    await conn.send_all(b"_getso")
    await conn.send_eof()
    assert not await conn.receive_some(1)


async def send_file_descriptors(conn: UnixConnection) -> None:
    with listening() as one:
        try:
            await conn.send_message(b"_getsocks\n", fds=[one])
        except OSError:
            return
    # A kernel without SO_PASSRIGHTS.
    assert not (await conn.receive_message(100)).data  # pragma: no cover


@pytest.mark.parametrize(
    "ask",
    [
        take_nothing,
        acknowledge_nothing,
        ask_something_else,
        ask_without_end,
        ask_and_end,
        send_file_descriptors,
    ],
)
async def test_serve_haproxy_listeners_after_a_faulty_client(
    tmp_path: Path, ask: Callable[[UnixConnection], Awaitable[object]]
) -> None:
    """A client that does not take the sockets is logged, and the next one gets them."""
    async with await open_unix_listener(tmp_path / "web") as web, trio.open_nursery() as nursery:
        await nursery.start(serve_haproxy_listeners, tmp_path / "partner", [web])
        async with await open_unix_connection(tmp_path / "partner") as conn:
            await ask(conn)
        with await take_haproxy_listeners(tmp_path / "partner") as taken:
            assert [each.address for each in taken.sockets] == [str(tmp_path / "web")]
        nursery.cancel_scope.cancel()


async def test_serve_haproxy_listeners_when_a_client_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that neither asks nor takes is closed after a time."""
    monkeypatch.setattr(_haproxy, "CLIENT_TIMEOUT", 0.01)
    async with await open_unix_listener(tmp_path / "web") as web, trio.open_nursery() as nursery:
        await nursery.start(serve_haproxy_listeners, tmp_path / "partner", [web])
        async with await open_unix_connection(tmp_path / "partner") as conn:
            assert not await conn.receive_some(1)
        await until(lambda: "did not take them within" in caplog.text)
        nursery.cancel_scope.cancel()


async def test_serve_haproxy_listeners_when_all_are_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without an open listener, HAProxy is told so by the end of the connection."""
    async with await open_unix_listener(tmp_path / "web") as web, trio.open_nursery() as nursery:
        await nursery.start(serve_haproxy_listeners, tmp_path / "partner", [web])
        await web.aclose()
        with pytest.raises(TakeOverError, match="no sockets"):
            await take_haproxy_listeners(tmp_path / "partner")
        await until(lambda: "all listeners are closed" in caplog.text)
        nursery.cancel_scope.cancel()


async def test_serve_haproxy_listeners_denies_by_policy(tmp_path: Path) -> None:
    """A process that the policy does not admit gets nothing."""
    async with await open_unix_listener(tmp_path / "web") as web, trio.open_nursery() as nursery:
        server = await nursery.start(
            partial(serve_haproxy_listeners, policy=PeerPolicy(uids=[12345])),
            tmp_path / "partner",
            [web],
        )
        with pytest.raises(TakeOverError):
            await take_haproxy_listeners(tmp_path / "partner")
        assert server.denied == 1
        nursery.cancel_scope.cancel()


async def test_serve_haproxy_listeners_rejects_arguments(tmp_path: Path) -> None:
    """Anything but open listeners is rejected before anything happens."""
    unusable: Any = 3
    with pytest.raises(TypeError, match="expected a listener, got int"):
        await serve_haproxy_listeners(tmp_path / "partner", [unusable])
    with pytest.raises(ValueError, match="must not be empty"):
        await serve_haproxy_listeners(tmp_path / "partner", [])
    web = await open_unix_listener(tmp_path / "web")
    await web.aclose()
    with pytest.raises(ValueError, match="that is open"):
        await serve_haproxy_listeners(tmp_path / "partner", [web])
    assert not (tmp_path / "partner").exists()


async def test_serve_haproxy_listeners_ignores_the_signals_of_a_pause(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SIGTTOU and SIGTTIN do not stop the process meanwhile; a handler of the program stays."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTTIN, lambda number, _: heard.append(number))
    assert signal.getsignal(signal.SIGTTOU) is signal.SIG_DFL
    try:
        async with (
            await open_unix_listener(tmp_path / "web") as web,
            trio.open_nursery() as nursery,
        ):
            await nursery.start(serve_haproxy_listeners, tmp_path / "partner", [web])
            os.kill(os.getpid(), signal.SIGTTOU)
            os.kill(os.getpid(), signal.SIGTTIN)
            await until(lambda: heard)
            nursery.cancel_scope.cancel()
        assert "ignored SIGTTOU" in caplog.text
        assert signal.getsignal(signal.SIGTTOU) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTTIN, before)


async def test_serve_haproxy_listeners_of_two_partners_ignore_pauses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """While one of two partners is served, the signals of a pause are still ignored."""
    async with await open_unix_listener(tmp_path / "web") as web, trio.open_nursery() as outer:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_haproxy_listeners, tmp_path / "one", [web])
            await outer.start(serve_haproxy_listeners, tmp_path / "two", [web])
            nursery.cancel_scope.cancel()
        assert callable(signal.getsignal(signal.SIGTTOU))
        os.kill(os.getpid(), signal.SIGTTOU)
        await until(lambda: "ignored SIGTTOU" in caplog.text)
        outer.cancel_scope.cancel()
    assert signal.getsignal(signal.SIGTTOU) is signal.SIG_DFL


async def test_serve_haproxy_listeners_when_one_is_closed_between_batches(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The handover ends with a warning, not with a crash: its number of sockets was announced."""
    async with trio.open_nursery() as nursery:
        opened = [await open_unix_listener(tmp_path / f"{each}") for each in range(300)]
        await nursery.start(serve_haproxy_listeners, tmp_path / "partner", opened)
        async with await open_unix_connection(tmp_path / "partner") as conn:
            await conn.send_all(b"_getsocks\n")
            fds = 0
            while not fds:
                with await conn.receive_message(65536) as message:
                    fds = len(message.fds)
            await opened[-1].aclose()
            await conn.send_all(struct.pack("=i", fds))
            while (message := await conn.receive_message(65536)).data:
                message.close()
        await until(lambda: "a listener was closed meanwhile" in caplog.text)
        assert "Traceback" not in caplog.text
        nursery.cancel_scope.cancel()
    for each in opened:
        await each.aclose()


async def test_serve_haproxy_listeners_leaves_a_later_handler(tmp_path: Path) -> None:
    """A handler that the program installs meanwhile is still there at the end."""
    try:
        async with (
            await open_unix_listener(tmp_path / "web") as web,
            trio.open_nursery() as nursery,
        ):
            await nursery.start(serve_haproxy_listeners, tmp_path / "partner", [web])
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            nursery.cancel_scope.cancel()
        assert signal.getsignal(signal.SIGTTOU) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTTIN) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)


async def test_serve_haproxy_listeners_in_another_thread(tmp_path: Path) -> None:
    """Only the main thread can handle signals; in another one it serves all the same."""
    outcomes: list[object] = []

    async def serve() -> None:
        web = await open_unix_listener(tmp_path / "web")
        async with web, trio.open_nursery() as nursery:
            await nursery.start(serve_haproxy_listeners, tmp_path / "partner", [web])
            with await take_haproxy_listeners(tmp_path / "partner") as taken:
                outcomes.append(len(taken.sockets))
            nursery.cancel_scope.cancel()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    with trio.fail_after(30):
        await trio.to_thread.run_sync(thread.join)
    assert outcomes == [1]


def test_haproxy_listeners_close_twice() -> None:
    """Closing HAProxyListeners twice is allowed; the second time closes nothing."""
    with listening() as one:
        copy = one.dup()
        taken = HAProxyListeners([(HAProxySocket(("127.0.0.1", 1)), copy)])
        taken.close()
        assert copy.fileno() == -1
        taken.close()
    assert repr(taken) == "<HAProxyListeners: 1, 0 not asked for>"


def test_haproxy_listeners_tcp_when_haproxy_has_paused() -> None:
    """HAProxy can end the listening of a socket that it has handed over; it is closed then."""
    with listening() as one:
        address = one.getsockname()
        copies = [one.dup(), one.dup()]
        one.shutdown(socket.SHUT_RDWR)
        entries = [(HAProxySocket(address), each) for each in copies]
        with HAProxyListeners(entries) as taken:
            with pytest.raises(ValueError, match="listen"):
                taken.tcp(address[1])
            assert repr(taken) == "<HAProxyListeners: 2, 2 not asked for>"
        assert [each.fileno() for each in copies] == [-1, -1]
