"""serve_agent_check: what HAProxy is told, and clients that do not do their part."""

from __future__ import annotations

import math
import socket
import struct
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests._helpers.statistics_samples import STATISTICS, worker
from trio_unixconn import UnixListener, open_unix_connection, open_unix_listener
from trio_unixconn.pool import (
    PoolStatistics,
    WorkerServer,
    _agent_check,
    _exchanges,
    serve_agent_check,
)
from trio_unixconn.pool._health import free_percentage

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

LINE = b"up ready 85% maxconn:20\n"


@attrs.define
class Pool:
    """An object with statistics."""

    value: PoolStatistics = STATISTICS

    def statistics(self) -> PoolStatistics:
        return self.value


def statistics(state: str, *workers: tuple[str, int], queued: int = 0) -> PoolStatistics:
    """Return those of workers with a state and jobs in flight, of ten jobs each."""
    return attrs.evolve(
        STATISTICS,
        state=state,
        workers=tuple(
            attrs.evolve(worker(index, 100 + index, each), in_flight=in_flight)
            for index, (each, in_flight) in enumerate(workers)
        ),
        capacity=10 * sum(each == "ready" for each, _ in workers),
        queued=queued,
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (statistics("ready", ("ready", 0), ("ready", 0)), "up ready 100% maxconn:20"),
        (statistics("ready", ("ready", 5), ("ready", 0)), "up ready 75% maxconn:20"),
        (statistics("ready", ("ready", 5), ("ready", 0), queued=4), "up ready 55% maxconn:20"),
        # A worker that is missing is capacity that is missing.
        (statistics("ready", ("ready", 0), ("starting", 0)), "up ready 50% maxconn:10"),
        # An old worker that drains is none that is missing, and its jobs take nothing.
        (statistics("ready", ("ready", 0), ("draining", 9)), "up ready 100% maxconn:10"),
        # Never 0 % while it can take jobs, however many there are.
        (statistics("ready", ("ready", 10)), "up ready 1% maxconn:10"),
        (statistics("ready", ("ready", 10), queued=1000), "up ready 1% maxconn:10"),
        (statistics("draining", ("ready", 5)), "drain"),
        (statistics("draining"), "drain"),
        (statistics("down", ("starting", 0)), "down #no worker accepts jobs at the moment"),
        (statistics("starting"), "down #the workers are starting"),
        (statistics("failed"), "down #the pool has ended because its workers crashed"),
        (statistics("ended"), "down #the pool has ended"),
    ],
)
def test_agent_answer(value: PoolStatistics, expected: str) -> None:
    """The weight is the part of the whole capacity that is free, and maxconn what there is."""
    assert _agent_check.agent_answer(value) == expected


def test_free_percentage_without_a_worker() -> None:
    """Without a worker that accepts jobs, nothing is free."""
    assert free_percentage(statistics("down", ("starting", 0))) == 0


@asynccontextmanager
async def answering(listeners: Any, source: Any = None) -> AsyncGenerator[Any, None]:
    async with trio.open_nursery() as nursery:
        with trio.fail_after(60):
            yield await nursery.start(serve_agent_check, source or Pool(), listeners)
        nursery.cancel_scope.cancel()


async def rest_of(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([data async for data in stream])


async def test_serve_agent_check_over_tcp_and_unix(tmp_path: Path) -> None:
    """Each connection gets one line, whatever the client sends, and the end of the stream."""
    given: list[trio.SocketListener | UnixListener] = [
        *await trio.open_tcp_listeners(0, host="127.0.0.1"),
        await open_unix_listener(tmp_path / "s"),
    ]
    pool: Any = Pool()
    server = WorkerServer(pool, [])
    async with answering(given, server) as listeners:
        assert listeners == given
        for connect in (
            partial(trio.open_tcp_stream, *given[0].socket.getsockname()),
            partial(open_unix_connection, tmp_path / "s"),
        ):
            for sent in (b"", b"agent-send string\n", bytes(50_000)):
                stream: trio.abc.HalfCloseableStream
                async with await connect() as stream:
                    await stream.send_all(sent)
                    assert await rest_of(stream) == LINE
    assert {each.socket.fileno() for each in given} == {-1}


async def test_serve_agent_check_before_there_is_a_pool() -> None:
    """While the function returns None, the answer is down; afterwards it is up."""
    found: Any = None
    async with answering(("127.0.0.1", 0), lambda: found) as listeners:
        name = listeners[0].socket.getsockname()
        async with await trio.open_tcp_stream(*name) as stream:
            assert await rest_of(stream) == b"down #the workers are starting\n"
        found = Pool()
        async with await trio.open_tcp_stream(*name) as stream:
            assert await rest_of(stream) == LINE


async def test_serve_agent_check_clients_that_never_read_or_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hundreds of clients that do nothing hold up no answer, and are disconnected."""
    # None of them ends because of its time.
    monkeypatch.setattr(_exchanges, "EXCHANGE_TIMEOUT", math.inf)
    monkeypatch.setattr(_exchanges, "CLOSE_TIMEOUT", math.inf)
    async with answering(("127.0.0.1", 0)) as listeners, AsyncExitStack() as stack:
        name = listeners[0].socket.getsockname()
        idle = [
            await stack.enter_async_context(await trio.open_tcp_stream(*name))
            for _ in range(4 * _exchanges.MAX_EXCHANGES)
        ]
        async with await trio.open_tcp_stream(*name) as stream:
            assert await rest_of(stream) == LINE
        # They have their answers all the same.
        for each in idle:
            assert await rest_of(each) == LINE


async def test_serve_agent_check_clients_that_reset_their_connections() -> None:
    """A connection that is reset at once ends nothing else."""
    async with answering(("127.0.0.1", 0)) as listeners:
        name = listeners[0].socket.getsockname()
        for _ in range(50):
            with socket.create_connection(name) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        async with await trio.open_tcp_stream(*name) as stream:
            assert await rest_of(stream) == LINE


async def test_serve_agent_check_closes_after_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that does not close its connection is disconnected."""
    monkeypatch.setattr(_exchanges, "CLOSE_TIMEOUT", 0.01)
    async with (
        answering(("127.0.0.1", 0)) as listeners,
        await trio.open_tcp_stream(*listeners[0].socket.getsockname()) as stream,
    ):
        assert await rest_of(stream) == LINE

        async def is_reset() -> bool:
            try:
                await stream.send_all(b"x")
            except trio.BrokenResourceError:
                return True
            return False

        with trio.fail_after(30):
            while not await is_reset():
                await trio.sleep(0.01)


async def test_serve_agent_check_rejects_invalid_arguments() -> None:
    """Arguments that are not a pool, or not a listener, are an error."""
    wrong: Any = 5
    wrong_listeners: Any = "tcp"
    with pytest.raises(TypeError, match="expected a WorkerServer"):
        await serve_agent_check(wrong, ("127.0.0.1", 0))
    with pytest.raises(TypeError, match=r"expected a trio\.SocketListener or a UnixListener"):
        await serve_agent_check(Pool().statistics, wrong_listeners)  # type: ignore[arg-type]
