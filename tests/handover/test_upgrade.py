"""Upgrades under load, and successors that fail in every way: the one before serves on."""

from __future__ import annotations

import logging
import os
import signal
import socket
import stat
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests._helpers.processes import open_descriptors
from tests._helpers.waiting import until
from tests.handover.server import Config
from tests.handover.services import clients, service
from trio_unixconn import (
    AddressInUseError,
    IOErrorEnum,
    PeerDeniedError,
    PeerPolicy,
    TakeOverError,
    UnixConnection,
    UpgradeFailedError,
    serve_unix,
)
from trio_unixconn._frames import encode_frame
from trio_unixconn.handover import _protocol as of, open_generation, request_upgrade
from trio_unixconn.handover._channel import Channel
from trio_unixconn.handover._manifest import ListenerEntry, Manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.slow


def has_at_most(pid: int, opened: list[int]) -> bool:
    """Whether a process has no more file descriptors than the first one had."""
    return not opened or open_descriptors(pid) <= opened[0]


async def deny(_: object) -> bool:
    return False


async def keep_alive(port: int, counts: list[int], stop: trio.Event) -> None:
    """Send request after request on one connection; the server counts them."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        while not stop.is_set():
            await stream.send_all(b"\n")
            answer = await stream.receive_some(100)
            counts.append(int(answer.split()[2]))
            await trio.sleep(0.002)


async def test_upgrade_loses_no_request(tmp_path: Path) -> None:
    """Over several upgrades no connect is refused or reset, and no long connection ends."""
    counts: list[list[int]] = [[] for _ in range(5)]
    stop = trio.Event()
    async with service(tmp_path) as found, clients(found) as load, trio.open_nursery() as nursery:
        for each in counts:
            nursery.start_soon(keep_alive, load.port, each, stop)
        for number in range(2, 5):
            upgrade = await found.upgrade()
            assert upgrade.number == number
            assert upgrade.pid == found.pid(number)
            assert 0 < upgrade.seconds < 60
            await load.answered_by(number)
            await found.has_ended(number - 1)
        stop.set()
    assert set(load.outcomes) == {"answered"}
    for each in counts:
        # The state of each connection has moved with it.
        assert each == list(range(1, len(each) + 1))


async def test_request_upgrade_again_at_once(tmp_path: Path) -> None:
    """The next request reaches the generation that the one before has started."""
    async with service(tmp_path) as found:
        for number in range(2, 6):
            assert (await found.upgrade()).number == number


async def test_upgrade_leaks_no_descriptor(tmp_path: Path) -> None:
    """Each generation has as many file descriptors as the one before."""
    async with service(tmp_path) as found:
        opened: list[int] = []
        for number in range(2, 6):
            await found.upgrade()
            await found.noted(f"confirmed {number}")
            await found.has_ended(number - 1)
            pid = found.pid(number)
            # The channel to the generation before is closed when that has ended.
            await until(partial(has_at_most, pid, opened))
            opened.append(open_descriptors(pid))
        assert opened == opened[:1] * len(opened)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("fail import", "ImportError: no module of this name"),
        ("raise", "ValueError: this version cannot start"),
        ("raise late", "ValueError: this version cannot be ready"),
        ("fail serving", "ValueError: this version fails after it was ready"),
        ("version", "got version 99"),
        ("no files", "free file descriptor"),
    ],
)
async def test_upgrade_when_successor_fails(tmp_path: Path, mode: str, said: str) -> None:
    """A successor that fails changes nothing; the error has its traceback or what it wrote."""
    successor = {"directory": str(tmp_path), "mode": mode}
    options: dict[str, Any] = {"listeners": 30} if mode == "no files" else {}
    async with (
        service(tmp_path, successor=successor, probation=20, **options) as found,
        clients(found) as load,
    ):
        opened = open_descriptors(found.pid(1))
        with pytest.raises(UpgradeFailedError) as caught:
            await found.upgrade()
        assert said in str(caught.value)
        if mode == "fail import":
            assert "about to fail" in caught.value.traceback
            assert "exited with status 1" in str(caught.value)
        await load.answered_by(1)
        assert load.outcomes["refused"] == 0
        if mode != "fail serving":
            assert set(load.outcomes) == {"answered"}
        # Connections that are being handled come and go.
        await until(lambda: open_descriptors(found.pid(1)) <= opened)


@pytest.mark.parametrize("mode", ["hang early", "hang", "deaf"])
async def test_upgrade_when_successor_hangs(tmp_path: Path, mode: str) -> None:
    """A successor that does not serve in time is ended, and is not running afterwards."""
    successor = {"directory": str(tmp_path), "mode": mode}
    async with (
        service(tmp_path, successor=successor, timeout=2) as found,
        clients(found) as load,
    ):
        with pytest.raises(UpgradeFailedError, match=r"within 2 s \(timeout\); it "):
            await found.upgrade()
        await load.answered_by(1)
        assert load.outcomes["refused"] == 0


async def test_upgrade_when_successor_is_stopped(tmp_path: Path) -> None:
    """A successor that is stopped, and so reads nothing, is killed."""
    fault = ["stop", "send", of.PREPARED]
    successor = {"directory": str(tmp_path), "fault": fault}
    async with (
        service(tmp_path, successor=successor, timeout=10) as found,
        clients(found) as load,
    ):
        with pytest.raises(UpgradeFailedError, match="was killed because it did not end"):
            await found.upgrade()
        await load.answered_by(1)
        assert set(load.outcomes) == {"answered"}


async def test_upgrade_with_few_free_descriptors(tmp_path: Path) -> None:
    """A successor with too few free slots for one message takes the listeners in several."""
    successor = {"directory": str(tmp_path), "mode": "few files", "listeners": 14}
    async with service(tmp_path, successor=successor, listeners=14) as found:
        assert (await found.upgrade()).number == 2
        note = await found.noted("generation 2")
        assert note[7] == "11"


@pytest.mark.parametrize("state", ["", "x", "x*65536", "x*65537", "x*5000000"])
async def test_set_state_reaches_the_successor(tmp_path: Path, state: str) -> None:
    """State of any size arrives: in the frame, or as sealed memory."""
    async with service(tmp_path, state=state) as found:
        await found.upgrade()
        note = await found.noted("generation 2")
        text, _, size = state.partition("*")
        assert note[-1] == str(len(text) * int(size or 1))


async def test_upgrade_is_busy_during_a_handover(tmp_path: Path) -> None:
    """A third process, and a second request, are told that the generation is busy."""
    successor = {"directory": str(tmp_path), "mode": "hang"}
    async with service(tmp_path, successor=successor, timeout=5) as found:
        port = await found.port()
        async with trio.open_nursery() as nursery:

            async def first() -> None:
                with pytest.raises(UpgradeFailedError, match="timeout"):
                    await found.upgrade()

            nursery.start_soon(first)
            await found.noted("hangs")
            with pytest.raises(TakeOverError) as caught:
                async with open_generation(found.path, name="test"):
                    pass
            assert caught.value.code == IOErrorEnum.BUSY
            with pytest.raises(UpgradeFailedError, match="handing over"):
                await found.upgrade()
        third = found.start(Config(str(tmp_path), port=port))
        assert (await found.noted("ready 2"))[1] == "2"
        assert third.poll() is None


async def test_open_generation_takes_over_by_itself(tmp_path: Path) -> None:
    """A process that was started by itself takes the listeners over by the rendezvous path."""
    async with service(tmp_path) as found, clients(found) as load:
        found.start(Config(str(tmp_path), port=load.port))
        assert (await found.noted("generation 2"))[7] == "11"
        await found.noted("confirmed 2")
        await load.answered_by(2)
        await found.has_ended(1)
        assert (await found.upgrade()).number == 3
        assert set(load.outcomes) == {"answered"}


async def test_open_generation_without_take_over(tmp_path: Path) -> None:
    """take_over=False raises AddressInUseError if another process serves the path."""
    async with service(tmp_path) as found:
        with pytest.raises(AddressInUseError):
            async with open_generation(found.path, name="test", take_over=False):
                pass
        assert stat.S_IMODE(os.stat(found.path).st_mode) == 0o600


async def test_probation_ends_with_release(tmp_path: Path) -> None:
    """During the probation the successor serves, and the one before keeps the listeners."""
    async with (
        service(tmp_path, probation=1.5) as found,
        clients(found) as load,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(found.upgrade)
        await load.answered_by(2)
        assert "replaced 1" not in found.notes()
        await found.noted("replaced 1")
        await found.noted("confirmed 2")
        assert set(load.outcomes) == {"answered"}


async def test_probation_when_successor_is_killed(tmp_path: Path) -> None:
    """If the successor is killed during its probation, the one before accepts again."""
    async with service(tmp_path, probation=30) as found, clients(found) as load:
        async with trio.open_nursery() as nursery:

            async def upgrade() -> None:
                with pytest.raises(UpgradeFailedError, match=r"probation.*SIGKILL"):
                    await found.upgrade()

            nursery.start_soon(upgrade)
            await load.answered_by(2)
            os.kill(found.pid(2), signal.SIGKILL)
        await load.answered_by(1)
        assert load.outcomes["refused"] == 0


async def test_max_draining_ends_the_oldest(tmp_path: Path) -> None:
    """If more generations drain than max_draining, the oldest is told to end at once."""
    config: dict[str, Any] = {"directory": str(tmp_path), "mode": "drain long", "max_draining": 2}
    nested: dict[str, Any] = dict(config)
    for _ in range(4):
        nested = {**config, "successor": nested}
    nested.pop("directory")
    async with service(tmp_path, **nested) as found:
        stream = await trio.open_tcp_stream("127.0.0.1", await found.port())
        async with stream:
            await stream.send_all(b"\n")
            assert (await stream.receive_some(100)).startswith(b"1 ")
            for number in (2, 3):
                await found.upgrade()
                await found.noted(f"confirmed {number}")
            assert "overdue 1" not in found.notes()
            await found.upgrade()
            await found.noted("overdue 1")
            await found.has_ended(1)
            # What it passed on has reached the newest generation, not the next one.
            await stream.send_all(b"\n")
            assert (await stream.receive_some(100)).startswith(b"4 ")


async def test_sigterm_during_an_upgrade_ends_both(tmp_path: Path) -> None:
    """A generation that is told to end during a handover ends the successor, too."""
    successor = {"directory": str(tmp_path), "mode": "hang"}
    async with service(tmp_path, successor=successor) as found:
        async with trio.open_nursery() as nursery:

            async def upgrade() -> None:
                with pytest.raises((UpgradeFailedError, trio.EndOfChannel)):
                    await found.upgrade()

            nursery.start_soon(upgrade)
            await found.noted("hangs")
            found.processes[0].terminate()
            await trio.to_thread.run_sync(found.processes[0].wait, 30)
        assert not os.path.exists(found.path)
        assert not (tmp_path / "admin").exists()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", await found.port()))


################################################################
# Peers that are not what they should be
################################################################


async def test_request_upgrade_is_denied_by_policy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that the policy does not admit is told so before anything is sent, and logged."""
    path = tmp_path / "upgrade"
    async with open_generation(path, name="x", policy=PeerPolicy(check=deny)) as gen:
        await gen.ready()
        with caplog.at_level(logging.WARNING), pytest.raises(PeerDeniedError, match="not admit"):
            await request_upgrade(path)
        assert f"denied the listeners to pid {os.getpid()}" in caplog.text
        with pytest.raises(TakeOverError) as caught:
            async with open_generation(path, name="x"):
                pass
        assert caught.value.code == IOErrorEnum.PERMISSION_DENIED
        with pytest.raises(PeerDeniedError):
            await request_upgrade(path, policy=PeerPolicy(check=deny))
        with pytest.raises(TakeOverError):
            async with open_generation(path, name="x", policy=PeerPolicy(check=deny)):
                pass


