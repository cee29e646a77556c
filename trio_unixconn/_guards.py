"""File descriptors that cannot be handed over now, and why.

The owner of a file descriptor registers a check under its number. The functions that pass a file
descriptor to another process, or detach it, call the check first. It is found by number, because
callers give ``conn.socket``, its ``fileno()``, or an object that owns it.

Invariant: any thread may call a check, at any time, and a guard that is not needed is removed: all
guards make sending slower.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

#: For each guarded file descriptor, what raises if it cannot be handed over.
guards: Final[dict[int, Callable[[], None]]] = {}


def check_handover(numbers: Collection[int]) -> None:
    """Raise if one of these file descriptors cannot be handed over now.

    Raises:
      ReadAheadError: messages of its connection were read ahead.
    """
    # Without a look-up for each number: most messages have none that is guarded.
    if guards and not guards.keys().isdisjoint(numbers):
        for number in numbers:
            # Another thread may remove it at any time.
            check = guards.get(number)
            if check is not None:
                check()
