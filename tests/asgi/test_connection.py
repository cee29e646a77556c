"""Requests to an ASGI application on one connection: HTTP/1.1, HTTP/2, WebSockets, a drain."""

from __future__ import annotations

import logging
import os
import ssl
from typing import TYPE_CHECKING, Any

import pytest
import trio

pytest.importorskip("hypercorn")

import h2.events
import h2.exceptions
import trustme
import wsproto.events

from tests._helpers import asgi_apps
from tests._helpers.asgi import H2Client, WebSocketClient, connected
from trio_unixconn.asgi import _hypercorn
from trio_unixconn.pool._proxy_header import ProxyHeaderParser

if TYPE_CHECKING:
    from collections.abc import Generator


@pytest.fixture(autouse=True)
def events() -> Generator[list[Any], None, None]:
    """What the application has done."""
    asgi_apps.events.clear()
    yield asgi_apps.events
    asgi_apps.events.clear()


def scope_of(response: bytes) -> dict[str, Any]:
    found: dict[str, Any] = eval(response.partition(b"\r\n\r\n")[2])
    return found


async def until(condition: Any) -> None:
    while not condition():
        await trio.sleep(0.005)


async def test_handle_http11_scope_of_tcp() -> None:
    """The scope names the client and the server, and has a copy of the lifespan's state."""
    async with connected() as peer:
        scope = scope_of(await peer.get("/a%20b?c=d"))
        again = scope_of(await peer.get("/"))
        local = peer.stream.socket.getsockname()
        remote = peer.stream.socket.getpeername()
    assert (scope["path"], scope["query_string"], scope["http_version"]) == ("/a b", b"c=d", "1.1")
    assert (scope["client"], scope["server"]) == (local, remote)
    assert scope["extensions"] == {"trio_unixconn": {"credentials": None, "proxy": None}}
    assert scope["state"] == again["state"] == {"shared": [1]}
    assert peer.error is None


async def test_handle_scope_of_unix_has_credentials() -> None:
    """On a Unix socket, the scope has no client, and the credentials of the peer."""
    async with connected(family="unix") as peer:
        scope = scope_of(await peer.get("/"))
    credentials = {"pid": os.getpid(), "uid": os.getuid(), "gid": os.getgid()}
    assert scope["client"] is None
    assert scope["server"] == ("", None)
    assert scope["extensions"]["trio_unixconn"] == {"credentials": credentials, "proxy": None}


async def test_handle_scope_with_proxy_header() -> None:
    """The client is the one that the balancer has told."""
    parser = ProxyHeaderParser()
    parser.feed(b"PROXY TCP4 10.0.0.1 10.0.0.2 1234 443\r\n")
    async with connected(family="unix", proxy=parser.header) as peer:
        scope = scope_of(await peer.get("/"))
    proxy = scope["extensions"]["trio_unixconn"]["proxy"]
    assert scope["client"] == ("10.0.0.1", 1234)
    assert (proxy["version"], proxy["destination"], proxy["tls"]) == (1, ("10.0.0.2", 443), None)
    assert scope["scheme"] == "http"


async def test_handle_scope_with_proxy_tls() -> None:
    """If the client speaks TLS with the balancer, the scheme is https."""
    tls = b"\x20\x00\x05\x01\x00\x00\x00\x00"
    block = b"\x21\x11" + (12 + len(tls)).to_bytes(2, "big")
    addresses = b"\x0a\0\0\1\x0a\0\0\2\x04\xd2\x01\xbb"
    parser = ProxyHeaderParser()
    parser.feed(b"\r\n\r\n\0\r\nQUIT\n" + block + addresses + tls)
    async with connected(proxy=parser.header) as peer:
        scope = scope_of(await peer.get("/"))
    proxy = scope["extensions"]["trio_unixconn"]["proxy"]
    assert scope["scheme"] == "https"
    assert proxy["tls"]["has_certificate"] is False
    assert proxy["tlvs"] == [(32, tls[3:])]


async def test_handle_of_client_that_has_left() -> None:
    """A client that resets its connection without a request is not an error."""
    async with connected(gone=True) as peer:
        await peer.ended.wait()
    assert peer.error is None
    async with connected() as peer:
        await peer.get("/")
        peer.reset()
    assert peer.error is None


