"""Wrong arguments: the error names the argument, and nothing has happened."""

from __future__ import annotations

import enum
import inspect
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from trio_unixconn import (
    CallbackAdapter,
    Credentials,
    PeerPolicy,
    UnixConnection,
    UnixCredentialsMessage,
    UnixFDList,
    UnixFDMessage,
    UnixListener,
    UnixSocketAddress,
    connection_pair,
    open_callback_adapter,
    open_unix_connection,
    open_unix_listener,
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


class Wrong:
    """No function takes this."""


# Arguments that are right, by name. In place of a socket, the test makes one.
RIGHT: dict[str, Any] = {
    "buffer": bytearray(1),
    "data": b"x",
    "fd": 0,
    "fds": [0],
    "max_bytes": 1,
    "max_fds": 1,
    "credentials": Credentials(),
    "handler": trio.sleep,
}
FUNCTIONS: list[Callable[..., Any]] = [
    *(getattr(UnixConnection, name) for name in dir(UnixConnection) if not name.startswith("_")),
    UnixListener,
    UnixListener.from_fd,
    open_unix_connection,
    open_unix_listener,
    serve_unix,
    CallbackAdapter.wrap,
    UnixFDMessage,
    UnixCredentialsMessage,
    Credentials,
    Credentials.from_native,
    UnixSocketAddress.from_native,
    UnixSocketAddress.path,
    UnixSocketAddress.abstract,
    UnixSocketAddress.from_any,
    UnixSocketAddress.from_uri,
    UnixFDList,
    UnixFDList.append,
    PeerPolicy,
]
# These pass their arguments on to the standard library's socket.
SKIPPED = {"getsockopt", "setsockopt"}
# Anything is true or false. "argument" is how errors call another argument.
SKIPPED_ARGUMENTS = {"task_status", "argument", "layout"}
ARGUMENTS = [
    pytest.param(function, name, id=f"{function.__qualname__}-{name}")
    for function in FUNCTIONS
    if inspect.isroutine(function) or inspect.isclass(function)
    for name, parameter in inspect.signature(function).parameters.items()
    if name not in {"self", *SKIPPED_ARGUMENTS}
    and function.__name__ not in SKIPPED
    and parameter.annotation != "bool"
]


@pytest.mark.parametrize(("function", "argument"), ARGUMENTS)
async def test_error_names_argument(
    function: Callable[..., Any], argument: str, tmp_path: Path
) -> None:
    """Each argument of each function, if it is wrong: the error names it, or what it must be."""
    one, two = connection_pair()
    connected, peer = socket.socketpair()
    with connected, peer, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "listening"))
        listening.listen()
        async with one, two, open_callback_adapter() as adapter:
            objects = {
                "UnixConnection": one,
                "CallbackAdapter": adapter,
                "UnixFDList": UnixFDList(),
            }
            sock = trio.socket.from_stdlib_socket(listening)
            right = {
                **RIGHT,
                "address": tmp_path / "socket",
                "socket": sock if function is UnixListener else two.socket,
                "sock": connected,
            }
            arguments: dict[str, Any] = {argument: Wrong()}
            for name, parameter in inspect.signature(function).parameters.items():
                if name == "self":
                    arguments[name] = objects[function.__qualname__.partition(".")[0]]
                elif parameter.default is parameter.empty:
                    arguments.setdefault(name, right.get(name))
            with pytest.raises((TypeError, ValueError)) as caught, trio.fail_after(30):
                result = function(**arguments)
                if inspect.isawaitable(result):
                    await result
            text = str(caught.value)
            assert "Wrong" in text
            assert argument in text or "expected a " in text
    assert [each.name for each in tmp_path.iterdir()] == ["listening"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda conn, data: conn.send_all(data), "data must be a contiguous buffer"),
        (lambda conn, data: conn.send_message(data), "data must be a contiguous buffer"),
        (lambda conn, data: conn.send_buffer(data), "data must be a contiguous buffer"),
        (lambda conn, data: conn.receive_into(data), "buffer must be a contiguous buffer"),
        (lambda conn, _: conn.receive_into(b"x"), "buffer must be writable, got bytes"),
    ],
)
async def test_error_names_buffer(
    call: Callable[[UnixConnection, memoryview], Awaitable[None]], message: str
) -> None:
    """A buffer with gaps, or one that cannot be written to, is rejected by its name."""
    one, two = connection_pair()
    async with one, two:
        with pytest.raises(TypeError, match=message):
            await call(one, memoryview(bytearray(4))[::2])


async def test_receive_message_and_receive_fds_with_subclasses_of_int() -> None:
    """A number may be an IntEnum."""

    class Number(enum.IntEnum):
        TWO = 2

    one, two = connection_pair()
    async with one, two:
        await one.send_message(b"12", fds=[0])
        with await two.receive_message(Number.TWO, max_fds=Number.TWO) as message:
            assert (message.data, len(message.fds)) == (b"12", 1)
        await one.send_fds([0, 0])
        with await two.receive_fds(Number.TWO) as fds:
            assert len(fds) == 2


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
    """A class is not an async function: it would return an instance."""
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
