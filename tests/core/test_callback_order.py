"""The callback form: the order of *_async calls decides, and a peer cannot stop the adapter."""

from __future__ import annotations

import contextvars
import gc
import os
import queue
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests._helpers.fds import clog
from tests._helpers.fuse import fuse_file
from trio_unixconn import (
    AsyncResult,
    CallbackConnection,
    Cancellable,
    ConnectionBrokenError,
    ConnectionBusyError,
    ConnectionClosedError,
    EndOfStreamError,
    OperationCancelled,
    UnexpectedControlMessageError,
    UnixConnection,
    _closing,
    connection_pair,
    open_callback_adapter,
)
from trio_unixconn._sockopts import raw_socket
from trio_unixconn.testing import open_descriptors

# Trio starts the tasks of a round in one of two orders: enough rounds to see both.
ROUNDS = 40


class Ends(dict[str, Any]):
    """How operations ended, by name: a value, or the type of an exception."""

    def __call__(self, source: CallbackConnection, result: AsyncResult, name: str) -> None:
        method = name.split(":", maxsplit=1)[0]
        try:
            self[name] = getattr(source, f"{method}_finish")(result)
        except (ConnectionBusyError, ConnectionClosedError, OperationCancelled) as exc:
            self[name] = type(exc)


async def test_receive_fd_async_twice() -> None:
    """Of two receives the one that was begun first receives, and the other one is busy."""
    for _ in range(ROUNDS):
        one, two = connection_pair()
        ends = Ends()
        async with one, two:
            await two.send_fd(0)
            async with open_callback_adapter() as adapter:
                gio = adapter.wrap(one)
                gio.receive_fd_async(None, ends, "receive_fd:1")
                # Another wrapper of the connection makes no difference.
                adapter.wrap(one).receive_fd_async(None, ends, "receive_fd:2")
            assert ends["receive_fd:2"] is ConnectionBusyError
            os.close(ends["receive_fd:1"])


async def test_send_message_async_twice() -> None:
    """Of two sends the one that was begun first sends, and the other one is busy."""
    for _ in range(ROUNDS):
        one, two = connection_pair()
        ends = Ends()
        async with one, two:
            async with open_callback_adapter() as adapter:
                gio = adapter.wrap(one)
                gio.send_message_async(b"1", None, ends, "send_message:1")
                gio.send_all_async(b"2", None, ends, "send_all:2")
            assert ends == {"send_message:1": None, "send_all:2": ConnectionBusyError}
            assert await two.receive_some() == b"1"


async def test_send_fd_async_then_close_async() -> None:
    """A send that was begun before close_async, and does not have to wait, is sent."""
    for _ in range(ROUNDS):
        one, two = connection_pair()
        ends = Ends()
        async with one, two:
            async with open_callback_adapter() as adapter:
                gio = adapter.wrap(one)
                gio.send_fd_async(0, None, ends, "send_fd")
                gio.close_async(0, None, ends, "close")
            assert list(ends.items()) == [("send_fd", True), ("close", True)]
            os.close(await two.receive_fd())


async def test_send_fd_async_that_waits_then_close_async() -> None:
    """A send that waits when the connection is closed fails, and is called back first."""
    for _ in range(ROUNDS):
        one, two = connection_pair()
        ends = Ends()
        async with one, two:
            clog(one)
            async with open_callback_adapter() as adapter:
                gio = adapter.wrap(one)
                gio.send_fd_async(0, None, ends, "send_fd")
                gio.receive_fd_async(None, ends, "receive_fd")
                gio.close_async(0, None, ends, "close:1")
                gio.close_async(0, None, ends, "close:2")
            assert set(list(ends)[:2]) == {"send_fd", "receive_fd"}
            assert ends.pop("close:1") is True
            assert ends.pop("close:2") is ConnectionBusyError
            assert set(ends.values()) == {ConnectionClosedError}


