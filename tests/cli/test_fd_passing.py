"""``trio-unixconn send-fd`` and ``receive-fd``, run as a user runs them."""

from __future__ import annotations

import os
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import typer

from tests._helpers.cli import ended, run, run_in_this_process, started, wait_for_socket
from tests._helpers.environment import environment
from trio_unixconn._cli import _console, passing

if TYPE_CHECKING:
    from collections.abc import Generator

pytestmark = pytest.mark.slow

ABSTRACT = f"@trio-unixconn-test-{os.getpid()}"


@pytest.fixture
def directory() -> Generator[Path, None, None]:
    """Make a directory with a short name and some files."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="tu-") as name:
        for each in ("one", "two", "three"):
            Path(name, each).write_text(f"{each}\n")
        yield Path(name)


@pytest.fixture
def path(directory: Path) -> Path:
    """Name a socket that is not there yet."""
    return directory / "socket"


def shell(script: str) -> list[str]:
    return ["--", "sh", "-c", script]


def program(text: str) -> list[str]:
    return ["--", sys.executable, "-c", text]


def test_receive_fd_passes_files_to_a_command(directory: Path, path: Path) -> None:
    """The command has the files from 3 on, in order, and systemd's variables."""
    script = 'cat <&3; cat <&4; cat <&5; echo "$$"; env | grep ^LISTEN_ | sort'
    stale = environment(LISTEN_PIDFDID="1", LISTEN_FDS="9", LISTEN_FDNAMES="x")
    names = ("--name", "first", "--name", "second")
    with started("receive-fd", path, *names, *shell(script), env=stale) as receiver:
        wait_for_socket(path, receiver)
        with open(directory / "two") as two:
            sent = run("send-fd", path, directory / "one", "-", directory / "three", stdin=two)
        assert (sent.returncode, sent.stdout, sent.stderr) == (0, "", "")
        done = ended(receiver)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    *contents, pid, names_seen, count, listen_pid = done.stdout.splitlines()
    assert contents == ["one", "two", "three"]
    assert names_seen == "LISTEN_FDNAMES=first:second:unknown"
    assert count == "LISTEN_FDS=3"
    assert listen_pid == f"LISTEN_PID={pid}"
    assert int(pid) == receiver.pid
    assert not path.exists()


def test_a_listening_socket_reaches_a_command(path: Path) -> None:
    """A descriptor that the sender inherited is passed; a program accepts on the socket."""
    accept = (
        "import socket; server = socket.socket(fileno=3); conn, _ = server.accept(); "
        "conn.sendall(b'hello'); print(conn.recv(9))"
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        started("receive-fd", path, *program(accept)) as receiver,
    ):
        wait_for_socket(path, receiver)
        number = server.fileno()
        sent = run("send-fd", path, "--fd", str(number), pass_fds=[number])
        assert sent.returncode == 0, sent.stderr
        with socket.create_connection(server.getsockname()) as client:
            assert client.recv(9) == b"hello"
            client.sendall(b"thanks")
            done = ended(receiver)
    assert done.stdout == "b'thanks'\n", done.stderr


def test_receive_fd_passes_many_descriptors_and_no_other(directory: Path, path: Path) -> None:
    """Many arrive at their places, also where places overlap, and nothing else is inherited."""
    files = [directory / f"file{number}" for number in range(40)]
    for file in files:
        file.write_text(file.name)
    look = (
        "import os; print([os.read(fd, 99).decode() for fd in range(3, 43)]); "
        "print(sorted(os.listdir('/proc/self/fd'), key=int))"
    )
    reading, writing = os.pipe()
    try:
        with started("receive-fd", path, *program(look), pass_fds=[reading, writing]) as receiver:
            wait_for_socket(path, receiver)
            assert run("send-fd", path, *files).returncode == 0
            done = ended(receiver)
    finally:
        os.close(reading)
        os.close(writing)
    contents, descriptors = done.stdout.splitlines()
    assert contents == str([file.name for file in files])
    # One more is that of the listing.
    assert descriptors == str([str(number) for number in range(44)])


