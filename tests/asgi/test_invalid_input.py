"""Invalid input: one line of error, the client is refused, and other clients notice nothing."""

from __future__ import annotations

import ssl
import struct
from typing import TYPE_CHECKING, Any

import pytest
import trio

pytest.importorskip("hypercorn")

import h2.events
import h2.settings
import trustme
from hypercorn.protocol.h2 import H2Protocol

from tests._helpers import asgi_apps
from tests._helpers.asgi import H2Client, WebSocketClient, connected
from trio_unixconn.asgi import _worker
from trio_unixconn.errors import ReportedError
from trio_unixconn.pool import ProxyHeader

if TYPE_CHECKING:
    from tests._helpers.asgi import Peer


def error_of(peer: Peer) -> str:
    """Return the one line that a handler has raised."""
    assert isinstance(peer.error, ReportedError), peer.error
    text = str(peer.error)
    assert len(text.splitlines()) == 1
    assert text.startswith("client 127.0.0.1:")
    return text.partition(": ")[2]


WEBSOCKET = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)


@pytest.mark.parametrize(
    ("data", "status", "said"),
    [
        (b"\0" * 100 + b"\r\n\r\n", 400, "illegal request line"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "Missing mandatory Host: header"),
        (b"GET / HTTP/1.1\r\nHost: x\r\na b: c\r\n\r\n", 400, "illegal header line"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000, 431, "Receive buffer too long"),
        (b"a" * 100_000, 431, "Receive buffer too long"),
        (
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            400,
            "conflicting Content-Length",
        ),
        (
            b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            400,
            "illegal chunk header",
        ),
        (WEBSOCKET + b"Sec-WebSocket-Protocol: \xff\r\n\r\n", 400, "UnicodeDecodeError"),
    ],
)
async def test_handle_refuses_invalid_http11(data: bytes, status: int, said: str) -> None:
    """The client gets a status, even if it goes on sending, and the job fails in one line."""
    async with connected() as peer:
        await peer.send(data)
        response = await peer.rest()
    assert response.startswith(b"HTTP/1.1 %d" % status)
    assert error_of(peer).startswith(f"HTTP/1.1: {said}")


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HT",
        b"GET / HTTP/1.1\r\nHost: x\r\n",
        b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12",
        b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12",
    ],
)
@pytest.mark.parametrize("reset", [False, True])
async def test_handle_half_of_a_request(data: bytes, *, reset: bool) -> None:
    """A client that leaves in the middle of a request, with or without a reset, is an error."""
    async with connected() as peer:
        await peer.send(data)
        await trio.testing.wait_all_tasks_blocked(0.01)
        if reset:
            peer.reset()
    assert error_of(peer).startswith("HTTP/1.1: the client has left in the middle of a request")


async def test_handle_slow_request() -> None:
    """Headers that do not arrive in time are answered with 408."""
    async with connected(keep_alive_timeout=0.05) as peer:
        await peer.send(b"GET / HTTP/1.1\r\nHost")
        response = await peer.rest()
    assert response.startswith(b"HTTP/1.1 408")
    assert error_of(peer) == "HTTP/1.1: no complete request within 0.1 s"


async def test_handle_tls_client_on_plain_port() -> None:
    """A client that speaks TLS is refused without an answer, which it could not read."""
    context = ssl.create_default_context()
    async with connected() as peer:
        stream = trio.SSLStream(peer.stream, context, server_hostname="x")
        with pytest.raises(trio.BrokenResourceError):
            await stream.do_handshake()
    assert error_of(peer) == "the client speaks TLS, and this listener does not"


async def test_handle_plain_client_on_tls_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is one that does not speak TLS, or that says nothing."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("localhost").configure_cert(server)
    async with connected(tls=server) as peer:
        await peer.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await peer.ended.wait()
    assert "TLS: the handshake failed" in error_of(peer)
    assert "HTTP_REQUEST" in error_of(peer)
    monkeypatch.setattr(_worker, "HANDSHAKE_TIMEOUT", 0.01)
    async with connected(tls=server) as peer:
        await peer.ended.wait()
    assert error_of(peer) == "TLS: no handshake within 0.01 s"


