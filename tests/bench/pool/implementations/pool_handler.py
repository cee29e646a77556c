"""What the workers of our pool run: the same as every other worker here.

Invariant: it is imported by name, in each worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import serving

if TYPE_CHECKING:
    import trio


async def answer(stream: trio.SocketStream, _: Any) -> None:
    """Serve one connection; the worker closes it."""
    await serving.answer(stream)
