"""Cancellable by itself: flag, callbacks, file descriptor, stack of current ones, scopes."""

from __future__ import annotations

import gc
import os
import select
import signal
import threading
import warnings

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_unixconn import Cancellable, IOErrorEnum, OperationCancelled


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_cancel_is_cancelled_reset() -> None:
    """cancel() sets the flag, a second time changes nothing, and reset() clears it."""
    cancellable = Cancellable()
    assert not cancellable.is_cancelled()
    cancellable.raise_if_cancelled()
    cancellable.cancel()
    cancellable.cancel()
    assert cancellable.is_cancelled()
    with pytest.raises(OperationCancelled) as caught:
        cancellable.raise_if_cancelled()
    assert caught.value.code is IOErrorEnum.CANCELLED
    cancellable.reset()
    cancellable.reset()
    assert not cancellable.is_cancelled()


def test_connect() -> None:
    """Connected callbacks run once for each cancellation, in order, with their data."""
    cancellable = Cancellable()
    calls: list[tuple[object, ...]] = []
    first = cancellable.connect(lambda *data: calls.append(data), 1, 2)
    second = cancellable.connect(lambda *data: calls.append(data))
    assert first != second
    assert 0 not in {first, second}
    cancellable.cancel()
    cancellable.cancel()
    assert calls == [(cancellable, 1, 2), (cancellable,)]
    cancellable.reset()
    cancellable.disconnect(first)
    cancellable.cancel()
    assert calls[2:] == [(cancellable,)]


def test_connect_to_a_cancelled_one() -> None:
    """A callback connected to a cancelled Cancellable runs immediately, and the id is 0."""
    cancellable = Cancellable()
    cancellable.cancel()
    calls: list[object] = []
    assert cancellable.connect(calls.append) == 0
    assert calls == [cancellable]
    cancellable.disconnect(0)


def test_disconnect_rejects_unknown_id() -> None:
    """An id that is not connected is a ValueError."""
    with pytest.raises(ValueError, match="id 7"):
        Cancellable().disconnect(7)


def test_cancel_raises_what_callbacks_raised() -> None:
    """Every callback runs, whatever the others raise, and every exception is raised."""
    cancellable = Cancellable()
    calls: list[str] = []

    def fail(_: Cancellable, name: str) -> None:
        calls.append(name)
        raise ZeroDivisionError(name)

    cancellable.connect(fail, "first")
    with pytest.raises(ZeroDivisionError, match="first"):
        cancellable.cancel()
    cancellable.reset()
    cancellable.connect(fail, "second")
    with pytest.RaisesGroup(
        pytest.RaisesExc(ZeroDivisionError, match="first"),
        pytest.RaisesExc(ZeroDivisionError, match="second"),
    ):
        cancellable.cancel()
    assert calls == ["first", "first", "second"]
    assert cancellable.is_cancelled()


@pytest.mark.parametrize("wait", ["disconnect", "reset"])
def test_disconnect_and_reset_wait_for_the_callback(wait: str) -> None:
    """disconnect() and reset() return only after a callback in another thread has returned."""
    cancellable = Cancellable()
    running, go_on = threading.Event(), threading.Event()
    ended: list[bool] = []

    def slow(_: Cancellable) -> None:
        running.set()
        assert go_on.wait(30)
        ended.append(True)

    number = cancellable.connect(slow)
    thread = threading.Thread(target=cancellable.cancel)
    thread.start()
    assert running.wait(30)
    helper = threading.Timer(0.01, go_on.set)
    helper.start()
    if wait == "reset":
        cancellable.reset()
    else:
        cancellable.disconnect(number)
    assert ended == [True]
    assert cancellable.is_cancelled() == (wait == "disconnect")
    thread.join()
    helper.join()


def test_reset_waits_for_a_callback_that_connect_runs() -> None:
    """A callback that connect() runs immediately counts as a running callback."""
    cancellable = Cancellable()
    cancellable.cancel()
    running, go_on = threading.Event(), threading.Event()
    ended: list[bool] = []

    def slow(_: Cancellable) -> None:
        running.set()
        assert go_on.wait(30)
        ended.append(True)

    thread = threading.Thread(target=cancellable.connect, args=[slow])
    thread.start()
    assert running.wait(30)
    helper = threading.Timer(0.01, go_on.set)
    helper.start()
    cancellable.reset()
    assert ended == [True]
    thread.join()
    helper.join()


