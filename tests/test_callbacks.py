"""The callback form: once each, in the trio thread, with an owner for every result."""

from __future__ import annotations

import gc
import os
import sys
import threading
import warnings
from typing import Any

import pytest
import trio
from helpers import clog, unclog
from trio.testing import wait_all_tasks_blocked

from trio_unixconn import (
    AsyncResult,
    CallbackAdapter,
    CallbackConnection,
    Cancellable,
    ConnectionClosedError,
    Credentials,
    EndOfStreamError,
    OperationCancelled,
    connection_pair,
    open_callback_adapter,
)


class Calls(list[Any]):
    """Notes down every callback: source, result, user data, thread."""

    def __call__(self, source: CallbackConnection, result: AsyncResult, *user_data: Any) -> None:
        self.append((source, result, user_data, threading.get_ident()))

    def only(self) -> tuple[CallbackConnection, AsyncResult]:
        """Return what came, which must be one call in this thread."""
        assert len(self) == 1
        source, result, _, thread = self[0]
        assert thread == threading.get_ident()
        return source, result


async def test_all_pairs() -> None:
    """Every *_async returns None at once, calls back later, and *_finish gives the value."""
    one, two = connection_pair()
    async with one, two:
        for name, arguments, value in [
            ("send_credentials", [], True),
            ("receive_credentials", [], Credentials()),
            ("send_fd", [0], True),
            ("receive_fd", [], None),
            ("close", [0], True),
        ]:
            calls = Calls()
            async with open_callback_adapter() as adapter:
                gio = adapter.wrap(two if name.startswith("receive") else one)
                begin = getattr(gio, f"{name}_async")
                assert begin(*arguments, None, calls, "user", "data") is None
                assert calls == []
            source, result = calls.only()
            assert source is gio is result.get_source_object()
            assert calls[0][2] == ("user", "data") == result.get_user_data()
            assert result.is_tagged(begin)
            assert result.is_tagged(f"{name}_async")
            assert not result.is_tagged(gio.send_fd)
            assert not result.had_error()
            got = getattr(gio, f"{name}_finish")(result)
            if value is None:
                assert os.path.sameopenfile(got, 0)
                os.close(got)
            else:
                assert got == value
    assert one.is_closed()


async def test_keyword_names_are_gios() -> None:
    """The arguments have Gio's names."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two, open_callback_adapter() as adapter:
        gio = adapter.wrap(one)
        gio.send_credentials_async(cancellable=None, callback=calls)
        gio.receive_credentials_async(cancellable=None, callback=calls)
        await two.send_credentials()
        await trio.testing.wait_all_tasks_blocked()
        gio.close_async(io_priority=0, cancellable=None, callback=calls)
    assert len(calls) == 3


async def test_awaitable_forms() -> None:
    """The wrapped connection has the awaitable methods too."""
    one, two = connection_pair()
    async with one, two, open_callback_adapter() as adapter:
        left, right = adapter.wrap(one), adapter.wrap(two)
        assert left.connection is one
        assert await left.send_fd(0) is True
        os.close(await right.receive_fd())
        assert await left.send_credentials() is True
        assert await right.receive_credentials() == Credentials()


async def test_error() -> None:
    """An operation that fails calls back once, and *_finish raises the error, once."""
    one, two = connection_pair()
    calls = Calls()
    await two.aclose()
    async with one, open_callback_adapter() as adapter:
        adapter.wrap(one).receive_fd_async(None, calls)
    source, result = calls.only()
    assert result.had_error()
    with pytest.raises(EndOfStreamError):
        source.receive_fd_finish(result)
    with pytest.raises(ValueError, match="finishes once"):
        source.receive_fd_finish(result)
    assert result.had_error()


async def test_finished_wrongly() -> None:
    """A foreign result, the wrong *_finish and no result are refused; the right one works."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two, open_callback_adapter() as adapter:
        gio, other = adapter.wrap(one), adapter.wrap(two)
        await two.send_fd(0)
        gio.receive_fd_async(None, calls)
        await wait_all_tasks_blocked()
        _, result = calls.only()
        with pytest.raises(ValueError, match="another connection"):
            other.receive_fd_finish(result)
        with pytest.raises(ValueError, match=r"of receive_fd_async\(\), not of send_fd_async\(\)"):
            gio.send_fd_finish(result)
        with pytest.raises(TypeError, match="an AsyncResult is due, not NoneType"):
            gio.receive_fd_finish(None)  # type: ignore[arg-type]
        os.close(gio.receive_fd_finish(result))
        with pytest.raises(ValueError, match="finishes once"):
            gio.receive_fd_finish(result)


@pytest.mark.parametrize("when", ["before", "while", "thread"])
async def test_cancellable(when: str) -> None:
    """A Cancellable that fires gives one callback whose *_finish raises OperationCancelled."""
    one, two = connection_pair()
    calls = Calls()
    cancellable = Cancellable()
    async with one, two:
        async with open_callback_adapter() as adapter:
            if when == "before":
                cancellable.cancel()
            adapter.wrap(one).receive_credentials_async(cancellable, calls)
            assert calls == []
            if when == "while":
                await wait_all_tasks_blocked()
                cancellable.cancel()
            if when == "thread":
                await wait_all_tasks_blocked()
                await trio.to_thread.run_sync(cancellable.cancel)
        source, result = calls.only()
        with pytest.raises(OperationCancelled):
            source.receive_credentials_finish(result)


