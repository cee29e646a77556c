"""httpx over a Unix socket with our connect: long paths, and only servers that a policy admits.

It starts a small HTTP server of its own, at a path that does not fit into the address of a socket,
and sends requests to it. The policy is asked before a byte is sent.

Run it with ``python examples/with_packages/httpx_client.py``; it needs httpx (``pip install
httpx``).
"""

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import cast

import httpcore
import httpx
import trio

from trio_unixconn import PeerPolicy, UnixConnection, UnixConnectionError, serve_unix
from trio_unixconn.httpcore import UnixBackend

LONGEST_REQUEST = 65536


@contextmanager
def errors_of_httpx(request: httpx.Request) -> Iterator[None]:
    """Raise httpx's exceptions in place of httpcore's, which have the same names."""
    try:
        yield
    except (
        httpcore.NetworkError,
        httpcore.ProtocolError,
        httpcore.TimeoutException,
        httpcore.UnsupportedProtocol,
    ) as exc:
        raise getattr(httpx, type(exc).__name__)(str(exc), request=request) from exc


class UnixTransport(httpx.AsyncBaseTransport):
    """A transport of httpx: all requests go to the server at one path."""

    def __init__(self, path: str, *, policy: PeerPolicy | None = None) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            uds=path, network_backend=UnixBackend(policy=policy)
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = httpcore.URL(
            scheme=request.url.raw_scheme,
            host=request.url.raw_host,
            port=request.url.port,
            target=request.url.raw_path,
        )
        with errors_of_httpx(request):
            answer = await self._pool.handle_async_request(
                httpcore.Request(
                    request.method,
                    url,
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=request.extensions,
                )
            )
        return httpx.Response(
            answer.status,
            headers=answer.headers,
            stream=Body(answer, request),
            extensions=answer.extensions,
        )

    async def aclose(self) -> None:
        await self._pool.aclose()


class Body(httpx.AsyncByteStream):
    """The body of an answer, which arrives while it is read."""

    def __init__(self, answer: httpcore.Response, request: httpx.Request) -> None:
        self._answer = answer
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with errors_of_httpx(self._request):
            async for part in cast("AsyncIterator[bytes]", self._answer.stream):
                yield part

    async def aclose(self) -> None:
        await self._answer.aclose()


async def serve_http(conn: UnixConnection) -> None:
    """Answer each request; enough of HTTP for this example, which sends no bodies."""
    count, data = 0, b""
    try:
        while len(data) < LONGEST_REQUEST and (received := await conn.receive_some()):
            data += received
            while b"\r\n\r\n" in data:
                request, _, data = data.partition(b"\r\n\r\n")
                count += 1
                text = b"request %d: %s" % (count, request.partition(b"\r\n")[0])
                head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text)
                await conn.send_all(head + text)
    except UnixConnectionError as exc:
        print("a client has left:", exc)


async def main() -> None:
    with tempfile.TemporaryDirectory(suffix="x" * 100) as directory:
        path = f"{directory}/http"
        async with trio.open_nursery() as nursery:
            server = await nursery.start(serve_unix, serve_http, path)
            admitted = UnixTransport(path, policy=PeerPolicy.same_user())
            async with httpx.AsyncClient(transport=admitted, base_url="http://server") as client:
                for name in ("one", "two"):  # over one connection
                    answer = await client.get(f"/{name}")
                    print(answer.status_code, answer.text)
            denied = UnixTransport(path, policy=PeerPolicy(uids=[4_000_000]))
            async with httpx.AsyncClient(transport=denied) as client:
                try:
                    await client.get("http://server/secret")
                except httpx.ConnectError as exc:
                    print("not sent:", exc)
                else:
                    raise AssertionError
            server.drain()


trio.run(main)
