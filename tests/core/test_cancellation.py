"""Cancellation of each operation at each await: nothing is lost, and nothing leaks."""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock, assert_checkpoints, wait_all_tasks_blocked

from tests._helpers.fds import clog, unclog
from trio_unixconn import Cancellable, OperationCancelled, UnixConnection, connection_pair
from trio_unixconn._cancellable import sleep_cancellable

RECEIVES = ["receive_fd", "receive_credentials"]
SENDS = ["send_fd", "send_credentials"]

Operation = Callable[["Cancellable | None"], Awaitable[Any]]


def operation(conn: UnixConnection, name: str) -> Operation:
    method = getattr(conn, name)
    if name == "send_fd":
        return lambda cancellable: method(0, cancellable)
    return method  # type: ignore[no-any-return]


async def expect_cancelled(run: Operation, cancellable: Cancellable) -> None:
    with pytest.raises(OperationCancelled):
        await run(cancellable)


async def by_scope(run: Operation) -> None:
    """A trio scope that another task cancels."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, None)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def by_deadline(run: Operation) -> None:
    """A trio deadline."""
    with trio.move_on_after(10) as scope:
        await run(None)
    assert scope.cancelled_caught


async def before_by_scope(run: Operation) -> None:
    """A trio scope that is cancelled already."""
    with trio.CancelScope() as scope:
        scope.cancel()
        await run(None)
    assert scope.cancelled_caught


async def by_another_task(run: Operation) -> None:
    """A Cancellable that another task cancels."""
    cancellable = Cancellable()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_cancelled, run, cancellable)
        await wait_all_tasks_blocked()
        cancellable.cancel()


async def by_thread(run: Operation) -> None:
    """A Cancellable that a thread cancels."""
    cancellable = Cancellable()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_cancelled, run, cancellable)
        await wait_all_tasks_blocked()
        thread = threading.Thread(target=cancellable.cancel)
        thread.start()
    thread.join()


async def before(run: Operation) -> None:
    """A Cancellable that is cancelled already, in the same task."""
    cancellable = Cancellable()
    cancellable.cancel()
    with assert_checkpoints():
        await expect_cancelled(run, cancellable)


async def both_at_once(run: Operation) -> None:
    """A Cancellable and a trio scope in one scheduling round: trio's cancellation propagates."""
    cancellable = Cancellable()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, cancellable)
        await wait_all_tasks_blocked()
        cancellable.cancel()
        nursery.cancel_scope.cancel()


WAYS = [
    by_scope,
    by_deadline,
    before_by_scope,
    by_another_task,
    by_thread,
    before,
    both_at_once,
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RECEIVES)
async def test_receive_cancelled_while_it_waits(
    name: str, way: Callable[[Operation], Awaitable[None]], autojump_clock: MockClock
) -> None:
    """A receive that is cancelled while it waits has read nothing and changed nothing."""
    one, two = connection_pair()
    async with one, two:
        await way(operation(two, name))
        await one.send_all(b"x")
        assert await two.receive_some(1) == b"x"
        await one.send_fd(0)
        fd = await two.receive_fd()
        assert os.path.sameopenfile(fd, 0)
        os.close(fd)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SENDS)
async def test_send_cancelled_while_it_waits(
    name: str, way: Callable[[Operation], Awaitable[None]], autojump_clock: MockClock
) -> None:
    """A send that is cancelled while the socket is full has sent nothing."""
    one, two = connection_pair()
    async with one, two:
        count = clog(one)
        await way(operation(one, name))
        await unclog(two, count)
        await one.send_all(b"x")
        assert await two.receive_some() == b"x"


@pytest.mark.parametrize("way", [before_by_scope, before])
@pytest.mark.parametrize("name", SENDS + RECEIVES)
async def test_send_and_receive_cancelled_before(
    name: str, way: Callable[[Operation], Awaitable[None]]
) -> None:
    """An operation that is cancelled already does not touch the socket, even if it is ready."""
    one, two = connection_pair()
    async with one, two:
        await two.send_fd(0)
        await way(operation(one, name))
        os.close(await one.receive_fd())
        await one.send_all(b"x")
        assert await two.receive_some() == b"x"


@pytest.mark.parametrize("cancel", ["scope", "cancellable"])
async def test_receive_fd_cancelled_after_recvmsg(cancel: str) -> None:
    """A cancellation after recvmsg(2), in the same scheduling round, does not lose the result."""
    one, two = connection_pair()
    cancellable = Cancellable()
    got: list[int] = []

    async def receive(scope: trio.CancelScope) -> None:
        with scope:
            got.append(await two.receive_fd(cancellable))

    async with one, two:
        await one.send_fd(0)
        scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive, scope)

            def end(_: object) -> None:
                cancellable.cancel() if cancel == "cancellable" else scope.cancel()

            # Runs when receive_fd() is at its only scheduling point.
            trio.lowlevel.add_instrument(After(two, end))
        assert cancellable.is_cancelled() or scope.cancel_called
        assert len(got) == 1
        os.close(got[0])


