"""Generation: what it rejects, what it tells, and partners that send what is not expected."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests._helpers.fds import free_descriptors
from tests._helpers.processes import children_of
from tests._helpers.waiting import until
from trio_unixconn import (
    AddressInUseError,
    ConnectionClosedError,
    EndOfStreamError,
    IOErrorEnum,
    PeerDeniedError,
    PeerPolicy,
    SendError,
    SuccessorGoneError,
    TakeOverError,
    UnixConnection,
    UnixConnectionError,
    UpgradeFailedError,
    connection_pair,
    open_unix_connection,
    open_unix_listener,
    testing,
)
from trio_unixconn._frames import close_frames, encode_frame
from trio_unixconn.handover import (
    Phase,
    _channel,
    _generation,
    _protocol as of,
    _spawn,
    _taker,
    open_generation,
    request_upgrade,
)
from trio_unixconn.handover._channel import Channel
from trio_unixconn.handover._manifest import ListenerEntry, Manifest
from trio_unixconn.handover._passing import PassedConnections
from trio_unixconn.handover._predecessor import Predecessor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator
    from pathlib import Path

    from trio_unixconn import UnixListener
    from trio_unixconn._frames import Frame
    from trio_unixconn.handover import Generation


@asynccontextmanager
async def serving(path: Path, **options: Any) -> AsyncGenerator[Generation, None]:
    """Run a first generation that is ready."""
    async with open_generation(path, name="x", **options) as gen:
        await gen.ready()
        yield gen


@asynccontextmanager
async def successor(path: Path, *frames: bytes) -> AsyncGenerator[Channel, None]:
    """Connect as a successor would, and send frames."""
    channel = Channel(await open_unix_connection(path))
    try:
        for frame in frames:
            await channel.send(frame)
        yield channel
    finally:
        channel.close()


async def receive(channel: Channel, kind: int) -> Frame:
    """Return the next frame, which must be of this kind."""
    with trio.fail_after(30):
        frame = await channel.receive()
    assert frame is not None
    assert frame.kind == kind
    return frame


async def text_of(channel: Channel, kind: int) -> str:
    return of.unpack_text((await receive(channel, kind)).body)


HELLO = of.pack_hello("x")


################################################################
# Arguments
################################################################


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"name": 3}, TypeError, "name must be a str, got int"),
        ({"timeout": True}, TypeError, "timeout must be a number, got bool"),
        ({"timeout": 0}, ValueError, "timeout must be positive, got 0"),
        ({"probation": -1}, ValueError, "probation must be non-negative, got -1"),
        ({"max_draining": 0}, ValueError, "max_draining must be a positive int, got 0"),
        ({"path": ""}, ValueError, "path must not be empty"),
    ],
)
async def test_open_generation_rejects_arguments(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    """Wrong arguments are named, and nothing is left at the path."""
    options = {"path": tmp_path / "upgrade", "name": "x", **options}
    with pytest.raises(error, match=said):
        async with open_generation(options.pop("path"), **options):
            pytest.fail("the block was entered")
    assert os.listdir(tmp_path) == []


async def test_generation_rejects_arguments(tmp_path: Path) -> None:
    """Wrong arguments of its methods are named, and nothing happens."""
    async with open_generation(tmp_path / "upgrade", name="x") as gen:
        with pytest.raises(TypeError, match="name must be a str, got int"):
            await gen.listen_tcp(cast("Any", 3), 0)
        with pytest.raises(TypeError, match="port must be an int, got str"):
            await gen.listen_tcp("web", cast("Any", "80"))
        with pytest.raises(ValueError, match="requires an address"):
            await gen.listen_unix("admin", "")
        with pytest.raises(TypeError, match="expected a function, got int"):
            gen.set_state(cast("Any", 3))
        with pytest.raises(RuntimeError, match="requires a successor"):
            await gen.pass_on(cast("Any", None))
        web = await gen.listen_tcp("web", 0)
        with pytest.raises(ValueError, match="has a listener named 'web' already"):
            await gen.listen_tcp("web", 0)
        with pytest.raises(OSError, match="Address already in use"):
            await gen.listen_tcp("other", web.socket.getsockname()[1])
        assert repr(web) == f"<GenerationListener web fd={web.socket.fileno()}>"
        assert repr(gen) == "<Generation 1 of x, starting>"
        await gen.ready()
        assert gen.phase.value == "serving"
        # Servers with generation= may have called it.
        await gen.ready()
        with pytest.raises(RuntimeError, match="before ready"):
            await gen.listen_unix("admin", tmp_path / "admin")
        with pytest.raises(AddressInUseError):
            async with open_generation(tmp_path / "upgrade", name="x", take_over=False):
                pytest.fail("the block was entered")


################################################################
# Two generations in one process
################################################################


async def test_listeners_of_another_address_are_opened(tmp_path: Path) -> None:
    """A listener is inherited only with its name and at its address; the others are closed."""
    path = tmp_path / "upgrade"
    abstract = f"\0trio-unixconn-test-{os.getpid()}"
    async with open_generation(path, name="x") as old:
        first = await old.listen_tcp("web", 0)
        six = await old.listen_tcp("six", 0, host="::1")
        moved = await old.listen_unix("moved", tmp_path / "one")
        hidden = await old.listen_unix("hidden", abstract)
        assert not any(each.inherited for each in (first, six, moved, hidden))
        await old.ready()
        async with open_generation(path, name="x") as new:
            listeners: list[Any] = [
                await new.listen_tcp("web", 0, host="127.0.0.2"),
                await new.listen_tcp("six", 0, host="::1"),
                await new.listen_unix("moved", tmp_path / "two"),
                await new.listen_unix("hidden", abstract),
            ]
            assert [each.inherited for each in listeners] == [False, True, False, True]
            async with trio.open_nursery() as nursery:
                for each in listeners:
                    nursery.start_soon(each.accept)
                await new.ready()
                await new.confirmed()
                await old.replaced()
                nursery.cancel_scope.cancel()


async def test_accept_skips_denied_peers(tmp_path: Path) -> None:
    """A peer that the policy of a Unix listener denies is closed, and the next one is returned."""
    answers = iter([False, True])

    async def check(_: object) -> bool:
        return next(answers)

    async with open_generation(tmp_path / "upgrade", name="x") as gen:
        admin = await gen.listen_unix("admin", tmp_path / "admin", policy=PeerPolicy(check=check))
        await gen.ready()
        async with (
            await open_unix_connection(tmp_path / "admin") as denied,
            await open_unix_connection(tmp_path / "admin") as admitted,
            await admin.accept() as accepted,
        ):
            assert await denied.receive_some() == b""
            await admitted.send_all(b"x")
            assert await accepted.receive_some() == b"x"
        async with trio.open_nursery() as nursery:

            async def accept() -> None:
                with pytest.raises(ConnectionClosedError):
                    await admin.accept()

            nursery.start_soon(accept)
            await wait_all_tasks_blocked()
            gen._gate.shut()


################################################################
# The service manager
################################################################


@attrs.define
class Manager:
    """A service manager that notes what it is told."""

    told: list[str] = attrs.field(factory=list[str])
    address: str | None = None
    watchdog_timeout: float | None = None
    error: Exception | None = None
    hangs: bool = False

    async def _note(self, text: str) -> None:
        await trio.lowlevel.checkpoint()
        self.told.append(text)
        if self.hangs:
            await trio.sleep_forever()
        if self.error is not None:
            raise self.error

    async def ready(self) -> None:
        await self._note("ready")

    async def reloading(self) -> None:
        await self._note("reloading")

    async def stopping(self) -> None:
        await self._note("stopping")

    async def main_pid(self, pid: int | None = None) -> None:
        await self._note(f"main pid {pid}")

    async def barrier(self) -> None:
        await self._note("barrier")


async def test_service_manager_is_told_in_order(tmp_path: Path) -> None:
    """The old one says the main pid and waits, then the new one is ready; the old one is silent."""
    path, old_manager, new_manager = tmp_path / "upgrade", Manager(), Manager()
    async with serving(path, service_manager=old_manager) as old:
        await until(lambda: old_manager.told == ["ready"])
        async with open_generation(path, name="x", service_manager=new_manager) as new:
            await new.ready()
            await new.confirmed()
            await old.replaced()
            await until(lambda: new_manager.told == ["ready"])
        assert new_manager.told == ["ready", "stopping"]
    assert old_manager.told == ["ready", "reloading", f"main pid {os.getpid()}", "barrier"]


async def test_service_manager_that_fails_or_hangs_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not end the service."""
    monkeypatch.setattr(_generation, "MANAGER_TIMEOUT", 0.05)
    error = OSError(errno.ECONNREFUSED, "nobody there")
    async with serving(tmp_path / "one", service_manager=Manager(error=error)) as gen:
        await until(lambda: "cannot tell the service manager" in caplog.text)
        assert gen.phase.value == "serving"
    async with serving(tmp_path / "two", service_manager=Manager(hangs=True)):
        await until(lambda: caplog.text.count("cannot tell the service manager") == 3)


