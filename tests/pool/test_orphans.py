"""Workers exit with the process of their pool, even if another process holds its sockets."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest
import trio

from tests._helpers.environment import environment
from tests._helpers.users import NOBODY
from trio_unixconn.pool import open_worker_pool

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio_unixconn.pool import Job

PR_GET_PDEATHSIG = 2
# A pool whose process has a child process that does nothing, and holds all that was open.
FORKING = """
import os, trio
from trio_unixconn.pool import open_worker_pool

async def main():
    async with open_worker_pool("tests.pool.test_orphans:death_signal", workers=2) as pool:
        if os.fork() == 0:
            os.read(0, 1)
            os._exit(0)
        print(*[each.pid for each in pool.statistics().workers], flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@asynccontextmanager
async def as_nobody() -> AsyncGenerator[None, None]:
    """Become another user; a worker runs this."""
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    yield


async def death_signal(_: object, __: Job) -> bytes:
    """Return the signal that the kernel sends after the pool's death; a worker runs this."""
    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(number))
    return signal.Signals(number.value).name.encode()


async def test_watch_pool_with_fork_of_pool() -> None:
    """Workers exit when their pool is killed, even if a child of it holds their sockets."""
    process = subprocess.Popen(
        [sys.executable, "-c", FORKING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    )
    with process:
        assert process.stdout is not None
        assert process.stdin is not None
        pids = (await trio.to_thread.run_sync(process.stdout.readline)).split()
        assert len(pids) == 2
        pidfds = [os.pidfd_open(int(each)) for each in pids]
        process.kill()
        try:
            with trio.fail_after(30):
                for pidfd in pidfds:
                    await trio.lowlevel.wait_readable(pidfd)
        finally:
            for pidfd in pidfds:
                os.close(pidfd)
            process.stdin.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_exit_with_parent_as_another_user() -> None:
    """A worker whose setup makes it another user still gets the signal of its pool's death."""
    with trio.fail_after(60):
        async with open_worker_pool(
            "tests.pool.test_orphans:death_signal",
            workers=1,
            setup="tests.pool.test_orphans:as_nobody",
        ) as pool:
            assert await pool.call() == b"SIGTERM"


# A pool whose handler has started a process.
PARENT = """
import sys, trio
from trio_unixconn.pool import open_worker_pool

async def main():
    options = {"workers": 1, "kill_process_group": True}
    async with open_worker_pool("tests.pool.test_orphans:start_child", **options) as pool:
        print((await pool.call()).decode(), flush=True)
        if sys.argv[1] == "busy":
            await pool.submit(0, data=b"busy")
        await trio.sleep_forever()

trio.run(main)
"""


async def start_child(_: object, job: Job) -> bytes:
    """Start a process that outlives this one unless it is killed; a worker runs this."""
    if job.data:
        # Without a checkpoint, so that the worker cannot drain.
        time.sleep(1000)
    child = subprocess.Popen(["sleep", "1000"])
    return b"%d" % child.pid


@pytest.mark.parametrize("state", ["idle", "busy"])
async def test_kill_process_group_of_orphan(state: str) -> None:
    """With kill_process_group, a worker whose pool was killed kills its process group itself."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, state],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        child = int(await trio.to_thread.run_sync(process.stdout.readline))
        pidfd = os.pidfd_open(child)
        try:
            process.kill()
            with trio.fail_after(30):
                await trio.lowlevel.wait_readable(pidfd)
        finally:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