async def test_handle_unexpected_descriptor() -> None:
    """A file descriptor in place of a request is refused."""
    async with connected(family="unix") as peer:
        await peer.stream.send_fd(0)
        await peer.ended.wait()
    assert "descriptor" in str(peer.error)
    assert str(peer.error).startswith("client of process ")


async def test_handle_names_client_that_a_balancer_has_told() -> None:
    """The error names the source in the header, even if that is a path."""
    for source, said in (
        ("/run/app", "client /run/app: "),
        (("10.0.0.1", 80), "client 10.0.0.1:80: "),
        (("::1", 80, 0, 0), "client [::1]:80: "),
    ):
        header = ProxyHeader(2, source, None)
        async with connected(proxy=header) as peer:
            await peer.send(b"no HTTP\r\n\r\n")
            await peer.rest()
        assert str(peer.error).startswith(said)


################################################################
# HTTP/2
################################################################


def frame(kind: int, flags: int, stream_id: int, body: bytes = b"") -> bytes:
    return struct.pack(">BHBBI", 0, len(body), kind, flags, stream_id) + body


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"x" * 100, "frame of 7895160 bytes"),
        (frame(0, 0, 7, b"data"), ""),
        (frame(6, 0, 0, b"short"), ""),
        (frame(1, 4, 1, b"\xff\xff\xff\xff"), ""),
        (frame(8, 0, 0, b"\0\0\0\0"), ""),
    ],
)
async def test_handle_refuses_invalid_http2(data: bytes, said: str) -> None:
    """The client gets GOAWAY."""
    async with connected() as peer:
        client = H2Client(peer)
        await client.until(h2.events.RemoteSettingsChanged)
        await peer.send(data)
        event = await client.until(h2.events.ConnectionTerminated)
    assert int(event.error_code) != 0
    assert error_of(peer).startswith(f"HTTP/2: {said}")


@pytest.mark.parametrize(("method", "path"), [("GET", "/\u00e9"), ("G\u00c9T", "/")])
async def test_handle_refuses_request_of_http2(method: str, path: str) -> None:
    """A request that cannot be one is reset, and others are answered."""
    async with connected() as peer:
        client = H2Client(peer)
        client.h2.config.validate_outbound_headers = False
        wrong = client.request(path, method=method)
        await client.until(h2.events.StreamReset, wrong)
        await client.until(h2.events.StreamEnded, client.request("/"))
    assert error_of(peer).startswith("HTTP/2: unexpected request: ")


async def test_handle_refuses_tunnel() -> None:
    """CONNECT is a WebSocket or nothing; depending on its version, h2 refuses the connection."""
    async with connected() as peer:
        client = H2Client(peer)
        client.h2.config.validate_outbound_headers = False
        client.request("/", method="CONNECT")
        await client.until((h2.events.StreamReset, h2.events.ConnectionTerminated))  # type: ignore[arg-type]
    assert error_of(peer).startswith("HTTP/2: ")


async def test_handle_refuses_rapid_reset() -> None:
    """A client that resets its requests at once is refused (CVE-2023-44487)."""
    async with connected() as peer:
        client = H2Client(peer)
        await client.until(h2.events.StreamEnded, client.request("/"))
        with pytest.raises(trio.BrokenResourceError):
            for _ in range(10_000):
                client.h2.reset_stream(client.request("/"))
                await client.flush()
            raise trio.BrokenResourceError
        await peer.ended.wait()
    assert "requests were reset, and 1 were answered" in error_of(peer)


@pytest.mark.parametrize(
    "data",
    [
        frame(6, 0, 0, bytes(8)),
        frame(4, 0, 0),
        frame(4, 0, 0, b"\0\x04\0\0\xff\xff"),
        frame(2, 0, 99, b"\0\0\0\0\0"),
        frame(0xFA, 0, 0),
    ],
    ids=["ping", "empty settings", "settings", "priority", "unknown"],
)
async def test_handle_refuses_flood_of_control_frames(data: bytes) -> None:
    """Frames without end that belong to no request are refused."""
    async with connected() as peer:
        client = H2Client(peer)
        await client.flush()
        with pytest.raises(trio.BrokenResourceError):
            for _ in range(1000):
                await peer.send(data * 100)
            raise trio.BrokenResourceError
        await peer.ended.wait()
    assert "frames that belong to no request, and 0 requests" in error_of(peer)


