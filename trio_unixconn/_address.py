"""Addresses of Unix sockets, and how text that a peer chose is printed.

Invariant: an address is bytes, as in the kernel. Text is converted with ``os.fsencode`` and
``os.fsdecode``, which lose no byte. Only :meth:`UnixSocketAddress.to_string` and ``str`` are for
people, and they return printable ASCII.

Sources: unix(7), https://docs.gtk.org/gio-unix/class.SocketAddress.html, and for URIs the
chapter "Server Addresses" of https://dbus.freedesktop.org/doc/dbus-specification.html
"""

from __future__ import annotations

import os
import re
import urllib.parse
from typing import Final, TypeAlias

import attrs

_PathName: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_FORMS: Final = (
    "unix:/absolute/path, unix:///absolute/path, unix:path=... or unix:abstract=..., with bytes "
    "escaped as %xx"
)


# What GLib escapes: all that is not printable ASCII.
_UNPRINTABLE: Final = re.compile(rb"[^ -~]")


def escaped(text: str | bytes) -> str:
    r"""Return text that a peer chose as printable ASCII: other bytes become ``\xNN``.

    Use it wherever such text reaches a log, an error or a terminal: a line break would forge a
    line of a log, ESC would reach the terminal, and a byte that is not UTF-8 could not be printed.
    As GLib does it, a backslash stays as it is.
    """
    try:
        raw = os.fsencode(text)
    except UnicodeEncodeError:
        # A surrogate that stands for no byte.
        raw = os.fsdecode(text).encode("ascii", "backslashreplace")
    return _UNPRINTABLE.sub(lambda match: b"\\x%02x" % match[0][0], raw).decode("ascii")


def _check_nul(_: object, __: object, native: bytes) -> None:
    # The kernel would read the path up to the NUL, and so connect to another socket.
    if b"\0" in native[1:] and native[0]:
        raise ValueError(f"path of a socket must not contain NUL, got {native!r}")


