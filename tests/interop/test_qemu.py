"""QEMU's machine protocol (QMP), to which file descriptors are passed with a command.

Source: QEMU's QMP reference manual ("add-fd", "getfd", "query-fdsets", "blockdev-backup")
"""

from __future__ import annotations

import json
import os
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests._helpers.programs.open_files import opened
from tests._helpers.real_programs import running
from trio_unixconn import UnixConnection, open_unix_listener

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Sequence
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SIZE = 1 << 20


@attrs.define
class Monitor:
    """A QMP connection."""

    conn: UnixConnection
    _buffer: bytes = b""

    async def execute(
        self, command: str, arguments: dict[str, Any] | None = None, fds: Sequence[int] = ()
    ) -> Any:
        """Execute a command that succeeds; return its result."""
        answer = await self.answer(command, arguments, fds)
        assert "error" not in answer, answer
        return answer["return"]

    async def answer(
        self, command: str, arguments: dict[str, Any] | None = None, fds: Sequence[int] = ()
    ) -> dict[str, Any]:
        """Execute a command; return QEMU's answer, a result or an error."""
        text = json.dumps({"execute": command, "arguments": arguments or {}})
        await self.conn.send_message(text.encode() + b"\r\n", fds=fds)
        while True:
            answer = await self.read()
            if "event" not in answer:
                return answer

    async def job_ends(self, name: str) -> None:
        """Read events until a job is no more."""
        wanted = {"id": name, "status": "null"}
        while (await self.read()).get("data") != wanted:
            pass

    async def read(self) -> dict[str, Any]:
        """Read a greeting, an answer or an event."""
        while b"\n" not in self._buffer:
            more = await self.conn.receive_some()
            assert more, "QEMU ended the stream"
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found


@asynccontextmanager
async def qemu_monitor(qemu: str, directory: Path) -> AsyncGenerator[Monitor, None]:
    """Run QEMU without a machine, which connects to us with its monitor."""
    path = directory / "qmp"
    options = ["-machine", "none", "-nodefaults", "-no-user-config", "-nographic", "-S"]
    with trio.fail_after(60):
        async with (
            await open_unix_listener(path) as listener,
            running([qemu, *options, "-qmp", f"unix:{path}"]) as process,
            await listener.accept() as conn,
        ):
            assert conn.get_peer_credentials().pid == process.pid
            monitor = Monitor(conn)
            assert "QMP" in await monitor.read()
            await monitor.execute("qmp_capabilities")
            yield monitor
            await monitor.execute("quit")
            assert await process.wait() == 0


@contextmanager
def image(content: bytes) -> Generator[int, None, None]:
    """Open a file in memory."""
    fd = os.memfd_create("image")
    try:
        os.write(fd, content)
        yield fd
    finally:
        os.close(fd)


async def add_block_device(monitor: Monitor, name: str, number: int, fd: int) -> None:
    """Add a descriptor to a set of QEMU's, and a block device that opens the set."""
    added = await monitor.execute("add-fd", {"fdset-id": number, "opaque": name}, [fd])
    assert added["fdset-id"] == number
    file = {"driver": "file", "filename": f"/dev/fdset/{number}", "locking": "off"}
    await monitor.execute("blockdev-add", {"node-name": name, "driver": "raw", "file": file})


async def test_qemu_add_fd(tmp_path: Path, qemu: str) -> None:
    """QEMU copies one block device to another, and both are descriptors that we sent."""
    content = os.urandom(SIZE)
    async with qemu_monitor(qemu, tmp_path) as monitor:
        with image(content) as source, image(bytes(SIZE)) as target:
            await add_block_device(monitor, "source", 7, source)
            await add_block_device(monitor, "target", 8, target)
            sets = await monitor.execute("query-fdsets")
            names = {each["fdset-id"]: [fd["opaque"] for fd in each["fds"]] for each in sets}
            assert names == {7: ["source"], 8: ["target"]}

            job = {"job-id": "copy", "device": "source", "target": "target", "sync": "full"}
            await monitor.execute("blockdev-backup", job)
            await monitor.job_ends("copy")
            assert os.pread(target, SIZE, 0) == content


async def test_qemu_getfd(tmp_path: Path, qemu: str) -> None:
    """QEMU writes the state of its machine to a pipe that we sent under a name."""
    async with qemu_monitor(qemu, tmp_path) as monitor:
        reader, writer = os.pipe()
        async with trio.lowlevel.FdStream(reader) as stream:
            try:
                await monitor.execute("getfd", {"fdname": "state"}, [writer])
            finally:
                os.close(writer)
            await monitor.execute("migrate", {"uri": "fd:state"})
            # The magic number of QEMU's migration format. The stream ends when QEMU has closed
            # the only descriptor of its writing end.
            state = b"".join([chunk async for chunk in stream])
        assert state.startswith(b"QEVM")


async def test_qemu_without_a_descriptor(tmp_path: Path, qemu: str) -> None:
    """QEMU misses a descriptor that we did not send, and takes the next one."""
    async with qemu_monitor(qemu, tmp_path) as monitor:
        answer = await monitor.answer("getfd", {"fdname": "none"})
        assert "SCM_RIGHTS" in answer["error"]["desc"]
        with opened("pipe", b"") as fd:
            await monitor.execute("getfd", {"fdname": "pipe"}, [fd])
        await monitor.execute("closefd", {"fdname": "pipe"})
