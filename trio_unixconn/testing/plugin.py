"""The pytest plugin: fixtures that a test asks for by name.

The rule of this file: nothing is on unless a test asks for it, and only this file imports
pytest.
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
        # In whichever order the test names them, the guard counts what the pair left behind.
        request.getfixturevalue("fd_leak_guard")
    with closing_pair() as pair:
        yield pair


@pytest.fixture
def unix_socket_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A path for a socket, in a folder of its own, that fits into an address.

    A few dozen characters may be appended. The folder is one of pytest's, or, where these have
    too long a path, another, which is removed after the test.
    """
    folder = tmp_path_factory.mktemp("unix")
    if _paths.fits(folder):
        yield folder / _paths.NAME
    else:
        with _paths.short_folder() as short:
            yield short / _paths.NAME
