# pyright: basic
# Its types are partial, and of its classes much is documented by their source only.
"""One connection, HTTP/1.1, HTTP/2 or WebSocket, with the protocols of hypercorn.

hypercorn documents a server, and not the classes of which it consists. They are used in this file
only: two classes that turn bytes into calls of an application, and back. Reading and writing,
timeouts, drains, and what is done about invalid input are here.

Invariant: whatever a client sends, the worst that can happen is that its connection is closed. An
error of it is one line.

Sources: RFC 9112, RFC 9113 (6.8 GOAWAY, 10.5 denial of service), RFC 8441, RFC 6455
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Awaitable, Callable, Generator, MutableMapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final

import attrs
import h2.events
import h2.exceptions
import h11
import trio
from h2.errors import ErrorCodes
from hypercorn.config import Config
from hypercorn.events import Closed, RawData, Updated
from hypercorn.protocol.events import Data, EndData, Response, StreamClosed
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H2ProtocolAssumedError, H11Protocol
from hypercorn.protocol.ws_stream import WSStream
from hypercorn.trio.worker_context import EventWrapper, WorkerContext
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection

from ..errors import ReportedError, UnixConnectionError
from ._application import Application, Inbox, Message

_CHUNK_SIZE: Final = 65536
# How long, in seconds, an idle connection stays open in a worker that drains. A client that is just
# sending its next request still gets an answer.
LAST_IDLE_WAIT: Final = 1.0
# After the last response, what the client still sends is read for so many seconds, or so many
# bytes: closing a socket with unread data resets it, and the client could lose the response. A
# client that reads nothing has the same time to read why the connection is closed.
LINGER: Final = 2.0
_MAX_LINGER: Final = 2**20
# RFC 9113, section 6.8: it says that a connection will be closed, and rejects no request.
_GOAWAY_SOON: Final = struct.pack(">BHBBIII", 0, 8, 7, 0, 0, 2**31 - 1, 0)
# A client may reset as many requests as were answered, and so many more.
MAX_RESETS: Final = 100
# How many frames that are not part of a request a client may send, and how many more for each.
MAX_CONTROL_FRAMES: Final = 1000
_MAX_CONTROL_FRAMES_PER_REQUEST: Final = 10
_CONTROL_EVENTS: Final = (
    h2.events.PingReceived,
    h2.events.PriorityUpdated,
    h2.events.RemoteSettingsChanged,
    h2.events.UnknownFrameReceived,
)
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_HEADER: Final = 9
_TLS_HANDSHAKE: Final = b"\x16\x03"
_GONE: Final = (trio.BrokenResourceError, trio.ClosedResourceError)


class BadClientError(ReportedError):
    """A client has sent what no client may send."""


@attrs.frozen(kw_only=True)
class Client:
    """What is known of a connection before its first byte.

    Attributes:
      client, server: as ``scope["client"]`` and ``scope["server"]``.
      extension: what ``scope["extensions"]["trio_unixconn"]`` is.
      is_secure: whether the client speaks TLS, with this process or with a balancer.
      alpn: the protocol that the client has negotiated.
    """

    client: tuple[str, int] | None
    server: tuple[str, int | None] | None
    extension: dict[str, Any]
    is_secure: bool = False
    alpn: str | None = None


def make_config(*, root_path: str, keep_alive_timeout: float, access_log: bool) -> Config:
    """Return the configuration of all connections of a worker."""
    config = Config()
    config.root_path = root_path
    config.keep_alive_timeout = keep_alive_timeout  # type: ignore[assignment,unused-ignore]
    config.include_server_header = False
    config.errorlog = logging.getLogger("trio_unixconn.asgi")
    config.accesslog = "-" if access_log else None
    return config


async def serve_connection(
    application: Application,
    config: Config,
    stream: trio.abc.HalfCloseableStream | trio.SSLStream[Any],
    client: Client,
) -> None:
    """Answer the requests of a connection until it ends; the caller closes it.

    Raises:
      BadClientError: the client has sent invalid input; it was told, if that is possible.
    """
    async with trio.open_nursery() as nursery:
        connection = _Connection(application, config, stream, client, nursery)
        await connection.run()
    if connection.error is not None:
        raise BadClientError(connection.error)


class _Connection:
    """One connection; for hypercorn's classes it is what they call a task group, too."""

    def __init__(
        self,
        application: Application,
        config: Config,
        stream: Any,
        client: Client,
        nursery: trio.Nursery,
    ) -> None:
        self._application = application
        self._config = config
        self._stream = stream
        self._client = client
        self._nursery = nursery
        self._lock = trio.Lock()
        # Whether the next bytes must begin a request, and since when.
        self._is_idle = True
        self._idle_since = trio.current_time()
        # Whether this side has decided to close the connection; whether the other side has left.
        self._closes = False
        self._is_gone = False
        self._is_rejected = False
        self._is_first = True
        # What was received while an earlier request was answered, and what ended that.
        self._ahead = b""
        self._ahead_error: Exception | None = None
        self._inbox: Inbox
        self._reading = trio.CancelScope()
        # Those of what waits for the client to read.
        self._sending: set[trio.CancelScope] = set()
        self._watching = trio.CancelScope()
        self._drain_began = math.inf
        self.error: str | None = None
        self._protocol: _H11 | _H2 = self._make(_H2 if client.alpn == "h2" else _H11)

    def _make(self, protocol: type[_H11 | _H2]) -> _H11 | _H2:
        return protocol(
            None,  # type: ignore[arg-type,unused-ignore] # the application: for spawn_app only
            self._config,
            WorkerContext(None),
            self,  # type: ignore[arg-type,unused-ignore]
            {},  # type: ignore[arg-type,unused-ignore]
            self._client.is_secure,
            self._client.client,
            self._client.server,  # type: ignore[arg-type,unused-ignore]
            self._send,
        )

    ################################################################
    # What hypercorn's classes call a task group
    ################################################################

    async def spawn_app(
        self, _app: object, _config: object, scope: MutableMapping[str, Any], send: Any
    ) -> Any:
        """Call the application; return how it is sent messages."""
        inbox = self._inbox = Inbox(self._config.max_app_queue_size)
        extensions = scope["extensions"]
        # No browser accepts it any more.
        extensions.pop("http.response.push", None)
        extensions["trio_unixconn"] = self._client.extension
        self._nursery.start_soon(self._run_app, scope, inbox, send)
        await trio.lowlevel.checkpoint()
        return inbox.put

    def spawn(self, function: Any, *args: Any) -> None:
        """Start a task of a protocol: one that sends what applications have said, or pings."""
        self._nursery.start_soon(self._guarded, function, *args)

    async def _run_app(self, scope: MutableMapping[str, Any], inbox: Inbox, send: Any) -> None:
        async def send_unless_gone(message: Message | None) -> None:
            # As the specification says, what is sent to a client that has left is dropped. After an
            # error of the client, hypercorn would raise an exception: the protocol has ended.
            if self._is_gone or self._is_rejected:
                await trio.lowlevel.checkpoint()
                return
            with self._sends():
                await send(message)

        try:
            await self._application.run(scope, inbox, send_unless_gone)
        finally:
            inbox.drop()
        await self._guarded(send_unless_gone, None)

    @contextmanager
    def _sends(self) -> Generator[None, None, None]:
        with trio.CancelScope(deadline=-math.inf if self._is_gone else math.inf) as scope:
            self._sending.add(scope)
            try:
                yield
            finally:
                self._sending.discard(scope)

    async def _guarded(self, function: Any, *args: Any) -> None:
        """Call a function of hypercorn, which may raise after odd input; close then."""
        try:
            await function(*args)
        except Exception as exc:  # what it does not expect this client to do
            await self._reject(f"{type(exc).__name__}: {exc}")
            self._reading.cancel()

    ################################################################
    # Reading
    ################################################################

    async def run(self) -> None:
        """Read until the connection ends."""
        await self._protocol.initiate()
        self._nursery.start_soon(self._watch_drain)
        is_over = await self._read()
        self._watching.cancel()
        self._leave()
        await self._protocol.handle(Closed())
        if not is_over:
            await self._linger()

    async def _read(self) -> bool:
        """Read until one of both sides has closed the connection.

        Returns:
          Whether nothing has to reach the client any more.
        """
        while not self._closes:
            data: bytes | None = None
            with trio.CancelScope(deadline=self._deadline()) as self._reading:
                try:
                    data = await self._receive()
                except _GONE as exc:
                    self._note_broken(exc)
                    return True
                except UnixConnectionError as exc:
                    await self._reject(f"{type(exc).__name__}: {exc}")
                    return False
            if data is None:
                if self._closes:
                    return False
                await self._on_timeout()
                return self.error is None
            await self._feed(data)
            if not data:
                return True
        return False

    async def _receive(self) -> bytes:
        if self._ahead:
            await trio.lowlevel.checkpoint()
            data, self._ahead = self._ahead, b""
            return data
        if self._ahead_error is not None:
            raise self._ahead_error
        return bytes(await self._stream.receive_some(_CHUNK_SIZE))

    async def wait_for_turn(self, wait: Callable[[], Awaitable[None]]) -> None:
        """Wait while a request of HTTP/1.1 is answered, after which another one has arrived.

        Raises:
          trio.BrokenResourceError: the client has left, so that the response cannot end.
        """
        with self._sends():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_ahead)
                await wait()
                nursery.cancel_scope.cancel()
            return
        raise trio.BrokenResourceError("the client has left")

    async def _read_ahead(self) -> None:
        """Tell the application if the client leaves.

        A client that has only ended its side still gets the responses.
        """
        data = b""
        while len(self._ahead) < _CHUNK_SIZE:
            try:
                data = bytes(await self._stream.receive_some(_CHUNK_SIZE))
            except (*_GONE, UnixConnectionError) as exc:
                self._ahead_error, data = exc, b""
            if not data:
                self._inbox.end({"type": "http.disconnect"})
                break
            self._ahead += data

    def _note_broken(self, exc: BaseException) -> None:
        if self._protocol.is_in_request:
            self._note(f"the client has left in the middle of a request ({exc.__cause__ or exc})")

    async def _feed(self, data: bytes) -> None:
        protocol = self._protocol
        if self._is_first and data[:2] == _TLS_HANDSHAKE:
            self.error = "the client speaks TLS, and this listener does not"
            self._closes = True
            return
        self._is_first = False
        if not data and protocol.is_in_request:
            self._note("the client has left in the middle of a request")
        try:
            await protocol.handle(RawData(data))
            await protocol.end_refused()
        except H2ProtocolAssumedError as begin:
            # HTTP/2 with prior knowledge.
            self._protocol = self._make(_H2)
            await self._protocol.initiate()
            if self._application.draining.is_set():
                await self._send(RawData(_GOAWAY_SOON))
            await self._feed(begin.data)
        except _GONE:
            # What sends has noticed it, and has decided to close.
            return
        except Exception as exc:  # hypercorn does not expect what this client sends
            await self._reject(f"{type(exc).__name__}: {exc}")
        if self._protocol.error is not None:
            self._note(self._protocol.error)

    def _note(self, text: str) -> None:
        if self.error is None:
            self.error = f"{self._protocol.name}: {text}"

    async def _reject(self, text: str, status: int = 400) -> None:
        self._note(text)
        self._closes = self._is_rejected = True
        with suppress(Exception):
            await self._protocol.refuse(status)

    def _deadline(self) -> float:
        if not self._is_idle:
            return float("inf")
        deadline: float = self._idle_since + self._config.keep_alive_timeout
        if self._application.draining.is_set():
            deadline = min(deadline, max(self._idle_since, self._drain_began) + LAST_IDLE_WAIT)
        return deadline

    async def _on_timeout(self) -> None:
        if self._protocol.is_in_request:
            seconds = f"{trio.current_time() - self._idle_since:.1f}"
            await self._reject(f"no complete request within {seconds} s", 408)
        else:
            self._closes = True
            await self._protocol.say_goodbye()

    async def _watch_drain(self) -> None:
        with self._watching:
            await self._application.draining.wait()
            self._drain_began = trio.current_time()
            self._reading.deadline = min(self._reading.deadline, self._deadline())
            # Last: it waits for a client that does not read.
            if isinstance(self._protocol, _H2):
                await self._send(RawData(_GOAWAY_SOON))

    async def _linger(self) -> None:
        """Let the client read the last response, whatever it is still sending."""
        transport = self._stream
        left = _MAX_LINGER
        with trio.move_on_after(LINGER), suppress(*_GONE, trio.BusyResourceError):
            if isinstance(self._stream, trio.SSLStream):
                transport = self._stream.transport_stream
                if not self._protocol.is_in_response:
                    # RFC 9112, section 9.8: close_notify, and the client's. If the client is still
                    # sending a request in place of it, that is an error of TLS.
                    with suppress(*_GONE):
                        await self._stream.unwrap()
            await transport.send_eof()
            while left > 0:
                data = await transport.receive_some(_CHUNK_SIZE)
                if not data:
                    break
                left -= len(data)

    ################################################################
    # Writing
    ################################################################

    async def _send(self, event: Any) -> None:
        """Do what a protocol asks for."""
        if isinstance(event, RawData):
            if not event.data:
                # The end of a response whose length was announced.
                return
            is_last = self._closes or self._protocol.is_refused
            try:
                with trio.fail_after(LINGER if is_last else math.inf), self._sends():
                    async with self._lock:
                        await self._stream.send_all(event.data)
            except (*_GONE, trio.TooSlowError):
                self._closes = True
                self._leave()
                self._reading.cancel()
        elif isinstance(event, Closed):
            if self._protocol.last_words:
                await self._send(RawData(self._protocol.last_words))
            self._closes = True
            self._reading.cancel()
        else:
            assert isinstance(event, Updated)
            # HTTP/2 can have rejected what it had announced.
            self._is_idle = event.idle or self._protocol.is_idle
            self._idle_since = trio.current_time()
            self._reading.deadline = self._deadline()

    def _leave(self) -> None:
        """Send nothing from now on."""
        self._is_gone = True
        for each in self._sending:
            each.cancel()


