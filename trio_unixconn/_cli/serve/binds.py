"""Where to listen, as it is said on the command line: ``--bind``.

Invariant: all arguments are parsed before anything is opened, and if one cannot be opened, none
stays open.
"""

from __future__ import annotations

import errno
import os
import socket as stdlib_socket
from typing import TYPE_CHECKING, Final

import attrs
import trio

from ... import _kernel
from ..._address import UnixSocketAddress
from ..._listener import UnixListener, open_unix_listener
from .._activation import from_systemd, is_inherited
from .._console import address_of, argument_of, fail

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    Listener = trio.SocketListener | UnixListener

_FORMS: Final = "tcp:HOST:PORT, unix:PATH, unix:@NAME, fd:N, systemd or systemd:NAME"


@attrs.frozen
class TCPBind:
    """A host and a port; 0 for any that is free."""

    text: str
    host: str
    port: int

    def made_absolute(self) -> Self:
        """Return this."""
        return self

    async def open(self, mode: int) -> Sequence[Listener]:  # noqa: ARG002 - a path's
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

    async def open(self, mode: int) -> Sequence[Listener]:
        """Listen there."""
        return [await open_unix_listener(self.address, mode=mode)]


@attrs.frozen
class InheritedBind:
    """Descriptors of sockets that listen already."""

    text: str
    fds: Sequence[int]

    def made_absolute(self) -> Self:
        """Return this."""
        return self

    async def open(self, mode: int) -> Sequence[Listener]:  # noqa: ARG002 - a path's
        """Take them over."""
        found: list[Listener] = []
        try:
            # One by one: those before the one that cannot be are closed.
            for fd in self.fds:
                found.append(_inherited(fd))  # noqa: PERF401
        except (OSError, ValueError) as exc:
            await close_all(found)
            why = exc.strerror if isinstance(exc, OSError) else str(exc)
            raise OSError(errno.EINVAL, why, self.text) from exc
        return found


Bind = TCPBind | UnixBind | InheritedBind


def read_bind(text: str) -> Bind:
    """Read what was said to ``--bind``, or end with exit status 2."""
    kind, _, rest = text.partition(":")
    if kind == "tcp":
        return _tcp(text, rest)
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
            fail(f"{text}: {exc}")
    return fail(f"--bind: expected {_FORMS}, got {text}", status=2)


def absolute_address(address: UnixSocketAddress) -> UnixSocketAddress:
    """Return an address that does not depend on the current directory."""
    if address.get_is_abstract():
        return address
    return UnixSocketAddress.path(os.path.abspath(address.get_path()))


def _tcp(text: str, rest: str) -> TCPBind:
    host, _, port = rest.rpartition(":")
    inner = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not inner or (":" in host and inner == host):
        fail(
            f"--bind: expected tcp:HOST:PORT, with an address of IPv6 in brackets, got {text}; "
            "every address of this machine is 0.0.0.0 or [::]",
            status=2,
        )
    if not (port.isascii() and port.isdecimal() and int(port) < 2**16):
        fail(f"--bind {text}: a port is a number from 0 to 65535", status=2)
    return TCPBind(text, inner, int(port))


def _inherited(fd: int) -> Listener:
    if not is_inherited(fd):
        raise ValueError(f"descriptor {fd} is not open; the parent process must pass it on")
    sock = stdlib_socket.socket(fileno=fd)
    if sock.family == _kernel.AF_UNIX:
        sock.detach()
        return UnixListener.from_fd(fd)
    try:
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    except BaseException:
        sock.detach()
        raise
    sock.set_inheritable(False)
    return listener


async def open_all(binds: Sequence[Bind], mode: int) -> list[Listener]:
    """Listen everywhere.

    Raises:
      OSError: with what was said, or the address; all are closed then.
    """
    found: list[Listener] = []
    try:
        for bind in binds:
            found += await bind.open(mode)
    except BaseException:
        await close_all(found)
        raise
    return found


async def close_all(listeners: Sequence[Listener]) -> None:
    """Close them, even if cancelled."""
    with trio.CancelScope(shield=True):
        for listener in listeners:
            await listener.aclose()


def name_of(listener: Listener) -> str:
    """Return where it listens, in the form of ``--bind``."""
    if isinstance(listener, UnixListener):
        return f"unix:{argument_of(listener.get_local_address())}"
    name = listener.socket.getsockname()
    if listener.socket.family == stdlib_socket.AF_INET:
        return f"tcp:{name[0]}:{name[1]}"
    if listener.socket.family == stdlib_socket.AF_INET6:
        return f"tcp:[{name[0]}]:{name[1]}"
    return str(name)
