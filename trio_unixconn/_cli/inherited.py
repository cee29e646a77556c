"""File descriptors that the parent process has left open for this one.

Invariant: only file descriptors that were passed to this process are taken, never its own.

Sources: sd_listen_fds(3), PEP 446
"""

from __future__ import annotations

import os

from .execution import FIRST


def is_inherited(number: int) -> bool:
    """Whether a descriptor is open, and was before this process began."""
    try:
        # What this process has opened itself is not inheritable (PEP 446).
        return os.get_inheritable(number)
    except (OSError, OverflowError):
        return False


def from_systemd() -> list[int]:
    """Return the descriptors that systemd, or a program that imitates it, has passed.

    The variables that say so are removed: they are about this process, not about its children.

    Raises:
      ValueError: none were passed to this process.
    """
    count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if not count.isdecimal() or int(count) == 0:
        raise ValueError("no sockets were passed (LISTEN_FDS)")
    if pid != str(os.getpid()):
        raise ValueError(
            f"the sockets were passed to process {pid!r} (LISTEN_PID), and this is {os.getpid()}"
        )
    return list(range(FIRST, FIRST + int(count)))
