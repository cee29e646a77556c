"""A connection between two generations, frame by frame.

Invariant: one task receives. The file descriptors of a frame that is not returned are closed.
"""

from __future__ import annotations

import os
import socket as stdlib_socket
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from .._connection import UnixConnection, close_now
from .._frames import Frame, FrameDecoder, close_frames
from .._owner import DescriptorOwner
from ..errors import DescriptorsTruncatedError, UnixConnectionError
from ._protocol import ProtocolError

if TYPE_CHECKING:
    from .._fds import FileDescriptor

# The size of a read.
_CHUNK_SIZE: Final = 1024 * 1024
#: How long a process may not read until it is taken for one that has ended, in seconds.
SEND_TIMEOUT: Final = 30.0


class Channel(DescriptorOwner):
    """The connection to another generation.

    Args:
      conn: the channel owns it.
      pidfd: of the process at the other end, which the channel owns; None if there is none.
    """

    def __init__(self, conn: UnixConnection, pidfd: int | None = None) -> None:
        self._conn = conn
        self._decoder = FrameDecoder()
        self._frames: deque[Frame] = deque()
        self._sending = trio.Lock()
        self.pidfd: int | None = pidfd

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        """Make a channel of a file descriptor, which it owns.

        Raises:
          ValueError: not a connected Unix stream socket; it is still the caller's.
        """
        return cls(UnixConnection.from_fd(fd))

    async def receive(self) -> Frame | None:
        """Return the next frame, or None if the other end is closed, or this one.

        If this is cancelled, nothing is lost.

        Raises:
          ProtocolError: what arrived is not a frame.
        """
        while not self._frames:
            fds: list[int] | None
            try:
                message = await self._conn.receive_message(_CHUNK_SIZE)
                data, fds = message.data, message.fds.steal_fds()
            except DescriptorsTruncatedError as exc:
                # EMFILE: no number was free for them. Those that arrived are closed.
                data, fds = exc.data, None
            except UnixConnectionError:
                return None
            if not data:
                return None
            self._frames.extend(self._decoder.feed(data, fds))
        return self._frames.popleft()

    async def send(self, frame: bytes, fds: Sequence[FileDescriptor] = ()) -> bool:
        """Send a frame, as a whole even if this is cancelled before or meanwhile.

        What ends a handover must arrive, above all if this generation is being cancelled: the end
        of the connection alone would mean that its process has died.

        Returns:
          False if the other end, or this one, is closed, or does not read for SEND_TIMEOUT seconds.

        Raises:
          SendError: the kernel rejects the file descriptors.
        """
        with trio.move_on_after(SEND_TIMEOUT, shield=True):
            try:
                await self.send_patiently(frame, fds)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return False
            return True
        return False

    async def send_patiently(self, frame: bytes, fds: Sequence[FileDescriptor]) -> None:
        """Send a frame, however long the other end does not read.

        If this is cancelled, a part of the frame may have been sent: close the channel then.

        Raises:
          SendError: the kernel rejects the file descriptors.
          BrokenResourceError: the other end is closed.
          ClosedResourceError: this one is.
        """
        async with self._sending:
            await self._conn.send_message(frame, fds=fds)

    async def watch_process(self) -> None:
        """Wait until the process at the other end has exited, and end the stream then.

        Its child processes may have inherited its end, so that closing it does not end the stream.
        """
        if self.pidfd is not None:
            with suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_readable(self.pidfd)
                with suppress(OSError):
                    self._conn.socket.shutdown(stdlib_socket.SHUT_RD)

    def forget_process(self) -> None:
        """End :meth:`watch_process`: another process may own the other end from now on."""
        pidfd, self.pidfd = self.pidfd, None
        if pidfd is not None:
            trio.lowlevel.notify_closing(pidfd)
            os.close(pidfd)

    def is_between_frames(self) -> bool:
        """Whether no frame has arrived in part, or was not yet returned."""
        return not self._frames and self._decoder.is_between_frames()

    def detach(self) -> int:
        """Return the file descriptor of the connection, which the caller owns.

        Call it between frames, so that the next owner misses nothing.
        """
        fd = self._conn.detach()
        self.close()
        return fd

    def close(self) -> None:
        """Close the connection, and what has arrived; closing twice is allowed."""
        close_now(self._conn)
        self._decoder.close()
        close_frames(self._frames)
        self._frames.clear()
        self.forget_process()


def expect_no_fds(frame: Frame) -> None:
    """Raise ProtocolError if a frame has file descriptors, which are closed."""
    if frame.fds != []:
        close_frames([frame])
        raise ProtocolError(f"unexpected file descriptors with a frame of kind {frame.kind}")
