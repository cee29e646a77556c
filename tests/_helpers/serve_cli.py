"""Servers of ``trio-unixconn serve`` as processes, and terminals to run them on."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import attrs
import pyte

from tests._helpers.cli import COMMAND, ended, started
from tests._helpers.environment import environment
from tests._helpers.waiting import until_sync
from trio_unixconn._cli.serve.service import SAME_SIGNAL

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from pathlib import Path

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
APP = """
import trio

ANSWER = b"one"

async def once(stream, job):
    await stream.receive_some(100)
    await stream.send_all(ANSWER)

async def hold(stream, job):
    await stream.send_all(b"held")
    await stream.receive_some(100)
    await stream.send_all(ANSWER)

async def fail(stream, job):
    await stream.receive_some(100)
    raise RuntimeError("not today")
"""


def hear_signals() -> None:
    """Restore signals that are ignored or blocked where the tests were started."""
    for each in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(each) is signal.SIG_IGN:
            signal.signal(each, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def write_program(project: Path) -> Path:
    """Write a program that is the command, and return its path.

    With -c or -m, Python 3.13.0 cannot import socket in a directory that was deleted.
    """
    path = project / "command.py"
    path.write_text("from trio_unixconn.__main__ import main\n\nmain()\n")
    return path


def program_in_a_deleted_directory(project: Path) -> list[str]:
    """Return the command line as a program that runs in a directory that was deleted."""
    gone = project / "gone"
    shell = f'mkdir "{gone}" && cd "{gone}" && rmdir "{gone}" && exec "$@"'
    return ["sh", "-c", shell, "-", sys.executable, str(write_program(project))]


def make_project(directory: Path) -> Path:
    """Make a directory with a module of handlers, ``app``, to run a server in."""
    project = directory / "project"
    project.mkdir()
    (project / "app.py").write_text(APP)
    return project


@attrs.define
class Served:
    """A server's process, and the lines that it has printed."""

    process: subprocess.Popen[str]
    directory: Path
    lines: list[str] = attrs.field(factory=list[str])

    def line(self, text: str) -> str:
        """Read until a line has that in it, and return it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError(("".join(self.lines), ended(self.process)))

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def send_again(self, number: signal.Signals) -> None:
        """Send a signal that the server tells from the last one, which its log must contain."""
        # No event says that this time has passed. It began before the line was read.
        time.sleep(SAME_SIGNAL)
        self.send(number)

    def drained_output(self) -> str:
        """Have it drain, and return what it has printed to standard output since."""
        self.send(signal.SIGTERM)
        done = ended(self.process)
        assert done.returncode == 0, done
        return str(done.stdout)

    def drained(self) -> str:
        """Have it drain, and return what it has printed since."""
        self.send(signal.SIGTERM)
        done = ended(self.process)
        assert done.returncode == 0, done
        assert done.stderr == ""
        return str(done.stdout)


@contextmanager
def starting(
    project: Path,
    handler: str,
    *arguments: str,
    bind: str = "unix:s",
    workers: int = 1,
    variables: Mapping[str, str] = MappingProxyType({}),
    **options: Any,
) -> Generator[Served, None, None]:
    """Start a server in a directory.

    Args:
      variables: of its environment.
      options: those of :func:`tests._helpers.cli.started`.
    """
    with started(
        *("serve", handler, "--bind", bind, "--workers", str(workers), *arguments),
        # Compiled files are told from newer sources only by whole seconds and sizes.
        **{
            "cwd": project,
            "env": environment(PYTHONDONTWRITEBYTECODE="1", **variables),
            "preexec_fn": hear_signals,
            **options,
        },
    ) as process:
        yield Served(process, project)


@contextmanager
def serving(
    project: Path, handler: str, *arguments: str, **options: Any
) -> Generator[Served, None, None]:
    """Serve a handler of ``app`` with one worker, at ``s`` by default; wait until it is ready."""
    with starting(project, f"app:{handler}", *arguments, **options) as served:
        served.line("ready: ")
        yield served


def connected(address: Any) -> socket.socket:
    family = socket.AF_INET6 if len(address) == 4 else socket.AF_INET
    client = socket.socket(socket.AF_UNIX if isinstance(address, (str, bytes)) else family)
    client.settimeout(60)
    try:
        client.connect(address)
    except OSError:
        client.close()
        raise
    return client


def first_connection(address: Any) -> socket.socket:
    """Connect as soon as a process listens, which is later than the path exists."""
    found: list[socket.socket] = []

    def connects() -> bool:
        with suppress(FileNotFoundError, ConnectionRefusedError):
            found.append(connected(address))
        return bool(found)

    until_sync(connects)
    return found[0]


def answer(address: Any) -> bytes:
    """Send a byte, and return all that comes."""
    with connected(address) as client:
        client.sendall(b"x")
        return rest_of(client)


def rest_of(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65536), b""))


def take_terminal() -> None:
    """Make standard input the controlling terminal of this session."""
    hear_signals()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A terminal of 80 columns with a server in front of it."""

    def __init__(
        self,
        project: Path,
        *arguments: str,
        program: Sequence[str] = COMMAND,
        controlling: bool = False,
        **variables: str,
    ) -> None:
        self.screen = pyte.HistoryScreen(80, 30, history=1000)
        self._stream = pyte.ByteStream(self.screen)
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 80, 0, 0))
        self.process = subprocess.Popen(
            [*program, "serve", "app:once", "--bind", "unix:s", "--workers", "2", *arguments],
            cwd=project,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(
                **{"TERM": "xterm-256color", "PYTHONDONTWRITEBYTECODE": "1", **variables}
            ),
            start_new_session=controlling,
            preexec_fn=take_terminal if controlling else hear_signals,
        )
        os.close(slave)

    def read(self) -> bool:
        """Read what comes; False at its end."""
        if select.select([self._master], [], [], 0.05)[0]:
            try:
                data = os.read(self._master, 65536)
            except OSError:
                return False
            self._stream.feed(data)
        return True

    def shows(self, *texts: str) -> str:
        """Wait until those are on the screen; return all of it."""
        until_sync(lambda: self.read() and all(text in self.text() for text in texts))
        return self.text()

    def text(self) -> str:
        before = [
            "".join(line[column].data for column in range(80)).rstrip()
            for line in self.screen.history.top
        ]
        return "\n".join([*before, *(line.rstrip() for line in self.screen.display)])

    def end(self) -> str:
        while self.read():
            pass
        assert self.process.wait(60) == 0
        return self.text()

    def hang_up(self) -> None:
        """Close the terminal, as its window would."""
        os.close(self._master)
        self._master = -1

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self._master != -1:
            os.close(self._master)
