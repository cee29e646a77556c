"""The credential structures of every platform.

Invariant: every native structure is one row of :data:`LAYOUTS`, every platform one row of
:data:`PLATFORMS`, and no other module has an offset.

Sources: unix(7) and unix(4) of Linux, FreeBSD, OpenBSD, NetBSD and macOS; getpeerucred(3C)
and ucred.h of illumos
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping
from typing import Final

import attrs

from . import _kernel
from .errors import NotSupportedError

UNKNOWN_ID: Final = 0xFFFFFFFF


def _signed(number: int) -> int:
    # (uid_t)-1 means "no such id" to every kernel.
    return -1 if number == UNKNOWN_ID else number


@attrs.frozen(kw_only=True)
class Layout:
    """One native structure: its C layout, and the positions of the three ids in it.

    Attributes:
      name: Gio's name of the native type.
      fields: the structure in ``struct`` notation, with native byte order and alignment. Some
        have a list of groups of any length after it, which is not read.
      pid, uid, gid: the index of each among the unpacked fields; ``pid`` is None if the structure
        has none. If the structure has real and effective ids, these are the effective ones, as in
        Gio.
      version: the index of a version field, which must be 0.
      groups: the index of a group count, which must be at least 1 because ``gid`` is the first.
    """

    name: str
    fields: struct.Struct
    uid: int
    gid: int
    pid: int | None = None
    version: int | None = None
    groups: int | None = None

    def unpack(self, data: bytes) -> tuple[int, int, int]:
        """Return (pid, uid, gid); -1 for an id that the structure does not have.

        Raises:
          ValueError: too few bytes, an unknown version, or no group.
        """
        if len(data) < self.fields.size:
            raise ValueError(
                f"{self.name} must have at least {self.fields.size} bytes, got {len(data)}"
            )
        fields: tuple[int, ...] = self.fields.unpack_from(data)
        if self.version is not None and fields[self.version] != 0:
            raise ValueError(
                f"expected version 0 of {self.name}, got version {fields[self.version]}"
            )
        if self.groups is not None and fields[self.groups] < 1:
            raise ValueError(f"{self.name} has an empty group list, and so no group id")
        pid = -1 if self.pid is None else fields[self.pid]
        return pid, _signed(fields[self.uid]), _signed(fields[self.gid])

    def pack(self, pid: int, uid: int, gid: int) -> bytes:
        """Return the structure with these three ids; all other fields are zero."""
        fields = [0] * len(self.fields.unpack(bytes(self.fields.size)))
        if self.pid is not None:
            fields[self.pid] = pid
        fields[self.uid] = uid & UNKNOWN_ID
        fields[self.gid] = gid & UNKNOWN_ID
        if self.groups is not None:
            fields[self.groups] = 1
        return self.fields.pack(*fields)


@attrs.frozen(kw_only=True)
class UcredLayout:
    """The ``ucred_t`` of illumos and Solaris: a header with the offset of the ids."""

    name: str
    fields: struct.Struct
    ids: struct.Struct

    def unpack(self, data: bytes) -> tuple[int, int, int]:
        """Return (pid, effective uid, effective gid).

        Raises:
          ValueError: too few bytes, or a header that points outside of them.
        """
        if len(data) < self.fields.size:
            raise ValueError(
                f"{self.name} must have at least {self.fields.size} bytes, got {len(data)}"
            )
        _size, offset, _, pid, *_rest = self.fields.unpack_from(data)
        if offset < self.fields.size or offset + self.ids.size > len(data):
            raise ValueError(
                f"the ids of {self.name} are at byte {offset}, outside of its {len(data)} bytes"
            )
        uid, _, _, gid, *_ = self.ids.unpack_from(data, offset)
        return pid, _signed(uid), _signed(gid)

    def pack(self, *ids: int) -> bytes:
        """Raise, because only the kernel can make a ``ucred_t``.

        Raises:
          NotSupportedError: always.
        """
        raise NotSupportedError(f"only the kernel can make a {self.name} (of {ids})")


_GROUPS = "h16I"

LAYOUTS: Final[Mapping[str, Layout | UcredLayout]] = {
    layout.name: layout
    for layout in (
        # pid, uid, gid
        Layout(name="linux-ucred", fields=struct.Struct("iII"), pid=0, uid=1, gid=2),
        # pid, uid, euid, gid, short ngroups, groups[16]
        Layout(
            name="freebsd-cmsgcred", fields=struct.Struct("iIII" + _GROUPS), pid=0, uid=2, gid=3
        ),
        # version, uid, short ngroups, groups[16], union of a pointer and the pid
        Layout(
            name="freebsd-xucred",
            fields=struct.Struct("II" + _GROUPS + "0Pi0P"),
            version=0,
            uid=1,
            groups=2,
            gid=3,
            pid=19,
        ),
        # version, pid, uid, euid, gid, egid, ngroups, groups[]
        Layout(
            name="freebsd-sockcred2",
            fields=struct.Struct("iiIIIIi"),
            version=0,
            pid=1,
            uid=3,
            gid=5,
        ),
        # version, uid, short ngroups, groups[16]; the pid is a socket option of its own
        Layout(
            name="apple-xucred",
            fields=struct.Struct("II" + _GROUPS),
            version=0,
            uid=1,
            groups=2,
            gid=3,
        ),
        # uid, gid, pid
        Layout(name="openbsd-sockpeercred", fields=struct.Struct("IIi"), uid=0, gid=1, pid=2),
        # pid, euid, egid
        Layout(name="netbsd-unpcbid", fields=struct.Struct("iII"), pid=0, uid=1, gid=2),
        # pid, uid, euid, gid, egid, ngroups, groups[]
        Layout(name="netbsd-sockcred", fields=struct.Struct("iIIIIi"), pid=0, uid=2, gid=4),
        # size, offset of the ids, privoff, pid, audoff, zoneid, projid, labeloff;
        # euid, ruid, suid, egid, rgid, sgid, ngroups, groups[]
        UcredLayout(
            name="solaris-ucred",
            fields=struct.Struct("IIIiIiiI"),
            ids=struct.Struct("IIIIIIi"),
        ),
    )
}


@attrs.frozen(kw_only=True)
class SocketOption:
    """A socket option with the peer's credentials: its level, number and layout."""

    level: int
    option: int | None
    layout: str
    pid_option: int | None = None


