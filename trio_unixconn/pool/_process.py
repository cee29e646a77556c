"""A worker's process: it is started or forked, waited for, and killed.

Invariant: a process that was started is reaped by its WorkerProcess, and its number is not used
after that.

Sources: pidfd_open(2), waitid(2) (WNOWAIT), signal(7), setsid(2), proc_pid_stat(5),
https://docs.python.org/3/library/subprocess.html
"""

from __future__ import annotations

import logging
import os
import signal
import socket as stdlib_socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, cast

import trio

from .._connection import UnixConnection, close_now
from .._memfd import Seals
from .._owner import DescriptorOwner
from ._completion_log import CompletionLog, create_memory_file
from ._protocol import UNKNOWN_STATUS
from ._worker_config import WORKER_VARIABLE

if TYPE_CHECKING:
    from ._worker_config import WorkerConfig

logger: Final = logging.getLogger("trio_unixconn.pool")

_BOOTSTRAP: Final = str(Path(__file__).with_name("_bootstrap.py"))
# Standard input, output and error.
_STANDARD_FDS: Final = range(3)
# How long to wait in seconds for a process group that was killed, and the maximum time until its
# processes are listed again.
GROUP_TIMEOUT: Final = 2.0
_LOOK_AGAIN: Final = 0.1
# The options -X that subprocess does not know, and that say how a program behaves, not how this
# process was started.
_KEPT_XOPTIONS: Final = ("int_max_str_digits", "no_debug_ranges", "pycache_prefix", "cpu_count")


class Child(Protocol):
    """A process that :class:`WorkerProcess` waits for.

    Attributes:
      pid: its process id.
      pidfd: its pidfd, which the WorkerProcess owns; -1 if there is none.
    """

    pid: int
    pidfd: int

    @property
    def returncode(self) -> int | None:
        """Its exit status; None until it is reaped."""
        ...

    @property
    def is_reserved(self) -> bool:
        """Whether no other process or group can have its number."""
        ...

    def kill(self) -> None:
        """Kill it, unless it has been reaped."""

    async def reap(self) -> None:
        """Set ``returncode``; it has exited."""


