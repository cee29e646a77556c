"""ASGI applications in worker processes: ``serve_asgi``.

This needs hypercorn, which the extra ``asgi`` installs.
"""

from .._public import export as _export
from ._server import ASGIOptions as ASGIOptions, serve_asgi as serve_asgi

__all__ = ["ASGIOptions", "serve_asgi"]

_export(globals())
