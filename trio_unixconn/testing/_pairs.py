"""Pairs of connections, and connections that cannot send.

The rule of this file: a test decides when a connection can send, by public means only; what
a pair held is closed with it, whether trio runs or not.

Sources: send(2) (``MSG_DONTWAIT``), unix(7)
"""

from __future__ import annotations

import socket as stdlib_socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from .. import _kernel
from .._connection import UnixConnection, connection_pair
from ..errors import ConnectionClosedError, EndOfStreamError

if TYPE_CHECKING:
    from collections.abc import Generator

_CHUNK: Final = 4096


def clog(conn: UnixConnection) -> int:
    """Send bytes until ``conn`` cannot send any more: the next send will wait.

    It waits for nothing itself, and needs no trio run.

    Returns:
      How many bytes that took. :func:`unclog` the other end with that number.

    Raises:
      ConnectionClosedError: this side has closed the connection.
      OSError: EPIPE: the peer is gone, or this side has sent its end of file.

    Source: send(2)
    """
    if conn.is_closed():
        raise ConnectionClosedError("this side has closed the connection")
    sent = 0
    # A second owner of the same number for a moment; it takes no descriptor.
    sock = stdlib_socket.socket(fileno=conn.socket.fileno())
    try:
        # Linux takes a byte when it takes 4096; others may have room for a few more.
        for size in (_CHUNK, 1):
            try:
                while True:
                    sent += sock.send(b"." * size, _kernel.MSG_DONTWAIT | _kernel.MSG_NOSIGNAL)
            except BlockingIOError:
                continue
    finally:
        sock.detach()
    return sent


async def unclog(conn: UnixConnection, count: int) -> None:
    """Receive the ``count`` bytes that :func:`clog` sent to ``conn`` from the other end.

    Raises:
      EndOfStreamError: the stream ended before.
    """
    while count:
        received = len(await conn.receive_some(min(count, 65536)))
        if not received:
            raise EndOfStreamError(f"the stream ended with {count} bytes due")
        count -= received


def clogged_pair() -> tuple[UnixConnection, UnixConnection]:
    """Return two connections that are connected to each other, and neither of which can send.

    The caller owns both. To let one send, receive at the other: :func:`unclog`, or
    ``receive_some`` until nothing is there.

    Raises:
      NotSupportedError, OSError: as :func:`trio_unixconn.connection_pair`.
    """
    one, two = connection_pair()
    clog(one)
    clog(two)
    return one, two


@contextmanager
def closing_pair() -> Generator[tuple[UnixConnection, UnixConnection], None, None]:
    """Lend a pair, and close what is still open of it when no task can wait for it any more."""
    pair = connection_pair()
    try:
        yield pair
    finally:
        for conn in pair:
            # trio closes its sockets only inside of a run, where it wakes up who waits.
            receiver = conn._receiver  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
            receiver.release()
            receiver.raw.close()
