"""submit() and call(): acknowledgements, answers, a full queue, cancellation, arguments."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import resource
import signal
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests._helpers import pool_handlers
from tests._helpers.pool import Client, at_rest, check_sums, client_of, ends, lines, null, pids
from tests._helpers.waiting import until
from trio_unixconn import HandlerError, JobRefusedError, PoolClosedError, WorkerDiedError
from trio_unixconn.pool import open_worker_pool

if TYPE_CHECKING:
    from pathlib import Path

    from trio_unixconn.pool import JobReceipt, WorkerPool

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_child_left", "unmeasured_processes")]

DO = "tests._helpers.pool_handlers:do"
HOLD = "tests._helpers.pool_handlers:hold"


################################################################
# Acknowledged
################################################################


async def test_submit_distributes_jobs_evenly(shared: Path) -> None:
    """Connections that stay open are spread evenly, and receipts name their workers."""
    async with open_worker_pool(HOLD, workers=3) as pool, trio.open_nursery() as nursery:
        clients = []
        for _ in range(9):
            client, theirs = ends()
            client.receipt = await pool.submit(theirs)
            clients.append(client)
            # One that has just got a job gets no other before it has asked for that.
            await until(lambda: all(link._wants_more for link in pool._supervisor.handles()))
        for client in clients:
            assert client.receipt is not None
            assert await client.line() == [client.receipt.pid, client.receipt.id]
        found = pool.statistics()
        assert [each.in_flight for each in found.workers] == [3, 3, 3]
        assert (found.submitted, found.acknowledged, found.in_flight) == (9, 9, 9)
        check_sums(found)
        for client in clients:
            nursery.start_soon(client.end)
        assert (await at_rest(pool)).handled == 9


async def test_submit_worker(shared: Path) -> None:
    """A pinned job goes to its worker, even if another one is less busy."""
    async with open_worker_pool(HOLD, workers=2) as pool:
        for _ in range(3):
            client, theirs = ends()
            receipt = await pool.submit(theirs, worker=1)
            assert (receipt.worker, receipt.pid) == (1, pids(pool)[1])
            await client.end()


async def test_submit_300_times_at_once() -> None:
    """Hundreds of jobs that are submitted at once are all handled, each once, by all workers."""
    receipts: list[JobReceipt] = []

    async def submit() -> None:
        client, theirs = ends()
        async with client.stream:
            receipts.append(await pool.submit(theirs, data=b"x"))
            told = await client.told()
            assert (told["id"], told["pid"]) == (receipts[-1].id, receipts[-1].pid) or told["data"]

    async with open_worker_pool(
        "tests._helpers.pool_handlers:tell", workers=2, max_in_flight=30
    ) as pool:
        async with trio.open_nursery() as nursery:
            for _ in range(300):
                nursery.start_soon(submit)
        found = await at_rest(pool)
        assert (found.submitted, found.acknowledged, found.handled) == (300, 300, 300)
        assert len({each.id for each in receipts}) == 300
        assert all(each.handled > 50 for each in found.workers)


################################################################
# Answered
################################################################


async def test_call_returns_the_answer() -> None:
    """A call returns what its handler returns, up to 16 MiB; its data can be as large."""
    async with open_worker_pool(DO, workers=1) as pool:
        assert await pool.call() == b"nothing to do"
        assert await pool.call(null(), data=b"pid") == str(pids(pool)[0]).encode()
        assert await pool.call(data=b"return much") == bytes(pool_handlers.LARGEST)
    async with open_worker_pool("tests._helpers.pool_handlers:length", workers=1) as pool:
        for data in b"", memoryview(b"12345"), bytearray(100_000), bytes(pool_handlers.LARGEST):
            assert int(await pool.call(data=data)) == len(data)


@pytest.mark.measured
async def test_call_raises_handler_error(caplog: pytest.LogCaptureFixture) -> None:
    """If a handler raises, or does not return bytes, its caller alone gets an error; no log."""
    async with open_worker_pool(DO, workers=1) as pool:
        with pytest.raises(HandlerError, match="RuntimeError: the handler says no") as caught:
            await pool.call(data=b"raise")
        assert "Traceback (most recent call last)" in caught.value.traceback
        with pytest.raises(HandlerError, match="must return bytes, got NoneType"):
            await pool.call(data=b"return nothing")
        with pytest.raises(HandlerError, match="at most 16777216 bytes, got 16777217"):
            await pool.call(data=b"return too much")
        with pytest.raises(HandlerError, match="KeyError: 'no such deed'"):
            await pool.call(data=b"no such deed")
        assert await pool.call() == b"nothing to do"
        assert ((await at_rest(pool)).failed, pool.statistics().handled) == (4, 1)
    assert caplog.messages == []


async def test_submit_of_a_job_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """A job that fails is logged, counted, and its stream closed."""
    async with open_worker_pool(DO, workers=1) as pool:
        async with client_of(pool, data=b"raise") as client:
            assert await client.read() == b""
        assert (await at_rest(pool)).failed == 1
    (message,) = caplog.messages
    assert message.startswith("worker 0 (pid ")
    assert message.endswith("RuntimeError: the handler says no")


async def test_call_raises_worker_died_error(shared: Path) -> None:
    """A call whose worker dies fails, and is not retried; the next one succeeds."""
    async with open_worker_pool(DO, workers=1) as pool:
        with pytest.raises(WorkerDiedError, match=r"exited with status 7 while it handled job 1"):
            await pool.call(data=b"end")
        assert await pool.call() == b"nothing to do"
        found = await at_rest(pool)
        assert (found.abandoned, found.deaths, found.restarts) == (1, 1, 1)


################################################################
# A full queue
################################################################


def has(receipts: list[JobReceipt], count: int) -> bool:
    return len(receipts) >= count


def has_begun(client: Client) -> bool:
    return client.stream.socket.is_readable()


async def test_submit_waits_while_max_queue_is_reached(shared: Path) -> None:
    """submit() waits while max_in_flight and max_queue are reached."""
    receipts: list[JobReceipt] = []
    async with (
        open_worker_pool(HOLD, workers=2, max_in_flight=2, max_queue=3) as pool,
        trio.open_nursery() as nursery,
    ):
        clients = []

        async def submit(theirs: Any) -> None:
            receipts.append(await pool.submit(theirs))

        for _ in range(10):
            client, theirs = ends()
            clients.append(client)
            nursery.start_soon(submit, theirs)
        await until(lambda: len(receipts) == 4)
        await wait_all_tasks_blocked()
        found = pool.statistics()
        assert (found.in_flight, found.queued, found.submitted) == (4, 3, 7)
        check_sums(found)
        for done in range(1, 11):
            # A job that was taken begins a moment later.
            await until(lambda: any(map(has_begun, clients)))
            began = list(filter(has_begun, clients))
            assert len(began) <= 4
            clients.remove(began[0])
            await began[0].end()
            await until(partial(has, receipts, min(10, 4 + done)))
            assert pool.statistics().in_flight <= 4
        await at_rest(pool)
    assert len({each.id for each in receipts}) == 10


async def test_statistics_of_times(shared: Path) -> None:
    """The statistics have the age of the queue, the time until jobs are accepted, and handling."""
    async with (
        open_worker_pool(HOLD, workers=1, max_in_flight=1) as pool,
        trio.open_nursery() as nursery,
    ):
        second, theirs = ends()
        async with client_of(pool) as first, second.stream:
            begin = trio.current_time()
            nursery.start_soon(pool.submit, theirs)
            await until(lambda: pool.statistics().queue_age > 0.05)
            found = pool.statistics()
            assert found.queue_age <= trio.current_time() - begin
            assert (found.wait.count, found.handling.count) == (1, 0)
            await first.end()
            await second.line()
            found = pool.statistics()
            assert (found.queue_age, found.wait.count, found.handling.count) == (0.0, 2, 1)
            assert found.wait.sum > 0.05
            # The first job was handled for as long as the second one was queued.
            assert found.handling.sum > 0.05
        assert (await at_rest(pool)).handling.count == 2


async def test_submit_that_waits_for_a_slot_while_the_pool_drains(shared: Path) -> None:
    """A submitter that waits for a slot gets JobRefusedError when the pool drains."""
    async with open_worker_pool(HOLD, workers=1, max_in_flight=1, max_queue=1) as pool:
        async with client_of(pool):
            async with trio.open_nursery() as nursery:
                waiting = [ends() for _ in range(2)]

                async def submit(theirs: Any, said: str) -> None:
                    with pytest.raises(JobRefusedError, match=said):
                        await pool.submit(theirs)

                nursery.start_soon(submit, waiting[0][1], "the pool ended")
                await wait_all_tasks_blocked()
                nursery.start_soon(submit, waiting[1][1], "the pool is draining")
                await wait_all_tasks_blocked()
                await pool.drain(0)
            for client, _ in waiting:
                # It was the pool's, and is closed.
                assert await client.read() == b""
                await client.end()
        with pytest.raises(PoolClosedError):
            await pool.submit(0)
        os.fstat(0)
        check_sums(pool.statistics())


################################################################
# Cancelled
################################################################


async def test_submit_that_is_cancelled_before() -> None:
    """A cancelled task has submitted nothing, and its source is closed."""
    async with open_worker_pool(DO, workers=1) as pool:
        client, theirs = ends()
        with trio.CancelScope() as scope:
            scope.cancel()
            await pool.submit(theirs)
        assert scope.cancelled_caught
        async with client.stream:
            assert await client.read() == b""
        assert pool.statistics().submitted == 0


async def test_submit_cancelled_in_the_queue(shared: Path) -> None:
    """A job that is cancelled in the queue is never handled, and its file descriptor is closed."""
    async with open_worker_pool(HOLD, workers=1, max_in_flight=1, max_queue=2) as pool:
        async with client_of(pool) as first, trio.open_nursery() as nursery:
            pairs = [ends() for _ in range(3)]
            scopes = [trio.CancelScope() for _ in pairs]

            async def submit(number: int) -> None:
                with scopes[number]:
                    await pool.submit(pairs[number][1])

            for number in range(3):
                nursery.start_soon(submit, number)
                await wait_all_tasks_blocked()
            # Two are in the queue, the last one waits for a slot.
            assert (pool.statistics().queued, pool.statistics().submitted) == (2, 3)
            for scope in reversed(scopes):
                scope.cancel()
            await wait_all_tasks_blocked()
            assert all(scope.cancelled_caught for scope in scopes)
            for client, _ in pairs:
                assert await client.read() == b""
                await client.end()
            await first.end()
        found = await at_rest(pool)
        assert (found.cancelled, found.handled) == (2, 1)
    assert lines(shared / "began") == ["1"]


async def test_submit_cancelled_after_it_was_sent(shared: Path) -> None:
    """A job that was sent is not taken back: a cancelled submit waits, and returns."""
    async with open_worker_pool(HOLD, workers=1) as pool:
        (pid,) = pids(pool)
        client, theirs = ends()
        async with client.stream, trio.open_nursery() as nursery:
            os.kill(pid, signal.SIGSTOP)
            receipts: list[JobReceipt] = []
            scope = trio.CancelScope()

            async def submit() -> None:
                with scope:
                    receipts.append(await pool.submit(theirs))

            nursery.start_soon(submit)
            await wait_all_tasks_blocked()
            scope.cancel()
            await wait_all_tasks_blocked()
            assert receipts == []
            os.kill(pid, signal.SIGCONT)
            assert await client.line() == [pid, 1]
            await until(lambda: bool(receipts))
        assert not scope.cancelled_caught
        found = await at_rest(pool)
        assert (found.handled, found.cancelled) == (1, 0)


async def test_submit_cancelled_after_it_was_sent_to_a_worker_that_dies(shared: Path) -> None:
    """A cancelled job that its worker has not acknowledged at its death goes to no other one."""
    async with open_worker_pool(HOLD, workers=2) as pool:
        pid = pids(pool)[0]
        client, theirs = ends()
        async with client.stream, trio.open_nursery() as nursery:
            os.kill(pid, signal.SIGSTOP)
            scope = trio.CancelScope()

            async def submit() -> None:
                with scope:
                    await pool.submit(theirs, worker=0)

            nursery.start_soon(submit)
            await wait_all_tasks_blocked()
            scope.cancel()
            os.kill(pid, signal.SIGKILL)
            assert await client.read() == b""
        assert scope.cancelled_caught
        found = await at_rest(pool)
        assert (found.cancelled, found.retried, found.acknowledged) == (1, 0, 0)
    assert lines(shared / "began") == []


async def test_call_cancelled_at_any_moment(shared: Path) -> None:
    """When a call is cancelled, so is its handler, in each state of the job, and ends first."""
    async with open_worker_pool(DO, workers=2, max_in_flight=50) as pool:
        for number in range(200):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call_forever, pool)
                for _ in range(number % 9):
                    await trio.lowlevel.checkpoint()
                # The job is queued, sent or acknowledged now, or its handler has begun.
                nursery.cancel_scope.cancel()
        found = await at_rest(pool)
        assert found.submitted > 100
        assert found.failed + found.cancelled == found.submitted
        assert lines(shared / "began") == lines(shared / "ended")


async def call_forever(pool: WorkerPool) -> None:
    await pool.call(data=b"forever")


async def test_call_cancelled_while_its_handler_runs(shared: Path) -> None:
    """A cancelled call ends when its handler has cleaned up; others go on."""
    async with open_worker_pool(DO, workers=1) as pool, trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as calls:
                calls.start_soon(call_forever, pool)
                await until(lambda: len(lines(shared / "began")) == 1)
                scope.cancel()
        assert scope.cancelled_caught
        assert lines(shared / "ended") == ["1"]
        assert await pool.call() == b"nothing to do"
        # If the handler returns an answer all the same, the call returns it.
        answers: list[bytes] = []
        late = trio.CancelScope()

        async def call() -> None:
            with late:
                answers.append(await pool.call(data=b"stubborn"))

        nursery.start_soon(call)
        await until(lambda: len(lines(shared / "began")) == 2)
        late.cancel()
        await until(lambda: bool(answers))
        assert answers == [b"all the same"]


async def test_call_cancelled_whose_worker_dies(shared: Path) -> None:
    """A cancelled call ends as cancelled, even if its worker dies before its handler has ended."""
    async with open_worker_pool(DO, workers=1) as pool:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call_forever, pool)
                await until(lambda: lines(shared / "began") == ["1"])
                os.kill(pids(pool)[0], signal.SIGSTOP)
                scope.cancel()
                os.kill(pids(pool)[0], signal.SIGKILL)
        assert scope.cancelled_caught
        assert (await at_rest(pool)).abandoned == 1


################################################################
# File descriptors that other code closes
################################################################


async def call_without(pool: WorkerPool) -> None:
    with pytest.raises(HandlerError, match="NoneType"):
        await pool.call()


async def test_submit_of_descriptors_that_other_code_closes(shared: Path) -> None:
    """If other code closes file descriptors of the pool, only their jobs are rejected."""
    async with open_worker_pool(HOLD, workers=1, max_in_flight=4) as pool:
        errors: list[JobRefusedError] = []
        async with contextlib.AsyncExitStack() as stack:
            busy = [await stack.enter_async_context(client_of(pool)) for _ in range(4)]
            async with trio.open_nursery() as nursery:
                pairs = [ends() for _ in range(3)]
                fds = [theirs.detach() for _, theirs in pairs]

                async def submit(fd: int) -> None:
                    try:
                        await pool.submit(fd)
                    except JobRefusedError as exc:
                        errors.append(exc)

                for fd in fds:
                    nursery.start_soon(submit, fd)
                    await wait_all_tasks_blocked()
                nursery.start_soon(call_without, pool)
                await wait_all_tasks_blocked()
                os.close(fds[0])
                os.close(fds[2])
                for client in busy:
                    # At once, so that one message would carry all.
                    client.stream.socket.close()
                assert (await pairs[1][0].line())[1] == 6
                for client, _ in pairs:
                    await client.end()
            assert len(errors) == 2
            assert all("other code has closed its file descriptor" in str(each) for each in errors)
        found = await at_rest(pool)
        assert (found.handled, found.failed) == (5, 1)
        assert (found.rejected, found.deaths) == (2, 0)
    # The numbers may be those of other files by now, which must not be closed.
    gc.collect()


async def test_submit_of_the_only_descriptor_that_other_code_closes(shared: Path) -> None:
    """A worker that could not be sent the only job of a batch gets the next one."""
    async with open_worker_pool(HOLD, workers=1, max_in_flight=1) as pool:
        async with client_of(pool) as first, trio.open_nursery() as nursery:
            client, theirs = ends()
            fd = theirs.detach()

            async def submit() -> None:
                with pytest.raises(
                    JobRefusedError, match="other code has closed its file descriptor"
                ):
                    await pool.submit(fd)

            nursery.start_soon(submit)
            await wait_all_tasks_blocked()
            os.close(fd)
            await first.end()
        await client.end()
        async with client_of(pool) as last:
            assert (await last.line())[1] == 3


################################################################
# Arguments, and other threads
################################################################


@pytest.mark.parametrize(
    ("worker", "error", "message"),
    [
        (True, TypeError, "worker must be an int or None, got bool"),
        (0.5, TypeError, "worker must be an int or None, got float"),
        ("0", TypeError, "worker must be an int or None, got str"),
        (-1, ValueError, "worker must be the index of a worker, below 1, got -1"),
        (1, ValueError, "worker must be the index of a worker, below 1, got 1"),
    ],
)
async def test_submit_rejects_invalid_worker(
    worker: Any, error: type[Exception], message: str
) -> None:
    """An invalid index of a worker is an error, and the source is untouched."""
    async with open_worker_pool(DO, workers=1) as pool:
        client, theirs = ends()
        async with client.stream:
            for operation in pool.submit, pool.call:
                with pytest.raises(error, match=message):
                    await operation(theirs, worker=worker)
            assert theirs.fileno() >= 0
            theirs.close()


async def test_call_timeout(shared: Path) -> None:
    """A call whose timeout passes has its handler cancelled, and raises TooSlowError."""
    async with open_worker_pool(DO, workers=1) as pool:
        with pytest.raises(trio.TooSlowError):
            await pool.call(data=b"forever", timeout=0.05)
        assert await pool.call(timeout=30) == b"nothing to do"
        assert lines(shared / "ended") == ["1"]
        for timeout, error in (-1, ValueError), (math.nan, ValueError), ("1", TypeError):
            with pytest.raises(error, match="timeout must be"):
                await pool.call(timeout=cast("float", timeout))
        found = await at_rest(pool)
        assert (found.handled, found.failed) == (1, 1)


async def test_submit_in_another_thread() -> None:
    """A call from a thread, or from another trio.run, is an error; the source is untouched."""
    async with open_worker_pool(DO, workers=1) as pool:
        client, theirs = ends()
        async with client.stream:

            def outside() -> None:
                coroutine = pool.submit(theirs)
                with pytest.raises(RuntimeError, match="another thread or trio"):
                    coroutine.send(None)

            def in_another_run() -> None:
                for operation in (
                    partial(pool.submit, theirs),
                    partial(pool.call, theirs),
                    pool.restart,
                    partial(pool.scale, 2),
                    pool.drain,
                ):
                    with pytest.raises(RuntimeError, match=r"with trio\.from_thread\.run"):
                        trio.run(operation)

            await trio.to_thread.run_sync(outside)
            await trio.to_thread.run_sync(in_another_run)
            assert theirs.fileno() >= 0
            receipt = await trio.to_thread.run_sync(
                partial(trio.from_thread.run, pool.submit, theirs)
            )
            assert receipt.id == 1


async def test_submit_many_cancelled_together(shared: Path) -> None:
    """All of many queued jobs can be cancelled together; none is handled."""
    # Each has a file descriptor. A process of an ordinary user can have 1,024.
    count = min(4000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200)
    async with open_worker_pool(HOLD, workers=1, max_in_flight=1, max_queue=count) as pool:
        async with client_of(pool) as first:
            async with trio.open_nursery() as nursery:
                for _ in range(count):
                    nursery.start_soon(pool.submit, null())
                await wait_all_tasks_blocked()
                assert pool.statistics().queued == count
                nursery.cancel_scope.cancel()
            assert pool.statistics().cancelled == count
            await first.end()
        check_sums(await at_rest(pool))
