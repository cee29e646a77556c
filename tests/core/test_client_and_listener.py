"""open_unix_connection and UnixListener."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from tests._helpers.fds import free_descriptors
from trio_unixconn import (
    AddressInUseError,
    ConnectionBusyError,
    ConnectionClosedError,
    NotSupportedError,
    PeerDeniedError,
    PeerPolicy,
    UnixConnection,
    UnixListener,
    UnixSocketAddress,
    _bind,
    open_unix_connection,
    open_unix_listener,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.mark.parametrize("form", [str, os.fsencode, Path, UnixSocketAddress.path])
async def test_open_unix_listener_forms_of_a_path(path: Path, form: Any) -> None:
    """A path may be str, bytes, a Path or an address."""
    async with await open_unix_listener(form(path)) as listener:
        with assert_checkpoints():
            client = await open_unix_connection(form(path))
        with assert_checkpoints():
            server = await listener.accept()
        async with client, server:
            await client.send_fd(0)
            os.close(await server.receive_fd())
            assert listener.get_local_address().get_path() == str(path)
    assert not path.exists()


async def test_open_unix_listener_abstract_name() -> None:
    """A name in the abstract namespace works and leaves no file."""
    name = f"\0trio-unixconn-{os.getpid()}"
    async with (
        await open_unix_listener(name) as listener,
        await open_unix_connection(UnixSocketAddress.abstract(name[1:])) as client,
        await listener.accept() as server,
    ):
        assert listener.get_local_address().get_is_abstract()
        assert server.get_local_address() == client.get_remote_address()


@pytest.mark.parametrize("mode", [0o600, 0o666])
async def test_open_unix_listener_mode(path: Path, mode: int) -> None:
    """The path has the mode asked for, whatever the umask."""
    async with await open_unix_listener(path, mode=mode):
        assert stat.S_IMODE(path.stat().st_mode) == mode


async def test_listener_in_serve_listeners(path: Path) -> None:
    """Connections of trio.serve_listeners are UnixConnections, and nursery.start works."""

    async def handler(conn: UnixConnection) -> None:
        assert isinstance(conn, UnixConnection)
        async for data in conn:
            await conn.send_all(data.upper())

    listener = await open_unix_listener(path)
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, handler, [listener])
        for text in (b"one", b"two"):
            async with await open_unix_connection(path) as client:
                await client.send_all(text)
                assert await client.receive_some() == text.upper()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("options", [{}, {"credentials": True}, {"pidfds": True}])
async def test_open_unix_connection_credentials_and_pidfds(path: Path, options: Any) -> None:
    """With credentials=True or pidfds=True, every message has them, at both ends."""
    try:
        listener = await open_unix_listener(path, **options)
    except NotSupportedError:
        assert "pidfds" in options
        pytest.skip("this kernel has no SO_PASSPIDFD (Linux 6.5)")
    async with (
        listener,
        await open_unix_connection(path, **options) as client,
        await listener.accept() as server,
    ):
        for one, two in ((client, server), (server, client)) * 2:
            await one.send_all(b"x")
            with await two.receive_message(1) as message:
                assert (message.credentials is not None) == ("credentials" in options)
                assert (message.pidfd is not None) == ("pidfds" in options)
                if message.credentials is not None:
                    assert message.credentials.pid == os.getpid()


async def test_aclose(path: Path) -> None:
    """aclose() wakes accept(), removes the path, and may be called twice."""
    listener = await open_unix_listener(path)

    async def accept() -> None:
        with pytest.raises(ConnectionClosedError):
            await listener.accept()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        await wait_all_tasks_blocked()
        with assert_checkpoints():
            await listener.aclose()
    assert not path.exists()
    await listener.aclose()
    with pytest.raises(ConnectionClosedError):
        await listener.accept()
    with pytest.raises(ConnectionClosedError):
        listener.get_local_address()


async def test_aclose_after_the_path_was_removed(path: Path) -> None:
    """A path that another program has removed is not an error for aclose()."""
    listener = await open_unix_listener(path)
    path.unlink()
    await listener.aclose()
    assert listener.socket.fileno() == -1


async def test_aclose_after_the_path_was_taken(path: Path) -> None:
    """aclose() leaves what another program has put at the path since."""
    first = await open_unix_listener(path)
    path.unlink()
    async with await open_unix_listener(path):
        await first.aclose()
        assert path.exists()
        async with await open_unix_connection(path):
            pass
    assert not path.exists()


async def test_aclose_of_a_relative_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is removed even if the working directory has changed."""
    below = path.parent / "below"
    below.mkdir()
    (below / path.name).write_text("")
    monkeypatch.chdir(path.parent)
    async with await open_unix_listener(path.name):
        monkeypatch.chdir(below)
    assert not path.exists()
    assert (below / path.name).exists()