################################################################
# The protocols
################################################################


class _H11Parser(h11.Connection):
    """Keeps the error that hypercorn answers and forgets."""

    error: str | None = None

    def next_event(self) -> Any:
        """Return what has arrived."""
        try:
            return super().next_event()
        except h11.RemoteProtocolError as exc:
            self.error = str(exc).replace("bytearray(b", "(b")
            raise


class _NextTurn(EventWrapper):
    """Set when the next request of HTTP/1.1 can be read."""

    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._connection = connection

    async def wait(self) -> None:
        """Wait until it is set."""
        await self._connection.wait_for_turn(super().wait)


class _H11(H11Protocol):
    """HTTP/1.1, and a WebSocket that has begun with it."""

    name = "HTTP/1.1"
    is_idle = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._parser = self.connection = _H11Parser(
            h11.SERVER, max_incomplete_event_size=self.config.h11_max_incomplete_size
        )
        self.can_read = _NextTurn(self.task_group)
        self._websocket_error: str | None = None
        # What is sent before the connection is closed.
        self.last_words = b""

    @property
    def error(self) -> str | None:
        """What the client has done wrong."""
        return self._websocket_error or self._parser.error

    @property
    def is_refused(self) -> bool:
        """Whether all that is sent from now on says why the connection ends."""
        return self.error is not None

    @property
    def is_in_request(self) -> bool:
        """Whether a part of a request has arrived."""
        parser = self._parser
        if self.connection is not parser:
            # A WebSocket.
            return False
        if parser.their_state is h11.IDLE:
            return bool(parser.trailing_data[0])
        return parser.their_state is h11.SEND_BODY

    @property
    def is_in_response(self) -> bool:
        """Whether a response has begun that is not complete."""
        return self._parser.our_state in (h11.SEND_BODY, h11.ERROR)

    async def refuse(self, status: int) -> None:
        """Answer what was not understood, if there is no answer yet."""
        # If a response has begun, h11 raises an exception, which the caller suppresses.
        await self._send_error_response(status)

    async def say_goodbye(self) -> None:
        """Prepare to close a connection that is idle."""

    async def end_refused(self) -> None:
        """Close after a refused WebSocket, with which hypercorn is done without saying so."""
        if self.stream is not None and self.stream.closed:
            await self.send(Closed())

    async def _check_protocol(self, event: h11.Request) -> None:
        # RFC 9113 has removed the upgrade from HTTP/1.1; a server may ignore it.
        if event.method == b"PRI":
            await super()._check_protocol(event)

    async def stream_send(self, event: Any) -> None:
        """Send what an application has sent."""
        if isinstance(event, Response) and event.status_code == 101:
            _watch(self.stream, self._on_invalid_frame)
        await super().stream_send(event)

    def _on_invalid_frame(self, error: str, last_words: bytes) -> None:
        self._websocket_error = error
        self.last_words = last_words