def test_reset_within_a_callback() -> None:
    """From within a callback neither reset() nor disconnect() blocks, whatever others run."""
    cancellable = Cancellable()
    inner, done = threading.Event(), threading.Event()
    calls: list[str] = []

    def callback(it: Cancellable) -> None:
        calls.append("called")
        it.reset()
        if len(calls) == 1:
            # A second thread runs callbacks too, and both reset and disconnect in them.
            thread = threading.Thread(target=it.cancel)
            thread.start()
            assert inner.wait(30)
            it.reset()
            it.disconnect(it.connect(print))
            done.set()
            thread.join(30)
            assert not thread.is_alive()
        else:
            inner.set()
            assert done.wait(30)
            it.reset()

    cancellable.connect(callback)
    cancellable.cancel()
    assert calls == ["called"] * 2
    assert not cancellable.is_cancelled()


def test_reset_of_another_one_does_not_wait() -> None:
    """reset() waits for callbacks of its own Cancellable only."""
    one, two = Cancellable(), Cancellable()
    running, go_on = threading.Event(), threading.Event()

    def slow(_: Cancellable) -> None:
        running.set()
        assert go_on.wait(30)

    one.connect(slow)
    two.cancel()
    thread = threading.Thread(target=one.cancel)
    thread.start()
    assert running.wait(30)
    two.reset()
    assert not two.is_cancelled()
    go_on.set()
    thread.join()


def test_disconnect_of_a_later_callback() -> None:
    """A callback that an earlier one disconnects does not run."""
    cancellable = Cancellable()
    calls: list[str] = []
    ids: list[int] = []
    cancellable.connect(lambda it: it.disconnect(ids[0]))
    ids.append(cancellable.connect(lambda _: calls.append("disconnected")))
    cancellable.connect(lambda _: calls.append("last"))
    cancellable.cancel()
    assert calls == ["last"]


def test_disconnect_within_the_callback() -> None:
    """A callback may disconnect itself."""
    cancellable = Cancellable()
    numbers: list[int] = []
    numbers.append(cancellable.connect(lambda it: it.disconnect(numbers[0])))
    cancellable.cancel()
    with pytest.raises(ValueError, match="no callback with id"):
        cancellable.disconnect(numbers[0])


def test_get_fd() -> None:
    """The file descriptor polls readable exactly while the Cancellable is cancelled."""
    cancellable = Cancellable()
    fd = cancellable.get_fd()
    assert not os.get_inheritable(fd)
    assert not os.get_blocking(fd)
    assert cancellable.get_fd() == fd
    assert not readable(fd)
    cancellable.cancel()
    assert readable(fd)
    cancellable.reset()
    assert not readable(fd)
    cancellable.release_fd()
    cancellable.cancel()
    assert readable(fd)
    cancellable.release_fd()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(RuntimeError, match="without get_fd"):
        cancellable.release_fd()


def test_get_fd_of_a_cancelled_one() -> None:
    """The file descriptor of a cancelled Cancellable is readable from the start."""
    cancellable = Cancellable()
    cancellable.cancel()
    assert readable(cancellable.get_fd())
    cancellable.reset()
    assert not readable(cancellable.get_fd())


def test_get_fd_shared_after_a_fork() -> None:
    """Whatever another process wrote or read through the same pipe, no method blocks or raises."""
    cancellable = Cancellable()
    fd = cancellable.get_fd()
    assert cancellable._pipe is not None
    # What children do that share the pipe: one resets first, many cancel.
    cancellable.cancel()
    os.read(fd, 1)
    cancellable.reset()
    with pytest.raises(BlockingIOError):
        while True:
            os.write(cancellable._pipe[1], bytes(4096))
    cancellable.cancel()
    assert readable(fd)
    cancellable.reset()
    assert not readable(fd)
    cancellable.release_fd()


def test_reset_in_a_forked_child_while_a_callback_runs() -> None:
    """In a child process there is no thread that could still run a callback: reset() returns."""
    cancellable = Cancellable()
    running, go_on = threading.Event(), threading.Event()

    def slow(_: Cancellable) -> None:
        running.set()
        assert go_on.wait(30)

    cancellable.connect(slow)
    thread = threading.Thread(target=cancellable.cancel)
    thread.start()
    assert running.wait(30)
    with warnings.catch_warnings():
        # Python 3.12 warns of forks in processes with threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        try:
            signal.alarm(30)
            cancellable.reset()
            os._exit(int(cancellable.is_cancelled()))
        finally:
            os._exit(9)
    assert os.waitpid(pid, 0)[1] == 0
    go_on.set()
    thread.join()
    assert cancellable.is_cancelled()


def test_get_fd_never_released() -> None:
    """A file descriptor that was not released is closed with its Cancellable."""
    cancellable = Cancellable()
    fd = cancellable.get_fd()
    del cancellable
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


async def test_push_current_and_pop_current() -> None:
    """push_current and pop_current nest, and belong to the task."""
    assert Cancellable.get_current() is None
    one, two = Cancellable(), Cancellable()
    one.push_current()
    seen: list[Cancellable | None] = []

    async def child() -> None:
        seen.append(Cancellable.get_current())
        two.push_current()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(child)
    assert seen == [one]
    assert Cancellable.get_current() is one
    two.push_current()
    assert Cancellable.get_current() is two
    with pytest.raises(RuntimeError, match="not the current Cancellable"):
        one.pop_current()
    two.pop_current()
    one.pop_current()
    with pytest.raises(RuntimeError, match="not the current Cancellable"):
        one.pop_current()


