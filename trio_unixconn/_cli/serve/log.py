"""The log of a server: records of the package, and what its workers print.

Invariant: logging never blocks and never raises, and no text of a handler or a peer reaches a
terminal unescaped.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Final, Literal, TextIO

from rich.text import Text

from ...pool._supervisor import CANCELLED, UNFINISHED
from .._console import printable
from .output import CapturedStream, LineOutput

logger: Final = logging.getLogger("trio_unixconn.serve")
# How many lines are printed at a time above a table.
MAX_LINES: Final = 50
# How long the end of the process waits for all outputs, in seconds.
CLOSE_TIMEOUT: Final = 1.0
_STYLES: Final = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}
_TIME: Final = "%Y-%m-%d %H:%M:%S"

LogFormat = Literal["text", "json"]


class Log(logging.Handler):
    """Writes records of the package, and lines of workers, to standard output or a file.

    Args:
      file: the path of a file for the records. Default: standard output.
      form: text, or one JSON object in each line.
      level: records below it are dropped.
      table: whether a table is shown on standard output. Lines wait for :meth:`take` then.

    Raises:
      OSError: the file cannot be opened.
    """

    def __init__(
        self, *, file: str | None, form: LogFormat, level: int, table: bool = False
    ) -> None:
        super().__init__(level)
        self._lock = threading.RLock()
        self.ended_jobs: EndedJobs = EndedJobs(logger.log)
        self.addFilter(self.ended_jobs)
        self._json = form == "json"
        self._table = table
        self._above: list[Text] = []
        self._left_out = 0
        # Before anything is redirected: this can fail.
        # Of a file that is opened again, the directory may be another by then.
        self._path = None if file is None else os.path.abspath(file)
        self._file = None
        if self._path is not None:
            self._file = LineOutput(
                self._open_file(),
                self._lost_line,
                reopen=self._open_file,
                on_reopened=self._on_reopened,
            )
        self._encodings = {
            "stdout": _encoding(sys.stdout),
            "stderr": _encoding(sys.stderr),
        }
        self._are_terminals = {"stdout": os.isatty(1), "stderr": os.isatty(2)}
        self._streams = {
            "stdout": CapturedStream(1, lambda line: self._forward("stdout", line)),
            "stderr": CapturedStream(2, lambda line: self._forward("stderr", line)),
        }
        self._outputs = {
            name: LineOutput(os.dup(stream.original), self._lost_line)
            for name, stream in self._streams.items()
        }

    def emit(self, record: logging.LogRecord) -> None:
        """Have a record written."""
        try:
            text = self._format_record(record)
        except Exception:  # the arguments of a record can be anything
            self.handleError(record)
            return
        if self._file is not None:
            self._file.put(text.encode("utf-8", "backslashreplace") + b"\n")
        else:
            self._print("stdout", text, _STYLES.get(record.levelno, ""))

    def reopen(self) -> None:
        """Open the file again, which another program has renamed."""
        if self._file is None:
            logger.info("received SIGUSR1: there is no --log-file to open again")
        else:
            self._file.reopen()

    def stop(self) -> None:
        """Restore standard output and error, and write what waits, in bounded time."""
        logging.getLogger("trio_unixconn").removeHandler(self)
        self.leave_table()
        deadline = time.monotonic() + CLOSE_TIMEOUT
        for stream in self._streams.values():
            stream.restore(max(0.0, deadline - time.monotonic()))
        for output in (*self._outputs.values(), self._file):
            if output is not None:
                output.close(max(0.0, deadline - time.monotonic()))
        for stream in self._streams.values():
            os.close(stream.original)

    ################################################################
    # A table on standard output
    ################################################################

    @property
    def terminal(self) -> LineOutput:
        """Standard output, for what draws a table there."""
        return self._outputs["stdout"]

    @property
    def terminal_fd(self) -> int:
        """Standard output, for its size."""
        return self._streams["stdout"].original

    @property
    def originals(self) -> tuple[int, int]:
        """Standard output and error as they were, for a program that outlives this one."""
        return self._streams["stdout"].original, self._streams["stderr"].original

    @property
    def encoding(self) -> str:
        """The encoding of standard output."""
        return self._encodings["stdout"]

    def take(self) -> Text | None:
        """Return the lines that wait for the next picture of the table."""
        with self._lock:
            lines, self._above = self._above, []
            left_out, self._left_out = self._left_out, 0
        if left_out:
            lines.append(Text(f"... and {left_out} more lines, which --plain prints"))
        return Text("\n").join(lines) if lines else None

    def leave_table(self) -> None:
        """Print plain lines from now on."""
        with self._lock:
            self._table = False
            lines = self.take()
        if lines is not None:
            self._write("stdout", lines.plain)

    ################################################################
    # Lines
    ################################################################

    def _format_record(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        return self._formatted(record.created, record.levelname, record.name, text)

    def _formatted(self, when: float, level: str, name: str, text: str) -> str:
        if self._json:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when))
            return json.dumps(
                {
                    "time": f"{stamp}.{int(when * 1000) % 1000:03}Z",
                    "level": level,
                    "logger": name,
                    "message": text,
                }
            )
        whole = f"{time.strftime(_TIME, time.localtime(when))} {level}: {text}"
        return "\n".join(map(printable, whole.splitlines()))

    def _lost_line(self, count: int, why: str) -> bytes:
        lines = "1 line" if count == 1 else f"{count} lines"
        text = f"{lines} could not be written ({why})"
        return self._formatted(time.time(), "WARNING", logger.name, text).encode() + b"\n"

    def _forward(self, name: str, line: bytes) -> None:
        """Print a line of a worker."""
        if self._json and self._file is None and name == "stdout":
            text = line.decode("utf-8", "backslashreplace")
            self._write(name, self._formatted(time.time(), "INFO", name, text))
        elif self._are_terminals[name]:
            self._print(name, printable(line.decode("utf-8", "backslashreplace"), keep="\t"))
        else:
            self._outputs[name].put(line + b"\n")

    def _print(self, name: str, text: str, style: str = "") -> None:
        with self._lock:
            if self._table and self._are_terminals[name]:
                if len(self._above) < MAX_LINES:
                    self._above.append(Text(text, style))
                else:
                    self._left_out += 1
                return
        self._write(name, text)

    def _write(self, name: str, text: str) -> None:
        data = f"{text}\n".encode(self._encodings[name], "backslashreplace")
        self._outputs[name].put(data)

    ################################################################
    # The file
    ################################################################

    def _open_file(self) -> int:
        assert self._path is not None  # only called with a file
        # Without O_NONBLOCK a FIFO that no process reads would block this call without end.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY
        return os.open(self._path, flags, 0o666)

    def _on_reopened(self, error: OSError | None) -> None:
        if error is None:
            logger.info("received SIGUSR1: opened %s again", self._path)
        else:
            logger.error(
                "received SIGUSR1: cannot open %s again: %s; the old file is kept",
                self._path,
                error.strerror,
            )


class EndedJobs(logging.Filter):
    """Makes one record of those that the pool writes for each job that its worker did not finish.

    A drain cancels the handlers that outlive it: of 200 clients, these would be 200 tracebacks.
    """

    def __init__(self, log_job: Callable[[int, str], None]) -> None:
        super().__init__()
        self._log_job = log_job
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return False for a record that is counted instead."""
        why: str | None = getattr(record, UNFINISHED, None)
        if why is not None:
            with self._lock:
                self._counts[why] += 1
        return why is None

    def report(self) -> None:
        """Log what was counted."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        for why, count in counts.items():
            jobs = "1 connection" if count == 1 else f"{count} connections"
            text = "outlived a drain: cancelled after --drain-timeout" if why == CANCELLED else why
            self._log_job(logging.WARNING, f"{jobs} {text}")


class Screen:
    """The file that a table is drawn to: each picture is put whole into the log's terminal."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._parts: list[str] = []
        self.encoding: str = log.encoding

    def write(self, text: str) -> int:
        """Keep a part of a picture."""
        self._parts.append(text)
        return len(text)

    def flush(self) -> None:
        """Have it written."""
        text = "".join(self._parts)
        self._parts.clear()
        if text:
            self._log.terminal.put(text.encode(self.encoding, "backslashreplace"))


def _encoding(stream: TextIO | None) -> str:
    """Return the encoding of a stream, which is None if the parent process has closed it."""
    return getattr(stream, "encoding", None) or "utf-8"


def start_log(*, file: str | None, form: LogFormat, level: int, table: bool) -> Log:
    """Have what the package logs written, as :class:`Log`."""
    package = logging.getLogger("trio_unixconn")
    log = Log(file=file, form=form, level=level, table=table)
    package.setLevel(level)
    package.addHandler(log)
    return log
