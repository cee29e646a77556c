"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import trio
from typer.testing import CliRunner

import trio_unixconn
from trio_unixconn import __main__ as command_line
from trio_unixconn._demo import driver, wire


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python -m trio_unixconn``."""
    return subprocess.run(
        [sys.executable, "-m", "trio_unixconn", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
        **options,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with files, a folder, a link, and a FIFO that must be left alone."""
    (tmp_path / "one").write_bytes(b"1" * 3_000_000)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "two").write_bytes(b"")
    (tmp_path / "link").symlink_to("one")
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


def test_demo_of_the_package() -> None:
    """Without arguments the package's own files are handed over; nothing differs, nothing leaks."""
    done = run("demo")
    assert done.returncode == 0, done.stderr
    assert "all the same" in done.stdout
    for process in ("this process", "worker 1", "worker 2"):
        found = re.search(rf"{process}: (\d+) descriptors open before, (\d+) after", done.stdout)
        assert found
        assert found[1] == found[2]


def test_demo_as_json(folder: Path) -> None:
    """--json has every transfer and exchange, with who got it, as both sides saw it."""
    done = run("demo", "--json", str(folder))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["same"] is True
    assert report["differences"] == []
    for worker in (1, 2):
        sent = {each["what"]: each for each in report["transfers"] if each["worker"] == worker}
        assert sorted(sent) == sorted(
            ["pipe", "TCP connection", str(folder / "one"), str(folder / "below" / "two")]
        )
        one = sent[str(folder / "one")]
        status = (folder / "one").stat()
        assert one["here"] == one["there"]
        assert one["there"]["bytes"] == 3_000_000
        assert one["there"]["identity"] == f"{status.st_dev}:{status.st_ino}"
        pid, uid, gid = one["peer"]
        assert pid != os.getpid()
        assert (uid, gid) == (os.geteuid(), os.getegid())
        forms = [each["form"] for each in report["exchanges"] if each["worker"] == worker]
        assert forms == ["await", "callback"]
    assert report["cancelled"] == [True, True]


