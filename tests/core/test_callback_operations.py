"""The callback form of operations that Gio lacks: lists, messages, files, sockets, buffers."""

from __future__ import annotations

import fcntl
import gc
import io
import os
import socket
import tempfile
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests._helpers.fds import clog, free_descriptors, unclog
from tests._helpers.processes import open_descriptors
from tests._helpers.waiting import until
from trio_unixconn import (
    AsyncResult,
    CallbackConnection,
    Cancellable,
    ConnectionClosedError,
    Credentials,
    DescriptorKind,
    EndOfStreamError,
    OperationCancelled,
    UnexpectedControlMessageError,
    UnixConnection,
    UnixFDList,
    UnsafeBufferError,
    WrongDescriptorKindError,
    _closing,
    connection_pair,
    open_callback_adapter,
)

if TYPE_CHECKING:
    from collections.abc import Callable


class Calls(list[Any]):
    """Records every callback: source, result, user data, thread."""

    def __call__(self, source: CallbackConnection, result: AsyncResult, *user_data: Any) -> None:
        self.append((source, result, user_data, threading.get_ident()))

    def only(self) -> tuple[CallbackConnection, AsyncResult]:
        """Return source and result of the only call, which was in this thread."""
        assert len(self) == 1
        source, result, _, thread = self[0]
        assert thread == threading.get_ident()
        return source, result


async def call(conn: UnixConnection, name: str, *arguments: Any, **options: Any) -> Any:
    """Call name_async and then name_finish, and return what that gives."""
    calls = Calls()
    required = [*arguments]
    async with open_callback_adapter() as adapter:
        gio = adapter.wrap(conn)
        begin = getattr(gio, f"{name}_async")
        assert begin(*required, None, calls, "user", "data", **options) is None
        assert calls == []
    source, result = calls.only()
    assert source is gio is result.get_source_object()
    assert calls[0][2] == ("user", "data") == result.get_user_data()
    assert result.is_tagged(begin)
    finish = getattr(gio, f"{name}_finish")
    try:
        return finish(result)
    finally:
        with pytest.raises(ValueError, match="already finished"):
            finish(result)


def tcp() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        return client, server.accept()[0]


################################################################
# Values
################################################################


async def test_send_fds_async_and_receive_fds_async() -> None:
    """send_fds_finish returns a number, receive_fds_finish a list that owns them."""
    one, two = connection_pair()
    async with one, two:
        assert await call(one, "send_fds", [0, 0, 0]) == 3
        fds = await call(two, "receive_fds", 9)
        assert isinstance(fds, UnixFDList)
        with fds:
            assert len(fds) == 3
        assert await call(one, "send_fds", [0, 0], per_message=1) == 2
        os.close(await call(two, "receive_fd"))
        with await call(two, "receive_fds", 1) as fds:
            assert len(fds) == 1


async def test_send_message_async_and_receive_message_async() -> None:
    """send_message_finish returns None, receive_message_finish a message; options are keywords."""
    one, two = connection_pair()
    async with one, two:
        sent = await call(one, "send_message", b"x", fds=[0, 0], credentials=Credentials())
        assert sent is None
        with await call(two, "receive_message", 9, max_fds=2, credentials=True) as message:
            assert (message.data, len(message.fds)) == (b"x", 2)
            assert message.credentials == Credentials()
        await one.send_message(b"y", fds=[0, 0])
        with pytest.raises(UnexpectedControlMessageError, match="at most 1"):
            await call(two, "receive_message", 9, max_fds=1)
        assert await call(one, "send_message", b"") is None


async def test_send_fake_credentials_async() -> None:
    """send_fake_credentials_finish returns True."""
    one, two = connection_pair()
    async with one, two:
        fake = Credentials(os.getpid(), 54321, 54321) if os.geteuid() == 0 else Credentials()
        assert await call(one, "send_fake_credentials", fake) is True
        assert await call(two, "receive_credentials") == fake


async def test_receive_file_async() -> None:
    """receive_file_finish returns a file in the given mode, of one of the given kinds."""
    one, two = connection_pair()
    async with one, two:
        with tempfile.TemporaryFile() as file:
            file.write(b"content")
            file.seek(0)
            await one.send_fd(file)
            with await call(two, "receive_file", "r+") as got:
                assert got.read() == "content"
        read, write = os.pipe()
        os.close(write)
        await one.send_fd(read)
        os.close(read)
        with await call(two, "receive_file", "rb", kinds=[DescriptorKind.PIPE]) as got:
            assert got.read() == b""


