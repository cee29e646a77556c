"""What ``trio-unixconn serve`` logs, and that no terminal, pipe or disk stops it."""

from __future__ import annotations

import errno
import json
import logging
import os
import pty
import re
import resource
import select
import signal
import subprocess
import threading
from contextlib import ExitStack, closing, suppress
from typing import TYPE_CHECKING

import pytest

from tests._helpers.cli import COMMAND, ended, run
from tests._helpers.serve_cli import (
    APP,
    Terminal,
    answer,
    connected,
    first_connection,
    make_project,
    rest_of,
    serving,
    starting,
)
from tests._helpers.waiting import counted, until_sync
from trio_unixconn._cli.serve import output
from trio_unixconn._cli.serve.log import EndedJobs
from trio_unixconn._cli.serve.output import CapturedStream, LineOutput
from trio_unixconn.pool._supervisor import CANCELLED, UNFINISHED

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

# A handler that prints, and one whose error has text of its client.
LOUD = """
import sys

async def once(stream, job):
    data = await stream.receive_some(100)
    for number in range(200 if data == b"flood" else 0):
        print("line", number)
    print("printed", data)
    print("on standard error", file=sys.stderr)
    await stream.send_all(b"one")

async def flood(stream, job):
    await stream.receive_some(100)
    for number in range(3000):
        print("x" * 1000, flush=True)
    await stream.send_all(b"one")

async def fail(stream, job):
    data = await stream.receive_some(100)
    raise ValueError(data.decode())
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a directory with handlers that print and fail."""
    project = make_project(tmp_path)
    (project / "app.py").write_text(APP + LOUD)
    return project


def ask(project: Path, data: bytes) -> bytes:
    with connected(str(project / "s")) as client:
        client.sendall(data)
        return rest_of(client)


################################################################
# LineOutput
################################################################


def lost(count: int, why: str) -> bytes:
    return f"lost {count}: {why}\n".encode()


def test_line_output_put_writes_lines_in_order(tmp_path: Path) -> None:
    """Put writes every line, and close waits for that."""
    fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    lines = LineOutput(fd, lost)
    for number in range(1000):
        lines.put(b"%d\n" % number)
    assert lines.close(60)
    assert (tmp_path / "log").read_text().split() == [str(each) for each in range(1000)]


def test_line_output_put_counts_lines_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that is not read loses lines; when it is read again, it says how many."""
    monkeypatch.setattr(output, "MAX_PENDING", 10_000)
    read, write = os.pipe()
    lines = LineOutput(write, lost)
    # A pipe has space for 64 KiB.
    for _ in range(2000):
        lines.put(b"x" * 99 + b"\n")
    assert not lines.is_idle
    data = bytearray()
    reader = threading.Thread(
        target=lambda: data.extend(b"".join(iter(lambda: os.read(read, 65536), b"")))
    )
    reader.start()
    until_sync(lambda: lines.is_idle)
    lines.put(b"last\n")
    assert lines.close(60)
    reader.join()
    os.close(read)
    text = data.decode().splitlines()
    assert text[-1] == "last"
    notices = [each for each in text if each.startswith("lost ")]
    assert notices[-1] == text[-2]
    count = sum(int(each.split()[1].removesuffix(":")) for each in notices)
    assert len(text) - 1 - len(notices) + count == 2000
    assert count > 1000


def test_line_output_close_gives_up_after_its_timeout() -> None:
    """Close does not wait for a reader that does not read."""
    read, write = os.pipe()
    lines = LineOutput(write, lost)
    lines.put(b"x" * 100_000 + b"\n")
    assert not lines.close(0.01)
    # So that the thread ends.
    while not lines.close(0.01):
        os.read(read, 65536)
    os.close(read)


def test_line_output_recovers_from_a_full_disk(tmp_path: Path) -> None:
    """Lines that a full disk did not take are counted; the next line that fits says so."""
    fd = os.open("/dev/full", os.O_WRONLY)
    reopened = threading.Event()
    lines = LineOutput(
        fd,
        lost,
        reopen=lambda: os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT),
        on_reopened=lambda _: reopened.set(),
    )
    for text in (b"one\ntwo\n", b"three\n"):
        lines.put(text)
        until_sync(lambda: lines.is_idle)
    lines.reopen()
    assert reopened.wait(60)
    lines.put(b"four\n")
    assert lines.close(60)
    assert (tmp_path / "log").read_text() == "lost 3: No space left on device\nfour\n"


def test_line_output_to_a_pipe_that_does_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process can make the output non-blocking; a full one is waited for."""
    waits = counted(monkeypatch, select, "poll")
    read, write = os.pipe()
    os.set_blocking(write, False)
    size = 0
    with suppress(BlockingIOError):
        while True:
            size += os.write(write, bytes(4096))
    lines = LineOutput(write, lost)
    lines.put(b"late\n")
    until_sync(lambda: bool(waits))
    assert not lines.is_idle
    with open(read, "rb") as file:
        assert file.read(size) == bytes(size)
        assert lines.close(60)
        assert file.read() == b"late\n"


