"""The frames that two generations of a server exchange, as bytes. No I/O.

====================  ==================================================================
from the successor
====================  ==================================================================
HELLO                 it asks for the listeners; with the version of the protocol, and the
                      name of the service
TAKEN, REFUSED        it has the file descriptors of the frame with this id; or they found no
                      free slot, and fewer are to be sent at a time
PREPARED              it could accept now; with the names of the listeners that it keeps,
                      and of the servers to which connections can be passed on
FAILED                it cannot take over; with the traceback
SERVING               a task of it accepts from each listener
MOVED                 the rendezvous path leads to it
FINISH                too many generations drain: end now
====================  ==================================================================

====================  ==================================================================
from the one before
====================  ==================================================================
BUSY, DENIED          another handover is in progress; or the policy does not admit it
OFFER                 the manifest and the state
LISTENERS             file descriptors of listeners, in the order of the manifest
COMMIT                accept now
ABORT                 the handover is over, and nothing has changed; with the reason
RELEASED              it has stopped accepting for good; with connections to the
                      generations that still drain, the oldest first
PASSED                connections, each with its data
====================  ==================================================================

Another client of the rendezvous path sends REQUEST and gets RESULT.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, cast

from .._frames import FrameError, encode_frame
from ..errors import IOErrorEnum

#: Changes whenever a frame changes.
PROTOCOL_VERSION: Final = 2

# From a successor, or from a client of the rendezvous path.
HELLO: Final = 1
REQUEST: Final = 2
TAKEN: Final = 3
REFUSED: Final = 4
PREPARED: Final = 5
FAILED: Final = 6
SERVING: Final = 7
MOVED: Final = 8
FINISH: Final = 9
# From the generation before.
BUSY: Final = 16
DENIED: Final = 17
OFFER: Final = 18
LISTENERS: Final = 19
COMMIT: Final = 20
ABORT: Final = 21
RELEASED: Final = 22
PASSED: Final = 23
RESULT: Final = 24

#: The maximum number of bytes that travel with a connection.
MAX_DATA: Final = 16 * 1024 * 1024
#: State of more bytes travels as sealed memory.
MAX_INLINE_STATE: Final = 64 * 1024
#: The maximum number of bytes of a traceback or a reason.
MAX_TEXT: Final = 64 * 1024

_id: Final = struct.Struct("=Q")
_offer: Final = struct.Struct("=IB")
_passed: Final = struct.Struct("=BHII")

# What the state of an OFFER is.
_NO_STATE: Final = 0
_INLINE_STATE: Final = 1
_STATE_IN_MEMORY: Final = 2


class ProtocolError(FrameError):
    """A generation sent something that does not belong to the protocol at that moment."""


class Hello(NamedTuple):
    """What a successor says of itself."""

    version: int
    name: str


class Offer(NamedTuple):
    """A manifest, and the state.

    Attributes:
      manifest: of :mod:`._manifest`, encoded.
      state: None if there is none, or if it is in memory.
      in_memory: whether the state is in the sealed memory that arrived with the frame.
    """

    manifest: bytes
    state: bytes | None
    in_memory: bool


class Prepared(NamedTuple):
    """What a successor does that could accept now.

    Attributes:
      keeps: the names of the listeners that it has inherited.
      accepts: the names of the servers to which connections can be passed on.
    """

    keeps: list[str]
    accepts: list[str]


class PassedConnection(NamedTuple):
    """A connection on its way to the successor.

    Attributes:
      accepts_descriptors: whether its peer may send file descriptors.
      server: to which it is passed on; "" for the program itself.
      passed: how many times it was passed on, as the server counts.
    """

    accepts_descriptors: bool
    data: bytes
    server: str = ""
    passed: int = 0


class Result(NamedTuple):
    """How an upgrade that was requested has ended.

    Attributes:
      error: None if it succeeded.
      traceback: of the successor; "" if there is none.
      code: of the error, a value of IOErrorEnum.
    """

    pid: int = 0
    number: int = 0
    seconds: float = 0.0
    error: str | None = None
    traceback: str = ""
    code: int = IOErrorEnum.FAILED.value


def pack_hello(name: str, version: int = PROTOCOL_VERSION) -> bytes:
    """Return a HELLO frame."""
    return _pack_json(HELLO, {"version": version, "name": name})


def unpack_hello(body: bytes) -> Hello:
    """Return the version and the name of a HELLO frame."""
    fields = _unpack_json(body, "a version and a name")
    version, name = fields.get("version"), fields.get("name")
    # Other versions may have other fields, but they have these.
    if type(version) is not int or not isinstance(name, str):
        raise ProtocolError("expected a version and a name")
    return Hello(version, name)


def pack_prepared(keeps: Iterable[str], accepts: Iterable[str] = ()) -> bytes:
    """Return a PREPARED frame."""
    return _pack_json(PREPARED, {"keeps": list(keeps), "accepts": list(accepts)})


def unpack_prepared(body: bytes) -> Prepared:
    """Return what a successor keeps and accepts."""
    fields = _unpack_json(body, "names of listeners")
    return Prepared(_names(fields.get("keeps")), _names(fields.get("accepts")))


def _names(names: object) -> list[str]:
    if not isinstance(names, list):
        raise ProtocolError("expected names of listeners")
    found = cast("list[object]", names)
    if not all(isinstance(each, str) for each in found):
        raise ProtocolError("expected names of listeners")
    return cast("list[str]", found)


def pack_result(result: Result) -> bytes:
    """Return a RESULT frame."""
    return _pack_json(RESULT, result._asdict())


def unpack_result(body: bytes) -> Result:
    """Return the result of a request."""
    fields = _unpack_json(body, "a result")
    types = {"pid": int, "number": int, "seconds": float, "error": str, "traceback": str}
    values: dict[str, Any] = {}
    for name, kind in types.items():
        value = fields.get(name)
        if not (isinstance(value, kind) or (value is None and name == "error")):
            raise ProtocolError(f"expected a result, got {name}={value!r:.40}")
        values[name] = value
    code: Any = fields.get("code")
    try:
        code = IOErrorEnum(code)
    except ValueError:
        # Another version may not send it, or have more of them.
        code = IOErrorEnum.FAILED
    return Result(**values, code=code.value)


def pack_text(kind: int, text: str) -> bytes:
    """Return a FAILED, ABORT, BUSY or DENIED frame; of a long text, the begin and the end."""
    data = text.encode(errors="backslashreplace")
    if len(data) > MAX_TEXT:
        half = MAX_TEXT // 2
        omitted = len(data) - 2 * half
        data = b"%b\n... %d bytes omitted ...\n%b" % (data[:half], omitted, data[-half:])
    return encode_frame(kind, data)


def unpack_text(body: bytes) -> str:
    """Return a reason or a traceback."""
    return body.decode(errors="backslashreplace")


def pack_offer(manifest: bytes, state: bytes | None, *, in_memory: bool = False) -> bytes:
    """Return an OFFER frame.

    Args:
      in_memory: whether the state is in sealed memory, which is sent with the frame.
    """
    kind = _STATE_IN_MEMORY if in_memory else _NO_STATE if state is None else _INLINE_STATE
    body = _offer.pack(len(manifest), kind) + manifest + (state or b"")
    return encode_frame(OFFER, body, carries_fds=in_memory)


def unpack_offer(body: bytes) -> Offer:
    """Return the manifest and the state of an OFFER frame."""
    try:
        size, kind = _offer.unpack_from(body)
    except struct.error as exc:
        raise ProtocolError(f"expected a manifest: {exc}") from exc
    end = _offer.size + size
    rest = body[end:]
    if end > len(body) or kind > _STATE_IN_MEMORY or (rest and kind != _INLINE_STATE):
        raise ProtocolError("expected a manifest and a state")
    state = rest if kind == _INLINE_STATE else None
    return Offer(body[_offer.size : end], state, kind == _STATE_IN_MEMORY)


def pack_id(kind: int, number: int, *, carries_fds: bool = False) -> bytes:
    """Return a TAKEN, REFUSED or LISTENERS frame."""
    return encode_frame(kind, _id.pack(number), carries_fds=carries_fds)


def unpack_id(body: bytes) -> int:
    """Return the id of a frame with file descriptors."""
    try:
        return int(_id.unpack(body)[0])
    except struct.error as exc:
        raise ProtocolError(f"expected an id: {exc}") from exc


def pack_passed(number: int, connections: Sequence[PassedConnection]) -> bytes:
    """Return a PASSED frame; the file descriptors are sent with it, in this order."""
    parts = [_id.pack(number)]
    for each in connections:
        name = each.server.encode(errors="surrogateescape")
        parts.append(_passed.pack(each.accepts_descriptors, each.passed, len(name), len(each.data)))
        parts += name, each.data
    return encode_frame(PASSED, b"".join(parts), carries_fds=True)


def unpack_passed(body: bytes) -> tuple[int, list[PassedConnection]]:
    """Return the id of a PASSED frame, and its connections."""
    try:
        (number,) = _id.unpack_from(body)
        start, end, found = _id.size, len(body), list[PassedConnection]()
        while start < end:
            accepts, passed, length, size = _passed.unpack_from(body, start)
            start += _passed.size + length
            name = body[start - length : start].decode(errors="surrogateescape")
            start += size
            data = body[start - size : start]
            found.append(PassedConnection(bool(accepts), data, name, passed))
    except struct.error as exc:
        raise ProtocolError(f"expected connections: {exc}") from exc
    if start != end or not found:
        raise ProtocolError("expected connections, got too few bytes")
    return int(number), found


def _pack_json(kind: int, fields: dict[str, Any]) -> bytes:
    return encode_frame(kind, json.dumps(fields).encode())


def _unpack_json(body: bytes, expected: str) -> dict[str, object]:
    try:
        fields: object = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"expected {expected}: {exc}") from exc
    if not isinstance(fields, dict):
        raise ProtocolError(f"expected {expected}, got {type(fields).__name__}")
    return cast("dict[str, object]", fields)