@pytest.mark.parametrize("order", [(3, 4, 5), (5, 4, 3), (4, 5, 3), (9, 3, 4), (3,)])
def test_receive_fd_in_every_order(order: tuple[int, ...], directory: Path) -> None:
    """Wherever descriptors are, each gets its place."""
    text = (
        "import os\n"
        "from trio_unixconn._cli._activation import become\n"
        f"order = {order}\n"
        "for number in order:\n"
        f"    name = os.path.join({str(directory)!r}, str(number))\n"
        "    with open(name, 'w+') as file: pass\n"
        "    fd = os.open(name, os.O_RDWR)\n"
        "    os.write(fd, b'%d' % number)\n"
        "    os.dup2(fd, number + 30, inheritable=False)\n"
        "    os.close(fd)\n"
        "for number in order: os.dup2(number + 30, number, inheritable=False)\n"
        "become(['sh', '-c', 'for fd in /proc/self/fd/*; do readlink $fd; done; :'], order, [])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    listed = [line for line in done.stdout.splitlines() if line.startswith(str(directory))]
    assert listed == [str(directory / str(number)) for number in order]


def test_no_room() -> None:
    """Descriptors for which no place is free are a clear line."""
    text = (
        "import resource, typer\n"
        "from trio_unixconn._cli._activation import become\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))\n"
        "try: become(['true'], [0], [])\n"
        "except typer.Exit as exc: print(exc.exit_code)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == "1\n"
    assert done.stderr.startswith("trio-unixconn: cannot move 1 file descriptors to 3 and up: ")


def test_receive_fd_resets_signals_for_the_command(directory: Path, path: Path) -> None:
    """The command finds the signals that Python ignores at their default."""
    ignored = "grep SigIgn /proc/$$/status"
    expected = subprocess.run(["sh", "-c", ignored], capture_output=True, text=True, check=True)
    with started("receive-fd", path, *shell(ignored)) as receiver:
        wait_for_socket(path, receiver)
        assert run("send-fd", path, directory / "one").returncode == 0
        assert standard(ended(receiver).stdout) == standard(expected.stdout)


def standard(line: str) -> int:
    """Return which signals below 32 are ignored; those of libc depend on the parent process."""
    return int(line.split()[1], 16) & 0x7FFFFFFF


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("r", os.O_RDONLY),
        ("w", os.O_WRONLY),
        ("a", os.O_WRONLY | os.O_APPEND),
        ("r+", os.O_RDWR),
    ],
)
def test_send_fd_mode(mode: str, flags: int, directory: Path, path: Path) -> None:
    """--mode says how the files are opened; the command gets them just so."""
    look = (
        "import fcntl, os; "
        "print(fcntl.fcntl(3, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND), os.fstat(3).st_size)"
    )
    with started("receive-fd", path, *program(look)) as receiver:
        wait_for_socket(path, receiver)
        assert run("send-fd", "--mode", mode, path, directory / "one").returncode == 0
        assert ended(receiver).stdout == f"{flags} {0 if mode == 'w' else 4}\n"


def test_send_fd_listen(directory: Path) -> None:
    """With --listen the sender waits, and with --connect the receiver comes to it."""
    with started("send-fd", "--listen", ABSTRACT, directory / "one") as sender:
        wait_for_socket(ABSTRACT, sender)
        uri = f"unix:abstract={ABSTRACT[1:]}"
        done = run("receive-fd", "--connect", uri, *shell("cat <&3"))
        assert ended(sender).returncode == 0
    assert done.stdout == "one\n", done.stderr


def test_receive_fd_without_a_command(directory: Path, path: Path) -> None:
    """Without a command, the received descriptors are listed and closed."""
    with started("receive-fd", path) as receiver:
        wait_for_socket(path, receiver)
        assert run("send-fd", f"unix:{path}", directory / "one", directory).returncode == 0
        done = ended(receiver)
    assert done.returncode == 0, done.stderr
    assert [line.split(maxsplit=1) for line in done.stdout.splitlines()] == [
        ["3", f"regular file      {directory / 'one'}"],
        ["4", f"directory         {directory}"],
    ]


################################################################
# Peers of the standard library
################################################################


