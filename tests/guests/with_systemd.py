"""Services under the real systemd: what it does with what the library tells it.

pytest runs this file in a guest of which systemd is the first process (``nox -s guest-systemd``),
and nowhere else. Everything is slow there: a Python takes five seconds to start.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from typing_extensions import Self

if Path("/proc/1/comm").read_text().strip() != "systemd":
    pytest.skip("systemd is not the first process", allow_module_level=True)

UNITS: Final = Path("/run/systemd/system")
# Seconds. Only a hang takes that long.
PATIENCE: Final = 120.0
PYTHON: Final = "/usr/bin/python3"
ENVIRONMENT: Final = "PYTHONPATH=/srv/site:/srv/checkout PYTHONDONTWRITEBYTECODE=1"


def systemctl(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run systemctl, and print what it prints."""
    done = subprocess.run(
        ["systemctl", *words], capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    print(*words, done.returncode, done.stdout, done.stderr)
    assert not check or done.returncode == 0, done.stderr
    return done


def show(unit: str, name: str) -> str:
    """Return a property of a unit."""
    return systemctl("show", unit, "-P", name).stdout.strip()


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def journal_of(unit: str) -> str:
    """Return the log of a unit."""
    command = ["journalctl", "--no-pager", "-u", unit]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextmanager
def units(**files: str) -> Iterator[None]:
    """Have units, ``web_socket`` the file web.socket; they are stopped and removed at the end."""
    names = {name.replace("_", "."): text for name, text in files.items()}
    for name, text in names.items():
        (UNITS / name).write_text(text)
    systemctl("daemon-reload")
    try:
        yield
    except BaseException:
        for name in names:
            print(journal_of(name))
        raise
    finally:
        for name in names:
            systemctl("kill", "-s", "KILL", name, check=False)
            systemctl("stop", name, check=False)
            systemctl("clean", "--what=fdstore", name, check=False)
            systemctl("reset-failed", name, check=False)
            (UNITS / name).unlink()
        systemctl("daemon-reload")


class Client:
    """A client of a service that answers lines."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(path))
        self.file = self.sock.makefile("rb")

    def ask(self, line: bytes = b"?") -> bytes:
        """Send a line, and return the answer."""
        self.sock.sendall(line + b"\n")
        return self.file.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.sock.close()


def asked(path: Path) -> bytes:
    """Return the answer that a new client gets."""
    with Client(path) as client:
        return client.ask()


################################################################
# trio-unixconn serve
################################################################

GREETING: Final = """
async def greet(stream, job):
    await stream.receive_some(100)
    await stream.send_all(b"@TEXT@\\n")
"""
WEB_SOCKET: Final = """
[Socket]
ListenStream=@DIR@/web
FileDescriptorName=web
"""
WEB_SERVICE: Final = f"""
[Service]
Type=notify-reload
WorkingDirectory=@DIR@
Environment={ENVIRONMENT}
ExecStart={PYTHON} -m trio_unixconn serve greeting:greet --workers 1 --bind systemd:web
WatchdogSec=60
KillMode=mixed
TimeoutStartSec=120
"""


def test_serve_socket_unit_and_reload(tmp_path: Path) -> None:
    """The server starts at the first client; a reload waits for new workers, or keeps the old."""
    module, path = tmp_path / "greeting.py", tmp_path / "web"
    module.write_text(GREETING.replace("@TEXT@", "one"))
    files = {"web_socket": WEB_SOCKET, "web_service": WEB_SERVICE}
    with units(**{name: text.replace("@DIR@", str(tmp_path)) for name, text in files.items()}):
        systemctl("start", "web.socket")
        assert show("web.service", "ActiveState") == "inactive"
        assert asked(path) == b"one"
        until(lambda: show("web.service", "ActiveState") == "active")
        pid = show("web.service", "MainPID")
        assert "1 worker" in show("web.service", "StatusText")

        module.write_text(GREETING.replace("@TEXT@", "two, and longer"))
        systemctl("reload", "web.service")
        # It has waited: the new worker serves.
        assert asked(path) == b"two, and longer"
        assert show("web.service", "MainPID") == pid

        module.write_text("this is not Python, whatever it is\n")
        systemctl("reload", "web.service")
        assert show("web.service", "ActiveState") == "active"
        assert "fail" in show("web.service", "StatusText")
        assert asked(path) == b"two, and longer"

        systemctl("stop", "web.socket", "web.service")
        assert show("web.service", "Result") == "success"


################################################################
# trio_unixconn.systemd
################################################################

SERVICE: Final = f"""
[Service]
Type=notify
NotifyAccess=all
Environment={ENVIRONMENT}
ExecStart={PYTHON} @DIR@/service.py
FileDescriptorStoreMax=16
Restart=always
RestartSec=0
@MORE@
"""
# A client's lines are counted; the count and the client are stored.
STORE: Final = """
import os, trio
from trio_unixconn import UnixConnection, open_unix_listener
from trio_unixconn.systemd import ServiceManager, inherited_fds, inherited_listeners

async def main():
    manager = ServiceManager.from_environ()
    found = inherited_listeners("web")
    listener = found["web"][0] if found else await open_unix_listener("@DIR@/web")
    clients = [UnixConnection.from_fd(fd) for fd in inherited_fds("client").get("client", [])]
    states = inherited_fds("state").get("state")
    if states is None:
        states = [os.memfd_create("state")]
        os.pwrite(states[0], b"0", 0)
        await manager.store(states, "state")
        await manager.store([listener.socket], "web")

    async def serve(client):
        while await client.receive_some():
            count = int(os.pread(states[0], 10, 0)) + 1
            os.pwrite(states[0], b"%d" % count, 0)
            await client.send_all(b"%d %d\\n" % (count, os.getpid()))

    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(serve, client)
        await manager.ready(f"{len(clients)} clients")
        while True:
            client = await listener.accept()
            await manager.store([client.socket], "client")
            await manager.barrier()
            nursery.start_soon(serve, client)

trio.run(main)
"""


def test_store_survives_sigkill(tmp_path: Path) -> None:
    """A client of a service that is killed notices nothing if its connection is stored."""
    (tmp_path / "service.py").write_text(STORE.replace("@DIR@", str(tmp_path)))
    service = SERVICE.replace("@DIR@", str(tmp_path)).replace("@MORE@", "")
    with units(store_service=service):
        systemctl("start", "store.service")
        with Client(tmp_path / "web") as client:
            first, pid = client.ask().split()
            assert (first, int(pid)) == (b"1", int(show("store.service", "MainPID")))
            # The state, the listener and the client.
            assert show("store.service", "NFileDescriptorStore") == "3"
            os.kill(int(pid), signal.SIGKILL)
            # It waits in the connection until the next process has it.
            second, later = client.ask().split()
            assert second == b"2"
            assert later != pid
            until(lambda: show("store.service", "StatusText") == "1 clients")
        # systemd drops what was hung up.
        until(lambda: show("store.service", "NFileDescriptorStore") == "2")
        with Client(tmp_path / "web") as client:
            assert client.ask().split()[0] == b"3"
        assert show("store.service", "NRestarts") == "1"


SICK: Final = """
import os, trio
from trio_unixconn.systemd import ServiceManager

async def is_healthy():
    await trio.lowlevel.checkpoint()
    return not os.path.exists("@DIR@/sick")

async def main():
    manager = ServiceManager.from_environ()
    async with manager.watchdog(is_healthy):
        await manager.ready()
        await trio.sleep_forever()

trio.run(main)
"""


def test_watchdog(tmp_path: Path) -> None:
    """A service that reports no heartbeat because it is not healthy is restarted."""
    (tmp_path / "service.py").write_text(SICK.replace("@DIR@", str(tmp_path)))
    more = "WatchdogSec=4\nWatchdogSignal=KILL"
    service = SERVICE.replace("@DIR@", str(tmp_path)).replace("@MORE@", more)
    with units(sick_service=service):
        systemctl("start", "sick.service")
        pid = show("sick.service", "MainPID")
        # Heartbeats arrive: it is alive after more than the timeout.
        time.sleep(10)
        assert (show("sick.service", "MainPID"), show("sick.service", "NRestarts")) == (pid, "0")
        (tmp_path / "sick").touch()
        until(lambda: show("sick.service", "MainPID") not in (pid, "0"))
        (tmp_path / "sick").unlink()
        assert show("sick.service", "NRestarts") != "0"
        journal = journal_of("sick.service")
        assert "Watchdog timeout" in journal
        assert "the health check returned False" in journal


HEIR: Final = """
import os, subprocess, sys, trio
from trio_unixconn.systemd import ServiceManager

async def main():
    manager = ServiceManager.from_environ()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    await manager.ready("it was started")
    pidfd = os.pidfd_open(child.pid)
    await manager.reloading("the child takes over")
    await manager.main_pid(pidfd=pidfd)
    await manager.ready(f"main process {child.pid}")
    await manager.barrier()

trio.run(main)
os._exit(0)
"""


def test_main_pid(tmp_path: Path) -> None:
    """Another process becomes the main one, and the unit is active when the first has exited."""
    (tmp_path / "service.py").write_text(HEIR)
    service = SERVICE.replace("@DIR@", str(tmp_path)).replace("@MORE@", "")
    with units(heir_service=service):
        systemctl("start", "heir.service")
        until(lambda: show("heir.service", "StatusText").startswith("main process"))
        child = show("heir.service", "StatusText").split()[-1]
        assert show("heir.service", "MainPID") == child
        (first,) = {show("heir.service", "ExecMainPID")}
        assert first == child
        assert show("heir.service", "ActiveState") == "active"
        assert show("heir.service", "NRestarts") == "0"
