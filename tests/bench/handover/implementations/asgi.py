"""The same answer as an ASGI and as a WSGI application: the process ID."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable


def body() -> bytes:
    """Return the process ID, also in a process that was forked after the import."""
    return b"%d" % os.getpid()


async def asgi(
    scope: dict[str, Any], _: object, send: Callable[[dict[str, Any]], Awaitable[None]]
) -> None:
    """Answer any request."""
    if scope["type"] != "http":
        raise NotImplementedError
    text = body()
    headers = [(b"content-length", b"%d" % len(text)), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def wsgi(_: object, start_response: Callable[[str, list[tuple[str, str]]], Any]) -> Iterable[bytes]:
    """Answer any request."""
    text = body()
    start_response("200 OK", [("Content-Length", str(len(text)))])
    return [text]
