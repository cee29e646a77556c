"""The protocol of a pool: what is packed is unpacked, what is invalid is rejected."""

from __future__ import annotations

import json
import math
import os
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, strategies as st

from trio_unixconn import __version__
from trio_unixconn._frames import Frame, FrameDecoder, encode_frame
from trio_unixconn.pool import _protocol

if TYPE_CHECKING:
    from collections.abc import Callable

ids = st.integers(0, 2**64 - 1)
sent_jobs = st.builds(
    _protocol.SentJob,
    ids,
    st.integers(0, 5),
    st.booleans(),
    st.integers(0, _protocol.MAX_PASSED),
    st.binary(max_size=40),
)


@given(ids, st.lists(sent_jobs))
def test_unpack_jobs(batch: int, sent: list[_protocol.SentJob]) -> None:
    """A batch is unpacked as it was packed, with ids of 64 bits."""
    (frame,) = FrameDecoder().feed(_protocol.pack_jobs(batch, sent, carries_fds=False), [])
    assert frame.kind == _protocol.JOBS
    assert _protocol.unpack_jobs(frame.body) == (batch, sent)


@given(ids, st.lists(ids), ids, st.binary(), st.floats(allow_nan=False))
def test_unpack_of_other_frames(
    batch: int, job_ids: list[int], job_id: int, result: bytes, time: float
) -> None:
    """Ids, results and times are unpacked as they were packed."""
    data = [
        _protocol.pack_batch_id(_protocol.TAKEN, batch),
        _protocol.pack_job_ids(_protocol.DONE, job_ids),
        _protocol.pack_job_result(_protocol.ANSWER, job_id, result),
        _protocol.pack_drain(time, is_replaced=True),
        _protocol.pack_passed(job_id, _protocol.PassVerdict.RETRY),
        encode_frame(_protocol.BEAT),
    ]
    taken, done, answer, drain, passed, beat = FrameDecoder().feed(b"".join(data), [])
    assert (taken.kind, _protocol.unpack_batch_id(taken.body)) == (_protocol.TAKEN, batch)
    assert (done.kind, _protocol.unpack_job_ids(done.body)) == (_protocol.DONE, job_ids)
    assert answer.kind == _protocol.ANSWER
    assert _protocol.unpack_job_result(answer.body) == (job_id, result)
    assert (drain.kind, _protocol.unpack_drain(drain.body)) == (_protocol.DRAIN, (time, True))
    verdict = _protocol.PassVerdict.RETRY
    assert (passed.kind, _protocol.unpack_passed(passed.body)) == (
        _protocol.PASSED,
        (job_id, verdict),
    )
    assert beat == Frame(_protocol.BEAT, b"", [])


def test_unpack_drain_without_a_deadline() -> None:
    """A drain without a deadline has infinity as its time."""
    data = _protocol.pack_drain(math.inf, is_replaced=False)
    (frame,) = FrameDecoder().feed(data, [])
    assert _protocol.unpack_drain(frame.body) == (math.inf, False)


def test_pack_job_result_of_a_connection_that_is_passed_on() -> None:
    """Its file descriptor arrives with the frame."""
    reader, writer = os.pipe()
    data = _protocol.pack_job_result(_protocol.PASS, 7, b"data")
    (frame,) = FrameDecoder().feed(data, [reader])
    assert (frame.kind, frame.fds) == (_protocol.PASS, [reader])
    assert _protocol.unpack_job_result(frame.body) == (7, b"data")
    os.close(reader)
    os.close(writer)


def test_check_ready() -> None:
    """A worker of the same versions is accepted."""
    (frame,) = FrameDecoder().feed(_protocol.pack_ready(), [])
    assert frame.kind == _protocol.READY
    assert _protocol.check_ready(frame.body) is None


@pytest.mark.parametrize(
    ("body", "version"),
    [
        pytest.param(
            json.dumps({"protocol": _protocol.PROTOCOL_VERSION, "version": "9.9"}).encode(),
            "9.9",
            id="version",
        ),
        pytest.param(
            json.dumps({"protocol": 0, "version": __version__}).encode(), __version__, id="protocol"
        ),
        pytest.param(b"", "an unknown version", id="nothing"),
        pytest.param(b"[]", "an unknown version", id="list"),
        pytest.param(b"{}", "an unknown version", id="empty"),
        pytest.param(b"\xff", "an unknown version", id="no text"),
        pytest.param(b"[" * 100_000, "an unknown version", id="nested"),
    ],
)
def test_check_ready_rejects_other_versions(body: bytes, version: str) -> None:
    """A worker of another version is not used, and the reason says what to do."""
    assert _protocol.check_ready(body) == (
        f"the worker imported trio_unixconn {version}, this process runs {__version__}; restart "
        "this program to use the new version"
    )


JOB = struct.Struct("=QBBHI")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\0" * 7, id="part of an id"),
        pytest.param(b"\0" * 8 + b"\0" * 5, id="part of a job"),
        pytest.param(b"\0" * 8 + JOB.pack(1, 0, 0, 0, 2) + b"x", id="data that is too short"),
    ],
)
def test_unpack_jobs_rejects_invalid_bodies(body: bytes) -> None:
    """A body that is not a batch of jobs is a ProtocolError."""
    with pytest.raises(_protocol.ProtocolError, match="expected a batch of jobs"):
        _protocol.unpack_jobs(body)


@pytest.mark.parametrize(
    ("unpack", "body", "expected"),
    [
        (_protocol.unpack_batch_id, b"123", "the id of a batch"),
        (_protocol.unpack_job_ids, b"1234567", "the ids of jobs"),
        (_protocol.unpack_job_result, b"1234567", "the id of a job"),
        (_protocol.unpack_drain, b"1234567", "a time in seconds"),
        (_protocol.unpack_passed, b"1234567", "the id of a job and a verdict"),
        (_protocol.unpack_passed, b"12345678\x09", "the id of a job and a verdict"),
    ],
)
def test_unpack_rejects_invalid_bodies(
    unpack: Callable[[bytes], object], body: bytes, expected: str
) -> None:
    """A body of another size than its frame has is a ProtocolError."""
    with pytest.raises(_protocol.ProtocolError, match=f"expected {expected}"):
        unpack(body)
