"""serve_unix and serve_with_workers with ``generation=``: two generations in one process."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio

from tests._helpers.fds import free_descriptors
from tests._helpers.waiting import until
from trio_unixconn import (
    ConnectionClosedError,
    PeerPolicy,
    UnixConnection,
    UnixListener,
    WorkerStartError,
    open_unix_connection,
    open_unix_listener,
    serve_unix,
)
from trio_unixconn._accept import Acceptor
from trio_unixconn._frames import encode_frame
from trio_unixconn.handover import _protocol as of, open_generation
from trio_unixconn.handover._channel import Channel
from trio_unixconn.pool import (
    WorkerServer,
    serve_agent_check,
    serve_statistics,
    serve_with_workers,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from trio_unixconn import UnixServer
    from trio_unixconn.handover import Generation

pytestmark = pytest.mark.slow

PASS_ON = "tests._helpers.pool_handlers:pass_on"


class Client:
    """A client of a server: it sends and receives lines."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream

    async def line(self) -> bytes:
        line = b""
        with trio.fail_after(60):
            while not line.endswith(b"\n"):
                byte = bytes(await self.stream.receive_some(1))
                if not byte:
                    return b""
                line += byte
        return line[:-1]

    async def ask(self, text: bytes) -> bytes:
        await self.stream.send_all(text + b"\n")
        return await self.line()


async def connected(path: Path) -> Client:
    return Client(await open_unix_connection(path))


def echo(number: int) -> Any:
    """Return a handler that answers each byte with its number."""

    async def handle(conn: UnixConnection) -> None:
        while await conn.receive_some(1):
            await conn.send_all(b"%d\n" % number)

    return handle


@asynccontextmanager
async def generation(tmp_path: Path, **options: Any) -> AsyncGenerator[Generation, None]:
    with trio.fail_after(120):
        async with open_generation(tmp_path / "upgrade", name="x", **options) as gen:
            yield gen


async def listen(gen: Generation, tmp_path: Path, name: str = "web") -> Any:
    return await gen.listen_unix(name, tmp_path / name)


################################################################
# serve_unix
################################################################


async def test_serve_unix_of_a_generation(tmp_path: Path) -> None:
    """The successor accepts, the old one finishes what it has, without a limit, and returns."""
    async with generation(tmp_path) as old, trio.open_nursery() as nursery:
        web = await listen(old, tmp_path)
        server: UnixServer = await nursery.start(partial(serve_unix, echo(1), web, generation=old))
        await old.confirmed()
        first = await connected(tmp_path / "web")
        assert await first.ask(b"") == b"1"
        async with generation(tmp_path) as new, trio.open_nursery() as later:
            listener = await listen(new, tmp_path)
            assert listener.inherited
            newer: UnixServer = await later.start(
                partial(serve_unix, echo(2), listener, generation=new)
            )
            await old.replaced()
            await new.confirmed()
            second = await connected(tmp_path / "web")
            assert await second.ask(b"") == b"2"
            assert await first.ask(b"") == b"1"
            assert not server.drained.is_set()
            await first.stream.aclose()
            await server.drained.wait()
            await second.stream.aclose()
            # Without a successor, what is in the queue is handled, and the path is removed.
            newer.drain()
            await newer.drained.wait()
            assert not (tmp_path / "web").exists()
            await until(lambda: not (tmp_path / "upgrade").exists())


async def test_serve_unix_accepts_nothing_before_ready(tmp_path: Path) -> None:
    """If the program has other listeners, too, it says itself when all of them can accept."""
    async with generation(tmp_path) as gen, trio.open_nursery() as nursery:
        web = await listen(gen, tmp_path)
        await listen(gen, tmp_path, "admin")
        server: UnixServer = await nursery.start(partial(serve_unix, echo(1), web, generation=gen))
        client = await connected(tmp_path / "web")
        await client.stream.send_all(b"x")
        await trio.testing.wait_all_tasks_blocked()
        assert (gen.phase.value, server.accepted) == ("starting", 0)
        await gen.ready()
        assert await client.line() == b"1"
        await client.stream.aclose()
        nursery.cancel_scope.cancel()


async def test_ready_waits_for_servers_that_were_started(tmp_path: Path) -> None:
    """While the workers of one server start, ready() waits."""
    async with generation(tmp_path) as gen, trio.open_nursery() as nursery:
        web = await listen(gen, tmp_path)
        web.is_claimed = True
        nursery.start_soon(gen.ready)
        await trio.testing.wait_all_tasks_blocked()
        assert gen.phase.value == "starting"
        web.set_prepared()
        await gen.confirmed()


