"""Servers at one path that are killed, or race: forked here, where no thread runs.

``bind_driver.py kill DIRECTORY SCENARIO`` kills a server at every line of _bind that it executes,
and starts another one each time. ``bind_driver.py race DIRECTORY BEFORE`` starts several at once.
Prints one JSON object.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import threading
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from trio_unixconn import AddressInUseError, _bind, open_unix_connection, open_unix_listener

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

RACERS = 6
ROUNDS = 15


def forked(work: Callable[[], int]) -> int:
    """Do ``work`` in a process of its own; return its pid."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = work()
        except BaseException:  # a child must not go on as its parent
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def status_of(pid: int) -> int:
    """Return the exit status of a process, or minus its signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(step: int, work: Callable[[], int]) -> int:
    """Do ``work``, and be killed at the line of _bind with this number, counted as executed."""
    left = step

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != _bind.__file__:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    threading.settrace(trace)
    return work()


def listen_at(path: Path) -> None:
    """Leave a socket that no process holds."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()


def open_and_close(path: Path, *, alone: bool = False) -> Callable[[], int]:
    """Return the work of a server that listens, serves itself once, and closes."""

    async def main() -> int:
        async with await open_unix_listener(path) as listener:
            if alone and os.listdir(path.parent) != [path.name]:
                return 3
            async with (
                await open_unix_connection(path) as client,
                await listener.accept() as server,
            ):
                await client.send_all(b"x")
                return 0 if await server.receive_some() == b"x" else 4

    return lambda: trio.run(main)


def take_over(path: Path) -> Callable[[], int]:
    """Return the work of a server that takes the path over, and exits without closing."""

    async def main() -> int:
        await open_unix_listener(path, replace=True)
        os._exit(0)

    return lambda: trio.run(main)


def kill(directory: Path, scenario: str) -> dict[str, Any]:
    """Kill a server at each line, and check that the next one starts and nothing is left."""
    # A name that does not fit into the address of a socket is bound at a temporary one.
    path = directory / ("x" * 200 if "long" in scenario else "socket")
    wrong: list[str] = []
    step, status = 0, -1
    while status and not wrong:
        step += 1
        work = take_over(path) if scenario == "live" else open_and_close(path)
        with socket.socket(socket.AF_UNIX) as live:
            if "dead" in scenario:
                listen_at(path.with_name("other"))
                path.with_name("other").rename(path)
            elif scenario == "live":
                live.bind(str(path))
                live.listen()
            status = status_of(forked(partial(killed_at, step, work)))
            if status not in (0, -signal.SIGKILL):
                wrong.append(f"step {step}: exit status {status}")
            if scenario == "live" and not path.exists():
                wrong.append(f"step {step}: the path is missing")
        again = status_of(forked(open_and_close(path, alone=True)))
        if again:
            wrong.append(f"step {step}: starting again ended with {again}")
        if os.listdir(directory):
            wrong.append(f"step {step}: left {os.listdir(directory)}")
    return {"steps": step, "wrong": wrong}


def race(directory: Path, before: str) -> dict[str, Any]:
    """Start servers at one path at the same time; count those that get it in each round."""
    path = directory / ("x" * 200 if "long" in before else "socket")
    winners: list[int] = []
    others: list[int] = []
    for _ in range(ROUNDS):
        if "dead" in before:
            listen_at(path.with_name("other"))
            path.with_name("other").rename(path)
        go_read, go_write = os.pipe()
        end_read, end_write = os.pipe()
        said_read, said_write = os.pipe()

        async def main(said: int = said_write, end: int = end_read) -> int:
            try:
                listener = await open_unix_listener(path, replace=before == "replace")
            except AddressInUseError as exc:
                os.write(said, b"l" if exc.errno == errno.EADDRINUSE else b"?")
                return 0
            os.write(said, b"w")
            await trio.lowlevel.wait_readable(end)
            await listener.aclose()
            return 0

        def racer(go: int = go_read, main: Any = main) -> int:
            os.read(go, 1)
            return int(trio.run(main))

        pids = [forked(racer) for _ in range(RACERS)]
        os.write(go_write, b"g" * RACERS)
        said = b""
        while len(said) < RACERS:
            said += os.read(said_read, RACERS)
        os.write(end_write, b"e")
        if any(status_of(pid) for pid in pids):
            others.append(-1)
        winners.append(said.count(b"w"))
        others.append(said.count(b"l"))
        for fd in (go_read, go_write, end_read, end_write, said_read, said_write):
            os.close(fd)
    return {"winners": winners, "others": others, "left": os.listdir(directory)}


if __name__ == "__main__":
    what, where, how = sys.argv[1:]
    if what == "kill":
        print(json.dumps(kill(Path(where), how)))
    else:
        print(json.dumps(race(Path(where), how)))
