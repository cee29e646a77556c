"""What async functions say where no trio task runs them: in asyncio, for example."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
from collections import deque
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.test_public import public_objects
from trio_unixconn import (
    Cancellable,
    Credentials,
    Datagram,
    Message,
    UnixFDList,
    connection_pair,
    open_callback_adapter,
    open_unix_connection,
    open_unix_datagram,
    open_unix_listener,
    serve_unix,
)
from trio_unixconn._trio_task import explain
from trio_unixconn.anyio import UnixConnectionStream, connect_unix
from trio_unixconn.asgi import serve_asgi
from trio_unixconn.handover import (
    open_generation,
    request_upgrade,
    serve_haproxy_listeners,
    take_haproxy_listeners,
)
from trio_unixconn.httpcore import UnixBackend
from trio_unixconn.jupyter import NotebookNursery
from trio_unixconn.pool import (
    open_worker_pool,
    serve_agent_check,
    serve_statistics,
    serve_with_workers,
)
from trio_unixconn.systemd import ServiceManager
from trio_unixconn.testing import open_service_manager, unclog

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

OUTSIDE = (
    "not in a trio task: call this inside trio.run(), or run %autoawait trio first in a notebook; "
    "asyncio is not trio"
)


# Any async function of two arguments; it is never called.
HANDLER = "asyncio:sleep"


async def handler(conn: object) -> None:
    raise NotImplementedError


class Objects:
    """One object of each class that has async methods, made in a trio run that has ended."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "socket"
        self.conn, self.peer = connection_pair()
        self.cancelled = Cancellable()
        self.cancelled.cancel()
        self.systemd = ServiceManager()
        trio.run(self.open, directory)

    async def open(self, directory: Path) -> None:
        self.listener = await open_unix_listener(directory / "listener")
        self.datagram = await open_unix_datagram(directory / "datagram")
        self.identity = self.conn.get_peer_identity()
        self.list = UnixFDList([os.dup(0)])
        self.message = Message(b"", UnixFDList([os.dup(0)]), None)
        self.from_datagram = Datagram(b"", UnixFDList([os.dup(0)]), None)
        async with open_callback_adapter() as adapter:
            self.wrapped = adapter.wrap(self.conn)
        async with (
            open_service_manager() as self.manager,
            open_worker_pool(HANDLER, workers=1) as self.pool,
            open_generation(directory / "generation", name="name") as self.generation,
            trio.open_nursery() as nursery,
        ):
            name, path = "listener", directory / "of-generation"
            self.of_generation = await self.generation.listen_unix(name, path)
            self.passed = self.generation.connections()
            self.nursery = NotebookNursery(nursery)
        self.stream = UnixConnectionStream(self.conn)

    async def close(self) -> None:
        for each in (self.conn, self.peer, self.listener, self.datagram, self.list):
            await each.aclose()
        for message in (self.message, self.from_datagram):
            await message.aclose()
        self.identity.close()


