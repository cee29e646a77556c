"""Workers that a template forks: they are as fresh ones, and each can also be started without."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket as stdlib_socket
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests._helpers.environment import environment
from tests._helpers.pool import ended, pids, watched
from tests._helpers.waiting import until
from trio_unixconn import PoolClosedError, UnixConnection, WorkerDiedError, WorkerStartError
from trio_unixconn._frames import encode_frame
from trio_unixconn.pool import _preload, _process, _protocol, open_worker_pool
from trio_unixconn.pool._completion_log import CompletionLog
from trio_unixconn.pool._process import WorkerProcess, describe_exit

if TYPE_CHECKING:
    from pathlib import Path

    from trio_unixconn.pool import Job, WorkerPool

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_child_left")]

LOOK = "tests._helpers.process_handlers:look"
INFORMED = "tests._helpers.process_handlers:informed"
START_CHILD = "tests._helpers.process_handlers:start_child"
PARENT = "tests.pool.test_preload:parent"
PRELOADED = "tests._helpers.preloaded"


async def parent(_: object, job: Job) -> bytes:
    """Return the number of the parent of this worker, or die; a worker runs this."""
    if job.data == b"die":
        os.kill(os.getpid(), signal.SIGKILL)
    return b"%d" % os.getppid()


async def template_of(pool: WorkerPool, worker: int = 0) -> int:
    with trio.fail_after(30):
        return int(await pool.call(worker=worker))


async def test_preload_starts_workers_as_without_it(tmp_path: Path) -> None:
    """A forked worker has the options, limits, files, signals and setup of a fresh one."""
    options: dict[str, Any] = {
        "environment": {"A": "1", "HOME": None},
        "nice": 3,
        "cpu_affinity": [min(os.sched_getaffinity(0))],
        "resource_limits": {"RLIMIT_NOFILE": (300, 400)},
        "setup": INFORMED,
        "setup_data": b"data",
    }
    found: list[dict[str, Any]] = []
    for preload in ([], ["trio"]):
        with trio.fail_after(60):
            async with open_worker_pool(LOOK, workers=1, preload=preload, **options) as pool:
                found.append(json.loads(await pool.call()))
    assert found[0] == found[1]
    assert found[1]["sid"]


async def test_preload_forks_workers_from_one_template_until_restart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All workers are children of one template; restart() starts another, and the old one ends."""
    caplog.set_level(logging.INFO, "trio_unixconn.pool")
    async with open_worker_pool(PARENT, workers=3, preload=["trio", PRELOADED]) as pool:
        before = {await template_of(pool, index) for index in range(3)}
        assert before.isdisjoint({os.getpid()})
        assert len(before) == 1
        with watched(before) as pidfds:
            await pool.scale(4)
            assert await template_of(pool, 3) in before
            with trio.fail_after(30), pytest.raises(WorkerDiedError, match="killed by SIGKILL"):
                await pool.call(data=b"die", worker=1)
            assert await template_of(pool, 1) in before
            await pool.restart()
            after = {await template_of(pool, index) for index in range(4)}
            assert len(after) == 1
            assert after.isdisjoint(before)
            await ended(pidfds)
    assert "is ready to fork workers" in caplog.text


async def test_preload_starts_another_template_when_a_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker never has code of a module that has changed since the template imported it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    module = tmp_path / "changing.py"

    def write(text: str) -> None:
        module.write_text(f"async def do(stream, job):\n    return {text!r}.encode()\n")

    write("old")
    async with open_worker_pool("changing:do", workers=1, preload=["changing"]) as pool:
        assert await pool.call() == b"old"
        write("the new one")
        os.kill(pids(pool)[0], signal.SIGKILL)
        await until(lambda: pool.statistics().restarts == 1)
        assert await pool.call() == b"the new one"
        module.write_text("raise ZeroDivisionError")
        with pytest.raises(WorkerStartError, match="ZeroDivisionError"):
            await pool.restart()
        assert await pool.call() == b"the new one"


