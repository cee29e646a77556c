"""HAProxy and a server of this library replace each other, while clients connect."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections import Counter
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests._helpers.environment import environment
from tests._helpers.processes import python
from tests._helpers.real_programs import first_line, free_port, require_program
from tests._helpers.waiting import until
from trio_unixconn import TakeOverError, open_unix_connection, open_unix_listener
from trio_unixconn.handover import serve_haproxy_listeners, take_haproxy_listeners

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.once]

CONFIG = """\
global
    nbthread 4
    stats socket {directory}/admin level admin {expose}
defaults
    mode http
    option httpclose
    timeout connect 30s
    timeout client 30s
    timeout server 30s
frontend front
    bind 127.0.0.1:{port}{options}
    bind {directory}/web.sock
    {more}
    http-request return status 200 content-type text/plain string haproxy
"""
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
CLIENTS = 4


@attrs.define
class Partners:
    """Processes that serve the same addresses, one after the other.

    Attributes:
      outcomes: how the requests of all clients have ended.
      answers: how many each server has answered, by its first word.
    """

    directory: Path
    port: int = attrs.field(factory=free_port)
    processes: list[trio.Process] = attrs.field(factory=list["trio.Process"])
    outcomes: Counter[str] = attrs.field(factory=Counter[str])
    answers: Counter[str] = attrs.field(factory=Counter[str])

    async def start(self, command: list[str], stdout: int | None = None) -> trio.Process:
        process = await trio.lowlevel.open_process(command, env=environment(), stdout=stdout)
        self.processes.append(process)
        return process

    async def start_haproxy(
        self,
        *arguments: str,
        expose: str = "expose-fd listeners",
        options: str = "",
        more: str = "",
        is_up: bool = True,
    ) -> trio.Process:
        """Start HAProxy; return when its command line answers."""
        config = self.directory / "haproxy.cfg"
        config.write_text(
            CONFIG.format(
                directory=self.directory,
                port=self.port,
                expose=expose,
                options=options,
                more=more,
            )
        )
        haproxy = require_program("haproxy")
        process = await self.start([haproxy, "-db", "-f", str(config), *arguments])
        if is_up:
            await until(lambda: self.is_up(process.pid))
        return process

    def is_up(self, pid: int) -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(str(self.directory / "admin"))
                sock.sendall(b"show info\n")
                text = b"".join(iter(lambda: sock.recv(65536), b""))
            except OSError:
                return False
        return b"\nPid: %d\n" % pid in text

    async def start_partner(self, *arguments: str) -> trio.Process:
        """Start a server of this library; return when it serves."""
        command = python(
            "tests.handover.haproxy_partner", str(self.directory), str(self.port), *arguments
        )
        process = await self.start(command, stdout=subprocess.PIPE)
        with trio.fail_after(60):
            assert await first_line(process) == "ready"
        return process

    async def connect(self, *, unix: bool) -> trio.abc.Stream:
        if unix:
            return await open_unix_connection(self.directory / "web.sock")
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def ask(self, *, unix: bool) -> str:
        """Send one request; return how it ended."""
        try:
            stream = await self.connect(unix=unix)
        except OSError:
            return "refused"
        answer = b""
        async with stream:
            try:
                await stream.send_all(REQUEST)
                while more := await stream.receive_some(4096):
                    answer += more
            except trio.BrokenResourceError:
                return "reset"
        if not answer:
            return "empty"
        body = answer.partition(b"\r\n\r\n")[2].decode()
        if not answer.startswith(b"HTTP/1.1 200") or not body:
            return "wrong"
        self.answers[body] += 1
        return "answered"

    async def run(self, *, unix: bool) -> None:
        while True:
            self.outcomes[await self.ask(unix=unix)] += 1

    async def answered_by(self, name: str) -> None:
        """Wait until clients of both kinds had many answers of a server."""
        before = self.answers[name]
        await until(lambda: self.answers[name] > before + 100)


@asynccontextmanager
async def partners(directory: Path) -> AsyncGenerator[Partners, None]:
    found = Partners(directory)
    try:
        yield found
    finally:
        for each in found.processes:
            each.kill()
            with trio.CancelScope(shield=True):
                await each.wait()
                if each.stdout is not None:
                    await each.stdout.aclose()


async def ended(process: trio.Process) -> int:
    with trio.fail_after(60):
        return await process.wait()


async def test_haproxy_and_a_server_replace_each_other_under_load(tmp_path: Path) -> None:
    """take_haproxy_listeners and serve_haproxy_listeners: no request is refused or reset."""
    async with partners(tmp_path) as found, trio.open_nursery() as nursery:
        haproxy = await found.start_haproxy()
        for _ in range(CLIENTS):
            for unix in False, True:
                nursery.start_soon(partial(found.run, unix=unix))
        await found.answered_by("haproxy")
        for _ in range(3):
            partner = await found.start_partner("take")
            haproxy.send_signal(signal.SIGUSR1)
            assert await ended(haproxy) == 0
            await found.answered_by(f"partner {partner.pid}")
            haproxy = await found.start_haproxy(
                "-x", str(tmp_path / "partner"), "-sf", str(partner.pid)
            )
            assert await ended(partner) == 0
            await found.answered_by("haproxy")
        nursery.cancel_scope.cancel()
    assert set(found.outcomes) == {"answered"}


async def test_serve_haproxy_listeners_first(tmp_path: Path) -> None:
    """A server that has opened its listeners is replaced by HAProxy, which has their sockets."""
    async with partners(tmp_path) as found, trio.open_nursery() as nursery:
        partner = await found.start_partner()
        for unix in False, True:
            nursery.start_soon(partial(found.run, unix=unix))
        await found.answered_by(f"partner {partner.pid}")
        inode = (tmp_path / "web.sock").stat().st_ino
        await found.start_haproxy("-x", str(tmp_path / "partner"), "-sf", str(partner.pid))
        assert await ended(partner) == 0
        await found.answered_by("haproxy")
        # It is the same socket, whose path was not removed by the server that has ended.
        assert (tmp_path / "web.sock").stat().st_ino == inode
        nursery.cancel_scope.cancel()
    assert set(found.outcomes) == {"answered"}


async def test_serve_haproxy_listeners_when_haproxy_cannot_start(tmp_path: Path) -> None:
    """If HAProxy cannot bind an address, it asks for a pause and gives up; nothing changes."""
    async with partners(tmp_path) as found, trio.open_nursery() as nursery:
        partner = await found.start_partner()
        for unix in False, True:
            nursery.start_soon(partial(found.run, unix=unix))
        port = free_port()
        (blocker,) = await trio.open_tcp_listeners(port, host="127.0.0.1")
        async with blocker:
            haproxy = await found.start_haproxy(
                *("-x", str(tmp_path / "partner"), "-sf", str(partner.pid)),
                more=f"bind 127.0.0.1:{port}",
                is_up=False,
            )
            assert await ended(haproxy) == 1
        await found.answered_by(f"partner {partner.pid}")
        nursery.cancel_scope.cancel()
        assert partner.returncode is None
        partner.send_signal(signal.SIGUSR1)
        assert await ended(partner) == 0
    assert set(found.outcomes) == {"answered"}


async def test_take_haproxy_listeners_without_expose_fd(tmp_path: Path) -> None:
    """HAProxy says nothing if its configuration does not allow it; the error says what it needs."""
    async with partners(tmp_path) as found:
        await found.start_haproxy(expose="")
        with pytest.raises(TakeOverError, match="expose-fd listeners"):
            await take_haproxy_listeners(tmp_path / "admin")
        assert await found.ask(unix=False) == "answered"


async def test_take_haproxy_listeners_of_many(tmp_path: Path) -> None:
    """More than one message of sockets, shards, datagrams, and abstract names."""
    many = [f"bind {tmp_path}/{number}.sock" for number in range(300)]
    shards = free_port()
    more = [*many, f"bind abns@trio-{os.getpid()}", f"bind 127.0.0.1:{shards} shards 3"]
    async with partners(tmp_path) as found:
        await found.start_haproxy(more="\n    ".join(more))
        with await take_haproxy_listeners(tmp_path / "admin") as taken:
            assert len(taken.sockets) == 300 + 7
            assert f"{tmp_path}/admin" in {each.address for each in taken.sockets}
            for number in range(300):
                listener = taken.unix(tmp_path / f"{number}.sock")
                assert listener is not None
                await listener.aclose()
            abstract = taken.unix(f"\0trio-{os.getpid()}")
            assert abstract is not None
            await abstract.aclose()
            found_shards = taken.tcp(shards)
            assert len(found_shards) == 3
            for each in found_shards:
                await each.aclose()
        assert await found.ask(unix=True) == "answered"


async def test_serve_haproxy_listeners_with_many(tmp_path: Path) -> None:
    """More listeners than fit into one message are given to HAProxy, which binds none itself."""
    paths = [tmp_path / f"{number}.sock" for number in range(300)]
    async with partners(tmp_path) as found, trio.open_nursery() as nursery:
        listeners = [await open_unix_listener(path) for path in paths]
        await nursery.start(serve_haproxy_listeners, tmp_path / "partner", listeners)
        inodes = [path.stat().st_ino for path in paths]
        binds = "\n    ".join(f"bind {path}" for path in paths)
        await found.start_haproxy("-x", str(tmp_path / "partner"), more=binds)
        nursery.cancel_scope.cancel()
    for each in listeners:
        await each.aclose()
    # HAProxy has bound none of them again.
    assert [path.stat().st_ino for path in paths] == inodes
