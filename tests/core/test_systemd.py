"""trio_unixconn.systemd, and testing.open_service_manager at the other end."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket as stdlib_socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock, assert_checkpoints, wait_all_tasks_blocked

from trio_unixconn import (
    Credentials,
    NotSupportedError,
    SendError,
    connection_pair,
    open_unix_datagram,
    open_unix_listener,
    systemd,
)
from trio_unixconn.systemd import ServiceManager, inherited_fds, inherited_listeners
from trio_unixconn.testing import (
    FakeServiceManager,
    limit_descriptors,
    open_descriptors,
    open_service_manager,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

START = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


@asynccontextmanager
async def managed(
    watchdog_timeout: float | None = None,
) -> AsyncGenerator[tuple[FakeServiceManager, ServiceManager], None]:
    """Open a fake manager, and the service's view of it."""
    async with open_service_manager(watchdog_timeout=watchdog_timeout) as fake:
        yield fake, ServiceManager.from_environ(dict(fake.environ))


################################################################
# from_environ
################################################################


def test_from_environ_takes_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of the manager are read once, and taken out of the environment."""
    variables = {
        "NOTIFY_SOCKET": "/run/x",
        "WATCHDOG_USEC": "30000000",
        "WATCHDOG_PID": str(os.getpid()),
        "FDSTORE": "16",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    manager = ServiceManager.from_environ()
    assert manager
    assert (manager.address, manager.watchdog_timeout, manager.max_stored_fds) == ("/run/x", 30, 16)
    assert repr(manager) == "<ServiceManager /run/x>"
    assert not variables.keys() & os.environ.keys()
    again = ServiceManager.from_environ()
    assert not again
    assert (again.address, again.watchdog_timeout, again.max_stored_fds) == (None, None, None)
    assert repr(again) == "<ServiceManager none>"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (None, None)),
        ({"NOTIFY_SOCKET": ""}, (None, None)),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "1"}, ("@x", 1e-6)),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "5", "WATCHDOG_PID": "1"}, ("/x", None)),
        ({"WATCHDOG_PID": "1"}, (None, None)),
    ],
)
def test_from_environ_watchdog_is_for_this_process(
    variables: dict[str, str], expected: tuple[str | None, float | None]
) -> None:
    """WATCHDOG_USEC counts only if WATCHDOG_PID is this process, or is not set."""
    environ = {**variables, "HOME": "/"}
    manager = ServiceManager.from_environ(environ)
    assert (manager.address, manager.watchdog_timeout) == expected
    assert environ == {"HOME": "/"}


@pytest.mark.parametrize(
    ("variables", "error", "text"),
    [
        ({"NOTIFY_SOCKET": "x"}, ValueError, "absolute path, or @"),
        ({"NOTIFY_SOCKET": "@"}, ValueError, "absolute path, or @"),
        ({"NOTIFY_SOCKET": "vsock:2:1234"}, NotSupportedError, "AF_VSOCK"),
        ({"NOTIFY_SOCKET": "vsock-stream:2:1234"}, NotSupportedError, "AF_VSOCK"),
        ({"WATCHDOG_USEC": "0"}, ValueError, "WATCHDOG_USEC: expected a number of at least 1"),
        ({"WATCHDOG_USEC": "1s"}, ValueError, "WATCHDOG_USEC"),
        ({"FDSTORE": "-1"}, ValueError, "FDSTORE"),
    ],
)
def test_from_environ_rejects_other_values(
    variables: dict[str, str], error: type[Exception], text: str
) -> None:
    """A variable that no manager sets is an error that names it; it is taken out nevertheless."""
    environ = dict(variables)
    with pytest.raises(error, match=text):
        ServiceManager.from_environ(environ)
    assert environ == {}


def test_address_abstract_requires_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other systems have no abstract names."""
    monkeypatch.setattr(sys, "platform", "freebsd14")
    with pytest.raises(NotSupportedError, match="Linux"):
        ServiceManager("@x")


