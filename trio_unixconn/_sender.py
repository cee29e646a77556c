"""Sending: the only calls of sendmsg, and waiting until the socket can be written to.

Invariants: the number of a file descriptor never crosses a scheduling point, except as our own
duplicate, because the caller may close the original while a send waits, and the number may then
mean another file. Control messages are sent once, with the first byte. After every scheduling
point the socket is looked at again: another task may have closed or detached it.

How a send proceeds: most are one sendmsg and one scheduling point, which ``send``, ``send_fds``
and ``send_all`` do themselves. What the kernel did not take becomes a _SendProgress, and
``_send_later`` alternates between waiting and ``advance`` until everything is sent:

    advance -> 0        everything is sent
            -> EAGAIN   the socket is full, or took a part: poll(2) says when to continue
                        (of a datagram, the queue of its receiver is full; see DatagramSender)
            -> others   a resource is exhausted, while poll(2) says that the socket is writable:
                        sleep, for longer each time, and for RETRY_TIMEOUT at the most
            raises      the kernel rejects the message

Sources: unix(7), sendmsg(2)
"""

from __future__ import annotations

import errno
import socket as stdlib_socket
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Final
from weakref import WeakValueDictionary

import trio
from trio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint_if_cancelled,
    enable_ki_protection,
    wait_writable,
)

from . import _ancillary, _kernel
from ._buffers import bytes_of
from ._cancellable import checkpoint_cancellable, sleep_cancellable, wait_cancellable
from ._closing import close_fds
from ._fds import duplicate
from ._paths import connectable, describe_send_error
from ._socket import FAILURES, RETRY_TIMEOUT, ConnectedSocket, limit_error, with_sent
from ._trio_task import checkpoint_in_task
from .errors import (
    ConnectionBrokenError,
    ConnectionBusyError,
    OperationCancelled,
    SendError,
    UnixConnectionError,
)

if TYPE_CHECKING:
    from ._address import UnixSocketAddress
    from ._ancillary import SentCredentials
    from ._buffers import Buffer
    from ._cancellable import Cancellable
    from ._socket import SendAttempt

# A byte must travel with a control message on a stream; Gio sends NUL.
NUL: Final = b"\0"
_BURST_DATA: Final = [NUL]
# MSG_DONTWAIT, because every process that shares the socket can clear its O_NONBLOCK.
_FLAGS: Final = _kernel.MSG_NOSIGNAL | _kernel.MSG_DONTWAIT

# The kernel cannot take the message now. ETOOMANYREFS: too many file descriptors of this user
# are in flight. The socket polls writable with all of them but EAGAIN.
_RETRYABLE: Final = frozenset({errno.EAGAIN, errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM})
INITIAL_BACKOFF: Final = 0.001
MAX_BACKOFF: Final = 0.1
# How long a task waits for a receiver before it looks for it again, in seconds.
PROBE_TIMEOUT: Final = 1.0


class _SendProgress:
    """One message, or plain bytes, and how much of it is sent.

    Attributes:
      sent, total: in bytes; of a burst, in file descriptors.
      is_message: whether sending only a part of it breaks the stream.
      fds: the caller's numbers; once a message has had to wait, duplicates.
    """

    __slots__ = ("credentials", "data", "fds", "is_message", "sent", "total")

    unit = "bytes"
    # Of the receiver; only a datagram has one.
    address: UnixSocketAddress | None = None

    def __init__(
        self,
        data: bytes | memoryview,
        fds: Sequence[int] = (),
        credentials: SentCredentials | None = None,
        *,
        sent: int = 0,
        is_message: bool = True,
    ) -> None:
        self.data = data
        self.fds: Sequence[int] = fds
        self.credentials: SentCredentials | None = credentials
        self.is_message = is_message
        self.sent = sent
        self.total = len(data)

    def advance(self, raw: stdlib_socket.socket) -> int:
        """Send what the kernel takes; return 0 if that was all, or the errno of its refusal.

        Raises:
          OSError: trying again would not help.
        """
        try:
            if self.sent:
                with memoryview(self.data)[self.sent :] as rest:
                    self.sent += raw.send(rest, _FLAGS)
            else:
                messages = _ancillary.pack(self.fds, self.credentials)
                self.sent = raw.sendmsg([self.data], messages, _FLAGS)
        except OSError as exc:
            if exc.errno not in _RETRYABLE:
                raise
            return exc.errno
        return 0 if self.sent == self.total else errno.EAGAIN

    def hold(self) -> list[int]:
        """Go on with duplicates of the file descriptors; return those, which the caller owns.

        Raises:
          OSError: EBADF, EMFILE.
        """
        if self.sent:
            return []
        self.fds, owned = duplicate(self.fds)
        return owned


