"""A little of ``nox -s handover-faults``; figures in seconds are only shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.handover.points import GIVER, TAKER, points
from tests.faults.playing import play

pytestmark = [pytest.mark.slow, pytest.mark.once]


@pytest.mark.parametrize("scene", ["passing", "crowd", "lie"])
def test_handover_faults_scene(scene: str, tmp_path: Path) -> None:
    """The figures of a scene are the expected ones; nox plays the others."""
    figures, said = play("tests.faults.handover", "--quick", scene, tmp_path)
    assert figures["wrong"] == [], said


def test_handover_faults_has_all_points() -> None:
    """Each frame is sent and received: three points for each of eight frames, on both sides."""
    found = points()
    assert len({(each.side, each.fault()) for each in found}) == 24
    assert [sum(each.side == side for each in found) for side in (GIVER, TAKER)] == [12, 12]
