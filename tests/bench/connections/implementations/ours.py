"""This library."""

from __future__ import annotations

import array
import fcntl
import os
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import trio
import trio.testing

from trio_unixconn import (
    AsyncResult,
    CallbackConnection,
    Cancellable,
    PeerPolicy,
    UnixConnection,
    open_callback_adapter,
    open_unix_connection,
    open_unix_listener,
)

from .common import (
    Job,
    Side,
    await_greeting,
    both,
    clock,
    crowd,
    disperse,
    end_of,
    filled_memory,
    readable_once,
    resident,
    serve,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def pair(
    left: Callable[[UnixConnection, Job], Any], right: Callable[[UnixConnection, Job], Any]
) -> tuple[Side, Side]:
    """Make the two sides from async functions that get a connection."""
    return both(run, left, right)


def run(do: Any, meet: Any, fd: int, job: Job) -> Any:
    """Run one side in a trio run of its own."""

    async def main() -> Any:
        async with UnixConnection.from_stdlib_socket(end_of(fd)) as conn:
            meet(fd)
            return await do(conn, job)

    return trio.run(main)


async def fd_left(conn: UnixConnection, job: Job) -> float:
    begin = clock()
    for _ in range(job.count):
        await conn.send_fd(0)
        os.close(await conn.receive_fd())
    return clock() - begin


async def fd_right(conn: UnixConnection, job: Job) -> None:
    for _ in range(job.count):
        fd = await conn.receive_fd()
        await conn.send_fd(0)
        os.close(fd)


async def cancellable_left(conn: UnixConnection, job: Job) -> float:
    cancellable = Cancellable()
    begin = clock()
    for _ in range(job.count):
        await conn.send_fd(0, cancellable)
        os.close(await conn.receive_fd(cancellable))
    return clock() - begin


async def cancellable_right(conn: UnixConnection, job: Job) -> None:
    cancellable = Cancellable()
    for _ in range(job.count):
        fd = await conn.receive_fd(cancellable)
        await conn.send_fd(0, cancellable)
        os.close(fd)


async def callback(conn: UnixConnection, job: Job, *, begins: bool) -> float:
    """Play ping-pong by callbacks only."""
    left = job.count
    done = trio.Event()

    def sent(source: CallbackConnection, result: AsyncResult) -> None:
        nonlocal left
        source.send_fd_finish(result)
        left -= not begins
        if left:
            source.receive_fd_async(None, received)
        else:
            done.set()

    def received(source: CallbackConnection, result: AsyncResult) -> None:
        nonlocal left
        os.close(source.receive_fd_finish(result))
        left -= begins
        if left:
            source.send_fd_async(0, None, sent)
        else:
            done.set()

    async with open_callback_adapter() as adapter:
        wrapped = adapter.wrap(conn)
        begin = clock()
        if begins:
            wrapped.send_fd_async(0, None, sent)
        else:
            wrapped.receive_fd_async(None, received)
        await done.wait()
        return clock() - begin


async def one_way_left(conn: UnixConnection, job: Job) -> float:
    begin = clock()
    for _ in range(job.count):
        await conn.send_fd(0)
    await conn.receive_some(1)
    return clock() - begin


async def one_way_right(conn: UnixConnection, job: Job) -> None:
    for _ in range(job.count):
        os.close(await conn.receive_fd())
    await conn.send_all(b"x")


async def stream_right(conn: UnixConnection, job: Job) -> None:
    left = job.count
    async for fd in conn.fds():
        os.close(fd)
        left -= 1
        if not left:
            break
    await conn.send_all(b"x")


def blocking_left(fd: int, job: Job) -> float:
    """Send from a blocking socket of the standard library: only the receiver is ours."""
    messages = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))]
    with end_of(fd) as sock:
        sock.setblocking(True)
        await_greeting(fd)
        begin = clock()
        for _ in range(job.count):
            sock.sendmsg([b"\0"], messages)
        sock.recv(1)
        return clock() - begin


async def burst_left(conn: UnixConnection, job: Job) -> float:
    begin = clock()
    await conn.send_fds([0] * job.count, per_message=1)
    await conn.receive_some(1)
    return clock() - begin


async def many_left(conn: UnixConnection, job: Job) -> float:
    fds = [0] * job.size
    begin = clock()
    for _ in range(job.count):
        await conn.send_fds(fds)
    await conn.receive_some(1)
    return clock() - begin


async def many_right(conn: UnixConnection, job: Job) -> None:
    for _ in range(job.count):
        with await conn.receive_fds(job.size):
            pass
    await conn.send_all(b"x")


async def ten_thousand_left(conn: UnixConnection, job: Job) -> float:
    begin = clock()
    await conn.send_fds([0] * job.size)
    await conn.receive_some(1)
    return clock() - begin


async def ten_thousand_right(conn: UnixConnection, job: Job) -> None:
    left = job.size
    while left:
        with await conn.receive_fds(min(left, 253)) as fds:
            left -= len(fds)
    await conn.send_all(b"x")


async def credentials_left(conn: UnixConnection, job: Job) -> float:
    begin = clock()
    for _ in range(job.count):
        await conn.send_credentials()
        await conn.receive_credentials()
    return clock() - begin


async def credentials_right(conn: UnixConnection, job: Job) -> None:
    for _ in range(job.count):
        await conn.receive_credentials()
        await conn.send_credentials()


