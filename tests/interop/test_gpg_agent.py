"""gpg-agent as a service that inherits its listening socket from us.

Source: gpg-agent(1) ("--supervised"), sd_listen_fds(3)
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from trio_unixconn import UnixConnection, UnixListener, open_unix_connection, open_unix_listener

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.slow]

# A program finds the listening sockets that it inherits from descriptor 3 on.
INHERIT = """
import os, sys
fd, *command = sys.argv[1:]
os.dup2(int(fd), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_FDNAMES="std", LISTEN_PID=str(os.getpid()))
os.execv(command[0], command)
"""


async def ask(conn: UnixConnection, command: str) -> list[str]:
    """Send a command; return the lines of the answer, of which the last one is OK."""
    await conn.send_all(command.encode() + b"\n")
    return await read_answer(conn)


async def read_answer(conn: UnixConnection) -> list[str]:
    answer = b""
    while not answer.endswith(b"\n") or not answer.splitlines()[-1].startswith((b"OK", b"ERR")):
        more = await conn.receive_some()
        assert more, "gpg-agent ended the stream"
        answer += more
    return answer.decode().splitlines()


@asynccontextmanager
async def supervised(
    gpg_agent: str, listener: UnixListener, home: Path
) -> AsyncGenerator[trio.Process, None]:
    """Run gpg-agent on a listening socket that it inherits."""
    fd = listener.socket.fileno()
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", INHERIT, str(fd), gpg_agent, "--supervised", "--homedir", str(home)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[fd],
    )
    try:
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def test_gpg_agent_listens_for_us(tmp_path: Path, gpg_agent: str) -> None:
    """gpg-agent serves clients of the listener that it inherits, even one that was there before."""
    path, home = tmp_path / "agent", tmp_path / "home"
    home.mkdir(mode=0o700)
    with trio.fail_after(60):
        async with await open_unix_listener(path, mode=0o600) as listener:
            early = await open_unix_connection(path)
            async with supervised(gpg_agent, listener, home) as process:
                async with early:
                    (greeting,) = await read_answer(early)
                    assert greeting.startswith("OK Pleased to meet you")
                    assert await ask(early, "GETINFO pid") == [f"D {process.pid}", "OK"]
                async with await open_unix_connection(path) as late:
                    await read_answer(late)
                    assert await ask(late, "KILLAGENT") == ["OK closing connection"]
                assert await process.wait() == 0
