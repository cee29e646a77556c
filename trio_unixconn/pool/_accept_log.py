"""What a worker has accepted by itself, in memory that outlives it.

A worker that accepts connections (``accept="workers"``) sends its pool no message about them: one
for each would cost a tenth of what serving it costs. It notes each of them in memory that both
share, before the handler begins, and when it has ended. The pool reads that when it needs to know:
for statistics, once a second, and when the worker has died. What is noted then was being handled.

The memory has a header, and a slot for each connection at a time. All values are native 64-bit
words, which are written at once. The worker makes the sequence number odd before it changes
anything, and even afterwards, so that a reader sees that it has read half of a change. A worker can
be killed in the middle of one, so the order of the writes matters, too. Before the number of a
connection is written, its slot is filled and is within the part that is read. The number is cleared
before a failure is counted.

A worker is not trusted: the memory is sealed against a change of its size and never mapped here, as
that of the completion log, and what it contains is the worker's claim.

Sources: memfd_create(2), fcntl(2) (file sealing), mmap(2)
"""

from __future__ import annotations

import ast
import mmap
import os
import sys
import time
from array import array
from bisect import bisect_left
from typing import Any, Final, cast

import attrs

from .._memfd import Seals
from .._owner import DescriptorOwner
from ._completion_log import create_memory_file
from ._protocol import LATENCY_BOUNDS

_SEALS: Final = Seals.SHRINK | Seals.GROW | Seals.SEAL

# The words of the header.
_SEQUENCE: Final = 0
_ACCEPTED: Final = 1
_FAILED: Final = 2
_DENIED: Final = 3
_IN_USE: Final = 4
_TOP: Final = 5
_NANOSECONDS: Final = 6
_COUNTS: Final = 7
_HEADER_WORDS: Final = _COUNTS + len(LATENCY_BOUNDS) + 1
_WORD: Final = 8
_HEADER_SIZE: Final = 256
# A slot: the number of a connection, or 0; when it was accepted; its kind; its peer's address.
_SLOT_SIZE: Final = 128
_SLOT_WORDS: Final = _SLOT_SIZE // _WORD
_FIRST_SLOT: Final = _HEADER_SIZE // _WORD
_PEER: Final = 2 * _WORD + 2
_MAX_PEER: Final = _SLOT_SIZE - _PEER
# How often a reader tries again that has read half of a change.
_ATTEMPTS: Final = 10

#: The maximum number of connections that a worker handles at a time. More slots take no memory
#: before they are used, but a process cannot have so many file descriptors.
MAX_SLOTS: Final = 2**17


@attrs.frozen
class AcceptTotals:
    """The header of a log.

    Attributes:
      accepted: the number of connections that became jobs.
      failed: the number of those whose handlers have raised.
      denied: the number of connections that a policy has denied.
      in_use: the number of slots in use.
      top: the number of slots that were ever in use.
      nanoseconds: the times of all handlers that have ended, together.
      counts: the number of those in each bucket of a latency histogram.
    """

    accepted: int
    failed: int
    denied: int
    in_use: int
    top: int
    nanoseconds: int
    counts: tuple[int, ...]


@attrs.frozen
class AcceptedConnection:
    """A slot in use.

    Attributes:
      number: the worker's number for it, from 1.
      accepted_at: when it was accepted, in nanoseconds of the monotonic clock.
      kind: its ``EndpointKind``.
      peer: the address of its peer, as accept(2) has returned it; None if that is not known.
    """

    number: int
    accepted_at: int
    kind: int
    peer: Any


