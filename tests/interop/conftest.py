"""Whether the real peers are there to test against."""

from __future__ import annotations

import pytest

from interop.harness import require_glib
from interop.programs import require_program


@pytest.fixture(scope="session")
def real_glib() -> None:
    """PyGObject is there."""
    require_glib()


@pytest.fixture(scope="session")
def curl() -> str:
    """Where curl is."""
    return require_program("curl")


@pytest.fixture(scope="session")
def socat() -> str:
    """Where socat is."""
    return require_program("socat")


@pytest.fixture(scope="session")
def dbus_daemon() -> str:
    """Where dbus-daemon is."""
    return require_program("dbus-daemon")


@pytest.fixture(scope="session")
def haproxy() -> str:
    """Where HAProxy is."""
    return require_program("haproxy")
