"""Control messages: packed for sendmsg, unpacked and checked after recvmsg. No I/O.

Invariant: every file descriptor that recvmsg returned is either returned to the caller, or
handed to _closing.

Sources: unix(7), cmsg(3), recvmsg(2)
"""

from __future__ import annotations

import logging
import os
import struct
import sys
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from . import _kernel
from ._closing import close_fds
from ._credentials import Credentials, credentials_from_ucred
from ._fds import SIGN_BYTE, none_negative
from ._owner import DescriptorOwner
from ._ucred import LAYOUTS, PLATFORM, PLATFORMS
from .errors import (
    DescriptorsTruncatedError,
    NotSupportedError,
    UnexpectedControlMessageError,
    UnexpectedDescriptorsError,
)

if TYPE_CHECKING:
    from ._ucred import MessageKind

logger: Final = logging.getLogger("trio_unixconn")

# What socket.recvmsg returns, but for the address, which a connected socket has no use for.
ControlMessage: TypeAlias = tuple[int, int, bytes]
# "own" are those of this process at the moment of sending.
SentCredentials: TypeAlias = Credentials | Literal["own"]
RawMessage: TypeAlias = tuple[bytes, list[ControlMessage], int, object]

_SOL_SOCKET: Final = _kernel.SOL_SOCKET
_SCM_RIGHTS: Final = _kernel.SCM_RIGHTS
_CREDENTIALS: Final = None if PLATFORM is None else PLATFORM.message
_MSG_CTRUNC: Final = _kernel.MSG_CTRUNC
# Whether descriptors arrive close-on-exec, with nothing left to do to them.
_ARRIVE_CLOEXEC: Final = bool(_kernel.MSG_CMSG_CLOEXEC)
MOST_DESCRIPTORS: Final = _kernel.SCM_MAX_FD
# (level, type) of the messages that a process sends; None where it cannot.
RIGHTS: Final = None if _SCM_RIGHTS is None else (_SOL_SOCKET, _SCM_RIGHTS)
CREDENTIALS: Final = (
    (_SOL_SOCKET, _CREDENTIALS.kind)
    if _CREDENTIALS and _CREDENTIALS.kind is not None and _CREDENTIALS.sendable
    else None
)
_HAS_SENDMSG: Final = _kernel.HAS_SENDMSG
# Linux's own layout has a short way: all others take the long one.
_LINUX: Final = PLATFORMS["linux"].message
_OWN: Final = (
    _kernel.SCM_CREDENTIALS
    if _CREDENTIALS is _LINUX and _kernel.HAS_SENDMSG and hasattr(os, "geteuid")
    else None
)
_ucred: Final = struct.Struct("iII")
_int: Final = struct.Struct("i")
# How many bytes of a message an error quotes.
_QUOTED: Final = 16


def pack(fds: Sequence[int], credentials: SentCredentials | None) -> list[ControlMessage]:
    """Return the control messages of one message.

    Raises:
      NotSupportedError: the platform has no such message.
    """
    if len(fds) == 1 and _SCM_RIGHTS is not None:
        # The most frequent messages, without another call.
        messages: list[ControlMessage] = [(_SOL_SOCKET, _SCM_RIGHTS, _int.pack(fds[0]))]
    elif isinstance(fds, array) and fds and _SCM_RIGHTS is not None:
        messages = [(_SOL_SOCKET, _SCM_RIGHTS, fds.tobytes())]
    else:
        messages = [pack_rights(fds)] if fds else []
    if credentials == "own":
        messages.append(pack_own_credentials())
    elif credentials is not None:
        messages.append(pack_credentials(credentials))
    return messages


def pack_rights(fds: Sequence[int]) -> ControlMessage:
    """Return the control message that carries these file descriptors, at most SCM_MAX_FD.

    Raises:
      NotSupportedError: the platform passes no file descriptors.
    """
    if _SCM_RIGHTS is None or not _HAS_SENDMSG:
        raise NotSupportedError(f"{sys.platform} with this Python cannot pass file descriptors")
    if len(fds) == 1:
        return _SOL_SOCKET, _SCM_RIGHTS, _int.pack(fds[0])
    numbers = fds if isinstance(fds, array) else array("i", fds)
    return _SOL_SOCKET, _SCM_RIGHTS, numbers.tobytes()


