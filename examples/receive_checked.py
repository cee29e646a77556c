"""Receive a file, a socket and a stream; what is something else is refused and closed.

Run it with ``python examples/receive_checked.py``.
"""

import os
import socket
import tempfile

import trio

from trio_unixconn import DescriptorKind, UnixConnection, WrongDescriptorKindError, connection_pair


async def receive(conn: UnixConnection) -> None:
    with await conn.receive_file() as file:
        print("a file:", file.read())

    try:
        await conn.receive_file()
    except WrongDescriptorKindError as exc:
        print("refused:", exc, exc.kind)

    with await conn.receive_file(kinds=[DescriptorKind.PIPE]) as pipe:
        print("a pipe, which was allowed:", pipe.read())

    with await conn.receive_socket() as sock:
        print("a socket:", sock.family.name, sock.type.name)

    async with await conn.receive_stream() as stream:
        print("a stream:", await stream.receive_some())


async def main() -> None:
    here, there = connection_pair()
    async with here, there, trio.open_nursery() as nursery:
        nursery.start_soon(receive, there)
        with tempfile.TemporaryFile() as file:
            file.write(b"some text")
            file.seek(0)
            await here.send_fd(file)
        reader, writer = os.pipe()
        await here.send_fds([reader, reader], per_message=1)
        os.write(writer, b"from the pipe")
        os.close(reader)
        os.close(writer)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            await here.send_fd(sock)
        one, two = socket.socketpair()
        with one, two:
            await here.send_fd(one)
            two.send(b"hello")


trio.run(main)
