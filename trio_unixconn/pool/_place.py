"""A place in the pool: its worker, and how often it has lost one.

The rule of this file: values only; at one place one worker is started at a time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import attrs
import trio

if TYPE_CHECKING:
    from ._link import Link

FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 10.0


@attrs.define(eq=False)
class Place:
    """A place in the pool.

    Attributes:
      failures: why its workers died, since one of them was of any use.
      busy: whether a worker is being started or replaced here; then ``changed`` says when that
        has come to an end.
      again: when a worker that is well may be replaced, if the last new one could not start.
    """

    index: int
    link: Link
    restarts: int = 0
    failures: list[Exception] = attrs.field(factory=list[Exception])
    busy: bool = False
    changed: trio.Event = attrs.field(factory=trio.Event)
    rest: float = FIRST_PAUSE
    again: float = -math.inf

    def begin(self) -> None:
        """A worker is being started here from now on."""
        if not self.busy:
            self.busy = True
            self.changed = trio.Event()

    def end(self) -> None:
        """That has come to an end."""
        self.busy = False
        self.changed.set()


def pause_behind(failures: int) -> float:
    """Return how long to wait before another worker is started, in seconds."""
    if not failures:
        return 0.0
    # Behind that nothing grows but a number that soon is none for a float.
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(failures - 1, 10))
