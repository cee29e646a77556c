"""What every contestant written in Python shares: it is told what to run, and answers how long.

The rule of this file: it knows nothing of any contestant, and imports only what every Python
has, the system's too.

A contestant is two processes at the ends of a socketpair, ``left`` and ``right``. Each gets
lines of JSON on standard input, one for each run, and answers each with one line. The first
answer lists what the contestant can do.
"""

from __future__ import annotations

import json
import os
import resource
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

clock = time.perf_counter

SO_PASSCRED = 16
# A side of a case is told its end and what to do. The left one returns seconds, the right one
# nothing, or figures by name.
Side = Callable[[int, "Job"], Any]
# By case, and then by variant: the left and the right side.
Cases = dict[str, dict[str, tuple[Side, Side]]]


class Job:
    """One run.

    Attributes:
      count: how many round trips, messages, buffers or connections.
      size: bytes a message, descriptors a message, or connections beside, as the case has it.
      path: a folder of the run's own.
      fd: this side's end, and ``is_left`` which side that is.
    """

    fd = -1
    is_left = False

    def __init__(self, count: int = 1, size: int = 1, path: str = "") -> None:
        self.count = count
        self.size = size
        self.path = path

    def payload(self) -> bytes:
        """Return the bytes to send."""
        return b"x" * self.size


def end_of(fd: int) -> socket.socket:
    """Return a socket for this side's end; the case closes it."""
    return socket.socket(fileno=os.dup(fd))


def greet(fd: int) -> None:
    """Say that this side is ready; the right one does that where its work begins."""
    os.write(fd, b"!")


def await_greeting(fd: int) -> None:
    """Wait until the other side is ready, so that what it takes to start is not counted."""
    select.select([fd], [], [])
    if os.read(fd, 1) != b"!":
        raise ValueError("something else than a greeting")


def both(run: Callable[..., Any], left: Any, right: Any) -> tuple[Side, Side]:
    """Make the two sides of a case of ``run(do, meet, fd, job)``."""
    return (
        lambda fd, job: run(left, await_greeting, fd, job),
        lambda fd, job: run(right, greet, fd, job),
    )


def crowd(job: Job) -> list[socket.socket]:
    """Return as many connections to the other side as are to be idle.

    So each costs one descriptor in each process, and ten thousand are within usual limits.
    """
    path = job.path + "/crowd"
    socks: list[socket.socket] = []
    if job.is_left:
        await_greeting(job.fd)
        for _ in range(job.size):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(path)
            socks.append(sock)
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            greet(job.fd)
            socks = [listener.accept()[0] for _ in range(job.size)]
        os.unlink(path)
    return socks


def disperse(job: Job) -> None:
    """Wait until nobody waits for any of them on the other side either: now they may close."""
    greet(job.fd)
    await_greeting(job.fd)


def readable_once(count: int) -> list[socket.socket]:
    """Return sockets with one byte to be read, whose other end is closed."""

    def one_of_two() -> socket.socket:
        one, two = socket.socketpair()
        with two:
            two.send(b"x")
        return one

    return [one_of_two() for _ in range(count)]


def is_same_user(sock: Any) -> bool:
    """Whether whoever connected has the user id of this process."""
    peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return bool(struct.unpack("iII", peer)[1] == os.geteuid())


def filled_memory(size: int) -> int:
    """Return a memfd that can be sealed, with all its pages there."""
    memory = os.memfd_create("benchmark", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    chunk = b"x" * min(size, 1 << 20)
    for _ in range(size // len(chunk)):
        os.write(memory, chunk)
    return memory


def resident() -> int:
    """Return the memory that this process has, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _in_a_process(_: int, job: Job) -> dict[str, float]:
    # A new one: what a process has used and freed before would be used again, and not be seen.
    command = [sys.executable, sys.argv[0], "memory", str(job.size), *sys.argv[3:]]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return {"bytes": float(done.stdout)}


def side_and_fd() -> tuple[int, int]:
    """Return which side this process is, 0 for left, and its end."""
    return ("left", "right").index(sys.argv[1]), int(sys.argv[2])


def allow_descriptors() -> None:
    """Allow as many descriptors as this process may."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def offer(cases: dict[str, dict[str, Any]]) -> str:
    """Return the first answer: what can be run."""
    return json.dumps({case: list(variants) for case, variants in cases.items()})


def read_order(line: str | bytes, side: int, fd: int) -> tuple[str, str, Job]:
    """Return the case, the variant and the job."""
    order = json.loads(line)
    case, variant = order.pop("case"), order.pop("variant")
    job = Job(**order)
    job.fd, job.is_left = fd, side == 0
    return case, variant, job


def answer_of(side: int, found: Any) -> str:
    """Return the answer to an order."""
    if side == 0:
        return json.dumps({"seconds": found})
    return json.dumps(found if isinstance(found, dict) else {})


def serve(
    cases: Cases, memory: Callable[[int], float] | None = None, variant_of_memory: str = ""
) -> None:
    """Run what standard input says until it ends.

    ``memory`` returns how many bytes a connection takes that has received once, and is idle;
    it is called in a process of its own with a number of connections.
    """
    allow_descriptors()
    if memory:
        if sys.argv[1] == "memory":
            say(json.dumps(memory(int(sys.argv[2]))))
            return
        cases["memory of an idle connection"] = {variant_of_memory: (lambda *_: 0.0, _in_a_process)}
    side, fd = side_and_fd()
    say(offer(cases))
    for line in sys.stdin:
        case, variant, job = read_order(line, side, fd)
        say(answer_of(side, cases[case][variant][side](fd, job)))


def say(line: str) -> None:
    """Print one answer."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
