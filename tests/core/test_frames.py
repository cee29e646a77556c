"""FrameDecoder: whatever the pieces in which bytes arrive, the frames are the same."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import attrs
import pytest
from hypothesis import given, strategies as st

from trio_unixconn import _closing
from trio_unixconn._frames import MAX_BODY, Frame, FrameDecoder, FrameError, encode_frame

if TYPE_CHECKING:
    from collections.abc import Iterator


@attrs.frozen
class Sent:
    """A frame, and the number of its file descriptors; ``lost`` if the kernel drops them."""

    kind: int
    body: bytes
    count: int
    lost: bool


sent_frames = st.builds(
    Sent, st.integers(0, 255), st.binary(max_size=60), st.integers(0, 3), st.booleans()
)


def arrivals(frames: list[Sent], cuts: Iterator[int]) -> Iterator[tuple[bytes, list[int] | None]]:
    """Yield what a Unix stream gives to reads of those sizes.

    File descriptors arrive with the first byte of their message, and no read goes beyond a message
    that has some.
    """
    data, fds = b"", list[int]()
    lost = False
    for frame in frames:
        rest = encode_frame(frame.kind, frame.body, carries_fds=frame.count > 0)
        # A read that gets file descriptors gets the first byte of their message.
        size = max(next(cuts), len(data) + 1)
        if frame.count:
            fds, lost = list(range(-frame.count, 0)), frame.lost
        while rest:
            taken = max(0, size - len(data))
            data, rest = data + rest[:taken], rest[taken:]
            if len(data) >= size:
                yield data, None if lost else fds
                data, fds, lost = b"", [], False
                size = next(cuts)
        if frame.count and data:
            yield data, None if lost else fds
            data, fds, lost = b"", [], False
    if data:
        yield data, fds


@given(st.lists(sent_frames, max_size=8), st.lists(st.integers(1, 50), min_size=1))
def test_feed_returns_the_frames_that_were_encoded(frames: list[Sent], sizes: list[int]) -> None:
    """Frames arrive as they were sent, each with its file descriptors, however they are cut."""

    def cuts() -> Iterator[int]:
        while True:
            yield from sizes

    decoder = FrameDecoder()
    found = [each for data, fds in arrivals(frames, cuts()) for each in decoder.feed(data, fds)]
    assert found == [
        Frame(
            each.kind,
            each.body,
            None if each.count and each.lost else list(range(-each.count, 0)),
        )
        for each in frames
    ]


def test_feed_rejects_a_frame_that_is_too_long() -> None:
    """A length that no sender uses is rejected before the decoder waits for so many bytes."""
    with pytest.raises(FrameError, match=f"at most {MAX_BODY} bytes, got 4294967295"):
        FrameDecoder().feed(struct.pack("=BBI", 1, 0, 2**32 - 1), [])


def test_feed_rejects_a_frame_without_its_fds() -> None:
    """A frame that names file descriptors, of which none arrived nor was dropped, is rejected."""
    with pytest.raises(FrameError, match="arrived without its file descriptors"):
        FrameDecoder().feed(encode_frame(1, carries_fds=True), [])


def test_feed_closes_fds_that_no_frame_carries() -> None:
    """File descriptors that no frame carries are an error, and are closed with those of others."""
    first, second, third = (os.open(os.devnull, os.O_RDONLY) for _ in range(3))
    decoder = FrameDecoder()
    assert decoder.feed(encode_frame(1, b"12", carries_fds=True)[:-1], [first]) == []
    with pytest.raises(FrameError, match="with a frame that carries none"):
        decoder.feed(b"2" + encode_frame(2), [second, third])
    assert _closing.wait_closed(30)
    for fd in first, second, third:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_feed_error_has_the_frames_before_it() -> None:
    """Frames that arrived complete before an error are not lost with it."""
    fd = os.open(os.devnull, os.O_RDONLY)
    data = encode_frame(1, b"first", carries_fds=True) + encode_frame(2, b"second")
    with pytest.raises(FrameError) as caught:
        FrameDecoder().feed(data + encode_frame(3, carries_fds=True), [fd])
    assert caught.value.frames == [Frame(1, b"first", []), Frame(2, b"second", [])]
    assert _closing.wait_closed(30)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_close_closes_fds_of_incomplete_frames() -> None:
    """The file descriptors of a frame that is incomplete at the end of the stream are closed."""
    fd = os.open(os.devnull, os.O_RDONLY)
    decoder = FrameDecoder()
    assert decoder.feed(encode_frame(1, b"body", carries_fds=True)[:3], [fd]) == []
    decoder.close()
    decoder.close()
    assert _closing.wait_closed(30)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@given(st.binary(max_size=200))
def test_feed_of_any_bytes(data: bytes) -> None:
    """Any bytes are frames or a FrameError."""
    try:
        FrameDecoder().feed(data, [])
    except FrameError:
        return


def test_decoder_is_between_frames() -> None:
    """Whether nothing of an incomplete frame has arrived."""
    decoder = FrameDecoder()
    assert decoder.is_between_frames()
    data = encode_frame(1, b"body")
    decoder.feed(data[:3], [])
    assert not decoder.is_between_frames()
    decoder.feed(data[3:], [])
    assert decoder.is_between_frames()
