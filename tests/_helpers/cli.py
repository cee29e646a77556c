"""Run the command line as a user does."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer.testing import CliRunner

from tests._helpers.environment import environment
from trio_unixconn import __main__ as command_line

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

COMMAND = [sys.executable, "-m", "trio_unixconn"]


def run(
    *arguments: str | Path, program: Sequence[str] = COMMAND, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command until it exits; what it prints for a terminal has 200 columns.

    Args:
      program: what gets the arguments.
    """
    return subprocess.run(
        [*program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **{"stdin": subprocess.DEVNULL, "env": environment(COLUMNS="200"), **options},
    )


def run_in_this_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command that fails before it starts anything; a new Python costs 20 times as much."""
    words = [*map(str, arguments)]
    # A server that ends ignores signals.
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    done = CliRunner().invoke(
        command_line.app, words, env={"COLUMNS": "200"}, catch_exceptions=False
    )
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


@contextmanager
def started(
    *arguments: str | Path, program: Sequence[str] = COMMAND, **options: Any
) -> Generator[subprocess.Popen[str], None, None]:
    """Start a command; kill it at the end of the block.

    Args:
      program: what gets the arguments.
    """
    with subprocess.Popen(
        [*program, *map(str, arguments)],
        text=True,
        **{
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            **options,
        },
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait until a command has exited."""
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for_socket(where: str | Path, process: subprocess.Popen[str]) -> None:
    """Wait until a command listens on a path or on an abstract name (``@name``)."""
    deadline = time.monotonic() + 60
    while not is_listening(str(where)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_listening(where: str) -> bool:
    """Return whether a process listens on a path or an abstract name, without connecting to it."""
    names = {where}
    if not where.startswith("@"):
        # The path exists before listen(2). The kernel shows the name that was given to bind(2),
        # of which only the last part is certain.
        try:
            if not stat.S_ISSOCK(os.stat(where).st_mode):
                return False
        except FileNotFoundError:
            return False
        name = os.path.basename(where)
        names = {name, f".{name}.new"}
    # A listening socket has the flag __SO_ACCEPTCON.
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(
        line[3] == "00010000" and names & {line[-1], os.path.basename(line[-1])} for line in lines
    )
