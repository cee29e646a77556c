"""trio with raw sendmsg, recvmsg and wait_readable, and trio's own streams."""

from __future__ import annotations

import array
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

import trio
import trio.testing

from .common import (
    SO_PASSCRED,
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
    from collections.abc import Callable, Iterable, Sequence

ROOM = socket.CMSG_SPACE(253 * 4)
FLAGS = socket.MSG_CMSG_CLOEXEC


def pair(
    left: Callable[[Any, Job], Any],
    right: Callable[[Any, Job], Any],
    wrap: Callable[[socket.socket], Any] = lambda sock: sock,
) -> tuple[Side, Side]:
    """Make the two sides from async functions that get ``wrap(socket)``."""

    def run(do: Any, meet: Any, fd: int, job: Job) -> Any:
        async def main() -> Any:
            with end_of(fd) as sock:
                sock.setblocking(False)
                end = wrap(sock)
                meet(fd)
                return await do(end, job)

        return trio.run(main)

    return both(run, left, right)


async def send(sock: socket.socket, data: bytes, messages: Sequence[Any]) -> None:
    # One system call, one checkpoint, and waiting only when the kernel says so.
    await trio.lowlevel.checkpoint_if_cancelled()
    while True:
        try:
            sock.sendmsg([data], messages)
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return


async def receive(sock: socket.socket, size: int = 1) -> Any:
    await trio.lowlevel.checkpoint_if_cancelled()
    try:
        received = sock.recvmsg(size, ROOM, FLAGS)
    except BlockingIOError:
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                return sock.recvmsg(size, ROOM, FLAGS)
            except BlockingIOError:
                continue
    await trio.lowlevel.cancel_shielded_checkpoint()
    return received


async def send_fds(sock: socket.socket, fds: Iterable[int], data: bytes = b"\0") -> None:
    await send(sock, data, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


async def receive_fds(sock: socket.socket, size: int = 1) -> array.array[int]:
    data, messages, flags, _ = await receive(sock, size)
    fds = array.array("i")
    for level, kind, payload in messages:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload)
    if not data or flags & socket.MSG_CTRUNC:
        raise EOFError
    return fds


def close_each(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


async def fd_left(sock: socket.socket, job: Job) -> float:
    begin = clock()
    for _ in range(job.count):
        await send_fds(sock, [0])
        close_each(await receive_fds(sock))
    return clock() - begin


async def fd_right(sock: socket.socket, job: Job) -> None:
    for _ in range(job.count):
        fds = await receive_fds(sock)
        await send_fds(sock, [0])
        close_each(fds)


async def one_way_left(sock: socket.socket, job: Job) -> float:
    fds = [0] * job.size
    begin = clock()
    for _ in range(job.count):
        await send_fds(sock, fds)
    await receive(sock)
    return clock() - begin


async def one_way_right(sock: socket.socket, job: Job) -> None:
    for _ in range(job.count):
        close_each(await receive_fds(sock))
    await send(sock, b"x", [])


async def ten_thousand_left(sock: socket.socket, job: Job) -> float:
    begin = clock()
    for left in range(job.size, 0, -253):
        await send_fds(sock, [0] * min(253, left))
    await receive(sock)
    return clock() - begin


async def ten_thousand_right(sock: socket.socket, job: Job) -> None:
    left = job.size
    while left:
        fds = await receive_fds(sock)
        left -= len(fds)
        close_each(fds)
    await send(sock, b"x", [])


async def send_credentials(sock: socket.socket) -> None:
    ids = struct.pack("iII", os.getpid(), os.geteuid(), os.getegid())
    await send(sock, b"\0", [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, ids)])


async def receive_credentials(sock: socket.socket) -> tuple[Any, ...]:
    if sock.getsockopt(socket.SOL_SOCKET, SO_PASSCRED):
        raise ValueError("on already")
    sock.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
    try:
        _, messages, _, _ = await receive(sock)
    finally:
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 0)
    return struct.unpack("iII", messages[0][2])


async def credentials_left(sock: socket.socket, job: Job) -> float:
    begin = clock()
    for _ in range(job.count):
        await send_credentials(sock)
        await receive_credentials(sock)
    return clock() - begin


async def credentials_right(sock: socket.socket, job: Job) -> None:
    for _ in range(job.count):
        await receive_credentials(sock)
        await send_credentials(sock)


