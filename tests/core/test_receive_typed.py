"""receive_file, receive_socket and receive_stream: checked, and closed if they do not fit."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import stat
import tempfile
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests._helpers.descriptor_kinds import KIND, KINDS, of_kind, opened, pass_on
from tests._helpers.fds import look, some
from tests._helpers.fuse import hanging_file
from tests._helpers.peers import stdlib_peer
from tests._helpers.waiting import counted, until, until_sync
from trio_unixconn import (
    Cancellable,
    DescriptorKind,
    EndOfStreamError,
    OperationCancelled,
    UnexpectedControlMessageError,
    UnixConnection,
    UnsafeBufferError,
    WrongDescriptorKindError,
    _closing,
    _fdtypes,
    _file_thread,
    connection_pair,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path


################################################################
# Files
################################################################


@pytest.mark.parametrize(
    ("flags", "modes"),
    [
        (os.O_RDONLY, ["r", "rb", "rt"]),
        (os.O_WRONLY, ["w", "wb", "a", "ab"]),
        (os.O_RDWR, ["r", "rb", "rt", "w", "wb", "a", "ab", "r+b", "rb+", "w+b", "w+", "a+b"]),
    ],
)
@pytest.mark.parametrize("mode", ["r", "rb", "rt", "w", "wb", "a", "ab", "r+b", "rb+", "w+b", "w+",
                                  "a+b"])  # fmt: skip
async def test_receive_file_modes(flags: int, modes: list[str], mode: str, tmp_path: Path) -> None:
    """A file opens if its access mode fits the mode, and is rejected otherwise."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    fd = opened(path, flags)
    if mode not in modes:
        only = "writing" if flags == os.O_WRONLY else "reading"
        text = rf"expected a regular file open for .* \(mode .*\), got one open only for {only}$"
        with pytest.raises(WrongDescriptorKindError, match=text) as caught:
            await pass_on(fd, lambda conn: conn.receive_file(mode))
        assert caught.value.kind is KIND.REGULAR_FILE
        return
    with await pass_on(fd, lambda conn: conn.receive_file(mode)) as file:
        # Nothing is cut off: it is open already.
        assert path.read_bytes() == b"content"
        assert not os.get_inheritable(file.fileno())
        if "r" in mode:
            assert file.read() in (b"content", "content")
        else:
            file.write(b"X" if "b" in mode else "X")
    if "r" not in mode:
        expected = b"contentX" if mode.startswith("a") else b"Xontent"
        assert path.read_bytes() == expected


async def test_receive_file_from_another_process() -> None:
    """A file of another process is read by default, from the position that both share."""
    async with stdlib_peer() as peer:
        (theirs,) = await peer.ask("send", kinds=[["file"]])
        with await peer.conn.receive_file() as file:
            assert look(file.fileno())["identity"] == theirs["identity"]
            assert b"knows nothing but the standard library" in file.read(200)
        await peer.ask("send", kinds=[["tcp"]])
        with pytest.raises(WrongDescriptorKindError, match="expected a regular file, got a socket"):
            await peer.conn.receive_file()
        await peer.ask("eof")
        for receive in (
            peer.conn.receive_file,
            peer.conn.receive_socket,
            peer.conn.receive_stream,
            lambda: peer.conn.receive_buffer(9),
        ):
            with pytest.raises(EndOfStreamError):
                await receive()


async def test_receive_file_shares_the_position() -> None:
    """The file starts at the position of the open file that both have."""
    with tempfile.TemporaryFile() as file:
        file.write(b"content")
        file.flush()
        file.seek(3)
        with await pass_on(os.dup(file.fileno()), lambda conn: conn.receive_file()) as got:
            assert got.read() == b"tent"


@pytest.mark.parametrize("target", ["file", "directory", "link"])
async def test_receive_file_rejects_o_path(target: str, tmp_path: Path) -> None:
    """A descriptor opened with O_PATH is rejected, whatever kinds are accepted."""
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("file")
    fd = opened(tmp_path / target, os.O_PATH | os.O_NOFOLLOW)
    with pytest.raises(WrongDescriptorKindError, match="O_PATH") as caught:
        await pass_on(fd, lambda conn: conn.receive_file(kinds=list(KIND)))
    kinds = {"file": KIND.REGULAR_FILE, "directory": KIND.DIRECTORY, "link": KIND.SYMBOLIC_LINK}
    assert caught.value.kind is kinds[target]


