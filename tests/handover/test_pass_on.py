"""pass_on() and connections(): each connection has one owner, whatever happens."""

from __future__ import annotations

import os
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests._helpers.fds import free_descriptors
from tests._helpers.waiting import until
from trio_unixconn import (
    ConnectionClosedError,
    ReadAheadError,
    SendError,
    SuccessorGoneError,
    UnixConnection,
    connection_pair,
    testing,
)
from trio_unixconn._frames import encode_frame
from trio_unixconn.handover import _passing, _protocol as of, open_generation
from trio_unixconn.handover._channel import SEND_TIMEOUT, Channel
from trio_unixconn.handover._passing import PassedConnections, Passer
from trio_unixconn.handover._predecessor import Predecessor
from trio_unixconn.handover._protocol import PassedConnection, ProtocolError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path


@asynccontextmanager
async def channels() -> AsyncGenerator[tuple[Channel, Channel], None]:
    one, two = map(Channel, connection_pair())
    try:
        yield one, two
    finally:
        one.close()
        two.close()


async def follow(channel: Channel, passer: Passer) -> None:
    """Do what a generation does with the answers of its successor."""
    while (frame := await channel.receive()) is not None:
        passer.handle(frame)
    passer.end(is_successor_gone=True)


@asynccontextmanager
async def passer_and_successor() -> AsyncGenerator[tuple[Passer, Channel], None]:
    """A passer that runs, and the channel of a successor that answers as a test tells it."""
    async with channels() as (old, new), trio.open_nursery() as nursery:
        passer = Passer(old)
        nursery.start_soon(passer.run)
        nursery.start_soon(follow, old, passer)
        yield passer, new
        new.close()


def tcp_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        two, _ = server.accept()
    first, second = (trio.SocketStream(trio.socket.from_stdlib_socket(each)) for each in (one, two))
    return first, second


async def receive_passed(channel: Channel) -> tuple[int, list[PassedConnection], list[int]]:
    with trio.fail_after(30):
        frame = await channel.receive()
    assert frame is not None
    assert frame.kind == of.PASSED
    assert frame.fds is not None
    return (*of.unpack_passed(frame.body), frame.fds)


async def echo(stream: Any, other: Any) -> None:
    """Check that two streams are the two ends of a connection."""
    await stream.send_all(b"x")
    assert await other.receive_some(10) == b"x"
    await other.send_all(b"y")
    assert await stream.receive_some(10) == b"y"


async def test_pass_on_between_two_generations(tmp_path: Path) -> None:
    """Connections of each kind reach the next generation with their data, and still work."""
    path = tmp_path / "upgrade"
    refusing = UnixConnection.from_stdlib_socket
    async with open_generation(path, name="x") as old:
        await old.ready()
        async with open_generation(path, name="x") as new:
            await new.ready()
            await old.replaced()
            await new.confirmed()
            tcp, tcp_peer = tcp_pair()
            unix, unix_peer = connection_pair()
            one, two = socket.socketpair()
            plain, plain_peer = refusing(one, receive_descriptors=False), refusing(two)
            sources: list[tuple[Any, Any]] = [
                (tcp, tcp_peer),
                (unix, unix_peer),
                (plain, plain_peer),
            ]
            for number, (source, peer) in enumerate(sources):
                await old.pass_on(source, b"%d" % number)
                with trio.fail_after(30):
                    stream, data = await new.connections().__anext__()
                assert data == b"%d" % number
                assert type(stream) is type(source)
                await echo(stream, peer)
                with pytest.raises(trio.ClosedResourceError):
                    await source.send_all(b"x")
                await stream.aclose()
                await peer.aclose()
            assert old._passer is not None
            assert old._passer.taken == new.connections().count == 3


async def test_pass_on_passes_a_burst_in_few_messages() -> None:
    """Many connections at the same time share messages, each with its own data."""
    async with passer_and_successor() as (passer, new), trio.open_nursery() as nursery:
        pairs = [connection_pair() for _ in range(200)]
        for number, (one, _) in enumerate(pairs):
            nursery.start_soon(passer.pass_on, one, b"%d" % number)
        arrived: list[bytes] = []
        messages = 0
        while len(arrived) < len(pairs):
            number, connections, fds = await receive_passed(new)
            messages += 1
            arrived += [each.data for each in connections]
            for fd in fds:
                os.close(fd)
            await new.send(of.pack_id(of.TAKEN, number))
        assert sorted(arrived, key=int) == [b"%d" % number for number in range(200)]
        assert messages < 20
        for _, two in pairs:
            assert await two.receive_some(1) == b""
            await two.aclose()