class _BurstProgress(_SendProgress):
    """Messages of one byte, each with ``per_message`` file descriptors, and how many are sent.

    Attributes:
      numbers: as ``fds``; once this has had to wait, those that are not sent are duplicates.
    """

    __slots__ = ("numbers", "per_message")

    unit = "file descriptors"

    def __init__(self, fds: array[int], per_message: int) -> None:
        super().__init__(NUL, fds, is_message=False)
        self.numbers = fds
        self.per_message = per_message
        self.total = len(fds)

    def advance(self, raw: stdlib_socket.socket) -> int:
        """Send until everything is sent or the kernel refuses; see the base class."""
        sendmsg, fds, count = raw.sendmsg, self.numbers, self.per_message
        rights = _ancillary.RIGHTS
        level, kind = rights or _kernel.required(rights, "control message for file descriptors")
        for position in range(self.sent, len(fds), count):
            try:
                sendmsg(_BURST_DATA, [(level, kind, fds[position : position + count])], _FLAGS)
            except OSError as exc:
                self.sent = position
                if exc.errno not in _RETRYABLE:
                    raise
                return exc.errno
        self.sent = len(fds)
        return 0

    def hold(self) -> list[int]:
        """Go on with duplicates of those that are not sent; see the base class."""
        rest, owned = duplicate(self.numbers[self.sent :])
        self.numbers = self.numbers[: self.sent] + rest
        return owned


class _DatagramProgress(_SendProgress):
    """One datagram, which is sent as a whole or not at all.

    Attributes:
      address: of its receiver; None: the one that the socket is connected to.
    """

    __slots__ = ("address",)

    def __init__(
        self,
        data: bytes | memoryview,
        fds: Sequence[int],
        credentials: SentCredentials | None,
        address: UnixSocketAddress | None,
    ) -> None:
        super().__init__(data, fds, credentials)
        self.address = address

    def advance(self, raw: stdlib_socket.socket) -> int:
        """Send it, or return the errno of the kernel's refusal; see the base class."""
        messages = _ancillary.pack(self.fds, self.credentials)
        try:
            if self.address is None:
                raw.sendmsg([self.data], messages, _FLAGS)
            else:
                with connectable(self.address) as name:
                    raw.sendmsg([self.data], messages, _FLAGS, name)
        except OSError as exc:
            if exc.errno not in _RETRYABLE:
                raise
            return exc.errno
        return 0


