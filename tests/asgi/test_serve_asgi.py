"""serve_asgi: real workers, with TLS, a restart, a drain, and what keeps them from starting."""

from __future__ import annotations

import os
import ssl
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

pytest.importorskip("hypercorn")

import trustme

from tests._helpers.asgi import Peer, WebSocketClient
from trio_unixconn import (
    ConnectionClosedError,
    WorkerStartError,
    open_unix_connection,
    open_unix_listener,
)
from trio_unixconn.asgi import serve_asgi
from trio_unixconn.asgi._server import pool_arguments
from trio_unixconn.asgi._worker import load_certificate
from trio_unixconn.pool._job import WorkerState

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

APPS = "tests._helpers.asgi_apps"


@asynccontextmanager
async def served(app: str, listeners: Any, **options: Any) -> AsyncGenerator[Any, None]:
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            server = await nursery.start(
                partial(serve_asgi, f"{APPS}:{app}", listeners, workers=1, **options)
            )
            yield server
            server.drain()


def peer_of(stream: Any) -> Peer:
    return Peer(stream, WorkerState(), stream)


async def test_serve_asgi_on_two_listeners_with_restart(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both listeners are served; a restart closes the WebSocket with 1012, and shuts down."""
    tcp = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = tcp[0].socket.getsockname()
    unix = await open_unix_listener(tmp_path / "socket")
    async with served("app", [*tcp, unix], root_path="/api") as server:
        async with (
            await open_unix_connection(tmp_path / "socket") as conn,
            await trio.open_tcp_stream(*address) as kept,
            await trio.open_tcp_stream(*address) as stream,
        ):
            scope = eval((await peer_of(conn).get("/")).partition(b"\r\n\r\n")[2])
            before = eval((await peer_of(kept).get("/")).partition(b"\r\n\r\n")[2])
            ws = WebSocketClient(peer_of(stream))
            await ws.open()
            await ws.event()
            await server.pool.restart()
            closed = await ws.event()
        async with await trio.open_tcp_stream(*address) as stream:
            after = eval((await peer_of(stream).get("/")).partition(b"\r\n\r\n")[2])
    assert closed.code == 1012
    assert scope["server"] == (str(tmp_path / "socket"), None)
    assert scope["extensions"]["trio_unixconn"]["credentials"]["pid"] == os.getpid()
    assert scope["root_path"] == "/api"
    assert before["state"]["started_by"] == scope["state"]["started_by"]
    assert after["state"]["started_by"] != before["state"]["started_by"]
    statistics = server.statistics()
    assert (statistics.failed, statistics.abandoned) == (0, 0)
    assert capfd.readouterr().out == "application shut down\n" * 2


async def test_serve_asgi_counts_invalid_input(caplog: pytest.LogCaptureFixture) -> None:
    """The connection is a failed job, with one line in the log of the pool."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = listeners[0].socket.getsockname()
    async with served("app", listeners) as server:
        async with await trio.open_tcp_stream(*address) as stream:
            await stream.send_all(b"no HTTP\r\n\r\n")
            assert (await peer_of(stream).rest()).startswith(b"HTTP/1.1 400")
        while not server.statistics().failed:
            await trio.sleep(0.01)
    (record,) = caplog.records
    assert " failed: client 127.0.0.1:" in record.getMessage()
    assert "illegal request line" in record.getMessage()


@pytest.mark.skipif(os.getuid() != 0, reason="gives up the privileges of root")
async def test_serve_asgi_reads_key_before_privileges_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that only root can read serves an application that becomes another user."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "both.pem"))
    (tmp_path / "both.pem").chmod(0o600)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = listeners[0].socket.getsockname()
    async with served("as_another_user", listeners, certfile=tmp_path / "both.pem"):
        stream = trio.SSLStream(
            await trio.open_tcp_stream(*address), context, server_hostname="localhost"
        )
        async with stream:
            assert (await peer_of(stream).get("/")).endswith(b"\r\n\r\n65534 https")


@pytest.mark.parametrize(
    ("app", "said"),
    [
        ("missing", f"cannot import {APPS}:missing: AttributeError: "),
        ("number", f"{APPS}:number must be an ASGI application"),
        ("cannot_start", f"{APPS}:cannot_start: the lifespan's startup failed: the database is a"),
    ],
)
async def test_serve_asgi_refuses_to_start(app: str, said: str) -> None:
    """The reason is one line, and the listeners are closed."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with trio.fail_after(60), pytest.raises(WorkerStartError) as caught:
        await serve_asgi(f"{APPS}:{app}", listeners, workers=1)
    assert caught.value.traceback.startswith(said)
    assert "\n" not in caught.value.traceback
    assert listeners[0].socket.fileno() == -1


async def test_serve_asgi_without_hypercorn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason says what to install."""
    (tmp_path / "hypercorn.py").write_text("raise ImportError('no hypercorn here')")
    monkeypatch.syspath_prepend(str(tmp_path))
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with trio.fail_after(60), pytest.raises(WorkerStartError) as caught:
        await serve_asgi(f"{APPS}:app", listeners, workers=1)
    assert "requires hypercorn (pip install 'trio_unixconn[asgi]'): " in caught.value.traceback


async def test_serve_asgi_rejects_closed_listener() -> None:
    """As serve_with_workers does."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    await listener.aclose()
    with pytest.raises(ConnectionClosedError):
        await serve_asgi(f"{APPS}:app", [listener])


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"setup": "a:b"}, ValueError, "setup cannot be used with an ASGI application"),
        ({"setup_data": b"x"}, ValueError, "setup_data cannot be used"),
        ({"keyfile": "key"}, ValueError, "keyfile can only be used with certfile"),
        ({"certfile": 3}, TypeError, "certfile must be a path, got int"),
        ({"root_path": 3}, TypeError, "root_path must be a str, got int"),
        ({"root_path": "api"}, ValueError, "root_path must begin with a slash, got 'api'"),
        ({"access_log": 1}, TypeError, "access_log must be a bool, got int"),
        ({"keep_alive_timeout": -1}, ValueError, "keep_alive_timeout must be non-negative"),
        ({"keep_alive_timeout": "1"}, TypeError, "keep_alive_timeout must be a number"),
    ],
)
async def test_serve_asgi_rejects_options(options: Any, error: Any, said: str) -> None:
    """The caller still owns the listeners."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        with pytest.raises(error, match=said):
            await serve_asgi("app:app", [listener], **options)
        assert listener.socket.fileno() != -1


def test_pool_arguments_make_paths_absolute() -> None:
    """A worker can be in another directory."""
    _, options = pool_arguments("app:app", {"certfile": "a", "keyfile": "b", "workers": 3})
    data = bytes(options["setup_data"])
    assert f'"certfile": "{os.getcwd()}/a", "keyfile": "{os.getcwd()}/b"'.encode() in data
    assert options["workers"] == 3


def test_load_certificate_says_what_is_wrong(tmp_path: Path) -> None:
    """What cannot be read, is not a certificate, or needs a password, is one line."""
    path, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    with pytest.raises(Exception, match=rf"^cannot read {path}: No such file or directory$"):
        load_certificate(str(path), None)
    certificate = trustme.CA().issue_cert("localhost")
    certificate.cert_chain_pems[0].write_to_path(str(path))
    with pytest.raises(Exception, match=rf"^{path} must be a certificate and its key without a pa"):
        load_certificate(str(path), None)
    from cryptography.hazmat.primitives import serialization

    private = serialization.load_pem_private_key(certificate.private_key_pem.bytes(), None)
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(Exception, match=rf"^{path} and {key} must be a certificate and its key"):
        load_certificate(str(path), str(key))
    assert load_certificate(None, None) is None
    certificate.private_key_pem.write_to_path(str(key))
    assert load_certificate(str(path), str(key)) is not None
