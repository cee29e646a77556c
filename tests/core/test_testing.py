"""trio_unixconn.testing and the pytest plugin: what they return, and that each can fail."""

from __future__ import annotations

import errno
import os
import re
import resource
import select
import socket
import subprocess
import sys
import tempfile
import traceback
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio

from tests._helpers.fuse import hanging_file
from tests._helpers.processes import ROOT
from trio_unixconn import (
    ConnectionClosedError,
    EndOfStreamError,
    NotSupportedError,
    UnixConnection,
    _closing,
    connection_pair,
    open_unix_connection,
    open_unix_listener,
    testing,
)
from trio_unixconn.testing import (
    _descriptors,
    _paths,
    assert_no_fd_leak,
    clog,
    clogged_pair,
    limit_descriptors,
    open_descriptors,
    unclog,
)

HOW_TO = (ROOT / "docs" / "how-to" / "test-your-code.md").read_text()

################################################################
# The names
################################################################


def test_all_names_every_public_function() -> None:
    """__all__ names every public function, and each has a docstring."""
    assert testing.connection_pair is connection_pair
    public = {
        name
        for name, value in vars(testing).items()
        if not name.startswith("_") and callable(value)
    }
    assert set(testing.__all__) == public
    assert [name for name in public if not getattr(testing, name).__doc__] == []


