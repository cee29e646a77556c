"""UnixBackend: requests of httpcore to a real HTTP server on a Unix socket, and its errors."""

from __future__ import annotations

import pickle
import socket
import ssl
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs
import httpcore
import pytest
import trio

from tests._helpers.real_programs import require_program
from trio_unixconn import (
    PeerDeniedError,
    PeerPolicy,
    UnixConnection,
    open_unix_connection,
    open_unix_listener,
)
from trio_unixconn.httpcore import UnixBackend

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

# The server of the standard library. It says which of its connections a request has used.
SERVER = """
import http.server, itertools, os, socketserver, ssl, sys

class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    numbers = itertools.count()

    def setup(self):
        super().setup()
        self.number = next(self.numbers)

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer(f"{self.path} on connection {self.number}".encode())
        self.close_connection = self.path == "/leave"

    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

path, *certificate = sys.argv[1:]
server = Server(path, Handler)
if certificate:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
print("ready", flush=True)
server.serve_forever()
"""


@attrs.frozen
class Servers:
    """The paths of two HTTP servers, and the certificate of the one with TLS."""

    plain: str
    tls: str
    certificate: str


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Two real HTTP servers, each a process."""
    directory = tmp_path_factory.mktemp("http")
    key, certificate = str(directory / "key"), str(directory / "certificate")
    command = [require_program("openssl"), "req", "-x509", "-nodes", "-newkey", "rsa:2048"]
    command += ["-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=server"]
    command += ["-addext", "subjectAltName=DNS:server"]
    subprocess.run(command, check=True, capture_output=True)
    found = Servers(str(directory / "plain"), str(directory / "tls"), certificate)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for arguments in ([found.plain], [found.tls, certificate, key]):
            process = subprocess.Popen(
                [sys.executable, "-c", SERVER, *arguments], stdout=subprocess.PIPE
            )
            processes.append(process)
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        yield found
    finally:
        for process in processes:
            with process:
                process.kill()


@asynccontextmanager
async def connected(
    path: Path,
) -> AsyncGenerator[tuple[httpcore.AsyncNetworkStream, UnixConnection], None]:
    """A stream of the backend, and the connection at its other end."""
    async with await open_unix_listener(path) as listener:
        stream = await UnixBackend().connect_unix_socket(str(path))
        async with await listener.accept() as conn:
            yield stream, conn
        await stream.aclose()


def pool(path: str, **options: Any) -> httpcore.AsyncConnectionPool:
    return httpcore.AsyncConnectionPool(uds=path, network_backend=UnixBackend(), **options)


async def test_requests_share_a_connection(servers: Servers) -> None:
    """Requests and bodies go to the server at the path, all over one connection."""
    async with pool(servers.plain) as client:
        first = await client.request("GET", "http://server/one")
        assert first.status == 200
        number = first.content.removeprefix(b"/one on connection ")
        second = await client.request("GET", "http://another/two")
        assert second.content.startswith(b"/two on connection ")
        body = bytes(range(256)) * 4096
        echo = await client.request("POST", "http://server/echo", content=body)
        assert echo.content == body
        third = await client.request("GET", "http://server/three")
        assert third.content == b"/three on connection " + number


async def test_idle_connection_that_the_server_has_closed(servers: Servers) -> None:
    """A request does not use an idle connection that the server has closed."""
    async with pool(servers.plain) as client:
        assert (await client.request("GET", "http://server/leave")).status == 200
        with trio.fail_after(30):
            while not all(each.has_expired() for each in client.connections):
                await trio.sleep(0.01)
        assert (await client.request("GET", "http://server/next")).status == 200


async def test_tls_over_a_unix_socket(servers: Servers) -> None:
    """TLS works, and the server's certificate is checked for the host of the URL."""
    context = ssl.create_default_context(cafile=servers.certificate)
    async with pool(servers.tls, ssl_context=context) as client:
        async with client.stream("GET", "https://server/secret") as answer:
            assert (await answer.aread()).startswith(b"/secret on connection ")
            stream = answer.extensions["network_stream"]
            assert stream.get_extra_info("ssl_object").version() == "TLSv1.3"
            assert isinstance(stream.get_extra_info("socket"), trio.socket.SocketType)
        with pytest.raises(httpcore.ConnectError, match="certificate"):
            await client.request("GET", "https://another/secret")


