"""Cancellable does in every scenario what the real Gio.Cancellable does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests._helpers.glib import SYSTEM_PYTHON
from tests._helpers.programs import cancellable_scenarios

pytestmark = [pytest.mark.interop, pytest.mark.slow]

PROGRAM = Path(cancellable_scenarios.__file__)
NAMES = [scenario.__name__ for scenario in cancellable_scenarios.SCENARIOS]

Seen = dict[str, Any]


def run(*command: str) -> Seen:
    """Run all scenarios in a process; return what they saw."""
    process = subprocess.run(command, stdout=subprocess.PIPE, timeout=120, check=True)
    seen: Seen = json.loads(process.stdout)
    assert list(seen) == NAMES
    return seen


@pytest.fixture(scope="module")
def in_glib(real_glib: None) -> Seen:
    """What the scenarios see in GLib."""
    return run(SYSTEM_PYTHON, "-E", "-s", str(PROGRAM), "glib")


@pytest.fixture(scope="module")
def in_ours() -> Seen:
    """What they see in ours."""
    return run(sys.executable, str(PROGRAM), "ours")


@pytest.mark.parametrize("name", NAMES)
def test_cancellable_as_in_glib(name: str, in_glib: Seen, in_ours: Seen) -> None:
    """A scenario sees the same in GLib and in ours, unless this GLib deadlocks in it."""
    if in_glib[name] == cancellable_scenarios.DEADLOCK:
        pytest.skip("this version of GLib deadlocks")
    assert in_ours[name] == in_glib[name]