def test_line_output_ends_a_torn_line(tmp_path: Path) -> None:
    """After a line that was written in part, the next one begins on a line of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    resource.setrlimit(resource.RLIMIT_FSIZE, (7, before[1]))
    try:
        lines = LineOutput(fd, lost)
        lines.put(b"one\ntwo two\nthree\n")
        until_sync(lambda: lines.is_idle)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines.put(b"four\n")
    assert lines.close(60)
    assert (tmp_path / "log").read_text() == "one\ntwo\nlost 2: File too large\nfour\n"


def test_line_output_ends_when_the_reader_has_closed_the_pipe() -> None:
    """A pipe without a reader ends this output; put does not raise."""
    read, write = os.pipe()
    os.close(read)
    lines = LineOutput(write, lost)
    lines.put(b"one\n")
    until_sync(lambda: lines.is_gone)
    lines.put(b"two\n")
    assert lines.close(60)


def test_line_output_waits_for_a_non_blocking_pipe() -> None:
    """O_NONBLOCK, which the terminal may have from another process, loses nothing."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    lines = LineOutput(write, lost)
    lines.put((b"x" * 99 + b"\n") * 5000)
    data = b""
    while len(data) < 500_000:
        data += os.read(read, 65536)
    assert lines.close(60)
    os.close(read)
    assert data == (b"x" * 99 + b"\n") * 5000


def test_line_output_reopen_reports_an_error(tmp_path: Path) -> None:
    """A file that cannot be opened again is reported, and the old one is used on."""
    errors: list[OSError | None] = []

    def fail() -> int:
        raise OSError(errno.EACCES, "Permission denied")

    fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    lines = LineOutput(fd, lost, reopen=fail, on_reopened=errors.append)
    lines.reopen()
    until_sync(lambda: bool(errors))
    lines.put(b"one\n")
    assert lines.close(60)
    assert [getattr(each, "errno", None) for each in errors] == [errno.EACCES]
    assert (tmp_path / "log").read_text() == "one\n"


def test_captured_stream_forwards_parts_of_a_long_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line without an end is forwarded in parts, and the last one when the stream ends."""
    monkeypatch.setattr(output, "MAX_LINE", 1000)
    read, write = os.pipe()
    lines: list[bytes] = []
    # Not 1 or 2, which pytest has captured itself.
    stream = CapturedStream(write, lines.append)
    os.write(write, b"x" * 5000 + b"\nshort\nno end")
    stream.restore(60)
    os.close(stream.original)
    os.close(write)
    os.close(read)
    assert b"".join(lines) == b"x" * 5000 + b"short" + b"no end"
    assert lines[-2:] == [b"short", b"no end"]


################################################################
# Standard output
################################################################


def test_ascii_output_escapes_what_it_cannot_encode(project: Path) -> None:
    """Text that the encoding of the output does not have is escaped, and the server goes on."""
    with serving(project, "fail", variables={"PYTHONIOENCODING": "ascii"}) as served:
        assert ask(project, "na\u00efve \u65e5 \x1b[31m".encode()) == b""
        assert "ValueError: na\\xefve \\u65e5 \\x1b[31m" in served.line("ValueError: ")
        assert ask(project, b"again") == b""
        served.line("ValueError: again")
        assert "2 failed" in served.drained()


def test_unread_pipe_stops_neither_serving_nor_the_drain(project: Path) -> None:
    """While nothing reads the log and the handler prints, clients are served and a drain ends."""
    with serving(project, "flood", "--hang-timeout", "5") as served:
        for _ in range(3):
            assert ask(project, b"x") == b"one"
        served.send(signal.SIGTERM)
        # Nothing is read until it has exited.
        assert served.process.wait(60) == 0
    assert not (project / "s").exists()


def test_unread_pipe_reports_lost_lines_when_it_is_read(project: Path) -> None:
    """What was lost is counted in a line of the log once the pipe is read again."""
    with serving(project, "flood") as served:
        assert ask(project, b"x") == b"one"
        stdout = served.process.stdout
        assert stdout is not None
        said = threading.Event()

        def read() -> None:
            for line in stdout:
                if "could not be written (the output is too slow)" in line:
                    said.set()

        reader = threading.Thread(target=read)
        reader.start()
        # The next line that is written says it.
        while not said.wait(0.1):
            assert ask(project, b"x") == b"one"
        served.send(signal.SIGTERM)
        assert served.process.wait(60) == 0
        reader.join()


def test_second_signal_exits_while_standard_error_is_stalled(project: Path) -> None:
    """The last line of a process whose outputs are stalled does not keep it."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with suppress(BlockingIOError):
        while True:
            os.write(write, b"x" * 4096)
    os.set_blocking(write, True)
    with serving(project, "hold", stderr=write) as served, connected(str(project / "s")) as client:
        assert client.recv(4) == b"held"
        served.send(signal.SIGQUIT)
        assert served.process.wait(60) == 128 + signal.SIGQUIT
    os.close(read)
    os.close(write)


