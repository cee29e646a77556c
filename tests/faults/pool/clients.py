"""The load: clients, each with a token of its own, and its outcome.

Invariant: a client tries once. Anything but its own token and then the end of the stream is
recorded as what it was.

A token is an address of the loopback network, 127.0.0.0/8. A client over TCP connects from that
address, and one over a Unix socket from an abstract name that ends in it, so that the
server that accepts it knows its token.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
from typing import TYPE_CHECKING

import trio

from .target import TOKEN_BYTES, first_token

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ANSWERED = "answered"
UNANSWERED = "unanswered"
#: No server was there to connect to; nothing was begun.
NOT_CONNECTED = "not connected"
# What a client waits for its answer, before it counts as lost.
PATIENCE = 60
_FULL_PAUSE = 0.005
_LENGTH = 64
_NOBODY = {errno.ECONNREFUSED, errno.ENOENT}

_first = int.from_bytes(bytes([127, 1, 0, 1]), "big")
#: Of this process: none is used twice.
tokens = itertools.count(_first)


def faulty_tokens(fault: int) -> Iterator[int]:
    """Return tokens that cause a fault."""
    return itertools.count(first_token(fault))


def _address(token: int) -> str:
    return ".".join(map(str, token.to_bytes(4, "big")))


async def _connect(sock: socket.socket, address: str | tuple[str, int]) -> None:
    while True:
        error = sock.connect_ex(address)
        if error == errno.EAGAIN:
            # The queue of a Unix listener is full.
            await trio.sleep(_FULL_PAUSE)
            continue
        if error == errno.EINPROGRESS:
            await trio.lowlevel.wait_writable(sock)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        return


async def _receive_all(sock: socket.socket) -> bytes:
    got = b""
    while True:
        await trio.lowlevel.wait_readable(sock)
        with_it = sock.recv(_LENGTH)
        if not with_it:
            return got
        got += with_it


async def outcome(token: int, port: int, path: str) -> str:
    """Be one client, over TCP if the token is odd; return its outcome."""
    is_tcp = token % 2
    connected = False
    with (
        socket.socket(socket.AF_INET if is_tcp else socket.AF_UNIX) as sock,
        trio.move_on_after(PATIENCE),
    ):
        sock.setblocking(False)
        try:
            sock.bind((_address(token), 0) if is_tcp else f"\0pool-faults-{os.getpid()}-{token}")
            await _connect(sock, ("127.0.0.1", port) if is_tcp else path)
            connected = True
            sent = token.to_bytes(TOKEN_BYTES, "big")
            sock.send(sent)
            got = await _receive_all(sock)
        except OSError as exc:
            if not connected and exc.errno in _NOBODY:
                return NOT_CONNECTED
            return errno.errorcode.get(exc.errno or 0, repr(exc))
        return ANSWERED if got == sent else f"{len(got)} bytes, then the end"
    return UNANSWERED


class Load:
    """Clients that come one after the other, so many at a time.

    Attributes:
      outcomes: the outcome of each client, by its token.
    """

    def __init__(
        self, port: int, path: str, *, at_a_time: int = 100, tokens: Iterator[int] = tokens
    ) -> None:
        self.outcomes: dict[int, str] = {}
        self._port = port
        self._path = path
        self._at_a_time = at_a_time
        self._tokens = tokens
        self._left = 0
        self._changed = trio.lowlevel.ParkingLot()

    async def run(self, count: int = 1 << 22) -> None:
        """Send so many clients, or those that come before :meth:`stop`; wait for the last."""
        self._left = count
        async with trio.open_nursery() as nursery:
            for _ in range(self._at_a_time):
                nursery.start_soon(self._clients)

    async def _clients(self) -> None:
        while self._left > 0:
            self._left -= 1
            token = next(self._tokens)
            self.outcomes[token] = await outcome(token, self._port, self._path)
            self._changed.unpark_all()

    def stop(self) -> None:
        """Send no more."""
        self._left = 0

    async def reached(self, count: int) -> None:
        """Wait until so many clients have come to their end."""
        await self.until(lambda: len(self.outcomes) >= count)

    async def more(self, count: int) -> None:
        """Wait until so many more have."""
        await self.reached(len(self.outcomes) + count)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait, while clients come and go."""
        while not holds():
            await self._changed.park()

    def failures(self) -> dict[int, str]:
        """Return the clients without an answer, and why."""
        return {each: was for each, was in self.outcomes.items() if was != ANSWERED}