@attrs.frozen
class UnixSocketAddress:
    """A path, an abstract name or no name, as ``Gio.UnixSocketAddress``.

    ``UnixSocketAddress()`` is anonymous: sockets of a socketpair and most clients have this
    address. A socket that is bound to it gets an abstract name from the kernel (Linux: autobind).

    Attributes:
      native: the address as the kernel stores it: the bytes of a path without its final NUL, a
        NUL and an abstract name, or nothing.
    """

    native: bytes = attrs.field(
        default=b"", validator=[attrs.validators.instance_of(bytes), _check_nul]
    )

    @classmethod
    def from_native(cls, name: str | bytes) -> UnixSocketAddress:
        """Return the address that ``getsockname``, ``getpeername`` or ``accept`` returned."""
        return _ANONYMOUS if not name else cls(_encoded(name, "name"))

    @classmethod
    def path(cls, path: _PathName) -> UnixSocketAddress:
        """Return the address of a path in the file system.

        Raises:
          TypeError: not a str, bytes or path object.
          ValueError: an empty path, or one that contains NUL.
        """
        native = _encoded(path, "path")
        if not native or b"\0" in native:
            raise ValueError(f"path of a socket must not be empty or contain NUL, got {path!r}")
        return cls(native)

    @classmethod
    def abstract(cls, name: str | bytes) -> UnixSocketAddress:
        """Return an address in Linux's abstract namespace; *name* is without the leading NUL."""
        return cls(b"\0" + _encoded(name, "name"))

    @classmethod
    def from_any(
        cls,
        address: AddressLike,
        *,
        argument: str = "address",
    ) -> UnixSocketAddress:
        r"""Return the address that a caller gave as text, bytes, a path object or an address.

        ``"\0x"`` is the abstract name ``x``, and ``""`` is anonymous.

        Raises:
          TypeError: any other type; the error calls it ``argument``.
          ValueError: a path that contains NUL.
        """
        if isinstance(address, UnixSocketAddress):
            return address
        if not isinstance(address, str | bytes | os.PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"{argument} must be a str, bytes, path object or UnixSocketAddress, "
                f"got {type(address).__name__}"
            )
        return cls(os.fsencode(address))

    @classmethod
    def from_uri(cls, uri: str) -> UnixSocketAddress:
        """Parse ``unix:/run/x.sock``, or D-Bus's ``unix:path=...`` and ``unix:abstract=...``.

        ``%xx`` stands for a byte. Of the other keys of D-Bus, ``guid`` is ignored.

        Raises:
          TypeError: not a str.
          ValueError: another scheme or form, a list of addresses, or an address that names no
            single socket (``unix:dir=``, ``unix:tmpdir=``, ``unix:runtime=``).
        """
        if not isinstance(uri, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"uri must be a str, got {type(uri).__name__}")
        scheme, colon, rest = uri.partition(":")
        if scheme.lower() != "unix" or not colon or ";" in rest:
            raise ValueError(f"expected the URI of one Unix socket ({_FORMS}), got {uri!r}")
        if rest.startswith("/"):
            rest = rest.removeprefix("//")
            if not rest.startswith("/") or rest.startswith("//"):
                raise ValueError(f"URI of a Unix socket cannot name a host, got {uri!r}")
            return cls.path(_unescaped(rest, uri))
        keys: dict[str, str] = {}
        for pair in rest.split(","):
            key, equals, value = pair.partition("=")
            if not equals or key in keys:
                raise ValueError(f"expected the URI of one Unix socket ({_FORMS}), got {uri!r}")
            keys[key] = value
        keys.pop("guid", None)
        if set(keys) == {"path"}:
            return cls.path(_unescaped(keys["path"], uri))
        if set(keys) == {"abstract"}:
            return cls.abstract(_unescaped(keys["abstract"], uri))
        raise ValueError(f"expected the URI of one Unix socket ({_FORMS}), got {uri!r}")

    def to_uri(self) -> str:
        """Return ``unix:/run/x.sock``, ``unix:path=x.sock`` or ``unix:abstract=name``.

        The last two are D-Bus's forms, for a relative path and an abstract name.

        Raises:
          ValueError: the address is anonymous.
        """
        if self.get_is_anonymous():
            raise ValueError("an anonymous address has no URI")
        # D-Bus requires "~" to be escaped, other URIs do not.
        text = urllib.parse.quote_from_bytes(self.native.removeprefix(b"\0"), safe="/")
        text = text.replace("~", "%7E")
        if self.get_is_abstract():
            return f"unix:abstract={text}"
        # Two leading slashes would introduce the name of a host.
        if text.startswith("/") and not text.startswith("//"):
            return f"unix:{text}"
        return f"unix:path={text}"

    def get_path(self) -> str:
        """Return the path or the abstract name, without its NUL; ``""`` if anonymous.

        It has the bytes that a peer or a caller chose, unescaped; for logs use :meth:`to_string`.
        """
        return os.fsdecode(self.native.removeprefix(b"\0"))

    def get_path_len(self) -> int:
        """Return the length of the path or the abstract name in bytes."""
        return len(self.native.removeprefix(b"\0"))

    def get_is_abstract(self) -> bool:
        """Return whether this is a name in Linux's abstract namespace."""
        return self.native[:1] == b"\0"

    def get_is_anonymous(self) -> bool:
        """Return whether this is the empty name, as for a socketpair and most clients."""
        return not self.native

    def to_string(self) -> str:
        r"""Return the path or the abstract name as text (``g_socket_connectable_to_string``).

        All but printable ASCII is escaped as ``\xNN``, so that no name can forge a line of a log or
        control a terminal. ``"anonymous"`` if there is no name.
        """
        if self.get_is_anonymous():
            return "anonymous"
        return escaped(self.native.removeprefix(b"\0"))

    def __str__(self) -> str:
        """Return :meth:`to_string`, with an ``@`` before an abstract name as ss(8) prints it."""
        return f"@{self.to_string()}" if self.get_is_abstract() else self.to_string()


# Of most clients.
_ANONYMOUS: Final = UnixSocketAddress()

# What a function that takes an address takes; see UnixSocketAddress.from_any().
AddressLike: TypeAlias = _PathName | UnixSocketAddress


def check_address(address: UnixSocketAddress, argument: str) -> None:
    """Raise TypeError unless this is an address; the error calls it ``argument``."""
    if not isinstance(address, UnixSocketAddress):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"{argument} must be a UnixSocketAddress or None, got {type(address).__name__}"
        )


def _encoded(name: _PathName, argument: str) -> bytes:
    try:
        return os.fsencode(name)
    except TypeError:
        raise TypeError(
            f"{argument} must be a str, bytes or path object, got {type(name).__name__}"
        ) from None


def _unescaped(text: str, uri: str) -> bytes:
    for part in text.split("%")[1:]:
        if len(part) < 2 or not set(part[:2]) <= set("0123456789abcdefABCDEF"):
            raise ValueError(f"expected two hexadecimal digits after each % of a URI, got {uri!r}")
    # Text from the name of a file may contain bytes that are not UTF-8, as surrogates.
    return urllib.parse.unquote_to_bytes(os.fsencode(text))
