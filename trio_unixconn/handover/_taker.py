"""What a successor does to take over: ask for the listeners, and check each of them.

Invariant: nothing is accepted here, and no listener is returned that is not what the manifest says.

If the generation before dies in the middle, the listeners that have arrived are kept: connections
wait in their queues, and this process is the only one that has them.
"""

from __future__ import annotations

import os
import socket as stdlib_socket
from typing import TYPE_CHECKING, NoReturn

import attrs

from .. import _memfd
from .._closing import close_fds
from .._frames import FrameError, close_frames
from .._owner import DescriptorOwner
from ..errors import IOErrorEnum, TakeOverError, UnsafeBufferError
from . import _protocol
from ._channel import expect_no_fds
from ._manifest import Manifest, check_listener

if TYPE_CHECKING:
    from .._frames import Frame
    from ._channel import Channel
    from ._manifest import ListenerEntry

#: The maximum number of bytes of a state.
MAX_STATE = 1024 * 1024 * 1024


@attrs.define
class Taken(DescriptorOwner):
    """What has arrived from the generation before.

    Attributes:
      listeners: those that arrived, with their entries in the manifest, by name.
      is_complete: False if the generation before has ended in the middle.
    """

    manifest: Manifest
    state: bytes | None
    listeners: dict[str, tuple[ListenerEntry, stdlib_socket.socket]] = attrs.field(
        factory=dict["str", "tuple[ListenerEntry, stdlib_socket.socket]"]
    )
    is_complete: bool = False

    def close(self) -> None:
        """Close the listeners; the generation before still has them."""
        for _, sock in self.listeners.values():
            close_fds([sock.detach()])
        self.listeners.clear()


async def take(channel: Channel, name: str) -> Taken | None:
    """Ask for the listeners, and return them.

    Returns:
      None if the generation before has ended, or was replaced, before it offered anything.

    Raises:
      TakeOverError: it does not hand over to this process; or what it offers is not what it says,
        which it is told.
    """
    if not await channel.send(_protocol.pack_hello(name)):
        return None
    try:
        frame = await channel.receive()
        if frame is None:
            return None
        if frame.kind != _protocol.OFFER:
            refused(frame)
        taken = _unpack_offer(frame, name)
        try:
            await _take_listeners(channel, taken)
        except BaseException:
            taken.close()
            raise
    except FrameError as exc:
        await channel.send(_protocol.pack_text(_protocol.FAILED, str(exc)))
        raise TakeOverError(
            f"the generation that runs offered what it does not have: {exc}"
        ) from exc
    return taken


def _unpack_offer(frame: Frame, name: str) -> Taken:
    fds = frame.fds
    try:
        offer = _protocol.unpack_offer(frame.body)
        manifest = Manifest.decode(offer.manifest)
        if manifest.name != name:
            raise _protocol.ProtocolError(
                f"expected the service {name!r}, got {manifest.name!r:.80}"
            )
        if not offer.in_memory:
            expect_no_fds(frame)
            return Taken(manifest, offer.state)
        if fds is None:
            raise _protocol.ProtocolError("no file descriptor is free for the state")
        if len(fds) != 1:
            raise _protocol.ProtocolError(f"expected the state in memory, got {len(fds)} files")
        try:
            view = _memfd.map_readonly(fds[0], MAX_STATE)
        except (UnsafeBufferError, OSError) as exc:
            raise _protocol.ProtocolError(f"state: {exc}") from exc
        return Taken(manifest, bytes(view))
    finally:
        close_frames([frame])


async def _take_listeners(channel: Channel, taken: Taken) -> None:
    entries = taken.manifest.listeners
    done = 0
    while done < len(entries):
        frame = await channel.receive()
        if frame is None:
            return
        if frame.kind != _protocol.LISTENERS:
            refused(frame)
        fds = frame.fds
        if fds is None:
            await channel.send(_protocol.pack_id(_protocol.REFUSED, done))
            continue
        position = 0
        try:
            if _protocol.unpack_id(frame.body) != done or not fds:
                raise _protocol.ProtocolError("expected the next listeners of the manifest")
            if len(fds) > len(entries) - done:
                raise _protocol.ProtocolError("expected as many listeners as in the manifest")
            for fd, entry in zip(fds, entries[done:], strict=False):
                taken.listeners[entry.name] = entry, check_listener(fd, entry)
                position += 1
        except BaseException:
            close_fds(fds[position:])
            raise
        for fd in fds:
            os.set_inheritable(fd, False)
        await channel.send(_protocol.pack_id(_protocol.TAKEN, done))
        done += len(fds)
    taken.is_complete = True


def refused(frame: Frame) -> NoReturn:
    """Raise TakeOverError for a frame that ends a handover, or is not expected."""
    close_frames([frame])
    text = _protocol.unpack_text(frame.body)
    if frame.kind == _protocol.BUSY:
        error = TakeOverError(f"the generation that runs is busy: {text}")
        error.code = IOErrorEnum.BUSY
        raise error
    if frame.kind == _protocol.DENIED:
        error = TakeOverError(f"the generation that runs denied this process: {text}")
        error.code = IOErrorEnum.PERMISSION_DENIED
        raise error
    if frame.kind == _protocol.ABORT:
        raise TakeOverError(f"the generation that runs has ended the handover: {text}")
    raise TakeOverError(f"unexpected frame {frame.kind} of the generation that runs")