async def test_pass_on_when_successor_refuses() -> None:
    """What finds no free slot is sent again, fewer at a time, and nothing is lost."""
    async with passer_and_successor() as (passer, new), trio.open_nursery() as nursery:
        pairs = [connection_pair() for _ in range(4)]
        # Until the passer waits for connections; then it sends all of them at once.
        await trio.testing.wait_all_tasks_blocked()
        for one, _ in pairs:
            nursery.start_soon(passer.pass_on, one, b"")
        sizes: list[int] = []
        left = 4
        while left:
            number, connections, fds = await receive_passed(new)
            sizes.append(len(fds))
            assert len(connections) == len(fds)
            for fd in fds:
                os.close(fd)
            if len(sizes) < 4:
                await new.send(of.pack_id(of.REFUSED, number))
            else:
                left -= len(fds)
                await new.send(of.pack_id(of.TAKEN, number))
        assert sizes == sorted(sizes, reverse=True)
        assert (sizes[0], sizes[-1]) == (4, 1)
        for _, two in pairs:
            await two.aclose()


@pytest.mark.parametrize("is_sent", [False, True])
async def test_pass_on_when_successor_ends(*, is_sent: bool) -> None:
    """What the successor has not taken is the caller's again, and still works."""
    async with channels() as (old, new), trio.open_nursery() as nursery:
        passer = Passer(old)
        if is_sent:
            nursery.start_soon(passer.run)
        nursery.start_soon(follow, old, passer)
        one, two = tcp_pair()

        async def end() -> None:
            if is_sent:
                _, _, fds = await receive_passed(new)
                for fd in fds:
                    os.close(fd)
            else:
                await trio.testing.wait_all_tasks_blocked()
            new.close()

        nursery.start_soon(end)
        with pytest.raises(SuccessorGoneError):
            await passer.pass_on(one, b"")
        await echo(one, two)
        with pytest.raises(SuccessorGoneError):
            await passer.pass_on(one, b"")
        await one.aclose()
        await two.aclose()


async def test_pass_on_when_the_message_cannot_be_sent() -> None:
    """If the successor has closed its end, a connection is given back, not sent into nothing."""
    async with channels() as (old, new):
        passer = Passer(old)
        new.close()
        one, two = tcp_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(passer.run)
            nursery.start_soon(follow, old, passer)
            with pytest.raises(SuccessorGoneError):
                await passer.pass_on(one, b"")
        await echo(one, two)
        await one.aclose()
        await two.aclose()


async def test_pass_on_when_a_part_of_the_message_was_sent() -> None:
    """A successor that ends in the middle of a message has not taken the connections in it."""
    async with passer_and_successor() as (passer, new), trio.open_nursery() as nursery:
        # More than the channel holds.
        ((one, two),), errors = await stop_reading(passer, nursery, 1)
        assert passer._is_sending
        assert not errors
        new.close()
    (error,) = errors
    assert "still open here" in str(error)
    await echo(one, two)
    await one.aclose()
    await two.aclose()


async def test_pass_on_with_data_of_any_buffer() -> None:
    """The data is any buffer, and arrives as it was when pass_on() was called."""
    async with passer_and_successor() as (passer, new), trio.open_nursery() as nursery:
        one, two = connection_pair()
        data = bytearray(b"abcd")
        # The passer has begun to wait before; it sends later than the change of the data.
        await trio.testing.wait_all_tasks_blocked()
        junk = testing.clog(passer._channel._conn)
        nursery.start_soon(passer.pass_on, one, memoryview(data).cast("H"))
        await trio.testing.wait_all_tasks_blocked()
        data[:] = b"efgh"
        await testing.unclog(new._conn, junk)
        number, connections, fds = await receive_passed(new)
        assert [each.data for each in connections] == [b"abcd"]
        os.close(*fds)
        await new.send(of.pack_id(of.TAKEN, number))
        await two.aclose()