async def test_aclose_that_cannot_remove_the_path(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the path cannot be removed, aclose() raises, and the socket is closed."""
    listener = await open_unix_listener(path)

    def fail(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "unlink", fail)
    with pytest.raises(PermissionError):
        await listener.aclose()
    assert listener.socket.fileno() == -1


@pytest.mark.parametrize("address", ["", b"", UnixSocketAddress()])
async def test_open_unix_connection_rejects_anonymous_address(address: Any) -> None:
    """There is no way to connect to an anonymous address."""
    with pytest.raises(ValueError, match="cannot connect to an anonymous address"):
        await open_unix_connection(address)


async def test_open_unix_listener_path_that_exists(path: Path) -> None:
    """A path at which a file exists is EADDRINUSE with its name, and the file stays."""
    path.write_text("x")
    with pytest.raises(OSError, match="Address already in use") as caught:
        await open_unix_listener(path)
    assert caught.value.errno == errno.EADDRINUSE
    assert caught.value.filename == str(path)
    assert path.read_text() == "x"


async def test_open_unix_listener_that_fails_after_bind(path: Path) -> None:
    """What fails after bind removes the path again and leaks nothing."""
    with pytest.raises(OverflowError):
        await open_unix_listener(path, backlog=2**70)
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"mode": "600"}, TypeError, "mode must be an int such as 0o600, got str"),
        ({"mode": None}, TypeError, "mode must be an int such as 0o600, got NoneType"),
        ({"mode": True}, TypeError, "mode must be an int such as 0o600, got bool"),
        ({"mode": -1}, ValueError, "mode must be from 0 to 0o7777, got -0o1"),
        ({"mode": 0o10000}, ValueError, "mode must be from 0 to 0o7777, got 0o10000"),
        ({"backlog": "5"}, TypeError, "backlog must be an int or None, got str"),
        ({"backlog": -1}, ValueError, "backlog must be non-negative or None, got -1"),
        ({"owner": 1.0}, TypeError, "owner must be an id, a name or None, got float"),
        ({"group": True}, TypeError, "group must be an id, a name or None, got bool"),
        ({"owner": -1}, ValueError, "owner must be from 0 to 4294967294, got -1"),
        ({"group": 2**32 - 1}, ValueError, "group must be from 0 to 4294967294, got 4294967295"),
        ({"owner": "no such user"}, ValueError, "no such user"),
        ({"group": "no such group"}, ValueError, "no such group"),
        ({"policy": "root"}, TypeError, "policy must be a PeerPolicy or None, got str"),
    ],
)
async def test_open_unix_listener_rejects_wrong_arguments(
    path: Path, options: Any, error: type[Exception], text: str
) -> None:
    """A wrong argument is named, with what it is, before anything happens."""
    with pytest.raises(error, match=text):
        await open_unix_listener(path, **options)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("options", [{"owner": 0}, {"group": 0}])
@pytest.mark.parametrize("address", ["", "\0x"])
async def test_open_unix_listener_rejects_owner_of_an_abstract_name(
    address: str, options: Any
) -> None:
    """An abstract name has no owner and no group."""
    with pytest.raises(ValueError, match="owner and group require a path"):
        await open_unix_listener(address, **options)


async def test_accept_without_free_descriptors(path: Path) -> None:
    """Without free file descriptors accept() raises EMFILE, as trio.serve_listeners expects."""
    async with (
        await open_unix_listener(path) as listener,
        await open_unix_connection(path),
    ):
        with free_descriptors(0), pytest.raises(OSError, match="Too many open files") as caught:
            await listener.accept()
        assert caught.value.errno == errno.EMFILE
        async with await listener.accept():
            pass


async def test_accept_after_the_client_has_closed(path: Path) -> None:
    """A connection whose client has closed is accepted, with what the client sent."""
    async with await open_unix_listener(path) as listener:
        async with await open_unix_connection(path) as client:
            await client.send_fd(0)
        async with await listener.accept() as server:
            os.close(await server.receive_fd())
            assert await server.receive_some() == b""


async def test_listener_rejects_wrong_sockets(path: Path) -> None:
    """The constructor rejects what is not a listening Unix stream socket, and names it."""
    with pytest.raises(TypeError, match="expected a trio socket, got str"):
        UnixListener("x")  # type: ignore[arg-type]
    sock = trio.socket.socket(socket.AF_UNIX)
    with sock, pytest.raises(ValueError, match="does not listen"):
        UnixListener(sock)
    with pytest.raises(ValueError, match="is closed"):
        UnixListener(sock)
    inet = trio.socket.socket(socket.AF_INET)
    with inet, pytest.raises(ValueError, match="got an AF_INET socket"):
        UnixListener(inet)


async def test_open_unix_connection_without_a_server(path: Path) -> None:
    """Errors of open_unix_connection have the path."""
    with pytest.raises(FileNotFoundError) as missing:
        await open_unix_connection(path)
    assert missing.value.filename == str(path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    with pytest.raises(ConnectionRefusedError) as refused:
        await open_unix_connection(path)
    assert refused.value.filename == str(path)


@pytest.mark.parametrize("form", [str, os.fsencode, Path, UnixSocketAddress.path])
async def test_local_address_path(path: Path, form: Any) -> None:
    """A client with a local path is known by it, and the path stays after it has closed."""
    own = path.with_name("client")
    address = UnixSocketAddress.path(own)
    async with await open_unix_listener(path) as listener:
        for _ in range(2):
            # The second one replaces the socket of the first, which no process holds.
            async with (
                await open_unix_connection(path, local_address=form(own)) as client,
                await listener.accept() as server,
            ):
                assert client.get_local_address() == server.get_remote_address() == address
                assert client.socket.getsockname() == str(own)
                await client.send_all(b"x")
                assert await server.receive_some() == b"x"
            assert sorted(os.listdir(path.parent)) == ["client", "s"]


@pytest.mark.parametrize("local", ["", "abstract"])
async def test_local_address_abstract(path: Path, local: str) -> None:
    """A client can have an abstract name of its own, or one that the kernel chooses."""
    local = local and f"\0trio-unixconn-client-{os.getpid()}"
    async with (
        await open_unix_listener(path) as listener,
        await open_unix_connection(path, local_address=local) as client,
        await listener.accept() as server,
    ):
        name = client.get_local_address()
        assert name == server.get_remote_address()
        assert name.get_is_abstract()
        if local:
            assert name == UnixSocketAddress.from_any(local)


async def test_local_address_of_another_length(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local path may be relative, or too long for the address of a socket."""
    monkeypatch.chdir(path.parent)
    async with await open_unix_listener(path) as listener:
        for own in ("x" * 200, "client"):
            async with (
                await open_unix_connection(path, local_address=own) as client,
                await listener.accept(),
            ):
                assert client.get_local_address().get_path() == own
            os.unlink(own)


async def test_local_address_in_use(path: Path) -> None:
    """A local address that another client has, or where something else is, is not replaced."""
    own = path.with_name("client")
    async with await open_unix_listener(path):
        async with await open_unix_connection(path, local_address=own):
            with pytest.raises(AddressInUseError, match="a process holds this socket") as caught:
                await open_unix_connection(path, local_address=own)
            assert caught.value.filename == str(own)
            # Nor does a listener take it.
            with pytest.raises(AddressInUseError):
                await open_unix_listener(own)
        own.unlink()
        own.write_text("x")
        with pytest.raises(AddressInUseError, match="not a socket"):
            await open_unix_connection(path, local_address=own)
        assert own.read_text() == "x"


@pytest.mark.parametrize("fails", ["connect", "policy", "cancelled"])
async def test_local_address_when_connecting_fails(path: Path, fails: str) -> None:
    """If connecting fails, the local path is removed."""
    own = path.with_name("client")
    if fails == "connect":
        with pytest.raises(FileNotFoundError) as caught:
            await open_unix_connection(path, local_address=own)
        assert caught.value.filename == str(path)
        assert os.listdir(path.parent) == []
        return
    async with await open_unix_listener(path, backlog=0):
        if fails == "policy":
            with pytest.raises(PeerDeniedError):
                await open_unix_connection(
                    path, local_address=own, policy=PeerPolicy(uids={os.geteuid() + 1})
                )
        else:
            async with await open_unix_connection(path):
                with trio.move_on_after(0.02) as scope:
                    await open_unix_connection(path, local_address=own)
                assert scope.cancelled_caught
        assert os.listdir(path.parent) == ["s"]


async def test_local_address_that_cannot_be_removed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the local path cannot be removed after a failure, the error is that of connecting."""

    def unbind(_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(_bind, "unbind", unbind)
    with pytest.raises(FileNotFoundError):
        await open_unix_connection(path, local_address=path.with_name("client"))


async def test_local_address_rejects_wrong_arguments(path: Path) -> None:
    """Wrong arguments of open_unix_connection are named before anything happens."""
    bad: Any = 3
    with pytest.raises(TypeError, match=r"address must be .* got int"):
        await open_unix_connection(path, local_address=bad)
    with pytest.raises(TypeError, match="policy must be a PeerPolicy or None, got int"):
        await open_unix_connection(path, policy=bad)


@pytest.mark.parametrize("bad", ["a\0b", 3, None])
async def test_address_rejects_wrong_values(bad: Any) -> None:
    """What is not the address of a socket is rejected before anything happens."""
    with pytest.raises((ValueError, TypeError)):
        await open_unix_connection(bad)
    with pytest.raises((ValueError, TypeError)):
        await open_unix_listener(bad)


@pytest.mark.parametrize("length", [96, 107, 108, 120, 255])
async def test_open_unix_listener_long_path(path: Path, length: int) -> None:
    """A path that does not fit into the address of a socket works, to the last byte."""
    path = path.with_name("x" * length)
    async with (
        await open_unix_listener(path) as listener,
        await open_unix_connection(path) as client,
        await listener.accept() as server,
    ):
        assert client.get_remote_address() == server.get_local_address()
        assert server.get_local_address().get_path() == str(path)
        await client.send_all(b"x")
        assert await server.receive_some() == b"x"
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("length", range(100, 111))
async def test_open_unix_listener_path_at_the_limit(path: Path, length: int) -> None:
    """A path works if it, or its temporary name, is as long as fits, or a byte longer."""
    path = path.with_name("x" * (length - len(os.fsencode(path.parent)) - 1))
    assert len(os.fsencode(path)) == length
    async with await open_unix_listener(path), await open_unix_connection(path):
        pass


async def test_open_unix_listener_name_too_long(path: Path) -> None:
    """A name that no directory takes is ENAMETOOLONG with the limits, and nothing is created."""
    path = path.with_name("x" * 256)
    for use in (open_unix_listener, open_unix_connection):
        with pytest.raises(OSError, match=r"holds 107 bytes .* holds 255") as caught:
            await use(path)
        assert caught.value.errno == errno.ENAMETOOLONG
        assert caught.value.filename == str(path)
    for use in (open_unix_listener, open_unix_connection):
        with pytest.raises(OSError, match="abstract name has at most 107 bytes"):
            await use("\0" + "x" * 108)
    assert not list(path.parent.iterdir())


async def test_open_unix_connection_full_backlog(path: Path) -> None:
    """While the backlog is full it waits; what it returns is connected."""
    async with await open_unix_listener(path, backlog=0) as listener:
        clients: list[UnixConnection] = []

        async def connect() -> None:
            clients.append(await open_unix_connection(path))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(connect)
            servers = [await listener.accept() for _ in range(5)]
        for conn in clients + servers:
            await conn.send_all(b"x")
        for conn in clients + servers:
            async with conn:
                assert await conn.receive_some() == b"x"


async def test_open_unix_connection_backoff(
    path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """The backoff grows from 1 to 100 ms, and differs between clients."""
    real, pauses = trio.sleep, []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await real(seconds)

    monkeypatch.setattr(trio, "sleep", sleep)
    async with await open_unix_listener(path, backlog=0), await open_unix_connection(path):
        pauses.clear()
        with trio.move_on_after(2):
            await open_unix_connection(path)
    shares = [pause / min(0.001 * 2**i, 0.1) for i, pause in enumerate(pauses)]
    assert len(shares) > 15
    assert all(0.5 <= share <= 1 for share in shares)
    assert len(set(shares)) > 10


async def test_open_unix_connection_cancelled(path: Path) -> None:
    """While the backlog is full it can be cancelled, and leaks nothing."""
    async with await open_unix_listener(path, backlog=0), await open_unix_connection(path):
        with trio.move_on_after(0.02) as scope:
            await open_unix_connection(path)
        assert scope.cancelled_caught


def test_open_unix_listener_keeps_the_umask(path: Path) -> None:
    """A thread that creates files at the same time gets the umask of the process."""
    before = os.umask(0o027)
    seen: set[int] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            file = path.with_suffix(".probe")
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o777))
            seen.add(stat.S_IMODE(file.stat().st_mode))
            file.unlink()

    async def main() -> None:
        for _ in range(50):
            async with await open_unix_listener(path):
                pass

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        trio.run(main)
    finally:
        stop.set()
        thread.join()
        os.umask(before)
    assert seen == {0o750}


async def test_accept_in_two_tasks(path: Path) -> None:
    """A second task that accepts is told that the listener is busy."""
    async with await open_unix_listener(path) as listener, trio.open_nursery() as nursery:
        nursery.start_soon(listener.accept)
        await wait_all_tasks_blocked()
        with pytest.raises(ConnectionBusyError):
            await listener.accept()
        nursery.cancel_scope.cancel()
