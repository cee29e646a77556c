"""The frames of two generations: what is packed is unpacked, and anything else is an error."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, strategies as st

from trio_unixconn import IOErrorEnum
from trio_unixconn._frames import Frame, FrameDecoder
from trio_unixconn.handover import _protocol
from trio_unixconn.handover._protocol import PassedConnection, ProtocolError, Result

if TYPE_CHECKING:
    from collections.abc import Callable

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
connections = st.builds(
    PassedConnection, st.booleans(), st.binary(max_size=50), text, st.integers(0, 2**16 - 1)
)
results = st.builds(
    Result,
    st.integers(0, 2**31),
    st.integers(0, 2**31),
    st.floats(0, 1e9),
    st.none() | text,
    text,
    st.sampled_from([each.value for each in IOErrorEnum]),
)
UNPACKERS = [
    _protocol.unpack_hello,
    _protocol.unpack_prepared,
    _protocol.unpack_result,
    _protocol.unpack_offer,
    _protocol.unpack_id,
    _protocol.unpack_passed,
]


def decode(data: bytes, fds: int = 0) -> Frame:
    """Return the frame that arrives with so many file descriptors."""
    (frame,) = FrameDecoder().feed(data, [-1] * fds)
    return frame


@given(text, st.integers(0, 2**31))
def test_unpack_hello_returns_what_was_packed(name: str, version: int) -> None:
    """A HELLO arrives with its name and its version."""
    frame = decode(_protocol.pack_hello(name, version))
    assert frame.kind == _protocol.HELLO
    assert _protocol.unpack_hello(frame.body) == (version, name)


@given(st.lists(text, max_size=5))
def test_unpack_prepared_returns_what_was_packed(names: list[str]) -> None:
    """PREPARED arrives with the names of the listeners, and of servers."""
    frame = decode(_protocol.pack_prepared(names, reversed(names)))
    assert frame.kind == _protocol.PREPARED
    assert _protocol.unpack_prepared(frame.body) == (names, names[::-1])


@given(results)
def test_unpack_result_returns_what_was_packed(result: Result) -> None:
    """A RESULT arrives as it was."""
    assert _protocol.unpack_result(decode(_protocol.pack_result(result)).body) == result


def test_unpack_result_with_an_unknown_code() -> None:
    """A code that this version does not know means that the upgrade has failed."""
    frame = decode(_protocol.pack_result(Result(error="x", code=12345)))
    assert _protocol.unpack_result(frame.body) == Result(error="x", code=IOErrorEnum.FAILED.value)


@given(
    manifest=st.binary(max_size=50),
    state=st.none() | st.binary(max_size=50),
    in_memory=st.booleans(),
)
def test_unpack_offer_returns_what_was_packed(
    manifest: bytes, state: bytes | None, *, in_memory: bool
) -> None:
    """An OFFER arrives with its manifest and its state; an empty state is not the same as none."""
    packed = _protocol.pack_offer(manifest, None if in_memory else state, in_memory=in_memory)
    frame = decode(packed, in_memory)
    assert _protocol.unpack_offer(frame.body) == (
        manifest,
        None if in_memory else state,
        in_memory,
    )


@given(st.integers(0, 2**64 - 1), st.lists(connections, min_size=1, max_size=5))
def test_unpack_passed_returns_what_was_packed(number: int, found: list[PassedConnection]) -> None:
    """PASSED arrives with its id and each connection's data."""
    frame = decode(_protocol.pack_passed(number, found), len(found))
    assert frame.kind == _protocol.PASSED
    assert _protocol.unpack_passed(frame.body) == (number, found)


@given(st.integers(0, 2**64 - 1))
def test_unpack_id_returns_what_was_packed(number: int) -> None:
    """An id arrives as it was."""
    assert _protocol.unpack_id(decode(_protocol.pack_id(_protocol.TAKEN, number)).body) == number


def test_pack_text_omits_the_middle_of_a_long_text() -> None:
    """A traceback of any length fits, with its begin and its end."""
    frame = decode(_protocol.pack_text(_protocol.FAILED, "a" * 10**6 + "\udcff end"))
    found = _protocol.unpack_text(frame.body)
    assert len(found) < _protocol.MAX_TEXT + 100
    assert found.startswith("aaaa")
    assert found.endswith("\\udcff end")
    assert "bytes omitted" in found


@pytest.mark.parametrize("unpack", UNPACKERS)
@given(body=st.binary(max_size=40))
def test_unpack_of_any_bytes_is_a_protocol_error(
    unpack: Callable[[bytes], object], body: bytes
) -> None:
    """Bytes that are not such a frame are a ProtocolError, and nothing else."""
    with suppress(ProtocolError):
        unpack(body)


@pytest.mark.parametrize(
    ("unpack", "body"),
    [
        (_protocol.unpack_hello, b"[]"),
        (_protocol.unpack_hello, b'{"version": "1", "name": "x"}'),
        (_protocol.unpack_hello, b'{"version": 1}'),
        (_protocol.unpack_hello, b"[" * 10**5),
        (_protocol.unpack_prepared, b'{"keeps": 1}'),
        (_protocol.unpack_prepared, b'{"keeps": [1], "accepts": []}'),
        (_protocol.unpack_prepared, b'{"keeps": []}'),
        (_protocol.unpack_result, b"{}"),
        (_protocol.unpack_result, b'{"pid":1,"number":1,"seconds":1.0,"error":1,"traceback":""}'),
        (_protocol.unpack_offer, b""),
        (_protocol.unpack_offer, struct.pack("=IB", 9, 0) + b"short"),
        (_protocol.unpack_offer, struct.pack("=IB", 0, 7)),
        (_protocol.unpack_offer, struct.pack("=IB", 0, 0) + b"state"),
        (_protocol.unpack_id, b"1"),
        (_protocol.unpack_passed, b""),
        (_protocol.unpack_passed, struct.pack("=Q", 1)),
        (_protocol.unpack_passed, struct.pack("=QBI", 1, 1, 5) + b"1234"),
        (_protocol.unpack_passed, struct.pack("=QB", 1, 1)),
    ],
)
def test_unpack_rejects_wrong_frames(unpack: Callable[[bytes], object], body: bytes) -> None:
    """A frame with a field of another type or size is a ProtocolError."""
    with pytest.raises(ProtocolError, match="expected"):
        unpack(body)
