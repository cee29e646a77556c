"""detach_endpoint and attach_socket: what can be submitted to a pool, and its next owner."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import os
import select
import socket
import ssl
import struct
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests._helpers import pool_handlers
from tests._helpers.fuse import file_with_failing_close, fuse_file
from tests._helpers.pool import at_rest, ends, pids
from tests._helpers.processes import open_descriptors
from tests._helpers.waiting import until
from trio_unixconn import (
    HandlerError,
    UnixConnection,
    WrongDescriptorKindError,
    _closing,
    _kernel,
    connection_pair,
)
from trio_unixconn._sockopts import raw_socket
from trio_unixconn.pool import _endpoints, open_worker_pool
from trio_unixconn.pool._endpoints import (
    EndpointKind,
    attach_socket,
    detach_endpoint,
    kind_of_passed,
    kind_of_received,
    pack_peer,
    peer_name,
    unpack_peer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_child_left", "unmeasured_processes")


def raw(pair: socket.socket) -> Any:
    return pair.detach()


def of_trio(pair: socket.socket) -> Any:
    return trio.socket.from_stdlib_socket(pair)


def stream(pair: socket.socket) -> Any:
    return trio.SocketStream(trio.socket.from_stdlib_socket(pair))


def itself(pair: socket.socket) -> Any:
    return pair


@pytest.mark.measured
async def test_submit_socket() -> None:
    """A socket can be submitted as any object that owns one, which is detached."""
    forms: tuple[Callable[[socket.socket], Any], ...]
    forms = (raw, itself, of_trio, stream, UnixConnection.from_stdlib_socket)
    async with open_worker_pool("tests._helpers.pool_handlers:tell", workers=1) as pool:
        for form in forms:
            client, theirs = ends()
            source: Any = form(theirs)
            await pool.submit(source)
            if isinstance(source, int):
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.fstat(source)
            else:
                assert getattr(source, "socket", source).fileno() == -1
            async with client.stream:
                # No copy is open here: the stream ends when the worker closes its own.
                assert (await client.told())["type"] == "UnixConnection"


@pytest.mark.parametrize("refuses", [None, "refuses"])
async def test_submit_connection_without_descriptors(refuses: str | None) -> None:
    """A connection that receives no file descriptors receives none in the worker either."""
    async with open_worker_pool("tests._helpers.pool_handlers:receive", workers=1) as pool:
        client, theirs = ends()
        answers: list[bytes] = []

        async def call() -> None:
            conn = UnixConnection.from_stdlib_socket(theirs, receive_descriptors=not refuses)
            answers.append(await pool.call(conn))

        async with client.stream, trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await client.line()
            # Where the kernel refuses it for the worker, nothing is sent.
            with suppress(PermissionError):
                socket.send_fds(raw_socket(client.stream.socket), [b"x"], [0])
            await client.stream.send_eof()
        assert answers == [b"refused" if refuses else b"received"]


async def test_submit_file_object(tmp_path: Path) -> None:
    """A file object is flushed and closed, and the worker goes on where it was."""
    path = tmp_path / "file"
    async with open_worker_pool("tests._helpers.pool_handlers:copy", workers=1) as pool:
        with open(path, "w") as text:
            text.write("in the buffer, ")
            await pool.submit(text, data=b"appended, ")
            assert text.closed
        # Otherwise the two jobs write at the same time, the first one not at the end of the file.
        await at_rest(pool)
        with open(path, "ab", buffering=0) as unbuffered:
            await pool.submit(unbuffered, data=b"and again")
            assert unbuffered.closed
        await at_rest(pool)
        with tempfile.NamedTemporaryFile(dir=tmp_path) as wrapped:
            wrapped.write(b"temporary")
            wrapped.seek(0)
            assert await pool.call(wrapped) == b"temporary"
        with open(path, "rb") as file:
            assert await pool.call(file) == b"in the buffer, appended, and again"


class Unclosable:
    """Has a file descriptor, and no close() method."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def fileno(self) -> int:
        return self.fd


