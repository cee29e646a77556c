"""A cancelled Cancellable ends its own wait for a socket, and disturbs no other wait."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import outcome
import pytest
import trio
from trio.lowlevel import wait_readable, wait_writable
from trio.testing import wait_all_tasks_blocked

from tests._helpers.fds import clog, unclog
from trio_unixconn import (
    Cancellable,
    ConnectionClosedError,
    OperationCancelled,
    UnixConnection,
    _cancellable,
    connection_pair,
)
from trio_unixconn._cancellable import wait_cancellable

SIZE = 4 * 1024 * 1024

Wait = Callable[[socket.socket], Any]


@pytest.fixture(params=[True, False], autouse=True)
def has_abort_func(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether trio's messages have the attribute that the fast way needs."""
    assert _cancellable._HAS_ABORT_FUNC
    monkeypatch.setattr(_cancellable, "_HAS_ABORT_FUNC", request.param)


async def expect_cancelled(run: Callable[[Cancellable], Awaitable[Any]], by: Cancellable) -> None:
    with pytest.raises(OperationCancelled):
        await run(by)


async def cancel(cancellable: Cancellable, where: str) -> None:
    if where == "thread":
        thread = threading.Thread(target=cancellable.cancel)
        thread.start()
        thread.join()
    else:
        cancellable.cancel()


def waiting() -> tuple[int, int]:
    """Return how many tasks wait for reading and writing, as trio sees it."""
    statistics: Any = trio.lowlevel.current_statistics().io_statistics
    return statistics.tasks_waiting_read, statistics.tasks_waiting_write


async def test_send_all_waits_on() -> None:
    """A sender that waits for space is not ended by the Cancellable of a receiver."""
    one, two = connection_pair()
    cancellable = Cancellable()
    async with one, two, trio.open_nursery() as nursery:
        nursery.start_soon(one.send_all, bytes(SIZE))
        nursery.start_soon(expect_cancelled, one.receive_fd, cancellable)
        await wait_all_tasks_blocked()
        cancellable.cancel()
        await wait_all_tasks_blocked()
        left = SIZE
        with trio.fail_after(30):
            while left:
                left -= len(await two.receive_some())


@pytest.mark.parametrize("where", ["task", "thread"])
async def test_send_fd_leaves_a_trio_receiver_alone(where: str) -> None:
    """A task that waits in conn.socket.recv() is not woken by the Cancellable of a sender."""
    one, two = connection_pair()
    cancellable = Cancellable()
    got: list[bytes] = []

    async def receive() -> None:
        got.append(await one.socket.recv(1))

    async with one, two:
        count = clog(one)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            nursery.start_soon(expect_cancelled, lambda by: one.send_fd(0, by), cancellable)
            await wait_all_tasks_blocked()
            before = waiting()
            await cancel(cancellable, where)
            await wait_all_tasks_blocked()
            assert waiting() == (before[0], before[1] - 1)
            assert got == []
            await two.send_all(b"x")
        assert got == [b"x"]
        await unclog(two, count)


@pytest.mark.parametrize("where", ["task", "thread"])
async def test_receive_fd_leaves_a_trio_sender_alone(where: str) -> None:
    """A task in trio.lowlevel.wait_writable() is not woken by the Cancellable of a receiver."""
    one, two = connection_pair()
    cancellable = Cancellable()
    woken: list[str] = []

    async def wait() -> None:
        await wait_writable(one.socket)
        woken.append("there is room")

    async with one, two:
        count = clog(one)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(expect_cancelled, one.receive_fd, cancellable)
            await wait_all_tasks_blocked()
            await cancel(cancellable, where)
            await wait_all_tasks_blocked()
            assert woken == []
            await unclog(two, count)
        assert woken == ["there is room"]


@pytest.mark.parametrize("where", ["task", "thread"])
async def test_receive_fd_again_after_cancel(where: str) -> None:
    """After a cancelled wait the direction is free: no ConnectionBusyError, and nothing is lost."""
    one, two = connection_pair()
    async with one, two:
        for _ in range(3):
            cancellable = Cancellable()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(expect_cancelled, two.receive_fd, cancellable)
                await wait_all_tasks_blocked()
                before = waiting()
                await cancel(cancellable, where)
            assert waiting()[0] < before[0]
            await one.send_fd(0)
            os.close(await two.receive_fd(Cancellable()))


