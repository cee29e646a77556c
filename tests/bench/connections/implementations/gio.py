"""The real GLib, through PyGObject: the blocking calls of Gio.UnixConnection.

It runs under the system's Python, which has PyGObject.
"""

from __future__ import annotations

import ctypes
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import gi

gi.require_version("Gio", "2.0")
from gi.repository import Gio, GLib

from .common import Job, Side, both, clock, end_of, serve

if TYPE_CHECKING:
    from collections.abc import Callable

try:
    # GLib 2.80 and later name this class so, and warn about the old name.
    gi.require_version("GioUnix", "2.0")
    from gi.repository import GioUnix

    FDMessage = GioUnix.FDMessage
except (ValueError, ImportError, AttributeError):
    FDMessage = Gio.UnixFDMessage


def pair(left: Callable[[Any, Job], Any], right: Callable[[Any, Job], Any]) -> tuple[Side, Side]:
    """Make the two sides from functions that get a Gio.UnixConnection."""

    def run(do: Any, meet: Any, fd: int, job: Job) -> Any:
        connection = Gio.Socket.new_from_fd(
            end_of(fd).detach()
        ).connection_factory_create_connection()
        try:
            meet(fd)
            return do(connection, job)
        finally:
            connection.close(None)

    return both(run, left, right)


def vector_of(kind: Any, buffer: Any, size: int) -> Any:
    """Return the vectors of a Gio.Socket message."""
    vector = kind()
    vector.buffer = ctypes.addressof(buffer)
    vector.size = size
    return vector


def send_fds(sock: Any, vectors: list[Any], fds: list[int]) -> None:
    message = FDMessage.new()
    for fd in fds:
        # In GLib 2.84 these are functions of the class, and not methods of its instances.
        FDMessage.append_fd(message, fd)
    sock.send_message(None, vectors, [message], 0, None)


def receive_fds(sock: Any, vectors: list[Any]) -> list[int]:
    _, _, messages, _ = sock.receive_message(vectors, 0, None)
    return [fd for message in messages for fd in FDMessage.steal_fds(message)]