class OwnChild:
    """A child of this process."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen
        self.pid: int = popen.pid
        self.pidfd: int = _open_pidfd(popen.pid)

    @property
    def returncode(self) -> int | None:
        return cast("int | None", self._popen.returncode)

    @property
    def is_reserved(self) -> bool:
        return self.returncode is None

    def kill(self) -> None:
        self._popen.kill()

    async def reap(self) -> None:
        self._popen.wait()


class WorkerProcess(DescriptorOwner):
    """The process of a worker, and the connection to it.

    Attributes:
      conn: the pool's end of the connection.
      log: the jobs that the worker has finished.
      pid: its process id.
    """

    def __init__(
        self,
        child: Child,
        conn: UnixConnection,
        log: CompletionLog,
        *,
        kill_group: bool = False,
    ) -> None:
        self._child = child
        self.conn = conn
        self.log = log
        self.pid: int = child.pid
        self._kill_group = kill_group
        self._pidfd = child.pidfd

    async def wait(self) -> int:
        """Wait until it has ended, and reap it.

        Returns:
          Its exit status; the negative number of a signal if that killed it.
        """
        child = self._child
        if child.returncode is None:
            if self._pidfd >= 0:
                await trio.lowlevel.wait_readable(self._pidfd)
            else:
                await trio.to_thread.run_sync(_wait_for_exit, child.pid, abandon_on_cancel=True)
        # Another task may have waited, too.
        if child.returncode is None:
            # No other process or group gets its number before it is reaped.
            if self._kill_group and child.is_reserved:
                self._kill_process_group()
                await self._wait_for_process_group()
            await child.reap()
        return cast("int", child.returncode)

    def kill(self) -> None:
        """Kill it, unless it has been reaped."""
        if self._kill_group and self._child.is_reserved:
            self._kill_process_group()
        self._child.kill()

    def _kill_process_group(self) -> None:
        # EPERM: those that are left belong to another user. macOS says it of zombies, too.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    async def _wait_for_process_group(self) -> None:
        """Wait until the others of the group are gone, with their files, locks and ports.

        SIGKILL takes effect later, if the process is on another CPU or inside a system call.
        """
        # Not trio's default limiter, whose threads may all be waiting for something.
        limiter = trio.CapacityLimiter(1)
        left: list[int] = []
        with trio.move_on_after(GROUP_TIMEOUT):
            while left := await trio.to_thread.run_sync(living_members, self.pid, limiter=limiter):
                with trio.move_on_after(_LOOK_AGAIN):
                    await _wait_for_end(left[0])
            return
        logger.warning(
            "processes %s of the process group of worker %d did not end within %g s of SIGKILL",
            ", ".join(map(str, left)),
            self.pid,
            GROUP_TIMEOUT,
        )

    def close(self) -> None:
        """Close what belongs to it, after it has been reaped."""
        close_now(self.conn)
        self.log.close()
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)


def _open_pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        # Not Linux, before 5.3, or EMFILE.
        return -1


async def _wait_for_end(pid: int) -> None:
    """Wait until a process that is not a child has ended; without end if it cannot be watched."""
    pidfd = _open_pidfd(pid)
    if pidfd < 0:
        await trio.sleep_forever()
    try:
        await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)


def living_members(group: int) -> list[int]:
    """Return the processes of a process group that have not ended; none without /proc."""
    found: list[int] = []
    with suppress(OSError):
        for name in os.listdir("/proc"):
            # It may end meanwhile.
            with suppress(OSError, ValueError):
                with open(f"/proc/{int(name)}/stat", "rb") as file:
                    # The name of the program can contain anything.
                    state, _, number = file.read().rpartition(b")")[2].split()[:3]
                if int(number) == group and state not in (b"Z", b"X"):
                    found.append(int(name))
    return found


def _wait_for_exit(pid: int) -> None:
    """Wait in a thread until a child process has ended, without reaping it."""
    # ChildProcessError: another task has waited, too, and has reaped it.
    with suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


class _Ends(NamedTuple):
    """Both ends of a connection with a worker, and what else it inherits."""

    conn: UnixConnection
    log: CompletionLog
    inherited: list[int]


def _open_ends(config: WorkerConfig, stack: ExitStack, failed: ExitStack) -> _Ends:
    """Open what a worker inherits.

    Args:
      stack: closes what only the worker needs.
      failed: closes what the pool needs.
    """
    ours, theirs = stdlib_socket.socketpair()
    stack.callback(theirs.close)
    conn = UnixConnection.from_stdlib_socket(ours)
    failed.callback(close_now, conn)
    log = CompletionLog(config.log_size)
    failed.callback(log.close)
    config_fd = create_memory_file(config.encode(), Seals.ALL)
    stack.callback(os.close, config_fd)
    return _Ends(conn, log, [theirs.fileno(), log.fd, config_fd])


def start(config: WorkerConfig) -> WorkerProcess:
    """Start a worker: a fresh interpreter.

    This is not done in a thread: prctl(2) sends a worker a signal when the thread that started it
    ends. It takes one or two milliseconds. Nothing here waits for the worker: the configuration
    is in a file.

    Raises:
      OSError: EMFILE, ENOMEM, EAGAIN, ENOENT; no process and no file descriptor is left.
    """
    with ExitStack() as stack:
        # In place of the standard ones that are closed: a file descriptor of the pool with such a
        # number would be the standard output or error of the worker, or get what is written there.
        standard = _open_standard_fds(stack)
        failed = stack.enter_context(ExitStack())
        ends = _open_ends(config, stack, failed)
        popen = subprocess.Popen(
            [
                config.executable,
                *_interpreter_options(),
                _BOOTSTRAP,
                *map(str, ends.inherited),
                config.handler,
            ],
            stdin=subprocess.DEVNULL,
            stdout=standard[1],
            stderr=standard[2],
            pass_fds=ends.inherited,
            env=worker_environment(config),
            # A terminal signals the process group of the pool.
            start_new_session=True,
        )
        failed.pop_all()
        return WorkerProcess(
            OwnChild(popen), ends.conn, ends.log, kill_group=config.kill_process_group
        )


async def fork(
    config: WorkerConfig, fork_child: Callable[[list[int]], Awaitable[Child]]
) -> WorkerProcess:
    """Have a template fork a worker.

    Args:
      fork_child: passes five file descriptors to the template: connection, completion log,
        configuration, standard output, standard error. Returns the worker.

    Raises:
      OSError: EMFILE, ENOMEM; no process and no file descriptor is left.
      All that ``fork_child`` raises; likewise.
    """
    with ExitStack() as stack:
        standard = _open_standard_fds(stack)
        failed = stack.enter_context(ExitStack())
        ends = _open_ends(config, stack, failed)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, null)
        outputs = [number if standard[number] is None else null for number in (1, 2)]
        child = await fork_child([*ends.inherited, *outputs])
        failed.pop_all()
        return WorkerProcess(child, ends.conn, ends.log, kill_group=config.kill_process_group)


def _open_standard_fds(stack: ExitStack) -> list[int | None]:
    """Open /dev/null under those of the numbers 0, 1 and 2 that are closed, until the stack ends.

    Returns:
      For each number what a worker gets in its place: DEVNULL if a program that this process
      starts would not inherit it; None if it would.
    """
    found: list[int | None] = []
    for number in _STANDARD_FDS:
        try:
            is_inherited = os.get_inheritable(number)
        except OSError:
            is_inherited = False
            # The lowest number that is free: this one.
            stack.callback(os.close, os.open(os.devnull, os.O_RDWR))
        found.append(None if is_inherited else subprocess.DEVNULL)
    return found


def _interpreter_options() -> list[str]:
    """Return the options of this interpreter: -I, -E, -s, -P, -O, -B, -W, -X and so on.

    Some of them are a boundary: an isolated program must not start workers that are not.
    """
    # Private, but made for this: multiprocessing calls it, too.
    flags: Callable[[], list[str]] = getattr(subprocess, "_args_from_interpreter_flags")  # noqa: B009 - no type checker knows it
    options = flags()
    for name in _KEPT_XOPTIONS:
        value = sys._xoptions.get(name)
        if value is not None:
            options += ["-X", name if value is True else f"{name}={value}"]
    return options


def worker_environment(config: WorkerConfig) -> dict[str, str]:
    """Return the environment of a worker that is started now."""
    variables: dict[str, str | None] = {
        **os.environ,
        **config.environment,
        WORKER_VARIABLE: str(os.getpid()),
    }
    return {name: value for name, value in variables.items() if value is not None}


def describe_exit(status: int) -> str:
    """Return how a process ended, for an error message."""
    if status == UNKNOWN_STATUS:
        return "ended, with a status that is not known: its template has not reaped it"
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


# What starting a worker takes: up to three standard ones, two sockets, the log, the configuration,
# and three of subprocess; then its pidfd.
_RESERVE_SIZE: Final = 10


class FdReserve(DescriptorOwner):
    """File descriptors that are kept open so that a worker can be started when no other is free."""

    def __init__(self) -> None:
        self._fds: list[int] = []
        self.fill()

    def fill(self) -> None:
        """Open as many as are missing, as far as some are free."""
        fds = self._fds
        while len(fds) < _RESERVE_SIZE:
            try:
                fds.append(os.dup(fds[0]) if fds else os.open(os.devnull, os.O_RDONLY))
            except OSError:
                return

    @contextmanager
    def released(self) -> Generator[None, None, None]:
        """Close them in this block, which must not wait."""
        self.close()
        try:
            yield
        finally:
            self.fill()

    def close(self) -> None:
        """Close them."""
        while self._fds:
            os.close(self._fds.pop())