def pack_credentials(value: Credentials) -> ControlMessage:
    """Return the control message that carries ``value``.

    Raises:
      NotSupportedError: a process cannot send credentials on this platform.
    """
    message = _CREDENTIALS
    if message is None or message.kind is None or not message.sendable or not _kernel.HAS_SENDMSG:
        raise NotSupportedError(
            f"{sys.platform} with this Python has no control message for credentials; "
            "the peer can ask its socket instead (get_peer_credentials)"
        )
    return _SOL_SOCKET, message.kind, value.to_native(message.layout)


def pack_own_credentials() -> ControlMessage:
    """Return the control message that carries the credentials of this process.

    Raises:
      NotSupportedError: as :func:`pack_credentials`.
    """
    if _OWN is None:
        return pack_credentials(Credentials())
    # Without a Credentials object, which takes four times as long.
    return _SOL_SOCKET, _OWN, _ucred.pack(os.getpid(), os.geteuid(), os.getegid())


################################################################
# Unpacking
################################################################

_FDS: Final = 0
_PIDFDS: Final = 1
_SENDER: Final = 2
_IGNORED: Final = 3


def known_messages(credentials: MessageKind | None) -> dict[tuple[int, int], int]:
    """Return the table of control messages: (level, type), and what this module does with it.

    A peer can only send file descriptors and credentials. The kernel adds the others because
    this side, or another process that shares the socket, set an option. They are not the
    peer's fault, so they never make a message unexpected.
    """
    kinds: dict[int | None, int] = {
        _kernel.SCM_SECURITY: _IGNORED,
        _kernel.SCM_INQ: _IGNORED,
        **dict.fromkeys(_kernel.SCM_TIMESTAMPS, _IGNORED),
        _kernel.SCM_PIDFD: _PIDFDS,
        _SCM_RIGHTS: _FDS,
        None if credentials is None else credentials.kind: _SENDER,
    }
    return {(_SOL_SOCKET, kind): use for kind, use in kinds.items() if kind is not None}


_KNOWN: Final = known_messages(_CREDENTIALS)
# Unknown kinds that the log has mentioned.
_logged: Final[set[tuple[int, int]]] = set()


class Received(DescriptorOwner):
    """One message that was received. It owns its file descriptors.

    Attributes:
      data: the bytes.
      fds: the file descriptors of all SCM_RIGHTS messages, in order.
      pidfds: the pidfds of the sender; the kernel adds at most one (SO_PASSPIDFD).
      credentials: the sender's; None if there are none. Linux shows process id 0 if the sender
        attached none, and GLib reads it in the same way.
      truncated: whether the kernel dropped something (MSG_CTRUNC), or put an error number in
        the place of a file descriptor.
      unknown: (level, type) of each control message that is not known or is malformed.
    """

    __slots__ = ("credentials", "data", "fds", "pidfds", "truncated", "unknown")

    def __init__(self, data: bytes) -> None:
        self.data: bytes = data
        self.fds: list[int] = []
        self.pidfds: list[int] = []
        self.credentials: Credentials | None = None
        self.truncated: bool = False
        self.unknown: tuple[tuple[int, int], ...] = ()

    def close(self) -> None:
        """Close all file descriptors; closing twice is allowed."""
        fds, self.fds = self.fds, []
        if fds:
            close_fds(fds)
        self.close_pidfds()

    def close_pidfds(self) -> None:
        """Close the pidfds. The kernel made them, so their close(2) cannot block."""
        while self.pidfds:
            os.close(self.pidfds.pop())

    def __str__(self) -> str:
        """Return the bytes and the control messages, for an error message."""
        data = self.data
        text = repr(data) if len(data) <= _QUOTED else f"{data[:_QUOTED]!r}... ({len(data)} bytes)"
        parts: list[str] = []
        if self.fds:
            plural = "" if len(self.fds) == 1 else "s"
            parts.append(f"{len(self.fds)} file descriptor{plural} (closed)")
        if self.credentials is not None:
            parts.append("credentials")
        return f"{text} with {' and '.join(parts)}" if parts else text


