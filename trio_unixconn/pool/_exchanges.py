"""A server of short exchanges, over TCP and Unix sockets: one request at most, and one answer.

A client may send nothing, half a request or more than one, read nothing, or keep its connection
open. So an exchange has a maximum time, and there is a maximum number of them. One more ends the
one that is the least likely to go on: one whose answer was sent, and otherwise the oldest, because
an exchange with a client that does its part takes a few milliseconds.

A connection that is closed with bytes that were not read is reset, and then the client may lose the
answer. So this ends the stream after the answer, and discards what the client still sends until it
closes the connection, too.

Invariant: no client holds up the answer to another client, or the program.

Sources: RFC 9112, section 9.6; shutdown(2)
"""

from __future__ import annotations

import logging
import os
import socket as stdlib_socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import trio
from trio.lowlevel import enable_ki_protection

from .._accept import Acceptor, is_out_of_resources
from .._address import UnixSocketAddress
from .._connection import UnixConnection
from .._listener import UnixListener
from .._policy import admit_or_close
from .._server import serve_unix
from .._sockopts import raw_socket
from .._trio_task import check_task
from ..errors import ConnectionClosedError, UnixConnectionError
from ..handover._listeners import GenerationListener
from ._server import AnyListener, checked_listeners, close_listeners

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from .._address import AddressLike
    from .._policy import PeerPolicy
    from .._server import UnixServer

logger: Final = logging.getLogger("trio_unixconn.pool")

Stream: TypeAlias = UnixConnection | trio.SocketStream
# A host and a port, a listener, or several.
ExchangeListener: TypeAlias = AnyListener | GenerationListener[Any]
ListenersOrAddress: TypeAlias = tuple[str, int] | ExchangeListener | Sequence[ExchangeListener]

# The maximum time of an exchange, in seconds.
EXCHANGE_TIMEOUT: Final = 5.0
# The maximum time in seconds until the client closes the connection after its answer, and how many
# bytes it may send until then.
CLOSE_TIMEOUT: Final = 1.0
MAX_DISCARDED: Final = 65536
# The maximum number of exchanges.
MAX_EXCHANGES: Final = 64
CHUNK_SIZE: Final = 4096


class Exchanges:
    """The exchanges that are in progress.

    Args:
      answer: receives a request, and sends the answer.
    """

    def __init__(self, answer: Callable[[Stream], Awaitable[None]]) -> None:
        self._answer = answer
        # The one to be ended first is the first one.
        self._scopes: OrderedDict[trio.CancelScope, None] = OrderedDict()

    async def run(self, stream: Stream) -> None:
        """Have an exchange with a client; the caller closes the stream."""
        if len(self._scopes) >= MAX_EXCHANGES:
            scope, _ = self._scopes.popitem(last=False)
            scope.cancel()
        with trio.move_on_after(EXCHANGE_TIMEOUT) as scope:
            self._scopes[scope] = None
            try:
                await self._answer(stream)
                # Again, if it was ended in the last step.
                self._scopes[scope] = None
                self._scopes.move_to_end(scope, last=False)
                await _end(stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError, UnixConnectionError):
                # The client has closed the connection, or has sent a file descriptor.
                pass
            finally:
                self._scopes.pop(scope, None)


async def _end(stream: Stream) -> None:
    await stream.send_eof()
    left = MAX_DISCARDED
    with trio.move_on_after(CLOSE_TIMEOUT):
        while left > 0 and (data := await stream.receive_some(CHUNK_SIZE)):
            left -= len(data)


def is_unix_address(where: object) -> TypeIs[AddressLike | UnixListener]:
    """Whether this is the address or the listener of one Unix socket."""
    return isinstance(where, (str, bytes, os.PathLike, UnixSocketAddress, UnixListener))


