"""What the generation that runs does to hand over: one attempt, frame by frame.

Invariant: nothing here stops this generation from accepting, or closes a listener. The caller does,
after :func:`give` has returned.

Every error of an attempt is an UpgradeFailedError. The caller tells the successor (ABORT), because
the end of the channel would mean that this process has died, and that the successor goes on.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, NoReturn

import attrs
import trio

from .. import _kernel, _memfd
from .._fdlist import UnixFDList
from .._frames import close_frames, encode_frame
from ..errors import IOErrorEnum, SendError, UpgradeFailedError
from . import _protocol
from ._channel import expect_no_fds

if TYPE_CHECKING:
    from .._frames import Frame
    from ._channel import Channel
    from ._manifest import Manifest
    from ._protocol import Prepared

_NAMES: Final = {
    _protocol.HELLO: "HELLO",
    _protocol.TAKEN: "TAKEN",
    _protocol.PREPARED: "PREPARED",
    _protocol.SERVING: "SERVING",
}
_DOING: Final = {
    _protocol.HELLO: "before it asked for the listeners",
    _protocol.TAKEN: "while it took the listeners",
    _protocol.PREPARED: "before it was ready",
    _protocol.SERVING: "before it accepted from all listeners",
}


@attrs.frozen
class Giving:
    """What a generation hands over.

    Attributes:
      fds: the file descriptors of the listeners, in the order of the manifest.
      state: None if there is none.
    """

    manifest: Manifest
    fds: Sequence[int]
    state: bytes | None


async def greet(channel: Channel, name: str) -> None:
    """Wait for the HELLO of a successor that this process has started."""
    check_hello(await _expect(channel, _protocol.HELLO), name)


def check_hello(body: bytes, name: str) -> None:
    """Raise UpgradeFailedError if the successor speaks another version, or is another service."""
    try:
        hello = _protocol.unpack_hello(body)
    except _protocol.ProtocolError as exc:
        raise UpgradeFailedError(f"the successor sent what is not expected: {exc}") from exc
    if hello.version != _protocol.PROTOCOL_VERSION:
        raise UpgradeFailedError(
            f"expected a successor with version {_protocol.PROTOCOL_VERSION} of the protocol, got "
            f"version {hello.version}; stop this process and start the new one"
        )
    if hello.name != name:
        raise UpgradeFailedError(
            f"expected a successor of the service {name!r}, got {hello.name!r:.80}"
        )


@asynccontextmanager
async def within(timeout: float) -> AsyncGenerator[None, None]:
    """Raise UpgradeFailedError if the block takes longer than this, in seconds."""
    try:
        with trio.fail_after(timeout):
            yield
    except trio.TooSlowError as exc:
        error = UpgradeFailedError(f"the successor did not serve within {timeout:g} s (timeout)")
        error.code = IOErrorEnum.TIMED_OUT
        raise error from exc


async def give(channel: Channel, giving: Giving) -> Prepared:
    """Hand over to a successor that has said HELLO, up to the moment when it serves.

    Returns:
      What the successor keeps and accepts.

    Raises:
      UpgradeFailedError: nothing has changed.
      ProtocolError: nothing has changed.
    """
    await _offer(channel, giving)
    await _offer_listeners(channel, giving.fds)
    prepared = _protocol.unpack_prepared(await _expect(channel, _protocol.PREPARED))
    await _send(channel, encode_frame(_protocol.COMMIT))
    await _expect(channel, _protocol.SERVING)
    return prepared


async def wait_probation(channel: Channel, probation: float) -> None:
    """Return if the successor still serves at the end of the time; raise if it ends before."""
    with trio.move_on_after(probation):
        frame = await channel.receive()
        if frame is None:
            raise UpgradeFailedError(
                "the successor has ended while it was on probation; what it was handling is lost"
            )
        _unexpected(frame)


async def _offer(channel: Channel, giving: Giving) -> None:
    state, manifest = giving.state, giving.manifest.encode()
    if state is None or len(state) <= _protocol.MAX_INLINE_STATE:
        await _send(channel, _protocol.pack_offer(manifest, state))
        return
    try:
        fd = _memfd.create(state)
    except OSError as exc:
        raise UpgradeFailedError(f"cannot make memory for the state: {exc}") from exc
    with UnixFDList.owning([fd]) as memory:
        await _send(channel, _protocol.pack_offer(manifest, None, in_memory=True), list(memory))


async def _offer_listeners(channel: Channel, fds: Sequence[int]) -> None:
    """Send file descriptors, fewer at a time if the successor has no free slots for so many."""
    done, size = 0, _kernel.SCM_MAX_FD
    while done < len(fds):
        part = fds[done : done + size]
        frame = _protocol.pack_id(_protocol.LISTENERS, done, carries_fds=True)
        await _send(channel, frame, part)
        if await _expect_taken(channel, done):
            done += len(part)
        elif len(part) > 1:
            size = len(part) // 2
        else:
            raise UpgradeFailedError(
                "the successor has no free file descriptor for a listener; raise its "
                "RLIMIT_NOFILE (ulimit -n)"
            )


async def _send(channel: Channel, frame: bytes, fds: Sequence[int] = ()) -> None:
    try:
        sent = await channel.send(frame, fds)
    except SendError as exc:
        raise UpgradeFailedError(f"cannot send the listeners: {exc}") from exc
    if not sent:
        # It may have said why.
        while (answer := await channel.receive()) is not None:
            if answer.kind == _protocol.FAILED:
                _unexpected(answer)
            close_frames([answer])
        raise UpgradeFailedError("the successor has ended")


async def _expect(channel: Channel, kind: int) -> bytes:
    """Return the body of the next frame, which must be of this kind."""
    frame = await channel.receive()
    if frame is None:
        raise UpgradeFailedError(f"the successor has ended {_DOING[kind]}")
    if frame.kind != kind:
        _unexpected(frame)
    expect_no_fds(frame)
    return frame.body


async def _expect_taken(channel: Channel, number: int) -> bool:
    """Wait for TAKEN; return False if it is REFUSED."""
    frame = await channel.receive()
    if frame is None:
        raise UpgradeFailedError(f"the successor has ended {_DOING[_protocol.TAKEN]}")
    if frame.kind not in (_protocol.TAKEN, _protocol.REFUSED):
        _unexpected(frame)
    expect_no_fds(frame)
    if _protocol.unpack_id(frame.body) != number:
        raise _protocol.ProtocolError("expected an answer to the listeners that were sent")
    return frame.kind == _protocol.TAKEN


def _unexpected(frame: Frame) -> NoReturn:
    """Raise what a frame means that is not the expected one."""
    close_frames([frame])
    if frame.kind == _protocol.FAILED:
        raise UpgradeFailedError(
            "the successor cannot take over", _protocol.unpack_text(frame.body)
        )
    name = _NAMES.get(frame.kind, frame.kind)
    raise _protocol.ProtocolError(f"unexpected frame {name} of the successor")