def test_send_fd_to_stdlib(directory: Path, path: Path) -> None:
    """Each file comes in a message of its own with one byte; then the stream ends."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        with started("send-fd", path, directory / "one", directory / "two") as sender:
            conn, _ = server.accept()
            with conn:
                for content in ("one\n", "two\n"):
                    data, fds, _, _ = socket.recv_fds(conn, 100, 10)
                    assert data == b"\0"
                    (fd,) = fds
                    with open(fd) as file:
                        assert file.read() == content
                assert conn.recv(1) == b""
            assert ended(sender).returncode == 0


def test_receive_fd_from_stdlib(directory: Path, path: Path) -> None:
    """Messages with several descriptors are taken as well."""
    with started("receive-fd", path, *shell("cat <&3; cat <&4")) as receiver:
        wait_for_socket(path, receiver)
        with (
            socket.socket(socket.AF_UNIX) as client,
            open(directory / "one") as one,
            open(directory / "two") as two,
        ):
            client.connect(str(path))
            socket.send_fds(client, [b"x"], [one.fileno(), two.fileno()])
        assert ended(receiver).stdout == "one\ntwo\n"


def test_receive_fd_count(directory: Path, path: Path) -> None:
    """With --count the command begins as soon as so many are there."""
    with started("receive-fd", "--count", "2", path, *shell("cat <&3; cat <&4")) as receiver:
        wait_for_socket(path, receiver)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            for name in ("one", "two"):
                with open(directory / name) as file:
                    socket.send_fds(client, [b"x"], [file.fileno()])
            assert ended(receiver).stdout == "one\ntwo\n"


@pytest.mark.parametrize("count", [0, 2])
def test_too_many_or_too_few(count: int, path: Path) -> None:
    """A message without a descriptor, or with more than --count, is an error."""
    with started("receive-fd", "--count", "1", path, *shell("echo ran")) as receiver:
        wait_for_socket(path, receiver)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            socket.send_fds(client, [b"x"], [0] * count)
            done = ended(receiver)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("trio-unixconn: ")
    assert "Traceback" not in done.stderr


def test_receive_fd_connect_receives_nothing(path: Path) -> None:
    """With --connect, a stream that ends without a descriptor is an error; nothing is run."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        with started("receive-fd", "--connect", path, *shell("echo ran")) as receiver:
            server.accept()[0].close()
            done = ended(receiver)
    assert done.returncode == 1
    assert done.stdout == ""
    assert (
        done.stderr == f"trio-unixconn: {path}: end of stream while waiting for a file descriptor\n"
    )


def test_receive_fd_ignores_connections_that_bring_nothing(directory: Path, path: Path) -> None:
    """Neither a second receive-fd, nor peer, nor a silent client ends or holds up the first."""
    with started("receive-fd", path, *shell("cat <&3")) as receiver:
        wait_for_socket(path, receiver)
        second = run("receive-fd", path)
        assert second.returncode == 1
        assert "Address already in use" in second.stderr
        assert run("peer", path).returncode == 0
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(str(path))
            sent = run("send-fd", path, directory / "one")
            assert (sent.returncode, sent.stderr) == (0, "")
            done = ended(receiver)
    assert (done.returncode, done.stdout, done.stderr) == (0, "one\n", "")


def test_send_fd_listen_ignores_connections_that_receive_nothing(
    directory: Path, path: Path
) -> None:
    """With --listen, send-fd goes on until a process has received the descriptor."""
    with started("send-fd", "--listen", path, directory / "one") as sender:
        wait_for_socket(path, sender)
        for _ in range(3):
            assert run("peer", path).returncode == 0
        done = run("receive-fd", "--connect", path, *shell("cat <&3"))
        assert done.stdout == "one\n", done.stderr
        assert ended(sender).returncode == 0


@pytest.mark.parametrize("options", [(), ("--listen",)])
def test_send_fd_reports_a_peer_that_does_not_receive_all(
    options: tuple[str, ...], directory: Path, path: Path
) -> None:
    """The exit status is 1 if the peer closes before it has received the last descriptor."""
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        if not options:
            server.bind(str(path))
            server.listen()
        files = (directory / "one", directory / "two")
        with started("send-fd", *options, path, *files) as sender:
            if options:
                wait_for_socket(path, sender)
                client.connect(str(path))
                conn = client
            else:
                conn, _ = server.accept()
            _, fds, _, _ = socket.recv_fds(conn, 1, 1)
            os.close(fds[0])
            # The second one is there, and stays there.
            poller = select.poll()
            poller.register(conn, select.POLLIN)
            assert poller.poll(60_000)
            conn.close()
            done = ended(sender)
    assert done.returncode == 1
    assert done.stderr.startswith("trio-unixconn: ")
    assert len(done.stderr.splitlines()) == 1