@pytest.mark.parametrize("thread", [False, True])
async def test_cancel_pending(*, thread: bool) -> None:
    """cancel_pending() ends what is pending, from any thread, and the adapter goes on."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two:
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(one)
            gio.receive_fd_async(None, calls)
            await wait_all_tasks_blocked()
            if thread:
                await trio.to_thread.run_sync(adapter.cancel_pending)
            else:
                adapter.cancel_pending()
            await wait_all_tasks_blocked()
            source, result = calls.only()
            with pytest.raises(OperationCancelled, match="cancel_pending"):
                source.receive_fd_finish(result)
            gio.send_credentials_async(None, calls)
        assert calls[1][1].had_error() is False


async def test_cancel_pending_before_it_began() -> None:
    """cancel_pending() also ends what was begun in this very tick."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two:
        async with open_callback_adapter() as adapter:
            adapter.wrap(one).send_credentials_async(None, calls)
            adapter.cancel_pending()
        assert calls.only()[1].had_error()
        await one.send_all(b"x")
        assert await two.receive_some() == b"x"


async def test_outer_cancellation_tells_the_callbacks() -> None:
    """When the block is cancelled, each callback is told once, and the cancellation goes on."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two:
        with trio.CancelScope() as scope:
            async with open_callback_adapter() as adapter:
                adapter.wrap(one).receive_fd_async(None, calls)
                adapter.wrap(two).receive_credentials_async(None, calls)
                await wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught
        assert len(calls) == 2
        for source, result, _, _ in calls:
            assert result.had_error()
            with pytest.raises(OperationCancelled, match="adapter was cancelled"):
                result.finish(source, result._tag)


async def test_block_that_raises() -> None:
    """When the block raises, what is pending is cancelled and told, and the exception comes out."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two:
        with pytest.RaisesGroup(ZeroDivisionError):
            async with open_callback_adapter() as adapter:
                adapter.wrap(one).receive_fd_async(None, calls)
                raise ZeroDivisionError
        assert calls.only()[1].had_error()


async def test_closed_adapter() -> None:
    """An adapter whose block was left takes nothing more, and keeps nothing open."""
    one, two = connection_pair()
    async with one, two:
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(one)
        with pytest.raises(ConnectionClosedError, match="adapter is closed"):
            gio.send_fd_async(0, None, None)
        adapter.cancel_pending()


async def test_callbacks_that_begin_again_while_all_ends() -> None:
    """A callback that begins again each time cannot keep a cancelled block from ending."""
    one, two = connection_pair()
    refused: list[bool] = []

    def again(gio: CallbackConnection, _: AsyncResult) -> None:
        try:
            gio.receive_fd_async(None, again)
        except ConnectionClosedError:
            refused.append(True)

    async with one, two:
        with trio.CancelScope() as scope:
            async with open_callback_adapter() as adapter:
                adapter.wrap(one).receive_fd_async(None, again)
                await wait_all_tasks_blocked()
                scope.cancel()
                await trio.lowlevel.checkpoint()
        assert refused == [True]


async def test_leaving_waits_for_chains() -> None:
    """Leaving the block waits for operations that callbacks begin."""
    one, two = connection_pair()
    done: list[Credentials] = []

    def on_sent(gio: CallbackConnection, result: AsyncResult, other: CallbackConnection) -> None:
        assert gio.send_credentials_finish(result)
        other.receive_credentials_async(None, on_received)

    def on_received(gio: CallbackConnection, result: AsyncResult) -> None:
        done.append(gio.receive_credentials_finish(result))

    async with one, two:
        async with open_callback_adapter() as adapter:
            adapter.wrap(one).send_credentials_async(None, on_sent, adapter.wrap(two))
        assert done == [Credentials()]


async def test_callback_that_raises() -> None:
    """An exception out of a callback crashes the nursery; the others are told."""
    one, two = connection_pair()
    calls = Calls()

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    async with one, two:
        with pytest.RaisesGroup(ZeroDivisionError):
            async with open_callback_adapter() as adapter:
                adapter.wrap(two).receive_fd_async(None, calls)
                await wait_all_tasks_blocked()
                adapter.wrap(one).send_credentials_async(None, fail)
        del fail
        for _, result, _, _ in calls:
            result.discard()


async def test_begun_in_another_thread() -> None:
    """*_async may be called in any thread; the callback runs in trio's."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two:
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(one)
            thread = threading.Thread(target=gio.send_credentials_async, args=(None, calls))
            thread.start()
            # The operation is under way as soon as the call has returned, though no task
            # has had a chance to run; the block must wait for it.
            thread.join()
        source, result = calls.only()
        assert source.send_credentials_finish(result)


async def test_begun_in_another_thread_as_the_block_ends() -> None:
    """What another thread began before the block was cancelled is told, and nothing breaks."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two:
        with trio.CancelScope() as scope:
            async with open_callback_adapter() as adapter:
                gio = adapter.wrap(one)
                thread = threading.Thread(target=gio.send_fd_async, args=(0, None, calls))
                thread.start()
                thread.join()
                scope.cancel()
                await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert calls.only()[1].had_error()


