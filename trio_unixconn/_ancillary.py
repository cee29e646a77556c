"""Control messages to bytes and back, and what may have come with what.

The rule of this file: no I/O (the one thing it does to a descriptor is to close what nobody
will get), and every descriptor that recvmsg returned is accounted for here: it is either the
one that was due, and returned, or it is closed.

Sources: unix(7), cmsg(3), recvmsg(2).
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
from array import array
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import attrs

from . import _kernel
from ._credentials import Credentials, credentials_from_ucred
from ._fds import none_negative
from ._owner import DescriptorOwner
from ._ucred import LAYOUTS, PLATFORM, PLATFORMS
from .errors import (
    DescriptorsTruncatedError,
    NotSupportedError,
    UnexpectedControlMessageError,
    UnexpectedDescriptorsError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# What socket.recvmsg returns, but for the address, which a connected socket has no use for.
ControlMessage: TypeAlias = "tuple[int, int, bytes]"
# "own" are those of this process at the moment of sending.
SentCredentials: TypeAlias = "Credentials | Literal['own']"
Received: TypeAlias = "tuple[bytes, list[ControlMessage], int, object]"

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
# What comes because this side has asked for it, and not because the peer sent it.
_ASKED_FOR: Final = {
    _kernel.SCM_PIDFD,
    _kernel.SCM_SECURITY,
    None if _CREDENTIALS is None else _CREDENTIALS.kind,
}
# Linux's own layout has a short way: all others take the long one.
_LINUX: Final = PLATFORMS["linux"].message
_OWN: Final = (
    _kernel.SCM_CREDENTIALS
    if _CREDENTIALS is _LINUX and _kernel.HAS_SENDMSG and hasattr(os, "geteuid")
    else None
)
_ucred: Final = struct.Struct("iII")
_MOMENT: Final = 0.01
_NO_LINGER: Final = struct.pack("ii", 0, 0)
_int: Final = struct.Struct("i")


def pack(fds: Sequence[int], credentials: SentCredentials | None) -> list[ControlMessage]:
    """Return the control messages of one message.

    Raises:
      NotSupportedError: the platform has no such message.
    """
    if len(fds) == 1 and _SCM_RIGHTS is not None:
        # The most frequent message, without another call.
        messages: list[ControlMessage] = [(_SOL_SOCKET, _SCM_RIGHTS, _int.pack(fds[0]))]
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


@attrs.frozen
class Parsed(DescriptorOwner):
    """The control messages of one recvmsg.

    Attributes:
      fds: the descriptors of all SCM_RIGHTS messages, in order; this value owns them.
      pidfds: those of SCM_PIDFD, likewise owned.
      credentials: the valid credentials, one for each such message.
      others: (level, type) of messages of no known kind, malformed ones among them.
      truncated: whether the kernel dropped something (MSG_CTRUNC), or put an error number in
        the place of a descriptor.
    """

    fds: list[int]
    pidfds: list[int]
    credentials: list[Credentials]
    others: list[tuple[int, int]]
    truncated: bool

    def close(self, *, but: int = -1) -> None:
        """Close every descriptor, except ``but``."""
        _close_each(self.pidfds)
        close_all(fd for fd in self.fds if fd != but)

    def __str__(self) -> str:
        """Say what came, for an error message."""
        parts: list[str] = []
        if self.fds:
            parts.append("1 descriptor" if len(self.fds) == 1 else f"{len(self.fds)} descriptors")
        if self.credentials:
            parts.append("credentials")
        parts += [f"a control message of level {level}, type {kind}" for level, kind in self.others]
        return " and ".join(parts) or "no control message"


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that arrived and that nobody will get.

    The peer chose what is behind them, and closing can wait: for the rest of a TCP connection
    to be sent (SO_LINGER, which is switched off for them), or for a file server (FUSE, NFS).
    So a thread closes what is no socket, and who called waits for it no longer than a moment;
    mostly it is done by then.
    """
    files = [fd for fd in fds if not _close_socket(fd)]
    if files:
        thread = threading.Thread(target=_close_each, args=(files,), daemon=True)
        thread.start()
        thread.join(_MOMENT)


