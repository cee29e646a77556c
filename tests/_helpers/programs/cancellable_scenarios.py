"""Scenarios for a Cancellable, run with Gio's class and with ours; each returns what it saw.

A program: its argument says whose class, "glib" or "ours". It prints the results as JSON.
"""

import json
import os
import select
import sys
import threading
from collections.abc import Callable
from typing import Any


class Kit:
    """What a scenario needs besides the class itself: ours and GLib's differ in these."""

    def __init__(
        self,
        cancellable: Callable[[], Any],
        connect: Callable[..., int],
        error_code: Callable[[Any], "int | None"],
        disconnect_within: Callable[[Any, int], None],
        watch: Callable[[Any, Callable[[], None]], bool],
    ) -> None:
        self.new = cancellable
        # PyGObject calls the callback without arguments; C and ours with the Cancellable and data.
        self.connect = connect
        # The code of the error that "raise if cancelled" raises, or None.
        self.error_code = error_code
        # Disconnect within a callback, where g_cancellable_disconnect() deadlocks.
        self.disconnect_within = disconnect_within
        # Whether a source (GLib) or scope (ours) ends after the given call was made in it.
        self.watch = watch


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def run(*calls: Callable[[], object]) -> None:
    """Run calls in threads of their own, until all are done."""
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "deadlock"


def flag(kit: Kit) -> object:
    it = kit.new()
    seen = [it.is_cancelled(), kit.error_code(it)]
    for call in (it.cancel, it.cancel, it.reset, it.reset, it.cancel):
        call()
        seen += [it.is_cancelled(), kit.error_code(it)]
    return seen


def cancel_twice(kit: Kit) -> object:
    it = kit.new()
    calls: list[str] = []
    kit.connect(it, lambda _: calls.append("called"))
    it.cancel()
    it.cancel()
    return calls


def order(kit: Kit) -> object:
    it = kit.new()
    calls: list[int] = []
    ids = [kit.connect(it, lambda _, number: calls.append(number), number) for number in range(5)]
    it.disconnect(ids[1])
    kit.connect(it, lambda _: calls.append(5))
    it.cancel()
    return [calls, all(number > 0 for number in ids), len(set(ids))]


def arguments(kit: Kit) -> object:
    it = kit.new()
    seen: list[object] = []
    kit.connect(it, lambda *given: seen.append([given[0] is it, *given[1:]]), "a", 2)
    it.cancel()
    return seen


def same_callback_twice(kit: Kit) -> object:
    it = kit.new()
    calls: list[str] = []

    def callback(_: object) -> None:
        calls.append("called")

    first = kit.connect(it, callback)
    kit.connect(it, callback)
    it.disconnect(first)
    it.cancel()
    return calls


def connect_after_cancel(kit: Kit) -> object:
    it = kit.new()
    it.cancel()
    seen: list[object] = []
    number = kit.connect(it, lambda *given: seen.append([it.is_cancelled(), *given[1:]]), "data")
    seen.append(number)
    it.disconnect(number)
    it.reset()
    it.cancel()
    return seen


def connect_in_another_thread_after_cancel(kit: Kit) -> object:
    it = kit.new()
    it.cancel()
    seen: list[bool] = []

    def connect() -> None:
        here = threading.get_ident()
        kit.connect(it, lambda _: seen.append(threading.get_ident() == here))

    run(connect)
    return seen


def connect_within_a_callback(kit: Kit) -> object:
    it = kit.new()
    seen: list[object] = []

    def callback(_: object) -> None:
        seen.append("first")
        seen.append(kit.connect(it, lambda _: seen.append("inner")))

    kit.connect(it, callback)
    kit.connect(it, lambda _: seen.append("second"))
    it.cancel()
    it.reset()
    it.cancel()
    return seen


def cancel_within_a_callback(kit: Kit) -> object:
    it = kit.new()
    seen: list[object] = []

    def callback(_: object) -> None:
        seen.append("first")
        it.cancel()
        seen.append(it.is_cancelled())

    kit.connect(it, callback)
    kit.connect(it, lambda _: seen.append("second"))
    it.cancel()
    return seen


def disconnect_itself(kit: Kit) -> object:
    it = kit.new()
    seen: list[str] = []
    ids: list[int] = []

    def callback(_: object) -> None:
        seen.append("first")
        kit.disconnect_within(it, ids[0])

    ids.append(kit.connect(it, callback))
    kit.connect(it, lambda _: seen.append("second"))
    it.cancel()
    it.reset()
    it.cancel()
    return seen


