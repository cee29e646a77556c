"""UnixFDList: a descriptor in a list is closed by the list, or somebody took it out."""

from __future__ import annotations

import errno
import gc
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from typing import Any

import pytest
from helpers import free_descriptors, stdlib_peer

from trio_unixconn import (
    DescriptorKind,
    UnixConnection,
    UnixFDList,
    WrongDescriptorKindError,
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
        os.fstat(fd)
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


def test_peek_leaves_all() -> None:
    """peek_fds() names the descriptors and leaves them; changing the answer changes nothing."""
    with UnixFDList(some(3)) as fds:
        peeked = fds.peek_fds()
        assert peeked == list(fds)
        assert len(peeked) == fds.get_length() == 3
        peeked.clear()
        assert fds.get_length() == 3


def test_steal_takes_all() -> None:
    """steal_fds() hands over everything that is still there, and leaves the list empty."""
    with UnixFDList(given := some(3)) as fds:
        taken = fds.take(1)
        stolen = fds.steal_fds()
        assert (taken, stolen) == (given[1], [given[0], given[2]])
        assert (fds.get_length(), fds.steal_fds()) == (0, [])
    for fd in given:
        assert is_open(fd)
        os.close(fd)


def test_new_from_array_owns() -> None:
    """new_from_array() owns what it is given, not duplicates."""
    given = some(2)
    with UnixFDList.new_from_array(given) as fds:
        assert list(fds) == given
    assert not any(map(is_open, given))


def test_positions() -> None:
    """Length, iteration, indexes from both ends, truth."""
    with UnixFDList(given := some(3)) as fds:
        assert fds
        assert len(fds) == 3
        assert list(fds) == given == [fds[0], fds[1], fds[2]]
        assert [fds[-3], fds[-2], fds[-1]] == given
        for bad in (3, -4):
            for method in (fds.__getitem__, fds.get, fds.take, fds.take_file, fds.take_socket):
                with pytest.raises(IndexError):
                    method(bad)
        with pytest.raises(TypeError):
            fds["0"]  # type: ignore[index]
        assert list(fds) == given
    assert not fds
    assert len(fds) == 0


@pytest.mark.parametrize("index", [1, -2])
def test_take_leaves_a_gap(index: int) -> None:
    """take() hands over one; the others keep their positions, and it cannot be had twice."""
    with UnixFDList(given := some(3)) as fds:
        assert fds.take(index) == given[1]
        assert len(fds) == 3
        assert list(fds) == [given[0], given[2]] == fds.peek_fds()
        assert fds[2] == given[2]
        for method in (fds.take, fds.get, fds.__getitem__, fds.take_file, fds.take_stream):
            with pytest.raises(ValueError, match=f"at {index} was taken out before"):
                method(index)
    assert [is_open(fd) for fd in given] == [False, True, False]
    os.close(given[1])


def test_take_file() -> None:
    """take_file() gives a Python file that owns the descriptor, in the mode asked for."""
    with UnixFDList(given := some(2)) as fds:
        with fds.take_file(1, "r+b") as file:
            assert file.fileno() == given[1]
            assert file.read() == b"\0"
            assert file.write(b"more") == 4
        with fds.take_file(-2, "w") as text:
            assert text.write("text") == 4
        assert list(fds) == []
    assert not any(map(is_open, given))


def test_take_file_of_another_kind() -> None:
    """Another kind of file, or another access mode, or no mode: the list still owns it."""
    read, write = os.pipe()
    path = os.open("/", os.O_RDONLY)
    null = os.open(os.devnull, os.O_RDONLY)
    with UnixFDList([read, write, path, null]) as fds:
        for index, kind in enumerate([DescriptorKind.PIPE] * 2 + [DescriptorKind.DIRECTORY]):
            with pytest.raises(WrongDescriptorKindError, match=f"but a {kind.value}") as caught:
                fds.take_file(index)
            assert caught.value.kind is kind
        with pytest.raises(WrongDescriptorKindError, match="to write was due"):
            fds.take_file(3, "wb", kinds=[DescriptorKind.CHARACTER_DEVICE])
        with pytest.raises(ValueError, match="mode must be"):
            fds.take_file(3, "rw")
        with pytest.raises(TypeError, match="mode must be a str"):
            fds.take_file(3, 5)  # type: ignore[arg-type]
        assert list(fds) == [read, write, path, null]
        with fds.take_file(0, kinds=[DescriptorKind.PIPE, DescriptorKind.SOCKET]) as file:
            os.write(write, b"x")
            assert file.read(1) == b"x"


async def test_take_socket() -> None:
    """take_socket() gives a trio socket that owns the descriptor; of a file, the list keeps it."""
    one, two = socket.socketpair()
    with two, UnixFDList([one.detach(), *some(1)]) as fds:
        with pytest.raises(WrongDescriptorKindError, match="socket was due, but a regular file"):
            fds.take_socket(1)
        with fds.take_socket(0) as sock:
            assert sock.family == socket.AF_UNIX
            two.send(b"x")
            assert await sock.recv(1) == b"x"
        assert len(list(fds)) == 1


async def test_take_stream() -> None:
    """take_stream() gives a connection that owns the descriptor, the list keeps what is none."""
    one, two = socket.socketpair()
    datagram, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    given = [one.detach(), datagram.detach(), socket.socket().detach(), *some(1)]
    with two, other, UnixFDList(given) as fds:
        for index in (1, 2, 3):
            with pytest.raises(WrongDescriptorKindError, match="stream socket was due, but"):
                fds.take_stream(index)
        async with fds.take_stream(-4) as stream:
            assert isinstance(stream, UnixConnection)
            two.send(b"x")
            assert await stream.receive_some() == b"x"
        assert list(fds) == given[1:]


def test_close_twice() -> None:
    """close() closes what nobody took, and the second time nothing that has the number now."""
    fds = UnixFDList(given := some(2))
    fds.close()
    assert not any(map(is_open, given))
    again = some(2)
    assert again == given
    fds.close()
    assert all(map(is_open, again))
    UnixFDList(again).close()


def test_context_manager() -> None:
    """A with block gives the list itself, and closes it also when the block raises."""
    given = some(2)
    fds = UnixFDList(given)
    with pytest.raises(ZeroDivisionError), fds as entered:
        assert entered is fds
        raise ZeroDivisionError
    assert not any(map(is_open, given))


def test_one_that_somebody_else_closed() -> None:
    """One that somebody closed behind the list's back does not keep the others open."""
    fds = UnixFDList(given := some(3))
    os.close(given[0])
    with suppress(OSError):
        fds.close()
    still_open = [fd for fd in given if is_open(fd)]
    for fd in still_open:
        os.close(fd)
    assert still_open == []


def test_dropped() -> None:
    """A list that is dropped closes its descriptors, and warns with their numbers."""
    given = some(2)
    fds = UnixFDList(given)
    os.close(fds.take(0))
    with pytest.warns(ResourceWarning, match=rf"dropped with descriptors \[{given[1]}\]"):
        del fds
    assert not any(map(is_open, given))


def test_dropped_empty() -> None:
    """A list of which everything was taken, or that was closed, is dropped without a word."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fds = UnixFDList(some(1))
        os.close(fds.take(0))
        del fds
        closed = UnixFDList(some(1))
        closed.close()
        del closed
    assert said == []
    gc.collect()


@pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning")
def test_dropped_with_warnings_as_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The descriptors are closed also where a warning is an exception."""
    seen: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", lambda args: seen.append(args.exc_value))
    given = some(3)
    fds = UnixFDList(given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del fds
        gc.collect()
    assert not any(map(is_open, given))
    assert [type(each) for each in seen] == [ResourceWarning]


DROP = """
import os
from trio_unixconn import UnixFDList

def make():
    return UnixFDList([os.dup(0)])

made = make()
del made
"""


def test_allocation_site() -> None:
    """With tracemalloc on, the warning names the line where the list was made."""
    command = [sys.executable, "-X", "tracemalloc=5", "-W", "default", "-c", DROP]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "ResourceWarning: a UnixFDList was dropped" in done.stderr
    assert "Object allocated at" in done.stderr
    assert 'File "<string>", lineno 6' in done.stderr


def test_repr() -> None:
    """The repr shows number and kind of each, what was taken, and what somebody closed."""
    read, write = os.pipe()
    one, two = socket.socketpair()
    given = [*some(1), read, write, one.detach(), two.detach(), os.open("/", os.O_RDONLY)]
    with UnixFDList([*given, os.open(os.devnull, os.O_RDONLY), os.pidfd_open(os.getpid())]) as fds:
        os.close(fds.take(1))
        text = repr(fds)
        assert text.startswith(f"<UnixFDList [{given[0]}: regular file, taken, {write}: pipe, ")
        assert f"{given[3]}: socket" in text
        assert f"{given[5]}: directory" in text
        assert f"{fds[6]}: character device" in text
        closed = os.dup(0)
        os.close(closed)
        ghost = UnixFDList([closed])
        assert repr(ghost) == f"<UnixFDList [{closed}: Bad file descriptor]>"
        assert ghost.steal_fds() == [closed]
    assert repr(fds) == "<UnixFDList []>"


def test_repr_of_an_anonymous_inode() -> None:
    """What is no file of any kind shows as what it is."""
    with UnixFDList([os.eventfd(0)]) as fds:
        assert repr(fds) == f"<UnixFDList [{fds[0]}: anonymous inode]>"


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        (True, TypeError, "not bool"),
        ("3", TypeError, "not str"),
        (3.0, TypeError, "not float"),
        (None, TypeError, "not NoneType"),
        (-1, ValueError, "no descriptor has the number -1"),
    ],
)
def test_bad_descriptor(bad: Any, error: type[Exception], text: str) -> None:
    """What is no descriptor is refused, and then nothing is owned: the caller's stay open."""
    given = some(2)
    with pytest.raises(error, match=text):
        UnixFDList([*given, bad])
    gc.collect()
    with UnixFDList() as fds:
        with pytest.raises(error, match=text):
            fds.append(bad)
        assert len(fds) == 0
    assert all(map(is_open, given))
    UnixFDList(given).close()


