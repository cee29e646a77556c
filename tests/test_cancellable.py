"""Cancellable by itself: flag, callbacks, descriptor, stack of current ones, scopes."""

from __future__ import annotations

import gc
import os
import select
import threading

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_unixconn import Cancellable, IOErrorEnum, OperationCancelled


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_flag() -> None:
    """It fires once, says so, and can be reset."""
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


def test_callbacks() -> None:
    """Connected callbacks run once for each time it fires, in order, with their data."""
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


def test_connect_after_the_fact() -> None:
    """A callback connected to a fired Cancellable runs at once, and the id is 0."""
    cancellable = Cancellable()
    cancellable.cancel()
    calls: list[object] = []
    assert cancellable.connect(calls.append) == 0
    assert calls == [cancellable]
    cancellable.disconnect(0)


def test_disconnect_unknown() -> None:
    """An id that is not connected is a ValueError."""
    with pytest.raises(ValueError, match="id 7"):
        Cancellable().disconnect(7)


def test_callback_that_raises() -> None:
    """Every callback runs, whatever the others raise, and every exception comes out."""
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


def test_disconnect_waits_for_the_callback() -> None:
    """disconnect() returns only when a callback that runs in another thread has ended."""
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
    cancellable.disconnect(number)
    assert ended == [True]
    thread.join()
    helper.join()


def test_disconnect_within_the_callback() -> None:
    """A callback may disconnect itself."""
    cancellable = Cancellable()
    numbers: list[int] = []
    numbers.append(cancellable.connect(lambda it: it.disconnect(numbers[0])))
    cancellable.cancel()
    with pytest.raises(ValueError, match="no callback with id"):
        cancellable.disconnect(numbers[0])


def test_descriptor() -> None:
    """The descriptor polls readable exactly while the Cancellable is fired."""
    cancellable = Cancellable()
    fd = cancellable.get_fd()
    assert not os.get_inheritable(fd)
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


def test_descriptor_of_a_fired_one() -> None:
    """The descriptor of a Cancellable that has fired is readable from the start."""
    cancellable = Cancellable()
    cancellable.cancel()
    assert readable(cancellable.get_fd())
    cancellable.reset()
    assert not readable(cancellable.get_fd())


def test_descriptor_nobody_released() -> None:
    """A descriptor that was not given back is closed with its Cancellable."""
    cancellable = Cancellable()
    fd = cancellable.get_fd()
    del cancellable
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


async def test_current() -> None:
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
    """Trio code under a scope ends with OperationCancelled when the Cancellable fires."""
    cancellable = Cancellable()
    with pytest.raises(OperationCancelled), cancellable.scope() as scope:
        cancellable.cancel()
        assert scope.cancel_called
        await trio.sleep_forever()
    with pytest.raises(OperationCancelled), cancellable.scope():
        raise AssertionError("the block of a fired Cancellable must not begin")


async def test_scope_that_ends_in_time() -> None:
    """A block without a checkpoint behind the firing is not ended, and its value not lost."""
    cancellable = Cancellable()
    with cancellable.scope():
        await trio.lowlevel.checkpoint()
        cancellable.cancel()
    assert cancellable.is_cancelled()


async def test_targets_own_cancellation() -> None:
    """scope.cancel() and deadlines stay trio's: the block ends without an error."""
    cancellable = Cancellable()
    with cancellable.scope() as scope:
        scope.cancel()
        await trio.sleep_forever()
    assert scope.cancelled_caught
    assert not cancellable.is_cancelled()


async def test_outer_cancellation() -> None:
    """An outer cancellation goes through, also when the Cancellable fired as well."""
    cancellable = Cancellable()
    with trio.CancelScope() as outer:
        with cancellable.scope():
            outer.cancel()
            cancellable.cancel()
            await trio.sleep_forever()
        raise AssertionError("the outer scope was cancelled")
    assert outer.cancelled_caught


async def test_exceptions_go_through_a_scope() -> None:
    """An exception of the block stays what it is, and the scope is forgotten."""
    cancellable = Cancellable()
    with pytest.raises(ZeroDivisionError), cancellable.scope():
        raise ZeroDivisionError
    assert not cancellable._targets


async def test_reset_does_not_undo() -> None:
    """A reset right behind the firing does not save the operations that it ended."""
    cancellable = Cancellable()
    with pytest.raises(OperationCancelled), cancellable.scope():
        cancellable.cancel()
        cancellable.reset()
        await trio.sleep_forever()


def test_many_operations_in_many_runs() -> None:
    """One Cancellable ends many tasks of several trio runs at once, from one thread."""
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


def test_a_run_that_is_over() -> None:
    """Firing for a scope whose trio run has ended meanwhile is harmless."""
    cancellable = Cancellable()
    scopes = []

    async def main() -> None:
        scopes.append(cancellable.scope())

    trio.run(main)
    scopes[0]._target.cancel()
    assert not cancellable._targets


async def test_scope_outside_of_its_thread() -> None:
    """A scope is made in a trio task; elsewhere it is trio's RuntimeError."""
    with pytest.raises(RuntimeError):
        await trio.to_thread.run_sync(Cancellable().scope)


async def test_fired_in_a_worker_thread() -> None:
    """A thread of trio's own fires as any thread does."""
    cancellable = Cancellable()
    with pytest.raises(OperationCancelled), cancellable.scope():
        await trio.to_thread.run_sync(cancellable.cancel)
        await trio.sleep_forever()


async def test_scope_entered_twice() -> None:
    """A scope that is entered again is refused by trio, and nothing is left behind."""
    cancellable = Cancellable()
    scope = cancellable.scope()
    with scope:
        pass
    with pytest.raises(RuntimeError), scope:
        pass
    assert not cancellable._targets


def test_callback_that_cannot_be_called() -> None:
    """What cannot be called is refused by connect, not found out by cancel."""
    with pytest.raises(TypeError, match="callback must be callable, not str"):
        Cancellable().connect("x")  # type: ignore[arg-type]


def test_constructor_that_fails() -> None:
    """A Cancellable that could not be made leaves no noise behind."""
    with pytest.raises(TypeError):
        Cancellable(5)  # type: ignore[call-arg]
