"""A descriptor through a real D-Bus: jeepney packs the messages, a UnixConnection carries them.

It starts a dbus-daemon of its own, with two clients. One sends the other a method call with the end
of a pipe, which the other writes to. jeepney does no I/O here.

Run it with ``python examples/with_packages/jeepney_bus.py``; it needs jeepney (``pip install
jeepney``) and dbus-daemon (``apt-get install dbus-daemon``).
"""

import array
import os
import subprocess
import tempfile
from functools import partial
from itertools import count

import trio
from jeepney import (
    DBusAddress,
    DBusErrorResponse,
    FileDescriptor,
    HeaderFields,
    Message,
    MessageType,
    Parser,
    message_bus,
    new_error,
    new_method_call,
    new_method_return,
)
from jeepney.auth import BEGIN, Authenticator

from trio_unixconn import EndOfStreamError, UnixConnection, open_unix_connection

CONFIG = """
<busconfig>
  <listen>unix:path={path}</listen>
  <policy context="default">
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
    <allow own="*"/>
  </policy>
</busconfig>
"""
MOST_FDS = 16  # of a message, as the bus allows by default


class Bus:
    """A client of a bus. One task at a time may send, and one may receive."""

    def __init__(self, conn: UnixConnection) -> None:
        self._conn = conn
        self._parser = Parser()
        self._serials = count(1)
        self.name = ""

    async def log_in(self) -> None:
        """Authenticate, which allows descriptors, and get a name."""
        login = Authenticator(enable_fds=True)
        for line in login:
            if line:  # it is empty while the answer is not complete
                await self._conn.send_all(line)
            received = await self._conn.receive_some()
            if not received:
                raise EndOfStreamError("the bus has closed the connection")
            login.feed(received)
        await self._conn.send_all(BEGIN)
        (self.name,) = (await self.call(message_bus.Hello())).body

    async def send(self, message: Message) -> int:
        """Send a message, with the descriptors that are in its body; they stay the caller's.

        If this is cancelled, a part of it may have been sent: close the connection.
        """
        serial, fds = next(self._serials), array.array("i")
        data = message.serialise(serial, fds=fds)
        await self._conn.send_message(data, fds=fds)
        return serial

    async def receive(self) -> Message:
        """Receive a message. The caller closes the descriptors in its body."""
        while (message := self._parser.get_next_message()) is None:
            # No byte of the next message, whose descriptors would arrive with it.
            received = await self._conn.receive_message(
                self._parser.bytes_desired(), max_fds=MOST_FDS
            )
            if not received.data:
                raise EndOfStreamError("the bus has closed the connection")
            fds = [FileDescriptor(fd) for fd in received.fds.steal_fds()]
            self._parser.add_data(received.data, fds)
        return message

    async def call(self, message: Message) -> Message:
        """Call a method, and wait for its answer; other messages are dropped."""
        serial = await self.send(message)
        while True:
            answer = await self.receive()
            if answer.header.fields.get(HeaderFields.reply_serial) == serial:
                if answer.header.message_type is MessageType.error:
                    raise DBusErrorResponse(answer)
                return answer
            drop(answer)


def drop(message: Message) -> None:
    """Close the descriptors of a message; they are arguments of their own, not parts of others."""
    for value in message.body:
        if isinstance(value, FileDescriptor):
            value.close()


async def write_to_pipes(bus: Bus) -> None:
    """Answer method calls: write to the descriptor that arrives."""
    while True:
        message = await bus.receive()
        if message.header.message_type is not MessageType.method_call:
            drop(message)
        elif message.header.fields.get(HeaderFields.signature) != "h":
            drop(message)
            await bus.send(new_error(message, "org.example.Error.ExpectedDescriptor"))
        else:
            (end,) = message.body
            # In a thread, because the caller may have sent a pipe that is full, or any file.
            await trio.to_thread.run_sync(write_and_close, end)
            await bus.send(new_method_return(message, "s", ("written",)))


def write_and_close(end: FileDescriptor) -> None:
    with end.to_file("wb", buffering=0) as file:
        file.write(b"through the bus")


async def ask(caller: Bus, callee: str) -> None:
    """Send the end of a pipe to another client of the bus, and read what that writes."""
    reader, writer = os.pipe()
    to = DBusAddress("/", bus_name=callee, interface="org.example.Pipe")
    try:
        answer = await caller.call(new_method_call(to, "Write", "h", (writer,)))
        print(f"{callee} has answered: {answer.body[0]}")
        print("the pipe has:", os.read(reader, 100).decode())
    finally:
        os.close(reader)
        os.close(writer)


async def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path, config = f"{directory}/bus", f"{directory}/config"
        await trio.Path(config).write_text(CONFIG.format(path=path))
        command = ["dbus-daemon", f"--config-file={config}", "--nofork", "--print-address"]
        run = partial(trio.run_process, command, stdout=subprocess.PIPE, check=False)
        async with trio.open_nursery() as nursery:
            daemon: trio.Process = await nursery.start(run)
            assert daemon.stdout is not None
            await daemon.stdout.receive_some()  # the address: it listens
            async with (
                await open_unix_connection(path) as one,
                await open_unix_connection(path) as two,
            ):
                caller, callee = Bus(one), Bus(two)
                await caller.log_in()
                await callee.log_in()
                nursery.start_soon(write_to_pipes, callee)
                await ask(caller, callee.name)
                nursery.cancel_scope.cancel()  # ends the daemon, too


trio.run(main)
