"""Parts of ``serve --upgrade-socket`` whose processes are not measured, or are hard to meet."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import Mock

import attrs
import pytest
import trio
import typer
from trio.testing import MockClock, wait_all_tasks_blocked

from tests._helpers.cli import run_in_this_process
from trio_unixconn import PeerPolicy, UnixSocketAddress, UpgradeFailedError, handover
from trio_unixconn._cli import upgrade
from trio_unixconn._cli._console import Signalled
from trio_unixconn._cli.serve import binds, service, upgrades
from trio_unixconn._cli.serve.notify import GenerationNotifier, Notifier
from trio_unixconn._cli.serve.pid_file import PidFile
from trio_unixconn.handover import Phase, Upgrade, open_generation
from trio_unixconn.systemd import ServiceManager
from trio_unixconn.testing import open_service_manager

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trio_unixconn.handover import Generation


def options_at(path: Path) -> upgrades.UpgradeOptions:
    return upgrades.UpgradeOptions(
        path=UnixSocketAddress.path(path),
        take_over=False,
        timeout=5,
        probation=0,
        directory=None,
    )


################################################################
# Options
################################################################


def test_accept_workers_is_rejected_with_upgrade_socket() -> None:
    """A generation decides when its process accepts, so its workers cannot."""
    done = run_in_this_process(
        "serve", "app:once", "--bind", "unix:s", "--upgrade-socket", "up", "--accept", "workers"
    )
    assert done.returncode == 2
    assert "--accept workers cannot be used with --upgrade-socket" in done.stderr


def test_upgrade_socket_in_a_deleted_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A relative path needs a current directory, an absolute one does not."""
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()

    def read(path: str) -> upgrades.UpgradeOptions | None:
        return upgrades.read_upgrade_options(
            path, None, timeout=1, probation=0, replace=False, accept="parent"
        )

    with pytest.raises(typer.Exit):
        read("up")
    assert "up: the current directory was deleted" in capsys.readouterr().err
    found = read("/up")
    assert found is not None
    assert found.directory is None


def test_upgrade_options_name_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory of a successor is that of PWD if this is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for name, directory in (
        (f"{tmp_path}/link", f"{tmp_path}/link"),
        ("/", os.getcwd()),
        (f"{tmp_path}/none", os.getcwd()),
        (".", os.getcwd()),
    ):
        monkeypatch.setenv("PWD", name)
        assert upgrades._current_directory() == directory


@pytest.mark.parametrize(
    ("state", "workers"),
    [
        (None, 2),
        (b'{"option": 2, "workers": 5}', 5),
        (b'{"option": 3, "workers": 5}', 2),
        (b'{"option": 2, "workers": 0}', 2),
        (b'{"option": 2, "workers": "5"}', 2),
        (b'{"workers": 5}', 2),
        (b"[]", 2),
        (b"\xff", 2),
    ],
)
def test_workers_of_state(state: bytes | None, workers: int) -> None:
    """A successor has as many workers as the server had, unless its command line is another."""
    assert upgrades.workers_of(cast("Generation", Mock(state=state)), 2) == workers


def test_set_workers_tells_how_many_there_are_then() -> None:
    """The number is read when a successor starts."""
    generation, workers = Mock(), 2
    upgrades.set_workers(generation, 1, lambda: workers)
    workers = 4
    (function,) = generation.set_state.call_args.args
    assert json.loads(function()) == {"option": 1, "workers": 4}
    assert upgrades.workers_of(Mock(state=function()), 1) == 4


@pytest.mark.parametrize(
    ("exc", "said"),
    [
        (OSError(errno.EACCES, "no", "/x"), "trio-unixconn: /x: no"),
        # A bug: the server before shows its traceback.
        (ZeroDivisionError("a bug"), ""),
    ],
)
async def test_opened_generation_explains_a_failure(
    tmp_path: Path, exc: Exception, said: str
) -> None:
    """What ends a successor is told as this process prints it."""
    with pytest.RaisesGroup(type(exc)) as caught:
        async with upgrades.opened_generation(options_at(tmp_path / "up"), None, (1, 2)) as found:
            generation = found
            raise exc
    assert caught.value.exceptions == (exc,)
    assert generation._failure == said


################################################################
# Listeners
################################################################