class BeforeTheTasks(trio.abc.Instrument):
    """Calls something once, when the kernel has reported events and before a task runs."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        trio.lowlevel.add_instrument(self)

    def after_io_wait(self, timeout: float) -> None:
        """Trio calls this."""
        trio.lowlevel.remove_instrument(self)
        self.call()


class BeforeStep(trio.abc.Instrument):
    """Calls something once, when the events have woken a task and before it runs."""

    def __init__(self, name: str, call: Callable[[], object]) -> None:
        self.name = name
        self.call = call
        trio.lowlevel.add_instrument(self)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Trio calls this."""
        if task.name == self.name:
            trio.lowlevel.remove_instrument(self)
            self.call()


Reason = Callable[[UnixConnection, Cancellable, trio.CancelScope], None]


def by_arrival(one: UnixConnection, _: Cancellable, __: trio.CancelScope) -> None:
    one._sender.raw.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"\0\0\0\0")])


def by_cancellable(_: UnixConnection, cancellable: Cancellable, __: trio.CancelScope) -> None:
    cancellable.cancel()


def by_scope(_: UnixConnection, __: Cancellable, scope: trio.CancelScope) -> None:
    scope.cancel()


@pytest.mark.parametrize("first", [by_arrival, by_cancellable, by_scope])
@pytest.mark.parametrize("second", [by_arrival, by_cancellable, by_scope])
@pytest.mark.parametrize("third", [by_arrival, by_cancellable, by_scope])
async def test_receive_fd_with_several_reasons_in_one_round(
    first: Reason, second: Reason, third: Reason
) -> None:
    """Arrival, Cancellable and trio's cancellation in any order: nothing is lost or leaked."""
    one, two = connection_pair()
    cancellable, scope = Cancellable(), trio.CancelScope()
    ended: list[object] = []

    async def receive() -> None:
        with scope:
            try:
                ended.append(await two.receive_fd(cancellable))
            except OperationCancelled as exc:
                ended.append(exc)

    async with one, two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            for reason in (first, second, third):
                reason(one, cancellable, scope)
        reasons = [first, second, third]
        assert waiting() == (1, 0)  # trio's own
        fds = [each for each in ended if isinstance(each, int)]
        assert by_scope not in reasons or fds == ended
        for fd in fds:
            os.close(fd)
        for _ in range(reasons.count(by_arrival) - len(fds)):
            os.close(await two.receive_fd())
        await one.send_all(b"x")
        assert await two.receive_some() == b"x"


@pytest.mark.parametrize("reason", [by_cancellable, by_scope])
async def test_receive_fd_woken_by_the_kernel_first(reason: Reason) -> None:
    """If the kernel has woken the task, a cancellation in the same round does not matter."""
    one, two = connection_pair()
    cancellable, scope = Cancellable(), trio.CancelScope()
    got: list[int] = []

    async def receive() -> None:
        with scope:
            got.append(await two.receive_fd(cancellable))

    async with one, two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive, name="receiver")
            await wait_all_tasks_blocked()
            by_arrival(one, cancellable, scope)
            BeforeStep("receiver", lambda: reason(one, cancellable, scope))
        assert cancellable.is_cancelled() or scope.cancel_called
        (fd,) = got
        os.close(fd)


async def test_receive_fd_woken_for_nothing_and_cancelled() -> None:
    """A wakeup without data, and a Cancellable in the same round: the operation is cancelled."""
    one, two = connection_pair()
    cancellable = Cancellable()
    async with one, two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_cancelled, two.receive_fd, cancellable, name="receiver")
            await wait_all_tasks_blocked()
            one._sender.raw.send(b"x")
            BeforeTheTasks(lambda: two._receiver.raw.recv(1))
            BeforeStep("receiver", cancellable.cancel)
        await one.send_all(b"x")
        assert await two.receive_some() == b"x"


async def test_aclose_while_waiting_with_a_cancellable() -> None:
    """A connection that is closed during the wait is a ConnectionClosedError, as without one."""
    one, two = connection_pair()

    async def receive() -> None:
        with pytest.raises(ConnectionClosedError):
            await two.receive_fd(cancellable)

    cancellable = Cancellable()
    async with one, trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        await two.aclose()
        cancellable.cancel()


