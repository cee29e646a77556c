"""Services under the real systemd: what it does with what the library tells it.

pytest runs this file in a guest of which systemd is the first process (``nox -s guest-systemd``),
and nowhere else. Everything is slow there: a Python takes seconds to start.

The unit files, and the programs that they start, are those of docs/how-to/run-under-systemd.md,
unchanged. What is not in that page is written here.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.docs.pages import blocks

if TYPE_CHECKING:
    from typing_extensions import Self

if Path("/proc/1/comm").read_text().strip() != "systemd":
    pytest.skip("systemd is not the first process", allow_module_level=True)

PAGE: Final = Path(__file__).parents[2] / "docs/how-to/run-under-systemd.md"
UNITS: Final = Path("/run/systemd/system")
# Seconds. Only a hang takes that long.
PATIENCE: Final = 180.0
# Where the guest has the package and what it needs.
PACKAGES: Final = "/srv/checkout\n/srv/site\n"
SCRIPT: Final = """#!{python}
import sys
from trio_unixconn.__main__ import main
sys.exit(main())
"""


def files_of_page() -> dict[str, list[str]]:
    """Return the unit files and the programs of the page, by their names, in their order."""
    found: dict[str, list[str]] = {}
    for block in blocks(PAGE.read_text()):
        first = block.code.partition("\n")[0]
        if first.startswith("# ") and first.endswith((".service", ".socket", ".py")):
            found.setdefault(first.removeprefix("# "), []).append(block.code)
    return found


def install(name: str) -> Path:
    """Make the directory of a service, with a virtual environment that has the package."""
    directory = Path("/srv", name)
    environment = directory / ".venv"
    if not environment.exists():
        venv.EnvBuilder(symlinks=True).create(environment)
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        (environment / "lib" / version / "site-packages/guest.pth").write_text(PACKAGES)
        script = environment / "bin/trio-unixconn"
        script.write_text(SCRIPT.format(python=environment / "bin/python"))
        script.chmod(0o755)
    return directory


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
        time.sleep(0.2)


def wait_heartbeat(unit: str) -> None:
    """Wait for the next heartbeat of a service."""
    last = show(unit, "WatchdogTimestampMonotonic")
    until(lambda: show(unit, "WatchdogTimestampMonotonic") != last)


def journal_of(unit: str) -> str:
    """Return the log of a unit."""
    command = ["journalctl", "--no-pager", "-o", "short-precise", "-u", unit]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextmanager
def units(files: dict[str, str]) -> Iterator[None]:
    """Have units, which are stopped and removed at the end."""
    for name, text in files.items():
        (UNITS / name).write_text(text)
    systemctl("daemon-reload")
    try:
        yield
    except BaseException:
        for name in files:
            print(journal_of(name))
        raise
    finally:
        for name in files:
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


class Load:
    """Clients at a steady rate, each with a connection, in threads: an open loop.

    Args:
      pace: seconds between the begin of two clients. 0: three clients at a time, each followed by
        the next one without a pause.

    Attributes:
      answers: when each client began, and its answer.
    """

    def __init__(self, path: Path, pace: float) -> None:
        self.path = path
        self.answers: list[tuple[float, bytes]] = []
        self.errors: list[str] = []
        self._pace = pace
        self._ends = threading.Event()
        self._threads = [
            threading.Thread(target=self._begin_clients if pace else self._run_clients)
            for _ in range(1 if pace else 3)
        ]

    def _begin_clients(self) -> None:
        while not self._ends.wait(self._pace):
            client = threading.Thread(target=self._run_client)
            client.start()
            self._threads.append(client)

    def _run_clients(self) -> None:
        while not self._ends.is_set():
            self._run_client()

    def _run_client(self) -> None:
        began = time.monotonic()
        try:
            self.answers.append((began, asked(self.path)))
        except OSError as exc:
            self.errors.append(repr(exc))

    def answers_since(self, moment: float) -> set[bytes]:
        """Return the answers of clients that began after a moment; there are some."""
        until(lambda: any(began > moment for began, _ in list(self.answers)))
        return {answer for began, answer in list(self.answers) if began > moment}

    def __enter__(self) -> Self:
        for thread in self._threads[:]:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        # The first one may start others until it has ended.
        for thread in self._threads:
            thread.join()


################################################################
# A program that uses trio_unixconn.systemd
################################################################


def test_page_service() -> None:
    """The page's service: started by its socket, reloaded, with heartbeats, drained."""
    files = files_of_page()
    directory = install("service")
    (directory / "service.py").write_text(files["service.py"][0])
    path = Path("/run/service.sock")
    with units({name: files[name][0] for name in ("service.socket", "service.service")}):
        systemctl("start", "service.socket")
        assert show("service.service", "ActiveState") == "inactive"
        with Client(path) as client:
            assert client.file.readline() == b"hello\n"
        until(lambda: show("service.service", "StatusText") == "serving")
        # It has found the socket by its name.
        assert not (directory / "web.sock").exists()
        pid = show("service.service", "MainPID")
        # It waits for the two messages, and would fail after TimeoutStartSec= without them.
        systemctl("reload", "service.service")
        assert show("service.service", "ReloadResult") == "success"
        assert show("service.service", "MainPID") == pid
        wait_heartbeat("service.service")
        systemctl("stop", "service.socket", "service.service")
        assert show("service.service", "Result") == "success"


