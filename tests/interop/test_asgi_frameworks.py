"""Applications of Starlette, FastAPI and Quart-Trio in workers, with curl and a real WebSocket."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("hypercorn")

import wsproto
import wsproto.events

from tests._helpers.cli import started
from tests._helpers.environment import environment
from tests._helpers.glib import missing_peer
from tests._helpers.serve_cli import Served, hear_signals

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.slow]

STARLETTE = """
import contextlib, os
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute

@contextlib.asynccontextmanager
async def lifespan(app):
    yield {"started": os.getpid()}
    print("shut down", flush=True)

async def where(request):
    extension = request.scope["extensions"]["trio_unixconn"]
    return JSONResponse({"pid": os.getpid(), "started": request.state.started,
                         "client": request.client and list(request.client),
                         "credentials": extension["credentials"]})

async def echo(request):
    return JSONResponse({"length": len(await request.body())})

async def fail(request):
    raise RuntimeError("not today")

async def stream(request):
    async def parts():
        for _ in range(100):
            yield b"x" * 1000
    return StreamingResponse(parts())

async def ws(websocket):
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)

app = Starlette(lifespan=lifespan, routes=[
    Route("/where", where), Route("/echo", echo, methods=["POST"]), Route("/fail", fail),
    Route("/stream", stream), WebSocketRoute("/ws", ws)])
"""
FASTAPI = """
import contextlib, os
from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse

@contextlib.asynccontextmanager
async def lifespan(app):
    yield {"started": os.getpid()}
    print("shut down", flush=True)

app = FastAPI(lifespan=lifespan)

@app.get("/where")
def where(request: Request) -> dict:  # in a thread
    return {"pid": os.getpid(), "started": request.state.started,
            "client": request.client and list(request.client),
            "credentials": request.scope["extensions"]["trio_unixconn"]["credentials"]}

@app.post("/echo")
async def echo(request: Request) -> dict:
    return {"length": len(await request.body())}

@app.get("/fail")
async def fail():
    raise RuntimeError("not today")

@app.get("/stream")
async def stream():
    async def parts():
        for _ in range(100):
            yield b"x" * 1000
    return StreamingResponse(parts())

@app.websocket("/ws")
async def ws(websocket: WebSocket):
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)
"""
QUART = """
import os
from quart import request, websocket
from quart_trio import QuartTrio

app = QuartTrio(__name__)
started = None

@app.before_serving
async def start():
    global started
    started = os.getpid()

@app.after_serving
async def end():
    print("shut down", flush=True)

@app.get("/where")
async def where():
    client = request.scope["client"]
    return {"pid": os.getpid(), "started": started, "client": client and list(client),
            "credentials": request.scope["extensions"]["trio_unixconn"]["credentials"]}

@app.post("/echo")
async def echo():
    return {"length": len(await request.get_data())}

@app.get("/fail")
async def fail():
    raise RuntimeError("not today")

@app.get("/stream")
async def stream():
    async def parts():
        for _ in range(100):
            yield b"x" * 1000
    return parts()

@app.websocket("/ws")
async def ws():
    while True:
        await websocket.send(await websocket.receive())
"""
FRAMEWORKS = {"starlette": STARLETTE, "fastapi": FASTAPI, "quart_trio": QUART}


@contextmanager
def application(name: str, directory: Path) -> Generator[tuple[Served, int], None, None]:
    """Serve an application on a port and on the path ``s``."""
    try:
        __import__(name)
    except ImportError:
        missing_peer(f"{name} is not installed; install the dependency group asgi")
    (directory / "app.py").write_text(FRAMEWORKS[name])
    with started(
        *("serve", "--asgi", "app:app", "--bind", "tcp:127.0.0.1:0", "--bind", "unix:s"),
        *("--workers", "1"),
        cwd=directory,
        env=environment(),
        preexec_fn=hear_signals,
    ) as process:
        served = Served(process, directory)
        found = re.search(r":(\d+)\n", served.line("listening at tcp"))
        assert found
        served.line("ready: ")
        yield served, int(found[1])


def ask(curl: str, *arguments: str) -> bytes:
    command = [curl, "-sS", "--max-time", "60", *arguments]
    return subprocess.run(command, capture_output=True, check=True).stdout


class WebSocket:
    """A blocking client."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 60)
        self._ws = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
        self._events: list[Any] = []
        self.send(wsproto.events.Request("localhost", "/ws"))
        assert isinstance(self.event(), wsproto.events.AcceptConnection)

    def send(self, event: Any) -> None:
        self._socket.sendall(self._ws.send(event))

    def event(self) -> Any:
        while not self._events:
            self._ws.receive_data(self._socket.recv(65536) or None)
            self._events += self._ws.events()
        return self._events.pop(0)

    def close(self) -> None:
        self._socket.close()


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_serve_asgi_with_framework(tmp_path: Path, name: str, curl: str) -> None:
    """Requests, bodies, streams, errors and WebSockets, before a restart and after it."""
    body = tmp_path / "body"
    body.write_bytes(bytes(300_000))
    with application(name, tmp_path) as (served, port):
        url = f"http://127.0.0.1:{port}"
        unix = json.loads(ask(curl, "--unix-socket", str(tmp_path / "s"), "http://x/where"))
        assert unix["client"] is None
        assert unix["credentials"]["uid"] == tmp_path.stat().st_uid
        workers = []
        for _ in range(2):
            for option in ("--http1.1", "--http2-prior-knowledge"):
                where = json.loads(ask(curl, option, f"{url}/where"))
                assert where["pid"] == where["started"]
                assert where["client"][0] == "127.0.0.1"
                upload = ["--data-binary", f"@{body}", f"{url}/echo"]
                assert json.loads(ask(curl, option, *upload)) == {"length": 300_000}
                assert len(ask(curl, option, f"{url}/stream")) == 100_000
                status = ask(curl, option, "-o", "/dev/null", "-w", "%{http_code}", f"{url}/fail")
                assert status == b"500"
            workers.append(where["pid"])
            client = WebSocket(port)
            client.send(wsproto.events.TextMessage("hello"))
            assert client.event().data == "hello"
            if len(workers) == 1:
                served.send(signal.SIGHUP)
                served.line("restarted: ")
                assert client.event().code == 1012
            client.close()
        assert workers[0] != workers[1]
        text = served.drained_output()
    assert text.count("shut down") + "".join(served.lines).count("shut down") == 2
    assert ", 0 failed, 0 abandoned, 0 rejected" in text
