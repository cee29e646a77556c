"""Workers that a template forks: they are as fresh ones, and each can also be started without."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
import socket as stdlib_socket
import subprocess
import sys
import zipfile
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests._helpers.environment import environment
from tests._helpers.pool import ended, pids, watched
from tests._helpers.waiting import until
from trio_unixconn import (
    PoolClosedError,
    UnixConnection,
    WorkerDiedError,
    WorkerStartError,
    connection_pair,
)
from trio_unixconn._connection import close_now
from trio_unixconn._frames import encode_frame
from trio_unixconn.pool import _preload, _process, _protocol, open_worker_pool
from trio_unixconn.pool._completion_log import CompletionLog
from trio_unixconn.pool._process import WorkerProcess, describe_exit
from trio_unixconn.pool._worker_config import WorkerConfig

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
    ("does", "reason"),
    [
        ("raise", "ZeroDivisionError: not today"),
        ("thread", "started 1 threads"),
        ("closed", "ValueError: I/O operation on closed file"),
        ("ignore", "ignores SIGCHLD"),
    ],
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


async def test_preload_without_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that has set sys.stdout to None, as Python itself does, does not prevent a fork."""
    monkeypatch.setenv("PRELOADED", "no output")
    async with open_worker_pool(PARENT, workers=1, preload=[PRELOADED]) as pool:
        assert await template_of(pool) != os.getpid()


async def test_preload_of_what_reaps_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a module reaps workers, their status is not known; they are replaced."""
    monkeypatch.setenv("PRELOADED", "reap")
    async with open_worker_pool(PARENT, workers=1, preload=[PRELOADED]) as pool:
        before = await template_of(pool)
        with (
            trio.fail_after(30),
            pytest.raises(WorkerDiedError, match="template has not reaped it"),
        ):
            await pool.call(data=b"die")
        # The template answers after that.
        assert await template_of(pool) == before


async def test_preload_of_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in an archive has no file of its own that could change, and is preloaded."""
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archived.py", "")
    monkeypatch.syspath_prepend(str(archive))
    async with open_worker_pool(PARENT, workers=1, preload=["archived"]) as pool:
        assert await template_of(pool) != os.getpid()


@pytest.mark.parametrize("free", [0, 1])
async def test_preload_template_without_free_descriptors(
    free: int, caplog: pytest.LogCaptureFixture
) -> None:
    """If a template has too few numbers free for a worker, another one forks it; both go on."""
    caplog.set_level(logging.INFO, "trio_unixconn.pool")
    async with open_worker_pool(PARENT, workers=1, preload=["trio"]) as pool:
        before = await template_of(pool)
        limits = resource.prlimit(before, resource.RLIMIT_NOFILE)
        used = {int(name) for name in os.listdir(f"/proc/{before}/fd")}
        lowest = min(set(range(len(used) + 1)) - used)
        resource.prlimit(before, resource.RLIMIT_NOFILE, (lowest + free, limits[1]))
        await pool.scale(2)
        assert await template_of(pool, 1) not in (before, os.getpid())
        assert await template_of(pool) == before
        resource.prlimit(before, resource.RLIMIT_NOFILE, limits)
    assert "no free file descriptor for what the worker inherits" in caplog.text


async def _said_by_template(config: WorkerConfig) -> str | None:
    """Start a template, and return what it says when it has exited by itself."""
    template = _preload.Template(_process.start(config), ())
    try:
        with trio.fail_after(30):
            found = await template.wait_ready()
            assert await template.process.wait() == 1
    finally:
        await template.aclose()
    return found


async def test_preload_template_that_cannot_import() -> None:
    """A template says what it could not import, and exits."""
    found = await _said_by_template(
        WorkerConfig(PARENT, sys.executable, is_template=True, preload=["not_there"])
    )
    assert found is not None
    assert "ModuleNotFoundError: No module named 'not_there'" in found