async def test_close_async_then_send_fd_async() -> None:
    """An operation that is begun after close_async fails with ConnectionClosedError."""
    for _ in range(ROUNDS):
        one, two = connection_pair()
        ends = Ends()
        async with one, two:
            async with open_callback_adapter() as adapter:
                gio = adapter.wrap(one)
                gio.close_async(0, None, ends, "close:1")
                gio.send_fd_async(0, None, ends, "send_fd")
                gio.close_async(0, None, ends, "close:2")
            assert ends == {
                "close:1": True,
                "send_fd": ConnectionClosedError,
                "close:2": ConnectionBusyError,
            }


async def test_close_async_again_later() -> None:
    """Closing a closed connection succeeds, as in Gio."""
    one, two = connection_pair()
    ends = Ends()
    async with one, two:
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(one)
            gio.close_async(0, None, ends, "close:1")
            await wait_all_tasks_blocked()
            gio.close_async(0, None, ends, "close:2")
        assert ends == {"close:1": True, "close:2": True}


async def test_receive_fd_async_in_threads() -> None:
    """Operations of other threads start in the order in which they were begun."""
    one, two = connection_pair()
    ends = Ends()
    async with one, two:
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(one)
            for number in range(ROUNDS):
                thread = threading.Thread(
                    target=gio.receive_fd_async, args=[None, ends, f"receive_fd:{number}"]
                )
                thread.start()
                thread.join()
            await wait_all_tasks_blocked()
            await two.send_fd(0)
        os.close(ends.pop("receive_fd:0"))
        assert set(ends.values()) == {ConnectionBusyError}


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="default")


async def test_callback_context() -> None:
    """A callback runs in the context of its own *_async call, whichever task runs it."""
    one, two = connection_pair()
    seen: list[tuple[str, str]] = []

    def callback(_: object, __: object, name: str) -> None:
        seen.append((name, variable.get()))

    async with one, two, open_callback_adapter() as adapter:
        left, right = adapter.wrap(one), adapter.wrap(two)
        for name, gio in [("left", left), ("right", right)]:
            variable.set(name)
            gio.send_credentials_async(None, callback, name)
        variable.set("thread's parent")
        await trio.to_thread.run_sync(left.receive_credentials_async, None, callback, "thread")
    assert sorted(seen) == [("left", "left"), ("right", "right"), ("thread", "thread's parent")]


def test_receive_fd_async_in_guest_mode() -> None:
    """In guest mode *_async can be called by code of the host loop, in the same thread."""
    calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
    one, two = connection_pair()
    ends = Ends()
    done: list[Any] = []

    async def main() -> None:
        async with one, two, open_callback_adapter() as adapter:
            gio = adapter.wrap(one)

            begun = trio.Event()
            token = trio.lowlevel.current_trio_token()

            def begin() -> None:
                gio.receive_some_async(1, None, ends, "receive_some")
                token.run_sync_soon(begun.set)

            calls.put(begin)
            await begun.wait()
            await two.send_all(b"x")

    trio.lowlevel.start_guest_run(
        main, run_sync_soon_threadsafe=calls.put, done_callback=done.append
    )
    while not done:
        calls.get(timeout=30)()
    done[0].unwrap()
    assert ends == {"receive_some": b"x"}


################################################################
# Operations with the interface of trio's streams
################################################################


@pytest.mark.parametrize("cancellable", [None, Cancellable()])
async def test_send_all_async_receive_some_async_send_eof_async(
    cancellable: Cancellable | None,
) -> None:
    """Bytes and the end of the stream have a callback form; what is passed is copied."""
    one, two = connection_pair()
    ends = Ends()
    async with one, two:
        async with open_callback_adapter() as adapter:
            left, right = adapter.wrap(one), adapter.wrap(two)
            data = bytearray(b"right")
            left.send_all_async(data, cancellable, ends, "send_all")
            data[:] = b"wrong"
            await wait_all_tasks_blocked()
            right.receive_some_async(9, cancellable, ends, "receive_some:1")
            left.send_eof_async(cancellable, ends, "send_eof")
            await wait_all_tasks_blocked()
            right.receive_some_async(None, cancellable, ends, "receive_some:2")
        assert ends == {
            "send_all": None,
            "receive_some:1": b"right",
            "send_eof": None,
            "receive_some:2": b"",
        }


