"""UnixFDList and Message without blocking the event loop: aclose() and open_file()."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import trio

from tests._helpers.fuse import hanging_file
from tests._helpers.waiting import until
from tests.core.test_closing import is_open, lingering_socket, release_lingering
from trio_unixconn import (
    Cancellable,
    OperationCancelled,
    UnixFDList,
    WrongDescriptorKindError,
    _closing,
    connection_pair,
)


def lingering_fds() -> list[int]:
    return [lingering_socket(60).detach()]


async def test_unix_fd_list_aclose_does_not_block() -> None:
    """The closing thread waits for a lingering socket; the event loop does not."""
    async with UnixFDList(lingering_fds()) as fds:
        assert len(fds) == 1
    assert len(fds) == 0
    assert not _closing.wait_closed(0)
    release_lingering()
    await fds.aclose()


async def test_unix_fd_list_aclose_if_cancelled() -> None:
    """A cancelled aclose() closes, too, and leaves alone what was taken out."""
    fds = UnixFDList(os.pipe())
    kept = fds.take(0)
    (other,) = fds
    with trio.CancelScope() as scope:
        scope.cancel()
        await fds.aclose()
    assert scope.cancelled_caught
    assert _closing.wait_closed(30)
    assert is_open(kept)
    assert not is_open(other)
    os.close(kept)


async def test_message_aclose_does_not_block() -> None:
    """``async with`` of a message closes what a peer has sent, in the closing thread."""
    one, two = connection_pair()
    async with one, two:
        with socket.socket(fileno=lingering_fds()[0]) as sent:
            await one.send_message(b"x", fds=[sent])
        async with await two.receive_message(1) as message:
            assert len(message.fds) == 1
        assert not _closing.wait_closed(0)
    release_lingering()


async def test_unix_fd_list_open_file(tmp_path: Path) -> None:
    """The file owns the descriptor, and the list does not any more."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    with UnixFDList([os.open(path, os.O_RDONLY)]) as fds:
        with await fds.open_file(0) as file:
            assert file.read() == b"content"
        with pytest.raises(ValueError, match="taken"):
            await fds.open_file(0)


async def test_unix_fd_list_open_file_if_cancelled() -> None:
    """A memfd is opened without a thread; open_file() is a checkpoint nevertheless."""
    with UnixFDList([os.memfd_create("x")]) as fds:
        given = list(fds)
        with trio.CancelScope() as scope:
            scope.cancel()
            await fds.open_file(0)
        assert scope.cancelled_caught
        assert list(fds) == given


async def test_unix_fd_list_open_file_of_a_hanging_file_cancelled_by_a_scope() -> None:
    """The thread closes the descriptor when the file server answers; the list has it no more."""
    with hanging_file() as file:
        fd = os.dup(file.fd)
        fds = UnixFDList([fd])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fds.open_file, 0)
            await until(lambda: "getattr" in file.asked())
            nursery.cancel_scope.cancel()
        assert list(fds) == []
        fds.close()
        file.answer()
        await until(lambda: not is_open(fd))


@pytest.mark.parametrize("wrong", [5, None, "ab", b"ab", bytearray(b"ab"), memoryview(b"ab")])
def test_unix_fd_list_rejects_what_has_no_file_descriptors(wrong: Any) -> None:
    """The TypeError names the argument; a byte of bytes is not taken for a file descriptor."""
    with pytest.raises(TypeError, match=r"^fds must be an iterable of file descriptors, got "):
        UnixFDList(wrong)


async def test_unix_fd_list_open_file_rejects_another_kind() -> None:
    """The list still owns a descriptor of another kind; wrong arguments are named."""
    with UnixFDList(os.pipe()) as fds:
        with pytest.raises(WrongDescriptorKindError):
            await fds.open_file(0)
        with pytest.raises(ValueError, match="mode"):
            await fds.open_file(0, "x")
        assert len(list(fds)) == 2


async def test_unix_fd_list_open_file_of_a_hanging_file() -> None:
    """A file server that does not answer keeps only this task waiting, until it is cancelled."""
    with hanging_file() as file:
        cancellable = Cancellable()

        async def cancel() -> None:
            await until(lambda: "getattr" in file.asked())
            cancellable.cancel()

        fd = os.dup(file.fd)
        fds = UnixFDList([fd])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel)
            with pytest.raises(OperationCancelled):
                await fds.open_file(0, cancellable=cancellable)
        assert list(fds) == []
        fds.close()
        file.answer()
        await until(lambda: not is_open(fd))
