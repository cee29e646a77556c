"""The start of a pool, and what a handler gets."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests._helpers import pool_handlers
from tests._helpers.fds import free_descriptors
from tests._helpers.pool import at_rest, client_of, ends, lines, pids
from tests._helpers.processes import children_of
from trio_unixconn import (
    HandlerError,
    Seals,
    WorkerStartError,
)
from trio_unixconn.pool import JobReceipt, _cpus, open_worker_pool

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_child_left", "unmeasured_processes")

CALLS = "tests._helpers.pool_handlers:do"


################################################################
# Start
################################################################


async def test_open_worker_pool_waits_until_workers_are_ready(shared: Path) -> None:
    """When the block is entered, all workers are ready, and their setups have been entered."""
    async with open_worker_pool(
        "tests._helpers.pool_handlers:tell", workers=3, setup="tests._helpers.pool_handlers:noted"
    ) as pool:
        found = pool.statistics()
        assert [each.state for each in found.workers] == ["ready"] * 3
        assert [each.index for each in found.workers] == [0, 1, 2]
        assert set(children_of(os.getpid())) == set(pids(pool))
        assert sorted(map(int, lines(shared / "began"))) == sorted(pids(pool))
        assert not (shared / "ended").exists()
        assert all(each.memory > 1_000_000 and each.age >= 0 for each in found.workers)
        began = pids(pool)
    assert sorted(map(int, lines(shared / "ended"))) == sorted(began)


@pytest.mark.parametrize("quota", [None, 0.5])
async def test_workers_default(quota: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default there is a worker for each CPU of the affinity, as far as the quota allows it."""
    monkeypatch.setattr(_cpus, "cpu_quota", lambda: quota)
    async with open_worker_pool(CALLS) as pool:
        assert len(pids(pool)) == (1 if quota else len(os.sched_getaffinity(0)))


async def test_open_worker_pool_with_the_largest_limits() -> None:
    """Limits can be sys.maxsize."""
    most = sys.maxsize
    async with open_worker_pool(
        CALLS, workers=1, max_in_flight=most, max_queue=most, max_attempts=most, crash_limit=most
    ) as pool:
        assert await pool.call() == b"nothing to do"


async def test_workers_default_without_sched_getaffinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sched_getaffinity the CPUs of the machine count, and at least one."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    async with open_worker_pool(CALLS) as pool:
        assert len(pids(pool)) == 1


