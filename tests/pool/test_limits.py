"""Jobs of a pool while a limit of the system is exhausted."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from tests._helpers.pool import null, send_batches_by_tasks
from trio_unixconn import SendError, UnixConnection
from trio_unixconn.pool import open_worker_pool


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOBUFS, errno.ETOOMANYREFS])
async def test_call_retries_while_a_limit_is_exhausted(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that could not be sent because of a limit is sent again, and no worker is lost."""
    real = UnixConnection.send_message
    refusals = [number] * 2

    async def send_message(self: UnixConnection, data: Any, **options: Any) -> None:
        if options.get("fds") and refusals:
            number = refusals.pop()
            raise SendError(number, os.strerror(number))
        await real(self, data, **options)

    monkeypatch.setattr(UnixConnection, "send_message", send_message)
    send_batches_by_tasks(monkeypatch)
    async with open_worker_pool("tests._helpers.pool_handlers:copy", workers=1) as pool:
        with open(null()) as file:
            assert await pool.call(file) == b""
        assert pool.statistics().handled == 1
    assert refusals == []
