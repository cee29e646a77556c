"""A template: it has imported what workers need, runs no event loop, and forks workers.

A fork has no thread but the one that forks, and each lock of another thread stays locked in it. So
a template refuses to fork if it has a second thread: that is counted by the kernel, because what it
imports can start threads that Python does not know.

What it has imported stays what it is when files change. So it looks at the files of its modules
before each fork, and refuses if one has changed; the pool then starts another template.

It reaps a worker only when the pool asks for that. Until then no other process or group can have
the number of the worker.

Invariant: nothing here starts a thread or an event loop. A worker leaves :func:`run_template` with
nothing of the template open.

Sources: fork(2), setsid(2), pidfd_open(2),
https://docs.python.org/3/library/multiprocessing.html (forkserver), gunicorn's ``preload_app``
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket as stdlib_socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .._frames import FrameDecoder, encode_frame
from .._version import __version__
from . import _protocol
from ._protocol import UNKNOWN_STATUS
from ._worker import (
    check_parent,
    exit_with_parent,
    format_error,
    restore_signals,
    run_worker,
    send_failed,
    send_last,
)

if TYPE_CHECKING:
    from .._frames import Frame

_CHUNK_SIZE: Final = 4096
# The connection, the completion log, the configuration, standard output and standard error.
_FORK_FDS: Final = 5


class _Forked(NamedTuple):
    """What a worker gets, in its own process."""

    fds: list[int]
    parent: int


def run_template(sock: stdlib_socket.socket, message: dict[str, Any]) -> int:
    """Run a template until the pool closes the connection; or a worker, in each fork of it.

    Args:
      sock: the connection to the pool.
      message: what :meth:`WorkerConfig.encode` has written.

    Returns:
      The exit status.
    """
    sock.set_inheritable(False)
    restore_signals()
    exit_with_parent()
    check_parent(message["pool_pid"])
    if message["version"] != __version__:
        # The pool sees that, and starts workers that say so.
        return send_last(sock, _protocol.pack_ready())
    try:
        for name in message["config"]["preload"]:
            importlib.import_module(name)
    except BaseException as exc:  # SystemExit, too, keeps the template from starting
        return send_failed(sock, exc)
    gc.collect()
    # The pages of these objects stay shared: a collection in a worker does not write to them.
    gc.freeze()
    forked = _serve(sock, _look_at_files())
    return 0 if forked is None else _become_worker(forked)


def _serve(sock: stdlib_socket.socket, files: dict[str, tuple[int, ...] | None]) -> _Forked | None:
    """Answer the pool; return in each worker, and in the template when the pool has closed."""
    decoder = FrameDecoder()
    sock.setblocking(True)
    with suppress(ConnectionError), sock:
        sock.sendall(_protocol.pack_ready())
        while True:
            # Only this thread could start a program that inherits them.
            data, fds, flags, _ = stdlib_socket.recv_fds(sock, _CHUNK_SIZE, _FORK_FDS)
            if not data:
                break
            # No number was free for any of them. Of some that arrived, the frame tells the number.
            is_without = not fds and flags & stdlib_socket.MSG_CTRUNC
            for frame in decoder.feed(data, None if is_without else fds):
                if frame.kind == _protocol.REAP:
                    sock.sendall(_reap(_protocol.unpack_pid(frame.body)))
                    continue
                forked = _fork(sock, frame, files)
                if forked is not None:
                    return forked
    return None


def _reap(pid: int) -> bytes:
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        # What was imported has reaped it.
        status = UNKNOWN_STATUS
    return _protocol.pack_pid(_protocol.REAPED, status)


def _fork(
    sock: stdlib_socket.socket, frame: Frame, files: dict[str, tuple[int, ...] | None]
) -> _Forked | None:
    """Fork a worker, and tell the pool; return in the worker only."""
    fds = frame.fds or []
    try:
        _check_fork(fds, files)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # pyright: ignore[reportUnnecessaryComparison]
                # Otherwise both processes would write it.
                stream.flush()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            # A terminal signals the process group of the pool, and each worker has its own.
            os.setsid()
            return _Forked(fds, parent)
        # While it is not reaped, the number is its own.
        pidfd = os.pidfd_open(pid)
    except Exception as exc:
        sock.sendall(encode_frame(_protocol.NOT_FORKED, _describe(exc)))
    else:
        stdlib_socket.send_fds(sock, [_protocol.pack_forked(pid)], [pidfd])
        os.close(pidfd)
    for fd in fds:
        os.close(fd)
    return None


class _CannotForkError(Exception):
    """The template cannot fork now; the text says why."""


def _describe(exc: Exception) -> bytes:
    if isinstance(exc, (_CannotForkError, OSError)):
        return str(exc).encode(errors="backslashreplace")
    return format_error(exc)


def _check_fork(fds: list[int], files: dict[str, tuple[int, ...] | None]) -> None:
    if len(fds) != _FORK_FDS:
        raise _CannotForkError("no free file descriptor for what the worker inherits")
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise _CannotForkError(
            f"what it has imported has started {threads - 1} threads, which a fork would not have"
        )
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        # The number of a worker would be free when it ends, and not when the pool has been told.
        raise _CannotForkError("what it has imported ignores SIGCHLD")
    for path, before in files.items():
        if _look_at(path) != before:
            raise _CannotForkError(f"{path} has changed")


def _look_at_files() -> dict[str, tuple[int, ...] | None]:
    """Return what tells a change of the files of all imported modules."""
    paths = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    return {path: _look_at(path) for path in paths if isinstance(path, str)}


def _look_at(path: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        # In an archive, or no file.
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _become_worker(forked: _Forked) -> int:
    connection, log, config, *outputs = forked.fds
    for number, fd in enumerate(outputs, 1):
        os.dup2(fd, number)
        os.close(fd)
    with open(config, "rb") as file:
        message, _, setup_data = file.read().partition(b"\n")
    sock = stdlib_socket.socket(fileno=connection)
    return run_worker(sock, log, json.loads(message), setup_data, forked.parent)
