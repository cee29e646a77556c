"""The examples of worker pools run, without a warning."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests._helpers.environment import without_coverage
from tests._helpers.processes import ROOT

pytestmark = [pytest.mark.usefixtures("unmeasured_processes"), pytest.mark.slow]

EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pool_echo", "handled by two workers: 6\n"),
        ("pool_http", "connection 1, 3 times: Hello from process "),
        ("pool_numpy", "x as fast as bytes\n"),
        ("pool_broker", "and itself cannot open it ("),
    ],
)
def test_example_runs(name: str, said: str) -> None:
    """An example exits with status 0, and prints what it shows."""
    # Its workers become another user, which cannot write the data of coverage.
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        check=False,
        env=without_coverage(),
        timeout=120,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert said in done.stdout