def test_page_store_survives_sigkill() -> None:
    """A client of a service that is killed notices nothing if its connection is stored."""
    files = files_of_page()
    directory = install("counter")
    (directory / "counter.py").write_text(files["counter.py"][0])
    path, unit = Path("/run/counter.sock"), "counter.service"
    with units({unit: files[unit][0]}):
        systemctl("start", unit)
        with Client(path) as client:
            first, pid = client.ask().split()
            assert (first, int(pid)) == (b"1", int(show(unit, "MainPID")))
            # The state, the listener and the client.
            assert show(unit, "NFileDescriptorStore") == "3"
            os.kill(int(pid), signal.SIGKILL)
            # It waits in the connection until the next process has it.
            second, later = client.ask().split()
            assert second == b"2"
            assert later != pid
            until(lambda: show(unit, "StatusText") == "1 clients")
        # systemd drops what was hung up.
        until(lambda: show(unit, "NFileDescriptorStore") == "2")
        assert asked(path).split()[0] == b"3"
        assert show(unit, "NRestarts") == "1"


################################################################
# trio-unixconn serve
################################################################

GREETING: Final = """
async def greet(stream, job):
    await stream.receive_some(100)
    await stream.send_all(b"@TEXT@\\n")
"""


def greeting_units(*, upgrades: bool) -> dict[str, str]:
    """Return the page's units for ``trio-unixconn serve``; they run as the user ``greeting``."""
    files = files_of_page()
    restarted, upgraded = files["greeting.service"]
    assert "ExecReload=" in upgraded
    if subprocess.run(["id", "greeting"], capture_output=True, check=False).returncode:
        subprocess.run(["useradd", "--system", "greeting"], check=True)
    return {
        "greeting.socket": files["greeting.socket"][0],
        "greeting.service": upgraded if upgrades else restarted,
    }


def test_page_serve_restart() -> None:
    """The server starts at the first client; a reload waits for new workers, or keeps the old."""
    module, path = install("greeting") / "greeting.py", Path("/run/greeting.sock")
    module.write_text(GREETING.replace("@TEXT@", "one"))
    unit = "greeting.service"
    with units(greeting_units(upgrades=False)):
        systemctl("start", "greeting.socket")
        assert show(unit, "ActiveState") == "inactive"
        assert asked(path) == b"one"
        until(lambda: show(unit, "ActiveState") == "active")
        pid = show(unit, "MainPID")
        assert "2 workers" in show(unit, "StatusText")

        module.write_text(GREETING.replace("@TEXT@", "two, and longer"))
        systemctl("reload", unit)
        # It has waited: the new workers serve.
        assert asked(path) == b"two, and longer"
        assert show(unit, "MainPID") == pid

        module.write_text("this is not Python, whatever it is\n")
        systemctl("reload", unit)
        assert show(unit, "ActiveState") == "active"
        assert "fail" in show(unit, "StatusText")
        assert asked(path) == b"two, and longer"
        wait_heartbeat(unit)

        systemctl("stop", "greeting.socket", unit)
        assert show(unit, "Result") == "success"


