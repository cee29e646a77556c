"""Objects that own the file descriptors to send: kept while they are needed, and not longer."""

from __future__ import annotations

import gc
import io
import os
import socket
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import open_stream_to_socket_listener, wait_all_tasks_blocked

from tests._helpers.fds import clog, drain, free_descriptors, some, unclog
from tests._helpers.fuse import file_with_failing_close, hanging_file
from trio_unixconn import (
    Cancellable,
    ConnectionBrokenError,
    ConnectionClosedError,
    OperationCancelled,
    SendError,
    UnixConnection,
    UnixConnectionError,
    connection_pair,
    open_callback_adapter,
    open_unix_listener,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from pathlib import Path


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Files whose sizes are 0, 1, 2."""
    made = [tmp_path / str(size) for size in range(3)]
    for size, path in enumerate(made):
        path.write_bytes(b"x" * size)
    return made


def opened(path: Path) -> io.BufferedReader:
    return path.open("rb")


def as_map(paths: list[Path]) -> Iterable[io.BufferedReader]:
    return map(opened, paths)


def as_generator(paths: list[Path]) -> Iterator[io.BufferedReader]:
    return (opened(path) for path in paths)


def as_list(paths: list[Path]) -> list[io.BufferedReader]:
    return [opened(path) for path in paths]


FORMS = [as_map, as_generator, as_list]
# Files that are closed by being garbage collected, which is what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["send_fds", "send_fds per_message=1", "send_message"])
async def test_send_fds_of_objects_that_nothing_else_references(
    name: str, form: Callable[[list[Path]], Iterable[Any]], paths: list[Path], *, waits: bool
) -> None:
    """Files of a map, a generator or a list are sent, even if the send has to wait."""
    one, two = connection_pair()

    async def send() -> None:
        if name == "send_message":
            await one.send_message(b"\0", fds=form(paths))
        elif name == "send_fds":
            assert await one.send_fds(form(paths)) == 3
        else:
            assert await one.send_fds(form(paths), per_message=1) == 3

    async with one, two, trio.open_nursery() as nursery:
        count = clog(one) if waits else 0
        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        gc.collect()
        await unclog(two, count)
        assert await drain(two, 3) == [0, 1, 2]


async def test_send_fds_async_of_objects_that_nothing_else_references(paths: list[Path]) -> None:
    """The callback form duplicates file descriptors while their owners are still there."""
    one, two = connection_pair()
    async with one, two, open_callback_adapter() as adapter:
        wrapped = adapter.wrap(one)
        wrapped.send_fds_async(as_map(paths))
        assert await drain(two, 3) == [0, 1, 2]
        await wait_all_tasks_blocked()
        wrapped.send_message_async(b"\0", fds=as_generator(paths))
        await wait_all_tasks_blocked()
        wrapped.send_fd_async(opened(paths[1]))
        assert await drain(two, 4) == [0, 1, 2, 1]


################################################################
# What is not an iterable of file descriptors
################################################################


@pytest.mark.parametrize("bad", [0, None, b"\0\1", bytearray(b"\0"), memoryview(b"\0"), "01"])
@pytest.mark.parametrize("name", ["send_fds", "send_message", "send_fds_async"])
async def test_send_fds_rejects_what_is_no_iterable(name: str, bad: Any) -> None:
    """An int, or bytes, whose items are ints, are a TypeError that names the argument."""
    one, two = connection_pair()
    text = f"fds must be an iterable of file descriptors, got {type(bad).__name__}"
    async with one, two, open_callback_adapter() as adapter:
        with pytest.raises(TypeError, match=text):
            if name == "send_fds":
                await one.send_fds(bad)
            elif name == "send_message":
                await one.send_message(b"x", fds=bad)
            else:
                adapter.wrap(one).send_fds_async(bad)
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


async def test_send_fds_rejects_a_file_without_reading_it(tmp_path: Path) -> None:
    """A file in place of a list of files is a TypeError, and none of its lines is read."""
    one, two = connection_pair()
    path = tmp_path / "lines"
    path.write_text("1\n2\n")
    async with one, two:
        with open(path) as file:
            with pytest.raises(TypeError, match="got TextIOWrapper"):
                await one.send_fds(file)  # type: ignore[arg-type]
            assert file.read() == "1\n2\n"


async def test_send_fds_of_a_generator_that_raises() -> None:
    """What a generator raises, a TypeError included, is raised as it is; nothing is sent."""

    def broken(error: Exception) -> Generator[int]:
        yield 0
        raise error

    one, two = connection_pair()
    async with one, two:
        for error in (TypeError("its own"), KeyError("its own")):
            with pytest.raises(type(error), match="its own") as caught:
                await one.send_fds(broken(error))
            assert caught.value is error
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


async def test_send_fd_async_names_no_position() -> None:
    """A wrong file descriptor of send_fd_async is not described as one of a list."""
    one, two = connection_pair()
    async with one, two, open_callback_adapter() as adapter:
        with pytest.raises(TypeError, match=r"^expected a file descriptor .*, got str$"):
            adapter.wrap(one).send_fd_async("x")  # type: ignore[arg-type]


class StrangeError(ValueError):
    """A ValueError that cannot be made from a text alone."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one, two)


class Strange:
    def fileno(self) -> int:
        raise StrangeError(1, 2)


async def test_send_fds_of_an_object_with_a_strange_error() -> None:
    """Whatever class fileno() raises, the position is named."""
    one, two = connection_pair()
    async with one, two:
        with pytest.raises(ValueError, match=r"fds\[1\]: \(1, 2\)") as caught:
            await one.send_fds([0, Strange()])
        assert isinstance(caught.value.__cause__, StrangeError)


################################################################
# Objects that own a socket
################################################################


async def test_send_fd_of_objects_that_own_a_socket(tmp_path: Path) -> None:
    """A UnixConnection, a UnixListener, and trio's SocketStream and SocketListener can be sent."""
    one, two = connection_pair()
    (tcp,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with one, two, tcp, await open_unix_listener(tmp_path / "socket") as listener:
        stream = await open_stream_to_socket_listener(tcp)
        mine, far = connection_pair()
        async with stream, mine, far, await tcp.accept():
            for owner in (mine, stream, tcp, listener):
                await one.send_fd(owner)
                fd = await two.receive_fd()
                assert os.path.sameopenfile(fd, owner.socket.fileno())
                os.close(fd)
            assert await one.send_fds([mine, tcp, 0]) == 3
            assert len(await drain(two, 3)) == 3
            await one.send_message(b"x", fds=[stream])
            with await two.receive_message(1) as message:
                assert len(message.fds) == 1
            # They are all as they were.
            await mine.send_all(b"x")
            assert await far.receive_some() == b"x"


async def test_send_fd_of_a_closed_owner() -> None:
    """A connection that is closed is a ValueError with that reason; nothing is sent."""
    one, two = connection_pair()
    closed, far = connection_pair()
    await closed.aclose()
    await far.aclose()
    async with one, two:
        with pytest.raises(ValueError, match=r"\(-1\) from fileno\(\) of UnixConnection; it is"):
            await one.send_fd(closed)
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


class NoSocket:
    """An object whose attribute ``socket`` is another thing."""

    socket = 3


async def test_send_fd_of_an_object_without_fd() -> None:
    """An attribute that is not a trio socket is not taken for one."""
    one, two = connection_pair()
    async with one, two:
        with pytest.raises(TypeError, match=r"expected a file descriptor .* got NoSocket"):
            await one.send_fd(NoSocket())  # type: ignore[arg-type]


################################################################
# Files whose server hangs, or whose close fails
################################################################


@pytest.mark.parametrize("name", ["send_fd", "send_fds", "send_message"])
async def test_send_fds_does_not_ask_the_file(name: str) -> None:
    """A file whose server does not answer is sent: nothing waits for it, duplicates included."""
    with hanging_file() as file:
        one, two = connection_pair()
        async with one, two, trio.open_nursery() as nursery:
            count = clog(one)
            if name == "send_fd":
                nursery.start_soon(one.send_fd, file.fd)
            elif name == "send_fds":
                nursery.start_soon(lambda: one.send_fds([file.fd, 0], per_message=1))
            else:
                nursery.start_soon(lambda: one.send_message(b"\0", fds=[file.fd]))
            await wait_all_tasks_blocked()
            with trio.fail_after(30):
                await unclog(two, count)
                fd = await two.receive_fd()
                if name == "send_fds":
                    os.close(await two.receive_fd())
            # The trio thread is free; the duplicate is closed when the server is gone.
            assert set(file.asked()) <= {"flush"}
            nursery.start_soon(trio.to_thread.run_sync, os.close, fd)
            file.answer()


@pytest.mark.parametrize("name", ["send_fd", "send_fds", "send_message", "callback"])
async def test_send_fd_whose_duplicate_cannot_be_closed(name: str) -> None:
    """A close that fails with EIO does not turn a send that has succeeded into an error."""
    with file_with_failing_close() as file:
        one, two = connection_pair()
        async with one, two, trio.open_nursery() as nursery:
            count = clog(one)
            sent: list[Any] = []

            async def send() -> None:
                if name == "send_fd":
                    sent.append(await one.send_fd(file.fd))
                elif name == "send_fds":
                    sent.append(await one.send_fds([file.fd]))
                elif name == "send_message":
                    await one.send_message(b"\0", fds=[file.fd])
                    sent.append(True)
                else:
                    async with open_callback_adapter() as adapter:
                        adapter.wrap(one).send_fd_async(
                            file.fd,
                            None,
                            lambda wrapped, result: sent.append(wrapped.send_fd_finish(result)),
                        )

            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            await unclog(two, count)
            fd = await two.receive_fd()
            with pytest.raises(OSError, match="Input/output"):
                os.close(fd)
        assert sent == [1 if name == "send_fds" else True]


################################################################
# Not longer than they are needed
################################################################


@contextmanager
def no_gc() -> Generator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def closed_number() -> int:
    fd = os.dup(0)
    os.close(fd)
    return fd


async def fail_with_closed_fd(one: UnixConnection) -> None:
    await one.send_fds([0, closed_number()])


async def fail_before(one: UnixConnection) -> None:
    await one.send_fds([0, closed_number()], per_message=1)


async def fail_with_message(one: UnixConnection) -> None:
    await one.send_message(b"x", fds=[closed_number()])


async def fail_with_fd(one: UnixConnection) -> None:
    await one.send_fd(closed_number())


async def fail_with_duplicates(one: UnixConnection) -> None:
    clog(one)
    with free_descriptors(0):
        await one.send_fds([0, 1])


async def fail_with_cancellable(one: UnixConnection) -> None:
    clog(one)
    cancellable = Cancellable()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.testing.wait_all_tasks_blocked)
        cancellable.cancel()
    await one.send_fds([0], cancellable=cancellable)


async def fail_with_shutdown(one: UnixConnection) -> None:
    one.socket._sock.shutdown(socket.SHUT_WR)  # type: ignore[attr-defined]
    await one.send_fds([0])


async def fail_with_shutdown_all(one: UnixConnection) -> None:
    one.socket._sock.shutdown(socket.SHUT_WR)  # type: ignore[attr-defined]
    await one.send_all(b"x")


async def fail_with_closed(one: UnixConnection) -> None:
    await one.aclose()
    await one.send_message(b"x")


@pytest.mark.parametrize(
    ("fail", "error"),
    [
        (fail_with_closed_fd, SendError),
        (fail_before, SendError),
        (fail_with_message, SendError),
        (fail_with_fd, SendError),
        (fail_with_duplicates, SendError),
        (fail_with_cancellable, OperationCancelled),
        (fail_with_shutdown, ConnectionBrokenError),
        (fail_with_shutdown_all, ConnectionBrokenError),
        (fail_with_closed, ConnectionClosedError),
    ],
)
async def test_failed_send_keeps_no_reference(
    fail: Callable[[UnixConnection], Any], error: type[UnixConnectionError]
) -> None:
    """After a failed send the connection is free without the garbage collector: no cycle."""
    with no_gc():
        one, two = connection_pair()
        reference = weakref.ref(one)
        try:
            await fail(one)
        except error as exc:
            assert exc.sent == 0
        else:
            pytest.fail("it did not fail")
        await one.aclose()
        await two.aclose()
        del one, two
        assert reference() is None


async def test_half_sent_message_keeps_no_reference() -> None:
    """Nor after half a message, and the error of the next send."""
    with no_gc():
        one, two = connection_pair()
        reference = weakref.ref(one)
        with trio.move_on_after(0.01):
            await one.send_message(b"m" * 10_000_000, fds=[0])
        try:
            await one.send_fd(0)
        except ConnectionBrokenError as exc:
            assert exc.sent > 0
        await one.aclose()
        await two.aclose()
        del one, two
        assert reference() is None


async def test_send_fds_of_files_keeps_them_no_longer(paths: list[Path]) -> None:
    """After send_fds the files are free: their file descriptors are closed by then."""
    one, two = connection_pair()
    kept: list[weakref.ref[Any]] = []

    def files() -> Iterator[io.BufferedReader]:
        for path in paths:
            file = opened(path)
            kept.append(weakref.ref(file))
            yield file

    async with one, two:
        with no_gc():
            await one.send_fds(files())
            assert [reference() for reference in kept] == [None] * 3
        assert await drain(two, 3) == [0, 1, 2]


async def test_send_fds_with_few_free_descriptors() -> None:
    """Duplicates of a file descriptor that is there several times are made once."""
    one, two = connection_pair()
    async with one, two, trio.open_nursery() as nursery:
        count = clog(one)
        with some(2) as fds, free_descriptors(2):
            nursery.start_soon(one.send_fds, [*fds, *fds, *fds])
            await wait_all_tasks_blocked()
        await unclog(two, count)
        assert await drain(two, 6) == [0, 1] * 3