def disconnect_a_later_one(kit: Kit) -> object:
    it = kit.new()
    seen: list[str] = []
    ids: list[int] = []

    def callback(_: object) -> None:
        seen.append("first")
        if ids:
            kit.disconnect_within(it, ids.pop())

    kit.connect(it, callback)
    ids.append(kit.connect(it, lambda _: seen.append("second")))
    kit.connect(it, lambda _: seen.append("third"))
    it.cancel()
    it.reset()
    it.cancel()
    return seen


def callbacks_run_in_the_cancelling_thread(kit: Kit) -> object:
    it = kit.new()
    seen: list[bool] = []
    threads: list[int] = []
    kit.connect(it, lambda _: seen.append(threading.get_ident() == threads[0]))

    def cancel() -> None:
        threads.append(threading.get_ident())
        it.cancel()
        seen.append(True)

    run(cancel)
    return seen


def in_the_middle_of_a_callback(kit: Kit, do: Callable[[Any, int], object]) -> object:
    """Do something in a thread while another thread runs a callback."""
    it = kit.new()
    seen: list[object] = []
    running, about_to = threading.Event(), threading.Event()

    def callback(_: object) -> None:
        seen.append("callback begins")
        running.set()
        assert about_to.wait(30)
        # What does not block is done with it by then.
        done.wait(0.2)
        seen.append("callback ends")

    done = threading.Event()
    number = kit.connect(it, callback)

    def other() -> None:
        assert running.wait(30)
        seen.append(it.is_cancelled())
        about_to.set()
        do(it, number)
        seen.append("done")
        done.set()

    run(it.cancel, other)
    return [*seen, it.is_cancelled()]


def reset_during_a_callback(kit: Kit) -> object:
    return in_the_middle_of_a_callback(kit, lambda it, _: it.reset())


def disconnect_during_a_callback(kit: Kit) -> object:
    return in_the_middle_of_a_callback(kit, lambda it, number: it.disconnect(number))


def cancel_during_a_callback(kit: Kit) -> object:
    return in_the_middle_of_a_callback(kit, lambda it, _: it.cancel())


def reset_and_use_again(kit: Kit) -> object:
    it = kit.new()
    seen: list[object] = []
    kit.connect(it, lambda _: seen.append("called"))
    fd = it.get_fd()
    for _ in range(3):
        it.cancel()
        seen.append(readable(fd))
        it.reset()
        seen.append(readable(fd))
    it.release_fd()
    return seen


def descriptor(kit: Kit) -> object:
    it = kit.new()
    fd = it.get_fd()
    seen: list[object] = [os.get_inheritable(fd), os.get_blocking(fd), readable(fd)]
    seen.append(it.get_fd() == fd)
    it.cancel()
    it.cancel()
    seen.append(readable(fd))
    it.reset()
    seen.append(readable(fd))
    it.cancel()
    it.release_fd()
    seen += [is_open(fd), readable(fd)]
    it.release_fd()
    seen.append(is_open(fd))
    # It is still cancelled.
    fd = it.get_fd()
    seen.append(readable(fd))
    it.reset()
    seen.append(readable(fd))
    it.release_fd()
    seen.append(is_open(fd))
    return seen


def descriptor_before_the_callbacks(kit: Kit) -> object:
    it = kit.new()
    fd = it.get_fd()
    seen: list[bool] = []
    kit.connect(it, lambda _: seen.append(readable(fd)))
    it.cancel()
    it.release_fd()
    return seen


def current(kit: Kit) -> object:
    one, two = kit.new(), kit.new()
    get = type(one).get_current
    seen: list[object] = [get() is None]
    one.push_current()
    one.push_current()
    two.push_current()
    seen.append(get() is two)
    run(lambda: seen.append(get() is None))
    two.pop_current()
    seen.append(get() is one)
    one.pop_current()
    seen.append(get() is one)
    one.pop_current()
    seen.append(get() is None)
    return seen


def current_is_not_cancelled_with_another(kit: Kit) -> object:
    one, two = kit.new(), kit.new()
    one.push_current()
    two.push_current()
    one.cancel()
    seen = [one.is_cancelled(), two.is_cancelled()]
    two.pop_current()
    one.pop_current()
    return seen


def fork_and_reset(kit: Kit) -> object:
    """Both processes reset one that was cancelled before the fork."""
    it = kit.new()
    fd = it.get_fd()
    it.cancel()
    pid = os.fork()
    if not pid:
        try:
            it.reset()
            os._exit(int(it.is_cancelled() or readable(fd)))
        finally:
            os._exit(9)
    status = os.waitpid(pid, 0)[1]
    it.reset()
    seen = [status, it.is_cancelled(), readable(fd)]
    it.cancel()
    seen.append(readable(fd))
    it.reset()
    it.release_fd()
    return seen


