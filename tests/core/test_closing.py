"""_closing: what a peer chose is closed elsewhere, once, and nothing is raised."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
import trio

from tests._helpers.waiting import until_sync
from trio_unixconn import ConnectionBrokenError, _closing, connection_pair


def pipes(count: int) -> list[int]:
    return [fd for _ in range(count) for fd in os.pipe()]


def is_open(fd: int) -> bool:
    try:
        os.get_inheritable(fd)
    except OSError:
        return False
    return True


def lingering_socket(seconds: int) -> socket.socket:
    """Return a TCP socket whose close(2) blocks: SO_LINGER, and data that no process reads."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        held, _ = server.accept()
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            sock.send(b"x" * 65536)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
    PEERS_OF_LINGERING.append(held)
    return sock


PEERS_OF_LINGERING: list[socket.socket] = []


def release_lingering() -> None:
    while PEERS_OF_LINGERING:
        PEERS_OF_LINGERING.pop().close()
    assert _closing.wait_closed(30)


def test_close_fds_closes_each_and_nothing_between() -> None:
    """Runs of numbers are closed, and the numbers between them are left alone."""
    fds = pipes(20)
    kept = fds[7::9]
    _closing.close_fds(fd for fd in fds if fd not in kept)
    assert _closing.wait_closed(30)
    assert [fd for fd in fds if is_open(fd)] == kept
    for fd in kept:
        os.close(fd)


def test_close_fds_of_nothing_calls_then() -> None:
    """Without file descriptors, then() is called at once."""
    called: list[bool] = []
    _closing.close_fds([], lambda: called.append(True))
    _closing.close_fds([])
    assert called == [True]


def test_close_fds_uses_one_thread_for_many_batches() -> None:
    """200 batches need one thread."""
    before = threading.active_count()
    for _ in range(200):
        _closing.close_fds(os.pipe())
    assert threading.active_count() <= before + 1
    assert _closing.wait_closed(30)


def test_close_fds_ignores_errors() -> None:
    """A descriptor whose close(2) fails does not keep the others open."""
    read, write = os.pipe()
    closed = os.dup(read)
    os.close(closed)
    _closing.close_fds([closed])
    _closing.close_fds([read])
    _closing.close_fds([write])
    assert _closing.wait_closed(30)
    assert not is_open(read)
    assert not is_open(write)


def test_close_fds_without_threads_closes_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can be started, the descriptors are closed before close_fds returns."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_closing, "_closer", _closing._Closer())
    monkeypatch.setattr(threading.Thread, "start", start)
    fds = pipes(3)
    _closing.close_fds(fds)
    assert not any(map(is_open, fds))


def test_close_fds_with_a_stuck_thread_starts_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is queued right after a close(2) that does not return is closed by another thread."""
    closer = _closing._Closer()
    monkeypatch.setattr(_closing, "_closer", closer)
    read, write = os.pipe()
    closed = threading.Event()
    _closing.close_fds([lingering_socket(60).detach()])
    _closing.close_fds([read, write], closed.set)
    assert closed.wait(30)
    assert closer.unfinished == 1
    release_lingering()
    assert not is_open(read)
    assert not is_open(write)


def test_close_fds_with_many_stuck_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of threads follows that of stuck ones; those end when all is closed."""
    closer = _closing._Closer()
    monkeypatch.setattr(_closing, "_closer", closer)
    monkeypatch.setattr(_closing, "STUCK_AFTER", 0.05)
    for _ in range(6):
        _closing.close_fds([lingering_socket(60).detach()])
    closed = threading.Event()
    _closing.close_fds(os.pipe(), closed.set)
    assert closed.wait(30)
    assert closer.unfinished == 6
    assert len(closer.threads) >= 6
    release_lingering()
    until_sync(lambda: len(closer.threads) == 1)
    until_sync(lambda: not closer.is_watched)


