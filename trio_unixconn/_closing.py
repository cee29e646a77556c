"""Close what a peer chose, without blocking the event loop.

close(2) can block for as long as a peer likes: for a TCP socket with SO_LINGER and unsent data,
for a file whose file system calls ``flush`` (FUSE, NFS), and for a Unix socket that has either of
them in its receive queue, however deeply nested. It can also fail, with an error about bytes that
another process wrote. So the file descriptors that a peer sent, and the sockets whose queues a
peer can fill, are closed by a thread.

Invariant: nothing in this module raises into its caller, and every file descriptor is closed
exactly once.

There is one thread, started when first needed, not one per file descriptor. A close that never
returns must not keep all later ones waiting, though: other peers would not see the end of their
streams, and file descriptors would pile up until the process has none left. So while something
waits in the queue, a second thread watches it. If every closing thread has been in close(2) for
longer than STUCK_AFTER, their number is doubled, up to MAX_THREADS. A thread that was stuck ends
when it gets free, finds the queue empty, and is not the last. If no thread can be started,
the file descriptors are closed in the calling thread.

What remains: with MAX_THREADS closes that do not return, everything later waits, which is logged.
A process with such peers does better to accept no file descriptors from them
(receive_descriptors=False).

The queue is a ``SimpleQueue`` because :func:`close_fds` may be called by a finalizer, at any
point, even while the same thread is inside of this module; for the same reason the lock is
reentrant.

Sources: close(2), socket(7) (SO_LINGER), ioctl_fionread in unix(7)
"""

from __future__ import annotations

import gc
import logging
import os
import select
import socket
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from queue import Empty, SimpleQueue
from typing import Final, TypeAlias

logger: Final = logging.getLogger("trio_unixconn")

# File descriptors, the close method of an object, and a function to call after they are closed.
_Batch: TypeAlias = tuple[list[int], Callable[[], object] | None, Callable[[], object] | None]

# How long a thread may be in close(2) before another one takes over the queue, in seconds.
STUCK_AFTER: Final = 0.5
MAX_THREADS: Final = 1000
# How long close_fds_batched() collects file descriptors, in seconds.
BATCH_DELAY: Final = 0.005
# How long wait_closed() sleeps between two reads of the counter, in seconds.
_POLL_INTERVAL: Final = 0.001


