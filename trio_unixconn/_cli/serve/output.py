"""Writing lines without waiting for the terminal, pipe or disk that they go to.

Invariant: no call of another thread blocks or raises because of what is at the other end of an
output. A line that cannot be written is counted, and the next one that can be says how many.

Sources: write(2), tty_ioctl(4), pty(7), signal(7)
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from ..._owner import DescriptorOwner

# The maximum number of bytes that wait for an output. Lines that do not fit are lost.
MAX_PENDING: Final = 2**20
# A longer line of a worker is forwarded in parts.
MAX_LINE: Final = 2**16
# The time in seconds after which a non-blocking output is tried again.
RETRY: Final = 1.0
# The reader has closed the pipe, or the terminal is gone.
_GONE: Final = frozenset(
    {errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ENODEV, errno.ECONNRESET}
)


class LineOutput(DescriptorOwner):
    """A file descriptor that a thread of its own writes to.

    Args:
      fd: owned by this object afterwards. Whether it blocks does not matter.
      lost_line: makes the line that says how many lines were lost, and why.
      reopen: opens the file again, for :meth:`reopen`; may block.
      on_reopened: called in the thread with the error of that, or None.
    """

    def __init__(
        self,
        fd: int,
        lost_line: Callable[[int, str], bytes],
        *,
        reopen: Callable[[], int] | None = None,
        on_reopened: Callable[[OSError | None], None] | None = None,
    ) -> None:
        self._fd = fd
        self._lost_line = lost_line
        self._open_again = reopen
        self._on_reopened = on_reopened
        # Condition has an RLock: a finalizer may log while this thread holds it.
        self._changed = threading.Condition()
        # Each with the number of lines that are lost if it cannot be written.
        self._pending: deque[tuple[bytes, int]] = deque()
        self._size = 0
        self._writing = False
        self._gone = False
        self._must_reopen = False
        self._closing = False
        self._lost = 0
        self._why = ""
        # Whether the last line was written in part only.
        self._torn = False
        self._thread = threading.Thread(target=self._run, name=f"output {fd}", daemon=True)
        self._thread.start()

    def put(self, data: bytes) -> None:
        """Have lines written, or count them as lost if too many wait."""
        with self._changed:
            if self._gone:
                return
            if self._size + len(data) > MAX_PENDING:
                self._lose(data.count(b"\n"), "the output is too slow")
                return
            self._say_lost()
            self._append(data, data.count(b"\n"))
            self._changed.notify()

    def _say_lost(self) -> None:
        if self._lost:
            self._append(self._lost_line(self._lost, self._why), self._lost)
            self._lost = 0

    def _append(self, data: bytes, lines: int) -> None:
        self._pending.append((data, lines))
        self._size += len(data)

    def _lose(self, lines: int, why: str) -> None:
        self._lost += lines
        self._why = why

    @property
    def is_idle(self) -> bool:
        """Whether everything is written."""
        with self._changed:
            return not self._pending and not self._writing

    @property
    def is_gone(self) -> bool:
        """Whether no process reads this any more."""
        return self._gone

    def reopen(self) -> None:
        """Have the file opened again, after what waits is written.

        Only with the arguments ``reopen`` and ``on_reopened``.
        """
        with self._changed:
            self._must_reopen = True
            self._changed.notify()

    def close(self, timeout: float) -> bool:
        """Write what waits, for at most ``timeout`` seconds, and close the file descriptor.

        Returns:
          Whether that is done. If not, the thread ends with the process.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        block_signals()
        while True:
            with self._changed:
                self._writing = False
                while not (self._pending or self._must_reopen or self._closing):
                    self._changed.wait()
                if self._closing:
                    self._say_lost()
                batch = list(self._pending)
                self._pending.clear()
                self._size = 0
                self._writing = True
                must_reopen, self._must_reopen = self._must_reopen, False
                closing = self._closing
            self._write_batch(batch)
            if must_reopen:
                self._reopen_now()
            elif closing:
                # What was logged meanwhile is lost, as if it had been logged later.
                with suppress(OSError):
                    os.close(self._fd)
                return

    def _write_batch(self, batch: list[tuple[bytes, int]]) -> None:
        """Write lines; those after an error are lost, and so is one that is written in part."""
        data = b"".join(each for each, _ in batch)
        # The rest of a torn line is lost, and the next line begins on its own.
        prefix = b"\n" if self._torn and data else b""
        written = self._write(memoryview(prefix + data)) - len(prefix)
        for each, lines in batch:
            if written < len(each):
                rest = each[max(0, written) :].count(b"\n")
                # A line about lost lines stands for more than itself.
                with self._changed:
                    self._lose(rest if lines == each.count(b"\n") else lines, self._why)
            written -= len(each)

    def _write(self, view: memoryview) -> int:
        """Write, and return how many bytes were written before an error."""
        done = 0
        while done < len(view) and not self._gone:
            try:
                done += os.write(self._fd, view[done:])
            except BlockingIOError:
                # Another process has made the terminal non-blocking.
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll(RETRY * 1000)
            except OSError as exc:
                with self._changed:
                    self._why = exc.strerror or str(exc)
                    self._gone = exc.errno in _GONE
                break
        if done:
            # A picture of the table ends without a newline, and is whole nevertheless.
            self._torn = done < len(view) and view[done - 1] != ord(b"\n")
        return done

    def _reopen_now(self) -> None:
        error = None
        try:
            assert self._open_again is not None  # reopen() says that there is one
            fd = self._open_again()
        except OSError as exc:
            error = exc
        else:
            old, self._fd = self._fd, fd
            self._torn = False
            with self._changed:
                self._gone = False
            os.close(old)
        assert self._on_reopened is not None  # as for reopen
        self._on_reopened(error)


