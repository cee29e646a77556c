"""Real servers with a client of this library: dbus-daemon and HAProxy."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests._helpers.dbus import (
    DESTINATION,
    INTERFACE,
    MEMBER,
    METHOD_CALL,
    METHOD_RETURN,
    PATH,
    REPLY_SERIAL,
    SENDER,
    SIGNATURE,
    command,
    open_bus,
)
from tests._helpers.glib import receive_exactly
from tests._helpers.programs.open_files import described, identity, opened
from tests._helpers.real_programs import connection_to, first_line, running
from trio_unixconn import UnixConnection, UnixFDList, UnixListener, open_unix_connection

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.slow]

################################################################
# dbus-daemon
################################################################

BUS_CONFIG: Final = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
  </policy>
</busconfig>
"""


@asynccontextmanager
async def bus_daemon(dbus_daemon: str, directory: Path) -> AsyncGenerator[str, None]:
    """Run a private bus; yield its path."""
    path, config = directory / "bus", directory / "bus.conf"
    config.write_text(BUS_CONFIG.format(path=path))
    options = [f"--config-file={config}", "--nofork", "--nopidfile", "--print-address"]
    with trio.fail_after(60):
        async with running([dbus_daemon, *options]) as process:
            assert (await first_line(process)).startswith(f"unix:path={path},")
            yield str(path)


async def test_dbus_hello(tmp_path: Path, dbus_daemon: str) -> None:
    """The bus accepts our credentials, gives us a name, and maps the name to our process."""
    async with bus_daemon(dbus_daemon, tmp_path) as path, open_bus(path) as bus:
        assert re.fullmatch(r":1\.\d+", bus.name)
        body = await bus.call_bus("GetConnectionUnixProcessID", bus.name)
        assert struct.unpack("=I", body) == (os.getpid(),)
        body = await bus.call_bus("GetConnectionUnixUser", bus.name)
        assert struct.unpack("=I", body) == (os.geteuid(),)


async def test_dbus_refuses_another_user(tmp_path: Path, dbus_daemon: str) -> None:
    """The bus rejects a user id that differs from the credentials."""
    async with (
        bus_daemon(dbus_daemon, tmp_path) as path,
        await open_unix_connection(path) as conn,
    ):
        await conn.send_credentials()
        claimed = str(os.geteuid() + 1).encode().hex()
        assert await command(conn, f"AUTH EXTERNAL {claimed}") == "REJECTED EXTERNAL"


@pytest.mark.parametrize("count", [1, 16])
async def test_dbus_passes_descriptors(tmp_path: Path, dbus_daemon: str, count: int) -> None:
    """File descriptors pass through the bus in a call and in its answer, each the same file."""
    async with (
        bus_daemon(dbus_daemon, tmp_path) as path,
        open_bus(path) as caller,
        open_bus(path) as callee,
    ):
        indices = struct.pack(f"<{count + 1}I", 4 * count, *range(count))
        with ExitStack() as stack:
            fds = [stack.enter_context(opened("pipe", b"%d" % n)) for n in range(count)]
            sent = [identity(fd) for fd in fds]
            fields = {DESTINATION: callee.name, PATH: "/", INTERFACE: "a.b", MEMBER: "Swap"}
            serial = await caller.send(METHOD_CALL, {**fields, SIGNATURE: "ah"}, indices, fds)

        call = await callee.receive(METHOD_CALL)
        with call.fds:
            assert call.fields.items() >= {**fields, SENDER: caller.name}.items()
            assert call.body == indices
            assert [identity(fd) for fd in call.fds] == sent
            await callee.send(
                METHOD_RETURN,
                {DESTINATION: caller.name, REPLY_SERIAL: call.serial, SIGNATURE: "ah"},
                indices,
                list(reversed(list(call.fds))),
            )

        answer = await caller.receive(METHOD_RETURN)
        with answer.fds:
            assert answer.fields[REPLY_SERIAL] == serial
            assert answer.fields[SENDER] == callee.name
            assert [identity(fd) for fd in answer.fds] == sent[::-1]
            contents = [bytes.fromhex(described(fd)["content"]) for fd in answer.fds]
        assert contents == [b"%d" % n for n in reversed(range(count))]


################################################################
# HAProxy
################################################################

HAPROXY_CONFIG: Final = """\
global
    nbthread 1
    maxconn 100
    stats socket {stats} mode 600 level admin expose-fd listeners
defaults
    mode tcp
    timeout connect 30s
    timeout client 30s
    timeout server 30s
frontend all
    bind 127.0.0.1:{port}
"""

# HAProxy sends up to this many file descriptors in a message, and then waits for four bytes.
PER_MESSAGE: Final = 252