@attrs.frozen(kw_only=True)
class MessageKind:
    """A control message that carries credentials (level SOL_SOCKET).

    Attributes:
      kind: the message's type.
      layout: the name of its layout.
      sendable: whether a process can attach it, as Gio's send_credentials does.
    """

    kind: int | None
    layout: str
    sendable: bool = True


@attrs.frozen(kw_only=True)
class Platform:
    """How one kernel reports credentials; None if it has no such way."""

    native: str
    option: SocketOption | None
    message: MessageKind | None


# The tests on Linux use Linux's row. The others follow the headers and manual pages of the systems
# and are tested with bytes made by hand. They have not been run there.
PLATFORMS: Final[Mapping[str, Platform]] = {
    "linux": Platform(
        native="linux-ucred",
        option=SocketOption(
            level=_kernel.SOL_SOCKET, option=_kernel.SO_PEERCRED, layout="linux-ucred"
        ),
        message=MessageKind(kind=_kernel.SCM_CREDENTIALS, layout="linux-ucred"),
    ),
    "freebsd": Platform(
        native="freebsd-cmsgcred",
        option=SocketOption(level=0, option=1, layout="freebsd-xucred"),
        message=MessageKind(kind=_kernel.SCM_CREDS, layout="freebsd-cmsgcred"),
    ),
    "darwin": Platform(
        native="apple-xucred",
        option=SocketOption(level=0, option=1, layout="apple-xucred", pid_option=2),
        message=None,
    ),
    "openbsd": Platform(
        native="openbsd-sockpeercred",
        option=SocketOption(level=0xFFFF, option=0x1022, layout="openbsd-sockpeercred"),
        message=None,
    ),
    "netbsd": Platform(
        native="netbsd-unpcbid",
        option=SocketOption(level=0, option=3, layout="netbsd-unpcbid"),
        # With LOCAL_CREDS the kernel attaches it. A sender cannot.
        message=MessageKind(kind=_kernel.SCM_CREDS, layout="netbsd-sockcred", sendable=False),
    ),
    "sunos": Platform(
        native="solaris-ucred",
        option=None,
        message=MessageKind(kind=0x1012, layout="solaris-ucred", sendable=False),
    ),
}


def platform_named(name: str) -> Platform | None:
    """Return the row for a value of ``sys.platform`` ("freebsd14", "sunos5"), or None."""
    return PLATFORMS.get(name.rstrip("0123456789."))


PLATFORM: Final = platform_named(sys.platform)