def test_close_fds_starts_a_bounded_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With MAX_THREADS of them stuck, what comes later waits in the queue; that is logged once."""
    closer = _closing._Closer()
    monkeypatch.setattr(_closing, "_closer", closer)
    monkeypatch.setattr(_closing, "MAX_THREADS", 1)
    monkeypatch.setattr(_closing, "STUCK_AFTER", 0.001)
    _closing.close_fds([lingering_socket(60).detach()])
    fds = pipes(1)
    _closing.close_fds(fds)
    until_sync(lambda: "1 threads are blocked in close(2)" in caplog.text)
    _closing.close_fds([])
    assert len(closer.threads) == 1
    assert not _closing.wait_closed(0)
    assert caplog.text.count("threads are blocked") == 1
    release_lingering()
    assert not any(map(is_open, fds))
    until_sync(lambda: not closer.is_watched)


def test_close_fds_without_a_thread_to_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the queue cannot be watched, the thread closes what is queued when it gets free."""
    closer = _closing._Closer()
    monkeypatch.setattr(_closing, "_closer", closer)
    _closing.close_fds([lingering_socket(60).detach()])

    def start(thread: threading.Thread) -> None:
        raise MemoryError

    fds = pipes(1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        _closing.close_fds(fds)
    assert not closer.is_watched
    release_lingering()
    assert not any(map(is_open, fds))


def test_close_fds_survives_mistakes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A number that no file descriptor has, and a close() that fails, keep nothing else open."""
    closer = _closing._Closer()
    monkeypatch.setattr(_closing, "_closer", closer)

    def fail() -> None:
        raise LookupError("a mistake")

    fds = pipes(1)
    _closing.close_fds([fds[0], 2**40, 2**50, 2**50 + 1])
    _closing.close_object(fail)
    _closing.close_fds(fds[1:])
    assert _closing.wait_closed(30)
    assert not any(map(is_open, fds))
    assert "a mistake" in caplog.text
    assert all(thread.is_alive() for thread in closer.threads)


def test_close_fds_without_another_thread_leaves_the_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If no second thread can be started, the first one closes what is queued, when it can."""
    closer = _closing._Closer()
    monkeypatch.setattr(_closing, "_closer", closer)
    monkeypatch.setattr(_closing, "STUCK_AFTER", -1)
    _closing.close_fds(pipes(1))
    assert _closing.wait_closed(30)

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_closing._Closer, "_has_free_thread", lambda _: False)
    monkeypatch.setattr(threading.Thread, "start", start)
    fds = pipes(1)
    _closing.close_fds(fds)
    assert _closing.wait_closed(30)
    assert not any(map(is_open, fds))


def test_close_fds_batched_closes_many_calls_with_one_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What many calls hand over is closed together, and a later call is not forgotten."""
    closer = _closing._Closer()
    monkeypatch.setattr(_closing, "_closer", closer)
    monkeypatch.setattr(_closing, "BATCH_DELAY", 0.2)
    fds = pipes(20)
    for fd in fds:
        _closing.close_fds_batched([fd])
    _closing.close_fds_batched([])
    assert closer.unfinished <= 1 + len(fds) // 2
    assert _closing.wait_closed(30)
    assert not any(map(is_open, fds))
    monkeypatch.setattr(_closing, "BATCH_DELAY", 0)
    for fd in pipes(20):
        _closing.close_fds_batched([fd])
        assert _closing.wait_closed(30)
        assert not is_open(fd)


def test_close_fds_batched_without_threads_closes_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can be started, the descriptors are closed before it returns."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def sleep(seconds: float) -> None:
        raise AssertionError("the caller must not sleep")

    monkeypatch.setattr(_closing, "_closer", _closing._Closer())
    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(time, "sleep", sleep)
    fds = pipes(3)
    _closing.close_fds_batched(fds)
    assert not any(map(is_open, fds))


def test_fork_closes_copies_of_what_is_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child process closes its copies of what was collected, without the lock of the parent."""
    closer = _closing._Closer()
    monkeypatch.setattr(_closing, "_closer", closer)
    monkeypatch.setattr(closer, "_has_free_thread", lambda: True)
    fds = pipes(2)
    _closing.close_fds_batched(fds)
    # As in the child, while another thread of the parent holds the lock.
    locked, release = threading.Event(), threading.Event()

    def hold() -> None:
        with closer.lock:
            locked.set()
            assert release.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert locked.wait(30)
    _closing._after_fork()
    assert _closing.wait_closed(30)
    assert not any(map(is_open, fds))
    release.set()
    thread.join()


