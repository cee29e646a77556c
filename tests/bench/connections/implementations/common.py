"""The protocol of all implementations in Python: read what to run, answer how long it took.

Invariant: only the standard library is imported, because the system's Python uses this file too.

An implementation is two processes at the ends of a socketpair, ``left`` and ``right``. Each gets
lines of JSON on standard input, one for each run, and answers each with one line. The first
answer lists the cases that the implementation supports.
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
# A side of a case gets its descriptor and the job. The left side returns seconds, the right side
# None, or figures by name.
Side = Callable[[int, "Job"], Any]
# By case, and then by variant: the left and the right side.
Cases = dict[str, dict[str, tuple[Side, Side]]]


class Job:
    """One run.

    Attributes:
      count: the number of round trips, messages, buffers or connections.
      size: bytes or descriptors per message, or the number of idle connections.
      path: a directory for this run only.
      fd: the descriptor of this side.
      is_left: which side this is.
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
    """Tell the other side that this one is ready; the right side does that when its work begins."""
    os.write(fd, b"!")


def await_greeting(fd: int) -> None:
    """Wait until the other side is ready, so that its start is not counted."""
    select.select([fd], [], [])
    if os.read(fd, 1) != b"!":
        raise ValueError("expected a greeting")


def both(run: Callable[..., Any], left: Any, right: Any) -> tuple[Side, Side]:
    """Make the two sides of a case of ``run(do, meet, fd, job)``."""
    return (
        lambda fd, job: run(left, await_greeting, fd, job),
        lambda fd, job: run(right, greet, fd, job),
    )


def crowd(job: Job) -> list[socket.socket]:
    """Return the idle connections to the other side.

    Each takes one descriptor in each process, so ten thousand are within usual limits.
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
    """Wait until the other side has stopped waiting for them too, so that they can be closed."""
    greet(job.fd)
    await_greeting(job.fd)


def readable_once(count: int) -> list[socket.socket]:
    """Return sockets that have one byte to read, and whose other end is closed."""

    def one_of_two() -> socket.socket:
        one, two = socket.socketpair()
        with two:
            two.send(b"x")
        return one

    return [one_of_two() for _ in range(count)]


def is_same_user(sock: Any) -> bool:
    """Whether the peer has the user id of this process."""
    peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return bool(struct.unpack("iII", peer)[1] == os.geteuid())


def filled_memory(size: int) -> int:
    """Return a memfd that can be sealed, with all its pages allocated."""
    memory = os.memfd_create("benchmark", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    chunk = b"x" * min(size, 1 << 20)
    for _ in range(size // len(chunk)):
        os.write(memory, chunk)
    return memory


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _in_a_process(_: int, job: Job) -> dict[str, float]:
    # A new process: memory that was freed before would be used again, and not be counted.
    # The name of the module that python -m runs.
    spec = sys.modules["__main__"].__spec__
    assert spec is not None
    command = [sys.executable, "-m", spec.name, "memory", str(job.size), *sys.argv[3:]]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return {"bytes": float(done.stdout)}


def side_and_fd() -> tuple[int, int]:
    """Return the side of this process, 0 for left, and its descriptor."""
    return ("left", "right").index(sys.argv[1]), int(sys.argv[2])


def allow_descriptors() -> None:
    """Raise the soft limit of descriptors to the hard limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def offer(cases: dict[str, dict[str, Any]]) -> str:
    """Return the first answer: the cases that are supported."""
    return json.dumps({case: list(variants) for case, variants in cases.items()})


def read_request(line: str | bytes, side: int, fd: int) -> tuple[str, str, Job]:
    """Return the case, the variant and the job."""
    request = json.loads(line)
    case, variant = request.pop("case"), request.pop("variant")
    job = Job(**request)
    job.fd, job.is_left = fd, side == 0
    return case, variant, job


def answer_of(side: int, found: Any) -> str:
    """Return the answer to a request."""
    if side == 0:
        return json.dumps({"seconds": found})
    return json.dumps(found if isinstance(found, dict) else {})


def serve(
    cases: Cases, memory: Callable[[int], float] | None = None, variant_of_memory: str = ""
) -> None:
    """Run what standard input asks for until it ends.

    ``memory`` returns the bytes of one idle connection that has received once; it is called with
    a number of connections in a process of its own.
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
        case, variant, job = read_request(line, side, fd)
        say(answer_of(side, cases[case][variant][side](fd, job)))


def say(line: str) -> None:
    """Print one answer."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
