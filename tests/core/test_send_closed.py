"""Sends whose connection is closed or detached while they wait."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from tests._helpers.fds import clog, some, unclog
from tests.core.test_cancellation import BeforeTheTasks
from trio_unixconn import Cancellable, ConnectionClosedError, UnixConnection, connection_pair

BIG = 10_000_000

Send = Callable[[UnixConnection], Awaitable[Any]]
SENDS: dict[str, Send] = {
    "send_message": lambda conn: conn.send_message(b"m" * BIG, fds=[0]),
    "send_all": lambda conn: conn.send_all(b"m" * BIG),
    "send_fds": lambda conn: conn.send_fds([0] * 5000, per_message=1),
}


def detach(conn: UnixConnection) -> None:
    os.close(conn.detach())


def close_socket(conn: UnixConnection) -> None:
    conn.socket.close()


WAYS = [detach, close_socket]


async def check_unrelated() -> None:
    """Another connection waits in both directions, and works: nothing of trio's is left over."""
    one, two = connection_pair()
    async with one, two, trio.open_nursery() as nursery:
        count = clog(one)
        nursery.start_soon(one.send_fd, 0)
        await wait_all_tasks_blocked()
        await unclog(two, count)
        os.close(await two.receive_fd())


async def closed(send: Awaitable[Any], errors: list[ConnectionClosedError]) -> None:
    with pytest.raises(ConnectionClosedError, match="this connection is closed") as caught:
        await send
    errors.append(caught.value)


@pytest.mark.parametrize("name", SENDS)
async def test_send_and_aclose_in_another_task(name: str) -> None:
    """aclose() right after a short write: ConnectionClosedError, and nothing else changes."""
    one, two = connection_pair()
    errors: list[ConnectionClosedError] = []
    async with one, two:
        async with trio.open_nursery() as nursery:
            # In one scheduling round, in either order.
            nursery.start_soon(closed, SENDS[name](one), errors)
            nursery.start_soon(one.aclose)
        (error,) = errors
        if error.sent:
            assert 0 < error.sent < BIG
        await check_unrelated()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SENDS)
async def test_send_and_closed_while_it_waits(
    name: str, way: Callable[[UnixConnection], None]
) -> None:
    """Closed or detached while a send waits: ConnectionClosedError says how much was sent."""
    one, two = connection_pair()
    errors: list[ConnectionClosedError] = []
    async with one, two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(closed, SENDS[name](one), errors)
            await wait_all_tasks_blocked()
            way(one)
        (error,) = errors
        got = 0
        if name == "send_fds":
            while got < error.sent:
                with await two.receive_fds(253) as fds:
                    got += len(fds)
        else:
            while got < error.sent:
                with await two.receive_message(BIG) as message:
                    got += len(message.data)
        assert got == error.sent > 0
        assert await two.receive_some() == b""
        await check_unrelated()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*SENDS, "send_fd", "wait_send_all_might_not_block"])
async def test_send_and_closed_as_it_wakes(
    name: str, way: Callable[[UnixConnection], None]
) -> None:
    """Closed when the kernel has reported space, and before the sending task runs."""
    sends: dict[str, Send] = {
        **SENDS,
        "send_fd": lambda conn: conn.send_fd(0),
        "wait_send_all_might_not_block": lambda conn: conn.wait_send_all_might_not_block(),
    }
    one, two = connection_pair()
    ended: list[object] = []

    async def send() -> None:
        try:
            ended.append(await sends[name](one))
        except ConnectionClosedError as exc:
            ended.append(exc)

    async with one, two:
        clog(one)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            two._receiver.raw.recv(1 << 20)
            BeforeTheTasks(lambda: way(one))
        if name == "wait_send_all_might_not_block":
            # Whether there was room is all that it says.
            assert len(ended) == 1
        else:
            (error,) = ended
            assert isinstance(error, ConnectionClosedError)
            assert error.sent == 0
        await check_unrelated()


@pytest.mark.parametrize("name", [*SENDS, "send_eof", "wait_send_all_might_not_block"])
async def test_send_after_detach(name: str) -> None:
    """After detach(), a send raises ConnectionClosedError and leaves the file descriptor alone."""
    sends: dict[str, Send] = {
        **SENDS,
        "send_eof": lambda conn: conn.send_eof(),
        "wait_send_all_might_not_block": lambda conn: conn.wait_send_all_might_not_block(),
    }
    one, two = connection_pair()
    async with one, two:
        fd = one.detach()
        with assert_checkpoints(), pytest.raises(ConnectionClosedError):
            await sends[name](one)
        assert one._sender.busy is False
        async with UnixConnection.from_fd(fd) as again:
            await again.send_all(b"x")
            assert await two.receive_some() == b"x"
        await check_unrelated()


class AfterStep(trio.abc.Instrument):
    """Does something once, after a task has run for the n-th time."""

    def __init__(self, name: str, steps: int, do: Callable[[], object]) -> None:
        self.name = name
        self.steps = steps
        self.do = do

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Trio calls this."""
        if task.name == self.name:
            self.steps -= 1
            if not self.steps:
                self.do()


@pytest.mark.parametrize("cancellable", [False, True])
@pytest.mark.parametrize("steps", range(1, 12))
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SENDS)
async def test_send_and_closed_after_each_step(
    name: str, way: Callable[[UnixConnection], None], steps: int, *, cancellable: bool
) -> None:
    """At whichever scheduling point it is closed: .sent is what the peer gets, nothing else."""
    one, two = connection_pair()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    options: dict[str, Any] = {"cancellable": Cancellable()} if cancellable else {}
    sends: dict[str, Send] = {
        "send_message": lambda conn: conn.send_message(b"m" * 200_000, fds=[0], **options),
        "send_all": lambda conn: conn.send_all(b"m" * 200_000),
        "send_fds": lambda conn: conn.send_fds([0] * 200, per_message=1, **options),
    }
    result: list[object] = []
    got = 0

    async def send() -> None:
        try:
            result.append(await sends[name](one))
        except ConnectionClosedError as exc:
            result.append(exc)
        await one.aclose()

    async def receive() -> None:
        nonlocal got
        while True:
            with await two.receive_message(1000) as message:
                if not message.data:
                    return
                got += len(message.fds) if name == "send_fds" else len(message.data)
            await trio.lowlevel.checkpoint()

    async def close() -> None:
        await reached.wait()
        if not one.is_closed():
            way(one)

    async with one, two:
        # Another task closes it in the same scheduling round, or in the next one.
        reached = trio.Event()
        instrument = AfterStep("sender", steps, reached.set)
        trio.lowlevel.add_instrument(instrument)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            nursery.start_soon(send, name="sender")
            with trio.fail_after(30):
                await receive()
            nursery.cancel_scope.cancel()
        trio.lowlevel.remove_instrument(instrument)
        (error,) = result
        if isinstance(error, ConnectionClosedError):
            assert got == error.sent
        assert one._sender.busy is False
        await check_unrelated()


async def test_send_fd_and_number_reused() -> None:
    """The number of a connection that was closed while it waits may be another socket by then."""
    one, two = connection_pair()
    errors: list[ConnectionClosedError] = []
    async with one, two:
        clog(one)
        number = one.socket.fileno()
        other, far = socket.socketpair()
        with other, far, some(1) as fds:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(closed, one.send_fds(list(fds)), errors)
                await wait_all_tasks_blocked()
                one.socket.close()
                os.dup2(other.fileno(), number)
            os.close(number)
            far.setblocking(False)
            with pytest.raises(BlockingIOError):
                far.recv(1)
        assert [error.sent for error in errors] == [0]
