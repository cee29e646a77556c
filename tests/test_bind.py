"""How a listener gets its path and gives it back, while servers die, race and restart."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trio
from helpers import PEERS, as_nobody, counted, free_descriptors, until
from trio.testing import wait_all_tasks_blocked

from trio_unixconn import (
    AddressInUseError,
    IOErrorEnum,
    NotSupportedError,
    UnixListener,
    _bind,
    _listener,
    _paths,
    open_unix_connection,
    open_unix_listener,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


def drive(*arguments: object) -> Any:
    """Run a driver, a process that forks the servers and the clients."""
    driver, *rest = map(str, arguments)
    done = subprocess.run(
        [sys.executable, str(PEERS / driver), *rest],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("scenario", ["free", "stale", "live"])
def test_killed_at_every_step(tmp_path: Path, scenario: str) -> None:
    """Whenever a server is killed while it takes or leaves a path, the next one starts."""
    seen = drive("bind_driver.py", "kill", tmp_path, scenario)
    assert seen["wrong"] == []
    assert seen["steps"] > 40


@pytest.mark.parametrize("before", ["free", "stale"])
def test_race_for_a_path(tmp_path: Path, before: str) -> None:
    """Of servers that start at one path at the same time exactly one wins."""
    seen = drive("bind_driver.py", "race", tmp_path, before)
    assert set(seen["winners"]) == {1}
    assert set(seen["others"]) == {5}
    assert seen["left"] == []


def test_restarts_that_nobody_notices(tmp_path: Path) -> None:
    """In 200 restarts under continuous connects, every request is answered."""
    seen = drive("restart_driver.py", tmp_path, 200, 2)
    assert seen["answered"] > 200
    assert seen["else"] == {}
    assert seen["bad"] == []
    assert seen["left"] == []


def listen_at(path: Path, kind: int = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(str(path))
    if kind != socket.SOCK_DGRAM:
        sock.listen(0)
    return sock


def all_but_access_time(path: Path) -> list[int]:
    """Return what lstat says, without the time that merely connecting changes."""
    status = path.lstat()
    names = ("mode", "ino", "dev", "nlink", "uid", "gid", "size", "mtime_ns", "ctime_ns")
    return [getattr(status, f"st_{name}") for name in names]


async def refused(path: Path, **options: Any) -> AddressInUseError:
    """Fail to listen there, and leave everything as it was."""
    before = sorted(path.parent.iterdir()), all_but_access_time(path)
    with pytest.raises(AddressInUseError) as caught:
        await open_unix_listener(path, **options)
    after = sorted(path.parent.iterdir()), all_but_access_time(path)
    assert before == after
    assert caught.value.errno == errno.EADDRINUSE
    assert caught.value.filename == str(path)
    assert caught.value.code == IOErrorEnum.ADDRESS_IN_USE
    return caught.value


async def test_live_server(path: Path) -> None:
    """A path on which somebody listens is not stolen; the error says who it is."""
    with listen_at(path):
        error = await refused(path)
        assert f"pid {os.getpid()}, uid {os.geteuid()}" in str(error)


async def test_live_server_with_a_full_queue(path: Path) -> None:
    """A server whose queue is full is alive."""
    with listen_at(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert "its queue is full" in str(await refused(path))


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
async def test_socket_of_another_type(path: Path, kind: int) -> None:
    """A socket for datagrams or packets that is in use is not replaced."""
    with listen_at(path, kind):
        assert "datagrams or packets" in str(await refused(path))


async def test_server_on_a_system_that_tells_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system does not say who listens, the error says only that somebody does."""

    def fail(_: object) -> None:
        raise NotSupportedError("no option")

    monkeypatch.setattr(_bind, "peer_credentials", fail)
    with listen_at(path):
        assert "a server listens there" in str(await refused(path))


async def test_server_that_cannot_be_asked(path: Path) -> None:
    """A socket that this process may not connect to is not taken for a dead one."""
    path.parent.chmod(0o777)
    with listen_at(path), as_nobody(path.parent):
        assert "cannot be asked (Permission denied)" in str(await refused(path))


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("what", ["regular file", "folder", "symbolic link", "FIFO"])
async def test_no_socket_at_the_path(path: Path, what: str, *, replace: bool) -> None:
    """What is no socket is never replaced, nor is what a symbolic link leads to."""
    if what == "regular file":
        path.write_text("x")
    elif what == "folder":
        path.mkdir()
    elif what == "FIFO":
        os.mkfifo(path)
    else:
        listen_at(path.with_name("target")).close()
        path.symlink_to("target")
    assert f"a {what} is there" in str(await refused(path, replace=replace))


