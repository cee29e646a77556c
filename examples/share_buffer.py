"""Share an array with a child process: one descriptor, however large; mapped, not copied.

Run it with ``python examples/share_buffer.py``; it needs numpy (``pip install numpy``).
"""

import sys
from functools import partial

import numpy as np
import trio

from trio_unixconn import UnixConnection, connection_pair

COUNT = 4_000_000
LARGEST = 8 * COUNT


async def parent() -> None:
    ours, theirs = connection_pair()
    async with ours, trio.open_nursery() as nursery:
        async with theirs:  # the child inherits this end, and this process closes its own
            number = theirs.socket.fileno()
            command = [sys.executable, __file__, str(number)]
            await nursery.start(partial(trio.run_process, command, pass_fds=[number]))
        array = np.arange(COUNT, dtype=np.int64)
        await ours.send_buffer(array.data)
        answer = b"".join([chunk async for chunk in ours])
        print(f"parent: the child answered {answer!r}")
        assert int(answer) == int(array.sum())


async def child(number: int) -> None:
    async with UnixConnection.from_fd(number) as conn:
        view = await conn.receive_buffer(LARGEST)
        array = np.frombuffer(view, dtype=np.int64)
        assert not array.flags.writeable
        await conn.send_all(b"%d" % array.sum())


if len(sys.argv) == 1:
    trio.run(parent)
else:
    trio.run(child, int(sys.argv[1]))
