"""``trio-unixconn send-fd`` and ``receive-fd``: descriptors from a shell, and to one.

Invariant: errors at this end are reported before a connection is made. At a path that this
command binds, only the same user may connect unless an option says otherwise.
"""

from __future__ import annotations

import enum
import os
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import attrs
import trio
import typer

from .. import _kernel
from .._client import open_unix_connection
from .._fdlist import UnixFDList
from .._fdtypes import kind_of
from .._listener import open_unix_listener
from .._policy import PeerPolicy
from ..errors import EndOfStreamError
from ._activation import FIRST, become, check_command, is_inherited
from ._console import address_of, fail, run, say, seconds, too_slow

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence

    from .._address import UnixSocketAddress
    from .._connection import UnixConnection

T = TypeVar("T")


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
    """Where and how the two sides meet, and for how many seconds at most."""

    address: UnixSocketAddress
    listen: bool
    any_user: bool
    timeout: float

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[UnixConnection, None]:
        """Connect, or wait for one that does."""
        if not self.listen:
            async with await open_unix_connection(self.address) as conn:
                yield conn
            return
        listener = await open_unix_listener(
            self.address,
            mode=0o666 if self.any_user else 0o600,
            policy=None if self.any_user else PeerPolicy.same_user(),
        )
        async with listener, await listener.accept() as conn:
            # Later clients get ECONNREFUSED at once.
            await listener.aclose()
            yield conn


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
        bool, typer.Option("--listen", help="Wait at PATH for one connection instead.")
    ] = False,
    any_user: AnyUser = False,
    timeout: Timeout = None,
) -> None:
    """Open files and send their descriptors to the process that listens at PATH.

    Each goes in a message of its own, in order; then the stream ends.
    Exit status 0 as soon as the kernel has them all.
    """
    meeting = _meeting(path, listen=listen, any_user=any_user, timeout=timeout)
    if not files and not fd:
        fail("nothing to send: give a FILE, or --fd N", status=2)
    with _opened(files or [], mode, fd or []) as fds:
        run(partial(_in_time, meeting, partial(_send, fds)))


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
    any_user: AnyUser = False,
    timeout: Timeout = None,
) -> None:
    """Wait at PATH for descriptors, and become COMMAND with them.

    They are received until the sender ends the stream. COMMAND gets them from 3 on,
    with LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES as systemd sets them.
    Without COMMAND, they are listed.
    """
    meeting = _meeting(path, listen=not connect, any_user=any_user, timeout=timeout)
    names = name or []
    for each in names:
        if not (each.isascii() and each.isprintable() and 0 < len(each) < 256) or ":" in each:
            fail(f"{each!r}: a name has 1 to 255 characters of ASCII, and no colon", status=2)
    if command:
        check_command(command)
    with run(partial(_in_time, meeting, partial(_receive, count))) as fds:
        if not fds:
            fail(f"{meeting.address}: end of stream while waiting for a file descriptor")
        if command:
            become(command, list(fds), names)
        for place, number in enumerate(fds, FIRST):
            say(f"{place:<4} {kind_of(number).value:<17} {_link_of(number)}")


def _meeting(path: str, *, listen: bool, any_user: bool, timeout: float | None) -> Meeting:
    if any_user and not listen:
        fail("--any-user can only be used when listening", status=2)
    return Meeting(address_of(path), listen, any_user, seconds(timeout))


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


async def _in_time(meeting: Meeting, work: Callable[[UnixConnection], Awaitable[T]]) -> T:
    try:
        with trio.fail_after(meeting.timeout):
            async with meeting.connection() as conn:
                return await work(conn)
    except trio.TooSlowError as exc:
        raise too_slow(meeting.timeout, meeting.address) from exc


async def _send(fds: Sequence[int], conn: UnixConnection) -> None:
    for fd in fds:
        await conn.send_fd(fd)
    await conn.send_eof()


async def _receive(count: int | None, conn: UnixConnection) -> UnixFDList:
    fds: list[int] = []
    try:
        while count is None or len(fds) < count:
            limit = _kernel.SCM_MAX_FD if count is None else count - len(fds)
            fds += (await conn.receive_fds(limit)).steal_fds()
    except EndOfStreamError:
        pass
    except BaseException:
        UnixFDList(fds).close()
        raise
    return UnixFDList(fds)


def _link_of(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return "-"
