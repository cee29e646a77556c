"""The demonstration itself: two workers, everything that can be handed over, and a report.

Invariant: every figure in the report was measured in this run.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import trio

from ..._callbacks import open_callback_adapter
from ..._cancellable import Cancellable
from ..._client import open_unix_connection
from ..._credentials import Credentials
from ...errors import OperationCancelled
from . import wire

if TYPE_CHECKING:
    from ..._callback_connection import CallbackConnection
    from ..._connection import UnixConnection
    from ..._results import AsyncResult

WORKERS = 2
_SUN_PATH = 107


@attrs.frozen
class Transfer:
    """One open file that was handed over.

    Attributes:
      worker: number of the worker that got it.
      what: a path, "pipe" or "TCP connection".
      peer: pid, uid and gid of the worker, as the kernel vouches for them.
      here, there: what this process and the worker found at their descriptor.
      seconds: from opening to the answer.
    """

    worker: int
    what: str
    peer: list[int]
    here: wire.Seen
    there: wire.Seen
    seconds: float

    @property
    def same(self) -> bool:
        """Whether both sides saw the same open file and the same bytes."""
        return self.here == self.there


@attrs.frozen
class Exchange:
    """Credentials, sent both ways; each side's pid, uid and gid, and what the other got."""

    worker: int
    form: str
    ours: list[int]
    they_received: list[int]
    theirs: list[int]
    we_received: list[int]

    @property
    def same(self) -> bool:
        """Whether each side received what the other is."""
        return self.ours == self.they_received and self.theirs == self.we_received


@attrs.frozen
class Descriptors:
    """How many descriptors a process had open before and after."""

    process: str
    before: int
    after: int

    @property
    def same(self) -> bool:
        """Whether none was left open."""
        return self.before == self.after


@attrs.define
class Report:
    """Everything that the demonstration did and found."""

    transfers: list[Transfer] = attrs.field(factory=list[Transfer])
    exchanges: list[Exchange] = attrs.field(factory=list[Exchange])
    # Of each worker: whether a receive, cancelled by a thread, ended as it should.
    cancelled: list[bool] = attrs.field(factory=list[bool])
    descriptors: list[Descriptors] = attrs.field(factory=list[Descriptors])
    # Files that could not be opened, with the reason.
    skipped: list[str] = attrs.field(factory=list[str])
    seconds: float = 0.0

    def differences(self) -> list[str]:
        """Say in a line each what is not as it should be."""
        lines = [
            f"{each.what}: worker {each.worker} saw {each.there.bytes} bytes, "
            f"{each.there.sha256[:12]}, of {each.there.identity}; here it is {each.here.bytes} "
            f"bytes, {each.here.sha256[:12]}, of {each.here.identity}"
            for each in self.transfers
            if not each.same
        ]
        lines += [
            f"credentials by {each.form}: worker {each.worker} is {each.theirs} and sent "
            f"{each.we_received}; this process is {each.ours} and the worker got "
            f"{each.they_received}"
            for each in self.exchanges
            if not each.same
        ]
        lines += [
            f"worker {number}: the cancelled receive did not end with OperationCancelled"
            for number, cancelled in enumerate(self.cancelled, 1)
            if not cancelled
        ]
        lines += [
            f"{each.process}: {each.before} descriptors were open before, {each.after} after"
            for each in self.descriptors
            if not each.same
        ]
        return lines


