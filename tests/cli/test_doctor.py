"""``trio-unixconn doctor``: what it finds here, and where something is missing."""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from typer.testing import CliRunner

import trio_unixconn
from tests._helpers.cli import run
from tests._helpers.environment import environment
from trio_unixconn import __main__ as command_line, _kernel
from trio_unixconn._cli.doctor import lab, limits, probes
from trio_unixconn._cli.doctor.examination import examine
from trio_unixconn.errors import PeerGoneError

if TYPE_CHECKING:
    import socket

    from trio_unixconn._cli.doctor.report import Feature


def features() -> dict[str, Feature]:
    return {each.name: each for each in examine().features}


def test_doctor_tables() -> None:
    """Every feature and limit has its row, in 80 columns, and the core works here."""
    done = run("doctor", env=environment(COLUMNS="80"))
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    for name in ("SCM_RIGHTS", "SO_PEERPIDFD", "flock", "RLIMIT_NOFILE, soft", "SCM_MAX_FD"):
        assert name in done.stdout
    assert "descriptors and credentials pass" in done.stdout


def test_doctor_json() -> None:
    """--json has every feature, limit and version, as they are."""
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["works"] is True
    assert report["versions"]["python"].endswith(platform.python_version())
    assert platform.release() in report["versions"]["kernel"]
    assert report["versions"]["trio"] == trio.__version__
    assert report["versions"]["trio_unixconn"] == trio_unixconn.__version__
    found = {each["name"]: each for each in report["features"]}
    assert list(found) == [probe.name for probe in probes.PROBES]
    for each in found.values():
        assert each["since"]
        assert each["seen"]
        assert each["otherwise"]
    values = {each["name"]: each["value"] for each in report["limits"]}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert values["RLIMIT_NOFILE, soft"] == soft
    assert values["RLIMIT_NOFILE, hard"] == hard
    assert 0 < values["descriptors free"] < soft
    assert values["SCM_MAX_FD"] == 253
    somaxconn = int(Path("/proc/sys/net/core/somaxconn").read_text())
    assert values["net.core.somaxconn"] == somaxconn


