"""GLib in a process of its own, as the peer of the interoperability tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import attrs
import pytest
import trio

from tests._helpers.programs.open_files import described, opened
from trio_unixconn import (
    AsyncResult,
    Cancellable,
    Credentials,
    UnixConnection,
    open_callback_adapter,
    open_unix_connection,
    open_unix_listener,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

# Debian's PyGObject is installed for this Python, whichever Python runs the tests.
SYSTEM_PYTHON: Final = "/usr/bin/python3"
PEER: Final = Path(__file__).parent / "programs" / "glib_peer.py"

OURS: Final = ("await", "callback")
GLIBS: Final = ("blocking", "async")
WAYS: Final = ("socketpair", "GLib connects", "GLib listens", "GLib serves")


def missing_peer(reason: str) -> NoReturn:
    """Skip a test whose peer is not installed; on CI, fail."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def require_glib(python: str = SYSTEM_PYTHON) -> None:
    """Skip without PyGObject; on CI, fail."""
    probe = "import gi; gi.require_version('Gio', '2.0'); from gi.repository import Gio"
    try:
        subprocess.run([python, "-c", probe], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as exc:
        reason = (
            f"{python} has no PyGObject ({exc}); on Debian and Ubuntu install the packages "
            "python3-gi and gir1.2-glib-2.0"
        )
        missing_peer(reason)


@attrs.define
class GLibPeer:
    """A process that runs GLib; its commands are the methods ``do_*`` of glib_peer.py."""

    process: trio.Process
    _buffer: bytes = b""

    async def ask(self, do: str, **arguments: Any) -> Any:
        """Run a command that succeeds, and return its result."""
        await self.begin(do, **arguments)
        return await self.result()

    async def refusal(self, do: str, **arguments: Any) -> int:
        """Run a command that fails, and return the code of its error."""
        await self.begin(do, **arguments)
        return await self.error_code()

    async def begin(self, do: str, **arguments: Any) -> None:
        """Start a command; :meth:`result` or :meth:`error_code` waits for it."""
        assert self.process.stdin is not None
        with trio.fail_after(30):
            line = json.dumps({"do": do, **arguments}).encode() + b"\n"
            await self.process.stdin.send_all(line)
        if arguments.get("announce"):
            assert await self._answer() == {"begun": do}

    async def cancel(self) -> None:
        """Cancel the Gio.Cancellable of the command that was started last."""
        await self.begin("cancel")

    async def result(self) -> Any:
        """Wait for the command, which succeeds; return its result."""
        answer = await self._answer()
        assert "error" not in answer, answer
        return answer["result"]

    async def error_code(self) -> int:
        """Wait for the command, which fails; return the code of its error."""
        answer = await self._answer()
        assert "error" in answer, answer
        return int(answer["code"])

    async def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        with trio.fail_after(30):
            while b"\n" not in self._buffer:
                more = await self.process.stdout.receive_some()
                assert more, "the peer exited; its errors are on stderr"
                self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


@asynccontextmanager
async def started_peer(theirs: socket.socket | None = None) -> AsyncGenerator[GLibPeer, None]:
    """Start GLib with ``theirs`` as its connection; it must exit with status 0 at the end."""
    with theirs or nullcontext():
        fds = [] if theirs is None else [theirs.fileno()]
        process = await trio.lowlevel.open_process(
            # The environment variables of Python are for another Python.
            [SYSTEM_PYTHON, "-E", "-s", str(PEER), *map(str, fds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=fds,
            # Otherwise a call that GLib forbids would look like one without effect.
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
    """Connect to GLib in one of the :data:`WAYS`; fail if the block takes a minute."""
    with trio.fail_after(60):
        if way == "socketpair":
            ours, theirs = socket.socketpair()
            async with (
                UnixConnection.from_stdlib_socket(ours) as conn,
                started_peer(theirs) as peer,
            ):
                yield conn, peer
        else:
            async with started_peer() as peer, await _meet(peer, way, tmp_path / "s") as conn:
                yield conn, peer


async def _meet(peer: GLibPeer, way: str, path: Path) -> UnixConnection:
    if way == "GLib connects":
        async with await open_unix_listener(path) as listener:
            assert await peer.ask("connect", path=str(path)) == "GUnixConnection"
            return await listener.accept()
    await peer.ask("listen", path=str(path), service=way == "GLib serves")
    conn = await open_unix_connection(path)
    assert await peer.ask("accept") == "GUnixConnection"
    return conn


async def operate(
    form: str,
    conn: UnixConnection,
    operation: str,
    *arguments: Any,
    cancellable: Cancellable | None = None,
) -> Any:
    """Run an operation of this library in one of the forms :data:`OURS`."""
    if form == "await":
        return await getattr(conn, operation)(*arguments, cancellable)
    results: list[AsyncResult] = []
    async with open_callback_adapter() as adapter:
        wrapped = adapter.wrap(conn)
        begin = getattr(wrapped, f"{operation}_async")
        begin(*arguments, cancellable, lambda _source, result: results.append(result))
    (result,) = results
    return getattr(wrapped, f"{operation}_finish")(result)


async def receive_exactly(conn: UnixConnection, size: int) -> bytes:
    """Receive ``size`` plain bytes."""
    data = b""
    while len(data) < size:
        more = await conn.receive_some(size - len(data))
        assert more, f"end of stream after {len(data)} of {size} bytes"
        data += more
    return data


async def receive_described(conn: UnixConnection, form: str = "await") -> dict[str, Any]:
    """Receive a file descriptor, and describe its file."""
    fd = await operate(form, conn, "receive_fd")
    try:
        return described(fd)
    finally:
        os.close(fd)


async def in_step(conn: UnixConnection, peer: GLibPeer) -> None:
    """The next operation of each kind works, in both directions."""
    await peer.ask("send_fd", content="next")
    assert (await receive_described(conn))["content"] == b"next0".hex()
    await peer.ask("send_credentials")
    assert (await conn.receive_credentials()).pid == peer.process.pid
    await peer.ask("write", data=b"bytes".hex())
    assert await receive_exactly(conn, 5) == b"bytes"
    await ours_in_step(conn, peer)


async def ours_in_step(conn: UnixConnection, peer: GLibPeer) -> None:
    """The next operation of each kind works, from us to GLib."""
    with opened("unix", b"next") as fd:
        assert await conn.send_fd(fd)
    assert (await peer.ask("receive_fd"))["content"] == b"next".hex()
    assert await conn.send_credentials()
    assert (await peer.ask("receive_credentials"))["pid"] == os.getpid()
    await conn.send_all(b"bytes")
    assert await peer.ask("read", size=5) == b"bytes".hex()


def passcred(conn: UnixConnection) -> int:
    """Return SO_PASSCRED of our end."""
    return conn.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)


def as_json(credentials: Credentials) -> dict[str, Any]:
    """Return credentials in the form in which the peer reports them."""
    return {
        "string": credentials.to_string(),
        "pid": credentials.get_unix_pid(),
        "uid": credentials.get_unix_user(),
    }


def set_passcred(conn: UnixConnection, value: int) -> None:
    """Set SO_PASSCRED of our end."""
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, value)