async def test_receive_file_async_without_arguments() -> None:
    """receive_file_async needs no argument; the default is to read bytes."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two, open_callback_adapter() as adapter:
        gio = adapter.wrap(two)
        gio.receive_file_async(callback=calls)
        with tempfile.TemporaryFile() as file:
            await one.send_fd(file)
        await until(lambda: bool(calls))
        with gio.receive_file_finish(calls.only()[1]) as got:
            assert isinstance(got, io.BufferedReader)
            assert got.read() == b""


async def test_receive_socket_async() -> None:
    """receive_socket_finish returns a trio socket."""
    one, two = connection_pair()
    async with one, two:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sent:
            await one.send_fd(sent)
        with await call(two, "receive_socket") as sock:
            assert sock.type == socket.SOCK_DGRAM


async def test_receive_stream_async() -> None:
    """receive_stream_finish returns a stream, or a connection."""
    one, two = connection_pair()
    async with one, two:
        for pair, kind in ((tcp(), trio.SocketStream), (socket.socketpair(), UnixConnection)):
            with pair[0], pair[1]:
                await one.send_fd(pair[0])
                async with await call(two, "receive_stream") as stream:
                    assert type(stream) is kind
                    await stream.send_all(b"x")
                    assert pair[1].recv(1) == b"x"


async def test_send_buffer_async_and_receive_buffer_async() -> None:
    """send_buffer_finish returns True, receive_buffer_finish a read-only view."""
    one, two = connection_pair()
    async with one, two:
        assert await call(one, "send_buffer", b"content") is True
        view = await call(two, "receive_buffer", 7)
        assert (bytes(view), view.readonly) == (b"content", True)


################################################################
# Errors
################################################################

RECEIVES: list[tuple[str, list[Any]]] = [
    ("receive_fds", [9]),
    ("receive_file", ["rb"]),
    ("receive_socket", []),
    ("receive_stream", []),
    ("receive_buffer", [9]),
]
SENDS: list[tuple[str, list[Any]]] = [
    ("send_fds", [[0, 0]]),
    ("send_message", [b"x"]),
    ("send_buffer", [b"x"]),
    ("send_fake_credentials", [Credentials()]),
]


@pytest.mark.parametrize(("name", "arguments"), RECEIVES)
async def test_receive_finish_at_the_end_of_the_stream(name: str, arguments: list[Any]) -> None:
    """*_finish raises what the operation raised."""
    one, two = connection_pair()
    async with two:
        await one.aclose()
        with pytest.raises(EndOfStreamError):
            await call(two, name, *arguments)


@pytest.mark.parametrize(("name", "arguments"), [*RECEIVES, *SENDS, ("receive_message", [9])])
async def test_finish_of_a_closed_connection(name: str, arguments: list[Any]) -> None:
    """*_finish raises ConnectionClosedError if this side has closed the connection."""
    one, two = connection_pair()
    async with one, two:
        pass
    with pytest.raises(ConnectionClosedError):
        await call(one, name, *arguments)


@pytest.mark.parametrize("name", ["receive_file", "receive_socket", "receive_stream"])
async def test_receive_finish_of_the_wrong_kind(name: str) -> None:
    """Another kind of descriptor is an error in *_finish, and it is closed."""
    one, two = connection_pair()
    async with one, two:
        with open("/dev/null") as null:
            await one.send_fd(null)
        with pytest.raises(WrongDescriptorKindError) as caught:
            await call(two, name, *(["rb"] if name == "receive_file" else []))
        assert caught.value.kind is DescriptorKind.CHARACTER_DEVICE


async def test_receive_buffer_finish_of_an_unsafe_buffer() -> None:
    """An unsealed buffer is an error in *_finish, and it is closed."""
    one, two = connection_pair()
    async with one, two:
        fd = os.memfd_create("unsealed")
        await one.send_fd(fd)
        os.close(fd)
        with pytest.raises(UnsafeBufferError):
            await call(two, "receive_buffer", 9)


@pytest.mark.parametrize(("name", "arguments"), [*RECEIVES, ("receive_message", [9])])
@pytest.mark.parametrize("when", ["before", "while"])
async def test_receive_async_cancelled(name: str, arguments: list[Any], when: str) -> None:
    """A Cancellable ends the wait of a receive, and *_finish raises OperationCancelled."""
    one, two = connection_pair()
    calls = Calls()
    cancellable = Cancellable()
    async with one, two:
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(two)
            if when == "before":
                cancellable.cancel()
            getattr(gio, f"{name}_async")(*arguments, cancellable, calls)
            await wait_all_tasks_blocked()
            cancellable.cancel()
        with pytest.raises(OperationCancelled):
            getattr(gio, f"{name}_finish")(calls.only()[1])


@pytest.mark.parametrize(("name", "arguments"), SENDS)
async def test_send_async_cancelled(name: str, arguments: list[Any]) -> None:
    """A Cancellable ends a send that waits until the socket is writable; duplicates are closed."""
    one, two = connection_pair()
    calls = Calls()
    cancellable = Cancellable()
    async with one, two:
        clog(one)
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(one)
            getattr(gio, f"{name}_async")(*arguments, cancellable, calls)
            await wait_all_tasks_blocked()
            cancellable.cancel()
        with pytest.raises(OperationCancelled):
            getattr(gio, f"{name}_finish")(calls.only()[1])


async def test_finish_rejects_results_of_other_methods() -> None:
    """A result can be finished by its own *_finish only."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two:
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(one)
            gio.send_message_async(b"x", None, calls)
        _, result = calls.only()
        for finish in (gio.send_fds_finish, gio.receive_fds_finish, gio.send_buffer_finish):
            with pytest.raises(ValueError, match=r"got one of send_message_async\(\)"):
                finish(result)
        gio.send_message_finish(result)


