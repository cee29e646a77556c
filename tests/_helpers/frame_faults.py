"""Have a process of a handover killed, or stopped, at a frame."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from trio_unixconn.handover._channel import Channel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from trio_unixconn._frames import Frame


def signal_at_frame(
    when: str,
    operation: str,
    kind: int,
    number: int = 1,
    *,
    tell: Callable[[], object] = lambda: None,
) -> None:
    """Have this process send itself a signal at a frame of a channel.

    Args:
      when: "before" or "after" for SIGKILL, or "stop" for SIGSTOP before.
      operation: "send" or "receive"; a frame that is received is received before the signal.
      kind: of the frame.
      number: which frame of this kind it is.
      tell: called before the signal is sent.
    """
    # What all sends go through.
    send, receive = Channel.send_patiently, Channel.receive
    left = number

    def is_the_one(frame_kind: int) -> bool:
        nonlocal left
        left -= frame_kind == kind
        return frame_kind == kind and left == 0

    def raise_signal() -> None:
        tell()
        os.kill(os.getpid(), signal.SIGSTOP if when == "stop" else signal.SIGKILL)

    async def faulty_send(self: Channel, frame: bytes, fds: Sequence[Any]) -> None:
        matches = operation == "send" and is_the_one(frame[0])
        if matches and when != "after":
            raise_signal()
        await send(self, frame, fds)
        if matches and when == "after":
            raise_signal()

    async def faulty_receive(self: Channel) -> Frame | None:
        frame = await receive(self)
        if operation == "receive" and frame is not None and is_the_one(frame.kind):
            raise_signal()
        return frame

    Channel.send_patiently = faulty_send  # type: ignore[method-assign]
    Channel.receive = faulty_receive  # type: ignore[method-assign]