class After(trio.abc.Instrument):
    """Calls something when a task that receives from a connection has made a step."""

    def __init__(self, conn: UnixConnection, do: Callable[[object], None]) -> None:
        self.conn = conn
        self.do = do

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Trio calls this."""
        if self.conn._receiver.busy:
            self.do(task)
            trio.lowlevel.remove_instrument(self)


@pytest.mark.parametrize("cancel", ["scope", "cancellable"])
@pytest.mark.parametrize("name", RECEIVES)
async def test_receive_cancelled_as_data_arrives(name: str, cancel: str) -> None:
    """Arrival and cancellation in one round: this receive or the next one returns the data."""
    one, two = connection_pair()
    cancellable = Cancellable()
    got: list[Any] = []

    async def receive() -> None:
        try:
            got.append(await operation(two, name)(cancellable))
        except OperationCancelled:
            got.append(None)

    async with one, two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            if name == "receive_fd":
                await one.send_fd(0)
            else:
                await one.send_credentials()
            if cancel == "scope":
                nursery.cancel_scope.cancel()
            else:
                cancellable.cancel()
        if got in ([], [None]):
            got = [await operation(two, name)(None)]
        assert len(got) == 1
        if name == "receive_fd":
            os.close(got[0])


class BeforeTheTasks(trio.abc.Instrument):
    """Calls something once, when the kernel has reported events and before a task runs."""

    def __init__(self, do: Callable[[], object]) -> None:
        self.do = do
        trio.lowlevel.add_instrument(self)

    def after_io_wait(self, timeout: float) -> None:
        """Trio calls this."""
        trio.lowlevel.remove_instrument(self)
        self.do()


async def test_receive_fd_woken_for_nothing() -> None:
    """A receive that is woken for bytes that another reader has taken waits again."""
    one, two = connection_pair()
    got: list[int] = []

    async def receive() -> None:
        got.append(await two.receive_fd())

    async with one, two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            one._sender.raw.send(b"x")
            BeforeTheTasks(lambda: two._receiver.raw.recv(1))
            await wait_all_tasks_blocked()
            assert got == []
            await one.send_fd(0)
        os.close(got[0])


@pytest.mark.parametrize("name", ["send_fd", "send_all"])
async def test_send_woken_for_nothing(name: str) -> None:
    """A send that is woken for space that another writer has taken waits again."""
    one, two = connection_pair()
    count = clog(one)
    async with one, two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(getattr(one, name), 0 if name == "send_fd" else b"x")
            await wait_all_tasks_blocked()
            while count:
                count -= len(two._receiver.raw.recv(min(65536, count)))
            counts: list[int] = []
            BeforeTheTasks(lambda: counts.append(clog(one)))
            await wait_all_tasks_blocked()
            await unclog(two, counts[0])
        if name == "send_fd":
            os.close(await two.receive_fd())
        else:
            assert await two.receive_some() == b"x"


@pytest.mark.parametrize("name", SENDS + RECEIVES)
async def test_reset_while_a_cancelled_operation_unwinds(name: str) -> None:
    """An operation that is cancelled already stays so, even if its Cancellable is reset."""
    one, two = connection_pair()
    cancellable = Cancellable()
    cancellable.cancel()
    async with one, two:
        await two.send_fd(0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_cancelled, operation(one, name), cancellable)
            nursery.start_soon(trio.to_thread.run_sync, cancellable.reset)
        os.close(await one.receive_fd())
        await one.send_all(b"x")
        assert await two.receive_some() == b"x"


@pytest.mark.parametrize("bad", [0, False, "x", trio.CancelScope, object()])
@pytest.mark.parametrize("name", SENDS + RECEIVES)
async def test_operations_reject_wrong_cancellable(name: str, bad: Any) -> None:
    """What is not a Cancellable is a TypeError, before anything happens."""
    one, two = connection_pair()
    async with one, two:
        with pytest.raises(TypeError, match="cancellable must be a Cancellable or None"):
            await operation(one, name)(bad)
        await one.send_all(b"x")
        assert await two.receive_some() == b"x"


async def test_send_fd_cancelled_while_another_task_receives() -> None:
    """A Cancellable that ends a send does not disturb a receive on the same socket."""
    one, two = connection_pair()
    async with one, two:
        clog(one)
        cancellable = Cancellable()
        got: list[bytes] = []

        async def receive() -> None:
            got.append(await one.receive_some(1))

        async def send() -> None:
            with pytest.raises(OperationCancelled):
                await one.send_fd(0, cancellable)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            cancellable.cancel()
            await wait_all_tasks_blocked()
            assert got == []
            await two.send_all(b"x")
        assert got == [b"x"]


async def test_cancel_and_reset_while_others_wait() -> None:
    """A Cancellable ends only the operations that it was passed to."""
    one, two = connection_pair()
    async with one, two, trio.open_nursery() as nursery:
        cancellable = Cancellable()
        ended: list[str] = []

        async def receive(conn: UnixConnection, own: Cancellable | None, name: str) -> None:
            try:
                await conn.receive_fd(own)
            except OperationCancelled:
                ended.append(name)

        nursery.start_soon(receive, one, cancellable, "mine")
        nursery.start_soon(receive, two, Cancellable(), "other")
        await wait_all_tasks_blocked()
        cancellable.cancel()
        cancellable.reset()
        await wait_all_tasks_blocked()
        assert ended == ["mine"]
        nursery.cancel_scope.cancel()


async def test_sleep_cancellable(autojump_clock: MockClock) -> None:
    """A Cancellable ends a backoff, where there is nothing to poll for, too."""
    cancellable = Cancellable()
    async with trio.open_nursery() as nursery:

        async def cancel() -> None:
            await trio.sleep(1)
            cancellable.cancel()

        nursery.start_soon(cancel)
        begun = trio.current_time()
        with pytest.raises(OperationCancelled):
            await sleep_cancellable(60, cancellable)
        assert trio.current_time() - begun == pytest.approx(1)