def test_import_without_pytest() -> None:
    """Without pytest, everything but the plugin can be imported."""
    program = (
        "import sys; sys.modules['pytest'] = None\n"
        "from trio_unixconn.testing import *\n"
        "with assert_no_fd_leak(), limit_descriptors(3): print(len(open_descriptors()) > 0)\n"
        "import trio_unixconn; assert not hasattr(trio_unixconn.testing, 'plugin')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


################################################################
# Open descriptors
################################################################


def test_open_descriptors() -> None:
    """Each open descriptor is returned with its path, or with its type and number."""
    before = open_descriptors()
    one, two = socket.socketpair()
    read, write = os.pipe()
    with one, two, open(read, "rb"), open(write, "wb"), open(os.devnull) as file:
        after = open_descriptors()
        names = {fd: name for fd, name in after.items() if fd not in before}
        assert names[file.fileno()] == os.devnull
        assert names[one.fileno()].startswith("socket:[")
        assert names[one.fileno()] != names[two.fileno()]
        assert names[read] == names[write]
        assert names[read].startswith("pipe:[")
        assert len(names) == 5
    assert open_descriptors() == before


@pytest.fixture
def dev_fd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a directory as /dev/fd of macOS and the BSDs: no links, and perhaps too many names."""
    for fd in range(32):
        (tmp_path / str(fd)).touch()
    (tmp_path / "stdin").touch()
    monkeypatch.setattr(_descriptors, "_DIRECTORIES", ("/nonexistent", str(tmp_path)))
    return tmp_path


def test_open_descriptors_without_links(dev_fd: Path) -> None:
    """Without /proc/self/fd, kind, device and inode identify what is open, and what leaked."""
    with open(os.devnull) as file, tempfile.TemporaryFile() as other:
        names = open_descriptors()
        assert names[file.fileno()].startswith("character device (device ")
        inode = os.fstat(other.fileno()).st_ino
        assert names[other.fileno()].startswith("regular file (device ")
        assert names[other.fileno()].endswith(f", inode {inode})")
        assert set(names) == {fd for fd in range(32) if is_open(fd)}
        guard = assert_no_fd_leak()
        with pytest.raises(AssertionError, match=r"leaked: \d+, regular file \(dev"), guard:
            leaked = os.open(dev_fd / "0", os.O_RDONLY)
        os.close(leaked)


def test_open_descriptors_from_dev_fd(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Linux, /dev/fd lists the same as /proc/self/fd."""
    expected = open_descriptors()
    monkeypatch.setattr(_descriptors, "_DIRECTORIES", ("/nonexistent", "/dev/fd"))
    assert open_descriptors() == expected


def test_open_descriptors_without_either_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without both directories, all functions are NotSupportedError, and change nothing."""
    monkeypatch.setattr(_descriptors, "_DIRECTORIES", ("/nonexistent", "/nowhere"))
    for attempt in (assert_no_fd_leak(), limit_descriptors(1)):
        with pytest.raises(NotSupportedError, match="neither /nonexistent nor /nowhere"):
            attempt.__enter__()


def is_open(fd: int) -> bool:
    try:
        os.get_inheritable(fd)
    except OSError:
        return False
    return True


async def test_open_descriptors_does_not_ask_a_file_server() -> None:
    """Listing, and the guard, return while a FUSE server does not answer, and do not ask it."""
    with hanging_file() as file:
        names = open_descriptors()
        assert names[file.fd].endswith("/file")
        with assert_no_fd_leak():
            fd = os.dup(0)
            os.close(fd)
        with pytest.raises(AssertionError, match=r"leaked: \d+, /.*/file$"), assert_no_fd_leak():
            fd = os.dup(file.fd)
        assert file.asked() == []
        _closing.close_fds([fd])


################################################################
# The guard
################################################################


async def test_assert_no_fd_leak_passes() -> None:
    """A block that closes what it opens passes, even if it awaits or raises."""
    with assert_no_fd_leak():
        one, two = connection_pair()
        async with one, two:
            await one.send_fd(0)
            os.close(await two.receive_fd())
    with pytest.raises(ZeroDivisionError) as caught, assert_no_fd_leak():
        raise ZeroDivisionError
    assert "descriptors" not in printed(caught.value)


def test_assert_no_fd_leak_reports_leaked_and_lost() -> None:
    """Descriptors open only after the block, or only before it, are reported with their files."""
    file = os.open(os.devnull, os.O_RDONLY)
    with pytest.raises(AssertionError) as caught, assert_no_fd_leak():
        os.close(file)
        one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, two:
        # The lowest free number is the one of the file.
        assert one.fileno() == file
        names, fds = open_descriptors(), sorted([one.fileno(), two.fileno()])
        lost = f"lost 1 file descriptor: {file} ({os.devnull})"
        assert str(caught.value).splitlines() == [
            f"leaked 2 file descriptors: {fds[0]} (socket), {fds[1]} (socket); {lost}",
            *(f"  leaked: {fd}, {names[fd]} (AF_UNIX, SOCK_DGRAM)" for fd in fds),
            f"  lost: {file}, {os.devnull}",
        ]


async def test_assert_no_fd_leak_of_a_connection() -> None:
    """A pair that is left open is two leaked descriptors."""
    with pytest.raises(AssertionError) as caught, assert_no_fd_leak():
        one, two = connection_pair()
        await one.send_all(b"x")
    line = r"\n  leaked: \d+, socket:\[\d+\] \(AF_UNIX, SOCK_STREAM\)"
    told = rf"leaked 2 file descriptors: [^\n]*({line}){{2}}"
    assert re.fullmatch(told, str(caught.value))
    await one.aclose()
    await two.aclose()


def test_assert_no_fd_leak_of_a_renamed_file(tmp_path: Path) -> None:
    """A file that is renamed or removed while it is open has neither leaked nor been lost."""
    with open(tmp_path / "one", "wb") as file:
        with assert_no_fd_leak():
            (tmp_path / "one").rename(tmp_path / "two")
        with assert_no_fd_leak():
            (tmp_path / "two").unlink()
        assert open_descriptors()[file.fileno()].endswith("two (deleted)")


def test_assert_no_fd_leak_of_another_file_with_the_same_number(tmp_path: Path) -> None:
    """Another open file with the old number is reported, whether it has a path or not."""
    for name in ("one", "two"):
        (tmp_path / name).touch()
    one, two = (os.open(tmp_path / name, os.O_RDONLY) for name in ("one", "two"))
    with pytest.raises(AssertionError) as caught, assert_no_fd_leak():
        os.dup2(two, one, inheritable=False)
    os.close(one)
    os.close(two)
    assert f"leaked: {one}, {tmp_path}/two" in str(caught.value)
    assert f"lost: {one}, {tmp_path}/one" in str(caught.value)

    # These two have no inode of their own.
    event = os.eventfd(0)
    with closing(select.epoll()) as poll:
        with pytest.raises(AssertionError) as caught, assert_no_fd_leak():
            os.dup2(event, poll.fileno(), inheritable=False)
        os.close(event)
        assert f"leaked: {poll.fileno()}, anon_inode:[eventfd]" in str(caught.value)
        assert f"lost: {poll.fileno()}, anon_inode:[eventpoll]" in str(caught.value)


def test_assert_no_fd_leak_begins_with_what_leaked(tmp_path: Path) -> None:
    """The report begins with the numbers and kinds, the first eight of them, in one line."""
    with pytest.raises(AssertionError) as caught, assert_no_fd_leak():
        pipes = [fd for _ in range(4) for fd in os.pipe()]
        event = os.eventfd(0)
    told = str(caught.value).splitlines()
    named = ", ".join(f"{fd} (pipe)" for fd in pipes)
    assert told[0] == f"leaked 9 file descriptors: {named}, ..."
    assert told[1].startswith(f"  leaked: {pipes[0]}, pipe:[")
    assert told[9:] == [f"  leaked: {event}, anon_inode:[eventfd]"]
    for fd in pipes:
        os.close(fd)
    with pytest.raises(AssertionError) as caught, assert_no_fd_leak():
        os.close(event)
    assert str(caught.value).splitlines()[0] == f"lost 1 file descriptor: {event} (eventfd)"


def test_assert_no_fd_leak_escapes_the_names_of_files(tmp_path: Path) -> None:
    """A sender chooses the name of the file of a descriptor: it cannot forge a line."""
    name = os.fsencode(tmp_path) + b"/a\n\x1b[31m\xff"
    with pytest.raises(AssertionError) as caught, assert_no_fd_leak():
        fd = os.open(name, os.O_CREAT | os.O_RDWR)
    os.close(fd)
    path = f"{tmp_path}/a\\x0a\\x1b[31m\\xff"
    assert str(caught.value) == (f"leaked 1 file descriptor: {fd} ({path})\n  leaked: {fd}, {path}")


def test_assert_no_fd_leak_collects_garbage() -> None:
    """A descriptor that only a reference cycle holds is closed, not reported."""
    with assert_no_fd_leak():
        circle: list[Any] = [Closing(os.open(os.devnull, os.O_RDONLY))]
        circle.append(circle)
        del circle


class Closing:
    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


def raise_it() -> None:
    raise ZeroDivisionError("the block's own")


def raise_from_none() -> None:
    try:
        raise_it()
    except ZeroDivisionError:
        raise ValueError("the block's own") from None


def raise_from() -> None:
    try:
        raise_it()
    except ZeroDivisionError as exc:
        raise ValueError("of that") from exc


@pytest.mark.parametrize("fail", [raise_it, raise_from_none, raise_from])
def test_assert_no_fd_leak_of_a_block_that_raises(fail: Any) -> None:
    """The block's exception is propagated, and its printed text has the report."""
    with pytest.raises((ZeroDivisionError, ValueError)) as caught, assert_no_fd_leak():
        fd = os.open(os.devnull, os.O_RDONLY)
        fail()
    os.close(fd)
    assert f"leaked 1 file descriptor: {fd} ({os.devnull})\n" in printed(caught.value)
    assert f"  leaked: {fd}, {os.devnull}" in printed(caught.value)
    assert "the block's own" in printed(caught.value)


def printed(exc: BaseException) -> str:
    return "".join(traceback.format_exception(type(exc), exc, exc.__traceback__))


################################################################
# Few descriptors
################################################################


@pytest.mark.parametrize("count", [0, 1, 5])
def test_limit_descriptors(count: int) -> None:
    """Exactly that many descriptors can be opened; the old limit is restored."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened: list[int] = []
    with limit_descriptors(count), pytest.raises(OSError, match="Too many open files"):
        while True:
            opened.append(os.open(os.devnull, os.O_RDONLY))
    assert len(opened) == count
    for fd in opened:
        os.close(fd)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


def test_limit_descriptors_of_a_block_that_raises() -> None:
    """After a block that raises, limit and descriptors are as before."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pytest.raises(ZeroDivisionError), assert_no_fd_leak(), limit_descriptors(2):
        raise ZeroDivisionError
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


def test_open_descriptors_without_a_free_descriptor() -> None:
    """Without a free descriptor, listing and guard still work."""
    before = open_descriptors()
    with limit_descriptors(1):
        fd = os.open("/", os.O_RDONLY)
        names = open_descriptors()
        assert before.items() <= names.items()
        assert names[fd] == "/"
        with assert_no_fd_leak():
            pass
        with pytest.raises(AssertionError, match=f"lost: {fd}, /"), assert_no_fd_leak():
            os.close(fd)


def test_limit_descriptors_nested() -> None:
    """An inner limit may be lower than an outer one; a higher one is EMFILE."""
    with limit_descriptors(3):
        outer = resource.getrlimit(resource.RLIMIT_NOFILE)
        with limit_descriptors(1):
            fd = os.open(os.devnull, os.O_RDONLY)
            with pytest.raises(OSError, match="Too many open files"):
                os.dup(fd)
            os.close(fd)
        with pytest.raises(OSError, match="only 3 descriptors are free, not 4") as caught:
            limit_descriptors(4).__enter__()
        assert caught.value.errno == errno.EMFILE
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == outer
        read, write = os.pipe()
        os.close(os.dup(read))
        os.close(read)
        os.close(write)


def test_limit_descriptors_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative count, or a full system, raises and leaves the limit as it was."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pytest.raises(ValueError, match="count must be non-negative, got -1"):
        limit_descriptors(-1).__enter__()

    def full(*_: object) -> int:
        raise OSError(errno.ENFILE, "the system's table is full")

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match="the system's table is full"):
        limit_descriptors(1).__enter__()
    monkeypatch.undo()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