class Sender(ConnectedSocket):
    """The sending direction of a connected socket.

    Attributes:
      busy: whether a task is sending.
    """

    __slots__ = ("_cut", "busy")

    def __init__(self, socket: trio.socket.SocketType, raw: stdlib_socket.socket) -> None:
        super().__init__(socket, raw)
        self.busy: bool = False
        # How many bytes of a message were sent that was then cut off; 0 if none was. The peer
        # would take what follows for the rest of it.
        self._cut = 0

    @enable_ki_protection
    async def send(
        self,
        data: bytes | memoryview,
        fds: Sequence[int],
        credentials: SentCredentials | None,
        cancellable: Cancellable | None,
    ) -> None:
        """Send one message: at least one byte, and what travels with the first of them.

        After a short write only the rest of the data is sent. If that fails or is cancelled,
        nothing can be sent any more.
        """
        if self.busy:
            raise self.busy_error()
        self.busy = True
        progress: _SendProgress | None = None
        try:
            if cancellable is not None:
                await checkpoint_cancellable(cancellable)
            await checkpoint_if_cancelled()
            if self._cut:
                await self._refuse_after_cut()
            refusal = 0
            try:
                sent = self.raw.sendmsg([data], _ancillary.pack(fds, credentials), _FLAGS)
            except OSError as exc:
                if exc.errno not in _RETRYABLE:
                    raise
                sent, refusal = 0, exc.errno
            if sent == len(data):
                await cancel_shielded_checkpoint()
            else:
                progress = _SendProgress(data, fds, credentials, sent=sent)
                await self._send_later(progress, refusal or errno.EAGAIN, cancellable)
        except FAILURES as exc:
            progress = progress or _SendProgress(data, fds, credentials)
            raise await self.failed(exc, progress) from exc
        finally:
            self.busy = False

    def send_nowait(self, data: bytes, fds: Sequence[int]) -> int:
        """Send a message; the caller has checked that no task is sending.

        Returns:
          How many bytes were sent: all, unless it is longer than what the kernel takes at once.

        Raises:
          trio.WouldBlock: the kernel does not take it now, or send() is needed for another reason.
        """
        if self._cut or self.is_closed():
            raise trio.WouldBlock
        try:
            return self.raw.sendmsg([data], _ancillary.pack(fds, None), _FLAGS)
        except OSError as exc:
            if exc.errno in _RETRYABLE or exc.errno == errno.EBADF:
                raise trio.WouldBlock from None
            # Not left to send(): the kernel reports the reset of a connection only once.
            raise with_sent(self.error_of(exc, _SendProgress(data, fds)), 0) from exc

    @enable_ki_protection
    async def send_fds(
        self, fds: array[int], per_message: int, cancellable: Cancellable | None
    ) -> int:
        """Send file descriptors in messages of one byte each; many for one checkpoint.

        Returns:
          How many were sent: all, or fewer if trio's cancellation interrupted it, which the
          next checkpoint then raises.
        """
        self._begin()
        progress = _BurstProgress(fds, per_message)
        try:
            if cancellable is not None:
                await checkpoint_cancellable(cancellable)
            await checkpoint_if_cancelled()
            if self._cut:
                await self._refuse_after_cut()
            refusal = progress.advance(self.raw)
            if not refusal:
                await cancel_shielded_checkpoint()
            else:
                try:
                    await self._send_later(progress, refusal, cancellable)
                except trio.Cancelled:
                    # Messages that were sent are not undone: the result is their number.
                    if not progress.sent:
                        raise
        except FAILURES as exc:
            raise await self.failed(exc, progress) from exc
        else:
            return progress.sent
        finally:
            self.busy = False

    async def send_all(self, data: Buffer, cancellable: Cancellable | None = None) -> None:
        """Send plain bytes, all of them."""
        self._begin()
        progress: _SendProgress | None = None
        try:
            with bytes_of(data) as view:
                if cancellable is not None:
                    await checkpoint_cancellable(cancellable)
                await checkpoint_if_cancelled()
                if self._cut:
                    await self._refuse_after_cut()
                sent, refusal = 0, errno.EAGAIN
                if not view:
                    self.check_open()
                else:
                    try:
                        sent = self.raw.send(view, _FLAGS)
                    except OSError as exc:
                        if exc.errno not in _RETRYABLE:
                            raise
                        refusal = exc.errno
                if sent == len(view):
                    await cancel_shielded_checkpoint()
                else:
                    progress = _SendProgress(view, sent=sent, is_message=False)
                    await self._send_later(progress, refusal, cancellable)
        except FAILURES as exc:
            raise await self.failed(exc, progress) from exc
        finally:
            self.busy = False

    async def _send_later(
        self, progress: _SendProgress, refusal: int, cancellable: Cancellable | None
    ) -> None:
        """Wait and continue until everything is sent; see the top of this file."""
        owned: list[int] = []
        pause, deadline = INITIAL_BACKOFF, None
        try:
            owned = progress.hold()
            while refusal:
                if refusal == errno.EAGAIN:
                    pause, deadline = INITIAL_BACKOFF, None
                    await self._wait_to_continue(progress, cancellable)
                else:
                    now = trio.current_time()
                    if deadline is None:
                        deadline = now + RETRY_TIMEOUT
                    elif now >= deadline:
                        raise limit_error(refusal)
                    await sleep_cancellable(pause, cancellable)
                    pause = min(2 * pause, MAX_BACKOFF)
                before = progress.sent
                refusal = progress.advance(self.raw)
                if progress.sent > before:
                    pause, deadline = INITIAL_BACKOFF, None
        except OperationCancelled as exc:
            exc.sent = progress.sent
            raise
        finally:
            # Closing can fail, or wait for a file server, and says nothing about the send.
            close_fds(owned)
            if progress.is_message and 0 < progress.sent < progress.total:
                self._cut = progress.sent

    async def _wait_to_continue(
        self,
        progress: _SendProgress,  # noqa: ARG002 - of datagrams
        cancellable: Cancellable | None,
    ) -> None:
        """Wait until it makes sense to continue after EAGAIN."""
        await wait_cancellable(wait_writable, self.raw, cancellable)

    async def wait_writable(self) -> None:
        """Wait until the socket can be written to."""
        self._begin()
        try:
            await checkpoint_if_cancelled()
            if self._cut:
                await self._refuse_after_cut()
            await wait_cancellable(wait_writable, self.raw, None)
        except FAILURES as exc:
            raise await self.failed(exc) from exc
        finally:
            self.busy = False

    async def send_eof(self) -> None:
        """Shut down this direction of the stream."""
        self._begin()
        try:
            await checkpoint_in_task()
            self.check_open()
            if self._cut:
                await self._refuse_after_cut()
            if not self.socket.did_shutdown_SHUT_WR:
                self.socket.shutdown(stdlib_socket.SHUT_WR)
        except FAILURES as exc:
            raise await self.failed(exc) from exc
        finally:
            self.busy = False

    def busy_error(self) -> ConnectionBusyError:
        """Return the error of a second task that sends."""
        return ConnectionBusyError(f"another task is sending on this {self.noun}")

    def _begin(self) -> None:
        if self.busy:
            raise self.busy_error()
        self.busy = True

    async def _refuse_after_cut(self) -> None:
        await cancel_shielded_checkpoint()
        self.check_open()
        raise with_sent(
            ConnectionBrokenError(
                f"an earlier send_message() was cancelled or failed after {self._cut} bytes; the "
                "peer would take anything else for the rest of that message; close this connection"
            ),
            self._cut,
        )