def test_closed_output_does_not_fail_a_drain(project: Path) -> None:
    """A reader that has closed the pipe ends the output only; the drain ends with status 0."""
    with serving(project, "hold") as served, connected(str(project / "s")) as client:
        assert client.recv(4) == b"held"
        assert served.process.stdout is not None
        served.process.stdout.close()
        served.send(signal.SIGHUP)
        served.send(signal.SIGTERM)
        client.sendall(b"x")
        assert rest_of(client) == b"one"
        assert served.process.wait(60) == 0
        served.process.stdout = None


def test_worker_output_keeps_its_stream(project: Path) -> None:
    """What a handler prints is on standard output, and its errors on standard error."""
    with serving(project, "once", variables={"PYTHONUNBUFFERED": "1"}) as served:
        assert ask(project, b"x") == b"one"
        assert served.line("printed") == "printed b'x'\n"
        served.send(signal.SIGTERM)
        done = ended(served.process)
    assert done.stderr == "on standard error\n"


################################################################
# --log-file, --log-format, --log-level
################################################################


def test_log_file_is_opened_again_on_sigusr1(project: Path) -> None:
    """After a rotation and SIGUSR1 the log goes to the new file; the old one is complete."""
    log, old = project / "log", project / "log.1"
    with starting(project, "app:once", "--log-file", "log") as served:
        until_sync(lambda: log.exists() and "ready: " in log.read_text())
        log.rename(old)
        served.send(signal.SIGUSR1)
        until_sync(lambda: log.exists() and "received SIGUSR1: opened" in log.read_text())
        log.unlink()
        log.mkdir()
        served.send(signal.SIGUSR1)
        served.send(signal.SIGTERM)
        done = ended(served.process)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "ready: " in old.read_text()
    assert "drained" not in old.read_text()


def test_log_file_that_is_full_recovers(project: Path, tmp_path: Path) -> None:
    """A full disk stops neither the service nor, once there is space, the log."""
    log = project / "log"
    log.symlink_to("/dev/full")
    with starting(project, "app:fail", "--log-file", "log") as served:
        with first_connection(str(project / "s")) as client:
            client.sendall(b"x")
            assert rest_of(client) == b""
        log.unlink()
        served.send(signal.SIGUSR1)
        until_sync(log.exists)
        assert ask(project, b"y") == b""
        served.drained()
    text = log.read_text()
    assert "could not be written (No space left on device)" in text
    assert "ValueError: y" in text
    assert "drained" in text


def test_log_file_that_cannot_be_opened(project: Path) -> None:
    """A file that cannot be opened is a line and exit status 1, before anything starts."""
    done = run("serve", "app:once", "--bind", "unix:s", "--log-file", "no/log", cwd=project)
    assert done.returncode == 1
    assert done.stderr == f"trio-unixconn: {project}/no/log: No such file or directory\n"


def test_sigusr1_without_log_file(project: Path) -> None:
    """SIGUSR1 without --log-file is logged, and nothing else happens."""
    with serving(project, "once") as served:
        served.send(signal.SIGUSR1)
        served.line("received SIGUSR1: there is no --log-file to open again")
        assert answer(str(project / "s")) == b"one"
        assert "drained" in served.drained_output()


