"""What every test runs under: the library's own guard, which counts descriptors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from pools import children

from trio_unixconn.testing import plugin

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest_plugins = ["pytester"]


def pytest_configure(config: pytest.Config) -> None:
    """Have the plugin also where the package is not installed, and nothing names it."""
    if not config.pluginmanager.has_plugin("trio_unixconn"):
        config.pluginmanager.register(plugin, "trio_unixconn")


@pytest.fixture(autouse=True)
def no_test_leaks(fd_leak_guard: None) -> None:
    """Open descriptors after the test are those from before it."""


@pytest.fixture
def no_child_left() -> Iterator[None]:
    """Child processes after the test, zombies included, are those from before it."""
    before = children()
    yield
    assert children() == before


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_child_left: None) -> Path:
    """The folder where workers note what tests look at."""
    monkeypatch.setenv("POOL_FOLDER", str(tmp_path))
    return tmp_path


# Whether a machine is slow is nothing that a test should say.
settings.register_profile("here", deadline=None)
settings.load_profile("here")