async def test_mode_before_anybody_can_connect(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the socket has its mode, nobody can connect, whatever the umask."""
    real, refused = os.chmod, []

    def chmod(*arguments: Any, **options: Any) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            refused.append(client.connect_ex(str(path.with_name(".s.new"))))
        real(*arguments, **options)

    monkeypatch.setattr(os, "chmod", chmod)
    async with await open_unix_listener(path):
        assert refused == [errno.ECONNREFUSED]


async def test_stale_socket(path: Path) -> None:
    """A socket on which nobody listens any more is replaced."""
    listen_at(path).close()
    before = path.stat()
    async with await open_unix_listener(path), await open_unix_connection(path):
        assert path.stat() != before
    assert not path.exists()


async def test_something_put_there_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another program puts at the path in the last moment is not overwritten."""
    real = os.link

    def link(*arguments: Any, **options: Any) -> None:
        path.write_text("x")
        real(*arguments, **options)

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(AddressInUseError, match="has just been put there"):
        await open_unix_listener(path)
    assert path.read_text() == "x"
    assert os.listdir(path.parent) == ["s"]


async def test_taking_over(path: Path) -> None:
    """With replace=True the path goes over in one step, and the old server leaves it alone."""
    old = await open_unix_listener(path)
    early = await open_unix_connection(path)
    async with await open_unix_listener(path, replace=True) as new, early:
        async with await open_unix_connection(path) as late, await new.accept() as server:
            await late.send_all(b"late")
            assert await server.receive_some() == b"late"
        async with await old.accept() as server:
            await early.send_all(b"early")
            assert await server.receive_some() == b"early"
        await old.aclose()
        assert path.exists()
    assert not path.exists()


async def test_path_that_stays(path: Path) -> None:
    """With unlink_on_close=False the path stays, and the next server replaces it."""
    async with await open_unix_listener(path, unlink_on_close=False):
        pass
    assert stat.S_ISSOCK(path.stat().st_mode)
    async with await open_unix_listener(path):
        pass
    assert not path.exists()


@contextlib.contextmanager
def held_lock(path: Path) -> Iterator[Path]:
    """Hold the lock as another process would: this is another open file."""
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield lock


async def test_waiting_for_the_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another server is at the path, one that starts waits, without holding up the loop."""
    done: list[UnixListener] = []

    async def start() -> None:
        done.append(await open_unix_listener(path))

    async with trio.open_nursery() as nursery:
        with held_lock(path) as lock:
            tries = counted(monkeypatch, _bind, "bind")
            nursery.start_soon(start)
            # It tries again and again, and this task runs between.
            await until(lambda: len(tries) > 5)
            assert done == []
            # As its holder does at its end: whoever waited must not take the dead file's lock.
            lock.unlink()
    await done[0].aclose()
    assert os.listdir(path.parent) == []


async def test_threads_that_are_all_busy(path: Path) -> None:
    """A listener opens and closes also while the program's threads all wait for something."""
    limiter = trio.to_thread.current_default_thread_limiter()
    holders = [object() for _ in range(int(limiter.total_tokens))]
    for holder in holders:
        limiter.acquire_on_behalf_of_nowait(holder)
    try:
        with trio.fail_after(30):
            async with await open_unix_listener(path):
                pass
    finally:
        for holder in holders:
            limiter.release_on_behalf_of(holder)
    assert not path.exists()


async def test_waiting_long_for_the_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A start that waits long for the lock says so, once."""
    monkeypatch.setattr(_listener, "_PATIENCE", 0.01)
    with held_lock(path) as lock:
        async with trio.open_nursery() as nursery:
            tries = counted(monkeypatch, _bind, "bind")
            nursery.start_soon(open_unix_listener, path)
            await until(lambda: bool(caplog.records))
            said = len(tries)
            await until(lambda: len(tries) > said + 2)
            nursery.cancel_scope.cancel()
        lock.unlink()
    (record,) = caplog.records
    assert "waiting for the lock" in record.getMessage()


async def test_socket_replaced_before_it_has_its_mode(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What somebody puts in the place of the new socket does not get its mode."""
    other = path.with_name("other")
    other.write_text("x")
    mode = other.stat().st_mode
    real = _bind._set_mode

    def set_mode(name: bytes, *arguments: Any) -> None:
        new = path.with_name(os.fsdecode(name))
        new.unlink()
        new.symlink_to("other")
        real(name, *arguments)

    monkeypatch.setattr(_bind, "_set_mode", set_mode)
    with pytest.raises(OSError, match="was replaced") as caught:
        await open_unix_listener(path, mode=0o666)
    assert caught.value.errno == errno.EBUSY
    assert other.stat().st_mode == mode
    assert os.listdir(path.parent) == ["other"]


async def test_mode_where_nothing_opens_a_socket(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a socket's file cannot be opened, the mode is set by its name."""
    monkeypatch.delattr(os, "O_PATH")
    async with await open_unix_listener(path, mode=0o640):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


async def test_cancelled_while_waiting_for_the_lock(path: Path) -> None:
    """A start that waits for the lock can be cancelled, and leaves nothing."""
    with held_lock(path) as lock:
        with trio.move_on_after(0.02) as scope:
            await open_unix_listener(path)
        assert scope.cancelled_caught
        lock.unlink()
    assert os.listdir(path.parent) == []


async def test_lock_that_was_taken_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock whose file is not at its place any more, or another's, is not taken for one."""
    real = fcntl.flock
    removed: list[Path] = []

    def flock(fd: int, operation: int) -> None:
        real(fd, operation)
        if len(removed) < 2 and operation & fcntl.LOCK_EX:
            lock = path.with_name(".s.lock")
            lock.unlink()
            removed.append(lock)
            if len(removed) == 2:
                lock.touch()

    monkeypatch.setattr(fcntl, "flock", flock)
    async with await open_unix_listener(path):
        assert len(removed) == 2
        assert os.listdir(path.parent) == ["s"]


async def test_lock_file_that_somebody_deletes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock file that somebody deletes under its holder does no harm."""
    real = os.chmod

    def chmod(*arguments: Any, **options: Any) -> None:
        path.with_name(".s.lock").unlink()
        real(*arguments, **options)

    monkeypatch.setattr(os, "chmod", chmod)
    async with await open_unix_listener(path):
        assert os.listdir(path.parent) == ["s"]


async def test_lock_that_cannot_be_opened(path: Path) -> None:
    """A lock that this process cannot open is named, with its owner."""
    path.with_name(".s.lock").symlink_to("elsewhere")
    with pytest.raises(OSError, match=r"\.s\.lock, is a symbolic link of user \d+") as caught:
        await open_unix_listener(path)
    assert caught.value.filename == str(path)
    assert os.listdir(path.parent) == [".s.lock"]


async def test_lock_that_cannot_be_removed(path: Path) -> None:
    """A lock file of another user in a folder like /tmp serves as well, and stays."""
    lock = path.with_name(".s.lock")
    lock.touch()
    lock.chmod(0o666)
    path.parent.chmod(0o1777)
    with as_nobody(path.parent):
        async with await open_unix_listener(path), await open_unix_connection(path):
            pass
    assert os.listdir(path.parent) == [".s.lock"]


async def test_folder_that_may_not_be_listed(path: Path) -> None:
    """To listen takes no right to read the folder, only to write to it."""
    path.parent.chmod(0o733)
    with as_nobody(path.parent):
        async with await open_unix_listener(path), await open_unix_connection(path):
            pass
    assert os.listdir(path.parent) == []


async def test_lock_that_a_forked_process_has_copied(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the lock's descriptor, as a fork at that moment makes one, holds no lock."""
    real, copies = fcntl.flock, []

    def flock(fd: int, operation: int) -> None:
        real(fd, operation)
        if operation & fcntl.LOCK_EX:
            copies.append(os.dup(fd))

    monkeypatch.setattr(fcntl, "flock", flock)
    # One that is removed in the end would be nobody's hindrance in any case.
    lock = path.with_name(".s.lock")
    lock.touch()
    lock.chmod(0o666)
    path.parent.chmod(0o1777)
    try:
        with as_nobody(path.parent), trio.fail_after(30):
            for _ in range(2):
                async with await open_unix_listener(path):
                    pass
        assert not path.exists()
    finally:
        for copy in copies:
            os.close(copy)
    assert len(copies) == 4


async def test_closing_twice_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second task that closes does not close the socket before the path is away."""
    listener = await open_unix_listener(path)
    real, go, seen = _bind.unbind, threading.Event(), []

    def unbind(binding: _bind.Binding) -> None:
        go.wait(30)
        seen.append(listener.socket.fileno())
        real(binding)

    monkeypatch.setattr(_bind, "unbind", unbind)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.aclose)
        nursery.start_soon(listener.aclose)
        await wait_all_tasks_blocked()
        go.set()
    assert -1 not in seen
    assert len(seen) == 1
    assert listener.socket.fileno() == -1
    assert not path.exists()


async def test_closing_without_free_descriptors(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing waits for a descriptor that it needs to take the path away."""
    listener = await open_unix_listener(path)
    async with trio.open_nursery() as nursery:
        with free_descriptors(0):
            tries = counted(monkeypatch, _bind, "unbind")
            nursery.start_soon(listener.aclose)
            await until(lambda: len(tries) > 2)
            assert path.exists()
    assert not path.exists()


async def test_closing_while_the_lock_is_held(
    path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A lock that stays held does not keep a listener from closing; its path stays."""
    listener = await open_unix_listener(path)
    with held_lock(path) as lock:
        await listener.aclose()
        lock.unlink()
    assert listener.socket.fileno() == -1
    assert path.exists()
    assert f"{path}: the path stays" in caplog.text


async def test_closing_when_cancelled(path: Path) -> None:
    """The path is taken away also when the task that closes is cancelled."""
    with trio.CancelScope() as scope:
        async with await open_unix_listener(path):
            scope.cancel()
    assert os.listdir(path.parent) == []


async def test_folder_that_is_gone(path: Path) -> None:
    """A listener whose folder is gone closes all the same."""
    folder = path.with_name("below")
    folder.mkdir()
    listener = await open_unix_listener(folder / "s")
    (folder / "s").unlink()
    folder.rmdir()
    await listener.aclose()
    folder.write_text("no folder")
    listener = await open_unix_listener(path)
    path.rename(path.with_name("moved"))
    await listener.aclose()
    assert path.with_name("moved").exists()


async def test_socket_left_under_the_temporary_name(path: Path) -> None:
    """What a server that was killed left under the temporary name is in nobody's way."""
    listen_at(path.with_name(".s.new")).close()
    async with await open_unix_listener(path):
        assert os.listdir(path.parent) == ["s"]


async def test_file_at_the_temporary_name(path: Path) -> None:
    """What is no socket is not removed there, either."""
    path.with_name(".s.new").write_text("precious")
    with pytest.raises(AddressInUseError, match=r"a regular file is at \.s\.new beside it"):
        await open_unix_listener(path)
    assert path.with_name(".s.new").read_text() == "precious"
    assert os.listdir(path.parent) == [".s.new"]


async def test_folder_above_a_symbolic_link(path: Path) -> None:
    """A path with ".." is the same to the listener as to those who connect."""
    (path.parent / "a" / "b").mkdir(parents=True)
    path.with_name("link").symlink_to("a/b")
    there = path.parent / "link" / ".." / "s"
    async with await open_unix_listener(there), await open_unix_connection(there):
        assert (path.parent / "a" / "s").exists()
    assert os.listdir(path.parent / "a") == ["b"]


@pytest.mark.parametrize("what", ["/", ".", "..", "below/", "below/.", "below/.."])
async def test_folders_by_other_names(
    path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A folder is refused as one, however it is written."""
    monkeypatch.chdir(path.parent)
    path.with_name("below").mkdir()
    with pytest.raises(AddressInUseError, match="a folder is there"):
        await open_unix_listener(what)


async def test_abstract_name_in_use() -> None:
    """An abstract name that is taken is EADDRINUSE, and says how to find out by whom."""
    name = f"\0trio-unixconn-binding-{os.getpid()}"
    async with await open_unix_listener(name):
        with pytest.raises(OSError, match="ss -xlp") as caught:
            await open_unix_listener(name)
        assert caught.value.errno == errno.EADDRINUSE


async def test_no_way_for_a_long_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has no way to name a long path, that is ENAMETOOLONG."""
    monkeypatch.setattr(_paths, "_O_PATH", None)
    path = path.with_name("x" * 200)
    for use in (open_unix_listener, open_unix_connection):
        with pytest.raises(OSError, match="choose a shorter path") as caught:
            await use(path)
        assert caught.value.errno == errno.ENAMETOOLONG
    assert os.listdir(path.parent) == []


async def test_accepting_while_closing(path: Path) -> None:
    """A task that accepts is woken when the listener closes, though the path goes first."""
    listener = await open_unix_listener(path)
    async with trio.open_nursery() as nursery:

        async def accept() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await listener.accept()

        nursery.start_soon(accept)
        await wait_all_tasks_blocked()
        await listener.aclose()
