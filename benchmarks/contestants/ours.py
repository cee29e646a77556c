"""This library."""

from __future__ import annotations

import os
import tempfile
from functools import partial

import trio
from common import Job, clock, end_of, resident, serve

from trio_unixconn import (
    Cancellable,
    PeerPolicy,
    UnixConnection,
    connection_pair,
    open_callback_adapter,
    open_unix_connection,
    open_unix_listener,
)


def pair(left, right):
    """Make two functions that run in a trio run of their own from two async ones."""

    def on(side, fd, job):
        async def main():
            async with UnixConnection.from_stdlib_socket(end_of(fd)) as conn:
                return await side(conn, job)

        return trio.run(main)

    return partial(on, left), partial(on, right)


async def fd_left(conn, job):
    begin = clock()
    for _ in range(job.count):
        await conn.send_fd(0)
        os.close(await conn.receive_fd())
    return clock() - begin


async def fd_right(conn, job):
    for _ in range(job.count):
        fd = await conn.receive_fd()
        await conn.send_fd(0)
        os.close(fd)


async def cancellable_left(conn, job):
    cancellable = Cancellable()
    begin = clock()
    for _ in range(job.count):
        await conn.send_fd(0, cancellable)
        os.close(await conn.receive_fd(cancellable))
    return clock() - begin


async def cancellable_right(conn, job):
    cancellable = Cancellable()
    for _ in range(job.count):
        fd = await conn.receive_fd(cancellable)
        await conn.send_fd(0, cancellable)
        os.close(fd)


async def callback(conn, job, *, begins):
    """Play ping-pong by callbacks only."""
    left = job.count
    done = trio.Event()
    async with open_callback_adapter() as adapter:
        gio = adapter.wrap(conn)

        def sent(source, result):
            nonlocal left
            source.send_fd_finish(result)
            if not begins:
                left -= 1
            if left:
                source.receive_fd_async(None, received)
            else:
                done.set()

        def received(source, result):
            nonlocal left
            os.close(source.receive_fd_finish(result))
            if begins:
                left -= 1
            if left or not begins:
                source.send_fd_async(0, None, sent)
            else:
                done.set()

        begin = clock()
        if begins:
            gio.send_fd_async(0, None, sent)
        else:
            gio.receive_fd_async(None, received)
        await done.wait()
        return clock() - begin if begins else None


async def one_way_left(conn, job):
    begin = clock()
    for _ in range(job.count):
        await conn.send_fd(0)
    await conn.receive_some(1)
    return clock() - begin


async def one_way_right(conn, job):
    for _ in range(job.count):
        os.close(await conn.receive_fd())
    await conn.send_all(b"x")


async def stream_right(conn, job):
    left = job.count
    async for fd in conn.fds():
        os.close(fd)
        left -= 1
        if not left:
            break
    await conn.send_all(b"x")


async def burst_left(conn, job):
    begin = clock()
    await conn.send_fds([0] * job.count, per_message=1)
    await conn.receive_some(1)
    return clock() - begin


async def many_left(conn, job):
    fds = [0] * job.size
    begin = clock()
    for _ in range(job.count):
        await conn.send_fds(fds)
    await conn.receive_some(1)
    return clock() - begin


async def many_right(conn, job):
    for _ in range(job.count):
        with await conn.receive_fds(job.size):
            pass
    await conn.send_all(b"x")


async def ten_thousand_left(conn, job):
    begin = clock()
    await conn.send_fds([0] * job.size)
    await conn.receive_some(1)
    return clock() - begin


async def ten_thousand_right(conn, job):
    left = job.size
    while left:
        with await conn.receive_fds(min(left, 253)) as fds:
            left -= len(fds)
    await conn.send_all(b"x")


async def credentials_left(conn, job):
    begin = clock()
    for _ in range(job.count):
        await conn.send_credentials()
        await conn.receive_credentials()
    return clock() - begin


async def credentials_right(conn, job):
    for _ in range(job.count):
        await conn.receive_credentials()
        await conn.send_credentials()


async def message_left(conn, job):
    data = job.payload()
    begin = clock()
    for _ in range(job.count):
        await conn.send_message(data, fds=[0, 0])
        (await conn.receive_message(65536)).close()
    return clock() - begin


async def message_right(conn, job):
    data = job.payload()
    for _ in range(job.count):
        with await conn.receive_message(65536):
            await conn.send_message(data, fds=[0, 0])


