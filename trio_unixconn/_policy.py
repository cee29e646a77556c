"""PeerPolicy: which peers are admitted.

Invariant: a peer that is not admitted is denied. A fact that the kernel does not report, or that
cannot be read, admits no peer.

Sources: unix(7), credentials(7), user_namespaces(7)
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import attrs
import trio
from trio.lowlevel import disable_ki_protection, enable_ki_protection

from . import _kernel
from ._accept import ACCEPT_RETRY_DELAY
from ._credentials import peer_credentials
from ._identity import PeerIdentity, identify
from ._sockopts import raw_socket
from .errors import ConnectionClosedError, NotSupportedError

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

if TYPE_CHECKING:
    from ._connection import UnixConnection

T = TypeVar("T")

logger: Final = logging.getLogger("trio_unixconn")

PeerCheck = Callable[[PeerIdentity], Awaitable[bool]]

# The next number is (uid_t)-1, which means "no such id" to every kernel.
_MAX_ID: Final = 2**32 - 2

# What an identity raises if the process has exited, or may not be looked at.
_UNKNOWN: Final = (ProcessLookupError, PermissionError, NotSupportedError)
# Why checks have denied the peer that is being asked about in this context, for the log.
_reasons: Final[ContextVar[list[str] | None]] = ContextVar("_reasons", default=None)


class PeerPolicy:
    """A rule that admits or denies a peer, by what the kernel reports, before a byte is read.

    It admits a peer whose user is in ``uids`` or ``users``, or one of whose groups, primary or
    supplementary, is in ``gids`` or ``groups``. If none of the four is given, it admits every peer.
    With a ``check``, it admits only those of them for which the check returns True. ``a | b``
    admits the peers that either policy admits, ``a & b`` those that both admit. ``b`` is not asked
    if ``a`` decides.

    Names are looked up when the policy is made, which can wait for a directory service. In a user
    namespace the kernel reports every user from outside as 65534 (overflowuid). There that id
    matches no user, nor does an id that is unmapped when the policy is made. If the map cannot be
    read then, because /proc is not mounted, 65534 matches no user either. If the kernel does not
    report supplementary groups, only the primary group matches.

    Args:
      uids: user ids.
      gids: group ids.
      users: names of users, from the passwd database.
      groups: names of groups, from the group database.
      check: an async function of one argument, a :class:`PeerIdentity`, which returns a bool; or an
        object whose ``__call__`` is one. A lambda or a plain function is rejected even if it
        returns a coroutine: call it from an async function. The library closes the identity
        afterwards.
        If the check raises ``ProcessLookupError``, PermissionError or :class:`NotSupportedError`,
        as an identity does if the process has exited or may not be looked at, the peer is denied.
        Any other exception is an error of the program: it is raised where the policy is asked, and
        the connection is closed.

    Raises:
      ValueError: no argument; an id out of range; or no user or group has that name.
      TypeError: an argument of another type; or a check that is not async, or does not accept one
        argument.
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
        if check is not None:
            _check_check(check)
        self._uids: Final = _ids(uids, "uids") | {
            _kernel.user_named(name) for name in _names(users, "users")
        }
        self._gids: Final = _ids(gids, "gids") | {
            _kernel.group_named(name) for name in _names(groups, "groups")
        }
        if not self._uids and not self._gids and check is None:
            raise ValueError(
                "PeerPolicy() requires at least one of uids, gids, users, groups, check"
            )
        self._check: Final = check
        self._matching_uids: Final = set(filter(_kernel.is_own_user_id, self._uids))
        self._matching_gids: Final = set(filter(_kernel.is_own_group_id, self._gids))

    @classmethod
    def same_user(cls) -> PeerPolicy:
        """Admit the current effective user of this process."""
        return cls(uids=[_kernel.effective_user()])

    @classmethod
    def root(cls) -> PeerPolicy:
        """Admit user 0. In a user namespace, that is the user 0 of the namespace."""
        return cls(uids=[0])

    @property
    def needs_pidfd(self) -> bool:
        """Whether the policy has a check, which may look at the process itself."""
        return self._check is not None

    @property
    def needs_groups(self) -> bool:
        """Whether the policy needs the groups of a peer."""
        return bool(self._gids) or self._check is not None

    def _has_only_ids(self) -> bool:
        """Whether the ids decide alone: without a check, or an ``admits`` of a subclass."""
        return self._check is None and type(self).admits is PeerPolicy.admits

    def _admits_user(self, uid: int) -> bool:
        """Whether the policy admits every process of a user, so that no more need be known."""
        return uid in self._matching_uids and self._has_only_ids()

    async def admits(self, peer: PeerIdentity) -> bool:
        """Whether the policy admits ``peer``. This is a checkpoint only if a check is one."""
        if (self._uids or self._gids) and not self._is_listed(peer):
            return False
        return self._check is None or await _ask(self._check, peer)

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
    """Two policies that are combined by | or &."""

    __slots__ = ("_left", "_operator", "_right")

    def __init__(self, left: PeerPolicy, right: PeerPolicy, operator: str) -> None:
        self._left: Final = left
        self._right: Final = right
        self._operator: Final = operator

    @property
    def needs_pidfd(self) -> bool:
        """Whether one of them has a check."""
        return self._left.needs_pidfd or self._right.needs_pidfd

    @property
    def needs_groups(self) -> bool:
        """Whether one of them needs groups."""
        return self._left.needs_groups or self._right.needs_groups

    def _admits_user(self, uid: int) -> bool:
        """Whether the two together admit every process of a user."""
        left, right = self._left._admits_user(uid), self._right._admits_user(uid)
        return (left or right) if self._operator == "|" else (left and right)

    async def admits(self, peer: PeerIdentity) -> bool:
        """Ask the left policy, and the right one if the left does not decide."""
        left = await self._left.admits(peer)
        return left if left == (self._operator == "|") else await self._right.admits(peer)

    def __repr__(self) -> str:
        return f"({self._left!r} {self._operator} {self._right!r})"