async def test_preload_template_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template of another version does not read a configuration that it may not know."""
    encode = WorkerConfig.encode

    def encode_newer(config: WorkerConfig) -> bytes:
        message = {**json.loads(encode(config)), "version": "99.0"}
        message["config"] = {"is_template": True, "unknown": 1}
        return json.dumps(message).encode() + b"\n"

    monkeypatch.setattr(WorkerConfig, "encode", encode_newer)
    # It says its version, which is that of the test.
    config = WorkerConfig(PARENT, sys.executable, is_template=True, preload=["not_there"])
    assert await _said_by_template(config) is None


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


async def test_preload_renew_while_a_template_starts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The template becomes ready, forks what it was started for, and forks no more."""
    waits, go_on = trio.Event(), trio.Event()
    real = _preload.Template.wait_ready

    async def wait_ready(template: _preload.Template) -> str | None:
        waits.set()
        await go_on.wait()
        return await real(template)

    async def fork(config: WorkerConfig) -> None:
        process = await preloader.fork(config)
        assert process is not None
        process.kill()
        await process.wait()
        process.close()

    monkeypatch.setattr(_preload.Template, "wait_ready", wait_ready)
    preloader = _preload.Preloader(60)
    config = WorkerConfig(PARENT, sys.executable)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fork, config)
            await waits.wait()
            nursery.start_soon(preloader.renew)
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
        assert all(each.is_retired for each in preloader._templates)
        await preloader.aclose()
    assert "was not ready" not in caplog.text


def _process_config(pool: WorkerPool) -> Any:
    return pool._supervisor.options.worker_config(0)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (None, "it has exited"),
        (b"\xff" * 6, "it does not answer: expected a frame"),
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
            theirs.sendall(self._answer)
        return self.template

    async def __aexit__(self, *_: object) -> None:
        self.template.process.kill()
        await self.template.aclose()
        await self.template.aclose()
        self.peer.close()


async def test_preload_answer_that_arrives_in_parts() -> None:
    """What a template says is read to the end of its frame."""
    script = _Scripted(b"")
    found: list[str | None] = []

    async def wait_ready() -> None:
        found.append(await script.template.wait_ready())

    async with script, trio.open_nursery() as nursery:
        nursery.start_soon(wait_ready)
        for byte in encode_frame(_protocol.FAILED, b"why"):
            await trio.testing.wait_all_tasks_blocked()
            assert not found
            script.peer.sendall(bytes([byte]))
    assert found == ["why"]


async def test_preload_aclose_while_another_task_ends_the_template() -> None:
    """After aclose() no template is left, whatever task ends it."""
    closed = trio.Event()

    async with _Scripted(b"") as template:
        preloader = _preload.Preloader(1)
        preloader._templates.append(template)

        async def close_preloader() -> None:
            await preloader.aclose()
            assert template.ended.is_set()
            closed.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(template.aclose)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(close_preloader)
            await trio.testing.wait_all_tasks_blocked()
            assert not closed.is_set()
            template.process.kill()
    assert closed.is_set()


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


async def test_preload_with_kill_process_group_of_a_worker_that_was_reaped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The group of a forked worker is killed while its number is its own, and not afterwards."""
    killed: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, _: killed.append(group))
    template: Any = None
    with subprocess.Popen(["sleep", "60"]) as child:
        forked = _preload._ForkedChild(child.pid, os.pidfd_open(child.pid), template)
        conn, peer = connection_pair()
        process = WorkerProcess(forked, conn, CompletionLog(1), kill_group=True)
        process.kill()
        # A zombie keeps its number.
        await trio.lowlevel.wait_readable(forked.pidfd)
        process.kill()
        assert killed == [child.pid] * 2
        child.wait()
        process.kill()
        assert killed == [child.pid] * 2
        monkeypatch.setattr(signal, "pidfd_send_signal", raise_permission_error)
        # It has become another user.
        assert forked.is_reserved
    forked.returncode = 0
    assert not forked.is_reserved
    process.close()
    close_now(peer)


def raise_permission_error(*_: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


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


async def test_preload_during_a_fork_that_outlasts_the_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pool that has ended all its workers waits for the forks of others, and ends them."""
    forked: list[int] = []
    with trio.fail_after(60), pytest.raises(ZeroDivisionError):
        async with open_worker_pool(PARENT, workers=1, preload=["trio"]) as pool:
            supervisor = pool._supervisor
            fork = supervisor._preloader.fork

            async def fork_late(config: WorkerConfig) -> WorkerProcess | None:
                # The template answers late; a cancellation does not end the wait for it.
                with trio.CancelScope(shield=True):
                    await until(lambda: not supervisor.alive)
                    await trio.testing.wait_all_tasks_blocked()
                    process = await fork(config)
                assert process is not None
                forked.append(process.pid)
                return process

            monkeypatch.setattr(supervisor._preloader, "fork", fork_late)
            supervisor._nursery.start_soon(_scale, pool)
            await until(lambda: supervisor._forking)
            raise ZeroDivisionError
    assert forked


async def _scale(pool: WorkerPool) -> None:
    with suppress(PoolClosedError):
        await pool.scale(3)
