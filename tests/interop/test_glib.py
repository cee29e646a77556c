"""Descriptors, credentials and bytes between this library and GLib, in every combination."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests._helpers.glib import (
    GLIBS,
    OURS,
    WAYS,
    as_json,
    connected,
    in_step,
    operate,
    receive_described,
    receive_exactly,
    require_glib,
)
from tests._helpers.programs.open_files import KINDS, identity, opened
from trio_unixconn import (
    Credentials,
    IOErrorEnum,
    UnexpectedDescriptorsError,
    connection_pair,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.usefixtures("real_glib")]

ways = pytest.mark.parametrize("way", WAYS)
ours = pytest.mark.parametrize("form", OURS)
glibs = pytest.mark.parametrize("glib", GLIBS)
kinds = pytest.mark.parametrize("kind", KINDS)


@ways
@ours
@glibs
async def test_send_fd(tmp_path: Path, way: str, form: str, glib: str) -> None:
    """A descriptor that we send is the same open file at GLib's end."""
    async with connected(tmp_path, way) as (conn, peer):
        with opened("pipe", b"hello") as fd:
            assert await operate(form, conn, "send_fd", fd) is True
            there = await peer.ask("receive_fd", form=glib)
            assert [there["device"], there["inode"]] == identity(fd)
        assert there["content"] == b"hello".hex()


@ways
@ours
@glibs
async def test_receive_fd(tmp_path: Path, way: str, form: str, glib: str) -> None:
    """A descriptor that GLib sends is the same open file here, and close-on-exec."""
    async with connected(tmp_path, way) as (conn, peer):
        await peer.begin("send_fd", content="hello", form=glib)
        here = await receive_described(conn, form)
        assert await peer.result() == [[here["device"], here["inode"]]]
        assert here["content"] == b"hello0".hex()
        assert here["inheritable"] is False


@ways
@ours
@glibs
async def test_send_credentials(tmp_path: Path, way: str, form: str, glib: str) -> None:
    """GLib receives our credentials, and names them as we do."""
    async with connected(tmp_path, way) as (conn, peer):
        assert await operate(form, conn, "send_credentials") is True
        there = await peer.ask("receive_credentials", form=glib)
        assert there == {
            "string": Credentials().to_string(),
            "pid": os.getpid(),
            "uid": os.geteuid(),
        }


@ways
@ours
@glibs
async def test_receive_credentials(tmp_path: Path, way: str, form: str, glib: str) -> None:
    """We receive GLib's credentials, and name them as GLib does."""
    async with connected(tmp_path, way) as (conn, peer):
        assert await peer.ask("send_credentials", form=glib) is True
        here: Credentials = await operate(form, conn, "receive_credentials")
        assert here.get_unix_pid() == peer.process.pid
        assert as_json(here) == await peer.ask("own_credentials")


