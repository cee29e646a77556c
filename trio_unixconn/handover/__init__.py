"""Generations of a server: replace a running process without dropping a connection.

``open_generation`` makes a process a generation: it inherits the listeners of the one that runs, or
opens them; ``Generation.upgrade`` starts its successor. ``take_haproxy_listeners`` and
``serve_haproxy_listeners`` do the same with HAProxy as the other process.
"""

from .._public import export as _export
from ._generation import (
    Generation as Generation,
    Phase as Phase,
    ServiceNotifier as ServiceNotifier,
    Upgrade as Upgrade,
    open_generation as open_generation,
    request_upgrade as request_upgrade,
)
from ._haproxy import (
    HAProxyListeners as HAProxyListeners,
    HAProxySocket as HAProxySocket,
    serve_haproxy_listeners as serve_haproxy_listeners,
    take_haproxy_listeners as take_haproxy_listeners,
)
from ._listeners import GenerationListener as GenerationListener
from ._passing import PassedConnections as PassedConnections

__all__ = [
    "Generation",
    "GenerationListener",
    "HAProxyListeners",
    "HAProxySocket",
    "PassedConnections",
    "Phase",
    "ServiceNotifier",
    "Upgrade",
    "open_generation",
    "request_upgrade",
    "serve_haproxy_listeners",
    "take_haproxy_listeners",
]

_export(globals())