class DatagramSender(Sender):
    """The sending direction of a datagram socket.

    How it waits for a receiver whose queue is full: sendmsg says EAGAIN then, but poll(2) of a
    socket that is not connected says that it is writable, because it looks at the memory of this
    socket only. To retry at once would spin, and to retry after a pause would be late. Of a
    connected socket, poll looks at the queue of the peer, too. So a second socket, the probe, is
    connected to the receiver, and waited for. Nothing is sent over it. If the receiver is closed
    meanwhile, the kernel reports the probe as writable, and the next attempt to send reports the
    error. If it stays open, but another socket gets its path, nothing is reported, so the wait has
    a limit, PROBE_TIMEOUT, and the next attempt finds the new one. Both sockets are waited for, one
    after the other, because EAGAIN can also mean that the datagrams of this socket that wait in
    other queues fill its own buffer.

    For each datagram that is received from a full queue, the kernel wakes all that wait for it: a
    hundred senders took a hundred attempts for one. So only one task of a trio run waits for a
    receiver, the others for their turn. After its wait, a task sends before the next one runs.
    """

    __slots__ = ("_waiting",)

    noun: ClassVar[str] = "socket"

    def __init__(self, socket: trio.socket.SocketType, raw: stdlib_socket.socket) -> None:
        super().__init__(socket, raw)
        # While a task waits for a receiver.
        self._waiting: trio.CancelScope | None = None

    @enable_ki_protection
    async def send_to(
        self,
        data: bytes | memoryview,
        fds: Sequence[int],
        credentials: SentCredentials | None,
        address: UnixSocketAddress | None,
        cancellable: Cancellable | None,
    ) -> None:
        """Send one datagram to an address, or to the peer of a connected socket."""
        self._begin()
        progress = _DatagramProgress(data, fds, credentials, address)
        try:
            if cancellable is not None:
                await checkpoint_cancellable(cancellable)
            await checkpoint_if_cancelled()
            refusal = progress.advance(self.raw)
            if not refusal:
                await cancel_shielded_checkpoint()
            else:
                await self._send_later(progress, refusal, cancellable)
        except FAILURES as exc:
            raise await self.failed(exc, progress) from exc
        finally:
            self.busy = False

    def release(self) -> None:
        """Wake the task that waits for a receiver, before the socket is closed."""
        if self._waiting is not None:
            self._waiting.cancel()

    async def _wait_to_continue(
        self, progress: _SendProgress, cancellable: Cancellable | None
    ) -> None:
        await super()._wait_to_continue(progress, cancellable)
        if progress.address is None or self.is_closed():
            return
        self._waiting = trio.CancelScope()
        try:
            with self._waiting:
                if cancellable is None:
                    await _wait_for_receiver(progress.address)
                else:
                    with cancellable.scope():
                        await _wait_for_receiver(progress.address)
            if self._waiting.cancelled_caught:
                raise trio.ClosedResourceError("another task closed this socket")
        finally:
            self._waiting = None

    def error_of(
        self,
        exc: OSError | trio.ClosedResourceError | trio.BusyResourceError,
        attempt: SendAttempt | None = None,
    ) -> UnixConnectionError:
        """Return the error to raise for ``exc``; see the base class."""
        error = super().error_of(exc, attempt)
        if (
            isinstance(exc, OSError)
            and isinstance(attempt, _DatagramProgress)
            and isinstance(error, (SendError, ConnectionBrokenError))
        ):
            return self._about_receiver(exc, attempt) or error
        return error

    def _about_receiver(self, exc: OSError, attempt: _DatagramProgress) -> SendError | None:
        """Return the error for what only datagrams can meet; None for all others."""
        number, address = exc.errno, attempt.address
        plain = not attempt.fds and attempt.credentials is None
        if number == errno.EMSGSIZE:
            return SendError(errno.EMSGSIZE, self._describe_size(attempt))
        if address is not None:
            if number in _ABOUT_RECEIVER or (number == errno.EPERM and plain):
                return SendError(*describe_send_error(exc, address), str(address))
        elif number in (errno.ENOTCONN, errno.EDESTADDRREQ):
            return SendError(errno.ENOTCONN, "this socket is not connected; pass to=ADDRESS")
        elif number in (errno.ECONNREFUSED, errno.ECONNRESET):
            return SendError(
                errno.ECONNREFUSED, "the receiver that this socket is connected to is closed"
            )
        return None

    def _describe_size(self, attempt: _DatagramProgress) -> str:
        limit = self.raw.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_SNDBUF)
        return (
            f"a datagram of {attempt.total} bytes does not fit into the send buffer (SO_SNDBUF is "
            f"{limit}); send large data as sealed memory (a memfd in fds=), or raise SO_SNDBUF"
        )