@pytest.mark.parametrize("kind", KINDS)
async def test_receive_file_rejects_other_kinds(kind: DescriptorKind) -> None:
    """A kind that is not in kinds is rejected, and the error says which kind it is."""
    others = [each for each in KIND if each is not kind]
    with pytest.raises(WrongDescriptorKindError, match=f"got an? {kind.value}$") as caught:
        await pass_on(of_kind(kind), lambda conn: conn.receive_file(kinds=others))
    assert caught.value.kind is kind


@pytest.mark.parametrize("kind", [KIND.REGULAR_FILE, KIND.PIPE, KIND.CHARACTER_DEVICE])
async def test_receive_file_accepts_kinds(kind: DescriptorKind) -> None:
    """A kind that is in kinds is opened."""
    with await pass_on(of_kind(kind), lambda conn: conn.receive_file(kinds={kind})) as file:
        assert file.read() == b""


async def test_receive_file_rejects_a_directory() -> None:
    """Python cannot open a directory, even if kinds has it: an error, and it is closed."""
    with pytest.raises(WrongDescriptorKindError, match="cannot open this directory with mode"):
        await pass_on(of_kind(KIND.DIRECTORY), lambda c: c.receive_file(kinds=[KIND.DIRECTORY]))


@pytest.mark.parametrize("mode", ["r+b", "w+", "a+b"])
async def test_receive_file_closes_once_what_python_cannot_buffer(mode: str) -> None:
    """Python cannot open a socket for both directions: an error, and it is closed exactly once."""
    one, two = socket.socketpair()
    with one:
        with pytest.raises((ValueError, OSError)) as caught:
            await pass_on(two.detach(), lambda conn: conn.receive_file(mode, kinds=[KIND.SOCKET]))
        assert "Bad file descriptor" not in str(caught.value)
        assert one.recv(1) == b""


@pytest.mark.parametrize("bad", ["", "b", "rw", "x", "rbt", "rr", "rb+b", "U", "r+w", None, 5])
async def test_receive_file_rejects_other_modes(bad: Any) -> None:
    """A wrong mode is rejected before anything is received."""
    one, two = connection_pair()
    async with one, two:
        await one.send_fd(0)
        with pytest.raises((TypeError, ValueError), match="mode must be"):
            await two.receive_file(bad)
        os.close(await two.receive_fd())


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ((), ValueError),
        ([], ValueError),
        (iter(()), ValueError),
        ("regular file", TypeError),
        (b"x", TypeError),
        (["regular file"], TypeError),
        ([KIND.PIPE, None], TypeError),
        ([[]], TypeError),
        (KIND.PIPE, TypeError),
        (DescriptorKind, None),
        (5, TypeError),
        (None, TypeError),
    ],
)
async def test_receive_file_rejects_other_kinds_arguments(
    bad: Any, error: type[Exception] | None
) -> None:
    """Wrong kinds are rejected before anything is received, and the error names the argument."""
    one, two = connection_pair()
    async with one, two:
        with some(1) as fds:
            await one.send_fds(fds)
        if error is None:
            (await two.receive_file(kinds=bad)).close()
            return
        with pytest.raises(error, match=r"^kinds must "):
            await two.receive_file(kinds=bad)
        os.close(await two.receive_fd())


async def test_typed_receives_of_two_descriptors() -> None:
    """Two descriptors instead of one are the error of receive_fd."""
    one, two = connection_pair()
    async with one, two:
        for receive in (two.receive_file, two.receive_socket, two.receive_stream):
            await one.send_fds([0, 0])
            with pytest.raises(UnexpectedControlMessageError, match=r"2 (file )?descriptors"):
                await receive()