async def test_handle_limits_streams_of_http2() -> None:
    """A client that opens more streams than the server allows is refused."""
    async with connected(asgi_apps.app) as peer:
        client = H2Client(peer)
        client.h2.remote_settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = 1000
        client.h2.remote_settings.acknowledge()
        for _ in range(150):
            client.request("/wait")
        with pytest.raises((trio.BrokenResourceError, AssertionError)):
            await client.until(type(None))
            raise trio.BrokenResourceError
    assert "TooManyStreamsError" in error_of(peer)


################################################################
# WebSockets
################################################################


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x81\x05hello", 1002),  # without a mask
        (b"\x8f\x80aaaa", 1002),  # an unknown opcode
        (b"\xf1\x80aaaa", 1002),  # reserved bits
        (b"\x81\x82\0\0\0\0\xff\xff", 1007),  # no UTF-8
        (b"\x89\xfe\0\xff\0\0\0\0" + bytes(255), 1002),  # a ping that is too long
    ],
)
async def test_handle_refuses_invalid_frame(data: bytes, code: int) -> None:
    """The client gets a close frame that says what it was."""
    async with connected() as peer:
        client = WebSocketClient(peer)
        await client.open()
        await client.event()
        await peer.send(data)
        closed = await client.event()
        assert await client.event() is None
    assert closed.code == code
    assert error_of(peer).startswith("HTTP/1.1: WebSocket: ")
    assert error_of(peer).endswith(f"({code})")


async def test_handle_refuses_invalid_frame_over_http2() -> None:
    """The stream ends with the close frame, and other streams go on."""
    async with connected() as peer:
        client = H2Client(peer)
        await client.until(h2.events.RemoteSettingsChanged)
        stream_id = client.h2.get_next_available_stream_id()
        client.h2.send_headers(
            stream_id,
            [
                *((":method", "CONNECT"), (":scheme", "http"), (":authority", "test")),
                *((":path", "/"), (":protocol", "websocket"), ("sec-websocket-version", "13")),
            ],
        )
        await client.until(h2.events.ResponseReceived, stream_id)
        client.h2.send_data(stream_id, b"\x81\x05hello")
        ended = await client.until(h2.events.StreamEnded, stream_id)
        await client.until(h2.events.StreamEnded, client.request("/"))
    assert ended.body[:4] == b"\x88" + ended.body[1:2] + b"\x03\xea"
    assert error_of(peer).startswith("HTTP/2: WebSocket: ")


@pytest.mark.parametrize(
    ("headers", "said"), [(WEBSOCKET.replace(b"13", b"12") + b"\r\n", b"HTTP/1.1 400")]
)
async def test_handle_refuses_handshake_of_websocket(headers: bytes, said: bytes) -> None:
    """An unknown version is refused; a client may ask for it, so it is not an error."""
    async with connected() as peer:
        await peer.send(headers)
        assert (await peer.rest()).startswith(said)
    assert peer.error is None


async def test_handle_refuses_handshake_of_websocket_over_http2() -> None:
    """The stream ends with the status, and others go on."""
    async with connected() as peer:
        client = H2Client(peer)
        await client.until(h2.events.RemoteSettingsChanged)
        stream_id = client.request("/", method="CONNECT", end=False, protocol="websocket")
        response = await client.until(h2.events.ResponseReceived, stream_id)
        await client.until(h2.events.StreamEnded, client.request("/"))
    assert dict(response.headers)[":status"] == "400"
    assert peer.error is None


async def test_handle_reports_what_hypercorn_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of hypercorn about a client is one line, and the end of the connection."""

    async def fail(*_: Any) -> None:
        raise KeyError("odd")

    monkeypatch.setattr(H2Protocol, "_send_data", fail)
    async with connected() as peer:
        client = H2Client(peer)
        client.request("/")
        event = await client.until(h2.events.ConnectionTerminated)
    assert int(event.error_code) == 1
    assert error_of(peer) == "HTTP/2: KeyError: 'odd'"