def files_in(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """Return the regular files among ``paths`` and in the directorys among them.

    Returns:
      The files, and a line for each directory that could not be read.

    Raises:
      OSError: a path that does not exist, or is neither a file nor a directory.
    """
    found: list[Path] = []
    problems: list[str] = []

    def on_error(exc: OSError) -> None:
        problems.append(f"{exc.filename}: {exc.strerror}")

    for path in paths:
        if path.is_dir():
            for directory, _, names in os.walk(path, onerror=on_error):
                for name in sorted(names):
                    file = Path(directory, name)
                    try:
                        if stat.S_ISREG(file.lstat().st_mode):
                            found.append(file)
                    except OSError as exc:
                        # It was there a moment ago.
                        on_error(exc)
        elif stat.S_ISREG(path.stat().st_mode):
            found.append(path)
        else:
            raise OSError(errno.EINVAL, "neither a regular file nor a directory", str(path))
    return found, problems


async def run(files: list[Path], on_progress: Callable[[int, int], None]) -> Report:
    """Hand ``files`` and more to two worker processes and compare what both sides see.

    Args:
      files: each is opened once for each worker.
      on_progress: called with the transfers done and the transfers due.

    Raises:
      ExceptionGroup: a worker died or did not answer.
    """
    report = Report()
    begin, before = time.perf_counter(), wire.count_descriptors()
    progress = Progress(WORKERS * (len(files) + 2), on_progress)
    with short_directory() as directory:
        async with trio.open_nursery() as nursery:
            for number in range(1, WORKERS + 1):
                path = os.path.join(directory, f"worker-{number}.sock")
                nursery.start_soon(one_worker, number, path, files, report, progress)
    after = wire.count_descriptors()
    report.descriptors.insert(0, Descriptors("this process", before, after))
    report.seconds = time.perf_counter() - begin
    return report


@attrs.define
class Progress:
    """Counts transfers and reports each to a callback."""

    due: int
    tell: Callable[[int, int], None]
    done: int = 0

    def step(self) -> None:
        """One more is done."""
        self.done += 1
        self.tell(self.done, self.due)


@contextmanager
def short_directory() -> Generator[str, None, None]:
    """Make a temporary directory whose sockets have names that fit into a socket's address."""
    longest = len(os.path.join(tempfile.gettempdir(), "trio-unixconn-xxxxxxxx", "worker-1.sock"))
    parent = None if longest <= _SUN_PATH else "/tmp"  # noqa: S108 - a private directory in it
    with tempfile.TemporaryDirectory(prefix="trio-unixconn-", dir=parent) as directory:
        yield directory


async def one_worker(
    number: int, path: str, files: list[Path], report: Report, progress: Progress
) -> None:
    """Start a worker at ``path``, do everything with it, and end it."""
    command = [sys.executable, "-m", "trio_unixconn._cli.demo.worker", path]
    with held_pipe() as lifeline:
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(
                partial(
                    trio.run_process,
                    command,
                    stdin=lifeline,
                    stdout=subprocess.PIPE,
                    check=False,
                    # Control-C reaches all processes of a terminal's session; a worker ends
                    # when this process says so.
                    start_new_session=True,
                )
            )
            assert process.stdout is not None  # it is a pipe
            async with process.stdout:
                said = b""
                with trio.fail_after(wire.SECONDS_TO_ANSWER):
                    while not said.endswith(b"\n"):
                        more = await process.stdout.receive_some()
                        if not more:
                            break
                        said += more
                if said != b"ready\n":
                    raise EOFError(f"worker {number} ended before it listened at {path}")
                async with await open_unix_connection(path) as connection:
                    await everything(number, connection, process.pid, files, report, progress)
    # The connection was closed, which is a worker's word to end, and the nursery has waited.
    if process.returncode:
        raise ChildProcessError(f"worker {number} ended with exit status {process.returncode}")


@contextmanager
def held_pipe() -> Generator[int, None, None]:
    """Give the reading end of a pipe, which ends when this process does, however it does."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


async def everything(
    number: int,
    connection: UnixConnection,
    pid: int,
    files: list[Path],
    report: Report,
    progress: Progress,
) -> None:
    """Do every step with one worker."""
    before = await ask(connection, wire.DESCRIPTORS)
    peer = wire.ids(connection.get_peer_credentials())
    expected = [pid, os.geteuid(), os.getegid()]
    report.cancelled.append(await cancelled_from_a_thread(connection))
    for form, exchange in (("await", exchange_by_await), ("callback", exchange_by_callback)):
        received, answer = await exchange(connection)
        report.exchanges.append(
            Exchange(number, form, wire.ids(Credentials()), answer, expected, wire.ids(received))
        )
    for what, hand_over in (("pipe", hand_over_pipe), ("TCP connection", hand_over_tcp)):
        begin = time.perf_counter()
        here, there = await hand_over(connection)
        seconds = time.perf_counter() - begin
        report.transfers.append(Transfer(number, what, peer, here, there, seconds))
        progress.step()
    for file in files:
        begin = time.perf_counter()
        try:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            here, there = await hand_over_file(connection, fd)
        except OSError as exc:
            report.skipped.append(f"{file}: {exc.strerror}")
        else:
            seconds = time.perf_counter() - begin
            report.transfers.append(Transfer(number, str(file), peer, here, there, seconds))
        progress.step()
    after = await ask(connection, wire.DESCRIPTORS)
    report.descriptors.append(Descriptors(f"worker {number}", before, after))


async def ask(connection: UnixConnection, request: bytes) -> int:
    """Send a request that takes nothing more and return the answer."""
    await connection.send_all(request)
    return int(await wire.receive_answer(connection))


async def seen_there(connection: UnixConnection) -> wire.Seen:
    """Return the worker's answer to a descriptor.

    Raises:
      OSError: the worker could not read it.
    """
    answer = await wire.receive_answer(connection)
    if "error" in answer:
        raise OSError(errno.EIO, f"the worker could not read it: {answer['error']}")
    return wire.Seen(**answer)


async def hand_over_file(connection: UnixConnection, fd: int) -> tuple[wire.Seen, wire.Seen]:
    """Hand over a descriptor, which this closes, and read the file here as well."""
    try:
        await connection.send_all(wire.FILE)
        await connection.send_fd(fd)
        try:
            # pread leaves alone the position of the open file, which the worker reads along.
            here = await wire.digest(fd, os.pread)
        except OSError:
            # The worker answers nevertheless, and the answers must stay in step.
            with suppress(OSError):
                await seen_there(connection)
            raise
        return here, await seen_there(connection)
    finally:
        os.close(fd)


async def hand_over_pipe(connection: UnixConnection) -> tuple[wire.Seen, wire.Seen]:
    """Hand over the reading end of a pipe and write into the other."""
    reading, writing = os.pipe()
    text = os.urandom(100_000)
    try:
        identity = wire.identity_of(reading)
        await connection.send_all(wire.FILE)
        await connection.send_fd(reading)
    finally:
        os.close(reading)
        stream = trio.lowlevel.FdStream(writing)
    async with stream:
        await stream.send_all(text)
    here = wire.Seen(identity, len(text), hashlib.sha256(text).hexdigest())
    return here, await seen_there(connection)


async def hand_over_tcp(connection: UnixConnection) -> tuple[wire.Seen, wire.Seen]:
    """Hand over an accepted TCP connection and be its client."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        client = await trio.open_tcp_stream(*listener.socket.getsockname()[:2])
        accepted = await listener.accept()
    async with client:
        async with accepted:
            identity = wire.identity_of(accepted.socket.fileno())
            await connection.send_all(wire.TCP)
            await connection.send_fd(accepted.socket)
        request = b"a request from process %d\n" % os.getpid()
        await client.send_all(request)
        await client.send_eof()
        answer = b"".join([chunk async for chunk in client])
    here = wire.Seen(identity, len(request), hashlib.sha256(request).hexdigest())
    # The digest that was received over the TCP connection itself is compared.
    there = attrs.evolve(await seen_there(connection), sha256=answer.decode())
    return here, there


async def exchange_by_await(connection: UnixConnection) -> tuple[Credentials, list[int]]:
    """Send our credentials, receive the worker's, and ask what it received."""
    await connection.send_all(wire.CREDENTIALS_BY_AWAIT)
    await connection.send_credentials()
    received = await connection.receive_credentials()
    return received, await wire.receive_answer(connection)


async def exchange_by_callback(connection: UnixConnection) -> tuple[Credentials, list[int]]:
    """Do the same in Gio's way."""
    received: list[Credentials] = []

    def on_sent(gio: CallbackConnection, result: AsyncResult) -> None:
        gio.send_credentials_finish(result)
        gio.receive_credentials_async(None, on_received)

    def on_received(gio: CallbackConnection, result: AsyncResult) -> None:
        received.append(gio.receive_credentials_finish(result))

    await connection.send_all(wire.CREDENTIALS_BY_CALLBACK)
    async with open_callback_adapter() as adapter:
        adapter.wrap(connection).send_credentials_async(None, on_sent)
    return received[0], await wire.receive_answer(connection)


async def cancelled_from_a_thread(connection: UnixConnection) -> bool:
    """Wait for a descriptor that is never sent until a thread fires the Cancellable."""
    cancellable = Cancellable()
    timer = threading.Timer(0.05, cancellable.cancel)
    timer.start()
    try:
        os.close(await connection.receive_fd(cancellable))
    except OperationCancelled:
        return True
    finally:
        timer.join()
    return False
