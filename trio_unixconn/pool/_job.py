"""The arguments of a user's functions in a worker: Job for handlers, WorkerInfo for a setup.

Source: socket(7) (SO_LINGER)
"""

from __future__ import annotations

from contextlib import suppress
from io import IOBase
from typing import TYPE_CHECKING, Any

import attrs
import trio

from .. import _memfd
from .._closing import close_fds, close_object
from .._connection import UnixConnection, close_now
from .._fdtypes import DescriptorKind, is_memory
from .._file_thread import call_in_file_thread, ignore
from .._guards import check_handover
from .._memfd import Seals
from .._owner import DescriptorOwner
from .._sockopts import can_linger
from ..errors import UnsafeBufferError, WrongDescriptorKindError
from ._endpoints import checked_data

if TYPE_CHECKING:
    from .._buffers import Buffer
    from .._credentials import Credentials
    from ._proxy_header import ProxyHeader


@attrs.frozen
class WorkerInfo:
    """The worker that a setup runs in. A setup gets it if it takes an argument.

    Attributes:
      index: the number of the worker's slot in the pool: 0 for the first. The worker that replaces
        this one has the same index.
      pid: the process id of the worker.
      data: the bytes that were given to the pool as ``setup_data``.
    """

    index: int
    pid: int
    data: bytes = attrs.field(repr=False)


@attrs.frozen
class PassedOn:
    """What :meth:`Job.pass_on` returns, for the handler to return."""

    data: bytes = attrs.field(repr=False)


@attrs.define
class WorkerState:
    """What the jobs of a worker know about it.

    Attributes:
      draining: set when the worker is going to exit.
      is_replaced: whether other workers go on then.
    """

    draining: trio.Event = attrs.field(factory=trio.Event)
    is_replaced: bool = True


