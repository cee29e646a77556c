"""UnixConnection as an anyio stream, for code that is written for anyio and runs on trio.

This needs anyio, which trio_unixconn does not require.

Source: anyio.abc.UNIXSocketStream
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import anyio
import anyio.abc
import trio

from . import _kernel
from ._client import open_unix_connection
from ._connection import UnixConnection
from ._owner import DescriptorOwner
from ._sockopts import raw_socket

if TYPE_CHECKING:
    import socket as stdlib_socket
    from collections.abc import Collection, Generator
    from io import IOBase

    from ._address import AddressLike

__all__ = ["UnixConnectionStream", "connect_unix"]

_RECEIVING = "reading from"
_SENDING = "writing to"


class UnixConnectionStream(DescriptorOwner, anyio.abc.UNIXSocketStream):
    """An :class:`anyio.abc.UNIXSocketStream` over a :class:`UnixConnection`.

    It does what the stream of anyio does, and keeps the promises of the connection: a file
    descriptor that :meth:`receive` does not expect is an error instead of being dropped without a
    word, and one of several that do not fit is not lost in silence.

    Args:
      connection: a connection, which this owns. It can still be used, too, for what anyio does not
        have: credentials, files, sealed memory.

    Attributes:
      connection: that connection.

    Raises:
      TypeError: not a UnixConnection.
    """

    def __init__(self, connection: UnixConnection) -> None:
        if not isinstance(connection, UnixConnection):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"expected a UnixConnection, got {type(connection).__name__}")
        self.connection: UnixConnection = connection

    def __repr__(self) -> str:
        return f"<UnixConnectionStream of {self.connection!r}>"

    @property
    def _raw_socket(self) -> stdlib_socket.socket:
        # For anyio's typed attributes.
        return raw_socket(self.connection.socket)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Receive at least one byte.

        Raises:
          UnexpectedDescriptorsError: file descriptors arrived with the bytes, and are
            closed; the bytes are in ``.data``. Use :meth:`receive_fds`.
          anyio.EndOfStream: as of every stream of anyio.
          anyio.ClosedResourceError: as of every stream of anyio.
          anyio.BrokenResourceError: as of every stream of anyio.
          anyio.BusyResourceError: as of every stream of anyio.
        """
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be a positive integer, got {max_bytes}")
        with _errors_of_anyio(_RECEIVING):
            data = await self.connection.receive_some(max_bytes)
        if not data:
            raise anyio.EndOfStream
        return bytes(data)

    async def send(self, item: bytes) -> None:
        """Send all bytes.

        Raises:
          anyio.ClosedResourceError: as of every stream of anyio.
          anyio.BrokenResourceError: as of every stream of anyio.
          anyio.BusyResourceError: as of every stream of anyio.
        """
        with _errors_of_anyio(_SENDING):
            await self.connection.send_all(item)

    async def send_eof(self) -> None:
        """Say that no more bytes follow.

        Raises:
          anyio.ClosedResourceError: as of every stream of anyio.
          anyio.BrokenResourceError: as of every stream of anyio.
          anyio.BusyResourceError: as of every stream of anyio.
        """
        with _errors_of_anyio(_SENDING):
            await self.connection.send_eof()

    async def aclose(self) -> None:
        """Close the connection."""
        await self.connection.aclose()

    async def receive_fds(self, msglen: int, maxfds: int) -> tuple[bytes, list[int]]:
        """Receive bytes, and the file descriptors that arrived with them, which the caller owns.

        Raises:
          UnexpectedControlMessageError: more than ``maxfds`` arrived; they are closed.
          DescriptorsTruncatedError: this process had no slot for some of them.
          anyio.EndOfStream: as of every stream of anyio.
          anyio.ClosedResourceError: as of every stream of anyio.
          anyio.BrokenResourceError: as of every stream of anyio.
          anyio.BusyResourceError: as of every stream of anyio.
        """
        for name, value in (("msglen", msglen), ("maxfds", maxfds)):
            # anyio raises ValueError for other types, too.
            if not _is_int(value) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        with _errors_of_anyio(_RECEIVING):
            message = await self.connection.receive_message(
                msglen, max_fds=min(maxfds, _kernel.SCM_MAX_FD)
            )
        if not message.data:
            raise anyio.EndOfStream
        return message.data, message.fds.steal_fds()

    async def send_fds(self, message: bytes, fds: Collection[int | IOBase]) -> None:
        """Send bytes, and file descriptors with the first of them; these stay the caller's.

        Raises:
          SendError: a file descriptor is closed, or the kernel refuses it.
          anyio.ClosedResourceError: as of every stream of anyio.
          anyio.BrokenResourceError: as of every stream of anyio.
          anyio.BusyResourceError: as of every stream of anyio.
        """
        if not message:
            raise ValueError("message must not be empty")
        if not fds:
            raise ValueError("fds must not be empty")
        with _errors_of_anyio(_SENDING):
            await self.connection.send_message(message, fds=fds)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


async def connect_unix(path: AddressLike) -> UnixConnectionStream:
    """Connect to a Unix socket, as ``anyio.connect_unix`` does.

    Raises:
      OSError: as :func:`open_unix_connection`.
    """
    return UnixConnectionStream(await open_unix_connection(path))


@contextmanager
def _errors_of_anyio(action: str) -> Generator[None, None, None]:
    """Raise anyio's exceptions in place of trio's."""
    try:
        yield
    except trio.BusyResourceError as exc:
        raise anyio.BusyResourceError(action) from exc
    except trio.ClosedResourceError as exc:
        raise anyio.ClosedResourceError from exc
    except trio.BrokenResourceError as exc:
        raise anyio.BrokenResourceError from exc
