"""Asking a policy about the peer of a connection, before a byte is read.

The rule of this file: a connection whose peer is not admitted is closed, and so is one about
whose peer the policy could not decide.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import enable_ki_protection

if TYPE_CHECKING:
    from ._connection import UnixConnection
    from ._identity import PeerIdentity
    from ._policy import PeerPolicy

logger: Final = logging.getLogger("trio_unixconn")

# What the system says when it has no room for another descriptor or socket just now.
NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
# As trio.serve_listeners.
PAUSE: Final = 0.1


@enable_ki_protection
async def is_admitted(conn: UnixConnection, policy: PeerPolicy) -> bool:
    """Whether ``policy`` admits the peer; if not, it is logged and ``conn`` is closed."""
    admitted = False
    try:
        peer = await denied_peer(conn, policy)
        if peer is None:
            admitted = True
        else:
            logger.warning("%s: denied %s by %r", conn.get_local_address(), peer, policy)
    finally:
        if not admitted:
            # Closing does not wait; shielded, a cancellation does not hide what was decided.
            with trio.CancelScope(shield=True):
                await conn.aclose()
    return admitted


@enable_ki_protection
async def denied_peer(conn: UnixConnection, policy: PeerPolicy) -> PeerIdentity | None:
    """Return who was denied, None if the peer is admitted."""
    with await _identified(conn, with_pidfd=policy.needs_pidfd) as peer:
        return None if await policy.admits(peer) else peer


async def _identified(conn: UnixConnection, *, with_pidfd: bool) -> PeerIdentity:
    was_said = False
    while True:
        try:
            return conn.get_peer_identity(with_pidfd=with_pidfd)
        except OSError as exc:
            if exc.errno not in NO_ROOM:
                raise
            if not was_said:
                logger.warning(
                    "%s: cannot look at the process of a peer now (%s); trying again every %s "
                    "seconds",
                    conn.get_local_address(),
                    exc.strerror,
                    PAUSE,
                )
            was_said = True
        await trio.sleep(PAUSE)
