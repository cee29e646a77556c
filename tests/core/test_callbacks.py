"""The callback form: order, threads, cancellation, and the owner of every result."""

from __future__ import annotations

import gc
import inspect
import os
import sys
import threading
import warnings
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests._helpers.fds import clog, unclog
from trio_unixconn import (
    AsyncResult,
    CallbackAdapter,
    CallbackConnection,
    Cancellable,
    ConnectionClosedError,
    Credentials,
    EndOfStreamError,
    OperationCancelled,
    _closing,
    connection_pair,
    open_callback_adapter,
)


class Calls(list[Any]):
    """Records every callback: source, result, user data, thread."""

    def __call__(self, source: CallbackConnection, result: AsyncResult, *user_data: Any) -> None:
        self.append((source, result, user_data, threading.get_ident()))

    def only(self) -> tuple[CallbackConnection, AsyncResult]:
        """Return source and result of the only call, which was in this thread."""
        assert len(self) == 1
        source, result, _, thread = self[0]
        assert thread == threading.get_ident()
        return source, result


async def test_async_and_finish_of_gios_methods() -> None:
    """Every *_async returns None immediately, calls back later, and *_finish returns the value."""
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


async def test_async_has_gios_keywords() -> None:
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


@pytest.mark.parametrize(
    "name", [name for name in vars(CallbackConnection) if name.endswith("_async")]
)
def test_async_takes_user_data_by_position_and_keyword(name: str) -> None:
    """Every *_async method takes user data after the callback, or as user_data=, as PyGObject."""
    parameters = inspect.signature(getattr(CallbackConnection, name)).parameters
    assert parameters["user_data"].kind is inspect.Parameter.KEYWORD_ONLY
    assert repr(parameters["user_data"].default) == "not given"
    assert parameters["args"].kind is inspect.Parameter.VAR_POSITIONAL


async def test_async_passes_user_data_by_keyword() -> None:
    """The callback gets one value as it is, even None; by position and keyword is a TypeError."""
    one, two = connection_pair()
    async with one, two, open_callback_adapter() as adapter:
        calls = Calls()
        gio = adapter.wrap(one)
        gio.send_fd_async(0, None, calls, user_data=(1, 2))
        while not calls:
            await trio.lowlevel.checkpoint()
        gio.send_credentials_async(None, calls, user_data=None)
        while len(calls) < 2:
            await trio.lowlevel.checkpoint()
        assert [data for _, _, data, _ in calls] == [((1, 2),), (None,)]
        both = r"^send_fd_async\(\) got user data by position and by keyword$"
        with pytest.raises(TypeError, match=both):
            gio.send_fd_async(0, None, calls, 1, user_data=2)


async def test_wrap_has_awaitable_methods() -> None:
    """The wrapped connection has the awaitable methods too."""
    one, two = connection_pair()
    async with one, two, open_callback_adapter() as adapter:
        left, right = adapter.wrap(one), adapter.wrap(two)
        assert left.connection is one
        assert await left.send_fd(0) is True
        os.close(await right.receive_fd())
        assert await left.send_credentials() is True
        assert await right.receive_credentials() == Credentials()


async def test_receive_fd_finish_raises_once() -> None:
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
    with pytest.raises(ValueError, match="already finished"):
        source.receive_fd_finish(result)
    assert result.had_error()


async def test_finish_rejects_wrong_results() -> None:
    """The result of another connection or method is rejected, and can still be finished."""
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
        with pytest.raises(
            ValueError, match=r"expected a result of send_fd_async\(\), got one of receive_fd"
        ):
            gio.send_fd_finish(result)
        with pytest.raises(TypeError, match="expected an AsyncResult, got NoneType"):
            gio.receive_fd_finish(None)  # type: ignore[arg-type]
        os.close(gio.receive_fd_finish(result))
        with pytest.raises(ValueError, match="already finished"):
            gio.receive_fd_finish(result)


@pytest.mark.parametrize("when", ["before", "while", "thread"])
async def test_receive_credentials_async_with_a_cancellable(when: str) -> None:
    """A cancelled Cancellable causes one callback whose *_finish raises OperationCancelled."""
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
    """cancel_pending() cancels pending operations, in any thread, and the adapter stays usable."""
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


async def test_cancel_pending_before_the_operation_starts() -> None:
    """cancel_pending() cancels an operation that was begun in the same scheduling round."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two:
        async with open_callback_adapter() as adapter:
            adapter.wrap(one).send_credentials_async(None, calls)
            adapter.cancel_pending()
        assert calls.only()[1].had_error()
        await one.send_all(b"x")
        assert await two.receive_some() == b"x"


async def test_open_callback_adapter_cancelled() -> None:
    """If the block is cancelled, each callback runs once, and the cancellation propagates."""
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
                result._finish(source, result._tag)


async def test_open_callback_adapter_raises() -> None:
    """If the block raises, pending operations are cancelled, and the exception propagates."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two:
        with pytest.RaisesGroup(ZeroDivisionError):
            async with open_callback_adapter() as adapter:
                adapter.wrap(one).receive_fd_async(None, calls)
                raise ZeroDivisionError
        assert calls.only()[1].had_error()