async def test_successor_gets_the_variables_of_the_service_manager(tmp_path: Path) -> None:
    """NOTIFY_SOCKET, and WATCHDOG_USEC if the manager expects heartbeats."""
    manager = Manager(address="/run/notify")
    async with serving(tmp_path / "upgrade", service_manager=manager) as gen:
        assert gen._environment() == {"NOTIFY_SOCKET": "/run/notify"}
        manager.watchdog_timeout = 1.5
        assert gen._environment()["WATCHDOG_USEC"] == "1500000"


async def test_generation_that_goes_on_alone_says_the_main_pid(tmp_path: Path) -> None:
    """When the one before has ended, the successor says that it is the main process."""
    path, manager = tmp_path / "upgrade", Manager()
    async with predecessor(path) as (before, nursery):
        nursery.start_soon(before.offer_nothing_and_end)
        async with open_generation(path, name="x", service_manager=manager) as new:
            assert new.number == 8
            await new.ready()
            await until(lambda: manager.told == [f"main pid {os.getpid()}", "ready"])


################################################################
# Successors
################################################################


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        ([encode_frame(of.HELLO, b"x")], "sent what is not expected"),
        ([of.pack_hello("y")], "expected a successor of the service 'x', got 'y'"),
        ([of.pack_hello("x", 99)], "version 99"),
        ([HELLO, of.pack_text(of.FAILED, "for a reason")], "cannot take over"),
        ([HELLO, encode_frame(of.SERVING)], "unexpected frame SERVING"),
        ([HELLO, of.pack_id(of.TAKEN, 5)], "expected an answer to the listeners"),
        ([HELLO, of.pack_id(of.REFUSED, 0)], "no free file descriptor for a listener"),
        ([HELLO, of.pack_id(of.TAKEN, 0), encode_frame(of.SERVING)], "unexpected frame SERVING"),
        ([HELLO, of.pack_id(of.TAKEN, 0), encode_frame(99)], "unexpected frame 99"),
    ],
)
async def test_handover_to_a_successor_that_violates_the_protocol(
    tmp_path: Path, frames: list[bytes], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told to end, with the reason in the log, and this generation accepts as before."""
    path = tmp_path / "upgrade"
    async with open_generation(path, name="x") as gen:
        web = await gen.listen_tcp("web", 0)
        await gen.ready()
        async with successor(path, *frames) as channel:
            await until(lambda: said in caplog.text)
            with trio.fail_after(30):
                while (frame := await channel.receive()) is not None:
                    close_frames([frame])
                    last = frame.kind
            assert last == of.ABORT
        await until(lambda: gen.phase.value == "serving")
        async with (
            await trio.open_tcp_stream(*web.socket.getsockname()),
            await web.accept(),
        ):
            assert not gen._replaced.is_set()


@pytest.mark.parametrize("count", range(4))
async def test_handover_to_a_successor_that_ends(
    tmp_path: Path, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    """At whatever frame it ends, this generation serves as before."""
    path = tmp_path / "upgrade"
    frames = [HELLO, of.pack_id(of.TAKEN, 0), of.pack_prepared(["web"]), encode_frame(of.SERVING)]
    async with open_generation(path, name="x", probation=60) as gen:
        web = await gen.listen_tcp("web", 0)
        await gen.ready()
        async with successor(path, *frames[: count + 1]):
            pass
        await until(lambda: "the successor has ended" in caplog.text)
        await until(lambda: gen.phase.value == "serving")
        async with await trio.open_tcp_stream(*web.socket.getsockname()), await web.accept():
            pass


async def test_handover_says_why_a_successor_has_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What it has said last is in the log, even if nothing more can be sent to it."""
    path = tmp_path / "upgrade"
    async with serving(path) as gen:
        async with successor(path) as channel:
            # From now on the generation cannot send.
            channel._conn.socket.shutdown(socket.SHUT_RD)
            for frame in (HELLO, encode_frame(99), of.pack_text(of.FAILED, "the last word")):
                await channel.send(frame)
            await until(lambda: "the last word" in caplog.text)
        await until(lambda: gen.phase.value == "serving")


async def test_handover_when_the_kernel_refuses_the_listeners(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handover fails, with the limit in the log."""
    send = Channel.send

    async def refuse(self: Channel, frame: bytes, fds: Any = ()) -> bool:
        if frame[0] == of.OFFER:
            raise SendError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        return await send(self, frame, fds)

    monkeypatch.setattr(Channel, "send", refuse)
    async with serving(tmp_path / "upgrade") as gen:
        async with successor(tmp_path / "upgrade", HELLO) as channel:
            assert "cannot send the listeners" in await text_of(channel, of.ABORT)
        await until(lambda: gen.phase.value == "serving")
    assert "Too many references" in caplog.text


@pytest.mark.parametrize("refuses", [False, True])
async def test_handover_when_the_successor_ends_before_it_is_released(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    *,
    refuses: bool,
) -> None:
    """Nothing is given up: this generation accepts again, and says that it is the main process."""
    send, manager = Channel.send, Manager()

    async def fail(self: Channel, frame: bytes, fds: Any = ()) -> bool:
        if frame[0] != of.RELEASED:
            return await send(self, frame, fds)
        if refuses:
            raise SendError(errno.EMFILE, os.strerror(errno.EMFILE))
        return False

    monkeypatch.setattr(Channel, "send", fail)
    path = tmp_path / "upgrade"
    async with serving(path, service_manager=manager) as gen:
        frames = [HELLO, of.pack_prepared([]), encode_frame(of.SERVING)]
        async with successor(path, *frames) as channel:
            await receive(channel, of.OFFER)
            await receive(channel, of.COMMIT)
            assert "before it was told" in await text_of(channel, of.ABORT)
        await until(lambda: gen.phase.value == "serving")
        mine = f"main pid {os.getpid()}"
        told = ["ready", "reloading", mine, "barrier", mine, "barrier", "ready"]
        assert manager.told == told
    assert ("cannot pass on draining generations" in caplog.text) is refuses


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda: cast("bytes", "text"), "must return bytes, got str"),
        (lambda: cast("bytes", 1 // 0), "raised ZeroDivisionError"),
    ],
)
async def test_set_state_of_a_function_that_fails(tmp_path: Path, function: Any, said: str) -> None:
    """The handover fails, and this generation serves."""
    async with serving(tmp_path / "upgrade") as gen:
        gen.set_state(function)
        async with successor(tmp_path / "upgrade", HELLO) as channel:
            assert said in await text_of(channel, of.ABORT)
        await until(lambda: gen.phase.value == "serving")


async def test_upgrade_of_a_program_that_is_missing(tmp_path: Path) -> None:
    """The error says so, and nothing is left."""
    async with serving(tmp_path / "upgrade", command=["/no/such/program"]) as gen:
        with pytest.raises(UpgradeFailedError, match="cannot start the successor"):
            await gen.upgrade()
        with pytest.raises(UpgradeFailedError, match="cannot start the successor"):
            await request_upgrade(tmp_path / "upgrade")
        with pytest.raises(UpgradeFailedError, match="has ended before it asked") as caught:
            await gen.upgrade([sys.executable, "-c", "raise SystemExit('too bad')"])
        assert "too bad" in caught.value.traceback
        assert gen.phase.value == "serving"


################################################################
# Clients of the rendezvous path
################################################################


async def test_client_that_sends_nothing_or_something_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is closed, and the others are answered."""
    monkeypatch.setattr(_generation, "HELLO_TIMEOUT", 0.05)
    path = tmp_path / "upgrade"
    async with serving(path, command=["/no/such/program"]):
        async with successor(path) as channel:
            assert await channel.receive() is None
        async with successor(path, encode_frame(of.SERVING)) as channel:
            assert await channel.receive() is None
        await until(lambda: "was not answered" in caplog.text)
        with pytest.raises(UpgradeFailedError):
            await request_upgrade(path)


async def test_client_whose_check_raises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One client does not end the server."""

    async def check(_: object) -> bool:
        raise ZeroDivisionError("not expected")

    async with serving(tmp_path / "upgrade", policy=PeerPolicy(check=check)) as gen:
        async with successor(tmp_path / "upgrade", HELLO) as channel:
            assert await channel.receive() is None
        assert gen.phase.value == "serving"
    assert "not expected" in caplog.text


async def test_accepting_clients_without_a_free_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again after a pause."""
    path = tmp_path / "upgrade"
    async with serving(path, command=["/no/such/program"]) as gen:
        assert gen._rendezvous is not None
        listener = gen._rendezvous
        accept = type(listener).accept
        failures = iter([OSError(errno.EMFILE, os.strerror(errno.EMFILE))])

        async def accept_or_fail(self: UnixListener) -> Any:
            for failure in failures:
                raise failure
            return await accept(self)

        monkeypatch.setattr(type(listener), "accept", accept_or_fail)
        for _ in range(2):
            with pytest.raises(UpgradeFailedError):
                await request_upgrade(path)


async def test_request_upgrade_when_the_generation_ends(tmp_path: Path) -> None:
    """The end of the connection is an EndOfStreamError, a denial a PeerDeniedError."""
    path = tmp_path / "upgrade"
    async with await open_unix_listener(path) as listener, trio.open_nursery() as nursery:

        async def end() -> None:
            async with await listener.accept():
                pass

        async def deny() -> None:
            channel = Channel(await listener.accept())
            await receive(channel, of.REQUEST)
            await channel.send(of.pack_text(of.DENIED, "for a reason"))
            channel.close()

        nursery.start_soon(end)
        with pytest.raises(EndOfStreamError):
            await request_upgrade(path)
        nursery.start_soon(deny)
        with pytest.raises(PeerDeniedError, match="for a reason"):
            await request_upgrade(path)


################################################################
# Predecessors
################################################################


@attrs.define
class Before:
    """A generation before, as a test wants it to be."""

    listener: UnixListener

    async def accept(self) -> Channel:
        channel = Channel(await self.listener.accept())
        await receive(channel, of.HELLO)
        return channel

    async def say(self, *frames: bytes, close: bool = False) -> None:
        """Send frames to a successor, and read what it answers until it ends."""
        channel = await self.accept()
        try:
            for frame in frames:
                await channel.send(frame)
            if not close:
                while await channel.receive() is not None:
                    pass
        finally:
            channel.close()

    async def offer_nothing_and_end(self) -> None:
        """Offer no listeners, and end when the successor is prepared."""
        channel = await self.accept()
        await channel.send(OFFER)
        await receive(channel, of.PREPARED)
        await self.listener.aclose()
        channel.close()


@asynccontextmanager
async def predecessor(path: Path) -> AsyncGenerator[tuple[Before, trio.Nursery], None]:
    async with await open_unix_listener(path) as listener, trio.open_nursery() as nursery:
        yield Before(listener), nursery
        nursery.cancel_scope.cancel()


OFFER = of.pack_offer(Manifest("x", 7, []).encode(), None)


@pytest.mark.parametrize(
    ("frames", "said", "code"),
    [
        ([of.pack_text(of.BUSY, "just now")], "is busy: just now", IOErrorEnum.BUSY),
        ([of.pack_text(of.DENIED, "no")], "denied this process", IOErrorEnum.PERMISSION_DENIED),
        ([of.pack_offer(Manifest("x", 7, []).encode(), None, in_memory=True)], "offered", None),
    ],
)
async def test_open_generation_that_is_refused(
    tmp_path: Path, frames: list[bytes], said: str, code: IOErrorEnum | None
) -> None:
    """The reason is in the error."""
    async with predecessor(tmp_path / "upgrade") as (before, nursery):
        nursery.start_soon(partial(before.say, *frames))
        with pytest.raises(TakeOverError, match=said) as caught:
            async with open_generation(tmp_path / "upgrade", name="x"):
                pytest.fail("the block was entered")
        assert code in (None, caught.value.code)


async def test_open_generation_of_a_predecessor_that_says_nothing(tmp_path: Path) -> None:
    """After the timeout this fails: the other process may be alive, and may serve."""
    path = tmp_path / "upgrade"
    async with predecessor(path) as (before, nursery):
        nursery.start_soon(before.say)
        with pytest.raises(TakeOverError, match=r"did not answer within 0\.05 s"):
            async with open_generation(path, name="x", timeout=0.05):
                pytest.fail("the block was entered")
        nursery.start_soon(partial(before.say, OFFER))
        with pytest.RaisesGroup(TakeOverError):
            async with open_generation(path, name="x", timeout=0.5) as gen:
                await gen.ready()


async def test_open_generation_tries_again_when_the_other_one_has_ended(tmp_path: Path) -> None:
    """One that ends before it has offered anything was replaced, or died: what is there now?"""
    path = tmp_path / "upgrade"
    async with predecessor(path) as (before, nursery):

        async def end_twice() -> None:
            await before.say(close=True)
            channel = await before.accept()
            await before.listener.aclose()
            channel.close()

        nursery.start_soon(end_twice)
        async with open_generation(path, name="x") as gen:
            assert gen.number == 1
            await gen.ready()


async def test_open_generation_whose_policy_denies_the_predecessor(tmp_path: Path) -> None:
    """Nothing is taken from a process that the policy does not admit."""

    async def deny(_: object) -> bool:
        return False

    async with await open_unix_listener(tmp_path / "upgrade"):
        with pytest.raises(TakeOverError, match="does not admit") as caught:
            async with open_generation(
                tmp_path / "upgrade", name="x", policy=PeerPolicy(check=deny)
            ):
                pytest.fail("the block was entered")
        assert caught.value.code == IOErrorEnum.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        ([encode_frame(of.RELEASED)], "unexpected frame 22"),
        ([encode_frame(of.COMMIT), encode_frame(of.COMMIT), b"\xff" * 100], "broke the protocol"),
        ([of.pack_text(of.ABORT, "for a reason")], "for a reason"),
    ],
)
async def test_predecessor_that_violates_the_protocol_after_the_offer(
    tmp_path: Path, frames: list[bytes], said: str
) -> None:
    """The successor ends, because the other process may serve."""
    async with predecessor(tmp_path / "upgrade") as (before, nursery):
        nursery.start_soon(partial(before.say, OFFER, *frames))
        with pytest.RaisesGroup(
            pytest.RaisesExc(TakeOverError, match=said), flatten_subgroups=True
        ):
            async with open_generation(tmp_path / "upgrade", name="x") as gen:
                await gen.ready()
                await trio.sleep_forever()