def block_signals() -> None:
    """Have this thread, which may write to a terminal in the background, not stopped (SIGTTOU)."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


class CapturedStream(DescriptorOwner):
    """Standard output or error of this process and its workers, forwarded line by line.

    So a worker that prints never waits for a terminal or a disk. If the stream is a terminal, the
    workers still get one: Python writes each line when it is complete.

    Args:
      fd: 1 or 2.
      on_line: called in a thread with each line, without its end.
    """

    def __init__(self, fd: int, on_line: Callable[[bytes], None]) -> None:
        self._number = fd
        self._on_line = on_line
        self.original: int = os.dup(fd)
        self._read_end, write_end = _channel_like(fd)
        os.dup2(write_end, fd)
        os.close(write_end)
        self._thread = threading.Thread(target=self._run, name=f"capture {fd}", daemon=True)
        self._thread.start()

    def restore(self, timeout: float) -> None:
        """Restore the stream, and wait for at most ``timeout`` seconds for its last lines."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(self.original, self._number)
        # A process that a handler has started may still hold the other end.
        self._thread.join(timeout)

    def _run(self) -> None:
        block_signals()
        rest = b""
        while data := self._read():
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > MAX_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._on_line(line)
        if rest:
            self._on_line(rest)
        os.close(self._read_end)

    def _read(self) -> bytes:
        try:
            return os.read(self._read_end, MAX_LINE)
        except OSError:
            # EIO: no process has the terminal any more.
            return b""


def _channel_like(fd: int) -> tuple[int, int]:
    """Return two ends of a pipe, or of a terminal if ``fd`` is one."""
    if os.isatty(fd):
        # Not on Windows.
        import fcntl
        import termios
        import tty

        with suppress(OSError):
            master, slave = os.openpty()
            tty.setraw(slave)
            size = fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8))
            fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
            return master, slave
    return os.pipe()


def print_error(text: str) -> None:
    """Print to standard error, and give up after a second if it is stalled."""
    output = LineOutput(os.dup(2), lambda _, why: why.encode())
    output.put(
        f"{text}\n".encode(getattr(sys.stderr, "encoding", None) or "utf-8", "backslashreplace")
    )
    output.close(RETRY)


def open_missing_streams() -> None:
    """Open /dev/null as standard input, output or error if the parent process has closed it.

    Otherwise the next file or socket would get its number, and the workers would write there.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.get_inheritable(number)
        except OSError:
            # The lowest free number is this one.
            fd = os.open(os.devnull, mode)
            os.set_inheritable(fd, True)
            assert fd == number  # all below it are open
