"""A service manager for tests: the receiving side of sd_notify(3).

Invariant: what a process may not say, or says in a wrong way, changes nothing here and is kept in
``rejected``. Every file descriptor that arrives is stored or closed.

Sources: sd_notify(3), sd_watchdog_enabled(3), systemd.service(5) (``NotifyAccess=``)
"""

from __future__ import annotations

import os
import select
from collections.abc import AsyncGenerator, Collection
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import attrs
import trio

from .. import _closing
from .._datagram import UnixDatagramSocket, open_unix_datagram
from .._fdtypes import DescriptorKind, identify_file, kind_of
from .._owner import DescriptorOwner
from .._trio_task import checkpoint_in_task
from ..errors import UnixConnectionError
from ._paths import NAME, short_directory

if TYPE_CHECKING:
    from .._credentials import Credentials
    from .._datagram import Datagram

# As systemd: PIPE_BUF, and the name of file descriptors that were stored without one.
_MAX_MESSAGE: Final = 4096
_MAX_NAME: Final = 255
_UNNAMED: Final = "stored"
# Others may ask a file server when they are polled.
_POLLED: Final = (DescriptorKind.SOCKET, DescriptorKind.PIPE)


@attrs.frozen
class Notification:
    """A message that a :class:`FakeServiceManager` has received.

    Attributes:
      assignments: what it says, such as ``{"READY": "1", "STATUS": "serving"}``.
      credentials: the sender's, checked by the kernel; None if the message has none.
      fds: how many file descriptors it had.
      problem: why it was rejected; "" if it was not.
    """

    assignments: dict[str, str]
    credentials: Credentials | None = None
    fds: int = 0
    problem: str = ""


@attrs.define
class _Stored:
    fd: int
    poll: bool
    identity: tuple[int | str, ...] | None


@attrs.define(eq=False)
class FakeServiceManager(DescriptorOwner):
    """What :func:`open_service_manager` opens.

    Attributes:
      environ: the variables that a service gets: give them to a process, or to
        ``ServiceManager.from_environ(dict(manager.environ))``.
      received: the messages that were accepted, in order.
      rejected: those that were not.
      state: ``starting``, ``ready``, ``reloading`` or ``stopping``, which is final.
      status: the last STATUS.
      main_pid: the last MAINPID, None before.
      heartbeats: how often WATCHDOG=1 has arrived.
    """

    environ: dict[str, str]
    received: list[Notification] = attrs.field(factory=list[Notification])
    rejected: list[Notification] = attrs.field(factory=list[Notification])
    state: str = "starting"
    status: str = ""
    main_pid: int | None = None
    heartbeats: int = 0
    _pids: Collection[int] | None = attrs.field(default=None, alias="pids")
    _stored: dict[str, list[_Stored]] = attrs.field(factory=dict[str, list[_Stored]])
    _next: int = 0
    _changed: trio.Event = attrs.field(factory=trio.Event)

    async def wait_for(self, *assignments: str) -> Notification:
        """Wait for a message with all of these assignments, such as ``"READY=1"``.

        Messages that were received before count, but only those after the one that the last call
        has returned. So several calls, one after the other, also check the order. For a timeout,
        use ``trio.fail_after``.

        Returns:
          The message.
        """
        wanted, position = set(assignments), self._next
        await checkpoint_in_task()
        while True:
            while position < len(self.received):
                message = self.received[position]
                position += 1
                if wanted <= {f"{key}={value}" for key, value in message.assignments.items()}:
                    self._next = position
                    return message
            await self._changed.wait()

    @property
    def stored(self) -> dict[str, list[int]]:
        """The stored file descriptors by name; they stay the manager's.

        A socket or pipe that is hung up or broken is closed and left out, unless it was stored with
        FDPOLL=0.
        """
        for name, held in [*self._stored.items()]:
            for each in [*held]:
                if each.poll and _is_hung_up(each.fd):
                    held.remove(each)
                    _closing.close_fds([each.fd])
            if not held:
                del self._stored[name]
        return {name: [each.fd for each in held] for name, held in self._stored.items()}

    def close(self) -> None:
        """Close the stored file descriptors; leaving :func:`open_service_manager` does it."""
        for held in self._stored.values():
            _closing.close_fds([each.fd for each in held])
        self._stored.clear()

    async def _receive(self, sock: UnixDatagramSocket) -> None:
        while True:
            try:
                datagram = await sock.receive_message(_MAX_MESSAGE)
            except UnixConnectionError as exc:
                self.rejected.append(
                    Notification({}, getattr(exc, "credentials", None), problem=str(exc))
                )
            else:
                async with datagram:
                    self._take(datagram)
            self._changed.set()
            self._changed = trio.Event()

    def _take(self, datagram: Datagram) -> None:
        assignments = dict(
            line.split("=", 1)
            for line in datagram.data.decode(errors="backslashreplace").split("\n")
            if "=" in line
        )
        count = len(datagram.fds)
        problem = self._problem(datagram, assignments)
        message = Notification(assignments, datagram.credentials, count, problem)
        if problem:
            self.rejected.append(message)
            return
        self.received.append(message)
        self.status = assignments.get("STATUS", self.status)
        if assignments.get("MAINPID", "").isdecimal():
            self.main_pid = int(assignments["MAINPID"])
        if assignments.get("WATCHDOG") == "1":
            self.heartbeats += 1
        if self.state != "stopping":
            # If a message has several of them, systemd heeds only this one.
            for key, state in (
                ("STOPPING", "stopping"),
                ("READY", "ready"),
                ("RELOADING", "reloading"),
            ):
                if assignments.get(key) == "1":
                    self.state = state
                    break
        name = assignments.get("FDNAME", "")
        if assignments.get("FDSTOREREMOVE") == "1":
            _closing.close_fds([each.fd for each in self._stored.pop(name, [])])
        elif assignments.get("FDSTORE") == "1":
            name = name if _is_name(name) else _UNNAMED
            for fd in datagram.fds.steal_fds():
                self._store(fd, name, poll=assignments.get("FDPOLL") != "0")

    def _problem(self, datagram: Datagram, assignments: dict[str, str]) -> str:
        sender = datagram.credentials
        if sender is None:
            return "no credentials"
        if self._pids is not None and sender.pid not in self._pids:
            return f"process {sender.pid} may not send notifications"
        if sender.uid not in (0, os.geteuid()):
            return f"user {sender.uid} may not send notifications"
        if not assignments or b"\0" in datagram.data:
            return "not a list of assignments"
        if "BARRIER" in assignments and (len(assignments) > 1 or len(datagram.fds) != 1):
            return "BARRIER=1 must be alone, with one file descriptor"
        return ""

    def _store(self, fd: int, name: str, *, poll: bool) -> None:
        # A socket that is stored again at each start of the service is stored once.
        identity = None
        if kind_of(fd) is DescriptorKind.SOCKET:
            identity = tuple(identify_file(fd))
            stored = [each.identity for held in self._stored.values() for each in held]
            if identity in stored:
                _closing.close_fds([fd])
                return
        self._stored.setdefault(name, []).append(_Stored(fd, poll, identity))