async def test_overdue_cancels_handlers(tmp_path: Path) -> None:
    """A generation that is told to end cancels the handlers that still run."""
    async with generation(tmp_path) as old, trio.open_nursery() as nursery:
        web = await listen(old, tmp_path)
        server: UnixServer = await nursery.start(partial(serve_unix, echo(1), web, generation=old))
        await old.confirmed()
        client = await connected(tmp_path / "web")
        assert await client.ask(b"") == b"1"
        channel = Channel(await open_unix_connection(tmp_path / "upgrade"))
        await take_over(channel, old)
        assert await client.ask(b"") == b"1"
        await channel.send(encode_frame(of.FINISH))
        await server.drained.wait()
        assert await client.line() == b""
        channel.close()
        await client.stream.aclose()


async def take_over(channel: Channel, old: Generation, *accepts: str) -> None:
    """Take over as a successor would that keeps no listener."""
    await channel.send(of.pack_hello("x"))
    for answer in (
        None,
        of.pack_id(of.TAKEN, 0),
    ):
        frame = await channel.receive()
        assert frame is not None
        for fd in frame.fds or []:
            os.close(fd)
        if answer is not None:
            await channel.send(answer)
    await channel.send(of.pack_prepared([], accepts))
    frame = await channel.receive()
    assert frame is not None
    assert frame.kind == of.COMMIT
    await channel.send(encode_frame(of.SERVING))
    await old.replaced()
    frame = await channel.receive()
    assert frame is not None
    assert frame.kind == of.RELEASED


async def test_generation_rejects_what_is_not_its_listener(tmp_path: Path) -> None:
    """Servers say what they need; the caller still owns what it has passed."""
    serve: Any = serve_with_workers
    async with generation(tmp_path) as gen:
        web = await listen(gen, tmp_path)
        tcp = await gen.listen_tcp("tcp", 0)
        other = await open_unix_listener(tmp_path / "other")
        with pytest.raises(TypeError, match="expected listeners of this generation"):
            await serve_unix(echo(1), other, generation=gen)
        with pytest.raises(TypeError, match="expected a listener of a Unix socket"):
            await serve_unix(echo(1), cast("Any", tcp), generation=gen)
        with pytest.raises(TypeError, match="GenerationListener"):
            await serve_unix(echo(1), web)
        with pytest.raises(ValueError, match="cannot be used with"):
            await serve_unix(echo(1), web, generation=gen, mode=0o600)
        with pytest.raises(TypeError, match="requires the argument generation"):
            await serve("x:y", [web])
        with pytest.raises(TypeError, match="expected listeners of this generation"):
            await serve("x:y", [web, other], generation=gen)
        with pytest.raises(ValueError, match="empty list"):
            await serve("x:y", [], generation=gen)
        with pytest.raises(ValueError, match="one of them twice"):
            await serve("x:y", [web, web], generation=gen)
        with pytest.raises(ValueError, match="twice"):
            await serve_agent_check(cast("Any", lambda: None), [other, other])
        web.is_claimed = True
        with pytest.raises(ValueError, match="another server accepts from the listener 'web'"):
            await serve("x:y", [web], generation=gen)
        assert other.socket.fileno() != -1
        await other.aclose()


################################################################
# adopt, inherit
################################################################


