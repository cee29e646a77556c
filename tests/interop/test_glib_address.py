"""Addresses against those of the real Gio: to_string(), and the address of a client."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest
import trio

from tests._helpers.glib import SYSTEM_PYTHON, started_peer
from trio_unixconn import UnixSocketAddress, open_unix_connection, open_unix_listener

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.usefixtures("real_glib")]

SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import gi
gi.require_version("Gio", "2.0")
from gi.repository import Gio
kinds = Gio.UnixSocketAddressType
print(json.dumps([
    Gio.UnixSocketAddress.new_with_type(
        # char is signed here.
        [(byte + 128) % 256 - 128 for byte in name], getattr(kinds, kind.upper())
    ).to_string()
    for kind, name in json.load(sys.stdin)
]))
"""


def test_to_string() -> None:
    """to_string() is that of Gio, for every byte, in paths, abstract and anonymous names."""
    names = [bytes([97, byte, 98]) for byte in range(256)]
    names += ["/run/café".encode(), b"/run/x", b"\xff\xfe", rb"/a\x0a"]
    asked = [(kind, list(name)) for kind in ("abstract", "path") for name in names]
    # A path ends at its first NUL, and ours cannot contain one.
    asked = [(kind, name) for kind, name in asked if kind == "abstract" or 0 not in name]
    asked.append(("anonymous", []))
    done = subprocess.run(
        [SYSTEM_PYTHON, "-c", SCRIPT],
        input=json.dumps(asked),
        text=True,
        capture_output=True,
        check=True,
    )
    ours = [
        UnixSocketAddress((b"\0" if kind == "abstract" else b"") + bytes(name)).to_string()
        for kind, name in asked
    ]
    assert ours == json.loads(done.stdout)


@pytest.mark.parametrize("name", ["client", "\0abstract"])
async def test_local_address(tmp_path: Path, name: str) -> None:
    """A Gio server sees the local_address of open_unix_connection."""
    if name == "client":
        name = str(tmp_path / name)
    else:
        name += f"-{os.getpid()}"
    path = tmp_path / "s"
    async with started_peer() as peer:
        await peer.ask("listen", path=str(path))
        async with await open_unix_connection(path, local_address=name) as conn:
            assert await peer.ask("accept") == "GUnixConnection"
            assert await peer.ask("get_remote_path") == name.removeprefix("\0")
            assert conn.get_local_address() == UnixSocketAddress.from_any(name)


LOCAL = """
import sys, gi
gi.require_version("Gio", "2.0")
from gi.repository import Gio
client = Gio.SocketClient.new()
client.set_local_address(Gio.UnixSocketAddress.new(sys.argv[2]))
connection = client.connect(Gio.UnixSocketAddress.new(sys.argv[1]), None)
print(connection.get_local_address().get_path())
connection.close(None)
"""


async def test_local_address_stays_as_with_gio(tmp_path: Path) -> None:
    """The path of a client's local address stays after closing, in Gio as here."""
    path, theirs, ours = tmp_path / "s", tmp_path / "theirs", tmp_path / "ours"
    async with await open_unix_listener(path) as listener:
        command = [SYSTEM_PYTHON, "-c", LOCAL, str(path), str(theirs)]
        with trio.fail_after(60):
            done = await trio.run_process(command, capture_stdout=True)
        assert done.stdout.decode().rstrip() == str(theirs)
        async with await listener.accept() as server:
            assert server.get_remote_address().get_path() == str(theirs)
        async with await open_unix_connection(path, local_address=ours):
            pass
    assert theirs.is_socket()
    assert ours.is_socket()
