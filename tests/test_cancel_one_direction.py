"""A Cancellable that fires ends its own wait, and not that of the other direction."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_unixconn import Cancellable, OperationCancelled, connection_pair

SIZE = 4 * 1024 * 1024


async def test_a_sender_waits_on() -> None:
    """A sender that waits for room is not ended by the Cancellable of a receiver beside it."""
    one, two = connection_pair()
    cancellable = Cancellable()

    async def receive() -> None:
        with pytest.raises(OperationCancelled):
            await one.receive_fd(cancellable)

    async with one, two, trio.open_nursery() as nursery:
        nursery.start_soon(one.send_all, bytes(SIZE))
        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        cancellable.cancel()
        await wait_all_tasks_blocked()
        left = SIZE
        with trio.fail_after(30):
            while left:
                left -= len(await two.receive_some())
