"""Control messages: what unpack() and expect_*() make of anything that recvmsg can return."""

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
    _closing,
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


def unpack(*ancdata: tuple[int, int, bytes], data: bytes = b"x", flags: int = 0) -> Any:
    return _ancillary.unpack((data, list(ancdata), flags, None))


def all_closed(fds: list[int]) -> bool:
    """Whether none of these is open, once the closing thread is done."""
    assert _closing.wait_closed(30)
    return not any(map(is_open, fds))


def test_unpack_round_trip() -> None:
    """unpack() reads what the pack functions write."""
    (fd,) = fresh(1)
    received = unpack(
        _ancillary.pack_rights([fd]), _ancillary.pack_credentials(Credentials(1, 2, 3))
    )
    assert received.fds == [fd]
    assert received.credentials == Credentials(1, 2, 3)
    assert str(received) == "b'x' with 1 file descriptor (closed) and credentials"
    received.close()
    received.close()
    assert received.fds == []
    assert all_closed([fd])


def test_expect_fd_negative_slots() -> None:
    """An error number in place of a file descriptor is a truncation; the others are closed."""
    fds = fresh(2)
    with pytest.raises(DescriptorsTruncatedError) as caught:
        _ancillary.expect_fd((b"\0", [(*RIGHTS, ints(fds[0], -24, fds[1]))], 0, None))
    assert caught.value.arrived == 2
    assert all_closed(fds)
    with pytest.raises(DescriptorsTruncatedError) as caught:
        _ancillary.expect_fd((b"\0", [(*RIGHTS, ints(-24))], 0, None))
    assert caught.value.arrived == 0


def test_expect_fd_ignores_negative_pidfd() -> None:
    """A pidfd that the kernel could not make is ignored."""
    (fd,) = fresh(1)
    messages = [(*RIGHTS, ints(fd)), (*PIDFD, ints(-24))]
    assert _ancillary.expect_fd((b"\0", messages, 0, None)) == fd
    os.close(fd)


def test_expect_fd_partial_integers() -> None:
    """Bytes that are too few for a file descriptor are ignored; whole ones before them count."""
    (fd,) = fresh(1)
    assert _ancillary.expect_fd((b"\0", [(*RIGHTS, ints(fd) + b"\1\2")], 0, None)) == fd
    os.close(fd)
    with pytest.raises(UnexpectedControlMessageError, match=r"file descriptor, got b.\\x00.;"):
        _ancillary.expect_fd((b"\0", [(*RIGHTS, b"\1\2")], 0, None))


def test_only_fds_leaves_trailing_bytes_to_unpack() -> None:
    """A control message whose size is not a multiple of 4 is left to unpack()."""
    (fd,) = fresh(1)
    message = (b"\0", [(*RIGHTS, ints(fd) + b"\0")], 0, None)
    assert _ancillary.only_fds(message) is None
    assert _ancillary.expect_fds(message, 1) == [fd]
    os.close(fd)


# What the kernel adds because this side set an option; 99 stands for a kind of a later kernel.
ADDED = [
    (*PIDFD, ints(-24)),
    (*LABEL, b"label\0"),
    (socket.SOL_SOCKET, 84, ints(1)),
    *((socket.SOL_SOCKET, kind, bytes(16)) for kind in (29, 35, 37, 63, 64, 65)),
    (socket.SOL_SOCKET, 99, b""),
    (0, 1, b"x"),
    (*CREDENTIALS, b"short"),
]


@pytest.mark.parametrize("added", ADDED, ids=lambda each: f"{each[0]}-{each[1]}")
def test_expect_lets_control_messages_pass_that_this_side_asked_for(added: Any) -> None:
    """No expect function rejects a message because of what the kernel added to it."""
    fds = fresh(4)
    message = [(*RIGHTS, ints(fds[0])), added]
    assert _ancillary.expect_fd((b"\0", message, 0, None)) == fds[0]
    message = [added, (*RIGHTS, ints(fds[1], fds[2]))]
    assert _ancillary.expect_fds((b"\0", message, 0, None), 2) == fds[1:3]
    assert _ancillary.expect_message((b"\0", message, 0, None), 2).fds == fds[1:3]
    assert _ancillary.expect_bytes((b"x", [added], 0, None)) == b"x"
    assert _ancillary.expect_credentials((b"x", [added], 0, None)) is None
    _ancillary.expect_no_fds((b"x", [added], 0, None))
    for fd in fds:
        os.close(fd)


