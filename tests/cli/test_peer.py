"""``trio-unixconn peer``, run as a user runs it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests._helpers.cli import run
from trio_unixconn import Credentials, PeerIdentity, _kernel
from trio_unixconn._cli import peer

pytestmark = pytest.mark.slow

ABSTRACT = f"trio-unixconn-test-peer-{os.getpid()}"


def by_name(name: str | None) -> str:
    return f"({name or 'has no name'})"


@pytest.mark.parametrize("form", ["@{}", "unix:abstract={}"])
def test_peer_describes_the_listening_process(form: str) -> None:
    """The output has everything that the kernel reports about the listening process."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0" + ABSTRACT)
        server.listen()
        done = run("peer", form.format(ABSTRACT))
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert lines["address"] == "@" + ABSTRACT
    assert lines["pid"] == str(os.getpid())
    assert lines["user"] == f"{os.geteuid()} {by_name(_kernel.name_of_user(os.geteuid()))}"
    assert lines["group"] == f"{os.getegid()} {by_name(_kernel.name_of_group(os.getegid()))}"
    assert lines["alive"] == "yes"
    assert lines["program"] == os.readlink("/proc/self/exe")


def test_peer_json(tmp_path: Path) -> None:
    """--json has the same facts, with null and a reason for unknown ones."""
    path = tmp_path / ("x\N{SNOWMAN}\n" + "x" * 100) / "socket"
    path.parent.mkdir()
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{directory}/socket")
            server.listen()
            done = run("peer", "--json", path)
    finally:
        os.close(directory)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    unknown = told.pop("unknown")
    assert set(unknown) == {name for name, value in told.items() if value is None}
    assert told["address"] == str(path)
    assert told["pid"] == os.getpid()
    assert told["user"]["id"] == os.geteuid()
    assert {each["id"] for each in told["groups"]} == set(os.getgroups())
    assert told["alive"] is True
    assert told["command_line"] == [
        os.fsdecode(each) for each in Path("/proc/self/cmdline").read_bytes().split(b"\0")[:-1]
    ]


def test_peer_that_has_exited() -> None:
    """An exited process is shown as gone; nothing of another process with its pid is shown."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0" + ABSTRACT)
        listen = "import socket; socket.socket(fileno=0).listen()"
        with subprocess.Popen([sys.executable, "-c", listen], stdin=server.fileno()) as process:
            assert process.wait(60) == 0
        done = run("peer", "--json", "@" + ABSTRACT)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["pid"] == process.pid
    assert told["alive"] is False
    for name in ("program", "command_line", "control_group"):
        assert told[name] is None
        assert "has exited" in told["unknown"][name]


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("/none/socket", 1, "/none/socket: No such file or directory: directory /none: "),
        ("@none", 1, "@none: Connection refused: no process in this network namespace"),
        ("@", 2, "'@' is an abstract name"),
        ("unix:", 2, "expected the URI of one Unix socket"),
    ],
)
def test_peer_without_a_server(name: str, status: int, said: str) -> None:
    """Without a listening process, one line and the exit status 1, no traceback."""
    done = run("peer", name)
    assert done.returncode == status
    assert done.stderr.startswith(f"trio-unixconn: {said}")
    assert len(done.stderr.splitlines()) == 1


def test_peer_timeout() -> None:
    """If the queue stays full, the command gives up after the timeout."""
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("\0" + ABSTRACT)
        server.listen(0)
        client.connect("\0" + ABSTRACT)
        done = run("peer", "--timeout", "0.05", "@" + ABSTRACT)
    assert done.returncode == 1
    assert done.stderr == f"trio-unixconn: @{ABSTRACT}: not done within 0.05 seconds\n"


async def test_peer_unknown_facts() -> None:
    """Facts that the kernel does not report, or does not permit to see, are unknown."""
    identity = PeerIdentity(Credentials(0, 3_999_999_999, 3_999_999_999), (3_999_999_999,))
    facts = {each.name: each for each in await peer._facts(identity)}
    assert facts["pid"].value is None
    assert "pid namespace" in facts["pid"].text
    assert facts["user"].text == facts["groups"].text == "3999999999 (has no name)"
    assert facts["alive"].value is None
    assert "no pidfd of the peer" in facts["alive"].text
    facts = {each.name: each for each in await peer._facts(PeerIdentity(Credentials(1, 0, 0), ()))}
    assert facts["groups"].text == "none"
    facts = {each.name: each for each in await peer._facts(PeerIdentity(Credentials(1, 0, 0)))}
    assert "SO_PEERGROUPS" in facts["groups"].text


def test_peer_without_user_databases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no names of users and groups, there are numbers."""
    monkeypatch.setattr(_kernel, "_database", lambda _: None)
    assert _kernel.name_of_user(0) is None
    assert _kernel.name_of_group(0) is None
