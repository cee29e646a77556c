"""Job.pass_on: connections that go from one handler to the next."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests._helpers.fds import free_descriptors
from tests._helpers.pool import at_rest, check_sums, null, pids
from tests._helpers.waiting import until
from trio_unixconn import UnixConnection, connection_pair
from trio_unixconn.pool import AbandonedJob, open_worker_pool, serve_with_workers

if TYPE_CHECKING:
    from pathlib import Path

    from trio_unixconn.pool import WorkerPool

pytestmark = pytest.mark.usefixtures("no_child_left")

PASS_ON = "tests._helpers.pool_handlers:pass_on"
CANNOT = "tests._helpers.pool_handlers:pass_on_what_cannot_be"


class Client:
    """A client whose connection is passed on."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream

    async def line(self) -> bytes:
        """Return the next line; nothing if the connection has ended."""
        with trio.fail_after(60), suppress(trio.BrokenResourceError):
            line = b""
            while byte := bytes(await self.stream.receive_some(1)):
                line += byte
                if byte == b"\n":
                    return line[:-1]
        return b""

    async def hello(self) -> tuple[int, int, bytes]:
        """Return the worker, how many times the connection was passed on, and the data."""
        pid, passed, data = (await self.line()).split(b" ", 2)
        return int(pid), int(passed), data

    async def ask(self, text: bytes) -> bytes:
        await self.stream.send_all(text + b"\n")
        return await self.line()

    async def say(self, text: bytes) -> None:
        """Send bytes; the connection may have ended."""
        with suppress(trio.BrokenResourceError):
            await self.stream.send_all(text)


async def submitted(pool: WorkerPool, data: bytes = b"") -> Client:
    """Submit a connection, and return its client."""
    here, there = connection_pair()
    await pool.submit(there, data=data)
    return Client(here)


async def test_pass_on_to_another_handler() -> None:
    """The next handler has the connection and the data; the client notices nothing."""
    async with open_worker_pool(PASS_ON, workers=2) as pool:
        client = await submitted(pool, b"submitted")
        assert (await client.hello())[1:] == (0, b"submitted")
        for count in range(1, 6):
            await client.say(b"pass %d times\n" % count)
            pid, passed, data = await client.hello()
            assert (passed, data) == (count, b"%d times" % count)
            assert pid in pids(pool)
            assert await client.ask(b"hello") == b"HELLO"
        await client.stream.aclose()
        found = await at_rest(pool)
        assert (found.submitted, found.handled, found.passed) == (6, 6, 5)
        assert (found.failed, found.abandoned, found.rejected) == (0, 0, 0)


async def test_pass_on_while_bytes_arrive() -> None:
    """What the client sends meanwhile is there for the next handler."""
    async with open_worker_pool(PASS_ON, workers=1) as pool:
        client = await submitted(pool)
        await client.hello()
        await client.say(b"pass on\n")
        await client.say(b"early\n")
        assert (await client.hello())[1:] == (1, b"on")
        assert await client.line() == b"EARLY"
        await client.stream.aclose()
        await at_rest(pool)


