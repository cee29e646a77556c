"""Names of Unix sockets.

The rule of this file: a name is bytes to the kernel and stays bytes; text goes in and out
through ``os.fsencode`` and ``os.fsdecode`` and no byte is lost on the way.

Sources: unix(7), https://docs.gtk.org/gio-unix/class.SocketAddress.html
"""

from __future__ import annotations

import errno
import os

import attrs


@attrs.frozen
class UnixSocketAddress:
    """The name of a Unix socket: a path, an abstract name, or none, as ``Gio.UnixSocketAddress``.

    Attributes:
      native: the name as the kernel has it: the bytes of a path without the final NUL, a NUL
        and an abstract name, or nothing.
    """

    native: bytes = attrs.field(default=b"", validator=attrs.validators.instance_of(bytes))

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


def named(exc: OSError, address: UnixSocketAddress) -> OSError:
    """Return the error of a bind or connect with the name that it was about."""
    # Python itself refuses a name that does not fit into sockaddr_un, without a number.
    if exc.errno is None:
        return OSError(
            errno.ENAMETOOLONG, "too long for a socket's address (107 bytes on Linux)", str(address)
        )
    return OSError(exc.errno, exc.strerror, str(address))
