"""What UnixConnection.fds() read ahead: messages that the socket does not have any more.

What is wanted: a burst of file descriptors costs one scheduling point, not one for each, so
messages that have arrived are read before they are asked for. And nothing is lost that would not
have been lost otherwise, in particular when the socket is handed to another process.

What was considered: to peek at each message first, and to read only those that have one file
descriptor and nothing else. That takes half as long again for each message (3.5 us where 2.4 us
are enough), and does not solve it: the file descriptors that were read ahead would still be
missing at the next owner of the socket, and credentials beside a file descriptor cannot be told
from those that the kernel adds. So messages are read as they are. They serve the next receives,
whichever these are, and until then the socket cannot be handed over: ReadAheadError.

The rules::

      queue of the kernel              ReadAhead                   the caller
      fd, fd, "xyz", fd  --- 1, 2 ---> fd, fd, "x"  ------ 3 ----> the next receive
                                           |
                                           +--- 4: no hand-over,  5: closed

1. One recvmsg(2) of one byte for each message, and of at most ``read_ahead`` messages. 253 file
   descriptors stay free, as many as one message can have, so that reading early loses none.
2. It stops after the first message that is not a lone file descriptor: a byte without one, several
   of them, or an error. That one is held, too, because it was read. SO_PASSCRED is on meanwhile, so
   that credentials which the peer sent are received, and SO_PASSPIDFD if this connection was ever
   asked for pidfds.
3. Every receive takes from here first, in the order of the stream, as if the message were still in
   the queue of the kernel.
4. While anything is held, detach(), sending the socket and submitting it to a pool raise
   ReadAheadError. The guard that does this is found by the number of the socket, so that it stops
   even code that has only the socket.
5. Closing or dropping the connection closes the file descriptors that are held, as the kernel does
   with those in its queue.

``receive_fds`` needs none of this. It peeks, and takes only what it returns.
"""

from __future__ import annotations

import socket
from collections import deque
from typing import TYPE_CHECKING, TypeAlias

from . import _ancillary
from ._guards import guards
from .errors import ReadAheadError

if TYPE_CHECKING:
    from ._ancillary import RawMessage

# A message of one byte, with its file descriptor if that is all it has (otherwise -1); or an
# error that the kernel reports only once.
Entry: TypeAlias = "tuple[int, RawMessage] | OSError"


class ReadAhead(deque[Entry]):
    """A queue of messages, in the order in which they were received.

    It is a deque because fds() takes from it in its fast path.

    Args:
      raw: the socket that they were received from.
    """

    __slots__ = ("_number", "_raw")

    def __init__(self, raw: socket.socket) -> None:
        super().__init__()
        self._raw = raw
        self._number = -1

    def guard(self) -> None:
        """Refuse to hand over the socket while messages are held."""
        if self._number == -1:
            self._number = self._raw.fileno()
            guards[self._number] = self.check_handover

    def unguard(self) -> None:
        """Stop refusing: no message is held any more, or the socket is going to be closed."""
        if self._number != -1:
            if guards.get(self._number) == self.check_handover:
                del guards[self._number]
            self._number = -1

    def take(self) -> RawMessage:
        """Return the first message.

        Raises:
          OSError: the kernel reported it in place of a message.
        """
        first = self.popleft()
        if not self:
            self.unguard()
        if isinstance(first, OSError):
            raise first
        return first[1]

    def take_fds(self, max_fds: int) -> list[int]:
        """Take the file descriptors of the first message, if it has 1 to ``max_fds``."""
        first = self[0] if self else None
        if isinstance(first, tuple):
            received = _ancillary.unpack(first[1])
            if 1 <= len(received.fds) <= max_fds and not received.truncated:
                self.popleft()
                if not self:
                    self.unguard()
                received.close_pidfds()
                return received.fds
        return []

    def has_bytes(self) -> bool:
        """Whether messages, or an error, are held that the socket does not have any more."""
        return bool(self)

    def check_handover(self) -> None:
        """Raise if the socket cannot be handed over.

        Raises:
          ReadAheadError: messages are held.
        """
        # A copy: another thread may be asking while the trio thread takes messages.
        entries = list(self)
        if not entries or self._raw.fileno() == -1:
            return
        messages = [entry for entry in entries if not isinstance(entry, OSError)]
        error = len(messages) < len(entries)
        descriptors = sum(len(_ancillary.unpack(message).fds) for _, message in messages)
        raise ReadAheadError(
            f"cannot hand over a connection that holds {len(messages)} messages with {descriptors} "
            f"file descriptors{' and an error' if error else ''}, which were read ahead; receive "
            "them first, or iterate with fds(read_ahead=1)",
            len(messages),
            descriptors,
        )

    def drop(self) -> int:
        """Close all file descriptors that are held; return how many.

        The socket is closed afterwards, or handed over.
        """
        self.unguard()
        count = 0
        while self:
            first = self.popleft()
            if not isinstance(first, OSError):
                received = _ancillary.unpack(first[1])
                count += len(received.fds)
                received.close()
        return count