class Failing(Unclosable):
    """Cannot be closed."""

    def close(self) -> None:
        raise OSError("cannot be closed")


@contextmanager
def unconnected(family: int, *, state: str) -> Generator[socket.socket, None, None]:
    """Make a stream socket that is not connected."""
    with socket.socket(family) as sock, ExitStack() as stack:
        _begin(sock, state, stack)
        yield sock


def _begin(sock: socket.socket, state: str, stack: ExitStack) -> None:
    family = sock.family
    if state == "bound" and family != socket.AF_UNIX:
        sock.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
    elif state == "bound":
        # Linux: autobind.
        sock.bind("")
    elif state == "refused":
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            assert sock.connect_ex(other.getsockname()) == errno.ECONNREFUSED
    elif state == "connecting":
        # The queue of the listener has one connection, and is full then.
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        stack.enter_context(socket.create_connection(listening.getsockname()))
        sock.setblocking(False)
        assert sock.connect_ex(listening.getsockname()) == errno.EINPROGRESS


UNCONNECTED = [
    (socket.AF_INET, "new"),
    (socket.AF_INET, "bound"),
    (socket.AF_INET, "refused"),
    (socket.AF_INET, "connecting"),
    (socket.AF_INET6, "new"),
    (socket.AF_UNIX, "new"),
    (socket.AF_UNIX, "bound"),
]


async def test_submit_rejects_unconnected_socket() -> None:
    """A socket that is not connected is rejected in every form, and still the caller's."""
    async with open_worker_pool("tests._helpers.pool_handlers:copy", workers=1) as pool:
        methods: tuple[Callable[[Any], Any], ...] = (pool.submit, pool.call)
        for method, (family, state) in itertools.product(methods, UNCONNECTED):
            with unconnected(family, state=state) as sock:
                sock.setblocking(False)
                sources: list[Any] = [sock, sock.fileno()]
                tried = trio.socket.from_stdlib_socket(sock.dup())
                sources.append(tried)
                if family != socket.AF_UNIX:
                    sources.append(trio.SocketStream(tried))
                for source in sources:
                    with pytest.raises(WrongDescriptorKindError, match="one that is not connected"):
                        await method(source)
                assert os.fstat(sock.fileno())
                assert os.fstat(tried.fileno())
                tried.close()
        assert pool.statistics().submitted == 0


def reset_connection(family: int) -> socket.socket:
    """Return a TCP connection that its peer has reset."""
    host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
    with socket.create_server((host, 0), family=family) as listening:
        client = socket.create_connection(listening.getsockname()[:2])
        accepted, _ = listening.accept()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    poll = select.poll()
    poll.register(accepted, select.POLLERR)
    assert poll.poll(30_000)
    return accepted


def shut_down_connection() -> socket.socket:
    """Return a TCP connection that was shut down, and that its peer has closed."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()),
    ):
        sock, _ = listening.accept()
        sock.shutdown(socket.SHUT_RDWR)
        return sock


async def test_submit_takes_connection_that_was_reset() -> None:
    """What a peer does to its connection is for the handler to find out, and no error of submit."""
    async with open_worker_pool("tests._helpers.pool_handlers:do", workers=1) as pool:
        for family in (socket.AF_INET, socket.AF_INET6):
            noticed = reset_connection(family)
            with pytest.raises(ConnectionResetError):
                noticed.recv(1)
            for sock in (noticed, reset_connection(family), shut_down_connection()):
                await pool.submit(sock)
                assert sock.fileno() == -1
        assert (await at_rest(pool)).handled == 6


async def test_submit_takes_unix_connection_whose_peer_has_gone() -> None:
    """A Unix connection stays connected when its peer has closed or reset it."""
    async with open_worker_pool("tests._helpers.pool_handlers:do", workers=1) as pool:
        for unread in (b"", b"x"):
            ours, theirs = socket.socketpair()
            ours.sendall(unread)
            theirs.close()
            await pool.submit(ours)
        assert (await at_rest(pool)).handled == 2


async def test_submit_without_pollrdhup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a reset cannot be told from no connection, the handler finds out."""
    monkeypatch.setattr(_kernel, "POLLRDHUP", None)
    async with open_worker_pool("tests._helpers.pool_handlers:do", workers=1) as pool:
        await pool.submit(socket.socket())
        assert (await at_rest(pool)).handled == 1


