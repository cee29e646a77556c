"""File descriptors that cannot be handed over now, and why.

The owner of a file descriptor registers a check under its number. The functions that pass a file
descriptor to another process, or detach it, call the check first. It is found by number, because
callers give ``conn.socket``, its ``fileno()``, or an object that owns it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: For each guarded file descriptor, what raises if it cannot be handed over.
guards: Final[dict[int, Callable[[], None]]] = {}


def check_handover(numbers: Iterable[int]) -> None:
    """Raise if one of these file descriptors cannot be handed over now.

    Raises:
      ReadAheadError: messages of its connection were read ahead.
    """
    if guards:
        for number in numbers:
            if number in guards:
                guards[number]()
