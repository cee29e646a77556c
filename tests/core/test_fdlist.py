"""UnixFDList: a file descriptor in a list is closed by the list, unless it was taken out."""

from __future__ import annotations

import errno
import gc
import os
import re
import socket
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from typing import Any

import pytest

from tests._helpers.fds import free_descriptors
from tests._helpers.fuse import file_with_failing_close, hanging_file
from tests._helpers.peers import stdlib_peer
from tests._helpers.waiting import until_sync
from trio_unixconn import (
    DescriptorKind,
    UnixConnection,
    UnixFDList,
    WrongDescriptorKindError,
    _closing,
    connection_pair,
)


def some(count: int) -> list[int]:
    """Open that many memfds, whose sizes are 0, 1, 2 and so on."""
    fds: list[int] = []
    for size in range(count):
        fds.append(os.memfd_create("some"))
        os.ftruncate(fds[-1], size)
    return fds


def is_open(fd: int) -> bool:
    try:
        os.get_inheritable(fd)
    except OSError:
        return False
    return True


def test_append_duplicates() -> None:
    """append() returns the position of a duplicate; the original stays the caller's."""
    with UnixFDList() as fds, tempfile.TemporaryFile() as file:
        assert fds.append(file.fileno()) == 0
        assert fds.append(file.fileno()) == 1
        assert fds[0] != fds[1] != file.fileno()
        assert os.path.sameopenfile(fds[1], file.fileno())
        assert not os.get_inheritable(fds[0])


def test_get_duplicates() -> None:
    """get() gives a duplicate that is the caller's; the list keeps its own."""
    with UnixFDList(some(1)) as fds:
        fd = fds.get(0)
        assert fd != fds[0]
        assert os.path.sameopenfile(fd, fds[0])
        assert not os.get_inheritable(fd)
    assert is_open(fd)
    os.close(fd)


def test_append_take_owns() -> None:
    """append_take() adds the descriptor itself, which the list closes."""
    given = some(2)
    with UnixFDList() as fds:
        assert [fds.append_take(fd) for fd in given] == [0, 1]
        assert list(fds) == given
    assert not any(map(is_open, given))


def test_peek_leaves_the_descriptor() -> None:
    """peek() returns the number of one descriptor, which stays the list's."""
    with UnixFDList(given := some(2)) as fds:
        assert (fds.peek(0), fds.peek(1), fds.peek(-1)) == (given[0], given[1], given[1])
        assert list(fds) == given
    assert not any(map(is_open, given))


def test_lookup_of_any_position() -> None:
    """lookup() returns -1 for a position that is out of range or was taken out, as GLib 2.90."""
    with UnixFDList(given := some(3)) as fds:
        os.close(fds.take(1))
        found = [fds.lookup(index) for index in range(-4, 4)]
        assert found == [-1, -1, -1, -1, given[0], -1, given[2], -1]
        assert fds.lookup(2**70) == fds.lookup(-(2**70)) == -1
        with pytest.raises(TypeError):
            fds.lookup("0")  # type: ignore[arg-type]


def test_peek_fds_leaves_all() -> None:
    """peek_fds() returns the numbers; changing what it returned changes nothing."""
    with UnixFDList(some(3)) as fds:
        peeked = fds.peek_fds()
        assert peeked == list(fds)
        assert len(peeked) == fds.get_length() == 3
        peeked.clear()
        assert fds.get_length() == 3


def test_steal_fds_takes_all() -> None:
    """steal_fds() takes out all that were not taken out before, and leaves the list empty."""
    with UnixFDList(given := some(3)) as fds:
        taken = fds.take(1)
        stolen = fds.steal_fds()
        assert (taken, stolen) == (given[1], [given[0], given[2]])
        assert (fds.get_length(), fds.steal_fds()) == (0, [])
    for fd in given:
        assert is_open(fd)
        os.close(fd)


def test_new_from_array_owns() -> None:
    """new_from_array() owns the descriptors themselves, not duplicates."""
    given = some(2)
    with UnixFDList.new_from_array(given) as fds:
        assert list(fds) == given
    assert not any(map(is_open, given))