def test_is_unconnected_raises_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only ENOTCONN says that a socket is not connected."""

    class Broken(socket.socket):
        def getpeername(self) -> Any:
            raise OSError(errno.ENOBUFS, "no")

    with Broken() as sock, pytest.raises(OSError, match="no"):
        _endpoints._is_unconnected(sock)


async def test_submit_rejects_source(tmp_path: Path) -> None:
    """An object that no handler can get is rejected, and unchanged."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram,
        select.epoll() as epoll,
        open(os.devnull, "rb") as null,
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).wrap_socket(
            socket.socket(), server_side=True
        ) as encrypted,
    ):
        full = open("/dev/full", "wb")  # noqa: SIM115 - it cannot be closed without an error
        directory = os.open(tmp_path, os.O_RDONLY)
        path = os.open(os.devnull, os.O_PATH)
        full.write(b"x")
        closed = socket.socket()
        closed.close()
        gone, other = connection_pair()
        await gone.aclose()
        await other.aclose()
        cases: list[tuple[Any, type[Exception], str]] = [
            (listening, WrongDescriptorKindError, "got a listening one"),
            (
                trio.socket.from_stdlib_socket(listening),
                WrongDescriptorKindError,
                "got a listening one",
            ),
            (
                datagram,
                WrongDescriptorKindError,
                "expected a stream socket, got a SOCK_DGRAM socket",
            ),
            (encrypted, TypeError, "cannot submit an SSLSocket"),
            (epoll, WrongDescriptorKindError, "got an anonymous inode"),
            (directory, WrongDescriptorKindError, "got a directory"),
            (path, WrongDescriptorKindError, "opened with O_PATH"),
            (Unclosable(null.fileno()), TypeError, r"Unclosable has no close\(\)"),
            (Failing(null.fileno()), OSError, "cannot be closed"),
            (full, OSError, "No space left"),
            (closed, ValueError, "expected an open socket, got a closed one"),
            (gone, trio.ClosedResourceError, "closed"),
            (999_999, OSError, "is closed"),
            (-1, ValueError, "negative integer"),
            (True, TypeError, "expected a file descriptor"),
            ("text", TypeError, "expected a file descriptor"),
            (object(), TypeError, "expected a file descriptor"),
        ]
        async with open_worker_pool("tests._helpers.pool_handlers:copy", workers=1) as pool:
            for source, error, text in cases:
                with pytest.raises(error, match=text):
                    await pool.submit(source)
            with pytest.raises(TypeError, match="bytes"):
                await pool.submit(null, data="text")  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="at most 16777216 bytes, got 16777217"):
                await pool.submit(null, data=bytes(pool_handlers.LARGEST + 1))
            for to in (-1, 1):
                with pytest.raises(ValueError, match="the index of a worker, below 1"):
                    await pool.submit(null, worker=to)
            assert pool.statistics().submitted == 0
        for fd in (listening, datagram, encrypted, epoll, null, full, directory, path):
            assert os.fstat(fd if isinstance(fd, int) else fd.fileno())
        with suppress(OSError):
            full.close()
        os.close(directory)
        os.close(path)