async def test_scope() -> None:
    """Cancelling the Cancellable cancels trio code in its scope, with OperationCancelled."""
    cancellable = Cancellable()
    with pytest.raises(OperationCancelled), cancellable.scope() as scope:
        cancellable.cancel()
        assert scope.cancel_called
        await trio.sleep_forever()
    with pytest.raises(OperationCancelled), cancellable.scope():
        raise AssertionError("the block of a cancelled Cancellable must not begin")


async def test_scope_without_a_checkpoint() -> None:
    """A block without a checkpoint after the cancellation completes, and its value is not lost."""
    cancellable = Cancellable()
    with cancellable.scope():
        await trio.lowlevel.checkpoint()
        cancellable.cancel()
    assert cancellable.is_cancelled()


async def test_scope_cancelled_by_trio() -> None:
    """scope.cancel() and deadlines stay trio's: the block ends without an error."""
    cancellable = Cancellable()
    with cancellable.scope() as scope:
        scope.cancel()
        await trio.sleep_forever()
    assert scope.cancelled_caught
    assert not cancellable.is_cancelled()


async def test_scope_in_a_cancelled_scope() -> None:
    """An outer cancellation propagates, even if the Cancellable is cancelled as well."""
    cancellable = Cancellable()
    with trio.CancelScope() as outer:
        with cancellable.scope():
            outer.cancel()
            cancellable.cancel()
            await trio.sleep_forever()
        raise AssertionError("the outer scope was cancelled")
    assert outer.cancelled_caught


async def test_scope_propagates_exceptions() -> None:
    """An exception of the block propagates, and the scope is detached."""
    cancellable = Cancellable()
    with pytest.raises(ZeroDivisionError), cancellable.scope():
        raise ZeroDivisionError
    assert not cancellable._targets


async def test_reset_does_not_undo_cancel() -> None:
    """A reset immediately after the cancellation does not save the operations."""
    cancellable = Cancellable()
    with pytest.raises(OperationCancelled), cancellable.scope():
        cancellable.cancel()
        cancellable.reset()
        await trio.sleep_forever()


def test_cancel_in_many_runs() -> None:
    """One Cancellable cancels many tasks of several trio runs at once, from one thread."""
    cancellable = Cancellable()
    ended: list[int] = []
    ready = threading.Barrier(4)

    async def task(number: int) -> None:
        with pytest.raises(OperationCancelled), cancellable.scope():
            await trio.sleep_forever()
        ended.append(number)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(task, number)
            await wait_all_tasks_blocked()
            ready.wait(30)

    threads = [threading.Thread(target=trio.run, args=[main]) for _ in range(3)]
    for thread in threads:
        thread.start()
    ready.wait(30)
    cancellable.cancel()
    for thread in threads:
        thread.join(30)
    assert sorted(ended) == sorted([*range(10)] * 3)


def test_cancel_for_a_run_that_has_ended() -> None:
    """Cancelling for a scope whose trio run has ended is harmless."""
    cancellable = Cancellable()
    scopes = []

    async def main() -> None:
        scopes.append(cancellable.scope())

    trio.run(main)
    scopes[0]._target.cancel()
    assert not cancellable._targets


async def test_scope_outside_of_trio() -> None:
    """A scope is made in a trio task; elsewhere it is trio's RuntimeError."""
    with pytest.raises(RuntimeError):
        await trio.to_thread.run_sync(Cancellable().scope)


async def test_cancel_in_a_worker_thread() -> None:
    """A thread of trio's own can cancel as any thread can."""
    cancellable = Cancellable()
    with pytest.raises(OperationCancelled), cancellable.scope():
        await trio.to_thread.run_sync(cancellable.cancel)
        await trio.sleep_forever()


async def test_scope_entered_twice() -> None:
    """Trio rejects a scope that is entered again, and nothing stays attached."""
    cancellable = Cancellable()
    scope = cancellable.scope()
    with scope:
        pass
    with pytest.raises(RuntimeError), scope:
        pass
    assert not cancellable._targets


def test_connect_rejects_what_is_not_callable() -> None:
    """connect() rejects a callback that is not callable, before cancel() would call it."""
    with pytest.raises(TypeError, match="callback must be callable, got str"):
        Cancellable().connect("x")  # type: ignore[arg-type]


def test_init_that_fails() -> None:
    """A Cancellable whose constructor failed is collected without an error."""
    with pytest.raises(TypeError):
        Cancellable(5)  # type: ignore[call-arg]
