"""``trio-unixconn peer``: the process that listens at a path.

Invariant: no byte is sent or read. A fact that is unknown is reported with the reason.
"""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import attrs
import trio
import typer

from .. import _kernel
from .._client import open_unix_connection
from ..errors import UnixConnectionError
from ._console import address_of, argument_of, described, run, say, say_json, seconds, too_slow

if TYPE_CHECKING:
    from .._address import UnixSocketAddress
    from .._identity import PeerIdentity

T = TypeVar("T")


def peer(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="The socket: a path, @name for an abstract name, or a unix: URI.",
        ),
    ],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Give up after SECONDS.")] = 10,
) -> None:
    """Say which process listens at PATH, as the kernel knows it.

    It is the process that called listen(2); another may accept,
    which inherited or received the socket.
    """
    facts = run(partial(_ask, address_of(path), seconds(timeout)))
    if as_json:
        unknown = {each.name: each.text for each in facts if each.value is None}
        say_json({**{each.name: each.value for each in facts}, "unknown": unknown})
        return
    for each in facts:
        text = f"unknown: {each.text}" if each.value is None else each.text
        say(f"{each.name.replace('_', ' '):<17} {text}")


@attrs.frozen
class Fact:
    """One thing about a process.

    Attributes:
      value: for machines; None if it is not known.
      text: for people; the reason if it is not known.
    """

    name: str
    value: Any
    text: str


async def _ask(address: UnixSocketAddress, timeout: float) -> list[Fact]:
    try:
        with trio.fail_after(timeout):
            conn = await open_unix_connection(address)
    except trio.TooSlowError as exc:
        raise too_slow(timeout, address) from exc
    async with conn:
        with conn.get_peer_identity() as identity:
            fact = Fact("address", argument_of(address), argument_of(address))
            return [fact, *await _facts(identity)]


async def _facts(identity: PeerIdentity) -> list[Fact]:
    ids, groups, label = identity.credentials, identity.groups, identity.security_context
    return [
        _pid(ids.pid),
        _named("user", ids.uid, _kernel.name_of_user),
        _named("group", ids.gid, _kernel.name_of_group),
        _groups(groups),
        await _told("alive", partial(_is_alive, identity), lambda alive: "yes" if alive else "no"),
        await _told("program", identity.read_exe, str),
        await _told("command_line", identity.read_command_line, shlex.join),
        await _told("control_group", identity.read_cgroup, str),
        Fact("security_context", label, "no security module gives one" if label is None else label),
    ]


def _pid(pid: int) -> Fact:
    if pid > 0:
        return Fact("pid", pid, str(pid))
    return Fact("pid", None, "the process is in a pid namespace that cannot be seen from here")


def _named(name: str, number: int, name_of: Callable[[int], str | None]) -> Fact:
    value = {"id": number, "name": name_of(number)}
    return Fact(name, value, _text(value))


def _groups(groups: Sequence[int] | None) -> Fact:
    if groups is None:
        return Fact("groups", None, "this kernel does not tell (SO_PEERGROUPS, Linux 4.13)")
    value = [{"id": number, "name": _kernel.name_of_group(number)} for number in groups]
    return Fact("groups", value, ", ".join(map(_text, value)) or "none")


def _text(value: dict[str, Any]) -> str:
    return f"{value['id']} ({value['name'] or 'has no name'})"


async def _is_alive(identity: PeerIdentity) -> bool:
    return identity.is_alive()


async def _told(name: str, ask: Callable[[], Awaitable[T]], text_of: Callable[[T], str]) -> Fact:
    try:
        value = await ask()
    except (OSError, UnixConnectionError) as exc:
        return Fact(name, None, described(exc))
    return Fact(name, value, text_of(value))
