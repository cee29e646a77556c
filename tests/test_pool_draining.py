"""A handler is told that its worker is to end."""

from __future__ import annotations

import pytest
from pools import client_of

from trio_unixconn.pool import open_worker_pool

pytestmark = pytest.mark.usefixtures("no_child_left")


async def test_a_handler_knows_that_its_worker_is_to_end() -> None:
    """job.draining is set when the pool drains, so that what waits for it comes to an end."""
    async with (
        open_worker_pool("pool_handlers:until_draining", workers=1) as pool,
        client_of(pool) as client,
    ):
        assert await client.stream.receive_some(5) == b"waits"
        await pool.drain(timeout=60)
        assert await client.stream.receive_some() == b", ends"
    assert pool.statistics().handled == 1
