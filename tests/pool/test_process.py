"""The process of a worker: what it is started with, what it inherits, and how it is killed."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests._helpers.fds import free_descriptors
from tests._helpers.pool import pids, watched
from tests._helpers.process_handlers import describe_file
from tests._helpers.processes import ROOT
from tests._helpers.waiting import until
from trio_unixconn import WorkerDiedError, WorkerStartError
from trio_unixconn.pool import _process, open_worker_pool
from trio_unixconn.pool._process import FdReserve, describe_exit, living_members
from trio_unixconn.pool._worker_config import WorkerConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trio_unixconn.pool import Job, WorkerPool

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_child_left")]


LOOK = "tests._helpers.process_handlers:look"
INFORMED = "tests._helpers.process_handlers:informed"
START_CHILD = "tests._helpers.process_handlers:start_child"


async def look_into(**options: Any) -> dict[str, Any]:
    with trio.fail_after(60):
        async with open_worker_pool(LOOK, workers=1, **options) as pool:
            found: dict[str, Any] = json.loads(await pool.call())
    return found


PROGRAM = """
import json, os, signal, sys
{before}
sys.path[:0] = [{root!r}]
import trio
from trio_unixconn.pool import open_worker_pool

async def main():
    async with open_worker_pool("tests._helpers.process_handlers:look", workers={workers}) as pool:
        return await pool.call(worker={workers} - 1)

with open({answer!r}, "wb") as file:
    file.write(trio.run(main))
"""


def look_from_program(
    tmp_path: Path,
    before: str = "",
    options: tuple[str, ...] = (),
    workers: int = 1,
    **popen: Any,
) -> dict[str, Any]:
    """Have a program with its own interpreter open a pool; return what its last worker sees."""
    answer = tmp_path / "answer"
    program = PROGRAM.format(before=before, root=str(ROOT), answer=str(answer), workers=workers)
    subprocess.run([sys.executable, *options, "-c", program], check=True, timeout=60, **popen)
    found: dict[str, Any] = json.loads(answer.read_bytes())
    return found


################################################################
# What a worker inherits
################################################################


@pytest.mark.parametrize(
    "options",
    [
        ("-I",),
        ("-E", "-s", "-B"),
        ("-O",),
        # Without -B: compiling all that a worker imports takes a second.
        ("-OO",),
        ("-W", "error::FutureWarning", "-X", "utf8=1"),
        ("-X", "int_max_str_digits=5000", "-X", "dev"),
        ("-X", "pycache_prefix=/nonexistent"),
    ],
    ids=" ".join,
)
def test_start_keeps_interpreter_options(options: tuple[str, ...], tmp_path: Path) -> None:
    """A worker's interpreter has the options of the pool's: -I is a boundary, -O a meaning."""
    ask = (
        "import json, sys; print(json.dumps([{name: getattr(sys.flags, name) for name in "
        "dir(sys.flags) if name[0] not in '_n' and isinstance(getattr(sys.flags, name), int)}, "
        "sys.warnoptions, sys._xoptions]))"
    )
    done = subprocess.run([sys.executable, *options, "-c", ask], capture_output=True, check=True)
    found = look_from_program(tmp_path, options=options)
    assert [found["flags"], found["warnings"], found["xoptions"]] == json.loads(done.stdout)


def test_start_restores_signals(tmp_path: Path) -> None:
    """Neither a worker, nor a program that it starts, inherits blocked or ignored signals."""
    before = """
for number in signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
"""
    found = look_from_program(tmp_path, before)
    # What Python ignores itself.
    assert set(found["signals"]["SigIgn"]) == {signal.SIGPIPE, signal.SIGXFSZ}
    assert found["signals"]["SigBlk"] == []
    assert found["signals of child"] == {"SigIgn": [], "SigBlk": []}


async def test_sigint_does_not_end_worker() -> None:
    """A worker outlives SIGINT, which a terminal sends to the pool's process as well."""
    with trio.fail_after(60):
        async with open_worker_pool("tests._helpers.pool_handlers:do", workers=1) as pool:
            (pid,) = pids(pool)
            os.kill(pid, signal.SIGINT)
            assert await pool.call(data=b"pid") == str(pid).encode()


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_start_with_closed_standard_fds(closed: tuple[int, ...], tmp_path: Path) -> None:
    """If the pool's process lacks standard files, a worker has /dev/null, never a file of ours."""
    before = "\n".join(f"os.close({fd})" for fd in closed)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    found = look_from_program(tmp_path, before, workers=2, **pipes)
    for fd in closed:
        assert found["files"][fd] == "null"
    assert found["files"][0] == "null"
    assert "socket" not in found["files"]
    assert "closed" not in found["files"]


async def test_start_does_not_use_numbers_of_standard_fds() -> None:
    """If standard input is closed, no file descriptor of the pool gets its number."""
    kept = os.dup(0)
    os.close(0)
    try:
        process = _process.start(sleeper())
        assert describe_file(0) == "closed"
        assert process.log.fd > 2
        assert process.conn.socket.fileno() > 2
    finally:
        os.dup2(kept, 0, inheritable=True)
        os.close(kept)
    process.kill()
    with trio.fail_after(30):
        await process.wait()
    process.close()


