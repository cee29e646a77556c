"""What the interoperability tests share: GLib in a process of its own, at the other end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from trio_unixconn import (
    UnixConnection,
)

# The one that has Debian's PyGObject, whichever Python runs the tests.
SYSTEM_PYTHON: Final = "/usr/bin/python3"
PEER: Final = Path(__file__).parent / "peers" / "glib_peer.py"

OURS: Final = ("await", "callback")
GLIBS: Final = ("blocking", "async")
WAYS: Final = ("socketpair", "GLib connects", "GLib listens", "GLib serves")


@attrs.define
class GLibPeer:
    """A process in which GLib does what it is told; its commands are ``do_*`` of glib_peer.py."""

    process: trio.Process
    _buffer: bytes = b""

    async def ask(self, do: str, **arguments: Any) -> Any:
        """Have GLib do something that succeeds, and return what came of it."""
        await self.begin(do, **arguments)
        return await self.result()

    async def refusal(self, do: str, **arguments: Any) -> int:
        """Have GLib do something that fails, and return the number of its error."""
        await self.begin(do, **arguments)
        return await self.error_code()

    async def begin(self, do: str, **arguments: Any) -> None:
        """Have GLib begin something; :meth:`result` or :meth:`error_code` says how it ended."""
        assert self.process.stdin is not None
        with trio.fail_after(30):
            line = json.dumps({"do": do, **arguments}).encode() + b"\n"
            await self.process.stdin.send_all(line)
        if arguments.get("announce"):
            assert await self._answer() == {"begun": do}

    async def cancel(self) -> None:
        """Fire the Gio.Cancellable of what was begun last."""
        await self.begin("cancel")

    async def result(self) -> Any:
        """Return what came of what was begun."""
        answer = await self._answer()
        assert "error" not in answer, answer
        return answer["result"]

    async def error_code(self) -> int:
        """Return the number of the error that ended what was begun."""
        answer = await self._answer()
        assert "error" in answer, answer
        return int(answer["code"])

    async def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        with trio.fail_after(30):
            while b"\n" not in self._buffer:
                more = await self.process.stdout.receive_some()
                assert more, "the peer died; its last words are on stderr"
                self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


@asynccontextmanager
async def started_peer(theirs: socket.socket | None = None) -> AsyncGenerator[GLibPeer, None]:
    """Start GLib, with ``theirs`` as its connection; at the end it must leave in peace."""
    fds = [] if theirs is None else [theirs.fileno()]
    process = await trio.lowlevel.open_process(
        # Not what the environment says about Python: that is meant for another Python.
        [SYSTEM_PYTHON, "-E", "-s", str(PEER), *map(str, fds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=fds,
        # A call that GLib forbids must not pass for one that did nothing.
        env={**os.environ, "G_DEBUG": "fatal-criticals"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    async with process.stdin, process.stdout:
        try:
            yield GLibPeer(process)
            await process.stdin.aclose()
            with trio.fail_after(30):
                assert await process.wait() == 0
        finally:
            with trio.CancelScope(shield=True):
                process.kill()
                await process.wait()


@asynccontextmanager
async def connected(
    tmp_path: Path, way: str = "socketpair"
) -> AsyncGenerator[tuple[UnixConnection, GLibPeer], None]:
    """Connect to GLib in one of the :data:`WAYS`."""
    if way == "socketpair":
        ours, theirs = socket.socketpair()
        async with UnixConnection.from_stdlib_socket(ours) as conn:
            with theirs:
                starting = started_peer(theirs)
                peer = await starting.__aenter__()