def test_unpack_logs_each_unknown_kind_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A kind that is not in the table is ignored, and logged once for the process."""
    monkeypatch.setattr(_ancillary, "_logged", set())
    for _ in range(3):
        received = unpack((socket.SOL_SOCKET, 99, b""), (0, 1, b"x"), (socket.SOL_SOCKET, 84, b""))
        assert received.unknown == ((socket.SOL_SOCKET, 99), (0, 1))
    assert [record.getMessage() for record in caplog.records] == [
        "ignoring control messages of level 1, type 99: unknown or malformed",
        "ignoring control messages of level 0, type 1: unknown or malformed",
    ]


def test_expect_fd_closes_a_pidfd() -> None:
    """A pidfd beside a file descriptor is closed if the operation does not return it."""
    fd, pidfd = fresh(2)
    credentials = (*CREDENTIALS, struct.pack("iII", 1, 2, 3))
    messages = [credentials, (*RIGHTS, ints(fd)), (*PIDFD, ints(pidfd))]
    assert _ancillary.expect_fd((b"\0", messages, 0, None)) == fd
    assert is_open(fd)
    assert not is_open(pidfd)
    os.close(fd)


def test_expect_credentials_of_pid_0() -> None:
    """Credentials of process id 0 mean that the sender attached none."""
    none = struct.pack("iII", 0, 65534, 65534)
    assert _ancillary.expect_credentials((b"\0", [(*CREDENTIALS, none)], 0, None)) is None
    assert _ancillary.expect_credentials((b"\0", [], 0, None)) is None


def test_unpack_credentials_twice() -> None:
    """The first credentials of a message count; the second ones are malformed."""
    first, second = (struct.pack("iII", pid, 2, 3) for pid in (1, 2))
    received = unpack((*CREDENTIALS, first), (*CREDENTIALS, second))
    assert received.credentials == Credentials(1, 2, 3)
    assert received.unknown == (CREDENTIALS,)


def test_unpack_credentials_without_user() -> None:
    """An unknown user id is -1, as everywhere."""
    received = unpack((*CREDENTIALS, struct.pack("iII", 1, 0xFFFFFFFF, 3)))
    assert received.credentials == Credentials(1, -1, 3)


@pytest.mark.parametrize("flags", [0, _kernel.MSG_CTRUNC])
def test_refusal_has_credentials(flags: int) -> None:
    """Each error has the credentials of the sender, if the message has them."""
    credentials = (*CREDENTIALS, struct.pack("iII", 1, 2, 3))
    for expect in (
        _ancillary.expect_fd,
        lambda message: _ancillary.expect_fds(message, 1),
        lambda message: _ancillary.expect_message(message, 1),
        _ancillary.expect_credentials,
        _ancillary.expect_bytes,
        _ancillary.expect_no_fds,
    ):
        for ancdata, expected in (([credentials], Credentials(1, 2, 3)), ([], None)):
            fds = fresh(2)
            with pytest.raises(
                (UnexpectedControlMessageError, DescriptorsTruncatedError)
            ) as caught:
                expect((b"\0", [*ancdata, (*RIGHTS, ints(*fds))], flags, None))
            error: Any = caught.value
            assert error.credentials == expected
            assert all_closed(fds)


def test_expect_bytes_shortens_long_data() -> None:
    """An error quotes the beginning of long data and has all of it."""
    (fd,) = fresh(1)
    with pytest.raises(UnexpectedDescriptorsError, match=r"\.\.\. \(100 bytes\)") as caught:
        _ancillary.expect_bytes((b"x" * 100, [(*RIGHTS, ints(fd))], 0, None))
    assert caught.value.data == b"x" * 100
    assert all_closed([fd])


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
    expect=st.sampled_from(["expect_fd", "expect_credentials", "expect_bytes"]),
)
def test_expect_leaks_nothing(messages: Any, data: bytes, *, truncated: bool, expect: str) -> None:
    """Of any message, all file descriptors are closed except the one that is returned."""
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
        result = getattr(_ancillary, expect)((data, ancdata, flags, None))
        if expect == "expect_fd":
            kept = {result}
    except (UnexpectedControlMessageError, DescriptorsTruncatedError) as exc:
        assert exc.data == data
    finally:
        assert _closing.wait_closed(30)
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
    assert _ancillary.expect_fd((b"\0", [(*RIGHTS, ints(fd))], 0, None)) == fd
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
    received = unpack((*RIGHTS, ints(fd)))
    assert received.fds == [fd]
    received.close()


def test_freebsd_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """On FreeBSD credentials travel as a cmsgcred of type SCM_CREDS."""
    import attrs

    message = PLATFORMS["freebsd"].message
    assert message is not None
    message = attrs.evolve(message, kind=3)
    monkeypatch.setattr(_ancillary, "_CREDENTIALS", message)
    monkeypatch.setattr(_ancillary, "_KNOWN", _ancillary.known_messages(message))
    level, kind, payload = _ancillary.pack_credentials(Credentials(1, 2, 3))
    assert (level, kind, len(payload)) == (socket.SOL_SOCKET, 3, 84)
    assert _ancillary.expect_credentials((b"\0", [(level, kind, payload)], 0, None)) == Credentials(
        1, 2, 3
    )


def test_expect_bytes_closes_all_if_a_close_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """When closing one refused descriptor fails, the others are closed, and the error is ours."""
    fds = fresh(3)
    real = os.close

    def close(fd: int) -> None:
        real(fd)
        if fd == fds[0]:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "close", close)
    with pytest.raises(UnexpectedDescriptorsError):
        _ancillary.expect_bytes((b"x", [(*RIGHTS, ints(*fds))], 0, None))
    assert all_closed(fds)


def test_free_descriptors_if_the_number_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
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
    # Parsed without closing: the numbers are invented.
    assert unpack((level, kind, payload)).fds == numbers


@given(pid=st.integers(1, 2**31 - 1), uid=IDS, gid=IDS)
def test_credentials_round_trip(pid: int, uid: int, gid: int) -> None:
    """Any credentials come out of their message as they went in."""
    message = _ancillary.pack_credentials(Credentials(pid, uid, gid))
    assert unpack(message).credentials == Credentials(pid, uid, gid)
    assert UnixCredentialsMessage.deserialize(*message) == UnixCredentialsMessage(
        Credentials(pid, uid, gid)
    )