async def test_service_manager_does_nothing_where_there_is_none() -> None:
    """Without a manager every method is a checkpoint, and wrong arguments still raise."""
    manager = ServiceManager()
    calls: list[Callable[[], Awaitable[None]]] = [
        manager.ready,
        lambda: manager.reloading("x"),
        manager.stopping,
        lambda: manager.status("x"),
        lambda: manager.extend_timeout(1),
        manager.main_pid,
        manager.barrier,
        lambda: manager.store([0], "x"),
        lambda: manager.store([]),
        lambda: manager.forget("x"),
        lambda: manager.notify({"ERRNO": 2}),
    ]
    for call in calls:
        with assert_checkpoints():
            await call()
    with assert_checkpoints():
        async with manager.watchdog():
            pass
    with pytest.raises(ValueError, match="one line"):
        await manager.status("a\nREADY=1")


################################################################
# Messages
################################################################


async def test_ready_reloading_status_and_stopping() -> None:
    """Each state is sent with its assignments; RELOADING has the time of CLOCK_MONOTONIC."""
    async with managed() as (fake, manager):
        with trio.fail_after(30):
            assert fake.state == "starting"
            await manager.status("starting \u2014 1/2")
            await fake.wait_for("STATUS=starting \u2014 1/2")
            await manager.ready("serving")
            message = await fake.wait_for("READY=1", "STATUS=serving")
            assert message.credentials == Credentials(uid=os.getuid(), gid=os.getgid())
            assert (fake.state, fake.status) == ("ready", "serving")
            await manager.reloading()
            message = await fake.wait_for("RELOADING=1")
            now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            assert START <= int(message.assignments["MONOTONIC_USEC"]) <= now
            assert fake.state == "reloading"
            await manager.ready()
            await fake.wait_for("READY=1")
            assert fake.state == "ready"
            await manager.stopping("bye")
            await fake.wait_for("STOPPING=1")
            await manager.ready()
            await manager.barrier()
            assert (fake.state, fake.status) == ("stopping", "bye")
        assert fake.rejected == []


async def test_extend_timeout_in_microseconds() -> None:
    """The time is sent in microseconds, rounded up."""
    async with managed() as (fake, manager):
        await manager.extend_timeout(1.5)
        await manager.extend_timeout(1e-9)
        await manager.extend_timeout(1e30)
        await manager.barrier()
        assert [each.assignments["EXTEND_TIMEOUT_USEC"] for each in fake.received[:3]] == [
            "1500000",
            "1",
            str(2**64 - 2),
        ]
        for seconds in (0, -1, float("inf"), float("nan")):
            with pytest.raises(ValueError, match="positive"):
                await manager.extend_timeout(seconds)


async def test_notify_checks_arguments() -> None:
    """Nothing that would be another message, or would be ignored, is sent."""
    async with managed() as (fake, manager):
        await manager.notify({"ERRNO": 2, "BUSERROR": "org.x"}, fds=[0])
        for assignments in ({"x": "1"}, {"A=B": "1"}, {"A\nB": ""}, {}):
            with pytest.raises(ValueError, match="expected"):
                await manager.notify(assignments)
        with pytest.raises(TypeError, match="STATUS must be"):
            await manager.notify({"STATUS": None})  # type: ignore[dict-item]
        for text in ("a\nb", "a\0b"):
            with pytest.raises(ValueError, match="one line"):
                await manager.status(text)
        with pytest.raises(UnicodeEncodeError):
            await manager.status("\udcff")
        with pytest.raises(TypeError, match="status must be a str"):
            await manager.ready(3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="at most 4096 bytes"):
            await manager.status("x" * 4090)
        with pytest.raises(ValueError, match="253"):
            await manager.notify({"X_Y": 1}, fds=[0] * 254)
        await manager.status("x" * 4089)
        await manager.barrier()
        assert fake.rejected == []
        assert [each.fds for each in fake.received] == [1, 0, 1]
        assert fake.received[0].assignments == {"ERRNO": "2", "BUSERROR": "org.x"}


