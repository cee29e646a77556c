"""Tools for testing programs that use connections: pairs, full sockets, leaked descriptors.

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

__all__ = [
    "assert_no_fd_leak",
    "clog",
    "clogged_pair",
    "connection_pair",
    "limit_descriptors",
    "open_descriptors",
    "unclog",
]

_export(globals())