async def test_open_all_in_names_listeners(tmp_path: Path) -> None:
    """Each bind has a name, by which the next generation finds it; the same ones are numbered."""
    passed = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    for each in passed:
        each.set_inheritable(True)
    async with open_generation(tmp_path / "up", name="x") as generation:
        found = await binds.open_all_in(
            generation,
            [
                binds.read_bind("tcp:127.0.0.1:0"),
                binds.read_bind("tcp:127.0.0.1:0"),
                binds.read_bind(f"unix:{tmp_path}/s"),
                binds.read_bind(f"unix:@{tmp_path}/abstract"),
                binds.InheritedBind("systemd:web", [each.detach() for each in passed]),
            ],
            binds.UnixOptions(mode=0o640),
        )
        assert [each.name for each in found] == [
            "tcp:127.0.0.1:0",
            "tcp:127.0.0.1:0#2",
            f"unix:{tmp_path}/s",
            f"unix:@{tmp_path}/abstract",
            "systemd:web",
            "systemd:web#2",
        ]
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o640


async def test_inherit_takes_all_of_a_name() -> None:
    """All sockets of a name are inherited, in their order, and none of another name."""
    generation = Mock(offered=["systemd:a", "systemd:ab", "systemd:a#2", "systemd:a#3"])
    generation.inherit = lambda name, **_: None if name.endswith("3") else name
    bind = binds.InheritedBind("systemd:a", [], "this is missing")
    found = await binds._inherit(generation, bind, binds.UnixOptions())
    assert cast("Any", found) == ["systemd:a", "systemd:a#2"]
    generation.offered = []
    with pytest.raises(OSError, match="this is missing"):
        await binds._inherit(generation, bind, binds.UnixOptions())


