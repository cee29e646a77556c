"""The libraries that are compared: the same few operations on each, by its own means.

Each operation is given one end of a socketpair as a standard library socket. A library that
has no such operation raises NotImplementedError. A ``Context`` is entered directly before the
operation, when all that the library opens for itself is open.
"""

from __future__ import annotations

import importlib
import socket
import sys
import threading
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

Context: TypeAlias = "AbstractContextManager[object]"

# Called repeatedly until it returns True: the peer's part.
Meanwhile: TypeAlias = "Callable[[], bool]"


class Implementation(ABC):
    """A library, or a part of one."""

    name: str
    package: str | None = None
    # Whether a receive can be cancelled, and a send interrupted while it waits.
    waits_in_tasks = False

    def version(self) -> str | None:
        """Return the version, None if it is not installed."""
        if self.package is None:
            return f"Python {sys.version.split()[0]}"
        try:
            importlib.import_module(self.package)
            return version(self.package)
        except (ImportError, PackageNotFoundError):
            return None

    @abstractmethod
    def receive(self, sock: socket.socket, count: int, context: Context) -> Any:
        """Receive ``count`` descriptors, and return the result of the library."""

    @abstractmethod
    def send(self, sock: socket.socket, fds: list[Any]) -> None:
        """Send descriptors."""

    @abstractmethod
    def read(self, sock: socket.socket) -> bytes:
        """Read plain bytes."""

    def receive_file(self, sock: socket.socket, context: Context) -> Any:
        """Receive a descriptor of a regular file, with the check that the library has for it."""
        return self.receive(sock, 1, context)

    def send_data(
        self, sock: socket.socket, data: bytes, fds: list[int], meanwhile: Meanwhile
    ) -> None:
        """Send bytes with descriptors, while the peer does something."""
        raise NotImplementedError

    def receive_cancelled(self, sock: socket.socket, push: Callable[[], None]) -> Any:
        """Wait for a descriptor, be cancelled when it arrives, and receive again if necessary."""
        raise NotImplementedError


@attrs.define
class Done:
    """Whether something has ended."""

    yet: bool = False


class TrioUnixconn(Implementation):
    """This library."""

    name = "trio_unixconn"
    package = "trio_unixconn"
    waits_in_tasks = True

    def _run(
        self,
        sock: socket.socket,
        operate: Callable[[Any], Coroutine[Any, Any, Any]],
        context: Context | None = None,
    ) -> Any:
        import trio  # an implementation may be missing

        from trio_unixconn import UnixConnection

        async def main() -> Any:
            async with UnixConnection.from_stdlib_socket(sock) as conn:
                if context is None:
                    return await operate(conn)
                with context:
                    return await operate(conn)

        return trio.run(main)

    def receive(self, sock: socket.socket, count: int, context: Context) -> Any:
        async def operate(conn: Any) -> Any:
            if count == 1:
                return [await conn.receive_fd()]
            return await conn.receive_fds(count)

        return self._run(sock, operate, context)

    def send(self, sock: socket.socket, fds: list[Any]) -> None:
        self._run(sock, lambda conn: conn.send_fds(fds))

    def read(self, sock: socket.socket) -> bytes:
        data: bytes = self._run(sock, lambda conn: conn.receive_some())
        return data

    def receive_file(self, sock: socket.socket, context: Context) -> Any:
        async def operate(conn: Any) -> Any:
            return [(await conn.receive_file()).detach().fileno()]

        return self._run(sock, operate, context)

    def send_data(
        self, sock: socket.socket, data: bytes, fds: list[int], meanwhile: Meanwhile
    ) -> None:
        import trio
        from trio.testing import wait_all_tasks_blocked

        async def operate(conn: Any) -> None:
            done = Done()

            async def send() -> None:
                await conn.send_message(data, fds=fds)
                done.yet = True

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await wait_all_tasks_blocked()
                while not meanwhile() or not done.yet:
                    await wait_all_tasks_blocked()

        self._run(sock, operate)

    def receive_cancelled(self, sock: socket.socket, push: Callable[[], None]) -> Any:
        import trio
        from trio.testing import wait_all_tasks_blocked

        async def operate(conn: Any) -> list[int]:
            got: list[int] = []
            scope = trio.CancelScope()

            async def receive() -> None:
                with scope:
                    got.append(await conn.receive_fd())

            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await wait_all_tasks_blocked()
                push()
                scope.cancel()
            if not got:
                got.append(await conn.receive_fd())
            return got

        return self._run(sock, operate)


