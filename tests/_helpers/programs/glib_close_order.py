"""Begin operations of a Gio.SocketConnection at once, and print as JSON how they end.

For each list of operations: the codes of their errors, or null, in the order in which they were
begun; then the positions of those that were called back before the last one.
"""

import json
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import gi

gi.require_version("Gio", "2.0")
from gi.repository import Gio, GLib


def connection_pair() -> tuple[Gio.SocketConnection, socket.socket]:
    ours, theirs = socket.socketpair()
    connection = Gio.Socket.new_from_fd(ours.detach()).connection_factory_create_connection()
    return connection, theirs


def fill(connection: Gio.SocketConnection) -> None:
    sock = connection.get_socket()
    sock.set_blocking(False)
    try:
        while True:
            sock.send(b"." * 4096)
    except GLib.Error:
        sock.set_blocking(True)


class Recorder:
    """Records callbacks, in a main loop that ends with the last."""

    def __init__(self) -> None:
        self.loop = GLib.MainLoop()
        self.codes: list[Any] = []
        self.order: list[int] = []

    def __call__(self, name: str) -> Callable[..., None]:
        position = len(self.codes)
        self.codes.append("no callback")

        def callback(source: Any, result: Gio.AsyncResult) -> None:
            self.order.append(position)
            try:
                getattr(source, f"{name}_finish")(result)
                self.codes[position] = None
            except GLib.Error as error:
                assert error.matches(Gio.io_error_quark(), error.code)
                self.codes[position] = error.code
            if len(self.order) == len(self.codes):
                self.loop.quit()

        return callback

    def wait(self) -> tuple[list[Any], list[int]]:
        GLib.timeout_add_seconds(30, self.loop.quit)
        self.loop.run()
        last = len(self.codes) - 1
        return self.codes, sorted(self.order[: self.order.index(last)])


def run(operations: str) -> dict[str, Any]:
    full = operations.startswith("full ")
    cancelled = operations.startswith("cancelled ")
    names = [name for name in operations.split() if name in METHODS]
    connection, _theirs = connection_pair()
    if full:
        fill(connection)
    cancellable = Gio.Cancellable.new() if cancelled else None
    if cancelled:
        cancellable.cancel()
    record = Recorder()
    for name in map(METHODS.get, names):
        if name == "close":
            connection.close_async(0, cancellable, record(name))
        elif name == "write_bytes":
            connection.get_output_stream().write_bytes_async(
                GLib.Bytes.new(b"x"), 0, cancellable, record(name)
            )
        else:
            connection.get_input_stream().read_bytes_async(1, 0, cancellable, record(name))
    codes, before = record.wait()
    return {"codes": codes, "before the last": before, "closed": connection.is_closed()}


METHODS = {"write": "write_bytes", "read": "read_bytes", "close": "close"}


def main() -> None:
    print(json.dumps({operations: run(operations) for operations in sys.argv[1:]}), flush=True)
    # Without the wait for what a failed assertion has left open.
    os._exit(0)


if __name__ == "__main__":
    main()
