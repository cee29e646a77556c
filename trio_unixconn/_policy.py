"""PeerPolicy: who may talk to us.

The rule of this file: what is not admitted is denied, and what the kernel does not vouch for
admits nobody.

Sources: unix(7), credentials(7), user_namespaces(7)
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import disable_ki_protection, enable_ki_protection

from . import _kernel
from ._accept import ACCEPT_RETRY_DELAY
from ._identity import PeerIdentity

if TYPE_CHECKING:
    from ._connection import UnixConnection

logger: Final = logging.getLogger("trio_unixconn")

PeerCheck = Callable[[PeerIdentity], Awaitable[bool]]

# The next one is (uid_t)-1, every kernel's word for "no such id".
_LARGEST_ID: Final = 2**32 - 2


class PeerPolicy:
    """Who may talk to us: decided from what the kernel vouches for, before a byte is read.

    It admits a peer whose user is in ``uids`` or ``users``, or one of whose groups, primary or
    supplementary, is in ``gids`` or ``groups``; without any of the four, every peer. With a
    ``check`` it admits only those of them for whom that returns True. ``a | b`` admits whom
    either admits, ``a & b`` whom both admit; ``b`` is asked only if ``a`` leaves it open.

    Names are looked up once, here, and may wait for a directory service. In a user namespace
    the kernel shows every user from outside as 65534 (overflowuid): there that id matches
    nobody, and neither does one that is mapped to nobody when the policy is made. Where the
    kernel cannot tell supplementary groups, only the primary group matches.

    Args:
      uids: user ids.
      gids: group ids.
      users: names of users, from the passwd database.
      groups: names of groups, from the group database.
      check: an async function that gets a :class:`PeerIdentity`, which stays the library's and
        is closed afterwards, and returns a bool. What it raises is raised where the policy
        was to decide, and the peer is not admitted.

    Raises:
      ValueError: nothing given; an id out of range; or no user or group has that name.
      TypeError: an id that is no int, or a check that cannot be called.
    """

    __slots__ = ("_check", "_gids", "_matching_gids", "_matching_uids", "_uids")

    def __init__(
        self,
        *,
        uids: Iterable[int] = (),
        gids: Iterable[int] = (),
        users: Iterable[str] = (),
        groups: Iterable[str] = (),
        check: PeerCheck | None = None,
    ) -> None:
        self._uids: Final = _ids(uids, "uids") | {
            _kernel.user_named(name) for name in _names(users)
        }
        self._gids: Final = _ids(gids, "gids") | {
            _kernel.group_named(name) for name in _names(groups)
        }
        if check is not None and not callable(check):
            raise TypeError(f"check must be an async function, not {type(check).__name__}")
        if not self._uids and not self._gids and check is None:
            raise ValueError("this policy names nobody; give uids, gids, users, groups or a check")
        self._check: Final = check
        self._matching_uids: Final = set(filter(_kernel.is_own_user_id, self._uids))
        self._matching_gids: Final = set(filter(_kernel.is_own_group_id, self._gids))

    @classmethod
    def same_user(cls) -> PeerPolicy:
        """Admit the effective user of this process, as it is now."""
        return cls(uids=[_kernel.effective_user()])

    @classmethod
    def root(cls) -> PeerPolicy:
        """Admit user 0, which in a user namespace is that namespace's."""
        return cls(uids=[0])

    @property
    def needs_pidfd(self) -> bool:
        """Whether some check is asked, which may want to look at the process itself."""
        return self._check is not None

    async def admits(self, peer: PeerIdentity) -> bool:
        """Whether ``peer`` may talk to us. A checkpoint only if a check is one."""
        if (self._uids or self._gids) and not self._is_listed(peer):
            return False
        return self._check is None or await _asked(self._check, peer)

    def _is_listed(self, peer: PeerIdentity) -> bool:
        gids = (peer.credentials.gid, *(peer.groups or ()))
        return peer.credentials.uid in self._matching_uids or not self._matching_gids.isdisjoint(
            gids
        )

    def __or__(self, other: PeerPolicy) -> PeerPolicy:
        if not isinstance(other, PeerPolicy):  # pyright: ignore[reportUnnecessaryIsInstance]
            return NotImplemented
        return _Composed(self, other, "|")

    def __and__(self, other: PeerPolicy) -> PeerPolicy:
        if not isinstance(other, PeerPolicy):  # pyright: ignore[reportUnnecessaryIsInstance]
            return NotImplemented
        return _Composed(self, other, "&")

    def __repr__(self) -> str:
        parts = [
            f"{name}={{{', '.join(map(str, sorted(ids)))}}}"
            for name, ids in (("uids", self._uids), ("gids", self._gids))
            if ids
        ]
        if self._check is not None:
            parts.append(f"check={getattr(self._check, '__qualname__', repr(self._check))}")
        return f"PeerPolicy({', '.join(parts)})"


