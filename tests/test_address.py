"""Names of sockets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, strategies

from trio_unixconn import UnixSocketAddress


def test_path() -> None:
    """A path is itself, as text, bytes and Path."""
    for form in ("/run/x", b"/run/x", Path("/run/x")):
        address = UnixSocketAddress.from_any(form)
        assert address == UnixSocketAddress.path("/run/x")
        assert address.get_path() == str(address) == "/run/x"
        assert address.get_path_len() == 6
        assert not address.get_is_abstract()
        assert not address.get_is_anonymous()


def test_abstract() -> None:
    """A leading NUL makes an abstract name, which may contain further NULs."""
    address = UnixSocketAddress.from_any("\0x\0y")
    assert address == UnixSocketAddress.abstract("x\0y")
    assert address.native == b"\0x\0y"
    assert (address.get_path(), address.get_path_len()) == ("x\0y", 3)
    assert address.get_is_abstract()
    assert not address.get_is_anonymous()
    assert str(address) == "@x\0y"


def test_unnamed() -> None:
    """The name of a socket without one is nothing."""
    address = UnixSocketAddress.from_native("")
    assert address == UnixSocketAddress()
    assert address.get_is_anonymous()
    assert str(address) == "unnamed"
    assert UnixSocketAddress.from_any(address) is address


def test_bytes_that_are_no_text() -> None:
    """A name that is not valid UTF-8 survives the way through text."""
    address = UnixSocketAddress.path(b"/run/\xff")
    assert UnixSocketAddress.path(address.get_path()) == address


@pytest.mark.parametrize("bad", ["", b"", "/run/\0x"])
def test_no_path(bad: str | bytes) -> None:
    """An empty path and one with a NUL in it are refused."""
    with pytest.raises(ValueError, match="path must not be empty nor contain NUL"):
        UnixSocketAddress.from_any(bad)
    with pytest.raises(ValueError, match="path must not contain NUL"):
        UnixSocketAddress(b"/run/x\0y")


def test_no_name() -> None:
    """What is neither text, bytes nor a path is a TypeError."""
    with pytest.raises(TypeError):
        UnixSocketAddress("/run/x")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        UnixSocketAddress.from_any(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("uri", "native"),
    [
        ("unix:/run/x.sock", b"/run/x.sock"),
        ("UNIX:/run/x.sock", b"/run/x.sock"),
        ("unix:///run/x.sock", b"/run/x.sock"),
        ("unix:path=/run/x.sock", b"/run/x.sock"),
        ("unix:path=/run/a%20b%2c%ff,guid=0123", b"/run/a b,\xff"),
        ("unix:path=x.sock", b"x.sock"),
        ("unix:abstract=name", b"\0name"),
        ("unix:guid=0123,abstract=a%00b", b"\0a\0b"),
        ("unix:/run/a=b", b"/run/a=b"),
    ],
)
def test_from_uri(uri: str, native: bytes) -> None:
    """Every form of a URI names what it says."""
    assert UnixSocketAddress.from_uri(uri).native == native


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "/run/x.sock",
        "unix:",
        "unix",
        "tcp:host=localhost",
        "unix://host/run/x",
        "unix:////run/x",
        "unix:path=/a;unix:path=/b",
        "unix:tmpdir=/tmp",
        "unix:path=/a,abstract=b",
        "unix:path=/a,path=/b",
        "unix:path=/a,x",
        "unix:path=",
        "unix:/run/%",
        "unix:/run/%zz",
        "unix:/run/%00",
    ],
)
def test_no_uri(uri: str) -> None:
    """What does not name one Unix socket is refused, with what was given."""
    with pytest.raises(ValueError, match=r"Unix socket|one socket|NUL|hexadecimal"):
        UnixSocketAddress.from_uri(uri)


def test_to_uri() -> None:
    """A URI is the short form where that can be read back, D-Bus's otherwise."""
    assert UnixSocketAddress.path("/run/x.sock").to_uri() == "unix:/run/x.sock"
    assert UnixSocketAddress.path("//run/x~y").to_uri() == "unix:path=//run/x%7Ey"
    assert UnixSocketAddress.path("x.sock").to_uri() == "unix:path=x.sock"
    assert UnixSocketAddress.abstract("a b").to_uri() == "unix:abstract=a%20b"
    with pytest.raises(ValueError, match="no URI"):
        UnixSocketAddress().to_uri()


@given(native=strategies.binary(min_size=1, max_size=200))
def test_uri_and_back(native: bytes) -> None:
    """Whatever a socket is called, its URI names it, and is plain ASCII."""
    if native[0] and b"\0" in native:
        native = b"\0" + native
    address = UnixSocketAddress(native)
    uri = address.to_uri()
    assert uri.isascii()
    assert uri.isprintable()
    assert UnixSocketAddress.from_uri(uri) == address
