"""A server and a client that check each other's identity, before a byte is exchanged.

Run it with ``python examples/peer_policy.py``.
"""

import logging
import os
import sys
import tempfile
from contextlib import suppress
from functools import partial

import trio

from trio_unixconn import (
    ConnectionBrokenError,
    PeerDeniedError,
    PeerIdentity,
    PeerPolicy,
    UnixConnection,
    UnixServer,
    open_unix_connection,
    serve_unix,
)

STRANGER = 12345

logger = logging.getLogger("broker")


async def log_program(peer: PeerIdentity) -> bool:
    if peer.pidfd is None:  # before Linux 6.5
        return True
    # For a log, not for a decision: a process can run another program at any time. If the peer has
    # exited, read_exe() raises, and the peer is denied.
    logger.info("a client runs %s", await peer.read_exe())
    return peer.is_alive()


async def greet(conn: UnixConnection) -> None:
    with suppress(ConnectionBrokenError):  # of the client that did not want this server
        await conn.send_all(b"hello, user %d" % conn.get_peer_credentials().uid)


def become_a_stranger() -> None:
    if os.getuid() == 0:  # only root can; the others are admitted as themselves
        os.setgroups([])
        os.setgid(STRANGER)
        os.setuid(STRANGER)


async def server(path: str) -> None:
    ours = PeerPolicy.same_user() & PeerPolicy(check=log_program)
    async with trio.open_nursery() as nursery:
        started: UnixServer = await nursery.start(
            partial(serve_unix, greet, path, policy=ours, mode=0o666)
        )

        print("as ourselves:", await client(path))
        await trio.run_process([sys.executable, __file__, path])
        print("denied:", started.denied)
        assert started.denied == (os.getuid() == 0)

        try:
            await open_unix_connection(path, policy=PeerPolicy(uids=[os.getuid() + 1]))
        except PeerDeniedError as exc:
            print("the client wants another server:", exc.strerror)
        else:
            raise AssertionError
        started.drain()


async def client(path: str) -> str:
    async with await open_unix_connection(path) as conn:
        return (await conn.receive_some()).decode() or "nothing, and the end"


async def main() -> None:
    logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stdout)
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o711)  # noqa: S103 - so that others can try
        await server(os.path.join(directory, "socket"))


if len(sys.argv) == 1:
    trio.run(main)
else:
    become_a_stranger()
    print(f"as user {os.getuid()}:", trio.run(client, sys.argv[1]), flush=True)
