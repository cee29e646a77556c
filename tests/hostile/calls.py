"""Every receiving call, what it may raise, and what is checked of all that it returns."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

import attrs
import trio

from trio_unixconn import (
    ConnectionBrokenError,
    Credentials,
    DescriptorKind,
    DescriptorsTruncatedError,
    EndOfStreamError,
    UnexpectedControlMessageError,
    UnexpectedDescriptorsError,
    UnixConnection,
    UnixFDList,
    UnsafeBufferError,
    WrongDescriptorKindError,
    _closing,
)

if TYPE_CHECKING:
    import random

MODES = ["rb", "r", "r+", "r+b", "wb", "w", "ab", "a"]


@attrs.define
class Driver:
    """Calls on one connection, with a random number generator and counts."""

    conn: UnixConnection
    random: random.Random
    received: int = 0

    def check(self, fds: Iterable[int]) -> None:
        """Assert that descriptors are close-on-exec, which for a closed one is an error."""
        for fd in fds:
            assert not os.get_inheritable(fd), f"{fd} is inheritable"
            self.received += 1

    # Each returns whether the stream has ended.

    async def receive_fd(self) -> bool:
        with UnixFDList([await self.conn.receive_fd()]) as fds:
            self.check(fds)
        return False

    async def receive_credentials(self) -> bool:
        got = await self.conn.receive_credentials()
        assert type(got) is Credentials
        return False

    async def receive_fds(self) -> bool:
        most = self.random.choice([1, 2, 16, 253, 1000])
        with await self.conn.receive_fds(most) as fds:
            assert 1 <= len(fds) <= most
            self.check(fds)
        return False

    async def receive_message(self) -> bool:
        size = self.random.choice([1, 2, 100, 65536])
        most = self.random.choice([0, 1, 5, 253, 253])
        asked = self.random.random() < 0.5
        with await self.conn.receive_message(size, max_fds=most, credentials=asked) as message:
            assert len(message.data) <= size
            assert len(message.fds) <= most
            self.check(message.fds)
            self.check(message.pidfds)
            return not message.data

    async def receive_some(self) -> bool:
        data = await self.conn.receive_some(self.random.choice([None, 1, 2, 100]))
        return not data

    async def receive_file(self) -> bool:
        kinds = [*DescriptorKind] if self.random.random() < 0.5 else [DescriptorKind.REGULAR_FILE]
        with await self.conn.receive_file(self.random.choice(MODES), kinds=kinds) as file:
            self.check([file.fileno()])
        return False

    async def receive_socket(self) -> bool:
        with await self.conn.receive_socket() as sock:
            self.check([sock.fileno()])
        return False

    async def receive_stream(self) -> bool:
        stream = await self.conn.receive_stream()
        try:
            assert isinstance(stream, trio.SocketStream)
            self.check([stream.socket.fileno()])
        finally:
            await stream.aclose()
        return False

    async def receive_buffer(self) -> bool:
        limit = self.random.choice([0, 100, 10000, 10 << 20])
        try:
            view = await self.conn.receive_buffer(limit)
        except OSError as exc:
            # As documented: a mapping has a descriptor of its own, for which no slot is free.
            if type(exc) is not OSError or exc.errno != errno.EMFILE:
                raise
            return False
        with view:
            assert view.readonly
            assert len(view) <= limit
            # Touching every page would end the process if one were missing.
            assert sum(view[::4096]) >= 0
        return False

    async def fds(self) -> bool:
        left = self.random.randrange(1, 100)
        async for fd in self.conn.fds(read_ahead=self.random.choice([1, 2, 64, 1000])):
            with UnixFDList([fd]) as fds:
                self.check(fds)
            left -= 1
            if not left:
                return False
        return True

    async def drain(self) -> bool:
        """Read all available bytes: not a call to test, but the way to the messages after them."""
        with await self.conn.receive_message(65536) as message:
            self.check([*message.fds, *message.pidfds])
            return not message.data


Call = Callable[[Driver], Awaitable[bool]]

ANY = frozenset({ConnectionBrokenError})
RIGHTS = ANY | {UnexpectedControlMessageError, DescriptorsTruncatedError}
ONE = RIGHTS | {EndOfStreamError}
KIND = ONE | {WrongDescriptorKindError}

# What the documentation of each says that a peer can make it raise.
CALLS: dict[Call, frozenset[type[Exception]]] = {
    Driver.receive_fd: ONE,
    Driver.receive_credentials: ONE,
    Driver.receive_fds: ONE,
    Driver.receive_message: RIGHTS,
    Driver.receive_some: ANY | {UnexpectedDescriptorsError},
    Driver.receive_file: KIND,
    Driver.receive_socket: KIND,
    Driver.receive_stream: KIND,
    Driver.receive_buffer: ONE | {UnsafeBufferError},
    Driver.fds: RIGHTS,
    Driver.drain: RIGHTS,
}

# Each call on connections of its own, and all of them on one.
MIXES: list[list[Call]] = [
    *([call] for call in CALLS if call is not Driver.drain),
    [call for call in CALLS if call is not Driver.drain],
]


def names(mix: list[Call]) -> str:
    """Say which calls these are."""
    return "all calls" if len(mix) > 1 else str(getattr(mix[0], "__name__", mix[0]))


async def one_call(driver: Driver, mix: list[Call], *, full: bool) -> bool:
    """Make one call, and check its error if it raises; return whether the stream has ended.

    Only with ``full``, which says that descriptors may run out, may any be lost.
    """
    if not full:
        # With 1,024 descriptors, those that the closing thread has still to close can be missing.
        _closing.wait_closed(30)
    # A peer's 64 KiB would otherwise be read byte by byte.
    call = Driver.drain if driver.random.random() < 0.125 else driver.random.choice(mix)
    try:
        return await call(driver)
    except tuple(CALLS[call]) as exc:
        # No subclass either, but for those that are named.
        assert type(exc) in CALLS[call], f"{call} raised {exc!r}"
        assert full or type(exc) is not DescriptorsTruncatedError, f"{call} raised {exc!r}"
        return type(exc) is EndOfStreamError
