"""``trio-unixconn send-fd`` and ``receive-fd``: descriptors from a shell, and to one.

Invariant: errors at this end are reported before a connection is made. At a path that this
command binds, only the same user may connect unless an option says otherwise.
"""

from __future__ import annotations

import enum
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import attrs
import trio
import typer

from .. import _kernel
from .._client import open_unix_connection
from .._connection import UnixConnection
from .._fdlist import UnixFDList
from .._fdtypes import kind_of
from .._listener import open_unix_listener
from .._policy import PeerPolicy
from ..errors import ConnectionBrokenError, EndOfStreamError
from ._activation import FIRST, become, check_command, is_inherited
from ._console import address_of, fail, run, say, seconds, too_slow

if TYPE_CHECKING:
    from .._address import UnixSocketAddress
    from .._listener import UnixListener

T = TypeVar("T")

# sock_diag(7): what SIOCOUTQ tells, for a connection whose number is not public.
_WMEM_ALLOC: Final = 2
# In seconds: between two attempts to connect, and between two looks at what is not received yet.
INITIAL_DELAY: Final = 0.001
MAX_CONNECT_DELAY: Final = 0.2
MAX_RECEIPT_DELAY: Final = 0.05


class Mode(str, enum.Enum):
    """How to open files, as Python's ``open`` calls it."""

    READ = "r"
    WRITE = "w"
    APPEND = "a"
    READ_AND_WRITE = "r+"


_FLAGS: Final = {
    Mode.READ: os.O_RDONLY,
    Mode.WRITE: os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    Mode.APPEND: os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    Mode.READ_AND_WRITE: os.O_RDWR,
}


@attrs.frozen
class Meeting:
    """Where and how the two sides meet.

    Attributes:
      timeout: the maximum duration in seconds of all that the command does there.
      wait: for how many seconds to retry while no process listens.
    """

    address: UnixSocketAddress
    listen: bool
    any_user: bool
    timeout: float
    wait: float

    async def connect(self) -> UnixConnection:
        """Connect; until ``wait`` seconds have passed, retry while no process listens."""
        deadline = trio.current_time() + self.wait
        for delay in backoff(MAX_CONNECT_DELAY):
            try:
                return await open_unix_connection(self.address)
            except (FileNotFoundError, ConnectionRefusedError):
                left = deadline - trio.current_time()
                if left <= 0:
                    raise
            await trio.sleep(min(delay, left))
        raise AssertionError  # pragma: no cover - there is no last delay

    async def listen_there(self) -> UnixListener:
        """Listen; unless an option says otherwise, for the same user only."""
        return await open_unix_listener(
            self.address,
            mode=0o666 if self.any_user else 0o600,
            policy=None if self.any_user else PeerPolicy.same_user(),
        )


SocketArgument = Annotated[
    str,
    typer.Argument(
        metavar="PATH", help="The socket: a path, @name for an abstract name, or a unix: URI."
    ),
]
AnyUser = Annotated[
    bool,
    typer.Option("--any-user", help="When listening: let any user connect, not only your own."),
]
Timeout = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", help="Give up after SECONDS (default: never)."),
]
Wait = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        help="When connecting: retry for SECONDS while no process listens at PATH.",
    ),
]


def send_fd(
    path: SocketArgument,
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE", help="What to open and send; - is standard input."),
    ] = None,
    *,
    mode: Annotated[Mode, typer.Option(help="How to open each FILE.")] = Mode.READ,
    fd: Annotated[
        list[int] | None,
        typer.Option(
            min=0, metavar="N", help="Send an inherited descriptor, after the files; repeatable."
        ),
    ] = None,
    listen: Annotated[
        bool, typer.Option("--listen", help="Wait at PATH for a receiver instead.")
    ] = False,
    any_user: AnyUser = False,
    wait: Wait = 0,
    timeout: Timeout = None,
) -> None:
    """Open files and send their descriptors to the process that listens at PATH.

    Each goes in a message of its own, in order; then the stream ends.
    Exit status 0 when the receiver has received them all.
    """
    meeting = _meeting(path, listen=listen, any_user=any_user, timeout=timeout, wait=wait)
    if not files and not fd:
        fail("nothing to send: give a FILE, or --fd N", status=2)
    with _opened(files or [], mode, fd or []) as fds:
        run(partial(_in_time, meeting, partial(_send, meeting, fds)))


