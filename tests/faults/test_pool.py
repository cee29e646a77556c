"""A little of each scene of ``nox -s pool-faults``; figures in seconds are ignored here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests._helpers.waiting import until
from tests.faults.playing import play
from tests.faults.pool.runner import SCENES
from trio_unixconn.pool import open_worker_pool

pytestmark = pytest.mark.slow


@pytest.mark.once
@pytest.mark.parametrize("scene", SCENES)
def test_pool_faults_scene(scene: str, tmp_path: Path) -> None:
    """The records of clients, pool and handlers agree."""
    figures, said = play("tests.faults.pool", "--tiny", scene, tmp_path)
    found = figures["scenes"][scene]["figures"]
    wrong = [each for each in found if not each["holds"] and "seconds" not in each["name"]]
    assert not wrong, said


async def test_open_worker_pool_without_pidfds(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_worker_pool() waits for workers on a kernel without pidfds, too."""
    monkeypatch.delattr(os, "pidfd_open")
    async with open_worker_pool("tests._helpers.pool_handlers:do", workers=2) as pool:
        pid = pool.statistics().workers[0].pid
        await pool.restart()
        await until(lambda: all(each.pid != pid for each in pool.statistics().workers))
