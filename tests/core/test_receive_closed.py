"""A receive on a connection that is closed meanwhile, at whichever step."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_unixconn import (
    Cancellable,
    ConnectionClosedError,
    UnixConnection,
    connection_pair,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

RECEIVES: dict[str, Callable[[UnixConnection], Awaitable[Any]]] = {
    "receive_fd": lambda conn: conn.receive_fd(),
    "receive_fd(cancellable)": lambda conn: conn.receive_fd(Cancellable()),
    "receive_fds": lambda conn: conn.receive_fds(9),
    "fds": lambda conn: anext(conn.fds()),
    "receive_message": lambda conn: conn.receive_message(9, credentials=True),
    "receive_credentials": lambda conn: conn.receive_credentials(),
    "receive_some": lambda conn: conn.receive_some(),
    "receive_into": lambda conn: conn.receive_into(bytearray(9)),
}


async def aclose(conn: UnixConnection) -> None:
    await conn.aclose()


async def detach(conn: UnixConnection) -> None:
    os.close(conn.detach())


async def close_socket(conn: UnixConnection) -> None:
    conn.socket.close()


@pytest.mark.parametrize("close", [aclose, detach, close_socket])
@pytest.mark.parametrize("receive", RECEIVES.values(), ids=RECEIVES)
@pytest.mark.parametrize("arrives", [False, True])
@pytest.mark.parametrize("waits", [False, True])
async def test_receive_on_a_connection_that_is_closed(
    receive: Callable[[UnixConnection], Awaitable[Any]],
    close: Callable[[UnixConnection], Awaitable[None]],
    *,
    arrives: bool,
    waits: bool,
) -> None:
    """It returns what has arrived, or raises ConnectionClosedError; no other one is affected."""
    # Trio runs tasks of the same batch in random order.
    for _ in range(10):
        one, two = connection_pair()

        async def read(conn: UnixConnection = two) -> None:
            # What another kind of receive makes of the message is not the question.
            with suppress(ConnectionClosedError, ValueError):
                got = await receive(conn)
                if isinstance(got, int) and got > 2:
                    os.close(got)
                elif hasattr(got, "close"):
                    got.close()

        async with one, two:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                if waits:
                    await wait_all_tasks_blocked()
                if arrives:
                    await one.send_fd(0)
                nursery.start_soon(close, two)
            assert two.is_closed()
            with pytest.raises(ConnectionClosedError):
                await receive(two)
            three, four = connection_pair()
            async with three, four, trio.open_nursery() as nursery:
                nursery.start_soon(RECEIVES["receive_some"], four)
                await wait_all_tasks_blocked()
                await three.send_all(b"x")