def test_positions_of_getitem_get_and_take() -> None:
    """Length, iteration, indexes from both ends, truth."""
    with UnixFDList(given := some(3)) as fds:
        assert fds
        assert len(fds) == 3
        assert list(fds) == given == [fds[0], fds[1], fds[2]]
        assert [fds[-3], fds[-2], fds[-1]] == given
        for bad in (3, -4):
            for method in (
                fds.__getitem__,
                fds.get,
                fds.peek,
                fds.take,
                fds.take_file,
                fds.take_socket,
            ):
                with pytest.raises(IndexError):
                    method(bad)
        with pytest.raises(TypeError):
            fds["0"]  # type: ignore[index]
        assert list(fds) == given
    assert not fds
    assert len(fds) == 0


@pytest.mark.parametrize("index", [1, -2])
def test_take_leaves_a_gap(index: int) -> None:
    """take() takes out one, only once; the others keep their positions."""
    with UnixFDList(given := some(3)) as fds:
        assert fds.take(index) == given[1]
        assert len(fds) == 3
        assert list(fds) == [given[0], given[2]] == fds.peek_fds()
        assert fds[2] == given[2]
        for method in (fds.take, fds.get, fds.peek, fds.take_file, fds.take_stream):
            with pytest.raises(ValueError, match=f"position {index} was already taken out"):
                method(index)
    assert [is_open(fd) for fd in given] == [False, True, False]
    os.close(given[1])


def test_take_file() -> None:
    """take_file() returns a Python file that owns the descriptor, in the mode asked for."""
    with UnixFDList(given := some(2)) as fds:
        with fds.take_file(1, "r+b") as file:
            assert file.fileno() == given[1]
            assert file.read() == b"\0"
            assert file.write(b"more") == 4
        with fds.take_file(-2, "w") as text:
            assert text.write("text") == 4
        assert list(fds) == []
    assert not any(map(is_open, given))


def test_take_file_rejects_other_kinds_and_modes() -> None:
    """Another kind of file or access, or a wrong argument: the list still owns it."""
    read, write = os.pipe()
    path = os.open("/", os.O_RDONLY)
    null = os.open(os.devnull, os.O_RDONLY)
    with UnixFDList([read, write, path, null]) as fds:
        for index, kind in enumerate([DescriptorKind.PIPE] * 2 + [DescriptorKind.DIRECTORY]):
            with pytest.raises(WrongDescriptorKindError, match=f"got a {kind.value}$") as caught:
                fds.take_file(index)
            assert caught.value.kind is kind
        with pytest.raises(WrongDescriptorKindError, match="got one open only for reading"):
            fds.take_file(3, "wb", kinds=[DescriptorKind.CHARACTER_DEVICE])
        with pytest.raises(ValueError, match="mode must be"):
            fds.take_file(3, "rw")
        with pytest.raises(TypeError, match="mode must be a str"):
            fds.take_file(3, 5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="kinds must contain at least one"):
            fds.take_file(3, kinds=())
        assert list(fds) == [read, write, path, null]
        with fds.take_file(0, kinds=[DescriptorKind.PIPE, DescriptorKind.SOCKET]) as file:
            os.write(write, b"x")
            assert file.read(1) == b"x"


async def test_take_socket() -> None:
    """take_socket() returns a trio socket that owns the descriptor; a file stays the list's."""
    one, two = socket.socketpair()
    with two, UnixFDList([one.detach(), *some(1)]) as fds:
        with pytest.raises(WrongDescriptorKindError, match="expected a socket, got a regular file"):
            fds.take_socket(1)
        with fds.take_socket(0) as sock:
            assert sock.family == socket.AF_UNIX
            two.send(b"x")
            assert await sock.recv(1) == b"x"
        assert len(list(fds)) == 1


async def test_take_stream() -> None:
    """take_stream() returns a connection that owns the descriptor; others stay the list's."""
    one, two = socket.socketpair()
    datagram, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    given = [one.detach(), datagram.detach(), socket.socket().detach(), *some(1)]
    with two, other, UnixFDList(given) as fds:
        for index in (1, 2, 3):
            with pytest.raises(WrongDescriptorKindError, match="stream socket, got"):
                fds.take_stream(index)
        async with fds.take_stream(-4) as stream:
            assert isinstance(stream, UnixConnection)
            two.send(b"x")
            assert await stream.receive_some() == b"x"
        assert list(fds) == given[1:]