async def test_handle_that_is_cancelled(
    events: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A request that outlives a drain is cancelled, which is not an error of the application."""
    async with connected(wait=False) as peer:
        await peer.send(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert (events, peer.error, caplog.records) == ([], None, [])


async def test_handle_echoes_a_body_of_many_messages() -> None:
    """A body passes in parts, of which only a few wait at a time."""
    body = os.urandom(500_000)
    async with connected() as peer:
        head = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        await peer.send(head + body)
        response = await peer.response()
    assert response.endswith(body)


async def test_handle_body_that_the_application_does_not_receive() -> None:
    """The response reaches a client that is still sending, and the connection ends."""
    async with connected() as peer:
        await peer.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n")
        sent = 0
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                nonlocal sent
                with pytest.raises(trio.BrokenResourceError):
                    for _ in range(400):
                        await peer.send(bytes(10_000))
                        sent += 10_000
                    raise trio.BrokenResourceError

            nursery.start_soon(send)
            response = await peer.response()
    assert response.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/raise", "GET /raise: the application raised an exception"),
        ("/exit", "GET /exit: the application raised an exception"),
        ("/nothing", "GET /nothing: the application returned without a response"),
    ],
)
async def test_handle_answers_500(path: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    """An application without a response is a 500, and the connection goes on."""
    async with connected() as peer:
        response = await peer.get(path)
        assert (await peer.get("/")).startswith(b"HTTP/1.1 200")
    assert response.startswith(b"HTTP/1.1 500")
    assert [each.getMessage() for each in caplog.records] == [said]
    assert peer.error is None


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/raise-later", "GET /raise-later: the application raised an exception"),
        ("/return-early", "GET /return-early: the application returned before its response ended"),
    ],
)
async def test_handle_ends_incomplete_response(
    path: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A client sees that a response is not complete, with HTTP/1.1 and with HTTP/2."""
    async with connected() as peer:
        await peer.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert (await peer.rest()).endswith(b"\r\n\r\n12345")
    async with connected() as peer:
        client = H2Client(peer)
        stream_id = client.request(path)
        reset = await client.until(h2.events.StreamReset, stream_id)
        ended = await client.until(h2.events.StreamEnded, client.request("/"))
    assert int(reset.error_code) == 2
    assert ended.body.startswith(b"{")
    assert [each.getMessage() for each in caplog.records] == [said] * 2


async def test_handle_drops_what_is_sent_after_the_client_has_left(events: list[Any]) -> None:
    """An application that is sending when its client leaves goes on, and nothing is raised."""
    for begin in (H2Client, None):
        events.clear()
        async with connected() as peer:
            if begin is None:
                await peer.send(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
            else:
                client = begin(peer)
                client.request("/endless")
                await client.flush()
            await until(lambda: events == ["endless"])
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert events == ["endless", "end"]
        assert peer.error is None


async def test_handle_tells_that_the_client_has_left(events: list[Any]) -> None:
    """An application that waits receives http.disconnect."""
    async with connected() as peer:
        await peer.send(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: events == ["waiting"])
    assert events == ["waiting", "http.disconnect"]


@pytest.mark.parametrize("reset", [False, True])
async def test_handle_tells_that_a_client_with_another_request_has_left(
    events: list[Any], *, reset: bool
) -> None:
    """So does one whose client had sent its next request already."""
    async with connected() as peer:
        await peer.send(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
        await until(lambda: events == ["waiting"])
        await trio.testing.wait_all_tasks_blocked(0.01)
        if reset:
            peer.reset()
    # The next request may be handled, too: that depends on when a send fails.
    assert events[:2] == ["waiting", "http.disconnect"]
    assert peer.error is None


async def test_handle_answers_requests_in_their_order(events: list[Any]) -> None:
    """Requests that arrive during a response are answered after it, even if the client ends."""
    async with connected() as peer:
        await peer.send(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
        await trio.testing.wait_all_tasks_blocked(0.01)
        body = bytes(100_000)
        head = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        await peer.send(head + body)
        for path in ("/slow", "/slow"):
            assert f"'path': '{path}'".encode() in await peer.response()
        assert (await peer.response()).endswith(b"\r\n\r\n" + body)
    assert events == ["slow", "slow"]
    assert peer.error is None


@pytest.mark.parametrize("requests", [1, 2])
async def test_handle_refuses_unexpected_descriptor_during_response(
    requests: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The last request is refused, and what the application still sends about it is dropped."""
    async with connected(family="unix") as peer:
        await peer.send(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n" * requests)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await peer.stream.send_fd(0)
        for _ in range(1, requests):
            assert (await peer.response()).startswith(b"HTTP/1.1 200")
        assert (await peer.rest()).startswith(b"HTTP/1.1 400")
    assert "descriptor" in str(peer.error)
    assert caplog.records == []


async def test_handle_http2_answers_at_the_same_time(events: list[Any]) -> None:
    """Requests of one connection are answered in any order."""
    async with connected() as peer:
        client = H2Client(peer)
        slow, fast = client.request("/slow"), client.request("/")
        await client.until(h2.events.StreamEnded, fast)
        assert events == []
        await client.until(h2.events.StreamEnded, slow)
        body = client.request("/echo", method="POST", end=False)
        client.h2.send_data(body, b"x" * 10_000, end_stream=True)
        ended = await client.until(h2.events.StreamEnded, body)
        early = client.request("/", method="POST", end=False)
        await client.until(h2.events.StreamEnded, early)
        # What was not received of a request that was answered belongs to no stream.
        client.h2.send_data(early, b"x" * 10_000, end_stream=True)
        await client.until(h2.events.StreamEnded, client.request("/"))
    assert ended.body == b"x" * 10_000
    assert peer.error is None


async def test_handle_websocket() -> None:
    """Messages pass in both directions, and both sides can close it."""
    async with connected() as peer:
        client = WebSocketClient(peer)
        await client.open()
        assert isinstance(await client.event(), wsproto.events.AcceptConnection)
        await client.send(wsproto.events.TextMessage("hello"))
        assert (await client.event()).data == f"{os.getpid()} hello"
        await client.send(wsproto.events.Ping(b"x"))
        assert (await client.event()).payload == b"x"
        await client.send(wsproto.events.CloseConnection(1000))
        assert (await client.event()).code == 1000
        assert await client.event() is None
    async with connected() as peer:
        client = WebSocketClient(peer)
        await client.open("/close")
        await client.event()
        closed = await client.event()
        await client.send(closed.response())
    assert (closed.code, closed.reason) == (4000, "as asked")
    assert peer.error is None


async def test_handle_websocket_whose_client_leaves(events: list[Any]) -> None:
    """A client that leaves without a close frame is not an error; the code is 1006."""
    async with connected() as peer:
        client = WebSocketClient(peer)
        await client.open()
        await client.event()
    assert events == [{"type": "websocket.disconnect", "code": 1006}]
    assert peer.error is None


@pytest.mark.parametrize(("path", "code"), [("/raise", None), ("/raise-later", 1011)])
async def test_handle_websocket_of_application_that_raises(
    path: str, code: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Before it has accepted this is a 500, after that 1011."""
    async with connected() as peer:
        client = WebSocketClient(peer)
        await client.open(path)
        event = await client.event()
        if code is None:
            assert event.status_code == 500
        else:
            assert (await client.event()).code == code
    said = f"WebSocket {path}: the application raised an exception"
    assert [each.getMessage() for each in caplog.records] == [said]


async def test_handle_websocket_over_http2() -> None:
    """RFC 8441: a WebSocket is a stream of HTTP/2, and ends with it."""
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
        ws = wsproto.connection.Connection(wsproto.ConnectionType.CLIENT)
        client.h2.send_data(stream_id, ws.send(wsproto.events.TextMessage("hello")))
        answer = await client.until(h2.events.DataReceived, stream_id)
        ws.receive_data(answer.body)
        assert next(ws.events()).data == f"{os.getpid()} hello"
        client.h2.send_data(stream_id, ws.send(wsproto.events.CloseConnection(1000)))
        ended = await client.until(h2.events.StreamEnded, stream_id)
        ws.receive_data(ended.body)
        assert next(ws.events()).code == 1000
    assert peer.error is None


################################################################
# Drains
################################################################


async def test_drain_says_connection_close(events: list[Any]) -> None:
    """A request that is handled, or arrives just then, is answered with Connection: close."""
    async with connected() as peer:
        await peer.send(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        await trio.testing.wait_all_tasks_blocked(0.01)
        peer.worker.draining.set()
        response = await peer.rest()
    assert response.lower().count(b"connection:") == 1
    assert b"\r\nconnection: close\r\n" in response
    async with connected() as peer:
        await peer.get("/")
        peer.worker.draining.set()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert b"\r\nconnection: close\r\n" in await peer.get("/")
        assert await peer.rest() == b""


async def test_drain_closes_idle_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle connection is closed, when its client had some time to send a request."""
    monkeypatch.setattr(_hypercorn, "LAST_IDLE_WAIT", 0.05)
    async with connected() as peer:
        await peer.get("/")
        peer.worker.draining.set()
        assert await peer.rest() == b""
        await peer.ended.wait()
    assert peer.error is None


async def test_drain_sends_goaway(monkeypatch: pytest.MonkeyPatch, events: list[Any]) -> None:
    """A client of HTTP/2 learns of the drain, and the requests that it has sent are answered."""
    monkeypatch.setattr(_hypercorn, "LAST_IDLE_WAIT", 0.05)
    async with connected() as peer:
        client = H2Client(peer)
        slow = client.request("/slow")
        await client.flush()
        await trio.testing.wait_all_tasks_blocked(0.01)
        peer.worker.draining.set()
        raw = b""
        while more := await peer.stream.receive_some():
            raw += more
    goaway = b"\0\0\x08\x07\0\0\0\0\0"
    soon, final = (raw.index(goaway + last) for last in (b"\x7f\xff\xff\xff", b"\0\0\0\x01"))
    end_of_stream = raw.index(b"\0\0\0\0\x01" + slow.to_bytes(4, "big"))
    assert soon < end_of_stream < final
    assert events == ["slow"]
    assert peer.error is None


async def test_drain_of_connection_that_begins_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a worker that drains already, a connection is answered once, or gets GOAWAY."""
    monkeypatch.setattr(_hypercorn, "LAST_IDLE_WAIT", 0.05)
    async with connected() as peer:
        peer.worker.draining.set()
        client = H2Client(peer)
        client.request("/")
        event = await client.until(h2.events.ConnectionTerminated)
    assert event.last_stream_id == 2**31 - 1


@pytest.mark.parametrize("path", ["/", "/hesitate"])
async def test_drain_closes_websocket_with_1012(path: str, events: list[Any]) -> None:
    """The client is told to connect again; the application receives the same code."""
    async with connected() as peer:
        client = WebSocketClient(peer)
        await client.open(path)
        if path == "/":
            await client.event()
        else:
            await until(lambda: events == ["hesitating"])
        peer.worker.draining.set()
        if path != "/":
            await client.event()
        closed = await client.event()
        await client.send(closed.response())
        assert await client.event() is None
    assert closed.code == 1012
    assert events[-1] == {"type": "websocket.disconnect", "code": 1012}
    assert peer.error is None


async def test_keep_alive_timeout_closes_idle_connection() -> None:
    """A connection without a request is closed, before the first one and after it."""
    async with connected(keep_alive_timeout=0.05) as peer:
        assert await peer.rest() == b""
    async with connected(keep_alive_timeout=0.05) as peer:
        client = H2Client(peer)
        await client.until(h2.events.StreamEnded, client.request("/"))
        event = await client.until(h2.events.ConnectionTerminated)
    assert event.last_stream_id == 1
    assert peer.error is None


@pytest.mark.parametrize("drain", [False, True])
async def test_handle_idle_http2_client_that_does_not_read(
    *, drain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that reads nothing cannot keep an idle connection, of which GOAWAY is the end."""
    monkeypatch.setattr(_hypercorn, "LINGER", 0.05)
    monkeypatch.setattr(_hypercorn, "LAST_IDLE_WAIT", 0.05)
    async with connected(keep_alive_timeout=30 if drain else 0.05) as peer:
        client = H2Client(peer)
        await client.until(h2.events.StreamEnded, client.request("/"))
        peer.clog()
        if drain:
            peer.worker.draining.set()
        await peer.ended.wait()
    assert peer.error is None


async def test_handle_invalid_http2_of_client_that_does_not_read(
    events: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that is refused, and does not read why, is gone after a moment."""
    monkeypatch.setattr(_hypercorn, "LINGER", 0.05)
    async with connected() as peer:
        client = H2Client(peer)
        client.h2.increment_flow_control_window(2**30)
        client.h2.increment_flow_control_window(2**30, client.request("/endless"))
        await client.flush()
        await until(lambda: "endless" in events)
        # A DATA frame of a stream that does not exist.
        await peer.send(b"\0\0\1\0\0\0\0\0\x63x")
        await peer.ended.wait()
    assert "HTTP/2" in str(peer.error)


async def test_handle_invalid_frame_of_client_that_does_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A WebSocket's client that is refused, and does not read why, is gone after a moment."""
    monkeypatch.setattr(_hypercorn, "LINGER", 0.05)
    async with connected() as peer:
        client = WebSocketClient(peer)
        await client.open()
        assert isinstance(await client.event(), wsproto.events.AcceptConnection)
        peer.clog()
        # A frame with reserved bits.
        await peer.send(b"\xf1\x80\0\0\0\0")
        await peer.ended.wait()
    assert "WebSocket" in str(peer.error)


async def test_access_log_prints_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Each request is a line on standard output."""
    async with connected(access_log=True) as peer:
        await peer.get("/some/path")
    logging.getLogger("hypercorn.access").handlers.clear()
    assert '"GET /some/path 1.1" 200' in capsys.readouterr().out


################################################################
# TLS
################################################################


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The contexts of a server with a certificate, and of a client that trusts it."""
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server)
    server.set_alpn_protocols(["h2", "http/1.1"])
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


@pytest.mark.parametrize("alpn", ["h2", "http/1.1"])
async def test_handle_tls(contexts: tuple[ssl.SSLContext, ssl.SSLContext], alpn: str) -> None:
    """The client chooses HTTP/2 or HTTP/1.1 with ALPN."""
    server, client_tls = contexts
    client_tls.set_alpn_protocols([alpn])
    async with connected(tls=server, client_tls=client_tls) as peer:
        if alpn == "h2":
            client = H2Client(peer)
            ended = await client.until(h2.events.StreamEnded, client.request("/"))
            scope = eval(ended.body)
        else:
            scope = scope_of(await peer.get("/", "Connection: close"))
    assert scope["http_version"] == ("2" if alpn == "h2" else "1.1")
    assert scope["scheme"] == "https"
    assert peer.error is None


async def test_handle_tls_ends_with_close_notify(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    """A client can tell the end of a complete response, even while it is still sending."""
    server, client_tls = contexts
    async with connected(tls=server, client_tls=client_tls) as peer:
        await peer.get("/", "Connection: close")
        assert await peer.rest() == b""
    assert peer.error is None
    async with connected(tls=server, client_tls=client_tls) as peer:
        await peer.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 40000\r\n\r\n")
        await peer.response()
        await peer.send(bytes(10_000))
        assert await peer.rest() == b""


async def test_handle_tls_of_incomplete_response_ends_without_close_notify(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    """With HTTP/1.0, nothing else says that a response is not complete."""
    server, client_tls = contexts
    async with connected(tls=server, client_tls=client_tls) as peer:
        await peer.send(b"GET /raise-later HTTP/1.0\r\n\r\n")
        with pytest.raises(trio.BrokenResourceError):
            await peer.rest()


@pytest.mark.parametrize("is_reset", [False, True])
async def test_handle_tls_client_that_leaves_without_close_notify(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
    caplog: pytest.LogCaptureFixture,
    *,
    is_reset: bool,
) -> None:
    """Many clients just close an idle connection, which is not an error."""
    server, client_tls = contexts
    async with connected(tls=server, client_tls=client_tls) as peer:
        await peer.get("/")
        if is_reset:
            peer.reset()
        await peer.stream.transport_stream.aclose()
        await peer.ended.wait()
        with pytest.raises(trio.ClosedResourceError):
            await peer.stream.aclose()
    assert (peer.error, caplog.records) == (None, [])
