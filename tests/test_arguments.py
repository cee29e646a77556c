"""Wrong arguments: the error names the argument, and nothing has happened."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from trio_unixconn import (
    PeerPolicy,
    UnixConnection,
    UnixFDList,
    connection_pair,
    open_unix_connection,
    serve_unix,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

CALLS: list[tuple[Callable[[Any], Awaitable[object]], str]] = [
    (lambda conn: conn.receive_fds("8"), "max_fds must be an int, got str"),
    (lambda conn: conn.receive_message("8"), "max_bytes must be an int, got str"),
    (lambda conn: conn.receive_message(8, max_fds="1"), "max_fds must be an int, got str"),
    (lambda conn: conn.receive_buffer("8"), "max_bytes must be an int, got str"),
    (lambda conn: conn.send_fds([0], per_message="x"), "per_message must be an int, got str"),
    (lambda conn: conn.send_message("x"), "data must be a bytes-like object, got str"),
    (lambda conn: conn.send_all("x"), "data must be a bytes-like object, got str"),
    (lambda conn: conn.receive_into(3), "buffer must be a bytes-like object, got int"),
]


@pytest.mark.parametrize(("call", "message"), CALLS, ids=[message for _, message in CALLS])
async def test_wrong_type(
    call: Callable[[UnixConnection], Awaitable[object]], message: str
) -> None:
    """A method of a connection names the argument and the type; the connection is usable."""
    one, two = connection_pair()
    async with one, two:
        with pytest.raises(TypeError, match=message):
            await call(one)
        await two.send_all(b"x")
        await one.send_all(b"y")
        assert (await one.receive_some(), await two.receive_some()) == (b"x", b"y")


async def test_fds_with_a_wrong_read_ahead() -> None:
    """fds() names read_ahead."""
    one, two = connection_pair()
    async with one, two:
        with pytest.raises(TypeError, match="read_ahead must be an int, got str"):
            one.fds(read_ahead="x")  # type: ignore[arg-type]


async def test_open_unix_connection_with_a_wrong_local_address(tmp_path: Path) -> None:
    """open_unix_connection() says which of the two addresses is wrong."""
    with pytest.raises(TypeError, match=r"local_address must be a str, .* got int"):
        await open_unix_connection(tmp_path / "x", local_address=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_connections": "3"}, "max_connections must be an int, got str"),
        ({"max_connections": 2.5}, "max_connections must be an int, got float"),
        ({"handler": 3}, "handler must be an async function, got int"),
    ],
)
async def test_serve_unix_with_a_wrong_argument(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """serve_unix() does not bind the path."""
    handler = options.pop("handler", trio.sleep)
    with pytest.raises(TypeError, match=message):
        await partial(serve_unix, handler, tmp_path / "socket", **options)()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fds", "error", "message"),
    [
        (5, TypeError, "fds must be an iterable of file descriptors, got int"),
        ([2**40], ValueError, "file descriptor is out of range"),
    ],
)
def test_unix_fd_list_with_a_wrong_argument(fds: Any, error: type[Exception], message: str) -> None:
    """UnixFDList() owns nothing if one of them cannot be a file descriptor."""
    with pytest.raises(error, match=message):
        UnixFDList(fds)


def test_policy_check_that_is_a_class() -> None:
    """A class is no async function: it would return an instance."""
    with pytest.raises(TypeError, match="got the class bool"):
        PeerPolicy(check=bool)  # type: ignore[arg-type]


async def test_policy_check_that_finds_no_process() -> None:
    """A check that gets ProcessLookupError, from kill(2) for instance, denies the peer."""

    async def check(_: object) -> bool:
        raise ProcessLookupError

    one, two = connection_pair()
    async with one, two:
        with one.get_peer_identity() as peer:
            assert not await PeerPolicy(check=check).admits(peer)
