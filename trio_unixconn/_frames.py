"""Frames: a kind, a length, a body, and file descriptors. A codec without I/O.

Invariant: file descriptors that arrive belong to the frame that begins in the same message. So a
frame that carries file descriptors is sent as one message of its own, before which everything
else has been sent.

A frame is a header and a body. The header is the kind (1 byte), whether file descriptors come with
the frame (1 byte), and the length of the body (4 bytes), in native byte order: both ends are on one
machine. If the kernel dropped the file descriptors of a frame, the frame reports it (``fds`` is
None), and its receiver rejects it.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from ._closing import close_fds
from ._owner import DescriptorOwner

_header: Final = struct.Struct("=BBI")

#: The maximum length of a body, in bytes.
MAX_BODY: Final = 32 * 1024 * 1024


class Frame(NamedTuple):
    """A frame.

    Attributes:
      fds: the file descriptors that arrived with it, which its receiver owns; None if the kernel
        dropped some of them.
    """

    kind: int
    body: bytes
    fds: list[int] | None


class FrameError(ValueError):
    """The bytes are not a frame, or not one that is expected here.

    Attributes:
      frames: the frames that arrived complete with the same bytes, before the error. Their file
        descriptors are closed.
    """

    frames: Sequence[Frame] = ()


def encode_frame(kind: int, body: bytes = b"", *, carries_fds: bool = False) -> bytes:
    """Return the bytes of a frame; ``carries_fds`` if file descriptors are sent with them."""
    return _header.pack(kind, carries_fds, len(body)) + body


class FrameDecoder(DescriptorOwner):
    """Makes frames of the bytes and file descriptors that arrive."""

    def __init__(self) -> None:
        # The bytes of the frame that is incomplete, their number, and the number of bytes at
        # which there is more to decode.
        self._parts: list[bytes] = []
        self._size = 0
        self._needed = 0
        # The file descriptors of each message that carried some; None if some were dropped.
        self._arrived: deque[list[int] | None] = deque()

    def feed(self, data: bytes, fds: list[int] | None) -> list[Frame]:
        """Return the frames that are complete now.

        Args:
          fds: the file descriptors of the message, which this owns afterwards; None if the kernel
            dropped some of them.

        Raises:
          FrameError: the bytes are not frames, or file descriptors arrived that no frame carries.
            All file descriptors are closed.
        """
        if fds is None or fds:
            self._arrived.append(fds)
        self._size += len(data)
        self._parts.append(data)
        if self._size < self._needed:
            return []
        found: list[Frame] = []
        try:
            self._decode(found)
        except FrameError as exc:
            close_frames(found)
            self.close()
            exc.frames = [frame._replace(fds=[]) for frame in found]
            raise
        return found

    def _decode(self, found: list[Frame]) -> None:
        parts = self._parts
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self._needed = 0
        start, end, header_size = 0, len(data), _header.size
        while end - start >= header_size:
            kind, carries_fds, length = _header.unpack_from(data, start)
            if length > MAX_BODY:
                raise FrameError(f"expected a frame of at most {MAX_BODY} bytes, got {length}")
            stop = start + header_size + length
            if stop > end:
                self._needed = stop - start
                break
            fds: list[int] | None = []
            if carries_fds:
                if not self._arrived:
                    raise FrameError(f"frame of kind {kind} arrived without its file descriptors")
                fds = self._arrived.popleft()
            found.append(Frame(kind, data[start + header_size : stop], fds))
            start = stop
        self._parts = [data[start:]] if start < end else []
        self._size = end - start
        if self._arrived and not self._size:
            raise FrameError("file descriptors arrived with a frame that carries none")

    def is_between_frames(self) -> bool:
        """Whether nothing of an incomplete frame has arrived."""
        return not self._size and not self._arrived

    def close(self) -> None:
        """Close file descriptors that arrived and belong to no complete frame."""
        while self._arrived:
            close_fds(self._arrived.popleft() or [])


def close_frames(frames: Iterable[Frame]) -> None:
    """Close the file descriptors of frames that are not handled."""
    for frame in frames:
        close_fds(frame.fds or [])
