"""Give the processor to the peer once, before a task waits for its answer.

What is wanted: in a conversation, a process sends a request and waits for the answer at once. On
one processor, the peer cannot answer before this process stops running. To stop by waiting takes
two system calls of epoll, the way through trio's run loop, and a wake-up. sched_yield(2) takes one
system call, and often the answer is there when it returns: a round trip of a file descriptor takes
51 us in place of 73, and 31 % less processor time.

What it must not cost. If the peer runs on another processor, nothing is there yet: 3 us are lost.
If a process is running that never waits, sched_yield returns only after the time slice of that
one, up to 3 ms later, while a task that waits in epoll would be woken at once. And other tasks of
this process may be able to run. trio does not say whether any is, so the time is limited.

The rules:

1. Only in a conversation. A connection counts its waits; the first INITIAL_INTERVAL never yield,
   nor do those of an idle connection.
2. A yield after which nothing was there doubles the number of waits until the next one, up to
   MAX_INTERVAL; one that was worth it halves it.
3. If a yield has taken longer than LIMIT, the processor is busy. No connection of this process
   yields for the next INITIAL_PAUSE seconds. If it is still busy then, for twice as long, and so
   on, up to MAX_PAUSE.

Sources: sched_yield(2), sched(7)
"""

from __future__ import annotations

import os
import sys
import time
from typing import Final

# How many waits of a connection come before the first yield, and between two at the most.
INITIAL_INTERVAL: Final = 16
MAX_INTERVAL: Final = 4096
# In seconds.
LIMIT: Final = 0.00025
INITIAL_PAUSE: Final = 0.1
MAX_PAUSE: Final = 64.0

clock = time.perf_counter
# None where a yield has another meaning, or none. Elsewhere than on Linux it was not measured.
sched_yield = os.sched_yield if sys.platform == "linux" else None


class Pause:
    """When the process yields again after a slow one, and how long the last pause was."""

    end = 0.0
    length = 0.0


def yield_once() -> bool:
    """Let other processes run, if this processor is not busy; return whether it did."""
    began = clock()
    if sched_yield is None or began < Pause.end:
        return False
    sched_yield()
    now = clock()
    if now - began > LIMIT:
        again = began < Pause.end + Pause.length
        Pause.length = min(2 * Pause.length, MAX_PAUSE) if again else INITIAL_PAUSE
        Pause.end = now + Pause.length
    return True
