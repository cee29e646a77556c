"""anyio: ``UNIXSocketStream`` on trio, on asyncio, or on asyncio with uvloop's loop."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import SocketAttribute, UNIXSocketStream

from .common import (
    Job,
    Side,
    both,
    clock,
    crowd,
    disperse,
    end_of,
    is_same_user,
    readable_once,
    resident,
    serve,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

# The argument after the side and the descriptor.
OPTIONS: dict[str, dict[str, Any]] = {
    "trio": {"backend": "trio"},
    "asyncio": {"backend": "asyncio"},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
}
LOOP = OPTIONS[sys.argv[3]]


def pair(
    left: Callable[[UNIXSocketStream, Job], Any], right: Callable[[UNIXSocketStream, Job], Any]
) -> tuple[Side, Side]:
    """Make the two sides from async functions that get a stream."""

    def run(do: Any, meet: Any, fd: int, job: Job) -> Any:
        async def main() -> Any:
            async with await UNIXSocketStream.from_socket(end_of(fd)) as stream:
                meet(fd)
                return await do(stream, job)

        return anyio.run(main, **LOOP)

    return both(run, left, right)


def close_each(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


async def fd_left(stream: UNIXSocketStream, job: Job) -> float:
    begin = clock()
    for _ in range(job.count):
        await stream.send_fds(b"\0", [0])
        close_each((await stream.receive_fds(1, 1))[1])
    return clock() - begin


async def fd_right(stream: UNIXSocketStream, job: Job) -> None:
    for _ in range(job.count):
        _, fds = await stream.receive_fds(1, 1)
        await stream.send_fds(b"\0", [0])
        close_each(fds)


async def one_way_left(stream: UNIXSocketStream, job: Job) -> float:
    fds = [0] * job.size
    begin = clock()
    for _ in range(job.count):
        await stream.send_fds(b"\0", fds)
    await stream.receive(1)
    return clock() - begin


async def one_way_right(stream: UNIXSocketStream, job: Job) -> None:
    for _ in range(job.count):
        close_each((await stream.receive_fds(1, job.size))[1])
    await stream.send(b"x")


async def ten_thousand_left(stream: UNIXSocketStream, job: Job) -> float:
    begin = clock()
    for left in range(job.size, 0, -253):
        await stream.send_fds(b"\0", [0] * min(253, left))
    await stream.receive(1)
    return clock() - begin


async def ten_thousand_right(stream: UNIXSocketStream, job: Job) -> None:
    left = job.size
    while left:
        _, fds = await stream.receive_fds(1, 253)
        left -= len(fds)
        close_each(fds)
    await stream.send(b"x")


async def message_left(stream: UNIXSocketStream, job: Job) -> float:
    data = job.payload()
    begin = clock()
    for _ in range(job.count):
        await stream.send_fds(data, [0, 0])
        close_each((await stream.receive_fds(65536, 2))[1])
    return clock() - begin


async def message_right(stream: UNIXSocketStream, job: Job) -> None:
    data = job.payload()
    for _ in range(job.count):
        _, fds = await stream.receive_fds(65536, 2)
        await stream.send_fds(data, [0, 0])
        close_each(fds)


async def receive_exactly(stream: UNIXSocketStream, size: int) -> None:
    while size:
        size -= len(await stream.receive(min(size, 65536)))


async def bytes_left(stream: UNIXSocketStream, job: Job) -> float:
    data = job.payload()
    begin = clock()
    for _ in range(job.count):
        await stream.send(data)
        await receive_exactly(stream, job.size)
    return clock() - begin


async def bytes_right(stream: UNIXSocketStream, job: Job) -> None:
    data = job.payload()
    for _ in range(job.count):
        await receive_exactly(stream, job.size)
        await stream.send(data)


async def buffer_left(stream: UNIXSocketStream, job: Job) -> float:
    data = job.payload()
    begin = clock()
    for _ in range(job.count):
        await stream.send(data)
        await stream.receive(1)
    return clock() - begin


async def buffer_right(stream: UNIXSocketStream, job: Job) -> None:
    for _ in range(job.count):
        await receive_exactly(stream, job.size)
        await stream.send(b"x")


async def accept_left(stream: UNIXSocketStream, job: Job) -> float:
    await stream.receive(1)
    path = job.path + "/accept"
    begin = clock()
    for _ in range(job.count):
        async with await anyio.connect_unix(path) as client:
            await client.receive(1)
    return clock() - begin


async def accept_right(stream: UNIXSocketStream, job: Job) -> None:
    async with await anyio.create_unix_listener(job.path + "/accept") as listener:
        await stream.send(b"x")
        for _ in range(job.count):
            async with await listener.accept() as client:
                if is_same_user(client.extra(SocketAttribute.raw_socket)):
                    await client.send(b"x")
    os.unlink(job.path + "/accept")


async def with_idle(stream: UNIXSocketStream, job: Job, play: Callable[..., Any]) -> Any:
    """Play ping-pong while other connections wait to receive."""
    streams = [await UNIXSocketStream.from_socket(sock) for sock in crowd(job)]
    async with anyio.create_task_group() as group:
        for each in streams:
            group.start_soon(each.receive_fds, 1, 1)
        await anyio.wait_all_tasks_blocked()
        # The other side may still be busy with its idle ones.
        await play(stream, Job(100, 64))
        answer = await play(stream, Job(job.count, 64))
        group.cancel_scope.cancel()
    disperse(job)
    for each in streams:
        await each.aclose()
    return answer


async def idle_left(stream: UNIXSocketStream, job: Job) -> Any:
    return await with_idle(stream, job, bytes_left)


async def idle_right(stream: UNIXSocketStream, job: Job) -> None:
    await with_idle(stream, job, bytes_right)


async def received_once(socks: list[socket.socket]) -> list[Any]:
    streams = [await UNIXSocketStream.from_socket(sock) for sock in socks]
    for stream in streams:
        await stream.receive(1)
    return streams


def memory(count: int) -> float:
    """Return the memory of one idle connection that has received once."""

    async def main() -> float:
        first = await received_once(readable_once(10))
        socks = readable_once(count)
        before = resident()
        streams = await received_once(socks)
        used = resident() - before
        for stream in first + streams:
            await stream.aclose()
        return used / count

    return float(anyio.run(main, **LOOP))


if __name__ == "__main__":
    serve(
        {
            "one descriptor, ping-pong": {"": pair(fd_left, fd_right)},
            "one descriptor a message, one way": {"": pair(one_way_left, one_way_right)},
            "many descriptors a message, one way": {"": pair(one_way_left, one_way_right)},
            "ten thousand descriptors": {"": pair(ten_thousand_left, ten_thousand_right)},
            "1 KiB and 2 descriptors, ping-pong": {"": pair(message_left, message_right)},
            "bytes, ping-pong": {"": pair(bytes_left, bytes_right)},
            "a large buffer": {"the bytes": pair(buffer_left, buffer_right)},
            "accept and check credentials": {"": pair(accept_left, accept_right)},
            "bytes, others idle": {"": pair(idle_left, idle_right)},
        },
        memory,
    )
