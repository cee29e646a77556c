"""The real GLib at the other end of a socket: runs the requested calls, and reports their results.

Run as ``/usr/bin/python3 glib_peer.py [FD]``, where FD is a connected Unix socket that this
process inherited. Commands come on stdin, one JSON object a line: ``{"do": name, ...}`` with
the arguments of the method ``do_name`` below. Each is answered on stdout by one line,
``{"result": ...}`` or ``{"error": message, "code": number of GLib's}``. With
``"announce": true`` a line ``{"begun": name}`` comes first, right before the call of GLib,
and with ``"cancelled": true`` GLib is given a Gio.Cancellable that has fired already.
The command ``cancel`` is answered by nothing; it cancels the command sent last.

Commands with a ``form`` do the same thing in two ways: "blocking", and "async", which is
GLib's own ``*_async`` method in a main loop. For descriptors GLib has none; there a main loop
watches the socket, and the operation follows.
"""

from __future__ import annotations

import ctypes
import json
import queue
import sys
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import gi

gi.require_version("Gio", "2.0")
from gi.repository import Gio, GLib
from open_files import described, identity, opened

if TYPE_CHECKING:
    from collections.abc import Callable

try:
    # GLib 2.80 and later name this class so, and warn about the old name.
    gi.require_version("GioUnix", "2.0")
    from gi.repository import GioUnix

    FDMessage = GioUnix.FDMessage
except (ValueError, ImportError, AttributeError):
    FDMessage = Gio.UnixFDMessage


def in_main_loop(begin: Callable[[Callable[..., None]], object]) -> None:
    """Iterate the main context from ``begin(ready)`` until ``ready`` has been called.

    ``ready`` may be called in another thread, even before the first iteration. A wakeup that no
    iteration has seen yet stays; ``MainLoop.quit`` before ``MainLoop.run`` would be lost.
    """
    context = GLib.MainContext.default()
    called = []

    def ready(*_: object) -> None:
        called.append(True)
        context.wakeup()

    begin(ready)
    while not called:
        context.iteration(True)