async def test_methods_report_a_manager_that_is_gone(unix_socket_path: Path) -> None:
    """If no process has the manager's socket, methods raise, and nothing leaks."""
    manager = ServiceManager(str(unix_socket_path))
    before = open_descriptors()
    with pytest.raises(FileNotFoundError) as caught:
        await manager.ready()
    assert isinstance(caught.value, SendError)
    with pytest.raises(FileNotFoundError):
        await manager.barrier()
    with pytest.raises(FileNotFoundError):
        await manager.main_pid()
    with limit_descriptors(0), pytest.raises(OSError, match="Too many open files"):
        await manager.ready()
    assert open_descriptors() == before


async def test_abstract_address(unix_socket_path: Path) -> None:
    """An address that begins with @ is an abstract name."""
    async with await open_unix_datagram(f"\0{unix_socket_path}") as receiver:
        await ServiceManager(f"@{unix_socket_path}").ready()
        assert (await receiver.receive_message()).data == b"READY=1"


################################################################
# main_pid
################################################################


async def test_main_pid_sends_the_inode_of_the_pidfd() -> None:
    """MAINPID goes with MAINPIDFDID, for a pid as well as for a pidfd."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE
    )
    pidfd = os.pidfd_open(process.pid)
    async with managed() as (fake, manager):
        await manager.main_pid()
        await manager.main_pid(process.pid)
        await manager.main_pid(pidfd=pidfd)
        await manager.barrier()
        own, *others = [each.assignments for each in fake.received[:3]]
        assert own["MAINPID"] == str(os.getpid())
        inode = str(os.fstat(pidfd).st_ino)
        assert others == [{"MAINPID": str(process.pid), "MAINPIDFDID": inode}] * 2
        assert own["MAINPIDFDID"] != inode
        assert fake.main_pid == process.pid
        assert process.stdin is not None
        await process.stdin.aclose()
        await process.wait()
        with pytest.raises(ProcessLookupError):
            await manager.main_pid(process.pid)
        with pytest.raises(ProcessLookupError, match="exited"):
            await manager.main_pid(pidfd=pidfd)
    os.close(pidfd)


async def test_main_pid_sends_the_pidfd_if_it_has_no_inode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.9 the pidfd itself is sent; without pidfds the pid alone."""
    monkeypatch.setattr(systemd, "_has_pidfd_ids", lambda: False)
    async with managed() as (fake, manager):
        await manager.main_pid()
        monkeypatch.delattr(os, "pidfd_open")
        await manager.main_pid()
        await manager.barrier()
        first, second, _ = fake.received
        assert first.assignments == {"MAINPID": str(os.getpid()), "MAINPIDFD": "1"}
        assert first.fds == 1
        assert second.assignments == {"MAINPID": str(os.getpid())}
        assert second.fds == 0


async def test_main_pid_checks_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a pid, or a pidfd, of a process that can be seen is sent."""
    manager = ServiceManager()
    with pytest.raises(TypeError, match="both"):
        await manager.main_pid(1, pidfd=1)
    for pid in (0, -1, True, "1"):
        with pytest.raises(ValueError, match="positive int"):
            await manager.main_pid(pid)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a pidfd"):
        await manager.main_pid(pidfd=0)
    monkeypatch.setattr(systemd, "pid_of", lambda _: 0)
    with pytest.raises(ValueError, match="pid namespace"):
        await manager.main_pid(pidfd=0)


def test_pidfd_ids_need_pidfds_and_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pidfds have no numbers of their own where there are none, or on 32 bits."""
    look = systemd._has_pidfd_ids.__wrapped__
    assert look() == systemd._has_pidfd_ids()
    monkeypatch.setattr(systemd, "_open_pidfd", lambda _: None)
    assert not look()
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    assert not look()


################################################################
# barrier
################################################################


async def test_barrier_waits_until_the_manager_closes_its_descriptor(
    unix_socket_path: Path,
) -> None:
    """Barrier sends one descriptor, alone, and returns once the manager has closed it."""
    manager = ServiceManager(str(unix_socket_path))
    async with await open_unix_datagram(unix_socket_path) as receiver:
        done = trio.Event()

        async def wait() -> None:
            await manager.barrier()
            done.set()

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                async with await receiver.receive_message() as message:
                    assert message.data == b"BARRIER=1"
                    assert len(message.fds) == 1
                    await wait_all_tasks_blocked()
                    assert not done.is_set()
        assert done.is_set()
        with trio.move_on_after(0.01):
            await manager.barrier()
        async with await receiver.receive_message() as message:
            assert message.data == b"BARRIER=1"


