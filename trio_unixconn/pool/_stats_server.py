"""serve_statistics: a pool's statistics, for whoever asks at a Unix socket.

The rule of this file: one question, one answer, and the end; nobody can hold up the pool, nor
keep a connection for longer than it takes.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from .._listener import UnixListener
from .._policy import PeerPolicy
from .._server import serve_unix
from ..errors import UnixConnectionError
from ._exposition import as_json, as_prometheus
from ._server import WorkerServer

if TYPE_CHECKING:
    import os

    from .._address import UnixSocketAddress
    from .._connection import UnixConnection
    from .._server import UnixServer
    from ._pool import WorkerPool

# After so many seconds without a byte, nothing is what was asked.
_PATIENCE: Final = 0.5
_LONGEST_EXCHANGE: Final = 5.0
_LONGEST_LINE: Final = 8192
_READ: Final = 4096
_MOST: Final = 64


async def serve_statistics(
    source: WorkerServer | WorkerPool,
    address: str | bytes | os.PathLike[str] | os.PathLike[bytes] | UnixSocketAddress | UnixListener,
    *,
    policy: PeerPolicy | None = None,
    mode: int | None = None,
    task_status: trio.TaskStatus[UnixServer] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer whoever asks at a Unix socket with what a pool has done, and is doing.

    ::

        nursery.start_soon(serve_statistics, server, "/run/app/stats")

    A client sends one of these, and reads to the end of the stream:

    - ``json`` and a newline, or nothing: the answer is a JSON document, of the attributes of
      the pool's statistics and, of a server, ``accepted`` and ``denied``. Nothing is the end of
      the stream, or half a second of silence.
    - ``prometheus`` and a newline: Prometheus's text format.
    - an HTTP request for ``/``, which is the document, or for ``/metrics``.

    Args:
      source: what ``serve_with_workers`` or ``open_worker_pool`` gives.
      address: as of :func:`serve_unix`; or a :class:`UnixListener`, which this owns from now on.
      policy: who may ask; the user of this process if left out.
      mode: the permission bits of the path, ``0o600`` if left out; not with a listener.

    Returns:
      Never, unless what ``nursery.start`` returns, a :class:`UnixServer`, is drained. It is for
      whoever starts this to cancel it.

    Raises:
      ImportError: h11, of the extra ``cli``, is missing.
      TypeError, ValueError, OSError: as :func:`serve_unix`.
    """
    if importlib.util.find_spec("h11") is None:
        raise ImportError(
            "serve_statistics needs h11; install it with: pip install 'trio_unixconn[cli]'"
        )
    await serve_unix(
        partial(_answer, source),
        address,
        policy=PeerPolicy.same_user() if policy is None else policy,
        mode=mode,
        receive_descriptors=isinstance(address, UnixListener),
        max_connections=_MOST,
        handler_errors="log",
        task_status=task_status,
    )


async def _answer(source: WorkerServer | WorkerPool, conn: UnixConnection) -> None:
    try:
        with trio.move_on_after(_LONGEST_EXCHANGE):
            await _answer_in_time(source, conn)
    except UnixConnectionError:
        # The client has left.
        pass


async def _answer_in_time(source: WorkerServer | WorkerPool, conn: UnixConnection) -> None:
    from . import _http  # noqa: PLC0415 - h11 is of an extra

    server: dict[str, int] = {}
    if isinstance(source, WorkerServer):
        server = {"accepted": source.accepted, "denied": source.denied}

    def document() -> str:
        return as_json(source.statistics(), server)

    def metrics() -> str:
        return as_prometheus(source.statistics(), server)

    begun = await _begun(conn)
    line = begun.partition(b"\n")[0].rstrip(b"\r")
    if line in (b"", b"json"):
        text = document()
    elif line == b"prometheus":
        text = metrics()
    elif b" " in line or len(begun) > _LONGEST_LINE:
        await _http.answer(conn, begun, {b"/": document, b"/metrics": metrics})
        return
    else:
        text = "send json, prometheus or an HTTP request\n"
    await conn.send_all(text.encode())


async def _begun(conn: UnixConnection) -> bytes:
    """Receive a line, or what there is of it."""
    data = b""
    with trio.move_on_after(_PATIENCE):
        data = await conn.receive_some(_READ)
    more = data
    while more and b"\n" not in data and len(data) <= _LONGEST_LINE:
        more = await conn.receive_some(_READ)
        data += more
    return data