def _close_socket(fd: int) -> bool:
    """Close ``fd`` without lingering, if it is a socket; whether it was."""
    try:
        # Told a family and a type, it does not look what the descriptor is.
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)
    except OSError:
        return False
    with suppress(OSError):
        sock.setsockopt(_SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    with suppress(OSError):
        sock.close()
    return True


def _close_each(fds: list[int]) -> None:
    for fd in fds:
        # An error is about bytes that somebody wrote there before; the descriptor is closed
        # all the same (close(2)), and the rest must be, too.
        with suppress(OSError):
            os.close(fd)


def parse(ancdata: list[ControlMessage], flags: int) -> Parsed:
    """Sort out what recvmsg returned.

    A slot with a negative number is an error of the kernel in a descriptor's place and
    counts as truncation; trailing bytes too few for a descriptor are none. Credentials of
    pid 0 say that the peer sent none (GLib reads them the same way).
    """
    fds: list[int] = []
    pidfds: list[int] = []
    found: list[Credentials] = []
    others: list[tuple[int, int]] = []
    truncated = bool(flags & _MSG_CTRUNC)
    for level, kind, payload in ancdata:
        if level == _SOL_SOCKET and kind in (_SCM_RIGHTS, _kernel.SCM_PIDFD):
            slots = _slots(payload)
            good = slots if none_negative(payload) else [slot for slot in slots if slot >= 0]
            truncated = truncated or (kind == _SCM_RIGHTS and len(good) < len(slots))
            (fds if kind == _SCM_RIGHTS else pidfds).extend(good)
        elif level == _SOL_SOCKET and _CREDENTIALS and kind == _CREDENTIALS.kind:
            try:
                came = Credentials(*LAYOUTS[_CREDENTIALS.layout].unpack(payload))
            except ValueError:
                others.append((level, kind))
            else:
                if came.pid:
                    found.append(came)
        elif (level, kind) != (_SOL_SOCKET, _kernel.SCM_SECURITY):
            # A security label comes because this side asked for it (SO_PASSSEC), like a
            # pidfd (SO_PASSPIDFD): nothing that the peer did.
            others.append((level, kind))
    if not _ARRIVE_CLOEXEC:
        # A window in which another thread's fork and exec inherits them is left, which only
        # the kernel could close.
        for fd in (*fds, *pidfds):
            os.set_inheritable(fd, False)
    return Parsed(fds, pidfds, found, others, truncated)


def _slots(payload: bytes) -> list[int]:
    """Return the numbers in a message of descriptors; trailing bytes too few for one are none."""
    slots = array("i")
    slots.frombytes(payload[: len(payload) & ~3])
    return slots.tolist()


def one_descriptor(received: Received) -> int:
    """Return the descriptor of a message that must carry exactly one.

    Credentials beside it are let pass: the kernel adds them to every message once this side
    has asked for them (SO_PASSCRED), whatever the peer did.

    Raises:
      UnexpectedControlMessageError: anything else came; all of it is closed.
      DescriptorsTruncatedError: the kernel dropped descriptors.
    """
    fd = lone_descriptor(received)
    if fd >= 0:
        return fd
    data, ancdata, flags, _ = received
    parsed = parse(ancdata, flags)
    if len(parsed.fds) == 1 and not parsed.truncated and not parsed.others:
        parsed.close(but=parsed.fds[0])
        return parsed.fds[0]
    raise _refusal("one descriptor was due", data, parsed)


def lone_descriptor(received: Received) -> int:
    """Return the descriptor of a message that is just one, alone or behind credentials.

    This is the common case, without building anything. -1 for every other message, which
    :func:`one_descriptor` looks at in full; it may still be fine.
    """
    _, ancdata, flags, _ = received
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


def only_rights(received: Received, most: int) -> list[int] | None:
    """Return the descriptors of a message that has up to ``most``, or none, and nothing else.

    This is the common case, without building anything. None for every other message, which
    :func:`parse` looks at in full; it may still be fine.
    """
    _, ancdata, flags, _ = received
    if len(ancdata) > 1 or flags & _MSG_CTRUNC or not _ARRIVE_CLOEXEC:
        return None
    if not ancdata:
        return []
    level, kind, payload = ancdata[0]
    if (
        kind == _SCM_RIGHTS
        and level == _SOL_SOCKET
        and len(payload) <= 4 * most
        and none_negative(payload)
    ):
        return _slots(payload)
    return None


def count_descriptors(received: Received) -> int:
    """Return how many descriptors came with a message; 0 if :func:`parse` would find fault."""
    _, ancdata, flags, _ = received
    count = 0
    for level, kind, payload in ancdata:
        if (level, kind) == RIGHTS:
            if not none_negative(payload):
                return 0
            count += len(payload) // 4
        elif level != _SOL_SOCKET or kind not in _ASKED_FOR:
            return 0
    return 0 if flags & _MSG_CTRUNC else count


def only_credentials(received: Received) -> Credentials | None:
    """Return the credentials of a message that must carry nothing else, None without any.

    Raises:
      UnexpectedControlMessageError: anything else came; all of it is closed.
      DescriptorsTruncatedError: the kernel dropped descriptors.
    """
    data, ancdata, flags, _ = received
    # The common case without building anything but what is returned.
    if len(ancdata) == 1:
        level, kind, payload = ancdata[0]
        if kind == _OWN and level == _SOL_SOCKET and len(payload) == 12 and not flags & _MSG_CTRUNC:
            known = credentials_from_ucred(payload)
            if known is not None:
                return known
    parsed = parse(ancdata, flags)
    if parsed.fds or parsed.others or parsed.truncated or len(parsed.credentials) > 1:
        raise _refusal("credentials were due", data, parsed)
    parsed.close()
    return parsed.credentials[0] if parsed.credentials else None


def up_to_descriptors(received: Received, most: int) -> list[int]:
    """Return the descriptors of a message that must carry between 1 and ``most``.

    Raises:
      UnexpectedControlMessageError: none, more, or anything else; all of it is closed.
      DescriptorsTruncatedError: the kernel dropped descriptors.
    """
    fds = only_rights(received, most)
    if fds:
        return fds
    data, ancdata, flags, _ = received
    parsed = parse(ancdata, flags)
    if parsed.truncated or parsed.others or not 1 <= len(parsed.fds) <= most:
        raise _refusal(f"between 1 and {most} descriptors were due", data, parsed)
    _close_each(parsed.pidfds)
    return parsed.fds


def whole_message(received: Received, most: int) -> Parsed:
    """Return what came with a message that may carry up to ``most`` descriptors.

    The caller owns what is in it.

    Raises:
      UnexpectedControlMessageError: more descriptors; all are closed.
      DescriptorsTruncatedError: the kernel dropped descriptors.
    """
    data, ancdata, flags, _ = received
    parsed = parse(ancdata, flags)
    if parsed.truncated or len(parsed.fds) > most:
        due = "no descriptors were" if not most else f"at most {most} descriptors were"
        raise _refusal(f"{due} due", data, parsed)
    return parsed


def only_bytes(received: Received) -> bytes:
    """Return the bytes of a message that must carry no descriptor.

    Raises:
      UnexpectedDescriptorsError: descriptors came, or would have had there been room; those
        that came are closed.
    """
    data, ancdata, flags, _ = received
    parsed = parse(ancdata, flags)
    parsed.close()
    if parsed.fds or parsed.truncated:
        what = str(parsed) if parsed.fds else "descriptors, for which there was no free slot,"
        raise UnexpectedDescriptorsError(
            f"plain bytes were due, but {what} came with {_some(data)}; they are closed, the bytes "
            "are in .data; call receive_fd() at the place where the peer sends descriptors",
            data,
        )
    return data


def check_no_descriptors(received: Received) -> None:
    """Raise if a message that may carry anything but descriptors carries some.

    Raises:
      UnexpectedDescriptorsError: descriptors came; they are closed.
    """
    data, ancdata, flags, _ = received
    if not flags & _MSG_CTRUNC and all(each[:2] != RIGHTS for each in ancdata):
        return
    parse(ancdata, flags).close()
    raise UnexpectedDescriptorsError(
        f"this connection takes no descriptors (receive_descriptors=False), but some came with "
        f"{_some(data)}; they are closed, the bytes are in .data",
        data,
    )


def _refusal(
    due: str, data: bytes, parsed: Parsed
) -> UnexpectedControlMessageError | DescriptorsTruncatedError:
    parsed.close()
    if parsed.truncated:
        return DescriptorsTruncatedError(data, len(parsed.fds))
    closed = " (closed)" if parsed.fds else ""
    return UnexpectedControlMessageError(
        f"{due}, but {_some(data)} came with {parsed}{closed}; the bytes are in .data and the "
        "stream goes on behind them; agree with the peer on what is sent when",
        data,
    )


def _some(data: bytes) -> str:
    return f"{data[:16]!r}" if len(data) <= 16 else f"{data[:16]!r}... ({len(data)} bytes)"
