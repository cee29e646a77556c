"""ASGI applications for tests, as a user would write them without a framework."""

from __future__ import annotations

import os
from typing import Any

import trio

# What the lifespan and the requests of ``app`` have done in this process.
events: list[Any] = []


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Do what the path says; what is not a path of these is answered with the scope."""
    if scope["type"] == "lifespan":
        await lifespan(scope, receive, send)
    elif scope["type"] == "websocket":
        await websocket(scope, receive, send)
    else:
        await http(scope, receive, send)


async def lifespan(scope: dict[str, Any], receive: Any, send: Any) -> None:
    assert (await receive())["type"] == "lifespan.startup"
    scope["state"]["started_by"] = os.getpid()
    await send({"type": "lifespan.startup.complete"})
    assert (await receive())["type"] == "lifespan.shutdown"
    print("application shut down", flush=True)  # noqa: T201 - for tests to read
    await send({"type": "lifespan.shutdown.complete"})


async def http(scope: dict[str, Any], receive: Any, send: Any) -> None:  # noqa: C901, PLR0912
    body = repr({key: value for key, value in scope.items() if key != "headers"}).encode()
    match scope["path"]:
        case "/raise":
            raise ValueError("not today")
        case "/exit":
            raise SystemExit("not today")
        case "/nothing":
            return
        case "/raise-later":
            await respond(send, b"12345", length=10, more_body=True)
            raise ValueError("not today")
        case "/return-early":
            await respond(send, b"12345", length=10, more_body=True)
            return
        case "/echo":
            body = b""
            while (message := await receive())["type"] == "http.request":
                body += message["body"]
                if not message["more_body"]:
                    break
        case "/slow":
            await trio.sleep(0.2)
            events.append("slow")
        case "/wait":
            events.append("waiting")
            while (message := await receive())["type"] != "http.disconnect":
                pass
            events.append(message["type"])
        case "/flood":
            await respond(send, b"", length=None, more_body=True)
            while (await receive())["type"] != "http.disconnect":
                pass
        case "/endless":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            events.append("endless")
            for _ in range(1000):
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            events.append("end")
            return
        case _:
            pass
    await respond(send, body)


async def respond(
    send: Any, body: bytes, *, length: int | None = -1, more_body: bool = False
) -> None:
    headers = [(b"content-type", b"text/plain"), (b"Connection", b"keep-alive")]
    if length is not None:
        headers.append((b"content-length", b"%d" % (len(body) if length < 0 else length)))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": more_body})


async def websocket(scope: dict[str, Any], receive: Any, send: Any) -> None:
    assert (await receive())["type"] == "websocket.connect"
    if scope["path"] == "/raise":
        raise ValueError("not today")
    if scope["path"] == "/hesitate":
        events.append("hesitating")
        await trio.sleep(0.2)
    await send({"type": "websocket.accept"})
    if scope["path"] == "/raise-later":
        raise ValueError("not today")
    if scope["path"] == "/close":
        await send({"type": "websocket.close", "code": 4000, "reason": "as asked"})
        return
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": f"{os.getpid()} {message['text']}"})
    events.append(message)
    # It does not know yet that the connection is closed.
    await send({"type": "websocket.send", "text": "too late"})


async def without_lifespan(scope: dict[str, Any], receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    await http(scope, receive, send)


async def cannot_start(scope: dict[str, Any], receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "the database is away"})


def wsgi(environ: Any, start_response: Any) -> list[bytes]:
    return []


number = 3


async def as_another_user(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        await receive()
        os.setgid(65534)
        os.setuid(65534)
        await send({"type": "lifespan.startup.complete"})
        await receive()
    else:
        await respond(send, f"{os.getuid()} {scope['scheme']}".encode())
