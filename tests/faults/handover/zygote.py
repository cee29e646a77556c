"""A process that has imported everything and forks generations, so that a start takes milliseconds.

The faults kill thousands of processes; most of the time of each would be spent importing. A
generation that is forked here is as any other: it has the same end of the same socketpair, and the
same standard error. Only its parent is another one.

Invariant: a process that was forked stays a zombie, so that its pid is not another process's, until
the one that has asked for it closes its connection.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import types
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tests._helpers.processes import has_ended
from trio_unixconn.handover import _spawn

from . import target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: The environment variable that names its path.
ZYGOTE = "TRIO_UNIXCONN_ZYGOTE"
# Beyond the numbers that a generation uses when it starts.
_HIGH = 1000
_MAX_REQUEST = 65536


class ForkedProcess:
    """As subprocess.Popen, as far as a generation uses it."""

    _pidfd = -1

    def __init__(
        self,
        command: Sequence[str],
        *,
        stderr: int,
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
        **_: object,
    ) -> None:
        self._conn = socket.socket(socket.AF_UNIX)
        self._conn.connect(os.environ[ZYGOTE])
        request = {
            "config": command[-1],
            "numbers": list(pass_fds),
            "variable": (env or {}).get(_spawn.VARIABLE),
        }
        socket.send_fds(self._conn, [json.dumps(request).encode()], [stderr, *pass_fds])
        self.pid = int(self._conn.recv(100))
        self.returncode: int | None = None
        self._pidfd = os.pidfd_open(self.pid)

    def poll(self) -> int | None:
        if self.returncode is None and has_ended(self._pidfd):
            self.returncode = -signal.SIGKILL
        return self.returncode

    def wait(self) -> int:
        select.select([self._pidfd], [], [])
        self.returncode = -signal.SIGKILL
        return self.returncode

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd != -1:
            os.close(pidfd)
            self._conn.close()

    def __del__(self) -> None:
        self.close()


def use_zygote() -> None:
    """Have generations of this process started by the zygote, if there is one."""
    if ZYGOTE in os.environ:
        module: Any = _spawn
        module.subprocess = types.SimpleNamespace(Popen=ForkedProcess)


class Zygote:
    """Forks generations until its standard input ends."""

    def __init__(self, path: str) -> None:
        os.environ[ZYGOTE] = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(64)
        self._poll = select.poll()
        self._poll.register(self._listener, select.POLLIN)
        self._poll.register(0, select.POLLIN)
        # By the file descriptor of the connection of the process that has asked.
        self._children: dict[int, tuple[socket.socket, int]] = {}
        self._forgotten: set[int] = set()

    def run(self) -> None:
        while True:
            for fd, _ in self._poll.poll(50 if self._forgotten else None):
                if fd == 0:
                    self._end()
                    return
                if fd == self._listener.fileno():
                    self._fork()
                else:
                    self._poll.unregister(fd)
                    conn, pid = self._children.pop(fd)
                    conn.close()
                    self._forgotten.add(pid)
            for pid in list(self._forgotten):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    self._forgotten.discard(pid)

    def _end(self) -> None:
        for pid in [*self._forgotten, *(pid for _, pid in self._children.values())]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _fork(self) -> None:
        conn, _ = self._listener.accept()
        data, fds, _, _ = socket.recv_fds(conn, _MAX_REQUEST, 16)
        pid = os.fork()
        if not pid:
            self._be_generation(json.loads(data), fds)
        for fd in fds:
            os.close(fd)
        self._poll.register(conn, select.POLLIN)
        self._children[conn.fileno()] = conn, pid
        conn.sendall(str(pid).encode())

    def _be_generation(self, request: dict[str, Any], fds: list[int]) -> None:
        import fcntl

        status = 1
        try:
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH) for fd in fds]
            os.closerange(3, _HIGH)
            for fd, number in zip(high, [2, *request["numbers"]], strict=True):
                os.dup2(fd, number)
                os.close(fd)
            os.environ.pop(_spawn.VARIABLE, None)
            if request["variable"] is not None:
                os.environ[_spawn.VARIABLE] = request["variable"]
            target.main(request["config"])
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)


def main() -> None:
    """Fork generations for others: ``python -m tests.faults.handover.zygote PATH``."""
    use_path = sys.argv[1]
    zygote = Zygote(use_path)
    use_zygote()
    print("ready", flush=True)
    zygote.run()


if __name__ == "__main__":
    main()