def test_close_twice() -> None:
    """A second close() does not close new files that have the old numbers."""
    fds = UnixFDList(given := some(2))
    fds.close()
    assert not any(map(is_open, given))
    again = some(2)
    assert again == given
    fds.close()
    assert all(map(is_open, again))
    UnixFDList(again).close()


def test_context_manager_closes() -> None:
    """A with block returns the list itself, and closes it even if the block raises."""
    given = some(2)
    fds = UnixFDList(given)
    with pytest.raises(ZeroDivisionError), fds as entered:
        assert entered is fds
        raise ZeroDivisionError
    assert not any(map(is_open, given))


def test_close_of_a_descriptor_that_is_closed_already() -> None:
    """A descriptor that other code closed does not keep the others open."""
    fds = UnixFDList(given := some(3))
    os.close(given[0])
    with suppress(OSError):
        fds.close()
    still_open = [fd for fd in given if is_open(fd)]
    for fd in still_open:
        os.close(fd)
    assert still_open == []


def test_close_raises_the_first_error_after_closing_all() -> None:
    """An EIO of close(2) is raised when all descriptors are closed, even if a second fails."""
    with file_with_failing_close() as file:
        fds = UnixFDList()
        fds.append(file.fd)
        given = [*fds, *some(1), os.dup(file.fd), *some(1)]
        for fd in given[1:]:
            fds.append_take(fd)
        with pytest.raises(OSError) as caught:
            fds.close()
        assert caught.value.errno == errno.EIO
        assert not any(map(is_open, given))
        assert len(fds) == 0


def test_del_closes_and_warns() -> None:
    """A list that is collected closes its descriptors, and warns with their numbers."""
    given = some(2)
    fds = UnixFDList(given)
    os.close(fds.take(0))
    text = rf"^unclosed UnixFDList: file descriptors \[{given[1]}\]$"
    with pytest.warns(ResourceWarning, match=text):
        del fds
    assert _closing.wait_closed(30)
    assert not any(map(is_open, given))