def receive_fd(
    path: SocketArgument,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- COMMAND", help="What to run with the descriptors, from 3 on."),
    ] = None,
    *,
    count: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Take at most N, and do not wait for more."),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="For LISTEN_FDNAMES, in order; repeatable."),
    ] = None,
    connect: Annotated[
        bool, typer.Option("--connect", help="Connect to PATH instead of listening there.")
    ] = False,
    blocking: Annotated[
        bool,
        typer.Option("--blocking", help="Clear O_NONBLOCK of what is received, for its holders."),
    ] = False,
    any_user: AnyUser = False,
    wait: Wait = 0,
    timeout: Timeout = None,
) -> None:
    """Wait at PATH for descriptors, and become COMMAND with them.

    They are received until the sender ends the stream. COMMAND gets them from 3 on,
    with LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES as systemd sets them.
    Without COMMAND, they are listed.
    """
    meeting = _meeting(path, listen=not connect, any_user=any_user, timeout=timeout, wait=wait)
    names = name or []
    for each in names:
        if not (each.isascii() and each.isprintable() and 0 < len(each) < 256) or ":" in each:
            fail(f"{each!r}: a name has 1 to 255 characters of ASCII, and no colon", status=2)
    if command:
        check_command(command)
    with run(partial(_in_time, meeting, partial(_receive, meeting, count))) as fds:
        if not fds:
            fail(f"{meeting.address}: end of stream while waiting for a file descriptor")
        if blocking:
            for number in fds:
                os.set_blocking(number, True)
        if command:
            become(command, list(fds), names)
        for place, number in enumerate(fds, FIRST):
            say(f"{place:<4} {kind_of(number).value:<17} {_link_of(number)}")


def _meeting(
    path: str, *, listen: bool, any_user: bool, timeout: float | None, wait: float
) -> Meeting:
    if wait and listen:
        fail("--wait can only be used when connecting", status=2)
    if not wait >= 0:
        fail("--wait is a number of seconds, 0 or more", status=2)
    if any_user and not listen:
        fail("--any-user can only be used when listening", status=2)
    return Meeting(address_of(path), listen, any_user, seconds(timeout), wait)


@contextmanager
def _opened(
    files: Sequence[str], mode: Mode, inherited: Sequence[int]
) -> Generator[list[int], None, None]:
    # First of all, before a file that is opened gets such a number.
    for number in [*(0 for file in files if file == "-"), *inherited]:
        if not is_inherited(number):
            fail(f"descriptor {number} is not open; the parent process must pass it on")
    fds: list[int] = []
    with ExitStack() as stack:
        for file in files:
            if file == "-":
                fds.append(0)
                continue
            try:
                fd = os.open(file, _FLAGS[mode] | os.O_CLOEXEC, 0o666)
            except OSError as exc:
                fail(f"{file}: {exc.strerror}")
            stack.callback(os.close, fd)
            fds.append(fd)
        yield [*fds, *inherited]


async def _in_time(meeting: Meeting, work: Callable[[], Awaitable[T]]) -> T:
    try:
        with trio.fail_after(meeting.timeout):
            return await work()
    except trio.TooSlowError as exc:
        raise too_slow(meeting.timeout, meeting.address) from exc


def backoff(longest: float) -> Generator[float, None, None]:
    """Return delays in seconds, each twice as long as the last, without an end."""
    delay = INITIAL_DELAY
    while True:
        yield delay
        delay = min(2 * delay, longest)


################################################################
# Sending
################################################################


