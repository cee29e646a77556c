"""What the workers of ``serve_asgi`` run: a setup, and a handler for each connection.

Invariant: the certificate and its key are read before anything of the application runs, which may
give up the privileges that they need.
"""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from .._connection import UnixConnection
from .._credentials import Credentials
from ..errors import ReportedError
from ._application import Application, ApplicationError, import_application, in_a_line, lifespan

if TYPE_CHECKING:
    from ..pool import Job, ProxyHeader, WorkerInfo
    from ._application import ASGIApplication

# In seconds; OpenSSL needs two round trips.
HANDSHAKE_TIMEOUT: Final = 10.0
_ALPN: Final = ["h2", "http/1.1"]


@attrs.frozen
class ASGIWorker:
    """What the setup of a worker has made."""

    app: ASGIApplication
    state: dict[str, Any]
    config: Any
    tls: ssl.SSLContext | None


class HandshakeError(ReportedError):
    """A client has not begun with TLS as it must."""


@asynccontextmanager
async def setup(info: WorkerInfo) -> AsyncGenerator[ASGIWorker, None]:
    """Start the application.

    Raises:
      ApplicationError: in one line.
    """
    options = json.loads(info.data)
    reference: str = options["app"]
    tls = load_certificate(options["certfile"], options["keyfile"])
    try:
        from ._hypercorn import make_config  # only workers need it
    except ImportError as exc:
        raise ApplicationError(
            "an ASGI application requires hypercorn (pip install 'trio_unixconn[asgi]'): "
            f"{in_a_line(exc)}"
        ) from exc
    config = make_config(
        root_path=options["root_path"],
        keep_alive_timeout=options["keep_alive_timeout"],
        access_log=options["access_log"],
    )
    app = import_application(reference)
    async with lifespan(app, reference) as state:
        yield ASGIWorker(app, state, config, tls)


def load_certificate(certfile: str | None, keyfile: str | None) -> ssl.SSLContext | None:
    """Return a context for TLS with HTTP/2; None without a certificate.

    Raises:
      ApplicationError: a file cannot be read, or has no certificate or key.
    """
    if certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    # RFC 9113, section 9.2.
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(_ALPN)
    for path in (certfile, keyfile or certfile):
        try:
            with open(path, "rb"):
                pass
        except OSError as exc:
            raise ApplicationError(f"cannot read {path}: {exc.strerror}") from exc
    try:
        # Without a password, OpenSSL would ask for one on the terminal.
        context.load_cert_chain(certfile, keyfile, password="")
    except ssl.SSLError as exc:
        files = certfile if keyfile is None else f"{certfile} and {keyfile}"
        raise ApplicationError(
            f"{files} must be a certificate and its key without a password, as PEM: {exc}"
        ) from exc
    return context


async def handle(stream: Any, job: Job) -> None:
    """Answer the requests of a connection.

    Raises:
      ReportedError: the client has sent invalid input.
    """
    worker: ASGIWorker = job.state
    try:
        peer = job.peer
    except OSError:
        # ENOTCONN: the client has left.
        return
    try:
        await _serve(worker, stream, job, peer)
    except ReportedError as exc:
        raise ReportedError(f"{_name_of(peer)}: {exc}") from exc


async def _serve(worker: ASGIWorker, stream: Any, job: Job, peer: Any) -> None:
    from ._hypercorn import Client, serve_connection  # setup has imported it

    proxy = job.proxy
    credentials = alpn = None
    is_secure = proxy is not None and proxy.tls is not None
    name = stream.socket.getsockname()
    server: tuple[str, int | None]
    if isinstance(stream, UnixConnection):
        # Of an abstract name, the first byte is NUL.
        server = ("@" + os.fsdecode(name[1:]) if isinstance(name, bytes) else name, None)
        found = stream.get_peer_credentials()
        credentials = {"pid": found.pid, "uid": found.uid, "gid": found.gid}
    else:
        server = name[:2]
    if worker.tls is not None:
        stream = trio.SSLStream(stream, worker.tls, server_side=True, https_compatible=True)
        await _shake_hands(stream)
        alpn = stream.selected_alpn_protocol()
        is_secure = True
    client = Client(
        client=_address(peer),
        server=server,
        extension={"credentials": credentials, "proxy": proxy and _proxy_values(proxy)},
        is_secure=is_secure,
        alpn=alpn,
    )
    application = Application(worker.app, worker.state, job.draining)
    await serve_connection(application, worker.config, stream, client)


def _address(peer: Any) -> tuple[str, int] | None:
    return (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else None  # pyright: ignore[reportUnknownArgumentType]


def _name_of(peer: Any) -> str:
    if isinstance(peer, Credentials):
        return f"client of process {peer.pid}, user {peer.uid}"
    address = _address(peer)
    if address is None:
        # The path of a Unix socket that a balancer has told.
        return f"client {peer}"
    host, port = address
    return f"client [{host}]:{port}" if ":" in host else f"client {host}:{port}"


async def _shake_hands(stream: trio.SSLStream[Any]) -> None:
    try:
        with trio.fail_after(HANDSHAKE_TIMEOUT):
            await stream.do_handshake()
    except trio.TooSlowError:
        raise HandshakeError(f"TLS: no handshake within {HANDSHAKE_TIMEOUT:g} s") from None
    except trio.BrokenResourceError as exc:
        raise HandshakeError(f"TLS: the handshake failed: {exc.__cause__ or exc}") from exc


def _proxy_values(proxy: ProxyHeader) -> dict[str, Any]:
    """Return a header as an ASGI scope can have it."""
    tls = proxy.tls
    return {
        "version": proxy.version,
        "is_local": proxy.is_local,
        "source": proxy.source,
        "destination": proxy.destination,
        "unique_id": proxy.unique_id,
        "authority": proxy.authority,
        "alpn": proxy.alpn,
        "tls": None if tls is None else attrs.asdict(tls),
        "tlvs": list(proxy.tlvs.items()),
    }
