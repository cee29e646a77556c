"""Messages as values: a received message, and Gio's two kinds of control message.

Invariant: a value that holds descriptors owns them through a UnixFDList.

Sources: https://docs.gtk.org/gio-unix/class.FDMessage.html,
https://docs.gtk.org/gio-unix/class.CredentialsMessage.html, unix(7)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import trio

from . import _ancillary, _fds
from ._closing import close_fds
from ._credentials import Credentials
from ._fdlist import UnixFDList
from ._owner import ClosableOwner, DescriptorOwner
from ._trio_task import check_task

if TYPE_CHECKING:
    from ._ancillary import ControlMessage
    from ._fds import FileDescriptor


# How many bytes of a message its repr shows.
_SHOWN: Final = 64


def _short(data: bytes) -> str:
    if len(data) <= _SHOWN:
        return repr(data)
    return f"{data[:_SHOWN]!r}... ({len(data)} bytes)"


@attrs.frozen(eq=False, repr=False)
class Message(ClosableOwner):
    """A message that ``receive_message`` received.

    It owns its descriptors: use it in a ``with`` block, :meth:`close` it, or take them out of
    :attr:`fds`. It cannot be copied or pickled.

    Attributes:
      data: the bytes; empty at the end of the stream.
      fds: the descriptors that the message carried, in order.
      credentials: the sender's, checked by the kernel; None if the message carried none.
    """

    data: bytes
    fds: UnixFDList
    credentials: Credentials | None
    # Made when it is asked for: nearly all messages have none, and an empty list takes 0.4 us.
    _pidfds: UnixFDList | None = None

    @property
    def pidfds(self) -> UnixFDList:
        """The sender's pidfd, at most one, if this side asked for it and the kernel had one."""
        if self._pidfds is None:
            object.__setattr__(self, "_pidfds", UnixFDList())
        assert self._pidfds is not None  # set above
        return self._pidfds

    @property
    def pidfd(self) -> int | None:
        """The sender's pidfd, which stays the message's; ``pidfds.take(0)`` takes it out."""
        return next(iter(self.pidfds), None)

    def close(self) -> None:
        """Close the descriptors that were not taken out; closing twice is allowed.

        This may wait, as :meth:`UnixFDList.close` may; :meth:`aclose` does not.

        Raises:
          OSError: the first error of close(2). All have been closed by then.
        """
        try:
            self.fds.close()
        finally:
            if self._pidfds is not None:
                self._pidfds.close()

    async def aclose(self) -> None:
        """Close the descriptors that were not taken out, as :meth:`UnixFDList.aclose`."""
        check_task()
        close_fds([*self.fds.steal_fds(), *self.pidfds.steal_fds()])
        await trio.lowlevel.checkpoint()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(data={_short(self.data)}, fds={self.fds!r}, "
            f"credentials={self.credentials!r}, pidfds={self.pidfds!r})"
        )


@attrs.frozen(eq=False)
class UnixFDMessage(DescriptorOwner):
    """A control message with descriptors, as ``Gio.UnixFDMessage``.

    Attributes:
      fd_list: the list that owns them (default: a new, empty one).
    """

    fd_list: UnixFDList = attrs.field(
        factory=UnixFDList, validator=attrs.validators.instance_of(UnixFDList)
    )

    def append_fd(self, fd: FileDescriptor) -> None:
        """Add a duplicate of ``fd``, which stays the caller's.

        Raises:
          TypeError: not a file descriptor.
          ValueError: a number that no file descriptor has, or a closed file.
          OSError: EBADF or EMFILE.
        """
        self.fd_list.append(_fds.fileno(fd))

    def get_fd_list(self) -> UnixFDList:
        """Return the list, which stays this message's."""
        return self.fd_list

    def steal_fds(self) -> list[int]:
        """Take out all descriptors, which the caller owns."""
        return self.fd_list.steal_fds()

    def get_level(self) -> int:
        """Return SOL_SOCKET."""
        return self.to_control_message()[0]

    def get_msg_type(self) -> int:
        """Return SCM_RIGHTS."""
        return self.to_control_message()[1]

    def get_size(self) -> int:
        """Return how many bytes the payload takes."""
        return len(self.serialize())

    def serialize(self) -> bytes:
        """Return the payload: the numbers as C ints."""
        return self.to_control_message()[2]

    def to_control_message(self) -> ControlMessage:
        """Return (level, type, payload), as ``socket.sendmsg`` takes it.

        Raises:
          ValueError: more descriptors than one message carries.
          NotSupportedError: the platform cannot pass descriptors.
        """
        numbers, _ = _fds.filenos(self.fd_list, _ancillary.MOST_DESCRIPTORS)
        return _ancillary.pack_rights(numbers)

    @classmethod
    def deserialize(cls, level: int, msg_type: int, data: bytes) -> UnixFDMessage | None:
        """Return the message for a control message of recvmsg; None if it is another kind.

        The message owns the descriptors.
        """
        if (level, msg_type) != _ancillary.RIGHTS:
            return None
        return cls(UnixFDList(_ancillary.unpack((b"", [(level, msg_type, data)], 0, None)).fds))


@attrs.frozen
class UnixCredentialsMessage:
    """A control message with credentials, as ``Gio.UnixCredentialsMessage``.

    Attributes:
      credentials: the credentials (default: those of the calling process).
    """

    credentials: Credentials = attrs.field(
        factory=Credentials, validator=attrs.validators.instance_of(Credentials)
    )

    @staticmethod
    def is_supported() -> bool:
        """Whether a process can send credentials on this platform."""
        return _ancillary.CREDENTIALS is not None

    def get_credentials(self) -> Credentials:
        """Return the credentials."""
        return self.credentials

    def get_level(self) -> int:
        """Return SOL_SOCKET."""
        return self.to_control_message()[0]

    def get_msg_type(self) -> int:
        """Return SCM_CREDENTIALS, or what the platform calls it."""
        return self.to_control_message()[1]

    def get_size(self) -> int:
        """Return how many bytes the payload takes."""
        return len(self.serialize())

    def serialize(self) -> bytes:
        """Return the payload: the platform's structure."""
        return self.to_control_message()[2]

    def to_control_message(self) -> ControlMessage:
        """Return (level, type, payload), as ``socket.sendmsg`` takes it.

        Raises:
          NotSupportedError: a process cannot send credentials on this platform.
        """
        return _ancillary.pack_credentials(self.credentials)

    @classmethod
    def deserialize(cls, level: int, msg_type: int, data: bytes) -> UnixCredentialsMessage | None:
        """Return the message for a control message of recvmsg.

        Returns:
          None if it is another kind, malformed, or names no process.
        """
        if (level, msg_type) != _ancillary.CREDENTIALS:
            return None
        credentials = _ancillary.unpack((b"", [(level, msg_type, data)], 0, None)).credentials
        return None if credentials is None else cls(credentials)