async def test_pass_on_without_free_descriptors() -> None:
    """A send that has to wait needs a free one: what was not sent is sent again."""
    async with passer_and_successor() as (passer, new), trio.open_nursery() as nursery:
        junk = testing.clog(passer._channel._conn)
        one, two = connection_pair()
        with free_descriptors(0):
            nursery.start_soon(passer.pass_on, one, b"data")
            await until(lambda: passer._retry_at)
            assert not passer._sent
        await testing.unclog(new._conn, junk)
        number, connections, fds = await receive_passed(new)
        assert [each.data for each in connections] == [b"data"]
        for fd in fds:
            os.close(fd)
        await new.send(of.pack_id(of.TAKEN, number))
        await two.aclose()


async def test_passer_run_raises_what_no_time_mends() -> None:
    """A file descriptor that is not open is a fault of the program."""
    async with channels() as (old, _):
        passer = Passer(old)
        assert passer.put(2**20, PassedConnection(accepts_descriptors=True, data=b""))
        with pytest.raises(SendError):
            await passer.run()
        assert not passer.put(2**20, PassedConnection(accepts_descriptors=True, data=b""))


async def test_pass_on_cancelled_before_it_is_sent() -> None:
    """A cancellation before the connection is sent leaves the stream as it was."""
    async with channels() as (old, new), trio.open_nursery() as nursery:
        passer = Passer(old)
        one, two = tcp_pair()
        with trio.move_on_after(0.01) as scope:
            await passer.pass_on(one, b"")
        assert scope.cancelled_caught
        # It is not sent later, either; others are, and nothing is left.
        nursery.start_soon(passer.run)
        with trio.fail_after(30):
            await passer.wait_settled()
        three, four = tcp_pair()
        nursery.start_soon(passer.pass_on, three, b"next")
        _, connections, fds = await receive_passed(new)
        assert [each.data for each in connections] == [b"next"]
        for fd in fds:
            os.close(fd)
        await echo(one, two)
        nursery.cancel_scope.cancel()
    for each in one, two, four:
        await each.aclose()


async def stop_reading(
    passer: Passer, nursery: trio.Nursery, count: int
) -> tuple[list[tuple[trio.SocketStream, trio.SocketStream]], list[object]]:
    """Pass connections on with more data than the channel holds; return them, and the errors."""
    pairs = [tcp_pair() for _ in range(count)]
    errors: list[object] = []

    async def pass_on(stream: trio.SocketStream) -> None:
        try:
            await passer.pass_on(stream, bytes(1024 * 1024))
        except SuccessorGoneError as exc:
            errors.append(exc)

    for one, _ in pairs:
        nursery.start_soon(pass_on, one)
        await trio.testing.wait_all_tasks_blocked()
    return pairs, errors