async def test_send_all_async_and_receive_some_async_cancelled() -> None:
    """A Cancellable ends them, before they begin or while they wait."""
    one, two = connection_pair()
    ends = Ends()
    cancellable = Cancellable()
    async with one, two:
        clog(one)
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(one)
            gio.send_all_async(b"x", cancellable, ends, "send_all")
            gio.receive_some_async(1, cancellable, ends, "receive_some")
            await wait_all_tasks_blocked()
            cancellable.cancel()
            gio.send_eof_async(cancellable, ends, "send_eof")
        assert set(ends) == {"send_all", "receive_some", "send_eof"}
        assert set(ends.values()) == {OperationCancelled}


async def test_receive_into_async() -> None:
    """Bytes are received into a buffer of the caller's, as by Gio's read_async."""
    one, two = connection_pair()
    ends = Ends()
    buffer = bytearray(9)
    cancellable = Cancellable()
    async with one, two:
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(two)
            gio.receive_into_async(buffer, cancellable, ends, "receive_into:1")
            await wait_all_tasks_blocked()
            cancellable.cancel()
            await wait_all_tasks_blocked()
            await one.send_all(b"bytes")
            gio.receive_into_async(buffer, None, ends, "receive_into:2")
        assert ends == {"receive_into:1": OperationCancelled, "receive_into:2": 5}
        assert buffer == b"bytes\0\0\0\0"


async def test_receive_message_async_with_pidfd() -> None:
    """receive_message_async takes all options of receive_message."""
    one, two = connection_pair()
    ends = Ends()
    async with one, two:
        async with open_callback_adapter() as adapter:
            try:
                two.setsockopt(socket.SOL_SOCKET, 76, two.getsockopt(socket.SOL_SOCKET, 76))
            except OSError:
                pytest.skip("the kernel has no SO_PASSPIDFD")
            gio = adapter.wrap(two)
            gio.receive_message_async(
                9, None, ends, "receive_message", pidfd=True, credentials=True
            )
            await wait_all_tasks_blocked()
            await one.send_message(b"x")
        with ends["receive_message"] as message:
            assert message.data == b"x"
            assert message.credentials is not None
            assert message.pidfd is not None


################################################################
# Descriptors of a file server that hangs or fails
################################################################


async def test_send_fd_async_of_a_hanging_file() -> None:
    """A descriptor of a file server that does not answer is sent without asking it."""
    one, two = connection_pair()
    ends = Ends()
    async with one, two:
        with fuse_file() as file:
            file.hang()
            async with open_callback_adapter() as adapter:
                gio = adapter.wrap(one)
                gio.send_fd_async(file.fd, None, ends, "send_fd")
                await wait_all_tasks_blocked()
                gio.send_fds_async([file.fd, file.fd], None, ends, "send_fds")
                await wait_all_tasks_blocked()
                gio.send_message_async(b"x", None, ends, "send_message", fds=[file.fd])
            assert ends == {"send_fd": True, "send_fds": 2, "send_message": None}
            file.answer()
            # receive_fds() takes those of both messages, which have one byte each.
            with await two.receive_fds(3) as fds:
                assert len(fds) == 3
            with await two.receive_message(9) as message:
                assert message.data == b"x"


@pytest.mark.parametrize("trouble", ["hang", "fail_flush"])
@pytest.mark.parametrize("name", ["receive_fd", "receive_fds", "receive_message", "receive_file"])
async def test_receive_async_without_a_callback_of_a_file_in_trouble(
    name: str, trouble: str
) -> None:
    """A descriptor whose close hangs or fails ends neither the adapter nor other operations."""
    one, two = connection_pair()
    three, four = connection_pair()
    ends = Ends()
    async with one, two, three, four:
        with fuse_file() as file:
            async with open_callback_adapter() as adapter:
                await one.send_fd(file.fd)
                if name != "receive_file":
                    # open() asks the server; only then may it be in trouble.
                    getattr(file, trouble)()
                argument = {"receive_fds": [9], "receive_message": [9]}.get(name, [])
                if name == "receive_file":
                    adapter.wrap(two).receive_file_async(callback=into_trouble(file, trouble))
                else:
                    getattr(adapter.wrap(two), f"{name}_async")(*argument)
                # The operations of other connections go on.
                adapter.wrap(three).receive_fd_async(None, ends, "receive_fd")
                await wait_all_tasks_blocked()
                await four.send_fd(0)
            os.close(ends["receive_fd"])
            gc.collect()
            file.answer()
        assert _closing.wait_closed(30)
    assert two.is_closed()