async def test_barrier_returns_after_the_messages_before_it() -> None:
    """After a barrier, the manager has processed what was sent before, by any process."""
    async with managed() as (fake, manager):
        for number in range(50):
            await manager.status(f"{number}")
        await manager.barrier()
        assert [each.assignments.get("STATUS") for each in fake.received[:50]] == [
            f"{number}" for number in range(50)
        ]


################################################################
# The store
################################################################


async def test_store_and_forget() -> None:
    """Stored descriptors are the manager's copies, by name, until they are forgotten."""
    conn, peer = connection_pair()
    async with managed() as (fake, manager), conn, peer:
        await manager.store([0, conn], "web")
        # The same socket is stored once.
        await manager.store([conn], "web")
        await manager.store([0])
        await manager.store([])
        await manager.barrier()
        stored = fake.stored
        assert {name: len(fds) for name, fds in stored.items()} == {"web": 2, "stored": 1}
        assert os.path.samestat(os.fstat(stored["web"][1]), os.fstat(conn.socket.fileno()))
        assert "FDPOLL" not in fake.received[0].assignments
        await manager.forget("web")
        await manager.forget("nothing")
        await manager.barrier()
        assert list(fake.stored) == ["stored"]


async def test_store_more_than_one_message_takes() -> None:
    """More than 253 descriptors are sent in several messages."""
    async with managed() as (fake, manager):
        await manager.store([0] * 300, "many")
        await manager.barrier()
        assert [each.fds for each in fake.received] == [253, 47, 1]
        assert len(fake.stored["many"]) == 300


async def test_store_poll_drops_what_is_hung_up() -> None:
    """A connection that the peer has closed is dropped, unless poll is False."""
    async with managed() as (fake, manager):
        one, two = connection_pair()
        three, four = connection_pair()
        await manager.store([one], "polled")
        await manager.store([three], "kept", poll=False)
        await manager.barrier()
        assert set(fake.stored) == {"polled", "kept"}
        for conn in (one, two, three, four):
            await conn.aclose()
        assert set(fake.stored) == {"kept"}


async def test_store_checks_arguments() -> None:
    """Wrong names and closed descriptors are errors; nothing was sent."""
    async with managed() as (fake, manager):
        for name in ("", "a:b", "a\n", "x" * 256, "\u00e9"):
            with pytest.raises(ValueError, match="name must be"):
                await manager.store([0], name)
            with pytest.raises(ValueError, match="name must be"):
                await manager.forget(name)
        with pytest.raises(TypeError, match="name must be a str"):
            await manager.forget(3)  # type: ignore[arg-type]
        with pytest.raises(SendError) as caught:
            await manager.store([0, 2**20])
        assert caught.value.errno == errno.EBADF
        await manager.store([0], "a b-c." + "x" * 249)
        await manager.barrier()
        assert len(fake.received) == 2


################################################################
# The watchdog
################################################################


async def test_watchdog_sends_heartbeats_twice_as_often(autojump_clock: MockClock) -> None:
    """During the block, a heartbeat is sent at once and after each half of the timeout."""
    async with managed(10) as (fake, manager):
        async with manager.watchdog():
            await trio.sleep(24)
        await manager.barrier()
        count = fake.heartbeats
        assert count >= 5
        await trio.sleep(24)
        await manager.barrier()
        assert fake.heartbeats == count