async def test_typed_receives_and_send_buffer_with_cancellable() -> None:
    """A Cancellable ends the wait of every typed receive and of send_buffer."""
    one, two = connection_pair()
    cancelled = Cancellable()
    cancelled.cancel()
    async with one, two:
        cancellable = Cancellable()

        async def wait(receive: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
            with pytest.raises(OperationCancelled):
                await receive(*arguments, cancellable=cancellable)

        calls: list[tuple[Any, ...]] = [
            (two.receive_file,),
            (two.receive_socket,),
            (two.receive_stream,),
            (two.receive_buffer, 9),
        ]
        for receive, *arguments in calls:
            cancellable = Cancellable()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait, receive, *arguments)
                await wait_all_tasks_blocked()
                cancellable.cancel()
        cancellable = cancelled
        await wait(one.send_buffer, b"x")
        await one.send_fd(0)
        os.close(await two.receive_fd())


################################################################
# Sockets and streams
################################################################


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (socket.AF_INET, socket.SOCK_STREAM),
        (socket.AF_INET, socket.SOCK_DGRAM),
        (socket.AF_INET6, socket.SOCK_STREAM),
        (socket.AF_UNIX, socket.SOCK_STREAM),
        (socket.AF_UNIX, socket.SOCK_DGRAM),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET),
    ],
)
async def test_receive_socket(family: socket.AddressFamily, kind: socket.SocketKind) -> None:
    """A trio socket of the right family and type, which does not block."""
    try:
        sent = socket.socket(family, kind)
    except OSError:
        pytest.skip("this machine has no such sockets")
    with await pass_on(sent.detach(), lambda conn: conn.receive_socket()) as sock:
        assert isinstance(sock, trio.socket.SocketType)
        assert (sock.family, sock.type) == (family, kind)
        assert not os.get_blocking(sock.fileno())
        assert not os.get_inheritable(sock.fileno())


async def test_receive_socket_of_a_listener() -> None:
    """A listening socket of another process can be accepted from."""
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[["listening"]])
        with await peer.conn.receive_socket() as listener:
            client = await trio.open_tcp_stream(*listener.getsockname())
            accepted, _ = await listener.accept()
            async with client, trio.SocketStream(accepted) as server:
                await client.send_all(b"x")
                assert await server.receive_some() == b"x"


@pytest.mark.parametrize("kind", [each for each in KINDS if each is not KIND.SOCKET])
@pytest.mark.parametrize("method", ["receive_socket", "receive_stream"])
async def test_receive_socket_and_stream_reject_other_kinds(
    method: str, kind: DescriptorKind
) -> None:
    """Any other file is rejected, and the error says which kind it is."""
    with pytest.raises(WrongDescriptorKindError, match=f"socket, got an? {kind.value}$") as caught:
        await pass_on(of_kind(kind), lambda conn: getattr(conn, method)())
    assert caught.value.kind is kind


async def test_receive_stream_of_a_tcp_socket() -> None:
    """A connected TCP socket is a trio.SocketStream on which both ends talk."""
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[["tcp"]])
        async with await peer.conn.receive_stream() as stream:
            # The other end is closed with the message, and so there is an end here.
            assert type(stream) is trio.SocketStream
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        with client:
            stream = await pass_on(accepted.detach(), lambda conn: conn.receive_stream())
            async with stream:
                client.sendall(b"there")
                assert await stream.receive_some() == b"there"
                await stream.send_all(b"back")
                assert client.recv(9) == b"back"


async def test_receive_stream_of_a_unix_socket() -> None:
    """A connected Unix socket is a UnixConnection, which passes descriptors itself."""
    one, two = socket.socketpair()
    connection = await pass_on(one.detach(), lambda conn: conn.receive_stream())
    assert isinstance(connection, UnixConnection)
    async with connection, UnixConnection.from_stdlib_socket(two) as other:
        await other.send_fd(0)
        os.close(await connection.receive_fd())


def unconnected(*arguments: Any) -> int:
    return socket.socket(*arguments).detach()


