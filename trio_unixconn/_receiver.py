"""Receiving: one recvmsg, one scheduling point, and what was read ahead.

The rule of this file: nothing between the kernel's answer and the return can be cancelled,
and what was read ahead of a receive serves the next one, whichever it is. Only this file
calls recvmsg.

Sources: unix(7), recvmsg(2)
"""

from __future__ import annotations

import errno
import warnings
from collections import deque
from typing import TYPE_CHECKING, Final

from trio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint_if_cancelled,
    enable_ki_protection,
    wait_readable,
)

from . import _ancillary, _kernel
from ._cancellable import checkpoint_cancellable, wait_cancellable
from ._socket import FAILURES, ConnectedSocket
from ._sockopts import disable_passrights
from .errors import ConnectionBusyError, NotSupportedError

if TYPE_CHECKING:
    import socket as stdlib_socket
    from collections.abc import Iterator

    import trio

    from ._ancillary import Received
    from ._cancellable import Cancellable

_ROOM: Final = _kernel.CONTROL_ROOM
_SOL_SOCKET: Final = _kernel.SOL_SOCKET
# MSG_DONTWAIT, because whoever shares the socket can clear its O_NONBLOCK.
_FLAGS: Final = _kernel.MSG_CMSG_CLOEXEC | _kernel.MSG_DONTWAIT
# None where no credentials come in messages of their own.
_PASSCRED: Final = None if _kernel.SCM_CREDENTIALS is None else _kernel.SO_PASSCRED