def test_fork_closes_copies_of_what_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child process has no thread of its own yet, and closes its copies of the queue."""
    closer = _closing._Closer()
    monkeypatch.setattr(_closing, "_closer", closer)
    monkeypatch.setattr(_closing, "MAX_THREADS", 1)
    _closing.close_fds([lingering_socket(30).detach()])
    fds = pipes(2)
    _closing.close_fds(fds)
    # As in the child, without one.
    _closing._after_fork()
    assert _closing._closer is not closer
    assert _closing.wait_closed(30)
    assert not any(map(is_open, fds))
    is_finished = threading.Event()
    with closer.lock:
        closer.queue.put(([], None, is_finished.set))
    release_lingering()
    assert is_finished.wait(30)


def test_close_fds_starts_no_thread_at_the_end_of_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No thread runs any more then; the end of the process closes what is queued."""
    closer = _closing._Closer()
    monkeypatch.setattr(_closing, "_closer", closer)
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    fds = pipes(1)
    _closing.close_fds(fds)
    assert all(map(is_open, fds))
    assert closer.threads == set()
    monkeypatch.undo()
    closer._close_here()
    assert not any(map(is_open, fds))


@pytest.mark.parametrize("error", [None, OSError, ValueError])
def test_close_object_calls_close_in_the_thread(error: type[Exception] | None) -> None:
    """The close method is called once, in another thread, and its errors are ignored."""
    threads: list[int] = []

    def close() -> None:
        threads.append(threading.get_ident())
        if error is not None:
            raise error

    _closing.close_object(close)
    assert _closing.wait_closed(30)
    assert len(threads) == 1
    assert threads != [threading.get_ident()]


def test_close_socket_with_an_empty_queue_closes_here() -> None:
    """Nothing is unread: the socket is closed before close_socket returns."""
    one, two = socket.socketpair()
    with two:
        assert not _closing.has_unread(one)
        _closing.close_socket(one)
        assert one.fileno() == -1
        assert two.recv(1) == b""
    closed: list[bool] = []
    _closing.close_socket(one, lambda: closed.append(True))
    assert closed == [True]


def test_close_socket_with_unread_data_closes_in_the_thread() -> None:
    """Something is unread: the closing thread closes the socket, and calls then()."""
    one, two = socket.socketpair()
    closed = threading.Event()
    with two:
        two.send(b"x")
        assert _closing.has_unread(one)
        _closing.close_socket(one, closed.set)
        assert one.fileno() == -1
        assert closed.wait(30)
        with pytest.raises(ConnectionResetError):
            two.recv(1)


async def test_close_dropped_kept_during_a_collection_of_another_thread() -> None:
    """A connection that is dropped while another thread collects garbage is closed at once."""
    one, two = connection_pair()
    async with two:
        await two.send_all(b"unread")
        collector = threading.Thread(target=_closing._on_collection, args=("start", {}))
        collector.start()
        collector.join()
        try:
            with pytest.warns(ResourceWarning, match="unclosed socket"):
                del one
        finally:
            _closing._on_collection("stop", {})
        with trio.fail_after(30), pytest.raises(ConnectionBrokenError):
            await two.receive_some()


# Collects garbage when the interpreter has cleared the globals of the module.
COLLECT_AT_EXIT = """
import builtins
from trio_unixconn import _closing

class Late:
    kept = _closing
    print = print
    def __del__(self):
        self.print(self.kept.threading)
        for _ in range(2):
            [[] for _ in range(100_000)]

builtins.kept = _closing
_closing.late = Late()
"""


def test_on_collection_while_the_interpreter_exits() -> None:
    """A collection when all globals are None already prints nothing."""
    process = subprocess.run(
        [sys.executable, "-c", COLLECT_AT_EXIT],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=True,
        timeout=60,
    )
    assert process.stdout in {b"None\n", b""}


def test_has_unread_of_a_listener() -> None:
    """A listening socket has something unread while a connection waits to be accepted."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind("")
        listener.listen()
        assert not _closing.has_unread(listener)
        client.connect(listener.getsockname())
        assert _closing.has_unread(listener)


async def test_close_socket_does_not_block_on_a_lingering_socket() -> None:
    """A TCP socket with SO_LINGER in the queue: close_socket returns, and the thread waits."""
    one, two = connection_pair()
    async with two:
        with lingering_socket(30) as sent:
            await two.send_fd(sent)
        raw = one._receiver.raw
        _closing.close_socket(raw)
        assert raw.fileno() == -1
        assert not _closing.wait_closed(0)
    release_lingering()


def test_has_unread_without_fcntl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system cannot tell, has_unread() is True, so a thread closes the socket."""
    monkeypatch.setitem(sys.modules, "termios", None)
    _closing._count_unread.cache_clear()
    one, two = socket.socketpair()
    with one, two:
        assert _closing.has_unread(one)
        monkeypatch.undo()
        _closing._count_unread.cache_clear()
        assert not _closing.has_unread(one)
        two.send(b"x")
        assert _closing.has_unread(one)
        one.close()
        assert _closing.has_unread(one)