async def open_listeners(where: ListenersOrAddress) -> list[ExchangeListener]:
    """Return the listeners of an argument, which the caller owns.

    Raises:
      TypeError: it is of another type.
      ValueError: it is not an address.
      ConnectionClosedError: a listener is closed.
      OSError: the host is unknown, or it is not possible to listen there.
    """
    check_task()
    if _is_host_and_port(where):
        host, port = where
        if isinstance(port, bool) or not isinstance(port, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"port must be an int, got {type(port).__name__}")
        if not (host and 0 <= port < 2**16):
            raise ValueError(
                f"expected a host and a port from 0 to 65535, got {where}; every address of this "
                'machine is "0.0.0.0" or "::"'
            )
        return [*await trio.open_tcp_listeners(port, host=host)]
    if isinstance(where, (trio.SocketListener, UnixListener, GenerationListener)):
        where = [where]
    # A generation owns its listeners.
    found = [each for each in where if isinstance(each, GenerationListener)]
    others = [each for each in where if not isinstance(each, GenerationListener)]
    return [*found, *(checked_listeners(others) if others or not found else ())]


def _is_host_and_port(where: ListenersOrAddress) -> TypeIs[tuple[str, int]]:
    return isinstance(where, tuple) and len(where) == 2 and isinstance(where[0], str)


async def serve_exchanges(
    exchanges: Exchanges,
    listeners: Sequence[ExchangeListener],
    *,
    policy: PeerPolicy | None = None,
    task_status: trio.TaskStatus[Sequence[ExchangeListener]],
) -> None:
    """Answer the clients of listeners, which this owns, until it is cancelled.

    Clients of a generation's listener are answered by the generation that accepts; by the first
    one even before it is ready. This returns if all listeners are those of one that has ended.

    Args:
      policy: which peers may connect to a Unix socket, besides the policy of its listener.
    """
    try:
        async with trio.open_nursery() as nursery:
            for each in listeners:
                if isinstance(each, UnixListener):
                    await nursery.start(partial(serve_unix_exchanges, exchanges, each, policy))
                elif isinstance(each, GenerationListener):
                    nursery.start_soon(_accept_in_generation, exchanges, each, policy, nursery)
                else:
                    nursery.start_soon(_accept_from, exchanges, each, nursery)
            task_status.started(listeners)
    finally:
        owned = [each for each in listeners if not isinstance(each, GenerationListener)]
        await close_listeners(owned)


async def serve_unix_exchanges(
    exchanges: Exchanges,
    address: AddressLike | UnixListener,
    policy: PeerPolicy | None,
    *,
    mode: int | None = None,
    task_status: trio.TaskStatus[UnixServer] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer the clients of a Unix socket, as :func:`serve_unix` does."""
    await serve_unix(
        exchanges.run,
        address,
        policy=policy,
        mode=mode,
        receive_descriptors=isinstance(address, UnixListener),
        # One that was ended still has to be closed.
        max_connections=2 * MAX_EXCHANGES,
        handler_errors="log",
        task_status=task_status,
    )


@enable_ki_protection
async def _accept_from(
    exchanges: Exchanges, listener: trio.SocketListener, nursery: trio.Nursery
) -> None:
    raw = raw_socket(listener.socket)
    name = repr(raw.getsockname())
    acceptor = Acceptor(raw, name)
    while True:
        try:
            fd, _ = await acceptor.accept()
        except OSError as exc:
            if not is_out_of_resources(exc):
                raise
            await acceptor.back_off(exc)
        else:
            sock = stdlib_socket.socket(fileno=fd)
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
            nursery.start_soon(_run_logged, exchanges, stream, name)


@enable_ki_protection
async def _accept_in_generation(
    exchanges: Exchanges,
    listener: GenerationListener[Any],
    policy: PeerPolicy | None,
    nursery: trio.Nursery,
) -> None:
    listener.is_claimed = listener.is_early = True
    listener.set_prepared()
    name = repr(listener)
    while True:
        try:
            stream = await listener.accept()
        except ConnectionClosedError:
            # The generation has ended.
            return
        except OSError as exc:
            if not is_out_of_resources(exc):
                raise
            await listener.acceptor.back_off(exc)
        else:
            nursery.start_soon(_run_logged, exchanges, stream, name, policy)


async def _run_logged(
    exchanges: Exchanges, stream: Stream, name: str, policy: PeerPolicy | None = None
) -> None:
    try:
        async with stream:
            if policy is not None and isinstance(stream, UnixConnection):
                admitted = await admit_or_close(stream, policy)
            else:
                admitted = True
            if admitted:
                await exchanges.run(stream)
    except Exception:
        logger.exception("%s: the answer to a client crashed", name)
