"""Send 1000 descriptors to a child process, and take them there in three ways.

Run it with ``python examples/pass_many.py``.
"""

import os
import sys
from functools import partial

import trio

from trio_unixconn import UnixConnection, connection_pair


def identity(fd: int) -> bytes:
    found = os.fstat(fd)
    return b"%d:%d\n" % (found.st_dev, found.st_ino)


async def parent() -> None:
    ours, theirs = connection_pair()
    pipes = [os.pipe() for _ in range(50)]
    fds = [reader for reader, _ in pipes] * 10
    async with ours, trio.open_nursery() as nursery:
        async with theirs:  # the child inherits this end, and this process closes its own
            number = theirs.socket.fileno()
            command = [sys.executable, __file__, str(number)]
            await nursery.start(partial(trio.run_process, command, pass_fds=[number]))
        # As few messages as possible, for receive_fds() and receive_message().
        sent = await ours.send_fds(fds)
        # One in each message, for fds() and receive_fd().
        sent += await ours.send_fds(fds, per_message=1)
        await ours.send_message(b"the last two", fds=fds[:2])
        await ours.send_eof()
        answer = b"".join([chunk async for chunk in ours])
    print(f"parent: {sent} descriptors went, and two with a message")
    assert sent == 1000
    assert answer == b"".join(map(identity, [*fds, *fds, *fds[:2]]))
    for each in pipes:
        for fd in each:
            os.close(fd)


async def child(number: int) -> None:
    async with UnixConnection.from_fd(number) as conn:
        count = 0
        answer = b""
        while count < 500:
            # The block closes the descriptors that are still in the list.
            with await conn.receive_fds(500 - count) as fds:
                answer += b"".join(map(identity, fds))
                count += len(fds)
        async for fd in conn.fds():
            answer += identity(fd)
            os.close(fd)
            count += 1
            if count == 1000:
                break  # what was read ahead is still there for the next receive
        data = b""
        while len(data) < len(b"the last two"):
            with await conn.receive_message(100) as message:
                data += message.data
                answer += b"".join(map(identity, message.fds))
        print(f"child {os.getpid()}: {count} descriptors, then {data!r}", flush=True)
        await conn.send_all(answer)


if len(sys.argv) == 1:
    trio.run(parent)
else:
    trio.run(child, int(sys.argv[1]))