def manifest(*entries: ListenerEntry, name: str = "x") -> bytes:
    return Manifest(name, 1, list(entries)).encode()


def entry_for(sock: socket.socket) -> ListenerEntry:
    return ListenerEntry("web", "inet", sock.getsockname())


async def offer_other_address(channel: Channel) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        await channel.send(of.pack_offer(manifest(entry_for(one)), None))
        await channel.send(of.pack_id(of.LISTENERS, 0, carries_fds=True), [two.fileno()])


async def offer_connected_socket(channel: Channel) -> None:
    one, two = socket.socketpair()
    with one, two:
        entry = ListenerEntry("web", "unix", "")
        await channel.send(of.pack_offer(manifest(entry), None))
        await channel.send(of.pack_id(of.LISTENERS, 0, carries_fds=True), [one.fileno()])


async def offer_too_many(channel: Channel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        await channel.send(of.pack_offer(manifest(entry_for(one)), None))
        frame = of.pack_id(of.LISTENERS, 0, carries_fds=True)
        await channel.send(frame, [one.fileno()] * 2)


async def offer_wrong_position(channel: Channel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        await channel.send(of.pack_offer(manifest(entry_for(one)), None))
        frame = of.pack_id(of.LISTENERS, 5, carries_fds=True)
        await channel.send(frame, [one.fileno()])


async def offer_other_service(channel: Channel) -> None:
    await channel.send(of.pack_offer(manifest(name="y"), None))


async def offer_unsealed_state(channel: Channel) -> None:
    fd = os.memfd_create("state")
    await channel.send(of.pack_offer(manifest(), None, in_memory=True), [fd])
    os.close(fd)


async def offer_two_states(channel: Channel) -> None:
    fd = os.memfd_create("state")
    await channel.send(of.pack_offer(manifest(), None, in_memory=True), [fd, fd])
    os.close(fd)


async def offer_unexpected_fds(channel: Channel) -> None:
    fd = os.memfd_create("state")
    frame = bytearray(of.pack_offer(manifest(), None))
    frame[1] = 1
    await channel.send(bytes(frame), [fd])
    os.close(fd)


async def offer_no_frame(channel: Channel) -> None:
    await channel.send(b"\xff" * 100)


async def offer_other_frame(channel: Channel) -> None:
    await channel.send(encode_frame(of.COMMIT))


async def abort(channel: Channel) -> None:
    await channel.send(of.pack_text(of.ABORT, "for a reason"))


@pytest.mark.parametrize(
    ("offer", "said"),
    [
        (offer_other_address, "got the inet socket"),
        (offer_connected_socket, "does not listen"),
        (offer_too_many, "as many listeners"),
        (offer_wrong_position, "next listeners"),
        (offer_other_service, "expected the service 'x'"),
        (offer_unsealed_state, "expected a sealed memfd"),
        (offer_two_states, "got 2 files"),
        (offer_unexpected_fds, "unexpected file descriptors"),
        (offer_no_frame, "frame of at most"),
        (offer_other_frame, "unexpected frame"),
        (abort, "for a reason"),
    ],
)
async def test_open_generation_rejects_lies(
    tmp_path: Path, offer: Callable[[Channel], Any], said: str
) -> None:
    """A manifest that lies is a TakeOverError, and every file descriptor is closed."""
    path = tmp_path / "upgrade"
    answers: list[int] = []

    async def handler(conn: UnixConnection) -> None:
        channel = Channel(conn)
        assert await channel.receive() is not None
        await offer(channel)
        answer = await channel.receive()
        answers.append(0 if answer is None else answer.kind)

    async with trio.open_nursery() as nursery:
        await nursery.start(serve_unix, handler, path)
        with pytest.raises(TakeOverError) as caught:
            async with open_generation(path, name="x"):
                pass
        assert said in str(caught.value)
        await until(lambda: answers)
        nursery.cancel_scope.cancel()
