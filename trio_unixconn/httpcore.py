"""A network backend for httpcore: HTTP requests over a Unix socket.

This needs httpcore, which trio_unixconn does not require.

Source: https://www.encode.io/httpcore/network-backends/
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpcore
import trio

from ._client import open_unix_connection
from ._owner import DescriptorOwner
from ._policy import PeerPolicy
from ._trio_task import check_task, checkpoint_in_task
from .errors import UnixConnectionError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Generator, Iterable

    from ._connection import UnixConnection

__all__ = ["UnixBackend"]


class UnixBackend(httpcore.AsyncNetworkBackend):
    r"""A network backend that connects with :func:`open_unix_connection`.

    ``httpcore.AsyncConnectionPool(uds=path, network_backend=UnixBackend())`` sends each request to
    the server at that path, whatever the host of its URL is. The path can be longer than the
    address of a socket; ``"\0name"`` is an abstract name.

    Args:
      policy: which servers are admitted. It is checked before a byte of a request is sent.

    Raises:
      TypeError: not a policy.
    """

    def __init__(self, *, policy: PeerPolicy | None = None) -> None:
        if policy is not None and not isinstance(policy, PeerPolicy):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"policy must be a PeerPolicy or None, got {type(policy).__name__}")
        self._policy = policy

    def __repr__(self) -> str:
        return f"UnixBackend(policy={self._policy!r})"

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to a server; a pool with ``uds=path`` calls this.

        Args:
          timeout: in seconds; None is without end.
          socket_options: for setsockopt(2), as httpcore's other backends take them.

        Raises:
          httpcore.ConnectTimeout: the server did not accept in time.
          httpcore.ConnectError: with the text of an error of :func:`open_unix_connection`, for
            example :class:`PeerDeniedError`. It is the cause, too, which a pool drops.
        """
        check_task()
        with _errors_of_httpcore(timeout, httpcore.ConnectTimeout, httpcore.ConnectError):
            conn = await open_unix_connection(path, policy=self._policy, receive_descriptors=False)
            try:
                for option in socket_options or ():
                    conn.setsockopt(*option)
            except BaseException:
                await conn.aclose()
                raise
        return _UnixStream(conn)

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002 - of every backend
        local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002
    ) -> httpcore.AsyncNetworkStream:
        """Refuse, because a request to another machine must not be sent to this one.

        Raises:
          httpcore.UnsupportedProtocol: always.
        """
        await checkpoint_in_task()
        raise httpcore.UnsupportedProtocol(
            f"expected a pool with uds=, got a connection to {host}:{port}"
        )

    async def sleep(self, seconds: float) -> None:
        """Sleep; a pool calls this between retries."""
        check_task()
        await trio.sleep(seconds)


class _UnixStream(DescriptorOwner, httpcore.AsyncNetworkStream):
    """A connection, or TLS over it, for httpcore."""

    def __init__(
        self, conn: UnixConnection, tls: trio.SSLStream[trio.abc.Stream] | None = None
    ) -> None:
        self._conn = conn
        self._tls = tls
        self._stream: trio.abc.Stream = conn if tls is None else tls

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return at least one byte, or ``b""`` at the end; the timeout is in seconds."""
        with _errors_of_httpcore(timeout, httpcore.ReadTimeout, httpcore.ReadError):
            return bytes(await self._stream.receive_some(max_bytes))

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all bytes; the timeout is in seconds."""
        with _errors_of_httpcore(timeout, httpcore.WriteTimeout, httpcore.WriteError):
            await self._stream.send_all(buffer)

    async def aclose(self) -> None:
        """Close the connection."""
        # TLS without its own good-bye, for which the peer could make this wait.
        await self._conn.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Return a stream with TLS over this one, which is closed if the handshake fails."""
        stream = trio.SSLStream(
            self._stream,
            ssl_context,
            server_hostname=server_hostname,
            https_compatible=True,
        )
        try:
            with _errors_of_httpcore(timeout, httpcore.ConnectTimeout, httpcore.ConnectError):
                await stream.do_handshake()
        except BaseException:
            await self.aclose()
            raise
        return _UnixStream(self._conn, stream)

    def get_extra_info(self, info: str) -> Any:
        """Return what a pool asks for by name; None if the name is unknown."""
        if info == "ssl_object":
            # It has the attributes of an ssl.SSLObject.
            return self._tls
        if info == "is_readable":
            # An idle connection with something to read is one that the server has closed.
            return self._conn.is_closed() or self._conn.socket.is_readable()
        if info == "socket":
            return self._conn.socket
        if info == "client_addr":
            return str(self._conn.get_local_address())
        if info == "server_addr":
            return str(self._conn.get_remote_address())
        return None


@contextmanager
def _errors_of_httpcore(
    timeout: float | None, too_slow: type[Exception], failed: type[Exception]
) -> Generator[None, None, None]:
    """Limit the time of a block, and raise httpcore's exceptions in place of trio's."""
    try:
        with trio.fail_after(math.inf if timeout is None else timeout):
            yield
    except trio.TooSlowError as exc:
        raise too_slow(str(exc)) from exc
    except (
        UnixConnectionError,
        trio.BrokenResourceError,
        trio.ClosedResourceError,
        OSError,
    ) as exc:
        # trio's error of TLS has its text in the cause, and a pool drops the cause.
        raise failed(str(exc) or str(exc.__cause__)) from exc