def into_trouble(file: Any, trouble: str) -> Callable[..., None]:
    def callback(_: object, result: AsyncResult) -> None:
        getattr(file, trouble)()
        # As the adapter does it without a callback.
        result._discard_value()

    return callback


@pytest.mark.parametrize("trouble", ["hang", "fail_flush"])
async def test_send_async_duplicates_of_a_file_in_trouble(trouble: str) -> None:
    """Duplicates whose close hangs or fails do not keep a cancelled send from ending."""
    one, two = connection_pair()
    ends = Ends()
    cancellable = Cancellable()
    async with one, two:
        clog(one)
        with fuse_file() as file:
            async with open_callback_adapter() as adapter:
                adapter.wrap(one).send_fd_async(file.fd, cancellable, ends, "send_fd")
                await wait_all_tasks_blocked()
                getattr(file, trouble)()
                cancellable.cancel()
            assert ends == {"send_fd": OperationCancelled}
            file.answer()
        assert _closing.wait_closed(30)


async def test_result_collected_after_the_run_has_ended() -> None:
    """A socket or stream in a result can be closed where no trio runs."""
    results: list[AsyncResult] = []

    async def main() -> None:
        one, two = connection_pair()
        async with one, two, open_callback_adapter() as adapter:
            gio = adapter.wrap(two)
            for name in ("receive_socket", "receive_stream"):
                given, other = socket.socketpair()
                with given, other:
                    await one.send_fd(given)
                getattr(gio, f"{name}_async")(None, lambda _, result: results.append(result))
                await wait_all_tasks_blocked()

    await trio.to_thread.run_sync(trio.run, main)
    assert len(results) == 2
    with pytest.warns(ResourceWarning, match="unfinished result of receive_s"):
        await trio.to_thread.run_sync(results.clear)
    assert _closing.wait_closed(30)


################################################################
# Nothing keeps a connection alive
################################################################