def unpack(message: RawMessage) -> Received:
    """Sort out what recvmsg returned.

    A control message that is not in the table is ignored, and logged once for each kind. If a
    later kernel puts a file descriptor into such a message, it cannot be recognized here, and
    stays open.
    """
    data, ancdata, flags, _ = message
    received = Received(data)
    if flags & _MSG_CTRUNC:
        received.truncated = True
    for level, kind, payload in ancdata:
        use = _KNOWN.get((level, kind))
        if use == _FDS:
            received.fds += _slots(payload)
            if not none_negative(payload):
                # The kernel could not install a descriptor, and says why in its place.
                received.truncated = True
                received.fds = [fd for fd in received.fds if fd >= 0]
        elif use == _PIDFDS:
            received.pidfds += [slot for slot in _slots(payload) if slot >= 0]
        elif use == _SENDER:
            _unpack_credentials(received, (level, kind), payload)
        elif use is None:
            _note_unknown(received, (level, kind))
    if not _ARRIVE_CLOEXEC:
        # Another thread can fork and exec before this. Only the kernel could prevent that.
        for fd in (*received.fds, *received.pidfds):
            os.set_inheritable(fd, False)
    return received


def _unpack_credentials(received: Received, kind: tuple[int, int], payload: bytes) -> None:
    assert _CREDENTIALS is not None  # the table says so
    if kind[1] == _OWN and len(payload) == _ucred.size and received.credentials is None:
        # The same bytes as in the peer's last message, mostly.
        received.credentials = credentials_from_ucred(payload)
        if received.credentials is not None:
            return
    try:
        found = Credentials(*LAYOUTS[_CREDENTIALS.layout].unpack(payload))
    except ValueError:
        _note_unknown(received, kind)
        return
    if found.pid and received.credentials is not None:
        _note_unknown(received, kind)
    elif found.pid:
        received.credentials = found


def _note_unknown(received: Received, kind: tuple[int, int]) -> None:
    received.unknown += (kind,)
    if kind not in _logged:
        _logged.add(kind)
        logger.warning(
            "ignoring control messages of level %d, type %d: unknown or malformed", *kind
        )


def _slots(payload: bytes) -> list[int]:
    """Return the ints of a control message, without trailing bytes that are too few for one."""
    if len(payload) == _int.size:
        return [*_int.unpack(payload)]
    return array("i", payload[: len(payload) & ~3]).tolist()


def lone_fd(message: RawMessage) -> int:
    """Return the file descriptor of a message that has nothing else, but for credentials.

    This is the fast path, which builds nothing. It returns -1 for every other message;
    :func:`unpack` may still find it good.
    """
    _, ancdata, flags, _ = message
    if len(ancdata) == 1:
        level, kind, payload = ancdata[0]
    elif len(ancdata) == 2 and ancdata[0][1] == _OWN and ancdata[0][0] == _SOL_SOCKET:
        level, kind, payload = ancdata[1]
    else:
        return -1
    if (
        kind == _SCM_RIGHTS
        and level == _SOL_SOCKET
        and len(payload) == 4
        and not flags & _MSG_CTRUNC
        and _ARRIVE_CLOEXEC
    ):
        fd: int
        (fd,) = _int.unpack(payload)
        return fd
    return -1


def only_fds(message: RawMessage) -> list[int] | None:
    """Return the file descriptors of a message that has nothing else, even if it has none.

    As :func:`lone_fd`, for receive_message() and receive_fds(): by way of unpack() the former took
    6 % longer.
    """
    _, ancdata, flags, _ = message
    if len(ancdata) > 1 or flags & _MSG_CTRUNC or not _ARRIVE_CLOEXEC:
        return None
    if not ancdata:
        return []
    level, kind, payload = ancdata[0]
    # none_negative() and _slots(), without the calls.
    if kind == _SCM_RIGHTS and level == _SOL_SOCKET and payload[SIGN_BYTE::4].isascii():
        try:
            return array("i", payload).tolist()
        except ValueError:
            # Trailing bytes, which unpack() ignores.
            pass
    return None


################################################################
# What an operation expects. Each closes all file descriptors if it raises.
################################################################


