"""Credentials: values, Gio's accessors, and the layouts of every platform."""

from __future__ import annotations

import enum
import os
import socket
import struct
import sys

import attrs
import pytest

from trio_unixconn import Credentials, NotSupportedError, _credentials, _kernel
from trio_unixconn._credentials import peer_credentials
from trio_unixconn._ucred import LAYOUTS, PLATFORMS, platform_named

GROUPS = struct.pack("=h2x16I", 2, 30, 40, *[0] * 14)


def test_credentials_default() -> None:
    """Credentials() is the calling process with its effective ids."""
    assert Credentials() == Credentials(os.getpid(), os.geteuid(), os.getegid())


def test_credentials_are_frozen() -> None:
    """Credentials cannot be changed, and equal ones are one key."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Credentials().pid = 1  # type: ignore[misc]
    assert len({Credentials(1, 2, 3), Credentials(1, 2, 3)}) == 1


def test_credentials_gio_accessors() -> None:
    """The accessors return what Gio's return."""
    credentials = Credentials(10, 20, 30)
    assert credentials.get_unix_pid() == 10
    assert credentials.get_unix_user() == 20
    assert credentials.is_same_user(Credentials(11, 20, 31))
    assert not credentials.is_same_user(Credentials(10, 21, 30))
    assert credentials.to_string() == "GCredentials:linux-ucred:pid=10,uid=20,gid=30"


def test_credentials_unknown_ids() -> None:
    """-1 is unknown: not in the text, an error of the accessor, and never the same user."""
    unknown = Credentials(-1, -1, 5)
    assert unknown.to_string() == "GCredentials:linux-ucred:gid=5"
    with pytest.raises(NotSupportedError, match="process"):
        unknown.get_unix_pid()
    with pytest.raises(NotSupportedError, match="user"):
        unknown.get_unix_user()
    assert not unknown.is_same_user(unknown)


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ((True, 0, 0), TypeError),
        ((1, "0", 0), TypeError),
        ((1, 0, 0.0), TypeError),
        ((-2, 0, 0), ValueError),
        ((2**31, 0, 0), ValueError),
        ((1, 2**32 - 1, 0), ValueError),
        ((1, 0, -2), ValueError),
    ],
)
def test_credentials_reject_ids_out_of_range(
    ids: tuple[int, int, int], error: type[Exception]
) -> None:
    """The constructor rejects a value that is not an id."""
    with pytest.raises(error):
        Credentials(*ids)


def test_credentials_accept_subclasses_of_int() -> None:
    """An id may be of a class of ints."""

    class Number(enum.IntEnum):
        ONE = 1

    assert Credentials(Number.ONE, 0, 0) == Credentials(1, 0, 0)


def test_is_same_user_rejects_other_types() -> None:
    """is_same_user of anything but Credentials is a TypeError."""
    with pytest.raises(TypeError, match="other must be a Credentials, got int"):
        Credentials().is_same_user(1)  # type: ignore[arg-type]


NATIVE = {
    "linux-ucred": struct.pack("=iII", 10, 20, 30),
    "freebsd-cmsgcred": struct.pack("=iIII", 10, 21, 20, 30) + GROUPS,
    "freebsd-xucred": struct.pack("=II", 0, 20) + GROUPS + struct.pack("=4xi4x", 10),
    "freebsd-sockcred2": struct.pack("=iiIIIIi2I", 0, 10, 21, 20, 31, 30, 2, 30, 40),
    "openbsd-sockpeercred": struct.pack("=IIi", 20, 30, 10),
    "netbsd-unpcbid": struct.pack("=iII", 10, 20, 30),
    "netbsd-sockcred": struct.pack("=iIIIIi1I", 10, 21, 20, 31, 30, 1, 30),
    "solaris-ucred": struct.pack("=IIIiIiiI", 100, 32, 0, 10, 0, 0, 0, 0)
    + struct.pack("=IIIIIIi1I", 20, 21, 21, 30, 31, 31, 1, 30),
}


@pytest.mark.parametrize("layout", NATIVE)
def test_layouts_read(layout: str) -> None:
    """Each platform's structure gives pid, effective uid and effective gid."""
    assert Credentials.from_native(NATIVE[layout], layout) == Credentials(10, 20, 30)


@pytest.mark.skipif(struct.calcsize("P") != 8, reason="the bytes are those of 64-bit systems")
@pytest.mark.parametrize(
    ("layout", "size"), [("freebsd-cmsgcred", 84), ("freebsd-xucred", 88), ("apple-xucred", 76)]
)
def test_layout_sizes(layout: str, size: int) -> None:
    """The structures have the sizes that the systems' compilers give them."""
    assert LAYOUTS[layout].fields.size == size


def test_apple_says_no_pid() -> None:
    """MacOS's structure has no pid."""
    data = struct.pack("=II", 0, 20) + GROUPS
    assert Credentials.from_native(data, "apple-xucred") == Credentials(-1, 20, 30)


@pytest.mark.parametrize("layout", sorted({*NATIVE, "apple-xucred"} - {"solaris-ucred"}))
def test_layouts_round_trip(layout: str) -> None:
    """A layout parses what it has packed."""
    credentials = Credentials(-1 if layout == "apple-xucred" else 10, 20, -1)
    assert Credentials.from_native(credentials.to_native(layout), layout) == credentials


