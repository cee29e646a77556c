"""The HTTP that a statistics socket speaks: one request, one answer, and the end.

The rule of this file: only what h11 has understood is answered by anything but an error, and
no body is read.

Sources: RFC 9110, RFC 9112
"""

from __future__ import annotations

from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import h11

from ._exposition import JSON_TYPE, PROMETHEUS_TYPE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .._connection import UnixConnection

# The longest head of a request, in bytes.
LONGEST_HEAD: Final = 8192
_READ: Final = 4096
_TEXT: Final = "text/plain; charset=utf-8"
_TYPES: Final = {b"/": JSON_TYPE, b"/metrics": PROMETHEUS_TYPE}


async def answer(
    conn: UnixConnection, begun: bytes, pages: Mapping[bytes, Callable[[], str]]
) -> None:
    """Answer the request that begins with ``begun``.

    Args:
      pages: what makes the text of ``/`` and of ``/metrics``.
    """
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=LONGEST_HEAD)
    data = begun
    status, kind, text, more = 200, _TEXT, "", list[tuple[str, str]]()
    method = b""
    try:
        while True:
            http.receive_data(data)
            request = http.next_event()
            if request is not h11.NEED_DATA:
                break
            data = await conn.receive_some(_READ)
        assert isinstance(request, h11.Request)  # noqa: S101 - that comes first, or an error
        method, path = request.method, request.target.partition(b"?")[0]
        if path not in pages:
            status, text = 404, "there are / (JSON) and /metrics (Prometheus)\n"
        elif method not in (b"GET", b"HEAD"):
            status, text, more = 405, "only GET and HEAD\n", [("Allow", "GET, HEAD")]
        else:
            kind, text = _TYPES[path], pages[path]()
    except h11.RemoteProtocolError as exc:
        status, text = exc.error_status_hint, f"{exc}\n"
    body = text.encode()
    headers = [
        ("Date", formatdate(usegmt=True)),
        ("Content-Type", kind),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
        *more,
    ]
    reason = HTTPStatus(status).phrase.encode()
    head = http.send(h11.Response(status_code=status, headers=headers, reason=reason))
    await conn.send_all((head or b"") + (b"" if method == b"HEAD" else body))