async def message_left(conn: UnixConnection, job: Job) -> float:
    data = job.payload()
    begin = clock()
    for _ in range(job.count):
        await conn.send_message(data, fds=[0, 0])
        (await conn.receive_message(65536)).close()
    return clock() - begin


async def message_right(conn: UnixConnection, job: Job) -> None:
    data = job.payload()
    for _ in range(job.count):
        with await conn.receive_message(65536):
            await conn.send_message(data, fds=[0, 0])


async def receive_exactly(conn: UnixConnection, size: int) -> None:
    while size:
        size -= len(await conn.receive_some(min(size, 65536)))


async def bytes_left(conn: UnixConnection, job: Job) -> float:
    data = job.payload()
    begin = clock()
    for _ in range(job.count):
        await conn.send_all(data)
        await receive_exactly(conn, job.size)
    return clock() - begin


async def bytes_right(conn: UnixConnection, job: Job) -> None:
    data = job.payload()
    for _ in range(job.count):
        await receive_exactly(conn, job.size)
        await conn.send_all(data)


async def buffer_left(conn: UnixConnection, job: Job, *, sealed: bool) -> float:
    # The memory is there already, and full: what is measured is handing it over.
    memory = filled_memory(job.size)
    try:
        if sealed:
            seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
        begin = clock()
        for _ in range(job.count):
            await conn.send_buffer(memory)
            await conn.receive_some(1)
        return clock() - begin
    finally:
        os.close(memory)


async def buffer_right(conn: UnixConnection, job: Job) -> None:
    for _ in range(job.count):
        view = await conn.receive_buffer(job.size)
        if not len(view) == job.size or view[0] != view[-1]:
            raise ValueError(len(view))
        await conn.send_all(b"x")


async def sent_left(conn: UnixConnection, job: Job) -> float:
    data = job.payload()
    begin = clock()
    for _ in range(job.count):
        await conn.send_all(data)
        await conn.receive_some(1)
    return clock() - begin


async def sent_right(conn: UnixConnection, job: Job) -> None:
    for _ in range(job.count):
        await receive_exactly(conn, job.size)
        await conn.send_all(b"x")


async def accept_left(conn: UnixConnection, job: Job) -> float:
    await conn.receive_some(1)
    path = job.path + "/accept"
    begin = clock()
    for _ in range(job.count):
        async with await open_unix_connection(path) as client:
            await client.receive_some(1)
    return clock() - begin


async def accept_right(conn: UnixConnection, job: Job) -> None:
    policy = PeerPolicy.same_user()
    async with await open_unix_listener(job.path + "/accept", policy=policy) as listener:
        await conn.send_all(b"x")
        for _ in range(job.count):
            async with await listener.accept() as client:
                await client.send_all(b"x")


async def with_idle(conn: UnixConnection, job: Job, play: Callable[..., Any]) -> Any:
    """Play ping-pong while other connections wait to receive."""
    others = [UnixConnection.from_stdlib_socket(sock) for sock in crowd(job)]
    async with trio.open_nursery() as nursery:
        for each in others:
            nursery.start_soon(each.receive_fd)
        await trio.testing.wait_all_tasks_blocked()
        # The other side may still be busy with its idle ones.
        await play(conn, Job(100, 64))
        answer = await play(conn, Job(job.count, 64))
        nursery.cancel_scope.cancel()
    disperse(job)
    for each in others:
        await each.aclose()
    return answer


async def idle_left(conn: UnixConnection, job: Job) -> Any:
    return await with_idle(conn, job, bytes_left)


async def idle_right(conn: UnixConnection, job: Job) -> None:
    await with_idle(conn, job, bytes_right)


async def received_once(socks: list[socket.socket]) -> list[Any]:
    streams = [UnixConnection.from_stdlib_socket(sock) for sock in socks]
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
            "one descriptor, ping-pong": {
                "": pair(fd_left, fd_right),
                "with a Cancellable": pair(cancellable_left, cancellable_right),
                "callbacks": pair(partial(callback, begins=True), partial(callback, begins=False)),
            },
            "one descriptor a message, one way": {
                "": pair(one_way_left, one_way_right),
                "fds()": pair(one_way_left, stream_right),
                "fds() from a blocking sender": (
                    blocking_left,
                    pair(one_way_left, stream_right)[1],
                ),
                "send_fds(per_message=1), fds()": pair(burst_left, stream_right),
            },
            "many descriptors a message, one way": {"": pair(many_left, many_right)},
            "ten thousand descriptors": {"": pair(ten_thousand_left, ten_thousand_right)},
            "credentials, ping-pong": {"": pair(credentials_left, credentials_right)},
            "1 KiB and 2 descriptors, ping-pong": {"": pair(message_left, message_right)},
            "bytes, ping-pong": {"": pair(bytes_left, bytes_right)},
            "a large buffer": {
                "send_buffer": pair(partial(buffer_left, sealed=True), buffer_right),
                "send_buffer, sealing it": pair(partial(buffer_left, sealed=False), buffer_right),
                "the bytes": pair(sent_left, sent_right),
            },
            "accept and check credentials": {"": pair(accept_left, accept_right)},
            "bytes, others idle": {"": pair(idle_left, idle_right)},
        },
        memory,
    )