def close_each(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def write(connection: Any, data: bytes) -> None:
    connection.get_output_stream().write_all(data, None)


def read(connection: Any, size: int) -> None:
    stream = connection.get_input_stream()
    while size:
        more = stream.read_bytes(min(size, 65536), None).get_size()
        if not more:
            raise EOFError
        size -= more


def fd_left(connection: Any, job: Job) -> float:
    begin = clock()
    for _ in range(job.count):
        connection.send_fd(0, None)
        os.close(connection.receive_fd(None))
    return clock() - begin


def fd_right(connection: Any, job: Job) -> None:
    for _ in range(job.count):
        fd = connection.receive_fd(None)
        connection.send_fd(0, None)
        os.close(fd)


def main_loop(connection: Any, job: Job, *, begins: bool) -> float:
    """Play ping-pong from a main loop, as a program with other tasks does.

    Gio has no send_fd_async or receive_fd_async: the main loop watches the socket.
    """
    loop = GLib.MainLoop()
    left = job.count

    def readable(_: int, __: GLib.IOCondition) -> bool:
        nonlocal left
        fd = connection.receive_fd(None)
        left -= 1
        if left or not begins:
            connection.send_fd(0, None)
        os.close(fd)
        if not left:
            loop.quit()
        return bool(left)

    watched = connection.get_socket().get_fd()
    GLib.unix_fd_add_full(GLib.PRIORITY_DEFAULT, watched, GLib.IOCondition.IN, readable)
    begin = clock()
    if begins:
        connection.send_fd(0, None)
    loop.run()
    return clock() - begin


def one_way_left(connection: Any, job: Job) -> float:
    begin = clock()
    for _ in range(job.count):
        connection.send_fd(0, None)
    read(connection, 1)
    return clock() - begin


def one_way_right(connection: Any, job: Job) -> None:
    for _ in range(job.count):
        os.close(connection.receive_fd(None))
    write(connection, b"x")


def many_left(connection: Any, job: Job) -> float:
    sock = connection.get_socket()
    byte = ctypes.create_string_buffer(1)
    vectors = [vector_of(Gio.OutputVector, byte, 1)]
    fds = [0] * job.size
    begin = clock()
    for _ in range(job.count):
        send_fds(sock, vectors, fds)
    read(connection, 1)
    return clock() - begin


def many_right(connection: Any, job: Job) -> None:
    sock = connection.get_socket()
    byte = ctypes.create_string_buffer(1)
    vectors = [vector_of(Gio.InputVector, byte, 1)]
    for _ in range(job.count):
        close_each(receive_fds(sock, vectors))
    write(connection, b"x")


def ten_thousand_left(connection: Any, job: Job) -> float:
    sock = connection.get_socket()
    byte = ctypes.create_string_buffer(1)
    vectors = [vector_of(Gio.OutputVector, byte, 1)]
    begin = clock()
    for left in range(job.size, 0, -253):
        send_fds(sock, vectors, [0] * min(253, left))
    read(connection, 1)
    return clock() - begin


def ten_thousand_right(connection: Any, job: Job) -> None:
    sock = connection.get_socket()
    byte = ctypes.create_string_buffer(1)
    vectors = [vector_of(Gio.InputVector, byte, 1)]
    left = job.size
    while left:
        fds = receive_fds(sock, vectors)
        left -= len(fds)
        close_each(fds)
    write(connection, b"x")


def credentials_left(connection: Any, job: Job) -> float:
    begin = clock()
    for _ in range(job.count):
        connection.send_credentials(None)
        connection.receive_credentials(None)
    return clock() - begin


def credentials_right(connection: Any, job: Job) -> None:
    for _ in range(job.count):
        connection.receive_credentials(None)
        connection.send_credentials(None)


def message_left(connection: Any, job: Job) -> float:
    sock = connection.get_socket()
    data = ctypes.create_string_buffer(job.payload(), job.size)
    room = ctypes.create_string_buffer(65536)
    sent = [vector_of(Gio.OutputVector, data, job.size)]
    received = [vector_of(Gio.InputVector, room, 65536)]
    begin = clock()
    for _ in range(job.count):
        send_fds(sock, sent, [0, 0])
        close_each(receive_fds(sock, received))
    return clock() - begin


def message_right(connection: Any, job: Job) -> None:
    sock = connection.get_socket()
    data = ctypes.create_string_buffer(job.payload(), job.size)
    room = ctypes.create_string_buffer(65536)
    sent = [vector_of(Gio.OutputVector, data, job.size)]
    received = [vector_of(Gio.InputVector, room, 65536)]
    for _ in range(job.count):
        fds = receive_fds(sock, received)
        send_fds(sock, sent, [0, 0])
        close_each(fds)


def bytes_left(connection: Any, job: Job) -> float:
    data = job.payload()
    begin = clock()
    for _ in range(job.count):
        write(connection, data)
        read(connection, job.size)
    return clock() - begin


def bytes_right(connection: Any, job: Job) -> None:
    data = job.payload()
    for _ in range(job.count):
        read(connection, job.size)
        write(connection, data)


def buffer_left(connection: Any, job: Job) -> float:
    data = job.payload()
    begin = clock()
    for _ in range(job.count):
        write(connection, data)
        read(connection, 1)
    return clock() - begin


def buffer_right(connection: Any, job: Job) -> None:
    for _ in range(job.count):
        read(connection, job.size)
        write(connection, b"x")


def accept_left(connection: Any, job: Job) -> float:
    read(connection, 1)
    client = Gio.SocketClient.new()
    address = Gio.UnixSocketAddress.new(job.path + "/accept")
    begin = clock()
    for _ in range(job.count):
        made = client.connect(address, None)
        read(made, 1)
        made.close(None)
    return clock() - begin


def accept_right(connection: Any, job: Job) -> None:
    listener = Gio.SocketListener.new()
    address = Gio.UnixSocketAddress.new(job.path + "/accept")
    listener.add_address(address, Gio.SocketType.STREAM, Gio.SocketProtocol.DEFAULT, None)
    write(connection, b"x")
    for _ in range(job.count):
        made, _ = listener.accept(None)
        if made.get_socket().get_credentials().get_unix_user() == os.geteuid():
            write(made, b"x")
        made.close(None)
    listener.close()
    os.unlink(job.path + "/accept")


if __name__ == "__main__":
    # The descriptors that Gio duplicates belong to it; GLib's own messages say what went wrong.
    GLib.set_prgname("gio.py")
    serve(
        {
            "one descriptor, ping-pong": {
                "": pair(fd_left, fd_right),
                "main loop": pair(
                    partial(main_loop, begins=True), partial(main_loop, begins=False)
                ),
            },
            "one descriptor a message, one way": {"": pair(one_way_left, one_way_right)},
            "many descriptors a message, one way": {"": pair(many_left, many_right)},
            "ten thousand descriptors": {"": pair(ten_thousand_left, ten_thousand_right)},
            "credentials, ping-pong": {"": pair(credentials_left, credentials_right)},
            "1 KiB and 2 descriptors, ping-pong": {"": pair(message_left, message_right)},
            "bytes, ping-pong": {"": pair(bytes_left, bytes_right)},
            "a large buffer": {"the bytes": pair(buffer_left, buffer_right)},
            "accept and check credentials": {"": pair(accept_left, accept_right)},
        }
    )