async def test_send_fd_async_after_the_block() -> None:
    """After its block an adapter accepts no operation, and nothing stays open."""
    one, two = connection_pair()
    async with one, two:
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(one)
        with pytest.raises(ConnectionClosedError, match="adapter is closed"):
            gio.send_fd_async(0, None, None)
        adapter.cancel_pending()


async def test_open_callback_adapter_cancelled_with_endless_callbacks() -> None:
    """A callback that begins another operation each time cannot keep a cancelled block open."""
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


async def test_open_callback_adapter_waits_for_chains() -> None:
    """The end of the block waits for operations that callbacks begin."""
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


async def test_open_callback_adapter_with_a_callback_that_raises() -> None:
    """An exception in a callback cancels the nursery, and the other callbacks run."""
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
            result._discard_value()


async def test_send_credentials_async_in_another_thread() -> None:
    """*_async may be called in any thread; the callback runs in trio's."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two:
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(one)
            thread = threading.Thread(target=gio.send_credentials_async, args=(None, calls))
            thread.start()
            # The operation is pending as soon as the call has returned, although no task has
            # run since. The block must wait for it.
            thread.join()
        source, result = calls.only()
        assert source.send_credentials_finish(result)


async def test_send_fd_async_in_another_thread_as_the_block_is_cancelled() -> None:
    """The callback of an operation that has not arrived runs when the block is cancelled."""
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


@pytest.mark.parametrize(("name", "arguments"), [("send_fd_async", [0]), ("receive_fd_async", [])])
def test_async_after_the_run(name: str, arguments: list[int]) -> None:
    """To begin an operation after the trio run has ended is trio's RunFinishedError."""
    left: list[Any] = []

    async def main() -> None:
        one, two = connection_pair()
        async with one, two, trio.open_nursery() as nursery:
            # An adapter that was never closed.
            left.append(CallbackAdapter(nursery).wrap(one))

    trio.run(main)
    errors: list[Exception] = []

    def begin() -> None:
        try:
            getattr(left[0], name)(*arguments, None, None)
        except trio.RunFinishedError as exc:
            errors.append(exc)

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    assert len(errors) == 1


async def test_send_fd_async_duplicates_fd() -> None:
    """send_fd_async has its own duplicate: the caller may close the file descriptor."""
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
async def test_send_fd_async_rejects_wrong_fd(bad: Any) -> None:
    """send_fd_async rejects what is not a file descriptor before it returns."""
    one, two = connection_pair()
    async with one, two, open_callback_adapter() as adapter:
        with pytest.raises((TypeError, ValueError)):
            adapter.wrap(one).send_fd_async(bad, None, None)


def drop(calls: Calls) -> None:
    calls.clear()
    gc.collect()


async def test_result_of_receive_fd_async_never_finished() -> None:
    """The file descriptor of a result that is never finished is closed, with a ResourceWarning."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two:
        async with open_callback_adapter() as adapter:
            await two.send_fd(0)
            adapter.wrap(one).receive_fd_async(None, calls)
        with pytest.warns(ResourceWarning, match="unfinished result of receive_fd_async"):
            drop(calls)


async def test_receive_fd_async_without_a_callback() -> None:
    """Without a callback the operation runs, and the received file descriptor is closed."""
    one, two = connection_pair()
    async with one, two:
        async with open_callback_adapter() as adapter:
            await two.send_fd(0)
            adapter.wrap(one).receive_fd_async()
            adapter.wrap(one).send_credentials_async()
        assert (await two.receive_credentials()) == Credentials()


async def test_close_async_with_a_cancelled_cancellable() -> None:
    """Closing with a cancelled Cancellable closes, and raises OperationCancelled, as in Gio."""
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


async def test_async_names_its_task() -> None:
    """The task of an operation is named after its method."""
    one, two = connection_pair()
    names: list[str] = []
    async with one, two, open_callback_adapter() as adapter:

        def note(*_: object) -> None:
            names.append(trio.lowlevel.current_task().name)

        adapter.wrap(one).send_credentials_async(None, note)
    assert names == ["send_credentials_async"]


async def test_wrap_and_async_reject_wrong_types() -> None:
    """A wrong connection, Cancellable or callback is a TypeError, and nothing stays open."""
    one, two = connection_pair()
    async with one, two, open_callback_adapter() as adapter:
        with pytest.raises(TypeError, match="connection must be a UnixConnection, got str"):
            adapter.wrap("nope")  # type: ignore[arg-type]
        gio = adapter.wrap(one)
        with pytest.raises(
            TypeError, match="cancellable must be a Cancellable or None, got function"
        ):
            gio.send_credentials_async(lambda *_: None)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="callback must be callable or None, got str"):
            gio.send_fd_async(0, None, "x")  # type: ignore[arg-type]


async def test_finish_by_another_wrapper() -> None:
    """A result may be finished by any wrapper of its connection."""
    one, two = connection_pair()
    calls = Calls()
    async with one, two:
        async with open_callback_adapter() as adapter:
            adapter.wrap(one).send_credentials_async(None, calls)
            other = adapter.wrap(one)
        assert other.send_credentials_finish(calls.only()[1]) is True


async def test_result_never_finished_with_warnings_as_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A result that is never finished is closed even if the warning is an exception."""
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
        assert _closing.wait_closed(30)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