################################################################
# Arguments are the caller's again when *_async returns
################################################################


async def test_send_message_async_duplicates_fds() -> None:
    """When send_message_async has returned, its fds may be closed and their numbers reused."""
    one, two = connection_pair()
    async with one, two:
        count = clog(one)
        calls = Calls()
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(one)
            fds = [os.memfd_create("right"), os.memfd_create("right")]
            inodes = [os.fstat(fd).st_ino for fd in fds]
            data = bytearray(b"data")
            gio.send_message_async(data, None, calls, fds=fds)
            data[:] = b"None"
            await wait_all_tasks_blocked()
            for fd in fds:
                os.close(fd)
            wrong = UnixFDList([os.memfd_create("wrong") for _ in fds])
            assert sorted(wrong) == sorted(fds)
            await unclog(two, count)
        wrong.close()
        with await two.receive_message(9) as message:
            assert message.data == b"data"
            assert [os.fstat(fd).st_ino for fd in message.fds] == inodes
        calls.only()[0].send_message_finish(calls.only()[1])


async def test_send_fds_async_duplicates_fds() -> None:
    """When send_fds_async has returned, its fds may be closed; an iterator is read before."""
    one, two = connection_pair()
    async with one, two:
        calls = Calls()
        async with open_callback_adapter() as adapter:
            fds = [os.memfd_create("right") for _ in range(5)]
            inodes = [os.fstat(fd).st_ino for fd in fds]
            adapter.wrap(one).send_fds_async(iter(fds), None, calls, per_message=2)
            for fd in fds:
                os.close(fd)
        got: list[int] = []
        while len(got) < 5:
            with await two.receive_fds(9) as received:
                got += [os.fstat(fd).st_ino for fd in received]
        assert got == inodes
        source, result = calls.only()
        assert source.send_fds_finish(result) == 5


async def test_send_buffer_async_copies() -> None:
    """When send_buffer_async has returned, a memfd may be closed, and a bytearray changed."""
    one, two = connection_pair()
    async with one, two:
        calls = Calls()
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(one)
            data = bytearray(b"right")
            gio.send_buffer_async(data, None, calls)
            data[:] = b"wrong"
            await wait_all_tasks_blocked()
            fd = os.memfd_create("mine", os.MFD_ALLOW_SEALING)
            os.write(fd, b"memfd")
            gio.send_buffer_async(fd, None, calls)
            assert fcntl.fcntl(fd, 1034) == 15
            os.close(fd)
        assert bytes(await two.receive_buffer(5)) == b"right"
        assert bytes(await two.receive_buffer(5)) == b"memfd"
        assert [gio.send_buffer_finish(result) for _, result, _, _ in calls] == [True, True]


################################################################
# Wrong arguments are rejected before *_async returns
################################################################


@pytest.mark.parametrize(
    ("begin", "error"),
    [
        (lambda gio, bad: gio.send_fds_async([0, bad], None, None), "descriptor"),
        (lambda gio, bad: gio.send_message_async(b"x", None, None, fds=[0, bad]), "descriptor"),
        (lambda gio, bad: gio.send_buffer_async(bad, None, None), "descriptor|memfd"),
    ],
)
@pytest.mark.parametrize("bad", [True, "0", None, -1, 1.0])
async def test_send_async_rejects_wrong_fds(
    begin: Callable[[CallbackConnection, Any], None], error: str, bad: Any
) -> None:
    """What is not a file descriptor is rejected before *_async returns, and nothing stays open."""
    one, two = connection_pair()
    async with one, two, open_callback_adapter() as adapter:
        with pytest.raises((TypeError, ValueError), match=error):
            begin(adapter.wrap(one), bad)
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


@pytest.mark.parametrize("name", ["send_fds", "send_message", "send_buffer"])
async def test_send_async_rejects_closed_fd(name: str) -> None:
    """A closed descriptor is EBADF before *_async returns, and no duplicate stays open."""
    one, two = connection_pair()
    async with one, two, open_callback_adapter() as adapter:
        gio = adapter.wrap(one)
        closed = os.dup(0)
        os.close(closed)
        with pytest.raises(OSError, match=r"closed|Bad file descriptor"):
            if name == "send_fds":
                gio.send_fds_async([0, closed], None, None)
            elif name == "send_message":
                gio.send_message_async(b"x", None, None, fds=[0, closed])
            else:
                gio.send_buffer_async(closed, None, None)