# Of a trio run, the turns of tasks that wait for receivers whose queues are full. The tasks keep
# the locks alive, even while one of them does not have the lock.
_turns: Final = trio.lowlevel.RunVar["WeakValueDictionary[UnixSocketAddress, trio.Lock]"](
    "receivers of datagrams"
)


async def _wait_for_receiver(address: UnixSocketAddress) -> None:
    """Wait until the queue of a receiver is not full, in turn; or for a while if that fails."""
    turns: WeakValueDictionary[UnixSocketAddress, trio.Lock]
    try:
        turns = _turns.get()
    except LookupError:
        turns = WeakValueDictionary()
        _turns.set(turns)
    turn = turns.setdefault(address, trio.Lock())
    try:
        async with turn:
            probe = _open_probe(address)
            try:
                with trio.move_on_after(PROBE_TIMEOUT):
                    await wait_writable(probe)
            finally:
                # No process can have sent anything to it: it has no address.
                probe.close()
    except OSError:
        # No file descriptor is free, or the receiver is gone, which the next attempt reports.
        await trio.sleep(MAX_BACKOFF)


# What sendmsg says about the receiver of a datagram; None: Python says that a name is too long.
_ABOUT_RECEIVER: Final = frozenset(
    {
        None,
        errno.ECONNREFUSED,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ELOOP,
        errno.EACCES,
        errno.EPROTOTYPE,
        errno.ENAMETOOLONG,
    }
)


def _open_probe(address: UnixSocketAddress) -> stdlib_socket.socket:
    """Return a datagram socket that is connected to an address.

    Raises:
      OSError: from socket(2) or connect(2).
    """
    family = _kernel.required(_kernel.AF_UNIX, "Unix sockets")
    probe = stdlib_socket.socket(family, stdlib_socket.SOCK_DGRAM)
    try:
        probe.setblocking(False)
        with connectable(address) as name:
            probe.connect(name)
    except BaseException:
        probe.close()
        raise
    return probe