def test_limit_descriptors_of_a_process_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without a limit has one during the block."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    really_set = resource.setrlimit
    lifted: list[int] = []

    def set_limit(which: int, limits: tuple[int, int]) -> None:
        if limits[0] == resource.RLIM_INFINITY:
            lifted.append(which)
            limits = before, hard
        really_set(which, limits)

    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, hard))
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    with limit_descriptors(0), pytest.raises(OSError, match="Too many open files"):
        os.open(os.devnull, os.O_RDONLY)
    assert lifted == [resource.RLIMIT_NOFILE]


################################################################
# Connections that cannot send
################################################################


async def is_clogged(conn: UnixConnection) -> bool:
    with trio.move_on_after(0.01) as scope:
        await conn.wait_send_all_might_not_block()
    return scope.cancelled_caught


async def test_clog_and_unclog() -> None:
    """After clog() a send waits, and sends no byte; after unclog() it continues."""
    one, two = connection_pair()
    async with one, two:
        count = clog(one)
        assert count > 0
        assert clog(one) == 0
        assert await is_clogged(one)
        assert not await is_clogged(two)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send_all, b"after")
            await trio.testing.wait_all_tasks_blocked()
            await unclog(two, count)
            assert await two.receive_some() == b"after"
        assert not await is_clogged(one)


