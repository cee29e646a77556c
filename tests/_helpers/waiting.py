"""Wait for conditions that have no event, and count calls."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest


async def until(holds: Callable[[], Any]) -> None:
    """Wait for a condition that has no event."""
    with trio.fail_after(60):
        while not holds():
            await trio.sleep(0.001)


def until_sync(holds: Callable[[], bool]) -> None:
    """Wait, outside of trio, for a condition that has no event."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """Return a list that grows by one when a call of the function begins."""
    real = getattr(owner, name)
    calls: list[str] = []

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, call)
    return calls
