"""Reaping adopted children: as process 1 of a container, or after an exec with children.

Invariant: a worker is reaped by the pool only, which must know how it has ended.

Sources: waitid(2), proc(5), PR_SET_CHILD_SUBREAPER(2const)
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Container
from contextlib import suppress
from typing import Final

import trio

# The pool reaps its own children as soon as it runs. A child that has been a zombie for so many
# seconds is an adopted one.
GRACE: Final = 0.5


async def reap_adopted_children(own: Callable[[], Container[int]]) -> None:
    """Reap the children that other processes have left to this one, until this is cancelled.

    Args:
      own: returns the process ids of the workers.
    """
    with trio.open_signal_receiver(signal.SIGCHLD) as signals:
        # Some may have ended before.
        await _reap(own)
        async for _ in signals:
            await _reap(own)


async def _reap(own: Callable[[], Container[int]]) -> None:
    before = zombies()
    while before:
        await trio.sleep(GRACE)
        now = zombies()
        _reap_now(now & before, own())
        before = now - before


def _reap_now(pids: set[int], own: Container[int]) -> None:
    for pid in pids:
        if pid not in own:
            # ECHILD: a subprocess object has reaped it.
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def zombies() -> set[int]:
    """Return the process ids of children that have exited and are not reaped."""
    found: set[int] = set()
    try:
        first = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return found
    if first is None:
        return found
    # waitid() says no more than one. /proc may be missing.
    found.add(first.si_pid)
    parent = os.getpid()
    with suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdecimal() and _is_zombie_of(name, parent):
                found.add(int(name))
    return found


def _is_zombie_of(pid: str, parent: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name of the program may contain anything.
            state, ppid = file.read().rpartition(b")")[2].split()[:2]
    except (OSError, ValueError):
        return False
    return state == b"Z" and int(ppid) == parent
