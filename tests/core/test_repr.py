"""What objects look like in a terminal, a notebook and a log."""

from __future__ import annotations

import importlib
import os
import re
from typing import TYPE_CHECKING, Any

import trio

from tests.test_public import is_class, public_objects
from trio_unixconn import (
    Cancellable,
    Message,
    UnixConnection,
    UnixFDList,
    connection_pair,
    open_callback_adapter,
    open_unix_connection,
    open_unix_datagram,
    open_unix_listener,
)
from trio_unixconn.pool import open_worker_pool

if TYPE_CHECKING:
    from pathlib import Path

    from trio_unixconn import AsyncResult


def test_every_public_class_has_a_repr() -> None:
    """No public class has the repr of object, which says nothing but an address in memory."""
    objects = [getattr(importlib.import_module(module), name) for module, name in public_objects()]
    classes = [each for each in objects if is_class(each) and not is_protocol(each)]
    assert [each for each in classes if each.__repr__ is object.__repr__] == []


def is_protocol(cls: type) -> bool:
    return bool(getattr(cls, "_is_protocol", False))


async def test_repr_of_a_listener(tmp_path: Path) -> None:
    """repr(listener) has its number, its name and how many peers it has denied."""
    async with await open_unix_listener(tmp_path / "s\n") as listener:
        fd = listener.socket.fileno()
        assert repr(listener) == f"<UnixListener fd={fd} at {tmp_path}/s\\x0a, 0 denied>"
    assert repr(listener) == "<UnixListener closed>"


def test_repr_of_a_cancellable() -> None:
    """repr(cancellable) says whether it is cancelled, and so does that of a scope of it."""
    cancellable = Cancellable()
    assert repr(cancellable) == "<Cancellable not cancelled>"

    async def scope() -> str:
        return repr(cancellable.scope())

    cancellable.cancel()
    assert repr(cancellable) == "<Cancellable cancelled>"
    assert trio.run(scope) == "<CancellableScope of <Cancellable cancelled>>"


async def test_repr_of_callbacks() -> None:
    """An adapter, its connections and results say what they are of, and in which state."""
    seen: list[str] = []

    def finish(source: Any, result: AsyncResult) -> None:
        seen.append(repr(result))
        os.close(source.receive_fd_finish(result))
        seen.append(repr(result))

    def fail(source: object, result: AsyncResult) -> None:
        seen.append(repr(result))

    one, two = connection_pair()
    async with one, two, open_callback_adapter() as adapter:
        wrapped = adapter.wrap(one)
        assert repr(wrapped) == f"<CallbackConnection of {one!r}>"
        assert repr(adapter) == "<CallbackAdapter with 0 pending>"
        wrapped.receive_fd_async(None, finish)
        assert repr(adapter) == "<CallbackAdapter with 1 pending>"
        await two.send_fd(0)
        while len(seen) < 2:
            await trio.lowlevel.checkpoint()
        wrapped.receive_fd_async(None, fail)
        adapter.cancel_pending()
    method = "receive_fd_async"
    assert seen == [
        f"<AsyncResult of {method}, not finished>",
        f"<AsyncResult of {method}, finished>",
        f"<AsyncResult of {method}, failed>",
    ]


async def test_repr_of_a_descriptor_stream() -> None:
    """repr(conn.fds()) has the number of the socket and how much it reads ahead."""
    one, two = connection_pair()
    async with one, two:
        fd = one.socket.fileno()
        assert repr(one.fds(read_ahead=3)) == f"<DescriptorStream fd={fd} read_ahead=3>"


async def test_repr_of_a_socket_that_other_code_has_closed(tmp_path: Path) -> None:
    """repr() never raises, even if the number of the socket is closed."""
    one, two = connection_pair()
    datagram = await open_unix_datagram()
    for opened, name in ((one, "UnixConnection"), (datagram, "UnixDatagramSocket")):
        fd = opened.socket.fileno()
        kept = os.dup(fd)
        os.close(fd)
        assert repr(opened) == f"<{name} fd={fd}>"
        os.dup2(kept, fd, inheritable=False)
        os.close(kept)
    for opened in (one, two, datagram):
        await opened.aclose()


def test_repr_of_a_message() -> None:
    """repr(message) has the first 64 bytes, and how many there are."""
    message = Message(b"\x1b[31m", UnixFDList(), None)
    assert repr(message).startswith("Message(data=b'\\x1b[31m', fds=<UnixFDList []>, ")
    message = Message(b"x" * 65, UnixFDList(), None)
    assert repr(message).startswith(f"Message(data={b'x' * 64!r}... (65 bytes), fds=")


async def test_repr_of_a_pool() -> None:
    """repr(pool) has its handler, its state, and how many workers and jobs there are."""
    async with open_worker_pool("asyncio:sleep", workers=1) as pool:
        assert repr(pool) == (
            "<WorkerPool asyncio:sleep ready: 1 workers, 0 jobs in flight, 0 queued>"
        )
    assert re.match(r"<WorkerPool asyncio:sleep ended: ", repr(pool))


async def test_repr_of_a_connection_to_a_path(tmp_path: Path) -> None:
    """repr(conn) names the peer's end."""
    path = tmp_path / "socket"
    async with await open_unix_listener(path) as listener:
        conn = await open_unix_connection(path)
        assert repr(conn) == f"<UnixConnection fd={conn.socket.fileno()} to {path}>"
        accepted: UnixConnection = await listener.accept()
        await conn.aclose()
        await accepted.aclose()
    assert repr(conn) == "<UnixConnection closed>"
