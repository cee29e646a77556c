"""Who a process is, and how each kernel writes that down.

The rule of this file: values and layouts only, no sockets. Every native structure is one row
of :data:`LAYOUTS`, every platform one row of :data:`PLATFORMS`, and nothing outside of the
two tables knows an offset.

Sources: unix(7) and unix(4) of Linux, FreeBSD, OpenBSD, NetBSD and macOS; getpeerucred(3C)
and ucred.h of illumos; https://docs.gtk.org/gio/class.Credentials.html
"""

from __future__ import annotations

import os
import struct
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import attrs

from . import _kernel
from .errors import NotSupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_UNKNOWN_ID: Final = 0xFFFFFFFF


def _signed(number: int) -> int:
    # (uid_t)-1 is every kernel's word for "no such id".
    return -1 if number == _UNKNOWN_ID else number


@attrs.frozen(kw_only=True)
class Layout:
    """One native structure: its C layout and where the three ids stand in it.

    Attributes:
      name: Gio's name of the native type.
      fields: the structure in ``struct`` notation, native byte order and alignment; some are
        followed by a group list of any length, which is not read.
      pid, uid, gid: index of each among the unpacked fields; ``pid`` is None where the
        structure has none. Effective ids where the structure tells them apart, as in Gio.
      version: index of a version field, which must be 0.
      groups: index of a group count, which must be at least 1 because ``gid`` is the first.
    """

    name: str
    fields: struct.Struct
    uid: int
    gid: int
    pid: int | None = None
    version: int | None = None
    groups: int | None = None

    def unpack(self, data: bytes) -> tuple[int, int, int]:
        """Return (pid, uid, gid); -1 for what the structure does not say.

        Raises:
          ValueError: too few bytes, an unknown version, or no group.
        """
        if len(data) < self.fields.size:
            raise ValueError(
                f"{self.name} takes at least {self.fields.size} bytes, but {len(data)} came"
            )
        fields: tuple[int, ...] = self.fields.unpack_from(data)
        if self.version is not None and fields[self.version] != 0:
            raise ValueError(
                f"{self.name} of version {fields[self.version]} came; only version 0 is known"
            )
        if self.groups is not None and fields[self.groups] < 1:
            raise ValueError(f"{self.name} with an empty group list came; it names no group id")
        pid = -1 if self.pid is None else fields[self.pid]
        return pid, _signed(fields[self.uid]), _signed(fields[self.gid])

    def pack(self, pid: int, uid: int, gid: int) -> bytes:
        """Return the structure with these three ids, everything else zero."""
        fields = [0] * len(self.fields.unpack(bytes(self.fields.size)))
        if self.pid is not None:
            fields[self.pid] = pid
        fields[self.uid] = uid & _UNKNOWN_ID
        fields[self.gid] = gid & _UNKNOWN_ID
        if self.groups is not None:
            fields[self.groups] = 1
        return self.fields.pack(*fields)


@attrs.frozen(kw_only=True)
class UcredLayout:
    """The ``ucred_t`` of illumos and Solaris: a header, and the ids at an offset it names."""

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
                f"{self.name} takes at least {self.fields.size} bytes, but {len(data)} came"
            )
        _size, offset, _, pid, *_rest = self.fields.unpack_from(data)
        if offset < self.fields.size or offset + self.ids.size > len(data):
            raise ValueError(
                f"{self.name} says its ids stand at byte {offset}, outside of the "
                f"{len(data)} bytes that came"
            )
        uid, _, _, gid, *_ = self.ids.unpack_from(data, offset)
        return pid, _signed(uid), _signed(gid)

    def pack(self, *ids: int) -> bytes:
        """Raise: only the kernel makes a ``ucred_t``.

        Raises:
          NotSupportedError: always.
        """
        raise NotSupportedError(f"only the kernel makes a {self.name}; it cannot be made of {ids}")


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
    """A socket option that tells the peer's credentials: level, number, what it contains."""

    level: int
    option: int | None
    layout: str
    pid_option: int | None = None


@attrs.frozen(kw_only=True)
class MessageKind:
    """A control message that carries credentials (level SOL_SOCKET).

    Attributes:
      kind: the message's type.
      layout: what it contains.
      sendable: whether a process attaches it itself, as Gio's send_credentials does.
    """

    kind: int | None
    layout: str
    sendable: bool = True


@attrs.frozen(kw_only=True)
class Platform:
    """How one kernel tells who a peer is; None where it has no such way."""

    native: str
    option: SocketOption | None
    message: MessageKind | None


# Linux's row is run by the tests on Linux. The others follow the systems' own headers and
# manual pages and are tested with bytes made by hand; nobody has run them here.
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
        # LOCAL_CREDS makes the kernel attach it; a sender has nothing to attach.
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


_TOP_PID: Final = 2**31


def _check_identifier(name: str, value: object) -> None:
    top = _TOP_PID if name == "pid" else _UNKNOWN_ID
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not -1 <= value < top:
        raise ValueError(f"{name} must be -1 (unknown) or from 0 to {top - 1}, not {value}")


