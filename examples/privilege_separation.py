"""A program in two processes: one holds a key, the other parses what strangers send.

The monitor keeps the rights: a secret key, and a directory of files. The worker talks to clients.
It is the same program, started again with one end of a connection. If root has started it, it
becomes the user "nobody", which cannot read the files; of any other user it keeps the rights, and
says so. It asks the monitor, which allows two things: to sign a text, and to open one of the files
that are meant for clients. A worker that a client has taken over can ask for the same two things,
and never gets the key. OpenSSH's server is built like this. For workers that cannot open any file,
see pool_broker.py.

Run it with ``python examples/privilege_separation.py``.
"""

import hmac
import os
import struct
import sys
import tempfile
from functools import partial
from pathlib import Path

import trio

from trio_unixconn import (
    ConnectionBrokenError,
    EndOfStreamError,
    UnixConnection,
    UnixConnectionError,
    connection_pair,
)

NOBODY = 65534
LONGEST = 4096
PUBLIC = (b"motd", b"help")

# A request is a verb, the length of its text, and the text. An answer is one of these bytes: FILE
# carries a file descriptor, and SIGNATURE is followed by 32 bytes.
REQUEST = struct.Struct("!BH")
SIGN, OPEN = 1, 2
FILE, SIGNATURE, REFUSED = b"f", b"s", b"-"


async def receive_exactly(conn: UnixConnection, size: int) -> bytes:
    data = b""
    while len(data) < size:
        # Of a peer that sends file descriptors here, this closes them, and raises.
        chunk = await conn.receive_some(size - len(data))
        if not chunk:
            raise EndOfStreamError("the other process has ended")
        data += chunk
    return data


################################################################
# The monitor, with all rights
################################################################


async def answer_request(conn: UnixConnection, key: bytes, files: Path) -> None:
    """Answer one request. What the worker sends is not trusted."""
    verb, size = REQUEST.unpack(await receive_exactly(conn, REQUEST.size))
    if size > LONGEST:
        raise ValueError(f"a request of {size} bytes")
    text = await receive_exactly(conn, size)
    if verb == SIGN:
        await conn.send_all(SIGNATURE + hmac.digest(key, text, "sha256"))
    elif verb == OPEN and text in PUBLIC:
        fd = os.open(files / text.decode(), os.O_RDONLY)
        try:
            await conn.send_message(FILE, fds=[fd])
        finally:
            os.close(fd)
    else:
        print(f"monitor: refused {text!r}", flush=True)
        await conn.send_all(REFUSED)


async def serve_worker(conn: UnixConnection, worker: int, key: bytes, files: Path) -> bool:
    """Do what the worker asks for, until it ends; return whether it has kept to the protocol."""
    async with conn:
        # The kernel says which process has sent this.
        sender = await conn.receive_credentials()
        if sender.pid != worker:
            raise PermissionError(f"process {sender.pid} is not the worker")
        try:
            while True:
                await answer_request(conn, key, files)
        except (EndOfStreamError, ConnectionBrokenError):
            print("monitor: the worker has ended", flush=True)
            return True
        except (UnixConnectionError, ValueError) as exc:
            print(f"monitor: the worker does not keep to the protocol: {exc}", file=sys.stderr)
            return False


async def monitor() -> None:
    key = os.urandom(32)
    with tempfile.TemporaryDirectory() as directory:
        files = Path(directory)
        for name in PUBLIC:
            (files / name.decode()).write_text("welcome")
        (files / "passwords").write_text("secret")
        here, there = connection_pair()
        async with here, trio.open_nursery() as nursery:
            async with there:  # the worker inherits this end, and this process closes its own
                fd = there.socket.fileno()
                command = [sys.executable, __file__, str(fd)]
                process: trio.Process = await nursery.start(
                    partial(trio.run_process, command, pass_fds=[fd])
                )
            if not await serve_worker(here, process.pid, key, files):
                nursery.cancel_scope.cancel()  # kills it


################################################################
# The worker, without rights
################################################################


def give_up_rights() -> None:
    """Become a user that owns no files."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        print(f"worker: the user is {NOBODY} now", flush=True)
    else:
        print("worker: the user is that of the monitor; only root can separate them", flush=True)


async def ask(conn: UnixConnection, verb: int, text: bytes) -> bytes | int | None:
    """Ask the monitor; return a signature, a file descriptor, or None if it has refused."""
    await conn.send_all(REQUEST.pack(verb, len(text)) + text)
    with await conn.receive_message(1, max_fds=1) as answer:
        if answer.data == SIGNATURE:
            return await receive_exactly(conn, 32)
        if answer.data == FILE and answer.fds:
            return answer.fds.take(0)
        if not answer.data:
            raise EndOfStreamError("the monitor has ended")
        return None


async def worker(fd: int) -> None:
    async with UnixConnection.from_fd(fd) as conn:
        await conn.send_credentials()
        # What a server would do for its clients.
        signature = await ask(conn, SIGN, b"a text")
        assert isinstance(signature, bytes)
        print(f"worker: received a signature of {len(signature)} bytes, and no key", flush=True)
        motd = await ask(conn, OPEN, b"motd")
        assert isinstance(motd, int)
        text = os.read(motd, LONGEST).decode()
        os.close(motd)
        print(f"worker: read {text!r} in a file that the monitor has opened", flush=True)
        # What a client would do that has taken over the worker.
        for name in (b"passwords", b"../../etc/shadow", b"motd\0"):
            assert await ask(conn, OPEN, name) is None
        assert await ask(conn, 3, b"key") is None


if len(sys.argv) > 1:
    give_up_rights()
    trio.run(worker, int(sys.argv[1]))
else:
    trio.run(monitor)