async def receive_exactly(conn, size):
    while size:
        size -= len(await conn.receive_some(min(size, 65536)))


async def bytes_left(conn, job):
    data = job.payload()
    begin = clock()
    for _ in range(job.count):
        await conn.send_all(data)
        await receive_exactly(conn, job.size)
    return clock() - begin


async def bytes_right(conn, job):
    data = job.payload()
    for _ in range(job.count):
        await receive_exactly(conn, job.size)
        await conn.send_all(data)


async def buffer_left(conn, job):
    # The memory is there already, and full: what is measured is handing it over.
    memory = os.memfd_create("benchmark", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(memory, job.size)
        begin = clock()
        await conn.send_buffer(memory)
        await conn.receive_some(1)
        return clock() - begin
    finally:
        os.close(memory)


async def buffer_right(conn, job):
    view = await conn.receive_buffer(job.size)
    if len(view) != job.size or view[0] or view[-1]:
        raise ValueError(len(view))
    await conn.send_all(b"x")


async def raw_left(conn, job):
    data = memoryview(bytearray(job.size))
    begin = clock()
    await conn.send_all(data)
    await conn.receive_some(1)
    return clock() - begin


async def raw_right(conn, job):
    await receive_exactly(conn, job.size)
    await conn.send_all(b"x")


async def accept_left(conn, job):
    await conn.receive_some(1)
    path = job.path + "/accept"
    begin = clock()
    for _ in range(job.count):
        async with await open_unix_connection(path) as client:
            await client.receive_some(1)
    return clock() - begin


async def accept_right(conn, job):
    policy = PeerPolicy.same_user()
    async with await open_unix_listener(job.path + "/accept", policy=policy) as listener:
        await conn.send_all(b"x")
        for _ in range(job.count):
            async with await listener.accept() as client:
                await client.send_all(b"x")


async def idle_left(conn, job):
    return await with_idle(conn, job, bytes_left)


async def idle_right(conn, job):
    return await with_idle(conn, job, bytes_right)


async def with_idle(conn, job, play):
    """Play ping-pong while other connections wait to receive."""
    others = [connection_pair() for _ in range(job.size)]
    before = resident()
    async with trio.open_nursery() as nursery:
        for _, two in others:
            nursery.start_soon(two.receive_fd)
        await trio.testing.wait_all_tasks_blocked()
        await play(conn, Job(100, 64))
        answer = await play(conn, Job(job.count, 64))
        nursery.cancel_scope.cancel()
    del before
    for one, two in others:
        await one.aclose()
        await two.aclose()
    return answer


def memory(_, job):
    """Say how much memory an idle connection takes."""

    async def main():
        import socket

        socks = [socket.socketpair() for _ in range(job.size)]
        before = resident()
        conns = [UnixConnection.from_stdlib_socket(one) for one, _ in socks]
        used = resident() - before
        for conn in conns:
            await conn.aclose()
        for _, two in socks:
            two.close()
        return {"bytes": used / job.size}

    return trio.run(main)


if __name__ == "__main__":
    import trio.testing

    serve(
        {
            "one descriptor, ping-pong": {
                "": pair(fd_left, fd_right),
                "with a Cancellable": pair(cancellable_left, cancellable_right),
                "callbacks": pair(
                    partial(callback, begins=True), partial(callback, begins=False)
                ),
            },
            "one descriptor a message, one way": {
                "": pair(one_way_left, one_way_right),
                "fds()": pair(one_way_left, stream_right),
                "send_fds(per_message=1), fds()": pair(burst_left, stream_right),
            },
            "many descriptors a message, one way": {"": pair(many_left, many_right)},
            "ten thousand descriptors": {"": pair(ten_thousand_left, ten_thousand_right)},
            "credentials, ping-pong": {"": pair(credentials_left, credentials_right)},
            "1 KiB and 2 descriptors, ping-pong": {"": pair(message_left, message_right)},
            "bytes, ping-pong": {"": pair(bytes_left, bytes_right)},
            "a large buffer": {
                "send_buffer": pair(buffer_left, buffer_right),
                "the bytes": pair(raw_left, raw_right),
            },
            "accept and check credentials": {"": pair(accept_left, accept_right)},
            "bytes, others idle": {"": pair(idle_left, idle_right)},
            "memory of an idle connection": {"": (lambda *_: 0.0, memory)},
        }
    )
