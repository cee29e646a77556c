"""Where to listen, as it is said on the command line: ``--bind``, ``--stats``, ``--agent-check``.

Invariant: all arguments are parsed before anything is opened, and if one cannot be opened, none
stays open.
"""

from __future__ import annotations

import errno
import os
import socket as stdlib_socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from ... import _kernel
from ..._address import UnixSocketAddress
from ..._bind import Permissions, check_path
from ..._listener import UnixListener, open_unix_listener
from ..._policy import PeerPolicy
from ...handover import GenerationListener
from .._activation import from_systemd, is_inherited
from .._console import address_of, argument_of, fail

if TYPE_CHECKING:
    from typing_extensions import Self

    from ...handover import Generation

    Listener = trio.SocketListener | UnixListener

_FORMS: Final = "tcp:HOST:PORT, unix:PATH, unix:@NAME, fd:N, systemd or systemd:NAME"
# The permission bits of paths. An option that lets other users in is of no use without them.
_DEFAULT_MODE: Final = 0o600
_GROUP_MODE: Final = 0o660
_POLICY_MODE: Final = 0o666
# The largest number means "unchanged" to chown(2), and "no such id" to every kernel.
_MAX_ID: Final = 2**32 - 2


@attrs.frozen(kw_only=True)
class UnixOptions:
    """What Unix sockets get that are opened here.

    Attributes:
      mode, owner, group: of a path, as of :func:`open_unix_listener`.
      replace: whether a path is taken even from a server that is alive.
      policy: which peers may connect, also to an abstract name or an inherited socket.
      receive_descriptors: whether peers may send file descriptors, likewise.
    """

    mode: int = _DEFAULT_MODE
    owner: int | None = None
    group: int | None = None
    replace: bool = False
    policy: PeerPolicy | None = None
    receive_descriptors: bool = True


@attrs.frozen
class TCPBind:
    """A host and a port; 0 for any that is free."""

    text: str
    host: str
    port: int

    def made_absolute(self) -> Self:
        """Return this."""
        return self

    @property
    def keys(self) -> Sequence[object]:
        """What no other bind can have; two of port 0 are different."""
        return [("tcp", self.host, self.port)] if self.port else []

    async def open(self, _: UnixOptions) -> Sequence[Listener]:
        """Listen at every address of the host."""
        try:
            return await trio.open_tcp_listeners(self.port, host=self.host)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, self.text) from exc


@attrs.frozen
class UnixBind:
    """A path, or an abstract name."""

    address: UnixSocketAddress

    def made_absolute(self) -> UnixBind:
        """Return one that does not depend on the current directory."""
        return UnixBind(absolute_address(self.address))

    @property
    def keys(self) -> Sequence[object]:
        """What no other bind can have."""
        with suppress(FileNotFoundError):
            return [absolute_address(self.address)]
        # The current directory was deleted.
        return [self.address]

    @property
    def is_path(self) -> bool:
        """Whether it is a path, not an abstract name."""
        return not self.address.get_is_abstract()

    async def check(self, options: UnixOptions) -> None:
        """Raise what ``open`` would raise now; nothing is taken from another server."""
        permissions = Permissions(options.mode, options.owner, options.group)
        await check_path(self.address, permissions)

    async def open(self, options: UnixOptions) -> Sequence[Listener]:
        """Listen there."""
        if not self.is_path:
            return [
                await open_unix_listener(
                    self.address,
                    policy=options.policy,
                    receive_descriptors=options.receive_descriptors,
                )
            ]
        return [
            await open_unix_listener(
                self.address,
                mode=options.mode,
                owner=options.owner,
                group=options.group,
                replace=options.replace,
                policy=options.policy,
                receive_descriptors=options.receive_descriptors,
            )
        ]


