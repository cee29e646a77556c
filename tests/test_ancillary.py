"""Control messages: what the parser makes of anything that recvmsg could return."""

from __future__ import annotations

import os
import socket
import struct
from typing import Any

import pytest
from hypothesis import given, strategies as st

from trio_unixconn import (
    Credentials,
    DescriptorsTruncatedError,
    NotSupportedError,
    UnexpectedControlMessageError,
    UnexpectedDescriptorsError,
    UnixCredentialsMessage,
    _ancillary,
    _fds,
    _kernel,
)
from trio_unixconn._ucred import PLATFORMS

RIGHTS = (socket.SOL_SOCKET, socket.SCM_RIGHTS)
CREDENTIALS = (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
PIDFD = (socket.SOL_SOCKET, 4)
LABEL = (socket.SOL_SOCKET, 3)


def fresh(count: int) -> list[int]:
    """Open descriptors as if they had arrived."""
    return [os.dup(0) for _ in range(count)]


def ints(*numbers: int) -> bytes:
    return struct.pack(f"{len(numbers)}i", *numbers)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_round_trip() -> None:
    """What the builders write the parser reads."""
    (fd,) = fresh(1)
    parsed = _ancillary.parse(
        [_ancillary.pack_rights([fd]), _ancillary.pack_credentials(Credentials(1, 2, 3))], 0
    )
    assert parsed.fds == [fd]
    assert parsed.credentials == [Credentials(1, 2, 3)]
    assert str(parsed) == "1 descriptor and credentials"
    parsed.close()
    assert not is_open(fd)


def test_negative_slots() -> None:
    """An error number in a descriptor's place counts as truncation; the others are closed."""
    fds = fresh(2)
    with pytest.raises(DescriptorsTruncatedError) as caught:
        _ancillary.one_descriptor((b"\0", [(*RIGHTS, ints(fds[0], -24, fds[1]))], 0, None))
    assert caught.value.arrived == 2
    assert not any(map(is_open, fds))
    with pytest.raises(DescriptorsTruncatedError) as caught:
        _ancillary.one_descriptor((b"\0", [(*RIGHTS, ints(-24))], 0, None))
    assert caught.value.arrived == 0


def test_negative_pidfd() -> None:
    """A pidfd that could not be made is passed over."""
    (fd,) = fresh(1)
    messages = [(*RIGHTS, ints(fd)), (*PIDFD, ints(-24))]
    assert _ancillary.one_descriptor((b"\0", messages, 0, None)) == fd
    os.close(fd)


def test_partial_integers() -> None:
    """Bytes that are too few for a descriptor are none; whole ones before them count."""
    (fd,) = fresh(1)
    assert _ancillary.one_descriptor((b"\0", [(*RIGHTS, ints(fd) + b"\1\2")], 0, None)) == fd
    os.close(fd)
    with pytest.raises(UnexpectedControlMessageError, match="no control message"):
        _ancillary.one_descriptor((b"\0", [(*RIGHTS, b"\1\2")], 0, None))


def test_what_came_beside() -> None:
    """Credentials, a pidfd and a label, which this side asked for, do not hinder a descriptor."""
    fd, pidfd = fresh(2)
    messages = [
        (*CREDENTIALS, struct.pack("iII", 1, 2, 3)),
        (*RIGHTS, ints(fd)),
        (*PIDFD, ints(pidfd)),
        (*LABEL, b"label\0"),
    ]
    assert _ancillary.one_descriptor((b"\0", messages, 0, None)) == fd
    assert is_open(fd)
    assert not is_open(pidfd)
    os.close(fd)


@pytest.mark.parametrize(
    "message", [(0, 1, b"x"), (socket.SOL_SOCKET, 99, b""), (*CREDENTIALS, b"short")]
)
def test_unknown_messages(message: Any) -> None:
    """A control message of no known kind or form is an error that names it, not ignored."""
    for due in (_ancillary.one_descriptor, _ancillary.only_credentials):
        (fd,) = fresh(1)
        with pytest.raises(UnexpectedControlMessageError) as caught:
            due((b"\0", [(*RIGHTS, ints(fd)), message], 0, None))
        assert f"level {message[0]}, type {message[1]}" in str(caught.value)
        assert not is_open(fd)


def test_no_credentials() -> None:
    """Credentials of pid 0 mean that none were sent."""
    nobody = struct.pack("iII", 0, 65534, 65534)
    assert _ancillary.only_credentials((b"\0", [(*CREDENTIALS, nobody)], 0, None)) is None
    assert _ancillary.only_credentials((b"\0", [], 0, None)) is None


def test_credentials_twice() -> None:
    """Two credentials in one message are an error."""
    message = (*CREDENTIALS, struct.pack("iII", 1, 2, 3))
    with pytest.raises(UnexpectedControlMessageError):
        _ancillary.only_credentials((b"\0", [message, message], 0, None))


def test_long_data_is_shortened_in_the_message() -> None:
    """An error quotes the beginning of long data and has all of it."""
    (fd,) = fresh(1)
    with pytest.raises(UnexpectedDescriptorsError, match=r"\.\.\. \(100 bytes\)") as caught:
        _ancillary.only_bytes((b"x" * 100, [(*RIGHTS, ints(fd))], 0, None))
    assert caught.value.data == b"x" * 100


@given(
    messages=st.lists(
        st.one_of(
            st.tuples(st.just("rights"), st.integers(0, 5), st.binary(max_size=3)),
            st.tuples(st.just("pidfd"), st.integers(0, 2), st.binary(max_size=3)),
            st.tuples(st.just("credentials"), st.binary(max_size=14), st.just(b"")),
            st.tuples(
                st.just("any"), st.tuples(st.integers(2, 9), st.integers(0, 99)), st.binary()
            ),
        ),
        max_size=5,
    ),
    data=st.binary(max_size=40),
    truncated=st.booleans(),
    due=st.sampled_from(["one_descriptor", "only_credentials", "only_bytes"]),
)
def test_anything_in_nothing_leaks(
    messages: Any, data: bytes, *, truncated: bool, due: str
) -> None:
    """Whatever comes, all descriptors are closed but the one returned; only known errors arise."""
    arrived: list[int] = []
    ancdata: list[tuple[int, int, bytes]] = []
    for kind, what, tail in messages:
        if kind in {"rights", "pidfd"}:
            fds = fresh(what)
            arrived += fds
            ancdata.append((*(RIGHTS if kind == "rights" else PIDFD), ints(*fds) + tail))
        elif kind == "credentials":
            ancdata.append((*CREDENTIALS, what))
        else:
            ancdata.append((*what, tail))
    flags = _kernel.MSG_CTRUNC if truncated else 0
    kept: set[int] = set()
    try:
        result = getattr(_ancillary, due)((data, ancdata, flags, None))
        if due == "one_descriptor":
            kept = {result}
    except (UnexpectedControlMessageError, DescriptorsTruncatedError) as exc:
        assert exc.data == data
    finally:
        still_open = {fd for fd in arrived if is_open(fd)}
        for fd in still_open:
            os.close(fd)
    assert still_open == kept


@given(number=st.integers())
def test_fileno(number: int) -> None:
    """Every int is either a possible descriptor, returned as it is, or a ValueError."""
    if 0 <= number < 2**31:
        assert _fds.fileno(number) == number
    else:
        with pytest.raises(ValueError, match=str(number)):
            _fds.fileno(number)


def test_close_on_exec_where_the_kernel_does_not_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without MSG_CMSG_CLOEXEC, received descriptors are made close-on-exec at once."""
    monkeypatch.setattr(_ancillary, "_ARRIVE_CLOEXEC", False)
    (fd,) = fresh(1)
    os.set_inheritable(fd, True)
    assert _ancillary.one_descriptor((b"\0", [(*RIGHTS, ints(fd))], 0, None)) == fd
    assert not os.get_inheritable(fd)
    os.close(fd)


@pytest.mark.parametrize("name", ["darwin", "netbsd", "sunos", None])
def test_credentials_cannot_be_sent_everywhere(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a process cannot attach its credentials, sending them is NotSupportedError."""
    message = PLATFORMS[name].message if name else None
    monkeypatch.setattr(_ancillary, "_CREDENTIALS", message)
    with pytest.raises(NotSupportedError, match="no control message for credentials"):
        _ancillary.pack_credentials(Credentials(1, 2, 3))
    (fd,) = fresh(1)
    parsed = _ancillary.parse([(*RIGHTS, ints(fd))], 0)
    assert parsed.fds == [fd]
    parsed.close()


def test_freebsd_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """On FreeBSD credentials travel as a cmsgcred of type SCM_CREDS."""
    import attrs  # noqa: PLC0415

    message = PLATFORMS["freebsd"].message
    assert message is not None
    monkeypatch.setattr(_ancillary, "_CREDENTIALS", attrs.evolve(message, kind=3))
    level, kind, payload = _ancillary.pack_credentials(Credentials(1, 2, 3))
    assert (level, kind, len(payload)) == (socket.SOL_SOCKET, 3, 84)
    assert _ancillary.only_credentials((b"\0", [(level, kind, payload)], 0, None)) == Credentials(
        1, 2, 3
    )


def test_an_error_of_close_does_not_leave_the_rest_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """When closing one refused descriptor fails, the others are closed, and the error is ours."""
    fds = fresh(3)
    real = os.close

    def close(fd: int) -> None:
        real(fd)
        if fd == fds[0]:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "close", close)
    with pytest.raises(UnexpectedDescriptorsError):
        _ancillary.only_bytes((b"x", [(*RIGHTS, ints(*fds))], 0, None))
    assert not any(map(is_open, fds))


