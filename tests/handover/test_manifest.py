"""The manifest: it arrives as it was, and each listener must be what it says."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, strategies as st

from trio_unixconn.handover._manifest import (
    ListenerEntry,
    Manifest,
    check_listener,
    describe_socket,
)
from trio_unixconn.handover._protocol import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterator

text = st.text(max_size=20)
ports = st.integers(0, 65535)
paths = st.binary(min_size=1, max_size=20).map(lambda each: os.fsdecode(each.replace(b"\0", b"x")))
files = st.tuples(st.integers(0, 2**63), st.integers(0, 2**63))
entries = (
    st.builds(ListenerEntry, text, st.just("inet"), st.tuples(text, ports))
    | st.builds(ListenerEntry, text, st.just("inet6"), st.tuples(text, ports, ports, ports))
    | st.builds(ListenerEntry, text, st.just("unix"), text)
    | st.builds(ListenerEntry, text, st.just("unix"), paths, paths, st.none() | files)
)
manifests = st.builds(
    Manifest,
    text,
    st.integers(1, 2**40),
    st.lists(entries, max_size=5, unique_by=lambda each: each.name),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda values: st.lists(values, max_size=4) | st.dictionaries(text, values, max_size=4),
    max_leaves=10,
)
ENTRY = {"name": "web", "kind": "inet", "bound": ["127.0.0.1", 80], "path": None, "file": None}


@given(manifests)
def test_decode_returns_what_was_encoded(manifest: Manifest) -> None:
    """A manifest arrives as it was, with paths of any bytes."""
    assert Manifest.decode(manifest.encode()) == manifest


@given(json_values)
def test_decode_of_any_json_is_a_protocol_error(value: Any) -> None:
    """JSON that is not a manifest is a ProtocolError, at every level."""
    for data in (
        value,
        {"name": "x", "number": 1, "listeners": value},
        {"name": "x", "number": 1, "listeners": [value]},
        {"name": "x", "number": 1, "listeners": [{**ENTRY, "bound": value}]},
        {"name": "x", "number": 1, "listeners": [{**ENTRY, "kind": "unix", "file": value}]},
    ):
        try:
            found = Manifest.decode(json.dumps(data).encode())
        except ProtocolError:
            continue
        assert Manifest.decode(found.encode()) == found


def with_entry(**fields: Any) -> dict[str, Any]:
    return {"name": "x", "number": 1, "listeners": [{**ENTRY, **fields}]}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "with name, number and listeners"),
        ({"name": "x", "number": 0, "listeners": []}, "number of a generation"),
        ({"name": "x", "number": 1, "listeners": [1]}, "with name, kind"),
        ({"name": "x", "number": 1, "listeners": [ENTRY, ENTRY]}, "different names"),
        ({"name": "x", "number": 1, "listeners": [ENTRY] * 100_001}, "at most 100000"),
        (with_entry(kind="bluetooth"), "known kind"),
        (with_entry(kind="inet6"), "address of a listener of kind inet6"),
        (with_entry(bound="x"), "address of a listener of kind inet"),
        (with_entry(path=1), "expected a path"),
        (with_entry(path=""), "expected a path"),
        (with_entry(path="a\0b"), "expected a path"),
        (with_entry(file=[1, 2]), "device and the inode"),
        (with_entry(path="/x", file=[1]), "device and the inode"),
        (with_entry(path="/x", file=5), "device and the inode"),
    ],
)
def test_decode_rejects(value: Any, said: str) -> None:
    """A manifest with a wrong field is rejected, and the error names the field."""
    with pytest.raises(ProtocolError, match=said):
        Manifest.decode(json.dumps(value).encode())


def test_decode_rejects_what_is_not_json() -> None:
    """Bytes that are not JSON, or nested without end, are rejected."""
    for data in (b"\xff", b"[" * 10**5):
        with pytest.raises(ProtocolError, match="expected a manifest"):
            Manifest.decode(data)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def entry_of(sock: socket.socket) -> ListenerEntry:
    kind, bound = describe_socket(sock)
    return ListenerEntry("web", kind, bound)


def test_check_listener_returns_the_socket(listener: socket.socket, tmp_path: Path) -> None:
    """A TCP listener, a path and an abstract name that are as described are returned as sockets."""
    one, two = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    with one, two:
        one.bind(str(tmp_path / "s"))
        two.bind(f"\0trio_unixconn test {os.getpid()}")
        for sock in listener, one, two:
            sock.listen()
            with check_listener(os.dup(sock.fileno()), entry_of(sock)) as found:
                assert found.getsockname() == sock.getsockname()


def lies(directory: Path) -> Iterator[tuple[str, socket.socket]]:
    """Yield sockets that are not the listener of a manifest, and what the error says of each."""
    one, two = socket.socketpair()
    two.close()
    yield "got family|expected a listening", one
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    yield "expected a stream socket", udp
    bound = socket.socket(socket.AF_INET)
    bound.bind(("127.0.0.1", 0))
    yield "does not listen", bound
    yield "got the inet socket", socket.create_server(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(directory / "other"))
    unix.listen()
    yield "got the unix socket", unix
    vsock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
    yield "expected a TCP or Unix socket", vsock


def test_check_listener_rejects_lies(listener: socket.socket, tmp_path: Path) -> None:
    """A connected socket, UDP, another address or another family is rejected, and stays open."""
    entry = entry_of(listener)
    for said, sock in lies(tmp_path):
        with sock:
            with pytest.raises(ProtocolError, match=said):
                check_listener(sock.fileno(), entry)
            os.fstat(sock.fileno())


def test_check_listener_rejects_a_file(listener: socket.socket) -> None:
    """A file that is not a socket is rejected, and stays open."""
    with open(os.devnull) as file:
        with pytest.raises(ProtocolError, match="expected a socket"):
            check_listener(file.fileno(), entry_of(listener))
        os.fstat(file.fileno())


def test_entry_is_printed_in_ascii() -> None:
    """A name that another process chose cannot forge a line of a log."""
    assert str(ListenerEntry("a\nb", "unix", "x", "/p\x1b")) == r"a\x0ab (unix /p\x1b)"