@pytest.mark.measured
async def test_submit_leaks_no_fds() -> None:
    """After many jobs of all kinds both sides have as many file descriptors as before."""
    async with open_worker_pool("tests._helpers.pool_handlers:do", workers=1) as pool:
        await pool.call(data=b"pid")
        (pid,) = pids(pool)
        before, here = open_descriptors(pid), open_descriptors(os.getpid())
        for _ in range(50):
            for fd in os.open("/dev/null", os.O_RDWR), os.memfd_create("memory"):
                await pool.submit(fd)
            for data in b"", b"raise":
                client, theirs = ends()
                await pool.submit(theirs, data=data)
                await client.read()
                await client.end()
            with pytest.raises(HandlerError):
                await pool.call(os.dup(0), data=b"raise")
            read, write = os.pipe()
            assert await pool.call(read, data=b"detach") == b"detached"
            os.close(write)
            await pool.call(data=b"pid")
        gc.collect()
        await at_rest(pool)
        assert (open_descriptors(pid), open_descriptors(os.getpid())) == (before, here)


################################################################
# Files whose server does not answer
################################################################


@pytest.mark.measured
async def test_call_of_a_file_whose_server_does_not_answer() -> None:
    """The call can be cancelled, and meanwhile the same worker handles other jobs."""
    with fuse_file() as file:
        async with open_worker_pool("tests._helpers.pool_handlers:do", workers=1) as pool:
            # Not before: a process that is started closes its copy, and would wait.
            file.hang()
            file.forget()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.call, os.dup(file.fd))
                await until(lambda: "getattr" in file.asked())
                assert await pool.call(data=b"pid") == str(*pids(pool)).encode()
                nursery.cancel_scope.cancel()
            assert await pool.call(data=b"pid") == str(*pids(pool)).encode()
            # The end of the worker's process would wait for its close(2).
            file.answer()
            await at_rest(pool)


async def test_submit_of_a_file_object_whose_server_does_not_answer() -> None:
    """submit() closes a file object in a thread: other tasks run, and it can be cancelled."""
    with fuse_file() as file:
        async with open_worker_pool("tests._helpers.pool_handlers:do", workers=1) as pool:
            given = os.fdopen(os.dup(file.fd), "rb")
            file.hang()
            file.forget()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.submit, given)
                await until(lambda: "flush" in file.asked())
                assert await pool.call(data=b"pid")
                nursery.cancel_scope.cancel()
            file.answer()
            await until(lambda: given.closed)
            assert pool.statistics().submitted == 1
            # The duplicate for the worker is closed, too.
            await until(lambda: file.asked().count("flush") == 2)
    assert _closing.wait_closed(30)


@pytest.mark.measured
async def test_call_of_file_objects_that_the_handler_closes() -> None:
    """A device and a memfd are closed by the pool, and by the handler itself."""
    async with open_worker_pool("tests._helpers.pool_handlers:close_it", workers=1) as pool:
        memory = os.memfd_create("m")
        for fd in os.open(os.devnull, os.O_RDWR), memory:
            file = os.fdopen(fd, "r+b", buffering=0)
            assert await pool.call(file) == b"closed"
            assert file.closed
        await at_rest(pool)


async def test_call_writes_the_file_before_it_returns(tmp_path: Path) -> None:
    """A file that a handler has written to is flushed when the call returns."""
    async with open_worker_pool("tests._helpers.pool_handlers:copy", workers=1) as pool:
        for count in range(20):
            fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            await pool.call(fd, data=b"x")
            assert (tmp_path / "file").stat().st_size == count + 1


async def test_job_of_a_file_whose_close_fails() -> None:
    """An EIO of close(2), here or in the worker, fails no job."""
    with file_with_failing_close() as file:
        async with open_worker_pool("tests._helpers.pool_handlers:copy", workers=1) as pool:
            assert (await pool.call(os.dup(file.fd), data=b"x")).startswith(b"content")
            assert await pool.call(os.memfd_create("m"), data=b"x") == b""


async def test_detach_endpoint_of_a_socket_with_linger() -> None:
    """A TCP socket with SO_LINGER is of the kind that is closed in the closing thread."""
    kinds: list[EndpointKind] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for linger in (0, 0), (1, 0), (1, 30):
            with socket.create_connection(listener.getsockname()) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", *linger))
                fd, kind = await detach_endpoint(client)
                kinds.append(kind)
                os.close(fd)
    assert kinds == [EndpointKind.TCP, EndpointKind.TCP, EndpointKind.OTHER]