def fork_and_cancel(kit: Kit) -> object:
    """Both processes cancel, and then one resets."""
    it = kit.new()
    fd = it.get_fd()
    pid = os.fork()
    if not pid:
        try:
            it.cancel()
            os._exit(int(not it.is_cancelled() or not readable(fd)))
        finally:
            os._exit(9)
    status = os.waitpid(pid, 0)[1]
    it.cancel()
    seen = [status, readable(fd)]
    it.reset()
    seen.append(readable(fd))
    it.release_fd()
    return seen


def watch(kit: Kit) -> object:
    """A source, or a scope, ends when it is cancelled, before or after it was made."""
    before, while_ = kit.new(), kit.new()
    before.cancel()
    never = kit.new()
    return [
        kit.watch(before, lambda: None),
        kit.watch(while_, while_.cancel),
        kit.watch(never, lambda: None),
        kit.watch(never, lambda: run(never.cancel)),
    ]


def watch_when_reset_at_once(kit: Kit) -> object:
    """A reset before the main loop runs again does not undo what cancel() has done."""
    it = kit.new()

    def cancel_and_reset() -> None:
        it.cancel()
        it.reset()

    return [kit.watch(it, cancel_and_reset), it.is_cancelled()]


def watch_again_after_reset(kit: Kit) -> object:
    it = kit.new()
    return [kit.watch(it, call) for call in (it.cancel, it.reset, it.cancel)]


SCENARIOS = [
    flag,
    cancel_twice,
    order,
    arguments,
    same_callback_twice,
    connect_after_cancel,
    connect_in_another_thread_after_cancel,
    connect_within_a_callback,
    cancel_within_a_callback,
    disconnect_itself,
    disconnect_a_later_one,
    callbacks_run_in_the_cancelling_thread,
    reset_during_a_callback,
    disconnect_during_a_callback,
    cancel_during_a_callback,
    reset_and_use_again,
    descriptor,
    descriptor_before_the_callbacks,
    current,
    current_is_not_cancelled_with_another,
    fork_and_reset,
    fork_and_cancel,
    watch,
    watch_when_reset_at_once,
    watch_again_after_reset,
]


# What a scenario sees that would never end.
DEADLOCK = "deadlock"
DEADLOCKS: "list[Callable[[Kit], object]]" = []


def glib_kit() -> Kit:
    import gi

    gi.require_version("Gio", "2.0")
    from gi.repository import Gio, GLib, GObject

    def error_code(it: Any) -> "int | None":
        try:
            it.set_error_if_cancelled()
        except GLib.Error as error:
            assert error.matches(Gio.io_error_quark(), error.code)
            return error.code
        return None

    def watch_source(it: Any, call: Callable[[], None]) -> bool:
        seen: list[bool] = []
        context = GLib.MainContext.new()
        source = it.source_new()
        source.set_callback(lambda *_: seen.append(True))
        source.attach(context)
        call()
        while context.iteration(False):
            pass
        source.destroy()
        return bool(seen)

    def connect(it: Any, callback: Callable[..., object], *data: object) -> int:
        return it.connect(lambda: callback(it, *data))

    if GLib.check_version(2, 82, 0) is None:
        # Since then a callback runs under a lock, as g_cancellable_connect() documents.
        DEADLOCKS.append(connect_within_a_callback)
    return Kit(
        Gio.Cancellable.new, connect, error_code, GObject.Object.handler_disconnect, watch_source
    )


def our_kit() -> Kit:
    import trio
    import trio.testing

    from trio_unixconn import Cancellable, OperationCancelled

    def error_code(it: Any) -> "int | None":
        try:
            it.raise_if_cancelled()
        except OperationCancelled as error:
            return error.code
        return None

    def watch_scope(it: Any, call: Callable[[], None]) -> bool:
        async def in_scope() -> None:
            with it.scope():
                call()
                await trio.testing.wait_all_tasks_blocked()

        try:
            trio.run(in_scope)
        except OperationCancelled:
            return True
        return False

    return Kit(Cancellable, Cancellable.connect, error_code, Cancellable.disconnect, watch_scope)


def main() -> None:
    kit = {"glib": glib_kit, "ours": our_kit}[sys.argv[1]]()
    seen = {
        scenario.__name__: DEADLOCK if scenario in DEADLOCKS else scenario(kit)
        for scenario in SCENARIOS
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