@attrs.frozen
class InheritedBind:
    """Descriptors of sockets that listen already.

    Attributes:
      missing: why there are none, which is an error unless the server before has some of this name.
    """

    text: str
    fds: Sequence[int]
    missing: str = ""

    def made_absolute(self) -> Self:
        """Return this."""
        return self

    @property
    def keys(self) -> Sequence[object]:
        """What no other bind can have."""
        return self.fds

    async def open(self, options: UnixOptions) -> Sequence[Listener]:
        """Take them over."""
        if self.missing:
            raise OSError(errno.EINVAL, self.missing, self.text)
        found: list[Listener] = []
        try:
            # One by one: those before the one that cannot be are closed.
            for fd in self.fds:
                found.append(_inherited(fd, options))  # noqa: PERF401
        except (OSError, ValueError) as exc:
            await close_all(found)
            why = exc.strerror if isinstance(exc, OSError) else str(exc)
            raise OSError(errno.EINVAL, why, self.text) from exc
        return found


Bind = TCPBind | UnixBind | InheritedBind


################################################################
# The command line
################################################################


def read_bind(text: str, option: str = "--bind", *, may_inherit: bool = False) -> Bind:
    """Read what was said to ``--bind``, or end with exit status 2.

    Args:
      option: another option of the same form, for errors.
      may_inherit: whether the server before may have what was not passed to this process.
    """
    kind, _, rest = text.partition(":")
    if kind == "tcp":
        return _tcp(text, rest, option)
    if kind == "unix":
        # Without a slash in front or a key, this is what the other commands take.
        is_uri = rest.startswith("/") or "=" in rest
        return UnixBind(address_of(text if is_uri or not rest else rest))
    if kind == "fd" and rest.isdecimal():
        return InheritedBind(text, [int(rest)])
    if text == "systemd" or (kind == "systemd" and rest):
        try:
            return InheritedBind(text, from_systemd(rest or None))
        except ValueError as exc:
            if may_inherit:
                return InheritedBind(text, [], str(exc))
            fail(f"{text}: {exc}")
    return fail(f"{option}: expected {_FORMS}, got {text}", status=2)


def check_different(**binds: Sequence[Bind]) -> None:
    """End with exit status 2 if two of them are the same.

    Args:
      binds: by the name of their option.
    """
    found: set[object] = set()
    for option, each in binds.items():
        for bind in each:
            for key in bind.keys:
                if key in found:
                    name = option.replace("_", "-")
                    fail(f"--{name} {_text(bind)}: this is given twice", status=2)
                found.add(key)


def read_unix_options(
    binds: Sequence[Bind],
    *,
    mode: str | None,
    owner: str | None,
    group: str | None,
    replace: bool,
    allow_user: Sequence[str],
    allow_group: Sequence[str],
    receive_descriptors: bool = True,
) -> UnixOptions:
    """Read the options of Unix sockets, or end with exit status 2.

    An option that has no effect on any of ``binds`` is an error.
    """
    for name, value in (
        ("--mode", mode is not None),
        ("--owner", owner is not None),
        ("--group", group is not None),
        ("--replace", replace),
    ):
        if value and not any(map(has_path, binds)):
            fail(f"{name} can only be used with --bind unix:PATH", status=2)
    for name, values in (("--allow-user", allow_user), ("--allow-group", allow_group)):
        if values and not any(map(_has_unix_socket, binds)):
            fail(
                f"{name} can only be used with a Unix socket; the peer of a TCP connection is "
                "known by its address only",
                status=2,
            )
    policy, default_mode = None, _DEFAULT_MODE
    if group is not None:
        default_mode = _GROUP_MODE
    if allow_user or allow_group:
        default_mode = _POLICY_MODE
        policy = PeerPolicy(
            uids=[_id("--allow-user", each, _kernel.user_named) for each in allow_user],
            gids=[_id("--allow-group", each, _kernel.group_named) for each in allow_group],
        )
    return UnixOptions(
        mode=default_mode if mode is None else _mode(mode),
        owner=None if owner is None else _id("--owner", owner, _kernel.user_named),
        group=None if group is None else _id("--group", group, _kernel.group_named),
        replace=replace,
        policy=policy,
        receive_descriptors=receive_descriptors,
    )