def test_send_fd_waits_until_received(directory: Path, path: Path) -> None:
    """The exit status is not 0 while the descriptor is in the queue of a server."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        done = run("send-fd", "--timeout", "1", path, directory / "one")
    assert done.returncode == 1
    assert done.stderr == f"trio-unixconn: {path}: not done within 1 seconds\n"


@pytest.mark.parametrize("where", ["socket", "later/socket"])
def test_send_fd_wait(where: str, directory: Path) -> None:
    """With --wait, the receiver, and its directory, may be started later."""
    path = directory / where
    with started("send-fd", "--wait", "60", path, directory / "one") as sender:
        path.parent.mkdir(exist_ok=True)
        done = run("receive-fd", path, *shell("cat <&3"))
        assert done.stdout == "one\n", done.stderr
        assert ended(sender).returncode == 0


def test_receive_fd_wait(directory: Path, path: Path) -> None:
    """With --connect and --wait, the sender may be started later."""
    with started("receive-fd", "--connect", "--wait", "60", path, *shell("cat <&3")) as receiver:
        assert run("send-fd", "--listen", path, directory / "one").returncode == 0
        assert ended(receiver).stdout == "one\n"


@pytest.mark.parametrize("options", [(), ("--blocking",)])
def test_receive_fd_blocking(options: tuple[str, ...], path: Path) -> None:
    """--blocking clears O_NONBLOCK, and nothing else does."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    try:
        look = program("import os; print(os.get_blocking(3))")
        with started("receive-fd", *options, path, *look) as receiver:
            wait_for_socket(path, receiver)
            sent = run("send-fd", path, "--fd", str(writing), pass_fds=[writing])
            assert sent.returncode == 0, sent.stderr
            assert ended(receiver).stdout == f"{bool(options)}\n"
    finally:
        os.close(reading)
        os.close(writing)


################################################################
# Which peers are admitted
################################################################


@pytest.mark.parametrize(("options", "mode"), [((), 0o600), (("--any-user",), 0o666)])
def test_receive_fd_mode_of_the_path(
    options: tuple[str, ...], mode: int, directory: Path, path: Path
) -> None:
    """The path is for the same user alone, unless any user may come."""
    with started("receive-fd", *options, path) as receiver:
        wait_for_socket(path, receiver)
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert run("send-fd", path, directory / "one").returncode == 0
        assert ended(receiver).returncode == 0


def send_as_nobody() -> None:
    """Connect under another user id, and send a descriptor."""
    if os.geteuid() != 0:
        assert "CI" not in os.environ
        pytest.skip("only root can be another user")
    with socket.socket(socket.AF_UNIX) as client:
        os.seteuid(65534)
        try:
            client.connect("\0" + ABSTRACT[1:])
        finally:
            os.seteuid(0)
        # A server that denies may have closed it already.
        try:
            socket.send_fds(client, [b"x"], [0])
            assert client.recv(1) == b""
        except OSError:
            pass


def test_receive_fd_denies_another_user(directory: Path) -> None:
    """Another user is sent away, said so, and does not count as the one connection."""
    with started("receive-fd", ABSTRACT, *shell("cat <&3")) as receiver:
        wait_for_socket(ABSTRACT, receiver)
        send_as_nobody()
        assert run("send-fd", ABSTRACT, directory / "one").returncode == 0
        done = ended(receiver)
    assert done.stdout == "one\n"
    assert "denied pid" in done.stderr


def test_another_user_is_let_in() -> None:
    """With --any-user another user may send."""
    with started("receive-fd", "--any-user", "--count", "1", ABSTRACT) as receiver:
        wait_for_socket(ABSTRACT, receiver)
        send_as_nobody()
        done = ended(receiver)
    assert done.stdout.startswith("3 ")


################################################################
# What goes wrong
################################################################


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["send-fd", "{path}"], 2, "nothing to send: give a FILE, or --fd N"),
        (
            ["send-fd", "{path}", "{dir}/none"],
            1,
            "{dir}/none: No such file or directory",
        ),
        (
            ["send-fd", "{path}", "{dir}/one", "--fd", "9999"],
            1,
            "descriptor 9999 is not open",
        ),
        (["send-fd", "{path}", "--fd", "99999999999"], 1, "descriptor 99999999999 is not open"),
        (["send-fd", "{path}", "{dir}/one"], 1, "{path}: No such file or directory: no such"),
        (
            ["send-fd", "{dir}/one", "{dir}/one"],
            1,
            "{dir}/one: Connection refused: not a",
        ),
        (
            ["send-fd", "--any-user", "{path}", "{dir}/one"],
            2,
            "--any-user can only be used",
        ),
        (["send-fd", "--wait", "0.02", "{path}", "{dir}/one"], 1, "{path}: No such file or"),
        (["send-fd", "--wait", "-1", "{path}", "-"], 2, "--wait is a number of seconds"),
        (["send-fd", "--listen", "--wait", "1", "{path}", "-"], 2, "--wait can only be used"),
        (["receive-fd", "--wait", "1", "{path}"], 2, "--wait can only be used"),
        (["send-fd", "--timeout", "nan", "{path}", "-"], 2, "--timeout is a number of seconds"),
        (["send-fd", "@", "-"], 2, "'@' is an abstract name without a character"),
        (["send-fd", "unix:nowhere", "-"], 2, "expected the URI of one Unix socket"),
        (["send-fd", "", "-"], 2, "path of a socket must not be empty"),
        (["receive-fd", "{dir}/one"], 1, "{dir}/one: Address already in use: not a"),
        (["receive-fd", "{path}", "--name", "a:b"], 2, "'a:b': a name has 1 to 255 characters"),
        (["receive-fd", "{path}", "--name", ""], 2, "'': a name has 1 to 255 characters"),
        (
            ["receive-fd", "--connect", "--any-user", "{path}"],
            2,
            "--any-user can only be used",
        ),
        (["receive-fd", "--timeout", "0.01", "{path}"], 1, "{path}: not done within 0.01 seconds"),
        (["receive-fd", "{path}", "--", "no-such-program"], 127, "no-such-program: command not"),
        (["receive-fd", "{path}", "--", "{path}"], 127, "{path}: command not found"),
        (
            ["receive-fd", "{path}", "--", "{dir}/one"],
            126,
            "{dir}/one: Permission denied",
        ),
    ],
)
def test_errors(arguments: list[str], status: int, said: str, directory: Path, path: Path) -> None:
    """What goes wrong is a line and an exit status, and nothing is left at the path."""
    names = {"dir": str(directory), "path": str(path)}
    done = run_in_this_process(*(each.format(**names) for each in arguments))
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("trio-unixconn: " + said.format(**names))
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert sorted(os.listdir(directory)) == ["one", "three", "two"]


