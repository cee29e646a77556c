"""Errors of open_unix_connection and open_unix_listener: what is at the path, and what to do."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests._helpers.environment import environment
from tests._helpers.users import as_nobody, as_root
from trio_unixconn import (
    AddressInUseError,
    UnixSocketAddress,
    open_unix_connection,
    open_unix_listener,
)
from trio_unixconn._paths import describe_bind_error, describe_connect_error


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


async def error_of(path: Path, use: Any = open_unix_connection) -> OSError:
    with pytest.raises(OSError, match=re.escape(str(path))) as caught:
        await use(path)
    assert caught.value.filename == str(path)
    assert caught.value.__cause__ is not None
    return caught.value


async def test_connect_nothing_there(path: Path) -> None:
    """ENOENT of a connect asks whether the server is running."""
    error = await error_of(path)
    assert isinstance(error, FileNotFoundError)
    assert "no such socket; is the server running" in str(error)


@pytest.mark.parametrize("use", [open_unix_connection, open_unix_listener])
async def test_directory_that_does_not_exist(path: Path, use: Any) -> None:
    """ENOENT names the first directory that does not exist."""
    error = await error_of(path / "a" / "b", use)
    assert isinstance(error, FileNotFoundError)
    assert f"directory {path}: No such file" in str(error)


@pytest.mark.parametrize("use", [open_unix_connection, open_unix_listener])
async def test_file_in_place_of_a_directory(path: Path, use: Any) -> None:
    """ENOTDIR names what is not a directory."""
    path.write_text("")
    error = await error_of(path / "s", use)
    assert isinstance(error, NotADirectoryError)
    assert f"{path} is not a directory (regular file)" in str(error)


async def test_connect_dangling_symbolic_link(path: Path) -> None:
    """A connect says where a symbolic link leads to if that does not exist."""
    path.symlink_to("else\nwhere")
    error = await error_of(path)
    assert isinstance(error, FileNotFoundError)
    assert r"symbolic link to else\x0awhere, which does not exist" in str(error)


@pytest.mark.parametrize("linked", ["directly", "by a link"])
async def test_connect_no_process_listens(path: Path, linked: str) -> None:
    """ECONNREFUSED of a socket says that no process is listening."""
    target = path if linked == "directly" else path.with_name("t")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(target))
    if target != path:
        path.symlink_to(target)
    error = await error_of(path)
    assert isinstance(error, ConnectionRefusedError)
    assert "no process is listening on this socket" in str(error)


@pytest.mark.parametrize("what", ["regular file", "directory", "FIFO"])
async def test_connect_not_a_socket(path: Path, what: str) -> None:
    """A connect says what is at the path if it is not a socket, even at the end of a link."""
    if what == "directory":
        path.mkdir()
    elif what == "FIFO":
        os.mkfifo(path)
    else:
        path.write_text("")
    assert f"not a socket ({what})" in str(await error_of(path))
    link = path.with_name("link")
    link.symlink_to(path)
    assert f"not a socket (symbolic link to a {what})" in str(await error_of(link))


async def test_connect_device() -> None:
    """A device is not a socket."""
    assert "not a socket (device)" in str(await error_of(Path("/dev/null")))


async def test_connect_datagram_socket(path: Path) -> None:
    """EPROTOTYPE says what kind of socket is there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        assert "not a stream socket, but one for datagrams" in str(await error_of(path))


async def test_connect_socket_of_another_user(path: Path) -> None:
    """EACCES names the owner and the mode of the socket, and the user of this process."""
    async with await open_unix_listener(path):
        with as_nobody(path.parent):
            error = await error_of(path)
    assert isinstance(error, PermissionError)
    assert "takes write permission" in str(error)
    assert "owner 0, group 0, mode 600" in str(error)
    assert "this process is user 65534" in str(error)


async def test_directory_of_another_user(path: Path) -> None:
    """EACCES names the directory that cannot be entered or written to, and its owner."""
    closed = path.with_name("closed")
    closed.mkdir(0o700)
    with as_nobody(path.parent):
        for use in (open_unix_connection, open_unix_listener):
            error = await error_of(closed / "s", use)
            assert isinstance(error, PermissionError)
            assert re.search(f"no permission to .* directory {closed} .owner 0", str(error))
        error = await error_of(path, open_unix_listener)
        assert f"no permission to write to directory {path.parent} (owner 0" in str(error)


