"""The part of UnixConnection that says who is at the other end, and what both ends are called.

The rule of this file: it answers from what the kernel noted when the connection was made, or
from what this process remembers; no byte is read for it.

Sources: unix(7), https://docs.gtk.org/gio/class.SocketConnection.html
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._address import UnixSocketAddress
from ._credentials import peer_credentials
from ._identity import get_peer_groups, get_peer_security_context, identify, open_peer_pidfd

if TYPE_CHECKING:
    import socket

    from ._credentials import Credentials
    from ._identity import PeerIdentity
    from ._receiving import Receiver


class KnownPeer:
    """The part of :class:`UnixConnection` that says who is at the other end."""

    __slots__ = ()

    _receiver: Receiver
    _local_address: UnixSocketAddress | None
    _remote_address: UnixSocketAddress | None

    def get_peer_credentials(self) -> Credentials:
        """Return who connected, or listened, at the other end (``Gio.Socket.get_credentials``).

        Vouched for by the kernel, noted down when the connection was made, and unchanged
        since: of a socketpair, both ends name the process that made the pair.

        Raises:
          ConnectionClosedError: this side closed the connection.
          NotSupportedError: the platform cannot tell.

        Source: unix(7) (``SO_PEERCRED``), https://docs.gtk.org/gio/method.Socket.get_credentials.html
        """
        return peer_credentials(self._asked().getsockopt)

    def open_peer_pidfd(self) -> int | None:
        """Open a pidfd of the process that :meth:`get_peer_credentials` names.

        A pid becomes another process's once its own has ended; a pidfd never does.

        Returns:
          A descriptor that the caller owns, close-on-exec; None where the kernel has none
          (before Linux 6.5, and elsewhere).

        Raises:
          PeerGoneError: the process has ended and was reaped, on every kernel.
          OSError: EMFILE.
          ConnectionClosedError: this side closed the connection.

        Source: ``SO_PEERPIDFD`` of Linux 6.5, pidfd_open(2)
        """
        return open_peer_pidfd(self._asked())

    def get_peer_groups(self) -> tuple[int, ...]:
        """Return the supplementary groups that the peer had when the connection was made.

        Raises:
          NotSupportedError: the kernel cannot tell (before Linux 4.13, and elsewhere).
          ConnectionClosedError: this side closed the connection.

        Source: ``SO_PEERGROUPS`` of Linux 4.13
        """
        return get_peer_groups(self._asked())

    def get_peer_security_context(self) -> str | None:
        """Return the peer's SELinux, AppArmor or Smack label; None if the kernel gives none.

        Raises:
          ConnectionClosedError: this side closed the connection.

        Source: socket(7) (``SO_PEERSEC``)
        """
        return get_peer_security_context(self._asked())

    def get_peer_identity(self, *, with_pidfd: bool = True) -> PeerIdentity:
        """Gather all of these at once, and hold on to the process.

        Args:
          with_pidfd: whether to hold on to it, which takes a descriptor. Without one, nothing
            can be told about the process as it is now.

        Returns:
          An identity that the caller owns: it holds a pidfd, so use it in a ``with`` block.

        Raises:
          NotSupportedError: the platform tells no credentials.
          OSError: EMFILE.
          ConnectionClosedError: this side closed the connection.
        """
        return identify(self._asked(), with_pidfd=with_pidfd)

    def get_local_address(self) -> UnixSocketAddress:
        """Return the name of this end; unnamed unless it was bound or accepted.

        Of an accepted connection it is the name that the listener was opened with; the kernel
        may know it under another, as a path can be renamed.

        Raises:
          ConnectionClosedError: this side closed the connection.
        """
        sock = self._asked()
        return self._local_address or UnixSocketAddress.from_native(sock.getsockname())

    def get_remote_address(self) -> UnixSocketAddress:
        """Return the name of the peer's end; unnamed unless it was bound.

        Of a connection that was opened by name it is that name.

        Raises:
          ConnectionClosedError: this side closed the connection.
        """
        sock = self._asked()
        return self._remote_address or UnixSocketAddress.from_native(sock.getpeername())

    def _asked(self) -> socket.socket:
        self._receiver.check_open()
        return self._receiver.raw
