"""Shared by the tests: peer processes, and file descriptors to send and to compare."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import attrs
import pytest
import trio

from tests._helpers.processes import environment, program
from trio_unixconn import UnixConnection, UnixFDList, connection_pair, testing

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

clog = testing.clog
unclog = testing.unclog
free_descriptors = testing.limit_descriptors


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


def look(fd: int) -> dict[str, Any]:
    """Describe an open file as the peers do."""
    status = os.fstat(fd)
    return {
        "link": os.readlink(f"/proc/self/fd/{fd}"),
        "identity": [status.st_dev, status.st_ino],
        "mode": status.st_mode,
    }


def kind_of(fd: int) -> str:
    """Return the kind of an open file, as ls(1) prints it."""
    return stat.filemode(os.fstat(fd).st_mode)[0]


def skip_unless_ci(reason: str) -> NoReturn:
    """Skip a test that this machine cannot run; on CI as root, where it must run, fail."""
    if os.environ.get("CI") and os.geteuid() == 0:
        pytest.fail(f"on CI this must not be missing: {reason}")
    pytest.skip(reason)


NOBODY = 65534


@contextmanager
def as_nobody(directory: Path) -> Generator[None, None, None]:
    """Run the block as another user, with search permission on the path to ``directory``."""
    if os.geteuid() != 0:
        if os.environ.get("CI"):
            pytest.fail("on CI the tests must run as root, to become another user")
        pytest.skip("only root can become another user")
    changed = []
    for each in (directory, *directory.parents):
        mode = stat.S_IMODE(each.stat().st_mode)
        if not mode & 0o001:
            each.chmod(mode | 0o001)
            changed.append((each, mode))
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
        for each, mode in reversed(changed):
            each.chmod(mode)


def some(count: int) -> UnixFDList:
    """Open ``count`` memfds, whose sizes are 0, 1, 2 and so on."""
    fds = UnixFDList()
    for size in range(count):
        fd = os.memfd_create("some")
        os.ftruncate(fd, size)
        fds.append(fd)
        os.close(fd)
    return fds


def sizes(fds: UnixFDList) -> list[int]:
    """Return the sizes of the files in a list, in order."""
    return [os.fstat(fd).st_size for fd in fds]


async def drain(conn: UnixConnection, count: int) -> list[int]:
    """Receive ``count`` file descriptors; return the sizes of their files."""
    got: list[int] = []
    with trio.fail_after(30):
        while len(got) < count:
            with await conn.receive_fds(count - len(got)) as fds:
                got += sizes(fds)
    return got


async def until(holds: Callable[[], bool]) -> None:
    """Wait for a condition that has no event."""
    with trio.fail_after(30):
        while not holds():
            await trio.sleep(0.001)


def until_sync(holds: Callable[[], bool]) -> None:
    """Wait, outside of trio, for a condition that has no event."""
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """Return a list that grows by one when a call of the function begins."""
    real = getattr(owner, name)
    calls: list[str] = []

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, call)
    return calls