async def test_clogged_pair() -> None:
    """Neither end of a clogged pair can send, until the other has received."""
    one, two = clogged_pair()
    async with one, two:
        for here, there in ((one, two), (two, one)):
            assert await is_clogged(here)
            while await is_clogged(here):
                await there.receive_some()


async def test_clog_of_a_blocking_socket() -> None:
    """clog() needs no free descriptor, does not wait on a blocking socket, and leaves it open."""
    one, two = connection_pair()
    async with one, two:
        os.set_blocking(one.socket.fileno(), True)
        with assert_no_fd_leak(), limit_descriptors(0):
            assert clog(one) > 0
        assert os.get_blocking(one.socket.fileno())


async def test_clog_rejects_closed_connections() -> None:
    """A closed connection and a closed peer are errors."""
    one, two = connection_pair()
    await two.aclose()
    with pytest.raises(BrokenPipeError):
        clog(one)
    assert one.is_connected()
    await one.aclose()
    with pytest.raises(ConnectionClosedError, match="this connection is closed"):
        clog(one)


async def test_unclog_at_end_of_stream() -> None:
    """unclog() raises at the end of the stream."""
    one, two = connection_pair()
    async with two:
        await one.send_all(b"xx")
        await one.aclose()
        with pytest.raises(EndOfStreamError, match="end of stream while waiting for 1 more bytes"):
            await unclog(two, 3)


################################################################
# Fixtures
################################################################


async def test_unix_connection_pair_in_a_run(
    unix_connection_pair: tuple[UnixConnection, UnixConnection],
) -> None:
    """The pair is connected, and the test need not close it."""
    one, two = unix_connection_pair
    await one.send_fd(0)
    os.close(await two.receive_fd())
    await two.send_all(b"x")
    assert await one.receive_some() == b"x"


