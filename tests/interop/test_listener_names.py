"""The name of a listener, as other programs see it: libsystemd and dbus-daemon."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import socket
from typing import TYPE_CHECKING

import pytest
import trio

from tests._helpers.dbus import open_bus
from tests._helpers.glib import missing_peer
from tests._helpers.real_programs import first_line, running
from trio_unixconn import open_unix_listener

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.slow]

CONFIG = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>systemd:</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
  </policy>
</busconfig>
"""
# What systemd does for socket activation: the listening socket is file descriptor 3.
ACTIVATE = 'exec 3<&0; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'


async def test_sd_is_socket_unix(tmp_path: Path) -> None:
    """sd_is_socket_unix(3) finds the socket of open_unix_listener at its path."""
    library = ctypes.util.find_library("systemd")
    if library is None:
        missing_peer("there is no libsystemd; on Debian and Ubuntu install libsystemd0")
    is_socket_unix = ctypes.CDLL(library).sd_is_socket_unix
    path = os.fsencode(tmp_path / "s")
    async with await open_unix_listener(path) as listener:
        fd = listener.socket.fileno()
        assert is_socket_unix(fd, socket.SOCK_STREAM, 1, path, 0) == 1
        assert is_socket_unix(fd, socket.SOCK_STREAM, 1, path + b".new", 0) == 0


async def test_dbus_daemon_advertises_the_path(tmp_path: Path, dbus_daemon: str) -> None:
    """A dbus-daemon that inherits the listener tells clients the path, and they reach it."""
    path, config = tmp_path / "bus", tmp_path / "bus.conf"
    config.write_text(CONFIG)
    async with await open_unix_listener(path) as listener:
        options = [f"--config-file={config}", "--nofork", "--nopidfile", "--print-address=1"]
        command = ["sh", "-c", ACTIVATE, "sh", dbus_daemon, *options]
        with trio.fail_after(60):
            async with running(command, stdin=listener.socket.fileno()) as process:
                assert (await first_line(process)).startswith(f"unix:path={path},")
                async with open_bus(str(path)) as bus:
                    assert bus.name.startswith(":1.")
