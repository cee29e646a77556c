"""How sockets are named on the command line.

Invariant: every command accepts the same names, and rejects others with exit status 2 before
anything else happens.
"""

from __future__ import annotations

from .._address import UnixSocketAddress
from .printing import fail


def address_of(text: str) -> UnixSocketAddress:
    """Read a path, ``@name`` for an abstract name, or a URI that begins with ``unix:``.

    A file whose own name begins like that is ``./@name``.
    """
    try:
        if text.startswith("@"):
            address = UnixSocketAddress.abstract(text[1:])
        elif text.lower().startswith("unix:"):
            address = UnixSocketAddress.from_uri(text)
        else:
            address = UnixSocketAddress.path(text)
        if not address.get_path_len():
            raise ValueError(f"{text!r} is an abstract name without a character")
    except ValueError as exc:
        fail(str(exc), status=2)
    return address