async def test_preload_starts_another_template_in_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker inherits what the process of the pool has when the worker is started."""
    async with open_worker_pool(PARENT, workers=1, preload=["trio"]) as pool:
        before = await template_of(pool)
        gone = tmp_path / "gone"
        gone.mkdir()
        monkeypatch.chdir(gone)
        await pool.scale(2)
        assert await template_of(pool, 1) != before
        # One that cannot be looked at is another one, too.
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", _no_file)
            assert _preload._inherited(_process_config(pool))[-1] == [None, None]


def _no_file(*_: object) -> None:
    raise FileNotFoundError


@pytest.mark.parametrize(
    ("does", "reason"), [("raise", "ZeroDivisionError: not today"), ("thread", "started 1 threads")]
)
async def test_preload_that_cannot_fork_is_logged(
    does: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the template cannot fork, that is logged once, and workers are fresh interpreters."""
    monkeypatch.setenv("PRELOADED", does)
    async with open_worker_pool(PARENT, workers=3, preload=[PRELOADED]) as pool:
        assert await template_of(pool) == os.getpid()
        logged = [each.message for each in caplog.records if "preload: " in each.message]
        assert len(logged) == 1
        assert reason in logged[0]
        monkeypatch.delenv("PRELOADED")
        # It is tried again.
        await pool.restart()
        assert await template_of(pool) != os.getpid()


async def test_preload_template_that_is_killed(caplog: pytest.LogCaptureFixture) -> None:
    """If the template is killed, its workers finish their jobs and are replaced."""
    async with open_worker_pool(PARENT, workers=2, preload=["trio"]) as pool:
        before = await template_of(pool)
        os.kill(before, signal.SIGKILL)
        with trio.fail_after(60):
            while {await template_of(pool, index) for index in range(2)} & {before, 1}:
                await trio.sleep(0.01)
            await until(lambda: pool.statistics().restarts == 2)
        assert pool.statistics().deaths == 0
        assert await template_of(pool) not in (before, os.getpid())


async def test_preload_template_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A template that is stopped is killed, and the worker is started in another way."""
    async with open_worker_pool(PARENT, workers=1, preload=["trio"]) as pool:
        before = await template_of(pool)
        os.kill(before, signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr(_preload, "ANSWER_TIMEOUT", 0.05)
            await pool.scale(2)
        assert await template_of(pool, 1) != before
        assert "does not answer" in caplog.text


async def test_preload_template_that_is_not_ready_in_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A template that does not become ready is killed; a cancellation meanwhile, too."""
    waits = trio.Event()

    async def wait_ready(_: object) -> None:
        waits.set()
        await trio.sleep_forever()

    async with open_worker_pool(PARENT, workers=1) as pool:
        pool._supervisor._preloader._start_timeout = 0.01
        config = _process_config(pool)
        with monkeypatch.context() as patch:
            patch.setattr(_preload.Template, "wait_ready", wait_ready)
            assert await pool._supervisor._preloader.fork(config) is None
            assert "was not ready after 0.01 s" in caplog.text
            # Not again at once.
            assert await pool._supervisor._preloader.fork(config) is None
            preloader = _preload.Preloader(60)
            waits = trio.Event()
            with trio.fail_after(30):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(preloader.fork, config)
                    await waits.wait()
                    nursery.cancel_scope.cancel()


def _process_config(pool: WorkerPool) -> Any:
    return pool._supervisor.options.worker_config(0)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (None, "it has exited"),
        (encode_frame(_protocol.FAILED, b"why"), "why"),
        (encode_frame(_protocol.BEAT), "protocol error: frame of kind"),
        (encode_frame(_protocol.READY, b"{}"), "imported trio_unixconn an unknown version"),
    ],
)
async def test_preload_template_that_begins_wrongly(answer: bytes | None, text: str) -> None:
    """What a template says first is checked."""
    async with _Scripted(answer) as template:
        found = await template.wait_ready()
        assert found is not None
        assert text in found