def connected_datagram() -> int:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    two.close()
    return one.detach()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: socket.create_server(("127.0.0.1", 0)).detach(),
            "expected a connected stream socket, got one",
        ),
        (lambda: unconnected(socket.AF_INET), "expected a connected stream socket, got one"),
        (lambda: unconnected(socket.AF_UNIX), "expected a connected stream socket, got one"),
        (connected_datagram, "got a SOCK_DGRAM socket$"),
        (lambda: unconnected(socket.AF_INET, socket.SOCK_DGRAM), "got a SOCK_DGRAM socket$"),
        (lambda: unconnected(socket.AF_UNIX, socket.SOCK_SEQPACKET), "SOCK_SEQPACKET"),
    ],
)
async def test_receive_stream_rejects_other_sockets(make: Callable[[], int], text: str) -> None:
    """Listening, unconnected and datagram sockets are rejected."""
    with pytest.raises(WrongDescriptorKindError, match=text) as caught:
        await pass_on(make(), lambda conn: conn.receive_stream())
    assert caught.value.kind is KIND.SOCKET


async def test_receive_stream_leaves_rejected_sockets_blocking() -> None:
    """A rejected socket still blocks for the sender, which shares it."""
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, two:
        with pytest.raises(WrongDescriptorKindError):
            await pass_on(os.dup(one.fileno()), lambda conn: conn.receive_stream())
        assert os.get_blocking(one.fileno())


async def test_receive_socket_and_stream_reject_o_path(tmp_path: Path) -> None:
    """The path of a socket, opened with O_PATH, is a socket that cannot be used."""
    one, two = connection_pair()
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
    fd = os.open(path, os.O_PATH)
    async with one, two:
        for receive in (two.receive_socket, two.receive_stream):
            await one.send_fd(fd)
            with pytest.raises(
                WrongDescriptorKindError,
                match="got one that cannot be used",
            ):
                await receive()
    os.close(fd)


