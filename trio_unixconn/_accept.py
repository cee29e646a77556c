"""Accepting connections: the one loop of every server.

Sources: accept(2)
"""

from __future__ import annotations

from typing import Final

# How long to wait after accept(2) said that no descriptor or memory is free. As
# trio.serve_listeners.
ACCEPT_RETRY_DELAY: Final = 0.1