async def test_aclose_and_cancel_in_one_round() -> None:
    """Whichever ends the wait first, the other one does nothing more."""
    for order in (1, -1):
        one, two = connection_pair()
        cancellable = Cancellable()
        ended: list[type] = []

        async def receive(conn: UnixConnection, by: Cancellable, ended: list[type]) -> None:
            try:
                await conn.receive_fd(by)
            except (ConnectionClosedError, OperationCancelled) as exc:
                ended.append(type(exc))

        async with one, trio.open_nursery() as nursery:
            nursery.start_soon(receive, two, cancellable, ended)
            await wait_all_tasks_blocked()
            for end in (cancellable.cancel, two.socket.close)[::order]:
                end()
        assert ended == [OperationCancelled if order == 1 else ConnectionClosedError]


################################################################
# The wait itself
################################################################


@pytest.mark.parametrize("cancellable", [None, Cancellable()])
@pytest.mark.parametrize("wait", [wait_readable, wait_writable])
async def test_wait_cancellable_of_a_closed_socket(
    wait: Wait, cancellable: Cancellable | None
) -> None:
    """Waiting for a closed socket raises, and registers nothing for the number -1."""
    closed = socket.socket()
    closed.close()
    for _ in range(2):
        with pytest.raises(ConnectionClosedError, match="this connection is closed"):
            await wait_cancellable(wait, closed, cancellable)


async def test_send_message_then_aclose_leaves_other_connections_alone() -> None:
    """A send that is closed after a short write is ConnectionClosedError; others are not busy."""
    one, two = connection_pair()
    three, four = connection_pair()

    async def send() -> None:
        with pytest.raises(ConnectionClosedError):
            await one.send_message(bytes(10_000_000))

    async with two, three, four:
        for _ in range(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                nursery.start_soon(one.aclose)
        assert waiting() == (1, 0)  # trio's own
        await three.send_fd(0)
        os.close(await four.receive_fd())


async def test_wait_cancellable_cancelled_before() -> None:
    """A wait under a cancelled Cancellable raises at a checkpoint, and registers nothing."""
    one, two = socket.socketpair()
    cancellable = Cancellable()
    cancellable.cancel()
    with one, two:
        with trio.testing.assert_checkpoints(), pytest.raises(OperationCancelled):
            await wait_cancellable(wait_readable, one, cancellable)
        assert waiting() == (1, 0)  # trio's own
        assert not cancellable._targets


async def test_wait_cancellable_of_a_busy_direction() -> None:
    """A direction for which another task waits is trio's BusyResourceError."""
    one, two = socket.socketpair()
    cancellable = Cancellable()
    with one, two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_readable, one)
            await wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await wait_cancellable(wait_readable, one, cancellable)
            two.send(b"x")
        assert not cancellable._targets


async def test_wait_cancellable_cancelled_in_a_run_that_has_ended() -> None:
    """A Cancellable that outlives the trio run of a wait can still be cancelled."""
    cancellable = Cancellable()
    one, two = socket.socketpair()

    async def main() -> None:
        with trio.move_on_after(0.01):
            await wait_cancellable(wait_readable, one, cancellable)

    with one, two:
        await trio.to_thread.run_sync(trio.run, main)
    cancellable.cancel()


async def test_wait_cancellable_of_a_kernel_that_reports_later() -> None:
    """If a wait cannot be aborted immediately, the task sleeps until the kernel has ended it."""
    one, two = socket.socketpair()
    cancellable = Cancellable()
    aborted: list[Callable[[], None]] = []
    woken: list[str] = []

    def abort(raise_cancel: Callable[[], None]) -> trio.lowlevel.Abort:
        aborted.append(raise_cancel)
        return trio.lowlevel.Abort.FAILED

    async def wait(_: socket.socket) -> None:
        await trio.lowlevel.wait_task_rescheduled(abort)

    async def run(wait: Wait) -> None:
        try:
            await wait_cancellable(wait, one, cancellable)
        except OperationCancelled:
            woken.append("cancelled")

    with one, two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, wait)
            await wait_all_tasks_blocked()
            (task,) = nursery.child_tasks
            cancellable.cancel()
            await wait_all_tasks_blocked()
            assert woken == []
            trio.lowlevel.reschedule(task, outcome.capture(aborted[0]))
        assert woken == ["cancelled"]
