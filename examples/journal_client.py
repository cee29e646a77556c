"""Write entries to the journal of systemd, without libsystemd.

Run it with ``python examples/journal_client.py``. It writes to a socket of its own, and prints what
arrives there; with ``--journal`` it writes to the journal of this machine (see it with ``journalctl
-t example``).

The protocol is https://systemd.io/JOURNAL_NATIVE_PROTOCOL/: a datagram for each entry. One that is
too large for a datagram is sent as sealed memory.
"""

import errno
import fcntl
import os
import sys
import tempfile

import trio

from trio_unixconn import SendError, UnixDatagramSocket, open_unix_datagram

JOURNAL = "/run/systemd/journal/socket"
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def pack(**fields: str) -> bytes:
    parts: list[bytes] = []
    for name, value in fields.items():
        data = value.encode()
        if b"\n" in data:
            # The length says where it ends.
            parts += [name.encode(), b"\n", len(data).to_bytes(8, "little"), data, b"\n"]
        else:
            parts += [name.encode(), b"=", data, b"\n"]
    return b"".join(parts)


def sealed_memory(data: bytes) -> int:
    memory = os.memfd_create("entry", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(data)
        # From here on no process can change it, so the journal can read it in place.
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(memory)
        raise
    return memory


async def log(sock: UnixDatagramSocket, path: str, **fields: str) -> None:
    entry = pack(SYSLOG_IDENTIFIER="example", **fields)
    try:
        await sock.send_message(entry, path)
    except SendError as exc:
        if exc.errno != errno.EMSGSIZE:
            raise
        memory = sealed_memory(entry)
        try:
            await sock.send_message(b"", path, fds=[memory])
        finally:
            os.close(memory)


async def write(path: str) -> None:
    async with await open_unix_datagram() as sock:
        await log(sock, path, MESSAGE="hello", PRIORITY="6")
        await log(sock, path, MESSAGE="two\nlines", PRIORITY="4")
        await log(sock, path, MESSAGE="x" * 1_000_000, PRIORITY="7")


async def main() -> None:
    if sys.argv[1:] == ["--journal"]:
        await write(JOURNAL)
        return
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "journal")
        async with await open_unix_datagram(path, credentials=True) as journal:
            await write(path)
            for _ in range(3):
                async with await journal.receive_message() as entry:
                    assert entry.credentials is not None
                    size = os.fstat(entry.fds[0]).st_size if entry.fds else len(entry.data)
                    how = "in sealed memory" if entry.fds else "in the datagram"
                    print(f"{size} bytes {how}, from process {entry.credentials.pid}")


trio.run(main)
