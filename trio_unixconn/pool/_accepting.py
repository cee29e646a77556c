"""Accepting in a worker: from listening sockets that all workers of a pool share.

Each connection wakes all workers that have nothing to do, and one of them accepts it. The others
find nothing, which costs them some microseconds. A worker accepts one connection, and then lets all
its tasks run before it accepts the next one: under load other workers get their share, and a worker
whose handlers compute accepts nothing. One that is busy lets those go first that are idle.

Invariant: a connection that was accepted is noted in the log before its handler begins, and a
worker at its limit accepts none.

Sources: accept(2), epoll(7)
"""

from __future__ import annotations

import json
import logging
import socket as stdlib_socket
from collections.abc import Callable
from typing import Any, Final

import attrs
import trio

from .._accept import Acceptor, is_out_of_resources
from .._closing import close_fds, close_socket
from .._connection import UnixConnection
from .._frames import encode_frame
from .._owner import DescriptorOwner
from .._policy import PeerPolicy, admit_or_close, restore_policy
from . import _protocol
from ._accept_log import AcceptLogWriter
from ._endpoints import EndpointKind

logger: Final = logging.getLogger("trio_unixconn.pool")


@attrs.define(eq=False)
class _Listener:
    sock: stdlib_socket.socket
    kind: int
    name: str
    acceptor: Acceptor
    policy: PeerPolicy | None


class Accepting(DescriptorOwner):
    """Accepts the connections of some listening sockets.

    Args:
      body: the body of an ACCEPT frame.
      fds: its file descriptors, which this owns afterwards: the log, and the sockets.
      other_jobs: returns the number of jobs that the pool has sent, and that have not ended.
      start: starts the handler of a connection, which ends with ``finish``. Its arguments are the
        slot in the log, the job, and the file descriptor; and its stream, if there is one already.
      report: sends a frame to the pool.
    """

    def __init__(
        self,
        body: bytes,
        fds: list[int],
        *,
        other_jobs: Callable[[], int],
        start: Callable[[int, _protocol.SentJob, int, UnixConnection | None], None],
        report: Callable[[bytes], None],
    ) -> None:
        message = json.loads(body)
        self._base: int = message["base"]
        self._limit: int = message["limit"]
        self._enough: int = message["enough"]
        self._other_jobs = other_jobs
        self._start = start
        self._report = report
        self._scope = trio.CancelScope()
        self._has_room = trio.lowlevel.ParkingLot()
        try:
            self._log = AcceptLogWriter(fds[0])
        except BaseException:
            # There is no memory for it, and this process exits. A handler can delay that.
            close_fds(fds[1:])
            raise
        self._listeners: Final = [
            _listener(fd, *each) for fd, each in zip(fds[1:], message["listeners"], strict=True)
        ]

    def stop(self) -> None:
        """Accept no more; ``run`` returns."""
        self._scope.cancel()

    async def run(self) -> None:
        """Accept until ``stop``; then the sockets are closed in this process."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                for each in self._listeners:
                    nursery.start_soon(
                        self._accept_from, each, name=f"trio_unixconn.pool accept {each.kind}"
                    )
                await trio.sleep_forever()

    def close(self, *, is_last: bool) -> None:
        """Close the sockets.

        Args:
          is_last: whether no other process may hold them, so that this closes the connections in
            their queues, too.
        """
        for each in self._listeners:
            if is_last:
                close_socket(each.sock)
            else:
                each.sock.close()

    def is_full(self) -> bool:
        """Whether this worker has as many jobs as it may have."""
        return self._log.in_use + self._other_jobs() >= self._limit

    def finish(self, slot: int, *, failed: bool = False) -> None:
        """Note that a handler has ended."""
        self._log.finish(slot, failed=failed)
        self.notify()

    def notify(self) -> None:
        """Called when this worker has finished a job, and may accept another one."""
        if self._has_room:
            self._has_room.unpark_all()

    async def _accept_from(self, listener: _Listener) -> None:
        acceptor, sock = listener.acceptor, listener.sock
        while True:
            while self.is_full():
                await self._has_room.park()
            await trio.lowlevel.wait_readable(sock)
            if self._log.in_use:
                # Workers that have nothing to do are woken at the same time.
                await trio.lowlevel.checkpoint()
            error: OSError | None = None
            while not self.is_full():
                try:
                    accepted, error = acceptor.accept_pending(1)
                except OSError:
                    # It listens no more, for all processes. The pool looks after that.
                    return
                if not accepted:
                    break
                await self._take(listener, *accepted[0])
                # Its handler begins.
                await trio.lowlevel.checkpoint()
            if error is not None:
                if is_out_of_resources(error):
                    self._report(_protocol.pack_starved(has_sockets=True))
                await acceptor.back_off(error)

    async def _take(self, listener: _Listener, fd: int, name: Any) -> None:
        """Start the handler of a connection, if its peer may connect.

        Without a policy, and with one that the kernel's own answer decides, this does not wait.
        """
        stream: UnixConnection | None = None
        if listener.policy is not None:
            stream = await self._ask(listener, listener.policy, fd)
            if stream is None:
                self._log.deny()
                return
        slot, number = self._log.add(listener.kind, name)
        job = _protocol.SentJob(self._base + number, listener.kind, False, 0, b"")
        self._start(slot, job, fd, stream)
        if number == self._enough:
            self._report(encode_frame(_protocol.ENOUGH))

    @staticmethod
    async def _ask(listener: _Listener, policy: PeerPolicy, fd: int) -> UnixConnection | None:
        """Return a connection if the policy admits its peer; otherwise it is closed."""
        try:
            conn = UnixConnection.from_fd(
                fd, receive_descriptors=listener.kind == EndpointKind.UNIX
            )
        except (OSError, ValueError):  # pragma: no cover - the kernel has just returned it
            close_fds([fd])
            return None
        is_admitted = False
        try:
            with trio.CancelScope(shield=True):
                is_admitted = await admit_or_close(conn, policy)
        except Exception:
            logger.exception("%s: cannot ask the policy, the connection is closed", listener.name)
        return conn if is_admitted else None


def _listener(fd: int, kind: int, name: str, policy: object) -> _Listener:
    sock = stdlib_socket.socket(fileno=fd)
    restored = None if policy is None else restore_policy(policy)
    return _Listener(sock, kind, name, Acceptor(sock, name), restored)