@pytest.mark.parametrize("family", ["unix", "tcp"])
async def test_receive_stream_closes_once_if_the_stream_cannot_be_made(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the constructor closes the descriptor exactly once."""

    def fail(_: object) -> Any:
        raise ValueError("no stream")

    if family == "unix":
        one, two = socket.socketpair()
        monkeypatch.setitem(_fdtypes._stream_makers, socket.AF_UNIX, fail)
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            one = socket.create_connection(server.getsockname())
            two, _ = server.accept()
        monkeypatch.setattr(trio, "SocketStream", fail)
    with two:
        with pytest.raises(ValueError, match="no stream"):
            await pass_on(one.detach(), lambda conn: conn.receive_stream())
        assert _closing.wait_closed(30)
        assert two.recv(1) == b""


################################################################
# Files of a server that does not answer
################################################################


class Heartbeat:
    """A task that counts, as long as the event loop runs."""

    def __init__(self) -> None:
        self.count = 0

    async def run(self) -> None:
        while True:
            self.count += 1
            await trio.sleep(0.001)

    async def beats(self) -> None:
        """Wait until it has counted on."""
        before = self.count
        await until(lambda: self.count > before + 2)


async def test_receive_file_does_not_block_the_loop() -> None:
    """While a file server does not answer, other tasks run; when it answers, the file is there."""
    with hanging_file() as file:
        one, two = connection_pair()
        async with one, two, trio.open_nursery() as nursery:
            heartbeat = Heartbeat()
            nursery.start_soon(heartbeat.run)
            await one.send_fd(file.fd)
            got: list[Any] = []

            async def receive() -> None:
                got.append(await two.receive_file())

            nursery.start_soon(receive)
            await until(lambda: "getattr" in file.asked())
            await heartbeat.beats()
            assert got == []
            file.answer()
            await until(lambda: bool(got))
            assert (
                await trio.wrap_file(got[0]).read() == b"content of a file system in user space\n"
            )
            await trio.wrap_file(got[0]).aclose()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("by", ["cancel scope", "Cancellable"])
@pytest.mark.parametrize("then", ["answers", "dies"])
@pytest.mark.parametrize("when", ["in the grace period", "later"])
async def test_receive_file_cancelled_while_a_file_server_does_not_answer(
    by: str, then: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation ends the wait; the descriptor is closed once, whatever the server does."""
    if when == "later":
        monkeypatch.setattr(_file_thread, "CANCEL_GRACE", 0)
    one, two = connection_pair()
    async with one, two:
        with hanging_file() as file:
            await one.send_fd(file.fd)
            await one.send_fd(0)
            cancellable = Cancellable()
            with trio.fail_after(30), trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:

                    async def cancel() -> None:
                        await until(lambda: "getattr" in file.asked())
                        await wait_all_tasks_blocked()
                        (scope.cancel if by == "cancel scope" else cancellable.cancel)()

                    nursery.start_soon(cancel)
                    if by == "cancel scope":
                        await two.receive_file()
                    with pytest.raises(OperationCancelled):
                        await two.receive_file(cancellable=cancellable)
            # The connection is still in step.
            os.close(await two.receive_fd())
            assert _file_thread.thread_limiter().borrowed_tokens == 1
            if then == "answers":
                file.answer()
        await until(lambda: not _file_thread.thread_limiter().borrowed_tokens)


async def test_receive_file_returns_a_local_file_even_if_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation of a receive that has its descriptor is put off until it has returned."""
    monkeypatch.setattr(_file_thread, "CANCEL_GRACE", 30)
    (tmp_path / "file").write_bytes(b"content")
    one, two = connection_pair()
    async with one, two:
        with open(tmp_path / "file", "rb") as sent, trio.CancelScope() as scope:
            await one.send_fd(sent)

            async def receive() -> None:
                with await two.receive_file() as file:
                    got.append(file.read())

            got: list[bytes] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await until(lambda: _file_thread.thread_limiter().borrowed_tokens == 1 or bool(got))
                scope.cancel()
        assert got == [b"content"]


async def test_call_in_file_thread_returns_a_result_that_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A result that is there when the cancellation arrives is returned, not lost."""
    monkeypatch.setattr(_file_thread, "CANCEL_GRACE", 0)
    calls: list[_file_thread._Call[int]] = []
    real = _file_thread._Call.wait

    async def wait(call: _file_thread._Call[int]) -> None:
        calls.append(call)
        await real(call)

    monkeypatch.setattr(_file_thread._Call, "wait", wait)
    answered = threading.Event()
    discarded: list[int] = []
    got: list[int] = []

    def call() -> int:
        answered.wait(30)
        return 5

    async def work() -> None:
        got.append(await _file_thread.call_in_file_thread(call, discard=discarded.append))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        # Twice: the first time it is held back.
        await until(lambda: len(calls) == 2)
        await wait_all_tasks_blocked()
        answered.set()
        # The loop stands still until the thread has delivered it.
        until_sync(lambda: calls[0]._outcome is not None)
        nursery.cancel_scope.cancel()
    assert (got, discarded) == ([5], [])


async def test_receive_file_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all threads in use by servers that hang, a receive waits, and can be cancelled."""
    monkeypatch.setattr(_file_thread, "MAX_THREADS", 1)
    monkeypatch.setattr(_file_thread, "_limiter", trio.lowlevel.RunVar("test"))
    with hanging_file() as file:
        one, two = connection_pair()
        async with one, two:
            for _ in range(2):
                await one.send_fd(file.fd)
                with trio.fail_after(30), trio.move_on_after(0.01) as scope:
                    await two.receive_file()
                assert scope.cancelled_caught
            assert _file_thread.thread_limiter().borrowed_tokens == 1
            await until(lambda: "getattr" in file.asked())
            assert file.asked().count("getattr") == 1
            # trio's own threads are not used up.
            assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
            with some(1) as fds:
                await one.send_fds(fds)
            (await two.receive_file()).close()
            # Closed without a thread of its own.
            await until(lambda: "flush" in file.asked())
    await until(lambda: not _file_thread.thread_limiter().borrowed_tokens)


async def test_receive_file_without_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can be started, that is the error, and the descriptor is closed."""

    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_file_thread, "start_thread_soon", fail)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        await pass_on(opened(__file__, os.O_RDONLY), lambda conn: conn.receive_file())
    assert _file_thread.thread_limiter().borrowed_tokens == 0