async def test_unix_connection_pair_closed_by_the_test(
    unix_connection_pair: tuple[UnixConnection, UnixConnection],
) -> None:
    """The test may close the pair."""
    one, two = unix_connection_pair
    async with one, two:
        pass
    assert one.is_closed()
    assert two.is_closed()


def test_unix_connection_pair_outside_of_a_run(
    unix_connection_pair: tuple[UnixConnection, UnixConnection],
) -> None:
    """A test that calls trio.run, twice or never, can use the pair; it is closed after them."""
    one, two = unix_connection_pair
    assert one.get_peer_credentials().pid == os.getpid()
    trio.run(one.send_all, b"x")
    assert trio.run(two.receive_some) == b"x"


async def test_unix_connection_pair_with_read_ahead_descriptors(
    unix_connection_pair: tuple[UnixConnection, UnixConnection],
) -> None:
    """Descriptors that were read ahead, or not read, are closed with the pair."""
    one, two = unix_connection_pair
    for _ in range(5):
        await one.send_fd(0)
    with open(os.devnull) as file:
        await two.send_fd(file)
    before = open_descriptors()
    stream = two.fds()
    os.close(await stream.__anext__())
    # The other four were read ahead: they are open, and the connection owns them.
    assert len(open_descriptors()) == len(before) + 4


async def test_unix_socket_path(unix_socket_path: Path) -> None:
    """The path is free, in an empty private directory, and can be listened at."""
    directory = unix_socket_path.parent
    assert list(directory.iterdir()) == []
    assert directory.stat().st_mode & 0o777 == 0o700
    longer = unix_socket_path.with_name(unix_socket_path.name + "." + "x" * 39)
    assert len(os.fsencode(longer)) <= 103
    for path in (unix_socket_path, longer):
        listener = await open_unix_listener(path)
        async with listener, await open_unix_connection(path):
            (await listener.accept()).socket.close()


class TestLongTemporaryDirectory:
    """The paths of pytest are too long."""

    @pytest.fixture
    def tmp_path_factory(self, tmp_path: Path) -> Any:
        class Long:
            def mktemp(self, name: str) -> Path:
                directory = tmp_path / ("x" * 100)
                directory.mkdir()
                return directory

        return Long()

    async def test_unix_socket_path(self, unix_socket_path: Path, tmp_path: Path) -> None:
        """The path is short, and in another directory."""
        assert tmp_path not in unix_socket_path.parents
        await test_unix_socket_path(unix_socket_path)


def test_unix_socket_path_has_40_spare_bytes() -> None:
    """A directory fits if 40 bytes can be appended to the socket's path, and not 39."""
    longest = "/" + "x" * (103 - 40 - len("/socket") - 1)
    assert _paths.fits(longest)
    assert not _paths.fits(longest + "x")
    assert not _paths.fits(longest[:-1] + "é")


def test_unix_socket_path_short_directory(tmp_path: Path) -> None:
    """The directory is in the first parent that exists and is short; it is removed afterwards."""
    parents = ["/nonexistent", str(tmp_path / ("x" * 100)), "/tmp"]
    os.mkdir(parents[1])
    with _paths.short_directory(parents) as directory:
        assert str(directory.parent) == parents[2]
        (directory / "left").mkdir()
        (directory / "left" / "file").touch()
    assert not directory.exists()
    with _paths.short_directory() as directory:
        directory.rmdir()
    with pytest.raises(OSError, match="set TMPDIR") as caught:
        _paths.short_directory(parents[:2]).__enter__()
    assert caught.value.errno == errno.ENAMETOOLONG
    assert os.listdir(parents[1]) == []


################################################################
# The plugin in a user's project
################################################################


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A user's project, with the package installed with its entry points."""
    toml = (ROOT / "pyproject.toml").read_text()
    found = re.search(
        r"^\[project\.entry-points\.pytest11\]\n(.*?)\n\n", toml, re.DOTALL | re.MULTILINE
    )
    assert found
    installed = pytester.mkdir("site-packages")
    info = installed / "trio_unixconn-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trio_unixconn\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        found[0].replace("project.entry-points.", "").replace('"', "")
    )
    monkeypatch.setenv("PYTHONPATH", f"{installed}{os.pathsep}{ROOT}")
    pytester.makeini("[pytest]\nfilterwarnings = error\n")
    return pytester