CALLS: dict[str, Callable[[Objects], Any]] = {
    "CallbackConnection.receive_credentials": lambda on: on.wrapped.receive_credentials(),
    "CallbackConnection.receive_fd": lambda on: on.wrapped.receive_fd(),
    "CallbackConnection.send_credentials": lambda on: on.wrapped.send_credentials(),
    "CallbackConnection.send_fd": lambda on: on.wrapped.send_fd(0),
    "Datagram.aclose": lambda on: on.from_datagram.aclose(),
    "Generation.confirmed": lambda on: on.generation.confirmed(),
    "Generation.listen_tcp": lambda on: on.generation.listen_tcp("tcp", 0),
    "Generation.listen_unix": lambda on: on.generation.listen_unix("unix", on.path),
    "Generation.overdue": lambda on: on.generation.overdue(),
    "Generation.pass_on": lambda on: on.generation.pass_on(on.conn),
    "Generation.ready": lambda on: on.generation.ready(),
    "Generation.replaced": lambda on: on.generation.replaced(),
    "Generation.upgrade": lambda on: on.generation.upgrade(),
    "GenerationListener.accept": lambda on: on.of_generation.accept(),
    "GenerationListener.accept_fd": lambda on: on.of_generation.accept_fd(),
    "GenerationListener.wait_readable": lambda on: on.of_generation.wait_readable(),
    "PassedConnections.wait_for": lambda on: on.passed.wait_for(deque()),
    "GenerationListener.aclose": lambda on: on.of_generation.aclose(),
    "NotebookNursery.enter_async_context": (
        lambda on: on.nursery.enter_async_context(open_callback_adapter())
    ),
    "NotebookNursery.exit_async_context": lambda on: on.nursery.exit_async_context(on.pool),
    "NotebookNursery.start": lambda on: on.nursery.start(handler),
    "PassedConnections.__anext__": lambda on: on.passed.__anext__(),
    "PassedConnections.wait_for_space": lambda on: on.passed.wait_for_space(),
    "DescriptorStream.__anext__": lambda on: on.conn.fds().__anext__(),
    "Message.aclose": lambda on: on.message.aclose(),
    "PeerIdentity.read_cgroup": lambda on: on.identity.read_cgroup(),
    "PeerIdentity.read_command_line": lambda on: on.identity.read_command_line(),
    "PeerIdentity.read_exe": lambda on: on.identity.read_exe(),
    "UnixConnection.aclose": lambda on: on.conn.aclose(),
    "UnixConnection.receive_buffer": lambda on: on.conn.receive_buffer(1),
    "UnixConnection.receive_credentials": lambda on: on.conn.receive_credentials(),
    "UnixConnection.receive_fd": lambda on: on.conn.receive_fd(),
    "UnixConnection.receive_fd, cancelled": lambda on: on.conn.receive_fd(on.cancelled),
    "UnixConnection.receive_fds": lambda on: on.conn.receive_fds(1),
    "UnixConnection.receive_file": lambda on: on.conn.receive_file(),
    "UnixConnection.receive_into": lambda on: on.conn.receive_into(bytearray(1)),
    "UnixConnection.receive_message": lambda on: on.conn.receive_message(1),
    "UnixConnection.receive_socket": lambda on: on.conn.receive_socket(),
    "UnixConnection.receive_some": lambda on: on.conn.receive_some(1),
    "UnixConnection.receive_stream": lambda on: on.conn.receive_stream(),
    "UnixConnection.send_all": lambda on: on.conn.send_all(b"x"),
    "UnixConnection.send_buffer": lambda on: on.conn.send_buffer(b"x"),
    "UnixConnection.send_credentials": lambda on: on.conn.send_credentials(),
    "UnixConnection.send_eof": lambda on: on.conn.send_eof(),
    "UnixConnection.send_fake_credentials": lambda on: on.conn.send_fake_credentials(Credentials()),
    "UnixConnection.send_fd": lambda on: on.conn.send_fd(0),
    "UnixConnection.send_fd, cancelled": lambda on: on.conn.send_fd(0, on.cancelled),
    "UnixConnection.send_fds": lambda on: on.conn.send_fds([0]),
    "UnixConnection.send_fds, none": lambda on: on.conn.send_fds([]),
    "UnixConnection.send_message": lambda on: on.conn.send_message(b"x"),
    "UnixConnection.wait_send_all_might_not_block": (
        lambda on: on.conn.wait_send_all_might_not_block()
    ),
    "UnixConnectionStream.aclose": lambda on: on.stream.aclose(),
    "UnixConnectionStream.receive": lambda on: on.stream.receive(),
    "UnixConnectionStream.receive_fds": lambda on: on.stream.receive_fds(1, 1),
    "UnixConnectionStream.send": lambda on: on.stream.send(b"x"),
    "UnixConnectionStream.send_eof": lambda on: on.stream.send_eof(),
    "UnixConnectionStream.send_fds": lambda on: on.stream.send_fds(b"x", [0]),
    "UnixDatagramSocket.aclose": lambda on: on.datagram.aclose(),
    "UnixDatagramSocket.receive_message": lambda on: on.datagram.receive_message(),
    "UnixDatagramSocket.send_message": lambda on: on.datagram.send_message(b"x", on.path),
    "UnixFDList.aclose": lambda on: on.list.aclose(),
    "UnixFDList.open_file": lambda on: on.list.open_file(0),
    "UnixListener.accept": lambda on: on.listener.accept(),
    "UnixListener.aclose": lambda on: on.listener.aclose(),
    "open_callback_adapter": lambda _: open_callback_adapter(),
    "open_unix_connection": lambda on: open_unix_connection(on.path),
    "open_unix_datagram": lambda on: open_unix_datagram(on.path),
    "open_unix_listener": lambda on: open_unix_listener(on.path),
    "serve_unix": lambda on: serve_unix(handler, on.path),
    "serve_unix, a listener": lambda on: serve_unix(handler, on.listener),
    "WorkerPool.call": lambda on: on.pool.call(data=b"x"),
    "WorkerPool.drain": lambda on: on.pool.drain(),
    "WorkerPool.restart": lambda on: on.pool.restart(),
    "WorkerPool.scale": lambda on: on.pool.scale(2),
    "WorkerPool.submit": lambda on: on.pool.submit(on.conn),
    "open_worker_pool": lambda _: open_worker_pool(HANDLER),
    "serve_agent_check": lambda on: serve_agent_check(on.pool, ("127.0.0.1", 0)),
    "serve_asgi": lambda on: serve_asgi(HANDLER, [on.listener]),
    "serve_statistics": lambda on: serve_statistics(on.pool, on.path),
    "serve_statistics, TCP": lambda on: serve_statistics(on.pool, ("127.0.0.1", 0)),
    "serve_with_workers": lambda on: serve_with_workers(HANDLER, [on.listener]),
    "ServiceManager.barrier": lambda on: on.systemd.barrier(),
    "ServiceManager.extend_timeout": lambda on: on.systemd.extend_timeout(1),
    "ServiceManager.forget": lambda on: on.systemd.forget("name"),
    "ServiceManager.main_pid": lambda on: on.systemd.main_pid(),
    "ServiceManager.notify": lambda on: on.systemd.notify({"X": "y"}),
    "ServiceManager.ready": lambda on: on.systemd.ready(),
    "ServiceManager.reloading": lambda on: on.systemd.reloading(),
    "ServiceManager.status": lambda on: on.systemd.status("status"),
    "ServiceManager.stopping": lambda on: on.systemd.stopping(),
    "ServiceManager.store": lambda on: on.systemd.store([]),
    "ServiceManager.watchdog": lambda on: on.systemd.watchdog(),
    "FakeServiceManager.wait_for": lambda on: on.manager.wait_for("READY=1"),
    "UnixBackend.connect_tcp": lambda _: UnixBackend().connect_tcp("127.0.0.1", 1),
    "UnixBackend.connect_unix_socket": lambda on: UnixBackend().connect_unix_socket(str(on.path)),
    "UnixBackend.sleep": lambda _: UnixBackend().sleep(1),
    "connect_unix": lambda on: connect_unix(on.path),
    "open_generation": lambda on: open_generation(on.path, name="name"),
    "request_upgrade": lambda on: request_upgrade(on.path),
    "serve_haproxy_listeners": lambda on: serve_haproxy_listeners(on.path, [on.listener]),
    "take_haproxy_listeners": lambda on: take_haproxy_listeners(on.path),
    "open_service_manager": lambda _: open_service_manager(),
    "unclog": lambda on: unclog(on.conn, 1),
}
# The code of its caller waits; and it looks first whether the extension is loaded.
NEEDS_NO_TASK = {"PeerPolicy.admits", "watch"}
# Its methods are those of a ServiceManager.
PROTOCOLS = {"ServiceNotifier"}


