"""Datagrams and the service manager with real programs: systemd's tools, logger and socat."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests._helpers.environment import environment
from tests._helpers.glib import missing_peer
from tests._helpers.real_programs import connection_to, first_line, require_program, running
from trio_unixconn import Credentials, open_unix_datagram
from trio_unixconn.systemd import ServiceManager
from trio_unixconn.testing import open_service_manager

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.slow]


@pytest.fixture(scope="session")
def systemd_notify() -> str:
    """The path of systemd-notify."""
    return require_program("systemd-notify", package="systemd")


@pytest.fixture(scope="session")
def socket_activate() -> str:
    """The path of systemd-socket-activate."""
    return require_program("systemd-socket-activate", package="systemd")


@pytest.fixture(scope="session")
def libsystemd() -> ctypes.CDLL:
    """The library of systemd."""
    library = ctypes.util.find_library("systemd")
    if library is None:
        missing_peer("there is no libsystemd; on Debian and Ubuntu install libsystemd0")
    return ctypes.CDLL(library)


async def call(command: list[str], **options: Any) -> str:
    """Run a program to its end, and return its output."""
    with trio.fail_after(60):
        done = await trio.run_process(command, capture_stdout=True, **options)
    return done.stdout.decode()


async def test_systemd_notify(systemd_notify: str) -> None:
    """systemd-notify reports to our manager, and its barrier returns."""
    async with open_service_manager() as fake:
        env = environment(**fake.environ)
        command = [
            systemd_notify,
            "--ready",
            "--status=it serves",
            f"--pid={os.getpid()}",
            "X_MINE=1",
        ]
        # Without --no-block, it ends when the manager has closed its barrier.
        await call(command, env=env)
        with trio.fail_after(30):
            message = await fake.wait_for("READY=1", "STATUS=it serves", "X_MINE=1")
        assert (fake.state, fake.status, fake.main_pid) == ("ready", "it serves", os.getpid())
        assert message.credentials is not None
        assert message.credentials.uid == os.getuid()
        assert fake.rejected == []


async def test_systemd_notify_of_another_process(systemd_notify: str) -> None:
    """A manager that admits one process rejects systemd-notify in another one."""
    async with open_service_manager(pids=[os.getpid()]) as fake:
        env = environment(**fake.environ)
        shell = f"{systemd_notify} --ready --no-block; exit 0"
        await call(["sh", "-c", shell], env=env)
        await ServiceManager.from_environ(dict(fake.environ)).status("ours")
        with trio.fail_after(30):
            await fake.wait_for("STATUS=ours")
        assert fake.state == "starting"
        assert "may not send notifications" in fake.rejected[0].problem


async def test_libsystemd_stores_and_waits(
    libsystemd: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sd_pid_notify_with_fds stores in our manager, and sd_notify_barrier returns."""
    async with open_service_manager() as fake:
        for name, value in fake.environ.items():
            monkeypatch.setenv(name, value)
        fds = (ctypes.c_int * 2)(0, 1)

        def speak() -> tuple[int, int]:
            stored = libsystemd.sd_pid_notify_with_fds(0, 0, b"FDSTORE=1\nFDNAME=x", fds, 2)
            return stored, libsystemd.sd_notify_barrier(1, ctypes.c_uint64(30_000_000))

        with trio.fail_after(60):
            assert await trio.to_thread.run_sync(speak) == (1, 1)
        assert {name: len(found) for name, found in fake.stored.items()} == {"x": 2}


