"""An HTTP/1.1 server whose workers greet their clients; a connection serves many requests.

Run it with ``python examples/pool_http.py``; it needs h11 (``pip install h11``). With a port, it
serves there until Ctrl-C::

    python examples/pool_http.py 8000
    curl http://localhost:8000/ http://localhost:8000/    # in another terminal

In this directory, the command line serves the same handler::

    trio-unixconn serve pool_http:handler --bind tcp:127.0.0.1:8000
"""

import os
import signal
import sys
from contextlib import suppress
from email.utils import formatdate
from functools import partial

import h11
import trio

from trio_unixconn import WorkerStartError
from trio_unixconn.pool import Job, WorkerServer, serve_with_workers

# In seconds, with the wait for the next request: shorter than the drain_timeout of a pool, so that
# idle clients do not keep the old workers.
LONGEST_EXCHANGE = 20
# In seconds, how long an idle connection stays open while the whole pool drains. A client that is
# just sending its next request gets an answer, with "Connection: close". Without this wait the
# connection would be closed under that request, and without a limit, one idle client would keep
# the old worker for LONGEST_EXCHANGE.
LAST_IDLE_WAIT = 1


async def receive_request(stream: trio.abc.Stream, http: h11.Connection, job: Job) -> bool:
    """Wait for the first bytes of a request.

    Return False if the client has left, or if this worker drains and none have arrived.
    """
    if http.trailing_data[0]:
        return True  # sent together with the request before
    data = b""
    async with trio.open_nursery() as nursery:

        async def end_soon() -> None:
            await job.draining.wait()
            wait = 0 if job.can_pass_on else LAST_IDLE_WAIT
            nursery.cancel_scope.deadline = trio.current_time() + wait

        nursery.start_soon(end_soon)
        with suppress(trio.BrokenResourceError):  # the client has left
            data = bytes(await stream.receive_some())
        nursery.cancel_scope.cancel()
    http.receive_data(data)
    return data != b""


async def next_event(stream: trio.abc.Stream, http: h11.Connection) -> object:
    while (event := http.next_event()) is h11.NEED_DATA:
        if http.they_are_waiting_for_100_continue:
            proceed = h11.InformationalResponse(status_code=100, headers=[])
            await stream.send_all(http.send(proceed))
        http.receive_data(bytes(await stream.receive_some()))
    return event


async def answer(stream: trio.abc.Stream, http: h11.Connection, greeting: bytes, job: Job) -> None:
    status, text, more, head = 200, greeting, [], False
    try:
        request = await next_event(stream, http)
        if not isinstance(request, h11.Request):
            return  # the client has left
        head = request.method == b"HEAD"
        while isinstance(await next_event(stream, http), h11.Data):
            pass  # a body is of no interest, but must be out of the way
        if request.target != b"/":
            status, text = 404, b"not here\n"
        elif request.method not in (b"GET", b"HEAD"):
            status, text, more = 405, b"not so\n", [(b"Allow", b"GET, HEAD")]
    except h11.RemoteProtocolError as exc:
        status, text, more = exc.error_status_hint, b"bad request\n", [(b"Connection", b"close")]
    if job.draining.is_set() and not job.can_pass_on:
        more = [*more, (b"Connection", b"close")]  # no worker will have the next request
    headers = [
        (b"Date", formatdate(usegmt=True).encode()),
        (b"Content-Type", b"text/plain"),
        (b"Content-Length", b"%d" % len(text)),
    ]
    response = h11.Response(status_code=status, headers=[*headers, *more])
    whole = [http.send(response), http.send(h11.Data(data=b"" if head else text))]
    await stream.send_all(b"".join(each or b"" for each in whole))
    http.send(h11.EndOfMessage())


async def handler(stream: trio.abc.Stream, job: Job) -> object:
    # This runs in a worker, for one connection, over TCP or a Unix socket.
    greeting = b"Hello from process %d, for job %d!\n" % (os.getpid(), job.id)
    http = h11.Connection(h11.SERVER)
    try:
        # A connection is closed only after an answer has said so.
        while http.our_state is h11.IDLE:
            with trio.fail_after(LONGEST_EXCHANGE):
                if not await receive_request(stream, http, job):
                    # Between two requests, a new worker can go on with the connection.
                    return job.pass_on() if job.draining.is_set() and job.can_pass_on else None
                await answer(stream, http, greeting, job)
            if http.our_state is http.their_state is h11.DONE:
                http.start_next_cycle()
    except (trio.BrokenResourceError, trio.TooSlowError):
        pass  # the client has left, or was too slow
    return None


async def serve_until_told(port: int) -> None:
    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            serve = partial(serve_with_workers, "pool_http:handler", listeners)
            server: WorkerServer = await nursery.start(serve)
            print(f"ready: curl http://localhost:{port}/", flush=True)
            async for number in signals:
                if number != signal.SIGHUP:
                    break
                try:
                    await server.pool.restart()  # with the code as it is now
                except WorkerStartError as exc:
                    print(f"{exc}\nthe old workers go on", file=sys.stderr)
            server.drain(timeout=5)  # requests under way are finished


async def get(stream: trio.SocketStream, http: h11.Connection) -> bytes:
    request = h11.Request(method="GET", target="/", headers=[("Host", "localhost")])
    await stream.send_all((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
    response = await next_event(stream, http)
    assert isinstance(response, h11.Response)
    assert response.status_code == 200
    body = b""
    while isinstance(event := await next_event(stream, http), h11.Data):
        body += event.data
    http.start_next_cycle()
    return body


async def demonstrate() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        serve = partial(serve_with_workers, "pool_http:handler", listeners, workers=2)
        server: WorkerServer = await nursery.start(serve)
        for number in range(2):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                http = h11.Connection(h11.CLIENT)
                greetings = [await get(stream, http) for _ in range(3)]
            print(f"connection {number}, {len(greetings)} times:", greetings[0].decode(), end="")
            assert len(set(greetings)) == 1
        server.drain()
    assert server.accepted == 2


if __name__ == "__main__":
    if len(sys.argv) == 1:
        trio.run(demonstrate)
    else:
        trio.run(serve_until_told, int(sys.argv[1]))