async def message_left(sock: socket.socket, job: Job) -> float:
    data = job.payload()
    begin = clock()
    for _ in range(job.count):
        await send_fds(sock, [0, 0], data)
        close_each(await receive_fds(sock, 65536))
    return clock() - begin


async def message_right(sock: socket.socket, job: Job) -> None:
    data = job.payload()
    for _ in range(job.count):
        fds = await receive_fds(sock, 65536)
        await send_fds(sock, [0, 0], data)
        close_each(fds)


def open_stream(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


async def receive_exactly(stream: trio.SocketStream, size: int) -> None:
    while size:
        size -= len(await stream.receive_some(min(size, 65536)))


async def bytes_left(stream: trio.SocketStream, job: Job) -> float:
    data = job.payload()
    begin = clock()
    for _ in range(job.count):
        await stream.send_all(data)
        await receive_exactly(stream, job.size)
    return clock() - begin


async def bytes_right(stream: trio.SocketStream, job: Job) -> None:
    data = job.payload()
    for _ in range(job.count):
        await receive_exactly(stream, job.size)
        await stream.send_all(data)


async def buffer_left(stream: trio.SocketStream, job: Job) -> float:
    data = job.payload()
    begin = clock()
    for _ in range(job.count):
        await stream.send_all(data)
        await stream.receive_some(1)
    return clock() - begin


async def buffer_right(stream: trio.SocketStream, job: Job) -> None:
    for _ in range(job.count):
        await receive_exactly(stream, job.size)
        await stream.send_all(b"x")


async def accept_left(stream: trio.SocketStream, job: Job) -> float:
    await stream.receive_some(1)
    path = job.path + "/accept"
    begin = clock()
    for _ in range(job.count):
        async with await trio.open_unix_socket(path) as client:
            await client.receive_some(1)
    return clock() - begin


async def accept_right(stream: trio.SocketStream, job: Job) -> None:
    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.bind(job.path + "/accept")
    sock.listen()
    async with trio.SocketListener(sock) as listener:
        await stream.send_all(b"x")
        for _ in range(job.count):
            async with await listener.accept() as client:
                if is_same_user(client):
                    await client.send_all(b"x")
    os.unlink(job.path + "/accept")


async def with_idle(stream: trio.SocketStream, job: Job, play: Callable[..., Any]) -> Any:
    """Play ping-pong while other connections wait to receive."""
    streams = [open_stream(sock) for sock in crowd(job)]
    async with trio.open_nursery() as nursery:
        for each in streams:
            nursery.start_soon(each.receive_some, 1)
        await trio.testing.wait_all_tasks_blocked()
        # The other side may still be busy with its idle ones.
        await play(stream, Job(100, 64))
        answer = await play(stream, Job(job.count, 64))
        nursery.cancel_scope.cancel()
    disperse(job)
    for each in streams:
        await each.aclose()
    return answer


async def idle_left(stream: trio.SocketStream, job: Job) -> Any:
    return await with_idle(stream, job, bytes_left)


async def idle_right(stream: trio.SocketStream, job: Job) -> None:
    await with_idle(stream, job, bytes_right)


async def received_once(socks: list[socket.socket]) -> list[Any]:
    streams = [open_stream(sock) for sock in socks]
    for stream in streams:
        await stream.receive_some(1)
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

    return trio.run(main)


if __name__ == "__main__":
    serve(
        {
            "one descriptor, ping-pong": {"": pair(fd_left, fd_right)},
            "one descriptor a message, one way": {"": pair(one_way_left, one_way_right)},
            "many descriptors a message, one way": {"": pair(one_way_left, one_way_right)},
            "ten thousand descriptors": {"": pair(ten_thousand_left, ten_thousand_right)},
            "credentials, ping-pong": {"": pair(credentials_left, credentials_right)},
            "1 KiB and 2 descriptors, ping-pong": {"": pair(message_left, message_right)},
            "bytes, ping-pong": {"trio.SocketStream": pair(bytes_left, bytes_right, open_stream)},
            "a large buffer": {"trio.SocketStream": pair(buffer_left, buffer_right, open_stream)},
            "accept and check credentials": {
                "trio.SocketListener": pair(accept_left, accept_right, open_stream)
            },
            "bytes, others idle": {"trio.SocketStream": pair(idle_left, idle_right, open_stream)},
        },
        memory,
        "trio.SocketStream",
    )
