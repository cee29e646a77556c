"""A process that looks at its peer with the library, from where it was started.

Run as ``python looker.py connect|accept PATH UID``: it connects, or listens (and says so) and
accepts, becomes another user unless UID is ``-``, and prints what it sees as JSON.
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
    """Return what ``do`` returns, or what it raises."""
    try:
        return do()
    except Exception as exc:  # noqa: BLE001 - the answer is which one
        return f"{type(exc).__name__}: {exc}"


def opened(conn: UnixConnection) -> str:
    """Open a pidfd of the peer, and say whether it has ended."""
    pidfd = conn.open_peer_pidfd()
    if pidfd is None:
        return "none"
    ended = select.select([pidfd], [], [], 0)[0]
    os.close(pidfd)
    return "ended" if ended else "alive"


async def look(conn: UnixConnection) -> dict[str, Any]:
    """Look at the peer in every way."""
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
    """Get a peer and look at it."""
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
        print(json.dumps(await look(conn)), flush=True)
        # The peer stays until it was looked at.
        await conn.receive_some()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2], sys.argv[3])
