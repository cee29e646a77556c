"""job.draining: a handler knows that its worker drains."""

from __future__ import annotations

import pytest

from tests._helpers.pool import client_of
from trio_unixconn.pool import open_worker_pool

pytestmark = pytest.mark.usefixtures("no_child_left")


async def test_draining_is_set_when_the_pool_drains() -> None:
    """job.draining is set when the pool drains, so that a handler can stop waiting."""
    async with (
        open_worker_pool("tests._helpers.pool_handlers:until_draining", workers=1) as pool,
        client_of(pool) as client,
    ):
        assert await client.stream.receive_some(5) == b"waits"
        await pool.drain(timeout=60)
        assert await client.stream.receive_some() == b", ends"
    assert pool.statistics().handled == 1
