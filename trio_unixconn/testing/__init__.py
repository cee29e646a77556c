"""Tools for tests: pairs, full sockets, leaked descriptors, a service manager.

Invariant: no module but ``plugin`` needs pytest, which finds that one by its entry point.
"""

from .._connection import connection_pair as connection_pair
from .._public import export as _export
from ._descriptors import (
    assert_no_fd_leak as assert_no_fd_leak,
    limit_descriptors as limit_descriptors,
    open_descriptors as open_descriptors,
)
from ._pairs import clog as clog, clogged_pair as clogged_pair, unclog as unclog
from ._service_manager import (
    FakeServiceManager as FakeServiceManager,
    Notification as Notification,
    open_service_manager as open_service_manager,
)

__all__ = [
    "FakeServiceManager",
    "Notification",
    "assert_no_fd_leak",
    "clog",
    "clogged_pair",
    "connection_pair",
    "limit_descriptors",
    "open_descriptors",
    "open_service_manager",
    "unclog",
]

_export(globals())