def test_del_of_an_empty_list() -> None:
    """A list that was closed, or has only gaps, is collected without a warning."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fds = UnixFDList(some(1))
        os.close(fds.take(0))
        del fds
        closed = UnixFDList(some(1))
        closed.close()
        del closed
        gc.collect()
    assert said == []


@pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning")
def test_del_closes_even_if_the_warning_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The descriptors are closed even if a warning is an exception."""
    seen: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", lambda args: seen.append(args.exc_value))
    given = some(3)
    fds = UnixFDList(given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del fds
        gc.collect()
    assert _closing.wait_closed(30)
    assert not any(map(is_open, given))
    assert [type(each) for each in seen] == [ResourceWarning]


def test_del_does_not_wait_for_a_file_server() -> None:
    """Collecting a list with a FUSE file returns while the server does not answer the flush."""
    with hanging_file() as file:
        fds = UnixFDList()
        fds.append(file.fd)
        with pytest.warns(ResourceWarning, match="unclosed UnixFDList"):
            del fds
        until_sync(lambda: file.asked() == ["flush"])
        assert not _closing.wait_closed(0)


UNCLOSED = r"ResourceWarning: unclosed UnixFDList: file descriptors \[\d+\]"
DROP = """
import os
from trio_unixconn import UnixFDList

def make():
    return UnixFDList([os.dup(0)])

made = make()
"""


def test_del_warns_with_the_allocation_site() -> None:
    """With tracemalloc on, the warning names the line where the list was made."""
    # Not from the start: importing trio takes ten times as long with it.
    begin = "import tracemalloc, trio_unixconn; tracemalloc.start(5)"
    command = [sys.executable, "-W", "default", "-c", begin + DROP + "del made"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert re.search(UNCLOSED, done.stderr)
    assert "Object allocated at" in done.stderr
    assert 'File "<string>", lineno 6' in done.stderr


@pytest.mark.parametrize("end", ["", "made = [made]; made.append(made)", "raise SystemExit"])
def test_del_at_the_end_of_the_interpreter(end: str) -> None:
    """A list that is left at the end of the interpreter warns, and the process ends."""
    command = [sys.executable, "-W", "default", "-c", DROP + end]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert re.search(UNCLOSED, done.stderr)
    assert "Traceback" not in done.stderr


def test_repr_shows_numbers_only() -> None:
    """The repr has the number of each, and the gaps; even of closed descriptors."""
    with UnixFDList(given := some(3)) as fds:
        os.close(fds.take(1))
        assert repr(fds) == f"<UnixFDList [{given[0]}, taken, {given[2]}]>"
    assert repr(fds) == "<UnixFDList []>"
    assert repr(UnixFDList()) == "<UnixFDList []>"


def test_repr_makes_no_system_call() -> None:
    """The repr of a list with a FUSE file does not ask the server, which hangs."""
    with hanging_file() as file, UnixFDList() as fds:
        fds.append(file.fd)
        assert repr(fds) == f"<UnixFDList [{fds[0]}]>"
        assert (len(fds), list(fds), fds.lookup(0)) == (1, [fds[0]], fds[0])
        assert file.asked() == []
        # close(2) would wait for the server.
        _closing.close_fds(fds.steal_fds())


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        (True, TypeError, "an int., got bool"),
        ("3", TypeError, "got str .'3'."),
        (3.0, TypeError, "got float"),
        (None, TypeError, "got NoneType"),
        (-1, ValueError, "file descriptor cannot be a negative integer .-1."),
    ],
)
def test_constructor_append_and_append_take_reject(
    bad: Any, error: type[Exception], text: str
) -> None:
    """A wrong file descriptor is rejected, and then none is owned: the caller's stay open."""
    given = some(2)
    with pytest.raises(error, match=text):
        UnixFDList([*given, bad])
    gc.collect()
    with UnixFDList() as fds:
        for method in (fds.append, fds.append_take):
            with pytest.raises(error, match=text):
                method(bad)
        assert len(fds) == 0
    assert all(map(is_open, given))
    UnixFDList(given).close()


@pytest.mark.parametrize("arguments", [(5,), ([], [])])
def test_constructor_rejects_other_arguments(arguments: tuple[Any, ...]) -> None:
    """Wrong arguments to the constructor are a TypeError, and nothing more when collected."""
    with pytest.raises(TypeError):
        UnixFDList(*arguments)
    gc.collect()


def test_append_rejects_closed_fd() -> None:
    """append() of a closed descriptor is EBADF, and adds nothing."""
    closed = os.dup(0)
    os.close(closed)
    with UnixFDList() as fds:
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            fds.append(closed)
        assert caught.value.errno == errno.EBADF
        assert len(fds) == 0


def test_append_and_get_without_a_free_descriptor() -> None:
    """append() and get() without a free descriptor are EMFILE and change nothing."""
    with UnixFDList(some(1)) as fds, free_descriptors(0):
        for call in (fds.append, fds.get):
            with pytest.raises(OSError, match="Too many open files"):
                call(0)
        assert len(fds) == 1


async def test_send_fds_of_a_list() -> None:
    """A list can be sent as it is, and still owns its descriptors."""
    one, two = connection_pair()
    async with one, two:
        with UnixFDList(given := some(3)) as fds:
            assert await one.send_fds(fds) == 3
            assert all(map(is_open, given))
        with await two.receive_fds(3) as got:
            assert [os.fstat(fd).st_size for fd in got] == [0, 1, 2]


async def test_receive_fds_from_another_process() -> None:
    """Received descriptors are in a list, close-on-exec, and closed with it."""
    async with stdlib_peer() as peer:
        theirs = await peer.ask("send", kinds=[["file", "pipe"], ["tcp"]])
        with await peer.conn.receive_fds(3) as fds:
            assert [os.fstat(fd).st_ino for fd in fds] == [each["identity"][1] for each in theirs]
            assert not any(os.get_inheritable(fd) for fd in fds)
            given = list(fds)
        assert not any(map(is_open, given))
