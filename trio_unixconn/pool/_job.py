"""What a handler gets: a job, and a stream or file made of the descriptor that came with it.

The rule of this file: a descriptor that nothing can be made of is closed, and the job fails
with the reason.

Sources: fcntl(2) (F_GETFL), unix(7)
"""

from __future__ import annotations

import os
from contextlib import suppress
from io import IOBase
from typing import TYPE_CHECKING, Any

import attrs
import trio

from .. import _memfd
from .._closing import close_object
from .._connection import UnixConnection
from .._fdtypes import (
    DescriptorKind,
    is_memory,
)
from .._file_thread import call_in_file_thread, ignore
from .._memfd import Seals
from .._owner import DescriptorOwner
from ..errors import UnsafeBufferError

if TYPE_CHECKING:
    from .._credentials import Credentials

_FILES = frozenset(DescriptorKind) - {DescriptorKind.SOCKET}
_MODES = {os.O_RDONLY: "rb", os.O_WRONLY: "wb", os.O_RDWR: "r+b"}


@attrs.define(eq=False)
class Job(DescriptorOwner):
    """What a handler is told beside its stream.

    Attributes:
      id: the pool's number for it, as in :class:`JobReceipt`.
      data: the bytes that were submitted with it.
      state: what the worker's ``setup`` yielded; None without one.
      draining: set when the worker is to end, for handlers that can come to an end sooner: one
        that waits for the next request of a client need not wait any longer.
    """

    id: int
    data: bytes
    state: Any = attrs.field(repr=False)
    draining: trio.Event = attrs.field(repr=False)
    _stream: Any = attrs.field(alias="stream", repr=False)

    @property
    def peer(self) -> Credentials | tuple[Any, ...] | None:
        """Who is at the other end of the stream.

        Of a Unix socket the peer's credentials, vouched for by the kernel; of a TCP socket its
        address; None of a file, or of a job without a descriptor.

        Raises:
          OSError: the peer of a TCP socket is gone (ENOTCONN).
        """
        stream = self._stream
        if isinstance(stream, UnixConnection):
            return stream.get_peer_credentials()
        if isinstance(stream, trio.SocketStream):
            name: tuple[Any, ...] = stream.socket.getpeername()
            return name
        return None

    def map_buffer(self, max_bytes: int, *, seals: Seals = Seals.ALL) -> memoryview:
        """Map the job's file, which must be sealed memory, as ``receive_buffer`` does.

        Args:
          max_bytes: the largest size that is accepted.
          seals: the seals that the memory must have; ``Seals.SHRINK`` is one of them. Without
            ``Seals.WRITE`` the bytes can change at any time.

        Returns:
          A read-only view; the mapping ends with it, and with what was made from it. The file
          may be closed before.

        Raises:
          UnsafeBufferError: the file is not sealed memory, or larger than ``max_bytes``.
          TypeError, ValueError: ``seals`` are not Seals with ``Seals.SHRINK``.
          OSError: EMFILE.
        """
        _memfd.check_seals(seals)
        fileno = getattr(self._stream, "fileno", None)
        if fileno is None:
            raise UnsafeBufferError(
                "expected a sealed memfd, got a job without a file", DescriptorKind.SOCKET
            )
        return _memfd.map_readonly(fileno(), max_bytes, seals)


async def close_file(file: IOBase) -> None:
    """Close a file, in a thread if it may have a server; closing twice is allowed.

    A cancellation leaves the thread behind if that server does not answer.
    """
    # ValueError: the handler has detached it. OSError: about data that it has written.
    with suppress(OSError, ValueError):
        if file.closed:
            return
        if is_memory(file.fileno()):
            file.close()
            return
        await call_in_file_thread(
            file.close, discard=ignore, not_started=lambda: close_object(file.close)
        )


def close_now(stream: Any) -> None:
    """Close a connection or stream, without a checkpoint; closing twice is allowed."""
    if isinstance(stream, UnixConnection):
        stream._close_now()  # noqa: SLF001 - as aclose(), without its checkpoint
    elif stream is not None:
        stream.socket.close()
