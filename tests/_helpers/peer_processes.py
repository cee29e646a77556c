"""Peers in processes of their own: as other users, in other namespaces, or exited."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests._helpers.processes import environment, program

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Iterator

# No user has this id, on any system.
OTHER_UID = 12345


def required(there: object, what: str) -> pytest.MarkDecorator:
    """Skip a test if something is missing; on CI the test runs anyway, and fails."""
    return pytest.mark.skipif(not there and "CI" not in os.environ, reason=what)


def kernel_has(option: int) -> bool:
    """Whether sockets of this kernel have the option."""
    one, two = socket.socketpair()
    with one, two:
        try:
            value = one.getsockopt(socket.SOL_SOCKET, option)
        except OSError:
            return False
    if option == SO_PEERPIDFD:
        os.close(value)
    return True


def can_unshare(*options: str) -> bool:
    """Whether unshare(1) works with these options."""
    try:
        done = subprocess.run(["unshare", *options, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


SO_PASSPIDFD = 76
SO_PEERPIDFD = 77
SO_PASSRIGHTS = 83
ROOT_OR_USER = [] if os.geteuid() == 0 else ["-Ur"]

as_root = required(os.geteuid() == 0, "only root can become another user")
peer_pidfds = required(kernel_has(SO_PEERPIDFD), "this kernel has no SO_PEERPIDFD (Linux 6.5)")
message_pidfds = required(kernel_has(SO_PASSPIDFD), "this kernel has no SO_PASSPIDFD (Linux 6.5)")
passrights = required(kernel_has(SO_PASSRIGHTS), "this kernel has no SO_PASSRIGHTS (Linux 6.16)")
user_namespaces = required(can_unshare("-Ur"), "no user namespaces can be made here")
pid_namespaces = required(
    can_unshare(*ROOT_OR_USER, "-pf", "--kill-child", "--mount-proc"),
    "no pid namespaces can be made here",
)
mount_namespaces = required(can_unshare("-m"), "no mount namespaces can be made here")


@contextmanager
def shared_directory() -> Iterator[Path]:
    """Make a directory that every user can enter; pytest's are private."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


@attrs.define
class PeerProcess:
    """A client in a process of its own.

    Attributes:
      pid: its pid; None if it could not connect. Then ``first_line`` is the reason.
    """

    process: subprocess.Popen[str]
    first_line: str = ""

    @property
    def pid(self) -> int | None:
        return int(self.first_line) if self.first_line.isdecimal() else None

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    async def read_line(self) -> str:
        """Wait for its next line of output."""
        with trio.fail_after(30):
            return await trio.to_thread.run_sync(self._line, abandon_on_cancel=True)

    async def ask(self, command: str) -> str:
        """Send a command, and return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return await self.read_line()

    async def end(self) -> None:
        """Make it exit, and wait for that; it is a zombie afterwards."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        with trio.fail_after(30):
            await trio.to_thread.run_sync(
                os.waitid, os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT
            )

    def reap(self) -> None:
        """Reap it; afterwards its pid is free."""
        self.process.wait(30)


@asynccontextmanager
async def client_process(
    path: str | os.PathLike[str],
    *,
    uid: int | None = None,
    gid: int | None = None,
    groups: Iterable[int] | None = None,
    under: Iterable[str] = (),
) -> AsyncGenerator[PeerProcess, None]:
    """Connect to ``path`` in another process, as this user unless the arguments say otherwise."""
    user = ["-" if each is None else str(each) for each in (uid, gid)]
    user.append("-" if groups is None else ",".join(map(str, groups)))
    process = subprocess.Popen(
        [*under, *program("connecting_client", str(path), *user)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            peer = PeerProcess(process)
            peer.first_line = await peer.read_line()
            with trio.fail_after(60):
                yield peer
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)


@asynccontextmanager
async def reporting_process(
    how: str, path: str | os.PathLike[str], *, uid: str = "-", under: Iterable[str] = ()
) -> AsyncGenerator[subprocess.Popen[str], None]:
    """Start peers/identity_reporter.py: it reports its peer, and exits after it."""
    process = subprocess.Popen(
        [*under, *program("identity_reporter", how, str(path), uid)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    with process:
        try:
            with trio.fail_after(60):
                yield process
            # It exits by itself, so that coverage is written.
            process.wait(30)
        finally:
            process.kill()


async def report_of(process: subprocess.Popen[str]) -> Any:
    """Return the report of a process."""
    return json.loads(await PeerProcess(process).read_line())


def unshared(*options: str, then: str = "") -> list[str]:
    """Return the command that starts another one in namespaces of its own.

    Args:
      then: the shell commands to run in them first.
    """
    command = ["unshare", *options]
    return [*command, "sh", "-c", f'{then}exec "$@"', "sh"] if then else command


def in_pid_namespace(*options: str) -> list[str]:
    """Return the command that starts another one as the first process of a pid namespace."""
    return unshared(*ROOT_OR_USER, "-pf", "--kill-child", *options)
