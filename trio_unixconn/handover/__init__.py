"""Generations of a server: replace a running process without dropping a connection.

``open_generation`` makes a process a generation: it inherits the listeners of the one that runs, or
opens them; ``Generation.upgrade`` starts its successor.
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
from ._listeners import GenerationListener as GenerationListener
from ._passing import PassedConnections as PassedConnections

__all__ = [
    "Generation",
    "GenerationListener",
    "PassedConnections",
    "Phase",
    "ServiceNotifier",
    "Upgrade",
    "open_generation",
    "request_upgrade",
]

_export(globals())