class Receiver(ConnectedSocket):
    """The receiving direction of a connected socket.

    Attributes:
      busy: whether a task is receiving.
      ahead: single bytes, each with its control messages, that serve the next receives; in
        front of each its descriptor if that is all it has, or -1.
    """

    __slots__ = ("_temporary_options", "ahead", "busy")

    def __init__(self, socket: trio.socket.SocketType, raw: stdlib_socket.socket) -> None:
        super().__init__(socket, raw)
        self.busy: bool = False
        self.ahead: deque[tuple[int, Received] | OSError] | None = None
        # Options that are on only for a receive that is under way.
        self._temporary_options: list[int] = []

    # In one piece: each coroutine that a wait comes back through takes time.
    @enable_ki_protection
    async def receive(  # noqa: C901, PLR0912
        self,
        max_bytes: int,
        cancellable: Cancellable | None,
        *,
        passcred: bool = False,
        passpidfd: bool = False,
    ) -> Received:
        """One recvmsg. Nothing between it and the return can be cancelled."""
        if self.busy:
            raise ConnectionBusyError("another task is receiving from this connection")
        self.busy = True
        try:
            if cancellable is not None:
                await checkpoint_cancellable(cancellable)
            await checkpoint_if_cancelled()
            if self.ahead:
                received = self._take_ahead()
                await cancel_shielded_checkpoint()
                return received
            raw = self.raw
            if passcred and _PASSCRED is not None and not raw.getsockopt(_SOL_SOCKET, _PASSCRED):
                # As _enable_passcred(), without the call.
                raw.setsockopt(_SOL_SOCKET, _PASSCRED, 1)
                self._temporary_options.append(_PASSCRED)
            if passpidfd:
                self._enable_passpidfd()
            try:
                received = raw.recvmsg(max_bytes, _ROOM, _FLAGS)
            except BlockingIOError:
                pass
            else:
                await cancel_shielded_checkpoint()
                return received
            while True:
                try:
                    if cancellable is None:
                        await wait_readable(raw)
                    else:
                        await wait_cancellable(wait_readable, raw, cancellable)
                    return raw.recvmsg(max_bytes, _ROOM, _FLAGS)
                except BlockingIOError:
                    continue
        except FAILURES as exc:
            raise await self.failed(exc) from exc
        finally:
            if self._temporary_options:
                self._restore_options()
            self.busy = False

    def read_ahead(self, count: int) -> None:
        """Read up to ``count`` single bytes that are there already, each with what it brings.

        They serve the next receives, whichever these are, and so nothing may be lost that
        would not have been lost otherwise. SO_PASSCRED is on meanwhile, for credentials that
        the peer sent explicitly. It ends behind the first message that is not just one
        descriptor, and leaves as many descriptors free as such a message may bring.
        """
        count = min(count, _kernel.free_descriptors() - _kernel.SCM_MAX_FD)
        if count <= 0 or self.is_closed():
            return
        try:
            self._enable_passcred()
        except OSError:
            # Without it credentials could be lost: nothing is read that nobody has asked for.
            return
        ahead = self.ahead = self.ahead or deque()
        recvmsg, lone_descriptor = self.raw.recvmsg, _ancillary.lone_descriptor
        try:
            for _ in range(count):
                try:
                    received: Received = recvmsg(1, _ROOM, _FLAGS)
                except BlockingIOError:
                    return
                except OSError as exc:
                    # The kernel says it only once.
                    ahead.append(exc)
                    return
                if not received[0]:
                    # The end of the stream can be read again.
                    _ancillary.parse(received[1], received[2]).close()
                    return
                fd = lone_descriptor(received)
                ahead.append((fd, received))
                if fd < 0:
                    return
        finally:
            self._restore_options()

    def ahead_that_fits(self, room: int) -> Iterator[Received]:
        """Take what is there already and has descriptors, ``room`` of them at the most."""
        if room and not self.ahead:
            self.read_ahead(room)
        while room and self.ahead:
            first = self.ahead[0]
            count = 0 if isinstance(first, OSError) else _ancillary.count_descriptors(first[1])
            if not 0 < count <= room:
                return
            room -= count
            yield self._take_ahead()

    def _take_ahead(self) -> Received:
        assert self.ahead  # noqa: S101 - callers have looked
        first = self.ahead.popleft()
        if isinstance(first, OSError):
            raise first
        return first[1]

    def release(self) -> None:
        """Leave nothing behind before the socket is closed: no descriptor and no option."""
        if self._temporary_options:
            self._restore_options()
        self._drop_ahead()

    def _drop_ahead(self) -> int:
        """Close all descriptors that were read ahead; return how many."""
        count = 0
        while self.ahead:
            first = self.ahead.popleft()
            if not isinstance(first, OSError):
                _, (_, ancdata, flags, _) = first
                parsed = _ancillary.parse(ancdata, flags)
                count += len(parsed.fds)
                parsed.close()
        return count

    def __del__(self) -> None:
        count = self._drop_ahead()
        if count:
            warnings.warn(
                f"a connection was dropped with {count} descriptors that fds() had read ahead; "
                "they were closed; close the connection",
                ResourceWarning,
                stacklevel=2,
            )

    def _enable_passcred(self) -> None:
        raw = self.raw
        if _PASSCRED is not None and not raw.getsockopt(_SOL_SOCKET, _PASSCRED):
            raw.setsockopt(_SOL_SOCKET, _PASSCRED, 1)
            self._temporary_options.append(_PASSCRED)

    def _enable_passpidfd(self) -> None:
        option = _kernel.required(_kernel.SO_PASSPIDFD, "SO_PASSPIDFD")
        try:
            if not self.raw.getsockopt(_SOL_SOCKET, option):
                self.raw.setsockopt(_SOL_SOCKET, option, 1)
                self._temporary_options.append(option)
        except OSError as exc:
            if exc.errno != errno.ENOPROTOOPT:
                raise
            raise NotSupportedError("this kernel has no SO_PASSPIDFD (Linux 6.5)") from exc

    def _restore_options(self) -> None:
        """Switch off what was switched on here: other processes may hold the same socket."""
        raw = self.raw
        if raw.fileno() != -1:
            for option in self._temporary_options:
                raw.setsockopt(_SOL_SOCKET, option, 0)
        self._temporary_options.clear()


class RefusingReceiver(Receiver):
    """One that takes no descriptors.

    It has the kernel refuse them where it can (``SO_PASSRIGHTS``, Linux 6.16), and refuses
    those itself that come elsewhere, or were on their way before.
    """

    __slots__ = ()

    def __init__(self, socket: trio.socket.SocketType, raw: stdlib_socket.socket) -> None:
        super().__init__(socket, raw)
        disable_passrights(raw)

    @enable_ki_protection
    async def receive(
        self,
        max_bytes: int,
        cancellable: Cancellable | None,
        *,
        passcred: bool = False,
        passpidfd: bool = False,
    ) -> Received:
        """One recvmsg, as above, of a message without descriptors."""
        received = await super().receive(
            max_bytes, cancellable, passcred=passcred, passpidfd=passpidfd
        )
        _ancillary.check_no_descriptors(received)
        return received

    def read_ahead(self, count: int) -> None:
        """Read nothing ahead: no descriptors are expected."""
