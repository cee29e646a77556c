"""Peers that are other users, end, or stand in other namespaces."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from helpers import PEERS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Iterator

ROOT = Path(__file__).parent.parent
# Nobody's, on any system.
STRANGER = 12345


def needed(there: object, what: str) -> pytest.MarkDecorator:
    """Skip a test if something is not there; on CI, where everything must be, it fails then."""
    return pytest.mark.skipif(not there and "CI" not in os.environ, reason=what)


def kernel_has(option: int) -> bool:
    """Whether sockets here have this option."""
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
    """Whether namespaces like these can be made."""
    try:
        done = subprocess.run(["unshare", *options, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


SO_PASSPIDFD = 76
SO_PEERPIDFD = 77
SO_PASSRIGHTS = 83
ROOT_OR_USER = [] if os.geteuid() == 0 else ["-Ur"]

as_root = needed(os.geteuid() == 0, "only root can become another user")
peer_pidfds = needed(kernel_has(SO_PEERPIDFD), "this kernel has no SO_PEERPIDFD (Linux 6.5)")
message_pidfds = needed(kernel_has(SO_PASSPIDFD), "this kernel has no SO_PASSPIDFD (Linux 6.5)")
passrights = needed(kernel_has(SO_PASSRIGHTS), "this kernel has no SO_PASSRIGHTS (Linux 6.16)")
user_namespaces = needed(can_unshare("-Ur"), "no user namespaces can be made here")
pid_namespaces = needed(
    can_unshare(*ROOT_OR_USER, "-pf", "--kill-child", "--mount-proc"),
    "no pid namespaces can be made here",
)
mount_namespaces = needed(can_unshare("-m"), "no mount namespaces can be made here")


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Make a folder that every user can look into; those of pytest are ours alone."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@attrs.define
class Person:
    """A client in a process of its own.

    Attributes:
      pid: its pid; None if it could not connect, and ``said`` is why.
    """

    process: subprocess.Popen[str]
    said: str = ""

    @property
    def pid(self) -> int | None:
        return int(self.said) if self.said.isdecimal() else None

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    async def listen_to(self) -> str:
        """Wait for the next line that it says."""
        with trio.fail_after(30):
            return await trio.to_thread.run_sync(self._line, abandon_on_cancel=True)

    async def ask(self, command: str) -> str:
        """Have it do something."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return await self.listen_to()

    async def end(self) -> None:
        """Have it end, and wait for that; it is a zombie then."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        with trio.fail_after(30):
            await trio.to_thread.run_sync(
                os.waitid, os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT
            )

    def reap(self) -> None:
        """Reap it; from now on its pid is free."""
        self.process.wait(30)


@asynccontextmanager
async def person(
    path: str | os.PathLike[str],
    *,
    uid: int | None = None,
    gid: int | None = None,
    groups: Iterable[int] | None = None,
    under: Iterable[str] = (),
) -> AsyncGenerator[Person, None]:
    """Have somebody connect to ``path``; unlike the arguments, as who we are."""
    user = ["-" if each is None else str(each) for each in (uid, gid)]
    user.append("-" if groups is None else ",".join(map(str, groups)))
    process = subprocess.Popen(
        [*under, sys.executable, str(PEERS / "person.py"), str(path), *user],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            someone = Person(process)
            someone.said = await someone.listen_to()
            with trio.fail_after(60):
                yield someone
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)


@asynccontextmanager
async def looker(
    how: str, path: str | os.PathLike[str], *, uid: str = "-", under: Iterable[str] = ()
) -> AsyncGenerator[subprocess.Popen[str], None]:
    """Have a process look at its peer (see peers/looker.py), which ends when its peer does."""
    process = subprocess.Popen(
        [*under, sys.executable, str(PEERS / "looker.py"), how, str(path), uid],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    with process:
        try:
            with trio.fail_after(60):
                yield process
            # By itself, so that what it ran is counted as covered.
            process.wait(30)
        finally:
            process.kill()


async def seen_by(process: subprocess.Popen[str]) -> Any:
    """Return what a looker sees."""
    return json.loads(await Person(process).listen_to())


def unshared(*options: str, then: str = "") -> list[str]:
    """Return the command that starts others in namespaces of their own.

    Args:
      then: what a shell does in them first.
    """
    command = ["unshare", *options]
    return [*command, "sh", "-c", f'{then}exec "$@"', "sh"] if then else command


def in_a_container(*options: str) -> list[str]:
    """Return the command that starts others as the first process of a pid namespace."""
    return unshared(*ROOT_OR_USER, "-pf", "--kill-child", *options)
