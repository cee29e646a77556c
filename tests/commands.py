"""Running the command line as a user does."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Generator

COMMAND = [sys.executable, "-m", "trio_unixconn"]


def run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        **{"stdin": subprocess.DEVNULL, **options},
    )


@contextmanager
def started(*arguments: str | Path, **options: Any) -> Generator[subprocess.Popen[str], None, None]:
    """Start a command, which does not outlive the block."""
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
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
    """Wait for the end of a command that was started."""
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for_socket(where: str | Path, process: subprocess.Popen[str]) -> None:
    """Wait until a command listens at a path, or at an abstract name (``@name``)."""
    deadline = time.monotonic() + 60
    while not is_there(str(where)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_there(where: str) -> bool:
    if where.startswith("@"):
        # What listens has the flag __SO_ACCEPTCON.
        lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
        return any(line[-1] == where and line[3] == "00010000" for line in lines)
    with suppress(FileNotFoundError):
        # It gets its path when it listens already.
        return stat.S_ISSOCK(os.stat(where).st_mode)
    return False