def has_path(bind: Bind) -> bool:
    """Whether it is a path, which can be taken from a live server."""
    return isinstance(bind, UnixBind) and bind.is_path


def _has_unix_socket(bind: Bind) -> bool:
    if isinstance(bind, InheritedBind):
        return bool(bind.missing) or any(map(_can_be_unix, bind.fds))
    return isinstance(bind, UnixBind)


def _can_be_unix(fd: int) -> bool:
    try:
        sock = stdlib_socket.socket(fileno=fd)
    except (OSError, OverflowError):
        # To be reported when it is opened.
        return True
    try:
        return sock.family == _kernel.AF_UNIX
    finally:
        sock.detach()


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        fail(f"--mode: expected permission bits in octal, 0 to 777, got {text}", status=2)
    return mode


def _id(option: str, text: str, look_up: Callable[[str], int]) -> int:
    """Return an id for a name or a number; as in chown(1), a name of digits is a name."""
    try:
        return look_up(text)
    except ValueError as exc:
        if not (text.isascii() and text.isdecimal()):
            fail(f"{option}: {exc}", status=2)
    if int(text) > _MAX_ID:
        fail(f"{option}: expected a name or a number from 0 to {_MAX_ID}, got {text}", status=2)
    return int(text)


def _text(bind: Bind) -> str:
    return f"unix:{argument_of(bind.address)}" if isinstance(bind, UnixBind) else bind.text


def check_proxy_options(
    binds: Sequence[Bind], version: object, networks: Sequence[str] | None
) -> None:
    """End with exit status 2 if ``--proxy-protocol`` and ``--proxy-from`` do not fit together."""
    if networks and version is None:
        fail("--proxy-from can only be used with --proxy-protocol", status=2)
    if version and not networks and not all(isinstance(each, UnixBind) for each in binds):
        fail(
            "--proxy-protocol requires --proxy-from, the networks of the balancers, unless all "
            "binds are paths",
            status=2,
        )


def absolute_address(address: UnixSocketAddress) -> UnixSocketAddress:
    """Return an address that does not depend on the current directory."""
    if address.get_is_abstract():
        return address
    return UnixSocketAddress.path(os.path.abspath(address.get_path()))


def _tcp(text: str, rest: str, option: str) -> TCPBind:
    host, _, port = rest.rpartition(":")
    inner = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not inner or (":" in host and inner == host):
        fail(
            f"{option}: expected tcp:HOST:PORT, with an address of IPv6 in brackets, got {text}; "
            "every address of this machine is 0.0.0.0 or [::]",
            status=2,
        )
    if not (port.isascii() and port.isdecimal() and int(port) < 2**16):
        fail(f"{option} {text}: a port is a number from 0 to 65535", status=2)
    return TCPBind(text, inner, int(port))


################################################################
# Listeners
################################################################


def _inherited(fd: int, options: UnixOptions) -> Listener:
    if not is_inherited(fd):
        raise ValueError(f"descriptor {fd} is not open; the parent process must pass it on")
    sock = stdlib_socket.socket(fileno=fd)
    if sock.family == _kernel.AF_UNIX:
        sock.detach()
        return UnixListener.from_fd(
            fd, policy=options.policy, receive_descriptors=options.receive_descriptors
        )
    try:
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    except BaseException:
        sock.detach()
        raise
    sock.set_inheritable(False)
    return listener


async def open_all(binds: Sequence[Bind], options: UnixOptions) -> list[Listener]:
    """Listen everywhere.

    Raises:
      OSError: with what was said, or the address; all are closed then.
    """
    found: list[Listener] = []
    try:
        for bind in binds:
            found += await bind.open(options)
    except BaseException:
        await close_all(found)
        raise
    return found