def test_page_serve_upgrade() -> None:
    """A reload upgrades under load and says whether it did; no client notices any of it."""
    module, path = install("greeting") / "greeting.py", Path("/run/greeting.sock")
    module.write_text(GREETING.replace("@TEXT@", "one"))
    unit = "greeting.service"
    with units(greeting_units(upgrades=True)):
        systemctl("start", "greeting.socket", unit)
        first = show(unit, "MainPID")
        with Load(path, 0.2) as load:
            assert load.answers_since(0) == {b"one"}

            module.write_text(GREETING.replace("@TEXT@", "two, and longer"))
            began = time.monotonic()
            systemctl("reload", unit)
            print(f"an upgrade took {time.monotonic() - began:.1f} s")
            assert load.answers_since(time.monotonic()) == {b"two, and longer"}
            second = show(unit, "MainPID")
            assert second not in (first, "0")
            assert show(unit, "ReloadResult") == "success"
            # The first generation drains and exits, which does not end the service.
            until(lambda: not Path(f"/proc/{first}").exists())
            assert show(unit, "ActiveState") == "active"
            wait_heartbeat(unit)

            module.write_text("raise ValueError('this version does not start')\n")
            failed = systemctl("reload", unit, check=False)
            assert failed.returncode == 1
            assert show(unit, "ReloadResult") == "exit-code"
            assert "this version does not start" in journal_of(unit)
            assert "the last upgrade failed" in show(unit, "StatusText")
            assert show(unit, "ActiveState") == "active"
            assert show(unit, "MainPID") == second
            assert load.answers_since(time.monotonic()) == {b"two, and longer"}
            wait_heartbeat(unit)
        assert load.errors == []
        assert {answer for _, answer in load.answers} == {b"one", b"two, and longer"}

        module.write_text(GREETING.replace("@TEXT@", "three"))
        with Load(path, 0) as load:
            load.answers_since(0)
            began = time.monotonic()
            systemctl("reload", unit)
            print(f"an upgrade under clients without a pause took {time.monotonic() - began:.1f} s")
            assert load.answers_since(time.monotonic()) == {b"three"}
        assert load.errors == []
        third = show(unit, "MainPID")
        assert third not in (first, second, "0")

        # Not by an upgrade: what waits at the socket unit is served by the next process.
        os.kill(int(third), signal.SIGKILL)
        until(lambda: show(unit, "MainPID") not in (third, "0"))
        assert asked(path) == b"three"
        assert show(unit, "NRestarts") == "1"
        systemctl("stop", "greeting.socket", unit)
        assert show(unit, "Result") == "success"


################################################################
# What no page shows
################################################################

SERVICE: Final = """
[Service]
Type=notify
NotifyAccess=all
ExecStart=/srv/service/.venv/bin/python @DIR@/service.py
Restart=always
RestartSec=0
@MORE@
"""
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
    install("service")
    (tmp_path / "service.py").write_text(SICK.replace("@DIR@", str(tmp_path)))
    more = "WatchdogSec=4\nWatchdogSignal=KILL"
    service = SERVICE.replace("@DIR@", str(tmp_path)).replace("@MORE@", more)
    with units({"sick.service": service}):
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
    await manager.notify({"MAINPID": child.pid, "MAINPIDFDID": 1})
    await manager.barrier()
    await manager.status(f"not process {child.pid}")
    while not os.path.exists("@DIR@/checked"):
        await trio.sleep(0.1)
    await manager.main_pid(pidfd=pidfd)
    await manager.ready(f"main process {child.pid}")
    await manager.barrier()

trio.run(main)
os._exit(0)
"""


def test_main_pid(tmp_path: Path) -> None:
    """Another process becomes the main one, and the unit is active when the first has exited.

    A pid whose MAINPIDFDID is that of another process is ignored.
    """
    install("service")
    (tmp_path / "service.py").write_text(HEIR.replace("@DIR@", str(tmp_path)))
    service = SERVICE.replace("@DIR@", str(tmp_path)).replace("@MORE@", "")
    with units({"heir.service": service}):
        systemctl("start", "heir.service")
        until(lambda: show("heir.service", "StatusText").startswith("not process"))
        child = show("heir.service", "StatusText").split()[-1]
        assert show("heir.service", "MainPID") not in (child, "0")
        (tmp_path / "checked").touch()
        until(lambda: show("heir.service", "StatusText").startswith("main process"))
        assert show("heir.service", "MainPID") == show("heir.service", "ExecMainPID") == child
        assert show("heir.service", "ActiveState") == "active"
        assert show("heir.service", "NRestarts") == "0"


SLOW: Final = """
import signal, trio
from trio_unixconn.systemd import ServiceManager

async def work(manager):
    for _ in range(8):
        await manager.extend_timeout(6)
        await trio.sleep(2)

async def main():
    manager = ServiceManager.from_environ()
    with trio.open_signal_receiver(signal.SIGHUP) as signals:
        await work(manager)
        await manager.ready()
        async for _ in signals:
            await manager.reloading()
            await work(manager)
            await manager.ready("reloaded")

trio.run(main)
"""


def test_extend_timeout(tmp_path: Path) -> None:
    """A start and a reload may take longer than TimeoutStartSec= if the service asks for that."""
    install("service")
    (tmp_path / "service.py").write_text(SLOW)
    service = SERVICE.replace("@DIR@", str(tmp_path)).replace("@MORE@", "TimeoutStartSec=12")
    service = service.replace("Type=notify", "Type=notify-reload")
    with units({"slow.service": service}):
        systemctl("start", "slow.service")
        systemctl("reload", "slow.service")
        assert show("slow.service", "StatusText") == "reloaded"
        assert show("slow.service", "ReloadResult") == "success"
        assert show("slow.service", "NRestarts") == "0"
