"""A connection of a client to the handler of ``serve_asgi``, in this process."""

from __future__ import annotations

import socket
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import h2.config
import h2.connection
import h2.events
import trio
import wsproto
import wsproto.events

from tests._helpers import asgi_apps
from trio_unixconn import UnixConnection
from trio_unixconn.asgi._hypercorn import make_config
from trio_unixconn.asgi._worker import ASGIWorker, handle
from trio_unixconn.pool import Job
from trio_unixconn.pool._job import WorkerState

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator


@attrs.define
class Peer:
    """A client of a handler.

    Attributes:
      stream: the client's end, over TLS if the handler has a certificate.
      worker: ``worker.draining`` begins a drain.
      server: the socket of the handler, if it is in this process.
      error: what the handler has raised, when ``ended`` is set.
    """

    stream: Any
    worker: WorkerState
    raw: socket.socket
    server: socket.socket | None = None
    error: BaseException | None = None
    ended: trio.Event = attrs.field(factory=trio.Event)
    _received: bytes = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def rest(self) -> bytes:
        """Read until the handler closes the connection."""
        data = self._received
        while more := await self.stream.receive_some():
            data += more
        return data

    async def response(self) -> bytes:
        """Read one response of HTTP/1.1 with a content length; return all of it."""
        while b"\r\n\r\n" not in self._received:
            more = await self.stream.receive_some()
            assert more, self._received
            self._received += more
        head, _, rest = self._received.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        while len(rest) < length:
            more = await self.stream.receive_some()
            assert more, rest
            rest += more
        self._received = rest[length:]
        return head + b"\r\n\r\n" + rest[:length]

    async def get(self, path: str, *headers: str) -> bytes:
        lines = [f"GET {path} HTTP/1.1", "Host: test", *headers, "", ""]
        await self.send("\r\n".join(lines).encode())
        return await self.response()

    def clog(self) -> None:
        """Fill the buffers between the handler and the client, which does not read."""
        assert self.server is not None
        try:
            while True:
                self.server.send(bytes(2**16))
        except BlockingIOError:
            pass

    def reset(self) -> None:
        """Have the connection reset when it is closed."""
        self.raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@asynccontextmanager
async def connected(
    app: Any = asgi_apps.app,
    *,
    family: str = "tcp",
    tls: ssl.SSLContext | None = None,
    client_tls: ssl.SSLContext | None = None,
    keep_alive_timeout: float = 30,
    access_log: bool = False,
    proxy: Any = None,
    wait: bool = True,
    gone: bool = False,
) -> AsyncGenerator[Peer, None]:
    """Connect to a handler; at the end of the block the client leaves, and the handler ends."""
    config = make_config(root_path="", keep_alive_timeout=keep_alive_timeout, access_log=access_log)
    worker = WorkerState()
    ours: Any
    theirs: Any
    if family == "unix":
        a, b = socket.socketpair()
        raw, server = a, b
        ours = UnixConnection.from_stdlib_socket(a)
        theirs = UnixConnection.from_stdlib_socket(b)
    else:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener:
            ours = await trio.open_tcp_stream(*listener.socket.getsockname()[:2])
            theirs = await listener.accept()
        raw, server = ours.socket._sock, theirs.socket._sock
    asgi_worker = ASGIWorker(app, {"shared": [1]}, config, tls)
    job = Job(1, b"", asgi_worker, worker, theirs, proxy)
    if client_tls is not None:
        # Without https_compatible: an end without close_notify is an error.
        ours = trio.SSLStream(ours, client_tls, server_hostname="localhost")
    peer = Peer(ours, worker, raw, server)
    if gone:
        peer.reset()
        await ours.aclose()

    async def serve() -> None:
        try:
            async with theirs:
                await handle(theirs, job)
        except Exception as exc:  # for the test to look at
            peer.error = exc
        finally:
            peer.ended.set()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            async with ours:
                yield peer
            if wait:
                await peer.ended.wait()
            nursery.cancel_scope.cancel()


class H2Client:
    """A client of HTTP/2 with prior knowledge."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.is_closed = False

    async def flush(self) -> None:
        if data := self.h2.data_to_send():
            await self._peer.send(data)

    def request(self, path: str, *, method: str = "GET", end: bool = True, **more: str) -> int:
        stream_id: int = self.h2.get_next_available_stream_id()
        headers = [
            *((":method", method), (":scheme", "http"), (":authority", "test"), (":path", path)),
            *((f":{name}", value) for name, value in more.items()),
        ]
        self.h2.send_headers(stream_id, headers, end_stream=end)
        return stream_id

    async def until(self, wanted: type, stream_id: int | None = None) -> Any:
        """Read until an event; return it, with the data before it."""
        data = b""
        await self.flush()
        while True:
            received = await self._peer.stream.receive_some()
            if not received:
                self.is_closed = True
                assert wanted is type(None), "end of stream"
                return None
            found: Any = None
            for event in self.h2.receive_data(received):
                if isinstance(event, h2.events.DataReceived):
                    data += event.data
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                if isinstance(event, wanted) and stream_id in (
                    None,
                    getattr(event, "stream_id", None),
                ):
                    found = event
            await self.flush()
            if found is not None:
                found.body = data
                return found


class WebSocketClient:
    """A client of a WebSocket over HTTP/1.1."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._ws = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
        self._events: list[Any] = []

    async def open(self, path: str = "/") -> None:
        request = wsproto.events.Request("test", path)
        await self._peer.send(self._ws.send(request))

    async def send(self, event: Any) -> None:
        await self._peer.send(self._ws.send(event))

    async def event(self) -> Any:
        """Return the next event; None at the end of the stream."""
        while not self._events:
            data = await self._peer.stream.receive_some()
            if not data:
                return None
            self._ws.receive_data(data)
            self._events += self._ws.events()
        return self._events.pop(0)