async def test_adopt_and_inherit(tmp_path: Path) -> None:
    """A listener that was opened otherwise is one of the generation, and of the next one."""
    opened = await open_unix_listener(tmp_path / "opened")
    abstract = await open_unix_listener(f"\0trio-unixconn-adopt-{os.getpid()}")
    (tcp,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    closed = await open_unix_listener(tmp_path / "closed")
    await closed.aclose()
    async with generation(tmp_path) as old:
        assert old.offered == ()
        assert old.inherit("opened") is None
        with pytest.raises(TypeError, match=r"expected a trio\.SocketListener or a UnixListener"):
            old.adopt("x", cast("Any", 3))
        with pytest.raises(ConnectionClosedError):
            old.adopt("x", closed)
        for name, each in (("opened", opened), ("abstract", abstract), ("tcp", tcp)):
            old.adopt(name, each)
        assert [each.name for each in old.listeners] == ["opened", "abstract", "tcp"]
        await old.ready()
        async with generation(tmp_path) as new:
            assert list(new.offered) == ["opened", "abstract", "tcp"]
            found = [new.inherit(name) for name in new.offered]
            assert list(new.offered) == []
            assert all(each is not None and each.inherited for each in found)
            assert found[0] is not None
            assert isinstance(found[0].base, UnixListener)
            assert found[0].base.get_local_address().get_path() == str(tmp_path / "opened")
            async with trio.open_nursery() as nursery:
                for listener in found:
                    assert listener is not None
                    nursery.start_soon(listener.accept)
                await new.ready()
                await new.confirmed()
                nursery.cancel_scope.cancel()
            assert (tmp_path / "opened").exists()
        assert not (tmp_path / "opened").exists()


async def test_retire_lets_another_process_be_the_first(tmp_path: Path) -> None:
    """A generation that ends without a successor is not asked for its listeners any more."""
    async with generation(tmp_path) as old:
        await old.ready()
        old.retire()
        await until(lambda: not (tmp_path / "upgrade").exists())
        with pytest.raises(Exception, match="ends without a successor"):
            await old.upgrade()
        async with generation(tmp_path) as new:
            assert new.number == 1


async def test_upgrade_of_process_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process of a pid namespace says why it cannot start its successor."""
    async with generation(tmp_path) as gen:
        await gen.ready()
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(Exception, match="process 1 cannot start its successor"):
            await gen.upgrade()
        monkeypatch.undo()


################################################################
# serve_with_workers
################################################################


@asynccontextmanager
async def workers(
    gen: Generation, *listeners: Any, handler: str = PASS_ON, **options: Any
) -> AsyncGenerator[WorkerServer, None]:
    """Serve with one worker; the block ends when the server has ended."""
    async with trio.open_nursery() as nursery:
        server: WorkerServer = await nursery.start(
            partial(
                serve_with_workers,
                handler,
                listeners,
                generation=gen,
                **{"workers": 1, **options},
            )
        )
        yield server


async def test_pass_on_to_the_workers_of_the_successor(tmp_path: Path) -> None:
    """Idle connections of an old worker go on in a new one, with their data, counted on."""
    async with generation(tmp_path) as old:
        web = await listen(old, tmp_path)
        tcp = await old.listen_tcp("tcp", 0)
        port = tcp.socket.getsockname()[1]
        async with workers(old, web, tcp) as server:
            await old.confirmed()
            clients = [await connected(tmp_path / "web") for _ in range(3)]
            clients.append(Client(await trio.open_tcp_stream("127.0.0.1", port)))
            pids = {(await each.line()).split()[0] for each in clients}
            assert len(pids) == 1
            async with generation(tmp_path) as new:
                listener = await listen(new, tmp_path)
                inherited = await new.listen_tcp("tcp", port)
                async with workers(new, listener, inherited) as newer:
                    await new.confirmed()
                    for each in clients:
                        pid, passed, data = (await each.line()).split()
                        assert pid not in pids
                        assert (passed, data) == (b"1", b"drained")
                        assert await each.ask(b"hello") == b"HELLO"
                    await until(lambda: old.passed_on == 4)
                    statistics = server.statistics()
                    assert statistics.state in {"draining", "ended"}
                    assert statistics.passed == 4
                    assert newer.statistics().submitted == 4
                    for each in clients:
                        await each.stream.aclose()
                    newer.drain()


async def test_queued_connections_go_to_the_successor(tmp_path: Path) -> None:
    """What no worker has is passed on at once: old workers may have no free slot for it."""
    async with generation(tmp_path) as old:
        web = await listen(old, tmp_path)
        async with workers(
            old,
            web,
            handler="tests._helpers.server_handlers:hold",
            max_in_flight=1,
            drain_timeout=1000,
        ) as server:
            await old.confirmed()
            held = await connected(tmp_path / "web")
            assert await held.stream.receive_some(4) == b"held"
            waiting = await connected(tmp_path / "web")
            await until(lambda: server.statistics().queued == 1)
            async with generation(tmp_path) as new:
                listener = await listen(new, tmp_path)
                async with workers(new, listener) as newer:
                    await new.confirmed()
                    assert (await waiting.line()).split()[1:] == [b"0", b"nothing"]
                    found = server.statistics()
                    assert (found.handed_over, found.in_flight, found.cancelled) == (1, 1, 0)
                    await waiting.stream.aclose()
                    await held.stream.aclose()
                    newer.drain()
                    server._drain(0)


async def test_pass_on_without_a_taker(tmp_path: Path) -> None:
    """If the successor has no such server, handlers are not asked to pass on, and finish."""
    async with generation(tmp_path) as old:
        web = await listen(old, tmp_path)
        async with workers(old, web) as server:
            await old.confirmed()
            client = await connected(tmp_path / "web")
            await client.line()
            channel = Channel(await open_unix_connection(tmp_path / "upgrade"))
            await take_over(channel, old, "another")
            await until(lambda: server.statistics().state == "draining")
            assert await client.ask(b"hello") == b"HELLO"
            await client.stream.aclose()
        channel.close()


async def test_pass_on_when_the_successor_has_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Connections that the successor has not taken are closed and counted in the log."""
    async with generation(tmp_path) as old:
        web = await listen(old, tmp_path)
        async with workers(old, web):
            await old.confirmed()
            clients = [await connected(tmp_path / "web") for _ in range(2)]
            for each in clients:
                await each.line()
            channel = Channel(await open_unix_connection(tmp_path / "upgrade"))
            await take_over(channel, old, "web")
            await channel.send(encode_frame(of.MOVED))
            frame = await channel.receive()
            assert frame is not None
            assert frame.kind == of.PASSED
            for fd in frame.fds or []:
                os.close(fd)
            channel.close()
            for each in clients:
                assert await each.line() == b""
                await each.stream.aclose()
    assert "connections were not passed on" in caplog.text


async def test_serve_with_workers_drain_ends_the_generation(tmp_path: Path) -> None:
    """Without a successor, what is in the queue is handled, and connections that arrive close."""
    async with generation(tmp_path) as old:
        web = await listen(old, tmp_path)
        async with workers(old, web) as server:
            await old.confirmed()
            client = await connected(tmp_path / "web")
            await client.line()
            async with generation(tmp_path) as new:
                async with workers(new, await listen(new, tmp_path)) as newer:
                    await new.confirmed()
                    await client.line()
                    newer.drain(timeout=0)
                    assert await client.line() == b""
                assert not (tmp_path / "web").exists()
        assert server.accepted == 1
        await client.stream.aclose()


async def test_worker_that_cannot_start_changes_nothing(tmp_path: Path) -> None:
    """A successor whose workers cannot start ends, and the old one still accepts."""
    async with generation(tmp_path) as old, trio.open_nursery() as nursery:
        web = await listen(old, tmp_path)
        server: UnixServer = await nursery.start(partial(serve_unix, echo(1), web, generation=old))
        await old.confirmed()
        with pytest.RaisesGroup(WorkerStartError, flatten_subgroups=True):
            async with generation(tmp_path) as new:
                listener = await listen(new, tmp_path)
                await serve_with_workers("no:such", [listener], generation=new, workers=1)
        client = await connected(tmp_path / "web")
        assert await client.ask(b"") == b"1"
        await client.stream.aclose()
        server.drain()


################################################################
# Statistics
################################################################


async def test_serve_statistics_of_a_generation_without_free_descriptors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A client waits until a file descriptor is free."""
    async with trio.open_nursery() as outside, generation(tmp_path) as gen:
        stats = await listen(gen, tmp_path, "stats")
        await outside.start(serve_statistics, lambda: None, stats)
        with socket.socket(socket.AF_UNIX) as client:
            with free_descriptors(0):
                client.connect(str(tmp_path / "stats"))
                await until(lambda: "cannot accept connections" in caplog.text)
            client.send(b"json\n")
            await trio.to_thread.run_sync(client.recv, 1, socket.MSG_PEEK)
            assert b'"starting"' in client.recv(65536)


async def test_serve_statistics_of_a_generation_when_accepting_cannot_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of accept(2) that is for good ends the server."""

    async def accept(_: Any) -> Any:
        raise OSError(errno.EINVAL, "for good")

    monkeypatch.setattr(Acceptor, "accept", accept)
    async with generation(tmp_path) as gen:
        stats = await listen(gen, tmp_path, "stats")
        with pytest.RaisesGroup(pytest.RaisesExc(OSError, match="for good")):
            await serve_statistics(lambda: None, stats)


async def test_serve_statistics_policy_of_a_generation(tmp_path: Path) -> None:
    """A client that the policy denies gets no answer."""
    policy = PeerPolicy(uids=[12345])
    async with trio.open_nursery() as outside, generation(tmp_path) as gen:
        stats = await listen(gen, tmp_path, "stats")
        await outside.start(partial(serve_statistics, lambda: None, stats, policy=policy))
        client = await connected(tmp_path / "stats")
        assert await client.line() == b""
        await client.stream.aclose()


async def test_serve_statistics_of_a_generation(tmp_path: Path) -> None:
    """The first generation answers before it is ready, and the successor when it serves."""

    async def ask() -> bytes:
        async with await open_unix_connection(tmp_path / "stats") as conn:
            await conn.send_all(b"json\n")
            return b"".join([chunk async for chunk in conn])

    async with (
        trio.open_nursery() as outside,
        generation(tmp_path) as old,
        trio.open_nursery() as nursery,
    ):
        web, stats = await listen(old, tmp_path), await listen(old, tmp_path, "stats")
        # It returns when the generation has ended.
        await outside.start(serve_statistics, lambda: None, stats)
        assert old.phase.value == "starting"
        assert b'"starting"' in await ask()
        await nursery.start(partial(serve_unix, echo(1), web, generation=old))
        await old.confirmed()
        async with generation(tmp_path) as new, trio.open_nursery() as later:
            listener = await listen(new, tmp_path)
            inherited = await listen(new, tmp_path, "stats")
            await later.start(serve_statistics, lambda: None, [inherited])
            await later.start(partial(serve_unix, echo(2), listener, generation=new))
            await new.confirmed()
            assert b'"starting"' in await ask()
            later.cancel_scope.cancel()
        nursery.cancel_scope.cancel()