def _is_name(name: str) -> bool:
    return 0 < len(name) <= _MAX_NAME and name.isascii() and name.isprintable() and ":" not in name


def _is_hung_up(fd: int) -> bool:
    if kind_of(fd) not in _POLLED:
        return False
    poll = select.poll()
    # POLLHUP and POLLERR are always reported.
    poll.register(fd, 0)
    return bool(poll.poll(0))


@asynccontextmanager
async def open_service_manager(
    *, watchdog_timeout: float | None = None, pids: Collection[int] | None = None
) -> AsyncGenerator[FakeServiceManager, None]:
    """Run a service manager for tests, at a real datagram socket.

    It accepts the messages of root and of this user, checks the credentials that the kernel adds,
    closes the file descriptor of a barrier after all messages before it, and keeps file descriptors
    that services store.

    Args:
      watchdog_timeout: in seconds; services are told to send heartbeats (WATCHDOG_USEC).
      pids: the processes whose messages are accepted, as with ``NotifyAccess=main``; default: all.

    Returns:
      An async context manager, which returns a :class:`FakeServiceManager`.

    Raises:
      NotSupportedError: the platform reports no credentials.
    """
    with short_directory() as directory:
        path = directory / NAME
        environ = {"NOTIFY_SOCKET": str(path), "FDSTORE": "1024"}
        if watchdog_timeout is not None:
            environ["WATCHDOG_USEC"] = str(round(watchdog_timeout * 1_000_000))
        manager = FakeServiceManager(environ, pids=pids)
        raised: BaseException | None = None
        async with (
            await open_unix_datagram(path, credentials=True) as sock,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(manager._receive, sock)
            try:
                yield manager
            except BaseException as exc:  # raised below, not in a nursery's group
                raised = exc
            nursery.cancel_scope.cancel()
            manager.close()
    if raised is not None:
        raise raised
