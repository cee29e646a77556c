"""Open one file of each kind, and send it over a new connection: helpers of tests."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from trio_unixconn import DescriptorKind, UnixConnection, connection_pair

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

KIND = DescriptorKind
KINDS = [each for each in KIND if each not in (KIND.BLOCK_DEVICE, KIND.SYMBOLIC_LINK)]


def opened(path: Path | str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC)


def of_kind(kind: DescriptorKind) -> int:
    """Open a file of that kind for reading."""
    if kind is KIND.REGULAR_FILE:
        return os.memfd_create("regular")
    if kind is KIND.DIRECTORY:
        return opened("/", os.O_RDONLY)
    if kind is KIND.PIPE:
        read, write = os.pipe()
        os.close(write)
        return read
    if kind is KIND.SOCKET:
        return socket.socket().detach()
    if kind is KIND.CHARACTER_DEVICE:
        return opened(os.devnull, os.O_RDONLY)
    return os.eventfd(0)


async def pass_on(fd: int, receive: Callable[[UnixConnection], Awaitable[Any]]) -> Any:
    """Send a descriptor, which is closed, and receive it; the connection must stay in step."""
    one, two = connection_pair()
    async with one, two:
        await one.send_fd(fd)
        os.close(fd)
        await one.send_fd(0)
        try:
            return await receive(two)
        finally:
            got = await two.receive_fd()
            assert os.path.sameopenfile(got, 0)
            os.close(got)