@pytest.mark.slow
async def test_restart_passes_idle_connections_on() -> None:
    """Restarts and scaling end no connection whose handler passes it on."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        server = await nursery.start(partial(serve_with_workers, PASS_ON, [listener], workers=2))
        address = listener.socket.getsockname()
        clients = [Client(await trio.open_tcp_stream(*address)) for _ in range(40)]
        old = {(await client.hello())[0] for client in clients}
        for count in range(1, 4):
            await server.pool.restart()
            new = set(pids(server.pool))
            for client in clients:
                pid, passed, data = await client.hello()
                assert (passed, data) == (count, b"drained")
                assert pid in new - old
                assert await client.ask(b"hello") == b"HELLO"
            old |= new
        await server.pool.scale(1)
        (left,) = pids(server.pool)[:1]
        moved = [client for client in clients if await is_moved(client)]
        assert moved
        for client in clients:
            assert await client.ask(b"hello") == b"HELLO"
        found = server.statistics()
        assert found.passed == 3 * 40 + len(moved)
        assert (found.failed, found.abandoned, found.rejected, found.deaths) == (0, 0, 0, 0)
        assert left in pids(server.pool)
        server.drain()
        for client in clients:
            await client.stream.aclose()
    check_sums(server.statistics())


async def is_moved(client: Client) -> bool:
    """Whether a connection has been passed on by the end of the longest drain."""
    with trio.move_on_after(0.5):
        await client.hello()
        return True
    return False


async def test_pass_on_when_the_whole_pool_drains() -> None:
    """Then no handler can have the connection, and it is closed when one tries."""
    async with open_worker_pool(PASS_ON, workers=2) as pool:
        stays, goes = await submitted(pool), await submitted(pool)
        await stays.hello()
        await goes.hello()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.drain, 60)
            await until(lambda: pool.statistics().state == "draining")
            # can_pass_on is false, so its handler goes on.
            assert await stays.ask(b"hello") == b"HELLO"
            await goes.say(b"pass on\n")
            assert await goes.line() == b""
            await stays.stream.aclose()
        await goes.stream.aclose()
        found = pool.statistics()
        assert (found.handled, found.passed, found.failed, found.abandoned) == (2, 0, 0, 0)


async def test_pass_on_without_a_free_descriptor_in_the_pool() -> None:
    """The worker keeps the connection, and tries again."""
    async with open_worker_pool(PASS_ON, workers=1) as pool:
        client = await submitted(pool)
        await client.hello()
        pool._supervisor._reserve.close()
        with free_descriptors(0):
            await client.say(b"pass on\n")
            with trio.move_on_after(0.3) as scope:
                await client.line()
            assert scope.cancelled_caught
        assert (await client.hello())[1:] == (1, b"on")
        await client.stream.aclose()
        assert (await at_rest(pool)).passed == 1


async def test_pass_on_of_a_closed_connection(caplog: pytest.LogCaptureFixture) -> None:
    """A handler that has closed the connection cannot pass it on: its job fails."""
    async with open_worker_pool(PASS_ON, workers=1) as pool:
        client = await submitted(pool)
        await client.hello()
        await client.say(b"close it\n")
        assert await client.line() == b""
        await client.stream.aclose()
        assert (await at_rest(pool)).failed == 1
    assert "handler has passed on a connection that it has closed" in caplog.text


async def test_pass_on_of_a_connection_that_the_client_has_closed() -> None:
    """The next handler sees the end of the stream."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, open_worker_pool(PASS_ON, workers=1) as pool:
        client = Client(await trio.open_tcp_stream(*listener.socket.getsockname()))
        await pool.submit(await listener.accept())
        await client.hello()
        await client.say(b"pass on\n")
        await client.stream.aclose()
        found = await at_rest(pool)
        assert (found.deaths, found.abandoned, found.rejected) == (0, 0, 0)
        assert found.passed == 1


async def test_pass_on_of_a_call_and_of_files(shared: Path) -> None:
    """Both are refused in the handler, with the reason."""
    async with open_worker_pool(CANNOT, workers=1) as pool:
        assert await pool.call() == (
            b"RuntimeError: cannot pass on the connection of a call, which wants an answer"
        )
        await pool.submit(null())
        await at_rest(pool)
    said = (shared / "why").read_text().splitlines()
    assert said[1].startswith("WrongDescriptorKindError: expected a job with a connection, got ")


async def test_pass_on_after_reading_ahead(shared: Path) -> None:
    """A connection that has read messages ahead is refused: they would be lost."""
    async with open_worker_pool("tests._helpers.pool_handlers:read_ahead", workers=1) as pool:
        here, there = connection_pair()
        async with here:
            await here.send_fds([0, 0, 0], per_message=1)
            await pool.submit(there)
            await at_rest(pool)
    assert "read ahead" in (shared / "why").read_text()


