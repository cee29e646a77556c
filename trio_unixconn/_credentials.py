"""Credentials: the process, user and group id of a process, as ``Gio.Credentials``.

Sources: unix(7) (``struct ucred``), https://docs.gtk.org/gio/class.Credentials.html
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Final

import attrs

from . import _kernel
from ._ucred import LAYOUTS, PLATFORM, PLATFORMS, UNKNOWN_ID, Layout, Platform, UcredLayout
from .errors import NotSupportedError

_TOP_PID: Final = 2**31


def _check_identifier(name: str, value: object) -> None:
    top = _TOP_PID if name == "pid" else UNKNOWN_ID
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not -1 <= value < top:
        raise ValueError(f"{name} must be -1 (unknown) or from 0 to {top - 1}, got {value}")


@attrs.frozen
class Credentials:
    """The process, user and group id of a process, as ``Gio.Credentials``.

    ``Credentials()`` is the calling process with its effective ids. -1 means that the platform
    does not report the id. The kernel has checked those that
    :meth:`UnixConnection.receive_credentials` and :meth:`UnixConnection.get_peer_credentials`
    return. A value alone proves nothing.

    Raises:
      TypeError: an id that is not an int.
      ValueError: an id that is out of range.
      NotSupportedError: ``Credentials()`` on a platform without user ids.

    Source: https://docs.gtk.org/gio/class.Credentials.html, unix(7) (``struct ucred``)
    """

    pid: int = attrs.field(factory=os.getpid)
    uid: int = attrs.field(factory=_kernel.effective_user)
    gid: int = attrs.field(factory=_kernel.effective_group)

    def __attrs_post_init__(self) -> None:
        # One test for the usual case: 0.40 us for a Credentials; 0.52 with a validator for each.
        pid, uid, gid = self.pid, self.uid, self.gid
        if (
            type(pid) is type(uid) is type(gid) is int
            and -1 <= pid < _TOP_PID
            and -1 <= uid < UNKNOWN_ID
            and -1 <= gid < UNKNOWN_ID
        ):
            return
        for name in ("pid", "uid", "gid"):
            _check_identifier(name, getattr(self, name))

    def get_unix_pid(self) -> int:
        """Return the process id.

        Raises:
          NotSupportedError: the platform does not report it.
        """
        return self._known(self.pid, "process")

    def get_unix_user(self) -> int:
        """Return the user id.

        Raises:
          NotSupportedError: the platform does not report it.
        """
        return self._known(self.uid, "user")

    def is_same_user(self, other: Credentials) -> bool:
        """Whether both have the same user id. An unknown user is never the same as another.

        Raises:
          TypeError: ``other`` is not a Credentials.
        """
        if not isinstance(other, Credentials):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"other must be a Credentials, got {type(other).__name__}")
        return self.uid == other.uid != -1

    def to_string(self) -> str:
        """Return Gio's form, e.g. ``GCredentials:linux-ucred:pid=1,uid=0,gid=0``."""
        native = "unknown" if PLATFORM is None else PLATFORM.native
        ids = (("pid", self.pid), ("uid", self.uid), ("gid", self.gid))
        known = ",".join(f"{name}={value}" for name, value in ids if value != -1)
        return f"GCredentials:{native}:{known}"

    def to_native(self, layout: str | None = None) -> bytes:
        """Return the bytes of the platform's structure, or of a ``layout`` with Gio's name.

        Raises:
          ValueError: an unknown layout.
          NotSupportedError: the platform has no structure for credentials.
        """
        return _layout(layout).pack(self.pid, self.uid, self.gid)

    @classmethod
    def from_native(cls, data: bytes, layout: str | None = None) -> Credentials:
        """Parse the platform's structure, or a ``layout`` with Gio's name.

        Raises:
          TypeError: ``data`` is not bytes.
          ValueError: an unknown layout, or bytes that do not have it.
          NotSupportedError: the platform has no structure for credentials.
        """
        if not isinstance(data, bytes):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"data must be bytes, got {type(data).__name__}")
        return cls(*_layout(layout).unpack(data))

    def _known(self, value: int, what: str) -> int:
        if value == -1:
            raise NotSupportedError(f"these credentials have no {what} id")
        return value


# Sets the fields of a frozen class without its constructor, which checks them.
_new: Final = object.__new__
_set_pid: Final = Credentials.__dict__["pid"].__set__
_set_uid: Final = Credentials.__dict__["uid"].__set__
_set_gid: Final = Credentials.__dict__["gid"].__set__
_ucred: Final = struct.Struct("iII")


@lru_cache(maxsize=64)
def credentials_from_ucred(ucred: bytes) -> Credentials | None:
    """Return the credentials in Linux's ``ucred``, 12 bytes; None if it has no process or user.

    A peer sends the same bytes each time, so the last few are cached: a round trip with
    credentials takes 3 % less. The constructor, which checks the arguments of a caller, would take
    twice as long.
    """
    pid, uid, gid = _ucred.unpack(ucred)
    if pid <= 0 or UNKNOWN_ID in (uid, gid):
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
        raise ValueError(f"unknown layout {name!r}, expected one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def peer_credentials(
    getsockopt: Callable[[int, int, int], bytes], platform: Platform | None = PLATFORM
) -> Credentials:
    """Return the credentials of a socket's peer, with the socket option of ``platform``.

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
    native = getsockopt(option.level, number, layout.fields.size)
    if platform is PLATFORMS["linux"]:
        # The same peers connect again, mostly: 1 us less for each connection under a policy.
        known = credentials_from_ucred(native)
        if known is not None:
            return known
    pid, uid, gid = layout.unpack(native)
    if option.pid_option is not None:
        (pid,) = struct.unpack("i", getsockopt(option.level, option.pid_option, 4))
    return Credentials(pid, uid, gid)


def can_tell_credentials(platform: Platform | None = PLATFORM) -> None:
    """Raise unless the platform reports the credentials of a peer.

    Raises:
      NotSupportedError: the platform has neither a message nor a socket option for them.
    """
    if platform is not None:
        if platform.message is not None and platform.message.kind is not None:
            return
        if platform.option is not None and platform.option.option is not None:
            return
    raise NotSupportedError(f"{sys.platform} with this Python does not report credentials")
