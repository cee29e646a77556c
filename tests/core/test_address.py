"""UnixSocketAddress: its forms, its URI, and how it is printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies

from trio_unixconn import UnixSocketAddress, connection_pair
from trio_unixconn._address import escaped


def test_path() -> None:
    """path() and from_any() take a path as str, bytes and Path."""
    for form in ("/run/x", b"/run/x", Path("/run/x")):
        address = UnixSocketAddress.from_any(form)
        assert address == UnixSocketAddress.path(form)
        assert address.get_path() == address.to_string() == str(address) == "/run/x"
        assert address.get_path_len() == 6
        assert not address.get_is_abstract()
        assert not address.get_is_anonymous()


def test_abstract() -> None:
    """abstract() adds the leading NUL; the name may contain further NULs, which are escaped."""
    address = UnixSocketAddress.from_any("\0x\0y")
    assert address == UnixSocketAddress.abstract("x\0y")
    assert address.native == b"\0x\0y"
    assert (address.get_path(), address.get_path_len()) == ("x\0y", 3)
    assert address.get_is_abstract()
    assert not address.get_is_anonymous()
    assert address.to_string() == r"x\x00y"
    assert str(address) == r"@x\x00y"


@pytest.mark.parametrize("empty", ["", b""])
def test_anonymous(empty: str | bytes) -> None:
    """An empty address is anonymous, however it is made."""
    address = UnixSocketAddress.from_native(empty)
    assert address == UnixSocketAddress() == UnixSocketAddress.from_any(empty)
    assert address.get_is_anonymous()
    assert address.to_string() == str(address) == "anonymous"
    assert UnixSocketAddress.from_any(address) is address


def test_path_that_is_not_utf8() -> None:
    """A path that is not valid UTF-8 survives get_path() and path()."""
    address = UnixSocketAddress.path(b"/run/\xff")
    assert UnixSocketAddress.path(address.get_path()) == address


@pytest.mark.parametrize(
    "name", [b"a\nb", b"\x1b[31m", b"\xff", "caf\u00e9".encode(), b"\x7f", b"\t"]
)
def test_to_string_is_printable_ascii(name: bytes) -> None:
    """to_string(), str() and repr() of a name that a peer chose cannot forge a line or fail."""
    for address in (UnixSocketAddress(name), UnixSocketAddress(b"\0" + name)):
        for text in (address.to_string(), str(address), repr(address)):
            assert text.isascii()
            assert text.isprintable()


async def test_repr_of_connection_escapes_remote_address() -> None:
    """repr() of a connection escapes the address of its peer."""
    one, two = connection_pair()
    async with one, two:
        conn = one.from_stdlib_socket(
            one.socket._sock,  # type: ignore[attr-defined]
            remote_address=UnixSocketAddress(b"\0a\n\x1b\xff"),
        )
        assert repr(conn).endswith(r" to @a\x0a\x1b\xff>")
        await conn.aclose()


def test_str_can_be_printed_in_the_c_locale() -> None:
    """print(address) works whatever the name and the encoding of standard output."""
    script = "import trio_unixconn as t; print(t.UnixSocketAddress(b'/\\xff\\xc3\\xa9\\n'))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        check=True,
    )
    assert done.stdout == rb"/\xff\xc3\xa9\x0a" + b"\n"


def test_escaped() -> None:
    """escaped() takes str and bytes, with surrogates of every kind."""
    assert escaped("/usr/bin/a b~\\") == "/usr/bin/a b~\\"
    assert escaped(b"\xff\n") == escaped("\udcff\n") == r"\xff\x0a"
    assert escaped("\ud800") == r"\ud800"


@pytest.mark.parametrize("bad", ["", b"", "/run/\0x"])
def test_path_rejects_empty_and_nul(bad: str | bytes) -> None:
    """path() rejects an empty path and one that contains NUL."""
    with pytest.raises(ValueError, match="must not be empty or contain NUL"):
        UnixSocketAddress.path(bad)
    for make in (UnixSocketAddress, UnixSocketAddress.from_any):
        with pytest.raises(ValueError, match="must not contain NUL"):
            make(b"/run/x\0y")


def test_from_any_rejects_other_types() -> None:
    """from_any() and the constructor name the type that they got."""
    with pytest.raises(TypeError):
        UnixSocketAddress("/run/x")  # type: ignore[arg-type]
    for bad in (3, None, bytearray(b"/x")):
        with pytest.raises(TypeError, match=f"address must be .* got {type(bad).__name__}"):
            UnixSocketAddress.from_any(bad)  # type: ignore[arg-type]


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
    """from_uri() parses every form."""
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
def test_from_uri_rejects(uri: str) -> None:
    """from_uri() rejects a URI that does not name one Unix socket."""
    with pytest.raises(ValueError, match=r"Unix socket|NUL|hexadecimal"):
        UnixSocketAddress.from_uri(uri)


def test_to_uri() -> None:
    """to_uri() returns the short form if that can be parsed, else the form of D-Bus."""
    assert UnixSocketAddress.path("/run/x.sock").to_uri() == "unix:/run/x.sock"
    assert UnixSocketAddress.path("//run/x~y").to_uri() == "unix:path=//run/x%7Ey"
    assert UnixSocketAddress.path("x.sock").to_uri() == "unix:path=x.sock"
    assert UnixSocketAddress.abstract("a b").to_uri() == "unix:abstract=a%20b"
    with pytest.raises(ValueError, match="no URI"):
        UnixSocketAddress().to_uri()


@given(native=strategies.binary(min_size=1, max_size=200))
def test_to_uri_and_from_uri(native: bytes) -> None:
    """from_uri() parses what to_uri() returns, which is printable ASCII."""
    if native[0] and b"\0" in native:
        native = b"\0" + native
    address = UnixSocketAddress(native)
    uri = address.to_uri()
    assert uri.isascii()
    assert uri.isprintable()
    assert UnixSocketAddress.from_uri(uri) == address
