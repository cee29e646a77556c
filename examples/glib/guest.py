"""Trio as a guest of GLib's main loop: GTK code and trio code share one thread and a connection.

The other end is a real Gio.UnixConnection. GLib's callbacks begin operations with Gio's names, and
trio tasks await on the same connection. Run it with a Python that has PyGObject, trio and attrs::

    /usr/bin/python3 examples/glib/guest.py    # Debian: apt-get install python3-gi gir1.2-glib-2.0
"""

import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from gi.repository import Gio, GLib

from trio_unixconn import AsyncResult, CallbackConnection, UnixConnection, open_callback_adapter


def run_in_glib(main: Callable[[], Awaitable[object]]) -> None:
    """Run an async function in trio, while GLib's main loop runs in the same thread."""
    loop = GLib.MainLoop()
    outcomes: list[Any] = []

    def call_once(function: Callable[[], object]) -> bool:
        function()
        return GLib.SOURCE_REMOVE

    def on_done(outcome: Any) -> None:
        outcomes.append(outcome)
        loop.quit()

    trio.lowlevel.start_guest_run(
        main,
        # idle_add may be called in any thread.
        run_sync_soon_threadsafe=lambda function: GLib.idle_add(
            call_once, function, priority=GLib.PRIORITY_DEFAULT
        ),
        done_callback=on_done,
        # PyGObject's main loop sets it, in order to notice Ctrl-C.
        host_uses_signal_set_wakeup_fd=True,
    )
    loop.run()
    outcomes[0].unwrap()


async def main() -> None:
    one, two = socket.socketpair()
    gio = Gio.Socket.new_from_fd(two.detach()).connection_factory_create_connection()
    reader, writer = os.pipe()
    sent, received = trio.Event(), trio.Event()

    # GLib's code: a timeout and callbacks, which may call *_async methods at any time.
    def on_timeout() -> bool:
        wrapped.receive_credentials_async(None, on_credentials, user_data="from Gio")
        gio.send_credentials_async(None, on_sent)
        return GLib.SOURCE_REMOVE

    def on_sent(source: Any, result: Any) -> None:
        source.send_credentials_finish(result)
        print("Gio has sent its credentials")
        sent.set()

    def on_credentials(source: CallbackConnection, result: AsyncResult, label: str) -> None:
        credentials = source.receive_credentials_finish(result)
        assert credentials.pid == os.getpid()
        print("credentials", label)
        wrapped.receive_fd_async(None, on_descriptor, user_data="written by a callback")
        gio.send_fd(writer, None)

    def on_descriptor(source: CallbackConnection, result: AsyncResult, text: str) -> None:
        fd = source.receive_fd_finish(result)
        os.write(fd, text.encode())
        os.close(fd)
        received.set()

    async with UnixConnection.from_stdlib_socket(one) as conn, open_callback_adapter() as adapter:
        wrapped = adapter.wrap(conn)
        GLib.timeout_add(1, on_timeout)
        # Trio's code, in the same thread.
        await sent.wait()
        await received.wait()
        print("the pipe has:", os.read(reader, 100).decode())
        fd = os.open(__file__, os.O_RDONLY)
        await conn.send_fd(fd)
        os.close(fd)
        fd = gio.receive_fd(None)
        print("Gio has received a file of", "the same size" if is_same(fd) else "another size")
        os.close(fd)
    gio.close()
    os.close(reader)
    os.close(writer)


def is_same(fd: int) -> bool:
    return os.fstat(fd).st_size == os.stat(__file__).st_size


run_in_glib(main)
