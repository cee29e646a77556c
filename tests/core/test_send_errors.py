"""What the error of a send says: its class, errno and code, and how much was sent before."""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock, assert_checkpoints, wait_all_tasks_blocked

from tests._helpers.fds import clog, drain, free_descriptors, some
from tests._helpers.peers import stdlib_peer
from tests._helpers.requirements import skip_unless_ci
from trio_unixconn import (
    Cancellable,
    ConnectionBrokenError,
    ConnectionBusyError,
    Credentials,
    DescriptorsRefusedError,
    IOErrorEnum,
    OperationCancelled,
    SendError,
    UnixConnection,
    UnixConnectionError,
    _socket,
    connection_pair,
)
from trio_unixconn._sender import INITIAL_BACKOFF, MAX_BACKOFF
from trio_unixconn._socket import RETRY_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

BIG = 10_000_000


class Fake:
    """A socket that sends 3 bytes at a time, or whose system calls fail.

    Args:
      errnos: one for each call; 0 sends. The last one is for all further calls, too.
    """

    def __init__(self, sock: socket.socket, *errnos: int) -> None:
        self.sock = sock
        self.errnos = list(errnos)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def refuse(self) -> None:
        number = self.errnos[0] if len(self.errnos) == 1 else self.errnos.pop(0)
        if number:
            raise OSError(number, os.strerror(number))

    def sendmsg(self, data: list[Any], *arguments: Any) -> int:
        self.refuse()
        return self.sock.sendmsg([data[0][:3]], *arguments)

    def send(self, data: memoryview, *arguments: Any) -> int:
        self.refuse()
        return self.sock.send(data[:3], *arguments)


def fake(conn: UnixConnection, *errnos: int) -> None:
    conn._sender.raw = Fake(conn._sender.raw, *errnos)  # type: ignore[assignment]


async def received(conn: UnixConnection, count: int) -> None:
    """Receive exactly that many bytes."""
    while count:
        with await conn.receive_message(count) as message:
            assert message.data
            count -= len(message.data)
    with trio.move_on_after(0) as scope:
        await conn.receive_some()
    assert scope.cancelled_caught


################################################################
# SendError
################################################################


@pytest.mark.parametrize(
    ("number", "also", "code"),
    [
        (errno.EBADF, OSError, IOErrorEnum.FAILED),
        (errno.EMFILE, OSError, IOErrorEnum.TOO_MANY_OPEN_FILES),
        (errno.EINVAL, OSError, IOErrorEnum.INVALID_ARGUMENT),
        (errno.ENOMEM, OSError, IOErrorEnum.NO_SPACE),
        (errno.ENOBUFS, OSError, IOErrorEnum.FAILED),
        (errno.EPERM, PermissionError, IOErrorEnum.PERMISSION_DENIED),
        (errno.ESRCH, ProcessLookupError, IOErrorEnum.FAILED),
    ],
)
def test_send_error(number: int, also: type[OSError], code: IOErrorEnum) -> None:
    """A SendError is the OSError of its errno, has Gio's code, and survives pickling."""
    error = SendError(number, "text")
    assert isinstance(error, also)
    assert isinstance(error, UnixConnectionError)
    assert (error.errno, error.code, error.sent) == (number, code, 0)
    error.sent = 5
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (again.errno, again.strerror, again.code, again.sent) == (number, "text", code, 5)


@pytest.mark.parametrize("name", ["send_fd", "send_message", "send_fds"])
async def test_send_closed_fd(name: str) -> None:
    """A closed file descriptor is a SendError with EBADF, and nothing was sent."""
    one, two = connection_pair()
    closed = os.dup(0)
    os.close(closed)
    sends: dict[str, Callable[[], Awaitable[Any]]] = {
        "send_fd": lambda: one.send_fd(closed),
        "send_message": lambda: one.send_message(b"x", fds=[0, closed]),
        "send_fds": lambda: one.send_fds([0, closed, 0], per_message=1),
    }
    async with one, two:
        with pytest.raises(SendError, match=r"closed; nothing was sent") as caught:
            await sends[name]()
        assert (caught.value.errno, caught.value.sent) == (errno.EBADF, 0)
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


