"""Names of sockets."""

from __future__ import annotations

from pathlib import Path

import pytest

from trio_unixconn import UnixSocketAddress


def test_path() -> None:
    """A path is itself, as text, bytes and Path."""
    for given in ("/run/x", b"/run/x", Path("/run/x")):
        address = UnixSocketAddress.from_any(given)
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


def test_no_name() -> None:
    """What is neither text, bytes nor a path is a TypeError."""
    with pytest.raises(TypeError):
        UnixSocketAddress("/run/x")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        UnixSocketAddress.from_any(3)  # type: ignore[arg-type]