def is_async(function: object) -> bool:
    inner = inspect.unwrap(function) if callable(function) else function
    return inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner)


def async_names() -> set[str]:
    """Return the public async functions and methods."""
    found: set[str] = set()
    for module, name in public_objects():
        value = getattr(importlib.import_module(module), name)
        if is_async(value):
            found.add(name)
        elif inspect.isclass(value) and name not in PROTOCOLS:
            found |= {
                f"{name}.{key}"
                for key, member in inspect.getmembers(value, is_async)
                if (key == "__anext__" or not key.startswith("_"))
                and member.__module__.startswith("trio_unixconn")
            }
    return found


def test_every_async_function_is_tested() -> None:
    """The calls below are all async functions and methods there are, and no others."""
    assert {name.partition(",")[0] for name in CALLS} == async_names() - NEEDS_NO_TASK


async def call_all(objects: Objects) -> dict[str, str]:
    """Return what each call has raised."""
    told: dict[str, str] = {}
    for name, call in CALLS.items():
        try:
            made = call(objects)
            if isinstance(made, AbstractAsyncContextManager):
                await made.__aenter__()
            else:
                await made
        except RuntimeError as exc:
            told[name] = str(exc)
    return told


def run_without_a_loop(coroutine: Coroutine[Any, Any, dict[str, str]]) -> dict[str, str]:
    """Run a coroutine that must not wait for anything."""
    with pytest.raises(StopIteration) as stop:
        coroutine.send(None)
    told: dict[str, str] = stop.value.value
    return told


@pytest.mark.parametrize("run", [asyncio.run, run_without_a_loop])
def test_async_functions_outside_of_trio(
    tmp_path: Path, run: Callable[[Coroutine[Any, Any, dict[str, str]]], dict[str, str]]
) -> None:
    """Each raises one sentence that helps, before anything has happened."""
    objects = Objects(tmp_path)
    before = sorted(os.listdir(tmp_path))
    assert run(call_all(objects)) == dict.fromkeys(CALLS, OUTSIDE)
    assert sorted(os.listdir(tmp_path)) == before
    assert not objects.path.exists()
    # None is closed, and none is busy.
    assert len(objects.list) == len(objects.message.fds) == 1
    trio.run(use, objects)


async def use(objects: Objects) -> None:
    await objects.conn.send_all(b"x")
    assert await objects.peer.receive_some() == b"x"
    await objects.peer.send_all(b"y")
    assert await objects.conn.receive_some() == b"y"
    conn = await open_unix_connection(objects.listener.get_local_address())
    await (await objects.listener.accept()).aclose()
    await conn.aclose()
    await objects.close()


def test_cancellable_scope_outside_of_a_task() -> None:
    """Cancellable.scope() says the same, and the Cancellable is not changed."""
    cancellable = Cancellable()
    with pytest.raises(RuntimeError) as caught:
        cancellable.scope()
    assert str(caught.value) == OUTSIDE
    assert not cancellable.is_cancelled()


async def test_other_runtime_errors_stay() -> None:
    """In a trio task, a RuntimeError of an operation is raised as it is."""
    error = RuntimeError("of a callback")
    assert explain(error) is error

    class Broken:
        def fileno(self) -> int:
            return 0

        def sendmsg(self, *args: object) -> None:
            raise error

    one, two = connection_pair()
    async with one, two:
        raw: Any = Broken()
        one._sender.raw = raw
        with pytest.raises(RuntimeError) as caught:
            await one.send_fd(0)
        assert caught.value is error
