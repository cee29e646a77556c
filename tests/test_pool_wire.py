"""What a pool and a worker say to each other: whatever the pieces, the frames are the same."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

import attrs
import pytest
from hypothesis import given, strategies as st

from trio_unixconn.pool import _wire

if TYPE_CHECKING:
    from collections.abc import Iterator

numbers = st.integers(0, 2**64 - 1)
batches = st.integers(0, 2**32 - 1)
sent_jobs = st.builds(
    _wire.SentJob, numbers, st.integers(0, 5), st.booleans(), st.binary(max_size=40)
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
        rest = _wire.frame(frame.kind, frame.body, carries=frame.count > 0)
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

    decoder = _wire.Decoder()
    found = [each for data, fds in arrivals(frames, cuts()) for each in decoder.feed(data, fds)]
    assert found == [
        _wire.Frame(
            each.kind, each.body, None if each.count and each.lost else list(range(each.count))
        )
        for each in frames
    ]


@given(batches, st.lists(sent_jobs))
def test_jobs(batch: int, sent: list[_wire.SentJob]) -> None:
    """A batch of jobs is read as it was written."""
    (frame,) = _wire.Decoder().feed(_wire.jobs(batch, sent, carries=False), [])
    assert frame.kind == _wire.JOBS
    assert _wire.read_jobs(frame.body) == (batch, sent)


@given(batches, st.lists(numbers), numbers, st.binary(), st.floats(allow_nan=False))
def test_other_frames(batch: int, ids: list[int], number: int, rest: bytes, time: float) -> None:
    """Numbers, lists of numbers, texts and times are read as they were written."""
    data = [
        _wire.number(_wire.TAKEN, batch),
        _wire.ids(_wire.DONE, ids),
        _wire.about(_wire.ANSWER, number, rest),
        _wire.seconds(_wire.DRAIN, time),
        _wire.frame(_wire.BEAT),
    ]
    taken, done, answer, drain, beat = _wire.Decoder().feed(b"".join(data), [])
    assert (taken.kind, _wire.read_number(taken.body)) == (_wire.TAKEN, batch)
    assert (done.kind, _wire.read_ids(done.body)) == (_wire.DONE, ids)
    assert (answer.kind, _wire.read_about(answer.body)) == (_wire.ANSWER, (number, rest))
    assert (drain.kind, _wire.read_seconds(drain.body)) == (_wire.DRAIN, time)
    assert beat == _wire.Frame(_wire.BEAT, b"", [])


def test_forever() -> None:
    """A drain without a deadline travels, too."""
    (frame,) = _wire.Decoder().feed(_wire.seconds(_wire.DRAIN, math.inf), [])
    assert _wire.read_seconds(frame.body) == math.inf


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
    with pytest.raises(_wire.WireError, match="a batch of jobs was due"):
        _wire.read_jobs(body)


def test_malformed_bodies() -> None:
    """What is no number, no list of numbers, no text about a job, no time is refused."""
    with pytest.raises(_wire.WireError, match="the number of a batch was due"):
        _wire.read_number(b"123")
    with pytest.raises(_wire.WireError, match="numbers of jobs were due"):
        _wire.read_ids(b"1234567")
    with pytest.raises(_wire.WireError, match="the number of a job was due"):
        _wire.read_about(b"1234567")
    with pytest.raises(_wire.WireError, match="a time was due"):
        _wire.read_seconds(b"123456789")


def test_a_frame_that_is_too_long() -> None:
    """A length that nobody would send is refused before anything waits for so many bytes."""
    with pytest.raises(_wire.WireError, match="a frame of 4294967295 bytes came"):
        _wire.Decoder().feed(struct.pack("=BBI", _wire.JOBS, 0, 2**32 - 1), [])


def test_a_frame_without_the_descriptors_it_names() -> None:
    """Descriptors that are due and did not come, nor were lost, are refused."""
    with pytest.raises(_wire.WireError, match="without the descriptors that it names"):
        _wire.Decoder().feed(_wire.jobs(1, [], carries=True), [])


@given(st.binary(max_size=200))
def test_rubbish(data: bytes) -> None:
    """Whatever comes, it is frames or a WireError."""
    decoder = _wire.Decoder()
    readers = [_wire.read_jobs, _wire.read_number, _wire.read_ids, _wire.read_about]
    try:
        for frame in decoder.feed(data, []):
            for read in (*readers, _wire.read_seconds):
                try:
                    read(frame.body)
                except _wire.WireError:
                    continue
    except _wire.WireError:
        return