async def test_successor_that_cannot_take_the_rendezvous_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is logged, and the service goes on."""
    path = tmp_path / "upgrade"
    async with serving(path) as old, open_generation(path, name="x") as new:

        async def fail(*_: object, **__: object) -> None:
            await trio.lowlevel.checkpoint()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(_generation, "open_unix_listener", fail)
        await new.ready()
        await new.confirmed()
        await old.replaced()
    assert "cannot take the rendezvous path" in caplog.text


async def test_rendezvous_path_that_cannot_be_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged when the generation ends."""
    async with serving(tmp_path / "upgrade") as gen:
        assert gen._rendezvous is not None
        close = gen._rendezvous.aclose

        async def fail() -> None:
            await close()
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        cast("Any", gen._rendezvous).aclose = fail
    assert "cannot remove the rendezvous path" in caplog.text


@pytest.mark.parametrize("kind", [of.FINISH, of.HELLO])
async def test_frames_of_a_successor_after_the_release(
    tmp_path: Path, kind: int, caplog: pytest.LogCaptureFixture
) -> None:
    """FINISH sets overdue(); another frame is logged, and this generation goes on draining."""
    path = tmp_path / "upgrade"
    async with serving(path) as gen:
        frames = [HELLO, of.pack_prepared([]), encode_frame(of.SERVING)]
        async with successor(path, *frames) as channel:
            await gen.replaced()
            await channel.send(encode_frame(kind))
            if kind == of.FINISH:
                await gen.overdue()
            else:
                await until(lambda: "the successor broke the protocol" in caplog.text)