async def check_paths(binds: Sequence[Bind], options: UnixOptions) -> None:
    """Raise what taking one of the paths would raise now; nothing is taken.

    Raises:
      OSError: with the address.
    """
    for bind in binds:
        if isinstance(bind, UnixBind) and bind.is_path:
            await bind.check(options)


async def close_all(listeners: Sequence[Listener]) -> None:
    """Close them, even if cancelled."""
    with trio.CancelScope(shield=True):
        for listener in listeners:
            await listener.aclose()


################################################################
# Listeners of a generation
################################################################


async def open_all_in(
    generation: Generation, binds: Sequence[Bind], options: UnixOptions
) -> list[GenerationListener[Any]]:
    """Listen everywhere; what the generation before has, is inherited.

    Raises:
      OSError: with what was said, or the address.
    """
    found: list[GenerationListener[Any]] = []
    for bind in binds:
        match bind:
            case TCPBind():
                found += await _open_tcp(generation, bind)
            case UnixBind():
                found.append(await _open_unix(generation, bind, options))
            case _:
                found += await _inherit(generation, bind, options)
    return found


async def _open_tcp(
    generation: Generation, bind: TCPBind
) -> list[GenerationListener[trio.SocketStream]]:
    """Listen at every address of the host that this machine has."""
    found: list[GenerationListener[trio.SocketStream]] = []
    unsupported: OSError | None = None
    try:
        for family, _, _, _, address in await trio.socket.getaddrinfo(
            bind.host,
            bind.port,
            type=stdlib_socket.SOCK_STREAM,
            flags=stdlib_socket.AI_PASSIVE,
        ):
            host = str(address[0])
            shown = f"[{host}]" if family == stdlib_socket.AF_INET6 else host
            name = _unused_name(generation, f"tcp:{shown}:{bind.port}")
            try:
                found.append(await generation.listen_tcp(name, bind.port, host=host))
            except OSError as exc:
                if exc.errno != errno.EAFNOSUPPORT:
                    raise
                unsupported = exc
        if not found and unsupported is not None:
            raise unsupported
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, bind.text) from exc
    return found


async def _open_unix(
    generation: Generation, bind: UnixBind, options: UnixOptions
) -> GenerationListener[Any]:
    address = absolute_address(bind.address)
    permissions: dict[str, Any] = {}
    if bind.is_path:
        permissions = {"mode": options.mode, "owner": options.owner, "group": options.group}
    return await generation.listen_unix(
        f"unix:{argument_of(address)}",
        address,
        policy=options.policy,
        receive_descriptors=options.receive_descriptors,
        **permissions,
    )


async def _inherit(
    generation: Generation, bind: InheritedBind, options: UnixOptions
) -> list[GenerationListener[Any]]:
    offered = [each for each in generation.offered if each.partition("#")[0] == bind.text]
    found = [
        generation.inherit(
            each, policy=options.policy, receive_descriptors=options.receive_descriptors
        )
        for each in offered
    ]
    if not found:
        return [
            generation.adopt(_unused_name(generation, bind.text), each)
            for each in await bind.open(options)
        ]
    return [each for each in found if each is not None]


def _unused_name(generation: Generation, name: str) -> str:
    """Return the name, or that with a number: several sockets can have the same."""
    used = {each.name for each in generation.listeners}
    if name not in used:
        return name
    return next(each for each in (f"{name}#{n}" for n in count(2)) if each not in used)


def name_of(listener: Listener | GenerationListener[Any]) -> str:
    """Return where it listens, in the form of ``--bind``."""
    if isinstance(listener, GenerationListener):
        listener = listener.base
    if isinstance(listener, UnixListener):
        return f"unix:{argument_of(listener.get_local_address())}"
    name = listener.socket.getsockname()
    if listener.socket.family == stdlib_socket.AF_INET:
        return f"tcp:{name[0]}:{name[1]}"
    if listener.socket.family == stdlib_socket.AF_INET6:
        return f"tcp:[{name[0]}]:{name[1]}"
    return str(name)