async def _send(meeting: Meeting, fds: Sequence[int]) -> None:
    if not meeting.listen:
        async with await meeting.connect() as conn:
            await _send_on(conn, fds)
        return
    async with await meeting.listen_there() as listener:
        while True:
            async with await listener.accept() as conn:
                try:
                    await _send_received(conn, fds[:1])
                except ConnectionBrokenError:
                    # It received nothing: another command looked at the path, or listens there.
                    continue
                # Later clients get ECONNREFUSED at once.
                await listener.aclose()
                await _send_on(conn, fds[1:])
                return


async def _send_on(conn: UnixConnection, fds: Sequence[int]) -> None:
    await _send_received(conn, fds)
    # A receiver that counts may have closed the connection, with everything received.
    with suppress(ConnectionBrokenError):
        await conn.send_eof()


async def _send_received(conn: UnixConnection, fds: Sequence[int]) -> None:
    """Send descriptors, and wait until the peer has received them.

    A descriptor in the queue of a connection that nothing accepts, or whose peer closes it, is
    closed by the kernel. So the kernel's acceptance of it proves nothing.

    Raises:
      ConnectionBrokenError: the peer has closed the connection, and has not received them all.
    """
    for fd in fds:
        await conn.send_fd(fd)
    delays = backoff(MAX_RECEIPT_DELAY)
    # No event tells that the peer has received something.
    while _unreceived_memory(conn):  # noqa: ASYNC110
        await trio.sleep(next(delays))
    # unix(7): a peer that closes with data in its queue resets the connection. The kernel does
    # that before it empties the queue.
    if error := conn.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise ConnectionBrokenError(
            f"the peer has closed the connection without receiving everything: {os.strerror(error)}"
        )


def _unreceived_memory(conn: UnixConnection) -> int:
    """Return how much memory of the kernel messages use that the peer has not received."""
    option = _kernel.required(_kernel.SO_MEMINFO, "SO_MEMINFO")
    numbers = conn.getsockopt(socket.SOL_SOCKET, option, 4 * (_WMEM_ALLOC + 1))
    return int.from_bytes(numbers[-4:], sys.byteorder)


################################################################
# Receiving
################################################################


async def _receive(meeting: Meeting, count: int | None) -> UnixFDList:
    fds: list[int] = []
    try:
        if meeting.listen:
            conn = await _accept_sender(meeting, count, fds)
        else:
            conn = await meeting.connect()
        async with conn:
            with suppress(EndOfStreamError):
                while count is None or len(fds) < count:
                    fds += await _receive_some(conn, count, fds)
    except BaseException:
        UnixFDList(fds).close()
        raise
    return UnixFDList(fds)


async def _receive_some(conn: UnixConnection, count: int | None, fds: Sequence[int]) -> list[int]:
    limit = _kernel.SCM_MAX_FD if count is None else count - len(fds)
    return (await conn.receive_fds(limit)).steal_fds()


async def _accept_sender(meeting: Meeting, count: int | None, fds: list[int]) -> UnixConnection:
    """Return the first connection that brings descriptors, and put those into ``fds``.

    Connections that end without anything are ignored: ``peer`` makes one, as does a second command
    for the same path. One that stays silent does not hold up the others.
    """
    senders: list[UnixConnection] = []

    async def receive_first(conn: UnixConnection) -> None:
        async with AsyncExitStack() as stack:
            number = conn.detach()
            conn = UnixConnection.from_fd(number)
            await stack.enter_async_context(conn)
            await trio.lowlevel.wait_readable(number)
            # One at a time: what is not received here, its sender reports.
            async with lock:
                try:
                    fds.extend(await _receive_some(conn, count, fds))
                except (EndOfStreamError, ConnectionBrokenError):
                    return
                stack.pop_all()
                senders.append(conn)
                nursery.cancel_scope.cancel()

    lock = trio.Lock()
    try:
        async with await meeting.listen_there() as listener, trio.open_nursery() as nursery:
            while True:
                nursery.start_soon(receive_first, await listener.accept())
    except BaseException:
        for conn in senders:
            await trio.aclose_forcefully(conn)
        raise
    return senders[0]


def _link_of(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return "-"
