"""Two processes exchange credentials, which the kernel checks.

Run it with ``python examples/credentials.py``.
"""

import os
import sys
import tempfile

import trio

from trio_unixconn import Credentials, UnixConnection, open_unix_connection, open_unix_listener


async def exchange(conn: UnixConnection, name: str) -> Credentials:
    await conn.send_credentials()
    sent = await conn.receive_credentials()  # the sender of the byte
    noted = conn.get_peer_credentials()  # the process that connected, or listened
    print(f"{name}: the peer is {sent.to_string()}", flush=True)
    assert sent == noted
    assert sent.is_same_user(Credentials())
    return sent


async def parent() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "socket")
        async with await open_unix_listener(path) as listener, trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(
                trio.run_process, [sys.executable, __file__, path]
            )
            async with await listener.accept() as conn:
                peer = await exchange(conn, "parent")
            assert peer.get_unix_pid() == process.pid


async def child(path: str) -> None:
    async with await open_unix_connection(path) as conn:
        peer = await exchange(conn, "child")
    assert peer.get_unix_pid() == os.getppid()


if len(sys.argv) == 1:
    trio.run(parent)
else:
    trio.run(child, sys.argv[1])
