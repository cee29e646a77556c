"""Pairs of connections, and connections that cannot send.

Invariant: everything that a pair holds is closed with it, inside or outside of a trio run.

Sources: send(2) (``MSG_DONTWAIT``), unix(7)
"""

from __future__ import annotations

import socket as stdlib_socket
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from .. import _kernel
from .._connection import UnixConnection, close_outside_run, connection_pair
from ..errors import ConnectionClosedError, EndOfStreamError

_CHUNK: Final = 4096


def clog(conn: UnixConnection) -> int:
    """Send bytes until ``conn`` cannot send any more: the next send will wait.

    This does not wait, and needs no trio run.

    Returns:
      How many bytes were sent. Pass that number to :func:`unclog` for the other end.

    Raises:
      ConnectionClosedError: this connection is closed.
      OSError: EPIPE: the peer has closed its end, or this side has called ``send_eof``.

    Source: send(2)
    """
    if conn.is_closed():
        raise ConnectionClosedError("this connection is closed")
    sent = 0
    # A second object for the same number, not a duplicate: no descriptor may be free.
    sock = stdlib_socket.socket(fileno=conn.socket.fileno())
    try:
        # Linux accepts a byte when it accepts 4096; other systems may accept a few more.
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
      EndOfStreamError: the stream ended before that.
    """
    while count:
        received = len(await conn.receive_some(min(count, 65536)))
        if not received:
            raise EndOfStreamError(f"end of stream while waiting for {count} more bytes")
        count -= received


def clogged_pair() -> tuple[UnixConnection, UnixConnection]:
    """Return two connections that are connected to each other, and neither of which can send.

    The caller owns both. To let one send, receive at the other: with :func:`unclog`, or with
    ``receive_some`` until nothing is left.

    Raises:
      NotSupportedError: as :func:`trio_unixconn.connection_pair`.
      OSError: as :func:`trio_unixconn.connection_pair`.
    """
    one, two = connection_pair()
    clog(one)
    clog(two)
    return one, two


@contextmanager
def closing_pair() -> Generator[tuple[UnixConnection, UnixConnection], None, None]:
    """Return a pair in a context manager that closes it, outside of a trio run."""
    pair = connection_pair()
    try:
        yield pair
    finally:
        for conn in pair:
            close_outside_run(conn)