def describe_policy(policy: PeerPolicy) -> list[object]:
    """Return what another process of this user namespace can make the same policy of, as JSON.

    Raises:
      ValueError: it has a check, or is of a subclass that decides itself: code of this process.
    """
    if isinstance(policy, _Composed):
        return [policy._operator, describe_policy(policy._left), describe_policy(policy._right)]
    if not policy._has_only_ids():
        raise ValueError(f"expected a policy that has only ids, got {policy!r}")
    return ["ids", sorted(policy._uids), sorted(policy._gids)]


def restore_policy(described: Any) -> PeerPolicy:
    """Return the policy that :func:`describe_policy` has described."""
    kind, left, right = described
    if kind == "ids":
        return PeerPolicy(uids=left, gids=right)
    return _Composed(restore_policy(left), restore_policy(right), kind)


async def _ask(check: PeerCheck, peer: PeerIdentity) -> bool:
    try:
        return await _answer(check, peer)
    except _UNKNOWN as exc:
        reason = str(exc)
    except BaseExceptionGroup as group:
        # A check that uses a nursery raises such a group.
        unknown, others = group.split(_UNKNOWN)
        if unknown is None or others is not None:
            raise
        reason = ", ".join(map(str, unknown.exceptions))
    reasons = _reasons.get()
    if reasons is not None:
        reasons.append(reason)
    return False


@disable_ki_protection
async def _answer(check: PeerCheck, peer: PeerIdentity) -> bool:
    answer: object = check(peer)
    if not inspect.isawaitable(answer):
        raise TypeError(f"check must be an async function, but {check!r} returned {answer!r}")
    answer = await answer
    if not isinstance(answer, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"check {check!r} must return a bool, got {answer!r}")
    return answer


def _check_check(check: object) -> None:
    """Raise TypeError unless this is an async function of one argument, as far as can be known."""
    expected = "check must be an async function of one argument (a PeerIdentity)"
    if not callable(check):
        raise TypeError(f"{expected}, got {type(check).__name__}")
    try:
        signature = inspect.signature(check)
    except (TypeError, ValueError):
        # Written in C, or an object that has none; it is known when it is called.
        pass
    else:
        try:
            signature.bind(None)
        except TypeError as exc:
            raise TypeError(f"{expected}, got {check!r} with {signature}: {exc}") from None
    layers = list(_layers(check))
    if any(map(inspect.iscoroutinefunction, layers)):
        return
    for layer in layers:
        if isinstance(layer, type):
            raise TypeError(f"{expected}, got the class {layer.__name__}")
    raise TypeError(
        f"{expected}, got {check!r}, which is not async; if it returns an awaitable, call it from "
        "an async function"
    )


