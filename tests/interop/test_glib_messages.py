"""Whole messages, to and from GLib's Gio.Socket.send_message and receive_message."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests._helpers.glib import connected
from trio_unixconn import Credentials, UnixCredentialsMessage, UnixFDList, UnixFDMessage

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.usefixtures("real_glib")]

SO_PASSCRED = 16


@pytest.mark.parametrize("count", [0, 1, 2, 253])
@pytest.mark.parametrize("credentials", [False, True])
async def test_from_glib(tmp_path: Path, count: int, *, credentials: bool) -> None:
    """A Gio.UnixFDMessage with a Gio.UnixCredentialsMessage arrives as one message."""
    async with connected(tmp_path) as (conn, peer):
        await peer.ask("send_message", data=b"whole".hex(), fds=count, credentials=credentials)
        with await conn.receive_message(100, credentials=credentials) as message:
            assert message.data == b"whole"
            assert len(message.fds) == count
            if credentials:
                assert message.credentials == Credentials(
                    peer.process.pid, os.geteuid(), os.getegid()
                )
        # The stream continues after it.
        await peer.ask("write", data=b"next".hex())
        assert await conn.receive_some() == b"next"


@pytest.mark.parametrize("count", [0, 1, 2, 253])
async def test_to_glib(tmp_path: Path, count: int) -> None:
    """What send_message sends, GLib receives as its own kinds of control messages."""
    async with connected(tmp_path) as (conn, peer):
        await peer.ask("set_option", level=1, option=SO_PASSCRED, value=1)
        await conn.send_message(b"whole", fds=[0] * count, credentials=Credentials())
        got = await peer.ask("receive_message", size=100)
        assert bytes.fromhex(got["data"]) == b"whole"
        assert sorted(got["types"]) == ["GUnixCredentialsMessage"] + ["GUnixFDMessage"] * (
            count > 0
        )
        assert got["fds"] == count


async def test_many_one_by_one_for_gio(tmp_path: Path) -> None:
    """send_fds(per_message=1) serves a peer that calls Gio's receive_fd for each."""
    async with connected(tmp_path) as (conn, peer):
        assert await conn.send_fds([0] * 20, per_message=1) == 20
        for _ in range(20):
            assert await peer.ask("receive_fd") != -1


async def test_many_from_gio(tmp_path: Path) -> None:
    """What Gio's send_fd sends one by one, fds() and receive_fds take in bursts."""
    async with connected(tmp_path) as (conn, peer):
        await peer.ask("send_fd", count=20)
        taken = 0
        async for fd in conn.fds():
            os.close(fd)
            taken += 1
            if taken == 5:
                break
        while taken < 20:
            with await conn.receive_fds(100) as fds:
                taken += len(fds)
        assert taken == 20


def test_message_values_are_gios() -> None:
    """The values have the levels and types that GLib's classes have, and the same bytes."""
    with UnixFDList([os.dup(0), os.dup(0)]) as fds:
        message = UnixFDMessage(fds)
        assert (message.get_level(), message.get_msg_type(), message.get_size()) == (1, 1, 8)
    credentials = UnixCredentialsMessage()
    assert (credentials.get_level(), credentials.get_msg_type()) == (1, 2)
    assert credentials.serialize() == Credentials().to_native()