async def test_pass_on_of_a_connection_that_receives_no_descriptors(tmp_path: Path) -> None:
    """The next handler's connection receives none, either."""
    async with open_worker_pool(PASS_ON, workers=1) as pool:
        here, there = connection_pair()
        limited = UnixConnection.from_fd(there.detach(), receive_descriptors=False)
        await pool.submit(limited)
        client = Client(here)
        await client.hello()
        await client.say(b"pass on\n")
        assert (await client.hello())[1] == 1
        # With SO_PASSRIGHTS off, or by closing what arrives.
        try:
            await here.send_message(b"x", fds=[0])
        except PermissionError:
            await client.say(b"x\n")
        assert await here.receive_some(1) in (b"X", b"")
        await here.aclose()
        await at_rest(pool)


@pytest.mark.slow
async def test_pass_on_by_workers_that_are_killed() -> None:
    """A connection has one owner at every moment, or ends with its worker; none is lost."""
    async with open_worker_pool(PASS_ON, workers=2) as pool:
        clients = [await submitted(pool) for _ in range(30)]
        for client in clients:
            await client.hello()
        for round_ in range(4):
            for client in clients:
                await client.say(b"pass again\n")
            # The one that was killed last may not have a successor yet.
            with suppress(ProcessLookupError):
                os.kill(pids(pool)[round_ % 2], signal.SIGKILL)
            left: list[Client] = []
            for client in clients:
                if await client.line():
                    left.append(client)
                else:
                    await client.stream.aclose()
            clients = left + [await submitted(pool) for _ in range(30 - len(left))]
            for client in clients[len(left) :]:
                await client.hello()
        for client in clients:
            await client.stream.aclose()
        found = await at_rest(pool)
        assert found.handled + found.abandoned == found.submitted
        assert found.passed > 0


async def test_pass_on_keeps_the_proxy_header() -> None:
    """The next handler has the header that the connection began with."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    options: dict[str, Any] = {"proxy_protocol": "v1", "proxy_from": ["127.0.0.0/8"]}
    async with (
        listener,
        open_worker_pool(
            "tests._helpers.pool_handlers:pass_on_and_tell_peer", workers=1, **options
        ) as pool,
    ):
        async with await trio.open_tcp_stream(*listener.socket.getsockname()) as stream:
            await pool.submit(await listener.accept())
            client = Client(stream)
            await client.say(b"PROXY TCP4 192.0.2.1 198.51.100.7 50000 443\r\n")
            assert await client.line() == b"192.0.2.1 0 "
            await client.say(b"x")
            assert await client.line() == b"192.0.2.1 1 some data"
            await client.say(b"x")
            assert await client.line() == b"192.0.2.1 2 some data"
        await at_rest(pool)


async def test_pass_on_of_a_proxied_connection_that_is_abandoned() -> None:
    """What is reported of it is the data of the handler, without the header."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    reported: list[AbandonedJob] = []
    options: dict[str, Any] = {"proxy_protocol": "v1", "proxy_from": ["127.0.0.0/8"]}
    async with (
        listener,
        open_worker_pool(
            "tests._helpers.pool_handlers:pass_on_and_tell_peer",
            workers=1,
            on_abandoned=reported.append,
            **options,
        ) as pool,
    ):
        async with await trio.open_tcp_stream(*listener.socket.getsockname()) as stream:
            await pool.submit(await listener.accept())
            client = Client(stream)
            await client.say(b"PROXY TCP4 192.0.2.1 198.51.100.7 50000 443\r\n")
            await client.line()
            await client.say(b"x")
            assert await client.line() == b"192.0.2.1 1 some data"
            os.kill(pids(pool)[0], signal.SIGKILL)
            assert await client.line() == b""
        await until(lambda: reported)
    assert [each.data for each in reported] == [b"some data"]
