"""Sending: one sendmsg, one scheduling point, and waiting for room.

The rule of this file: a descriptor's number never crosses an await, but as a duplicate of our
own; control messages go once, with the first byte. Only this file calls sendmsg.

Sources: unix(7), sendmsg(2)
"""

from __future__ import annotations

import errno
import os
import socket as stdlib_socket
from array import array
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint,
    checkpoint_if_cancelled,
    enable_ki_protection,
    wait_writable,
)

from . import _ancillary, _kernel
from ._buffers import bytes_of
from ._cancellable import checkpoint_cancellable, sleep_cancellable, wait_cancellable
from ._fdlist import UnixFDList
from ._socket import FAILURES, ConnectedSocket
from .errors import (
    ConnectionBusyError,
    OperationCancelled,
    UnixConnectionError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._ancillary import ControlMessage
    from ._cancellable import Cancellable

# A byte must travel with a control message on a stream; Gio sends NUL.
_ONE_BYTE: Final = [b"\0"]
# MSG_DONTWAIT, because whoever shares the socket can clear its O_NONBLOCK.
_FLAGS: Final = _kernel.MSG_NOSIGNAL | _kernel.MSG_DONTWAIT

# The kernel cannot take the message now. After EAGAIN poll says when it can, after the others
# not: too many of our descriptors wait in sockets for their receivers (ETOOMANYREFS), or
# memory is short.
_TRY_LATER: Final = frozenset({errno.EAGAIN, errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM})
_FULL: Final = BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
_FIRST_PAUSE: Final = 0.001
_LONGEST_PAUSE: Final = 0.1


class _SendProgress:
    """Descriptors that go in messages of so many each, and how many have gone."""

    __slots__ = ("numbers", "per_message", "sent")

    def __init__(self, numbers: array[int], per_message: int) -> None:
        # Once this has had to wait, duplicates.
        self.numbers = numbers
        self.per_message = per_message
        self.sent = 0


class Sender(ConnectedSocket):
    """The sending direction of a connected socket.

    Attributes:
      busy: whether a task is sending.
    """

    __slots__ = ("_half_sent", "busy")

    def __init__(self, socket: trio.socket.SocketType, raw: stdlib_socket.socket) -> None:
        super().__init__(socket, raw)
        self.busy: bool = False
        # Whether a message stopped in the middle, behind which nothing makes sense.
        self._half_sent = False

    @enable_ki_protection
    async def send(
        self,
        data: bytes | memoryview,
        messages: list[ControlMessage],
        cancellable: Cancellable | None,
        fds: Sequence[int] = (),
    ) -> None:
        """Send ``data`` with control messages, which carry ``fds``; mostly one sendmsg.

        The control messages go with the first byte. After a short write only the rest of the
        data is sent, and if that fails or is cancelled, nothing can be sent any more.
        """
        if self.busy:
            raise _busy()
        self.busy = True
        try:
            if cancellable is not None:
                await checkpoint_cancellable(cancellable)
            await checkpoint_if_cancelled()
            if self._half_sent:
                self._check_whole()
            try:
                sent = self.raw.sendmsg([data], messages, _FLAGS)
            except OSError as exc:
                if exc.errno not in _TRY_LATER:
                    raise
                sent = await self._send_later(exc, data, messages, cancellable, fds)
            else:
                await cancel_shielded_checkpoint()
            if sent < len(data):
                self._half_sent = True
                with memoryview(data)[sent:] as rest:
                    await self._send_rest(rest, _FULL, cancellable)
                self._half_sent = False
        except FAILURES as exc:
            gone = "a part was sent before" if self._half_sent else "nothing was sent"
            raise await self.failed(exc, messages, gone) from exc
        finally:
            self.busy = False

    @enable_ki_protection
    async def _send_later(
        self,
        refusal: OSError,
        data: bytes | memoryview,
        messages: list[ControlMessage],
        cancellable: Cancellable | None,
        fds: Sequence[int],
    ) -> int:
        # The caller may close the descriptors while we wait, and their numbers may then mean
        # other files.
        with UnixFDList() as duplicates:
            for fd in fds:
                duplicates.append(fd)
            if fds:
                others = [each for each in messages if each[1] != _kernel.SCM_RIGHTS]
                messages = [*others, _ancillary.rights(*duplicates)]
            pause = _FIRST_PAUSE
            while True:
                pause = await self._wait_for_room(refusal, pause, cancellable)
                try:
                    return self.raw.sendmsg([data], messages, _FLAGS)
                except OSError as exc:
                    if exc.errno not in _TRY_LATER:
                        raise
                    refusal = exc

    async def _send_rest(
        self, rest: memoryview, refusal: OSError, cancellable: Cancellable | None
    ) -> None:
        pause, sent = _FIRST_PAUSE, 0
        while sent < len(rest):
            pause = await self._wait_for_room(refusal, pause, cancellable)
            with rest[sent:] as now:
                try:
                    sent += self.raw.send(now, _FLAGS)
                except OSError as exc:
                    if exc.errno not in _TRY_LATER:
                        raise
                    refusal = exc
                else:
                    refusal = _FULL

    @enable_ki_protection
    async def send_fds(
        self, numbers: array[int], per_message: int, cancellable: Cancellable | None
    ) -> int:
        """Send descriptors in messages of a byte each; many for one checkpoint.

        Returns:
          How many descriptors went: all, or fewer if trio's cancellation came in between,
          which then is seen at the next checkpoint.
        """
        self._begin_sending()
        burst = _SendProgress(numbers, per_message)
        try:
            if cancellable is not None:
                await checkpoint_cancellable(cancellable)
            await checkpoint_if_cancelled()
            self._check_whole()
            refusal = self._send_now(burst)
            if refusal is None:
                await cancel_shielded_checkpoint()
            else:
                await self._send_fds_later(burst, refusal, cancellable)
            return burst.sent
        except FAILURES as exc:
            gone = burst.sent
            said = f"{gone} descriptors were sent before" if gone else "nothing was sent"
            error = await self.failed(exc, [_ancillary.rights_of(numbers[:per_message])], said)
            if isinstance(error, UnixConnectionError):
                error.sent = gone
            raise error from exc
        except OperationCancelled as exc:
            exc.sent = burst.sent
            raise
        finally:
            self.busy = False

    def _send_now(self, burst: _SendProgress) -> OSError | None:
        """Send until all has gone or the kernel refuses; return the refusal."""
        sendmsg, numbers, count = self.raw.sendmsg, burst.numbers, burst.per_message
        level, kind = _ancillary.required_rights()
        for position in range(burst.sent, len(numbers), count):
            try:
                sendmsg(_ONE_BYTE, [(level, kind, numbers[position : position + count])], _FLAGS)
            except OSError as exc:
                burst.sent = position
                if exc.errno not in _TRY_LATER:
                    raise
                return exc
        burst.sent = len(numbers)
        return None

    @enable_ki_protection
    async def _send_fds_later(
        self, burst: _SendProgress, refusal: OSError | None, cancellable: Cancellable | None
    ) -> None:
        # One for each that is different, in a list that the UnixFDList owns as it grows.
        made: list[int] = []
        with UnixFDList.owning(made):
            copies: dict[int, int] = {}
            for fd in burst.numbers[burst.sent :]:
                if fd not in copies:
                    made.append(os.dup(fd))
                    copies[fd] = made[-1]
            # What has gone already stands in front, and is not looked at again.
            burst.numbers = array("i", [copies.get(fd, fd) for fd in burst.numbers])
            pause = _FIRST_PAUSE
            while refusal is not None:
                before = burst.sent
                try:
                    pause = await self._wait_for_room(refusal, pause, cancellable)
                except trio.Cancelled:
                    if not before:
                        raise
                    # What the kernel has taken is not undone: the answer is how many.
                    return
                refusal = self._send_now(burst)
                if burst.sent > before:
                    pause = _FIRST_PAUSE

    async def _wait_for_room(
        self, refusal: OSError, pause: float, cancellable: Cancellable | None
    ) -> float:
        """Wait until it makes sense to try again; return the pause for the next time."""
        if refusal.errno == errno.EAGAIN:
            await wait_cancellable(wait_writable, self.raw, cancellable)
            return pause
        # The socket polls writable all the while, so waiting for that would spin.
        await sleep_cancellable(pause, cancellable)
        return min(2 * pause, _LONGEST_PAUSE)

    async def send_all(
        self, data: bytes | bytearray | memoryview, cancellable: Cancellable | None = None
    ) -> None:
        """Send plain bytes, all of them."""
        self._begin_sending()
        try:
            if cancellable is not None:
                await checkpoint_cancellable(cancellable)
            await checkpoint_if_cancelled()
            self._check_whole()
            with bytes_of(data) as view:
                sent = 0
                refusal: OSError = _FULL
                if not view:
                    self.check_open()
                else:
                    try:
                        sent = self.raw.send(view, _FLAGS)
                    except OSError as exc:
                        if exc.errno not in _TRY_LATER:
                            raise
                        refusal = exc
                if sent == len(view):
                    await cancel_shielded_checkpoint()
                else:
                    with view[sent:] as rest:
                        await self._send_rest(rest, refusal, cancellable)
        except FAILURES as exc:
            raise await self.failed(exc) from exc
        finally:
            self.busy = False

    async def wait_writable(self) -> None:
        """Wait until there is room to send."""
        self._begin_sending()
        try:
            await checkpoint_if_cancelled()
            self.check_open()
            self._check_whole()
            await wait_cancellable(wait_writable, self.raw, None)
        except FAILURES as exc:
            raise await self.failed(exc) from exc
        finally:
            self.busy = False

    async def send_eof(self) -> None:
        """End the stream in this direction."""
        self._begin_sending()
        try:
            await checkpoint()
            self.check_open()
            self._check_whole()
            if not self.socket.did_shutdown_SHUT_WR:
                self.socket.shutdown(stdlib_socket.SHUT_WR)
        except FAILURES as exc:
            raise await self.failed(exc) from exc
        finally:
            self.busy = False

    def _begin_sending(self) -> None:
        if self.busy:
            raise _busy()
        self.busy = True

    def _check_whole(self) -> None:
        if self._half_sent:
            raise BrokenPipeError(
                errno.EPIPE,
                "an earlier send_message() was cancelled, or failed, when a part of its bytes had "
                "gone; nothing can be sent behind that; close this connection",
            )


def _busy() -> ConnectionBusyError:
    return ConnectionBusyError("another task is sending on this connection")
