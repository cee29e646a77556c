"""Credentials in places where none were sent, and what is left of SO_PASSCRED."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests._helpers.glib import (
    GLIBS,
    OURS,
    as_json,
    connected,
    in_step,
    operate,
    ours_in_step,
    passcred,
    set_passcred,
)
from trio_unixconn import (
    Credentials,
    EndOfStreamError,
    UnexpectedControlMessageError,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.usefixtures("real_glib")]

ours = pytest.mark.parametrize("form", OURS)
glibs = pytest.mark.parametrize("glib", GLIBS)
befores = pytest.mark.parametrize("before", [0, 1])


@ours
async def test_byte_without_credentials(tmp_path: Path, form: str) -> None:
    """To a byte without credentials, our answer is get_peer_credentials (SO_PEERCRED).

    Of a socketpair that is the process that made the pair: ourselves, although GLib sent it.
    """
    async with connected(tmp_path) as (conn, peer):
        await peer.ask("write", data=b"A".hex())
        here = await operate(form, conn, "receive_credentials")
        assert here == conn.get_peer_credentials() == Credentials()
        assert here.pid != peer.process.pid
        await in_step(conn, peer)


@ours
async def test_byte_without_credentials_over_a_path(tmp_path: Path, form: str) -> None:
    """Over a path, SO_PEERCRED is the process at the other end, and so is our answer."""
    async with connected(tmp_path, "GLib connects") as (conn, peer):
        await peer.ask("write", data=b"A".hex())
        here = await operate(form, conn, "receive_credentials")
        assert here == conn.get_peer_credentials()
        assert here.pid == peer.process.pid


@glibs
@pytest.mark.parametrize("way", ["socketpair", "GLib listens"])
async def test_byte_without_credentials_to_glib(tmp_path: Path, glib: str, way: str) -> None:
    """To a byte of ours without credentials, GLib's answer is its Socket.get_credentials."""
    async with connected(tmp_path, way) as (conn, peer):
        await conn.send_all(b"A")
        there = await peer.ask("receive_credentials", form=glib)
        assert there == await peer.ask("get_credentials")
        assert there["pid"] == os.getpid()


@ours
async def test_byte_while_we_wait(tmp_path: Path, form: str) -> None:
    """To a byte sent while we wait, the kernel adds the sender's credentials: GLib's."""
    async with connected(tmp_path) as (conn, peer):
        received: list[Credentials] = []

        async def receive() -> None:
            received.append(await operate(form, conn, "receive_credentials"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            await peer.ask("write", data=b"A".hex())
        assert [as_json(here) for here in received] == [await peer.ask("own_credentials")]


@ours
async def test_byte_with_passcred_on(tmp_path: Path, form: str) -> None:
    """With SO_PASSCRED on all along, every byte has the credentials of its sender."""
    async with connected(tmp_path) as (conn, peer):
        set_passcred(conn, 1)
        await peer.ask("write", data=b"A".hex())
        assert (await operate(form, conn, "receive_credentials")).pid == peer.process.pid
        assert passcred(conn) == 1
        await in_step(conn, peer)


@ours
@befores
@pytest.mark.parametrize("do", ["send_credentials", "write", "send_fd", "shutdown"])
async def test_passcred_is_what_it_was(tmp_path: Path, form: str, before: int, do: str) -> None:
    """receive_credentials leaves SO_PASSCRED as it was, whatever GLib does."""
    async with connected(tmp_path) as (conn, peer):
        set_passcred(conn, before)
        await peer.ask(do, **({"data": b"A".hex()} if do == "write" else {}))
        if do == "send_fd":
            with pytest.raises(UnexpectedControlMessageError):
                await operate(form, conn, "receive_credentials")
        elif do == "shutdown":
            with pytest.raises(EndOfStreamError):
                await operate(form, conn, "receive_credentials")
        else:
            await operate(form, conn, "receive_credentials")
        assert passcred(conn) == before
        await (ours_in_step if do == "shutdown" else in_step)(conn, peer)
        assert passcred(conn) == before


@glibs
@befores
async def test_passcred_of_glib(tmp_path: Path, glib: str, before: int) -> None:
    """GLib leaves SO_PASSCRED of its end as it was, too: ours does what GLib's does."""
    passcred_option = {"level": socket.SOL_SOCKET, "option": socket.SO_PASSCRED}
    async with connected(tmp_path) as (conn, peer):
        await peer.ask("set_option", **passcred_option, value=before)
        await conn.send_credentials()
        assert (await peer.ask("receive_credentials", form=glib))["pid"] == os.getpid()
        assert await peer.ask("get_option", **passcred_option) == before