async def test_send_fds_closed_after_the_check() -> None:
    """A file descriptor that another thread closes after the check: .sent says how many went."""
    one, two = connection_pair()
    async with one, two:
        fake(one, 0, 0, errno.EBADF)
        with pytest.raises(
            SendError, match=r"closed; 4 of 10 file descriptors were sent"
        ) as caught:
            await one.send_fds([0] * 10, per_message=2)
        assert (caught.value.errno, caught.value.sent) == (errno.EBADF, 4)
        assert len(await drain(two, 4)) == 4


@pytest.fixture
def io_uring() -> Iterator[int]:
    """An io_uring file descriptor, which no message can carry."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(425, 4, ctypes.create_string_buffer(120))
    if fd < 0:
        skip_unless_ci(f"no io_uring: {os.strerror(ctypes.get_errno())}")
    yield fd
    os.close(fd)


async def test_send_fds_io_uring(io_uring: int) -> None:
    """An io_uring in the middle: a SendError with EINVAL says that the others were sent."""
    one, two = connection_pair()
    async with one, two:
        with pytest.raises(SendError, match=r"io_uring.*3 of 5 file descriptors were") as caught:
            await one.send_fds([0, 0, 0, io_uring, 0], per_message=1)
        assert (caught.value.errno, caught.value.sent) == (errno.EINVAL, 3)
        assert caught.value.code is IOErrorEnum.INVALID_ARGUMENT
        assert len(await drain(two, 3)) == 3
        with pytest.raises(SendError, match=r"io_uring.*nothing was sent"):
            await one.send_message(b"x", fds=[io_uring])
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


async def test_send_fds_no_free_fd_after_a_part() -> None:
    """No file descriptor is free for the duplicates, after a part was sent: .sent says how many."""
    one, two = connection_pair()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    async with one, two:
        with some(500) as fds, free_descriptors(3):
            with pytest.raises(SendError, match=r"RLIMIT_NOFILE is \d+.*of 500 file") as caught:
                await one.send_fds(fds, per_message=1)
            assert caught.value.errno == errno.EMFILE
            assert caught.value.code is IOErrorEnum.TOO_MANY_OPEN_FILES
            assert 0 < caught.value.sent < 500
        assert await drain(two, caught.value.sent) == list(range(caught.value.sent))
        # It was no whole message that is missing.
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


@pytest.mark.parametrize("with_fds", [False, True])
async def test_send_message_eperm_without_a_cause(*, with_fds: bool) -> None:
    """EPERM is the peer's SO_PASSRIGHTS only if file descriptors were sent."""
    one, two = connection_pair()
    async with one, two:
        fake(one, errno.EPERM)
        with pytest.raises(SendError) as caught:
            await one.send_message(b"x", fds=[0] if with_fds else [], credentials=Credentials())
        assert isinstance(caught.value, PermissionError)
        assert isinstance(caught.value, DescriptorsRefusedError) is with_fds


async def test_send_message_refused_with_foreign_credentials() -> None:
    """If the credentials can be the cause as well as the peer, the error names both."""
    one, two = connection_pair()
    own = Credentials()
    async with one, two:
        fake(one, errno.EPERM)
        with pytest.raises(SendError, match=r"only a privileged .* or the peer does not") as caught:
            await one.send_message(
                b"x", fds=[0], credentials=Credentials(own.pid, own.uid + 1, own.gid)
            )
        assert not isinstance(caught.value, DescriptorsRefusedError)
        with pytest.raises(SendError, match="only a privileged process"):
            await one.send_fake_credentials(Credentials(1, own.uid, own.gid))