@pytest.fixture
def no_gc() -> Iterator[None]:
    """The cyclic garbage collector does not run."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def read_results(results: list[AsyncResult], method: str, error: type[Exception]) -> None:
    result = results.pop()
    with pytest.raises(error):
        getattr(result.get_source_object(), f"{method}_finish")(result)


async def fail(conn: UnixConnection, name: str, *arguments: Any) -> list[AsyncResult]:
    """Begin an operation that fails, and return its result."""
    results: list[AsyncResult] = []

    def callback(_: object, result: AsyncResult) -> None:
        results.append(result)

    async with open_callback_adapter() as adapter:
        getattr(adapter.wrap(conn), f"{name}_async")(*arguments, None, callback)
        await wait_all_tasks_blocked()
    return results


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("receive_fd", [], EndOfStreamError),
        ("receive_fds", [9], EndOfStreamError),
        ("receive_file", [], EndOfStreamError),
        ("receive_credentials", [], EndOfStreamError),
        ("send_fd", [0], ConnectionBrokenError),
        ("send_credentials", [], ConnectionBrokenError),
        ("send_message", [b"x"], ConnectionBrokenError),
        ("send_all", [b"x"], ConnectionBrokenError),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.usefixtures("no_gc")
async def test_finish_that_raises_leaves_no_reference_cycle(
    name: str, arguments: list[Any], error: type[Exception], *, finished: bool
) -> None:
    """A result with an error, finished or not, does not keep the connection alive."""
    one, two = connection_pair()
    await two.aclose()
    if name == "receive_file":
        arguments = ["rb"]
    results = await fail(one, name, *arguments)
    assert results[0].had_error()
    if finished:
        read_results(results, name, error)
    results.clear()
    await one.aclose()
    reference = weakref.ref(one)
    del one
    assert reference() is None


@pytest.mark.usefixtures("no_gc")
async def test_receive_fd_async_cancelled_leaves_no_reference_cycle() -> None:
    """Nor does a result of an operation that was cancelled."""
    one, two = connection_pair()
    results: list[AsyncResult] = []
    cancellable = Cancellable()
    async with two:
        async with open_callback_adapter() as adapter:
            adapter.wrap(one).receive_fd_async(
                cancellable, lambda _, result: results.append(result)
            )
            await wait_all_tasks_blocked()
            cancellable.cancel()
        read_results(results, "receive_fd", OperationCancelled)
        await one.aclose()
        reference = weakref.ref(one)
        del one, adapter
        assert reference() is None, gc.get_referrers(reference())


async def test_send_fd_async_sends_at_once() -> None:
    """If the kernel takes it, the message is sent when send_fd_async returns, without a copy."""
    one, two = connection_pair()
    ends = Ends()
    async with one, two:
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(one)
            with open("/dev/null", "rb") as file:
                before = open_descriptors()
                gio.send_fd_async(file, None, ends, "send_fd")
                assert open_descriptors() == before
            assert not ends
            # The kernel has it already, and the file is closed.
            os.close(await two.receive_fd())
        assert ends == {"send_fd": True}


async def test_receive_fd_async_receives_at_once() -> None:
    """A message that has arrived is received when receive_fd_async returns."""
    one, two = connection_pair()
    ends = Ends()
    async with one, two:
        await two.send_fd(0)
        async with open_callback_adapter() as adapter:
            adapter.wrap(one).receive_fd_async(None, ends, "receive_fd")
            with pytest.raises(BlockingIOError):
                raw_socket(one.socket).recv(1, socket.MSG_DONTWAIT)
            assert not ends
        os.close(ends["receive_fd"])


@pytest.mark.parametrize("when", ["before", "between"])
async def test_cancel_pending_after_receive_fd_async_has_received(when: str) -> None:
    """What was received at once is not lost if the operation, or the block, is cancelled then."""
    one, two = connection_pair()
    ends = Ends()
    async with one, two:
        await two.send_fd(0)
        with trio.CancelScope() as scope:
            async with open_callback_adapter() as adapter:
                adapter.wrap(one).receive_fd_async(None, ends, "receive_fd")
                if when == "before":
                    adapter.cancel_pending()
                else:
                    scope.cancel()
        os.close(ends["receive_fd"])


@pytest.mark.parametrize("name", ["send_fd", "receive_fd"])
async def test_async_with_a_busy_direction(name: str) -> None:
    """An operation whose direction a task uses fails at once, and its callback runs."""
    one, two = connection_pair()
    ends = Ends()
    async with one, two, trio.open_nursery() as nursery:
        if name == "send_fd":
            clog(one)
            nursery.start_soon(one.send_fd, 0)
        else:
            nursery.start_soon(one.receive_fd)
        await wait_all_tasks_blocked()
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(one)
            getattr(gio, f"{name}_async")(*([0] if name == "send_fd" else []), None, ends, name)
        assert ends == {name: ConnectionBusyError}
        nursery.cancel_scope.cancel()


async def test_async_without_waiting_reports_the_error_of_the_connection() -> None:
    """The kernel reports a reset once; the operation that meets it at once raises it."""
    left, right = socket.socketpair()
    async with UnixConnection.from_stdlib_socket(left) as one:
        await one.send_all(b"never received")
        right.close()
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(one)
            results: list[AsyncResult] = []
            gio.receive_fd_async(None, lambda _, result: results.append(result))
            gio.send_fd_async(0, None, lambda _, result: results.append(result))
        with pytest.raises(ConnectionBrokenError, match="Connection reset by peer") as caught:
            gio.receive_fd_finish(results[0])
        assert isinstance(caught.value.__cause__, ConnectionResetError)
        with pytest.raises(ConnectionBrokenError) as caught:
            gio.send_fd_finish(results[1])
        assert caught.value.sent == 0


async def send_a_part(conn: UnixConnection) -> None:
    """Send a part of a message, and cancel the rest."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.send_message, bytes(10**6))
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def test_send_fd_async_after_a_message_that_was_cut() -> None:
    """After a message of which a part was sent, nothing is sent at once either."""
    one, two = connection_pair()
    results: list[AsyncResult] = []
    async with one, two:
        await send_a_part(one)
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(one)
            gio.send_fd_async(0, None, lambda _, result: results.append(result))
        with pytest.raises(ConnectionBrokenError, match="an earlier send_message"):
            gio.send_fd_finish(results[0])


