"""Asking a policy about the peer of a connection, before a byte is read.

The rule of this file: a connection whose peer is not admitted is closed, and so is one about
whose peer the policy could not decide.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Final

import trio

from ._identity import identify

if TYPE_CHECKING:
    from ._connection import UnixConnection
    from ._identity import PeerIdentity
    from ._policy import PeerPolicy

logger: Final = logging.getLogger("trio_unixconn")

# What the system says when it has no room for another descriptor or socket just now.
NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
# As trio.serve_listeners.
PAUSE: Final = 0.1


async def is_admitted(conn: UnixConnection, policy: PeerPolicy) -> bool:
    """Whether ``policy`` admits the peer; if not, it is logged and ``conn`` is closed."""
    try:
        peer = await denied_peer(conn, policy)
        if peer is None:
            return True
        logger.warning("%s: denied %s by %r", conn.get_local_address(), peer, policy)
    except BaseException:
        await trio.aclose_forcefully(conn)
        raise
    await trio.aclose_forcefully(conn)
    return False


async def denied_peer(conn: UnixConnection, policy: PeerPolicy) -> PeerIdentity | None:
    """Return who was denied, None if the peer is admitted."""
    with await _identified(conn, with_pidfd=policy.needs_pidfd) as peer:
        return None if await policy.admits(peer) else peer


async def _identified(conn: UnixConnection, *, with_pidfd: bool) -> PeerIdentity:
    while True:
        conn._receiver.check_open()  # noqa: SLF001 - part of the connection
        try:
            return identify(conn._receiver.raw, with_pidfd=with_pidfd)  # noqa: SLF001 - as above
        except OSError as exc:
            if exc.errno not in NO_ROOM:
                raise
            logger.warning("no descriptor is free to identify a peer with; waiting for one")
        await trio.sleep(PAUSE)
