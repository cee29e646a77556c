"""Templates of a pool: processes that have imported what workers need, and fork them.

A worker that a template has forked is its child, not one of the pool's process. The kernel could
make it a child of the pool only with CLONE_PARENT, which neither Python nor the C library offers
with what they do at a fork, or if the pool's process adopted all orphans below it
(PR_SET_CHILD_SUBREAPER), which would concern all programs that it starts. So the template gives
the pool a pidfd of each worker: that says when the worker has ended, and kills no other process.
The template reaps the worker when the pool asks for that, and tells the exit status.

A template is a way to start workers faster, never a reason not to start one. If it cannot fork, the
pool logs that, and starts a fresh interpreter.

A fork has what its template has inherited. So a template is used only while that is what a new
process would inherit (``_inherited``), while the files of its modules are as it has read them, and
until ``renew`` is called. Then it stays until all its workers have ended, and gets no more.

Invariant: after ``aclose`` no template is left.

Sources: pidfd_send_signal(2), clone(2) (CLONE_PARENT), PR_SET_CHILD_SUBREAPER(2const)
"""

from __future__ import annotations

import errno
import logging
import math
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import attrs
import trio

from .._connection import close_now, receive_with_fds
from .._frames import FrameDecoder, FrameError, encode_frame
from .._owner import DescriptorOwner
from ..errors import UnixConnectionError
from . import _process, _protocol
from ._protocol import UNKNOWN_STATUS
from ._worker_config import import_path

if TYPE_CHECKING:
    from .._frames import Frame
    from ._process import WorkerProcess
    from ._worker_config import WorkerConfig

logger: Final = logging.getLogger("trio_unixconn.pool")

_CHUNK_SIZE: Final = 65536
#: The time in seconds in which a template must answer, and in which it must exit.
ANSWER_TIMEOUT: Final = 10.0
#: The time in seconds after which another template is started when one could not.
RETRY_DELAY: Final = 10.0
# The process of a template has ended, or does not say what a template says.
_LOST: Final = (OSError, UnixConnectionError, FrameError)
# The lines of /proc/self/status that say what a new process inherits.
_STATUS: Final = (
    *(b"Umask", b"Uid", b"Gid", b"Groups", b"CapInh", b"CapPrm", b"CapEff", b"CapBnd", b"CapAmb"),
    *(b"NoNewPrivs", b"Seccomp", b"Cpus_allowed", b"Mems_allowed"),
)


def _inherited(config: WorkerConfig) -> tuple[object, ...]:
    """Return what a worker inherits that is started now, as far as it can be compared."""
    status: list[bytes] = []
    texts: list[bytes] = []
    # /proc may be missing.
    with suppress(OSError), open("/proc/self/status", "rb") as file:
        status = [line for line in file if line.partition(b":")[0] in _STATUS]
    for name in ("limits", "cgroup", "oom_score_adj"):
        with suppress(OSError), open(f"/proc/self/{name}", "rb") as file:
            texts.append(file.read())
    places: list[tuple[int, int] | None] = []
    for path in (".", "/"):
        try:
            found = os.stat(path)
        except OSError:
            # The directory was deleted, or cannot be read.
            places.append(None)
        else:
            places.append((found.st_dev, found.st_ino))
    return (
        _process.worker_environment(config),
        import_path(sys.path),
        os.getpriority(os.PRIO_PROCESS, 0),
        status,
        texts,
        places,
    )


class CannotForkError(Exception):
    """A template cannot fork a worker; the text says why."""


class _ForkedChild:
    """A worker that a template has forked."""

    def __init__(self, pid: int, pidfd: int, template: Template) -> None:
        self.pid: int = pid
        self.pidfd: int = pidfd
        self.returncode: int | None = None
        self._template = template

    @property
    def is_reserved(self) -> bool:
        if self.returncode is not None:
            return False
        # What was preloaded can have reaped it; or init, if its template has died.
        try:
            signal.pidfd_send_signal(self.pidfd, 0)
        except OSError as exc:
            return exc.errno == errno.EPERM
        return True

    def kill(self) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def reap(self) -> None:
        self.returncode = await self._template.reap(self.pid)


