"""The log of a server on standard output: plain lines, or lines above the table of a terminal.

Invariant: the server continues after its reader has closed the pipe, and no text of a handler or
a peer reaches the terminal unescaped.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Final

from rich.text import Text

from .._console import printable

if TYPE_CHECKING:
    from rich.console import Console

logger: Final = logging.getLogger("trio_unixconn.serve")
_FORMAT: Final = "%(asctime)s %(levelname)s: %(message)s"
# How many records are printed at a time above a table: a terminal is slow, and
# the server does nothing else while it prints.
_MAX_BATCH: Final = 50
_STYLES: Final = {logging.WARNING: "yellow", logging.ERROR: "red"}


class LogLines(logging.Handler):
    """Prints records of the package to standard output.

    Args:
      console: what a table is shown on, if there is one. Lines wait for :meth:`flush` then: each
        time that some are printed, the table is drawn anew below.
    """

    def __init__(self, console: Console | None) -> None:
        super().__init__(logging.INFO)
        self._console = console
        self._waiting: list[Text] = []
        self._left_out = 0
        self.setFormatter(logging.Formatter(_FORMAT, "%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Print one, or keep it until the next flush."""
        text = "\n".join(map(printable, self.format(record).splitlines()))
        if self._console is None:
            try:
                print(text, flush=True)  # noqa: T201 - a command line's work
            except OSError:
                _forget_standard_output()
        elif len(self._waiting) < _MAX_BATCH:
            self._waiting.append(Text(text, _STYLES.get(record.levelno, "")))
        else:
            self._left_out += 1

    def flush(self) -> None:
        """Print what waits."""
        if self._console is None or not self._waiting:
            return
        if self._left_out:
            more = f"... and {self._left_out} more, of which --plain shows each"
            self._waiting.append(Text(more))
        # As it is: not folded, which would be in the way of copying.
        self._console.print(Text("\n").join(self._waiting), soft_wrap=True)
        self._waiting.clear()
        self._left_out = 0


def _forget_standard_output() -> None:
    """The reader has closed the pipe; drop the rest of the buffer."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def log_to(console: Console | None) -> LogLines:
    """Have what the package logs printed."""
    package = logging.getLogger("trio_unixconn")
    package.setLevel(logging.INFO)
    lines = LogLines(console)
    package.addHandler(lines)
    return lines
