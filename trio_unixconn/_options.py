"""Options of a socket that stay on for its life.

The rule of this file: an option that was asked for is on afterwards, or an error says that this
kernel has none.

Sources: unix(7), socket(7)
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from . import _kernel
from .errors import NotSupportedError

if TYPE_CHECKING:
    import socket


def set_options(sock: socket.socket, *, credentials: bool, pidfds: bool) -> None:
    """Have every message come with its sender's credentials, with a pidfd of its sender.

    What is set on a listening socket, accepted ones inherit.

    Raises:
      NotSupportedError: the kernel has no such option.
    """
    if credentials:
        _switch_on(sock, _kernel.SO_PASSCRED, "SO_PASSCRED")
    if pidfds:
        _switch_on(sock, _kernel.SO_PASSPIDFD, "SO_PASSPIDFD (Linux 6.5)")


def _switch_on(sock: socket.socket, option: int | None, name: str) -> None:
    number = _kernel.required(option, name)
    try:
        sock.setsockopt(_kernel.SOL_SOCKET, number, 1)
    except OSError as exc:
        if exc.errno != errno.ENOPROTOOPT:
            raise
        raise NotSupportedError(f"this kernel has no {name}") from exc
