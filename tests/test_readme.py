"""The README: its examples run and print what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"^## (.*?)\n\n```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_two_commands_come_first() -> None:
    """The first two blocks are the commands: the demonstration, and the tests."""
    kinds = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in kinds[:3]] == ["console", "console", "python"]
    assert kinds[0][1].splitlines()[-1].endswith("trio-unixconn demo")
    assert "nox -s tests" in kinds[1][1]


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_example(title: str, code: str) -> None:
    """Each example runs without a warning, and prints what its comments say."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    expected = re.findall(r"print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert expected
    assert sorted(done.stdout.splitlines()) == sorted(expected)


def test_there_is_an_example_of_each() -> None:
    """There is one for a descriptor, credentials, callbacks and a Cancellable, of some 30 lines."""
    assert len(EXAMPLES) == 4
    for title, code in EXAMPLES:
        assert len(code.splitlines()) <= 40, title