def test_count_descriptors() -> None:
    """The count is that of the descriptors, and 0 of what parsing would find fault with."""
    good = (*RIGHTS, ints(5, 6))
    assert _ancillary.count_descriptors((b"x", [good, (*PIDFD, ints(7))], 0, None)) == 2
    assert _ancillary.count_descriptors((b"x", [(*RIGHTS, ints(5, -24))], 0, None)) == 0
    assert _ancillary.count_descriptors((b"x", [good, (0, 1, b"")], 0, None)) == 0
    assert _ancillary.count_descriptors((b"x", [good], _kernel.MSG_CTRUNC, None)) == 0


def test_free_descriptors_where_nobody_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the number of open descriptors is unknown, none counts as free."""
    assert _kernel.free_descriptors() > 0

    def fail(_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(os, "stat", fail)
    assert _kernel.free_descriptors() == 0


IDS = st.integers(0, 2**31 - 1)


@given(numbers=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=253))
def test_rights_round_trip(numbers: list[int]) -> None:
    """Any descriptors that one message carries come out of its bytes as they went in."""
    level, kind, payload = _ancillary.pack_rights(numbers)
    assert (level, kind) == RIGHTS
    assert list(struct.unpack(f"{len(numbers)}i", payload)) == numbers
    # Parsed without closing: the numbers are nobody's here.
    assert _ancillary.parse([(level, kind, payload)], 0).fds == numbers


@given(pid=st.integers(1, 2**31 - 1), uid=IDS, gid=IDS)
def test_credentials_round_trip(pid: int, uid: int, gid: int) -> None:
    """Any credentials come out of their message as they went in."""
    message = _ancillary.pack_credentials(Credentials(pid, uid, gid))
    assert _ancillary.parse([message], 0).credentials == [Credentials(pid, uid, gid)]
    assert UnixCredentialsMessage.deserialize(*message) == UnixCredentialsMessage(
        Credentials(pid, uid, gid)
    )