def expect_fd(message: RawMessage) -> int:
    """Return the file descriptor of a message that must have exactly one.

    Raises:
      UnexpectedControlMessageError: none, or several.
      DescriptorsTruncatedError: the kernel dropped some.
    """
    fd = lone_fd(message)
    if fd >= 0:
        return fd
    received = unpack(message)
    if len(received.fds) != 1 or received.truncated:
        raise _unexpected("one file descriptor", received)
    received.close_pidfds()
    return received.fds[0]


def expect_fds(message: RawMessage, max_fds: int) -> list[int]:
    """Return the file descriptors of a message that must have between 1 and ``max_fds``.

    :func:`only_fds` is faster, for a message that has nothing else.

    Raises:
      UnexpectedControlMessageError: none, or more.
      DescriptorsTruncatedError: the kernel dropped some.
    """
    received = unpack(message)
    if received.truncated or not 1 <= len(received.fds) <= max_fds:
        raise _unexpected(
            "one file descriptor" if max_fds == 1 else f"between 1 and {max_fds} file descriptors",
            received,
        )
    received.close_pidfds()
    return received.fds


def expect_message(
    message: RawMessage, max_fds: int, *, received_by: str = "connection"
) -> Received:
    """Return a message that may have up to ``max_fds`` file descriptors.

    Args:
      received_by: what has received it, for errors.

    Raises:
      UnexpectedControlMessageError: more.
      DescriptorsTruncatedError: the kernel dropped some.
    """
    received = unpack(message)
    if received.truncated or len(received.fds) > max_fds:
        raise _unexpected(
            f"at most {max_fds} file descriptors" if max_fds else "no file descriptors",
            received,
            received_by,
        )
    return received


def expect_credentials(message: RawMessage) -> Credentials | None:
    """Return the credentials of a message that must have no file descriptors, None without any.

    Raises:
      UnexpectedControlMessageError: it has file descriptors.
      DescriptorsTruncatedError: it had, and the kernel dropped some.
    """
    _, ancdata, flags, _ = message
    if len(ancdata) == 1 and not flags & _MSG_CTRUNC:
        level, kind, payload = ancdata[0]
        if kind == _OWN and level == _SOL_SOCKET and len(payload) == _ucred.size:
            known = credentials_from_ucred(payload)
            if known is not None:
                return known
    received = unpack(message)
    if received.fds or received.truncated:
        raise _unexpected("credentials", received)
    received.close_pidfds()
    return received.credentials


def expect_bytes(message: RawMessage) -> bytes:
    """Return the bytes of a message that must have no file descriptors.

    Raises:
      UnexpectedDescriptorsError: it has some, or had.
    """
    received = unpack(message)
    if received.fds or received.truncated:
        raise _unexpected_descriptors(
            "expected bytes",
            received,
            "receive file descriptors with receive_fd(), receive_fds() or receive_message()",
        )
    received.close_pidfds()
    return received.data


def expect_no_fds(message: RawMessage) -> None:
    """Raise if a message has file descriptors; leave everything else to the caller.

    Raises:
      UnexpectedDescriptorsError: it has some, or had.
    """
    _, ancdata, flags, _ = message
    if flags & _MSG_CTRUNC or any(each[:2] == RIGHTS for each in ancdata):
        raise _unexpected_descriptors(
            "this connection does not accept file descriptors (receive_descriptors=False)",
            unpack(message),
            "pass receive_descriptors=True to accept them",
        )


def _unexpected(
    expected: str, received: Received, received_by: str = "connection"
) -> UnexpectedControlMessageError | DescriptorsTruncatedError:
    text, arrived = str(received), len(received.fds)
    received.close()
    if received.truncated:
        return DescriptorsTruncatedError(received.data, arrived, received.credentials)
    return UnexpectedControlMessageError(
        f"expected {expected}, got {text}; the bytes are in .data and the {received_by} is still "
        "usable",
        received.data,
        received.credentials,
    )


def _unexpected_descriptors(
    expected: str, received: Received, remedy: str
) -> UnexpectedDescriptorsError:
    text = str(received)
    if not received.fds:
        text += " with file descriptors that were lost (RLIMIT_NOFILE)"
    received.close()
    return UnexpectedDescriptorsError(
        f"{expected}, got {text}; the bytes are in .data; {remedy}",
        received.data,
        received.credentials,
    )