def test_send_fd_checks_files_before_connecting(directory: Path, path: Path) -> None:
    """send-fd does not connect if one of the files cannot be opened."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        assert run("send-fd", path, directory / "one", directory / "none").returncode == 1
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [("no shebang", 126, "Exec format error"), ("#!/no/such/program", 127, "No such file")],
)
def test_a_program_that_does_not_start(
    text: str, status: int, said: str, directory: Path, path: Path
) -> None:
    """A program that cannot be run has the shell's exit status."""
    script = directory / "script"
    script.write_text(text)
    script.chmod(0o755)
    with started("receive-fd", path, "--", script) as receiver:
        wait_for_socket(path, receiver)
        assert run("send-fd", path, directory / "one").returncode == 0
        done = ended(receiver)
    assert done.returncode == status
    assert done.stderr.startswith(f"trio-unixconn: {script}: {said}")


################################################################
# Signals
################################################################


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGTERM, 143, "ended by SIGTERM"),
        (signal.SIGHUP, 129, "ended by SIGHUP"),
        (signal.SIGINT, 130, "interrupted"),
    ],
)
def test_ended_by_a_signal(number: signal.Signals, status: int, said: str, path: Path) -> None:
    """A signal ends a command that waits, and the path is taken away."""
    with started("receive-fd", path, preexec_fn=deaf_to()) as receiver:
        wait_for_socket(path, receiver)
        receiver.send_signal(number)
        done = ended(receiver)
    assert (done.returncode, done.stderr) == (status, f"trio-unixconn: {said}\n")
    assert sorted(os.listdir(path.parent)) == ["one", "three", "two"]


def test_receive_fd_keeps_ignored_signals(directory: Path, path: Path) -> None:
    """Signals that the parent process ignored are ignored, here and in the command."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    script = "kill -INT $$; kill -TERM $$; kill -HUP $$; echo still here"
    with started("receive-fd", path, *shell(script), preexec_fn=deaf_to(*signals)) as receiver:
        wait_for_socket(path, receiver)
        for number in signals:
            receiver.send_signal(number)
        assert run("send-fd", path, directory / "one").returncode == 0
        assert ended(receiver).stdout == "still here\n"


def deaf_to(*signals: signal.Signals) -> Any:
    """Return what ignores these and hears the others, as the tests' own starter may not."""

    def prepare() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in signals else signal.SIG_DFL)

    return prepare


################################################################
# In this process, to see what a user does not
################################################################


def test_interrupted_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Control-C is exit status 130 also before, or after, a signal would be heard."""

    async def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as caught:
        _console.run(interrupted)
    assert caught.value.exit_code == 130
    assert capsys.readouterr().err == "trio-unixconn: interrupted\n"


def test_several_mistakes() -> None:
    """Several unexpected errors are all shown."""

    async def mistaken() -> None:
        raise ZeroDivisionError

    async def twice() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mistaken)
            nursery.start_soon(mistaken)

    with pytest.raises(BaseException) as caught:
        _console.run(twice)
    assert len(list(_console._causes(caught.value))) == 2


def test_where_nothing_is_shown() -> None:
    """If the system does not show the file of a descriptor, a dash is listed."""
    assert passing._link_of(-1) == "-"
