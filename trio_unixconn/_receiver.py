"""Receiving: one recvmsg, one scheduling point, and waiting for a message.

Invariant: nothing between the kernel's answer and the return can be cancelled, and a message
that was read ahead serves the next receive, whichever it is. Only this module calls recvmsg and
recvmsg_into.

Sources: unix(7), recvmsg(2)
"""

from __future__ import annotations

import errno
import logging
import os
import socket as stdlib_socket
import struct
import sys
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

import trio
from trio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint_if_cancelled,
    enable_ki_protection,
    wait_readable,
)

from . import _ancillary, _closing, _kernel, _processor
from ._cancellable import checkpoint_cancellable, wait_cancellable
from ._credentials import peer_credentials
from ._identity import open_peer_pidfd, pid_of
from ._readahead import ReadAhead
from ._socket import FAILURES, ConnectedSocket
from ._sockopts import disable_passrights, enable_oobinline
from .errors import ConnectionBusyError, NotSupportedError

if TYPE_CHECKING:
    from ._ancillary import RawMessage
    from ._cancellable import Cancellable
    from ._credentials import Credentials

logger: Final = logging.getLogger("trio_unixconn")

_ROOM: Final = _kernel.CONTROL_ROOM
_SOL_SOCKET: Final = _kernel.SOL_SOCKET
# MSG_DONTWAIT, because another process that shares the socket can clear its O_NONBLOCK.
_FLAGS: Final = _kernel.MSG_CMSG_CLOEXEC | _kernel.MSG_DONTWAIT
_PEEK: Final = _FLAGS | _kernel.MSG_PEEK
# On Linux, MSG_PEEK installs duplicates of the file descriptors. FreeBSD returns pointers of the
# kernel in their place.
_CAN_PEEK: Final = sys.platform == "linux"
# Not 1: once it has enough plain bytes, a peek still continues to the next message, and installs
# the descriptors of that. So a single byte with descriptors can be two messages; of two it is one.
_PEEK_SIZE: Final = 2
# None where credentials are not sent in a message of their own.
_PASSCRED: Final = None if _kernel.SCM_CREDENTIALS is None else _kernel.SO_PASSCRED


