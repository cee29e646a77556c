"""What a pool and a worker say to each other: whatever the pieces, the frames are the same."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

import attrs
import pytest
from hypothesis import given, strategies as st

from trio_unixconn.pool import _protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

numbers = st.integers(0, 2**64 - 1)
batches = st.integers(0, 2**32 - 1)
sent_jobs = st.builds(
    _protocol.SentJob, numbers, st.integers(0, 5), st.booleans(), st.binary(max_size=40)
)


@attrs.frozen
class Said:
    """A frame, and how many descriptors go with it; ``lost`` if they do not arrive."""

    kind: int
    body: bytes
    count: int
    lost: bool


said = st.builds(
    Said, st.integers(0, 255), st.binary(max_size=60), st.integers(0, 3), st.booleans()
)


def arrivals(frames: list[Said], cuts: Iterator[int]) -> Iterator[tuple[bytes, list[int] | None]]:
    """Yield what a Unix stream would give to reads of those sizes.

    Descriptors come with the first byte of their message, and no read goes beyond a message
    that had some.
    """
    data, fds = b"", list[int]()
    lost = False
    for frame in frames:
        rest = _protocol.frame(frame.kind, frame.body, carries=frame.count > 0)
        due = next(cuts)
        if frame.count:
            fds, lost = list(range(frame.count)), frame.lost
        while rest:
            taken = max(0, due - len(data))
            data, rest = data + rest[:taken], rest[taken:]
            if len(data) >= due:
                yield data, None if lost else fds
                data, fds, lost = b"", [], False
                due = next(cuts)
        if frame.count and data:
            yield data, None if lost else fds
            data, fds, lost = b"", [], False
    if data:
        yield data, fds


@given(st.lists(said, max_size=8), st.lists(st.integers(1, 50), min_size=1))
def test_any_pieces(frames: list[Said], sizes: list[int]) -> None:
    """Frames come out as they went in, each with its descriptors, however they are cut."""

    def cuts() -> Iterator[int]:
        while True:
            yield from sizes

    decoder = _protocol.Decoder()
    found = [each for data, fds in arrivals(frames, cuts()) for each in decoder.feed(data, fds)]
    assert found == [
        _protocol.Frame(
            each.kind, each.body, None if each.count and each.lost else list(range(each.count))
        )
        for each in frames
    ]


@given(batches, st.lists(sent_jobs))
def test_jobs(batch: int, sent: list[_protocol.SentJob]) -> None:
    """A batch of jobs is read as it was written."""
    (frame,) = _protocol.Decoder().feed(_protocol.jobs(batch, sent, carries=False), [])
    assert frame.kind == _protocol.JOBS
    assert _protocol.read_jobs(frame.body) == (batch, sent)


@given(batches, st.lists(numbers), numbers, st.binary(), st.floats(allow_nan=False))
def test_other_frames(batch: int, ids: list[int], number: int, rest: bytes, time: float) -> None:
    """Numbers, lists of numbers, texts and times are read as they were written."""
    data = [
        _protocol.number(_protocol.TAKEN, batch),
        _protocol.ids(_protocol.DONE, ids),
        _protocol.about(_protocol.ANSWER, number, rest),
        _protocol.seconds(_protocol.DRAIN, time),
        _protocol.frame(_protocol.BEAT),
    ]
    taken, done, answer, drain, beat = _protocol.Decoder().feed(b"".join(data), [])
    assert (taken.kind, _protocol.read_number(taken.body)) == (_protocol.TAKEN, batch)
    assert (done.kind, _protocol.read_ids(done.body)) == (_protocol.DONE, ids)
    assert (answer.kind, _protocol.read_about(answer.body)) == (_protocol.ANSWER, (number, rest))
    assert (drain.kind, _protocol.read_seconds(drain.body)) == (_protocol.DRAIN, time)
    assert beat == _protocol.Frame(_protocol.BEAT, b"", [])


def test_forever() -> None:
    """A drain without a deadline travels, too."""
    (frame,) = _protocol.Decoder().feed(_protocol.seconds(_protocol.DRAIN, math.inf), [])
    assert _protocol.read_seconds(frame.body) == math.inf


JOB = struct.Struct("=QBBI")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\0" * 3, id="half a number"),
        pytest.param(b"\0" * 4 + b"\0" * 5, id="half a job"),
        pytest.param(b"\0" * 4 + JOB.pack(1, 0, 0, 2) + b"x", id="data that is too short"),
    ],
)
def test_malformed_jobs(body: bytes) -> None:
    """What is no batch of jobs is refused."""
    with pytest.raises(_protocol.ProtocolError, match="a batch of jobs was due"):
        _protocol.read_jobs(body)


def test_malformed_bodies() -> None:
    """What is no number, no list of numbers, no text about a job, no time is refused."""
    with pytest.raises(_protocol.ProtocolError, match="the number of a batch was due"):
        _protocol.read_number(b"123")
    with pytest.raises(_protocol.ProtocolError, match="numbers of jobs were due"):
        _protocol.read_ids(b"1234567")
    with pytest.raises(_protocol.ProtocolError, match="the number of a job was due"):
        _protocol.read_about(b"1234567")
    with pytest.raises(_protocol.ProtocolError, match="a time was due"):
        _protocol.read_seconds(b"123456789")


def test_a_frame_that_is_too_long() -> None:
    """A length that nobody would send is refused before anything waits for so many bytes."""
    with pytest.raises(_protocol.ProtocolError, match="a frame of 4294967295 bytes came"):
        _protocol.Decoder().feed(struct.pack("=BBI", _protocol.JOBS, 0, 2**32 - 1), [])


def test_a_frame_without_the_descriptors_it_names() -> None:
    """Descriptors that are due and did not come, nor were lost, are refused."""
    with pytest.raises(_protocol.ProtocolError, match="without the descriptors that it names"):
        _protocol.Decoder().feed(_protocol.jobs(1, [], carries=True), [])


@given(st.binary(max_size=200))
def test_rubbish(data: bytes) -> None:
    """Whatever comes, it is frames or a ProtocolError."""
    decoder = _protocol.Decoder()
    readers = [_protocol.read_jobs, _protocol.read_number, _protocol.read_ids, _protocol.read_about]
    try:
        for frame in decoder.feed(data, []):
            for read in (*readers, _protocol.read_seconds):
                try:
                    read(frame.body)
                except _protocol.ProtocolError:
                    continue
    except _protocol.ProtocolError:
        return
