"""What servers and workers run: a handler that greets and echoes, and those of jobs."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import trio

from .observed import report_collections

if TYPE_CHECKING:
    from trio_unixconn.pool import Job

GREETING = b"+"

report_collections()


async def echo(stream: trio.abc.Stream, _: Any = None) -> None:
    """Send a byte, and then what arrives, until the client closes its end."""
    # A client of TCP resets its connection, so that its port is free at once.
    with suppress(trio.BrokenResourceError):
        await stream.send_all(GREETING)
        async for data in stream:
            await stream.send_all(data)


async def nothing(_: Any, __: Job) -> bytes:
    """Finish at once."""
    return b""


async def wait(_: Any, __: Job) -> bytes:
    """Never finish."""
    await trio.sleep_forever()
