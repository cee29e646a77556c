"""One trio process, which accepts and serves: what there is without any workers.

Invariant: trio.serve_listeners, and nothing beside it.
"""

from __future__ import annotations

import trio

from .serving import bound, serve

if __name__ == "__main__":
    trio.run(serve, bound())
