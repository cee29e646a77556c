"""What every test runs under: the library's own guard, which counts descriptors."""

from __future__ import annotations

import pytest
from hypothesis import settings

from trio_unixconn.testing import plugin

pytest_plugins = ["pytester"]


def pytest_configure(config: pytest.Config) -> None:
    """Have the plugin also where the package is not installed, and nothing names it."""
    if not config.pluginmanager.has_plugin("trio_unixconn"):
        config.pluginmanager.register(plugin, "trio_unixconn")


@pytest.fixture(autouse=True)
def no_test_leaks(fd_leak_guard: None) -> None:
    """Open descriptors after the test are those from before it."""


# Whether a machine is slow is nothing that a test should say.
settings.register_profile("here", deadline=None)
settings.load_profile("here")
