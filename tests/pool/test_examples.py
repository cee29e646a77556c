"""The examples of worker pools run, without a warning; and a program in the page about pools."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests._helpers.environment import without_coverage
from tests._helpers.processes import ROOT

pytestmark = [pytest.mark.usefixtures("unmeasured_processes"), pytest.mark.slow]

EXAMPLES = ROOT / "examples"
DESIGN = ROOT / "docs" / "explanation" / "pools.md"


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


def test_pools_page_program_of_reuseport() -> None:
    """Connections in the queue of a listener with SO_REUSEPORT are reset when it is closed."""
    (program,) = re.findall(r"^```python\n(.*?)^```$", DESIGN.read_text(), re.DOTALL | re.MULTILINE)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.stdout, done.stderr) == (b"True\n", b"")
