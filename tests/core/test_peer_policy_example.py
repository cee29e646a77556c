"""The example of a policy: it runs, and a client is denied."""

from __future__ import annotations

import subprocess
import sys

from tests._helpers.environment import without_coverage
from tests._helpers.processes import ROOT


def test_peer_policy_example() -> None:
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
