"""Whether the real GLib is there to test against."""

from __future__ import annotations

import pytest

from interop.harness import require_glib


@pytest.fixture(scope="session", autouse=True)
def real_glib() -> None:
    """PyGObject is there."""
    require_glib()