class Peer:
    """One connection, and a method for each command."""

    def __init__(self) -> None:
        self.connection: Gio.UnixConnection = None
        self.listener: Gio.SocketListener = None
        self.cancellable: Gio.Cancellable = None
        self.announce: Callable[[], None] = lambda: None

    @property
    def socket(self) -> Gio.Socket:
        return self.connection.get_socket()

    ################################################################
    # Getting a connection
    ################################################################

    def inherit(self, fd: int) -> None:
        self.connection = Gio.Socket.new_from_fd(fd).connection_factory_create_connection()

    def do_connect(self, path: str, abstract: bool = False) -> str:
        client = Gio.SocketClient.new()
        kind = Gio.UnixSocketAddressType.ABSTRACT if abstract else Gio.UnixSocketAddressType.PATH
        address = Gio.UnixSocketAddress.new_with_type(path.encode(), kind)
        self.connection = client.connect(address, self.cancellable)
        return type(self.connection).__gtype__.name

    def do_listen(self, path: str, service: bool = False) -> None:
        self.listener = Gio.SocketService.new() if service else Gio.SocketListener.new()
        address = Gio.UnixSocketAddress.new(path)
        self.listener.add_address(address, Gio.SocketType.STREAM, Gio.SocketProtocol.DEFAULT, None)

    def do_accept(self) -> str:
        if isinstance(self.listener, Gio.SocketService):

            def begin(ready: Callable[..., None]) -> None:
                def incoming(_: Gio.SocketService, connection: Any, __: object) -> bool:
                    self.connection = connection
                    ready()
                    return True

                self.listener.connect("incoming", incoming)
                self.listener.start()

            in_main_loop(begin)
            self.listener.stop()
        else:
            self.connection, _ = self.listener.accept(self.cancellable)
        self.listener.close()
        return type(self.connection).__gtype__.name

    ################################################################
    # The operations of GUnixConnection
    ################################################################

    def do_send_fd(
        self, kind: str = "pipe", content: str = "", count: int = 1, form: str = "blocking"
    ) -> list[list[int]]:
        """Send open files, each of which contains ``content`` and its number."""
        sent = []
        for number in range(count):
            with opened(kind, b"%s%d" % (content.encode(), number)) as fd:
                self.watch(form, GLib.IOCondition.OUT)
                self.announce()
                assert self.connection.send_fd(fd, self.cancellable)
                sent.append(identity(fd))
        return sent

    def do_send_closed_fd(self) -> bool:
        with opened("pipe", b"") as fd:
            closed = fd
        return self.connection.send_fd(closed, self.cancellable)

    def do_receive_fd(self, form: str = "blocking") -> Any:
        self.watch(form, GLib.IOCondition.IN)
        self.announce()
        fd = self.connection.receive_fd(self.cancellable)
        if fd == -1:
            return -1
        try:
            return described(fd)
        finally:
            GLib.close(fd)

    def do_send_credentials(self, form: str = "blocking") -> bool:
        self.announce()
        if form == "blocking":
            return self.connection.send_credentials(self.cancellable)
        results = []
        in_main_loop(
            lambda ready: self.connection.send_credentials_async(
                self.cancellable, lambda _, result: ready(results.append(result))
            )
        )
        return self.connection.send_credentials_finish(results[0])

    def do_receive_credentials(self, form: str = "blocking") -> dict[str, Any]:
        self.announce()
        if form == "blocking":
            return as_json(self.connection.receive_credentials(self.cancellable))
        results = []
        in_main_loop(
            lambda ready: self.connection.receive_credentials_async(
                self.cancellable, lambda _, result: ready(results.append(result))
            )
        )
        return as_json(self.connection.receive_credentials_finish(results[0]))

    ################################################################
    # Bytes, and messages of any make
    ################################################################

    def do_write(self, data: str, times: int = 1) -> None:
        stream = self.connection.get_output_stream()
        stream.write_all(bytes.fromhex(data) * times, self.cancellable)

    def do_read(self, size: int) -> str:
        """Read until there are ``size`` bytes, or the end of the stream."""
        stream = self.connection.get_input_stream()
        data = b""
        self.announce()
        while len(data) < size:
            more = stream.read_bytes(size - len(data), self.cancellable).get_data()
            if not more:
                break
            data += more
        return data.hex()

    def do_read_twice(self) -> None:
        """Begin to read while a read is pending; raises what GLib says to the second."""
        stream = self.connection.get_input_stream()
        priority = GLib.PRIORITY_DEFAULT
        first = Gio.Cancellable()
        results = []

        def begin_both(ready: Callable[..., None]) -> None:
            stream.read_bytes_async(1, priority, first, ready)
            stream.read_bytes_async(1, priority, None, second)

        def second(_: object, result: Gio.AsyncResult) -> None:
            results.append(result)
            first.cancel()

        in_main_loop(begin_both)
        stream.read_bytes_finish(results[0])

    def do_send_message(self, data: str, fds: int = 0, credentials: bool = False) -> int:
        """Send one message with any control messages."""
        with ExitStack() as stack:
            messages = []
            if credentials:
                messages.append(Gio.UnixCredentialsMessage.new())
            if fds:
                fd_list = Gio.UnixFDList.new()
                for number in range(fds):
                    fd_list.append(stack.enter_context(opened("pipe", b"%d" % number)))
                messages.append(FDMessage.new_with_fd_list(fd_list))
            buffer = ctypes.create_string_buffer(bytes.fromhex(data))
            vector = Gio.OutputVector()
            vector.buffer = ctypes.addressof(buffer)
            vector.size = len(data) // 2
            return self.socket.send_message(None, [vector], messages, 0, self.cancellable)

    def do_receive_message(self, size: int) -> dict[str, Any]:
        """Receive one message, and report the kinds of its control messages."""
        buffer = ctypes.create_string_buffer(size)
        vector = Gio.InputVector()
        vector.buffer = ctypes.addressof(buffer)
        vector.size = size
        count, _, messages, _ = self.socket.receive_message([vector], 0, self.cancellable)
        fds = [
            fd
            for message in messages
            if isinstance(message, FDMessage)
            # In GLib 2.84 these are functions of the class, and not methods of its instances.
            for fd in FDMessage.steal_fds(message)
        ]
        for fd in fds:
            GLib.close(fd)
        return {
            "data": buffer.raw[:count].hex(),
            "types": [type(message).__gtype__.name for message in messages],
            "fds": len(fds),
        }

    ################################################################
    # Everything else
    ################################################################

    def do_get_credentials(self) -> dict[str, Any]:
        return as_json(self.socket.get_credentials())

    def do_own_credentials(self) -> dict[str, Any]:
        return as_json(Gio.Credentials.new())

    def do_get_remote_path(self) -> str:
        return self.connection.get_remote_address().get_path()

    def do_get_option(self, level: int, option: int) -> int:
        _, value = self.socket.get_option(level, option)
        return value

    def do_set_option(self, level: int, option: int, value: int) -> bool:
        return self.socket.set_option(level, option, value)

    def do_shutdown(self, read: bool = False, write: bool = True) -> bool:
        return self.socket.shutdown(read, write)

    def do_close(self) -> bool:
        return self.connection.close(self.cancellable)

    def do_io_error_enum(self) -> dict[str, int]:
        # Newer PyGObject makes Python's enums of them, of which dir() does not list the aliases.
        names = getattr(Gio.IOErrorEnum, "__members__", None) or dir(Gio.IOErrorEnum)
        return {
            name: int(getattr(Gio.IOErrorEnum, name))
            for name in names
            if name.isupper() and isinstance(getattr(Gio.IOErrorEnum, name), Gio.IOErrorEnum)
        }

    def watch(self, form: str, condition: GLib.IOCondition) -> None:
        """In the "async" form, have a main loop wait until the socket is ready."""
        if form != "async":
            return
        cancelled = []

        def begin(ready: Callable[..., None]) -> None:
            GLib.io_add_watch(self.socket.get_fd(), GLib.PRIORITY_DEFAULT, condition, ready)
            cancelled.append(self.cancellable.connect(ready))

        in_main_loop(begin)
        self.cancellable.disconnect(cancelled[0])

    ################################################################
    # Commands and answers
    ################################################################

    def perform(self, command: dict[str, Any], cancellable: Gio.Cancellable) -> None:
        do = command.pop("do")
        announced = command.pop("announce", False)
        if command.pop("cancelled", False):
            cancellable.cancel()
        self.cancellable = cancellable
        self.announce = (lambda: answer({"begun": do})) if announced else (lambda: None)
        try:
            result = getattr(self, f"do_{do}")(**command)
        except GLib.Error as error:
            assert error.matches(Gio.io_error_quark(), error.code), error
            answer({"error": error.message, "code": error.code})
        else:
            answer({"result": result})


def as_json(credentials: Gio.Credentials) -> dict[str, Any]:
    return {
        "string": credentials.to_string(),
        "pid": credentials.get_unix_pid(),
        "uid": credentials.get_unix_user(),
    }


def answer(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def read_commands(commands: queue.SimpleQueue) -> None:
    """Take in commands while the main thread may be blocked in one of them."""
    latest = Gio.Cancellable()
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "cancel":
            latest.cancel()
        else:
            latest = Gio.Cancellable()
            commands.put((command, latest))
    # The test has ended: no requests follow, and no answer is read.
    latest.cancel()
    commands.put(None)


def main() -> None:
    peer = Peer()
    if len(sys.argv) > 1:
        peer.inherit(int(sys.argv[1]))
    commands = queue.SimpleQueue()
    threading.Thread(target=read_commands, args=(commands,), daemon=True).start()
    while (item := commands.get()) is not None:
        peer.perform(*item)


if __name__ == "__main__":
    main()
