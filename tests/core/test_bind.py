"""How open_unix_listener and aclose take and remove a path, while servers crash and race."""

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
from trio.testing import open_stream_to_socket_listener, wait_all_tasks_blocked

from tests._helpers.environment import environment
from tests._helpers.fds import free_descriptors
from tests._helpers.peers import shared_directory
from tests._helpers.processes import program
from tests._helpers.users import NOBODY, OTHER_UID, as_nobody, as_root
from tests._helpers.waiting import counted, until
from trio_unixconn import (
    AddressInUseError,
    IOErrorEnum,
    NotSupportedError,
    UnixListener,
    UnixSocketAddress,
    _bind,
    _kernel,
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


@pytest.fixture
def umask() -> Iterator[None]:
    """Restore the umask."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def drive(*arguments: object) -> Any:
    """Run a driver, a process that forks the servers and the clients."""
    driver, *rest = map(str, arguments)
    done = subprocess.run(
        program(driver, *rest),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("scenario", ["free", "dead", "live", "long", "long dead"])
def test_killed_at_every_line(tmp_path: Path, scenario: str) -> None:
    """If a server is killed at any line while it takes or removes a path, the next one starts."""
    seen = drive("bind_driver", "kill", tmp_path, scenario)
    assert seen["wrong"] == []
    assert seen["steps"] > 40


@pytest.mark.usefixtures("unmeasured_processes")
@pytest.mark.slow
def test_race_with_replace(tmp_path: Path) -> None:
    """Of servers that start with replace=True at the same time, each gets the path in turn."""
    seen = drive("bind_driver", "race", tmp_path, "replace")
    assert set(seen["winners"]) == {6}
    assert set(seen["others"]) == {0}
    assert seen["left"] == []


@pytest.mark.usefixtures("unmeasured_processes")
@pytest.mark.slow
@pytest.mark.parametrize("before", ["free", "dead", "long", "long dead"])
def test_race_for_a_path(tmp_path: Path, before: str) -> None:
    """Of servers that start at one path at the same time, exactly one gets it."""
    seen = drive("bind_driver", "race", tmp_path, before)
    assert set(seen["winners"]) == {1}
    assert set(seen["others"]) == {5}
    assert seen["left"] == []


@pytest.mark.once
@pytest.mark.usefixtures("unmeasured_processes")
@pytest.mark.slow
def test_replace_200_times_under_load(tmp_path: Path) -> None:
    """During 200 restarts with replace=True, every request of every client is answered."""
    seen = drive("restart_driver", tmp_path, 200, 2)
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


def dead_socket(path: Path, uid: int = -1) -> None:
    """Leave a socket that no process holds."""
    listen_at(path).close()
    os.chown(path, uid, -1)


def all_but_access_time(path: Path) -> list[int]:
    """Return what lstat says, without the time that merely connecting changes."""
    status = path.lstat()
    names = ("mode", "ino", "dev", "nlink", "uid", "gid", "size", "mtime_ns", "ctime_ns")
    return [getattr(status, f"st_{name}") for name in names]


async def rejected(path: Path, **options: Any) -> AddressInUseError:
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


async def check_serves(listener: UnixListener, path: Path) -> None:
    """Connect to the path, and exchange a byte."""
    async with await open_unix_connection(path) as client, await listener.accept() as server:
        await client.send_all(b"x")
        assert await server.receive_some() == b"x"


# The name


@pytest.mark.parametrize("before", ["nothing", "a dead socket", "a dead socket, replace=True"])
async def test_getsockname_is_the_path(path: Path, before: str) -> None:
    """Unless a live server is replaced, the kernel knows the socket by its path."""
    if before != "nothing":
        dead_socket(path)
    async with await open_unix_listener(path, replace="replace" in before) as listener:
        assert listener.socket.getsockname() == str(path)
        assert os.listdir(path.parent) == ["s"]
        stream = await open_stream_to_socket_listener(listener)  # type: ignore[arg-type]
        async with stream, await listener.accept() as server:
            assert server.socket.getsockname() == str(path)
            await stream.send_all(b"x")
            assert await server.receive_some() == b"x"
    assert os.listdir(path.parent) == []


async def test_getsockname_of_a_relative_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket of a relative path is bound at the absolute one, which chdir does not change."""
    monkeypatch.chdir(path.parent)
    async with await open_unix_listener(path.name) as listener:
        assert listener.socket.getsockname() == str(path)
        assert listener.get_local_address().get_path() == path.name
        monkeypatch.chdir("/")
        async with await open_stream_to_socket_listener(listener):  # type: ignore[arg-type]
            pass


async def test_getsockname_after_replace(path: Path) -> None:
    """A listener that replaced a live one has the temporary name, and its successor the path."""
    async with await open_unix_listener(path):
        async with await open_unix_listener(path, replace=True) as listener:
            assert listener.socket.getsockname() == str(path.with_name(".s.new"))
            await check_serves(listener, path)
        async with await open_unix_listener(path, replace=True) as listener:
            assert listener.socket.getsockname() == str(path)


def test_isinstance_socket_listener() -> None:
    """A UnixListener is a trio.SocketListener, for code that asks."""
    assert issubclass(UnixListener, trio.SocketListener)


# What is at the path


async def test_live_server(path: Path) -> None:
    """A path at which a server listens is not taken; the error names its process."""
    with listen_at(path):
        error = await rejected(path)
        assert f"pid {os.getpid()}, uid {os.geteuid()}" in str(error)


async def test_live_server_with_a_full_queue(path: Path) -> None:
    """A server whose queue is full is alive."""
    with listen_at(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert "its queue is full" in str(await rejected(path))


async def test_server_before_listen(path: Path) -> None:
    """A server of another program that has called bind, and not yet listen, keeps its path."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        assert "a process holds this socket, which is not listening" in str(await rejected(path))


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
@pytest.mark.parametrize("is_connected", [False, True])
async def test_socket_of_another_type(path: Path, kind: int, *, is_connected: bool) -> None:
    """A socket for datagrams or packets that a process holds is not replaced."""
    with listen_at(path, kind) as sock, socket.socket(socket.AF_UNIX, kind) as other:
        if is_connected:
            other.bind(str(path) + "2")
            if kind == socket.SOCK_DGRAM:
                sock.connect(str(path) + "2")
            else:
                other.connect(str(path))
        assert "datagrams or packets" in str(await rejected(path))


@pytest.mark.parametrize("replace", [False, True])
async def test_live_server_on_another_kernel(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, replace: bool
) -> None:
    """A kernel that refuses datagrams to a live stream server does not cost it the path."""
    real = _bind._probe

    class Refused(socket.socket):
        def connect(self, _: Any) -> None:
            raise ConnectionRefusedError

    def probe(kind: socket.SocketKind) -> socket.socket:
        return Refused(socket.AF_UNIX, kind) if kind == socket.SOCK_DGRAM else real(kind)

    monkeypatch.setattr(_bind, "_probe", probe)
    with listen_at(path):
        if replace:
            async with await open_unix_listener(path, replace=True) as listener:
                assert listener.socket.getsockname() == str(path.with_name(".s.new"))
        else:
            assert "a server is listening there" in str(await rejected(path))


async def test_live_server_without_peer_credentials(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the system does not say which process listens, the error says only that one does."""

    def fail(_: object) -> None:
        raise NotSupportedError("no option")

    monkeypatch.setattr(_bind, "peer_credentials", fail)
    with listen_at(path):
        assert "a server is listening there: " in str(await rejected(path))


async def test_server_that_cannot_be_probed(path: Path) -> None:
    """A socket that this process may not connect to is not taken for a dead one."""
    path.parent.chmod(0o777)
    with listen_at(path), as_nobody(path.parent):
        assert "no permission to find out whether a process holds" in str(await rejected(path))


async def test_probe_without_free_descriptors(path: Path) -> None:
    """An error of the probe is raised, and the path stays."""
    dead_socket(path)
    with free_descriptors(3), pytest.raises(OSError, match="Too many open files"):
        await open_unix_listener(path)
    assert path.exists()


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("what", ["regular file", "directory", "symbolic link", "FIFO"])
async def test_not_a_socket_at_the_path(path: Path, what: str, *, replace: bool) -> None:
    """What is not a socket is never replaced, nor is the target of a symbolic link."""
    if what == "regular file":
        path.write_text("x")
    elif what == "directory":
        path.mkdir()
    elif what == "FIFO":
        os.mkfifo(path)
    else:
        dead_socket(path.with_name("target"))
        path.symlink_to("target")
    assert f"not a socket ({what})" in str(await rejected(path, replace=replace))


async def test_dead_socket(path: Path) -> None:
    """A socket that no process holds is replaced."""
    dead_socket(path)
    before = path.stat()
    async with await open_unix_listener(path), await open_unix_connection(path):
        assert path.stat() != before
    assert not path.exists()


async def test_dead_socket_with_connections(path: Path) -> None:
    """A socket whose server has exited is replaced, even if its connections are still open."""
    server = listen_at(path)
    async with await open_unix_connection(path) as client:
        accepted, _ = server.accept()
        server.close()
        with accepted:
            async with await open_unix_listener(path) as listener:
                assert listener.socket.getsockname() == str(path)
            accepted.sendall(b"x")
            assert await client.receive_some() == b"x"


async def test_dead_socket_removed_before_the_probe(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead socket that another program removes before it is probed is not an error."""
    real = _bind._holder_of

    def holder_of(there: bytes) -> str | None:
        path.unlink()
        return real(there)

    monkeypatch.setattr(_bind, "_holder_of", holder_of)
    dead_socket(path)
    async with await open_unix_listener(path) as listener:
        await check_serves(listener, path)


async def test_dead_socket_removed_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead socket that another program removes at the same time is not an error."""
    real = _bind._unlink_dead

    def unlink_dead(*arguments: Any) -> None:
        path.unlink()
        real(*arguments)

    monkeypatch.setattr(_bind, "_unlink_dead", unlink_dead)
    dead_socket(path)
    async with await open_unix_listener(path) as listener:
        await check_serves(listener, path)


@as_root
async def test_dead_socket_of_another_user_in_a_sticky_directory() -> None:
    """A dead socket that cannot be removed is named, with its owner."""
    with shared_directory() as directory:
        path = directory / "s"
        dead_socket(path, OTHER_UID)
        path.chmod(0o666)
        directory.chmod(0o1777)
        with as_nobody(directory), pytest.raises(PermissionError) as caught:
            await open_unix_listener(path)
        assert f"{path} is a socket of user {OTHER_UID}" in str(caught.value)
        assert caught.value.filename == str(path)
        assert os.listdir(directory) == ["s"]


@pytest.mark.parametrize("name", ["s", "x" * 200])
async def test_path_created_meanwhile(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What another program creates at the path at the last moment is not overwritten."""
    path = path.with_name(name)
    real_bind, real_move = _bind._bind_with, _bind._move

    def bind_with(*arguments: Any) -> os.stat_result:
        if name == "s":
            path.write_text("x")
        return real_bind(*arguments)

    def move(*arguments: Any, **options: Any) -> None:
        path.write_text("x")
        real_move(*arguments, **options)

    monkeypatch.setattr(_bind, "_bind_with", bind_with)
    monkeypatch.setattr(_bind, "_move", move)
    with pytest.raises(AddressInUseError, match="another process has just created") as caught:
        await open_unix_listener(path)
    assert caught.value.filename == str(path)
    assert path.read_text() == "x"
    assert os.listdir(path.parent) == [name]


# Owner, group and mode


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077, 0o177])
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
@pytest.mark.parametrize("replace", [False, True])
async def test_mode_at_birth(
    path: Path, monkeypatch: pytest.MonkeyPatch, mask: int, mode: int, *, replace: bool
) -> None:
    """From bind on, the file never has more permissions than mode, whatever the umask."""
    seen: list[int] = []
    real = _bind._set_permissions

    def set_permissions(place: Any, name: bytes, *arguments: Any) -> None:
        seen.append(stat.S_IMODE(path.with_name(os.fsdecode(name)).stat().st_mode))
        real(place, name, *arguments)

    with contextlib.ExitStack() as stack:
        if replace:
            stack.enter_context(listen_at(path))
        monkeypatch.setattr(_bind, "_set_permissions", set_permissions)
        os.umask(mask)
        async with await open_unix_listener(path, mode=mode, replace=replace):
            assert stat.S_IMODE(path.stat().st_mode) == mode
            assert os.umask(mask) == mask
    assert seen == [mode & ~mask]


INTRUDER = """
import os, socket, sys
path, uid = sys.argv[1:]
os.setgroups([])
os.setresgid(int(uid), int(uid), int(uid))
os.setresuid(int(uid), int(uid), int(uid))
os.set_blocking(0, False)
connected = tried = 0
print("ready", flush=True)
while True:
    for name in (path, path[:-1] + ".s.new"):
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(name)
                connected += 1
            except PermissionError:
                tried += 1
            except OSError:
                pass
    try:
        if os.read(0, 1) == b"":
            break
    except BlockingIOError:
        pass
print(connected, tried)
"""


@pytest.mark.slow
@as_root
@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("replace", [False, True])
async def test_mode_keeps_another_user_out_in_a_race(*, replace: bool) -> None:
    """A process of another user that connects all the time gets in at no moment."""
    with shared_directory() as directory:
        path = directory / "s"
        process = subprocess.Popen(
            [sys.executable, "-c", INTRUDER, str(path), str(OTHER_UID)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            os.umask(0)
            for _ in range(150):
                listener = await open_unix_listener(path)
                if replace:
                    await (await open_unix_listener(path, replace=True)).aclose()
                await listener.aclose()
            process.stdin.close()
            connected, tried = map(int, process.stdout.read().split())
        assert connected == 0
        assert tried > 0


@as_root
@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("replace", [False, True])
async def test_owner_and_group_before_listen(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, replace: bool
) -> None:
    """The path has its owner, group and mode before listen, and until then no other user's."""
    seen: list[tuple[int, int, int]] = []

    def look(name: bytes) -> None:
        status = path.with_name(os.fsdecode(name)).stat()
        seen.append((status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)))

    real, real_permissions = _bind.bind, _bind._set_permissions

    def bind(
        sock: socket.socket, address: bytes, permissions: Any, listen: Any, **options: Any
    ) -> _bind.Binding:
        def look_and_listen() -> None:
            look(b".s.new" if replace else b"s")
            listen()

        return real(sock, address, permissions, look_and_listen, **options)

    def set_permissions(place: Any, name: bytes, *arguments: Any) -> None:
        look(name)
        real_permissions(place, name, *arguments)

    with contextlib.ExitStack() as stack:
        if replace:
            stack.enter_context(listen_at(path))
        monkeypatch.setattr(_bind, "bind", bind)
        monkeypatch.setattr(_bind, "_set_permissions", set_permissions)
        os.umask(0)
        async with await open_unix_listener(
            path, owner=OTHER_UID, group=NOBODY, mode=0o660, replace=replace
        ):
            look(b"s")
    set_up = (OTHER_UID, NOBODY, 0o660)
    assert seen == [(0, 0, 0o600), set_up, set_up]


@as_root
@pytest.mark.parametrize(
    ("options", "uid", "gid"),
    [
        ({"owner": "nobody"}, NOBODY, 0),
        ({"group": OTHER_UID}, 0, OTHER_UID),
        ({"owner": 0, "group": "root"}, 0, 0),
    ],
)
async def test_owner_and_group(path: Path, options: Any, uid: int, gid: int) -> None:
    """Owner and group are ids or names, and each can be omitted."""
    async with await open_unix_listener(path, **options):
        status = path.stat()
        assert (status.st_uid, status.st_gid) == (uid, gid)
        assert stat.S_IMODE(status.st_mode) == 0o600


async def test_owner_without_permission(path: Path) -> None:
    """A process that may not set the owner gets an error with that reason, and leaves nothing."""
    path.parent.chmod(0o777)
    with as_nobody(path.parent), pytest.raises(PermissionError) as caught:
        await open_unix_listener(path, owner=OTHER_UID)
    assert f"cannot set owner={OTHER_UID}, group=None of the socket" in str(caught.value)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("what", ["symbolic link", "socket"])
async def test_socket_replaced_before_it_has_its_mode(
    path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """What another process puts in the place of the new socket does not get its mode."""
    other = path.with_name("other")
    dead_socket(other)
    other.chmod(0o600)
    real = _bind._set_permissions

    def set_permissions(place: Any, name: bytes, *arguments: Any) -> None:
        path.unlink()
        if what == "socket":
            other.rename(path)
        else:
            path.symlink_to("other")
        real(place, name, *arguments)

    monkeypatch.setattr(_bind, "_set_permissions", set_permissions)
    with pytest.raises(OSError, match="was replaced by another process") as caught:
        await open_unix_listener(path, mode=0o666)
    assert caught.value.errno == errno.EBUSY
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_socket_replaced_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not a socket just after bind is left alone."""

    class Replaced(socket.socket):
        def bind(self, address: Any) -> None:
            super().bind(address)
            path.unlink()
            path.write_text("x")

    monkeypatch.setattr(socket, "socket", Replaced)
    with pytest.raises(OSError, match="was replaced by another process"):
        await open_unix_listener(path)
    assert path.read_text() == "x"
    assert os.listdir(path.parent) == ["s"]


@as_root
@pytest.mark.parametrize("options", [{"mode": 0o666}, {"group": OTHER_UID}])
async def test_permissions_without_o_path(
    path: Path, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    """Where the file of a socket cannot be opened, owner, group and mode are set by its name."""
    monkeypatch.delattr(os, "O_PATH")
    async with await open_unix_listener(path, **options):
        status = path.stat()
        assert stat.S_IMODE(status.st_mode) == options.get("mode", 0o600)
        assert status.st_gid == options.get("group", 0)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("options", [{"mode": 0o666}, {"group": 0}])
async def test_permissions_without_proc(
    path: Path, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    """Without /proc, only a mode that the umask leaves can be set; the error has that reason."""
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    async with await open_unix_listener(path, mode=0o644):
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with pytest.raises(OSError, match=r"without /proc .* mount /proc, or choose the umask"):
        await open_unix_listener(path, **options)
    assert os.listdir(path.parent) == []


async def test_bind_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of bind(2) is raised, with the path, and nothing is left there."""

    class Failing(socket.socket):
        def bind(self, _: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(socket, "socket", Failing)
    with pytest.raises(OSError, match="No space left on device") as caught:
        await open_unix_listener(path)
    assert caught.value.filename == str(path)
    assert os.listdir(path.parent) == []


# Taking over


async def test_replace(path: Path) -> None:
    """With replace=True the path goes over in one step, and the old server sees nothing of it."""
    old = await open_unix_listener(path)
    early = await open_unix_connection(path)
    async with await open_unix_listener(path, replace=True) as new, early:
        async with await open_unix_connection(path) as late, await new.accept() as server:
            await late.send_all(b"late")
            assert await server.receive_some() == b"late"
        async with await old.accept() as server:
            await early.send_all(b"early")
            assert await server.receive_some() == b"early"
        # To find out that the old server is alive has put no connection into its queue.
        assert old._acceptor.accept_pending(1) == ([], None)
        await old.aclose()
        assert path.exists()
    assert not path.exists()


@as_root
async def test_replace_in_a_sticky_directory() -> None:
    """A live socket of another user in a sticky directory is not replaced, and its owner named."""
    with shared_directory() as directory:
        path = directory / "s"
        directory.chmod(0o1777)
        with listen_at(path):
            os.chown(path, OTHER_UID, -1)
            with as_nobody(directory), pytest.raises(PermissionError) as caught:
                await open_unix_listener(path, replace=True)
        assert f"cannot replace the socket of user {OTHER_UID}" in str(caught.value)
        assert os.listdir(directory) == ["s"]


async def test_unlink_on_close_false(path: Path) -> None:
    """With unlink_on_close=False the path stays, and the next server replaces it."""
    async with await open_unix_listener(path, unlink_on_close=False):
        pass
    assert stat.S_ISSOCK(path.stat().st_mode)
    async with await open_unix_listener(path):
        pass
    assert not path.exists()


@pytest.mark.parametrize("replace", [False, True])
async def test_dead_socket_at_the_temporary_name(path: Path, *, replace: bool) -> None:
    """What a killed server left at the temporary name is removed, even if it is not needed."""
    dead_socket(path.with_name(".s.new"))
    with contextlib.ExitStack() as stack:
        if replace:
            stack.enter_context(listen_at(path))
        async with await open_unix_listener(path, replace=replace):
            assert os.listdir(path.parent) == ["s"]


async def test_live_server_at_the_temporary_name(path: Path) -> None:
    """A live server at the temporary name keeps it; only a take-over fails, and names it."""
    new = path.with_name(".s.new")
    with listen_at(new) as other:
        other.listen(1)
        async with await open_unix_listener(path):
            error = await rejected(path, replace=True)
            assert f"needs the temporary name {new}, where there is a socket" in str(error)
            assert f"a server is listening there (pid {os.getpid()}" in str(error)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(new))
            # The first one has asked for the process.
            for _ in range(2):
                other.accept()[0].close()


async def test_check_with_a_file_at_the_temporary_name(path: Path) -> None:
    """It says that the path could not be taken from a live server, and changes nothing."""
    new = path.with_name(".s.new")
    new.write_text("x")
    with listen_at(path), pytest.raises(AddressInUseError, match=f"needs the temporary name {new}"):
        _bind.check(os.fsencode(path), _bind.Permissions())
    assert new.read_text() == "x"


async def test_file_at_the_temporary_name(path: Path) -> None:
    """What is not a socket is not removed there, either."""
    new = path.with_name(".s.new")
    new.write_text("precious")
    async with await open_unix_listener(path):
        error = await rejected(path, replace=True)
        assert f"temporary name {new}, where there is a regular file of user" in str(error)
    assert new.read_text() == "precious"
    assert os.listdir(path.parent) == [".s.new"]


@as_root
async def test_temporary_name_of_another_user_in_a_sticky_directory() -> None:
    """A dead socket of another user at the temporary name is named, with its owner."""
    with shared_directory() as directory:
        path, new = directory / "s", directory / ".s.new"
        directory.chmod(0o1777)
        dead_socket(new, OTHER_UID)
        new.chmod(0o666)
        with as_nobody(directory):
            async with await open_unix_listener(path):
                with pytest.raises(PermissionError) as caught:
                    await open_unix_listener(path, replace=True)
        assert f"{new} is a socket of user {OTHER_UID}" in str(caught.value)
        assert caught.value.filename == str(path)
        assert os.listdir(directory) == [".s.new"]


# The lock


@contextlib.contextmanager
def held_lock(path: Path) -> Iterator[Path]:
    """Hold the lock as another process would: this is another open file."""
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield lock


async def test_open_unix_listener_waits_for_the_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another process holds the lock a start waits, and the event loop runs."""
    done: list[UnixListener] = []

    async def start() -> None:
        done.append(await open_unix_listener(path))

    async with trio.open_nursery() as nursery:
        with held_lock(path) as lock:
            tries = counted(monkeypatch, _bind, "bind")
            nursery.start_soon(start)
            # It retries, and this task runs between.
            await until(lambda: len(tries) > 5)
            assert done == []
            # As its holder does at its end: the removed file must not be taken for the lock.
            lock.unlink()
    await done[0].aclose()
    assert os.listdir(path.parent) == []


async def test_open_unix_listener_while_all_threads_are_busy(path: Path) -> None:
    """A listener opens and closes even if every thread of trio's limiter is in use."""
    owner = _kernel.name_of_user(os.geteuid())
    limiter = trio.to_thread.current_default_thread_limiter()
    holders = [object() for _ in range(int(limiter.total_tokens))]
    for holder in holders:
        limiter.acquire_on_behalf_of_nowait(holder)
    try:
        with trio.fail_after(30):
            async with await open_unix_listener(path, owner=owner):
                pass
    finally:
        for holder in holders:
            limiter.release_on_behalf_of(holder)
    assert not path.exists()


HOLDER = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("locked", flush=True)
    sys.stdin.read()
"""


async def test_lock_that_stays_held(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that stays held is an error after a limited time, with file, owner and process."""
    monkeypatch.setattr(_bind, "LOCK_TIMEOUT", 0.05)
    lock = path.with_name(".s.lock")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(AddressInUseError) as caught:
            await open_unix_listener(path)
        process.stdin.close()
    assert caught.value.filename == str(path)
    assert (
        f"another process keeps the lock of this path, {lock}, a file of user {os.geteuid()}, "
        f"locked by pid {process.pid}; if no server is starting or ending there, remove that file"
    ) in str(caught.value)
    assert os.listdir(path.parent) == [".s.lock"]


@pytest.mark.parametrize("locks", [None, "1: POSIX ADVISORY WRITE 1 00:00:1 0 EOF\n"])
def test_lock_without_proc(path: Path, monkeypatch: pytest.MonkeyPatch, locks: str | None) -> None:
    """If the kernel does not say which process holds a lock, the error does not, either."""
    path.write_text(locks or "")
    real = open

    def read(_: str, **options: Any) -> Any:
        if locks is None:
            raise FileNotFoundError
        return real(path, **options)

    monkeypatch.setattr("builtins.open", read)
    error = _bind.LockHeldError(b"/x/.s.lock", path.stat())
    assert "locked by" not in error.describe()
    assert "a file of user" in error.describe()
    assert "a file of user" not in _bind.LockHeldError(b"/x/.s.lock").describe()


@pytest.mark.parametrize("content", ["", "precious"])
async def test_file_of_the_user_at_the_name_of_the_lock(path: Path, content: str) -> None:
    """A file that is not a lock of this library is never removed."""
    lock = path.with_name(".s.lock")
    lock.write_text(content)
    before = lock.stat()
    async with await open_unix_listener(path) as listener:
        await check_serves(listener, path)
    assert os.path.samestat(lock.stat(), before)
    assert lock.stat().st_mtime_ns == before.st_mtime_ns
    assert lock.read_text() == content


async def test_lock_that_cannot_be_written(path: Path) -> None:
    """A file that can only be read is locked nevertheless."""
    lock = path.with_name(".s.lock")
    lock.write_text("x")
    lock.chmod(0o444)
    path.parent.chmod(0o777)
    with as_nobody(path.parent):
        async with await open_unix_listener(path), await open_unix_connection(path):
            pass
    assert os.listdir(path.parent) == [".s.lock"]


async def test_lock_of_a_process_that_was_killed(path: Path) -> None:
    """The lock file of a process that was killed is used, and removed."""
    fd = os.open(path.with_name(".s.lock"), os.O_CREAT, _bind._LOCK_MODE)
    os.close(fd)
    async with await open_unix_listener(path):
        assert os.listdir(path.parent) == ["s"]


async def test_cancelled_while_waiting_for_the_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that waits for the lock can be cancelled, and leaves nothing."""
    with held_lock(path) as lock:
        async with trio.open_nursery() as nursery:
            tries = counted(monkeypatch, _bind, "bind")
            nursery.start_soon(open_unix_listener, path)
            await until(lambda: len(tries) > 2)
            nursery.cancel_scope.cancel()
        lock.unlink()
    assert os.listdir(path.parent) == []


async def test_lock_that_was_removed_or_replaced(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock whose file is no longer at its name excludes no process, and is not used."""
    real = fcntl.flock
    removed: list[Path] = []

    def flock(fd: int, operation: int) -> None:
        real(fd, operation)
        if len(removed) < 2 and operation & fcntl.LOCK_EX:
            lock = path.with_name(".s.lock")
            lock.unlink()
            removed.append(lock)
            if len(removed) == 2:
                lock.write_text("of the next holder")

    monkeypatch.setattr(fcntl, "flock", flock)
    async with await open_unix_listener(path):
        assert len(removed) == 2
    # It was not made by this library, and so it stays.
    assert os.listdir(path.parent) == [".s.lock"]


@pytest.mark.parametrize("is_replaced", [False, True])
async def test_lock_file_removed_while_it_is_held(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, is_replaced: bool
) -> None:
    """A holder whose lock file was removed does not remove that of the next holder."""
    real = _bind._set_permissions
    lock = path.with_name(".s.lock")

    def set_permissions(*arguments: Any) -> None:
        lock.unlink()
        if is_replaced:
            os.close(os.open(lock, os.O_CREAT, _bind._LOCK_MODE))
        real(*arguments)

    monkeypatch.setattr(_bind, "_set_permissions", set_permissions)
    async with await open_unix_listener(path, unlink_on_close=False):
        assert sorted(os.listdir(path.parent)) == ([".s.lock"] if is_replaced else []) + ["s"]


async def test_lock_created_by_two_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another process creates the lock file first, that one is used."""
    real = os.open
    created: list[Any] = []
    lock = path.with_name(".s.lock")

    def create(name: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_CREAT and not created:
            created.append(name)
            lock.write_text("x")
        return real(name, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", create)
    async with await open_unix_listener(path):
        assert created == [b".s.lock"]
    assert lock.read_text() == "x"


@pytest.mark.parametrize("what", ["symbolic link", "directory", "FIFO"])
async def test_not_a_file_at_the_name_of_the_lock(path: Path, what: str) -> None:
    """What cannot serve as a lock is named, with its owner, and left alone."""
    lock = path.with_name(".s.lock")
    if what == "symbolic link":
        lock.symlink_to("elsewhere")
    elif what == "directory":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    with pytest.raises(OSError, match=rf"{lock}, is a {what} of user \d+ that") as caught:
        await open_unix_listener(path)
    assert caught.value.filename == str(path)
    assert os.listdir(path.parent) == [".s.lock"]


async def test_lock_that_vanishes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that could not be opened and was removed since leaves the error of open."""
    real = os.open

    def fail(name: Any, *arguments: Any, **options: Any) -> int:
        if name == b".s.lock":
            raise OSError(errno.EIO, "Input/output error")
        return real(name, *arguments, **options)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match="Input/output error: '") as caught:
        await open_unix_listener(path)
    assert caught.value.filename == str(path)


@as_root
async def test_lock_of_another_user_in_a_sticky_directory() -> None:
    """A lock that only another user can open is named, with its owner; root uses it."""
    with shared_directory() as directory:
        path, lock = directory / "s", directory / ".s.lock"
        directory.chmod(0o1777)
        os.close(os.open(lock, os.O_CREAT, 0o600))
        os.chown(lock, OTHER_UID, -1)
        with as_nobody(directory), pytest.raises(PermissionError) as caught:
            await open_unix_listener(path)
        assert f"{lock}, is a regular file of user {OTHER_UID}" in str(caught.value)
        assert "remove it if no server is starting there" in str(caught.value)
        assert caught.value.filename == str(path)
        async with await open_unix_listener(path):
            pass
        assert os.listdir(directory) == [".s.lock"]


async def test_lock_that_cannot_be_removed(path: Path) -> None:
    """A lock file of another user in a sticky directory serves as well, and stays."""
    lock = path.with_name(".s.lock")
    os.close(os.open(lock, os.O_CREAT, _bind._LOCK_MODE))
    lock.chmod(stat.S_ISVTX | 0o666)
    path.parent.chmod(0o1777)
    with as_nobody(path.parent):
        async with await open_unix_listener(path), await open_unix_connection(path):
            pass
    assert os.listdir(path.parent) == [".s.lock"]


async def test_directory_that_cannot_be_listed(path: Path) -> None:
    """To listen takes no permission to read the directory, only to write to it."""
    path.parent.chmod(0o733)
    with as_nobody(path.parent):
        async with await open_unix_listener(path), await open_unix_connection(path):
            pass
    assert os.listdir(path.parent) == []


async def test_directory_that_cannot_be_written(path: Path) -> None:
    """A directory that is read-only is named, and no lock is left there."""
    path.parent.chmod(0o755)
    with as_nobody(path.parent), pytest.raises(PermissionError) as caught:
        await open_unix_listener(path)
    assert f"no permission to write to directory {path.parent}" in str(caught.value)
    assert os.listdir(path.parent) == []


async def test_lock_that_a_forked_process_has_copied(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the lock's file descriptor, as a fork makes it, holds no lock."""
    real, copies = fcntl.flock, []

    def flock(fd: int, operation: int) -> None:
        real(fd, operation)
        if operation & fcntl.LOCK_EX:
            copies.append(os.dup(fd))

    monkeypatch.setattr(fcntl, "flock", flock)
    # A file that is not removed: the lock of a removed one would stop no process.
    path.with_name(".s.lock").touch()
    try:
        with trio.fail_after(30):
            for _ in range(2):
                async with await open_unix_listener(path):
                    pass
        assert not path.exists()
    finally:
        for copy in copies:
            os.close(copy)
    assert len(copies) == 4


# Closing


async def test_aclose_twice_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second task that closes does not close the socket before the path is removed."""
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


async def test_aclose_without_free_descriptors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing retries until a file descriptor is free that it needs to remove the path."""
    monkeypatch.setattr(_bind, "CLOSE_LOCK_TIMEOUT", 60)
    listener = await open_unix_listener(path)
    async with trio.open_nursery() as nursery:
        with free_descriptors(0):
            tries = counted(monkeypatch, _bind, "unbind")
            nursery.start_soon(listener.aclose)
            await until(lambda: len(tries) > 2)
            assert path.exists()
    assert not path.exists()


async def test_aclose_that_never_gets_a_descriptor(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If no file descriptor gets free, the listener closes, and its path stays."""
    monkeypatch.setattr(_bind, "CLOSE_LOCK_TIMEOUT", 0)
    listener = await open_unix_listener(path)
    with free_descriptors(0):
        await listener.aclose()
    assert listener.socket.fileno() == -1
    assert path.exists()
    assert f"{path}: the path stays, for the next server to replace: [Errno 24]" in caplog.text


async def test_aclose_while_the_lock_is_held(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A lock that stays held does not keep a listener from closing; its path stays."""
    monkeypatch.setattr(_bind, "CLOSE_LOCK_TIMEOUT", 0.02)
    listener = await open_unix_listener(path)
    with held_lock(path) as lock:
        await listener.aclose()
        lock.unlink()
    assert listener.socket.fileno() == -1
    assert path.exists()
    assert f"{path}: the path stays" in caplog.text
    assert f"keeps the lock of this path, {lock}" in caplog.text


@pytest.mark.parametrize("what", ["open", "close"])
async def test_lock_under_autojump_clock(
    path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A trio clock that jumps does not end the wait for a lock that is held in real time."""
    autojump_clock.autojump_threshold = 0
    work = "bind" if what == "open" else "unbind"
    real = getattr(_bind, work)
    tries: list[str] = []
    has_retried = threading.Event()

    def attempt(*arguments: Any, **options: Any) -> Any:
        tries.append(work)
        if len(tries) == 4:
            has_retried.set()
        return real(*arguments, **options)

    monkeypatch.setattr(_bind, work, attempt)
    listener = await open_unix_listener(path) if what == "close" else None
    lock = path.with_name(".s.lock")
    file = lock.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)

    def release() -> None:
        assert has_retried.wait(30)
        # Unlocked, and not removed: otherwise this would race with the next attempt.
        fcntl.flock(file, fcntl.LOCK_UN)

    thread = threading.Thread(target=release)
    thread.start()
    if listener is None:
        listener = await open_unix_listener(path)
        assert path.exists()
    await listener.aclose()
    thread.join(30)
    file.close()
    assert len(tries) >= 4
    assert not path.exists()


async def test_aclose_when_cancelled(path: Path) -> None:
    """The path is removed even if the task that closes is cancelled."""
    with trio.CancelScope() as scope:
        async with await open_unix_listener(path):
            scope.cancel()
    assert os.listdir(path.parent) == []


async def test_aclose_without_the_directory(path: Path) -> None:
    """A listener whose directory was removed or moved can be closed."""
    directory = path.with_name("below")
    directory.mkdir()
    listener = await open_unix_listener(directory / "s")
    (directory / "s").unlink()
    directory.rmdir()
    await listener.aclose()
    directory.write_text("not a directory")
    listener = await open_unix_listener(path)
    path.rename(path.with_name("moved"))
    await listener.aclose()
    assert path.with_name("moved").exists()


async def test_accept_while_closing(path: Path) -> None:
    """A task in accept() is woken when the listener closes, though the path is removed first."""
    listener = await open_unix_listener(path)
    async with trio.open_nursery() as nursery:

        async def accept() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await listener.accept()

        nursery.start_soon(accept)
        await wait_all_tasks_blocked()
        await listener.aclose()


# Paths of every form


async def test_path_with_dot_dot_after_a_symbolic_link(path: Path) -> None:
    """A path with ".." is the same to the listener as to clients."""
    (path.parent / "a" / "b").mkdir(parents=True)
    path.with_name("link").symlink_to("a/b")
    there = path.parent / "link" / ".." / "s"
    async with await open_unix_listener(there), await open_unix_connection(there):
        assert (path.parent / "a" / "s").exists()
    assert os.listdir(path.parent / "a") == ["b"]


@pytest.mark.parametrize("what", ["/", ".", "..", "below/", "below/.", "below/.."])
async def test_path_of_a_directory(path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A directory is rejected as one, however it is written, if a lock can be made there."""
    monkeypatch.chdir(path.parent)
    path.with_name("below").mkdir()
    with pytest.raises(OSError, match=r"not a socket \(directory\)|write to directory /"):
        await open_unix_listener(what)


async def test_abstract_name_in_use() -> None:
    """An abstract name in use is AddressInUseError, and says how to find its process."""
    name = f"\0trio-unixconn-binding-{os.getpid()}"
    async with await open_unix_listener(name):
        with pytest.raises(AddressInUseError, match="ss -xlp") as caught:
            await open_unix_listener(name)
        assert caught.value.errno == errno.EADDRINUSE
        assert caught.value.filename == f"@{name[1:]}"


@pytest.mark.parametrize("address", ["", b"", "\0x"])
async def test_abstract_names_require_linux(
    monkeypatch: pytest.MonkeyPatch, address: str | bytes
) -> None:
    """On other systems, abstract and automatic names are NotSupportedError."""
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(NotSupportedError, match="require Linux; use a path"):
        await open_unix_listener(address)


@pytest.mark.parametrize("address", ["", b"", UnixSocketAddress()])
async def test_autobind(address: str | bytes | UnixSocketAddress) -> None:
    """With an empty address the kernel chooses an abstract name, which the listener returns."""
    async with (
        await open_unix_listener(address) as listener,
        await open_unix_listener(address) as other,
    ):
        name = listener.get_local_address()
        assert name.get_is_abstract()
        assert name.native == listener.socket.getsockname()
        assert name != other.get_local_address()
        async with await open_unix_connection(name) as client, await listener.accept() as server:
            assert client.get_remote_address() == server.get_local_address() == name


async def test_long_path_without_proc(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc a long path is ENAMETOOLONG, even if a dead socket is there."""
    path = path.with_name("x" * 200)
    async with await open_unix_listener(path, unlink_on_close=False):
        pass
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    for use in (open_unix_listener, open_unix_connection):
        with pytest.raises(OSError, match="require /proc, which is not mounted") as caught:
            await use(path)
        assert caught.value.errno == errno.ENAMETOOLONG
    assert path.is_socket()


async def test_long_path_without_o_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the system cannot shorten a path, a long one is ENAMETOOLONG."""
    monkeypatch.setattr(_paths, "_O_PATH", None)
    path = path.with_name("x" * 200)
    for use in (open_unix_listener, open_unix_connection):
        with pytest.raises(OSError, match="choose a shorter path") as caught:
            await use(path)
        assert caught.value.errno == errno.ENAMETOOLONG
    assert os.listdir(path.parent) == []
