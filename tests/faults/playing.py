"""Play a scene of a program that injects faults, in a process of its own."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

from tests._helpers.environment import without_coverage
from tests._helpers.processes import python

if TYPE_CHECKING:
    from pathlib import Path


def play(module: str, size: str, scene: str, directory: Path) -> tuple[dict[str, Any], str]:
    """Return the figures of a scene, and what the program has said.

    Args:
      size: an option that limits how long it takes.
      directory: for a file with the figures.
    """
    figures = directory / "figures"
    # A process that is killed leaves half a file of coverage data.
    done = subprocess.run(
        python(module, size, "--only", scene, "--json", str(figures)),
        capture_output=True,
        text=True,
        env=without_coverage(),
        timeout=120,
        check=False,
    )
    assert figures.exists(), done.stderr
    found: dict[str, Any] = json.loads(figures.read_text())
    return found, done.stderr
