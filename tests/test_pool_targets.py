"""What can be named as a handler, before any worker is started; and what is said of the dead."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
from helpers import until

from trio_unixconn.pool import open_worker_pool

if TYPE_CHECKING:
    from trio_unixconn.pool import Job, WorkerPool


async def hang(_: object, __: Job) -> None:
    """Keep everything else in this process from running; a worker runs this."""
    ctypes.PyDLL(None).pause()


def restarted(pool: WorkerPool, times: int) -> bool:
    return pool.statistics().restarts == times


async def test_open_worker_pool_rejects_main_module() -> None:
    """A handler in __main__ is refused, with a word on what to name instead."""
    with pytest.raises(ValueError, match=r'"program:handler" for program\.py'):
        async with open_worker_pool("__main__:handler", workers=1):
            pass


async def test_a_worker_that_hung_is_killed_once(caplog: pytest.LogCaptureFixture) -> None:
    """A worker that hung is killed, and is not found to hang again while another is started."""
    with trio.fail_after(60):
        async with open_worker_pool("test_pool_targets:hang", workers=1, hang_timeout=0.5) as pool:
            # Each death makes the pause before the next worker longer.
            for deaths in range(1, 4):
                await pool.submit(os.open(os.devnull, os.O_RDONLY))
                await until(partial(restarted, pool, deaths))
    said = [each for each in caplog.messages if "has not been heard of" in each]
    assert len(said) == 3
    assert {each.levelno for each in caplog.records} == {logging.WARNING}
