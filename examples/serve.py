"""A server that says how large the files are that it is handed, and stops in good order.

Run it with ``python examples/serve.py``.
"""

import os
import tempfile
from functools import partial

import trio

from trio_unixconn import (
    PeerPolicy,
    UnixConnection,
    UnixConnectionError,
    open_unix_connection,
    serve_unix,
)


async def handler(conn: UnixConnection) -> None:
    try:
        async for fd in conn.fds():
            try:
                size = os.fstat(fd).st_size
            finally:
                os.close(fd)
            await conn.send_all(b"%d\n" % size)
    except UnixConnectionError as exc:
        print("a client did not keep to the protocol:", exc)


async def main() -> None:
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile() as file:
        path = os.path.join(directory, "socket")
        async with trio.open_nursery() as nursery:
            server = await nursery.start(
                partial(serve_unix, handler, path, policy=PeerPolicy.same_user())
            )
            file.write(b"some text")
            file.flush()
            async with await open_unix_connection(path) as conn:
                await conn.send_fd(file)
                print("the server says:", (await conn.receive_some()).decode().strip())
                server.drain(timeout=10)  # in other programs, on SIGTERM
        print("served:", server.accepted)


if __name__ == "__main__":
    trio.run(main)