class _Composed(PeerPolicy):
    """Two policies, with | or & between them."""

    __slots__ = ("_left", "_right", "_sign")

    def __init__(self, left: PeerPolicy, right: PeerPolicy, sign: str) -> None:
        self._left: Final = left
        self._right: Final = right
        self._sign: Final = sign

    @property
    def needs_pidfd(self) -> bool:
        """Whether either asks a check."""
        return self._left.needs_pidfd or self._right.needs_pidfd

    async def admits(self, peer: PeerIdentity) -> bool:
        """Ask the left one, and the right one if that leaves it open."""
        left = await self._left.admits(peer)
        return left if left == (self._sign == "|") else await self._right.admits(peer)

    def __repr__(self) -> str:
        return f"({self._left!r} {self._sign} {self._right!r})"


@disable_ki_protection
async def _asked(check: PeerCheck, peer: PeerIdentity) -> bool:
    answer: object = check(peer)
    if not inspect.isawaitable(answer):
        raise TypeError(f"the check {check!r} of a policy is not async: it returned {answer!r}")
    answer = await answer
    if not isinstance(answer, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"the check {check!r} of a policy must return a bool, not {answer!r}")
    return answer


def _ids(given: Iterable[int], what: str) -> frozenset[int]:
    ids = frozenset(given)
    for each in ids:
        if type(each) is not int:
            raise TypeError(f"{what} are ints, not {type(each).__name__} ({each!r})")
        if not 0 <= each <= _LARGEST_ID:
            raise ValueError(f"{what} are from 0 to {_LARGEST_ID}; {each} is nobody's")
    return ids


def _names(given: Iterable[str]) -> Iterable[str]:
    if isinstance(given, str):
        raise TypeError(f"a list of names is due, not one name; write [{given!r}]")
    return given


@enable_ki_protection
async def admit_or_close(conn: UnixConnection, policy: PeerPolicy) -> bool:
    """Whether ``policy`` admits the peer; if not, it is logged and ``conn`` is closed."""
    admitted = False
    try:
        peer = await check_peer(conn, policy)
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
async def check_peer(conn: UnixConnection, policy: PeerPolicy) -> PeerIdentity | None:
    """Return who was denied, None if the peer is admitted."""
    with await _identified(conn, with_pidfd=policy.needs_pidfd) as peer:
        return None if await policy.admits(peer) else peer


async def _identified(conn: UnixConnection, *, with_pidfd: bool) -> PeerIdentity:
    was_said = False
    while True:
        try:
            return conn.get_peer_identity(with_pidfd=with_pidfd)
        except OSError as exc:
            if exc.errno not in _kernel.OUT_OF_RESOURCES:
                raise
            if not was_said:
                logger.warning(
                    "%s: cannot look at the process of a peer now (%s); trying again every %s "
                    "seconds",
                    conn.get_local_address(),
                    exc.strerror,
                    ACCEPT_RETRY_DELAY,
                )
            was_said = True
        await trio.sleep(ACCEPT_RETRY_DELAY)
