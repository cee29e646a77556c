"""An HTTP/1.1 server on a Unix socket, which greets each client by its process.

Run it with ``python examples/http_server.py``; it needs h11 (``pip install h11``). With a path, it
serves there until Ctrl-C::

    python examples/http_server.py /tmp/http
    curl --unix-socket /tmp/http http://localhost/    # in another terminal
"""

import os
import signal
import sys
import tempfile
from email.utils import formatdate

import h11
import trio

from trio_unixconn import (
    UnixConnection,
    UnixConnectionError,
    open_unix_connection,
    serve_unix,
)

METHODS = {b"/": (b"GET", b"HEAD"), b"/echo": (b"POST",)}
LONGEST_BODY = 2**24
LONGEST_EXCHANGE = 60  # seconds, the wait for the next request included


async def next_event(conn: UnixConnection, http: h11.Connection) -> object:
    while (event := http.next_event()) is h11.NEED_DATA:
        if http.they_are_waiting_for_100_continue:
            proceed = h11.InformationalResponse(status_code=100, headers=[])
            await conn.send_all(http.send(proceed))
        http.receive_data(await conn.receive_some())
    return event


async def receive_body(conn: UnixConnection, http: h11.Connection) -> bytearray | None:
    body: bytearray | None = bytearray()
    while isinstance(event := await next_event(conn, http), h11.Data):
        # What is too long is still read, so that the client stays in step.
        if body is not None:
            body += event.data
            if len(body) > LONGEST_BODY:
                body = None
    return body


async def answer(conn: UnixConnection, http: h11.Connection) -> None:
    status, text, more, head = 200, b"", [], False
    try:
        request = await next_event(conn, http)
        if not isinstance(request, h11.Request):
            return  # the client has left
        head = request.method == b"HEAD"
        body = await receive_body(conn, http)
        if request.target not in METHODS:
            status, text = 404, b"not here\n"
        elif request.method not in METHODS[request.target]:
            status, text, more = 405, b"not so\n", [(b"Allow", b", ".join(METHODS[request.target]))]
        elif body is None:
            status, text = 413, b"too long\n"
        elif request.target == b"/echo":
            text = bytes(body)
        else:
            peer = conn.get_peer_credentials()  # the kernel noted them when the client connected
            text = b"Hello, process %d of user %d, group %d!\n" % (peer.pid, peer.uid, peer.gid)
    except h11.RemoteProtocolError as exc:
        status, text, more = exc.error_status_hint, b"bad request\n", [(b"Connection", b"close")]
    headers = [(b"Date", formatdate(usegmt=True).encode()), (b"Content-Length", b"%d" % len(text))]
    response = h11.Response(status_code=status, headers=headers + more)
    await conn.send_all(http.send(response) or b"")
    await conn.send_all(http.send(h11.Data(data=b"" if head else text)) or b"")
    http.send(h11.EndOfMessage())


async def handler(conn: UnixConnection) -> None:
    http = h11.Connection(h11.SERVER)
    try:
        while http.our_state is h11.IDLE:
            with trio.fail_after(LONGEST_EXCHANGE):
                await answer(conn, http)
            if http.our_state is http.their_state is h11.DONE:
                http.start_next_cycle()
    except (UnixConnectionError, trio.TooSlowError) as exc:
        print(f"a client left in the middle, or was too slow: {exc!r}", file=sys.stderr)


async def serve_until_told(path: str) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            server = await nursery.start(serve_unix, handler, path)
            print(f"ready: curl --unix-socket {path} http://localhost/", flush=True)
            await anext(signals)
            server.drain(timeout=1)  # requests under way are finished


async def demonstrate() -> None:
    request = h11.Request(method="GET", target="/", headers=[("Host", "localhost")])
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "http")
        async with trio.open_nursery() as nursery:
            server = await nursery.start(serve_unix, handler, path)
            async with await open_unix_connection(path) as conn:
                http = h11.Connection(h11.CLIENT)
                await conn.send_all(http.send(request) or b"")
                http.send(h11.EndOfMessage())
                response = await next_event(conn, http)
                greeting = bytes(await receive_body(conn, http) or b"")
            server.drain()
    assert isinstance(response, h11.Response)
    print(f"{response.status_code}: {greeting.decode()}", end="")
    assert b"process %d " % os.getpid() in greeting


if len(sys.argv) == 1:
    trio.run(demonstrate)
else:
    trio.run(serve_until_told, sys.argv[1])
