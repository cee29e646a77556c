"""What errors of connecting and listening say: what is there, and what to do."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from helpers import as_nobody

from trio_unixconn import UnixSocketAddress, open_unix_connection, open_unix_listener
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


async def test_nothing_there(path: Path) -> None:
    """ENOENT asks whether the server runs."""
    error = await error_of(path)
    assert isinstance(error, FileNotFoundError)
    assert "nothing is there; is the server running" in str(error)


@pytest.mark.parametrize("use", [open_unix_connection, open_unix_listener])
async def test_folder_that_is_not_there(path: Path, use: Any) -> None:
    """ENOENT names the first folder that is not there."""
    error = await error_of(path / "a" / "b", use)
    assert isinstance(error, FileNotFoundError)
    assert f"the folder {path}: No such file" in str(error)


@pytest.mark.parametrize("use", [open_unix_connection, open_unix_listener])
async def test_file_in_place_of_a_folder(path: Path, use: Any) -> None:
    """ENOTDIR names what is no folder."""
    path.write_text("")
    error = await error_of(path / "s", use)
    assert isinstance(error, NotADirectoryError)
    assert f"{path} is a regular file, and no folder" in str(error)


async def test_symbolic_link_that_leads_nowhere(path: Path) -> None:
    """A symbolic link is followed, and said to lead nowhere if it does."""
    path.symlink_to("elsewhere")
    error = await error_of(path)
    assert isinstance(error, FileNotFoundError)
    assert "a symbolic link to elsewhere, which is not there" in str(error)


@pytest.mark.parametrize("linked", ["directly", "by a link"])
async def test_nobody_listens(path: Path, linked: str) -> None:
    """ECONNREFUSED of a socket says that its server has ended."""
    target = path if linked == "directly" else path.with_name("t")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(target))
    if target != path:
        path.symlink_to(target)
    error = await error_of(path)
    assert isinstance(error, ConnectionRefusedError)
    assert "nobody listens on the socket there" in str(error)


@pytest.mark.parametrize("what", ["regular file", "folder", "FIFO"])
async def test_no_socket(path: Path, what: str) -> None:
    """What is no socket is named, also behind a symbolic link."""
    if what == "folder":
        path.mkdir()
    elif what == "FIFO":
        os.mkfifo(path)
    else:
        path.write_text("")
    assert f"it is a {what}, and no socket" in str(await error_of(path))
    link = path.with_name("link")
    link.symlink_to(path)
    assert f"it is a symbolic link to a {what}, and no socket" in str(await error_of(link))


async def test_device() -> None:
    """A device is no socket, either."""
    assert "it is a device, and no socket" in str(await error_of(Path("/dev/null")))


async def test_socket_of_another_type(path: Path) -> None:
    """EPROTOTYPE says what kind of socket is there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        assert "but one for datagrams" in str(await error_of(path))


async def test_socket_of_another_user(path: Path) -> None:
    """EACCES says whose the socket is, and who we are."""
    async with await open_unix_listener(path):
        with as_nobody(path.parent):
            error = await error_of(path)
    assert isinstance(error, PermissionError)
    assert "belongs to user 0, group 0, with mode 600" in str(error)
    assert "this process is user 65534" in str(error)


async def test_folder_of_another_user(path: Path) -> None:
    """EACCES says which folder may not be passed, or written to, and whose it is."""
    shut = path.with_name("shut")
    shut.mkdir(0o700)
    with as_nobody(path.parent):
        for use in (open_unix_connection, open_unix_listener):
            error = await error_of(shut / "s", use)
            assert isinstance(error, PermissionError)
            assert f"the folder {shut} belongs to user 0" in str(error)
        error = await error_of(path, open_unix_listener)
        assert f"the folder {path.parent} belongs to user 0" in str(error)


@pytest.mark.parametrize("use", [open_unix_connection, open_unix_listener])
async def test_working_folder_that_is_gone(
    path: Path, monkeypatch: pytest.MonkeyPatch, use: Any
) -> None:
    """A relative path in a working folder that is gone says that it is gone."""
    path.mkdir()
    monkeypatch.chdir(path)
    path.rmdir()
    with pytest.raises(FileNotFoundError, match=r"working folder .* not there") as caught:
        await use("name")
    assert caught.value.filename == "name"


async def test_slash_behind_a_socket(path: Path) -> None:
    """A path with a slash behind it is that of a folder, and a socket is none."""
    async with await open_unix_listener(path):
        for use in (open_unix_connection, open_unix_listener):
            with pytest.raises(NotADirectoryError, match="is a socket, and no folder"):
                await use(f"{path}/")


async def test_abstract_name() -> None:
    """ECONNREFUSED of an abstract name says where it was looked for."""
    with pytest.raises(ConnectionRefusedError, match="network namespace") as caught:
        await open_unix_connection(f"\0nobody-{os.getpid()}")
    assert caught.value.filename == f"@nobody-{os.getpid()}"


def test_errors_without_more_to_say(path: Path) -> None:
    """Where nothing more is known, the system's words stand alone."""
    address = UnixSocketAddress.path(path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    for explain in (describe_connect_error, describe_bind_error):
        error = explain(OSError(5, "Input/output error"), address)
        assert str(error) == f"[Errno 5] Input/output error: '{path}'"
        assert "[Errno 5]" in str(explain(OSError(5, "x"), UnixSocketAddress.abstract("n")))
    denied = describe_bind_error(PermissionError(13, "Permission denied"), address)
    assert str(denied) == f"[Errno 13] Permission denied: '{path}'"