async def test_a_policy_denies_the_server(servers: Servers) -> None:
    """No request is sent to a server that the policy does not admit."""
    backend = UnixBackend(policy=PeerPolicy(uids=[4_000_000]))
    assert repr(backend) == "UnixBackend(policy=PeerPolicy(uids={4000000}))"
    async with httpcore.AsyncConnectionPool(uds=servers.plain, network_backend=backend) as client:
        with pytest.raises(httpcore.ConnectError, match="is not admitted by"):
            await client.request("GET", "http://server/")
    with pytest.raises(httpcore.ConnectError) as caught:
        await backend.connect_unix_socket(servers.plain)
    assert isinstance(caught.value.__cause__, PeerDeniedError)
    with pytest.raises(TypeError, match="policy must be a PeerPolicy or None, got int"):
        UnixBackend(policy=cast("Any", 3))


async def test_connect_errors(tmp_path: Path, autojump_clock: object) -> None:
    """A server that is not there is a ConnectError, after the retries that were asked for."""
    async with pool(str(tmp_path / "none"), retries=2) as client:
        before = trio.current_time()
        with pytest.raises(httpcore.ConnectError, match="is the server running"):
            await client.request("GET", "http://server/")
    assert trio.current_time() > before  # it has slept


async def test_connect_timeout(tmp_path: Path, autojump_clock: object) -> None:
    """A server whose queue is full is a ConnectTimeout."""
    path = tmp_path / "full"
    async with (
        await open_unix_listener(path, backlog=0),
        await open_unix_connection(path),
        pool(str(path)) as client,
    ):
        with pytest.raises(httpcore.ConnectTimeout):
            await client.request("GET", "http://server/", extensions={"timeout": {"connect": 5.0}})


async def test_read_and_write_timeouts(tmp_path: Path, autojump_clock: object) -> None:
    """A server that does not answer, or does not read, is a timeout."""
    async with connected(tmp_path / "silent") as (stream, _):
        with pytest.raises(httpcore.ReadTimeout):
            await stream.read(10, timeout=5)
        with pytest.raises(httpcore.WriteTimeout):
            await stream.write(bytes(10_000_000), timeout=5)


async def test_read_and_write_errors(tmp_path: Path) -> None:
    """A connection that breaks, or is closed, raises httpcore's errors."""
    async with connected(tmp_path / "s") as (stream, conn):
        await stream.write(b"not read")
        await conn.aclose()
        with pytest.raises(httpcore.ReadError):
            await stream.read(10)
        with pytest.raises(httpcore.WriteError):
            await stream.write(b"x")
        await stream.aclose()
        with pytest.raises(httpcore.ReadError):
            await stream.read(10)
        assert stream.get_extra_info("is_readable")


async def test_read_until_the_end(tmp_path: Path) -> None:
    """The end of the stream is empty bytes, as of httpcore's other backends."""
    async with connected(tmp_path / "s") as (stream, conn):
        await conn.send_all(b"x")
        await conn.send_eof()
        assert [await stream.read(10), await stream.read(10)] == [b"x", b""]


async def test_start_tls_with_a_server_that_leaves(tmp_path: Path) -> None:
    """If the handshake fails, the connection is closed."""
    async with connected(tmp_path / "s") as (stream, conn):
        await conn.aclose()
        with pytest.raises(httpcore.ConnectError):
            await stream.start_tls(ssl.create_default_context(), server_hostname="server")
        assert stream.get_extra_info("socket").fileno() == -1


async def test_get_extra_info(tmp_path: Path) -> None:
    """The stream tells its socket and its addresses, and None about what it does not know."""
    path = tmp_path / "s"
    async with connected(path) as (stream, conn):
        assert not stream.get_extra_info("is_readable")
        await conn.send_all(b"x")
        assert stream.get_extra_info("is_readable")
        assert stream.get_extra_info("server_addr") == str(path)
        assert stream.get_extra_info("client_addr") == "anonymous"
        assert stream.get_extra_info("ssl_object") is None
        assert stream.get_extra_info("other") is None
        with pytest.raises(TypeError, match="cannot pickle"):
            pickle.dumps(stream)


async def test_socket_options(tmp_path: Path) -> None:
    """Options are set as httpcore's other backends set them; one that fails closes the socket."""
    path = tmp_path / "s"
    async with await open_unix_listener(path):
        options = [(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)]
        stream = await UnixBackend().connect_unix_socket(str(path), socket_options=options)
        raw = stream.get_extra_info("socket")
        assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= 100_000
        await stream.aclose()
        with pytest.raises(httpcore.ConnectError):
            await UnixBackend().connect_unix_socket(str(path), socket_options=[(-1, -1, 1)])


async def test_connect_tcp_is_refused() -> None:
    """A pool without uds= does not send a request for another machine to this one."""
    async with httpcore.AsyncConnectionPool(network_backend=UnixBackend()) as client:
        with pytest.raises(httpcore.UnsupportedProtocol, match="expected a pool with uds="):
            await client.request("GET", "http://server:81/")
