"""Names of Unix sockets.

The rule of this file: a name is bytes to the kernel and stays bytes; text goes in and out
through ``os.fsencode`` and ``os.fsdecode`` and no byte is lost on the way.

Sources: unix(7), https://docs.gtk.org/gio-unix/class.SocketAddress.html, and for URIs the
chapter "Server Addresses" of https://dbus.freedesktop.org/doc/dbus-specification.html
"""

from __future__ import annotations

import os
import urllib.parse
from typing import Final

import attrs

_FORMS: Final = (
    "unix:/absolute/path, unix:///absolute/path, unix:path=... or unix:abstract=..., with bytes "
    "escaped as %xx"
)


def _no_nul(_: object, __: object, native: bytes) -> None:
    # The kernel would read a path up to there, and connect to another one.
    if b"\0" in native[1:] and native[0]:
        raise ValueError(f"a socket's path must not contain NUL, as {native!r} does")


@attrs.frozen
class UnixSocketAddress:
    """The name of a Unix socket: a path, an abstract name, or none, as ``Gio.UnixSocketAddress``.

    Attributes:
      native: the name as the kernel has it: the bytes of a path without the final NUL, a NUL
        and an abstract name, or nothing.
    """

    native: bytes = attrs.field(
        default=b"", validator=[attrs.validators.instance_of(bytes), _no_nul]
    )

    @classmethod
    def from_native(cls, name: str | bytes) -> UnixSocketAddress:
        """Make one from what ``getsockname``, ``getpeername`` or ``accept`` return."""
        return cls(os.fsencode(name))

    @classmethod
    def path(cls, path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> UnixSocketAddress:
        """Name a socket in the file system.

        Raises:
          ValueError: an empty path, or one with a NUL in it.
        """
        native = os.fsencode(path)
        if not native or b"\0" in native:
            raise ValueError(f"a socket's path must not be empty nor contain NUL, as {path!r} does")
        return cls(native)

    @classmethod
    def abstract(cls, name: str | bytes) -> UnixSocketAddress:
        """Name a socket in Linux's abstract namespace; ``name`` is without the leading NUL."""
        return cls(b"\0" + os.fsencode(name))

    @classmethod
    def from_any(
        cls, address: str | bytes | os.PathLike[str] | os.PathLike[bytes] | UnixSocketAddress
    ) -> UnixSocketAddress:
        r"""Make one from whatever a caller may name a socket with; ``"\0x"`` is abstract.

        Raises:
          TypeError: neither text, bytes, a path nor an address.
          ValueError: as :meth:`path`.
        """
        if isinstance(address, UnixSocketAddress):
            return address
        native = os.fsencode(address)
        return cls(native) if native[:1] == b"\0" else cls.path(native)

    @classmethod
    def from_uri(cls, uri: str) -> UnixSocketAddress:
        """Read ``unix:/run/x.sock``, or D-Bus's ``unix:path=...`` and ``unix:abstract=...``.

        ``%xx`` stands for a byte. Of D-Bus's further keys, ``guid`` is passed over.

        Raises:
          ValueError: another scheme or form, a list of addresses, or one that names no single
            socket (``unix:dir=``, ``unix:tmpdir=``, ``unix:runtime=``).
        """
        scheme, colon, rest = uri.partition(":")
        if scheme.lower() != "unix" or not colon or ";" in rest:
            raise ValueError(f"{uri!r} is not the address of one Unix socket; it is {_FORMS}")
        if rest.startswith("/"):
            rest = rest.removeprefix("//")
            if not rest.startswith("/") or rest.startswith("//"):
                raise ValueError(f"{uri!r} names a host; a Unix socket has none; it is {_FORMS}")
            return cls.path(_unescaped(rest, uri))
        keys: dict[str, str] = {}
        for pair in rest.split(","):
            key, equals, value = pair.partition("=")
            if not equals or key in keys:
                raise ValueError(f"{uri!r} is not the address of a Unix socket; it is {_FORMS}")
            keys[key] = value
        keys.pop("guid", None)
        if set(keys) == {"path"}:
            return cls.path(_unescaped(keys["path"], uri))
        if set(keys) == {"abstract"}:
            return cls.abstract(_unescaped(keys["abstract"], uri))
        raise ValueError(f"{uri!r} does not name one socket; it is {_FORMS}")

    def to_uri(self) -> str:
        """Return ``unix:/run/x.sock``, ``unix:path=x.sock`` or ``unix:abstract=name``.

        The last two are D-Bus's forms, for a relative path and an abstract name.

        Raises:
          ValueError: the address is unnamed.
        """
        if self.get_is_anonymous():
            raise ValueError("a socket without a name has no URI")
        # D-Bus wants "~" escaped, unlike other URIs.
        text = urllib.parse.quote_from_bytes(self.native.removeprefix(b"\0"), safe="/")
        text = text.replace("~", "%7E")
        if self.get_is_abstract():
            return f"unix:abstract={text}"
        # Two slashes in front would begin the name of a host.
        if text.startswith("/") and not text.startswith("//"):
            return f"unix:{text}"
        return f"unix:path={text}"

    def get_path(self) -> str:
        """Return the path or the abstract name, without its NUL; ``""`` when unnamed."""
        return os.fsdecode(self.native.removeprefix(b"\0"))

    def get_path_len(self) -> int:
        """Return the length in bytes of what :meth:`get_path` returns."""
        return len(self.native.removeprefix(b"\0"))

    def get_is_abstract(self) -> bool:
        """Whether this is a name in Linux's abstract namespace."""
        return self.native[:1] == b"\0"

    def get_is_anonymous(self) -> bool:
        """Whether the socket has no name, as those of a socketpair and most clients."""
        return not self.native

    def __str__(self) -> str:
        """Return the path, ``@name`` for an abstract name as ss(8) prints it, or "unnamed"."""
        if self.get_is_abstract():
            return "@" + self.get_path()
        return self.get_path() or "unnamed"


def _unescaped(text: str, uri: str) -> bytes:
    for part in text.split("%")[1:]:
        if len(part) < 2 or not set(part[:2]) <= set("0123456789abcdefABCDEF"):
            raise ValueError(f"{uri!r} has a % without two hexadecimal digits behind it")
    # Text that came in from a file name may hold bytes that are no UTF-8.
    return urllib.parse.unquote_to_bytes(os.fsencode(text))