async def test_send_fake_credentials_without_process() -> None:
    """Credentials of a process that does not exist are a ProcessLookupError and SendError."""
    if os.geteuid():
        pytest.skip("only root can send the pid of another process")
    one, two = connection_pair()
    own = Credentials()
    async with one, two:
        process = await trio.run_process(
            [sys.executable, "-c", "import os; print(os.getpid())"],
            capture_stdout=True,
        )
        gone = Credentials(int(process.stdout), own.uid, own.gid)
        with pytest.raises(ProcessLookupError, match="no process has the pid") as caught:
            await one.send_fake_credentials(gone)
        assert isinstance(caught.value, SendError)


async def test_send_message_credentials_must_be_credentials() -> None:
    """Other objects than Credentials are a TypeError, before anything is sent."""
    one, two = connection_pair()
    async with one, two:
        for bad in ("own", (1, 2, 3), 0):
            with pytest.raises(TypeError, match="must be Credentials or None, got"):
                await one.send_message(b"x", credentials=bad)  # type: ignore[arg-type]
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


################################################################
# Half a message
################################################################


async def test_send_message_fails_after_a_part() -> None:
    """An error after a part of a message says how many bytes were sent, and so does the next."""
    one, two = connection_pair()
    async with one, two:
        fake(one, 0, errno.EACCES)
        with pytest.raises(SendError, match="Permission denied; 3 of 10 bytes were sent") as caught:
            await one.send_message(b"m" * 10, fds=[0])
        assert (caught.value.sent, caught.value.errno) == (3, errno.EACCES)
        assert caught.value.code is IOErrorEnum.PERMISSION_DENIED
        for _ in range(2):
            with pytest.raises(ConnectionBrokenError, match="after 3 bytes") as later:
                await one.send_all(b"x")
            assert later.value.sent == 3
        await received(two, 3)


@pytest.mark.parametrize("way", ["scope", "cancellable"])
async def test_send_message_cancelled_after_a_part(way: str) -> None:
    """Half a message: OperationCancelled has .sent, and the next send's error always has it."""
    one, two = connection_pair()
    cancellable = Cancellable()
    sent: list[int] = []

    async def send() -> None:
        try:
            await one.send_message(b"m" * BIG, fds=[0], cancellable=cancellable)
        except OperationCancelled as exc:
            sent.append(exc.sent)

    async with one, two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel() if way == "scope" else cancellable.cancel()
        with pytest.raises(ConnectionBrokenError) as caught:
            await one.send_fd(0)
        assert 0 < caught.value.sent < BIG
        assert sent == ([] if way == "scope" else [caught.value.sent])
        await received(two, caught.value.sent)


@pytest.mark.parametrize("name", ["send_message", "send_all"])
async def test_send_broken_after_a_part(name: str) -> None:
    """A peer that leaves: ConnectionBrokenError says how many bytes the kernel took."""
    one, two = connection_pair()
    async with one, trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(ConnectionBrokenError, match="connection is broken") as caught:
                await getattr(one, name)(b"m" * BIG)
            assert 0 < caught.value.sent < BIG

        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        await two.aclose()


async def test_send_message_busy_after_a_part() -> None:
    """A task that waits for the socket with trio's own function: ConnectionBusyError has .sent."""
    one, two = connection_pair()
    async with one, two, trio.open_nursery() as nursery:
        count = clog(one)
        nursery.start_soon(trio.lowlevel.wait_writable, one.socket)
        await wait_all_tasks_blocked()
        # There is room before the other task is woken.
        while count:
            count -= len(two._receiver.raw.recv(count))
        with pytest.raises(ConnectionBusyError, match="another task is waiting") as caught:
            await one.send_message(b"m" * BIG)
        assert 0 < caught.value.sent < BIG
        with pytest.raises(ConnectionBrokenError) as later:
            await one.send_message(b"x")
        assert later.value.sent == caught.value.sent
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("name", ["send_eof", "wait_send_all_might_not_block"])
async def test_after_half_a_message(name: str) -> None:
    """After half a message, ending the stream or waiting to send is an error with .sent, too."""
    one, two = connection_pair()
    async with one, two:
        fake(one, 0, errno.EACCES)
        with pytest.raises(SendError):
            await one.send_message(b"m" * 10)
        with assert_checkpoints(), pytest.raises(ConnectionBrokenError) as caught:
            await getattr(one, name)()
        assert caught.value.sent == 3