async def test_send_fds_after_a_message_that_was_cut() -> None:
    """Nor are file descriptors of several messages."""
    one, two = connection_pair()
    async with one, two:
        await send_a_part(one)
        with pytest.raises(ConnectionBrokenError, match="an earlier send_message"):
            await one.send_fds([0, 0], per_message=1)


async def test_receive_fd_async_after_fds() -> None:
    """What fds() has read ahead is received first."""
    one, two = connection_pair()
    ends = Ends()
    async with one, two:
        with open("/dev/null", "rb") as null:
            await two.send_fds([0, null, 0], per_message=1)
        async for fd in one.fds():
            os.close(fd)
            break
        async with open_callback_adapter() as adapter:
            adapter.wrap(one).receive_fd_async(None, ends, "receive_fd")
        assert os.path.samestat(os.fstat(ends["receive_fd"]), os.stat("/dev/null"))
        os.close(ends["receive_fd"])


async def test_receive_fd_async_of_a_connection_that_takes_no_descriptors() -> None:
    """The byte is received at once, and the error is that of receive_fd."""
    left, right = socket.socketpair()
    one = UnixConnection.from_stdlib_socket(left, receive_descriptors=False)
    results: list[AsyncResult] = []
    async with one:
        right.send(b"x")
        async with open_callback_adapter() as adapter:
            gio = adapter.wrap(one)
            gio.receive_fd_async(None, lambda _, result: results.append(result))
        with pytest.raises(UnexpectedControlMessageError) as caught:
            gio.receive_fd_finish(results[0])
        assert caught.value.data == b"x"
    right.close()


def tasks_of_adapters() -> list[trio.lowlevel.Task]:
    """Return the tasks that perform operations, or wait for one."""
    root = trio.lowlevel.current_root_task()
    assert root is not None
    tasks, found = [root], []
    while tasks:
        task = tasks.pop()
        tasks += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        if task.name.endswith("_async") or "callback adapter" in task.name:
            found.append(task)
    return found


async def test_open_callback_adapter_keeps_few_idle_tasks() -> None:
    """Tasks wait for the next operation, but not as many as there were operations at once."""
    one, two = connection_pair()
    ends = Ends()
    async with one, two:
        async with open_callback_adapter() as adapter:
            pairs = [connection_pair() for _ in range(40)]
            for index, (each, _) in enumerate(pairs):
                adapter.wrap(each).receive_fd_async(None, ends, f"receive_fd:{index}")
            await wait_all_tasks_blocked()
            assert len(tasks_of_adapters()) == 40
            for _, other in pairs:
                await other.send_fd(0)
            while len(ends) < 40:
                await trio.testing.wait_all_tasks_blocked()
            assert 0 < len(tasks_of_adapters()) < 20
            before = set(tasks_of_adapters())
            adapter.wrap(one).send_fd_async(0, None, ends, "send_fd")
            await wait_all_tasks_blocked()
            assert set(tasks_of_adapters()) == before
        assert not tasks_of_adapters()
        for fd in [*ends.values()][:40]:
            os.close(fd)
        os.close(await two.receive_fd())
        for each, other in pairs:
            await each.aclose()
            await other.aclose()