@pytest.mark.parametrize("bad", ["x", 5, None, 1.5, [1, 2]])
async def test_send_message_async_rejects_what_is_not_bytes(bad: Any) -> None:
    """What is not bytes is rejected before send_message_async returns."""
    one, two = connection_pair()
    async with one, two, open_callback_adapter() as adapter:
        with pytest.raises(TypeError):
            adapter.wrap(one).send_message_async(bad, None, None, fds=[0])
        await wait_all_tasks_blocked()
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


async def test_async_after_the_block() -> None:
    """After its block an adapter rejects operations, and none of their descriptors stays open."""
    one, two = connection_pair()
    async with one, two:
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(one)
        begins: list[Callable[[], None]] = [
            lambda: gio.send_fds_async([0, 0], None, None),
            lambda: gio.send_message_async(b"x", None, None, fds=[0]),
            lambda: gio.send_buffer_async(b"x", None, None),
            lambda: gio.receive_fds_async(9, None, None),
        ]
        for begin in begins:
            with pytest.raises(ConnectionClosedError, match="adapter is closed"):
                begin()


################################################################
# Results that are never finished
################################################################


async def send_one(conn: UnixConnection, name: str) -> None:
    """Send what a receive of that name accepts."""
    if name == "receive_fds":
        await conn.send_fds([0, 0])
    elif name == "receive_message":
        await conn.send_message(b"x", fds=[0, 0])
    elif name == "receive_buffer":
        await conn.send_buffer(b"x" * 5000)
    elif name == "receive_file":
        with tempfile.TemporaryFile() as file:
            await conn.send_fd(file)
    else:
        one, two = socket.socketpair() if name == "receive_stream" else tcp()
        with one, two:
            await conn.send_fd(one)


OWNERS = [
    ("receive_fds", [9]),
    ("receive_message", [9]),
    ("receive_file", ["rb"]),
    ("receive_socket", []),
    ("receive_stream", []),
]
BUFFER = [("receive_buffer", [5000])]


@pytest.mark.parametrize(("name", "arguments"), OWNERS)
async def test_result_never_finished(name: str, arguments: list[Any]) -> None:
    """A result that is never finished is closed when it is collected, with one warning."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two:
        async with open_callback_adapter() as adapter:
            await send_one(one, name)
            getattr(adapter.wrap(two), f"{name}_async")(*arguments, None, calls)
        before = open_descriptors(os.getpid())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            calls.clear()
            gc.collect()
        assert _closing.wait_closed(30)
        assert open_descriptors(os.getpid()) < before
        (warning,) = caught
        assert warning.category is ResourceWarning
        assert f"unfinished result of {name}_async" in str(warning.message)


async def test_result_of_receive_buffer_async_never_finished() -> None:
    """A mapping ends with the result that has it."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two:
        async with open_callback_adapter() as adapter:
            await send_one(one, "receive_buffer")
            adapter.wrap(two).receive_buffer_async(5000, None, calls)
        assert "/memfd:" in Path("/proc/self/maps").read_text()
        calls.clear()
        gc.collect()
        assert "/memfd:" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(("name", "arguments"), [*OWNERS, *BUFFER])
async def test_receive_async_without_a_callback(name: str, arguments: list[Any]) -> None:
    """Without a callback the operation runs, and its result is closed without a warning."""
    one, two = connection_pair()
    async with one, two:
        async with open_callback_adapter() as adapter:
            await send_one(one, name)
            getattr(adapter.wrap(two), f"{name}_async")(*arguments)
        gc.collect()
        # It did run: there is nothing left to receive.
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


@pytest.mark.parametrize(("name", "arguments"), [*OWNERS, *BUFFER])
async def test_receive_async_in_a_cancelled_block(name: str, arguments: list[Any]) -> None:
    """If the block is cancelled, the callback runs once."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two:
        with trio.CancelScope() as scope:
            async with open_callback_adapter() as adapter:
                getattr(adapter.wrap(two), f"{name}_async")(*arguments, None, calls)
                await wait_all_tasks_blocked()
                scope.cancel()
        source, result = calls.only()
        with pytest.raises(OperationCancelled):
            getattr(source, f"{name}_finish")(result)


async def test_send_fds_async_without_a_free_descriptor() -> None:
    """Without a free slot for the duplicates nothing is begun, and none is left."""
    one, two = connection_pair()
    async with one, two, open_callback_adapter() as adapter:
        with free_descriptors(1), pytest.raises(OSError, match="Too many open files"):
            adapter.wrap(one).send_fds_async([0, 1], None, None)
