"""serve_asgi: an ASGI application in the workers of a pool.

Invariant: this process imports neither the application nor hypercorn.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, cast

import trio

from .._trio_task import check_task
from ..pool import WorkerPoolOptions, serve_with_workers
from ..pool._config import checked_timeout
from ..pool._import_string import parse_import_string

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._listener import UnixListener
    from ..handover._generation import Generation
    from ..handover._listeners import GenerationListener
    from ..pool import WorkerServer
    from ..pool._server import AcceptMode

_HANDLER: Final = "trio_unixconn.asgi._worker:handle"
_SETUP: Final = "trio_unixconn.asgi._worker:setup"


class ASGIOptions(WorkerPoolOptions, total=False):
    """The keyword arguments of :func:`serve_asgi`."""

    certfile: str | os.PathLike[str] | None
    keyfile: str | os.PathLike[str] | None
    root_path: str
    keep_alive_timeout: float
    access_log: bool


def pool_arguments(app: str, options: ASGIOptions) -> tuple[str, WorkerPoolOptions]:
    """Return the handler and the options of the pool that serves an application.

    Raises:
      TypeError: an option of a wrong type.
      ValueError: an invalid option.
    """
    parse_import_string(app, "app")
    remaining: dict[str, Any] = dict(options)
    for name in ("setup", "setup_data"):
        if remaining.pop(name, None):
            raise ValueError(
                f"{name} cannot be used with an ASGI application, whose lifespan takes its place"
            )
    certfile = _path("certfile", remaining.pop("certfile", None))
    keyfile = _path("keyfile", remaining.pop("keyfile", None))
    if keyfile is not None and certfile is None:
        raise ValueError("keyfile can only be used with certfile")
    root_path = remaining.pop("root_path", "")
    if not isinstance(root_path, str):
        raise TypeError(f"root_path must be a str, got {type(root_path).__name__}")
    if root_path and not root_path.startswith("/"):
        raise ValueError(f"root_path must begin with a slash, got {root_path!r}")
    access_log = remaining.pop("access_log", False)
    if not isinstance(access_log, bool):
        raise TypeError(f"access_log must be a bool, got {type(access_log).__name__}")
    data = {
        "app": app,
        "certfile": certfile,
        "keyfile": keyfile,
        "root_path": root_path,
        "keep_alive_timeout": checked_timeout(
            remaining.pop("keep_alive_timeout", 5), "keep_alive_timeout"
        ),
        "access_log": access_log,
    }
    pool: Any = {**remaining, "setup": _SETUP, "setup_data": json.dumps(data).encode()}
    return _HANDLER, pool


def _path(name: str, value: object) -> str | None:
    """Return an absolute path: a worker may be in another directory."""
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {type(value).__name__}")
    return os.path.abspath(os.fsdecode(cast("str | os.PathLike[str]", value)))


async def serve_asgi(
    app: str,
    listeners: Sequence[trio.SocketListener | UnixListener | GenerationListener[Any]],
    *,
    accept: AcceptMode = "parent",
    generation: Generation | None = None,
    task_status: trio.TaskStatus[WorkerServer] = trio.TASK_STATUS_IGNORED,
    **options: Unpack[ASGIOptions],
) -> None:
    """Accept connections in this process, and let an ASGI application in worker processes answer.

    ::

        listeners = await trio.open_tcp_listeners(8000, host="127.0.0.1")
        server = await nursery.start(
            partial(serve_asgi, "package.module:app", listeners, workers=4)
        )
        ...
        server.drain(timeout=10)

    It requires hypercorn, which the extra ``asgi`` installs. The application runs under trio. It
    gets HTTP/1.1, HTTP/2 (with TLS, or without it if the client begins with it) and WebSockets.

    ``scope["client"]`` is the address of the client, and None on a Unix socket.
    ``scope["extensions"]["trio_unixconn"]`` is a dict with

    - ``credentials``: on a Unix socket a dict with the ``pid``, ``uid`` and ``gid`` of the peer,
      which the kernel guarantees; otherwise None,
    - ``proxy``: with ``proxy_protocol`` a dict with the values of :class:`ProxyHeader`; otherwise
      None. Its source is ``scope["client"]``, and if the client speaks TLS with the balancer, the
      scheme is https.

    Args:
      app: ``"package.module:name"``: an ASGI 3 application, which each worker imports. Its lifespan
        begins before a worker is ready, and ends before a worker exits.
      listeners: as of :func:`serve_with_workers`.
      accept: which process accepts connections, as of :func:`serve_with_workers`.
      generation: as of :func:`serve_with_workers`. Connections that are open stay with this
        generation until they end.
      options: the keyword arguments of :func:`open_worker_pool` except ``setup`` and
        ``setup_data``, and these:

        - ``certfile``: the path of a certificate, with the chain, as PEM: all connections begin
          with TLS. Each worker reads it when it starts, before it imports the application.
        - ``keyfile``: the path of its key without a password; default: it is in ``certfile``.
        - ``root_path``: the part of the path that a proxy has removed. Default: "".
        - ``keep_alive_timeout``: the time in seconds after which a connection without a request is
          closed, and by which a request must have all its headers. Default: 5.
        - ``access_log``: whether workers print a line for each request. Default: False.

    Returns:
      As :func:`serve_with_workers`. A worker that drains or is replaced answers the requests that
      it has. Responses of HTTP/1.1 say ``Connection: close``, clients of HTTP/2 get GOAWAY, and
      WebSockets are closed with 1012 (service restart). An idle connection is closed after a
      second.

    Raises:
      TypeError: as :func:`serve_with_workers`; the caller still owns all listeners.
      ValueError: likewise.
      ConnectionClosedError: a closed listener; the caller still owns all of them.
      WorkerStartError: as :func:`open_worker_pool`: the application cannot be imported, cannot be
        called, or its lifespan says that the startup has failed. The listeners are closed.
      ExceptionGroup: as :func:`serve_with_workers`.
    """
    check_task()
    handler, pool = pool_arguments(app, options)
    await serve_with_workers(
        handler,
        listeners,
        accept=accept,
        generation=generation,
        task_status=task_status,
        **pool,
    )
