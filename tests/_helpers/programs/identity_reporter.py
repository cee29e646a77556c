"""A process that reports what the library says of its peer.

Run as ``python identity_reporter.py connect|accept PATH UID``. It connects, or listens (and
prints "listening") and accepts, becomes another user unless UID is ``-``, and prints a report as
JSON.
"""

from __future__ import annotations

import json
import os
import select
import sys
from typing import TYPE_CHECKING, Any

import trio

from trio_unixconn import (
    PeerPolicy,
    UnixConnection,
    open_unix_connection,
    open_unix_listener,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def outcome(do: Callable[[], Any]) -> Any:
    """Return the result of ``do``, or its exception as text."""
    try:
        return do()
    except Exception as exc:  # it is reported
        return f"{type(exc).__name__}: {exc}"


def opened(conn: UnixConnection) -> str:
    """Open a pidfd of the peer, and return whether the peer has exited."""
    pidfd = conn.open_peer_pidfd()
    if pidfd is None:
        return "none"
    ended = select.select([pidfd], [], [], 0)[0]
    os.close(pidfd)
    return "ended" if ended else "alive"


async def report(conn: UnixConnection) -> dict[str, Any]:
    """Report everything that the library says of the peer."""
    with conn.get_peer_identity() as peer:
        ids = peer.credentials
        numbers = (0, 12345, 65534)
        policies = {f"uids {number}": PeerPolicy(uids=[number]) for number in numbers}
        policies |= {f"gids {number}": PeerPolicy(gids=[number]) for number in numbers}
        return {
            "ids": [ids.pid, ids.uid, ids.gid],
            "groups": peer.groups,
            "gone": peer.gone,
            "alive": outcome(peer.is_alive),
            "exe": outcome(lambda: peer.exe),
            "cgroup": outcome(lambda: peer.cgroup),
            "pidfd": outcome(lambda: opened(conn)),
            "admitted": [name for name, each in policies.items() if await each.admits(peer)],
        }


async def main(how: str, path: str, uid: str) -> None:
    """Connect or accept, and report the peer."""
    if how == "accept":
        async with await open_unix_listener(path, mode=0o666) as listener:
            print("listening", flush=True)
            conn = await listener.accept()
    else:
        conn = await open_unix_connection(path)
    async with conn:
        if uid != "-":
            os.setgroups([])
            os.setresgid(int(uid), int(uid), int(uid))
            os.setresuid(int(uid), int(uid), int(uid))
        print(json.dumps(await report(conn)), flush=True)
        # Keep the connection until the peer has read the report.
        await conn.receive_some()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2], sys.argv[3])