class Anyio(Implementation):
    """anyio, on asyncio."""

    name = "anyio"
    package = "anyio"
    waits_in_tasks = True

    def _run(
        self,
        sock: socket.socket,
        operate: Callable[[Any], Coroutine[Any, Any, Any]],
        context: Context | None = None,
    ) -> Any:
        import anyio
        from anyio.abc import UNIXSocketStream

        async def main() -> Any:
            async with await UNIXSocketStream.from_socket(sock) as stream:
                if context is None:
                    return await operate(stream)
                with context:
                    return await operate(stream)

        return anyio.run(main)

    def receive(self, sock: socket.socket, count: int, context: Context) -> Any:
        async def operate(stream: Any) -> Any:
            return (await stream.receive_fds(1, count))[1]

        return self._run(sock, operate, context)

    def send(self, sock: socket.socket, fds: list[Any]) -> None:
        self._run(sock, lambda stream: stream.send_fds(b"\0", fds))

    def read(self, sock: socket.socket) -> bytes:
        data: bytes = self._run(sock, lambda stream: stream.receive())
        return data

    def send_data(
        self, sock: socket.socket, data: bytes, fds: list[int], meanwhile: Meanwhile
    ) -> None:
        import anyio

        async def operate(stream: Any) -> None:
            done = Done()

            async def send() -> None:
                await stream.send_fds(data, fds)
                done.yet = True

            async with anyio.create_task_group() as group:
                group.start_soon(send)
                await anyio.wait_all_tasks_blocked()
                while not meanwhile() or not done.yet:
                    await anyio.wait_all_tasks_blocked()

        self._run(sock, operate)

    def receive_cancelled(self, sock: socket.socket, push: Callable[[], None]) -> Any:
        import anyio

        async def operate(stream: Any) -> list[int]:
            got: list[int] = []
            scope = anyio.CancelScope()

            async def receive() -> None:
                with scope:
                    got.extend((await stream.receive_fds(1, 1))[1])

            async with anyio.create_task_group() as group:
                group.start_soon(receive)
                await anyio.wait_all_tasks_blocked()
                push()
                scope.cancel()
            if not got:
                got.extend((await stream.receive_fds(1, 1))[1])
            return got

        return self._run(sock, operate)


class Handles(Implementation):
    """multiprocessing.reduction with connections: send_handle and recv_handle."""

    name = "multiprocessing send_handle"

    def receive(self, sock: socket.socket, count: int, context: Context) -> Any:
        if count != 1:
            raise NotImplementedError
        with Connection(sock.detach()) as conn, context:
            return [reduction.recv_handle(conn)]

    def send(self, sock: socket.socket, fds: list[Any]) -> None:
        if len(fds) != 1:
            raise NotImplementedError
        with Connection(sock.detach()) as conn:
            reduction.send_handle(conn, fds[0], 0)

    def read(self, sock: socket.socket) -> bytes:
        with Connection(sock.detach()) as conn:
            return conn.recv_bytes()


class Fds(Implementation):
    """multiprocessing.reduction with sockets: sendfds and recvfds."""

    name = "multiprocessing sendfds"

    def receive(self, sock: socket.socket, count: int, context: Context) -> Any:
        with sock, context:
            return reduction.recvfds(sock, count)

    def send(self, sock: socket.socket, fds: list[Any]) -> None:
        with sock:
            reduction.sendfds(sock, fds)

    def read(self, sock: socket.socket) -> bytes:
        # It has nothing of its own for that: socket.recv is what its users call.
        raise NotImplementedError


class Stdlib(Implementation):
    """The standard library: socket.send_fds and socket.recv_fds."""

    name = "socket.send_fds"

    def receive(self, sock: socket.socket, count: int, context: Context) -> Any:
        with sock, context:
            return socket.recv_fds(sock, 1, count)[1]

    def send(self, sock: socket.socket, fds: list[Any]) -> None:
        with sock:
            socket.send_fds(sock, [b"\0"], fds)

    def read(self, sock: socket.socket) -> bytes:
        with sock:
            return sock.recv(65536)

    def send_data(
        self, sock: socket.socket, data: bytes, fds: list[int], meanwhile: Meanwhile
    ) -> None:
        failed: list[OSError] = []

        def send() -> None:
            try:
                socket.send_fds(sock, [data], fds)
            except OSError as exc:
                failed.append(exc)

        with sock:
            thread = threading.Thread(target=send)
            thread.start()
            while not meanwhile() or thread.is_alive():
                thread.join(0.001)
        for exc in failed:
            raise exc


IMPLEMENTATIONS: list[Implementation] = [TrioUnixconn(), Anyio(), Handles(), Fds(), Stdlib()]


def warm_up(implementation: Implementation) -> None:
    """Import everything before descriptors are exhausted."""
    with suppress(Exception):
        one, two = socket.socketpair()
        with one, two:
            two.send(b"\0\0\0\1.")
            implementation.read(one)
