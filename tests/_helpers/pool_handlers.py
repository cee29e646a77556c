"""Handlers and setups of the tests, which workers import.

A handler reports through its stream or its answer. Files that several workers share are in the
directory that POOL_FOLDER names.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import time
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import trio
import trio.lowlevel

from tests._helpers.processes import open_descriptors
from tests._helpers.waiting import until
from trio_unixconn import (
    ConnectionBrokenError,
    Credentials,
    EndOfStreamError,
    ReadAheadError,
    Seals,
    UnexpectedControlMessageError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio_unixconn.pool import Job

LARGEST = 16 * 1024 * 1024


def note(name: str, text: object) -> None:
    """Append a line to a file that workers and the test share."""
    with open(Path(os.environ["POOL_FOLDER"], name), "a") as file:
        file.write(f"{text}\n")


def first(name: str) -> bool:
    """Whether no worker has asked this before."""
    try:
        Path(os.environ["POOL_FOLDER"], name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


################################################################
# Handlers
################################################################


async def until_draining(stream: Any, job: Job) -> None:
    """Wait until this worker is draining, and write that."""
    await stream.send_all(b"waits")
    await job.draining.wait()
    await stream.send_all(b", ends")


async def tell(stream: Any, job: Job) -> bytes:
    """Send what this handler got, by the stream if there is one, and as the answer."""
    peer = job.peer
    told = {
        "type": type(stream).__name__,
        "mode": getattr(stream, "mode", None),
        "family": stream.socket.family if isinstance(stream, trio.SocketStream) else None,
        "id": job.id,
        "data": job.data.decode(),
        "state": job.state,
        "peer": (peer.pid, peer.uid) if isinstance(peer, Credentials) else peer,
        "pid": os.getpid(),
    }
    text = json.dumps(told).encode()
    if isinstance(stream, trio.SocketStream):
        await stream.send_all(text)
    return text


async def hold(stream: Any, job: Job) -> bytes:
    """Send the pid of the worker and the id of the job, then echo until the other end is closed."""
    note("began", job.id)
    try:
        # Clients that close before they have read what was sent reset the connection.
        with suppress(ConnectionBrokenError):
            await stream.send_all(b"%d %d\n" % (os.getpid(), job.id))
            async for data in stream:
                await stream.send_all(data.upper())
    except trio.Cancelled:
        note("cancelled", job.id)
        raise
    return b"held"


async def receive(stream: Any, job: Job) -> bytes:
    """Send whether a file descriptor can be received."""
    await stream.send_all(b"%d\n" % os.getpid())
    try:
        os.close(await stream.receive_fd())
    except (UnexpectedControlMessageError, EndOfStreamError):
        return b"refused"
    return b"received"


async def copy(stream: Any, job: Job) -> bytes:
    """Read a file to its end, and write the data of the job, as far as its mode allows."""
    data: bytes = stream.read() if stream.readable() else b""
    if stream.writable():
        stream.write(job.data)
    return data


async def close_it(stream: Any, job: Job) -> bytes:
    """Close the file, as a with block does."""
    with stream:
        return b"closed"


async def map_buffer(stream: Any, job: Job) -> bytes:
    """Map the file of the job; the data is the maximum size."""
    size, *names = job.data.decode().split()
    seals = Seals[names[0]] if names else Seals.ALL
    with job.map_buffer(int(size), seals=seals) as view:
        return bytes(view).upper()


async def length(stream: Any, job: Job) -> bytes:
    return str(len(job.data)).encode()


async def do(stream: Any, job: Job) -> Any:
    """Call the function that the data names."""
    return await DEEDS[job.data.decode()](stream, job)


async def _pid(stream: Any, job: Job) -> bytes:
    return str(os.getpid()).encode()


async def _descriptors(stream: Any, job: Job) -> bytes:
    return str(open_descriptors(os.getpid())).encode()


async def _raise(stream: Any, job: Job) -> None:
    raise RuntimeError("the handler says no")


async def _forever(stream: Any, job: Job) -> None:
    note("began", job.id)
    try:
        await trio.sleep_forever()
    finally:
        note("ended", job.id)


async def _stubborn(stream: Any, job: Job) -> bytes:
    """Return an answer in spite of a cancellation."""
    note("began", job.id)
    try:
        await trio.sleep_forever()
    except trio.Cancelled:
        return b"all the same"


async def _compute(stream: Any, job: Job) -> None:
    """Block the event loop, without using the CPU."""
    os.write(stream.socket.fileno(), b"%d %d\n" % (os.getpid(), job.id))
    while True:
        time.sleep(0.01)


async def _exit(stream: Any, job: Job) -> None:
    sys.exit(3)


async def _end(stream: Any, job: Job) -> None:
    os._exit(7)


async def _signal_itself(stream: Any, job: Job) -> bytes:
    os.kill(os.getpid(), signal.SIGINT)
    return b"lives"


async def _detach(stream: Any, job: Job) -> bytes:
    stream.detach().close()
    return b"detached"


async def _nonsense(stream: Any, job: Job) -> None:
    """Send a frame that no worker sends."""
    os.write(own_end(), b"\xff\0\0\0\0\0")
    await trio.sleep_forever()


async def _strange_batch(stream: Any, job: Job) -> None:
    """Acknowledge a batch that does not exist."""
    os.write(own_end(), b"\x12\0\4\0\0\0\xff\xff\xff\xff")
    await trio.sleep_forever()


async def _strange_answer(stream: Any, job: Job) -> None:
    """Answer a job that does not exist."""
    os.write(own_end(), b"\x15\0\x08\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff")
    await trio.sleep_forever()


async def _turn_deaf(stream: Any, job: Job) -> None:
    """Stop receiving when a file exists; the worker notices it when a second file exists."""
    directory = Path(os.environ["POOL_FOLDER"])
    while not (directory / "stop receiving").exists():
        await trio.sleep(0.001)
    with socket.socket(fileno=os.dup(own_end())) as sock:
        sock.shutdown(socket.SHUT_RD)
    note("deaf", os.getpid())
    while not (directory / "go on").exists():
        time.sleep(0.001)
    await trio.sleep_forever()


class Avenger(trio.abc.Instrument):
    """An instrument that kills this process when a task has ended, before another task runs."""

    def __init__(self) -> None:
        self.task = trio.lowlevel.current_task()

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            os.kill(os.getpid(), signal.SIGKILL)


async def _finish_and_die(stream: Any, job: Job) -> None:
    trio.lowlevel.add_instrument(Avenger())


async def _hang_up(stream: Any, job: Job) -> None:
    """Close the connection to the pool, and go on."""
    with socket.socket(fileno=os.dup(own_end())) as sock:
        sock.shutdown(socket.SHUT_WR)
    await trio.sleep_forever()


def own_end() -> int:
    """Return the file descriptor of the connection to the pool."""
    return int(sys.orig_argv[-4])


def returning(value: Any) -> Any:
    async def deed(stream: Any, job: Job) -> Any:
        return value

    return deed


DEEDS = {
    "pid": _pid,
    "descriptors": _descriptors,
    "raise": _raise,
    "forever": _forever,
    "stubborn": _stubborn,
    "compute": _compute,
    "exit": _exit,
    "end": _end,
    "signal itself": _signal_itself,
    "detach": _detach,
    "nonsense": _nonsense,
    "strange batch": _strange_batch,
    "strange answer": _strange_answer,
    "turn deaf": _turn_deaf,
    "finish and die": _finish_and_die,
    "hang up": _hang_up,
    "return nothing": returning(None),
    "return much": returning(bytes(LARGEST)),
    "return too much": returning(bytes(LARGEST + 1)),
    "": returning(b"nothing to do"),
}


class Handler:
    """A handler that is an object."""

    async def __call__(self, stream: Any, job: Job) -> bytes:
        return b"of an object"

    async def method(self, stream: Any, job: Job) -> bytes:
        return b"of a method"


an_object = Handler()
a_partial = partial(partial(length), stream=None)


def not_async(stream: Any, job: Job) -> None: ...


NOT_CALLABLE = 5


################################################################
# Setups
################################################################


@asynccontextmanager
async def noted() -> AsyncGenerator[dict[str, int], None]:
    """Write when it begins and ends, and yield a state."""
    note("began", os.getpid())
    yield {"pid": os.getpid()}
    await trio.lowlevel.checkpoint()
    note("ended", os.getpid())


@asynccontextmanager
async def failing() -> AsyncGenerator[None, None]:
    raise LookupError("the setup says no")
    yield


@asynccontextmanager
async def failing_at_the_end() -> AsyncGenerator[None, None]:
    yield
    raise LookupError("the setup says no at the end")


@asynccontextmanager
async def slow_at_the_end() -> AsyncGenerator[None, None]:
    """At the end, wait until there is a file, and note the signals that a child has ignored."""
    yield
    note("ending", os.getpid())
    with trio.CancelScope(shield=True):
        await until(Path(os.environ["POOL_FOLDER"], "go on").exists)
        done = await trio.run_process(["grep", "SigIgn", "/proc/self/status"], capture_stdout=True)
    note("ended", done.stdout.decode().split()[1])


@asynccontextmanager
async def dying() -> AsyncGenerator[None, None]:
    os.kill(os.getpid(), signal.SIGKILL)
    await trio.sleep_forever()
    yield


@asynccontextmanager
async def never_ready() -> AsyncGenerator[None, None]:
    await trio.sleep_forever()
    yield


@asynccontextmanager
async def only_once() -> AsyncGenerator[None, None]:
    """Let the first worker live; the others die when they start."""
    if not first("once"):
        os._exit(9)
    yield


@asynccontextmanager
async def waiting() -> AsyncGenerator[None, None]:
    """Have all workers but the first wait before they are ready, until there is a file."""
    if not first("one"):
        note("waits", os.getpid())
        await until(Path(os.environ["POOL_FOLDER"], "go on").exists)
    yield


@asynccontextmanager
async def two_at_most() -> AsyncGenerator[None, None]:
    """Let two workers live; the others die when they start, but after those."""
    if not first("one") and not first("two"):
        await until(lambda: Path(os.environ["POOL_FOLDER"], "ready").read_text().count("\n") == 2)
        os._exit(9)
    note("ready", os.getpid())
    yield


@asynccontextmanager
async def two_are_ready() -> AsyncGenerator[None, None]:
    """Have all workers but the first two wait, until there is a file."""
    if not first("one") and not first("two"):
        note("waits", os.getpid())
        await until(Path(os.environ["POOL_FOLDER"], "go on").exists)
    note("ready", os.getpid())
    yield


@asynccontextmanager
async def dies_soon() -> AsyncGenerator[None, None]:
    """Be ready, and die."""

    async def die() -> None:
        await trio.lowlevel.checkpoint()
        os._exit(5)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(die)
        yield


@asynccontextmanager
async def one_is_poor() -> AsyncGenerator[bool, None]:
    """Leave the first worker no free file descriptor."""
    poor = first("poor")
    if poor:
        leave_free(0)
    yield poor


@asynccontextmanager
async def destitute() -> AsyncGenerator[None, None]:
    """Leave each worker no free file descriptor."""
    leave_free(0)
    yield


@asynccontextmanager
async def poor() -> AsyncGenerator[None, None]:
    """Leave each worker one free file descriptor."""
    leave_free(1)
    yield


def leave_free(count: int) -> None:
    lowest = os.open("/", os.O_RDONLY)
    os.close(lowest)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + count, hard))


async def pass_on(stream: Any, job: Job) -> object:
    """Answer each line with what this handler knows; pass the connection on when told, or drained.

    On "pass", the connection is passed on with the rest of the line as data.
    """
    await stream.send_all(b"%d %d %s\n" % (os.getpid(), job.passed, job.data or b"nothing"))
    while True:
        line = b""
        async with trio.open_nursery() as nursery:

            async def stop() -> None:
                await job.draining.wait()
                if job.can_pass_on:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(stop)
            # One byte after the other: what follows the line is the next handler's.
            while not line.endswith(b"\n") and (byte := await stream.receive_some(1)):
                line += byte
            nursery.cancel_scope.cancel()
        word, _, rest = line.strip().partition(b" ")
        if not line and job.draining.is_set() and job.can_pass_on:
            return job.pass_on(b"drained")
        if not line:
            return None
        if word == b"pass":
            return job.pass_on(rest)
        if word == b"close":
            await stream.aclose()
            return job.pass_on(rest)
        await stream.send_all(line.upper())


async def pass_on_what_cannot_be(stream: Any, job: Job) -> bytes:
    """Return why a job cannot be passed on."""
    assert not job.can_pass_on
    try:
        job.pass_on()
    except (RuntimeError, ValueError) as exc:
        text = f"{type(exc).__name__}: {exc}".encode()
        note("why", text.decode())
        return text
    return b"it can"


async def read_ahead(stream: Any, job: Job) -> bytes:
    """Try to pass on a connection that has read messages ahead."""
    os.close(await anext(stream.fds()))
    try:
        job.pass_on()
    except ReadAheadError as exc:
        note("why", exc)
    return b""


async def tell_proxy(stream: Any, job: Job) -> bytes:
    """Tell what a balancer has said, and the rest of the stream."""
    rest = b"".join([chunk async for chunk in stream])
    header = job.proxy
    told = {
        "peer": job.peer if isinstance(job.peer, (tuple, str, type(None))) else "credentials",
        "proxied_by": job.proxied_by[0] if isinstance(job.proxied_by, tuple) else None,
        "header": header is not None,
        "version": header and header.version,
        "destination": header and header.destination,
        "is_local": header and header.is_local,
        "unique_id": header and header.unique_id and header.unique_id.decode(),
        "tls": header and header.tls and attrs.asdict(header.tls),
        "authority": header and header.authority,
        "alpn": header and header.alpn and header.alpn.decode(),
        "rest": rest.decode(),
    }
    await stream.send_all(json.dumps(told).encode())
    return b""


async def pass_on_and_tell_peer(stream: Any, job: Job) -> object:
    """Tell the peer, and pass the connection on at the next byte."""
    assert isinstance(job.peer, tuple)
    await stream.send_all(b"%s %d %s\n" % (job.peer[0].encode(), job.passed, job.data))
    if not await stream.receive_some(1):
        return None
    return job.pass_on(b"some data")