async def test_pass_on_sends_nothing_after_the_successor_broke_the_protocol(
    tmp_path: Path,
) -> None:
    """A message that waits to be sent stays here, with the connection that is given back."""
    path = tmp_path / "upgrade"
    async with serving(path) as gen:
        frames = [HELLO, of.pack_prepared([]), encode_frame(of.SERVING)]
        async with successor(path, *frames) as channel, trio.open_nursery() as nursery:
            await gen.replaced()
            for kind in (of.OFFER, of.COMMIT, of.RELEASED):
                await receive(channel, kind)
            one, two = connection_pair()
            settled = trio.Event()

            async def pass_on() -> None:
                with pytest.raises(SuccessorGoneError):
                    await gen.pass_on(one)
                settled.set()

            assert gen._successor is not None
            testing.clog(gen._successor._conn)
            nursery.start_soon(pass_on)
            await wait_all_tasks_blocked()
            await channel.send(encode_frame(of.HELLO))
            await settled.wait()
            fds = 0
            with suppress(UnixConnectionError):
                while (message := await channel._conn.receive_message(2**20)).data:
                    fds += len(message.fds)
            assert fds == 0
            async with one, two:
                await one.send_all(b"x")
                assert await two.receive_some(10) == b"x"


################################################################
# The environment and the process of a successor
################################################################


