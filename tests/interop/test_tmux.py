"""tmux: its client passes its terminal to its server, through a relay of ours.

The relay knows nothing of tmux's protocol. Between a real client and a real server it shows that
messages arrive with the descriptors, and in the order, with which they were sent.
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests._helpers.environment import environment
from tests._helpers.real_programs import serving
from trio_unixconn import ConnectionBrokenError, UnixConnection, open_unix_connection

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.slow]

MUCH = os.urandom(100_000).hex().encode()


@attrs.define
class Tmux:
    """A tmux server with a session, and a relay to it.

    Attributes:
      passed: how many descriptors the relay has passed to the server.
    """

    program: str
    directory: Path
    passed: int = 0

    async def run(self, *command: str, socket: str = "relay", stdin: bytes = b"") -> str:
        """Run a client to its end; return its output."""
        done = await trio.run_process(
            [self.program, "-f", os.devnull, "-S", str(self.directory / socket), *command],
            stdin=stdin,
            capture_stdout=True,
            env=environment(TERM="xterm", TMUX=None),
        )
        return bytes(done.stdout).decode()

    async def relay(self, client: UnixConnection) -> None:
        """Pass on what a client and the server send, with the descriptors."""
        async with (
            await open_unix_connection(self.directory / "server") as server,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._copy, client, server)
            nursery.start_soon(self._copy, server, client)

    async def _copy(self, source: UnixConnection, target: UnixConnection) -> None:
        # If one direction ends because a process has exited, the other one must go on: it may
        # have that process's last message.
        with suppress(ConnectionBrokenError):
            while True:
                with await source.receive_message(65536) as message:
                    if not message.data:
                        break
                    self.passed += len(message.fds)
                    await target.send_message(message.data, fds=message.fds)
        with suppress(ConnectionBrokenError):
            await target.send_eof()


@asynccontextmanager
async def tmux_server(tmux: str, directory: Path) -> AsyncGenerator[Tmux, None]:
    """Run a server of the test's own, which clients reach through a relay."""
    running = Tmux(tmux, directory)
    with trio.fail_after(60):
        await running.run("new-session", "-d", "-s", "test", "cat", socket="server")
        try:
            async with serving(running.relay, directory / "relay"):
                yield running
        finally:
            with trio.CancelScope(shield=True):
                await running.run("kill-server", socket="server")


async def test_tmux_attach(tmp_path: Path, tmux: str) -> None:
    """The server reads commands from the client's standard input and writes to its output."""
    async with tmux_server(tmux, tmp_path) as server:
        commands = b"display-message -p 'in #{session_name}'\ndetach-client\n"
        lines = (await server.run("-C", "attach-session", stdin=commands)).splitlines()
        assert "in test" in lines
        assert lines[-1].startswith("%exit")
        # The standard input and output of the client.
        assert server.passed == 2


async def test_tmux_many_clients(tmp_path: Path, tmux: str) -> None:
    """Ten clients at a time each get an answer of their own."""
    async with tmux_server(tmux, tmp_path) as server:
        answers: list[str] = []

        async def client(number: int) -> None:
            answers.append(await server.run("display-message", "-p", f"client {number}"))

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(client, number)
        assert sorted(answers) == [f"client {number}\n" for number in range(10)]
        assert server.passed == 20


async def test_tmux_buffers(tmp_path: Path, tmux: str) -> None:
    """What a client loads into a buffer, in many messages, another saves as it was."""
    async with tmux_server(tmux, tmp_path) as server:
        await server.run("load-buffer", "-", stdin=MUCH)
        assert (await server.run("save-buffer", "-")).encode() == MUCH
