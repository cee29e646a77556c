"""The check of words finds what it should, and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.lint import words

pytestmark = pytest.mark.once


@pytest.mark.slow
def test_words_of_this_project() -> None:
    """No text of this project has a refused word; the program says so by its exit status."""
    done = subprocess.run(
        [sys.executable, words.__file__], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "text",
    [
        "a descriptor is due",
        "whoever waits",
        "the task who waits",
        "Nobody listens",
        "if anyone connects",
        "the folder of the socket",
        "also when it is closed",
        "this is no socket",
        "the data that came",
        "bytes behind it",
        "it waits for ever",
        "as above",
        "default: 3 if left out",
    ],
)
def test_words_check_refuses(text: str) -> None:
    """Each rule finds its word."""
    assert [finding.line for finding in words.check("x.py", f"first\n{text}\n")] == [2]


def test_words_check_sees_phrases_over_two_lines() -> None:
    """A phrase may be divided by a line break, with the sign of a comment in the next line."""
    assert words.check("x.py", "# this is\n# no socket\n") == [(1, "is # no", "is not a ...")]


@pytest.mark.parametrize(
    "text",
    ["there is no socket", "it is no longer open", "each one of them", "whose", "NOBODY = 65534"],
)
def test_words_check_accepts(text: str) -> None:
    """What is like a refused word, or is excepted, is accepted."""
    assert words.check("x.py", text) == []


def test_words_exceptions_are_needed() -> None:
    """Each exception still excepts something."""
    unneeded = [
        allowed
        for glob, allowed, _ in words.EXCEPTIONS
        if not any(
            path.relative_to(words.ROOT).match(glob) and re.search(allowed, path.read_text())
            for path in words.files()
        )
    ]
    assert unneeded == []
