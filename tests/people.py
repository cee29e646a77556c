"""Peers that are other users, end, or stand in other namespaces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import attrs
import pytest
import trio
from helpers import PEERS

ROOT = Path(__file__).parent.parent
# Nobody's, on any system.
STRANGER = 12345


def unable(reason: str) -> NoReturn:
    """Skip a test; on CI, where everything must be there, fail it."""
    (pytest.fail if "CI" in os.environ else pytest.skip)(reason)
    raise AssertionError


def as_root() -> None:
    """Skip the test unless this process can become others."""
    if os.geteuid() != 0:
        unable("only root can become another user")


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
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with process:
        try:
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
    command = [shutil.which("unshare") or unable("there is no unshare(1)"), *options]
    done = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        unable(f"namespaces cannot be made here: {done.stderr.strip()}")
    return [*command, "sh", "-c", f'{then}exec "$@"', "sh"] if then else command