def test_read_bind_of_a_socket_that_was_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error now, or later if the server before may have it."""
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    with pytest.raises(typer.Exit):
        binds.read_bind("systemd:web")
    found = binds.read_bind("systemd:web", may_inherit=True)
    assert isinstance(found, binds.InheritedBind)
    assert found.missing
    assert binds._has_unix_socket(found)


@pytest.mark.parametrize(
    ("supported", "code"),
    [
        ({}, errno.EAFNOSUPPORT),
        ({"127.0.0.1": None}, None),
        ({"127.0.0.1": OSError(errno.EACCES, "denied")}, errno.EACCES),
    ],
)
async def test_open_tcp_of_an_unsupported_family(
    monkeypatch: pytest.MonkeyPatch, supported: dict[str, OSError | None], code: int | None
) -> None:
    """An address of a family that this machine lacks is skipped, unless there is no other."""
    addresses: list[tuple[Any, ...]] = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
    ]

    async def getaddrinfo(*_: object, **__: object) -> list[tuple[Any, ...]]:
        await trio.lowlevel.checkpoint()
        return addresses

    async def listen_tcp(name: str, _: int, *, host: str) -> str:
        await trio.lowlevel.checkpoint()
        exc = supported.get(host, OSError(errno.EAFNOSUPPORT, "unsupported"))
        if exc is not None:
            raise exc
        return name

    monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
    generation = Mock(listeners=[], listen_tcp=listen_tcp)
    bind = binds.TCPBind("tcp:localhost:0", "localhost", 0)
    if code is None:
        found = await binds._open_tcp(generation, bind)
        assert cast("Any", found) == ["tcp:127.0.0.1:0"]
        return
    with pytest.raises(OSError, match="tcp:localhost:0") as caught:
        await binds._open_tcp(generation, bind)
    assert caught.value.errno == code


################################################################
# The service manager
################################################################


async def always() -> bool:
    return True


async def test_notifier_says_ready_after_the_last_reload() -> None:
    """While a restart and an upgrade are in progress, the end of one of them is a status."""
    async with open_service_manager() as fake, trio.open_nursery() as nursery:
        notifier = Notifier(ServiceManager.from_environ(dict(fake.environ)))
        nursery.start_soon(notifier.run, always)
        notifier.reloading("one")
        notifier.reloading("two")
        notifier.ready("three")
        notifier.ready("four")
        with trio.fail_after(30):
            await fake.wait_for("READY=1")
        nursery.cancel_scope.cancel()
    assert [each.assignments["STATUS"] for each in fake.received] == ["one", "two", "three", "four"]
    assert ["READY" in each.assignments for each in fake.received] == [False] * 3 + [True]


async def test_generation_notifier_speaks_when_it_is_the_main_process() -> None:
    """Nothing is said before; then what a server says, in order, until it is silenced."""
    async with open_service_manager(watchdog_timeout=60) as fake, trio.open_nursery() as nursery:
        manager = ServiceManager.from_environ(dict(fake.environ))
        notifier = Notifier(manager, speaks=False)
        told = GenerationNotifier(notifier, manager, lambda: "status")
        assert told.address == manager.address
        assert told.watchdog_timeout == manager.watchdog_timeout
        nursery.start_soon(notifier.run, always)
        notifier.status("not yet")
        # Another process speaks: this waits for nothing.
        await told.main_pid(os.getppid())
        await told.barrier()
        await notifier.flush()
        with trio.fail_after(30):
            await told.main_pid(os.getpid())
            await told.barrier()
            await told.reloading()
            await told.ready()
            await told.stopping()
            await notifier.flush()
        notifier.silence()
        notifier.status("no more")
        await told.barrier()
        nursery.cancel_scope.cancel()
    said = [each.assignments for each in fake.received]
    statuses = [each["STATUS"] for each in said if "STATUS" in each]
    assert statuses == ["upgrading", "status; the last upgrade failed, the old process goes on"]
    assert [each["MAINPID"] for each in said if "MAINPID" in each] == [str(os.getpid())]


################################################################
# The server
################################################################


@attrs.define
class Config:
    """What these tests need of a configuration."""

    pid_file: str | None = None
    table: bool = False
    drain_delay: float = 0


@attrs.define
class Replaced:
    """A generation that is confirmed at once; the test has it replaced."""

    number: int = 2
    phase: Phase = Phase.SERVING
    successor_pid: int | None = None
    is_replaced: trio.Event = attrs.field(factory=trio.Event)
    is_overdue: trio.Event = attrs.field(factory=trio.Event)

    async def confirmed(self) -> None:
        await trio.lowlevel.checkpoint()

    async def replaced(self) -> None:
        await self.is_replaced.wait()

    async def overdue(self) -> None:
        await self.is_overdue.wait()


def make_service(config: Config, generation: Replaced | None = None) -> Any:
    """Return a service that has not begun."""
    served: Any = service._Service.__new__(service._Service)
    served._config, served._generation = config, generation
    served._notifier, served._server = Mock(), None
    served._pid_file, served._may_inherit = None, True
    served._while_open, served._showing = trio.CancelScope(), trio.CancelScope()
    served._stopped_at = float("-inf")
    return served


async def follow(served: Any, then: Callable[[], None]) -> None:
    """Follow the generation until it is overdue; call the function before it is replaced."""
    generation: Replaced = served._generation
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        nursery.start_soon(served._follow, generation, nursery, stack)
        await wait_all_tasks_blocked()
        then()
        generation.is_replaced.set()
        await wait_all_tasks_blocked()
        assert served._while_open.cancel_called
        assert served._showing.cancel_called
        served._notifier.silence.assert_called_once_with()
        generation.is_overdue.set()


async def test_follow_replaces_the_pid_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A successor has the pid file and the terminal once it serves, and leaves them to the next."""
    caplog.set_level("INFO")
    path = tmp_path / "pid"
    path.write_text("1\n")
    served = make_service(Config(str(path), table=True), Replaced())
    shown = trio.Event()

    async def show() -> None:
        await trio.lowlevel.checkpoint()
        shown.set()

    served._show = show
    served._server = Mock(statistics=lambda: Mock(in_flight=3, queued=4))

    def owns() -> None:
        assert path.read_text() == f"{os.getpid()}\n"
        assert shown.is_set()

    await follow(served, owns)
    assert path.exists()
    assert caplog.messages == [
        f"generation 2 serves (pid {os.getpid()})",
        (
            "replaced by generation 3, draining 3 running and 4 queued jobs (signal twice to exit "
            "immediately)"
        ),
        "too many generations drain, cancelling what still runs",
    ]


