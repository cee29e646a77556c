"""File descriptors from 3 on: those passed to this process, and programs that get some.

Invariant: only file descriptors that were passed to this process are taken, never its own. A
program gets standard input, output and error, the file descriptors from 3 on, in order, and no
other. Its signal handlers are those that a shell would have left.

Sources: sd_listen_fds(3), execve(2), dup2(2), signal(7); of Python, PEP 446 and the
``restore_signals`` of subprocess
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Final, NoReturn

from ..systemd import inherited_fds
from ._console import fail

FIRST: Final = 3
# What a shell says of a program that it does not find, or cannot start.
_NOT_FOUND: Final = 127
_NOT_STARTED: Final = 126
# systemd's word for a descriptor without a name.
UNNAMED: Final = "unknown"
# What systemd has passed is not inheritable any more.
_taken: Final[set[int]] = set()

################################################################
# File descriptors of this process
################################################################


def is_inherited(number: int) -> bool:
    """Whether a descriptor is open, and was before this process began."""
    try:
        # Descriptors that this process has opened itself are not inheritable (PEP 446).
        return number in _taken or os.get_inheritable(number)
    except (OSError, OverflowError):
        return False


def from_systemd(name: str | None = None) -> list[int]:
    """Return the descriptors that systemd, or a program that imitates it, has passed.

    Args:
      name: which of them, as FileDescriptorName= says. Default: all.

    Raises:
      ValueError: none were passed to this process, or none with that name.
    """
    passed = _passed_by_systemd()
    found = [number for number, each in passed if name in (None, each)]
    if not found:
        names = ", ".join(dict.fromkeys(each for _, each in passed))
        raise ValueError(f"no socket has the name {name} (LISTEN_FDNAMES: {names})")
    return found


@cache
def _passed_by_systemd() -> tuple[tuple[int, str], ...]:
    """Return the number and the name of each descriptor."""
    # Those are taken out of the environment, and a message should say what they were.
    count, pid = os.environ.get("LISTEN_FDS", ""), os.environ.get("LISTEN_PID", "")
    passed = inherited_fds()
    if not passed and count.isdecimal() and int(count):
        raise ValueError(
            f"the sockets were passed to process {pid!r} (LISTEN_PID), and this is {os.getpid()}"
        )
    if not passed:
        raise ValueError("no sockets were passed (LISTEN_FDS)")
    found = sorted((number, name) for name, numbers in passed.items() for number in numbers)
    _taken.update(number for number, _ in found)
    return tuple(found)


################################################################
# Another program
################################################################


def check_command(command: Sequence[str]) -> None:
    """End with the shell's exit status if there is no such program."""
    name = command[0]
    if shutil.which(name) is None:
        if os.sep in name and os.path.exists(name):
            fail(f"{name}: Permission denied", status=_NOT_STARTED)
        fail(f"{name}: command not found", status=_NOT_FOUND)


def become(command: Sequence[str], fds: Sequence[int], names: Sequence[str]) -> NoReturn:
    """Replace this process by ``command``, with ``fds`` from 3 on.

    The descriptors stay as they are otherwise; whether they block is left alone.

    Args:
      names: of the first of them; the others are called "unknown".
    """
    environment = dict(os.environ)
    environment["LISTEN_PID"] = str(os.getpid())
    environment["LISTEN_FDS"] = str(len(fds))
    environment["LISTEN_FDNAMES"] = ":".join([*names, *[UNNAMED] * len(fds)][: len(fds)])
    # Newer systemd names the process by its pidfd's inode too; an inherited one is another's.
    environment.pop("LISTEN_PIDFDID", None)
    try:
        _arrange(fds)
    except OSError as exc:
        fail(f"cannot move {len(fds)} file descriptors to {FIRST} and up: {exc.strerror}")
    # Python ignores these from its start on, and exec(2) would leave it at that.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    for output in (sys.stdout, sys.stderr):
        output.flush()
    try:
        os.execvpe(command[0], [*command], environment)  # noqa: S606 - what the user said
    except OSError as exc:
        status = _NOT_FOUND if isinstance(exc, FileNotFoundError) else _NOT_STARTED
        fail(f"{command[0]}: {exc.strerror}", status=status)


def _arrange(fds: Sequence[int]) -> None:
    """Have ``fds`` at their places, inheritable, and nothing else above standard error."""
    import fcntl  # not on Windows

    places = range(FIRST, FIRST + len(fds))
    # First everything out of the way: a place may be held by one that belongs elsewhere.
    aside = [
        fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, places.stop) if fd in places and fd != place else fd
        for place, fd in zip(places, fds, strict=True)
    ]
    for place, fd in zip(places, aside, strict=True):
        if fd == place:
            os.set_inheritable(fd, True)
        else:
            os.dup2(fd, place)
    # Python's own are close-on-exec; those that the parent process left open are not.
    for number in _open_descriptors():
        if number >= places.stop:
            # The one of the listing is gone by now.
            with suppress(OSError):
                os.set_inheritable(number, False)


def _open_descriptors() -> list[int]:
    directory = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    return [int(name) for name in os.listdir(directory)]