def test_doctor_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is as before, no child is left, and no file; the guard looks for descriptors."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="tu-") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        assert examine().works
        assert os.listdir(directory) == []
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limit
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize(
    ("constant", "value", "missing"),
    [
        ("SO_PASSCRED", None, ["SCM_CREDENTIALS", "SO_PASSCRED"]),
        ("SO_PEERGROUPS", None, ["SO_PEERGROUPS"]),
        ("SO_PEERSEC", None, ["SO_PEERSEC"]),
        ("SO_PASSPIDFD", None, ["SO_PASSPIDFD"]),
        ("SO_PEERPIDFD", None, ["SO_PEERPIDFD", "SO_PEERPIDFD of a reaped peer"]),
        ("SO_PASSRIGHTS", None, ["SO_PASSRIGHTS = 0"]),
        ("MSG_CMSG_CLOEXEC", 0, ["MSG_CMSG_CLOEXEC"]),
        # Numbers that no kernel knows, as an older one does not know these.
        ("SO_PEERGROUPS", 9999, ["SO_PEERGROUPS"]),
        ("SO_PASSPIDFD", 9999, ["SO_PASSPIDFD"]),
        ("SO_PEERPIDFD", 9999, ["SO_PEERPIDFD", "SO_PEERPIDFD of a reaped peer"]),
        # An option that does something else.
        ("SO_PASSRIGHTS", _kernel.SO_PASSCRED, ["SO_PASSRIGHTS = 0"]),
        ("SCM_MAX_FD", 254, ["253 descriptors a message"]),
    ],
)
def test_doctor_missing_features(
    constant: str, value: int | None, missing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the platform lacks is found missing, with what happened, and the rest is not."""
    before = {name for name, each in features().items() if not each.works}
    monkeypatch.setattr(_kernel, constant, value)
    found = features()
    assert {name for name, each in found.items() if not each.works} - before == (
        set(missing) - before
    )
    assert all(found[name].seen for name in missing)


def test_doctor_without_descriptors_or_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """If descriptors or credentials do not pass, the exit status is 1, with the reason."""
    monkeypatch.setattr(_kernel, "AF_UNIX", None)
    done = CliRunner().invoke(command_line.app, ["doctor"])
    assert done.exit_code == 1
    assert "this library does not work here" in done.stdout
    said = [line for line in done.stderr.splitlines() if "has no Unix sockets" in line]
    assert [line.split(": ")[1] for line in said] == [
        "sendmsg, recvmsg",
        "SCM_RIGHTS",
        "SO_PEERCRED",
        "SCM_CREDENTIALS",
    ]


def test_doctor_forbidden_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature that a sandbox forbids is listed as missing, and nothing is raised."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    for name in ("memfd_create", "pidfd_open", "mkdir"):
        monkeypatch.setattr(os, name, forbidden)
    monkeypatch.setattr(subprocess, "Popen", forbidden)
    found = features()
    for name in ("memfd_create, seals", "pidfd_send_signal", "abstract names"):
        assert found[name].works is (name == "abstract names")
    assert found["flock"].seen == "Operation not permitted"
    assert found["SO_PEERPIDFD of a reaped peer"].works is False


def test_doctor_error_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error without text is shown by its name."""

    def fail(*_: Any) -> Any:
        raise ArithmeticError

    monkeypatch.setattr(signal, "pidfd_send_signal", fail)
    assert features()["pidfd_send_signal"].seen == "ArithmeticError"


def test_doctor_attempts_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature whose attempt ran out of time is unknown, not missing; the rest is as before."""
    expected = {name: each.works for name, each in features().items()}
    # It neither connects nor ends.
    monkeypatch.setattr(lab, "_CHILD", "import sys; sys.stdin.read()")
    monkeypatch.setattr(lab, "PROCESS_PATIENCE", 0.2)
    expected["SO_PEERPIDFD of a reaped peer"] = None
    assert {name: each.works for name, each in features().items()} == expected
    done = CliRunner().invoke(command_line.app, ["doctor"])
    assert done.exit_code == 0
    assert "unknown" in done.stdout
    assert "no answer in time" in done.stdout


def test_doctor_core_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it is not known whether descriptors pass, the exit status is 1, with that reason."""

    def silent(*_: Any) -> Any:
        raise TimeoutError

    monkeypatch.setattr(lab.Lab, "receive", silent)
    done = CliRunner().invoke(command_line.app, ["doctor"])
    assert done.exit_code == 1
    assert "whether descriptors and credentials pass is unknown" in done.stdout
    assert "SCM_RIGHTS: no answer in time (TimeoutError)" in done.stderr


def test_doctor_child_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends before it connects is noticed at once, with its status."""
    monkeypatch.setattr(lab, "_CHILD", "raise SystemExit(3)")
    feature = features()["SO_PEERPIDFD of a reaped peer"]
    assert feature.works is False
    assert feature.seen == "a process that was to connect ended with status 3"


class Elder:
    """A socket of a kernel that no longer knows the peer."""

    def __init__(self, sock: socket.socket, process: subprocess.Popen[bytes]) -> None:
        self.sock, self.process = sock, process

    def getsockopt(self, *arguments: int) -> Any:
        if self.process.returncode is not None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self.sock.getsockopt(*arguments)


def test_doctor_reaped_peer_on_an_older_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel says EINVAL of a reaped peer, it is reported as gone nevertheless."""
    child = lab.Lab.child

    def elder(self: lab.Lab) -> Any:
        process, sock = child(self)
        return process, Elder(sock, process)

    monkeypatch.setattr(lab.Lab, "child", elder)
    feature = features()["SO_PEERPIDFD of a reaped peer"]
    assert feature.works
    assert feature.seen == "the kernel says Invalid argument; reported as gone"


def test_doctor_unexpected_results() -> None:
    """What is not as expected is an error with that text."""
    lab.expect_error(PeerGoneError, lambda: (_ for _ in ()).throw(PeerGoneError()), "")
    with pytest.raises(lab.UnexpectedError, match="nothing was raised"):
        lab.expect_error(PeerGoneError, lambda: None, "nothing was raised")
    with pytest.raises(lab.UnexpectedError, match="it is not so"):
        lab.expect(condition=False, otherwise="it is not so")


def test_doctor_security_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The active security modules are named where the system lists them."""
    text = tmp_path / "lsm"
    text.write_text("capability,yama\n")
    monkeypatch.setattr(probes, "SECURITY_MODULES", str(text))
    assert probes.security_modules() == "capability,yama"
    monkeypatch.setattr(probes, "SECURITY_MODULES", str(tmp_path / "none"))
    assert "No such file" in probes.security_modules()


def test_doctor_security_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """A label that a security module gives is shown."""
    monkeypatch.setattr(probes, "get_peer_security_context", lambda _: "unconfined")
    assert features()["SO_PEERSEC"].seen.startswith("'unconfined' (active: ")


def test_doctor_unknown_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that cannot be read or measured are unknown, with the reason."""
    monkeypatch.setattr(_kernel, "AF_UNIX", None)
    monkeypatch.setattr(limits, "SETTINGS", {"net.none": "nothing"})
    monkeypatch.setitem(sys.modules, "resource", None)
    found = {each.name: each for each in limits.limits()}
    for name in ("SCM_MAX_FD", "net.none", "RLIMIT_NOFILE, soft"):
        assert found[name].value is None
        assert found[name].meaning
    monkeypatch.undo()
    monkeypatch.setattr(limits, "SETTINGS", {"kernel.ostype": "no number"})
    done = CliRunner().invoke(command_line.app, ["doctor"])
    assert "unknown" in done.stdout
