"""PeerIdentity: credentials, pidfds, groups, labels, and /proc of a peer."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests._helpers.fds import free_descriptors
from tests._helpers.peers import (
    PeerProcess,
    client_process,
    report_of,
    reporting_process,
    shared_directory,
)
from tests._helpers.processes import family
from tests._helpers.programs.identity_reporter import outcome
from tests._helpers.requirements import (
    in_pid_namespace,
    mount_namespaces,
    peer_pidfds,
    pid_namespaces,
    unshared,
)
from tests._helpers.users import OTHER_UID, as_root
from tests._helpers.waiting import until
from trio_unixconn import (
    ConnectionClosedError,
    Credentials,
    IOErrorEnum,
    NotSupportedError,
    PeerGoneError,
    PeerIdentity,
    UnixConnection,
    UnixListener,
    _identity,
    _kernel,
    connection_pair,
    open_unix_connection,
    open_unix_listener,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

NS_LAST_PID = "/proc/sys/kernel/ns_last_pid"


@pytest.fixture
async def listener() -> AsyncIterator[UnixListener]:
    """A listener that every user may connect to."""
    with shared_directory() as directory:
        async with await open_unix_listener(directory / "s", mode=0o666) as listener:
            yield listener


def path_of(listener: UnixListener) -> str:
    return str(listener.get_local_address().get_path())


@contextmanager
def opened_pidfd(conn: UnixConnection) -> Iterator[int]:
    pidfd = conn.open_peer_pidfd()
    assert pidfd is not None
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def looks(peer: PeerIdentity) -> list[Callable[[], object]]:
    """Return the reads of /proc."""
    return [lambda: peer.exe, lambda: peer.cgroup]


@attrs.define
class Simulated:
    """A socket whose getsockopt answers as another kernel's would."""

    answer: Callable[..., Any]

    def getsockopt(self, *arguments: int) -> Any:
        return self.answer(*arguments)

    @classmethod
    def that_fails(cls, number: int) -> Any:
        def fail(*_: int) -> Any:
            raise OSError(number, os.strerror(number))

        return cls(fail)


################################################################
# open_peer_pidfd
################################################################


@peer_pidfds
async def test_open_peer_pidfd(listener: UnixListener) -> None:
    """The pidfd is of the process that connected, close-on-exec, and readable after its exit."""
    async with client_process(path_of(listener)) as client, await listener.accept() as conn:
        with opened_pidfd(conn) as pidfd:
            assert not os.get_inheritable(pidfd)
            with open(f"/proc/self/fdinfo/{pidfd}") as file:
                assert f"Pid:\t{client.pid}\n" in file.read()
            assert not select.select([pidfd], [], [], 0)[0]
            await client.end()
            with trio.fail_after(30):
                await trio.lowlevel.wait_readable(pidfd)


@peer_pidfds
async def test_open_peer_pidfd_at_the_connecting_end(listener: UnixListener) -> None:
    """For a client it is of the process that listens."""
    async with await open_unix_connection(path_of(listener)) as conn:
        with opened_pidfd(conn) as pidfd, open(f"/proc/self/fdinfo/{pidfd}") as file:
            assert f"Pid:\t{os.getpid()}\n" in file.read()


@peer_pidfds
async def test_open_peer_pidfd_of_a_zombie_and_of_a_reaped_peer(listener: UnixListener) -> None:
    """A peer that has exited has a pidfd until it is reaped; then it is PeerGoneError."""
    async with client_process(path_of(listener)) as client, await listener.accept() as conn:
        await client.end()
        with opened_pidfd(conn) as pidfd:
            assert select.select([pidfd], [], [], 0)[0]
        client.reap()
        with pytest.raises(PeerGoneError, match="has exited") as caught:
            conn.open_peer_pidfd()
        assert caught.value.errno == errno.ESRCH
        assert isinstance(caught.value, ProcessLookupError)
        assert conn.get_local_address() == listener.get_local_address()
        assert conn.get_remote_address().get_is_anonymous()
        assert caught.value.code is IOErrorEnum.NOT_FOUND


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ESRCH])
def test_open_peer_pidfd_of_a_gone_peer_on_older_kernels(number: int) -> None:
    """EINVAL, which Linux 6.5 says for a reaped peer, is PeerGoneError, too."""
    with pytest.raises(PeerGoneError) as caught:
        _identity.open_peer_pidfd(Simulated.that_fails(number))
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("number", [errno.ENOPROTOOPT, errno.ENODATA])
def test_open_peer_pidfd_without_kernel_support(number: int) -> None:
    """If the kernel has no SO_PEERPIDFD, there is no pidfd."""
    assert _identity.open_peer_pidfd(Simulated.that_fails(number)) is None


