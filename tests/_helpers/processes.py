"""Processes that tests and tools start, which import modules of this project."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = "tests._helpers.programs"


def environment() -> dict[str, str]:
    """Return the environment in which a Python finds this project, installed or not."""
    found = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, found))}


def python(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module in an :func:`environment`."""
    return [sys.executable, "-m", module, *arguments]


def program(name: str, *arguments: str) -> list[str]:
    """Return the command that runs a program of :mod:`tests._helpers.programs`."""
    return python(f"{PROGRAMS}.{name}", *arguments)