def test_log_format_json(project: Path) -> None:
    """Each line on standard output is a JSON object, a worker's and a traceback's, too."""
    variables = {"PYTHONUNBUFFERED": "1"}
    with serving(project, "once", "--log-format", "json", variables=variables) as served:
        assert ask(project, b"x") == b"one"
        text = "".join(served.lines) + served.drained_output()
    records = [json.loads(line) for line in text.splitlines()]
    assert all(set(each) == {"time", "level", "logger", "message"} for each in records)
    messages = {each["message"]: each for each in records}
    assert messages["printed b'x'"]["logger"] == "stdout"
    assert messages["listening at unix:s"]["level"] == "INFO"
    assert any(each.startswith("drained: ") for each in messages)


def test_log_level(project: Path) -> None:
    """Records below --log-level are dropped."""
    with starting(project, "app:fail", "--log-level", "error") as served:
        with first_connection(str(project / "s")) as client:
            client.sendall(b"secret")
            assert rest_of(client) == b""
        out = served.drained_output()
    assert "INFO" not in out
    assert "ERROR: " in out
    assert "ValueError: secret" in out


################################################################
# Terminals
################################################################


def test_print_of_a_handler_is_shown_above_the_table(project: Path) -> None:
    """What a handler prints stays above the table, escaped, on both streams."""
    with closing(Terminal(project)) as terminal:
        terminal.shows("app:once, up 0:00:0")
        assert ask(project, b"x") == b"one"
        text = terminal.shows("printed b'x'", "on standard error", "handled 1 (")
        assert text.index("printed b'x'") < text.rindex("app:once, up")
        terminal.process.send_signal(signal.SIGTERM)
        text = terminal.end()
    assert text.count("printed b'x'") == 1
    assert text.count("on standard error") == 1


def test_flood_of_a_handler_above_the_table_is_counted(project: Path) -> None:
    """Of more lines than a terminal can take between two pictures, the rest is counted."""
    with closing(Terminal(project)) as terminal:
        terminal.shows("app:once, up 0:00:0")
        assert ask(project, b"flood") == b"one"
        terminal.shows("more lines, which --plain prints", "handled 1 (")
        terminal.process.send_signal(signal.SIGTERM)
        terminal.end()


