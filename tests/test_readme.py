"""The README: its examples run and print what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests._helpers.processes import ROOT

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^## (.*?)\n\n```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_two_commands_come_first() -> None:
    """The first two blocks are the commands: the demonstration, and the tests."""
    kinds = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in kinds[:3]] == ["console", "console", "python"]
    assert kinds[0][1].splitlines()[-1].endswith("trio-unixconn demo")
    assert "nox -s tests" in kinds[1][1]


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_example(tmp_path: Path, title: str, code: str) -> None:
    """Each example runs without a warning, and prints what its comments say."""
    name = re.match(r"# (\w+\.py)\n", code)
    file = tmp_path / (name[1] if name else "example.py")
    file.write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(file)], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    expected = re.findall(r"print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert expected
    assert sorted(done.stdout.splitlines()) == sorted(expected)


def test_there_is_an_example_of_each() -> None:
    """There is one for a descriptor, credentials, callbacks, a Cancellable, workers; all short."""
    assert len(EXAMPLES) == 5
    for title, code in EXAMPLES:
        assert len(code.splitlines()) <= 40, title