def test_start_with_socket_as_standard_output(tmp_path: Path) -> None:
    """A file of the pool's process that is not inherited is not a worker's standard output."""
    before = "import socket; os.close(1); kept = socket.socketpair(); assert kept[0].fileno() == 1"
    assert look_from_program(tmp_path, before)["files"][1] == "null"


def test_start_with_paths_in_import_path(tmp_path: Path) -> None:
    """A Path or bytes in sys.path is a directory for a worker."""
    before = "import pathlib; sys.path += [pathlib.Path('/some/where'), b'/else']"
    path = look_from_program(tmp_path, before)["path"]
    assert path[-2:] == ["/some/where", "/else"]
    assert path[0] == str(ROOT)
    # Its modules have the names of modules of the standard library.
    assert not any(item.endswith("trio_unixconn/pool") for item in path)


async def test_start_with_long_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import path and data that no socket buffer holds are handed over, without a wait."""
    monkeypatch.setattr(sys, "path", [*sys.path, *(f"/none/{n:0100}" for n in range(20_000))])
    found = await look_into(setup=INFORMED, setup_data=b"x" * 5_000_000)
    assert len(found["path"]) > 20_000
    assert found["state"] == [0, "x" * 5_000_000]


################################################################
# Options
################################################################


async def test_options_of_worker_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment, CPU, nice value and limits of a worker are those of the options."""
    monkeypatch.setenv("A", "of the pool")
    monkeypatch.setenv("B", "of the pool")
    cpu = max(os.sched_getaffinity(0))
    found = await look_into(
        environment={"A": "of the worker", "B": None},
        cpu_affinity=[cpu],
        nice=3,
        resource_limits={"RLIMIT_NOFILE": (150, 160)},
    )
    assert found["environment"] == {"A": "of the worker", "B": None, "HOME": os.environ["HOME"]}
    assert found["cpus"] == [cpu]
    assert found["nice"] == os.nice(0) + 3
    assert found["nofile"] == [150, 160]
    assert found["sid"]
    assert not found["mark"]
    assert found["argv"] == [LOOK]
    assert found["state"] is None


async def test_setup_data_for_each_worker() -> None:
    """A setup with a parameter gets the data, and the index of its worker's slot."""
    with trio.fail_after(60):
        async with open_worker_pool(
            LOOK,
            workers=2,
            setup=INFORMED,
            setup_data=b"password",
        ) as pool:
            for index in range(2):
                found = json.loads(await pool.call(worker=index))
                assert found["state"] == [index, "password"]


async def test_limit_that_is_not_permitted() -> None:
    """If the system does not permit an option, the worker cannot start, and says why."""
    with trio.fail_after(60), pytest.raises(WorkerStartError) as caught:
        # No machine has this one.
        await look_into(cpu_affinity=[1023])
    assert "sched_setaffinity" in caught.value.traceback


async def test_executable_option(tmp_path: Path) -> None:
    """Another interpreter, here under another name, runs the workers."""
    python = tmp_path / "my-python"
    python.symlink_to(sys.executable)
    found = await look_into(executable=python)
    assert found["executable"] == str(python)


