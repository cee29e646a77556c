"""Control messages to bytes and back, and what may have come with what.

The rule of this file: no I/O (the one thing it does to a descriptor is to close what nobody
will get), and every descriptor that recvmsg returned is accounted for here: it is either the
one that was due, and returned, or it is closed.

Sources: unix(7), cmsg(3), recvmsg(2).
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterable
from typing import Final, Protocol, TypeAlias

import attrs

from . import _kernel
from ._credentials import LAYOUTS, PLATFORM, Credentials
from .errors import (
    DescriptorsTruncatedError,
    NotSupportedError,
    UnexpectedControlMessageError,
    UnexpectedDescriptorsError,
)

# What socket.recvmsg returns, but for the address, which a connected socket has no use for.
ControlMessage: TypeAlias = "tuple[int, int, bytes]"
Received: TypeAlias = "tuple[bytes, list[ControlMessage], int, object]"

_SOL_SOCKET: Final = _kernel.SOL_SOCKET
_SCM_RIGHTS: Final = _kernel.SCM_RIGHTS
_CREDENTIALS: Final = None if PLATFORM is None else PLATFORM.message
_LARGEST_DESCRIPTOR: Final = 2**31 - 1
_int: Final = struct.Struct("i")


class HasFileno(Protocol):
    """Anything with a descriptor beneath: files, sockets, trio's sockets and files."""

    def fileno(self) -> int:
        """Return the descriptor's number."""
        ...


FileDescriptor: TypeAlias = "int | HasFileno"


def descriptor_number(fd: FileDescriptor) -> int:
    """Return the number of ``fd``, an int or anything with ``fileno()``.

    Whether the number is open the kernel says when it is sent (EBADF).

    Raises:
      TypeError: a bool, or neither an int nor an object with ``fileno()``.
      ValueError: a number that no descriptor can have, -1 (as of a closed socket) included;
        also from ``fileno()`` of a closed file.
    """
    number: object = fd
    if not isinstance(fd, int):
        fileno = getattr(fd, "fileno", None)
        if not callable(fileno):
            raise TypeError(
                "a descriptor is due: an int, or an object with fileno(), "
                f"not {type(fd).__name__} ({fd!r})"
            )
        number = fileno()
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(
            f"a descriptor is due: an int, or an object with fileno(), not {number!r}"
            + ("" if number is fd else f" as fileno() of {fd!r} returned")
        )
    if not 0 <= number <= _LARGEST_DESCRIPTOR:
        raise ValueError(
            f"no descriptor has the number {number}"
            + ("" if number is fd else f", which fileno() of {fd!r} returned: it is closed")
        )
    return int(number)


def rights(number: int) -> ControlMessage:
    """Return the control message that carries one descriptor.

    Raises:
      NotSupportedError: the platform passes no descriptors.
    """
    if _SCM_RIGHTS is None or not _kernel.HAS_SENDMSG:
        raise NotSupportedError(f"{sys.platform} with this Python cannot pass descriptors")
    return _SOL_SOCKET, _SCM_RIGHTS, _int.pack(number)


def credentials(value: Credentials) -> ControlMessage:
    """Return the control message that carries ``value``.

    Raises:
      NotSupportedError: a process cannot send credentials on this platform.
    """
    message = _CREDENTIALS
    if message is None or message.kind is None or not message.sendable or not _kernel.HAS_SENDMSG:
        raise NotSupportedError(
            f"{sys.platform} with this Python has no message to send credentials with; "
            "the peer can ask its socket instead (get_peer_credentials)"
        )
    return _SOL_SOCKET, message.kind, value.to_native(message.layout)


@attrs.frozen
class Parsed:
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
        close_all(fd for fd in (*self.fds, *self.pidfds) if fd != but)

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
    """Close descriptors that arrived and that nobody will get."""
    for fd in fds:
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
    truncated = bool(flags & _kernel.MSG_CTRUNC)
    for level, kind, payload in ancdata:
        if level == _SOL_SOCKET and kind in (_SCM_RIGHTS, _kernel.SCM_PIDFD):
            slots = [slot for (slot,) in _int.iter_unpack(payload[: len(payload) & ~3])]
            good = [slot for slot in slots if slot >= 0]
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
    if not _kernel.MSG_CMSG_CLOEXEC:
        # A window in which another thread's fork and exec inherits them is left, which only
        # the kernel could close.
        for fd in (*fds, *pidfds):
            os.set_inheritable(fd, False)
    return Parsed(fds, pidfds, found, others, truncated)


def one_descriptor(received: Received) -> int:
    """Return the descriptor of a message that must carry exactly one.

    Credentials beside it are let pass: the kernel adds them to every message once this side
    has asked for them (SO_PASSCRED), whatever the peer did.

    Raises:
      UnexpectedControlMessageError: anything else came; all of it is closed.
      DescriptorsTruncatedError: the kernel dropped descriptors.
    """
    data, ancdata, flags, _ = received
    if len(ancdata) == 1 and not flags & _kernel.MSG_CTRUNC and _kernel.MSG_CMSG_CLOEXEC:
        level, kind, payload = ancdata[0]
        if level == _SOL_SOCKET and kind == _SCM_RIGHTS and len(payload) == _int.size:
            fd: int = _int.unpack(payload)[0]
            if fd >= 0:
                return fd
    parsed = parse(ancdata, flags)
    if len(parsed.fds) == 1 and not parsed.truncated and not parsed.others:
        parsed.close(but=parsed.fds[0])
        return parsed.fds[0]
    raise _refusal("one descriptor was due", data, parsed)


def only_credentials(received: Received) -> Credentials | None:
    """Return the credentials of a message that must carry nothing else, None without any.

    Raises:
      UnexpectedControlMessageError: anything else came; all of it is closed.
      DescriptorsTruncatedError: the kernel dropped descriptors.
    """
    data, ancdata, flags, _ = received
    parsed = parse(ancdata, flags)
    if parsed.fds or parsed.others or parsed.truncated or len(parsed.credentials) > 1:
        raise _refusal("credentials were due", data, parsed)
    parsed.close()
    return parsed.credentials[0] if parsed.credentials else None


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
