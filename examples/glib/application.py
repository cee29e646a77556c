"""A Gio.Application, as a GTK program has one, with trio as its guest: it starts and ends both.

Gtk.Application is a Gio.Application, so a GTK program does the same and adds its windows. This one
answers "clients", which are tasks of trio, with the number of files that they have sent. It ends by
Ctrl-C, which a timeout sends here; closing the window would end it in the same way.

Run it with a Python that has PyGObject, trio and attrs::

    /usr/bin/python3 examples/glib/application.py    # Debian: apt-get install python3-gi
"""

import os
import signal
from typing import Any

import trio
from gi.repository import Gio, GLib

from trio_unixconn import UnixConnection, connection_pair


class Application(Gio.Application):
    """The program."""

    def __init__(self) -> None:
        # NON_UNIQUE: a program that needs no session bus.
        super().__init__(application_id="org.example.Guest", flags=Gio.ApplicationFlags.NON_UNIQUE)
        self.stop = trio.CancelScope()
        self.outcome: Any = None

    def do_startup(self) -> None:
        Gio.Application.do_startup(self)
        self.hold()  # the application runs as long as trio does
        trio.lowlevel.start_guest_run(
            self.main,
            # idle_add may be called in any thread.
            run_sync_soon_threadsafe=lambda function: GLib.idle_add(
                call_once, function, priority=GLib.PRIORITY_DEFAULT
            ),
            done_callback=self.on_done,
            # PyGObject's main loop sets it.
            host_uses_signal_set_wakeup_fd=True,
        )

    def do_activate(self) -> None:
        print("the window would be shown now")
        GLib.timeout_add(300, self.press_control_c)

    def press_control_c(self) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        return GLib.SOURCE_REMOVE

    def on_close(self) -> bool:
        # Not self.quit(): trio has to end first, which calls on_done().
        self.stop.cancel()
        return GLib.SOURCE_REMOVE

    def on_done(self, outcome: Any) -> None:
        self.outcome = outcome
        self.release()

    async def main(self) -> None:
        with self.stop:
            here, there = connection_pair()
            async with here, there, trio.open_nursery() as nursery:
                nursery.start_soon(count_files, there)
                await here.send_fds([0, 0, 0], per_message=1)
                print("the task has counted", (await here.receive_some()).decode())
                await trio.sleep_forever()
        print("trio ends")


async def count_files(conn: UnixConnection) -> None:
    count = 0
    async for fd in conn.fds():
        os.close(fd)
        count += 1
        if count == 3:
            await conn.send_all(b"%d files" % count)


def call_once(function: Any) -> bool:
    function()
    return GLib.SOURCE_REMOVE


app = Application()
# Before run(), which has a handler of its own otherwise: that calls app.quit().
signal.signal(signal.SIGINT, lambda _signum, _frame: GLib.idle_add(app.on_close))
app.run()
app.outcome.unwrap()  # raises what trio's main has raised
