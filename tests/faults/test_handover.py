"""A little of ``nox -s handover-faults``; figures in seconds are only shown."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests._helpers.environment import without_coverage
from tests._helpers.processes import python
from tests.faults.handover.points import GIVER, TAKER, points

pytestmark = [pytest.mark.slow, pytest.mark.once]


@pytest.mark.parametrize("scene", ["passing", "crowd", "lie"])
def test_handover_faults_scene(scene: str, tmp_path: Path) -> None:
    """The figures of a scene are the expected ones; nox plays the others."""
    figures = tmp_path / "figures"
    done = subprocess.run(
        python("tests.faults.handover", "--quick", "--only", scene, "--json", str(figures)),
        capture_output=True,
        text=True,
        env=without_coverage(),
        timeout=120,
        check=False,
    )
    assert figures.exists(), done.stderr
    assert json.loads(figures.read_text())["wrong"] == [], done.stderr


def test_handover_faults_has_all_points() -> None:
    """Each frame is sent and received: three points for each of eight frames, on both sides."""
    found = points()
    assert len({(each.side, each.fault()) for each in found}) == 24
    assert [sum(each.side == side for each in found) for side in (GIVER, TAKER)] == [12, 12]