@pytest.mark.parametrize("arguments", [(5,), ([], [])])
def test_bad_constructor(arguments: tuple[Any, ...]) -> None:
    """Wrong arguments to the constructor are a TypeError and nothing else, also when collected."""
    with pytest.raises(TypeError):
        UnixFDList(*arguments)
    gc.collect()


def test_append_closed() -> None:
    """A closed descriptor cannot be added."""
    closed = os.dup(0)
    os.close(closed)
    with UnixFDList() as fds:
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            fds.append(closed)
        assert caught.value.errno == errno.EBADF
        assert len(fds) == 0


def test_no_free_slot_for_a_duplicate() -> None:
    """Where no descriptor is free, append() and get() are EMFILE and change nothing."""
    with UnixFDList(some(1)) as fds, free_descriptors(0):
        for call in (fds.append, fds.get):
            with pytest.raises(OSError, match="Too many open files"):
                call(0)
        assert len(fds) == 1


async def test_as_an_argument() -> None:
    """A list can be sent as it is, and still owns its descriptors."""
    one, two = connection_pair()
    async with one, two:
        with UnixFDList(given := some(3)) as fds:
            assert await one.send_fds(fds) == 3
            assert all(map(is_open, given))
        with await two.receive_fds(3) as got:
            assert [os.fstat(fd).st_size for fd in got] == [0, 1, 2]


async def test_from_another_process() -> None:
    """What another process sent comes in a list, close-on-exec, and leaves with it."""
    async with stdlib_peer() as peer:
        theirs = await peer.ask("send", kinds=[["file", "pipe"], ["tcp"]])
        with await peer.conn.receive_fds(3) as fds:
            assert [os.fstat(fd).st_ino for fd in fds] == [each["identity"][1] for each in theirs]
            assert not any(os.get_inheritable(fd) for fd in fds)
            given = list(fds)
        assert not any(map(is_open, given))