@asynccontextmanager
async def haproxy_on(
    haproxy: str, directory: Path, port: int, *, abstract: int = 0
) -> AsyncGenerator[trio.Process, None]:
    """Run HAProxy on a port and abstract names, its statistics socket at ``directory/stats``."""
    config = directory / "haproxy.cfg"
    text = HAPROXY_CONFIG.format(stats=directory / "stats", port=port)
    text += "".join(f"    bind abns@{directory}/{number}\n" for number in range(abstract))
    config.write_text(text)
    with trio.fail_after(60):
        async with running([haproxy, "-db", "-q", "-f", str(config)]) as process:
            await (await connection_to(process, directory / "stats")).aclose()
            yield process


def reserved_port() -> socket.socket:
    """Return a socket that keeps a port free for a server that sets SO_REUSEPORT, as HAProxy does.

    HAProxy takes no port 0, and hands over no listener that it inherited.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", 0))
    return sock


async def test_haproxy_show_info(tmp_path: Path, haproxy: str) -> None:
    """HAProxy answers a command, and ends the stream."""
    with reserved_port() as sock:
        async with (
            haproxy_on(haproxy, tmp_path, sock.getsockname()[1]) as process,
            await open_unix_connection(tmp_path / "stats") as conn,
        ):
            assert conn.get_peer_credentials().pid == process.pid
            await conn.send_all(b"show info\n")
            text = b"".join([chunk async for chunk in conn]).decode()
    info = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    assert info["Name"] == "HAProxy"
    assert info["Pid"] == str(process.pid)
    assert info["Version"]


async def listeners_of(conn: UnixConnection) -> UnixFDList:
    """Take over HAProxy's listeners, as its own successor does.

    Source: HAProxy's management guide ("-x"), and what 2.6 sends: the number of descriptors as
    a C int; then messages of up to 252 descriptors, with a record of each: the name of its
    network namespace and that of its interface, each after its length in one byte, and an
    int of zeros. After 252 it waits a second for an int.
    """
    await conn.send_all(b"_getsocks\n")
    (announced,) = struct.unpack("=i", await receive_exactly(conn, 4))
    fds: list[int] = []
    try:
        while len(fds) < announced:
            if fds:
                await conn.send_all(bytes(4))
            with await conn.receive_message(65536) as message:
                count = len(message.fds)
                assert count == min(announced - len(fds), PER_MESSAGE)
                # No listener here has a namespace or an interface.
                assert message.data == bytes(6 * count)
                fds += message.fds.steal_fds()
    except BaseException:
        UnixFDList(fds).close()
        raise
    return UnixFDList(fds)


@pytest.mark.parametrize("abstract", [1, 260])
async def test_haproxy_hands_over(tmp_path: Path, haproxy: str, abstract: int) -> None:
    """The listeners that HAProxy handed over accept connections after it has exited."""
    with reserved_port() as sock:
        port: int = sock.getsockname()[1]
        async with haproxy_on(haproxy, tmp_path, port, abstract=abstract) as process:
            async with await open_unix_connection(tmp_path / "stats") as conn:
                handed = await listeners_of(conn)
            with handed:
                # The port, the names, and the statistics.
                assert len(handed) == 1 + abstract + 1
                process.send_signal(signal.SIGUSR1)
                assert await process.wait() == 0
                names = names_of(handed)
                index = names.index(("127.0.0.1", port))
                await serve_port(trio.SocketListener(handed.take_socket(index)), port)
                # HAProxy fills an abstract name up with NULs.
                index = names.index(b"\0" + f"{tmp_path}/0".encode().ljust(107, b"\0"))
                await serve_name(UnixListener(handed.take_socket(index)))


def names_of(handed: UnixFDList) -> list[object]:
    """Return the addresses of listening sockets, in order."""
    names: list[object] = []
    for index in range(len(handed)):
        with socket.socket(fileno=handed.get(index)) as duplicate:
            names.append(duplicate.getsockname())
    return names


async def serve_port(listener: trio.SocketListener, port: int) -> None:
    """Assert that a client can connect to the port."""
    async with (
        listener,
        await trio.open_tcp_stream("127.0.0.1", port) as client,
        await listener.accept() as accepted,
    ):
        await accepted.send_all(b"here now")
        assert await client.receive_some() == b"here now"


async def serve_name(listener: UnixListener) -> None:
    """Assert that a client can connect to the abstract name."""
    async with (
        listener,
        await open_unix_connection(listener.get_local_address()) as client,
        await listener.accept() as accepted,
    ):
        await accepted.send_all(b"here now")
        assert await client.receive_some() == b"here now"