async def test_executable_that_is_not_python(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A program that starts itself in place of an interpreter ends with an error, at once."""
    program = tmp_path / "program"
    answer = tmp_path / "answer"
    text = PROGRAM.format(before="", root=str(ROOT), answer=str(answer), workers=2)
    # What a frozen program does: it runs itself, whatever its arguments are.
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.executable = {str(program)!r}\n{text}")
    program.chmod(0o755)
    done = await trio.run_process([program], check=False, capture_stderr=True)
    assert done.returncode == 1
    assert b"before it was ready" in done.stderr
    assert b"RuntimeError: this process was started as a worker by process" in done.stderr


################################################################
# The end of a process
################################################################


@pytest.fixture
def stray_processes() -> Iterator[list[int]]:
    """Process ids that are killed after the test, if they are still there."""
    found: list[int] = []
    yield found
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("end", ["drained", "killed", "dies"])
async def test_kill_process_group(end: str, stray_processes: list[int]) -> None:
    """With the option, a process that a handler has started ends with its worker."""
    with trio.fail_after(60):
        async with open_worker_pool(START_CHILD, workers=1, kill_process_group=True) as pool:
            child = int(await pool.call())
            stray_processes.append(child)
            (worker,) = pids(pool)
            with watched([child]) as (pidfd,):
                if end == "drained":
                    await pool.drain()
                elif end == "killed":
                    os.kill(worker, signal.SIGKILL)
                else:
                    with pytest.raises(WorkerDiedError):
                        await pool.call(data=b"die")
                await trio.lowlevel.wait_readable(pidfd)


async def test_kill_process_group_is_awaited(stray_processes: list[int]) -> None:
    """When the pool has ended, no process of the group is left, nor anything that it held."""
    with trio.fail_after(60):
        async with open_worker_pool(START_CHILD, workers=1, kill_process_group=True) as pool:
            stray_processes += [int(await pool.call()) for _ in range(20)]
            (worker,) = pids(pool)
            assert len(living_members(worker)) == 21
            await pool.drain()
            assert living_members(worker) == []


@pytest.mark.parametrize("has_pidfd", [True, False])
async def test_kill_process_group_that_does_not_end(
    stray_processes: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    has_pidfd: bool,
) -> None:
    """A process that SIGKILL does not end is logged, and holds up the pool for a limited time."""
    monkeypatch.setattr(_process, "GROUP_TIMEOUT", 0.3)
    with trio.fail_after(60):
        async with open_worker_pool(START_CHILD, workers=1, kill_process_group=True) as pool:
            child = int(await pool.call())
            stray_processes.append(child)
            (worker,) = pids(pool)
            # As if it were in an uninterruptible sleep.
            monkeypatch.setattr(os, "killpg", lambda _, __: None)
            if not has_pidfd:
                monkeypatch.delattr(os, "pidfd_open")
            await pool.drain()
        assert living_members(worker) == [child]
    said = f"processes {child} of the process group of worker {worker} did not end within 0.3 s"
    assert said in caplog.text


def test_living_members_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc, none is found."""

    def fail(_: str) -> list[str]:
        raise FileNotFoundError

    assert os.getpid() in living_members(os.getpgrp())
    monkeypatch.setattr(os, "listdir", fail)
    assert living_members(os.getpgrp()) == []


async def test_without_kill_process_group(stray_processes: list[int]) -> None:
    """Without the option, a process that a handler has started outlives its worker."""
    with trio.fail_after(60):
        async with open_worker_pool(START_CHILD, workers=1) as pool:
            child = int(await pool.call())
            stray_processes.append(child)
    os.kill(child, 0)


def sleeper(**options: Any) -> WorkerConfig:
    return WorkerConfig("tests._helpers.pool_handlers:do", sys.executable, **options)


@pytest.mark.parametrize("kill_group", [False, True])
async def test_wait_without_pidfd(monkeypatch: pytest.MonkeyPatch, *, kill_group: bool) -> None:
    """Without pidfd_open(2), a thread waits; the process is reaped, and its status known."""
    monkeypatch.delattr(os, "pidfd_open")
    process = _process.start(sleeper(kill_process_group=kill_group))
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            # Both wait, and one of them reaps it.
            nursery.start_soon(process.wait)
            nursery.start_soon(process.wait)
            process.kill()
        assert await process.wait() == -signal.SIGKILL
    # Its number may be the one of another process by now.
    process.kill()
    process.close()


async def test_kill_of_foreign_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the group is gone, or cannot be killed, the process is killed nevertheless."""

    def killpg(pid: int, number: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "killpg", killpg)
    process = _process.start(sleeper(kill_process_group=True))
    process.kill()
    with trio.fail_after(30):
        assert await process.wait() == -signal.SIGKILL
    process.close()


@pytest.mark.parametrize("free", range(12))
async def test_start_without_free_fds(free: int) -> None:
    """EMFILE at any point of the start leaves no file descriptor and no process."""
    with free_descriptors(free):
        try:
            process = _process.start(sleeper())
        except OSError as exc:
            assert exc.errno == errno.EMFILE
            return
        # Without a free one it is the thread that waits.
        process.kill()
        with trio.fail_after(30):
            await process.wait()
        process.close()


async def test_start_of_missing_executable() -> None:
    """A program that is not there any more is an OSError, and nothing stays open."""
    with pytest.raises(FileNotFoundError):
        _process.start(attrs.evolve(sleeper(), executable="/no/such/python"))


async def test_fd_reserve_is_enough_to_start_worker() -> None:
    """What the reserve gives back is enough to start a worker when nothing else is free."""
    reserve = FdReserve()
    with free_descriptors(0), reserve.released():
        process = _process.start(sleeper())
    process.kill()
    with trio.fail_after(30):
        await process.wait()
    process.close()
    reserve.close()


def test_describe_exit_of_each_kind() -> None:
    """How a process ended has a name, if the system has one."""
    assert describe_exit(3) == "exited with status 3"
    assert describe_exit(-9) == "was killed by SIGKILL"
    assert describe_exit(-99) == "was killed by signal 99"


async def hang(stream: object, job: Job) -> None:
    """Keep all threads of this process from running; a worker runs this."""
    ctypes.PyDLL(None).pause()


async def test_hang_timeout_kills_each_worker_once(caplog: pytest.LogCaptureFixture) -> None:
    """A worker that hung is killed once, not again while another one is started."""
    with trio.fail_after(60):
        async with open_worker_pool(
            "tests.pool.test_process:hang", workers=1, hang_timeout=0.5
        ) as pool:
            # Each death makes the pause before the next worker longer.
            for deaths in range(1, 4):
                await pool.submit(os.open(os.devnull, os.O_RDONLY))
                await until(partial(has_restarted, pool, deaths))
    assert sum("heartbeat" in text or "heard" in text for text in caplog.messages) == 3


def has_restarted(pool: WorkerPool, times: int) -> bool:
    return pool.statistics().restarts == times