async def test_socket_activate_passes_listeners(socket_activate: str, tmp_path: Path) -> None:
    """inherited_listeners finds what systemd-socket-activate passes, by name."""
    code = (
        "import os, trio\n"
        "from trio_unixconn.systemd import inherited_listeners\n"
        "found = inherited_listeners()\n"
        "print({name: [each.socket.getsockname() for each in found[name]] for name in found},"
        " [name for name in os.environ if name.startswith('LISTEN')], flush=True)\n"
        "os._exit(0)\n"
    )
    web, admin = tmp_path / "web", tmp_path / "admin"
    command = [
        socket_activate,
        *("-l", str(web), "-l", str(admin), "--fdname=web:admin"),
        *(sys.executable, "-c", code),
    ]
    # It starts the program at the first connection.
    async with running(command) as process, await connection_to(process, admin):
        expected = {"web": [str(web)], "admin": [str(admin)]}
        assert await first_line(process) == f"{expected} []"
        with trio.fail_after(60):
            assert await process.wait() == 0


async def test_logger_writes_to_our_syslog_server(unix_socket_path: Path) -> None:
    """logger(1) sends RFC 3164 datagrams; its credentials are those of its process."""
    logger = require_program("logger", package="bsdutils")
    async with await open_unix_datagram(unix_socket_path, credentials=True, mode=0o666) as server:
        command = [logger, "-u", str(unix_socket_path), "--socket-errors=on", "-t", "tag", "-i"]
        await call([*command, "-p", "daemon.err", "hello"])
        with trio.fail_after(30):
            async with await server.receive_message() as message:
                text = message.data.decode()
                assert text.startswith("<27>")
                assert message.credentials is not None
                assert text.endswith(f"tag[{message.credentials.pid}]: hello")
                assert message.credentials.uid == os.getuid()


async def test_socat_sends_and_receives(unix_socket_path: Path, socat: str) -> None:
    """Socat sends datagrams to us, and replies reach it; it receives ours."""
    here = unix_socket_path
    there = unix_socket_path.with_name("there")
    async with await open_unix_datagram(here, credentials=True) as ours:
        command = [socat, "-", f"UNIX-SENDTO:{here},bind={there}"]
        async with running(command, stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            with trio.fail_after(30):
                await process.stdin.send_all(b"from socat")
                async with await ours.receive_message() as message:
                    assert message.data == b"from socat"
                    assert message.sender.get_path() == str(there)
                    assert message.credentials == Credentials(process.pid, os.getuid(), os.getgid())
                    await ours.send_message(b"from us", message.sender)
                assert await process.stdout.receive_some() == b"from us"
            await process.stdin.aclose()


# What journald is for its clients: the socket at this path, in a mount namespace of its own.
IN_NAMESPACE = (
    "mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/journal && "
    'mount --bind "$1" /run/systemd/journal && shift && exec "$@"'
)


async def test_journal_entries_of_libsystemd(
    unix_socket_path: Path, libsystemd: ctypes.CDLL
) -> None:
    """A server for the journal's protocol gets small entries as bytes and large ones as a memfd."""
    unshare = require_program("unshare", package="util-linux")
    directory = unix_socket_path.parent
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    space = [unshare, *user, "--mount", "sh", "-c", IN_NAMESPACE, "sh", str(directory)]
    try:
        await call([*space, "true"], stderr=subprocess.DEVNULL)
    except subprocess.CalledProcessError:
        missing_peer("this process may not make a mount namespace")
    code = (
        "import ctypes, sys\n"
        f"library = ctypes.CDLL({ctypes.util.find_library('systemd')!r})\n"
        "for size in (5, 20_000_000):\n"
        "    text = b'MESSAGE=' + b'x' * size\n"
        "    assert library.sd_journal_send(b'%s', text, b'A=1', None) == 0\n"
    )
    async with await open_unix_datagram(directory / "socket", credentials=True) as server:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call, [*space, sys.executable, "-c", code])
                async with await server.receive_message() as message:
                    assert b"MESSAGE=xxxxx\nA=1\n" in message.data
                    assert not message.fds
                async with await server.receive_message() as message:
                    assert message.data == b""
                    # An entry that does not fit is a memfd, and the datagram has no bytes.
                    size = os.fstat(message.fds[0]).st_size
                    assert size > 20_000_000
                    assert os.pread(message.fds[0], 9, 0) == b"MESSAGE=x"