async def test_pass_on_waits_for_a_successor_that_does_not_read(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It is not taken for dead: when it goes on, it gets the connections, which have one owner."""
    async with passer_and_successor() as (passer, new), trio.open_nursery() as nursery:
        pairs, errors = await stop_reading(passer, nursery, 3)
        await trio.sleep(100 * SEND_TIMEOUT)
        assert not errors
        assert all(one.socket.fileno() != -1 for one, _ in pairs)
        for _ in pairs:
            number, _, fds = await receive_passed(new)
            os.close(*fds)
            await new.send(of.pack_id(of.TAKEN, number))
    assert not errors
    for one, two in pairs:
        assert one.socket.fileno() == -1
        await two.aclose()


async def test_pass_on_while_the_handover_is_ended_here() -> None:
    """What was sent may be the successor's, and is closed here; what was not is the caller's."""
    async with channels() as (old, _), trio.open_nursery() as nursery:
        passer = Passer(old)
        running = trio.CancelScope()

        async def run() -> None:
            with running:
                await passer.run()

        nursery.start_soon(run)
        pairs, errors = await stop_reading(passer, nursery, 6)
        running.cancel()
        await trio.testing.wait_all_tasks_blocked()
        kept = [one for one, _ in pairs if one.socket.fileno() != -1]
        assert len(errors) == 6
        assert 0 < len(kept) < 6
        assert sum("is closed here" in str(each) for each in errors) == 6 - len(kept)
    for one, two in pairs:
        await one.aclose()
        await two.aclose()


async def test_pass_on_cancelled_while_the_handover_is_ended_here() -> None:
    """A cancellation at the same moment closes the stream, too."""
    async with channels() as (old, new):
        passer = Passer(old)
        one, two = tcp_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(passer.pass_on, one, b"")
            nursery.start_soon(passer.run)
            _, _, fds = await receive_passed(new)
            os.close(*fds)
            nursery.cancel_scope.cancel()
            passer.end(is_successor_gone=False)
        assert one.socket.fileno() == -1
        await two.aclose()


async def test_pass_on_reads_what_the_successor_said_before_its_end() -> None:
    """A connection that it has taken is not given back because the next one cannot be sent."""
    async with channels() as (old, new), trio.open_nursery() as nursery:
        passer = Passer(old)
        nursery.start_soon(passer.run)
        one, two = tcp_pair()
        three, four = tcp_pair()
        nursery.start_soon(passer.pass_on, one, b"")
        number, _, fds = await receive_passed(new)
        os.close(*fds)
        await new.send(of.pack_id(of.TAKEN, number))
        new.close()

        async def pass_on() -> None:
            with pytest.raises(SuccessorGoneError, match="still open here"):
                await passer.pass_on(three, b"")

        nursery.start_soon(pass_on)
        await trio.testing.wait_all_tasks_blocked()
        assert one.socket.fileno() != -1
        frame = await old.receive()
        assert frame is not None
        passer.handle(frame)
        assert await old.receive() is None
        passer.end(is_successor_gone=True)
    assert one.socket.fileno() == -1
    await echo(three, four)
    for each in two, three, four:
        await each.aclose()


async def test_connections_lets_other_tasks_run() -> None:
    """An iterator over many connections that have arrived does not keep other tasks waiting."""
    connections = PassedConnections()
    count = 100
    pairs = [socket.socketpair() for _ in range(count)]
    passed = PassedConnection(accepts_descriptors=True, data=b"")
    connections.put([one.detach() for one, _ in pairs], [passed] * count)
    connections.end()
    found: list[object] = []
    turns: list[int] = []

    async def work() -> None:
        while len(found) < count:
            turns.append(len(found))
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        async for stream, _ in connections:
            found.append(stream)
            await stream.aclose()
    assert len(set(turns)) > 2
    for _, two in pairs:
        two.close()


async def test_connections_is_cancelled_between_two() -> None:
    """A cancellation ends the iteration at once, and the next connection is not lost."""
    one, two = socket.socketpair()
    connections = PassedConnections()
    connections.put([one.detach()], [PassedConnection(accepts_descriptors=True, data=b"")])
    with trio.CancelScope() as scope:
        scope.cancel()
        await connections.__anext__()
    assert scope.cancelled_caught
    stream, _ = await connections.__anext__()
    await stream.aclose()
    connections.close()
    two.close()


@pytest.mark.parametrize("answer", [of.TAKEN, of.REFUSED, None])
async def test_pass_on_cancelled_after_it_is_sent(answer: int | None) -> None:
    """A cancellation later closes the stream here; the connection has no second owner."""
    async with passer_and_successor() as (passer, new):
        one, two = tcp_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(passer.pass_on, one, b"")
            number, _, fds = await receive_passed(new)
            nursery.cancel_scope.cancel()
        with pytest.raises(trio.ClosedResourceError):
            await one.send_all(b"x")
        if answer == of.REFUSED:
            for fd in fds:
                os.close(fd)
            await new.send(of.pack_id(of.REFUSED, number))
            # It is not lost: it is sent again.
            number, _, fds = await receive_passed(new)
            await new.send(of.pack_id(of.TAKEN, number))
        elif answer is not None:
            await new.send(of.pack_id(answer, number))
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=fds[0])))
        await echo(stream, two)
        await stream.aclose()
        if answer is None:
            new.close()
        with trio.fail_after(30):
            assert await two.receive_some(1) == b""
        await two.aclose()


async def test_pass_on_cancelled_when_it_was_taken() -> None:
    """A cancellation together with TAKEN closes the stream: the successor has the connection."""
    async with channels() as (old, new):
        passer = Passer(old)
        one, two = tcp_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(passer.pass_on, one, b"")
            nursery.start_soon(passer.run)
            number, _, fds = await receive_passed(new)
            await new.send(of.pack_id(of.TAKEN, number))
            frame = await old.receive()
            assert frame is not None
            nursery.cancel_scope.cancel()
            passer.handle(frame)
        for fd in fds:
            os.close(fd)
        assert one.socket.fileno() == -1
        with trio.fail_after(30):
            assert await two.receive_some(1) == b""
        await two.aclose()


async def test_pass_on_rejects_wrong_arguments(tmp_path: Path) -> None:
    """What cannot be passed on is rejected, and stays the caller's."""
    async with passer_and_successor() as (passer, _):
        one, two = connection_pair()
        with pytest.raises(TypeError, match=r"expected a trio\.SocketStream or a UnixConnection"):
            await passer.pass_on(trio.StapledStream(one, two), b"")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="data"):
            await passer.pass_on(one, "text")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="at most 16777216 bytes"):
            await passer.pass_on(one, bytes(of.MAX_DATA + 1))
        await two.send_fds([0, 0], per_message=1)
        fds = one.fds()
        os.close(await fds.__anext__())
        with pytest.raises(ReadAheadError):
            await passer.pass_on(one, b"")
        os.close(await fds.__anext__())
        await one.aclose()
        await two.aclose()
        with pytest.raises(ConnectionClosedError):
            await passer.pass_on(one, b"")
        tcp, peer = tcp_pair()
        await tcp.aclose()
        await peer.aclose()
        with pytest.raises(ConnectionClosedError):
            await passer.pass_on(tcp, b"")
    async with open_generation(tmp_path / "upgrade", name="x") as gen:
        with pytest.raises(RuntimeError, match="wait for replaced"):
            await gen.pass_on(tcp)