@pytest.mark.parametrize("value", ["", "x", "1:2", "-1:0:0", "100000:1:2", f"{2**70}:1:2"])
def test_inherited_connection_of_an_invalid_variable(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """It is not for this process, and is taken out of the environment."""
    monkeypatch.setenv(_spawn.VARIABLE, value)
    assert _spawn.inherited_connection() is None
    assert _spawn.VARIABLE not in os.environ


def test_inherited_connection_of_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number may belong to another file by now, which the inode shows."""
    monkeypatch.setenv(_spawn.VARIABLE, "0:1:2")
    assert _spawn.inherited_connection() is None


def test_start_of_a_successor_without_a_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is left, because nothing could wait for its end."""

    def fail(_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = set(children_of(os.getpid()))
    monkeypatch.setattr(os, "pidfd_open", fail)
    with pytest.raises(OSError, match="Too many open files"):
        _spawn.start([sys.executable, "-c", "import time; time.sleep(1000)"], {})
    assert set(children_of(os.getpid())) == before


async def test_wait_of_a_successor_says_how_it_ended() -> None:
    """By a status, by a signal with a name, or by one without."""
    for program, said in (
        ("raise SystemExit(3)", "exited with status 3"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        ("import os; os.kill(os.getpid(), 40)", "was killed by signal 40"),
    ):
        process = _spawn.start([sys.executable, "-c", program], {})
        try:
            assert await process.wait() == said
            assert await process.end() == said
        finally:
            process.close()
            await process.conn.aclose()


################################################################
# Moments that are hard to meet
################################################################


async def test_listen_waits_for_the_address_of_a_generation_that_died(tmp_path: Path) -> None:
    """Its process may hold the address for a moment after its connection has ended."""
    async with open_generation(tmp_path / "upgrade", name="x") as gen, trio.open_nursery() as tasks:
        gen._had_predecessor = True
        holder = socket.create_server(("127.0.0.1", 0))

        async def close() -> None:
            await wait_all_tasks_blocked()
            holder.close()

        tasks.start_soon(close)
        web = await gen.listen_tcp("web", holder.getsockname()[1])
        assert not web.inherited


def kill(pid: int) -> None:
    """Kill a child process, and reap it."""
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0) == (pid, signal.SIGKILL)


async def test_upgrade_when_the_program_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The successor is not told to end: it is to go on without this process."""
    started: list[_spawn.SuccessorProcess] = []
    start = _spawn.start

    def note(*arguments: Any, **options: Any) -> _spawn.SuccessorProcess:
        started.append(start(*arguments, **options))
        return started[-1]

    async def ask() -> None:
        with pytest.raises((EndOfStreamError, UpgradeFailedError)):
            await request_upgrade(tmp_path / "upgrade")

    monkeypatch.setattr(_spawn, "start", note)
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    async with trio.open_nursery() as nursery:
        with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="late"), flatten_subgroups=True):
            async with serving(tmp_path / "upgrade", command=sleeping):
                nursery.start_soon(ask)
                await until(lambda: started)
                raise ValueError("too late")
    (process,) = started
    # It is alive.
    kill(process.pid)


async def test_handover_when_this_generation_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The successor is told to end, with that reason."""
    path = tmp_path / "upgrade"
    async with trio.open_nursery() as nursery:

        async def follow() -> None:
            async with successor(path, HELLO) as channel:
                await receive(channel, of.OFFER)
                offered.set()
                await receive(channel, of.ABORT)

        offered = trio.Event()
        async with serving(path):
            nursery.start_soon(follow)
            await offered.wait()
    assert "this generation ends" in caplog.text


async def test_successor_that_ends_after_the_release(tmp_path: Path) -> None:
    """Names that it does not know are ignored, and the rendezvous path is left to it."""
    path = tmp_path / "upgrade"
    async with serving(path) as gen:
        frames = [HELLO, of.pack_prepared(["unknown"]), encode_frame(of.SERVING)]
        async with successor(path, *frames):
            await gen.replaced()
        rendezvous = gen._rendezvous
        assert rendezvous is not None
        await until(lambda: rendezvous.socket.fileno() == -1)


async def test_successor_that_ends_while_it_takes_the_listeners(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """This generation serves as before."""
    path = tmp_path / "upgrade"
    async with open_generation(path, name="x") as gen:
        await gen.listen_tcp("web", 0)
        await gen.ready()
        async with successor(path, HELLO) as channel:
            await receive(channel, of.OFFER)
            close_frames([await receive(channel, of.LISTENERS)])
        await until(lambda: "while it took the listeners" in caplog.text)
        await until(lambda: gen.phase.value == "serving")


async def test_inherited_connection_of_a_process_that_the_policy_denies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is taken from it."""

    async def deny(_: object) -> bool:
        return False

    one, two = socket.socketpair()
    inode, stderr = os.fstat(two.fileno()).st_ino, os.dup(2)
    monkeypatch.setenv(_spawn.VARIABLE, f"{two.detach()}:{inode}:{stderr}")
    with one, pytest.raises(TakeOverError, match="does not admit"):
        async with open_generation(tmp_path / "upgrade", name="x", policy=PeerPolicy(check=deny)):
            pytest.fail("the block was entered")
    # It is closed if it could take the place of standard error.
    with suppress(OSError):
        os.close(stderr)


async def test_inherited_connection_is_closed_when_the_policy_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that has started this one sees the end, whatever the policy raises."""

    async def fail(_: object) -> bool:
        raise KeyError("a fault of the policy")

    policy = PeerPolicy(check=fail)
    one, two = connection_pair()
    monkeypatch.setattr(_spawn, "inherited_connection", lambda: two)
    async with one:
        with pytest.raises(KeyError, match="a fault of the policy"):
            async with open_generation(tmp_path / "upgrade", name="x", policy=policy):
                pytest.fail("the block was entered")
        assert two.is_closed()


async def test_open_generation_beside_another_one_that_does_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If another process takes the path first, this one asks it for the listeners."""
    failures = iter([AddressInUseError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))])

    async def listen_or_fail(*arguments: Any, **options: Any) -> UnixListener:
        for failure in failures:
            await trio.lowlevel.checkpoint()
            raise failure
        return await open_unix_listener(*arguments, **options)

    monkeypatch.setattr(_generation, "open_unix_listener", listen_or_fail)
    async with serving(tmp_path / "upgrade") as gen:
        assert gen.number == 1


async def test_predecessor_that_ends_before_the_successor_is_ready(tmp_path: Path) -> None:
    """The successor has what was offered, and serves when it is ready."""
    async with predecessor(tmp_path / "upgrade") as (before, nursery):
        nursery.start_soon(partial(before.say, OFFER, close=True))
        async with open_generation(tmp_path / "upgrade", name="x") as gen:
            await before.listener.aclose()
            await until(lambda: gen._before is None)
            await gen.ready()
            assert gen.number == 8


async def test_predecessor_that_ends_before_it_has_sent_the_listeners(tmp_path: Path) -> None:
    """What has not arrived is opened."""
    offer = of.pack_offer(Manifest("x", 7, [ListenerEntry("web", "unix", "")]).encode(), None)
    async with predecessor(tmp_path / "upgrade") as (before, nursery):
        nursery.start_soon(partial(before.say, offer, close=True))
        async with open_generation(tmp_path / "upgrade", name="x") as gen:
            await before.listener.aclose()
            assert not (await gen.listen_unix("web", tmp_path / "web")).inherited
            await gen.ready()


async def test_offer_of_a_state_without_a_free_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has dropped it: the successor says so, and ends."""
    receive_frame = Channel.receive

    async def drop(self: Channel) -> Frame | None:
        frame = await receive_frame(self)
        if frame is None or frame.kind != of.OFFER:
            return frame
        close_frames([frame])
        return frame._replace(fds=None)

    path = tmp_path / "upgrade"
    async with serving(path) as gen:
        gen.set_state(lambda: b"x" * (of.MAX_INLINE_STATE + 1))
        monkeypatch.setattr(Channel, "receive", drop)
        with pytest.raises(TakeOverError, match="no file descriptor is free for the state"):
            async with open_generation(path, name="x"):
                pytest.fail("the block was entered")
        await until(lambda: gen.phase.value == "serving")


async def test_successor_that_leaves_before_it_serves(tmp_path: Path) -> None:
    """It says so, and the one before serves as before."""
    async with predecessor(tmp_path / "upgrade") as (before, nursery):
        said: list[str] = []

        async def offer() -> None:
            channel = await before.accept()
            await channel.send(OFFER)
            said.append(await text_of(channel, of.FAILED))
            channel.close()

        nursery.start_soon(offer)
        async with open_generation(tmp_path / "upgrade", name="x"):
            pass
        await until(lambda: said)
    assert said == ["its program has left open_generation() before it served"]


async def test_handover_without_a_pidfd_of_the_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then only the end of the connection says that a process has ended."""
    asked: list[object] = []

    def fail(conn: object) -> int:
        asked.append(conn)
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))

    monkeypatch.setattr(UnixConnection, "open_peer_pidfd", fail)
    path = tmp_path / "upgrade"
    async with serving(path) as old, open_generation(path, name="x") as new:
        with trio.fail_after(30):
            await new.ready()
            await new.confirmed()
            await old.replaced()
        assert (old.phase, new.phase) == (Phase.RELEASED, Phase.SERVING)
        # Each of the two about the other.
        assert len(asked) == 2


async def test_request_upgrade_that_cannot_be_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generation has ended meanwhile."""

    async def fail(*_: object) -> bool:
        await trio.lowlevel.checkpoint()
        return False

    monkeypatch.setattr(Channel, "send", fail)
    async with await open_unix_listener(tmp_path / "upgrade"):
        with pytest.raises(EndOfStreamError):
            await request_upgrade(tmp_path / "upgrade")


async def test_channel_forgets_its_process() -> None:
    """The task that watches the process ends, and the connection goes on."""
    one, two = connection_pair()
    channel = Channel(one, os.pidfd_open(os.getpid()))
    async with two, trio.open_nursery() as nursery:
        nursery.start_soon(channel.watch_process)
        await wait_all_tasks_blocked()
        channel.forget_process()
        await wait_all_tasks_blocked()
        assert await channel.send(encode_frame(of.MOVED))
        assert not nursery.child_tasks
    channel.close()


@contextmanager
def passed_connections() -> Generator[PassedConnections, None, None]:
    connections = PassedConnections()
    try:
        yield connections
    finally:
        connections.close()


async def test_predecessor_that_is_not_followed_any_more() -> None:
    """One that has been given on to the next generation may end, too."""
    one, two = connection_pair()
    draining: list[Predecessor] = []
    with passed_connections() as connections:
        await two.aclose()
        await Predecessor(Channel(one), connections, draining).run()
        assert repr(connections) == "<PassedConnections: 0 received, 0 not taken>"
    assert draining == []


def test_default_command() -> None:
    """It starts this program again, with its options."""
    assert _spawn.default_command() == [sys.executable, *sys.orig_argv[1:]]


async def test_start_with_a_closed_standard_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """An end of the channel does not become a standard stream of the successor."""
    fstat, closed = os.fstat, iter([0])

    def fail_once(fd: int) -> os.stat_result:
        if next(closed, None) == fd:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return fstat(fd)

    monkeypatch.setattr(os, "fstat", fail_once)
    process = _spawn.start([sys.executable, "-c", ""], {})
    try:
        assert await process.wait() == "exited with status 0"
    finally:
        process.close()
        await process.conn.aclose()


async def test_send_to_a_process_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while it is taken for one that has ended, also if the task is cancelled."""
    monkeypatch.setattr(_channel, "SEND_TIMEOUT", 0.05)
    one, two = connection_pair()
    channel = Channel(one)
    async with two:
        with trio.CancelScope() as scope:
            scope.cancel()
            assert not await channel.send(encode_frame(of.OFFER, bytes(10_000_000)))
            assert not await channel.send(encode_frame(of.MOVED))
    channel.close()


async def test_send_to_a_process_that_has_ended() -> None:
    """send() says so, and a successor that cannot ask for anything takes nothing."""
    one, two = connection_pair()
    await two.aclose()
    channel = Channel(one)
    assert not await channel.send(encode_frame(of.MOVED))
    assert await _taker.take(channel, "x") is None
    channel.close()


async def test_request_upgrade_waits_for_the_start(tmp_path: Path) -> None:
    """While a generation starts, an upgrade waits, and fails after its time limit."""
    path = tmp_path / "upgrade"
    async with open_generation(path, name="x", timeout=0.2):
        with pytest.raises(UpgradeFailedError, match=r"still starting after 0\.2 s") as caught:
            await request_upgrade(path)
        assert caught.value.code == IOErrorEnum.TIMED_OUT


async def test_upgrade_begins_when_the_start_is_over(tmp_path: Path) -> None:
    """An upgrade that was asked for during the start goes on afterwards."""
    async with (
        open_generation(tmp_path / "upgrade", name="x", command=["/nonexistent"]) as gen,
        trio.open_nursery() as nursery,
    ):
        failed = trio.Event()

        async def upgrade() -> None:
            with pytest.raises(UpgradeFailedError, match="cannot start the successor"):
                await gen.upgrade(timeout=30)
            failed.set()

        nursery.start_soon(upgrade)
        await wait_all_tasks_blocked()
        assert not failed.is_set()
        await gen.ready()
        await failed.wait()


async def test_upgrade_of_a_generation_that_is_retired_while_it_starts(tmp_path: Path) -> None:
    """retire() ends the wait for the start, because there will be no upgrade."""
    async with open_generation(tmp_path / "upgrade", name="x") as gen:

        async def retire() -> None:
            await wait_all_tasks_blocked()
            gen.retire()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(retire)
            with pytest.raises(UpgradeFailedError, match="draining"):
                await gen.upgrade(timeout=30)


async def test_retire_gives_up_a_handover(tmp_path: Path) -> None:
    """The successor is told to end, and the rendezvous path is removed and not opened again."""
    path = tmp_path / "upgrade"
    async with serving(path) as gen, successor(path, HELLO) as channel:
        await receive(channel, of.OFFER)
        assert gen.successor_pid is None
        gen.retire()
        await receive(channel, of.ABORT)
        await until(lambda: not path.exists())
        await gen._try_open_rendezvous()
        assert not path.exists()


async def test_retire_after_the_release(tmp_path: Path) -> None:
    """It does nothing: the rendezvous path is the successor's."""
    path = tmp_path / "upgrade"
    async with serving(path) as old, open_generation(path, name="x") as new:
        await new.ready()
        await new.confirmed()
        await old.replaced()
        old.retire()
        assert not old._is_retired
        assert old._rendezvous is None or path.exists()


async def test_wait_settled_waits_for_the_end_of_a_handover(tmp_path: Path) -> None:
    """While no generation accepts, it is not certain which one will."""
    async with serving(tmp_path / "upgrade") as gen, trio.open_nursery() as nursery:
        found: list[bool] = []

        async def wait() -> None:
            found.append(await gen._wait_settled())

        gen._phase = Phase.HANDING_OVER
        gen._gate.block()
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        gen._gate.notify()
        await wait_all_tasks_blocked()
        assert found == []
        gen._phase = Phase.SERVING
        gen._gate.open()
        await wait_all_tasks_blocked()
        assert found == [False]


async def test_predecessor_that_ends_the_handover_of_a_retired_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A successor that ends is told so by the one before, which is not another error."""

    async def aborted(_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise TakeOverError("it has ended the handover")

    async with open_generation(tmp_path / "upgrade", name="x") as gen:
        monkeypatch.setattr(gen, "_await_released", aborted)
        one, two = connection_pair()
        channel = Channel(one)
        with pytest.raises(TakeOverError):
            await gen._follow_before(channel)
        gen._is_retired = True
        await gen._follow_before(channel)
        channel.close()
        await two.aclose()


async def test_generation_that_ends_before_its_path_is_open_closes_older_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generations that drain see the end of a successor that was just released."""
    one, older_peer = connection_pair()
    two, before_peer = connection_pair()
    older, before = Channel(one), Channel(two)

    async def released(_: object) -> list[Channel]:
        await trio.lowlevel.checkpoint()
        return [older]

    async with older_peer, before_peer:
        async with open_generation(tmp_path / "upgrade", name="x") as gen:
            monkeypatch.setattr(gen, "_await_released", released)
            monkeypatch.setattr(gen, "_try_open_rendezvous", trio.sleep_forever)
            gen._before = before
            gen._nursery.start_soon(gen._follow_before, before)
            await wait_all_tasks_blocked()
        assert one.is_closed()
        assert two.is_closed()


async def test_upgrade_after_a_listener_was_closed(tmp_path: Path) -> None:
    """The successor is offered the listeners that are open; trio.serve_listeners closes some."""
    path = tmp_path / "upgrade"
    async with open_generation(path, name="x") as gen:
        closed = await gen.listen_tcp("closed", 0)
        await gen.listen_tcp("web", 0)
        await gen.ready()
        await closed.aclose()
        async with successor(path, HELLO) as channel:
            offer = of.unpack_offer((await receive(channel, of.OFFER)).body)
            assert [each.name for each in Manifest.decode(offer.manifest).listeners] == ["web"]
            frame = await receive(channel, of.LISTENERS)
            assert frame.fds is not None
            assert len(frame.fds) == 1
            close_frames([frame])
        await until(lambda: gen.phase is Phase.SERVING)


async def test_upgrade_without_a_free_descriptor_for_the_state(tmp_path: Path) -> None:
    """The successor is told why, and this generation serves as before."""
    path = tmp_path / "upgrade"
    with ExitStack() as stack:

        def state() -> bytes:
            stack.enter_context(free_descriptors(0))
            return bytes(of.MAX_INLINE_STATE + 1)

        async with serving(path) as gen:
            gen.set_state(state)
            async with successor(path, HELLO) as channel:
                said = await text_of(channel, of.ABORT)
                stack.close()
            assert said.startswith("cannot make memory for the state: ")
            await until(lambda: gen.phase is Phase.SERVING)


async def test_generation_that_ends_while_a_failed_handover_is_told(tmp_path: Path) -> None:
    """It waits until the service manager was told."""
    path = tmp_path / "upgrade"
    async with trio.open_nursery() as nursery:

        async def finish() -> None:
            await wait_all_tasks_blocked()
            gen._phase = Phase.SERVING
            gen._attempt_over.set()

        async with serving(path) as gen:
            gen._phase, gen._attempt_over = Phase.HANDING_OVER, trio.Event()
            nursery.start_soon(finish)
    assert gen._attempt is None
