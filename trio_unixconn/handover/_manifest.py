"""The manifest: which listeners a generation hands over, and whether they are what it says.

Invariant: a manifest is not trusted. Each file descriptor is checked against its entry, by what the
kernel says of it, before anything is accepted from it.

Sources: socket(7) (SO_ACCEPTCONN), getsockname(2), ip(7), ipv6(7), unix(7)
"""

from __future__ import annotations

import json
import os
import socket as stdlib_socket
from typing import Any, Final, TypeAlias, cast

import attrs

from .. import _kernel
from .._address import escaped
from ._protocol import ProtocolError

#: The maximum number of listeners in a manifest.
MAX_LISTENERS: Final = 100_000

#: What getsockname(2) returns: the name of a Unix socket, or host, port and, for IPv6, two numbers.
SocketName: TypeAlias = str | tuple[str | int, ...]

_FAMILIES: Final = {
    "inet": stdlib_socket.AF_INET,
    "inet6": stdlib_socket.AF_INET6,
    "unix": _kernel.AF_UNIX,
}


@attrs.frozen
class ListenerEntry:
    """A listener in a manifest.

    Attributes:
      name: by which the program knows it.
      kind: ``inet``, ``inet6`` or ``unix``.
      bound: what getsockname(2) returns.
      path: of a Unix socket, the path that leads to it, made absolute; None if there is none.
      file: device and inode of the file at that path; None if the path is not removed at the end.
    """

    name: str
    kind: str
    bound: SocketName
    path: str | None = None
    file: tuple[int, int] | None = None

    def __str__(self) -> str:
        where = self.path if self.path is not None else self.bound
        return f"{escaped(self.name)} ({self.kind} {escaped(str(where))})"


@attrs.frozen
class Manifest:
    """What a generation offers.

    Attributes:
      name: of the service.
      number: of the generation; the first one has number 1.
      listeners: in the order in which their file descriptors are sent.
    """

    name: str
    number: int
    listeners: list[ListenerEntry]

    def encode(self) -> bytes:
        """Return the manifest as bytes."""
        return json.dumps(attrs.asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Return the manifest that another process sent.

        Raises:
          ProtocolError: it is not a manifest, or two listeners have the same name.
        """
        try:
            fields: Any = json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise ProtocolError(f"expected a manifest: {exc}") from exc
        match fields:
            case {"name": str(name), "number": int(number), "listeners": list()}:
                listeners = [_decode_entry(each) for each in fields["listeners"]]
            case _:
                raise ProtocolError("expected a manifest with name, number and listeners")
        if number < 1:
            raise ProtocolError(f"expected the number of a generation, got {number}")
        if len(listeners) > MAX_LISTENERS:
            raise ProtocolError(f"expected at most {MAX_LISTENERS} listeners, got {len(listeners)}")
        if len({each.name for each in listeners}) < len(listeners):
            raise ProtocolError("expected listeners with different names")
        return cls(name, number, listeners)


def _decode_entry(entry: Any) -> ListenerEntry:
    match entry:
        case {"name": str(name), "kind": str(kind), "bound": _, "path": _, "file": _}:
            bound, path, file = (entry[key] for key in ("bound", "path", "file"))
        case _:
            raise ProtocolError("expected a listener with name, kind, bound, path and file")
    if _FAMILIES.get(kind) is None:
        raise ProtocolError(f"expected a listener of a known kind, got {kind!r:.40}")
    if not isinstance(path, str | None) or (path is not None and (not path or "\0" in path)):
        raise ProtocolError("expected a path")
    if file is not None and (path is None or not _is_list(file, int, int)):
        raise ProtocolError("expected the device and the inode of the file at a path")
    return ListenerEntry(
        name, kind, _decode_bound(kind, bound), path, None if file is None else tuple(file)
    )


def _decode_bound(kind: str, bound: Any) -> SocketName:
    if kind == "unix" and isinstance(bound, str):
        return bound
    if (kind == "inet" and _is_list(bound, str, int)) or (
        kind == "inet6" and _is_list(bound, str, int, int, int)
    ):
        return tuple(bound)
    raise ProtocolError(f"expected the address of a listener of kind {kind}")


def _is_list(value: Any, *types: type) -> bool:
    return type(value) is list and tuple(map(type, cast("Any", value))) == types


def describe_socket(sock: stdlib_socket.socket) -> tuple[str, SocketName]:
    """Return the kind and the address of a listening stream socket.

    Raises:
      ValueError: a socket of another kind, which cannot be handed over.
    """
    kind = next((name for name, family in _FAMILIES.items() if family == sock.family), None)
    if kind is None:
        raise ValueError(f"expected a TCP or Unix socket, got family {sock.family}")
    if sock.type != stdlib_socket.SOCK_STREAM:
        raise ValueError(f"expected a stream socket, got type {sock.type}")
    if not sock.getsockopt(_kernel.SOL_SOCKET, stdlib_socket.SO_ACCEPTCONN):
        raise ValueError("expected a listening socket, got one that does not listen")
    name: str | bytes | tuple[str | int, ...] = sock.getsockname()
    return kind, name if isinstance(name, tuple) else os.fsdecode(name)


def check_listener(fd: int, entry: ListenerEntry) -> stdlib_socket.socket:
    """Return the socket that a manifest describes; it owns ``fd``.

    Raises:
      ProtocolError: it is something else; ``fd`` is still open, and the caller's.
    """
    try:
        sock = stdlib_socket.socket(fileno=fd)
    except OSError as exc:
        raise ProtocolError(f"listener {entry}: expected a socket, got another file") from exc
    try:
        kind, bound = describe_socket(sock)
        if (kind, bound) != (entry.kind, entry.bound):
            raise ValueError(f"got the {kind} socket {escaped(str(bound))}")
    except (OSError, ValueError) as exc:
        sock.detach()
        raise ProtocolError(f"listener {entry}: {exc}") from exc
    return sock