async def test_watchdog_asks_the_check(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """There is a heartbeat only if the check returns True; each reason is logged once."""
    answers: list[bool | Exception] = [
        True,
        False,
        False,
        True,
        OSError("no database"),
        ValueError("x"),
        True,
    ]
    asked = 0
    done = trio.Event()

    async def check() -> bool:
        nonlocal asked
        if asked == len(answers):
            done.set()
            await trio.sleep_forever()
        answer = answers[asked]
        asked += 1
        if isinstance(answer, Exception):
            raise answer
        return answer

    async with managed(10) as (fake, manager):
        with caplog.at_level(logging.WARNING):
            async with manager.watchdog(check):
                await done.wait()
                # A check that does not return keeps the heartbeat back.
                await trio.sleep(100)
        await manager.barrier()
        assert fake.heartbeats == 3
    texts = [each.getMessage() for each in caplog.records]
    assert texts == [
        "the health check returned False: no heartbeat to the service manager",
        "the health check failed: no heartbeat to the service manager",
    ]


async def test_watchdog_rejects_a_check_that_returns_no_bool() -> None:
    """A check that returns nothing is an error of the program."""

    async def check() -> None:
        await trio.lowlevel.checkpoint()

    async with managed(10) as (_, manager):
        with pytest.RaisesGroup(TypeError):
            async with manager.watchdog(check):  # type: ignore[arg-type]
                await trio.sleep_forever()


async def test_watchdog_raises_exceptions_of_the_block_as_they_are() -> None:
    """An exception of the block is not wrapped in a group, nor is one of the fake's block."""
    with pytest.raises(KeyError, match="'x'"):
        async with managed(10) as (_, manager), manager.watchdog():
            raise KeyError("x")
    with trio.CancelScope() as scope:
        async with managed(10) as (_, manager), manager.watchdog():
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_watchdog_continues_without_manager_and_without_descriptors(
    unix_socket_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A heartbeat that cannot be sent is logged, and the next needs no free descriptor."""
    manager = ServiceManager(str(unix_socket_path), watchdog_timeout=10)
    async with manager.watchdog():
        await trio.sleep(1)
        assert "cannot send a heartbeat" in caplog.text
        async with await open_unix_datagram(unix_socket_path) as receiver:
            with limit_descriptors(0):
                assert (await receiver.receive_message()).data == b"WATCHDOG=1"


async def test_watchdog_does_nothing_if_none_is_expected() -> None:
    """Without WatchdogSec= the block runs, and the check is not called."""

    async def check() -> bool:
        raise AssertionError

    async with managed() as (fake, manager):
        async with manager.watchdog(check):
            await wait_all_tasks_blocked()
        await manager.barrier()
        assert fake.heartbeats == 0


################################################################
# The fake manager
################################################################


async def test_open_service_manager_checks_credentials() -> None:
    """Messages of other processes and users, and broken ones, change nothing."""
    async with (
        open_service_manager(pids=[os.getpid()]) as fake,
        await open_unix_datagram() as sock,
    ):
        path = fake.environ["NOTIFY_SOCKET"]

        async def send(data: bytes, **options: Any) -> None:
            await sock.send_message(data, path, **options)

        def parent() -> Credentials:
            return Credentials(os.getppid(), os.getuid(), os.getgid())

        await send(b"")
        await send(b"READY")
        await send(b"READY=1\0")
        await send(b"READY=1\n" * 1000)
        await send(b"BARRIER=1\nREADY=1", fds=[0])
        await send(b"BARRIER=1")
        await send(b"BARRIER=1", fds=[0, 0])
        expected = 7
        if os.geteuid() == 0:
            await send(b"READY=1", credentials=parent())
            await send(b"READY=1", credentials=Credentials(uid=65534))
            expected += 2
        await send(b"FDSTORE=1\nFDNAME=a:b\n", fds=[0])
        await send(b"FDSTORE=1\nFDNAME=\n", fds=[0])
        await send(b"MAINPID=x\nREADY=1\nRELOADING=1")
        with trio.fail_after(30):
            await fake.wait_for("RELOADING=1")
        assert len(fake.rejected) == expected
        assert fake.rejected[0].problem == "not a list of assignments"
        assert fake.main_pid is None
        assert fake.state == "ready"
        assert {name: len(fds) for name, fds in fake.stored.items()} == {"stored": 2}
    with pytest.raises(TypeError, match="cannot pickle"):
        fake.__reduce_ex__(2)


async def test_wait_for_by_two_tasks_and_after_a_timeout() -> None:
    """Each task gets the message that it waits for, and a timeout takes nothing."""
    async with managed() as (fake, manager):
        with trio.move_on_after(0.01):
            await fake.wait_for("READY=1")
        await manager.status("a")
        await manager.status("b")
        with trio.move_on_after(0.01):
            await fake.wait_for("READY=1")
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for text in ("a", "b"):
                    nursery.start_soon(fake.wait_for, f"STATUS={text}")
                nursery.start_soon(fake.wait_for, "READY=1")
                await manager.ready()


async def test_open_service_manager_rejects_messages_without_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A message whose sender the kernel does not name is not accepted."""
    async with open_service_manager() as fake, await open_unix_datagram() as sock:
        monkeypatch.setattr(
            "trio_unixconn._ancillary._unpack_credentials", lambda *_: None, raising=True
        )
        await sock.send_message(b"READY=1", fake.environ["NOTIFY_SOCKET"])
        await wait_all_tasks_blocked()
        assert [each.problem for each in fake.rejected] == ["no credentials"]


################################################################
# Inherited file descriptors
################################################################

# Runs in a process of its own, which has the file descriptors from 3 on.
INHERIT = """\
import json, os, sys
os.environ.update(LISTEN_FDS=sys.argv[1], LISTEN_PID=str(os.getpid()))
if len(sys.argv) > 3:
    os.environ["LISTEN_FDNAMES"] = sys.argv[3]
# A library can keep a file descriptor open, as a new libffi does. It gets a number above these.
held = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
import trio
from trio_unixconn import UnixListener
from trio_unixconn.systemd import inherited_fds, inherited_listeners
for each in held:
    os.close(each)
seen = []
for step in json.loads(sys.argv[2]):
    call, names = step[0], step[1:]
    try:
        found = {"fds": inherited_fds, "listeners": inherited_listeners,
            "close": lambda: os.close(4) or {}}[call](*names)
        seen.append({name: [each if call == "fds" else [type(each).__name__,
            each.socket.fileno(), os.get_inheritable(each.socket.fileno())] for each in found[name]]
            for name in found})
    except ValueError as exc:
        seen.append(str(exc))
seen.append([name for name in os.environ if name.startswith("LISTEN_")])
print(json.dumps(seen), flush=True)
os._exit(0)
"""


def inherit(
    fds: list[int], steps: list[list[str]], names: str | None = None, count: str | None = None
) -> list[Any]:
    """Return what the calls in *steps* return in a process that was passed *fds*."""
    shell = " ".join(f"{number}<&{fd}" for number, fd in enumerate(fds, 3))
    arguments = [str(len(fds)) if count is None else count, json.dumps(steps)]
    if names is not None:
        arguments.append(names)
    # The numbers must not overlap with those that the shell moves them to.
    high = [os.dup(fd) for fd in fds]
    moved = []
    try:
        import fcntl

        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in high]
        shell = " ".join(f"{number}<&{fd}" for number, fd in enumerate(moved, 3))
        done = subprocess.run(
            ["bash", "-c", f'exec "$@" {shell}', "bash", sys.executable, "-c", INHERIT, *arguments],
            capture_output=True,
            check=True,
            pass_fds=moved,
        )
    finally:
        for fd in (*high, *moved):
            os.close(fd)
    found: list[Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def tcp() -> Any:
    sock = stdlib_socket.create_server(("127.0.0.1", 0))
    yield sock
    sock.close()


async def test_inherited_listeners_by_name(unix_socket_path: Path, tcp: Any) -> None:
    """Listening sockets are returned by name, in order, close-on-exec, and once."""
    async with await open_unix_listener(unix_socket_path) as listener:
        fds = [listener.socket.fileno(), tcp.fileno(), tcp.fileno()]
        steps = [["listeners", "web"], ["listeners", "none"], ["listeners"], ["listeners"]]
        assert inherit(fds, steps, "web:admin:web") == [
            {"web": [["UnixListener", 3, False], ["SocketListener", 5, False]]},
            {},
            {"admin": [["SocketListener", 4, False]]},
            {},
            [],
        ]


async def test_inherited_fds_returns_all_kinds(unix_socket_path: Path, tcp: Any) -> None:
    """Another socket is an error of inherited_listeners, and inherited_fds returns it."""
    async with await open_unix_datagram(unix_socket_path) as sock:
        fds = [tcp.fileno(), sock.socket.fileno(), 0]
        steps = [["listeners"], ["listeners", "state"], ["fds", "state"], ["listeners"], ["fds"]]
        first, second, *rest = inherit(fds, steps, "web:log:state")
        assert first.startswith(
            "file descriptor 4 (log): expected a listening stream socket, got a socket that does "
            "not listen; inherited_fds('log')"
        )
        assert "5 (state): expected a listening stream socket, got another file" in second
        assert rest[0] == {"state": [5]}
        assert rest[1].startswith("file descriptor 4 (log)")
        assert rest[2:] == [{"web": [3], "log": [4]}, []]


async def test_inherited_fds_without_names(tcp: Any) -> None:
    """File descriptors without a name are called unknown; surplus names are ignored."""
    fds = [tcp.fileno()] * 3
    assert inherit(fds, [["fds"]]) == [{"unknown": [3, 4, 5]}, []]
    assert inherit(fds, [["fds"]], "a") == [{"a": [3], "unknown": [4, 5]}, []]
    assert inherit(fds, [["fds"]], "a::b:c") == [{"a": [3], "unknown": [4], "b": [5]}, []]


async def test_inherited_fds_checks_the_count(tcp: Any) -> None:
    """LISTEN_FDS must be a number of open file descriptors."""
    assert inherit([tcp.fileno()], [["fds"]], count="0") == [{}, []]
    assert inherit([tcp.fileno()], [["fds"]], count="x") == [
        "LISTEN_FDS: expected a number of at least 0, got 'x'",
        [],
    ]
    # Those that are open are kept for the next call, up to the second that is not.
    for count in "9000", f"{2**40}":
        assert inherit([tcp.fileno()], [["fds"], ["fds"]], count=count) == [
            f"LISTEN_FDS is {count}, but file descriptor 4 is not open",
            {"unknown": [3]},
            [],
        ]
    # One that the program has closed.
    assert inherit([tcp.fileno()] * 3, [["close"], ["fds"], ["fds"]]) == [
        {},
        "LISTEN_FDS is 3, but file descriptor 4 is not open",
        {"unknown": [3, 5]},
        [],
    ]


def own_pidfd_id() -> str:
    pidfd = os.pidfd_open(os.getpid())
    try:
        return str(os.fstat(pidfd).st_ino)
    finally:
        os.close(pidfd)


def test_inherited_fds_are_for_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """LISTEN_PID and LISTEN_PIDFDID of another process mean that nothing was passed to this one."""
    pid = str(os.getpid())
    cases: list[tuple[dict[str, str], bool]] = [
        ({}, False),
        ({"LISTEN_PID": "1"}, False),
        ({"LISTEN_PID": pid, "LISTEN_PIDFDID": "1"}, False),
        ({"LISTEN_PID": pid}, True),
        ({"LISTEN_PID": pid, "LISTEN_PIDFDID": own_pidfd_id()}, True),
    ]
    for variables, is_ours in cases:
        environ = {**variables, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x"}
        monkeypatch.setattr(systemd, "_FIRST_FD", 2**20)
        if is_ours:
            with pytest.raises(ValueError, match="is not open"):
                systemd._take_variables(environ)
        else:
            systemd._take_variables(environ)
        assert environ == {}
    assert inherited_fds() == {}
    assert inherited_listeners() == {}


def test_listen_pidfdid_needs_a_kernel_with_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pidfds have no numbers, LISTEN_PID alone decides."""
    monkeypatch.setattr(systemd, "_has_pidfd_ids", lambda: False)
    assert systemd._is_this_process(str(os.getpid()), "1")


def test_import_of_the_package_does_not_import_systemd() -> None:
    """The package itself does not import this module."""
    code = "import sys, trio_unixconn; sys.exit('trio_unixconn.systemd' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