class _Finished:
    """A stream of HTTP/2 whose response has ended, while its request goes on."""

    idle = True

    async def handle(self, _: object) -> None:
        """Ignore what arrives."""


class _Streams(dict[int, Any]):
    def __missing__(self, _: int) -> _Finished:
        return _Finished()


class _H2(H2Protocol):
    """HTTP/2."""

    name = "HTTP/2"
    is_in_request = False
    # Each response has an end of its own.
    is_in_response = False
    is_refused = False
    last_words = b""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.error: str | None = None
        self.streams: Any = _Streams()
        self._requests = self._answered = self._resets = self._control_frames = 0
        # What is sent before a WebSocket's stream ends.
        self._last_data: dict[int, bytes] = {}
        # How much of the preface, or of a frame, is to come; and the begin of the next frame.
        self._skip = len(_PREFACE)
        self._head = b""
        self.connection.receive_data = partial(  # type: ignore[method-assign,unused-ignore]
            self._receive_data, self.connection.receive_data
        )

    @property
    def is_idle(self) -> bool:
        """Whether there is no request."""
        return bool(self.idle)

    async def refuse(self, _: int) -> None:
        """Say that the client has violated the protocol."""
        self.connection.close_connection(ErrorCodes.PROTOCOL_ERROR)
        await self._flush()

    async def say_goodbye(self) -> None:
        """Say which request was the last one."""
        with suppress(h2.exceptions.ProtocolError):
            self.connection.close_connection()
        await self._flush()

    async def end_refused(self) -> None:
        """End refused WebSockets, with which hypercorn is done without saying so."""
        for stream_id, stream in list(self.streams.items()):
            if stream.closed:
                await self.stream_send(StreamClosed(stream_id))

    def _receive_data(self, receive: Any, data: bytes) -> list[Any]:
        self._check_frame_sizes(data)
        try:
            events: list[Any] = receive(data)
        except h2.exceptions.ProtocolError as exc:
            self.error = f"{type(exc).__name__}: {exc}"
            self.is_refused = True
            raise
        for event in events:
            if isinstance(event, h2.events.RequestReceived):
                self._requests += 1
            elif isinstance(event, h2.events.StreamReset):
                self._resets += 1
            elif isinstance(event, _CONTROL_EVENTS) or (
                isinstance(event, h2.events.DataReceived) and not event.data
            ):
                self._control_frames += 1
        if self._resets > MAX_RESETS + self._answered:
            self._refuse(
                ErrorCodes.ENHANCE_YOUR_CALM,
                f"{self._resets} requests were reset, and {self._answered} were answered",
            )
        frames, requests = self._control_frames, self._requests
        if frames > MAX_CONTROL_FRAMES + _MAX_CONTROL_FRAMES_PER_REQUEST * requests:
            self._refuse(
                ErrorCodes.ENHANCE_YOUR_CALM,
                f"{frames} frames that belong to no request, and {requests} requests",
            )
        return events

    def _check_frame_sizes(self, data: bytes) -> None:
        """Refuse a frame that is too large by its length; h2 reads all of it before."""
        data, position = self._head + data, self._skip
        while len(data) - position >= _FRAME_HEADER:
            length = int.from_bytes(data[position : position + 3], "big")
            if length > self.config.h2_max_inbound_frame_size:
                self._refuse(ErrorCodes.FRAME_SIZE_ERROR, f"frame of {length} bytes")
            position += _FRAME_HEADER + length
        self._head = data[position:]
        self._skip = max(0, position - len(data))

    def _refuse(self, code: ErrorCodes, text: str) -> None:
        self.error = text
        self.is_refused = True
        self.connection.close_connection(code)
        raise h2.exceptions.ProtocolError(text)

    async def _create_stream(self, request: Any) -> None:
        headers = dict(request.headers)
        method, path = headers.get(b":method", b""), headers.get(b":path", b"")
        is_tunnel = method == b"CONNECT" and headers.get(b":protocol") != b"websocket"
        if is_tunnel or not (method + path).isascii() or not path:
            self.error = f"unexpected request: {method[:32]!r} {path[:128]!r}"
            self._reset(request.stream_id, ErrorCodes.PROTOCOL_ERROR)
        else:
            await super()._create_stream(request)

    def _reset(self, stream_id: int, code: ErrorCodes) -> None:
        with suppress(h2.exceptions.ProtocolError):
            self.connection.reset_stream(stream_id, code)

    async def stream_send(self, event: Any) -> None:
        """Send what an application has sent."""
        stream = self.streams.get(event.stream_id)
        is_websocket = isinstance(stream, WSStream)
        if is_websocket and isinstance(event, Response) and event.status_code == 200:
            _watch(stream, partial(self._on_invalid_frame, event.stream_id))
        if isinstance(event, StreamClosed) and stream is not None:
            if is_websocket and hasattr(stream, "connection"):
                if event.stream_id in self._last_data:
                    last_words = self._last_data.pop(event.stream_id)
                    await super().stream_send(Data(event.stream_id, last_words))
                await super().stream_send(EndData(event.stream_id))
            buffer = self.stream_buffers.get(event.stream_id)
            if buffer is None or buffer.complete:
                self._answered += 1
            else:
                # The client would wait for the rest.
                self._reset(event.stream_id, ErrorCodes.INTERNAL_ERROR)
                await self._flush()
        await super().stream_send(event)

    def _on_invalid_frame(self, stream_id: int, error: str, last_words: bytes) -> None:
        self.error = error
        self._last_data[stream_id] = last_words


def _watch(stream: Any, on_invalid_frame: Any) -> None:
    """Have invalid frames of a WebSocket reported, which hypercorn takes for the end of it."""
    connection = stream.connection
    events = connection.events

    def watched() -> Generator[Any, None, None]:
        for event in events():
            # After a close frame of the client, it is another state.
            if isinstance(event, CloseConnection) and connection.state is ConnectionState.OPEN:
                reason = event.reason or "invalid frame"
                last_words = connection.send(CloseConnection(event.code, reason))
                on_invalid_frame(f"WebSocket: {reason} ({int(event.code)})", last_words)
            yield event

    connection.events = watched