@pytest.mark.parametrize("use", [open_unix_connection, open_unix_listener])
async def test_relative_path_without_working_directory(
    path: Path, monkeypatch: pytest.MonkeyPatch, use: Any
) -> None:
    """A relative path in a working directory that was removed is an error with that reason."""
    path.mkdir()
    monkeypatch.chdir(path)
    path.rmdir()
    with pytest.raises(FileNotFoundError, match=r"working directory .* does not exist") as caught:
        await use("name")
    assert caught.value.filename == "name"


async def test_absolute_path_without_working_directory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An absolute path works in a working directory that was removed, and errors do not name it."""
    gone = path.with_name("gone")
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    error = await error_of(path)
    assert isinstance(error, FileNotFoundError)
    assert "working directory" not in str(error)
    async with await open_unix_listener(path), await open_unix_connection(path):
        pass
    assert not path.exists()


CHROOTED = """
import encodings.idna, fcntl, grp, os, pwd, sys, trio, trio_unixconn as t

async def main():
    os.chroot(sys.argv[1])
    os.chdir("/")
    os.umask(0o022)
    assert not os.path.exists("/proc")
    async with await t.open_unix_listener("/s") as listener:
        async with await t.open_unix_connection("/s") as one, await listener.accept() as two:
            await one.send_all(b"x")
            assert await two.receive_some() == b"x"
        async with await t.open_unix_listener("/s", replace=True):
            pass
    assert os.listdir("/") == []
    for options in ({"mode": 0o666}, {"owner": 1}):
        try:
            await t.open_unix_listener("/s", **options)
        except OSError as exc:
            print(exc)
    os.mkdir("/" + "d" * 120)
    for use in (t.open_unix_listener, t.open_unix_connection):
        try:
            async with await t.open_unix_listener("/s"):
                os.link("/s", "/" + "d" * 120 + "/s")
                await use("/" + "d" * 120 + "/s")
        except OSError as exc:
            print(exc)
        os.unlink("/" + "d" * 120 + "/s")
    assert os.listdir("/") == ["d" * 120]

trio.run(main)
"""


@as_root
def test_chroot_without_proc(tmp_path: Path) -> None:
    """Without /proc a listener works, and what requires /proc is one error with that reason."""
    done = subprocess.run(
        [sys.executable, "-c", CHROOTED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    mode, owner, *long = done.stdout.splitlines()
    assert "without /proc (mode 666 is asked for, the umask leaves 644); mount /proc" in mode
    assert "cannot set owner or mode of the socket without /proc" in owner
    assert len(long) == 2
    for line in long:
        assert "longer paths require /proc, which is not mounted" in line


async def test_trailing_slash(path: Path) -> None:
    """A path that ends with a slash is that of a directory, and a socket is not one."""
    async with await open_unix_listener(path):
        for use in (open_unix_connection, open_unix_listener):
            with pytest.raises(NotADirectoryError, match=r"is not a directory \(socket\)"):
                await use(f"{path}/")


async def test_connect_abstract_name() -> None:
    """ECONNREFUSED of an abstract name says where the kernel has looked."""
    with pytest.raises(ConnectionRefusedError, match="network namespace") as caught:
        await open_unix_connection(f"\0none\n-{os.getpid()}")
    assert caught.value.filename == rf"@none\x0a-{os.getpid()}"


async def test_filename_is_the_path(path: Path) -> None:
    """The filename of an error is the path itself, and its text is printable."""
    path = path.with_name(os.fsdecode(b"a\n\x1b\xff"))
    for use in (open_unix_connection, open_unix_listener):
        with pytest.raises(OSError, match="directory") as caught:
            await use(path / "s")
        assert caught.value.filename == str(path / "s")
        assert str(caught.value).isascii()
        assert str(caught.value).isprintable()


def test_errors_without_explanation(path: Path) -> None:
    """If nothing more is known, the words of the system stand alone."""
    address = UnixSocketAddress.path(path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    for describe in (describe_connect_error, describe_bind_error):
        error = describe(OSError(5, "Input/output error"), address)
        assert str(error) == f"[Errno 5] Input/output error: '{path}'"
        assert "[Errno 5]" in str(describe(OSError(5, "x"), UnixSocketAddress.abstract("n")))
    denied = describe_bind_error(PermissionError(13, "Permission denied"), address)
    assert str(denied) == f"[Errno 13] Permission denied: '{path}'"


@pytest.mark.parametrize("address", [UnixSocketAddress(b"/x"), UnixSocketAddress(b"\0x")])
def test_describe_bind_error_address_in_use(address: UnixSocketAddress) -> None:
    """EADDRINUSE of any address is AddressInUseError."""
    error = describe_bind_error(OSError(errno.EADDRINUSE, "Address already in use"), address)
    assert isinstance(error, AddressInUseError)
    assert error.errno == errno.EADDRINUSE