class AcceptLog(DescriptorOwner):
    """The pool's side of a log: it owns the memory, and reads it.

    Args:
      size: the number of slots.

    Raises:
      OSError: EMFILE, ENOMEM.
    """

    def __init__(self, size: int) -> None:
        self.size: int = size
        self.fd: int = create_memory_file(b"", _SEALS, size=_HEADER_SIZE + size * _SLOT_SIZE)

    def totals(self) -> AcceptTotals | None:
        """Return the header; None if the worker was changing it."""
        for _ in range(_ATTEMPTS):
            words = self._words(0, _HEADER_WORDS)
            if words[_SEQUENCE] % 2 == 0 and words[_SEQUENCE] == self._words(0, 1)[_SEQUENCE]:
                return _totals(words)
        return None

    def peek(self) -> AcceptTotals:
        """Return the header as it is, even if the worker is changing it, or died while it did."""
        return _totals(self._words(0, _HEADER_WORDS))

    def _words(self, offset: int, count: int) -> array[int]:
        words = array("Q")
        words.frombytes(os.pread(self.fd, count * _WORD, offset))
        return words

    def numbers(self, top: int) -> array[int]:
        """Return the numbers of the connections in the first ``top`` slots; 0 for a free slot."""
        return self._words(_HEADER_SIZE, min(top, self.size) * _SLOT_WORDS)[::_SLOT_WORDS]

    def connection(self, slot: int) -> AcceptedConnection:
        """Return the connection in a slot that is in use."""
        data = os.pread(self.fd, _SLOT_SIZE, _HEADER_SIZE + slot * _SLOT_SIZE)
        number, accepted_at = array("Q", data[: 2 * _WORD])
        kind, length = data[_PEER - 2 : _PEER]
        return AcceptedConnection(number, accepted_at, kind, _peer_of(data[_PEER : _PEER + length]))

    def connections(self, top: int) -> list[AcceptedConnection]:
        """Return the slots in use, of the first ``top`` ones."""
        return [self.connection(slot) for slot, number in enumerate(self.numbers(top)) if number]

    def close(self) -> None:
        """Close the memory; closing twice is allowed."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _totals(words: array[int]) -> AcceptTotals:
    accepted, failed, denied, in_use, top, nanoseconds = words[_ACCEPTED:_COUNTS]
    counts = tuple(words[_COUNTS:])
    return AcceptTotals(accepted, failed, denied, in_use, top, nanoseconds, counts)


def _peer_of(text: bytes) -> Any:
    if not text:
        return ""
    try:
        peer: Any = ast.literal_eval(text.decode())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return cast("Any", peer) if isinstance(peer, (str, bytes, tuple)) else None


class AcceptLogWriter(DescriptorOwner):
    """The worker's side of a log.

    Args:
      fd: the file descriptor of a log, which is closed.

    Attributes:
      in_use: the number of slots in use.
    """

    def __init__(self, fd: int) -> None:
        # Before Python 3.13 a mapping keeps a duplicate of its own. Seals make it harmless.
        options: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        try:
            self._map = mmap.mmap(fd, 0, **options)
        finally:
            os.close(fd)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("Q")
        self._free: list[int] = []
        self._top = 0
        self._sequence = 0
        self._accepted = 0
        self._failed = 0
        self._denied = 0
        self._nanoseconds = 0
        self.in_use: int = 0

    def add(self, kind: int, peer: object) -> tuple[int, int]:
        """Note a connection whose handler is about to begin; return its slot and its number.

        There must be a slot that is not in use.
        """
        words = self._words
        if self._free:
            slot = self._free.pop()
        else:
            slot = self._top
            self._top += 1
        text = repr(peer).encode(errors="replace")[:_MAX_PEER] if peer else b""
        word = _FIRST_SLOT + slot * _SLOT_WORDS
        start = word * _WORD + _PEER
        self._accepted = number = self._accepted + 1
        self.in_use += 1
        words[_SEQUENCE] = self._sequence + 1
        words[_TOP] = self._top
        words[word + 1] = time.monotonic_ns()
        self._bytes[start - 2] = kind
        self._bytes[start - 1] = len(text)
        self._bytes[start : start + len(text)] = text
        words[word] = number
        words[_ACCEPTED] = number
        words[_IN_USE] = self.in_use
        words[_SEQUENCE] = self._sequence = self._sequence + 2
        return slot, number

    def finish(self, slot: int, *, failed: bool) -> None:
        """Note that the handler of a connection has ended."""
        words = self._words
        word = _FIRST_SLOT + slot * _SLOT_WORDS
        nanoseconds = time.monotonic_ns() - words[word + 1]
        bucket = _COUNTS + bisect_left(LATENCY_BOUNDS, nanoseconds * 1e-9)
        self._nanoseconds += nanoseconds
        self.in_use -= 1
        self._free.append(slot)
        words[_SEQUENCE] = self._sequence + 1
        words[word] = 0
        words[_IN_USE] = self.in_use
        if failed:
            self._failed += 1
            words[_FAILED] = self._failed
        words[_NANOSECONDS] = self._nanoseconds
        words[bucket] += 1
        words[_SEQUENCE] = self._sequence = self._sequence + 2

    def deny(self) -> None:
        """Note that a policy has denied a connection."""
        self._denied += 1
        self._words[_DENIED] = self._denied

    def close(self) -> None:
        """Unmap the memory; closing twice is allowed."""
        self._words.release()
        self._bytes.release()
        self._map.close()
