"""Have the kernel share processors between processes, and not between sessions, for a while.

With ``sched_autogroup_enabled`` each session gets the same share, whatever it runs. The workers of
our pool lead sessions, those of other implementations are in that of the benchmark: the rates would
depend on that, and on the terminal. Services of systemd and containers are in control groups, where
sessions do not count.

Source: sched(7) ("The autogroup feature")
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

SETTING = Path("/proc/sys/kernel/sched_autogroup_enabled")


@contextmanager
def no_autogroup(setting: Path = SETTING) -> Generator[str | None, None, None]:
    """Switch it off in this block, if this process may; yield a note if it stays on."""
    try:
        before = setting.read_text()
    except FileNotFoundError:
        # A kernel without it.
        before = "0"
    note = None
    if before.strip() != "0":
        try:
            setting.write_text("0")
        except OSError as exc:
            note = f"each session got the same share of the processors: {setting}: {exc.strerror}"
    try:
        yield note
    finally:
        if before.strip() != "0" and note is None:
            setting.write_text(before)