class Receiver(ConnectedSocket):
    """The receiving direction of a connected socket.

    Attributes:
      ahead: what fds() read ahead; None before its first use.
      busy: whether a task is receiving.
      peer: the credentials of the peer, if the socket was released while a task was receiving.
    """

    __slots__ = (
        "_temporary_options",
        "_waits_until_yield",
        "_wants_pidfds",
        "_yield_interval",
        "ahead",
        "busy",
        "peer",
    )

    # With MSG_TRUNC, recvmsg_into returns the size of a datagram that was larger than the buffer.
    into_flags: ClassVar[int] = _FLAGS

    def __init__(self, socket: trio.socket.SocketType, raw: stdlib_socket.socket) -> None:
        super().__init__(socket, raw)
        enable_oobinline(raw)
        self.busy: bool = False
        self.ahead: ReadAhead | None = None
        self.peer: Credentials | None = None
        # Options that are on only while a receive is running.
        self._temporary_options: tuple[int, ...] = ()
        # Whether this connection was ever asked for a pidfd: then reading ahead asks, too.
        self._wants_pidfds = False
        self._waits_until_yield = self._yield_interval = _processor.INITIAL_INTERVAL

    # In one piece: each coroutine that a wait returns through takes time.
    @enable_ki_protection
    async def receive(  # noqa: C901, PLR0912
        self,
        size: int,
        cancellable: Cancellable | None,
        *,
        passcred: bool = False,
        passpidfd: bool = False,
        into: memoryview | None = None,
    ) -> RawMessage:
        """Receive one message with one recvmsg.

        Args:
          size: how many bytes at most.
          cancellable: ends the wait when it is cancelled.
          passcred, passpidfd: whether to ask for the sender's credentials and pidfd.
          into: where to put the bytes; then the data of the message is their number.
        """
        if self.busy:
            raise self.busy_error()
        self.busy = True
        received: RawMessage | None
        try:
            if cancellable is not None:
                await checkpoint_cancellable(cancellable)
            await checkpoint_if_cancelled()
            raw = self.raw
            if self.ahead:
                received = self._take_ahead(into)
                if passpidfd:
                    received = self._with_pidfd(received)
                await cancel_shielded_checkpoint()
                return received
            if passcred and _PASSCRED is not None and not raw.getsockopt(_SOL_SOCKET, _PASSCRED):
                # As _enable_passcred(), without the call.
                raw.setsockopt(_SOL_SOCKET, _PASSCRED, 1)
                self._temporary_options += (_PASSCRED,)
            if passpidfd:
                self._enable_passpidfd()
            try:
                if into is None:
                    received = raw.recvmsg(size, _ROOM, _FLAGS)
                else:
                    received = _receive_into(raw, into, self.into_flags)
            except BlockingIOError:
                if self._waits_until_yield:
                    self._waits_until_yield -= 1
                    received = None
                else:
                    received = self._receive_after_yield(size, into)
            if received is not None:
                await cancel_shielded_checkpoint()
                return received
            while True:
                # The socket is open: nothing was awaited since recvmsg said EAGAIN. A closed one
                # has the number -1, and trio would confuse all that have.
                try:
                    if cancellable is None:
                        await wait_readable(raw)
                    else:
                        await wait_cancellable(wait_readable, raw, cancellable)
                    if into is None:
                        return raw.recvmsg(size, _ROOM, _FLAGS)
                    return _receive_into(raw, into, self.into_flags)
                except BlockingIOError:
                    continue
        except FAILURES as exc:
            raise await self.failed(exc) from exc
        finally:
            if self._temporary_options:
                self._restore_options()
            self.busy = False

    def _receive_after_yield(self, size: int, into: memoryview | None) -> RawMessage | None:
        """Give the processor away once, and look again; None: wait. See _processor.

        No other task runs meanwhile, so the socket is still open.
        """
        if not _processor.yield_once():
            self._waits_until_yield = self._yield_interval
            return None
        try:
            if into is None:
                received: RawMessage = self.raw.recvmsg(size, _ROOM, _FLAGS)
            else:
                received = _receive_into(self.raw, into, self.into_flags)
        except BlockingIOError:
            interval = min(2 * self._yield_interval, _processor.MAX_INTERVAL)
            self._waits_until_yield = self._yield_interval = interval
            return None
        self._yield_interval = max(self._yield_interval // 2, _processor.INITIAL_INTERVAL)
        return received

    def busy_error(self) -> ConnectionBusyError:
        """Return the error of a second task that receives."""
        return ConnectionBusyError(f"another task is receiving from this {self.noun}")

    def receive_nowait(self, size: int) -> RawMessage:
        """Receive one message that has arrived; the caller has checked that no task is receiving.

        Raises:
          trio.WouldBlock: none has, or receive() is needed for another reason.
        """
        if self.ahead or self.is_closed():
            raise trio.WouldBlock
        try:
            return self.raw.recvmsg(size, _ROOM, _FLAGS)
        except BlockingIOError:
            raise trio.WouldBlock from None
        except OSError as exc:
            # Not left to receive(): the kernel reports it only once.
            raise self.error_of(exc) from exc

    def _take_ahead(self, into: memoryview | None) -> RawMessage:
        """Return the first message that was read ahead.

        Raises:
          ConnectionClosedError: the socket was closed without this connection.
          OSError: the kernel reported it in place of a message.
        """
        assert self.ahead is not None  # the caller has looked
        if self.is_closed():
            self.ahead.drop()
            self.check_open()
        received = self.ahead.take()
        if into is not None:
            data = received[0]
            into[: len(data)] = data
            return (len(data), *received[1:])  # type: ignore[return-value]
        return received

    def _with_pidfd(self, message: RawMessage) -> RawMessage:
        """Add the pidfd to a message that was read ahead before any was asked for.

        The kernel adds it only as it is received. The pidfd of the connected process is the
        same if that process has the pid in the credentials: it is alive, so it has had that pid
        since it connected. Of another process that sends on this socket, none can be had.
        """
        received = _ancillary.unpack(message)
        if received.credentials is None or received.pidfds:
            return message
        try:
            pidfd = open_peer_pidfd(self.raw)
            if pidfd is None:
                return message
            try:
                is_sender = pid_of(pidfd) == received.credentials.pid
            except OSError:
                is_sender = False
        except OSError:
            # The process has ended, or no file descriptor is free.
            return message
        if not is_sender:
            os.close(pidfd)
            return message
        data, ancdata, flags, address = message
        added = (
            _SOL_SOCKET,
            _kernel.required(_kernel.SCM_PIDFD, "SCM_PIDFD"),
            struct.pack("i", pidfd),
        )
        return data, [*ancdata, added], flags, address

    def read_ahead(self, count: int) -> None:  # noqa: C901 - in one piece, for speed
        """Read up to ``count`` single bytes that have arrived, each with its control messages.

        They serve the next receives, whichever these are, so nothing may be lost that would
        not have been lost otherwise. SO_PASSCRED is on for that time, for credentials that the
        peer sent explicitly, and SO_PASSPIDFD if this connection was ever asked for pidfds.
        It stops after the first message that is not a lone file descriptor, and leaves as many
        file descriptors free as such a message may have.
        """
        count = min(count, _kernel.free_descriptors() - _kernel.SCM_MAX_FD)
        if count <= 0 or self.is_closed():
            return
        ahead = self.ahead
        if ahead is None:
            ahead = self.ahead = ReadAhead(self.raw)
        try:
            self._enable_passcred()
            if self._wants_pidfds:
                self._enable_passpidfd()
        except OSError:
            # Without them something could be lost: read nothing that was not asked for.
            self._restore_options()
            return
        recvmsg, lone_fd, append = self.raw.recvmsg, _ancillary.lone_fd, ahead.append
        try:
            for _ in range(count):
                received: RawMessage = recvmsg(1, _ROOM, _FLAGS)
                if not received[0]:
                    # The end of the stream can be read again.
                    _ancillary.unpack(received).close()
                    break
                fd = lone_fd(received)
                append((fd, received))
                if fd < 0:
                    break
        except BlockingIOError:
            pass
        except OSError as exc:
            # The kernel reports it only once.
            append(exc)
        finally:
            self._restore_options()
        if ahead:
            ahead.guard()

    def take_arrived(self, max_fds: int) -> list[int]:
        """Take messages with file descriptors that have arrived, up to ``max_fds`` of them.

        Messages that were read ahead come first. Then it peeks at each message, which installs
        duplicates of its file descriptors. If they fit, they are returned, and the message is read
        without them. If not, they are closed, and the message stays where it is.

        A message of more than one byte stays: send_fd() and send_fds() send one byte.

        Another process that receives from the same socket could take the message in between.
        Two receivers of one stream have lost their place anyway.
        """
        taken: list[int] = []
        if self.ahead:
            while fds := self.ahead.take_fds(max_fds - len(taken)):
                taken += fds
            if self.ahead:
                return taken
        if not _CAN_PEEK or self.is_closed():
            return taken
        raw = self.raw
        # The duplicates of a message that does not fit are closed a little later, by a thread, and
        # the next receive may need as many free descriptors before that.
        limit = min(max_fds, _kernel.free_descriptors() - 2 * _kernel.SCM_MAX_FD)
        while len(taken) < limit:
            try:
                received = _ancillary.unpack(raw.recvmsg(_PEEK_SIZE, _ROOM, _PEEK))
            except BlockingIOError:
                break
            except OSError as exc:
                # The kernel reports it only once.
                if self.ahead is None:
                    self.ahead = ReadAhead(raw)
                self.ahead.append(exc)
                self.ahead.guard()
                break
            fits = (
                len(received.data) == 1
                and 1 <= len(received.fds) <= max_fds - len(taken)
                and not received.truncated
            )
            if not fits or not self._skip_message():
                received.close()
                break
            received.close_pidfds()
            taken += received.fds
        return taken

    def _skip_message(self) -> bool:
        """Read the byte of a message that was peeked at; the kernel drops its descriptors."""
        try:
            return bool(self.raw.recv(1, _FLAGS))
        except OSError:
            return False

    def check_handover(self) -> None:
        """Raise unless the socket can be handed over.

        Raises:
          ConnectionClosedError: this side has closed it.
          ReadAheadError: messages were read ahead.
        """
        self.check_open()
        if self.ahead:
            self.ahead.check_handover()

    def release(self) -> None:
        """Close what was read ahead, and restore options, before the socket is closed."""
        if self.busy:
            # A receive that has its message already returns it, and may need these.
            with suppress(OSError, NotSupportedError):
                self.peer = peer_credentials(self.raw.getsockopt)
        if self._temporary_options:
            self._restore_options()
        if self.ahead is not None:
            self.ahead.drop()

    def __del__(self) -> None:
        # A caller may keep the socket, and drop the connection.
        _closing.close_dropped_kept(self.socket, self.raw)
        count = self.ahead.drop() if self.ahead is not None else 0
        if count:
            warnings.warn(
                f"unclosed UnixConnection: {count} file descriptors that fds() read ahead were "
                "closed",
                ResourceWarning,
                stacklevel=2,
            )

    def _enable_passcred(self) -> None:
        raw = self.raw
        if _PASSCRED is not None and not raw.getsockopt(_SOL_SOCKET, _PASSCRED):
            raw.setsockopt(_SOL_SOCKET, _PASSCRED, 1)
            self._temporary_options += (_PASSCRED,)

    def _enable_passpidfd(self) -> None:
        option = _kernel.required(_kernel.SO_PASSPIDFD, "SO_PASSPIDFD")
        try:
            if not self.raw.getsockopt(_SOL_SOCKET, option):
                self.raw.setsockopt(_SOL_SOCKET, option, 1)
                self._temporary_options += (option,)
        except OSError as exc:
            if exc.errno != errno.ENOPROTOOPT:
                raise
            raise NotSupportedError("this kernel has no SO_PASSPIDFD (Linux 6.5)") from exc
        self._wants_pidfds = True

    def _restore_options(self) -> None:
        """Switch off what was switched on here: other processes may hold the same socket."""
        raw = self.raw
        if raw.fileno() != -1:
            for option in self._temporary_options:
                try:
                    raw.setsockopt(_SOL_SOCKET, option, 0)
                except OSError as exc:
                    # Not raised: it would take the place of a message that was received, whose
                    # file descriptors would be lost. EBADF and ENOTSOCK: other code has closed the
                    # number, which the next operation reports. Others come from a seccomp filter
                    # or a security module.
                    if exc.errno not in (errno.EBADF, errno.ENOTSOCK):
                        logger.warning(
                            "cannot switch off socket option %s (%s): messages keep bringing "
                            "credentials or a pidfd",
                            option,
                            exc.strerror,
                        )
        self._temporary_options = ()


def _receive_into(raw: stdlib_socket.socket, into: memoryview, flags: int) -> RawMessage:
    """Receive one message; the data of it is the number of bytes in ``into``."""
    received: Any = raw.recvmsg_into([into], _ROOM, flags)
    return cast("RawMessage", received)


def with_data(received: RawMessage, into: memoryview) -> RawMessage:
    """Return a message that was received into a buffer, with its bytes as its data."""
    count: Any = received[0]
    return (bytes(into[:count]), *received[1:])


class DatagramReceiver(Receiver):
    """The receiving direction of a datagram socket."""

    __slots__ = ("_buffer",)

    noun: ClassVar[str] = "socket"
    into_flags: ClassVar[int] = _FLAGS | _kernel.MSG_TRUNC

    def __init__(self, socket: trio.socket.SocketType, raw: stdlib_socket.socket) -> None:
        super().__init__(socket, raw)
        # One for all datagrams: most are much smaller than the largest that may arrive.
        self._buffer = bytearray()

    @enable_ki_protection
    async def receive_datagram(
        self, max_bytes: int, cancellable: Cancellable | None
    ) -> tuple[RawMessage, int]:
        """Receive one datagram.

        Returns:
          Up to ``max_bytes`` bytes of it with its control messages, and how many bytes it has.
        """
        if len(self._buffer) < max_bytes:
            self._buffer = bytearray(max_bytes)
        with memoryview(self._buffer)[:max_bytes] as view:
            received = await self.receive(max_bytes, cancellable, into=view)
            count: Any = received[0]
            return with_data(received, view), int(count)


class RefusingReceiver(Receiver):
    """A receiver of a connection that does not accept file descriptors.

    The kernel rejects them where it can (``SO_PASSRIGHTS``, Linux 6.16). This rejects them on
    other kernels, and those that were sent before the option was set.
    """

    __slots__ = ()

    def __init__(self, socket: trio.socket.SocketType, raw: stdlib_socket.socket) -> None:
        super().__init__(socket, raw)
        disable_passrights(raw)

    @enable_ki_protection
    async def receive(
        self,
        size: int,
        cancellable: Cancellable | None,
        *,
        passcred: bool = False,
        passpidfd: bool = False,
        into: memoryview | None = None,
    ) -> RawMessage:
        """Receive one message without file descriptors; see Receiver."""
        received = await super().receive(
            size, cancellable, passcred=passcred, passpidfd=passpidfd, into=into
        )
        _ancillary.expect_no_fds(received if into is None else with_data(received, into))
        return received

    def receive_nowait(self, size: int) -> RawMessage:
        """Receive one message without file descriptors; see Receiver."""
        received = super().receive_nowait(size)
        _ancillary.expect_no_fds(received)
        return received

    def read_ahead(self, count: int) -> None:
        """Read nothing ahead: no file descriptors are expected."""