async def test_handle_rejects_an_unknown_id() -> None:
    """An answer to what was not sent is a ProtocolError."""
    async with channels() as (old, new):
        passer = Passer(old)
        await new.send(of.pack_id(of.TAKEN, 7))
        frame = await old.receive()
        assert frame is not None
        with pytest.raises(ProtocolError, match="id of connections"):
            passer.handle(frame)


################################################################
# The other side
################################################################


@asynccontextmanager
async def predecessor(
    connections: PassedConnections,
) -> AsyncGenerator[tuple[Predecessor, Channel, list[Predecessor]], None]:
    async with channels() as (old, new), trio.open_nursery() as nursery:
        draining: list[Predecessor] = []
        found = Predecessor(new, connections, draining)
        draining.append(found)
        nursery.start_soon(found.run)
        try:
            yield found, old, draining
        finally:
            nursery.cancel_scope.cancel()
            connections.close()


async def send_passed(channel: Channel, number: int, count: int) -> None:
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(count)]
    frame = of.pack_passed(number, [PassedConnection(True, b"")] * count)
    await channel.send(frame, fds)
    for fd in fds:
        os.close(fd)


async def test_connections_skips_what_is_no_connection() -> None:
    """A connection that was reset meanwhile, or another file, is closed and skipped."""
    connections = PassedConnections()
    async with predecessor(connections) as (_, old, _):
        await send_passed(old, 1, 1)
        one, two = connection_pair()
        await old.send(of.pack_passed(2, [PassedConnection(True, b"next")]), [one])
        with trio.fail_after(30):
            stream, data = await connections.__anext__()
        assert data == b"next"
        await stream.aclose()
        await one.aclose()
        await two.aclose()


async def test_connections_limits_what_is_received(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that does not ask for connections gets no more than the limit."""
    monkeypatch.setattr(_passing, "_MAX_RECEIVED", 2)
    connections = PassedConnections()
    async with predecessor(connections) as (_, old, _):
        for number in range(3):
            await send_passed(old, number, 2)
        await trio.testing.wait_all_tasks_blocked()
        assert connections.count == 2
        # The iteration skips what is not a connection, and so makes space for all of them.
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                async for _ in connections:
                    pass

            nursery.start_soon(ask)
            await until(lambda: connections.count == 6)
            connections.end()


async def test_predecessor_answers_refused_without_free_slots() -> None:
    """Connections that found no free slot are refused, and sent again later."""
    connections = PassedConnections()
    async with predecessor(connections) as (_, old, _):
        fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]
        with testing.limit_descriptors(2):
            await old.send(of.pack_passed(1, [PassedConnection(True, b"")] * 5), fds)
            with trio.fail_after(30):
                frame = await old.receive()
        assert frame is not None
        assert frame.kind == of.REFUSED
        assert of.unpack_id(frame.body) == 1
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize(
    "frame",
    [
        encode_frame(of.COMMIT),
        encode_frame(of.PASSED, b"x", carries_fds=True),
        of.pack_passed(1, [PassedConnection(True, b"")] * 2),
        b"\xff" * 100,
    ],
)
async def test_predecessor_that_breaks_the_protocol_is_dropped(
    frame: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A draining generation that sends nonsense is dropped and logged; the service goes on."""
    async with predecessor(PassedConnections()) as (_, old, draining):
        with open(os.devnull) as file:
            await old.send(frame, [file] if frame[1] == 1 else [])
        with trio.fail_after(30):
            assert await old.receive() is None
        await until(lambda: not draining)
    assert "broke the protocol" in caplog.text


async def test_predecessor_stop_waits_for_the_rest_of_a_frame() -> None:
    """A channel is taken out between two frames, and nothing that was sent is lost."""
    connections = PassedConnections()
    async with predecessor(connections) as (found, old, _):
        frame = of.pack_passed(1, [PassedConnection(True, b"data")])
        one, two = connection_pair()
        await old._conn.send_message(frame[:10], fds=[one])
        await trio.testing.wait_all_tasks_blocked()
        stopped: list[int | None] = []

        async def stop() -> None:
            stopped.append(await found.stop())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop)
            await trio.testing.wait_all_tasks_blocked()
            assert stopped == []
            await old._conn.send_all(frame[10:])
        assert connections.count == 1
        (fd,) = stopped
        assert fd is not None
        os.close(fd)
        await one.aclose()
        await two.aclose()


