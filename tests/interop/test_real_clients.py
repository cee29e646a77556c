"""Real clients on a listener of this library: curl, socat, Gio.SocketClient."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests._helpers.glib import in_step, started_peer
from tests._helpers.processes import ROOT
from tests._helpers.real_programs import first_line, output_of, require_program, running, serving
from trio_unixconn import UnixConnection, UnixSocketAddress

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

pytestmark = [pytest.mark.interop, pytest.mark.slow]

EXAMPLE: Final = ROOT / "examples" / "http_server.py"
# More than a socket buffer holds, without repetition.
MEGABYTES: Final = b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(5_000_000 // 32))

addresses = pytest.mark.parametrize("kind", ["path", "abstract"])


def address_of(kind: str, path: Path) -> UnixSocketAddress:
    """Return a path, or an abstract name that no other test uses."""
    if kind == "abstract":
        return UnixSocketAddress.abstract(str(path))
    return UnixSocketAddress.path(path)


@asynccontextmanager
async def http_server(path: Path) -> AsyncGenerator[trio.Process, None]:
    """Run the example, which must exit with status 0 and without a warning."""
    command = [sys.executable, "-W", "error", str(EXAMPLE), str(path)]
    with trio.fail_after(60):
        async with running(command, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            assert str(path) in await first_line(process)
            yield process
            process.terminate()
            assert [chunk async for chunk in process.stdout] == []
            assert await process.wait() == 0
    assert not path.exists()


################################################################
# curl
################################################################


async def test_curl_keeps_its_connection(tmp_path: Path, curl: str) -> None:
    """Three requests of curl use one connection, and the server knows its credentials."""
    path = tmp_path / "http"
    command = [curl, "-s", "-S", "--unix-socket", str(path), "-w", "%{num_connects} %{http_code}\n"]
    async with (
        http_server(path),
        running([*command, *["http://localhost/"] * 3]) as process,
    ):
        assert process.stdout is not None
        lines = b"".join([chunk async for chunk in process.stdout]).decode().splitlines()
        assert await process.wait() == 0
    greeting = f"Hello, process {process.pid} of user {os.geteuid()}, group {os.getegid()}!"
    assert lines == [greeting, "1 200", greeting, "0 200", greeting, "0 200"]


@pytest.mark.parametrize("chunked", [False, True])
async def test_curl_uploads(tmp_path: Path, curl: str, *, chunked: bool) -> None:
    """An upload of curl, with its length or in chunks, is echoed unchanged."""
    path = tmp_path / "http"
    how = ["-H", "Transfer-Encoding: chunked"] if chunked else []
    async with http_server(path):
        command = [curl, "-s", "-S", "-f", "--unix-socket", str(path), "--data-binary", "@-", *how]
        got = await output_of(*command, "http://localhost/echo", stdin=MEGABYTES)
    assert got == MEGABYTES


@pytest.mark.parametrize(
    ("status", "target", "how"),
    [
        (404, "/elsewhere", []),
        (405, "/echo", ["-X", "DELETE"]),
        (413, "/echo", ["--data-binary", "@-"]),
    ],
)
async def test_curl_is_refused(
    tmp_path: Path, curl: str, status: int, target: str, how: list[str]
) -> None:
    """Curl sees the status of each error, and the server continues."""
    path = tmp_path / "http"
    async with http_server(path):
        command = [curl, "-s", "--unix-socket", str(path), "-w", "%{http_code}", "-o", os.devnull]
        too_much = MEGABYTES * 4
        got = await output_of(*command, *how, f"http://localhost{target}", stdin=too_much)
        assert got == b"%d" % status
        assert await output_of(*command, "http://localhost/") == b"200"


async def test_what_is_no_http(tmp_path: Path, socat: str) -> None:
    """A client that does not speak HTTP gets an HTTP error."""
    path = tmp_path / "http"
    async with http_server(path):
        got = await output_of(socat, "-t30", "-", f"UNIX-CONNECT:{path}", stdin=b"what?\r\n\r\n")
    assert re.fullmatch(rb"HTTP/1\.1 400 .*\r\n\r\nbad request\n", got, re.DOTALL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_example_ends(tmp_path: Path, number: signal.Signals) -> None:
    """SIGINT and SIGTERM end the example without output, and remove its path."""
    async with http_server(tmp_path / "http") as process:
        process.send_signal(number)
        assert await process.wait() == 0


################################################################
# socat
################################################################


async def echo(conn: UnixConnection) -> None:
    """Echo."""
    async for chunk in conn:
        await conn.send_all(chunk)


async def digest(conn: UnixConnection) -> None:
    """Answer after the client has sent its end of file."""
    seen = hashlib.sha256()
    async for chunk in conn:
        seen.update(chunk)
    await conn.send_all(seen.hexdigest().encode())


def to(kind: str, path: Path) -> str:
    """Return the name of an address in the syntax of socat."""
    return f"{'ABSTRACT' if kind == 'abstract' else 'UNIX'}-CONNECT:{path}"


@addresses
async def test_socat_and_back(tmp_path: Path, socat: str, kind: str) -> None:
    """Megabytes from socat are echoed unchanged, on a path and on an abstract name."""
    path = tmp_path / "s"
    async with serving(echo, address_of(kind, path)):
        # Without -t, socat waits half a second for an answer.
        got = await output_of(socat, "-t30", "-", to(kind, path), stdin=MEGABYTES)
    assert got == MEGABYTES


@addresses
async def test_socat_ends_its_half(tmp_path: Path, socat: str, kind: str) -> None:
    """Socat receives the answer after it has sent its end of file."""
    path = tmp_path / "s"
    async with serving(digest, address_of(kind, path)):
        got = await output_of(socat, "-t30", "-", to(kind, path), stdin=MEGABYTES)
    assert got.decode() == hashlib.sha256(MEGABYTES).hexdigest()


async def test_socats_at_once(tmp_path: Path, socat: str) -> None:
    """Ten concurrent clients each receive their own bytes."""
    path = tmp_path / "s"
    got: dict[int, bytes] = {}

    async def client(number: int) -> None:
        mine = b"%d" % number * 100_000
        got[number] = await output_of(socat, "-t30", "-", f"UNIX-CONNECT:{path}", stdin=mine)

    async with serving(echo, path), trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(client, number)
    assert got == {number: b"%d" % number * 100_000 for number in range(10)}


################################################################
# Gio.SocketClient
################################################################


@addresses
@pytest.mark.usefixtures("real_glib")
async def test_gio_socket_client(tmp_path: Path, kind: str) -> None:
    """GLib's client passes bytes, descriptors and credentials in both directions."""
    path = tmp_path / "s"
    connected = trio.Event()
    served = trio.Event()
    async with started_peer() as peer:

        async def handler(conn: UnixConnection) -> None:
            assert conn.get_peer_credentials().pid == peer.process.pid
            await connected.wait()
            await in_step(conn, peer)
            served.set()

        async with serving(handler, address_of(kind, path)):
            how = {"path": str(path), "abstract": kind == "abstract"}
            assert await peer.ask("connect", **how) == "GUnixConnection"
            connected.set()
            await served.wait()
            # The handler has returned, and with that the connection is closed.
            assert await peer.ask("read", size=1) == ""


@pytest.mark.parametrize("name", ["curl", "socat", "dbus-daemon", "haproxy"])
def test_without_a_program(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the program a test is skipped, or fails on CI, and names the package to install."""
    monkeypatch.setattr("tests._helpers.real_programs.SERVERS", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=f"install the package {name}"):
        require_program(name)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=f"install the package {name}"):
        require_program(name)