class Template(DescriptorOwner):
    """A template.

    Attributes:
      inherited: what it has inherited.
      is_usable: whether it answers.
      is_retired: whether it forks no more workers.
      ended: set when it has ended.
    """

    def __init__(self, process: WorkerProcess, inherited: tuple[object, ...]) -> None:
        self.process: WorkerProcess = process
        self.inherited: tuple[object, ...] = inherited
        self.is_usable: bool = True
        self.is_retired: bool = False
        self._children = 0
        self._lock = trio.Lock()
        self._is_closing = False
        self.ended: trio.Event = trio.Event()

    def __repr__(self) -> str:
        return f"template (pid {self.process.pid})"

    async def wait_ready(self) -> str | None:
        """Wait until it has imported everything; return why it cannot be used, or None."""
        try:
            frame = await self._receive()
        except _LOST as exc:
            return f"it does not answer: {exc}"
        if frame is None:
            return "it has exited"
        if frame.kind == _protocol.FAILED:
            return frame.body.decode(errors="replace").rstrip()
        if frame.kind != _protocol.READY:
            return f"protocol error: frame of kind {frame.kind}"
        return _protocol.check_ready(frame.body)

    async def fork(self, fds: list[int]) -> _ForkedChild:
        """Have it fork a worker.

        Raises:
          CannotForkError: it cannot.
        """
        frame = await self._ask(encode_frame(_protocol.FORK, carries_fds=True), fds)
        if frame is None:
            raise CannotForkError("it does not answer")
        if frame.kind != _protocol.FORKED:
            raise CannotForkError(frame.body.decode(errors="replace").rstrip())
        if not frame.fds:
            # The kernel had no number free, and dropped it. The worker finds its connection closed.
            raise CannotForkError("no file descriptor is free for the pidfd of a worker")
        self._children += 1
        return _ForkedChild(_protocol.unpack_pid(frame.body), frame.fds[0], self)

    async def reap(self, pid: int) -> int:
        """Have it reap a worker that has ended; return its status."""
        frame = await self._ask(_protocol.pack_pid(_protocol.REAP, pid))
        self._children -= 1
        if self.is_retired:
            await self.close_if_unused()
        if frame is None or frame.kind != _protocol.REAPED:
            return UNKNOWN_STATUS
        return _protocol.unpack_pid(frame.body)

    async def _ask(self, message: bytes, fds: Sequence[int] = ()) -> Frame | None:
        """Send a request, and return the answer; None if there is none, and then never again."""
        frame: Frame | None = None
        # A cancellation must not leave open whether there is another process.
        with trio.CancelScope(shield=True):
            async with self._lock:
                if not self.is_usable:
                    return None
                with trio.move_on_after(ANSWER_TIMEOUT):
                    try:
                        await self.process.conn.send_message(message, fds=fds)
                        frame = await self._receive()
                    except _LOST as exc:
                        logger.debug("%r: %s", self, exc)
                if frame is None:
                    self.is_usable, self.is_retired = False, True
                    logger.warning("%r does not answer, killing it; its workers are replaced", self)
                    # The kernel sends its workers SIGTERM.
                    self.process.kill()
        return frame

    async def _receive(self) -> Frame | None:
        decoder = FrameDecoder()
        try:
            while True:
                data, fds = await receive_with_fds(self.process.conn, _CHUNK_SIZE)
                if not data:
                    return None
                frames = decoder.feed(data, fds)
                if frames:
                    return frames[0]
        finally:
            # It may have died, or stopped, within a frame.
            decoder.close()

    async def close_if_unused(self) -> None:
        """End it, if it has no workers."""
        if not self._children:
            await self.aclose()

    async def aclose(self) -> None:
        """End it, and wait for that."""
        with trio.CancelScope(shield=True):
            if self._is_closing:
                # Another task does it.
                await self.ended.wait()
                return
            self._is_closing = True
            self.is_usable, self.is_retired = False, True
            close_now(self.process.conn)
            try:
                with trio.move_on_after(ANSWER_TIMEOUT):
                    await self.process.wait()
                self.process.kill()
                await self.process.wait()
                self.process.close()
            finally:
                self.ended.set()


class Preloader(DescriptorOwner):
    """The templates of a pool.

    Args:
      start_timeout: the time in seconds in which a template must be ready.
    """

    def __init__(self, start_timeout: float) -> None:
        self._start_timeout = start_timeout
        self._templates: list[Template] = []
        self._lock = trio.Lock()
        # When a template may be started again.
        self._retry_at = -math.inf

    async def renew(self) -> None:
        """Fork no more workers from the present template."""
        # One that is being started may have imported old files: it is retired when it is ready.
        async with self._lock:
            self._retry_at = -math.inf
            for template in list(self._templates):
                template.is_retired = True
                await template.close_if_unused()

    async def fork(self, config: WorkerConfig) -> WorkerProcess | None:
        """Fork a worker; return None if a fresh interpreter must do.

        Raises:
          OSError: no file descriptor or memory is left.
        """
        async with self._lock:
            failure = ""
            # The first one may be out of date.
            for _ in range(2):
                template = await self._get(config)
                if template is None:
                    return None
                try:
                    return await _process.fork(config, template.fork)
                except CannotForkError as exc:
                    failure = str(exc)
                logger.info("%r forks no more workers: %s", template, failure)
                template.is_retired = True
                await template.close_if_unused()
            self._give_up(failure)
            return None

    def _give_up(self, why: str) -> None:
        self._retry_at = trio.current_time() + RETRY_DELAY
        logger.warning("preload: workers are started without a template, because %s", why)

    async def _get(self, config: WorkerConfig) -> Template | None:
        """Return the template that workers are forked from now; None if there is none."""
        inherited = _inherited(config)
        self._templates = [each for each in self._templates if not each.ended.is_set()]
        for template in list(self._templates):
            if not template.is_retired:
                if template.is_usable and template.inherited == inherited:
                    return template
                template.is_retired = True
                await template.close_if_unused()
        if trio.current_time() < self._retry_at:
            return None
        process = _process.start(attrs.evolve(config, setup_data=b"", is_template=True))
        template = Template(process, inherited)
        self._templates.append(template)
        failure: str | None = f"it was not ready after {self._start_timeout:g} s"
        try:
            with trio.move_on_after(self._start_timeout):
                failure = await template.wait_ready()
        except BaseException:
            process.kill()
            await template.aclose()
            raise
        if failure is None:
            logger.info("%r is ready to fork workers", template)
            return template
        process.kill()
        await template.aclose()
        self._give_up(failure)
        return None

    async def aclose(self) -> None:
        """End all templates."""
        while self._templates:
            await self._templates.pop().aclose()