async def test_call_in_file_thread_without_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can be started, the call is not made, and its turn is given back."""

    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_file_thread, "start_thread_soon", fail)
    called: list[int] = []
    with pytest.raises(RuntimeError, match="can't start new thread"):
        await _file_thread.call_in_file_thread(
            lambda: called.append(1), discard=_file_thread.ignore
        )
    assert called == []
    assert _file_thread.thread_limiter().borrowed_tokens == 0


async def test_receive_file_of_memory_uses_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memfd is opened at once, as no file server can have it."""
    calls = counted(monkeypatch, _file_thread, "start_thread_soon")
    with await pass_on(of_kind(KIND.REGULAR_FILE), lambda conn: conn.receive_file()):
        pass
    assert calls == []
    with await pass_on(opened(__file__, os.O_RDONLY), lambda conn: conn.receive_file()):
        pass
    assert calls == ["start_thread_soon"]


@pytest.mark.parametrize(
    ("receive", "error"),
    [
        (lambda conn: conn.receive_file(kinds=[KIND.PIPE]), "expected a pipe, got a regular file"),
        (lambda conn: conn.receive_file("w"), "got one open only for reading"),
        (lambda conn: conn.receive_socket(), "expected a socket, got a regular file"),
        (lambda conn: conn.receive_stream(), "expected a stream socket, got a regular file"),
        (lambda conn: conn.receive_buffer(9), "expected a sealed memfd, got a regular file"),
    ],
)
async def test_typed_receives_reject_without_asking_a_file_server(
    receive: Callable[[UnixConnection], Awaitable[Any]], error: str
) -> None:
    """A FUSE file is rejected while its server does not answer, and without asking it."""
    with hanging_file(os.O_RDONLY) as file:
        one, two = connection_pair()
        async with one, two:
            await one.send_fd(file.fd)
            with pytest.raises(WrongDescriptorKindError, match=error) as caught:
                await receive(two)
        assert caught.value.kind is KIND.REGULAR_FILE
        await until(lambda: bool(file.asked()))
        assert set(file.asked()) == {"flush"}


async def test_send_buffer_rejects_without_asking_a_file_server() -> None:
    """send_buffer of a FUSE file fails while its server does not answer, without asking it."""
    one, two = connection_pair()
    async with one, two:
        with hanging_file() as file:
            with pytest.raises(UnsafeBufferError, match="cannot seal this regular file"):
                await one.send_buffer(file.fd)
            assert file.asked() == []


async def test_call_in_file_thread_after_the_end_of_the_run() -> None:
    """A call that is still hanging when trio's run ends closes its result nevertheless."""

    async def main() -> None:
        one, two = connection_pair()
        async with one, two:
            await one.send_fd(file.fd)
            with trio.move_on_after(0.01):
                await two.receive_file()

    with hanging_file() as file:
        await trio.to_thread.run_sync(trio.run, main)
        file.answer()
        await until(lambda: "flush" in file.asked())


################################################################
# What a file is, without asking its server
################################################################


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["statx", "no statx", "statx fails"])
def test_identify_file_is_fstat(
    kind: DescriptorKind, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """identify_file() returns what fstat(2) returns, even where statx(2) is missing."""
    if way == "no statx":
        monkeypatch.setattr(_fdtypes, "_STATX", None)
    elif way == "statx fails":
        monkeypatch.setattr(_fdtypes, "_STATX", lambda *_: -1)
        ctypes.set_errno(errno.ENOSYS)
    fd = of_kind(kind)
    status = os.fstat(fd)
    expected = (stat.S_IFMT(status.st_mode), status.st_dev, status.st_ino)
    assert _fdtypes.identify_file(fd) == expected
    assert _fdtypes.kind_of(fd) is kind
    os.close(fd)
    for each in (fd, -1, -100):
        with pytest.raises(OSError) as caught:
            _fdtypes.identify_file(each)
        assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("error", [OSError, TypeError, AttributeError])
def test_identify_file_without_statx(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the C library has no statx, there is none to call."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", fail)
    assert _fdtypes._find_statx() is None


def test_identify_file_of_a_fuse_file() -> None:
    """identify_file(), kind_of() and is_memory() do not ask a file server."""
    with hanging_file() as file:
        assert _fdtypes.kind_of(file.fd) is KIND.REGULAR_FILE
        assert _fdtypes.identify_file(file.fd).inode == 2
        assert not _fdtypes.is_memory(file.fd)
        assert file.asked() == []