def test_ucred_cannot_be_written() -> None:
    """Only the kernel of Solaris can make a ucred_t."""
    with pytest.raises(NotSupportedError):
        Credentials().to_native("solaris-ucred")


@pytest.mark.parametrize("layout", [*NATIVE, "apple-xucred"])
def test_too_short(layout: str) -> None:
    """Too few bytes are rejected, with the expected number."""
    size = LAYOUTS[layout].fields.size
    with pytest.raises(ValueError, match=f"at least {size} bytes, got 3"):
        Credentials.from_native(b"abc", layout)


@pytest.mark.parametrize("offset", [0, 31, 60, 2**32 - 1])
def test_ucred_that_points_outside(offset: int) -> None:
    """A ucred_t whose ids would be outside of it is rejected."""
    data = struct.pack("=IIIiIiiI", 60, offset, 0, 10, 0, 0, 0, 0) + bytes(28)
    with pytest.raises(ValueError, match=f"are at byte {offset}"):
        Credentials.from_native(data, "solaris-ucred")


def test_xucred_of_another_version() -> None:
    """An unknown version of a structure is rejected."""
    with pytest.raises(ValueError, match="version 7"):
        Credentials.from_native(struct.pack("=II", 7, 20) + GROUPS, "apple-xucred")


def test_xucred_without_groups() -> None:
    """A structure with an empty list of groups is rejected."""
    data = struct.pack("=IIh2x16I", 0, 20, 0, *[9] * 16)
    with pytest.raises(ValueError, match="empty group list"):
        Credentials.from_native(data, "apple-xucred")


def test_unknown_layout() -> None:
    """The error of an unknown layout has the known ones."""
    with pytest.raises(ValueError, match="expected one of linux-ucred"):
        Credentials().to_native("hurd")


def test_no_layout_for_this_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an unknown platform native bytes are NotSupportedError with that reason."""
    monkeypatch.setattr(_credentials, "PLATFORM", None)
    with pytest.raises(NotSupportedError):
        Credentials(1, 2, 3).to_native()
    assert Credentials(1, 2, 3).to_string() == "GCredentials:unknown:pid=1,uid=2,gid=3"


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("linux", "linux"),
        ("freebsd14", "freebsd"),
        ("darwin", "darwin"),
        ("openbsd7", "openbsd"),
        ("netbsd10", "netbsd"),
        ("sunos5", "sunos"),
        ("win32", None),
    ],
)
def test_platform_names(name: str, row: str | None) -> None:
    """sys.platform, with or without a version, finds its row."""
    assert platform_named(name) is (PLATFORMS[row] if row else None)


def test_layouts_that_platforms_name_exist() -> None:
    """No platform names a layout that is not in the table."""
    for platform in PLATFORMS.values():
        assert platform.native in LAYOUTS
        for way in (platform.option, platform.message):
            assert way is None or way.layout in LAYOUTS


@pytest.mark.parametrize(
    ("name", "level", "option", "layout"),
    [
        ("freebsd", 0, 1, "freebsd-xucred"),
        ("openbsd", 0xFFFF, 0x1022, "openbsd-sockpeercred"),
        ("netbsd", 0, 3, "netbsd-unpcbid"),
    ],
)
def test_peer_by_socket_option(name: str, level: int, option: int, layout: str) -> None:
    """Each system is asked with its own option and answers in its own layout."""
    asked: list[tuple[int, int, int]] = []

    def getsockopt(*arguments: int) -> bytes:
        asked.append(arguments)  # type: ignore[arg-type]
        return NATIVE[layout]

    assert peer_credentials(getsockopt, PLATFORMS[name]) == Credentials(10, 20, 30)
    assert asked == [(level, option, len(NATIVE[layout]))]


def test_peer_on_macos() -> None:
    """MacOS is asked twice: LOCAL_PEERCRED for the user, LOCAL_PEERPID for the process."""

    def getsockopt(_level: int, option: int, _length: int) -> bytes:
        return struct.pack("=II", 0, 20) + GROUPS if option == 1 else struct.pack("=i", 10)

    assert peer_credentials(getsockopt, PLATFORMS["darwin"]) == Credentials(10, 20, 30)


@pytest.mark.parametrize("name", ["sunos", "win32"])
def test_peer_where_no_option_tells(name: str) -> None:
    """A platform without the socket option is NotSupportedError."""
    with pytest.raises(NotSupportedError, match="socket option"):
        peer_credentials(lambda *_: b"", platform_named(name))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's numbers")
def test_linux_row_is_the_socket_modules() -> None:
    """Linux's row has the numbers of Python's socket module."""
    row = PLATFORMS["linux"]
    assert row.option is not None
    assert row.message is not None
    assert row.option.option == _kernel.SO_PEERCRED == socket.SO_PEERCRED
    assert row.message.kind == _kernel.SCM_CREDENTIALS == socket.SCM_CREDENTIALS


@pytest.mark.parametrize("name", ["linux", "darwin", "openbsd", "netbsd", "sunos", "freebsd"])
def test_every_known_platform_tells_credentials_somehow(name: str) -> None:
    """can_tell_credentials accepts a platform with either way, and no other."""
    _credentials.can_tell_credentials(PLATFORMS[name])
    bare = attrs.evolve(PLATFORMS[name], option=None, message=None)
    for none in (bare, None):
        with pytest.raises(NotSupportedError):
            _credentials.can_tell_credentials(none)