################################################################
# Resources that stay exhausted
################################################################

RETRIED = [errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM]


@pytest.mark.parametrize("number", RETRIED)
async def test_send_fd_retries_and_gives_up(number: int, autojump_clock: MockClock) -> None:
    """An exhausted resource is retried with backoff, for a bounded time; the error names it."""
    limits = {
        errno.ETOOMANYREFS: r"in flight than RLIMIT_NOFILE \(\d+\) allows",
        errno.ENOBUFS: r"net\.core\.optmem_max \(\d+ bytes\) allows",
        errno.ENOMEM: "out of memory",
    }
    one, two = connection_pair()
    async with one, two:
        fake(one, number)
        begin = trio.current_time()
        with pytest.raises(SendError, match=f"still so after 30 s: .*{limits[number]}") as caught:
            await one.send_fd(0)
        assert RETRY_TIMEOUT <= trio.current_time() - begin <= RETRY_TIMEOUT + 2 * MAX_BACKOFF
        assert (caught.value.errno, caught.value.sent) == (number, 0)
        assert str(caught.value).endswith("; nothing was sent")


async def test_send_fd_gives_up_without_proc(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """Where /proc cannot be read, the error says that the limit is unknown."""

    def no_proc(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(_socket, "open", no_proc, raising=False)
    one, two = connection_pair()
    async with one, two:
        fake(one, errno.ENOBUFS)
        with pytest.raises(SendError, match=r"optmem_max \(unknown\)"):
            await one.send_fd(0)


async def test_send_all_gives_up_as_a_broken_stream(autojump_clock: MockClock) -> None:
    """For send_all, as for trio's streams, every error of the kernel is a broken stream."""
    one, two = connection_pair()
    async with one, two:
        fake(one, 0, errno.ENOMEM)
        with pytest.raises(ConnectionBrokenError, match="out of memory") as caught:
            await one.send_all(b"x" * 10)
        assert caught.value.sent == 3


async def test_send_message_gives_up_after_a_part(autojump_clock: MockClock) -> None:
    """A resource that stays exhausted after a part of a message: the error has .sent."""
    one, two = connection_pair()
    async with one, two:
        fake(one, 0, errno.EAGAIN, 0, errno.ENOBUFS)
        with pytest.raises(SendError, match="6 of 10 bytes were sent") as caught:
            await one.send_message(b"x" * 10)
        assert caught.value.sent == 6


async def test_send_fds_starts_the_time_again_after_progress(autojump_clock: MockClock) -> None:
    """Progress, or a full socket in between, starts the time and the backoff again."""
    one, two = connection_pair()
    # 1 + 2 + ... + 64 ms, and 290 times 100 ms: a second less than the limit.
    long = [errno.ENOMEM] * (7 + 290)
    async with one, two:
        fake(one, *long, 0, *long, errno.EAGAIN, *long, 0)
        begin = trio.current_time()
        assert await one.send_fds([0] * 2, per_message=1) == 2
        assert trio.current_time() - begin == pytest.approx(3 * (0.127 + 29))
        assert INITIAL_BACKOFF == 0.001


async def test_send_fds_gives_up_after_a_part(autojump_clock: MockClock) -> None:
    """Giving up within a burst says how many file descriptors were sent."""
    one, two = connection_pair()
    async with one, two:
        fake(one, 0, 0, errno.ETOOMANYREFS)
        with pytest.raises(SendError, match="4 of 6 file descriptors were sent") as caught:
            await one.send_fds([0] * 6, per_message=2)
        assert caught.value.sent == 4


@pytest.mark.parametrize("way", ["scope", "cancellable"])
async def test_send_fds_cancelled_in_a_backoff(way: str) -> None:
    """A backoff can be cancelled, and what was sent before is counted."""
    one, two = connection_pair()
    cancellable = Cancellable()
    results: list[int] = []

    async def send() -> None:
        try:
            results.append(await one.send_fds([0] * 3, per_message=1, cancellable=cancellable))
        except OperationCancelled as exc:
            results.append(exc.sent)

    async with one, two:
        async with trio.open_nursery() as nursery:
            fake(one, 0, errno.ENOMEM)
            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel() if way == "scope" else cancellable.cancel()
        assert results == [1]


IN_FLIGHT = """
import errno, os, resource, socket, trio
from trio.testing import MockClock
from trio_unixconn import SendError, connection_pair

async def main():
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    one, two = connection_pair()
    try:
        await one.send_fds([0] * 100, per_message=1)
    except SendError as exc:
        assert exc.errno == errno.ETOOMANYREFS, exc
        assert 30 < exc.sent < 60, exc.sent
        assert "RLIMIT_NOFILE (40)" in str(exc), exc
        assert f"{exc.sent} of 100 file descriptors were sent" in str(exc), exc
    else:
        raise AssertionError("all were sent")
    await one.aclose()
    await two.aclose()
    print("done")

trio.run(trio.lowlevel.checkpoint)  # whatever is imported late, while it can be read
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(54322)
    os.setuid(54322)
trio.run(main, clock=MockClock(autojump_threshold=0))
"""

OPTMEM = """
import ctypes, errno, os, trio
from trio.testing import MockClock
from trio_unixconn import SendError, connection_pair

libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x40000000):  # CLONE_NEWNET
    print("skip: no network namespace")
    raise SystemExit
try:
    with open("/proc/sys/net/core/optmem_max", "w") as file:
        file.write("500")
except OSError as exc:
    print("skip: optmem_max cannot be set:", exc)
    raise SystemExit

async def main():
    one, two = connection_pair()
    try:
        await one.send_fds([0] * 300)
    except SendError as exc:
        assert (exc.errno, exc.sent) == (errno.ENOBUFS, 0), exc
        assert "net.core.optmem_max (500 bytes)" in str(exc), exc
    else:
        raise AssertionError("all were sent")
    assert await one.send_fds([0] * 300, per_message=100) == 300
    got = 0
    while got < 300:
        with await two.receive_fds(300) as fds:
            got += len(fds)
    await one.aclose()
    await two.aclose()
    print("done")

trio.run(main, clock=MockClock(autojump_threshold=0))
"""


async def test_send_fds_too_many_in_flight() -> None:
    """A real ETOOMANYREFS that nothing lifts ends in an error with .sent and the limit."""
    done = await trio.run_process(
        [sys.executable, "-c", IN_FLIGHT], capture_stdout=True, capture_stderr=True, check=False
    )
    assert done.stdout == b"done\n", done.stderr.decode()


async def test_send_fds_optmem_max() -> None:
    """A real ENOBUFS names net.core.optmem_max, and smaller messages pass."""
    if os.geteuid():
        pytest.skip("only root can make a network namespace")
    done = await trio.run_process(
        [sys.executable, "-c", OPTMEM], capture_stdout=True, capture_stderr=True, check=False
    )
    if done.stdout.startswith(b"skip"):
        skip_unless_ci(done.stdout.decode())
    assert done.stdout == b"done\n", done.stderr.decode()


async def test_send_to_a_peer_that_refuses_in_the_middle() -> None:
    """A peer that stops accepting file descriptors: DescriptorsRefusedError has .sent and code."""
    async with stdlib_peer() as peer:
        await peer.conn.send_fds([0] * 2)
        if not await peer.ask("disable_passrights"):
            pytest.skip("this kernel has no SO_PASSRIGHTS (Linux 6.16)")
        with pytest.raises(DescriptorsRefusedError, match=r"SO_PASSRIGHTS=0.*nothing") as caught:
            await peer.conn.send_fds([0] * 3, per_message=1)
        assert (caught.value.sent, caught.value.errno) == (0, errno.EPERM)
        assert caught.value.code is IOErrorEnum.PERMISSION_DENIED