def test_open_peer_pidfd_without_platform_support(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the option has no number, there is no pidfd."""
    monkeypatch.setattr(_kernel, "SO_PEERPIDFD", None)
    assert _identity.open_peer_pidfd(Simulated.that_fails(errno.EIO)) is None


def test_open_peer_pidfd_raises_other_errors() -> None:
    """Any other error is raised."""
    with pytest.raises(OSError, match="Input/output") as caught:
        _identity.open_peer_pidfd(Simulated.that_fails(errno.EIO))
    assert caught.value.errno == errno.EIO


@peer_pidfds
async def test_open_peer_pidfd_without_a_free_descriptor() -> None:
    """Without a free descriptor it is EMFILE, even if all facts are read; groups need none."""
    one, two = connection_pair()
    async with one, two:
        for ask in (one.open_peer_pidfd, one.get_peer_identity):
            with free_descriptors(0), pytest.raises(OSError, match="Too many open") as caught:
                ask()
            assert caught.value.errno == errno.EMFILE
        with free_descriptors(0):
            assert one.get_peer_groups() == tuple(os.getgroups())
            assert one.get_peer_identity(with_pidfd=False).pidfd is None


def failing_signal(number: int) -> Callable[..., None]:
    def fail(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture(params=[errno.EPERM, errno.EINVAL, errno.ENOSYS, None])
def no_signals(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals to the peer are refused; or this Python was built without pidfd_send_signal."""
    if request.param is None:
        monkeypatch.delattr(signal, "pidfd_send_signal")
    else:
        monkeypatch.setattr(signal, "pidfd_send_signal", failing_signal(request.param))


@peer_pidfds
@pytest.mark.usefixtures("no_signals")
async def test_open_peer_pidfd_of_a_peer_that_takes_no_signals(listener: UnixListener) -> None:
    """A peer that cannot be sent a signal is there until it is reaped, nevertheless."""
    async with client_process(path_of(listener)) as client, await listener.accept() as conn:
        with opened_pidfd(conn):
            await client.end()
        with opened_pidfd(conn):
            client.reap()
        with pytest.raises(PeerGoneError):
            conn.open_peer_pidfd()


@peer_pidfds
@pytest.mark.usefixtures("no_signals")
async def test_open_peer_pidfd_without_proc_and_signals(
    listener: UnixListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With neither signals nor /proc, a pidfd of an exited process is returned."""

    def missing(_: int) -> int:
        raise FileNotFoundError

    monkeypatch.setattr(_identity, "pid_of", missing)
    async with client_process(path_of(listener)) as client, await listener.accept() as conn:
        with opened_pidfd(conn) as pidfd:
            assert not select.select([pidfd], [], [], 0)[0]
        await client.end()
        with opened_pidfd(conn) as pidfd:
            assert select.select([pidfd], [], [], 0)[0]


async def test_get_peer_identity_of_a_closed_connection() -> None:
    """Nothing is told about the peer of a connection that this side has closed."""
    one, two = connection_pair()
    await one.aclose()
    await two.aclose()
    for ask in (
        one.get_peer_credentials,
        one.open_peer_pidfd,
        one.get_peer_groups,
        one.get_peer_security_context,
        one.get_peer_identity,
        one.get_local_address,
        one.get_remote_address,
    ):
        with pytest.raises(ConnectionClosedError):
            ask()


################################################################
# Groups and labels
################################################################


@as_root
@pytest.mark.parametrize(
    "groups",
    [[], [4711], [1, 2, 70000], list(range(20000, 20256)), list(range(20000, 20300))],
    ids=len,
)
async def test_get_peer_groups(listener: UnixListener, groups: list[int]) -> None:
    """The supplementary groups are those that the peer had, however many; Python takes 256."""
    async with (
        client_process(path_of(listener), uid=OTHER_UID, gid=54321, groups=groups) as client,
        await listener.accept() as conn,
        await open_unix_connection(path_of(listener)) as own,
    ):
        assert conn.get_peer_credentials() == Credentials(client.pid or 0, OTHER_UID, 54321)
        assert conn.get_peer_groups() == tuple(groups)
        assert own.get_peer_groups() == tuple(os.getgroups())
        with conn.get_peer_identity() as peer:
            assert peer.groups == tuple(groups)


def test_get_peer_groups_without_kernel_support(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel cannot tell groups it is NotSupportedError; other errors come out."""
    with pytest.raises(NotSupportedError, match=r"4\.13"):
        _identity.get_peer_groups(Simulated.that_fails(errno.ENOPROTOOPT))
    with pytest.raises(OSError, match="Input/output"):
        _identity.get_peer_groups(Simulated.that_fails(errno.EIO))
    monkeypatch.setattr(_kernel, "SO_PEERGROUPS", None)
    with pytest.raises(NotSupportedError, match="SO_PEERGROUPS"):
        _identity.get_peer_groups(Simulated.that_fails(errno.EIO))


async def test_identity_without_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """An identity can be gathered without groups; they are None then, and not none."""
    monkeypatch.setattr(_kernel, "SO_PEERGROUPS", None)
    one, two = connection_pair()
    async with one, two:
        with one.get_peer_identity() as peer:
            assert peer.groups is None
            assert "groups unknown" in str(peer)


def test_getsockopt_of_any_length() -> None:
    """Errors have their errno, as those of getsockopt, and shorter results are cut."""
    one, two = socket.socketpair()
    with one, two:
        with pytest.raises(OSError, match="not available") as caught:
            _kernel.getsockopt_of_any_length(one.fileno(), socket.SOL_SOCKET, 12345, 8)
        assert caught.value.errno == errno.ENOPROTOOPT
        data = _kernel.getsockopt_of_any_length(
            one.fileno(), socket.SOL_SOCKET, socket.SO_PEERCRED, 4096
        )
        assert data == one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 1024)


def test_get_peer_security_context_here() -> None:
    """The label is what the kernel says, or None where no security module gives one."""
    one, two = socket.socketpair()
    with one, two:
        try:
            label = one.getsockopt(socket.SOL_SOCKET, 31, 1024)
        except OSError:
            label = b""
        assert (_identity.get_peer_security_context(one) or "") == label.rstrip(b"\0").decode()


@pytest.mark.parametrize(
    ("label", "text"),
    [
        (b"unconfined", "unconfined"),
        (b"system_u:system_r:sshd_t:s0\0", "system_u:system_r:sshd_t:s0"),
        (b"\xff\0", "\udcff"),
        (b"", None),
        (b"\0", None),
    ],
)
def test_get_peer_security_context(label: bytes, text: str | None) -> None:
    """A label is text, without the NUL that SELinux appends; an empty one is none."""
    sock: Any = Simulated(lambda *_: label)
    assert _identity.get_peer_security_context(sock) == text


def test_get_peer_security_context_without_support(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no security module gives a label it is None; other errors come out."""
    for number in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):
        assert _identity.get_peer_security_context(Simulated.that_fails(number)) is None
    with pytest.raises(OSError, match="Input/output"):
        _identity.get_peer_security_context(Simulated.that_fails(errno.EIO))
    monkeypatch.setattr(_kernel, "SO_PEERSEC", None)
    assert _identity.get_peer_security_context(Simulated.that_fails(errno.EIO)) is None


def test_get_peer_security_context_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A label that is longer than Python's getsockopt takes is asked for again, in full."""
    asked: list[int] = []

    def whole(_fd: int, _level: int, option: int, length: int) -> bytes:
        asked.append(option)
        return b"x" * min(2000, length)

    monkeypatch.setattr(_kernel, "getsockopt_of_any_length", whole)
    sock = Simulated.that_fails(errno.ERANGE)
    monkeypatch.setattr(Simulated, "fileno", lambda _: 3, raising=False)
    assert _identity.get_peer_security_context(sock) == "x" * 2000
    assert asked == [_kernel.SO_PEERSEC]


async def test_identity_security_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The methods of a connection and its identity tell the label, and a log shows it quoted."""
    monkeypatch.setattr(_kernel, "SO_PEERGROUPS", None)
    monkeypatch.setattr(_identity, "_option", lambda *_: b"a b\n\0")
    one, two = connection_pair()
    async with one, two:
        assert one.get_peer_security_context() == "a b\n"
        with one.get_peer_identity(with_pidfd=False) as peer:
            assert peer.security_context == "a b\n"
            assert r"label 'a b\n'" in str(peer)


################################################################
# PeerIdentity
################################################################


@peer_pidfds
async def test_identity_of_a_living_peer(listener: UnixListener) -> None:
    """It says what the single methods say, is alive, and what the process runs and where."""
    async with (
        client_process(path_of(listener)) as client,
        await listener.accept() as conn,
    ):
        with conn.get_peer_identity() as peer:
            assert peer.credentials == conn.get_peer_credentials()
            assert peer.credentials.pid == client.pid
            assert peer.groups == conn.get_peer_groups()
            assert peer.security_context == conn.get_peer_security_context()
            assert not peer.gone
            assert peer.is_alive()
            assert peer.exe == os.path.realpath(f"/proc/{client.pid}/exe")
            assert os.path.samefile(peer.exe, sys.executable)
            assert outcome(lambda: peer.cgroup) == cgroup_of(client.pid)
            assert f"pid {client.pid} uid {os.getuid()} gid {os.getgid()} groups" in str(peer)


NO_CGROUPS = "NotSupportedError: the system has no control groups of version 2"


def cgroup_of(pid: int | None) -> str:
    """Return what is to be said of a process's control group, or that there are none here."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next((line[3:] for line in lines if line.startswith("0::")), NO_CGROUPS)


async def cgroup_read(peer: PeerIdentity) -> str:
    """Return what read_cgroup says."""
    try:
        return await peer.read_cgroup()
    except NotSupportedError as exc:
        return f"NotSupportedError: {exc}"


def test_identity_str() -> None:
    """Groups are numbers with commas, "none", or "unknown"."""
    ids = Credentials(1, 2, 3)
    assert str(PeerIdentity(ids, (5, 6))) == "pid 1 uid 2 gid 3 groups 5,6"
    assert str(PeerIdentity(ids, ())) == "pid 1 uid 2 gid 3 groups none"
    assert str(PeerIdentity(ids)) == "pid 1 uid 2 gid 3 groups unknown"
    assert "fd" not in repr(PeerIdentity(ids))


@peer_pidfds
async def test_identity_of_a_peer_that_ends(listener: UnixListener) -> None:
    """As a zombie, and after it is reaped, it is not alive, and /proc is not read."""
    async with client_process(path_of(listener)) as client, await listener.accept() as conn:
        with conn.get_peer_identity() as peer:
            assert peer.is_alive()
            await client.end()
            for _ in range(2):
                assert not peer.is_alive()
                for ask in looks(peer):
                    with pytest.raises(PeerGoneError):
                        ask()
                client.reap()
            assert not peer.gone


@peer_pidfds
async def test_identity_of_a_peer_that_was_reaped(listener: UnixListener) -> None:
    """Gathered after the peer was reaped, it says so; ids and groups are still known."""
    async with client_process(path_of(listener)) as client, await listener.accept() as conn:
        await client.end()
        with conn.get_peer_identity() as zombie:
            assert not zombie.gone
            assert not zombie.is_alive()
        client.reap()
        with conn.get_peer_identity() as peer:
            assert peer.gone
            assert peer.pidfd is None
            assert not peer.is_alive()
            assert peer.credentials.pid == client.pid
            assert peer.groups == tuple(os.getgroups())
            for ask in looks(peer):
                with pytest.raises(PeerGoneError):
                    ask()


@peer_pidfds
async def test_identity_close() -> None:
    """Closed, also twice, it keeps ids and groups, and leaves the rest open."""
    one, two = connection_pair()
    async with one, two:
        with one.get_peer_identity() as peer:
            pidfd = peer.pidfd
            assert pidfd is not None
        peer.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(pidfd)
        assert peer.pidfd is None
        assert peer.credentials == Credentials()
        for ask in (peer.is_alive, *looks(peer)):
            with pytest.raises(NotSupportedError, match="closed"):
                ask()


@peer_pidfds
async def test_identity_dropped() -> None:
    """An identity that is not closed is closed when it is collected, with a ResourceWarning."""
    one, two = connection_pair()
    async with one, two:
        with pytest.warns(ResourceWarning, match="unclosed"):
            one.get_peer_identity()


async def test_identity_without_pidfds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pidfds, facts that depend on the pid are not reported."""
    monkeypatch.setattr(_kernel, "SO_PEERPIDFD", None)
    one, two = connection_pair()
    async with one, two:
        assert one.open_peer_pidfd() is None
        with one.get_peer_identity() as peer:
            assert peer.pidfd is None
            assert not peer.gone
            assert peer.credentials == Credentials()
            for ask in (peer.is_alive, *looks(peer)):
                with pytest.raises(NotSupportedError, match=r"6\.5"):
                    ask()


################################################################
# Never about another process
################################################################


def newcomer_with(pid: int) -> subprocess.Popen[bytes]:
    """Start a process that has this pid."""
    for _ in range(200):
        Path(NS_LAST_PID).write_text(str(pid - 1))
        process = subprocess.Popen(["sleep", "600"])
        if process.pid == pid:
            return process
        process.kill()
        process.wait()
    pytest.fail(f"other processes were faster, 200 times, or the pid {pid} is in use")


@as_root
@peer_pidfds
async def test_identity_of_a_reused_pid(listener: UnixListener) -> None:
    """When another process has the peer's pid, nothing of that process is reported."""
    async with client_process(path_of(listener)) as client, await listener.accept() as conn:
        with conn.get_peer_identity() as early:
            pid = client.pid or 0
            await client.end()
            client.reap()
            newcomer = newcomer_with(pid)
            try:
                assert "sleep" in os.readlink(f"/proc/{pid}/exe")
                assert early.credentials.pid == newcomer.pid
                assert not early.is_alive()
                with pytest.raises(PeerGoneError):
                    conn.open_peer_pidfd()
                with conn.get_peer_identity() as late:
                    assert late.gone
                    assert not late.is_alive()
                    for peer in (early, late):
                        for ask in looks(peer):
                            with pytest.raises(PeerGoneError):
                                ask()
            finally:
                newcomer.kill()
                newcomer.wait()


async def killed(client: PeerProcess) -> None:
    await client.end()
    client.reap()


@peer_pidfds
@pytest.mark.parametrize("newcomer", [False, True])
async def test_identity_of_a_peer_that_dies_meanwhile(
    listener: UnixListener, monkeypatch: pytest.MonkeyPatch, *, newcomer: bool
) -> None:
    """One that dies between its pid and what /proc says is gone, and its successor is not told."""
    async with client_process(path_of(listener)) as client, await listener.accept() as conn:
        with conn.get_peer_identity() as peer:

            def readlink(path: str) -> str:
                assert path == f"/proc/{client.pid}/exe"
                client.process.kill()
                client.reap()
                if not newcomer:
                    raise FileNotFoundError(path)
                return "/usr/bin/newcomer"

            with monkeypatch.context() as patch:
                patch.setattr(os, "readlink", readlink)
                with pytest.raises(PeerGoneError):
                    assert peer.exe == "never"


@peer_pidfds
async def test_identity_of_an_exiting_peer(
    listener: UnixListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process with a directory in /proc that no longer runs a program is gone."""
    async with client_process(path_of(listener)), await listener.accept() as conn:
        with conn.get_peer_identity() as peer, monkeypatch.context() as patch:

            def readlink(path: str) -> str:
                raise FileNotFoundError(path)

            patch.setattr(os, "readlink", readlink)
            with pytest.raises(PeerGoneError):
                assert peer.exe == "never"
            # Without a directory it is hidden: that can only be seen as another user.
            patch.setattr(os.path, "isdir", lambda _: False)
            with pytest.raises(PermissionError, match="hidden"):
                assert peer.exe == "never"


@peer_pidfds
async def test_identity_without_proc(
    listener: UnixListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without /proc its facts are NotSupportedError; is_alive works."""

    def missing(pidfd: int) -> int:
        raise FileNotFoundError

    async with client_process(path_of(listener)), await listener.accept() as conn:
        with conn.get_peer_identity() as peer:
            monkeypatch.setattr(_identity, "pid_of", missing)
            for ask in looks(peer):
                with pytest.raises(NotSupportedError, match="not mounted"):
                    ask()
            assert peer.is_alive()


@peer_pidfds
async def test_read_cgroup_without_unified_cgroups(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With control groups of version 1 only, it is NotSupportedError."""
    file = tmp_path / "cgroup"
    file.write_text("12:cpu:/x\n1:name=systemd:/x\n")
    one, two = connection_pair()
    real = open
    async with one, two:
        with one.get_peer_identity() as peer:

            def opened(path: Any, *arguments: Any, **keywords: Any) -> Any:
                ours = str(path).endswith(f"/{os.getpid()}/cgroup")
                return real(file if ours else path, *arguments, **keywords)

            monkeypatch.setattr(_identity, "open", opened, raising=False)
            with pytest.raises(NotSupportedError, match="version 2"):
                assert peer.cgroup == "never"
            file.write_text("12:cpu:/x\n0::/a b\n")
            assert peer.cgroup == "/a b"


@peer_pidfds
async def test_identity_without_a_free_descriptor() -> None:
    """Without a free descriptor /proc cannot be read: EMFILE; is_alive needs none."""
    one, two = connection_pair()
    async with one, two:
        with one.get_peer_identity() as peer, free_descriptors(0):
            for ask in looks(peer):
                with pytest.raises(OSError, match="Too many open files"):
                    ask()
            assert peer.is_alive()


################################################################
# Other users and other namespaces
################################################################


@as_root
@peer_pidfds
async def test_identity_of_another_user(listener: UnixListener) -> None:
    """Of another user's process there is a pidfd; its program is not for us to see."""
    async with reporting_process("connect", path_of(listener), uid=str(OTHER_UID)) as process:
        async with await listener.accept():
            seen = await report_of(process)
        assert seen["ids"] == [os.getpid(), 0, 0]
        assert (seen["alive"], seen["pidfd"], seen["gone"]) == (True, "alive", False)
        assert seen["exe"].startswith("PermissionError: [Errno 13] Permission denied")
        assert seen["cgroup"] == cgroup_of(os.getpid())


@mount_namespaces
@as_root
@peer_pidfds
async def test_identity_of_a_process_hidden_in_proc(listener: UnixListener) -> None:
    """A peer that /proc hides (hidepid) is alive, and looking at it is PermissionError."""
    under = unshared("-m", then="mount -t proc -o hidepid=invisible proc /proc && ")
    async with reporting_process(
        "connect", path_of(listener), uid=str(OTHER_UID), under=under
    ) as process:
        async with await listener.accept():
            seen = await report_of(process)
        assert (seen["alive"], seen["pidfd"], seen["gone"]) == (True, "alive", False)
        for each in ("exe", "cgroup"):
            assert seen[each].startswith("PermissionError")
            assert "hidden" in seen[each]


@pid_namespaces
@peer_pidfds
async def test_identity_of_a_peer_in_a_nested_pid_namespace(listener: UnixListener) -> None:
    """A peer in a container has its pid in this namespace."""
    under = in_pid_namespace()
    async with (
        client_process(path_of(listener), under=under) as client,
        await listener.accept() as conn,
    ):
        # In there it is the first process.
        assert client.pid == 1
        with conn.get_peer_identity() as peer:
            assert peer.credentials.pid not in {0, 1, client.process.pid}
            assert peer.is_alive()
            assert os.path.samefile(peer.exe, sys.executable)
            assert await cgroup_read(peer) == cgroup_of(os.getpid())


@pid_namespaces
@peer_pidfds
async def test_identity_of_a_peer_outside_of_the_pid_namespace(listener: UnixListener) -> None:
    """To a process in a container, a peer outside has no pid, and still lives and ends."""
    under = in_pid_namespace("--mount-proc")
    async with reporting_process("connect", path_of(listener), under=under) as process:
        async with await listener.accept():
            seen = await report_of(process)
        assert seen["ids"][0] == 0
        assert (seen["alive"], seen["pidfd"], seen["gone"]) == (True, "alive", False)
        for each in ("exe", "cgroup"):
            assert seen[each].startswith("NotSupportedError")
            assert "pid namespace" in seen[each]


@pid_namespaces
@peer_pidfds
async def test_identity_of_an_exited_peer_outside_of_the_pid_namespace(
    listener: UnixListener,
) -> None:
    """To a process in a container, a peer outside that was reaped is gone."""
    under = in_pid_namespace("--mount-proc")
    directory = Path(path_of(listener)).parent
    async with reporting_process("accept", directory / "inner", under=under) as process:
        assert await PeerProcess(process).read_line() == "listening"
        # It stops before it can accept, and so before it can look.
        await stopped(process.pid)
        async with client_process(directory / "inner") as client:
            await client.end()
            client.reap()
        for pid in family(process.pid):
            os.kill(pid, signal.SIGCONT)
        seen = await report_of(process)
        assert seen["gone"]
        assert not seen["alive"]
        assert seen["pidfd"].startswith("PeerGoneError")


async def stopped(pid: int) -> None:
    """Stop a process and its children, and wait until they have."""
    pids = family(pid)
    for each in pids:
        os.kill(each, signal.SIGSTOP)
    with trio.fail_after(30):
        for each in pids:
            status = Path(f"/proc/{each}/status")
            while "\nState:\tT" not in status.read_text():
                await trio.sleep(0.01)


################################################################
# Reading without blocking the event loop
################################################################

MAIN_THREAD_EXITS = """
import ctypes, os, socket, sys, threading

sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])

def serve():
    while open("/proc/self/task/%d/stat" % os.getpid()).read().rsplit(")", 1)[1].split()[0] != "Z":
        pass
    sock.send(b"x")
    sock.recv(1)
    os._exit(0)

threading.Thread(target=serve).start()
ctypes.CDLL(None).pthread_exit(None)
"""


@peer_pidfds
async def test_read_exe_of_a_process_without_main_thread(listener: UnixListener) -> None:
    """A process whose main thread has exited is alive, and has a program and a command line."""
    with trio.fail_after(30):
        command = [sys.executable, "-c", MAIN_THREAD_EXITS, path_of(listener)]
        with subprocess.Popen(command) as process:
            async with await listener.accept() as conn:
                assert await conn.receive_some() == b"x"
                with conn.get_peer_identity() as peer:
                    assert peer.is_alive()
                    assert os.path.samefile(await peer.read_exe(), sys.executable)
                    assert await peer.read_command_line() == command
                    assert await cgroup_read(peer) == cgroup_of(process.pid)
                    await conn.send_all(b"x")
                    assert peer.pidfd is not None
                    await trio.lowlevel.wait_readable(peer.pidfd)
                    for read in (peer.read_exe, peer.read_command_line, peer.read_cgroup):
                        with pytest.raises(PeerGoneError):
                            await read()


@peer_pidfds
async def test_read_command_line_of_a_process_without_arguments(
    listener: UnixListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process can have an empty command line; it is alive nevertheless."""
    monkeypatch.setattr(_identity, "_read_bytes", lambda _: b"")
    async with client_process(path_of(listener)), await listener.accept() as conn:
        with conn.get_peer_identity() as peer:
            assert await peer.read_command_line() == []
            assert peer.command_line == []


@peer_pidfds
async def test_read_command_line_that_blocks(
    listener: UnixListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that hangs in the kernel can be abandoned, and delays no read of another kind."""
    go_on = threading.Event()
    stuck: list[bool] = []

    def hang(_: str) -> bytes:
        stuck.append(True)
        go_on.wait(60)
        return b""

    monkeypatch.setattr(_identity, "_read_bytes", hang)
    async with client_process(path_of(listener)), await listener.accept() as conn:
        with conn.get_peer_identity() as peer:
            async with trio.open_nursery() as nursery:
                for _ in range(_identity._MAX_THREADS + 1):
                    nursery.start_soon(peer.read_command_line)
                with trio.fail_after(30):
                    await until(lambda: len(stuck) == _identity._MAX_THREADS)
                    # The event loop runs, and other reads have threads of their own.
                    assert os.path.samefile(await peer.read_exe(), sys.executable)
                    assert await cgroup_read(peer) == cgroup_of(peer.credentials.pid)
                assert len(stuck) == _identity._MAX_THREADS
                nursery.cancel_scope.cancel()
    go_on.set()