@attrs.frozen
class Credentials:
    """Process, user and group id of a process, as ``Gio.Credentials``.

    ``Credentials()`` is the calling process with its effective ids. -1 means that the
    platform did not say. A value says nothing about who vouches for it: those that
    :meth:`UnixConnection.receive_credentials` and
    :meth:`UnixConnection.get_peer_credentials` return are vouched for by the kernel.

    Raises:
      TypeError, ValueError: an id that is no int, or out of range.
      NotSupportedError: ``Credentials()`` on a platform without user ids.

    Source: https://docs.gtk.org/gio/class.Credentials.html, unix(7) (``struct ucred``)
    """

    pid: int = attrs.field(factory=os.getpid)
    uid: int = attrs.field(factory=_kernel.effective_user)
    gid: int = attrs.field(factory=_kernel.effective_group)

    def __attrs_post_init__(self) -> None:
        # At once, where all is well: 0.40 us for a Credentials; with a validator each 0.52.
        pid, uid, gid = self.pid, self.uid, self.gid
        if (
            type(pid) is type(uid) is type(gid) is int
            and -1 <= pid < _TOP_PID
            and -1 <= uid < _UNKNOWN_ID
            and -1 <= gid < _UNKNOWN_ID
        ):
            return
        for name in ("pid", "uid", "gid"):
            _check_identifier(name, getattr(self, name))

    def get_unix_pid(self) -> int:
        """Return the process id.

        Raises:
          NotSupportedError: the platform did not say.
        """
        return self._known(self.pid, "process")

    def get_unix_user(self) -> int:
        """Return the user id.

        Raises:
          NotSupportedError: the platform did not say.
        """
        return self._known(self.uid, "user")

    def is_same_user(self, other: Credentials) -> bool:
        """Whether both have the same user id; unknown users are never the same.

        Raises:
          TypeError: ``other`` is no Credentials.
        """
        if not isinstance(other, Credentials):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Credentials are due, not {type(other).__name__}")
        return self.uid == other.uid != -1

    def to_string(self) -> str:
        """Return Gio's form, e.g. ``GCredentials:linux-ucred:pid=1,uid=0,gid=0``."""
        native = "unknown" if PLATFORM is None else PLATFORM.native
        ids = (("pid", self.pid), ("uid", self.uid), ("gid", self.gid))
        known = ",".join(f"{name}={value}" for name, value in ids if value != -1)
        return f"GCredentials:{native}:{known}"

    def to_native(self, layout: str | None = None) -> bytes:
        """Return the bytes of the platform's structure, or of a ``layout`` by Gio's name.

        Raises:
          ValueError: no such layout.
          NotSupportedError: the platform has no structure for credentials.
        """
        return _layout(layout).pack(self.pid, self.uid, self.gid)

    @classmethod
    def from_native(cls, data: bytes, layout: str | None = None) -> Credentials:
        """Read the platform's structure, or a ``layout`` by Gio's name.

        Raises:
          ValueError: no such layout, or bytes that are not of it.
          NotSupportedError: the platform has no structure for credentials.
        """
        return cls(*_layout(layout).unpack(data))

    def _known(self, value: int, what: str) -> int:
        if value == -1:
            raise NotSupportedError(f"these credentials do not say which {what} it is")
        return value


# A frozen class has no other way to be filled but its constructor, which looks at everything.
_new: Final = object.__new__
_set_pid: Final = Credentials.__dict__["pid"].__set__
_set_uid: Final = Credentials.__dict__["uid"].__set__
_set_gid: Final = Credentials.__dict__["gid"].__set__
_ucred: Final = struct.Struct("iII")


@lru_cache(maxsize=64)
def vouched(ucred: bytes) -> Credentials | None:
    """Return what the kernel says in Linux's layout, 12 bytes; None if it names nobody.

    The same bytes are the same value, and a peer sends the same each time: to remember the last
    few takes 3 % from credentials there and back. A new one takes half as long as by the
    constructor, which looks at what a caller may have given.
    """
    pid, uid, gid = _ucred.unpack(ucred)
    if pid <= 0 or _UNKNOWN_ID in (uid, gid):
        return None
    made = _new(Credentials)
    _set_pid(made, pid)
    _set_uid(made, uid)
    _set_gid(made, gid)
    return made


def _layout(name: str | None) -> Layout | UcredLayout:
    if name is None:
        name = _kernel.required(PLATFORM, "structure for credentials").native
    if name not in LAYOUTS:
        raise ValueError(f"no layout is called {name!r}; known are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def peer_credentials(
    getsockopt: Callable[[int, int, int], bytes], platform: Platform | None = PLATFORM
) -> Credentials:
    """Ask a connected socket who its peer is, the way ``platform`` does it.

    Args:
      getsockopt: the socket's getsockopt(level, option, length in bytes).

    Raises:
      NotSupportedError: the platform has no such socket option.
      OSError: from getsockopt.
    """
    option = None if platform is None else platform.option
    option = _kernel.required(option, "socket option for the peer's credentials")
    layout = LAYOUTS[option.layout]
    number = _kernel.required(option.option, "socket option for the peer's credentials")
    pid, uid, gid = layout.unpack(getsockopt(option.level, number, layout.fields.size))
    if option.pid_option is not None:
        (pid,) = struct.unpack("i", getsockopt(option.level, option.pid_option, 4))
    return Credentials(pid, uid, gid)


def can_tell_credentials(platform: Platform | None = PLATFORM) -> None:
    """Raise unless the peer's credentials can be had somehow.

    Raises:
      NotSupportedError: the platform has neither a message nor a socket option for them.
    """
    if platform is not None:
        if platform.message is not None and platform.message.kind is not None:
            return
        if platform.option is not None and platform.option.option is not None:
            return
    raise NotSupportedError(f"{sys.platform} with this Python cannot tell a peer's credentials")
