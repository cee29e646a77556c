"""A generation that was replaced and drains, as the newest generation sees it.

Invariant: TAKEN is sent when the connections are in the memory of this process, not before.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio

from .._frames import FrameError, close_frames
from . import _protocol
from ._channel import SEND_TIMEOUT

if TYPE_CHECKING:
    from .._frames import Frame
    from ._channel import Channel
    from ._passing import PassedConnections

logger: Final = logging.getLogger("trio_unixconn.handover")


class Predecessor:
    """A generation that drains, and passes its connections on to this one."""

    def __init__(
        self, channel: Channel, connections: PassedConnections, draining: list[Predecessor]
    ) -> None:
        self.channel = channel
        self._connections = connections
        self._draining = draining
        self._is_stopping = False
        self._waiting = trio.CancelScope()
        self._stopped = trio.Event()
        self._has_ended = False

    async def run(self) -> None:
        """Take what it passes on, until it has ended, or this is stopped."""
        try:
            while not (self._is_stopping and self.channel.is_between_frames()):
                frame = None
                with trio.CancelScope() as self._waiting:
                    if not self._is_stopping:
                        await self._connections.wait_for_space()
                    frame = await self.channel.receive()
                    if frame is None:
                        self._has_ended = True
                        break
                if frame is not None:
                    await self._take(frame)
        except FrameError as exc:
            logger.warning("a draining generation broke the protocol: %s", exc)
            self._has_ended = True
        finally:
            self._stopped.set()
            if self._has_ended:
                self.channel.close()
                if self in self._draining:
                    self._draining.remove(self)

    async def _take(self, frame: Frame) -> None:
        if frame.kind != _protocol.PASSED:
            close_frames([frame])
            raise _protocol.ProtocolError(f"unexpected frame {frame.kind}")
        try:
            number, connections = _protocol.unpack_passed(frame.body)
            if frame.fds is not None and len(frame.fds) != len(connections):
                raise _protocol.ProtocolError("expected a file descriptor for each connection")
        except _protocol.ProtocolError:
            close_frames([frame])
            raise
        if frame.fds is None:
            await self.channel.send(_protocol.pack_id(_protocol.REFUSED, number))
            return
        self._connections.put(frame.fds, connections)
        await self.channel.send(_protocol.pack_id(_protocol.TAKEN, number))

    async def stop(self) -> int | None:
        """Stop between two frames, or drop it if the rest of one does not arrive.

        Returns:
          The file descriptor of the channel, which the caller owns; None if it has ended.
        """
        self._is_stopping = True
        self._waiting.cancel()
        with trio.move_on_after(SEND_TIMEOUT) as scope:
            await self._stopped.wait()
        if scope.cancelled_caught:
            logger.warning(
                "a draining generation has not sent the rest of a frame for %g s; it drains alone",
                SEND_TIMEOUT,
            )
            self.channel.close()
            await self._stopped.wait()
        return None if self._has_ended else self.channel.detach()