async def test_follow_without_a_pid_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A pid file that cannot be written is an error of the log, and the server goes on."""
    path = tmp_path / "none" / "pid"
    served = make_service(Config(str(path)), Replaced())
    await follow(served, lambda: None)
    assert f"{path}: No such file or directory; the server goes on" in caplog.messages


async def test_follow_of_the_first_generation() -> None:
    """It has its pid file already, and no longer owns it when it was replaced."""
    served = make_service(Config(), Replaced(number=1))
    served._pid_file = PidFile()
    await follow(served, lambda: None)
    assert not served._pid_file.is_owned


async def test_stop_after_an_upgrade(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that drains already ends at the second signal; one within a second is the same."""
    caplog.set_level("INFO")
    served = make_service(Config(), Replaced(phase=Phase.RELEASED))
    served._server = Mock()
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            served._stop(signal.SIGTERM, nursery)
            await trio.sleep(0.5)
        assert caplog.messages == [
            "received SIGTERM, draining already (signal again to exit immediately)"
        ]
        await trio.sleep(1)
        with pytest.raises(Signalled):
            served._stop(signal.SIGTERM, nursery)


@pytest.mark.parametrize("pid", [None, 7])
def test_child_pids_contain_the_successor(monkeypatch: pytest.MonkeyPatch, pid: int | None) -> None:
    """A successor is reaped by the generation that has started it, and not as an adopted child."""
    monkeypatch.setattr(service, "_pids", lambda _: {3, 5})
    served = make_service(Config(), Replaced(successor_pid=pid))
    served._server = Mock()
    assert served._child_pids() == ({3, 5} if pid is None else {3, 5, 7})


async def test_upgrade_by_signal(caplog: pytest.LogCaptureFixture) -> None:
    """Without --upgrade-socket it is ignored; a failure is a line of the log."""
    caplog.set_level("INFO")
    served = make_service(Config())
    await served._upgrade()
    assert caplog.messages == ["received SIGUSR2, which upgrades with --upgrade-socket: ignored"]

    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise UpgradeFailedError("not today")

    served._generation = Mock(upgrade=fail)
    await served._upgrade()
    assert caplog.messages[1:] == [
        "received SIGUSR2, starting a successor",
        "upgrade failed: not today",
    ]


################################################################
# The command upgrade
################################################################


async def test_request_of_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server answers is returned, at a path and at an abstract address, also for root."""
    uid = os.geteuid()
    for address in (
        UnixSocketAddress.path(tmp_path / "up"),
        UnixSocketAddress.abstract(f"{tmp_path}/up"),
    ):
        async with open_generation(address, name="x", timeout=0.1):
            found = await upgrade._request(address)
            assert isinstance(found, UpgradeFailedError)
            assert "still starting after 0.1 s" in str(found)
    async with open_generation(tmp_path / "up", name="x"):
        # Root asks the user that has made the path.
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        policy = await uids_asked(monkeypatch, UnixSocketAddress.path(tmp_path / "up"))
        assert policy._uids == PeerPolicy(uids=[0, uid])._uids


async def uids_asked(monkeypatch: pytest.MonkeyPatch, address: UnixSocketAddress) -> PeerPolicy:
    """Return which servers the command asks."""
    asked: list[PeerPolicy] = []

    async def request(_: UnixSocketAddress, *, policy: PeerPolicy) -> Upgrade:
        await trio.lowlevel.checkpoint()
        asked.append(policy)
        return Upgrade(1, 2, 0.5)

    monkeypatch.setattr(handover, "request_upgrade", request)
    assert await upgrade._request(address) == Upgrade(1, 2, 0.5)
    return asked[0]


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_upgrade_prints_how_it_has_ended(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """The process id, or the error and what the successor has written; as JSON if wanted."""
    results: list[Any] = [Upgrade(7, 2, 0.5), UpgradeFailedError("not today", "a\nb\n")]
    monkeypatch.setattr(upgrade, "run", lambda _: results.pop(0))
    done = run_in_this_process("upgrade", "up", *arguments)
    assert done.returncode == 0
    assert json.loads(done.stdout) == ({"pid": 7, "number": 2, "seconds": 0.5} if arguments else 7)
    done = run_in_this_process("upgrade", "up", *arguments)
    assert done.returncode == 1
    assert "a\nb\n" in done.stderr
    assert "trio-unixconn: upgrade failed, the server goes on: not today" in done.stderr
    if arguments:
        assert json.loads(done.stdout) == {"error": "not today", "traceback": "a\nb\n"}
