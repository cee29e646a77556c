"""accept(2) that fails, for tests of what accepts connections."""

from __future__ import annotations

import itertools
import os
import socket
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

# The number of calls so far.
Calls = list[int]


def fail_accept(monkeypatch: pytest.MonkeyPatch, errors: Iterable[int]) -> Calls:
    """Make accept(2) fail with these error numbers, and then work; 0 works in between.

    Returns:
      The error numbers of the calls so far; it grows with each call.
    """
    real: Any = socket.socket._accept  # type: ignore[attr-defined]
    left = iter(errors)
    calls: Calls = []

    def accept(sock: socket.socket) -> Any:
        number = next(left, 0)
        calls.append(number)
        if number:
            raise OSError(number, os.strerror(number))
        return real(sock)

    monkeypatch.setattr(socket.socket, "_accept", accept, raising=False)
    return calls


def always(number: int) -> Iterable[int]:
    return itertools.repeat(number)
