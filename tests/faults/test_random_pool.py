"""A pool to which everything is done at random; ``nox -s pool-faults -- --random 300``."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time

import pytest

from tests._helpers.environment import environment
from tests._helpers.processes import python

pytestmark = pytest.mark.slow

PROGRAM = "tests.faults.pool.random_pool"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Not in this process: episodes start workers by the dozen, which inherit what it has open.
    return subprocess.run(
        python(PROGRAM, *arguments),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=230,
        check=False,
    )


@pytest.mark.once
@pytest.mark.parametrize("seed", [1, 2])
def test_open_worker_pool_under_random_faults(seed: int) -> None:
    """Each submitter gets one outcome, and nothing is left; a failure prints its seed."""
    done = run("--seed", str(seed), "--episode", "0", "--length", "1")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.once
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_open_worker_pool_interrupted_under_random_faults(seed: int) -> None:
    """Ctrl-C ends the program with KeyboardInterrupt, and nothing is left."""
    with subprocess.Popen(
        python(PROGRAM, "--seed", str(seed), "--interrupt"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        # So that it does not block when it writes much; and it is killed if it hangs.
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))  # type: ignore[union-attr]
        reader.start()
        killer = threading.Timer(120, process.kill)
        killer.start()
        try:
            line = process.stdout.readline()
            if line == "running\n":
                # Any moment is good.
                time.sleep(seed * 0.4)
                process.send_signal(signal.SIGINT)
                line = process.stdout.readline()
            process.wait()
        finally:
            killer.cancel()
            reader.join()
    assert line, errors
    assert json.loads(line) == {"ended": "KeyboardInterrupt", "left": []}, errors