class _Scripted:
    """A template whose process is a program that sends what the test says."""

    def __init__(self, answer: bytes | None) -> None:
        self._answer = answer

    async def __aenter__(self) -> _preload.Template:
        mine, theirs = stdlib_socket.socketpair()
        child = subprocess.Popen(["sleep", "1000"])
        conn = UnixConnection.from_stdlib_socket(mine)
        self.template = _preload.Template(
            WorkerProcess(_process.OwnChild(child), conn, CompletionLog(1)), ()
        )
        self.peer = theirs
        if self._answer is None:
            theirs.close()
        else:
            # In two parts.
            theirs.sendall(self._answer[:3])
            theirs.sendall(self._answer[3:])
        return self.template

    async def __aexit__(self, *_: object) -> None:
        self.template.process.kill()
        await self.template.aclose()
        await self.template.aclose()
        self.peer.close()


async def test_preload_answers_that_are_wrong(caplog: pytest.LogCaptureFixture) -> None:
    """A pidfd that was dropped, a wrong answer and bytes outside of frames are errors."""
    async with _Scripted(_protocol.pack_pid(_protocol.FORKED, 1)) as template:
        with pytest.raises(_preload.CannotForkError, match="no file descriptor is free"):
            await template.fork([])
    async with _Scripted(encode_frame(_protocol.NOT_FORKED, b"why")) as template:
        assert await template.reap(1) == _protocol.UNKNOWN_STATUS
    async with _Scripted(b"\xff" * 6) as template:
        with pytest.raises(_preload.CannotForkError, match="does not answer"):
            await template.fork([])
        # Never again.
        with pytest.raises(_preload.CannotForkError, match="does not answer"):
            await template.fork([])
    assert "status that is not known" in describe_exit(_protocol.UNKNOWN_STATUS)
    with pytest.raises(_protocol.ProtocolError, match="expected the number of a process"):
        _protocol.unpack_pid(b"")


async def test_preload_without_a_free_descriptor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If no file descriptor is left for a fork, those in reserve start a fresh interpreter."""

    async def fork(*_: object) -> WorkerProcess:
        raise OSError(errno.EMFILE, "Too many open files")

    async with open_worker_pool(PARENT, workers=1, preload=["trio"]) as pool:
        monkeypatch.setattr(_process, "fork", fork)
        await pool.scale(2)
        assert await template_of(pool, 1) == os.getpid()
        assert "worker 1 could not be forked: [Errno 24]" in caplog.text


async def test_preload_with_kill_process_group(caplog: pytest.LogCaptureFixture) -> None:
    """The process group of a forked worker is its own, and is killed with it."""
    options: dict[str, Any] = {"workers": 1, "preload": ["trio"], "kill_process_group": True}
    async with open_worker_pool(START_CHILD, **options) as pool:
        with watched([int(await pool.call())]) as pidfds:
            with pytest.raises(WorkerDiedError):
                await pool.call(data=b"die")
            await ended(pidfds)


PROGRAM = """
import os, trio
from trio_unixconn.pool import open_worker_pool

async def main():
    async with open_worker_pool(
        "tests.pool.test_preload:parent", workers=2, preload=["trio"]
    ) as pool:
        parent = await pool.call()
        print(parent.decode(), *[each.pid for each in pool.statistics().workers], flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


async def test_preload_ends_with_the_pool() -> None:
    """The template and its workers end when the process of the pool is killed."""
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        numbers = (await trio.to_thread.run_sync(process.stdout.readline)).split()
        with watched(map(int, numbers)) as pidfds:
            process.kill()
            await ended(pidfds)


async def test_preload_during_an_exception_in_the_block() -> None:
    """A pool whose block raises while a worker is forked leaves no process."""
    with trio.fail_after(60), pytest.raises(ZeroDivisionError):
        async with open_worker_pool(PARENT, workers=1, preload=["trio"]) as pool:
            supervisor = pool._supervisor
            supervisor._nursery.start_soon(_scale, pool)
            while not supervisor._forking:
                await trio.lowlevel.checkpoint()
            raise ZeroDivisionError


async def _scale(pool: WorkerPool) -> None:
    with suppress(PoolClosedError):
        await pool.scale(3)
