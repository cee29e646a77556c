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
import socket
import sys
import time


class Job:
    """One run.

    Attributes:
      count: how many round trips, messages or connections.
      size: bytes a message, descriptors a message, or connections beside, as the case has it.
      path: a folder of the run's own.
    """

    def __init__(self, count=1, size=1, path=""):
        self.count = count
        self.size = size
        self.path = path

    def payload(self):
        """Return the bytes to send."""
        return b"x" * self.size


clock = time.perf_counter


def resident():
    """Return the memory that this process has, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def end_of(fd):
    """Return a socket for this side's end; the case closes it."""
    return socket.socket(fileno=os.dup(fd))


def serve(cases):
    """Run what standard input says until it ends.

    ``cases[case][variant]`` is a pair of functions, for left and right, of a descriptor and a
    Job; the left one returns seconds, the right one nothing, or a dict of figures.
    """
    side, fd = ("left", "right").index(sys.argv[1]), int(sys.argv[2])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    say({case: sorted(variants) for case, variants in cases.items()})
    for line in sys.stdin:
        job = json.loads(line)
        case, variant = job.pop("case"), job.pop("variant")
        answer = cases[case][variant][side](fd, Job(**job))
        say({"seconds": answer} if side == 0 else (answer or {}))


def say(answer):
    """Print one answer."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