class _Closer:
    """The queue, and the threads that work it off."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.queue: SimpleQueue[_Batch] = SimpleQueue()
        self.threads: set[_ClosingThread] = set()
        # Batches that are queued or being closed.
        self.unfinished = 0
        self.is_watched = False
        self.is_limit_logged = False
        # What close_fds_batched() has collected, and whether close_batched() is queued.
        self.batched: list[int] = []
        self.is_batch_queued = False

    def add(self, batch: _Batch) -> None:
        with self.lock:
            self.unfinished += 1
        self.queue.put(batch)
        if not self._has_free_thread() and not self._start_thread():
            self._close_here()
        elif self.unfinished > 1:
            # The thread may be about to block in what was queued before.
            self._start_watching()

    def _start_watching(self) -> None:
        with self.lock:
            if self.is_watched or sys.is_finalizing():
                return
            self.is_watched = True
        try:
            threading.Thread(target=self._watch, name="trio_unixconn watch", daemon=True).start()
        except Exception:  # as for the other threads
            self.is_watched = False

    def _watch(self) -> None:
        """Start threads while all are stuck and something waits in the queue."""
        while True:
            time.sleep(STUCK_AFTER)
            with self.lock:
                if self.queue.empty():
                    self.is_watched = False
                    return
            for _ in range(max(1, len(self.threads))):
                if self._has_free_thread() or not self._start_thread():
                    break
            if len(self.threads) >= MAX_THREADS and not self.is_limit_logged:
                self.is_limit_logged = True
                logger.warning(
                    "%d threads are blocked in close(2), on file descriptors that peers have sent; "
                    "what is closed from now on stays open until one of them returns",
                    len(self.threads),
                )

    def add_batched(self, fds: Iterable[int]) -> None:
        with self.lock:
            self.batched.extend(fds)
            if self.is_batch_queued or not self.batched:
                return
            self.is_batch_queued = True
        self.add(([], self.close_batched, None))

    def close_batched(self) -> None:
        if isinstance(threading.current_thread(), _ClosingThread):
            time.sleep(BATCH_DELAY)
        with self.lock:
            fds, self.batched = self.batched, []
            self.is_batch_queued = False
        _close_each(fds)

    def _has_free_thread(self) -> bool:
        threads = tuple(self.threads)
        if len(threads) >= MAX_THREADS:
            return True
        stuck = time.monotonic() - STUCK_AFTER
        return any(thread.busy_since > stuck for thread in threads)

    def _start_thread(self) -> bool:
        """Start a thread; return False if no thread works off the queue."""
        if sys.is_finalizing():
            # start() would hang, because no new thread runs any more. The end of the process
            # closes what is in the queue.
            return True
        thread = _ClosingThread(self)
        with self.lock:
            self.threads.add(thread)
        try:
            thread.start()
        except Exception:  # RuntimeError or MemoryError
            # The system has no more threads, or the interpreter is shutting down.
            with self.lock:
                self.threads.discard(thread)
                return bool(self.threads)
        return True

    def _close_here(self) -> None:
        with suppress(Empty):
            while True:
                self.finish(self.queue.get_nowait())

    def finish(self, batch: _Batch) -> None:
        fds, close, then = batch
        try:
            _close_each(fds)
            if close is not None:
                with suppress(OSError, ValueError):
                    close()
        except Exception:
            # A mistake in this process. The thread continues with the rest of the queue.
            logger.exception("closing failed")
        finally:
            with self.lock:
                self.unfinished -= 1
            if then is not None:
                then()

    def leave(self, thread: _ClosingThread) -> bool:
        """Whether a thread that was stuck may end, because others have taken over."""
        with self.lock:
            if len(self.threads) == 1 or not self.queue.empty():
                return False
            self.threads.discard(thread)
            return True


class _ClosingThread(threading.Thread):
    def __init__(self, closer: _Closer) -> None:
        super().__init__(name="trio_unixconn closing", daemon=True)
        self._closer = closer
        # When it began to close a batch; infinity while it waits for one.
        self.busy_since = time.monotonic()

    def run(self) -> None:
        closer = self._closer
        while True:
            self.busy_since = float("inf")
            batch = closer.queue.get()
            began = self.busy_since = time.monotonic()
            closer.finish(batch)
            if time.monotonic() - began > STUCK_AFTER and closer.leave(self):
                return


_closer = _Closer()


def _after_fork() -> None:
    """Start anew in a child process, which has no thread but the one that forked.

    It has copies of the file descriptors that are still queued, and closes them. A batch that
    was being closed at that moment is left alone: which part of it is open cannot be known.
    """
    global _closer
    before, _closer = _closer, _Closer()
    while not before.queue.empty():
        fds, close, _ = before.queue.get_nowait()
        # Another thread may hold the lock that close_batched() takes.
        if close != before.close_batched:
            _closer.add((fds, close, None))
    _closer.add_batched(before.batched)
    # If the fork happened within add(), that continues with these: its threads do not exist here.
    before.threads.clear()


if hasattr(os, "register_at_fork"):  # pragma: no branch - not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def _close_each(fds: list[int]) -> None:
    """Close file descriptors, each run of consecutive numbers with one call.

    One call means that the GIL is released and taken again once: a busy event loop lets another
    thread have it every few milliseconds only.
    """
    # closerange(2) would take a negative number for the end of all numbers.
    fds = sorted(fd for fd in fds if fd >= 0)
    first = position = 0
    while position < len(fds):
        position += 1
        if position == len(fds) or fds[position] != fds[position - 1] + 1:
            if position - first == 1:
                # An error is about data that was written before; the descriptor is closed.
                # OverflowError: not the number of a file descriptor.
                with suppress(OSError, OverflowError):
                    os.close(fds[first])
            else:
                with suppress(OverflowError):
                    os.closerange(fds[first], fds[position - 1] + 1)
            first = position


def close_fds(fds: Iterable[int], then: Callable[[], object] | None = None) -> None:
    """Close file descriptors in the closing thread.

    Args:
      fds: file descriptors that the caller owns, and no longer after this.
      then: called in the closing thread when all of them are closed; it must not raise.
    """
    batch = list(fds)
    if batch:
        _closer.add((batch, None, then))
    elif then is not None:
        then()


def close_fds_batched(fds: Iterable[int]) -> None:
    """Close file descriptors in the closing thread, a few milliseconds later.

    For many calls with a file descriptor or two. To wake the thread in each of them costs the
    calling thread 20 us, because it loses the GIL.

    Args:
      fds: file descriptors that the caller owns, and no longer after this.
    """
    _closer.add_batched(fds)


def close_object(close: Callable[[], object]) -> None:
    """Call the close method of an object, such as a file, in the closing thread.

    Args:
      close: closes what a peer chose. An OSError or ValueError that it raises is ignored.
    """
    _closer.add(([], close, None))


def close_socket(sock: socket.socket, then: Callable[[], object] | None = None) -> None:
    """Close a socket whose receive queue a peer can fill.

    If nothing is unread it is closed here, because then there is nothing in it to wait for.
    Otherwise the closing thread closes it.

    A peer can still send something in the microsecond between the check and close(2). To rule
    that out takes shutdown(2), which would end the connection for other processes that hold it.
    """
    if sock.fileno() == -1:
        pass
    elif has_unread(sock):
        close_fds([sock.detach()], then)
        return
    else:
        with suppress(OSError):
            sock.close()
    if then is not None:
        then()


# A weak reference calls back only while it is alive itself.
_sockets: Final[dict[weakref.ref[object], socket.socket]] = {}
# A dict, because a set takes more memory.
_kept: Final[dict[socket.socket, None]] = {}


def keep(sock: socket.socket) -> None:
    """Keep a socket alive until close_dropped_kept().

    The garbage collector finalizes all objects of a cycle, in any order: the finalizer of the
    socket could run before that of its owner, and close it in the event loop. A weak reference for
    each connection would prevent that, too, but takes three times the memory.
    """
    _kept[sock] = None


def close_dropped_kept(owner: object, sock: socket.socket) -> None:
    """Do what close_dropped() does for a socket that was kept until now."""
    if sock in _kept:
        if sock.fileno() != -1:
            if _collecting_thread == threading.get_ident():
                _collected.append((owner, sock))
            else:
                close_dropped(owner, sock)
        _kept.pop(sock, None)


_collected: Final[list[tuple[object, socket.socket]]] = []
# The thread in which the garbage collector is running. Others can run in the middle of it.
_collecting_thread: int | None = None


def _on_collection(
    phase: str, info: dict[str, int], get_ident: Callable[[], int] = threading.get_ident
) -> None:
    """Make the weak references that finalizers want when the garbage collector has ended.

    Since Python 3.14 it clears those that a finalizer makes to an object of the same cycle, and
    does not call back. (gc_collect_region() in CPython's Python/gc.c)

    While the interpreter exits, this is called when the globals of this module are None already.
    """
    del info
    global _collecting_thread  # noqa: PLW0603
    _collecting_thread = get_ident() if phase == "start" else None
    while _collected and _collecting_thread is None:
        close_dropped(*_collected.pop())


gc.callbacks.append(_on_collection)


def close_dropped(owner: object, sock: socket.socket) -> None:
    """Have a socket closed without blocking if ``owner`` is collected while it is open.

    Otherwise the finalizer of the socket closes it, in the event loop.
    """
    _sockets[weakref.ref(owner, _on_dropped)] = sock


def _on_dropped(reference: weakref.ref[object]) -> None:
    sock = _sockets.pop(reference)
    if sock.fileno() != -1 and (has_unread(sock) or is_readable(sock.fileno())):
        # The finalizer says the same of those that are left to it.
        # Not repr(): it has the peer's address, which the peer chose.
        text = f"unclosed {type(sock).__name__}, fd={sock.fileno()}"
        close_fds([sock.detach()])
        warnings.warn(text, ResourceWarning, stacklevel=2)


def has_unread(sock: socket.socket | int) -> bool:
    """Whether the receive queue of a socket is, or may be, not empty.

    For a listening socket: whether a connection waits to be accepted. True if the system does
    not say. Source: unix(7) (SIOCINQ)
    """
    count = _count_unread()
    number = sock if isinstance(sock, int) else sock.fileno()
    if count is None or number == -1:
        return True
    try:
        return any(count(number))
    except OSError:
        return is_readable(number)


def is_readable(number: int) -> bool:
    """Whether something is in the receive queue of a socket, even a datagram without bytes."""
    poll = select.poll()
    poll.register(number, select.POLLIN)
    return bool(poll.poll(0))


@cache
def _count_unread() -> Callable[[int], bytes] | None:
    """Return a function that returns the number of unread bytes as a C int; None on Windows.

    Cached, because an import statement takes as long as the system call.
    """
    try:
        import fcntl
        import termios
    except ImportError:
        return None
    return lambda fd: fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0")


def wait_closed(timeout: float) -> bool:
    """Block until everything that was queued is closed; return whether it is.

    For tests, which count file descriptors.
    """
    deadline = time.monotonic() + timeout
    while _closer.unfinished:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_INTERVAL)
    return True
