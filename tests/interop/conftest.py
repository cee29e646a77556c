"""Fixtures for the real peers: they skip, or fail on CI, if the peer is not installed."""

from __future__ import annotations

import pytest

from tests._helpers.glib import require_glib
from tests._helpers.real_programs import require_program


@pytest.fixture(autouse=True)
def unmeasured(unmeasured_processes: None) -> None:
    """Tests of the core, the pool and the command line run what these processes do, too."""


@pytest.fixture(scope="session")
def real_glib() -> None:
    """PyGObject is installed."""
    require_glib()


@pytest.fixture(scope="session")
def curl() -> str:
    """The path of curl."""
    return require_program("curl")


@pytest.fixture(scope="session")
def socat() -> str:
    """The path of socat."""
    return require_program("socat")


@pytest.fixture(scope="session")
def dbus_daemon() -> str:
    """The path of dbus-daemon."""
    return require_program("dbus-daemon")


@pytest.fixture(scope="session")
def haproxy() -> str:
    """The path of HAProxy."""
    return require_program("haproxy")


@pytest.fixture(scope="session")
def qemu() -> str:
    """The path of QEMU."""
    return require_program("qemu-system-x86_64", package="qemu-system-x86")


@pytest.fixture(scope="session")
def tmux() -> str:
    """The path of tmux."""
    return require_program("tmux")


@pytest.fixture(scope="session")
def gpg_agent() -> str:
    """The path of gpg-agent."""
    return require_program("gpg-agent")
