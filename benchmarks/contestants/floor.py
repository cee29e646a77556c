"""The least that trio can do: raw sendmsg and recvmsg, and wait_readable; and trio's streams."""

from __future__ import annotations

import array
import os
import socket
import struct
from functools import partial

import trio
import trio.testing
from common import Job, clock, end_of, resident, serve

ROOM = socket.CMSG_SPACE(253 * 4)
FLAGS = socket.MSG_CMSG_CLOEXEC
SO_PASSCRED = 16


def pair(left, right, wrap=lambda sock: sock):
    def on(side, fd, job):
        async def main():
            with end_of(fd) as sock:
                sock.setblocking(False)
                return await side(wrap(sock), job)

        return trio.run(main)

    return partial(on, left), partial(on, right)


async def send(sock, data, messages):
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


async def receive(sock, size=1):
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


async def send_fds(sock, fds, data=b"\0"):
    await send(sock, data, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


async def receive_fds(sock, size=1):
    data, messages, flags, _ = await receive(sock, size)
    fds = array.array("i")
    for level, kind, payload in messages:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload)
    if not data or flags & socket.MSG_CTRUNC:
        raise EOFError
    return fds


def close_each(fds):
    for fd in fds:
        os.close(fd)


async def fd_left(sock, job):
    begin = clock()
    for _ in range(job.count):
        await send_fds(sock, [0])
        close_each(await receive_fds(sock))
    return clock() - begin


async def fd_right(sock, job):
    for _ in range(job.count):
        fds = await receive_fds(sock)
        await send_fds(sock, [0])
        close_each(fds)


async def one_way_left(sock, job):
    fds = [0] * job.size
    begin = clock()
    for _ in range(job.count):
        await send_fds(sock, fds)
    await receive(sock)
    return clock() - begin


async def one_way_right(sock, job):
    for _ in range(job.count):
        close_each(await receive_fds(sock))
    await send(sock, b"x", [])


async def send_credentials(sock):
    ids = struct.pack("iII", os.getpid(), os.geteuid(), os.getegid())
    await send(sock, b"\0", [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, ids)])


async def receive_credentials(sock):
    if sock.getsockopt(socket.SOL_SOCKET, SO_PASSCRED):
        raise ValueError("on already")
    sock.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
    try:
        _, messages, _, _ = await receive(sock)
    finally:
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 0)
    return struct.unpack("iII", messages[0][2])


async def credentials_left(sock, job):
    begin = clock()
    for _ in range(job.count):
        await send_credentials(sock)
        await receive_credentials(sock)
    return clock() - begin


async def credentials_right(sock, job):
    for _ in range(job.count):
        await receive_credentials(sock)
        await send_credentials(sock)


async def message_left(sock, job):
    data = job.payload()
    begin = clock()
    for _ in range(job.count):
        await send_fds(sock, [0, 0], data)
        close_each(await receive_fds(sock, 65536))
    return clock() - begin


async def message_right(sock, job):
    data = job.payload()
    for _ in range(job.count):
        fds = await receive_fds(sock, 65536)
        await send_fds(sock, [0, 0], data)
        close_each(fds)


def stream_of(sock):
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


async def receive_exactly(stream, size):
    while size:
        size -= len(await stream.receive_some(min(size, 65536)))


async def bytes_left(stream, job):
    data = job.payload()
    begin = clock()
    for _ in range(job.count):
        await stream.send_all(data)
        await receive_exactly(stream, job.size)
    return clock() - begin


async def bytes_right(stream, job):
    data = job.payload()
    for _ in range(job.count):
        await receive_exactly(stream, job.size)
        await stream.send_all(data)


async def raw_left(stream, job):
    data = memoryview(bytearray(job.size))
    begin = clock()
    await stream.send_all(data)
    await stream.receive_some(1)
    return clock() - begin


async def raw_right(stream, job):
    await receive_exactly(stream, job.size)
    await stream.send_all(b"x")


async def accept_left(stream, job):
    await stream.receive_some(1)
    path = job.path + "/accept"
    begin = clock()
    for _ in range(job.count):
        async with await trio.open_unix_socket(path) as client:
            await client.receive_some(1)
    return clock() - begin


async def accept_right(stream, job):
    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.bind(job.path + "/accept")
    sock.listen()
    async with trio.SocketListener(sock) as listener:
        await stream.send_all(b"x")
        for _ in range(job.count):
            async with await listener.accept() as client:
                peer = client.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                if struct.unpack("iII", peer)[1] == os.geteuid():
                    await client.send_all(b"x")
    os.unlink(job.path + "/accept")


async def with_idle(stream, job, play):
    others = [socket.socketpair() for _ in range(job.size)]
    streams = [stream_of(two) for _, two in others]
    async with trio.open_nursery() as nursery:
        for each in streams:
            nursery.start_soon(each.receive_some, 1)
        await trio.testing.wait_all_tasks_blocked()
        await play(stream, Job(100, 64))
        answer = await play(stream, Job(job.count, 64))
        nursery.cancel_scope.cancel()
    for each in streams:
        await each.aclose()
    for one, _ in others:
        one.close()
    return answer


async def idle_left(stream, job):
    return await with_idle(stream, job, bytes_left)


async def idle_right(stream, job):
    return await with_idle(stream, job, bytes_right)


def memory(_, job):
    async def main():
        socks = [socket.socketpair() for _ in range(job.size)]
        before = resident()
        streams = [stream_of(one) for one, _ in socks]
        used = resident() - before
        for stream in streams:
            await stream.aclose()
        for _, two in socks:
            two.close()
        return {"bytes": used / job.size}

    return trio.run(main)


if __name__ == "__main__":
    serve(
        {
            "one descriptor, ping-pong": {"": pair(fd_left, fd_right)},
            "one descriptor a message, one way": {"": pair(one_way_left, one_way_right)},
            "many descriptors a message, one way": {"": pair(one_way_left, one_way_right)},
            "credentials, ping-pong": {"": pair(credentials_left, credentials_right)},
            "1 KiB and 2 descriptors, ping-pong": {"": pair(message_left, message_right)},
            "bytes, ping-pong": {"trio.SocketStream": pair(bytes_left, bytes_right, stream_of)},
            "a large buffer": {"trio.SocketStream": pair(raw_left, raw_right, stream_of)},
            "accept and check credentials": {
                "trio.SocketListener": pair(accept_left, accept_right, stream_of)
            },
            "bytes, others idle": {"trio.SocketStream": pair(idle_left, idle_right, stream_of)},
            "memory of an idle connection": {"trio.SocketStream": (lambda *_: 0.0, memory)},
        }
    )
