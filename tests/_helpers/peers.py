"""Peers in processes of their own: with the standard library, as other users, or exited."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import trio

from tests._helpers.environment import environment
from tests._helpers.processes import program
from trio_unixconn import UnixConnection, connection_pair, testing

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Iterator


@attrs.define
class Peer:
    """A process at the other end of :attr:`conn`."""

    conn: UnixConnection
    process: trio.Process
    _buffer: bytes = b""

    async def ask(self, do: str, **arguments: Any) -> Any:
        """Send the peer a command and return its answer."""
        await self.begin(do, **arguments)
        return await self.answer()

    async def begin(self, do: str, **arguments: Any) -> None:
        """Send the peer a command."""
        assert self.process.stdin is not None
        await self.process.stdin.send_all(json.dumps({"do": do, **arguments}).encode() + b"\n")

    async def answer(self) -> Any:
        """Return the next answer."""
        assert self.process.stdout is not None
        with trio.fail_after(30):
            while b"\n" not in self._buffer:
                more = await self.process.stdout.receive_some()
                assert more, "the peer exited"
                self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)


@asynccontextmanager
async def stdlib_peer() -> AsyncGenerator[Peer, None]:
    """Start a peer that uses the standard library only, at the other end of a socketpair."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = await trio.lowlevel.open_process(
            program("stdlib_peer", str(theirs.fileno())),
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
        )
    assert process.stdin is not None
    assert process.stdout is not None
    async with process.stdin, process.stdout, UnixConnection.from_stdlib_socket(ours) as conn:
        try:
            yield Peer(conn, process)
        finally:
            with trio.CancelScope(shield=True), trio.fail_after(30):
                await process.stdin.aclose()
                await process.wait()


async def pair() -> tuple[UnixConnection, UnixConnection]:
    """Return a pair, in the form that trio's stream tests expect."""
    return connection_pair()


async def clogged_pair() -> tuple[UnixConnection, UnixConnection]:
    """Return a pair whose buffers are full, in the form that trio's stream tests expect."""
    return testing.clogged_pair()


@attrs.define
class PeerProcess:
    """A client in a process of its own.

    Attributes:
      pid: its pid; None if it could not connect. Then ``first_line`` is the reason.
    """

    process: subprocess.Popen[str]
    first_line: str = ""

    @property
    def pid(self) -> int | None:
        return int(self.first_line) if self.first_line.isdecimal() else None

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    async def read_line(self) -> str:
        """Wait for its next line of output."""
        with trio.fail_after(30):
            return await trio.to_thread.run_sync(self._line, abandon_on_cancel=True)

    async def ask(self, command: str) -> str:
        """Send a command, and return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return await self.read_line()

    async def end(self) -> None:
        """Make it exit, and wait for that; it is a zombie afterwards."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        with trio.fail_after(30):
            await trio.to_thread.run_sync(
                os.waitid, os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT
            )

    def reap(self) -> None:
        """Reap it; afterwards its pid is free."""
        self.process.wait(30)


@asynccontextmanager
async def client_process(
    path: str | os.PathLike[str],
    *,
    uid: int | None = None,
    gid: int | None = None,
    groups: Iterable[int] | None = None,
    under: Iterable[str] = (),
) -> AsyncGenerator[PeerProcess, None]:
    """Connect to ``path`` in another process, as this user unless the arguments say otherwise."""
    user = ["-" if each is None else str(each) for each in (uid, gid)]
    user.append("-" if groups is None else ",".join(map(str, groups)))
    process = subprocess.Popen(
        [*under, *program("connecting_client", str(path), *user)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            peer = PeerProcess(process)
            peer.first_line = await peer.read_line()
            with trio.fail_after(60):
                yield peer
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)


@asynccontextmanager
async def reporting_process(
    how: str, path: str | os.PathLike[str], *, uid: str = "-", under: Iterable[str] = ()
) -> AsyncGenerator[subprocess.Popen[str], None]:
    """Start programs/identity_reporter.py: it reports its peer, and exits after it."""
    process = subprocess.Popen(
        [*under, *program("identity_reporter", how, str(path), uid)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    with process:
        try:
            with trio.fail_after(60):
                yield process
            # It exits by itself, so that coverage is written.
            process.wait(30)
        finally:
            process.kill()


async def report_of(process: subprocess.Popen[str]) -> Any:
    """Return the report of a process."""
    return json.loads(await PeerProcess(process).read_line())


@contextmanager
def shared_directory() -> Iterator[Path]:
    """Make a directory that every user can enter; pytest's are private."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)
