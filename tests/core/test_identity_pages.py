"""The pages about identity: their programs run, and print what they say."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests._helpers.environment import without_coverage
from tests._helpers.processes import ROOT

DOCS = ROOT / "docs"
PAGES = [
    "how-to/know-your-peer.md",
    "how-to/decide-who-may-connect.md",
    "explanation/identity.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_programs(page: str) -> None:
    """The blocks of a page are one program, which runs without a warning."""
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE
    )
    assert blocks
    code = "\n".join(blocks)
    done = subprocess.run(
        # In the explanation, sockets are left to the end of the program.
        [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    said = [line for line in done.stdout.splitlines() if not line.startswith("an older kernel")]
    expected = re.findall(r"print\(.*\)  # (.*)$", code, re.MULTILINE)
    if len(said) == len(done.stdout.splitlines()):
        assert said == expected


def test_the_example() -> None:
    """The example of a policy runs, without a warning."""
    example = ROOT / "examples" / "peer_policy.py"
    # As another user, which it becomes, it could not write down what it covered.
    done = subprocess.run(
        [sys.executable, "-W", "error", str(example)],
        capture_output=True,
        text=True,
        check=False,
        env=without_coverage(),
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert "is not admitted by PeerPolicy(uids={" in done.stdout