def test_many_files_are_summed_up(tmp_path: Path) -> None:
    """Only --rows files are listed, and the rest is counted."""
    for number in range(50):
        (tmp_path / str(number)).write_text(str(number))
    done = run("demo", "--rows", "3", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "... and 101 more, the same on both sides" in done.stdout


def test_files_that_differ() -> None:
    """A file that reads differently on both sides is a clear line and exit status 1."""
    done = run("demo", "/proc/sys/kernel/random/uuid")  # another one at each reading
    assert done.returncode == 1
    assert "/proc/sys/kernel/random/uuid: worker 1 saw" in done.stderr
    assert "differences" in done.stdout


@pytest.mark.parametrize("what", ["missing", "fifo"])
def test_what_cannot_be_handed_over(folder: Path, what: str) -> None:
    """A path that is not there, or no file, is exit status 2 before anything happens."""
    done = run("demo", str(folder / what))
    assert done.returncode == 2
    assert done.stderr.startswith(f"trio-unixconn: {folder / what}: ")
    assert done.stdout == ""


def test_the_installed_command() -> None:
    """The script trio-unixconn is the same command line."""
    script = Path(sysconfig.get_path("scripts"), "trio-unixconn")
    if not script.exists():
        pytest.skip("the package is not installed in this environment")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout


def test_without_the_extra() -> None:
    """Without typer and rich the command says which extra is missing."""
    program = (
        "import sys; sys.modules['rich'] = sys.modules['typer'] = None; import runpy; "
        "runpy.run_module('trio_unixconn', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "pip install 'trio_unixconn[cli]'" in done.stderr


def test_long_temporary_folder(tmp_path: Path) -> None:
    """A temporary folder whose name is too long for sockets does not hinder the demonstration."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "trio_unixconn", "demo", trio_unixconn.__file__],
        env={**os.environ, "TMPDIR": str(long)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


################################################################
# In this process, to see what a user does not
################################################################

SEEN = wire.Seen("1:2", 3, "a" * 64)
OTHER = wire.Seen("1:9", 3, "b" * 64)


def test_every_difference_is_said() -> None:
    """Each kind of difference has its line."""
    report = driver.Report(
        transfers=[driver.Transfer(1, "file", [1, 2, 3], SEEN, OTHER, 0.1)],
        exchanges=[driver.Exchange(2, "await", [1], [2], [3], [3])],
        cancelled=[True, False],
        descriptors=[driver.Descriptors("worker 1", 5, 6)],
    )
    file, credentials, cancelled, descriptors = report.differences()
    assert file == (
        "file: worker 1 saw 3 bytes, bbbbbbbbbbbb, of 1:9; here it is 3 bytes, aaaaaaaaaaaa, of 1:2"
    )
    assert credentials == (
        "credentials by await: worker 2 is [3] and sent [3]; "
        "this process is [1] and the worker got [2]"
    )
    assert cancelled == "worker 2: the cancelled receive did not end with OperationCancelled"
    assert descriptors == "worker 1: 5 descriptors were open before, 6 after"


def test_unreadable_files_and_folders_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be opened is listed with the reason, and the rest is handed over."""
    real_open, real_scandir = os.open, os.scandir

    def no_open(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("one"):
            raise PermissionError(13, "Permission denied", path)
        return real_open(path, *arguments, **options)

    def no_scandir(path: Any) -> Any:
        if str(path).endswith("below"):
            raise PermissionError(13, "Permission denied", path)
        return real_scandir(path)

    monkeypatch.setattr(os, "open", no_open)
    monkeypatch.setattr(os, "scandir", no_scandir)
    done = CliRunner().invoke(command_line.app, ["demo", str(folder)])
    assert done.exit_code == 0, done.output
    flat = done.output.replace("\n", "")
    assert f"not handed over: {folder}/one: Permission denied" in flat
    assert f"not handed over: {folder}/below: Permission denied" in flat


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (EOFError("it ended"), "EOFError: it ended"),
        (trio.TooSlowError(), "TooSlowError"),
    ],
)
def test_a_demonstration_that_fails(
    error: Exception, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies or hangs is a clear line and exit status 1."""

    async def fail(*_: object) -> None:
        async with trio.open_nursery():
            raise error

    monkeypatch.setattr(driver, "run", fail)
    done = CliRunner().invoke(command_line.app, ["demo"])
    assert done.exit_code == 1
    assert f"trio-unixconn: {text}" in done.stderr


def test_a_mistake_in_the_demonstration(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody expects is not hidden."""

    async def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(driver, "run", fail)
    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(command_line.app, ["demo"], catch_exceptions=False)


async def test_a_worker_that_cannot_start(tmp_path: Path) -> None:
    """A worker that ends before it listens is an error that says so."""
    path = tmp_path / "taken"
    path.write_text("")
    report = driver.Report()
    progress = driver.Progress(1, lambda *_: None)
    with pytest.RaisesGroup(EOFError):
        await driver.one_worker(1, str(path), [], report, progress)


async def test_a_worker_that_crashes_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that ends with an exit status other than 0 is an error that says so."""

    async def something_unknown(_: int, connection: trio_unixconn.UnixConnection, *__: Any) -> None:
        await connection.send_all(b"?")
        assert await connection.receive_some() == b""

    monkeypatch.setattr(driver, "everything", something_unknown)
    report = driver.Report()
    progress = driver.Progress(1, lambda *_: None)
    with pytest.raises(ChildProcessError, match="exit status 1"):
        await driver.one_worker(1, str(tmp_path / "s"), [], report, progress)


async def test_a_worker_that_ends_early() -> None:
    """A stream that ends before the answer is EOFError."""
    one, two = trio_unixconn.connection_pair()
    async with one:
        async with two:
            await two.send_all(b"[1")
        with pytest.raises(EOFError, match="before it answered"):
            await wire.receive_answer(one)


async def test_a_receive_that_is_not_cancelled() -> None:
    """If a descriptor comes where the receive should have been cancelled, the report says so."""
    one, two = trio_unixconn.connection_pair()
    async with one, two:
        await two.send_fd(0)
        assert await driver.cancelled_from_a_thread(one) is False


def test_descriptors_are_counted_elsewhere_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no /proc, /dev/fd has the descriptors."""
    before = wire.count_descriptors()
    monkeypatch.setattr(os.path, "isdir", lambda _: False)
    assert wire.count_descriptors() == before