async def test_predecessor_stop_in_the_middle_of_a_frame_that_does_not_end(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A generation that was stopped (SIGSTOP) delays no upgrade for good: it drains alone."""
    async with predecessor(PassedConnections()) as (found, old, draining):
        frame = of.pack_passed(1, [PassedConnection(accepts_descriptors=True, data=b"")])
        one, two = connection_pair()
        await old._conn.send_message(frame[:10], fds=[one])
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(10 * SEND_TIMEOUT):
            assert await found.stop() is None
        assert not draining
        assert await old.receive() is None
        await one.aclose()
        # The copy that had arrived is closed, too.
        assert await two.receive_some(1) == b""
        await two.aclose()
    assert "has not sent the rest of a frame" in caplog.text


async def test_predecessor_stop_when_it_has_ended() -> None:
    """A generation that has ended has no channel to pass on."""
    async with predecessor(PassedConnections()) as (found, old, draining):
        old.close()
        await until(lambda: not draining)
        assert await found.stop() is None


async def test_pass_on_cancelled_just_before_the_successor_ends() -> None:
    """The stream stays the caller's: it was not sent."""
    async with channels() as (old, _), trio.open_nursery() as nursery:
        passer = Passer(old)
        one, two = connection_pair()
        nursery.start_soon(passer.pass_on, one, b"")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        passer.end(is_successor_gone=True)
    async with one, two:
        await echo(one, two)


async def test_put_passes_a_connection_on_without_a_task() -> None:
    """It is sent as others are, and closed here; without a successor it stays the caller's."""
    one, two = socket.socketpair()
    connection = PassedConnection(accepts_descriptors=True, data=b"x", server="web")
    with one, two:
        await put_and_settle(one, connection)


async def put_and_settle(one: socket.socket, connection: PassedConnection) -> None:
    async with passer_and_successor() as (passer, new), trio.open_nursery() as nursery:
        assert passer.put(os.dup(one.fileno()), connection)
        settled = trio.Event()

        async def wait() -> None:
            await passer.wait_settled()
            settled.set()

        nursery.start_soon(wait)
        number, connections, fds = await receive_passed(new)
        assert connections == [connection]
        for fd in fds:
            os.close(fd)
        await trio.testing.wait_all_tasks_blocked()
        assert not settled.is_set()
        await new.send(of.pack_id(of.TAKEN, number))
        with trio.fail_after(30):
            await settled.wait()
        passer.end(is_successor_gone=True)
        assert not passer.put(one.fileno(), connection)


async def test_connections_of_a_server_that_is_not_here(caplog: pytest.LogCaptureFixture) -> None:
    """They are closed, and counted in the log."""
    connections = PassedConnections()
    pairs = [socket.socketpair() for _ in range(2)]
    unknown = PassedConnection(accepts_descriptors=True, data=b"", server="none")
    connections.put([os.dup(one.fileno()) for one, _ in pairs], [unknown] * 2)
    for one, two in pairs:
        one.close()
        two.settimeout(30)
        assert two.recv(1) == b""
        two.close()
    connections.close()
    assert "2 connections of 'none' are closed: it is not served here" in caplog.messages