LEAKING = """
import os, pytest

def test_leak():
    os.open(os.devnull, os.O_RDONLY)

def test_loss(fd):
    os.close(fd)

@pytest.fixture(scope="module")
def fd():
    return os.open(os.devnull, os.O_RDONLY)
"""


@pytest.mark.slow
def test_plugin_is_off_by_default(project: pytest.Pytester) -> None:
    """A test that requests no fixture runs as without the plugin, even if it leaks."""
    project.makepyfile(
        LEAKING,
        test_names="""
        def test_none(request):
            assert request.fixturenames == ["request"]

        def test_pair(request, unix_connection_pair):
            assert "fd_leak_guard" not in request.fixturenames
        """,
    )
    result = project.runpytest_subprocess("-v", "--trace-config")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["*trio_unixconn*: *testing/plugin.py"])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["by name", "marked", "autouse"])
def test_fd_leak_guard_fails_a_leaking_test(project: pytest.Pytester, how: str) -> None:
    """However the guard is requested, a test that leaks or loses a descriptor fails."""
    source = LEAKING + "def test_neither(): pass\n"
    if how == "by name":
        source = source.replace("test_leak()", "test_leak(fd_leak_guard)")
        source = source.replace("(fd):", "(fd, fd_leak_guard):")
    elif how == "marked":
        source += 'pytestmark = pytest.mark.usefixtures("fd_leak_guard")\n'
    else:
        project.makeconftest(
            "import pytest\n@pytest.fixture(autouse=True)\ndef no_leaks(fd_leak_guard): pass\n"
        )
    project.makepyfile(source)
    result = project.runpytest_subprocess()
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        [
            "*= FAILURES =*",
            "*_ test_leak _*",
            "leaked 1 file descriptor: * (/dev/null)",
            "  leaked: *, /dev/null",
            "*_ test_loss _*",
            "lost 1 file descriptor: * (/dev/null)",
            "  lost: *, /dev/null",
            "FAILED *::test_leak - leaked 1 file*",
            "FAILED *::test_loss - lost 1 file*",
        ]
    )


LEAKING_IN_EVERY_WAY = """
import os, pytest

pytestmark = pytest.mark.usefixtures("fd_leak_guard")

def leak():
    os.open(os.devnull, os.O_RDONLY)

def test_fails():
    leak()
    assert not "of the test"

def test_fails_without_a_traceback():
    leak()
    pytest.fail("of the test", pytrace=False)

def test_skips():
    leak()
    pytest.skip("of the test")

@pytest.mark.xfail
def test_expected():
    leak()

@pytest.mark.xfail(strict=True)
def test_expected_strictly():
    leak()

@pytest.mark.xfail(raises=ZeroDivisionError)
def test_expects_another():
    leak()

@pytest.mark.xfail(raises=ZeroDivisionError, strict=True)
def test_expects_another_strictly():
    leak()

def test_expects_at_last():
    leak()
    pytest.xfail("of the test")

@pytest.fixture
def raising(fd_leak_guard):
    yield
    1 / 0

def test_teardown(raising):
    leak()

@pytest.fixture
def leaking(fd_leak_guard):
    leak()
    pytest.fail("of the setup")

def test_setup(leaking):
    pass
"""


def outcomes(result: pytest.RunResult) -> dict[str, str]:
    """Return the last word that ``-v`` prints about each test."""
    return dict(re.findall(r"::test_(\w+) ([A-Z]+)", result.stdout.str()))


@pytest.mark.slow
def test_fd_leak_guard_and_how_the_test_ends(project: pytest.Pytester) -> None:
    """A test that fails has one report with both; a skip or another error hides no leak."""
    project.makepyfile(LEAKING_IN_EVERY_WAY)
    result = project.runpytest_subprocess("-v", "-p", "no:xdist")
    # The errors: of the fixture that raises with the leak, and of the setup.
    result.assert_outcomes(failed=7, xfailed=2, errors=2)
    result.stdout.fnmatch_lines(
        [
            "*_ ERROR at setup of test_setup _*",
            "*file descriptors*",
            "leaked 1 file descriptor: * (/dev/null)",
            "*_ test_fails _*",
            "E * assert not 'of the test'",
            "*file descriptors*",
            "leaked 1 file descriptor: * (/dev/null)",
            "*_ test_fails_without_a_traceback _*",
            "of the test",
            "leaked 1 file descriptor: * (/dev/null)",
            "*_ test_skips _*",
            "leaked 1 file descriptor: * (/dev/null)",
        ]
    )
    ended = outcomes(result)
    assert ended["expected"] == ended["expected_strictly"] == "XFAIL"
    assert ended["expects_another"] == ended["expects_another_strictly"] == "FAILED"
    assert ended["expects_at_last"] == "FAILED"