def _layers(check: object) -> Iterator[object]:
    """Yield a callable, and what it calls, as far as is known without calling it.

    Any of them may be the async function: a decorator may return a plain function that returns the
    coroutine of another one, or an async function that calls a plain one.
    """
    seen: list[object] = []
    while not any(check is each for each in seen):
        seen.append(check)
        yield check
        wrapped: object = getattr(check, "__wrapped__", None)
        if isinstance(check, partial):
            check = cast("partial[object]", check).func
        elif inspect.ismethod(check):
            check = check.__func__
        elif wrapped is not None:
            check = wrapped
        elif not inspect.isroutine(check) and not isinstance(check, type):
            check = type(check).__call__


def check_policy(policy: PeerPolicy | None) -> None:
    """Raise TypeError unless this is a policy or None."""
    if not isinstance(policy, PeerPolicy | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"policy must be a PeerPolicy or None, got {type(policy).__name__}")


def _ids(given: Iterable[int], what: str) -> frozenset[int]:
    ids = list(_iterable(given, what, "ints"))
    for each in ids:
        if type(each) is not int:
            raise TypeError(f"{what} must be an iterable of ints, got {type(each).__name__} in it")
        if not 0 <= each <= _MAX_ID:
            raise ValueError(f"{what} must be from 0 to {_MAX_ID}, got {each}")
    return frozenset(ids)


def _names(given: Iterable[str], what: str) -> list[str]:
    if isinstance(given, str):
        raise TypeError(f"{what} must be an iterable of names, got str; use [{given!r}]")
    names = list(_iterable(given, what, "names"))
    for each in names:
        if type(each) is not str:
            raise TypeError(f"{what} must be an iterable of names, got {type(each).__name__} in it")
    return names


def _iterable(given: Iterable[T], what: str, items: str) -> Iterable[T]:
    if not isinstance(given, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{what} must be an iterable of {items}, got {type(given).__name__}")
    return given


@attrs.frozen
class Denial:
    """A peer that was denied, and why its checks could not look at it."""

    peer: PeerIdentity
    reasons: list[str]

    def __str__(self) -> str:
        return str(self.peer) + "".join(f" ({each})" for each in self.reasons)


@enable_ki_protection
async def admit_or_close(conn: UnixConnection, policy: PeerPolicy) -> bool:
    """Whether ``policy`` admits the peer; if not, that is logged and ``conn`` is closed."""
    admitted = False
    try:
        name = conn.get_local_address()
        denial = await check_peer(conn, policy)
        if denial is None:
            admitted = True
        else:
            logger.warning("%s: denied %s by %r", name, denial, policy)
    finally:
        if not admitted:
            # Closing does not wait. Shielded, so that a cancellation does not hide the decision.
            with trio.CancelScope(shield=True):
                await conn.aclose()
    return admitted


@enable_ki_protection
async def check_peer(conn: UnixConnection, policy: PeerPolicy) -> Denial | None:
    """Ask a policy about the peer of a connection; return None if it is admitted."""
    # Most policies admit a user. An error is reported below, if the policy still needs to know.
    try:
        if policy._admits_user(peer_credentials(raw_socket(conn.socket).getsockopt).uid):
            return None
    except (OSError, NotSupportedError):
        pass
    reasons: list[str] = []
    with await _identified(conn, policy) as peer:
        token = _reasons.set(reasons)
        try:
            if await policy.admits(peer):
                return None
        finally:
            _reasons.reset(token)
    # All facts, for the log, unless the connection was closed while the check ran.
    with suppress(OSError):
        peer = identify(raw_socket(conn.socket), with_pidfd=False)
    return Denial(peer, reasons)


async def _identified(conn: UnixConnection, policy: PeerPolicy) -> PeerIdentity:
    """Gather what the policy needs to know: each fact is a system call."""
    raw, has_check = raw_socket(conn.socket), policy.needs_pidfd
    is_logged = False
    while True:
        try:
            return identify(
                raw, with_pidfd=has_check, with_groups=policy.needs_groups, with_label=has_check
            )
        except OSError as exc:
            if exc.errno not in _kernel.OUT_OF_RESOURCES:
                raise
            if not is_logged:
                logger.warning(
                    "%s: cannot open a pidfd of a peer (%s), retrying every %s s",
                    conn.get_local_address(),
                    exc.strerror,
                    ACCEPT_RETRY_DELAY,
                )
            is_logged = True
        await trio.sleep(ACCEPT_RETRY_DELAY)
        if raw.fileno() == -1:
            raise ConnectionClosedError("this connection is closed")
