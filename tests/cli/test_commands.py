"""The command line, run as a user runs it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from typer.testing import CliRunner

import trio_unixconn
from tests._helpers.cli import COMMAND, run, run_in_this_process
from tests._helpers.environment import environment
from trio_unixconn import __main__ as command_line
from trio_unixconn._cli._console import end_printing
from trio_unixconn._cli.demo import driver, wire

if TYPE_CHECKING:
    from trio.testing import MockClock

pytestmark = pytest.mark.slow


def run_redirected(
    command: tuple[str, ...], redirections: str, *, unbuffered: bool
) -> subprocess.CompletedProcess[str]:
    """Run a command with redirections of a shell, and with Python's buffers or without."""
    return run(
        *command,
        program=["sh", "-c", f'"$@" {redirections}', "-", *COMMAND],
        env=environment(PYTHONUNBUFFERED="1" if unbuffered else None),
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Make a directory with files, a directory, a link, and a FIFO that must be left alone."""
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


def test_demo_in_80_columns(directory: Path) -> None:
    """In 80 columns nothing but names is folded."""
    done = run("demo", directory, env=environment(COLUMNS="80"))
    assert done.returncode == 0, done.stderr
    rows = [
        line
        for line in done.stdout.splitlines()
        if line.startswith("\N{BOX DRAWINGS LIGHT VERTICAL}")
    ]
    assert max(map(len, rows)) <= 80
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if str(directory) not in line)
    assert sum(" TCP connection " in row for row in rows) == 2
    assert sum(" the worker " in row for row in rows) == 4


def test_demo_breaks_no_word_in_80_columns(tmp_path: Path) -> None:
    """A path is continued in the next line only after a slash, a dot, a dash or an underscore."""
    file = tmp_path / "alphabetical" / "beautiful_gardens" / "character-encoding.txt"
    file.parent.mkdir(parents=True)
    file.touch()
    done = run("demo", file, env=environment(COLUMNS="80"))
    assert done.returncode == 0, done.stderr
    for word in ("alphabetical/", "beautiful_", "gardens/", "character-", "encoding."):
        assert word in done.stdout


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("command", [(), ("demo",), ("send-fd",), ("serve",)])
def test_main_help(command: tuple[str, ...], option: str) -> None:
    """Both -h and --help print the help of the command line, and of each command."""
    done = run_in_this_process(*command, option)
    assert done.returncode == 0
    assert "Usage:" in done.stdout


def test_main_version() -> None:
    """--version prints the version."""
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"trio-unixconn {trio_unixconn.__version__}\n")


def test_main_show_completion() -> None:
    """The script that a shell evaluates is printed, and its requests are answered."""
    asked = environment(_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    done = run("--show-completion", "bash", env=asked)
    assert done.returncode == 0, done.stderr
    assert "complete -o default -F" in done.stdout


FULL = ">/dev/full", "No space left on device"
CLOSED = ">&-", "Bad file descriptor"


@pytest.mark.parametrize(
    ("command", "output", "unbuffered"),
    [
        # Without a buffer, it fails where it prints, and otherwise where it ends.
        (("doctor",), FULL, True),
        (("-h",), FULL, True),
        (("doctor",), FULL, False),
        (("doctor", "--json"), FULL, False),
        (("demo", __file__), FULL, False),
        (("--version",), FULL, False),
        (("-h",), FULL, False),
        (("serve", "--help"), FULL, False),
        (("doctor",), CLOSED, False),
        (("--version",), CLOSED, False),
        (("-h",), CLOSED, False),
    ],
)
def test_main_output_that_cannot_be_written(
    command: tuple[str, ...], output: tuple[str, str], *, unbuffered: bool
) -> None:
    """A full disk and a closed standard output are one line and exit status 1."""
    redirection, why = output
    done = run_redirected(command, redirection, unbuffered=unbuffered)
    assert done.stderr == f"trio-unixconn: standard output: {why}\n"
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("command", "status", "redirections", "unbuffered"),
    [
        (("peer", "nothing"), 1, "2>&-", False),
        (("peer", "nothing"), 1, "2>/dev/full", False),
        (("peer", "nothing"), 1, "2>/dev/full", True),
        (("serve", "no:where", "--bind", "x"), 2, "2>&-", False),
        (("serve", "no:where", "--bind", "x"), 2, "2>/dev/full", False),
        (("peer",), 2, "2>&-", False),
        (("peer",), 2, "2>/dev/full", False),
        (("doctor",), 1, ">/dev/full 2>&-", False),
        (("doctor",), 1, ">/dev/full 2>/dev/full", False),
        (("-h",), 1, ">/dev/full 2>&-", False),
        (("-h",), 1, ">/dev/full 2>/dev/full", True),
    ],
)
def test_main_errors_that_cannot_be_written(
    command: tuple[str, ...], status: int, redirections: str, *, unbuffered: bool
) -> None:
    """Without standard error the exit status is the same, and nothing goes to standard output."""
    done = run_redirected(command, redirections, unbuffered=unbuffered)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_end_printing_leaves_other_errors() -> None:
    """An OSError of another origin is a bug, which stays visible."""
    with pytest.raises(FileNotFoundError) as caught:
        os.stat("/no/such/file")
    end_printing(caught.value)


def test_demo_as_json(directory: Path) -> None:
    """--json has every transfer and exchange, with the worker, as both sides saw it."""
    done = run("demo", "--json", str(directory))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["same"] is True
    assert report["differences"] == []
    for worker in (1, 2):
        sent = {each["what"]: each for each in report["transfers"] if each["worker"] == worker}
        assert sorted(sent) == sorted(
            ["pipe", "TCP connection", str(directory / "one"), str(directory / "below" / "two")]
        )
        one = sent[str(directory / "one")]
        status = (directory / "one").stat()
        assert one["here"] == one["there"]
        assert one["there"]["bytes"] == 3_000_000
        assert one["there"]["identity"] == f"{status.st_dev}:{status.st_ino}"
        pid, uid, gid = one["peer"]
        assert pid != os.getpid()
        assert (uid, gid) == (os.geteuid(), os.getegid())
        forms = [each["form"] for each in report["exchanges"] if each["worker"] == worker]
        assert forms == ["await", "callback"]
    assert report["cancelled"] == [True, True]


def test_demo_rows(tmp_path: Path) -> None:
    """Only --rows files are listed, and the rest is counted."""
    for number in range(50):
        (tmp_path / str(number)).write_text(str(number))
    done = run("demo", "--rows", "3", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "... and 101 more, the same on both sides" in done.stdout


def test_demo_reports_different_files() -> None:
    """A file that reads differently on both sides is a clear line and exit status 1."""
    done = run("demo", "/proc/sys/kernel/random/uuid")  # another one at each reading
    assert done.returncode == 1
    assert "/proc/sys/kernel/random/uuid: worker 1 saw" in done.stderr
    assert "differences" in done.stdout


@pytest.mark.parametrize("what", ["missing", "fifo"])
def test_demo_rejects_missing_paths(directory: Path, what: str) -> None:
    """A missing path, or one that is not a file, is exit status 1 before anything happens."""
    done = run("demo", str(directory / what))
    assert done.returncode == 1
    assert done.stderr.startswith(f"trio-unixconn: {directory / what}: ")
    assert done.stdout == ""


def test_main_installed_script() -> None:
    """The script trio-unixconn is the same command line."""
    script = Path(sysconfig.get_path("scripts"), "trio-unixconn")
    if not script.exists():
        pytest.skip("the package is not installed in this environment")
    done = run("--help", program=[str(script)])
    assert "demo" in done.stdout


def test_main_without_the_extra() -> None:
    """Without typer and rich the command says which extra is missing."""
    program = (
        "import sys; sys.modules['rich'] = sys.modules['typer'] = None; import runpy; "
        "runpy.run_module('trio_unixconn', run_name='__main__')"
    )
    done = run(program=[sys.executable, "-c", program])
    assert done.returncode == 1
    assert "pip install 'trio_unixconn[cli]'" in done.stderr


def test_demo_with_long_tmpdir(tmp_path: Path) -> None:
    """The demo works in a temporary directory whose name is too long for sockets."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    done = run("demo", trio_unixconn.__file__, env=environment(TMPDIR=str(long)))
    assert done.returncode == 0, done.stderr


################################################################
# In this process, to see what a user does not
################################################################

SEEN = wire.Seen("1:2", 3, "a" * 64)
OTHER = wire.Seen("1:9", 3, "b" * 64)


def test_demo_reports_every_difference() -> None:
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


def test_demo_lists_unreadable_files(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    done = CliRunner().invoke(command_line.app, ["demo", str(directory)])
    assert done.exit_code == 0, done.output
    flat = done.output.replace("\n", "")
    assert f"not handed over: {directory}/one: Permission denied" in flat
    assert f"not handed over: {directory}/below: Permission denied" in flat


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (EOFError("it ended"), "EOFError: it ended"),
        (trio.TooSlowError(), "TooSlowError"),
    ],
)
def test_demo_with_a_worker_that_fails(
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


def test_demo_unexpected_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected error is not hidden."""

    async def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(driver, "run", fail)
    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(command_line.app, ["demo"], catch_exceptions=False)


async def test_demo_worker_that_cannot_start(tmp_path: Path) -> None:
    """A worker that exits before it listens is an error with that reason."""
    path = tmp_path / "taken"
    path.write_text("")
    report = driver.Report()
    progress = driver.Progress(1, lambda *_: None)
    with pytest.RaisesGroup(EOFError):
        await driver.one_worker(1, str(path), [], report, progress)
    assert report.transfers == []


async def test_demo_worker_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker with an exit status other than 0 is an error with that status."""

    async def something_unknown(_: int, connection: trio_unixconn.UnixConnection, *__: Any) -> None:
        await connection.send_all(b"?")
        assert await connection.receive_some() == b""

    monkeypatch.setattr(driver, "everything", something_unknown)
    report = driver.Report()
    progress = driver.Progress(1, lambda *_: None)
    with pytest.raises(ChildProcessError, match="exit status 1"):
        await driver.one_worker(1, str(tmp_path / "s"), [], report, progress)


async def test_demo_worker_that_exits_early() -> None:
    """A stream that ends before the answer is EOFError."""
    one, two = trio_unixconn.connection_pair()
    async with one:
        async with two:
            await two.send_all(b"[1")
        with pytest.raises(EOFError, match="before it answered"):
            await wire.receive_answer(one)


async def test_demo_receive_that_is_not_cancelled() -> None:
    """If a descriptor arrives in spite of the cancellation, the report has it."""
    one, two = trio_unixconn.connection_pair()
    async with one, two:
        await two.send_fd(0)
        assert await driver.cancelled_from_a_thread(one) is False


def test_descriptors_are_counted_elsewhere_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no /proc, /dev/fd has the descriptors."""
    before = wire.count_descriptors()
    monkeypatch.setattr(os.path, "isdir", lambda _: False)
    assert wire.count_descriptors() == before


def test_demo_odd_names(tmp_path: Path) -> None:
    """Names with newlines, escapes, markup and bytes that are not text are shown as escapes."""
    for name in (b"a\nb", b"\xff", b"[bold]x", b"\x1b[31m"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(name)
    done = run("demo", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for shown in ("a\\nb", "\\udcff", "[bold]x", "\\x1b[31m"):
        assert shown in done.stdout


def test_demo_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A file whose reading fails is listed with the reason, and the others are handed over."""
    (tmp_path / "good").write_text("x")
    done = run("demo", "/proc/self/mem", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "not handed over: /proc/self/mem: Input/output error" in done.stdout
    assert str(tmp_path / "good") in done.stdout


def test_demo_file_that_vanishes(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is gone when it is opened is listed as a problem."""
    real = Path.lstat

    def lstat(self: Path) -> os.stat_result:
        if self.name == "one":
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return real(self)

    monkeypatch.setattr(Path, "lstat", lstat)
    found, problems = driver.files_in([directory])
    assert found == [directory / "below" / "two"]
    assert problems == [f"{directory / 'one'}: No such file or directory"]


async def test_demo_file_without_data(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file without data is given up with the reason."""
    reading, writing = os.pipe()
    monkeypatch.setattr(wire, "SECONDS_TO_ANSWER", 0.01)
    with pytest.raises(OSError, match="no data for"):
        await wire.digest(reading, wire.plain_read)
    os.close(writing)  # ends the abandoned read
    own = reading
    os.close(reading)
    for fd in range(own, own + 3):
        with contextlib.suppress(OSError):
            if "pipe" in os.readlink(f"/proc/self/fd/{fd}"):
                os.close(fd)


def is_worker(pid: str) -> bool:
    with contextlib.suppress(OSError):
        return "demo.worker" in Path(f"/proc/{pid}/cmdline").read_text()
    return False


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended by SIGTERM")],
)
def test_demo_interrupted(tmp_path: Path, number: signal.Signals, status: int, said: str) -> None:
    """A signal ends it at once with one line and its status; no worker and no file is left."""
    temporary = tmp_path / "t"
    temporary.mkdir()
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 40)
    with subprocess.Popen(
        [sys.executable, "-m", "trio_unixconn", "demo", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs these tests in the background may have ignored it.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
        env=environment(TMPDIR=str(temporary)),
    ) as process:
        tasks = Path(f"/proc/{process.pid}/task")
        workers: list[str] = []
        while len(workers) < driver.WORKERS:
            assert process.poll() is None
            lists = [file.read_text().split() for file in tasks.glob("*/children")]
            workers = [pid for pids in lists for pid in pids if is_worker(pid)]
        # The starter is in trio by then: it has started both.
        os.killpg(process.pid, number)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == status, errors
    assert f"trio-unixconn: {said}" in errors.splitlines()
    assert "Traceback" not in errors
    assert not any(map(is_worker, workers))
    assert os.listdir(temporary) == []


def test_demo_worker_exits_with_its_parent(tmp_path: Path) -> None:
    """A worker exits at the end of its standard input, even if no client has connected."""
    command = [sys.executable, "-m", "trio_unixconn._cli.demo.worker", str(tmp_path / "s")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.stdin.close()
        assert process.wait(30) == 0
