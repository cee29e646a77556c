"""The pytest plugin: fixtures that a test requests by name.

Invariant: nothing is on unless a test requests it, and only this module imports pytest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from . import _paths
from ._descriptors import assert_no_fd_leak
from ._pairs import closing_pair

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .._connection import UnixConnection


@pytest.fixture
def fd_leak_guard() -> Iterator[None]:
    """Fail unless the open descriptors after the test are those from before it.

    For a whole module, ``pytestmark = pytest.mark.usefixtures("fd_leak_guard")``.
    """
    with assert_no_fd_leak():
        yield


@pytest.fixture
def unix_connection_pair(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[UnixConnection, UnixConnection]]:
    """Two connections that are connected to each other; closed after the test.

    The test may close them too. It may be one of trio's, or call ``trio.run`` itself.
    """
    if "fd_leak_guard" in request.fixturenames:
        # In any order of the two names, the guard begins first and ends last.
        request.getfixturevalue("fd_leak_guard")
    with closing_pair() as pair:
        yield pair


@pytest.fixture
def unix_socket_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A path for a socket, in a directory of its own, that fits into an address.

    40 bytes may be appended. The directory is one of pytest's. If its path is too long, it is
    another one, which is removed after the test.
    """
    directory = tmp_path_factory.mktemp("unix")
    if _paths.fits(directory):
        yield directory / _paths.NAME
    else:
        with _paths.short_directory() as short:
            yield short / _paths.NAME