@ours
@glibs
async def test_we_wait_for_glib(tmp_path: Path, form: str, glib: str) -> None:
    """What GLib sends while we wait already ends the wait."""
    async with connected(tmp_path) as (conn, peer):
        received: list[Any] = []

        async def receive_both() -> None:
            received.append(await receive_described(conn, form))
            received.append(await operate(form, conn, "receive_credentials"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive_both)
            await trio.testing.wait_all_tasks_blocked()
            assert received == []
            await peer.ask("send_fd", form=glib, content="late")
            await peer.ask("send_credentials", form=glib)
        assert received[0]["content"] == b"late0".hex()
        assert received[1].pid == peer.process.pid


@ours
@glibs
async def test_glib_waits_for_us(tmp_path: Path, form: str, glib: str) -> None:
    """What we send while GLib waits already ends its wait."""
    async with connected(tmp_path) as (conn, peer):
        await peer.begin("receive_fd", form=glib, announce=glib == "blocking")
        with opened("pipe", b"late") as fd:
            await operate(form, conn, "send_fd", fd)
        assert (await peer.result())["content"] == b"late".hex()
        await peer.begin("receive_credentials", form=glib, announce=True)
        await operate(form, conn, "send_credentials")
        assert (await peer.result())["pid"] == os.getpid()


@kinds
async def test_send_kinds(tmp_path: Path, kind: str) -> None:
    """Files, pipes and sockets arrive at GLib as what they are."""
    async with connected(tmp_path) as (conn, peer):
        with opened(kind, b"hello") as fd:
            await conn.send_fd(fd)
            there = await peer.ask("receive_fd")
            assert [there["device"], there["inode"]] == identity(fd)
        assert there["kind"] == LETTER[kind]
        assert there["content"] == b"hello".hex()


@kinds
async def test_receive_kinds(tmp_path: Path, kind: str) -> None:
    """Files, pipes and sockets from GLib arrive as what they are."""
    async with connected(tmp_path) as (conn, peer):
        await peer.begin("send_fd", kind=kind, content="hello")
        here = await receive_described(conn)
        assert await peer.result() == [[here["device"], here["inode"]]]
        assert here["kind"] == LETTER[kind]
        assert here["content"] == b"hello0".hex()


LETTER = {"file": "-", "pipe": "p", "tcp": "s", "unix": "s"}


async def test_send_a_socket_object(tmp_path: Path) -> None:
    """A connection of ours can itself be sent, and GLib can talk through it."""
    async with connected(tmp_path) as (conn, peer):
        near, far = connection_pair()
        async with near:
            async with far:
                await near.send_all(b"through")
                await conn.send_fd(far.socket)
            assert (await peer.ask("receive_fd"))["content"] == b"through".hex()


@ours
async def test_receive_in_order(tmp_path: Path, form: str) -> None:
    """Bytes of GLib's before, between and after descriptors stand where they were sent."""
    async with connected(tmp_path) as (conn, peer):
        await peer.ask("write", data=b"before".hex())
        await peer.ask("send_fd", content="first")
        await peer.ask("write", data=b"between".hex())
        await peer.ask("send_fd", content="second")
        await peer.ask("send_credentials")
        await peer.ask("write", data=b"after".hex())
        assert await receive_exactly(conn, 6) == b"before"
        assert (await receive_described(conn, form))["content"] == b"first0".hex()
        assert await receive_exactly(conn, 7) == b"between"
        assert (await receive_described(conn, form))["content"] == b"second0".hex()
        assert (await operate(form, conn, "receive_credentials")).pid == peer.process.pid
        assert await receive_exactly(conn, 5) == b"after"


@ours
async def test_send_in_order(tmp_path: Path, form: str) -> None:
    """Bytes of ours before, between and after descriptors stand where they were sent."""
    async with connected(tmp_path) as (conn, peer):
        with opened("pipe", b"first") as first, opened("pipe", b"second") as second:
            await conn.send_all(b"before")
            await operate(form, conn, "send_fd", first)
            await conn.send_all(b"between")
            await operate(form, conn, "send_fd", second)
            await operate(form, conn, "send_credentials")
            await conn.send_all(b"after")
        assert await peer.ask("read", size=6) == b"before".hex()
        assert (await peer.ask("receive_fd"))["content"] == b"first".hex()
        assert await peer.ask("read", size=7) == b"between".hex()
        assert (await peer.ask("receive_fd"))["content"] == b"second".hex()
        assert (await peer.ask("receive_credentials"))["pid"] == os.getpid()
        assert await peer.ask("read", size=5) == b"after".hex()


@ours
async def test_receive_many(tmp_path: Path, form: str) -> None:
    """A hundred descriptors in a row from GLib arrive in their order, none lost."""
    async with connected(tmp_path) as (conn, peer):
        await peer.begin("send_fd", count=100, content="n")
        received = [(await receive_described(conn, form))["content"] for _ in range(100)]
        assert received == [(b"n%d" % number).hex() for number in range(100)]
        assert len(await peer.result()) == 100


@ours
async def test_send_many(tmp_path: Path, form: str) -> None:
    """A hundred descriptors in a row to GLib arrive in their order, none lost."""
    async with connected(tmp_path) as (conn, peer), trio.open_nursery() as nursery:

        async def send() -> None:
            for number in range(100):
                with opened("pipe", b"n%d" % number) as fd:
                    await operate(form, conn, "send_fd", fd)

        nursery.start_soon(send)
        received = [(await peer.ask("receive_fd"))["content"] for _ in range(100)]
        assert received == [(b"n%d" % number).hex() for number in range(100)]


async def test_megabytes_both_ways(tmp_path: Path) -> None:
    """More bytes than a socket holds pass in both directions, and descriptors after them."""
    size = 1 << 20
    async with connected(tmp_path) as (conn, peer):
        await peer.begin("read", size=size)
        await conn.send_all(b"o" * size)
        there = bytes.fromhex(await peer.result())
        assert (len(there), set(there)) == (size, {ord("o")})
        await peer.begin("write", data=b"g".hex(), times=size)
        here = await receive_exactly(conn, size)
        assert set(here) == {ord("g")}
        await peer.result()
        await in_step(conn, peer)


async def test_messages_of_ours_as_glib_sees_them(tmp_path: Path) -> None:
    """GLib finds one NUL byte and one control message of the right type in what we send."""
    async with connected(tmp_path) as (conn, peer):
        with opened("pipe", b"") as fd:
            await conn.send_fd(fd)
        assert await peer.ask("receive_message", size=10) == {
            "data": "00",
            "types": ["GUnixFDMessage"],
            "fds": 1,
        }
        await peer.ask("set_option", level=socket.SOL_SOCKET, option=socket.SO_PASSCRED, value=1)
        await conn.send_credentials()
        assert await peer.ask("receive_message", size=10) == {
            "data": "00",
            "types": ["GUnixCredentialsMessage"],
            "fds": 0,
        }


async def test_bytes_of_glibs_messages(tmp_path: Path) -> None:
    """What GLib sends with a descriptor or credentials is one NUL byte, as ours."""
    async with connected(tmp_path) as (conn, peer):
        await peer.ask("send_credentials")
        # Without SO_PASSCRED at our end the kernel drops the credentials, not the byte.
        assert await conn.receive_some(10) == b"\0"
        await peer.ask("send_fd")
        with pytest.raises(UnexpectedDescriptorsError) as caught:
            await conn.receive_some(10)
        assert caught.value.data == b"\0"


@pytest.mark.parametrize("way", ["GLib connects", "GLib listens", "GLib serves"])
async def test_who_is_there(tmp_path: Path, way: str) -> None:
    """Over a path, each end knows the other's process and the listener's address."""
    async with connected(tmp_path, way) as (conn, peer):
        assert conn.get_peer_credentials().pid == peer.process.pid
        assert (await peer.ask("get_credentials"))["pid"] == os.getpid()
        name = str(tmp_path / "s")
        if way == "GLib connects":
            assert conn.get_local_address().get_path() == name
            assert await peer.ask("get_remote_path") == name
        else:
            assert conn.get_remote_address().get_path() == name


async def test_who_made_the_pair(tmp_path: Path) -> None:
    """Of a socketpair, both ends name the process that made it, GLib's too."""
    async with connected(tmp_path) as (conn, peer):
        ours = conn.get_peer_credentials()
        assert ours == Credentials()
        assert await peer.ask("get_credentials") == as_json(ours)


async def test_error_numbers(tmp_path: Path) -> None:
    """Every member of GLib's IOErrorEnum is in ours with its number; ours may have newer ones."""
    async with connected(tmp_path) as (_, peer):
        theirs: dict[str, int] = await peer.ask("io_error_enum")
    mine = {name: int(member) for name, member in IOErrorEnum.__members__.items()}
    assert len(theirs) >= 48
    assert theirs.items() <= mine.items()
    assert all(mine[name] > max(theirs.values()) for name in mine.keys() - theirs.keys())


@pytest.mark.parametrize("python", ["/nonexistent/python3", "/bin/false"])
def test_without_glib(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without PyGObject these tests are skipped, but fail in CI, and say what to install."""
    packages = "python3-gi and gir1.2-glib-2.0"
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=packages):
        require_glib(python)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=packages):
        require_glib(python)