@attrs.define(eq=False)
class Job(DescriptorOwner):
    """A job, the second argument of its handler; the first one is the stream.

    Attributes:
      id: the pool's number for the job, as in :class:`JobReceipt`.
      data: the bytes that were submitted with it.
      state: what the ``setup`` of the worker yielded; None without one.
      passed: how many times handlers have passed the connection on with :meth:`pass_on`; ``data``
        is what the last one has said then.
      proxy: the PROXY protocol header that the connection began with, in a pool with
        ``proxy_protocol``; None in others.
    """

    id: int
    data: bytes
    state: Any = attrs.field(repr=False)
    _worker: WorkerState = attrs.field(alias="worker", repr=False)
    _stream: Any = attrs.field(alias="stream", repr=False)
    proxy: ProxyHeader | None = attrs.field(default=None, repr=False)
    passed: int = 0
    _wants_answer: bool = attrs.field(default=False, alias="wants_answer", repr=False)

    @property
    def draining(self) -> trio.Event:
        """Set when the worker is going to exit, for handlers that can finish sooner.

        One that waits for the next request of a client can stop waiting, or, if ``can_pass_on``,
        pass the connection on.
        """
        return self._worker.draining

    @property
    def can_pass_on(self) -> bool:
        """Whether another handler can have the connection now.

        False for a file, a job without a source and a ``call``, and when the whole pool drains and
        no next generation has such a server.
        """
        return (
            not self._wants_answer
            and isinstance(self._stream, (trio.SocketStream, UnixConnection))
            and (self._worker.is_replaced or not self._worker.draining.is_set())
        )

    def pass_on(self, data: Buffer = b"") -> PassedOn:
        """Pass the connection on to another handler, when this one has returned.

        ::

            if job.draining.is_set() and job.can_pass_on:
                return job.pass_on(data=b"what this handler knows of the client")

        The next handler gets the connection as its stream and the data as ``job.data``, in another
        worker if this one drains, or in one of the next generation. The client notices nothing. The
        handler must stand at a boundary of its protocol, with nothing of the client read that is
        not in the data, and must not close the stream. A connection that a handler has wrapped, as
        in TLS, cannot be passed on: its state is in this process. If no worker accepts jobs any
        more, the connection is closed.

        Args:
          data: at most 16 MiB for the next handler.

        Returns:
          An object that the handler returns. Without that, nothing happens.

        Raises:
          RuntimeError: the job is a :meth:`WorkerPool.call`, which wants an answer.
          WrongDescriptorKindError: the job has no connection.
          ReadAheadError: the connection has read messages ahead.
          TypeError: ``data`` is not a contiguous buffer.
          ValueError: ``data`` is too large.
        """
        if self._wants_answer:
            raise RuntimeError("cannot pass on the connection of a call, which wants an answer")
        stream = self._stream
        if not isinstance(stream, (trio.SocketStream, UnixConnection)):
            raise WrongDescriptorKindError(
                f"expected a job with a connection, got {type(stream).__name__}",
                DescriptorKind.REGULAR_FILE,
            )
        if stream.socket.fileno() >= 0:
            check_handover([stream.socket.fileno()])
        return PassedOn(checked_data(data))

    @property
    def peer(self) -> Credentials | tuple[Any, ...] | str | None:
        """The peer of the stream; after a balancer, the client that it has told.

        For a Unix socket the credentials of the peer, which the kernel guarantees. For a TCP socket
        the address of the peer. None for a file, or for a job without a file descriptor. If the
        connection began with a PROXY protocol header that has a source, that.

        Raises:
          OSError: the peer of a TCP socket has closed or reset the connection (ENOTCONN).
        """
        if self.proxy is not None and self.proxy.source is not None:
            return self.proxy.source
        return self._stream_peer()

    @property
    def proxied_by(self) -> Credentials | tuple[Any, ...] | None:
        """The balancer that has sent ``proxy``, as ``peer`` would be without it; None without it.

        Raises:
          OSError: the peer of a TCP socket has closed or reset the connection (ENOTCONN).
        """
        return None if self.proxy is None else self._stream_peer()

    def _stream_peer(self) -> Credentials | tuple[Any, ...] | None:
        stream = self._stream
        if isinstance(stream, UnixConnection):
            return stream.get_peer_credentials()
        if isinstance(stream, trio.SocketStream):
            name: tuple[Any, ...] = stream.socket.getpeername()
            return name
        return None

    def map_buffer(self, max_bytes: int, *, seals: Seals = Seals.ALL) -> memoryview:
        """Map the file of the job, which must be a sealed memfd, as ``receive_buffer`` does.

        Args:
          max_bytes: the maximum size of the memfd.
          seals: the seals that the memfd must have; ``Seals.SHRINK`` is required. Without
            ``Seals.WRITE`` the bytes can change at any time.

        Returns:
          A read-only view. The memory is mapped until the view, and all that was made from it, are
          garbage collected. The file can be closed before.

        Raises:
          UnsafeBufferError: the file is not a memfd with these seals, or larger than
            ``max_bytes``.
          TypeError: ``seals`` is not Seals.
          ValueError: ``seals`` lacks ``Seals.SHRINK``.
          OSError: EMFILE.
        """
        _memfd.check_seals(seals)
        fileno = getattr(self._stream, "fileno", None)
        if fileno is None:
            raise UnsafeBufferError(
                "expected a sealed memfd, got a job without a file", DescriptorKind.SOCKET
            )
        return _memfd.map_readonly(fileno(), max_bytes, seals)


async def close_file(file: IOBase) -> None:
    """Close a file, in a thread if it can have a file server; closing twice is allowed.

    If this is cancelled while that server does not answer, the thread is abandoned.
    """
    # ValueError: the handler has detached it. OSError: an error of an earlier write.
    with suppress(OSError, ValueError):
        if file.closed:
            return
        if is_memory(file.fileno()):
            file.close()
            return
        await call_in_file_thread(
            file.close, discard=ignore, not_started=lambda: close_object(file.close)
        )


def close_stream(stream: Any) -> None:
    """Close a connection or stream, without a checkpoint; closing twice is allowed."""
    # Not isinstance(): both are abstract base classes, of which that takes 0.2 us more.
    if type(stream) is UnixConnection:
        close_now(stream)
    elif stream is not None:
        sock = stream.socket
        if sock.fileno() >= 0 and can_linger(sock):
            trio.lowlevel.notify_closing(sock)
            close_fds([sock.detach()])
        else:
            sock.close()