def test_log_reports_a_record_that_cannot_be_formatted() -> None:
    """A wrong record is reported on standard error, as logging does, and the next one is logged."""
    program = (
        "from trio_unixconn._cli.serve.log import logger, start_log\n"
        "log = start_log(file=None, form='text', level=20, table=False)\n"
        "logger.info('%d', 'x')\n"
        "logger.info('one %d', 2)\n"
        "log.stop()\n"
    )
    done = subprocess.run(
        [COMMAND[0], "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.endswith(" INFO: one 2\n")
    assert "--- Logging error ---" in done.stderr


def test_captured_stream_without_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no pseudoterminal is left, workers get a pipe."""

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    master, slave = pty.openpty()
    lines: list[bytes] = []
    monkeypatch.setattr(os, "openpty", fail)
    stream = CapturedStream(slave, lines.append)
    assert not os.isatty(slave)
    os.write(slave, b"one\n")
    stream.restore(60)
    assert os.isatty(slave)
    for fd in (stream.original, slave, master):
        os.close(fd)
    assert lines == [b"one"]


def test_stalled_terminal_stops_nothing(project: Path) -> None:
    """While a terminal takes no output (Ctrl-S), clients are served and a drain ends."""
    with closing(Terminal(project)) as terminal:
        terminal.shows("app:once, up 0:00:0")
        # Nothing is read from here on, which the server sees as it sees Ctrl-S.
        for _ in range(200):
            assert ask(project, b"x" * 100) == b"one"
        terminal.process.send_signal(signal.SIGHUP)
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.process.wait(60) == 0
    assert not (project / "s").exists()


def test_closed_terminal_ends_the_output_only(project: Path) -> None:
    """A terminal that is gone is EIO; the server goes on, and a drain ends with status 0."""
    with closing(Terminal(project)) as terminal:
        terminal.shows("app:once, up 0:00:0")
        terminal.hang_up()
        for _ in range(10):
            assert ask(project, b"x") == b"one"
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.process.wait(60) == 0
    assert not (project / "s").exists()


def test_table_in_ascii(project: Path) -> None:
    """An ascii terminal gets a table without other characters."""
    with closing(Terminal(project, PYTHONIOENCODING="ascii")) as terminal:
        terminal.shows("app:once, up 0:00:0", "memory")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end().isascii()


def test_table_falls_back_to_lines(project: Path) -> None:
    """If the table cannot be drawn, the log has the reason, and plain lines follow."""
    script = project / "broken.py"
    script.write_text(
        "from trio_unixconn._cli.serve import service\n"
        "def render(*args, **kwargs):\n    raise ValueError('no table')\n"
        "service.render = render\n"
        "from trio_unixconn.__main__ import main\nmain()\n"
    )
    with closing(Terminal(project, program=[COMMAND[0], str(script)])) as terminal:
        terminal.shows("cannot show the table", "ValueError: no table")
        assert ask(project, b"x") == b"one"
        terminal.shows("printed b'x'")
        terminal.process.send_signal(signal.SIGTERM)
        text = terminal.end()
    assert "drained: 1 accepted" in text.replace("\n", "")


################################################################
# Clients that outlive a drain
################################################################


def test_handler_print_is_forwarded_when_it_is_made(project: Path) -> None:
    """A line that a handler prints appears while it still runs, and without a variable for it."""
    (project / "app.py").write_text(
        "import os\n"
        "async def hold(stream, job):\n"
        "    print('begun', [name for name in os.environ if name.startswith('TRIO_')])\n"
        "    await stream.receive_some(100)\n"
    )
    with serving(project, "hold") as served, connected(str(project / "s")):
        assert served.line("begun") == "begun []\n"


def test_ended_jobs_are_known_by_their_mark() -> None:
    """A record is counted for its attribute, not for its text, which a handler can choose."""
    logged: list[tuple[int, str]] = []
    jobs = EndedJobs(lambda level, text: logged.append((level, text)))
    text = "handler was cancelled because its worker is exiting"

    def record(**attributes: str) -> logging.LogRecord:
        return logging.makeLogRecord(
            {"name": "trio_unixconn.pool", "levelno": logging.ERROR, "msg": text, **attributes}
        )

    assert jobs.filter(record())
    assert not jobs.filter(record(**{UNFINISHED: CANCELLED}))
    assert not jobs.filter(record(**{UNFINISHED: "abandoned: of old age"}))
    assert not jobs.filter(record(**{UNFINISHED: "abandoned: of old age"}))
    jobs.report()
    jobs.report()
    assert logged == [
        (logging.WARNING, "1 connection outlived a drain: cancelled after --drain-timeout"),
        (logging.WARNING, "2 connections abandoned: of old age"),
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_clients_that_outlive_a_drain_are_one_line(project: Path, number: signal.Signals) -> None:
    """However many handlers the end of a drain cancels, the log has their number, no traceback."""
    with serving(project, "hold", "--drain-timeout", "0.5") as served, ExitStack() as stack:
        for _ in range(50):
            client = stack.enter_context(connected(str(project / "s")))
            assert client.recv(4) == b"held"
        served.send(number)
        text = served.line("outlived")
        if number == signal.SIGHUP:
            # Of one worker, in one message or in two.
            while sum(map(int, re.findall(r"(\d+) connections? outlived", text))) < 50:
                text += served.line("outlived")
        text += served.drained_output()
    assert sum(map(int, re.findall(r"(\d+) connections? outlived", text))) == 50
    assert text.count("outlived") <= 2
    assert "WARNING" in text
    assert "cancelled after --drain-timeout" in text
    assert "job" not in "".join(served.lines).replace("jobs", "") + text.replace("jobs", "")


def test_clients_of_a_worker_that_is_killed_are_one_line(project: Path) -> None:
    """Abandoned connections of one worker are one line with their number and the reason."""
    with serving(project, "hold") as served, ExitStack() as stack:
        for _ in range(20):
            client = stack.enter_context(connected(str(project / "s")))
            assert client.recv(4) == b"held"
        os.kill(int(re.findall(r"workers (\d+)", served.lines[-1])[0]), signal.SIGKILL)
        assert "WARNING: 20 connections abandoned: " in (line := served.line("abandoned"))
        assert "SIGKILL" in line
        assert served.drained_output().count("abandoned") == 1
