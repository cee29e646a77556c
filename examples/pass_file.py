"""Send an open file to a child process, which reads it without having its name.

Run it with ``python examples/pass_file.py``.
"""

import os
import sys
import tempfile

import trio

from trio_unixconn import open_unix_connection, open_unix_listener

TEXT = b"written by the parent, read by the child"


async def parent() -> None:
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile() as file:
        file.write(TEXT)
        file.flush()
        file.seek(0)  # the position is part of the open file, which both processes share
        path = os.path.join(directory, "socket")
        async with await open_unix_listener(path) as listener, trio.open_nursery() as nursery:
            nursery.start_soon(trio.run_process, [sys.executable, __file__, path])
            async with await listener.accept() as conn:
                await conn.send_fd(file)
                answer = await conn.receive_some()
        print(f"parent: the child answered {answer!r}")
        assert answer == b"%d bytes" % len(TEXT)


async def child(path: str) -> None:
    async with await open_unix_connection(path) as conn:
        fd = await conn.receive_fd()
        try:
            text = os.read(fd, 1000)
        finally:
            os.close(fd)
        print(f"child {os.getpid()}: read {text!r}", flush=True)
        assert text == TEXT
        await conn.send_all(b"%d bytes" % len(text))


if len(sys.argv) == 1:
    trio.run(parent)
else:
    trio.run(child, sys.argv[1])