@pytest.mark.measured
@pytest.mark.slow
@pytest.mark.parametrize(
    ("handler", "options", "said"),
    [
        ("no_such_module:handler", {}, "ModuleNotFoundError: No module named 'no_such_module'"),
        ("tests._helpers.pool_handlers:no_such_name", {}, "AttributeError"),
        (
            "tests._helpers.pool_handlers:not_async",
            {},
            "TypeError: handler .* must be an async function",
        ),
        (
            CALLS,
            {"setup": "tests._helpers.pool_handlers:NOT_CALLABLE"},
            "TypeError: setup .* must be a function",
        ),
        (
            CALLS,
            {"setup": "tests._helpers.pool_handlers:failing"},
            "LookupError: the setup says no",
        ),
        (
            CALLS,
            {"setup": "tests._helpers.pool_handlers:note"},
            "TypeError: setup .* requires name, text",
        ),
        ("pool_broken:handler", {}, "SystemExit: 3"),
    ],
)
async def test_open_worker_pool_raises_worker_start_error(
    handler: str,
    options: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error is not a group, and has the traceback of the worker."""
    (tmp_path / "pool_broken.py").write_text("import sys; sys.exit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WorkerStartError, match=said) as caught:
        async with open_worker_pool(handler, workers=2, **options):
            pytest.fail("the block was entered")
    assert "Traceback (most recent call last)" in caught.value.traceback


async def test_open_worker_pool_with_a_worker_that_dies_while_it_starts(shared: Path) -> None:
    """The error says how the process ended if the worker has sent no error."""
    with pytest.raises(WorkerStartError, match=r"was killed by SIGKILL before it was ready"):
        async with open_worker_pool(CALLS, workers=1, setup="tests._helpers.pool_handlers:dying"):
            pytest.fail("the block was entered")
    with pytest.raises(
        WorkerStartError, match=r"exited with status 9 before it was ready"
    ) as caught:
        async with open_worker_pool(
            CALLS, workers=3, setup="tests._helpers.pool_handlers:only_once"
        ):
            pytest.fail("the block was entered")
    assert caught.value.traceback == ""


async def test_start_timeout_kills_a_worker() -> None:
    """A worker that is not ready in time is killed."""
    with pytest.raises(WorkerStartError, match=r"was not ready after 0\.5 s, and was killed"):
        async with open_worker_pool(
            CALLS, workers=2, setup="tests._helpers.pool_handlers:never_ready", start_timeout=0.5
        ):
            pytest.fail("the block was entered")


async def test_open_worker_pool_with_a_worker_that_fails_and_does_not_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that could not start is killed if a thread of its module keeps it running."""
    (tmp_path / "pool_stays.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait).start()\n1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("trio_unixconn.pool._handle.EXIT_GRACE", 0.2)
    with pytest.raises(WorkerStartError, match="ZeroDivisionError"):
        async with open_worker_pool("pool_stays:handler", workers=1):
            pytest.fail("the block was entered")


async def test_open_worker_pool_cancelled_while_workers_start() -> None:
    """No process is left if the start of the pool is cancelled."""
    with trio.move_on_after(0.5) as scope:
        async with open_worker_pool(
            CALLS, workers=2, setup="tests._helpers.pool_handlers:never_ready"
        ):
            pytest.fail("the block was entered")
    assert scope.cancelled_caught


async def test_call_without_pidfds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pidfds a thread waits for the end of a worker."""
    monkeypatch.delattr(os, "pidfd_open")
    async with open_worker_pool(CALLS, workers=1) as pool:
        assert await pool.call() == b"nothing to do"
        os.kill(pids(pool)[0], signal.SIGKILL)
        assert await pool.call() == b"nothing to do"


async def test_open_worker_pool_without_free_descriptors() -> None:
    """If no file descriptor is free, the error says so, and nothing leaks."""
    for free in range(5):
        with (
            free_descriptors(free),
            pytest.raises(WorkerStartError, match=r"could not be started: .*Too many open"),
        ):
            async with open_worker_pool(CALLS, workers=1):
                pytest.fail("the block was entered")


@pytest.mark.parametrize(
    ("handler", "options", "error", "said"),
    [
        (pool_handlers.do, {}, TypeError, "handler must be a string"),
        ("module.name", {}, ValueError, "handler must have the form"),
        ("module:", {}, ValueError, "handler must have the form"),
        (":name", {}, ValueError, "handler must have the form"),
        ("a b:name", {}, ValueError, "handler must have the form"),
        (CALLS, {"setup": "s"}, ValueError, "setup must have the form"),
        (CALLS, {"workers": 0}, ValueError, "workers must be at least 1, got 0"),
        (CALLS, {"workers": 1.5}, TypeError, "float"),
        (CALLS, {"max_queue": 0}, ValueError, "max_queue must be at least 1"),
        (CALLS, {"max_jobs": 0}, ValueError, "max_jobs must be at least 1"),
        (CALLS, {"start_timeout": 0}, ValueError, "start_timeout must be more than 0"),
        (CALLS, {"hang_timeout": math.nan}, ValueError, "hang_timeout must be more than 0"),
        (CALLS, {"drain_timeout": -1}, ValueError, "drain_timeout must be 0 or more"),
        (CALLS, {"on_abandoned": 3}, TypeError, "on_abandoned must be callable, got int"),
    ],
)
async def test_open_worker_pool_rejects_invalid_options(
    handler: Any, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    """Invalid options are rejected before any process is started."""
    with pytest.raises(error, match=said):
        async with open_worker_pool(handler, **options):
            pytest.fail("the block was entered")


@pytest.mark.parametrize(
    ("handler", "answer"),
    [
        ("tests._helpers.pool_handlers:an_object", b"of an object"),
        ("tests._helpers.pool_handlers:an_object.method", b"of a method"),
    ],
)
async def test_call_of_handlers_that_are_no_functions(handler: str, answer: bytes) -> None:
    """A handler can be an object with an async __call__, or a method of an object."""
    async with open_worker_pool(handler, workers=1) as pool:
        assert await pool.call() == answer


async def test_call_of_a_handler_that_is_a_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler can be a partial of an async function."""
    (tmp_path / "pool_partial.py").write_text(
        "from functools import partial\n"
        "async def work(greeting, stream, job):\n    return greeting + job.data\n"
        "handler = partial(partial(work), b'hello ')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    async with open_worker_pool("pool_partial:handler", workers=1) as pool:
        assert await pool.call(data=b"world") == b"hello world"


################################################################
# What a handler gets
################################################################


async def tcp(family: socket.AddressFamily, host: str) -> tuple[trio.SocketStream, socket.socket]:
    """Return a client's stream, and the server's socket."""
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen()
        client = trio.socket.socket(family)
        await client.connect(listener.getsockname())
        return trio.SocketStream(client), listener.accept()[0]


@pytest.mark.measured
@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
async def test_submit_tcp_socket(family: socket.AddressFamily, host: str, shared: Path) -> None:
    """The handler of a TCP socket gets a SocketStream, and the address of the peer."""
    async with open_worker_pool(
        "tests._helpers.pool_handlers:tell", workers=1, setup="tests._helpers.pool_handlers:noted"
    ) as pool:
        stream, theirs = await tcp(family, host)
        async with stream:
            receipt = await pool.submit(theirs, data=b"some data")
            told = json.loads(b"".join([data async for data in stream]))
            name = list(stream.socket.getsockname())
    assert receipt == JobReceipt(told["id"], 0, told["pid"])
    assert (told["type"], told["family"]) == ("SocketStream", family)
    assert (told["data"], told["peer"]) == ("some data", name)
    assert told["state"] == {"pid": told["pid"]}


async def test_submit_unix_socket() -> None:
    """The handler of a Unix socket gets a UnixConnection, and the credentials of the peer."""
    async with (
        open_worker_pool("tests._helpers.pool_handlers:tell", workers=1) as pool,
        client_of(pool) as client,
    ):
        told = await client.told()
    assert (told["type"], told["family"]) == ("UnixConnection", socket.AF_UNIX)
    assert told["peer"] == [os.getpid(), os.geteuid()]
    assert (told["data"], told["state"]) == ("", None)


async def test_call_with_pipes() -> None:
    """The handler of either end of a pipe gets a file to read or to write."""
    async with open_worker_pool("tests._helpers.pool_handlers:copy", workers=1) as pool:
        read, write = os.pipe()
        # Not submit(): the other handler could begin first, and block its worker.
        assert await pool.call(write, data=b"through a pipe") == b""
        assert await pool.call(read) == b"through a pipe"


@pytest.mark.parametrize(
    ("mode", "flags", "answer", "left"),
    [
        ("rb", os.O_RDONLY, b"before", b"before"),
        ("wb", os.O_WRONLY, b"", b"second"),
        ("ab", os.O_WRONLY | os.O_APPEND, b"", b"beforesecond"),
        ("rb+", os.O_RDWR, b"before", b"beforesecond"),
    ],
)
async def test_call_with_files(
    mode: str, flags: int, answer: bytes, left: bytes, tmp_path: Path
) -> None:
    """The handler of a file gets a file that is open in the same mode."""
    path = tmp_path / "file"
    path.write_bytes(b"before")
    async with open_worker_pool("tests._helpers.pool_handlers:copy", workers=1) as pool:
        fd = os.open(path, flags)
        assert await pool.call(fd, data=b"second") == answer
    assert path.read_bytes() == left


async def test_job_peer_of_a_file() -> None:
    """job.peer of a file is None."""
    async with open_worker_pool("tests._helpers.pool_handlers:tell", workers=1) as pool:
        answer = await pool.call(os.open("/dev/null", os.O_RDONLY))
    told = json.loads(answer)
    assert (told["type"], told["mode"], told["peer"]) == ("BufferedReader", "rb", None)


@pytest.mark.measured
async def test_call_with_a_terminal() -> None:
    """The handler of a file without a position that is open for both gets an unbuffered file."""
    async with open_worker_pool("tests._helpers.pool_handlers:tell", workers=1) as pool:
        ours, theirs = os.openpty()
        answer = await pool.call(theirs)
        os.close(ours)
    told = json.loads(answer)
    assert (told["type"], told["mode"]) == ("FileIO", "rb+")


async def test_call_without_a_source() -> None:
    """A call needs no file descriptor; its handler gets None. submit() needs one."""
    async with open_worker_pool("tests._helpers.pool_handlers:tell", workers=1) as pool:
        told = json.loads(await pool.call(data=b"just data"))
        assert (told["type"], told["data"], told["peer"]) == ("NoneType", "just data", None)
        with pytest.raises(
            TypeError, match="source must be a stream, socket, file or file descriptor"
        ):
            await pool.submit(None)  # type: ignore[arg-type]


F_ADD_SEALS, SEALS = 1033, 15


def sealed(data: bytes) -> int:
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    fcntl.fcntl(fd, F_ADD_SEALS, SEALS)
    return fd


@pytest.mark.measured
async def test_job_map_buffer() -> None:
    """A handler maps sealed memory without a copy; other memory is an error in the handler."""
    async with open_worker_pool("tests._helpers.pool_handlers:map_buffer", workers=1) as pool:
        assert await pool.call(sealed(b"a buffer"), data=b"100") == b"A BUFFER"
        with pytest.raises(HandlerError, match="UnsafeBufferError"):
            await pool.call(sealed(b"a buffer"), data=b"7")
        with pytest.raises(HandlerError, match="UnsafeBufferError"):
            await pool.call(os.memfd_create("not sealed"), data=b"100")
        shrink_only = os.memfd_create("shrink only", os.MFD_ALLOW_SEALING)
        os.write(shrink_only, b"a buffer")
        fcntl.fcntl(shrink_only, F_ADD_SEALS, Seals.SHRINK.value)
        with pytest.raises(HandlerError, match="missing seals: seal, grow, write"):
            await pool.call(os.dup(shrink_only), data=b"100")
        assert await pool.call(shrink_only, data=b"100 SHRINK") == b"A BUFFER"
        with pytest.raises(HandlerError, match=r"seals must contain Seals.SHRINK"):
            await pool.call(sealed(b"a buffer"), data=b"100 WRITE")
        with pytest.raises(HandlerError, match="got a job without a file"):
            await pool.call(data=b"100")
        client, theirs = ends()
        async with client.stream:
            with pytest.raises(HandlerError, match="UnsafeBufferError"):
                await pool.call(theirs, data=b"100")


@pytest.mark.measured
async def test_call_with_an_unconnected_socket() -> None:
    """A socket that is not connected is rejected, and no job."""
    async with open_worker_pool("tests._helpers.pool_handlers:tell", workers=1) as pool:
        with (
            socket.socket(socket.AF_UNIX) as sock,
            pytest.raises(ValueError, match="one that is not connected"),
        ):
            await pool.call(sock)
        await pool.call()
        assert (await at_rest(pool)).submitted == 1