async def test_call_with_a_socket_with_linger() -> None:
    """The handler gets the same stream for it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
        async with open_worker_pool("tests._helpers.pool_handlers:tell", workers=1) as pool:
            told = json.loads(await pool.call(client))
    assert told["type"] == "SocketStream"


async def test_attach_socket_closes_what_is_no_stream() -> None:
    """A file descriptor of which no stream can be made is closed."""
    reader, writer = os.pipe()
    with pytest.raises((OSError, ValueError)):
        attach_socket(EndpointKind.UNIX_WITHOUT_DESCRIPTORS, reader)
    poll = select.poll()
    poll.register(writer, 0)
    # Nothing else has the other end.
    await until(lambda: poll.poll(0) == [(writer, select.POLLERR)])
    os.close(writer)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (EndpointKind.TCP, ("127.0.0.1", 54321)),
        (EndpointKind.TCP, ("0.0.0.0", 0)),
        (EndpointKind.TCP, ("255.255.255.255", 65535)),
        (EndpointKind.TCP6, ("::", 0, 0, 0)),
        (EndpointKind.TCP6, ("::ffff:10.0.0.1", 80, 0, 0)),
        (EndpointKind.TCP6, ("fe80::1", 65535, 2**20 - 1, 2**32 - 1)),
        (EndpointKind.UNIX, ""),
        (EndpointKind.UNIX, b"\0name"),
    ],
)
def test_pack_peer(kind: EndpointKind, name: Any) -> None:
    """An address is the same after it was packed."""
    assert unpack_peer(pack_peer(kind, name)) == name


def test_kind_of_passed() -> None:
    """A connection that is passed on is what it was, unless its handler has set SO_LINGER."""
    one, two = socket.socketpair()
    with one, two, socket.socket() as unconnected, open(os.devnull, "rb") as file:
        fd = one.fileno()
        assert kind_of_passed(EndpointKind.UNIX, fd) is EndpointKind.UNIX
        without = EndpointKind.UNIX_WITHOUT_DESCRIPTORS
        assert kind_of_passed(without, fd) is without
        assert kind_of_passed(EndpointKind.TCP, fd) is None
        for other in (unconnected.fileno(), file.fileno()):
            assert kind_of_passed(EndpointKind.TCP, other) is None
            assert kind_of_passed(without, other) is None
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            socket.create_connection(listener.getsockname()) as tcp,
        ):
            assert kind_of_passed(EndpointKind.TCP, tcp.fileno()) is EndpointKind.TCP
            assert kind_of_passed(without, tcp.fileno()) is None
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 1))
        assert kind_of_passed(EndpointKind.UNIX, fd) is EndpointKind.OTHER
        assert kind_of_passed(without, fd) is without


def test_kind_of_received() -> None:
    """What another generation passes on is a connection, or it is not taken."""
    one, two = socket.socketpair()
    with one, two, socket.socket() as unconnected, open(os.devnull, "rb") as file:
        fd = one.fileno()
        assert kind_of_received(fd, accepts_descriptors=True) is EndpointKind.UNIX
        without = EndpointKind.UNIX_WITHOUT_DESCRIPTORS
        assert kind_of_received(fd, accepts_descriptors=False) is without
        for other in (unconnected.fileno(), file.fileno()):
            assert kind_of_received(other, accepts_descriptors=True) is None


def test_peer_name() -> None:
    """It is that of accept(2); a connection without a peer has none, and stays open."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as client,
        socket.socket() as unconnected,
    ):
        server, name = listening.accept()
        with server:
            assert peer_name(server.fileno()) == name == client.getsockname()
        assert peer_name(unconnected.fileno()) is None
        assert unconnected.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
