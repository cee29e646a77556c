"""The FUSE files of the tests: they hang and fail as the tests need it."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import threading

import pytest

from tests._helpers.fuse import file_with_failing_close, fuse_file, hanging_file
from tests._helpers.waiting import until_sync
from trio_unixconn import _closing


def test_fuse_file_answers() -> None:
    """A FUSE file can be read and looked at while its server answers."""
    with fuse_file() as file:
        assert os.read(file.fd, 7) == b"content"
        assert os.fstat(file.fd).st_size > 7
        fd = os.dup(file.fd)
        os.close(fd)
        assert "getattr" in file.asked()


@pytest.mark.parametrize("call", ["fstat", "poll", "close"])
def test_hanging_file_hangs_until_answered(call: str) -> None:
    """fstat, poll and close wait until the server answers."""
    with hanging_file() as file:
        fd = os.dup(file.fd)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        calls = {"fstat": lambda: os.fstat(fd), "poll": lambda: poll.poll(0),
                 "close": lambda: os.close(fd)}  # fmt: skip
        request = {"fstat": "getattr", "poll": "poll", "close": "flush"}[call]
        thread = threading.Thread(target=calls[call])
        thread.start()
        until_sync(lambda: request in file.asked())
        assert thread.is_alive()
        file.answer()
        thread.join(30)
        assert not thread.is_alive()
        if call != "close":
            os.close(fd)


def test_hanging_file_is_released_at_the_end() -> None:
    """The end of the block aborts what waits for the server."""
    errors: list[OSError] = []

    def look(fd: int) -> None:
        try:
            os.fstat(fd)
        except OSError as exc:
            errors.append(exc)

    with hanging_file() as file:
        thread = threading.Thread(target=look, args=[file.fd])
        thread.start()
        until_sync(lambda: "getattr" in file.asked())
        assert thread.is_alive()
    thread.join(30)
    assert [each.errno for each in errors] in ([errno.ECONNABORTED], [errno.ENOTCONN])


def test_hanging_file_is_not_asked_by_calls_that_cannot_block() -> None:
    """F_GET_SEALS, F_GETFD, F_GETFL, F_GETPIPE_SZ, SO_DOMAIN and fdinfo ask no file server."""
    with hanging_file() as file:
        for command in (1034, 1032):
            with pytest.raises(OSError):
                fcntl.fcntl(file.fd, command)
        assert fcntl.fcntl(file.fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
        assert fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        with pytest.raises(OSError):
            socket.socket(fileno=file.fd)
        with open(f"/proc/self/fdinfo/{file.fd}") as info:
            assert "mnt_id:" in info.read()
        assert os.readlink(f"/proc/self/fd/{file.fd}").endswith("/file")
        assert file.asked() == []


def test_file_with_failing_close_fails() -> None:
    """close(2) fails with EIO, and the descriptor is closed nevertheless."""
    with file_with_failing_close() as file:
        fd = os.dup(file.fd)
        with pytest.raises(OSError) as caught:
            os.close(fd)
        assert caught.value.errno == errno.EIO
        with pytest.raises(OSError):
            os.get_inheritable(fd)
        _closing.close_fds([os.dup(file.fd)])
        assert _closing.wait_closed(30)
        # The block itself closes the last one without an error: its server has ended.
