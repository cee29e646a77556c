"""Whether the real GLib is there to test against."""

from __future__ import annotations

import os
import subprocess

import pytest

from interop.harness import SYSTEM_PYTHON

_PROBE = "import gi; gi.require_version('Gio', '2.0'); from gi.repository import Gio"


@pytest.fixture(scope="session", autouse=True)
def real_glib() -> None:
    """PyGObject is there. Where the whole suite must run (CI), its absence is a failure."""
    try:
        subprocess.run([SYSTEM_PYTHON, "-c", _PROBE], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as exc:  # pragma: no cover - it is there
        reason = (
            f"{SYSTEM_PYTHON} has no PyGObject ({exc}); on Debian and Ubuntu install the "
            "packages python3-gi and gir1.2-glib-2.0"
        )
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