def test_begun_after_the_run() -> None:
    """Beginning something in a thread when the trio run is over is trio's RunFinishedError."""
    left: list[Any] = []

    async def main() -> None:
        one, two = connection_pair()
        async with one, two, trio.open_nursery() as nursery:
            # An adapter that was never closed, as of a nursery that was abandoned.
            left.append(CallbackAdapter(nursery).wrap(one))

    trio.run(main)
    errors: list[Exception] = []

    def begin() -> None:
        try:
            left[0].send_fd_async(0, None, None)
        except trio.RunFinishedError as exc:
            errors.append(exc)

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    assert len(errors) == 1


async def test_caller_may_close_at_once() -> None:
    """send_fd_async has its own duplicate: the caller may close the descriptor at once."""
    one, two = connection_pair()
    count = clog(one)
    fd = os.memfd_create("m")
    inode = os.fstat(fd).st_ino
    calls = Calls()
    async with one, two:
        async with open_callback_adapter() as adapter:
            adapter.wrap(one).send_fd_async(fd, None, calls)
            os.close(fd)
            await unclog(two, count)
        got = await two.receive_fd()
        assert os.fstat(got).st_ino == inode
        os.close(got)
    assert not calls.only()[1].had_error()


@pytest.mark.parametrize("bad", [True, "x", None, -1])
async def test_no_descriptor(bad: Any) -> None:
    """send_fd_async refuses what is no descriptor at once."""
    one, two = connection_pair()
    async with one, two, open_callback_adapter() as adapter:
        with pytest.raises((TypeError, ValueError)):
            adapter.wrap(one).send_fd_async(bad, None, None)


def drop(calls: Calls) -> None:
    calls.clear()
    gc.collect()


async def test_result_that_nobody_finishes() -> None:
    """A descriptor in a result that nobody finishes is closed, with a ResourceWarning."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two:
        async with open_callback_adapter() as adapter:
            await two.send_fd(0)
            adapter.wrap(one).receive_fd_async(None, calls)
        with pytest.warns(ResourceWarning, match="nobody finished a result of receive_fd_async"):
            drop(calls)


async def test_no_callback() -> None:
    """Without a callback the operation runs, and a descriptor that it got is closed."""
    one, two = connection_pair()
    async with one, two:
        async with open_callback_adapter() as adapter:
            await two.send_fd(0)
            adapter.wrap(one).receive_fd_async()
            adapter.wrap(one).send_credentials_async()
        assert (await two.receive_credentials()) == Credentials()


async def test_close_is_not_cancelled() -> None:
    """Closing with a fired Cancellable closes, and says that it was cancelled, as in Gio."""
    one, two = connection_pair()
    calls = Calls()
    cancellable = Cancellable()
    cancellable.cancel()
    async with two:
        async with open_callback_adapter() as adapter:
            adapter.wrap(one).close_async(0, cancellable, calls)
        assert one.is_closed()
        source, result = calls.only()
        with pytest.raises(OperationCancelled):
            source.close_finish(result)


async def test_tasks_have_names() -> None:
    """The task of an operation is called after it."""
    one, two = connection_pair()
    names: list[str] = []
    async with one, two, open_callback_adapter() as adapter:

        def note(*_: object) -> None:
            names.append(trio.lowlevel.current_task().name)

        adapter.wrap(one).send_credentials_async(None, note)
    assert names == ["send_credentials_async"]


async def test_what_is_no_argument() -> None:
    """A wrong connection, Cancellable or callback is a TypeError at once; nothing is held."""
    one, two = connection_pair()
    async with one, two, open_callback_adapter() as adapter:
        with pytest.raises(TypeError, match="a UnixConnection is due, not str"):
            adapter.wrap("nope")  # type: ignore[arg-type]
        gio = adapter.wrap(one)
        with pytest.raises(
            TypeError, match="cancellable must be a Cancellable or None, not function"
        ):
            gio.send_credentials_async(lambda *_: None)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="a callback or None is due, not str"):
            gio.send_fd_async(0, None, "x")  # type: ignore[arg-type]


async def test_two_wrappers_of_one_connection() -> None:
    """A result may be finished by any wrapper of its connection."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two:
        async with open_callback_adapter() as adapter:
            adapter.wrap(one).send_credentials_async(None, calls)
            other = adapter.wrap(one)
        assert other.send_credentials_finish(calls.only()[1]) is True


async def test_dropped_result_when_warnings_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dropped result closes its descriptor also when the warning is an exception."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two:
        async with open_callback_adapter() as adapter:
            await two.send_fd(0)
            adapter.wrap(one).receive_fd_async(None, calls)
        fd = calls.only()[1]._value
        unraisable: list[Any] = []
        monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            drop(calls)
        assert len(unraisable) == 1
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