@pytest.mark.slow
def test_fd_leak_guard_in_other_reports(project: pytest.Pytester) -> None:
    """JUnit's XML has a leak as the failure of its test; -x ends the fixtures of the module."""
    project.makepyfile(
        """
        import os, pytest

        @pytest.fixture(scope="module")
        def of_the_module():
            yield
            pytest.fail("at the end of the module")

        def test_leak(fd_leak_guard):
            os.open(os.devnull, os.O_RDONLY)

        def test_fails(of_the_module, fd_leak_guard):
            assert not "of the test"

        def test_last(of_the_module):
            pass
        """
    )
    result = project.runpytest_subprocess("--junitxml=out.xml")
    result.assert_outcomes(failed=2, passed=1, errors=1)
    xml = Path(project.path, "out.xml").read_text()
    assert 'errors="1" failures="2" skipped="0" ' in xml
    assert '<failure message="leaked 1 file descriptor: ' in xml

    result = project.runpytest_subprocess("-x", "-k", "test_fails")
    result.assert_outcomes(failed=1, errors=1, deselected=2)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_fails*"])


@pytest.mark.slow
def test_fd_leak_guard_when_another_plugin_runs_the_test(project: pytest.Pytester) -> None:
    """If another plugin runs tests in pytest's place, its reports are left alone."""
    project.makeconftest(
        """
        from _pytest.runner import runtestprotocol

        def pytest_runtest_protocol(item, nextitem):
            runtestprotocol(item, nextitem=nextitem)
            return True
        """
    )
    project.makepyfile(LEAKING.replace("test_leak()", "test_leak(fd_leak_guard)"))
    result = project.runpytest_subprocess()
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        ["*ERROR at teardown of test_leak*", "leaked 1 file descriptor: * (/dev/null)"]
    )


@pytest.mark.slow
def test_fd_leak_guard_of_an_interrupted_teardown(project: pytest.Pytester) -> None:
    """Ctrl-C in a teardown does not hide that the test has failed."""
    project.makepyfile(
        """
        import pytest

        @pytest.fixture
        def interrupted():
            yield
            raise KeyboardInterrupt

        def test_fails(fd_leak_guard, interrupted):
            assert not "of the test"
        """
    )
    result = project.runpytest_subprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E * assert not 'of the test'"])


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["a, b", "b, a"])
def test_fd_leak_guard_with_unix_connection_pair(project: pytest.Pytester, arguments: str) -> None:
    """In both orders of the two names, the pair is not a leak; a received descriptor is one."""
    names = arguments.replace("a", "unix_connection_pair").replace("b", "fd_leak_guard")
    project.makepyfile(
        f"""
        import trio

        async def close(pair):
            for conn in pair:
                await conn.aclose()

        def test_open({names}):
            pass

        def test_closed({names}):
            trio.run(close, unix_connection_pair)

        async def receive(pair):
            await pair[0].send_fd(0)
            await pair[1].receive_fd()

        def test_leak({names}):
            trio.run(receive, unix_connection_pair)
        """
    )
    result = project.runpytest_subprocess("-v")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*_ test_leak _*", "  leaked: *, *"])
    result.stdout.no_fnmatch_line("*  lost: *")


