"""An ASGI application without a framework: a page whose WebSocket survives restarts.

python examples/asgi_app.py 8000     serves on that port until Ctrl-C, for a browser, or for
curl http://localhost:8000/ http://localhost:8000/

It needs hypercorn (pip install 'trio_unixconn[asgi]'). In this directory, the command line serves
the same application:
trio-unixconn serve --asgi asgi_app:app --bind tcp:127.0.0.1:8000
"""

import os
import signal
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio

from trio_unixconn.asgi import serve_asgi
from trio_unixconn.pool import WorkerServer  # noqa: TC001 - it is shorter so

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

PAGE = b"""<!doctype html>
<title>workers</title>
<ul id="list"></ul>
<script>
  function connect() {
    const socket = new WebSocket(location.href.replace("http", "ws"))
    socket.onmessage = (event) => {
      const item = document.createElement("li")
      item.textContent = event.data
      document.getElementById("list").append(item)
    }
    // 1012: the worker is replaced. The next one has the same address.
    socket.onclose = (event) => setTimeout(connect, event.code === 1012 ? 0 : 1000)
  }
  connect()
</script>
"""


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    # This runs in a worker.
    if scope["type"] == "lifespan":
        await receive()  # lifespan.startup
        scope["state"]["greeting"] = f"Hello from process {os.getpid()}"
        await send({"type": "lifespan.startup.complete"})
        await receive()  # lifespan.shutdown
        await send({"type": "lifespan.shutdown.complete"})
    elif scope["type"] == "websocket":
        await receive()  # websocket.connect
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": scope["state"]["greeting"]})
        while (await receive())["type"] != "websocket.disconnect":
            pass
    else:
        is_browser = any(b"text/html" in value for _, value in scope["headers"])
        body = PAGE if is_browser else f"{scope['state']['greeting']}!\n".encode()
        kind = b"text/html" if is_browser else b"text/plain"
        headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def serve_until_told(port: int) -> None:
    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            serve = partial(serve_asgi, "asgi_app:app", listeners)
            server: WorkerServer = await nursery.start(serve)
            print(f"ready: http://localhost:{port}/", flush=True)
            async for number in signals:
                if number != signal.SIGHUP:
                    break
                await server.pool.restart()  # with the code as it is now
            server.drain(timeout=5)


async def get(port: int) -> bytes:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        response = b"".join([bytes(chunk) async for chunk in stream])
    return response.partition(b"\r\n\r\n")[2]


async def demonstrate() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        serve = partial(serve_asgi, "asgi_app:app", listeners, workers=1)
        server: WorkerServer = await nursery.start(serve)
        before = await get(port)
        await server.pool.restart()
        after = await get(port)
        server.drain()
    print(before.decode(), after.decode(), sep="", end="")
    assert before.startswith(b"Hello from process ")
    assert after != before


if __name__ == "__main__":
    if len(sys.argv) == 1:
        trio.run(demonstrate)
    else:
        trio.run(serve_until_told, int(sys.argv[1]))