@pytest.mark.slow
def test_plugin_with_every_way_to_run_trio(project: pytest.Pytester) -> None:
    """The fixtures work under pytest-trio, anyio and trio.run, even below async fixtures."""
    project.makepyfile(
        """
        import os
        import anyio, pytest, pytest_trio, trio
        from trio_unixconn import open_unix_connection, open_unix_listener

        pytestmark = pytest.mark.usefixtures("fd_leak_guard")

        @pytest.fixture
        def anyio_backend():
            return "trio"

        async def use(pair, path):
            one, two = pair
            for _ in range(3):
                await one.send_fd(0)
            os.close(await two.fds().__anext__())
            async with await open_unix_listener(path), await open_unix_connection(path):
                pass

        @pytest.mark.trio
        async def test_trio(unix_connection_pair, unix_socket_path):
            await use(unix_connection_pair, unix_socket_path)

        @pytest_trio.trio_fixture
        async def one(unix_connection_pair):
            async with unix_connection_pair[0] as conn:
                yield conn

        @pytest.mark.trio
        async def test_trio_fixture(one, unix_connection_pair, unix_socket_path):
            await use(unix_connection_pair, unix_socket_path)

        @pytest.mark.anyio
        async def test_anyio(unix_connection_pair, unix_socket_path):
            await use(unix_connection_pair, unix_socket_path)

        @pytest.fixture
        async def other(unix_connection_pair, anyio_backend):
            async with unix_connection_pair[0] as conn:
                yield conn

        @pytest.mark.anyio
        async def test_anyio_fixture(other, unix_connection_pair, unix_socket_path):
            await use(unix_connection_pair, unix_socket_path)

        @pytest.fixture
        async def before(anyio_backend):
            yield

        @pytest.mark.anyio
        async def test_anyio_around(before, unix_connection_pair, unix_socket_path):
            await use(unix_connection_pair, unix_socket_path)

        def test_run(unix_connection_pair, unix_socket_path):
            trio.run(use, unix_connection_pair, unix_socket_path)

        def test_anyio_run(unix_connection_pair, unix_socket_path):
            anyio.run(use, unix_connection_pair, unix_socket_path, backend="trio")
        """
    )
    # The async fixtures of anyio need a newer trio than this project does.
    lacking = not hasattr(trio.lowlevel, "in_trio_task")
    chosen = ["-k", "not (test_anyio_fixture or test_anyio_around)"] if lacking else []
    result = project.runpytest_subprocess("-v", *chosen)
    result.assert_outcomes(passed=5 if lacking else 7, deselected=2 if lacking else 0)


@pytest.mark.slow
def test_unix_socket_path_with_a_long_basetemp(project: pytest.Pytester) -> None:
    """The path is short even if pytest's is long, and its directory is removed afterwards."""
    project.makepyfile(
        """
        import socket

        def test_listen(unix_socket_path, tmp_path):
            assert len(str(tmp_path)) > 108
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(unix_socket_path) + "x" * 40)
            print("at", unix_socket_path)
        """
    )
    result = project.runpytest_subprocess("-s", f"--basetemp={project.path / ('x' * 100)}")
    result.assert_outcomes(passed=1)
    found = re.search(r"at (/\S+/socket)", result.stdout.str())
    assert found
    assert not Path(found[1]).parent.exists()


@pytest.mark.slow
def test_plugin_disabled(project: pytest.Pytester) -> None:
    """With -p no:trio_unixconn there are no fixtures; trio_unixconn.testing works."""
    project.makepyfile(
        """
        import os, pytest
        from trio_unixconn.testing import assert_no_fd_leak, clogged_pair

        def test_fixture(fd_leak_guard):
            pass

        def test_leak():
            with assert_no_fd_leak():
                os.open(os.devnull, os.O_RDONLY)
        """
    )
    result = project.runpytest_subprocess("-p", "no:trio_unixconn")
    result.assert_outcomes(errors=1, failed=1)
    result.stdout.fnmatch_lines(
        ["*fixture 'fd_leak_guard' not found", "E  *  leaked: *, /dev/null"]
    )


################################################################
# The documentation
################################################################


@pytest.mark.slow
def test_how_to_test_your_code(project: pytest.Pytester) -> None:
    """The tests in the how-to pass; without close() they fail with the text in the how-to."""
    files = dict(
        re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```$", HOW_TO, re.DOTALL | re.MULTILINE)
    )
    assert list(files) == ["sizes", "test_sizes"]
    project.makeini("[pytest]\nfilterwarnings = error\ntrio_mode = true\n")
    project.makepyfile(**files)
    project.runpytest_subprocess().assert_outcomes(passed=4)

    told = re.search(r"^```text\n(.*?)^```$", HOW_TO, re.DOTALL | re.MULTILINE)
    assert told
    project.makepyfile(sizes=files["sizes"].replace("os.close(fd)", "pass"))
    result = project.runpytest_subprocess("-k", "answers")
    result.assert_outcomes(failed=1)
    expected = re.sub(r"/\S*/test_", "/*/test_", re.sub(r"\b\d\d\b", "*", told[1]))
    result.stdout.fnmatch_lines(expected.splitlines())
